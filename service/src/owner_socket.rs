//! Unix sockets for this process's user and root only.

use rustix::net::sockopt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// Has `bind` make a socket at `path`, in place of one that a killed predecessor left.
///
/// # Errors
/// What is there cannot be removed, or the operating system refuses the socket.
pub fn replace<S>(path: &Path, bind: impl FnOnce(&Path) -> io::Result<S>) -> io::Result<S> {
    match std::fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
        Ok(()) | Err(_) => {}
    }
    let socket = bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(socket)
}

/// Whether a connection is this user's or root's: the file's mode says so too, but not in the moment before it is set. One
/// that is not is logged as `event`.
#[must_use]
pub fn is_owners(connection: impl AsFd, own_uid: u32, event: &'static str) -> bool {
    match sockopt::socket_peercred(connection) {
        Ok(peer) if peer.uid.as_raw() == own_uid || peer.uid.is_root() => return true,
        Ok(peer) => tracing::warn!(event, uid = peer.uid.as_raw(), "another user's connection"),
        Err(error) => tracing::warn!(event, %error, "cannot tell whose connection it is"),
    }
    false
}
