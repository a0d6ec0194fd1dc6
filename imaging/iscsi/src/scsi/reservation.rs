//! Reservations: persistent ones (SPC-4 §5.13, §6.15, §6.16) and RESERVE/RELEASE (SPC-2). They matter where several
//! ports of one initiator share the unit, and to cluster software that insists on them. Kept in memory, as PTPL_C = 0
//! says.

use super::block::Purpose;
use super::opcodes;
use super::unit::{Nexus, UnitState};
use super::{Cdb, Plan, Refusal, Sense, cut};
use std::collections::BTreeMap;

/// Most registrations kept.
const REGISTRATIONS_LIMIT: usize = 64;
/// Length of PERSISTENT RESERVE OUT's parameter list without transport ids, in octets.
const LIST_OCTETS: u32 = 24;
/// RESERVATIONS RELEASED, RESERVATIONS PREEMPTED, REGISTRATIONS PREEMPTED.
const RELEASED: Sense = Sense::attention(0x2a04);
const PREEMPTED: Sense = Sense::attention(0x2a03);
const UNREGISTERED: Sense = Sense::attention(0x2a05);

/// All reservations of a unit.
#[derive(Debug, Default)]
pub(crate) struct Reservations {
    legacy: Option<Nexus>,
    keys: BTreeMap<Nexus, u64>,
    held: Option<Held>,
    generation: u32,
}

/// A persistent reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    holder: Nexus,
    kind: Kind,
}

/// Persistent reservation types (SPC-4 table 217).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrants = 5,
    ExclusiveAccessRegistrants = 6,
    WriteExclusiveAll = 7,
    ExclusiveAccessAll = 8,
}

impl Kind {
    fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            1 => Self::WriteExclusive,
            3 => Self::ExclusiveAccess,
            5 => Self::WriteExclusiveRegistrants,
            6 => Self::ExclusiveAccessRegistrants,
            7 => Self::WriteExclusiveAll,
            8 => Self::ExclusiveAccessAll,
            _ => return None,
        })
    }

    /// Every registrant is a holder.
    fn all_registrants(self) -> bool {
        matches!(self, Self::WriteExclusiveAll | Self::ExclusiveAccessAll)
    }

    /// Every registrant has access.
    fn admits_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    fn admits_reads(self) -> bool {
        matches!(self, Self::WriteExclusive | Self::WriteExclusiveRegistrants | Self::WriteExclusiveAll)
    }
}

/// How a reservation looks at a command (SPC-4 table 66, SBC-3 table 13).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Free,
    Read,
    Write,
}

fn access(cdb: &Cdb) -> Access {
    match cdb.opcode() {
        opcodes::INQUIRY
        | opcodes::REPORT_LUNS
        | opcodes::REQUEST_SENSE
        | opcodes::TEST_UNIT_READY
        | opcodes::READ_CAPACITY_10
        | opcodes::MAINTENANCE_IN
        | opcodes::PERSISTENT_RESERVE_IN
        | opcodes::PERSISTENT_RESERVE_OUT
        | opcodes::START_STOP_UNIT
        | opcodes::RESERVE_6
        | opcodes::RESERVE_10
        | opcodes::RELEASE_6
        | opcodes::RELEASE_10 => Access::Free,
        opcodes::SERVICE_ACTION_IN_16 if cdb.service_action() == opcodes::READ_CAPACITY_16 => Access::Free,
        opcodes::READ_6
        | opcodes::READ_10
        | opcodes::READ_12
        | opcodes::READ_16
        | opcodes::VERIFY_10
        | opcodes::VERIFY_12
        | opcodes::VERIFY_16
        | opcodes::PREFETCH_10
        | opcodes::PREFETCH_16
        | opcodes::READ_DEFECT_DATA_10
        | opcodes::READ_DEFECT_DATA_12
        | opcodes::RECEIVE_COPY_RESULTS
        | opcodes::SERVICE_ACTION_IN_16 => Access::Read,
        _ => Access::Write,
    }
}

impl Reservations {
    /// Whether `nexus` may send this command.
    pub(crate) fn allow(&self, nexus: Nexus, cdb: &Cdb) -> bool {
        if self.legacy.is_some_and(|holder| holder != nexus) {
            return matches!(
                cdb.opcode(),
                opcodes::INQUIRY
                    | opcodes::REPORT_LUNS
                    | opcodes::REQUEST_SENSE
                    | opcodes::RELEASE_6
                    | opcodes::RELEASE_10
            );
        }
        let Some(held) = self.held else {
            return true;
        };
        let registered = self.keys.contains_key(&nexus);
        match access(cdb) {
            _ if registered && (held.holder == nexus || held.kind.admits_registrants()) => true,
            Access::Free => true,
            Access::Read => held.kind.admits_reads(),
            Access::Write => false,
        }
    }

    /// RESERVE and RELEASE, 6 and 10: refused while persistent registrations exist (SPC-2 §5.5.1).
    pub(super) fn legacy(&mut self, nexus: Nexus, cdb: &Cdb) -> Result<Plan, Refusal> {
        if !self.keys.is_empty() {
            return Err(Refusal::Reservation);
        }
        // Third-party and extent reservations are obsolete.
        if cdb.octet(1) & 0x1f != 0 {
            return Err(Sense::INVALID_FIELD_IN_CDB.into());
        }
        if matches!(cdb.opcode(), opcodes::RESERVE_6 | opcodes::RESERVE_10) {
            // `allow` refused any other nexus while one holds it.
            self.legacy = Some(nexus);
        } else {
            self.release_legacy(nexus);
        }
        Ok(Plan::Good)
    }

    pub(crate) fn release_legacy(&mut self, nexus: Nexus) {
        self.legacy = self.legacy.filter(|holder| *holder != nexus);
    }

    pub(crate) fn reset_legacy(&mut self) {
        self.legacy = None;
    }

    /// PERSISTENT RESERVE IN.
    pub(super) fn persistent_in(&self, initiator: &str, cdb: &Cdb) -> Result<Plan, Refusal> {
        let body = match cdb.service_action() {
            0x00 => self.keys.values().flat_map(|key| key.to_be_bytes()).collect(),
            0x01 => self.held.map(|held| self.describe(held)).unwrap_or_default(),
            // TMV; all six types. Nothing survives power loss.
            0x02 => return Ok(cut(vec![0, 8, 0x00, 0x80, 0xea, 0x01, 0, 0], usize::from(cdb.half(7)))),
            0x03 => self.keys.iter().flat_map(|(nexus, key)| self.full_status(initiator, *nexus, *key)).collect(),
            _ => return Err(Sense::INVALID_FIELD_IN_CDB.into()),
        };
        let length = u32::try_from(body.len()).unwrap_or(0);
        let data = [self.generation.to_be_bytes().to_vec(), length.to_be_bytes().to_vec(), body].concat();
        Ok(cut(data, usize::from(cdb.half(7))))
    }

    /// READ RESERVATION's descriptor.
    fn describe(&self, held: Held) -> Vec<u8> {
        let key = if held.kind.all_registrants() { 0 } else { self.keys.get(&held.holder).copied().unwrap_or(0) };
        let mut descriptor = key.to_be_bytes().to_vec();
        descriptor.extend_from_slice(&[0, 0, 0, 0, 0, held.kind as u8, 0, 0]);
        descriptor
    }

    /// READ FULL STATUS's descriptor (SPC-4 §6.15.5), with an iSCSI transport id of format 01b (§7.6.4.6).
    fn full_status(&self, initiator: &str, nexus: Nexus, key: u64) -> Vec<u8> {
        let held = self.held.filter(|held| held.holder == nexus || held.kind.all_registrants());
        let mut port = format!("{initiator},i,0x{}", hex::encode(nexus.0)).into_bytes();
        port.resize((port.len() / 4 + 1) * 4, 0);
        let port_octets = u16::try_from(port.len()).unwrap_or(0);
        let mut data = key.to_be_bytes().to_vec();
        data.extend_from_slice(&[0, 0, 0, 0]);
        data.extend_from_slice(&[u8::from(held.is_some()), held.map_or(0, |held| held.kind as u8), 0, 0, 0, 0]);
        // Relative target port 1.
        data.extend_from_slice(&[0, 1]);
        data.extend_from_slice(&(u32::from(port_octets) + 4).to_be_bytes());
        data.extend_from_slice(&[0x45, 0]);
        data.extend_from_slice(&port_octets.to_be_bytes());
        data.extend_from_slice(&port);
        data
    }

    fn is_holder(&self, nexus: Nexus) -> bool {
        self.held
            .is_some_and(|held| held.holder == nexus || (held.kind.all_registrants() && self.keys.contains_key(&nexus)))
    }

    /// Takes a registration away. A reservation goes with its holder, or with the last of all registrants.
    fn unregister(&mut self, nexus: Nexus) -> Option<Held> {
        self.keys.remove(&nexus);
        let held = self.held?;
        let gone = if held.kind.all_registrants() { self.keys.is_empty() } else { held.holder == nexus };
        if gone { self.held.take() } else { None }
    }
}

/// PERSISTENT RESERVE OUT: plans to collect the parameter list.
pub(super) fn persistent_out(cdb: &Cdb) -> Result<Plan, Refusal> {
    let (action, scope_and_type) = (cdb.service_action(), cdb.octet(2));
    if !matches!(action, 0x00..=0x04 | 0x06) {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    // Reserve, release and preempt name a type, and the whole unit.
    if matches!(action, 0x01 | 0x02 | 0x04) && Kind::from_bits(scope_and_type).is_none() {
        return Err(Sense::INVALID_FIELD_IN_CDB.into());
    }
    if cdb.word(5) != LIST_OCTETS {
        return Err(Sense::PARAMETER_LIST_LENGTH.into());
    }
    Ok(Plan::Collect(LIST_OCTETS, Purpose::PersistentReserve { action, scope_and_type }))
}

/// PERSISTENT RESERVE OUT with its parameter list.
pub(super) fn apply(
    unit: &mut UnitState,
    nexus: Nexus,
    action: u8,
    scope_and_type: u8,
    list: &[u8],
) -> Result<(), Refusal> {
    if list.len() != LIST_OCTETS as usize {
        return Err(Sense::PARAMETER_LIST_LENGTH.into());
    }
    let double = |offset: usize| u64::from_be_bytes(std::array::from_fn(|index| list[offset + index]));
    let (key, action_key) = (double(0), double(8));
    // SPEC_I_PT, ALL_TG_PT and APTPL: capabilities that REPORT CAPABILITIES does not claim.
    if list[20] & 0x0d != 0 {
        return Err(Sense::INVALID_FIELD_IN_LIST.into());
    }
    let registered = unit.reservations.keys.get(&nexus).copied();
    let may_register = action == 0x06 || registered.unwrap_or(0) == key;
    match (action, Kind::from_bits(scope_and_type)) {
        (0x00 | 0x06, _) if may_register => register(unit, nexus, action_key),
        (0x00 | 0x06, _) => Err(Refusal::Reservation),
        _ if registered != Some(key) => Err(Refusal::Reservation),
        (0x01, Some(kind)) => reserve(unit, Held { holder: nexus, kind }),
        (0x02, Some(kind)) => release(unit, nexus, kind),
        (0x03, _) => {
            unit.reservations.held = None;
            let registrants = std::mem::take(&mut unit.reservations.keys);
            unit.reservations.generation = unit.reservations.generation.wrapping_add(1);
            tell(unit, registrants.into_keys().filter(|other| *other != nexus), PREEMPTED);
            Ok(())
        }
        (0x04, Some(kind)) => preempt(unit, Held { holder: nexus, kind }, action_key),
        _ => Err(Sense::INVALID_FIELD_IN_CDB.into()),
    }
}

fn register(unit: &mut UnitState, nexus: Nexus, key: u64) -> Result<(), Refusal> {
    let reservations = &mut unit.reservations;
    if key == 0 {
        if let Some(gone) = reservations.unregister(nexus)
            && gone.kind.admits_registrants()
        {
            let others: Vec<Nexus> = reservations.keys.keys().copied().collect();
            tell(unit, others, RELEASED);
        }
    } else {
        if !reservations.keys.contains_key(&nexus) && reservations.keys.len() >= REGISTRATIONS_LIMIT {
            return Err(Sense::NO_REGISTRATION_ROOM.into());
        }
        reservations.keys.insert(nexus, key);
    }
    unit.reservations.generation = unit.reservations.generation.wrapping_add(1);
    Ok(())
}

fn reserve(unit: &mut UnitState, wanted: Held) -> Result<(), Refusal> {
    match unit.reservations.held {
        None => {
            unit.reservations.held = Some(wanted);
            Ok(())
        }
        Some(held) if unit.reservations.is_holder(wanted.holder) && held.kind == wanted.kind => Ok(()),
        Some(_) => Err(Refusal::Reservation),
    }
}

fn release(unit: &mut UnitState, nexus: Nexus, kind: Kind) -> Result<(), Refusal> {
    let Some(held) = unit.reservations.held.filter(|_| unit.reservations.is_holder(nexus)) else {
        // Releasing what one does not hold is not an error (SPC-4 §5.13.11.2.2).
        return Ok(());
    };
    if held.kind != kind {
        return Err(Sense::INVALID_RELEASE.into());
    }
    unit.reservations.held = None;
    if kind.admits_registrants() {
        let others: Vec<Nexus> = unit.reservations.keys.keys().copied().filter(|other| *other != nexus).collect();
        tell(unit, others, RELEASED);
    }
    Ok(())
}

/// PREEMPT (SPC-4 §5.13.11.2.5): takes away the registrations with `key`, and the reservation if theirs.
fn preempt(unit: &mut UnitState, wanted: Held, key: u64) -> Result<(), Refusal> {
    let reservations = &mut unit.reservations;
    let all_registrants = reservations.held.is_some_and(|held| held.kind.all_registrants());
    let everyone = key == 0 && all_registrants;
    if key == 0 && !everyone {
        return Err(Sense::INVALID_FIELD_IN_LIST.into());
    }
    let takes_over = match reservations.held {
        Some(held) => everyone || reservations.keys.get(&held.holder) == Some(&key) && !all_registrants,
        None => false,
    };
    let gone: Vec<Nexus> = reservations
        .keys
        .iter()
        .filter(|(nexus, other)| **nexus != wanted.holder && (everyone || **other == key))
        .map(|(nexus, _)| *nexus)
        .collect();
    if gone.is_empty() && !takes_over {
        return Err(Refusal::Reservation);
    }
    for nexus in &gone {
        reservations.keys.remove(nexus);
    }
    if takes_over {
        reservations.held = Some(wanted);
    }
    reservations.generation = reservations.generation.wrapping_add(1);
    tell(unit, gone, UNREGISTERED);
    Ok(())
}

fn tell(unit: &mut UnitState, nexuses: impl IntoIterator<Item = Nexus>, attention: Sense) {
    for nexus in nexuses {
        unit.attend(nexus, attention);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Nexus = Nexus([1; 6]);
    const B: Nexus = Nexus([2; 6]);

    fn out(unit: &mut UnitState, nexus: Nexus, action: u8, kind: u8, keys: (u64, u64)) -> Result<(), Refusal> {
        let list = [keys.0.to_be_bytes(), keys.1.to_be_bytes(), [0; 8]].concat();
        apply(unit, nexus, action, kind, &list)
    }

    fn command(opcode: u8) -> Cdb {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        Cdb(cdb)
    }

    fn unit() -> UnitState {
        let mut unit = UnitState::default();
        unit.attach(A);
        unit.attach(B);
        unit
    }

    #[test]
    fn write_exclusive_lets_others_read_only() {
        let mut unit = unit();
        out(&mut unit, A, 0, 0, (0, 7)).unwrap();
        assert_eq!(out(&mut unit, B, 1, 1, (7, 0)), Err(Refusal::Reservation));
        out(&mut unit, A, 1, 1, (7, 0)).unwrap();
        for (nexus, opcode, allowed) in
            [(A, opcodes::WRITE_10, true), (B, opcodes::READ_10, true), (B, opcodes::WRITE_10, false)]
        {
            assert_eq!(unit.reservations.allow(nexus, &command(opcode)), allowed);
        }
    }

    #[test]
    fn a_preempted_holder_loses_key_and_reservation_and_is_told() {
        let mut unit = unit();
        out(&mut unit, A, 0, 0, (0, 7)).unwrap();
        out(&mut unit, B, 0, 0, (0, 8)).unwrap();
        out(&mut unit, A, 1, 3, (7, 0)).unwrap();
        out(&mut unit, B, 4, 3, (8, 7)).unwrap();
        assert_eq!(unit.take_attention(A), Some(UNREGISTERED));
        assert!(!unit.reservations.allow(A, &command(opcodes::READ_10)));
        assert!(unit.reservations.allow(B, &command(opcodes::WRITE_10)));
    }

    #[test]
    fn a_reserve_6_ends_with_its_session() {
        let mut unit = UnitState::default();
        let attachment = unit.attach(A);
        unit.reservations.legacy(A, &command(opcodes::RESERVE_6)).unwrap();
        assert!(!unit.reservations.allow(B, &command(opcodes::TEST_UNIT_READY)));
        unit.detach(attachment);
        assert!(unit.reservations.allow(B, &command(opcodes::TEST_UNIT_READY)));
    }

    proptest! {
        #[test]
        fn any_order_keeps_a_holder_registered(
            steps in prop::collection::vec((any::<bool>(), 0u8..7, 0u8..9, 0u64..3, 0u64..3), 0..60),
        ) {
            let mut unit = unit();
            for (first, action, kind, key, action_key) in steps {
                let _ = out(&mut unit, if first { A } else { B }, action, kind, (key, action_key));
                if let Some(held) = unit.reservations.held {
                    let registered = unit.reservations.keys.contains_key(&held.holder) || held.kind.all_registrants();
                    prop_assert!(registered && !unit.reservations.keys.is_empty());
                }
            }
        }
    }
}
