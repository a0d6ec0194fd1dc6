//! Disks and snapshots on Ceph as block devices: what nothing above the golden image has is read from its file on this
//! host, each block checked.

use super::sweeper::Reader;
use crate::store::device::{BlockDevice, DeviceError, check_range};
use crate::store::golden::GoldenImage;
use assay_rbd::{CloneDisk, GoldenFile, RbdError};
use std::io;

/// A golden image as a clone reads it.
#[derive(Debug)]
pub(super) struct Checked(pub(super) GoldenImage);

impl GoldenFile for Checked {
    fn byte_len(&self) -> u64 {
        self.0.byte_len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer).map_err(io::Error::other)
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        self.0.try_read_at(offset, buffer).map_err(io::Error::other)
    }
}

/// A clone, open here. One that is open at a snapshot is not written to.
#[derive(Debug)]
pub(super) struct CloneDevice {
    disk: CloneDisk<Checked>,
    _reader: Reader,
}

impl CloneDevice {
    pub(super) fn new(disk: CloneDisk<Checked>, reader: Reader) -> Self {
        Self { disk, _reader: reader }
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        check_range(offset, length, self.disk.byte_len())
    }
}

impl BlockDevice for CloneDevice {
    fn byte_len(&self) -> u64 {
        self.disk.byte_len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.check(offset, buffer.len() as u64)?;
        self.disk.read_at(offset, buffer).map_err(|error| failed("reading a disk on Ceph", offset, error))
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
        self.check(offset, buffer.len() as u64)?;
        self.disk.try_read_at(offset, buffer).map_err(|error| failed("reading a disk on Ceph", offset, error))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check(offset, data.len() as u64)?;
        self.disk.write_at(offset, data).map_err(|error| failed("writing to a disk on Ceph", offset, error))
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        self.check(offset, length)?;
        self.disk.unmap(offset, length).map_err(|error| failed("unmapping part of a disk on Ceph", offset, error))
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.disk.flush().map_err(|error| failed("flushing a disk on Ceph", 0, error))
    }
}

/// What Ceph says, sorted as the rest of imaging tells it apart.
fn failed(doing: &'static str, offset: u64, error: RbdError) -> DeviceError {
    match error {
        RbdError::ReadOnly { .. } => DeviceError::ReadOnly,
        RbdError::Ceph { source, .. } => DeviceError::from_io(doing, offset, source),
        RbdError::File { source, .. } => match source.downcast::<DeviceError>() {
            Ok(error) => error,
            Err(source) => DeviceError::Io { doing, offset, source },
        },
        other => DeviceError::Io { doing, offset, source: io::Error::other(other) },
    }
}
