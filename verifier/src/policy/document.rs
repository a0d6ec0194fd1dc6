//! A policy as it is written: TOML or JSON, member by member. Shape only; [`check`](super::check) says what must hold.

use crate::event_log::event_type::EventType;
use crate::ima::policy::ImaPolicy;
use crate::quote::ClockRule;
use serde::{Deserialize, Serialize};
use std::fmt;
use time::OffsetDateTime;

/// A policy as it is written. Members are in alphabetical order, because the canonical form relies on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File {
    #[serde(default, skip_serializing_if = "ClockRule::is_default")]
    pub(crate) clock: ClockRule,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ima: Option<ImaPolicy>,
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) pcr: Vec<PcrRule>,
    #[serde(default)]
    pub(crate) provenance: Provenance,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub(crate) valid_until: Option<OffsetDateTime>,
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

/// What is expected of one PCR.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PcrRule {
    /// Events that may occur anywhere, any number of times.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<AllowedEvent>,
    /// Events that must occur, in this order, and nothing else. None at all means that nothing may be measured here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub event: Vec<ExpectedEvent>,
    /// Which PCR.
    pub index: u8,
    /// What a deviation means.
    pub mode: Mode,
}

/// What a deviation from a [`PcrRule`] means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The node is refused.
    Enforce,
    /// The node is accepted, and the result says what deviated.
    Warn,
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

/// A SHA-256 digest in hexadecimal.
#[serde_with::serde_as]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventDigest(#[serde_as(as = "serde_with::hex::Hex")] pub [u8; 32]);

impl fmt::Debug for EventDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}
