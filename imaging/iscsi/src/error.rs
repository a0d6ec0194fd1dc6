//! Why a connection is given up.

use crate::framer::FrameError;
use crate::text::TextError;
use thiserror::Error;

/// A breach of the protocol by the initiator. At error recovery level 0 it ends the connection; what was queued to
/// send (a Reject, a login response) is still worth sending.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// The octets make no PDU.
    #[error("following the octet stream")]
    Frame(#[source] FrameError),
    /// A text that makes no sense.
    #[error("reading a text request")]
    Text(#[source] TextError),
    /// A command number was left out, and one connection can never fill the gap.
    #[error("taking in command number {received}: number {expected} is missing")]
    CommandGap {
        /// CmdSN.
        received: u32,
        /// ExpCmdSN.
        expected: u32,
    },
    /// A task tag that is in use, or reserved.
    #[error("taking in task {task_tag:#010x}: the tag is in use or reserved")]
    TaskTag {
        /// The initiator task tag.
        task_tag: u32,
    },
    /// More or other data than the negotiation allows.
    #[error("taking in data of task {task_tag:#010x}: not what was negotiated or asked for")]
    UnexpectedData {
        /// The initiator task tag.
        task_tag: u32,
    },
    /// A PDU that has no place in this phase or session.
    #[error("taking in a PDU with opcode {opcode:#04x}: not allowed here")]
    UnexpectedPdu {
        /// Its opcode.
        opcode: u8,
    },
}
