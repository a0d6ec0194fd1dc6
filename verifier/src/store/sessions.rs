//! Sessions and their nonces.

use super::{DbError, VerifierStore, corrupt, from_base64, parsed, query_failed, to_base64};
use crate::session::{Appraised, Attester, Challenged, Enrolled, IssuedNonce, Nonce, ProofDigest, Session};
use assay_wire::id::SessionId;
use assay_wire::isolation::AirlockContext;

impl VerifierStore {
    /// Records a new challenge. Makes room for it first: sessions that are over go, and beyond the limits the oldest
    /// half-open ones. A session that was activated is never evicted for one that was not.
    ///
    /// # Errors
    /// The database failed.
    pub async fn insert_challenge(&self, session: &Challenged) -> Result<(), DbError> {
        let failed = || query_failed("recording a session");
        let attester = &session.attester;
        let mut tx = self.pool().begin().await.map_err(failed())?;
        sqlx::query("DELETE FROM sessions WHERE expires_at_ms <= $1 OR (state = 'challenged' AND challenge_expires_at_ms <= $1)")
            .bind(attester.created_at_ms)
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        sqlx::query(EVICT_OF_NODE)
            .bind(attester.node.as_str())
            .bind(i64::from(self.limits.half_open_per_node.saturating_sub(1)))
            .bind(to_base64(&attester.ek_public))
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        sqlx::query(EVICT_OF_ALL)
            .bind(i64::from(self.limits.half_open.saturating_sub(1)))
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        sqlx::query(INSERT)
            .bind(attester.session.to_string())
            .bind(attester.node.as_str())
            .bind(to_base64(&attester.ek_public))
            .bind(to_base64(&attester.ak_public))
            .bind(attester.airlock.lease.to_string())
            .bind(attester.airlock.project.as_str())
            .bind(attester.airlock.boot.to_string())
            .bind(attester.airlock.machine_resets.and_then(|resets| i64::try_from(resets).ok()))
            .bind(session.proof.to_hex())
            .bind(session.challenge_expires_at_ms)
            .bind(attester.created_at_ms)
            .bind(attester.expires_at_ms)
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        tx.commit().await.map_err(failed())
    }

    /// A session, in the state that it is in.
    ///
    /// # Errors
    /// The database failed.
    pub async fn session(&self, id: SessionId) -> Result<Option<Session>, DbError> {
        let row: Option<SessionRow> = sqlx::query_as(SELECT)
            .bind(id.to_string())
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading a session"))?;
        row.map(Session::try_from).transpose()
    }

    /// Ends a session: a wrong proof gets no second try.
    ///
    /// # Errors
    /// The database failed.
    pub async fn delete_challenge(&self, id: SessionId) -> Result<(), DbError> {
        sqlx::query("DELETE FROM sessions WHERE id = $1 AND state = 'challenged'")
            .bind(id.to_string())
            .execute(self.pool())
            .await
            .map_err(query_failed("ending a session"))?;
        Ok(())
    }

    /// Records the activation: the session is `enrolled` and this nonce is out. Answers whether it was still
    /// `from_state`; if not, nothing changed.
    ///
    /// # Errors
    /// The database failed.
    pub async fn activate(&self, session: &Enrolled, from_state: ActivatedFrom) -> Result<bool, DbError> {
        let done = sqlx::query(
            "UPDATE sessions SET state = 'enrolled', nonce = $1, nonce_issued_at_ms = $2, nonce_expires_at_ms = $3 \
             WHERE id = $4 AND state = $5",
        )
        .bind(session.nonce.nonce.to_string())
        .bind(session.nonce.issued_at_ms)
        .bind(session.nonce.expires_at_ms)
        .bind(session.attester.session.to_string())
        .bind(match from_state {
            ActivatedFrom::Challenged => "challenged",
            ActivatedFrom::Enrolled => "enrolled",
        })
        .execute(self.pool())
        .await
        .map_err(query_failed("recording an activation"))?;
        Ok(done.rows_affected() == 1)
    }
}

/// The state that an activation leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActivatedFrom {
    /// The first activation.
    Challenged,
    /// A repeated one, for a new nonce.
    Enrolled,
}

#[derive(sqlx::FromRow)]
struct SessionRow {
    id: String,
    node: String,
    state: String,
    ek_public: String,
    ak_public: String,
    lease: String,
    project: String,
    boot: String,
    machine_resets: Option<i64>,
    proof_sha256: String,
    challenge_expires_at_ms: i64,
    nonce: Option<String>,
    nonce_issued_at_ms: i64,
    nonce_expires_at_ms: i64,
    admission: Option<String>,
    created_at_ms: i64,
    expires_at_ms: i64,
}

impl TryFrom<SessionRow> for Session {
    type Error = DbError;

    fn try_from(row: SessionRow) -> Result<Self, DbError> {
        let attester = Attester {
            session: parsed("a session id", &row.id)?,
            node: parsed("a node name", &row.node)?,
            ek_public: from_base64("an EK", &row.ek_public)?,
            ak_public: from_base64("an AK", &row.ak_public)?,
            airlock: AirlockContext {
                lease: parsed("a lease id", &row.lease)?,
                project: parsed("a project name", &row.project)?,
                boot: parsed("a boot id", &row.boot)?,
                machine_resets: row.machine_resets.and_then(|resets| u64::try_from(resets).ok()),
            },
            created_at_ms: row.created_at_ms,
            expires_at_ms: row.expires_at_ms,
        };
        let proof = ProofDigest::from_hex(&row.proof_sha256).ok_or_else(|| corrupt("a proof", "<redacted>"))?;
        match row.state.as_str() {
            "challenged" => Ok(Self::Challenged(Challenged {
                attester,
                proof,
                challenge_expires_at_ms: row.challenge_expires_at_ms,
            })),
            "enrolled" => {
                let text = row.nonce.unwrap_or_default();
                let nonce = Nonce::from_hex(&text).ok_or_else(|| corrupt("a nonce", &text))?;
                let nonce =
                    IssuedNonce { nonce, issued_at_ms: row.nonce_issued_at_ms, expires_at_ms: row.nonce_expires_at_ms };
                Ok(Self::Enrolled(Enrolled { attester, proof, nonce }))
            }
            "appraised" => {
                let admission = row.admission.map(|id| parsed("an admission id", &id)).transpose()?;
                Ok(Self::Appraised(Appraised { attester, proof, admission }))
            }
            other => Err(corrupt("a session state", other)),
        }
    }
}

const SELECT: &str = "SELECT id, node, state, ek_public, ak_public, lease, project, boot, \
     machine_resets, proof_sha256, challenge_expires_at_ms, nonce, nonce_issued_at_ms, nonce_expires_at_ms, admission, created_at_ms, expires_at_ms \
     FROM sessions WHERE id = $1";

const INSERT: &str = "INSERT INTO sessions (id, node, state, ek_public, ak_public, lease, project, boot, machine_resets, \
     proof_sha256, challenge_expires_at_ms, nonce_issued_at_ms, nonce_expires_at_ms, created_at_ms, expires_at_ms) \
     VALUES ($1, $2, 'challenged', $3, $4, $5, $6, $7, $8, $9, $10, 0, 0, $11, $12)";

/// Keeps the newest `$2` half-open sessions of node `$1` with EK `$3`. Who claims a node's name with another EK pushes
/// out none of the node's own.
const EVICT_OF_NODE: &str = "DELETE FROM sessions WHERE state = 'challenged' AND node = $1 AND ek_public = $3 \
     AND id NOT IN (SELECT id FROM sessions WHERE state = 'challenged' AND node = $1 AND ek_public = $3 \
     ORDER BY created_at_ms DESC, id LIMIT $2)";

/// Keeps the newest `$1` half-open sessions.
const EVICT_OF_ALL: &str = "DELETE FROM sessions WHERE state = 'challenged' AND id NOT IN \
     (SELECT id FROM sessions WHERE state = 'challenged' ORDER BY created_at_ms DESC, id LIMIT $1)";
