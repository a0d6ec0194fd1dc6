//! OVSDB (RFC 7047) and unixctl clients: how isolation talks to Open vSwitch (boot path step 8, the port moves).
//!
//! Both protocols are JSON-RPC 1.0 without delimiters between messages, so both use one [`framing`] and one
//! [`rpc::Connection`]. [`Ovsdb`] speaks to `ovsdb-server`, where the configuration is; [`Unixctl`] speaks to
//! `ovs-vswitchd`, which forwards the frames. What to say to them is the caller's business: this crate knows no VLAN.

pub mod framing;
pub mod ovsdb;
pub mod rpc;
#[cfg(feature = "testing")]
pub mod testing;
pub mod unixctl;
pub mod value;

pub use ovsdb::Ovsdb;
pub use rpc::{Connection, Limits, RpcError};
pub use unixctl::Unixctl;
