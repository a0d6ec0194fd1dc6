//! Quotes of trusted execution environments beside the TPM's: Intel SGX and TDX, as rules that a policy may demand.
//!
//! | what | vouched for by |
//! |---|---|
//! | measurements of the enclave or trust domain | Intel's keys, through the platform's and the quoting enclave's |
//! | that those keys are not revoked, and how old the platform's microcode is | collateral, signed by Intel too |
//! | that the quote is of this machine and this moment | its report data: SHA-256 of the nonce and the AK's name |
//!
//! The last row binds a quote to the TPM's only as far as the enclave is honest about it, so a rule must name the
//! enclave. Collateral is data that an operator fetches where there is a network, and gives in files; nothing is fetched
//! here. A quote that the policy demands and that does not come, or for which there is no collateral, is a deviation.

mod folder;
mod quote;
mod rule;
#[cfg(any(test, feature = "testing"))]
pub mod samples;

pub use self::folder::{FolderError, read_folder};
pub use self::quote::{Collateral, CollateralDigest, CollateralError, TeeError, VerifiedTeeQuote, verify};
pub use self::rule::{Attributes, Measurement, TeeRule};

use assay_tpm::name::Name;
use assay_wire::evidence::TeeQuote;

/// What a quote's report data must be.
#[must_use]
pub fn report_data(nonce: &[u8; 32], ak_name: &Name) -> [u8; 64] {
    TeeQuote::report_data(nonce, ak_name.as_bytes())
}

/// What deviates from the rules: each wants a quote that meets it. Quotes that no rule wants are not looked at.
#[must_use]
pub fn deviations(
    rules: &[TeeRule],
    quotes: &[TeeQuote],
    collateral: &Collateral,
    report_data: &[u8; 64],
    now_seconds: i64,
) -> Vec<String> {
    if rules.is_empty() {
        return Vec::new();
    }
    if quotes.len() > MOST_QUOTES {
        return vec![format!("evidence has {} quotes of trusted execution environments", quotes.len())];
    }
    let verified: Vec<_> = quotes.iter().map(|quote| (quote.kind, verify(quote, collateral, now_seconds))).collect();
    rules
        .iter()
        .flat_map(|rule| {
            let candidates = verified.iter().filter(|(kind, _)| *kind == rule.kind);
            let problems: Vec<_> = candidates
                .map(|(_, quote)| match quote {
                    Ok(quote) => rule.deviations(quote, report_data),
                    Err(error) => vec![error.to_string()],
                })
                .collect();
            if problems.is_empty() {
                return vec![format!("evidence has no {} quote, which the policy demands", rule.kind_name())];
            }
            // One that meets the rule is enough.
            if problems.iter().any(Vec::is_empty) { Vec::new() } else { problems.concat() }
        })
        .collect()
}

/// More than any machine has use for.
const MOST_QUOTES: usize = 8;

#[cfg(test)]
mod tests;
