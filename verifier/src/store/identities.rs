//! Which node has which EK, and what went wrong with that.
//!
//! The first agent of a node that proves possession of its EK binds the node to it; from then on one EK is one node and
//! one node is one EK until an operator clears it (CVE-2025-13609 is what happens otherwise).

use super::events::{EventKind, NewEvent};
use super::{DbError, VerifierStore, from_json, parsed, query_failed};
use crate::quote::ClockInfo;
use assay_wire::id::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A node's identity on record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Identity {
    /// The node.
    pub node: NodeId,
    /// SHA-256 of its EK's `TPMT_PUBLIC`, hexadecimal.
    pub ek_sha256: String,
    /// When they were bound: milliseconds since the Unix epoch.
    pub bound_at_ms: i64,
}

/// Whether a node may be the one with this EK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityClaim {
    /// Neither is known.
    New,
    /// They are bound to one another.
    Known,
    /// The node is bound to another EK.
    OtherEk(Identity),
    /// The EK is bound to another node.
    OtherNode(Identity),
}

/// Something that an operator should look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Incident {
    /// The node that was named.
    pub node: NodeId,
    /// A stable word, like `identity-mismatch`.
    pub kind: String,
    /// What happened.
    pub detail: String,
    /// When: milliseconds since the Unix epoch.
    pub at_ms: i64,
}

impl VerifierStore {
    /// Compares a claim with what is on record.
    ///
    /// # Errors
    /// The database failed.
    pub async fn check_identity(&self, node: &NodeId, ek_sha256: &str) -> Result<IdentityClaim, DbError> {
        let mut known = self.identities_like(node, ek_sha256).await?;
        if let Some(own) = known.iter().position(|identity| identity.node == *node) {
            let own = known.swap_remove(own);
            return Ok(if own.ek_sha256 == ek_sha256 { IdentityClaim::Known } else { IdentityClaim::OtherEk(own) });
        }
        Ok(known.pop().map_or(IdentityClaim::New, IdentityClaim::OtherNode))
    }

    /// Binds a node to an EK whose possession was proven. Answers how the claim stands afterwards: `Known` if they are
    /// bound to one another, else whose record is in the way.
    ///
    /// # Errors
    /// The database failed.
    pub async fn bind_identity(&self, node: &NodeId, ek_sha256: &str, now_ms: i64) -> Result<IdentityClaim, DbError> {
        sqlx::query("INSERT INTO identities (node, ek_sha256, bound_at_ms) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING")
            .bind(node.as_str())
            .bind(ek_sha256)
            .bind(now_ms)
            .execute(self.pool())
            .await
            .map_err(query_failed("binding a node to its EK"))?;
        self.check_identity(node, ek_sha256).await
    }

    /// The TPM clock of the last verified quote of `node`.
    ///
    /// # Errors
    /// The database failed.
    pub async fn last_clock(&self, node: &NodeId) -> Result<Option<ClockInfo>, DbError> {
        let clock: Option<(Option<String>,)> = sqlx::query_as("SELECT last_clock FROM identities WHERE node = $1")
            .bind(node.as_str())
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading a node's last TPM clock"))?;
        clock.and_then(|(clock,)| clock).map(|clock| from_json("a TPM clock", &clock)).transpose()
    }

    /// All identities.
    ///
    /// # Errors
    /// The database failed.
    pub async fn identities(&self) -> Result<Vec<Identity>, DbError> {
        let rows: Vec<IdentityRow> =
            sqlx::query_as("SELECT node, ek_sha256, bound_at_ms FROM identities ORDER BY node")
                .fetch_all(self.pool())
                .await
                .map_err(query_failed("reading the identities"))?;
        rows.into_iter().map(Identity::try_from).collect()
    }

    /// Forgets a node's EK, and the sessions that were opened with it. Answers whether there was one.
    ///
    /// # Errors
    /// The database failed.
    pub async fn clear_identity(&self, node: &NodeId) -> Result<bool, DbError> {
        let failed = || query_failed("clearing a node's identity");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        let done = sqlx::query("DELETE FROM identities WHERE node = $1")
            .bind(node.as_str())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        sqlx::query("DELETE FROM sessions WHERE node = $1 AND state IN ('challenged', 'enrolled')")
            .bind(node.as_str())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        Ok(done.rows_affected() > 0)
    }

    /// Records an incident, and lets the oldest go beyond the limit.
    ///
    /// # Errors
    /// The database failed.
    pub async fn record_incident(&self, incident: &Incident) -> Result<(), DbError> {
        let failed = || query_failed("recording an incident");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        sqlx::query("INSERT INTO incidents (id, node, kind, detail, at_ms) VALUES ($1, $2, $3, $4, $5)")
            .bind(uuid::Uuid::now_v7().to_string())
            .bind(incident.node.as_str())
            .bind(&incident.kind)
            .bind(&incident.detail)
            .bind(incident.at_ms)
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        sqlx::query("DELETE FROM incidents WHERE id IN (SELECT id FROM incidents ORDER BY at_ms DESC, id DESC LIMIT 1000 OFFSET $1)")
            .bind(i64::from(self.limits.incidents))
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        let event = NewEvent {
            kind: EventKind::IdentityIncident,
            at_ms: incident.at_ms,
            project: None,
            node: Some(&incident.node),
            admission: None,
            detail: BTreeMap::from([("kind", incident.kind.clone()), ("detail", incident.detail.clone())]),
        };
        let told = super::events::insert(&mut tx, &event).await.map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        self.told([told]);
        Ok(())
    }

    /// The latest incidents, newest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn incidents(&self) -> Result<Vec<Incident>, DbError> {
        let rows: Vec<(String, String, String, i64)> =
            sqlx::query_as("SELECT node, kind, detail, at_ms FROM incidents ORDER BY at_ms DESC, id DESC LIMIT 500")
                .fetch_all(self.pool())
                .await
                .map_err(query_failed("reading the incidents"))?;
        rows.into_iter()
            .map(|(node, kind, detail, at_ms)| {
                Ok(Incident { node: parsed("a node name", &node)?, kind, detail, at_ms })
            })
            .collect()
    }

    async fn identities_like(&self, node: &NodeId, ek_sha256: &str) -> Result<Vec<Identity>, DbError> {
        let rows: Vec<IdentityRow> = sqlx::query_as(
            "SELECT node, ek_sha256, bound_at_ms FROM identities WHERE node = $1 OR ek_sha256 = $2 ORDER BY node",
        )
        .bind(node.as_str())
        .bind(ek_sha256)
        .fetch_all(self.pool())
        .await
        .map_err(query_failed("looking up a node's identity"))?;
        rows.into_iter().map(Identity::try_from).collect()
    }
}

#[derive(sqlx::FromRow)]
struct IdentityRow {
    node: String,
    ek_sha256: String,
    bound_at_ms: i64,
}

impl TryFrom<IdentityRow> for Identity {
    type Error = DbError;
    fn try_from(row: IdentityRow) -> Result<Self, DbError> {
        Ok(Self { node: parsed("a node name", &row.node)?, ek_sha256: row.ek_sha256, bound_at_ms: row.bound_at_ms })
    }
}
