//! A logical unit: carries out the engine's [`Io`] on a [`BlockDevice`].

use super::gate::Gate;
use super::latency::Histogram;
use super::message::WorkerStatus;
use crate::store::device::{BlockDevice, DeviceError, Place};
use crate::store::file::read_if_cached;
use assay_iscsi::{Io, IoFault, IoResult};
use assay_service::error::chain;
use bytes::{Bytes, BytesMut};
use rustix::fs::sendfile;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

/// What a session reads and writes.
#[derive(Debug)]
pub(super) struct Unit {
    /// Each command passes it once.
    pub(super) gate: Gate,
    block_bytes: u64,
    /// Held alone by COMPARE AND WRITE, shared by every other write.
    comparing: RwLock<()>,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    reads: Histogram,
    writes: Histogram,
}

/// Read buffers that went out and can be used again: neither allocated nor zeroed anew. One connection's.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    lent: VecDeque<Bytes>,
}

/// Buffers remembered, and octets in all of them.
const LENT: usize = 32;
const LENT_OCTETS: usize = 2 << 20;

impl Buffers {
    /// A buffer of exactly this length; its content is unspecified.
    fn take(&mut self, length: usize) -> BytesMut {
        // The one that was used last, since it is in the processor's cache.
        let free = self.lent.iter().rposition(|buffer| buffer.len() == length && buffer.is_unique());
        free.and_then(|index| self.lent.remove(index)?.try_into_mut().ok()).unwrap_or_else(|| BytesMut::zeroed(length))
    }

    fn lend(&mut self, buffer: BytesMut) -> Bytes {
        let buffer = buffer.freeze();
        let octets: usize = self.lent.iter().map(Bytes::len).sum();
        if octets + buffer.len() > LENT_OCTETS || self.lent.len() >= LENT {
            self.lent.pop_front();
        }
        self.lent.push_back(buffer.clone());
        buffer
    }
}

/// Logical block length of every unit here, in octets.
pub(crate) const BLOCK_BYTES: u32 = 512;
/// Reads from this length on are sent from the page cache as they are: below it, copying costs less than a further call.
const IN_PLACE_OCTETS: usize = 32 * 1024;
/// As long as the parts that they are sent in must be.
const PLACE_OCTETS: u64 = 16 * 1024;
/// How far apart the page cache is asked, in octets.
const PROBE_STEP: usize = 64 * 1024;
/// GET LBA STATUS looks so far, in octets, and through so many stretches: what holds beyond is not its to say.
const STATUS_OCTETS: u64 = 256 << 20;
const STATUS_RUNS: usize = 256;
/// WRITE SAME writes this much at a time.
const FILL_BYTES: usize = 256 * 1024;

impl Unit {
    pub(super) fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self {
            gate: Gate::new(device),
            block_bytes: u64::from(BLOCK_BYTES),
            comparing: RwLock::new(()),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            reads: Histogram::default(),
            writes: Histogram::default(),
        }
    }

    /// Logical blocks on the unit.
    pub(super) fn blocks(&self) -> u64 {
        self.gate.byte_len() / self.block_bytes
    }

    /// Whether a write is for a thread that may wait: for the device, or until the gate opens.
    pub(super) fn writes_wait(&self) -> bool {
        self.gate.pass_now().is_none_or(|device| device.writes_wait())
    }

    /// Octets and operations so far; who is logged in is not the unit's to say.
    pub(super) fn status(&self) -> WorkerStatus {
        WorkerStatus {
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            reads: self.reads.latency(),
            writes: self.writes.latency(),
            ..WorkerStatus::default()
        }
    }

    /// Answers a read from the page cache, or not at all. If `in_place` says so, long ones stay there until they are sent.
    pub(super) fn read_now(&self, lba: u64, blocks: u32, in_place: bool, buffers: &mut Buffers) -> Option<IoResult> {
        let begun = Instant::now();
        let device = &*self.gate.pass_now()?;
        let (start, length) = (lba * self.block_bytes, self.octets(blocks));
        if in_place && length >= IN_PLACE_OCTETS {
            match whereabouts(device, start, length as u64) {
                Whereabouts::AtHand => {
                    self.reads.record(begun.elapsed());
                    self.read_bytes.fetch_add(length as u64, Ordering::Relaxed);
                    return Some(IoResult::InPlace(start..start + length as u64));
                }
                // To be looked for in vain, it would need a buffer.
                Whereabouts::Away => return None,
                Whereabouts::Scattered => {}
            }
        }
        let mut buffer = buffers.take(length);
        match device.try_read_at(start, &mut buffer) {
            Ok(true) => {
                self.reads.record(begun.elapsed());
                self.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
                Some(IoResult::Data(buffers.lend(buffer)))
            }
            Ok(false) => None,
            Err(error) => Some(fault("read", &error)),
        }
    }

    /// Sends the first of these octets, which were found at hand, and answers how many. Fails where they cannot be read
    /// any more: it is too late to say so in the answer.
    pub(super) fn send(&self, socket: &OwnedFd, range: Range<u64>) -> rustix::io::Result<usize> {
        let left = range.end - range.start;
        let device = &*self.gate.pass();
        let sent = match device.place_at(range.start, left) {
            Some(Place { file, mut offset, length }) => {
                sendfile(socket, file, Some(&mut offset), usize::try_from(length).unwrap_or(usize::MAX))?
            }
            // The device was exchanged meanwhile, and what is below must be checked anew.
            None => {
                let mut buffer = vec![0; usize::try_from(left).unwrap_or(usize::MAX).min(FILL_BYTES)];
                if let Err(error) = device.read_at(range.start, &mut buffer) {
                    fault("read", &error);
                    return Err(Errno::IO);
                }
                rustix::net::send(socket, &buffer, SendFlags::NOSIGNAL)?
            }
        };
        // The file has become shorter.
        if sent == 0 { Err(Errno::IO) } else { Ok(sent) }
    }

    /// Carries out `io`, which was asked for at `begun`. Blocks. If `in_place` says so, what is long stays in the page cache
    /// until it is sent.
    pub(super) fn perform(&self, io: Io, in_place: bool, begun: Instant) -> IoResult {
        let took = match io {
            Io::Read { .. } => Some(&self.reads),
            Io::Write { .. } => Some(&self.writes),
            Io::Flush | Io::Unmap { .. } | Io::WriteSame { .. } | Io::CompareAndWrite { .. } | Io::Status { .. } => {
                None
            }
        };
        let result = self.carry_out(io, in_place);
        if let Some(histogram) = took {
            histogram.record(begun.elapsed());
        }
        result
    }

    fn carry_out(&self, io: Io, in_place: bool) -> IoResult {
        let device = &*self.gate.pass();
        match io {
            Io::Read { lba, blocks } => {
                let (start, length) = (lba * self.block_bytes, self.octets(blocks));
                match fetch_or_read(device, start, length, in_place && length >= IN_PLACE_OCTETS) {
                    Ok(result) => {
                        self.read_bytes.fetch_add(length as u64, Ordering::Relaxed);
                        result
                    }
                    Err(error) => fault("read", &error),
                }
            }
            Io::Write { lba, data, fua } => done("write", self.write(device, lba, &data, fua)),
            Io::Flush => done("flush", device.flush()),
            Io::Unmap { ranges } => done("unmap", self.unmap(device, &ranges)),
            Io::WriteSame { lba, blocks, pattern, unmap: _ } => {
                done("write same", self.write_same(device, lba, blocks, &pattern))
            }
            Io::CompareAndWrite { lba, expected, new } => self.compare_and_write(device, lba, &expected, &new),
            Io::Status { lba } => match self.status_from(device, lba) {
                Ok((mapped, blocks)) => IoResult::Status { mapped, blocks },
                Err(error) => fault("read", &error),
            },
        }
    }

    /// Whether the block at `lba` is mapped, and for how many blocks that holds, as far as is looked.
    fn status_from(&self, device: &dyn BlockDevice, lba: u64) -> Result<(bool, u64), DeviceError> {
        let start = lba * self.block_bytes;
        let end = device.byte_len().min(start.saturating_add(STATUS_OCTETS));
        let (first, mut at) = device.is_mapped(start, end - start).map(|(mapped, octets)| (mapped, start + octets))?;
        for _ in 1..STATUS_RUNS {
            if at >= end {
                break;
            }
            let (mapped, octets) = device.is_mapped(at, end - at)?;
            if mapped != first {
                break;
            }
            at += octets;
        }
        // What takes room in part is mapped.
        let blocks = if first { (at - start).div_ceil(self.block_bytes) } else { (at - start) / self.block_bytes };
        Ok((first || blocks == 0, blocks.max(1)))
    }

    fn octets(&self, blocks: u32) -> usize {
        usize::try_from(u64::from(blocks) * self.block_bytes).unwrap_or(usize::MAX)
    }

    fn write(&self, device: &dyn BlockDevice, lba: u64, data: &[Bytes], fua: bool) -> Result<(), DeviceError> {
        let _shared = self.comparing.read().unwrap_or_else(PoisonError::into_inner);
        let written: usize = data.iter().map(Bytes::len).sum();
        device.write_pieces_at(lba * self.block_bytes, data)?;
        self.written_bytes.fetch_add(written as u64, Ordering::Relaxed);
        if fua { device.flush() } else { Ok(()) }
    }

    fn unmap(&self, device: &dyn BlockDevice, ranges: &[(u64, u32)]) -> Result<(), DeviceError> {
        let _shared = self.comparing.read().unwrap_or_else(PoisonError::into_inner);
        ranges
            .iter()
            .try_for_each(|(lba, blocks)| device.unmap(lba * self.block_bytes, u64::from(*blocks) * self.block_bytes))
    }

    fn write_same(&self, device: &dyn BlockDevice, lba: u64, blocks: u64, pattern: &[u8]) -> Result<(), DeviceError> {
        let _shared = self.comparing.read().unwrap_or_else(PoisonError::into_inner);
        let (start, length) = (lba * self.block_bytes, blocks * self.block_bytes);
        if pattern.iter().all(|octet| *octet == 0) {
            return device.unmap(start, length);
        }
        let fill = pattern.repeat(FILL_BYTES / pattern.len().max(1));
        let mut done = 0;
        while done < length {
            let part = usize::try_from(length - done).unwrap_or(usize::MAX).min(fill.len());
            device.write_at(start + done, &fill[..part])?;
            done += part as u64;
        }
        Ok(())
    }

    fn compare_and_write(&self, device: &dyn BlockDevice, lba: u64, expected: &[u8], new: &[u8]) -> IoResult {
        let _alone = self.comparing.write().unwrap_or_else(PoisonError::into_inner);
        let mut found = vec![0; expected.len()];
        if let Err(error) = device.read_at(lba * self.block_bytes, &mut found) {
            return fault("compare", &error);
        }
        match found.iter().zip(expected).position(|(found, expected)| found != expected) {
            Some(offset) => IoResult::Miscompare { offset: u32::try_from(offset).unwrap_or(u32::MAX) },
            None => done("write", device.write_at(lba * self.block_bytes, new)),
        }
    }
}

/// Has a range be where it can be sent from, or reads it.
fn fetch_or_read(device: &dyn BlockDevice, start: u64, length: usize, in_place: bool) -> Result<IoResult, DeviceError> {
    let end = start + length as u64;
    if in_place
        && device.fetch(start, length as u64)?
        && whereabouts(device, start, length as u64) == Whereabouts::AtHand
    {
        return Ok(IoResult::InPlace(start..end));
    }
    let mut buffer = vec![0; length];
    device.read_at(start, &mut buffer)?;
    Ok(IoResult::Data(buffer.into()))
}

/// How a range can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whereabouts {
    /// From where it is, without waiting and in few pieces.
    AtHand,
    /// In too many pieces.
    Scattered,
    /// Not without waiting.
    Away,
}

/// The page cache is asked here and there, since files are read ahead in longer stretches: sending waits in the rare case
/// that it has forgotten what lies between.
fn whereabouts(device: &dyn BlockDevice, start: u64, length: u64) -> Whereabouts {
    let (mut at, end) = (start, start + length);
    while at < end {
        let Some(Place { file, offset, length }) = device.place_at(at, end - at) else { return Whereabouts::Away };
        if length < PLACE_OCTETS && length < end - at {
            return Whereabouts::Scattered;
        }
        let cached = |offset| matches!(read_if_cached(file, offset, &mut [0]), Ok(true));
        if !(offset..offset + length).step_by(PROBE_STEP).all(cached) || !cached(offset + length - 1) {
            return Whereabouts::Away;
        }
        at += length;
    }
    Whereabouts::AtHand
}

fn done(doing: &'static str, result: Result<(), DeviceError>) -> IoResult {
    match result {
        Ok(()) => IoResult::Done,
        Err(error) => fault(doing, &error),
    }
}

/// What the initiator is told; the log has the causes.
fn fault(doing: &'static str, error: &DeviceError) -> IoResult {
    tracing::error!(event = "unit.fault", doing, cause = chain(error), "I/O on a logical unit failed");
    IoResult::Failed(match (error, doing) {
        (DeviceError::Full { .. }, _) => IoFault::NoSpace,
        (DeviceError::Corrupt { .. }, _) | (_, "read" | "compare") => IoFault::Unreadable,
        (
            DeviceError::OutOfRange { .. }
            | DeviceError::ReadOnly
            | DeviceError::FlushFailedBefore
            | DeviceError::Io { .. },
            _,
        ) => IoFault::Unwritable,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::import::Source;
    use crate::store::overlay::{DiskFiles, HostBoot, Overlay};
    use crate::store::{ImageStore as _, LocalStore};
    use assay_wire::id::{DiskId, ImageKey};
    use assay_wire::imaging::ImageFormat;
    use std::io::Read as _;
    use std::ops::ControlFlow;
    use std::os::unix::net::UnixStream;

    const OCTETS: usize = 1 << 20;

    /// A clone of an image that differs everywhere.
    fn clone_in(folder: &std::path::Path) -> Unit {
        clone_of(folder, |at| u8::try_from(at / 7 % 251).unwrap())
    }

    /// A clone of an image of this content.
    fn clone_of(folder: &std::path::Path, content: impl Fn(usize) -> u8) -> Unit {
        let source = folder.join("source.raw");
        std::fs::write(&source, (0..OCTETS).map(content).collect::<Vec<_>>()).unwrap();
        let root = folder.join("store");
        let store = LocalStore::open(&root).unwrap();
        let source = Source::open(&source, ImageFormat::Raw, &[folder.to_owned()]).unwrap();
        let (image, disk, project) = (ImageKey::random(), DiskId::random(), "p1".parse().unwrap());
        store.import(image, &project, &source, &mut |_, _| ControlFlow::Continue(())).unwrap();
        store.create_disk(disk, &project, image).unwrap();
        let files = DiskFiles::open(&root, disk).unwrap();
        Unit::new(Arc::new(Overlay::open(files, HostBoot::current().unwrap()).unwrap()))
    }

    /// What arrives when a range is sent in place.
    fn sent(unit: &Unit, range: Range<u64>) -> Vec<u8> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let ours = OwnedFd::from(ours);
        let mut received = vec![0; usize::try_from(range.end - range.start).unwrap()];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut at = range.start;
                while at < range.end {
                    at += unit.send(&ours, at..range.end).unwrap() as u64;
                }
            });
            theirs.read_exact(&mut received).unwrap();
        });
        received
    }

    #[test]
    fn what_was_checked_and_is_cached_is_sent_from_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (unit, mut buffers) = (clone_in(folder.path()), Buffers::default());
        let blocks = u32::try_from(OCTETS).unwrap() / BLOCK_BYTES;
        assert_eq!(unit.read_now(0, blocks, true, &mut buffers), None, "nothing is checked yet");
        for (lba, data) in [(128, vec![1; 64 << 10]), (1024, vec![2; 128 << 10])] {
            let write = Io::Write { lba, data: vec![data.into()], fua: false };
            assert_eq!(unit.perform(write, false, Instant::now()), IoResult::Done);
        }
        let IoResult::Data(data) = unit.perform(Io::Read { lba: 0, blocks }, false, Instant::now()) else { panic!() };
        assert_eq!(unit.read_now(0, blocks, true, &mut buffers), Some(IoResult::InPlace(0..OCTETS as u64)));
        assert_eq!(sent(&unit, 0..OCTETS as u64), data);
        assert_eq!(sent(&unit, 70_001..200_000), data[70_001..200_000]);
        let into_memory = unit.read_now(0, blocks, false, &mut buffers);
        assert_eq!(into_memory, Some(IoResult::Data(data)), "where it may not be");
    }

    #[test]
    fn what_takes_no_room_is_not_mapped() {
        let folder = tempfile::tempdir().unwrap();
        let unit = clone_of(folder.path(), |at| if (256 << 10..512 << 10).contains(&at) { 0 } else { 7 });
        let status = |lba| match unit.perform(Io::Status { lba }, false, Instant::now()) {
            IoResult::Status { mapped, blocks } => (mapped, blocks),
            other => panic!("{other:?}"),
        };
        let blocks = OCTETS as u64 / u64::from(BLOCK_BYTES);
        assert_eq!((status(0), status(511)), ((true, 512), (true, 1)));
        assert_eq!((status(512), status(1000)), ((false, 512), (false, 24)), "a hole of the golden image");
        assert_eq!(status(1024), (true, blocks - 1024));
        // Written over the end of the hole, and unmapped after it: one stretch each, whatever file it is in.
        let write = Io::Write { lba: 1016, data: vec![vec![3; 4096].into()], fua: false };
        assert_eq!(unit.perform(write, false, Instant::now()), IoResult::Done);
        assert_eq!(unit.perform(Io::Unmap { ranges: vec![(1536, 512)] }, false, Instant::now()), IoResult::Done);
        assert_eq!((status(512), status(1016)), ((false, 504), (true, 520)));
        assert_eq!(status(1536), (false, blocks - 1536));
        let IoResult::Data(data) = unit.perform(Io::Read { lba: 1536, blocks: 512 }, false, Instant::now()) else {
            panic!()
        };
        assert!(data.iter().all(|octet| *octet == 0));
    }

    #[test]
    fn what_lies_scattered_is_copied() {
        let folder = tempfile::tempdir().unwrap();
        let (unit, mut buffers) = (clone_in(folder.path()), Buffers::default());
        for granule in (0..32).step_by(2) {
            let write = Io::Write { lba: granule * 8, data: vec![vec![3; 4096].into()], fua: false };
            assert_eq!(unit.perform(write, false, Instant::now()), IoResult::Done);
        }
        let IoResult::Data(data) = unit.perform(Io::Read { lba: 0, blocks: 256 }, false, Instant::now()) else {
            panic!()
        };
        assert_eq!(unit.read_now(0, 256, true, &mut buffers), Some(IoResult::Data(data)));
    }

    #[test]
    fn what_is_not_checked_any_more_is_checked_before_it_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        let unit = clone_in(folder.path());
        let IoResult::Data(data) = unit.perform(Io::Read { lba: 0, blocks: 256 }, false, Instant::now()) else {
            panic!()
        };
        // Opened anew, the device knows of no block that was checked.
        let anew = clone_in(&folder.path().join("store"));
        assert_eq!(sent(&anew, 512..100_000), data[512..100_000]);
    }
}
