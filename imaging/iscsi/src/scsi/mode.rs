//! MODE SENSE and MODE SELECT (SPC-4 §6.9–6.12): the read-write error recovery, caching, control and informational
//! exceptions pages. D_SENSE and SWP of the control page can be changed, nothing can be saved.

use super::block::Purpose;
use super::opcodes::{MODE_SELECT_6, MODE_SENSE_6};
use super::unit::UnitState;
use super::{Cdb, Plan, Refusal, Sense, cut};
use crate::target::{LogicalUnitConfig, TargetConfig};

const RECOVERY: u8 = 0x01;
const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const EXCEPTIONS: u8 = 0x1c;
const ALL_PAGES: u8 = 0x3f;
/// D_SENSE, in octet 2 of the control page.
const D_SENSE: u8 = 0x04;
/// SWP, in octet 4 of the control page.
const SWP: u8 = 0x08;

/// Which values MODE SENSE asks for (SPC-4 table 173).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Values {
    Current,
    Changeable,
    Default,
}

/// MODE SENSE(6) and (10).
pub(super) fn sense(config: &TargetConfig, unit: &UnitState, cdb: &Cdb) -> Result<Plan, Refusal> {
    let values = match cdb.octet(2) >> 6 {
        0 => Values::Current,
        1 => Values::Changeable,
        2 => Values::Default,
        _ => return Err(Sense::NOT_SAVED.into()),
    };
    let (page, subpage) = (cdb.octet(2) & 0x3f, cdb.octet(3));
    if !matches!(subpage, 0x00 | 0xff) {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    let wanted: &[u8] = match page {
        ALL_PAGES => &[RECOVERY, CACHING, CONTROL, EXCEPTIONS],
        RECOVERY => &[RECOVERY],
        CACHING => &[CACHING],
        CONTROL => &[CONTROL],
        EXCEPTIONS => &[EXCEPTIONS],
        _ => return Err(Sense::INVALID_FIELD_IN_CDB.into()),
    };
    let short = cdb.opcode() == MODE_SENSE_6;
    let long_lba = !short && cdb.octet(1) & 0x10 != 0;
    let descriptor =
        if cdb.octet(1) & 0x08 != 0 { Vec::new() } else { block_descriptor(&config.logical_unit, long_lba) };
    let pages: Vec<u8> = wanted.iter().flat_map(|page| mode_page(*page, values, &config.logical_unit, unit)).collect();
    // WP, DPOFUA.
    let protected = unit.write_protect || config.logical_unit.read_only;
    let device = 0x10 | if protected { 0x80 } else { 0 };
    let header = header(short, device, long_lba, descriptor.len(), pages.len());
    let allocation = if short { usize::from(cdb.octet(4)) } else { usize::from(cdb.half(7)) };
    Ok(cut([header, descriptor, pages].concat(), allocation))
}

/// The mode parameter header; its first field counts what follows that field.
fn header(short: bool, device: u8, long_lba: bool, descriptor: usize, pages: usize) -> Vec<u8> {
    let descriptor_octets = u8::try_from(descriptor).unwrap_or(0);
    let follows = |header_rest: usize| u8::try_from(header_rest + descriptor + pages).unwrap_or(u8::MAX);
    if short {
        vec![follows(3), 0, device, descriptor_octets]
    } else {
        vec![0, follows(6), 0, device, u8::from(long_lba), 0, 0, descriptor_octets]
    }
}

/// Block descriptor (SBC-3 §6.4.2), short or long.
fn block_descriptor(unit: &LogicalUnitConfig, long_lba: bool) -> Vec<u8> {
    if long_lba {
        return [&unit.blocks.to_be_bytes()[..], &[0; 4], &unit.block_bytes.to_be_bytes()].concat();
    }
    let blocks = u32::try_from(unit.blocks).unwrap_or(u32::MAX);
    [blocks.to_be_bytes(), unit.block_bytes.to_be_bytes()].concat()
}

fn mode_page(page: u8, values: Values, config: &LogicalUnitConfig, unit: &UnitState) -> Vec<u8> {
    let body_octets = match page {
        RECOVERY | CONTROL | EXCEPTIONS => 10,
        _ => 18,
    };
    let mut data = vec![0; 2 + usize::from(body_octets)];
    data[0] = page;
    data[1] = body_octets;
    match (page, values) {
        (CONTROL, Values::Changeable) => {
            data[2] = D_SENSE;
            data[4] = SWP;
        }
        (CONTROL, Values::Current | Values::Default) => {
            let current = values == Values::Current;
            data[2] = if current && unit.descriptor_sense { D_SENSE } else { 0 };
            // Queue algorithm modifier 1: unrestricted reordering, which is what happens.
            data[3] = 0x10;
            data[4] = if current && unit.write_protect { SWP } else { 0 };
            // Busy timeout: unlimited.
            data[8..10].copy_from_slice(&[0xff, 0xff]);
        }
        // WCE.
        (CACHING, Values::Current | Values::Default) if config.write_cache => data[2] = 0x04,
        _ => {}
    }
    data
}

/// MODE SELECT(6) and (10): plans to collect the parameter list.
pub(super) fn select(cdb: &Cdb) -> Result<Plan, Refusal> {
    let short = cdb.opcode() == MODE_SELECT_6;
    let octets = if short { u32::from(cdb.octet(4)) } else { u32::from(cdb.half(7)) };
    // PF must be set, SP must not.
    if cdb.octet(1) & 0x10 == 0 || cdb.octet(1) & 0x01 != 0 {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    if octets == 0 {
        return Ok(Plan::Good);
    }
    if octets > 1024 {
        return Err(Sense::PARAMETER_LIST_LENGTH.into());
    }
    Ok(Plan::Collect(octets, Purpose::ModeSelect { short }))
}

/// MODE SELECT with its parameter list: all of it is checked before any of it holds.
pub(super) fn apply(config: &LogicalUnitConfig, unit: &mut UnitState, short: bool, list: &[u8]) -> Result<(), Refusal> {
    let (header, descriptor_octets) = match (short, list) {
        (true, [_, _, _, descriptor, ..]) => (4, usize::from(*descriptor)),
        (false, [_, _, _, _, _, _, high, low, ..]) => (8, usize::from(u16::from_be_bytes([*high, *low]))),
        _ => return Err(Sense::PARAMETER_LIST_LENGTH.into()),
    };
    let mut pages = list.get(header + descriptor_octets..).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    let (mut descriptor_sense, mut write_protect) = (unit.descriptor_sense, unit.write_protect);
    while let [page, octets, ..] = pages {
        let whole = 2 + usize::from(*octets);
        let given = pages.get(..whole).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        let page = page & 0x3f;
        if !matches!(page, RECOVERY | CACHING | CONTROL | EXCEPTIONS) {
            return Err(Sense::INVALID_FIELD_IN_LIST.into());
        }
        let current = mode_page(page, Values::Current, config, unit);
        let changeable = mode_page(page, Values::Changeable, config, unit);
        if current.len() != whole {
            return Err(Sense::INVALID_FIELD_IN_LIST.into());
        }
        // Octets 0 and 1 are the page's code and length.
        let differs = |index: usize| (given[index] ^ current[index]) & !changeable[index] != 0;
        if (2..whole).any(differs) {
            return Err(Sense::INVALID_FIELD_IN_LIST.into());
        }
        if page == CONTROL {
            descriptor_sense = given[2] & D_SENSE != 0;
            write_protect = given[4] & SWP != 0;
        }
        pages = &pages[whole..];
    }
    if !pages.is_empty() {
        return Err(Sense::PARAMETER_LIST_LENGTH.into());
    }
    unit.descriptor_sense = descriptor_sense;
    unit.write_protect = write_protect;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> LogicalUnitConfig {
        LogicalUnitConfig {
            block_bytes: 512,
            blocks: 8,
            naa: 1,
            serial: "1".into(),
            vendor: "V".into(),
            product: "P".into(),
            read_only: false,
            write_cache: true,
        }
    }

    #[test]
    fn only_changeable_bits_can_be_changed() {
        let mut unit = UnitState::default();
        let mut list = vec![0; 4];
        let mut control = mode_page(CONTROL, Values::Current, &config(), &unit);
        control[4] |= SWP;
        list.extend_from_slice(&control);
        apply(&config(), &mut unit, true, &list).unwrap();
        assert!(unit.write_protect && !unit.descriptor_sense);
        list[4 + 3] ^= 0x10;
        list[4 + 2] ^= D_SENSE;
        assert_eq!(apply(&config(), &mut unit, true, &list), Err(Sense::INVALID_FIELD_IN_LIST.into()));
        assert!(!unit.descriptor_sense);
    }

    proptest! {
        #[test]
        fn arbitrary_lists_never_panic(list in prop::collection::vec(any::<u8>(), 0..64), short: bool) {
            let _ = apply(&config(), &mut UnitState::default(), short, &list);
        }
    }
}
