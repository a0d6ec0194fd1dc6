//! The database: SQLite by default, PostgreSQL by URL, the same SQL for both.
//!
//! What keeps one text true for both: `$1` placeholders, `TEXT`, `BIGINT` and `BOOLEAN` columns only (binary values as
//! base64 text), `ON CONFLICT`, no auto-increment, times as milliseconds since the Unix epoch.

use sqlx::AnyPool;
use sqlx::any::AnyPoolOptions;
use sqlx::migrate::Migrator;
use std::time::Duration;

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be opened.
    #[error("opening the database {url}")]
    Open {
        /// Its URL, without a password.
        url: String,
        /// Why.
        source: sqlx::Error,
    },
    /// Its schema cannot be brought up to date.
    #[error("migrating the database {url}")]
    Migrate {
        /// Its URL, without a password.
        url: String,
        /// Why.
        source: Box<sqlx::migrate::MigrateError>,
    },
}

/// An open database whose schema is current.
#[derive(Debug, Clone)]
pub struct Store {
    pool: AnyPool,
}

impl Store {
    /// The connections.
    #[must_use]
    pub fn pool(&self) -> &AnyPool {
        &self.pool
    }
}

/// Opens `url` (`sqlite:PATH`, created where missing, or `postgres://…`) and applies `migrator`.
///
/// # Errors
/// See [`StoreError`].
pub async fn open(url: &str, migrator: &Migrator) -> Result<Store, StoreError> {
    sqlx::any::install_default_drivers();
    let sqlite = url.starts_with("sqlite:");
    let open_url = if sqlite && !url.contains('?') { format!("{url}?mode=rwc") } else { url.to_owned() };
    // SQLite has one writer anyway: one connection turns "database is locked" errors into a queue.
    let connections = if sqlite { 1 } else { 8 };
    let pool = AnyPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(Duration::from_secs(10))
        .after_connect(move |connection, _| {
            Box::pin(async move {
                if sqlite {
                    // WAL with synchronous=FULL: a commit that was answered survives power loss.
                    for pragma in ["PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "PRAGMA foreign_keys=ON"] {
                        sqlx::query(pragma).execute(&mut *connection).await?;
                    }
                }
                Ok(())
            })
        })
        .connect(&open_url)
        .await
        .map_err(|source| StoreError::Open { url: without_password(url), source })?;
    migrator
        .run(&pool)
        .await
        .map_err(|source| StoreError::Migrate { url: without_password(url), source: Box::new(source) })?;
    Ok(Store { pool })
}

fn without_password(url: &str) -> String {
    match url::Url::parse(url) {
        Ok(mut parsed) if parsed.password().is_some() => {
            let _cannot_have_one = parsed.set_password(Some("***"));
            parsed.to_string()
        }
        _ => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_written_is_there_after_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", folder.path().join("a.db").display());
        let migrator = Migrator::DEFAULT;
        let store = open(&url, &migrator).await.unwrap();
        sqlx::query("CREATE TABLE t (k TEXT PRIMARY KEY, v BIGINT NOT NULL)").execute(store.pool()).await.unwrap();
        sqlx::query("INSERT INTO t VALUES ($1, $2)").bind("a").bind(7_i64).execute(store.pool()).await.unwrap();
        store.pool().close().await;
        let store = open(&url, &migrator).await.unwrap();
        let (value,): (i64,) =
            sqlx::query_as("SELECT v FROM t WHERE k = $1").bind("a").fetch_one(store.pool()).await.unwrap();
        assert_eq!(value, 7);
    }

    #[tokio::test]
    async fn an_error_names_the_database_and_no_password() {
        let error = open("postgres://u:secret@127.0.0.1:1/none", &Migrator::DEFAULT).await.unwrap_err();
        assert!(error.to_string().contains("127.0.0.1:1/none"), "{error}");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
