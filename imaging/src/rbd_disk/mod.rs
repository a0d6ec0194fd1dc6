//! A disk on Ceph has two processes. The worker, which parses what its node sends, has no network. Its companion, the
//! program `assay-rbd-disk`, has the one key that opens the one clone, and librbd; it runs where Ceph can be reached, reads
//! nothing of a node's, and serves "read, write, zero, flush this range of this one clone" over a few sockets.
//!
//! It is started with a connected socket as standard input, by [`crate::rbd_disks`] or by systemd (`Accept=yes`): a gateway
//! is at the other end ([`message`]). It takes the order, loads librbd, gives up all else ([`confine`]), and only then
//! connects as the order says, opens the clone, and hands back [`channel`]s, which the gateway passes on to the worker.
//! It ends when the gateway's end of its standard input is closed, and when the worker's ends of all channels are.

#[cfg(feature = "failpoints")]
pub mod attack;
pub mod channel;
pub(crate) mod client;
mod confine;
pub mod message;
mod server;
mod system_calls;

use crate::store::RbdClone;
use crate::worker::confine::{ConfineError, close_inherited};
use crate::worker::log::ToGateway;
use crate::worker::message::{MESSAGE_BYTES, receive, send};
use assay_rbd::{CloneObjects as _, Cluster, Connection, OpenClone, Patience, RbdError};
use assay_service::error::chain;
use channel::CHANNELS;
use message::{FromRbdDisk, Ready};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::Signal;
use server::Serving;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use zeroize::Zeroizing;

/// Whoever connects gives its order at once.
const ORDER_TIMEOUT: Duration = Duration::from_secs(10);
/// What is under way when it is to end may come to its end first, for so long.
const FAREWELL: Duration = Duration::from_millis(20);

/// Why a clone is not served.
#[derive(Debug, thiserror::Error)]
enum RbdDiskError {
    /// The socket to the gateway.
    #[error("hearing from the gateway")]
    Gateway(#[source] io::Error),
    /// No order came first.
    #[error("the gateway gave no order")]
    NoOrder,
    /// The argument is no number.
    #[error("`{0}` is no user to become")]
    User(String),
    /// It cannot be confined.
    #[error("confining the companion")]
    Confine(#[from] ConfineError),
    /// Ceph.
    #[error("opening the clone")]
    Ceph(#[from] RbdError),
    /// The clone is another one than imaging thought.
    #[error("{object} has {found} octets, not {expected}")]
    Size {
        /// The clone.
        object: String,
        /// Octets that it has.
        found: u64,
        /// Octets that it should have.
        expected: u64,
    },
    /// Sockets.
    #[error("making channels")]
    Channels(#[source] Errno),
    /// Threads.
    #[error("starting threads")]
    Threads(#[source] io::Error),
}

/// What the thread that listens to the gateway needs of the others.
#[derive(Default)]
struct Shared {
    serving: OnceLock<Arc<Serving>>,
    #[cfg(feature = "failpoints")]
    held: OnceLock<attack::Held>,
}

/// The program: serves one clone until its gateway or its worker is gone.
///
/// The user to become, where that is allowed, is the one argument.
#[must_use]
pub fn main() -> ExitCode {
    close_inherited();
    // Nobody hears two of these: this program sets it first.
    let _set_once = tracing::subscriber::set_global_default(ToGateway);
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!(event = "rbd_disk.panicked", %panic, "the companion panicked");
        std::process::abort();
    }));
    // Whatever ends whoever started it, it goes on.
    let _leads_already = rustix::process::setsid();
    match start() {
        Ok(serving) => serving.wait(None),
        Err(error) => {
            let refused = FromRbdDisk::Refused { reason: chain(&error) };
            let _nobody_to_tell = send(rustix::stdio::stdin(), &refused, &[], SendFlags::empty());
        }
    }
    end()
}

/// From the order to readiness.
fn start() -> Result<Arc<Serving>, RbdDiskError> {
    let order = order()?;
    let user = std::env::args().nth(1).map(|user| user.parse().map_err(|_| RbdDiskError::User(user))).transpose()?;
    assay_rbd::load()?;
    let confinement = confine::confine(&order.monitors, user)?;
    let shared = Arc::new(Shared::default());
    let theirs = Arc::clone(&shared);
    std::thread::Builder::new().spawn(move || listen(&theirs)).map_err(RbdDiskError::Threads)?;
    let RbdClone { monitors, user, key, pool, namespace, image, layers, byte_len } = order;
    let cluster = Cluster::connect(&Connection { monitors, user, key, patience: Patience::EXPORT })?;
    let pool_in_namespace = cluster.namespace(&pool, &namespace)?;
    #[cfg(feature = "failpoints")]
    let _once = shared.held.set(attack::Held { cluster, pool: pool_in_namespace.clone() });
    let clone = OpenClone::new(&pool_in_namespace, pool_in_namespace.open_image(image)?, &layers)?;
    let own = clone.own_objects()?;
    if clone.byte_len() != byte_len {
        let (object, found) = (clone.path().to_owned(), clone.byte_len());
        return Err(RbdDiskError::Size { object, found, expected: byte_len });
    }
    let ready = Ready { byte_len, object_bytes: clone.object_bytes(), confinement };
    let pair = |_| socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let pairs: Result<Vec<(OwnedFd, OwnedFd)>, Errno> = (0..CHANNELS).map(pair).collect();
    let (ours, theirs): (Vec<_>, Vec<_>) = pairs.map_err(RbdDiskError::Channels)?.into_iter().unzip();
    let serving = Serving::start(clone, own, ours).map_err(RbdDiskError::Threads)?;
    let _once = shared.serving.set(Arc::clone(&serving));
    let fds: Vec<BorrowedFd<'_>> = theirs.iter().map(OwnedFd::as_fd).collect();
    send(rustix::stdio::stdin(), &FromRbdDisk::Ready(ready), &fds, SendFlags::empty())
        .map_err(RbdDiskError::Gateway)?;
    Ok(serving)
}

/// Hears the order.
fn order() -> Result<RbdClone, RbdDiskError> {
    let timeout = |timeout| set_socket_timeout(rustix::stdio::stdin(), Timeout::Recv, timeout);
    timeout(Some(ORDER_TIMEOUT)).map_err(|errno| RbdDiskError::Gateway(errno.into()))?;
    // It has a key in it.
    let mut buffer = Zeroizing::new(vec![0; MESSAGE_BYTES]);
    let order = receive::<RbdClone>(rustix::stdio::stdin(), &mut buffer, RecvFlags::empty());
    timeout(None).map_err(|errno| RbdDiskError::Gateway(errno.into()))?;
    order.map_err(RbdDiskError::Gateway)?.map(|(order, _no_files)| order).ok_or(RbdDiskError::NoOrder)
}

/// Waits for the gateway's end, which may come before the clone is open, and is then this process's.
fn listen(shared: &Shared) {
    #[cfg(feature = "failpoints")]
    attack::obey(&shared.held);
    #[cfg(not(feature = "failpoints"))]
    loop {
        // It has no more to say. If it does, it is no gateway of ours.
        match rustix::net::recv(rustix::stdio::stdin(), &mut [0; 1], RecvFlags::empty()) {
            Err(Errno::INTR) => {}
            Ok(_) | Err(_) => break,
        }
    }
    if let Some(serving) = shared.serving.get() {
        serving.close();
        serving.wait(Some(FAREWELL));
    }
    end()
}

/// Ends this process at once. Not by `exit`: that has Ceph's libraries tidy up while their threads run.
fn end() -> ! {
    let _does_not_return = rustix::process::kill_process(rustix::process::getpid(), Signal::TERM);
    std::process::abort()
}
