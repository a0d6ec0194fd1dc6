//! Appraisal policies: which events the PCRs of a good node hold. Data, in TOML or JSON, whose digest goes into every
//! attestation result. A policy that would let something through by leaving it out is refused when it is read.
//!
//! ```toml
//! name = "lab-2026.3"
//!
//! [provenance]
//! learned_from = "node n1"
//! approved_by = "alice"
//!
//! [[pcr]]
//! index = 4
//! mode = "enforce"
//!
//! [[pcr.allow]]                       # may occur anywhere in this PCR, any number of times
//! type = "EV_EFI_ACTION"
//! data = "Calling EFI Application from Boot Option"
//!
//! [[pcr.event]]                       # must occur, in this order
//! type = "EV_EFI_BOOT_SERVICES_APPLICATION"
//! description = "agent.efi (UKI)"
//! sha256 = ["cd34…", "ab12…"]         # alternatives
//! ```

use crate::event_log::event_type::EventType;
use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::evidence::{AGENT_PCR, QUOTED_PCRS};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use time::OffsetDateTime;

/// A policy that was read and found whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    file: File,
    digest: PolicyDigest,
}

impl Policy {
    /// Reads a policy, JSON if it begins with `{`, else TOML.
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        if text.trim_start().starts_with('{') { Self::from_json(text) } else { Self::from_toml(text) }
    }

    /// Reads a policy in TOML.
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn from_toml(text: &str) -> Result<Self, PolicyError> {
        check_size(text)?;
        toml::from_str(text).map_err(PolicyError::Toml).and_then(Self::validated)
    }

    /// Reads a policy in JSON.
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn from_json(text: &str) -> Result<Self, PolicyError> {
        check_size(text)?;
        serde_json::from_str(text).map_err(PolicyError::Json).and_then(Self::validated)
    }

    pub(crate) fn validated(file: File) -> Result<Self, PolicyError> {
        check(&file)?;
        let mut digest = [0; 32];
        digest.copy_from_slice(HashAlgorithm::Sha256.digest(canonical(&file).as_bytes()).as_ref());
        Ok(Self { file, digest: PolicyDigest(digest) })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// SHA-256 of [`Self::to_json`].
    #[must_use]
    pub fn digest(&self) -> &PolicyDigest {
        &self.digest
    }

    /// Where it comes from and who said that it is good.
    #[must_use]
    pub fn provenance(&self) -> &Provenance {
        &self.file.provenance
    }

    /// Until when it may be used.
    #[must_use]
    pub fn valid_until(&self) -> Option<OffsetDateTime> {
        self.file.valid_until
    }

    /// Whether a quote with an unsafe clock (`safe` = no, for up to 70 minutes after a power cut) is refused.
    #[must_use]
    pub fn requires_safe_clock(&self) -> bool {
        self.file.require_safe_clock
    }

    /// What is expected of each PCR that the policy covers.
    #[must_use]
    pub fn pcrs(&self) -> &[PcrRule] {
        &self.file.pcr
    }

    /// The same policy, approved.
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn approved(&self, by: &str, at: OffsetDateTime) -> Result<Self, PolicyError> {
        let mut file = self.file.clone();
        file.provenance.approved_by = Some(by.to_owned());
        file.provenance.approved_at = Some(at);
        Self::validated(file)
    }

    /// Canonical JSON: members in alphabetical order, no white space (RFC 8785 for the values that occur here).
    #[must_use]
    pub fn to_json(&self) -> String {
        canonical(&self.file)
    }

    /// TOML, for people.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(&self.file).unwrap_or_default() // plain data with text keys always serialises
    }
}

/// SHA-256 over a policy's canonical JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PolicyDigest([u8; 32]);

impl fmt::Display for PolicyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for PolicyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyDigest({self})")
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

/// Why a policy is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Longer than any policy.
    #[error("policy has {bytes} octets, more than {MAX_POLICY_BYTES}")]
    TooLarge {
        /// How long it is.
        bytes: usize,
    },
    /// Not a policy in TOML.
    #[error("reading the policy as TOML")]
    Toml(#[source] toml::de::Error),
    /// Not a policy in JSON.
    #[error("reading the policy as JSON")]
    Json(#[source] serde_json::Error),
    /// Not Reference Values.
    #[error("reading the artefacts' Reference Values as JSON")]
    Artefacts(#[source] serde_json::Error),
    /// It has no name.
    #[error("policy needs a name of 1 to {MAX_TEXT_BYTES} octets")]
    Name,
    /// A PCR that must be spoken about is not.
    #[error("policy `{name}` says nothing of PCR {pcr}: list it, if only with mode \"warn\"")]
    PcrMissing {
        /// The policy.
        name: String,
        /// The PCR.
        pcr: u8,
    },
    /// It enforces nothing of what boots.
    #[error("policy `{name}` does not enforce PCR 4: any boot image would pass")]
    NothingEnforced {
        /// The policy.
        name: String,
    },
    /// A PCR that cannot be listed.
    #[error("policy `{name}`, PCR {pcr}: {problem}")]
    Pcr {
        /// The policy.
        name: String,
        /// The PCR.
        pcr: u8,
        /// Why not.
        problem: &'static str,
    },
}

/// The Reference Values of what we boot, as `agent-image` computes them from the artefacts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtefactReference {
    /// The image's name.
    pub name: String,
    /// The command line that PCR 12 holds.
    #[serde(default)]
    pub command_line: String,
    /// The events that it causes, in order.
    pub events: Vec<ArtefactEvent>,
}

/// One event that an artefact causes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtefactEvent {
    /// Into which PCR.
    pub pcr: u8,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// Its digest.
    pub sha256: EventDigest,
    /// What it is, for people.
    pub description: String,
}

impl ArtefactReference {
    /// Reads `reference-values.json`.
    ///
    /// # Errors
    /// Too large, or not that.
    pub fn from_json(text: &str) -> Result<Self, PolicyError> {
        check_size(text)?;
        serde_json::from_str(text).map_err(PolicyError::Artefacts)
    }
}

/// A policy as it is written. Members are in alphabetical order, because [`canonical`] relies on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) pcr: Vec<PcrRule>,
    #[serde(default)]
    pub(crate) provenance: Provenance,
    #[serde(default)]
    pub(crate) require_safe_clock: bool,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "time::serde::rfc3339::option")]
    pub(crate) valid_until: Option<OffsetDateTime>,
}

fn check_size(text: &str) -> Result<(), PolicyError> {
    if text.len() > MAX_POLICY_BYTES { Err(PolicyError::TooLarge { bytes: text.len() }) } else { Ok(()) }
}

fn check(file: &File) -> Result<(), PolicyError> {
    if file.name.is_empty() || file.name.len() > MAX_TEXT_BYTES {
        return Err(PolicyError::Name);
    }
    let name = || file.name.clone();
    let mut seen = BTreeSet::new();
    for rule in &file.pcr {
        if let Some(problem) = problem_of(rule, seen.insert(rule.index)) {
            return Err(PolicyError::Pcr { name: name(), pcr: rule.index, problem });
        }
    }
    if let Some(pcr) = REQUIRED_PCRS.into_iter().find(|pcr| !seen.contains(pcr)) {
        return Err(PolicyError::PcrMissing { name: name(), pcr });
    }
    let enforced =
        |rule: &PcrRule| rule.index == BOOT_IMAGE_PCR && rule.mode == Mode::Enforce && !rule.event.is_empty();
    if file.pcr.iter().any(enforced) { Ok(()) } else { Err(PolicyError::NothingEnforced { name: name() }) }
}

fn problem_of(rule: &PcrRule, first: bool) -> Option<&'static str> {
    let texts = rule.event.iter().map(|event| &event.description).chain(rule.allow.iter().map(|event| &event.data));
    let kinds = rule.event.iter().map(|event| event.kind).chain(rule.allow.iter().map(|event| event.kind));
    if !first {
        Some("listed twice")
    } else if rule.index == AGENT_PCR {
        Some("holds the agent's settings, which have a rule of their own")
    } else if !QUOTED_PCRS.contains(&rule.index) {
        Some("is not quoted")
    } else if rule.event.len() > MAX_EVENTS || rule.allow.len() > MAX_EVENTS {
        Some("has too many events")
    } else if rule.event.iter().any(|event| event.sha256.is_empty() || event.sha256.len() > MAX_ALTERNATIVES) {
        Some("has an event with no digest or too many")
    } else if texts.into_iter().any(|text| text.is_empty() || text.len() > MAX_TEXT_BYTES) {
        Some("has an event whose description or data is empty or too long")
    } else if kinds.into_iter().any(|kind| kind == EventType::NO_ACTION) {
        Some("expects EV_NO_ACTION, which is never extended")
    } else {
        None
    }
}

fn canonical(file: &File) -> String {
    serde_json::to_string(file).unwrap_or_default() // plain data with text keys always serialises
}

/// What a policy must speak about: firmware, option ROMs, boot images, Secure Boot, the UKI and its command line.
const REQUIRED_PCRS: [u8; 6] = [0, 2, BOOT_IMAGE_PCR, 7, 11, 12];
/// Images that firmware loads.
pub(crate) const BOOT_IMAGE_PCR: u8 = 4;
const MAX_POLICY_BYTES: usize = 1 << 20;
const MAX_EVENTS: usize = 1000;
const MAX_ALTERNATIVES: usize = 64;
const MAX_TEXT_BYTES: usize = 256;
