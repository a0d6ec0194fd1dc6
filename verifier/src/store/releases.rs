//! The release's journal: one row an admission. Written before the next effect, by compare-and-set on the step, so that
//! a step is never skipped and two writers cannot both move a release on.

use super::verifiers::RunId;
use super::{DbError, VerifierStore, from_json, parsed, query_failed};
use crate::release::journal::{Position, ReleaseStep};
use assay_wire::agent::{SealedGrant, TenantAddress};
use assay_wire::id::{AdmissionId, BootId, LeaseId, NodeId, ProjectId, SessionId};

/// A journal entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// The admission: the result's `jti`, and the key by which every effect is idempotent.
    pub admission: AdmissionId,
    /// The session that it came from.
    pub session: SessionId,
    /// The node.
    pub node: NodeId,
    /// The project.
    pub project: ProjectId,
    /// The lease.
    pub lease: LeaseId,
    /// The boot.
    pub boot: BootId,
    /// The signed attestation result.
    pub result: String,
    /// Results of other verifiers, passed on with it.
    pub supporting: Vec<String>,
    /// When it expires: milliseconds since the Unix epoch.
    pub result_expires_at_ms: i64,
    /// The step that was written last.
    pub step: ReleaseStep,
    /// When: milliseconds since the Unix epoch.
    pub step_at_ms: i64,
    /// When the release began: milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// From `exported` on: where the node will live.
    pub address: Option<TenantAddress>,
    /// From `exported` on: opaque here, only the node's TPM opens it.
    pub grant: Option<SealedGrant>,
    /// From `unwinding` on: why.
    pub failure: Option<String>,
}

impl Release {
    /// What of it decides.
    #[must_use]
    pub fn position(&self) -> Position {
        Position { step: self.step, step_at_ms: self.step_at_ms, result_expires_at_ms: self.result_expires_at_ms }
    }
}

impl VerifierStore {
    /// Writes the step that `release` has reached, with what it learnt. Answers `false`, having changed nothing, if the
    /// journal no longer stands at `from` or the release is no longer this process's: somebody else drives it.
    ///
    /// # Errors
    /// The database failed.
    pub async fn write_step(&self, release: &Release, from: ReleaseStep) -> Result<bool, DbError> {
        let done = sqlx::query(
            "UPDATE releases SET step = $1, step_at_ms = $2, address = $3, sealed_grant = $4, failure = $5 \
             WHERE admission = $6 AND step = $7 AND owner = $8",
        )
        .bind(release.step.as_str())
        .bind(release.step_at_ms)
        .bind(release.address.as_ref().map(json))
        .bind(release.grant.as_ref().map(json))
        .bind(release.failure.as_deref())
        .bind(release.admission.to_string())
        .bind(from.as_str())
        .bind(self.run().to_string())
        .execute(self.pool())
        .await
        .map_err(query_failed("writing the release journal"))?;
        Ok(done.rows_affected() == 1)
    }

    /// One journal entry.
    ///
    /// # Errors
    /// The database failed.
    pub async fn release(&self, admission: AdmissionId) -> Result<Option<Release>, DbError> {
        let row: Option<ReleaseRow> = sqlx::query_as(select_releases!("WHERE admission = $1"))
            .bind(admission.to_string())
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading the release journal"))?;
        row.map(Release::try_from).transpose()
    }

    /// The releases that are not finished, oldest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn unfinished_releases(&self) -> Result<Vec<Release>, DbError> {
        let rows: Vec<ReleaseRow> = sqlx::query_as(select_releases!(
            "WHERE step NOT IN ('handed-over', 'unwound') ORDER BY created_at_ms, admission"
        ))
        .fetch_all(self.pool())
        .await
        .map_err(query_failed("reading the unfinished releases"))?;
        rows.into_iter().map(Release::try_from).collect()
    }

    /// The latest releases, newest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn releases(&self) -> Result<Vec<Release>, DbError> {
        let rows: Vec<ReleaseRow> =
            sqlx::query_as(select_releases!("ORDER BY created_at_ms DESC, admission LIMIT 500"))
                .fetch_all(self.pool())
                .await
                .map_err(query_failed("reading the releases"))?;
        rows.into_iter().map(Release::try_from).collect()
    }
}

/// Writes the first entry of a release, which `owner` will drive, as part of the transaction that records its verdict.
pub(super) async fn insert(tx: &mut sqlx::AnyConnection, release: &Release, owner: RunId) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO releases (admission, session, node, project, lease, boot, result, result_expires_at_ms, step, \
         step_at_ms, created_at_ms, owner, supporting) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
    )
    .bind(release.admission.to_string())
    .bind(release.session.to_string())
    .bind(release.node.as_str())
    .bind(release.project.as_str())
    .bind(release.lease.to_string())
    .bind(release.boot.to_string())
    .bind(&release.result)
    .bind(release.result_expires_at_ms)
    .bind(release.step.as_str())
    .bind(release.step_at_ms)
    .bind(release.created_at_ms)
    .bind(owner.to_string())
    .bind(json(&release.supporting))
    .execute(tx)
    .await
    .map(|_| ())
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[derive(sqlx::FromRow)]
struct ReleaseRow {
    admission: String,
    session: String,
    node: String,
    project: String,
    lease: String,
    boot: String,
    result: String,
    supporting: String,
    result_expires_at_ms: i64,
    step: String,
    step_at_ms: i64,
    created_at_ms: i64,
    address: Option<String>,
    sealed_grant: Option<String>,
    failure: Option<String>,
}

impl TryFrom<ReleaseRow> for Release {
    type Error = DbError;
    fn try_from(row: ReleaseRow) -> Result<Self, DbError> {
        Ok(Self {
            admission: parsed("an admission id", &row.admission)?,
            session: parsed("a session id", &row.session)?,
            node: parsed("a node name", &row.node)?,
            project: parsed("a project name", &row.project)?,
            lease: parsed("a lease id", &row.lease)?,
            boot: parsed("a boot id", &row.boot)?,
            result: row.result,
            supporting: from_json("supporting results", &row.supporting)?,
            result_expires_at_ms: row.result_expires_at_ms,
            step: parsed("a release step", &row.step)?,
            step_at_ms: row.step_at_ms,
            created_at_ms: row.created_at_ms,
            address: row.address.map(|text| from_json("a tenant address", &text)).transpose()?,
            grant: row.sealed_grant.map(|text| from_json("a sealed grant", &text)).transpose()?,
            failure: row.failure,
        })
    }
}

macro_rules! select_releases {
    ($rest:literal) => {
        concat!(
            "SELECT admission, session, node, project, lease, boot, result, supporting, result_expires_at_ms, step, step_at_ms, \
             created_at_ms, address, sealed_grant, failure FROM releases ",
            $rest
        )
    };
}
use select_releases;
