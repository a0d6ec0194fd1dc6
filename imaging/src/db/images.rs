//! The catalogue of images: what each is called, whose it is, who may use it, and how far it has come.

use super::{Db, DbError, number, optional, parsed, query, signed, text, value};
use crate::store::{StoredImage, StoredKind};
use assay_wire::id::{ImageId, ImageKey, ProjectId};
use assay_wire::imaging::{ImageKind, ImageState};
use sqlx::any::{AnyArguments, AnyRow};
use sqlx::query::Query;
use sqlx::{Any, Row as _};
use std::collections::BTreeSet;

/// An image on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageRecord {
    pub(crate) key: ImageKey,
    pub(crate) name: ImageId,
    pub(crate) project: ProjectId,
    pub(crate) kind: ImageKind,
    pub(crate) state: ImageState,
    pub(crate) virtual_bytes: u64,
    pub(crate) data_bytes: u64,
    pub(crate) sha256: Option<String>,
    pub(crate) root: Option<String>,
    pub(crate) parent: Option<ImageKey>,
    pub(crate) shared_with: BTreeSet<ProjectId>,
    pub(crate) public: bool,
    pub(crate) tags: BTreeSet<String>,
    pub(crate) source: String,
    pub(crate) source_sha256: Option<String>,
    pub(crate) made_by: String,
    pub(crate) created_at_ms: i64,
}

impl ImageRecord {
    /// Whether `project` may make disks of it. That it exists is nobody else's business either.
    pub(crate) fn is_for(&self, project: &ProjectId) -> bool {
        self.public || self.project == *project || self.shared_with.contains(project)
    }

    /// Takes over what the store says.
    pub(crate) fn describe(&mut self, stored: &StoredImage) {
        (self.virtual_bytes, self.data_bytes) = (stored.virtual_bytes, stored.data_bytes);
        match &stored.kind {
            StoredKind::Golden { sha256, root } => {
                self.kind = ImageKind::Golden;
                (self.sha256, self.root) = (Some(sha256.clone()), Some(hex::encode(root)));
            }
            StoredKind::Snapshot { parent } => {
                self.kind = ImageKind::Snapshot;
                self.parent = Some(*parent);
            }
        }
    }
}

impl Db {
    /// Records a new image. `false` if its name is taken.
    pub(crate) async fn insert_image(&self, image: &ImageRecord) -> Result<bool, DbError> {
        let inserting = sqlx::query(
            "INSERT INTO images (name, project, kind, state, virtual_bytes, data_bytes, sha256, root, parent, \
             shared_with, public, tags, source_sha256, key, source, made_by, created_at_ms) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17) ON CONFLICT DO NOTHING",
        );
        let done = changeable(inserting, image)
            .bind(image.key.to_string())
            .bind(image.source.clone())
            .bind(image.made_by.clone())
            .bind(image.created_at_ms)
            .execute(&self.pool)
            .await
            .map_err(query("recording an image"))?;
        Ok(done.rows_affected() == 1)
    }

    /// Writes what may change of an image that is still as far as `was`. `false` if it is not, or another has its name.
    pub(crate) async fn update_image(&self, image: &ImageRecord, was: ImageState) -> Result<bool, DbError> {
        let updating = sqlx::query(
            "UPDATE images SET name = $1, project = $2, kind = $3, state = $4, virtual_bytes = $5, data_bytes = $6, \
             sha256 = $7, root = $8, parent = $9, shared_with = $10, public = $11, tags = $12, source_sha256 = $13 \
             WHERE key = $14 AND state = $15 AND NOT EXISTS \
             (SELECT 1 FROM images AS other WHERE other.name = $1 AND other.key <> $14)",
        );
        let done = changeable(updating, image)
            .bind(image.key.to_string())
            .bind(state_text(was))
            .execute(&self.pool)
            .await
            .map_err(query("changing an image's record"))?;
        Ok(done.rows_affected() == 1)
    }

    pub(crate) async fn images(&self) -> Result<Vec<ImageRecord>, DbError> {
        let rows = sqlx::query("SELECT * FROM images ORDER BY name").fetch_all(&self.pool).await;
        rows.map_err(query("listing images"))?.iter().map(image_of).collect()
    }

    pub(crate) async fn image(&self, name: &ImageId) -> Result<Option<ImageRecord>, DbError> {
        let row =
            sqlx::query("SELECT * FROM images WHERE name = $1").bind(name.as_str()).fetch_optional(&self.pool).await;
        row.map_err(query("reading an image"))?.as_ref().map(image_of).transpose()
    }

    /// The root of a golden image's hash tree, if there is such an image.
    pub(crate) async fn golden_root(&self, key: ImageKey) -> Result<Option<String>, DbError> {
        let row = sqlx::query("SELECT root FROM images WHERE key = $1").bind(key.to_string());
        let row = row.fetch_optional(&self.pool).await.map_err(query("reading an image's root"))?;
        row.map_or(Ok(None), |row| row.try_get("root").map_err(query("reading a column")))
    }

    pub(crate) async fn remove_image(&self, key: ImageKey) -> Result<(), DbError> {
        sqlx::query("DELETE FROM images WHERE key = $1")
            .bind(key.to_string())
            .execute(&self.pool)
            .await
            .map_err(query("removing an image from the records"))?;
        Ok(())
    }
}

/// Binds what may change of an image, as the first thirteen.
fn changeable<'q>(query: Query<'q, Any, AnyArguments>, image: &ImageRecord) -> Query<'q, Any, AnyArguments> {
    query
        .bind(image.name.to_string())
        .bind(image.project.to_string())
        .bind(kind_text(image.kind))
        .bind(state_text(image.state))
        .bind(signed(image.virtual_bytes))
        .bind(signed(image.data_bytes))
        .bind(image.sha256.clone())
        .bind(image.root.clone())
        .bind(image.parent.map(|parent| parent.to_string()))
        .bind(serde_json::to_string(&image.shared_with).unwrap_or_default())
        .bind(i64::from(image.public))
        .bind(serde_json::to_string(&image.tags).unwrap_or_default())
        .bind(image.source_sha256.clone())
}

const KINDS: [ImageKind; 2] = [ImageKind::Golden, ImageKind::Snapshot];
const STATES: [ImageState; 3] = [ImageState::Importing, ImageState::Ready, ImageState::Deleting];

fn kind_text(kind: ImageKind) -> &'static str {
    match kind {
        ImageKind::Golden => "golden",
        ImageKind::Snapshot => "snapshot",
    }
}

fn state_text(state: ImageState) -> &'static str {
    match state {
        ImageState::Importing => "importing",
        ImageState::Ready => "ready",
        ImageState::Deleting => "deleting",
    }
}

fn image_of(row: &AnyRow) -> Result<ImageRecord, DbError> {
    let (kind, state) = (text(row, "kind")?, text(row, "state")?);
    let (shared_with, tags) = (text(row, "shared_with")?, text(row, "tags")?);
    let maybe = |column: &'static str| row.try_get(column).map_err(query("reading a column"));
    Ok(ImageRecord {
        key: parsed(row, "key")?,
        name: parsed(row, "name")?,
        project: parsed(row, "project")?,
        kind: KINDS.into_iter().find(|known| kind_text(*known) == kind).ok_or_else(|| value("kind", kind))?,
        state: STATES.into_iter().find(|known| state_text(*known) == state).ok_or_else(|| value("state", state))?,
        virtual_bytes: number(row, "virtual_bytes")?.unsigned_abs(),
        data_bytes: number(row, "data_bytes")?.unsigned_abs(),
        sha256: maybe("sha256")?,
        root: maybe("root")?,
        parent: optional(row, "parent")?,
        shared_with: serde_json::from_str(&shared_with).map_err(|_| value("shared_with", shared_with))?,
        public: number(row, "public")? != 0,
        tags: serde_json::from_str(&tags).map_err(|_| value("tags", tags))?,
        source: text(row, "source")?,
        source_sha256: maybe("source_sha256")?,
        made_by: text(row, "made_by")?,
        created_at_ms: number(row, "created_at_ms")?,
    })
}
