//! Leases, looked up by their ids: what callers name.

use super::{RecordError, Store, failed, parsed};
use assay_wire::id::LeaseId;
use assay_wire::isolation::NodeLease;
use sqlx::Row as _;
use sqlx::any::AnyRow;

const READING_LEASES: &str = "reading the leases";

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
