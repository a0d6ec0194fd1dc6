//! The local image store: golden images and their clones, as files beneath one folder.
//!
//! ```text
//! <store>/lock                 locked (`flock`) by the imaging service that owns the store
//! <store>/images/<name>/       golden images: see [`golden`]
//! <store>/disks/<disk id>/     clones: see [`overlay`]
//! ```
//!
//! Everything here blocks; callers in async code use `spawn_blocking`.

mod allocation;
pub mod device;
pub(crate) mod file;
pub mod golden;
pub mod import;
pub mod overlay;
pub mod qcow2;

use assay_wire::id::{DiskId, ImageId};
use assay_wire::imaging::Image;
use golden::Manifest;
use overlay::Overlay;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The store, owned by this process.
#[derive(Debug)]
pub struct ImageStore {
    images: PathBuf,
    disks: PathBuf,
    _lock: File,
}

impl ImageStore {
    /// Opens the store in `root`, making it if need be, and clears away what interrupted imports left.
    ///
    /// # Errors
    /// Another process owns it, or the file system refuses.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let (images, disks) = (root.join("images"), root.join("disks"));
        for folder in [&images, &disks] {
            std::fs::create_dir_all(folder).map_err(|source| StoreError::io("making", folder, source))?;
        }
        let path = root.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(&path)
            .map_err(|source| StoreError::io("opening", &path, source))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse { path: root.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(StoreError::io("locking", &path, source)),
        }
        let store = Self { images, disks, _lock: lock };
        for name in store.image_folders()?.filter(|name| name.starts_with(import::STAGING_PREFIX)) {
            let path = store.images.join(name);
            std::fs::remove_dir_all(&path).map_err(|source| StoreError::io("removing", &path, source))?;
        }
        Ok(store)
    }

    /// All images. One that cannot be read is logged and left out.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn images(&self) -> Result<Vec<Image>, StoreError> {
        let mut images = Vec::new();
        for name in self.image_folders()? {
            if name.parse::<ImageId>().is_err() {
                continue;
            }
            match Manifest::read(&self.images.join(&name)) {
                Ok(manifest) if manifest.image.name.as_str() == name => images.push(manifest.image),
                Ok(manifest) => {
                    tracing::warn!(event = "image.skipped", folder = name, says = %manifest.image.name, "image is not in its own folder");
                }
                Err(error) => {
                    tracing::warn!(event = "image.skipped", folder = name, error = %error, "image cannot be read");
                }
            }
        }
        Ok(images)
    }

    /// Imports an image: see [`import::import`].
    ///
    /// # Errors
    /// See there.
    pub fn import(
        &self,
        job: &import::Import,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Image, StoreError> {
        import::import(&self.images, job, progress)
    }

    /// Where an image is.
    #[must_use]
    pub fn image_folder(&self, image: &ImageId) -> PathBuf {
        self.images.join(image.as_str())
    }

    /// Where a disk is.
    #[must_use]
    pub fn disk_folder(&self, disk: DiskId) -> PathBuf {
        self.disks.join(disk.to_string())
    }

    /// Makes a disk as a clone of an image, in constant time.
    ///
    /// # Errors
    /// The image is missing, or the file system refuses; nothing is left then.
    pub fn create_disk(&self, disk: DiskId, image: &ImageId) -> Result<(), StoreError> {
        let manifest = Manifest::read(&self.image_folder(image))?;
        Overlay::create(&self.disk_folder(disk), manifest.image.virtual_bytes)
    }

    /// Removes a disk and all that its node wrote. Removing one that is not there is no error.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove_disk(&self, disk: DiskId) -> Result<(), StoreError> {
        let folder = self.disk_folder(disk);
        match std::fs::remove_dir_all(&folder) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(StoreError::io("removing", &folder, source)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn image_folders(&self) -> Result<impl Iterator<Item = String>, StoreError> {
        let failed = |source| StoreError::io("listing", &self.images, source);
        let names: Result<Vec<_>, _> = std::fs::read_dir(&self.images)
            .map_err(failed)?
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .collect();
        names.map(Vec::into_iter).map_err(failed)
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
        /// A clone or the store.
        path: PathBuf,
    },
    /// Images are never replaced.
    #[error("there is an image named `{image}` already")]
    Exists {
        /// Its name.
        image: ImageId,
    },
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
    /// Whoever asked for the import went away.
    #[error("the import was broken off")]
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
