//! Continuous attestation against the verifier as it runs, with an agent on a real TPM: what renews, what ends, and what
//! does neither.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod site;
mod support;

use assay_service::auth::Role;
use assay_service::clock::{Clock, SystemClock};
use assay_service::error::ApiError;
use assay_tpm::testing::{KeyKind, sha256};
use assay_verifier::api::{AttestationRecord, AttestationState, PolicyRecord, PolicyRequest};
use assay_verifier::ima::writer::ListWriter;
use assay_wire::attestation::{AttestationAnswer, RevocationNotices};
use assay_wire::evidence::ImaList;
use assay_wire::id::AdmissionId;
use serde_json::{Value, json};
use site::{Agent, AgentSession, Pusher, Site, admitted, refusal, released, renewed, revoked};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use support::boot_log;

/// The machine's clock, set forward by hand.
#[derive(Default)]
struct ShiftedClock(AtomicI64);

impl ShiftedClock {
    fn advance_ms(&self, by_ms: i64) {
        self.0.fetch_add(by_ms, Ordering::SeqCst);
    }
}

impl Clock for ShiftedClock {
    fn now_ms(&self) -> i64 {
        SystemClock.now_ms() + self.0.load(Ordering::SeqCst)
    }
}

async fn record(site: &Site) -> AttestationRecord {
    let mut records: Vec<AttestationRecord> = site.operator.get("/v1/attestations/n1").await.unwrap();
    records.remove(0)
}

/// What is on record once the admission does not stand any more.
async fn ended_record(site: &Site) -> AttestationRecord {
    let ended = async {
        loop {
            let record = record(site).await;
            if record.state != AttestationState::Standing {
                return record;
            }
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("the end of the admission was not recorded")
}

/// How long a machine with much else to do may take.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn good_evidence_renews_at_isolation_and_imaging() {
    let (site, agent, session, admission) = released("").await;
    let pusher = Pusher::new(&site, &session, admission);
    let before_ms = SystemClock.now_ms();
    let wanted = pusher.challenge().await.unwrap();
    assert_eq!((wanted.after_ms, wanted.ima_first_entry, wanted.expires_in_seconds), (0, 0, 90));
    let (expires_at_ms, next) = renewed(pusher.push(&agent, &wanted.nonce).await);
    assert!((before_ms + 89_000..=SystemClock.now_ms() + 90_000).contains(&expires_at_ms), "{expires_at_ms}");
    assert_eq!(next.after_ms, 30_000);
    for call in ["renew-admission", "renew-export"] {
        assert_eq!(site.peers.called(call, "n1").await.detail, admission.to_string());
    }
    // The answer carried the next nonce: no challenge in between.
    renewed(pusher.push(&agent, &next.nonce).await);
    let record = record(&site).await;
    assert_eq!((record.pushes, record.state, record.admission), (2, AttestationState::Standing, admission));
    assert!(record.last_seen_at_ms.is_some() && record.reasons.is_empty());
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a1_a_nonce_renews_once_and_an_old_quote_renews_nothing() {
    let (site, agent, session, admission) = released("").await;
    let pusher = Pusher::new(&site, &session, admission);
    let wanted = pusher.challenge().await.unwrap();
    let evidence = agent.runtime_evidence(&wanted.nonce);
    let first: Result<AttestationAnswer, _> = pusher.client.post(&pusher.path, &evidence).await;
    let (_, next) = renewed(first);
    // The same evidence again answers another nonce than the one that is out.
    let again = pusher.client.post::<_, AttestationAnswer>(&pusher.path, &evidence).await;
    assert_eq!((refusal(again).0, record(&site).await.pushes), (409, 1));
    // That used up the nonce: nothing can be tried against it twice.
    assert_eq!(refusal(pusher.push(&agent, &next.nonce).await).1, "no-nonce");
    // A new challenge takes the place of the one before.
    let (old, new) = (pusher.challenge().await.unwrap(), pusher.challenge().await.unwrap());
    assert_eq!(refusal(pusher.push(&agent, &old.nonce).await).1, "no-nonce");
    let _unused = new;
    pusher.renewed(&agent).await;
    // None of this ended anything.
    assert!(site.peers.calls().iter().all(|call| call.name != "revoke"));
    assert_eq!(record(&site).await.state, AttestationState::Standing);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d6_only_the_session_that_led_to_an_admission_attests_it() {
    let (site, agent, session, admission) = released("").await;
    let stranger = AgentSession { id: session.id, proof: "ab".repeat(32), nonce: Vec::new(), co_verifiers: Vec::new() };
    let pusher = Pusher::new(&site, &stranger, admission);
    assert_eq!(refusal(pusher.challenge().await).1, "wrong-proof");
    let good = Pusher::new(&site, &session, admission);
    let wanted = good.challenge().await.unwrap();
    // In memory now, and still refused; the nonce is not spent on it.
    assert_eq!(refusal(pusher.push(&agent, &wanted.nonce).await).1, "wrong-proof");
    let notices = pusher.client.get::<RevocationNotices>(&format!("{}/notices", pusher.path)).await;
    assert_eq!(refusal(notices).1, "wrong-proof");
    renewed(good.push(&agent, &wanted.nonce).await);
    assert_eq!(refusal(Pusher::new(&site, &session, AdmissionId::random()).challenge().await).0, 404);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_evidence_cuts_the_node_off_at_once_and_for_good() {
    let (site, agent, session, admission) = released("").await;
    let pusher = Pusher::new(&site, &session, admission);
    let (_, next) = pusher.renewed(&agent).await;
    // Somebody measures into a PCR that is closed.
    agent.tpm.extend(7, &sha256(b"another key"));
    let reasons = revoked(pusher.push(&agent, &next.nonce).await);
    assert!(reasons.iter().any(|reason| reason.contains("PCR 7")), "{reasons:?}");
    let id = admission.to_string();
    assert!(site.peers.called("revoke", &id).await.detail.contains("PCR 7"));
    site.peers.called("unexport", &id).await;
    // It is over for this process, and soon on record: fenced first, recorded after.
    assert_eq!(refusal(pusher.challenge().await).1, "admission-ended");
    assert!(revoked(pusher.push(&agent, &next.nonce).await)[0].contains("PCR 7"));
    let record = ended_record(&site).await;
    assert!(record.reasons[0].contains("PCR 7"), "{record:?}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d1_a_machine_that_was_reset_is_not_renewed() {
    let (site, mut agent, session, admission) = released("").await;
    let pusher = Pusher::new(&site, &session, admission);
    let (_, next) = pusher.renewed(&agent).await;
    agent.tpm.cut_power();
    agent.tpm.reload_ak(KeyKind::Rsa);
    // The same machine, key and PCRs: only the TPM's counters show it.
    agent.boot(&boot_log(), &site.keys);
    let reasons = revoked(pusher.push(&agent, &next.nonce).await);
    assert!(reasons.len() == 1 && reasons[0].contains("reset count"), "{reasons:?}");
    site.peers.called("revoke", &admission.to_string()).await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d3_silence_ends_an_admission() {
    let (site, agent, session, admission) =
        released("attestation_interval_seconds = 1\nattestation_silence_seconds = 5").await;
    let pusher = Pusher::new(&site, &session, admission);
    pusher.renewed(&agent).await;
    let revoke = site.peers.called("revoke", &admission.to_string()).await;
    assert!(revoke.detail.contains("silence"), "{}", revoke.detail);
    site.peers.called("unexport", &admission.to_string()).await;
    // Good evidence comes too late.
    assert_eq!(refusal(pusher.challenge().await).1, "admission-ended");
    let record = record(&site).await;
    assert!(record.silent_at_ms.is_some(), "nobody was told before: {record:?}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d3_a_peer_that_is_away_gets_nothing_renewed_and_hears_of_it_when_it_is_back() {
    let (site, agent, session, admission) = released("").await;
    let pusher = Pusher::new(&site, &session, admission);
    site.peers.refuse_renewals(Some(ApiError::unavailable("away", "away")));
    pusher.renewed(&agent).await;
    let (expires_at_ms, _) = pusher.renewed(&agent).await;
    assert!(site.peers.calls().iter().all(|call| !call.name.starts_with("renew")));
    site.peers.refuse_renewals(None);
    site.peers.called("renew-admission", "n1").await;
    site.peers.called("renew-export", "n1").await;
    assert!(expires_at_ms > SystemClock.now_ms());
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d3_what_could_not_be_passed_on_is_dropped_with_the_admission() {
    let mut agents = [Agent::manufacture("n1"), Agent::manufacture("n2")];
    let cas: Vec<_> = agents.iter().flat_map(|agent| agent.ek_cas.clone()).collect();
    let site = Site::start(&cas).await;
    let mut pushers = Vec::new();
    for (agent, node) in agents.iter_mut().zip(["n1", "n2"]) {
        site.lease(node);
        agent.boot(&boot_log(), &site.keys);
        let (session, admission) = admitted(&site, agent).await;
        pushers.push((Pusher::new(&site, &session, admission), admission));
    }
    site.peers.refuse_renewals(Some(ApiError::unavailable("away", "away")));
    let (_, next) = pushers[0].0.renewed(&agents[0]).await;
    agents[0].tpm.extend(7, &sha256(b"another key"));
    revoked(pushers[0].0.push(&agents[0], &next.nonce).await);
    site.peers.called("revoke", &pushers[0].1.to_string()).await;
    // What waits goes out with the next batch: the other node's renewal is in it, and this one's is not.
    pushers[1].0.renewed(&agents[1]).await;
    site.peers.refuse_renewals(None);
    for call in ["renew-admission", "renew-export"] {
        site.peers.called(call, "n2").await;
        assert!(site.peers.calls().iter().all(|seen| (seen.name, seen.node.as_str()) != (call, "n1")), "{call}");
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d7_a_policy_that_would_refuse_the_boot_ends_the_admission_at_the_next_push() {
    let (site, agent, session, admission) = released("").await;
    let pusher = Pusher::new(&site, &session, admission);
    let (_, next) = pusher.renewed(&agent).await;
    let policies: Vec<PolicyRecord> = site.operator.get("/v1/policies").await.unwrap();
    let document = &policies[0].document;
    // A policy under which this boot is good, too, goes on renewing and is named in the results.
    let tolerant = activate(&site, &document.replacen("name = ", "# a comment changes nothing\nname = ", 1)).await;
    assert_eq!(tolerant.digest, policies[0].digest);
    let wanted = hex::encode(sha256(b"agent.efi"));
    assert!(document.contains(&wanted), "{document}");
    let renamed = activate(&site, &document.replacen("name = \"", "name = \"renamed-", 1)).await;
    policy_is_read(&site, &pusher, &agent, &renamed.digest).await;
    let (_, next) = {
        let _ = next;
        pusher.renewed(&agent).await
    };
    assert_eq!(record(&site).await.policy, renamed.digest);
    // One that knows another agent does not.
    activate(&site, &document.replace(&wanted, &"cd".repeat(32))).await;
    let reasons = loop {
        match pusher
            .push(&agent, &pusher.challenge().await.map_or(next.nonce.clone(), |wanted| wanted.nonce))
            .await
            .unwrap()
        {
            AttestationAnswer::Revoked { reasons } => break reasons,
            AttestationAnswer::Renewed { .. } => tokio::task::yield_now().await,
        }
    };
    assert!(reasons.iter().all(|reason| reason.contains("active now")), "{reasons:?}");
    site.peers.called("revoke", &admission.to_string()).await;
    site.stop().await;
}

/// Pushes until the verifier has seen which policy is active: it looks once a second.
async fn policy_is_read(site: &Site, pusher: &Pusher, agent: &Agent, digest: &str) {
    let deadline = Instant::now() + PATIENCE;
    while record(site).await.policy != digest {
        assert!(Instant::now() < deadline, "the new policy was not seen");
        pusher.renewed(agent).await;
    }
}

async fn activate(site: &Site, document: &str) -> PolicyRecord {
    let request = PolicyRequest { document: document.to_owned(), ..PolicyRequest::default() };
    site.operator.post("/v1/policies", &request).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_reach_the_projects_other_nodes_and_nobody_else() {
    let mut agents = [Agent::manufacture("n1"), Agent::manufacture("n2"), Agent::manufacture("n3")];
    let cas: Vec<_> = agents.iter().flat_map(|agent| agent.ek_cas.clone()).collect();
    let site = Site::start(&cas).await;
    site.lease("n1");
    site.lease("n2");
    site.lease_to("n3", "beta");
    let mut pushers = Vec::new();
    for agent in &mut agents {
        agent.boot(&boot_log(), &site.keys);
        let (session, admission) = admitted(&site, agent).await;
        pushers.push((Pusher::new(&site, &session, admission), admission));
    }
    let waiting = |pusher: &Pusher, seconds: u64| {
        let path = format!("{}/notices?after=0&wait_seconds={seconds}", pusher.path);
        let client = pusher.client.clone();
        tokio::spawn(async move { client.get::<RevocationNotices>(&path).await.unwrap() })
    };
    let (friend, stranger) = (waiting(&pushers[1].0, 25), waiting(&pushers[2].0, 0));
    assert!(stranger.await.unwrap().notices.is_empty());
    let wanted = pushers[0].0.challenge().await.unwrap();
    agents[0].tpm.extend(0, &sha256(b"implant"));
    revoked(pushers[0].0.push(&agents[0], &wanted.nonce).await);
    let told = friend.await.unwrap();
    assert_eq!((told.latest, told.notices.len(), told.notices[0].admission), (1, 1, pushers[0].1));
    assert!(told.notices[0].reason.contains("PCR 0") && told.notices[0].ak_name.starts_with("000b"));
    // Another project's node hears nothing of it.
    assert!(waiting(&pushers[2].0, 0).await.unwrap().notices.is_empty());
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_evidence_costs_nothing_and_attestations_are_seen_by_who_may() {
    let (site, agent, session, admission) = released("").await;
    let pusher = Pusher::new(&site, &session, admission);
    let wanted = pusher.challenge().await.unwrap();
    let nonsense = pusher.client.post::<_, Value>(&pusher.path, &json!({"attest": 1})).await;
    assert_eq!(refusal(nonsense).1, "malformed");
    renewed(pusher.push(&agent, &wanted.nonce).await);
    let own = site.client_of(Role::Project("alpha".parse().unwrap()));
    assert_eq!(own.get::<Vec<AttestationRecord>>("/v1/attestations").await.unwrap().len(), 1);
    let other = site.client_of(Role::Project("beta".parse().unwrap()));
    assert_eq!(other.get::<Vec<AttestationRecord>>("/v1/attestations").await.unwrap(), []);
    assert_eq!(refusal(other.get::<Vec<AttestationRecord>>("/v1/attestations/n1").await).0, 404);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_expire_by_the_clock_alone() {
    let mut agent = Agent::manufacture("n1");
    let clock = Arc::new(ShiftedClock::default());
    let site = Site::start_with(&agent.ek_cas, "", Arc::<ShiftedClock>::clone(&clock)).await;
    site.lease("n1");
    agent.boot(&boot_log(), &site.keys);
    let (session, admission) = admitted(&site, &agent).await;
    let pusher = Pusher::new(&site, &session, admission);
    let wanted = pusher.challenge().await.unwrap();
    clock.advance_ms(90_000);
    // The nonce has expired, the first result has not.
    assert_eq!(refusal(pusher.push(&agent, &wanted.nonce).await).1, "no-nonce");
    pusher.renewed(&agent).await;
    clock.advance_ms(90_000);
    assert_eq!(refusal(pusher.challenge().await).1, "admission-ended");
    site.peers.called("revoke", &admission.to_string()).await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_tenants_kernel_measures_is_explained_by_its_list_or_ends_the_admission() {
    let (site, agent, session, admission) = released("").await;
    let pusher = Pusher::new(&site, &session, admission);
    let pcrs = agent.tpm.pcrs();
    let list = ListWriter::after(pcrs[10]).boot_aggregate(&pcrs).file("/usr/bin/true", &sha256(b"true"));
    for digest in list.extended() {
        agent.tpm.extend(10, digest);
    }
    let whole = ImaList { first_entry: 0, entries: list.bytes().to_vec() };
    let wanted = pusher.challenge().await.unwrap();
    let evidence = agent.runtime_evidence_with(&wanted.nonce, Some(whole));
    let (_, next) = renewed(pusher.client.post(&pusher.path, &evidence).await);
    // Only what is new travels from here on.
    assert_eq!((next.ima_first_entry, record(&site).await.ima_entries), (2, 2));
    let nothing_new = Some(ImaList { first_entry: 2, entries: Vec::new() });
    let evidence = agent.runtime_evidence_with(&next.nonce, nothing_new.clone());
    let (_, next) = renewed(pusher.client.post(&pusher.path, &evidence).await);
    // Something runs that the list does not show.
    agent.tpm.extend(10, &sha256(b"implant"));
    let evidence = agent.runtime_evidence_with(&next.nonce, nothing_new);
    let reasons = revoked(pusher.client.post(&pusher.path, &evidence).await);
    assert!(reasons.iter().any(|reason| reason.contains("PCR 10")), "{reasons:?}");
    site.peers.called("revoke", &admission.to_string()).await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_isolation_ends_is_over_here_before_it_is_on_record() {
    // Nobody has asked for a challenge yet: this verifier knows of the admission from the record alone.
    let (site, _agent, session, admission) = released("").await;
    site.peers.end(admission, "its lease has ended");
    site.peers.called("unexport", &admission.to_string()).await;
    let pusher = Pusher::new(&site, &session, admission);
    assert_eq!(refusal(pusher.challenge().await).1, "admission-ended");
    // What is written down last is written down all the same.
    let deadline = Instant::now() + Duration::from_secs(20);
    while record(&site).await.state != AttestationState::Ended {
        assert!(Instant::now() < deadline, "the end is not on record");
    }
    assert!(record(&site).await.reasons[0].contains("its lease has ended"));
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_isolation_ends_ends_here_at_once() {
    let (site, agent, session, admission) = released("").await;
    let pusher = Pusher::new(&site, &session, admission);
    let (_, next) = pusher.renewed(&agent).await;
    site.peers.end(admission, "the machine was reset by its BMC");
    site.peers.called("unexport", &admission.to_string()).await;
    let reasons = revoked(pusher.push(&agent, &next.nonce).await);
    assert!(reasons[0].contains("reset by its BMC"), "{reasons:?}");
    site.stop().await;
}
