//! What must hold of a policy before it may judge: no hole by omission, and bounds on everything.

use super::check_rules::rule_problem;
use super::{BOOT_IMAGE_PCR, File, Mode, PcrRule, VaryingEvent};
use crate::event_log::event_type::EventType;
use crate::ima::policy::ImaPolicy;
use crate::tee::TeeRule;
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
    /// A rule on quotes of trusted execution environments has a hole.
    #[error("policy `{name}`, [[tee]]: {problem}")]
    Tee {
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
    /// It is valid at no time.
    #[error("policy `{name}` is valid at no time: valid_from is not before valid_until")]
    NeverValid {
        /// The policy.
        name: String,
    },
    /// A named rule that cannot be kept.
    #[error("policy `{name}`, rule `{rule}`: {problem}")]
    Rule {
        /// The policy.
        name: String,
        /// The rule.
        rule: &'static str,
        /// Why not.
        problem: &'static str,
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
    let too_many = (file.tee.len() > MAX_TEE_RULES).then(|| format!("more than {MAX_TEE_RULES} rules"));
    if let Some(problem) = too_many.or_else(|| file.tee.iter().find_map(TeeRule::problem)) {
        return Err(PolicyError::Tee { name: name(), problem });
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
    if let Some((rule, problem)) = rule_problem(file) {
        return Err(PolicyError::Rule { name: name(), rule, problem });
    }
    if let Some((pcr, problem)) = alternatives_problem(&file.pcr) {
        return Err(PolicyError::Pcr { name: name(), pcr, problem });
    }
    if let (Some(from), Some(until)) = (file.valid_from, file.valid_until)
        && from >= until
    {
        return Err(PolicyError::NeverValid { name: name() });
    }
    if enforces_boot_images(file) { Ok(()) } else { Err(PolicyError::NothingEnforced { name: name() }) }
}

/// Whether only known images boot. A `[boot_images]` takes the images out of PCR 4's list, so it must enforce itself.
fn enforces_boot_images(file: &File) -> bool {
    let Some(four) = file.pcr.iter().find(|rule| rule.index == BOOT_IMAGE_PCR && rule.mode == Mode::Enforce) else {
        return false;
    };
    match &file.boot_images {
        Some(rule) => rule.mode == Mode::Enforce && rule.image.iter().any(|image| !image.optional),
        None if four.alternative.is_empty() => !four.event.is_empty(),
        None => four.alternative.iter().all(|alternative| !alternative.event.is_empty()),
    }
}

fn problem_of(rule: &PcrRule, first: bool) -> Option<&'static str> {
    let sequences = || {
        let alternatives = rule.alternative.iter().map(|alternative| &alternative.event);
        std::iter::once(&rule.event).chain(alternatives)
    };
    let events = || sequences().flatten();
    let texts = events().map(|event| &event.description).chain(rule.allow.iter().map(|event| &event.data));
    let kinds = events().map(|event| event.kind).chain(rule.allow.iter().map(|event| event.kind));
    let mut kinds = kinds.chain(rule.varying.iter().map(|event| event.kind));
    if !first {
        Some("listed twice")
    } else if rule.index == AGENT_PCR {
        Some("holds the agent's settings, which have a rule of their own")
    } else if !QUOTED_PCRS.contains(&rule.index) {
        Some("is not quoted")
    } else if sequences().any(|events| events.len() > MAX_EVENTS)
        || rule.allow.len() > MAX_EVENTS
        || rule.varying.len() > MAX_ALTERNATIVES
        || rule.alternative.len() > MAX_ALTERNATIVES
    {
        Some("has too many events")
    } else if events().any(|event| event.sha256.is_empty() || event.sha256.len() > MAX_ALTERNATIVES) {
        Some("has an event with no digest or too many")
    } else if texts.into_iter().any(|text| !is_text(text)) {
        Some("has an event whose description or data is empty or too long")
    } else if kinds.any(|kind| kind == EventType::NO_ACTION) {
        Some("expects EV_NO_ACTION, which is never extended")
    } else {
        varying_problem(rule)
    }
}

/// Code and command lines may not vary: a pattern there would let anything through.
fn varying_problem(rule: &PcrRule) -> Option<&'static str> {
    if rule.varying.is_empty() {
        None
    } else if !VARYING_PCRS.contains(&rule.index) {
        Some("holds code, keys or command lines, which must not vary")
    } else if rule.varying.iter().any(|event| patterns(event).next().is_none()) {
        Some("has a varying event without a pattern")
    } else if rule.varying.iter().flat_map(patterns).any(|pattern| !is_text(pattern)) {
        Some("has a pattern that is empty or too long")
    } else {
        None
    }
}

fn patterns(event: &VaryingEvent) -> impl Iterator<Item = &String> {
    [&event.device_path, &event.text, &event.variable].into_iter().flatten()
}

/// PCRs whose alternatives have the same names are matched together, so their names must be the same entirely.
fn alternatives_problem(rules: &[PcrRule]) -> Option<(u8, &'static str)> {
    let mut groups: Vec<(BTreeSet<&str>, Mode)> = Vec::new();
    for rule in rules.iter().filter(|rule| !rule.alternative.is_empty()) {
        let names: BTreeSet<_> = rule.alternative.iter().map(|alternative| alternative.name.as_str()).collect();
        let problem = |problem| Some((rule.index, problem));
        if !rule.event.is_empty() {
            return problem("has both events and alternatives: put the events into each alternative");
        }
        if names.len() != rule.alternative.len() {
            return problem("has two alternatives of one name");
        }
        let nodes = rule.alternative.iter().flat_map(|alternative| &alternative.nodes);
        if names.iter().copied().chain(nodes.map(String::as_str)).any(|text| !is_text(text)) {
            return problem("has an alternative whose name or node pattern is empty or too long");
        }
        if rule.alternative.iter().any(|alternative| alternative.nodes.len() > MAX_EVENTS) {
            return problem("has an alternative with too many node patterns");
        }
        match groups.iter().find(|(group, _)| !group.is_disjoint(&names)) {
            Some((group, _)) if *group != names => {
                return problem("shares some of its alternatives' names with another PCR, but not all");
            }
            Some((_, mode)) if *mode != rule.mode => {
                return problem("has alternatives in common with a PCR of another mode");
            }
            Some(_) => {}
            None => groups.push((names, rule.mode)),
        }
    }
    None
}

pub(super) fn is_text(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_TEXT_BYTES
}

const MAX_TEE_RULES: usize = 8;
/// What a policy must speak about: firmware, option ROMs, boot images, Secure Boot, the UKI and its command line.
const REQUIRED_PCRS: [u8; 6] = [0, 2, BOOT_IMAGE_PCR, 7, 11, 12];
/// Where events may differ from node to node: configuration, boot entries, partition tables, what GRUB was told.
const VARYING_PCRS: [u8; 5] = [1, 3, 5, 6, 8];
const MAX_POLICY_BYTES: usize = 1 << 20;
pub(super) const MAX_EVENTS: usize = 1000;
pub(super) const MAX_ALTERNATIVES: usize = 64;
const MAX_TEXT_BYTES: usize = 256;
