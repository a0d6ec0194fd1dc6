//! What does this node boot next? One pure function of its record and of the program that asks.

use crate::dhcp::ClientKind;
use assay_wire::id::{BootId, NodeId};
use assay_wire::isolation::{BootRecord, NodeState};
use std::net::Ipv4Addr;

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootPlan {
    /// No answer at all, but a log entry.
    Nothing(NotServed),
    /// The loader (iPXE), by TFTP: steps 1 and 2 under PXE firmware.
    LoaderByTftp(NodeBoot),
    /// The loader (iPXE), by HTTP: steps 1 and 2 under firmware that boots by HTTP.
    LoaderByHttp(NodeBoot),
    /// The iPXE script: step 3.
    Script(NodeBoot),
    /// An address and the agent's settings: before step 4.
    AgentSettings(NodeBoot),
}

/// A node in the airlock, and which boot this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeBoot {
    /// The node.
    pub node: NodeId,
    /// Its boot.
    pub boot: BootId,
}

/// Why a machine gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum NotServed {
    /// No record: nobody's node.
    #[error("no node has this MAC address")]
    UnknownMac,
    /// A known node that has no business booting from here.
    #[error("the node is {0}, not in the airlock")]
    NotInAirlock(NodeState),
    /// In the airlock but between two boots.
    #[error("the node is in the airlock without a boot on record")]
    NoBoot,
    /// BIOS, another architecture, or an operating system.
    #[error("the client is neither UEFI x86-64 firmware, iPXE nor the agent")]
    Client,
    /// Its reservation was made for another network: this one's configuration is wrong.
    #[error("its reserved address {0} is not in this network")]
    OutsideNetwork(Ipv4Addr),
}

/// Decides. Whoever is not a node in the airlock, in a boot that isolation began, gets nothing.
#[must_use]
pub fn boot_plan(record: Option<&BootRecord>, client: ClientKind) -> BootPlan {
    let Some(record) = record else {
        return BootPlan::Nothing(NotServed::UnknownMac);
    };
    match record.state {
        NodeState::Airlock => {}
        NodeState::Free | NodeState::Allocated | NodeState::Rejected | NodeState::Cleaning => {
            return BootPlan::Nothing(NotServed::NotInAirlock(record.state));
        }
    }
    let Some(boot) = record.boot else {
        return BootPlan::Nothing(NotServed::NoBoot);
    };
    let boot = NodeBoot { node: record.node.clone(), boot };
    match client {
        ClientKind::UefiPxe => BootPlan::LoaderByTftp(boot),
        ClientKind::UefiHttp => BootPlan::LoaderByHttp(boot),
        ClientKind::Ipxe => BootPlan::Script(boot),
        ClientKind::Agent => BootPlan::AgentSettings(boot),
        ClientKind::Other => BootPlan::Nothing(NotServed::Client),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: NodeState, boot: Option<BootId>) -> BootRecord {
        BootRecord { node: "n1".parse().unwrap(), mac: "52:54:00:00:00:01".parse().unwrap(), state, boot }
    }

    #[test]
    fn each_program_of_a_node_in_the_airlock_gets_the_next_one() {
        let id = BootId::random();
        let record = record(NodeState::Airlock, Some(id));
        let boot = NodeBoot { node: record.node.clone(), boot: id };
        let plan = |client| boot_plan(Some(&record), client);
        assert_eq!(plan(ClientKind::UefiPxe), BootPlan::LoaderByTftp(boot.clone()));
        assert_eq!(plan(ClientKind::UefiHttp), BootPlan::LoaderByHttp(boot.clone()));
        assert_eq!(plan(ClientKind::Ipxe), BootPlan::Script(boot.clone()));
        assert_eq!(plan(ClientKind::Agent), BootPlan::AgentSettings(boot));
        assert_eq!(plan(ClientKind::Other), BootPlan::Nothing(NotServed::Client));
    }

    #[test]
    fn everybody_else_gets_nothing() {
        for client in ClientKind::ALL {
            assert_eq!(boot_plan(None, client), BootPlan::Nothing(NotServed::UnknownMac));
            let between = record(NodeState::Airlock, None);
            assert_eq!(boot_plan(Some(&between), client), BootPlan::Nothing(NotServed::NoBoot));
            for state in NodeState::ALL.into_iter().filter(|state| *state != NodeState::Airlock) {
                let elsewhere = record(state, Some(BootId::random()));
                assert_eq!(boot_plan(Some(&elsewhere), client), BootPlan::Nothing(NotServed::NotInAirlock(state)));
            }
        }
    }
}
