//! The agents' API, exactly as [`assay_wire::agent`] has it: evidence and its verdict (steps 5 and 6), and the agent's
//! side of the release (steps 7 to 9).

use super::attest::{challenge, notices, push, supporting};
use super::enrol::{activate, enrol, milliseconds, no_session, session_refused};
use super::extract::{BearerProof, Named, Text, parse_json};
use super::leaving::LeavingAnswer;
use super::secrets::secret;
use super::{Verifier, computed, db_failed, policy_refused};
use crate::boot_count::Boot;
use crate::config::Role;
use crate::evidence::MAX_EVIDENCE_BYTES;
use crate::quote::ClockInfo;
use crate::reappraisal::CaseContext;
use crate::release::CallError;
use crate::release::journal::ReleaseStep;
use crate::session::{Appraised, Enrolled, Nonce, Proof, Session, SessionError};
use crate::store::archive::{EvidenceId, NewVerdict, Outcome, VerdictRecord, VerdictWord};
use crate::store::attestations::NewAttestation;
use crate::store::releases::Release;
use crate::verdict::{Case, Judgement, judge};
use assay_service::error::ApiError;
use assay_service::telemetry::boot_step;
use assay_wire::agent::{ReleaseStatus, SealedGrant, Verdict};
use assay_wire::evidence::Evidence;
use assay_wire::id::{AdmissionId, SessionId};
use assay_wire::step::Step;
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use ring::digest::{SHA256, digest};
use std::sync::Arc;
use std::time::Duration;

/// How long `GET release` waits; below every timeout on the way.
const LONG_POLL: Duration = Duration::from_secs(25);

/// The agents' API.
pub fn router(verifier: Arc<Verifier>) -> Router {
    Router::new()
        .route("/agent/v1/enrol", post(enrol))
        .route("/agent/v1/sessions/{id}/activate", post(activate))
        .route("/agent/v1/sessions/{id}/evidence", post(evidence))
        .route("/agent/v1/sessions/{id}/release", get(release))
        .route("/agent/v1/sessions/{id}/ready", post(ready))
        .route("/agent/v1/sessions/{id}/grant", get(grant))
        .route("/agent/v1/sessions/{id}/handover", post(handover))
        .route("/agent/v1/attestations/{admission}/challenge", post(challenge))
        .route("/agent/v1/attestations/{admission}", post(push))
        .route("/agent/v1/attestations/{admission}/notices", get(notices))
        .route("/agent/v1/attestations/{admission}/secret", get(secret))
        .with_state(verifier)
}

/// Evidence in, verdict out.
#[utoipa::path(post, path = "/agent/v1/sessions/{id}/evidence", tag = "agent", request_body = Evidence,
    params(("id" = String, Path, description = "session")), responses(
    (status = 200, body = Verdict),
    (status = 403, description = "wrong proof, or expired", body = assay_wire::problem::Problem),
    (status = 409, description = "the nonce was used", body = assay_wire::problem::Problem),
))]
pub(crate) async fn evidence(
    State(verifier): State<Arc<Verifier>>,
    Named(id): Named<SessionId>,
    BearerProof(proof): BearerProof,
    Text(body): Text<MAX_EVIDENCE_BYTES>,
) -> Result<Json<Verdict>, ApiError> {
    let received_at_ms = verifier.clock.now_ms();
    let body_sha256 = hex::encode(digest(&SHA256, body.as_bytes()));
    let enrolled = match authenticated(&verifier, id, &proof).await? {
        Session::Enrolled(enrolled) => enrolled,
        Session::Appraised(_) => return repeated(&verifier, id, &body_sha256).await,
        Session::Challenged(_) => return Err(session_refused(SessionError::NotActivated)),
    };
    let nonce = *enrolled.nonce(received_at_ms).map_err(session_refused)?;
    let mut evidence: Evidence = parse_json(&body)?;
    let supporting = supporting(&mut evidence.supporting)?;
    let _slot = verifier
        .slots
        .appraisals
        .try_acquire()
        .map_err(|_| ApiError::too_many("appraising: too much evidence at once, try again"))?;
    let node = &enrolled.attester.node;
    boot_step(Step::EvidenceReceived, node, milliseconds(received_at_ms - enrolled.nonce.issued_at_ms));

    let (policy, context, judgement) = appraised(&verifier, &enrolled, nonce, evidence).await?;
    let submission =
        Submission { received_at_ms, body: &body, body_sha256: &body_sha256, nonce, policy, context, supporting };
    conclude(&verifier, &enrolled, &submission, judgement).await.map(Json)
}

/// How far the release is: answers when there is something to say, or after 25 s.
#[utoipa::path(get, path = "/agent/v1/sessions/{id}/release", tag = "agent",
    params(("id" = String, Path, description = "session")), responses((status = 200, body = ReleaseStatus)))]
pub(crate) async fn release(
    State(verifier): State<Arc<Verifier>>,
    Named(id): Named<SessionId>,
    BearerProof(proof): BearerProof,
) -> Result<Json<ReleaseStatus>, ApiError> {
    let admission = admission(&verifier, id, &proof).await?;
    verifier.releases.status(admission, LONG_POLL).await.map(Json).map_err(call_failed)
}

/// The agent lets go of the airlock. Its port moves once this answer is out.
#[utoipa::path(post, path = "/agent/v1/sessions/{id}/ready", tag = "agent",
    params(("id" = String, Path, description = "session")), responses((status = 200)))]
pub(crate) async fn ready(
    State(verifier): State<Arc<Verifier>>,
    Named(id): Named<SessionId>,
    BearerProof(proof): BearerProof,
) -> Result<LeavingAnswer, ApiError> {
    let admission = admission(&verifier, id, &proof).await?;
    verifier.releases.ready(admission).await.map(LeavingAnswer).map_err(call_failed)
}

/// The sealed grant. Waits while the port is being moved.
#[utoipa::path(get, path = "/agent/v1/sessions/{id}/grant", tag = "agent",
    params(("id" = String, Path, description = "session")), responses((status = 200, body = SealedGrant)))]
pub(crate) async fn grant(
    State(verifier): State<Arc<Verifier>>,
    Named(id): Named<SessionId>,
    BearerProof(proof): BearerProof,
) -> Result<Json<SealedGrant>, ApiError> {
    let admission = admission(&verifier, id, &proof).await?;
    verifier.releases.grant(admission).await.map(Json).map_err(call_failed)
}

/// The agent hands over to the tenant's kernel.
#[utoipa::path(post, path = "/agent/v1/sessions/{id}/handover", tag = "agent",
    params(("id" = String, Path, description = "session")), responses((status = 200)))]
pub(crate) async fn handover(
    State(verifier): State<Arc<Verifier>>,
    Named(id): Named<SessionId>,
    BearerProof(proof): BearerProof,
) -> Result<Json<()>, ApiError> {
    let admission = admission(&verifier, id, &proof).await?;
    verifier.releases.handover(admission).await.map(Json).map_err(call_failed)
}

/// What came in, for the archive.
struct Submission<'a> {
    received_at_ms: i64,
    body: &'a str,
    body_sha256: &'a str,
    nonce: Nonce,
    policy: Option<String>,
    context: CaseContext,
    /// Results of other verifiers.
    supporting: Vec<String>,
}

/// Reaches the judgement, with the digest of the policy that judged and what else it depended on.
async fn appraised(
    verifier: &Arc<Verifier>,
    enrolled: &Enrolled,
    nonce: Nonce,
    evidence: Evidence,
) -> Result<(Option<String>, CaseContext, Judgement), ApiError> {
    let attester = enrolled.attester.clone();
    let last_clock = verifier.store.last_clock(&attester.node).await.map_err(db_failed)?;
    let boot = Boot { id: attester.airlock.boot, machine_resets: attester.airlock.machine_resets };
    let boot = verifier.store.boot_facts(&attester.node, boot).await.map_err(db_failed)?;
    let policy = verifier.store.active_policy().await.map_err(policy_refused)?;
    let policy_digest = policy.as_ref().map(|policy| policy.digest().to_string());
    let settings = verifier.settings_for(&attester.node);
    let tee_collateral = Arc::clone(&verifier.tee_collateral);
    let now_seconds = verifier.clock.now_seconds();
    let context = CaseContext {
        settings: settings.clone(),
        last_clock,
        now_seconds,
        boot: Some(boot),
        tee_collateral: (!evidence.tee.is_empty()).then(|| tee_collateral.digests()),
    };
    let lifetime_seconds = i64::try_from(verifier.result_lifetime.as_secs()).unwrap_or(0);
    let judgement = computed("appraising evidence", move || {
        let case = Case {
            ak_public: &attester.ak_public,
            nonce: &nonce,
            evidence: &evidence,
            settings: &settings,
            last_clock: last_clock.as_ref(),
            boot: &boot,
            tee_collateral: &tee_collateral,
            tee_at_seconds: now_seconds,
            policy: policy.as_deref(),
            now_seconds,
        };
        judge(&case, &attester, lifetime_seconds)
    })
    .await?;
    Ok((policy_digest, context, judgement))
}

/// Records the judgement and sets off what follows from it: the release, or the report to isolation.
async fn conclude(
    verifier: &Verifier,
    enrolled: &Enrolled,
    submission: &Submission<'_>,
    judgement: Judgement,
) -> Result<Verdict, ApiError> {
    let node = &enrolled.attester.node;
    let id = EvidenceId::new();
    // Said before anything follows from it, so that the steps are logged in their order.
    let log_step = || {
        boot_step(Step::EvidenceAppraised, node, milliseconds(verifier.clock.now_ms() - submission.received_at_ms));
    };
    match judgement {
        Judgement::Accepted { claims, clock, pcrs, warnings } => {
            let now_ms = verifier.clock.now_ms();
            let release = Release {
                admission: claims.jti,
                session: enrolled.attester.session,
                node: node.clone(),
                project: claims.project.clone(),
                lease: claims.lease,
                boot: claims.boot,
                result: verifier.signer.sign(&claims).as_str().to_owned(),
                supporting: submission.supporting.clone(),
                result_expires_at_ms: claims.exp.saturating_mul(1000),
                step: ReleaseStep::Admitted,
                step_at_ms: now_ms,
                created_at_ms: now_ms,
                address: None,
                grant: None,
                failure: None,
            };
            let part = verifier.part();
            let begun = NewAttestation { claims: &claims, proof: enrolled.proof, pcrs: &pcrs, clock: &clock, part };
            let begun = verifier.continuous.then_some(begun);
            let outcome = match verifier.role {
                Role::Release => Outcome::Accepted(&release),
                Role::AppraiseOnly => Outcome::Affirmed(&release),
            };
            record(verifier, enrolled, submission, id, Some(&clock), outcome, begun).await?;
            log_step();
            crate::release::crash_point("release::admitted");
            tracing::info!(event = "verdict.accepted", %node, evidence = %id, admission = %release.admission, ?warnings, "accepted");
            match verifier.role {
                Role::Release => {
                    verifier.releases.begin(release);
                    Ok(Verdict::Accepted)
                }
                Role::AppraiseOnly => {
                    let attestation = verifier.continuous.then_some(release.admission);
                    Ok(Verdict::Affirmed { result: release.result, attestation })
                }
            }
        }
        Judgement::Rejected { reasons, clock } => {
            record(verifier, enrolled, submission, id, clock.as_ref(), Outcome::Rejected(&reasons), None).await?;
            log_step();
            tracing::warn!(event = "verdict.rejected", %node, evidence = %id, ?reasons, "rejected");
            verifier.reports.wake();
            Ok(Verdict::Rejected { reasons })
        }
    }
}

async fn record(
    verifier: &Verifier,
    enrolled: &Enrolled,
    submission: &Submission<'_>,
    id: EvidenceId,
    clock: Option<&ClockInfo>,
    outcome: Outcome<'_>,
    attestation: Option<NewAttestation<'_>>,
) -> Result<(), ApiError> {
    let new = NewVerdict {
        id,
        attester: &enrolled.attester,
        nonce: submission.nonce,
        body: submission.body,
        body_sha256: submission.body_sha256,
        received_at_ms: submission.received_at_ms,
        policy: submission.policy.as_deref(),
        clock,
        context: Some(&submission.context),
        outcome,
        attestation,
    };
    if verifier.store.record_verdict(&new).await.map_err(db_failed)? {
        Ok(())
    } else {
        Err(session_refused(SessionError::NonceUsed))
    }
}

/// The agent lost the answer and sent the same body again: the same verdict. Anything else has no nonce any more.
async fn repeated(verifier: &Verifier, id: SessionId, body_sha256: &str) -> Result<Json<Verdict>, ApiError> {
    match verifier.store.verdict_of_session(id).await.map_err(db_failed)? {
        Some((VerdictRecord { verdict, reasons, evidence, admission, .. }, archived)) if archived == body_sha256 => {
            match (verdict, verifier.role) {
                (VerdictWord::Rejected, _) => Ok(Json(Verdict::Rejected { reasons })),
                (VerdictWord::Accepted, Role::Release) => Ok(Json(Verdict::Accepted)),
                (VerdictWord::Accepted, Role::AppraiseOnly) => {
                    let archived = verifier.store.evidence(evidence).await.map_err(db_failed)?;
                    let result = archived.and_then(|archived| archived.result);
                    let attestation = admission.filter(|_| verifier.continuous);
                    result.map(|result| Json(Verdict::Affirmed { result, attestation })).ok_or_else(no_session)
                }
            }
        }
        Some(_) | None => Err(session_refused(SessionError::NonceUsed)),
    }
}

/// The session that `proof` opens.
async fn authenticated(verifier: &Verifier, id: SessionId, proof: &Proof) -> Result<Session, ApiError> {
    let session = verifier.store.session(id).await.map_err(db_failed)?.ok_or_else(no_session)?;
    session.authenticate(proof, verifier.clock.now_ms()).map_err(|refused| {
        tracing::warn!(event = "agent.unauthorized", session = %id, %refused, "a call with the wrong proof");
        session_refused(refused)
    })?;
    Ok(session)
}

/// The admission of an accepted session.
async fn admission(verifier: &Verifier, id: SessionId, proof: &Proof) -> Result<AdmissionId, ApiError> {
    match authenticated(verifier, id, proof).await? {
        Session::Appraised(Appraised { admission: Some(admission), .. }) => Ok(admission),
        Session::Appraised(Appraised { admission: None, .. }) => {
            Err(ApiError::forbidden("rejected", "the evidence of this session was rejected: there is no release"))
        }
        Session::Challenged(_) | Session::Enrolled(_) => {
            Err(ApiError::conflict("no-verdict", "this session has no verdict yet: send evidence"))
        }
    }
}

fn call_failed(error: CallError) -> ApiError {
    match error {
        CallError::TooEarly { .. } => ApiError::conflict("too-early", error),
        CallError::Undone { .. } => ApiError::conflict("release-undone", error),
        CallError::Complete => ApiError::conflict("release-complete", error),
        CallError::Unknown => ApiError::not_found(error),
        CallError::Busy => ApiError::unavailable("busy", error),
        CallError::Journal(cause) => ApiError::internal("reading the release journal", &cause),
    }
}
