//! Folders of a store on this host: one process has them, and what is in them is published by renaming.

use super::StoreError;
use super::file::sync_folder;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::Path;
use std::str::FromStr;

/// Locks a store's folder for this process, as long as the file is open.
///
/// # Errors
/// Another process has it.
pub(super) fn lock(root: &Path) -> Result<File, StoreError> {
    let path = root.join("lock");
    let opened = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
    let lock = opened.map_err(|source| StoreError::io("opening", &path, source))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path: root.to_owned() }),
        Err(TryLockError::Error(source)) => Err(StoreError::io("locking", &path, source)),
    }
}

/// The names of what is in a folder.
pub(super) fn names(folder: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |source| StoreError::io("listing", folder, source);
    let entries = std::fs::read_dir(folder).map_err(failed)?;
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
    names.collect::<Result<_, _>>().map_err(failed)
}

/// What a folder has whose names are ids and `ending`.
pub(super) fn list<T: FromStr>(folder: &Path, ending: &str) -> Result<Vec<T>, StoreError> {
    Ok(names(folder)?.iter().filter_map(|name| name.strip_suffix(ending)?.parse().ok()).collect())
}

/// Makes the entries of a folder durable.
pub(super) fn sync(folder: &Path) -> Result<(), StoreError> {
    sync_folder(folder).map_err(|source| StoreError::io("syncing", folder, source))
}

/// Removes a folder, if it is there.
pub(super) fn remove_folder(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_dir_all(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(StoreError::io("removing", path, source)),
        Ok(()) | Err(_) => Ok(()),
    }
}
