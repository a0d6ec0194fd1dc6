//! What every store must do, one function a rule. A store's test file makes a [`Fixture`] for it and says
//! `contract!(its_fixture)`.

#![allow(dead_code, unused_imports, reason = "each test file uses its part")]

use assay_imaging::store::device::BlockDevice;
use assay_imaging::store::export::Exported;
use assay_imaging::store::{Content, Dependent, ImageStore, StoreError, StoredImage, StoredKind};
use assay_wire::id::{AdmissionId, DiskId, ImageKey, ProjectId};
use assay_wire::imaging::ImageFormat;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A store of one test's own.
pub(crate) trait Fixture: Sized {
    fn store(&self) -> &dyn ImageStore;
    /// The process ends, and another opens the store.
    fn reopen(self) -> Self;
}

/// Makes a test of each rule.
macro_rules! contract {
    ($fixture:expr) => {
        contract!($fixture,
            an_import_keeps_its_content, an_image_is_made_once, a_broken_off_import_is_not_seen,
            an_import_goes_on_where_it_was_broken_off_if_its_source_is_the_same, an_import_is_forgotten,
            an_unreadable_source_leaves_no_image, a_disk_is_a_clone, disks_are_each_their_own, disks_outlive_the_process,
            a_disk_is_for_one_opener, what_is_missing_is_said_so, a_snapshot_keeps_what_its_disk_held,
            a_snapshot_is_made_once, an_open_disk_is_not_snapshotted_restored_or_removed, snapshots_outlive_their_disk,
            snapshots_of_snapshots, a_disk_is_restored, a_disk_is_not_restored_to_another_size,
            a_flattened_image_stands_alone, a_flattening_that_is_broken_off_leaves_the_snapshot,
            images_that_are_read_are_not_removed, removing_is_idempotent, a_disk_takes_what_it_wrote,
            a_disk_has_a_location, many_disks_at_once, a_sparse_image_is_exported_sparse);
    };
    ($fixture:expr, $($rule:ident),+) => {
        $(#[test] fn $rule() { store_contract::$rule($fixture); })+
    };
}
pub(crate) use contract;

/// Octets in memory as the content of an image.
pub(crate) struct Octets(pub(crate) Vec<u8>);

impl Content for Octets {
    fn virtual_bytes(&self) -> u64 {
        (self.0.len() as u64).next_multiple_of(512)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        buffer.fill(0);
        let offset = usize::try_from(offset).unwrap();
        let end = self.0.len().min(offset + buffer.len());
        buffer[..end - offset].copy_from_slice(&self.0[offset..end]);
        Ok(())
    }

    fn identity(&self) -> Option<String> {
        None
    }
}

/// Content that differs everywhere, with zero stretches.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| if at / 140_000 % 3 == 1 { 0 } else { (at / 7 % 251) as u8 + 1 }).collect()
}

pub(crate) fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub(crate) fn project() -> ProjectId {
    "p1".parse().unwrap()
}

pub(crate) fn import(store: &dyn ImageStore, content: &[u8]) -> ImageKey {
    let key = ImageKey::random();
    store.import(key, &project(), &Octets(content.to_vec()), &mut go_on).unwrap();
    key
}

pub(crate) fn disk(store: &dyn ImageStore, image: ImageKey) -> DiskId {
    let disk = DiskId::random();
    store.create_disk(disk, &project(), image).unwrap();
    disk
}

pub(crate) fn read_all(device: &dyn BlockDevice) -> Vec<u8> {
    let mut content = vec![0xee; usize::try_from(device.byte_len()).unwrap()];
    device.read_at(0, &mut content).unwrap();
    content
}

fn write(store: &dyn ImageStore, disk: DiskId, at: usize, fill: u8, length: usize) {
    let open = opened(store, disk);
    open.write_at(at as u64, &vec![fill; length]).unwrap();
    open.flush().unwrap();
}

/// What `open` opens, once nobody has it: another test may be starting a program, which has whatever this process had
/// open, locks and all, until it runs.
pub(crate) fn not_in_use<T>(mut open: impl FnMut() -> Result<T, StoreError>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match open() {
            Err(StoreError::InUse { .. }) if Instant::now() < deadline => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}

fn opened(store: &dyn ImageStore, disk: DiskId) -> Arc<dyn BlockDevice> {
    not_in_use(|| store.open_disk(disk))
}

fn held(store: &dyn ImageStore, disk: DiskId) -> Vec<u8> {
    read_all(&*opened(store, disk))
}

fn image(store: &dyn ImageStore, image: ImageKey) -> Vec<u8> {
    read_all(&*store.open_image(image).unwrap())
}

fn snapshot(store: &dyn ImageStore, disk: DiskId) -> ImageKey {
    let key = ImageKey::random();
    store.snapshot(disk, key).unwrap();
    key
}

const SIZE: usize = 1 << 20;

pub(crate) fn an_import_keeps_its_content(fixture: impl Fixture) {
    let content = pattern(1_000_000);
    let (key, mut seen) = (ImageKey::random(), Vec::new());
    let imported = fixture.store().import(key, &project(), &Octets(content.clone()), &mut |done, total| {
        seen.push((done, total));
        ControlFlow::Continue(())
    });
    let stored = imported.unwrap();
    assert!(seen.is_sorted() && seen.last() == Some(&(1_000_448, 1_000_448)), "{seen:?}");
    assert_eq!((stored.key, stored.virtual_bytes), (key, 1_000_448), "filled up to a sector");
    assert!(stored.data_bytes < stored.virtual_bytes, "sparse stays sparse");
    let fixture = fixture.reopen();
    assert_eq!(fixture.store().images().unwrap(), std::slice::from_ref(&stored));
    assert_eq!(fixture.store().image(key).unwrap(), stored);
    let device = fixture.store().open_image(key).unwrap();
    let got = read_all(&*device);
    assert!(got[..content.len()] == content && got[content.len()..].iter().all(|octet| *octet == 0));
    let StoredKind::Golden { sha256, .. } = stored.kind else { panic!("{stored:?}") };
    assert_eq!(sha256, hex::encode(ring::digest::digest(&ring::digest::SHA256, &got)));
    device.write_at(0, &[1; 512]).unwrap_err();
    device.unmap(0, 512).unwrap_err();
}

pub(crate) fn an_image_is_made_once(fixture: impl Fixture) {
    let key = import(fixture.store(), &pattern(SIZE));
    let again = fixture.store().import(key, &project(), &Octets(vec![9; SIZE]), &mut go_on).unwrap();
    assert_eq!(again, fixture.store().image(key).unwrap());
    assert!(image(fixture.store(), key) == pattern(SIZE), "the first content stays");
}

pub(crate) fn a_broken_off_import_is_not_seen(fixture: impl Fixture) {
    let (key, content) = (ImageKey::random(), Octets(pattern(3 << 20)));
    let mut calls = 0;
    let broken = fixture.store().import(key, &project(), &content, &mut |_, _| {
        calls += 1;
        if calls > 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(broken, Err(StoreError::Cancelled)), "{broken:?}");
    let store = fixture.store();
    assert!(store.images().unwrap().is_empty());
    assert!(matches!(store.image(key), Err(StoreError::NoImage { image }) if image == key));
    store.create_disk(DiskId::random(), &project(), key).unwrap_err();
    let fixture = fixture.reopen();
    fixture.store().forget_imports(&[]).unwrap();
    fixture.store().import(key, &project(), &content, &mut go_on).unwrap();
    assert!(image(fixture.store(), key) == content.0);
}

/// Content that counts what is read of it, and begins with this octet.
struct Counted {
    content: Octets,
    identity: &'static str,
    read: AtomicU64,
}

impl Counted {
    fn new(identity: &'static str, fill: u8) -> Self {
        let mut content = pattern(8 << 20);
        content[..4096].fill(fill);
        Self { content: Octets(content), identity, read: AtomicU64::new(0) }
    }

    fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

impl Content for Counted {
    fn virtual_bytes(&self) -> u64 {
        self.content.virtual_bytes()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.content.read(offset, buffer)
    }

    fn identity(&self) -> Option<String> {
        Some(self.identity.to_owned())
    }
}

/// Breaks off in the middle.
fn half(done: u64, total: u64) -> ControlFlow<()> {
    if done * 2 >= total { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

pub(crate) fn an_import_goes_on_where_it_was_broken_off_if_its_source_is_the_same(fixture: impl Fixture) {
    let (key, other) = (ImageKey::random(), ImageKey::random());
    let broken = fixture.store().import(key, &project(), &Counted::new("a", 1), &mut half);
    assert!(matches!(broken, Err(StoreError::Cancelled)), "{broken:?}");
    let fixture = fixture.reopen();
    let store = fixture.store();
    assert!(store.images().unwrap().is_empty());
    store.forget_imports(&[key]).unwrap();
    let rest = Counted::new("a", 1);
    let stored = store.import(key, &project(), &rest, &mut go_on).unwrap();
    assert_eq!(rest.read(), 4 << 20, "only the second half");
    assert!(image(store, key) == rest.content.0);
    let StoredKind::Golden { sha256, .. } = stored.kind else { panic!("{stored:?}") };
    assert_eq!(sha256, hex::encode(ring::digest::digest(&ring::digest::SHA256, &rest.content.0)), "of all of it");

    // In the same process, and with another source.
    let changed = Counted::new("b", 2);
    store.import(other, &project(), &Counted::new("a", 1), &mut half).unwrap_err();
    store.import(other, &project(), &changed, &mut go_on).unwrap();
    assert_eq!(changed.read(), 8 << 20, "all of another source");
    assert!(image(store, other) == changed.content.0);
    let fixture = fixture.reopen();
    assert_eq!(fixture.store().images().unwrap().len(), 2);
}

pub(crate) fn an_import_is_forgotten(fixture: impl Fixture) {
    let (given_up, removed) = (ImageKey::random(), ImageKey::random());
    for key in [given_up, removed] {
        fixture.store().import(key, &project(), &Counted::new("a", 1), &mut half).unwrap_err();
    }
    let fixture = fixture.reopen();
    let store = fixture.store();
    store.remove_image(removed).unwrap();
    store.forget_imports(&[removed]).unwrap();
    for key in [given_up, removed] {
        let anew = Counted::new("a", 1);
        store.import(key, &project(), &anew, &mut go_on).unwrap();
        assert_eq!(anew.read(), 8 << 20);
        assert!(image(store, key) == anew.content.0);
    }
}

/// A source whose second half cannot be read.
struct Broken;

impl Content for Broken {
    fn virtual_bytes(&self) -> u64 {
        4 << 20
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        buffer.fill(7);
        if offset + buffer.len() as u64 <= 2 << 20 { Ok(()) } else { Err(StoreError::Cancelled) }
    }

    fn identity(&self) -> Option<String> {
        None
    }
}

pub(crate) fn an_unreadable_source_leaves_no_image(fixture: impl Fixture) {
    fixture.store().import(ImageKey::random(), &project(), &Broken, &mut go_on).unwrap_err();
    assert!(fixture.store().images().unwrap().is_empty());
    assert!(fixture.reopen().store().images().unwrap().is_empty());
}

pub(crate) fn a_disk_is_a_clone(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(SIZE));
    let disk = disk(store, golden);
    assert!(held(store, disk) == pattern(SIZE));
    write(store, disk, 100_000, 0x55, 50_000);
    let mut expected = pattern(SIZE);
    expected[100_000..150_000].fill(0x55);
    assert!(held(store, disk) == expected);
    assert!(image(store, golden) == pattern(SIZE), "a golden image never changes");
}

pub(crate) fn disks_are_each_their_own(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(SIZE));
    let (first, second) = (disk(store, golden), disk(store, golden));
    write(store, first, 0, 1, 4096);
    write(store, second, 0, 2, 4096);
    assert_eq!((held(store, first)[0], held(store, second)[0]), (1, 2));
    store.remove_disk(first).unwrap();
    assert_eq!(held(store, second)[4095], 2);
    store.create_disk(second, &project(), golden).unwrap();
    assert_eq!(held(store, second)[0], 2, "a disk is never replaced by an empty one");
}

pub(crate) fn disks_outlive_the_process(fixture: impl Fixture) {
    let disk = disk(fixture.store(), import(fixture.store(), &pattern(SIZE)));
    write(fixture.store(), disk, 5000, 7, 10_000);
    let fixture = fixture.reopen();
    let mut expected = pattern(SIZE);
    expected[5000..15_000].fill(7);
    assert!(held(fixture.store(), disk) == expected);
}

pub(crate) fn a_disk_is_for_one_opener(fixture: impl Fixture) {
    let store = fixture.store();
    let disk = disk(store, import(store, &pattern(SIZE)));
    let open = opened(store, disk);
    assert!(matches!(store.open_disk(disk), Err(StoreError::InUse { .. })));
    drop(open);
    opened(store, disk);
}

pub(crate) fn what_is_missing_is_said_so(fixture: impl Fixture) {
    let store = fixture.store();
    let (no_image, no_disk) = (ImageKey::random(), DiskId::random());
    let golden = import(store, &pattern(SIZE));
    let there = disk(store, golden);
    for error in [
        store.image(no_image).unwrap_err(),
        store.open_image(no_image).unwrap_err(),
        store.flatten(no_image, &mut go_on).unwrap_err(),
        store.create_disk(no_disk, &project(), no_image).unwrap_err(),
        store.restore(there, no_image).unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::NoImage { image } if image == no_image), "{error}");
    }
    for error in [
        store.open_disk(no_disk).unwrap_err(),
        store.snapshot(no_disk, no_image).unwrap_err(),
        store.restore(no_disk, golden).unwrap_err(),
        store.disk_bytes(no_disk).unwrap_err(),
        store.location(no_disk, AdmissionId::random()).unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::NoDisk { disk } if disk == no_disk), "{error}");
    }
    assert_eq!(store.images().unwrap().len(), 1);
}

pub(crate) fn a_snapshot_keeps_what_its_disk_held(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(SIZE));
    let disk = disk(store, golden);
    write(store, disk, 4096, 1, 8192);
    let taken = snapshot(store, disk);
    assert_eq!(store.image(taken).unwrap().kind, StoredKind::Snapshot { parent: golden });
    write(store, disk, 8192, 2, 8192);
    let fixture = fixture.reopen();
    let store = fixture.store();
    let mut expected = pattern(SIZE);
    expected[4096..12_288].fill(1);
    assert!(image(store, taken) == expected, "as it was");
    let clone = self::disk(store, taken);
    assert!(held(store, clone) == expected, "so is a disk made of it");
    expected[8192..16_384].fill(2);
    assert!(held(store, disk) == expected, "the disk went on");
    write(store, clone, 0, 9, 512);
    assert!(held(store, disk) == expected && image(store, taken)[0] != 9);
    let empty = snapshot(store, self::disk(store, golden));
    assert!(image(store, empty) == pattern(SIZE), "of a disk that was never written to");
}

pub(crate) fn a_snapshot_is_made_once(fixture: impl Fixture) {
    let store = fixture.store();
    let disk = disk(store, import(store, &pattern(SIZE)));
    write(store, disk, 0, 1, 4096);
    let taken = snapshot(store, disk);
    write(store, disk, 0, 2, 4096);
    let stored = store.image(taken).unwrap();
    store.snapshot(disk, taken).unwrap();
    assert_eq!(store.image(taken).unwrap(), stored);
    assert_eq!(image(store, taken)[0], 1);
}

pub(crate) fn an_open_disk_is_not_snapshotted_restored_or_removed(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(SIZE));
    let disk = disk(store, golden);
    let open = opened(store, disk);
    open.write_at(0, &[5; 4096]).unwrap();
    for refused in [store.snapshot(disk, ImageKey::random()), store.restore(disk, golden), store.remove_disk(disk)] {
        assert!(matches!(refused, Err(StoreError::InUse { .. })), "{refused:?}");
    }
    open.write_at(4096, &[6; 4096]).unwrap();
    open.flush().unwrap();
    drop(open);
    let content = held(store, disk);
    assert_eq!((content[0], content[4096]), (5, 6));
    assert_eq!(store.images().unwrap().len(), 1);
    snapshot(store, disk);
}

pub(crate) fn snapshots_outlive_their_disk(fixture: impl Fixture) {
    let store = fixture.store();
    let disk = disk(store, import(store, &pattern(SIZE)));
    write(store, disk, 0, 3, 4096);
    let first = snapshot(store, disk);
    write(store, disk, 4096, 4, 4096);
    let second = snapshot(store, disk);
    store.remove_disk(disk).unwrap();
    let fixture = fixture.reopen();
    let store = fixture.store();
    let content = image(store, second);
    assert_eq!((content[0], content[4096]), (3, 4));
    store.remove_image(second).unwrap();
    assert_eq!(image(store, first)[0], 3, "what it shared with the other is still there");
}

pub(crate) fn snapshots_of_snapshots(fixture: impl Fixture) {
    let golden = import(fixture.store(), &pattern(SIZE));
    let (mut parent, mut model) = (golden, pattern(SIZE));
    let mut generations = Vec::new();
    for generation in 1..=6_u8 {
        let disk = disk(fixture.store(), parent);
        let at = usize::from(generation) * 10_000;
        write(fixture.store(), disk, at, generation, 30_000);
        model[at..at + 30_000].fill(generation);
        parent = snapshot(fixture.store(), disk);
        generations.push((parent, model.clone()));
        fixture.store().remove_disk(disk).unwrap();
    }
    let fixture = fixture.reopen();
    for (key, content) in &generations {
        assert!(image(fixture.store(), *key) == *content, "{key}");
    }
}

pub(crate) fn a_disk_is_restored(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(SIZE));
    let disk = disk(store, golden);
    write(store, disk, 0, 1, 4096);
    let taken = snapshot(store, disk);
    write(store, disk, 0, 2, 200_000);
    store.restore(disk, taken).unwrap();
    let mut expected = pattern(SIZE);
    expected[..4096].fill(1);
    assert!(held(store, disk) == expected);
    write(store, disk, 0, 3, 512);
    assert!(image(store, taken) == expected, "and writes to it no more than before");
    let fixture = fixture.reopen();
    fixture.store().restore(disk, golden).unwrap();
    assert!(held(fixture.store(), disk) == pattern(SIZE));
    assert!(image(fixture.store(), taken) == expected);
}

pub(crate) fn a_disk_is_not_restored_to_another_size(fixture: impl Fixture) {
    let store = fixture.store();
    let disk = disk(store, import(store, &pattern(SIZE)));
    write(store, disk, 0, 1, 4096);
    let larger = import(store, &pattern(2 * SIZE));
    assert!(matches!(store.restore(disk, larger), Err(StoreError::SizesDiffer { .. })));
    assert_eq!(held(store, disk)[0], 1);
}

pub(crate) fn a_flattened_image_stands_alone(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(SIZE));
    let disk = disk(store, golden);
    write(store, disk, 50_000, 1, 70_000);
    let taken = snapshot(store, disk);
    store.remove_disk(disk).unwrap();
    let clone = self::disk(store, taken);
    write(store, clone, 0, 2, 512);
    let flat = store.flatten(taken, &mut go_on).unwrap();
    let mut expected = pattern(SIZE);
    expected[50_000..120_000].fill(1);
    let digest = hex::encode(ring::digest::digest(&ring::digest::SHA256, &expected));
    assert!(matches!(&flat.kind, StoredKind::Golden { sha256, .. } if *sha256 == digest), "{flat:?}");
    assert_eq!(store.flatten(taken, &mut go_on).unwrap(), flat);
    let fixture = fixture.reopen();
    let store = fixture.store();
    assert_eq!(store.image(taken).unwrap(), flat);
    assert!(image(store, taken) == expected);
    let later = self::disk(store, taken);
    assert!(held(store, later) == expected);
    expected[..512].fill(2);
    assert!(held(store, clone) == expected, "disks made before go on");
    store.remove_disk(clone).unwrap();
    store.remove_image(golden).unwrap();
    expected[..512].copy_from_slice(&pattern(SIZE)[..512]);
    assert!(image(store, taken) == expected && held(store, later) == expected);
}

pub(crate) fn a_flattening_that_is_broken_off_leaves_the_snapshot(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(12 * SIZE));
    let disk = disk(store, golden);
    write(store, disk, 0, 1, 4096);
    let taken = snapshot(store, disk);
    let mut calls = 0;
    let broken = store.flatten(taken, &mut |_, _| {
        calls += 1;
        if calls > 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(broken, Err(StoreError::Cancelled)), "{broken:?}");
    let fixture = fixture.reopen();
    let store = fixture.store();
    assert_eq!(store.image(taken).unwrap().kind, StoredKind::Snapshot { parent: golden });
    assert_eq!(image(store, taken)[0], 1);
    store.flatten(taken, &mut go_on).unwrap();
    let mut expected = pattern(12 * SIZE);
    expected[..4096].fill(1);
    assert!(image(store, taken) == expected);
}

pub(crate) fn images_that_are_read_are_not_removed(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(SIZE));
    let disk = disk(store, golden);
    write(store, disk, 0, 1, 512);
    let taken = snapshot(store, disk);
    let dependents = |image| match store.remove_image(image) {
        Err(StoreError::HasDependents { image: named, dependents }) if named == image => dependents,
        other => panic!("{other:?}"),
    };
    assert_eq!(dependents(golden), [Dependent::Image(taken), Dependent::Disk(disk)]);
    let clone = self::disk(store, taken);
    assert_eq!(dependents(taken), [Dependent::Disk(clone)]);
    store.restore(clone, golden).unwrap();
    store.remove_image(taken).unwrap();
    assert_eq!(held(store, disk)[0], 1, "its disk goes on");
    store.remove_disk(clone).unwrap();
    store.remove_disk(disk).unwrap();
    store.remove_image(golden).unwrap();
    assert!(store.images().unwrap().is_empty());
}

pub(crate) fn removing_is_idempotent(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(SIZE));
    let disk = disk(store, golden);
    store.remove_disk(disk).unwrap();
    store.remove_disk(disk).unwrap();
    store.remove_image(golden).unwrap();
    store.remove_image(golden).unwrap();
    assert!(matches!(store.open_image(golden), Err(StoreError::NoImage { .. })));
    assert!(matches!(store.open_disk(disk), Err(StoreError::NoDisk { .. })));
}

pub(crate) fn a_disk_takes_what_it_wrote(fixture: impl Fixture) {
    let store = fixture.store();
    let disk = disk(store, import(store, &pattern(8 * SIZE)));
    let empty = store.disk_bytes(disk).unwrap();
    assert!(empty < 1 << 20, "a clone of 8 MiB takes {empty}");
    write(store, disk, 0, 1, 4 << 20);
    let written = store.disk_bytes(disk).unwrap();
    assert!((4 << 20..6 << 20).contains(&written), "4 MiB written take {written}");
}

pub(crate) fn a_disk_has_a_location(fixture: impl Fixture) {
    let store = fixture.store();
    let (admission, golden) = (AdmissionId::random(), import(store, &pattern(SIZE)));
    let disk = disk(store, golden);
    let location = store.location(disk, admission).unwrap();
    assert_eq!(store.location(disk, admission).unwrap(), location, "the same for the same admission");
    store.revoke(disk, admission).unwrap();
    store.revoke(disk, admission).unwrap();
    assert!(held(store, disk) == pattern(SIZE), "the disk itself stays");
}

pub(crate) fn many_disks_at_once(fixture: impl Fixture) {
    let store = fixture.store();
    let golden = import(store, &pattern(SIZE));
    let disks: Vec<DiskId> = (0..32).map(|_| DiskId::random()).collect();
    std::thread::scope(|scope| {
        for some in disks.chunks(8) {
            scope.spawn(move || {
                for disk in some {
                    store.create_disk(*disk, &project(), golden).unwrap();
                }
            });
        }
    });
    for disk in &disks {
        assert!(held(store, *disk) == pattern(SIZE));
    }
    std::thread::scope(|scope| {
        for some in disks.chunks(8) {
            scope.spawn(move || some.iter().for_each(|disk| store.remove_disk(*disk).unwrap()));
        }
    });
    store.remove_image(golden).unwrap();
}

/// Octets of a qcow2 file that QEMU finds data for, and those of the file.
fn exported(device: Arc<dyn BlockDevice>, folder: &std::path::Path, expected: &[u8]) -> (u64, u64) {
    let file = Exported::new(device, ImageFormat::Qcow2).unwrap();
    let mut octets = vec![0; usize::try_from(file.byte_len()).unwrap()];
    file.read_at(0, &mut octets).unwrap();
    std::fs::write(folder.join("exported.qcow2"), octets).unwrap();
    std::fs::write(folder.join("expected.raw"), expected).unwrap();
    let qemu_img = |arguments: &[&str]| {
        let output = std::process::Command::new("qemu-img").args(arguments).current_dir(folder).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        output.stdout
    };
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", "exported.qcow2", "expected.raw"]);
    let map = qemu_img(&["map", "-f", "qcow2", "--output=json", "exported.qcow2"]);
    let map: serde_json::Value = serde_json::from_slice(&map).unwrap();
    let data = map.as_array().unwrap().iter().filter(|part| part["data"] == true);
    (data.map(|part| part["length"].as_u64().unwrap()).sum(), file.byte_len())
}

/// Also where it is a snapshot, and a disk emptied what its image has.
pub(crate) fn a_sparse_image_is_exported_sparse(fixture: impl Fixture) {
    const MIB: usize = 1 << 20;
    let (store, folder) = (fixture.store(), tempfile::tempdir().unwrap());
    let mut content = vec![0; 64 * MIB];
    for at in [0, 8 * MIB, 40 * MIB] {
        content[at..at + MIB].fill(0x5a);
    }
    let golden = import(store, &content);
    // Tables, which are a few clusters, beside the data.
    let tables = 16 * 65_536;
    let (data, octets) = exported(store.open_image(golden).unwrap(), folder.path(), &content);
    assert_eq!(data, 3 * MIB as u64);
    assert!(octets <= data + tables, "{octets} octets for {data}");

    let disk = disk(store, golden);
    let open = opened(store, disk);
    open.unmap(8 * MIB as u64, 4 * MIB as u64).unwrap();
    open.write_at(20 * MIB as u64, &[7; MIB]).unwrap();
    open.flush().unwrap();
    let (mapped, _) = open.is_mapped(8 * MIB as u64, MIB as u64).unwrap();
    assert!(!mapped && open.is_mapped(20 * MIB as u64, 1).unwrap().0);
    drop(open);
    let taken = snapshot(store, disk);
    content[8 * MIB..9 * MIB].fill(0);
    content[20 * MIB..21 * MIB].fill(7);
    let (data, octets) = exported(store.open_image(taken).unwrap(), folder.path(), &content);
    assert_eq!(data, 3 * MIB as u64, "neither the hole in the image nor what the disk emptied");
    assert!(octets <= data + tables, "{octets} octets for {data}");
}
