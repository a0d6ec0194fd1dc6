//! The iSCSI portal: accepts TCP connections, bounds those that have not logged in, and drives each in its own task.

use super::connection::{End, drive};
use super::hub::Hub;
use assay_iscsi::Directory;
use assay_service::CancellationToken;
use rustix::net::sockopt;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

/// Connections in all: a node has one, and one more while it logs in again.
const MAX_CONNECTIONS: usize = 512;
/// Connections that have not logged in: in all, and from one address.
const MAX_HALF_OPEN: usize = 64;
const MAX_HALF_OPEN_PER_ADDRESS: usize = 8;
/// A dead initiator is noticed after 30 + 3 * 10 seconds. Not by NOP-In: iPXE closes the connection on one.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
/// After `accept` failed, for want of file descriptors say.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Serves the targets in `directory`, whose units `hub` has, until `shutdown`; then until its connections are closed.
pub(crate) async fn serve(
    listener: TcpListener,
    directory: Arc<dyn Directory>,
    hub: Arc<Hub>,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let half_open = Arc::new(HalfOpen::default());
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(event = "portal.accept_failed", %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let (Ok(slot), Some(opening)) = (Arc::clone(&slots).try_acquire_owned(), half_open.enter(peer.ip())) else {
            tracing::warn!(event = "portal.refused", %peer, "too many connections, or too many that have not logged in");
            continue;
        };
        if let Err(error) = prepare(&stream) {
            tracing::debug!(event = "portal.socket_options", %peer, %error, "setting socket options");
        }
        let connection = Accepted { stream, peer, opening, slot };
        tasks.spawn(connection.serve(Arc::clone(&directory), Arc::clone(&hub), shutdown.clone()));
    }
    tasks.close();
    tasks.wait().await;
}

struct Accepted {
    stream: TcpStream,
    peer: SocketAddr,
    opening: Opening,
    slot: OwnedSemaphorePermit,
}

impl Accepted {
    async fn serve(self, directory: Arc<dyn Directory>, hub: Arc<Hub>, shutdown: CancellationToken) {
        let Self { stream, peer, opening, slot } = self;
        let end = drive(stream, peer, directory, hub, opening, shutdown).await;
        drop(slot);
        match end {
            End::Closed | End::Severed => tracing::debug!(event = "portal.closed", %peer, ?end, "connection closed"),
            End::LoginTimeout | End::Stalled | End::Broken => {
                tracing::info!(event = "portal.closed", %peer, ?end, "connection closed");
            }
        }
    }
}

/// Connections that have not logged in, by address.
#[derive(Debug, Default)]
struct HalfOpen {
    by_address: Mutex<HashMap<IpAddr, usize>>,
}

/// One of them; gone when dropped.
struct Opening {
    among: Arc<HalfOpen>,
    address: IpAddr,
}

impl HalfOpen {
    fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Opening> {
        let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = by_address.values().sum();
        let from_here = by_address.get(&address).copied().unwrap_or(0);
        if all >= MAX_HALF_OPEN || from_here >= MAX_HALF_OPEN_PER_ADDRESS {
            return None;
        }
        by_address.insert(address, from_here + 1);
        Some(Opening { among: Arc::clone(self), address })
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        let mut by_address = self.among.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

fn prepare(stream: &TcpStream) -> Result<(), rustix::io::Errno> {
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_open_connections_are_bounded_in_all_and_from_one_address() {
        let half_open = Arc::new(HalfOpen::default());
        let address = |last: u8| IpAddr::from([10, 0, 0, last]);
        let one: Vec<_> = (0..MAX_HALF_OPEN_PER_ADDRESS).map(|_| half_open.enter(address(1)).unwrap()).collect();
        assert!(half_open.enter(address(1)).is_none());
        let others: Vec<_> = (0..).map_while(|last| half_open.enter(address(2 + last / 8))).collect();
        assert_eq!(one.len() + others.len(), MAX_HALF_OPEN);
        drop(one);
        assert!(half_open.enter(address(1)).is_some());
    }
}
