//! Operation codes, and the table that REPORT SUPPORTED OPERATION CODES (SPC-4 §6.35) answers from.

use super::{Cdb, Plan, Refusal, Sense, cut, ports};

pub(super) const TEST_UNIT_READY: u8 = 0x00;
pub(super) const REQUEST_SENSE: u8 = 0x03;
pub(super) const READ_6: u8 = 0x08;
pub(super) const WRITE_6: u8 = 0x0a;
pub(super) const INQUIRY: u8 = 0x12;
pub(super) const MODE_SELECT_6: u8 = 0x15;
pub(super) const RESERVE_6: u8 = 0x16;
pub(super) const RELEASE_6: u8 = 0x17;
pub(super) const MODE_SENSE_6: u8 = 0x1a;
pub(super) const START_STOP_UNIT: u8 = 0x1b;
pub(super) const PREVENT_ALLOW: u8 = 0x1e;
pub(super) const READ_CAPACITY_10: u8 = 0x25;
pub(super) const READ_10: u8 = 0x28;
pub(super) const WRITE_10: u8 = 0x2a;
pub(super) const WRITE_VERIFY_10: u8 = 0x2e;
pub(super) const VERIFY_10: u8 = 0x2f;
pub(super) const PREFETCH_10: u8 = 0x34;
pub(super) const SYNCHRONIZE_CACHE_10: u8 = 0x35;
pub(super) const READ_DEFECT_DATA_10: u8 = 0x37;
pub(super) const WRITE_SAME_10: u8 = 0x41;
pub(super) const UNMAP: u8 = 0x42;
pub(super) const MODE_SELECT_10: u8 = 0x55;
pub(super) const RESERVE_10: u8 = 0x56;
pub(super) const RELEASE_10: u8 = 0x57;
pub(super) const MODE_SENSE_10: u8 = 0x5a;
pub(super) const PERSISTENT_RESERVE_IN: u8 = 0x5e;
pub(super) const PERSISTENT_RESERVE_OUT: u8 = 0x5f;
pub(super) const EXTENDED_COPY: u8 = 0x83;
pub(super) const RECEIVE_COPY_RESULTS: u8 = 0x84;
pub(super) const READ_16: u8 = 0x88;
pub(super) const COMPARE_AND_WRITE: u8 = 0x89;
pub(super) const WRITE_16: u8 = 0x8a;
pub(super) const OR_WRITE_16: u8 = 0x8b;
pub(super) const WRITE_VERIFY_16: u8 = 0x8e;
pub(super) const VERIFY_16: u8 = 0x8f;
pub(super) const PREFETCH_16: u8 = 0x90;
pub(super) const SYNCHRONIZE_CACHE_16: u8 = 0x91;
pub(super) const WRITE_SAME_16: u8 = 0x93;
pub(super) const SERVICE_ACTION_IN_16: u8 = 0x9e;
pub(super) const REPORT_LUNS: u8 = 0xa0;
pub(super) const MAINTENANCE_IN: u8 = 0xa3;
pub(super) const READ_12: u8 = 0xa8;
pub(super) const WRITE_12: u8 = 0xaa;
pub(super) const WRITE_VERIFY_12: u8 = 0xae;
pub(super) const VERIFY_12: u8 = 0xaf;
pub(super) const READ_DEFECT_DATA_12: u8 = 0xb7;

/// Service actions of SERVICE ACTION IN(16).
pub(super) const READ_CAPACITY_16: u8 = 0x10;
pub(super) const GET_LBA_STATUS: u8 = 0x12;
/// Service actions of RECEIVE COPY RESULTS.
pub(super) const COPY_STATUS: u8 = 0x00;
pub(super) const COPY_PARAMETERS: u8 = 0x03;
/// Service actions of MAINTENANCE IN.
const REPORT_TARGET_PORT_GROUPS: u8 = 0x0a;
const REPORT_SUPPORTED_OPCODES: u8 = 0x0c;
const REPORT_SUPPORTED_FUNCTIONS: u8 = 0x0d;

/// One supported command: operation code, service action, and CDB usage data after the operation code, which shows the
/// bits that are looked at (the service action's own bits included).
struct Supported(u8, Option<u8>, &'static [u8]);

const USAGE_10: &[u8] = &[0xf8, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00];
const USAGE_12: &[u8] = &[0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00];
const USAGE_16: &[u8] = &[0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00];
const VERIFY_USAGE_10: &[u8] = &[0xf6, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00];
const VERIFY_USAGE_12: &[u8] = &[0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00];
const VERIFY_USAGE_16: &[u8] =
    &[0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00];
const CACHE_USAGE_10: &[u8] = &[0x02, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00];
const CACHE_USAGE_16: &[u8] =
    &[0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00];
const SAME_USAGE_16: &[u8] =
    &[0xf9, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00];
const COMPARE_USAGE: &[u8] =
    &[0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0xff, 0x00, 0x00];
const ACTION_IN_USAGE: &[u8] =
    &[0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00];
const RESERVE_IN_USAGE: &[u8] = &[0x1f, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00];
const RESERVE_OUT_USAGE: &[u8] = &[0x1f, 0xff, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00];
const COPY_USAGE: &[u8] = &[0x1f, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00];
const COPY_RESULTS_USAGE: &[u8] = &[0x1f, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00];
const NO_FIELDS_10: &[u8] = &[0x00; 9];

const SUPPORTED: &[Supported] = &[
    Supported(TEST_UNIT_READY, None, &[0x00; 5]),
    Supported(REQUEST_SENSE, None, &[0x01, 0x00, 0x00, 0xff, 0x00]),
    Supported(READ_6, None, &[0x1f, 0xff, 0xff, 0xff, 0x00]),
    Supported(WRITE_6, None, &[0x1f, 0xff, 0xff, 0xff, 0x00]),
    Supported(INQUIRY, None, &[0x01, 0xff, 0xff, 0xff, 0x00]),
    Supported(MODE_SELECT_6, None, &[0x11, 0x00, 0x00, 0xff, 0x00]),
    Supported(RESERVE_6, None, &[0x00; 5]),
    Supported(RELEASE_6, None, &[0x00; 5]),
    Supported(MODE_SENSE_6, None, &[0x08, 0xff, 0xff, 0xff, 0x00]),
    Supported(START_STOP_UNIT, None, &[0x00; 5]),
    Supported(PREVENT_ALLOW, None, &[0x00; 5]),
    Supported(READ_CAPACITY_10, None, NO_FIELDS_10),
    Supported(READ_10, None, USAGE_10),
    Supported(WRITE_10, None, USAGE_10),
    Supported(WRITE_VERIFY_10, None, VERIFY_USAGE_10),
    Supported(VERIFY_10, None, VERIFY_USAGE_10),
    Supported(PREFETCH_10, None, CACHE_USAGE_10),
    Supported(SYNCHRONIZE_CACHE_10, None, CACHE_USAGE_10),
    Supported(READ_DEFECT_DATA_10, None, &[0x00, 0x1f, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
    Supported(WRITE_SAME_10, None, USAGE_10),
    Supported(UNMAP, None, &[0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
    Supported(MODE_SELECT_10, None, &[0x11, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
    Supported(RESERVE_10, None, NO_FIELDS_10),
    Supported(RELEASE_10, None, NO_FIELDS_10),
    Supported(MODE_SENSE_10, None, &[0x18, 0xff, 0xff, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
    Supported(PERSISTENT_RESERVE_IN, Some(0x00), RESERVE_IN_USAGE),
    Supported(PERSISTENT_RESERVE_IN, Some(0x01), RESERVE_IN_USAGE),
    Supported(PERSISTENT_RESERVE_IN, Some(0x02), RESERVE_IN_USAGE),
    Supported(PERSISTENT_RESERVE_IN, Some(0x03), RESERVE_IN_USAGE),
    Supported(PERSISTENT_RESERVE_OUT, Some(0x00), RESERVE_OUT_USAGE),
    Supported(PERSISTENT_RESERVE_OUT, Some(0x01), RESERVE_OUT_USAGE),
    Supported(PERSISTENT_RESERVE_OUT, Some(0x02), RESERVE_OUT_USAGE),
    Supported(PERSISTENT_RESERVE_OUT, Some(0x03), RESERVE_OUT_USAGE),
    Supported(PERSISTENT_RESERVE_OUT, Some(0x04), RESERVE_OUT_USAGE),
    Supported(PERSISTENT_RESERVE_OUT, Some(0x06), RESERVE_OUT_USAGE),
    Supported(EXTENDED_COPY, Some(0x00), COPY_USAGE),
    Supported(RECEIVE_COPY_RESULTS, Some(COPY_STATUS), COPY_RESULTS_USAGE),
    Supported(RECEIVE_COPY_RESULTS, Some(COPY_PARAMETERS), COPY_RESULTS_USAGE),
    Supported(READ_16, None, USAGE_16),
    Supported(COMPARE_AND_WRITE, None, COMPARE_USAGE),
    Supported(WRITE_16, None, USAGE_16),
    Supported(OR_WRITE_16, None, USAGE_16),
    Supported(WRITE_VERIFY_16, None, VERIFY_USAGE_16),
    Supported(VERIFY_16, None, VERIFY_USAGE_16),
    Supported(PREFETCH_16, None, CACHE_USAGE_16),
    Supported(SYNCHRONIZE_CACHE_16, None, CACHE_USAGE_16),
    Supported(WRITE_SAME_16, None, SAME_USAGE_16),
    Supported(SERVICE_ACTION_IN_16, Some(READ_CAPACITY_16), ACTION_IN_USAGE),
    Supported(SERVICE_ACTION_IN_16, Some(GET_LBA_STATUS), ACTION_IN_USAGE),
    Supported(REPORT_LUNS, None, &[0x00, 0xff, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
    Supported(
        MAINTENANCE_IN,
        Some(REPORT_TARGET_PORT_GROUPS),
        &[0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00],
    ),
    Supported(
        MAINTENANCE_IN,
        Some(REPORT_SUPPORTED_OPCODES),
        &[0x1f, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00],
    ),
    Supported(
        MAINTENANCE_IN,
        Some(REPORT_SUPPORTED_FUNCTIONS),
        &[0x1f, 0x80, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00],
    ),
    Supported(READ_12, None, USAGE_12),
    Supported(WRITE_12, None, USAGE_12),
    Supported(WRITE_VERIFY_12, None, VERIFY_USAGE_12),
    Supported(VERIFY_12, None, VERIFY_USAGE_12),
    Supported(READ_DEFECT_DATA_12, None, &[0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
];

/// MAINTENANCE IN: target port groups, and which commands and task management functions there are.
pub(super) fn maintenance_in(cdb: &Cdb) -> Result<Plan, Refusal> {
    let allocation = cdb.word(6) as usize;
    match cdb.service_action() {
        REPORT_TARGET_PORT_GROUPS => ports::report(cdb),
        REPORT_SUPPORTED_OPCODES => {
            let timeouts = cdb.octet(2) & 0x80 != 0;
            let data = match cdb.octet(2) & 0x07 {
                0 => all(timeouts),
                options @ 1..=3 => one(options, cdb.octet(3), cdb.half(4), timeouts)?,
                _ => return Err(Sense::invalid_octet(2).into()),
            };
            Ok(cut(data, allocation))
        }
        REPORT_SUPPORTED_FUNCTIONS => {
            if allocation < 4 {
                return Err(Sense::INVALID_FIELD_IN_CDB.into());
            }
            // Abort task, abort task set, clear task set, logical unit reset.
            let mut data = vec![0x80 | 0x40 | 0x10 | 0x08, 0, 0, 0];
            if cdb.octet(2) & 0x80 != 0 {
                data[3] = 12;
                data.extend_from_slice(&[0; 12]);
            }
            Ok(cut(data, allocation))
        }
        _ => Err(Sense::invalid_octet(1).into()),
    }
}

fn all(timeouts: bool) -> Vec<u8> {
    let mut list = Vec::new();
    for Supported(opcode, action, usage) in SUPPORTED {
        let flags = u8::from(action.is_some()) | if timeouts { 0x02 } else { 0 };
        let cdb_octets = u8::try_from(usage.len() + 1).unwrap_or(0);
        list.extend_from_slice(&[*opcode, 0, 0, action.unwrap_or(0), 0, flags, 0, cdb_octets]);
        if timeouts {
            list.extend_from_slice(&TIMEOUTS);
        }
    }
    let length = u32::try_from(list.len()).unwrap_or(0);
    [length.to_be_bytes().to_vec(), list].concat()
}

/// Command timeouts descriptor that names no timeout (SPC-4 §6.35.4).
const TIMEOUTS: [u8; 12] = [0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn one(options: u8, opcode: u8, action: u16, timeouts: bool) -> Result<Vec<u8>, Refusal> {
    let has_actions = SUPPORTED.iter().any(|entry| entry.0 == opcode && entry.1.is_some());
    let known = SUPPORTED.iter().any(|entry| entry.0 == opcode);
    // 1: without service action; 2: with; 3: either.
    if (options == 1 && has_actions) || (options == 2 && known && !has_actions) {
        return Err(Sense::invalid_octet(2).into());
    }
    let found = SUPPORTED
        .iter()
        .find(|entry| entry.0 == opcode && (entry.1.is_none() || entry.1.map(u16::from) == Some(action)));
    let Some(Supported(_, _, usage)) = found else {
        return Ok(vec![0, 0x01, 0, 0]);
    };
    let cdb_octets = u8::try_from(usage.len() + 1).unwrap_or(0);
    let mut data = vec![0, if timeouts { 0x83 } else { 0x03 }, 0, cdb_octets, opcode];
    data.extend_from_slice(usage);
    if timeouts {
        data.extend_from_slice(&TIMEOUTS);
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_data_has_the_length_of_the_command_group() {
        for Supported(opcode, _, usage) in SUPPORTED {
            let expected = match opcode >> 5 {
                0 => 6,
                1 | 2 => 10,
                4 => 16,
                5 => 12,
                group => panic!("group {group} is not used"),
            };
            assert_eq!(usage.len() + 1, expected, "operation code {opcode:#x}");
        }
    }

    #[test]
    fn one_command_is_reported_by_each_option() {
        assert_eq!(one(1, READ_10, 0, false).unwrap()[1..4], [0x03, 0, 10]);
        assert_eq!(one(2, SERVICE_ACTION_IN_16, 0x10, true).unwrap()[1..4], [0x83, 0, 16]);
        assert_eq!(one(1, SERVICE_ACTION_IN_16, 0, false), Err(Sense::invalid_octet(2).into()));
        assert_eq!(one(2, READ_10, 0, false), Err(Sense::invalid_octet(2).into()));
        assert_eq!(one(3, 0xff, 0, false).unwrap(), [0, 1, 0, 0]);
    }
}
