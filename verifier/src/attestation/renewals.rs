//! Passing renewed results on to isolation and imaging, in batches. Each has its own queue, so that one that does not
//! answer holds up only itself; of one admission only the newest result waits, so a queue is never longer than the
//! fleet. A batch has no more octets than a relying party takes: what other verifiers say, and nobody here has read, must
//! not make it refuse other nodes' results. What cannot be delivered expires there: nobody has to act for the door to close.

use super::register::Register;
use crate::release::crash_point;
use crate::release::peers::{EffectError, Peers};
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_wire::id::AdmissionId;
use assay_wire::isolation::{MAX_RENEWAL_BYTES, MAX_RENEWALS, Renewal, RenewalAnswer, RenewalOutcome, RenewalRequest};
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
    renewal: Arc<Renewal>,
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
    pub fn pass_on(&self, renewal: Renewal, expires_at_ms: i64) {
        let renewal = Arc::new(renewal);
        for queue in &self.queues {
            queue.put(Waiting { renewal: Arc::clone(&renewal), expires_at_ms });
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
        let mut octets = BATCH_OVERHEAD_BYTES;
        let mut fits = |waiting: &Waiting| {
            octets += octets_of(&waiting.renewal);
            octets <= MAX_RENEWAL_BYTES
        };
        let next = waiting.iter().take(MAX_RENEWALS).map_while(|(id, waiting)| fits(waiting).then_some(*id));
        let next: Vec<_> = next.collect();
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
    let request = RenewalRequest { renewals: batch.iter().map(|waiting| Renewal::clone(&waiting.renewal)).collect() };
    match queue.to {
        RelyingParty::Isolation => peers.renew_admissions(&request).await,
        RelyingParty::Imaging => peers.renew_exports(&request).await,
    }
}

/// No fewer octets than a renewal has as JSON: results are of characters that JSON leaves as they are.
fn octets_of(renewal: &Renewal) -> usize {
    let Renewal { admission: _, result, supporting } = renewal;
    let texts: usize = std::iter::once(result).chain(supporting).map(|text| text.len() + TEXT_OVERHEAD_BYTES).sum();
    RENEWAL_OVERHEAD_BYTES + texts
}

/// Braces, brackets, and names of fields.
const BATCH_OVERHEAD_BYTES: usize = 64;
const RENEWAL_OVERHEAD_BYTES: usize = 128;
const TEXT_OVERHEAD_BYTES: usize = 8;

/// How long the first of a batch waits for others.
const GATHERED_FOR: Duration = Duration::from_millis(200);
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// 250 ms doubled four times: at most 4 s between two tries, so that several fit into a result's life.
const MOST_DOUBLINGS: u32 = 4;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use assay_wire::agreement::{MAX_SUPPORTING, MAX_SUPPORTING_BYTES};

    fn queue(count: usize, octets: usize, supporting: usize) -> Queue {
        let queue = Queue { to: RelyingParty::Isolation, waiting: Mutex::default(), more: Notify::new() };
        for _ in 0..count {
            let (admission, result) = (AdmissionId::random(), "r".repeat(4096));
            let renewal = Arc::new(Renewal { admission, result, supporting: vec!["s".repeat(octets); supporting] });
            queue.put(Waiting { renewal, expires_at_ms: 10 });
        }
        queue
    }

    /// Everything that waits, batch by batch: no batch is larger than a relying party takes.
    fn batches(queue: &Queue) -> Vec<usize> {
        let mut sizes = Vec::new();
        while !queue.is_empty() {
            let batch = queue.take(0);
            let renewals: Vec<_> = batch.iter().map(|waiting| Renewal::clone(&waiting.renewal)).collect();
            let request = serde_json::to_vec(&RenewalRequest { renewals }).unwrap();
            assert!(!batch.is_empty() && request.len() <= MAX_RENEWAL_BYTES, "{} octets", request.len());
            sizes.push(batch.len());
        }
        sizes
    }

    #[test]
    fn a_batch_is_never_larger_than_a_relying_party_takes() {
        assert_eq!(batches(&queue(1_500, 0, 0)), [MAX_RENEWALS, 500]);
        assert_eq!(batches(&queue(1_000, 4_000, 2)).len(), 1);
        // Of what nobody has read, as much as is passed on.
        let large = batches(&queue(300, MAX_SUPPORTING_BYTES, MAX_SUPPORTING));
        assert!(large.len() == 3 && large.iter().sum::<usize>() == 300, "{large:?}");
        // What expired while it waited is not sent.
        assert!(queue(3, 0, 0).take(10).is_empty());
    }
}
