//! What a target is: its name, the one initiator that may log in, and the logical unit behind it.
//!
//! A target is made from an admission and lives as long as it does; the engine only ever reads it, apart from the
//! logical unit's shared SCSI state (reservations, unit attentions), which every session of the target sees.

use crate::chap::{ChapAlgorithms, ChapCredentials, SECRET_OCTETS};
use crate::scsi::UnitState;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use thiserror::Error;

/// The portal group tag that every portal here belongs to (RFC 7143 §13.9); one portal, one group.
pub const PORTAL_GROUP_TAG: u16 = 1;

/// Everything that defines a target. Checked by [`Target::new`].
#[derive(Debug, Clone)]
pub struct TargetConfig {
    /// The target's iSCSI name (RFC 7143 §4.2.7), at most 223 octets.
    pub name: String,
    /// Where initiators reach it; answered to SendTargets.
    pub portal: SocketAddr,
    /// The only initiator name that may log in.
    pub initiator: String,
    /// How that initiator proves itself.
    pub authentication: Authentication,
    /// The disk.
    pub logical_unit: LogicalUnitConfig,
}

/// How a login is authenticated (RFC 7143 §12.1).
#[derive(Debug, Clone)]
pub enum Authentication {
    /// By the initiator's name alone. For ad hoc use and tests.
    None,
    /// CHAP (RFC 1994, RFC 7143 §12.1.3).
    Chap {
        /// What the initiator must prove that it knows.
        initiator: ChapCredentials,
        /// What the target proves in turn, if the initiator asks for it. Another secret than the initiator's.
        target: Option<ChapCredentials>,
        /// How both may prove it.
        algorithms: ChapAlgorithms,
    },
}

/// Logical unit 0 of a target: a direct-access block device.
#[derive(Debug, Clone)]
pub struct LogicalUnitConfig {
    /// Logical block length in octets: 512 or 4096.
    pub block_bytes: u32,
    /// Number of logical blocks; at least 1.
    pub blocks: u64,
    /// The low 60 bits of an NAA 3h (locally assigned) designator (SPC-4 §7.8.6.6.5); unique on the site.
    pub naa: u64,
    /// Unit serial number, at most 32 printable ASCII characters.
    pub serial: String,
    /// T10 vendor identification, at most 8 printable ASCII characters.
    pub vendor: String,
    /// Product identification, at most 16 printable ASCII characters.
    pub product: String,
    /// Whether writes are refused with DATA PROTECT.
    pub read_only: bool,
    /// Whether the unit reports a volatile write cache: without it every write must be durable when it completes.
    pub write_cache: bool,
}

/// A target that passed the checks.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    unit: Mutex<UnitState>,
}

impl Target {
    /// Checks `config`.
    pub fn new(config: TargetConfig) -> Result<Self, ConfigError> {
        for (what, name) in [("target", &config.name), ("initiator", &config.initiator)] {
            let well_formed = name.bytes().all(|octet| octet.is_ascii_graphic());
            if name.is_empty() || name.len() > 223 || !well_formed {
                return Err(ConfigError::Name { what, name: name.clone() });
            }
        }
        let unit = &config.logical_unit;
        if !matches!(unit.block_bytes, 512 | 4096) {
            return Err(ConfigError::BlockBytes { target: config.name, block_bytes: unit.block_bytes });
        }
        if unit.blocks == 0 || unit.blocks > u64::MAX / u64::from(unit.block_bytes) {
            return Err(ConfigError::Blocks { target: config.name, blocks: unit.blocks });
        }
        for (what, text, limit) in
            [("serial", &unit.serial, 32), ("vendor", &unit.vendor, 8), ("product", &unit.product, 16)]
        {
            if text.len() > limit || !text.bytes().all(|octet| (0x20..0x7f).contains(&octet)) {
                return Err(ConfigError::Identity { target: config.name, what, limit });
            }
        }
        if let Authentication::Chap { initiator, target, .. } = &config.authentication {
            if initiator.is_weak() || target.as_ref().is_some_and(ChapCredentials::is_weak) {
                return Err(ConfigError::WeakSecret { target: config.name });
            }
            if target.as_ref().is_some_and(|own| own.shares_secret_with(initiator)) {
                return Err(ConfigError::SharedSecret { target: config.name });
            }
        }
        Ok(Self { config, unit: Mutex::new(UnitState::default()) })
    }

    /// What it was made from.
    pub fn config(&self) -> &TargetConfig {
        &self.config
    }

    /// The target's iSCSI name.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// The logical unit's SCSI state, shared by the target's sessions. Held for the planning of one command only.
    pub(crate) fn unit(&self) -> MutexGuard<'_, UnitState> {
        // The state is plain values that are never left half-changed, so a panic elsewhere does not spoil it.
        self.unit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which targets stand behind a portal. Asked once per login and once per SendTargets.
pub trait Directory: Send + Sync {
    /// The target named `name`, if it exists and `initiator` is the one that it accepts.
    fn target(&self, name: &str, initiator: &str) -> Option<Arc<Target>>;
    /// The targets that accept `initiator`.
    fn visible_to(&self, initiator: &str) -> Vec<Arc<Target>>;
}

/// A portal's targets by name. Cheap to share; targets come and go with their exports.
#[derive(Debug, Default)]
pub struct Portal {
    targets: RwLock<HashMap<String, Arc<Target>>>,
}

impl Portal {
    /// Adds `target`, or puts it in place of the one with that name, which is returned.
    pub fn insert(&self, target: Arc<Target>) -> Option<Arc<Target>> {
        let mut targets = self.targets.write().unwrap_or_else(PoisonError::into_inner);
        targets.insert(target.name().to_owned(), target)
    }

    /// Takes away the target named `name`: no further login finds it. Its connections are the driver's to drop.
    pub fn remove(&self, name: &str) -> Option<Arc<Target>> {
        self.targets.write().unwrap_or_else(PoisonError::into_inner).remove(name)
    }
}

impl Directory for Portal {
    fn target(&self, name: &str, initiator: &str) -> Option<Arc<Target>> {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        targets.get(name).filter(|target| target.config.initiator == initiator).cloned()
    }

    fn visible_to(&self, initiator: &str) -> Vec<Arc<Target>> {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        targets.values().filter(|target| target.config.initiator == initiator).cloned().collect()
    }
}

/// Why a [`TargetConfig`] was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// A name that no initiator could use.
    #[error("configuring a target: {what} name {name:?} is not 1 to 223 printable characters")]
    Name {
        /// Whose name.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A block length that is not supported.
    #[error("configuring target {target}: block length {block_bytes} is neither 512 nor 4096")]
    BlockBytes {
        /// The target.
        target: String,
        /// The length, in octets.
        block_bytes: u32,
    },
    /// A capacity that cannot be addressed.
    #[error("configuring target {target}: {blocks} blocks is not a usable capacity")]
    Blocks {
        /// The target.
        target: String,
        /// The number of blocks.
        blocks: u64,
    },
    /// A CHAP secret that could be guessed (RFC 7143 §9.2.1).
    #[error("configuring target {target}: a CHAP secret is shorter than {SECRET_OCTETS} octets")]
    WeakSecret {
        /// The target.
        target: String,
    },
    /// Both sides would prove the same secret (RFC 7143 §9.2.1), so one could be made to answer for the other.
    #[error("configuring target {target}: the CHAP secrets of initiator and target are the same")]
    SharedSecret {
        /// The target.
        target: String,
    },
    /// An identity string that does not fit its INQUIRY field.
    #[error("configuring target {target}: {what} is not at most {limit} printable characters")]
    Identity {
        /// The target.
        target: String,
        /// Which string.
        what: &'static str,
        /// Its limit, in characters.
        limit: usize,
    },
}
