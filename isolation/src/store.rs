//! Isolation's database: the record of what should be. One file of SQL per kind of object.
//!
//! A node's row has one writer, its [`crate::driver`] task, and every change of state is one transaction that carries
//! the lease, the admission, the ports' desired states and the audit entry with it.

mod admissions;
mod inventory;
mod leases;
mod nodes;

pub use inventory::{Inventory, NewNode};
pub use nodes::Effect;

use assay_service::clock::Clock;
use assay_service::store::{Store as Database, StoreError};
use assay_wire::id::NodeId;
use serde::{Deserialize, Serialize};
use sqlx::any::AnyRow;
use sqlx::migrate::Migrator;
use sqlx::{Any, Row as _, Transaction};
use std::sync::Arc;
use tokio::sync::watch;

static MIGRATOR: Migrator = sqlx::migrate!();

/// The database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    database: Database,
    clock: Arc<dyn Clock>,
    /// Moves on with every change of a boot record. Starts at the time of day, so that it also grows over restarts.
    revision: watch::Sender<u64>,
    /// The same, with every admission that begins or ends.
    admissions_revision: watch::Sender<u64>,
}

/// Why the record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The database failed.
    #[error("{doing}")]
    Database {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        cause: sqlx::Error,
    },
    /// A row holds something that we never write.
    #[error("{doing}: the database holds `{value}` as {column}")]
    Corrupt {
        /// What was being done.
        doing: &'static str,
        /// The column.
        column: &'static str,
        /// Its value.
        value: String,
    },
    /// Something else has this name, MAC, port, VLAN or lease.
    #[error("{doing}: it exists already, or something else uses one of its values")]
    Taken {
        /// What was being done.
        doing: &'static str,
    },
}

/// An entry of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditEvent {
    /// Grows with time.
    pub id: String,
    /// When, in ms since the epoch.
    pub at_ms: i64,
    /// The node that it is about.
    pub node: Option<NodeId>,
    /// What happened, in one stable word.
    pub kind: String,
    /// The same, in words.
    pub detail: String,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("database", &self.database).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the database and brings its schema up to date.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn open(url: &str, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let database = assay_service::store::open(url, &MIGRATOR).await?;
        let start = u64::try_from(clock.now_ms()).unwrap_or_default();
        Ok(Self {
            database,
            clock,
            revision: watch::Sender::new(start),
            admissions_revision: watch::Sender::new(start),
        })
    }

    /// The revision of the boot records, and its changes.
    #[must_use]
    pub fn revision(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// The revision of the admissions, and its changes.
    #[must_use]
    pub fn admissions_revision(&self) -> watch::Receiver<u64> {
        self.admissions_revision.subscribe()
    }

    /// The newest audit entries after the one named, oldest first.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn events(&self, after: &str, limit: i64) -> Result<Vec<AuditEvent>, RecordError> {
        let doing = "reading the audit log";
        let rows = sqlx::query("SELECT id, at_ms, node, kind, detail FROM events WHERE id > $1 ORDER BY id LIMIT $2")
            .bind(after.to_owned())
            .bind(limit)
            .fetch_all(self.database.pool())
            .await
            .map_err(failed(doing))?;
        let event = |row: &AnyRow| {
            Ok(AuditEvent {
                id: text(doing, row, "id")?,
                at_ms: integer(doing, row, "at_ms")?,
                node: optional(doing, row, "node")?,
                kind: text(doing, row, "kind")?,
                detail: text(doing, row, "detail")?,
            })
        };
        rows.iter().map(event).collect()
    }

    async fn audit(
        &self,
        transaction: &mut Transaction<'_, Any>,
        node: Option<&NodeId>,
        kind: &str,
        detail: &str,
    ) -> Result<(), RecordError> {
        // Version 7 UUIDs begin with the time: they sort as they were made.
        sqlx::query("INSERT INTO events (id, at_ms, node, kind, detail) VALUES ($1, $2, $3, $4, $5)")
            .bind(uuid::Uuid::now_v7().to_string())
            .bind(self.clock.now_ms())
            .bind(node.map(ToString::to_string))
            .bind(kind.to_owned())
            .bind(detail.to_owned())
            .execute(&mut **transaction)
            .await
            .map_err(failed("writing the audit log"))?;
        Ok(())
    }

    async fn begin(&self, doing: &'static str) -> Result<Transaction<'static, Any>, RecordError> {
        self.database.pool().begin().await.map_err(failed(doing))
    }

    async fn commit(&self, doing: &'static str, transaction: Transaction<'static, Any>) -> Result<(), RecordError> {
        transaction.commit().await.map_err(failed(doing))?;
        self.revision.send_modify(|revision| *revision += 1);
        Ok(())
    }
}

fn failed(doing: &'static str) -> impl Fn(sqlx::Error) -> RecordError {
    move |cause| match cause.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation) {
        true => RecordError::Taken { doing },
        false => RecordError::Database { doing, cause },
    }
}

fn text(doing: &'static str, row: &AnyRow, column: &'static str) -> Result<String, RecordError> {
    row.try_get(column).map_err(failed(doing))
}

fn integer(doing: &'static str, row: &AnyRow, column: &'static str) -> Result<i64, RecordError> {
    row.try_get(column).map_err(failed(doing))
}

/// A column whose text is a value of ours.
fn parsed<T: std::str::FromStr>(doing: &'static str, row: &AnyRow, column: &'static str) -> Result<T, RecordError> {
    let value = text(doing, row, column)?;
    value.parse().map_err(|_| RecordError::Corrupt { doing, column, value })
}

fn optional<T: std::str::FromStr>(
    doing: &'static str,
    row: &AnyRow,
    column: &'static str,
) -> Result<Option<T>, RecordError> {
    let value: Option<String> = row.try_get(column).map_err(failed(doing))?;
    let parse = |value: String| value.parse().map_err(|_| RecordError::Corrupt { doing, column, value });
    value.map(parse).transpose()
}

/// A column whose text is JSON.
fn json<T: serde::de::DeserializeOwned>(
    doing: &'static str,
    column: &'static str,
    value: &str,
) -> Result<T, RecordError> {
    serde_json::from_str(value).map_err(|_| RecordError::Corrupt { doing, column, value: value.to_owned() })
}

fn to_json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
