//! Frames, for real: two hosts in network namespaces of their own on a real Open vSwitch, both talking all the time,
//! while the node's port is opened and closed. Not one frame sent after a port was said to be closed may arrive.
//!
//! The control does the same with a plain tag change, and must catch frames: otherwise the harness proves nothing.

use assay_isolation::switch::open_vswitch::OpenVswitch as Driver;
use assay_isolation::switch::{SiteVlans, SwitchDriver as _};
use assay_ovsdb::testing::{OpenVswitch, ScratchNamespace};
use assay_wire::isolation::PortIntent;
use assay_wire::net::VlanId;
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::Notify;

const TENANT: u16 = 120;
const QUARANTINE: u16 = 998;

/// Switch, node and tenant host.
struct Bench {
    driver: Driver,
    switch: OpenVswitch,
    traffic: Option<Traffic>,
    _spaces: [ScratchNamespace; 3],
    _folder: tempfile::TempDir,
}

/// Both hosts send to each other without pause. Every frame says whether the port was closed when it was sent.
struct Traffic {
    closed: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Counts {
    sent_closed: AtomicU64,
    leaked: AtomicU64,
    delivered_open: AtomicU64,
    changed: Notify,
}

fn vlan(id: u16) -> VlanId {
    VlanId::try_from(u32::from(id)).expect("a VLAN")
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().expect("ip runs");
    assert!(status.success(), "ip {arguments:?}");
}

impl Bench {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let [core, node, tenant] = [(); 3].map(|()| ScratchNamespace::new().expect("a namespace"));
        let switch = OpenVswitch::start_in(folder.path(), &core.namespace()).expect("Open vSwitch");
        switch.add_bridge("br0").expect("a bridge");
        for (host, port, last, tag, protected) in
            [(&node, "node", 1, QUARANTINE, true), (&tenant, "tenant", 2, TENANT, false)]
        {
            ip(&["-n", core.name(), "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.name()]);
            ip(&["-n", core.name(), "link", "set", port, "up"]);
            ip(&["-n", host.name(), "link", "set", "eth0", "address", &format!("52:54:00:00:00:0{last}"), "up"]);
            ip(&["-n", host.name(), "address", "add", &format!("10.77.0.{last}/24"), "dev", "eth0"]);
            let other = 3 - last;
            let (address, mac) = (format!("10.77.0.{other}"), format!("52:54:00:00:00:0{other}"));
            ip(&["-n", host.name(), "neigh", "add", &address, "lladdr", &mac, "dev", "eth0"]);
            // The userspace datapath does not finish checksums that the kernel left to a device.
            let ethtool = ["netns", "exec", host.name(), "ethtool", "-K", "eth0", "tx", "off"];
            assert!(Command::new("ip").args(ethtool).output().expect("ethtool runs").status.success());
            switch.add_port("br0", port, tag, protected).expect("a port");
        }
        let driver = Driver {
            switch: "sw".parse().expect("a name"),
            ovsdb_socket: switch.ovsdb_socket(),
            control_socket: switch.control_socket(),
            bridge: "br0".into(),
            vlans: SiteVlans { quarantine: vlan(QUARANTINE), airlock: vlan(999) },
            timeout: Duration::from_secs(5),
        };
        let traffic = Some(Traffic::start(&node, &tenant));
        Self { driver, switch, traffic, _spaces: [core, node, tenant], _folder: folder }
    }

    fn traffic(&self) -> &Traffic {
        self.traffic.as_ref().expect("it runs until the end")
    }

    /// Ends the traffic and reads the counts: sent while closed, leaked, delivered while open.
    fn finish(mut self) -> (u64, u64, u64) {
        let traffic = self.traffic.take().expect("it runs until the end");
        traffic.stop.store(true, Ordering::SeqCst);
        for thread in traffic.threads {
            thread.join().expect("no thread panicked");
        }
        let read = |count: &AtomicU64| count.load(Ordering::SeqCst);
        (read(&traffic.counts.sent_closed), read(&traffic.counts.leaked), read(&traffic.counts.delivered_open))
    }
}

impl Traffic {
    fn start(node: &ScratchNamespace, tenant: &ScratchNamespace) -> Self {
        let (closed, stop) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        let counts = Arc::new(Counts::default());
        let mut threads = Vec::new();
        for (host, own, other) in [(node, "10.77.0.1", "10.77.0.2"), (tenant, "10.77.0.2", "10.77.0.1")] {
            let socket = socket_in(host.name(), own);
            socket.connect((other, 9)).expect("a peer");
            let receiver = socket.try_clone().expect("a socket");
            receiver.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
            let (closed, stopped, counted) = (Arc::clone(&closed), Arc::clone(&stop), Arc::clone(&counts));
            threads.push(std::thread::spawn(move || send(&socket, &closed, &stopped, &counted)));
            let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&counts));
            threads.push(std::thread::spawn(move || receive(&receiver, &stopped, &counted)));
        }
        Self { closed, stop, counts, threads }
    }

    /// Waits until frames have been delivered, or sent, as many more as given.
    async fn more(&self, count: &AtomicU64, by: u64) {
        let from = count.load(Ordering::SeqCst);
        let enough = async {
            while count.load(Ordering::SeqCst) < from + by {
                self.counts.changed.notified().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), enough).await.expect("traffic flows");
    }
}

fn send(socket: &UdpSocket, closed: &AtomicBool, stop: &AtomicBool, counts: &Counts) {
    while !stop.load(Ordering::SeqCst) {
        let state = closed.load(Ordering::SeqCst);
        // Refused and unreachable are the other host's affair.
        let _ = socket.send(&[u8::from(state)]);
        if state {
            counts.sent_closed.fetch_add(1, Ordering::SeqCst);
            counts.changed.notify_one();
        }
        std::thread::park_timeout(Duration::from_micros(300));
    }
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, counts: &Counts) {
    let mut frame = [0; 8];
    while !stop.load(Ordering::SeqCst) {
        match socket.recv(&mut frame) {
            Ok(1) if frame[0] == 1 => counts.leaked.fetch_add(1, Ordering::SeqCst),
            Ok(1) => counts.delivered_open.fetch_add(1, Ordering::SeqCst),
            Ok(_) | Err(_) => 0,
        };
        counts.changed.notify_one();
    }
}

/// A socket stays in the namespace that its thread was in when it was made.
fn socket_in(namespace: &str, address: &str) -> UdpSocket {
    let (namespace, address) = (format!("/run/netns/{namespace}"), address.to_owned());
    let make = move || {
        setns(File::open(namespace).expect("the namespace"), CloneFlags::CLONE_NEWNET).expect("to enter it");
        UdpSocket::bind((address.as_str(), 9)).expect("a socket")
    };
    std::thread::spawn(make).join().expect("no panic")
}

/// Opens and closes the node's port `moves` times by `change`; `closed` only while it is said to be closed.
async fn moves(bench: &Bench, moves: usize, change: impl AsyncFn(PortIntent)) {
    let traffic = bench.traffic();
    for _ in 0..moves {
        traffic.closed.store(false, Ordering::SeqCst);
        change(PortIntent::Access { vlan: vlan(TENANT) }).await;
        traffic.more(&traffic.counts.delivered_open, 4).await;
        change(PortIntent::Quarantine).await;
        traffic.closed.store(true, Ordering::SeqCst);
        traffic.more(&traffic.counts.sent_closed, 20).await;
    }
}

#[tokio::test]
async fn nothing_crosses_a_port_that_was_said_to_be_closed() {
    let bench = Bench::start();
    let times = std::cell::RefCell::new(Vec::new());
    moves(&bench, 150, async |intent| {
        let started = tokio::time::Instant::now();
        bench.driver.apply("node", intent).await.expect("applied");
        times.borrow_mut().push(started.elapsed());
    })
    .await;
    let mut times = times.into_inner();
    times.sort_unstable();
    println!("a move took {:?} at the median, {:?} at the 99th percentile", times[150], times[297]);
    assert_eq!(bench.driver.observe("node").await.expect("observed").intent, Some(PortIntent::Quarantine));
    let (sent, leaked, delivered) = bench.finish();
    println!("leak-free sequence: 150 closings, {sent} frames sent while closed, {delivered} delivered while open");
    assert!(sent >= 3000 && delivered >= 600, "{sent} {delivered}");
    assert_eq!(leaked, 0, "of {sent} frames sent while closed");
}

#[tokio::test]
async fn the_same_harness_catches_frames_after_a_plain_tag_change() {
    let bench = Bench::start();
    moves(&bench, 150, async |intent| {
        let tag = match intent {
            PortIntent::Quarantine | PortIntent::Airlock => QUARANTINE,
            PortIntent::Access { vlan } => vlan.get(),
        };
        // Acknowledged by the switch: `ovs-vsctl` waits for `cur_cfg`.
        bench.switch.vsctl(&["set", "port", "node", &format!("tag={tag}"), "protected=false"]).expect("set");
    })
    .await;
    let (sent, leaked, _) = bench.finish();
    println!("plain tag change: 150 closings, {leaked} of {sent} frames sent while closed were delivered");
    assert!(leaked > 0, "none of {sent} frames leaked: this harness would not have seen a leak");
}

#[tokio::test]
async fn many_ports_move_at_once() {
    let bench = Bench::start();
    let ports: Vec<_> = (0..8).map(|index| format!("idle{index}")).collect();
    for port in &ports {
        bench.switch.add_port("br0", port, QUARANTINE, true).expect("a port");
    }
    for intent in [PortIntent::Access { vlan: vlan(TENANT) }, PortIntent::Airlock, PortIntent::Quarantine] {
        let moves = ports.iter().map(|port| bench.driver.apply(port, intent));
        for moved in futures_util::future::join_all(moves).await {
            moved.expect("applied");
        }
        for port in &ports {
            assert_eq!(bench.driver.observe(port).await.expect("observed").intent, Some(intent));
        }
    }
    let (_, leaked, _) = bench.finish();
    assert_eq!(leaked, 0);
}
