//! The replayed events of each PCR against the policy's: every event is expected, or it is refused.

use super::alternatives::groups;
use super::claims::Claims;
use super::findings::{Findings, Problem, all_digests, short_digests, subject};
use super::rules::named_rules;
use super::varying::may_vary;
use crate::event_log::anomaly::Anomaly;
use crate::event_log::{Event, ReplayedLog};
use crate::evidence::ReplayedEvidence;
use crate::policy::{AllowedEvent, ExpectedEvent, Mode, PcrRule, Policy};
use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::evidence::{AGENT_PCR, QUOTED_PCRS};

/// Everything that firmware and boot loaders measured; without the agent's own PCR. `node` chooses among alternatives.
pub(crate) fn appraise_firmware(policy: &Policy, evidence: &ReplayedEvidence<'_>, node: &str) -> Findings {
    let mut findings = Findings::default();
    let log = evidence.log();
    let mut claims = Claims::default();
    named_rules(policy.file(), log, &mut claims, &mut findings);
    let listed = |pcr: u8| policy.pcrs().iter().find(|rule| rule.index == pcr);
    for pcr in QUOTED_PCRS.filter(|pcr| *pcr != AGENT_PCR) {
        let rule = format!("pcr-{pcr}");
        match listed(pcr) {
            Some(listed) if !listed.alternative.is_empty() => {} // with its group, below
            Some(listed) => {
                let problems = sequence_problems(&listed.event, &remaining(listed, &listed.event, log, &claims), pcr);
                findings.record(&rule, listed.mode, problems, "every event matched");
            }
            None => findings.record(&rule, Mode::Enforce, Vec::<Problem>::new(), "replayed, not enforced"),
        }
    }
    for group in groups(policy.pcrs()) {
        group.appraise(log, &claims, node, &mut findings);
    }
    let mode = |pcr: u8| listed(pcr).map(|rule| rule.mode);
    let anomalies = |wanted: &[Option<Mode>]| -> Vec<Problem> {
        let pcrs = QUOTED_PCRS.filter(|pcr| wanted.contains(&mode(*pcr)));
        pcrs.flat_map(|pcr| log.anomalies(pcr)).map(|anomaly| abnormal(&anomaly)).collect()
    };
    // Where digest and type of every event are as somebody approved, a log that shows other data deceives nobody but
    // its reader; and where the policy only warns, it warns of this too.
    let problems = anomalies(&[Some(Mode::Enforce), Some(Mode::Warn)]);
    findings.record("log-shape-of-listed-pcrs", Mode::Warn, problems, "as genuine firmware writes it");
    let problems = anomalies(&[None]);
    findings.record("log-shape", Mode::Enforce, problems, "as genuine firmware writes it");
    findings
}

/// The events of the rule's PCR that must be in `list`: those that no named rule decided on, unless the list has them
/// all the same, and that may not just occur.
pub(super) fn remaining<'l, 'a>(
    rule: &PcrRule,
    list: &[ExpectedEvent],
    log: &'l ReplayedLog<'a>,
    claims: &Claims,
) -> Vec<&'l Event<'a>> {
    let passes = |event: &Event<'_>| {
        rule.allow.iter().any(|allowed| is_allowed(allowed, event))
            || rule.varying.iter().any(|varying| may_vary(varying, event))
            || (claims.has(event) && !list.iter().any(|wanted| is(wanted, event)))
    };
    log.events_of(rule.index).filter(|event| !passes(event)).collect()
}

/// `events` against the list, in order. Good means no problem: each event is the next expected one, and none is left
/// over on either side. Where they part, what follows is lined up again, so that one event more is one sentence.
pub(super) fn sequence_problems(list: &[ExpectedEvent], events: &[&Event<'_>], pcr: u8) -> Vec<Problem> {
    let (mut wanted, mut found) = (list, events);
    let mut problems = Vec::new();
    let mut last: Option<&ExpectedEvent> = None;
    while let ([next, later @ ..], [event, following @ ..]) = (wanted, found) {
        if !is(next, event) && problems.len() < MAX_PROBLEMS {
            if let Some(missing) = later.iter().position(|later| is(later, event)) {
                problems.extend(wanted[..=missing].iter().map(|wanted| not_measured(wanted, pcr)));
                wanted = &wanted[missing + 1..];
                continue;
            }
            if following.iter().any(|following| is(next, following)) {
                problems.push(not_expected(event, last, pcr));
                found = following;
                continue;
            }
        }
        problems.extend(difference(next, event, pcr));
        last = Some(next);
        (wanted, found) = (later, following);
    }
    problems.extend(found.iter().map(|event| not_expected(event, last, pcr)));
    problems.extend(wanted.iter().map(|wanted| not_measured(wanted, pcr)));
    shortened(problems, pcr)
}

fn shortened(mut problems: Vec<Problem>, pcr: u8) -> Vec<Problem> {
    let more = problems.len().saturating_sub(MAX_PROBLEMS);
    problems.truncate(MAX_PROBLEMS);
    if more > 0 {
        problems.push(Problem::in_pcr(pcr, format!("PCR {pcr}: and {more} more deviations")));
    }
    problems
}

/// Whether the event is the expected one by what was extended; its label is looked at apart.
fn is(wanted: &ExpectedEvent, event: &Event<'_>) -> bool {
    let digest = event.digest(HashAlgorithm::Sha256);
    wanted.sha256.iter().any(|known| digest == Some(&known.0))
}

fn not_measured(wanted: &ExpectedEvent, pcr: u8) -> Problem {
    let ExpectedEvent { description, sha256, .. } = wanted;
    let sentence = format!("PCR {pcr}: `{description}` was not measured: expected {}", short_digests(sha256));
    Problem { event_type: Some(wanted.kind), ..Problem::in_pcr(pcr, sentence).expecting(all_digests(sha256)) }
}

fn not_expected(event: &Event<'_>, last: Option<&ExpectedEvent>, pcr: u8) -> Problem {
    let after = last.map_or_else(|| "at all".to_owned(), |last| format!("after `{}`", last.description));
    Problem::of(pcr, event, format!("{} is not expected: the policy has no event {after}", subject(event, pcr)))
}

fn difference(wanted: &ExpectedEvent, event: &Event<'_>, pcr: u8) -> Option<Problem> {
    let ExpectedEvent { description, sha256, kind } = wanted;
    let subject = || subject(event, pcr);
    let sentence = if !is(wanted, event) {
        let (expected, shows) = (short_digests(sha256), event.decoded_data());
        format!("{} is not `{description}`: expected {expected} (the log says: {shows})", subject())
    } else if event.kind() != *kind {
        // The digest is right and the label is not: somebody kept the log who should not have.
        format!("{} is `{description}` under a wrong label: expected {kind}", subject())
    } else {
        return None;
    };
    Some(Problem::of(pcr, event, sentence).expecting(all_digests(sha256)))
}

/// Known by its data alone: the digest that was extended must be of the policy's own text, so what the log shows as
/// data does not matter.
fn is_allowed(allowed: &AllowedEvent, event: &Event<'_>) -> bool {
    event.kind() == allowed.kind && {
        let digest = HashAlgorithm::Sha256.digest(allowed.data.as_bytes());
        event.digest(HashAlgorithm::Sha256) == Some(digest.as_ref())
    }
}

fn abnormal(anomaly: &Anomaly) -> Problem {
    Problem { event: anomaly.event, ..Problem::in_pcr(anomaly.pcr, anomaly.to_string()) }
}

/// Reasons given for one PCR.
const MAX_PROBLEMS: usize = 8;
