//! Disks and snapshots on Ceph as block devices: what nothing above the golden image has is read from its file on this
//! host, each block checked.

use super::sweeper::Reader;
use crate::store::device::{BlockDevice, DeviceError, Place};
use crate::store::golden::GoldenImage;
use assay_rbd::{CloneDisk, CloneObjects, GoldenFile, RbdError};
use bytes::Bytes;
use std::io;
use std::ops::Range;

impl GoldenFile for GoldenImage {
    fn byte_len(&self) -> u64 {
        BlockDevice::byte_len(self)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        BlockDevice::read_at(self, offset, buffer).map_err(io::Error::other)
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        BlockDevice::try_read_at(self, offset, buffer).map_err(io::Error::other)
    }

    fn is_mapped(&self, offset: u64, length: u64) -> io::Result<(bool, u64)> {
        BlockDevice::is_mapped(self, offset, length).map_err(io::Error::other)
    }

    fn data_ranges(&self) -> io::Result<Vec<Range<u64>>> {
        BlockDevice::data_ranges(self).map_err(io::Error::other)
    }
}

/// Wherever the clone's own objects are: behind librbd here, or behind a companion's channels. Writes wait for the network.
impl<C: CloneObjects + 'static> BlockDevice for CloneDisk<GoldenImage, C> {
    fn byte_len(&self) -> u64 {
        self.byte_len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.read_at(offset, buffer).map_err(at(offset))
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
        self.try_read_at(offset, buffer).map_err(at(offset))
    }

    fn place_at(&self, offset: u64, length: u64) -> Option<Place<'_>> {
        let (golden, octets) = self.golden_at(offset, length)?;
        golden.place_at(offset, octets)
    }

    fn fetch(&self, offset: u64, length: u64) -> Result<bool, DeviceError> {
        match self.golden_at(offset, length) {
            Some((golden, octets)) if octets == length => golden.fetch(offset, length),
            _ => Ok(false),
        }
    }

    fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), DeviceError> {
        self.is_mapped(offset, length).map_err(at(offset))
    }

    fn data_ranges(&self) -> Result<Vec<Range<u64>>, DeviceError> {
        self.data_ranges().map_err(at(0))
    }

    fn writes_wait(&self) -> bool {
        true
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.write_at(offset, data).map_err(at(offset))
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[Bytes]) -> Result<(), DeviceError> {
        let pieces: Vec<&[u8]> = pieces.iter().map(AsRef::as_ref).collect();
        self.write_pieces_at(offset, &pieces).map_err(at(offset))
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        self.unmap(offset, length).map_err(at(offset))
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.flush().map_err(at(0))
    }
}

/// What failed at `offset`, as any device says it.
fn at(offset: u64) -> impl FnOnce(RbdError) -> DeviceError {
    move |error| match error {
        RbdError::OutOfRange { offset, length, byte_len, .. } => DeviceError::OutOfRange { offset, length, byte_len },
        RbdError::ReadOnly { .. } => DeviceError::ReadOnly,
        RbdError::Ceph { doing, source, .. } => DeviceError::from_io(doing, offset, source),
        // The golden file's own error.
        RbdError::File { doing, source, .. } => {
            source.downcast::<DeviceError>().unwrap_or_else(|source| DeviceError::Io { doing, offset, source })
        }
        other => DeviceError::Io { doing: "using a clone", offset, source: io::Error::other(other) },
    }
}

/// A clone, open here. One that is open at a snapshot is not written to.
#[derive(Debug)]
pub(super) struct CloneDevice {
    disk: CloneDisk<GoldenImage>,
    _reader: Reader,
}

impl CloneDevice {
    pub(super) fn new(disk: CloneDisk<GoldenImage>, reader: Reader) -> Self {
        Self { disk, _reader: reader }
    }
}

impl BlockDevice for CloneDevice {
    fn byte_len(&self) -> u64 {
        BlockDevice::byte_len(&self.disk)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        BlockDevice::read_at(&self.disk, offset, buffer)
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
        BlockDevice::try_read_at(&self.disk, offset, buffer)
    }

    fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), DeviceError> {
        BlockDevice::is_mapped(&self.disk, offset, length)
    }

    fn data_ranges(&self) -> Result<Vec<Range<u64>>, DeviceError> {
        BlockDevice::data_ranges(&self.disk)
    }

    fn writes_wait(&self) -> bool {
        self.disk.writes_wait()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        BlockDevice::write_at(&self.disk, offset, data)
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[Bytes]) -> Result<(), DeviceError> {
        BlockDevice::write_pieces_at(&self.disk, offset, pieces)
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        BlockDevice::unmap(&self.disk, offset, length)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        BlockDevice::flush(&self.disk)
    }
}
