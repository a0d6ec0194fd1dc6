//! Tenants' secrets, as [`crate::secret`] encrypted them: one a lease and project. Which project a lease is of is
//! isolation's to say, so a row counts only for an admission that names both.

use super::{DbError, VerifierStore, query_failed};
use assay_wire::id::{LeaseId, ProjectId};

/// A stored secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSecret {
    /// Encrypted.
    pub sealed: String,
    /// Of how many shares it is one.
    pub shares: u8,
}

impl VerifierStore {
    /// Stores a secret in place of the one before.
    ///
    /// # Errors
    /// The database failed.
    pub async fn put_secret(
        &self,
        lease: LeaseId,
        project: &ProjectId,
        secret: &StoredSecret,
        by: &str,
        now_ms: i64,
    ) -> Result<(), DbError> {
        sqlx::query(
            "INSERT INTO tenant_secrets (lease, project, sealed, shares, set_by, set_at_ms) \
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (lease, project) DO UPDATE SET sealed = excluded.sealed, \
             shares = excluded.shares, set_by = excluded.set_by, set_at_ms = excluded.set_at_ms",
        )
        .bind(lease.to_string())
        .bind(project.as_str())
        .bind(&secret.sealed)
        .bind(i64::from(secret.shares))
        .bind(by)
        .bind(now_ms)
        .execute(self.pool())
        .await
        .map_err(query_failed("storing a tenant's secret"))?;
        Ok(())
    }

    /// The secret of a lease, if its project has given one.
    ///
    /// # Errors
    /// The database failed.
    pub async fn secret(&self, lease: LeaseId, project: &ProjectId) -> Result<Option<StoredSecret>, DbError> {
        let row: Option<(String, i64)> =
            sqlx::query_as("SELECT sealed, shares FROM tenant_secrets WHERE lease = $1 AND project = $2")
                .bind(lease.to_string())
                .bind(project.as_str())
                .fetch_optional(self.pool())
                .await
                .map_err(query_failed("reading a tenant's secret"))?;
        Ok(row.map(|(sealed, shares)| StoredSecret { sealed, shares: u8::try_from(shares).unwrap_or(u8::MAX) }))
    }

    /// Forgets a secret. Answers whether there was one.
    ///
    /// # Errors
    /// The database failed.
    pub async fn delete_secret(&self, lease: LeaseId, project: &ProjectId) -> Result<bool, DbError> {
        let done = sqlx::query("DELETE FROM tenant_secrets WHERE lease = $1 AND project = $2")
            .bind(lease.to_string())
            .bind(project.as_str())
            .execute(self.pool())
            .await
            .map_err(query_failed("forgetting a tenant's secret"))?;
        Ok(done.rows_affected() > 0)
    }
}
