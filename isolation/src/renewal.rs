//! Renewals: fresh attestation results keep admissions standing. A batch is decided whole in memory and recorded in one
//! statement; nothing is asked of a switch, because a renewal opens nothing: it only moves the time at which the
//! node's driver closes the port by itself.

use crate::store::{RecordError, Store};
use assay_service::error::chain;
use assay_wire::agreement::{Agreement, Batch, Disagreement};
use assay_wire::id::AdmissionId;
use assay_wire::isolation::{Renewal, RenewalOutcome};
use std::time::Duration;

/// Decides a batch and records it. One outcome for each renewal, in their order. None if deciding panicked: then, as
/// after an error, no admission stands longer than it did.
///
/// # Errors
/// The record cannot be read or written.
pub async fn renew(
    store: &Store,
    (agreement, longest): (&Agreement, Duration),
    renewals: Vec<Renewal>,
    now_ms: i64,
) -> Result<Option<Vec<RenewalOutcome>>, RecordError> {
    let ids: Vec<AdmissionId> = renewals.iter().map(|renewal| renewal.admission).collect();
    let batch = Batch {
        agreement: agreement.clone(),
        longest_ms: i64::try_from(longest.as_millis()).unwrap_or(i64::MAX),
        standing: store.standing(&ids).await?,
        keys: store.all_verifier_keys().await?,
    };
    // A thousand signatures take tens of milliseconds: not on a thread that serves others.
    let deciding = tokio::task::spawn_blocking(move || batch.decide(renewals, now_ms));
    let Ok(decided) = deciding.await else { return Ok(None) };
    let mut until_ms = decided.until_ms();
    let extended = store.extend(&until_ms, now_ms).await?;
    until_ms.retain(|id, _| extended.contains(id));
    Ok(Some(decided.outcomes(&until_ms, |refused: &Disagreement| chain(refused))))
}
