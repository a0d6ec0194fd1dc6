//! An answer for iPXE's IPv6 router solicitations: "there is no router here".
//!
//! iPXE configures IPv4 and IPv6 before it fetches anything, and on a network where nobody answers its solicitations it
//! waits for IPv6 until it gives up: 16 s of every boot, measured. A router advertisement (RFC 4861 section 4.2) with a
//! lifetime of zero, no prefix and no flag tells it at once that there is nothing to wait for, and changes nothing else.

use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::{Duration, Instant};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

/// Answers router solicitations on one interface.
#[derive(Debug)]
pub struct RouterAdvertiser {
    interface: String,
    index: u32,
    socket: UdpSocket,
}

/// The socket could not be had: no IPv6 on this interface, or no right to raw sockets.
#[derive(Debug, thiserror::Error)]
#[error("listening for router solicitations on interface {interface}")]
pub struct AdvertiserError {
    interface: String,
    #[source]
    cause: io::Error,
}

impl RouterAdvertiser {
    /// Opens the socket.
    ///
    /// # Errors
    /// See [`AdvertiserError`].
    pub fn bind(interface: &str) -> Result<Self, AdvertiserError> {
        let open = || -> io::Result<(u32, UdpSocket)> {
            let index = nix::net::if_::if_nametoindex(interface)?;
            let socket = Socket::new(Domain::IPV6, Type::RAW.nonblocking(), Some(Protocol::ICMPV6))?;
            socket.bind_device(Some(interface.as_bytes()))?;
            socket.join_multicast_v6(&ALL_ROUTERS, index)?;
            socket.set_multicast_if_v6(index)?;
            // RFC 4861 section 6.1.2: whoever hears an advertisement drops it unless its hop limit is 255.
            socket.set_multicast_hops_v6(255)?;
            socket.set_unicast_hops_v6(255)?;
            // Not UDP, but all that is used of the type is `recvfrom` and `sendto`, and those are the same.
            Ok((index, UdpSocket::from_std(socket.into())?))
        };
        let failed = |cause| AdvertiserError { interface: interface.to_owned(), cause };
        open().map(|(index, socket)| Self { interface: interface.to_owned(), index, socket }).map_err(failed)
    }

    /// Serves until `shutdown`.
    ///
    /// # Errors
    /// The socket broke.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), AdvertiserError> {
        let mut buffer = [0; 1500];
        let mut last: Option<Instant> = None;
        loop {
            let received = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                received = self.socket.recv_from(&mut buffer) => received,
            };
            let (length, peer) =
                received.map_err(|cause| AdvertiserError { interface: self.interface.clone(), cause })?;
            let now = Instant::now();
            // A flood is answered at a trickle; whoever is not answered asks again.
            if !is_solicitation(&buffer[..length]) || last.is_some_and(|last| now - last < MIN_PAUSE) {
                continue;
            }
            last = Some(now);
            if let Err(error) = self.socket.send_to(&ADVERTISEMENT, self.destination(peer)).await {
                tracing::debug!(event = "router.send_failed", interface = self.interface, %error);
            }
        }
    }

    /// The solicitor, if it has an address yet; else all nodes (RFC 4861 section 6.2.6).
    fn destination(&self, peer: SocketAddr) -> SocketAddr {
        match peer {
            SocketAddr::V6(peer) if peer.ip().is_unicast_link_local() => SocketAddr::V6(peer),
            SocketAddr::V6(_) | SocketAddr::V4(_) => SocketAddrV6::new(ALL_NODES, 0, 0, self.index).into(),
        }
    }
}

/// Type 133, code 0, at least eight octets (RFC 4861 section 6.1.1).
fn is_solicitation(message: &[u8]) -> bool {
    message.len() >= 8 && message.starts_with(&[133, 0])
}

/// Type 134, no hop limit, no flag, lifetime 0, no times, no options. The kernel fills in the checksum.
const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const MIN_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_solicitations_are_answered() {
        assert!(is_solicitation(&[133, 0, 1, 2, 0, 0, 0, 0]));
        assert!(is_solicitation(&[133, 0, 1, 2, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]));
        for other in [&[] as &[u8], &[133], &[133, 0, 0, 0, 0, 0, 0], &[133, 1, 0, 0, 0, 0, 0, 0], &ADVERTISEMENT] {
            assert!(!is_solicitation(other), "{other:?}");
        }
    }
}
