//! Passing renewed results on to isolation and imaging, in batches. Each has its own queue, so that one that does not
//! answer holds up only itself; of one admission only the newest result waits, so a queue is never longer than the
//! fleet. What cannot be delivered expires there: nobody has to act for the door to close.

use super::register::Register;
use crate::release::crash_point;
use crate::release::peers::{EffectError, Peers};
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_wire::id::AdmissionId;
use assay_wire::isolation::{MAX_RENEWALS, Renewal, RenewalAnswer, RenewalOutcome, RenewalRequest};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

/// The queues to both.
#[derive(Debug, Clone)]
pub struct Renewals {
    queues: [Arc<Queue>; 2],
}

/// What waits for one of them.
#[derive(Debug)]
struct Queue {
    to: RelyingParty,
    waiting: Mutex<HashMap<AdmissionId, Waiting>>,
    more: Notify,
}

#[derive(Debug, Clone)]
struct Waiting {
    renewal: Renewal,
    expires_at_ms: i64,
}

/// Who acts on results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RelyingParty {
    Isolation,
    Imaging,
}

impl Renewals {
    /// Starts one task a queue.
    pub(crate) fn start(
        peers: &Peers,
        clock: &Arc<dyn Clock>,
        register: &Arc<Register>,
        shutdown: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Self {
        let queues = [RelyingParty::Isolation, RelyingParty::Imaging]
            .map(|to| Arc::new(Queue { to, waiting: Mutex::default(), more: Notify::new() }));
        for queue in &queues {
            let (queue, register) = (Arc::clone(queue), Arc::clone(register));
            tasks.spawn(run(queue, peers.clone(), Arc::clone(clock), register, shutdown.clone()));
        }
        Self { queues }
    }

    /// Passes a renewed result on, with the next batch.
    pub fn pass_on(&self, renewal: &Renewal, expires_at_ms: i64) {
        for queue in &self.queues {
            queue.put(Waiting { renewal: renewal.clone(), expires_at_ms });
            queue.more.notify_one();
        }
    }

    /// Drops what waits for an admission that has ended. Whoever ends one marks it in the register first.
    pub fn drop_of(&self, admission: AdmissionId) {
        for queue in &self.queues {
            queue.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&admission);
        }
    }
}

impl Queue {
    /// Of two results for one admission the one that lives longer waits.
    fn put(&self, new: Waiting) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let known = waiting.entry(new.renewal.admission).or_insert_with(|| new.clone());
        if known.expires_at_ms < new.expires_at_ms {
            *known = new;
        }
    }

    /// The next batch, without what expired while it waited.
    fn take(&self, now_ms: i64) -> Vec<Waiting> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, waiting| waiting.expires_at_ms > now_ms);
        let next: Vec<_> = waiting.keys().copied().take(MAX_RENEWALS).collect();
        next.into_iter().filter_map(|admission| waiting.remove(&admission)).collect()
    }

    fn is_empty(&self) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    fn tell(&self, batch: &[Waiting], answer: &RenewalAnswer) {
        for (waiting, outcome) in batch.iter().zip(&answer.outcomes) {
            match outcome {
                RenewalOutcome::Renewed { .. } => {}
                RenewalOutcome::Refused { reason } => tracing::warn!(
                    event = "renewal.refused",
                    admission = %waiting.renewal.admission,
                    by = ?self.to,
                    reason,
                    "a renewed result was not accepted"
                ),
            }
        }
        if answer.outcomes.len() != batch.len() {
            tracing::error!(event = "renewal.miscounted", by = ?self.to, "not one outcome for each renewal");
        }
    }
}

async fn run(
    queue: Arc<Queue>,
    peers: Peers,
    clock: Arc<dyn Clock>,
    register: Arc<Register>,
    shutdown: CancellationToken,
) {
    let mut failures = 0_u32;
    loop {
        let pause = if failures == 0 { GATHERED_FOR } else { FIRST_BACKOFF * 2_u32.pow(failures.min(MOST_DOUBLINGS)) };
        tokio::select! {
            () = queue.more.notified(), if queue.is_empty() => {}
            () = std::future::ready(()), if !queue.is_empty() => {}
            () = shutdown.cancelled() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => return,
        }
        let batch = queue.take(clock.now_ms());
        if batch.is_empty() {
            continue;
        }
        crash_point("attestation::before-renewal");
        match send(&queue, &peers, &batch).await {
            Ok(answer) => {
                crash_point("attestation::renewed");
                failures = 0;
                queue.tell(&batch, &answer);
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                tracing::warn!(event = "renewal.failed", to = ?queue.to, renewals = batch.len(), cause = chain(&error),
                    "trying again until the results expire");
                // An end that began meanwhile found nothing to drop here.
                for waiting in batch {
                    register.unless_over(waiting.renewal.admission, || queue.put(waiting));
                }
            }
        }
    }
}

async fn send(queue: &Queue, peers: &Peers, batch: &[Waiting]) -> Result<RenewalAnswer, EffectError> {
    let request = RenewalRequest { renewals: batch.iter().map(|waiting| waiting.renewal.clone()).collect() };
    match queue.to {
        RelyingParty::Isolation => peers.renew_admissions(&request).await,
        RelyingParty::Imaging => peers.renew_exports(&request).await,
    }
}

/// How long the first of a batch waits for others.
const GATHERED_FOR: Duration = Duration::from_millis(200);
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// 250 ms doubled four times: at most 4 s between two tries, so that several fit into a result's life.
const MOST_DOUBLINGS: u32 = 4;
