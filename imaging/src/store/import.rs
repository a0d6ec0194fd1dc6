//! Import: a raw or qcow2 file becomes a golden image, entirely or not at all; what was broken off goes on where it
//! stopped.
//!
//! Memory is bounded by one chunk, whatever the file says. The source is opened beneath one of the configured folders by
//! the kernel (`openat2` with `RESOLVE_BENEATH`), so neither `..` nor a symbolic link leads out.

use super::device::BlockDevice;
use super::golden::{DISK, TREE};
use super::merkle::{self, BLOCK_BYTES, BLOCK_LEN, Builder, Hash};
use super::qcow2::{self, HEADER_BYTES, MAX_VIRTUAL_BYTES};
use super::{Content, Progress, StoreError};
use assay_wire::imaging::ImageFormat;
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder as _, StorageOpenOptions};
use ring::digest::{Context, SHA256};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Octets read, hashed and written at a time; whole blocks.
const CHUNK_BYTES: u64 = 16 * BLOCK_BYTES;
/// After so many octets more, what has been done is made durable, so that it need not be done again.
pub(super) const CHECKPOINT_BYTES: u64 = 256 << 20;
const SECTOR_BYTES: u64 = 512;
const CHECKPOINT: &str = "checkpoint";

/// An open source of a golden image.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    byte_len: u64,
    identity: String,
    /// The file itself, whatever its format.
    file: File,
    qcow2: Option<FormatAccess<ImagoFile>>,
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
        let copy = || file.try_clone().map_err(|source| StoreError::io("opening", path, source));
        let (byte_len, qcow2) = match format {
            ImageFormat::Raw => (metadata.len(), None),
            ImageFormat::Qcow2 => open_qcow2(path, copy()?, metadata.len())?,
        };
        if byte_len == 0 || byte_len > MAX_VIRTUAL_BYTES {
            let detail = format!("has {byte_len} octets; an image has 1 to {MAX_VIRTUAL_BYTES}");
            return Err(StoreError::malformed(path, detail));
        }
        Ok(Self { path: path.to_owned(), byte_len, identity: identity(&metadata, format), file, qcow2 })
    }

    /// Whether the disk's octets are the file's, no more and no fewer.
    #[must_use]
    pub fn is_verbatim(&self) -> bool {
        self.qcow2.is_none() && self.byte_len == self.virtual_bytes()
    }

    /// SHA-256 of the source as a file, hexadecimal. Reads all of it.
    ///
    /// # Errors
    /// It cannot be read, it is not as `expected`, or `progress` said so.
    pub fn digest(&self, expected: Option<&str>, progress: Progress<'_>) -> Result<String, StoreError> {
        let found = digest(&self.file, &self.path, progress)?;
        match expected {
            Some(expected) if !expected.eq_ignore_ascii_case(&found) => {
                Err(StoreError::Digest { path: self.path.clone(), found, expected: expected.to_owned() })
            }
            _ => Ok(found),
        }
    }
}

/// SHA-256 of a whole file, hexadecimal.
pub(crate) fn digest(file: &File, path: &Path, progress: Progress<'_>) -> Result<String, StoreError> {
    let failed = |source| StoreError::io("reading", path, source);
    let total = file.metadata().map_err(failed)?.len();
    let mut context = Context::new(&SHA256);
    in_chunks(total, progress, |offset, chunk| {
        file.read_exact_at(chunk, offset).map_err(failed)?;
        context.update(chunk);
        Ok(())
    })?;
    Ok(hex::encode(context.finish()))
}

/// Goes through `total` octets from the first to the last; `take` is given the offset of each chunk and a buffer of its
/// length to read it into. `progress` may break it off.
pub(crate) fn in_chunks(
    total: u64,
    progress: Progress<'_>,
    mut take: impl FnMut(u64, &mut [u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut buffer = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(usize::MAX)];
    let mut offset = 0;
    while offset < total {
        if progress(offset, total).is_break() {
            return Err(StoreError::Cancelled);
        }
        let length = usize::try_from(total - offset).unwrap_or(usize::MAX).min(buffer.len());
        take(offset, &mut buffer[..length])?;
        offset += length as u64;
    }
    Ok(())
}

impl Source {
    /// SHA-256 of the disk that is in it, hexadecimal.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn content_sha256(&self) -> Result<String, StoreError> {
        let mut context = Context::new(&SHA256);
        in_chunks(self.virtual_bytes(), &mut |_, _| ControlFlow::Continue(()), |offset, chunk| {
            self.read(offset, chunk)?;
            context.update(chunk);
            Ok(())
        })?;
        Ok(hex::encode(context.finish()))
    }
}

impl Content for Source {
    /// Those of the source, filled up to a whole sector.
    fn virtual_bytes(&self) -> u64 {
        self.byte_len.next_multiple_of(SECTOR_BYTES)
    }

    /// With zeros behind the source's end.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        let within = usize::try_from(self.byte_len.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        let (content, padding) = buffer.split_at_mut(within);
        padding.fill(0);
        let read = match &self.qcow2 {
            None => self.file.read_exact_at(content, offset),
            Some(image) => block_on(image.read(content, offset)),
        };
        read.map_err(|source| StoreError::io("reading", &self.path, source))
    }

    fn identity(&self) -> Option<String> {
        Some(self.identity.clone())
    }
}

/// A file that was neither replaced nor written to has the same.
fn identity(metadata: &Metadata, format: ImageFormat) -> String {
    let (seconds, nanos) = (metadata.mtime(), metadata.mtime_nsec());
    format!("{format:?} {} {} {} {seconds}.{nanos}", metadata.dev(), metadata.ino(), metadata.len())
}

/// What a copy found on its way.
#[derive(Debug)]
pub(super) struct Copied {
    pub(super) data_bytes: u64,
    pub(super) sha256: String,
    pub(super) root: Hash,
}

/// Copies `content` into `folder`, as a golden image's files, durably. Goes on where an earlier call with content of the
/// same identity was broken off.
pub(super) fn copy(folder: &Path, content: &dyn Content, progress: Progress<'_>) -> Result<Copied, StoreError> {
    let identity = content.identity();
    let resumed_at = identity.as_deref().and_then(|identity| resume(folder, identity)).unwrap_or(0);
    let mut copy = Copy::open(folder, content, resumed_at)?;
    while copy.files.offset < copy.total {
        let durable = copy.durable;
        let copied = copy.chunk(content, progress);
        match (&copied, &identity) {
            (Ok(()), Some(identity)) if copy.files.offset >= durable + CHECKPOINT_BYTES => {
                copy.checkpoint(folder, identity)?;
            }
            // What cannot be recorded is done again; the first error is the one that counts.
            (Err(_), Some(identity)) if copy.files.offset > durable => drop(copy.checkpoint(folder, identity)),
            _ => {}
        }
        copied?;
    }
    let copied = copy.finish(progress)?;
    forget_checkpoint(folder)?;
    Ok(copied)
}

/// A copy under way.
struct Copy {
    files: NewGolden,
    buffer: Vec<u8>,
    /// Up to here the disk has its content already.
    durable: u64,
    total: u64,
}

impl Copy {
    fn open(folder: &Path, content: &dyn Content, durable: u64) -> Result<Self, StoreError> {
        let total = content.virtual_bytes();
        let files = NewGolden::open(folder, total, durable == 0)?;
        let buffer = vec![0; usize::try_from(CHUNK_BYTES.min(total)).unwrap_or(usize::MAX)];
        Ok(Self { files, buffer, durable: durable.min(total), total })
    }

    fn chunk(&mut self, content: &dyn Content, progress: Progress<'_>) -> Result<(), StoreError> {
        let offset = self.files.offset;
        if progress(offset, self.total).is_break() {
            return Err(StoreError::Cancelled);
        }
        let copied = offset < self.durable;
        let end = if copied { self.durable } else { self.total };
        let length = usize::try_from(end - offset).unwrap_or(usize::MAX).min(self.buffer.len());
        let chunk = &mut self.buffer[..length];
        if copied {
            self.files.read_back(chunk)?;
        } else {
            content.read(offset, chunk)?;
        }
        self.files.push(chunk, copied)
    }

    fn checkpoint(&mut self, folder: &Path, identity: &str) -> Result<(), StoreError> {
        self.files.checkpoint(folder, identity, self.files.offset)?;
        self.durable = self.files.offset;
        Ok(())
    }

    fn finish(self, progress: Progress<'_>) -> Result<Copied, StoreError> {
        let copied = self.files.finish()?;
        // The last word is `done` or `failed`; whoever broke off now would get an image that they think they have not.
        let _ = progress(self.total, self.total);
        Ok(copied)
    }
}

/// A golden image's files, being written from the first block to the last.
pub(super) struct NewGolden {
    path: PathBuf,
    disk: File,
    tree: Builder,
    hash: Context,
    data_bytes: u64,
    offset: u64,
}

impl NewGolden {
    /// Begins them in `folder`, for a disk of `byte_len` octets: `anew`, or over what an earlier attempt wrote.
    pub(super) fn open(folder: &Path, byte_len: u64, anew: bool) -> Result<Self, StoreError> {
        let (path, tree_path) = (folder.join(DISK), folder.join(TREE));
        if anew {
            // Anything there would show where the content has a hole.
            remove(&path)?;
        }
        let open = |path: &Path, truncate| {
            let mut options = OpenOptions::new();
            let opened = options.read(true).write(true).create(true).truncate(truncate).mode(0o600).open(path);
            opened.map_err(|source| StoreError::io("making", path, source))
        };
        let (disk, tree) = (open(&path, false)?, open(&tree_path, true)?);
        disk.set_len(byte_len).map_err(|source| StoreError::io("sizing", &path, source))?;
        let (tree, hash) = (Builder::new(tree, byte_len), Context::new(&SHA256));
        Ok(Self { path, disk, tree, hash, data_bytes: 0, offset: 0 })
    }

    /// Records in `folder` that the first `offset` octets of what has this identity are there, once they are durable.
    pub(super) fn checkpoint(&self, folder: &Path, identity: &str, offset: u64) -> Result<(), StoreError> {
        let path = folder.join(CHECKPOINT);
        let failed = |source| StoreError::io("recording how far an import has come in", &path, source);
        self.disk.sync_data().map_err(failed)?;
        let staged = path.with_extension("new");
        std::fs::write(&staged, format!("{offset}\n{identity}")).map_err(failed)?;
        std::fs::rename(&staged, &path).map_err(failed)
    }

    /// Reads what comes next, as an earlier attempt wrote it.
    pub(super) fn read_back(&self, chunk: &mut [u8]) -> Result<(), StoreError> {
        let failed = |source| StoreError::io("reading", &self.path, source);
        self.disk.read_exact_at(chunk, self.offset).map_err(failed)
    }

    /// Adds what comes next: whole blocks, but for the last. What is `there` already is not written again.
    pub(super) fn push(&mut self, chunk: &[u8], there: bool) -> Result<(), StoreError> {
        let failed = |source| StoreError::io("writing", &self.path, source);
        self.hash.update(chunk);
        for block in chunk.chunks(BLOCK_LEN) {
            self.tree.push(&merkle::leaf(block)).map_err(failed)?;
            if !merkle::is_zero(block) {
                if !there {
                    self.disk.write_all_at(block, self.offset).map_err(failed)?;
                }
                self.data_bytes += block.len() as u64;
            }
            self.offset += block.len() as u64;
        }
        Ok(())
    }

    /// Makes them durable.
    pub(super) fn finish(self) -> Result<Copied, StoreError> {
        let failed = |source| StoreError::io("writing", &self.path, source);
        self.disk.sync_all().map_err(failed)?;
        let root = self.tree.finish().map_err(failed)?;
        Ok(Copied { data_bytes: self.data_bytes, sha256: hex::encode(self.hash.finish()), root })
    }
}

/// How far an earlier copy of the same content has come in `folder`.
pub(super) fn resume(folder: &Path, identity: &str) -> Option<u64> {
    let text = std::fs::read_to_string(folder.join(CHECKPOINT)).ok()?;
    let (offset, of) = text.split_once('\n')?;
    let offset: u64 = offset.parse().ok()?;
    (of == identity && offset.is_multiple_of(BLOCK_BYTES)).then_some(offset)
}

/// Whether anything in `folder` can be gone on with.
pub(super) fn has_checkpoint(folder: &Path) -> bool {
    folder.join(CHECKPOINT).exists()
}

/// Nothing in `folder` is to be gone on with.
pub(super) fn forget_checkpoint(folder: &Path) -> Result<(), StoreError> {
    remove(&folder.join(CHECKPOINT))
}

/// A chain as the content of a golden image.
pub(super) struct Merged(pub(super) Arc<dyn BlockDevice>);

impl Content for Merged {
    fn virtual_bytes(&self) -> u64 {
        self.0.byte_len()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        Ok(self.0.read_at(offset, buffer)?)
    }

    /// A chain never changes, and what was copied of it is in its image's own folder.
    fn identity(&self) -> Option<String> {
        Some("merged".to_owned())
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(StoreError::io("removing", path, source)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Opens `path`, which must lie beneath one of `folders`, whatever it is.
pub(crate) fn open_beneath(path: &Path, folders: &[PathBuf]) -> Result<File, StoreError> {
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

fn open_qcow2(path: &Path, file: File, file_bytes: u64) -> Result<(u64, Option<FormatAccess<ImagoFile>>), StoreError> {
    let mut header = [0; HEADER_BYTES];
    let got = file.read_at(&mut header, 0).map_err(|source| StoreError::io("reading the header of", path, source))?;
    let virtual_bytes = qcow2::check_header(&header[..got], file_bytes)
        .map_err(|source| StoreError::Qcow2 { path: path.to_owned(), source })?;
    let failed = |source| StoreError::io("opening as qcow2", path, source);
    let storage = ImagoFile::from_open_file(file, StorageOpenOptions::new()).map_err(failed)?;
    let image = block_on(Qcow2::<ImagoFile>::builder(storage).open(DenyImplicitOpenGate::default())).map_err(failed)?;
    Ok((virtual_bytes, Some(FormatAccess::new(image))))
}

/// imago's futures read with plain system calls: they never wait for a reactor, so any executor does.
fn block_on<F: Future>(future: F) -> F::Output {
    futures_util::FutureExt::now_or_never(future).unwrap_or_else(|| unreachable!())
}
