//! A disk in memory that knows which blocks are allocated.

use assay_iscsi::{Io, IoResult};
use bytes::Bytes;
use std::ops::Range;
use std::sync::Mutex;

/// The disk.
pub(crate) struct RamDisk {
    block_bytes: usize,
    state: Mutex<State>,
}

struct State {
    data: Vec<u8>,
    mapped: Vec<bool>,
}

impl RamDisk {
    /// A disk of zeros, nothing allocated.
    pub(crate) fn new(blocks: u64, block_bytes: u32) -> Self {
        let (blocks, block_bytes) = (usize::try_from(blocks).unwrap(), block_bytes as usize);
        let state = State { data: vec![0; blocks * block_bytes], mapped: vec![false; blocks] };
        Self { block_bytes, state: Mutex::new(state) }
    }

    /// Where the data of a read are.
    pub(crate) fn place(&self, lba: u64, blocks: u32) -> IoResult {
        let block_bytes = self.block_bytes as u64;
        IoResult::InPlace(lba * block_bytes..(lba + u64::from(blocks)) * block_bytes)
    }

    /// What is there.
    pub(crate) fn octets(&self, range: Range<u64>) -> Vec<u8> {
        let at = |octet: u64| usize::try_from(octet).unwrap();
        self.state.lock().unwrap().data[at(range.start)..at(range.end)].to_vec()
    }

    /// Runs one operation.
    pub(crate) fn run(&self, io: Io) -> IoResult {
        let mut state = self.state.lock().unwrap();
        let octets = |lba: u64| usize::try_from(lba).unwrap() * self.block_bytes;
        match io {
            Io::Read { lba, blocks } => {
                let range = octets(lba)..octets(lba + u64::from(blocks));
                return IoResult::Data(Bytes::copy_from_slice(&state.data[range]));
            }
            Io::Write { lba, data, fua: _ } => self.write(&mut state, lba, &data.concat()),
            Io::Flush => {}
            Io::Unmap { ranges } => {
                for (lba, blocks) in ranges {
                    self.unmap(&mut state, lba, u64::from(blocks));
                }
            }
            Io::WriteSame { lba, blocks, pattern: _, unmap: true } => self.unmap(&mut state, lba, blocks),
            Io::WriteSame { lba, blocks, pattern, unmap: false } => {
                for block in lba..lba + blocks {
                    self.write(&mut state, block, &pattern);
                }
            }
            Io::CompareAndWrite { lba, expected, new } => {
                let found = &state.data[octets(lba)..octets(lba) + expected.len()];
                if let Some(offset) = found.iter().zip(&expected).position(|(found, expected)| found != expected) {
                    return IoResult::Miscompare { offset: u32::try_from(offset).unwrap() };
                }
                self.write(&mut state, lba, &new);
            }
            Io::Status { lba } => {
                let from = &state.mapped[usize::try_from(lba).unwrap()..];
                let blocks = from.iter().take_while(|mapped| **mapped == from[0]).count() as u64;
                return IoResult::Status { mapped: from[0], blocks };
            }
        }
        IoResult::Done
    }

    fn write(&self, state: &mut State, lba: u64, data: &[u8]) {
        let first = usize::try_from(lba).unwrap();
        state.data[first * self.block_bytes..][..data.len()].copy_from_slice(data);
        state.mapped[first..first + data.len() / self.block_bytes].fill(true);
    }

    fn unmap(&self, state: &mut State, lba: u64, blocks: u64) {
        let (first, blocks) = (usize::try_from(lba).unwrap(), usize::try_from(blocks).unwrap());
        state.data[first * self.block_bytes..][..blocks * self.block_bytes].fill(0);
        state.mapped[first..first + blocks].fill(false);
    }
}
