//! Appraisal policies: every version that was ever approved, by whom and when, and which one judges now.
//!
//! The database is not trusted with them: [`VerifierStore::active_policy`] is the one way to the policy that judges, and
//! gives out only what has the recorded digest and, where policy keys are configured, the signature of one of them.

use super::events::{EventKind, NewEvent};
use super::{DbError, VerifierStore, from_json, query_failed};
use crate::policy::signature::{DetachedSignature, PolicyKeys, SignatureError};
use crate::policy::{Policy, PolicyError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A policy on record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PolicyRecord {
    /// Its name.
    pub name: String,
    /// `sha256:<hex>` over its canonical form: what attestation results name.
    pub digest: String,
    /// The document as it was approved.
    pub document: String,
    /// An operator's signature on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<DetachedSignature>,
    /// Who approved it first.
    pub added_by: String,
    /// When: milliseconds since the Unix epoch.
    pub added_at_ms: i64,
    /// Whether it judges now.
    pub active: bool,
}

impl PolicyRecord {
    /// The policy, if the record is what was approved.
    ///
    /// # Errors
    /// See [`PolicyRefused`].
    pub fn admit(&self, keys: &PolicyKeys) -> Result<Policy, PolicyRefused> {
        let policy = Policy::parse(&self.document)?;
        if policy.digest().to_string() != self.digest {
            return Err(PolicyRefused::Digest { recorded: self.digest.clone(), found: policy.digest().to_string() });
        }
        keys.check_policy(&policy, self.signature.as_ref())?;
        Ok(policy)
    }
}

/// Why a policy on record judges nothing.
#[derive(Debug, thiserror::Error)]
pub enum PolicyRefused {
    /// It is none.
    #[error("reading the policy on record")]
    Unreadable(#[from] PolicyError),
    /// It was changed after it was approved.
    #[error("the policy on record as {recorded} is {found}: it was changed after it was approved")]
    Digest {
        /// What was approved.
        recorded: String,
        /// What is there.
        found: String,
    },
    /// Its signature is not of a policy key.
    #[error("checking the signature of the policy on record")]
    Signature(#[from] SignatureError),
}

/// Why it is not known which policy judges. Nothing is judged then.
#[derive(Debug, thiserror::Error)]
pub enum ActivePolicyError {
    /// The database failed.
    #[error(transparent)]
    Db(#[from] DbError),
    /// What it holds is not what was approved.
    #[error("the active policy is refused")]
    Refused(#[from] PolicyRefused),
}

/// One approval of a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, sqlx::FromRow)]
pub struct Approval {
    /// Who.
    pub approved_by: String,
    /// When: milliseconds since the Unix epoch.
    pub approved_at_ms: i64,
}

/// Whose signatures count, and the policy that was admitted last, so that it is not read again for each verdict.
#[derive(Debug, Default)]
pub(super) struct PolicyGate {
    keys: PolicyKeys,
    admitted: Mutex<Option<(PolicyRecord, Arc<Policy>)>>,
}

impl PolicyGate {
    fn admit(&self, record: PolicyRecord) -> Result<Arc<Policy>, PolicyRefused> {
        let mut admitted = self.admitted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, policy)) = admitted.as_ref()
            && *known == record
        {
            return Ok(Arc::clone(policy));
        }
        let policy = Arc::new(record.admit(&self.keys)?);
        *admitted = Some((record, Arc::clone(&policy)));
        Ok(policy)
    }
}

impl VerifierStore {
    /// The same store, in which only policies count that one of `keys` has signed; with no keys, every approved one.
    #[must_use]
    pub fn trusting(mut self, keys: PolicyKeys) -> Self {
        self.gate = Arc::new(PolicyGate { keys, admitted: Mutex::default() });
        self
    }

    /// Whose signatures count.
    #[must_use]
    pub fn policy_keys(&self) -> &PolicyKeys {
        &self.gate.keys
    }

    /// Records a policy and makes it the one that judges. The same document twice is one record with two approvals.
    ///
    /// # Errors
    /// The database failed; then the policy that judged still does.
    pub async fn activate_policy(&self, policy: &PolicyRecord) -> Result<(), DbError> {
        let failed = || query_failed("activating a policy");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        sqlx::query(INSERT_POLICY)
            .bind(&policy.digest)
            .bind(&policy.name)
            .bind(&policy.document)
            .bind(&policy.added_by)
            .bind(policy.added_at_ms)
            .bind(policy.signature.map(|signature| signature.to_json()))
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        sqlx::query(ACTIVATE)
            .bind(&policy.digest)
            .bind(&policy.added_by)
            .bind(policy.added_at_ms)
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        sqlx::query("INSERT INTO policy_approvals (id, digest, approved_by, approved_at_ms) VALUES ($1, $2, $3, $4)")
            .bind(uuid::Uuid::now_v7().to_string())
            .bind(&policy.digest)
            .bind(&policy.added_by)
            .bind(policy.added_at_ms)
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        let event = NewEvent {
            kind: EventKind::PolicyActivated,
            at_ms: policy.added_at_ms,
            project: None,
            node: None,
            admission: None,
            detail: BTreeMap::from([
                ("name", policy.name.clone()),
                ("digest", policy.digest.clone()),
                ("by", policy.added_by.clone()),
            ]),
        };
        let told = super::events::insert(&mut tx, &event).await.map_err(failed())?;
        tx.commit().await.map_err(failed())?;
        self.told([told]);
        Ok(())
    }

    /// The policy that judges now, if there is one: as approved, and signed where it must be.
    ///
    /// # Errors
    /// The database failed, or holds something else than what was approved.
    pub async fn active_policy(&self) -> Result<Option<Arc<Policy>>, ActivePolicyError> {
        let row: Option<PolicyRow> = sqlx::query_as(ACTIVE)
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading the active policy"))?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(self.gate.admit(PolicyRecord::try_from(row)?)?))
    }

    /// A policy on record.
    ///
    /// # Errors
    /// The database failed.
    pub async fn policy(&self, digest: &str) -> Result<Option<PolicyRecord>, DbError> {
        let row: Option<PolicyRow> = sqlx::query_as(BY_DIGEST)
            .bind(digest)
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading a policy"))?;
        row.map(PolicyRecord::try_from).transpose()
    }

    /// Who approved a policy, newest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn approvals(&self, digest: &str) -> Result<Vec<Approval>, DbError> {
        sqlx::query_as(
            "SELECT approved_by, approved_at_ms FROM policy_approvals WHERE digest = $1 \
             ORDER BY approved_at_ms DESC, id DESC LIMIT 100",
        )
        .bind(digest)
        .fetch_all(self.pool())
        .await
        .map_err(query_failed("reading a policy's approvals"))
    }

    /// All policies, newest first.
    ///
    /// # Errors
    /// The database failed.
    pub async fn policies(&self) -> Result<Vec<PolicyRecord>, DbError> {
        let rows: Vec<PolicyRow> =
            sqlx::query_as(ALL).fetch_all(self.pool()).await.map_err(query_failed("reading the policies"))?;
        rows.into_iter().map(PolicyRecord::try_from).collect()
    }
}

#[derive(sqlx::FromRow)]
struct PolicyRow {
    digest: String,
    name: String,
    document: String,
    added_by: String,
    added_at_ms: i64,
    signature: Option<String>,
    slot: Option<String>,
}

impl TryFrom<PolicyRow> for PolicyRecord {
    type Error = DbError;

    fn try_from(row: PolicyRow) -> Result<Self, DbError> {
        Ok(Self {
            name: row.name,
            digest: row.digest,
            document: row.document,
            signature: row.signature.map(|text| from_json("a policy's signature", &text)).transpose()?,
            added_by: row.added_by,
            added_at_ms: row.added_at_ms,
            active: row.slot.is_some(),
        })
    }
}

macro_rules! select_policies {
    ($rest:literal) => {
        concat!(
            "SELECT p.digest, p.name, p.document, p.added_by, p.added_at_ms, p.signature, a.slot AS slot \
             FROM policies p LEFT JOIN active_policy a ON a.digest = p.digest ",
            $rest
        )
    };
}

const ACTIVE: &str = select_policies!("WHERE a.slot = 'site'");
const BY_DIGEST: &str = select_policies!("WHERE p.digest = $1");
const ALL: &str = select_policies!("ORDER BY p.added_at_ms DESC, p.digest LIMIT 500");

/// Approved again, a document is what is approved now: whatever had become of it in the database.
const INSERT_POLICY: &str = "INSERT INTO policies (digest, name, document, added_by, added_at_ms, signature) \
     VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (digest) DO UPDATE \
     SET name = excluded.name, document = excluded.document, signature = excluded.signature";

const ACTIVATE: &str = "INSERT INTO active_policy (slot, digest, activated_by, activated_at_ms) \
     VALUES ('site', $1, $2, $3) ON CONFLICT (slot) DO UPDATE SET digest = excluded.digest, \
     activated_by = excluded.activated_by, activated_at_ms = excluded.activated_at_ms";
