//! Snapshots of a disk on Ceph that a node runs from. The disk becomes the image and is a clone of it from then on, so its
//! export gets another key; its initiator sees a pause and nothing else, whoever dies meanwhile.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::config::CephConfig;
use assay_imaging::gateway::order::ExportOrder;
use assay_imaging::rbd_disks::RbdDisks;
use assay_rbd::Cluster;
use assay_rbd::name::{CephKey, CephUser, ImageKind, ImageName, Namespace, SnapshotName};
use assay_rbd::testing::{Ceph, SharedCeph};
use assay_service::CancellationToken;
use assay_service::client::ClientError;
use assay_wire::agreement::Agreement;
use assay_wire::id::{AdmissionId, ImageKey};
use assay_wire::imaging::{Image, ImageFormat, ImageState, SnapshotRequest};
use rig::node::{Node, credentials};
use rig::rbd::{COMPANION, from_environment, table, to_environment};
use rig::site::{Service, Site};
use rig::writer::{Writer, written};
use serde_json::json;
use std::time::{Duration, Instant};

const BLOCK: usize = 512;
const BLOCKS: usize = 32_768;
const SNAPSHOTS: usize = 5;

/// Imaging on Ceph, and an export of a disk of zeros.
struct Running {
    ceph: SharedCeph,
    site: Site,
    table: CephConfig,
    node: Node,
    admission: AdmissionId,
    order: ExportOrder,
    disks: CancellationToken,
    _keys: tempfile::TempDir,
}

impl Running {
    async fn new(pool: &str) -> Self {
        let (ceph, keys) = (Ceph::shared(), tempfile::tempdir().unwrap());
        let table = table(&ceph, keys.path(), pool);
        let site = Site::on(Some(table.clone())).await;
        let socket = site.folder.path().join("rbd-disks.sock");
        let (disks, acceptor) = (CancellationToken::new(), RbdDisks::bind(&socket, Some(COMPANION.into())).unwrap());
        tokio::spawn(acceptor.serve(disks.clone()));
        std::fs::write(site.folder.path().join("zeros.raw"), vec![0; BLOCK * BLOCKS]).unwrap();
        site.import("zeros", "zeros.raw", ImageFormat::Raw).await.unwrap();
        let node = Node::with_disk_of(&site, "zeros".parse().unwrap(), "n2", "52:54:00:00:00:02").await;
        let answer = node.exported(&site).await;
        let order = credentials(&answer, &node.open(&answer).unwrap());
        Self { ceph, site, table, node, admission: answer.admission, order, disks, _keys: keys }
    }

    async fn writer(&self) -> Writer {
        Writer::start(self.site.gateway.portal, &self.order, BLOCK, BLOCKS).await
    }

    async fn snapshot(&self, name: &str) -> Result<Image, ClientError> {
        let request = SnapshotRequest { name: name.parse().unwrap() };
        self.site.service.operator.post(&format!("v1/disks/{}/snapshot", self.node.lease), &request).await
    }

    async fn images(&self) -> Vec<Image> {
        self.site.service.operator.get("v1/images").await.unwrap()
    }

    /// How many blocks were written in an image.
    fn written(&self, image: ImageKey) -> usize {
        let name = ImageName::numbered(ImageKind::Golden, u128::from_be_bytes(*image.as_bytes()));
        let pool = self.ceph.admin().namespace(&self.table.pool, &Namespace::new("p1").unwrap()).unwrap();
        let open = pool.open_read_only(name, Some(&SnapshotName::new("golden").unwrap())).unwrap();
        let mut content = vec![0; BLOCK * BLOCKS];
        open.read_at(0, &mut content).unwrap();
        written(&content, BLOCK)
    }

    fn user(&self) -> CephUser {
        CephUser::new(&format!("assay-export-{}", self.admission)).unwrap()
    }

    /// The export's key, as Ceph has it now.
    fn key(&self) -> CephKey {
        let asked = json!({"prefix": "auth get-key", "entity": self.user().entity(), "format": "json"});
        let answer = self.ceph.admin().mon_query(&asked).unwrap();
        CephKey::new(answer["key"].as_str().unwrap()).unwrap()
    }

    fn is_dead(&self, key: &CephKey) -> bool {
        Cluster::connect(&self.ceph.connection(self.user(), key.clone())).is_err_and(|error| error.is_denied())
    }

    /// Imaging dies at `point` of a snapshot of that name.
    async fn die(&mut self, point: &str, name: &str) {
        self.site.service.shutdown.cancel();
        (&mut self.site.service.task).await.unwrap();
        let died = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "dies", "--ignored", "--nocapture"])
            .env("CRASH_AT", point)
            .env("CRASH_IN", self.site.folder.path())
            .envs(to_environment(&self.table))
            .env("CRASH_OF", format!("v1/disks/{}/snapshot", self.node.lease))
            .env("CRASH_NAME", name)
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&died.stdout).into_owned() + &String::from_utf8_lossy(&died.stderr);
        let signal = std::os::unix::process::ExitStatusExt::signal(&died.status);
        assert_eq!(signal, Some(6), "{point}: {said}");
    }

    async fn start_again(&mut self) {
        let (folder, clock) = (self.site.folder.path(), &self.site.clock);
        self.site.service = Service::start_on(folder, clock, Agreement::default(), Some(self.table.clone())).await;
    }

    /// Ends the export, and reads what its disk holds.
    async fn end(self) -> usize {
        self.site.service.end(self.admission).await.unwrap();
        let last = self.snapshot("last").await.unwrap();
        let count = self.written(last.key);
        self.disks.cancel();
        self.site.stop().await;
        count
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_writer_sees_a_pause_and_each_snapshot_is_a_prefix() {
    let running = Running::new("running").await;
    let writer = running.writer().await;
    let mut taken = Vec::new();
    for number in 0..SNAPSHOTS {
        writer.goes_on().await;
        let (acknowledged, key, begun) = (writer.acknowledged(), running.key(), Instant::now());
        let image = running.snapshot(&format!("taken-{number}")).await.unwrap();
        let took = begun.elapsed();
        // At most one write is under way.
        taken.push((acknowledged, image.key, writer.acknowledged() + 1, took));
        assert!(running.is_dead(&key), "the key of what is an image now opens it still");
        assert!(!running.is_dead(&running.key()));
    }
    writer.goes_on().await;
    let (count, longest) = writer.stop().await;
    for (acknowledged, image, at_most, _) in &taken {
        let found = running.written(*image);
        assert!((*acknowledged..=*at_most).contains(&found), "{acknowledged} <= {found} <= {at_most}");
    }
    let took: Vec<Duration> = taken.iter().map(|(.., took)| *took).collect();
    let restarts = running.site.gateway.status().await.exports[0].restarts as usize;
    // On a machine that has much else to do a step may take longer than a pause may last. Then the worker is another one.
    let slow = took.iter().filter(|took| **took > Duration::from_secs(2)).count();
    assert!(restarts <= slow, "{restarts} processes began anew, {took:?}");
    eprintln!("{SNAPSHOTS} snapshots of a running disk on Ceph: {took:?}; the slowest write took {longest:?}");
    assert!(slow > 0 || longest < Duration::from_secs(3), "{longest:?}");
    assert_eq!(running.end().await, count);
}

/// What dies. Not a test by itself.
#[cfg(feature = "failpoints")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by whatever_moment_imaging_dies_at_the_export_goes_on"]
async fn dies() {
    let text = |name: &str| std::env::var(name).unwrap();
    fail::cfg(text("CRASH_AT"), "return").unwrap();
    let clock = std::sync::Arc::new(assay_service::clock::ManualClock::new(rig::NOW_MS));
    let service = Service::start_on(text("CRASH_IN").as_ref(), &clock, Agreement::default(), from_environment()).await;
    let request = SnapshotRequest { name: text("CRASH_NAME").parse().unwrap() };
    let answer: Result<Image, _> = service.operator.post(&text("CRASH_OF"), &request).await;
    panic!("lived through it: {answer:?}");
}

#[cfg(feature = "failpoints")]
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_moment_imaging_dies_at_the_export_goes_on() {
    let mut running = Running::new("crashes").await;
    let writer = running.writer().await;
    for (point, is_taken) in [("paused", false), ("revoked", false), ("taken", true), ("issued", true), ("told", true)]
    {
        writer.goes_on().await;
        let (acknowledged, key) = (writer.acknowledged(), running.key());
        running.die(&format!("imaging::moving::{point}"), point).await;
        if ["paused", "told"].contains(&point) {
            // Nobody is needed for that.
            writer.goes_on().await;
        }
        let at_most = writer.acknowledged() + 1;
        running.start_again().await;
        writer.goes_on().await;
        let images = running.images().await;
        let image = images.iter().find(|image| image.name.as_str() == point);
        assert_eq!(image.map(|image| image.state), is_taken.then_some(ImageState::Ready), "{point}");
        if let Some(image) = image {
            let found = running.written(image.key);
            assert!((acknowledged..=at_most).contains(&found), "{point}: {acknowledged} <= {found} <= {at_most}");
            assert!(running.is_dead(&key), "{point}");
        }
        if !is_taken {
            // Nothing is in the way of the next.
            let next = running.snapshot(point).await.unwrap();
            assert!(running.written(next.key) >= acknowledged, "{point}");
        }
        eprintln!("imaging died when it had {point}: the export went on");
    }
    writer.goes_on().await;
    let (count, _) = writer.stop().await;
    assert_eq!(running.end().await, count);
}
