//! DHCPv4 (RFC 2131): step 1 of the boot path.
//!
//! [`packet`] decodes, [`client`] tells programs apart, [`lease`] knows who has which address, [`engine`] decides,
//! [`reply`] writes, [`lease_log`] remembers; [`server`] has the sockets and the clock.

pub mod client;
pub mod engine;
pub mod lease;
pub mod lease_log;
pub mod packet;
pub mod rate;
pub mod reply;
pub mod reservations;
pub mod server;

pub use client::ClientKind;
pub use engine::{Admitted, Authority};
pub use reservations::serve_reservations;
