//! What imaging has on record: projects, disks, gateways. Exports are in [`exports`], images in
//! [`images`].

pub(crate) mod exports;
pub(crate) mod images;

use assay_service::store::Store;
use assay_wire::id::{DiskId, ImageKey, LeaseId, NodeId, ProjectId};
use assay_wire::imaging::{ChapAlgorithms, DiskRequest, Gateway, NewDisk};
use assay_wire::isolation::Project;
use assay_wire::net::MacAddr;
use assay_wire::result::VerifierKey;
use sqlx::any::AnyRow;
use sqlx::{AnyPool, Row as _};
use std::collections::HashMap;
use std::fmt::Display;
use std::str::FromStr;

/// This crate's schema.
pub(crate) static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!();

/// A query failed, or a row holds something that was never written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DbError {
    /// The database.
    #[error("{doing}")]
    Query {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: sqlx::Error,
    },
    /// A value.
    #[error("column `{column}` holds `{value}`")]
    Value {
        /// Which.
        column: &'static str,
        /// What.
        value: String,
    },
}

/// A disk on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskRecord {
    pub(crate) id: DiskId,
    pub(crate) lease: LeaseId,
    pub(crate) project: ProjectId,
    pub(crate) node: NodeId,
    pub(crate) image: ImageKey,
    pub(crate) mac: Option<MacAddr>,
    pub(crate) state: DiskState,
}

/// Whether a disk's files exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskState {
    /// Not yet: they may be made.
    Making,
    /// Yes: they must be there.
    Ready,
}

/// The records.
#[derive(Debug, Clone)]
pub(crate) struct Db {
    pool: AnyPool,
}

impl Db {
    pub(crate) fn new(store: &Store) -> Self {
        Self { pool: store.pool().clone() }
    }

    /// Records a project, or replaces the verifiers that it trusts.
    pub(crate) async fn put_project(&self, project: &Project) -> Result<(), DbError> {
        let keys = serde_json::to_string(&project.verifier_keys).unwrap_or_default();
        sqlx::query(
            "INSERT INTO projects (name, verifier_keys) VALUES ($1, $2) \
             ON CONFLICT (name) DO UPDATE SET verifier_keys = excluded.verifier_keys",
        )
        .bind(project.name.as_str())
        .bind(keys)
        .execute(&self.pool)
        .await
        .map_err(query("recording a project"))?;
        Ok(())
    }

    pub(crate) async fn projects(&self) -> Result<Vec<Project>, DbError> {
        let rows = sqlx::query("SELECT name, verifier_keys FROM projects ORDER BY name").fetch_all(&self.pool).await;
        rows.map_err(query("listing projects"))?.iter().map(project_of).collect()
    }

    /// The keys that `project` trusts: none for one that is not on record.
    pub(crate) async fn trusted_keys(&self, project: &ProjectId) -> Result<Vec<VerifierKey>, DbError> {
        let row = sqlx::query("SELECT name, verifier_keys FROM projects WHERE name = $1")
            .bind(project.as_str())
            .fetch_optional(&self.pool)
            .await
            .map_err(query("reading a project"))?;
        let Some(row) = row else { return Ok(Vec::new()) };
        let keys = project_of(&row)?.verifier_keys;
        keys.iter().map(|key| key.parse().map_err(|_| value("verifier_keys", key))).collect()
    }

    /// The keys that each project trusts.
    pub(crate) async fn all_trusted_keys(&self) -> Result<HashMap<ProjectId, Vec<VerifierKey>>, DbError> {
        let projects = self.projects().await?;
        let parse = |key: &String| key.parse().map_err(|_| value("verifier_keys", key));
        let keys_of = |Project { name, verifier_keys }: Project| {
            Ok((name, verifier_keys.iter().map(parse).collect::<Result<_, DbError>>()?))
        };
        projects.into_iter().map(keys_of).collect()
    }

    /// Records a disk for a lease that has none, if its image may be cloned still; answers the one that the lease has
    /// then.
    pub(crate) async fn put_disk(
        &self,
        lease: LeaseId,
        request: &DiskRequest,
        image: ImageKey,
    ) -> Result<Option<DiskRecord>, DbError> {
        sqlx::query(
            "INSERT INTO disks (id, lease, project, node, image, mac, state) \
             SELECT $1, $2, $3, $4, images.key, $5, 'making' FROM images WHERE images.key = $6 \
             AND images.state = 'ready' ON CONFLICT (lease) DO NOTHING",
        )
        .bind(DiskId::random().to_string())
        .bind(lease.to_string())
        .bind(request.project.as_str())
        .bind(request.node.as_str())
        .bind(request.mac.map(|mac| mac.to_string()))
        .bind(image.to_string())
        .execute(&self.pool)
        .await
        .map_err(query("recording a disk"))?;
        self.disk(lease).await
    }

    pub(crate) async fn disk(&self, lease: LeaseId) -> Result<Option<DiskRecord>, DbError> {
        let row = sqlx::query("SELECT * FROM disks WHERE lease = $1")
            .bind(lease.to_string())
            .fetch_optional(&self.pool)
            .await
            .map_err(query("reading a disk"))?;
        row.as_ref().map(disk_of).transpose()
    }

    pub(crate) async fn disks(&self) -> Result<Vec<DiskRecord>, DbError> {
        let rows = sqlx::query("SELECT * FROM disks ORDER BY lease").fetch_all(&self.pool).await;
        rows.map_err(query("listing disks"))?.iter().map(disk_of).collect()
    }

    pub(crate) async fn disk_is_ready(&self, disk: DiskId) -> Result<(), DbError> {
        sqlx::query("UPDATE disks SET state = 'ready' WHERE id = $1")
            .bind(disk.to_string())
            .execute(&self.pool)
            .await
            .map_err(query("recording that a disk is made"))?;
        Ok(())
    }

    /// Gives a disk to another lease and node. `false` if that lease has one.
    pub(crate) async fn move_disk(&self, disk: DiskId, to: &NewDisk) -> Result<bool, DbError> {
        let done = sqlx::query(
            "UPDATE disks SET lease = $1, node = $2, mac = $3 WHERE id = $4 \
             AND NOT EXISTS (SELECT 1 FROM disks AS other WHERE other.lease = $5 AND other.id <> $6)",
        )
        .bind(to.lease.to_string())
        .bind(to.node.as_str())
        .bind(to.mac.map(|mac| mac.to_string()))
        .bind(disk.to_string())
        .bind(to.lease.to_string())
        .bind(disk.to_string())
        .execute(&self.pool)
        .await
        .map_err(query("giving a disk to another lease"))?;
        Ok(done.rows_affected() == 1)
    }

    /// Records which image a disk was restored to.
    pub(crate) async fn set_disk_image(&self, disk: DiskId, image: ImageKey) -> Result<(), DbError> {
        sqlx::query("UPDATE disks SET image = $1 WHERE id = $2")
            .bind(image.to_string())
            .bind(disk.to_string())
            .execute(&self.pool)
            .await
            .map_err(query("recording a disk's image"))?;
        Ok(())
    }

    pub(crate) async fn remove_disk(&self, disk: DiskId) -> Result<(), DbError> {
        sqlx::query("DELETE FROM disks WHERE id = $1")
            .bind(disk.to_string())
            .execute(&self.pool)
            .await
            .map_err(query("removing a disk from the records"))?;
        Ok(())
    }

    /// Records a project's gateway, or replaces it. `false` if it would be another one and the project has exports: the
    /// one that serves them must be told when they end.
    pub(crate) async fn put_gateway(&self, gateway: &Gateway) -> Result<bool, DbError> {
        let done = sqlx::query(
            "INSERT INTO gateways (project, control_socket, portal, relay, subnet, router, chap) \
             VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (project) DO UPDATE SET \
             control_socket = excluded.control_socket, portal = excluded.portal, relay = excluded.relay, \
             subnet = excluded.subnet, router = excluded.router, chap = excluded.chap \
             WHERE gateways.control_socket = excluded.control_socket \
             OR NOT EXISTS (SELECT 1 FROM exports WHERE exports.project = excluded.project)",
        )
        .bind(gateway.project.as_str())
        .bind(&gateway.control_socket)
        .bind(gateway.portal.to_string())
        .bind(gateway.relay.to_string())
        .bind(gateway.subnet.to_string())
        .bind(gateway.router.map(|router| router.to_string()))
        .bind(chap_text(gateway.chap))
        .execute(&self.pool)
        .await
        .map_err(query("recording a gateway"))?;
        Ok(done.rows_affected() == 1)
    }

    pub(crate) async fn gateways(&self) -> Result<Vec<Gateway>, DbError> {
        let rows = sqlx::query("SELECT * FROM gateways ORDER BY project").fetch_all(&self.pool).await;
        rows.map_err(query("listing gateways"))?.iter().map(gateway_of).collect()
    }

    pub(crate) async fn gateway(&self, project: &ProjectId) -> Result<Option<Gateway>, DbError> {
        let row = sqlx::query("SELECT * FROM gateways WHERE project = $1")
            .bind(project.as_str())
            .fetch_optional(&self.pool)
            .await
            .map_err(query("reading a gateway"))?;
        row.as_ref().map(gateway_of).transpose()
    }
}

fn project_of(row: &AnyRow) -> Result<Project, DbError> {
    let keys = text(row, "verifier_keys")?;
    let verifier_keys = serde_json::from_str(&keys).map_err(|_| value("verifier_keys", &keys))?;
    Ok(Project { name: parsed(row, "name")?, verifier_keys })
}

fn disk_of(row: &AnyRow) -> Result<DiskRecord, DbError> {
    let state = match text(row, "state")?.as_str() {
        "making" => DiskState::Making,
        "ready" => DiskState::Ready,
        other => return Err(value("state", other)),
    };
    Ok(DiskRecord {
        id: parsed(row, "id")?,
        lease: parsed(row, "lease")?,
        project: parsed(row, "project")?,
        node: parsed(row, "node")?,
        image: parsed(row, "image")?,
        mac: optional(row, "mac")?,
        state,
    })
}

const CHAP: [ChapAlgorithms; 2] = [ChapAlgorithms::Any, ChapAlgorithms::Sha256];

fn chap_text(chap: ChapAlgorithms) -> &'static str {
    match chap {
        ChapAlgorithms::Any => "any",
        ChapAlgorithms::Sha256 => "sha256",
    }
}

fn gateway_of(row: &AnyRow) -> Result<Gateway, DbError> {
    let chap = text(row, "chap")?;
    Ok(Gateway {
        project: parsed(row, "project")?,
        control_socket: text(row, "control_socket")?,
        portal: parsed(row, "portal")?,
        relay: parsed(row, "relay")?,
        subnet: parsed(row, "subnet")?,
        router: optional(row, "router")?,
        chap: CHAP.into_iter().find(|known| chap_text(*known) == chap).ok_or_else(|| value("chap", chap))?,
    })
}

pub(crate) fn query(doing: &'static str) -> impl FnOnce(sqlx::Error) -> DbError {
    move |source| DbError::Query { doing, source }
}

pub(crate) fn value(column: &'static str, value: impl Display) -> DbError {
    DbError::Value { column, value: value.to_string().chars().take(80).collect() }
}

pub(crate) fn text(row: &AnyRow, column: &'static str) -> Result<String, DbError> {
    row.try_get(column).map_err(query("reading a column"))
}

pub(crate) fn number(row: &AnyRow, column: &'static str) -> Result<i64, DbError> {
    row.try_get(column).map_err(query("reading a column"))
}

pub(crate) fn parsed<T: FromStr>(row: &AnyRow, column: &'static str) -> Result<T, DbError> {
    let text = text(row, column)?;
    text.parse().map_err(|_| value(column, text))
}

pub(crate) fn optional<T: FromStr>(row: &AnyRow, column: &'static str) -> Result<Option<T>, DbError> {
    let text: Option<String> = row.try_get(column).map_err(query("reading a column"))?;
    text.map(|text| text.parse().map_err(|_| value(column, text))).transpose()
}

/// Sizes are far below 2^63.
fn signed(octets: u64) -> i64 {
    i64::try_from(octets).unwrap_or(i64::MAX)
}
