//! What a logical unit is made of: a fixed number of octets that can be read, written, flushed and unmapped.
//!
//! Calls block; the portal ([`crate::gateway`]) moves them off its event loop. [`BlockDevice::try_read_at`] is the
//! exception: it answers from the page cache or not at all, so that most reads never leave the event loop.

use bytes::Bytes;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;

/// Where part of a device lies in a file, as it is.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The file.
    pub file: &'a File,
    /// Where in it.
    pub offset: u64,
    /// How much of it, in octets.
    pub length: u64,
}

/// A block device. Offsets and lengths are in octets and need no alignment.
pub trait BlockDevice: fmt::Debug + Send + Sync + 'static {
    /// Size in octets.
    fn byte_len(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The range is outside the device, or the medium failed.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError>;

    /// Like [`BlockDevice::read_at`], if that needs no waiting; answers whether `buffer` was filled. When it answers
    /// `false` the buffer's content is unspecified.
    ///
    /// # Errors
    /// As [`BlockDevice::read_at`].
    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError>;

    /// Where the octets from `offset` on lie, as far as that is one file and `length` at most, if they may be sent from
    /// there as they are: nothing about them is left to check. The range lies on the device and is not empty.
    fn place_at(&self, _offset: u64, _length: u64) -> Option<Place<'_>> {
        None
    }

    /// Has a range checked and brought into the page cache, so that [`BlockDevice::place_at`] is likely to find it;
    /// answers whether it could. The range lies on the device and is not empty.
    ///
    /// # Errors
    /// As [`BlockDevice::read_at`].
    fn fetch(&self, _offset: u64, _length: u64) -> Result<bool, DeviceError> {
        Ok(false)
    }

    /// Whether the octet at `offset` takes room of a disk, and for how many octets from there on that holds, `length` at
    /// most and at least one; all the rest reads as zeros. The range lies on the device and is not empty. A device that
    /// cannot tell says that everything does.
    ///
    /// # Errors
    /// The medium failed.
    fn is_mapped(&self, _offset: u64, length: u64) -> Result<(bool, u64), DeviceError> {
        Ok((true, length))
    }

    /// Ranges, in order, outside of which the device is zero, as far as that is known without reading it; they may be zero
    /// themselves. Of what is never written to, always the same.
    ///
    /// # Errors
    /// The medium failed.
    fn data_ranges(&self) -> Result<Vec<Range<u64>>, DeviceError> {
        Ok(std::iter::once(0..self.byte_len()).collect())
    }

    /// Writes `data` at `offset`. It survives the end of this process at once, and a power cut after
    /// [`BlockDevice::flush`].
    ///
    /// # Errors
    /// The range is outside the device, the device is read-only (which it is unless it says how to write), the host's
    /// disk is full, or the medium failed.
    fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    /// Whether writes wait for more than the page cache.
    fn writes_wait(&self) -> bool {
        false
    }

    /// [`BlockDevice::write_at`] of several pieces, one behind the other.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn write_pieces_at(&self, offset: u64, pieces: &[Bytes]) -> Result<(), DeviceError> {
        pieces.iter().try_fold(offset, |at, piece| self.write_at(at, piece).map(|()| at + piece.len() as u64)).map(drop)
    }

    /// Makes `length` octets from `offset` read as zero, and gives their space back where that is possible.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    fn unmap(&self, _offset: u64, _length: u64) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnly)
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// The medium failed: writes since the last flush may be lost.
    fn flush(&self) -> Result<(), DeviceError>;
}

/// Why a block device did not do it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not all of the range lies on the device.
    #[error("{length} octets at {offset} are not within a device of {byte_len} octets")]
    OutOfRange {
        /// Where the range starts.
        offset: u64,
        /// How long it is.
        length: u64,
        /// How large the device is.
        byte_len: u64,
    },
    /// A golden image is never written.
    #[error("the device is read-only")]
    ReadOnly,
    /// The host's file system has no room. What was written before stays.
    #[error("no space left on the imaging host for a write at {offset}")]
    Full {
        /// Where the write was to go.
        offset: u64,
    },
    /// What the file holds is not what was imported.
    #[error("golden image block at {offset} does not match its hash")]
    Corrupt {
        /// Where the block starts.
        offset: u64,
    },
    /// An earlier flush failed, after which the kernel may claim that lost pages are clean.
    #[error("an earlier flush failed: the device takes no more writes until it is opened anew")]
    FlushFailedBefore,
    /// The host's disk or file system failed.
    #[error("{doing} at {offset}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Where.
        offset: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl DeviceError {
    /// Sorts an error of the operating system into [`DeviceError::Full`] and the rest.
    pub(crate) fn from_io(doing: &'static str, offset: u64, source: io::Error) -> Self {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge) {
            Self::Full { offset }
        } else {
            Self::Io { doing, offset, source }
        }
    }
}

/// Checks that a range lies on a device of `byte_len` octets.
pub(crate) fn check_range(offset: u64, length: u64, byte_len: u64) -> Result<(), DeviceError> {
    match offset.checked_add(length) {
        Some(end) if end <= byte_len => Ok(()),
        _ => Err(DeviceError::OutOfRange { offset, length, byte_len }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_at_the_device() {
        assert!(check_range(0, 512, 512).is_ok());
        assert!(check_range(512, 0, 512).is_ok());
        assert!(check_range(1, 512, 512).is_err());
        assert!(check_range(u64::MAX, 2, 512).is_err(), "the sum overflows");
    }

    #[test]
    fn every_way_of_being_full_is_full() {
        for errno in [28, 122, 27] {
            let full = DeviceError::from_io("writing", 4096, io::Error::from_raw_os_error(errno));
            assert!(matches!(full, DeviceError::Full { offset: 4096 }), "errno {errno}: {full:?}");
        }
        let other = DeviceError::from_io("writing", 0, io::Error::from_raw_os_error(5));
        assert!(matches!(other, DeviceError::Io { .. }));
    }
}
