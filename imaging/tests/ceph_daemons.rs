//! Disks on Ceph while monitors and OSDs come and go, at an IPv6 address, and with companions that systemd starts. All of it
//! through a companion that may only do what its filter and Landlock let it do.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::gateway::order::ExportOrder;
use assay_imaging::store::RbdClone;
use assay_rbd::testing::{Ceph, Daemon, ObjectStore, Shape};
use rig::rbd::*;
use rig::site::until;
use rig::*;
use rustix::process::{Signal, kill_process};
use serde_json::json;
use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

/// The OSDs that have a clone's objects.
fn osds_of(site: &RbdSite, clone: &RbdClone) -> BTreeSet<u8> {
    let id = site.pool.open_read_only(clone.image, None).unwrap().id().unwrap();
    let of = |object: u64| {
        let name = format!("rbd_data.{id}.{object:016x}");
        let (pool, namespace) = (clone.pool.as_str(), clone.namespace.as_str());
        let place = site
            .cluster
            .mon_query(
                &json!({"prefix": "osd map", "pool": pool, "object": name, "nspace": namespace, "format": "json"}),
            )
            .unwrap();
        u8::try_from(place["acting_primary"].as_u64().unwrap()).unwrap()
    };
    (0..DISK_BYTES.div_ceil(4 << 20)).map(of).collect()
}

/// Writes to every object, and reads it all back.
async fn writes_everywhere(held: &mut Held, octet: u8) {
    for object in 0..DISK_BYTES.div_ceil(4 << 20) {
        let at = format!("-P {octet} {}M 64k", 4 * object);
        for (command, done) in [("write", "wrote 65536/65536"), ("read", "read 65536/65536")] {
            let said = held.ask(&format!("{command} {at}")).await;
            assert!(said.contains(done), "{command} {at}: {said}");
        }
    }
}

async fn nobody_gave_up(site: &RbdSite) {
    let status = site.gateway.status().await;
    assert!(status.exports.iter().all(|export| export.restarts == 0), "{:?}", status.exports);
    let held = |export: &assay_imaging::gateway::order::ExportStatus| export.confinement.is_some();
    assert!(status.exports.iter().all(held));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_disk_on_several_osds_outlives_each_of_several_monitors_and_waits_for_an_osd() {
    let shape = Shape { monitors: 3, osds: 3, ..Shape::single(ObjectStore::Bluestore) };
    let mut ceph = tokio::task::block_in_place(|| Ceph::of(shape));
    let site = RbdSite::new(&ceph, &pattern(DISK_BYTES as usize)).await;
    // Where objects are put is chance.
    let (order, osds) = loop {
        let (_, order, clone) = site.export().await;
        let osds = osds_of(&site, &clone);
        if osds.len() > 1 {
            break (order, osds);
        }
    };
    let mut held = Held::open(site.gateway.portal, &order).await;
    writes_everywhere(&mut held, 1).await;
    for number in 0..3 {
        ceph.kill_daemon(Daemon::Monitor(number));
        writes_everywhere(&mut held, 10 + number).await;
        // Those that are left choose a leader first, which takes them longer than anybody waits for an answer.
        let decide = || assay_rbd::keys::blocklist(&site.cluster, "127.0.0.1:0/1").is_ok();
        until(async || tokio::task::block_in_place(decide)).await;
        // Whoever connects anew finds one of them.
        let (_, other, _) = site.export().await;
        assert_reads(&site, &other).await;
        tokio::task::block_in_place(|| ceph.start_daemon(Daemon::Monitor(number)));
    }
    for osd in osds {
        ceph.kill_daemon(Daemon::Osd(osd));
        tokio::task::block_in_place(|| ceph.start_daemon(Daemon::Osd(osd)));
        writes_everywhere(&mut held, 20 + osd).await;
    }
    nobody_gave_up(&site).await;
    drop(held);
    site.stop().await;
}

async fn assert_reads(site: &RbdSite, order: &ExportOrder) {
    let read = qemu_io(site.gateway.portal, order, &["write -P 7 8M 4k", "read -P 7 8M 4k"]).await;
    assert!(read.status.success() && !text(&read).contains("failed"), "{}", text(&read));
}

/// OSDs are asked without the monitor, as long as they are where they were; where they are, only a monitor says.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_disk_goes_on_while_the_one_monitor_is_away_and_after_it_has_come_back() {
    let mut ceph = tokio::task::block_in_place(|| Ceph::start(ObjectStore::Bluestore));
    let site = RbdSite::new(&ceph, &pattern(DISK_BYTES as usize)).await;
    let (_, order, _) = site.export().await;
    let mut held = Held::open(site.gateway.portal, &order).await;
    ceph.kill_daemon(Daemon::Monitor(0));
    writes_everywhere(&mut held, 1).await;
    // Killed while nobody could hear of it: what waits for it goes on when both are there again.
    ceph.kill_daemon(Daemon::Osd(0));
    held.say("aio_write -P 2 0 64k").await;
    tokio::task::block_in_place(|| {
        ceph.start_daemon(Daemon::Monitor(0));
        ceph.start_daemon(Daemon::Osd(0));
    });
    let wrote = held.hear_meanwhile().await;
    assert!(wrote.contains("wrote 65536/65536"), "{wrote}");
    writes_everywhere(&mut held, 3).await;
    nobody_gave_up(&site).await;
    drop(held);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn monitors_and_osds_may_have_ipv6_addresses() {
    let shape = Shape { address: Ipv6Addr::LOCALHOST.into(), ..Shape::single(ObjectStore::Memory) };
    let ceph = tokio::task::block_in_place(|| Ceph::of(shape));
    let site = RbdSite::new(&ceph, &pattern(DISK_BYTES as usize)).await;
    let (admission, order, clone) = site.export().await;
    assert!(clone.monitors.iter().all(std::net::SocketAddr::is_ipv6));
    let mut held = Held::open(site.gateway.portal, &order).await;
    writes_everywhere(&mut held, 1).await;
    // A client's address is told apart from its port here as well.
    let clients = site.pool.open_read_only(clone.image, None).unwrap().watchers().unwrap();
    assert!(clients.len() == 1 && clients[0].starts_with("[::1]:"), "{clients:?}");
    let stopped = assay_rbd::keys::revoke(&site.cluster, &clone.user, &site.pool, clone.image).unwrap();
    assert_eq!(stopped, clients);
    site.gateway.take_down(admission).await;
    drop(held);
    site.stop().await;
}

/// As a unit with `Accept=yes` and `StandardInput=socket` has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn systemd_may_start_the_companions() {
    let site = RbdSite::new(&Ceph::shared(), &pattern(DISK_BYTES as usize)).await;
    site.stop_starting();
    let socket = site.folder.path().join("rbd-disks.sock");
    std::fs::remove_file(&socket).unwrap();
    let mut systemd = Command::new("systemd-socket-activate")
        .args(["--accept", "--inetd", "--seqpacket", "--listen"])
        .arg(&socket)
        .arg(site.folder.path().join("assay-rbd-disk"))
        .arg((WORKER_USERS + 60).to_string())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until(async || socket.exists()).await;
    // It speaks in packets: whoever comes with a stream is none of ours.
    assert!(UnixStream::connect(&socket).is_err());
    let (first, order, clone) = site.export().await;
    let (second, _, _) = site.export().await;
    assert_eq!(site.companions().len(), 2, "one each");
    let mut held = Held::open(site.gateway.portal, &order).await;
    writes_everywhere(&mut held, 5).await;
    nobody_gave_up(&site).await;
    // It starts another one for whoever asks again.
    site.companions().into_iter().for_each(|pid| kill_process(pid, Signal::KILL).unwrap());
    until(async || site.gateway.status().await.exports.iter().all(|export| export.restarts == 1)).await;
    writes_everywhere(&mut held, 6).await;
    assert!(site.on_ceph(&clone, 0, 65_536) == [6; 65_536]);
    drop(held);
    for admission in [first, second] {
        site.gateway.take_down(admission).await;
    }
    assert_eq!(site.companions(), []);
    systemd.kill().unwrap();
    systemd.wait().unwrap();
    site.stop().await;
}
