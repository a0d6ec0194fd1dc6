//! Cutting a node off: isolation closes the port and imaging severs the disk, at once and both at the same time; the
//! record is written beside it, never before it, so that a database which does not answer keeps no door open. Each of
//! the three is tried until it is done. What was written and not finished is taken up by the next verifier.
//!
//! A verifier that only supports an admission ends its own attestation, and reports bad evidence to isolation.

use super::register::Register;
use super::renewals::Renewals;
use crate::release::peers::{EffectError, Peers};
use crate::release::{crash_point, hold_point};
use crate::store::VerifierStore;
use crate::store::attestations::{Ending, FallsTo};
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_wire::id::AdmissionId;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
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
    renewals: Renewals,
    /// Why.
    under_way: Mutex<HashMap<AdmissionId, Vec<String>>>,
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
        renewals: Renewals,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        let under_way = Mutex::default();
        Self(Arc::new(Shared { store, peers, clock, register, renewals, under_way, shutdown, tasks }))
    }

    /// Begins to end an admission; from here on nothing of this process renews it. Returns at once.
    pub fn begin(&self, ending: Ending) {
        self.start(ending, Duration::ZERO);
    }

    /// The same for an admission that isolation has ended. It may have done so because another verifier of this database
    /// asked for it, which then is about to write down why: nothing waits for that but the record, and that not for long.
    pub fn follow(&self, ending: Ending) {
        self.start(ending, LEFT_TO_ANOTHER);
    }

    fn start(&self, ending: Ending, record_after: Duration) {
        let shared = Arc::clone(&self.0);
        match shared.under_way().entry(ending.admission) {
            Entry::Occupied(_) => return,
            Entry::Vacant(vacant) => {
                vacant.insert(ending.reasons.clone());
            }
        }
        // After that, since whoever reads a record that still says that the admission stands first puts it into the
        // register, and then looks at what is under way.
        shared.register.end(ending.admission, &ending.reasons);
        shared.renewals.drop_of(ending.admission);
        tracing::warn!(
            event = "admission.ending",
            node = %ending.node,
            admission = %ending.admission,
            reasons = ?ending.reasons,
            "cutting a node off"
        );
        self.0.tasks.spawn(async move {
            tokio::select! {
                () = shared.end(&ending, record_after) => {}
                // What is not done is on record, or expires.
                () = shared.shutdown.cancelled() => {}
            }
            shared.under_way().remove(&ending.admission);
        });
    }

    /// Why an admission is being ended by this process, whatever the record says yet.
    #[must_use]
    pub fn under_way(&self, admission: AdmissionId) -> Option<Vec<String>> {
        self.0.under_way().get(&admission).cloned()
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
    async fn end(&self, ending: &Ending, record_after: Duration) {
        crash_point("attestation::before-fence");
        let reason = ending.reason();
        let acted_upon = async {
            match ending.falls_to() {
                FallsTo::IsolationAndImaging => self.cut_off(ending, &reason).await,
                FallsTo::Isolation => {
                    self.until_done(ending, "reporting bad evidence", || self.report(ending, &reason)).await;
                }
                FallsTo::Nobody => {}
            }
        };
        let written = async {
            hold_point("attestation::hold-record").await;
            tokio::time::sleep(record_after).await;
            let record = || self.store.begin_ending(ending, self.clock.now_ms());
            self.until_done(ending, "recording the end", || async { record().await.map(|_is_new| ()) }).await;
            crash_point("attestation::recorded");
        };
        tokio::join!(acted_upon, written);
        crash_point("attestation::fenced");
        self.until_done(ending, "recording that it is done", || self.store.finish_ending(ending.admission)).await;
        crash_point("attestation::ended");
        tracing::info!(event = "admission.ended", node = %ending.node, admission = %ending.admission, "a node is cut off");
    }

    /// Closes the port and severs the disk.
    async fn cut_off(&self, ending: &Ending, reason: &str) {
        let fenced = async {
            hold_point("attestation::hold-fence").await;
            self.until_done(ending, "closing the port", || self.peers.revoke(ending.admission, reason)).await;
            crash_point("attestation::port-closed");
        };
        let severed = async {
            hold_point("attestation::hold-sever").await;
            self.until_done(ending, "severing the disk", || self.peers.unexport(ending.admission)).await;
            crash_point("attestation::disk-severed");
        };
        tokio::join!(fenced, severed);
    }

    /// Tells isolation of bad evidence. If it refuses to hear it (the lease is over, or the token is no longer the
    /// project's), there is nothing to add: this verifier vouches no more.
    async fn report(&self, ending: &Ending, reason: &str) -> Result<(), EffectError> {
        let Ending { node, boot, admission, .. } = ending;
        let words = format!("the project's verifier: {reason}");
        match self.peers.reject(node, *boot, words).await {
            Err(error) if error.is_final() => {
                tracing::warn!(event = "verdict.report_refused", %node, %admission, cause = chain(&error), "isolation is not told of bad evidence");
                Ok(())
            }
            answer => answer,
        }
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

    fn under_way(&self) -> MutexGuard<'_, HashMap<AdmissionId, Vec<String>>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const LEFT_TO_ANOTHER: Duration = Duration::from_secs(2);
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
