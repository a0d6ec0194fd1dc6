//! Block commands (SBC-3 §5): bounds and flags are checked, then they become backend I/O.

use super::sense::Refusal;
use super::unit::Nexus;
use super::{Cdb, Completion, Plan, Rest, Sense, copy, cut, mode, opcodes, reservation};
use crate::io::{Io, IoFault, IoResult};
use crate::pdu::Payload;
use crate::target::{LogicalUnitConfig, Target};
use bytes::{Bytes, BytesMut};

/// Most octets that one command transfers (block limits page).
pub(crate) const MAX_TRANSFER_OCTETS: u32 = 4 * 1024 * 1024;
/// What a READ may transfer, in blocks: as much as READ(10) can say.
const MAX_READ_BLOCKS: u32 = 65_535;
/// Most blocks of one COMPARE AND WRITE.
pub(super) const MAX_COMPARE_BLOCKS: u8 = 64;
/// Most blocks of one UNMAP, over all its ranges.
pub(super) const MAX_UNMAP_BLOCKS: u32 = 1 << 20;
/// Most ranges of one UNMAP.
pub(super) const MAX_UNMAP_RANGES: u32 = 256;
/// Most blocks of one WRITE SAME.
pub(super) const MAX_WRITE_SAME_BLOCKS: u64 = 1 << 15;

/// What a data-out buffer is for.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// WRITE, WRITE AND VERIFY.
    Write { lba: u64, fua: bool },
    /// VERIFY with BYTCHK 1 (the whole range) or 3 (one block, compared with each).
    Verify { lba: u64, blocks: u32 },
    /// WRITE SAME.
    WriteSame { lba: u64, blocks: u64, unmap: bool },
    /// COMPARE AND WRITE.
    CompareAndWrite { lba: u64 },
    /// ORWRITE.
    OrWrite { lba: u64, blocks: u32, fua: bool },
    /// UNMAP.
    Unmap,
    /// EXTENDED COPY.
    ExtendedCopy,
    /// MODE SELECT.
    ModeSelect { short: bool },
    /// PERSISTENT RESERVE OUT.
    PersistentReserve { action: u8, scope_and_type: u8 },
}

impl Purpose {
    /// How often as much as is collected is in memory at last: beside the data, what is read to compare them with, and
    /// what both are merged into.
    pub(crate) fn copies(&self) -> usize {
        match self {
            Self::OrWrite { .. } => 3,
            Self::Verify { .. } => 2,
            Self::Write { .. }
            | Self::WriteSame { .. }
            | Self::CompareAndWrite { .. }
            | Self::Unmap
            | Self::ExtendedCopy
            | Self::ModeSelect { .. }
            | Self::PersistentReserve { .. } => 1,
        }
    }

    /// Whether the command makes no sense with less or more data than it wants, so that it is refused before any is
    /// asked for. A shortened WRITE, by contrast, writes what came and reports a residual.
    pub(crate) fn is_exact(&self) -> bool {
        match self {
            Self::WriteSame { .. } | Self::CompareAndWrite { .. } => true,
            Self::Write { .. }
            | Self::Verify { .. }
            | Self::OrWrite { .. }
            | Self::Unmap
            | Self::ExtendedCopy
            | Self::ModeSelect { .. }
            | Self::PersistentReserve { .. } => false,
        }
    }
}

/// Plans a block command.
pub(super) fn plan(unit: &LogicalUnitConfig, write_protected: bool, cdb: &Cdb) -> Result<Plan, Refusal> {
    match cdb.opcode() {
        opcodes::READ_6 | opcodes::READ_10 | opcodes::READ_12 | opcodes::READ_16 => read(unit, cdb),
        opcodes::VERIFY_10 | opcodes::VERIFY_12 | opcodes::VERIFY_16 => verify(unit, cdb),
        opcodes::PREFETCH_10 | opcodes::PREFETCH_16 => {
            let (lba, blocks) = extent(cdb);
            in_range(unit, lba, u64::from(blocks)).map(|()| Plan::Good)
        }
        opcodes::SYNCHRONIZE_CACHE_10 | opcodes::SYNCHRONIZE_CACHE_16 => {
            let (lba, blocks) = extent(cdb);
            in_range(unit, lba, u64::from(blocks)).map(|()| Plan::Io(Io::Flush, Completion::Done))
        }
        opcodes::READ_CAPACITY_10 => Ok(read_capacity_10(unit)),
        opcodes::SERVICE_ACTION_IN_16 => match cdb.service_action() {
            opcodes::READ_CAPACITY_16 => Ok(read_capacity_16(unit, cdb)),
            opcodes::GET_LBA_STATUS => lba_status(unit, cdb),
            _ => Err(Sense::INVALID_FIELD_IN_CDB.into()),
        },
        opcodes::READ_DEFECT_DATA_10 => Ok(cut(vec![0, cdb.octet(2) & 0x1f, 0, 0], usize::from(cdb.half(7)))),
        opcodes::READ_DEFECT_DATA_12 => Ok(cut(vec![0, cdb.octet(1) & 0x1f, 0, 0, 0, 0, 0, 0], cdb.word(6) as usize)),
        opcodes::WRITE_6
        | opcodes::WRITE_10
        | opcodes::WRITE_12
        | opcodes::WRITE_16
        | opcodes::WRITE_VERIFY_10
        | opcodes::WRITE_VERIFY_12
        | opcodes::WRITE_VERIFY_16 => write(unit, cdb).and_then(|plan| writable(write_protected, plan)),
        opcodes::OR_WRITE_16 => or_write(unit, cdb).and_then(|plan| writable(write_protected, plan)),
        opcodes::COMPARE_AND_WRITE => compare_and_write(unit, cdb).and_then(|plan| writable(write_protected, plan)),
        opcodes::WRITE_SAME_10 | opcodes::WRITE_SAME_16 => {
            write_same(unit, cdb).and_then(|plan| writable(write_protected, plan))
        }
        opcodes::UNMAP => unmap(cdb).and_then(|plan| writable(write_protected, plan)),
        opcodes::EXTENDED_COPY => copy::plan(cdb).and_then(|plan| writable(write_protected, plan)),
        _ => Err(Sense::INVALID_OPCODE.into()),
    }
}

/// A data-out buffer is there: all of it, or as much as the initiator was willing to send.
pub(crate) fn collected(target: &Target, nexus: Nexus, purpose: Purpose, data: Vec<Bytes>) -> Result<Plan, Refusal> {
    let config = &target.config().logical_unit;
    let octets: usize = data.iter().map(Bytes::len).sum();
    let whole_blocks = |wanted: u64| {
        if octets as u64 == wanted * u64::from(config.block_bytes) {
            Ok(())
        } else {
            Err(Refusal::from(Sense::INVALID_FIELD_IN_UNIT))
        }
    };
    match purpose {
        Purpose::Write { lba, fua } => {
            if !octets.is_multiple_of(config.block_bytes as usize) {
                return Err(Sense::INVALID_FIELD_IN_UNIT.into());
            }
            // Nothing was sent for a command that wanted data: the residual tells the initiator.
            if octets == 0 {
                return Ok(Plan::Good);
            }
            Ok(Plan::Io(Io::Write { lba, data, fua }, Completion::Done))
        }
        Purpose::Verify { lba, blocks } => {
            if octets != config.block_bytes as usize {
                whole_blocks(u64::from(blocks))?;
            }
            Ok(Plan::Io(Io::Read { lba, blocks }, Completion::Verify { data, octets: blocks * config.block_bytes }))
        }
        Purpose::OrWrite { lba, blocks, fua } => {
            whole_blocks(u64::from(blocks))?;
            Ok(Plan::Io(
                Io::Read { lba, blocks },
                Completion::OrWrite { lba, data, fua, octets: blocks * config.block_bytes },
            ))
        }
        Purpose::WriteSame { lba, blocks, unmap } => {
            whole_blocks(1)?;
            let pattern = gather(data);
            let unmap = unmap && pattern.iter().all(|octet| *octet == 0);
            Ok(Plan::Io(Io::WriteSame { lba, blocks, pattern, unmap }, Completion::Done))
        }
        Purpose::CompareAndWrite { lba } => {
            let both = gather(data);
            if both.is_empty() {
                return Ok(Plan::Good);
            }
            if !both.len().is_multiple_of(2 * config.block_bytes as usize) {
                return Err(Sense::INVALID_FIELD_IN_UNIT.into());
            }
            let (expected, new) = (both.slice(..both.len() / 2), both.slice(both.len() / 2..));
            Ok(Plan::Io(Io::CompareAndWrite { lba, expected, new }, Completion::Done))
        }
        Purpose::Unmap => unmap_ranges(config, &gather(data)),
        Purpose::ExtendedCopy => copy::start(target, nexus, &gather(data)),
        Purpose::ModeSelect { short } => {
            let mut unit = target.unit();
            mode::apply(config, &mut unit, short, &gather(data))?;
            // MODE PARAMETERS CHANGED.
            unit.attend_all_but(Some(nexus), Sense::attention(0x2a01));
            Ok(Plan::Good)
        }
        Purpose::PersistentReserve { action, scope_and_type } => {
            let list = gather(data);
            reservation::apply(&mut target.unit(), nexus, action, scope_and_type, &list).map(|()| Plan::Good)
        }
    }
}

/// What follows from a backend's answer: GOOD, data, or further I/O.
pub(crate) fn completed(completion: Completion, result: IoResult) -> Result<Finished, Refusal> {
    let result = match result {
        IoResult::Failed(fault) if matches!(completion, Completion::CopyRead { .. } | Completion::CopyWrite { .. }) => {
            return Err(copy::refusal(fault));
        }
        IoResult::Failed(fault) => return Err(refusal(fault)),
        IoResult::Miscompare { offset } => return Err(Sense::miscompare(offset).into()),
        answer @ (IoResult::Done | IoResult::Data(_) | IoResult::InPlace(_) | IoResult::Status { .. }) => answer,
    };
    match (completion, result) {
        (Completion::Done, IoResult::Done) => Ok(Finished::Good),
        (Completion::Read { octets, rest }, IoResult::Data(data)) if data.len() == octets as usize => {
            Ok(read_so_far(Payload::Octets(data), rest))
        }
        (Completion::Read { octets, rest }, IoResult::InPlace(range))
            if range.end.checked_sub(range.start) == Some(u64::from(octets)) =>
        {
            Ok(read_so_far(Payload::InPlace(range), rest))
        }
        (Completion::Verify { data: expected, octets }, IoResult::Data(data)) if data.len() == octets as usize => {
            match first_difference(&expected, &data) {
                None => Ok(Finished::Good),
                Some(offset) => Err(Sense::miscompare(offset).into()),
            }
        }
        (Completion::OrWrite { lba, data: mask, fua, octets }, IoResult::Data(data))
            if data.len() == octets as usize =>
        {
            let mut merged = BytesMut::from(&data[..]);
            let mut rest = &mut merged[..];
            for piece in &mask {
                let (under, left) = rest.split_at_mut(piece.len().min(rest.len()));
                under.iter_mut().zip(piece).for_each(|(old, new)| *old |= new);
                rest = left;
            }
            Ok(Finished::Io(Io::Write { lba, data: vec![merged.freeze()], fua }, Completion::Done))
        }
        (Completion::CopyRead { copy, destination, octets, block_bytes }, IoResult::Data(data))
            if data.len() == octets as usize =>
        {
            Ok(copy::piece_read(copy, destination, data, block_bytes))
        }
        (Completion::CopyWrite { copy, octets, block_bytes }, IoResult::Done) => {
            Ok(copy::piece_written(copy, octets, block_bytes))
        }
        (Completion::LbaStatus { lba, allocation }, IoResult::Status { mapped, blocks }) => {
            let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
            let mut data = vec![0, 0, 0, 20, 0, 0, 0, 0];
            data.extend_from_slice(&lba.to_be_bytes());
            data.extend_from_slice(&blocks.to_be_bytes());
            data.extend_from_slice(&[u8::from(!mapped), 0, 0, 0]);
            data.truncate(allocation as usize);
            Ok(Finished::Data(Bytes::from(data).into()))
        }
        // The backend broke its contract; the initiator learns that something is wrong with the unit.
        (
            Completion::Done
            | Completion::Read { .. }
            | Completion::Verify { .. }
            | Completion::OrWrite { .. }
            | Completion::CopyRead { .. }
            | Completion::CopyWrite { .. }
            | Completion::LbaStatus { .. },
            _,
        ) => Err(Sense::HARDWARE.into()),
    }
}

/// How a backend's answer ends a command, or goes on.
#[derive(Debug)]
pub(crate) enum Finished {
    Good,
    Data(Payload),
    /// Data, and more to come: [`part`].
    Part(Payload, Rest),
    Io(Io, Completion),
}

fn read_so_far(data: Payload, rest: Rest) -> Finished {
    if rest.blocks == 0 { Finished::Data(data) } else { Finished::Part(data, rest) }
}

fn refusal(fault: IoFault) -> Refusal {
    match fault {
        IoFault::Unreadable => Sense::UNREADABLE.into(),
        IoFault::Unwritable => Sense::UNWRITABLE.into(),
        IoFault::NoSpace => Sense::NO_SPACE.into(),
        IoFault::Unavailable => Refusal::Busy,
        IoFault::Cancelled => Sense::ABORTED.into(),
    }
}

/// The LBA and length of a READ, WRITE or VERIFY, by its command group.
fn extent(cdb: &Cdb) -> (u64, u32) {
    match cdb.opcode() >> 5 {
        0 => {
            let lba = cdb.word(0) & 0x001f_ffff;
            let blocks = if cdb.octet(4) == 0 { 256 } else { u32::from(cdb.octet(4)) };
            (u64::from(lba), blocks)
        }
        4 => (cdb.double(2), cdb.word(10)),
        5 => (u64::from(cdb.word(2)), cdb.word(6)),
        _ => (u64::from(cdb.word(2)), u32::from(cdb.half(7))),
    }
}

/// A range must lie within the unit, and an empty one must start within it.
fn in_range(unit: &LogicalUnitConfig, lba: u64, blocks: u64) -> Result<(), Refusal> {
    let end = lba.checked_add(blocks).ok_or(Sense::OUT_OF_RANGE)?;
    if lba >= unit.blocks || end > unit.blocks {
        return Err(Sense::OUT_OF_RANGE.into());
    }
    Ok(())
}

/// Checks a transfer's range, its length against the block limits page, and that no protection information is asked for.
fn transfer(unit: &LogicalUnitConfig, cdb: &Cdb) -> Result<(u64, u32), Refusal> {
    bounded(unit, cdb, MAX_TRANSFER_OCTETS / unit.block_bytes)
}

/// As [`transfer`], with a limit in blocks.
fn bounded(unit: &LogicalUnitConfig, cdb: &Cdb, limit: u32) -> Result<(u64, u32), Refusal> {
    let (lba, blocks) = extent(cdb);
    // RDPROTECT, WRPROTECT, VRPROTECT; a 6-octet command has LBA bits there.
    if cdb.opcode() >> 5 != 0 && cdb.octet(1) >> 5 != 0 {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    in_range(unit, lba, u64::from(blocks))?;
    if blocks > limit {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    Ok((lba, blocks))
}

/// FUA, which a 6-octet command does not have.
fn force_unit_access(cdb: &Cdb) -> bool {
    cdb.opcode() >> 5 != 0 && cdb.octet(1) & 0x08 != 0
}

fn writable(write_protected: bool, plan: Plan) -> Result<Plan, Refusal> {
    if write_protected { Err(Sense::WRITE_PROTECTED.into()) } else { Ok(plan) }
}

/// READ. iPXE never looks at the block limits page and lets firmware read a boot loader's 20 MiB by one READ(10), so a READ
/// may be as long as that: it is carried out in parts of what any command may transfer.
fn read(unit: &LogicalUnitConfig, cdb: &Cdb) -> Result<Plan, Refusal> {
    let (lba, blocks) = bounded(unit, cdb, MAX_READ_BLOCKS)?;
    if blocks == 0 {
        return Ok(Plan::Good);
    }
    let (io, completion) = part(Rest { lba, blocks, block_bytes: unit.block_bytes });
    Ok(Plan::Io(io, completion))
}

/// The next part of a READ.
pub(crate) fn part(rest: Rest) -> (Io, Completion) {
    let Rest { lba, blocks, block_bytes } = rest;
    let now = blocks.min(MAX_TRANSFER_OCTETS / block_bytes);
    let rest = Rest { lba: lba + u64::from(now), blocks: blocks - now, block_bytes };
    (Io::Read { lba, blocks: now }, Completion::Read { octets: now * block_bytes, rest })
}

/// WRITE and WRITE AND VERIFY; the backend answers for what it wrote, so the latter needs nothing more but FUA.
fn write(unit: &LogicalUnitConfig, cdb: &Cdb) -> Result<Plan, Refusal> {
    let (lba, blocks) = transfer(unit, cdb)?;
    let verifies =
        matches!(cdb.opcode(), opcodes::WRITE_VERIFY_10 | opcodes::WRITE_VERIFY_12 | opcodes::WRITE_VERIFY_16);
    if verifies && (cdb.octet(1) >> 1) & 3 > 1 {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    if blocks == 0 {
        return Ok(Plan::Good);
    }
    // In WRITE AND VERIFY, verification is of the medium: what is written must be there.
    let fua = verifies || force_unit_access(cdb);
    Ok(Plan::Collect(blocks * unit.block_bytes, Purpose::Write { lba, fua }))
}

fn verify(unit: &LogicalUnitConfig, cdb: &Cdb) -> Result<Plan, Refusal> {
    let (lba, blocks) = transfer(unit, cdb)?;
    if blocks == 0 {
        return Ok(Plan::Good);
    }
    let octets = blocks * unit.block_bytes;
    match (cdb.octet(1) >> 1) & 3 {
        0 => Ok(Plan::Io(Io::Read { lba, blocks }, Completion::Verify { data: Vec::new(), octets })),
        1 => Ok(Plan::Collect(octets, Purpose::Verify { lba, blocks })),
        3 => Ok(Plan::Collect(unit.block_bytes, Purpose::Verify { lba, blocks })),
        _ => Err(Sense::INVALID_FIELD_IN_CDB.into()),
    }
}

fn or_write(unit: &LogicalUnitConfig, cdb: &Cdb) -> Result<Plan, Refusal> {
    let (lba, blocks) = transfer(unit, cdb)?;
    if blocks == 0 {
        return Ok(Plan::Good);
    }
    Ok(Plan::Collect(blocks * unit.block_bytes, Purpose::OrWrite { lba, blocks, fua: force_unit_access(cdb) }))
}

fn compare_and_write(unit: &LogicalUnitConfig, cdb: &Cdb) -> Result<Plan, Refusal> {
    let (lba, blocks) = (cdb.double(2), cdb.octet(13));
    if cdb.octet(1) >> 5 != 0 || blocks > MAX_COMPARE_BLOCKS {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    in_range(unit, lba, u64::from(blocks))?;
    Ok(Plan::Collect(2 * u32::from(blocks) * unit.block_bytes, Purpose::CompareAndWrite { lba }))
}

fn write_same(unit: &LogicalUnitConfig, cdb: &Cdb) -> Result<Plan, Refusal> {
    let (lba, blocks) = extent(cdb);
    let blocks = u64::from(blocks);
    let flags = cdb.octet(1);
    let no_data_out = cdb.opcode() == opcodes::WRITE_SAME_16 && flags & 0x01 != 0;
    // Protection, ANCHOR (nothing is anchored here), and the obsolete PBDATA and LBDATA.
    let refused = if cdb.opcode() == opcodes::WRITE_SAME_16 { 0xf6 } else { 0xf7 };
    if flags & refused != 0 {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    in_range(unit, lba, blocks)?;
    // WSNZ: zero does not mean "to the end".
    if blocks == 0 || blocks > MAX_WRITE_SAME_BLOCKS {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    let unmap = flags & 0x08 != 0;
    if no_data_out {
        let pattern = Bytes::from(vec![0; unit.block_bytes as usize]);
        return Ok(Plan::Io(Io::WriteSame { lba, blocks, pattern, unmap }, Completion::Done));
    }
    Ok(Plan::Collect(unit.block_bytes, Purpose::WriteSame { lba, blocks, unmap }))
}

fn unmap(cdb: &Cdb) -> Result<Plan, Refusal> {
    // ANCHOR.
    if cdb.octet(1) & 1 != 0 {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    match u32::from(cdb.half(7)) {
        0 => Ok(Plan::Good),
        octets if !(8..=8 + 16 * MAX_UNMAP_RANGES).contains(&octets) => Err(Sense::PARAMETER_LIST_LENGTH.into()),
        octets => Ok(Plan::Collect(octets, Purpose::Unmap)),
    }
}

/// Reads UNMAP's parameter list (SBC-3 §5.28.2): all ranges are checked before any is unmapped.
fn unmap_ranges(unit: &LogicalUnitConfig, list: &[u8]) -> Result<Plan, Refusal> {
    let [_, _, high, low, _, _, _, _, descriptors @ ..] = list else {
        return Err(Sense::PARAMETER_LIST_LENGTH.into());
    };
    let described = usize::from(u16::from_be_bytes([*high, *low])).min(descriptors.len());
    let mut ranges = Vec::new();
    let mut total = 0u64;
    for descriptor in descriptors[..described].chunks_exact(16) {
        let lba = u64::from_be_bytes(std::array::from_fn(|index| descriptor[index]));
        let blocks = u32::from_be_bytes(std::array::from_fn(|index| descriptor[8 + index]));
        if blocks == 0 {
            continue;
        }
        in_range(unit, lba, u64::from(blocks))?;
        total += u64::from(blocks);
        ranges.push((lba, blocks));
    }
    if total > u64::from(MAX_UNMAP_BLOCKS) {
        return Err(Sense::INVALID_FIELD_IN_LIST.into());
    }
    if ranges.is_empty() {
        return Ok(Plan::Good);
    }
    Ok(Plan::Io(Io::Unmap { ranges }, Completion::Done))
}

fn read_capacity_10(unit: &LogicalUnitConfig) -> Plan {
    // A larger unit answers FFFFFFFFh: ask READ CAPACITY(16).
    let last = u32::try_from(unit.blocks - 1).unwrap_or(u32::MAX);
    Plan::Data([last.to_be_bytes(), unit.block_bytes.to_be_bytes()].concat())
}

fn read_capacity_16(unit: &LogicalUnitConfig, cdb: &Cdb) -> Plan {
    let mut data = vec![0; 32];
    data[..8].copy_from_slice(&(unit.blocks - 1).to_be_bytes());
    data[8..12].copy_from_slice(&unit.block_bytes.to_be_bytes());
    // Logical blocks per physical block: 4 KiB physical.
    data[13] = if unit.block_bytes == 512 { 3 } else { 0 };
    // LBPME, LBPRZ: thin, unmapped blocks read as zeros.
    data[14] = 0xc0;
    cut(data, cdb.word(10) as usize)
}

fn lba_status(unit: &LogicalUnitConfig, cdb: &Cdb) -> Result<Plan, Refusal> {
    let (lba, allocation) = (cdb.double(2), cdb.word(10));
    in_range(unit, lba, 1)?;
    if allocation == 0 {
        return Ok(Plan::Good);
    }
    Ok(Plan::Io(Io::Status { lba }, Completion::LbaStatus { lba, allocation }))
}

/// Where `data` differs from `expected`, repeated as often as it fits; nothing expected is nothing compared.
fn first_difference(expected: &[Bytes], data: &[u8]) -> Option<u32> {
    let mut at = 0;
    for piece in expected.iter().filter(|piece| !piece.is_empty()).cycle() {
        let found = &data[at..data.len().min(at + piece.len())];
        if found.is_empty() {
            return None;
        }
        if found != &piece[..found.len()] {
            let within = found.iter().zip(piece).position(|(found, expected)| found != expected)?;
            return u32::try_from(at + within).ok();
        }
        at += found.len();
    }
    None
}

/// One buffer of several; copied only if there are several.
fn gather(mut data: Vec<Bytes>) -> Bytes {
    if data.len() == 1 {
        return data.swap_remove(0);
    }
    data.concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_difference_is_found_however_the_data_are_cut(
            pieces in prop::collection::vec(prop::collection::vec(0u8..2, 0..5), 0..5),
            data in prop::collection::vec(0u8..2, 0..40), equal: bool,
        ) {
            let expected: Vec<Bytes> = pieces.into_iter().map(Bytes::from).collect();
            let repeated = || expected.iter().flatten().cycle();
            let data: Vec<u8> = if equal { repeated().take(data.len()).copied().collect() } else { data };
            let naive = repeated().zip(&data).position(|(expected, found)| expected != found);
            prop_assert_eq!(first_difference(&expected, &data), naive.map(|at| u32::try_from(at).unwrap()));
        }
    }

    #[test]
    fn or_write_merges_over_the_borders_of_its_pieces() {
        let mask = [Bytes::from_static(&[1, 2]), Bytes::from_static(&[4]), Bytes::from_static(&[8])];
        let completion = Completion::OrWrite { lba: 7, data: mask.to_vec(), fua: true, octets: 4 };
        let Ok(Finished::Io(Io::Write { lba: 7, data, fua: true }, Completion::Done)) =
            completed(completion, IoResult::Data(Bytes::from_static(&[0x10, 2, 0, 1])))
        else {
            panic!("not a write");
        };
        assert_eq!(data.concat(), [0x11, 2, 4, 9]);
    }
}
