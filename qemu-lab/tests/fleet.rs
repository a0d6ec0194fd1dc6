//! A small fleet, and several verifiers on one database, all of them real processes.

#![expect(clippy::unwrap_used, reason = "a test's set-up fails loudly")]

use assay_qemu_lab::fleet::{FleetSite, SiteOptions, VerifierProcess};
use assay_service::testing::TestDatabase;
use assay_wire::id::AdmissionId;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tokio::task::JoinSet;

/// The service's binary, built beside the lab's.
fn assay() -> PathBuf {
    let assay = Path::new(env!("CARGO_BIN_EXE_qemu-lab")).with_file_name("assay");
    assert!(assay.exists(), "{} is not there: run the tests of the whole workspace", assay.display());
    assay
}

fn fleet(arguments: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_qemu-lab"))
        .args(["fleet", "--output", "json", "--folder"])
        .arg(folder.path())
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_small_fleet_is_admitted_and_attests_without_an_error() {
    let report = fleet(&["--nodes", "50", "--interval", "1", "--duration", "5"]);
    let number = |field: &str| report[field].as_f64().unwrap();
    assert_eq!((number("nodes"), number("failed")), (50.0, 0.0), "{report:#}");
    assert_eq!(report["errors"], serde_json::json!({}), "{report:#}");
    assert!(number("pushes_per_second") > 25.0, "{report:#}");
    assert!(number("verifier_peak_rss_mib") < 512.0, "{report:#}");
}

/// Row D5: more nodes at once than there are slots, challenges or patience for; each is admitted in the end.
#[test]
fn d5_a_storm_of_enrolments_only_takes_longer() {
    let report = fleet(&["--nodes", "300", "--enrolling", "300", "--interval", "30", "--duration", "1"]);
    let number = |field: &str| report[field].as_f64().unwrap();
    assert_eq!((number("nodes"), number("failed")), (300.0, 0.0), "{report:#}");
    assert!(number("verifier_peak_rss_mib") < 512.0, "{report:#}");
}

fn made_of(folder: &Path, database: Option<String>) -> SiteOptions {
    SiteOptions { assay: assay(), folder: folder.to_owned(), database, interval_seconds: 5, more_ek_cas: Vec::new() }
}

/// Two verifiers on one PostgreSQL database; the first dies at `failpoint` while it drives a release.
async fn one_dies_at(failpoint: String) {
    let Some(database) = TestDatabase::postgresql() else { return };
    let folder = tempfile::tempdir().unwrap();
    let url = Some(database.url().to_owned());
    let (site, mut first) = FleetSite::start(made_of(folder.path(), url)).await.unwrap();
    first.kill().await.unwrap();
    let armed = format!("{failpoint}=return");
    let doomed = VerifierProcess::start("doomed", &site.options, &site.peers, Some(&first), &armed).await.unwrap();
    let heir = VerifierProcess::start("heir", &site.options, &site.peers, Some(&first), "").await.unwrap();
    let admission = site.admit_one("n1", &[&doomed, &heir]).await.unwrap().admission();
    assert!(site.peers.port_is_open(admission) && site.peers.export_is_open(admission), "died at {failpoint}");
    assert_eq!(site.peers.open(), (1, 1), "died at {failpoint}");
    assert_eq!(site.peers.violations(), Vec::<String>::new(), "died at {failpoint}");
    assert_eq!(step_of(&heir, admission).await, "handed-over", "died at {failpoint}");
    let mut doomed = doomed;
    doomed.ended().await.unwrap();
}

async fn step_of(verifier: &VerifierProcess, admission: AdmissionId) -> String {
    let releases: Value = verifier.operator().unwrap().get("/v1/releases").await.unwrap();
    let releases = releases.as_array().unwrap();
    let release = releases.iter().find(|release| release["admission"] == admission.to_string()).unwrap();
    release["step"].as_str().unwrap().to_owned()
}

/// In the middle of each effect, and at each step that is written; a few at a time.
#[tokio::test(flavor = "multi_thread")]
async fn a_verifier_killed_at_any_step_of_a_release_is_replaced() {
    let points = ["after-export", "exported", "ready", "after-move", "moved", "granted"];
    for some in points.chunks(3) {
        let mut running = JoinSet::new();
        for point in some {
            running.spawn(one_dies_at(format!("release::{point}")));
        }
        while let Some(replaced) = running.join_next().await {
            replaced.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verifier_with_other_keys_than_its_database_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let database = TestDatabase::new();
    let url = Some(database.url().to_owned());
    let (site, first) = FleetSite::start(made_of(folder.path(), url)).await.unwrap();
    let refused =
        VerifierProcess::start("stranger", &site.options, &site.peers, None, "").await.unwrap_err().to_string();
    for word in ["result key", "result-signing.key", "accept_new_keys"] {
        assert!(refused.contains(word), "{word}: {refused}");
    }
    assert!(first.pid().is_some());
}
