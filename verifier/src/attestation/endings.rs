//! Cutting a node off: isolation closes the port and imaging severs the disk, at once and both at the same time; the
//! record is written beside it, never before it, so that a database which does not answer keeps no door open. Each of
//! the three is tried until it is done. What was written and not finished is taken up by the next verifier.

use super::register::Register;
use crate::release::crash_point;
use crate::release::peers::Peers;
use crate::store::VerifierStore;
use crate::store::attestations::Ending;
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_wire::id::AdmissionId;
use std::collections::HashSet;
use std::error::Error;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_util::task::TaskTracker;

/// Ends admissions.
#[derive(Clone)]
pub struct Endings(Arc<Shared>);

struct Shared {
    store: VerifierStore,
    peers: Peers,
    clock: Arc<dyn Clock>,
    register: Arc<Register>,
    under_way: Mutex<HashSet<AdmissionId>>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl fmt::Debug for Endings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endings").field("under_way", &self.0.under_way().len()).finish()
    }
}

impl Endings {
    pub(crate) fn new(
        store: VerifierStore,
        peers: Peers,
        clock: Arc<dyn Clock>,
        register: Arc<Register>,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        Self(Arc::new(Shared { store, peers, clock, register, under_way: Mutex::default(), shutdown, tasks }))
    }

    /// Begins to end an admission; from here on nothing of this process renews it. Returns at once.
    pub fn begin(&self, ending: Ending) {
        let shared = Arc::clone(&self.0);
        shared.register.end(ending.admission, &ending.reasons);
        if !shared.under_way().insert(ending.admission) {
            return;
        }
        tracing::warn!(
            event = "admission.ending",
            node = %ending.node,
            admission = %ending.admission,
            reasons = ?ending.reasons,
            "cutting a node off"
        );
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = shared.end(&ending) => {}
                // What is not done is on record, or expires.
                () = shared.shutdown.cancelled() => {}
            }
            shared.under_way().remove(&ending.admission);
        });
    }

    /// Takes up what an earlier process, or another verifier that died, has left.
    ///
    /// # Errors
    /// The database failed.
    pub async fn resume(&self) -> Result<(), crate::store::DbError> {
        for ending in self.0.store.endings().await? {
            self.begin(ending);
        }
        Ok(())
    }
}

impl Shared {
    async fn end(&self, ending: &Ending) {
        crash_point("attestation::before-fence");
        let reason = ending.reason();
        let fenced = self.until_done(ending, "closing the port", || self.peers.revoke(ending.admission, &reason));
        let severed = self.until_done(ending, "severing the disk", || self.peers.unexport(ending.admission));
        let written = self.until_done(ending, "recording the end", || async {
            let now_ms = self.clock.now_ms();
            self.store.begin_ending(ending, now_ms).await.map(|_is_new| crash_point("attestation::recorded"))
        });
        tokio::join!(fenced, severed, written);
        crash_point("attestation::fenced");
        self.until_done(ending, "recording that it is done", || self.store.finish_ending(ending.admission)).await;
        tracing::info!(event = "admission.ended", node = %ending.node, admission = %ending.admission, "a node is cut off");
    }

    /// Tries until it is done. Nothing here is ever given up.
    async fn until_done<F, E>(&self, ending: &Ending, doing: &'static str, mut effect: impl FnMut() -> F)
    where
        F: Future<Output = Result<(), E>>,
        E: Error,
    {
        let mut backoff = FIRST_BACKOFF;
        while let Err(error) = effect().await {
            tracing::error!(
                event = "admission.end_failed",
                node = %ending.node,
                admission = %ending.admission,
                doing,
                cause = chain(&error),
                "trying again"
            );
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    }

    fn under_way(&self) -> MutexGuard<'_, HashSet<AdmissionId>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
