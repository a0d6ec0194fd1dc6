//! Tenants' secrets: a project gives one for a lease, and the node that is admitted for that lease gets it, sealed to its
//! TPM, while the admission stands. What an operator cannot do: set or read one.

use super::attest::attested_node;
use super::extract::{BearerProof, JsonBody, Named};
use super::{Verifier, computed, db_failed};
use crate::secret::MAX_SECRET_BYTES;
use crate::store::secrets::StoredSecret;
use assay_service::auth::{Caller, Role};
use assay_service::error::ApiError;
use assay_tpm::seal::seal_grant;
use assay_wire::attestation::{SealedSecret, SecretRequest};
use assay_wire::id::{AdmissionId, LeaseId, ProjectId};
use axum::Json;
use axum::extract::State;
use std::sync::Arc;
use zeroize::Zeroizing;

/// Stores the secret of a lease, in place of the one before.
#[utoipa::path(put, path = "/v1/leases/{lease}/secret", tag = "tenant", request_body = SecretRequest,
    params(("lease" = String, Path, description = "lease")), responses(
    (status = 200),
    (status = 400, description = "`secret-size`, `secret-shares`", body = assay_wire::problem::Problem),
    (status = 403, description = "not a project's token", body = assay_wire::problem::Problem),
))]
pub(crate) async fn put_secret(
    State(verifier): State<Arc<Verifier>>,
    Named(lease): Named<LeaseId>,
    caller: Caller,
    JsonBody(request): JsonBody<SecretRequest>,
) -> Result<Json<()>, ApiError> {
    let project = project_of(&caller)?;
    let share = Zeroizing::new(request.share);
    if share.is_empty() || share.len() > MAX_SECRET_BYTES {
        let problem = format!("the secret has {} octets; 1 to {MAX_SECRET_BYTES} are taken", share.len());
        return Err(ApiError::bad_request("secret-size", problem));
    }
    if request.shares == 0 {
        return Err(ApiError::bad_request("secret-shares", "a secret has at least one share"));
    }
    let sealed = verifier.secrets.seal(lease, project, &share);
    let stored = StoredSecret { sealed, shares: request.shares };
    let now_ms = verifier.clock.now_ms();
    verifier.store.put_secret(lease, project, &stored, &caller.name, now_ms).await.map_err(db_failed)?;
    tracing::info!(event = "secret.set", %lease, %project, by = caller.name, shares = request.shares, "a secret is set");
    Ok(Json(()))
}

/// Forgets the secret of a lease. What a node has fetched, it has.
#[utoipa::path(delete, path = "/v1/leases/{lease}/secret", tag = "tenant",
    params(("lease" = String, Path, description = "lease")), responses(
    (status = 200),
    (status = 404, body = assay_wire::problem::Problem),
))]
pub(crate) async fn delete_secret(
    State(verifier): State<Arc<Verifier>>,
    Named(lease): Named<LeaseId>,
    caller: Caller,
) -> Result<Json<()>, ApiError> {
    let project = project_of(&caller)?;
    if !verifier.store.delete_secret(lease, project).await.map_err(db_failed)? {
        return Err(ApiError::not_found(format!("lease {lease} has no secret of project `{project}`")));
    }
    tracing::info!(event = "secret.forgotten", %lease, %project, by = caller.name, "a secret is forgotten");
    Ok(Json(()))
}

/// The secret of the node's lease, sealed to its TPM. Only while the admission stands, and only once the tenant's system
/// has shown good evidence.
#[utoipa::path(get, path = "/agent/v1/attestations/{admission}/secret", tag = "agent",
    params(("admission" = String, Path, description = "admission")), responses(
    (status = 200, body = SealedSecret),
    (status = 403, description = "wrong proof, or `admission-ended`", body = assay_wire::problem::Problem),
    (status = 404, description = "the lease has no secret", body = assay_wire::problem::Problem),
    (status = 409, description = "`not-attested`: send evidence first", body = assay_wire::problem::Problem),
))]
pub(crate) async fn secret(
    State(verifier): State<Arc<Verifier>>,
    Named(admission): Named<AdmissionId>,
    BearerProof(proof): BearerProof,
) -> Result<Json<SealedSecret>, ApiError> {
    // Read again: a secret that is given out cannot be taken back.
    let known = attested_node(&verifier, admission, &proof).await?;
    if known.progress.last_seen_at_ms.is_none() {
        return Err(ApiError::conflict("not-attested", "the tenant's system has shown no evidence yet: push first"));
    }
    let attested = known.attested;
    let (lease, project) = (attested.claims.lease, &attested.project);
    let stored = verifier.store.secret(lease, project).await.map_err(db_failed)?;
    let stored = stored.ok_or_else(|| ApiError::not_found(format!("lease {lease} has no secret")))?;
    let share = verifier.secrets.open(lease, project, &stored.sealed);
    let share = share.map_err(|error| ApiError::internal("opening a tenant's secret", &error))?;
    let (node, project) = (attested.node.clone(), project.clone());
    let sealing = move || {
        let ak_name = attested.baseline.ak.name().clone();
        seal_grant(&attested.ek_public, ak_name.as_bytes(), admission, &share)
    };
    let sealed = computed("sealing a tenant's secret", sealing).await?;
    let sealed = sealed.map_err(|error| ApiError::internal("sealing a tenant's secret", &error))?;
    tracing::info!(event = "secret.released", %node, %project, %lease, %admission, "a secret is released to a node");
    Ok(Json(SealedSecret { shares: stored.shares, sealed }))
}

fn project_of(caller: &Caller) -> Result<&ProjectId, ApiError> {
    match &caller.role {
        Role::Project(project) => Ok(project),
        Role::Operator | Role::Service => {
            Err(ApiError::forbidden("forbidden", "a secret is its project's own: it takes a token of that project")
                .with_hint("assay token issue … gives a project's token; ASSAY_TOKEN uses it"))
        }
    }
}
