//! Silence: an admission whose evidence stops coming is ended here, although isolation and imaging would let it expire
//! by themselves; and somebody is told before that. Each round is a task of its own, so that one which panics is one
//! round and not the end of all of them.

use super::AttestationTimes;
use super::endings::Endings;
use crate::store::{DbError, VerifierStore};
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_service::error::chain;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::task::TaskTracker;

/// Starts the rounds.
pub(crate) fn start(
    store: VerifierStore,
    endings: Endings,
    clock: Arc<dyn Clock>,
    times: AttestationTimes,
    shutdown: CancellationToken,
    tasks: &TaskTracker,
) {
    let rounds = tasks.clone();
    tasks.spawn(async move {
        let mut number = 0_u64;
        loop {
            let (store, endings, now_ms) = (store.clone(), endings.clone(), clock.now_ms());
            let round = rounds.spawn(async move { round(&store, &endings, times, now_ms, number).await });
            match round.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::error!(event = "attestation.sweep_failed", cause = chain(&error), "trying again");
                }
                Err(panic) => tracing::error!(event = "attestation.sweep_failed", cause = %panic, "trying again"),
            }
            number = number.wrapping_add(1);
            tokio::select! {
                () = tokio::time::sleep(ROUND) => {}
                () = shutdown.cancelled() => return,
            }
        }
    });
}

async fn round(
    store: &VerifierStore,
    endings: &Endings,
    times: AttestationTimes,
    now_ms: i64,
    number: u64,
) -> Result<(), DbError> {
    for mut silent in store.expired_attestations(now_ms).await? {
        silent.reasons = vec![format!("silence: no good evidence came within {} s", times.silence_ms / 1000)];
        endings.begin(silent);
    }
    store.mark_silent(now_ms.saturating_sub(times.overdue_ms()), now_ms).await?;
    store.refresh_counters().await?;
    if number.is_multiple_of(RESUMED_EVERY) {
        endings.resume().await?;
    }
    if number.is_multiple_of(TIDIED_EVERY) {
        store.tidy_attestations(now_ms).await?;
    }
    Ok(())
}

const ROUND: Duration = Duration::from_millis(500);
/// Rounds from one look at unfinished endings to the next.
const RESUMED_EVERY: u64 = 4;
const TIDIED_EVERY: u64 = 120;
