//! Which events a named rule has decided on: what is left must be expected by its PCR's list.

use crate::event_log::{Event, ReplayedLog};
use std::collections::BTreeSet;

/// Events, by their place in the log, that a named rule has decided on.
#[derive(Debug, Default)]
pub(super) struct Claims(BTreeSet<usize>);

impl Claims {
    pub(super) fn claim(&mut self, event: &Event<'_>) {
        self.0.insert(event.index());
    }

    /// The events of `pcr` that no named rule has decided on.
    pub(super) fn unclaimed<'l, 'a>(
        &'l self,
        log: &'l ReplayedLog<'a>,
        pcr: u8,
    ) -> impl Iterator<Item = &'l Event<'a>> + use<'l, 'a> {
        log.events_of(pcr).filter(|event| !self.0.contains(&event.index()))
    }
}
