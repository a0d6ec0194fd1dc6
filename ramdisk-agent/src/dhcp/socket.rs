//! The DHCP client's socket: broadcasts on one NIC that has no address yet, until a server answers or time is up.

use super::{AddressLease, Exchange, MAX_PACKET_BYTES, Reaction};
use crate::network::Nic;
use ring::rand::{SecureRandom as _, SystemRandom};
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

const CLIENT_PORT: u16 = 68;
const SERVER_PORT: u16 = 67;

/// Doubled after each repetition (RFC 2131 section 4.1), but from one second: a node boots before its switch port
/// forwards, and the first discover is often lost.
const FIRST_REPEAT: Duration = Duration::from_secs(1);
const LONGEST_REPEAT: Duration = Duration::from_secs(8);

/// Asks for an address on `nic` for at most `limit`.
///
/// # Errors
/// See [`DhcpError`].
pub async fn acquire(nic: &Nic, limit: Duration) -> Result<AddressLease, DhcpError> {
    let socket_error = |source| DhcpError::Socket { nic: nic.name.clone(), source };
    let socket = open(&nic.name).map_err(socket_error)?;
    let mut transaction = [0; 4];
    SystemRandom::new().fill(&mut transaction).map_err(|_| socket_error(io::Error::other("no randomness")))?;
    let mut exchange = Exchange::new(nic.mac, u32::from_ne_bytes(transaction));

    let server = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::BROADCAST, SERVER_PORT));
    let deadline = Instant::now() + limit;
    let mut repeat = FIRST_REPEAT;
    let mut repeat_at = Instant::now();
    let mut packet = [0; MAX_PACKET_BYTES + 1];
    loop {
        if Instant::now() >= deadline {
            return Err(DhcpError::NoAnswer { nic: nic.name.clone(), limit });
        }
        if Instant::now() >= repeat_at {
            // A link that is not up yet refuses to send; the next repetition may pass.
            if let Err(error) = socket.send_to(&exchange.message(), server).await {
                tracing::debug!(event = "agent.dhcp_send_failed", nic = %nic.name, %error, "DHCP not sent");
            }
            repeat_at = Instant::now() + repeat;
            repeat = (repeat * 2).min(LONGEST_REPEAT);
        }
        let Ok(received) = timeout_at(repeat_at.min(deadline), socket.recv(&mut packet)).await else { continue };
        let length = received.map_err(socket_error)?;
        match exchange.handle_packet(&packet[..length]) {
            Reaction::Bound(lease) => return Ok(lease),
            Reaction::Send(_) | Reaction::Refused => {
                repeat_at = Instant::now();
                repeat = FIRST_REPEAT;
            }
            Reaction::Ignore(why) => {
                tracing::debug!(event = "agent.dhcp_ignored", nic = %nic.name, "ignored a DHCP message: {why}");
            }
        }
    }
}

/// Why there is no address.
#[derive(Debug, thiserror::Error)]
pub enum DhcpError {
    /// Nobody who knows agents answered.
    #[error("asking for an address on {nic}: no DHCP server with settings for an agent answered in {} s", limit.as_secs())]
    NoAnswer {
        /// The NIC.
        nic: String,
        /// How long we waited.
        limit: Duration,
    },
    /// The socket failed.
    #[error("asking for an address on {nic}: the socket failed")]
    Socket {
        /// The NIC.
        nic: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn open(nic: &str) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.set_broadcast(true)?;
    socket.bind_device(Some(nic.as_bytes()))?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, CLIENT_PORT)).into())?;
    UdpSocket::from_std(socket.into())
}
