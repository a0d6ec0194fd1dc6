//! The DHCP server's sockets: ports 67 and 4011 of one interface, one task, one lease table. Decides nothing.

use super::engine::{Answer, Authority, Decision, Engine, Service, Silence};
use super::lease_log::{LeaseLog, LeaseLogError};
use super::rate::RateLimit;
use super::reply::{ReplyKind, SERVER_PORT};
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_tftp::udp::{Arrival, UdpEndpoint};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// A DHCP server on one interface.
#[derive(Debug)]
pub struct DhcpServer {
    interface: String,
    server: Ipv4Addr,
    dhcp: UdpEndpoint,
    boot_server: UdpEndpoint,
    engine: Arc<Mutex<Engine>>,
    log: Option<Arc<Mutex<LeaseLog>>>,
    silences: RateLimit,
}

/// Told of every answer, after it was sent.
pub trait Observer: Send + Sync + 'static {
    /// `answer` was sent `elapsed` after its request arrived.
    fn answered(&self, answer: &Answer, elapsed: Duration);
}

/// Why a DHCP server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum DhcpError {
    /// A socket could not be had.
    #[error("opening DHCP port {port} on interface {interface}")]
    Bind {
        /// Interface.
        interface: String,
        /// Port.
        port: u16,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// A socket broke.
    #[error("receiving DHCP packets on interface {interface}")]
    Receive {
        /// Interface.
        interface: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The lease log could not be opened.
    #[error("starting DHCP on interface {interface}")]
    LeaseLog {
        /// Interface.
        interface: String,
        /// Why.
        #[source]
        cause: LeaseLogError,
    },
}

impl DhcpServer {
    /// Opens the sockets on `interface`, where this host has the address `server`. Leases are appended to `log`.
    ///
    /// # Errors
    /// A socket could not be had: the interface does not exist, the port is taken, or the right to it is missing.
    pub fn bind(
        interface: &str,
        server: Ipv4Addr,
        engine: Arc<Mutex<Engine>>,
        log: Option<Arc<Mutex<LeaseLog>>>,
    ) -> Result<Self, DhcpError> {
        let open = |port| {
            UdpEndpoint::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), Some(interface))
                .map_err(|cause| DhcpError::Bind { interface: interface.to_owned(), port, cause })
        };
        let (dhcp, boot_server) = (open(SERVER_PORT)?, open(BOOT_SERVER_PORT)?);
        let silences = RateLimit::new(1, SILENCE_LOG_MS, 1024);
        Ok(Self { interface: interface.to_owned(), server, dhcp, boot_server, engine, log, silences })
    }

    /// Serves until `shutdown`.
    ///
    /// # Errors
    /// A socket broke.
    pub async fn serve(
        mut self,
        authority: Arc<dyn Authority>,
        observer: Arc<dyn Observer>,
        clock: Arc<dyn Clock>,
        shutdown: CancellationToken,
    ) -> Result<(), DhcpError> {
        let (mut dhcp_buffer, mut boot_buffer) = (vec![0; RECEIVE_BYTES], vec![0; RECEIVE_BYTES]);
        let mut sync = tokio::time::interval(Duration::from_secs(1));
        loop {
            let (service, arrival) = tokio::select! {
                () = shutdown.cancelled() => break,
                _ = sync.tick() => {
                    self.sync_log(clock.now_ms());
                    continue;
                }
                arrival = self.dhcp.receive(&mut dhcp_buffer) => (Service::Dhcp, arrival),
                arrival = self.boot_server.receive(&mut boot_buffer) => (Service::BootServer, arrival),
            };
            let arrival = arrival.map_err(|cause| DhcpError::Receive { interface: self.interface.clone(), cause })?;
            let buffer = match service {
                Service::Dhcp => &dhcp_buffer,
                Service::BootServer => &boot_buffer,
            };
            for datagram in arrival.datagrams(buffer) {
                self.handle(service, &arrival, datagram, &*authority, &*observer, &*clock).await;
            }
        }
        self.sync_log(clock.now_ms());
        Ok(())
    }

    async fn handle(
        &mut self,
        service: Service,
        arrival: &Arrival,
        datagram: &[u8],
        authority: &dyn Authority,
        observer: &dyn Observer,
        clock: &dyn Clock,
    ) {
        let begun = Instant::now();
        let now_ms = clock.now_ms();
        // Sent to another address of this host: not to this server.
        let to_us = match arrival.local {
            Some(IpAddr::V4(local)) => local == self.server || local.is_broadcast(),
            Some(IpAddr::V6(_)) => false,
            None => true,
        };
        let SocketAddr::V4(source) = arrival.peer else { return };
        if !to_us {
            return;
        }
        let decision = lock(&self.engine).handle(now_ms, service, source, datagram, authority);
        match decision {
            Decision::Silence(silence) => self.log_silence(now_ms, silence),
            Decision::Ended(lease) => {
                tracing::info!(event = "dhcp.lease_ended", mac = %lease.mac, address = %lease.address);
                self.record(&lease);
            }
            Decision::Answer(answer) => {
                // An address that is not on record could be given to another after a restart: then better no answer.
                if answer.lease.as_ref().is_some_and(|lease| !self.record(lease)) {
                    return;
                }
                let socket = match service {
                    Service::Dhcp => &self.dhcp,
                    Service::BootServer => &self.boot_server,
                };
                let destination = SocketAddr::V4(answer.destination);
                match socket.send(destination, Some(self.server.into()), &answer.reply, None).await {
                    Ok(()) => {
                        self.log_answer(&answer);
                        observer.answered(&answer, begun.elapsed());
                    }
                    Err(error) => {
                        tracing::warn!(event = "dhcp.send_failed", interface = self.interface, %destination, %error);
                    }
                }
            }
        }
    }

    /// Whether `lease` is on record, where there is a record.
    fn record(&self, lease: &super::lease::AddressLease) -> bool {
        let Some(log) = &self.log else { return true };
        match lock(log).append(lease) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(event = "dhcp.lease_not_recorded", mac = %lease.mac, address = %lease.address, error = chain(&error));
                false
            }
        }
    }

    fn sync_log(&self, now_ms: i64) {
        let Some(log) = &self.log else { return };
        if let Err(error) = lock(log).sync(now_ms) {
            tracing::error!(event = "dhcp.lease_log_not_synced", error = chain(&error));
        }
    }

    fn log_answer(&self, answer: &Answer) {
        let (mac, client, address) = (answer.mac, answer.client, answer.address);
        let kind = match answer.kind {
            ReplyKind::Offer => "offer",
            ReplyKind::Acknowledge => "ack",
            ReplyKind::Refuse => "nak",
        };
        tracing::debug!(event = "dhcp.answered", interface = self.interface, %mac, ?client, ?address, kind);
    }

    /// One entry a minute for each machine that is not served; noise that anybody can make is for debugging only.
    fn log_silence(&mut self, now_ms: i64, silence: Silence) {
        let interface = &self.interface;
        match silence {
            Silence::NotServed { mac, client, why } => {
                if self.silences.allow(now_ms, mac) {
                    tracing::info!(event = "dhcp.not_served", interface, %mac, ?client, %why, "a machine asked to boot and got no answer");
                }
            }
            Silence::NoAddress(mac) => {
                if self.silences.allow(now_ms, mac) {
                    tracing::warn!(event = "dhcp.no_address", interface, %mac, "every address of the pool is held");
                }
            }
            Silence::Unencodable => {
                tracing::error!(event = "dhcp.unencodable", interface, "a reply does not fit its packet");
            }
            Silence::Malformed(_)
            | Silence::RateLimited
            | Silence::UnknownRelay(_)
            | Silence::OtherServer
            | Silence::NothingAsked
            | Silence::NotHolder => tracing::debug!(event = "dhcp.silence", interface, ?silence),
        }
    }
}

/// A panic while the lock was held leaves a table that is still whole: every change of it is one insertion.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// PXE 2.1 section 2.2.3.
const BOOT_SERVER_PORT: u16 = 4011;
const RECEIVE_BYTES: usize = 64 * 1024;
const SILENCE_LOG_MS: i64 = 60_000;
