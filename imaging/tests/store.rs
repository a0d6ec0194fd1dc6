//! The image store: clones against a plain vector, power cuts, full disks, rotten golden images.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod store_contract;

use assay_imaging::store::device::{BlockDevice, DeviceError};
use assay_imaging::store::import::Source;
use assay_imaging::store::overlay::{DiskFiles, HostBoot, Overlay, TopFiles};
use assay_imaging::store::{ImageStore as _, LocalStore, StoreError};
use assay_wire::id::{DiskId, ImageKey};
use assay_wire::imaging::ImageFormat;
use proptest::prelude::*;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store_contract::{Fixture, Octets, contract, go_on, pattern, project, read_all};

const BOOT: HostBoot = HostBoot::from_bytes([1; 16]);
const NEXT_BOOT: HostBoot = HostBoot::from_bytes([2; 16]);

struct Bench {
    _folder: tempfile::TempDir,
    root: PathBuf,
    store: LocalStore,
    image: ImageKey,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        let store = LocalStore::open(&root.join("store")).unwrap();
        Self { _folder: folder, root, store, image: ImageKey::random() }
    }

    fn import(&self, content: &[u8]) {
        self.store.import(self.image, &project(), &Octets(content.to_vec()), &mut go_on).unwrap();
    }

    fn golden(&self) -> Arc<dyn BlockDevice> {
        self.store.open_image(self.image).unwrap()
    }

    fn disk(&self) -> DiskId {
        store_contract::disk(&self.store, self.image)
    }

    fn open(&self, disk: DiskId, boot: HostBoot) -> Overlay {
        let files = store_contract::not_in_use(|| DiskFiles::open(&self.root.join("store"), disk));
        Overlay::open(files, boot).unwrap()
    }

    fn left(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join("store").join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Fixture for Bench {
    fn store(&self) -> &dyn assay_imaging::store::ImageStore {
        &self.store
    }

    fn reopen(self) -> Self {
        let Self { _folder, root, store, image } = self;
        drop(store);
        let store = LocalStore::open(&root.join("store")).unwrap();
        Self { _folder, root, store, image }
    }
}

contract!(Bench::new());

#[test]
fn zero_blocks_of_a_golden_image_take_no_room() {
    let bench = Bench::new();
    bench.import(&pattern(1_000_000));
    let on_disk = std::fs::metadata(bench.store.image_folder(bench.image).join("disk.raw")).unwrap();
    assert!(on_disk.blocks() * 512 < 1_000_000);
}

#[test]
fn a_source_is_what_it_was_promised_to_be() {
    let bench = Bench::new();
    let path = bench.root.join("source.raw");
    std::fs::write(&path, pattern(300_000)).unwrap();
    let source = Source::open(&path, ImageFormat::Raw, std::slice::from_ref(&bench.root)).unwrap();
    let digest = hex::encode(ring::digest::digest(&ring::digest::SHA256, &pattern(300_000)));
    assert_eq!(source.digest(Some(&digest.to_uppercase()), &mut go_on).unwrap(), digest);
    let error = source.digest(Some(&digest.replace('a', "b")), &mut go_on).unwrap_err();
    assert!(error.to_string().contains(&format!("source.raw has SHA-256 {digest}, not ")), "{error}");
}

#[test]
fn sources_are_regular_files_beneath_the_import_folders() {
    let bench = Bench::new();
    let inside = bench.root.join("inside");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(bench.root.join("secret"), b"x").unwrap();
    std::os::unix::fs::symlink("../secret", inside.join("link")).unwrap();
    std::os::unix::fs::symlink(bench.root.join("secret"), inside.join("absolute")).unwrap();
    std::fs::write(inside.join("empty"), b"").unwrap();
    let folders = [inside.clone()];
    for bad in ["link", "absolute", "../secret", "missing", "empty", "."] {
        let opened = Source::open(&inside.join(bad), ImageFormat::Raw, &folders);
        assert!(opened.is_err(), "{bad} was opened");
    }
    assert!(Source::open(Path::new("/etc/passwd"), ImageFormat::Raw, &folders).is_err());
    assert!(Source::open(&inside.join("link"), ImageFormat::Raw, &[]).is_err(), "no folder means none");
}

#[test]
fn the_store_has_one_owner() {
    let bench = Bench::new();
    let error = LocalStore::open(&bench.root.join("store")).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
}

#[test]
fn what_a_crash_left_is_swept_up_and_nothing_else() {
    let bench = Bench::new();
    bench.import(&pattern(100_000));
    let disk = bench.disk();
    bench.store.open_disk(disk).unwrap().write_at(0, &[1; 4096]).unwrap();
    let taken = ImageKey::random();
    bench.store.snapshot(disk, taken).unwrap();
    let stray = bench.root.join("store/layers").join(ImageKey::random().to_string());
    Overlay::create(&stray, 4096).unwrap();
    std::fs::create_dir(bench.store.image_folder(ImageKey::random())).unwrap();
    let bench = bench.reopen();
    assert!(!stray.exists());
    assert_eq!((bench.left("layers").len(), bench.left("images").len()), (2, 2));
    bench.store.remove_disk(disk).unwrap();
    assert_eq!(bench.left("layers").len(), 1, "the image's");
    bench.store.remove_image(taken).unwrap();
    assert!(bench.left("layers").is_empty());
}

#[test]
fn a_rotten_golden_block_is_an_error_and_not_data() {
    let bench = Bench::new();
    bench.import(&pattern(300_000));
    let disk = bench.disk();
    let folder = bench.store.image_folder(bench.image);
    let damage = |name, at| {
        let file = std::fs::OpenOptions::new().write(true).open(folder.join(name)).unwrap();
        file.write_all_at(b"rot", at).unwrap();
    };
    damage("disk.raw", 65_536 * 3 + 5);
    let overlay = bench.open(disk, BOOT);
    let mut buffer = [0; 512];
    overlay.read_at(0, &mut buffer).unwrap();
    let error = overlay.read_at(65_536 * 3 + 4096, &mut buffer).unwrap_err();
    assert!(matches!(error, DeviceError::Corrupt { offset } if offset == 65_536 * 3), "{error:?}");
    assert!(!overlay.try_read_at(65_536 * 3, &mut buffer).unwrap(), "never from the cache unchecked");
    drop(overlay);
    // Nor does it help to put the hash of other content into the tree.
    damage("tree.sha256", 32 + 5);
    let error = bench.open(disk, BOOT).read_at(0, &mut buffer).unwrap_err();
    assert!(matches!(error, DeviceError::Corrupt { offset: 0 }), "{error:?}");
}

#[test]
fn a_damaged_allocation_map_is_not_believed() {
    let bench = Bench::new();
    bench.import(&pattern(100_000));
    let disk = bench.disk();
    let map = bench.store.top_folder(disk).unwrap().join("map");
    std::fs::OpenOptions::new().write(true).open(map).unwrap().write_all_at(b"?", 0).unwrap();
    let error = bench.store.open_disk(disk).unwrap_err();
    assert!(error.to_string().contains("allocation map"), "{error}");
}

#[test]
fn a_top_that_was_frozen_meanwhile_is_not_opened_as_one() {
    let bench = Bench::new();
    bench.import(&pattern(100_000));
    let disk = bench.disk();
    let frozen = bench.store.top_folder(disk).unwrap();
    bench.store.open_disk(disk).unwrap().write_at(0, &[1; 512]).unwrap();
    bench.store.snapshot(disk, ImageKey::random()).unwrap();
    let opened = DiskFiles::open(&bench.root.join("store"), disk).unwrap();
    assert_ne!(opened.top.name, frozen);
    assert_eq!(opened.layers.len(), 1);
}

#[test]
fn chains_have_an_end() {
    let bench = Bench::new();
    bench.import(&pattern(8192));
    let disk = bench.disk();
    let snapshot = || {
        bench.store.open_disk(disk).unwrap().write_at(0, &[1; 512]).unwrap();
        bench.store.snapshot(disk, ImageKey::random())
    };
    for _ in 0..assay_imaging::store::manifest::MAX_LAYERS {
        snapshot().unwrap();
    }
    let error = snapshot().unwrap_err();
    assert!(matches!(error, StoreError::ChainTooLong { layers: 64, .. }), "{error}");
    bench.store.open_disk(disk).unwrap();
}

#[test]
fn a_full_disk_is_said_so_and_loses_nothing() {
    let bench = Bench::new();
    let content = pattern(3 << 20);
    bench.import(&content);
    let full = SmallDisk::mount(&bench.root.join("small"), 1 << 20);
    let folder = full.0.join("disk");
    Overlay::create(&folder, 3 << 20).unwrap();
    let open = || Overlay::from_files(TopFiles::open(&folder).unwrap(), bench.golden(), BOOT).unwrap();
    let overlay = open();
    overlay.write_at(0, &[7; 4096]).unwrap();
    overlay.flush().unwrap();
    let error = overlay.write_at(1 << 20, &vec![8; 2 << 20]).unwrap_err();
    assert!(matches!(error, DeviceError::Full { offset: 0x10_0000 }), "{error:?}");
    let mut expected = content;
    expected[..4096].fill(7);
    assert_eq!(read_all(&overlay), expected, "the failed write left no trace");
    overlay.unmap(0, 4096).unwrap();
    drop(overlay);
    expected[..4096].fill(0);
    assert_eq!(read_all(&open()), expected);
}

#[test]
fn a_full_host_refuses_new_images_and_snapshots_and_keeps_the_old() {
    let bench = Bench::new();
    let small = SmallDisk::mount(&bench.root.join("small"), 12 << 20);
    let store = LocalStore::open(&small.0.join("store")).unwrap();
    let golden = store_contract::import(&store, &vec![1; 4 << 20]);
    let disk = store_contract::disk(&store, golden);
    let written = store.open_disk(disk).unwrap();
    written.write_at(0, &[2; 8192]).unwrap();
    drop(written);
    let refused = store.import(ImageKey::random(), &project(), &Octets(vec![3; 9 << 20]), &mut go_on).unwrap_err();
    let StoreError::Io { source, .. } = &refused else { panic!("{refused:?}") };
    assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{refused}");
    let ballast = small.0.join("ballast");
    // Until nothing more fits.
    let filled = std::fs::write(&ballast, vec![1; 16 << 20]).unwrap_err();
    assert_eq!(filled.kind(), std::io::ErrorKind::StorageFull);
    for refused in [store.snapshot(disk, ImageKey::random()), store.create_disk(DiskId::random(), &project(), golden)] {
        assert!(matches!(refused, Err(StoreError::Io { .. })), "{refused:?}");
    }
    assert_eq!(store.images().unwrap().len(), 1);
    let mut expected = vec![1; 4 << 20];
    expected[..8192].fill(2);
    assert!(read_all(&*store.open_disk(disk).unwrap()) == expected);
    std::fs::remove_file(&ballast).unwrap();
    let taken = ImageKey::random();
    store.snapshot(disk, taken).unwrap();
    assert!(read_all(&*store.open_image(taken).unwrap()) == expected);
}

#[test]
fn a_manifest_that_cannot_be_read_costs_no_other_image() {
    let bench = Bench::new();
    bench.import(&pattern(100_000));
    let disk = bench.disk();
    bench.store.open_disk(disk).unwrap().write_at(0, &[1; 512]).unwrap();
    let taken = ImageKey::random();
    bench.store.snapshot(disk, taken).unwrap();
    let manifest = bench.store.image_folder(taken).join("image.json");
    let good = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, b"{").unwrap();
    let bench = bench.reopen();
    assert_eq!(bench.store.images().unwrap().len(), 1);
    assert!(
        matches!(bench.store.remove_image(bench.image), Err(StoreError::Malformed { .. })),
        "who knows what reads it"
    );
    bench.store.remove_disk(disk).unwrap();
    std::fs::write(&manifest, good).unwrap();
    assert_eq!(read_all(&*bench.store.open_image(taken).unwrap())[0], 1, "its layers were kept");
}

/// A file system with a size, mounted while this lives.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &Path, byte_len: u64) -> Self {
        std::fs::create_dir(path).unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={byte_len}"), "tmpfs"])
            .arg(path)
            .status()
            .unwrap();
        assert!(mounted.success(), "mounting a tmpfs needs root");
        Self(path.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, usize, u8),
    Unmap(usize, usize),
    Read(usize, usize),
    Flush,
    /// The process ends and another opens the clone.
    Restart,
    /// A snapshot is taken, and the disk goes on.
    Snapshot,
    /// The host loses power: `live` comes back as the past left it, `map` as flushed.
    PowerCut,
}

fn step(length: usize) -> impl Strategy<Value = Step> {
    let range = move || {
        (0..length, prop_oneof![1..2000_usize, 4096..5000_usize, 1..200_000_usize])
            .prop_map(move |(at, len)| (at, len.min(length - at)))
    };
    let aligned = move || {
        (0..length / 4096, 1..4_usize).prop_map(move |(at, len)| (at * 4096, (len * 4096).min(length - at * 4096)))
    };
    prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((at, len), fill)| Step::Write(at, len, fill)),
        3 => (aligned(), any::<u8>()).prop_map(|((at, len), fill)| Step::Write(at, len, fill)),
        2 => range().prop_map(|(at, len)| Step::Unmap(at, len)),
        3 => range().prop_map(|(at, len)| Step::Read(at, len)),
        2 => Just(Step::Flush),
        1 => Just(Step::Restart),
        1 => Just(Step::Snapshot),
        1 => Just(Step::PowerCut),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_clone_behaves_like_a_vector(steps in prop::collection::vec(step(400_384), 1..40)) {
        let bench = Bench::new();
        let golden_content = {
            let mut content = pattern(400_384);
            content.truncate(400_384);
            content
        };
        bench.import(&golden_content);
        let disk = bench.disk();
        let golden = bench.golden();
        let mut model = golden_content;
        let (mut boot, mut taken) = (HostBoot::current().unwrap(), Vec::new());
        let mut overlay = bench.open(disk, boot);
        for step in steps {
            match step {
                Step::Write(at, len, fill) => {
                    let pieces: Vec<_> = vec![fill; len].chunks(1460).map(bytes::Bytes::copy_from_slice).collect();
                    overlay.write_pieces_at(at as u64, &pieces).unwrap();
                    model[at..at + len].fill(fill);
                }
                Step::Unmap(at, len) => {
                    overlay.unmap(at as u64, len as u64).unwrap();
                    model[at..at + len].fill(0);
                }
                Step::Read(at, len) => {
                    let mut got = vec![0xaa; len];
                    overlay.read_at(at as u64, &mut got).unwrap();
                    prop_assert!(got == model[at..at + len], "read of {} at {}", len, at);
                    let mut cached = vec![0xaa; len];
                    if overlay.try_read_at(at as u64, &mut cached).unwrap() {
                        prop_assert!(cached == got);
                    }
                }
                Step::Flush => overlay.flush().unwrap(),
                Step::Restart => {
                    drop(overlay);
                    overlay = bench.open(disk, boot);
                }
                Step::Snapshot => {
                    drop(overlay);
                    let key = ImageKey::random();
                    bench.store.snapshot(disk, key).unwrap();
                    taken.push((key, model.clone()));
                    overlay = bench.open(disk, boot);
                }
                Step::PowerCut => {
                    // What was flushed must be there without `live`; so flush, then let `live` claim everything, as
                    // a page cache that was written back in a bad order would, under a boot that is over.
                    overlay.flush().unwrap();
                    drop(overlay);
                    let live = std::fs::OpenOptions::new()
                        .write(true)
                        .open(bench.store.top_folder(disk).unwrap().join("live")).unwrap();
                    live.write_all_at(&[0xff; 16], 4096).unwrap();
                    // The store itself knows the running boot only: a snapshot is as of now.
                    boot = NEXT_BOOT;
                    drop(bench.open(disk, boot));
                    boot = HostBoot::current().unwrap();
                    overlay = bench.open(disk, boot);
                }
            }
        }
        prop_assert!(read_all(&overlay) == model);
        for (key, content) in taken {
            prop_assert!(read_all(&*bench.store.open_image(key).unwrap()) == content);
        }
        prop_assert!(read_all(&*golden) == pattern(400_384), "the golden image never changes");
    }
}

#[test]
fn writes_that_were_not_flushed_read_as_old_or_new_after_a_power_cut() {
    let bench = Bench::new();
    let content = pattern(200_704);
    bench.import(&content);
    let disk = bench.disk();
    let overlay = bench.open(disk, BOOT);
    overlay.write_at(0, &[9; 8192]).unwrap();
    overlay.flush().unwrap();
    overlay.write_at(4096, &[5; 8192]).unwrap();
    drop(overlay);
    let overlay = bench.open(disk, NEXT_BOOT);
    let got = read_all(&overlay);
    assert_eq!(got[..4096], [9; 4096], "flushed");
    assert_eq!(got[4096..8192], [5; 4096], "its granule was on record");
    assert_eq!(got[8192..], content[8192..], "not on record, so the golden image's");
}

#[test]
fn writers_of_neighbouring_sectors_do_not_lose_each_other() {
    let bench = Bench::new();
    bench.import(&pattern(1 << 20));
    let overlay = bench.open(bench.disk(), BOOT);
    std::thread::scope(|scope| {
        for writer in 0..8_u64 {
            let overlay = &overlay;
            scope.spawn(move || {
                for sector in (writer..2048).step_by(8) {
                    overlay.write_at(sector * 512, &[writer as u8 + 1; 512]).unwrap();
                }
            });
        }
    });
    let got = read_all(&overlay);
    for (sector, content) in got.chunks(512).enumerate() {
        assert!(content.iter().all(|octet| usize::from(*octet) == sector % 8 + 1), "sector {sector}");
    }
}

#[test]
fn the_largest_disk_is_cloned_without_its_size_being_spent() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    Overlay::create(&disk, 1 << 40).unwrap();
    assert_eq!(Overlay::allocated_bytes(&disk).unwrap(), 0);
}
