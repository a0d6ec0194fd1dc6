//! An iSCSI target (RFC 7143) as an engine without sockets, clocks or storage.
//!
//! It stands between a node and its disk: step 8 of the boot path logs in here. One [`Connection`] per TCP connection
//! takes octets and gives [`Transmit`]s to send and [`Event`]s to act on; [`Sessions`] says who may be logged in at
//! once; the driver owns the sockets, the timeouts and the backend. The driver's loop, one task per connection:
//!
//! ```text
//! let mut connection = Connection::new(portal, entropy);
//! loop {
//!     connection.process();                               // decode what is buffered
//!     while let Some(event) = connection.poll_event() {   // Io → backend task; SessionWanted → Sessions::admit
//!         ...                                             // Close → flush transmits, then return
//!     }
//!     while let Some(transmit) = connection.poll_transmit() { batch.push(transmit) }   // then one writev
//!     if something moved { continue }     // taking a transmit frees memory, which may raise further events
//!     select! {
//!         n = socket.read_buf(buffer), if let Some(buffer) = connection.receive_buffer() => ...   // 0: closed
//!         (tag, result) = completions.recv() => connection.complete(tag, result),
//!         _ = revoked => { connection.request_logout(); ... drop }
//!     }
//! }
//! ```
//!
//! The driver bounds the time until [`Connection::is_logged_in`], and of silence (it may ask for a ping with
//! `Connection::ping`). Memory is bounded by the engine: 64 commands and 8 immediate ones, 16 MiB of data that were
//! read or asked for, 128 KiB of unsolicited data a command, segments of 256 KiB, 4 MiB of queued answers.

mod chap;
mod connection;
mod error;
mod framer;
mod full_feature;
mod io;
mod link;
mod login;
mod management;
mod negotiation;
mod pdu;
mod response;
mod scsi;
mod sessions;
mod tags;
mod target;
mod task;
mod text;

pub use chap::{CHALLENGE_OCTETS, ChapAlgorithms, ChapCredentials};
pub use connection::Connection;
pub use error::ProtocolError;
pub use framer::FrameError;
pub use io::{Event, Io, IoFault, IoRequest, IoResult, IoTag, SessionRequest};
pub use login::{ChallengeEntropy, LoginStatus};
pub use negotiation::RECEIVE_SEGMENT_OCTETS;
pub use pdu::{Piece, Transmit};
pub use sessions::{ConnectionId, SessionDecision, SessionLimit, Sessions, Tsih};
pub use target::{
    Authentication, ConfigError, Directory, LogicalUnitConfig, PORTAL_GROUP_TAG, Portal, Target, TargetConfig,
};
pub use text::TextError;
