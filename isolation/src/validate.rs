//! Whether a new object may be registered. Pure: it and the inventory in, a reason in words out.

use crate::store::Inventory;
use crate::switch::SiteVlans;
use assay_wire::isolation::{Network, Node, Project, Switch, SwitchDriver};
use assay_wire::result::VerifierKey;
use std::collections::BTreeSet;

/// Nodes with more NICs than this do not exist.
const MAX_NICS: usize = 16;
/// More verifiers than any project has.
const MAX_VERIFIER_KEYS: usize = 64;

/// Why an object is not registered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(String);

/// Every key must be one.
///
/// # Errors
/// In words.
pub fn project(project: &Project) -> Result<(), Invalid> {
    if project.verifier_keys.len() > MAX_VERIFIER_KEYS {
        return Err(Invalid(format!("project {} has more than {MAX_VERIFIER_KEYS} verifier keys", project.name)));
    }
    let mut seen = BTreeSet::new();
    for key in &project.verifier_keys {
        key.parse::<VerifierKey>().map_err(|e| Invalid(format!("project {}: {e}", project.name)))?;
        if !seen.insert(key.to_lowercase()) {
            return Err(Invalid(format!("project {} has the verifier key {key} twice", project.name)));
        }
    }
    Ok(())
}

/// Its projects exist, and its VLAN is nobody else's.
///
/// # Errors
/// In words.
pub fn network(network: &Network, inventory: &Inventory, site: SiteVlans) -> Result<(), Invalid> {
    let Network { name, project, vlan, shared_with } = network;
    for project in std::iter::once(project).chain(shared_with) {
        if !inventory.projects.iter().any(|p| p.name == *project) {
            return Err(Invalid(format!("network {name}: there is no project {project}")));
        }
    }
    if shared_with.contains(project) {
        return Err(Invalid(format!("network {name}: its owner, project {project}, need not share it with itself")));
    }
    if *vlan == site.quarantine || *vlan == site.airlock {
        return Err(Invalid(format!("network {name}: VLAN {vlan} is the site's quarantine or airlock VLAN")));
    }
    match inventory.networks.iter().find(|n| n.vlan == *vlan && n.name != *name) {
        Some(other) => Err(Invalid(format!("network {name}: VLAN {vlan} is that of network {}", other.name))),
        None => Ok(()),
    }
}

/// Its sockets are absolute paths and it names a bridge.
///
/// # Errors
/// In words.
pub fn switch(switch: &Switch) -> Result<(), Invalid> {
    let SwitchDriver::OpenVswitch { ovsdb_socket, control_socket, bridge } = &switch.driver;
    for socket in [ovsdb_socket, control_socket] {
        if !socket.starts_with('/') {
            return Err(Invalid(format!("switch {}: the socket `{socket}` is no absolute path", switch.name)));
        }
    }
    match is_port_name(bridge) {
        true => Ok(()),
        false => Err(Invalid(format!("switch {}: `{bridge}` is no bridge name", switch.name))),
    }
}

/// It has NICs with names and addresses of their own, on switches that exist.
///
/// # Errors
/// In words.
pub fn node(node: &Node, inventory: &Inventory) -> Result<(), Invalid> {
    let Node { name, nics, bmc: _ } = node;
    if nics.is_empty() || nics.len() > MAX_NICS {
        return Err(Invalid(format!("node {name} must have 1 to {MAX_NICS} NICs; the first one boots")));
    }
    let (mut names, mut addresses, mut ports) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for nic in nics {
        if !inventory.switches.iter().any(|s| s.name == nic.switch) {
            return Err(Invalid(format!("node {name}, NIC {}: there is no switch {}", nic.name, nic.switch)));
        }
        if !is_port_name(&nic.port) {
            return Err(Invalid(format!("node {name}, NIC {}: `{}` is no port name", nic.name, nic.port)));
        }
        if !names.insert(&nic.name) || !addresses.insert(nic.mac) || !ports.insert((&nic.switch, &nic.port)) {
            return Err(Invalid(format!("node {name}: NIC {} repeats a name, address or port", nic.name)));
        }
    }
    Ok(())
}

/// Printable ASCII without spaces: every switch's port names are.
fn is_port_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;
    use assay_wire::isolation::{Bmc, Nic};
    use assay_wire::net::VlanId;

    fn vlan(id: u32) -> VlanId {
        VlanId::try_from(id).unwrap()
    }

    fn inventory() -> Inventory {
        let driver = SwitchDriver::OpenVswitch {
            ovsdb_socket: "/run/db".into(),
            control_socket: "/run/ctl".into(),
            bridge: "br0".into(),
        };
        Inventory {
            projects: ["alpha", "gamma"]
                .map(|name| Project { name: name.parse().unwrap(), verifier_keys: vec![] })
                .into(),
            networks: vec![Network {
                name: "net-a".parse().unwrap(),
                project: "alpha".parse().unwrap(),
                vlan: vlan(120),
                shared_with: BTreeSet::new(),
            }],
            switches: vec![Switch { name: "sw".parse().unwrap(), driver }],
        }
    }

    #[test]
    fn a_network_has_a_vlan_of_its_own() {
        let site = SiteVlans { quarantine: vlan(998), airlock: vlan(999) };
        let shared = |id, project: &str, others: &[&str]| {
            let shared_with = others.iter().map(|other| other.parse().unwrap()).collect();
            let (name, project) = ("net-b".parse().unwrap(), project.parse().unwrap());
            super::network(&Network { name, project, vlan: vlan(id), shared_with }, &inventory(), site)
        };
        let with = |id, project: &str| shared(id, project, &[]);
        assert_eq!(with(121, "alpha"), Ok(()));
        assert_eq!(shared(121, "alpha", &["gamma"]), Ok(()));
        for (others, word) in [(["gamma", "beta"], "beta"), (["gamma", "alpha"], "itself")] {
            assert!(shared(121, "alpha", &others).unwrap_err().to_string().contains(word));
        }
        for (id, project, word) in
            [(998, "alpha", "quarantine"), (999, "alpha", "airlock"), (120, "alpha", "net-a"), (121, "beta", "beta")]
        {
            assert!(with(id, project).unwrap_err().to_string().contains(word));
        }
    }

    #[test]
    fn a_node_has_nics_of_its_own_on_switches_that_exist() {
        let nic = |name: &str, mac: &str, switch: &str, port: &str| Nic {
            name: name.parse().unwrap(),
            mac: mac.parse().unwrap(),
            switch: switch.parse().unwrap(),
            port: port.into(),
        };
        let with = |nics| {
            let bmc =
                Bmc::Redfish { system: String::new(), username: String::new(), password: String::new(), ca_pem: None };
            node(&Node { name: "n1".parse().unwrap(), bmc, nics }, &inventory())
        };
        let good = || nic("eth0", "52:54:00:00:00:01", "sw", "p1");
        assert_eq!(with(vec![good()]), Ok(()));
        assert!(with(vec![]).is_err());
        assert!(with(vec![nic("eth0", "52:54:00:00:00:01", "other", "p1")]).is_err());
        assert!(with(vec![nic("eth0", "52:54:00:00:00:01", "sw", "p 1")]).is_err());
        for repeated in [
            nic("eth0", "52:54:00:00:00:02", "sw", "p2"),
            nic("eth1", "52:54:00:00:00:01", "sw", "p2"),
            nic("eth1", "52:54:00:00:00:02", "sw", "p1"),
        ] {
            assert!(with(vec![good(), repeated]).is_err());
        }
    }

    #[test]
    fn a_project_has_keys_that_are_keys() {
        let with = |keys: &[&str]| {
            project(&Project {
                name: "alpha".parse().unwrap(),
                verifier_keys: keys.iter().map(|&k| k.to_owned()).collect(),
            })
        };
        let key = "ab".repeat(32);
        assert_eq!(with(&[]), Ok(()));
        assert_eq!(with(&[&key]), Ok(()));
        assert!(with(&[&key, &key.to_uppercase()]).is_err());
        assert!(with(&["ab"]).is_err());
    }
}
