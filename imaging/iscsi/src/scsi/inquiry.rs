//! INQUIRY and its vital product data (SPC-4 §6.6 and §7.8, SBC-3 §6.6).

use super::block::{
    MAX_COMPARE_BLOCKS, MAX_TRANSFER_OCTETS, MAX_UNMAP_BLOCKS, MAX_UNMAP_RANGES, MAX_WRITE_SAME_BLOCKS,
};
use super::{Cdb, Plan, Refusal, Sense, copy, cut, ports};
use crate::target::TargetConfig;

/// Product revision level: this device server's, not the image's.
const REVISION: &str = "0001";
/// SPC-4, SBC-3, SAM-5 and iSCSI, without claiming a revision (SPC-4 table 142).
const VERSIONS: [u16; 4] = [0x0460, 0x04c0, 0x00a0, 0x0960];

/// INQUIRY to unit 0.
pub(super) fn inquiry(config: &TargetConfig, cdb: &Cdb) -> Result<Plan, Refusal> {
    let allocation = usize::from(cdb.half(3));
    let (vital, page) = (cdb.octet(1) & 1 != 0, cdb.octet(2));
    // CMDDT is obsolete; a page code without EVPD is an error (SPC-4 §6.6.1).
    if cdb.octet(1) & 0xfe != 0 || (!vital && page != 0) {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    if !vital {
        return Ok(cut(standard(config, 0x00), allocation));
    }
    let body = match page {
        0x00 => vec![0x00, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2],
        0x80 => config.logical_unit.serial.clone().into_bytes(),
        0x83 => identification(config),
        0x86 => extended(config),
        0x8f => copy::vital_page(&config.logical_unit),
        0xb0 => block_limits(config),
        0xb1 => block_characteristics(),
        0xb2 => provisioning(),
        _ => return Err(Sense::INVALID_FIELD_IN_CDB.into()),
    };
    let [high, low] = u16::try_from(body.len()).unwrap_or(0).to_be_bytes();
    let mut data = vec![0x00, page, high, low];
    data.extend_from_slice(&body);
    Ok(cut(data, allocation))
}

/// INQUIRY to a unit that does not exist: peripheral qualifier 3, device type 1Fh.
pub(super) fn absent(config: &TargetConfig, cdb: &Cdb) -> Result<Plan, Refusal> {
    if cdb.octet(1) & 1 != 0 {
        return Err(Sense::NO_SUCH_UNIT.into());
    }
    Ok(cut(standard(config, 0x7f), usize::from(cdb.half(3))))
}

fn standard(config: &TargetConfig, peripheral: u8) -> Vec<u8> {
    let unit = &config.logical_unit;
    let mut data = vec![
        peripheral, 0x00,
        // SPC-4; HISUP (LUNs are hierarchical), response data format 2; additional length 66 - 5.
        0x06, 0x12, 61, // TPGS 01b: implicit asymmetric access. 3PC: copies.
        0x18, 0x00, // CMDQUE.
        0x02,
    ];
    data.extend_from_slice(&padded(&unit.vendor, 8));
    data.extend_from_slice(&padded(&unit.product, 16));
    data.extend_from_slice(&padded(REVISION, 4));
    data.resize(58, 0);
    data.extend(VERSIONS.iter().flat_map(|version| version.to_be_bytes()));
    data
}

/// Device identification (page 83h): the unit's designators, then those of the target port, its group and the target.
fn identification(config: &TargetConfig) -> Vec<u8> {
    let mut data = unit_designators(config).concat();
    // Relative target port, and target port group (associated with the port).
    data.extend(designator(0x51, 0x94, &[0, 0, 0, ports::RELATIVE_PORT]));
    data.extend(designator(0x51, 0x95, &[0, 0, 0, ports::PORT_GROUP]));
    // SCSI name strings of the port and of the target device (§7.8.6.11).
    let port = format!("{},t,0x{:04x}", config.name, crate::target::PORTAL_GROUP_TAG);
    data.extend(designator(0x53, 0x98, &zero_terminated(port)));
    data.extend(designator(0x53, 0xa8, &zero_terminated(config.name.clone())));
    data
}

/// What names the logical unit: an NAA and a T10 designator, each a whole designation descriptor.
pub(super) fn unit_designators(config: &TargetConfig) -> [Vec<u8>; 2] {
    let unit = &config.logical_unit;
    let naa = (3u64 << 60) | (unit.naa & 0x0fff_ffff_ffff_ffff);
    let mut t10 = padded(&unit.vendor, 8);
    t10.extend_from_slice(unit.serial.as_bytes());
    [designator(0x01, 0x03, &naa.to_be_bytes()), designator(0x02, 0x01, &t10)]
}

/// UTF-8, zero-terminated, a multiple of four octets.
fn zero_terminated(name: String) -> Vec<u8> {
    let mut name = name.into_bytes();
    name.resize((name.len() / 4 + 1) * 4, 0);
    name
}

/// Extended INQUIRY data (page 86h, SPC-4 §7.8.7): simple tasks only, and whether there is a volatile cache.
fn extended(config: &TargetConfig) -> Vec<u8> {
    let mut data = vec![0; 60];
    // SIMPSUP.
    data[1] = 0x01;
    // V_SUP.
    data[2] = u8::from(config.logical_unit.write_cache);
    data
}

/// One designation descriptor: protocol and code set, association and type, designator.
fn designator(code_set: u8, kind: u8, name: &[u8]) -> Vec<u8> {
    let mut data = vec![code_set, kind, 0, u8::try_from(name.len()).unwrap_or(0)];
    data.extend_from_slice(name);
    data
}

/// Block limits (page B0h).
fn block_limits(config: &TargetConfig) -> Vec<u8> {
    let max_transfer = MAX_TRANSFER_OCTETS / config.logical_unit.block_bytes;
    let mut data = vec![0; 60];
    // WSNZ: a WRITE SAME of zero blocks is refused.
    data[0] = 0x01;
    data[1] = MAX_COMPARE_BLOCKS;
    // Optimal granularity: 4 KiB, the store's page.
    data[2..4].copy_from_slice(&granularity(config).to_be_bytes());
    data[4..8].copy_from_slice(&max_transfer.to_be_bytes());
    data[8..12].copy_from_slice(&(max_transfer / 4).to_be_bytes());
    data[16..20].copy_from_slice(&MAX_UNMAP_BLOCKS.to_be_bytes());
    data[20..24].copy_from_slice(&MAX_UNMAP_RANGES.to_be_bytes());
    data[24..28].copy_from_slice(&u32::from(granularity(config)).to_be_bytes());
    data[32..40].copy_from_slice(&MAX_WRITE_SAME_BLOCKS.to_be_bytes());
    data
}

/// Blocks in 4 KiB.
fn granularity(config: &TargetConfig) -> u16 {
    if config.logical_unit.block_bytes == 512 { 8 } else { 1 }
}

/// Block device characteristics (page B1h): not rotating.
fn block_characteristics() -> Vec<u8> {
    let mut data = vec![0; 60];
    data[1] = 1;
    data
}

/// Logical block provisioning (page B2h): UNMAP, WRITE SAME with UNMAP (10 and 16), unmapped blocks read as zeros, thin.
fn provisioning() -> Vec<u8> {
    vec![0, 0xe4, 0x02, 0]
}

fn padded(text: &str, octets: usize) -> Vec<u8> {
    let mut field = text.as_bytes().to_vec();
    field.resize(octets, b' ');
    field
}
