//! After the release: an admission that isolation has ended (a reset, an expiry, an operator) takes its export with it.
//! isolation fences the port by itself and at once; this closes the disk, so that nothing of the admission is left.

use super::Shared;
use super::journal::ReleaseStep;
use assay_service::error::chain;
use assay_wire::id::AdmissionId;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// Follows isolation's admissions until shutdown.
pub(crate) async fn run(shared: Arc<Shared>) {
    // What was followed already; after a restart all of it is once more, which changes nothing at imaging.
    let mut followed = HashSet::new();
    let mut failures = 0_u32;
    loop {
        let answered = tokio::select! {
            answered = follow(&shared, &mut followed) => answered,
            () = shared.shutdown.cancelled() => return,
        };
        failures = if answered { 0 } else { failures.saturating_add(1).min(MOST_DOUBLINGS) };
        tokio::select! {
            () = tokio::time::sleep(INTERVAL * 2_u32.pow(failures)) => {}
            () = shared.shutdown.cancelled() => return,
        }
    }
}

/// Answers whether everything that ended was followed.
async fn follow(shared: &Shared, followed: &mut HashSet<AdmissionId>) -> bool {
    let now_ms = shared.clock.now_ms();
    let (admissions, releases) = match (shared.peers.admissions().await, shared.store.releases().await) {
        (Ok(admissions), Ok(releases)) => (admissions, releases),
        (Err(error), _) => return failed("reading isolation's admissions", &error),
        (_, Err(error)) => return failed("reading the release journal", &error),
    };
    let ended: HashSet<AdmissionId> = admissions
        .admissions
        .iter()
        .filter(|admission| admission.revoked.is_some() || admission.expires_at_ms <= now_ms)
        .map(|admission| admission.id)
        .collect();
    let mut all = true;
    // Releases under way are their drivers' business.
    for release in releases.iter().filter(|release| release.step == ReleaseStep::HandedOver) {
        if !ended.contains(&release.admission) || followed.contains(&release.admission) {
            continue;
        }
        match shared.peers.unexport(release.admission).await {
            Ok(()) => {
                followed.insert(release.admission);
                tracing::info!(event = "admission.followed", node = %release.node, admission = %release.admission,
                    "the admission has ended, so its export is closed");
            }
            Err(error) => all = failed("closing the export of an admission that has ended", &error),
        }
    }
    all
}

fn failed(doing: &'static str, error: &dyn std::error::Error) -> bool {
    tracing::warn!(event = "admission.follow_failed", doing, cause = chain(error), "will try again");
    false
}

const INTERVAL: Duration = Duration::from_millis(500);
/// 500 ms doubled five times: at most 16 s between two tries.
const MOST_DOUBLINGS: u32 = 5;
