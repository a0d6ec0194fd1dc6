//! The operators' API, policies: approve, list, show, learn, try.

use super::extract::{JsonBody, Named};
use super::verdicts::{case_with, evidence_by_id, last_verdict};
use super::{Verifier, computed, db_failed};
use crate::evidence::{self, Challenge};
use crate::learn;
use crate::policy::signature::DetachedSignature;
use crate::policy::{ArtefactReference, Policy};
use crate::quote::AkPublic;
use crate::reappraisal::{Again, Reappraisal, reappraise};
use crate::store::archive::{ArchivedEvidence, EvidenceId, VerdictRecord, VerdictWord};
use crate::store::policies::{Approval, PolicyRecord};
use assay_service::auth::Caller;
use assay_service::error::{ApiError, chain};
use assay_wire::id::NodeId;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A policy to approve: `POST /v1/policies`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyRequest {
    /// The name to list it under; without it, the document's own.
    #[serde(default)]
    pub name: Option<String>,
    /// The policy, TOML or JSON.
    pub document: String,
    /// An operator's signature on it: needed where the verifier has `policy_keys`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<DetachedSignature>,
}

/// A policy on record, with everybody who approved it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PolicyHistory {
    /// The policy.
    pub policy: PolicyRecord,
    /// Each approval, newest first.
    pub approvals: Vec<Approval>,
    /// Why it would judge nothing, if it was changed in the database or lacks a signature that counts.
    pub refused: Option<String>,
}

/// A policy to draft: `POST /v1/policies/learn`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LearnRequest {
    /// The node whose last evidence shows the firmware.
    pub node: NodeId,
    /// The draft's name; without it, `learnt-from-<node>`.
    #[serde(default)]
    pub name: Option<String>,
    /// `reference-values.json`, as `agent-image` wrote it.
    pub artefacts: serde_json::Value,
    /// An operator's signature on the Reference Values: needed where the verifier has `policy_keys`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artefacts_signature: Option<DetachedSignature>,
    /// Learn even though a policy has judged this evidence and rejected it.
    #[serde(default)]
    pub from_rejected: bool,
}

/// A draft: nothing is active by it. Read it, then `POST /v1/policies`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PolicyDraft {
    /// The policy, TOML.
    pub document: String,
    /// Its digest.
    pub digest: String,
    /// The evidence that it was learnt from.
    pub evidence: EvidenceId,
    /// What whoever approves it should know of that evidence.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A policy to try on what nodes sent last: `POST /v1/policies/try`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TryRequest {
    /// The policy, TOML or JSON. Nothing becomes active by it.
    pub document: String,
    /// Only nodes whose name is after this one: `next` of the answer before.
    #[serde(default)]
    pub after: Option<NodeId>,
}

/// What a policy would say, of some nodes.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TryAnswer {
    /// Its digest.
    pub policy: String,
    /// Node by node, in the order of their names.
    pub trials: Vec<Trial>,
    /// Where to go on; none if these were the last.
    pub next: Option<NodeId>,
}

/// What a policy would say of a node's last evidence.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Trial {
    /// The node.
    pub node: NodeId,
    /// Its last evidence.
    pub evidence: EvidenceId,
    /// The verdict on record.
    pub verdict: VerdictWord,
    /// What the policy would say.
    pub would: Reappraisal,
}

/// All policies that were ever approved.
#[utoipa::path(get, path = "/v1/policies", tag = "operator", responses((status = 200, body = Vec<PolicyRecord>)))]
pub(crate) async fn policies(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
) -> Result<Json<Vec<PolicyRecord>>, ApiError> {
    caller.require_service()?;
    verifier.store.policies().await.map(Json).map_err(db_failed)
}

/// One policy, with everybody who approved it.
#[utoipa::path(get, path = "/v1/policies/{digest}", tag = "operator",
    params(("digest" = String, Path, description = "`sha256:<hex>`, or `active`")),
    responses((status = 200, body = PolicyHistory), (status = 404, body = assay_wire::problem::Problem)))]
pub(crate) async fn policy(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(digest): Named<String>,
) -> Result<Json<PolicyHistory>, ApiError> {
    caller.require_service()?;
    let policy = on_record(&verifier, &digest).await?;
    let approvals = verifier.store.approvals(&policy.digest).await.map_err(db_failed)?;
    let refused = policy.admit(verifier.store.policy_keys()).err().map(|error| chain(&error));
    Ok(Json(PolicyHistory { policy, approvals, refused }))
}

/// Approves a policy: from now on it judges.
#[utoipa::path(post, path = "/v1/policies", tag = "operator", request_body = PolicyRequest, responses(
    (status = 200, body = PolicyRecord),
    (status = 400, description = "not a valid policy", body = assay_wire::problem::Problem),
    (status = 403, description = "not signed by a policy key", body = assay_wire::problem::Problem),
))]
pub(crate) async fn activate_policy(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    JsonBody(request): JsonBody<PolicyRequest>,
) -> Result<Json<PolicyRecord>, ApiError> {
    caller.require_operator()?;
    let policy = parse(&request.document)?;
    let record = PolicyRecord {
        name: request.name.unwrap_or_else(|| policy.name().to_owned()),
        digest: policy.digest().to_string(),
        document: request.document,
        signature: request.signature,
        added_by: caller.name,
        added_at_ms: verifier.clock.now_ms(),
        active: true,
    };
    activate(&verifier, record).await.map(Json)
}

/// Approves a policy that is on record again: the way back to an older version.
#[utoipa::path(post, path = "/v1/policies/{digest}/approve", tag = "operator",
    params(("digest" = String, Path, description = "`sha256:<hex>`")), responses(
    (status = 200, body = PolicyRecord),
    (status = 403, description = "not signed by a policy key, or changed", body = assay_wire::problem::Problem),
    (status = 404, body = assay_wire::problem::Problem),
))]
pub(crate) async fn approve_again(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(digest): Named<String>,
) -> Result<Json<PolicyRecord>, ApiError> {
    caller.require_operator()?;
    let record = on_record(&verifier, &digest).await?;
    let again = PolicyRecord { added_by: caller.name, added_at_ms: verifier.clock.now_ms(), active: true, ..record };
    activate(&verifier, again).await.map(Json)
}

/// Drafts a policy from a node's last evidence and the artefacts' Reference Values.
#[utoipa::path(post, path = "/v1/policies/learn", tag = "operator", request_body = LearnRequest, responses(
    (status = 200, body = PolicyDraft),
    (status = 403, description = "Reference Values not signed by a policy key", body = assay_wire::problem::Problem),
    (status = 409, description = "the evidence cannot be learnt from", body = assay_wire::problem::Problem),
))]
pub(crate) async fn learn_policy(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    JsonBody(request): JsonBody<LearnRequest>,
) -> Result<Json<PolicyDraft>, ApiError> {
    caller.require_operator()?;
    let artefacts = ArtefactReference::from_json(&request.artefacts.to_string()).map_err(|error| {
        ApiError::bad_request(
            "invalid-artefacts",
            format!("reading the artefacts' Reference Values: {}", chain(&error)),
        )
    })?;
    let signature = request.artefacts_signature.as_ref();
    let signed = verifier.store.policy_keys().check_artefacts(&artefacts, signature);
    let signed_by = signed.map_err(|error| {
        ApiError::forbidden("unsigned-artefacts", chain(&error))
            .with_hint("sign them: assay policy sign reference-values.json --key KEY")
    })?;
    let last = last_verdict(&verifier, &request.node).await?;
    let mut notes = trust_notes(&last, request.from_rejected)?;
    notes.extend(signed_by.map(|key| format!("the Reference Values of `{}` are signed by {key}", artefacts.name)));
    let archived = evidence_by_id(&verifier, last.evidence).await?;
    let name = request.name.unwrap_or_else(|| format!("learnt-from-{}", request.node));
    let drafted = computed("learning a policy", move || draft(&name, &archived, &artefacts)).await?;
    let policy = drafted.map_err(|why| {
        ApiError::conflict(
            "not-learnable",
            format!("learning from the last evidence of node `{}`: {why}", request.node),
        )
    })?;
    let (document, digest) = (policy.to_toml(), policy.digest().to_string());
    Ok(Json(PolicyDraft { document, digest, evidence: last.evidence, notes }))
}

/// What a policy would say of every node's last evidence. Changes nothing.
#[utoipa::path(post, path = "/v1/policies/try", tag = "operator", request_body = TryRequest, responses(
    (status = 200, body = TryAnswer),
    (status = 400, description = "not a valid policy", body = assay_wire::problem::Problem),
))]
pub(crate) async fn try_policy(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    JsonBody(request): JsonBody<TryRequest>,
) -> Result<Json<TryAnswer>, ApiError> {
    caller.require_service()?;
    let policy = Arc::new(parse(&request.document)?);
    let now_seconds = verifier.clock.now_seconds();
    let verdicts = verifier.store.latest_verdicts().await.map_err(db_failed)?;
    let after = |verdict: &VerdictRecord| request.after.as_ref().is_none_or(|after| verdict.node > *after);
    let mut left = verdicts.into_iter().filter(after);
    let mut trials = Vec::new();
    for VerdictRecord { node, evidence, verdict, .. } in left.by_ref().take(TRIED_AT_ONCE) {
        // Gone since: the node has sent newer evidence, and will be judged by that.
        let Some(archived) = verifier.store.evidence(evidence).await.map_err(db_failed)? else { continue };
        let case = case_with(&verifier, archived).await?;
        let (policy, tee_collateral) = (Arc::clone(&policy), Arc::clone(&verifier.tee_collateral));
        let would = computed("trying a policy", move || {
            let again = Again { policy: Some(&policy), now_seconds, tee_collateral: Some(&tee_collateral) };
            reappraise(&case, &again)
        });
        trials.push(Trial { node, evidence, verdict, would: would.await?.map_err(db_failed)? });
    }
    let next = left.next().and_then(|_| trials.last()).map(|trial| trial.node.clone());
    Ok(Json(TryAnswer { policy: policy.digest().to_string(), trials, next }))
}

fn parse(document: &str) -> Result<Policy, ApiError> {
    Policy::parse(document)
        .map_err(|error| ApiError::bad_request("invalid-policy", format!("reading the policy: {}", chain(&error))))
}

/// Makes a policy judge, if its signature counts here.
async fn activate(verifier: &Verifier, record: PolicyRecord) -> Result<PolicyRecord, ApiError> {
    record.admit(verifier.store.policy_keys()).map_err(|error| {
        ApiError::forbidden("policy-refused", format!("approving policy `{}`: {}", record.name, chain(&error)))
            .with_hint("sign it: assay policy sign FILE --key KEY; then approve it with --signature FILE.sig")
    })?;
    verifier.store.activate_policy(&record).await.map_err(db_failed)?;
    tracing::info!(
        event = "policy.activated",
        name = record.name,
        digest = record.digest,
        by = record.added_by,
        signed_by = record.signature.map(|signature| signature.key.to_string()),
        "policy is active"
    );
    Ok(record)
}

/// A policy by its digest, or the active one.
async fn on_record(verifier: &Verifier, digest: &str) -> Result<PolicyRecord, ApiError> {
    let found = match digest {
        "active" => verifier.store.policies().await.map_err(db_failed)?.into_iter().find(|policy| policy.active),
        digest => verifier.store.policy(digest).await.map_err(db_failed)?,
    };
    found.ok_or_else(|| {
        ApiError::not_found(format!("there is no policy `{digest}`")).with_hint("see: assay policy list")
    })
}

/// Nobody should come to trust a bad boot by learning from it unawares.
fn trust_notes(last: &VerdictRecord, from_rejected: bool) -> Result<Vec<String>, ApiError> {
    let VerdictRecord { node, evidence, verdict, reasons, policy, .. } = last;
    match (verdict, policy) {
        (VerdictWord::Accepted, _) => Ok(Vec::new()),
        (VerdictWord::Rejected, None) => Ok(vec![format!(
            "no policy has judged evidence {evidence}: approving the draft is trust on first use of node `{node}`"
        )]),
        (VerdictWord::Rejected, Some(policy)) if from_rejected => {
            let mut notes = vec![format!(
                "policy {policy} has rejected evidence {evidence} of node `{node}`; the draft would accept what it rejected:"
            )];
            notes.extend(reasons.iter().cloned());
            Ok(notes)
        }
        (VerdictWord::Rejected, Some(policy)) => Err(ApiError::conflict(
            "learning-from-rejected",
            format!("the last evidence of node `{node}` was rejected by policy {policy}: {}", reasons.join("; ")),
        )
        .with_hint("if this boot is to be trusted all the same: assay policy learn NODE --from-rejected")),
    }
}

/// Verifies archived evidence again and learns from it.
fn draft(name: &str, archived: &ArchivedEvidence, artefacts: &ArtefactReference) -> Result<Policy, String> {
    let ak = archived.ak_public_bytes().map_err(|error| chain(&error))?;
    let ak = AkPublic::parse(&ak).map_err(|error| chain(&error))?;
    let nonce = archived.nonce_value().map_err(|error| chain(&error))?;
    let challenge = Challenge { ak: &ak, nonce: nonce.as_bytes(), last_clock: None };
    let replayed = evidence::verify(&archived.evidence, &challenge).map_err(|error| error.reasons().join("; "))?;
    let learned_from = format!("node {} evidence {}", archived.verdict.node, archived.verdict.evidence);
    learn::learn(name, &learned_from, &replayed, artefacts).map_err(|error| error.reasons().join("; "))
}

/// Nodes in one answer of [`try_policy`].
const TRIED_AT_ONCE: usize = 200;
