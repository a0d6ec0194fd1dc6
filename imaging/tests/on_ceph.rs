//! Imaging with its images and disks on a real Ceph, over its API: what it starts with, and what its exports leave.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::Imaging;
use assay_imaging::config::CephConfig;
use assay_imaging::rbd_disks::RbdDisks;
use assay_rbd::name::PoolName;
use assay_rbd::testing::{Ceph, Daemon, ObjectStore};
use assay_service::CancellationToken;
use assay_service::clock::ManualClock;
use assay_service::error::chain;
use assay_wire::agreement::Agreement;
use assay_wire::id::AdmissionId;
use assay_wire::imaging::{Image, ImageKind, ImageState, SnapshotRequest};
use rig::rbd::{COMPANION, table};
use rig::site::{Service, Site, kind, until};
use rig::{NOW_MS, RunningGateway};
use serde_json::json;
use std::sync::Arc;

fn users(ceph: &Ceph) -> Vec<String> {
    let list = ceph.admin().mon_query(&json!({"prefix": "auth ls", "format": "json"})).unwrap();
    let users = list["auth_dump"].as_array().unwrap().iter();
    users.map(|user| user["entity"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn images_and_disks_are_on_ceph_and_outlive_the_service() {
    let (ceph, keys) = (Ceph::shared(), tempfile::tempdir().unwrap());
    let table = table(&ceph, keys.path(), "service");
    let mut site = Site::on(Some(table.clone())).await;
    let request = SnapshotRequest { name: "taken".parse().unwrap() };
    let taken: Image =
        site.service.operator.post(&format!("v1/disks/{}/snapshot", site.lease), &request).await.unwrap();
    assert_eq!((taken.kind, taken.state), (ImageKind::Snapshot, ImageState::Ready));
    site.service.stop().await;
    site.service = Service::start_on(site.folder.path(), &site.clock, Agreement::default(), Some(table)).await;
    let images: Vec<Image> = site.service.operator.get("v1/images").await.unwrap();
    assert_eq!(images.len(), 2);
    assert!(images.contains(&taken), "{images:?}");
    let golden = images.iter().find(|image| image.kind == ImageKind::Golden).unwrap();
    let cached = site.folder.path().join("store/golden").join(golden.key.to_string());
    assert!(cached.join("disk.raw").exists());
    let refused = site.service.operator.delete::<_, ()>("v1/images/golden", &()).await.unwrap_err();
    assert_eq!(kind(&refused), (409, "has-dependents"), "{refused}");
    for path in [format!("v1/disks/{}", site.lease), "v1/images/taken".to_owned(), "v1/images/golden".to_owned()] {
        site.service.operator.delete::<_, ()>(&path, &()).await.unwrap();
    }
    assert!(!cached.exists());
    site.stop().await;
}

/// The gateway of this test is not set up for disks on Ceph.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_does_not_come_about_leaves_no_key() {
    let (ceph, keys) = (Ceph::shared(), tempfile::tempdir().unwrap());
    let site = Site::on(Some(table(&ceph, keys.path(), "exports"))).await;
    let claims = site.claims();
    site.service.export(&site.sign(&claims)).await.unwrap_err();
    assert!(site.service.exports().await.is_empty());
    let left: Vec<String> = users(&ceph).into_iter().filter(|user| user.contains(&claims.jti.to_string())).collect();
    assert!(left.is_empty(), "{left:?}");
    site.service.end(claims.jti).await.unwrap();
    site.stop().await;
}

/// A site that exports a disk on Ceph, and which admission has it; and what starts companions.
async fn exporting(table: CephConfig) -> (Site, AdmissionId, CancellationToken) {
    let (site, shutdown) = (Site::on(Some(table)).await, CancellationToken::new());
    let disks = RbdDisks::bind(&site.folder.path().join("rbd-disks.sock"), Some(COMPANION.into())).unwrap();
    tokio::spawn(disks.serve(shutdown.clone()));
    let claims = site.claims();
    site.service.export(&site.sign(&claims)).await.unwrap();
    (site, claims.jti, shutdown)
}

fn has_key(ceph: &Ceph, admission: AdmissionId) -> bool {
    tokio::task::block_in_place(|| users(ceph)).iter().any(|user| user.contains(&admission.to_string()))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_whose_gateway_is_away_loses_its_key_at_once_and_is_forgotten_when_the_gateway_has_severed_it() {
    let (ceph, keys) = (Ceph::shared(), tempfile::tempdir().unwrap());
    let (mut site, admission, disks) = exporting(table(&ceph, keys.path(), "gateway-away")).await;
    assert!(has_key(&ceph, admission));
    let portal = site.gateway.portal;
    site.gateway.stop().await;
    site.service.end(admission).await.unwrap_err();
    assert!(!has_key(&ceph, admission), "the store does not wait for the gateway");
    assert_eq!(site.service.exports().await.len(), 1, "not forgotten: a gateway may serve it still");
    site.gateway = RunningGateway::start_on(site.folder.path(), &site.clock, portal).await;
    until(async || site.service.exports().await.is_empty()).await;
    assert!(site.gateway.status().await.exports.is_empty());
    // The lease's next admission is not in its way.
    let claims = site.claims();
    site.service.export(&site.sign(&claims)).await.unwrap();
    site.service.end(claims.jti).await.unwrap();
    assert!(!has_key(&ceph, claims.jti));
    disks.cancel();
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_ends_while_no_monitor_answers_is_severed_at_once_and_its_key_revoked_when_one_does() {
    let mut ceph = tokio::task::block_in_place(|| Ceph::start(ObjectStore::Memory));
    let keys = tempfile::tempdir().unwrap();
    let (site, admission, disks) = exporting(table(&ceph, keys.path(), "monitor-away")).await;
    ceph.kill_daemon(Daemon::Monitor(0));
    site.service.end(admission).await.unwrap_err();
    assert!(site.gateway.status().await.exports.is_empty(), "the gateway does not wait for the store");
    assert_eq!(site.service.exports().await.len(), 1, "not forgotten: its key may be good still");
    tokio::task::block_in_place(|| ceph.start_daemon(Daemon::Monitor(0)));
    until(async || site.service.exports().await.is_empty()).await;
    assert!(!has_key(&ceph, admission));
    disks.cancel();
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_cannot_be_says_what_was_being_done() {
    let (ceph, folder) = (Ceph::shared(), tempfile::tempdir().unwrap());
    let clock = Arc::new(ManualClock::new(NOW_MS));
    let good = table(&ceph, folder.path(), "starts");
    let bad_key = folder.path().join("bad.key");
    std::fs::write(&bad_key, "no key\n").unwrap();
    // Nobody listens on port 1.
    let nobody = vec!["127.0.0.1:1".parse().unwrap()];
    for (table, said) in [
        (CephConfig { key_file: folder.path().join("none"), ..good.clone() }, "reading `ceph.key_file`, "),
        (CephConfig { key_file: bad_key, ..good.clone() }, "bad.key (`ceph.key_file`) has no key"),
        (CephConfig { pool: PoolName::new("none").unwrap(), ..good.clone() }, "opening the pool none: No such file"),
        (
            CephConfig { monitors: nobody, ..good },
            "connecting to the Ceph monitors v2:127.0.0.1:1 as client.imaging-starts: ",
        ),
    ] {
        let (config, context) = Service::prepare(folder.path(), &clock, Agreement::default(), Some(table));
        let error = chain(&Imaging::open(config, &context).await.err().unwrap());
        assert!(error.starts_with("opening the image store: ") && error.contains(said), "{error}");
    }
}
