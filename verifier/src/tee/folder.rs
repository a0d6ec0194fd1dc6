//! Collateral as an operator keeps it: a folder of `.json` files. The one file here that reads any.

use super::quote::{Collateral, CollateralError, MAX_COLLATERAL_BYTES};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Why a folder of collateral is of no use.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The folder, or a file in it, cannot be read.
    #[error("reading TEE collateral {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file holds something else.
    #[error(transparent)]
    Collateral(#[from] CollateralError),
}

/// Reads every `.json` file of a folder, in the order of their names.
///
/// # Errors
/// See [`FolderError`].
pub fn read_folder(folder: &Path) -> Result<Collateral, FolderError> {
    let failed = |source| FolderError::Io { path: folder.to_owned(), source };
    let mut texts = Vec::new();
    for file in std::fs::read_dir(folder).map_err(failed)? {
        let path = file.map_err(failed)?.path();
        if path.extension().is_some_and(|ending| ending == "json") {
            let text = read(&path).map_err(|source| FolderError::Io { path: path.clone(), source })?;
            texts.push((path.display().to_string(), text));
        }
    }
    texts.sort();
    let files = texts.iter().map(|(path, text)| (path.as_str(), text.as_str()));
    Ok(Collateral::from_files(files)?)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    // One octet more than is allowed is enough to be refused.
    File::open(path)?.take(MAX_COLLATERAL_BYTES as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}
