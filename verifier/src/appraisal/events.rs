//! The replayed events of each PCR against the policy's: every event is expected, or it is refused.

use super::Findings;
use crate::event_log::{Event, ReplayedLog};
use crate::evidence::ReplayedEvidence;
use crate::policy::{AllowedEvent, ExpectedEvent, Mode, PcrRule, Policy};
use crate::quote::short_hex;
use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::evidence::{AGENT_PCR, QUOTED_PCRS};

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
    let mode = |pcr: u8| policy.pcrs().iter().find(|rule| rule.index == pcr).map(|rule| rule.mode);
    let anomalies = |wanted: &[Option<Mode>]| -> Vec<String> {
        let pcrs = QUOTED_PCRS.filter(|pcr| wanted.contains(&mode(*pcr)));
        pcrs.flat_map(|pcr| log.anomalies(pcr)).map(|anomaly| anomaly.to_string()).collect()
    };
    // Where digest and type of every event are as somebody approved, a log that shows other data deceives nobody but
    // its reader; and where the policy only warns, it warns of this too.
    let problems = anomalies(&[Some(Mode::Enforce), Some(Mode::Warn)]);
    findings.record("log-shape-of-listed-pcrs", Mode::Warn, problems, "as genuine firmware writes it");
    let problems = anomalies(&[None]);
    findings.record("log-shape", Mode::Enforce, problems, "as genuine firmware writes it");
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

pub(super) fn subject(event: &Event<'_>, pcr: u8) -> String {
    let digest = event.digest(HashAlgorithm::Sha256).map_or_else(String::new, short_hex);
    format!("PCR {pcr} event {} ({}): digest {digest}", event.index(), event.kind())
}

fn digests(wanted: &ExpectedEvent) -> String {
    wanted.sha256.iter().map(|digest| short_hex(&digest.0)).collect::<Vec<_>>().join(" or ")
}

/// Reasons given for one PCR.
const MAX_PROBLEMS: usize = 8;
