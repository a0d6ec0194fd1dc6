//! The lab's topology: which nodes there are, what they are plugged into, which networks the projects have.

use crate::error::{LabError, Result};
use assay_wire::id::{NetworkId, NodeId, ProjectId};
use assay_wire::net::{MacAddr, VlanId};
use ipnet::Ipv4Net;
use serde::Deserialize;
use std::collections::HashSet;
use std::net::SocketAddrV4;
use std::path::Path;

/// A topology that can be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// The VLAN that reaches nothing.
    pub quarantine_vlan: VlanId,
    /// The VLAN that reaches netboot and the verifier.
    pub airlock_vlan: VlanId,
    /// The site's address on the airlock network, and its prefix.
    pub airlock: Ipv4Net,
    /// The nodes.
    pub nodes: Vec<NodeTopology>,
    /// The projects' networks; each project has one, or shares one.
    pub networks: Vec<NetworkTopology>,
}

/// A node and its cable.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeTopology {
    /// Its name; also the stem of its interfaces' names, so at most 6 characters.
    pub name: NodeId,
    /// Its NIC's address.
    pub mac: MacAddr,
    /// Memory in MiB.
    #[serde(default = "default_memory")]
    pub memory_mib: u32,
    /// Whether a second station sits on the node's cable, to send probe frames from where the node is.
    #[serde(default)]
    pub probe: bool,
    /// Whether there is only a TPM and a cable, and a scenario acts for the node.
    #[serde(default)]
    pub soft: bool,
    /// The project that scenarios lease it to; without one, the first network's.
    #[serde(default)]
    pub project: Option<ProjectId>,
}

/// A provisioning network and its gateway.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkTopology {
    /// The network's name.
    pub name: NetworkId,
    /// Its project; also the stem of interface names, so at most 6 characters.
    pub project: ProjectId,
    /// Further projects that use the network and its gateway.
    #[serde(default)]
    pub shared_with: Vec<ProjectId>,
    /// Its VLAN.
    pub vlan: VlanId,
    /// The gateway's address, and its prefix.
    pub gateway: Ipv4Net,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    quarantine_vlan: VlanId,
    airlock_vlan: VlanId,
    airlock: Ipv4Net,
    #[serde(default)]
    nodes: Vec<NodeTopology>,
    #[serde(default)]
    networks: Vec<NetworkTopology>,
}

impl Topology {
    /// Reads a topology file.
    ///
    /// # Errors
    /// Names the file, and what in it cannot be.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(LabError::io(format!("reading the topology {}", path.display())))?;
        Self::parse(&text)
    }

    /// The built-in topology: two nodes, one project.
    #[must_use]
    pub fn built_in() -> Self {
        Self::own(BUILT_IN)
    }

    /// The built-in topology of scenarios that need no firmware.
    #[must_use]
    pub fn soft() -> Self {
        Self::own(SOFT)
    }

    /// One tenant owns all of it.
    #[must_use]
    pub fn flat() -> Self {
        Self::own(FLAT)
    }

    /// Tenants that trust each other share a network and its gateway.
    #[must_use]
    pub fn shared() -> Self {
        Self::own(SHARED)
    }

    /// A network and a gateway for each project.
    #[must_use]
    pub fn private() -> Self {
        Self::own(PRIVATE)
    }

    #[expect(clippy::expect_used, reason = "part of this program, and tested")]
    fn own(text: &str) -> Self {
        Self::parse(text).expect("the built-in topology is valid")
    }

    /// Reads a topology from TOML.
    ///
    /// # Errors
    /// Says what cannot be.
    pub fn parse(text: &str) -> Result<Self> {
        let file: File = toml::from_str(text).map_err(|error| LabError::Topology(error.to_string()))?;
        let topology = Self {
            quarantine_vlan: file.quarantine_vlan,
            airlock_vlan: file.airlock_vlan,
            airlock: file.airlock,
            nodes: file.nodes,
            networks: file.networks,
        };
        topology.check()?;
        Ok(topology)
    }

    /// Finds a node.
    ///
    /// # Errors
    /// There is none of that name; the error lists those that there are.
    pub fn node(&self, name: &str) -> Result<&NodeTopology> {
        self.nodes.iter().find(|node| node.name.as_str() == name).ok_or_else(|| {
            let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
            LabError::Topology(format!("there is no node `{name}`; there are {}", names.join(", ")))
        })
    }

    /// The project and the network that scenarios lease a node to.
    ///
    /// # Errors
    /// There is no such node, or no network for it.
    pub fn place(&self, node: &str) -> Result<(&ProjectId, &NetworkTopology)> {
        let none = || LabError::Topology(format!("there is no network to lease node `{node}` to"));
        let wanted = self.node(node)?.project.as_ref();
        let project = wanted.or_else(|| self.networks.first().map(|network| &network.project)).ok_or_else(none)?;
        let network = self.networks.iter().find(|network| network.projects().any(|p| p == project));
        Ok((project, network.ok_or_else(none)?))
    }

    fn check(&self) -> Result<()> {
        let vlans = [self.quarantine_vlan, self.airlock_vlan].into_iter().chain(self.networks.iter().map(|n| n.vlan));
        distinct("VLAN", vlans)?;
        distinct("MAC address", self.nodes.iter().map(|n| n.mac))?;
        distinct("node", self.nodes.iter().map(|n| n.name.as_str()))?;
        let projects = self.networks.iter().flat_map(NetworkTopology::projects);
        distinct("project with a network", projects.map(ProjectId::as_str))?;
        let stems = self.nodes.iter().map(|n| n.name.as_str()).chain(self.networks.iter().map(|n| n.project.as_str()));
        // An interface's name has at most 15 characters, and ours add up to nine to the stem.
        if let Some(long) = stems.into_iter().find(|stem| stem.len() > 6) {
            return Err(LabError::Topology(format!("`{long}` is too long a name for the lab: at most 6 characters")));
        }
        if let Some(node) = self.nodes.iter().find(|n| n.memory_mib < MIN_MEMORY_MIB) {
            let (name, memory) = (&node.name, node.memory_mib);
            return Err(LabError::Topology(format!(
                "node {name} has {memory} MiB of memory: firmware and ramdisk need {MIN_MEMORY_MIB}"
            )));
        }
        Ok(())
    }
}

impl NetworkTopology {
    /// Its gateway's iSCSI portal.
    #[must_use]
    pub fn portal(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.gateway.addr(), 3260)
    }

    /// All projects that use it, its own first.
    pub fn projects(&self) -> impl Iterator<Item = &ProjectId> {
        std::iter::once(&self.project).chain(&self.shared_with)
    }
}

fn distinct<T: std::hash::Hash + Eq + std::fmt::Display + Copy>(
    what: &str,
    values: impl Iterator<Item = T>,
) -> Result<()> {
    let mut seen = HashSet::new();
    for value in values {
        if !seen.insert(value) {
            return Err(LabError::Topology(format!("{what} {value} is used twice")));
        }
    }
    Ok(())
}

fn default_memory() -> u32 {
    1024
}

const MIN_MEMORY_MIB: u32 = 512;
const BUILT_IN: &str = include_str!("../lab.toml");
const SOFT: &str = include_str!("../soft.toml");
const FLAT: &str = include_str!("../flat.toml");
const SHARED: &str = include_str!("../shared.toml");
const PRIVATE: &str = include_str!("../private.toml");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_topology_has_two_nodes_and_a_project() {
        let topology = Topology::built_in();
        assert_eq!(topology.nodes.len(), 2);
        assert_eq!(topology.networks[0].vlan.get(), 120);
        assert!(topology.node("n1").is_ok());
        assert!(Topology::soft().nodes.iter().all(|node| node.soft && node.probe));
        assert!(topology.node("n9").unwrap_err().to_string().contains("n1, n2"));
    }

    #[test]
    fn nodes_have_their_places_in_each_deployment() {
        let places = |topology: &Topology| {
            ["s1", "s2"].map(|node| {
                let (project, network) = topology.place(node).unwrap();
                (project.to_string(), network.name.to_string())
            })
        };
        let place = |project: &str, network: &str| (project.to_owned(), network.to_owned());
        assert_eq!(places(&Topology::flat()), [place("alpha", "alpha-prov"), place("alpha", "alpha-prov")]);
        assert_eq!(places(&Topology::shared()), [place("alpha", "common"), place("beta", "common")]);
        assert_eq!(places(&Topology::private()), [place("alpha", "alpha-prov"), place("beta", "beta-prov")]);
        let mut lost = Topology::private();
        lost.networks.pop();
        assert!(lost.place("s2").unwrap_err().to_string().contains("no network to lease node `s2` to"));
        let twice = PRIVATE.replace("vlan = 120", "vlan = 120\nshared_with = [\"beta\"]");
        let error = Topology::parse(&twice).unwrap_err().to_string();
        assert!(error.contains("project with a network beta is used twice"), "{error}");
    }

    #[test]
    fn impossible_topologies_are_refused_by_name() {
        let base = BUILT_IN;
        for (from, to, expected) in [
            ("vlan = 120", "vlan = 998", "VLAN 998 is used twice"),
            ("name = \"n2\"", "name = \"n1\"", "node n1 is used twice"),
            ("52:54:00:a5:5a:02", "52:54:00:a5:5a:01", "MAC address 52:54:00:a5:5a:01 is used twice"),
            ("name = \"n2\"", "name = \"overlong\"", "too long"),
            ("name = \"n2\"", "name = \"n2\"\nmemory_mib = 64", "has 64 MiB"),
            ("name = \"n2\"", "name = \"n2\"\ncolour = 1", "colour"),
            ("vlan = 120", "vlan = 4095", "4095"),
        ] {
            assert!(base.contains(from), "{from}");
            let error = Topology::parse(&base.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(expected), "{from} -> {to}: {error}");
        }
    }
}
