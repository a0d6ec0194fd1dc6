//! The sockets: one that listens, and one for every transfer. Decides nothing.

use crate::packet::ClientPacket;
use crate::server::{Decision, Files, Limits, Report, Server, Silence, Started, TransferId};
use crate::transfer::{Outcome, Transfer};
use crate::udp::UdpEndpoint;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Where and how to listen.
#[derive(Debug, Clone)]
pub struct ListenConfig {
    /// Address and port; the port is 69 but in tests.
    pub address: SocketAddr,
    /// Hear and answer on this network interface only.
    pub interface: Option<String>,
    /// Bounds.
    pub limits: Limits,
    /// Give the kernel a whole window at once (`UDP_SEGMENT`). Off where the far end of a virtual link does not
    /// complete checksums.
    pub segmentation_offload: bool,
}

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum TftpError {
    /// The listening socket could not be had.
    #[error("listening for TFTP on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The listening socket broke.
    #[error("receiving TFTP requests on {address}")]
    Receive {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// A server with its socket open.
#[derive(Debug)]
pub struct Listener {
    socket: UdpEndpoint,
    address: SocketAddr,
    config: ListenConfig,
}

/// Listens and serves until `shutdown`.
///
/// # Errors
/// See [`TftpError`].
pub async fn serve(config: ListenConfig, files: Arc<dyn Files>, shutdown: CancellationToken) -> Result<(), TftpError> {
    Listener::bind(config)?.serve(files, shutdown).await
}

impl Listener {
    /// Opens the listening socket.
    ///
    /// # Errors
    /// The address or the interface is not to be had.
    pub fn bind(config: ListenConfig) -> Result<Self, TftpError> {
        let listen_error = |cause| TftpError::Listen { address: config.address, cause };
        let socket = UdpEndpoint::bind(config.address, config.interface.as_deref()).map_err(listen_error)?;
        let address = socket.local_address().map_err(listen_error)?;
        Ok(Self { socket, address, config })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`.
    ///
    /// # Errors
    /// The listening socket broke.
    pub async fn serve(self, files: Arc<dyn Files>, shutdown: CancellationToken) -> Result<(), TftpError> {
        let mut server = Server::new(self.config.limits);
        let mut running = Running::default();
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                Some(ended) = running.next_ended() => server.ended(ended),
                received = self.socket.receive(&mut buffer) => {
                    let arrival = received.map_err(|cause| TftpError::Receive { address: self.address, cause })?;
                    let (peer, local) = (arrival.peer, arrival.local.unwrap_or_else(|| self.address.ip()));
                    for datagram in arrival.datagrams(&buffer) {
                        let decision = server.handle_packet(Instant::now(), peer, local, datagram, &*files);
                        self.act(decision, peer, local, &mut server, &mut running, &files).await;
                    }
                }
            }
        }
    }

    async fn act(
        &self,
        decision: Decision,
        peer: SocketAddr,
        local: IpAddr,
        server: &mut Server,
        running: &mut Running,
        files: &Arc<dyn Files>,
    ) {
        match decision {
            Decision::Silence(Silence::Full) => {
                tracing::warn!(event = "tftp.full", %peer, transfers = server.transfers(), "request dropped");
            }
            Decision::Silence(why) => tracing::debug!(event = "tftp.silence", %peer, ?why),
            Decision::Refuse(answer) => {
                tracing::debug!(event = "tftp.refused", %peer);
                if let Err(error) = self.socket.send(peer, Some(local), &answer, None).await {
                    tracing::debug!(event = "tftp.send_failed", %peer, %error);
                }
            }
            Decision::Start(started) => {
                if let Some(replaced) = started.replaces {
                    running.stop(replaced);
                }
                let id = started.id;
                // Same address as the request came to, so that the reply has the right source; any port.
                match UdpEndpoint::bind(SocketAddr::new(local, 0), self.config.interface.as_deref()) {
                    Ok(socket) => {
                        let offload = self.config.segmentation_offload;
                        running.start(id, run_transfer(*started, socket, peer, offload, Arc::clone(files)));
                    }
                    Err(error) => {
                        tracing::warn!(event = "tftp.no_socket", %peer, %error, "request dropped");
                        server.ended(id);
                    }
                }
            }
        }
    }
}

/// The transfers' tasks. A task that panics ends its own transfer and nothing else.
#[derive(Default)]
struct Running {
    tasks: JoinSet<()>,
    ids: HashMap<tokio::task::Id, TransferId>,
    handles: HashMap<TransferId, tokio::task::AbortHandle>,
}

impl Running {
    fn start(&mut self, id: TransferId, transfer: impl Future<Output = ()> + Send + 'static) {
        let handle = self.tasks.spawn(transfer);
        self.ids.insert(handle.id(), id);
        self.handles.insert(id, handle);
    }

    fn stop(&mut self, id: TransferId) {
        if let Some(handle) = self.handles.get(&id) {
            handle.abort();
        }
    }

    /// The next transfer that is over; none while there is none to wait for.
    async fn next_ended(&mut self) -> Option<TransferId> {
        let task = match self.tasks.join_next_with_id().await? {
            Ok((task, ())) => task,
            Err(error) => {
                if error.is_panic() {
                    tracing::error!(event = "tftp.transfer_panicked", %error);
                }
                error.id()
            }
        };
        let id = self.ids.remove(&task)?;
        self.handles.remove(&id);
        Some(id)
    }
}

async fn run_transfer(started: Started, socket: UdpEndpoint, peer: SocketAddr, offload: bool, files: Arc<dyn Files>) {
    let begun = Instant::now();
    let Started { name, mut transfer, .. } = started;
    // A connected socket hears its peer only: datagrams with another transfer identifier never reach the transfer.
    let outcome = match socket.connect(peer).await {
        Ok(()) => drive(&mut transfer, &socket, peer, offload).await,
        Err(error) => Err(error),
    };
    match outcome {
        Ok(outcome) => files.ended(&Report { peer, name, outcome, elapsed: begun.elapsed() }),
        Err(error) => tracing::debug!(event = "tftp.transfer_failed", %peer, %name, %error),
    }
}

async fn drive(transfer: &mut Transfer, socket: &UdpEndpoint, peer: SocketAddr, offload: bool) -> io::Result<Outcome> {
    let mut buffer = [0; 2048];
    let mut out = Vec::new();
    loop {
        let batch = if offload { socket.max_batch(transfer.packet_bytes()) } else { 1 };
        while let Some(segment) = transfer.poll_transmit(batch, &mut out) {
            socket.send(peer, None, &out, Some(segment)).await?;
            out.clear();
        }
        let Some(deadline) = transfer.poll_timeout() else {
            return Ok(transfer.outcome().unwrap_or(Outcome::TimedOut { answered: false }));
        };
        tokio::select! {
            () = tokio::time::sleep_until(deadline.into()) => transfer.handle_timeout(Instant::now()),
            // A refused port shows as an error here: the client has gone.
            arrival = socket.receive(&mut buffer) => for datagram in arrival?.datagrams(&buffer) {
                if let Ok(packet) = ClientPacket::decode(datagram) {
                    transfer.handle_packet(Instant::now(), &packet);
                }
            }
        }
    }
}

const RECEIVE_BYTES: usize = 64 * 1024;
