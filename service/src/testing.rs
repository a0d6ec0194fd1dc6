//! Databases for tests, never in a shipped build: a SQLite file, or a database on a PostgreSQL server of the test
//! process's own.
//!
//! `ASSAY_TEST_DATABASE` says which of the two [`TestDatabase::new`] gives, so that one suite runs on both: `sqlite` (the
//! default) or `postgresql`. The server is Debian's package `postgresql`. Where it is not installed, tests that ask for it
//! by name are skipped with a message; with `CI` set, or when `ASSAY_TEST_DATABASE` asks for it, they fail instead.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's helper may panic as the test does")]

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// An empty database of its own.
#[derive(Debug)]
pub struct TestDatabase {
    url: String,
    /// Holds the SQLite file; gone with the test.
    _folder: Option<TempDir>,
}

impl TestDatabase {
    /// On the server that `ASSAY_TEST_DATABASE` names.
    ///
    /// # Panics
    /// There is none of that name, or it does not start.
    #[must_use]
    pub fn new() -> Self {
        match std::env::var(WHICH).as_deref() {
            Err(_) | Ok("sqlite") => Self::sqlite(),
            Ok("postgresql") => Self::postgresql().expect("ASSAY_TEST_DATABASE asks for PostgreSQL"),
            Ok(other) => panic!("{WHICH} is `{other}`, but only `sqlite` and `postgresql` are known"),
        }
    }

    /// A SQLite file.
    ///
    /// # Panics
    /// There is no folder to be had.
    #[must_use]
    pub fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { url: format!("sqlite:{}", folder.path().join("test.db").display()), _folder: Some(folder) }
    }

    /// A database on this process's PostgreSQL server, which the first call starts. None, with a message, where no server
    /// is installed.
    ///
    /// # Panics
    /// No server is installed although one is required, or it does not start.
    #[must_use]
    pub fn postgresql() -> Option<Self> {
        static SERVER: OnceLock<Option<Server>> = OnceLock::new();
        if let Some(server) = SERVER.get_or_init(Server::start) {
            return Some(Self { url: server.create_database(), _folder: None });
        }
        let required = std::env::var_os("CI").is_some() || std::env::var(WHICH).is_ok_and(|which| which != "sqlite");
        assert!(!required, "no PostgreSQL server below {SERVERS}: install Debian's package postgresql");
        #[expect(clippy::print_stdout, reason = "tests say what they skip")]
        {
            println!("skipped: no PostgreSQL server below {SERVERS} (Debian package postgresql)");
        }
        None
    }

    /// What a service's `database` setting must say.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Default for TestDatabase {
    fn default() -> Self {
        Self::new()
    }
}

/// What the `database` setting of a service under test must say: a database on the server that `ASSAY_TEST_DATABASE`
/// names, the same one for the same folder and name, so that a service can be started again on it.
///
/// # Panics
/// See [`TestDatabase::new`].
#[must_use]
pub fn database_in(folder: &Path, name: &str) -> String {
    if std::env::var(WHICH).map_or(true, |which| which == "sqlite") {
        return format!("sqlite:{}", folder.join(format!("{name}.db")).display());
    }
    let remembered = folder.join(format!("{name}.url"));
    std::fs::read_to_string(&remembered).unwrap_or_else(|_| {
        let database = TestDatabase::new();
        std::fs::write(&remembered, database.url()).unwrap();
        database.url().to_owned()
    })
}

/// A PostgreSQL server on a Unix socket, which dies with this process.
#[derive(Debug)]
struct Server {
    folder: PathBuf,
    programs: PathBuf,
    /// Holds the pipe that the server lives by.
    _keeper: Child,
    databases: AtomicU32,
}

impl Server {
    fn start() -> Option<Self> {
        let versions = std::fs::read_dir(SERVERS).ok()?.flatten();
        let programs = versions.map(|version| version.path().join("bin")).find(|bin| bin.join("initdb").exists())?;
        let folder = tempfile::Builder::new().prefix("assay-postgresql-").tempdir().unwrap();
        // The server refuses to run as root.
        let as_root = std::fs::metadata(folder.path()).unwrap().uid() == 0;
        if as_root {
            assert!(Command::new("chown").arg("postgres:").arg(folder.path()).status().unwrap().success());
        }
        let mut initdb = Command::new("env");
        initdb.args(as_user(as_root)).arg(programs.join("initdb")).arg("-D").arg(folder.path().join("data"));
        initdb.args(["-A", "trust", "-U", "assay", "-E", "UTF8", "--locale=C", "--no-sync"]);
        let made = initdb.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(made.success(), "initdb failed: {made}");
        // A shell that ends the server, and removes its folder, when this process is gone in whatever way: then its
        // standard input ends.
        let mut server = Command::new("sh");
        server.args(["-c", KEEPER, "keeper"]).arg(folder.path());
        server.args(as_user(as_root)).arg(programs.join("postgres")).arg("-D").arg(folder.path().join("data"));
        server.args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=300", "-k"]);
        server.arg(folder.path()).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let keeper = server.spawn().unwrap();
        // The folder is the shell's to remove.
        let folder = folder.keep();
        Some(Self { folder, programs, _keeper: keeper, databases: AtomicU32::new(0) })
    }

    fn create_database(&self) -> String {
        let name = format!("case{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let deadline = Instant::now() + START_LIMIT;
        let created = || {
            let mut createdb = Command::new(self.programs.join("createdb"));
            createdb.args(["-U", "assay", "-h"]).arg(&self.folder).arg(&name).stderr(Stdio::null());
            createdb.status().unwrap().success()
        };
        while !created() {
            assert!(Instant::now() < deadline, "PostgreSQL did not answer in {START_LIMIT:?}");
        }
        format!("postgres://assay@localhost/{name}?host={}", self.folder.display())
    }
}

/// What goes before a program that must not run as root.
fn as_user(as_root: bool) -> &'static [&'static str] {
    if as_root { &["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] } else { &[] }
}

const WHICH: &str = "ASSAY_TEST_DATABASE";
const SERVERS: &str = "/usr/lib/postgresql";
const START_LIMIT: Duration = Duration::from_secs(60);
/// `$1` is the folder, the others are the server's command line.
const KEEPER: &str = r#"folder=$1; shift; "$@" & cat >/dev/null; kill -QUIT $!; wait; rm -rf "$folder""#;
