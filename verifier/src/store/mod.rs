//! What the verifier keeps: sessions with their nonces, node identities, policies, archived evidence with its verdict,
//! the release's journal, attestations, notices and events. One database, SQLite or PostgreSQL, the same SQL.
//!
//! Every transition that must happen once is a compare-and-set (`UPDATE … WHERE state = …`, then counting rows), so two
//! requests or two verifiers cannot both win. Everything that an agent can make grow is bounded here.

pub mod archive;
pub mod attestations;
pub mod collateral;
pub mod events;
pub mod identities;
pub mod incidents;
pub mod policies;
pub mod releases;
pub mod secrets;
pub mod sessions;
pub mod verifiers;

use assay_service::store::{self, Store, StoreError};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sqlx::AnyPool;
use sqlx::migrate::Migrator;
use std::sync::Arc;
use verifiers::RunId;

/// The verifier's database.
#[derive(Debug, Clone)]
pub struct VerifierStore {
    store: Store,
    limits: StoreLimits,
    gate: Arc<policies::PolicyGate>,
    /// What this process and its successors are called among those that share the database.
    name: Arc<str>,
    run: RunId,
    counters: events::Counters,
}

/// Bounds on what agents can make the database hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    /// Half-open sessions of one node; beyond it the oldest goes.
    pub half_open_per_node: u32,
    /// Half-open sessions of all nodes; beyond it the oldest goes.
    pub half_open: u32,
    /// Evidence archived per node; beyond it the oldest goes.
    pub evidence_per_node: u32,
    /// Incidents on record; beyond it the oldest goes.
    pub incidents: u32,
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self { half_open_per_node: 4, half_open: 4_096, evidence_per_node: 32, incidents: 10_000 }
    }
}

impl VerifierStore {
    /// Opens `url` and brings its schema up to date.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn open(url: &str, limits: StoreLimits) -> Result<Self, StoreError> {
        let store = store::open(url, &MIGRATOR).await?;
        let counters = events::Counters::default();
        Ok(Self { store, limits, gate: Arc::default(), name: ONLY_VERIFIER.into(), run: RunId::random(), counters })
    }

    /// The same, as the verifier `name` among several that share the database.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// Closes all connections, so that the file is whole on disk.
    pub async fn close(&self) {
        self.pool().close().await;
    }

    pub(crate) fn pool(&self) -> &AnyPool {
        self.store.pool()
    }
}

/// Why the database did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// It refused or failed.
    #[error("{doing}")]
    Query {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: sqlx::Error,
    },
    /// It holds something that this verifier never writes.
    #[error("reading {what} from the database: `{value}` is not one")]
    Corrupt {
        /// What should have been there.
        what: &'static str,
        /// What was there, cut short.
        value: String,
    },
}

/// Names what a query was for.
fn query_failed(doing: &'static str) -> impl FnOnce(sqlx::Error) -> DbError {
    move |source| DbError::Query { doing, source }
}

/// Reads one stored value back into its type.
fn parsed<T: std::str::FromStr>(what: &'static str, value: &str) -> Result<T, DbError> {
    value.parse().map_err(|_| corrupt(what, value))
}

fn from_json<T: serde::de::DeserializeOwned>(what: &'static str, value: &str) -> Result<T, DbError> {
    serde_json::from_str(value).map_err(|_| corrupt(what, value))
}

fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn from_base64(what: &'static str, value: &str) -> Result<Vec<u8>, DbError> {
    STANDARD.decode(value).map_err(|_| corrupt(what, value))
}

fn corrupt(what: &'static str, value: &str) -> DbError {
    DbError::Corrupt { what, value: value.chars().take(40).collect() }
}

/// The name of a verifier that was given none.
const ONLY_VERIFIER: &str = "verifier";

static MIGRATOR: Migrator = sqlx::migrate!();

#[cfg(test)]
mod tests;
