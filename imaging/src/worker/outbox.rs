//! PDUs on their way out: batched into few system calls, and bounded.

use super::unit::Unit;
use assay_iscsi::{Connection, Piece, Transmit};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::time::Instant;

/// What is taken from the engine before the socket has taken it.
const OUTBOX_OCTETS: usize = 1 << 20;
/// Pieces in one call; Linux takes at most 1024.
const PIECES_AT_ONCE: usize = 192;

/// A queue of PDUs.
pub(super) struct Outbox {
    queue: VecDeque<Transmit>,
    octets: usize,
    /// Octets of the first one that are sent.
    sent: usize,
    last_progress: Instant,
}

impl Default for Outbox {
    fn default() -> Self {
        Self { queue: VecDeque::new(), octets: 0, sent: 0, last_progress: Instant::now() }
    }
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.octets >= OUTBOX_OCTETS
    }

    /// When the socket last took something; when it last had to take something, if that is later.
    pub(super) fn last_progress(&self) -> Instant {
        self.last_progress
    }

    /// Takes over what the engine has to send, as far as there is room. Whether there was anything.
    pub(super) fn fill(&mut self, connection: &mut Connection) -> bool {
        let mut any = false;
        while !self.is_full()
            && let Some(transmit) = connection.poll_transmit()
        {
            any = true;
            self.octets += transmit.octets();
            self.queue.push_back(transmit);
        }
        any
    }

    /// Sends what the socket, which does not block, takes at once; what is in place, from the unit.
    pub(super) fn send(&mut self, socket: &OwnedFd, unit: &Unit) -> rustix::io::Result<()> {
        while !self.is_empty() {
            match self.send_once(socket, unit) {
                Ok(sent) => self.count(sent),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send_once(&self, socket: &OwnedFd, unit: &Unit) -> rustix::io::Result<usize> {
        let mut skip = self.sent;
        let mut flags = SendFlags::NOSIGNAL;
        let mut pieces = Vec::with_capacity(PIECES_AT_ONCE.min(3 * self.queue.len()));
        for piece in self.queue.iter().flat_map(Transmit::pieces) {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            match piece {
                _ if piece.len() == skipped => {}
                Piece::Octets(octets) => pieces.push(IoSlice::new(&octets[skipped..])),
                Piece::InPlace(range) if pieces.is_empty() => {
                    return unit.send(socket, range.start + skipped as u64..range.end);
                }
                Piece::InPlace(_) => {
                    // It follows at once, in the same segments.
                    flags |= SendFlags::MORE;
                    break;
                }
            }
            if pieces.len() == PIECES_AT_ONCE {
                break;
            }
        }
        sendmsg(socket, &pieces, &mut SendAncillaryBuffer::default(), flags)
    }

    fn count(&mut self, sent: usize) {
        self.last_progress = Instant::now();
        self.octets -= sent;
        self.sent += sent;
        while let Some(first) = self.queue.front() {
            if self.sent < first.octets() {
                break;
            }
            self.sent -= first.octets();
            self.queue.pop_front();
        }
    }
}
