//! Archived evidence appraised again: why a verdict was what it was, what another policy would say, whether a boot is
//! still good under the policy that judges today, and offline from a file. Pure: what the verdict depended on goes in.
//! Signs nothing and admits nobody.
//!
//! The policy may be another; the facts are those of then. What a verdict depended on is kept beside it:
//!
//! | fact | kept as | if it was not kept |
//! |---|---|---|
//! | settings, the TPM's last clock | [`CaseContext`] | – |
//! | the boot, the quote before it, the machine's resets | [`CaseContext::boot`] | a good verdict by a rule at least as strict stands, with a warning; else undecided |
//! | collateral for quotes of TEEs | digests; the documents are on record once, and in exported verdicts | the collateral that is given, as of now; else undecided |
//!
//! *Undecided* is the word for what cannot be known any more. It is neither a pass nor the node's fault.

use crate::appraisal::{Appraisal, Deviation, TEE_RULE};
use crate::boot_count::BootFacts;
use crate::policy::{Mode, Policy};
use crate::quote::ClockInfo;
use crate::store::DbError;
use crate::store::archive::{ArchivedEvidence, VerdictRecord, VerdictWord};
use crate::store::policies::{Approval, PolicyRecord};
use crate::tee::{Collateral, CollateralDigest};
use crate::verdict::{Case, Weighed, printable, weigh};
use assay_wire::agent::AgentSettings;
use assay_wire::result::Submod;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;

/// What a verdict depended on beside the evidence, the key and the nonce.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaseContext {
    /// What the verifier would have told the node.
    pub settings: AgentSettings,
    /// The TPM clock of the node's last verified quote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_clock: Option<ClockInfo>,
    /// When it was judged: seconds since the Unix epoch.
    pub now_seconds: i64,
    /// What the TPM's counts were held against; none if the verifier that judged did not keep it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootFacts>,
    /// The collateral that the verifier had; none if it did not keep that, or the evidence has no quote of a TEE.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tee_collateral: Option<Vec<CollateralDigest>>,
}

/// A verdict with all that it depended on: what `assay verdict export` writes and `assay verdict replay` reads.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CaseFile {
    /// [`CASE_FORMAT`].
    pub format: String,
    /// The evidence, with the verdict on it, the keys and the nonce.
    pub archived: ArchivedEvidence,
    /// What else it depended on.
    #[schema(value_type = Object)]
    pub context: CaseContext,
    /// The policy that judged, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyRecord>,
    /// Who approved it, newest first.
    #[serde(default)]
    pub approvals: Vec<Approval>,
    /// The documents of collateral that the context names, as far as they are still on record.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tee_collateral: Vec<String>,
}

impl CaseFile {
    /// Reads an exported verdict.
    ///
    /// # Errors
    /// It is none, or larger than any.
    pub fn from_json(text: &str) -> Result<Self, CaseError> {
        if text.len() > MAX_CASE_BYTES {
            return Err(CaseError::TooLarge { bytes: text.len() });
        }
        let case: Self = serde_json::from_str(text).map_err(CaseError::Json)?;
        if [CASE_FORMAT, FIRST_CASE_FORMAT].contains(&case.format.as_str()) {
            Ok(case)
        } else {
            Err(CaseError::Format(case.format.chars().take(40).collect()))
        }
    }
}

/// Why a file is no exported verdict.
#[derive(Debug, thiserror::Error)]
pub enum CaseError {
    /// Longer than any.
    #[error("exported verdict has {bytes} octets, more than {MAX_CASE_BYTES}")]
    TooLarge {
        /// How long it is.
        bytes: usize,
    },
    /// Not JSON of that shape.
    #[error("reading an exported verdict")]
    Json(#[source] serde_json::Error),
    /// Of another version.
    #[error("exported verdict is of format `{0}`, not `{CASE_FORMAT}`")]
    Format(String),
}

/// By what archived evidence is appraised again.
#[derive(Debug, Clone, Copy)]
pub struct Again<'a> {
    /// The policy, if there is one.
    pub policy: Option<&'a Policy>,
    /// When it must be valid: seconds since the Unix epoch. All else is as of the verdict.
    pub now_seconds: i64,
    /// Collateral, good as of `now_seconds`, for quotes of TEEs whose verdict had none or did not keep it.
    pub tee_collateral: Option<&'a Collateral>,
}

/// What archived evidence comes to, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReappraisedWord {
    /// Good.
    Accepted,
    /// Not good.
    Rejected,
    /// Nothing speaks against it, but the policy asks for a fact that was not kept.
    Undecided,
}

impl fmt::Display for ReappraisedWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accepted => "accepted",
            Self::Rejected => "rejected",
            Self::Undecided => "undecided",
        })
    }
}

/// What an appraisal of archived evidence comes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Reappraisal {
    /// Good, bad, or not to be known.
    pub verdict: ReappraisedWord,
    /// Digest of the policy that judged; none if there was none.
    pub policy: Option<String>,
    /// Why it is bad, one sentence a reason.
    pub reasons: Vec<String>,
    /// What is tolerated, but should be looked at.
    pub warnings: Vec<String>,
    /// Each deviation from the policy, with rule, PCR, event, what was expected and found. None if the evidence is not
    /// even what it says.
    pub deviations: Vec<Deviation>,
    /// What the policy asks for and was not kept, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unrecorded: Vec<String>,
    /// The appraisal as an attestation result has it, if it is good.
    #[serde(skip)]
    pub(crate) submod: Option<Submod>,
}

/// Appraises archived evidence again.
///
/// # Errors
/// The archive holds something else than a verifier writes.
pub fn reappraise(case: &CaseFile, again: &Again<'_>) -> Result<Reappraisal, DbError> {
    let (archived, context) = (&case.archived, &case.context);
    let (boot, boot_says) = boot_facts(case, again.policy);
    let tee = TeeFacts::of(case, again);
    let weighed = weigh(&Case {
        ak_public: &archived.ak_public_bytes()?,
        nonce: &archived.nonce_value()?,
        evidence: &archived.evidence,
        settings: &context.settings,
        last_clock: context.last_clock.as_ref(),
        boot: &boot,
        tee_collateral: &tee.collateral,
        tee_at_seconds: tee.at_seconds,
        policy: again.policy,
        now_seconds: again.now_seconds,
    });
    let policy = again.policy.map(|policy| policy.digest().to_string());
    let rejected = |reasons: &[String]| Reappraisal {
        verdict: ReappraisedWord::Rejected,
        policy: policy.clone(),
        reasons: printable(reasons),
        warnings: Vec::new(),
        deviations: Vec::new(),
        unrecorded: Vec::new(),
        submod: None,
    };
    let appraisal = match weighed {
        Weighed::Untrue(reasons) => return Ok(rejected(&reasons)),
        Weighed::Unjudged(_) => return Ok(rejected(&[crate::verdict::NO_POLICY.to_owned()])),
        Weighed::Judged { appraisal, .. } => *appraisal,
    };
    let (mut deviations, submod) = match appraisal {
        Appraisal::Accepted(accepted) => (accepted.deviations().to_vec(), Some(accepted.submod())),
        Appraisal::Refused(refusal) => (refusal.deviations().to_vec(), None),
    };
    if tee.unrecorded {
        deviations.retain(|deviation| deviation.rule != TEE_RULE);
    }
    let (boot_warns, boot_unrecorded) = boot_says.into_parts();
    let unrecorded: Vec<String> =
        boot_unrecorded.into_iter().chain(tee.unrecorded.then(|| NO_COLLATERAL.to_owned())).collect();
    let sentences = |mode| deviations.iter().filter(move |found| found.mode == mode).map(|found| &found.sentence);
    let reasons: Vec<String> = sentences(Mode::Enforce).cloned().collect();
    let warnings: Vec<String> = sentences(Mode::Warn).cloned().chain(boot_warns).collect();
    let verdict = match (reasons.is_empty(), unrecorded.is_empty()) {
        (false, _) => ReappraisedWord::Rejected,
        (true, false) => ReappraisedWord::Undecided,
        (true, true) => ReappraisedWord::Accepted,
    };
    let submod = submod.filter(|_| verdict == ReappraisedWord::Accepted);
    let (reasons, warnings) = (printable(&reasons), printable(&warnings));
    Ok(Reappraisal { verdict, policy, reasons, warnings, deviations, unrecorded, submod })
}

/// What is to be said of the TPM's counts where nobody kept what they were held against.
enum BootSays {
    /// All is known.
    Nothing,
    /// The verdict then stands for it.
    Stands,
    /// Nobody knows.
    Unrecorded,
}

impl BootSays {
    /// What to warn of, and what was not kept.
    fn into_parts(self) -> (Option<String>, Option<String>) {
        match self {
            Self::Nothing => (None, None),
            Self::Stands => (Some(COUNTS_STAND.to_owned()), None),
            Self::Unrecorded => (None, Some(NO_COUNTS.to_owned())),
        }
    }
}

/// What the TPM's counts are held against. If that was not kept, what a good verdict found by a rule at least as strict
/// still holds; what any other found is not known.
fn boot_facts(case: &CaseFile, policy: Option<&Policy>) -> (BootFacts, BootSays) {
    if let Some(facts) = case.context.boot {
        return (facts, BootSays::Nothing);
    }
    let verdict = &case.archived.verdict;
    let then = judged_then(case);
    let strict = |then: &Policy| policy.is_some_and(|now| then.boot().most_tpm_resets <= now.boot().most_tpm_resets);
    let stands = verdict.verdict == VerdictWord::Accepted && then.as_ref().is_some_and(strict);
    (BootFacts::first(verdict.boot), if stands { BootSays::Stands } else { BootSays::Unrecorded })
}

/// The policy of the verdict, if it is whole.
fn judged_then(case: &CaseFile) -> Option<Policy> {
    case.policy.as_ref().and_then(|record| record.admit(&Default::default()).ok())
}

/// What quotes of trusted execution environments are verified with, and as of when.
struct TeeFacts<'a> {
    collateral: Cow<'a, Collateral>,
    at_seconds: i64,
    /// Whether the policy asks for it and it is not there.
    unrecorded: bool,
}

impl<'a> TeeFacts<'a> {
    fn of(case: &CaseFile, again: &Again<'a>) -> Self {
        let none = |unrecorded| Self { collateral: Cow::default(), at_seconds: case.context.now_seconds, unrecorded };
        let asked = again.policy.is_some_and(|policy| !policy.tee().is_empty());
        if !asked || case.archived.evidence.tee.is_empty() {
            return none(false);
        }
        let kept = case.context.tee_collateral.as_ref().and_then(|digests| {
            let texts = case.tee_collateral.iter().map(|text| ("of an exported verdict", text.as_str()));
            Collateral::from_files(texts).ok()?.named(digests)
        });
        match (kept, again.tee_collateral) {
            (Some(kept), given) if given.is_none() || !kept.is_empty() => {
                Self { collateral: Cow::Owned(kept), ..none(false) }
            }
            (_, Some(given)) => {
                Self { collateral: Cow::Borrowed(given), at_seconds: again.now_seconds, unrecorded: false }
            }
            (_, None) => none(true),
        }
    }
}

/// Why a verdict is what it is: which event, what was expected, who approved that, since when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Explanation {
    /// The verdict on record.
    pub verdict: VerdictRecord,
    /// The policy that judged, by name.
    pub policy_name: Option<String>,
    /// Who had approved that policy when it judged, and since when.
    pub approval: Option<Approval>,
    /// Whose signature it carries.
    pub signed_by: Option<crate::policy::signature::PolicyKey>,
    /// The evidence that its firmware values were learnt from.
    pub learned_from: Option<String>,
    /// The artefacts whose Reference Values it holds.
    pub artefacts: Option<String>,
    /// Each deviation.
    pub deviations: Vec<Deviation>,
    /// Whether appraising the archived evidence again comes to the verdict on record; if not, and `unrecorded` is empty,
    /// somebody changed the evidence or the policy in the database, or this verifier judges otherwise than the one
    /// that did.
    pub reproduced: bool,
    /// What the verdict depended on and was not kept, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unrecorded: Vec<String>,
}

/// Explains the verdict of a case.
///
/// # Errors
/// The archive holds something else than a verifier writes.
pub fn explain(case: &CaseFile) -> Result<Explanation, DbError> {
    let policy = judged_then(case);
    let then = Again { policy: policy.as_ref(), now_seconds: case.context.now_seconds, tee_collateral: None };
    let again = reappraise(case, &then)?;
    let verdict = case.archived.verdict.clone();
    let same_word = match verdict.verdict {
        VerdictWord::Accepted => again.verdict == ReappraisedWord::Accepted,
        VerdictWord::Rejected => again.verdict == ReappraisedWord::Rejected,
    };
    let reproduced = same_word && again.reasons == verdict.reasons && again.policy == verdict.policy;
    let judged_at_ms = verdict.received_at_ms;
    let approval = case.approvals.iter().find(|approval| approval.approved_at_ms <= judged_at_ms).cloned();
    let provenance = policy.as_ref().map(Policy::provenance);
    Ok(Explanation {
        policy_name: case.policy.as_ref().map(|record| record.name.clone()),
        approval,
        signed_by: case.policy.as_ref().and_then(|record| record.signature).map(|signature| signature.key),
        learned_from: provenance.and_then(|provenance| provenance.learned_from.clone()),
        artefacts: provenance.and_then(|provenance| provenance.artefacts.clone()),
        deviations: again.deviations,
        reproduced,
        unrecorded: again.unrecorded,
        verdict,
    })
}

impl Explanation {
    /// The deviations that the node is refused for.
    pub fn enforced(&self) -> impl Iterator<Item = &Deviation> {
        self.deviations.iter().filter(|deviation| deviation.mode == Mode::Enforce)
    }
}

const NO_COUNTS: &str = "what the TPM's counts of resets were held against was not kept with this verdict, which an older \
     version gave: whether they are those of a boot is not known";
const COUNTS_STAND: &str = "what the TPM's counts of resets were held against was not kept with this verdict, which an \
     older version gave: that they are those of a boot is that version's word";
const NO_COLLATERAL: &str = "the TEE collateral of this verdict was not kept, so that the quotes that the policy demands \
     cannot be verified: give some (--tee-collateral)";

/// The format of exported verdicts.
pub const CASE_FORMAT: &str = "assay-verdict/2";
/// Without boot facts and collateral.
const FIRST_CASE_FORMAT: &str = "assay-verdict/1";
/// Evidence at its limit in base64, its policy, its collateral as JSON in JSON, and change.
const MAX_CASE_BYTES: usize = 12 << 20;
