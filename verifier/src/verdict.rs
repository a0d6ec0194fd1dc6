//! From evidence to the verdict and, if it is good, the claims of the attestation result (step 6 of the boot path).
//! Joins [`evidence::verify`] and [`appraisal::appraise`]; decides nothing that they do not. Pure: values and `now` in.

use crate::appraisal::{self, Accepted, Appraisal, Expected};
use crate::boot_count::{Boot, BootFinding, LastQuote, check_boot};
use crate::evidence::{self, Challenge, ReplayedEvidence};
use crate::policy::{Mode, Policy};
use crate::quote::{AkPublic, ClockInfo, PCR_COUNT, PcrValue};
use crate::session::{Attester, Nonce};
use crate::tee::Collateral;
use assay_service::error::chain;
use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::agent::AgentSettings;
use assay_wire::evidence::Evidence;
use assay_wire::id::AdmissionId;
use assay_wire::result::{Claims, EAR_PROFILE, VerifierId};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::collections::BTreeMap;

/// All that a verdict depends on.
#[derive(Debug)]
pub struct Case<'a> {
    /// Who sent it.
    pub attester: &'a Attester,
    /// What the quote must carry.
    pub nonce: &'a Nonce,
    /// What was sent.
    pub evidence: &'a Evidence,
    /// The TPM clock of the node's last verified quote.
    pub last_clock: Option<&'a ClockInfo>,
    /// The same with the boot that it was of.
    pub last_quote: Option<&'a LastQuote>,
    /// The policy that judges, if one is active.
    pub policy: Option<&'a Policy>,
    /// What quotes of trusted execution environments are verified with.
    pub tee_collateral: &'a Collateral,
    /// What this verifier would have told this node.
    pub settings: &'a AgentSettings,
    /// Now, in seconds since the Unix epoch.
    pub now_seconds: i64,
    /// How long a good result is good for.
    pub lifetime_seconds: i64,
}

/// The verdict.
#[derive(Debug)]
pub enum Judgement {
    /// Good: these claims are to be signed.
    Accepted {
        /// The result.
        claims: Box<Claims>,
        /// The TPM clock of the quote.
        clock: ClockInfo,
        /// The quoted PCRs: what evidence at run time is compared with.
        pcrs: Box<[PcrValue; PCR_COUNT]>,
        /// What is tolerated, but should be looked at.
        warnings: Vec<String>,
    },
    /// Not good.
    Rejected {
        /// One sentence a reason.
        reasons: Vec<String>,
        /// The TPM clock, if the quote was verified.
        clock: Option<ClockInfo>,
    },
}

/// Reaches the verdict.
#[must_use]
pub fn judge(case: &Case<'_>) -> Judgement {
    let refused = |reasons: Vec<String>, clock| Judgement::Rejected { reasons: printable(&reasons), clock };
    let ak = match AkPublic::parse(&case.attester.ak_public) {
        Ok(ak) => ak,
        Err(error) => return refused(vec![chain(&error)], None),
    };
    let challenge = Challenge { ak: &ak, nonce: case.nonce.as_bytes(), last_clock: case.last_clock };
    let replayed = match evidence::verify(case.evidence, &challenge) {
        Ok(replayed) => replayed.with_tee_collateral(case.tee_collateral),
        Err(error) => return refused(error.reasons(), None),
    };
    let clock = *replayed.clock();
    let Some(policy) = case.policy else {
        return refused(vec![NO_POLICY.to_owned()], Some(clock));
    };
    let (refusals, cautions) = boot_problems(case, policy, &replayed);
    match appraisal::appraise(policy, &replayed, &Expected { settings: case.settings }, case.now_seconds) {
        Appraisal::Accepted(accepted) if refusals.is_empty() => Judgement::Accepted {
            claims: Box::new(claims(case, &accepted)),
            clock,
            pcrs: Box::new(*replayed.quote().pcrs()),
            warnings: printable(&[accepted.warnings(), &cautions].concat()),
        },
        Appraisal::Accepted(_) => refused(refusals, Some(clock)),
        Appraisal::Refused(refusal) => refused([refusal.reasons(), &refusals].concat(), Some(clock)),
    }
}

/// What the TPM's counts do not explain: what refuses the node, and what is only said.
fn boot_problems(case: &Case<'_>, policy: &Policy, replayed: &ReplayedEvidence<'_>) -> (Vec<String>, Vec<String>) {
    let airlock = &case.attester.airlock;
    let boot = Boot { id: airlock.boot, machine_resets: airlock.machine_resets };
    let locality = replayed.log().startup_locality();
    let findings = check_boot(policy.boot(), replayed.clock(), &boot, case.last_quote, locality);
    let (refusals, cautions): (Vec<_>, Vec<_>) =
        findings.into_iter().partition(|finding| finding.mode == Mode::Enforce);
    let words = |findings: Vec<BootFinding>| findings.iter().map(|finding| finding.problem.to_string()).collect();
    (words(refusals), words(cautions))
}

/// The claims of a good verdict. Takes an [`Accepted`], which only the appraisal makes.
fn claims(case: &Case<'_>, accepted: &Accepted) -> Claims {
    let attester = case.attester;
    Claims {
        eat_profile: EAR_PROFILE.to_owned(),
        iat: case.now_seconds,
        exp: case.now_seconds.saturating_add(case.lifetime_seconds),
        jti: AdmissionId::random(),
        verifier_id: VerifierId { developer: "assay".to_owned(), build: env!("CARGO_PKG_VERSION").to_owned() },
        eat_nonce: URL_SAFE_NO_PAD.encode(accepted.nonce()),
        submods: BTreeMap::from([("tpm".to_owned(), accepted.submod())]),
        node: attester.node.clone(),
        project: attester.airlock.project.clone(),
        lease: attester.airlock.lease,
        boot: attester.airlock.boot,
        ek_public: URL_SAFE_NO_PAD.encode(&attester.ek_public),
        ek_sha256: ek_sha256(&attester.ek_public),
        ak_name: accepted.ak_name().to_string(),
        renews: None,
        reset_count: accepted.clock().reset_count,
        restart_count: accepted.clock().restart_count,
    }
}

/// SHA-256 of an EK's `TPMT_PUBLIC`, as relying parties check it. On record an EK is known by its key alone.
fn ek_sha256(ek_public: &[u8]) -> String {
    hex::encode(HashAlgorithm::Sha256.digest(ek_public))
}

/// Reasons quote what a node sent: no control characters, and no more than anybody reads.
pub(crate) fn printable(reasons: &[String]) -> Vec<String> {
    let clean = |reason: &String| -> String {
        let mut text: String =
            reason.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(MOST_CHARACTERS).collect();
        if reason.chars().nth(MOST_CHARACTERS).is_some() {
            text.push('…');
        }
        text
    };
    let mut clean: Vec<String> = reasons.iter().take(MOST_REASONS).map(clean).collect();
    if reasons.len() > MOST_REASONS {
        clean.push(format!("and {} more", reasons.len() - MOST_REASONS));
    }
    clean
}

pub(crate) const NO_POLICY: &str = "no policy is active: an operator must approve one";
const MOST_REASONS: usize = 32;
const MOST_CHARACTERS: usize = 600;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d8_reasons_are_bounded_and_printable() {
        let hostile = vec!["a\u{1b}[31m\r\nb".to_owned(), "x".repeat(100_000)];
        let clean = printable(&hostile);
        assert!(clean.iter().all(|reason| reason.chars().count() <= MOST_CHARACTERS + 1));
        assert!(clean.iter().all(|reason| !reason.chars().any(char::is_control)));
        assert_eq!(printable(&vec!["r".to_owned(); 100]).len(), MOST_REASONS + 1);
    }
}
