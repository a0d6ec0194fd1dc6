//! An open image: what a disk is read from and written to.
//!
//! librbd 16 asserts, which ends the process, where it is asked for nothing; and what lies behind an image's end it
//! cuts off in silence. Both are answered here.

use crate::ffi::{Errno, ImageHandle, c};
use crate::name::{ImageObjectId, Namespace, PoolName, SnapshotName};
use crate::{ImageLink, RbdError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{ControlFlow, Range};

/// An open image. Calls block; any number of threads may make them at once.
pub struct Image {
    handle: ImageHandle,
    /// `pool/namespace/name`.
    object: String,
    byte_len: u64,
    object_bytes: u64,
    writable: bool,
}

/// The image that a clone was made from, as its maker knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentImage {
    /// Its pool.
    pub pool: PoolName,
    /// Its namespace.
    pub namespace: Namespace,
    /// Its id.
    pub id: ImageObjectId,
}

/// Octets that one call to librbd discards or zeroes at most: it answers their number as an `int`.
const MOST_AT_ONCE: u64 = 1 << 30;

impl Image {
    pub(crate) fn new(handle: ImageHandle, object: String, writable: bool) -> Result<Self, RbdError> {
        let byte_len = handle.byte_len().map_err(RbdError::ceph("reading the size of", &object))?;
        let object_bytes = handle.object_bytes().map_err(RbdError::ceph("reading the object size of", &object))?;
        Ok(Self { handle, object, byte_len, object_bytes, writable })
    }

    /// Size in octets.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// Octets of each of its objects but the last: a power of two.
    #[must_use]
    pub fn object_bytes(&self) -> u64 {
        self.object_bytes
    }

    /// `pool/namespace/name`, for messages.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.object
    }

    /// The id that librbd gave it.
    ///
    /// # Errors
    /// librbd refuses, or it is none that a key can be cut to.
    pub fn id(&self) -> Result<ImageObjectId, RbdError> {
        let id = self.handle.id().map_err(self.failed("reading the id of"))?;
        ImageObjectId::new(&id).map_err(|cause| self.malformed(cause.to_string()))
    }

    /// What the names of its data objects start with; a dot and the object's number in 16 hexadecimal digits follow.
    ///
    /// # Errors
    /// librbd refuses.
    pub(crate) fn data_prefix(&self) -> Result<String, RbdError> {
        self.handle.data_prefix().map_err(self.failed("reading the data prefix of"))
    }

    /// Its parent, and the number of the parent's snapshot that it is a clone of, as its header says.
    ///
    /// # Errors
    /// librbd refuses.
    pub fn parent(&self) -> Result<Option<(ImageLink, u64)>, RbdError> {
        let parent = self.handle.parent().map_err(self.failed("reading the parent of"))?;
        Ok(parent.map(|(linked, snapshot)| (link(linked), snapshot)))
    }

    /// Refuses a clone whose header names another parent than the one that it was made from: the holder of its key can
    /// write there, and whoever copies or flattens it with more rights would read what the header names.
    ///
    /// # Errors
    /// It has another parent. None is as good: a flattened clone reads nothing of anybody's.
    pub fn check_parent(&self, expected: &ParentImage) -> Result<(), RbdError> {
        let Some((parent, _)) = self.parent()? else { return Ok(()) };
        let right = parent.pool == expected.pool.as_str()
            && parent.namespace == expected.namespace.as_str()
            && parent.id == expected.id.as_str();
        if right {
            return Ok(());
        }
        let expected = format!("{}/{} with the id {}", expected.pool, expected.namespace, expected.id);
        let found = format!("{parent} with the id {}", parent.id);
        Err(RbdError::WrongParent { object: self.object.clone(), found, expected })
    }

    /// Its clones: of the snapshot that it is open at, or of all.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn children(&self) -> Result<Vec<ImageLink>, RbdError> {
        let children = self.handle.children().map_err(self.failed("listing the clones of"))?;
        Ok(children.into_iter().map(link).collect())
    }

    /// Addresses of the clients that have it open for writing, as the blocklist takes them.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn watchers(&self) -> Result<Vec<String>, RbdError> {
        self.handle.watchers().map_err(self.failed("listing the watchers of"))
    }

    /// Its snapshots.
    ///
    /// # Errors
    /// librbd refuses.
    pub fn snapshots(&self) -> Result<Vec<String>, RbdError> {
        self.handle.snapshots().map_err(self.failed("listing the snapshots of"))
    }

    /// Makes a snapshot: it can be cloned at once (clone v2: no protection needed).
    ///
    /// # Errors
    /// There is one of that name, or Ceph refuses.
    pub fn create_snapshot(&self, name: &SnapshotName) -> Result<(), RbdError> {
        self.handle.create_snapshot(&c(name.as_str())).map_err(self.failed_at("making the snapshot", name))
    }

    /// Removes a snapshot. While it has clones it lives on in the trash. That there is none is no error.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn remove_snapshot(&self, name: &SnapshotName) -> Result<(), RbdError> {
        match self.handle.remove_snapshot(&c(name.as_str())) {
            Ok(()) | Err(Errno::NOT_FOUND) => Ok(()),
            Err(errno) => Err(self.failed_at("removing the snapshot", name)(errno)),
        }
    }

    /// Writes down a fact about it in its header.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn set_metadata(&self, key: &str, value: &str) -> Result<(), RbdError> {
        self.handle.set_metadata(&c(key), &c(value)).map_err(self.failed("writing the metadata of"))
    }

    /// A fact from its header.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn metadata(&self, key: &str) -> Result<Option<String>, RbdError> {
        self.handle.metadata(&c(key)).map_err(self.failed("reading the metadata of"))
    }

    /// Copies from its parent all that it has not, after which it has none. `progress` gets octets done and in all, and
    /// may break it off; what was copied stays.
    ///
    /// # Errors
    /// It has no parent, or Ceph refuses.
    pub fn flatten(&self, progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>) -> Result<(), RbdError> {
        self.check_writable()?;
        match self.handle.flatten(progress) {
            Err(Errno::CANCELED) => Err(RbdError::BrokenOff { doing: "flattening", object: self.object.clone() }),
            done => done.map_err(self.failed("flattening")),
        }
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The range is outside the image, or Ceph refuses.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), RbdError> {
        let length = buffer.len() as u64;
        self.check_range(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let read = self.handle.read(offset, buffer).map_err(self.failed("reading"))?;
        self.whole(read, length)
    }

    /// Writes `data` at `offset`. When this returns it is on the OSDs' disks, and outlives this process.
    ///
    /// # Errors
    /// The range is outside the image, it is open for reading only, or Ceph refuses.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), RbdError> {
        self.check_writable()?;
        self.check_range(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        let written = self.handle.write(offset, data).map_err(self.failed("writing"))?;
        self.whole(written, data.len() as u64)
    }

    /// Makes a range read as zeros, and gives back the space of what objects it covers wholly.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), RbdError> {
        self.in_parts(offset, length, |at, part| {
            let part = usize::try_from(part).unwrap_or(usize::MAX);
            self.handle.write_zeroes(at, part).map_err(self.failed("zeroing"))
        })
    }

    /// Says that a range is not needed. Parts of objects may be left as they were: what must read as zero is
    /// [`Image::write_zeroes`]' to do.
    ///
    /// # Errors
    /// As [`Image::write_at`].
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), RbdError> {
        self.in_parts(offset, length, |at, part| self.handle.discard(at, part).map_err(self.failed("discarding")))
    }

    /// Waits until all completed writes are durable.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn flush(&self) -> Result<(), RbdError> {
        self.handle.flush().map_err(self.failed("flushing"))
    }

    /// Ranges that may hold something else than zeros, in order, its parent's among them: what a sparse copy reads.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn data_extents(&self) -> Result<Vec<Range<u64>>, RbdError> {
        let extents = self.handle.extents(self.byte_len, true, false).map_err(self.failed("listing the extents of"))?;
        Ok(extents.into_iter().filter(|extent| extent.2).map(|(start, length, _)| start..start + length).collect())
    }

    /// Ranges of its own objects that hold data, in order, its parent's not among them. Objects that were emptied by
    /// [`Image::write_zeroes`] hide their parent's, and are *not* told of here.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn own_extents(&self) -> Result<Vec<Range<u64>>, RbdError> {
        let extents = self.handle.extents(self.byte_len, false, true).map_err(self.failed("listing the objects of"))?;
        Ok(extents.into_iter().map(|(start, length, _)| start..start + length).collect())
    }

    fn in_parts(
        &self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(u64, u64) -> Result<(), RbdError>,
    ) -> Result<(), RbdError> {
        self.check_writable()?;
        self.check_range(offset, length)?;
        let mut at = offset;
        while at < offset + length {
            let part = (offset + length - at).min(MOST_AT_ONCE);
            each(at, part)?;
            at += part;
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), RbdError> {
        crate::disk::check_range(&self.object, offset, length, self.byte_len)
    }

    fn check_writable(&self) -> Result<(), RbdError> {
        if self.writable { Ok(()) } else { Err(RbdError::ReadOnly { object: self.object.clone() }) }
    }

    fn whole(&self, done: u64, wanted: u64) -> Result<(), RbdError> {
        if done == wanted {
            return Ok(());
        }
        Err(self.malformed(format!("answered {done} of {wanted} octets: it was made smaller")))
    }

    fn failed(&self, doing: &'static str) -> impl FnOnce(Errno) -> RbdError {
        RbdError::ceph(doing, &self.object)
    }

    fn failed_at(&self, doing: &'static str, snapshot: &SnapshotName) -> impl FnOnce(Errno) -> RbdError {
        RbdError::ceph(doing, format!("{}@{snapshot}", self.object))
    }

    fn malformed(&self, detail: String) -> RbdError {
        RbdError::Malformed { object: self.object.clone(), detail }
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("path", &self.object).field("writable", &self.writable).finish_non_exhaustive()
    }
}

fn link(linked: crate::ffi::Linked) -> ImageLink {
    ImageLink {
        pool: linked.pool,
        namespace: linked.namespace,
        name: linked.name,
        id: linked.id,
        in_trash: linked.in_trash,
    }
}
