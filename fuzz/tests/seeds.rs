//! Writes `seeds/`: what real peers send, so that fuzzing begins behind the front door. Run it after a format changes,
//! and commit what it wrote: `cargo test -p assay-fuzz --test seeds -- --ignored`. TPM structures are a software
//! TPM's, the event log is a boot's as the lab recorded it, packets are as OVMF, iPXE, Linux and our agent build them.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

use assay_imaging::rbd_disk::channel::{Answer, Mapped, Range, Request};
use assay_netboot::dhcp::lease::AddressLease;
use assay_netboot::dhcp::lease_log::{LeaseLog, parse};
use assay_ramdisk_agent::attestation::state::{AttestationState, CoAttestation};
use assay_ramdisk_agent::dhcp::{Exchange, Reaction};
use assay_ramdisk_agent::tpm::SavedAk;
use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::testing::{KeyKind, SignedQuote, SoftTpm, sha256};
use assay_verifier::event_log::UnverifiedLog;
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::evidence::{Challenge, verify};
use assay_verifier::ima::writer::{ListWriter, digest_ng};
use assay_verifier::learn::learn;
use assay_verifier::policy::{ArtefactReference, Policy};
use assay_verifier::quote::AkPublic;
use assay_wire::agent::{AgentSettings, Credential, EnrolRequest, SealedGrant, Verdict};
use assay_wire::attestation::SealedSecret;
use assay_wire::evidence::{AGENT_PCR, AgentMeasurement, Evidence, ImaList, MeasurementKind, RuntimeEvidence};
use assay_wire::id::{AdmissionId, BootId, LeaseId};
use assay_wire::result::{Claims, EAR_PROFILE, EarStatus, SignedResult, Submod, VerifierId};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use openssl::asn1::{Asn1Object, Asn1OctetString, Asn1Time};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::{X509, X509CrlBuilder, X509Extension, X509Name, X509RevokedBuilder};
use std::fs;
use std::path::{Path, PathBuf};

const RECORDED_LOG: &[u8] = include_bytes!("../../verifier/tests/fixtures/ovmf-ipxe-uki.log");
const NONCE: [u8; 32] = [0x11; 32];
const IMA_PCR: u8 = 10;
const MOST_OCTETS: usize = 16 * 1024;
const MOST_OCTETS_IN_ALL: usize = 200 * 1024;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds")
}

fn seed(target: &str, name: &str, bytes: impl AsRef<[u8]>) {
    let place = folder().join(target);
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join(name), bytes).unwrap();
}

#[test]
#[ignore = "writes into the source tree"]
fn write_the_seeds() {
    let (evidence, policy, ak) = tpm_structures();
    revocation_lists();
    event_logs();
    ima_lists();
    tee_quotes();
    policies(&policy);
    dhcp();
    tftp();
    http();
    iscsi();
    iscsi_text();
    iscsi_cdb();
    worker_messages();
    rbd_disk_messages();
    qcow2();
    root_trees();
    store_metadata();
    agent(&evidence, &ak);
    agent_attestation();
    result(&policy);
    ovsdb();
}

/// Every target begins with something, and all of it stays small.
#[test]
fn every_target_has_small_seeds() {
    let manifest = include_str!("../Cargo.toml");
    let targets: Vec<_> =
        manifest.lines().filter_map(|line| line.strip_prefix("name = \"fuzz-")?.strip_suffix('"')).collect();
    let mut in_all = 0;
    for target in &targets {
        let sizes: Vec<usize> = fs::read_dir(folder().join(target))
            .unwrap_or_else(|error| panic!("seeds of {target}: {error}"))
            .map(|entry| usize::try_from(entry.unwrap().metadata().unwrap().len()).unwrap())
            .collect();
        assert!(!sizes.is_empty(), "{target} has no seed");
        assert!(sizes.iter().all(|size| (1..=MOST_OCTETS).contains(size)), "{target}: {sizes:?}");
        in_all += sizes.iter().sum::<usize>();
    }
    assert!(in_all <= MOST_OCTETS_IN_ALL, "{in_all} octets of seeds");
    let folders = fs::read_dir(folder()).unwrap().count();
    assert_eq!(folders, targets.len(), "seeds for a target that is no more");
}

/// Keys, quotes and signatures of each kind; and the recorded boot as evidence, with the policy that it teaches.
fn tpm_structures() -> (Evidence, Policy, Vec<u8>) {
    let mut recorded = None;
    for (name, kind) in [("ecc", KeyKind::Ecc), ("rsa", KeyKind::Rsa), ("rsa-pss", KeyKind::RsaPss)] {
        let tpm = SoftTpm::start();
        let ek = tpm.create_ek(KeyKind::Rsa);
        let ak = tpm.create_ak(kind);
        let settings = boot(&tpm);
        let quote = tpm.quote(&NONCE, "sha256:0,1,2,3,4,5,6,7,8,9,10,11,12,13,14");
        seed("tpm_public", &format!("ek-{name}"), &ek);
        seed("tpm_public", &format!("ak-{name}"), &ak);
        seed("tpm_attest", name, &quote.attest);
        seed("tpm_signature", name, &quote.signature);
        recorded = Some((evidence(&tpm, quote, settings), ak));
    }
    let (tpm, cas) = SoftTpm::start_with_ek_certificate();
    let (ek, certificate) = (tpm.create_ek(KeyKind::Rsa), tpm.ek_certificate());
    let sized = |part: &[u8]| [&u16::try_from(part.len()).unwrap().to_be_bytes()[..], part].concat();
    let padded = [&certificate[..], &[0xff; 100]].concat();
    seed("ek_certificate", "swtpm", [sized(&ek), sized(&certificate)].concat());
    seed("ek_certificate", "swtpm-padded", [sized(&ek), sized(&padded)].concat());
    let chain: Vec<u8> = cas.iter().flat_map(|pem| X509::from_pem(pem).unwrap().to_der().unwrap()).collect();
    seed("ek_certificate", "swtpm-chain", [sized(&ek), sized(&certificate), chain].concat());
    let (evidence, ak) = recorded.unwrap();
    let parsed = AkPublic::parse(&ak).unwrap();
    let challenge = Challenge { ak: &parsed, nonce: &NONCE, last_clock: None };
    let policy = learn("recorded", "node n1", &verify(&evidence, &challenge).unwrap(), &artefacts()).unwrap();
    (evidence, policy, ak)
}

/// Extends what the recorded boot extended; gives the agent's settings.
fn boot(tpm: &SoftTpm) -> Vec<u8> {
    let log = UnverifiedLog::parse(RECORDED_LOG).unwrap();
    for event in log.inspect().iter().filter(|event| event.is_extended()) {
        let digest = event.digest(HashAlgorithm::Sha256).unwrap().try_into().unwrap();
        tpm.extend(u8::try_from(event.pcr()).unwrap(), &digest);
    }
    let settings = serde_json::to_vec(&settings()).unwrap();
    tpm.extend(AGENT_PCR, &sha256(&settings));
    assert_eq!(tpm.pcrs()[usize::from(IMA_PCR)], [0; 32]);
    settings
}

fn evidence(tpm: &SoftTpm, quote: SignedQuote, settings: Vec<u8>) -> Evidence {
    Evidence {
        attest: quote.attest,
        signature: quote.signature,
        pcrs: tpm.pcrs()[..15].iter().map(hex::encode).collect(),
        event_log: RECORDED_LOG.to_vec(),
        agent_measurements: vec![AgentMeasurement {
            pcr: AGENT_PCR,
            kind: MeasurementKind::AgentSettings,
            data: settings,
        }],
        ima: None,
        tee: Vec::new(),
        supporting: Vec::new(),
    }
}

/// The images and sections of the recorded boot, from its own log.
fn artefacts() -> ArtefactReference {
    let log = UnverifiedLog::parse(RECORDED_LOG).unwrap();
    let booted = log.inspect().iter().filter(|event| {
        let image = event.pcr() == 4 && event.kind() == EventType::EFI_BOOT_SERVICES_APPLICATION;
        event.is_extended() && (image || matches!(event.pcr(), 11 | 12))
    });
    let events: Vec<_> = booted
        .map(|event| {
            serde_json::json!({"pcr": event.pcr(), "type": event.kind(), "description": "recorded",
                "sha256": hex::encode(event.digest(HashAlgorithm::Sha256).unwrap())})
        })
        .collect();
    ArtefactReference::from_json(&serde_json::json!({"name": "recorded", "events": events}).to_string()).unwrap()
}

fn event_logs() {
    seed("event_log", "ovmf-ipxe-uki", RECORDED_LOG);
    seed("event_log", "padded", [RECORDED_LOG, &[0xff; 256]].concat());
    let small = LogWriter::new()
        .event(0, EventType::NO_ACTION, [0; 32], b"StartupLocality\0\x03")
        .measured(0, EventType::S_CRTM_VERSION, b"1\0.\x000\0\0\0")
        .event(0, EventType::EFI_PLATFORM_FIRMWARE_BLOB, sha256(b"firmware"), &[0; 16])
        .separators()
        .event(11, EventType::IPL, sha256(b"initrd"), b".initrd");
    seed("event_log", "startup-locality", small.finish());
    let registers = LogWriter::of_banks(&[HashAlgorithm::Sha384])
        .measured(1, EventType::EFI_HANDOFF_TABLES2, &[0; 9])
        .measured(1, EventType::EFI_VARIABLE_BOOT2, &variable("BootOrder", &[1, 0]))
        .measured(2, EventType::EFI_GPT_EVENT2, &[0; 100])
        .measured(3, EventType::EVENT_TAG, &[1, 0, 0, 0, 1, 0, 0, 0, b'x']);
    seed("event_log", "ccel", registers.finish());
    let old = LogWriter::tpm12()
        .measured(0, EventType::S_CRTM_VERSION, b"1.0")
        .measured(4, EventType::IPL, b"grub_cmd: boot\0")
        .separators();
    seed("event_log", "tpm-1.2", old.finish());
    let database = [&[0x26; 16][..], &92u32.to_le_bytes(), &[0; 4], &32u32.to_le_bytes(), &[9; 64]].concat();
    let banks = LogWriter::of_banks(&HashAlgorithm::ALL)
        .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("dbx", &database))
        .measured(7, EventType::EFI_VARIABLE_AUTHORITY, &variable("Shim", b"certificate"))
        .measured(2, EventType::EFI_SPDM_FIRMWARE_BLOB, b"SPDM Device Sec2\x02\0\0\0\0\0\0\0\x01\0\0\0")
        .separators();
    seed("event_log", "four-banks", banks.finish());
}

/// Quotes of an enclave and of a trust domain, whole and signed by nobody.
fn tee_quotes() {
    for (name, version, kind, report) in [("sgx", 3u16, 0u32, 384), ("tdx", 4, 0x81, 584)] {
        let header = [&version.to_le_bytes()[..], &[2, 0], &kind.to_le_bytes(), &[0; 40]].concat();
        // Certification data: of type 5, a chain in PEM.
        let chain = b"-----BEGIN CERTIFICATE-----";
        let certificates = [&[5, 0, 27, 0, 0, 0][..], chain].concat();
        let enclave = [&[0; 384 + 64][..], &[0, 0], &certificates].concat();
        let wrapped = match version {
            3 => enclave,
            _ => [&[6, 0][..], &u32::try_from(enclave.len()).unwrap().to_le_bytes(), &enclave].concat(),
        };
        let signature = [&[0; 64 + 64][..], &wrapped].concat();
        let length = u32::try_from(signature.len()).unwrap().to_le_bytes();
        seed("tee_quote", name, [&header[..], &vec![0; report], &length, &signature].concat());
    }
}

/// A list with an entry of each kind, binary and as the kernel prints it.
fn ima_lists() {
    let digest = digest_ng("sha256", &[2; 32]);
    let evm: [&[u8]; 9] = [
        &digest,
        b"/usr/bin/su\0",
        b"\x05\x02",
        b"security.ima\0",
        &[1, 0, 0, 0],
        &[9],
        &[0; 4],
        &[0; 4],
        &[0xed, 0x89],
    ];
    let list = ListWriter::after([0; 32])
        .boot_aggregate(&[[0; 32]; 15])
        .legacy("/init", &[1; 20])
        .file("/etc/ima/ima-policy", &[2; 32])
        .file("/usr/bin/ls", &[2; 32])
        .signed_file("/usr/bin/cat", &[3; 32], &[3, 2, 4, 0, 0, 0, 1, 0, 2, 9, 9])
        .entry("ima-ngv2", &[&[b"verity:", &digest[..]].concat(), b"/usr/bin/tar\0"])
        .buffer(".ima", b"a key")
        .entry("ima-modsig", &[&digest, b"/lib/m.ko\0", b"", &digest, b"pkcs7"])
        .entry("evm-sig", &evm)
        .violation("/var/log/messages");
    seed("ima_list", "binary", list.bytes());
    let line = |pcr: u8, rest: &str| format!("{pcr} {} {rest}\n", "ab".repeat(20));
    let text = [
        line(10, &format!("ima-ng sha256:{} boot_aggregate", "00".repeat(32))),
        line(10, &format!("ima-sig sha256:{} /usr/bin/ls 0302", "02".repeat(32))),
        line(10, &format!("ima {} /init", "01".repeat(20))),
    ];
    seed("ima_list", "ascii", text.concat());
}

/// `UEFI_VARIABLE_DATA`.
fn variable(name: &str, content: &[u8]) -> Vec<u8> {
    let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let sizes = [units.len() / 2, content.len()].map(|size| u64::try_from(size).unwrap().to_le_bytes());
    [&[0x61; 16], &sizes[0][..], &sizes[1], &units, content].concat()
}

fn policies(policy: &Policy) {
    assert!(Policy::parse(&policy.to_toml()).is_ok() && Policy::parse(&policy.to_json()).is_ok());
    seed("policy", "recorded.toml", policy.to_toml());
    seed("policy", "recorded.json", policy.to_json());
}

/// A client's packet: the fixed fields as QEMU's NICs have them, then options.
fn dhcp_packet(operation: u8, message: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
    let mut packet = vec![0; 236];
    packet[..8].copy_from_slice(&[operation, 1, 6, 0, 1, 2, 3, 4]);
    packet[10] = 0x80;
    packet[28..34].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 1]);
    packet.extend([99, 130, 83, 99, 53, 1, message]);
    for (code, value) in options {
        packet.extend([*code, u8::try_from(value.len()).unwrap()]);
        packet.extend(*value);
    }
    packet.push(255);
    packet.resize(packet.len().max(300), 0);
    packet
}

fn dhcp() {
    let (address, server, uuid) = (&[10, 99, 0, 50][..], &[10, 99, 0, 1][..], &[0; 17][..]);
    let wanted =
        &[1, 2, 3, 4, 5, 6, 12, 13, 15, 17, 18, 22, 23, 28, 40, 41, 42, 43, 50, 51, 54, 58, 59, 60, 66, 67][..];
    let firmware = [(57, &[5, 192][..]), (55, wanted), (97, uuid), (94, &[1, 3, 0]), (93, &[0, 7])];
    let pxe = (60, &b"PXEClient:Arch:00007:UNDI:003000"[..]);
    let with = |more: &[(u8, &'static [u8])]| [&firmware[..], more].concat();
    seed("dhcp_packet", "ovmf-discover", dhcp_packet(1, 1, &with(&[pxe])));
    let request = [&with(&[pxe])[..], &[(50, address), (54, server)]].concat();
    seed("dhcp_packet", "ovmf-request", dhcp_packet(1, 3, &request));
    let http = (60, &b"HTTPClient:Arch:00016:UNDI:003000"[..]);
    seed("dhcp_packet", "ovmf-http-discover", dhcp_packet(1, 1, &with(&[http])));
    let ipxe_features = &[0xb1, 5, 1, 0x1a, 0xf4, 0x10, 0, 0xeb, 3, 1, 0, 0, 0x17, 1, 1, 0x15, 1, 1, 0x13, 1, 1][..];
    let ipxe = with(&[pxe, (77, b"iPXE"), (175, ipxe_features), (61, &[1, 0x52, 0x54, 0, 0, 0, 1])]);
    seed("dhcp_packet", "ipxe-discover", dhcp_packet(1, 1, &ipxe));
    seed("dhcp_packet", "rfc-3004-user-class", dhcp_packet(1, 1, &with(&[pxe, (77, b"\x04iPXE")])));
    seed("dhcp_packet", "release", dhcp_packet(1, 7, &[(54, server)]));
    let mut overloaded = dhcp_packet(1, 1, &[(52, &[3]), (12, b"k\xf6ln"), (43, b"ab"), (43, b"cd")]);
    overloaded[108..113].copy_from_slice(&[77, 2, b'i', b'P', 255]);
    overloaded[44..49].copy_from_slice(&[77, 2, b'X', b'E', 255]);
    seed("dhcp_packet", "overload", overloaded);
    agent_dhcp(server);
    leases();
}

fn agent_dhcp(server: &[u8]) {
    let url = b"http://10.99.0.1/boot/0123456789abcdef0123456789abcdef/settings.json";
    let reply = |message| {
        let options = [(54, server), (51, &[0, 0, 2, 88]), (1, &[255, 255, 255, 0]), (3, &[10, 99, 0, 9]), (67, url)];
        let mut packet = dhcp_packet(2, message, &options);
        packet[16..20].copy_from_slice(&[10, 99, 0, 50]);
        packet
    };
    let mut exchange = Exchange::new("52:54:00:00:00:01".parse().unwrap(), 0x0102_0304);
    seed("dhcp_packet", "agent-discover", exchange.message());
    let Reaction::Send(request) = exchange.handle_packet(&reply(2)) else { panic!("no request") };
    seed("dhcp_packet", "agent-request", request);
    assert!(matches!(exchange.handle_packet(&reply(5)), Reaction::Bound(_)));
    let framed = |packet: Vec<u8>| [&u16::try_from(packet.len()).unwrap().to_be_bytes()[..], &packet].concat();
    seed("agent_dhcp_reply", "offer-ack", [framed(reply(2)), framed(reply(5))].concat());
    seed("agent_dhcp_reply", "offer-nak", [framed(reply(2)), framed(reply(6)), framed(reply(2))].concat());
}

fn leases() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("leases");
    let (mut log, _) = LeaseLog::open(&path, 0).unwrap();
    for host in 50..54 {
        let mac = format!("52:54:00:00:00:{host}").parse().unwrap();
        let address = [10, 99, 0, host].into();
        log.append(&AddressLease { address, mac, until_ms: 1_800_000_600_000 }).unwrap();
    }
    let bytes = fs::read(&path).unwrap();
    assert_eq!(parse(&bytes, 1_800_000_000_000).leases.len(), 4);
    seed("lease_log", "four", &bytes);
    seed("lease_log", "torn", &bytes[..bytes.len() - 20]);
}

fn tftp() {
    seed("tftp_packet", "ovmf-size", b"\0\x01snponly.efi\0octet\0tsize\x000\0blksize\x001468\0windowsize\x004\0");
    seed("tftp_packet", "ovmf-read", b"\0\x01snponly.efi\0octet\0blksize\x001468\0windowsize\x004\0");
    seed("tftp_packet", "ipxe-read", b"\0\x01autoexec.ipxe\0octet\0blksize\x001432\0tsize\x000\0");
    seed("tftp_packet", "write", b"\0\x02snponly.efi\0octet\0");
    seed("tftp_packet", "acknowledgement", b"\0\x04\0\x01");
    seed("tftp_packet", "error", b"\0\x05\0\x08User aborted the transfer\0");
}

fn http() {
    for (name, header) in
        [("first", "bytes=0-1023"), ("rest", "bytes=50-"), ("last", "bytes=-10"), ("two", "bytes=0-1,5-6")]
    {
        seed("range_header", name, header);
    }
}

/// A revocation list with one entry, of a CA that was made a moment ago.
fn revocation_lists() {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
    let mut name = X509Name::builder().unwrap();
    name.append_entry_by_text("CN", "EK CA").unwrap();
    let at = |seconds| Asn1Time::from_unix(seconds).unwrap();
    let mut list = X509CrlBuilder::new().unwrap();
    list.set_issuer_name(&name.build()).unwrap();
    list.set_last_update(&at(1_799_999_000)).unwrap();
    list.set_next_update(&at(1_800_001_000)).unwrap();
    let mut revoked = X509RevokedBuilder::new().unwrap();
    revoked.set_serial_number(&BigNum::from_u32(7).unwrap().to_asn1_integer().unwrap()).unwrap();
    revoked.set_revocation_date(&at(1_799_998_000)).unwrap();
    list.add_revoked(revoked.build()).unwrap();
    for (oid, content) in [("2.5.29.20", &[2, 1, 1][..]), ("2.5.29.35", &[0x30, 3, 0x80, 1, 1])] {
        let value = Asn1OctetString::new_from_bytes(content).unwrap();
        let oid = Asn1Object::from_str(oid).unwrap();
        list.append_extension(X509Extension::new_from_der(&oid, false, &value).unwrap()).unwrap();
    }
    list.sign(&key, MessageDigest::sha256()).unwrap();
    let list = list.build().unwrap();
    seed("ek_crl", "list.der", list.to_der().unwrap());
    seed("ek_crl", "lists.pem", list.to_pem().unwrap().repeat(2));
}

/// A PDU with its data, padded (RFC 7143 section 11.2).
fn pdu(opcode: u8, flags: u8, task_tag: u32, command: u32, fields: &[(usize, &[u8])], data: &[u8]) -> Vec<u8> {
    let mut pdu = vec![0; 48];
    pdu[..2].copy_from_slice(&[opcode, flags]);
    pdu[4..8].copy_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    pdu[16..20].copy_from_slice(&task_tag.to_be_bytes());
    pdu[24..28].copy_from_slice(&command.to_be_bytes());
    for (at, value) in fields {
        pdu[*at..*at + value.len()].copy_from_slice(value);
    }
    pdu.extend(data);
    pdu.resize(pdu.len().next_multiple_of(4), 0);
    pdu
}

fn iscsi() {
    const ISID: (usize, &[u8]) = (8, &[0x40, 0, 0, 0, 0, 1]);
    let text = |session: &str, more: &str| {
        format!(
            "InitiatorName=iqn.2026-01.t:i\0SessionType={session}\0HeaderDigest=None\0DataDigest=None\0DefaultTime2Wait=2\0DefaultTime2Retain=0\0IFMarker=No\0OFMarker=No\0ErrorRecoveryLevel=0\0InitialR2T=No\0ImmediateData=Yes\0MaxBurstLength=16776192\0FirstBurstLength=262144\0MaxOutstandingR2T=1\0MaxConnections=1\0DataPDUInOrder=Yes\0DataSequenceInOrder=Yes\0MaxRecvDataSegmentLength=262144\0{more}"
        )
    };
    let normal = text("Normal", "TargetName=iqn.2026-01.t:d\0");
    let login = pdu(0x43, 0x87, 1, 1, &[ISID], normal.as_bytes());
    let command = |direction: u8, number: u32, expected: u32, cdb: &[u8], data: &[u8]| {
        pdu(0x01, 0x80 | direction, number, number, &[(20, &expected.to_be_bytes()), (32, cdb)], data)
    };
    let logout = |number| pdu(0x46, 0x80, number, number, &[], b"");
    let reads = [
        login.clone(),
        command(0, 1, 0, &[0; 6], b""),                               // TEST UNIT READY
        command(0x40, 2, 96, &[0x12, 0, 0, 0, 96, 0], b""),           // INQUIRY
        command(0x40, 3, 255, &[0x12, 1, 0x83, 0, 255, 0], b""),      // its device identification
        command(0x40, 4, 8, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], b""), // READ CAPACITY(10)
        command(0x40, 5, 192, &[0x1a, 0, 0x3f, 0, 192, 0], b""),      // MODE SENSE(6)
        command(0x40, 6, 512, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0], b""), // REPORT LUNS
        command(0x40, 7, 4096, &[0x28, 0, 0, 0, 0, 8, 0, 0, 8, 0], b""), // READ(10)
        logout(8),
    ];
    seed("iscsi_connection", "reads", reads.concat());
    let out = |target_tag: [u8; 4], data: &[u8]| {
        pdu(0x05, 0x80, 2, 0, &[(20, &target_tag), (24, &[0; 4]), (40, &512_u32.to_be_bytes())], data)
    };
    let writes = [
        login.clone(),
        command(0x20, 1, 512, &[0x2a, 0, 0, 0, 0, 1, 0, 0, 1, 0], &[0x5a; 512]), // WRITE(10), data with it
        pdu(0x01, 0x20, 2, 2, &[(20, &1024_u32.to_be_bytes()), (32, &[0x2a, 0, 0, 0, 0, 2, 0, 0, 2, 0])], &[1; 512]),
        out([0xff; 4], &[2; 512]),                                 // the rest, unsolicited
        command(0, 3, 0, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], b""), // SYNCHRONIZE CACHE(10)
        command(0x20, 4, 24, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &unmap()), // UNMAP
        pdu(0x40, 0x80, 5, 5, &[(20, &[0xff; 4])], b"ping"),       // NOP-Out
        pdu(0x42, 0x81, 6, 6, &[(20, &[0, 0, 0, 1])], b""),        // ABORT TASK
        logout(7),
    ];
    seed("iscsi_connection", "writes", writes.concat());
    let list = pdu(0x04, 0x80, 1, 1, &[(20, &[0xff; 4])], b"SendTargets=All\0");
    let discovery = pdu(0x43, 0x87, 1, 1, &[ISID], text("Discovery", "").as_bytes());
    seed("iscsi_connection", "discovery", [discovery, list, logout(2)].concat());
    let first = pdu(
        0x43,
        0x81,
        1,
        1,
        &[ISID],
        b"InitiatorName=iqn.2026-01.t:i\0AuthMethod=CHAP,None\0TargetName=iqn.2026-01.t:d\0",
    );
    let second = pdu(0x43, 0x87, 1, 1, &[ISID], b"HeaderDigest=CRC32C,None\0DataDigest=CRC32C,None\0");
    seed("iscsi_connection", "staged-login", [first, second].concat());
}

/// Texts, one request a line after an octet that says which phase they are for.
fn iscsi_text() {
    let names = "InitiatorName=iqn.2026-01.t:i\0TargetName=iqn.2026-01.t:p\0";
    let chap = format!(
        "\0\x01{names}AuthMethod=CHAP,None\0\n\0CHAP_A=7,5\0\n\x01CHAP_N=i\0CHAP_R=0x{}\0CHAP_I=9\0CHAP_C=0b{}\0\n",
        "5a".repeat(32),
        "qqqq".repeat(8)
    );
    seed("iscsi_text", "chap", chap);
    seed("iscsi_text", "in-pieces", format!("\0\x40{names}\n\x40X-a=\n\x011\0AuthMethod=None\0\n"));
    let discovery = "\0\x01InitiatorName=iqn.2026-01.t:i\0SessionType=Discovery\0AuthMethod=CHAP\0\n\0CHAP_A=5\0\n";
    seed("iscsi_text", "discovery", discovery);
    let operational: &[u8] =
        b"HeaderDigest=CRC32C,None\0DataDigest=None\0MaxBurstLength=0x40000\0ErrorRecoveryLevel=2\0X-com.example=1\0\n";
    seed("iscsi_text", "operational", [b"\0\x87", names.as_bytes(), operational].concat());
    seed("iscsi_text", "send-targets", b"\x01\x80SendTargets=\0\n\x40SendTar\n\xa1gets=iqn.2026-01.t:d\0\n".as_slice());
}

/// Commands, each with flags, the length of its data, its CDB, its data.
fn iscsi_cdb() {
    let record = |flags: u8, cdb: &[u8], data: &[u8]| {
        let mut record = vec![flags, u8::try_from(data.len()).unwrap()];
        record.extend(cdb);
        record.resize(18, 0);
        record.extend(data);
        record
    };
    let (read, write, second) = (2, 4, 1);
    let vital = |page: u8| record(read, &[0x12, 1, page, 0, 255, 0], &[]);
    let pages = [0x00, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2].map(vital).concat();
    seed("iscsi_cdb", "vital-pages", pages);
    let capacities = [
        record(read, &[0x25], &[]),
        record(read, &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32], &[]),
        record(read, &[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 24], &[]),
        record(read, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64], &[]),
        record(read, &[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 0, 64], &[]),
        record(read, &[0xa3, 0x0c, 0x80, 0, 0, 0, 0, 0, 64, 0], &[]),
        record(read, &[0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 255], &[]),
        record(read, &[0x84, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64], &[]),
    ];
    seed("iscsi_cdb", "capacities", capacities.concat());
    let thin = [
        record(write, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &unmap()),
        record(write, &[0x93, 9, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8], &[]),
        record(0, &[0x35], &[]),
        record(read, &[0x88, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2], &[]),
        record(0, &[0x2f, 0, 0, 0, 0, 1, 0, 0, 2], &[]),
        record(0, &[0x34, 0, 0, 0, 0, 1, 0, 0, 2], &[]),
    ];
    seed("iscsi_cdb", "thin", thin.concat());
    let keys = |key: u8, action_key: u8| {
        let mut list = [0; 24];
        (list[7], list[15]) = (key, action_key);
        list
    };
    let out = |session: u8, action: u8, kind: u8, list: &[u8]| {
        record(write | session, &[0x5f, action, kind, 0, 0, 0, 0, 0, 24], list)
    };
    let reservations = [
        out(0, 0, 0, &keys(0, 1)),
        out(second, 6, 0, &keys(0, 2)),
        out(0, 1, 5, &keys(1, 0)),
        record(read | second, &[0x5e, 3, 0, 0, 0, 0, 0, 0, 255], &[]),
        out(second, 4, 5, &keys(2, 1)),
        record(read, &[0x03, 0, 0, 0, 18], &[]),
        out(second, 3, 0, &keys(2, 0)),
    ];
    seed("iscsi_cdb", "reservations", reservations.concat());
    // EXTENDED COPY: one target by its NAA designator, one segment.
    let mut list = vec![1, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0, 0xe4, 0, 0, 0, 1, 3, 0, 8];
    list.extend(((3_u64 << 60) | 1).to_be_bytes());
    list.resize(16 + 29, 0);
    list.extend([0, 2, 0, 2, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 9]);
    list.extend(4_u64.to_be_bytes());
    list.extend(100_u64.to_be_bytes());
    let length = u8::try_from(list.len()).unwrap();
    let copy = [
        record(write, &[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, length], &list),
        record(read, &[0x84, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64], &[]),
    ];
    seed("iscsi_cdb", "copy", copy.concat());
    let select = [0, 0, 0, 0, 0x0a, 10, 4, 0x10, 8, 0, 0, 0, 0xff, 0xff, 0, 0];
    let modes = [
        record(write, &[0x15, 0x10, 0, 0, 16], &select),
        record(read | second, &[0x1a, 8, 0x0a, 0, 255], &[]),
        record(write, &[0x2a, 0, 0, 0, 0, 1, 0, 0, 1], &[]),
    ];
    seed("iscsi_cdb", "modes", modes.concat());
}

/// The parameters of one UNMAP of one block (SBC-3 section 5.28).
fn unmap() -> Vec<u8> {
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend(9_u64.to_be_bytes());
    list.extend([0, 0, 0, 1, 0, 0, 0, 0]);
    list
}

/// Headers as `qemu-img create` writes them.
fn qcow2() {
    let folder = tempfile::tempdir().unwrap();
    for (name, options) in
        [("version-3", "compat=1.1"), ("version-2", "compat=0.10"), ("small-clusters", "cluster_size=512")]
    {
        let path = folder.path().join(name);
        let mut create = std::process::Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&path).arg("8M");
        assert!(create.status().expect("qemu-img runs").success());
        seed("qcow2_header", name, &fs::read(&path).unwrap()[..512]);
    }
}

/// Tar files as GNU tar writes them, with whiteouts and long names; and a manifest.
fn root_trees() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    let long = root.join("long".repeat(40));
    for made in [root.join("usr/bin"), root.join("etc"), long.clone()] {
        fs::create_dir_all(made).unwrap();
    }
    fs::write(root.join("usr/bin/a"), "x\n").unwrap();
    fs::hard_link(root.join("usr/bin/a"), root.join("usr/bin/b")).unwrap();
    std::os::unix::fs::symlink("usr/bin", root.join("bin")).unwrap();
    for empty in [root.join("etc/.wh.gone"), root.join("etc/.wh..wh..opq"), long.join("name".repeat(40))] {
        fs::write(empty, "").unwrap();
    }
    for format in ["gnu", "pax"] {
        let mut tar = std::process::Command::new("tar");
        tar.arg("-C").arg(&root).args(["-c", "--sort=name", "--mtime=@1700000000", "-b", "1", "--format", format]);
        // Times of access and change would be a record of their own for each entry.
        if format == "pax" {
            tar.arg("--pax-option=delete=atime,delete=ctime");
        }
        let output = tar.args(["--owner=0", "--group=0", "--numeric-owner", "."]).output().expect("tar runs");
        assert!(output.status.success());
        seed("root_tree", format, &output.stdout);
    }
    let digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let layer = serde_json::json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": format!("sha256:{digest}"), "size": 32});
    seed("root_tree", "manifest", serde_json::json!({"schemaVersion": 2, "layers": [layer]}).to_string());
}

/// Manifests of each kind, and the header of a map.
fn store_metadata() {
    let id = |digit: u8| format!("{digit}b9f1c2e-54b0-4c83-9d8e-0c8a1f2b7d11");
    let digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let chain = serde_json::json!({"golden": id(5), "layers": [id(6)]});
    let image = |content| {
        let sizes = (1 << 20, 4096);
        serde_json::json!({"layout": 2, "key": id(3), "virtual_bytes": sizes.0, "data_bytes": sizes.1, "content": content})
    };
    let golden = image(serde_json::json!({"kind": "golden", "sha256": digest, "root": digest}));
    let snapshot = image(serde_json::json!({"kind": "snapshot", "parent": id(5), "chain": chain}));
    let disk =
        serde_json::json!({"layout": 2, "disk": id(7), "project": "p1", "image": id(5), "chain": chain, "top": id(8)});
    for (name, value) in [("golden", golden), ("snapshot", snapshot), ("disk", disk)] {
        seed("store_metadata", name, value.to_string());
    }
    let mut map = b"ASSAYMAP".to_vec();
    map.extend(1_u32.to_le_bytes());
    map.extend([4096_u64, 1 << 20].iter().flat_map(|number| number.to_le_bytes()));
    map.extend(0..16);
    seed("store_metadata", "map", map);
}

fn settings() -> AgentSettings {
    AgentSettings {
        node: "n1".parse().unwrap(),
        verifier: "https://10.99.0.1:8443".into(),
        verifier_key_sha256: "ab".repeat(32),
    }
}

fn worker_messages() {
    let latency = r#"{"count":8,"p50_us":9,"p99_us":47}"#;
    let counts = r#""sessions":1,"connections":2,"read_bytes":4096,"written_bytes":512"#;
    let status = format!(r#"{{"status":{{{counts},"reads":{latency},"writes":{latency}}}}}"#);
    seed("worker_message", "status.json", status);
    seed("worker_message", "ready.json", r#"{"ready":{"own_user":true,"landlock_whole":true}}"#);
    let log =
        r#"{"log":{"level":"warn","event":"portal.refused","text":"too many connections peer=10.20.0.50:40000"}}"#;
    seed("worker_message", "log.json", log);
}

fn rbd_disk_messages() {
    let range = Range { offset: 4 << 20, length: 4096 };
    for (name, request) in [("read", Request::Read(range)), ("write", Request::Write(range)), ("flush", Request::Flush)]
    {
        seed("rbd_disk", name, [&request.encode()[..], &Answer::Done.encode(request)].concat());
    }
    let zero = Request::Zero(Range { offset: 0, length: 1 << 30 });
    seed("rbd_disk", "zero", [&zero.encode()[..], &Answer::Failed(28).encode(zero)].concat());
    let (asked, mapped) = (Request::Mapped(range), Mapped { mapped: true, length: 4096 });
    let octets = [&asked.encode()[..], &Answer::Done.encode(asked), &mapped.encode()].concat();
    seed("rbd_disk", "mapped", octets);
    let held = r#""confinement":{"own_user":true,"landlock_whole":true}"#;
    seed("rbd_disk", "ready.json", format!(r#"{{"ready":{{"byte_len":18874368,"object_bytes":4194304,{held}}}}}"#));
    seed("rbd_disk", "refused.json", r#"{"refused":{"reason":"opening the clone"}}"#);
}

fn agent(evidence: &Evidence, ak: &[u8]) {
    let settings = serde_json::to_vec(&settings()).unwrap();
    seed("agent_settings", "settings.json", &settings);
    seed("agent_messages", "settings.json", &settings);
    let node = "n1".parse().unwrap();
    let (ek_public, ek_certificate) = (ak.to_vec(), b"0\x82\0\0".to_vec());
    let ek_chain = Vec::new();
    let enrol = EnrolRequest { node, ek_public, ek_certificate, ek_chain, iak: None, ak_public: ak.to_vec() };
    seed("agent_messages", "enrol.json", serde_json::to_vec(&enrol).unwrap());
    seed("agent_messages", "activate.json", format!(r#"{{"proof":"{}"}}"#, "5a".repeat(32)));
    seed("agent_messages", "evidence.json", serde_json::to_vec(evidence).unwrap());
    let Evidence { attest, signature, pcrs, .. } = evidence.clone();
    let ima = Some(ImaList { first_entry: 3, entries: vec![0; 40] });
    let at_run_time =
        RuntimeEvidence { attest, signature, pcrs, ima, tee: Vec::new(), supporting: vec!["a.b.c".to_owned()] };
    seed("agent_messages", "runtime-evidence.json", serde_json::to_vec(&at_run_time).unwrap());
    seed("agent_messages", "secret.json", r#"{"share":"AAEC","shares":2}"#);
    let credential = Credential { id_object: vec![1; 66], encrypted_secret: vec![2; 256] };
    let admission = "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap();
    let grant = SealedGrant { admission, credential, nonce: vec![3; 12], ciphertext: vec![4; 200] };
    seed("agent_messages", "grant.json", serde_json::to_vec(&grant).unwrap());
    let share = SealedSecret { shares: 2, sealed: grant };
    seed("agent_attestation", "share.json", serde_json::to_vec(&share).unwrap());
    let affirmed = Verdict::Affirmed { result: "a.b.c".to_owned(), attestation: Some(admission) };
    seed("agent_messages", "affirmed.json", serde_json::to_vec(&affirmed).unwrap());
}

fn agent_attestation() {
    let state = AttestationState {
        node: "n1".parse().unwrap(),
        admission: "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap(),
        relay: "10.20.0.1:8443".parse().unwrap(),
        pin: "ab".repeat(32).parse().unwrap(),
        proof: zeroize::Zeroizing::new("5a".repeat(32)),
        ak: SavedAk { public: vec![1; 90], private: vec![2; 120] },
        co_verifiers: vec![CoAttestation {
            address: "10.30.0.2:8443".parse().unwrap(),
            pin: "cd".repeat(32).parse().unwrap(),
            admission: "01890a5d-ac96-774b-bcce-b302099a8058".parse().unwrap(),
            proof: zeroize::Zeroizing::new("a5".repeat(32)),
        }],
    };
    seed("agent_attestation", "state.json", &*state.to_json().unwrap());
    let next = r#"{"nonce":"EREREQ==","pcrs":[0,1],"expires_in_seconds":60,"ima_first_entry":3,"after_ms":30000}"#;
    let renewed = format!(r#"{{"verdict":"renewed","expires_at_ms":1800000000000,"next":{next}}}"#);
    seed("agent_attestation", "renewed.json", &renewed);
    let supporting = renewed.replace(r#""next""#, r#""result":"a.b.c","next""#);
    seed("agent_attestation", "renewed-supporting.json", supporting);
    seed("agent_attestation", "revoked.json", r#"{"verdict":"revoked","reasons":["PCR 12 changed"]}"#);
    let notice = r#"{"sequence":1,"node":"n2","admission":"01890a5d-ac96-774b-bcce-b302099a8057","ak_name":"000b","reason":"silence","at_ms":1}"#;
    seed("agent_attestation", "notices.json", format!(r#"{{"latest":1,"notices":[{notice}]}}"#));
}

fn result(policy: &Policy) {
    let key = ring::signature::Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
    let rules = [("pcr-4".to_owned(), "every event matched".to_owned())].into();
    let submod = Submod { status: EarStatus::Affirming, policy: policy.digest().to_string(), rules };
    let claims = Claims {
        eat_profile: EAR_PROFILE.to_owned(),
        iat: 1_800_000_000,
        exp: 1_800_003_600,
        jti: AdmissionId::random(),
        verifier_id: VerifierId { developer: "assay".into(), build: "seed".into() },
        eat_nonce: URL_SAFE_NO_PAD.encode(NONCE),
        submods: [("tpm".to_owned(), submod)].into(),
        node: "n1".parse().unwrap(),
        project: "alpha".parse().unwrap(),
        lease: LeaseId::random(),
        boot: BootId::random(),
        ek_public: URL_SAFE_NO_PAD.encode([1; 314]),
        ek_sha256: "ab".repeat(32),
        ak_name: format!("000b{}", "cd".repeat(32)),
        renews: None,
        reset_count: 3,
        restart_count: 0,
    };
    seed("attestation_result", "affirming", SignedResult::sign(&claims, &key).as_str());
}

fn ovsdb() {
    seed(
        "ovsdb_framing",
        "echo",
        r#"{"method":"echo","params":[],"id":"echo"}{"id":1,"result":["Open_vSwitch"],"error":null}"#,
    );
    let transact = r#"{"id":2,"error":null,"result":[{"count":1},{"rows":[{"_uuid":["uuid","36bef046-7da7-43a5-905a-c17899216fcb"],"name":"tap0","tag":["set",[]],"other_config":["map",[["a","\"}\\"]]]}]}]}"#;
    seed("ovsdb_framing", "transact", transact);
    seed(
        "ovsdb_framing",
        "unixctl",
        " {\"id\":0,\"result\":\" port  VLAN  MAC                Age\\n\",\"error\":null}\n",
    );
}
