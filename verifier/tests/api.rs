//! The verifier as it runs, from enrolment to hand-over, with an agent on a real TPM; and those who try other ways.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod site;
mod support;

use assay_service::auth::Role;
use assay_service::client::ServiceClient;
use assay_tpm::testing::{KeyKind, sha256};
use assay_verifier::api::{Identity, Incident};
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::release::journal::ReleaseStep;
use assay_verifier::server::operator::ReleaseRecord;
use assay_verifier::server::policies::{LearnRequest, PolicyRequest};
use assay_verifier::store::archive::{ArchivedEvidence, VerdictRecord, VerdictWord};
use assay_verifier::store::policies::PolicyRecord;
use assay_wire::agent::{ReleaseStatus, Verdict};
use assay_wire::result::SignedResult;
use serde_json::{Value, json};
use site::{Agent, Site, activate, learn_and_approve, refusal, release};
use std::time::{Duration, Instant};
use support::{boot_log, boot_log_until_images, boot_log_with};

#[tokio::test(flavor = "multi_thread")]
async fn a_first_boot_is_learnt_from_and_the_next_is_released() {
    let mut agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    let airlock = site.lease("n1");
    agent.boot(&boot_log(), &site.keys);

    // Without a policy nothing passes, but it is archived.
    let (_, verdict) = agent.attest(&site).await;
    let Verdict::Rejected { reasons } = verdict else { panic!("accepted without a policy") };
    assert!(reasons[0].contains("no policy is active"), "{reasons:?}");
    assert!(site.peers.called("reject", "n1").await.detail.contains("no policy is active"));
    let policy = learn_and_approve(&site, "n1").await;

    // The next boot is good.
    let (session, verdict) = agent.attest(&site).await;
    let judged = Instant::now();
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    release(&site, &agent, &session).await;
    let moved = site.peers.called("admit", "n1").await.at.saturating_duration_since(judged);
    println!("verdict to port moved, the agent's part included: {moved:?}");
    assert!(moved < Duration::from_secs(2), "verdict to port moved took {moved:?}");

    let record: VerdictRecord = site.operator.get("/v1/verdicts/n1").await.unwrap();
    assert_eq!((record.verdict, record.policy.as_ref()), (VerdictWord::Accepted, Some(&policy.digest)));
    assert_eq!((record.lease, record.boot), (airlock.lease, airlock.boot));
    let releases: Vec<ReleaseRecord> = site.operator.get("/v1/releases").await.unwrap();
    assert_eq!(releases.len(), 1);
    assert_eq!((releases[0].step, Some(releases[0].admission)), (ReleaseStep::HandedOver, record.admission));
    let archived: ArchivedEvidence = site.operator.get(&format!("/v1/evidence/{}", record.evidence)).await.unwrap();
    assert!(archived.result.is_some() && !archived.evidence.attest.is_empty());
    let names: Vec<_> = site.peers.calls().iter().map(|call| call.name).collect();
    assert_eq!(names, ["reject", "export", "admit"]);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tampered_ramdisk_is_rejected_by_pcr_and_event() {
    let mut good = Agent::manufacture("n1");
    let site = Site::start(&good.ek_cas).await;
    site.lease("n1");
    good.boot(&boot_log(), &site.keys);
    good.attest(&site).await;
    learn_and_approve(&site, "n1").await;

    // Something more is loaded than the log admits.
    good.tpm.extend(4, &sha256(b"one image more"));
    let (session, verdict) = good.attest(&site).await;
    let Verdict::Rejected { reasons } = verdict else { panic!("a log that does not explain PCR 4 was accepted") };
    assert!(reasons.iter().any(|reason| reason.contains("PCR 4")), "{reasons:?}");
    let release = site.agent_client(&session.proof).get::<ReleaseStatus>(&session.path("release")).await;
    assert_eq!(refusal(release).1, "rejected");
    assert!(site.peers.calls().iter().all(|call| call.name == "reject"), "something was released");
    let record: VerdictRecord = site.operator.get("/v1/verdicts/n1").await.unwrap();
    assert_eq!((record.verdict, record.admission), (VerdictWord::Rejected, None));
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_image_is_rejected_by_its_event() {
    let mut teacher = Agent::manufacture("n1");
    let mut tampered = Agent::manufacture("n2");
    let cas = [teacher.ek_cas.clone(), tampered.ek_cas.clone()].concat();
    let site = Site::start(&cas).await;
    site.lease("n1");
    site.lease("n2");
    teacher.boot(&boot_log(), &site.keys);
    teacher.attest(&site).await;
    learn_and_approve(&site, "n1").await;
    tampered.boot(&boot_log_with(sha256(b"agent.efi, one octet changed")), &site.keys);
    let (_, verdict) = tampered.attest(&site).await;
    let Verdict::Rejected { reasons } = verdict else { panic!("another image was accepted") };
    assert!(reasons.iter().any(|r| r.contains("PCR 4") && r.contains("event")), "{reasons:?}");
    assert!(site.peers.called("reject", "n2").await.detail.contains("PCR 4"));
    assert!(site.peers.calls().iter().all(|call| call.name != "export"), "an export was made");

    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_the_verifier_did_not_give_are_rejected() {
    let (mut teacher, mut lured) = (Agent::manufacture("n1"), Agent::manufacture("n2"));
    let site = Site::start(&[teacher.ek_cas.clone(), lured.ek_cas.clone()].concat()).await;
    site.lease("n1");
    site.lease("n2");
    teacher.boot(&boot_log(), &site.keys);
    teacher.attest(&site).await;
    learn_and_approve(&site, "n1").await;
    let mut keys = site.keys.clone();
    keys.agent_url = "https://10.66.6.6:8443".to_owned();
    lured.boot(&boot_log(), &keys);
    let (_, verdict) = lured.attest(&site).await;
    let Verdict::Rejected { reasons } = verdict else { panic!("settings of another verifier were accepted") };
    assert!(reasons.iter().any(|reason| reason.contains("10.66.6.6")), "{reasons:?}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a7_an_ek_of_an_unknown_maker_is_refused_and_no_cas_admit_nobody() {
    let (known, stranger) = (Agent::manufacture("n1"), Agent::manufacture("n1"));
    for cas in [known.ek_cas.clone(), Vec::new()] {
        let site = Site::start(&cas).await;
        site.lease("n1");
        let (status, kind, detail) = refusal(stranger.enrol(&site).await);
        assert_eq!((status, kind.as_str()), (403, "ek-refused"), "{detail}");
        // Another's certificate does not help either.
        let mut borrowed = stranger.introduction();
        borrowed.ek_certificate = known.introduction().ek_certificate;
        let answer = site.agent_client("").post::<_, Value>("/agent/v1/enrol", &borrowed).await;
        assert_eq!(refusal(answer).1, "ek-refused");
        site.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a1_a6_a8_d6_sessions_nonces_and_proofs_are_for_one_use_and_one_session() {
    let mut agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    assert_eq!(refusal(agent.enrol(&site).await).1, "not-in-airlock");
    site.lease("n1");
    agent.boot(&boot_log(), &site.keys);

    // A wrong proof ends the session at once, also for the right one after it.
    let challenge = agent.enrol(&site).await.unwrap();
    let right = hex::encode(agent.tpm.activate(&challenge.credential).unwrap());
    // Nor is the right one anywhere in the answer for whoever has no TPM to open it.
    for octets in [&challenge.credential.id_object, &challenge.credential.encrypted_secret] {
        assert!(octets.windows(32).all(|window| hex::encode(window) != right), "the credential shows its secret");
    }
    assert_eq!(refusal(activate(&site, challenge.session, &"00".repeat(32)).await.map(|s| s.id)).1, "wrong-proof");
    assert_eq!(refusal(activate(&site, challenge.session, &right).await.map(|s| s.id)).0, 404);

    let (one, other) = (agent.session(&site).await.unwrap(), agent.session(&site).await.unwrap());
    let evidence = agent.evidence(&one.nonce);
    // D6: one session's proof on another; no proof at all.
    let crossed = site.agent_client(&one.proof).post::<_, Verdict>(&other.path("evidence"), &evidence).await;
    assert_eq!(refusal(crossed).1, "wrong-proof");
    let bare = site.agent_client("").post::<_, Verdict>(&one.path("evidence"), &evidence).await;
    assert_eq!(refusal(bare).0, 401);
    // A1: evidence for one session's nonce, sent in another.
    let client = site.agent_client(&other.proof);
    let Verdict::Rejected { reasons } = client.post(&other.path("evidence"), &evidence).await.unwrap() else {
        panic!("a quote for another nonce was accepted")
    };
    assert!(reasons[0].contains("nonce"), "{reasons:?}");
    // A1: the nonce is used; other evidence in the same session has none, the same evidence has the same answer.
    let again: Verdict = client.post(&other.path("evidence"), &evidence).await.unwrap();
    assert!(matches!(again, Verdict::Rejected { reasons: same } if same == reasons));
    let fresh = agent.evidence(&other.nonce);
    assert_eq!(refusal(client.post::<_, Verdict>(&other.path("evidence"), &fresh).await).1, "nonce-used");
    assert_eq!(refusal(activate(&site, other.id, &other.proof).await.map(|s| s.id)).1, "nonce-used");
    // Activating again gives a new nonce and takes the old one.
    let renewed = activate(&site, one.id, &one.proof).await.unwrap();
    assert_ne!(renewed.nonce, one.nonce);
    let client = site.agent_client(&one.proof);
    let Verdict::Rejected { reasons } = client.post(&one.path("evidence"), &evidence).await.unwrap() else {
        panic!("a quote for the old nonce was accepted")
    };
    assert!(reasons[0].contains("nonce"), "{reasons:?}");
    foreign_ak(&site, &agent).await;
    site.stop().await;
}

/// A6: a quote by a key that was not activated, although the same TPM has it.
async fn foreign_ak(site: &Site, agent: &Agent) {
    let session = agent.session(site).await.unwrap();
    let activated = agent.ak_public.clone();
    assert_ne!(agent.tpm.create_ak(KeyKind::Ecc), activated);
    let evidence = agent.evidence(&session.nonce);
    let client = site.agent_client(&session.proof);
    let Verdict::Rejected { reasons } = client.post(&session.path("evidence"), &evidence).await.unwrap() else {
        panic!("a quote by another AK was accepted")
    };
    assert!(reasons[0].contains("quote"), "{reasons:?}");
}

/// Isolation is asked once, when the node enrols. What it would say later is no part of this session's result, which
/// isolation compares with its record when it comes.
#[tokio::test(flavor = "multi_thread")]
async fn d2_what_isolation_said_at_enrolment_is_what_the_result_says() {
    let mut agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    let told = site.lease("n1");
    agent.boot(&boot_log(), &site.keys);
    agent.attest(&site).await;
    learn_and_approve(&site, "n1").await;
    let session = agent.session(&site).await.unwrap();
    // While the evidence is on its way, isolation's answer becomes another: lease, project and boot.
    let later = site.lease_to("n1", "beta");
    let client = site.agent_client(&session.proof);
    let evidence = agent.evidence(&session.nonce);
    let verdict = client.post::<_, Verdict>(&session.path("evidence"), &evidence).await.unwrap();
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    let record: VerdictRecord = site.operator.get("/v1/verdicts/n1").await.unwrap();
    assert_eq!((record.lease, record.boot), (told.lease, told.boot));
    assert!(record.lease != later.lease && record.boot != later.boot);
    let archived: ArchivedEvidence = site.operator.get(&format!("/v1/evidence/{}", record.evidence)).await.unwrap();
    let result = SignedResult::from_wire(archived.result.unwrap());
    assert_eq!(result.unverified_lease().unwrap(), (told.project, told.lease));
    site.stop().await;
}

/// What a node logs comes back in reasons: to its agent, to isolation, into the archive and to whoever reads it there.
#[tokio::test(flavor = "multi_thread")]
async fn d8_what_a_node_logged_commands_nobody_who_reads_its_verdict() {
    let (mut teacher, mut hostile) = (Agent::manufacture("n1"), Agent::manufacture("n2"));
    let site = Site::start(&[teacher.ek_cas.clone(), hostile.ek_cas.clone()].concat()).await;
    site.lease("n1");
    site.lease("n2");
    teacher.boot(&boot_log(), &site.keys);
    teacher.attest(&site).await;
    learn_and_approve(&site, "n1").await;
    let text = "\u{1b}]0;x\u{7}\u{202e}<script>alert(1)</script>\r\n\0".repeat(1000);
    let log = boot_log_until_images()
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"agent.efi"), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b".initrd")
        .measured(12, EventType::IPL, text.as_bytes());
    hostile.boot(&log, &site.keys);
    let (_, verdict) = hostile.attest(&site).await;
    let Verdict::Rejected { reasons } = verdict else { panic!("another command line was accepted") };
    let told = site.peers.called("reject", "n2").await.detail;
    let record: VerdictRecord = site.operator.get("/v1/verdicts/n2").await.unwrap();
    for said in reasons.iter().chain([&told]).chain(&record.reasons) {
        assert!(said.contains("the log says: "), "{said}");
        assert!(said.chars().count() < 700, "{} characters", said.chars().count());
        assert!(!said.chars().any(|c| c.is_control() || c == '\u{202e}'), "{said:?}");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a10_agents_and_tenants_are_no_operators() {
    let agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    site.lease("n1");
    let session = agent.session(&site).await.unwrap();
    let policy = PolicyRequest { document: String::new(), ..PolicyRequest::default() };
    // An agent's proof on the operators' API, which is another listener.
    let proof = session.proof.clone();
    let with_proof = client_with(&site, &proof);
    assert_eq!(refusal(with_proof.get::<Vec<Identity>>("/v1/identities").await).0, 401);
    let project = site.client_of(Role::Project("beta".parse().unwrap()));
    for (answer, what) in [
        (project.post::<_, PolicyRecord>("/v1/policies", &policy).await.map(|_| ()), "approve a policy"),
        (project.get::<Vec<PolicyRecord>>("/v1/policies").await.map(|_| ()), "read policies"),
        (project.get::<Vec<Incident>>("/v1/incidents").await.map(|_| ()), "read incidents"),
    ] {
        assert_eq!(refusal(answer).0, 403, "a project could {what}");
    }
    let service = site.client_of(Role::Service);
    assert_eq!(refusal(service.post::<_, PolicyRecord>("/v1/policies", &policy).await).0, 403);
    // Verdicts of other projects are not there.
    agent.session(&site).await.unwrap();
    assert_eq!(project.get::<Vec<VerdictRecord>>("/v1/verdicts").await.unwrap(), []);
    // The agents' API has no operator's routes.
    let wrong_door = site.agent_client("").get::<Value>("/v1/policies").await;
    assert_eq!(refusal(wrong_door).0, 404);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_one_clear_error_and_opens_nothing() {
    let agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    site.lease("n1");
    let anybody = site.agent_client("");
    for body in [json!({}), json!({"node": "N1"}), json!([1, 2])] {
        let (status, kind, detail) = refusal(anybody.post::<_, Value>("/agent/v1/enrol", &body).await);
        assert_eq!((status, kind.as_str()), (400, "malformed"), "{detail}");
        assert!(detail.contains("parsing the request's body"), "{detail}");
    }
    let mut oversize = agent.introduction();
    oversize.ek_certificate = vec![0x30; 9_000];
    assert_eq!(refusal(anybody.post::<_, Value>("/agent/v1/enrol", &oversize).await).0, 400);
    let mut garbage = agent.introduction();
    garbage.ak_public = vec![0xff; 64];
    assert_eq!(refusal(anybody.post::<_, Value>("/agent/v1/enrol", &garbage).await).1, "ak-refused");
    let session = agent.session(&site).await.unwrap();
    let client = site.agent_client(&session.proof);
    let large = json!({ "attest": "A".repeat(3 << 20) });
    let (status, _, detail) = refusal(client.post::<_, Value>(&session.path("evidence"), &large).await);
    assert_eq!(status, 400, "{detail}");
    // Malformed evidence does not use up the nonce: it was no evidence.
    assert_eq!(refusal(client.post::<_, Value>(&session.path("evidence"), &json!({})).await).1, "malformed");
    assert_eq!(refusal(client.get::<Value>(&session.path("release")).await).1, "no-verdict");
    assert_eq!(refusal(client.get::<Value>("/agent/v1/sessions/nonsense/release").await).0, 404);
    // A wrong policy changes nothing.
    for document in ["", "name = ", "{\"name\": 1}", "name = \"empty\""] {
        let request = PolicyRequest { document: document.to_owned(), ..PolicyRequest::default() };
        let (status, kind, _) = refusal(site.operator.post::<_, Value>("/v1/policies", &request).await);
        assert_eq!((status, kind.as_str()), (400, "invalid-policy"), "{document}");
    }
    assert_eq!(site.operator.get::<Vec<PolicyRecord>>("/v1/policies").await.unwrap(), []);
    let learn = LearnRequest {
        node: "n9".parse().unwrap(),
        name: None,
        artefacts: json!({}),
        artefacts_signature: None,
        from_rejected: false,
    };
    assert_eq!(refusal(site.operator.post::<_, Value>("/v1/policies/learn", &learn).await).1, "invalid-artefacts");
    site.stop().await;
}

fn client_with(site: &Site, token: &str) -> ServiceClient {
    let token = assay_service::auth::Token::from_text(token);
    let ca = std::fs::read_to_string(site.folder.path().join("ca.pem")).unwrap();
    ServiceClient::new(site.operator_url.parse().unwrap(), &ca, token).unwrap()
}
