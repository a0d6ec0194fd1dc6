//! Alternatives: whole sequences of events per PCR (a release and the one before it, one hardware model and another),
//! of which one must match entirely. PCRs that name the same alternatives are one group and must agree on one, so that
//! the kernel of one release does not pass with the command line of another.

use super::claims::Claims;
use super::events::{remaining, sequence_problems};
use super::findings::{Findings, Problem};
use crate::event_log::ReplayedLog;
use crate::policy::{Alternative, Mode, PcrRule, glob};
use std::collections::BTreeSet;

/// PCRs that name the same alternatives. The policy's check saw to it that they have the same mode.
pub(super) struct Group<'a> {
    names: BTreeSet<&'a str>,
    mode: Mode,
    rules: Vec<&'a PcrRule>,
}

/// The groups of a policy.
pub(super) fn groups(rules: &[PcrRule]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for rule in rules.iter().filter(|rule| !rule.alternative.is_empty()) {
        let names: BTreeSet<_> = rule.alternative.iter().map(|alternative| alternative.name.as_str()).collect();
        match groups.iter_mut().find(|group| group.names == names) {
            Some(group) => group.rules.push(rule),
            None => groups.push(Group { names, mode: rule.mode, rules: vec![rule] }),
        }
    }
    groups
}

/// What one alternative comes to, PCR by PCR, in the order of the group's rules.
struct Trial<'a> {
    name: &'a str,
    problems: Vec<Vec<Problem>>,
}

impl Trial<'_> {
    fn count(&self) -> usize {
        self.problems.iter().map(Vec::len).sum()
    }
}

impl Group<'_> {
    /// Notes the alternative that matches; or, if none does, what the nearest one wants.
    pub(super) fn appraise(&self, log: &ReplayedLog<'_>, claims: &Claims, node: &str, findings: &mut Findings) {
        let for_node = |alternative: &&Alternative| is_for(alternative, node);
        let try_one = |name: &str| {
            let mut problems = Vec::new();
            for rule in &self.rules {
                let named = rule.alternative.iter().find(|alternative| alternative.name == name).filter(for_node)?;
                let events = remaining(rule, &named.event, log, claims);
                problems.push(sequence_problems(&named.event, &events, rule.index));
            }
            Some(problems)
        };
        let trials = self.names.iter().filter_map(|name| try_one(name).map(|problems| Trial { name, problems }));
        let trials: Vec<_> = trials.collect();
        let Some(nearest) = trials.iter().min_by_key(|trial| trial.count()) else {
            for rule in &self.rules {
                let pcr = rule.index;
                let problem =
                    Problem::in_pcr(pcr, format!("PCR {pcr}: the policy has no alternative for node `{node}`"));
                findings.record(&rule_name(rule), self.mode, [problem], "");
            }
            return;
        };
        let good = format!("every event matched alternative `{}`", nearest.name);
        for (place, rule) in self.rules.iter().enumerate() {
            let mut problems = nearest.problems[place].clone();
            if let Some(first) = problems.first_mut() {
                first.sentence.push_str(&self.nearness(nearest, &trials, place));
            }
            findings.record(&rule_name(rule), self.mode, problems, &good);
        }
    }

    /// Which alternative the sentence before speaks of, and that this PCR is another one's.
    fn nearness(&self, nearest: &Trial<'_>, trials: &[Trial<'_>], place: usize) -> String {
        match trials.iter().find(|trial| trial.problems[place].is_empty()) {
            Some(other) => format!(
                " (PCR {} is of alternative `{}`, others are of `{}`: one alternative must match entirely)",
                self.rules[place].index, other.name, nearest.name
            ),
            None => format!(" (alternative `{}`, the nearest of {})", nearest.name, trials.len()),
        }
    }
}

fn is_for(alternative: &Alternative, node: &str) -> bool {
    alternative.nodes.is_empty() || alternative.nodes.iter().any(|pattern| glob::matches(pattern, node))
}

fn rule_name(rule: &PcrRule) -> String {
    format!("pcr-{}", rule.index)
}
