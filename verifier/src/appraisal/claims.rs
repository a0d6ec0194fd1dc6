//! Which events a named rule has decided on: what is left must be expected by its PCR's list.

use crate::event_log::Event;
use std::collections::BTreeSet;

/// Events, by their place in the log, that a named rule has decided on.
#[derive(Debug, Default)]
pub(super) struct Claims(BTreeSet<usize>);

impl Claims {
    pub(super) fn claim(&mut self, event: &Event<'_>) {
        self.0.insert(event.index());
    }

    pub(super) fn has(&self, event: &Event<'_>) -> bool {
        self.0.contains(&event.index())
    }
}
