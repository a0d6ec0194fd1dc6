//! The gateway: what stands on a project's provisioning network, in a network namespace of its own, unprivileged.
//!
//! It starts a process for each export and hands it the connections of its node ([`portal`], [`supervised`]; the process
//! is [`crate::worker`]), relays agents to the verifier ([`relay`]), says which node has which address
//! ([`Gateway::reservations`], for a DHCP server), and takes orders from imaging on a Unix socket ([`order`]). It knows
//! no project, no lease and no result: an order says everything, and expires.

mod checker;
mod companion;
mod control;
mod exports;
pub mod file;
pub mod order;
mod portal;
mod process;
mod relay;
mod supervised;

pub use crate::worker::message::{Confinement, Limits};
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_wire::net::MacAddr;
use exports::Exports;
use process::Launcher;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// How often exports are looked through for those that have expired.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(250);

/// What a gateway is told when it starts.
#[derive(Clone)]
pub struct GatewayConfig {
    /// Where imaging gives orders: a Unix socket to make.
    pub control_socket: PathBuf,
    /// The image store's folder, as this process sees it.
    pub store: PathBuf,
    /// Where processes are started that have a clone on Ceph open: the socket of [`crate::rbd_disks`]. Without one, no disk
    /// that is on Ceph is served.
    pub rbd_disks_socket: Option<PathBuf>,
    /// Where initiators connect. With port 0, see [`Gateway::portal`].
    pub portal: SocketAddr,
    /// The relay to the verifier, if there is one.
    pub relay: Option<RelayConfig>,
    /// The program of the exports' processes; `assay-export` beside this program if none is given.
    pub worker: Option<PathBuf>,
    /// The first of the users that those processes become, each one of its own, where this process may do that.
    pub worker_users: Option<u32>,
    /// What bounds each export's initiators; its sessions are the order's to say.
    pub limits: Limits,
    /// Exports expire by it.
    pub clock: Arc<dyn Clock>,
}

/// The relay to the verifier's agent API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayConfig {
    /// Where agents connect.
    pub listen: SocketAddr,
    /// The Unix socket that the verifier serves TLS on.
    pub verifier_socket: PathBuf,
}

/// Why a gateway does not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// An address or socket cannot be had.
    #[error("listening for {what} on {address}")]
    Listen {
        /// What for.
        what: &'static str,
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// There is no program for exports.
    #[error("the export worker's program {} is not there", program.display())]
    NoWorker {
        /// Where it should be.
        program: PathBuf,
    },
    /// This process does not know where its own program is, or cannot start a thread.
    #[error("preparing to start export workers")]
    OwnPath(#[source] io::Error),
    /// The control socket failed.
    #[error("serving the control socket")]
    Control(#[source] io::Error),
}

/// A gateway whose sockets are bound.
pub struct Gateway {
    exports: Arc<Exports>,
    control: tokio::net::UnixListener,
    portal: TcpListener,
    portal_address: SocketAddr,
    relay: Option<(TcpListener, PathBuf)>,
}

impl Gateway {
    /// Binds all sockets.
    ///
    /// # Errors
    /// One is taken or not allowed, or the workers' program is not there.
    pub async fn bind(config: GatewayConfig) -> Result<Self, GatewayError> {
        let launcher = Launcher::new(config.worker.clone())?;
        let portal = listen("iSCSI", config.portal).await?;
        let portal_address = portal.local_addr().map_err(|source| refused("iSCSI", config.portal, source))?;
        let relay = match &config.relay {
            Some(relay) => Some((listen("the relay", relay.listen).await?, relay.verifier_socket.clone())),
            None => None,
        };
        let control = control::bind(&config.control_socket)
            .map_err(|source| refused("orders", config.control_socket.display(), source))?;
        let exports = Arc::new(Exports::new(&config, portal_address, launcher));
        Ok(Self { exports, control, portal, portal_address, relay })
    }

    /// Where the portal listens.
    #[must_use]
    pub fn portal(&self) -> SocketAddr {
        self.portal_address
    }

    /// Where the relay listens, if there is one.
    #[must_use]
    pub fn relay(&self) -> Option<SocketAddr> {
        self.relay.as_ref().and_then(|(listener, _)| listener.local_addr().ok())
    }

    /// The address of each node whose export stands and whose MAC address is known: there from the moment its target is
    /// up, gone before its sessions are severed. In order of admission id.
    #[must_use]
    pub fn reservations(&self) -> watch::Receiver<Vec<(MacAddr, Ipv4Addr)>> {
        self.exports.reservations()
    }

    /// Serves until `shutdown`; when it returns, no worker is left, and so no connection.
    ///
    /// # Errors
    /// The control socket failed.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), GatewayError> {
        let routes = Arc::clone(&self.exports);
        let portal = portal::serve(self.portal, move |address| routes.at(address), shutdown.clone());
        let relay = async {
            if let Some((listener, verifier)) = self.relay {
                relay::relay(listener, verifier, shutdown.clone()).await;
            }
        };
        let control = async {
            let served = control::serve(self.control, Arc::clone(&self.exports), shutdown.clone()).await;
            // Without orders the exports cannot be revoked: better none than those.
            shutdown.cancel();
            served.map_err(GatewayError::Control)
        };
        let severed = async {
            shutdown.cancelled().await;
            self.exports.take_down_all().await;
        };
        let (served, (), (), (), ()) = tokio::join!(control, portal, relay, expire(&self.exports, &shutdown), severed);
        // What an order that was being carried out has put up since.
        self.exports.take_down_all().await;
        served
    }
}

async fn expire(exports: &Exports, shutdown: &CancellationToken) {
    let mut ticks = tokio::time::interval(EXPIRY_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => exports.expire().await,
        }
    }
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, GatewayError> {
    TcpListener::bind(address).await.map_err(|source| refused(what, address, source))
}

fn refused(what: &'static str, address: impl std::fmt::Display, source: io::Error) -> GatewayError {
    GatewayError::Listen { what, address: address.to_string(), source }
}
