//! Imaging's configuration: the file as written, and what it means once checked.

use assay_service::config::ConfigError;
use assay_wire::agreement::Agreement;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Checked configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "File")]
pub struct Config {
    /// Where the HTTPS API listens.
    pub listen: SocketAddr,
    /// The database, like `sqlite:/var/lib/assay/imaging.db`.
    pub database: String,
    /// The folder of golden images and clones.
    pub store: PathBuf,
    /// Where the key is that CHAP secrets are stored under; made where missing.
    pub key_file: PathBuf,
    /// Images are imported from beneath these folders only; none means none.
    pub import_folders: Vec<PathBuf>,
    /// Whose attestation results make an export.
    pub agreement: Agreement,
    /// The longest that a renewal keeps an export standing, from when it is made.
    pub longest_renewal: Duration,
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: SocketAddr,
    database: String,
    store: PathBuf,
    key_file: PathBuf,
    #[serde(default)]
    import_folders: Vec<PathBuf>,
    #[serde(default)]
    agreement: Agreement,
    #[serde(default = "default_longest_renewal_seconds")]
    longest_renewal_seconds: u32,
}

impl TryFrom<File> for Config {
    type Error = ConfigError;

    fn try_from(file: File) -> Result<Self, ConfigError> {
        let File { listen, database, store, key_file, import_folders, agreement, longest_renewal_seconds } = file;
        if let Some(relative) = import_folders.iter().find(|folder| !folder.is_absolute()) {
            return Err(ConfigError::invalid("import_folders", format!("`{}` is not absolute", relative.display())));
        }
        if !["sqlite:", "postgres:", "postgresql:"].iter().any(|scheme| database.starts_with(scheme)) {
            return Err(ConfigError::invalid("database", "not a sqlite: or postgres: URL"));
        }
        if longest_renewal_seconds == 0 {
            return Err(ConfigError::invalid("longest_renewal_seconds", "must be at least 1"));
        }
        let longest_renewal = Duration::from_secs(longest_renewal_seconds.into());
        Ok(Self { listen, database, store, key_file, import_folders, agreement, longest_renewal })
    }
}

fn default_longest_renewal_seconds() -> u32 {
    3600
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, toml::de::Error> {
        toml::from_str(text)
    }

    const GOOD: &str = "listen = \"127.0.0.1:8444\"\ndatabase = \"sqlite:/x/imaging.db\"\nstore = \"/x/store\"\n\
                        key_file = \"/x/imaging.key\"\n";

    #[test]
    fn import_folders_default_to_none_and_are_absolute() {
        assert!(parse(GOOD).unwrap().import_folders.is_empty());
        let error = parse(&format!("{GOOD}import_folders = [\"images\"]\n")).unwrap_err();
        assert!(
            error.to_string().contains("configuration field `import_folders`: `images` is not absolute"),
            "{error}"
        );
    }

    #[test]
    fn unknown_fields_and_databases_are_refused() {
        assert!(parse(&format!("{GOOD}colour = 1\n")).is_err());
        assert!(parse(&format!("{GOOD}longest_renewal_seconds = 0\n")).is_err());
        assert!(parse(&format!("{GOOD}agreement = {{ require = \"provider\" }}\n")).is_err());
        assert!(parse(&GOOD.replace("sqlite:", "mysql:")).is_err());
    }
}
