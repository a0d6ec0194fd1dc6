//! From evidence to the verdict and, if it is good, the claims of the attestation result (step 6 of the boot path).
//! Joins [`evidence::verify`] and [`appraisal::appraise`]; decides nothing that they do not. Pure: values and `now` in.

use crate::appraisal::{self, Accepted, Appraisal, Expected};
use crate::boot_count::BootFacts;
use crate::evidence::{self, Challenge};
use crate::policy::Policy;
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

/// Evidence with all that a verdict on it depends on.
#[derive(Debug, Clone, Copy)]
pub struct Case<'a> {
    /// `TPMT_PUBLIC` of the AK that must have signed.
    pub ak_public: &'a [u8],
    /// What the quote must carry.
    pub nonce: &'a Nonce,
    /// What was sent.
    pub evidence: &'a Evidence,
    /// What this verifier would have told this node.
    pub settings: &'a AgentSettings,
    /// The TPM clock of the node's last verified quote.
    pub last_clock: Option<&'a ClockInfo>,
    /// What the TPM's counts are held against.
    pub boot: &'a BootFacts,
    /// What quotes of trusted execution environments are verified with.
    pub tee_collateral: &'a Collateral,
    /// As of when they are verified: seconds since the Unix epoch.
    pub tee_at_seconds: i64,
    /// The policy that judges, if one is active.
    pub policy: Option<&'a Policy>,
    /// When the policy must be valid: seconds since the Unix epoch.
    pub now_seconds: i64,
}

/// What evidence comes to. The one path to a verdict, at boot ([`judge`]) and from the archive
/// ([`crate::reappraisal`]).
#[derive(Debug)]
pub enum Weighed {
    /// Not even what it says, and why.
    Untrue(Vec<String>),
    /// What it says, and there is no policy to judge it.
    Unjudged(ClockInfo),
    /// Judged.
    Judged {
        /// The TPM clock of the quote.
        clock: ClockInfo,
        /// The quoted PCRs.
        pcrs: Box<[PcrValue; PCR_COUNT]>,
        /// What the policy says.
        appraisal: Box<Appraisal>,
    },
}

/// Verifies, replays and appraises.
#[must_use]
pub fn weigh(case: &Case<'_>) -> Weighed {
    let ak = match AkPublic::parse(case.ak_public) {
        Ok(ak) => ak,
        Err(error) => return Weighed::Untrue(vec![chain(&error)]),
    };
    let challenge = Challenge { ak: &ak, nonce: case.nonce.as_bytes(), last_clock: case.last_clock };
    let replayed = match evidence::verify(case.evidence, &challenge) {
        Ok(replayed) => replayed.with_tee_collateral(case.tee_collateral, case.tee_at_seconds),
        Err(error) => return Weighed::Untrue(error.reasons()),
    };
    let clock = *replayed.clock();
    let Some(policy) = case.policy else { return Weighed::Unjudged(clock) };
    let expected = Expected { settings: case.settings, boot: case.boot };
    let appraisal = Box::new(appraisal::appraise(policy, &replayed, &expected, case.now_seconds));
    Weighed::Judged { clock, pcrs: Box::new(*replayed.quote().pcrs()), appraisal }
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

/// Reaches the verdict on what `attester` sent. A good result is good for `lifetime_seconds`.
#[must_use]
pub fn judge(case: &Case<'_>, attester: &Attester, lifetime_seconds: i64) -> Judgement {
    let refused = |reasons: &[String], clock| Judgement::Rejected { reasons: printable(reasons), clock };
    match weigh(case) {
        Weighed::Untrue(reasons) => refused(&reasons, None),
        Weighed::Unjudged(clock) => refused(&[NO_POLICY.to_owned()], Some(clock)),
        Weighed::Judged { clock, pcrs, appraisal } => match *appraisal {
            Appraisal::Accepted(accepted) => Judgement::Accepted {
                claims: Box::new(claims(attester, &accepted, case.now_seconds, lifetime_seconds)),
                clock,
                pcrs,
                warnings: printable(accepted.warnings()),
            },
            Appraisal::Refused(refusal) => refused(refusal.reasons(), Some(clock)),
        },
    }
}

/// The claims of a good verdict. Takes an [`Accepted`], which only the appraisal makes.
fn claims(attester: &Attester, accepted: &Accepted, now_seconds: i64, lifetime_seconds: i64) -> Claims {
    Claims {
        eat_profile: EAR_PROFILE.to_owned(),
        iat: now_seconds,
        exp: now_seconds.saturating_add(lifetime_seconds),
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
