//! The logical unit's SCSI state: what outlives one command and is shared by all sessions of the target.

use super::copy::Copies;
use super::reservation::Reservations;
use super::sense::Sense;
use std::collections::{BTreeMap, VecDeque};

/// An initiator port as the unit sees it: its ISID, since all ports of a target belong to one initiator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Nexus(pub(crate) [u8; 6]);

/// Most unit attentions kept per nexus; older ones give way.
const ATTENTIONS_LIMIT: usize = 8;
/// Most nexuses known at once: far more than sessions are allowed.
const NEXUS_LIMIT: usize = 64;

/// One session's hold on the unit: an I_T nexus that lasts until [`UnitState::detach`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attachment {
    pub(crate) nexus: Nexus,
    number: u64,
}

#[derive(Debug, Default)]
struct Attached {
    number: u64,
    pending: VecDeque<Sense>,
}

/// State of logical unit 0.
#[derive(Debug, Default)]
pub(crate) struct UnitState {
    attached: BTreeMap<Nexus, Attached>,
    attachments: u64,
    pub(crate) reservations: Reservations,
    pub(super) copies: Copies,
    /// Control mode page, D_SENSE: sense data in descriptor format.
    pub(crate) descriptor_sense: bool,
    /// Control mode page, SWP: software write protect.
    pub(crate) write_protect: bool,
}

impl UnitState {
    /// A session of `nexus` starts. Where the port had one before, that one is lost now: a RESERVE(6) goes with it,
    /// persistent reservations stay.
    pub(crate) fn attach(&mut self, nexus: Nexus) -> Attachment {
        self.attachments += 1;
        self.reservations.release_legacy(nexus);
        self.copies.forget(nexus);
        if self.attached.len() < NEXUS_LIMIT || self.attached.contains_key(&nexus) {
            self.attached.entry(nexus).or_default().number = self.attachments;
        }
        Attachment { nexus, number: self.attachments }
    }

    /// The session of `attachment` ended; nothing happens if its port has attached again since.
    pub(crate) fn detach(&mut self, attachment: Attachment) {
        let Attachment { nexus, number } = attachment;
        if self.attached.get(&nexus).is_some_and(|attached| attached.number == number) {
            self.attached.remove(&nexus);
            self.reservations.release_legacy(nexus);
            self.copies.forget(nexus);
        }
    }

    /// Logical unit reset (SAM-5 §6.3.3): what was set by MODE SELECT and RESERVE(6) is gone, every nexus is told.
    pub(crate) fn reset(&mut self) {
        self.descriptor_sense = false;
        self.write_protect = false;
        self.reservations.reset_legacy();
        self.copies.clear();
        // BUS DEVICE RESET FUNCTION OCCURRED.
        self.attend_all_but(None, Sense::attention(0x2903));
    }

    /// Establishes a unit attention for `nexus`.
    pub(crate) fn attend(&mut self, nexus: Nexus, attention: Sense) {
        if let Some(Attached { pending, .. }) = self.attached.get_mut(&nexus) {
            if pending.len() == ATTENTIONS_LIMIT {
                pending.pop_front();
            }
            pending.push_back(attention);
        }
    }

    /// Establishes a unit attention for every nexus but `except`.
    pub(crate) fn attend_all_but(&mut self, except: Option<Nexus>, attention: Sense) {
        let others: Vec<Nexus> = self.attached.keys().copied().filter(|nexus| Some(*nexus) != except).collect();
        for nexus in others {
            self.attend(nexus, attention);
        }
    }

    /// Takes the oldest pending attention of `nexus`.
    pub(crate) fn take_attention(&mut self, nexus: Nexus) -> Option<Sense> {
        self.attached.get_mut(&nexus)?.pending.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_told_to_every_nexus_once() {
        let mut unit = UnitState { write_protect: true, ..UnitState::default() };
        let (first, second) = (Nexus([1; 6]), Nexus([2; 6]));
        unit.attach(first);
        unit.attach(second);
        unit.reset();
        assert!(!unit.write_protect);
        for nexus in [first, second] {
            assert_eq!(unit.take_attention(nexus), Some(Sense::attention(0x2903)));
            assert_eq!(unit.take_attention(nexus), None);
        }
    }

    #[test]
    fn a_late_end_of_a_reinstated_session_takes_nothing_away() {
        let mut unit = UnitState::default();
        let old = unit.attach(Nexus([1; 6]));
        let new = unit.attach(Nexus([1; 6]));
        unit.detach(old);
        unit.attend(new.nexus, Sense::attention(1));
        assert_eq!(unit.take_attention(new.nexus), Some(Sense::attention(1)));
    }

    #[test]
    fn attentions_are_bounded() {
        let mut unit = UnitState::default();
        unit.attach(Nexus([1; 6]));
        for code in 0..100 {
            unit.attend(Nexus([1; 6]), Sense::attention(code));
        }
        assert_eq!(unit.take_attention(Nexus([1; 6])), Some(Sense::attention(92)));
    }
}
