//! The release: from a good verdict to the hand-over (steps 6 to 9 of the boot path), as one journaled, idempotent,
//! resumable transaction. [`journal`] decides, [`driver`] does, [`peers`] are those whom it is done with, and
//! [`Releases`] is how the rest of the verifier reaches the release of an admission.

pub mod driver;
mod follow;
pub mod journal;
pub mod peers;
pub mod reports;

use crate::store::releases::Release;
use crate::store::{DbError, VerifierStore};
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_wire::agent::{ReleaseStatus, SealedGrant};
use assay_wire::id::{AdmissionId, NodeId};
use driver::{AnswerLeaving, Driver};
use journal::{ReleaseStep, ReleaseTimeouts};
use peers::Peers;
use std::collections::HashMap;
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
}

struct Running {
    node: NodeId,
    calls: mpsc::Sender<AgentCall>,
    progress: watch::Receiver<Progress>,
}

/// What an agent, or a later release of the same node, asks of a driver.
pub(crate) enum AgentCall {
    /// The agent lets go of the airlock.
    Ready(oneshot::Sender<Result<AnswerLeaving, CallError>>),
    /// The agent wants its grant.
    Grant(oneshot::Sender<Result<SealedGrant, CallError>>),
    /// The agent hands over.
    Handover(oneshot::Sender<Result<(), CallError>>),
    /// The node was accepted anew.
    Supersede,
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
        let (running, tasks) = (Mutex::default(), TaskTracker::new());
        Self { shared: Arc::new(Shared { store, peers, clock, timeouts, shutdown, running, tasks }) }
    }

    /// Takes up every release that the journal shows unfinished. Call before agents can.
    ///
    /// # Errors
    /// The journal cannot be read; nothing was taken up.
    pub async fn resume(&self) -> Result<usize, DbError> {
        let unfinished = self.shared.store.unfinished_releases().await?;
        let count = unfinished.len();
        for release in unfinished {
            tracing::info!(
                event = "release.resumed",
                node = %release.node,
                admission = %release.admission,
                release_step = %release.step,
                "taking up a release"
            );
            self.begin(release);
        }
        Ok(count)
    }

    /// Drives `release`, whose first entry is in the journal. Earlier releases of its node are undone first.
    pub fn begin(&self, release: Release) {
        let (calls, mailbox) = mpsc::channel(CALLS_QUEUED);
        let (publish, progress) = watch::channel(driver::progress(&release));
        let mut running = self.running();
        let mut predecessors = Vec::new();
        for earlier in running.values().filter(|earlier| earlier.node == release.node) {
            // A full mailbox has a driver that is awake; it will see the deadline of its step instead.
            let _superseded = earlier.calls.try_send(AgentCall::Supersede);
            predecessors.push(earlier.progress.clone());
        }
        let admission = release.admission;
        running.insert(admission, Running { node: release.node.clone(), calls, progress });
        drop(running);
        let driver = Driver::new(Arc::clone(&self.shared), release, mailbox, publish, predecessors);
        let releases = self.clone();
        self.shared.tasks.spawn(async move {
            driver.run().await;
            releases.running().remove(&admission);
        });
    }

    /// Reports bad verdicts from now on, the ones left over from before a restart first.
    pub fn start_reports(&self, reports: reports::Reports) {
        self.shared.tasks.spawn(reports.run(Arc::clone(&self.shared)));
    }

    /// Closes the exports of admissions that isolation ends, from now on.
    pub fn start_following(&self) {
        self.shared.tasks.spawn(follow::run(Arc::clone(&self.shared)));
    }

    /// Waits until every driver has stopped, after shutdown.
    pub async fn stopped(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    /// What the agent is told of its release; waits up to `patience` for more than "pending".
    ///
    /// # Errors
    /// No such release, or the journal cannot be read.
    pub async fn status(&self, admission: AdmissionId, patience: Duration) -> Result<ReleaseStatus, CallError> {
        let progress = self.running().get(&admission).map(|running| running.progress.clone());
        if let Some(mut progress) = progress {
            let decided = progress.wait_for(|progress| progress.status != Status::Pending);
            match tokio::time::timeout(patience, decided).await {
                Ok(Ok(progress)) => return Ok(progress.status.clone().into()),
                Err(_elapsed) => return Ok(ReleaseStatus::Pending),
                // The driver has stopped without a decision: the journal has the last word.
                Ok(Err(_)) => {}
            }
        }
        let release = self.journaled(admission).await?;
        Ok(driver::progress(&release).status.into())
    }

    /// The agent lets go of the airlock. The port is moved once the returned token is dropped.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn ready(&self, admission: AdmissionId) -> Result<AnswerLeaving, CallError> {
        self.call(admission, AgentCall::Ready, "say `ready`").await
    }

    /// The sealed grant, once the port was moved; waits for it while it is being moved.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn grant(&self, admission: AdmissionId) -> Result<SealedGrant, CallError> {
        self.call(admission, AgentCall::Grant, "fetch the grant").await
    }

    /// The agent hands over.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn handover(&self, admission: AdmissionId) -> Result<(), CallError> {
        match self.call(admission, AgentCall::Handover, "hand over").await {
            Err(CallError::Complete) => Ok(()),
            answer => answer,
        }
    }

    async fn call<T>(
        &self,
        admission: AdmissionId,
        call: impl FnOnce(oneshot::Sender<Result<T, CallError>>) -> AgentCall,
        asked: &'static str,
    ) -> Result<T, CallError> {
        let calls = self.running().get(&admission).map(|running| running.calls.clone());
        if let Some(calls) = calls {
            let (reply, answer) = oneshot::channel();
            if calls.try_send(call(reply)).is_ok() {
                match tokio::time::timeout(CALL_TIMEOUT, answer).await {
                    Ok(Ok(answer)) => return answer,
                    Err(_elapsed) => return Err(CallError::Busy),
                    // The driver finished meanwhile: the journal has the answer.
                    Ok(Err(_)) => {}
                }
            } else if !calls.is_closed() {
                return Err(CallError::Busy);
            }
        }
        Err(driver::refusal(&self.journaled(admission).await?, asked))
    }

    async fn journaled(&self, admission: AdmissionId) -> Result<Release, CallError> {
        self.shared.store.release(admission).await.map_err(CallError::Journal)?.ok_or(CallError::Unknown)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<AdmissionId, Running>> {
        self.shared.running.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests;
