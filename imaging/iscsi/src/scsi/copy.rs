//! EXTENDED COPY and RECEIVE COPY RESULTS (SPC-4 §6.4, §6.20, the LID1 forms): copies within the unit, which is how a
//! hypervisor clones a file without moving it over the network. A copy names nothing but the unit itself, so it can
//! reach nothing that the initiator could not read and write anyway.
//!
//! Everything is checked before the first block is copied; then one piece at a time is read and written.

use super::block::{Finished, Purpose};
use super::inquiry::unit_designators;
use super::unit::{Nexus, UnitState};
use super::{Cdb, Completion, Plan, Refusal, Sense, cut, opcodes};
use crate::io::{Io, IoFault};
use crate::target::{LogicalUnitConfig, Target, TargetConfig};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

/// Most target descriptors of one command: source and destination, which are the same.
const MAX_TARGETS: u16 = 2;
/// Most segment descriptors of one command.
const MAX_SEGMENTS: u16 = 8;
const HEADER_OCTETS: usize = 16;
const TARGET_OCTETS: usize = 32;
const SEGMENT_OCTETS: usize = 28;
/// Longest descriptor lists, both together.
const MAX_DESCRIPTOR_OCTETS: usize = MAX_TARGETS as usize * TARGET_OCTETS + MAX_SEGMENTS as usize * SEGMENT_OCTETS;
/// Most octets read at once.
const PIECE_OCTETS: u32 = 1024 * 1024;
/// Copies whose status is kept, over all nexuses.
const KEPT_LIMIT: u8 = 16;
/// Block to block segments, and targets named by a designator of page 83h (SPC-4 tables 122, 124).
const BLOCK_TO_BLOCK: u8 = 0x02;
const BY_DESIGNATOR: u8 = 0xe4;

/// A copy under way.
#[derive(Debug)]
pub(crate) struct Copy {
    segments: VecDeque<Segment>,
    progress: Arc<Progress>,
}

/// What is left of one segment, in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    source: u64,
    destination: u64,
    blocks: u32,
}

/// How far a copy is, for RECEIVE COPY RESULTS. A copy that is gone before all its segments were copied has failed.
#[derive(Debug)]
struct Progress {
    segments: u16,
    segments_done: AtomicU16,
    octets: AtomicU64,
}

impl Progress {
    /// COPY MANAGER STATUS (SPC-4 table 279): in progress, completed, completed with errors.
    fn status(self: &Arc<Self>) -> u8 {
        if self.segments_done.load(Ordering::Acquire) == self.segments {
            1
        } else if Arc::strong_count(self) > 1 {
            0
        } else {
            2
        }
    }
}

/// The copies of a unit that RECEIVE COPY RESULTS can be asked about.
#[derive(Debug, Default)]
pub(crate) struct Copies(VecDeque<Kept>);

#[derive(Debug)]
struct Kept {
    nexus: Nexus,
    list: u8,
    progress: Arc<Progress>,
}

impl Copies {
    /// A nexus is gone: so is what was kept for it.
    pub(super) fn forget(&mut self, nexus: Nexus) {
        self.0.retain(|kept| kept.nexus != nexus);
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    fn find(&self, nexus: Nexus, list: u8) -> Option<&Arc<Progress>> {
        self.0.iter().find(|kept| (kept.nexus, kept.list) == (nexus, list)).map(|kept| &kept.progress)
    }

    /// Keeps the progress of a copy in place of an older one with its number.
    fn keep(&mut self, nexus: Nexus, list: u8, progress: Arc<Progress>) -> Result<(), Refusal> {
        if self.find(nexus, list).is_some_and(|progress| progress.status() == 0) {
            return Err(Sense::OPERATION_IN_PROGRESS.into());
        }
        self.0.retain(|kept| (kept.nexus, kept.list) != (nexus, list));
        if self.0.len() == usize::from(KEPT_LIMIT) {
            self.0.pop_front();
        }
        self.0.push_back(Kept { nexus, list, progress });
        Ok(())
    }
}

impl Copy {
    /// The next piece, or nothing when all is copied. Overlapping ranges are copied from the end that is not
    /// overwritten first.
    fn next(&mut self, block_bytes: u32) -> Option<Piece> {
        let segment = self.segments.front_mut()?;
        let blocks = segment.blocks.min(PIECE_OCTETS / block_bytes);
        let left = segment.blocks - blocks;
        let at = if segment.destination > segment.source { u64::from(left) } else { 0 };
        let piece = Piece { source: segment.source + at, destination: segment.destination + at, blocks };
        if at == 0 {
            segment.source += u64::from(blocks);
            segment.destination += u64::from(blocks);
        }
        segment.blocks = left;
        Some(piece)
    }

    /// A piece is written: segments that are through, and those of no blocks, make way for the next.
    fn written(&mut self, octets: u64) {
        self.progress.octets.fetch_add(octets, Ordering::Relaxed);
        while self.segments.front().is_some_and(|segment| segment.blocks == 0) {
            self.segments.pop_front();
            self.progress.segments_done.fetch_add(1, Ordering::Release);
        }
    }

    fn go_on(mut self: Box<Self>, block_bytes: u32) -> Option<(Io, Completion)> {
        let Piece { source, destination, blocks } = self.next(block_bytes)?;
        let completion = Completion::CopyRead { copy: self, destination, octets: blocks * block_bytes, block_bytes };
        Some((Io::Read { lba: source, blocks }, completion))
    }
}

/// One read and one write.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    source: u64,
    destination: u64,
    blocks: u32,
}

/// EXTENDED COPY: plans to collect the parameter list.
pub(super) fn plan(cdb: &Cdb) -> Result<Plan, Refusal> {
    if cdb.service_action() != 0 {
        return Err(Sense::invalid_octet(1).into());
    }
    match cdb.word(10) as usize {
        0 => Ok(Plan::Good),
        octets if (HEADER_OCTETS..=HEADER_OCTETS + MAX_DESCRIPTOR_OCTETS).contains(&octets) => {
            Ok(Plan::Collect(cdb.word(10), Purpose::ExtendedCopy))
        }
        _ => Err(Sense::PARAMETER_LIST_LENGTH.into()),
    }
}

/// EXTENDED COPY with its parameter list.
pub(super) fn start(target: &Target, nexus: Nexus, list: &[u8]) -> Result<Plan, Refusal> {
    let config = target.config();
    let header = list.get(..HEADER_OCTETS).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    let target_octets = usize::from(half(header, 2));
    let segment_octets = word(header, 8) as usize;
    let descriptors = &list[HEADER_OCTETS..];
    // No inline data: no segment that is understood uses them.
    if word(header, 12) != 0 || target_octets.saturating_add(segment_octets) > descriptors.len() {
        return Err(Sense::PARAMETER_LIST_LENGTH.into());
    }
    let (targets, rest) = descriptors.split_at(target_octets);
    let targets = check_targets(config, targets)?;
    let segments = read_segments(&config.logical_unit, targets, &rest[..segment_octets])?;
    let progress = Arc::new(Progress {
        segments: u16::try_from(segments.len()).unwrap_or(MAX_SEGMENTS),
        segments_done: AtomicU16::new(0),
        octets: AtomicU64::new(0),
    });
    // LIST ID USAGE 11b: there is no number to ask by. 10b may be forgotten at once, and is not.
    if (header[1] >> 3) & 3 != 3 {
        target.unit().copies.keep(nexus, header[0], progress.clone())?;
    }
    let mut copy = Box::new(Copy { segments, progress });
    copy.written(0);
    Ok(match copy.go_on(config.logical_unit.block_bytes) {
        Some((io, completion)) => Plan::Io(io, completion),
        None => Plan::Good,
    })
}

/// How many targets the list names; each must be this unit.
fn check_targets(config: &TargetConfig, list: &[u8]) -> Result<u16, Refusal> {
    let mut rest = list;
    let mut count = 0;
    while let Some(kind) = rest.first() {
        if *kind != BY_DESIGNATOR {
            return Err(Sense::UNSUPPORTED_TARGET.into());
        }
        let descriptor = rest.get(..TARGET_OCTETS).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        if count == MAX_TARGETS {
            return Err(Sense::TOO_MANY_TARGETS.into());
        }
        check_target(config, descriptor)?;
        count += 1;
        rest = &rest[TARGET_OCTETS..];
    }
    Ok(count)
}

/// An identification descriptor (SPC-4 §6.4.5.3) must name this unit, with its block length.
fn check_target(config: &TargetConfig, descriptor: &[u8]) -> Result<(), Refusal> {
    // A direct-access block device. LU ID TYPE says nothing where there is no LU IDENTIFIER field, as here.
    if descriptor[1] & 0x1f != 0 {
        return Err(Sense::INVALID_FIELD_IN_LIST.into());
    }
    // NUL: there is no such target.
    if descriptor[1] & 0x20 != 0 {
        return Err(Sense::COPY_TARGET_UNREACHABLE.into());
    }
    let octets = usize::from(descriptor[7]);
    let name = descriptor[8..28].get(..octets).ok_or(Sense::INVALID_FIELD_IN_LIST)?;
    let is_ours = |own: &[u8]| {
        let [code_set, kind, _, _, own_name @ ..] = own else { return false };
        (*code_set, *kind, own_name) == (descriptor[4] & 0x0f, descriptor[5] & 0x3f, name)
    };
    if !unit_designators(config).iter().any(|own| is_ours(own)) {
        return Err(Sense::COPY_TARGET_UNREACHABLE.into());
    }
    if word(descriptor, 28) & 0x00ff_ffff != config.logical_unit.block_bytes {
        return Err(Sense::INVALID_FIELD_IN_LIST.into());
    }
    Ok(())
}

fn read_segments(unit: &LogicalUnitConfig, targets: u16, list: &[u8]) -> Result<VecDeque<Segment>, Refusal> {
    let mut segments = VecDeque::new();
    let mut rest = list;
    while let Some(kind) = rest.first() {
        if *kind != BLOCK_TO_BLOCK {
            return Err(Sense::UNSUPPORTED_SEGMENT.into());
        }
        let descriptor = rest.get(..SEGMENT_OCTETS).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        if segments.len() == usize::from(MAX_SEGMENTS) {
            return Err(Sense::TOO_MANY_SEGMENTS.into());
        }
        if usize::from(half(descriptor, 2)) != SEGMENT_OCTETS - 4 {
            return Err(Sense::INVALID_FIELD_IN_LIST.into());
        }
        if half(descriptor, 4) >= targets || half(descriptor, 6) >= targets {
            return Err(Sense::COPY_TARGET_UNREACHABLE.into());
        }
        let blocks = u32::from(half(descriptor, 10));
        let segment = Segment { source: double(descriptor, 12), destination: double(descriptor, 20), blocks };
        let fits = |lba: u64| lba.checked_add(u64::from(blocks)).is_some_and(|end| end <= unit.blocks);
        if !fits(segment.source) || !fits(segment.destination) {
            return Err(Sense::COPY_ABORTED.into());
        }
        segments.push_back(segment);
        rest = &rest[SEGMENT_OCTETS..];
    }
    Ok(segments)
}

/// A piece was read: writes it.
pub(super) fn piece_read(copy: Box<Copy>, destination: u64, data: Bytes, block_bytes: u32) -> Finished {
    let octets = data.len() as u64;
    let io = Io::Write { lba: destination, data: vec![data], fua: false };
    Finished::Io(io, Completion::CopyWrite { copy, octets, block_bytes })
}

/// A piece was written: reads the next.
pub(super) fn piece_written(mut copy: Box<Copy>, octets: u64, block_bytes: u32) -> Finished {
    copy.written(octets);
    match copy.go_on(block_bytes) {
        Some((io, completion)) => Finished::Io(io, completion),
        None => Finished::Good,
    }
}

/// A piece failed. What was copied before stays copied.
pub(super) fn refusal(fault: IoFault) -> Refusal {
    match fault {
        IoFault::NoSpace => Sense::NO_SPACE.into(),
        IoFault::Cancelled => Sense::ABORTED.into(),
        IoFault::Unreadable | IoFault::Unwritable | IoFault::Unavailable => Sense::COPY_DEVICE_FAILED.into(),
    }
}

/// RECEIVE COPY RESULTS: how a copy went, and what there is.
pub(super) fn results(config: &LogicalUnitConfig, unit: &UnitState, nexus: Nexus, cdb: &Cdb) -> Result<Plan, Refusal> {
    let mut data = match cdb.service_action() {
        opcodes::COPY_STATUS => {
            let progress = unit.copies.find(nexus, cdb.octet(2)).ok_or(Sense::invalid_octet(2))?;
            let [high, low] = progress.segments_done.load(Ordering::Acquire).to_be_bytes();
            // Transfer count in blocks of 1 KiB (units code 1).
            let copied = u32::try_from(progress.octets.load(Ordering::Relaxed) / 1024).unwrap_or(u32::MAX);
            [&[0, 0, 0, 0, progress.status(), high, low, 1][..], &copied.to_be_bytes()].concat()
        }
        opcodes::COPY_PARAMETERS => parameters(config),
        _ => return Err(Sense::invalid_octet(1).into()),
    };
    // AVAILABLE DATA: what follows it.
    let available = u32::try_from(data.len() - 4).unwrap_or(0);
    data[..4].copy_from_slice(&available.to_be_bytes());
    Ok(cut(data, cdb.word(10) as usize))
}

/// Operating parameters (SPC-4 §6.20.4).
fn parameters(config: &LogicalUnitConfig) -> Vec<u8> {
    let mut data = vec![0; 44];
    // SNLID: a copy without a list identifier is understood.
    data[4] = 0x01;
    data[8..10].copy_from_slice(&MAX_TARGETS.to_be_bytes());
    data[10..12].copy_from_slice(&MAX_SEGMENTS.to_be_bytes());
    data[12..16].copy_from_slice(&descriptor_limit().to_be_bytes());
    data[16..20].copy_from_slice(&segment_limit(config).to_be_bytes());
    // Concurrent copies: as many as there are kept.
    data[35] = KEPT_LIMIT;
    data[36] = KEPT_LIMIT;
    data[37] = granularity(config);
    data[43] = 2;
    data.extend_from_slice(&[BLOCK_TO_BLOCK, BY_DESIGNATOR]);
    data
}

/// Third-party copy (page 8Fh, SPC-4 §7.8.17): the same, for those who look there.
pub(super) fn vital_page(config: &LogicalUnitConfig) -> Vec<u8> {
    let mut data = Vec::new();
    let mut descriptor = |kind: u16, body: &[u8]| {
        let padded = body.len().next_multiple_of(4);
        data.extend_from_slice(&kind.to_be_bytes());
        data.extend_from_slice(&u16::try_from(padded).unwrap_or(0).to_be_bytes());
        data.extend_from_slice(body);
        data.resize(data.len() + padded - body.len(), 0);
    };
    // Supported commands, with the service actions of each.
    let commands = [
        &[7, opcodes::EXTENDED_COPY, 1, 0x00][..],
        &[opcodes::RECEIVE_COPY_RESULTS, 2, opcodes::COPY_STATUS, opcodes::COPY_PARAMETERS],
    ];
    descriptor(0x0001, &commands.concat());
    // Parameter data: counts, list length, no inline data.
    let mut limits = vec![0; 28];
    limits[4..6].copy_from_slice(&MAX_TARGETS.to_be_bytes());
    limits[6..8].copy_from_slice(&MAX_SEGMENTS.to_be_bytes());
    limits[8..12].copy_from_slice(&descriptor_limit().to_be_bytes());
    descriptor(0x0004, &limits);
    descriptor(0x0008, &[2, BLOCK_TO_BLOCK, BY_DESIGNATOR]);
    // General copy operations: concurrent copies, longest segment, granularity.
    let mut general = vec![0; 32];
    general[3] = KEPT_LIMIT;
    general[7] = KEPT_LIMIT;
    general[8..12].copy_from_slice(&segment_limit(config).to_be_bytes());
    general[12] = granularity(config);
    descriptor(0x8001, &general);
    data
}

fn descriptor_limit() -> u32 {
    u32::try_from(MAX_DESCRIPTOR_OCTETS).unwrap_or(u32::MAX)
}

/// A segment's length is a 16-bit number of blocks.
fn segment_limit(config: &LogicalUnitConfig) -> u32 {
    u32::from(u16::MAX) * config.block_bytes
}

/// Logarithm of the block length.
fn granularity(config: &LogicalUnitConfig) -> u8 {
    u8::try_from(config.block_bytes.ilog2()).unwrap_or(0)
}

fn half(octets: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes(std::array::from_fn(|index| octets[offset + index]))
}

fn word(octets: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|index| octets[offset + index]))
}

fn double(octets: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|index| octets[offset + index]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn copied(source: u64, destination: u64, blocks: u32, disk: &mut [u32]) {
        let segments = VecDeque::from([Segment { source, destination, blocks }]);
        let progress = Progress { segments: 1, segments_done: AtomicU16::new(0), octets: AtomicU64::new(0) };
        let mut copy = Copy { segments, progress: Arc::new(progress) };
        // Blocks of half a piece, so that short segments have several.
        let block_bytes = PIECE_OCTETS / 2;
        while !copy.segments.is_empty() {
            let piece = copy.next(block_bytes).unwrap();
            let [from, to] = [piece.source, piece.destination].map(|lba| usize::try_from(lba).unwrap());
            disk.copy_within(from..from + piece.blocks as usize, to);
            copy.written(u64::from(piece.blocks));
        }
        assert_eq!(copy.progress.octets.load(Ordering::Relaxed), u64::from(blocks));
        assert_eq!(copy.progress.status(), 1);
    }

    proptest! {
        #[test]
        fn overlapping_ranges_are_copied_as_if_at_once(source in 0u64..20, destination in 0u64..20, blocks in 1u32..12) {
            let mut disk: Vec<u32> = (0..32).collect();
            let mut expected = disk.clone();
            let [from, to] = [source, destination].map(|lba| usize::try_from(lba).unwrap());
            expected.copy_within(from..from + blocks as usize, to);
            copied(source, destination, blocks, &mut disk);
            prop_assert_eq!(disk, expected);
        }
    }

    #[test]
    fn a_copy_that_is_dropped_has_failed() {
        let mut copies = Copies::default();
        let progress =
            || Arc::new(Progress { segments: 1, segments_done: AtomicU16::new(0), octets: AtomicU64::new(0) });
        let running = progress();
        copies.keep(Nexus([1; 6]), 7, running.clone()).unwrap();
        assert_eq!(copies.find(Nexus([1; 6]), 7).unwrap().status(), 0);
        assert_eq!(copies.keep(Nexus([1; 6]), 7, progress()), Err(Sense::OPERATION_IN_PROGRESS.into()));
        drop(running);
        assert_eq!(copies.find(Nexus([1; 6]), 7).unwrap().status(), 2);
        for list in 0..100 {
            copies.keep(Nexus([2; 6]), list, progress()).unwrap();
        }
        assert_eq!(copies.0.len(), usize::from(KEPT_LIMIT));
        copies.forget(Nexus([2; 6]));
        assert!(copies.0.is_empty());
    }
}
