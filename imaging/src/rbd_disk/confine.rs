//! Confinement of a companion: as a worker's, but that it may connect to Ceph. Whoever takes it over has one clone, the one
//! key that opens it, and the ports of monitors and OSDs.
//!
//! Only called while the process has one thread, as a worker's is; librbd is loaded by then, since no file opens after.

use super::system_calls;
use crate::worker::confine::{ConfineError, check_descriptors, give_up_privileges, limit, restrict_files_and_network};
use crate::worker::message::Confinement;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

/// Where OSDs listen: up to Pacific and since Reef, by default.
const OSD_PORTS: RangeInclusive<u16> = 6800..=7568;
/// Stacks of librados' threads for the most part, of which little is ever touched.
const MEMORY_BYTES: u64 = 1 << 30;
/// The channels, librados' own, and a socket for each OSD.
const DESCRIPTORS: u64 = 4096;
/// Threads of its user, which is its own: librados has two dozen.
const TASKS: u64 = 256;

/// Gives up everything but Ceph's ports.
pub(super) fn confine(monitors: &[SocketAddr], uid: Option<u32>) -> Result<Confinement, ConfineError> {
    check_descriptors(0)?;
    let own_user = give_up_privileges(uid)?;
    limit(MEMORY_BYTES, DESCRIPTORS, own_user.then_some(TASKS))?;
    let ports = monitors.iter().map(SocketAddr::port).chain(OSD_PORTS);
    let landlock_whole = restrict_files_and_network(ports)?;
    #[cfg(feature = "failpoints")]
    if std::env::args().any(|argument| argument == "--without-seccomp") {
        return Ok(Confinement { own_user, landlock_whole });
    }
    system_calls::filter()?;
    Ok(Confinement { own_user, landlock_whole })
}
