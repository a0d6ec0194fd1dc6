//! A real Open vSwitch, userspace datapath, two plain processes in a private directory: for tests and the lab.
//!
//! Everything is created below the directory given, nothing touches a system-wide Open vSwitch, and both daemons are
//! killed when the handle is dropped.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A running Open vSwitch.
#[derive(Debug)]
pub struct OpenVswitch {
    directory: PathBuf,
    // Dropped in this order: the switch goes before its database.
    vswitchd: Daemon,
    _ovsdb: Daemon,
}

/// Where `ovs-vswitchd`, and with it every port, lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespace {
    /// The caller's network namespace. Bridges become devices there, and outlive a killed switch.
    Current,
    /// One made by `ip netns add`.
    Named(String),
    /// The network (and user) namespace of a process, entered with `nsenter`; works without root.
    OfProcess {
        /// The process.
        pid: u32,
        /// Whether to enter its user namespace as well.
        user: bool,
    },
}

/// Why Open vSwitch did not start, or a command failed.
#[derive(Debug, thiserror::Error)]
pub enum TestingError {
    /// The program could not be run: is the Debian package `openvswitch-switch` installed?
    #[error("running `{command}`")]
    Run {
        /// The command line.
        command: String,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// It ran and failed.
    #[error("`{command}` failed: {output}")]
    Failed {
        /// The command line.
        command: String,
        /// What it printed.
        output: String,
    },
    /// A daemon left no usable pid file.
    #[error("reading {}", .path.display())]
    PidFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
}

impl OpenVswitch {
    /// Starts in the caller's network namespace; see [`OpenVswitch::start_in`].
    ///
    /// # Errors
    /// See [`TestingError`].
    pub fn start(directory: &Path) -> Result<Self, TestingError> {
        Self::start_in(directory, &Namespace::Current)
    }

    /// Starts `ovsdb-server` and `ovs-vswitchd` with everything in `directory`, which must exist and be empty. Both
    /// have bound their sockets when this returns (about 40 ms).
    ///
    /// # Errors
    /// See [`TestingError`]. What was started is killed.
    pub fn start_in(directory: &Path, namespace: &Namespace) -> Result<Self, TestingError> {
        let at = |name: &str| directory.join(name).display().to_string();
        let schema = "/usr/share/openvswitch/vswitch.ovsschema";
        run(directory, &["ovsdb-tool", "create", &at("conf.db"), schema])?;
        run(
            directory,
            &[
                "ovsdb-server",
                &at("conf.db"),
                &format!("--remote=punix:{}", at("db.sock")),
                &format!("--unixctl={}", at("ovsdb.ctl")),
                &format!("--pidfile={}", at("ovsdb.pid")),
                &format!("--log-file={}", at("ovsdb.log")),
                "--detach",
                "--no-chdir",
                "-vconsole:off",
            ],
        )?;
        let ovsdb = Daemon::from_pid_file(&directory.join("ovsdb.pid"), "ovsdb-server")?;
        let db = format!("unix:{}", at("db.sock"));
        // A slow revalidator stretches the tail of `revalidator/wait` to half a second.
        run(
            directory,
            &[
                "ovs-vsctl",
                &format!("--db={db}"),
                "--no-wait",
                "init",
                "--",
                "set",
                "Open_vSwitch",
                ".",
                "other_config:max-revalidator=100",
            ],
        )?;
        let mut command = namespace.prefix();
        command.extend([
            "ovs-vswitchd".to_owned(),
            db,
            format!("--unixctl={}", at("vswitchd.ctl")),
            format!("--pidfile={}", at("vswitchd.pid")),
            format!("--log-file={}", at("vswitchd.log")),
            "--detach".to_owned(),
            "--no-chdir".to_owned(),
            "-vconsole:off".to_owned(),
        ]);
        run(directory, &command)?;
        let vswitchd = Daemon::from_pid_file(&directory.join("vswitchd.pid"), "ovs-vswitchd")?;
        Ok(Self { directory: directory.to_owned(), vswitchd, _ovsdb: ovsdb })
    }

    /// `ovsdb-server`'s socket.
    #[must_use]
    pub fn ovsdb_socket(&self) -> PathBuf {
        self.directory.join("db.sock")
    }

    /// `ovs-vswitchd`'s control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.directory.join("vswitchd.ctl")
    }

    /// Adds a bridge with the userspace datapath.
    ///
    /// # Errors
    /// See [`TestingError`].
    pub fn add_bridge(&self, name: &str) -> Result<(), TestingError> {
        self.vsctl(&["add-br", name, "--", "set", "bridge", name, "datapath_type=netdev"])
    }

    /// Adds an existing network device as an access port of a VLAN, in one transaction: without its tag it would be a
    /// trunk of every VLAN for a moment.
    ///
    /// # Errors
    /// See [`TestingError`].
    pub fn add_port(&self, bridge: &str, port: &str, vlan: u16, protected: bool) -> Result<(), TestingError> {
        let (tag, protected) = (format!("tag={vlan}"), format!("protected={protected}"));
        self.vsctl(&["add-port", bridge, port, &tag, "vlan_mode=access", "--", "set", "port", port, &protected])
    }

    /// Runs `ovs-vsctl` with these arguments and waits until the switch has done it.
    ///
    /// # Errors
    /// See [`TestingError`].
    pub fn vsctl(&self, arguments: &[&str]) -> Result<(), TestingError> {
        let db = format!("--db=unix:{}", self.ovsdb_socket().display());
        let mut command = vec!["ovs-vsctl", &db, "--timeout=10"];
        command.extend(arguments);
        run(&self.directory, &command)
    }

    /// Stops `ovs-vswitchd` in its tracks (SIGSTOP): a switch that accepts connections and does not answer.
    pub fn freeze(&self) {
        self.vswitchd.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.vswitchd.signal(Signal::SIGCONT);
    }
}

/// A network namespace for one test, deleted when dropped: a bridge is also a device of its name, and two tests'
/// bridges must not meet. Needs root.
#[derive(Debug)]
pub struct ScratchNamespace {
    name: String,
}

impl ScratchNamespace {
    /// Adds a namespace with a name of its own, loopback up.
    ///
    /// # Errors
    /// See [`TestingError`].
    pub fn new() -> Result<Self, TestingError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("assay-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let scratch = std::env::temp_dir();
        run(&scratch, &["ip", "netns", "add", &name])?;
        let namespace = Self { name };
        run(&scratch, &["ip", "-n", &namespace.name, "link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, as `ip -n` takes it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// For [`OpenVswitch::start_in`].
    #[must_use]
    pub fn namespace(&self) -> Namespace {
        Namespace::Named(self.name.clone())
    }
}

impl Drop for ScratchNamespace {
    fn drop(&mut self) {
        // What is left shows in `ip netns`; a failing test must not fail twice.
        let _ = run(&std::env::temp_dir(), &["ip", "netns", "delete", &self.name]);
    }
}

impl Namespace {
    fn prefix(&self) -> Vec<String> {
        match self {
            Self::Current => Vec::new(),
            Self::Named(name) => ["ip", "netns", "exec", name].map(str::to_owned).to_vec(),
            Self::OfProcess { pid, user } => {
                let mut prefix = vec!["nsenter".to_owned(), format!("--target={pid}"), "--net".to_owned()];
                if *user {
                    prefix.extend(["--user".to_owned(), "--preserve-credentials".to_owned()]);
                }
                prefix
            }
        }
    }
}

/// A detached process, known by its pid file.
#[derive(Debug)]
struct Daemon {
    pid: i32,
    program: &'static str,
}

impl Daemon {
    fn from_pid_file(path: &Path, program: &'static str) -> Result<Self, TestingError> {
        let unusable = |cause| TestingError::PidFile { path: path.to_owned(), cause };
        let text = std::fs::read_to_string(path).map_err(unusable)?;
        let pid = text.trim().parse().map_err(|e| unusable(std::io::Error::other(e)))?;
        Ok(Self { pid, program })
    }

    /// Signals the process, unless its number has been given to another program since.
    fn signal(&self, signal: Signal) {
        if self.is_running() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Whether the process exists, is still our program, and is more than a zombie that nobody has reaped.
    fn is_running(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.split_once(") ")
            .is_some_and(|(head, state)| head.ends_with(self.program) && !state.starts_with(['Z', 'X']))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        // Not our child, so it cannot be waited for; it is gone within microseconds of being scheduled.
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.is_running() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

/// Runs a program to its end; its output is in the error, if it fails.
fn run<S: AsRef<OsStr>>(directory: &Path, command: &[S]) -> Result<(), TestingError> {
    let words = || command.iter().map(|w| w.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ");
    // Output goes to a file, not to a pipe: a daemon would hold a pipe open and we would wait for its end.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let log = directory.join(format!("assay-command-{}-{number}.log", std::process::id()));
    let cannot_run = |cause| TestingError::Run { command: words(), cause };
    let output = std::fs::File::create(&log).map_err(cannot_run)?;
    let [program, arguments @ ..] = command else {
        return Ok(());
    };
    let status = Command::new(program)
        .args(arguments)
        .envs(["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"].map(|name| (name, directory)))
        .stdin(Stdio::null())
        .stdout(output.try_clone().map_err(cannot_run)?)
        .stderr(output)
        .status()
        .map_err(cannot_run)?;
    let output = std::fs::read_to_string(&log).unwrap_or_default();
    let _ = std::fs::remove_file(&log);
    if status.success() {
        return Ok(());
    }
    Err(TestingError::Failed { command: words(), output: output.trim().to_owned() })
}
