//! Appraisal: verified evidence against a policy, event by event. On the boot path: step 6, the verdict.
//!
//! [`appraise`] is the one maker of [`Accepted`], without which no attestation result is signed. Everything that is not
//! expected is refused: an unknown event, a missing one, one too many, one in another order or under another label.

mod alternatives;
mod claims;
mod events;
mod findings;
mod rules;
mod secure_boot;
mod settings;
mod varying;

pub(crate) use self::events::appraise_firmware;
pub use self::findings::Deviation;

use self::findings::Findings;
use self::settings::settings_problems;
use crate::boot_count::{BootFacts, BootFinding, check_boot};
use crate::evidence::ReplayedEvidence;
use crate::policy::{Mode, Policy, PolicyDigest};
use crate::quote::ClockInfo;
use assay_tpm::name::Name;
use assay_wire::agent::AgentSettings;
use assay_wire::evidence::AGENT_PCR;
use assay_wire::result::{EarStatus, Submod};
use std::collections::BTreeMap;

/// What this verifier knows of this node without its evidence.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// The settings that it was told, which must be what the agent measured.
    pub settings: &'a AgentSettings,
    /// What the TPM's counts are held against.
    pub boot: &'a BootFacts,
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
    deviations: Vec<Deviation>,
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

    /// The same for programs.
    #[must_use]
    pub fn deviations(&self) -> &[Deviation] {
        &self.deviations
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
    deviations: Vec<Deviation>,
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

    /// All of it for programs.
    #[must_use]
    pub fn deviations(&self) -> &[Deviation] {
        &self.deviations
    }
}

/// What deviations from `[[tee]]` are noted under.
pub(crate) const TEE_RULE: &str = "tee";

/// Appraises `evidence`. `now_seconds` is this verifier's clock, since the Unix epoch.
#[must_use]
pub fn appraise(
    policy: &Policy,
    evidence: &ReplayedEvidence<'_>,
    expected: &Expected<'_>,
    now_seconds: i64,
) -> Appraisal {
    let mut findings = appraise_firmware(policy, evidence, expected.settings.node.as_str());
    let problems = settings_problems(evidence, expected.settings);
    findings.record(
        &format!("pcr-{AGENT_PCR}"),
        Mode::Enforce,
        problems,
        "the agent's settings are what this verifier says",
    );
    if !policy.tee().is_empty() {
        let problems = evidence.tee_deviations(policy.tee());
        findings.record(TEE_RULE, Mode::Enforce, problems, "every quote that the policy demands is there and good");
    }
    if let Some(list) = evidence.ima() {
        let (mode, problems) = list.deviations(policy.ima());
        findings.record("ima", mode, problems, "every entry of the measurement list is allowed");
    }
    findings.record("policy", Mode::Enforce, validity_problem(policy, now_seconds), "valid");
    let problems = policy.clock().problems(evidence.clock(), evidence.clock_fell_back_ms());
    findings.record("clock", Mode::Enforce, problems, "as the policy wants it");
    record_boot(policy, evidence, expected.boot, &mut findings);
    let (good, reasons, warnings) =
        (findings.are_good(), findings.sentences(Mode::Enforce), findings.sentences(Mode::Warn));
    let (deviations, rules) = findings.into_parts();
    if good {
        Appraisal::Accepted(Accepted {
            policy: *policy.digest(),
            rules,
            deviations,
            warnings,
            clock: *evidence.clock(),
            nonce: *evidence.quote().nonce(),
            ak_name: evidence.quote().ak_name().clone(),
        })
    } else {
        Appraisal::Refused(Refusal { policy: *policy.digest(), deviations, reasons, warnings })
    }
}

/// What the TPM's counts do not explain: some of it refuses the node, some is only said.
fn record_boot(policy: &Policy, evidence: &ReplayedEvidence<'_>, facts: &BootFacts, findings: &mut Findings) {
    let locality = evidence.log().startup_locality();
    let found = check_boot(policy.boot(), evidence.clock(), facts, locality);
    let (refusals, cautions): (Vec<_>, Vec<_>) = found.into_iter().partition(|finding| finding.mode == Mode::Enforce);
    let words = |found: Vec<BootFinding>| found.into_iter().map(|finding| finding.problem.to_string());
    findings.record("boot", Mode::Warn, words(cautions), "the TPM's counts are those of a boot");
    if !refusals.is_empty() {
        findings.record("boot", Mode::Enforce, words(refusals), "");
    }
}

/// That the policy judges now, if it does not.
fn validity_problem(policy: &Policy, now_seconds: i64) -> Option<String> {
    let name = policy.name();
    let early = policy.valid_from().filter(|from| now_seconds < from.unix_timestamp());
    let late = policy.valid_until().filter(|until| until.unix_timestamp() <= now_seconds);
    let early = early.map(|from| format!("policy `{name}` is not valid before {from}"));
    early.or_else(|| late.map(|until| format!("policy `{name}` was valid until {until}")))
}
