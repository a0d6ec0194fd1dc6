//! Which node has which EK. The decisions are [`crate::identity::binding`]'s; here they are kept, each in one
//! transaction, and one EK is one node by the table's own constraints (CVE-2025-13609 is what happens otherwise).

use super::{DbError, VerifierStore, from_json, parsed, query_failed};
use crate::boot_count::{Boot, BootFacts, LastQuote};
use crate::identity::EkDigest;
use crate::identity::binding::{EkBinding, Identity, IdentityClaim, Origin, claim};
use crate::quote::ClockInfo;
use assay_wire::id::NodeId;
use sqlx::AnyConnection;

macro_rules! select {
    () => {
        "SELECT node, ek_sha256, bound_at_ms, origin, bound_by, seen_at_ms FROM identities"
    };
}

/// What becomes of an operator's word that an EK is a node's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allowed {
    /// It is on record.
    Done(Identity),
    /// Node or EK are on record otherwise.
    Taken(Identity),
}

impl VerifierStore {
    /// Compares a claim with what is on record.
    ///
    /// # Errors
    /// The database failed.
    pub async fn check_identity(&self, node: &NodeId, ek: &EkDigest) -> Result<IdentityClaim, DbError> {
        let mut connection = self.pool().acquire().await.map_err(query_failed("looking up a node's identity"))?;
        Ok(claim(node, ek, &identities_like(&mut connection, node, ek).await?))
    }

    /// A node has proven to possess an EK: binds them if `binding` lets it, and answers how the claim stands
    /// afterwards. Of two at once, one is bound and the other is told by whom.
    ///
    /// # Errors
    /// The database failed.
    pub async fn bind_identity(
        &self,
        node: &NodeId,
        ek: &EkDigest,
        binding: EkBinding,
        now_ms: i64,
    ) -> Result<IdentityClaim, DbError> {
        let failed = || query_failed("binding a node to its EK");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        match binding {
            EkBinding::FirstUse => insert(&mut tx, node, ek, Origin::FirstUse, None, now_ms).await?,
            EkBinding::Approved => {}
        }
        let claimed = claim(node, ek, &identities_like(&mut tx, node, ek).await?);
        if let IdentityClaim::Known(_) = claimed {
            sqlx::query("UPDATE identities SET seen_at_ms = $1 WHERE node = $2")
                .bind(now_ms)
                .bind(node.as_str())
                .execute(&mut *tx)
                .await
                .map_err(failed())?;
        }
        tx.commit().await.map_err(failed())?;
        Ok(claimed)
    }

    /// An operator says beforehand that an EK is a node's, and vouches for it. What is on record otherwise stays, and
    /// is answered.
    ///
    /// # Errors
    /// The database failed.
    pub async fn allow_identity(
        &self,
        node: &NodeId,
        ek: &EkDigest,
        by: &str,
        now_ms: i64,
    ) -> Result<Allowed, DbError> {
        let failed = || query_failed("allowing an EK");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        insert(&mut tx, node, ek, Origin::Allowed, Some(by), now_ms).await?;
        sqlx::query("UPDATE identities SET origin = $1, bound_by = $2 WHERE node = $3 AND ek_sha256 = $4")
            .bind(Origin::Allowed.as_str())
            .bind(by)
            .bind(node.as_str())
            .bind(ek.as_str())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        let allowed = match claim(node, ek, &identities_like(&mut tx, node, ek).await?) {
            IdentityClaim::Known(identity) => Allowed::Done(identity),
            IdentityClaim::OtherEk(other) | IdentityClaim::OtherNode(other) => Allowed::Taken(other),
            IdentityClaim::New => return Err(super::corrupt("an identity", node.as_str())), // it was just inserted
        };
        tx.commit().await.map_err(failed())?;
        Ok(allowed)
    }

    /// The TPM clock of the last verified quote of `node`.
    ///
    /// # Errors
    /// The database failed.
    pub async fn last_clock(&self, node: &NodeId) -> Result<Option<ClockInfo>, DbError> {
        let clock: Option<(Option<String>,)> = sqlx::query_as("SELECT last_clock FROM identities WHERE node = $1")
            .bind(node.as_str())
            .fetch_optional(self.pool())
            .await
            .map_err(query_failed("reading a node's last TPM clock"))?;
        clock.and_then(|(clock,)| clock).map(|clock| from_json("a TPM clock", &clock)).transpose()
    }

    /// What the TPM's counts in a quote of `node` in `boot` are held against.
    ///
    /// # Errors
    /// The database failed.
    pub async fn boot_facts(&self, node: &NodeId, boot: Boot) -> Result<BootFacts, DbError> {
        let row: Option<CountsRow> = sqlx::query_as(
            "SELECT last_clock, last_boot, last_machine_resets, first_clock, previous_clock, previous_boot, \
             previous_machine_resets FROM identities WHERE node = $1",
        )
        .bind(node.as_str())
        .fetch_optional(self.pool())
        .await
        .map_err(query_failed("reading a node's last quote"))?;
        let mut facts = BootFacts { first_clock: None, last_quote: None, boot };
        let Some(row) = row else { return Ok(facts) };
        let earlier = if row.last_boot == Some(boot.id.to_string()) {
            // Without a first quote the row is older than they are kept.
            let first = row.first_clock.or(row.last_clock);
            facts.first_clock = first.map(|clock| from_json("a TPM clock", &clock)).transpose()?;
            (row.previous_clock, row.previous_boot, row.previous_machine_resets)
        } else {
            (row.last_clock, row.last_boot, row.last_machine_resets)
        };
        let (Some(clock), Some(last_boot), machine_resets) = earlier else { return Ok(facts) };
        let (releases,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM releases WHERE node = $1 AND boot = $2")
            .bind(node.as_str())
            .bind(&last_boot)
            .fetch_one(self.pool())
            .await
            .map_err(query_failed("reading whether a boot was released"))?;
        let machine_resets = machine_resets.and_then(|resets| u64::try_from(resets).ok());
        let last_boot = Boot { id: parsed("a boot id", &last_boot)?, machine_resets };
        let clock = from_json("a TPM clock", &clock)?;
        facts.last_quote = Some(LastQuote { clock, boot: last_boot, released: releases > 0 });
        Ok(facts)
    }

    /// All identities.
    ///
    /// # Errors
    /// The database failed.
    pub async fn identities(&self) -> Result<Vec<Identity>, DbError> {
        let rows: Vec<IdentityRow> = sqlx::query_as(concat!(select!(), " ORDER BY node"))
            .fetch_all(self.pool())
            .await
            .map_err(query_failed("reading the identities"))?;
        rows.into_iter().map(Identity::try_from).collect()
    }

    /// Forgets a node's EK, and the sessions that were opened with it. Answers whether there was one.
    ///
    /// # Errors
    /// The database failed.
    pub async fn clear_identity(&self, node: &NodeId) -> Result<bool, DbError> {
        let failed = || query_failed("clearing a node's identity");
        let mut tx = self.pool().begin().await.map_err(failed())?;
        let done = sqlx::query("DELETE FROM identities WHERE node = $1")
            .bind(node.as_str())
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        end_sessions(&mut tx, node).await?;
        tx.commit().await.map_err(failed())?;
        Ok(done.rows_affected() > 0)
    }
}

/// Takes node and EK out of every binding, and binds them to one another.
pub(super) async fn rebind(
    connection: &mut AnyConnection,
    node: &NodeId,
    ek: &EkDigest,
    by: &str,
    now_ms: i64,
) -> Result<(), DbError> {
    for identity in identities_like(connection, node, ek).await? {
        end_sessions(connection, &identity.node).await?;
    }
    sqlx::query("DELETE FROM identities WHERE node = $1 OR ek_sha256 = $2")
        .bind(node.as_str())
        .bind(ek.as_str())
        .execute(&mut *connection)
        .await
        .map_err(query_failed("binding a node to another EK"))?;
    insert(connection, node, ek, Origin::Approved, Some(by), now_ms).await
}

async fn insert(
    connection: &mut AnyConnection,
    node: &NodeId,
    ek: &EkDigest,
    origin: Origin,
    by: Option<&str>,
    now_ms: i64,
) -> Result<(), DbError> {
    let sql = "INSERT INTO identities (node, ek_sha256, bound_at_ms, origin, bound_by) VALUES ($1, $2, $3, $4, $5) \
               ON CONFLICT DO NOTHING";
    sqlx::query(sql)
        .bind(node.as_str())
        .bind(ek.as_str())
        .bind(now_ms)
        .bind(origin.as_str())
        .bind(by.map(ToOwned::to_owned))
        .execute(connection)
        .await
        .map_err(query_failed("binding a node to an EK"))?;
    Ok(())
}

/// Ends the sessions of `node` that have no verdict yet.
async fn end_sessions(connection: &mut AnyConnection, node: &NodeId) -> Result<(), DbError> {
    sqlx::query("DELETE FROM sessions WHERE node = $1 AND state IN ('challenged', 'enrolled')")
        .bind(node.as_str())
        .execute(connection)
        .await
        .map_err(query_failed("ending a node's sessions"))?;
    Ok(())
}

async fn identities_like(
    connection: &mut AnyConnection,
    node: &NodeId,
    ek: &EkDigest,
) -> Result<Vec<Identity>, DbError> {
    let rows: Vec<IdentityRow> = sqlx::query_as(concat!(select!(), " WHERE node = $1 OR ek_sha256 = $2 ORDER BY node"))
        .bind(node.as_str())
        .bind(ek.as_str())
        .fetch_all(connection)
        .await
        .map_err(query_failed("looking up a node's identity"))?;
    rows.into_iter().map(Identity::try_from).collect()
}

#[derive(sqlx::FromRow)]
struct IdentityRow {
    node: String,
    ek_sha256: String,
    bound_at_ms: i64,
    origin: String,
    bound_by: Option<String>,
    seen_at_ms: Option<i64>,
}

#[derive(sqlx::FromRow)]
struct CountsRow {
    last_clock: Option<String>,
    last_boot: Option<String>,
    last_machine_resets: Option<i64>,
    first_clock: Option<String>,
    previous_clock: Option<String>,
    previous_boot: Option<String>,
    previous_machine_resets: Option<i64>,
}

impl TryFrom<IdentityRow> for Identity {
    type Error = DbError;
    fn try_from(row: IdentityRow) -> Result<Self, DbError> {
        Ok(Self {
            node: parsed("a node name", &row.node)?,
            ek_sha256: row.ek_sha256,
            bound_at_ms: row.bound_at_ms,
            origin: parsed("an identity's origin", &row.origin)?,
            bound_by: row.bound_by,
            seen_at_ms: row.seen_at_ms,
        })
    }
}
