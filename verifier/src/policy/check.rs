//! What must hold of a policy before it may judge: no hole by omission, and bounds on everything.

use super::{BOOT_IMAGE_PCR, File, Mode, PcrRule};
use crate::event_log::event_type::EventType;
use crate::ima::policy::ImaPolicy;
use assay_wire::evidence::{AGENT_PCR, QUOTED_PCRS};
use std::collections::BTreeSet;

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
    /// It wants less of TPMs' clocks than the verifier would, and does not say why.
    #[error("policy `{name}` loosens [clock] without a reason: add reason = \"…\", of at most {MAX_TEXT_BYTES} octets")]
    Clock {
        /// The policy.
        name: String,
    },
    /// Its section on measurement lists has a hole.
    #[error("policy `{name}`, [ima]: {problem}")]
    Ima {
        /// The policy.
        name: String,
        /// Which.
        problem: String,
    },
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

pub(super) fn check_size(text: &str) -> Result<(), PolicyError> {
    if text.len() > MAX_POLICY_BYTES { Err(PolicyError::TooLarge { bytes: text.len() }) } else { Ok(()) }
}

pub(super) fn check(file: &File) -> Result<(), PolicyError> {
    if file.name.is_empty() || file.name.len() > MAX_TEXT_BYTES {
        return Err(PolicyError::Name);
    }
    let name = || file.name.clone();
    if file.clock.lacks_reason() || file.clock.reason.as_ref().is_some_and(|reason| reason.len() > MAX_TEXT_BYTES) {
        return Err(PolicyError::Clock { name: name() });
    }
    if let Some(problem) = file.ima.as_ref().and_then(ImaPolicy::problem) {
        return Err(PolicyError::Ima { name: name(), problem });
    }
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

/// What a policy must speak about: firmware, option ROMs, boot images, Secure Boot, the UKI and its command line.
const REQUIRED_PCRS: [u8; 6] = [0, 2, BOOT_IMAGE_PCR, 7, 11, 12];
const MAX_POLICY_BYTES: usize = 1 << 20;
const MAX_EVENTS: usize = 1000;
const MAX_ALTERNATIVES: usize = 64;
const MAX_TEXT_BYTES: usize = 256;
