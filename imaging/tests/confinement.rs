//! The process that parses a node's bytes holds one export and nothing else: an attacker's code is run inside it, each
//! attempt in a worker of its own since a forbidden system call ends it. That every attempt works where nothing is
//! confined is shown beside it, by this program started again.
//!
//! Not a usual test program: it starts itself again as the unconfined attacker, so it needs `--features failpoints`.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test stops where it fails, and says what it has done"
)]

mod rig;

use assay_imaging::gateway::Limits;
use assay_imaging::store::overlay::DiskFiles;
use assay_imaging::store::{ImageStore as _, LocalStore};
use assay_imaging::worker::attack::{Attack, Outcome};
use assay_imaging::worker::disk::DiskOrder;
use assay_imaging::worker::message::{Confinement, FromWorker, MESSAGE_BYTES, ToWorker, WorkerOrder, receive, send};
use assay_wire::id::DiskId;
use assay_wire::imaging::ChapAlgorithms;
use rig::{WORKER, WORKER_USERS, assert_confined, pattern, store_with_image};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SIGSYS: i32 = 31;

fn main() {
    if let Ok(attack) = std::env::var("ATTACK") {
        return unconfined(&attack);
    }
    if let Ok(folder) = std::env::var("GATEWAY") {
        return gateway_that_is_killed(std::path::Path::new(&folder));
    }
    let scene = Scene::new();
    what_the_kernel_says_of_a_worker(&scene);
    every_attempt_is_refused(&scene);
    a_worker_dies_with_a_gateway_that_is_killed(&scene);
    a_worker_ends_by_its_own_clock_unless_it_is_told_otherwise(&scene);
    println!("confinement: ok");
}

/// Says which worker it started, and hangs.
fn gateway_that_is_killed(folder: &std::path::Path) {
    let disk = std::env::var("DISK").unwrap().parse().unwrap();
    let files = DiskFiles::open(&folder.join("store"), disk).unwrap();
    let worker = start_worker(files, false);
    println!("{}", worker.child.id());
    std::thread::park();
}

fn a_worker_dies_with_a_gateway_that_is_killed(scene: &Scene) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env("DISK", scene.sibling.to_string());
    let mut gateway = command.env("GATEWAY", scene.folder.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(gateway.stdout.take().unwrap()).read_line(&mut said).unwrap();
    let worker = std::path::PathBuf::from(format!("/proc/{}/fd", said.trim()));
    assert!(worker.exists(), "{said}");
    gateway.kill().unwrap();
    gateway.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    // A process that is dead, and not yet reaped by whoever inherited it, has no files.
    while std::fs::read_dir(&worker).is_ok_and(|files| files.count() > 0) {
        assert!(Instant::now() < deadline, "the worker outlives its gateway");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    println!("a killed gateway's worker is gone");
}

fn a_worker_ends_by_its_own_clock_unless_it_is_told_otherwise(scene: &Scene) {
    let files = || scene.files();
    let mut worker = start_worker_for(files(), false, Some(150));
    // Nobody says anything any more: the end of what it hears is the end of it.
    while worker.hear().is_some() {}
    assert!(worker.child.wait().unwrap().success());
    drop(worker);
    let worker = start_worker_for(files(), false, Some(1_000));
    send(&worker.socket, &ToWorker::Renew { remaining_ms: 3_600_000 }, &[], SendFlags::empty()).unwrap();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1_500) {
        send(&worker.socket, &ToWorker::Status, &[], SendFlags::empty()).unwrap();
        assert!(matches!(worker.hear(), Some(FromWorker::Status(_))), "it ended at the time that was renewed");
        std::thread::park_timeout(Duration::from_millis(50));
    }
    println!("a worker ends by its own clock");
}

/// The attacker without a worker around it: succeeds with status 0.
fn unconfined(attack: &str) {
    let attack: Attack = serde_json::from_str(attack).unwrap();
    match attack.run() {
        Outcome::Succeeded => {}
        Outcome::Refused { error } => panic!("{attack:?}: {error}"),
    }
}

/// What there is to attack.
struct Scene {
    folder: tempfile::TempDir,
    store: LocalStore,
    disk: DiskId,
    sibling: DiskId,
    listener: TcpListener,
    _control: UnixListener,
    victim: Child,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = store_with_image(folder.path(), &pattern(1 << 20));
        let (disk, sibling) = (DiskId::random(), DiskId::random());
        let image = store.images().unwrap()[0].key;
        for disk in [disk, sibling] {
            store.create_disk(disk, &"p1".parse().unwrap(), image).unwrap();
        }
        let control = UnixListener::bind(folder.path().join("control.sock")).unwrap();
        let victim = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        std::fs::create_dir(folder.path().join("mount")).unwrap();
        Self { folder, store, disk, sibling, listener, _control: control, victim }
    }

    /// The disk's files, opened anew.
    fn files(&self) -> DiskFiles {
        DiskFiles::open(&self.folder.path().join("store"), self.disk).unwrap()
    }

    /// Each attempt, and whether the layers beneath the system call filter refuse it, too.
    fn attacks(&self) -> Vec<(Attack, bool)> {
        let path = |name: &str| self.folder.path().join(name);
        let sibling = self.store.top_folder(self.sibling).unwrap();
        let image = self.store.images().unwrap()[0].key;
        let pid = i32::try_from(self.victim.id()).unwrap();
        vec![
            (Attack::OpenFile { path: sibling.join("data") }, true),
            (Attack::OpenFile { path: self.store.image_folder(image).join("disk.raw") }, true),
            (Attack::OpenFile { path: "/etc/passwd".into() }, true),
            (Attack::OpenFile { path: format!("/proc/{pid}/mem").into() }, true),
            (Attack::OpenFile { path: "/proc/self/mem".into() }, true),
            (Attack::WriteFile { path: path("made") }, true),
            (Attack::ListFolder { path: "/proc".into() }, true),
            (Attack::Connect { to: self.listener.local_addr().unwrap() }, true),
            (Attack::Bind, true),
            (Attack::UnixConnect { path: path("control.sock") }, true),
            (Attack::Execute, true),
            (Attack::Fork, true),
            (Attack::Threads, true),
            (Attack::Memory, true),
            (Attack::BecomeRoot, true),
            (Attack::Trace { pid }, true),
            (Attack::Kill { pid }, true),
            (Attack::Mount { on: path("mount") }, true),
            (Attack::RaiseLimits, true),
            // These give nothing by themselves; the filter alone refuses them.
            (Attack::Socket, false),
            (Attack::Netlink, false),
            (Attack::Unshare, false),
        ]
    }

    fn worker(&self, without_seccomp: bool) -> Worker {
        let files = self.files();
        start_worker(files, without_seccomp)
    }
}

fn start_worker(files: DiskFiles, without_seccomp: bool) -> Worker {
    start_worker_for(files, without_seccomp, None)
}

fn start_worker_for(files: DiskFiles, without_seccomp: bool, remaining_ms: Option<u64>) -> Worker {
    let (disk, files) = DiskOrder::of(files);
    let order = WorkerOrder {
        target: "iqn.2026-01.dev.assay:attacked".into(),
        portal: "127.0.0.1:3260".parse().unwrap(),
        initiator: None,
        chap: None,
        chap_algorithms: ChapAlgorithms::Any,
        naa: 1,
        serial: "1".into(),
        product: "clone".into(),
        read_only: false,
        disk,
        limits: Limits::default(),
        remaining_ms,
        uid: Some(WORKER_USERS + 9),
        without_seccomp,
    };
    Worker::start(order, &files)
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _dead_already = self.victim.kill();
        let _reaped_already = self.victim.wait();
    }
}

/// A worker as a gateway starts it.
struct Worker {
    child: Child,
    socket: OwnedFd,
    confinement: Confinement,
}

impl Worker {
    fn start(order: WorkerOrder, files: &[OwnedFd]) -> Self {
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let mut command = Command::new(WORKER);
        let child = command.env_clear().stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        drop(command);
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(OwnedFd::as_fd).collect();
        send(&socket, &ToWorker::Serve(Box::new(order)), &fds, SendFlags::empty()).unwrap();
        let mut worker = Self { child, socket, confinement: Confinement::default() };
        match worker.hear() {
            Some(FromWorker::Ready(confinement)) => worker.confinement = confinement,
            other => panic!("not ready: {other:?}"),
        }
        worker
    }

    fn hear(&self) -> Option<FromWorker> {
        let mut buffer = vec![0; MESSAGE_BYTES];
        receive(&self.socket, &mut buffer, RecvFlags::empty()).unwrap().map(|(message, _)| message)
    }

    /// Refused with an error, or by death; what it says.
    fn attempt(mut self, attack: &Attack) -> Result<String, ()> {
        send(&self.socket, &ToWorker::Attack(attack.clone()), &[], SendFlags::empty()).unwrap();
        match self.hear() {
            Some(FromWorker::Attacked(Outcome::Refused { error })) => Ok(error),
            Some(FromWorker::Attacked(Outcome::Succeeded)) => Err(()),
            None => {
                let died = self.child.wait().unwrap();
                assert_eq!(died.signal(), Some(SIGSYS), "{attack:?}: {died}");
                Ok("killed".into())
            }
            other => panic!("{attack:?}: {other:?}"),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _dead_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

fn every_attempt_is_refused(scene: &Scene) {
    let own_program = std::env::current_exe().unwrap();
    for (attack, in_depth) in scene.attacks() {
        let json = serde_json::to_string(&attack).unwrap();
        let control = Command::new(&own_program).env("ATTACK", &json).output().unwrap();
        let said = String::from_utf8_lossy(&control.stderr);
        assert!(control.status.success(), "{attack:?} does not even work unconfined: {said}");
        let whole = scene.worker(false).attempt(&attack);
        assert!(whole.is_ok(), "{attack:?} succeeded in a confined worker");
        let beneath = scene.worker(true).attempt(&attack);
        assert!(beneath.is_ok() || !in_depth, "{attack:?} is held by the system call filter alone");
        println!("{attack:?}: {}; without the filter: {}", whole.unwrap(), beneath.unwrap_or("possible".into()));
    }
}

/// The kernel's own account of a worker's limits.
fn what_the_kernel_says_of_a_worker(scene: &Scene) {
    let worker = scene.worker(false);
    assert_eq!(worker.confinement, Confinement { own_user: true, landlock_whole: true }, "on this kernel, as root");
    let proc = format!("/proc/{}", worker.child.id());
    let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
    assert_confined(&status, WORKER_USERS + 9);
    // Standard input, output and error; the golden disk with its hash tree, and the clone's three files.
    let open = std::fs::read_dir(format!("{proc}/fd")).unwrap().count();
    assert_eq!(open, 8, "more or less is open than the one disk");
    let environment = std::fs::read(format!("{proc}/environ")).unwrap();
    assert!(environment.is_empty(), "{}", String::from_utf8_lossy(&environment));
    let limits = std::fs::read_to_string(format!("{proc}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
}
