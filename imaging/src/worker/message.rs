//! What a gateway and an export worker say to each other, over the socket pair that is the worker's standard input.
//!
//! ```text
//! gateway ─▶ worker   Serve + the disk's open files, once; Connection + a TCP socket; Renew; Status; End;
//!                     Pause; Resume + the disk's open files
//! worker ─▶ gateway   Ready or Refused, once; Status when asked; Paused and Resumed, likewise; LoggedIn, Log
//! ```
//!
//! A message is one packet: JSON, and descriptors beside it (SCM_RIGHTS). A worker may be its node's by now, so the
//! gateway believes nothing of what it says but its own export's counters, and bounds how much it says.

use crate::store::manifest::MAX_LAYERS;
use assay_wire::imaging::{ChapAlgorithms, Latency};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The longest message.
pub const MESSAGE_BYTES: usize = 32 * 1024;
/// Descriptors beside one message: the files of a disk with as many layers as there may be.
pub const MESSAGE_FDS: usize = 7 + 2 * MAX_LAYERS;

/// To the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToWorker {
    /// What to serve; the disk's open files come with it, in the order that [`super::disk`] gives them.
    Serve(Box<WorkerOrder>),
    /// An initiator's connection; its socket comes with it.
    Connection {
        /// Whose.
        peer: SocketAddr,
    },
    /// Serve for this long from now.
    Renew {
        /// Milliseconds.
        remaining_ms: u64,
    },
    /// Say how it goes.
    Status,
    /// Hold the initiators' commands, flush, and close the disk's files.
    Pause,
    /// Go on with the disk, whose files come with this as they came with [`ToWorker::Serve`].
    Resume(super::disk::DiskOrder),
    /// Ask the initiators to log out, then exit.
    End,
    /// Do what an attacker's code would do. Tests only: a shipped worker does not know this message.
    #[cfg(feature = "failpoints")]
    Attack(super::attack::Attack),
}

/// From the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromWorker {
    /// It is confined, and serves.
    Ready(Confinement),
    /// It cannot serve; it exits.
    Refused {
        /// Why.
        reason: String,
    },
    /// How it goes.
    Status(WorkerStatus),
    /// It was asked to pause: it has, or goes on since there is a problem.
    Paused {
        /// Which.
        problem: Option<String>,
    },
    /// It was asked to go on: it does, or cannot.
    Resumed {
        /// Why not.
        problem: Option<String>,
    },
    /// An initiator logged in.
    LoggedIn {
        /// From where.
        peer: SocketAddr,
        /// To which target; none for a discovery session.
        target: Option<String>,
        /// Its name.
        initiator: String,
    },
    /// Any other log event.
    Log {
        /// `error`, `warn`, `info` or `debug`.
        level: String,
        /// Its name.
        event: String,
        /// Everything else, as text.
        text: String,
    },
    /// How an attack went.
    #[cfg(feature = "failpoints")]
    Attacked(super::attack::Outcome),
}

/// What a worker serves.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerOrder {
    /// The target's name.
    pub target: String,
    /// Where initiators reach it.
    pub portal: SocketAddr,
    /// The one initiator name that may log in; any, if none is given.
    pub initiator: Option<String>,
    /// CHAP name and secret to ask for.
    pub chap: Option<(String, String)>,
    /// How initiators may prove that they know it.
    #[serde(default)]
    pub chap_algorithms: ChapAlgorithms,
    /// The low 60 bits of the unit's NAA designator.
    pub naa: u64,
    /// The unit's serial number.
    pub serial: String,
    /// The unit's product name.
    pub product: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The disk whose files come beside this.
    pub disk: super::disk::DiskOrder,
    /// Bounds.
    pub limits: Limits,
    /// Serve for this long; without end if nothing is said.
    pub remaining_ms: Option<u64>,
    /// User and group to become, where that is allowed.
    pub uid: Option<u32>,
    /// Everything but system call filtering, to show what the other layers hold. Tests only.
    #[cfg(feature = "failpoints")]
    #[serde(default)]
    pub without_seccomp: bool,
}

impl std::fmt::Debug for WorkerOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerOrder")
            .field("target", &self.target)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What bounds a worker's initiators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Sessions at once, all of the one initiator: more than one is for multipath.
    pub sessions: u8,
    /// Connections that have not logged in.
    pub half_open: u8,
    /// From connect to full feature phase.
    pub login_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { sessions: 1, half_open: 8, login_ms: 15_000 }
    }
}

/// What holds a worker, beyond what it refuses to serve without: no capabilities, no new privileges, Landlock, seccomp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Confinement {
    /// It has a user of its own.
    pub own_user: bool,
    /// The kernel's Landlock knows everything that is asked of it.
    pub landlock_whole: bool,
}

/// How an export goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerStatus {
    /// Sessions logged in now.
    pub sessions: u32,
    /// Connections, logged in or not.
    pub connections: u32,
    /// Octets read.
    pub read_bytes: u64,
    /// Octets written.
    pub written_bytes: u64,
    /// How long reads took.
    pub reads: Latency,
    /// How long writes took.
    pub writes: Latency,
}

/// Sends a message with descriptors.
///
/// # Errors
/// The peer is gone, or with [`SendFlags::DONTWAIT`] it does not keep up (`WouldBlock`).
pub fn send<M: Serialize>(socket: impl AsFd, message: &M, fds: &[BorrowedFd<'_>], flags: SendFlags) -> io::Result<()> {
    send_packet(socket, &serde_json::to_vec(message)?, fds, flags)
}

/// Sends a message that is written already.
///
/// # Errors
/// As [`send`].
pub fn send_packet(socket: impl AsFd, packet: &[u8], fds: &[BorrowedFd<'_>], flags: SendFlags) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(packet)], &mut control, flags | SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a message with its descriptors; none when the peer is gone.
///
/// # Errors
/// It is malformed or too long, or receiving fails.
pub fn receive<M: DeserializeOwned>(
    socket: impl AsFd,
    buffer: &mut [u8],
    flags: RecvFlags,
) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    // Descriptors may be missing for want of numbers; then whoever needs them sees that they are.
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message is too long"));
    }
    Ok(Some((decode(&buffer[..received.bytes])?, fds)))
}

/// Reads a message; what a worker says may be its node's words.
///
/// # Errors
/// It is none.
pub fn decode<M: DeserializeOwned>(packet: &[u8]) -> Result<M, serde_json::Error> {
    serde_json::from_slice(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_packets_are_messages_or_none(packet in prop::collection::vec(any::<u8>(), 0..300)) {
            let _message: Result<FromWorker, _> = decode(&packet);
        }

        #[test]
        fn a_status_arrives_as_it_was_sent(sessions: u32, read_bytes: u64, count: u64, p50_us: u64) {
            let reads = Latency { count, p50_us, p99_us: p50_us };
            let status = WorkerStatus { sessions, read_bytes, reads, ..WorkerStatus::default() };
            let packet = serde_json::to_vec(&FromWorker::Status(status)).unwrap();
            prop_assert!(matches!(decode(&packet), Ok(FromWorker::Status(arrived)) if arrived == status));
        }
    }

    #[test]
    fn descriptors_travel_with_their_message_and_the_end_is_seen() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let peer = "127.0.0.1:1".parse().unwrap();
        send(&ours, &ToWorker::Connection { peer }, &[ours.as_fd(), ours.as_fd()], SendFlags::empty()).unwrap();
        let mut buffer = vec![0; MESSAGE_BYTES];
        let (message, fds) = receive::<ToWorker>(&theirs, &mut buffer, RecvFlags::empty()).unwrap().unwrap();
        assert!(matches!(message, ToWorker::Connection { .. }) && fds.len() == 2, "{message:?}");
        drop((ours, fds));
        assert!(receive::<ToWorker>(&theirs, &mut buffer, RecvFlags::empty()).unwrap().is_none());
    }
}
