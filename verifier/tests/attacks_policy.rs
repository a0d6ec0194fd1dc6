//! Attacks on policies and Reference Values (D7) and revoked boot loaders that are still signed (B10), on the verifier as
//! it runs and on the appraisal alone. What the database's owner can do is tested beside the store.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod site;
mod support;

use assay_service::clock::SystemClock;
use assay_tpm::testing::{KeyKind, sha256};
use assay_verifier::api::{
    CaseFile, Explanation, LearnRequest, PolicyDraft, PolicyHistory, PolicyRecord, PolicyRequest, TryAnswer,
    TryRequest, VerdictWord,
};
use assay_verifier::appraisal::{Appraisal, Deviation, Expected, appraise};
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::evidence::verify;
use assay_verifier::learn::learn;
use assay_verifier::policy::Policy;
use assay_verifier::policy::signature::{PolicyKeys, PolicySigner};
use assay_verifier::reappraisal::{Again, ReappraisedWord, reappraise};
use assay_wire::agent::Verdict;
use proptest::prelude::*;
use serde_json::{Value, json};
use site::{Agent, Site, learn_and_approve, refusal};
use std::sync::Arc;
use support::{Node, artefacts, boot_log, boot_log_with, first_boot, settings};

fn learning(node: &str) -> LearnRequest {
    LearnRequest {
        node: node.parse().unwrap(),
        name: None,
        artefacts: serde_json::to_value(artefacts()).unwrap(),
        artefacts_signature: None,
        from_rejected: false,
    }
}

fn signer() -> PolicySigner {
    PolicySigner::from_pkcs8(&PolicySigner::generate().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_unsigned_policies_and_reference_values_are_refused_where_keys_are_configured() {
    let (ours, stranger) = (signer(), signer());
    let mut agent = Agent::manufacture("n1");
    let more = format!("policy_keys = [\"{}\"]", ours.public());
    let site = Site::start_with(&agent.ek_cas, &more, Arc::new(SystemClock)).await;
    site.lease("n1");
    agent.boot(&boot_log(), &site.keys);
    agent.attest(&site).await;

    let mut request = learning("n1");
    let unsigned = site.operator.post::<_, PolicyDraft>("/v1/policies/learn", &request).await;
    assert_eq!(refusal(unsigned).1, "unsigned-artefacts");
    request.artefacts_signature = Some(stranger.sign_artefacts(&artefacts()));
    let foreign = site.operator.post::<_, PolicyDraft>("/v1/policies/learn", &request).await;
    assert_eq!(refusal(foreign).1, "unsigned-artefacts");
    request.artefacts_signature = Some(ours.sign_artefacts(&artefacts()));
    let draft: PolicyDraft = site.operator.post("/v1/policies/learn", &request).await.unwrap();

    // The draft judges nothing until it is approved, and is not approved unsigned.
    let policy = Policy::parse(&draft.document).unwrap();
    for signature in [None, Some(stranger.sign_policy(&policy)), Some(ours.sign_artefacts(&artefacts()))] {
        let request = PolicyRequest { name: None, document: draft.document.clone(), signature };
        let (status, kind, detail) = refusal(site.operator.post::<_, PolicyRecord>("/v1/policies", &request).await);
        assert_eq!((status, kind.as_str()), (403, "policy-refused"), "{detail}");
    }
    let (_, verdict) = agent.attest(&site).await;
    let Verdict::Rejected { reasons } = verdict else { panic!("an unapproved draft judged") };
    assert!(reasons[0].contains("no policy is active"), "{reasons:?}");
    let request = PolicyRequest { name: None, document: draft.document, signature: Some(ours.sign_policy(&policy)) };
    let approved: PolicyRecord = site.operator.post("/v1/policies", &request).await.unwrap();
    let (_, verdict) = agent.attest(&site).await;
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    let history: PolicyHistory = site.operator.get("/v1/policies/active").await.unwrap();
    assert_eq!((history.policy.digest, history.refused), (approved.digest, None));
    assert_eq!(history.policy.signature.unwrap().key, ours.public());
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_a_rejected_boot_is_learnt_from_only_when_asked_for_and_says_so() {
    let (mut teacher, mut bad) = (Agent::manufacture("n1"), Agent::manufacture("n2"));
    let site = Site::start(&[teacher.ek_cas.clone(), bad.ek_cas.clone()].concat()).await;
    site.lease("n1");
    site.lease("n2");
    teacher.boot(&boot_log(), &site.keys);
    teacher.attest(&site).await;
    let first: PolicyDraft = site.operator.post("/v1/policies/learn", &learning("n1")).await.unwrap();
    assert!(first.notes[0].contains("trust on first use"), "{:?}", first.notes);
    let approved = learn_and_approve(&site, "n1").await;

    // The right images on other firmware.
    let other = LogWriter::new()
        .measured(0, EventType::S_CRTM_VERSION, b"6\x006\x006\0\0\0")
        .separators()
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"snponly.efi"), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"agent.efi"), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b".initrd")
        .event(12, EventType::IPL, sha256(b"command line"), b"");
    bad.boot(&other, &site.keys);
    let (_, verdict) = bad.attest(&site).await;
    assert!(matches!(verdict, Verdict::Rejected { .. }));
    let mut request = learning("n2");
    let refused = site.operator.post::<_, PolicyDraft>("/v1/policies/learn", &request).await;
    assert_eq!(refusal(refused).1, "learning-from-rejected");
    request.from_rejected = true;
    let draft: PolicyDraft = site.operator.post("/v1/policies/learn", &request).await.unwrap();
    assert!(draft.notes[0].contains("has rejected evidence") && draft.notes.len() > 1, "{:?}", draft.notes);
    // It judges nothing: the same boot is rejected as before.
    assert!(matches!(bad.attest(&site).await.1, Verdict::Rejected { .. }));

    // What would it say of the fleet? And what does the active one say?
    let tried = |document: String| TryRequest { document, after: None };
    let answer: TryAnswer = site.operator.post("/v1/policies/try", &tried(draft.document)).await.unwrap();
    let would: Vec<_> = answer.trials.iter().map(|it| (it.node.as_str(), it.verdict, it.would.verdict)).collect();
    let (accepted, rejected) = (ReappraisedWord::Accepted, ReappraisedWord::Rejected);
    let recorded = VerdictWord::Rejected;
    assert_eq!(would, [("n1", recorded, rejected), ("n2", recorded, accepted)]);
    let answer: TryAnswer = site.operator.post("/v1/policies/try", &tried(approved.document)).await.unwrap();
    let would: Vec<_> = answer.trials.iter().map(|it| (it.node.as_str(), it.would.verdict)).collect();
    assert_eq!((would, answer.next), (vec![("n1", accepted), ("n2", rejected)], None));
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_is_explained_and_reached_again_offline() {
    let (mut teacher, mut agent) = (Agent::manufacture("n1"), Agent::manufacture("n2"));
    let site = Site::start(&[teacher.ek_cas.clone(), agent.ek_cas.clone()].concat()).await;
    site.lease("n1");
    site.lease("n2");
    teacher.boot(&boot_log(), &site.keys);
    teacher.attest(&site).await;
    let policy = learn_and_approve(&site, "n1").await;
    agent.boot(&boot_log_with(sha256(b"agent.efi, one octet changed")), &site.keys);
    let (_, verdict) = agent.attest(&site).await;
    let Verdict::Rejected { reasons } = verdict else { panic!("accepted") };

    let why: Explanation = site.operator.get("/v1/verdicts/n2/explanation").await.unwrap();
    assert!(why.reproduced, "{why:?}");
    assert_eq!(why.verdict.reasons, reasons);
    assert_eq!(why.approval.as_ref().unwrap().approved_by, policy.added_by);
    assert!(why.learned_from.as_ref().unwrap().starts_with("node n1 evidence"), "{why:?}");
    let deviation: Vec<_> = why.enforced().collect();
    assert_eq!((deviation.len(), deviation[0].rule.as_str(), deviation[0].event), (1, "pcr-4", Some(15)));
    assert_eq!(deviation[0].expected, [hex::encode(sha256(b"agent.efi"))]);
    assert_eq!(deviation[0].found, Some(hex::encode(sha256(b"agent.efi, one octet changed"))));

    // As a file, without the site.
    let exported: Value = site.operator.get("/v1/verdicts/n2/case").await.unwrap();
    site.stop().await;
    let case = CaseFile::from_json(&exported.to_string()).unwrap();
    let judged = case.policy.as_ref().unwrap().admit(&PolicyKeys::default()).unwrap();
    let by = |policy| Again { policy: Some(policy), now_seconds: case.context.now_seconds, tee_collateral: None };
    let again = reappraise(&case, &by(&judged)).unwrap();
    assert_eq!((again.verdict, &again.reasons), (ReappraisedWord::Rejected, &reasons));
    // A policy that knows the new image says otherwise.
    let (old, new) = (hex::encode(sha256(b"agent.efi")), hex::encode(sha256(b"agent.efi, one octet changed")));
    let newer = Policy::parse(&judged.to_json().replace(&old, &new)).unwrap();
    let otherwise = reappraise(&case, &by(&newer)).unwrap();
    assert_eq!((otherwise.verdict, otherwise.reasons), (ReappraisedWord::Accepted, vec![]));
    // Whatever is done to the evidence in the file, it is not accepted.
    let mut forged = case.clone();
    forged.archived.evidence.event_log[200] ^= 1;
    let forged = reappraise(&forged, &by(&newer)).unwrap();
    assert_eq!(forged.verdict, ReappraisedWord::Rejected);
    assert!(CaseFile::from_json(&exported.to_string().replace("assay-verdict/2", "assay-verdict/9")).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_policy_comes_back_by_its_digest() {
    let mut agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    site.lease("n1");
    agent.boot(&boot_log(), &site.keys);
    agent.attest(&site).await;
    let old = learn_and_approve(&site, "n1").await;
    let new = PolicyRequest { document: old.document.replace("learnt-from-n1", "newer"), ..PolicyRequest::default() };
    let new: PolicyRecord = site.operator.post("/v1/policies", &new).await.unwrap();
    assert_ne!(new.digest, old.digest);
    let path = format!("/v1/policies/{}/approve", old.digest);
    let back: PolicyRecord = site.operator.post(&path, &()).await.unwrap();
    assert!(back.active && back.digest == old.digest);
    let history: PolicyHistory = site.operator.get(&format!("/v1/policies/{}", old.digest)).await.unwrap();
    assert_eq!((history.approvals.len(), history.policy.active), (2, true));
    let unknown = site.operator.post::<_, PolicyRecord>("/v1/policies/sha256:00/approve", &()).await;
    assert_eq!(refusal(unknown).0, 404);
    site.stop().await;
}

/// A policy with a `[secure_boot]` rule, on a log that says this of Secure Boot.
struct SecureBoot {
    on: u8,
    db: Vec<u8>,
    dbx: Vec<u8>,
    sbat: &'static [u8],
}

impl Default for SecureBoot {
    fn default() -> Self {
        Self {
            on: 1,
            db: list(CERT_X509, &[b"certificate of the distribution"]),
            dbx: list(CERT_SHA256, &[&sha256(b"black lotus"), &sha256(b"boot hole"), &sha256(b"another")]),
            sbat: b"sbat,1,2024010900\nshim,4\ngrub,3\n",
        }
    }
}

impl SecureBoot {
    fn log(&self) -> LogWriter {
        let config = EventType::EFI_VARIABLE_DRIVER_CONFIG;
        LogWriter::new()
            .measured(0, EventType::S_CRTM_VERSION, b"1")
            .measured(7, config, &variable(GLOBAL, "SecureBoot", &[self.on]))
            .measured(7, config, &variable(DATABASE, "db", &self.db))
            .measured(7, config, &variable(DATABASE, "dbx", &self.dbx))
            .separators()
            .measured(7, EventType::EFI_VARIABLE_AUTHORITY, &variable(SHIM_LOCK, "SbatLevel", self.sbat))
            .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"snponly.efi"), b"")
            .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"agent.efi"), b"")
            .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
            .event(11, EventType::IPL, sha256(b"initrd"), b"")
            .event(12, EventType::IPL, sha256(b"command line"), b"")
    }
}

fn secure_boot_policy() -> Policy {
    let node = Node::boot(&SecureBoot::default().log(), KeyKind::Ecc);
    let evidence = node.evidence();
    let learnt = learn("lab", "n1", &verify(&evidence, &node.challenge()).unwrap(), &artefacts()).unwrap();
    let mut json: Value = serde_json::from_str(&learnt.to_json()).unwrap();
    json["secure_boot"] = json!({
        "enabled": true,
        "db": {"certificates": [hex::encode(sha256(b"certificate of the distribution"))]},
        "dbx_at_least": [hex::encode(sha256(b"black lotus")), hex::encode(sha256(b"boot hole"))],
        "sbat_at_least": {"shim": 4, "grub": 3},
    });
    let seven = json["pcr"].as_array_mut().unwrap().iter_mut().find(|rule| rule["index"] == 7).unwrap();
    seven["event"].as_array_mut().unwrap().retain(|event| event["type"] == "EV_SEPARATOR");
    Policy::from_json(&json.to_string()).unwrap()
}

fn deviations(policy: &Policy, log: &LogWriter) -> Vec<Deviation> {
    let node = Node::boot(log, KeyKind::Ecc);
    let evidence = node.evidence();
    match appraise(
        policy,
        &verify(&evidence, &node.challenge()).unwrap(),
        &Expected { settings: &settings(), boot: &first_boot() },
        0,
    ) {
        Appraisal::Accepted(_) => Vec::new(),
        Appraisal::Refused(refusal) => refusal.deviations().to_vec(),
    }
}

#[test]
fn b10_revocations_and_sbat_below_the_policy_are_refused_and_above_it_are_not() {
    let policy = secure_boot_policy();
    let says = |state: SecureBoot| {
        let found = deviations(&policy, &state.log());
        found.iter().map(|it| format!("{}: {}", it.rule, it.sentence)).collect::<Vec<_>>().join("; ")
    };
    assert_eq!(says(SecureBoot::default()), "");
    let newer = list(CERT_SHA256, &[&sha256(b"boot hole"), &sha256(b"x"), &sha256(b"y"), &sha256(b"black lotus")]);
    assert_eq!(says(SecureBoot { dbx: newer, ..SecureBoot::default() }), "");
    assert_eq!(says(SecureBoot { sbat: b"sbat,1,2025\nshim,5\ngrub,4\nmore,1\n", ..SecureBoot::default() }), "");

    let older = list(CERT_SHA256, &[&sha256(b"boot hole"), &sha256(b"x")]);
    let found = says(SecureBoot { dbx: older, ..SecureBoot::default() });
    assert!(found.contains("secure-boot: rule `secure-boot`: PCR 7 event 4"), "{found}");
    assert!(found.contains("`dbx` lacks 1 of 2 revocations"), "{found}");
    let empty = says(SecureBoot { dbx: Vec::new(), ..SecureBoot::default() });
    assert!(empty.contains("`dbx` lacks 2 of 2 revocations"), "{empty}");
    let found = says(SecureBoot { sbat: b"sbat,1,2022\nshim,4\ngrub,2\n", ..SecureBoot::default() });
    assert!(found.contains("SBAT generation of `grub` is 2, not 3 or higher"), "{found}");
    let found = says(SecureBoot { sbat: b"sbat,1,2022\nshim,4\n", ..SecureBoot::default() });
    assert!(found.contains("SBAT generation of `grub` is not listed"), "{found}");
    let found = says(SecureBoot { on: 0, ..SecureBoot::default() });
    assert!(found.contains("Secure Boot is off, not on"), "{found}");
    let keys = list(CERT_X509, &[b"certificate of the distribution"]);
    let more = [keys, list(CERT_X509, &[b"certificate of somebody else, longer"])].concat();
    let found = says(SecureBoot { db: more, ..SecureBoot::default() });
    assert!(found.contains("`db` holds") && found.contains("which is not listed"), "{found}");
    assert!(says(SecureBoot { db: Vec::new(), ..SecureBoot::default() }).contains("`db` is empty"));
}

#[test]
fn b10_what_only_looks_like_secure_boot_s_configuration_does_not_count() {
    let policy = secure_boot_policy();
    let config = EventType::EFI_VARIABLE_DRIVER_CONFIG;
    let good = SecureBoot::default();
    // A second dbx, a late one, one of another vendor, and one whose digest is not of it.
    let late = good.log().measured(7, config, &variable(DATABASE, "dbx", &good.dbx));
    assert!(deviations(&policy, &late).iter().any(|it| it.rule == "pcr-7"), "a late dbx was accepted");
    let around = |event: &dyn Fn(LogWriter) -> LogWriter| {
        let log = LogWriter::new()
            .measured(0, EventType::S_CRTM_VERSION, b"1")
            .measured(7, config, &variable(GLOBAL, "SecureBoot", &[1]))
            .measured(7, config, &variable(DATABASE, "db", &good.db));
        event(log).separators()
    };
    let lacks = |log: &LogWriter| {
        let found = deviations(&policy, log);
        found.iter().any(|it| it.sentence.contains("variable `dbx` was not measured"))
    };
    assert!(lacks(&around(&|log| log)));
    assert!(lacks(&around(&|log| log).measured(7, config, &variable(DATABASE, "dbx", &good.dbx))));
    assert!(lacks(&around(&|log| log.measured(7, config, &variable(GLOBAL, "dbx", &good.dbx)))));
    let content = variable(DATABASE, "dbx", &good.dbx);
    assert!(lacks(&around(&|log| log.event(7, config, sha256(b"empty dbx"), &content))));
    assert!(!lacks(&around(&|log| log.measured(7, config, &content))));
}

proptest! {
    #[test]
    fn d7_a_signature_is_over_one_document_only(at in 0_usize..64, bit in 0_u8..8) {
        let policy = secure_boot_policy_once();
        let signer = signer();
        let keys = PolicyKeys::new(vec![signer.public()]);
        let mut signature = signer.sign_policy(policy);
        prop_assert_eq!(keys.check_policy(policy, Some(&signature)).unwrap(), Some(signer.public()));
        signature.signature[at] ^= 1 << bit;
        prop_assert!(keys.check_policy(policy, Some(&signature)).is_err());
    }
}

fn secure_boot_policy_once() -> &'static Policy {
    static POLICY: std::sync::OnceLock<Policy> = std::sync::OnceLock::new();
    POLICY.get_or_init(secure_boot_policy)
}

/// `EFI_SIGNATURE_LIST`s, one for each size of entry.
fn list(kind: [u8; 16], entries: &[&[u8]]) -> Vec<u8> {
    let entry_bytes = 16 + entries[0].len();
    let total = 28 + entries.len() * entry_bytes;
    let mut list = kind.to_vec();
    for size in [total, 0, entry_bytes] {
        list.extend_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
    }
    for entry in entries {
        list.extend_from_slice(&[0x77; 16]);
        list.extend_from_slice(entry);
    }
    list
}

/// `UEFI_VARIABLE_DATA` of a vendor.
fn variable(vendor: [u8; 16], name: &str, content: &[u8]) -> Vec<u8> {
    let mut data = support::variable(name, content);
    data[..16].copy_from_slice(&vendor);
    data
}

const CERT_SHA256: [u8; 16] =
    [0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28];
const CERT_X509: [u8; 16] =
    [0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72];
const GLOBAL: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
const DATABASE: [u8; 16] =
    [0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f];
const SHIM_LOCK: [u8; 16] =
    [0x50, 0xab, 0x5d, 0x60, 0x46, 0xe0, 0x00, 0x43, 0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23];
