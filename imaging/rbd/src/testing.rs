//! A real Ceph for tests and the lab: one monitor and one OSD, or more of them, plain processes of whatever user runs them,
//! in a folder of their own, on free ports of the loopback interface. Never in a shipped build.
//!
//! They die with the process that started them, however that ends: a shell holds them, and its standard input is a pipe
//! from us. After a failed test the folder with their logs stays, and the test says where.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's set-up may panic as the test does")]

use crate::keys::{Capabilities, Release, control_capabilities};
use crate::name::{CephKey, CephUser, Namespace, PoolName};
use crate::{Cluster, Connection, Patience, Pool, RbdError};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde_json::json;
use std::fmt::{self, Write as _};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where the OSD keeps its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectStore {
    /// In memory: starts at once, and forgets everything when the OSD is killed.
    Memory,
    /// In a sparse file: what was acknowledged is there when the OSD starts again.
    Bluestore,
}

/// What a cluster is made of.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Where the OSDs keep their data.
    pub store: ObjectStore,
    /// How many monitors: some, and no more than a dozen.
    pub monitors: u8,
    /// How many OSDs. An object is on one of them.
    pub osds: u8,
    /// The loopback address that all listen on.
    pub address: IpAddr,
}

impl Shape {
    /// One monitor, one OSD.
    #[must_use]
    pub fn single(store: ObjectStore) -> Self {
        Self { store, monitors: 1, osds: 1, address: Ipv4Addr::LOCALHOST.into() }
    }
}

/// One of a cluster's processes, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// A monitor.
    Monitor(u8),
    /// An OSD.
    Osd(u8),
}

impl fmt::Display for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Monitor(number) => write!(f, "mon.{}", char::from(b'a' + number)),
            Self::Osd(number) => write!(f, "osd.{number}"),
        }
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Ceph {
    folder: PathBuf,
    keeper: Child,
    answers: BufReader<ChildStdout>,
    monitors: Vec<SocketAddr>,
    key: CephKey,
    namespaces: AtomicU32,
}

impl Ceph {
    /// A cluster of the caller's own, of one monitor and one OSD: see [`Ceph::of`].
    ///
    /// # Panics
    /// See [`Ceph::of`].
    #[must_use]
    pub fn start(store: ObjectStore) -> Self {
        Self::of(Shape::single(store))
    }

    /// A cluster of the caller's own, ready for use: with a pool for RBD images.
    ///
    /// # Panics
    /// It does not start: Debian's packages `ceph-mon`, `ceph-osd` and `ceph-common` are needed.
    #[must_use]
    pub fn of(shape: Shape) -> Self {
        let folder = tempfile::Builder::new().prefix("assay-ceph-").tempdir().unwrap();
        // All are bound before one is given up: they differ.
        let bound: Vec<_> = (0..shape.monitors).map(|_| TcpListener::bind((shape.address, 0)).unwrap()).collect();
        let monitors: Vec<SocketAddr> = bound.iter().map(|listener| listener.local_addr().unwrap()).collect();
        drop(bound);
        let key = make_folder(folder.path(), shape, &monitors);
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let answers = BufReader::new(keeper.stdout.take().unwrap());
        // The folder is the shell's to remove.
        let folder = folder.keep();
        let mut ceph = Self { folder, keeper, answers, monitors, key, namespaces: AtomicU32::new(0) };
        for number in 0..shape.monitors {
            ceph.order("start", Daemon::Monitor(number));
        }
        let cluster = ceph.admin_patiently();
        for number in 0..shape.osds {
            let (osd, uuid) = (number.to_string(), random_uuid());
            let (conf, output) = (ceph.path("ceph.conf"), ceph.path(&format!("{}-mkfs.out", Daemon::Osd(number))));
            run(&["ceph-osd", "-i", &osd, "--mkfs", "--no-mon-config", "--osd-uuid", &uuid, "-c", &conf], &output);
            cluster.mon_command(&json!({"prefix": "osd new", "uuid": uuid})).unwrap();
            ceph.start_daemon(Daemon::Osd(number));
        }
        // Without it librbd makes clones of the first version.
        let mimic = json!({"prefix": "osd set-require-min-compat-client", "version": "mimic"});
        cluster.mon_command(&mimic).unwrap();
        ceph.create_pool(&cluster, &ceph.pool_name());
        ceph
    }

    /// The cluster of this test process, in memory, which the first call starts.
    ///
    /// # Panics
    /// See [`Ceph::start`].
    #[must_use]
    pub fn shared() -> SharedCeph {
        static SHARED: OnceLock<Ceph> = OnceLock::new();
        SharedCeph(SHARED.get_or_init(|| Self::start(ObjectStore::Memory)))
    }

    /// Where it keeps everything.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its pool.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn pool_name(&self) -> PoolName {
        PoolName::new("images").unwrap()
    }

    /// Makes another pool for RBD images: for a store, which looks at everything in its pool.
    ///
    /// # Panics
    /// The cluster refuses.
    pub fn create_pool(&self, cluster: &Cluster, pool: &PoolName) {
        let order = json!({"prefix": "osd pool create", "pool": pool.as_str(), "pg_num": 8, "pgp_num": 8});
        cluster.mon_command(&order).unwrap();
        cluster.wait_for_latest_map().unwrap();
        cluster.pool(pool).unwrap().init().unwrap();
    }

    /// How to connect as `user`.
    #[must_use]
    pub fn connection(&self, user: CephUser, key: CephKey) -> Connection {
        Connection { monitors: self.monitors.clone(), user, key, patience: Patience::CONTROL }
    }

    /// How to connect as the administrator.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn admin_connection(&self) -> Connection {
        self.connection(CephUser::new("admin").unwrap(), self.key.clone())
    }

    /// A connection of the administrator's.
    ///
    /// # Panics
    /// No monitor answers.
    #[must_use]
    pub fn admin(&self) -> Cluster {
        Cluster::connect(&self.admin_connection())
            .unwrap_or_else(|error| self.give_up("connecting", &format!("{error:?}")))
    }

    /// [`Ceph::admin`], once the monitors have chosen a leader: on a busy machine that takes several of them longer than
    /// anybody else is to wait.
    fn admin_patiently(&self) -> Cluster {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match Cluster::connect(&self.admin_connection()) {
                Ok(cluster) => return cluster,
                Err(error) if Instant::now() > deadline => self.give_up("connecting", &format!("{error:?}")),
                Err(_) => {}
            }
        }
    }

    /// How to connect as a user that has what imaging's needs for a store in `pool`, and no more.
    ///
    /// # Panics
    /// The cluster refuses.
    #[must_use]
    pub fn imaging_connection(&self, pool: &PoolName) -> Connection {
        let cluster = self.admin();
        let user = CephUser::new(&format!("imaging-{pool}")).unwrap();
        let Capabilities { mon, osd } = control_capabilities(Release::of(&cluster).unwrap(), pool);
        let caps = ["mon", &mon, "osd", &osd];
        let order = json!({"prefix": "auth get-or-create", "entity": user.entity(), "caps": caps, "format": "json"});
        let made = cluster.mon_query(&order).unwrap();
        self.connection(user, CephKey::new(made[0]["key"].as_str().unwrap()).unwrap())
    }

    /// A connection of [`Ceph::imaging_connection`]'s user.
    ///
    /// # Panics
    /// The cluster refuses.
    #[must_use]
    pub fn imaging(&self, pool: &PoolName) -> Cluster {
        Cluster::connect(&self.imaging_connection(pool)).unwrap()
    }

    /// A namespace that nobody else uses, with its pool as the administrator sees it.
    ///
    /// # Panics
    /// The cluster refuses.
    #[must_use]
    pub fn new_namespace(&self, cluster: &Cluster) -> (Namespace, Pool) {
        let number = self.namespaces.fetch_add(1, Ordering::Relaxed);
        let namespace = Namespace::new(&format!("project{number}")).unwrap();
        cluster.pool(&self.pool_name()).unwrap().create_namespace(&namespace).unwrap();
        let pool = cluster.namespace(&self.pool_name(), &namespace).unwrap();
        (namespace, pool)
    }

    /// Kills the first OSD.
    ///
    /// # Panics
    /// See [`Ceph::kill_daemon`].
    pub fn kill_osd(&mut self) {
        self.kill_daemon(Daemon::Osd(0));
    }

    /// Starts the first OSD.
    ///
    /// # Panics
    /// See [`Ceph::start_daemon`].
    pub fn start_osd(&mut self) {
        self.start_daemon(Daemon::Osd(0));
    }

    /// Kills one (SIGKILL). Requests that need it wait from then on.
    ///
    /// # Panics
    /// The shell that holds it is gone.
    pub fn kill_daemon(&mut self, daemon: Daemon) {
        self.order("kill", daemon);
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        assert_eq!(answer, "killed\n");
    }

    /// Starts one that does not run, and waits until it counts: until the monitors have the OSD in their map, or the monitor
    /// among themselves.
    ///
    /// # Panics
    /// It does not come.
    pub fn start_daemon(&mut self, daemon: Daemon) {
        let Daemon::Osd(number) = daemon else {
            self.order("start", daemon);
            return self.wait_for(daemon, |ceph| ceph.in_quorum(daemon));
        };
        let cluster = self.admin_patiently();
        let since = || {
            let map = cluster.mon_query(&json!({"prefix": "osd dump", "format": "json"}))?;
            let osd = map["osds"].as_array().into_iter().flatten().find(|osd| osd["osd"] == number);
            Ok::<_, RbdError>(osd.map_or(0, |osd| osd["up_from"].as_u64().unwrap_or(0)))
        };
        let before = since().unwrap();
        self.order("start", daemon);
        // A machine that is busy enough has a monitor that does not answer in time.
        self.wait_for(daemon, |_| since().is_ok_and(|since| since != before));
    }

    fn in_quorum(&self, monitor: Daemon) -> bool {
        let status = Cluster::connect(&self.admin_connection())
            .and_then(|cluster| cluster.mon_query(&json!({"prefix": "quorum_status", "format": "json"})));
        let Ok(status) = status else { return false };
        let mut quorum = status["quorum_names"].as_array().into_iter().flatten();
        quorum.any(|name| format!("mon.{}", name.as_str().unwrap_or_default()) == monitor.to_string())
    }

    fn wait_for(&self, daemon: Daemon, is_there: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + START_LIMIT;
        while !is_there(self) {
            if Instant::now() > deadline {
                self.give_up(&format!("waiting for {daemon}"), &"it did not come up");
            }
        }
    }

    fn order(&mut self, order: &str, daemon: Daemon) {
        let input = self.keeper.stdin.as_mut().unwrap();
        writeln!(input, "{order} {daemon}").unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn give_up(&self, doing: &str, why: &dyn std::fmt::Display) -> ! {
        let files = std::fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let outputs = files.filter(|path| path.extension().is_some_and(|extension| extension == "out"));
        let said: Vec<String> = outputs.filter_map(|path| std::fs::read_to_string(path).ok()).collect();
        panic!("Ceph in {}: {doing}: {why}\n{}", self.folder.display(), said.join("\n"));
    }

    fn keep_folder(&self) {
        // Written, not ordered: a shared cluster is not ours to change.
        let _ = std::fs::write(self.folder.join("keep"), "");
        eprintln!("Ceph's logs stay in {}", self.folder.display());
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep_folder();
        }
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// The test process's cluster; keeps its logs if the test that holds this fails.
#[derive(Debug)]
pub struct SharedCeph(&'static Ceph);

impl std::ops::Deref for SharedCeph {
    type Target = Ceph;

    fn deref(&self) -> &Ceph {
        self.0
    }
}

impl Drop for SharedCeph {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.keep_folder();
        }
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).unwrap();
    bytes
}

fn random_uuid() -> String {
    let text = hex::encode(random::<16>());
    format!("{}-{}-{}-{}-{}", &text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..])
}

/// A key as `ceph-authtool --gen-key` makes it: type 1 (AES), time of making, length, 16 octets.
fn random_key() -> CephKey {
    let mut key = vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0];
    key.extend(random::<16>());
    CephKey::new(&STANDARD.encode(key)).unwrap()
}

/// Makes all that the daemons need to start, and answers the administrator's key.
fn make_folder(folder: &Path, shape: Shape, monitors: &[SocketAddr]) -> CephKey {
    let fsid = random_uuid();
    let daemons = (0..shape.osds).map(|number| Daemon::Osd(number).to_string());
    let entities = ["mon.".to_owned(), "client.admin".to_owned()].into_iter().chain(daemons);
    let keys: Vec<(String, CephKey)> = entities.map(|entity| (entity, random_key())).collect();
    write_keyrings(folder, &keys);
    std::fs::write(folder.join("ceph.conf"), configuration(folder, &fsid, shape, monitors)).unwrap();
    let at = |name: &str| folder.join(name).display().to_string();
    let names: Vec<String> = (0..shape.monitors).map(|number| char::from(b'a' + number).to_string()).collect();
    let addresses: Vec<String> = monitors.iter().map(|monitor| format!("[v2:{monitor}]")).collect();
    let map = at("monmap");
    let mut make_map = vec!["monmaptool", "--create", "--fsid", &fsid];
    for (name, address) in names.iter().zip(&addresses) {
        make_map.extend(["--addv", name, address]);
    }
    make_map.push(&map);
    run(&make_map, &at("monmaptool.out"));
    let (conf, keyring) = (at("ceph.conf"), at("mon.keyring"));
    for name in &names {
        std::fs::create_dir(folder.join(format!("mon.{name}"))).unwrap();
        let mkfs = ["ceph-mon", "-i", name, "--mkfs", "-c", &conf, "--monmap", &map, "--keyring", &keyring];
        run(&mkfs, &at(&format!("mon.{name}-mkfs.out")));
    }
    keys.into_iter().find(|(entity, _)| entity == "client.admin").unwrap().1
}

/// That of all, for the monitors, and each OSD's own.
fn write_keyrings(folder: &Path, keys: &[(String, CephKey)]) {
    let keyring = |wanted: Option<&str>| {
        let mut text = String::new();
        for (entity, key) in keys.iter().filter(|(entity, _)| wanted.is_none_or(|wanted| wanted == entity)) {
            writeln!(text, "[{entity}]\n key = {}", key.expose()).unwrap();
            let caps = if entity.starts_with("osd.") { "allow profile osd" } else { "allow *" };
            writeln!(text, " caps mon = \"{caps}\"\n caps osd = \"allow *\"\n caps mgr = \"allow *\"").unwrap();
        }
        text
    };
    std::fs::write(folder.join("mon.keyring"), keyring(None)).unwrap();
    for (osd, _) in keys.iter().filter(|(entity, _)| entity.starts_with("osd.")) {
        std::fs::create_dir(folder.join(osd)).unwrap();
        std::fs::write(folder.join(osd).join("keyring"), keyring(Some(osd))).unwrap();
    }
}

fn configuration(folder: &Path, fsid: &str, shape: Shape, monitors: &[SocketAddr]) -> String {
    let d = folder.display();
    let backend = match shape.store {
        ObjectStore::Memory => "memstore",
        ObjectStore::Bluestore => "bluestore",
    };
    let hosts: Vec<String> = monitors.iter().map(|monitor| format!("[v2:{monitor}]")).collect();
    format!(
        "[global]
fsid = {fsid}
mon host = {hosts}
public addr = {address}
ms bind ipv4 = {ipv4}
ms bind ipv6 = {ipv6}
run dir = {d}
pid file =
# Not for us: without it a daemon answers none of the commands that it is told directly.
admin socket = {d}/$name.asok
log file = {d}/$name.log
mon cluster log file = {d}/cluster.log
crash dir = {d}
osd pool default size = 1
mon allow pool size one = true
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
[mon]
mon data = {d}/mon.$id
# By default a monitor does not start where a twentieth of the disk is left; this one keeps a few megabytes.
mon data avail crit = 0
mon data avail warn = 0
auth allow insecure global id reclaim = false
# Tests make many small pools.
mon max pg per osd = 4096
# Decides at once; by default a monitor gathers changes for a second.
paxos propose interval = 0.05
paxos min wait = 0.01
[osd]
osd data = {d}/osd.$id
keyring = {d}/osd.$id/keyring
osd objectstore = {backend}
osd memory target = 939524096
memstore device bytes = 4294967296
bluestore block size = 4294967296
",
        hosts = hosts.join(","),
        address = shape.address,
        ipv4 = shape.address.is_ipv4(),
        ipv6 = shape.address.is_ipv6(),
    )
}

/// Runs a program to its end, its output in a file: a daemon would hold a pipe.
fn run(command: &[&str], output: &str) {
    let file = std::fs::File::create(output).unwrap();
    let [program, arguments @ ..] = command else { return };
    let status = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .status()
        .unwrap_or_else(|error| panic!("running {program} (Debian packages ceph-mon, ceph-osd, ceph-common): {error}"));
    let said = || std::fs::read_to_string(output).unwrap_or_default();
    assert!(status.success(), "{command:?}: {status}\n{}", said());
}

const START_LIMIT: Duration = Duration::from_secs(60);

/// Starts and kills what it is told to on its standard input, and everything at its end. `$1` is the folder. What
/// ends the test's whole process group (Ctrl-C) ends the test, and then us, not us first.
const KEEPER: &str = r#"
folder=$1 running=
trap '' INT HUP TERM
end() {
    rest=
    for one in $running; do
        case $one in
        $1=*) kill -KILL "${one#*=}"; wait "${one#*=}" ;;
        *) rest="$rest $one" ;;
        esac
    done
    running=$rest
}
while read -r order name; do
    case $order in
    start)
        "ceph-${name%.*}" -i "${name#*.}" -f -c "$folder/ceph.conf" >>"$folder/$name.out" 2>&1 </dev/null &
        running="$running $name=$!" ;;
    kill) end "$name"; echo killed ;;
    esac
done
for one in $running; do kill -KILL "${one#*=}"; done
wait
[ -e "$folder/keep" ] || rm -rf "$folder"
"#;
