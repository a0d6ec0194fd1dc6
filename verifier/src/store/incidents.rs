//! Incidents: claims to an identity that an operator must settle.

use super::events::{EventKind, NewEvent};
use super::identities::rebind;
use super::{DbError, VerifierStore, parsed, query_failed};
use crate::identity::EkDigest;
use crate::identity::binding::{IncidentKind, Settlement};
use assay_wire::id::NodeId;
use serde::{Deserialize, Serialize};
use sqlx::AnyConnection;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use uuid::Uuid;

macro_rules! select {
    () => {
        "SELECT id, node, ek_sha256, kind, detail, at_ms, last_at_ms, claims, settlement, settled_by, settled_at_ms \
         FROM incidents"
    };
}

/// The open ones before the settled ones.
macro_rules! newest_first {
    () => {
        " ORDER BY CASE WHEN settlement IS NULL THEN 0 ELSE 1 END, at_ms DESC, id DESC"
    };
}

/// Which incident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct IncidentId(Uuid);

impl fmt::Display for IncidentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for IncidentId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        text.parse().map(Self)
    }
}

/// A claim that was refused, to be recorded.
#[derive(Debug, Clone)]
pub struct NewIncident {
    /// The node that was named.
    pub node: NodeId,
    /// The EK whose possession was proven.
    pub ek: EkDigest,
    /// What is wrong with that.
    pub kind: IncidentKind,
    /// The same in words.
    pub detail: String,
    /// When: milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// Something that an operator must settle, or has settled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Incident {
    /// Which.
    pub id: IncidentId,
    /// The node that was named.
    pub node: NodeId,
    /// SHA-256 of the EK's DER `SubjectPublicKeyInfo`, hexadecimal.
    pub ek_sha256: String,
    /// What is wrong.
    pub kind: IncidentKind,
    /// The same in words.
    pub detail: String,
    /// When it was first seen: milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// When it was last seen: milliseconds since the Unix epoch.
    pub last_at_ms: i64,
    /// How often the claim was made.
    pub claims: u64,
    /// How it was settled; open until then.
    pub settlement: Option<Settlement>,
    /// Who settled it.
    pub settled_by: Option<String>,
    /// When it was settled: milliseconds since the Unix epoch.
    pub settled_at_ms: Option<i64>,
}

/// What became of an operator's decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// Done: the incident as it is now.
    Done(Incident),
    /// Somebody settled it before.
    Already(Incident),
    /// There is none.
    Unknown,
}

impl VerifierStore {
    /// Records an incident, and lets the oldest settled ones go beyond the limit. A claim that is open, or that an
    /// operator has refused, is counted and makes no second one. Answers whether it is a new one.
    ///
    /// # Errors
    /// The database failed.
    pub async fn record_incident(&self, incident: &NewIncident) -> Result<bool, DbError> {
        let failed = || query_failed("recording an incident");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        let known = sqlx::query(
            "UPDATE incidents SET claims = claims + 1, last_at_ms = $1 WHERE node = $2 AND ek_sha256 = $3 AND kind = $4 \
             AND (settlement IS NULL OR settlement = $5)",
        )
        .bind(incident.at_ms)
        .bind(incident.node.as_str())
        .bind(incident.ek.as_str())
        .bind(incident.kind.as_str())
        .bind(Settlement::Keep.as_str())
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        if known.rows_affected() > 0 {
            tx.commit().await.map_err(failed())?;
            return Ok(false);
        }
        insert(&mut tx, incident).await?;
        sqlx::query(EVICT).bind(i64::from(self.limits.incidents)).execute(&mut *tx).await.map_err(failed())?;
        let event = NewEvent {
            kind: EventKind::IdentityIncident,
            at_ms: incident.at_ms,
            project: None,
            node: Some(&incident.node),
            admission: None,
            detail: BTreeMap::from([("kind", incident.kind.to_string()), ("detail", incident.detail.clone())]),
        };
        let told = super::events::insert(&mut tx, &event).await.map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        self.told([told]);
        Ok(true)
    }

    /// The latest incidents: open ones first, then the newest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn incidents(&self) -> Result<Vec<Incident>, DbError> {
        let rows: Vec<IncidentRow> = sqlx::query_as(concat!(select!(), newest_first!(), " LIMIT 500"))
            .fetch_all(self.pool())
            .await
            .map_err(query_failed("reading the incidents"))?;
        rows.into_iter().map(Incident::try_from).collect()
    }

    /// Settles an incident as the operator `by` decides; accepting an EK binds it to the node, and neither to anything
    /// else.
    ///
    /// # Errors
    /// The database failed; nothing changed.
    pub async fn settle_incident(
        &self,
        id: IncidentId,
        settlement: Settlement,
        by: &str,
        now_ms: i64,
    ) -> Result<Settled, DbError> {
        let failed = || query_failed("settling an incident");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        let Some(incident) = by_id(&mut tx, id).await? else { return Ok(Settled::Unknown) };
        // The other claims of this node to this EK are the same question.
        let settled = sqlx::query(
            "UPDATE incidents SET settlement = $1, settled_by = $2, settled_at_ms = $3 \
             WHERE node = $4 AND ek_sha256 = $5 AND (settlement IS NULL OR (settlement = $6 AND id = $7 AND $6 <> $1))",
        )
        .bind(settlement.as_str())
        .bind(by)
        .bind(now_ms)
        .bind(incident.node.as_str())
        .bind(&incident.ek_sha256)
        .bind(Settlement::Keep.as_str())
        .bind(id.to_string())
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        if settled.rows_affected() == 0 {
            return Ok(Settled::Already(incident));
        }
        match settlement {
            Settlement::AcceptEk => {
                let ek = parsed("an EK's digest", &incident.ek_sha256)?;
                rebind(&mut tx, &incident.node, &ek, by, now_ms).await?;
            }
            Settlement::Keep => {}
        }
        let incident = by_id(&mut tx, id).await?.unwrap_or(incident);
        tx.commit().await.map_err(failed())?;
        Ok(Settled::Done(incident))
    }
}

async fn insert(connection: &mut AnyConnection, incident: &NewIncident) -> Result<(), DbError> {
    let sql = "INSERT INTO incidents (id, node, ek_sha256, kind, detail, at_ms, last_at_ms) \
               VALUES ($1, $2, $3, $4, $5, $6, $6)";
    sqlx::query(sql)
        .bind(Uuid::now_v7().to_string())
        .bind(incident.node.as_str())
        .bind(incident.ek.as_str())
        .bind(incident.kind.as_str())
        .bind(&incident.detail)
        .bind(incident.at_ms)
        .execute(connection)
        .await
        .map_err(query_failed("recording an incident"))?;
    Ok(())
}

async fn by_id(connection: &mut AnyConnection, id: IncidentId) -> Result<Option<Incident>, DbError> {
    let row: Option<IncidentRow> = sqlx::query_as(concat!(select!(), " WHERE id = $1"))
        .bind(id.to_string())
        .fetch_optional(connection)
        .await
        .map_err(query_failed("reading an incident"))?;
    row.map(Incident::try_from).transpose()
}

#[derive(sqlx::FromRow)]
struct IncidentRow {
    id: String,
    node: String,
    ek_sha256: String,
    kind: String,
    detail: String,
    at_ms: i64,
    last_at_ms: i64,
    claims: i64,
    settlement: Option<String>,
    settled_by: Option<String>,
    settled_at_ms: Option<i64>,
}

impl TryFrom<IncidentRow> for Incident {
    type Error = DbError;
    fn try_from(row: IncidentRow) -> Result<Self, DbError> {
        Ok(Self {
            id: parsed("an incident id", &row.id)?,
            node: parsed("a node name", &row.node)?,
            ek_sha256: row.ek_sha256,
            kind: parsed("an incident's kind", &row.kind)?,
            detail: row.detail,
            at_ms: row.at_ms,
            last_at_ms: row.last_at_ms,
            claims: u64::try_from(row.claims).unwrap_or(0),
            settlement: row.settlement.map(|word| parsed("an incident's settlement", &word)).transpose()?,
            settled_by: row.settled_by,
            settled_at_ms: row.settled_at_ms,
        })
    }
}

/// Keeps the newest `$1`; the settled go before the open.
const EVICT: &str =
    concat!("DELETE FROM incidents WHERE id IN (SELECT id FROM incidents", newest_first!(), " LIMIT 1000 OFFSET $1)");
