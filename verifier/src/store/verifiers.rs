//! Which verifiers share the database, which of them drives which release, and which keys they have.
//!
//! Every process has a *run*, random, and a *name* that its successor will have as well. A release belongs to a run; to
//! take one over is a compare-and-set on that column, and every step in the journal is written under it, so a process
//! that was believed dead and wakes up can no longer move anything on. Nobody compares clocks: a process is alive while
//! its counter moves, as seen from where one stands.

use super::{DbError, VerifierStore, parsed, query_failed};
use assay_wire::id::{AdmissionId, NodeId};
use std::fmt;
use uuid::Uuid;

/// One life of one verifier process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RunId(Uuid);

impl RunId {
    pub(super) fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for RunId {
    type Err = uuid::Error;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        value.parse().map(Self)
    }
}

/// A verifier on record, and how far its counter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Its run.
    pub run: RunId,
    /// Its counter.
    pub beat: i64,
}

/// Who drives a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This process.
    Us,
    /// Another process, or one that is no more.
    Other(RunId),
    /// Nobody: the one who drove it has stopped in good order.
    Nobody,
}

/// The keys that verifiers of one database have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedKeys {
    /// The public key of the key that signs results.
    pub result_key: String,
    /// SHA-256 of the key that agents pin, hexadecimal.
    pub agent_key_sha256: String,
}

impl VerifierStore {
    /// This process's run.
    #[must_use]
    pub fn run(&self) -> RunId {
        self.run
    }

    /// Enters this process under its name; a process that had the name is one no more, and what it drove is ours.
    ///
    /// # Errors
    /// The database failed.
    pub async fn join(&self, now_ms: i64) -> Result<(), DbError> {
        let failed = || query_failed("entering this verifier into the database");
        sqlx::query(
            "INSERT INTO verifiers (name, run, beat, joined_at_ms) VALUES ($1, $2, 0, $3) \
             ON CONFLICT (name) DO UPDATE SET run = excluded.run, beat = 0, joined_at_ms = excluded.joined_at_ms",
        )
        .bind(&*self.name)
        .bind(self.run.to_string())
        .bind(now_ms)
        .execute(self.pool())
        .await
        .map_err(failed())?;
        self.adopt_orphans().await.map(drop)
    }

    /// Says that this process lives. Answers `false` if its name is another process's by now, or it was taken for dead:
    /// then it drives nothing any more.
    ///
    /// # Errors
    /// The database failed.
    pub async fn beat(&self) -> Result<bool, DbError> {
        let done = sqlx::query("UPDATE verifiers SET beat = beat + 1 WHERE run = $1")
            .bind(self.run.to_string())
            .execute(self.pool())
            .await
            .map_err(query_failed("writing this verifier's heartbeat"))?;
        Ok(done.rows_affected() == 1)
    }

    /// The other verifiers.
    ///
    /// # Errors
    /// The database failed.
    pub async fn other_beats(&self) -> Result<Vec<Beat>, DbError> {
        let rows: Vec<(String, i64)> = sqlx::query_as("SELECT run, beat FROM verifiers WHERE run <> $1")
            .bind(self.run.to_string())
            .fetch_all(self.pool())
            .await
            .map_err(query_failed("reading the other verifiers' heartbeats"))?;
        rows.into_iter().map(|(run, beat)| Ok(Beat { run: parsed("a run", &run)?, beat })).collect()
    }

    /// Removes a verifier whose counter still stands where it was seen. Answers whether it was there to be removed.
    ///
    /// # Errors
    /// The database failed.
    pub async fn bury(&self, dead: Beat) -> Result<bool, DbError> {
        let done = sqlx::query("DELETE FROM verifiers WHERE run = $1 AND beat = $2")
            .bind(dead.run.to_string())
            .bind(dead.beat)
            .execute(self.pool())
            .await
            .map_err(query_failed("removing a dead verifier"))?;
        Ok(done.rows_affected() == 1)
    }

    /// Takes every unfinished release that no verifier on record drives. Answers how many.
    ///
    /// # Errors
    /// The database failed.
    pub async fn adopt_orphans(&self) -> Result<u64, DbError> {
        let done = sqlx::query(ADOPT)
            .bind(self.run.to_string())
            .execute(self.pool())
            .await
            .map_err(query_failed("taking over releases"))?;
        Ok(done.rows_affected())
    }

    /// Takes one unfinished release from `owner`. Answers `false`, having changed nothing, if it was no longer that
    /// one's.
    ///
    /// # Errors
    /// The database failed.
    pub async fn claim(&self, admission: AdmissionId, owner: Owner) -> Result<bool, DbError> {
        let from = match owner {
            Owner::Us => return Ok(true),
            Owner::Other(run) => run.to_string(),
            Owner::Nobody => String::new(),
        };
        let done = sqlx::query(CLAIM)
            .bind(self.run.to_string())
            .bind(admission.to_string())
            .bind(from)
            .execute(self.pool())
            .await
            .map_err(query_failed("taking over a release"))?;
        Ok(done.rows_affected() == 1)
    }

    /// Who drives a release.
    ///
    /// # Errors
    /// The database failed.
    pub async fn owner(&self, admission: AdmissionId) -> Result<Owner, DbError> {
        let row: Option<(Option<String>,)> = sqlx::query_as("SELECT owner FROM releases WHERE admission = $1")
            .bind(admission.to_string())
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading who drives a release"))?;
        self.owner_of(row.and_then(|(owner,)| owner))
    }

    /// The unfinished releases that are this process's.
    ///
    /// # Errors
    /// The database failed.
    pub async fn owned_releases(&self) -> Result<Vec<AdmissionId>, DbError> {
        let rows: Vec<(String,)> = sqlx::query_as(OWNED)
            .bind(self.run.to_string())
            .fetch_all(self.pool())
            .await
            .map_err(query_failed("reading this verifier's releases"))?;
        rows.into_iter().map(|(admission,)| parsed("an admission id", &admission)).collect()
    }

    /// The unfinished releases of a node, oldest first, with who drives each.
    ///
    /// # Errors
    /// The database failed.
    pub async fn unfinished_of_node(&self, node: &NodeId) -> Result<Vec<(AdmissionId, Owner)>, DbError> {
        let rows: Vec<(String, Option<String>)> = sqlx::query_as(UNFINISHED_OF_NODE)
            .bind(node.as_str())
            .fetch_all(self.pool())
            .await
            .map_err(query_failed("reading a node's releases"))?;
        rows.into_iter()
            .map(|(admission, owner)| Ok((parsed("an admission id", &admission)?, self.owner_of(owner)?)))
            .collect()
    }

    /// Leaves in good order: what this process drove is anybody's at once.
    ///
    /// # Errors
    /// The database failed; then the others find out by themselves.
    pub async fn leave(&self) -> Result<(), DbError> {
        let failed = || query_failed("taking this verifier out of the database");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        for statement in ["UPDATE releases SET owner = NULL WHERE owner = $1", "DELETE FROM verifiers WHERE run = $1"] {
            sqlx::query(statement).bind(self.run.to_string()).execute(&mut *tx).await.map_err(failed())?;
        }
        tx.commit().await.map_err(failed())
    }

    /// The keys of this database's verifiers: `ours`, if there were none on record yet.
    ///
    /// # Errors
    /// The database failed.
    pub async fn shared_keys(&self, ours: &SharedKeys) -> Result<SharedKeys, DbError> {
        let failed = || query_failed("reading the keys of this database's verifiers");
        sqlx::query(
            "INSERT INTO verifier_keys (slot, result_key, agent_key_sha256) VALUES ('site', $1, $2) \
             ON CONFLICT (slot) DO NOTHING",
        )
        .bind(&ours.result_key)
        .bind(&ours.agent_key_sha256)
        .execute(self.pool())
        .await
        .map_err(failed())?;
        let (result_key, agent_key_sha256) =
            sqlx::query_as("SELECT result_key, agent_key_sha256 FROM verifier_keys WHERE slot = 'site'")
                .fetch_one(self.pool())
                .await
                .map_err(failed())?;
        Ok(SharedKeys { result_key, agent_key_sha256 })
    }

    /// Makes `ours` the keys of this database's verifiers.
    ///
    /// # Errors
    /// The database failed.
    pub async fn replace_shared_keys(&self, ours: &SharedKeys) -> Result<(), DbError> {
        sqlx::query("UPDATE verifier_keys SET result_key = $1, agent_key_sha256 = $2 WHERE slot = 'site'")
            .bind(&ours.result_key)
            .bind(&ours.agent_key_sha256)
            .execute(self.pool())
            .await
            .map(|_| ())
            .map_err(query_failed("recording the keys of this database's verifiers"))
    }

    fn owner_of(&self, column: Option<String>) -> Result<Owner, DbError> {
        match column {
            None => Ok(Owner::Nobody),
            Some(run) => parsed("a run", &run).map(|run| if run == self.run { Owner::Us } else { Owner::Other(run) }),
        }
    }
}

macro_rules! unfinished {
    ($before:literal, $after:literal) => {
        concat!($before, "step IN ('admitted', 'exported', 'ready', 'moved', 'granted', 'unwinding')", $after)
    };
}

const ADOPT: &str = unfinished!(
    "UPDATE releases SET owner = $1 WHERE ",
    " AND (owner IS NULL OR owner NOT IN (SELECT run FROM verifiers))"
);
const CLAIM: &str =
    unfinished!("UPDATE releases SET owner = $1 WHERE admission = $2 AND COALESCE(owner, '') = $3 AND ", "");
const OWNED: &str = unfinished!("SELECT admission FROM releases WHERE owner = $1 AND ", "");
const UNFINISHED_OF_NODE: &str =
    unfinished!("SELECT admission, owner FROM releases WHERE node = $1 AND ", " ORDER BY created_at_ms, admission");

#[cfg(test)]
mod tests {
    use super::super::StoreLimits;
    use super::*;
    use crate::fixtures::{TestStore, admitted};
    use crate::release::journal::ReleaseStep;

    #[test]
    fn every_unfinished_step_is_in_the_statements() {
        for step in ReleaseStep::ALL {
            assert_eq!(!step.is_finished(), OWNED.contains(&format!("'{step}'")), "{step}");
        }
    }

    #[tokio::test]
    async fn who_takes_a_release_over_is_the_only_one_who_can_write_its_journal() {
        let test = TestStore::open(StoreLimits::default()).await;
        let (one, other) = (&test.store, test.another_process("other").await);
        one.join(1).await.unwrap();
        other.join(1).await.unwrap();
        let mut release = admitted(one, "n1", 1_000).await;
        assert_eq!(other.owned_releases().await.unwrap(), []);
        assert_eq!(other.adopt_orphans().await.unwrap(), 0, "its driver lives");
        assert!(!other.claim(release.admission, Owner::Nobody).await.unwrap());
        assert!(other.claim(release.admission, Owner::Other(one.run())).await.unwrap());
        assert_eq!(one.owner(release.admission).await.unwrap(), Owner::Other(other.run()));

        release.step = ReleaseStep::Unwinding;
        assert!(!one.write_step(&release, ReleaseStep::Admitted).await.unwrap(), "it is no longer one's");
        assert!(other.write_step(&release, ReleaseStep::Admitted).await.unwrap());
    }

    #[tokio::test]
    async fn a_dead_verifiers_releases_are_anybodys_and_it_learns_that_it_was_buried() {
        let test = TestStore::open(StoreLimits::default()).await;
        let (one, other) = (&test.store, test.another_process("other").await);
        one.join(1).await.unwrap();
        other.join(1).await.unwrap();
        let release = admitted(one, "n1", 1_000).await;
        assert!(one.beat().await.unwrap());
        assert_eq!(other.other_beats().await.unwrap(), [Beat { run: one.run(), beat: 1 }]);
        assert!(!other.bury(Beat { run: one.run(), beat: 0 }).await.unwrap(), "it has moved since");
        assert!(other.bury(Beat { run: one.run(), beat: 1 }).await.unwrap());
        assert_eq!(other.adopt_orphans().await.unwrap(), 1);
        assert_eq!(other.owned_releases().await.unwrap(), [release.admission]);
        assert!(!one.beat().await.unwrap(), "who was buried must know it");
        // What it still admits before it knows is driven by others.
        let late = admitted(one, "n2", 2_000).await;
        assert_eq!(other.adopt_orphans().await.unwrap(), 1);
        assert!(other.owned_releases().await.unwrap().contains(&late.admission));
    }

    #[tokio::test]
    async fn a_successor_of_the_same_name_and_an_orderly_leaver_leave_nothing_behind() {
        let test = TestStore::open(StoreLimits::default()).await;
        let one = &test.store;
        one.join(1).await.unwrap();
        let release = admitted(one, "n1", 1_000).await;
        let successor = test.another_process("verifier").await;
        successor.join(2).await.unwrap();
        assert_eq!(successor.owned_releases().await.unwrap(), [release.admission]);
        assert!(!one.beat().await.unwrap());
        successor.leave().await.unwrap();
        assert_eq!(successor.owner(release.admission).await.unwrap(), Owner::Nobody);
        assert!(successor.claim(release.admission, Owner::Nobody).await.unwrap());
    }
}
