//! What the three servers share: the records, the tokens, the files in memory. Here a decision of
//! [`crate::boot_plan`] becomes DHCP options, a TFTP file, an HTTP file. No sockets.

use crate::boot_plan::{BootPlan, NodeBoot, NotServed, boot_plan};
use crate::boot_token::{BootToken, BootTokens, Granted};
use crate::config::{Config, Interface};
use crate::dhcp::engine::{Answer, Engine};
use crate::dhcp::reply::{BootOptions, ReplyKind};
use crate::dhcp::server::{Observer, lock};
use crate::dhcp::{Admitted, Authority, ClientKind};
use crate::records::Records;
use crate::script::{AgentScript, BootUrl, CommandLine, UnsafeText};
use assay_service::clock::Clock;
use assay_service::telemetry::boot_step;
use assay_tftp::transfer::Outcome;
use assay_tftp::{Files, Report};
use assay_wire::agent::AgentSettings;
use assay_wire::id::NodeId;
use assay_wire::net::MacAddr;
use assay_wire::step::Step;
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use url::Url;

/// The shared state.
pub struct Site {
    records: watch::Receiver<Records>,
    clock: Arc<dyn Clock>,
    tokens: Mutex<BootTokens>,
    loader: Bytes,
    ramdisks: BTreeMap<String, LoadedRamdisk>,
    default_ramdisk: String,
    node_ramdisks: HashMap<NodeId, String>,
    verifier_url: String,
    verifier_key_sha256: String,
}

struct LoadedRamdisk {
    image: Bytes,
    command_line: CommandLine,
}

/// A file that cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("reading the {what} {path}")]
pub struct UnreadableFile {
    what: &'static str,
    path: PathBuf,
    #[source]
    cause: io::Error,
}

impl Site {
    /// Reads the loader and the agent images into memory.
    ///
    /// # Errors
    /// A file cannot be read, is empty, or is larger than any boot file.
    pub fn load(
        config: &Config,
        records: watch::Receiver<Records>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, UnreadableFile> {
        let lifetime_ms = i64::try_from(config.token_lifetime.as_millis()).unwrap_or(i64::MAX);
        let mut ramdisks = BTreeMap::new();
        for (name, ramdisk) in &config.ramdisks {
            let image = read("agent image", &ramdisk.path)?;
            ramdisks.insert(name.clone(), LoadedRamdisk { image, command_line: ramdisk.command_line.clone() });
        }
        Ok(Self {
            records,
            clock,
            tokens: Mutex::new(BootTokens::new(lifetime_ms)),
            loader: read("firmware loader", &config.firmware_loader)?,
            ramdisks,
            default_ramdisk: config.default_ramdisk.clone(),
            node_ramdisks: config.node_ramdisks.clone(),
            // A `Url` has a path even when none was written; agents are told a base.
            verifier_url: config.verifier_url.as_str().trim_end_matches('/').to_owned(),
            verifier_key_sha256: config.verifier_key_sha256.clone(),
        })
    }

    /// The file behind `token` and `name` for a request from `peer`. None, whatever is wrong with the request.
    pub fn boot_file(&self, peer: IpAddr, token: BootToken, name: FileName) -> Option<BootFile> {
        let IpAddr::V4(peer) = peer else { return None };
        let granted = lock(&self.tokens).use_once(self.clock.now_ms(), token, peer).cloned()?;
        // The node may have left the airlock, or begun another boot, since it was told the token.
        if self.plan(granted.mac, ClientKind::Ipxe) != BootPlan::Script(granted.boot.clone()) {
            return None;
        }
        let begun = Instant::now();
        let content = match name {
            FileName::Loader => self.loader.clone(),
            FileName::Agent => self.ramdisk(&granted.boot)?.image.clone(),
            FileName::Settings => self.settings(&granted.boot),
            FileName::Script => self.script(&granted, token).inspect_err(log_unsafe).ok()?.to_string().into(),
        };
        Some(BootFile { name, content, boot: granted.boot, begun })
    }

    fn ramdisk(&self, boot: &NodeBoot) -> Option<&LoadedRamdisk> {
        let name = self.node_ramdisks.get(&boot.node).unwrap_or(&self.default_ramdisk);
        self.ramdisks.get(name)
    }

    /// The document whose exact bytes the agent measures: compact JSON, fields in the order of [`AgentSettings`].
    fn settings(&self, boot: &NodeBoot) -> Bytes {
        let settings = AgentSettings {
            node: boot.node.clone(),
            verifier: self.verifier_url.clone(),
            verifier_key_sha256: self.verifier_key_sha256.clone(),
        };
        serde_json::to_vec(&settings).unwrap_or_default().into()
    }

    fn script(&self, granted: &Granted, token: BootToken) -> Result<AgentScript, UnsafeText> {
        let agent = boot_url(granted.server, token, FileName::Agent)?;
        let command_line = match self.ramdisk(&granted.boot) {
            Some(ramdisk) => ramdisk.command_line.clone(),
            None => "".parse()?,
        };
        Ok(AgentScript { node: granted.boot.node.clone(), agent, command_line })
    }

    fn plan(&self, mac: MacAddr, client: ClientKind) -> BootPlan {
        boot_plan(self.records.borrow().get(mac), client)
    }
}

/// The files that firmware, iPXE and agent fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileName {
    /// iPXE, for firmware that boots by HTTP.
    Loader,
    /// The node's iPXE script.
    Script,
    /// The agent's image. Its name matters: iPXE puts it before the command line, and both are measured.
    Agent,
    /// The agent's settings.
    Settings,
}

impl FileName {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Loader, Self::Script, Self::Agent, Self::Settings];

    /// The name in URLs, and of the loader on TFTP.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loader => "snponly.efi",
            Self::Script => "script.ipxe",
            Self::Agent => "agent.efi",
            Self::Settings => "settings.json",
        }
    }

    /// `Content-Type`. UEFI HTTP boot goes by it.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Loader | Self::Agent => "application/efi",
            Self::Script => "text/plain",
            Self::Settings => "application/json",
        }
    }
}

/// A file for one boot of one node.
#[derive(Debug, Clone)]
pub struct BootFile {
    /// Which.
    pub name: FileName,
    /// Its bytes.
    pub content: Bytes,
    boot: NodeBoot,
    begun: Instant,
}

impl BootFile {
    /// Logs that the whole file went out: a step of the boot path for loader, agent and script.
    pub fn served(&self) {
        let (node, elapsed) = (&self.boot.node, self.begun.elapsed());
        tracing::debug!(event = "http.file_served", %node, file = self.name.as_str(), bytes = self.content.len());
        match self.name {
            FileName::Loader | FileName::Agent => boot_step(Step::BootFileServed, node, elapsed),
            FileName::Script => boot_step(Step::IpxeRendered, node, elapsed),
            FileName::Settings => {}
        }
    }
}

/// The site as one interface's servers see it.
pub struct InterfaceSite {
    /// The site.
    pub site: Arc<Site>,
    /// The HTTP server on this interface.
    pub http: SocketAddrV4,
    /// Fixed addresses on this interface.
    pub reservations: HashMap<MacAddr, Ipv4Addr>,
    /// The interface's leases.
    pub engine: Arc<Mutex<Engine>>,
}

impl InterfaceSite {
    /// What `interface` needs.
    #[must_use]
    pub fn new(site: &Arc<Site>, interface: &Interface, engine: &Arc<Mutex<Engine>>) -> Self {
        Self {
            site: Arc::clone(site),
            http: SocketAddrV4::new(interface.scope.server, interface.http_port),
            reservations: interface.reservations.clone(),
            engine: Arc::clone(engine),
        }
    }

    fn url(&self, now_ms: i64, boot: NodeBoot, mac: MacAddr, address: Ipv4Addr, name: FileName) -> BootOptions {
        let granted = Granted { boot, mac, address, server: self.http };
        let token = lock(&self.site.tokens)
            .issue(now_ms, &granted, || BootToken::from_random(assay_service::secret_file::random()));
        match boot_url(self.http, token, name) {
            Ok(url) => BootOptions::Url { url: url.as_str().to_owned() },
            Err(error) => {
                log_unsafe(&error);
                BootOptions::None
            }
        }
    }

    /// The node in the airlock whose lease `peer` is.
    fn node_at(&self, peer: IpAddr, client: ClientKind) -> Option<BootPlan> {
        let IpAddr::V4(peer) = peer else { return None };
        let mac = lock(&self.engine).holder(self.site.clock.now_ms(), peer)?;
        Some(self.site.plan(mac, client))
    }
}

impl Authority for InterfaceSite {
    fn admit(&self, mac: MacAddr, client: ClientKind) -> Result<Admitted, NotServed> {
        match self.site.plan(mac, client) {
            BootPlan::Nothing(why) => Err(why),
            BootPlan::LoaderByTftp(_)
            | BootPlan::LoaderByHttp(_)
            | BootPlan::Script(_)
            | BootPlan::AgentSettings(_) => Ok(Admitted { reserved: self.reservations.get(&mac).copied() }),
        }
    }

    fn boot(&self, now_ms: i64, mac: MacAddr, client: ClientKind, address: Ipv4Addr) -> BootOptions {
        match self.site.plan(mac, client) {
            BootPlan::Nothing(_) => BootOptions::None,
            BootPlan::LoaderByTftp(_) => BootOptions::Tftp { file: FileName::Loader.as_str().to_owned() },
            BootPlan::LoaderByHttp(boot) => self.url(now_ms, boot, mac, address, FileName::Loader),
            BootPlan::Script(boot) => self.url(now_ms, boot, mac, address, FileName::Script),
            BootPlan::AgentSettings(boot) => self.url(now_ms, boot, mac, address, FileName::Settings),
        }
    }
}

impl Observer for InterfaceSite {
    fn answered(&self, answer: &Answer, elapsed: Duration) {
        // Step 1 is the firmware's and iPXE's; when the agent asks, the path is past step 3.
        let booting = match answer.client {
            ClientKind::UefiPxe | ClientKind::UefiHttp | ClientKind::Ipxe => true,
            ClientKind::Agent | ClientKind::Other => false,
        };
        if !booting || answer.kind != ReplyKind::Offer {
            return;
        }
        let node = self.site.records.borrow().get(answer.mac).map(|record| record.node.clone());
        if let Some(node) = node {
            boot_step(Step::DhcpOffered, &node, elapsed);
        }
    }
}

impl Files for InterfaceSite {
    fn open(&self, peer: IpAddr, name: &str) -> Option<Bytes> {
        match self.node_at(peer, ClientKind::UefiPxe)? {
            BootPlan::LoaderByTftp(_) => (name == FileName::Loader.as_str()).then(|| self.site.loader.clone()),
            BootPlan::Nothing(_) | BootPlan::LoaderByHttp(_) | BootPlan::Script(_) | BootPlan::AgentSettings(_) => None,
        }
    }

    fn ended(&self, report: &Report) {
        let Report { peer, name, outcome, elapsed } = report;
        match outcome {
            Outcome::Complete => {
                tracing::debug!(event = "tftp.file_served", %peer, file = name);
                if let Some(BootPlan::LoaderByTftp(boot)) = self.node_at(peer.ip(), ClientKind::UefiPxe) {
                    boot_step(Step::BootFileServed, &boot.node, *elapsed);
                }
            }
            Outcome::Refused { code } => tracing::debug!(event = "tftp.refused_by_client", %peer, file = name, code),
            Outcome::TimedOut { answered } => {
                tracing::info!(event = "tftp.timed_out", %peer, file = name, answered, "a client stopped reading its boot file");
            }
        }
    }
}

/// Parsed and serialised again, never pasted: whatever comes out is one word.
fn boot_url(server: SocketAddrV4, token: BootToken, name: FileName) -> Result<BootUrl, UnsafeText> {
    let text = format!("http://{server}/boot/{}/{}", token.expose(), name.as_str());
    match Url::parse(&text) {
        Ok(url) => BootUrl::new(&url),
        Err(_) => Err(UnsafeText::new("boot URL", "")),
    }
}

fn log_unsafe(error: &UnsafeText) {
    tracing::error!(event = "script.unsafe", %error, "a script or URL was not made");
}

fn read(what: &'static str, path: &Path) -> Result<Bytes, UnreadableFile> {
    let failed = |cause| UnreadableFile { what, path: path.to_owned(), cause };
    let size = std::fs::metadata(path).map_err(failed)?.len();
    if !(1..=MAX_FILE_BYTES).contains(&size) {
        let problem = format!("it has {size} octets, not 1 to {MAX_FILE_BYTES}");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, problem)));
    }
    std::fs::read(path).map(Bytes::from).map_err(failed)
}

/// The address of a socket that only ever has IPv4 peers.
pub(crate) fn unmapped(peer: SocketAddr) -> IpAddr {
    peer.ip().to_canonical()
}

const MAX_FILE_BYTES: u64 = 512 << 20;
