//! A disk: what its node wrote, over frozen layers, over a golden image.
//!
//! ```text
//! layers/<id>/data    the layer's own granules at their own offsets, the rest a hole
//! layers/<id>/map     which granules are its own, as of the last flush
//! layers/<id>/live    the same as of the last write, with the host's boot id
//! ```
//!
//! **What survives.** A write goes to `data`, then its granules to `live`; both are in the page cache then, so the end of
//! this process loses nothing. A flush syncs `data`, then writes and syncs `map`. After a power cut the order in which
//! the page cache reached the disk is unknown, and `live` might claim granules that never arrived; so it is believed
//! only under the boot id that it was written under, and otherwise `map` is: each granule then reads as it was
//! written, or as the layer below has it, never as a hole.
//!
//! **Freezing.** A top becomes a frozen layer by flushing it and naming another top in its disk's manifest. It must not be
//! open elsewhere: a process that serves the disk first holds its initiator's commands, flushes, and closes the files,
//! which gives up their lock; then the snapshot is made as of a disk that is not in use; then the process is handed the
//! files of [`DiskFiles::open`] anew, and goes on (`crate::gateway`, pause and resume). Should the snapshot never come back,
//! the process has no file that it could write, so no order of crashes changes a frozen layer. The lock is what is
//! believed, not the process that says it has paused.

use super::StoreError;
use super::allocation::{AllocationMap, GRANULE_BYTES, GRANULE_LEN, map_bytes, page_offset};
use super::device::{BlockDevice, DeviceError, Place, check_range};
use super::file::{data_ranges, has_data, punch_hole, read_if_cached, reserve, sync_folder};
use super::golden::{GoldenFiles, GoldenImage};
use super::manifest::{self, Chain, DiskManifest, ImageContent, ImageManifest, LayerId};
use super::merkle::Hash;
use crate::lock::lock;
use assay_rbd::runs::{Run, data_of};
use assay_wire::id::DiskId;
use bytes::Bytes;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

const DATA: &str = "data";
const MAP: &str = "map";
const LIVE: &str = "live";
/// The map's bits start here in both files; before them, the header.
const HEADER_BYTES: u64 = 4096;
const MAGIC: &[u8; 8] = b"ASSAYMAP";
const LAYOUT: u32 = 1;

/// One run of the host's kernel: what the page cache lives and dies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostBoot([u8; 16]);

impl HostBoot {
    /// Of the running kernel (`/proc/sys/kernel/random/boot_id`).
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn current() -> Result<Self, StoreError> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let text = std::fs::read_to_string(path).map_err(|source| StoreError::io("reading", path, source))?;
        let id = uuid::Uuid::parse_str(text.trim())
            .map_err(|cause| StoreError::malformed(path, format!("is not a boot id: {cause}")))?;
        Ok(Self(id.into_bytes()))
    }

    /// A made-up boot, to stand for a power cut in tests.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

/// A clone's own open files.
#[derive(Debug)]
pub struct TopFiles {
    /// What messages call it: its folder.
    pub name: PathBuf,
    /// [`DATA`], open to be read and written, and locked: the lock lasts until the last copy of it is closed, in
    /// whichever process.
    pub data: File,
    /// [`MAP`], likewise.
    pub map: File,
    /// [`LIVE`], likewise.
    pub live: File,
}

impl TopFiles {
    /// Opens and locks the files of the clone in `folder`.
    ///
    /// # Errors
    /// One is missing, or somebody else has the clone open.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let open = |name: &str| {
            let path = folder.join(name);
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(|source| StoreError::io("opening", &path, source))
        };
        let files = Self { name: folder.to_owned(), data: open(DATA)?, map: open(MAP)?, live: open(LIVE)? };
        match files.data.try_lock() {
            Ok(()) => Ok(files),
            Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path: folder.to_owned() }),
            Err(TryLockError::Error(source)) => Err(StoreError::io("locking the clone", folder, source)),
        }
    }
}

/// A frozen layer's open files. Nothing writes to them any more.
#[derive(Debug)]
pub struct LayerFiles {
    /// What messages call it: its folder.
    pub name: PathBuf,
    /// [`DATA`], open to be read.
    pub data: File,
    /// [`MAP`], likewise.
    pub map: File,
}

impl LayerFiles {
    fn open(folder: &Path) -> Result<Self, StoreError> {
        let open = |name: &str| {
            let path = folder.join(name);
            File::open(&path).map_err(|source| StoreError::io("opening", &path, source))
        };
        Ok(Self { name: folder.to_owned(), data: open(DATA)?, map: open(MAP)? })
    }
}

/// Everything that it takes to serve one disk, and nothing else: open files, no paths. They can be handed to a process
/// that may open nothing.
#[derive(Debug)]
pub struct DiskFiles {
    /// What is read where no layer was written.
    pub golden: GoldenFiles,
    /// The frozen layers on it, lowest first.
    pub layers: Vec<LayerFiles>,
    /// The disk's own layer.
    pub top: TopFiles,
}

impl DiskFiles {
    /// Opens the files of a disk in the local store at `root`, and locks it.
    ///
    /// # Errors
    /// One is missing or malformed, or somebody else has the disk open.
    pub fn open(root: &Path, disk: DiskId) -> Result<Self, StoreError> {
        let path = disk_manifest(root, disk);
        loop {
            let manifest = manifest::read(&path, DiskManifest::parse)?;
            let top = TopFiles::open(&layer_folder(root, manifest.top))?;
            // Frozen between reading and locking, it is a top no more.
            if manifest::read(&path, DiskManifest::parse)?.top == manifest.top {
                let Lower { golden, layers } = Lower::open(root, &manifest.chain)?;
                return Ok(Self { golden, layers, top });
            }
        }
    }

    /// Whether they stand on the golden image that is on record: a manifest that was exchanged together with its image
    /// says another root.
    ///
    /// # Errors
    /// They do not.
    pub fn check_root(&self, recorded: &Hash) -> Result<(), StoreError> {
        let GoldenFiles { name, root, .. } = &self.golden;
        if root == recorded {
            return Ok(());
        }
        let detail = format!("has a hash tree with root {}, on record is {}", hex::encode(root), hex::encode(recorded));
        Err(StoreError::malformed(name, detail))
    }
}

/// The files that a chain of frozen layers is read from.
#[derive(Debug)]
pub(super) struct Lower {
    golden: GoldenFiles,
    layers: Vec<LayerFiles>,
}

impl Lower {
    pub(super) fn open(root: &Path, chain: &Chain) -> Result<Self, StoreError> {
        let folder = image_folder(root, chain.golden);
        let path = folder.join(IMAGE_MANIFEST);
        let golden = manifest::read(&path, ImageManifest::parse)?;
        let ImageContent::Golden { root: hash, .. } = golden.content else {
            return Err(StoreError::malformed(&path, "is not a golden image's, and disks stand on it".to_owned()));
        };
        let golden = GoldenFiles::open(&folder, golden.virtual_bytes, hash)?;
        let layers = chain.layers.iter().map(|layer| LayerFiles::open(&layer_folder(root, *layer)));
        Ok(Self { golden, layers: layers.collect::<Result<_, _>>()? })
    }

    /// What is read through them.
    pub(super) fn into_device(self) -> Result<Arc<dyn BlockDevice>, StoreError> {
        let mut device: Arc<dyn BlockDevice> = Arc::new(GoldenImage::from_files(self.golden)?);
        for files in self.layers {
            device = Arc::new(Layer::from_files(files, device)?);
        }
        Ok(device)
    }
}

/// A frozen layer over what is below it.
#[derive(Debug)]
struct Layer {
    data: File,
    map: AllocationMap,
    lower: Arc<dyn BlockDevice>,
}

impl Layer {
    fn from_files(files: LayerFiles, lower: Arc<dyn BlockDevice>) -> Result<Self, StoreError> {
        let LayerFiles { name, data, map } = files;
        check_length(&name, &data, lower.byte_len())?;
        Ok(Self { data, map: durable_map(&name, &map, lower.byte_len())?, lower })
    }
}

impl BlockDevice for Layer {
    fn byte_len(&self) -> u64 {
        self.map.byte_len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        read_layered(&self.map, &self.data, &*self.lower, offset, buffer)
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
        try_read_layered(&self.map, &self.data, &*self.lower, offset, buffer)
    }

    fn place_at(&self, offset: u64, length: u64) -> Option<Place<'_>> {
        place_layered(&self.map, &self.data, &*self.lower, offset, length)
    }

    fn fetch(&self, offset: u64, length: u64) -> Result<bool, DeviceError> {
        fetch_layered(&self.map, &*self.lower, offset, length)
    }

    fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), DeviceError> {
        is_mapped_layered(&self.map, &self.data, &*self.lower, offset, length)
    }

    fn data_ranges(&self) -> Result<Vec<Range<u64>>, DeviceError> {
        let (all, mut own) = (0..self.byte_len(), Vec::new());
        for Run { range, .. } in self.map.runs(all.clone()).filter(|run| run.own) {
            let failed = |source| DeviceError::Io { doing: "looking for data in", offset: range.start, source };
            own.extend(data_ranges(&self.data, range.clone()).map_err(failed)?);
        }
        Ok(data_of(self.map.runs(all), &own, &self.lower.data_ranges()?))
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// An open clone. Only one opener at a time has it, across processes.
#[derive(Debug)]
pub struct Overlay {
    lower: Arc<dyn BlockDevice>,
    /// Locked (`flock`) as long as this is open.
    data: File,
    map_file: File,
    live_file: File,
    map: AllocationMap,
    /// Held shared by whole-granule writes, alone by writes that must first copy what they do not cover.
    copying: RwLock<()>,
    /// Held while `live` and the map in memory change together.
    recording: Mutex<()>,
    flushing: Mutex<()>,
    flush_failed: AtomicBool,
}

impl Overlay {
    /// Makes an empty layer for a disk of `byte_len` octets in `folder`, durably, whatever its size. The folder must not
    /// exist.
    ///
    /// # Errors
    /// The file system refuses; nothing is left then.
    pub fn create(folder: &Path, byte_len: u64) -> Result<(), StoreError> {
        let made = create_files(folder, byte_len).and_then(|()| folder.parent().map_or(Ok(()), sync_folder));
        if made.is_err() {
            // The first error is the one that counts.
            let _ = std::fs::remove_dir_all(folder);
        }
        made.map_err(|source| StoreError::io("making the layer", folder, source))
    }

    /// Takes over a disk's open files.
    ///
    /// # Errors
    /// They do not belong together.
    pub fn open(files: DiskFiles, boot: HostBoot) -> Result<Self, StoreError> {
        let DiskFiles { golden, layers, top } = files;
        Self::from_files(top, Lower { golden, layers }.into_device()?, boot)
    }

    /// Takes over a top's open files, over whatever is below it.
    ///
    /// # Errors
    /// They do not belong together or to what is below.
    pub fn from_files(files: TopFiles, lower: Arc<dyn BlockDevice>, boot: HostBoot) -> Result<Self, StoreError> {
        let TopFiles { name, data, map: map_file, live: live_file } = files;
        let byte_len = lower.byte_len();
        check_length(&name, &data, byte_len)?;
        let map = load_map(&name, &map_file, &live_file, byte_len, boot)?;
        Ok(Self {
            lower,
            data,
            map_file,
            live_file,
            map,
            copying: RwLock::new(()),
            recording: Mutex::new(()),
            flushing: Mutex::new(()),
            flush_failed: AtomicBool::new(false),
        })
    }

    /// Whether nothing was ever written to it.
    pub(super) fn is_untouched(&self) -> bool {
        self.map.is_empty()
    }

    /// Octets that the clone in `folder` takes on the host's disk, beside its maps.
    ///
    /// # Errors
    /// There is no such clone.
    pub fn allocated_bytes(folder: &Path) -> Result<u64, StoreError> {
        let path = folder.join(DATA);
        let metadata =
            std::fs::metadata(&path).map_err(|source| StoreError::io("reading the size of", &path, source))?;
        Ok(metadata.blocks() * 512)
    }

    /// Writes pieces as one: their borders fall anywhere, and all of them together decide whether to copy first.
    fn write(&self, offset: u64, pieces: &[impl AsRef<[u8]>]) -> Result<(), DeviceError> {
        let length = pieces.iter().map(|piece| piece.as_ref().len() as u64).sum();
        check_range(offset, length, self.byte_len())?;
        self.check_writable()?;
        if length == 0 {
            return Ok(());
        }
        {
            let _shared = self.copying.read().unwrap_or_else(PoisonError::into_inner);
            if !self.needs_copy(offset, offset + length) {
                return self.write_own(offset, pieces);
            }
        }
        let data: Vec<u8> = pieces.iter().flat_map(|piece| piece.as_ref()).copied().collect();
        self.copy_and_write(offset, &data)
    }

    /// Writes while nobody else copies: for ranges whose first and last granule need content from the golden image.
    fn copy_and_write(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let _alone = self.copying.write().unwrap_or_else(PoisonError::into_inner);
        let end = offset + data.len() as u64;
        let start = if self.map.is_own(offset) { offset } else { granule_start(offset) };
        let stop = if self.map.is_own(end - 1) { end } else { self.granule_end(end) };
        let (head, tail) = (length(offset - start), length(stop - end));
        let mut merged = vec![0; head + data.len() + tail];
        self.lower.read_at(start, &mut merged[..head])?;
        merged[head..head + data.len()].copy_from_slice(data);
        self.lower.read_at(end, &mut merged[head + data.len()..])?;
        self.write_own(start, &[merged])
    }

    /// Writes whole granules, or into granules that are the clone's own.
    fn write_own(&self, offset: u64, pieces: &[impl AsRef<[u8]>]) -> Result<(), DeviceError> {
        let mut at = offset;
        for piece in pieces.iter().map(AsRef::as_ref) {
            self.data
                .write_all_at(piece, at)
                .map_err(|source| DeviceError::from_io("writing to a clone", offset, source))?;
            at += piece.len() as u64;
        }
        self.record(offset, at - offset)
    }

    /// Takes the range over into the map: file first, so that no granule is owned that a restart would forget.
    fn record(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        let _one = lock(&self.recording);
        let Some(change) = self.map.plan(&(offset..offset + length)) else { return Ok(()) };
        let bytes: Vec<u8> = change.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.live_file
            .write_all_at(&bytes, HEADER_BYTES + change.first_word as u64 * 8)
            .map_err(|source| DeviceError::from_io("recording a write to a clone", offset, source))?;
        self.map.apply(&change);
        Ok(())
    }

    /// Whether a write of this range must first copy content that it does not cover.
    fn needs_copy(&self, offset: u64, end: u64) -> bool {
        let head = !offset.is_multiple_of(GRANULE_BYTES) && !self.map.is_own(offset);
        head || (end != self.granule_end(end) && !self.map.is_own(end - 1))
    }

    /// Where the granule that holds the octet before `end` stops.
    fn granule_end(&self, end: u64) -> u64 {
        end.next_multiple_of(GRANULE_BYTES).min(self.map.byte_len())
    }

    fn check_writable(&self) -> Result<(), DeviceError> {
        if self.flush_failed.load(Ordering::Acquire) { Err(DeviceError::FlushFailedBefore) } else { Ok(()) }
    }

    fn sync(&self, pages: &[(usize, Vec<u8>)]) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::from_io("flushing a clone", 0, source);
        self.data.sync_data().map_err(failed)?;
        if pages.is_empty() {
            return Ok(());
        }
        for (page, bytes) in pages {
            self.map_file.write_all_at(bytes, HEADER_BYTES + page_offset(*page)).map_err(failed)?;
        }
        self.map_file.sync_data().map_err(failed)
    }
}

impl BlockDevice for Overlay {
    fn byte_len(&self) -> u64 {
        self.map.byte_len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        read_layered(&self.map, &self.data, &*self.lower, offset, buffer)
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
        try_read_layered(&self.map, &self.data, &*self.lower, offset, buffer)
    }

    fn place_at(&self, offset: u64, length: u64) -> Option<Place<'_>> {
        place_layered(&self.map, &self.data, &*self.lower, offset, length)
    }

    fn fetch(&self, offset: u64, length: u64) -> Result<bool, DeviceError> {
        fetch_layered(&self.map, &*self.lower, offset, length)
    }

    fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), DeviceError> {
        is_mapped_layered(&self.map, &self.data, &*self.lower, offset, length)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.write(offset, &[data])
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[Bytes]) -> Result<(), DeviceError> {
        self.write(offset, pieces)
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        check_range(offset, length, self.byte_len())?;
        self.check_writable()?;
        let end = offset + length;
        let aligned_start = offset.next_multiple_of(GRANULE_BYTES).min(end);
        let aligned_end = if end == self.byte_len() { end } else { granule_start(end).max(aligned_start) };
        let zeros = [0; GRANULE_LEN];
        self.write_at(offset, &zeros[..self::length(aligned_start - offset)])?;
        self.write_at(aligned_end, &zeros[..self::length(end - aligned_end)])?;
        if aligned_start < aligned_end {
            let _alone = self.copying.write().unwrap_or_else(PoisonError::into_inner);
            punch_hole(&self.data, aligned_start, aligned_end - aligned_start)
                .map_err(|source| DeviceError::from_io("unmapping part of a clone", aligned_start, source))?;
            self.record(aligned_start, aligned_end - aligned_start)?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let _one = lock(&self.flushing);
        self.check_writable()?;
        // Taken before the data is synced: a granule that is written meanwhile waits for the next flush.
        let pages = self.map.take_dirty_pages();
        let synced = self.sync(&pages);
        if synced.is_err() {
            self.map.return_dirty_pages(&pages);
            self.flush_failed.store(true, Ordering::Release);
        }
        synced
    }
}

/// Reads a layer's own granules from `data`, the rest from below.
fn read_layered(
    map: &AllocationMap,
    data: &File,
    lower: &dyn BlockDevice,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), DeviceError> {
    check_range(offset, buffer.len() as u64, map.byte_len())?;
    let mut rest = buffer;
    for run in map.runs(offset..offset + rest.len() as u64) {
        let (part, after) = rest.split_at_mut(length(run.range.end - run.range.start));
        let at = run.range.start;
        if run.own {
            let failed = |source| DeviceError::Io { doing: "reading a clone", offset: at, source };
            data.read_exact_at(part, at).map_err(failed)?;
        } else {
            lower.read_at(at, part)?;
        }
        rest = after;
    }
    Ok(())
}

/// The same, if that needs no waiting.
fn try_read_layered(
    map: &AllocationMap,
    data: &File,
    lower: &dyn BlockDevice,
    offset: u64,
    buffer: &mut [u8],
) -> Result<bool, DeviceError> {
    check_range(offset, buffer.len() as u64, map.byte_len())?;
    let mut rest = buffer;
    for run in map.runs(offset..offset + rest.len() as u64) {
        let (part, after) = rest.split_at_mut(length(run.range.end - run.range.start));
        let at = run.range.start;
        let filled = if run.own {
            let failed = |source| DeviceError::Io { doing: "reading a clone", offset: at, source };
            read_if_cached(data, at, part).map_err(failed)?
        } else {
            lower.try_read_at(at, part)?
        };
        if !filled {
            return Ok(false);
        }
        rest = after;
    }
    Ok(true)
}

/// Where a layer's own granules lie, or what is below them.
fn place_layered<'a>(
    map: &AllocationMap,
    data: &'a File,
    lower: &'a dyn BlockDevice,
    offset: u64,
    length: u64,
) -> Option<Place<'a>> {
    let run = map.runs(offset..offset + length).next()?;
    let length = run.range.end - run.range.start;
    if run.own { Some(Place { file: data, offset, length }) } else { lower.place_at(offset, length) }
}

/// Has what is below fetched, if none of it is a layer's own.
fn fetch_layered(map: &AllocationMap, lower: &dyn BlockDevice, offset: u64, length: u64) -> Result<bool, DeviceError> {
    let own = map.runs(offset..offset + length).any(|run| run.own);
    if own { Ok(false) } else { lower.fetch(offset, length) }
}

/// Whether a layer's own granules are more than holes, or what is below them is.
fn is_mapped_layered(
    map: &AllocationMap,
    data: &File,
    lower: &dyn BlockDevice,
    offset: u64,
    length: u64,
) -> Result<(bool, u64), DeviceError> {
    let Some(run) = map.runs(offset..offset + length).next() else { return Ok((true, length)) };
    let length = run.range.end - run.range.start;
    if !run.own {
        return lower.is_mapped(offset, length);
    }
    let failed = |source| DeviceError::Io { doing: "finding the holes of a clone", offset, source };
    has_data(data, offset, length).map_err(failed)
}

pub(super) const IMAGE_MANIFEST: &str = "image.json";

pub(super) fn image_folder(root: &Path, image: assay_wire::id::ImageKey) -> PathBuf {
    root.join("images").join(image.to_string())
}

pub(super) fn layer_folder(root: &Path, layer: LayerId) -> PathBuf {
    root.join("layers").join(layer.to_string())
}

pub(super) fn disk_manifest(root: &Path, disk: DiskId) -> PathBuf {
    root.join("disks").join(format!("{disk}.json"))
}

fn check_length(folder: &Path, data: &File, byte_len: u64) -> Result<(), StoreError> {
    let length = super::file::byte_len(data).map_err(|source| StoreError::io("reading the size of", folder, source))?;
    if length == byte_len {
        return Ok(());
    }
    Err(StoreError::malformed(folder, format!("is a layer of {length} octets, what is below it has {byte_len}")))
}

fn create_files(folder: &Path, byte_len: u64) -> io::Result<()> {
    std::fs::create_dir(folder)?;
    let create = |name| OpenOptions::new().write(true).create_new(true).mode(0o600).open(folder.join(name));
    let data = create(DATA)?;
    data.set_len(byte_len)?;
    data.sync_all()?;
    for name in [MAP, LIVE] {
        let file = create(name)?;
        // So that a full disk cannot keep a completed write from being recorded.
        reserve(&file, HEADER_BYTES + map_bytes(byte_len))?;
        file.write_all_at(&header(byte_len, HostBoot([0; 16])), 0)?;
        file.sync_all()?;
    }
    sync_folder(folder)
}

/// The map as it must be believed now; `live` is made to agree with it, under this boot.
fn load_map(
    folder: &Path,
    map_file: &File,
    live_file: &File,
    byte_len: u64,
    boot: HostBoot,
) -> Result<AllocationMap, StoreError> {
    let map = durable_map(folder, map_file, byte_len)?;
    let live = read_map(live_file, byte_len).map_err(|source| reading_map(folder, source))?;
    let (header_bytes, bits) = live.split_at(length(HEADER_BYTES));
    if parse_header(header_bytes) == Some((byte_len, boot)) {
        map.merge(bits);
        return Ok(map);
    }
    // Another boot's: start it anew from `map`. The header last, so that a half-written one is not believed.
    live_file
        .write_all_at(&header(byte_len, HostBoot([0; 16])), 0)
        .and_then(|()| live_file.write_all_at(&map.to_bytes(), HEADER_BYTES))
        .and_then(|()| live_file.write_all_at(&header(byte_len, boot), 0))
        .map_err(|source| StoreError::io("renewing the allocation map of", folder, source))?;
    Ok(map)
}

/// The map as of the last flush.
fn durable_map(folder: &Path, map_file: &File, byte_len: u64) -> Result<AllocationMap, StoreError> {
    let durable = read_map(map_file, byte_len).map_err(|source| reading_map(folder, source))?;
    let (header_bytes, bits) = durable.split_at(length(HEADER_BYTES));
    if parse_header(header_bytes).is_none_or(|(size, _)| size != byte_len) {
        let detail = format!("has an allocation map that is not for {byte_len} octets");
        return Err(StoreError::malformed(folder, detail));
    }
    let map = AllocationMap::new(byte_len);
    map.merge(bits);
    map.all_durable();
    Ok(map)
}

fn read_map(file: &File, byte_len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length(HEADER_BYTES + map_bytes(byte_len))];
    file.read_exact_at(&mut bytes, 0).map(|()| bytes)
}

fn reading_map(folder: &Path, source: io::Error) -> StoreError {
    StoreError::io("reading the allocation map of", folder, source)
}

/// magic, layout, granule, size of the device, boot id; little endian.
fn header(byte_len: u64, boot: HostBoot) -> Vec<u8> {
    let mut header = Vec::with_capacity(44);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&LAYOUT.to_le_bytes());
    header.extend_from_slice(&GRANULE_BYTES.to_le_bytes());
    header.extend_from_slice(&byte_len.to_le_bytes());
    header.extend_from_slice(&boot.0);
    header
}

/// The size and the boot that the header of a map says; `None` if it is no header of ours.
#[must_use]
pub fn parse_header(bytes: &[u8]) -> Option<(u64, HostBoot)> {
    let byte_len = u64::from_le_bytes(bytes.get(20..28)?.try_into().ok()?);
    let boot = HostBoot(bytes.get(28..44)?.try_into().ok()?);
    (bytes.get(..44)? == header(byte_len, boot)).then_some((byte_len, boot))
}

fn granule_start(offset: u64) -> u64 {
    offset / GRANULE_BYTES * GRANULE_BYTES
}

/// Lengths here are of buffers in memory, or were checked to fit one.
fn length(octets: u64) -> usize {
    usize::try_from(octets).unwrap_or(usize::MAX)
}
