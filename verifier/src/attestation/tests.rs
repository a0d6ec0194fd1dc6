//! The parts together: a real database, scripted peers over real HTTP, keys of a TPM without the TPM. What the clock,
//! a database that fails, a crash and a second verifier do to an admission.

use super::appraise::{Baseline, Decision, RuntimeCase, Seen, appraise_runtime};
use super::endings::Endings;
use super::pushes::{Pushes, Recorded};
use super::register::Register;
use super::renewals::Renewals;
use super::renewed_claims;
use crate::fixtures::{ScriptedPeers, TestStore, enrolled, release_of, verdict};
use crate::ima::ImaState;
use crate::policy::Policy;
use crate::quote::{AkPublic, ClockInfo, PCR_COUNT, PcrValue};
use crate::session::{IssuedNonce, Nonce};
use crate::store::archive::Outcome;
use crate::store::attestations::{
    AttestationState, Ending, FallsTo, NewAttestation, Part, PushRecord, StoredAttestation,
};
use crate::store::events::EventKind;
use crate::store::{StoreLimits, VerifierStore};
use crate::tee::Collateral;
use assay_service::CancellationToken;
use assay_service::clock::{Clock, SystemClock};
use assay_service::error::ApiError;
use assay_service::testing::TestDatabase;
use assay_tpm::soft_keys::{Maker, SoftClock, SoftKeys};
use assay_wire::evidence::RuntimeEvidence;
use assay_wire::result::{Claims, EAR_PROFILE, EarStatus, Submod, VerifierId};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio_util::task::TaskTracker;

const CLOCK: SoftClock = SoftClock { clock_ms: 5_000, reset_count: 4, restart_count: 1 };

fn pcrs() -> [[u8; 32]; PCR_COUNT] {
    std::array::from_fn(|pcr| [u8::try_from(pcr).unwrap(); 32])
}

fn info(clock: SoftClock) -> ClockInfo {
    let SoftClock { clock_ms, reset_count, restart_count } = clock;
    ClockInfo { clock_ms, reset_count, restart_count, safe: true, firmware_version: 0 }
}

fn policy(valid_until: &str) -> Policy {
    let rule = |index: u8| {
        let event = serde_json::json!({"type": "EV_IPL", "description": "x", "sha256": ["00".repeat(32)]});
        serde_json::json!({"index": index, "mode": "enforce", "event": [event]})
    };
    let rules: Vec<_> = [0, 2, 4, 7, 11, 12].map(rule).to_vec();
    let document = serde_json::json!({"name": "lab", "valid_until": valid_until, "pcr": rules});
    Policy::from_json(&document.to_string()).unwrap()
}

/// A node that was admitted, and its keys.
struct Admitted {
    keys: SoftKeys,
    baseline: Baseline,
    seen: Seen,
}

impl Admitted {
    fn new() -> Self {
        let keys = Maker::new().manufacture();
        let pcrs = pcrs().map(PcrValue::new);
        let baseline = Baseline { ak: AkPublic::parse(&keys.ak_public).unwrap(), pcrs, clock: info(CLOCK) };
        let seen = Seen { clock: info(CLOCK), ima: ImaState::admitted(&pcrs[10]) };
        Self { keys, baseline, seen }
    }

    fn evidence(&self, nonce: &Nonce, pcrs: &[[u8; 32]], clock: SoftClock) -> RuntimeEvidence {
        let (attest, signature) = self.keys.quote(nonce.as_bytes(), pcrs, clock);
        RuntimeEvidence {
            attest,
            signature,
            pcrs: pcrs.iter().map(hex::encode).collect(),
            ima: None,
            tee: Vec::new(),
            supporting: Vec::new(),
        }
    }

    fn decide(&self, evidence: &RuntimeEvidence, nonce: &Nonce) -> Decision {
        let policy = policy("2100-01-01T00:00:00Z");
        let (baseline, seen) = (&self.baseline, &self.seen);
        appraise_runtime(&RuntimeCase {
            baseline,
            seen,
            nonce,
            evidence,
            policy: &policy,
            tee_collateral: &Collateral::default(),
            now_seconds: 1_800_000_000,
        })
    }
}

fn reasons(decision: Decision) -> String {
    match decision {
        Decision::Revoke(reasons) => reasons.join("; "),
        other => panic!("not revoked: {other:?}"),
    }
}

#[test]
fn a14_every_counter_of_the_tpm_is_watched() {
    let node = Admitted::new();
    let nonce = Nonce::random();
    let later = SoftClock { clock_ms: 5_001, ..CLOCK };
    let good = node.decide(&node.evidence(&nonce, &pcrs(), later), &nonce);
    assert!(matches!(good, Decision::Renew { ref seen, .. } if seen.clock.clock_ms == 5_001), "{good:?}");
    for (clock, word) in [
        (SoftClock { reset_count: 5, ..CLOCK }, "reset count"),
        (SoftClock { reset_count: 3, ..CLOCK }, "reset count"),
        (SoftClock { restart_count: 2, ..CLOCK }, "restart count"),
        (SoftClock { clock_ms: 4_999, ..CLOCK }, "clock went back"),
    ] {
        let says = reasons(node.decide(&node.evidence(&nonce, &pcrs(), clock), &nonce));
        assert!(says.contains(word), "{clock:?}: {says}");
    }
    let mut other_firmware = Admitted::new();
    other_firmware.baseline.clock.firmware_version = 7;
    let says = reasons(other_firmware.decide(&other_firmware.evidence(&nonce, &pcrs(), CLOCK), &nonce));
    assert!(says.contains("firmware version"), "{says}");
}

#[test]
fn d1_every_pcr_but_imas_must_be_what_it_was() {
    let node = Admitted::new();
    let nonce = Nonce::random();
    for pcr in 0..PCR_COUNT {
        let mut moved = pcrs();
        moved[pcr][31] ^= 1;
        let says = reasons(node.decide(&node.evidence(&nonce, &moved, CLOCK), &nonce));
        assert!(says.contains(&format!("PCR {pcr} ")), "PCR {pcr}: {says}");
    }
}

#[test]
fn a1_a5_a12_only_this_ak_and_this_nonce_renew() {
    let (node, thief) = (Admitted::new(), Admitted::new());
    let nonce = Nonce::random();
    // Another machine's good quote for this nonce.
    let says = reasons(node.decide(&thief.evidence(&nonce, &pcrs(), CLOCK), &nonce));
    assert!(says.contains("not signed by this AK"), "{says}");
    // Its own quote for another nonce is no lie, and no news.
    let old = node.evidence(&Nonce::random(), &pcrs(), CLOCK);
    assert_eq!(node.decide(&old, &nonce), Decision::Stale);
    // Values that are not those that were signed; too few of them.
    let mut lie = node.evidence(&nonce, &pcrs(), CLOCK);
    lie.pcrs[3] = "ff".repeat(32);
    assert!(reasons(node.decide(&lie, &nonce)).contains("PCR values"));
    lie.pcrs.pop();
    assert!(reasons(node.decide(&lie, &nonce)).contains("14 PCR values"));
}

#[test]
fn d3_an_expired_policy_vouches_for_nobody_and_accuses_nobody() {
    let node = Admitted::new();
    let nonce = Nonce::random();
    let evidence = node.evidence(&nonce, &pcrs(), CLOCK);
    let decide = |now_seconds| {
        let (baseline, seen, policy) = (&node.baseline, &node.seen, &policy("2027-01-15T08:00:00Z"));
        appraise_runtime(&RuntimeCase {
            baseline,
            seen,
            nonce: &nonce,
            evidence: &evidence,
            policy,
            tee_collateral: &Collateral::default(),
            now_seconds,
        })
    };
    assert!(matches!(decide(1_799_999_999), Decision::Renew { .. }));
    assert!(matches!(decide(1_800_000_000), Decision::Withhold(why) if why.contains("lab")));
}

/// An admission that was handed over, in the database.
async fn handed_over(store: &VerifierStore, node: &str) -> StoredAttestation {
    begun(store, node, Part::Leads).await
}

/// The same, or one that another verifier leads.
async fn begun(store: &VerifierStore, node: &str, part: Part) -> StoredAttestation {
    let now_ms = SystemClock.now_ms();
    let keys = Maker::new().manufacture();
    let mut enrolled = enrolled(store, node, now_ms).await;
    (enrolled.attester.ak_public, enrolled.attester.ek_public) = (keys.ak_public.clone(), keys.ek_public.clone());
    let release = release_of(&enrolled, now_ms);
    let submod = Submod { status: EarStatus::Affirming, policy: "sha256:00".into(), rules: BTreeMap::new() };
    let claims = Claims {
        eat_profile: EAR_PROFILE.into(),
        iat: now_ms / 1000,
        exp: now_ms / 1000 + 900,
        jti: release.admission,
        verifier_id: VerifierId { developer: "assay".into(), build: "test".into() },
        eat_nonce: "AA".into(),
        submods: BTreeMap::from([("tpm".to_owned(), submod)]),
        node: release.node.clone(),
        project: release.project.clone(),
        lease: release.lease,
        boot: release.boot,
        ek_public: String::new(),
        ek_sha256: String::new(),
        ak_name: keys.ak_name().to_string(),
        renews: None,
        reset_count: CLOCK.reset_count,
        restart_count: CLOCK.restart_count,
    };
    let (pcrs, clock) = (pcrs().map(PcrValue::new), info(CLOCK));
    let outcome = match part {
        Part::Leads => Outcome::Accepted(&release),
        Part::Supports => Outcome::Affirmed(&release),
    };
    let mut new = verdict(&enrolled, outcome, now_ms);
    new.attestation = Some(NewAttestation { claims: &claims, proof: enrolled.proof, pcrs: &pcrs, clock: &clock, part });
    assert!(store.record_verdict(&new).await.unwrap());
    sqlx::query("UPDATE releases SET step = 'handed-over' WHERE admission = $1")
        .bind(release.admission.to_string())
        .execute(store.pool())
        .await
        .unwrap();
    store.attestation(release.admission).await.unwrap().unwrap()
}

fn push(stored: &StoredAttestation) -> PushRecord {
    let mut progress = stored.progress.clone();
    progress.sequence += 1;
    progress.seen.clock.clock_ms += 1;
    let now_ms = SystemClock.now_ms();
    (progress.last_seen_at_ms, progress.expires_at_ms) = (Some(now_ms), now_ms + 90_000);
    let admission = stored.attested.admission;
    PushRecord { admission, progress, warnings: vec!["look".into()], next_expected_at_ms: now_ms + 30_000 }
}

fn bad(stored: &StoredAttestation) -> Ending {
    super::ending(&stored.attested, EventKind::AdmissionRevoked, vec!["PCR 7 was extended".to_owned()])
}

/// One verifier process, as far as it ends admissions.
struct Process {
    endings: Endings,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl Process {
    fn start(store: &VerifierStore, scripted: &ScriptedPeers) -> Self {
        let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (clock, register): (Arc<dyn Clock>, _) = (Arc::new(SystemClock), Arc::new(Register::new(8)));
        let endings = Endings::new(
            store.clone(),
            scripted.peers.clone(),
            Arc::clone(&clock),
            Arc::clone(&register),
            Renewals::start(&scripted.peers, &clock, &register, &shutdown, &TaskTracker::new()),
            shutdown.clone(),
            tasks.clone(),
        );
        Self { endings, shutdown, tasks }
    }

    /// Waits until everything that was begun is done.
    async fn done(self) {
        self.tasks.close();
        tokio::time::timeout(std::time::Duration::from_secs(20), self.tasks.wait()).await.expect("not done in time");
    }

    /// Dies where it stands.
    async fn crash(self) {
        self.shutdown.cancel();
        self.done().await;
    }
}

async fn state(store: &VerifierStore, node: &str) -> AttestationState {
    store.attestations_of(&node.parse().unwrap()).await.unwrap()[0].state
}

/// Waits for the record, which is written beside what is done.
async fn recorded(store: &VerifierStore, node: &str, wanted: AttestationState) {
    let seen = async { while state(store, node).await != wanted {} };
    tokio::time::timeout(std::time::Duration::from_secs(60), seen).await.expect("it was not recorded");
}

async fn on_both<F: Future<Output = ()>>(case: impl Fn(TestStore) -> F) {
    case(TestStore::on(TestDatabase::sqlite(), StoreLimits::default()).await).await;
    if let Some(database) = TestDatabase::postgresql() {
        case(TestStore::on(database, StoreLimits::default()).await).await;
    }
}

#[tokio::test]
async fn pushes_count_once_in_order_and_not_after_the_end() {
    on_both(|test| async move {
        let (a, b) = (handed_over(&test.store, "n1").await, handed_over(&test.store, "n2").await);
        let (first, other) = (push(&a), push(&b));
        let counted = test.store.record_pushes(&[first.clone(), other]).await.unwrap();
        assert_eq!(counted.len(), 2);
        let read = test.store.attestation(a.attested.admission).await.unwrap().unwrap();
        assert_eq!(read.progress, first.progress);
        // The view of a verifier that did not see the first push: an old clock must not come back.
        assert!(test.store.record_pushes(&[first]).await.unwrap().is_empty());
        assert!(test.store.begin_ending(&bad(&b), 5).await.unwrap());
        assert!(!test.store.begin_ending(&bad(&b), 6).await.unwrap());
        let counted = test.store.record_pushes(&[push(&read), push(&b)]).await.unwrap();
        assert_eq!(counted.into_iter().collect::<Vec<_>>(), [a.attested.admission]);
        let record = &test.store.attestations_of(&"n1".parse().unwrap()).await.unwrap()[0];
        assert_eq!((record.pushes, record.warnings.len()), (2, 1));
        // One end, one notice, one event; in their order, and not repeated.
        let notices = test.store.notices(&a.attested.project, 0).await.unwrap();
        assert_eq!(notices.iter().map(|n| (n.sequence, n.admission)).collect::<Vec<_>>(), [(1, b.attested.admission)]);
        let events = test.store.events(0, None, 10).await.unwrap();
        assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(events[2].event, EventKind::AdmissionRevoked);
        assert!(test.store.notices(&a.attested.project, 1).await.unwrap().is_empty());
    })
    .await;
}

#[tokio::test]
async fn silence_is_marked_once_and_expiry_is_found() {
    on_both(|test| async move {
        let stored = handed_over(&test.store, "n1").await;
        let pushed = push(&stored);
        let (due_ms, expires_ms) = (pushed.next_expected_at_ms, pushed.progress.expires_at_ms);
        // Before the first push there is nothing to be late for.
        assert_eq!(test.store.mark_silent(i64::MAX, 1).await.unwrap(), 0);
        test.store.record_pushes(&[pushed]).await.unwrap();
        assert_eq!(test.store.mark_silent(due_ms, 1).await.unwrap(), 0);
        assert_eq!(test.store.mark_silent(due_ms + 1, 1).await.unwrap(), 1);
        assert_eq!(test.store.mark_silent(due_ms + 1, 2).await.unwrap(), 0);
        assert!(test.store.expired_attestations(expires_ms - 1).await.unwrap().is_empty());
        assert_eq!(test.store.expired_attestations(expires_ms).await.unwrap().len(), 1);
    })
    .await;
}

#[tokio::test]
async fn one_verifier_delivers_to_a_webhook_and_another_takes_it_over() {
    on_both(|test| async move {
        let other = test.another_process("other").await;
        let stored = handed_over(&test.store, "n1").await;
        // A new receiver begins with what is to come.
        assert_eq!(test.store.claim_webhook("u", 1_000, 2_000).await.unwrap(), Some(1));
        assert_eq!(other.claim_webhook("u", 1_500, 2_500).await.unwrap(), None);
        assert!(test.store.begin_ending(&bad(&stored), 5).await.unwrap());
        test.store.webhook_delivered("u", 2).await.unwrap();
        assert_eq!(other.claim_webhook("u", 2_001, 3_000).await.unwrap(), Some(2));
        // Who lost the claim moves nothing any more.
        test.store.webhook_delivered("u", 9).await.unwrap();
        assert_eq!(other.claim_webhook("u", 2_002, 3_000).await.unwrap(), Some(2));
        other.refresh_counters().await.unwrap();
        assert_eq!(other.counters().subscribe().borrow().get("events"), Some(&2));
    })
    .await;
}

#[tokio::test]
async fn d3_a_database_that_fails_renews_nothing() {
    let test = TestStore::open(StoreLimits::default()).await;
    let stored = handed_over(&test.store, "n1").await;
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let pushes = Pushes::start(test.store.clone(), shutdown.clone(), &tasks);
    assert_eq!(pushes.record(push(&stored)).await, Recorded::Yes);
    assert_eq!(pushes.record(push(&stored)).await, Recorded::Superseded);
    test.store.close().await;
    assert_eq!(pushes.record(push(&stored)).await, Recorded::No);
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
    assert_eq!(pushes.record(push(&stored)).await, Recorded::No);
}

#[tokio::test]
async fn d4_a_node_is_cut_off_although_nothing_can_be_written() {
    let mut test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let stored = handed_over(&test.store, "n1").await;
    let process = Process::start(&test.store, &scripted);
    test.store.close().await;
    process.endings.begin(bad(&stored));
    scripted.world.called("revoke", 1).await;
    scripted.world.called("unexport", 1).await;
    process.crash().await;
    // Nothing was written, so the record still stands; evidence, silence or isolation's word end it again.
    test.reopen().await;
    assert_eq!(state(&test.store, "n1").await, AttestationState::Standing);
    assert_eq!(test.store.standing_attestations().await.unwrap().len(), 1);
}

#[tokio::test]
async fn d4_an_end_that_a_crash_interrupted_is_taken_up_by_the_next_verifier() {
    let mut test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let stored = handed_over(&test.store, "n1").await;
    scripted.world.fail("revoke", std::iter::repeat_n(ApiError::unavailable("switch", "no answer"), 1_000));
    let process = Process::start(&test.store, &scripted);
    process.endings.begin(bad(&stored));
    // The port does not close, and that keeps nobody from cutting the disk.
    scripted.world.called("revoke", 2).await;
    scripted.world.called("unexport", 1).await;
    recorded(&test.store, "n1", AttestationState::Ending).await;
    process.crash().await;
    test.reopen().await;
    assert_eq!(state(&test.store, "n1").await, AttestationState::Ending);
    let scripted = ScriptedPeers::start().await;
    let next = Process::start(&test.store, &scripted);
    next.endings.resume().await.unwrap();
    next.done().await;
    assert_eq!(state(&test.store, "n1").await, AttestationState::Ended);
    let mut names = scripted.world.names();
    names.sort_unstable();
    assert_eq!(names, ["revoke", "unexport"]);
    let events = test.store.events(0, None, 10).await.unwrap();
    assert_eq!(events.iter().filter(|event| event.event == EventKind::AdmissionRevoked).count(), 1);
}

#[tokio::test]
async fn the_register_is_bounded_and_forgets_no_end() {
    let test = TestStore::open(StoreLimits::default()).await;
    let register = Register::new(2);
    let stored = handed_over(&test.store, "n1").await;
    let id = stored.attested.admission;
    let put = |stored: &StoredAttestation, now_ms| {
        register.put(stored.attested.clone(), stored.progress.clone(), stored.ended.clone(), now_ms)
    };
    put(&stored, 1);
    let issued = |expires_at_ms| IssuedNonce { nonce: Nonce::random(), issued_at_ms: 0, expires_at_ms };
    let (first, second) = (issued(10), issued(10));
    assert!(register.issue(id, first) && register.issue(id, second));
    assert_eq!(register.take_nonce(id, 9), Some(second.nonce));
    assert_eq!(register.take_nonce(id, 9), None);
    register.issue(id, first);
    assert_eq!(register.take_nonce(id, 10), None, "an expired nonce was taken");
    // Ended stays ended, whatever an older record says.
    register.end(id, &["bad".to_owned()]);
    assert_eq!(put(&stored, 2).ended, Some(vec!["bad".to_owned()]));
    assert!(!register.issue(id, first));
    assert!(!register.unless_over(id, || panic!("something was done for an admission that is over")));
    register.forget(id);
    assert!(register.get(id, 3).is_some());
    // The third pushes out the one that was not heard of for the longest.
    let (b, c) = (handed_over(&test.store, "n2").await, handed_over(&test.store, "n3").await);
    put(&b, 4);
    put(&c, 5);
    let mut done = false;
    assert!(register.unless_over(c.attested.admission, || done = true) && done);
    assert!(register.get(id, 6).is_none());
    assert!(register.get(b.attested.admission, 6).is_some() && register.get(c.attested.admission, 6).is_some());
}

#[tokio::test]
async fn a_renewed_result_is_about_the_same_node_and_names_its_admission() {
    let test = TestStore::open(StoreLimits::default()).await;
    let stored = handed_over(&test.store, "n1").await;
    let mut progress = push(&stored).progress;
    progress.expires_at_ms = 1_800_000_090_000;
    let claims = renewed_claims(&stored.attested, &progress, &[7; 32], 1_800_000_000);
    let first = &stored.attested.claims;
    assert_eq!((claims.renews, claims.iat, claims.exp), (Some(first.jti), 1_800_000_000, 1_800_000_090));
    assert!(claims.jti != first.jti && claims.eat_nonce != first.eat_nonce);
    let same = Claims {
        iat: first.iat,
        exp: first.exp,
        jti: first.jti,
        eat_nonce: first.eat_nonce.clone(),
        renews: None,
        ..claims
    };
    assert_eq!(&same, first);
}

#[tokio::test]
async fn an_attestation_that_supports_stands_from_the_verdict_on_and_ends_by_silence_or_the_next_boot() {
    on_both(|test| async move {
        let first = begun(&test.store, "n1", Part::Supports).await;
        assert_eq!((first.attested.part, first.release), (Part::Supports, None));
        let pushed = push(&first);
        let expires_ms = pushed.progress.expires_at_ms;
        assert_eq!(test.store.record_pushes(&[pushed]).await.unwrap().len(), 1);
        // Isolation's admissions are not followed by it: it has none there.
        assert!(test.store.standing_attestations().await.unwrap().is_empty());
        let silent = test.store.expired_attestations(expires_ms).await.unwrap();
        assert_eq!((silent.len(), silent[0].admission), (1, first.attested.admission));
        assert_eq!((silent[0].boot, silent[0].falls_to()), (first.attested.claims.boot, FallsTo::Nobody));
        // Nobody has to be told, so nothing is left to be taken up.
        assert!(test.store.begin_ending(&silent[0], 5).await.unwrap());
        assert_eq!(state(&test.store, "n1").await, AttestationState::Ended);
        assert!(test.store.endings().await.unwrap().is_empty());
        // A node that is appraised anew has nothing else that is vouched for. Another node's stands.
        let (second, other) =
            (begun(&test.store, "n1", Part::Supports).await, begun(&test.store, "n2", Part::Supports).await);
        let third = begun(&test.store, "n1", Part::Supports).await;
        let ended =
            async |of: &StoredAttestation| test.store.attestation(of.attested.admission).await.unwrap().unwrap().ended;
        assert_eq!(ended(&second).await, Some(vec!["the node was appraised anew".to_owned()]));
        assert_eq!((ended(&third).await, ended(&other).await), (None, None));
    })
    .await;
}

#[tokio::test]
async fn a_supporting_verifier_tells_isolation_of_bad_evidence_and_nobody_of_silence() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let (bad_one, silent) =
        (begun(&test.store, "n1", Part::Supports).await, begun(&test.store, "n2", Part::Supports).await);
    // Isolation does not answer, and then does not want to hear it.
    scripted
        .world
        .fail("reject", [ApiError::unavailable("switch", "no answer"), ApiError::forbidden("forbidden", "no")]);
    let process = Process::start(&test.store, &scripted);
    process.endings.begin(bad(&bad_one));
    let reasons = vec!["silence".to_owned()];
    process.endings.begin(super::ending(&silent.attested, EventKind::AdmissionEnded, reasons));
    process.done().await;
    assert_eq!(scripted.world.names(), ["reject", "reject"]);
    for node in ["n1", "n2"] {
        assert_eq!(state(&test.store, node).await, AttestationState::Ended);
    }
    // Each has its event and its notice.
    let events = test.store.events(0, None, 10).await.unwrap();
    let ends = |kind| events.iter().filter(|event| event.event == kind).count();
    assert_eq!((ends(EventKind::AdmissionRevoked), ends(EventKind::AdmissionEnded)), (1, 1));
    assert_eq!(test.store.notices(&bad_one.attested.project, 0).await.unwrap().len(), 2);
}
