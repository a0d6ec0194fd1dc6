//! Evidence as it came, with the verdict on it: what an operator looks at, what a policy is learnt from, and what can
//! be appraised again.

use super::attestations::NewAttestation;
use super::events::{EventKind, NewEvent};
use super::releases::Release;
use super::{DbError, VerifierStore, corrupt, from_base64, from_json, parsed, query_failed, to_base64};
use crate::quote::ClockInfo;
use crate::reappraisal::CaseContext;
use crate::session::{Attester, Nonce};
use assay_wire::id::{AdmissionId, BootId, LeaseId, NodeId, ProjectId, SessionId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// One piece of archived evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, format = "uuid")]
pub struct EvidenceId(uuid::Uuid);

impl EvidenceId {
    /// A new one; later ids sort later.
    #[must_use]
    pub fn new() -> Self {
        Self(uuid::Uuid::now_v7())
    }
}

impl Default for EvidenceId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for EvidenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for EvidenceId {
    type Err = uuid::Error;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        value.parse().map(Self)
    }
}

/// A verdict to record, with the evidence that it is on.
#[derive(Debug)]
pub struct NewVerdict<'a> {
    /// The evidence's id.
    pub id: EvidenceId,
    /// Whose it is.
    pub attester: &'a Attester,
    /// The nonce that it answers; used up by this record.
    pub nonce: Nonce,
    /// The request's body.
    pub body: &'a str,
    /// SHA-256 of the body, hexadecimal.
    pub body_sha256: &'a str,
    /// When it came: milliseconds since the Unix epoch.
    pub received_at_ms: i64,
    /// Digest of the policy that judged; none if there was none.
    pub policy: Option<&'a str>,
    /// The TPM clock, if the quote was verified.
    pub clock: Option<&'a ClockInfo>,
    /// What else the verdict depended on.
    pub context: Option<&'a CaseContext>,
    /// Good or bad.
    pub outcome: Outcome<'a>,
    /// What begins with a good verdict, if released nodes go on attesting.
    pub attestation: Option<NewAttestation<'a>>,
}

/// Good or bad.
#[derive(Debug)]
pub enum Outcome<'a> {
    /// Good: the release that begins with it.
    Accepted(&'a Release),
    /// Good, by a verifier that begins no releases: the release that would have.
    Affirmed(&'a Release),
    /// Bad, and why.
    Rejected(&'a [String]),
}

/// A verdict on record, without its evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VerdictRecord {
    /// The evidence that it is on: `GET /v1/evidence/{id}`.
    pub evidence: EvidenceId,
    /// The node that it was sent for.
    pub node: NodeId,
    /// The project that holds the lease.
    pub project: ProjectId,
    /// The lease.
    pub lease: LeaseId,
    /// The boot that was appraised.
    pub boot: BootId,
    /// `accepted` or `rejected`.
    pub verdict: VerdictWord,
    /// Why it was rejected, one sentence a reason.
    pub reasons: Vec<String>,
    /// Digest of the policy that judged; none if no policy was active.
    pub policy: Option<String>,
    /// The admission that the result may become.
    pub admission: Option<AdmissionId>,
    /// When the evidence came: milliseconds since the Unix epoch.
    pub received_at_ms: i64,
    /// When isolation was told of a bad verdict: milliseconds since the Unix epoch.
    pub reported_at_ms: Option<i64>,
}

/// The verdict in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VerdictWord {
    /// Good.
    Accepted,
    /// Not good.
    Rejected,
}

impl fmt::Display for VerdictWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Accepted => "accepted",
            Self::Rejected => "rejected",
        })
    }
}

/// Archived evidence with what it was verified against.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ArchivedEvidence {
    /// The verdict on it.
    pub verdict: VerdictRecord,
    /// The evidence as the agent sent it.
    pub evidence: assay_wire::evidence::Evidence,
    /// `TPMT_PUBLIC` of the EK, base64.
    pub ek_public: String,
    /// `TPMT_PUBLIC` of the AK, base64.
    pub ak_public: String,
    /// The nonce, hexadecimal.
    pub nonce: String,
    /// The signed attestation result, if the verdict was good.
    pub result: Option<String>,
    /// What else the verdict depended on; none on evidence of before this was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub context: Option<CaseContext>,
}

/// Moves a node's counts on: the boot that was the last becomes the one before when another begins, and what its first
/// quote said stays until then.
const COUNT_BOOT: &str = "UPDATE identities SET \
     previous_clock = CASE WHEN last_boot = $2 THEN previous_clock ELSE last_clock END, \
     previous_boot = CASE WHEN last_boot = $2 THEN previous_boot ELSE last_boot END, \
     previous_machine_resets = CASE WHEN last_boot = $2 THEN previous_machine_resets ELSE last_machine_resets END, \
     first_clock = CASE WHEN last_boot = $2 THEN COALESCE(first_clock, last_clock) ELSE $1 END, \
     last_clock = $1, last_boot = $2, last_machine_resets = $3 WHERE node = $4";

impl ArchivedEvidence {
    /// `TPMT_PUBLIC` of the AK.
    ///
    /// # Errors
    /// The database holds something else.
    pub fn ak_public_bytes(&self) -> Result<Vec<u8>, DbError> {
        from_base64("an AK", &self.ak_public)
    }

    /// The nonce.
    ///
    /// # Errors
    /// The database holds something else.
    pub fn nonce_value(&self) -> Result<Nonce, DbError> {
        Nonce::from_hex(&self.nonce).ok_or_else(|| corrupt("a nonce", &self.nonce))
    }
}

impl VerifierStore {
    /// Records verdict, evidence, TPM clock, used nonce and, for a good verdict, the release's first journal entry: all
    /// or nothing. Answers `false`, having changed nothing, if the nonce was no longer out.
    ///
    /// # Errors
    /// The database failed; the nonce is still out.
    pub async fn record_verdict(&self, new: &NewVerdict<'_>) -> Result<bool, DbError> {
        let failed = || query_failed("recording a verdict");
        let release = match new.outcome {
            Outcome::Accepted(release) | Outcome::Affirmed(release) => Some(release),
            Outcome::Rejected(_) => None,
        };
        let mut tx = self.pool().begin().await.map_err(failed())?;
        let used = sqlx::query(
            "UPDATE sessions SET state = 'appraised', nonce = NULL, admission = $1 \
             WHERE id = $2 AND state = 'enrolled' AND nonce = $3",
        )
        .bind(release.map(|release| release.admission.to_string()))
        .bind(new.attester.session.to_string())
        .bind(new.nonce.to_string())
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        if used.rows_affected() != 1 {
            tx.rollback().await.map_err(failed())?;
            return Ok(false);
        }
        insert_evidence(&mut tx, new).await.map_err(failed())?;
        if let Some(clock) = new.clock {
            sqlx::query(COUNT_BOOT)
                .bind(serde_json::to_string(clock).unwrap_or_default())
                .bind(new.attester.airlock.boot.to_string())
                .bind(new.attester.airlock.machine_resets.and_then(|resets| i64::try_from(resets).ok()))
                .bind(new.attester.node.as_str())
                .execute(&mut *tx)
                .await
                .map_err(failed())?;
        }
        if let Outcome::Accepted(release) = new.outcome {
            super::releases::insert(&mut tx, release, self.run()).await.map_err(failed())?;
        }
        if let Some(begun) = &new.attestation {
            super::attestations::insert(&mut tx, new.attester, new.id, begun, new.received_at_ms)
                .await
                .map_err(failed())?;
        }
        sqlx::query(PRUNE)
            .bind(new.attester.node.as_str())
            .bind(i64::from(self.limits.evidence_per_node))
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        let told = super::events::insert(&mut tx, &verdict_event(new)).await.map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        self.told([told]);
        Ok(true)
    }

    /// The verdict on what `session` sent, with the SHA-256 of the body that it was on: an agent that lost the answer
    /// asks again with the same body.
    ///
    /// # Errors
    /// The database failed.
    pub async fn verdict_of_session(&self, session: SessionId) -> Result<Option<(VerdictRecord, String)>, DbError> {
        let row: Option<VerdictRow> = sqlx::query_as(VERDICT_OF_SESSION)
            .bind(session.to_string())
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading a session's verdict"))?;
        row.map(|row| {
            let body_sha256 = row.body_sha256.clone();
            Ok((VerdictRecord::try_from(row)?, body_sha256))
        })
        .transpose()
    }

    /// The latest verdict of every node.
    ///
    /// # Errors
    /// The database failed.
    pub async fn latest_verdicts(&self) -> Result<Vec<VerdictRecord>, DbError> {
        let rows: Vec<VerdictRow> = sqlx::query_as(LATEST_VERDICTS)
            .fetch_all(self.pool())
            .await
            .map_err(query_failed("reading the verdicts"))?;
        rows.into_iter().map(VerdictRecord::try_from).collect()
    }

    /// The latest verdict of `node`.
    ///
    /// # Errors
    /// The database failed.
    pub async fn latest_verdict(&self, node: &NodeId) -> Result<Option<VerdictRecord>, DbError> {
        let row: Option<VerdictRow> = sqlx::query_as(LATEST_VERDICT)
            .bind(node.as_str())
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading a node's verdict"))?;
        row.map(VerdictRecord::try_from).transpose()
    }

    /// Bad verdicts that isolation has not confirmed to know of.
    ///
    /// # Errors
    /// The database failed.
    pub async fn unreported_rejections(&self) -> Result<Vec<VerdictRecord>, DbError> {
        let rows: Vec<VerdictRow> = sqlx::query_as(UNREPORTED)
            .fetch_all(self.pool())
            .await
            .map_err(query_failed("reading the unreported verdicts"))?;
        rows.into_iter().map(VerdictRecord::try_from).collect()
    }

    /// Records that isolation knows of a bad verdict.
    ///
    /// # Errors
    /// The database failed.
    pub async fn mark_reported(&self, evidence: EvidenceId, now_ms: i64) -> Result<(), DbError> {
        sqlx::query("UPDATE evidence SET reported_at_ms = $1 WHERE id = $2")
            .bind(now_ms)
            .bind(evidence.to_string())
            .execute(self.pool())
            .await
            .map_err(query_failed("recording that a verdict was reported"))?;
        Ok(())
    }

    /// Evidence from the archive, whole.
    ///
    /// # Errors
    /// The database failed.
    pub async fn evidence(&self, id: EvidenceId) -> Result<Option<ArchivedEvidence>, DbError> {
        let verdict: Option<VerdictRow> = sqlx::query_as(VERDICT_OF_EVIDENCE)
            .bind(id.to_string())
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading archived evidence"))?;
        let rest: Option<EvidenceRow> =
            sqlx::query_as("SELECT body, ek_public, ak_public, nonce, result, context FROM evidence WHERE id = $1")
                .bind(id.to_string())
                .fetch_optional(self.pool())
                .await
                .map_err(query_failed("reading archived evidence"))?;
        let (Some(verdict), Some(rest)) = (verdict, rest) else { return Ok(None) };
        Ok(Some(ArchivedEvidence {
            verdict: VerdictRecord::try_from(verdict)?,
            evidence: from_json("evidence", &rest.body)?,
            ek_public: rest.ek_public,
            ak_public: rest.ak_public,
            nonce: rest.nonce,
            result: rest.result,
            context: rest.context.map(|text| from_json("a verdict's context", &text)).transpose()?,
        }))
    }
}

/// What people and programs are told of a verdict.
fn verdict_event<'a>(new: &'a NewVerdict<'_>) -> NewEvent<'a> {
    let mut detail = BTreeMap::from([("evidence", new.id.to_string())]);
    let (kind, admission) = match new.outcome {
        Outcome::Accepted(release) | Outcome::Affirmed(release) => {
            (EventKind::VerdictAccepted, Some(release.admission))
        }
        Outcome::Rejected(reasons) => {
            detail.insert("reasons", reasons.join("; "));
            (EventKind::VerdictRejected, None)
        }
    };
    NewEvent {
        kind,
        at_ms: new.received_at_ms,
        project: Some(&new.attester.airlock.project),
        node: Some(&new.attester.node),
        admission,
        detail,
    }
}

async fn insert_evidence(tx: &mut sqlx::AnyConnection, new: &NewVerdict<'_>) -> Result<(), sqlx::Error> {
    let (verdict, reasons, release) = match new.outcome {
        Outcome::Accepted(release) | Outcome::Affirmed(release) => ("accepted", &[][..], Some(release)),
        Outcome::Rejected(reasons) => ("rejected", reasons, None),
    };
    sqlx::query(INSERT)
        .bind(new.id.to_string())
        .bind(new.attester.session.to_string())
        .bind(new.attester.node.as_str())
        .bind(new.attester.airlock.lease.to_string())
        .bind(new.attester.airlock.project.as_str())
        .bind(new.attester.airlock.boot.to_string())
        .bind(new.received_at_ms)
        .bind(new.body)
        .bind(new.body_sha256)
        .bind(to_base64(&new.attester.ek_public))
        .bind(to_base64(&new.attester.ak_public))
        .bind(new.nonce.to_string())
        .bind(verdict)
        .bind(serde_json::to_string(reasons).unwrap_or_default())
        .bind(new.policy)
        .bind(release.map(|release| release.result.as_str()))
        .bind(release.map(|release| release.admission.to_string()))
        .bind(new.context.map(|context| serde_json::to_string(context).unwrap_or_default()))
        .execute(tx)
        .await
        .map(|_| ())
}

#[derive(sqlx::FromRow)]
struct VerdictRow {
    id: String,
    node: String,
    project: String,
    lease: String,
    boot: String,
    verdict: String,
    reasons: String,
    policy: Option<String>,
    admission: Option<String>,
    received_at_ms: i64,
    reported_at_ms: Option<i64>,
    body_sha256: String,
}

#[derive(sqlx::FromRow)]
struct EvidenceRow {
    body: String,
    ek_public: String,
    ak_public: String,
    nonce: String,
    result: Option<String>,
    context: Option<String>,
}

impl TryFrom<VerdictRow> for VerdictRecord {
    type Error = DbError;
    fn try_from(row: VerdictRow) -> Result<Self, DbError> {
        Ok(Self {
            evidence: parsed("an evidence id", &row.id)?,
            node: parsed("a node name", &row.node)?,
            project: parsed("a project name", &row.project)?,
            lease: parsed("a lease id", &row.lease)?,
            boot: parsed("a boot id", &row.boot)?,
            verdict: match row.verdict.as_str() {
                "accepted" => VerdictWord::Accepted,
                "rejected" => VerdictWord::Rejected,
                other => return Err(corrupt("a verdict", other)),
            },
            reasons: from_json("reasons", &row.reasons)?,
            policy: row.policy,
            admission: row.admission.map(|id| parsed("an admission id", &id)).transpose()?,
            received_at_ms: row.received_at_ms,
            reported_at_ms: row.reported_at_ms,
        })
    }
}

macro_rules! select_verdicts {
    ($rest:literal) => {
        concat!(
            "SELECT id, node, project, lease, boot, verdict, reasons, policy, admission, received_at_ms, \
             reported_at_ms, body_sha256 FROM evidence e ",
            $rest
        )
    };
}

const VERDICT_OF_EVIDENCE: &str = select_verdicts!("WHERE id = $1");
const VERDICT_OF_SESSION: &str = select_verdicts!("WHERE session = $1 ORDER BY received_at_ms DESC, id DESC LIMIT 1");
const LATEST_VERDICT: &str = select_verdicts!("WHERE node = $1 ORDER BY received_at_ms DESC, id DESC LIMIT 1");
const LATEST_VERDICTS: &str =
    select_verdicts!("WHERE id = (SELECT MAX(l.id) FROM evidence l WHERE l.node = e.node) ORDER BY node LIMIT 5000");
const UNREPORTED: &str =
    select_verdicts!("WHERE verdict = 'rejected' AND reported_at_ms IS NULL ORDER BY id LIMIT 500");

const INSERT: &str = "INSERT INTO evidence (id, session, node, lease, project, boot, received_at_ms, body, body_sha256, \
     ek_public, ak_public, nonce, verdict, reasons, policy, result, admission, context) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)";

/// Keeps the newest `$2` pieces of evidence of node `$1`, and what a standing admission rests on.
const PRUNE: &str = "DELETE FROM evidence WHERE node = $1 AND id NOT IN \
     (SELECT id FROM evidence WHERE node = $1 ORDER BY received_at_ms DESC, id DESC LIMIT $2) \
     AND id NOT IN (SELECT evidence FROM attestations WHERE node = $1 AND state <> 'ended')";
