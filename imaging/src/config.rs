//! Imaging's configuration: the file as written, and what it means once checked.

use assay_rbd::name::{CephUser, PoolName};
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
    /// The folder of golden images and clones; with [`Config::ceph`], of the golden images that were read on this host. Uploads
    /// and what is being worked on are below it either way.
    pub store: PathBuf,
    /// Where images and disks are, if not in [`Config::store`].
    pub ceph: Option<CephConfig>,
    /// Where the key is that CHAP secrets are stored under; made where missing.
    pub key_file: PathBuf,
    /// Images are imported from beneath these folders only; none means none.
    pub import_folders: Vec<PathBuf>,
    /// Whose attestation results make an export.
    pub agreement: Agreement,
    /// How long an upload is kept that nobody goes on with.
    pub upload_age: Duration,
    /// The longest that a renewal keeps an export standing, from when it is made.
    pub longest_renewal: Duration,
}

/// The table `[ceph]`: images and disks are in a pool of a Ceph cluster, in a namespace per project.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CephConfig {
    /// The monitors, by their messenger v2 addresses, like `10.0.0.1:3300`.
    pub monitors: Vec<SocketAddr>,
    /// As whom imaging connects, without `client.`: somebody who may do everything in the pool, make and remove users, and
    /// put clients on the blocklist.
    pub user: CephUser,
    /// Where that user's key is, alone, as `ceph auth print-key` prints it.
    pub key_file: PathBuf,
    /// The pool, which must be there. All that is in its namespaces by names of imaging's is imaging's.
    pub pool: PoolName,
    /// The Unix socket on which gateways ask for processes that serve disks on Ceph; imaging makes it, and starts them.
    /// Without it, somebody else must (a socket unit of systemd's with `Accept=yes`).
    #[serde(default)]
    pub rbd_disks_socket: Option<PathBuf>,
}

impl CephConfig {
    fn check(&self) -> Result<(), ConfigError> {
        if self.monitors.is_empty() {
            return Err(ConfigError::invalid("ceph.monitors", "none is given"));
        }
        for (field, path) in
            [("ceph.key_file", Some(&self.key_file)), ("ceph.rbd_disks_socket", self.rbd_disks_socket.as_ref())]
        {
            if let Some(relative) = path.filter(|path| !path.is_absolute()) {
                return Err(ConfigError::invalid(field, format!("`{}` is not absolute", relative.display())));
            }
        }
        Ok(())
    }
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: SocketAddr,
    database: String,
    store: PathBuf,
    #[serde(default)]
    ceph: Option<CephConfig>,
    key_file: PathBuf,
    #[serde(default)]
    import_folders: Vec<PathBuf>,
    #[serde(default)]
    agreement: Agreement,
    #[serde(default = "default_upload_age_seconds")]
    upload_age_seconds: u32,
    #[serde(default = "default_longest_renewal_seconds")]
    longest_renewal_seconds: u32,
}

impl TryFrom<File> for Config {
    type Error = ConfigError;

    fn try_from(file: File) -> Result<Self, ConfigError> {
        let File {
            listen,
            database,
            store,
            ceph,
            key_file,
            import_folders,
            agreement,
            upload_age_seconds,
            longest_renewal_seconds,
        } = file;
        if let Some(relative) = import_folders.iter().find(|folder| !folder.is_absolute()) {
            return Err(ConfigError::invalid("import_folders", format!("`{}` is not absolute", relative.display())));
        }
        if !["sqlite:", "postgres:", "postgresql:"].iter().any(|scheme| database.starts_with(scheme)) {
            return Err(ConfigError::invalid("database", "not a sqlite: or postgres: URL"));
        }
        if longest_renewal_seconds == 0 {
            return Err(ConfigError::invalid("longest_renewal_seconds", "must be at least 1"));
        }
        if upload_age_seconds == 0 {
            return Err(ConfigError::invalid("upload_age_seconds", "must be at least 1"));
        }
        ceph.as_ref().map_or(Ok(()), CephConfig::check)?;
        let upload_age = Duration::from_secs(upload_age_seconds.into());
        let longest_renewal = Duration::from_secs(longest_renewal_seconds.into());
        Ok(Self { listen, database, store, ceph, key_file, import_folders, agreement, upload_age, longest_renewal })
    }
}

fn default_upload_age_seconds() -> u32 {
    7 * 24 * 60 * 60
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

    const CEPH: &str = "[ceph]\nmonitors = [\"10.0.0.1:3300\", \"[fd00::2]:3300\"]\nuser = \"imaging\"\n\
                        key_file = \"/x/ceph.key\"\npool = \"images\"\n";

    #[test]
    fn a_ceph_store_is_asked_for_by_its_table() {
        assert_eq!(parse(GOOD).unwrap().ceph, None);
        let ceph = parse(&format!("{GOOD}{CEPH}rbd_disks_socket = \"/x/disks.sock\"\n")).unwrap().ceph.unwrap();
        assert_eq!((ceph.monitors.len(), ceph.pool.as_str(), ceph.user.as_str()), (2, "images", "imaging"));
        assert_eq!(ceph.rbd_disks_socket, Some("/x/disks.sock".into()));
        for (from, to, named) in [
            ("\"10.0.0.1:3300\", \"[fd00::2]:3300\"", "", "`ceph.monitors`: none is given"),
            ("10.0.0.1:3300", "ceph.example:3300", "monitors"),
            ("/x/ceph.key", "ceph.key", "`ceph.key_file`: `ceph.key` is not absolute"),
            ("user = \"imaging\"", "user = \"a b\"", "cephx user"),
            ("pool = \"images\"", "pool = \"a/b\"", "pool name"),
            ("pool = \"images\"", "", "pool"),
            ("pool = \"images\"", "pool = \"images\"\ncolour = 1", "colour"),
        ] {
            let error = parse(&format!("{GOOD}{}", CEPH.replacen(from, to, 1))).unwrap_err();
            assert!(error.to_string().contains(named), "{named}: {error}");
        }
    }

    #[test]
    fn unknown_fields_and_databases_are_refused() {
        assert!(parse(&format!("{GOOD}colour = 1\n")).is_err());
        assert!(parse(&format!("{GOOD}longest_renewal_seconds = 0\n")).is_err());
        assert!(parse(&format!("{GOOD}upload_age_seconds = 0\n")).is_err());
        assert_eq!(parse(GOOD).unwrap().upload_age.as_secs(), 604_800);
        assert!(parse(&format!("{GOOD}agreement = {{ require = \"provider\" }}\n")).is_err());
        assert!(parse(&GOOD.replace("sqlite:", "mysql:")).is_err());
    }
}
