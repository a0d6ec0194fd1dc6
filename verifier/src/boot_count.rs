//! How many boots the TPM has seen, and how many the machine: attack rows B11 and B12. A TPM that was reset without its
//! machine (by an interposer on its bus, by software that pulls its reset line) has PCRs that software may fill with
//! what a good boot would have measured; one that resumed from sleep may have lost its PCRs without a boot
//! (CVE-2018-6622). Neither shows in a PCR. What shows is the TPM's reset and restart counts, which it signs in every
//! quote, beside what isolation's BMC knows of the machine. Pure: values in, findings out.
//!
//! | seen | means |
//! |---|---|
//! | restarts since the last reset | the machine resumed from sleep: no boot through the airlock does |
//! | a reset within one boot | PCRs were filled again without the machine's reset |
//! | no reset in a new boot | isolation ordered a power cycle, and this TPM had none: it is another machine's, or the BMC lies |
//! | more resets than the machine had | as within one boot; how many one boot takes is the firmware's business, so a policy says |
//! | another startup locality than the policy's | PCR 0 began elsewhere than this model's firmware begins it |
//!
//! What is found holds for all of a boot: each of its quotes is compared with the first of them and with the last of the
//! boot before, so that a boot which was refused is refused however often it asks.
//!
//! After a tenant has had the machine the last rule but one only warns: a tenant may reset its machine as often as it
//! likes once its port is fenced, and nobody counts.

use crate::policy::Mode;
use crate::quote::ClockInfo;
use assay_wire::id::BootId;
use serde::{Deserialize, Serialize};

/// What a policy wants of boots, its table `[boot]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BootRule {
    /// Whether a TPM that was restarted since its last reset, as by resume from sleep, is accepted.
    pub allow_resume: bool,
    /// How many TPM resets one reset of the machine may take: more than one where firmware resets itself on its way.
    pub most_tpm_resets: u32,
    /// The locality of `TPM2_Startup` that the model's firmware uses: 0, 3 or 4. None: any that replays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub startup_locality: Option<u8>,
}

impl Default for BootRule {
    fn default() -> Self {
        Self { allow_resume: false, most_tpm_resets: 1, startup_locality: None }
    }
}

impl BootRule {
    /// Whether nothing is said.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A boot as isolation knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// Which.
    pub id: BootId,
    /// Resets of the machine so far that isolation ordered or its BMC reported; none if isolation does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_resets: Option<u64>,
}

/// The last verified quote of the same TPM in the boot before, and which that was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastQuote {
    /// The TPM's counters then.
    pub clock: ClockInfo,
    /// The boot that it was of.
    pub boot: Boot,
    /// Whether a tenant has had the machine since.
    pub released: bool,
}

/// What the TPM's counts in a quote are held against, as it was known when the quote came. Kept beside the verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootFacts {
    /// The boot that the quote is of.
    pub boot: Boot,
    /// The TPM's counters in the first verified quote of this same boot; none if this is the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_clock: Option<ClockInfo>,
    /// The last quote of the boot before; none if there was none, or it is older than boots are counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_quote: Option<LastQuote>,
}

impl BootFacts {
    /// Of a boot of which nothing more is known, by a TPM of which nothing was known before.
    #[must_use]
    pub fn first(boot: BootId) -> Self {
        Self { boot: Boot { id: boot, machine_resets: None }, first_clock: None, last_quote: None }
    }
}

/// Something that the counts do not explain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootProblem {
    /// The TPM resumed.
    #[error(
        "the TPM was restarted {restarts} times since its reset: the machine resumed from sleep, and its PCRs are not \
         those of a boot"
    )]
    Resumed {
        /// How many times.
        restarts: u32,
    },
    /// The TPM was reset and the machine was not.
    #[error(
        "the TPM was reset {resets} times within one boot, of which isolation knows nothing: its PCRs may be software's"
    )]
    ResetWithinBoot {
        /// How many times.
        resets: u32,
    },
    /// The machine was reset and the TPM was not.
    #[error(
        "isolation ordered a new boot, and the TPM was not reset since the quote before: it is not the TPM of the \
         machine that was powered on, or the BMC did not power it off"
    )]
    NotReset,
    /// More TPM resets than resets of the machine explain.
    #[error(
        "the TPM was reset {tpm} times and the machine {machine} times since the quote before: its PCRs may be \
         software's (the policy's [boot] most_tpm_resets is {most})"
    )]
    TooManyResets {
        /// The TPM's.
        tpm: u32,
        /// The machine's, as far as isolation knows.
        machine: u64,
        /// What the policy allows for one of the machine's.
        most: u32,
    },
    /// Isolation has forgotten resets.
    #[error("isolation's count of the machine's resets went back from {before} to {now}: it cannot be compared")]
    CountWentBack {
        /// Its last value.
        before: u64,
        /// Its value now.
        now: u64,
    },
    /// PCR 0 began elsewhere.
    #[error("PCR 0 began at startup locality {found}, and the policy's [boot] startup_locality is {expected}")]
    StartupLocality {
        /// As the policy says.
        expected: u8,
        /// As the log says, and PCR 0 confirms.
        found: u8,
    },
}

/// A problem, and what it means for the verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFinding {
    /// What the counts do not explain.
    pub problem: BootProblem,
    /// Whether the node is refused for it.
    pub mode: Mode,
}

/// Holds the TPM's counts against what isolation knows of the machine. `clock` is of a verified quote of the boot that
/// `facts` are about, and `startup_locality` of the log that replayed to it.
#[must_use]
pub fn check_boot(rule: &BootRule, clock: &ClockInfo, facts: &BootFacts, startup_locality: u8) -> Vec<BootFinding> {
    let BootFacts { boot, first_clock, last_quote } = facts;
    let mut findings = Vec::new();
    let mut find = |mode, problem| findings.push(BootFinding { problem, mode });
    if clock.restart_count > 0 && !rule.allow_resume {
        find(Mode::Enforce, BootProblem::Resumed { restarts: clock.restart_count });
    }
    if let Some(expected) = rule.startup_locality.filter(|expected| *expected != startup_locality) {
        find(Mode::Enforce, BootProblem::StartupLocality { expected, found: startup_locality });
    }
    // Counts that went back were refused with the quote's clock.
    let since = |earlier: &ClockInfo| clock.reset_count.saturating_sub(earlier.reset_count);
    if let Some(resets) = first_clock.as_ref().map(since).filter(|resets| *resets > 0) {
        find(Mode::Enforce, BootProblem::ResetWithinBoot { resets });
    }
    let Some(last) = last_quote else { return findings };
    let resets = since(&last.clock);
    if resets == 0 {
        find(Mode::Enforce, BootProblem::NotReset);
    }
    if let (Some(before), Some(now)) = (last.boot.machine_resets, boot.machine_resets) {
        match now.checked_sub(before) {
            // Its database may have been restored: that is no attack of this node's.
            None => find(Mode::Warn, BootProblem::CountWentBack { before, now }),
            Some(machine) if u64::from(resets) > machine.saturating_mul(rule.most_tpm_resets.into()) => {
                let mode = if last.released { Mode::Warn } else { Mode::Enforce };
                find(mode, BootProblem::TooManyResets { tpm: resets, machine, most: rule.most_tpm_resets });
            }
            Some(_) => {}
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: ClockInfo =
        ClockInfo { clock_ms: 1000, reset_count: 5, restart_count: 0, safe: true, firmware_version: 7 };

    fn boot(machine_resets: u64) -> Boot {
        Boot { id: BootId::random(), machine_resets: Some(machine_resets) }
    }

    fn after(last: &LastQuote, resets: u32, boot: &Boot) -> Vec<BootFinding> {
        let clock = ClockInfo { reset_count: CLOCK.reset_count + resets, ..CLOCK };
        let facts = BootFacts { boot: *boot, first_clock: None, last_quote: Some(*last) };
        check_boot(&BootRule::default(), &clock, &facts, 0)
    }

    fn enforced(findings: &[BootFinding]) -> Vec<&BootProblem> {
        findings.iter().filter(|finding| finding.mode == Mode::Enforce).map(|finding| &finding.problem).collect()
    }

    #[test]
    fn b11_a_tpm_reset_within_a_boot_is_refused() {
        let facts = BootFacts { boot: boot(2), first_clock: Some(CLOCK), last_quote: None };
        let after = |resets, facts: &BootFacts| {
            let clock = ClockInfo { reset_count: CLOCK.reset_count + resets, ..CLOCK };
            check_boot(&BootRule::default(), &clock, facts, 0)
        };
        assert_eq!(after(0, &facts), []);
        assert_eq!(enforced(&after(2, &facts)), [&BootProblem::ResetWithinBoot { resets: 2 }]);
        // Nor does a release before it excuse it, which excuses resets between two boots.
        let clock = ClockInfo { reset_count: CLOCK.reset_count - 1, ..CLOCK };
        let last_quote = Some(LastQuote { clock, boot: boot(1), released: true });
        let released = BootFacts { last_quote, ..facts };
        assert_eq!(after(0, &released), []);
        assert_eq!(enforced(&after(1, &released)), [&BootProblem::ResetWithinBoot { resets: 1 }]);
    }

    #[test]
    fn b11_a_new_boot_without_a_tpm_reset_is_refused() {
        let last = LastQuote { clock: CLOCK, boot: boot(1), released: true };
        assert_eq!(enforced(&after(&last, 0, &boot(2))), [&BootProblem::NotReset]);
        assert_eq!(after(&last, 1, &boot(2)), []);
    }

    #[test]
    fn b11_more_tpm_resets_than_boots_are_refused_or_said_after_a_tenant() {
        let last = LastQuote { clock: CLOCK, boot: boot(10), released: false };
        let too_many = BootProblem::TooManyResets { tpm: 4, machine: 3, most: 1 };
        // Boots that came to nothing count as well.
        assert_eq!(after(&last, 3, &boot(13)), []);
        assert_eq!(enforced(&after(&last, 4, &boot(13))), [&too_many]);
        let released = LastQuote { released: true, ..last };
        assert_eq!(after(&released, 4, &boot(13)), [BootFinding { problem: too_many, mode: Mode::Warn }]);
        // Firmware that resets itself on its way has a policy that says so.
        let twice = BootRule { most_tpm_resets: 2, ..BootRule::default() };
        let clock = ClockInfo { reset_count: CLOCK.reset_count + 6, ..CLOCK };
        let facts = BootFacts { boot: boot(13), first_clock: None, last_quote: Some(last) };
        assert_eq!(check_boot(&twice, &clock, &facts, 0), []);
    }

    #[test]
    fn a_count_of_isolations_that_is_unknown_or_went_back_refuses_nobody() {
        let last = LastQuote { clock: CLOCK, boot: boot(10), released: false };
        let unknown = Boot { machine_resets: None, ..boot(0) };
        assert_eq!(after(&last, 9, &unknown), []);
        let back = after(&last, 9, &boot(3));
        let problem = BootProblem::CountWentBack { before: 10, now: 3 };
        assert_eq!(back, [BootFinding { problem, mode: Mode::Warn }]);
    }

    #[test]
    fn b12_a_tpm_that_resumed_is_refused() {
        let (resumed, first) = (ClockInfo { restart_count: 1, ..CLOCK }, BootFacts::first(BootId::random()));
        let findings = check_boot(&BootRule::default(), &resumed, &first, 0);
        assert_eq!(enforced(&findings), [&BootProblem::Resumed { restarts: 1 }]);
        let allowed = BootRule { allow_resume: true, ..BootRule::default() };
        assert_eq!(check_boot(&allowed, &resumed, &first, 0), []);
    }

    #[test]
    fn b12_another_startup_locality_than_the_policys_is_refused() {
        let locality = |expected| BootRule { startup_locality: expected, ..BootRule::default() };
        let check = |rule: &BootRule| check_boot(rule, &CLOCK, &BootFacts::first(BootId::random()), 3);
        assert_eq!(check(&locality(None)), []);
        assert_eq!(check(&locality(Some(3))), []);
        let findings = check(&locality(Some(0)));
        assert_eq!(enforced(&findings), [&BootProblem::StartupLocality { expected: 0, found: 3 }]);
    }
}
