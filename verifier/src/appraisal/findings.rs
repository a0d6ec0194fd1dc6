//! What appraisal found: each deviation with the rule that it breaks, the event that breaks it, what was expected and
//! what is there; for the verdict's sentences and for programs.

use crate::event_log::Event;
use crate::event_log::event_type::EventType;
use crate::policy::{EventDigest, Mode};
use crate::quote::short_hex;
use assay_tpm::algorithm::HashAlgorithm;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One deviation from a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Deviation {
    /// The rule: `pcr-4`, `secure-boot`.
    pub rule: String,
    /// Whether the node is refused for it.
    pub mode: Mode,
    /// The PCR, if it is about one.
    pub pcr: Option<u8>,
    /// The event's place in the log, if it is about one.
    pub event: Option<usize>,
    /// The event's type.
    pub event_type: Option<String>,
    /// What the policy expects: digests, names, text. Any of these.
    pub expected: Vec<String>,
    /// What is there.
    pub found: Option<String>,
    /// All of it in one sentence.
    pub sentence: String,
}

/// A deviation, before the rule that notes it is known.
#[derive(Debug, Clone, Default)]
pub(crate) struct Problem {
    pub(crate) pcr: Option<u8>,
    pub(crate) event: Option<usize>,
    pub(crate) event_type: Option<EventType>,
    pub(crate) expected: Vec<String>,
    pub(crate) found: Option<String>,
    pub(crate) sentence: String,
}

impl Problem {
    /// With this event of a PCR.
    pub(crate) fn of(pcr: u8, event: &Event<'_>, sentence: String) -> Self {
        let found = event.digest(HashAlgorithm::Sha256).map(hex::encode);
        Self {
            pcr: Some(pcr),
            event: Some(event.index()),
            event_type: Some(event.kind()),
            found,
            sentence,
            ..Self::default()
        }
    }

    /// With a PCR that lacks something.
    pub(crate) fn in_pcr(pcr: u8, sentence: String) -> Self {
        Self { pcr: Some(pcr), sentence, ..Self::default() }
    }

    /// What was expected instead.
    pub(crate) fn expecting(self, expected: Vec<String>) -> Self {
        Self { expected, ..self }
    }

    /// What is there, where that is not the event's digest.
    pub(crate) fn found(self, found: impl Into<String>) -> Self {
        Self { found: Some(found.into()), ..self }
    }
}

impl From<String> for Problem {
    fn from(sentence: String) -> Self {
        Self { sentence, ..Self::default() }
    }
}

/// What appraisal has found so far.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    deviations: Vec<Deviation>,
    pub(super) rules: BTreeMap<String, String>,
}

impl Findings {
    /// Notes what a rule came to: its problems, or `good` if it has none.
    pub(crate) fn record(
        &mut self,
        rule: &str,
        mode: Mode,
        problems: impl IntoIterator<Item = impl Into<Problem>>,
        good: &str,
    ) {
        let before = self.deviations.len();
        self.deviations.extend(problems.into_iter().map(|problem| {
            let Problem { pcr, event, event_type, expected, found, sentence } = problem.into();
            let event_type = event_type.map(|kind| kind.to_string());
            Deviation { rule: rule.to_owned(), mode, pcr, event, event_type, expected, found, sentence }
        }));
        let says = match (self.deviations.len() - before, mode) {
            (0, _) => good.to_owned(),
            (count, Mode::Warn) => format!("{count} deviations, which the policy only warns of"),
            (count, Mode::Enforce) => format!("{count} deviations"),
        };
        self.rules.insert(rule.to_owned(), says);
    }

    /// Whether nothing deviates that the policy enforces.
    pub(crate) fn are_good(&self) -> bool {
        self.deviations.iter().all(|deviation| deviation.mode == Mode::Warn)
    }

    /// The sentences of what deviates where the policy enforces, or where it only warns.
    pub(crate) fn sentences(&self, mode: Mode) -> Vec<String> {
        let deviations = self.deviations.iter().filter(|deviation| deviation.mode == mode);
        deviations.map(|deviation| deviation.sentence.clone()).collect()
    }

    pub(crate) fn into_parts(self) -> (Vec<Deviation>, BTreeMap<String, String>) {
        (self.deviations, self.rules)
    }
}

/// An event in a sentence: where it stands, what it is labelled and what was extended.
pub(crate) fn subject(event: &Event<'_>, pcr: u8) -> String {
    let digest = event.digest(HashAlgorithm::Sha256).map_or_else(String::new, short_hex);
    format!("PCR {pcr} event {} ({}): digest {digest}", event.index(), event.kind())
}

/// Digests in a sentence: a few of them.
pub(crate) fn short_digests(digests: &[EventDigest]) -> String {
    let mut shown: Vec<_> = digests.iter().take(MOST_DIGESTS).map(|digest| short_hex(&digest.0)).collect();
    if digests.len() > MOST_DIGESTS {
        shown.push(format!("{} others", digests.len() - MOST_DIGESTS));
    }
    shown.join(" or ")
}

/// Digests for programs: all of them.
pub(crate) fn all_digests(digests: &[EventDigest]) -> Vec<String> {
    digests.iter().map(ToString::to_string).collect()
}

const MOST_DIGESTS: usize = 4;
