//! PDUs on their way out: batched into few system calls, and bounded.

use assay_iscsi::{Connection, Transmit};
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

    /// Sends what the socket takes at once.
    pub(super) fn send(&mut self, socket: &OwnedFd) -> rustix::io::Result<()> {
        while !self.is_empty() {
            match self.send_once(socket) {
                Ok(sent) => self.count(sent),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send_once(&self, socket: &OwnedFd) -> rustix::io::Result<usize> {
        let mut skip = self.sent;
        let mut pieces = Vec::with_capacity(PIECES_AT_ONCE.min(3 * self.queue.len()));
        for piece in self.queue.iter().flat_map(Transmit::slices) {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            if piece.len() > skipped {
                pieces.push(IoSlice::new(&piece[skipped..]));
            }
            if pieces.len() == PIECES_AT_ONCE {
                break;
            }
        }
        sendmsg(socket, &pieces, &mut SendAncillaryBuffer::default(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
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
