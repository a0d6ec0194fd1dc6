//! A disk on its way from the process that may open files to the one that may not: what is said of it, and its files.

use super::rbd;
use crate::store::StoreError;
use crate::store::checker::CheckerFiles;
use crate::store::device::{BlockDevice, DeviceError, Place, check_range};
use crate::store::file::{has_data, punch_hole, read_if_cached};
use crate::store::golden::GoldenFiles;
use crate::store::merkle::Hash;
use crate::store::overlay::{DiskFiles, HostBoot, LayerFiles, Overlay, TopFiles};
use assay_rbd::RbdError;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

/// What is said of a disk whose files are sent beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum DiskOrder {
    /// A clone; files: the golden image's, data and map of each layer, the clone's data, map and live map.
    Clone {
        /// The golden image.
        golden: GoldenOrder,
        /// What messages call the frozen layers, lowest first.
        layers: Vec<PathBuf>,
        /// What messages call the clone.
        top: PathBuf,
    },
    /// A clone on Ceph; files: the golden image's, and channels to the process that has the clone.
    Rbd {
        /// The golden image, as large as the clone.
        golden: GoldenOrder,
        /// What messages call the clone.
        clone: String,
        /// Octets of each of its objects but the last.
        object_bytes: u64,
    },
    /// A raw file; that is the one file.
    Raw {
        /// Octets of it that are seen: whole blocks.
        byte_len: u64,
    },
}

/// What is said of a golden image; files: its disk, its hash tree, and the two that lead to who checks its blocks, if
/// anybody does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenOrder {
    /// What messages call it.
    pub name: PathBuf,
    /// Its size in octets.
    pub byte_len: u64,
    /// The root of its hash tree.
    pub root: Hash,
    /// Whether somebody checks its blocks.
    pub checked: bool,
}

impl GoldenOrder {
    /// Takes an open golden image apart.
    #[must_use]
    pub fn of(files: GoldenFiles) -> (Self, Vec<OwnedFd>) {
        let GoldenFiles { name, byte_len, root, disk, tree, checker } = files;
        let order = Self { name, byte_len, root, checked: checker.is_some() };
        let checker = checker.map(|CheckerFiles { socket, board }| [socket, board.into()]);
        (order, [disk, tree].into_iter().map(OwnedFd::from).chain(checker.into_iter().flatten()).collect())
    }

    /// Puts it together again.
    fn open(self, mut next: impl FnMut() -> Result<File, DiskError>) -> Result<GoldenFiles, DiskError> {
        let Self { name, byte_len, root, checked } = self;
        let (disk, tree) = (next()?, next()?);
        let checker = if checked { Some(CheckerFiles { socket: next()?.into(), board: next()? }) } else { None };
        Ok(GoldenFiles { name, byte_len, root, disk, tree, checker })
    }
}

/// Why the files make no disk.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiskError {
    /// Not as many files as the order speaks of.
    #[error("{0} files came with the order")]
    Files(usize),
    /// They are not what they should be.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Whoever has the clone refuses.
    #[error(transparent)]
    Rbd(#[from] RbdError),
}

impl DiskOrder {
    /// Takes an open clone apart.
    #[must_use]
    pub fn of(files: DiskFiles) -> (Self, Vec<OwnedFd>) {
        let DiskFiles { golden, layers, top } = files;
        let (golden, mut open) = GoldenOrder::of(golden);
        let mut names = Vec::with_capacity(layers.len());
        for LayerFiles { name, data, map } in layers {
            names.push(name);
            open.extend([data, map].map(OwnedFd::from));
        }
        open.extend([top.data, top.map, top.live].map(OwnedFd::from));
        (Self::Clone { golden, layers: names, top: top.name }, open)
    }

    /// Its size in octets.
    pub(super) fn byte_len(&self) -> u64 {
        match self {
            Self::Clone { golden, .. } | Self::Rbd { golden, .. } => golden.byte_len,
            Self::Raw { byte_len } => *byte_len,
        }
    }

    /// Puts the disk together again. Reads its maps; whatever a node wrote is not looked at.
    pub(super) fn open(
        self,
        files: Vec<OwnedFd>,
        read_only: bool,
        boot: HostBoot,
    ) -> Result<Arc<dyn BlockDevice>, DiskError> {
        let count = files.len();
        let mut files = files.into_iter().map(File::from);
        let mut next = || files.next().ok_or(DiskError::Files(count));
        match self {
            Self::Clone { golden, layers, top } => {
                let golden = golden.open(&mut next)?;
                golden.expect_initiators();
                let layer = |name| Ok::<_, DiskError>(LayerFiles { name, data: next()?, map: next()? });
                let layers = layers.into_iter().map(layer).collect::<Result<_, _>>()?;
                let top = TopFiles { name: top, data: next()?, map: next()?, live: next()? };
                none_left(files, count)?;
                Ok(Arc::new(Overlay::open(DiskFiles { golden, layers, top }, boot)?))
            }
            Self::Rbd { golden, clone, object_bytes } => {
                let golden = golden.open(&mut next)?;
                golden.expect_initiators();
                let channels = [next()?].into_iter().chain(files).map(OwnedFd::from).collect();
                Ok(Arc::new(rbd::open(clone, object_bytes, channels, golden)?))
            }
            Self::Raw { byte_len } => {
                let file = next()?;
                none_left(files, count)?;
                Ok(Arc::new(RawFile { file, byte_len, read_only }))
            }
        }
    }
}

fn none_left(mut files: impl Iterator<Item = File>, count: usize) -> Result<(), DiskError> {
    files.next().map_or(Ok(()), |_| Err(DiskError::Files(count)))
}

/// A plain file.
#[derive(Debug)]
struct RawFile {
    file: File,
    byte_len: u64,
    read_only: bool,
}

impl RawFile {
    fn check(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        check_range(offset, length, self.byte_len)?;
        if self.read_only { Err(DeviceError::ReadOnly) } else { Ok(()) }
    }
}

impl BlockDevice for RawFile {
    fn byte_len(&self) -> u64 {
        self.byte_len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        check_range(offset, buffer.len() as u64, self.byte_len)?;
        let failed = |source| DeviceError::Io { doing: "reading a file", offset, source };
        self.file.read_exact_at(buffer, offset).map_err(failed)
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
        check_range(offset, buffer.len() as u64, self.byte_len)?;
        let failed = |source| DeviceError::Io { doing: "reading a file", offset, source };
        read_if_cached(&self.file, offset, buffer).map_err(failed)
    }

    fn place_at(&self, offset: u64, length: u64) -> Option<Place<'_>> {
        Some(Place { file: &self.file, offset, length })
    }

    fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), DeviceError> {
        let failed = |source| DeviceError::Io { doing: "finding the holes of a file", offset, source };
        has_data(&self.file, offset, length).map_err(failed)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check(offset, data.len() as u64)?;
        let failed = |source| DeviceError::from_io("writing to a file", offset, source);
        self.file.write_all_at(data, offset).map_err(failed)
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        self.check(offset, length)?;
        let failed = |source| DeviceError::from_io("unmapping part of a file", offset, source);
        if length == 0 { Ok(()) } else { punch_hole(&self.file, offset, length).map_err(failed) }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::from_io("flushing a file", 0, source);
        self.file.sync_data().map_err(failed)
    }
}
