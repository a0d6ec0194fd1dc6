//! Target port groups (SPC-4 §5.15, §6.37), which is how multipath software learns that all paths are equal: every
//! session of a target reaches the unit through the same port and the same process.

use super::{Cdb, Plan, Refusal, Sense, cut};

/// Relative target port identifier.
pub(super) const RELATIVE_PORT: u8 = 1;
/// The group that the port is in.
pub(super) const PORT_GROUP: u8 = 1;

/// REPORT TARGET PORT GROUPS: one group, active and optimized, with one port.
pub(super) fn report(cdb: &Cdb) -> Result<Plan, Refusal> {
    // Parameter data format: 0 is without the extended header, 1 with it.
    let header: &[u8] = match cdb.octet(1) >> 5 {
        0 => &[],
        // Format type 1, no implicit transition time.
        1 => &[0x10, 0, 0, 0],
        _ => return Err(Sense::invalid_octet(1).into()),
    };
    let group = [
        // PREF is not set; active/optimized. Only that state occurs.
        0x00,
        0x01,
        0,
        PORT_GROUP,
        0, // Status: not known, as it never changed.
        0x00,
        0,
        1, // One port.
        0,
        0,
        0,
        RELATIVE_PORT,
    ];
    let length = u32::try_from(header.len() + group.len()).unwrap_or(0);
    Ok(cut([&length.to_be_bytes()[..], header, &group].concat(), cdb.word(6) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(format: u8, allocation: u8) -> Result<Vec<u8>, Refusal> {
        let mut cdb = [0; 16];
        cdb[..2].copy_from_slice(&[0xa3, format << 5 | 0x0a]);
        cdb[9] = allocation;
        match report(&Cdb(cdb))? {
            Plan::Data(data) => Ok(data),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_one_group_is_optimized_in_either_format() {
        let group = [0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1];
        assert_eq!(ask(0, 255).unwrap(), [&[0, 0, 0, 12][..], &group].concat());
        assert_eq!(ask(1, 255).unwrap(), [&[0, 0, 0, 16, 0x10, 0, 0, 0][..], &group].concat());
        assert_eq!(ask(0, 6).unwrap().len(), 6);
        assert_eq!(ask(2, 255), Err(Sense::invalid_octet(1).into()));
    }
}
