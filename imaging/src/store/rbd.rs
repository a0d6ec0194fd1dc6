//! The store on Ceph: images, snapshots and disks in a pool, a namespace per project (the crate `assay-rbd` has the steps),
//! and on this host whatever golden images were read here.
//!
//! ```text
//! <store>/lock                 locked (`flock`) by the imaging service that owns the store
//! <store>/golden/              see [`super::cache`]
//! ```
//!
//! Ceph has no digests of its own that anybody outside it knows. So an import writes the image's SHA-256 and the root of its
//! hash tree beside the image, imaging's records have the same, and whoever reads a golden image reads the file on this
//! host, which was checked against that root. What a node's first write into an object copies up from its parent comes from
//! Ceph, unchecked.
//!
//! An import that was broken off goes on: the file that it was writing on this host stays, with how much of it was written to
//! Ceph, too, and to which image there. That much is read from the file again, for the digests, and sent no more. Space of
//! what was removed comes back a little later, by a thread of the store's.

mod device;
mod sweeper;

use super::cache::{GoldenCache, Recorded, Staged};
use super::folder::lock;
use super::golden::GoldenImage;
use super::import::Merged;
use super::manifest::hex_hash;
use super::merkle::Hash;
use super::{
    BlockDevice, Content, Dependent, DiskLocation, ImageStore, Progress, RbdClone, StoreError, StoredImage, StoredKind,
    Upper,
};
use assay_rbd::keys::EXPORT_USERS;
use assay_rbd::name::{CephUser, ImageKind, ImageName, ImageObjectId, Namespace, PoolName};
use assay_rbd::store::{self as ceph, Below, RbdStore, Source};
use assay_rbd::{CloneDisk, Cluster, Connection, Image, RbdError};
use assay_wire::id::{AdmissionId, DiskId, ImageKey, ProjectId};
use device::CloneDevice;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use sweeper::Sweeper;

/// The store, owned by this process.
#[derive(Debug)]
pub struct RbdImageStore {
    store: Arc<RbdStore>,
    monitors: Vec<SocketAddr>,
    cache: GoldenCache,
    sweeper: Sweeper,
    _lock: File,
}

/// What is written down beside a golden image.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    sha256: String,
    #[serde(with = "hex_hash")]
    root: Hash,
    data_bytes: u64,
}

impl RbdImageStore {
    /// Opens the store in `pool` of the cluster that `connection` leads to, with the folder `root` on this host; completes or
    /// undoes what was interrupted, and stops whoever had the store before.
    ///
    /// # Errors
    /// Another process of this host owns it, the file system refuses, or Ceph does.
    pub fn open(root: &Path, connection: &Connection, pool: PoolName) -> Result<Self, StoreError> {
        std::fs::create_dir_all(root).map_err(|source| StoreError::io("making", root, source))?;
        let _lock = lock(root)?;
        let store = Arc::new(RbdStore::open(Cluster::connect(connection)?, pool)?);
        let there: HashSet<ImageKey> = store.names().into_iter().filter_map(key_of).collect();
        let cache = GoldenCache::open(root, &there)?;
        let sweeper = Sweeper::start(Arc::clone(&store))
            .map_err(|source| StoreError::io("starting the thread that gives back the space of", root, source))?;
        Ok(Self { store, monitors: connection.monitors.clone(), cache, sweeper, _lock })
    }

    /// An image's name, if it is there.
    fn there(&self, image: ImageKey) -> Result<ImageName, StoreError> {
        let name = image_name(image);
        self.store.place(name).map(|_| name).map_err(|_| StoreError::NoImage { image })
    }

    /// A disk's name, if it is there.
    fn disk_there(&self, disk: DiskId) -> Result<ImageName, StoreError> {
        let name = disk_name(disk);
        self.store.place(name).map(|_| name).map_err(|_| StoreError::NoDisk { disk })
    }

    /// What is on record of a golden image.
    fn recorded(&self, image: ImageKey) -> Result<Recorded, StoreError> {
        let StoredImage { virtual_bytes, kind, .. } = self.image(image)?;
        match kind {
            StoredKind::Golden { root, .. } => Ok(Recorded { image, byte_len: virtual_bytes, root }),
            StoredKind::Snapshot { .. } => {
                Err(malformed(&image_name(image), "is no golden image, and disks stand on it".to_owned()))
            }
        }
    }

    /// A golden image as this host has it, after it has it.
    fn golden(&self, image: ImageKey) -> Result<GoldenImage, StoreError> {
        self.cache.get(&self.recorded(image)?, || self.on_ceph(image))
    }

    fn on_ceph(&self, image: ImageKey) -> Result<OnCeph, StoreError> {
        Ok(OnCeph { image: self.store.open_image(image_name(image))?, key: image })
    }

    /// A disk or a snapshot, which `open` opens, over the golden image at its bottom.
    fn layered(
        &self,
        name: ImageName,
        open: impl FnOnce() -> Result<Image, StoreError>,
    ) -> Result<Arc<dyn BlockDevice>, StoreError> {
        let reader = self.sweeper.reader();
        let open = open()?;
        let Below { layers, golden } = self.store.below(&open)?;
        let Some(golden) = golden.and_then(key_of) else {
            return Err(malformed(&name, "stands on no golden image".to_owned()));
        };
        let golden = self.golden(golden)?;
        let disk = CloneDisk::over(&self.store.place(name)?, open, &layers, golden)?;
        Ok(Arc::new(CloneDevice::new(disk, reader)))
    }

    /// Has Ceph take `content` in by what `make` does with a source, and keeps a copy of it on this host. With an identity, what
    /// is broken off can be gone on with.
    fn take_in(
        &self,
        image: ImageKey,
        (content, identity): (&dyn Content, Option<String>),
        make: impl FnOnce(&mut dyn Source) -> Result<ceph::StoredImage, RbdError>,
    ) -> Result<StoredImage, StoreError> {
        let staged = self.cache.begin(image, content.virtual_bytes());
        let mut source = Streamed { content, identity, staged, known: 0, failed: None };
        let made = make(&mut source);
        if let Some(failed) = source.failed.take() {
            return Err(failed);
        }
        let made = match made {
            Err(RbdError::BrokenOff { .. }) => return Err(StoreError::Cancelled),
            made => made?,
        };
        fail::fail_point!("store::rbd::taken-in", |_| std::process::abort());
        self.cache.keep(&source.staged, image)?;
        stored(&made)
    }
}

impl ImageStore for RbdImageStore {
    fn images(&self) -> Result<Vec<StoredImage>, StoreError> {
        let mut images = Vec::new();
        for image in self.store.images()? {
            match stored(&image) {
                Ok(image) => images.push(image),
                Err(error) => {
                    tracing::warn!(event = "image.skipped", image = %image.name, %error, "image cannot be read");
                }
            }
        }
        Ok(images)
    }

    fn image(&self, image: ImageKey) -> Result<StoredImage, StoreError> {
        match self.store.image(self.there(image)?) {
            Err(error) if error.is_not_found() => Err(StoreError::NoImage { image }),
            found => stored(&found?),
        }
    }

    fn import(
        &self,
        image: ImageKey,
        project: &ProjectId,
        content: &dyn Content,
        progress: Progress<'_>,
    ) -> Result<StoredImage, StoreError> {
        match self.image(image) {
            Err(StoreError::NoImage { .. }) => {}
            found => return found,
        }
        let namespace = namespace(project)?;
        let from = (content, content.identity());
        self.take_in(image, from, |source| self.store.import(image_name(image), &namespace, source, progress))
    }

    fn forget_imports(&self, keep: &[ImageKey]) -> Result<(), StoreError> {
        self.cache.forget_imports(keep)?;
        let keep: Vec<ImageName> = keep.iter().copied().map(image_name).collect();
        self.store.forget_imports(&keep)?;
        self.sweeper.wake();
        Ok(())
    }

    fn open_image(&self, image: ImageKey) -> Result<Arc<dyn BlockDevice>, StoreError> {
        match self.image(image)?.kind {
            StoredKind::Golden { .. } => Ok(Arc::new(self.golden(image)?)),
            StoredKind::Snapshot { .. } => {
                let name = image_name(image);
                self.layered(name, || Ok(self.store.open_image(name)?))
            }
        }
    }

    fn remove_image(&self, image: ImageKey) -> Result<(), StoreError> {
        match self.store.remove_image(image_name(image)) {
            Err(RbdError::HasChildren { object, children }) => {
                let mut dependents: Vec<Dependent> =
                    children.iter().filter_map(|child| dependent(&child.name)).collect();
                if dependents.is_empty() {
                    // Clones that are none of ours.
                    return Err(RbdError::HasChildren { object, children }.into());
                }
                dependents.sort();
                return Err(StoreError::HasDependents { image, dependents });
            }
            removed => removed?,
        }
        fail::fail_point!("store::remove-image::unnamed", |_| std::process::abort());
        self.cache.evict(image)?;
        self.sweeper.wake();
        Ok(())
    }

    fn snapshot(&self, disk: DiskId, image: ImageKey) -> Result<(), StoreError> {
        // Of an image that is there already, whether its disk is there again is for the store to see.
        let name = if self.there(image).is_ok() { disk_name(disk) } else { self.disk_there(disk)? };
        match self.store.snapshot(name, image_name(image)) {
            Err(RbdError::ChainTooLong { layers, .. }) => Err(StoreError::ChainTooLong { disk, layers }),
            taken => taken.map_err(in_use),
        }
    }

    fn flatten(&self, image: ImageKey, progress: Progress<'_>) -> Result<StoredImage, StoreError> {
        let was = self.image(image)?;
        if matches!(was.kind, StoredKind::Golden { .. }) {
            return Ok(was);
        }
        let merged = Merged(self.open_image(image)?);
        let flat =
            self.take_in(image, (&merged, None), |source| self.store.flatten(image_name(image), source, progress))?;
        self.sweeper.wake();
        Ok(flat)
    }

    fn create_disk(&self, disk: DiskId, project: &ProjectId, image: ImageKey) -> Result<(), StoreError> {
        let from = self.there(image)?;
        match self.store.create_disk(disk_name(disk), &namespace(project)?, from) {
            Err(error) if error.is_not_found() && self.there(image).is_err() => {
                return Err(StoreError::NoImage { image });
            }
            created => created?,
        }
        fail::fail_point!("store::rbd::cloned", |_| std::process::abort());
        Ok(())
    }

    fn restore(&self, disk: DiskId, image: ImageKey) -> Result<(), StoreError> {
        let (name, from) = (self.disk_there(disk)?, self.there(image)?);
        let (disk_bytes, image_bytes) = (self.store.byte_len(name)?, self.store.byte_len(from)?);
        if disk_bytes != image_bytes {
            return Err(StoreError::SizesDiffer { disk, disk_bytes, image, image_bytes });
        }
        self.store.restore(name, from).map_err(in_use)?;
        fail::fail_point!("store::rbd::restored", |_| std::process::abort());
        self.sweeper.wake();
        Ok(())
    }

    fn open_disk(&self, disk: DiskId) -> Result<Arc<dyn BlockDevice>, StoreError> {
        let name = self.disk_there(disk)?;
        self.layered(name, || self.store.open_disk(name).map_err(in_use))
    }

    fn remove_disk(&self, disk: DiskId) -> Result<(), StoreError> {
        self.store.remove_disk(disk_name(disk)).map_err(in_use)?;
        self.sweeper.wake();
        Ok(())
    }

    fn disk_bytes(&self, disk: DiskId) -> Result<u64, StoreError> {
        Ok(self.store.disk_bytes(self.disk_there(disk)?)?)
    }

    /// The disk becomes the image, and is a clone of it then.
    fn moves_disks(&self) -> bool {
        true
    }

    fn location(&self, disk: DiskId, admission: AdmissionId) -> Result<DiskLocation, StoreError> {
        let name = self.disk_there(disk)?;
        let access = self.store.access(name)?;
        let Some(golden) = key_of(access.golden) else {
            return Err(malformed(&name, "stands on no golden image".to_owned()));
        };
        // Before there is a key: it takes as long as reading all of the image, once on this host.
        let recorded = self.recorded(golden)?;
        self.cache.have(&recorded, || self.on_ceph(golden))?;
        let user = user(admission)?;
        let (key, access) = self.store.issue(name, &user)?;
        let layers = access.scope.layers();
        let clone = RbdClone {
            monitors: self.monitors.clone(),
            user,
            key,
            pool: access.scope.pool,
            namespace: access.scope.namespace,
            image: name,
            layers,
            byte_len: access.byte_len,
        };
        Ok(DiskLocation { golden, root: recorded.root, upper: Upper::Rbd(Box::new(clone)) })
    }

    fn revoke(&self, disk: DiskId, admission: AdmissionId) -> Result<(), StoreError> {
        Ok(self.store.revoke(disk_name(disk), &user(admission)?)?)
    }
}

/// Content on its way to Ceph, and to a file of this host.
struct Streamed<'a> {
    content: &'a dyn Content,
    /// Of what can be gone on with.
    identity: Option<String>,
    staged: Staged,
    /// So much is in the file, and on Ceph, from an earlier attempt.
    known: u64,
    /// Why it failed, where that was on this side.
    failed: Option<StoreError>,
}

impl Streamed<'_> {
    fn fail(&mut self, error: StoreError) -> io::Error {
        self.failed.get_or_insert(error);
        io::Error::other("the source cannot be read")
    }

    /// What is gone on with is this content, in that very image: another of its name may have been made since.
    fn identity_in(&self, image: &ImageObjectId) -> Option<String> {
        self.identity.as_ref().map(|identity| format!("{image}\n{identity}"))
    }
}

impl Source for Streamed<'_> {
    fn byte_len(&self) -> u64 {
        self.content.virtual_bytes()
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let read = if offset < self.known {
            self.staged.push_again(buffer)
        } else {
            self.content.read(offset, buffer).and_then(|()| self.staged.push(buffer))
        };
        read.map_err(|error| self.fail(error))
    }

    fn can_go_on(&self) -> bool {
        self.identity.is_some()
    }

    fn known(&mut self, image: &ImageObjectId) -> io::Result<Option<u64>> {
        let Some(identity) = self.identity_in(image) else { return Ok(None) };
        let known = self.staged.go_on(&identity).map_err(|error| self.fail(error))?;
        self.known = known.unwrap_or(0);
        Ok(known)
    }

    fn written(&mut self, image: &ImageObjectId, offset: u64, last: bool) -> io::Result<()> {
        let Some(identity) = self.identity_in(image) else { return Ok(()) };
        self.staged.checkpoint(&identity, offset, last).map_err(|error| self.fail(error))
    }

    fn description(&mut self) -> io::Result<Option<String>> {
        let described = match self.staged.finish() {
            Ok(copied) => copied.map(|copied| Description {
                sha256: copied.sha256.clone(),
                root: copied.root,
                data_bytes: copied.data_bytes,
            }),
            Err(error) => return Err(self.fail(error)),
        };
        Ok(described.as_ref().map(serde_json::to_string).transpose()?)
    }
}

/// An image as Ceph has it, unchecked.
struct OnCeph {
    image: Image,
    key: ImageKey,
}

impl Content for OnCeph {
    fn virtual_bytes(&self) -> u64 {
        self.image.byte_len()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        Ok(self.image.read_at(offset, buffer)?)
    }

    fn identity(&self) -> Option<String> {
        Some(format!("image {}", self.key))
    }
}

fn stored(image: &ceph::StoredImage) -> Result<StoredImage, StoreError> {
    let Some(key) = key_of(image.name) else {
        return Err(malformed(&image.name, "is no image's name".to_owned()));
    };
    let (data_bytes, kind) = match &image.kind {
        ceph::StoredKind::Golden { description } => {
            let text = description.as_deref().unwrap_or_default();
            let Description { sha256, root, data_bytes } = serde_json::from_str(text).map_err(|cause| {
                malformed(&image.name, format!("says nothing of itself that we understand: {cause}"))
            })?;
            (data_bytes, StoredKind::Golden { sha256, root })
        }
        ceph::StoredKind::Snapshot { parent, own_bytes } => {
            let parent = key_of(*parent).ok_or_else(|| malformed(&image.name, format!("is of a clone of {parent}")))?;
            (*own_bytes, StoredKind::Snapshot { parent })
        }
    };
    Ok(StoredImage { key, virtual_bytes: image.byte_len, data_bytes, kind })
}

fn image_name(image: ImageKey) -> ImageName {
    ImageName::numbered(ImageKind::Golden, u128::from_be_bytes(*image.as_bytes()))
}

fn disk_name(disk: DiskId) -> ImageName {
    ImageName::numbered(ImageKind::Disk, u128::from_be_bytes(*disk.as_bytes()))
}

fn key_of(name: ImageName) -> Option<ImageKey> {
    id_of(name, ImageKind::Golden)
}

fn id_of<T: FromStr>(name: ImageName, kind: ImageKind) -> Option<T> {
    let number = uuid::Uuid::from_u128(name.number());
    if name.kind() == kind { number.to_string().parse().ok() } else { None }
}

fn dependent(name: &str) -> Option<Dependent> {
    let name = ImageName::parse(name)?;
    key_of(name).map(Dependent::Image).or_else(|| id_of(name, ImageKind::Disk).map(Dependent::Disk))
}

/// A project's own: names of projects are names of namespaces as they are.
fn namespace(project: &ProjectId) -> Result<Namespace, StoreError> {
    Namespace::new(project.as_str()).map_err(|cause| malformed(project, cause.to_string()))
}

/// The user whose key an admission has.
fn user(admission: AdmissionId) -> Result<CephUser, StoreError> {
    CephUser::new(&format!("{EXPORT_USERS}{admission}")).map_err(|cause| malformed(&admission, cause.to_string()))
}

fn malformed(what: &dyn std::fmt::Display, detail: String) -> StoreError {
    StoreError::malformed(&PathBuf::from(what.to_string()), detail)
}

/// Sorts out what the callers of a disk's operations are told apart.
fn in_use(error: RbdError) -> StoreError {
    match error {
        RbdError::InUse { object, clients } => {
            tracing::info!(event = "disk.in_use", disk = object, clients = ?clients, "somebody may be writing to it");
            StoreError::InUse { path: object.into() }
        }
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_project_has_a_namespace_by_its_own_name(name in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?") {
            let project: ProjectId = name.parse().unwrap();
            let namespace = namespace(&project).unwrap();
            prop_assert_eq!(namespace.as_str(), project.as_str());
        }
    }

    #[test]
    fn names_lead_back_to_what_they_name() {
        let (image, disk) = (ImageKey::random(), DiskId::random());
        assert_eq!(key_of(image_name(image)), Some(image));
        assert_eq!(key_of(disk_name(disk)), None);
        assert_eq!(dependent(&image_name(image).to_string()), Some(Dependent::Image(image)));
        assert_eq!(dependent(&disk_name(disk).to_string()), Some(Dependent::Disk(disk)));
        assert_eq!(dependent("somebody-else's"), None);
        user(AdmissionId::random()).unwrap();
    }
}
