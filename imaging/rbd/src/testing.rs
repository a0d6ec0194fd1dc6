//! A real Ceph for tests and the lab: one monitor and one OSD, plain processes of whatever user runs them, in a folder of
//! their own, on a free port of the loopback interface. Never in a shipped build.
//!
//! They die with the process that started them, however that ends: a shell holds them, and its standard input is a pipe
//! from us. After a failed test the folder with their logs stays, and the test says where.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's set-up may panic as the test does")]

use crate::name::{CephKey, CephUser, Namespace, PoolName};
use crate::{Cluster, Connection, Patience, Pool};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
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

/// A running cluster.
#[derive(Debug)]
pub struct Ceph {
    folder: PathBuf,
    keeper: Child,
    answers: BufReader<ChildStdout>,
    monitor: SocketAddr,
    key: CephKey,
    namespaces: AtomicU32,
}

impl Ceph {
    /// A cluster of the caller's own, ready for use: with a pool for RBD images.
    ///
    /// # Panics
    /// It does not start: Debian's packages `ceph-mon`, `ceph-osd` and `ceph-common` are needed.
    #[must_use]
    pub fn start(store: ObjectStore) -> Self {
        let folder = tempfile::Builder::new().prefix("assay-ceph-").tempdir().unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let monitor = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let fsid = random_uuid();
        let keys = ["mon.", "client.admin", "osd.0"].map(|entity| (entity, random_key()));
        lay_out(folder.path(), &fsid, monitor, store, &keys);
        let at = |name: &str| folder.path().join(name).display().to_string();
        let address = format!("[v2:{monitor}]");
        let map = at("monmap");
        run(&["monmaptool", "--create", "--fsid", &fsid, "--addv", "a", &address, &map], &at("monmaptool.out"));
        let (conf, keyring) = (at("ceph.conf"), at("mon.keyring"));
        let mkfs = ["ceph-mon", "-i", "a", "--mkfs", "-c", &conf, "--monmap", &map, "--keyring", &keyring];
        run(&mkfs, &at("monitor-mkfs.out"));
        let mut keeper = Command::new("sh")
            .args(["-c", KEEPER, "keeper"])
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let answers = BufReader::new(keeper.stdout.take().unwrap());
        let [_, (_, key), _] = keys;
        // The folder is the shell's to remove.
        let folder = folder.keep();
        let mut ceph = Self { folder, keeper, answers, monitor, key, namespaces: AtomicU32::new(0) };
        ceph.order("monitor");
        let osd_uuid = random_uuid();
        let (conf, output) = (ceph.path("ceph.conf"), ceph.path("osd-mkfs.out"));
        run(&["ceph-osd", "-i", "0", "--mkfs", "--no-mon-config", "--osd-uuid", &osd_uuid, "-c", &conf], &output);
        let cluster = ceph.admin();
        cluster.mon_command(&json!({"prefix": "osd new", "uuid": osd_uuid})).unwrap();
        ceph.start_osd();
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
        Connection { monitors: vec![self.monitor], user, key, patience: Patience::CONTROL }
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

    /// Kills the OSD (SIGKILL). Requests wait from then on.
    ///
    /// # Panics
    /// The shell that holds it is gone.
    pub fn kill_osd(&mut self) {
        self.order("kill-osd");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        assert_eq!(answer, "killed\n");
    }

    /// Starts the OSD, and waits until the monitor has it in its map.
    ///
    /// # Panics
    /// It does not come.
    pub fn start_osd(&mut self) {
        let cluster = self.admin();
        let since = |map: &Value| map["osds"][0]["up_from"].as_u64().unwrap_or(0);
        let dump = || cluster.mon_query(&json!({"prefix": "osd dump", "format": "json"})).unwrap();
        let before = since(&dump());
        self.order("osd");
        let deadline = Instant::now() + START_LIMIT;
        while since(&dump()) == before {
            if Instant::now() > deadline {
                self.give_up("waiting for the OSD", &"it did not come up");
            }
        }
    }

    fn order(&mut self, order: &str) {
        let input = self.keeper.stdin.as_mut().unwrap();
        writeln!(input, "{order}").unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn give_up(&self, doing: &str, why: &dyn std::fmt::Display) -> ! {
        let said = ["monitor.out", "osd.out", "osd-mkfs.out"]
            .map(|name| std::fs::read_to_string(self.folder.join(name)).unwrap_or_default());
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

/// Writes the configuration and the keyrings.
fn lay_out(folder: &Path, fsid: &str, monitor: SocketAddr, store: ObjectStore, keys: &[(&str, CephKey); 3]) {
    for name in ["mon", "osd"] {
        std::fs::create_dir(folder.join(name)).unwrap();
    }
    let keyring = |wanted: &str| {
        let mut text = String::new();
        for (entity, key) in keys.iter().filter(|(entity, _)| wanted == "mon." || *entity == wanted) {
            writeln!(text, "[{entity}]\n key = {}", key.expose()).unwrap();
            let caps = if *entity == "osd.0" { "allow profile osd" } else { "allow *" };
            writeln!(text, " caps mon = \"{caps}\"\n caps osd = \"allow *\"\n caps mgr = \"allow *\"").unwrap();
        }
        text
    };
    std::fs::write(folder.join("mon.keyring"), keyring("mon.")).unwrap();
    std::fs::write(folder.join("osd/keyring"), keyring("osd.0")).unwrap();
    let d = folder.display();
    let backend = match store {
        ObjectStore::Memory => "memstore",
        ObjectStore::Bluestore => "bluestore",
    };
    let conf = format!(
        "[global]
fsid = {fsid}
mon host = [v2:{monitor}]
public addr = {address}
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
mon data = {d}/mon
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
osd data = {d}/osd
keyring = {d}/osd/keyring
osd objectstore = {backend}
osd memory target = 939524096
memstore device bytes = 4294967296
bluestore block size = 4294967296
",
        address = monitor.ip(),
    );
    std::fs::write(folder.join("ceph.conf"), conf).unwrap();
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
folder=$1
trap '' INT HUP TERM
while read -r order; do
    case $order in
    monitor) ceph-mon -i a -f -c "$folder/ceph.conf" >>"$folder/monitor.out" 2>&1 </dev/null & monitor=$! ;;
    osd) ceph-osd -i 0 -f -c "$folder/ceph.conf" >>"$folder/osd.out" 2>&1 </dev/null & osd=$! ;;
    kill-osd) kill -KILL "$osd"; wait "$osd"; osd=; echo killed ;;
    esac
done
kill -KILL $monitor $osd
wait
[ -e "$folder/keep" ] || rm -rf "$folder"
"#;
