//! Imaging dies between two phases of an export. After a restart, asking again gives the one export; not asking leaves
//! none once the result has expired. The gateway outlives imaging throughout.
//!
//! Not a usual test program: it starts itself again as the process that dies. Run with `--features failpoints`.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test stops where it fails, and says what it has done"
)]

mod rig;

use assay_service::clock::ManualClock;
use assay_wire::result::SignedResult;
use rig::NOW_MS;
use rig::site::{Service, Site, until};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

const PHASES: [&str; 3] = ["imaging::cloned", "imaging::target-up", "imaging::exported"];
const SIGABRT: i32 = 6;

#[tokio::main]
async fn main() {
    if let (Ok(phase), Ok(folder)) = (std::env::var("CRASH_AT"), std::env::var("CRASH_IN")) {
        return die(&phase, Path::new(&folder)).await;
    }
    for phase in PHASES {
        asked_again_it_is_made(phase).await;
        not_asked_again_it_goes(phase).await;
        println!("crash at {phase}: ok");
    }
}

/// The process that dies.
async fn die(phase: &str, folder: &Path) {
    fail::cfg(phase, "return").unwrap();
    let service = Service::start(folder, &Arc::new(ManualClock::new(NOW_MS))).await;
    let result = SignedResult::from_wire(std::fs::read_to_string(folder.join("result")).unwrap());
    let answered = service.export(&result).await;
    panic!("lived through {phase}: {answered:?}");
}

/// A site whose imaging has died at `phase`, and has not been started again.
async fn crashed(phase: &str) -> (Site, SignedResult) {
    let mut site = Site::new().await;
    let result = site.sign(&site.claims());
    std::fs::write(site.folder.path().join("result"), result.as_str()).unwrap();
    site.service.shutdown.cancel();
    (&mut site.service.task).await.unwrap();
    let died = tokio::process::Command::new(std::env::current_exe().unwrap())
        .env("CRASH_AT", phase)
        .env("CRASH_IN", site.folder.path())
        .stderr(Stdio::null())
        .status()
        .await
        .unwrap();
    assert_eq!(died.signal(), Some(SIGABRT), "{phase}: {died}");
    (site, result)
}

async fn asked_again_it_is_made(phase: &str) {
    let (mut site, result) = crashed(phase).await;
    site.service = Service::start(site.folder.path(), &site.clock).await;
    let answer = site.service.export(&result).await.unwrap();
    let served = site.gateway.status().await.exports;
    assert_eq!(served.len(), 1, "{phase}");
    assert_eq!(served[0].admission, answer.admission, "{phase}");
    assert_eq!(site.service.exports().await.len(), 1, "{phase}");
    site.service.end(answer.admission).await.unwrap();
    assert!(site.gateway.status().await.exports.is_empty(), "{phase}");
    site.stop().await;
}

async fn not_asked_again_it_goes(phase: &str) {
    let (mut site, _) = crashed(phase).await;
    site.clock.advance_ms(600_000);
    site.service = Service::start(site.folder.path(), &site.clock).await;
    until(async || site.gateway.status().await.exports.is_empty() && site.service.exports().await.is_empty()).await;
    site.stop().await;
}
