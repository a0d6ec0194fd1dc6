//! Wire types: everything that one Assay crate says to another.
//!
//! Crates meet only through these types and the HTTP APIs that carry them. Values that must be well formed (names,
//! MAC addresses, VLANs, IQNs) are newtypes whose only constructors check them, also when they arrive as JSON.
//! Nothing here does I/O, and nothing decides but whose results count; the one piece of cryptography is the signature on an
//! attestation result, because every relying party must check it for itself ([`result`], [`agreement`]).

pub mod agent;
pub mod agreement;
pub mod attestation;
pub mod evidence;
pub mod id;
pub mod imaging;
pub mod isolation;
pub mod net;
pub mod problem;
pub mod result;
pub mod step;

mod encoding;
