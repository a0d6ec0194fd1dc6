//! Exports on record, and admissions that have ended.

use super::{Db, DbError, number, parsed, query, text, value};
use assay_wire::agent::SealedGrant;
use assay_wire::agreement::{Standing, Subject};
use assay_wire::id::{AdmissionId, DiskId, LeaseId, NodeId, ProjectId};
use assay_wire::imaging::Gateway;
use assay_wire::net::Iqn;
use ipnet::Ipv4Net;
use sqlx::Row as _;
use sqlx::any::AnyRow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// An export on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExportRecord {
    pub(crate) admission: AdmissionId,
    pub(crate) lease: LeaseId,
    pub(crate) disk: DiskId,
    pub(crate) project: ProjectId,
    pub(crate) node: NodeId,
    pub(crate) target: Iqn,
    pub(crate) initiator: Iqn,
    /// The control socket of its gateway.
    pub(crate) gateway: String,
    pub(crate) address: Ipv4Net,
    pub(crate) chap_name: String,
    /// Encrypted: see [`crate::secret`].
    pub(crate) chap_secret: String,
    pub(crate) sealed_grant: SealedGrant,
    pub(crate) phase: Phase,
    /// Its disk is being given another place, of which its gateway may not have been told yet.
    pub(crate) moving: bool,
    pub(crate) issued_at_ms: i64,
    pub(crate) expires_at_ms: i64,
    /// What its results were about; none of an export from before renewals.
    pub(crate) subject: Option<Subject>,
    /// Ids of the results that supported the one that made it.
    pub(crate) supporting: Vec<AdmissionId>,
}

impl ExportRecord {
    /// The admission as its renewal depends on it; none of what cannot be renewed.
    pub(crate) fn standing(&self) -> Option<Standing> {
        match self.phase {
            Phase::Cloned | Phase::Ending => None,
            Phase::Exported => Some(Standing {
                admission: self.admission,
                subject: self.subject.clone()?,
                supporting: self.supporting.clone(),
                expires_at_ms: self.expires_at_ms,
            }),
        }
    }
}

/// How far an export has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Its clone, address, secret and grant exist; its target may be up.
    Cloned,
    /// Its target is up, and must be whenever its gateway runs.
    Exported,
    /// Its target must come down; the record goes when it has.
    Ending,
}

impl Phase {
    fn as_str(self) -> &'static str {
        match self {
            Self::Cloned => "cloned",
            Self::Exported => "exported",
            Self::Ending => "ending",
        }
    }

    fn from_text(text: &str) -> Result<Self, DbError> {
        [Self::Cloned, Self::Exported, Self::Ending]
            .into_iter()
            .find(|phase| phase.as_str() == text)
            .ok_or_else(|| value("phase", text))
    }
}

impl Db {
    /// Records a new export. `false` if its lease has one, or its address was taken meanwhile.
    pub(crate) async fn insert_export(&self, export: &ExportRecord) -> Result<bool, DbError> {
        let done = sqlx::query(
            "INSERT INTO exports (admission, lease, disk, project, node, target, initiator, gateway, address, \
             chap_name, chap_secret, sealed_grant, phase, issued_at_ms, expires_at_ms, subject, supporting) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17) ON CONFLICT DO NOTHING",
        )
        .bind(export.admission.to_string())
        .bind(export.lease.to_string())
        .bind(export.disk.to_string())
        .bind(export.project.as_str())
        .bind(export.node.as_str())
        .bind(export.target.as_str())
        .bind(export.initiator.as_str())
        .bind(&export.gateway)
        .bind(export.address.to_string())
        .bind(&export.chap_name)
        .bind(&export.chap_secret)
        .bind(serde_json::to_string(&export.sealed_grant).unwrap_or_default())
        .bind(export.phase.as_str())
        .bind(export.issued_at_ms)
        .bind(export.expires_at_ms)
        .bind(export.subject.as_ref().map(|subject| serde_json::to_string(subject).unwrap_or_default()))
        .bind(serde_json::to_string(&export.supporting).unwrap_or_default())
        .execute(&self.pool)
        .await
        .map_err(query("recording an export"))?;
        Ok(done.rows_affected() == 1)
    }

    pub(crate) async fn exports(&self) -> Result<Vec<ExportRecord>, DbError> {
        let rows = sqlx::query("SELECT * FROM exports ORDER BY admission").fetch_all(&self.pool).await;
        rows.map_err(query("listing exports"))?.iter().map(export_of).collect()
    }

    pub(crate) async fn export(&self, admission: AdmissionId) -> Result<Option<ExportRecord>, DbError> {
        let row = sqlx::query("SELECT * FROM exports WHERE admission = $1")
            .bind(admission.to_string())
            .fetch_optional(&self.pool)
            .await
            .map_err(query("reading an export"))?;
        row.as_ref().map(export_of).transpose()
    }

    pub(crate) async fn export_of_lease(&self, lease: LeaseId) -> Result<Option<ExportRecord>, DbError> {
        let row = sqlx::query("SELECT * FROM exports WHERE lease = $1")
            .bind(lease.to_string())
            .fetch_optional(&self.pool)
            .await
            .map_err(query("reading a lease's export"))?;
        row.as_ref().map(export_of).transpose()
    }

    /// Addresses that exports have on a gateway's network, whichever projects share it.
    pub(crate) async fn addresses(&self, gateway: &Gateway) -> Result<BTreeSet<Ipv4Addr>, DbError> {
        // A project's own are its own on any gateway: an older rule of the schema, kept.
        let rows = sqlx::query("SELECT address FROM exports WHERE gateway = $1 OR project = $2")
            .bind(&gateway.control_socket)
            .bind(gateway.project.as_str())
            .fetch_all(&self.pool)
            .await
            .map_err(query("listing the addresses of exports"))?;
        rows.iter().map(|row| parsed::<Ipv4Net>(row, "address").map(|net| net.addr())).collect()
    }

    pub(crate) async fn set_phase(&self, admission: AdmissionId, phase: Phase) -> Result<(), DbError> {
        sqlx::query("UPDATE exports SET phase = $1 WHERE admission = $2")
            .bind(phase.as_str())
            .bind(admission.to_string())
            .execute(&self.pool)
            .await
            .map_err(query("recording an export's phase"))?;
        Ok(())
    }

    /// Records that an export's disk is being given another place, or that its gateway was told of it.
    pub(crate) async fn set_moving(&self, admission: AdmissionId, moving: bool) -> Result<(), DbError> {
        sqlx::query("UPDATE exports SET moving = $1 WHERE admission = $2")
            .bind(i64::from(moving))
            .bind(admission.to_string())
            .execute(&self.pool)
            .await
            .map_err(query("recording that an export's disk moves"))?;
        Ok(())
    }

    pub(crate) async fn remove_export(&self, admission: AdmissionId) -> Result<(), DbError> {
        sqlx::query("DELETE FROM exports WHERE admission = $1")
            .bind(admission.to_string())
            .execute(&self.pool)
            .await
            .map_err(query("removing an export from the records"))?;
        Ok(())
    }

    /// Lets exports stand until later, in one transaction, and answers which it did. One that ended meanwhile, or has
    /// expired, stays ended: that is asked again in the same statement.
    pub(crate) async fn extend(
        &self,
        renewed: &BTreeMap<AdmissionId, i64>,
        now_ms: i64,
    ) -> Result<BTreeSet<AdmissionId>, DbError> {
        if renewed.is_empty() {
            return Ok(BTreeSet::new());
        }
        let values: Vec<String> = (1..=renewed.len()).map(|at| format!("(${}, ${})", 2 * at, 2 * at + 1)).collect();
        let text = format!(
            "WITH renewed (admission, until_ms) AS (VALUES {}) \
             UPDATE exports SET expires_at_ms = renewed.until_ms FROM renewed \
             WHERE exports.admission = renewed.admission AND exports.phase = 'exported' AND exports.expires_at_ms > $1 \
             AND exports.expires_at_ms <= renewed.until_ms AND NOT EXISTS \
             (SELECT 1 FROM ended_admissions WHERE ended_admissions.admission = exports.admission) \
             RETURNING exports.admission AS admission",
            values.join(", ")
        );
        let mut extending = sqlx::query(sqlx::AssertSqlSafe(text)).persistent(false).bind(now_ms);
        for (admission, until_ms) in renewed {
            extending = extending.bind(admission.to_string()).bind(*until_ms);
        }
        let rows = extending.fetch_all(&self.pool).await.map_err(query("renewing exports"))?;
        rows.iter().map(|row| parsed(row, "admission")).collect()
    }

    /// Records that an admission has ended, for good.
    pub(crate) async fn end_admission(&self, admission: AdmissionId, until_ms: i64) -> Result<(), DbError> {
        sqlx::query(
            "INSERT INTO ended_admissions (admission, until_ms) VALUES ($1, $2) ON CONFLICT (admission) DO NOTHING",
        )
        .bind(admission.to_string())
        .bind(until_ms)
        .execute(&self.pool)
        .await
        .map_err(query("recording that an admission ended"))?;
        Ok(())
    }

    pub(crate) async fn has_ended(&self, admission: AdmissionId) -> Result<bool, DbError> {
        let row = sqlx::query("SELECT until_ms FROM ended_admissions WHERE admission = $1")
            .bind(admission.to_string())
            .fetch_optional(&self.pool)
            .await
            .map_err(query("reading whether an admission ended"))?;
        Ok(row.is_some())
    }

    /// Forgets ended admissions whose results nobody accepts any more.
    pub(crate) async fn forget_ended(&self, now_ms: i64) -> Result<(), DbError> {
        sqlx::query("DELETE FROM ended_admissions WHERE until_ms <= $1")
            .bind(now_ms)
            .execute(&self.pool)
            .await
            .map_err(query("forgetting ended admissions"))?;
        Ok(())
    }
}

fn export_of(row: &AnyRow) -> Result<ExportRecord, DbError> {
    let grant: String = row.try_get("sealed_grant").map_err(query("reading a column"))?;
    let subject: Option<String> = row.try_get("subject").map_err(query("reading a column"))?;
    let supporting = text(row, "supporting")?;
    Ok(ExportRecord {
        admission: parsed(row, "admission")?,
        lease: parsed(row, "lease")?,
        disk: parsed(row, "disk")?,
        project: parsed(row, "project")?,
        node: parsed(row, "node")?,
        target: parsed(row, "target")?,
        initiator: parsed(row, "initiator")?,
        gateway: text(row, "gateway")?,
        address: parsed(row, "address")?,
        chap_name: text(row, "chap_name")?,
        chap_secret: text(row, "chap_secret")?,
        sealed_grant: serde_json::from_str(&grant).map_err(|_| value("sealed_grant", "not a sealed grant"))?,
        phase: Phase::from_text(&text(row, "phase")?)?,
        moving: number(row, "moving")? != 0,
        issued_at_ms: number(row, "issued_at_ms")?,
        expires_at_ms: number(row, "expires_at_ms")?,
        subject: subject.map(|text| serde_json::from_str(&text).map_err(|_| value("subject", text))).transpose()?,
        supporting: serde_json::from_str(&supporting).map_err(|_| value("supporting", supporting))?,
    })
}
