//! Collateral for quotes of trusted execution environments, once a document: an operator gives a few a month, verdicts
//! name them by digest, and can be reached again when the verifier has newer ones.

use super::{DbError, VerifierStore, query_failed};
use crate::tee::{Collateral, CollateralDigest};

impl VerifierStore {
    /// Keeps what this verifier was given. Of more documents than [`MOST_KEPT`], those go that no verifier was given for
    /// the longest.
    ///
    /// # Errors
    /// The database failed.
    pub async fn keep_collateral(&self, given: &Collateral, now_ms: i64) -> Result<(), DbError> {
        let failed = || query_failed("keeping TEE collateral");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        for (digest, text) in given.texts() {
            sqlx::query(
                "INSERT INTO tee_collateral (sha256, document, given_at_ms) VALUES ($1, $2, $3) \
                 ON CONFLICT (sha256) DO UPDATE SET given_at_ms = excluded.given_at_ms",
            )
            .bind(digest.to_string())
            .bind(text)
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        }
        sqlx::query(
            "DELETE FROM tee_collateral WHERE sha256 NOT IN \
             (SELECT sha256 FROM tee_collateral ORDER BY given_at_ms DESC, sha256 LIMIT $1)",
        )
        .bind(MOST_KEPT)
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        tx.commit().await.map_err(failed())
    }

    /// The documents of these digests, in their order, as far as they are on record.
    ///
    /// # Errors
    /// The database failed.
    pub async fn collateral(&self, digests: &[CollateralDigest]) -> Result<Vec<String>, DbError> {
        let mut texts = Vec::new();
        for digest in digests {
            let row: Option<(String,)> = sqlx::query_as("SELECT document FROM tee_collateral WHERE sha256 = $1")
                .bind(digest.to_string())
                .fetch_optional(self.pool())
                .await
                .map_err(query_failed("reading TEE collateral"))?;
            texts.extend(row.map(|(text,)| text));
        }
        Ok(texts)
    }
}

/// Ten years of a fleet with a few models: some 10 MB.
pub(super) const MOST_KEPT: i64 = 512;
