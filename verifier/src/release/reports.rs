//! Bad verdicts, reported to isolation until it has heard of each: the port goes to quarantine (step 6, the bad end).

use super::Shared;
use super::peers::EffectError;
use crate::store::archive::VerdictRecord;
use assay_service::error::chain;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// Wakes the reporter.
#[derive(Debug, Clone, Default)]
pub struct Reports {
    pending: Arc<Notify>,
}

impl Reports {
    /// There is a new bad verdict in the archive.
    pub fn wake(&self) {
        self.pending.notify_one();
    }

    /// Reports what is unreported, at start and whenever woken, until shutdown.
    pub(crate) async fn run(self, shared: Arc<Shared>) {
        let mut failures = 0_u32;
        loop {
            let all_told = tokio::select! {
                told = report_all(&shared) => told,
                () = shared.shutdown.cancelled() => return,
            };
            failures = if all_told { 0 } else { failures.saturating_add(1) };
            let backoff = FIRST_BACKOFF.saturating_mul(1 << failures.min(MOST_DOUBLINGS));
            tokio::select! {
                () = self.pending.notified() => {}
                () = tokio::time::sleep(backoff), if !all_told => {}
                // What another verifier of this database left behind. A report told twice changes nothing.
                () = tokio::time::sleep(LOOK_AGAIN), if all_told => {}
                () = shared.shutdown.cancelled() => return,
            }
        }
    }
}

/// Answers whether none is left.
async fn report_all(shared: &Shared) -> bool {
    let unreported = match shared.store.unreported_rejections().await {
        Ok(unreported) => unreported,
        Err(error) => {
            tracing::error!(event = "verdict.report_failed", cause = chain(&error), "cannot read unreported verdicts");
            return false;
        }
    };
    let mut all_told = true;
    for verdict in unreported {
        all_told &= report(shared, &verdict).await;
    }
    all_told
}

async fn report(shared: &Shared, verdict: &VerdictRecord) -> bool {
    let reason = verdict.reasons.join("; ");
    match shared.peers.reject(&verdict.node, verdict.boot, reason).await {
        Ok(()) => {}
        // The boot or the node is no longer there to be rejected.
        Err(error) if error.is_moot() => log("verdict.report_refused", verdict, &error),
        Err(error) => {
            log("verdict.report_failed", verdict, &error);
            return false;
        }
    }
    match shared.store.mark_reported(verdict.evidence, shared.clock.now_ms()).await {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(event = "verdict.report_failed", cause = chain(&error), "cannot record a report");
            false
        }
    }
}

fn log(event: &'static str, verdict: &VerdictRecord, error: &EffectError) {
    tracing::warn!(event, node = %verdict.node, evidence = %verdict.evidence, cause = chain(error), "reporting a bad verdict");
}

const LOOK_AGAIN: Duration = Duration::from_secs(5);
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// 250 ms doubled six times: at most 16 s between two tries.
const MOST_DOUBLINGS: u32 = 6;
