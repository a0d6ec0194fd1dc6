//! A read-only TFTP server: step 2 of the boot path, as far as firmware without HTTP goes.
//!
//! RFC 1350 with option negotiation (RFC 2347), `blksize` (RFC 2348), `timeout` and `tsize` (RFC 2349) and
//! `windowsize` (RFC 7440). Read requests only; what there is to read is what a [`Files`] says there is for that
//! peer, held in memory and shared: no file system name is ever made from what a client sent.
//!
//! * [`packet`]: datagrams to values and back;
//! * [`options`]: what of a client's wishes is granted;
//! * [`transfer`]: one transfer, without socket or clock;
//! * [`server`]: which requests become transfers, without socket or clock;
//! * [`socket`], on [`udp`]: the modules that own sockets. Every transfer has a socket of its own, so its port (the transfer
//!   identifier of RFC 1350 section 4) cannot be guessed by whoever forges a peer's acknowledgements.

pub mod options;
pub mod packet;
pub mod server;
pub mod socket;
pub mod transfer;
pub mod udp;

pub use server::{Files, Limits, Report};
pub use socket::{ListenConfig, TftpError, serve};
