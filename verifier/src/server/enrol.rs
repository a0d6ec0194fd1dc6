//! Enrolment and credential activation: step 4 of the boot path.

use super::extract::{JsonBody, Named};
use super::{Verifier, computed, db_failed};
use crate::identity::binding::{IdentityClaim, Origin};
use crate::identity::{EkClaim, EkDigest, Endorsers, VerifiedEk, verify_ek};
use crate::quote::AkPublic;
use crate::session::{Attester, Challenged, Enrolled, IssuedNonce, Nonce, Proof, Session, SessionError};
use crate::store::incidents::NewIncident;
use crate::store::sessions::ActivatedFrom;
use assay_service::client::ClientError;
use assay_service::error::{ApiError, chain};
use assay_service::telemetry::boot_step;
use assay_tpm::credential::make_credential;
use assay_wire::agent::{ActivateRequest, Credential, EnrolChallenge, EnrolRequest, EvidenceRequest, IakEndorsement};
use assay_wire::evidence::QUOTED_PCRS;
use assay_wire::id::{NodeId, SessionId};
use assay_wire::isolation::AirlockContext;
use assay_wire::step::Step;
use axum::Json;
use axum::extract::State;
use std::sync::Arc;
use std::time::Duration;

/// Larger than any TPM's `TPMT_PUBLIC`.
const MOST_PUBLIC_BYTES: usize = 2 * 1024;
/// Larger than any EK certificate with the padding that some TPMs keep behind it.
const MOST_CERTIFICATE_BYTES: usize = 8 * 1024;
/// Larger than any maker's chain, with padding.
const MOST_CHAIN_BYTES: usize = 32 * 1024;
/// Larger than any `TPMS_ATTEST` or `TPMT_SIGNATURE`.
const MOST_ATTEST_BYTES: usize = 2 * 1024;

/// The agent introduces itself.
#[utoipa::path(post, path = "/agent/v1/enrol", tag = "agent", request_body = EnrolRequest, responses(
    (status = 200, body = EnrolChallenge),
    (status = 403, description = "EK or AK are not accepted, or the node is bound to another EK", body = assay_wire::problem::Problem),
    (status = 409, description = "the node is not in the airlock", body = assay_wire::problem::Problem),
))]
pub(crate) async fn enrol(
    State(verifier): State<Arc<Verifier>>,
    JsonBody(request): JsonBody<EnrolRequest>,
) -> Result<Json<EnrolChallenge>, ApiError> {
    check_sizes(&request)?;
    let _slot = verifier
        .slots
        .enrolments
        .try_acquire()
        .map_err(|_| ApiError::too_many("enrolling: too many nodes at once, try again"))?;
    let airlock = airlock_context(&verifier, &request.node).await?;
    let node = request.node.clone();
    let proof = Proof::random();
    let digest = proof.digest();
    let (worker, now_seconds) = (Arc::clone(&verifier), verifier.clock.now_seconds());
    let operator_vouches = is_allowed(&verifier, &request).await?;
    let checked = computed("checking EK and AK", move || {
        check_keys(&worker.endorsers(), &request, operator_vouches, &proof, now_seconds)
    })
    .await??;
    tracing::info!(event = "agent.ek_accepted", %node, ek = %checked.ek.sha256(), by = %checked.ek.endorsement(), "EK is a TPM's");
    let now_ms = verifier.clock.now_ms();
    let session = SessionId::random();
    let attester = Attester {
        session,
        node,
        ek_public: checked.ek.public().to_vec(),
        ak_public: checked.ak_public,
        airlock,
        created_at_ms: now_ms,
        expires_at_ms: now_ms.saturating_add(verifier.times.session_ms),
    };
    let challenge_expires_at_ms = now_ms.saturating_add(verifier.times.challenge_ms);
    let challenged = Challenged { attester, proof: digest, challenge_expires_at_ms };
    verifier.store.insert_challenge(&challenged).await.map_err(db_failed)?;
    Ok(Json(EnrolChallenge { session, credential: checked.credential }))
}

/// The agent opened the credential, or asks for a new nonce.
#[utoipa::path(post, path = "/agent/v1/sessions/{id}/activate", tag = "agent", request_body = ActivateRequest,
    params(("id" = String, Path, description = "session")), responses(
    (status = 200, body = EvidenceRequest),
    (status = 403, description = "wrong proof, expired, or the node is bound to another EK", body = assay_wire::problem::Problem),
))]
pub(crate) async fn activate(
    State(verifier): State<Arc<Verifier>>,
    Named(id): Named<SessionId>,
    JsonBody(request): JsonBody<ActivateRequest>,
) -> Result<Json<EvidenceRequest>, ApiError> {
    let proof: Proof = request.proof.parse().map_err(session_refused)?;
    let now_ms = verifier.clock.now_ms();
    let nonce = IssuedNonce {
        nonce: Nonce::random(),
        issued_at_ms: now_ms,
        expires_at_ms: now_ms.saturating_add(verifier.times.nonce_ms),
    };
    let session = verifier.store.session(id).await.map_err(db_failed)?.ok_or_else(no_session)?;
    let (enrolled, from) = match session {
        Session::Challenged(challenged) => {
            let node = challenged.attester.node.clone();
            match challenged.activate(&proof, nonce, now_ms) {
                Ok(enrolled) => (enrolled, ActivatedFrom::Challenged),
                Err(refused) => {
                    // One try: who cannot open the credential is not the TPM that it was made for.
                    verifier.store.delete_challenge(id).await.map_err(db_failed)?;
                    tracing::warn!(event = "agent.activation_failed", %node, session = %id, %refused, "activation failed");
                    return Err(session_refused(refused));
                }
            }
        }
        Session::Enrolled(enrolled) => {
            (enrolled.renew(&proof, nonce, now_ms).map_err(session_refused)?, ActivatedFrom::Enrolled)
        }
        Session::Appraised(_) => return Err(session_refused(SessionError::NonceUsed)),
    };
    bind(&verifier, &enrolled, now_ms).await?;
    if !verifier.store.activate(&enrolled, from).await.map_err(db_failed)? {
        return Err(ApiError::conflict("session-changed", "activating: the session was activated at the same time"));
    }
    if from == ActivatedFrom::Challenged {
        let since = now_ms.saturating_sub(enrolled.attester.created_at_ms);
        boot_step(Step::AgentEnrolled, &enrolled.attester.node, milliseconds(since));
    }
    Ok(Json(EvidenceRequest {
        nonce: nonce.nonce.as_bytes().to_vec(),
        pcrs: QUOTED_PCRS.collect(),
        expires_in_seconds: u64::try_from(verifier.times.nonce_ms / 1000).unwrap_or(0),
        co_verifiers: verifier.co_verifiers_of(&enrolled.attester.airlock.project),
    }))
}

struct CheckedKeys {
    ek: VerifiedEk,
    ak_public: Vec<u8>,
    credential: Credential,
}

/// Bounds on everything, before any of it is looked at.
fn check_sizes(request: &EnrolRequest) -> Result<(), ApiError> {
    let iak = request.iak.as_ref();
    let of_iak = |part: fn(&IakEndorsement) -> &Vec<u8>| iak.map_or(0, |iak| part(iak).len());
    for (what, length, most) in [
        ("EK", request.ek_public.len(), MOST_PUBLIC_BYTES),
        ("AK", request.ak_public.len(), MOST_PUBLIC_BYTES),
        ("EK certificate", request.ek_certificate.len(), MOST_CERTIFICATE_BYTES),
        ("EK certificate's chain", request.ek_chain.len(), MOST_CHAIN_BYTES),
        ("IAK", of_iak(|iak| &iak.public), MOST_PUBLIC_BYTES),
        ("IAK certificate", of_iak(|iak| &iak.certificate), MOST_CERTIFICATE_BYTES),
        ("IAK certificate's chain", of_iak(|iak| &iak.chain), MOST_CHAIN_BYTES),
        ("IAK's statement", of_iak(|iak| &iak.attest), MOST_ATTEST_BYTES),
        ("IAK's signature", of_iak(|iak| &iak.signature), MOST_ATTEST_BYTES),
    ] {
        if length > most {
            let detail = format!("enrolling: the {what} has {length} octets, more than any ({most})");
            return Err(ApiError::bad_request("malformed", detail));
        }
    }
    Ok(())
}

/// Whether an operator said that this EK is this node's. Of what is no EK at all, nobody did.
async fn is_allowed(verifier: &Verifier, request: &EnrolRequest) -> Result<bool, ApiError> {
    let Ok(ek) = EkDigest::of_public(&request.ek_public) else { return Ok(false) };
    match verifier.store.check_identity(&request.node, &ek).await.map_err(db_failed)? {
        IdentityClaim::Known(identity) => Ok(identity.origin == Origin::Allowed),
        IdentityClaim::New | IdentityClaim::OtherEk(_) | IdentityClaim::OtherNode(_) => Ok(false),
    }
}

/// EK by who vouches for it, AK by its attributes, and a credential that binds the one to the other.
fn check_keys(
    endorsers: &Endorsers,
    request: &EnrolRequest,
    operator_vouches: bool,
    proof: &Proof,
    now_seconds: i64,
) -> Result<CheckedKeys, ApiError> {
    let node = &request.node;
    let claim = EkClaim {
        public: &request.ek_public,
        certificate: &request.ek_certificate,
        chain: &request.ek_chain,
        iak: request.iak.as_ref(),
        operator_vouches,
    };
    let ek = verify_ek(endorsers, &claim, now_seconds).map_err(|error| {
        // The digest, so that an operator can allow it.
        let ek = EkDigest::of_public(&request.ek_public).map(|digest| digest.to_string()).unwrap_or_default();
        tracing::warn!(event = "agent.ek_refused", %node, ek, cause = chain(&error), "EK is not accepted");
        ApiError::forbidden("ek-refused", format!("enrolling node `{node}`: {}", chain(&error)))
    })?;
    let ak = AkPublic::parse(&request.ak_public).map_err(|error| {
        tracing::warn!(event = "agent.ak_refused", %node, cause = chain(&error), "AK is not accepted");
        ApiError::forbidden("ak-refused", format!("enrolling node `{node}`: {}", chain(&error)))
    })?;
    // A curve's point is looked at here: what is not on it is the agent's fault, not ours.
    let credential = make_credential(ek.public(), ak.name().as_bytes(), proof.expose()).map_err(|error| {
        tracing::warn!(event = "agent.ek_refused", %node, cause = chain(&error), "no credential for this EK");
        ApiError::forbidden("ek-refused", format!("enrolling node `{node}`: {}", chain(&error)))
    })?;
    Ok(CheckedKeys { ek, ak_public: request.ak_public.clone(), credential })
}

/// Lease, project and boot, or why the node cannot enrol now.
async fn airlock_context(verifier: &Verifier, node: &NodeId) -> Result<AirlockContext, ApiError> {
    verifier.peers.airlock(node).await.map_err(|error| match error.problem().map(|problem| problem.status) {
        Some(404 | 409) => {
            tracing::warn!(event = "agent.not_in_airlock", %node, cause = chain(&error), "an agent enrols out of turn");
            ApiError::conflict("not-in-airlock", format!("enrolling node `{node}`: it is not in the airlock"))
        }
        Some(_) | None => {
            log_unavailable(node, &error);
            ApiError::unavailable("isolation-unavailable", format!("enrolling node `{node}`: try again"))
        }
    })
}

fn log_unavailable(node: &NodeId, error: &ClientError) {
    tracing::error!(event = "isolation.unavailable", %node, cause = chain(error), "cannot ask isolation about a node");
}

/// Binds the node to the EK that it has now proven to possess; or records who else it is bound to, and refuses. Only
/// here, where possession is proven, so that nobody can make incidents of EKs that they have only heard of.
async fn bind(verifier: &Verifier, enrolled: &Enrolled, now_ms: i64) -> Result<(), ApiError> {
    let node = &enrolled.attester.node;
    let ek = EkDigest::of_public(&enrolled.attester.ek_public)
        .map_err(|error| ApiError::internal("reading a session's EK", &error))?;
    let claim = verifier.store.bind_identity(node, &ek, verifier.ek_binding, now_ms).await.map_err(db_failed)?;
    let Some(kind) = claim.incident() else { return Ok(()) };
    let detail = match &claim {
        IdentityClaim::Known(_) | IdentityClaim::New => {
            format!("node `{node}` came with its first EK {ek}, which waits for an operator")
        }
        IdentityClaim::OtherEk(known) => {
            format!("node `{node}` is bound to EK {}, but an agent came with EK {ek}", known.ek_sha256)
        }
        IdentityClaim::OtherNode(known) => {
            format!("EK {ek} is bound to node `{}`, but an agent came with it as node `{node}`", known.node)
        }
    };
    // Not reported to isolation: any machine in the airlock can claim any name, and must not get others rejected by it.
    let incident = NewIncident { node: node.clone(), ek, kind, detail, at_ms: now_ms };
    verifier.store.delete_challenge(enrolled.attester.session).await.map_err(db_failed)?;
    if verifier.store.record_incident(&incident).await.map_err(db_failed)? {
        tracing::warn!(event = "agent.identity_mismatch", %node, kind = %kind, detail = incident.detail, "an incident");
    }
    let answer = format!("enrolling node `{node}`: its TPM is not the one on record ({kind})");
    Err(ApiError::forbidden("identity-mismatch", answer)
        .with_hint("an operator settles it: `assay incident list`, then `assay incident settle`"))
}

/// Answers why a session does not go on.
pub(super) fn session_refused(error: SessionError) -> ApiError {
    match error {
        SessionError::WrongProof => ApiError::forbidden("wrong-proof", error),
        SessionError::ChallengeExpired | SessionError::SessionExpired | SessionError::NonceExpired => {
            ApiError::forbidden("expired", error)
        }
        SessionError::NotActivated => ApiError::forbidden("not-activated", error),
        SessionError::NonceUsed => ApiError::conflict("nonce-used", error),
    }
}

/// Answers that a session is not there (any more).
pub(super) fn no_session() -> ApiError {
    ApiError::not_found("there is no such session, or it expired: enrol again")
}

/// A difference of two times as a duration; none if the clock went back.
pub(super) fn milliseconds(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}
