//! A worker's companion, which has its clone on Ceph: asked for at the socket that starts them, and held by the connection.
//! When that is closed, the companion ends; while it is not, the companion's end is seen on it.

use super::process::packets;
use crate::rbd_disk::channel::CHANNELS;
use crate::rbd_disk::message::{FromRbdDisk, Ready};
use crate::store::{RbdClone, StoreError};
use crate::worker::message::{MESSAGE_BYTES, receive, send_packet};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
};
use std::io::{self, ErrorKind};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::time::timeout;
use zeroize::Zeroizing;

/// From connecting to readiness: a monitor and the clone's OSDs must answer, and be asked after each object.
const READY_TIMEOUT: Duration = Duration::from_secs(15);
/// From the end of the connection to the companion's: it lets what is under way come to its end for some of that.
const END_TIMEOUT: Duration = Duration::from_millis(50);
/// How long a companion whose worker is gone may take to end what that had asked for. An OSD that is down holds it up, and
/// would hold up its successor as well.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Octets of objects that are believed: ours have 4 MiB.
const OBJECT_BYTES: RangeInclusive<u64> = 1 << 20..=1 << 26;

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// Its files.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its companion.
    #[error(transparent)]
    Companion(#[from] CompanionError),
}

/// Why there is no companion.
#[derive(Debug, thiserror::Error)]
pub(super) enum CompanionError {
    /// Nobody starts one.
    #[error("asking for a companion at {}", socket.display())]
    Connect {
        /// Where.
        socket: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It was closed.
    #[error("the companion for clone {clone} ended before it was ready")]
    Ended {
        /// Of what.
        clone: String,
        /// How that was seen, if there was more to see.
        source: Option<io::Error>,
    },
    /// It took too long.
    #[error("the companion for clone {clone} was not ready within {} s", READY_TIMEOUT.as_secs())]
    TimedOut {
        /// Of what.
        clone: String,
    },
    /// It said why not.
    #[error("the companion for clone {clone} refuses: {reason}")]
    Refused {
        /// Of what.
        clone: String,
        /// Its words.
        reason: String,
    },
    /// It has something else.
    #[error("the companion for clone {clone} came with {channels} channels and {ready:?}")]
    Differs {
        /// Of what.
        clone: String,
        /// How many.
        channels: usize,
        /// What it has.
        ready: Ready,
    },
}

/// A companion that is ready.
pub(super) struct Opened {
    pub(super) control: OwnedFd,
    pub(super) object_bytes: u64,
    pub(super) channels: Vec<OwnedFd>,
}

/// Has a companion open a clone. Blocks.
pub(super) fn open(socket: &Path, clone: &RbdClone) -> Result<Opened, CompanionError> {
    let deadline = Instant::now() + READY_TIMEOUT;
    let failed = |source: io::Error| CompanionError::Connect { socket: socket.to_owned(), source };
    let control = ask(socket, clone).map_err(failed)?;
    let (ready, channels) = await_ready(&control, &path(clone), deadline)?;
    let Ready { byte_len, object_bytes, confinement } = ready;
    let right = byte_len == clone.byte_len
        && object_bytes.is_power_of_two()
        && OBJECT_BYTES.contains(&object_bytes)
        && channels.len() == CHANNELS;
    if !right {
        return Err(CompanionError::Differs { clone: path(clone), channels: channels.len(), ready });
    }
    if !(confinement.own_user && confinement.landlock_whole) {
        tracing::info!(
            event = "companion.confinement",
            clone = path(clone),
            ?confinement,
            "a companion is held by less"
        );
    }
    Ok(Opened { control, object_bytes, channels })
}

/// What messages call it.
pub(super) fn path(clone: &RbdClone) -> String {
    format!("{}/{}/{}", clone.pool, clone.namespace, clone.image)
}

fn ask(socket: &Path, clone: &RbdClone) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(socket)?;
    let control = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&control, Timeout::Send, Some(READY_TIMEOUT))?;
    connect(&control, &address)?;
    // It has a key in it.
    let order = Zeroizing::new(serde_json::to_vec(clone)?);
    send_packet(&control, &order, &[], SendFlags::empty())?;
    Ok(control)
}

fn await_ready(control: &OwnedFd, clone: &str, deadline: Instant) -> Result<(Ready, Vec<OwnedFd>), CompanionError> {
    let ended = |source| CompanionError::Ended { clone: clone.to_owned(), source };
    let mut buffer = vec![0; MESSAGE_BYTES];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CompanionError::TimedOut { clone: clone.to_owned() });
        }
        set_socket_timeout(control, Timeout::Recv, Some(left)).map_err(|errno| ended(Some(errno.into())))?;
        match receive(control, &mut buffer, RecvFlags::empty()) {
            Ok(Some((FromRbdDisk::Ready(ready), channels))) => return Ok((ready, channels)),
            Ok(Some((FromRbdDisk::Refused { reason }, _))) => {
                return Err(CompanionError::Refused { clone: clone.to_owned(), reason });
            }
            Ok(Some((FromRbdDisk::Log { level, event, text }, _))) => {
                tracing::info!(event = "companion.says", clone, level, name = event, text, "not ready yet");
            }
            #[cfg(feature = "failpoints")]
            Ok(Some((FromRbdDisk::Attacked(_), _))) => return Err(ended(None)),
            Ok(None) => return Err(ended(None)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(ended(Some(error))),
        }
    }
}

/// A companion whose worker runs.
pub(super) struct Companion {
    control: UnixDatagram,
}

impl Companion {
    /// Holds it by the connection.
    pub(super) fn new(control: OwnedFd) -> io::Result<Self> {
        Ok(Self { control: packets(control)? })
    }

    /// What it says next; nothing once it is gone, or says what it should not.
    pub(super) async fn hear(&self) -> Option<FromRbdDisk> {
        let mut buffer = vec![0; MESSAGE_BYTES];
        let heard = self
            .control
            .async_io(Interest::READABLE, || receive(&self.control, &mut buffer, RecvFlags::DONTWAIT))
            .await;
        heard.ok().flatten().map(|(message, _closed)| message)
    }

    /// Ends it: when this returns it is gone, and nothing that it was asked for is under way.
    pub(super) async fn end(&self, export: &str) {
        let _gone_already = rustix::net::shutdown(&self.control, Shutdown::Write);
        if timeout(END_TIMEOUT, self.gone()).await.is_err() {
            // It has no client any more. What it still had under way is for whoever revokes its key to stop.
            tracing::error!(event = "companion.stays", export, "a companion does not end");
        }
    }

    /// Lets it end what it was asked for by a worker that is gone, and so itself.
    pub(super) async fn settle(&self, export: &str) {
        if timeout(SETTLE_TIMEOUT, self.gone()).await.is_err() {
            self.end(export).await;
        }
    }

    async fn gone(&self) {
        while self.hear().await.is_some() {}
    }
}
