//! `assay project`, `network`, `gateway` and `token`.

use super::output::{self, Row};
use super::{BoxError, Options, Site};
use assay_service::auth::{Role, Tokens};
use assay_wire::id::{NetworkId, ProjectId};
use assay_wire::imaging::{ChapAlgorithms, Gateway};
use assay_wire::isolation::{Network, Project};
use assay_wire::net::VlanId;
use clap::{Args, Subcommand};
use ipnet::Ipv4Net;
use std::net::{Ipv4Addr, SocketAddrV4};

#[derive(Debug, Subcommand)]
pub(crate) enum ProjectCommand {
    /// Create a project that trusts the given verifier keys
    Create {
        /// Its name
        name: ProjectId,
        /// Ed25519 key (hexadecimal) of a verifier whose results admit nodes; default: this site's own verifier
        #[arg(long = "trust", value_name = "KEY")]
        trust: Vec<String>,
        #[command(flatten)]
        options: Options,
    },
    /// List projects
    List(Options),
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Create a network
    Create {
        /// Its name
        name: NetworkId,
        /// The project that owns it
        #[arg(long)]
        project: ProjectId,
        /// Its VLAN, 1 to 4094
        #[arg(long)]
        vlan: VlanId,
        /// A project beside the owner whose nodes may join it; may be given several times
        #[arg(long = "share-with", value_name = "PROJECT")]
        shared_with: Vec<ProjectId>,
        #[command(flatten)]
        options: Options,
    },
    /// List networks
    List(Options),
}

#[derive(Debug, Subcommand)]
pub(crate) enum GatewayCommand {
    /// Register a project's gateway
    Add(GatewayArguments),
    /// List gateways
    List(Options),
}

#[derive(Debug, Args)]
pub(crate) struct GatewayArguments {
    /// The project
    #[arg(long)]
    project: ProjectId,
    /// Unix socket on which `assay gateway serve` takes orders
    #[arg(long)]
    control: String,
    /// Address and port of the iSCSI portal
    #[arg(long)]
    portal: SocketAddrV4,
    /// Address and port of the relay to the verifier
    #[arg(long)]
    relay: SocketAddrV4,
    /// Subnet of the project's network; nodes get addresses from .50 on
    #[arg(long)]
    subnet: Ipv4Net,
    /// Default router for nodes
    #[arg(long)]
    router: Option<Ipv4Addr>,
    /// Take no CHAP but with SHA-256: iPXE, QEMU and Debian's open-iscsi cannot log in then
    #[arg(long)]
    chap_sha256: bool,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a project's token and print it: the only time that it can be seen. Works on the site's folder itself
    Create {
        /// Name for the audit log
        name: String,
        /// The project whose members will use it
        #[arg(long)]
        project: ProjectId,
        #[command(flatten)]
        options: Options,
    },
}

impl Row for Project {
    const HEAD: &'static [&'static str] = &["PROJECT", "TRUSTED VERIFIER KEYS"];
    fn cells(&self) -> Vec<String> {
        vec![self.name.to_string(), self.verifier_keys.join("\n")]
    }
}

impl Row for Network {
    const HEAD: &'static [&'static str] = &["NETWORK", "PROJECT", "VLAN", "SHARED WITH"];
    fn cells(&self) -> Vec<String> {
        let shared_with: Vec<String> = self.shared_with.iter().map(ToString::to_string).collect();
        vec![self.name.to_string(), self.project.to_string(), self.vlan.to_string(), shared_with.join("\n")]
    }
}

impl Row for Gateway {
    const HEAD: &'static [&'static str] = &["PROJECT", "PORTAL", "RELAY", "SUBNET", "CONTROL"];
    fn cells(&self) -> Vec<String> {
        let Self { project, portal, relay, subnet, control_socket, .. } = self;
        vec![project.to_string(), portal.to_string(), relay.to_string(), subnet.to_string(), control_socket.clone()]
    }
}

pub(crate) async fn run_project(command: ProjectCommand) -> Result<(), BoxError> {
    match command {
        ProjectCommand::Create { name, trust, options } => {
            let site = Site::open(&options)?;
            let verifier_keys = if trust.is_empty() { vec![super::verdict::verifier_key(&site).await?] } else { trust };
            let project = Project { name, verifier_keys };
            // Both relying parties check results themselves, so both must know whom the project trusts.
            let _created: serde_json::Value = site.isolation.post("/v1/projects", &project).await?;
            let _created: serde_json::Value = site.imaging.post("/v1/projects", &project).await?;
            output::done(options.output, &format!("project {} created", project.name), &project)
        }
        ProjectCommand::List(options) => {
            let projects: Vec<Project> = Site::open(&options)?.isolation.get("/v1/projects").await?;
            output::list(options.output, &projects)
        }
    }
}

pub(crate) async fn run_network(command: NetworkCommand) -> Result<(), BoxError> {
    match command {
        NetworkCommand::Create { name, project, vlan, shared_with, options } => {
            let network = Network { name, project, vlan, shared_with: shared_with.into_iter().collect() };
            let _created: serde_json::Value = Site::open(&options)?.isolation.post("/v1/networks", &network).await?;
            output::done(options.output, &format!("network {} created on VLAN {vlan}", network.name), &network)
        }
        NetworkCommand::List(options) => {
            let networks: Vec<Network> = Site::open(&options)?.isolation.get("/v1/networks").await?;
            output::list(options.output, &networks)
        }
    }
}

pub(crate) async fn run_gateway(command: GatewayCommand) -> Result<(), BoxError> {
    match command {
        GatewayCommand::Add(arguments) => {
            let GatewayArguments { project, control, portal, relay, subnet, router, chap_sha256, options } = arguments;
            let chap = if chap_sha256 { ChapAlgorithms::Sha256 } else { ChapAlgorithms::Any };
            let gateway = Gateway { project, control_socket: control, portal, relay, subnet, router, chap };
            let _created: serde_json::Value = Site::open(&options)?.imaging.post("/v1/gateways", &gateway).await?;
            output::done(options.output, &format!("gateway of {} registered", gateway.project), &gateway)
        }
        GatewayCommand::List(options) => {
            let gateways: Vec<Gateway> = Site::open(&options)?.imaging.get("/v1/gateways").await?;
            output::list(options.output, &gateways)
        }
    }
}

pub(crate) fn run_token(command: &TokenCommand) -> Result<(), BoxError> {
    let TokenCommand::Create { name, project, options } = command;
    let token = Tokens::load_or_create(&options.site)?.issue(name, Role::Project(project.clone()))?;
    let shown = serde_json::json!({ "name": name, "project": project, "token": token.expose() });
    output::done(options.output, token.expose(), &shown)
}
