//! The SCSI device server: SPC-4 and SBC-3 as far as iPXE, Linux, QEMU and their test suites need.
//!
//! A command is *planned* from its CDB alone: answered, refused, turned into backend I/O, or given a data-out buffer to
//! wait for. Everything is checked here, so that the backend sees only I/O that lies within the unit and is not empty.

mod block;
mod copy;
mod inquiry;
mod mode;
mod opcodes;
mod ports;
mod reservation;
mod sense;
mod unit;

pub(crate) use block::{Finished, MAX_TRANSFER_OCTETS, Purpose, collected, completed, part};
pub(crate) use sense::{Refusal, Sense, Status};
pub(crate) use unit::{Attachment, Nexus, UnitState};

use crate::io::Io;
use crate::target::Target;
use bytes::Bytes;

/// A command descriptor block; shorter CDBs are padded with zeros, as the iSCSI header does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cdb(pub(crate) [u8; 16]);

impl Cdb {
    fn opcode(&self) -> u8 {
        self.0[0]
    }

    /// The low five bits of octet 1, where a service action lives.
    fn service_action(&self) -> u8 {
        self.0[1] & 0x1f
    }

    fn octet(&self, offset: usize) -> u8 {
        self.0[offset]
    }

    fn half(&self, offset: usize) -> u16 {
        u16::from_be_bytes(std::array::from_fn(|index| self.0[offset + index]))
    }

    fn word(&self, offset: usize) -> u32 {
        u32::from_be_bytes(std::array::from_fn(|index| self.0[offset + index]))
    }

    fn double(&self, offset: usize) -> u64 {
        u64::from_be_bytes(std::array::from_fn(|index| self.0[offset + index]))
    }
}

/// What a command comes to.
#[derive(Debug)]
pub(crate) enum Plan {
    /// GOOD, nothing to transfer.
    Good,
    /// GOOD with this data, cut to the allocation length.
    Data(Vec<u8>),
    /// Backend I/O first.
    Io(Io, Completion),
    /// This many octets of data-out first; then [`collected`].
    Collect(u32, Purpose),
}

/// What becomes of a backend's answer. `octets` is how much data must have been read.
#[derive(Debug)]
pub(crate) enum Completion {
    /// GOOD.
    Done,
    /// GOOD, with the data; before that, if there is more to read than is read at once, the rest.
    Read { octets: u32, rest: Rest },
    /// The data read must equal these, repeated (VERIFY with BYTCHK), else MISCOMPARE. Empty: any data do.
    Verify { data: Vec<Bytes>, octets: u32 },
    /// GET LBA STATUS at `lba`, with this allocation length in octets.
    LbaStatus { lba: u64, allocation: u32 },
    /// EXTENDED COPY: write what was read.
    CopyRead { copy: Box<copy::Copy>, destination: u64, octets: u32, block_bytes: u32 },
    /// EXTENDED COPY: that many octets are written, go on.
    CopyWrite { copy: Box<copy::Copy>, octets: u64, block_bytes: u32 },
    /// ORWRITE: write back what was read, OR these.
    OrWrite { lba: u64, data: Vec<Bytes>, fua: bool, octets: u32 },
}

/// What a READ has not asked the backend for yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rest {
    pub(super) lba: u64,
    pub(super) blocks: u32,
    pub(super) block_bytes: u32,
}

impl Rest {
    /// How much that is.
    pub(crate) fn octets(self) -> u64 {
        u64::from(self.blocks) * u64::from(self.block_bytes)
    }
}

/// Plans a command of `nexus` to the unit at `lun`.
pub(crate) fn plan(target: &Target, nexus: Nexus, lun: [u8; 8], cdb: &Cdb) -> Result<Plan, Refusal> {
    let opcode = cdb.opcode();
    if !is_unit_zero(lun) {
        return absent_unit(target, cdb);
    }
    let attention_waits = matches!(opcode, opcodes::INQUIRY | opcodes::REPORT_LUNS | opcodes::REQUEST_SENSE);
    let mut unit = target.unit();
    if !attention_waits && let Some(attention) = unit.take_attention(nexus) {
        return Err(attention.into());
    }
    if !unit.reservations.allow(nexus, cdb) {
        return Err(Refusal::Reservation);
    }
    match opcode {
        opcodes::TEST_UNIT_READY | opcodes::START_STOP_UNIT | opcodes::PREVENT_ALLOW => Ok(Plan::Good),
        opcodes::REQUEST_SENSE => {
            let pending = unit.take_attention(nexus).unwrap_or(Sense::NONE);
            Ok(cut(pending.encode(cdb.octet(1) & 1 != 0), usize::from(cdb.octet(4))))
        }
        opcodes::INQUIRY => inquiry::inquiry(target.config(), cdb),
        opcodes::REPORT_LUNS => report_luns(cdb),
        opcodes::MODE_SENSE_6 | opcodes::MODE_SENSE_10 => mode::sense(target.config(), &unit, cdb),
        opcodes::MODE_SELECT_6 | opcodes::MODE_SELECT_10 => mode::select(cdb),
        opcodes::MAINTENANCE_IN => opcodes::maintenance_in(cdb),
        opcodes::RESERVE_6 | opcodes::RELEASE_6 | opcodes::RESERVE_10 | opcodes::RELEASE_10 => {
            unit.reservations.legacy(nexus, cdb)
        }
        opcodes::PERSISTENT_RESERVE_IN => unit.reservations.persistent_in(&target.config().initiator, cdb),
        opcodes::PERSISTENT_RESERVE_OUT => reservation::persistent_out(cdb),
        opcodes::RECEIVE_COPY_RESULTS => copy::results(&target.config().logical_unit, &unit, nexus, cdb),
        _ => {
            let write_protected = unit.write_protect || target.config().logical_unit.read_only;
            drop(unit);
            block::plan(&target.config().logical_unit, write_protected, cdb)
        }
    }
}

/// Whether the LUN field names unit 0, by peripheral or flat addressing (SAM-5 §4.7).
fn is_unit_zero(lun: [u8; 8]) -> bool {
    matches!(lun, [0x00 | 0x40, 0, 0, 0, 0, 0, 0, 0])
}

/// What a unit that does not exist answers (SPC-4 §5.8).
fn absent_unit(target: &Target, cdb: &Cdb) -> Result<Plan, Refusal> {
    match cdb.opcode() {
        opcodes::INQUIRY => inquiry::absent(target.config(), cdb),
        opcodes::REPORT_LUNS => report_luns(cdb),
        opcodes::REQUEST_SENSE => Ok(cut(Sense::NO_SUCH_UNIT.encode(cdb.octet(1) & 1 != 0), usize::from(cdb.octet(4)))),
        _ => Err(Sense::NO_SUCH_UNIT.into()),
    }
}

/// REPORT LUNS (SPC-4 §6.33): there is unit 0.
fn report_luns(cdb: &Cdb) -> Result<Plan, Refusal> {
    let allocation = cdb.word(6) as usize;
    // SELECT REPORT: 0 and 2 list logical units, 1 well-known ones only (there are none).
    let units: &[u8] = match cdb.octet(2) {
        0 | 2 => &[0; 8],
        1 => &[],
        _ => return Err(Sense::INVALID_FIELD_IN_CDB.into()),
    };
    if allocation < 16 {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    let length = u32::try_from(units.len()).unwrap_or(0);
    let mut list = [&length.to_be_bytes()[..], &[0; 4]].concat();
    list.extend_from_slice(units);
    Ok(cut(list, allocation))
}

/// Data cut to an allocation length, which is never an error (SPC-4 §4.2.5.6).
fn cut(mut data: Vec<u8>, allocation: usize) -> Plan {
    data.truncate(allocation);
    Plan::Data(data)
}
