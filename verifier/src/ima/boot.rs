//! The list of the agent's own kernel, in the evidence of a boot: from its first entry and from a PCR 10 of zero. Without
//! a section `[ima]` in the policy it may hold nothing but the `boot_aggregate`.

use super::judge::Judge;
use super::parse::ImaError;
use super::policy::ImaPolicy;
use super::replay::{Extension, Replay, sha256_extension};
use super::state::{Facts, boot_aggregate_problem, lie};
use super::{BOOT_AGGREGATE, Entry, IMA_PCR, Limits, MeasurementList};
use crate::event_log::LaterExtension;
use crate::policy::Mode;
use crate::quote::{PCR_COUNT, PcrValue};
use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::evidence::ImaList;

/// A list whose entries explain the quoted PCR 10, from the first to the last that was quoted.
#[derive(Debug, Clone)]
pub struct BootList<'a> {
    list: MeasurementList<'a>,
    extended: Vec<[u8; 32]>,
}

impl<'a> BootList<'a> {
    /// Replays `list` to the PCR 10 of a verified quote.
    ///
    /// # Errors
    /// The list is not whole, lies, does not begin with the `boot_aggregate` of these PCRs, or does not reach PCR 10.
    pub fn replay(list: &'a ImaList, pcrs: &[PcrValue; PCR_COUNT]) -> Result<Self, ImaError> {
        let unexplained = |problem| Err(ImaError::Unexplained { problem });
        if list.first_entry != 0 {
            return unexplained(format!("begins at entry {} instead of the first", list.first_entry));
        }
        let list = MeasurementList::binary(&list.entries, Limits::EVIDENCE)?;
        let quoted = pcrs[usize::from(IMA_PCR)];
        let mut replay = Replay::start(HashAlgorithm::Sha256, Extension::Rehashed);
        let mut extended = Vec::new();
        let mut entries = list.entries();
        while replay.value() != quoted.as_bytes() {
            let Some(entry) = entries.next().transpose()? else {
                return unexplained(format!("does not replay to the quoted PCR {IMA_PCR} ({})", quoted.short()));
            };
            let aggregate = entry.name() == BOOT_AGGREGATE && !entry.is_violation();
            let problem = lie(&entry, entry.index()).or_else(|| match (entry.index(), aggregate) {
                (0, true) => boot_aggregate_problem(&entry, pcrs),
                (0, false) => Some(format!("begins with {entry} instead of a boot_aggregate")),
                (_, true) => Some("has a second boot_aggregate".to_owned()),
                (_, false) => None,
            });
            if let Some(problem) = problem {
                return unexplained(problem);
            }
            replay.extend(&entry);
            extended.push(sha256_extension(&entry));
        }
        Ok(Self { list, extended })
    }

    /// What the kernel extended into PCR 10.
    pub fn extensions(&self) -> impl Iterator<Item = LaterExtension> {
        self.extended.iter().map(|digest| LaterExtension { pcr: IMA_PCR, digest: *digest })
    }

    /// The entries that the quote covers.
    fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        self.list.entries().map_while(Result::ok).take(self.extended.len())
    }

    /// What deviates from the policy, and what that means.
    #[must_use]
    pub fn deviations(&self, policy: Option<&ImaPolicy>) -> (Mode, Vec<String>) {
        let measured = self.entries().skip(1);
        match policy {
            Some(policy) => {
                let mut judge = Judge::new(policy);
                // The policy is the tenant's kernel's, which is not running yet.
                let mut facts = Facts { policy_measured: true, ..Facts::default() };
                measured.for_each(|entry| judge.entry(&entry, &mut facts));
                (policy.mode, judge.problems())
            }
            None => {
                let first: Vec<_> = measured
                    .take(1)
                    .map(|entry| {
                        format!(
                            "PCR {IMA_PCR}: the agent's kernel measured {} files, {entry} first, and the policy has no \
                             section [ima]",
                            self.extended.len() - 1
                        )
                    })
                    .collect();
                (Mode::Enforce, first)
            }
        }
    }
}
