//! A policy as it is written: TOML or JSON, member by member. Shape only; [`check`](super::check) says what must hold.

use super::rules::{BootImagesRule, CommandLineRule, FirmwareRule, OptionRomsRule, SecureBootRule};
use crate::boot_count::BootRule;
use crate::event_log::event_type::EventType;
use crate::ima::policy::ImaPolicy;
use crate::quote::ClockRule;
use crate::tee::TeeRule;
use serde::{Deserialize, Serialize};
use std::fmt;
use time::OffsetDateTime;

/// A policy as it is written. Members are in alphabetical order, because the canonical form relies on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File {
    #[serde(default, skip_serializing_if = "BootRule::is_default")]
    pub(crate) boot: BootRule,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) boot_images: Option<BootImagesRule>,
    #[serde(default, skip_serializing_if = "ClockRule::is_default")]
    pub(crate) clock: ClockRule,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) command_line: Option<CommandLineRule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) firmware: Option<FirmwareRule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ima: Option<ImaPolicy>,
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) option_roms: Option<OptionRomsRule>,
    #[serde(default)]
    pub(crate) pcr: Vec<PcrRule>,
    #[serde(default)]
    pub(crate) provenance: Provenance,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) secure_boot: Option<SecureBootRule>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) tee: Vec<TeeRule>,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub(crate) valid_from: Option<OffsetDateTime>,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub(crate) valid_until: Option<OffsetDateTime>,
}

impl File {
    /// A policy that says nothing yet.
    pub(crate) fn named(name: &str) -> Self {
        Self {
            boot: BootRule::default(),
            boot_images: None,
            clock: ClockRule::default(),
            command_line: None,
            firmware: None,
            ima: None,
            tee: Vec::new(),
            name: name.to_owned(),
            option_roms: None,
            pcr: Vec::new(),
            provenance: Provenance::default(),
            secure_boot: None,
            valid_from: None,
            valid_until: None,
        }
    }
}

/// Where a policy comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// When it was approved.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub approved_at: Option<OffsetDateTime>,
    /// Who approved it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved_by: Option<String>,
    /// The artefacts whose Reference Values it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artefacts: Option<String>,
    /// The evidence that firmware values were learnt from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned_from: Option<String>,
}

/// What is expected of one PCR: of the events that no named rule has decided on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PcrRule {
    /// Events that may occur anywhere, any number of times.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<AllowedEvent>,
    /// Instead of [`Self::event`]: whole sequences, of which one must match entirely. PCRs that name the same
    /// alternatives must all match the same one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternative: Vec<Alternative>,
    /// Events that must occur, in this order, and nothing else. None at all means that nothing may be measured here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub event: Vec<ExpectedEvent>,
    /// Which PCR.
    pub index: u8,
    /// What a deviation means.
    pub mode: Mode,
    /// Events that may occur anywhere and differ from node to node, within a pattern.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub varying: Vec<VaryingEvent>,
}

impl PcrRule {
    /// These events and nothing else, or the node is refused.
    pub(crate) fn enforced(index: u8, event: Vec<ExpectedEvent>) -> Self {
        let (allow, alternative, varying) = (Vec::new(), Vec::new(), Vec::new());
        Self { allow, alternative, event, index, mode: Mode::Enforce, varying }
    }
}

/// What a deviation from a rule means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The node is refused.
    #[default]
    Enforce,
    /// The node is accepted, and the result says what deviated.
    Warn,
}

/// One whole sequence of a PCR's events: of one release, or of one hardware model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alternative {
    /// Its events, like [`PcrRule::event`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub event: Vec<ExpectedEvent>,
    /// What it is called: `2026.3`, `r640`.
    pub name: String,
    /// Patterns of node names that it is for: `rack1-*`. None: for every node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
}

/// An event that must occur.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectedEvent {
    /// What it is, for people: `agent.efi (UKI)`.
    pub description: String,
    /// Any of these digests.
    pub sha256: Vec<EventDigest>,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: EventType,
}

/// An event that may occur, known by its data: its digest must be the data's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllowedEvent {
    /// The text that was measured.
    pub data: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: EventType,
}

/// An event that differs from node to node, like a boot entry with a MAC in its device path. Known by its type and by
/// patterns over its data, which must hash to the digest. In a pattern `*` stands for anything, `?` for one character
/// and `#` for one hexadecimal digit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaryingEvent {
    /// Pattern of the device path of a boot entry (`EFI_LOAD_OPTION`), in UEFI's text form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_path: Option<String>,
    /// Pattern of the event's text, for events that are text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// Pattern of the variable's name: `Boot####`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variable: Option<String>,
}

/// A SHA-256 digest in hexadecimal.
#[serde_with::serde_as]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventDigest(#[serde_as(as = "serde_with::hex::Hex")] pub [u8; 32]);

impl fmt::Display for EventDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for EventDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
