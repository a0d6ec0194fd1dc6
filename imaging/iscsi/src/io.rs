//! The engine's two sides: what it asks of its driver ([`Event`], [`Io`]), and what the driver answers ([`IoResult`]).
//!
//! Every [`Io`] was checked before it is asked for: it lies within the unit's capacity and is never empty, so a
//! backend needs no range checks of its own to be safe.

use bytes::Bytes;
use std::ops::Range;

/// Something that the driver must do or may want to know.
#[derive(Debug)]
pub enum Event {
    /// Run this on the backend, then call `Connection::complete`. Several may be outstanding, in any order.
    Io(IoRequest),
    /// A login passed everything but the session registry: ask it, then call `Connection::admit` or
    /// `Connection::refuse`.
    SessionWanted(SessionRequest),
    /// The login is complete; the connection is in the full feature phase.
    LoggedIn,
    /// The initiator logged out; the connection closes once its transmits are sent.
    LoggedOut,
    /// Send what is to transmit, then close the connection.
    Close,
}

/// What a login asks of the session registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRequest {
    /// The target; `None` for a discovery session, which needs no registration (admit it with any TSIH).
    pub target: Option<String>,
    /// The initiator's name, proven if the target asks for CHAP.
    pub initiator: String,
    /// The initiator's part of the session id (RFC 7143 §11.12.5).
    pub isid: [u8; 6],
}

/// Names one outstanding [`IoRequest`] of one connection; never used twice on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IoTag(pub(crate) u64);

/// One operation for the backend.
#[derive(Debug)]
pub struct IoRequest {
    /// Given back to `Connection::complete`.
    pub tag: IoTag,
    /// What to do.
    pub io: Io,
    /// Whether a read may be answered with [`IoResult::InPlace`]: its data go to the initiator as they are.
    pub in_place: bool,
}

/// An operation on logical blocks. `lba` counts from 0; lengths are in logical blocks and at least 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Io {
    /// Read; answered with [`IoResult::Data`] of exactly `blocks` blocks.
    Read {
        /// First block.
        lba: u64,
        /// How many.
        blocks: u32,
    },
    /// Write; answered with [`IoResult::Done`].
    Write {
        /// First block.
        lba: u64,
        /// Whole blocks, in order; the pieces' borders fall anywhere.
        data: Vec<Bytes>,
        /// Force unit access: durable before it is answered.
        fua: bool,
    },
    /// Make every write that was answered before durable; answered with [`IoResult::Done`].
    Flush,
    /// Deallocate: the blocks read as zeros from then on. Answered with [`IoResult::Done`].
    Unmap {
        /// First block and how many, one pair per range; none overlaps the end of the unit.
        ranges: Vec<(u64, u32)>,
    },
    /// Write the same block over a range; answered with [`IoResult::Done`].
    WriteSame {
        /// First block.
        lba: u64,
        /// How many.
        blocks: u64,
        /// One block.
        pattern: Bytes,
        /// The initiator allows deallocation instead (only when `pattern` is zeros).
        unmap: bool,
    },
    /// Compare, and if equal write, atomically towards other operations on the unit. Answered with
    /// [`IoResult::Done`] or [`IoResult::Miscompare`].
    CompareAndWrite {
        /// First block.
        lba: u64,
        /// What must be there: whole blocks.
        expected: Bytes,
        /// What to write: as long.
        new: Bytes,
    },
    /// Is the block at `lba` allocated, and how far does that hold? Answered with [`IoResult::Status`]; a backend
    /// without thin provisioning says "mapped" for the rest of the unit.
    Status {
        /// First block.
        lba: u64,
    },
}

/// How an [`Io`] ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IoResult {
    /// Done, nothing to return.
    Done,
    /// Read data: exactly as many octets as asked for.
    Data(Bytes),
    /// The data of a read are these octets of the unit, exactly as many as asked for, and the driver sends them itself
    /// where [`crate::Piece::InPlace`] says so: from the page cache to the socket, say. Writes that the initiator has
    /// under way meanwhile may be seen in them.
    InPlace(Range<u64>),
    /// COMPARE AND WRITE found a difference, at this octet counted from the start; nothing was written.
    Miscompare {
        /// Offset of the first octet that differs.
        offset: u32,
    },
    /// Provisioning status.
    Status {
        /// Whether the blocks are allocated.
        mapped: bool,
        /// For how many blocks that holds; at least 1.
        blocks: u64,
    },
    /// It failed.
    Failed(IoFault),
}

/// Why an [`Io`] failed, as far as the initiator is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoFault {
    /// The data could not be read, or did not match its checksum (MEDIUM ERROR).
    Unreadable,
    /// The data could not be written (MEDIUM ERROR).
    Unwritable,
    /// The store has no room (DATA PROTECT, SPACE ALLOCATION FAILED).
    NoSpace,
    /// The store does not answer for now; the initiator may try again (NOT READY / BUSY).
    Unavailable,
    /// The backend gave up the operation because the export is being withdrawn (ABORTED COMMAND).
    Cancelled,
}
