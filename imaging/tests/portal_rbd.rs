//! Disks on a real Ceph, through gateway, worker and companion, against real initiators.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::gateway::order::ExportOrder;
use assay_imaging::store::RbdClone;
use assay_rbd::keys;
use assay_rbd::testing::{Ceph, ObjectStore};
use assay_wire::id::AdmissionId;
use rig::rbd::*;
use rig::site::until;
use rig::*;
use rustix::process::{Signal, kill_process, test_kill_process};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_initiator_writes_to_its_clone_and_reads_it_over_its_golden_image() {
    let content = pattern(DISK_BYTES as usize);
    let site = RbdSite::new(&Ceph::shared(), &content).await;
    let ((_, mine, clone), (_, other, _)) = (site.export().await, site.export().await);
    let portal = site.gateway.portal;
    let source = site.folder.path().join("local/source.raw");
    assert_same(portal, &mine, &source).await;
    // Across an object's end; a whole object to zero; the disk's last octets; and more than one request is for.
    let commands = [
        "write -P 0x55 4128768 131072",
        "write -z 8M 4M",
        "write -P 0x66 18873856 512",
        "write -P 0x77 12M 3M",
        "flush",
    ];
    let written = qemu_io(portal, &mine, &commands).await;
    assert!(written.status.success() && !text(&written).contains("failed"), "{}", text(&written));
    let mut expected = content;
    expected[4_128_768..4_128_768 + 131_072].fill(0x55);
    expected[8 << 20..12 << 20].fill(0);
    expected[18_873_856..].fill(0x66);
    expected[12 << 20..15 << 20].fill(0x77);
    let changed = site.folder.path().join("expected.raw");
    std::fs::write(&changed, &expected).unwrap();
    assert_same(portal, &mine, &changed).await;
    assert_same(portal, &other, &source).await;
    assert!(site.on_ceph(&clone, 0, expected.len()) == expected);
    let status = site.gateway.status().await;
    let moved = status.exports.iter().find(|export| export.target == mine.target).unwrap();
    assert!(moved.read_bytes >= DISK_BYTES && moved.written_bytes >= 3 << 20, "{moved:?}");

    // What started the companions may end. A gateway that starts anew needs it again.
    site.stop_starting();
    let read = qemu_io(portal, &mine, &["read -P 0x66 18873856 512", "write -P 0x67 18873856 512"]).await;
    assert!(read.status.success() && !text(&read).contains("failed"), "{}", text(&read));
    site.gateway.stop().await;
}

/// Parts of a disk that its initiator is told are not mapped, as QEMU asks after them (GET LBA STATUS).
async fn unmapped(portal: std::net::SocketAddr, order: &ExportOrder) -> Vec<std::ops::Range<u64>> {
    let [object, secret, options] = qemu_options(portal, order).await;
    let arguments = ["map", "--output=json", &object, &secret, "--image-opts", &options];
    let map = run(std::process::Command::new("qemu-img").args(arguments)).await;
    assert!(map.status.success(), "{}", text(&map));
    let map: Vec<serde_json::Value> = serde_json::from_slice(&map.stdout).unwrap();
    let parts = map.iter().filter(|part| part["zero"] == true && part["data"] == false);
    let octets = |part: &serde_json::Value, field: &str| part[field].as_u64().unwrap();
    parts.map(|part| octets(part, "start")..octets(part, "start") + octets(part, "length")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_initiator_is_told_what_takes_no_room() {
    let site = RbdSite::new(&Ceph::shared(), &pattern(DISK_BYTES as usize)).await;
    let (_, order, _) = site.export().await;
    let portal = site.gateway.portal;
    let before = unmapped(portal, &order).await;
    assert!(
        !before.is_empty() && before.iter().all(|hole| hole.end - hole.start < MIB),
        "the golden image's: {before:?}"
    );
    // An object emptied, of which a little is written then; and one that is the clone's.
    let commands = ["discard 4M 8M", "write -P 0x55 4M 64k", "write -P 0x55 12M 64k", "flush"];
    let written = qemu_io(portal, &order, &commands).await;
    assert!(written.status.success() && !text(&written).contains("failed"), "{}", text(&written));
    let holes = unmapped(portal, &order).await;
    assert!(holes.contains(&(4 * MIB + 65_536..12 * MIB)), "{holes:?}");
    let within =
        |range: std::ops::Range<u64>| holes.iter().any(|hole| hole.start < range.end && range.start < hole.end);
    assert!(!within(4 * MIB..4 * MIB + 65_536) && !within(12 * MIB..16 * MIB), "{holes:?}");
    let below =
        |holes: &[std::ops::Range<u64>]| holes.iter().filter(|hole| hole.end < 4 * MIB).cloned().collect::<Vec<_>>();
    assert_eq!(below(&holes), below(&before), "where it is the golden image's still");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn while_an_osd_is_away_writes_wait_and_the_golden_image_is_read_from_its_file() {
    let mut ceph = Ceph::start(ObjectStore::Bluestore);
    // Other content than the file's: so it is seen which of them was asked.
    let site = RbdSite::new(&ceph, &vec![0xee; DISK_BYTES as usize]).await;
    let (_, order, clone) = site.export().await;
    assert_same(site.gateway.portal, &order, &site.folder.path().join("local/source.raw")).await;
    let mut held = Held::open(site.gateway.portal, &order).await;
    let wrote = held.ask("write -P 0x11 0 64k").await;
    assert!(wrote.contains("wrote 65536/65536"), "{wrote}");
    ceph.kill_osd();
    held.say("aio_write -P 0x22 64k 64k").await;
    // The same session, and the same connection.
    held.say("read -v 4M 512").await;
    let read = held.hear_meanwhile().await;
    let first = format!("{:02x}", pattern(DISK_BYTES as usize)[4 << 20]);
    assert!(read.contains(&format!("00400000:  {first} ")), "{read}");
    let lines = held.hear_until("read 512/512").await;
    assert!(!lines.contains("wrote"), "an OSD that is dead has written: {lines}");
    tokio::task::block_in_place(|| ceph.start_osd());
    let wrote = held.hear_meanwhile().await;
    assert!(wrote.contains("wrote 65536/65536 bytes at offset 65536"), "{wrote}");
    let status = site.gateway.status().await;
    assert_eq!(status.exports[0].restarts, 0, "somebody gave up");
    // Ceph's content around what was written: the whole object is the clone's.
    let octets = site.on_ceph(&clone, 0, 3 * 65_536);
    assert!(octets[..65_536] == [0x11; 65_536] && octets[65_536..131_072] == [0x22; 65_536]);
    assert!(octets[131_072..] == [0xee; 65_536]);
    drop(held);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn revocation_stops_a_live_writer_and_leaves_nobody_who_could_write() {
    let site = RbdSite::new(&Ceph::shared(), &[0xee; 4096]).await;
    let (admission, order, clone) = site.export().await;
    let writer = write_without_end(&site, &order).await;
    until(async || site.gateway.status().await.exports[0].written_bytes > 4 << 20).await;
    let begun = Instant::now();
    site.gateway.take_down(admission).await;
    let severed_in = begun.elapsed();
    let left = (site.workers(), site.companions());
    let at_once = site.on_ceph(&clone, 0, 1 << 20);
    assert!(severed_in < Duration::from_millis(100), "{severed_in:?}");
    assert_eq!(left, (Vec::new(), Vec::new()), "somebody is there who could write");
    assert_unchanged(&site, &clone, &at_once).await;
    writer.abort();
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_writer_whose_key_alone_is_revoked_stops_within_a_second() {
    let site = RbdSite::new(&Ceph::shared(), &[0xee; 4096]).await;
    let (admission, order, clone) = site.export().await;
    let writer = write_without_end(&site, &order).await;
    until(async || site.gateway.status().await.exports[0].written_bytes > 4 << 20).await;
    let [companion] = site.companions()[..] else { panic!("not one companion") };
    let begun = Instant::now();
    let clients = tokio::task::block_in_place(|| keys::revoke(&site.cluster, &clone.user, &site.pool, clone.image));
    assert_eq!(clients.unwrap().len(), 1);
    until(async || test_kill_process(companion).is_err()).await;
    let stopped_in = begun.elapsed();
    eprintln!("a companion stopped {stopped_in:?} after the revocation of its key began");
    assert!(stopped_in < Duration::from_secs(1), "{stopped_in:?}");
    assert_unchanged(&site, &clone, &site.on_ceph(&clone, 0, 1 << 20)).await;
    // Its successors get in no more.
    assert!(site.gateway.status().await.exports[0].confinement.is_none());
    let begun = Instant::now();
    site.gateway.take_down(admission).await;
    assert!(begun.elapsed() < Duration::from_millis(100), "{:?}", begun.elapsed());
    writer.abort();
    site.stop().await;
}

/// Writes another octet each time.
async fn write_without_end(site: &RbdSite, order: &ExportOrder) -> tokio::task::JoinHandle<()> {
    let mut held = Held::open(site.gateway.portal, order).await;
    tokio::spawn(async move {
        for octet in (1..=255).cycle() {
            let wrote = held.ask(&format!("write -P {octet} 0 1M")).await;
            assert!(wrote.contains("wrote 1048576/1048576"), "{wrote}");
        }
    })
}

async fn assert_unchanged(site: &RbdSite, clone: &RbdClone, octets: &[u8]) {
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    for _ in 0..10 {
        ticks.tick().await;
        assert!(site.on_ceph(clone, 0, octets.len()) == octets, "somebody still writes");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_companion_that_dies_is_started_anew_with_its_worker_and_the_initiator_goes_on() {
    let site = RbdSite::new(&Ceph::shared(), &pattern(DISK_BYTES as usize)).await;
    let (_, order, _) = site.export().await;
    let mut held = Held::open(site.gateway.portal, &order).await;
    let wrote = held.ask("write -P 0x33 4M 64k").await;
    assert!(wrote.contains("wrote 65536/65536"), "{wrote}");
    let ([companion], [worker]) = (&site.companions()[..], &site.workers()[..]) else { panic!("not one of each") };
    kill_process(*companion, Signal::KILL).unwrap();
    until(async || {
        let export = site.gateway.status().await.exports.remove(0);
        export.restarts == 1 && export.confinement.is_some()
    })
    .await;
    let ([successor], [other]) = (&site.companions()[..], &site.workers()[..]) else { panic!("not one of each") };
    assert!(successor != companion && other != worker);
    let read = held.ask("read -P 0x33 4M 64k").await;
    assert!(read.contains("read 65536/65536"), "{read}");
    // And so does a worker's end have its companion end.
    kill_process(*other, Signal::KILL).unwrap();
    until(async || site.gateway.status().await.exports[0].restarts == 2).await;
    assert!(test_kill_process(*successor).is_err(), "two companions have the clone");
    let read = held.ask("read -P 0x33 4M 64k").await;
    assert!(read.contains("read 65536/65536"), "{read}");
    drop(held);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_not_the_disk_of_the_order_is_not_served() {
    let site = RbdSite::new(&Ceph::shared(), &[0xee; 4096]).await;
    let (mine, other) = (site.clone(), site.clone());
    let elsewhere = RbdSite::new(&Ceph::shared(), &[0xee; 4096]).await;
    let refused = [
        ("another user's key", RbdClone { key: other.key.clone(), ..mine.clone() }, "connecting to the Ceph monitors"),
        ("another clone", RbdClone { image: other.image, ..mine.clone() }, "opening the image"),
        ("another golden image", RbdClone { layers: elsewhere.clone().layers, ..mine.clone() }, "not of"),
        ("no golden image", RbdClone { layers: Vec::new(), ..mine.clone() }, "of nothing that is known"),
        ("another size", RbdClone { byte_len: DISK_BYTES - MIB, ..mine.clone() }, "octets, not"),
        ("no such namespace", RbdClone { namespace: elsewhere.clone().namespace, ..mine.clone() }, "opening the image"),
    ];
    for (what, clone, why) in refused {
        let refused = site.gateway.put_up(AdmissionId::random(), &site.order(clone)).await.expect_err(what);
        let problem = refused.problem().unwrap();
        assert_eq!((problem.status, problem.kind.as_str()), (503, "disk"), "{what}");
        assert!(problem.detail.contains(why), "{what}: {}", problem.detail);
        assert!(!problem.detail.contains(mine.key.expose()) && !problem.detail.contains(other.key.expose()));
    }
    until(async || site.companions().is_empty()).await;
    assert!(site.gateway.status().await.exports.is_empty());
    site.gateway.put_up(AdmissionId::random(), &site.order(mine.clone())).await.unwrap();

    // And where nobody starts companions, nothing on Ceph is served.
    std::fs::remove_file(site.folder.path().join("rbd-disks.sock")).unwrap();
    let refused = site.gateway.put_up(AdmissionId::random(), &site.order(other)).await.unwrap_err();
    assert!(refused.problem().unwrap().detail.contains("rbd-disks.sock"), "{refused}");
    elsewhere.stop().await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_worker_takes_less_than_ten_mebibytes_beside_its_companion() {
    let site = RbdSite::new(&Ceph::shared(), &pattern(DISK_BYTES as usize)).await;
    let (_, order, _) = site.export().await;
    for (what, commands) in [
        ("at rest", vec!["read 0 512"]),
        ("after large reads", vec!["read 0 8M"; 8]),
        ("after large writes", vec!["write 0 8M"; 8]),
        ("after large reads of the clone's own", vec!["read 0 8M"; 8]),
    ] {
        let done = qemu_io(site.gateway.portal, &order, &commands).await;
        assert!(done.status.success() && !text(&done).contains("failed"), "{}", text(&done));
        let (worker, companion) = (pss_kib(site.workers()[0]), pss_kib(site.companions()[0]));
        eprintln!("{what}: worker {worker} KiB, companion {companion} KiB");
        assert!(worker < 10 * 1024, "{what}: {worker} KiB");
    }
    site.stop().await;
}
