//! Appraisal: verified evidence against a policy, event by event. On the boot path: step 6, the verdict.
//!
//! [`appraise`] is the one maker of [`Accepted`], without which no attestation result is signed. Everything that is not
//! expected is refused: an unknown event, a missing one, one too many, one in another order or under another label.

mod events;
mod settings;

pub(crate) use self::events::appraise_firmware;

use self::settings::settings_problems;
use crate::evidence::ReplayedEvidence;
use crate::policy::{Mode, Policy, PolicyDigest};
use crate::quote::ClockInfo;
use assay_tpm::name::Name;
use assay_wire::agent::AgentSettings;
use assay_wire::evidence::AGENT_PCR;
use assay_wire::result::{EarStatus, Submod};
use std::collections::BTreeMap;

/// What this verifier would have told this node.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// The settings, which must be what the agent measured.
    pub settings: &'a AgentSettings,
}

/// The verdict.
#[derive(Debug, Clone)]
pub enum Appraisal {
    /// Good.
    Accepted(Accepted),
    /// Not good.
    Refused(Refusal),
}

/// Proof that evidence was appraised and is good. Made by [`appraise`] only.
#[derive(Debug, Clone)]
pub struct Accepted {
    policy: PolicyDigest,
    rules: BTreeMap<String, String>,
    warnings: Vec<String>,
    clock: ClockInfo,
    nonce: [u8; 32],
    ak_name: Name,
}

impl Accepted {
    /// The appraisal as an attestation result has it.
    #[must_use]
    pub fn submod(&self) -> Submod {
        // A warning is in the rules' words. `warning` as a status would be refused by every relying party, and a policy
        // that says "warn" says that the node is to be released.
        Submod { status: EarStatus::Affirming, policy: self.policy.to_string(), rules: self.rules.clone() }
    }

    /// Which policy judged.
    #[must_use]
    pub fn policy(&self) -> &PolicyDigest {
        &self.policy
    }

    /// What deviated where the policy only warns.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The TPM's counters at the quote.
    #[must_use]
    pub fn clock(&self) -> &ClockInfo {
        &self.clock
    }

    /// The nonce that the quote answered.
    #[must_use]
    pub fn nonce(&self) -> &[u8; 32] {
        &self.nonce
    }

    /// The AK that signed.
    #[must_use]
    pub fn ak_name(&self) -> &Name {
        &self.ak_name
    }
}

/// Why evidence is not good.
#[derive(Debug, Clone)]
pub struct Refusal {
    policy: PolicyDigest,
    reasons: Vec<String>,
    warnings: Vec<String>,
}

impl Refusal {
    /// Which policy judged.
    #[must_use]
    pub fn policy(&self) -> &PolicyDigest {
        &self.policy
    }

    /// One sentence a reason; at least one.
    #[must_use]
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }

    /// What else deviated, where the policy only warns.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// Appraises `evidence`. `now_seconds` is this verifier's clock, since the Unix epoch.
#[must_use]
pub fn appraise(
    policy: &Policy,
    evidence: &ReplayedEvidence<'_>,
    expected: &Expected<'_>,
    now_seconds: i64,
) -> Appraisal {
    let mut findings = appraise_firmware(policy, evidence);
    let problems = settings_problems(evidence, expected.settings);
    findings.record(
        &format!("pcr-{AGENT_PCR}"),
        Mode::Enforce,
        problems,
        "the agent's settings are what this verifier says",
    );
    if let Some(list) = evidence.ima() {
        let (mode, problems) = list.deviations(policy.ima());
        findings.record("ima", mode, problems, "every entry of the measurement list is allowed");
    }
    let expired = policy.valid_until().filter(|until| until.unix_timestamp() <= now_seconds);
    let expired = expired.map(|until| format!("policy `{}` was valid until {until}", policy.name()));
    findings.record("policy", Mode::Enforce, expired.into_iter().collect(), "valid");
    let problems = policy.clock().problems(evidence.clock(), evidence.clock_fell_back_ms());
    findings.record("clock", Mode::Enforce, problems, "as the policy wants it");
    if findings.reasons.is_empty() {
        Appraisal::Accepted(Accepted {
            policy: *policy.digest(),
            rules: findings.rules,
            warnings: findings.warnings,
            clock: *evidence.clock(),
            nonce: *evidence.quote().nonce(),
            ak_name: evidence.quote().ak_name().clone(),
        })
    } else {
        let Findings { reasons, warnings, .. } = findings;
        Appraisal::Refused(Refusal { policy: *policy.digest(), reasons, warnings })
    }
}

/// What appraisal has found so far.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) reasons: Vec<String>,
    warnings: Vec<String>,
    rules: BTreeMap<String, String>,
}

impl Findings {
    fn record(&mut self, rule: &str, mode: Mode, problems: Vec<String>, good: &str) {
        let says = match (problems.len(), mode) {
            (0, _) => good.to_owned(),
            (count, Mode::Warn) => format!("{count} deviations, which the policy only warns of"),
            (count, Mode::Enforce) => format!("{count} deviations"),
        };
        self.rules.insert(rule.to_owned(), says);
        match mode {
            Mode::Enforce => self.reasons.extend(problems),
            Mode::Warn => self.warnings.extend(problems),
        }
    }
}
