//! Golden images and disks in a pool: a namespace per project, and steps that a crash may interrupt anywhere.
//!
//! | what | is there, whole, once |
//! |---|---|
//! | an image | it has its snapshot (`golden`): made last, removed first |
//! | a disk | its metadata say that it was made (`assay.made`): written last |
//!
//! What a crash left is completed or undone by [`RbdStore::open`], or by asking for the same again; an import that can go on
//! waits for that, or for [`RbdStore::forget_imports`]. A snapshot of a disk
//! takes constant time: the disk's image *becomes* the snapshot, and the disk a clone of it. So an image that was a disk is
//! never written again, and whoever may read it for its clone's sake reads no running disk.
//!
//! What a disk is a clone of is `lineage`'s to say, who has keys to it `access`'s, and how an image is filled `import`'s.

mod access;
mod import;
mod lineage;
mod notes;

pub use access::Access;
pub use import::Source;
pub use lineage::Below;

use crate::keys::{self, Release};
use crate::name::{ImageKind, ImageName, ImageObjectId, Namespace, PoolName, SnapshotName};
use crate::{Cluster, DEFAULT_OBJECT_ORDER, Image, Pool, RbdError};
use lineage::{Ancestors, MOST_LAYERS, Taking, check_size, made_from};
use std::collections::HashMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

/// The snapshot that makes an image an image, and that disks are clones of.
const BASE: &str = "golden";
/// Metadata of a disk: its own name. (librbd copies a parent's metadata to its clones.)
const MADE: &str = "assay.made";
/// The object, in the pool's default namespace, that says which client has the store.
const OWNER: &str = "assay.owner";
/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// Its name.
    pub name: ImageName,
    /// Whose it is.
    pub namespace: Namespace,
    /// Size of the disk.
    pub byte_len: u64,
    /// How it came to be.
    pub kind: StoredKind,
}

/// How an image came to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredKind {
    /// By an import: all of it is its own.
    Golden {
        /// What its source said of it.
        description: Option<String>,
    },
    /// As what a disk held.
    Snapshot {
        /// The image that the disk was made from.
        parent: ImageName,
        /// Octets of its own objects, of which the last of a run may be partly empty.
        own_bytes: u64,
    },
}

/// The images and disks of a pool. One process has it at a time.
#[derive(Debug)]
pub struct RbdStore {
    cluster: Cluster,
    pool: PoolName,
    places: Mutex<HashMap<ImageName, Pool>>,
    /// Imports that were broken off and can be gone on with.
    unfinished: Mutex<HashMap<ImageName, Pool>>,
    /// Those that were made, or found, by this process.
    namespaces: Mutex<HashMap<Namespace, Pool>>,
    /// Held for reading while a clone is made, and for writing while an image is removed.
    clones: RwLock<()>,
    /// Held while a note is changed.
    notes: Mutex<()>,
}

impl RbdStore {
    /// Opens the store in a pool, and completes or undoes what was interrupted. Whoever had it open before is stopped: two
    /// would undo each other's work, and a dead one's watches would keep images in use for half a minute.
    ///
    /// # Errors
    /// The cluster is of a release that is not known, or refuses.
    pub fn open(cluster: Cluster, pool: PoolName) -> Result<Self, RbdError> {
        Release::of(&cluster)?;
        let root = cluster.pool(&pool)?;
        let address = cluster.address()?;
        if let Some(before) = root.read_note(OWNER)?.filter(|before| *before != address) {
            keys::blocklist(&cluster, &before)?;
            cluster.wait_for_latest_map()?;
        }
        root.write_note(OWNER, &address)?;
        let store = Self {
            cluster,
            pool,
            places: Mutex::default(),
            unfinished: Mutex::default(),
            namespaces: Mutex::default(),
            clones: RwLock::default(),
            notes: Mutex::default(),
        };
        let namespaces = root.namespaces()?.into_iter().map(|name| store.cluster.namespace(&store.pool, &name));
        let namespaces: Vec<Pool> = namespaces.collect::<Result<_, _>>()?;
        for namespace in &namespaces {
            let images = namespace.images()?;
            store.places().extend(images.into_iter().map(|(name, _)| (name, namespace.clone())));
        }
        for namespace in &namespaces {
            store.recover(namespace)?;
        }
        Ok(store)
    }

    /// Every image that is there whole. One that cannot be read is left out.
    ///
    /// # Errors
    /// Ceph does not answer.
    pub fn images(&self) -> Result<Vec<StoredImage>, RbdError> {
        let mut images = Vec::new();
        for name in self.names().into_iter().filter(|name| name.kind() == ImageKind::Golden) {
            match self.image(name) {
                Ok(image) => images.push(image),
                Err(error) if error.is_no_answer() => return Err(error),
                Err(error) if error.is_not_found() => {}
                Err(error) => tracing::warn!(event = "image.skipped", image = %name, error = ?error, "cannot be read"),
            }
        }
        Ok(images)
    }

    /// The names of all images and disks that are there.
    #[must_use]
    pub fn names(&self) -> Vec<ImageName> {
        self.places().keys().copied().collect()
    }

    /// One of the images.
    ///
    /// # Errors
    /// It is not there, or Ceph refuses.
    pub fn image(&self, image: ImageName) -> Result<StoredImage, RbdError> {
        let pool = self.place(image)?;
        let open = self.open_image(image)?;
        let kind = match made_from(open.id()?, Ancestors::of(self, &open)?)? {
            None => StoredKind::Golden { description: open.metadata(import::DESCRIPTION)? },
            Some(parent) => StoredKind::Snapshot { parent, own_bytes: counted(&pool, &open)? },
        };
        Ok(StoredImage { name: image, namespace: namespace_of(&pool)?, byte_len: open.byte_len(), kind })
    }

    /// An image's content.
    ///
    /// # Errors
    /// It is not there whole, or Ceph refuses.
    pub fn open_image(&self, image: ImageName) -> Result<Image, RbdError> {
        let pool = self.place(image)?;
        pool.open_read_only(image, Some(&self.base(image)?))
    }

    /// Removes an image, or what a broken import left of it. One that is not there is no error. The disk that it is a snapshot
    /// of may read it still: then it waits in the trash. Its space comes back with [`RbdStore::sweep`].
    ///
    /// # Errors
    /// Others read it, and are named; or Ceph refuses.
    pub fn remove_image(&self, image: ImageName) -> Result<(), RbdError> {
        let unfinished = self.unfinished().get(&image).cloned();
        if let Some(pool) = unfinished {
            pool.trash_image(image)?;
            self.unfinished().remove(&image);
        }
        let Ok(pool) = self.place(image) else { return Ok(()) };
        let open = match pool.open_image(image) {
            Err(error) if error.is_not_found() => return Ok(()),
            open => open?,
        };
        if let Some(Taking::UnderWay { disk, image: becomes }) = Taking::of(&open)?
            && becomes == image
        {
            // Its disk is not there again yet, and would go with it.
            self.complete_snapshot(&pool, image, disk)?;
        }
        let _nobody_clones = self.clones.write().unwrap_or_else(PoisonError::into_inner);
        let children = self.readers(&open)?;
        if !children.is_empty() {
            return Err(RbdError::HasChildren { object: open.path().to_owned(), children });
        }
        // From here on it is no image any more.
        open.remove_snapshot(&fixed(BASE)?)?;
        drop(open);
        pool.trash_image(image)?;
        self.places().remove(&image);
        Ok(())
    }

    /// Makes an image of what a disk holds now, in constant time. One that is there whole already stays as it is. How much is
    /// the image's own is counted when it is first asked for.
    ///
    /// # Errors
    /// The disk is open or has keys, which would open the image from then on; it stands on too many layers, or has a parent
    /// that is not its own; or Ceph refuses.
    pub fn snapshot(&self, disk: ImageName, image: ImageName) -> Result<(), RbdError> {
        if let Ok(pool) = self.place(image) {
            let found = pool.open_read_only(image, Some(&self.base(image)?))?;
            return match Taking::of(&found)? {
                Some(Taking::UnderWay { disk: was, .. }) if was == disk => self.complete_snapshot(&pool, image, disk),
                Some(_) | None => Ok(()),
            };
        }
        let pool = self.place(disk)?;
        let open = self.open_disk(disk)?;
        let ancestors = Ancestors::of(self, &open)?.collect::<Result<Vec<_>, _>>()?;
        if ancestors.len() >= MOST_LAYERS {
            return Err(RbdError::ChainTooLong { object: pool.path(disk), layers: ancestors.len() });
        }
        if ancestors.is_empty() {
            let detail = "is a disk, and a clone of nothing".to_owned();
            return Err(RbdError::Malformed { object: pool.path(disk), detail });
        }
        check_size(&open, ancestors.last().map(|parent| &**parent))?;
        Taking::UnderWay { disk, image }.write(&pool.header(open.id()?, None))?;
        if !open.snapshots()?.is_empty() {
            // An earlier attempt left it: it is of another time.
            open.remove_snapshot(&fixed(BASE)?)?;
        }
        open.create_snapshot(&fixed(BASE)?)?;
        drop(open);
        pool.rename_image(disk, image)?;
        self.places().insert(image, pool.clone());
        self.complete_snapshot(&pool, image, disk)
    }

    /// Makes a snapshot an image by itself, with what `content` (its content, as [`Content`] gives it) holds and says of it.
    /// Disks that were made from it before go on as they are: what they read waits in the trash until they are gone.
    ///
    /// It is copied, not flattened in place: librbd then strikes an image off its parent's list of clones, although a
    /// snapshot of it reads the parent still, and lets the parent be removed.
    ///
    /// # Errors
    /// `progress` said so, or Ceph refuses: it is a snapshot still.
    pub fn flatten(
        &self,
        image: ImageName,
        content: &mut dyn Source,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<StoredImage, RbdError> {
        let stored = self.image(image)?;
        if matches!(stored.kind, StoredKind::Golden { .. }) {
            return Ok(stored);
        }
        let pool = self.place(image)?;
        let copy = ImageName::numbered(ImageKind::Replacement, image.number());
        self.import(copy, &stored.namespace, content, progress)?;
        let _nobody_clones = self.clones.write().unwrap_or_else(PoisonError::into_inner);
        pool.trash_image(image)?;
        self.take_place(&pool, copy, image)?;
        self.image(image)
    }

    /// The last step of [`RbdStore::flatten`].
    fn take_place(&self, pool: &Pool, copy: ImageName, image: ImageName) -> Result<(), RbdError> {
        pool.forget_name(image)?;
        pool.rename_image(copy, image)?;
        self.places().remove(&copy);
        self.places().insert(image, pool.clone());
        Ok(())
    }

    /// Makes a disk as a clone of an image, in constant time. A disk that is there whole already stays as it is.
    ///
    /// # Errors
    /// The image is not there whole, or Ceph refuses.
    pub fn create_disk(&self, disk: ImageName, namespace: &Namespace, image: ImageName) -> Result<(), RbdError> {
        let pool = self.make_place(namespace)?;
        self.clone_once(&pool, disk, image).map(drop)
    }

    /// Makes a disk hold what an image holds, in constant time, and forgets what its node wrote.
    ///
    /// # Errors
    /// Disk or image are not there, the disk is open or has keys, or Ceph refuses.
    pub fn restore(&self, disk: ImageName, image: ImageName) -> Result<(), RbdError> {
        let pool = self.idle(disk)?;
        self.without_keys(&pool, disk)?;
        self.open_image(image)?;
        self.note_restore(&pool, disk, Some(image))?;
        pool.trash_image(disk)?;
        self.clone_once(&pool, disk, image)?;
        self.note_restore(&pool, disk, None)
    }

    /// Removes a disk, and whatever keys it has. One that is not there is no error. Its space comes back with
    /// [`RbdStore::sweep`].
    ///
    /// # Errors
    /// It is open, or Ceph refuses.
    pub fn remove_disk(&self, disk: ImageName) -> Result<(), RbdError> {
        let Ok(pool) = self.place(disk) else { return Ok(()) };
        match self.idle(disk) {
            Err(error @ RbdError::InUse { .. }) => return Err(error),
            Err(error) if error.is_no_answer() => return Err(error),
            // Its node may have spoilt its header: that keeps nobody from removing it.
            Ok(_) | Err(_) => {}
        }
        for user in self.users(&pool, disk)? {
            self.revoke(disk, &user)?;
        }
        // Or a restore that died is taken for what was asked last.
        self.note_restore(&pool, disk, None)?;
        pool.trash_image(disk)?;
        self.places().remove(&disk);
        Ok(())
    }

    /// Opens a disk to be read and written here, and nowhere else.
    ///
    /// # Errors
    /// It is not there, open, or has keys; or Ceph refuses.
    pub fn open_disk(&self, disk: ImageName) -> Result<Image, RbdError> {
        let pool = self.place(disk)?;
        self.without_keys(&pool, disk)?;
        let open = pool.open_image(disk)?;
        let clients = open.watchers()?;
        // One is ourselves.
        if clients.len() > 1 {
            return Err(RbdError::InUse { object: pool.path(disk), clients });
        }
        Ok(open)
    }

    /// Octets of a disk's own objects.
    ///
    /// # Errors
    /// It is not there, or Ceph refuses.
    pub fn disk_bytes(&self, disk: ImageName) -> Result<u64, RbdError> {
        own_bytes(&self.place(disk)?.open_read_only(disk, None)?)
    }

    /// Size of a disk or an image.
    ///
    /// # Errors
    /// It is not there, or Ceph refuses.
    pub fn byte_len(&self, name: ImageName) -> Result<u64, RbdError> {
        Ok(self.place(name)?.open_read_only(name, None)?.byte_len())
    }

    /// Where an image or a disk is.
    ///
    /// # Errors
    /// It is not there.
    pub fn place(&self, name: ImageName) -> Result<Pool, RbdError> {
        let place = self.places().get(&name).cloned();
        place
            .ok_or_else(|| RbdError::ceph("looking for", format!("{}/{name}", self.pool))(crate::ffi::Errno::NOT_FOUND))
    }

    /// Gives back the space of what was removed, and answers of how many images. What has clones still waits for them.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn sweep(&self) -> Result<usize, RbdError> {
        self.removed()?.purge()
    }

    /// What was removed until now, for its space to be given back.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn removed(&self) -> Result<Removed, RbdError> {
        let mut removed = Vec::new();
        for namespace in self.cluster.pool(&self.pool)?.namespaces()? {
            let pool = self.cluster.namespace(&self.pool, &namespace)?;
            let ours = pool.trash()?.into_iter().filter(|(_, name)| ImageName::parse(name).is_some());
            removed.extend(ours.map(|(id, name)| (pool.clone(), id, name)));
        }
        Ok(Removed(removed))
    }

    /// Completes or undoes what a crash left in a namespace. What cannot be read is left as it is: a node can spoil its own
    /// disk's header, and must not keep the store from opening.
    fn recover(&self, pool: &Pool) -> Result<(), RbdError> {
        for (name, _) in pool.images()? {
            match self.recover_one(pool, name) {
                Err(error) if error.is_no_answer() => return Err(error),
                Err(error) => {
                    tracing::warn!(event = "image.unreadable", image = %name, error = ?error, "left as it is");
                }
                Ok(()) => {}
            }
        }
        for (disk, image) in notes::restores(pool)? {
            if !is_made(pool, disk)? {
                tracing::info!(event = "disk.restored", disk = %disk, image = %image, "completed what was interrupted");
                self.clone_once(pool, disk, image)?;
            }
            self.note_restore(pool, disk, None)?;
        }
        Ok(())
    }

    fn recover_one(&self, pool: &Pool, name: ImageName) -> Result<(), RbdError> {
        let open = match pool.open_read_only(name, None) {
            Err(error) if error.is_not_found() => {
                // Died while it was being made or removed.
                pool.remove_image(name)?;
                self.places().remove(&name);
                return Ok(());
            }
            open => open?,
        };
        let whole = open.snapshots()?.iter().any(|snapshot| snapshot == BASE);
        let begun = import::is_begun(&open)?;
        let taking = Taking::of(&open)?;
        drop(open);
        match name.kind() {
            ImageKind::Golden if !whole && begun => {
                self.fence(pool, name)?;
                self.places().remove(&name);
                self.unfinished().insert(name, pool.clone());
            }
            ImageKind::Golden | ImageKind::Replacement if !whole => {
                self.fence(pool, name)?;
                tracing::info!(event = "image.unfinished", image = %name, "removed what an import or a removal left");
                pool.trash_image(name)?;
                self.places().remove(&name);
            }
            ImageKind::Golden => {
                if let Some(Taking::UnderWay { disk, image }) = taking
                    && image == name
                {
                    self.fence(pool, name)?;
                    self.complete_snapshot(pool, name, disk)?;
                }
            }
            ImageKind::Replacement => {
                self.fence(pool, name)?;
                let image = ImageName::numbered(ImageKind::Golden, name.number());
                if !pool.has_image(image)? {
                    return self.take_place(pool, name, image);
                }
                // Flattened again, it is copied again.
                self.remove_image(name)?;
            }
            ImageKind::Disk if whole => {
                self.fence(pool, name)?;
                // Never the name of an image that is there, whatever the disk says.
                if let Some(Taking::UnderWay { image, .. }) = taking
                    && self.place(image).is_err()
                {
                    pool.forget_name(image)?;
                }
                pool.open_image(name)?.remove_snapshot(&fixed(BASE)?)?;
            }
            ImageKind::Disk => {}
        }
        Ok(())
    }

    /// The second half of a snapshot: the disk becomes a clone of what it was.
    fn complete_snapshot(&self, pool: &Pool, image: ImageName, disk: ImageName) -> Result<(), RbdError> {
        let clone = self.clone_once(pool, disk, image)?;
        Taking::Done { clone, own_bytes: None }.write(&pool.header_of(image)?)
    }

    /// Makes a disk, unless it is there whole, and answers the id that librbd gave it.
    fn clone_once(&self, pool: &Pool, disk: ImageName, image: ImageName) -> Result<ImageObjectId, RbdError> {
        match self.clone_disk(pool, disk, image) {
            Err(RbdError::Exists { .. }) if is_made(pool, disk)? => {
                self.places().insert(disk, pool.clone());
                pool.open_read_only(disk, None)?.id()
            }
            Err(RbdError::Exists { .. }) => {
                self.fence(pool, disk)?;
                clear(pool, disk)?;
                self.clone_disk(pool, disk, image)
            }
            made => made,
        }
    }

    /// Stops whoever has something unfinished open: an earlier process of ours, which is dead, but whose watch keeps Ceph
    /// from removing the image for half a minute.
    fn fence(&self, pool: &Pool, name: ImageName) -> Result<(), RbdError> {
        let clients = match pool.open_read_only(name, None) {
            Ok(open) => open.watchers()?,
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error),
        };
        clients.iter().try_for_each(|client| keys::blocklist(&self.cluster, client))?;
        if clients.is_empty() { Ok(()) } else { self.cluster.wait_for_latest_map() }
    }

    fn clone_disk(&self, pool: &Pool, disk: ImageName, image: ImageName) -> Result<ImageObjectId, RbdError> {
        let _not_removed = self.clones.read().unwrap_or_else(PoisonError::into_inner);
        let from = self.place(image)?;
        pool.clone_image((&from, image, &self.base(image)?), disk, DEFAULT_OBJECT_ORDER)?;
        let made = pool.header_of(disk)?;
        made.set_metadata(MADE, &disk.to_string())?;
        self.places().insert(disk, pool.clone());
        Ok(made.id().clone())
    }

    /// The snapshot of an image that disks are made from.
    fn base(&self, image: ImageName) -> Result<SnapshotName, RbdError> {
        self.place(image)?;
        fixed(BASE)
    }

    /// A disk's place, if nobody has the disk open.
    fn idle(&self, disk: ImageName) -> Result<Pool, RbdError> {
        let pool = self.place(disk)?;
        let clients = pool.open_read_only(disk, None)?.watchers()?;
        if clients.is_empty() { Ok(pool) } else { Err(RbdError::InUse { object: pool.path(disk), clients }) }
    }

    /// A project's namespace, after it is there.
    fn make_place(&self, namespace: &Namespace) -> Result<Pool, RbdError> {
        let mut made = self.namespaces.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = made.get(namespace) {
            return Ok(pool.clone());
        }
        self.cluster.pool(&self.pool)?.create_namespace(namespace)?;
        let pool = self.cluster.namespace(&self.pool, namespace)?;
        made.insert(namespace.clone(), pool.clone());
        Ok(pool)
    }

    fn unfinished(&self) -> MutexGuard<'_, HashMap<ImageName, Pool>> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn places(&self) -> MutexGuard<'_, HashMap<ImageName, Pool>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was removed up to some moment: pool, id and name of each.
#[derive(Debug)]
pub struct Removed(Vec<(Pool, String, String)>);

impl Removed {
    /// Gives back its space, and answers of how many images. What has clones still waits for them.
    ///
    /// # Errors
    /// Ceph does not answer.
    pub fn purge(self) -> Result<usize, RbdError> {
        self.purge_while(|| true)
    }

    /// [`Removed::purge`] until `go_on`, asked before each image, says no.
    ///
    /// # Errors
    /// As [`Removed::purge`].
    pub fn purge_while(self, go_on: impl Fn() -> bool) -> Result<usize, RbdError> {
        let mut purged = 0;
        for (pool, id, name) in self.0 {
            if !go_on() {
                break;
            }
            match pool.remove_from_trash(&id) {
                Ok(()) => purged += 1,
                Err(error) if error.is_no_answer() => return Err(error),
                Err(error) => {
                    tracing::debug!(event = "trash.kept", image = name, error = %error, "waits in the trash");
                }
            }
        }
        Ok(purged)
    }
}

/// An image's content, as a source of another.
#[derive(Debug)]
pub struct Content(pub Image);

impl Source for Content {
    fn byte_len(&self) -> u64 {
        self.0.byte_len()
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer).map_err(io::Error::other)
    }

    fn description(&mut self) -> io::Result<Option<String>> {
        Ok(None)
    }
}

/// Octets of a snapshot's own objects, which are counted once: it asks after each.
fn counted(pool: &Pool, open: &Image) -> Result<u64, RbdError> {
    match Taking::of(open)? {
        Some(Taking::Done { own_bytes: Some(own_bytes), .. }) => Ok(own_bytes),
        Some(Taking::Done { clone, own_bytes: None }) => {
            let own_bytes = own_bytes(open)?;
            Taking::Done { clone, own_bytes: Some(own_bytes) }.write(&pool.header(open.id()?, None))?;
            Ok(own_bytes)
        }
        Some(Taking::UnderWay { .. }) | None => own_bytes(open),
    }
}

fn own_bytes(image: &Image) -> Result<u64, RbdError> {
    Ok(image.own_extents()?.iter().map(|extent| extent.end - extent.start).sum())
}

/// Whether a disk is there, whole.
fn is_made(pool: &Pool, disk: ImageName) -> Result<bool, RbdError> {
    match pool.open_read_only(disk, None) {
        // Its name may still lead to what it was.
        Ok(open) => Ok(open.metadata(MADE)? == Some(disk.to_string()) && pool.has_image(disk)?),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes what an interrupted making or renaming left of a name.
fn clear(pool: &Pool, name: ImageName) -> Result<(), RbdError> {
    if pool.has_image(name)? { pool.remove_image(name) } else { pool.forget_name(name) }
}

fn fixed(name: &str) -> Result<SnapshotName, RbdError> {
    SnapshotName::new(name).map_err(|cause| RbdError::Malformed { object: name.to_owned(), detail: cause.to_string() })
}

fn namespace_of(pool: &Pool) -> Result<Namespace, RbdError> {
    pool.namespace().cloned().ok_or_else(|| RbdError::Malformed {
        object: pool.to_string(),
        detail: "is the pool's default namespace, which is nobody's".to_owned(),
    })
}
