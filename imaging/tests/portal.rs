//! The gateway's portal against real initiators: libiscsi's tools and QEMU.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::gateway::order::ExportOrder;
use assay_imaging::{ExportedFile, FileExport};
use assay_service::CancellationToken;
use assay_service::clock::ManualClock;
use assay_wire::id::AdmissionId;
use rig::*;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

struct Site {
    folder: tempfile::TempDir,
    store: assay_imaging::store::ImageStore,
    clock: Arc<ManualClock>,
    gateway: RunningGateway,
}

impl Site {
    async fn new(image_bytes: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = store_with_image(folder.path(), &pattern(image_bytes));
        let clock = Arc::new(ManualClock::new(NOW_MS));
        let gateway = RunningGateway::start(folder.path(), &clock).await;
        Self { folder, store, clock, gateway }
    }

    async fn export(&self) -> (AdmissionId, ExportOrder) {
        let (admission, order) = (AdmissionId::random(), order(&self.store));
        self.gateway.put_up(admission, &order).await.unwrap();
        (admission, order)
    }
}

#[tokio::test]
async fn the_right_initiator_sees_its_clone_and_writes_only_there() {
    let site = Site::new(3 << 20).await;
    let (_, mine) = site.export().await;
    let (_, other) = site.export().await;
    let portal = site.gateway.portal;
    let source = site.folder.path().join("source.raw");
    let inquiry = libiscsi("iscsi-inq", portal, &mine).await;
    assert!(inquiry.status.success() && text(&inquiry).contains("ASSAY"), "{}", text(&inquiry));
    let capacity = libiscsi("iscsi-readcapacity16", portal, &mine).await;
    assert!(text(&capacity).contains("Total size:3145728"), "{}", text(&capacity));
    assert_same(portal, &mine, &source).await;

    let written = qemu_io(portal, &mine, &["write -P 0x55 1000448 123904", "write -z 0 65536", "flush"]).await;
    assert!(written.status.success(), "{}", text(&written));
    let mut expected = std::fs::read(&source).unwrap();
    expected[1_000_448..1_000_448 + 123_904].fill(0x55);
    expected[..65_536].fill(0);
    let changed = site.folder.path().join("expected.raw");
    std::fs::write(&changed, expected).unwrap();
    assert_same(portal, &mine, &changed).await;
    assert_same(portal, &other, &source).await;
    let status = site.gateway.status().await;
    let moved = status.exports.iter().find(|export| export.target == mine.target).unwrap();
    assert!(moved.read_bytes >= 3 << 20 && moved.written_bytes >= 123_904, "{moved:?}");
    site.gateway.stop().await;
}

#[tokio::test]
async fn whoever_is_not_admitted_is_refused() {
    let site = Site::new(1 << 20).await;
    let (_, order) = site.export().await;
    let wrong_secret = ExportOrder { chap_secret: "abcdefgh-_123457".into(), ..order.clone() };
    let wrong_name = ExportOrder { chap_name: "n2".into(), ..order.clone() };
    let other_initiator =
        ExportOrder { initiator: "iqn.2026-01.dev.assay:node:n2:boot".parse().unwrap(), ..order.clone() };
    let other_target = ExportOrder { target: "iqn.2026-01.dev.assay:none".parse().unwrap(), ..order.clone() };
    for (what, bad) in
        [("secret", wrong_secret), ("name", wrong_name), ("initiator", other_initiator), ("target", other_target)]
    {
        let refused = libiscsi("iscsi-inq", site.gateway.portal, &bad).await;
        assert!(!refused.status.success(), "another {what} was let in: {}", text(&refused));
    }
    let url = format!("iscsi://{}/{}/0", site.gateway.portal, order.target);
    let refused = run(std::process::Command::new("iscsi-inq").args(["-i", order.initiator.as_str(), &url])).await;
    assert!(!refused.status.success(), "let in without CHAP: {}", text(&refused));
    assert!(libiscsi("iscsi-inq", site.gateway.portal, &order).await.status.success());
    site.gateway.stop().await;
}

#[tokio::test]
async fn a_second_session_is_refused_and_revocation_severs_the_first_at_once() {
    let site = Site::new(1 << 20).await;
    let (admission, order) = site.export().await;
    let held = Held::open(site.gateway.portal, &order).await;
    assert_eq!(site.gateway.status().await.exports[0].sessions, 1);
    let second = libiscsi("iscsi-inq", site.gateway.portal, &order).await;
    assert!(!second.status.success(), "a second session: {}", text(&second));

    let begun = Instant::now();
    site.gateway.take_down(admission).await;
    let severed_in = begun.elapsed();
    assert!(severed_in < Duration::from_millis(100), "{severed_in:?}");
    assert!(site.gateway.status().await.exports.is_empty());
    let late = libiscsi("iscsi-inq", site.gateway.portal, &order).await;
    assert!(!late.status.success(), "logged in after revocation");
    site.gateway.take_down(admission).await;
    drop(held);
    site.gateway.stop().await;
}

#[tokio::test]
async fn an_export_expires_by_the_gateways_own_clock() {
    let site = Site::new(1 << 20).await;
    let (_, order) = site.export().await;
    let _held = Held::open(site.gateway.portal, &order).await;
    site.clock.advance_ms(3_600_000);
    let mut expired = tokio::time::interval(Duration::from_millis(20));
    tokio::time::timeout(Duration::from_secs(5), async {
        while !site.gateway.status().await.exports.is_empty() {
            expired.tick().await;
        }
    })
    .await
    .unwrap();
    assert!(!libiscsi("iscsi-inq", site.gateway.portal, &order).await.status.success());
    let refused = site.gateway.put_up(AdmissionId::random(), &order).await.unwrap_err();
    assert_eq!(refused.problem().unwrap().kind, "expired");
    site.gateway.stop().await;
}

#[tokio::test]
async fn orders_are_idempotent_and_do_not_displace_one_another() {
    let site = Site::new(1 << 20).await;
    let (admission, order) = site.export().await;
    site.gateway.put_up(admission, &order).await.unwrap();
    let changed = ExportOrder { chap_secret: "another-secret-1".into(), ..order.clone() };
    let refused = site.gateway.put_up(admission, &changed).await.unwrap_err();
    assert_eq!(refused.problem().unwrap().status, 409);
    let refused = site.gateway.put_up(AdmissionId::random(), &order).await.unwrap_err();
    assert!(refused.problem().unwrap().detail.contains("disk"), "{refused}");
    let lost = ExportOrder { disk: assay_wire::id::DiskId::random(), ..order };
    let refused = site.gateway.put_up(AdmissionId::random(), &lost).await.unwrap_err();
    assert_eq!(refused.problem().unwrap().status, 503);
    site.gateway.stop().await;
}

#[tokio::test]
async fn a_restarted_gateway_serves_what_was_written_before() {
    let mut site = Site::new(1 << 20).await;
    let (admission, order) = site.export().await;
    // Not flushed: what was answered must outlive the process all the same.
    let written = qemu_io(site.gateway.portal, &order, &["write -P 0x77 4608 12288"]).await;
    assert!(written.status.success(), "{}", text(&written));
    let portal = site.gateway.portal;
    site.gateway.stop().await;
    site.gateway = RunningGateway::start_on(site.folder.path(), &site.clock, portal).await;
    site.gateway.put_up(admission, &order).await.unwrap();
    let read = qemu_io(portal, &order, &["read -P 0x77 4608 12288"]).await;
    assert!(read.status.success() && !text(&read).contains("failed"), "{}", text(&read));
    site.gateway.stop().await;
}

#[tokio::test]
async fn a_full_disk_is_told_to_the_initiator_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let small = SmallDisk::mount(&folder.path().join("small"), 12 << 20);
    let store = store_with_image(&small.0, &pattern(4 << 20));
    // Now nearly full: the source, and the image's data.
    std::fs::write(small.0.join("ballast"), vec![1; 4 << 20]).unwrap();
    let clock = Arc::new(ManualClock::new(NOW_MS));
    let gateway = RunningGateway::start(&small.0, &clock).await;
    let (admission, order) = (AdmissionId::random(), order(&store));
    gateway.put_up(admission, &order).await.unwrap();
    let kept = qemu_io(gateway.portal, &order, &["write -P 0x11 0 65536", "flush"]).await;
    assert!(kept.status.success(), "{}", text(&kept));
    let failed = qemu_io(gateway.portal, &order, &["write -P 0x22 65536 4128768"]).await;
    assert!(text(&failed).contains("No space left on device"), "{}", text(&failed));
    let read = qemu_io(gateway.portal, &order, &["read -P 0x11 0 65536"]).await;
    assert!(read.status.success() && !text(&read).contains("failed"), "{}", text(&read));
    // The disk is well again as soon as there is room.
    std::fs::remove_file(small.0.join("ballast")).unwrap();
    let written = qemu_io(gateway.portal, &order, &["write -P 0x22 65536 1048576", "flush"]).await;
    assert!(written.status.success() && !text(&written).contains("failed"), "{}", text(&written));
    gateway.stop().await;
}

#[tokio::test]
async fn garbage_and_silence_cost_nothing_but_their_own_connection() {
    let site = Site::new(1 << 20).await;
    let (_, order) = site.export().await;
    let mut garbage = TcpStream::connect(site.gateway.portal).await.unwrap();
    garbage.write_all(&[0xff; 4096]).await.unwrap();
    let mut answer = Vec::new();
    let _reset_is_fine = tokio::time::timeout(Duration::from_secs(5), garbage.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.len() < 200, "{} octets for garbage", answer.len());

    // Eight that say nothing, and a ninth that is turned away.
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(site.gateway.portal).await.unwrap());
    }
    let mut ninth = TcpStream::connect(site.gateway.portal).await.unwrap();
    let turned_away = tokio::time::timeout(Duration::from_secs(5), ninth.read(&mut [0; 1])).await.unwrap();
    assert!(matches!(turned_away, Ok(0) | Err(_)));
    drop(silent);
    // The portal notices that they are gone in its own time.
    tokio::time::timeout(Duration::from_secs(10), async {
        while !libiscsi("iscsi-inq", site.gateway.portal, &order).await.status.success() {}
    })
    .await
    .unwrap();
    site.gateway.stop().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_does_not_log_in_in_time_is_disconnected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    std::fs::write(&path, pattern(1 << 20)).unwrap();
    let file = ExportedFile::bind(file_export(&path)).await.unwrap();
    let (address, shutdown) = (file.address(), CancellationToken::new());
    let serving = tokio::spawn(file.serve(shutdown.clone()));
    let mut silent = TcpStream::connect(address).await.unwrap();
    let begun = tokio::time::Instant::now();
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(begun.elapsed().as_secs(), 15);
    shutdown.cancel();
    serving.await.unwrap();
}

fn file_export(path: &std::path::Path) -> FileExport {
    FileExport {
        path: path.to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        target: "iqn.2026-01.dev.assay:file".parse().unwrap(),
        initiator: None,
        chap: None,
        read_only: true,
    }
}

#[tokio::test]
async fn a_plain_file_can_be_exported_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    std::fs::write(&path, pattern((1 << 20) + 100)).unwrap();
    let file = ExportedFile::bind(file_export(&path)).await.unwrap();
    let (address, shutdown) = (file.address(), CancellationToken::new());
    let serving = tokio::spawn(file.serve(shutdown.clone()));
    let url = format!("iscsi://{address}/iqn.2026-01.dev.assay:file/0");
    let out = folder.path().join("copy.raw");
    let copied =
        run(std::process::Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &url]).arg(&out)).await;
    assert!(copied.status.success(), "{}", text(&copied));
    assert!(std::fs::read(&out).unwrap() == pattern(1 << 20));
    let written = run(std::process::Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512", &url])).await;
    assert!(
        text(&written).contains("rite-protected") || text(&written).contains("ead-only") || !written.status.success()
    );
    shutdown.cancel();
    serving.await.unwrap();
}
