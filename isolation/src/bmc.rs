//! Management controllers: power, what boots next, and whether the node was reset behind our back.

pub mod redfish;

use futures_util::future::BoxFuture;

/// A node's BMC. Implementations bound every wait and every answer.
pub trait BmcDriver: Send + Sync {
    /// Reads the system.
    fn read(&self) -> BoxFuture<'_, Result<SystemReading, BmcError>>;

    /// Asks for a power action; its effect is seen by reading.
    fn power(&self, action: PowerAction) -> BoxFuture<'_, Result<(), BmcError>>;

    /// Makes the next boot, and only that, a UEFI PXE boot, and reads that back.
    fn boot_once_from_pxe(&self) -> BoxFuture<'_, Result<(), BmcError>>;
}

/// What a BMC says of its system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemReading {
    /// Whether it is on.
    pub power: PowerState,
    /// When it was last reset, in the BMC's own words: only compared for equality. None if the BMC does not say.
    pub last_reset: Option<String>,
}

/// Redfish `PowerState` (DSP0268).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerState {
    /// On.
    On,
    /// Off.
    Off,
    /// On its way, paused, or something that the standard does not know: neither on nor off.
    Between,
}

/// What can be done to a node's power: Redfish `ResetType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerAction {
    /// Power on.
    On,
    /// Power off at once.
    ForceOff,
    /// Reset at once.
    ForceRestart,
}

impl PowerAction {
    /// The Redfish word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::On => "On",
            Self::ForceOff => "ForceOff",
            Self::ForceRestart => "ForceRestart",
        }
    }
}

/// Why a BMC did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BmcError {
    /// No answer, or none that HTTP or TLS can carry.
    #[error("{doing} at the BMC {url}")]
    Http {
        /// What was being done.
        doing: &'static str,
        /// The resource.
        url: String,
        /// Why.
        #[source]
        cause: reqwest::Error,
    },
    /// An HTTP status that is no success.
    #[error("{doing} at the BMC {url}: it answered {status}: {detail}")]
    Status {
        /// What was being done.
        doing: &'static str,
        /// The resource.
        url: String,
        /// HTTP status.
        status: u16,
        /// The beginning of its words.
        detail: String,
    },
    /// Not what Redfish promises.
    #[error("{doing} at the BMC {url}: its answer {problem}")]
    Malformed {
        /// What was being done.
        doing: &'static str,
        /// The resource.
        url: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// It accepted the boot override and shows another one.
    #[error(
        "the BMC {url} accepted \"boot once from PXE\" but reads back target {target}, enabled {enabled}, mode {mode} \
         (isolation's `allow_continuous_boot_override` accepts Continuous)"
    )]
    BootOverride {
        /// The system.
        url: String,
        /// `BootSourceOverrideTarget`.
        target: String,
        /// `BootSourceOverrideEnabled`.
        enabled: String,
        /// `BootSourceOverrideMode`.
        mode: String,
    },
    /// The address or CA in the node's record cannot be used.
    #[error("the BMC {url} cannot be used: {problem}")]
    Unusable {
        /// The system.
        url: String,
        /// Why.
        problem: String,
    },
}
