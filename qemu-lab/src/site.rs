//! The lab's hardware: a switch with everything plugged into it, and the nodes with their TPMs and BMCs, all off.
//! Services are none of its business.

use crate::bmc::server::Bmc;
use crate::error::{LabError, Result};
use crate::events::EventLog;
use crate::machine::{Execution, Machine, MachineSpec};
use crate::netns::{CableEnd, Netns, cable};
use crate::topology::{NetworkTopology, NodeTopology, Topology};
use crate::tpm::{TpmAuthority, TpmState};
use assay_ovsdb::testing::{Namespace, OpenVswitch};
use assay_wire::net::VlanId;
use ipnet::Ipv4Net;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Everything that has a power cord. Dropping it pulls them all.
#[derive(Debug)]
pub struct Site {
    /// What it was built after.
    pub topology: Topology,
    /// Where its files are.
    pub folder: PathBuf,
    /// The switch.
    pub switch: OpenVswitch,
    /// The authority of the TPMs.
    pub tpm_authority: TpmAuthority,
    /// The nodes, by name.
    pub nodes: BTreeMap<String, SiteNode>,
    /// The projects' stations, by project.
    pub projects: BTreeMap<String, ProjectStations>,
    _shutdown: DropGuard,
}

/// A node.
#[derive(Debug)]
pub struct SiteNode {
    /// Its place in the topology.
    pub topology: NodeTopology,
    /// Its name on the switch.
    pub port: String,
    /// The machine.
    pub machine: Arc<Machine>,
    /// Its TPM.
    pub tpm: TpmState,
    /// Its BMC.
    pub bmc: Bmc,
    /// The namespace of its cable: the probe station `probe0` is there.
    pub segment: Option<Netns>,
}

/// What stands on a project's provisioning network.
#[derive(Debug)]
pub struct ProjectStations {
    /// The network.
    pub network: NetworkTopology,
    /// Where `assay gateway serve` runs; its interface is [`GATEWAY_INTERFACE`].
    pub gateway: Netns,
    /// Another machine of the tenant, to look at the node from; its interface is [`PEER_INTERFACE`].
    pub peer: Netns,
}

impl Site {
    /// Builds the site in `folder`. All nodes are off, all their ports in quarantine; what their power does goes to
    /// `events`.
    ///
    /// # Errors
    /// A tool fails, or `folder` cannot be used.
    pub async fn build(topology: Topology, folder: &Path, events: &EventLog) -> Result<Self> {
        let shutdown = CancellationToken::new();
        let switch = start_switch(folder).await?;
        let plug = |port: &str, vlan: VlanId, protected: bool| {
            switch
                .add_port(BRIDGE, port, vlan.get(), protected)
                .map_err(LabError::service(format!("plugging {port} into the switch")))
        };
        let switch_netns = Netns::Named(SWITCH_NETNS.to_owned());

        cable(end(&Netns::Site, AIRLOCK_INTERFACE), end(&switch_netns, AIRLOCK_PORT)).await?;
        Netns::Site.address(AIRLOCK_INTERFACE, topology.airlock).await?;
        plug(AIRLOCK_PORT, topology.airlock_vlan, false)?;

        let mut projects = BTreeMap::new();
        for network in &topology.networks {
            let stations = ProjectStations::build(network, &switch_netns).await?;
            for port in [gateway_port(network), peer_port(network)] {
                plug(&port, network.vlan, false)?;
            }
            projects.insert(network.project.to_string(), stations);
        }

        let tpm_authority = TpmAuthority::create(&folder.join("tpm-ca"))?;
        let mut nodes = BTreeMap::new();
        for node in &topology.nodes {
            let cable = NodeCable::lay(node, &switch_netns).await?;
            plug(&cable.port, topology.quarantine_vlan, true)?;
            let built = SiteNode::build(node, cable, folder, &tpm_authority, events, &shutdown).await?;
            nodes.insert(node.name.to_string(), built);
        }
        let folder = folder.to_owned();
        Ok(Self { topology, folder, switch, tpm_authority, nodes, projects, _shutdown: shutdown.drop_guard() })
    }

    /// A node by name.
    ///
    /// # Errors
    /// There is none.
    pub fn node(&self, name: &str) -> Result<&SiteNode> {
        self.topology.node(name)?;
        self.nodes.get(name).ok_or_else(|| LabError::unexpected(format!("finding node {name}"), "it was not built"))
    }

    /// The stations of a project.
    ///
    /// # Errors
    /// The project has no network in the topology.
    pub fn project(&self, name: &str) -> Result<&ProjectStations> {
        self.projects.get(name).ok_or_else(|| LabError::Topology(format!("project `{name}` has no network")))
    }
}

impl SiteNode {
    async fn build(
        node: &NodeTopology,
        cable: NodeCable,
        folder: &Path,
        tpm_authority: &TpmAuthority,
        log: &EventLog,
        shutdown: &CancellationToken,
    ) -> Result<Self> {
        let name = node.name.as_str();
        let folder = folder.join("nodes").join(name);
        let tpm = tpm_authority.manufacture(&folder.join("tpm")).await?;
        let spec = MachineSpec {
            name: name.to_owned(),
            memory_mib: node.memory_mib,
            mac: node.mac,
            tap: cable.tap,
            netns: cable.machine,
            folder: folder.clone(),
            execution: if node.soft { Execution::Soft } else { Execution::Emulated },
        };
        let (events, power_events) = mpsc::unbounded_channel();
        let machine = Arc::new(Machine::assemble(spec, tpm.clone(), events)?);
        let (folder, shutdown) = (folder.join("bmc"), shutdown.child_token());
        let bmc = Bmc::start(name, Arc::clone(&machine), power_events, &folder, log.clone(), shutdown).await?;
        Ok(Self { topology: node.clone(), port: cable.port, machine, tpm, bmc, segment: cable.segment })
    }
}

impl ProjectStations {
    async fn build(network: &NetworkTopology, switch: &Netns) -> Result<Self> {
        let project = &network.project;
        let gateway = Netns::create(&format!("gw-{project}")).await?;
        cable(end(&gateway, GATEWAY_INTERFACE), end(switch, &gateway_port(network))).await?;
        gateway.address(GATEWAY_INTERFACE, network.gateway).await?;
        let peer = Netns::create(&format!("peer-{project}")).await?;
        cable(end(&peer, PEER_INTERFACE), end(switch, &peer_port(network))).await?;
        peer.address(PEER_INTERFACE, peer_address(network)).await?;
        Ok(Self { network: network.clone(), gateway, peer })
    }
}

async fn start_switch(folder: &Path) -> Result<OpenVswitch> {
    let doing = "starting Open vSwitch";
    Netns::create(SWITCH_NETNS).await?;
    let folder = folder.join("switch");
    // A switch keeps no state between runs of the lab; the services would find ports that no longer exist.
    let _was_there = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).map_err(LabError::io(format!("making {}", folder.display())))?;
    let switch =
        OpenVswitch::start_in(&folder, &Namespace::Named(SWITCH_NETNS.to_owned())).map_err(LabError::service(doing))?;
    switch.add_bridge(BRIDGE).map_err(LabError::service(doing))?;
    Ok(switch)
}

/// The cable from a node to the switch.
struct NodeCable {
    /// The switch port's name.
    port: String,
    /// The tap at the machine's end.
    tap: String,
    /// Where that tap is.
    machine: Netns,
    /// The cable's own namespace, if there is a probe station on it.
    segment: Option<Netns>,
}

impl NodeCable {
    async fn lay(node: &NodeTopology, switch: &Netns) -> Result<Self> {
        let name = &node.name;
        let port = format!("{name}-eth0");
        if !node.probe {
            // The tap itself is the switch's port.
            switch.tap(&port).await?;
            return Ok(Self { tap: port.clone(), port, machine: switch.clone(), segment: None });
        }
        let segment = Netns::create(&format!("seg-{name}")).await?;
        segment.ip(&["link", "add", "hub", "type", "bridge", "stp_state", "0", "forward_delay", "0"]).await?;
        segment.tap(SEGMENT_TAP).await?;
        cable(end(&segment, "uplink"), end(switch, &port)).await?;
        // The probe's far end stays outside the bridge: a station beside the node.
        cable(end(&segment, PROBE_INTERFACE), end(&segment, "probe-hub")).await?;
        for interface in [SEGMENT_TAP, "uplink", "probe-hub"] {
            segment.ip(&["link", "set", interface, "master", "hub"]).await?;
        }
        segment.ip(&["link", "set", "hub", "up"]).await?;
        Ok(Self { port, tap: SEGMENT_TAP.to_owned(), machine: segment.clone(), segment: Some(segment) })
    }
}

fn end<'a>(netns: &'a Netns, interface: &'a str) -> CableEnd<'a> {
    CableEnd { netns, interface }
}

fn gateway_port(network: &NetworkTopology) -> String {
    format!("{}-gw", network.project)
}

fn peer_port(network: &NetworkTopology) -> String {
    format!("{}-peer", network.project)
}

/// The peer's address: the last but one of the network, away from gateways and from what nodes are given.
fn peer_address(network: &NetworkTopology) -> Ipv4Net {
    let last = Ipv4Addr::from(u32::from(network.gateway.broadcast()).saturating_sub(2));
    Ipv4Net::new(last, network.gateway.prefix_len()).unwrap_or(network.gateway)
}

/// The bridge that all ports are on.
pub const BRIDGE: &str = "br0";
/// The site's interface on the airlock network.
pub const AIRLOCK_INTERFACE: &str = "airlock0";
/// The gateway's interface on its project's network.
pub const GATEWAY_INTERFACE: &str = "gw0";
/// The peer's interface on its project's network.
pub const PEER_INTERFACE: &str = "peer0";
/// The probe station on a node's cable.
pub const PROBE_INTERFACE: &str = "probe0";
const SEGMENT_TAP: &str = "tap0";
const SWITCH_NETNS: &str = "switch";
const AIRLOCK_PORT: &str = "airlock";
