//! What imaging and its gateways say to each other over the control socket.
//!
//! ```text
//! PUT    /v1/exports/{admission}   ExportOrder -> 204     idempotent; 409 if another order stands under that id, but that its
//!                                                         disk may have been moved: it goes on there, paused or not
//! DELETE /v1/exports/{admission}               -> 204     sessions are severed when it answers; idempotent
//! GET    /v1/exports                           -> GatewayStatus
//! POST   /v1/exports/{admission}/pause         -> 204     its disk's files are closed, commands wait; 404 if nobody has them open
//! POST   /v1/exports/{admission}/resume        -> 204     it goes on with the disk as it is then; by itself after 3 s
//! POST   /v1/renewals              {admission: expires_at_ms, …} -> 204    never sooner than before; what is not served is not put up
//! ```

use crate::store::DiskLocation;
use crate::worker::message::Confinement;
use assay_wire::id::{AdmissionId, DiskId};
use assay_wire::imaging::{ChapAlgorithms, Latency};
use assay_wire::net::{Iqn, MacAddr};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;

/// One export that the gateway shall serve until it is told otherwise or the export expires.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportOrder {
    /// The target's name.
    pub target: Iqn,
    /// The one initiator that it accepts.
    pub initiator: Iqn,
    /// CHAP name.
    pub chap_name: String,
    /// CHAP secret.
    pub chap_secret: String,
    /// How the initiator may prove that it knows it.
    #[serde(default)]
    pub chap: ChapAlgorithms,
    /// The clone.
    pub disk: DiskId,
    /// Where it is, below the store that the gateway is configured with: no path crosses this socket.
    pub location: DiskLocation,
    /// The node's address: connections from there go to this export's process, and no others do.
    pub address: Ipv4Addr,
    /// Sessions at once, all of the one initiator: more than one is for multipath.
    #[serde(default = "one_session")]
    pub sessions: u8,
    /// For the gateway's DHCP; none if the node's MAC address is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<Reservation>,
    /// Until then, by the gateway's own clock: milliseconds since the Unix epoch.
    pub expires_at_ms: i64,
}

fn one_session() -> u8 {
    1
}

impl fmt::Debug for ExportOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExportOrder")
            .field("target", &self.target)
            .field("initiator", &self.initiator)
            .field("chap_secret", &"<redacted>")
            .field("disk", &self.disk)
            .field("address", &self.address)
            .field("sessions", &self.sessions)
            .field("reservation", &self.reservation)
            .field("expires_at_ms", &self.expires_at_ms)
            .finish_non_exhaustive()
    }
}

/// The one address that a node has on its provisioning network while its export stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reservation {
    /// The NIC that asks.
    pub mac: MacAddr,
    /// Its address, in the subnet that imaging has on record for the gateway.
    pub address: Ipv4Net,
}

/// What the gateway serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// Its exports, in order of admission id.
    pub exports: Vec<ExportStatus>,
}

/// One export and its traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// The admission that it is born of.
    pub admission: AdmissionId,
    /// The target's name.
    pub target: Iqn,
    /// Sessions logged in now.
    pub sessions: u32,
    /// Octets read through it since its process was started.
    pub read_bytes: u64,
    /// Octets written.
    pub written_bytes: u64,
    /// How long reads took.
    pub reads: Latency,
    /// How long writes took.
    pub writes: Latency,
    /// How often its process ended by itself and was started anew.
    pub restarts: u32,
    /// What holds its process; nothing while there is none.
    pub confinement: Option<Confinement>,
    /// Until then: milliseconds since the Unix epoch.
    pub expires_at_ms: i64,
}
