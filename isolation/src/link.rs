//! The link of an admitted node's port. Pure: readings in, a verdict out.
//!
//! A cable that is pulled may come back in another machine, so a link that goes down ends the admission (attack D1). But
//! not at once: the hand-over to the tenant's kernel and every reload of a network driver take a real link down for some
//! seconds while it is negotiated again, and a site that fenced each of those would never boot anything. So a link may be
//! down for a *grace period*, and whatever happened in it is asked elsewhere: each flap has the BMC asked for a reset at
//! once, and a machine that was put in the node's place does not have the TPM that the next renewal needs. A site whose
//! ports never flap sets the grace to 0.
//!
//! A switch that cannot tell (`Unknown`) says nothing, unless it could before: then the device behind the port is gone.

use crate::switch::{Link, LinkReading};
use assay_wire::id::AdmissionId;

/// What has been seen of the link since the admission, or since this process began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkWatch {
    admission: Option<AdmissionId>,
    seen_up: bool,
    down: Option<Down>,
    changes: Option<i64>,
    flapped: bool,
}

/// A link that is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Down {
    first_seen_ms: i64,
    last_seen_ms: i64,
}

impl LinkWatch {
    /// Takes a reading of the boot NIC's port. `admission` is the one that stands; with another one, watching begins anew,
    /// except for the switch's count: a flap after the admission and before its first reading has to be seen, too.
    pub fn saw(&mut self, admission: Option<AdmissionId>, reading: LinkReading, now_ms: i64) {
        if admission != self.admission {
            *self = Self { admission, changes: self.changes, ..Self::default() };
        }
        let went_down_between = self.changes.is_some_and(|before| reading.changes.is_some_and(|now| now != before));
        self.changes = reading.changes.or(self.changes);
        self.flapped |= went_down_between;
        match reading.link {
            Link::Up => {
                self.seen_up = true;
                self.down = None;
            }
            Link::Unknown if !self.seen_up => {}
            Link::Down | Link::Unknown => {
                self.flapped |= self.down.is_none() && self.seen_up;
                let first_seen_ms = self.down.map_or(now_ms, |down| down.first_seen_ms);
                self.down = Some(Down { first_seen_ms, last_seen_ms: now_ms });
            }
        }
    }

    /// Whether the link was down for as long as `grace_ms` while `admission` stood, by the readings alone.
    #[must_use]
    pub fn is_lost(&self, admission: Option<AdmissionId>, grace_ms: i64) -> bool {
        let long = |down: Down| down.last_seen_ms.saturating_sub(down.first_seen_ms) >= grace_ms;
        self.admission == admission && self.down.is_some_and(long)
    }

    /// Whether it went down, if only for a moment, since [`LinkWatch::flap_was_looked_into`].
    #[must_use]
    pub fn flapped(&self) -> bool {
        self.flapped
    }

    /// The BMC was asked.
    pub fn flap_was_looked_into(&mut self) {
        self.flapped = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reading(link: Link, changes: i64) -> LinkReading {
        LinkReading { link, changes: Some(changes) }
    }

    #[test]
    fn d1_a_link_that_stays_down_is_lost_and_one_that_comes_back_is_not() {
        let id = Some(AdmissionId::random());
        let mut watch = LinkWatch::default();
        watch.saw(id, reading(Link::Up, 1), 0);
        watch.saw(id, reading(Link::Down, 2), 1000);
        assert!(!watch.is_lost(id, 15_000) && watch.is_lost(id, 0) && watch.flapped());
        watch.saw(id, reading(Link::Down, 2), 15_999);
        assert!(!watch.is_lost(id, 15_000));
        watch.saw(id, reading(Link::Down, 2), 16_000);
        assert!(watch.is_lost(id, 15_000));
        watch.saw(id, reading(Link::Up, 3), 17_000);
        assert!(!watch.is_lost(id, 0));
    }

    #[test]
    fn d1_a_flap_between_two_readings_is_seen_by_the_switchs_own_count() {
        let id = Some(AdmissionId::random());
        let mut watch = LinkWatch::default();
        watch.saw(id, reading(Link::Up, 4), 0);
        assert!(!watch.flapped());
        watch.saw(id, reading(Link::Up, 6), 1000);
        assert!(watch.flapped() && !watch.is_lost(id, 0));
        watch.flap_was_looked_into();
        watch.saw(id, reading(Link::Up, 6), 2000);
        assert!(!watch.flapped());
    }

    #[test]
    fn d1_a_flap_between_the_admission_and_its_first_reading_is_seen() {
        let mut watch = LinkWatch::default();
        watch.saw(None, reading(Link::Up, 4), 0);
        let id = Some(AdmissionId::random());
        watch.saw(id, reading(Link::Up, 6), 1000);
        assert!(watch.flapped() && !watch.is_lost(id, 0));
    }

    #[test]
    fn d1_a_switch_that_cannot_tell_says_nothing_until_it_could() {
        let id = Some(AdmissionId::random());
        let unknown = LinkReading { link: Link::Unknown, changes: None };
        let mut watch = LinkWatch::default();
        watch.saw(id, unknown, 0);
        watch.saw(id, unknown, 60_000);
        assert!(!watch.is_lost(id, 0) && !watch.flapped());
        watch.saw(id, reading(Link::Up, 1), 61_000);
        watch.saw(id, unknown, 62_000);
        assert!(watch.is_lost(id, 0) && watch.flapped(), "the device behind the port is gone");
        // Another admission: what was seen under the old one does not count.
        let next = Some(AdmissionId::random());
        assert!(!watch.is_lost(next, 0));
        watch.saw(next, unknown, 63_000);
        assert!(!watch.is_lost(next, 0));
    }

    proptest! {
        #[test]
        fn a_link_that_was_last_seen_up_is_never_lost(
            links in prop::collection::vec((0_u8..3, 0_i64..9), 0..20), grace_ms in 0_i64..10_000
        ) {
            let id = Some(AdmissionId::random());
            let mut watch = LinkWatch::default();
            for (at, (link, changes)) in (0_i64..).zip(links) {
                let link = match link { 0 => Link::Up, 1 => Link::Down, _ => Link::Unknown };
                watch.saw(id, reading(link, changes), at * 1000);
            }
            watch.saw(id, reading(Link::Up, 0), 1_000_000);
            prop_assert!(!watch.is_lost(id, grace_ms));
        }
    }
}
