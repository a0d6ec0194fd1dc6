//! Named rules: what a policy says of firmware, option ROMs, Secure Boot, boot images and the command line by what they
//! are, whatever the order and the bystanders in the log. A rule decides on the events that it speaks about, and takes
//! them out of their PCR's list: what no rule has decided on must be expected there, event by event.
//!
//! ```toml
//! [firmware]
//! versions = ["2.19.1"]               # EV_S_CRTM_VERSION
//!
//! [secure_boot]
//! enabled = true
//! db = { certificates = ["48e9…"] }   # nothing else may sign
//! dbx_at_least = ["80b4…"]            # revoked: image digests, certificates
//! sbat_at_least = { shim = 4, grub = 4 }
//!
//! [command_line]
//! text = ["agent.efi quiet"]
//! ```

use super::{EventDigest, Mode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `[firmware]`: what PCR 0 says of the firmware.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirmwareRule {
    /// Firmware volumes and other measured code, in any order. Given any, no other may occur.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blob: Vec<ListedEvent>,
    /// What a deviation means.
    #[serde(default)]
    pub mode: Mode,
    /// Versions, as `EV_S_CRTM_VERSION` has them. Given any, one must be measured, and no other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<String>,
}

/// `[option_roms]`: drivers and applications in PCR 2, in any order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptionRomsRule {
    /// By Authenticode digest.
    pub image: Vec<ListedEvent>,
    /// What a deviation means.
    #[serde(default)]
    pub mode: Mode,
}

/// `[boot_images]`: what firmware loads from PCR 4, in any order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootImagesRule {
    /// By Authenticode digest.
    pub image: Vec<ListedEvent>,
    /// What a deviation means.
    #[serde(default)]
    pub mode: Mode,
}

/// `[command_line]`: what the kernel was told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandLineRule {
    /// What a deviation means.
    #[serde(default)]
    pub mode: Mode,
    /// Any of these; systemd-stub measures the text as UTF-16 with a zero at its end into PCR 12.
    pub text: Vec<String>,
}

/// `[secure_boot]`: the state and the keys in PCR 7.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecureBootRule {
    /// Who may sign images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub db: Option<Keys>,
    /// What must be revoked: digests of images, certificates' SHA-256, or their `TBSCertificate`'s.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dbx_at_least: Vec<EventDigest>,
    /// Whether it must be on or off.
    pub enabled: bool,
    /// Who may sign changes of `db` and `dbx`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kek: Option<Keys>,
    /// What a deviation means.
    #[serde(default)]
    pub mode: Mode,
    /// Who owns the platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pk: Option<Keys>,
    /// Least generation of each component in shim's `SbatLevel`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sbat_at_least: BTreeMap<String, u32>,
}

/// Keys in a Secure Boot variable.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keys {
    /// SHA-256 of certificates (DER), or digests of images: the variable may hold these and no others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub certificates: Vec<EventDigest>,
    /// Or the whole variable has one of these digests, as measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sha256: Vec<EventDigest>,
}

/// An event known by its digest, wherever it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListedEvent {
    /// What it is, for people.
    pub description: String,
    /// Whether it may be missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
    /// Any of these digests.
    pub sha256: Vec<EventDigest>,
}
