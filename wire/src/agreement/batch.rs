//! A batch of renewals, decided in memory: what is on record in, what to record and what to answer out.

use super::{Agreement, Disagreement, Presented, Standing};
use crate::id::{AdmissionId, ProjectId};
use crate::isolation::{Renewal, RenewalOutcome};
use crate::result::VerifierKey;
use std::collections::{BTreeMap, HashMap};

/// What a batch is decided by.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Whose results renew.
    pub agreement: Agreement,
    /// The longest that one renewal lasts, in milliseconds.
    pub longest_ms: i64,
    /// The admissions that may be renewed.
    pub standing: HashMap<AdmissionId, Standing>,
    /// The keys that each project trusts.
    pub keys: HashMap<ProjectId, Vec<VerifierKey>>,
}

/// Each renewal, decided; nothing is recorded yet.
#[derive(Debug)]
pub struct Decided {
    decisions: Vec<(AdmissionId, Result<i64, Disagreement>)>,
}

impl Batch {
    /// Decides every renewal by itself.
    #[must_use]
    pub fn decide(&self, renewals: Vec<Renewal>, now_ms: i64) -> Decided {
        let decide = |renewal: Renewal| (renewal.admission, self.decide_one(renewal, now_ms));
        Decided { decisions: renewals.into_iter().map(decide).collect() }
    }

    fn decide_one(&self, renewal: Renewal, now_ms: i64) -> Result<i64, Disagreement> {
        let Renewal { admission, result, supporting } = renewal;
        let standing = self.standing.get(&admission).ok_or(Disagreement::Ended(admission))?;
        let keys = self.keys.get(&standing.subject.project).map_or(&[][..], Vec::as_slice);
        let presented = Presented::from_wire(result, supporting);
        self.agreement.renews(&presented, keys, standing, self.longest_ms, now_ms)
    }
}

impl Decided {
    /// Until when each admission is to stand: milliseconds since the Unix epoch.
    #[must_use]
    pub fn until_ms(&self) -> BTreeMap<AdmissionId, i64> {
        let mut until = BTreeMap::new();
        for (id, decision) in &self.decisions {
            if let Ok(until_ms) = decision {
                let longest = until.entry(*id).or_insert(*until_ms);
                *longest = (*longest).max(*until_ms);
            }
        }
        until
    }

    /// What to answer, in the order of the renewals: `recorded` says of which admissions it is on record that they stand
    /// longer, and until when. The others ended while this was decided.
    #[must_use]
    pub fn outcomes(
        self,
        recorded: &BTreeMap<AdmissionId, i64>,
        words: impl Fn(&Disagreement) -> String,
    ) -> Vec<RenewalOutcome> {
        let outcome = |(id, decision): (AdmissionId, Result<i64, Disagreement>)| match (decision, recorded.get(&id)) {
            (Ok(_), Some(until_ms)) => RenewalOutcome::Renewed { expires_at_ms: *until_ms },
            (Ok(_), None) => RenewalOutcome::Refused { reason: words(&Disagreement::Ended(id)) },
            (Err(refused), _) => RenewalOutcome::Refused { reason: words(&refused) },
        };
        self.decisions.into_iter().map(outcome).collect()
    }
}
