//! One transfer, from the first reply to the last acknowledgement: RFC 1350 with windows (RFC 7440).
//!
//! No socket and no clock: packets and `now` go in; packets, a deadline and an [`Outcome`] come out.
//!
//! ```text
//!              RRQ with options                   ACK 0
//!   start ──────────────────────▶ AwaitingOptions ──────▶ Sending ── ACK of the last block ──▶ Finished(Complete)
//!     │                                                     ▲ │
//!     └───────────────────── RRQ without ───────────────────┘ └─ ERROR, or no answer in time ─▶ Finished(…)
//! ```

use crate::options::Negotiated;
use crate::packet::{ClientPacket, DATA_HEADER_BYTES, encode_data, encode_option_acknowledgement};
use bytes::Bytes;
use std::time::{Duration, Instant};

/// A transfer in progress.
#[derive(Debug)]
pub struct Transfer {
    content: Bytes,
    negotiated: Negotiated,
    state: State,
    /// Blocks that the client has acknowledged, counted from 1 and never rolled over.
    acknowledged: u64,
    /// The last block sent since the last step back.
    sent: u64,
    /// Whether the OACK has to be sent (again).
    owes_options: bool,
    /// Whether any packet came back: until then nothing shows that the peer's address is its own.
    proven: bool,
    /// Whether the last acknowledgement was already answered once more (RFC 7440 section 4: a client that misses the
    /// first block of a window repeats its acknowledgement). Once only, or every packet would breed another.
    repeated: bool,
    retransmissions: u32,
    deadline: Instant,
}

/// How a transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every octet was acknowledged.
    Complete,
    /// The client said ERROR: with code 8 after an OACK it only wanted the size.
    Refused {
        /// The ERROR's code.
        code: u16,
    },
    /// The client fell silent.
    TimedOut {
        /// Whether it ever answered.
        answered: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    AwaitingOptions,
    Sending,
    Finished(Outcome),
}

impl Transfer {
    /// Begins; the first packet is ready to be polled.
    #[must_use]
    pub fn start(now: Instant, content: Bytes, negotiated: Negotiated) -> Self {
        let options = !negotiated.acknowledged.is_empty();
        Self {
            content,
            state: if options { State::AwaitingOptions } else { State::Sending },
            acknowledged: 0,
            sent: 0,
            owes_options: options,
            proven: false,
            repeated: false,
            retransmissions: 0,
            deadline: now + negotiated.timeout,
            negotiated,
        }
    }

    /// A packet from the peer. Those that make no sense now change nothing.
    pub fn handle_packet(&mut self, now: Instant, packet: &ClientPacket<'_>) {
        match packet {
            ClientPacket::Error(code) => self.finish(Outcome::Refused { code: *code }),
            ClientPacket::Acknowledgement(block) => self.handle_acknowledgement(now, *block),
            ClientPacket::ReadRequest(_) | ClientPacket::WriteRequest => {}
        }
    }

    /// Time passed: sends again what is not acknowledged, or gives up.
    pub fn handle_timeout(&mut self, now: Instant) {
        if matches!(self.state, State::Finished(_)) || now < self.deadline {
            return;
        }
        let most = if self.proven { MAX_RETRANSMISSIONS } else { MAX_UNPROVEN_RETRANSMISSIONS };
        if self.retransmissions == most {
            self.finish(Outcome::TimedOut { answered: self.proven });
            return;
        }
        self.retransmissions += 1;
        match self.state {
            State::AwaitingOptions => self.owes_options = true,
            State::Sending | State::Finished(_) => self.sent = self.acknowledged,
        }
        self.deadline = now + self.patience();
    }

    /// When [`Self::handle_timeout`] is due; none once the transfer has ended.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::AwaitingOptions | State::Sending => Some(self.deadline),
            State::Finished(_) => None,
        }
    }

    /// Appends up to `max_packets` packets that are to be sent now, all of the returned length but for a shorter
    /// last. None: nothing to send.
    pub fn poll_transmit(&mut self, max_packets: usize, out: &mut Vec<u8>) -> Option<usize> {
        match self.state {
            State::Finished(_) => None,
            State::AwaitingOptions => {
                let owed = std::mem::take(&mut self.owes_options);
                let start = out.len();
                owed.then(|| encode_option_acknowledgement(out, &self.negotiated.acknowledged));
                owed.then(|| out.len() - start)
            }
            State::Sending => {
                let last = self.acknowledged.saturating_add(self.negotiated.window_blocks.into()).min(self.blocks());
                let first = self.sent + 1;
                for block in (first..=last).take(max_packets) {
                    encode_data(out, wire_number(block), self.block(block));
                    self.sent = block;
                }
                let packet_bytes = usize::from(self.negotiated.block_bytes) + DATA_HEADER_BYTES;
                (first <= last).then(|| packet_bytes.min(out.len()))
            }
        }
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        match self.state {
            State::Finished(outcome) => Some(outcome),
            State::AwaitingOptions | State::Sending => None,
        }
    }

    /// The largest packet of this transfer, in octets.
    #[must_use]
    pub fn packet_bytes(&self) -> usize {
        usize::from(self.negotiated.block_bytes) + DATA_HEADER_BYTES
    }

    /// Blocks in all. The last is the one that is not full, so it may hold nothing (RFC 1350 section 6).
    fn blocks(&self) -> u64 {
        self.content.len() as u64 / u64::from(self.negotiated.block_bytes) + 1
    }

    fn block(&self, number: u64) -> &[u8] {
        let bytes = usize::from(self.negotiated.block_bytes);
        let start = usize::try_from(number - 1).unwrap_or(usize::MAX).saturating_mul(bytes).min(self.content.len());
        &self.content[start..self.content.len().min(start + bytes)]
    }

    fn handle_acknowledgement(&mut self, now: Instant, wire: u16) {
        match self.state {
            State::Finished(_) => {}
            State::AwaitingOptions if wire == 0 => {
                self.state = State::Sending;
                self.progress(now);
            }
            State::AwaitingOptions => {}
            State::Sending => {
                // Block numbers roll over; the window is far smaller than the cycle, so the distance is unambiguous.
                let ahead = u64::from(wire.wrapping_sub(wire_number(self.acknowledged)));
                if ahead == 0 {
                    self.handle_repetition();
                } else if ahead <= self.sent - self.acknowledged {
                    self.acknowledged += ahead;
                    // RFC 7440 section 4: whatever of the window follows was lost.
                    self.sent = self.acknowledged;
                    self.progress(now);
                    if self.acknowledged == self.blocks() {
                        self.finish(Outcome::Complete);
                    }
                }
            }
        }
    }

    /// An acknowledgement for the second time. In lock-step the answer is none: answering is how the Sorcerer's
    /// Apprentice came to send everything twice (RFC 1123 section 4.2.3.1).
    fn handle_repetition(&mut self) {
        if self.negotiated.window_blocks > 1 && self.sent > self.acknowledged && !self.repeated {
            self.repeated = true;
            self.sent = self.acknowledged;
        }
    }

    fn progress(&mut self, now: Instant) {
        self.proven = true;
        self.repeated = false;
        self.retransmissions = 0;
        self.deadline = now + self.negotiated.timeout;
    }

    /// Doubles with every retransmission; a peer that has not answered yet gets five seconds in all.
    fn patience(&self) -> Duration {
        let most = if self.proven { MAX_PATIENCE } else { MAX_UNPROVEN_PATIENCE };
        self.negotiated.timeout.saturating_mul(1 << self.retransmissions.min(8)).min(most)
    }

    fn finish(&mut self, outcome: Outcome) {
        self.state = State::Finished(outcome);
    }
}

/// The number that a block has on the wire: modulo 65536, rolling over to 0.
fn wire_number(block: u64) -> u16 {
    u16::try_from(block & 0xffff).unwrap_or_default()
}

/// Retransmissions to a peer that has answered before.
const MAX_RETRANSMISSIONS: u32 = 5;
/// Retransmissions to a peer whose address may be forged.
const MAX_UNPROVEN_RETRANSMISSIONS: u32 = 2;
const MAX_PATIENCE: Duration = Duration::from_secs(4);
const MAX_UNPROVEN_PATIENCE: Duration = Duration::from_secs(2);

#[cfg(test)]
#[path = "transfer_tests.rs"]
mod tests;
