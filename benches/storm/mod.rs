//! A boot storm, wherever the disks are: what one boot reads ([`Trace`]), a golden image each of whose pages says which it is
//! ([`Numbered`]), our gateway with an export for each node ([`Site`]) or tgt with a target for each ([`of_tgt`]), and all
//! nodes reading at once ([`storm`]).
//!
//! The trace is made, not recorded: deterministic, of a boot's shape, as long as what one boot of a Debian node was seen to
//! read (85 MB of 651). The initiator is the same for everybody; every page that it gets is looked at.

use crate::initiator::{Extent, Login, Session};
use crate::targets::{TGT_LUN, Tgt};
use assay_imaging::gateway::Limits;
use assay_imaging::gateway::order::ExportOrder;
use assay_imaging::store::{Content, ImageStore, StoreError};
use assay_imaging::{Gateway, GatewayConfig};
use assay_service::CancellationToken;
use assay_service::client::ServiceClient;
use assay_service::clock::{Clock as _, SystemClock};
use assay_wire::id::{AdmissionId, DiskId, ImageKey};
use assay_wire::imaging::ChapAlgorithms;
use socket2::{Domain, Socket, Type};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::time::Instant;

/// A node that boots: its address, the portal that it goes to, and as whom.
pub(crate) struct Node {
    pub(crate) address: Ipv4Addr,
    pub(crate) portal: SocketAddr,
    pub(crate) login: Login,
}

impl Node {
    /// Connects from the node's own address, and logs in.
    pub(crate) fn log_in(&self) -> Session {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((self.address, 0)).into()).unwrap();
        socket.connect(&self.portal.into()).unwrap();
        Session::log_in(TcpStream::from(socket), &self.login).unwrap()
    }
}

/// What reading took.
pub(crate) struct Took {
    pub(crate) seconds: f64,
    /// Of what the caller counts.
    pub(crate) mebibytes: f64,
}

/// From when all are logged in until all have read everything; `octets` answers with what was read so far from wherever
/// that is counted.
pub(crate) fn storm(trace: &Trace, nodes: &[Node], octets: impl Fn() -> u64) -> Took {
    let before = octets();
    let gate = Barrier::new(nodes.len() + 1);
    let seconds = std::thread::scope(|scope| {
        let boots: Vec<_> = nodes
            .iter()
            .map(|node| {
                let gate = &gate;
                scope.spawn(move || {
                    let mut session = node.log_in();
                    gate.wait();
                    session.read(&trace.reads, QUEUE_DEPTH, look_at).unwrap();
                })
            })
            .collect();
        gate.wait();
        let begun = Instant::now();
        boots.into_iter().for_each(|boot| boot.join().unwrap());
        begun.elapsed().as_secs_f64()
    });
    Took { seconds, mebibytes: mebibytes(octets() - before) }
}

/// Each page says its number, at both ends.
fn look_at(offset: u64, data: &[u8]) {
    for (page, number) in data.chunks(PAGE_LEN).zip(offset / PAGE_BYTES..) {
        let [first, last] =
            [&page[..8], &page[page.len() - 8..]].map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        assert_eq!((first, last), (word_of(number), word_of(number)), "page {number}");
    }
}

fn word_of(page: u64) -> u64 {
    (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The golden image: no page like another.
pub(crate) struct Numbered;

impl Content for Numbered {
    fn virtual_bytes(&self) -> u64 {
        IMAGE_BYTES
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        for (word, at) in buffer.chunks_exact_mut(8).zip((offset..).step_by(8)) {
            word.copy_from_slice(&word_of(at / PAGE_BYTES).to_le_bytes());
        }
        Ok(())
    }

    fn identity(&self) -> Option<String> {
        None
    }
}

/// What a boot reads: kernel and initrd, then many files, each in a run whose requests grow as the initiator's kernel reads
/// ahead, and now and then a file anew (the initramfs reads with another cache than the system after it).
pub(crate) struct Trace {
    reads: Vec<Extent>,
    /// What is read at least once.
    pub(crate) set_mebibytes: f64,
}

impl Trace {
    pub(crate) fn new() -> Self {
        let (mut files, mut octets) = (Files::default(), 0);
        let mut reads = Vec::new();
        while octets < BOOT_BYTES {
            let (start, length) = files.next();
            let (mut offset, mut request) = (start, FIRST_REQUEST_BYTES);
            while offset < start + length {
                let length = request.min(start + length - offset);
                reads.push(Extent { offset, length: u32::try_from(length).unwrap() });
                offset += length;
                octets += length;
                request = (request * 2).min(LAST_REQUEST_BYTES);
            }
        }
        let mut pages: Vec<u64> = reads
            .iter()
            .flat_map(|read| (read.offset..read.offset + u64::from(read.length)).step_by(PAGE_LEN))
            .collect();
        pages.sort_unstable();
        pages.dedup();
        Self { reads, set_mebibytes: mebibytes(pages.len() as u64 * PAGE_BYTES) }
    }
}

/// Files as they are read: where each is, and how long.
struct Files {
    chance: Chance,
    seen: Vec<(u64, u64)>,
    at: u64,
}

impl Default for Files {
    fn default() -> Self {
        Self { chance: Chance(SEED), seen: Vec::new(), at: 64 << 20 }
    }
}

impl Files {
    fn next(&mut self) -> (u64, u64) {
        let length = match BOOT_FILES_BYTES.get(self.seen.len()) {
            Some(length) => *length,
            None if self.chance.below(100) < AGAIN_PERCENT => {
                // A kernel is loaded once.
                let others = (self.seen.len() - BOOT_FILES_BYTES.len()) as u64;
                let again = self.chance.below(others.max(1));
                return self.seen[(BOOT_FILES_BYTES.len() + usize::try_from(again).unwrap()).min(self.seen.len() - 1)];
            }
            None => {
                // A package's files lie side by side; packages lie far apart.
                if self.chance.below(FILES_TOGETHER) == 0 {
                    self.at = self.chance.below((IMAGE_BYTES - FILES_ROOM_BYTES) / PAGE_BYTES) * PAGE_BYTES;
                }
                // As many from 4 to 8 KiB as from 8 to 16, and so on.
                let doubled =
                    FILE_BYTES.start << self.chance.below(u64::from((FILE_BYTES.end / FILE_BYTES.start).ilog2()));
                doubled + self.chance.below(doubled / PAGE_BYTES) * PAGE_BYTES
            }
        };
        let file = (self.at, length);
        self.at += length;
        self.seen.push(file);
        file
    }
}

/// The same numbers each time (Knuth's MMIX generator).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// A gateway.
pub(crate) struct Site {
    control: ServiceClient,
    portal: SocketAddr,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl Site {
    /// On the store in `folder`'s `store`; with a socket that starts companions, where its disks are on Ceph.
    pub(crate) async fn start(folder: &Path, rbd_disks_socket: Option<PathBuf>) -> Self {
        let control_socket = folder.join("gateway.sock");
        let gateway = Gateway::bind(GatewayConfig {
            control_socket: control_socket.clone(),
            store: folder.join("store"),
            rbd_disks_socket,
            portal: (Ipv4Addr::LOCALHOST, 0).into(),
            relay: None,
            worker: Some(beside_assay("assay-export")),
            worker_users: None,
            limits: Limits::default(),
            clock: Arc::new(SystemClock),
        });
        let gateway = gateway.await.unwrap();
        let (portal, shutdown) = (gateway.portal(), CancellationToken::new());
        let serving = gateway.serve(shutdown.clone());
        let serving = tokio::spawn(async move { serving.await.unwrap() });
        let control = ServiceClient::over_unix(&control_socket).unwrap();
        Self { control, portal, shutdown, serving }
    }

    /// An export of a disk, for the node of that number.
    pub(crate) async fn export(&self, store: &dyn ImageStore, disk: DiskId, number: u8) -> (AdmissionId, Node) {
        let admission = AdmissionId::random();
        let order = ExportOrder {
            target: format!("iqn.2026-01.dev.assay:{disk}").parse().unwrap(),
            initiator: format!("iqn.2026-01.dev.assay:node:n{number}:boot").parse().unwrap(),
            chap_name: format!("n{number}"),
            chap_secret: "abcdefgh-_123456".into(),
            chap: ChapAlgorithms::Any,
            disk,
            location: store.location(disk, admission).unwrap(),
            address: Ipv4Addr::new(127, 77, 1, number),
            sessions: 1,
            reservation: None,
            expires_at_ms: SystemClock.now_ms() + 600_000,
        };
        let put: Result<(), _> = self.control.put(&format!("v1/exports/{admission}"), &order).await;
        put.unwrap();
        let login = Login {
            initiator: order.initiator.to_string(),
            target: order.target.to_string(),
            chap: Some((order.chap_name, order.chap_secret)),
            lun: 0,
        };
        (admission, Node { address: order.address, portal: self.portal, login })
    }

    /// An export of a fresh clone for each of [`NODES`] nodes.
    pub(crate) async fn export_clones(&self, store: &dyn ImageStore, golden: ImageKey) -> Vec<Node> {
        let mut nodes = Vec::new();
        for number in 1..=NODES {
            let disk = DiskId::random();
            store.create_disk(disk, &"p1".parse().unwrap(), golden).unwrap();
            nodes.push(self.export(store, disk, number).await.1);
        }
        nodes
    }

    /// Takes an export down.
    #[allow(dead_code, reason = "where all end together, the gateway does")]
    pub(crate) async fn take_down(&self, admission: AdmissionId) {
        let taken_down: Result<(), _> = self.control.delete(&format!("v1/exports/{admission}"), &()).await;
        taken_down.unwrap();
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.serving.await.unwrap();
    }
}

/// A program that was built with `assay`.
pub(crate) fn beside_assay(program: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_assay")).with_file_name(program)
}

/// A node for each of tgt's targets, which were started as [`TGT_NAME`].
pub(crate) fn of_tgt(tgt: &Tgt) -> Vec<Node> {
    let login = |node: u8| Login {
        initiator: format!("{TGT_NAME}-initiator-{node}"),
        target: format!("{TGT_NAME}{node}"),
        chap: None,
        lun: TGT_LUN,
    };
    let node = |number| Node { address: Ipv4Addr::LOCALHOST, portal: tgt.address, login: login(number) };
    (1..=NODES).map(node).collect()
}

/// Drops an image's files from the page cache.
pub(crate) fn forget(image: &Path) {
    for file in std::fs::read_dir(image).unwrap().flatten() {
        let status = Command::new("dd")
            .arg(format!("if={}", file.path().display()))
            .args(["iflag=nocache", "count=0", "status=none"])
            .status();
        assert!(status.unwrap().success(), "dropping {}", file.path().display());
    }
}

pub(crate) fn mebibytes(octets: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a figure has three digits that count")]
    let mebibytes = octets as f64 / f64::from(1 << 20);
    mebibytes
}

pub(crate) const NODES: u8 = 64;
pub(crate) const TGT_NAME: &str = "iqn.2026-01.dev.assay:storm";
const IMAGE_BYTES: u64 = 651 << 20;
const PAGE_LEN: usize = 4096;
const PAGE_BYTES: u64 = PAGE_LEN as u64;

// The trace's parameters.
const SEED: u64 = 651;
/// What one boot reads, repetitions included.
const BOOT_BYTES: u64 = 85_000_000;
/// Kernel and initrd.
const BOOT_FILES_BYTES: [u64; 2] = [8 << 20, 32 << 20];
/// Of the files after them: from a directory's block to a large library.
const FILE_BYTES: std::ops::Range<u64> = 4096..1 << 20;
/// No package comes so near to the image's end that its files would not fit.
const FILES_ROOM_BYTES: u64 = 64 << 20;
/// Of a hundred files, so many were read before.
const AGAIN_PERCENT: u64 = 15;
/// Files that lie side by side, on average.
const FILES_TOGETHER: u64 = 8;
/// The kernel reads a file's start so, and doubles as it goes on.
const FIRST_REQUEST_BYTES: u64 = 16 << 10;
const LAST_REQUEST_BYTES: u64 = 256 << 10;
const QUEUE_DEPTH: usize = 4;
