//! Nodes: read whole, written whole, by their one driver task.

use super::inventory::vlan;
use super::{RecordError, Store, failed, integer, json, optional, parsed, text, to_json};
use crate::record::{AdmissionRecord, Entry, LeaseRecord, NewAdmission, NicRecord, NodeRecord};
use assay_wire::id::{LeaseId, NicId, NodeId};
use assay_wire::isolation::{Nic, NodeLease, PortIntent};
use sqlx::any::AnyRow;
use sqlx::{Any, Row as _, Transaction};

/// What goes on record together with a node's new state.
#[derive(Debug)]
pub enum Effect {
    /// A lease begins.
    LeaseBegins(NodeLease),
    /// A lease ends.
    LeaseEnds(LeaseId),
    /// An admission was accepted.
    Admits(NewAdmission),
    /// Every admission of the node that stands is revoked, with the reason.
    AdmissionsEnd(String),
}

const READING: &str = "reading the node";

impl Store {
    /// All nodes' names.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn node_names(&self) -> Result<Vec<NodeId>, RecordError> {
        let doing = "listing the nodes";
        let rows = sqlx::query("SELECT name FROM nodes ORDER BY name");
        let rows = rows.fetch_all(self.database.pool()).await.map_err(failed(doing))?;
        rows.iter().map(|row| parsed(doing, row, "name")).collect()
    }

    /// A node with everything that belongs to it, as of one moment.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn node(&self, name: &NodeId) -> Result<Option<NodeRecord>, RecordError> {
        let doing = READING;
        let mut transaction = self.begin(doing).await?;
        let row = sqlx::query(
            "SELECT state, reason, since_ms, boot, entry, entered_ms, reset_time, machine_resets \
             FROM nodes WHERE name = $1",
        )
        .bind(name.to_string())
        .fetch_optional(&mut *transaction)
        .await
        .map_err(failed(doing))?;
        let Some(row) = row else { return Ok(None) };
        let mut record = NodeRecord {
            name: name.clone(),
            state: parsed(doing, &row, "state")?,
            reason: text(doing, &row, "reason")?,
            since_ms: integer(doing, &row, "since_ms")?,
            boot: optional(doing, &row, "boot")?,
            entry: entry(&text(doing, &row, "entry")?)?,
            entered_ms: integer(doing, &row, "entered_ms")?,
            reset_time: row.try_get("reset_time").map_err(failed(doing))?,
            machine_resets: integer(doing, &row, "machine_resets")?.try_into().unwrap_or(0),
            nics: nics(&mut transaction, name).await?,
            lease: live_lease(&mut transaction, name).await?,
            admission: None,
        };
        if let Some(boot) = record.boot {
            let row = sqlx::query(
                "SELECT id, lease, boot, ak_name, expires_at_ms, revoked FROM admissions \
                 WHERE node = $1 AND boot = $2 ORDER BY created_ms DESC, id LIMIT 1",
            )
            .bind(name.to_string())
            .bind(boot.to_string())
            .fetch_optional(&mut *transaction)
            .await
            .map_err(failed(doing))?;
            record.admission = row.as_ref().map(|row| admission(doing, row)).transpose()?;
        }
        transaction.commit().await.map_err(failed(doing))?;
        Ok(Some(record))
    }

    /// Puts a node's new state on record, with its effects and an audit entry, or nothing of it.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn save(&self, record: &NodeRecord, effects: &[Effect], kind: &str) -> Result<(), RecordError> {
        let doing = "recording the node's state";
        let mut transaction = self.begin(doing).await?;
        sqlx::query(
            "UPDATE nodes SET state = $1, reason = $2, since_ms = $3, boot = $4, entry = $5, entered_ms = $6, \
             reset_time = $7, machine_resets = $8 WHERE name = $9",
        )
        .bind(record.state.as_str())
        .bind(record.reason.clone())
        .bind(record.since_ms)
        .bind(record.boot.map(|boot| boot.to_string()))
        .bind(entry_text(record.entry))
        .bind(record.entered_ms)
        .bind(record.reset_time.clone())
        .bind(i64::try_from(record.machine_resets).unwrap_or(i64::MAX))
        .bind(record.name.to_string())
        .execute(&mut *transaction)
        .await
        .map_err(failed(doing))?;
        for nic in &record.nics {
            sqlx::query("UPDATE nics SET desired = $1 WHERE node = $2 AND name = $3")
                .bind(to_json(&nic.desired))
                .bind(record.name.to_string())
                .bind(nic.nic.name.to_string())
                .execute(&mut *transaction)
                .await
                .map_err(failed(doing))?;
        }
        let mut admissions_changed = false;
        for effect in effects {
            let rows = self.write_effect(&mut transaction, &record.name, effect).await?;
            admissions_changed |= rows > 0 && matches!(effect, Effect::Admits(_) | Effect::AdmissionsEnd(_));
        }
        self.audit(&mut transaction, Some(&record.name), kind, &record.reason).await?;
        self.commit(doing, transaction).await?;
        if admissions_changed {
            self.admissions_revision.send_modify(|revision| *revision += 1);
        }
        Ok(())
    }

    async fn write_effect(
        &self,
        transaction: &mut Transaction<'_, Any>,
        node: &NodeId,
        effect: &Effect,
    ) -> Result<u64, RecordError> {
        let now_ms = self.clock.now_ms();
        if let Effect::Admits(new) = effect {
            // Fails with `Taken` if the admission was revoked before it was made, or a result was used before.
            let supporting = new.supporting.iter().map(|id| (id, "support"));
            for (id, purpose) in std::iter::once((&new.record.id, "admission")).chain(supporting) {
                sqlx::query("INSERT INTO result_ids (id, purpose, used_ms) VALUES ($1, $2, $3)")
                    .bind(id.to_string())
                    .bind(purpose)
                    .bind(now_ms)
                    .execute(&mut **transaction)
                    .await
                    .map_err(failed("recording the admission"))?;
            }
        }
        let query = match effect {
            Effect::LeaseBegins(lease) => {
                sqlx::query("INSERT INTO leases (id, project, node, network, created_ms) VALUES ($1, $2, $3, $4, $5)")
                    .bind(lease.id.to_string())
                    .bind(lease.project.to_string())
                    .bind(node.to_string())
                    .bind(lease.network.to_string())
                    .bind(now_ms)
            }
            Effect::LeaseEnds(lease) => {
                sqlx::query("UPDATE leases SET ended_ms = $1 WHERE id = $2 AND ended_ms IS NULL")
                    .bind(now_ms)
                    .bind(lease.to_string())
            }
            Effect::Admits(NewAdmission { record, subject, supporting }) => sqlx::query(
                "INSERT INTO admissions (id, node, lease, boot, ak_name, expires_at_ms, created_ms, subject, supporting) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            )
            .bind(record.id.to_string())
            .bind(node.to_string())
            .bind(record.lease.to_string())
            .bind(record.boot.to_string())
            .bind(record.ak_name.clone())
            .bind(record.expires_at_ms)
            .bind(now_ms)
            .bind(to_json(subject))
            .bind(to_json(supporting)),
            Effect::AdmissionsEnd(reason) => {
                sqlx::query("UPDATE admissions SET revoked = $1, ended_ms = $2 WHERE node = $3 AND revoked IS NULL")
                    .bind(reason.clone())
                    .bind(now_ms)
                    .bind(node.to_string())
            }
        };
        let done = query.execute(&mut **transaction).await;
        Ok(done.map_err(failed("recording the node's leases and admissions"))?.rows_affected())
    }

    /// Puts on record why a node is where it is, without changing anything else; audited when it is news.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn explain(&self, node: &NodeId, reason: &str, kind: &str) -> Result<(), RecordError> {
        let doing = "recording the node's reason";
        let mut transaction = self.begin(doing).await?;
        let changed = sqlx::query("UPDATE nodes SET reason = $1 WHERE name = $2 AND reason <> $1")
            .bind(reason.to_owned())
            .bind(node.to_string())
            .execute(&mut *transaction)
            .await
            .map_err(failed(doing))?;
        if changed.rows_affected() > 0 {
            self.audit(&mut transaction, Some(node), kind, reason).await?;
        }
        transaction.commit().await.map_err(failed(doing))
    }

    /// Takes back what [`Store::explain`] said, if it is still what is said.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn recovered(&self, node: &NodeId, shown: &str, hidden: &str) -> Result<(), RecordError> {
        let doing = "recording the node's recovery";
        let mut transaction = self.begin(doing).await?;
        let changed = sqlx::query("UPDATE nodes SET reason = $1 WHERE name = $2 AND reason = $3")
            .bind(hidden.to_owned())
            .bind(node.to_string())
            .bind(shown.to_owned())
            .execute(&mut *transaction)
            .await
            .map_err(failed(doing))?;
        if changed.rows_affected() > 0 {
            self.audit(&mut transaction, Some(node), "recovered", hidden).await?;
        }
        transaction.commit().await.map_err(failed(doing))
    }

    /// Puts on record what a port reads back as.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn observed(&self, node: &NodeId, nic: &NicId, port: Option<PortIntent>) -> Result<(), RecordError> {
        sqlx::query("UPDATE nics SET observed = $1 WHERE node = $2 AND name = $3")
            .bind(port.map(|p| to_json(&p)))
            .bind(node.to_string())
            .bind(nic.to_string())
            .execute(self.database.pool())
            .await
            .map_err(failed("recording the port's state"))?;
        Ok(())
    }
}

async fn nics(transaction: &mut Transaction<'_, Any>, node: &NodeId) -> Result<Vec<NicRecord>, RecordError> {
    let doing = "reading the node's NICs";
    let rows =
        sqlx::query("SELECT name, mac, switch, port, desired, observed FROM nics WHERE node = $1 ORDER BY position")
            .bind(node.to_string())
            .fetch_all(&mut **transaction)
            .await
            .map_err(failed(doing))?;
    let nic = |row: &AnyRow| {
        let observed: Option<String> = row.try_get("observed").map_err(failed(doing))?;
        Ok(NicRecord {
            nic: Nic {
                name: parsed(doing, row, "name")?,
                mac: parsed(doing, row, "mac")?,
                switch: parsed(doing, row, "switch")?,
                port: text(doing, row, "port")?,
            },
            desired: json(doing, "desired", &text(doing, row, "desired")?)?,
            observed: observed.map(|value| json(doing, "observed", &value)).transpose()?,
        })
    };
    rows.iter().map(nic).collect()
}

async fn live_lease(transaction: &mut Transaction<'_, Any>, node: &NodeId) -> Result<Option<LeaseRecord>, RecordError> {
    let doing = "reading the node's lease";
    let row = sqlx::query(
        "SELECT leases.id AS id, leases.project AS project, leases.network AS network, networks.vlan AS vlan \
         FROM leases JOIN networks ON networks.name = leases.network \
         WHERE leases.node = $1 AND leases.ended_ms IS NULL",
    )
    .bind(node.to_string())
    .fetch_optional(&mut **transaction)
    .await
    .map_err(failed(doing))?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(LeaseRecord {
        lease: NodeLease {
            id: parsed(doing, &row, "id")?,
            project: parsed(doing, &row, "project")?,
            node: node.clone(),
            network: parsed(doing, &row, "network")?,
        },
        vlan: vlan(doing, integer(doing, &row, "vlan")?)?,
    }))
}

pub(super) fn admission(doing: &'static str, row: &AnyRow) -> Result<AdmissionRecord, RecordError> {
    Ok(AdmissionRecord {
        id: parsed(doing, row, "id")?,
        lease: parsed(doing, row, "lease")?,
        boot: parsed(doing, row, "boot")?,
        ak_name: text(doing, row, "ak_name")?,
        expires_at_ms: integer(doing, row, "expires_at_ms")?,
        revoked: row.try_get("revoked").map_err(failed(doing))?,
    })
}

fn entry(value: &str) -> Result<Entry, RecordError> {
    match value {
        "pending" => Ok(Entry::Pending),
        "done" => Ok(Entry::Done),
        other => Err(RecordError::Corrupt { doing: READING, column: "entry", value: other.to_owned() }),
    }
}

pub(super) fn entry_text(entry: Entry) -> &'static str {
    match entry {
        Entry::Pending => "pending",
        Entry::Done => "done",
    }
}
