//! The image store: clones against a plain vector, power cuts, full disks, rotten golden images.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

use assay_imaging::store::ImageStore;
use assay_imaging::store::device::{BlockDevice, DeviceError};
use assay_imaging::store::golden::GoldenImage;
use assay_imaging::store::import::{Import, Source};
use assay_imaging::store::overlay::{HostBoot, Overlay};
use assay_wire::id::{DiskId, ImageId};
use assay_wire::imaging::ImageFormat;
use proptest::prelude::*;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const BOOT: HostBoot = HostBoot::from_bytes([1; 16]);
const NEXT_BOOT: HostBoot = HostBoot::from_bytes([2; 16]);

/// Content that differs everywhere, with zero stretches.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| if at / 140_000 % 3 == 1 { 0 } else { (at / 7 % 251) as u8 + 1 }).collect()
}

struct Bench {
    _folder: tempfile::TempDir,
    root: PathBuf,
    store: ImageStore,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        let store = ImageStore::open(&root.join("store")).unwrap();
        Self { _folder: folder, root, store }
    }

    fn image(&self) -> ImageId {
        "golden".parse().unwrap()
    }

    fn import(&self, content: &[u8]) -> assay_wire::imaging::Image {
        let path = self.root.join("source.raw");
        std::fs::write(&path, content).unwrap();
        let source = Source::open(&path, ImageFormat::Raw, std::slice::from_ref(&self.root)).unwrap();
        let job = Import { name: self.image(), project: "p1".parse().unwrap(), source, now_ms: 7 };
        self.store.import(&job, &mut |_, _| ControlFlow::Continue(())).unwrap()
    }

    fn golden(&self) -> Arc<GoldenImage> {
        Arc::new(GoldenImage::open(&self.store.image_folder(&self.image())).unwrap())
    }

    fn disk(&self) -> PathBuf {
        let disk = DiskId::random();
        self.store.create_disk(disk, &self.image()).unwrap();
        self.store.disk_folder(disk)
    }
}

fn read_all(device: &dyn BlockDevice) -> Vec<u8> {
    let mut content = vec![0xee; usize::try_from(device.byte_len()).unwrap()];
    device.read_at(0, &mut content).unwrap();
    content
}

#[test]
fn an_import_keeps_content_and_holes() {
    let bench = Bench::new();
    let content = pattern(1_000_000);
    let image = bench.import(&content);
    assert_eq!(image.virtual_bytes, 1_000_448, "filled up to a sector");
    let golden = bench.golden();
    let got = read_all(&*golden);
    assert_eq!(got[..content.len()], content);
    assert!(got[content.len()..].iter().all(|octet| *octet == 0));
    let digest = ring::digest::digest(&ring::digest::SHA256, &got);
    assert_eq!(image.sha256, hex::encode(digest));
    let on_disk = std::fs::metadata(bench.store.image_folder(&bench.image()).join("disk.raw")).unwrap();
    assert!(on_disk.blocks() * 512 < image.virtual_bytes, "zero blocks take no room");
    assert_eq!(bench.store.images().unwrap(), [image]);
}

#[test]
fn a_name_is_taken_once_and_a_cancelled_import_leaves_nothing() {
    let bench = Bench::new();
    bench.import(&pattern(100_000));
    let open =
        || Source::open(&bench.root.join("source.raw"), ImageFormat::Raw, std::slice::from_ref(&bench.root)).unwrap();
    let again = Import { name: bench.image(), project: "p1".parse().unwrap(), source: open(), now_ms: 7 };
    let refused = bench.store.import(&again, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(refused.to_string(), "there is an image named `golden` already");
    let other = Import { name: "other".parse().unwrap(), project: "p1".parse().unwrap(), source: open(), now_ms: 7 };
    bench.store.import(&other, &mut |_, _| ControlFlow::Break(())).unwrap_err();
    let left: Vec<_> =
        std::fs::read_dir(bench.root.join("store/images")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["golden"]);
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
fn what_an_interrupted_import_left_is_cleared_away_and_the_store_has_one_owner() {
    let bench = Bench::new();
    let root = bench.root.join("store");
    assert!(ImageStore::open(&root).is_err(), "two owners");
    drop(bench.store);
    std::fs::create_dir(root.join("images/.import-x")).unwrap();
    std::fs::write(root.join("images/.import-x/disk.raw"), b"half").unwrap();
    ImageStore::open(&root).unwrap();
    assert!(!root.join("images/.import-x").exists());
}

#[test]
fn a_rotten_golden_block_is_an_error_and_not_data() {
    let bench = Bench::new();
    bench.import(&pattern(300_000));
    let path = bench.store.image_folder(&bench.image()).join("disk.raw");
    std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"rot", 65_536 * 3 + 5).unwrap();
    let overlay = Overlay::open(&bench.disk(), bench.golden(), BOOT).unwrap();
    let mut buffer = [0; 512];
    overlay.read_at(0, &mut buffer).unwrap();
    let error = overlay.read_at(65_536 * 3 + 4096, &mut buffer).unwrap_err();
    assert!(matches!(error, DeviceError::Corrupt { offset } if offset == 65_536 * 3), "{error:?}");
    assert!(!overlay.try_read_at(65_536 * 3, &mut buffer).unwrap(), "never from the cache unchecked");
}

#[test]
fn a_clone_is_for_one_opener_of_one_golden_image() {
    let bench = Bench::new();
    bench.import(&pattern(100_000));
    let folder = bench.disk();
    let held = Overlay::open(&folder, bench.golden(), BOOT).unwrap();
    let error = Overlay::open(&folder, bench.golden(), BOOT).unwrap_err();
    assert!(error.to_string().ends_with("is in use by another process"), "{error}");
    drop(held);
    Overlay::open(&folder, bench.golden(), BOOT).unwrap();
    std::fs::OpenOptions::new().write(true).open(folder.join("map")).unwrap().write_all_at(b"?", 0).unwrap();
    let error = Overlay::open(&folder, bench.golden(), BOOT).unwrap_err();
    assert!(error.to_string().contains("allocation map"), "{error}");
}

#[test]
fn a_full_disk_is_said_so_and_loses_nothing() {
    let bench = Bench::new();
    let content = pattern(3 << 20);
    bench.import(&content);
    let full = SmallDisk::mount(&bench.root.join("small"), 1 << 20);
    let folder = full.0.join("disk");
    Overlay::create(&folder, 3 << 20).unwrap();
    let overlay = Overlay::open(&folder, bench.golden(), BOOT).unwrap();
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
    assert_eq!(read_all(&Overlay::open(&folder, bench.golden(), BOOT).unwrap()), expected);
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
        let folder = bench.disk();
        let golden = bench.golden();
        let mut model = golden_content;
        let mut boot = BOOT;
        let mut overlay = Overlay::open(&folder, Arc::clone(&golden), boot).unwrap();
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
                    overlay = Overlay::open(&folder, Arc::clone(&golden), boot).unwrap();
                }
                Step::PowerCut => {
                    // What was flushed must be there without `live`; so flush, then let `live` claim everything, as
                    // a page cache that was written back in a bad order would, under a boot that is over.
                    overlay.flush().unwrap();
                    drop(overlay);
                    let live = std::fs::OpenOptions::new().write(true).open(folder.join("live")).unwrap();
                    live.write_all_at(&[0xff; 16], 4096).unwrap();
                    boot = if boot == BOOT { NEXT_BOOT } else { BOOT };
                    overlay = Overlay::open(&folder, Arc::clone(&golden), boot).unwrap();
                }
            }
        }
        prop_assert!(read_all(&overlay) == model);
        prop_assert!(read_all(&*golden) == pattern(400_384), "the golden image never changes");
    }
}

#[test]
fn writes_that_were_not_flushed_read_as_old_or_new_after_a_power_cut() {
    let bench = Bench::new();
    let content = pattern(200_704);
    bench.import(&content);
    let folder = bench.disk();
    let overlay = Overlay::open(&folder, bench.golden(), BOOT).unwrap();
    overlay.write_at(0, &[9; 8192]).unwrap();
    overlay.flush().unwrap();
    overlay.write_at(4096, &[5; 8192]).unwrap();
    drop(overlay);
    let overlay = Overlay::open(&folder, bench.golden(), NEXT_BOOT).unwrap();
    let got = read_all(&overlay);
    assert_eq!(got[..4096], [9; 4096], "flushed");
    assert_eq!(got[4096..8192], [5; 4096], "its granule was on record");
    assert_eq!(got[8192..], content[8192..], "not on record, so the golden image's");
}

#[test]
fn writers_of_neighbouring_sectors_do_not_lose_each_other() {
    let bench = Bench::new();
    bench.import(&pattern(1 << 20));
    let overlay = Overlay::open(&bench.disk(), bench.golden(), BOOT).unwrap();
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
