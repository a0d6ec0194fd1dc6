//! What evidence at run time means for an admission that stands. Pure: what was admitted, what was seen last, what came
//! and the time go in; one [`Decision`] comes out.
//!
//! The boot is over: PCRs 0 to 9 and 11 to 14 must be what they were when the node was admitted, and the TPM must not
//! have been reset or restarted since. Only PCR 10 moves on, as the kernel's runtime measurement list explains
//! ([`crate::ima`]).

use crate::evidence::pcr_values;
use crate::ima::{self, Advanced, IMA_PCR, ImaState};
use crate::policy::Policy;
use crate::quote::{AkPublic, ClockInfo, PCR_COUNT, PcrValue, QuoteError, UnverifiedQuote, verify_quote};
use crate::session::Nonce;
use crate::tee::{self, Collateral};
use assay_service::error::chain;
use assay_wire::evidence::{QUOTED_PCRS, RuntimeEvidence};

/// What was admitted: the evidence at run time is compared with this.
#[derive(Debug, Clone)]
pub struct Baseline {
    /// The key that the node attests with.
    pub ak: AkPublic,
    /// The PCRs of the evidence that admitted it.
    pub pcrs: [PcrValue; PCR_COUNT],
    /// The TPM's clock then.
    pub clock: ClockInfo,
}

/// What was seen last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The TPM's clock.
    pub clock: ClockInfo,
    /// How much of the runtime measurement list.
    pub ima: ImaState,
}

/// What came, with what it must answer.
#[derive(Debug, Clone, Copy)]
pub struct RuntimeCase<'a> {
    /// What was admitted.
    pub baseline: &'a Baseline,
    /// What was seen last.
    pub seen: &'a Seen,
    /// The nonce that is out.
    pub nonce: &'a Nonce,
    /// What came.
    pub evidence: &'a RuntimeEvidence,
    /// The policy that judges; the one under which the boot evidence is good, too.
    pub policy: &'a Policy,
    /// What quotes of trusted execution environments are verified with.
    pub tee_collateral: &'a Collateral,
    /// Now, in seconds since the Unix epoch.
    pub now_seconds: i64,
}

/// What follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The admission goes on.
    Renew {
        /// What is seen now.
        seen: Seen,
        /// What is tolerated, but should be looked at.
        warnings: Vec<String>,
    },
    /// Good so far, but the list is longer than one piece of evidence: nothing is renewed before its end is seen.
    GoOn {
        /// What is seen now.
        seen: Seen,
        /// What is tolerated, but should be looked at.
        warnings: Vec<String>,
    },
    /// A good quote, but not of this moment: nothing is renewed by it, and nothing is ended.
    Stale,
    /// Nothing is wrong with the node, but nobody can vouch for it now. The admission ends by itself unless that changes.
    Withhold(String),
    /// The admission must end, for these reasons.
    Revoke(Vec<String>),
}

/// Decides on evidence at run time.
#[must_use]
pub fn appraise_runtime(case: &RuntimeCase<'_>) -> Decision {
    if let Some(until) = case.policy.valid_until().filter(|until| until.unix_timestamp() <= case.now_seconds) {
        return Decision::Withhold(format!("policy `{}` was valid until {until}", case.policy.name()));
    }
    let pcrs = match pcr_values(&case.evidence.pcrs) {
        Ok(pcrs) => pcrs,
        Err(error) => return Decision::Revoke(error.reasons()),
    };
    let unverified =
        UnverifiedQuote { attest: &case.evidence.attest, signature: &case.evidence.signature, pcrs: &pcrs };
    let quote = match verify_quote(&unverified, &case.baseline.ak, case.nonce.as_bytes()) {
        Ok(quote) => quote,
        Err(QuoteError::Nonce) => return Decision::Stale,
        Err(error) => return Decision::Revoke(vec![format!("verifying the quote: {}", chain(&error))]),
    };
    let mut reasons = clock_problems(&case.baseline.clock, &case.seen.clock, quote.clock());
    reasons.extend(pcr_problems(&case.baseline.pcrs, quote.pcrs()));
    let bound = tee::report_data(quote.nonce(), quote.ak_name());
    let (rules, quotes) = (case.policy.tee(), &case.evidence.tee);
    reasons.extend(tee::deviations(rules, quotes, case.tee_collateral, &bound, case.now_seconds));
    let clock = *quote.clock();
    match ima::advance(&case.seen.ima, case.evidence.ima.as_ref(), quote.pcrs(), case.policy.ima()) {
        Ok(_) if !reasons.is_empty() => Decision::Revoke(reasons),
        Ok(Advanced::Explained { state, warnings }) => Decision::Renew { seen: Seen { clock, ima: state }, warnings },
        Ok(Advanced::Behind { state, warnings }) => Decision::GoOn { seen: Seen { clock, ima: state }, warnings },
        Err(problems) => {
            reasons.extend(problems);
            Decision::Revoke(reasons)
        }
    }
}

/// Every PCR that nothing may extend once the node is admitted.
fn pcr_problems(admitted: &[PcrValue; PCR_COUNT], now: &[PcrValue; PCR_COUNT]) -> Vec<String> {
    let unmoved = QUOTED_PCRS.filter(|pcr| *pcr != IMA_PCR).map(usize::from);
    let moved = unmoved.filter(|pcr| admitted[*pcr] != now[*pcr]);
    moved
        .map(|pcr| {
            format!(
                "PCR {pcr} was extended after the node was admitted: it is {}, it was {}",
                now[pcr].short(),
                admitted[pcr].short()
            )
        })
        .collect()
}

/// One power-on, one boot, and time that goes forward.
fn clock_problems(admitted: &ClockInfo, last: &ClockInfo, now: &ClockInfo) -> Vec<String> {
    let mut problems = Vec::new();
    if now.firmware_version != admitted.firmware_version {
        problems.push(format!(
            "the TPM's firmware version is {:#x}, it was {:#x} when the node was admitted",
            now.firmware_version, admitted.firmware_version
        ));
    }
    for (counter, was, is) in
        [("reset", admitted.reset_count, now.reset_count), ("restart", admitted.restart_count, now.restart_count)]
    {
        if was != is {
            problems.push(format!(
                "the machine was {counter} after it was admitted: the TPM's {counter} count is {is}, it was {was}"
            ));
        }
    }
    // After a reset it may have gone back, which says nothing more.
    if problems.is_empty() && now.clock_ms < last.clock_ms {
        problems.push(format!("the TPM's clock went back from {} to {} ms", last.clock_ms, now.clock_ms));
    }
    problems
}
