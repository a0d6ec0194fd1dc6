//! A boot storm: 64 nodes read at once what a boot reads, each from its own clone of one golden image through a gateway,
//! one process each, against Debian's tgt with 64 targets on the same image's file. The page cache is dropped before.
//!
//! The trace is made, not recorded ([`Trace`]): deterministic, of a boot's shape, as long as what one boot of a Debian
//! node was seen to read (85 MB of 651). The initiator is the same for both; every page that it gets is looked at.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

#[allow(dead_code, reason = "a storm has costs only")]
mod figure;
mod initiator;
mod targets;

use assay_imaging::gateway::Limits;
use assay_imaging::gateway::order::ExportOrder;
use assay_imaging::store::{Content, ImageStore as _, LocalStore, StoreError};
use assay_imaging::{Gateway, GatewayConfig};
use assay_service::CancellationToken;
use assay_service::client::ServiceClient;
use assay_service::clock::{Clock as _, SystemClock};
use assay_wire::id::{AdmissionId, DiskId, ImageKey};
use assay_wire::imaging::ChapAlgorithms;
use figure::{Better, Figure, in_turns_of, wanted};
use initiator::{Extent, Login, Session};
use socket2::{Domain, Socket, Type};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::time::Instant;
use targets::{TGT_LUN, Tgt};

fn main() {
    if !wanted("boot-storm") {
        return;
    }
    std::fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = tempfile::Builder::new().prefix("storm-bench-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = LocalStore::open(&folder.path().join("store")).unwrap();
    let golden = ImageKey::random();
    store.import(golden, &"p1".parse().unwrap(), &Numbered, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let image = folder.path().join("store/images").join(golden.to_string());
    let trace = Trace::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();

    let ours = || {
        forget(&image);
        let site = runtime.block_on(Site::start(folder.path(), &store, golden));
        let storm = storm(&trace, &site.logins, || {
            read_by(|name, id, parent| {
                // The gateway is this process: it reads what it checks.
                id == std::process::id() || (name == "assay-export" && parent == std::process::id())
            })
        });
        runtime.block_on(site.stop());
        storm
    };
    let theirs = || {
        forget(&image);
        let tgt = Tgt::start(folder.path(), &image.join("disk.raw"), TGT_NAME, NODES, true);
        let login = |node: u8| Login {
            initiator: format!("{TGT_NAME}-initiator-{node}"),
            target: format!("{TGT_NAME}{node}"),
            chap: None,
            lun: TGT_LUN,
        };
        let logins: Vec<_> = (1..=NODES).map(|node| (Ipv4Addr::LOCALHOST, tgt.address, login(node))).collect();
        storm(&trace, &logins, || read_by(|_, id, _| id == tgt.process.id()))
    };
    let (ours, theirs) = in_turns_of(ROUNDS, ours, theirs);
    let median = |storms: &[Storm], of: fn(&Storm) -> f64| figure::median(storms.iter().map(of).collect());
    let report = |name: &str, unit: &str, ours: f64, against: &str, theirs: f64| {
        Figure { bench: "boot-storm", name, unit, ours, against, theirs, better: Better::Lower }.report();
    };
    let seconds: fn(&Storm) -> f64 = |storm| storm.seconds;
    let disk: fn(&Storm) -> f64 = |storm| storm.disk_mebibytes;
    report("64 boots at once", "s", median(&ours, seconds), "tgt", median(&theirs, seconds));
    report("read from the disk by 64 boots", "MiB", median(&ours, disk), "tgt", median(&theirs, disk));
    report("the same, to what one boot reads", "MiB", median(&ours, disk), "the boot set", trace.set_mebibytes);
}

/// What one storm took.
struct Storm {
    seconds: f64,
    disk_mebibytes: f64,
}

/// From when all are logged in until all have read everything.
fn storm(trace: &Trace, logins: &[(Ipv4Addr, SocketAddr, Login)], disk_bytes: impl Fn() -> u64) -> Storm {
    let before = disk_bytes();
    let gate = Barrier::new(logins.len() + 1);
    let seconds = std::thread::scope(|scope| {
        let boots: Vec<_> = logins
            .iter()
            .map(|(from, portal, login)| {
                let gate = &gate;
                scope.spawn(move || {
                    let mut session = Session::log_in(connect(*from, *portal), login).unwrap();
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
    Storm { seconds, disk_mebibytes: mebibytes(disk_bytes() - before) }
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
struct Numbered;

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
struct Trace {
    reads: Vec<Extent>,
    /// What is read at least once.
    set_mebibytes: f64,
}

impl Trace {
    fn new() -> Self {
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

/// A gateway with an export for each node.
struct Site {
    logins: Vec<(Ipv4Addr, SocketAddr, Login)>,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl Site {
    async fn start(folder: &Path, store: &LocalStore, golden: ImageKey) -> Self {
        let control_socket = folder.join("gateway.sock");
        let gateway = Gateway::bind(GatewayConfig {
            control_socket: control_socket.clone(),
            store: folder.join("store"),
            rbd_disks_socket: None,
            portal: (Ipv4Addr::LOCALHOST, 0).into(),
            relay: None,
            worker: Some(PathBuf::from(env!("CARGO_BIN_EXE_assay")).with_file_name("assay-export")),
            worker_users: None,
            limits: Limits::default(),
            clock: Arc::new(SystemClock),
        });
        let gateway = gateway.await.unwrap();
        let (portal, shutdown) = (gateway.portal(), CancellationToken::new());
        let serving = gateway.serve(shutdown.clone());
        let serving = tokio::spawn(async move { serving.await.unwrap() });
        let control = ServiceClient::over_unix(&control_socket).unwrap();
        let mut logins = Vec::new();
        for node in 0..NODES {
            let (disk, admission) = (DiskId::random(), AdmissionId::random());
            store.create_disk(disk, &"p1".parse().unwrap(), golden).unwrap();
            let order = ExportOrder {
                target: format!("iqn.2026-01.dev.assay:{disk}").parse().unwrap(),
                initiator: format!("iqn.2026-01.dev.assay:node:n{node}:boot").parse().unwrap(),
                chap_name: format!("n{node}"),
                chap_secret: "abcdefgh-_123456".into(),
                chap: ChapAlgorithms::Any,
                disk,
                location: store.location(disk, admission).unwrap(),
                address: Ipv4Addr::new(127, 77, 1, node + 1),
                sessions: 1,
                reservation: None,
                expires_at_ms: SystemClock.now_ms() + 600_000,
            };
            let put: Result<(), _> = control.put(&format!("v1/exports/{admission}"), &order).await;
            put.unwrap();
            let login = Login {
                initiator: order.initiator.to_string(),
                target: order.target.to_string(),
                chap: Some((order.chap_name, order.chap_secret)),
                lun: 0,
            };
            logins.push((order.address, portal, login));
        }
        Self { logins, shutdown, serving }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.serving.await.unwrap();
    }
}

/// Connects from a node's own address.
fn connect(from: Ipv4Addr, portal: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket.connect(&portal.into()).unwrap();
    socket.into()
}

/// Octets that processes, by name, id and parent, have had read from disks.
fn read_by(which: impl Fn(&str, u32, u32) -> bool) -> u64 {
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let theirs = processes.filter(|process| {
        let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
        // `pid (name) state parent …`
        let Some((start, rest)) = stat.rsplit_once(')') else { return false };
        let (id, name) = start.split_once(" (").unwrap_or(("", ""));
        let parent = rest.split_whitespace().nth(1).unwrap_or_default();
        which(name, id.parse().unwrap_or(0), parent.parse().unwrap_or(0))
    });
    let octets = theirs.map(|process| {
        let io = std::fs::read_to_string(process.join("io")).expect("its /proc/PID/io can be read");
        let line = io.lines().find_map(|line| line.strip_prefix("read_bytes: "));
        line.and_then(|octets| octets.parse::<u64>().ok()).unwrap()
    });
    octets.sum()
}

/// Drops an image's files from the page cache.
fn forget(image: &Path) {
    for file in std::fs::read_dir(image).unwrap().flatten() {
        let status = Command::new("dd")
            .arg(format!("if={}", file.path().display()))
            .args(["iflag=nocache", "count=0", "status=none"])
            .status();
        assert!(status.unwrap().success(), "dropping {}", file.path().display());
    }
}

fn mebibytes(octets: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a figure has three digits that count")]
    let mebibytes = octets as f64 / f64::from(1 << 20);
    mebibytes
}

const NODES: u8 = 64;
const TGT_NAME: &str = "iqn.2026-01.dev.assay:storm";
/// Fresh clones, fresh processes and an empty page cache for each: fewer than where a second is a round.
const ROUNDS: usize = 3;
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
