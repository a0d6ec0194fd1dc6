//! Recording pushes: what comes while one commit is under way goes into the next, so that a thousand pushes a second
//! are a few dozen transactions.

use crate::release::crash_point;
use crate::store::VerifierStore;
use crate::store::attestations::PushRecord;
use assay_service::CancellationToken;
use assay_service::error::chain;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

/// The one writer of pushes.
#[derive(Debug, Clone)]
pub struct Pushes(mpsc::Sender<Queued>);

#[derive(Debug)]
struct Queued {
    record: PushRecord,
    recorded: oneshot::Sender<Recorded>,
}

/// What became of a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// It counts.
    Yes,
    /// The admission has ended, or another verifier has moved it on: what this one knows of it is old.
    Superseded,
    /// The database failed, or too many wait for it. Nothing counts.
    No,
}

impl Pushes {
    /// Starts the writer.
    pub(crate) fn start(store: VerifierStore, shutdown: CancellationToken, tasks: &TaskTracker) -> Self {
        let (queue, queued) = mpsc::channel(MOST_QUEUED);
        tasks.spawn(run(store, queued, shutdown));
        Self(queue)
    }

    /// Records one push; answers when it is in the database.
    pub async fn record(&self, record: PushRecord) -> Recorded {
        let (recorded, answer) = oneshot::channel();
        if self.0.try_send(Queued { record, recorded }).is_err() {
            return Recorded::No;
        }
        answer.await.unwrap_or(Recorded::No)
    }
}

async fn run(store: VerifierStore, mut queued: mpsc::Receiver<Queued>, shutdown: CancellationToken) {
    let mut batch = Vec::new();
    loop {
        let count = tokio::select! {
            count = queued.recv_many(&mut batch, MOST_BATCHED) => count,
            () = shutdown.cancelled() => return,
        };
        if count == 0 {
            return;
        }
        let (records, waiting): (Vec<_>, Vec<_>) = batch.drain(..).map(|q: Queued| (q.record, q.recorded)).unzip();
        crash_point("attestation::before-push");
        let counted = store.record_pushes(&records).await;
        crash_point("attestation::push-recorded");
        if let Err(error) = &counted {
            tracing::error!(
                event = "attestation.record_failed",
                pushes = count,
                cause = chain(error),
                "nothing is renewed"
            );
        }
        for (record, waiter) in records.iter().zip(waiting) {
            let recorded = match &counted {
                Ok(counted) if counted.contains(&record.admission) => Recorded::Yes,
                Ok(_) => Recorded::Superseded,
                Err(_) => Recorded::No,
            };
            let _nobody_waits = waiter.send(recorded);
        }
    }
}

/// Pushes that may wait; beyond them an agent is told to come again.
const MOST_QUEUED: usize = 4_096;
/// Rows in one statement; nine values each.
const MOST_BATCHED: usize = 256;
