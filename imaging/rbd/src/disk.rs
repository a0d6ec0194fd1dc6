//! A node's disk as its export's process sees it: a clone on Ceph over a golden image that lies on this host as a file.
//!
//! What the clone never wrote is read from the file, whose pages all exports of one golden image share, and never asks
//! Ceph. Which objects those are is found when the disk is opened, by asking after each object of the clone: an object
//! that is there hides the parent's, also an empty one. (librbd's `diff_iterate` does not tell of objects that were
//! emptied, by `write_zeroes` or a node's UNMAP: a disk that trusted it would bring back what its node had erased.)

use crate::ffi::c;
use crate::name::ImageName;
use crate::ownership::OwnObjects;
use crate::runs::data_of;
use crate::{Image, ParentImage, Pool, RbdError};
use std::fmt;
use std::io;
use std::ops::Range;

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

    /// Whether there are data at `offset`, and for how many octets from there on that holds, `length` (not 0) at most and at
    /// least one; the rest reads as zeros. A file that cannot tell has data everywhere.
    ///
    /// # Errors
    /// The file cannot be asked.
    fn is_mapped(&self, _offset: u64, length: u64) -> io::Result<(bool, u64)> {
        Ok((true, length))
    }

    /// Ranges, in order, outside of which it is zero.
    ///
    /// # Errors
    /// As [`GoldenFile::is_mapped`].
    fn data_ranges(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(std::iter::once(0..self.byte_len()).collect())
    }
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

    /// Whether Ceph has data at `offset`, which lies in an object that is not the golden image's, and for how many octets
    /// from there on that holds, `length` (not 0) at most and at least one; the rest reads as zeros.
    ///
    /// # Errors
    /// As [`CloneObjects::read_at`].
    fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), RbdError>;
}

/// A clone that librbd has open here, and where its objects are, and those of the images between it and its golden image.
#[derive(Debug)]
pub struct OpenClone {
    image: Image,
    /// Its own first. The golden image is not among them.
    layers: Vec<DataObjects>,
    /// What none of them has is zero: it was flattened.
    stands_alone: bool,
}

/// Where an image's data objects are.
#[derive(Debug)]
struct DataObjects {
    pool: Pool,
    /// A dot and the object's number follow.
    prefix: String,
}

impl DataObjects {
    /// How long an object is, if it is there.
    fn octets(&self, object: u64) -> Result<Option<u64>, RbdError> {
        let name = format!("{}.{object:016x}", self.prefix);
        self.pool.handle().object_bytes(&c(&name)).map_err(RbdError::ceph("asking after", self.pool.path(&name)))
    }
}

impl OpenClone {
    /// A clone in `pool`, open also at a snapshot: which is not written to then. What it has not is read from `below`, its
    /// parent first; the last of them is the golden image.
    ///
    /// # Errors
    /// It is a clone of another image; or Ceph refuses.
    pub fn new(pool: &Pool, image: Image, below: &[ParentImage]) -> Result<Self, RbdError> {
        let mut layers = vec![DataObjects { pool: pool.clone(), prefix: image.data_prefix()? }];
        if image.parent()?.is_none() {
            return Ok(Self { image, layers, stands_alone: true });
        }
        let [between @ .., lowest] = below else {
            let detail = "is a clone, of nothing that is known".to_owned();
            return Err(RbdError::Malformed { object: image.path().to_owned(), detail });
        };
        image.check_parent(between.first().unwrap_or(lowest))?;
        for layer in between {
            let pool = pool.in_namespace(&layer.namespace)?;
            layers.push(DataObjects { pool, prefix: format!("rbd_data.{}", layer.id) });
        }
        Ok(Self { image, layers, stands_alone: false })
    }

    /// Finds which objects are not its golden image's any more: its own, and those of images in between, which are on Ceph
    /// too.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn own_objects(&self) -> Result<OwnObjects, RbdError> {
        let own = OwnObjects::new(self.image.byte_len(), self.image.object_bytes());
        if self.stands_alone {
            // All of it is its own, and what it has not is zero.
            own.take(&(0..self.image.byte_len()));
            return Ok(own);
        }
        for layer in &self.layers {
            at_once(own.count(), |object| {
                if layer.octets(object)?.is_some() {
                    own.take_object(object);
                }
                Ok(())
            })?;
        }
        Ok(own)
    }

    /// Octets of each of its objects but the last: a power of two.
    #[must_use]
    pub fn object_bytes(&self) -> u64 {
        self.image.object_bytes()
    }
}

impl CloneObjects for OpenClone {
    fn path(&self) -> &str {
        self.image.path()
    }

    fn byte_len(&self) -> u64 {
        self.image.byte_len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), RbdError> {
        self.image.read_at(offset, buffer)
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), RbdError> {
        let mut at = offset;
        for piece in pieces {
            self.image.write_at(at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), RbdError> {
        self.image.write_zeroes(offset, length)
    }

    fn flush(&self) -> Result<(), RbdError> {
        self.image.flush()
    }

    /// Looks at one object: the highest layer that has it hides those below, and what is behind an object's end is zero.
    fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), RbdError> {
        check_range(self.image.path(), offset, length, self.image.byte_len())?;
        let (object, within) = (offset / self.object_bytes(), offset % self.object_bytes());
        let length = length.min(self.object_bytes() - within);
        for layer in &self.layers {
            if let Some(octets) = layer.octets(object)? {
                return Ok(if within < octets { (true, length.min(octets - within)) } else { (false, length) });
            }
        }
        // Where there is a golden image: it was just taken over, and is not there yet.
        Ok((!self.stands_alone, length))
    }
}

/// A clone over its golden file. Calls block; any number of threads may make them at once. Only one process at a time may
/// have a clone open so: what another one takes over would not be seen.
#[derive(Debug)]
pub struct CloneDisk<G, C = OpenClone> {
    clone: C,
    golden: G,
    own: OwnObjects,
}

/// Requests in flight while objects are asked after.
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
        let clone = OpenClone::new(pool, image, layers)?;
        let own = clone.own_objects()?;
        Self::new(clone, golden, own)
    }
}

impl<G: GoldenFile, C: CloneObjects> CloneDisk<G, C> {
    /// A clone whose `own` objects are as [`OpenClone::own_objects`] found them.
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

    /// Whether there are data at `offset`, and for how many octets from there on that holds, `length` (not 0) at most and at
    /// least one; the rest reads as zeros.
    ///
    /// # Errors
    /// As [`CloneDisk::read_at`].
    pub fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), RbdError> {
        self.check_range(offset, length)?;
        let Some(run) = self.own.runs(offset..offset + length).next() else { return Ok((true, length)) };
        let length = run.range.end - run.range.start;
        if run.own {
            self.clone.is_mapped(offset, length)
        } else {
            self.golden.is_mapped(offset, length).map_err(self.golden_failed())
        }
    }

    /// Ranges, in order, outside of which the disk is zero. Asks after each object of the clone's.
    ///
    /// # Errors
    /// As [`CloneDisk::read_at`].
    pub fn data_ranges(&self) -> Result<Vec<Range<u64>>, RbdError> {
        let objects = self.own.own_ranges();
        let of = |range: &Range<u64>| {
            let (mut at, mut data) = (range.start, Vec::new());
            while at < range.end {
                let (mapped, octets) = self.clone.is_mapped(at, range.end - at)?;
                data.extend(mapped.then_some(at..at + octets));
                at += octets;
            }
            Ok(data)
        };
        let found = at_once(objects.len() as u64, |index| {
            usize::try_from(index).ok().and_then(|index| objects.get(index)).map_or(Ok(Vec::new()), of)
        })?;
        let mut own: Vec<Range<u64>> = found.into_iter().flatten().collect();
        own.sort_unstable_by_key(|range| range.start);
        let below = self.golden.data_ranges().map_err(self.golden_failed())?;
        Ok(data_of(self.own.runs(0..self.byte_len()), &own, &below))
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

/// Does `each` for every number below `count`, several at a time, and answers what came of them, in no order.
fn at_once<T: Send>(count: u64, each: impl Fn(u64) -> Result<T, RbdError> + Sync) -> Result<Vec<T>, RbdError> {
    let some = |first: u64| {
        let numbers = (first..count).step_by(usize::try_from(PROBES).unwrap_or(1));
        numbers.map(&each).collect::<Result<Vec<T>, RbdError>>()
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..PROBES.min(count)).map(|first| scope.spawn(move || some(first))).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(all)
    })
}

fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}
