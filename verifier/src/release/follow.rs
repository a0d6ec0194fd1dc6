//! After the release: what isolation ends (a reset, an expiry, an operator, the lease's end) takes everything else of
//! the admission with it. isolation fences the port by itself and at once; from here the export is closed, the
//! project's other nodes are told, and nothing is renewed any more. Followed by long poll, so that it is heard of when
//! it happens.

use super::Shared;
use super::journal::{Reason, ReleaseStep};
use crate::attestation::endings::Endings;
use crate::store::DbError;
use assay_service::error::chain;
use assay_wire::id::AdmissionId;
use assay_wire::isolation::{Admission, Admissions};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// Follows isolation's admissions until shutdown.
pub(crate) async fn run(shared: Arc<Shared>, endings: Endings) {
    // What was followed already; after a restart all of it is once more, which changes nothing.
    let mut followed = HashSet::new();
    let mut revision = None;
    let mut failures = 0_u32;
    loop {
        let answered = tokio::select! {
            answered = follow(&shared, &endings, &mut followed, revision) => answered,
            () = shared.shutdown.cancelled() => return,
        };
        let pause = match answered {
            // A peer that answers at once every time must not be asked without end.
            Some(seen) => {
                let moved = revision != Some(seen);
                (failures, revision) = (0, Some(seen));
                if moved { LEAST_PAUSE } else { PAUSE }
            }
            None => {
                failures = failures.saturating_add(1).min(MOST_DOUBLINGS);
                // What was missed may be long ago: begin again with all that is there.
                revision = None;
                PAUSE * 2_u32.pow(failures)
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shared.shutdown.cancelled() => return,
        }
    }
}

/// Waits for news and acts upon it. Answers the revision, or none if something of it must be done again.
async fn follow(
    shared: &Shared,
    endings: &Endings,
    followed: &mut HashSet<AdmissionId>,
    after: Option<u64>,
) -> Option<u64> {
    // Read before isolation is asked: what is handed over meanwhile need not be in its answer.
    let handed_over = match after {
        None => shared.store.standing_attestations().await,
        Some(_) => Ok(Vec::new()),
    };
    let (answer, handed_over) = match (shared.peers.admissions(after).await, handed_over) {
        (Ok(answer), Ok(handed_over)) => (answer, handed_over),
        (Err(error), _) => return failed("reading isolation's admissions", &error),
        (_, Err(error)) => return failed("reading the attestations", &error),
    };
    let Admissions { revision, admissions } = answer;
    let known: HashSet<AdmissionId> = admissions.iter().map(|admission| admission.id).collect();
    for mut forgotten in handed_over.into_iter().filter(|ending| !known.contains(&ending.admission)) {
        forgotten.reasons = vec!["isolation has no such admission any more".to_owned()];
        endings.follow(forgotten);
    }
    let now_ms = shared.clock.now_ms();
    let mut all = Some(revision);
    for admission in admissions.iter().filter(|admission| is_over(admission, now_ms)) {
        if followed.contains(&admission.id) {
            continue;
        }
        match follow_one(shared, endings, admission).await {
            Ok(true) => {
                followed.insert(admission.id);
            }
            Ok(false) => {}
            Err(Unfollowed::Store(error)) => all = failed("reading what has ended", &error),
            Err(Unfollowed::Imaging(error)) => {
                all = failed("closing the export of an admission that has ended", &error);
            }
        }
    }
    followed.retain(|admission| known.contains(admission));
    all
}

fn is_over(admission: &Admission, now_ms: i64) -> bool {
    admission.revoked.is_some() || admission.expires_at_ms <= now_ms
}

/// Why an end has not had its consequences yet.
enum Unfollowed {
    Store(DbError),
    Imaging(super::peers::EffectError),
}

/// Answers whether nothing is left to do. Releases under way are undone by their drivers.
async fn follow_one(shared: &Shared, endings: &Endings, admission: &Admission) -> Result<bool, Unfollowed> {
    let standing = shared.store.standing_attestation(admission.id).await.map_err(Unfollowed::Store)?;
    if let Some(mut ending) = standing {
        let why = admission.revoked.clone().unwrap_or_else(|| "it was not renewed in time".to_owned());
        ending.reasons = vec![format!("isolation has ended the admission: {why}")];
        endings.follow(ending);
        return Ok(true);
    }
    let release = shared.store.release(admission.id).await.map_err(Unfollowed::Store)?;
    match release.map(|release| release.step) {
        Some(ReleaseStep::HandedOver) => {
            shared.peers.unexport(admission.id).await.map_err(Unfollowed::Imaging)?;
            tracing::info!(event = "admission.followed", node = %admission.node, admission = %admission.id,
                "the admission has ended, so its export is closed");
            Ok(true)
        }
        Some(
            ReleaseStep::Admitted
            | ReleaseStep::Exported
            | ReleaseStep::Ready
            | ReleaseStep::Moved
            | ReleaseStep::Granted
            | ReleaseStep::Unwinding,
        ) => {
            shared.give_up(admission.id, Reason::AdmissionEnded);
            Ok(false)
        }
        // Another verifier's, or nothing is left of it.
        Some(ReleaseStep::Unwound) | None => Ok(true),
    }
}

fn failed(doing: &'static str, error: &dyn std::error::Error) -> Option<u64> {
    tracing::warn!(event = "admission.follow_failed", doing, cause = chain(error), "will try again");
    None
}

const LEAST_PAUSE: Duration = Duration::from_millis(10);
const PAUSE: Duration = Duration::from_millis(500);
/// 500 ms doubled five times: at most 16 s between two tries.
const MOST_DOUBLINGS: u32 = 5;
