//! A logical unit: carries out the engine's [`Io`] on a [`BlockDevice`].

use super::latency::Histogram;
use super::message::WorkerStatus;
use crate::store::device::{BlockDevice, DeviceError};
use assay_iscsi::{Io, IoFault, IoResult};
use assay_service::error::chain;
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

/// What a session reads and writes.
#[derive(Debug)]
pub(super) struct Unit {
    device: Arc<dyn BlockDevice>,
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
/// WRITE SAME writes this much at a time.
const FILL_BYTES: usize = 256 * 1024;

impl Unit {
    pub(super) fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self {
            device,
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
        self.device.byte_len() / self.block_bytes
    }

    /// Whether a write is for a thread that may wait.
    pub(super) fn writes_wait(&self) -> bool {
        self.device.writes_wait()
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

    /// Answers a read from the page cache, or not at all.
    pub(super) fn read_now(&self, lba: u64, blocks: u32, buffers: &mut Buffers) -> Option<IoResult> {
        let begun = Instant::now();
        let mut buffer = buffers.take(self.octets(blocks));
        match self.device.try_read_at(lba * self.block_bytes, &mut buffer) {
            Ok(true) => {
                self.reads.record(begun.elapsed());
                self.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
                Some(IoResult::Data(buffers.lend(buffer)))
            }
            Ok(false) => None,
            Err(error) => Some(fault("read", &error)),
        }
    }

    /// Carries out `io`, which was asked for at `begun`. Blocks.
    pub(super) fn perform(&self, io: Io, begun: Instant) -> IoResult {
        let took = match io {
            Io::Read { .. } => Some(&self.reads),
            Io::Write { .. } => Some(&self.writes),
            Io::Flush | Io::Unmap { .. } | Io::WriteSame { .. } | Io::CompareAndWrite { .. } | Io::Status { .. } => {
                None
            }
        };
        let result = self.carry_out(io);
        if let Some(histogram) = took {
            histogram.record(begun.elapsed());
        }
        result
    }

    fn carry_out(&self, io: Io) -> IoResult {
        match io {
            Io::Read { lba, blocks } => {
                let mut buffer = vec![0; self.octets(blocks)];
                match self.device.read_at(lba * self.block_bytes, &mut buffer) {
                    Ok(()) => {
                        self.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
                        IoResult::Data(buffer.into())
                    }
                    Err(error) => fault("read", &error),
                }
            }
            Io::Write { lba, data, fua } => done("write", self.write(lba, &data, fua)),
            Io::Flush => done("flush", self.device.flush()),
            Io::Unmap { ranges } => done("unmap", self.unmap(&ranges)),
            Io::WriteSame { lba, blocks, pattern, unmap: _ } => {
                done("write same", self.write_same(lba, blocks, &pattern))
            }
            Io::CompareAndWrite { lba, expected, new } => self.compare_and_write(lba, &expected, &new),
            Io::Status { lba } => IoResult::Status { mapped: true, blocks: self.blocks().saturating_sub(lba).max(1) },
        }
    }

    fn octets(&self, blocks: u32) -> usize {
        usize::try_from(u64::from(blocks) * self.block_bytes).unwrap_or(usize::MAX)
    }

    fn write(&self, lba: u64, data: &[Bytes], fua: bool) -> Result<(), DeviceError> {
        let _shared = self.comparing.read().unwrap_or_else(PoisonError::into_inner);
        let written: usize = data.iter().map(Bytes::len).sum();
        self.device.write_pieces_at(lba * self.block_bytes, data)?;
        self.written_bytes.fetch_add(written as u64, Ordering::Relaxed);
        if fua { self.device.flush() } else { Ok(()) }
    }

    fn unmap(&self, ranges: &[(u64, u32)]) -> Result<(), DeviceError> {
        let _shared = self.comparing.read().unwrap_or_else(PoisonError::into_inner);
        ranges.iter().try_for_each(|(lba, blocks)| {
            self.device.unmap(lba * self.block_bytes, u64::from(*blocks) * self.block_bytes)
        })
    }

    fn write_same(&self, lba: u64, blocks: u64, pattern: &[u8]) -> Result<(), DeviceError> {
        let _shared = self.comparing.read().unwrap_or_else(PoisonError::into_inner);
        let (start, length) = (lba * self.block_bytes, blocks * self.block_bytes);
        if pattern.iter().all(|octet| *octet == 0) {
            return self.device.unmap(start, length);
        }
        let fill = pattern.repeat(FILL_BYTES / pattern.len().max(1));
        let mut done = 0;
        while done < length {
            let part = usize::try_from(length - done).unwrap_or(usize::MAX).min(fill.len());
            self.device.write_at(start + done, &fill[..part])?;
            done += part as u64;
        }
        Ok(())
    }

    fn compare_and_write(&self, lba: u64, expected: &[u8], new: &[u8]) -> IoResult {
        let _alone = self.comparing.write().unwrap_or_else(PoisonError::into_inner);
        let mut found = vec![0; expected.len()];
        if let Err(error) = self.device.read_at(lba * self.block_bytes, &mut found) {
            return fault("compare", &error);
        }
        match found.iter().zip(expected).position(|(found, expected)| found != expected) {
            Some(offset) => IoResult::Miscompare { offset: u32::try_from(offset).unwrap_or(u32::MAX) },
            None => done("write", self.device.write_at(lba * self.block_bytes, new)),
        }
    }
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
