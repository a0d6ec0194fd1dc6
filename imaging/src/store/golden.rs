//! A golden image on disk: a sparse raw file that never changes, and the hash tree of its blocks.
//!
//! ```text
//! images/<key>/image.json    what it is: see [`super::manifest`]
//! images/<key>/disk.raw      the disk, zero blocks as holes
//! images/<key>/tree.sha256   the hash tree: see [`super::merkle`]
//!
//! golden/<key>/disk.raw, golden/<key>/tree.sha256
//!                            the same two, where the image itself is elsewhere: materialised on this host. No file here
//!                            says what it is; whoever opens it has its size and root from the records
//! ```
//!
//! A block is checked against the tree's root the first time it is read after opening: a rotten or tampered host disk
//! becomes a medium error at the initiator, not a tenant that boots something else. SHA-256 and not a checksum, because
//! the root is on record elsewhere and a checksum keeps no hand out; it costs 45 µs a block once, with the processor's
//! SHA instructions. A process that reads for one node has the gateway check, once for all that boot alike
//! ([`super::checker`]).

use super::StoreError;
use super::checker::{Checker, CheckerFiles, GROUP};
use super::device::{BlockDevice, DeviceError, Place, check_range};
use super::file::{byte_len as byte_len_of, has_data, read_if_cached};
use super::merkle::{self, BLOCK_BYTES, BLOCK_LEN, Hash, Shape};
use assay_service::error::chain;
use assay_wire::id::ImageKey;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) const DISK: &str = "disk.raw";
pub(super) const TREE: &str = "tree.sha256";

/// Blocks that are read from the disk by one call, to be checked.
const BLOCKS_AT_ONCE: usize = 4;

/// A golden image's open files: all that it takes to read it. They can be handed to a process that may open nothing.
#[derive(Debug)]
pub struct GoldenFiles {
    /// What messages call it: its folder.
    pub name: PathBuf,
    /// Size of the disk in octets, as its manifest or the records say.
    pub byte_len: u64,
    /// The root of its hash tree, likewise.
    pub root: Hash,
    /// [`DISK`], open to be read.
    pub disk: File,
    /// [`TREE`], open to be read.
    pub tree: File,
    /// The way to who checks blocks for this process, if anybody does.
    pub checker: Option<CheckerFiles>,
}

impl GoldenFiles {
    /// Opens a golden image that was materialised below the folder `store` of this host. `byte_len` and `root` are the
    /// caller's, from the records: what is there is believed block by block, against that root.
    ///
    /// # Errors
    /// It was not materialised, or the files cannot be opened.
    pub fn open_cached(store: &Path, golden: ImageKey, byte_len: u64, root: Hash) -> Result<Self, StoreError> {
        Self::open(&cached_folder(store, golden), byte_len, root)
    }

    /// Has the kernel read nothing beside what it is asked for: initiators read ahead by themselves, and say how far. What
    /// the host would add was read in vain for each boot that does not need it.
    pub fn expect_initiators(&self) {
        if let Err(error) = fadvise(&self.disk, 0, None, Advice::Random) {
            tracing::debug!(event = "image.read_ahead", %error, "the file system reads ahead");
        }
    }

    /// Opens the files of the image in `folder`, of which `byte_len` and `root` are on record.
    pub(super) fn open(folder: &Path, byte_len: u64, root: Hash) -> Result<Self, StoreError> {
        let open = |name| {
            let path = folder.join(name);
            File::open(&path).map_err(|source| StoreError::io("opening", &path, source))
        };
        Ok(Self { name: folder.to_owned(), byte_len, root, disk: open(DISK)?, tree: open(TREE)?, checker: None })
    }
}

/// An open golden image. Read-only, and shared by every clone that is open.
#[derive(Debug)]
pub struct GoldenImage {
    name: PathBuf,
    disk: File,
    tree: File,
    shape: Shape,
    root: Hash,
    byte_len: u64,
    /// One bit a block, a number a group: it was found right.
    checked: Vec<AtomicU64>,
    checker: Option<Checker>,
}

impl GoldenImage {
    /// Takes over an image's open files.
    ///
    /// # Errors
    /// They do not fit one another.
    pub fn from_files(files: GoldenFiles) -> Result<Self, StoreError> {
        let GoldenFiles { name, byte_len, root, disk, tree, checker } = files;
        let shape = Shape::of(byte_len);
        for (file, which, expected) in [(&disk, DISK, byte_len), (&tree, TREE, shape.file_bytes())] {
            let path = name.join(which);
            let length = byte_len_of(file).map_err(|source| StoreError::io("reading the size of", &path, source))?;
            if length != expected {
                return Err(StoreError::malformed(&path, format!("has {length} octets, not {expected}")));
            }
        }
        let blocks = usize::try_from(byte_len.div_ceil(BLOCK_BYTES)).unwrap_or(usize::MAX);
        let checked = (0..blocks.div_ceil(GROUP)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { name, disk, tree, shape, root, byte_len, checked, checker: checker.map(Checker::new) })
    }

    /// The blocks that `length` octets from `offset` touch and that were not checked yet, by nobody as far as that is on
    /// the checker's board.
    fn unchecked(&self, offset: u64, length: usize) -> impl Iterator<Item = usize> + '_ {
        let end = offset.saturating_add(length as u64);
        (block_of(offset)..block_of(end.saturating_add(BLOCK_BYTES - 1))).filter(|&block| {
            let checked = &self.checked[block / GROUP];
            if checked.load(Ordering::Relaxed) & bit(block) != 0 {
                return false;
            }
            let Some(checker) = &self.checker else { return true };
            let known = checker.known(block / GROUP);
            checked.fetch_or(known, Ordering::Relaxed);
            known & bit(block) == 0
        })
    }

    /// Has the checker look at what was not checked yet of `first` and the blocks behind it before `end`, in its group.
    /// Answers whether `first` is right by now.
    fn have_checked(&self, first: usize, end: usize) -> bool {
        let Some(checker) = &self.checker else { return false };
        let group = first / GROUP;
        let wanted = (first..end.min((group + 1) * GROUP)).fold(0, |wanted, block| wanted | bit(block));
        let known = self.checked[group].load(Ordering::Relaxed);
        let right = checker.ask(group, wanted & !known);
        self.checked[group].fetch_or(right, Ordering::Relaxed);
        right & bit(first) != 0
    }

    /// Groups of blocks.
    pub(crate) fn groups(&self) -> usize {
        self.checked.len()
    }

    /// Which of the group's blocks were found right so far; nothing if there is no such group.
    pub(crate) fn right(&self, group: usize) -> Option<u64> {
        self.checked.get(group).map(|checked| checked.load(Ordering::Relaxed))
    }

    /// Looks at the wanted blocks of a group that were not found right yet, and answers which of the group are. One that
    /// cannot be read, or is not what it should be, is in the log.
    pub(crate) fn check_group(&self, group: usize, wanted: u64) -> u64 {
        let Some(known) = self.right(group) else { return 0 };
        let first = group * GROUP;
        let count = block_of(self.byte_len + BLOCK_BYTES - 1).saturating_sub(first).min(GROUP);
        let missing = |index: usize| index < count && wanted & !known & (1 << index) != 0;
        let mut index = 0;
        while index < count {
            let run = (index..count).take_while(|&index| missing(index)).take(BLOCKS_AT_ONCE).count();
            if run > 0
                && let Err(error) = self.read_checked(first + index..first + index + run)
            {
                tracing::error!(event = "image.unreadable", image = %self.name.display(), cause = chain(&error), "checking a golden image");
            }
            index += run.max(1);
        }
        self.right(group).unwrap_or(0)
    }

    /// Has the kernel begin to read the wanted blocks of a group.
    pub(crate) fn fetch_group(&self, group: usize, wanted: u64) {
        let (from, count) = (wanted.trailing_zeros(), 64 - wanted.leading_zeros());
        let Some(blocks) = count.checked_sub(from).and_then(|blocks| NonZeroU64::new(u64::from(blocks) * BLOCK_BYTES))
        else {
            return;
        };
        let offset = (group as u64 * GROUP as u64 + u64::from(from)).saturating_mul(BLOCK_BYTES);
        // It only saves time.
        let _read_later = fadvise(&self.disk, offset, Some(blocks), Advice::WillNeed);
    }

    /// Forgets what was found right: it may have rotted since.
    pub(crate) fn forget(&self) {
        self.checked.iter().for_each(|checked| checked.store(0, Ordering::Relaxed));
    }

    /// Reads the whole blocks `blocks` at once, checks each that was not found right yet, and answers them all.
    fn read_checked(&self, blocks: Range<usize>) -> Result<Vec<u8>, DeviceError> {
        let (start, end) = (offset_of(blocks.start), offset_of(blocks.end).min(self.byte_len));
        let mut content = vec![0; usize::try_from(end - start).unwrap_or(usize::MAX)];
        self.read_disk(start, &mut content)?;
        for block in self.unchecked(start, content.len()) {
            let within = usize::try_from(offset_of(block) - start).unwrap_or(usize::MAX);
            let octets = BLOCK_LEN.min(content.len() - within);
            self.check(block, &content[within..within + octets])?;
        }
        Ok(content)
    }

    fn check(&self, block: usize, content: &[u8]) -> Result<(), DeviceError> {
        let offset = offset_of(block);
        let failed = |source| DeviceError::Io { doing: "reading the hash tree of a golden image", offset, source };
        if !self.shape.holds(&self.tree, &self.root, block as u64, merkle::leaf(content)).map_err(failed)? {
            let image = self.name.display();
            tracing::error!(event = "image.corrupt", %image, offset, "golden image block does not match its hash");
            return Err(DeviceError::Corrupt { offset });
        }
        self.checked[block / GROUP].fetch_or(bit(block), Ordering::Relaxed);
        Ok(())
    }

    fn read_disk(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Io { doing: "reading a golden image", offset, source };
        self.disk.read_exact_at(buffer, offset).map_err(failed)
    }
}

impl BlockDevice for GoldenImage {
    fn byte_len(&self) -> u64 {
        self.byte_len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        check_range(offset, buffer.len() as u64, self.byte_len)?;
        // Up to the first block that was not checked yet, then so many blocks at once, and so on.
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let first = self.unchecked(at, rest.len()).next();
            let before = first
                .map_or(rest.len(), |block| usize::try_from(offset_of(block).saturating_sub(at)).unwrap_or(usize::MAX));
            let (known, left) = rest.split_at_mut(before);
            self.read_disk(at, known)?;
            at += known.len() as u64;
            let Some(first) = first else { return Ok(()) };
            let end = block_of(at + left.len() as u64 + BLOCK_BYTES - 1);
            if self.have_checked(first, end) {
                rest = left;
                continue;
            }
            let blocks = self.read_checked(first..end.min(first + BLOCKS_AT_ONCE))?;
            // What was checked is what is answered.
            let skip = usize::try_from(at - offset_of(first)).unwrap_or(usize::MAX);
            let (here, after) = left.split_at_mut(left.len().min(blocks.len() - skip));
            here.copy_from_slice(&blocks[skip..skip + here.len()]);
            at += here.len() as u64;
            rest = after;
        }
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
        check_range(offset, buffer.len() as u64, self.byte_len)?;
        if self.unchecked(offset, buffer.len()).next().is_some() {
            return Ok(false);
        }
        let failed = |source| DeviceError::Io { doing: "reading a golden image", offset, source };
        read_if_cached(&self.disk, offset, buffer).map_err(failed)
    }

    fn place_at(&self, offset: u64, length: u64) -> Option<Place<'_>> {
        let octets = usize::try_from(length).ok()?;
        let checked = self.unchecked(offset, octets).next().is_none();
        checked.then_some(Place { file: &self.disk, offset, length })
    }

    /// By the checker, who reads what it looks at.
    fn fetch(&self, offset: u64, length: u64) -> Result<bool, DeviceError> {
        let octets = usize::try_from(length).unwrap_or(usize::MAX);
        let end = block_of(offset + length + BLOCK_BYTES - 1);
        while let Some(first) = self.unchecked(offset, octets).next() {
            if !self.have_checked(first, end) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), DeviceError> {
        let failed = |source| DeviceError::Io { doing: "finding the holes of a golden image", offset, source };
        has_data(&self.disk, offset, length).map_err(failed)
    }

    fn data_ranges(&self) -> Result<Vec<Range<u64>>, DeviceError> {
        let failed = |source| DeviceError::Io { doing: "reading the hash tree of a golden image", offset: 0, source };
        self.shape.data_ranges(&self.tree, &self.root).map_err(failed)?.ok_or(DeviceError::Corrupt { offset: 0 })
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Whether a golden image of that size was materialised below the folder `store`: its files are there, and as long as they
/// must be.
pub(super) fn is_cached(store: &Path, golden: ImageKey, byte_len: u64) -> bool {
    let folder = cached_folder(store, golden);
    [(DISK, byte_len), (TREE, Shape::of(byte_len).file_bytes())].into_iter().all(|(name, expected)| {
        std::fs::metadata(folder.join(name)).is_ok_and(|found| found.is_file() && found.len() == expected)
    })
}

/// The folder of a golden image that was materialised below `store`.
pub(super) fn cached_folder(store: &Path, golden: ImageKey) -> PathBuf {
    store.join("golden").join(golden.to_string())
}

/// A block's bit in its group.
fn bit(block: usize) -> u64 {
    1 << (block % GROUP)
}

fn offset_of(block: usize) -> u64 {
    block as u64 * BLOCK_BYTES
}

fn block_of(offset: u64) -> usize {
    usize::try_from(offset / BLOCK_BYTES).unwrap_or(usize::MAX)
}
