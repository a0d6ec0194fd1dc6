//! The few system calls on files that the standard library does not have, and durable publication of a folder.

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::path::Path;

/// Fills `buffer` from `offset` if the page cache holds all of it (`preadv2` with `RWF_NOWAIT`). `false` also where
/// the file system cannot tell.
pub(crate) fn read_if_cached(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
    let wanted = buffer.len();
    match rustix::io::preadv2(file, &mut [IoSliceMut::new(buffer)], offset, ReadWriteFlags::NOWAIT) {
        Ok(got) => Ok(got == wanted),
        Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => Ok(false),
        Err(other) => Err(other.into()),
    }
}

/// Whether there are data at `offset`, not a hole, and for how many octets that holds, `length` at most.
pub(crate) fn has_data(file: &File, offset: u64, length: u64) -> io::Result<(bool, u64)> {
    let next = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(next) => next,
        // None up to the end.
        Err(Errno::NXIO) => return Ok((false, length)),
        Err(other) => return Err(other.into()),
    };
    if next > offset {
        return Ok((false, length.min(next - offset)));
    }
    let hole = rustix::fs::seek(file, SeekFrom::Hole(offset))?;
    Ok((true, length.min(hole.saturating_sub(offset)).max(1)))
}

/// An open file's size, asked by a call that a confined process may make: nobody here reads from where a file stands.
pub(crate) fn byte_len(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// The parts of `within` that the file system keeps octets for, in order; the rest is zero.
pub(crate) fn data_ranges(file: &File, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let (mut ranges, mut at) = (Vec::new(), within.start);
    while at < within.end {
        let (data, length) = has_data(file, at, within.end - at)?;
        if data {
            ranges.push(at..at + length);
        }
        at += length;
    }
    Ok(ranges)
}

/// Frees the range's blocks; it reads as zero from then on.
pub(crate) fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?;
    Ok(())
}

/// Reserves the file's first `length` octets, so that writing them later cannot fail for want of space.
pub(crate) fn reserve(file: &File, length: u64) -> io::Result<()> {
    rustix::fs::fallocate(file, FallocateFlags::empty(), 0, length)?;
    Ok(())
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
