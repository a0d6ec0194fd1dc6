//! Events, notices and the numbers that both are read by. A number is taken in the transaction that writes its row, and
//! whoever takes it holds the counter until then: numbers become visible in their order, so "after N" misses nothing.

use super::{DbError, VerifierStore, from_json, parsed, query_failed};
use assay_wire::attestation::RevocationNotice;
use assay_wire::id::{AdmissionId, NodeId, ProjectId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::watch;

/// Something that happened: `GET /v1/events`, and the body of a webhook's delivery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Event {
    /// Grows with every event of the site.
    pub id: u64,
    /// When: milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// What.
    pub event: EventKind,
    /// Whose; none if it is the provider's alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectId>,
    /// Which node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// Which admission.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admission: Option<AdmissionId>,
    /// More, in words.
    pub detail: BTreeMap<String, String>,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
pub enum EventKind {
    /// Evidence at boot is good.
    #[serde(rename = "verdict.accepted")]
    VerdictAccepted,
    /// Evidence at boot is not good.
    #[serde(rename = "verdict.rejected")]
    VerdictRejected,
    /// Evidence at run time is not good: the node is being cut off.
    #[serde(rename = "admission.revoked")]
    AdmissionRevoked,
    /// An admission ended otherwise: silence, a reset, an expiry, an operator, the lease's end.
    #[serde(rename = "admission.ended")]
    AdmissionEnded,
    /// A node's evidence at run time is overdue.
    #[serde(rename = "attestation.silent")]
    AttestationSilent,
    /// An identity needs an operator.
    #[serde(rename = "identity.incident")]
    IdentityIncident,
    /// Another policy judges.
    #[serde(rename = "policy.activated")]
    PolicyActivated,
}

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::VerdictAccepted,
        Self::VerdictRejected,
        Self::AdmissionRevoked,
        Self::AdmissionEnded,
        Self::AttestationSilent,
        Self::IdentityIncident,
        Self::PolicyActivated,
    ];

    /// The kind's stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VerdictAccepted => "verdict.accepted",
            Self::VerdictRejected => "verdict.rejected",
            Self::AdmissionRevoked => "admission.revoked",
            Self::AdmissionEnded => "admission.ended",
            Self::AttestationSilent => "attestation.silent",
            Self::IdentityIncident => "identity.incident",
            Self::PolicyActivated => "policy.activated",
        }
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is no kind of event.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no kind of event")]
pub struct UnknownEvent(String);

impl FromStr for EventKind {
    type Err = UnknownEvent;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == value).ok_or_else(|| UnknownEvent(value.to_owned()))
    }
}

/// An event to record.
#[derive(Debug, Clone)]
pub(crate) struct NewEvent<'a> {
    pub(crate) kind: EventKind,
    pub(crate) at_ms: i64,
    pub(crate) project: Option<&'a ProjectId>,
    pub(crate) node: Option<&'a NodeId>,
    pub(crate) admission: Option<AdmissionId>,
    pub(crate) detail: BTreeMap<&'static str, String>,
}

/// The counters as they were seen last, for those who wait for them to move: this process's own writes at once, other
/// verifiers' on the next look.
#[derive(Debug, Clone)]
pub(crate) struct Counters(Arc<watch::Sender<HashMap<String, u64>>>);

impl Default for Counters {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(HashMap::new())))
    }
}

impl Counters {
    /// Those who wait for one look here.
    pub(crate) fn subscribe(&self) -> watch::Receiver<HashMap<String, u64>> {
        self.0.subscribe()
    }

    fn raise(&self, seen: impl IntoIterator<Item = (String, u64)>) {
        self.0.send_if_modified(|counters| {
            let mut moved = false;
            for (name, value) in seen {
                let known = counters.entry(name).or_default();
                moved |= *known < value;
                *known = value.max(*known);
            }
            moved
        });
    }
}

/// The counter of events.
pub(crate) const EVENTS: &str = "events";

/// The counter of a project's notices.
pub(crate) fn notices_of(project: &ProjectId) -> String {
    format!("notices/{project}")
}

impl VerifierStore {
    /// Those who wait for events or notices.
    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Looks whether another verifier has written events or notices.
    pub(crate) async fn refresh_counters(&self) -> Result<(), DbError> {
        let rows: Vec<(String, i64)> = sqlx::query_as("SELECT name, value FROM counters")
            .fetch_all(self.pool())
            .await
            .map_err(query_failed("reading how far events have come"))?;
        self.counters.raise(rows.into_iter().map(|(name, value)| (name, number(value))));
        Ok(())
    }

    /// Tells those who wait what a committed transaction has written.
    pub(crate) fn told(&self, written: impl IntoIterator<Item = (String, u64)>) {
        self.counters.raise(written);
    }

    /// Events after `after`, oldest first; of one project, or of all.
    ///
    /// # Errors
    /// The database failed.
    pub async fn events(&self, after: u64, of: Option<&ProjectId>, most: u32) -> Result<Vec<Event>, DbError> {
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let query = match of {
            None => sqlx::query_as("SELECT id, at_ms, kind, project, node, admission, detail FROM events WHERE id > $1 ORDER BY id LIMIT $2")
                .bind(after)
                .bind(i64::from(most)),
            Some(project) => sqlx::query_as("SELECT id, at_ms, kind, project, node, admission, detail FROM events WHERE id > $1 AND project = $3 ORDER BY id LIMIT $2")
                .bind(after)
                .bind(i64::from(most))
                .bind(project.as_str()),
        };
        let rows: Vec<EventRow> = query.fetch_all(self.pool()).await.map_err(query_failed("reading the events"))?;
        rows.into_iter().map(Event::try_from).collect()
    }

    /// The latest events, oldest first; of one project, or of all.
    ///
    /// # Errors
    /// The database failed.
    pub async fn latest_events(&self, of: Option<&ProjectId>, most: u32) -> Result<Vec<Event>, DbError> {
        let query = match of {
            None => sqlx::query_as("SELECT id, at_ms, kind, project, node, admission, detail FROM events ORDER BY id DESC LIMIT $1")
                .bind(i64::from(most)),
            Some(project) => sqlx::query_as("SELECT id, at_ms, kind, project, node, admission, detail FROM events WHERE project = $2 ORDER BY id DESC LIMIT $1")
                .bind(i64::from(most))
                .bind(project.as_str()),
        };
        let rows: Vec<EventRow> = query.fetch_all(self.pool()).await.map_err(query_failed("reading the events"))?;
        rows.into_iter().rev().map(Event::try_from).collect()
    }

    /// Claims the delivery to a webhook for this verifier, and gives the last event that was delivered: a new receiver
    /// begins with what is to come. None if another verifier delivers.
    ///
    /// # Errors
    /// The database failed.
    pub async fn claim_webhook(&self, url: &str, now_ms: i64, until_ms: i64) -> Result<Option<u64>, DbError> {
        let failed = || query_failed("claiming a webhook");
        sqlx::query(
            "INSERT INTO webhooks (url, delivered, owner, claimed_until_ms) \
             VALUES ($1, COALESCE((SELECT MAX(id) FROM events), 0), '', 0) ON CONFLICT (url) DO NOTHING",
        )
        .bind(url)
        .execute(self.pool())
        .await
        .map_err(failed())?;
        let row: Option<(i64,)> = sqlx::query_as(
            "UPDATE webhooks SET owner = $1, claimed_until_ms = $2 \
             WHERE url = $3 AND (owner = $1 OR claimed_until_ms < $4) RETURNING delivered",
        )
        .bind(self.run.to_string())
        .bind(until_ms)
        .bind(url)
        .bind(now_ms)
        .fetch_optional(self.pool())
        .await
        .map_err(failed())?;
        Ok(row.map(|(delivered,)| number(delivered)))
    }

    /// Records that a webhook's receiver has answered for an event.
    ///
    /// # Errors
    /// The database failed: the event is delivered once more.
    pub async fn webhook_delivered(&self, url: &str, event: u64) -> Result<(), DbError> {
        sqlx::query("UPDATE webhooks SET delivered = $1 WHERE url = $2 AND owner = $3 AND delivered < $1")
            .bind(i64::try_from(event).unwrap_or(i64::MAX))
            .bind(url)
            .bind(self.run.to_string())
            .execute(self.pool())
            .await
            .map_err(query_failed("recording a delivery"))?;
        Ok(())
    }

    /// A project's notices after `after`, oldest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn notices(&self, project: &ProjectId, after: u64) -> Result<Vec<RevocationNotice>, DbError> {
        let rows: Vec<NoticeRow> = sqlx::query_as(
            "SELECT sequence, node, admission, ak_name, reason, at_ms FROM notices \
             WHERE project = $1 AND sequence > $2 ORDER BY sequence LIMIT 1000",
        )
        .bind(project.as_str())
        .bind(i64::try_from(after).unwrap_or(i64::MAX))
        .fetch_all(self.pool())
        .await
        .map_err(query_failed("reading a project's notices"))?;
        rows.into_iter().map(RevocationNotice::try_from).collect()
    }
}

/// Writes an event as part of a transaction: last, because it holds the counter. Gives its number, to be
/// [`VerifierStore::told`] of once the transaction stands.
pub(super) async fn insert(tx: &mut sqlx::AnyConnection, event: &NewEvent<'_>) -> Result<(String, u64), sqlx::Error> {
    let id = next(tx, EVENTS).await?;
    sqlx::query(
        "INSERT INTO events (id, at_ms, kind, project, node, admission, detail) VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(id)
    .bind(event.at_ms)
    .bind(event.kind.as_str())
    .bind(event.project.map(ProjectId::as_str))
    .bind(event.node.map(NodeId::as_str))
    .bind(event.admission.map(|admission| admission.to_string()))
    .bind(serde_json::to_string(&event.detail).unwrap_or_default())
    .execute(&mut *tx)
    .await?;
    sqlx::query("DELETE FROM events WHERE id <= $1").bind(id.saturating_sub(MOST_EVENTS)).execute(&mut *tx).await?;
    Ok((EVENTS.to_owned(), number(id)))
}

/// Writes a notice as part of a transaction; the sequence is this function's to choose.
pub(super) async fn insert_notice(
    tx: &mut sqlx::AnyConnection,
    project: &ProjectId,
    notice: &RevocationNotice,
) -> Result<(String, u64), sqlx::Error> {
    let name = notices_of(project);
    let sequence = next(tx, &name).await?;
    sqlx::query("INSERT INTO notices (project, sequence, node, admission, ak_name, reason, at_ms) VALUES ($1, $2, $3, $4, $5, $6, $7)")
        .bind(project.as_str())
        .bind(sequence)
        .bind(notice.node.as_str())
        .bind(notice.admission.to_string())
        .bind(&notice.ak_name)
        .bind(&notice.reason)
        .bind(notice.at_ms)
        .execute(&mut *tx)
        .await?;
    sqlx::query("DELETE FROM notices WHERE project = $1 AND sequence <= $2")
        .bind(project.as_str())
        .bind(sequence.saturating_sub(MOST_NOTICES))
        .execute(&mut *tx)
        .await?;
    Ok((name, number(sequence)))
}

async fn next(tx: &mut sqlx::AnyConnection, name: &str) -> Result<i64, sqlx::Error> {
    let (value,): (i64,) = sqlx::query_as(
        "INSERT INTO counters (name, value) VALUES ($1, 1) \
         ON CONFLICT (name) DO UPDATE SET value = counters.value + 1 RETURNING value",
    )
    .bind(name)
    .fetch_one(tx)
    .await?;
    Ok(value)
}

fn number(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

#[derive(sqlx::FromRow)]
struct EventRow {
    id: i64,
    at_ms: i64,
    kind: String,
    project: Option<String>,
    node: Option<String>,
    admission: Option<String>,
    detail: String,
}

impl TryFrom<EventRow> for Event {
    type Error = DbError;
    fn try_from(row: EventRow) -> Result<Self, DbError> {
        Ok(Self {
            id: number(row.id),
            at_ms: row.at_ms,
            event: parsed("a kind of event", &row.kind)?,
            project: row.project.map(|name| parsed("a project name", &name)).transpose()?,
            node: row.node.map(|name| parsed("a node name", &name)).transpose()?,
            admission: row.admission.map(|id| parsed("an admission id", &id)).transpose()?,
            detail: from_json("an event's detail", &row.detail)?,
        })
    }
}

#[derive(sqlx::FromRow)]
struct NoticeRow {
    sequence: i64,
    node: String,
    admission: String,
    ak_name: String,
    reason: String,
    at_ms: i64,
}

impl TryFrom<NoticeRow> for RevocationNotice {
    type Error = DbError;
    fn try_from(row: NoticeRow) -> Result<Self, DbError> {
        Ok(Self {
            sequence: number(row.sequence),
            node: parsed("a node name", &row.node)?,
            admission: parsed("an admission id", &row.admission)?,
            ak_name: row.ak_name,
            reason: row.reason,
            at_ms: row.at_ms,
        })
    }
}

/// Events kept; a reader that is further behind misses some.
const MOST_EVENTS: i64 = 100_000;
/// Notices kept per project.
const MOST_NOTICES: i64 = 1_000;
