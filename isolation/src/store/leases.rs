//! Leases and admissions, looked up by their ids: what callers name.

use super::nodes::admission;
use super::{RecordError, Store, failed, parsed};
use assay_wire::id::{AdmissionId, LeaseId};
use assay_wire::isolation::{Admission, NodeLease};
use sqlx::Row as _;
use sqlx::any::AnyRow;

const READING_LEASES: &str = "reading the leases";
const READING_ADMISSIONS: &str = "reading the admissions";

impl Store {
    /// A lease, and whether it has ended.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn lease(&self, id: LeaseId) -> Result<Option<(NodeLease, bool)>, RecordError> {
        let row = sqlx::query("SELECT id, project, node, network, ended_ms FROM leases WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(self.database.pool())
            .await
            .map_err(failed(READING_LEASES))?;
        let Some(row) = row else { return Ok(None) };
        let ended: Option<i64> = row.try_get("ended_ms").map_err(failed(READING_LEASES))?;
        Ok(Some((lease(&row)?, ended.is_some())))
    }

    /// All live leases.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn leases(&self) -> Result<Vec<NodeLease>, RecordError> {
        let rows = sqlx::query("SELECT id, project, node, network FROM leases WHERE ended_ms IS NULL ORDER BY node")
            .fetch_all(self.database.pool())
            .await
            .map_err(failed(READING_LEASES))?;
        rows.iter().map(lease).collect()
    }

    /// An admission and its node.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn admission(&self, id: AdmissionId) -> Result<Option<Admission>, RecordError> {
        let row =
            sqlx::query("SELECT id, node, lease, boot, ak_name, expires_at_ms, revoked FROM admissions WHERE id = $1")
                .bind(id.to_string())
                .fetch_optional(self.database.pool())
                .await
                .map_err(failed(READING_ADMISSIONS))?;
        row.as_ref().map(wire_admission).transpose()
    }

    /// Revokes an admission that was never made: from now on it cannot be. Otherwise a revocation that overtakes its
    /// admission would be answered "no such thing", and then the port would open.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn revoke_unmade(&self, id: AdmissionId) -> Result<(), RecordError> {
        sqlx::query("INSERT INTO result_ids (id, purpose) VALUES ($1, 'revocation') ON CONFLICT (id) DO NOTHING")
            .bind(id.to_string())
            .execute(self.database.pool())
            .await
            .map_err(failed("recording the revocation"))?;
        Ok(())
    }

    /// The newest 1,000 admissions.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn admissions(&self) -> Result<Vec<Admission>, RecordError> {
        let rows = sqlx::query(
            "SELECT id, node, lease, boot, ak_name, expires_at_ms, revoked FROM admissions \
             ORDER BY created_ms DESC LIMIT 1000",
        )
        .fetch_all(self.database.pool())
        .await
        .map_err(failed(READING_ADMISSIONS))?;
        rows.iter().map(wire_admission).collect()
    }
}

fn lease(row: &AnyRow) -> Result<NodeLease, RecordError> {
    let doing = READING_LEASES;
    Ok(NodeLease {
        id: parsed(doing, row, "id")?,
        project: parsed(doing, row, "project")?,
        node: parsed(doing, row, "node")?,
        network: parsed(doing, row, "network")?,
    })
}

fn wire_admission(row: &AnyRow) -> Result<Admission, RecordError> {
    let record = admission(READING_ADMISSIONS, row)?;
    Ok(Admission {
        id: record.id,
        node: parsed(READING_ADMISSIONS, row, "node")?,
        lease: record.lease,
        boot: record.boot,
        expires_at_ms: record.expires_at_ms,
        revoked: record.revoked,
    })
}
