//! One connection's outgoing side: sequence numbers (RFC 7143 §4.2.2) and the queues that the driver empties.

use crate::io::Event;
use crate::pdu::{Digests, Header, Payload, Transmit};
use std::collections::VecDeque;

/// Commands that may be outstanding at once: the command window.
pub(crate) const WINDOW: u32 = 64;
/// Input waits while this many octets are queued to send.
const BACKLOG_OCTETS: usize = 4 * 1024 * 1024;
/// Input waits while this many PDUs are queued to send.
const BACKLOG_PDUS: usize = 1024;

/// Sequence numbers and queues.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) stat_sn: u32,
    pub(crate) exp_cmd_sn: u32,
    /// Commands of the window that are not finished.
    pub(crate) outstanding: u32,
    pub(crate) digests: Digests,
    /// The session is over: close once everything is sent.
    pub(crate) ending: bool,
    transmits: VecDeque<Transmit>,
    queued_octets: usize,
    events: VecDeque<Event>,
}

/// What a queued PDU does to StatSN (RFC 7143 §4.2.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StatSn {
    /// Carries it and moves on: a response.
    Advance,
    /// Carries the next one: R2T, a ping.
    Show,
    /// Has none: Data-In without status.
    None,
}

impl Link {
    pub(crate) fn new() -> Self {
        Self {
            stat_sn: 0,
            exp_cmd_sn: 0,
            outstanding: 0,
            digests: Digests::default(),
            ending: false,
            transmits: VecDeque::new(),
            queued_octets: 0,
            events: VecDeque::new(),
        }
    }

    /// Completes `header` with the sequence numbers and queues the PDU. `releases` is handed back when it is taken.
    pub(crate) fn send(&mut self, header: Header, payload: impl Into<Payload>, stat_sn: StatSn, releases: usize) {
        let shown = match stat_sn {
            StatSn::Advance | StatSn::Show => self.stat_sn,
            StatSn::None => 0,
        };
        let header = header.set_word(24, shown).set_word(28, self.exp_cmd_sn).set_word(32, self.max_cmd_sn());
        if stat_sn == StatSn::Advance {
            self.stat_sn = self.stat_sn.wrapping_add(1);
        }
        let mut transmit = Transmit::new(header, payload, self.digests);
        transmit.releases = releases;
        self.queued_octets += transmit.octets();
        self.transmits.push_back(transmit);
    }

    pub(crate) fn raise(&mut self, event: Event) {
        self.events.push_back(event);
    }

    pub(crate) fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(crate) fn poll_transmit(&mut self) -> Option<Transmit> {
        let transmit = self.transmits.pop_front()?;
        self.queued_octets -= transmit.octets();
        Some(transmit)
    }

    /// Whether the initiator takes answers more slowly than it asks.
    pub(crate) fn is_backlogged(&self) -> bool {
        self.queued_octets >= BACKLOG_OCTETS || self.transmits.len() >= BACKLOG_PDUS
    }

    /// The last command number of the window; it never moves back, since each command that is taken in makes
    /// ExpCmdSN and the outstanding ones grow together.
    pub(crate) fn max_cmd_sn(&self) -> u32 {
        self.exp_cmd_sn.wrapping_add(WINDOW.saturating_sub(self.outstanding)).wrapping_sub(1)
    }
}
