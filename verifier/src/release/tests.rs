//! The drivers against scripted peers over real HTTP, and a real journal on disk: failures, lost answers, crashes.

use super::*;
use crate::fixtures::{ScriptedPeers, TestStore, admitted, enrolled, verdict};
use crate::release::reports::Reports;
use crate::store::StoreLimits;
use crate::store::archive::Outcome;
use assay_service::clock::SystemClock;
use assay_service::error::ApiError;
use std::time::Instant;

/// One verifier process.
struct Process {
    releases: Releases,
    shutdown: CancellationToken,
}

impl Process {
    fn start(test: &TestStore, scripted: &ScriptedPeers, timeouts: ReleaseTimeouts) -> Self {
        let shutdown = CancellationToken::new();
        let clock = Arc::new(SystemClock);
        let releases = Releases::new(test.store.clone(), scripted.peers.clone(), clock, timeouts, shutdown.clone());
        Self { releases, shutdown }
    }

    /// Dies: whatever was under way is dropped where it stands, and the database is told nothing.
    async fn crash(self) {
        self.shutdown.cancel();
        self.releases.shared.tasks.close();
        self.releases.shared.tasks.wait().await;
    }

    /// Another process on the same database.
    async fn beside(test: &TestStore, name: &str, scripted: &ScriptedPeers) -> Self {
        let shutdown = CancellationToken::new();
        let (store, clock) = (test.another_process(name).await, Arc::new(SystemClock));
        let releases = Releases::new(store, scripted.peers.clone(), clock, quick(), shutdown.clone());
        releases.resume().await.unwrap();
        Self { releases, shutdown }
    }
}

fn quick() -> ReleaseTimeouts {
    ReleaseTimeouts { settle_ms: 5, resume_grace_ms: 20, ..ReleaseTimeouts::default() }
}

fn now_ms() -> i64 {
    SystemClock.now_ms()
}

const PATIENCE: Duration = Duration::from_secs(20);

async fn moved(process: &Process, admission: AdmissionId) {
    let status = process.releases.status(admission, PATIENCE).await.unwrap();
    assert!(matches!(status, ReleaseStatus::Move(_)), "{status:?}");
}

/// Waits until the release is finished.
async fn finished(process: &Process, test: &TestStore, admission: AdmissionId) -> Release {
    let progress = process.releases.running().get(&admission).map(|running| running.progress.clone());
    if let Some(mut progress) = progress {
        let end = progress.wait_for(|progress| progress.step.is_finished());
        drop(tokio::time::timeout(PATIENCE, end).await.expect("the release did not end").ok());
    }
    test.store.release(admission).await.unwrap().unwrap()
}

/// The agent's part, from `ready` on.
async fn agent(process: &Process, admission: AdmissionId) {
    moved(process, admission).await;
    drop(process.releases.ready(admission).await.unwrap());
    let grant = process.releases.grant(admission).await.unwrap();
    assert_eq!(grant.admission, admission);
    process.releases.handover(admission).await.unwrap();
}

#[tokio::test]
async fn a_good_verdict_becomes_a_handed_over_node() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let process = Process::start(&test, &scripted, quick());
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    agent(&process, release.admission).await;
    let release = finished(&process, &test, release.admission).await;
    assert_eq!(release.step, ReleaseStep::HandedOver);
    assert_eq!(scripted.world.names(), ["export", "admit"]);
    assert!(scripted.world.port_is_open(release.admission) && scripted.world.export_is_open(release.admission));
    // Said twice changes nothing; asked late is refused in words.
    process.releases.handover(release.admission).await.unwrap();
    let refused = process.releases.ready(release.admission).await.unwrap_err();
    assert!(matches!(refused, CallError::Complete), "{refused}");
}

#[tokio::test]
async fn the_port_stays_until_the_answer_to_ready_has_left() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let process = Process::start(&test, &scripted, ReleaseTimeouts { settle_ms: 50, ..quick() });
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    moved(&process, release.admission).await;
    let leaving = process.releases.ready(release.admission).await.unwrap();
    // The grant waits for the move, the move for the answer.
    let grant = process.releases.grant(release.admission);
    let early = tokio::time::timeout(Duration::from_millis(200), grant).await;
    assert!(early.is_err(), "the grant was given out while the node was in the airlock");
    assert_eq!(scripted.world.names(), ["export"]);
    let left = Instant::now();
    drop(leaving);
    process.releases.grant(release.admission).await.unwrap();
    let admit = scripted.world.calls().into_iter().find(|call| call.name == "admit").unwrap();
    let after = admit.at.duration_since(left);
    assert!(after >= Duration::from_millis(49), "the port was moved {after:?} after the answer left");
}

#[tokio::test]
async fn d6_an_agent_that_is_early_gets_no_grant() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let process = Process::start(&test, &scripted, quick());
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    moved(&process, release.admission).await;
    let grant = process.releases.grant(release.admission).await.unwrap_err();
    assert!(matches!(grant, CallError::TooEarly { step: ReleaseStep::Exported, .. }), "{grant}");
    let handover = process.releases.handover(release.admission).await.unwrap_err();
    assert!(matches!(handover, CallError::TooEarly { .. }), "{handover}");
    let unknown = process.releases.ready(AdmissionId::random()).await.unwrap_err();
    assert!(matches!(unknown, CallError::Unknown), "{unknown}");
}

#[tokio::test]
async fn peers_that_fail_for_a_while_only_cost_time() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    scripted.world.fail("export", [ApiError::unavailable("disk", "not now")]);
    scripted.world.fail("admit", [ApiError::unavailable("switch", "no answer")]);
    scripted.world.lose_answers("export", 1);
    let process = Process::start(&test, &scripted, quick());
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    agent(&process, release.admission).await;
    assert_eq!(finished(&process, &test, release.admission).await.step, ReleaseStep::HandedOver);
}

#[tokio::test]
async fn a_move_that_failed_before_it_was_refused_is_undone_with_the_first_reason() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let closed = ApiError::unavailable("port-not-moved", "the switch does not answer");
    scripted.world.fail("admit", [closed, ApiError::conflict("admission-ended", "it ended")]);
    let process = Process::start(&test, &scripted, quick());
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    moved(&process, release.admission).await;
    drop(process.releases.ready(release.admission).await.unwrap());
    let release = finished(&process, &test, release.admission).await;
    assert_eq!(release.step, ReleaseStep::Unwound);
    let failure = release.failure.unwrap();
    assert!(failure.contains("it ended") && failure.contains("the switch does not answer"), "{failure}");
}

#[tokio::test]
async fn a_journal_that_cannot_be_written_stops_the_release_where_it_is() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let process = Process::start(&test, &scripted, quick());
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    moved(&process, release.admission).await;
    // As on a full disk: reading works, writing does not.
    test.store.refuse_writes(true).await;
    let refused = process.releases.ready(release.admission).await.unwrap_err();
    assert!(matches!(refused, CallError::Busy), "{refused}");
    assert_eq!(test.store.release(release.admission).await.unwrap().unwrap().step, ReleaseStep::Exported);
    assert_eq!(scripted.world.names(), ["export"]);
    test.store.refuse_writes(false).await;
    agent(&process, release.admission).await;
    assert_eq!(finished(&process, &test, release.admission).await.step, ReleaseStep::HandedOver);
}

#[tokio::test]
async fn a_refused_export_is_undone_without_touching_the_port() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    scripted.world.fail("export", [ApiError::forbidden("no-disk", "the lease has no disk")]);
    let process = Process::start(&test, &scripted, quick());
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    let release = finished(&process, &test, release.admission).await;
    assert_eq!(release.step, ReleaseStep::Unwound);
    assert!(release.failure.as_deref().unwrap_or_default().contains("the lease has no disk"), "{:?}", release.failure);
    assert_eq!(scripted.world.names(), ["export", "revoke", "unexport"]);
    let status = process.releases.status(release.admission, PATIENCE).await.unwrap();
    assert!(matches!(status, ReleaseStatus::Aborted { .. }), "{status:?}");
}

#[tokio::test]
async fn a_refused_move_fences_first_and_then_ends_the_export() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    scripted.world.fail("admit", [ApiError::conflict("other-boot", "the node was reset")]);
    // Undoing is never given up, whatever the answer.
    scripted.world.fail("revoke", [ApiError::unavailable("switch", "no answer")]);
    scripted.world.fail("unexport", [ApiError::forbidden("?", "no")]);
    let process = Process::start(&test, &scripted, quick());
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    moved(&process, release.admission).await;
    drop(process.releases.ready(release.admission).await.unwrap());
    let grant = process.releases.grant(release.admission).await.unwrap_err();
    assert!(matches!(&grant, CallError::Undone { reason } if reason.contains("the node was reset")), "{grant}");
    assert_eq!(finished(&process, &test, release.admission).await.step, ReleaseStep::Unwound);
    assert_eq!(scripted.world.names(), ["export", "admit", "revoke", "revoke", "unexport", "revoke", "unexport"]);
    assert!(!scripted.world.export_is_open(release.admission));
}

#[tokio::test]
async fn a_silent_agent_loses_its_port_and_its_export() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let process = Process::start(&test, &scripted, ReleaseTimeouts { grant_ms: 150, ..quick() });
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    moved(&process, release.admission).await;
    drop(process.releases.ready(release.admission).await.unwrap());
    scripted.world.called("admit", 1).await;
    let release = finished(&process, &test, release.admission).await;
    assert_eq!(release.step, ReleaseStep::Unwound);
    assert!(release.failure.unwrap().contains("did not fetch its grant"));
    assert!(!scripted.world.port_is_open(release.admission) && !scripted.world.export_is_open(release.admission));
}

#[tokio::test]
async fn a_crash_at_any_step_is_resumed_to_the_end() {
    for crash_at in
        [ReleaseStep::Admitted, ReleaseStep::Exported, ReleaseStep::Ready, ReleaseStep::Moved, ReleaseStep::Granted]
    {
        let mut test = TestStore::open(StoreLimits::default()).await;
        let scripted = ScriptedPeers::start().await;
        let process = Process::start(&test, &scripted, quick());
        let admission = admitted(&test.store, "n1", now_ms()).await.admission;
        advance(&process, &test, &scripted, admission, crash_at).await;
        process.crash().await;
        test.reopen().await;
        assert_eq!(test.store.release(admission).await.unwrap().unwrap().step, crash_at);

        let process = Process::start(&test, &scripted, quick());
        assert_eq!(process.releases.resume().await.unwrap(), 1);
        if crash_at == ReleaseStep::Granted {
            process.releases.handover(admission).await.unwrap();
        } else if matches!(crash_at, ReleaseStep::Ready | ReleaseStep::Moved) {
            // The agent had its answer and is on its way: it asks for the grant, not for the move.
            process.releases.grant(admission).await.unwrap();
            process.releases.handover(admission).await.unwrap();
        } else {
            agent(&process, admission).await;
        }
        assert_eq!(finished(&process, &test, admission).await.step, ReleaseStep::HandedOver, "crashed at {crash_at}");
        assert!(scripted.world.port_is_open(admission) && scripted.world.export_is_open(admission));
        process.crash().await;
    }
}

#[tokio::test]
async fn a_crash_before_an_effects_answer_repeats_the_effect() {
    let mut test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let process = Process::start(&test, &scripted, quick());
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    moved(&process, release.admission).await;
    // Done there, never written here.
    scripted.world.lose_answers("admit", u32::MAX);
    drop(process.releases.ready(release.admission).await.unwrap());
    scripted.world.called("admit", 1).await;
    process.crash().await;
    test.reopen().await;
    assert_eq!(test.store.release(release.admission).await.unwrap().unwrap().step, ReleaseStep::Ready);
    assert!(scripted.world.port_is_open(release.admission));

    // This time the agent never comes: what was done without being written must be undone as well.
    scripted.world.lose_answers("admit", 0);
    let process = Process::start(&test, &scripted, ReleaseTimeouts { grant_ms: 100, ..quick() });
    process.releases.resume().await.unwrap();
    assert_eq!(finished(&process, &test, release.admission).await.step, ReleaseStep::Unwound);
    assert!(!scripted.world.port_is_open(release.admission) && !scripted.world.export_is_open(release.admission));
}

#[tokio::test]
async fn an_expired_result_is_unwound_after_a_restart() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let long_ago = now_ms() - 24 * 3_600_000;
    let release = admitted(&test.store, "n1", long_ago).await;
    let process = Process::start(&test, &scripted, quick());
    process.releases.resume().await.unwrap();
    let release = finished(&process, &test, release.admission).await;
    assert_eq!(release.step, ReleaseStep::Unwound);
    assert!(release.failure.unwrap().contains("expired"));
    assert_eq!(scripted.world.names(), ["revoke", "unexport"]);
}

#[tokio::test]
async fn a_later_release_of_the_node_waits_until_the_earlier_one_is_undone() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let process = Process::start(&test, &scripted, quick());
    let first = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(first.clone());
    moved(&process, first.admission).await;
    let second = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(second.clone());
    agent(&process, second.admission).await;
    assert_eq!(test.store.release(first.admission).await.unwrap().unwrap().step, ReleaseStep::Unwound);
    assert_eq!(scripted.world.names(), ["export", "revoke", "unexport", "export", "admit"]);
}

#[tokio::test]
async fn an_agent_may_ask_any_of_several_verifiers() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let one = Process::start(&test, &scripted, quick());
    one.releases.resume().await.unwrap();
    let other = Process::beside(&test, "other", &scripted).await;
    let admission = admitted(&test.store, "n1", now_ms()).await.admission;
    one.releases.begin(test.store.release(admission).await.unwrap().unwrap());
    moved(&other, admission).await;
    drop(other.releases.ready(admission).await.unwrap());
    // Lost and asked again, of the one who does not move the port.
    drop(one.releases.ready(admission).await.unwrap());
    assert_eq!(one.releases.grant(admission).await.unwrap().admission, admission);
    moved(&other, admission).await;
    other.releases.handover(admission).await.unwrap();
    one.releases.handover(admission).await.unwrap();
    assert_eq!(test.store.release(admission).await.unwrap().unwrap().step, ReleaseStep::HandedOver);
    assert_eq!(scripted.world.names(), ["export", "admit"]);
}

#[tokio::test]
async fn what_a_dead_verifier_drove_is_finished_by_another() {
    for crash_at in
        [ReleaseStep::Admitted, ReleaseStep::Exported, ReleaseStep::Ready, ReleaseStep::Moved, ReleaseStep::Granted]
    {
        let test = TestStore::open(StoreLimits::default()).await;
        let scripted = ScriptedPeers::start().await;
        let one = Process::start(&test, &scripted, quick());
        one.releases.resume().await.unwrap();
        let other = Process::beside(&test, "other", &scripted).await;
        let admission = admitted(&test.store, "n1", now_ms()).await.admission;
        advance(&one, &test, &scripted, admission, crash_at).await;
        one.crash().await;

        let other_store = &other.releases.shared.store;
        let [dead] = other_store.other_beats().await.unwrap()[..] else { panic!("there are two") };
        assert!(other_store.bury(dead).await.unwrap());
        other_store.adopt_orphans().await.unwrap();
        assert_eq!(other.releases.take_up_owned().await.unwrap(), 1, "crashed at {crash_at}");
        moved(&other, admission).await;
        if matches!(crash_at, ReleaseStep::Admitted | ReleaseStep::Exported) {
            drop(other.releases.ready(admission).await.unwrap());
        }
        other.releases.grant(admission).await.unwrap();
        other.releases.handover(admission).await.unwrap();
        assert_eq!(finished(&other, &test, admission).await.step, ReleaseStep::HandedOver, "crashed at {crash_at}");
        assert!(!test.store.beat().await.unwrap(), "who was buried must know it");
    }
}

#[tokio::test]
async fn a_node_accepted_by_another_verifier_has_its_earlier_release_undone_there() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let one = Process::start(&test, &scripted, quick());
    one.releases.resume().await.unwrap();
    let other = Process::beside(&test, "other", &scripted).await;
    let first = admitted(&test.store, "n1", now_ms()).await;
    one.releases.begin(first.clone());
    moved(&one, first.admission).await;
    let second = admitted(&other.releases.shared.store, "n1", now_ms()).await;
    other.releases.begin(second.clone());
    agent(&other, second.admission).await;
    assert_eq!(test.store.release(first.admission).await.unwrap().unwrap().step, ReleaseStep::Unwound);
    assert_eq!(scripted.world.names(), ["export", "revoke", "unexport", "export", "admit"]);
    let refused = one.releases.ready(first.admission).await.unwrap_err();
    assert!(matches!(refused, CallError::Undone { .. }), "{refused}");
}

#[tokio::test]
async fn d4_a_revocation_is_recorded_only_after_the_fence_answered_also_across_restarts() {
    let mut test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    scripted.world.fail("admit", [ApiError::conflict("other-boot", "the node was reset")]);
    // The switch is not to be had for longer than this process lives.
    scripted.world.fail("revoke", std::iter::repeat_n(ApiError::unavailable("switch", "no answer"), 4));
    let process = Process::start(&test, &scripted, quick());
    let admission = admitted(&test.store, "n1", now_ms()).await.admission;
    process.releases.begin(test.store.release(admission).await.unwrap().unwrap());
    moved(&process, admission).await;
    drop(process.releases.ready(admission).await.unwrap());
    scripted.world.called("revoke", 2).await;
    process.crash().await;
    assert_eq!(test.store.release(admission).await.unwrap().unwrap().step, ReleaseStep::Unwinding);

    test.reopen().await;
    let process = Process::start(&test, &scripted, quick());
    process.releases.resume().await.unwrap();
    assert_eq!(finished(&process, &test, admission).await.step, ReleaseStep::Unwound);
    let calls = scripted.world.names();
    assert_eq!(calls[calls.len() - 2..], ["revoke", "unexport"], "{calls:?}");
    assert_eq!(calls.iter().filter(|name| **name == "unexport").count(), 1, "the fence comes first: {calls:?}");
}

#[tokio::test]
async fn d4_a_database_from_before_the_revocation_brings_no_port_back() {
    // A SQLite file can be put back by copying it; that the peers remember is what counts, on any database.
    let folder = tempfile::tempdir().unwrap();
    let (file, backup) = (folder.path().join("verifier.db"), folder.path().join("backup.db"));
    let url = format!("sqlite:{}", file.display());
    let store = || async { crate::store::VerifierStore::open(&url, StoreLimits::default()).await.unwrap() };
    let scripted = ScriptedPeers::start().await;
    let begun = store().await;
    let release = admitted(&begun, "n1", now_ms()).await;
    begun.close().await;
    std::fs::copy(&file, &backup).unwrap();

    let start = |store: &crate::store::VerifierStore| {
        let (clock, shutdown) = (Arc::new(SystemClock), CancellationToken::new());
        let releases = Releases::new(store.clone(), scripted.peers.clone(), clock, quick(), shutdown.clone());
        Process { releases, shutdown }
    };
    let current = store().await;
    let process = start(&current);
    process.releases.resume().await.unwrap();
    moved(&process, release.admission).await;
    process.crash().await;
    current.close().await;
    scripted.peers.revoke(release.admission, "a bad verdict").await.unwrap();
    scripted.peers.unexport(release.admission).await.unwrap();
    std::fs::copy(&backup, &file).unwrap();

    let process = start(&store().await);
    process.releases.resume().await.unwrap();
    let releases = &process.releases;
    let status = releases.status(release.admission, PATIENCE).await.unwrap();
    assert!(matches!(&status, ReleaseStatus::Aborted { reason } if reason.contains("ended")), "{status:?}");
    assert!(!scripted.world.port_is_open(release.admission) && !scripted.world.export_is_open(release.admission));
}

/// A clock on which reading panics once, when told to: an exception in the middle of a driver.
#[derive(Default)]
struct FaultyClock {
    faulty: AtomicBool,
    fell: AtomicBool,
}

impl Clock for FaultyClock {
    fn now_ms(&self) -> i64 {
        if self.faulty.swap(false, Ordering::SeqCst) {
            self.fell.store(true, Ordering::SeqCst);
            panic!("as a bug would");
        }
        SystemClock.now_ms()
    }
}

#[tokio::test]
async fn d3_a_driver_that_panics_leaves_nothing_open() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let (clock, shutdown) = (Arc::new(FaultyClock::default()), CancellationToken::new());
    let timeouts = ReleaseTimeouts { grant_ms: 500, ..quick() };
    let store = test.store.clone();
    let releases = Releases::new(store, scripted.peers.clone(), clock.clone(), timeouts, shutdown.clone());
    let process = Process { releases, shutdown };
    process.releases.resume().await.unwrap();
    let admission = admitted(&test.store, "n1", now_ms()).await.admission;
    process.releases.begin(test.store.release(admission).await.unwrap().unwrap());
    moved(&process, admission).await;
    drop(process.releases.ready(admission).await.unwrap());
    scripted.world.called("admit", 1).await;
    // The port is open, the agent silent, and whoever has to notice it falls over.
    clock.faulty.store(true, Ordering::SeqCst);
    process.releases.start_membership();
    let undone = async {
        while test.store.release(admission).await.unwrap().unwrap().step != ReleaseStep::Unwound {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, undone).await.expect("the release was left as it was");
    assert!(clock.fell.load(Ordering::SeqCst), "nothing fell over");
    assert!(!scripted.world.port_is_open(admission) && !scripted.world.export_is_open(admission));
    process.crash().await;
}

#[tokio::test]
async fn d3_a_journal_that_cannot_be_written_ends_in_nothing_open() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    let process = Process::start(&test, &scripted, ReleaseTimeouts { agent_ready_ms: 700, ..quick() });
    let release = admitted(&test.store, "n1", now_ms()).await;
    process.releases.begin(release.clone());
    moved(&process, release.admission).await;
    test.store.refuse_writes(true).await;
    let refused = process.releases.ready(release.admission).await.unwrap_err();
    assert!(matches!(refused, CallError::Busy), "{refused}");
    tokio::time::sleep(Duration::from_millis(800)).await;
    test.store.refuse_writes(false).await;
    assert_eq!(finished(&process, &test, release.admission).await.step, ReleaseStep::Unwound);
    assert_eq!(scripted.world.names(), ["export", "revoke", "unexport"]);
}

#[tokio::test]
async fn bad_verdicts_are_reported_until_isolation_has_heard() {
    let test = TestStore::open(StoreLimits::default()).await;
    let scripted = ScriptedPeers::start().await;
    scripted.world.fail("reject", [ApiError::unavailable("?", "not now"), ApiError::unauthorized("who are you?")]);
    let reasons = ["PCR 4 is wrong".to_owned()];
    let enrolled = enrolled(&test.store, "n1", now_ms()).await;
    test.store.record_verdict(&verdict(&enrolled, Outcome::Rejected(&reasons), 1)).await.unwrap();
    // It is left over from before a restart: nobody wakes the reporter.
    let process = Process::start(&test, &scripted, quick());
    process.releases.start_reports(Reports::default());
    scripted.world.called("reject", 3).await;
    let told = async {
        while !test.store.unreported_rejections().await.unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
    process.crash().await;
}

/// Brings the release to `step` and no further.
async fn advance(
    process: &Process,
    test: &TestStore,
    scripted: &ScriptedPeers,
    admission: AdmissionId,
    step: ReleaseStep,
) {
    if step == ReleaseStep::Admitted {
        scripted.world.lose_answers("export", 1);
    }
    process.releases.begin(test.store.release(admission).await.unwrap().unwrap());
    if step == ReleaseStep::Admitted {
        return scripted.world.called("export", 1).await;
    }
    moved(process, admission).await;
    if step == ReleaseStep::Exported {
        return;
    }
    if step == ReleaseStep::Ready {
        scripted.world.fail("admit", [ApiError::unavailable("switch", "no answer")]);
        drop(process.releases.ready(admission).await.unwrap());
        return scripted.world.called("admit", 1).await;
    }
    drop(process.releases.ready(admission).await.unwrap());
    if step == ReleaseStep::Moved {
        let progress = process.releases.running()[&admission].progress.clone();
        drop(progress.clone().wait_for(|progress| progress.step == ReleaseStep::Moved).await.unwrap());
        return;
    }
    process.releases.grant(admission).await.unwrap();
}
