//! The store on a real Ceph: the contract, its golden images on this host, and the keys that its locations carry.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod store_contract;

use assay_imaging::store::device::{BlockDevice, DeviceError};
use assay_imaging::store::golden::{GoldenFiles, GoldenImage};
use assay_imaging::store::{ImageStore, RbdClone, RbdImageStore, StoreError, StoredKind, Upper};
use assay_rbd::name::{ImageKind, ImageName, Namespace, PoolName};
use assay_rbd::store::{RbdStore, Source};
use assay_rbd::testing::{Ceph, SharedCeph};
use assay_rbd::{CloneDisk, Cluster, Connection, GoldenFile, Patience, RbdError};
use assay_wire::id::{AdmissionId, DiskId, ImageKey};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;
use store_contract::{Fixture, Octets, contract, disk, go_on, import, pattern, project, read_all};

const SIZE: usize = 10 << 20;

struct Bench {
    ceph: SharedCeph,
    folder: tempfile::TempDir,
    /// A store mends what it finds in its pool, so it has one of its own.
    pool: PoolName,
    store: RbdImageStore,
}

impl Bench {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let ceph = Ceph::shared();
        let pool = PoolName::new(&format!("store-{}", NEXT.fetch_add(1, Ordering::Relaxed))).unwrap();
        ceph.create_pool(&ceph.admin(), &pool);
        let folder = tempfile::tempdir().unwrap();
        let store = RbdImageStore::open(folder.path(), &ceph.imaging_connection(&pool), pool.clone()).unwrap();
        Self { ceph, folder, pool, store }
    }

    fn cached(&self, image: ImageKey) -> PathBuf {
        self.folder.path().join("golden").join(image.to_string())
    }

    /// As on a host that has not seen the image.
    fn forget(&self, image: ImageKey) {
        std::fs::remove_dir_all(self.cached(image)).unwrap();
    }
}

impl Fixture for Bench {
    fn store(&self) -> &dyn ImageStore {
        &self.store
    }

    fn reopen(self) -> Self {
        let Self { ceph, folder, pool, store } = self;
        drop(store);
        let store = RbdImageStore::open(folder.path(), &ceph.imaging_connection(&pool), pool.clone()).unwrap();
        Self { ceph, folder, pool, store }
    }
}

contract!(Bench::new());

#[test]
fn the_store_has_one_owner_on_its_host() {
    let bench = Bench::new();
    let error =
        RbdImageStore::open(bench.folder.path(), &bench.ceph.imaging_connection(&bench.pool), bench.pool.clone());
    assert!(matches!(error.unwrap_err(), StoreError::InUse { .. }));
    assert!(bench.store.images().unwrap().is_empty(), "and goes on having it");
}

#[test]
fn an_import_fills_the_cache_and_another_host_fills_its_own() {
    let bench = Bench::new();
    let (image, content) = (import(&bench.store, &pattern(SIZE)), pattern(SIZE));
    let inode = |bench: &Bench| {
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(bench.cached(image).join("disk.raw")).unwrap())
    };
    let imported = inode(&bench);
    assert!(read_all(&*bench.store.open_image(image).unwrap()) == content);
    assert_eq!(inode(&bench), imported);
    let bench = bench.reopen();
    assert_eq!(inode(&bench), imported, "a restart keeps it");
    bench.forget(image);
    assert!(read_all(&*bench.store.open_image(image).unwrap()) == content);
    let StoredKind::Golden { root, .. } = bench.store.image(image).unwrap().kind else { panic!() };
    let files = GoldenFiles::open_cached(bench.folder.path(), image, SIZE as u64, root).unwrap();
    assert!(read_all(&GoldenImage::from_files(files).unwrap()) == content, "as a gateway opens it");
    bench.store.remove_image(image).unwrap();
    assert!(!bench.cached(image).exists());
}

#[test]
fn a_rotten_cache_file_is_an_error_and_not_data() {
    let bench = Bench::new();
    let image = import(&bench.store, &pattern(SIZE));
    let disk = disk(&bench.store, image);
    let file = std::fs::OpenOptions::new().write(true).open(bench.cached(image).join("disk.raw")).unwrap();
    file.write_all_at(b"rot", 65_536 * 9 + 5).unwrap();
    for device in [bench.store.open_image(image).unwrap(), bench.store.open_disk(disk).unwrap()] {
        let mut buffer = [0; 512];
        device.read_at(0, &mut buffer).unwrap();
        let error = device.read_at(65_536 * 9 + 4096, &mut buffer).unwrap_err();
        assert!(matches!(error, DeviceError::Corrupt { offset } if offset == 65_536 * 9), "{error:?}");
    }
    let refused =
        bench.store.import(ImageKey::random(), &project(), &Copy(bench.store.open_image(image).unwrap()), &mut go_on);
    assert!(matches!(refused, Err(StoreError::Device(DeviceError::Corrupt { .. }))), "{refused:?}");
    assert_eq!(bench.store.images().unwrap().len(), 1);
}

struct Copy(std::sync::Arc<dyn BlockDevice>);

impl assay_imaging::store::Content for Copy {
    fn virtual_bytes(&self) -> u64 {
        self.0.byte_len()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        Ok(self.0.read_at(offset, buffer)?)
    }

    fn identity(&self) -> Option<String> {
        None
    }
}

/// Content whose description is another's.
struct Exchanged(String);

impl Source for Exchanged {
    fn byte_len(&self) -> u64 {
        SIZE as u64
    }

    fn read(&mut self, _: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0x66);
        Ok(())
    }

    fn description(&mut self) -> io::Result<Option<String>> {
        Ok(Some(self.0.clone()))
    }
}

#[test]
fn an_image_that_was_exchanged_on_ceph_is_refused_and_named() {
    let bench = Bench::new();
    let image = import(&bench.store, &pattern(SIZE));
    let StoredKind::Golden { root, sha256 } = bench.store.image(image).unwrap().kind else { panic!() };
    bench.store.remove_image(image).unwrap();
    let Bench { ceph, folder, pool, store } = bench;
    drop(store);
    let below = RbdStore::open(ceph.admin(), pool.clone()).unwrap();
    let name = ImageName::numbered(ImageKind::Golden, u128::from_be_bytes(*image.as_bytes()));
    let namespace = Namespace::new(project().as_str()).unwrap();
    let described = format!(r#"{{"sha256":"{sha256}","root":"{}","data_bytes":1}}"#, hex::encode(root));
    below.import(name, &namespace, &mut Exchanged(described), &mut |_, _| ControlFlow::Continue(())).unwrap();
    drop(below);
    let store = RbdImageStore::open(folder.path(), &ceph.imaging_connection(&pool), pool).unwrap();
    let disk = disk(&store, image);
    for refused in [store.open_image(image).map(drop), store.location(disk, AdmissionId::random()).map(drop)] {
        assert!(
            matches!(&refused, Err(StoreError::OtherContent { image: named, .. }) if *named == image),
            "{refused:?}"
        );
    }
    assert!(!folder.path().join("golden").join(image.to_string()).exists());
}

/// A golden file that is not asked: everything that is read here is the clone's own.
#[derive(Debug)]
struct NoFile;

impl GoldenFile for NoFile {
    fn byte_len(&self) -> u64 {
        SIZE as u64
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("not asked"))
    }

    fn try_read_at(&self, _: u64, _: &mut [u8]) -> io::Result<bool> {
        Ok(false)
    }
}

/// Somebody with what a location says, and nothing else.
fn holder(clone: &RbdClone) -> Result<Cluster, RbdError> {
    let RbdClone { monitors, user, key, .. } = clone.clone();
    Cluster::connect(&Connection { monitors, user, key, patience: Patience::CONTROL })
}

fn on_ceph(bench: &Bench, disk: DiskId, admission: AdmissionId) -> RbdClone {
    match bench.store.location(disk, admission).unwrap().upper {
        Upper::Rbd(clone) => *clone,
        Upper::Files => panic!("not on Ceph"),
    }
}

#[test]
fn a_location_opens_its_one_disk_until_it_is_revoked() {
    let bench = Bench::new();
    let image = import(&bench.store, &pattern(SIZE));
    let (own, sibling) = (disk(&bench.store, image), disk(&bench.store, image));
    bench.store.snapshot(own, ImageKey::random()).unwrap();
    bench.forget(image);
    let (admission, other) = (AdmissionId::random(), AdmissionId::random());
    let location = bench.store.location(own, admission).unwrap();
    let StoredKind::Golden { root, .. } = bench.store.image(image).unwrap().kind else { panic!() };
    assert_eq!((location.golden, location.root), (image, root));
    assert!(bench.cached(image).exists(), "before it answers");
    let (clone, siblings) = (on_ceph(&bench, own, admission), on_ceph(&bench, sibling, other));
    assert_eq!((clone.byte_len, clone.layers.len(), siblings.layers.len()), (SIZE as u64, 2, 1));
    assert!(clone.user != siblings.user && clone.key != siblings.key);

    let cluster = holder(&clone).unwrap();
    let pool = cluster.namespace(&clone.pool, &clone.namespace).unwrap();
    assert!(pool.open_image(siblings.image).unwrap_err().is_denied());
    let open = CloneDisk::open(&pool, clone.image, &clone.layers, NoFile).unwrap();
    open.write_at(0, &[9; 4096]).unwrap();
    // Whoever serves it has it: it is nobody else's to change.
    for refused in [
        bench.store.snapshot(own, ImageKey::random()),
        bench.store.restore(own, image),
        bench.store.remove_disk(own),
        bench.store.open_disk(own).map(drop),
    ] {
        assert!(matches!(refused, Err(StoreError::InUse { .. })), "{refused:?}");
    }
    let writing = AtomicBool::new(false);
    let (stopped, begun) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while open.write_at(0, &[8; 4096]).is_ok() {
                writing.store(true, Ordering::Release);
            }
            Instant::now()
        });
        while !writing.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let begun = Instant::now();
        bench.store.revoke(own, admission).unwrap();
        (writer.join().unwrap(), begun)
    });
    assert!(stopped.saturating_duration_since(begun).as_secs_f64() < 1.0);
    assert!(open.read_at(0, &mut [0; 512]).unwrap_err().is_blocklisted());
    assert!(holder(&clone).unwrap_err().is_denied());
    bench.store.revoke(own, admission).unwrap();
    holder(&siblings).unwrap();
    drop(open);
    assert_eq!(read_all(&*bench.store.open_disk(own).unwrap())[..4096], [8; 4096]);
    bench.store.snapshot(own, ImageKey::random()).unwrap();
}

#[test]
fn a_disk_that_is_removed_takes_its_keys_along() {
    let bench = Bench::new();
    let (admission, disk) = (AdmissionId::random(), disk(&bench.store, import(&bench.store, &pattern(SIZE))));
    let clone = on_ceph(&bench, disk, admission);
    bench.store.remove_disk(disk).unwrap();
    assert!(holder(&clone).unwrap_err().is_denied());
    bench.store.revoke(disk, admission).unwrap();
}

/// More than goes between two checkpoints, nearly all of it zeros; counts what is read of it.
#[derive(Default)]
struct Large(std::sync::atomic::AtomicU64);

const CHECKPOINT: u64 = 256 << 20;

impl assay_imaging::store::Content for Large {
    fn virtual_bytes(&self) -> u64 {
        CHECKPOINT + (5 << 20)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.0.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        buffer.fill(0);
        buffer[..8].copy_from_slice(&(offset + 1).to_le_bytes());
        Ok(())
    }

    fn identity(&self) -> Option<String> {
        Some("large".to_owned())
    }
}

/// Dies as `CRASH_AT` says while it does `CRASH_DOING`. Not a test by itself.
#[cfg(feature = "failpoints")]
#[test]
#[ignore = "started by what_dies_between_ceph_and_this_host_is_completed_or_undone"]
fn dies() {
    let text = |name: &str| std::env::var(name).unwrap();
    let connection = Connection {
        monitors: vec![text("CRASH_MONITOR").parse().unwrap()],
        user: assay_rbd::name::CephUser::new(&text("CRASH_USER")).unwrap(),
        key: assay_rbd::name::CephKey::new(&text("CRASH_KEY")).unwrap(),
        patience: Patience::CONTROL,
    };
    let pool = PoolName::new(&text("CRASH_POOL")).unwrap();
    let store = RbdImageStore::open(text("CRASH_IN").as_ref(), &connection, pool).unwrap();
    let image: ImageKey = text("CRASH_IMAGE").parse().unwrap();
    fail::cfg(text("CRASH_AT"), "return").unwrap();
    match text("CRASH_DOING").as_str() {
        "import" => drop(store.import(image, &project(), &Octets(pattern(SIZE)), &mut go_on)),
        "import large" => drop(store.import(image, &project(), &Large::default(), &mut go_on)),
        "flatten" => drop(store.flatten(image, &mut go_on)),
        "open" => drop(store.open_image(image)),
        "remove" => drop(store.remove_image(image)),
        other => panic!("`{other}`"),
    }
    panic!("lived through it");
}

#[cfg(feature = "failpoints")]
#[test]
fn what_dies_between_ceph_and_this_host_is_completed_or_undone() {
    use std::os::unix::process::ExitStatusExt as _;
    let mut bench = Bench::new();
    let user = bench.ceph.imaging_connection(&bench.pool);
    let die = |bench: Bench, doing: &str, at: &str, image: ImageKey| {
        let Bench { ceph, folder, pool, store } = bench;
        drop(store);
        let died = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "dies", "--ignored"])
            .env("CRASH_MONITOR", user.monitors[0].to_string())
            .env("CRASH_USER", user.user.as_str())
            .env("CRASH_KEY", user.key.expose())
            .env("CRASH_POOL", pool.as_str())
            .env("CRASH_IN", folder.path())
            .env("CRASH_IMAGE", image.to_string())
            .env("CRASH_DOING", doing)
            .env("CRASH_AT", at)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&died.stdout).into_owned() + &String::from_utf8_lossy(&died.stderr);
        assert_eq!(died.status.signal(), Some(6), "{doing}, {at}: {said}");
        let store = RbdImageStore::open(folder.path(), &ceph.imaging_connection(&pool), pool.clone()).unwrap();
        Bench { ceph, folder, pool, store }
    };
    let left = |bench: &Bench| std::fs::read_dir(bench.folder.path().join("golden")).unwrap().count();

    let image = ImageKey::random();
    bench = die(bench, "import", "store::rbd::taken-in", image);
    assert_eq!(left(&bench), 0, "what was staged is gone");
    let stored = bench.store.import(image, &project(), &Octets(vec![1; SIZE]), &mut go_on).unwrap();
    assert_eq!(bench.store.image(image).unwrap(), stored, "it was there already");
    bench = die(bench, "open", "store::golden::copied", image);
    assert!(read_all(&*bench.store.open_image(image).unwrap()) == pattern(SIZE));
    assert_eq!(left(&bench), 1);

    // In the middle: what was on Ceph and on this host by the last checkpoint is gone on from, and it is that very image.
    let large = ImageKey::random();
    bench = die(bench, "import large", "store::golden::checkpoint", large);
    assert!(matches!(bench.store.image(large), Err(StoreError::NoImage { .. })));
    assert_eq!(left(&bench), 2);
    bench.store.forget_imports(&[large]).unwrap();
    let rest = Large::default();
    let stored = bench.store.import(large, &project(), &rest, &mut go_on).unwrap();
    assert_eq!(rest.0.load(Ordering::Relaxed), 5 << 20, "what came after the checkpoint");
    let (elsewhere, whole) = (ImageKey::random(), Large::default());
    let expected = bench.store.import(elsewhere, &project(), &whole, &mut go_on).unwrap();
    assert_eq!((stored.kind, stored.data_bytes), (expected.kind, expected.data_bytes), "the digests of all of it");
    bench.forget(large);
    bench.store.open_image(large).unwrap().read_at(CHECKPOINT, &mut [0; 8]).unwrap();
    for image in [large, elsewhere] {
        bench.store.remove_image(image).unwrap();
    }

    let (disk, taken) = (disk(&bench.store, image), ImageKey::random());
    bench.store.open_disk(disk).unwrap().write_at(0, &[5; 512]).unwrap();
    bench.store.snapshot(disk, taken).unwrap();
    bench = die(bench, "flatten", "store::rbd::taken-in", taken);
    let flat = bench.store.image(taken).unwrap();
    assert!(matches!(flat.kind, StoredKind::Golden { .. }), "{flat:?}");
    let mut expected = pattern(SIZE);
    expected[..512].fill(5);
    assert!(read_all(&*bench.store.open_image(taken).unwrap()) == expected);
    assert_eq!(left(&bench), 2);

    bench = die(bench, "remove", "store::remove-image::unnamed", taken);
    assert!(matches!(bench.store.image(taken), Err(StoreError::NoImage { .. })));
    assert_eq!(left(&bench), 1, "its file went with it");
    assert!(read_all(&*bench.store.open_disk(disk).unwrap()) == expected, "its disk goes on");
}
