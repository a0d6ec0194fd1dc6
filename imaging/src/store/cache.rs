//! Golden images that are kept elsewhere, materialised on this host: once, whatever reads them, and checked as a whole
//! against the root on record before anybody does.
//!
//! ```text
//! <store>/golden/<key>/            see [`super::golden`]
//! <store>/golden/.making-<key>/    being materialised, or left so: the next attempt goes on
//! <store>/golden/.import-<key>/    being imported, or left so: the same import goes on, and says to which image elsewhere
//! ```
//!
//! A folder gets its name when all in it is durable, so that what has its name is whole. It may rot all the same: each block
//! is checked again when it is first read.

use super::folder::{names, remove_folder, sync};
use super::golden::{self, GoldenFiles, GoldenImage, cached_folder};
use super::import::{self, CHECKPOINT_BYTES, Copied, NewGolden};
use super::merkle::Hash;
use super::{Content, StoreError};
use crate::lock::lock;
use assay_wire::id::ImageKey;
use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const MAKING: &str = ".making-";
const IMPORTING: &str = ".import-";

/// A golden image as it is on record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Recorded {
    pub(super) image: ImageKey,
    pub(super) byte_len: u64,
    pub(super) root: Hash,
}

/// The golden images on this host.
#[derive(Debug)]
pub(super) struct GoldenCache {
    store: PathBuf,
    /// One caller at a time materialises or evicts an image.
    images: Mutex<HashMap<ImageKey, Arc<Mutex<()>>>>,
}

impl GoldenCache {
    /// Those below the folder `store`, which is made if need be. All but what belongs to the images of `keep`, and imports
    /// that may go on, goes.
    pub(super) fn open(store: &Path, keep: &HashSet<ImageKey>) -> Result<Self, StoreError> {
        let folder = store.join("golden");
        std::fs::create_dir_all(&folder).map_err(|source| StoreError::io("making", &folder, source))?;
        for name in names(&folder)? {
            let path = folder.join(&name);
            let kept = match name.strip_prefix(IMPORTING) {
                // One that is there whole needs no import.
                Some(key) => key.parse().is_ok_and(|key| !keep.contains(&key)) && import::has_checkpoint(&path),
                None => name.strip_prefix(MAKING).unwrap_or(&name).parse().is_ok_and(|key| keep.contains(&key)),
            };
            if !kept {
                remove_folder(&path)?;
            }
        }
        Ok(Self { store: store.to_owned(), images: Mutex::default() })
    }

    /// The image, materialised from what `content` opens if it is not there.
    ///
    /// # Errors
    /// The content cannot be read, is not the one on record, or the host's disk is full.
    pub(super) fn get<C: Content>(
        &self,
        recorded: &Recorded,
        content: impl FnOnce() -> Result<C, StoreError>,
    ) -> Result<GoldenImage, StoreError> {
        let turn = self.turn(recorded.image);
        let _alone = lock(&turn);
        if let Some(found) = self.found(recorded)? {
            return Ok(found);
        }
        let Recorded { image, root, .. } = *recorded;
        let making = self.folder(MAKING, image);
        std::fs::create_dir_all(&making).map_err(|source| StoreError::io("making", &making, source))?;
        let copied = import::copy(&making, &content()?, &mut |_, _| ControlFlow::Continue(()))?;
        if copied.root != root {
            remove_folder(&making)?;
            let (found, recorded) = (hex::encode(copied.root), hex::encode(root));
            tracing::error!(event = "image.corrupt", %image, found, recorded, "golden image is not the one on record");
            return Err(StoreError::OtherContent { image, found, recorded });
        }
        fail::fail_point!("store::golden::copied", |_| std::process::abort());
        self.publish(&making, image)?;
        tracing::info!(event = "image.materialised", %image, octets = copied.data_bytes, "golden image is on this host");
        self.found(recorded)?.ok_or(StoreError::NoImage { image })
    }

    /// Has the image here, for others to open: costs no more than a look where it is.
    ///
    /// # Errors
    /// As [`GoldenCache::get`].
    pub(super) fn have<C: Content>(
        &self,
        recorded: &Recorded,
        content: impl FnOnce() -> Result<C, StoreError>,
    ) -> Result<(), StoreError> {
        // What is there with other sizes, `get` sees to.
        if golden::is_cached(&self.store, recorded.image, recorded.byte_len) {
            return Ok(());
        }
        self.get(recorded, content).map(drop)
    }

    /// What is there of the image, if it is whole. What cannot be the image goes.
    fn found(&self, recorded: &Recorded) -> Result<Option<GoldenImage>, StoreError> {
        let Recorded { image, byte_len, root } = *recorded;
        match GoldenFiles::open_cached(&self.store, image, byte_len, root).and_then(GoldenImage::from_files) {
            Ok(found) => Ok(Some(found)),
            Err(StoreError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
            Err(error @ StoreError::Malformed { .. }) => {
                tracing::warn!(event = "image.cache_damaged", %image, %error, "golden image is materialised anew");
                remove_folder(&cached_folder(&self.store, image)).map(|()| None)
            }
            Err(error) => Err(error),
        }
    }

    /// The files of an image that is being imported: begun anew, unless [`Staged::go_on`] finds what is there.
    pub(super) fn begin(&self, image: ImageKey, byte_len: u64) -> Staged {
        Staged { folder: self.folder(IMPORTING, image), byte_len, durable: 0, files: None, copied: None }
    }

    /// Clears away what interrupted imports left, but of `keep`.
    pub(super) fn forget_imports(&self, keep: &[ImageKey]) -> Result<(), StoreError> {
        let folder = self.store.join("golden");
        for name in names(&folder)? {
            let Some(key) = name.strip_prefix(IMPORTING) else { continue };
            if !key.parse().is_ok_and(|key| keep.contains(&key)) {
                remove_folder(&folder.join(&name))?;
            }
        }
        Ok(())
    }

    /// Keeps what an import has written, all of it.
    pub(super) fn keep(&self, staged: &Staged, image: ImageKey) -> Result<(), StoreError> {
        let turn = self.turn(image);
        let _alone = lock(&turn);
        if staged.copied.is_none() {
            return Ok(());
        }
        import::forget_checkpoint(&staged.folder)?;
        self.publish(&staged.folder, image)
    }

    /// Forgets an image: it was removed, and its key is never used again.
    pub(super) fn evict(&self, image: ImageKey) -> Result<(), StoreError> {
        let turn = self.turn(image);
        let _alone = lock(&turn);
        remove_folder(&self.folder(MAKING, image))?;
        remove_folder(&self.folder(IMPORTING, image))?;
        remove_folder(&cached_folder(&self.store, image))?;
        lock(&self.images).remove(&image);
        Ok(())
    }

    fn publish(&self, made: &Path, image: ImageKey) -> Result<(), StoreError> {
        let place = cached_folder(&self.store, image);
        sync(made)?;
        remove_folder(&place)?;
        std::fs::rename(made, &place).map_err(|source| StoreError::io("putting in place", &place, source))?;
        sync(&self.store.join("golden"))
    }

    fn folder(&self, prefix: &str, image: ImageKey) -> PathBuf {
        self.store.join("golden").join(format!("{prefix}{image}"))
    }

    fn turn(&self, image: ImageKey) -> Arc<Mutex<()>> {
        Arc::clone(lock(&self.images).entry(image).or_default())
    }
}

/// The files of an image that is being imported. They go with this, unless they were kept, or what is in them can be gone on
/// with.
pub(super) struct Staged {
    folder: PathBuf,
    byte_len: u64,
    /// Up to here an earlier attempt has written them, or a checkpoint says so.
    durable: u64,
    files: Option<NewGolden>,
    copied: Option<Copied>,
}

impl Staged {
    /// How much an earlier attempt with the same identity has left; before anything is added.
    pub(super) fn go_on(&mut self, identity: &str) -> Result<Option<u64>, StoreError> {
        let Some(durable) = import::resume(&self.folder, identity).filter(|there| *there <= self.byte_len) else {
            return Ok(None);
        };
        self.files = Some(NewGolden::open(&self.folder, self.byte_len, false)?);
        self.durable = durable;
        Ok(Some(durable))
    }

    /// Reads what comes next as it was left, and adds it.
    pub(super) fn push_again(&mut self, chunk: &mut [u8]) -> Result<(), StoreError> {
        let files = self.files()?;
        files.read_back(chunk)?;
        files.push(chunk, true)
    }

    /// Adds what comes next: whole blocks, but for the last.
    pub(super) fn push(&mut self, chunk: &[u8]) -> Result<(), StoreError> {
        self.files()?.push(chunk, false)
    }

    /// Makes the first `offset` octets durable, and records that they can be gone on from: now, or when they have become
    /// many more.
    pub(super) fn checkpoint(&mut self, identity: &str, offset: u64, now: bool) -> Result<(), StoreError> {
        let due = if now { offset > self.durable } else { offset >= self.durable.saturating_add(CHECKPOINT_BYTES) };
        let Some(files) = self.files.as_ref().filter(|_| due) else { return Ok(()) };
        files.checkpoint(&self.folder, identity, offset)?;
        fail::fail_point!("store::golden::checkpoint", |_| std::process::abort());
        self.durable = offset;
        Ok(())
    }

    /// Makes what was added durable, once that is all, and answers what it comes to.
    pub(super) fn finish(&mut self) -> Result<Option<&Copied>, StoreError> {
        if let Some(files) = self.files.take() {
            self.copied = Some(files.finish()?);
        }
        Ok(self.copied.as_ref())
    }

    fn files(&mut self) -> Result<&mut NewGolden, StoreError> {
        let files = match self.files.take() {
            Some(files) => files,
            None => {
                remove_folder(&self.folder)?;
                std::fs::create_dir_all(&self.folder)
                    .map_err(|source| StoreError::io("making", &self.folder, source))?;
                NewGolden::open(&self.folder, self.byte_len, true)?
            }
        };
        Ok(self.files.insert(files))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !import::has_checkpoint(&self.folder) {
            // What cannot be removed now is removed at the next start.
            let _ = remove_folder(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::device::BlockDevice as _;
    use std::os::unix::fs::FileExt as _;
    use std::sync::atomic::{AtomicU64, Ordering};

    const BYTES: u64 = 4 << 20;

    /// Content that counts what is read of it, and ends somewhere.
    struct Counted<'a> {
        fill: u8,
        read: &'a AtomicU64,
        ends_at: u64,
    }

    impl Content for Counted<'_> {
        fn virtual_bytes(&self) -> u64 {
            BYTES
        }

        fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
            if offset >= self.ends_at {
                return Err(StoreError::Cancelled);
            }
            self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            buffer.fill(self.fill);
            Ok(())
        }

        fn identity(&self) -> Option<String> {
            Some("counted".to_owned())
        }
    }

    struct Host {
        folder: tempfile::TempDir,
        read: AtomicU64,
        recorded: Recorded,
    }

    impl Host {
        fn new(fill: u8) -> Self {
            let (folder, read, image) = (tempfile::tempdir().unwrap(), AtomicU64::new(0), ImageKey::random());
            let elsewhere = tempfile::tempdir().unwrap();
            let content = Counted { fill, read: &AtomicU64::new(0), ends_at: BYTES };
            let root = import::copy(elsewhere.path(), &content, &mut |_, _| ControlFlow::Continue(())).unwrap().root;
            Self { folder, read, recorded: Recorded { image, byte_len: BYTES, root } }
        }

        fn open(&self) -> GoldenCache {
            GoldenCache::open(self.folder.path(), &HashSet::from([self.recorded.image])).unwrap()
        }

        fn content(&self, fill: u8, ends_at: u64) -> Result<Counted<'_>, StoreError> {
            Ok(Counted { fill, read: &self.read, ends_at })
        }

        fn left(&self) -> Vec<String> {
            names(&self.folder.path().join("golden")).unwrap()
        }

        fn read(&self) -> u64 {
            self.read.swap(0, Ordering::Relaxed)
        }
    }

    fn last_octet(image: &GoldenImage) -> u8 {
        let mut octet = [0];
        image.read_at(BYTES - 1, &mut octet).unwrap();
        octet[0]
    }

    #[test]
    fn who_asks_at_once_has_it_materialised_once() {
        let host = Host::new(7);
        let cache = host.open();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let image = cache.get(&host.recorded, || host.content(7, BYTES)).unwrap();
                    assert_eq!(last_octet(&image), 7);
                });
            }
        });
        assert_eq!(host.read(), BYTES, "read once, from the first octet to the last");
        assert_eq!(host.left(), [host.recorded.image.to_string()]);
    }

    #[test]
    fn who_has_it_only_looks_and_has_what_cannot_be_it_made_anew() {
        let host = Host::new(7);
        let cache = host.open();
        let have = || cache.have(&host.recorded, || host.content(7, BYTES)).unwrap();
        have();
        assert_eq!(host.read(), BYTES);
        have();
        assert_eq!(host.read(), 0);
        let folder = cached_folder(host.folder.path(), host.recorded.image);
        for file in ["disk.raw", "tree.sha256"] {
            std::fs::OpenOptions::new().write(true).open(folder.join(file)).unwrap().set_len(512).unwrap();
            have();
            assert_eq!(host.read(), BYTES, "{file}");
            std::fs::remove_file(folder.join(file)).unwrap();
            have();
            assert_eq!(host.read(), BYTES, "{file}");
        }
    }

    #[test]
    fn what_was_broken_off_goes_on_after_a_restart() {
        let host = Host::new(7);
        host.open().get(&host.recorded, || host.content(7, BYTES / 2)).unwrap_err();
        assert_eq!(host.read(), BYTES / 2);
        let cache = host.open();
        assert_eq!(last_octet(&cache.get(&host.recorded, || host.content(7, BYTES)).unwrap()), 7);
        assert_eq!(host.read(), BYTES / 2, "the second half");
    }

    #[test]
    fn what_is_not_on_record_is_refused_and_named_and_leaves_nothing() {
        let host = Host::new(7);
        let cache = host.open();
        let refused = cache.get(&host.recorded, || host.content(8, BYTES)).unwrap_err();
        assert!(
            matches!(&refused, StoreError::OtherContent { image, .. } if *image == host.recorded.image),
            "{refused}"
        );
        assert!(refused.to_string().contains(&hex::encode(host.recorded.root)), "{refused}");
        assert!(host.left().is_empty());
        // Half of it from before counts likewise: the other half makes none of it right.
        host.read();
        cache.get(&host.recorded, || host.content(8, BYTES / 2)).unwrap_err();
        cache.get(&host.recorded, || host.content(7, BYTES)).unwrap_err();
        assert_eq!(last_octet(&cache.get(&host.recorded, || host.content(7, BYTES)).unwrap()), 7);
    }

    #[test]
    fn rot_is_found_when_it_is_read_and_a_file_of_another_size_is_made_anew() {
        let host = Host::new(7);
        let cache = host.open();
        drop(cache.get(&host.recorded, || host.content(7, BYTES)).unwrap());
        let path = cached_folder(host.folder.path(), host.recorded.image).join("disk.raw");
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[8], 65_536 * 3 + 5).unwrap();
        let rotten = cache.get(&host.recorded, || host.content(7, BYTES)).unwrap();
        let refused = rotten.read_at(65_536 * 3, &mut [0; 512]).unwrap_err();
        assert!(matches!(refused, crate::store::device::DeviceError::Corrupt { offset: 196_608 }), "{refused:?}");
        host.read();
        file.set_len(BYTES - 512).unwrap();
        assert_eq!(last_octet(&cache.get(&host.recorded, || host.content(7, BYTES)).unwrap()), 7);
        assert_eq!(host.read(), BYTES);
    }

    #[test]
    fn what_no_image_has_goes_at_the_next_start_and_with_its_image() {
        let host = Host::new(7);
        let cache = host.open();
        drop(cache.get(&host.recorded, || host.content(7, BYTES)).unwrap());
        let mut staged = cache.begin(ImageKey::random(), BYTES);
        staged.push(&[7; 512]).unwrap();
        std::mem::forget(staged);
        let other = Host { recorded: Recorded { image: ImageKey::random(), ..host.recorded }, ..Host::new(7) };
        cache.get(&other.recorded, || host.content(7, BYTES)).unwrap();
        assert_eq!(host.left().len(), 3);
        let cache = host.open();
        assert_eq!(host.left(), [host.recorded.image.to_string()]);
        cache.evict(host.recorded.image).unwrap();
        assert!(host.left().is_empty());
    }
}
