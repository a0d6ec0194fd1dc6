//! Appraisal: verified evidence against a policy, event by event. On the boot path: step 6, the verdict.
//!
//! [`appraise`] is the one maker of [`Accepted`], without which no attestation result is signed. Everything that is not
//! expected is refused: an unknown event, a missing one, one too many, one in another order or under another label.

use crate::event_log::data::shown;
use crate::event_log::event_type::EventType;
use crate::event_log::{Event, ReplayedLog};
use crate::evidence::ReplayedEvidence;
use crate::policy::{AllowedEvent, ExpectedEvent, Mode, PcrRule, Policy, PolicyDigest};
use crate::quote::{ClockInfo, short_hex};
use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::name::Name;
use assay_wire::agent::AgentSettings;
use assay_wire::evidence::{AGENT_PCR, MeasurementKind, QUOTED_PCRS};
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
    let expired = policy.valid_until().filter(|until| until.unix_timestamp() <= now_seconds);
    let expired = expired.map(|until| format!("policy `{}` was valid until {until}", policy.name()));
    findings.record("policy", Mode::Enforce, expired.into_iter().collect(), "valid");
    if policy.requires_safe_clock() {
        let unsafe_clock = "the TPM's clock is not safe: the machine lost power, and its clock may have gone back";
        let problems = if evidence.clock().safe { Vec::new() } else { vec![unsafe_clock.to_owned()] };
        findings.record("clock", Mode::Enforce, problems, "safe");
    }
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

/// Everything that firmware and boot loaders measured; without the agent's own PCR.
pub(crate) fn appraise_firmware(policy: &Policy, evidence: &ReplayedEvidence<'_>) -> Findings {
    let mut findings = Findings::default();
    let log = evidence.log();
    for pcr in QUOTED_PCRS.filter(|pcr| *pcr != AGENT_PCR) {
        match policy.pcrs().iter().find(|rule| rule.index == pcr) {
            Some(rule) => {
                let problems = rule_problems(rule, log);
                findings.record(&format!("pcr-{pcr}"), rule.mode, problems, "every event matched");
            }
            None => findings.record(&format!("pcr-{pcr}"), Mode::Enforce, Vec::new(), "replayed, not enforced"),
        }
    }
    let enforced = |pcr: u8| policy.pcrs().iter().any(|rule| rule.index == pcr && rule.mode == Mode::Enforce);
    // A PCR that is enforced event by event needs no check of its frame; a reason given once is enough.
    let problems = SEPARATED_PCRS.filter(|pcr| !enforced(*pcr)).flat_map(|pcr| frame_problems(pcr, log)).collect();
    findings.record("separators", Mode::Enforce, problems, "one in each of PCRs 0 to 7");
    findings
}

/// The PCR's events against the rule's, in order.
fn rule_problems(rule: &PcrRule, log: &ReplayedLog<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    let mut expected = rule.event.iter();
    let mut last = None;
    for event in log.events_of(rule.index) {
        if rule.allow.iter().any(|allowed| is_allowed(allowed, event)) {
            continue;
        }
        match expected.next() {
            Some(wanted) => {
                problems.extend(difference(wanted, event, rule.index));
                last = Some(&wanted.description);
            }
            None => {
                let after = last.map_or_else(|| "at all".to_owned(), |last| format!("after `{last}`"));
                problems
                    .push(format!("{} is not expected: the policy has no event {after}", subject(event, rule.index)));
            }
        }
    }
    problems.extend(expected.map(|wanted| {
        format!("PCR {}: `{}` was not measured: expected {}", rule.index, wanted.description, digests(wanted))
    }));
    let more = problems.len().saturating_sub(MAX_PROBLEMS);
    problems.truncate(MAX_PROBLEMS);
    if more > 0 {
        problems.push(format!("PCR {}: and {more} more deviations", rule.index));
    }
    problems
}

/// Known by its data alone: the digest that was extended must be of the policy's own text, so what the log shows as
/// data does not matter.
fn is_allowed(allowed: &AllowedEvent, event: &Event<'_>) -> bool {
    let digest = HashAlgorithm::Sha256.digest(allowed.data.as_bytes());
    event.kind() == allowed.kind && event.digest(HashAlgorithm::Sha256) == Some(digest.as_ref())
}

fn difference(wanted: &ExpectedEvent, event: &Event<'_>, pcr: u8) -> Option<String> {
    let digest = event.digest(HashAlgorithm::Sha256);
    if !wanted.sha256.iter().any(|known| digest == Some(&known.0)) {
        let shows = event.decoded_data();
        return Some(format!(
            "{} is not `{}`: expected {} (the log says: {shows})",
            subject(event, pcr),
            wanted.description,
            digests(wanted)
        ));
    }
    // The digest is right and the label is not: somebody kept the log who should not have.
    (event.kind() != wanted.kind).then(|| {
        format!("{} is `{}` under a wrong label: expected {}", subject(event, pcr), wanted.description, wanted.kind)
    })
}

fn subject(event: &Event<'_>, pcr: u8) -> String {
    let digest = event.digest(HashAlgorithm::Sha256).map_or_else(String::new, short_hex);
    format!("PCR {pcr} event {} ({}): digest {digest}", event.index(), event.kind())
}

fn digests(wanted: &ExpectedEvent) -> String {
    wanted.sha256.iter().map(|digest| short_hex(&digest.0)).collect::<Vec<_>>().join(" or ")
}

/// What holds for the frame of any PCR of firmware (PFP 1.06, section 10.4.4): one separator, which says that firmware
/// met no error, and in PCR 7 no configuration after it.
fn frame_problems(pcr: u8, log: &ReplayedLog<'_>) -> Vec<String> {
    let mut separators = 0;
    let mut problems = Vec::new();
    for event in log.events_of(pcr) {
        match event.kind() {
            EventType::SEPARATOR => {
                separators += 1;
                if !matches!(event.measured_data(), Some([0, 0, 0, 0] | [0xff, 0xff, 0xff, 0xff])) {
                    problems.push(format!("{} is not a separator's, or of a firmware error", subject(event, pcr)));
                }
            }
            EventType::EFI_VARIABLE_DRIVER_CONFIG if pcr == 7 && separators > 0 => {
                problems.push(format!("{} is Secure Boot configuration after the separator", subject(event, pcr)));
            }
            _ => {}
        }
    }
    if separators != 1 {
        problems.push(format!("PCR {pcr} has {separators} separators instead of one"));
    }
    problems
}

/// The agent's PCR: its settings, once, as this verifier would have said them, and nothing else.
fn settings_problems(evidence: &ReplayedEvidence<'_>, expected: &AgentSettings) -> Vec<String> {
    let mut problems: Vec<_> = evidence
        .log()
        .events_of(AGENT_PCR)
        .map(|event| format!("{} is not expected: this PCR is the agent's", subject(event, AGENT_PCR)))
        .collect();
    match evidence.measurements() {
        [measurement] => match measurement.kind {
            MeasurementKind::AgentSettings => problems.extend(settings_difference(&measurement.data, expected)),
        },
        others => {
            problems.push(format!("PCR {AGENT_PCR}: the agent measured {} documents instead of one", others.len()));
        }
    }
    problems
}

fn settings_difference(measured: &[u8], expected: &AgentSettings) -> Vec<String> {
    let Ok(settings) = serde_json::from_slice::<AgentSettings>(measured) else {
        return vec![format!("PCR {AGENT_PCR}: what the agent measured as its settings are none")];
    };
    let fields = [
        ("node", settings.node.as_str(), expected.node.as_str()),
        ("verifier", &settings.verifier, &expected.verifier),
        ("verifier_key_sha256", &settings.verifier_key_sha256, &expected.verifier_key_sha256),
    ];
    let differs = fields.into_iter().filter(|(_, measured, expected)| measured != expected);
    differs
        .map(|(field, measured, expected)| {
            format!("PCR {AGENT_PCR}: the agent was told {field} `{}`, not `{expected}`", shown(measured))
        })
        .collect()
}

/// PCRs that firmware closes with a separator.
const SEPARATED_PCRS: std::ops::RangeInclusive<u8> = 0..=7;
/// Reasons given for one PCR.
const MAX_PROBLEMS: usize = 8;
