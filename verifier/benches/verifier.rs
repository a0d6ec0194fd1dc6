//! What a verdict costs, on one core: the quote of an RSA-2048 AK, a log of 45 KB, the policy. The ceiling of the whole
//! is the bare verification of the AK's signature; the peer is Keylime, with the policy that accepts all. The log stands
//! beside hashing its octets once.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

#[path = "../../benches/figure/mod.rs"]
mod figure;
mod keylime;

use assay_verifier::appraisal::{Appraisal, Expected, appraise};
use assay_verifier::boot_count::BootFacts;
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::event_log::{LaterExtension, UnverifiedLog};
use assay_verifier::evidence::{Challenge, verify};
use assay_verifier::learn::learn;
use assay_verifier::policy::{ArtefactReference, Policy};
use assay_verifier::quote::{AkPublic, PCR_COUNT, PcrValue, UnverifiedQuote, verify_quote};
use assay_wire::agent::AgentSettings;
use assay_wire::evidence::{AGENT_PCR, AgentMeasurement, Evidence, MeasurementKind};
use assay_wire::id::BootId;
use figure::{Better, Figure, in_turns, rate, wanted};
use keylime::Keylime;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::sign::Signer;
use ring::digest::{SHA256, digest};
use std::hint::black_box;

const NONCE: [u8; 32] = [0x11; 32];

fn main() {
    if !wanted("verifier") {
        return;
    }
    let key = Rsa::generate(2048).unwrap();
    let (ak, key) = (tpmt_public(&key), PKey::from_rsa(key).unwrap());
    let log = boot_log();
    let settings = settings();
    let evidence = evidence(&log, &serde_json::to_vec(&settings).unwrap(), &key);
    let policy = policy(&evidence, &ak);
    appraisals(&evidence, &ak, &policy, &settings);
    replays(&evidence, &ak);
    beside_keylime(&evidence, &ak, &policy, &settings);
}

/// The same evidence, ours and Keylime's in turns.
fn beside_keylime(evidence: &Evidence, ak: &[u8], policy: &Policy, settings: &AgentSettings) {
    let folder = tempfile::tempdir().unwrap();
    keylime::write_boot(folder.path(), evidence, ak, &NONCE);
    let Some(mut peer) = Keylime::start(folder.path()) else { return };
    let figure = |name, (ours, theirs)| {
        let against = "Keylime";
        Figure { bench: "verifier", name, unit: "1/s", ours, against, theirs, better: Better::Higher }.report();
    };
    figure("quote check", in_turns(|| rate(|| quote_only(evidence, ak)), || peer.rate("quote")));
    let whole = || rate(|| appraised(evidence, ak, policy, settings));
    figure("appraisal: quote, log, policy", in_turns(whole, || peer.rate("appraise")));
}

fn appraised(evidence: &Evidence, ak: &[u8], policy: &Policy, settings: &AgentSettings) -> u64 {
    let ak = AkPublic::parse(ak).unwrap();
    let replayed = verify(evidence, &Challenge { ak: &ak, nonce: &NONCE, last_clock: None }).unwrap();
    let boot = &BootFacts::first(BootId::random());
    let verdict = appraise(policy, &replayed, &Expected { settings, boot }, 0);
    assert!(matches!(verdict, Appraisal::Accepted(_)), "{verdict:?}");
    1
}

fn quote_only(evidence: &Evidence, ak: &[u8]) -> u64 {
    let ak = AkPublic::parse(ak).unwrap();
    let pcrs = pcr_values(evidence);
    black_box(verify_quote(&unverified(evidence, &pcrs), &ak, &NONCE).unwrap());
    1
}

fn appraisals(evidence: &Evidence, ak: &[u8], policy: &Policy, settings: &AgentSettings) {
    let document = serde_json::to_vec(evidence).unwrap();
    let appraised = |evidence: &Evidence| appraised(evidence, ak, policy, settings);
    let ceiling = bare_verification(ak, evidence);
    let figure = |name, ours, theirs| {
        let against = "RSA-2048 verifications alone";
        Figure { bench: "verifier", name, unit: "1/s", ours, against, theirs, better: Better::Higher }.report();
    };
    let (ours, theirs) = in_turns(|| rate(|| appraised(evidence)), || rate(&ceiling));
    figure("appraisal: quote, log, policy", ours, theirs);
    let from_json = || appraised(&serde_json::from_slice(&document).unwrap());
    let (ours, theirs) = in_turns(|| rate(from_json), || rate(&ceiling));
    figure("the same from the JSON document", ours, theirs);
    let (ours, theirs) = in_turns(|| rate(|| quote_only(evidence, ak)), || rate(&ceiling));
    figure("quote check", ours, theirs);
}

fn replays(evidence: &Evidence, ak: &[u8]) {
    let log = &evidence.event_log;
    let pcrs = pcr_values(evidence);
    let quote = verify_quote(&unverified(evidence, &pcrs), &AkPublic::parse(ak).unwrap(), &NONCE).unwrap();
    let later = [LaterExtension { pcr: AGENT_PCR, digest: sha256(&evidence.agent_measurements[0].data) }];
    let bytes = u64::try_from(log.len()).unwrap();
    let replay = || {
        black_box(UnverifiedLog::parse(log).unwrap().replay(&quote, &later).unwrap());
        bytes
    };
    let hash = || {
        black_box(digest(&SHA256, log));
        bytes
    };
    let (ours, theirs) = in_turns(|| rate(replay), || rate(hash));
    Figure {
        bench: "verifier",
        name: "event log: parse and replay",
        unit: "GB/s",
        ours: ours / 1e9,
        against: "SHA-256 of its octets",
        theirs: theirs / 1e9,
        better: Better::Higher,
    }
    .report();
}

/// The signature over the same octets, and nothing around it.
fn bare_verification(ak: &[u8], evidence: &Evidence) -> impl Fn() -> u64 {
    let modulus = ak[ak.len() - 256..].to_vec();
    let signature = evidence.signature[evidence.signature.len() - 256..].to_vec();
    let attest = evidence.attest.clone();
    move || {
        let key = ring::signature::RsaPublicKeyComponents { n: &modulus[..], e: &[1, 0, 1] };
        key.verify(&ring::signature::RSA_PKCS1_2048_8192_SHA256, &attest, &signature).unwrap();
        1
    }
}

/// The boot of a server: some 120 events, most of their octets in Secure Boot's databases.
fn boot_log() -> LogWriter {
    let secure_boot = EventType::EFI_VARIABLE_DRIVER_CONFIG;
    let certificates = |bytes: usize| signature_list(X509_GUID, &vec![0x5a; bytes], 1);
    let mut log = LogWriter::new()
        .measured(0, EventType::S_CRTM_VERSION, b"1\0.\x000\0\0\0")
        .event(0, EventType::EFI_PLATFORM_FIRMWARE_BLOB, sha256(b"firmware"), &[0; 16])
        .measured(7, secure_boot, &variable(GLOBAL, "SecureBoot", &[1]))
        .measured(7, secure_boot, &variable(GLOBAL, "PK", &certificates(1500)))
        .measured(7, secure_boot, &variable(GLOBAL, "KEK", &certificates(3000)))
        .measured(7, secure_boot, &variable(SECURITY, "db", &certificates(6500)))
        .measured(7, secure_boot, &variable(SECURITY, "dbx", &signature_list(SHA256_GUID, &[0x5a; 32], 416)));
    for entry in 0..40 {
        log = log.measured(
            1,
            EventType::EFI_VARIABLE_BOOT,
            &variable(GLOBAL, &format!("Boot{entry:04X}"), &boot_option()),
        );
    }
    for driver in 0..30u8 {
        log = log.event(2, EventType::EFI_BOOT_SERVICES_DRIVER, sha256(&[driver]), &image_load());
    }
    log = log.measured(4, EventType::EFI_ACTION, b"Calling EFI Application from Boot Option").separators();
    for image in ["snponly.efi", "agent.efi", "kernel"] {
        log = log.event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(image.as_bytes()), &image_load());
    }
    for section in [".linux", ".osrel", ".cmdline", ".initrd", ".uname"] {
        log = log.event(11, EventType::IPL, sha256(section.as_bytes()), section.as_bytes());
    }
    log.event(12, EventType::IPL, sha256(b"command line"), b"agent.efi quiet")
}

/// `EFI_SIGNATURE_LIST` (UEFI 32.4.1) of `count` equal signatures.
fn signature_list(kind: [u8; 16], signature: &[u8], count: usize) -> Vec<u8> {
    let one = [&[0x77; 16][..], signature].concat();
    let size = |bytes: usize| u32::try_from(bytes).unwrap().to_le_bytes();
    [&kind[..], &size(28 + one.len() * count), &size(0), &size(one.len()), &one.repeat(count)].concat()
}

/// `EFI_LOAD_OPTION` (UEFI 3.1.3): a name and a path that ends at once.
fn boot_option() -> Vec<u8> {
    let name: Vec<u8> = "UEFI PXEv4 (MAC 525400123456), network card of some maker\0"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    [&[1, 0, 0, 0][..], &[4, 0], &name, &END_OF_PATH].concat()
}

/// `UEFI_IMAGE_LOAD_EVENT` (PFP 10.2.3) with a path that ends at once.
fn image_load() -> Vec<u8> {
    [&[0x10; 24][..], &4_u64.to_le_bytes(), &END_OF_PATH].concat()
}

const END_OF_PATH: [u8; 4] = [0x7f, 0xff, 4, 0];
/// `EFI_CERT_X509_GUID`, as it lies in memory.
const X509_GUID: [u8; 16] =
    [0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72];
/// `EFI_CERT_SHA256_GUID`.
const SHA256_GUID: [u8; 16] =
    [0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28];
/// `EFI_GLOBAL_VARIABLE`.
const GLOBAL: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
/// `EFI_IMAGE_SECURITY_DATABASE_GUID`.
const SECURITY: [u8; 16] =
    [0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f];

fn artefacts() -> ArtefactReference {
    let event = |pcr: u8, kind: EventType, measured: &str| serde_json::json!({"pcr": pcr, "type": kind, "sha256": hex::encode(sha256(measured.as_bytes())), "description": measured});
    let images = ["snponly.efi", "agent.efi", "kernel"];
    let sections = [".linux", ".osrel", ".cmdline", ".initrd", ".uname"];
    let mut events: Vec<_> =
        images.iter().map(|image| event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, image)).collect();
    events.extend(sections.iter().map(|section| event(11, EventType::IPL, section)));
    events.push(event(12, EventType::IPL, "command line"));
    let document = serde_json::json!({"name": "bench", "command_line": "quiet", "events": events});
    ArtefactReference::from_json(&document.to_string()).unwrap()
}

fn policy(evidence: &Evidence, ak: &[u8]) -> Policy {
    let ak = AkPublic::parse(ak).unwrap();
    let replayed = verify(evidence, &Challenge { ak: &ak, nonce: &NONCE, last_clock: None }).unwrap();
    learn("bench", "node n1", &replayed, &artefacts()).unwrap()
}

fn settings() -> AgentSettings {
    AgentSettings {
        node: "n1".parse().unwrap(),
        verifier: "https://10.99.0.1:8443".into(),
        verifier_key_sha256: "ab".repeat(32),
    }
}

/// What the agent of this machine would send; the TPM is a key here, because a real one signs too slowly to matter.
fn evidence(log: &LogWriter, settings: &[u8], key: &PKey<Private>) -> Evidence {
    let mut pcrs = log.pcrs()[..PCR_COUNT].to_vec();
    let agent = &mut pcrs[usize::from(AGENT_PCR)];
    *agent = sha256(&[*agent, sha256(settings)].concat());
    let attest = tpms_attest(&sha256(&pcrs.concat()));
    let mut signer = Signer::new(MessageDigest::sha256(), key).unwrap();
    signer.update(&attest).unwrap();
    // TPMT_SIGNATURE: RSASSA, SHA-256, TPM2B.
    let signature = [&[0, 0x14, 0, 0x0b, 1, 0][..], &signer.sign_to_vec().unwrap()].concat();
    Evidence {
        attest,
        signature,
        pcrs: pcrs.iter().map(hex::encode).collect(),
        event_log: log.finish(),
        agent_measurements: vec![AgentMeasurement {
            pcr: AGENT_PCR,
            kind: MeasurementKind::AgentSettings,
            data: settings.to_vec(),
        }],
        ima: None,
        tee: Vec::new(),
        supporting: Vec::new(),
    }
}

/// `TPMT_PUBLIC` of a restricted RSA-2048 signing key (TPM 2.0 Part 2, 12.2.4).
fn tpmt_public(key: &Rsa<Private>) -> Vec<u8> {
    let attributes: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 16 | 1 << 18;
    let mut public = vec![0, 1, 0, 0x0b]; // RSA, named with SHA-256
    public.extend(attributes.to_be_bytes());
    public.extend([0, 0]); // no policy
    public.extend([0, 0x10, 0, 0x14, 0, 0x0b]); // no symmetric algorithm; RSASSA with SHA-256
    public.extend([8, 0, 0, 0, 0, 0, 1, 0]); // 2048 bits, the default exponent, TPM2B
    public.extend(key.n().to_vec_padded(256).unwrap());
    public
}

/// `TPMS_ATTEST` of a quote of PCRs 0 to 14 (TPM 2.0 Part 2, 10.12.12).
fn tpms_attest(pcr_digest: &[u8; 32]) -> Vec<u8> {
    let mut attest = vec![0xff, 0x54, 0x43, 0x47, 0x80, 0x18, 0, 34, 0, 0x0b];
    attest.extend([7; 32]); // the signer's qualified name
    attest.extend([0, 32]);
    attest.extend(NONCE);
    attest.extend([0; 16]); // clock, resets, restarts
    attest.push(1); // safe
    attest.extend([0; 8]); // firmware
    attest.extend([0, 0, 0, 1, 0, 0x0b, 3, 0xff, 0x7f, 0, 0, 32]);
    attest.extend(pcr_digest);
    attest
}

fn pcr_values(evidence: &Evidence) -> [PcrValue; PCR_COUNT] {
    let value = |text: &String| PcrValue::new(hex::decode(text).unwrap().try_into().unwrap());
    evidence.pcrs.iter().map(value).collect::<Vec<_>>().try_into().unwrap()
}

fn unverified<'a>(evidence: &'a Evidence, pcrs: &'a [PcrValue; PCR_COUNT]) -> UnverifiedQuote<'a> {
    UnverifiedQuote { attest: &evidence.attest, signature: &evidence.signature, pcrs }
}

/// `UEFI_VARIABLE_DATA`.
fn variable(vendor: [u8; 16], name: &str, content: &[u8]) -> Vec<u8> {
    let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut data = vendor.to_vec();
    data.extend(u64::try_from(units.len() / 2).unwrap().to_le_bytes());
    data.extend(u64::try_from(content.len()).unwrap().to_le_bytes());
    data.extend(units);
    data.extend(content);
    data
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest(&SHA256, bytes).as_ref().try_into().unwrap()
}
