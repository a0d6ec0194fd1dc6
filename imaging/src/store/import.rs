//! Import: a raw or qcow2 file becomes a golden image, entirely or not at all.
//!
//! The image is built in a staging folder, synced, and renamed to its place; the rename is the moment from which it
//! exists. Memory is bounded by one chunk, whatever the file says. The source is opened beneath one of the configured
//! folders by the kernel (`openat2` with `RESOLVE_BENEATH`), so neither `..` nor a symbolic link leads out.

use super::StoreError;
use super::file::sync_folder;
use super::golden::{CHECKSUM_BLOCK_BYTES, CHECKSUM_BLOCK_LEN, CHECKSUMS, DISK, MANIFEST, Manifest};
use super::qcow2::{self, HEADER_BYTES, MAX_VIRTUAL_BYTES};
use assay_wire::id::{ImageId, ProjectId};
use assay_wire::imaging::{Image, ImageFormat};
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder as _, StorageOpenOptions};
use ring::digest::{Context, SHA256};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Octets read, hashed and written at a time; whole checksum blocks.
const CHUNK_BYTES: u64 = 16 * CHECKSUM_BLOCK_BYTES;
const SECTOR_BYTES: u64 = 512;

/// What to import.
#[derive(Debug)]
pub struct Import {
    /// The new image's name.
    pub name: ImageId,
    /// Its owner.
    pub project: ProjectId,
    /// The open source.
    pub source: Source,
    /// Milliseconds since the Unix epoch.
    pub now_ms: i64,
}

/// An open source of a golden image.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    byte_len: u64,
    kind: SourceKind,
}

#[derive(Debug)]
enum SourceKind {
    Raw(File),
    Qcow2(FormatAccess<ImagoFile>),
}

impl Source {
    /// Opens `path`, which must lie beneath one of `folders`, as `format`. Blocks.
    ///
    /// # Errors
    /// It is elsewhere, no regular file, empty, too large, or not what it should be.
    pub fn open(path: &Path, format: ImageFormat, folders: &[PathBuf]) -> Result<Self, StoreError> {
        let file = open_beneath(path, folders)?;
        let metadata = file.metadata().map_err(|source| StoreError::io("reading the size of", path, source))?;
        if !metadata.is_file() {
            return Err(StoreError::malformed(path, "is not a regular file".to_owned()));
        }
        let (byte_len, kind) = match format {
            ImageFormat::Raw => (metadata.len(), SourceKind::Raw(file)),
            ImageFormat::Qcow2 => open_qcow2(path, file, metadata.len())?,
        };
        if byte_len == 0 || byte_len > MAX_VIRTUAL_BYTES {
            let detail = format!("has {byte_len} octets; an image has 1 to {MAX_VIRTUAL_BYTES}");
            return Err(StoreError::malformed(path, detail));
        }
        Ok(Self { path: path.to_owned(), byte_len, kind })
    }

    /// Octets of the disk that nodes will see: those of the source, filled up to a whole sector.
    #[must_use]
    pub fn virtual_bytes(&self) -> u64 {
        self.byte_len.next_multiple_of(SECTOR_BYTES)
    }

    /// Fills `buffer` from `offset`, with zeros behind the source's end.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        let within = usize::try_from(self.byte_len.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        let (content, padding) = buffer.split_at_mut(within);
        padding.fill(0);
        let read = match &self.kind {
            SourceKind::Raw(file) => file.read_exact_at(content, offset),
            SourceKind::Qcow2(image) => block_on(image.read(content, offset)),
        };
        read.map_err(|source| StoreError::io("reading", &self.path, source))
    }
}

/// Imports into `images` (the folder of all images). Calls `progress` with octets done and octets in all; it may
/// break the import off. Blocks.
///
/// # Errors
/// The name is taken, the source cannot be read, the disk is full, or `progress` said so. Nothing is left then.
pub fn import(
    images: &Path,
    import: &Import,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Image, StoreError> {
    let place = images.join(import.name.as_str());
    let taken = || StoreError::Exists { image: import.name.clone() };
    if place.exists() {
        return Err(taken());
    }
    let staging = Staging::new(images)?;
    let content = copy(&staging.path, &import.source, progress)?;
    let image = Image {
        name: import.name.clone(),
        project: import.project.clone(),
        virtual_bytes: import.source.virtual_bytes(),
        data_bytes: content.data_bytes,
        sha256: content.sha256,
        created_at_ms: import.now_ms,
    };
    let manifest = Manifest { layout: 1, image: image.clone(), checksum_block_bytes: CHECKSUM_BLOCK_BYTES };
    let json = serde_json::to_vec_pretty(&manifest)
        .map_err(|cause| StoreError::io("writing the manifest of", &place, cause.into()))?;
    write_synced(&staging.path.join(MANIFEST), &json)?;
    write_synced(&staging.path.join(CHECKSUMS), &content.checksums)?;
    sync_folder(&staging.path).map_err(|source| StoreError::io("syncing", &staging.path, source))?;
    staging.publish(&place).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => taken(),
        _ => StoreError::io("putting in place", &place, source),
    })?;
    Ok(image)
}

/// What a copy found on its way.
struct Content {
    data_bytes: u64,
    sha256: String,
    checksums: Vec<u8>,
}

fn copy(
    folder: &Path,
    source: &Source,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Content, StoreError> {
    let path = folder.join(DISK);
    let failed = |cause| StoreError::io("writing", &path, cause);
    let disk = create_new(&path)?;
    let total = source.virtual_bytes();
    disk.set_len(total).map_err(failed)?;
    let mut hash = Context::new(&SHA256);
    let mut content = Content { data_bytes: 0, sha256: String::new(), checksums: Vec::new() };
    let mut buffer = vec![0; usize::try_from(CHUNK_BYTES.min(total)).unwrap_or(usize::MAX)];
    let mut offset = 0;
    while offset < total {
        if progress(offset, total).is_break() {
            return Err(StoreError::Cancelled);
        }
        let length = usize::try_from(total - offset).unwrap_or(usize::MAX).min(buffer.len());
        let chunk = &mut buffer[..length];
        source.read(offset, chunk)?;
        hash.update(chunk);
        let mut at = offset;
        for block in chunk.chunks(CHECKSUM_BLOCK_LEN) {
            content.checksums.extend_from_slice(&crc32c::crc32c(block).to_le_bytes());
            if !is_zero(block) {
                disk.write_all_at(block, at).map_err(failed)?;
                content.data_bytes += block.len() as u64;
            }
            at += block.len() as u64;
        }
        offset = at;
    }
    disk.sync_all().map_err(failed)?;
    content.sha256 = hex::encode(hash.finish());
    // The last word is `done` or `failed`; whoever broke off now would get an image that they think they have not.
    let _ = progress(total, total);
    Ok(content)
}

/// A folder that goes away unless it is published.
struct Staging {
    path: PathBuf,
}

/// Staging folders begin with this, which no image's name does.
pub(super) const STAGING_PREFIX: &str = ".import-";

impl Staging {
    fn new(images: &Path) -> Result<Self, StoreError> {
        let path = images.join(format!("{STAGING_PREFIX}{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&path).map_err(|source| StoreError::io("making", &path, source))?;
        Ok(Self { path })
    }

    fn publish(self, place: &Path) -> io::Result<()> {
        // `rename` replaces an empty folder only; an image's is never empty.
        std::fs::rename(&self.path, place)?;
        place.parent().map_or(Ok(()), sync_folder)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Gone already when it was published; what cannot be removed now is removed at the next start.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn open_beneath(path: &Path, folders: &[PathBuf]) -> Result<File, StoreError> {
    let outside = || StoreError::OutsideImportFolders { path: path.to_owned() };
    let (folder, rest) = folders
        .iter()
        .find_map(|folder| path.strip_prefix(folder).ok().map(|rest| (folder, rest)))
        .ok_or_else(outside)?;
    let folder = File::open(folder).map_err(|source| StoreError::io("opening", folder, source))?;
    // Without O_NONBLOCK, opening a FIFO would wait for its writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened =
        rustix::fs::openat2(&folder, rest, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS);
    match opened {
        Ok(file) => Ok(file.into()),
        Err(rustix::io::Errno::XDEV) => Err(outside()),
        Err(errno) => Err(StoreError::io("opening", path, errno.into())),
    }
}

fn open_qcow2(path: &Path, file: File, file_bytes: u64) -> Result<(u64, SourceKind), StoreError> {
    let mut header = [0; HEADER_BYTES];
    let got = file.read_at(&mut header, 0).map_err(|source| StoreError::io("reading the header of", path, source))?;
    let virtual_bytes = qcow2::check_header(&header[..got], file_bytes)
        .map_err(|source| StoreError::Qcow2 { path: path.to_owned(), source })?;
    let failed = |source| StoreError::io("opening as qcow2", path, source);
    let storage = ImagoFile::from_open_file(file, StorageOpenOptions::new()).map_err(failed)?;
    let image = block_on(Qcow2::<ImagoFile>::builder(storage).open(DenyImplicitOpenGate::default())).map_err(failed)?;
    Ok((virtual_bytes, SourceKind::Qcow2(FormatAccess::new(image))))
}

/// imago's futures read with plain system calls: they never wait for a reactor, so any executor does.
fn block_on<F: Future>(future: F) -> F::Output {
    futures_util::FutureExt::now_or_never(future).unwrap_or_else(|| unreachable!())
}

fn create_new(path: &Path) -> Result<File, StoreError> {
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    created.map_err(|source| StoreError::io("making", path, source))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut file = create_new(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|source| StoreError::io("writing", path, source))
}

fn is_zero(block: &[u8]) -> bool {
    let (words, rest) = block.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|octet| *octet == 0)
}
