//! Images and disks on Ceph: a real monitor and an OSD that keeps its objects in memory, so that no disk is measured.
//!
//! What the operations take stands beside their bars, and beside what librbd takes for its part of them, called through
//! `assay-rbd` as the store calls it: the bare clone, snapshot and removal. A boot storm of 64 nodes, each with a clone, a
//! process and a companion of its own, stands beside what M2 ran: Debian's tgt with its RBD backing store, and a clone for
//! each of 64 targets.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

#[allow(dead_code, reason = "all that is here is a cost")]
mod figure;
mod folder;
mod images;
mod initiator;
mod storm;
#[allow(dead_code, reason = "no target here has a file, and no process is looked at")]
mod targets;

use assay_imaging::rbd_disks::RbdDisks;
use assay_imaging::store::{Content, ImageStore as _, RbdImageStore};
use assay_rbd::name::{ImageKind, ImageName, Namespace, PoolName, SnapshotName};
use assay_rbd::testing::{Ceph, ObjectStore};
use assay_rbd::{Cluster, Connection, DEFAULT_OBJECT_ORDER, Image, Pool};
use assay_service::CancellationToken;
use assay_wire::id::{DiskId, ImageKey};
use figure::{Better, Figure, in_turns_of, median, wanted};
use folder::folder;
use images::{Sparse, a_hundred, beside_bar, milliseconds, percentile};
use std::io::{Read as _, Write as _};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use storm::{NODES, Numbered, Site, TGT_NAME, Took, Trace, beside_assay, forget, mebibytes, of_tgt, storm};
use targets::Tgt;
use tokio::runtime::Runtime;

fn main() {
    let (operations, boots) = (wanted(BENCH), wanted(STORM));
    if !operations && !boots {
        return;
    }
    let bench = Bench::start();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let shutdown = CancellationToken::new();
    let socket = bench.folder.path().join("rbd-disks.sock");
    let disks = {
        let _runtime = runtime.enter();
        RbdDisks::bind(&socket, Some(beside_assay("assay-rbd-disk"))).unwrap()
    };
    let serving = runtime.spawn(disks.serve(shutdown.clone()));
    let start_site = || runtime.block_on(Site::start(bench.folder.path(), Some(socket.clone())));
    if operations {
        let sparse = bench.import(&Sparse { data_bytes: 64 << 20 });
        clones(&bench, &sparse);
        snapshots(&bench, &sparse);
        deprovisions(&bench, &sparse, &runtime, start_site());
    }
    if boots {
        storms(&bench, &runtime, start_site);
    }
    shutdown.cancel();
    runtime.block_on(serving).unwrap();
}

/// A cluster, with the store in one pool and what is compared with it in another.
struct Bench {
    store: RbdImageStore,
    pool: PoolName,
    bare: Pool,
    made: AtomicU32,
    cluster: Cluster,
    folder: tempfile::TempDir,
    /// Last: it outlives its clients.
    ceph: Ceph,
}

/// A golden image of the store's, and where that has it.
struct Golden {
    key: ImageKey,
    pool: Pool,
    name: ImageName,
    snapshot: SnapshotName,
}

impl Bench {
    fn start() -> Self {
        let (ceph, folder) = (Ceph::start(ObjectStore::Memory), folder("ceph-bench-"));
        let cluster = ceph.admin();
        let [pool, bare] = ["store", "bare"].map(|name| {
            let pool = PoolName::new(name).unwrap();
            ceph.create_pool(&cluster, &pool);
            pool
        });
        let store = RbdImageStore::open(&folder.path().join("store"), &ceph.admin_connection(), pool.clone()).unwrap();
        let bare = cluster.pool(&bare).unwrap();
        Self { store, pool, bare, made: AtomicU32::new(0), cluster, folder, ceph }
    }

    fn import(&self, content: &dyn Content) -> Golden {
        let key = ImageKey::random();
        self.store.import(key, &PROJECT.parse().unwrap(), content, &mut |_, _| ControlFlow::Continue(())).unwrap();
        let pool = self.cluster.namespace(&self.pool, &Namespace::new(PROJECT).unwrap()).unwrap();
        let (name, _) = pool.images().unwrap().into_iter().find(|(name, _)| name.number() == number_of(key)).unwrap();
        let snapshots = pool.open_read_only(name, None).unwrap().snapshots().unwrap();
        Golden { key, pool, name, snapshot: SnapshotName::new(&snapshots[0]).unwrap() }
    }

    fn disk(&self, golden: &Golden) -> DiskId {
        let disk = DiskId::random();
        self.store.create_disk(disk, &PROJECT.parse().unwrap(), golden.key).unwrap();
        disk
    }

    /// A clone that librbd makes, with the features that ours have, and nothing beside.
    fn bare_clone(&self, golden: &Golden) -> ImageName {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let name = ImageName::numbered(ImageKind::Disk, number.into());
        let parent = (&golden.pool, golden.name, &golden.snapshot);
        self.bare.clone_image(parent, name, DEFAULT_OBJECT_ORDER).unwrap();
        name
    }

    /// The same with something written.
    fn bare_written(&self, golden: &Golden, octets: u64) -> ImageName {
        let name = self.bare_clone(golden);
        let open = self.bare.open_image(name).unwrap();
        pieces(octets).for_each(|at| open.write_at(at, &PIECE).unwrap());
        open.flush().unwrap();
        name
    }

    /// A disk of the store's with as much written.
    fn written(&self, golden: &Golden, octets: u64) -> DiskId {
        let disk = self.disk(golden);
        let open = self.store.open_disk(disk).unwrap();
        pieces(octets).for_each(|at| open.write_at(at, &PIECE).unwrap());
        open.flush().unwrap();
        disk
    }

    /// What some reading from Ceph takes.
    fn reading(&self, work: impl FnOnce()) -> Took {
        let (before, seconds) = (self.octets_read(), milliseconds(work) / 1000.0);
        Took { seconds, mebibytes: mebibytes(self.octets_read() - before) }
    }

    /// Octets that the OSD has answered its clients' reads with.
    fn octets_read(&self) -> u64 {
        let mut socket = UnixStream::connect(self.ceph.folder().join("osd.0.asok")).unwrap();
        socket.write_all(b"{\"prefix\": \"perf dump\", \"logger\": \"osd\"}\0").unwrap();
        // The answer's length comes first.
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        let counters: serde_json::Value = serde_json::from_slice(&answer[4..]).unwrap();
        counters["osd"]["op_out_bytes"].as_u64().unwrap()
    }
}

impl Golden {
    /// Once through, piece by piece.
    fn read_all(&self) {
        let image = self.pool.open_read_only(self.name, Some(&self.snapshot)).unwrap();
        let mut piece = vec![0; usize::try_from(image.object_bytes()).unwrap()];
        for at in (0..image.byte_len()).step_by(piece.len()) {
            let length = usize::try_from(image.byte_len() - at).unwrap().min(piece.len());
            image.read_at(at, &mut piece[..length]).unwrap();
        }
    }
}

/// Images are named by the numbers of their keys.
fn number_of(key: ImageKey) -> u128 {
    u128::from_be_bytes(*key.as_bytes())
}

/// Where pieces go: one to each object.
fn pieces(octets: u64) -> impl Iterator<Item = u64> {
    (0..octets / PIECE.len() as u64).map(|piece| piece << DEFAULT_OBJECT_ORDER)
}

fn clones(bench: &Bench, golden: &Golden) {
    let ours = || {
        bench.disk(golden);
    };
    let bare = || {
        bench.bare_clone(golden);
    };
    let (our_times, bare_times) = in_turns_of(CLONES, || milliseconds(ours), || milliseconds(bare));
    for percent in [50, 99] {
        let (name, time) = (format!("clone of 10 GiB, p{percent}"), percentile(&our_times, percent));
        beside_bar(BENCH, &name, time, 100.0);
        report(BENCH, &name, "ms", time, "librbd's clone", percentile(&bare_times, percent));
    }
    let (our_times, bare_times) = in_turns_of(ROUNDS, || a_hundred(ours), || a_hundred(bare));
    report(BENCH, "100 clones, 16 at once", "ms", median(our_times), "librbd's clones", median(bare_times));
}

fn snapshots(bench: &Bench, golden: &Golden) {
    let ours = || {
        let disk = bench.written(golden, 4 << 20);
        milliseconds(|| bench.store.snapshot(disk, ImageKey::random()).unwrap())
    };
    let bare = || {
        let name = bench.bare_written(golden, 4 << 20);
        let snapshot = |image: Image| image.create_snapshot(&SnapshotName::new("taken").unwrap()).unwrap();
        milliseconds(|| snapshot(bench.bare.open_image(name).unwrap()))
    };
    let (ours, bare) = in_turns_of(SNAPSHOTS, ours, bare);
    beside_bar(BENCH, "snapshot of 10 GiB, slowest of 20", percentile(&ours, 100), 100.0);
    report(BENCH, "snapshot of 10 GiB, p50", "ms", median(ours), "librbd's snapshot", median(bare));
}

/// From an export whose node is logged in until neither export nor key nor disk is left.
fn deprovisions(bench: &Bench, golden: &Golden, runtime: &Runtime, site: Site) {
    let ours = || {
        let disk = bench.written(golden, WRITTEN_BYTES);
        let (admission, node) = runtime.block_on(site.export(&bench.store, disk, 1));
        let _session = node.log_in();
        milliseconds(|| {
            // Side by side, as imaging does it.
            std::thread::scope(|scope| {
                scope.spawn(|| bench.store.revoke(disk, admission).unwrap());
                runtime.block_on(site.take_down(admission));
            });
            bench.store.remove_disk(disk).unwrap();
        })
    };
    let bare = || {
        let name = bench.bare_written(golden, WRITTEN_BYTES);
        milliseconds(|| bench.bare.remove_image(name).unwrap())
    };
    let (ours, bare) = in_turns_of(DEPROVISIONS, ours, bare);
    let name = "deprovision of an exported disk with 256 MiB written";
    beside_bar(BENCH, &format!("{name}, slowest of 5"), percentile(&ours, 100), 1000.0);
    report(BENCH, &format!("{name}, p50"), "ms", median(ours), "librbd's removal", median(bare));
    runtime.block_on(site.stop());
}

fn storms(bench: &Bench, runtime: &Runtime, start_site: impl Fn() -> Site) {
    let golden = bench.import(&Numbered);
    let cached = bench.folder.path().join("store/golden").join(golden.key.to_string());
    let trace = Trace::new();
    let ours = || {
        // As on a host that has not seen the image.
        std::fs::remove_dir_all(&cached).unwrap();
        let fetched = bench.reading(|| drop(bench.store.open_image(golden.key).unwrap()));
        let site = start_site();
        let nodes = runtime.block_on(site.export_clones(&bench.store, golden.key));
        forget(&cached);
        let storm = storm(&trace, &nodes, || bench.octets_read());
        runtime.block_on(site.stop());
        (fetched, storm)
    };
    let luns = tgt_luns(bench, &golden);
    let theirs = || {
        let fetched = bench.reading(|| golden.read_all());
        let tgt = Tgt::start(bench.folder.path(), TGT_NAME, &luns, false);
        (fetched, storm(&trace, &of_tgt(&tgt), || bench.octets_read()))
    };
    let (ours, theirs) = in_turns_of(ROUNDS, ours, theirs);
    let median = |of: fn(&(Took, Took)) -> f64| [&ours, &theirs].map(|took| median(took.iter().map(of).collect()));
    let [[seconds, tgt_seconds], [octets, tgt_octets], [fetched, bare]] = [
        median(|(_, storm)| storm.seconds),
        median(|(_, storm)| storm.mebibytes),
        median(|(fetched, _)| fetched.seconds),
    ];
    let report = |name: &str, unit: &str, ours: f64, against: &str, theirs: f64| {
        report(STORM, name, unit, ours, against, theirs);
    };
    report("64 boots at once", "s", seconds, "tgt-rbd", tgt_seconds);
    report("the same on a host without the golden image", "s", fetched + seconds, "tgt-rbd", tgt_seconds);
    report("read from Ceph by 64 boots", "MiB", octets, "tgt-rbd", tgt_octets);
    let whole = octets + median(|(fetched, _)| fetched.mebibytes)[0];
    report("the same on a host without the golden image", "MiB", whole, "tgt-rbd", tgt_octets);
    report("read from Ceph by 64 boots, to what one reads", "MiB", octets, "the boot set", trace.set_mebibytes);
    report("golden image of 651 MiB brought to a host", "s", fetched, "librbd's read", bare);
}

/// A clone for each of [`NODES`] targets, as tgtadm is told of it, with the one key that M2's tgt had for all.
fn tgt_luns(bench: &Bench, golden: &Golden) -> Vec<Vec<String>> {
    let Connection { monitors, user, key, .. } = bench.ceph.admin_connection();
    let configuration = bench.folder.path().join("ceph.conf");
    let (monitor, user, key) = (monitors[0], user.as_str(), key.expose());
    std::fs::write(&configuration, format!("[global]\nmon host = [v2:{monitor}]\nkey = {key}\n")).unwrap();
    let options = format!("conf={};id={user}", configuration.display());
    let lun = |name: ImageName| {
        let image = format!("{}/{name}", bench.bare.name());
        ["--bstype", "rbd", "--bsopts", &options, "-b", &image].map(str::to_owned).to_vec()
    };
    (0..NODES).map(|_| lun(bench.bare_clone(golden))).collect()
}

fn report(bench: &str, name: &str, unit: &str, ours: f64, against: &str, theirs: f64) {
    Figure { bench, name, unit, ours, against, theirs, better: Better::Lower }.report();
}

const BENCH: &str = "ceph";
const STORM: &str = "ceph-boot-storm";
const PROJECT: &str = "p1";
const CLONES: usize = 200;
const SNAPSHOTS: usize = 20;
const DEPROVISIONS: usize = 5;
const WRITTEN_BYTES: u64 = 256 << 20;
static PIECE: [u8; 1 << 20] = [7; 1 << 20];
const ROUNDS: usize = 3;
