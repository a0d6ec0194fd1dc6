//! Switch drivers: how a port becomes what it should be, and how it is read (boot path step 8).

pub mod open_vswitch;

use assay_ovsdb::RpcError;
use assay_wire::id::SwitchId;
use assay_wire::isolation::PortIntent;
use assay_wire::net::VlanId;
use futures_util::future::BoxFuture;

/// A switch. Implementations bound every wait.
pub trait SwitchDriver: Send + Sync {
    /// Makes `port` what `intent` says and answers once no frame passes any other way any more, and the port reads back
    /// as intended. After an error the port may be either: read it, or close it.
    fn apply<'a>(&'a self, port: &'a str, intent: PortIntent) -> BoxFuture<'a, Result<(), SwitchError>>;

    /// Reads what `port` is, and its link.
    fn observe<'a>(&'a self, port: &'a str) -> BoxFuture<'a, Result<PortReading, SwitchError>>;
}

/// What a switch says of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortReading {
    /// What it is. None if it is none of the intents, like a trunk.
    pub intent: Option<PortIntent>,
    /// Its link.
    pub link: LinkReading,
}

/// What a switch says of a port's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkReading {
    /// Now.
    pub link: Link,
    /// How often it has changed, as far as the switch counts: only compared for equality.
    pub changes: Option<i64>,
}

/// A port's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// There is a carrier, and the port is enabled.
    Up,
    /// There is none, or the port is disabled.
    Down,
    /// The switch does not say: it has no device behind this port, or knows nothing of links.
    Unknown,
}

/// The site's two VLANs that are nobody's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SiteVlans {
    /// Reaches nothing.
    pub quarantine: VlanId,
    /// Reaches netboot and the verifier.
    pub airlock: VlanId,
}

/// Why a port is not known to be what it should be.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The switch is silent or unreachable.
    #[error("{doing} port {port}: switch {switch} does not answer")]
    NoAnswer {
        /// What was being done.
        doing: &'static str,
        /// The switch.
        switch: SwitchId,
        /// The port.
        port: String,
        /// What was waited for.
        #[source]
        cause: Option<Box<RpcError>>,
    },
    /// The switch answers, but not with what its protocol promises, or it refuses.
    #[error("{doing} port {port}: switch {switch} did not do it")]
    Protocol {
        /// What was being done.
        doing: &'static str,
        /// The switch.
        switch: SwitchId,
        /// The port.
        port: String,
        /// Its answer.
        #[source]
        cause: Box<RpcError>,
    },
    /// Ports are never created here: one without a tag would be a trunk of every VLAN.
    #[error(
        "switch {switch} has no port {port} on bridge {bridge}: add it there, as an access port of the quarantine VLAN"
    )]
    NoSuchPort {
        /// The switch.
        switch: SwitchId,
        /// The bridge.
        bridge: String,
        /// The port.
        port: String,
    },
    /// The switch says that it is done, and reads back otherwise.
    #[error("port {port} of switch {switch} was set but reads back as {observed}")]
    Differs {
        /// The switch.
        switch: SwitchId,
        /// The port.
        port: String,
        /// What it reads back as.
        observed: String,
    },
    /// Addresses of the port's other VLAN are still learned: frames for them would pass.
    #[error("port {port} of switch {switch} still has {entries} addresses learned in another VLAN")]
    StaleAddresses {
        /// The switch.
        switch: SwitchId,
        /// The port.
        port: String,
        /// How many.
        entries: usize,
    },
}
