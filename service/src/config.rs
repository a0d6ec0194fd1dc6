//! Configuration files: TOML, read whole, every error naming the file and the place in it.

use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Why a configuration is not used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("reading the configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or has a field that is unknown, missing or of another type.
    #[error("parsing the configuration file {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// It parses, but says something impossible.
    #[error("configuration field `{field}`: {problem}")]
    Invalid {
        /// The field, dotted.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl ConfigError {
    /// A field that says something impossible.
    pub fn invalid(field: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        Self::Invalid { field: field.into(), problem: problem.to_string() }
    }
}

/// Reads `path` as a `T` (a service's private file type with `deny_unknown_fields`).
///
/// # Errors
/// See [`ConfigError`].
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
}
