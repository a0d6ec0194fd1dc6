//! Images as projects know them: the catalogue in the database, and the store below it, kept in step.
//!
//! Every operation writes its intention to the catalogue, does it in the store, where it happens entirely or not at all,
//! and writes the outcome. [`Catalogue::recover`] completes or undoes at the next start what died between two of these.

use crate::db::images::ImageRecord;
use crate::db::{Db, DbError};
use crate::export::blocking;
use crate::lock::lock;
use crate::store::device::BlockDevice;
use crate::store::import::in_chunks;
use crate::store::{Content, Dependent, ImageStore, StoreError, StoredImage, StoredKind};
use crate::tree::AnySource;
use assay_service::error::chain;
use assay_wire::id::{ImageId, ImageKey, ProjectId};
use assay_wire::imaging::{Image, ImageKind, ImageState, Provenance};
use std::collections::{BTreeSet, HashSet};
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The catalogue and its store.
#[derive(Debug)]
pub(crate) struct Catalogue {
    pub(crate) db: Db,
    pub(crate) store: Arc<dyn ImageStore>,
    /// Where root file systems become disks.
    work: PathBuf,
    /// Images that are being worked on.
    working: Arc<Mutex<HashSet<ImageKey>>>,
}

/// A folder to work in, gone with this.
struct Work(PathBuf);

impl Work {
    fn new(works: &Path, image: ImageKey) -> Self {
        Self(works.join(image.to_string()))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // There is none for most sources; what cannot be removed now is removed at the next start.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CatalogueError {
    /// The database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Names are for one image each.
    #[error("there is an image named `{0}` already")]
    NameTaken(ImageId),
    /// Something else is being done to it.
    #[error("image `{0}` is being worked on")]
    Busy(ImageId),
    /// It cannot be used yet, or no more.
    #[error("image `{image}` is {}", match state {
        ImageState::Importing => "not there yet",
        ImageState::Ready => "there",
        ImageState::Deleting => "being deleted",
    })]
    NotReady {
        /// Which.
        image: ImageId,
        /// How far it is.
        state: ImageState,
    },
    /// It is still read.
    #[error("image `{image}` is still read by {}", dependents.join(", "))]
    HasDependents {
        /// Which.
        image: ImageId,
        /// By what, in words.
        dependents: Vec<String>,
    },
    /// The store's image is not the one that was recorded.
    #[error("the hash tree of image `{image}` has root {found}, on record is {recorded}")]
    Tampered {
        /// Which.
        image: ImageId,
        /// What the store says.
        found: String,
        /// What the catalogue says.
        recorded: String,
    },
}

/// What a new image will be.
#[derive(Debug, Clone)]
pub(crate) struct NewImage {
    pub(crate) name: ImageId,
    pub(crate) project: ProjectId,
    pub(crate) kind: ImageKind,
    /// What it is made from, in words.
    pub(crate) source: String,
    pub(crate) made_by: String,
    pub(crate) now_ms: i64,
}

/// The right to work on an image, until it is dropped.
#[derive(Debug)]
pub(crate) struct Working {
    images: Arc<Mutex<HashSet<ImageKey>>>,
    image: ImageKey,
}

impl Drop for Working {
    fn drop(&mut self) {
        lock(&self.images).remove(&self.image);
    }
}

impl Catalogue {
    pub(crate) fn new(db: Db, store: Arc<dyn ImageStore>, work: PathBuf) -> Self {
        Self { db, store, work, working: Arc::default() }
    }

    /// Completes or undoes what was under way when the last process died.
    pub(crate) async fn recover(&self) -> Result<(), CatalogueError> {
        let (mut kept, work) = (Vec::new(), self.work.clone());
        blocking(move || match std::fs::remove_dir_all(&work) {
            Err(source) if source.kind() != ErrorKind::NotFound => Err(StoreError::io("removing", &work, source)),
            Ok(()) | Err(_) => Ok(()),
        })
        .await?;
        for record in self.db.images().await? {
            let (store, key) = (Arc::clone(&self.store), record.key);
            let found = match blocking(move || store.image(key)).await {
                Ok(image) => Some(image),
                Err(StoreError::NoImage { .. }) => None,
                Err(error) => {
                    tracing::error!(event = "image.unreadable", image = %record.name, cause = chain(&error), "image cannot be read");
                    continue;
                }
            };
            match (record.state, found) {
                (ImageState::Importing, None) if record.kind == ImageKind::Snapshot => {
                    self.db.remove_image(record.key).await?;
                }
                (ImageState::Importing, None) => kept.push(record.key),
                (ImageState::Ready, Some(stored)) if check_root(&record, &stored).is_err() => {
                    tracing::error!(event = "image.tampered", image = %record.name, key = %record.key, "the store's image is not the one on record");
                }
                (ImageState::Importing | ImageState::Ready, Some(stored)) => {
                    let mut now = ImageRecord { state: ImageState::Ready, ..record.clone() };
                    now.describe(&stored);
                    if now != record {
                        tracing::info!(event = "image.recovered", image = %record.name, "an interrupted change is complete");
                        self.db.update_image(&now, record.state).await?;
                    }
                }
                (ImageState::Ready, None) => {
                    tracing::error!(event = "image.lost", image = %record.name, key = %record.key, "the store has not what is on record");
                }
                (ImageState::Deleting, _) => self.finish_deleting(record).await?,
            }
        }
        let store = Arc::clone(&self.store);
        blocking(move || store.forget_imports(&kept)).await?;
        Ok(())
    }

    /// Removes an image whose record says that it is going. One that is read after all stays.
    async fn finish_deleting(&self, record: ImageRecord) -> Result<(), CatalogueError> {
        let (store, key) = (Arc::clone(&self.store), record.key);
        match blocking(move || store.remove_image(key)).await {
            Ok(()) => Ok(self.db.remove_image(key).await?),
            Err(error @ StoreError::HasDependents { .. }) => {
                self.db.update_image(&ImageRecord { state: ImageState::Ready, ..record }, ImageState::Deleting).await?;
                tracing::warn!(event = "image.not_deleted", image = %key, cause = chain(&error), "an interrupted deletion is undone");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The one right to work on an image.
    pub(crate) fn begin(&self, record: &ImageRecord) -> Result<Working, CatalogueError> {
        let fresh = lock(&self.working).insert(record.key);
        if fresh {
            Ok(Working { images: Arc::clone(&self.working), image: record.key })
        } else {
            Err(CatalogueError::Busy(record.name.clone()))
        }
    }

    /// Records an image that is about to be made. The same image of the same source goes on where it was broken off; of
    /// another source, it begins anew.
    pub(crate) async fn announce(&self, new: NewImage) -> Result<(ImageRecord, Working), CatalogueError> {
        if let Some(found) = self.db.image(&new.name).await? {
            if found.state != ImageState::Importing || found.project != new.project {
                return Err(CatalogueError::NameTaken(new.name));
            }
            let working = self.begin(&found)?;
            if found.source == new.source && found.kind == new.kind {
                return Ok((found, working));
            }
            self.discard(&found).await?;
        }
        let record = ImageRecord {
            key: ImageKey::random(),
            name: new.name,
            project: new.project,
            kind: new.kind,
            state: ImageState::Importing,
            virtual_bytes: 0,
            data_bytes: 0,
            sha256: None,
            root: None,
            parent: None,
            shared_with: BTreeSet::new(),
            public: false,
            tags: BTreeSet::new(),
            source: new.source,
            source_sha256: None,
            made_by: new.made_by,
            created_at_ms: new.now_ms,
        };
        let working = self.begin(&record)?;
        if self.db.insert_image(&record).await? {
            Ok((record, working))
        } else {
            Err(CatalogueError::NameTaken(record.name))
        }
    }

    /// Forgets an image that is not there yet, and what there is of it.
    pub(crate) async fn discard(&self, record: &ImageRecord) -> Result<(), CatalogueError> {
        let (store, key) = (Arc::clone(&self.store), record.key);
        blocking(move || store.remove_image(key)).await?;
        Ok(self.db.remove_image(key).await?)
    }

    /// Imports an announced image. What is broken off stays announced, and can be gone on with; what turns out not to be
    /// what was promised goes.
    pub(crate) async fn import(
        &self,
        mut record: ImageRecord,
        source: AnySource,
        expected_sha256: Option<String>,
        progress: impl FnMut(u64, u64) -> ControlFlow<()> + Send + 'static,
    ) -> Result<ImageRecord, CatalogueError> {
        let (store, key, project) = (Arc::clone(&self.store), record.key, record.project.clone());
        let work = Work::new(&self.work, key);
        let imported = blocking(move || {
            let mut progress = progress;
            let source = match source {
                AnySource::Disk(source) => source,
                AnySource::Tree(tree) => {
                    let (source, digest) = tree.build(&work.0, expected_sha256.as_deref())?;
                    let stored = store.import(key, &project, &source, &mut progress)?;
                    return Ok((stored, digest));
                }
            };
            // A raw file of whole sectors is what the store hashes anyway.
            let digest = match (&expected_sha256, source.is_verbatim()) {
                (None, true) => None,
                (expected, _) => Some(source.digest(expected.as_deref(), &mut progress)?),
            };
            let stored = store.import(key, &project, &source, &mut progress)?;
            let digest = digest.or_else(|| match &stored.kind {
                StoredKind::Golden { sha256, .. } => Some(sha256.clone()),
                StoredKind::Snapshot { .. } => None,
            });
            Ok((stored, digest))
        });
        match imported.await {
            Ok((stored, digest)) => {
                record.describe(&stored);
                record.source_sha256 = digest;
                self.finish(record).await
            }
            Err(error @ StoreError::Digest { .. }) => {
                self.discard(&record).await?;
                Err(error.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Makes an image of what a disk holds, which `take` does in the store.
    pub(crate) async fn snapshot<E: From<CatalogueError>>(
        &self,
        new: NewImage,
        take: impl AsyncFnOnce(ImageKey) -> Result<(), E>,
    ) -> Result<ImageRecord, E> {
        let (mut record, _working) = self.announce(new).await?;
        let (store, key) = (Arc::clone(&self.store), record.key);
        let taken = async {
            take(key).await?;
            // After it: what it takes may have to be counted, and a node may have waited for the snapshot.
            blocking(move || store.image(key)).await.map_err(|error| CatalogueError::from(error).into())
        };
        match taken.await {
            Ok(stored) => {
                record.describe(&stored);
                Ok(self.finish(record).await?)
            }
            Err(error) => {
                self.discard(&record).await?;
                Err(error)
            }
        }
    }

    /// Makes an announced image a copy of another, block by block.
    pub(crate) async fn copy(
        &self,
        of: &ImageRecord,
        mut record: ImageRecord,
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()> + Send + 'static,
    ) -> Result<ImageRecord, CatalogueError> {
        self.checked(of).await?;
        let (store, source) = (Arc::clone(&self.store), of.key);
        let (key, project) = (record.key, record.project.clone());
        let copied = blocking(move || {
            let content = CopyOf { image: source, device: store.open_image(source)? };
            store.import(key, &project, &content, &mut progress)
        });
        record.describe(&copied.await?);
        (record.parent, record.source_sha256) = (Some(of.key), record.sha256.clone());
        self.finish(record).await
    }

    /// Makes a snapshot a golden image of its own.
    pub(crate) async fn flatten(
        &self,
        mut record: ImageRecord,
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()> + Send + 'static,
    ) -> Result<ImageRecord, CatalogueError> {
        ready(&record)?;
        let _working = self.begin(&record)?;
        let (store, key) = (Arc::clone(&self.store), record.key);
        let flat = blocking(move || store.flatten(key, &mut progress)).await?;
        fail::fail_point!("catalogue::flattened", |_| std::process::abort());
        record.describe(&flat);
        self.db.update_image(&record, ImageState::Ready).await?;
        Ok(record)
    }

    /// Reads all of an image, so that each block is checked and in the page cache before somebody boots from it.
    pub(crate) async fn prepare(
        &self,
        record: ImageRecord,
        mut progress: impl FnMut(u64, u64) -> ControlFlow<()> + Send + 'static,
    ) -> Result<ImageRecord, CatalogueError> {
        self.checked(&record).await?;
        let (store, key) = (Arc::clone(&self.store), record.key);
        blocking(move || {
            let device = store.open_image(key)?;
            let total = device.byte_len();
            in_chunks(total, &mut progress, |offset, chunk| Ok(device.read_at(offset, chunk)?))?;
            let _ = progress(total, total);
            Ok(())
        })
        .await?;
        Ok(record)
    }

    /// Whether an image is there, and still the one that was recorded.
    pub(crate) async fn checked(&self, record: &ImageRecord) -> Result<(), CatalogueError> {
        ready(record)?;
        let (store, key) = (Arc::clone(&self.store), record.key);
        let stored = blocking(move || store.image(key)).await?;
        check_root(record, &stored)
    }

    /// Changes what an image is called, whose it is, who may use it, or its tags.
    pub(crate) async fn change(&self, was: ImageRecord, now: ImageRecord) -> Result<ImageRecord, CatalogueError> {
        ready(&was)?;
        let _working = self.begin(&was)?;
        if self.db.update_image(&now, was.state).await? {
            return Ok(now);
        }
        match self.db.image(&now.name).await? {
            Some(other) if other.key != was.key => Err(CatalogueError::NameTaken(now.name)),
            _ => Err(CatalogueError::Busy(was.name)),
        }
    }

    /// Deletes an image that nothing reads.
    pub(crate) async fn delete(&self, record: ImageRecord) -> Result<(), CatalogueError> {
        let _working = self.begin(&record)?;
        let going = ImageRecord { state: ImageState::Deleting, ..record.clone() };
        if record.state != ImageState::Deleting && !self.db.update_image(&going, record.state).await? {
            return Err(CatalogueError::Busy(record.name));
        }
        fail::fail_point!("catalogue::deleting", |_| std::process::abort());
        // From here on no disk is made of it: those that are being made are on record.
        let disks = self.db.disks().await?.into_iter().filter(|disk| disk.image == record.key);
        let mut dependents: Vec<Dependent> = disks.map(|disk| Dependent::Disk(disk.id)).collect();
        if dependents.is_empty() {
            let (store, key) = (Arc::clone(&self.store), record.key);
            match blocking(move || store.remove_image(key)).await {
                Ok(()) => {
                    fail::fail_point!("catalogue::removed", |_| std::process::abort());
                    return Ok(self.db.remove_image(record.key).await?);
                }
                Err(StoreError::HasDependents { dependents: found, .. }) => dependents = found,
                Err(error) => return Err(error.into()),
            }
        }
        self.db.update_image(&record, ImageState::Deleting).await?;
        Err(CatalogueError::HasDependents { image: record.name, dependents: self.named(&dependents).await? })
    }

    /// What reads an image, as people know it.
    async fn named(&self, dependents: &[Dependent]) -> Result<Vec<String>, CatalogueError> {
        let (images, disks) = (self.db.images().await?, self.db.disks().await?);
        let name = |dependent: &Dependent| match dependent {
            Dependent::Image(key) => {
                let found = images.iter().find(|image| image.key == *key);
                found.map_or_else(|| dependent.to_string(), |image| format!("image `{}`", image.name))
            }
            Dependent::Disk(id) => {
                let found = disks.iter().find(|disk| disk.id == *id);
                found.map_or_else(
                    || dependent.to_string(),
                    |disk| format!("the disk of node `{}` (lease {})", disk.node, disk.lease),
                )
            }
        };
        Ok(dependents.iter().map(name).collect())
    }

    /// Records that an announced image is there.
    async fn finish(&self, mut record: ImageRecord) -> Result<ImageRecord, CatalogueError> {
        fail::fail_point!("catalogue::stored", |_| std::process::abort());
        record.state = ImageState::Ready;
        self.db.update_image(&record, ImageState::Importing).await?;
        Ok(record)
    }
}

/// An image as the content of another.
struct CopyOf {
    image: ImageKey,
    device: Arc<dyn BlockDevice>,
}

impl Content for CopyOf {
    fn virtual_bytes(&self) -> u64 {
        self.device.byte_len()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        Ok(self.device.read_at(offset, buffer)?)
    }

    /// An image never changes.
    fn identity(&self) -> Option<String> {
        Some(format!("image {}", self.image))
    }
}

fn ready(record: &ImageRecord) -> Result<(), CatalogueError> {
    match record.state {
        ImageState::Ready => Ok(()),
        state => Err(CatalogueError::NotReady { image: record.name.clone(), state }),
    }
}

/// A golden image on record keeps its root: the store cannot tell by itself that all of it was replaced.
fn check_root(record: &ImageRecord, stored: &StoredImage) -> Result<(), CatalogueError> {
    let found = match &stored.kind {
        StoredKind::Golden { root, .. } => hex::encode(root),
        StoredKind::Snapshot { .. } => "of no golden image".to_owned(),
    };
    match &record.root {
        Some(recorded) if *recorded != found => {
            Err(CatalogueError::Tampered { image: record.name.clone(), found, recorded: recorded.clone() })
        }
        _ => Ok(()),
    }
}

/// The image as the API shows it.
pub(crate) fn shown(record: ImageRecord) -> Image {
    Image {
        name: record.name,
        key: record.key,
        project: record.project,
        kind: record.kind,
        state: record.state,
        virtual_bytes: record.virtual_bytes,
        data_bytes: record.data_bytes,
        sha256: record.sha256,
        root: record.root,
        shared_with: record.shared_with,
        public: record.public,
        tags: record.tags,
        provenance: Provenance {
            source: record.source,
            source_sha256: record.source_sha256,
            parent: record.parent,
            made_by: record.made_by,
            created_at_ms: record.created_at_ms,
        },
    }
}
