//! Who may open a disk: its keys, which are written down before they are made.

use super::lineage::{check_size, scopes};
use super::{RbdStore, namespace_of, notes};
use crate::keys::{self, Scope};
use crate::name::{CephKey, CephUser, ImageName};
use crate::{Pool, RbdError};

/// The object, in each namespace, that says which users have keys to which disks: a line each. No such key reaches it.
const KEYS: &str = "assay.keys";

/// What a disk's export needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// What its key is cut to.
    pub scope: Scope,
    /// The golden image at the bottom, the last of the scope's.
    pub golden: ImageName,
    /// Size of the disk.
    pub byte_len: u64,
}

impl RbdStore {
    /// What a disk's export needs.
    ///
    /// # Errors
    /// It is not there, its header names a parent that is not its own, or none, or a size that is not its parent's; or Ceph
    /// refuses.
    pub fn access(&self, disk: ImageName) -> Result<Access, RbdError> {
        let pool = self.place(disk)?;
        let open = pool.open_read_only(disk, None)?;
        let layers = self.layers(&open)?;
        let Some(golden) = layers.last().map(|lowest| lowest.name) else {
            let detail = "is a disk, and a clone of nothing".to_owned();
            return Err(RbdError::Malformed { object: open.path().to_owned(), detail });
        };
        check_size(&open, layers.last().map(|lowest| &**lowest))?;
        let scope = Scope {
            pool: self.pool.clone(),
            namespace: namespace_of(&pool)?,
            image: disk,
            id: open.id()?,
            golden: scopes(&layers),
        };
        Ok(Access { scope, golden, byte_len: open.byte_len() })
    }

    /// Makes a key for a disk, which `user` has then. Asked again for the same user, the same key.
    ///
    /// # Errors
    /// As [`RbdStore::access`], or no monitor answers.
    pub fn issue(&self, disk: ImageName, user: &CephUser) -> Result<(CephKey, Access), RbdError> {
        let (pool, access) = (self.place(disk)?, self.access(disk)?);
        // Written down first: nobody snapshots a disk that somebody may have a key for.
        let line = key_line(disk, user);
        self.change_note(&pool, KEYS, |lines| {
            if !lines.contains(&line) {
                lines.push(line);
            }
        })?;
        Ok((keys::issue(&self.cluster, user, &access.scope)?, access))
    }

    /// Ends a user's key for a disk, and stops whoever uses it: see [`keys::revoke`]. Doing it again changes nothing.
    ///
    /// # Errors
    /// Monitors or OSDs do not answer; do it again then.
    pub fn revoke(&self, disk: ImageName, user: &CephUser) -> Result<(), RbdError> {
        match self.place(disk) {
            Ok(pool) => {
                keys::revoke(&self.cluster, user, &pool, disk)?;
                self.change_note(&pool, KEYS, |lines| lines.retain(|line| *line != key_line(disk, user)))
            }
            // The key may have outlived its disk.
            Err(_) => keys::revoke(&self.cluster, user, &self.cluster.pool(&self.pool)?, disk).map(drop),
        }
    }

    /// Who may have keys to a disk.
    pub(super) fn users(&self, pool: &Pool, disk: ImageName) -> Result<Vec<CephUser>, RbdError> {
        let user = |line: &String| {
            let (of, user) = line.split_once(' ')?;
            if ImageName::parse(of) == Some(disk) { CephUser::new(user).ok() } else { None }
        };
        Ok(notes::lines(pool, KEYS)?.iter().filter_map(user).collect())
    }

    pub(super) fn without_keys(&self, pool: &Pool, disk: ImageName) -> Result<(), RbdError> {
        let users = self.users(pool, disk)?;
        if users.is_empty() {
            return Ok(());
        }
        let clients = users.iter().map(|user| format!("whoever has the key of {}", user.entity())).collect();
        Err(RbdError::InUse { object: pool.path(disk), clients })
    }
}

/// A line of [`KEYS`].
fn key_line(disk: ImageName, user: &CephUser) -> String {
    format!("{disk} {user}")
}
