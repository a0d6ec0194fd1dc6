//! A node's disk as its export's process sees it: a clone on Ceph over a golden image that lies on this host as a file.
//!
//! What the clone never wrote is read from the file, whose pages all exports of one golden image share, and never asks
//! Ceph. Which objects those are is found when the disk is opened, by asking after each object of the clone: an object
//! that is there hides the parent's, also an empty one. (librbd's `diff_iterate` does not tell of objects that were
//! emptied, by `write_zeroes` or a node's UNMAP: a disk that trusted it would bring back what its node had erased.)

use crate::ffi::c;
use crate::name::ImageName;
use crate::ownership::OwnObjects;
use crate::{Image, ParentImage, Pool, RbdError};
use std::fmt;
use std::io;

/// A golden image's content on this host. Its reader checks it: what is rotten is an error, not content.
pub trait GoldenFile: fmt::Debug + Send + Sync {
    /// Size in octets.
    fn byte_len(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The file cannot be read, or is not what it should be.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Like [`GoldenFile::read_at`], if that needs no waiting; answers whether `buffer` was filled.
    ///
    /// # Errors
    /// As [`GoldenFile::read_at`].
    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool>;
}

/// What a clone wrote: librbd has it, or a process that has librbd. Calls block; any number of threads may make them at once.
pub trait CloneObjects: fmt::Debug + Send + Sync {
    /// `pool/namespace/name`, for messages.
    fn path(&self) -> &str;

    /// Size in octets.
    fn byte_len(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The range is outside the disk, or Ceph refuses.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), RbdError>;

    /// Writes pieces from `offset` on, one behind the other. When this returns they are on the OSDs' disks.
    ///
    /// # Errors
    /// As [`CloneObjects::read_at`].
    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), RbdError>;

    /// Makes a range read as zeros, and gives back the space of what objects it covers wholly.
    ///
    /// # Errors
    /// As [`CloneObjects::read_at`].
    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), RbdError>;

    /// Waits until all completed writes are durable.
    ///
    /// # Errors
    /// Ceph refuses.
    fn flush(&self) -> Result<(), RbdError>;
}

impl CloneObjects for Image {
    fn path(&self) -> &str {
        self.path()
    }

    fn byte_len(&self) -> u64 {
        self.byte_len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), RbdError> {
        self.read_at(offset, buffer)
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), RbdError> {
        let mut at = offset;
        for piece in pieces {
            self.write_at(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), RbdError> {
        self.write_zeroes(offset, length)
    }

    fn flush(&self) -> Result<(), RbdError> {
        self.flush()
    }
}

/// Finds which objects of a clone in `pool` are not its golden image's any more: its own, and those of images in between.
/// What it has not is read from `layers`, its parent first; the last of them is the golden image.
///
/// # Errors
/// It is a clone of another image; or Ceph refuses.
pub fn find_own_objects(pool: &Pool, image: &Image, layers: &[ParentImage]) -> Result<OwnObjects, RbdError> {
    let own = OwnObjects::new(image.byte_len(), image.object_bytes());
    if image.parent()?.is_none() {
        // It was flattened: all of it is its own, and what it has not is zero.
        own.take(&(0..image.byte_len()));
        return Ok(own);
    }
    let [between @ .., lowest] = layers else {
        let detail = "is a clone, of nothing that is known".to_owned();
        return Err(RbdError::Malformed { object: image.path().to_owned(), detail });
    };
    image.check_parent(between.first().unwrap_or(lowest))?;
    find_own(pool, &image.data_prefix()?, &own)?;
    // What an image in between has is on Ceph too.
    for layer in between {
        find_own(&pool.in_namespace(&layer.namespace)?, &format!("rbd_data.{}", layer.id), &own)?;
    }
    Ok(own)
}

/// A clone over its golden file. Calls block; any number of threads may make them at once. Only one process at a time may
/// have a clone open so: what another one takes over would not be seen.
#[derive(Debug)]
pub struct CloneDisk<G, C = Image> {
    clone: C,
    golden: G,
    own: OwnObjects,
}

/// Requests in flight while a disk is opened.
const PROBES: u64 = 8;

impl<G: GoldenFile> CloneDisk<G> {
    /// Opens the clone `name`. What it has not is read from `layers`, its parent first; the last of them is the golden image,
    /// which lies in `golden`.
    ///
    /// # Errors
    /// It is a clone of another image, or of another size than the file; or Ceph refuses.
    pub fn open(pool: &Pool, name: ImageName, layers: &[ParentImage], golden: G) -> Result<Self, RbdError> {
        Self::over(pool, pool.open_image(name)?, layers, golden)
    }

    /// The same of a clone in `pool` that is open already, also at a snapshot: which is not written to then.
    ///
    /// # Errors
    /// As [`CloneDisk::open`].
    pub fn over(pool: &Pool, image: Image, layers: &[ParentImage], golden: G) -> Result<Self, RbdError> {
        let own = find_own_objects(pool, &image, layers)?;
        Self::new(image, golden, own)
    }
}

impl<G: GoldenFile, C: CloneObjects> CloneDisk<G, C> {
    /// A clone whose `own` objects are as [`find_own_objects`] found them.
    ///
    /// # Errors
    /// The three are not of one size.
    pub fn new(clone: C, golden: G, own: OwnObjects) -> Result<Self, RbdError> {
        for (what, byte_len) in [("its golden file", golden.byte_len()), ("the map of its objects", own.byte_len())] {
            if byte_len != clone.byte_len() {
                let detail = format!("has {} octets, {what} {byte_len}", clone.byte_len());
                return Err(RbdError::Malformed { object: clone.path().to_owned(), detail });
            }
        }
        Ok(Self { clone, golden, own })
    }

    /// Size in octets.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.clone.byte_len()
    }

    /// How many of the disk's objects are its own, and how many it has in all.
    #[must_use]
    pub fn own_objects(&self) -> (u64, u64) {
        (self.own.own_count(), self.own.count())
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The range is outside the disk, the golden file cannot be read, or Ceph refuses.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), RbdError> {
        self.check_range(offset, buffer.len() as u64)?;
        let mut rest = buffer;
        for run in self.own.runs(offset..offset + rest.len() as u64) {
            let (part, behind) = rest.split_at_mut(length(&run.range));
            rest = behind;
            if run.own {
                self.clone.read_at(run.range.start, part)?;
            } else {
                self.golden.read_at(run.range.start, part).map_err(self.golden_failed())?;
            }
        }
        Ok(())
    }

    /// Like [`CloneDisk::read_at`], if that needs neither Ceph nor waiting; answers whether `buffer` was filled. When it
    /// answers `false` the buffer's content is unspecified.
    ///
    /// # Errors
    /// As [`CloneDisk::read_at`].
    pub fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, RbdError> {
        self.check_range(offset, buffer.len() as u64)?;
        if self.own.runs(offset..offset + buffer.len() as u64).any(|run| run.own) {
            return Ok(false);
        }
        self.golden.try_read_at(offset, buffer).map_err(self.golden_failed())
    }

    /// The golden image's file, if what lies at `offset` is read from there, and for how many octets that holds, `length` at
    /// most. The range lies on the disk and is not empty.
    pub fn golden_at(&self, offset: u64, length: u64) -> Option<(&G, u64)> {
        let run = self.own.runs(offset..offset + length).next()?;
        (!run.own).then(|| (&self.golden, run.range.end - run.range.start))
    }

    /// Writes `data` at `offset`. When this returns it is on the OSDs' disks.
    ///
    /// # Errors
    /// The range is outside the disk, or Ceph refuses.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), RbdError> {
        self.write_pieces_at(offset, &[data])
    }

    /// [`CloneDisk::write_at`] of several pieces, one behind the other.
    ///
    /// # Errors
    /// As [`CloneDisk::write_at`].
    pub fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), RbdError> {
        self.take(offset, pieces.iter().map(|piece| piece.len() as u64).sum())?;
        self.clone.write_pieces_at(offset, pieces)
    }

    /// Makes a range read as zeros, and gives back the space of what objects it covers wholly.
    ///
    /// # Errors
    /// As [`CloneDisk::write_at`].
    pub fn unmap(&self, offset: u64, length: u64) -> Result<(), RbdError> {
        self.take(offset, length)?;
        // Not `discard`: that leaves parts of objects as they were.
        self.clone.write_zeroes(offset, length)
    }

    /// Waits until all completed writes are durable.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn flush(&self) -> Result<(), RbdError> {
        self.clone.flush()
    }

    fn take(&self, offset: u64, length: u64) -> Result<(), RbdError> {
        self.check_range(offset, length)?;
        self.own.take(&(offset..offset + length));
        Ok(())
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), RbdError> {
        check_range(self.clone.path(), offset, length, self.clone.byte_len())
    }

    fn golden_failed(&self) -> impl FnOnce(io::Error) -> RbdError {
        let object = self.clone.path().to_owned();
        move |source| RbdError::File { doing: "reading the golden file of", object, source }
    }
}

/// Refuses what is not within a disk.
pub(crate) fn check_range(object: &str, offset: u64, length: u64, byte_len: u64) -> Result<(), RbdError> {
    match offset.checked_add(length) {
        Some(end) if end <= byte_len => Ok(()),
        _ => Err(RbdError::OutOfRange { object: object.to_owned(), offset, length, byte_len }),
    }
}

/// Takes over the objects that are there, of an image whose data objects' names start so.
fn find_own(pool: &Pool, prefix: &str, own: &OwnObjects) -> Result<(), RbdError> {
    let probe = |first: u64| {
        for object in (first..own.count()).step_by(usize::try_from(PROBES).unwrap_or(1)) {
            let name = format!("{prefix}.{object:016x}");
            if pool.handle().has_object(&c(&name)).map_err(RbdError::ceph("asking after", pool.path(&name)))? {
                own.take_object(object);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..PROBES).map(|first| scope.spawn(move || probe(first))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(found) => found,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

fn length(range: &std::ops::Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}
