//! Admissions that are attested continuously: what each is compared with, how far it has come, and how it ends.
//!
//! A push is one row of a batch ([`VerifierStore::record_pushes`]); it counts only if nobody else has moved the row on
//! since it was read. An end is written with its notice and its event, all or nothing.

use super::events::{self, NewEvent};
use super::{DbError, VerifierStore, corrupt, from_base64, from_json, parsed, query_failed, to_base64};
use crate::attestation::appraise::{Baseline, Seen};
use crate::attestation::register::{Attested, Progress};
use crate::evidence::pcr_values;
use crate::ima::{IMA_PCR, ImaState};
use crate::quote::{AkPublic, ClockInfo, PCR_COUNT, PcrValue};
use crate::release::journal::ReleaseStep;
use crate::session::{Attester, ProofDigest};
use crate::store::archive::EvidenceId;
use crate::store::events::EventKind;
use assay_wire::attestation::RevocationNotice;
use assay_wire::id::{AdmissionId, BootId, NodeId, ProjectId};
use assay_wire::result::{Claims, Submod};
use serde::{Deserialize, Serialize};
use sqlx::AssertSqlSafe;
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;

/// The attestation that begins with a good verdict.
#[derive(Debug)]
pub struct NewAttestation<'a> {
    /// The result's claims.
    pub claims: &'a Claims,
    /// The session's bearer token, hashed.
    pub proof: ProofDigest,
    /// The quoted PCRs.
    pub pcrs: &'a [PcrValue; PCR_COUNT],
    /// The TPM's clock.
    pub clock: &'a ClockInfo,
    /// Whether this verifier leads.
    pub part: Part,
}

/// What part an attestation has in what the site requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// It begins with a release: evidence counts from the hand-over on, and its end is isolation's and imaging's.
    Leads,
    /// Another verifier leads: this one vouches for as long as it finds the evidence good, from its verdict on, and knows
    /// the admission by its own first result's id.
    Supports,
}

impl Part {
    /// As the database has it.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Leads => "leads",
            Self::Supports => "supports",
        }
    }
}

/// How an attestation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AttestationState {
    /// The admission stands, while good evidence comes.
    Standing,
    /// It has ended; isolation and imaging are being told.
    Ending,
    /// It has ended.
    Ended,
}

/// An attestation on record: `GET /v1/attestations`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AttestationRecord {
    /// The admission.
    pub admission: AdmissionId,
    /// The node.
    pub node: NodeId,
    /// The project that holds the lease.
    pub project: ProjectId,
    /// How it stands.
    pub state: AttestationState,
    /// The evidence at boot: `GET /v1/evidence/{id}`.
    pub evidence: EvidenceId,
    /// Digest of the policy under which the boot evidence was found good last.
    pub policy: String,
    /// When it began: milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// When good evidence came last; none before the first at run time.
    pub last_seen_at_ms: Option<i64>,
    /// When the next is expected.
    pub next_expected_at_ms: Option<i64>,
    /// Until when the admission stands unless it is renewed.
    pub expires_at_ms: i64,
    /// Since when its evidence is overdue.
    pub silent_at_ms: Option<i64>,
    /// Good evidence that came at run time.
    pub pushes: u64,
    /// Entries of the runtime measurement list that were seen.
    pub ima_entries: u64,
    /// What the last evidence showed that is tolerated, but should be looked at.
    pub warnings: Vec<String>,
    /// Why it ended.
    pub reasons: Vec<String>,
    /// When it ended.
    pub ended_at_ms: Option<i64>,
}

/// A stored attestation, for who attests it.
#[derive(Debug, Clone)]
pub struct StoredAttestation {
    /// Who.
    pub attested: Attested,
    /// How far.
    pub progress: Progress,
    /// Why it is over, if it is.
    pub ended: Option<Vec<String>>,
    /// How far the release is that it begins with; none if it supports, because then another verifier drives it.
    pub release: Option<ReleaseStep>,
}

/// One renewal to record.
#[derive(Debug, Clone)]
pub struct PushRecord {
    /// The admission.
    pub admission: AdmissionId,
    /// What it has come to; its sequence is one more than the stored one.
    pub progress: Progress,
    /// What is tolerated.
    pub warnings: Vec<String>,
    /// When the next is expected.
    pub next_expected_at_ms: i64,
}

/// An admission that has to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The admission.
    pub admission: AdmissionId,
    /// The node.
    pub node: NodeId,
    /// The project that holds the lease.
    pub project: ProjectId,
    /// The boot through the airlock.
    pub boot: BootId,
    /// The AK's name, hexadecimal.
    pub ak_name: String,
    /// Whether this verifier leads.
    pub part: Part,
    /// [`EventKind::AdmissionRevoked`] or [`EventKind::AdmissionEnded`].
    pub kind: EventKind,
    /// One sentence a reason.
    pub reasons: Vec<String>,
}

impl Ending {
    /// The reasons as one sentence.
    #[must_use]
    pub fn reason(&self) -> String {
        self.reasons.join("; ")
    }

    /// Who else has to act upon it.
    #[must_use]
    pub fn falls_to(&self) -> FallsTo {
        match (self.part, self.kind) {
            (Part::Leads, _) => FallsTo::IsolationAndImaging,
            (Part::Supports, EventKind::AdmissionRevoked) => FallsTo::Isolation,
            (Part::Supports, _) => FallsTo::Nobody,
        }
    }
}

/// Who has to act upon the end of an attestation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FallsTo {
    /// The verifier that leads cuts the node off.
    IsolationAndImaging,
    /// A project's own verifier has seen bad evidence: isolation is told, as of a bad verdict at boot, and the leading
    /// verifier closes the export as soon as it hears that from isolation.
    Isolation,
    /// A project's own verifier hears nothing more: it vouches no longer, and what the site requires decides what that
    /// is worth. Were it reported, a verifier that was down for a moment would take all of its project's nodes with it.
    Nobody,
}

impl VerifierStore {
    /// One attestation.
    ///
    /// # Errors
    /// The database failed, or holds what this verifier never wrote.
    pub async fn attestation(&self, admission: AdmissionId) -> Result<Option<StoredAttestation>, DbError> {
        let row: Option<StoredRow> = sqlx::query_as(SELECT_STORED)
            .bind(admission.to_string())
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading an attestation"))?;
        row.map(StoredAttestation::try_from).transpose()
    }

    /// Records renewals, all in one statement. Gives those that counted: an admission that has ended meanwhile, or was
    /// moved on by another verifier, does not.
    ///
    /// # Errors
    /// The database failed; none counts.
    pub async fn record_pushes(&self, pushes: &[PushRecord]) -> Result<HashSet<AdmissionId>, DbError> {
        if pushes.is_empty() {
            return Ok(HashSet::new());
        }
        // Only the number of rows varies, never their content: nothing from outside is in the text.
        let text = AssertSqlSafe(update_text(pushes.len()));
        let mut query = sqlx::query_as(text).persistent(false);
        for push in pushes {
            let progress = &push.progress;
            query = query
                .bind(push.admission.to_string())
                .bind(progress.sequence)
                .bind(json(&progress.seen.clock))
                .bind(json(&progress.seen.ima))
                .bind(i64::try_from(progress.seen.ima.entries()).unwrap_or(i64::MAX))
                .bind(json(&push.warnings))
                .bind(progress.last_seen_at_ms)
                .bind(push.next_expected_at_ms)
                .bind(progress.expires_at_ms);
        }
        let rows: Vec<(String,)> =
            query.fetch_all(self.pool()).await.map_err(query_failed("recording evidence at run time"))?;
        rows.into_iter().map(|(id,)| parsed("an admission id", &id)).collect()
    }

    /// Records that the boot evidence was appraised again, by another policy, and is good.
    ///
    /// # Errors
    /// The database failed.
    pub async fn record_reappraisal(
        &self,
        admission: AdmissionId,
        policy: &str,
        submod: &Submod,
    ) -> Result<(), DbError> {
        sqlx::query("UPDATE attestations SET policy = $1, submod = $2 WHERE admission = $3 AND state = 'standing'")
            .bind(policy)
            .bind(json(submod))
            .bind(admission.to_string())
            .execute(self.pool())
            .await
            .map_err(query_failed("recording that boot evidence was appraised again"))?;
        Ok(())
    }

    /// Records that an admission has to end, with the notice and the event of it. Answers `false`, having changed
    /// nothing, if it does not stand.
    ///
    /// # Errors
    /// The database failed; nothing is recorded.
    pub async fn begin_ending(&self, ending: &Ending, now_ms: i64) -> Result<bool, DbError> {
        let failed = || query_failed("recording the end of an admission");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        let done = sqlx::query(
            "UPDATE attestations SET state = $1, reasons = $2, ended_at_ms = $3 \
             WHERE admission = $4 AND state = 'standing'",
        )
        .bind(match ending.falls_to() {
            FallsTo::IsolationAndImaging | FallsTo::Isolation => "ending",
            FallsTo::Nobody => "ended",
        })
        .bind(json(&ending.reasons))
        .bind(now_ms)
        .bind(ending.admission.to_string())
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        if done.rows_affected() != 1 {
            tx.rollback().await.map_err(failed())?;
            return Ok(false);
        }
        let notice = RevocationNotice {
            sequence: 0,
            node: ending.node.clone(),
            admission: ending.admission,
            ak_name: ending.ak_name.clone(),
            reason: ending.reason(),
            at_ms: now_ms,
        };
        let noticed = events::insert_notice(&mut tx, &ending.project, &notice).await.map_err(failed())?;
        let event = NewEvent {
            kind: ending.kind,
            at_ms: now_ms,
            project: Some(&ending.project),
            node: Some(&ending.node),
            admission: Some(ending.admission),
            detail: BTreeMap::from([("reason", ending.reason())]),
        };
        let numbered = events::insert(&mut tx, &event).await.map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        self.told([noticed, numbered]);
        Ok(true)
    }

    /// Records that isolation and imaging know of an end.
    ///
    /// # Errors
    /// The database failed.
    pub async fn finish_ending(&self, admission: AdmissionId) -> Result<(), DbError> {
        sqlx::query("UPDATE attestations SET state = 'ended' WHERE admission = $1 AND state = 'ending'")
            .bind(admission.to_string())
            .execute(self.pool())
            .await
            .map_err(query_failed("recording that an admission has ended"))?;
        Ok(())
    }

    /// Admissions that have to end and of which isolation or imaging may not know yet.
    ///
    /// # Errors
    /// The database failed.
    pub async fn endings(&self) -> Result<Vec<Ending>, DbError> {
        let rows: Vec<EndingRow> =
            sqlx::query_as(select_endings!("WHERE a.state = 'ending' ORDER BY a.ended_at_ms LIMIT 1000"))
                .fetch_all(self.pool())
                .await
                .map_err(query_failed("reading the admissions that have to end"))?;
        rows.into_iter().map(|row| row.ending(EventKind::AdmissionRevoked)).collect()
    }

    /// Admissions that were not renewed in time.
    ///
    /// # Errors
    /// The database failed.
    pub async fn expired_attestations(&self, now_ms: i64) -> Result<Vec<Ending>, DbError> {
        let rows: Vec<EndingRow> = sqlx::query_as(select_endings!(
            "LEFT JOIN releases r ON r.admission = a.admission WHERE a.state = 'standing' AND a.expires_at_ms <= $1 \
             AND (a.part = 'supports' OR r.step = 'handed-over') ORDER BY a.expires_at_ms LIMIT 1000"
        ))
        .bind(now_ms)
        .fetch_all(self.pool())
        .await
        .map_err(query_failed("reading the admissions that were not renewed"))?;
        rows.into_iter().map(|row| row.ending(EventKind::AdmissionEnded)).collect()
    }

    /// The admissions that stand: handed over, and not ended.
    ///
    /// # Errors
    /// The database failed.
    pub async fn standing_attestations(&self) -> Result<Vec<Ending>, DbError> {
        let rows: Vec<EndingRow> = sqlx::query_as(select_endings!(
            "JOIN releases r ON r.admission = a.admission WHERE a.state = 'standing' AND r.step = 'handed-over'"
        ))
        .fetch_all(self.pool())
        .await
        .map_err(query_failed("reading the admissions that stand"))?;
        rows.into_iter().map(|row| row.ending(EventKind::AdmissionEnded)).collect()
    }

    /// One admission, if it stands.
    ///
    /// # Errors
    /// The database failed.
    pub async fn standing_attestation(&self, admission: AdmissionId) -> Result<Option<Ending>, DbError> {
        let row: Option<EndingRow> = sqlx::query_as(select_endings!(
            "JOIN releases r ON r.admission = a.admission WHERE a.state = 'standing' AND r.step = 'handed-over' \
             AND a.admission = $1"
        ))
        .bind(admission.to_string())
        .fetch_optional(self.pool())
        .await
        .map_err(query_failed("reading whether an admission stands"))?;
        row.map(|row| row.ending(EventKind::AdmissionEnded)).transpose()
    }

    /// Closes what never became an admission, and forgets what ended long ago.
    ///
    /// # Errors
    /// The database failed.
    pub async fn tidy_attestations(&self, now_ms: i64) -> Result<(), DbError> {
        let failed = || query_failed("tidying the attestations");
        sqlx::query(
            "UPDATE attestations SET state = 'ended', reasons = '[\"the release was undone\"]', ended_at_ms = $1 \
             WHERE state = 'standing' AND admission IN (SELECT admission FROM releases WHERE step = 'unwound')",
        )
        .bind(now_ms)
        .execute(self.pool())
        .await
        .map_err(failed())?;
        sqlx::query("DELETE FROM attestations WHERE state = 'ended' AND ended_at_ms < $1")
            .bind(now_ms.saturating_sub(KEPT_MS))
            .execute(self.pool())
            .await
            .map_err(failed())?;
        Ok(())
    }

    /// Marks the nodes whose evidence was expected before `expected_before_ms` as silent, with an event each. Gives how
    /// many.
    ///
    /// # Errors
    /// The database failed; those that were marked stay so.
    pub async fn mark_silent(&self, expected_before_ms: i64, now_ms: i64) -> Result<usize, DbError> {
        let failed = || query_failed("marking silent nodes");
        let late: Vec<EndingRow> = sqlx::query_as(select_endings!(
            "WHERE a.state = 'standing' AND a.silent_at_ms IS NULL AND a.next_expected_at_ms < $1 \
             ORDER BY a.next_expected_at_ms LIMIT 1000"
        ))
        .bind(expected_before_ms)
        .fetch_all(self.pool())
        .await
        .map_err(failed())?;
        let mut marked = 0;
        for row in late {
            let node = row.ending(EventKind::AttestationSilent)?;
            let mut tx = self.pool().begin().await.map_err(failed())?;
            let done = sqlx::query(
                "UPDATE attestations SET silent_at_ms = $1 WHERE admission = $2 AND state = 'standing' \
                 AND silent_at_ms IS NULL AND next_expected_at_ms < $3",
            )
            .bind(now_ms)
            .bind(node.admission.to_string())
            .bind(expected_before_ms)
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
            if done.rows_affected() != 1 {
                continue;
            }
            let event = NewEvent {
                kind: EventKind::AttestationSilent,
                at_ms: now_ms,
                project: Some(&node.project),
                node: Some(&node.node),
                admission: Some(node.admission),
                detail: BTreeMap::new(),
            };
            let numbered = events::insert(&mut tx, &event).await.map_err(failed())?;
            tx.commit().await.map_err(failed())?;
            self.told([numbered]);
            tracing::warn!(event = "attestation.silent", node = %node.node, admission = %node.admission, "no evidence in time");
            marked += 1;
        }
        Ok(marked)
    }

    /// The latest attestation of every node.
    ///
    /// # Errors
    /// The database failed.
    pub async fn attestations(&self) -> Result<Vec<AttestationRecord>, DbError> {
        let rows: Vec<RecordRow> = sqlx::query_as(select_records!(
            "WHERE NOT EXISTS (SELECT 1 FROM attestations l WHERE l.node = a.node AND l.created_at_ms > a.created_at_ms) \
             ORDER BY a.node, a.admission LIMIT 20000"
        ))
        .fetch_all(self.pool())
        .await
        .map_err(query_failed("reading the attestations"))?;
        rows.into_iter().map(AttestationRecord::try_from).collect()
    }

    /// The attestations of one node, newest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn attestations_of(&self, node: &NodeId) -> Result<Vec<AttestationRecord>, DbError> {
        let rows: Vec<RecordRow> =
            sqlx::query_as(select_records!("WHERE a.node = $1 ORDER BY a.created_at_ms DESC, a.admission LIMIT 20"))
                .bind(node.as_str())
                .fetch_all(self.pool())
                .await
                .map_err(query_failed("reading a node's attestations"))?;
        rows.into_iter().map(AttestationRecord::try_from).collect()
    }
}

/// Writes the first row of an attestation, as part of the transaction that records its verdict.
pub(super) async fn insert(
    tx: &mut sqlx::AnyConnection,
    attester: &Attester,
    evidence: EvidenceId,
    new: &NewAttestation<'_>,
    now_ms: i64,
) -> Result<(), sqlx::Error> {
    let claims = new.claims;
    let submod = claims.submods.get(TPM_SUBMOD);
    let pcrs: Vec<String> = new.pcrs.iter().map(ToString::to_string).collect();
    if new.part == Part::Supports {
        // A node in the airlock has no admission to vouch for any more. Of one that is led, isolation says so.
        sqlx::query(
            "UPDATE attestations SET state = 'ended', reasons = '[\"the node was appraised anew\"]', ended_at_ms = $1 \
             WHERE node = $2 AND part = 'supports' AND state = 'standing'",
        )
        .bind(now_ms)
        .bind(claims.node.as_str())
        .execute(&mut *tx)
        .await?;
    }
    sqlx::query(INSERT)
        .bind(claims.jti.to_string())
        .bind(claims.node.as_str())
        .bind(claims.project.as_str())
        .bind(evidence.to_string())
        .bind(new.proof.to_hex())
        .bind(to_base64(&attester.ek_public))
        .bind(to_base64(&attester.ak_public))
        .bind(json(claims))
        .bind(json(&pcrs))
        .bind(json(new.clock))
        .bind(now_ms)
        .bind(submod.map(|submod| submod.policy.as_str()).unwrap_or_default())
        .bind(submod.map(json).unwrap_or_default())
        .bind(claims.exp.saturating_mul(1000))
        .bind(new.part.as_str())
        .execute(tx)
        .await
        .map(|_| ())
}

/// The name of the TPM's appraisal in a result.
pub(crate) const TPM_SUBMOD: &str = "tpm";

fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// The statement that records `rows` renewals.
fn update_text(rows: usize) -> String {
    let mut text = String::from(
        "UPDATE attestations SET sequence = v.column2, clock = v.column3, ima = v.column4, ima_entries = v.column5, \
         warnings = v.column6, last_seen_at_ms = v.column7, next_expected_at_ms = v.column8, \
         expires_at_ms = v.column9, silent_at_ms = NULL FROM (VALUES ",
    );
    for row in 0..rows {
        let first = row * PUSH_COLUMNS;
        text.push_str(if row == 0 { "(" } else { ", (" });
        for column in 1..=PUSH_COLUMNS {
            let _infallible = write!(text, "{}${}", if column == 1 { "" } else { ", " }, first + column);
        }
        text.push(')');
    }
    text.push_str(
        ") AS v WHERE attestations.admission = v.column1 AND attestations.sequence = v.column2 - 1 \
         AND attestations.state = 'standing' RETURNING admission",
    );
    text
}

const PUSH_COLUMNS: usize = 9;
/// Ended attestations are kept for 30 days.
const KEPT_MS: i64 = 30 * 24 * 60 * 60 * 1000;

const INSERT: &str = "INSERT INTO attestations (admission, node, project, evidence, proof_sha256, ek_public, ak_public, \
     claims, pcrs, admitted_clock, created_at_ms, state, policy, submod, sequence, clock, ima_entries, warnings, \
     expires_at_ms, part) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 'standing', $12, $13, 0, $10, 0, '[]', $14, $15)";

const SELECT_STORED: &str = "SELECT a.admission, a.node, a.project, a.evidence, a.proof_sha256, a.ek_public, \
     a.ak_public, a.claims, a.pcrs, a.admitted_clock, a.state, a.policy, a.submod, a.sequence, a.clock, a.ima, \
     a.last_seen_at_ms, a.expires_at_ms, a.reasons, a.part, r.step FROM attestations a \
     LEFT JOIN releases r ON r.admission = a.admission \
     WHERE a.admission = $1 AND (a.part = 'supports' OR r.step IS NOT NULL)";

macro_rules! select_endings {
    ($rest:literal) => {
        concat!("SELECT a.admission, a.node, a.project, a.claims, a.reasons, a.part FROM attestations a ", $rest)
    };
}
use select_endings;

macro_rules! select_records {
    ($rest:literal) => {
        concat!(
            "SELECT a.admission, a.node, a.project, a.state, a.evidence, a.policy, a.created_at_ms, \
             a.last_seen_at_ms, a.next_expected_at_ms, a.expires_at_ms, a.silent_at_ms, a.sequence, a.ima_entries, \
             a.warnings, a.reasons, a.ended_at_ms FROM attestations a ",
            $rest
        )
    };
}
use select_records;

#[derive(sqlx::FromRow)]
struct StoredRow {
    admission: String,
    node: String,
    project: String,
    evidence: String,
    proof_sha256: String,
    ek_public: String,
    ak_public: String,
    claims: String,
    pcrs: String,
    admitted_clock: String,
    state: String,
    policy: String,
    submod: String,
    sequence: i64,
    clock: String,
    ima: Option<String>,
    last_seen_at_ms: Option<i64>,
    expires_at_ms: i64,
    reasons: Option<String>,
    part: String,
    step: Option<String>,
}

impl TryFrom<StoredRow> for StoredAttestation {
    type Error = DbError;

    fn try_from(row: StoredRow) -> Result<Self, DbError> {
        let ak = from_base64("an AK", &row.ak_public)?;
        let pcrs: Vec<String> = from_json("PCR values", &row.pcrs)?;
        let baseline = Baseline {
            ak: AkPublic::parse(&ak).map_err(|_| corrupt("an AK", &row.ak_public))?,
            pcrs: pcr_values(&pcrs).map_err(|_| corrupt("PCR values", &row.pcrs))?,
            clock: from_json("a TPM clock", &row.admitted_clock)?,
        };
        let seen = Seen {
            clock: from_json("a TPM clock", &row.clock)?,
            ima: match row.ima {
                Some(text) => from_json("the state of a measurement list", &text)?,
                None => ImaState::admitted(&baseline.pcrs[usize::from(IMA_PCR)]),
            },
        };
        let ended = match state(&row.state)? {
            AttestationState::Standing => None,
            AttestationState::Ending | AttestationState::Ended => Some(reasons(row.reasons.as_deref())?),
        };
        Ok(Self {
            attested: Attested {
                admission: parsed("an admission id", &row.admission)?,
                node: parsed("a node name", &row.node)?,
                project: parsed("a project name", &row.project)?,
                evidence: parsed("an evidence id", &row.evidence)?,
                proof: ProofDigest::from_hex(&row.proof_sha256).ok_or_else(|| corrupt("a proof", "<redacted>"))?,
                ek_public: from_base64("an EK", &row.ek_public)?,
                claims: from_json("claims", &row.claims)?,
                baseline,
                part: part(&row.part)?,
            },
            progress: Progress {
                sequence: row.sequence,
                seen,
                policy: row.policy,
                submod: from_json("an appraisal", &row.submod)?,
                last_seen_at_ms: row.last_seen_at_ms,
                expires_at_ms: row.expires_at_ms,
            },
            ended,
            release: row.step.map(|step| parsed("a release step", &step)).transpose()?,
        })
    }
}

#[derive(sqlx::FromRow)]
struct EndingRow {
    admission: String,
    node: String,
    project: String,
    claims: String,
    reasons: Option<String>,
    part: String,
}

impl EndingRow {
    fn ending(self, kind: EventKind) -> Result<Ending, DbError> {
        let claims: Claims = from_json("claims", &self.claims)?;
        Ok(Ending {
            admission: parsed("an admission id", &self.admission)?,
            node: parsed("a node name", &self.node)?,
            project: parsed("a project name", &self.project)?,
            boot: claims.boot,
            ak_name: claims.ak_name,
            part: part(&self.part)?,
            kind,
            reasons: reasons(self.reasons.as_deref())?,
        })
    }
}

#[derive(sqlx::FromRow)]
struct RecordRow {
    admission: String,
    node: String,
    project: String,
    state: String,
    evidence: String,
    policy: String,
    created_at_ms: i64,
    last_seen_at_ms: Option<i64>,
    next_expected_at_ms: Option<i64>,
    expires_at_ms: i64,
    silent_at_ms: Option<i64>,
    sequence: i64,
    ima_entries: i64,
    warnings: String,
    reasons: Option<String>,
    ended_at_ms: Option<i64>,
}

impl TryFrom<RecordRow> for AttestationRecord {
    type Error = DbError;

    fn try_from(row: RecordRow) -> Result<Self, DbError> {
        Ok(Self {
            admission: parsed("an admission id", &row.admission)?,
            node: parsed("a node name", &row.node)?,
            project: parsed("a project name", &row.project)?,
            state: state(&row.state)?,
            evidence: parsed("an evidence id", &row.evidence)?,
            policy: row.policy,
            created_at_ms: row.created_at_ms,
            last_seen_at_ms: row.last_seen_at_ms,
            next_expected_at_ms: row.next_expected_at_ms,
            expires_at_ms: row.expires_at_ms,
            silent_at_ms: row.silent_at_ms,
            pushes: u64::try_from(row.sequence).unwrap_or(0),
            ima_entries: u64::try_from(row.ima_entries).unwrap_or(0),
            warnings: from_json("warnings", &row.warnings)?,
            reasons: reasons(row.reasons.as_deref())?,
            ended_at_ms: row.ended_at_ms,
        })
    }
}

fn state(word: &str) -> Result<AttestationState, DbError> {
    match word {
        "standing" => Ok(AttestationState::Standing),
        "ending" => Ok(AttestationState::Ending),
        "ended" => Ok(AttestationState::Ended),
        other => Err(corrupt("the state of an attestation", other)),
    }
}

fn part(word: &str) -> Result<Part, DbError> {
    [Part::Leads, Part::Supports]
        .into_iter()
        .find(|part| part.as_str() == word)
        .ok_or_else(|| corrupt("the part of an attestation", word))
}

fn reasons(text: Option<&str>) -> Result<Vec<String>, DbError> {
    text.map_or(Ok(Vec::new()), |text| from_json("reasons", text))
}
