//! Appraisal of a list that grows: only new entries travel, and what was seen is an [`ImaState`] of a few octets. Pure.
//!
//! ```text
//!            admission              first list of the tenant's kernel                the next one
//!  PCR 10:   a ────────────────────▶ a ⊕ boot_aggregate ⊕ e1 ⊕ … ────────────────────▶ ⊕ e9 ⊕ …
//!  ImaState::admitted(a)             advance(…) = Explained(entries = k)               Explained | Behind
//! ```
//!
//! `kexec` starts a new list while PCR 10 goes on, so the tenant's list does not explain PCR 10 from zero: it does so
//! from the value of the admitted boot. A kernel with `CONFIG_IMA_KEXEC` carries the list over; then the list passes
//! through that value, and what comes before it was appraised at the admission.

use super::judge::Judge;
use super::parse::ImaError;
use super::policy::ImaPolicy;
use super::replay::{Extension, Replay};
use super::{BOOT_AGGREGATE, Entry, IMA_PCR, Limits, MeasurementList};
use crate::quote::{PCR_COUNT, PcrValue, short_hex};
use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::evidence::{ImaList, MAX_IMA_ENTRY_BYTES, MAX_IMA_LIST_BYTES};
use serde::{Deserialize, Serialize};
use std::error::Error;

/// What was seen of a node's list since its admission.
#[serde_with::serde_as]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImaState {
    /// PCR 10 after the entries that were seen.
    #[serde_as(as = "serde_with::hex::Hex")]
    pcr10: [u8; 32],
    entries: u64,
    /// Evidence in a row whose entries did not reach the quote.
    behind: u32,
    kernel_measured: bool,
    facts: Facts,
}

/// What a policy asks of the whole list, as far as it was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Facts {
    pub(super) violations: u64,
    pub(super) policy_measured: bool,
}

impl ImaState {
    /// A node that was admitted with this PCR 10, and whose tenant's kernel has not been heard of.
    #[must_use]
    pub fn admitted(pcr10: &PcrValue) -> Self {
        Self { pcr10: *pcr10.as_bytes(), entries: 0, behind: 0, kernel_measured: false, facts: Facts::default() }
    }

    /// How many entries of the list were seen: the first that is wanted next.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// How many violations were among them.
    #[must_use]
    pub fn violations(&self) -> u64 {
        self.facts.violations
    }

    /// PCR 10 after them.
    #[must_use]
    pub fn pcr10(&self) -> PcrValue {
        PcrValue::new(self.pcr10)
    }
}

/// Where the list stands after a piece of evidence that is not bad.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advanced {
    /// The entries explain the quote.
    Explained {
        /// To go on from.
        state: ImaState,
        /// What deviated where the policy only warns.
        warnings: Vec<String>,
    },
    /// The evidence is full and there are more entries before the quote's PCR 10 is reached. **Nothing vouches for
    /// these entries yet: nothing may be renewed on them.** Ask for the next evidence at once.
    Behind {
        /// To go on from.
        state: ImaState,
        /// What deviated where the policy only warns.
        warnings: Vec<String>,
    },
}

/// Appraises what a list gained. `pcrs` are those of a verified quote; `policy` is none where entries are not judged,
/// only replayed.
///
/// # Errors
/// One sentence a reason why the node is not to be trusted any more.
pub fn advance(
    state: &ImaState,
    list: Option<&ImaList>,
    pcrs: &[PcrValue; PCR_COUNT],
    policy: Option<&ImaPolicy>,
) -> Result<Advanced, Vec<String>> {
    let quoted = pcrs[usize::from(IMA_PCR)];
    let Some(list) = list else { return without_list(state, &quoted, policy) };
    if list.first_entry != state.entries {
        return Err(vec![format!(
            "measurement list begins at entry {}, and {} were seen before: it was cut, or is another kernel's",
            list.first_entry, state.entries
        )]);
    }
    let entries = MeasurementList::binary(&list.entries, Limits::EVIDENCE).map_err(|error| vec![sentence(&error)])?;
    let straight = Walk::new(state, pcrs, policy).over(&entries, state);
    if state.entries > 0 || matches!(straight, Ok(Advanced::Explained { .. })) {
        return straight;
    }
    // The first list of a kernel, and it does not go on from the admission: it may have been carried over.
    match carried_entries(&entries, &state.pcr10, &quoted) {
        Some(carried) => Walk::after(state, pcrs, policy, carried).over(&entries, state),
        None => straight,
    }
}

/// A kernel that keeps no list extends nothing.
fn without_list(state: &ImaState, quoted: &PcrValue, policy: Option<&ImaPolicy>) -> Result<Advanced, Vec<String>> {
    let mut problems = Vec::new();
    if state.entries > 0 {
        problems.push(format!("evidence has no measurement list any more, and {} entries were seen", state.entries));
    } else if state.pcr10 != *quoted.as_bytes() {
        problems.push(format!(
            "PCR {IMA_PCR} went on from {} to {}, and evidence has no measurement list",
            short_hex(&state.pcr10),
            quoted.short()
        ));
    }
    let mut warnings = Vec::new();
    if let Some(policy) = policy {
        let missing = "the policy has a section [ima], and evidence has no measurement list".to_owned();
        policy.sort(vec![missing], &mut problems, &mut warnings);
    }
    if problems.is_empty() { Ok(Advanced::Explained { state: state.clone(), warnings }) } else { Err(problems) }
}

/// One pass over new entries.
struct Walk<'a> {
    next: ImaState,
    replay: Replay,
    pcrs: &'a [PcrValue; PCR_COUNT],
    judge: Option<Judge<'a>>,
    /// The list goes on from the admitted boot's, so that its next entry need not be a `boot_aggregate`.
    may_continue: bool,
}

impl<'a> Walk<'a> {
    fn new(state: &ImaState, pcrs: &'a [PcrValue; PCR_COUNT], policy: Option<&'a ImaPolicy>) -> Self {
        Self {
            next: state.clone(),
            replay: Replay::resume(&state.pcr10, Extension::Rehashed),
            pcrs,
            judge: policy.map(Judge::new),
            may_continue: false,
        }
    }

    /// One over a list that was carried over: what comes before was appraised at the admission, and a new kernel's
    /// `boot_aggregate` may follow.
    fn after(state: &ImaState, pcrs: &'a [PcrValue; PCR_COUNT], policy: Option<&'a ImaPolicy>, carried: u64) -> Self {
        let mut walk = Self::new(state, pcrs, policy);
        walk.next.entries = carried;
        walk.may_continue = true;
        walk
    }

    /// Walks until the entries explain the quote, or end.
    fn over(mut self, list: &MeasurementList<'_>, state: &ImaState) -> Result<Advanced, Vec<String>> {
        let quoted = &self.pcrs[usize::from(IMA_PCR)];
        let mut explained = self.next.pcr10 == *quoted.as_bytes();
        let mut entries = list.entries();
        entries.by_ref().take(usize::try_from(self.next.entries - state.entries).unwrap_or(usize::MAX)).for_each(drop);
        for entry in entries {
            if explained {
                break; // measured after the quote: the next evidence's
            }
            let entry = entry.map_err(|error| vec![sentence(&error)])?;
            self.see(&entry, state.entries + entry.index())?;
            explained = self.next.pcr10 == *quoted.as_bytes();
        }
        if explained {
            return self.explained();
        }
        if list.len() >= FULL_EVIDENCE_BYTES && state.behind < MOST_BEHIND {
            return self.behind();
        }
        Err(vec![mismatch(state, list, quoted, self.next.entries)])
    }

    /// What no policy allows ends the walk; what a policy decides is collected.
    fn see(&mut self, entry: &Entry<'_>, index: u64) -> Result<(), Vec<String>> {
        if let Some(problem) = lie(entry, index) {
            return Err(vec![problem]);
        }
        let aggregate = entry.name() == BOOT_AGGREGATE && !entry.is_violation();
        match (aggregate, self.next.kernel_measured) {
            (true, false) => boot_aggregate_problem(entry, self.pcrs).map_or(Ok(()), |problem| Err(vec![problem]))?,
            (true, true) => {
                return Err(vec![format!(
                    "measurement list, entry {index}: a second boot_aggregate: the kernel was replaced (kexec)"
                )]);
            }
            (false, false) if !self.may_continue => {
                return Err(vec![format!("measurement list begins with {entry} instead of a boot_aggregate")]);
            }
            (false, _) => {
                self.next.facts.violations += u64::from(entry.is_violation());
                if let Some(judge) = &mut self.judge {
                    judge.entry(entry, &mut self.next.facts);
                }
            }
        }
        self.next.kernel_measured = true;
        self.replay.extend(entry);
        self.next.pcr10.copy_from_slice(self.replay.value());
        self.next.entries += 1;
        Ok(())
    }

    fn explained(mut self) -> Result<Advanced, Vec<String>> {
        self.next.behind = 0;
        if let Some(judge) = &mut self.judge {
            judge.whole_list(self.next.kernel_measured, &self.next.facts);
        }
        let warnings = self.judge.map_or(Ok(Vec::new()), Judge::verdict)?;
        Ok(Advanced::Explained { state: self.next, warnings })
    }

    fn behind(mut self) -> Result<Advanced, Vec<String>> {
        self.next.behind += 1;
        let warnings = self.judge.map_or(Ok(Vec::new()), Judge::verdict)?;
        Ok(Advanced::Behind { state: self.next, warnings })
    }
}

/// What no genuine list has, whatever the policy.
pub(super) fn lie(entry: &Entry<'_>, index: u64) -> Option<String> {
    if entry.pcr() != u32::from(IMA_PCR) {
        return Some(format!("measurement list, entry {index} ({entry}), is for PCR {}, not {IMA_PCR}", entry.pcr()));
    }
    if entry.template_digest_matches() == Some(false) {
        return Some(format!("measurement list, entry {index} ({entry}): its template digest is not that of its data"));
    }
    None
}

/// The digest of PCRs 0 to 9 (Linux `security/integrity/ima/ima_crypto.c`), of which the SHA-256 bank is quoted.
pub(super) fn boot_aggregate_problem(entry: &Entry<'_>, pcrs: &[PcrValue; PCR_COUNT]) -> Option<String> {
    let octets: Vec<u8> = pcrs[..=9].iter().flat_map(|pcr| *pcr.as_bytes()).collect();
    let expected = HashAlgorithm::Sha256.digest(&octets);
    let digest = entry.file_digest()?;
    if digest.algorithm != "sha256" {
        return Some(format!("boot_aggregate is of the {} bank, and the quote of SHA-256's", digest.algorithm));
    }
    (digest.octets != expected.as_ref()).then(|| {
        format!(
            "boot_aggregate is {}, and PCRs 0 to 9 of the quote give {}",
            short_hex(digest.octets),
            short_hex(expected.as_ref())
        )
    })
}

/// How many entries a list that was carried over from the admitted boot has of that boot. PCRs 0 to 9 stay what they
/// were, so any list of a machine begins with the same `boot_aggregate`: only the quote tells whose it is.
fn carried_entries(list: &MeasurementList<'_>, admitted: &[u8; 32], quoted: &PcrValue) -> Option<u64> {
    let carried = entries_until(list, admitted)?;
    let rest = |skip: u64| list.entries().skip(usize::try_from(skip).unwrap_or(usize::MAX)).map_while(Result::ok);
    let reaches = |skip| {
        let mut replay = Replay::resume(admitted, Extension::Rehashed);
        replay.value() == quoted.as_bytes()
            || rest(skip).any(|entry| {
                replay.extend(&entry);
                replay.value() == quoted.as_bytes()
            })
    };
    let goes_on = || rest(carried).next().is_some_and(|entry| entry.name() == BOOT_AGGREGATE);
    (!reaches(0) && (reaches(carried) || goes_on())).then_some(carried)
}

/// How many entries of a list that begins at a reset come to this PCR 10.
fn entries_until(list: &MeasurementList<'_>, admitted: &[u8; 32]) -> Option<u64> {
    let mut replay = Replay::start(HashAlgorithm::Sha256, Extension::Rehashed);
    // An admitted boot measured little, so a list that was not carried over is not read twice.
    let entries = list.entries().take(MOST_CARRIED).map_while(Result::ok);
    for (index, entry) in (1u64..).zip(entries) {
        replay.extend(&entry);
        if replay.value() == admitted {
            return Some(index);
        }
    }
    None
}

/// Why the entries do not explain the quote, as far as that can be told.
fn mismatch(state: &ImaState, list: &MeasurementList<'_>, quoted: &PcrValue, seen: u64) -> String {
    let mut old = Replay::resume(&state.pcr10, Extension::ZeroPaddedSha1);
    for entry in list.entries().map_while(Result::ok) {
        old.extend(&entry);
        if old.value() == quoted.as_bytes() {
            return format!(
                "PCR {IMA_PCR} holds SHA-1 digests filled with zeros, as kernels before Linux 5.8 extend: nothing that \
                 counts vouches for this measurement list"
            );
        }
    }
    format!(
        "measurement list does not replay to the quoted PCR {IMA_PCR} ({}): its {seen} entries, {} of them new, are not \
         those that were measured, or the last are missing",
        quoted.short(),
        seen - state.entries
    )
}

/// An error with its causes, as a reason.
pub(super) fn sentence(error: &ImaError) -> String {
    let cause = error.source().map_or_else(String::new, |cause| format!(": {cause}"));
    format!("{error}{cause}")
}

/// What evidence must carry before it may end short of the quote. An agent fills its evidence until an entry does not
/// fit, and no entry is larger than this leaves.
const FULL_EVIDENCE_BYTES: usize = MAX_IMA_LIST_BYTES - MAX_IMA_ENTRY_BYTES;
/// Full evidence in a row that may end short of its quote.
const MOST_BEHIND: u32 = 64;
/// Entries of an admitted boot that a kernel may carry over.
const MOST_CARRIED: usize = 10_000;
