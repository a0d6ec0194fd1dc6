//! Appraisal policies: every version that was ever approved, and which one judges now.

use super::events::{EventKind, NewEvent};
use super::{DbError, VerifierStore, query_failed};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A policy on record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PolicyRecord {
    /// Its name.
    pub name: String,
    /// `sha256:<hex>` over its canonical form: what attestation results name.
    pub digest: String,
    /// The document as it was approved.
    pub document: String,
    /// Who approved it.
    pub added_by: String,
    /// When: milliseconds since the Unix epoch.
    pub added_at_ms: i64,
    /// Whether it judges now.
    pub active: bool,
}

impl VerifierStore {
    /// Records a policy and makes it the one that judges. The same document twice is one record.
    ///
    /// # Errors
    /// The database failed; then the policy that judged still does.
    pub async fn activate_policy(&self, policy: &PolicyRecord) -> Result<(), DbError> {
        let failed = || query_failed("activating a policy");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        sqlx::query(
            "INSERT INTO policies (digest, name, document, added_by, added_at_ms) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (digest) DO NOTHING",
        )
        .bind(&policy.digest)
        .bind(&policy.name)
        .bind(&policy.document)
        .bind(&policy.added_by)
        .bind(policy.added_at_ms)
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        sqlx::query(
            "INSERT INTO active_policy (slot, digest, activated_by, activated_at_ms) VALUES ('site', $1, $2, $3) \
             ON CONFLICT (slot) DO UPDATE SET digest = excluded.digest, activated_by = excluded.activated_by, \
             activated_at_ms = excluded.activated_at_ms",
        )
        .bind(&policy.digest)
        .bind(&policy.added_by)
        .bind(policy.added_at_ms)
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        let event = NewEvent {
            kind: EventKind::PolicyActivated,
            at_ms: policy.added_at_ms,
            project: None,
            node: None,
            admission: None,
            detail: BTreeMap::from([
                ("name", policy.name.clone()),
                ("digest", policy.digest.clone()),
                ("by", policy.added_by.clone()),
            ]),
        };
        let told = super::events::insert(&mut tx, &event).await.map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        self.told([told]);
        Ok(())
    }

    /// The policy that judges now.
    ///
    /// # Errors
    /// The database failed.
    pub async fn active_policy(&self) -> Result<Option<PolicyRecord>, DbError> {
        let row: Option<PolicyRow> = sqlx::query_as(
            "SELECT p.digest, p.name, p.document, p.added_by, p.added_at_ms, a.slot AS slot \
             FROM active_policy a JOIN policies p ON a.digest = p.digest WHERE a.slot = 'site'",
        )
        .fetch_optional(self.pool())
        .await
        .map_err(query_failed("reading the active policy"))?;
        Ok(row.map(PolicyRecord::from))
    }

    /// The digest of the policy that judges now.
    ///
    /// # Errors
    /// The database failed.
    pub async fn active_policy_digest(&self) -> Result<Option<String>, DbError> {
        let row: Option<(String,)> = sqlx::query_as("SELECT digest FROM active_policy WHERE slot = 'site'")
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading which policy is active"))?;
        Ok(row.map(|(digest,)| digest))
    }

    /// All policies, newest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn policies(&self) -> Result<Vec<PolicyRecord>, DbError> {
        let rows: Vec<PolicyRow> = sqlx::query_as(
            "SELECT p.digest, p.name, p.document, p.added_by, p.added_at_ms, a.slot AS slot \
             FROM policies p LEFT JOIN active_policy a ON a.digest = p.digest \
             ORDER BY p.added_at_ms DESC, p.digest LIMIT 500",
        )
        .fetch_all(self.pool())
        .await
        .map_err(query_failed("reading the policies"))?;
        Ok(rows.into_iter().map(PolicyRecord::from).collect())
    }
}

#[derive(sqlx::FromRow)]
struct PolicyRow {
    digest: String,
    name: String,
    document: String,
    added_by: String,
    added_at_ms: i64,
    slot: Option<String>,
}

impl From<PolicyRow> for PolicyRecord {
    fn from(row: PolicyRow) -> Self {
        Self {
            name: row.name,
            digest: row.digest,
            document: row.document,
            added_by: row.added_by,
            added_at_ms: row.added_at_ms,
            active: row.slot.is_some(),
        }
    }
}
