//! The release: from a good verdict to the hand-over (steps 6 to 9 of the boot path), as one journaled, idempotent,
//! resumable transaction. [`journal`] decides, [`driver`] does, [`peers`] are those whom it is done with, and
//! [`Releases`] is how the rest of the verifier reaches the release of an admission.
//!
//! Several verifiers may share one database. Each release is driven by one of them, which alone can write its journal;
//! [`membership`] finds the dead and takes over what they drove. An agent may ask any of them: [`elsewhere`] has what
//! the one does that is asked about a release that another drives.

pub mod driver;
mod elsewhere;
mod follow;
pub mod journal;
mod membership;
pub mod peers;
pub mod reports;

use crate::store::releases::Release;
use crate::store::verifiers::Owner;
use crate::store::{DbError, VerifierStore};
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_wire::agent::{ReleaseStatus, SealedGrant};
use assay_wire::id::AdmissionId;
use driver::{AnswerLeaving, Driver};
use elsewhere::Elsewhere;
use journal::{Reason, ReleaseEvent, ReleaseStep, ReleaseTimeouts};
use peers::Peers;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::TaskTracker;

/// All releases under way in this process, one driver task each.
#[derive(Clone)]
pub struct Releases {
    shared: Arc<Shared>,
}

/// What every driver needs.
pub(crate) struct Shared {
    pub(crate) store: VerifierStore,
    pub(crate) peers: Peers,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) timeouts: ReleaseTimeouts,
    pub(crate) shutdown: CancellationToken,
    running: Mutex<HashMap<AdmissionId, Running>>,
    tasks: TaskTracker,
    /// Set when another process has this one's name, or the others took it for dead.
    replaced: AtomicBool,
}

struct Running {
    calls: mpsc::Sender<AgentCall>,
    progress: watch::Receiver<Progress>,
}

/// Which other releases of a node a release comes after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Earlier {
    /// All that are unfinished: this one has just begun.
    All,
    /// Those that began before it.
    Older,
}

/// What an agent, or a later release of the same node, asks of a driver.
pub(crate) enum AgentCall {
    /// The agent lets go of the airlock.
    Ready(oneshot::Sender<Result<AnswerLeaving, CallError>>),
    /// The agent wants its grant.
    Grant(oneshot::Sender<Result<SealedGrant, CallError>>),
    /// The agent hands over.
    Handover(oneshot::Sender<Result<(), CallError>>),
    /// It cannot be completed any more: the node was accepted anew, or isolation has ended the admission.
    GiveUp(Reason),
}

/// How far a release has come, for those who wait for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The step written last.
    pub step: ReleaseStep,
    /// What the agent is told.
    pub status: Status,
}

/// [`ReleaseStatus`], comparable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Still being prepared.
    Pending,
    /// Ready for the node to move.
    Move(assay_wire::agent::TenantAddress),
    /// Undone, and why.
    Aborted(String),
}

/// Why a release does not do what its agent asks.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Not at this step.
    #[error("the release is {step}: it is too early to {asked}")]
    TooEarly {
        /// Where it stands.
        step: ReleaseStep,
        /// What was asked.
        asked: &'static str,
    },
    /// Never again.
    #[error("the release was undone: {reason}")]
    Undone {
        /// Why.
        reason: String,
    },
    /// It is complete.
    #[error("the release is complete: the node was handed over")]
    Complete,
    /// There is no such release.
    #[error("there is no such release")]
    Unknown,
    /// What had to happen first did not happen yet.
    #[error("the release is still busy: ask again")]
    Busy,
    /// The journal cannot be written or read. Nothing was done.
    #[error("the release journal is not available")]
    Journal(#[source] DbError),
}

/// How long a call of an agent waits for its driver; shorter than the HTTP server's own limit.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

impl Releases {
    /// Drives releases with these parts.
    #[must_use]
    pub fn new(
        store: VerifierStore,
        peers: Peers,
        clock: Arc<dyn Clock>,
        timeouts: ReleaseTimeouts,
        shutdown: CancellationToken,
    ) -> Self {
        let (running, tasks, replaced) = (Mutex::default(), TaskTracker::new(), AtomicBool::new(false));
        Self { shared: Arc::new(Shared { store, peers, clock, timeouts, shutdown, running, tasks, replaced }) }
    }

    /// Enters this process among the verifiers of its database, and takes up every unfinished release that is its own:
    /// its predecessor's of the same name, and those that nobody drives. Call before agents can.
    ///
    /// # Errors
    /// The journal cannot be read; nothing was taken up.
    pub async fn resume(&self) -> Result<usize, DbError> {
        self.shared.store.join(self.shared.clock.now_ms()).await?;
        self.take_up_owned().await
    }

    /// Takes up what is this process's and not under way yet.
    async fn take_up_owned(&self) -> Result<usize, DbError> {
        let mut count = 0;
        for admission in self.shared.store.owned_releases().await? {
            if self.running().contains_key(&admission) {
                continue;
            }
            let Some(release) = self.shared.store.release(admission).await? else { continue };
            tracing::info!(
                event = "release.resumed",
                node = %release.node,
                admission = %release.admission,
                release_step = %release.step,
                "taking up a release"
            );
            self.start(release, Earlier::Older);
            count += 1;
        }
        Ok(count)
    }

    /// Drives `release`, whose first entry is in the journal. Earlier releases of its node are undone first.
    pub fn begin(&self, release: Release) {
        self.start(release, Earlier::All);
    }

    fn start(&self, release: Release, earlier: Earlier) {
        let (calls, mailbox) = mpsc::channel(CALLS_QUEUED);
        let (publish, progress) = watch::channel(driver::progress(&release));
        let admission = release.admission;
        match self.running().entry(admission) {
            // The round that takes up what is ours may come between a new entry and its beginning.
            Entry::Occupied(_) => return,
            Entry::Vacant(vacant) => vacant.insert(Running { calls, progress }),
        };
        let (releases, entry) = (self.clone(), RunningEntry { shared: Arc::clone(&self.shared), admission });
        self.shared.tasks.spawn(async move {
            let _gone_with_the_driver = entry;
            if let Some(predecessors) = releases.supersede(&release, earlier).await {
                let shared = Arc::clone(&releases.shared);
                Driver::new(shared, release, mailbox, publish, predecessors).run().await;
            }
        });
    }

    /// Has the other releases of the node undone, here: what another process drives of them is taken over. None at
    /// shutdown.
    async fn supersede(&self, release: &Release, earlier: Earlier) -> Option<Vec<watch::Receiver<Progress>>> {
        loop {
            match self.try_supersede(release, earlier).await {
                Ok(predecessors) => return Some(predecessors),
                Err(error) => {
                    tracing::error!(event = "release.journal_failed", cause = chain(&error), node = %release.node,
                        "cannot read whether earlier releases of the node are open");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(driver::JOURNAL_BACKOFF) => {}
                () = self.shared.shutdown.cancelled() => return None,
            }
        }
    }

    async fn try_supersede(
        &self,
        release: &Release,
        earlier: Earlier,
    ) -> Result<Vec<watch::Receiver<Progress>>, DbError> {
        let mut others = self.shared.store.unfinished_of_node(&release.node).await?;
        if earlier == Earlier::Older {
            let own = others.iter().position(|(admission, _)| *admission == release.admission);
            others.truncate(own.unwrap_or(0));
        }
        let mut predecessors = Vec::new();
        for (admission, owner) in others.into_iter().filter(|(admission, _)| *admission != release.admission) {
            if !self.running().contains_key(&admission) {
                self.take_over(admission, owner).await?;
            }
            if let Some(predecessor) = self.running().get(&admission) {
                // A full mailbox has a driver that is awake; it will see the deadline of its step instead.
                let _superseded = predecessor.calls.try_send(AgentCall::GiveUp(Reason::Superseded));
                predecessors.push(predecessor.progress.clone());
            }
        }
        Ok(predecessors)
    }

    /// Takes an unfinished release from its owner and drives it here. Whoever drove it finds the journal closed to it.
    async fn take_over(&self, admission: AdmissionId, owner: Owner) -> Result<(), DbError> {
        if self.shared.store.claim(admission, owner).await?
            && let Some(release) = self.shared.store.release(admission).await?
            && !release.step.is_finished()
        {
            tracing::info!(event = "release.taken_over", node = %release.node, admission = %admission,
                release_step = %release.step, "this process drives the release from now on");
            self.start(release, Earlier::Older);
        }
        Ok(())
    }

    /// Keeps this process on record as alive, and takes over what dead ones drove, from now on.
    pub fn start_membership(&self) {
        self.spawn_vital("membership", membership::run(self.clone()));
    }

    /// Whether this process had to stop because the others no longer count on it.
    #[must_use]
    pub fn was_replaced(&self) -> bool {
        self.shared.replaced.load(Ordering::SeqCst)
    }

    /// Reports bad verdicts from now on, the ones left over from before a restart first.
    pub fn start_reports(&self, reports: reports::Reports) {
        self.spawn_vital("reports", reports.run(Arc::clone(&self.shared)));
    }

    /// Acts upon what isolation ends, from now on.
    pub fn start_following(&self, endings: crate::attestation::endings::Endings) {
        self.spawn_vital("following", follow::run(Arc::clone(&self.shared), endings));
    }

    /// Cancelled when the process shall end.
    pub(crate) fn shutdown(&self) -> &CancellationToken {
        &self.shared.shutdown
    }

    /// The tasks that [`Releases::stopped`] waits for.
    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.shared.tasks
    }

    /// Waits until every driver has stopped, after shutdown; then another verifier may take up what is unfinished.
    pub async fn stopped(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        if let Err(error) = self.shared.store.leave().await {
            tracing::warn!(
                event = "verifier.not_left",
                cause = chain(&error),
                "other verifiers will find out by themselves"
            );
        }
    }

    /// What the agent is told of its release; waits up to `patience` for more than "pending".
    ///
    /// # Errors
    /// No such release, or the journal cannot be read.
    pub async fn status(&self, admission: AdmissionId, patience: Duration) -> Result<ReleaseStatus, CallError> {
        let decided = async {
            loop {
                let progress = self.running().get(&admission).map(|running| running.progress.clone());
                if let Some(mut progress) = progress
                    && let Ok(progress) = progress.wait_for(|progress| progress.status != Status::Pending).await
                {
                    return Ok(progress.status.clone());
                }
                // Driven by another process, or its driver has stopped without a decision: the journal has the word.
                let status = driver::progress(&self.journaled(admission).await?).status;
                if status != Status::Pending {
                    return Ok(status);
                }
                tokio::time::sleep(elsewhere::LOOK_AGAIN).await;
            }
        };
        match tokio::time::timeout(patience, decided).await {
            Ok(status) => status.map(ReleaseStatus::from),
            Err(_elapsed) => Ok(ReleaseStatus::Pending),
        }
    }

    /// The agent lets go of the airlock. The port is moved once the returned token is dropped.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn ready(&self, admission: AdmissionId) -> Result<AnswerLeaving, CallError> {
        let answered = Some(AnswerLeaving::repeated as fn() -> _);
        self.call(admission, AgentCall::Ready, ReleaseEvent::AgentReady, answered).await
    }

    /// The sealed grant, once the port was moved; waits for it while it is being moved.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn grant(&self, admission: AdmissionId) -> Result<SealedGrant, CallError> {
        self.call(admission, AgentCall::Grant, ReleaseEvent::GrantFetched, None).await
    }

    /// The agent hands over.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn handover(&self, admission: AdmissionId) -> Result<(), CallError> {
        match self.call(admission, AgentCall::Handover, ReleaseEvent::AgentHandedOver, None).await {
            Err(CallError::Complete) => Ok(()),
            answer => answer,
        }
    }

    /// Has the release's driver answer. A release that waits for its agent is driven where the agent asks: if another
    /// process has it, it is taken over.
    async fn call<T>(
        &self,
        admission: AdmissionId,
        call: fn(oneshot::Sender<Result<T, CallError>>) -> AgentCall,
        event: ReleaseEvent,
        repeated: Option<fn() -> T>,
    ) -> Result<T, CallError> {
        let answered = async {
            loop {
                if let Some(answer) = self.call_here(admission, call).await {
                    return answer;
                }
                let release = self.journaled(admission).await?;
                match (elsewhere::decide(release.step, event), repeated) {
                    (Elsewhere::Refuse, _) => return Err(driver::refusal(&release, event.asked())),
                    (Elsewhere::Repeat, Some(repeated)) => return Ok(repeated()),
                    (Elsewhere::TakeOver, _) => {
                        let owner = self.shared.store.owner(admission).await.map_err(CallError::Journal)?;
                        self.take_over(admission, owner).await.map_err(CallError::Journal)?;
                    }
                    (Elsewhere::Wait, _) | (Elsewhere::Repeat, None) => {
                        tokio::time::sleep(elsewhere::LOOK_AGAIN).await;
                    }
                }
            }
        };
        tokio::time::timeout(CALL_TIMEOUT, answered).await.unwrap_or(Err(CallError::Busy))
    }

    /// None if no driver here has an answer.
    async fn call_here<T>(
        &self,
        admission: AdmissionId,
        call: fn(oneshot::Sender<Result<T, CallError>>) -> AgentCall,
    ) -> Option<Result<T, CallError>> {
        let calls = self.running().get(&admission).map(|running| running.calls.clone())?;
        let (reply, answer) = oneshot::channel();
        if calls.try_send(call(reply)).is_ok() {
            // No answer: the driver finished meanwhile, or another process has the release. The journal knows.
            answer.await.ok()
        } else if calls.is_closed() {
            tokio::task::yield_now().await;
            None
        } else {
            Some(Err(CallError::Busy))
        }
    }

    async fn journaled(&self, admission: AdmissionId) -> Result<Release, CallError> {
        self.shared.store.release(admission).await.map_err(CallError::Journal)?.ok_or(CallError::Unknown)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<AdmissionId, Running>> {
        self.shared.running()
    }

    /// Spawns what must not end before the process does: if it panics, the process is shut down, so that its supervisor
    /// starts it anew. A loop that has stopped while everything looks well is worse than no verifier.
    fn spawn_vital(&self, name: &'static str, vital: impl Future<Output = ()> + Send + 'static) {
        let shutdown = self.shared.shutdown.clone();
        self.shared.tasks.spawn(async move {
            if let Err(panicked) = tokio::spawn(vital).await {
                tracing::error!(event = "verifier.task_died", name, %panicked, "shutting down");
                shutdown.cancel();
            }
        });
    }
}

impl Shared {
    /// Has the release of `admission` undone, if it is driven here and not complete.
    fn give_up(&self, admission: AdmissionId, reason: Reason) {
        if let Some(running) = self.running().get(&admission) {
            // A full mailbox has a driver that is awake; it will see the deadline of its step instead.
            let _given_up = running.calls.try_send(AgentCall::GiveUp(reason));
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<AdmissionId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A driver's entry among those under way. It goes with the driver, however that ends: one that panicked is taken up
/// again from the journal.
struct RunningEntry {
    shared: Arc<Shared>,
    admission: AdmissionId,
}

impl Drop for RunningEntry {
    fn drop(&mut self) {
        self.shared.running().remove(&self.admission);
    }
}

impl From<Status> for ReleaseStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::Pending => Self::Pending,
            Status::Move(address) => Self::Move(address),
            Status::Aborted(reason) => Self::Aborted { reason },
        }
    }
}

/// Calls that wait for one driver; an agent has no reason for more than one.
const CALLS_QUEUED: usize = 8;

/// Dies here if a crash test asked for it (feature `failpoints`).
pub(crate) fn crash_point(name: &str) {
    let _only_with_failpoints = name;
    fail::fail_point!(name, |_| std::process::abort());
}

/// Never goes on from here if a crash test asked for it: so that one of several things that are done side by side is not
/// done when the process dies of another.
pub(crate) async fn hold_point(name: &str) {
    let _only_with_failpoints = name;
    let held = || {
        fail::fail_point!(name, |_| true);
        false
    };
    if held() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests;
