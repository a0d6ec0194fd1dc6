//! The whole conversation with a verifier, with a real TPM on one side and real cryptography on the other.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

mod support;

use assay_ramdisk_agent::attestation::state::AttestationState;
use assay_ramdisk_agent::client::Client;
use assay_ramdisk_agent::run::{measured_settings, to_grant, to_release};
use assay_ramdisk_agent::session::{Session, SessionError, enrol_request};
use assay_ramdisk_agent::settings::{MeasuredSettings, sha256};
use assay_ramdisk_agent::tee::TeeQuotes;
use assay_ramdisk_agent::tpm::Tpm as _;
use assay_ramdisk_agent::tpm::esapi::EsapiTpm;
use assay_tpm::attest::Quote;
use assay_tpm::credential::make_credential;
use assay_tpm::public::Public;
use assay_tpm::seal::seal_grant;
use assay_tpm::testing::NetworkTpm;
use assay_wire::agent::{
    ActivateRequest, CoVerifier, EnrolChallenge, EnrolRequest, EvidenceRequest, Grant, ReleaseStatus, TenantAddress,
    Verdict,
};
use assay_wire::evidence::{Evidence, QUOTED_PCRS, TeeQuote};
use assay_wire::id::{AdmissionId, SessionId};
use serde::Serialize;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use support::{Seen, TlsServer, tsm};

const SECRET: [u8; 32] = [0x5a; 32];
const NONCE: [u8; 32] = [0x11; 32];
const CHAP_SECRET: &str = "sixteen-secrets!";

/// The verifier's side, and what it saw.
#[derive(Default)]
struct Verifier {
    enrolled: Option<EnrolRequest>,
    evidence: Option<Evidence>,
    calls: Vec<String>,
    polls: u32,
    rejects: bool,
    /// Whom else the agent is to ask.
    co_verifiers: Vec<CoVerifier>,
    /// It begins no releases: what it signs, and under which id it goes on attesting.
    affirms: Option<(String, AdmissionId)>,
}

impl Verifier {
    fn answer(&mut self, seen: &Seen, relay: SocketAddr) -> (u16, Vec<u8>) {
        let call = seen.path.rsplit('/').next().unwrap_or_default().to_owned();
        self.calls.push(format!("{} {call}", seen.method));
        let is_open = matches!(call.as_str(), "enrol" | "activate");
        if !is_open && seen.bearer.as_deref() != Some(&hex::encode(SECRET)) {
            return (401, Vec::new());
        }
        match call.as_str() {
            "enrol" => {
                let request: EnrolRequest = serde_json::from_slice(&seen.body).unwrap();
                let ak = Public::parse(&request.ak_public).unwrap();
                let credential = make_credential(&request.ek_public, ak.name().as_bytes(), &SECRET).unwrap();
                self.enrolled = Some(request);
                ok(&EnrolChallenge { session: SessionId::random(), credential })
            }
            "activate" => {
                let request: ActivateRequest = serde_json::from_slice(&seen.body).unwrap();
                assert_eq!(request.proof, hex::encode(SECRET));
                ok(&EvidenceRequest {
                    nonce: NONCE.to_vec(),
                    pcrs: QUOTED_PCRS.collect(),
                    expires_in_seconds: 60,
                    co_verifiers: self.co_verifiers.clone(),
                })
            }
            "evidence" if self.rejects => {
                ok(&Verdict::Rejected { reasons: vec!["PCR 4 is not ours".to_owned(), "nor is PCR 7".to_owned()] })
            }
            "evidence" => {
                self.evidence = Some(serde_json::from_slice(&seen.body).unwrap());
                match self.affirms.clone() {
                    Some((result, id)) => ok(&Verdict::Affirmed { result, attestation: Some(id) }),
                    None => ok(&Verdict::Accepted),
                }
            }
            "release" if self.polls < 2 => {
                self.polls += 1;
                ok(&ReleaseStatus::Pending)
            }
            "release" => {
                let SocketAddr::V4(relay) = relay else { panic!("IPv4 only") };
                let address = "10.20.0.50/24".parse().unwrap();
                ok(&ReleaseStatus::Move(TenantAddress { address, router: None, relay }))
            }
            "ready" | "handover" => (204, Vec::new()),
            "grant" => {
                let request = self.enrolled.as_ref().unwrap();
                let ak = Public::parse(&request.ak_public).unwrap();
                let grant = serde_json::to_vec(&grant()).unwrap();
                let sealed =
                    seal_grant(&request.ek_public, ak.name().as_bytes(), AdmissionId::random(), &grant).unwrap();
                ok(&sealed)
            }
            _ => (404, Vec::new()),
        }
    }
}

fn ok(answer: &impl Serialize) -> (u16, Vec<u8>) {
    (200, serde_json::to_vec(answer).unwrap())
}

fn grant() -> Grant {
    Grant {
        target: "iqn.2026-01.org.example:disk".parse().unwrap(),
        portal: "10.20.0.1:3260".parse().unwrap(),
        lun: 0,
        initiator: "iqn.2026-01.org.example:node".parse().unwrap(),
        chap_name: "node".to_owned(),
        chap_secret: CHAP_SECRET.to_owned(),
    }
}

/// A verifier's server, whose relay is itself.
async fn serve(verifier: Arc<Mutex<Verifier>>) -> TlsServer {
    let own_address = Arc::new(Mutex::new(None));
    let relay = Arc::clone(&own_address);
    let server = TlsServer::start(move |seen| {
        let relay = relay.lock().unwrap().unwrap();
        verifier.lock().unwrap().answer(&seen, relay)
    })
    .await;
    *own_address.lock().unwrap() = Some(server.address);
    server
}

fn settings_document(server: &TlsServer) -> Vec<u8> {
    format!(r#"{{"node":"n1","verifier":"https://{}","verifier_key_sha256":"{}"}}"#, server.address, server.pin)
        .into_bytes()
}

fn event_log() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"an event log").unwrap();
    file
}

#[tokio::test]
async fn from_settings_to_handover() {
    let soft = NetworkTpm::start();
    let mut tpm = EsapiTpm::open(&soft.tcti()).unwrap();
    let verifier = Arc::new(Mutex::new(Verifier::default()));
    let server = serve(Arc::clone(&verifier)).await;
    let document = settings_document(&server);

    let settings = MeasuredSettings::measure(&document, &mut tpm).unwrap();
    let expected_pcr = sha256(&[[0; 32], sha256(&document)].concat());
    assert_eq!(tpm.pcr_read(&[14]).unwrap(), [expected_pcr]);

    let reports = tempfile::tempdir().unwrap();
    let tee = TeeQuotes::new(tsm::interface(reports.path(), tsm::tdx));
    let released = to_release(&mut tpm, &settings, event_log().path(), &tee).await.unwrap();
    assert_eq!(released.address().address.to_string(), "10.20.0.50/24");
    let granted = to_grant(released, &mut tpm, None).await.unwrap();
    assert_eq!(granted.grant().chap_secret, CHAP_SECRET);
    granted.handover().await.unwrap();

    let seen = verifier.lock().unwrap();
    let expected = [
        "POST enrol",
        "POST activate",
        "POST evidence",
        "GET release",
        "GET release",
        "GET release",
        "POST ready",
        "GET grant",
        "POST handover",
    ];
    assert_eq!(seen.calls, expected);
    let enrolled = seen.enrolled.as_ref().unwrap();
    assert!(enrolled.ek_certificate.starts_with(&[0x30, 0x82]), "no EK certificate was sent");
    let evidence = seen.evidence.as_ref().unwrap();
    check_evidence(evidence, &document, expected_pcr);
    let ak = Public::parse(&enrolled.ak_public).unwrap();
    assert_eq!(evidence.tee, [tsm::quote_of(&TeeQuote::report_data(&NONCE, ak.name().as_bytes()))]);
}

#[tokio::test]
async fn who_affirmed_the_boot_is_handed_over_to_the_tenants_agent() {
    let soft = NetworkTpm::start();
    let mut tpm = EsapiTpm::open(&soft.tcti()).unwrap();
    let (good, bad) = (AdmissionId::random(), AdmissionId::random());
    let others = [
        Verifier { affirms: Some(("a.b.c".to_owned(), good)), ..Verifier::default() },
        // No result at all, and a rejection: neither keeps the node from being admitted where it is not required.
        Verifier { affirms: Some(("\u{1b}[2J".to_owned(), bad)), ..Verifier::default() },
        Verifier { rejects: true, ..Verifier::default() },
    ];
    let mut servers = Vec::new();
    for other in others {
        servers.push(serve(Arc::new(Mutex::new(other))).await);
    }
    let named = |server: &TlsServer| CoVerifier {
        url: format!("https://{}", server.address),
        key_sha256: server.pin.to_string(),
    };
    let co_verifiers = servers.iter().map(named).collect();
    let verifier = Arc::new(Mutex::new(Verifier { co_verifiers, ..Verifier::default() }));
    let server = serve(Arc::clone(&verifier)).await;
    let settings = MeasuredSettings::measure(&settings_document(&server), &mut tpm).unwrap();
    let released = to_release(&mut tpm, &settings, event_log().path(), &TeeQuotes::default()).await.unwrap();
    let granted = to_grant(released, &mut tpm, None).await.unwrap();
    assert_eq!(verifier.lock().unwrap().evidence.as_ref().unwrap().supporting, ["a.b.c"]);
    let state = granted.attestation("n1".parse().unwrap(), server.pin, tpm.saved_ak().unwrap());
    let [co_verifier] = &state.co_verifiers[..] else { panic!("{state:?}") };
    assert_eq!(
        (co_verifier.address, co_verifier.pin, co_verifier.admission),
        (servers[0].address, servers[0].pin, good)
    );
    assert_eq!(*co_verifier.proof, hex::encode(SECRET));
    assert_eq!(AttestationState::parse(&state.to_json().unwrap()).unwrap(), state);
}

/// The quote is over the nonce and the PCR values that came with it.
fn check_evidence(evidence: &Evidence, document: &[u8], settings_pcr: [u8; 32]) {
    let attest = Quote::parse(&evidence.attest).unwrap();
    assert_eq!(attest.extra_data, NONCE);
    let values: Vec<u8> = evidence.pcrs.iter().flat_map(|value| hex::decode(value).unwrap()).collect();
    assert_eq!(values.len(), 15 * 32);
    assert_eq!(values[14 * 32..], settings_pcr);
    assert_eq!(attest.pcr_digest, sha256(&values));
    assert_eq!(evidence.event_log, b"an event log");
    assert_eq!(evidence.agent_measurements.len(), 1);
    assert_eq!(evidence.agent_measurements[0].data, document);
}

#[tokio::test]
async fn a_rejection_carries_every_reason() {
    let soft = NetworkTpm::start();
    let mut tpm = EsapiTpm::open(&soft.tcti()).unwrap();
    let verifier = Arc::new(Mutex::new(Verifier { rejects: true, ..Verifier::default() }));
    let server = serve(Arc::clone(&verifier)).await;
    let settings = MeasuredSettings::measure(&settings_document(&server), &mut tpm).unwrap();
    let Err(error) = to_release(&mut tpm, &settings, event_log().path(), &TeeQuotes::default()).await else {
        panic!("accepted")
    };
    assert!(error.is_refusal());
    assert_eq!(error.to_string(), "the verifier rejects this boot: PCR 4 is not ours; nor is PCR 7");
}

#[tokio::test]
async fn another_key_than_the_pinned_one_is_refused_at_once() {
    let soft = NetworkTpm::start();
    let mut tpm = EsapiTpm::open(&soft.tcti()).unwrap();
    let verifier = Arc::new(Mutex::new(Verifier::default()));
    let server = serve(Arc::clone(&verifier)).await;
    let other = serve(Arc::new(Mutex::new(Verifier::default()))).await;
    let client = Client::new(server.address, other.pin).unwrap();
    let keys = tpm.create_keys().unwrap();
    let request = enrol_request("n1".parse().unwrap(), &keys);
    let Err(SessionError::Call(error)) = Session::enrol(client, &request).await else { panic!("enrolled") };
    assert!(!error.is_transient());
    assert!(verifier.lock().unwrap().calls.is_empty());
}

#[tokio::test]
async fn a_credential_for_another_ak_does_not_open() {
    let soft = NetworkTpm::start();
    let mut tpm = EsapiTpm::open(&soft.tcti()).unwrap();
    let keys = tpm.create_keys().unwrap();
    let name = Public::parse(&keys.ak_public).unwrap().name().as_bytes().to_vec();
    let mut other = name.clone();
    other[5] ^= 1;
    let good = make_credential(&keys.ek_public, &name, &SECRET).unwrap();
    assert_eq!(*tpm.activate_credential(&good).unwrap(), SECRET);
    let foreign = make_credential(&keys.ek_public, &other, &SECRET).unwrap();
    assert!(tpm.activate_credential(&foreign).is_err());
    // A failure leaves no session behind that would stand in the way of the next.
    for _ in 0..5 {
        assert!(tpm.activate_credential(&foreign).is_err());
    }
    assert_eq!(*tpm.activate_credential(&good).unwrap(), SECRET);
}

#[tokio::test]
async fn settings_that_cannot_be_fetched_are_not_measured() {
    let soft = NetworkTpm::start();
    let mut tpm = EsapiTpm::open(&soft.tcti()).unwrap();
    let url = "http://verifier.example/settings.json".parse().unwrap();
    assert!(measured_settings(&url, &mut tpm).await.is_err());
    assert_eq!(tpm.pcr_read(&[14]).unwrap(), [[0; 32]]);
}
