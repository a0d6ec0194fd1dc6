//! A golden image on disk: a sparse raw file that never changes, with a checksum for every 64 KiB.
//!
//! ```text
//! images/<name>/image.json      what it is (`Manifest`)
//! images/<name>/disk.raw        the disk, zero blocks as holes
//! images/<name>/blocks.crc32c   CRC-32C of each block, little endian, in order
//! ```
//!
//! A block is checked against its checksum the first time it is read after opening: a rotten host disk becomes a medium
//! error at the initiator, not a tenant that boots something else.

use super::StoreError;
use super::device::{BlockDevice, DeviceError, check_range};
use super::file::read_if_cached;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Octets covered by one checksum.
pub const CHECKSUM_BLOCK_BYTES: u64 = CHECKSUM_BLOCK_LEN as u64;
/// The same, as the length of a buffer.
pub(super) const CHECKSUM_BLOCK_LEN: usize = 64 * 1024;
pub(super) const MANIFEST: &str = "image.json";
pub(super) const DISK: &str = "disk.raw";
pub(super) const CHECKSUMS: &str = "blocks.crc32c";

/// What an image is, as recorded beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this layout; 1.
    pub layout: u32,
    /// The image as the API shows it.
    pub image: assay_wire::imaging::Image,
    /// [`CHECKSUM_BLOCK_BYTES`] when it was imported.
    pub checksum_block_bytes: u64,
}

/// A golden image's open files: all that it takes to read it. They can be handed to a process that may open nothing.
#[derive(Debug)]
pub struct GoldenFiles {
    /// What messages call it: its folder.
    pub name: PathBuf,
    /// Size of the disk in octets, as its manifest says.
    pub byte_len: u64,
    /// [`DISK`], open to be read.
    pub disk: File,
    /// [`CHECKSUMS`], open to be read.
    pub checksums: File,
}

impl GoldenFiles {
    /// Opens the files of the image in `folder`.
    ///
    /// # Errors
    /// One is missing, or the manifest is malformed.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let byte_len = Manifest::read(folder)?.image.virtual_bytes;
        let open = |name| {
            let path = folder.join(name);
            File::open(&path).map_err(|source| StoreError::io("opening", &path, source))
        };
        Ok(Self { name: folder.to_owned(), byte_len, disk: open(DISK)?, checksums: open(CHECKSUMS)? })
    }
}

/// An open golden image. Read-only, and shared by every clone that is open.
#[derive(Debug)]
pub struct GoldenImage {
    disk: File,
    byte_len: u64,
    checksums: Vec<u32>,
    /// One bit a block: its checksum was found right.
    checked: Vec<AtomicU64>,
}

impl GoldenImage {
    /// Opens the image in `folder`.
    ///
    /// # Errors
    /// A file is missing, or one does not fit another.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        Self::from_files(GoldenFiles::open(folder)?)
    }

    /// Takes over an image's open files.
    ///
    /// # Errors
    /// They do not fit one another.
    pub fn from_files(files: GoldenFiles) -> Result<Self, StoreError> {
        let GoldenFiles { name, byte_len, disk, checksums } = files;
        let path = name.join(DISK);
        let length = disk.metadata().map_err(|source| StoreError::io("reading the size of", &path, source))?.len();
        if length != byte_len {
            return Err(StoreError::malformed(&path, format!("has {length} octets, its manifest says {byte_len}")));
        }
        let path = name.join(CHECKSUMS);
        let blocks = byte_len.div_ceil(CHECKSUM_BLOCK_BYTES);
        let length = checksums.metadata().map_err(|source| StoreError::io("reading the size of", &path, source))?.len();
        if length != blocks * 4 {
            return Err(StoreError::malformed(&path, format!("has {length} octets for {blocks} blocks")));
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        // At an offset: copies of the file share their position.
        checksums.read_exact_at(&mut bytes, 0).map_err(|source| StoreError::io("reading", &path, source))?;
        let checksums: Vec<u32> =
            bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
        let checked = (0..checksums.len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { disk, byte_len, checksums, checked })
    }

    /// The blocks that `length` octets from `offset` touch and that were not checked yet.
    fn unchecked(&self, offset: u64, length: usize) -> impl Iterator<Item = usize> + '_ {
        let end = offset.saturating_add(length as u64);
        (block_of(offset)..block_of(end.saturating_add(CHECKSUM_BLOCK_BYTES - 1)))
            .filter(|&block| self.checked[block / 64].load(Ordering::Relaxed) & (1 << (block % 64)) == 0)
    }

    fn check(&self, block: usize) -> Result<(), DeviceError> {
        let offset = block as u64 * CHECKSUM_BLOCK_BYTES;
        let length = CHECKSUM_BLOCK_BYTES.min(self.byte_len - offset);
        let mut content = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        self.read_disk(offset, &mut content)?;
        if crc32c::crc32c(&content) != self.checksums[block] {
            tracing::error!(event = "image.corrupt", offset, "golden image block does not match its checksum");
            return Err(DeviceError::Corrupt { offset });
        }
        self.checked[block / 64].fetch_or(1 << (block % 64), Ordering::Relaxed);
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
        for block in self.unchecked(offset, buffer.len()) {
            self.check(block)?;
        }
        self.read_disk(offset, buffer)
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
        check_range(offset, buffer.len() as u64, self.byte_len)?;
        if self.unchecked(offset, buffer.len()).next().is_some() {
            return Ok(false);
        }
        let failed = |source| DeviceError::Io { doing: "reading a golden image", offset, source };
        read_if_cached(&self.disk, offset, buffer).map_err(failed)
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    fn unmap(&self, _offset: u64, _length: u64) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Manifest {
    /// Reads the manifest of the image in `folder`.
    ///
    /// # Errors
    /// It is missing, malformed, or of another layout.
    pub fn read(folder: &Path) -> Result<Self, StoreError> {
        let path: PathBuf = folder.join(MANIFEST);
        let text = std::fs::read(&path).map_err(|source| StoreError::io("reading", &path, source))?;
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|cause| StoreError::malformed(&path, cause.to_string()))?;
        if manifest.layout != 1 || manifest.checksum_block_bytes != CHECKSUM_BLOCK_BYTES {
            return Err(StoreError::malformed(&path, format!("is of layout {}, not 1", manifest.layout)));
        }
        if manifest.image.virtual_bytes == 0 || !manifest.image.virtual_bytes.is_multiple_of(512) {
            return Err(StoreError::malformed(&path, "says a size that is no multiple of 512".to_owned()));
        }
        Ok(manifest)
    }
}

fn block_of(offset: u64) -> usize {
    usize::try_from(offset / CHECKSUM_BLOCK_BYTES).unwrap_or(usize::MAX)
}
