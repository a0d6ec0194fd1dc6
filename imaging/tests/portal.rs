//! The gateway's portal against real initiators: libiscsi's tools and QEMU.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::gateway::Limits;
use assay_imaging::gateway::order::ExportOrder;
use assay_imaging::store::overlay::DiskFiles;
use assay_imaging::{ExportedFile, FileExport};
use assay_service::CancellationToken;
use assay_service::clock::ManualClock;
use assay_wire::id::AdmissionId;
use assay_wire::imaging::ChapAlgorithms;
use rig::site::until;
use rig::*;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

struct Site {
    folder: tempfile::TempDir,
    store: assay_imaging::store::LocalStore,
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

/// libiscsi offers MD5 and nothing else.
#[tokio::test]
async fn md5_is_refused_where_chap_is_to_be_better() {
    let site = Site::new(1 << 20).await;
    let strict = ExportOrder { chap: ChapAlgorithms::Sha256, ..order(&site.store) };
    let lax = order(&site.store);
    for order in [&strict, &lax] {
        site.gateway.put_up(AdmissionId::random(), order).await.unwrap();
    }
    let refused = libiscsi("iscsi-readcapacity16", site.gateway.portal, &strict).await;
    assert!(!refused.status.success() && text(&refused).contains("Authentication"), "{}", text(&refused));
    let taken = libiscsi("iscsi-readcapacity16", site.gateway.portal, &lax).await;
    assert!(taken.status.success(), "{}", text(&taken));
    site.gateway.stop().await;
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
    let url = format!("iscsi://{}/{}/0", way(order.address, site.gateway.portal).await, order.target);
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
    let free = |order: &ExportOrder| ExportOrder {
        target: "iqn.2026-01.dev.assay:other".parse().unwrap(),
        address: some_address(),
        ..order.clone()
    };
    for (part, again) in [
        ("target", ExportOrder { target: order.target.clone(), ..free(&order) }),
        ("address", ExportOrder { address: order.address, ..free(&order) }),
        ("disk", free(&order)),
    ] {
        let refused = site.gateway.put_up(AdmissionId::random(), &again).await.unwrap_err();
        assert!(refused.problem().unwrap().detail.contains(part), "{part}: {refused}");
    }
    let lost = ExportOrder { disk: assay_wire::id::DiskId::random(), ..free(&order) };
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
    let mut garbage = connect_from(order.address, site.gateway.portal).await.unwrap();
    garbage.write_all(&[0xff; 4096]).await.unwrap();
    let mut answer = Vec::new();
    let _reset_is_fine = tokio::time::timeout(Duration::from_secs(5), garbage.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.len() < 200, "{} octets for garbage", answer.len());

    // Eight that say nothing, and a ninth that is turned away.
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(connect_from(order.address, site.gateway.portal).await.unwrap());
    }
    let mut ninth = connect_from(order.address, site.gateway.portal).await.unwrap();
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

#[tokio::test]
async fn whoever_does_not_log_in_in_time_is_disconnected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    std::fs::write(&path, pattern(1 << 20)).unwrap();
    let limits = Limits { login_ms: 300, ..Limits::default() };
    let file = ExportedFile::bind(FileExport { limits, ..file_export(&path) }).await.unwrap();
    let (address, shutdown) = (file.address(), CancellationToken::new());
    let serving = tokio::spawn(file.serve(shutdown.clone()));
    let begun = Instant::now();
    let mut silent = TcpStream::connect(address).await.unwrap();
    // One that says something now and then is no better.
    let mut slow = TcpStream::connect(address).await.unwrap();
    slow.write_all(&[0x43; 20]).await.unwrap();
    for stream in [&mut silent, &mut slow] {
        let closed = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut [0; 1])).await.unwrap();
        assert_eq!(closed.unwrap(), 0);
        assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    }
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
        limits: Limits::default(),
        worker: Some(WORKER.into()),
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

#[tokio::test]
async fn a_worker_that_dies_is_started_anew_and_nobody_else_notices() {
    let site = Site::new(1 << 20).await;
    let ((mine_id, mine), (other_id, other)) = (site.export().await, site.export().await);
    let mut theirs = Held::open(site.gateway.portal, &other).await;
    let written = qemu_io(site.gateway.portal, &mine, &["write -P 0x33 4096 8192"]).await;
    assert!(written.status.success(), "{}", text(&written));
    let pid = worker_of(&site.store, &mine);
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let export = async |id: AdmissionId| {
        let status = site.gateway.status().await;
        status.exports.into_iter().find(|export| export.admission == id).unwrap()
    };
    until(async || {
        let export = export(mine_id).await;
        export.restarts == 1 && export.confinement.is_some()
    })
    .await;
    assert_ne!(worker_of(&site.store, &mine), pid);
    // Never flushed, and still there: it was answered.
    let read = qemu_io(site.gateway.portal, &mine, &["read -P 0x33 4096 8192"]).await;
    assert!(read.status.success() && !text(&read).contains("failed"), "{}", text(&read));
    let answer = theirs.ask("read 0 4096").await;
    assert!(answer.contains("read 4096/4096"), "{answer}");
    assert_eq!(export(other_id).await.restarts, 0);
    site.gateway.stop().await;
}

#[tokio::test]
async fn a_golden_image_that_is_not_the_one_on_record_is_not_served() {
    let site = Site::new(1 << 20).await;
    let mut other = order(&site.store);
    // As if image and manifest had been exchanged on the host: what is on record is another.
    other.location.root[0] ^= 1;
    let refused = site.gateway.put_up(AdmissionId::random(), &other).await.unwrap_err();
    assert!(format!("{refused:?}").contains("on record is"), "{refused:?}");
    assert!(site.gateway.status().await.exports.is_empty());
    site.gateway.stop().await;
}

#[tokio::test]
async fn revocation_stops_a_live_writer() {
    let site = Site::new(4 << 20).await;
    let (admission, order) = site.export().await;
    let mut held = Held::open(site.gateway.portal, &order).await;
    let writer =
        tokio::spawn(async move { while held.ask("write -P 0x44 0 1M").await.contains("wrote 1048576/1048576") {} });
    until(async || site.gateway.status().await.exports[0].written_bytes > 4 << 20).await;
    let pid = worker_of(&site.store, &order);
    let begun = Instant::now();
    site.gateway.take_down(admission).await;
    let severed_in = begun.elapsed();
    assert!(severed_in < Duration::from_millis(100), "{severed_in:?}");
    // Reaped, so nothing writes any more: its lock on the disk is free.
    assert!(rustix::process::test_kill_process(pid).is_err(), "the worker is still there");
    DiskFiles::open(&site.folder.path().join("store"), order.disk).unwrap();
    writer.abort();
    site.gateway.stop().await;
}

#[tokio::test]
async fn workers_end_with_their_gateway() {
    let site = Site::new(1 << 20).await;
    let (_, order) = site.export().await;
    let pid = worker_of(&site.store, &order);
    site.gateway.stop().await;
    assert!(rustix::process::test_kill_process(pid).is_err(), "the worker outlived its gateway");
}

#[tokio::test]
async fn further_sessions_are_for_the_same_initiator_as_many_as_ordered() {
    let site = Site::new(1 << 20).await;
    let order = ExportOrder { sessions: 2, ..order(&site.store) };
    site.gateway.put_up(AdmissionId::random(), &order).await.unwrap();
    let (mut first, mut second) =
        (Held::open(site.gateway.portal, &order).await, Held::open(site.gateway.portal, &order).await);
    assert_eq!(site.gateway.status().await.exports[0].sessions, 2);
    let third = libiscsi("iscsi-inq", site.gateway.portal, &order).await;
    assert!(!third.status.success(), "a third session: {}", text(&third));
    for path in [&mut first, &mut second] {
        let answer = path.ask("read 0 4096").await;
        assert!(answer.contains("read 4096/4096"), "{answer}");
    }
    let status = site.gateway.status().await.exports.remove(0);
    assert!(status.reads.count >= 4 && status.reads.p99_us >= status.reads.p50_us, "{status:?}");
    site.gateway.stop().await;
}

/// Ten thousand, half from a node that has an export and half from nowhere: descriptors and memory stay bounded, and
/// another node's export answers all the while.
#[tokio::test]
async fn ten_thousand_half_open_connections_are_bounded_and_bother_nobody_else() {
    const ATTEMPTS: usize = 10_000;
    let limit = rustix::process::Rlimit { current: Some(20_000), maximum: Some(20_000) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let site = Site::new(1 << 20).await;
    let ((_, malicious), (_, other)) = (site.export().await, site.export().await);
    let mut held = Held::open(site.gateway.portal, &other).await;
    let own_before = open_files("self");
    let mut open = Vec::new();
    for attempt in 0..ATTEMPTS {
        let from = if attempt % 2 == 0 { malicious.address } else { "127.77.7.7".parse().unwrap() };
        // Refused when the backlog is full, which bounds as well.
        let connecting = tokio::time::timeout(Duration::from_secs(5), connect_from(from, site.gateway.portal));
        if let Ok(Ok(mut stream)) = connecting.await {
            let _closed_already = stream.write_all(&[0x43]).await;
            open.push(stream);
        }
    }
    assert!(open.len() > ATTEMPTS / 2, "only {} connections were attempted", open.len());
    let answer = held.ask("read 0 4096").await;
    assert!(answer.contains("read 4096/4096"), "{answer}");
    let status = site.gateway.status().await;
    assert!(status.exports.iter().all(|export| export.restarts == 0), "{status:?}");
    let worker = worker_of(&site.store, &malicious).as_raw_nonzero().get().to_string();
    // Standard ones, the clone's three, the golden image's four; and as many as may be half open.
    assert!(open_files(&worker) <= 10 + 8, "{} descriptors in the worker", open_files(&worker));
    // The gateway is this process, like the initiators: what is beyond their sockets is its own.
    // So are the gateways of other tests at this moment, whose descriptors go with them.
    let own = || open_files("self").saturating_sub(own_before).saturating_sub(open.len());
    rig::site::until(async || own() <= 16).await;
    let resident = pss_kib(&worker);
    eprintln!("worker under 10,000 half-open connections: {resident} KiB");
    assert!(resident < 10 * 1024, "{resident} KiB");
    site.gateway.stop().await;
}

#[tokio::test]
async fn a_worker_takes_less_than_ten_mebibytes() {
    let site = Site::new(8 << 20).await;
    let (_, order) = site.export().await;
    for (what, commands) in [
        ("at rest", vec!["read 0 512"]),
        ("after large reads", vec!["read 0 8M"; 8]),
        ("after large writes", vec!["write 0 8M"; 8]),
    ] {
        let done = qemu_io(site.gateway.portal, &order, &commands).await;
        assert!(done.status.success(), "{}", text(&done));
        let resident = pss_kib(&worker_of(&site.store, &order).as_raw_nonzero().get().to_string());
        eprintln!("worker {what}: {resident} KiB");
        assert!(resident < 10 * 1024, "{what}: {resident} KiB");
    }
    site.gateway.stop().await;
}

fn open_files(process: &str) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}

/// Memory that is the process's own, and its share of what others have mapped, too.
fn pss_kib(process: &str) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let line = smaps.lines().find(|line| line.starts_with("Pss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
