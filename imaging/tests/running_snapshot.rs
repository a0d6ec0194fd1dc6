//! Snapshots of a disk that a node runs from: the gateway has its export pause, imaging freezes what it holds, the export
//! goes on. The initiator sees a pause and nothing else, whoever dies meanwhile.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::gateway::order::ExportOrder;
use assay_imaging::store::{ImageStore as _, LocalStore, StoreError};
use assay_service::client::ClientError;
use assay_service::clock::ManualClock;
use assay_wire::id::{AdmissionId, ImageKey};
use rig::site::{kind, until};
use rig::writer::{Writer, written};
use rig::*;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::spawn_blocking;

const BLOCK: usize = 4096;
const BLOCKS: usize = 4096;
const SNAPSHOTS: usize = 5;

struct Site {
    folder: tempfile::TempDir,
    store: Arc<LocalStore>,
    clock: Arc<ManualClock>,
    gateway: RunningGateway,
    admission: AdmissionId,
    order: ExportOrder,
}

impl Site {
    /// An export of an empty disk.
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(store_with_image(folder.path(), &vec![0; BLOCKS * BLOCK]));
        let clock = Arc::new(ManualClock::new(NOW_MS));
        let gateway = RunningGateway::start(folder.path(), &clock).await;
        let (admission, order) = (AdmissionId::random(), order(&store));
        gateway.put_up(admission, &order).await.unwrap();
        Self { folder, store, clock, gateway, admission, order }
    }

    async fn writer(&self) -> Writer {
        Writer::start(self.gateway.portal, &self.order, BLOCK, BLOCKS).await
    }

    async fn turn(&self, which: &str) -> Result<(), ClientError> {
        self.gateway.control.post(&format!("v1/exports/{}/{which}", self.admission), &()).await
    }

    async fn snapshot(&self) -> Result<ImageKey, StoreError> {
        let (store, disk, key) = (Arc::clone(&self.store), self.order.disk, ImageKey::random());
        spawn_blocking(move || store.snapshot(disk, key).map(|_| key)).await.unwrap()
    }

    /// How many blocks were written in an image: all of them at its beginning, each with its own number, in order.
    fn written(&self, image: ImageKey) -> usize {
        let device = self.store.open_image(image).unwrap();
        let mut content = vec![0; BLOCKS * BLOCK];
        device.read_at(0, &mut content).unwrap();
        written(&content, BLOCK)
    }

    /// Takes the export down, and reads what its disk holds.
    async fn end(self) -> usize {
        self.gateway.take_down(self.admission).await;
        let key = self.snapshot().await.unwrap();
        let written = self.written(key);
        self.gateway.stop().await;
        written
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_sees_a_pause_and_each_snapshot_is_a_prefix() {
    let site = Site::new().await;
    let writer = site.writer().await;
    let (mut pauses, mut images) = (Vec::new(), Vec::new());
    for _ in 0..SNAPSHOTS {
        writer.goes_on().await;
        let acknowledged = writer.acknowledged();
        let begun = Instant::now();
        site.turn("pause").await.unwrap();
        let image = site.snapshot().await.unwrap();
        // At most one write is under way, and it waits.
        let at_most = writer.acknowledged() + 1;
        site.turn("resume").await.unwrap();
        pauses.push(begun.elapsed());
        images.push((acknowledged, image, at_most));
    }
    writer.goes_on().await;
    let (written, longest) = writer.stop().await;
    for (acknowledged, image, at_most) in images {
        let found = site.written(image);
        assert!((acknowledged..=at_most).contains(&found), "{acknowledged} <= {found} <= {at_most}");
    }
    let worker = &site.gateway.status().await.exports[0];
    assert_eq!((worker.restarts, worker.sessions), (0, 0), "the process and its session were the same throughout");
    eprintln!("{SNAPSHOTS} snapshots of a running disk: pauses {pauses:?}; the slowest write took {longest:?}");
    assert!(pauses.iter().all(|pause| *pause < Duration::from_secs(2)), "{pauses:?}");
    assert_eq!(site.end().await, written);
}

/// While it is served, nobody takes a snapshot; while it is paused, somebody does.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_somebodys_at_any_time() {
    let site = Site::new().await;
    assert!(matches!(site.snapshot().await, Err(StoreError::InUse { .. })));
    site.turn("pause").await.unwrap();
    // As an imaging that died in between does when it is asked again.
    site.turn("pause").await.unwrap();
    site.snapshot().await.unwrap();
    site.turn("resume").await.unwrap();
    site.turn("resume").await.unwrap();
    assert!(matches!(site.snapshot().await, Err(StoreError::InUse { .. })));
    let nobody = format!("v1/exports/{}/pause", AdmissionId::random());
    assert_eq!(kind(&site.gateway.control.post::<_, ()>(&nobody, &()).await.unwrap_err()).0, 404);
    site.end().await;
}

/// Imaging dies before the snapshot, or after it: the export goes on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_ends_by_itself() {
    let site = Site::new().await;
    let writer = site.writer().await;
    for taken in [false, true] {
        writer.goes_on().await;
        site.turn("pause").await.unwrap();
        if taken {
            site.snapshot().await.unwrap();
        }
        writer.goes_on().await;
    }
    let (written, longest) = writer.stop().await;
    assert!(longest > Duration::from_secs(2), "a write waited for the pause to end: {longest:?}");
    assert_eq!(site.gateway.status().await.exports[0].restarts, 0);
    assert_eq!(site.end().await, written);
}

/// The process dies while it is paused, with nothing that was flushed: its successor opens the disk as it is then.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_dies_while_it_is_paused() {
    let site = Site::new().await;
    let writer = site.writer().await;
    writer.goes_on().await;
    let worker = worker_of(&site.store, &site.order);
    site.turn("pause").await.unwrap();
    site.snapshot().await.unwrap();
    rustix::process::kill_process(worker, rustix::process::Signal::KILL).unwrap();
    until(async || site.gateway.status().await.exports[0].restarts == 1).await;
    site.turn("resume").await.unwrap();
    // QEMU's initiator logs in anew and asks again.
    writer.goes_on().await;
    let (written, _) = writer.stop().await;
    assert_eq!(site.gateway.status().await.exports[0].restarts, 1, "it is not resumed, since it was never paused");
    assert_eq!(site.end().await, written);
}

/// The gateway dies while it paused an export. Its successor serves the disk as it is then.
#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_dies_while_it_has_an_export_paused() {
    let mut site = Site::new().await;
    let writer = site.writer().await;
    writer.goes_on().await;
    site.turn("pause").await.unwrap();
    let portal = site.gateway.portal;
    site.gateway.stop().await;
    site.gateway = RunningGateway::start_on(site.folder.path(), &site.clock, portal).await;
    site.snapshot().await.unwrap();
    site.gateway.put_up(site.admission, &site.order).await.unwrap();
    writer.goes_on().await;
    let (written, _) = writer.stop().await;
    assert_eq!(site.end().await, written);
}
