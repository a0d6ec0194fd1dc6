//! A UDP socket on one network interface that knows which of our addresses a datagram came to, and answers from it.
//!
//! Servers with several addresses on a NIC, or several NICs in one network, otherwise answer from whichever address
//! the routing table likes, and firmware ignores such answers. Used for TFTP here and for DHCP by the boot services.

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// The socket.
#[derive(Debug)]
pub struct UdpEndpoint {
    io: UdpSocket,
    state: UdpSocketState,
}

/// One receive call's datagrams: one, or several of equal length that the kernel merged.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// Who sent them.
    pub peer: SocketAddr,
    /// Which address they were sent to; broadcast addresses too.
    pub local: Option<IpAddr>,
    length: usize,
    stride: usize,
}

impl Arrival {
    /// The datagrams in the buffer that was received into.
    pub fn datagrams<'a>(&self, buffer: &'a [u8]) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        buffer.get(..self.length).unwrap_or_default().chunks(self.stride.max(1))
    }
}

impl UdpEndpoint {
    /// Opens a socket on `address`; with `interface`, one that hears and speaks there only (`SO_BINDTODEVICE`).
    /// Broadcasting is allowed.
    ///
    /// # Errors
    /// The address or the interface is not to be had.
    pub fn bind(address: SocketAddr, interface: Option<&str>) -> io::Result<Self> {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::DGRAM.nonblocking(),
            Some(socket2::Protocol::UDP),
        )?;
        if let Some(interface) = interface {
            socket.bind_device(Some(interface.as_bytes()))?;
        }
        socket.set_broadcast(true)?;
        socket.bind(&address.into())?;
        let io = UdpSocket::from_std(socket.into())?;
        let state = UdpSocketState::new((&io).into())?;
        Ok(Self { io, state })
    }

    /// Where it is bound.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    /// From now on hears `peer` only.
    ///
    /// # Errors
    /// There is no route.
    pub async fn connect(&self, peer: SocketAddr) -> io::Result<()> {
        self.io.connect(peer).await
    }

    /// Receives into `buffer`, which should have 64 KiB. Can be cancelled.
    ///
    /// # Errors
    /// The socket is broken.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<Arrival> {
        let mut meta = [RecvMeta::default()];
        let receive = || self.state.recv((&self.io).into(), &mut [IoSliceMut::new(buffer)], &mut meta);
        self.io.async_io(Interest::READABLE, receive).await?;
        let [RecvMeta { addr, len, stride, dst_ip, .. }] = meta;
        Ok(Arrival { peer: addr, local: dst_ip, length: len, stride })
    }

    /// Sends `contents` from `source`, or from the bound address; with `segment`, as datagrams of that length.
    ///
    /// # Errors
    /// The kernel did not take it.
    pub async fn send(
        &self,
        destination: SocketAddr,
        source: Option<IpAddr>,
        contents: &[u8],
        segment: Option<usize>,
    ) -> io::Result<()> {
        let transmit = Transmit { destination, ecn: None, contents, segment_size: segment, src_ip: source };
        self.io.async_io(Interest::WRITABLE, || self.state.try_send((&self.io).into(), &transmit)).await
    }

    /// How many datagrams of this length one call of [`Self::send`] may carry.
    #[must_use]
    pub fn max_batch(&self, datagram_bytes: usize) -> usize {
        self.state.max_gso_segments().min(MAX_SEND_BYTES / datagram_bytes.max(1)).max(1)
    }
}

/// What the kernel takes in one call is 64 KiB with headers.
const MAX_SEND_BYTES: usize = 65_000;
