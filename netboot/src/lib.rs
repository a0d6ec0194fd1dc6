//! The boot services: steps 1 to 3 of the boot path. What does this node boot next?
//!
//! ```text
//!            isolation ── boot records ──▶ records ──▶ boot_plan(record, client)
//!                                                          │
//!   firmware ── DISCOVER, 93 = 7 ──────────▶ dhcp ◀────────┤ address, snponly.efi
//!   firmware ── RRQ snponly.efi ───────────▶ tftp ◀────────┤
//!   iPXE ────── DISCOVER, 77 = iPXE ───────▶ dhcp ◀────────┤ http://…/boot/<token>/script.ipxe
//!   iPXE ────── GET script.ipxe, agent.efi ▶ http ◀────────┤
//!   agent ───── DISCOVER, 60 = AssayAgent ─▶ dhcp ◀────────┤ http://…/boot/<token>/settings.json
//!   agent ───── GET settings.json ─────────▶ http ◀────────┘
//! ```
//!
//! Pure: [`boot_plan`], [`boot_token`], [`script`], [`range`], and of [`dhcp`] all but its `server`. [`site`] joins them;
//! sockets are in [`http`], [`router_advertisement`], `dhcp::server` and `assay_tftp::socket`. A machine that is no node in the airlock gets no
//! byte from any of the three servers.

pub mod boot_plan;
pub mod boot_token;
pub mod config;
pub mod dhcp;
pub mod http;
pub mod range;
pub mod records;
pub mod router_advertisement;
pub mod script;
pub mod site;
pub mod supervise;

use crate::config::{Config, Interface};
use crate::dhcp::engine::Engine;
use crate::dhcp::lease_log::{LeaseLog, LeaseLogError};
use crate::dhcp::server::{DhcpError, DhcpServer};
use crate::http::{BootHttp, HttpListenError};
use crate::records::Records;
use crate::router_advertisement::{AdvertiserError, RouterAdvertiser};
use crate::site::{InterfaceSite, Site, UnreadableFile};
use crate::supervise::{BoxedError, Serving, supervise};
use assay_service::client::ServiceClient;
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_service::http::ServiceContext;
use assay_tftp::socket::Listener as TftpListener;
use assay_tftp::{Limits, ListenConfig, TftpError};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Why the boot services do not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A boot file.
    #[error("loading what nodes boot")]
    Files(#[from] UnreadableFile),
    /// The lease log.
    #[error("loading the leases")]
    Leases(#[from] LeaseLogError),
    /// DHCP.
    #[error("starting DHCP")]
    Dhcp(#[from] DhcpError),
    /// TFTP.
    #[error("starting TFTP")]
    Tftp(#[from] TftpError),
    /// HTTP.
    #[error("starting the boot files' HTTP server")]
    Http(#[from] HttpListenError),
    /// Router advertisements.
    #[error("starting router advertisements")]
    Router(#[from] AdvertiserError),
}

/// Serves until `context.shutdown`. `isolation` is asked for boot records; its token must have the service role.
///
/// # Errors
/// A file cannot be read or a socket cannot be had at the start. Later failures are logged and mended.
pub async fn run(config: Config, isolation: ServiceClient, context: ServiceContext) -> Result<(), RunError> {
    let (sender, receiver) = watch::channel(Records::default());
    let services = Services::open(&config, receiver, context.clock, context.shutdown.clone())?;
    tracing::info!(event = "netboot.ready", interfaces = config.interfaces.len(), "the boot services are listening");
    tokio::join!(records::follow(isolation, sender, context.shutdown), services.run());
    tracing::info!(event = "netboot.stopped", "the boot services have stopped");
    Ok(())
}

/// The boot services with their sockets open, whoever it is that supplies the records.
pub struct Services {
    listeners: Vec<Supervised>,
    shutdown: CancellationToken,
}

struct Supervised {
    name: String,
    first: Serving,
    open: Box<dyn Fn() -> Result<Serving, BoxedError> + Send>,
}

impl Services {
    /// Reads the files and opens the sockets.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn open(
        config: &Config,
        records: watch::Receiver<Records>,
        clock: Arc<dyn Clock>,
        shutdown: CancellationToken,
    ) -> Result<Self, RunError> {
        let site = Arc::new(Site::load(config, records, Arc::clone(&clock))?);
        let (log, restored) = LeaseLog::open(&config.lease_log, clock.now_ms())?;
        if restored.damaged > 0 {
            tracing::warn!(
                event = "dhcp.lease_log_damaged",
                lines = restored.damaged,
                "lines of the lease log made no sense"
            );
        }
        let log = Arc::new(Mutex::new(log));
        let mut listeners = Vec::new();
        for interface in &config.interfaces {
            let mut engine = Engine::new(interface.scope.clone(), interface.relays.clone());
            restored.leases.iter().for_each(|lease| engine.restore(*lease));
            let engine = Arc::new(Mutex::new(engine));
            let parts = Parts {
                site: Arc::new(InterfaceSite::new(&site, interface, &engine)),
                interface: interface.clone(),
                engine,
                log: Arc::clone(&log),
                clock: Arc::clone(&clock),
                shutdown: shutdown.clone(),
            };
            for (service, open) in [("dhcp", Parts::dhcp as Open), ("tftp", Parts::tftp), ("http", Parts::http)] {
                let parts = parts.clone();
                let name = format!("{service} on {}", interface.name);
                let first = open(&parts)?;
                listeners.push(Supervised { name, first, open: Box::new(move || Ok(open(&parts)?)) });
            }
            // A site may do without IPv6: its nodes boot slower, but they boot.
            match parts.router() {
                Ok(first) => {
                    let name = format!("router advertisements on {}", interface.name);
                    listeners.push(Supervised { name, first, open: Box::new(move || Ok(parts.router()?)) });
                }
                Err(error) => {
                    tracing::warn!(
                        event = "router.absent",
                        error = chain(&error),
                        "iPXE will wait 16 s for IPv6 in every boot"
                    );
                }
            }
        }
        Ok(Self { listeners, shutdown })
    }

    /// Serves until the shutdown that [`Self::open`] was given.
    pub async fn run(self) {
        let mut tasks = JoinSet::new();
        for Supervised { name, first, open } in self.listeners {
            tasks.spawn(supervise(name, first, open, self.shutdown.clone()));
        }
        while tasks.join_next().await.is_some() {}
    }
}

type Open = fn(&Parts) -> Result<Serving, RunError>;

/// What the listeners of one interface are made of.
#[derive(Clone)]
struct Parts {
    site: Arc<InterfaceSite>,
    interface: Interface,
    engine: Arc<Mutex<Engine>>,
    log: Arc<Mutex<LeaseLog>>,
    clock: Arc<dyn Clock>,
    shutdown: CancellationToken,
}

impl Parts {
    fn dhcp(&self) -> Result<Serving, RunError> {
        let Interface { name, scope, .. } = &self.interface;
        let log = Some(Arc::clone(&self.log));
        let server = DhcpServer::bind(name, scope.server, Arc::clone(&self.engine), log)?;
        let (site, clock, shutdown) = (Arc::clone(&self.site), Arc::clone(&self.clock), self.shutdown.clone());
        Ok(Box::pin(async move { Ok(server.serve(Arc::clone(&site) as _, site, clock, shutdown).await?) }))
    }

    fn tftp(&self) -> Result<Serving, RunError> {
        let config = ListenConfig {
            address: SocketAddr::from((self.interface.scope.server, TFTP_PORT)),
            interface: Some(self.interface.name.clone()),
            limits: Limits::default(),
            segmentation_offload: self.interface.segmentation_offload,
        };
        let listener = TftpListener::bind(config)?;
        let (site, shutdown) = (Arc::clone(&self.site), self.shutdown.clone());
        Ok(Box::pin(async move { Ok(listener.serve(site, shutdown).await?) }))
    }

    fn http(&self) -> Result<Serving, RunError> {
        let server = BootHttp::bind(SocketAddr::V4(self.site.http), Some(&self.interface.name))?;
        let (site, shutdown) = (Arc::clone(&self.site.site), self.shutdown.clone());
        Ok(Box::pin(async move {
            server.serve(site, shutdown).await;
            Ok(())
        }))
    }

    fn router(&self) -> Result<Serving, RunError> {
        let advertiser = RouterAdvertiser::bind(&self.interface.name)?;
        let shutdown = self.shutdown.clone();
        Ok(Box::pin(async move { Ok(advertiser.serve(shutdown).await?) }))
    }
}

const TFTP_PORT: u16 = 69;
