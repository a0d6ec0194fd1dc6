//! Archived evidence appraised again: why a verdict was what it was, what another policy would say, and offline from a
//! file. Pure: what the verdict depended on goes in. Signs nothing and admits nobody.

use crate::appraisal::{Appraisal, Deviation, Expected, appraise};
use crate::evidence::{self, Challenge};
use crate::policy::{Mode, Policy};
use crate::quote::{AkPublic, ClockInfo};
use crate::store::DbError;
use crate::store::archive::{ArchivedEvidence, VerdictRecord, VerdictWord};
use crate::store::policies::{Approval, PolicyRecord};
use crate::verdict::printable;
use assay_service::error::chain;
use assay_wire::agent::AgentSettings;
use serde::{Deserialize, Serialize};

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
        if case.format == CASE_FORMAT {
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

/// What an appraisal of archived evidence comes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Reappraisal {
    /// Good or bad.
    pub verdict: VerdictWord,
    /// Digest of the policy that judged; none if there was none.
    pub policy: Option<String>,
    /// Why it is bad, one sentence a reason.
    pub reasons: Vec<String>,
    /// What is tolerated, but should be looked at.
    pub warnings: Vec<String>,
    /// Each deviation from the policy, with rule, PCR, event, what was expected and found. None if the evidence is not
    /// even what it says.
    pub deviations: Vec<Deviation>,
}

/// Appraises archived evidence by `policy` as of `now_seconds`.
///
/// # Errors
/// The archive holds something else than a verifier writes.
pub fn reappraise(
    archived: &ArchivedEvidence,
    context: &CaseContext,
    policy: Option<&Policy>,
    now_seconds: i64,
) -> Result<Reappraisal, DbError> {
    let digest = policy.map(|policy| policy.digest().to_string());
    let bad = |reasons: Vec<String>| Reappraisal {
        verdict: VerdictWord::Rejected,
        policy: digest.clone(),
        reasons: printable(&reasons),
        warnings: Vec::new(),
        deviations: Vec::new(),
    };
    let ak = match AkPublic::parse(&archived.ak_public_bytes()?) {
        Ok(ak) => ak,
        Err(error) => return Ok(bad(vec![chain(&error)])),
    };
    let nonce = archived.nonce_value()?;
    let challenge = Challenge { ak: &ak, nonce: nonce.as_bytes(), last_clock: context.last_clock.as_ref() };
    let replayed = match evidence::verify(&archived.evidence, &challenge) {
        Ok(replayed) => replayed,
        Err(error) => return Ok(bad(error.reasons())),
    };
    let Some(policy) = policy else { return Ok(bad(vec![crate::verdict::NO_POLICY.to_owned()])) };
    Ok(match appraise(policy, &replayed, &Expected { settings: &context.settings }, now_seconds) {
        Appraisal::Accepted(accepted) => Reappraisal {
            verdict: VerdictWord::Accepted,
            policy: digest,
            reasons: Vec::new(),
            warnings: printable(accepted.warnings()),
            deviations: accepted.deviations().to_vec(),
        },
        Appraisal::Refused(refusal) => Reappraisal {
            verdict: VerdictWord::Rejected,
            policy: digest,
            reasons: printable(refusal.reasons()),
            warnings: printable(refusal.warnings()),
            deviations: refusal.deviations().to_vec(),
        },
    })
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
    /// Whether appraising the archived evidence again comes to the verdict on record; if not, somebody changed the
    /// evidence or the policy in the database, or this verifier judges otherwise than the one that did.
    pub reproduced: bool,
}

/// Explains the verdict of a case.
///
/// # Errors
/// The archive holds something else than a verifier writes.
pub fn explain(case: &CaseFile) -> Result<Explanation, DbError> {
    let policy = case.policy.as_ref().and_then(|record| record.admit(&Default::default()).ok());
    let again = reappraise(&case.archived, &case.context, policy.as_ref(), case.context.now_seconds)?;
    let verdict = case.archived.verdict.clone();
    let reproduced =
        again.verdict == verdict.verdict && again.reasons == verdict.reasons && again.policy == verdict.policy;
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
        verdict,
    })
}

impl Explanation {
    /// The deviations that the node is refused for.
    pub fn enforced(&self) -> impl Iterator<Item = &Deviation> {
        self.deviations.iter().filter(|deviation| deviation.mode == Mode::Enforce)
    }
}

/// The format of exported verdicts.
pub const CASE_FORMAT: &str = "assay-verdict/1";
/// Evidence at its limit in base64, its policy, and change.
const MAX_CASE_BYTES: usize = 8 << 20;
