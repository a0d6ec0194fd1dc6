//! Stores of images and disks. What one must do is [`ImageStore`]; [`local::LocalStore`] does it with files beneath one
//! folder, [`RbdImageStore`] in a pool of a Ceph cluster. `tests/store_contract` has the rules, and runs them on every store.
//!
//! A store knows images by [`ImageKey`] and disks by [`DiskId`], each of one length and never used twice. What they are
//! called, whose they are and who may see them is on record in imaging's database. Everything here blocks; callers in
//! async code use `spawn_blocking`.

mod allocation;
mod cache;
pub mod checker;
pub mod device;
pub mod export;
pub(crate) mod file;
mod folder;
pub mod golden;
pub mod import;
pub mod local;
mod location;
pub mod manifest;
pub mod merkle;
pub mod overlay;
pub mod qcow2;
mod rbd;

pub use local::LocalStore;
pub use location::{DiskLocation, RbdClone, Upper};
pub use rbd::RbdImageStore;

use crate::tree::TreeError;
use assay_rbd::RbdError;
use assay_wire::id::{AdmissionId, DiskId, ImageKey, ProjectId};
use device::{BlockDevice, DeviceError};
use merkle::Hash;
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Told octets done and octets in all, now and then; may break the work off.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// What an image is made from.
pub trait Content: Send + Sync {
    /// Size of the disk that nodes will see: a multiple of 512, and not 0.
    fn virtual_bytes(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The source cannot be read.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError>;

    /// What stays the same while the content does. An import that was broken off goes on where it stopped when it is
    /// asked for again with content of the same identity; without one it starts anew.
    fn identity(&self) -> Option<String>;
}

/// An image in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// Which.
    pub key: ImageKey,
    /// Size of the disk that nodes see.
    pub virtual_bytes: u64,
    /// Octets that it takes, beside what it shares with its parent.
    pub data_bytes: u64,
    /// How it is kept.
    pub kind: StoredKind,
}

/// How an image is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredKind {
    /// By itself; each block is checked when it is first read.
    Golden {
        /// SHA-256 of all of it, hexadecimal.
        sha256: String,
        /// Root of its hash tree: see [`merkle`].
        root: Hash,
    },
    /// As what a disk wrote over the image that the disk was made from.
    Snapshot {
        /// That image.
        parent: ImageKey,
    },
}

/// A store of images and disks. One process has it; calls may come from many threads, those about one disk or one image
/// one after the other.
///
/// Each call has happened entirely or not at all, also when the process dies in it; [`ImageStore::import`] alone may
/// leave what it can go on with, which no other call sees.
pub trait ImageStore: fmt::Debug + Send + Sync + 'static {
    /// Every image that is there whole.
    ///
    /// # Errors
    /// The store cannot be read.
    fn images(&self) -> Result<Vec<StoredImage>, StoreError>;

    /// One of them. How much a snapshot takes may be counted when it is first asked for.
    ///
    /// # Errors
    /// It is not there, or cannot be read.
    fn image(&self, image: ImageKey) -> Result<StoredImage, StoreError>;

    /// Makes a golden image, in a place of the project's where the store has such. An image that is there already is
    /// answered as it is.
    ///
    /// # Errors
    /// The content cannot be read, the store is full, or `progress` said so. What has been done is kept, if the content
    /// has an identity, until the same is asked for again or [`ImageStore::forget_imports`].
    fn import(
        &self,
        image: ImageKey,
        project: &ProjectId,
        content: &dyn Content,
        progress: Progress<'_>,
    ) -> Result<StoredImage, StoreError>;

    /// Clears away what interrupted imports left, but of `keep`.
    ///
    /// # Errors
    /// The store refuses.
    fn forget_imports(&self, keep: &[ImageKey]) -> Result<(), StoreError>;

    /// An image's content, read-only and checked.
    ///
    /// # Errors
    /// It is not there, or cannot be read.
    fn open_image(&self, image: ImageKey) -> Result<Arc<dyn BlockDevice>, StoreError>;

    /// Removes an image. One that is not there is no error.
    ///
    /// # Errors
    /// [`StoreError::HasDependents`] says what still reads it; or the store refuses.
    fn remove_image(&self, image: ImageKey) -> Result<(), StoreError>;

    /// Makes an image of what a disk holds now, in constant time. Neither depends on the other from then on. An image
    /// that is there already stays as it is.
    ///
    /// # Errors
    /// [`StoreError::InUse`] while the disk is open; [`StoreError::ChainTooLong`]; or the store refuses.
    fn snapshot(&self, disk: DiskId, image: ImageKey) -> Result<(), StoreError>;

    /// Makes a snapshot a golden image of its own, under the same key. Disks that were made from it before go on as they
    /// are. A golden image is answered as it is.
    ///
    /// # Errors
    /// The store is full, or `progress` said so: it is a snapshot still.
    fn flatten(&self, image: ImageKey, progress: Progress<'_>) -> Result<StoredImage, StoreError>;

    /// Makes a disk as a clone of an image, in constant time. A disk that is there already stays as it is.
    ///
    /// # Errors
    /// The image is missing, or the store refuses; nothing is left then.
    fn create_disk(&self, disk: DiskId, project: &ProjectId, image: ImageKey) -> Result<(), StoreError>;

    /// Makes a disk hold what an image holds, in constant time, and forgets what its node wrote since.
    ///
    /// # Errors
    /// The disk or the image is missing, their sizes differ, or the disk is open; it is as it was then.
    fn restore(&self, disk: DiskId, image: ImageKey) -> Result<(), StoreError>;

    /// Opens a disk to be read and written. Only one opener at a time has it, across processes.
    ///
    /// # Errors
    /// It is missing, damaged, or in use.
    fn open_disk(&self, disk: DiskId) -> Result<Arc<dyn BlockDevice>, StoreError>;

    /// Removes a disk and all that its node wrote. Removing one that is not there is no error.
    ///
    /// # Errors
    /// The store refuses, or the disk is open.
    fn remove_disk(&self, disk: DiskId) -> Result<(), StoreError>;

    /// Octets that a disk takes, beside what it shares.
    ///
    /// # Errors
    /// It is missing.
    fn disk_bytes(&self, disk: DiskId) -> Result<u64, StoreError>;

    /// Whether a snapshot gives its disk another place: what [`ImageStore::location`] gave before is of the image then, and
    /// must have been revoked.
    fn moves_disks(&self) -> bool;

    /// Where a disk is, for the export of `admission`: with a credential of that admission's own, where a store has such.
    ///
    /// # Errors
    /// It is missing, or the store refuses.
    fn location(&self, disk: DiskId, admission: AdmissionId) -> Result<DiskLocation, StoreError>;

    /// Makes worthless what [`ImageStore::location`] gave for an admission: when it answers, whoever holds it can write
    /// no more. Nothing to do where a location is no credential.
    ///
    /// # Errors
    /// The store does not answer: what was given may still be good.
    fn revoke(&self, disk: DiskId, admission: AdmissionId) -> Result<(), StoreError>;
}

/// What reads an image, so that it cannot be removed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dependent {
    /// An image by snapshot.
    Image(ImageKey),
    /// A disk.
    Disk(DiskId),
}

impl fmt::Display for Dependent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(image) => write!(f, "image {image}"),
            Self::Disk(disk) => write!(f, "disk {disk}"),
        }
    }
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{} {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, continuing the sentence that the path begins.
        detail: String,
    },
    /// A qcow2 file is refused.
    #[error("reading the qcow2 header of {}", path.display())]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: qcow2::Qcow2Refused,
    },
    /// Another process has it open.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// A clone or the store: its folder, or pool, namespace and name on Ceph.
        path: PathBuf,
    },
    /// No such image.
    #[error("the store has no image {image}")]
    NoImage {
        /// Which.
        image: ImageKey,
    },
    /// No such disk.
    #[error("the store has no disk {disk}")]
    NoDisk {
        /// Which.
        disk: DiskId,
    },
    /// A gateway was told of a disk on Ceph, and is not set up for those.
    #[error("disk {disk} is on Ceph, which this gateway is not configured for")]
    NoCeph {
        /// Which.
        disk: DiskId,
    },
    /// An image's content is not the one on record.
    #[error("the content of image {image} has a hash tree with root {found}, on record is {recorded}")]
    OtherContent {
        /// Which.
        image: ImageKey,
        /// The root of what it holds.
        found: String,
        /// What was recorded.
        recorded: String,
    },
    /// Ceph.
    #[error("using Ceph RBD")]
    Rbd(#[from] RbdError),
    /// It is still read.
    #[error("image {image} is still read by {}", list(dependents))]
    HasDependents {
        /// Which.
        image: ImageKey,
        /// By what.
        dependents: Vec<Dependent>,
    },
    /// Every read would pass through too many layers.
    #[error("disk {disk} stands on {layers} layers, and on no more")]
    ChainTooLong {
        /// Which.
        disk: DiskId,
        /// How many.
        layers: usize,
    },
    /// A disk cannot come to hold an image of another size.
    #[error("disk {disk} has {disk_bytes} octets, image {image} has {image_bytes}")]
    SizesDiffer {
        /// The disk.
        disk: DiskId,
        /// Its size.
        disk_bytes: u64,
        /// The image.
        image: ImageKey,
        /// Its size.
        image_bytes: u64,
    },
    /// What was read is not what was promised.
    #[error("{} has SHA-256 {found}, not {expected}", path.display())]
    Digest {
        /// The source.
        path: PathBuf,
        /// What it has.
        found: String,
        /// What was said.
        expected: String,
    },
    /// A root file system is refused.
    #[error("making an image of a root file system")]
    Tree(#[from] TreeError),
    /// Reading an image or a disk.
    #[error("reading from the image store")]
    Device(#[from] DeviceError),
    /// Imports are from configured folders only.
    #[error("{} is not beneath one of the configured import folders", path.display())]
    OutsideImportFolders {
        /// The source.
        path: PathBuf,
    },
    /// The work ended in a panic; what it had begun is left as after a crash.
    #[error("working in the image store")]
    Panicked {
        /// The panic.
        source: tokio::task::JoinError,
    },
    /// Whoever asked for the work went away.
    #[error("the work was broken off")]
    Cancelled,
}

impl StoreError {
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }

    pub(crate) fn malformed(path: &Path, detail: String) -> Self {
        Self::Malformed { path: path.to_owned(), detail }
    }
}

fn list(dependents: &[Dependent]) -> String {
    dependents.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
