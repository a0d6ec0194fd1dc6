//! Projects, as far as imaging knows them: whose attestation results count.

use super::{db_failed, may_see};
use crate::service::AppState;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::isolation::Project;
use assay_wire::problem::Problem;
use assay_wire::result::VerifierKey;
use axum::Json;
use axum::extract::State;
use std::sync::Arc;

/// More verifiers than any project has.
const MAX_KEYS: usize = 16;

/// Records a project, or replaces the verifiers that it trusts.
#[utoipa::path(post, path = "/v1/projects", request_body = Project, responses(
    (status = 200, description = "On record", body = Project),
    (status = 400, description = "A key is none", body = Problem),
    (status = 403, description = "Operators only", body = Problem)))]
pub(super) async fn post_project(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Json(project): Json<Project>,
) -> Result<Json<Project>, ApiError> {
    caller.require_operator()?;
    if project.verifier_keys.len() > MAX_KEYS {
        return Err(ApiError::bad_request("too-many-keys", format!("a project trusts at most {MAX_KEYS} verifiers")));
    }
    for key in &project.verifier_keys {
        key.parse::<VerifierKey>().map_err(|error| ApiError::bad_request("key-malformed", error))?;
    }
    state.exporter.db.put_project(&project).await.map_err(|error| db_failed(&error))?;
    tracing::info!(event = "project.recorded", project = %project.name, by = caller.name, "project recorded");
    Ok(Json(project))
}

/// Lists the projects that the caller may see.
#[utoipa::path(get, path = "/v1/projects", responses((status = 200, body = Vec<Project>)))]
pub(super) async fn get_projects(
    State(state): State<Arc<AppState>>,
    caller: Caller,
) -> Result<Json<Vec<Project>>, ApiError> {
    let mut projects = state.exporter.db.projects().await.map_err(|error| db_failed(&error))?;
    projects.retain(|project| may_see(&caller, &project.name));
    Ok(Json(projects))
}
