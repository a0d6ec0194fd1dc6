//! What the boot services can carry, all on one core: DHCP against the datagrams that the kernel can carry at all, TFTP
//! against tftpd-hpa. Two processes in lock-step on two cores would measure how fast a core wakes.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

#[path = "../../benches/figure/mod.rs"]
mod figure;

use assay_netboot::boot_plan::NotServed;
use assay_netboot::dhcp::client::ClientKind;
use assay_netboot::dhcp::engine::{Admitted, Authority, Decision, Engine, Service};
use assay_netboot::dhcp::lease::Scope;
use assay_netboot::dhcp::reply::{BootOptions, ReplyKind};
use assay_tftp::server::Report;
use assay_tftp::socket::Listener;
use assay_tftp::{Files, Limits, ListenConfig};
use assay_wire::net::MacAddr;
use bytes::Bytes;
use figure::{Better, Figure, in_turns, rate, wanted};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

fn main() {
    if !wanted("netboot") {
        return;
    }
    stay_on_one_core();
    dhcp();
    tftp();
}

/// Threads and processes started from here on stay there, too.
fn stay_on_one_core() {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let last = (0..CpuSet::count()).rev().find(|core| allowed.is_set(*core).unwrap()).unwrap();
    let mut one = CpuSet::new();
    one.set(last).unwrap();
    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
}

/// DISCOVER to OFFER, from the datagram's octets to the reply's, against datagrams of that size echoed over loopback: a
/// ratio above 1 says that the engine will not be what a boot storm waits for.
fn dhcp() {
    let mut storm = Storm::new();
    let echo = Echo::start();
    let (ours, theirs) = in_turns(|| rate(|| storm.round()), || rate(|| echo.round()));
    Figure {
        bench: "netboot",
        name: "DHCP engine: discover to offer",
        unit: "1/s",
        ours,
        against: "UDP echo over loopback",
        theirs,
        better: Better::Higher,
    }
    .report();
}

/// Four thousand machines that are powered on again and again.
struct Storm {
    engine: Engine,
    now_ms: i64,
    discovers: Vec<Vec<u8>>,
}

impl Storm {
    const MACHINES: u16 = 4000;

    fn new() -> Self {
        let scope = Scope {
            network: "10.99.0.0/16".parse().unwrap(),
            server: SERVER,
            router: None,
            pool: Some((Ipv4Addr::new(10, 99, 1, 0), Ipv4Addr::new(10, 99, 255, 0))),
            lease_duration: Duration::from_secs(600),
        };
        let discovers = (0..Self::MACHINES).map(discover).collect();
        Self { engine: Engine::new(scope, Vec::new()), now_ms: 0, discovers }
    }

    fn round(&mut self) -> u64 {
        self.now_ms += 10_000;
        for discover in &self.discovers {
            let from = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68);
            match self.engine.handle(self.now_ms, Service::Dhcp, from, discover, &Everybody) {
                Decision::Answer(answer) if answer.kind == ReplyKind::Offer => {}
                other => panic!("no offer: {other:?}"),
            }
        }
        Self::MACHINES.into()
    }
}

struct Everybody;

impl Authority for Everybody {
    fn admit(&self, _mac: MacAddr, _client: ClientKind) -> Result<Admitted, NotServed> {
        Ok(Admitted { reserved: None })
    }

    fn boot(&self, _now_ms: i64, _mac: MacAddr, _client: ClientKind, _address: Ipv4Addr) -> BootOptions {
        BootOptions::Tftp { file: "snponly.efi".into() }
    }
}

/// As OVMF sends it.
fn discover(machine: u16) -> Vec<u8> {
    let mut packet = vec![0; 236];
    packet[..4].copy_from_slice(&[1, 1, 6, 0]);
    packet[4..6].copy_from_slice(&machine.to_be_bytes());
    packet[10] = 0x80; // broadcast
    packet[28..32].copy_from_slice(&[0x52, 0x54, 0, 0]);
    packet[32..34].copy_from_slice(&machine.to_be_bytes());
    packet.extend([99, 130, 83, 99, 53, 1, 1, 57, 2, 5, 192]);
    packet.extend([55, 10, 1, 2, 3, 6, 12, 15, 43, 60, 66, 67]);
    packet.extend([97, 17]);
    packet.extend([0; 17]);
    packet.extend([94, 3, 1, 3, 0, 93, 2, 0, 7, 60, 32]);
    packet.extend(b"PXEClient:Arch:00007:UNDI:003000");
    packet.push(255);
    packet
}

/// A socket that sends back what comes, on a thread of its own.
struct Echo {
    client: UdpSocket,
}

impl Echo {
    fn start() -> Self {
        let (server, client) = (UdpSocket::bind(LOOPBACK).unwrap(), UdpSocket::bind(LOOPBACK).unwrap());
        client.connect(server.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, peer)) = server.recv_from(&mut buffer) {
                server.send_to(&buffer[..length], peer).unwrap();
            }
        });
        Self { client }
    }

    fn round(&self) -> u64 {
        self.client.send(&[7; 300]).unwrap();
        assert_eq!(self.client.recv(&mut [0; 2048]).unwrap(), 300);
        1
    }
}

/// One client reads one file, block by block, as firmware does.
fn tftp() {
    let content: Vec<u8> = (0..4 << 20).map(|index| u8::try_from(index % 253).unwrap()).collect();
    let ours = OurTftp::start(content.clone().into());
    let theirs = PeerTftp::start(&content);
    for block_bytes in [1468, 512] {
        let (our_rate, their_rate) = in_turns(
            || rate(|| fetch(ours.address, block_bytes, &content).unwrap()),
            || rate(|| fetch(theirs.address, block_bytes, &content).unwrap()),
        );
        let name = format!("TFTP, blocks of {block_bytes} octets");
        Figure {
            bench: "netboot",
            name: &name,
            unit: "MB/s",
            ours: our_rate / 1e6,
            against: "tftpd-hpa",
            theirs: their_rate / 1e6,
            better: Better::Higher,
        }
        .report();
    }
}

/// Reads the whole file and compares it; gives its length.
fn fetch(server: SocketAddr, block_bytes: usize, content: &[u8]) -> std::io::Result<u64> {
    let socket = UdpSocket::bind(LOOPBACK)?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    socket.send_to(format!("\0\u{1}file\0octet\0blksize\0{block_bytes}\0").as_bytes(), server)?;
    let mut packet = [0; 2048];
    let (length, transfer) = socket.recv_from(&mut packet)?;
    assert_eq!(packet[..2], [0, 6], "no OACK but {:?}", String::from_utf8_lossy(&packet[..length]));
    socket.send_to(&[0, 4, 0, 0], transfer)?;
    let mut read = 0;
    loop {
        let length = socket.recv(&mut packet)?;
        let (header, data) = packet[..length].split_at(4);
        assert_eq!(header[..2], [0, 3], "no DATA");
        assert!(content[read..].starts_with(data), "other octets at {read}");
        read += data.len();
        socket.send_to(&[0, 4, header[2], header[3]], transfer)?;
        if data.len() < block_bytes {
            assert_eq!(read, content.len());
            return Ok(u64::try_from(read).unwrap());
        }
    }
}

/// Ours, on a thread of its own.
struct OurTftp {
    address: SocketAddr,
    shutdown: CancellationToken,
}

impl OurTftp {
    fn start(content: Bytes) -> Self {
        let shutdown = CancellationToken::new();
        let (sender, receiver) = std::sync::mpsc::channel();
        let stop = shutdown.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let address = SocketAddr::from(LOOPBACK);
                let config =
                    ListenConfig { address, interface: None, limits: Limits::default(), segmentation_offload: true };
                let listener = Listener::bind(config).unwrap();
                sender.send(listener.address()).unwrap();
                listener.serve(Arc::new(OneFile(content)), stop).await.unwrap();
            });
        });
        Self { address: receiver.recv().unwrap(), shutdown }
    }
}

impl Drop for OurTftp {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

struct OneFile(Bytes);

impl Files for OneFile {
    fn open(&self, _peer: IpAddr, _name: &str) -> Option<Bytes> {
        Some(self.0.clone())
    }

    fn ended(&self, _report: &Report) {}
}

/// tftpd-hpa, on loopback only, gone with us.
struct PeerTftp {
    address: SocketAddr,
    process: Child,
    _folder: tempfile::TempDir,
}

impl PeerTftp {
    fn start(content: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // It serves as a user who owns nothing.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::write(folder.path().join("file"), content).unwrap();
        // Free a moment ago; it takes no socket from us.
        let address = UdpSocket::bind(LOOPBACK).unwrap().local_addr().unwrap();
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "/usr/sbin/in.tftpd", "--foreground", "--listen", "--secure", "--user"])
            .args(["nobody", "--address", &address.to_string()])
            .arg(folder.path())
            .stdin(Stdio::null())
            .spawn()
            .expect("tftpd-hpa starts (scripts/bench-packages.txt)");
        let peer = Self { address, process, _folder: folder };
        let deadline = Instant::now() + PATIENCE;
        while fetch(address, 1468, content).is_err() {
            assert!(Instant::now() < deadline, "tftpd-hpa did not answer in {PATIENCE:?}; it needs to be root");
        }
        peer
    }
}

impl Drop for PeerTftp {
    fn drop(&mut self) {
        // It may have died already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const LOOPBACK: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);
const PATIENCE: Duration = Duration::from_secs(10);
