//! A gateway whose disks are on a real Ceph: golden image there and as a file here, clones with a key each, and the socket
//! that starts their companions.

use super::*;
use assay_imaging::config::CephConfig;
use assay_imaging::rbd_disks::RbdDisks;
use assay_imaging::store::{DiskLocation, RbdClone, Upper};
use assay_rbd::keys::{self, GoldenScope, Scope};
use assay_rbd::name::{CephUser, ImageKind, ImageName, Namespace, PoolName, SnapshotName};
use assay_rbd::testing::Ceph;
use assay_rbd::{Cluster, Connection, DEFAULT_OBJECT_ORDER, ParentImage, Pool};
use rustix::process::Pid;
use std::sync::atomic::{AtomicU8, Ordering};

pub(crate) const MIB: u64 = 1 << 20;
/// Objects of 4 MiB: five, the last of which is a half one.
pub(crate) const DISK_BYTES: u64 = 18 * MIB;

/// The program beside the workers.
pub(crate) const COMPANION: &str = env!("CARGO_BIN_EXE_assay-rbd-disk");

/// The table `[ceph]` for a store in a pool of the test's own, as imaging's own user; the key is in `folder`.
pub(crate) fn table(ceph: &Ceph, folder: &Path, pool: &str) -> CephConfig {
    let pool = PoolName::new(pool).unwrap();
    ceph.create_pool(&ceph.admin(), &pool);
    let Connection { monitors, user, key, .. } = ceph.imaging_connection(&pool);
    let key_file = folder.join("ceph.key");
    std::fs::write(&key_file, format!("{}\n", key.expose())).unwrap();
    CephConfig { monitors, user, key_file, pool, rbd_disks_socket: None }
}

/// The table, for a process that is to die in place of imaging.
pub(crate) fn to_environment(table: &CephConfig) -> Vec<(&'static str, String)> {
    vec![
        ("CRASH_MONITOR", table.monitors[0].to_string()),
        ("CRASH_USER", table.user.to_string()),
        ("CRASH_KEY_FILE", table.key_file.display().to_string()),
        ("CRASH_POOL", table.pool.to_string()),
    ]
}

/// The table that such a process was given, if there is one.
pub(crate) fn from_environment() -> Option<CephConfig> {
    let text = |name: &str| std::env::var(name).ok();
    Some(CephConfig {
        monitors: vec![text("CRASH_MONITOR")?.parse().unwrap()],
        user: CephUser::new(&text("CRASH_USER")?).unwrap(),
        key_file: text("CRASH_KEY_FILE")?.into(),
        pool: PoolName::new(&text("CRASH_POOL")?).unwrap(),
        rbd_disks_socket: None,
    })
}

/// One project's images on Ceph, and its gateway.
pub(crate) struct RbdSite {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) cluster: Cluster,
    pub(crate) pool: Pool,
    pub(crate) golden: (Namespace, Pool, ImageName),
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) gateway: RunningGateway,
    connection: Connection,
    snapshot: SnapshotName,
    key: ImageKey,
    /// Of a disk with the same golden image in files, whose root is this one's.
    root: DiskLocation,
    clones: AtomicU8,
    disks: CancellationToken,
}

impl RbdSite {
    /// The golden image is [`pattern`] in the file, and `on_ceph` on Ceph: the same, unless a test wants to see which of
    /// them is read.
    pub(crate) async fn new(ceph: &Ceph, on_ceph: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cluster = ceph.admin();
        let (golden_namespace, golden_pool) = ceph.new_namespace(&cluster);
        let (_, pool) = ceph.new_namespace(&cluster);
        let golden = ImageName::derived(ImageKind::Golden, "debian");
        golden_pool.create_image(golden, DISK_BYTES, DEFAULT_OBJECT_ORDER).unwrap();
        let image = golden_pool.open_image(golden).unwrap();
        image.write_at(0, on_ceph).unwrap();
        let snapshot = SnapshotName::new("golden").unwrap();
        image.create_snapshot(&snapshot).unwrap();
        drop(image);

        let local = folder.path().join("local");
        std::fs::create_dir(&local).unwrap();
        let store = store_with_image(&local, &pattern(DISK_BYTES as usize));
        let key = store.images().unwrap()[0].key;
        let cached = folder.path().join(format!("store/golden/{key}"));
        std::fs::create_dir_all(&cached).unwrap();
        for file in ["disk.raw", "tree.sha256"] {
            let mut copy = Command::new("cp");
            copy.arg("--sparse=always").arg(store.image_folder(key).join(file)).arg(cached.join(file));
            assert!(copy.status().unwrap().success(), "{file} is not copied");
        }
        let root = order(&store).location;

        // By this name a test knows its own companions.
        let program = folder.path().join("assay-rbd-disk");
        std::os::unix::fs::symlink(COMPANION, &program).unwrap();
        let disks = CancellationToken::new();
        let acceptor = RbdDisks::bind(&folder.path().join("rbd-disks.sock"), Some(program)).unwrap();
        tokio::spawn(acceptor.serve(disks.clone()));
        let clock = Arc::new(ManualClock::new(NOW_MS));
        let gateway = RunningGateway::start(folder.path(), &clock).await;
        Self {
            cluster,
            pool,
            golden: (golden_namespace, golden_pool, golden),
            clock,
            gateway,
            connection: ceph.admin_connection(),
            snapshot,
            key,
            root,
            clones: AtomicU8::new(0),
            disks,
            folder,
        }
    }

    /// A disk that nobody has written to, with a key of its own.
    pub(crate) fn clone(&self) -> RbdClone {
        let number = self.clones.fetch_add(1, Ordering::Relaxed);
        let name = ImageName::numbered(ImageKind::Disk, number.into());
        let (golden_namespace, golden_pool, golden) = &self.golden;
        self.pool.clone_image((golden_pool, *golden, &self.snapshot), name, DEFAULT_OBJECT_ORDER).unwrap();
        let namespace = self.pool.namespace().unwrap().clone();
        let user = CephUser::new(&format!("export-{namespace}-{number}")).unwrap();
        let id = golden_pool.open_read_only(*golden, None).unwrap().id().unwrap();
        let scope = Scope {
            pool: self.pool.name().clone(),
            namespace: namespace.clone(),
            image: name,
            id: self.pool.open_read_only(name, None).unwrap().id().unwrap(),
            golden: vec![GoldenScope { namespace: golden_namespace.clone(), id: id.clone() }],
        };
        RbdClone {
            monitors: self.connection.monitors.clone(),
            key: keys::issue(&self.cluster, &user, &scope).unwrap(),
            user,
            pool: self.pool.name().clone(),
            namespace,
            image: name,
            layers: vec![ParentImage { pool: self.pool.name().clone(), namespace: golden_namespace.clone(), id }],
            byte_len: DISK_BYTES,
        }
    }

    /// An order for a disk.
    pub(crate) fn order(&self, clone: RbdClone) -> ExportOrder {
        let disk = DiskId::random();
        let location = DiskLocation { upper: Upper::Rbd(Box::new(clone)), golden: self.key, ..self.root.clone() };
        ExportOrder {
            target: format!("iqn.2026-01.dev.assay:{disk}").parse().unwrap(),
            initiator: "iqn.2026-01.dev.assay:node:n1:boot".parse().unwrap(),
            chap_name: "n1".into(),
            chap_secret: "abcdefgh-_123456".into(),
            disk,
            chap: ChapAlgorithms::Any,
            location,
            address: some_address(),
            sessions: 1,
            reservation: None,
            expires_at_ms: NOW_MS + 3_600_000,
        }
    }

    /// A new disk, exported.
    pub(crate) async fn export(&self) -> (AdmissionId, ExportOrder, RbdClone) {
        let clone = self.clone();
        let (admission, order) = (AdmissionId::random(), self.order(clone.clone()));
        self.gateway.put_up(admission, &order).await.unwrap();
        (admission, order, clone)
    }

    /// Octets of a clone, as Ceph has them.
    pub(crate) fn on_ceph(&self, clone: &RbdClone, offset: u64, length: usize) -> Vec<u8> {
        let mut octets = vec![0; length];
        self.pool.open_read_only(clone.image, None).unwrap().read_at(offset, &mut octets).unwrap();
        octets
    }

    /// This site's companions that run.
    pub(crate) fn companions(&self) -> Vec<Pid> {
        let program = self.folder.path().join("assay-rbd-disk");
        let program = program.as_os_str().as_encoded_bytes();
        let ours = |pid: &i32| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|octet| *octet == 0).next() == Some(program))
        };
        pids().filter(ours).filter_map(Pid::from_raw).collect()
    }

    /// This site's workers that run.
    pub(crate) fn workers(&self) -> Vec<Pid> {
        let golden = self.folder.path().join(format!("store/golden/{}/disk.raw", self.key));
        let has_it = |pid: &i32| {
            let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            open.into_iter().any(|file| std::fs::read_link(file.path()).is_ok_and(|target| target == golden))
        };
        let own = i32::try_from(std::process::id()).unwrap();
        pids().filter(|pid| *pid != own).filter(has_it).filter_map(Pid::from_raw).collect()
    }

    /// Starts no companions any more.
    pub(crate) fn stop_starting(&self) {
        self.disks.cancel();
    }

    pub(crate) async fn stop(self) {
        self.gateway.stop().await;
        self.disks.cancel();
    }
}

fn pids() -> impl Iterator<Item = i32> {
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Memory that is the process's own, and its share of what others have mapped, too.
pub(crate) fn pss_kib(pid: Pid) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", pid.as_raw_nonzero())).unwrap();
    let line = smaps.lines().find(|line| line.starts_with("Pss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
