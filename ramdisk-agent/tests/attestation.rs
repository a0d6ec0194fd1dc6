//! Continuous attestation with a real TPM on one side and real cryptography on the other: the key that was admitted goes
//! on being used by another process, as after a kexec.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

mod support;

use assay_ramdisk_agent::attestation::state::{AttestationState, CoAttestation};
use assay_ramdisk_agent::attestation::{AttestationError, Attester, Ended, Places};
use assay_ramdisk_agent::settings::sha256;
use assay_ramdisk_agent::tpm::Tpm as _;
use assay_ramdisk_agent::tpm::esapi::EsapiTpm;
use assay_tpm::attest::Quote;
use assay_tpm::public::{KeyPublic, Public};
use assay_tpm::seal::seal_grant;
use assay_tpm::signature::{Signature, SignatureValue};
use assay_tpm::testing::NetworkTpm;
use assay_wire::attestation::{
    AttestationAnswer, AttestationRequest, RevocationNotice, RevocationNotices, SealedSecret, split_secret,
};
use assay_wire::evidence::{QUOTED_PCRS, RuntimeEvidence, TeeQuote};
use assay_wire::id::AdmissionId;
use assay_wire::problem::Problem;
use serde::Serialize;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{Seen, TlsServer, tsm};
use tokio::sync::watch;
use zeroize::Zeroizing;

const SECRET: &[u8] = b"the tenant's secret";
const PROOF: &str = "5a5a5a5a";

/// The verifier's side: answers by the script, and keeps what it was sent.
struct Verifier {
    admission: AdmissionId,
    ek_public: Vec<u8>,
    ak_public: Vec<u8>,
    calls: Vec<String>,
    evidence: Vec<(Vec<u8>, RuntimeEvidence)>,
    nonces: u8,
    /// How many times evidence is good before the last answer.
    good: usize,
    /// The first answer to evidence: a nonce that is not known any more.
    forgets: bool,
    /// The status of the last answer, if it is no verdict.
    ends_with: Option<u16>,
    /// What it has of the tenant's secret, and of how many shares that is one; none without.
    share: Option<(u8, Vec<u8>)>,
    /// What it signs, if it is one of the project's own.
    signs: Option<String>,
    after_ms: u64,
}

impl Verifier {
    fn answer(&mut self, seen: &Seen) -> (u16, Vec<u8>) {
        assert_eq!(seen.bearer.as_deref(), Some(PROOF));
        let path = seen.path.strip_prefix(&format!("/agent/v1/attestations/{}", self.admission)).unwrap().to_owned();
        self.calls.push(format!("{} {path}", seen.method));
        match path.as_str() {
            "/challenge" => ok(&self.request()),
            "" => self.judge(serde_json::from_slice(&seen.body).unwrap()),
            "/notices?after=0" => ok(&RevocationNotices { latest: 4, notices: vec![notice("n7", 4)] }),
            "/secret" => {
                let Some((shares, share)) = &self.share else { return problem(404, "not-found") };
                let ak = Public::parse(&self.ak_public).unwrap();
                let sealed = seal_grant(&self.ek_public, ak.name().as_bytes(), self.admission, share).unwrap();
                ok(&SealedSecret { shares: *shares, sealed })
            }
            _ => ok(&RevocationNotices { latest: 4, notices: Vec::new() }),
        }
    }

    fn request(&mut self) -> AttestationRequest {
        self.nonces += 1;
        AttestationRequest {
            nonce: vec![self.nonces; 32],
            pcrs: QUOTED_PCRS.collect(),
            expires_in_seconds: 60,
            ima_first_entry: 0,
            after_ms: self.after_ms,
        }
    }

    fn judge(&mut self, evidence: RuntimeEvidence) -> (u16, Vec<u8>) {
        if std::mem::take(&mut self.forgets) {
            return problem(409, "no-nonce");
        }
        self.evidence.push((vec![self.nonces; 32], evidence));
        if self.evidence.len() <= self.good {
            let result = self.signs.clone();
            return ok(&AttestationAnswer::Renewed { expires_at_ms: 1, next: self.request(), result });
        }
        match self.ends_with {
            None => {
                ok(&AttestationAnswer::Revoked { reasons: vec!["PCR 12 changed".to_owned(), "so did 13".to_owned()] })
            }
            Some(status) => problem(status, "over"),
        }
    }
}

async fn serve(verifier: &Arc<Mutex<Verifier>>, calls: &watch::Sender<u64>) -> TlsServer {
    let (answering, calls) = (Arc::clone(verifier), calls.clone());
    TlsServer::start(move |seen| {
        let answer = answering.lock().unwrap().answer(&seen);
        calls.send_modify(|calls| *calls += 1);
        answer
    })
    .await
}

fn ok(answer: &impl Serialize) -> (u16, Vec<u8>) {
    (200, serde_json::to_vec(answer).unwrap())
}

fn problem(status: u16, kind: &str) -> (u16, Vec<u8>) {
    let problem = Problem { kind: kind.to_owned(), status, detail: "as the test says".to_owned(), hint: None };
    (status, serde_json::to_vec(&problem).unwrap())
}

fn notice(node: &str, sequence: u64) -> RevocationNotice {
    RevocationNotice {
        sequence,
        node: node.parse().unwrap(),
        admission: AdmissionId::random(),
        ak_name: "000b00".to_owned(),
        reason: "silence".to_owned(),
        at_ms: 1,
    }
}

/// A node whose ramdisk has handed over, and its verifier.
struct Node {
    soft: NetworkTpm,
    verifier: Arc<Mutex<Verifier>>,
    state: AttestationState,
    places: Places,
    folder: tempfile::TempDir,
    /// Counts the calls to any verifier.
    calls: watch::Sender<u64>,
}

impl Node {
    async fn handed_over(good: usize) -> Self {
        let soft = NetworkTpm::start();
        let mut tpm = EsapiTpm::open(&soft.tcti()).unwrap();
        let keys = tpm.create_keys().unwrap();
        let ak = tpm.saved_ak().unwrap();
        assert_eq!(ak.public, keys.ak_public);
        let admission = AdmissionId::random();
        let verifier = Arc::new(Mutex::new(Verifier {
            admission,
            ek_public: keys.ek_public,
            ak_public: keys.ak_public,
            calls: Vec::new(),
            evidence: Vec::new(),
            nonces: 0,
            good,
            forgets: false,
            ends_with: None,
            share: Some((1, SECRET.to_vec())),
            signs: None,
            after_ms: 1,
        }));
        let calls = watch::Sender::default();
        let server = serve(&verifier, &calls).await;
        let SocketAddr::V4(relay) = server.address else { panic!("IPv4 only") };
        let proof = Zeroizing::new(PROOF.to_owned());
        let node = "n1".parse().unwrap();
        let state = AttestationState { node, admission, relay, pin: server.pin, proof, ak, co_verifiers: Vec::new() };
        let folder = tempfile::tempdir().unwrap();
        let hooks = folder.path().join("hooks");
        fs::create_dir(&hooks).unwrap();
        let hook = hooks.join("drop-keys");
        fs::write(&hook, format!("#!/bin/sh\necho $1 >> {}/dropped\n", folder.path().display())).unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        let reports = folder.path().join("report");
        fs::create_dir(&reports).unwrap();
        let (run, measurements) = (folder.path().join("run"), folder.path().join("none"));
        let places = Places { run, hooks, measurements, tee: tsm::interface(&reports, tsm::tdx) };
        // The ramdisk's connection to the TPM ends here, and its loaded keys with it.
        Self { soft, verifier, state, places, folder, calls }
    }

    /// The same with a verifier of the project's own.
    async fn with_co_verifier(good: usize) -> (Self, Arc<Mutex<Verifier>>) {
        let mut node = Self::handed_over(usize::MAX).await;
        let co_verifier = {
            let mut leading = node.verifier.lock().unwrap();
            leading.after_ms = 20;
            Arc::new(Mutex::new(Verifier {
                admission: AdmissionId::random(),
                ek_public: leading.ek_public.clone(),
                ak_public: leading.ak_public.clone(),
                calls: Vec::new(),
                evidence: Vec::new(),
                nonces: 100,
                good,
                forgets: false,
                ends_with: None,
                share: None,
                signs: Some("a.b.c".to_owned()),
                after_ms: 20,
            }))
        };
        let server = serve(&co_verifier, &node.calls).await;
        let admission = co_verifier.lock().unwrap().admission;
        let proof = Zeroizing::new(PROOF.to_owned());
        node.state.co_verifiers = vec![CoAttestation { address: server.address, pin: server.pin, admission, proof }];
        (node, co_verifier)
    }

    /// Attests until `wanted` holds, with a deadline. It is looked at with each call: the next one comes soon.
    async fn attest_until(&self, what: &str, wanted: impl Fn() -> bool) {
        let mut calls = self.calls.subscribe();
        let seen = async {
            while !wanted() {
                calls.changed().await.unwrap();
            }
        };
        tokio::select! {
            ended = self.attest() => panic!("{ended:?}"),
            seen = tokio::time::timeout(Duration::from_secs(30), seen) => seen.expect(what),
        }
    }

    fn secret(&self) -> Option<Vec<u8>> {
        fs::read(self.places.run.join("secret")).ok()
    }

    /// What the tenant's agent does, from the file that was handed over.
    async fn attest(&self) -> Result<Ended, AttestationError> {
        let file = self.folder.path().join("attestation.json");
        fs::write(&file, &*self.state.to_json().unwrap()).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let state = AttestationState::read(&file).unwrap();
        let tpm = EsapiTpm::open(&self.soft.tcti()).unwrap();
        Attester::new(state, tpm, self.places.clone())?.run().await
    }
}

/// Whether the AK signed `message`, as ring sees it.
fn signed_by(ak: &Public, message: &[u8], signature: &[u8]) -> bool {
    let KeyPublic::Ecc { x, y, .. } = ak.key() else { panic!("not an ECC key") };
    let SignatureValue::Ecdsa { r, s } = Signature::parse(signature).unwrap().value else { panic!("not ECDSA") };
    let padded = |number: &[u8]| [vec![0; 32 - number.len()], number.to_vec()].concat();
    let point = [vec![4], padded(x), padded(y)].concat();
    let signature = [padded(r), padded(s)].concat();
    ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_FIXED, point)
        .verify(message, &signature)
        .is_ok()
}

#[tokio::test]
async fn the_admitted_key_goes_on_attesting_until_it_is_revoked() {
    let node = Node::handed_over(3).await;
    let reasons = vec!["PCR 12 changed".to_owned(), "so did 13".to_owned()];
    assert_eq!(node.attest().await.unwrap(), Ended::Revoked { reasons });

    let verifier = node.verifier.lock().unwrap();
    let posts: Vec<_> = verifier.calls.iter().filter(|call| call.starts_with("POST")).collect();
    assert_eq!(posts, ["POST /challenge", "POST ", "POST ", "POST ", "POST "], "one challenge, then one call a round");
    let ak = Public::parse(&verifier.ak_public).unwrap();
    for (nonce, evidence) in &verifier.evidence {
        let quote = Quote::parse(&evidence.attest).unwrap();
        assert_eq!(quote.extra_data, nonce);
        assert_eq!(evidence.tee, [tsm::quote_of(&TeeQuote::report_data(nonce, ak.name().as_bytes()))]);
        let values: Vec<u8> = evidence.pcrs.iter().flat_map(|value| hex::decode(value).unwrap()).collect();
        assert_eq!(quote.pcr_digest, sha256(&values));
        // The same key: its signature stands under the public area that was admitted.
        assert!(signed_by(&ak, &evidence.attest, &evidence.signature));
    }
    assert_eq!(verifier.evidence.len(), 4);
}

#[tokio::test]
async fn notices_and_the_nodes_own_end_start_the_hooks() {
    let node = Node::handed_over(50).await;
    node.attest().await.unwrap();
    let run = &node.places.run;
    let dropped = fs::read_to_string(node.folder.path().join("dropped")).unwrap();
    let files = [run.join("revoked/n7.json"), run.join("revoked/n1.json")].map(|file| file.display().to_string());
    assert_eq!(dropped.lines().collect::<Vec<_>>(), files);
    let own: RevocationNotice = serde_json::from_slice(&fs::read(&files[1]).unwrap()).unwrap();
    assert_eq!((own.node.as_str(), own.admission), ("n1", node.state.admission));
    assert_eq!(own.ak_name, Public::parse(&node.state.ak.public).unwrap().name().to_string());
    // The secret was fetched once, and is gone with the admission.
    let calls = &node.verifier.lock().unwrap().calls;
    assert_eq!(calls.iter().filter(|call| call.ends_with("/secret")).count(), 1);
    assert!(!run.join("secret").exists());
}

#[tokio::test]
async fn the_secret_is_for_root_alone() {
    let node = Node::handed_over(usize::MAX).await;
    let secret = node.places.run.join("secret");
    let written = async {
        while fs::read(&secret).unwrap_or_default() != SECRET {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        ended = node.attest() => panic!("{ended:?}"),
        () = written => {}
    }
    assert_eq!(fs::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_lost_nonce_is_replaced_by_a_challenge() {
    let node = Node::handed_over(1).await;
    node.verifier.lock().unwrap().forgets = true;
    node.attest().await.unwrap();
    let calls = &node.verifier.lock().unwrap().calls;
    let posts: Vec<_> = calls.iter().filter(|call| call.starts_with("POST")).collect();
    assert_eq!(posts, ["POST /challenge", "POST ", "POST /challenge", "POST ", "POST "]);
}

#[tokio::test]
async fn an_admission_that_is_over_is_a_revocation() {
    let node = Node::handed_over(1).await;
    node.verifier.lock().unwrap().ends_with = Some(403);
    let Ended::Revoked { reasons } = node.attest().await.unwrap() else { panic!("not revoked") };
    assert!(reasons[0].contains("as the test says"), "{reasons:?}");
    assert!(node.places.run.join("revoked/n1.json").exists());
}

#[tokio::test]
async fn a_verifier_that_attests_nobody_starts_no_hooks() {
    let node = Node::handed_over(1).await;
    node.verifier.lock().unwrap().ends_with = Some(404);
    assert!(matches!(node.attest().await.unwrap(), Ended::Unattested { .. }));
    assert!(!node.places.run.join("revoked/n1.json").exists());
}

#[tokio::test]
async fn another_tpm_cannot_use_the_key() {
    let (node, other) = (Node::handed_over(1).await, NetworkTpm::start());
    let mut tpm = EsapiTpm::open(&other.tcti()).unwrap();
    assert!(tpm.load_ak(node.state.ak).is_err());
}

#[tokio::test]
async fn each_verifier_gets_evidence_of_its_own_and_the_leading_one_what_the_other_signs() {
    let (node, co_verifier) = Node::with_co_verifier(usize::MAX).await;
    let sent = || node.verifier.lock().unwrap().evidence.len();
    node.attest_until("several rounds", || sent() > 4 && co_verifier.lock().unwrap().evidence.len() > 2).await;
    let (leading, other) = (node.verifier.lock().unwrap(), co_verifier.lock().unwrap());
    for (nonce, evidence) in &leading.evidence {
        assert_eq!(Quote::parse(&evidence.attest).unwrap().extra_data, nonce);
        assert_eq!(evidence.supporting, ["a.b.c"], "from the first on");
    }
    for (nonce, evidence) in &other.evidence {
        assert_eq!(Quote::parse(&evidence.attest).unwrap().extra_data, nonce);
        assert_eq!(evidence.supporting, [""; 0], "nobody but the leading verifier gets them");
    }
    let posts: Vec<_> = other.calls.iter().filter(|call| call.starts_with("POST")).take(3).collect();
    assert_eq!(posts, ["POST /challenge", "POST ", "POST "]);
    // Notices are the leading verifier's.
    assert!(other.calls.iter().all(|call| !call.contains("notices")), "{:?}", other.calls);
}

#[tokio::test]
async fn what_can_be_no_result_is_not_passed_on() {
    let (node, co_verifier) = Node::with_co_verifier(usize::MAX).await;
    co_verifier.lock().unwrap().signs = Some("x".repeat(16 * 1024 + 1));
    let sent = || node.verifier.lock().unwrap().evidence.len();
    node.attest_until("two rounds", || sent() > 1 && !co_verifier.lock().unwrap().evidence.is_empty()).await;
    assert!(node.verifier.lock().unwrap().evidence.iter().all(|(_, evidence)| evidence.supporting.is_empty()));
}

#[tokio::test]
async fn a_co_verifier_that_does_not_answer_holds_nobody_up() {
    let (mut node, co_verifier) = Node::with_co_verifier(usize::MAX).await;
    // One that takes connections and says nothing, beside one that answers.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = CoAttestation { address: mute.local_addr().unwrap(), ..node.state.co_verifiers[0].clone() };
    node.state.co_verifiers.insert(0, silent);
    let begun = Instant::now();
    let sent = || node.verifier.lock().unwrap().evidence.len();
    node.attest_until("a round", || sent() > 0).await;
    assert!(begun.elapsed() < Duration::from_secs(9), "{:?}", begun.elapsed());
    assert_eq!(node.verifier.lock().unwrap().evidence[0].1.supporting, ["a.b.c"]);
    assert!(!co_verifier.lock().unwrap().evidence.is_empty());
}

#[tokio::test]
async fn a_co_verifier_that_revokes_is_asked_no_more_and_the_leading_one_goes_on() {
    let (node, co_verifier) = Node::with_co_verifier(1).await;
    let shares = split_secret(SECRET, vec![vec![0x5a; SECRET.len()]]).unwrap();
    node.verifier.lock().unwrap().share = Some((2, shares[0].clone()));
    co_verifier.lock().unwrap().share = Some((2, shares[1].clone()));
    // Long enough for the secret to be there before.
    co_verifier.lock().unwrap().after_ms = 2_000;
    let (secret, seen) = (node.places.run.join("secret"), std::cell::Cell::new(false));
    let last = |verifier: &Verifier| verifier.evidence.last().is_some_and(|(_, sent)| sent.supporting.is_empty());
    node.attest_until("it goes on without", || {
        seen.set(seen.get() || fs::read(&secret).is_ok_and(|content| content == SECRET));
        seen.get() && last(&node.verifier.lock().unwrap()) && node.secret().is_none()
    })
    .await;
    let other = co_verifier.lock().unwrap();
    assert_eq!(other.evidence.len(), 2);
    // The node itself is not revoked: that is the leading verifier's to say.
    assert!(!node.places.run.join("revoked/n1.json").exists());
}

#[tokio::test]
async fn a_split_secret_is_joined_from_both_and_one_share_alone_is_nothing() {
    let (node, co_verifier) = Node::with_co_verifier(usize::MAX).await;
    let shares = split_secret(SECRET, vec![vec![0x5a; SECRET.len()]]).unwrap();
    node.verifier.lock().unwrap().share = Some((2, shares[0].clone()));
    let asked = |verifier: &Verifier| verifier.calls.iter().filter(|call| call.ends_with("/secret")).count();
    // The other has none of it, however often it is asked.
    node.attest_until("asked again", || asked(&co_verifier.lock().unwrap()) > 2).await;
    assert_eq!(node.secret(), None);
    assert_eq!(asked(&node.verifier.lock().unwrap()), 1, "who has given its share is not asked again");
    // Nor is the other's alone anything.
    co_verifier.lock().unwrap().share = Some((2, shares[1].clone()));
    node.verifier.lock().unwrap().share = None;
    node.attest_until("asked again", || asked(&node.verifier.lock().unwrap()) > 3).await;
    assert_eq!(node.secret(), None);
    // Both: written, and by nobody else.
    node.verifier.lock().unwrap().share = Some((2, shares[0].clone()));
    node.attest_until("joined", || node.secret().is_some()).await;
    assert_eq!(node.secret().unwrap(), SECRET);
}
