//! The local store: golden images, layers and disks as files beneath one folder.
//!
//! ```text
//! <store>/lock                      locked (`flock`) by the imaging service that owns the store
//! <store>/images/<key>/             images: see [`super::golden`], and [`super::manifest`] for those by snapshot
//! <store>/images/.import-<key>/     an import that is under way or was broken off
//! <store>/layers/<layer>/           what disks wrote: see [`super::overlay`]
//! <store>/disks/<disk>.json         disks: see [`super::manifest`]
//! ```

use super::folder::{list, lock, names, remove_folder, sync};
use super::import::{self, Merged};
use super::manifest::{self, Chain, DiskManifest, ImageContent, ImageManifest, LayerId, MAX_LAYERS};
use super::overlay::{
    DiskFiles, HostBoot, IMAGE_MANIFEST, Lower, Overlay, TopFiles, disk_manifest, image_folder, layer_folder,
};
use super::{
    BlockDevice, Content, Dependent, DiskLocation, ImageStore, Progress, StoreError, StoredImage, StoredKind, Upper,
};
use assay_wire::id::{AdmissionId, DiskId, ImageKey, ProjectId};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Folders of imports begin with this, which no key does.
const IMPORT_PREFIX: &str = ".import-";

/// The store, owned by this process.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    boot: HostBoot,
    /// Held while manifests change in a way that layers and images are counted by.
    changing: Mutex<()>,
    _lock: File,
}

impl LocalStore {
    /// Opens the store in `root`, making it if need be, and sweeps up what a crash left.
    ///
    /// # Errors
    /// Another process owns it, or the file system refuses.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for folder in ["images", "layers", "disks"].map(|name| root.join(name)) {
            std::fs::create_dir_all(&folder).map_err(|source| StoreError::io("making", &folder, source))?;
        }
        let _lock = lock(root)?;
        let store = Self { root: root.to_owned(), boot: HostBoot::current()?, changing: Mutex::default(), _lock };
        store.sweep()?;
        Ok(store)
    }

    /// The folder of the layer that a disk writes to.
    ///
    /// # Errors
    /// It is missing or malformed.
    pub fn top_folder(&self, disk: DiskId) -> Result<PathBuf, StoreError> {
        Ok(layer_folder(&self.root, self.disk(disk)?.top))
    }

    /// The folder of an image.
    #[must_use]
    pub fn image_folder(&self, image: ImageKey) -> PathBuf {
        image_folder(&self.root, image)
    }

    /// Removes layers that no manifest names, and images that were being removed.
    fn sweep(&self) -> Result<(), StoreError> {
        for key in list::<ImageKey>(&self.root.join("images"), "")? {
            if !self.image_folder(key).join(IMAGE_MANIFEST).exists() {
                remove_folder(&self.image_folder(key))?;
            }
        }
        self.release(&list(&self.root.join("layers"), "")?)
    }

    fn manifest(&self, image: ImageKey) -> Result<ImageManifest, StoreError> {
        let path = self.image_folder(image).join(IMAGE_MANIFEST);
        match manifest::read(&path, ImageManifest::parse) {
            Ok(manifest) if manifest.key == image => Ok(manifest),
            Ok(manifest) => Err(StoreError::malformed(&path, format!("is of image {}", manifest.key))),
            Err(StoreError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Err(StoreError::NoImage { image })
            }
            Err(error) => Err(error),
        }
    }

    fn disk(&self, disk: DiskId) -> Result<DiskManifest, StoreError> {
        let path = disk_manifest(&self.root, disk);
        match manifest::read(&path, DiskManifest::parse) {
            Ok(manifest) if manifest.disk == disk => Ok(manifest),
            Ok(manifest) => Err(StoreError::malformed(&path, format!("is of disk {}", manifest.disk))),
            Err(StoreError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Err(StoreError::NoDisk { disk })
            }
            Err(error) => Err(error),
        }
    }

    /// The manifests of all images. One that cannot be read stops whoever would conclude from them what is unused.
    fn manifests(&self) -> Result<Vec<ImageManifest>, StoreError> {
        let keys = list::<ImageKey>(&self.root.join("images"), "")?;
        let manifests = keys.into_iter().map(|key| self.manifest(key));
        // A folder without manifest is an image that was being removed.
        manifests.filter(|manifest| !matches!(manifest, Err(StoreError::NoImage { .. }))).collect()
    }

    fn disks(&self) -> Result<Vec<DiskManifest>, StoreError> {
        list::<DiskId>(&self.root.join("disks"), ".json")?.into_iter().map(|disk| self.disk(disk)).collect()
    }

    /// Removes those of `layers` that no manifest names any more. While a manifest cannot be read, all are kept.
    fn release(&self, layers: &[LayerId]) -> Result<(), StoreError> {
        if layers.is_empty() {
            return Ok(());
        }
        match self.named() {
            Ok(named) => {
                let mut unused = layers.iter().filter(|layer| !named.contains(layer));
                unused.try_for_each(|layer| remove_folder(&layer_folder(&self.root, *layer)))
            }
            Err(error) => {
                let cause = assay_service::error::chain(&error);
                tracing::error!(event = "store.manifest_unreadable", cause, "layers that may be unused are kept");
                Ok(())
            }
        }
    }

    /// The layers that some manifest names.
    fn named(&self) -> Result<BTreeSet<LayerId>, StoreError> {
        let mut named = BTreeSet::new();
        for disk in self.disks()? {
            named.extend(disk.chain.layers);
            named.insert(disk.top);
        }
        for image in self.manifests()? {
            named.extend(image.chain().layers);
        }
        Ok(named)
    }

    /// An empty top on `chain`, for a manifest that is yet to name it.
    fn new_top(&self, byte_len: u64) -> Result<LayerId, StoreError> {
        let top = LayerId::random();
        Overlay::create(&layer_folder(&self.root, top), byte_len)?;
        Ok(top)
    }

    /// Puts a disk's manifest in place. If that fails, its top goes.
    fn put_disk(&self, disk: &DiskManifest, new_top: bool) -> Result<(), StoreError> {
        let put = manifest::replace(&disk_manifest(&self.root, disk.disk), disk);
        if put.is_err() && new_top {
            // Swept up at the next start, if it cannot be removed now.
            let _ = remove_folder(&layer_folder(&self.root, disk.top));
        }
        put
    }

    /// Publishes an image that has nothing but a manifest.
    fn put_snapshot(&self, manifest: &ImageManifest) -> Result<(), StoreError> {
        let folder = self.image_folder(manifest.key);
        std::fs::create_dir_all(&folder).map_err(|source| StoreError::io("making", &folder, source))?;
        manifest::replace(&folder.join(IMAGE_MANIFEST), manifest)?;
        sync(&self.root.join("images"))
    }

    fn import_folder(&self, image: ImageKey) -> PathBuf {
        self.root.join("images").join(format!("{IMPORT_PREFIX}{image}"))
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ImageStore for LocalStore {
    fn images(&self) -> Result<Vec<StoredImage>, StoreError> {
        let mut images = Vec::new();
        for key in list::<ImageKey>(&self.root.join("images"), "")? {
            match self.manifest(key) {
                Ok(manifest) => images.push(stored(manifest)),
                Err(StoreError::NoImage { .. }) => {}
                Err(error) => {
                    tracing::warn!(event = "image.skipped", image = %key, error = %error, "image cannot be read");
                }
            }
        }
        Ok(images)
    }

    fn image(&self, image: ImageKey) -> Result<StoredImage, StoreError> {
        self.manifest(image).map(stored)
    }

    fn import(
        &self,
        image: ImageKey,
        _project: &ProjectId,
        content: &dyn Content,
        progress: Progress<'_>,
    ) -> Result<StoredImage, StoreError> {
        match self.manifest(image) {
            Err(StoreError::NoImage { .. }) => {}
            found => return found.map(stored),
        }
        let staged = self.import_folder(image);
        std::fs::create_dir_all(&staged).map_err(|source| StoreError::io("making", &staged, source))?;
        let copied = match import::copy(&staged, content, progress) {
            Err(error) if content.identity().is_none() => {
                remove_folder(&staged)?;
                return Err(error);
            }
            copied => copied?,
        };
        fail::fail_point!("store::import::copied", |_| std::process::abort());
        let golden = ImageContent::Golden { sha256: copied.sha256, root: copied.root };
        let manifest = ImageManifest::new(image, content.virtual_bytes(), copied.data_bytes, golden);
        manifest::replace(&staged.join(IMAGE_MANIFEST), &manifest)?;
        fail::fail_point!("store::import::described", |_| std::process::abort());
        let place = self.image_folder(image);
        // What a removal left there has no manifest.
        remove_folder(&place)?;
        std::fs::rename(&staged, &place).map_err(|source| StoreError::io("putting in place", &place, source))?;
        sync(&self.root.join("images"))?;
        fail::fail_point!("store::import::published", |_| std::process::abort());
        Ok(stored(manifest))
    }

    fn forget_imports(&self, keep: &[ImageKey]) -> Result<(), StoreError> {
        let folder = self.root.join("images");
        for name in names(&folder)? {
            let Some(key) = name.strip_prefix(IMPORT_PREFIX) else { continue };
            if !keep.iter().any(|keep| keep.to_string() == key) {
                remove_folder(&folder.join(&name))?;
            }
        }
        Ok(())
    }

    fn open_image(&self, image: ImageKey) -> Result<Arc<dyn BlockDevice>, StoreError> {
        // Not while its layers may be going.
        let lower = {
            let _alone = self.change();
            Lower::open(&self.root, &self.manifest(image)?.chain())?
        };
        lower.into_device()
    }

    fn remove_image(&self, image: ImageKey) -> Result<(), StoreError> {
        let _alone = self.change();
        remove_folder(&self.import_folder(image))?;
        let manifest = match self.manifest(image) {
            Ok(manifest) => manifest,
            Err(StoreError::NoImage { .. }) => return remove_folder(&self.image_folder(image)),
            Err(error) => return Err(error),
        };
        let dependents = self.dependents(image)?;
        if !dependents.is_empty() {
            return Err(StoreError::HasDependents { image, dependents });
        }
        let (folder, layers) = (self.image_folder(image), manifest.chain().layers);
        let path = folder.join(IMAGE_MANIFEST);
        std::fs::remove_file(&path).map_err(|source| StoreError::io("removing", &path, source))?;
        sync(&folder)?;
        fail::fail_point!("store::remove-image::unnamed", |_| std::process::abort());
        remove_folder(&folder)?;
        self.release(&layers)
    }

    fn snapshot(&self, disk: DiskId, image: ImageKey) -> Result<(), StoreError> {
        let _alone = self.change();
        match self.manifest(image) {
            Err(StoreError::NoImage { .. }) => {}
            found => return found.map(drop),
        }
        let was = self.disk(disk)?;
        let folder = layer_folder(&self.root, was.top);
        // Locked until the end, and flushed: nobody writes to it any more.
        let lower = Lower::open(&self.root, &was.chain)?.into_device()?;
        let top = Overlay::from_files(TopFiles::open(&folder)?, lower, self.boot)?;
        let virtual_bytes = top.byte_len();
        let (chain, data_bytes) = if top.is_untouched() {
            (was.chain, 0)
        } else {
            if was.chain.layers.len() >= MAX_LAYERS {
                return Err(StoreError::ChainTooLong { disk, layers: was.chain.layers.len() });
            }
            top.flush()?;
            let mut chain = was.chain;
            chain.layers.push(was.top);
            let new_top = self.new_top(virtual_bytes)?;
            fail::fail_point!("store::snapshot::new-top", |_| std::process::abort());
            // The disk first: an image must never name a layer that is still written to.
            let now = DiskManifest::new(disk, was.project, was.image, chain.clone(), new_top);
            self.put_disk(&now, true)?;
            fail::fail_point!("store::snapshot::frozen", |_| std::process::abort());
            (chain, Overlay::allocated_bytes(&folder)?)
        };
        let content = ImageContent::Snapshot { parent: was.image, chain };
        let manifest = ImageManifest::new(image, virtual_bytes, data_bytes, content);
        self.put_snapshot(&manifest)?;
        fail::fail_point!("store::snapshot::published", |_| std::process::abort());
        Ok(())
    }

    fn flatten(&self, image: ImageKey, progress: Progress<'_>) -> Result<StoredImage, StoreError> {
        let was = self.manifest(image)?;
        let ImageContent::Snapshot { chain, .. } = &was.content else { return Ok(stored(was)) };
        let merged = Merged(self.open_image(image)?);
        let folder = self.image_folder(image);
        let copied = import::copy(&folder, &merged, progress)?;
        fail::fail_point!("store::flatten::copied", |_| std::process::abort());
        let golden = ImageContent::Golden { sha256: copied.sha256, root: copied.root };
        let manifest = ImageManifest::new(image, was.virtual_bytes, copied.data_bytes, golden);
        let _alone = self.change();
        manifest::replace(&folder.join(IMAGE_MANIFEST), &manifest)?;
        fail::fail_point!("store::flatten::published", |_| std::process::abort());
        self.release(&chain.layers)?;
        Ok(stored(manifest))
    }

    fn create_disk(&self, disk: DiskId, project: &ProjectId, image: ImageKey) -> Result<(), StoreError> {
        let top = self.new_top(self.manifest(image)?.virtual_bytes)?;
        fail::fail_point!("store::create-disk::new-top", |_| std::process::abort());
        let _alone = self.change();
        if self.disk(disk).is_ok() {
            return remove_folder(&layer_folder(&self.root, top));
        }
        // Anew: the image may have been removed or flattened meanwhile.
        let created = self.manifest(image).and_then(|manifest| {
            let disk = DiskManifest::new(disk, project.clone(), image, manifest.chain(), top);
            self.put_disk(&disk, false)
        });
        if created.is_err() {
            remove_folder(&layer_folder(&self.root, top))?;
        }
        created?;
        fail::fail_point!("store::create-disk::published", |_| std::process::abort());
        Ok(())
    }

    fn restore(&self, disk: DiskId, image: ImageKey) -> Result<(), StoreError> {
        let _alone = self.change();
        let (was, manifest) = (self.disk(disk)?, self.manifest(image)?);
        let held = TopFiles::open(&layer_folder(&self.root, was.top))?;
        let path = &held.name;
        let disk_bytes =
            held.data.metadata().map_err(|source| StoreError::io("reading the size of", path, source))?.len();
        if disk_bytes != manifest.virtual_bytes {
            return Err(StoreError::SizesDiffer { disk, disk_bytes, image, image_bytes: manifest.virtual_bytes });
        }
        let top = self.new_top(disk_bytes)?;
        fail::fail_point!("store::restore::new-top", |_| std::process::abort());
        self.put_disk(&DiskManifest::new(disk, was.project, image, manifest.chain(), top), true)?;
        fail::fail_point!("store::restore::published", |_| std::process::abort());
        let mut layers = was.chain.layers;
        layers.push(was.top);
        self.release(&layers)
    }

    fn open_disk(&self, disk: DiskId) -> Result<Arc<dyn BlockDevice>, StoreError> {
        self.disk(disk)?;
        Ok(Arc::new(Overlay::open(DiskFiles::open(&self.root, disk)?, self.boot)?))
    }

    fn remove_disk(&self, disk: DiskId) -> Result<(), StoreError> {
        let _alone = self.change();
        let manifest = match self.disk(disk) {
            Ok(manifest) => manifest,
            Err(StoreError::NoDisk { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        let top = layer_folder(&self.root, manifest.top);
        let _held = match TopFiles::open(&top) {
            // A disk whose files are lost can be removed all the same.
            Err(StoreError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => None,
            held => Some(held?),
        };
        let path = disk_manifest(&self.root, disk);
        std::fs::remove_file(&path).map_err(|source| StoreError::io("removing", &path, source))?;
        sync(&self.root.join("disks"))?;
        fail::fail_point!("store::remove-disk::unnamed", |_| std::process::abort());
        remove_folder(&top)?;
        self.release(&manifest.chain.layers)
    }

    fn disk_bytes(&self, disk: DiskId) -> Result<u64, StoreError> {
        Overlay::allocated_bytes(&self.top_folder(disk)?)
    }

    fn moves_disks(&self) -> bool {
        false
    }

    fn location(&self, disk: DiskId, _admission: AdmissionId) -> Result<DiskLocation, StoreError> {
        let golden = self.disk(disk)?.chain.golden;
        match self.image(golden)?.kind {
            StoredKind::Golden { root, .. } => Ok(DiskLocation { golden, root, upper: Upper::Files }),
            StoredKind::Snapshot { .. } => {
                let detail = "is not a golden image's, and disks stand on it".to_owned();
                Err(StoreError::malformed(&self.image_folder(golden).join(IMAGE_MANIFEST), detail))
            }
        }
    }

    fn revoke(&self, _disk: DiskId, _admission: AdmissionId) -> Result<(), StoreError> {
        Ok(())
    }
}

impl LocalStore {
    fn dependents(&self, image: ImageKey) -> Result<Vec<Dependent>, StoreError> {
        let reads = |chain: &Chain| chain.golden == image;
        let disks = self.disks()?.into_iter().filter(|disk| disk.image == image || reads(&disk.chain));
        let mut dependents: Vec<Dependent> = disks.map(|disk| Dependent::Disk(disk.disk)).collect();
        for other in self.manifests()? {
            if let ImageContent::Snapshot { parent, chain } = &other.content
                && (*parent == image || reads(chain))
            {
                dependents.push(Dependent::Image(other.key));
            }
        }
        dependents.sort();
        Ok(dependents)
    }
}

fn stored(manifest: ImageManifest) -> StoredImage {
    let kind = match manifest.content {
        ImageContent::Golden { sha256, root } => StoredKind::Golden { sha256, root },
        ImageContent::Snapshot { parent, .. } => StoredKind::Snapshot { parent },
    };
    StoredImage { key: manifest.key, virtual_bytes: manifest.virtual_bytes, data_bytes: manifest.data_bytes, kind }
}
