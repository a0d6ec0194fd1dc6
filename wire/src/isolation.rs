//! Isolation's API: projects, nodes, networks, switches, ports, leases, admissions. The words of design section 2.

use crate::id::{AdmissionId, BootId, LeaseId, NetworkId, NicId, NodeId, ProjectId, SwitchId};
use crate::net::{MacAddr, VlanId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// Where a node stands in its life cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// Nobody's; measured clean; may be leased.
    Free,
    /// Leased, on the airlock network, booting or being appraised.
    Airlock,
    /// Admitted: on its tenant's network, with its tenant's disk.
    Allocated,
    /// Refused or fallen out: on the quarantine network until an operator clears it.
    Rejected,
    /// Its lease ended: powered off, port closed, being emptied.
    Cleaning,
}

impl NodeState {
    /// All states.
    pub const ALL: [Self; 5] = [Self::Free, Self::Airlock, Self::Allocated, Self::Rejected, Self::Cleaning];

    /// The state's stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Airlock => "airlock",
            Self::Allocated => "allocated",
            Self::Rejected => "rejected",
            Self::Cleaning => "cleaning",
        }
    }
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for NodeState {
    type Err = String;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|s| s.as_str() == value).ok_or_else(|| format!("`{value}` is no node state"))
    }
}

/// What a switch port is for. There is no "none": a port without configuration is a trunk on most switches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "intent", rename_all = "kebab-case")]
pub enum PortIntent {
    /// Reaches nothing: the quarantine VLAN, protected from its neighbours.
    Quarantine,
    /// Reaches netboot and the verifier only: the airlock VLAN, protected from its neighbours.
    Airlock,
    /// An access port of one network.
    Access {
        /// The network's VLAN.
        vlan: VlanId,
    },
}

/// A project to create: `POST /v1/projects`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Project {
    /// Its name.
    pub name: ProjectId,
    /// The verifiers whose attestation results admit nodes to this project: Ed25519 public keys, hexadecimal.
    /// An empty list admits nobody.
    pub verifier_keys: Vec<String>,
}

/// A network: `POST /v1/networks`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its name.
    pub name: NetworkId,
    /// The project that owns it.
    pub project: ProjectId,
    /// Its VLAN; not the site's quarantine or airlock VLAN, nor another network's.
    pub vlan: VlanId,
    /// Projects beside its owner whose nodes may join it. Nodes on one network are not kept apart.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub shared_with: BTreeSet<ProjectId>,
}

impl Network {
    /// Whether nodes of `project` may join it.
    #[must_use]
    pub fn is_for(&self, project: &ProjectId) -> bool {
        self.project == *project || self.shared_with.contains(project)
    }
}

/// A switch: `POST /v1/switches`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// Its name.
    pub name: SwitchId,
    /// How it is driven.
    pub driver: SwitchDriver,
}

/// How a switch is driven.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum SwitchDriver {
    /// Open vSwitch, by OVSDB (RFC 7047) and `ovs-vswitchd`'s control socket.
    OpenVswitch {
        /// Path of ovsdb-server's Unix socket.
        ovsdb_socket: String,
        /// Path of ovs-vswitchd's unixctl socket.
        control_socket: String,
        /// The bridge whose ports are driven.
        bridge: String,
    },
}

/// A node: `POST /v1/nodes`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name.
    pub name: NodeId,
    /// Its management controller.
    pub bmc: Bmc,
    /// Its NICs; the first boots.
    pub nics: Vec<Nic>,
}

/// A node's management controller.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Bmc {
    /// DMTF Redfish (DSP0266).
    Redfish {
        /// The system's resource, like `https://10.1.0.5/redfish/v1/Systems/1`.
        system: String,
        /// User name for basic authentication.
        username: String,
        /// Its password. Write-only: never in an answer.
        password: String,
        /// PEM of the CA that signed the BMC's certificate; without it the system's trust store is used.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ca_pem: Option<String>,
    },
}

impl fmt::Debug for Bmc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Redfish { system, username, .. } => f
                .debug_struct("Redfish")
                .field("system", system)
                .field("username", username)
                .field("password", &"<redacted>")
                .finish_non_exhaustive(),
        }
    }
}

/// A NIC and the switch port that its cable ends in.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Its name within the node.
    pub name: NicId,
    /// Its MAC address.
    pub mac: MacAddr,
    /// The switch.
    pub switch: SwitchId,
    /// The port's name on that switch, like `n1-eth0`.
    pub port: String,
}

/// A node as it is: `GET /v1/nodes`, `GET /v1/nodes/{name}`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NodeStatus {
    /// Its name.
    pub name: NodeId,
    /// Where it stands.
    pub state: NodeState,
    /// Why it is there, in words, for people.
    pub reason: String,
    /// The lease it is under.
    pub lease: Option<NodeLease>,
    /// Its current boot through the airlock.
    pub boot: Option<BootId>,
    /// Its NICs.
    pub nics: Vec<NicStatus>,
    /// When it entered this state: milliseconds since the Unix epoch.
    pub since_ms: i64,
}

/// A NIC and what its port is, desired and read back.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NicStatus {
    /// The NIC.
    #[serde(flatten)]
    pub nic: Nic,
    /// What the port should be.
    pub desired: PortIntent,
    /// What the switch last said that it is; none if it never answered, or said something that is no intent.
    pub observed: Option<PortIntent>,
}

/// A request for a lease: `POST /v1/leases`. The node must be Free; it is power-cycled into the airlock.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseRequest {
    /// Chosen by the client, so that asking twice is asking once, and so that imaging can have its disk first.
    pub id: LeaseId,
    /// The lessee.
    pub project: ProjectId,
    /// The node.
    pub node: NodeId,
    /// The network that the node joins when it is admitted; the project's own, or one that is shared with it.
    pub network: NetworkId,
}

/// A node lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NodeLease {
    /// Its id.
    pub id: LeaseId,
    /// The lessee.
    pub project: ProjectId,
    /// The node.
    pub node: NodeId,
    /// The network that the node joins when it is admitted.
    pub network: NetworkId,
}

/// What netboot must know of a node: `GET /v1/boot-records`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BootRecord {
    /// The node.
    pub node: NodeId,
    /// The MAC address of the NIC that boots.
    pub mac: MacAddr,
    /// Where the node stands.
    pub state: NodeState,
    /// Its current boot, while in the airlock.
    pub boot: Option<BootId>,
}

/// All boot records, with the revision that they stand at.
/// `GET /v1/boot-records?after=<revision>` answers when the revision has moved on, or after 25 s with what is.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BootRecords {
    /// Grows with every change.
    pub revision: u64,
    /// One record a bootable NIC.
    pub records: Vec<BootRecord>,
}

/// What a verifier must know before it appraises a node: `GET /v1/nodes/{name}/airlock`.
/// Refused (409 `not-in-airlock`) unless the node is in the airlock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AirlockContext {
    /// The lease.
    pub lease: LeaseId,
    /// The lessee.
    pub project: ProjectId,
    /// This boot.
    pub boot: BootId,
    /// Resets of the machine so far that isolation ordered or its BMC reported: a TPM that had more was reset by itself.
    #[serde(default)]
    pub machine_resets: Option<u64>,
}

/// `POST /v1/admissions`: a signed attestation result asks for the node's port. Idempotent by the result's id.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdmissionRequest {
    /// The result, as [`crate::result`] describes it.
    pub result: String,
    /// Results of other verifiers about the same node, AK, lease and boot, where the site demands that several agree.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supporting: Vec<String>,
}

/// `POST /v1/admission-renewals` at isolation, `POST /v1/export-renewals` at imaging: fresh results about nodes that
/// are admitted. Each is decided by itself; what is not renewed ends at its expiry.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenewalRequest {
    /// At most [`MAX_RENEWALS`].
    pub renewals: Vec<Renewal>,
}

/// The most renewals in one request.
pub const MAX_RENEWALS: usize = 1_000;

/// The longest request with renewals: a thousand results of 4 KiB, each with three that support it.
pub const MAX_RENEWAL_BYTES: usize = 16 << 20;

/// One admission, renewed.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Renewal {
    /// The admission.
    pub admission: AdmissionId,
    /// The result whose claim `assay.admission` names it.
    pub result: String,
    /// Results of other verifiers, as in [`AdmissionRequest::supporting`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supporting: Vec<String>,
}

/// The answer to a [`RenewalRequest`]: one outcome for each renewal, in their order.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RenewalAnswer {
    /// The outcomes.
    pub outcomes: Vec<RenewalOutcome>,
}

/// What became of one renewal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum RenewalOutcome {
    /// It stands longer. Never shorter than before.
    Renewed {
        /// Until then: milliseconds since the Unix epoch.
        expires_at_ms: i64,
    },
    /// The result was not accepted, or the admission has ended: a renewal never brings one back.
    Refused {
        /// Why, in words.
        reason: String,
    },
}

/// All admissions that stand, and those that ended within the last hour: `GET /v1/admissions`.
/// With `?after=<revision>` it answers when the revision has moved on, or after 25 s with what is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Admissions {
    /// Moves on with every admission that begins or ends; not with renewals, which change when one ends by itself.
    pub revision: u64,
    /// The newest first.
    pub admissions: Vec<Admission>,
}

/// An admission on record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Admission {
    /// The result's id.
    pub id: AdmissionId,
    /// The node admitted.
    pub node: NodeId,
    /// For this lease.
    pub lease: LeaseId,
    /// For this boot.
    pub boot: BootId,
    /// Until then: milliseconds since the Unix epoch.
    pub expires_at_ms: i64,
    /// Whether it was ended before its expiry, and why.
    pub revoked: Option<String>,
}

/// `POST /v1/nodes/{name}/reject`: a verifier reports a bad verdict; the port goes to quarantine. A project's own may
/// say so of the nodes under that project's leases.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RejectRequest {
    /// The boot that was appraised; a report on another boot changes nothing.
    pub boot: BootId,
    /// Why, in words.
    pub reason: String,
}

/// `DELETE /v1/admissions/{id}` carries why.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RevokeRequest {
    /// Why, in words.
    pub reason: String,
}
