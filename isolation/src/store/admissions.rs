//! Admissions: looked up by their ids, followed, renewed many at a time, and forgotten when they are long over.

use super::nodes::admission;
use super::{RecordError, Store, failed, json, parsed, text};
use assay_wire::agreement::Standing;
use assay_wire::id::{AdmissionId, ProjectId};
use assay_wire::isolation::Admission;
use assay_wire::result::VerifierKey;
use sqlx::Row as _;
use sqlx::any::AnyRow;
use std::collections::{BTreeMap, HashMap, HashSet};

const READING: &str = "reading the admissions";
const RENEWING: &str = "renewing admissions";

impl Store {
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
                .map_err(failed(READING))?;
        row.as_ref().map(wire_admission).transpose()
    }

    /// Revokes an admission that was never made: from now on it cannot be. Otherwise a revocation that overtakes its
    /// admission would be answered "no such thing", and then the port would open.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn revoke_unmade(&self, id: AdmissionId) -> Result<(), RecordError> {
        sqlx::query(
            "INSERT INTO result_ids (id, purpose, used_ms) VALUES ($1, 'revocation', $2) ON CONFLICT (id) DO NOTHING",
        )
        .bind(id.to_string())
        .bind(self.clock.now_ms())
        .execute(self.database.pool())
        .await
        .map_err(failed("recording the revocation"))?;
        Ok(())
    }

    /// The admissions that were not ended, and those that were ended after `ended_after_ms`; the newest first.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn admissions(&self, ended_after_ms: i64) -> Result<Vec<Admission>, RecordError> {
        // Two halves, because each has an index of its own.
        let columns = "SELECT id, node, lease, boot, ak_name, expires_at_ms, revoked, created_ms FROM admissions";
        let text = format!(
            "{columns} WHERE revoked IS NULL UNION ALL {columns} WHERE ended_ms > $1 ORDER BY created_ms DESC, id"
        );
        let rows = sqlx::query(sqlx::AssertSqlSafe(text))
            .bind(ended_after_ms)
            .fetch_all(self.database.pool())
            .await
            .map_err(failed(READING))?;
        rows.iter().map(wire_admission).collect()
    }

    /// Those of `ids` that may be renewed: not ended, of an Allocated node in the boot and lease that they are for.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn standing(&self, ids: &[AdmissionId]) -> Result<HashMap<AdmissionId, Standing>, RecordError> {
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let named: Vec<String> = (1..=ids.len()).map(|at| format!("${at}")).collect();
        let text = format!(
            "SELECT admissions.id AS id, subject, supporting, expires_at_ms FROM admissions \
             JOIN nodes ON nodes.name = admissions.node AND nodes.boot = admissions.boot AND nodes.state = 'allocated' \
             JOIN leases ON leases.id = admissions.lease AND leases.ended_ms IS NULL \
             WHERE revoked IS NULL AND subject IS NOT NULL AND admissions.id IN ({})",
            named.join(", ")
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(text)).persistent(false);
        for id in ids {
            query = query.bind(id.to_string());
        }
        let rows = query.fetch_all(self.database.pool()).await.map_err(failed(RENEWING))?;
        let standing = |row: &AnyRow| {
            let standing = Standing {
                admission: parsed(RENEWING, row, "id")?,
                subject: json(RENEWING, "subject", &text_of(row, "subject")?)?,
                supporting: json(RENEWING, "supporting", &text_of(row, "supporting")?)?,
                expires_at_ms: row.try_get("expires_at_ms").map_err(failed(RENEWING))?,
            };
            Ok((standing.admission, standing))
        };
        rows.iter().map(standing).collect()
    }

    /// The verifier keys of all projects.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn all_verifier_keys(&self) -> Result<HashMap<ProjectId, Vec<VerifierKey>>, RecordError> {
        let rows = sqlx::query("SELECT project, key_hex FROM verifier_keys").fetch_all(self.database.pool()).await;
        let mut keys: HashMap<ProjectId, Vec<VerifierKey>> = HashMap::new();
        for row in &rows.map_err(failed(RENEWING))? {
            keys.entry(parsed(RENEWING, row, "project")?).or_default().push(parsed(RENEWING, row, "key_hex")?);
        }
        Ok(keys)
    }

    /// Lets admissions stand until later, in one transaction, and answers which it did. One that was ended meanwhile, or
    /// has expired, stays ended: that is asked again in the same statement.
    ///
    /// # Errors
    /// See [`RecordError`]; then none of them stands longer.
    pub async fn extend(
        &self,
        renewed: &BTreeMap<AdmissionId, i64>,
        now_ms: i64,
    ) -> Result<HashSet<AdmissionId>, RecordError> {
        if renewed.is_empty() {
            return Ok(HashSet::new());
        }
        let values: Vec<String> = (1..=renewed.len()).map(|at| format!("(${}, ${})", 2 * at, 2 * at + 1)).collect();
        let text = format!(
            "WITH renewed (id, until_ms) AS (VALUES {}) \
             UPDATE admissions SET expires_at_ms = renewed.until_ms FROM renewed \
             WHERE admissions.id = renewed.id AND admissions.revoked IS NULL AND admissions.expires_at_ms > $1 \
             AND admissions.expires_at_ms <= renewed.until_ms RETURNING admissions.id AS id",
            values.join(", ")
        );
        let mut query = sqlx::query(sqlx::AssertSqlSafe(text)).persistent(false).bind(now_ms);
        for (id, until_ms) in renewed {
            query = query.bind(id.to_string()).bind(*until_ms);
        }
        let rows = query.fetch_all(self.database.pool()).await.map_err(failed(RENEWING))?;
        rows.iter().map(|row| parsed(RENEWING, row, "id")).collect()
    }

    /// Forgets admissions that ended before `before_ms`, and ids of results that were used up before then.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn forget_ended(&self, before_ms: i64) -> Result<u64, RecordError> {
        let doing = "forgetting admissions that ended long ago";
        let mut transaction = self.begin(doing).await?;
        let mut forgotten = 0;
        for statement in [
            // Not the id of an admission that still stands.
            "DELETE FROM result_ids WHERE used_ms < $1 \
             AND NOT EXISTS (SELECT 1 FROM admissions WHERE admissions.id = result_ids.id AND revoked IS NULL)",
            "DELETE FROM admissions WHERE ended_ms < $1",
        ] {
            let done =
                sqlx::query(statement).bind(before_ms).execute(&mut *transaction).await.map_err(failed(doing))?;
            forgotten = done.rows_affected();
        }
        transaction.commit().await.map_err(failed(doing))?;
        Ok(forgotten)
    }
}

fn text_of(row: &AnyRow, column: &'static str) -> Result<String, RecordError> {
    text(RENEWING, row, column)
}

fn wire_admission(row: &AnyRow) -> Result<Admission, RecordError> {
    let record = admission(READING, row)?;
    Ok(Admission {
        id: record.id,
        node: parsed(READING, row, "node")?,
        lease: record.lease,
        boot: record.boot,
        expires_at_ms: record.expires_at_ms,
        revoked: record.revoked,
    })
}
