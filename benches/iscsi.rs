//! The iSCSI target as it ships, `assay imaging export-file` with its confined process, against Debian's tgt: the same
//! file, the same initiators (libiscsi's and QEMU's), in turns. On loopback, with the file in the page cache, so what is measured is the targets.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

mod figure;

use figure::{Better, Figure, in_turns, wanted};
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::park_timeout;
use std::time::{Duration, Instant};

fn main() {
    if !wanted("iscsi") {
        return;
    }
    let folder = Folder::new();
    let disk = folder.disk();
    let (ours, theirs) = (Target::ours(&disk), Target::tgt(&folder.0, &disk));
    for depth in [1, 32] {
        let reads = |target: &Target| random_reads(target, depth).a_second;
        let (our_rate, their_rate) = in_turns(|| reads(&ours), || reads(&theirs));
        report(&format!("4 KiB random reads, depth {depth}"), "1/s", our_rate, their_rate, Better::Higher);
        let cost = |target: &Target| random_reads(target, depth).cpu_microseconds;
        let (our_cost, their_cost) = in_turns(|| cost(&ours), || cost(&theirs));
        report(&format!("CPU for each, depth {depth}"), "µs", our_cost, their_cost, Better::Lower);
    }
    let (our_rate, their_rate) = in_turns(|| sequential_reads(&ours), || sequential_reads(&theirs));
    report("1 MiB sequential reads, depth 4", "MiB/s", our_rate, their_rate, Better::Higher);
    for sessions in [8, 32] {
        let (our_rate, their_rate) = in_turns(|| crowd(&ours, sessions), || crowd(&theirs, sessions));
        let name = format!("4 KiB random reads, {sessions} sessions of depth 4");
        report(&name, "1/s", our_rate, their_rate, Better::Higher);
    }
    for (name, write, depth, block_bytes, step_bytes, blocks) in [
        ("4 KiB scattered reads, depth 1, QEMU", false, 1, 4 << 10, SCATTER, 8_000),
        ("4 KiB scattered reads, depth 32, QEMU", false, 32, 4 << 10, SCATTER, 20_000),
        ("4 KiB scattered writes, depth 1, QEMU", true, 1, 4 << 10, SCATTER, 8_000),
        ("4 KiB scattered writes, depth 32, QEMU", true, 32, 4 << 10, SCATTER, 20_000),
        ("1 MiB writes, depth 4, QEMU", true, 4, 1 << 20, 1 << 20, 300),
    ] {
        let job = Job { write, depth, block_bytes, step_bytes, blocks };
        let (our_rate, their_rate) = in_turns(|| qemu(&ours, &job), || qemu(&theirs, &job));
        report(name, "MiB/s", our_rate, their_rate, Better::Higher);
    }
}

fn report(name: &str, unit: &str, ours: f64, theirs: f64, better: Better) {
    Figure { bench: "iscsi", name, unit, ours, against: "tgt", theirs, better }.report();
}

/// What an initiator saw, and what it cost the target.
struct Reads {
    a_second: f64,
    cpu_microseconds: f64,
}

fn random_reads(target: &Target, depth: u32) -> Reads {
    let before = target.cpu();
    let depth = depth.to_string();
    let a_second = iscsi_perf(&["-r", "-m", &depth, "-b", "8", "-t", SECONDS, &target.url]);
    let spent = target.cpu() - before;
    let seconds: f64 = SECONDS.parse().unwrap();
    Reads { a_second, cpu_microseconds: spent.as_secs_f64() * 1e6 / (a_second * seconds) }
}

fn sequential_reads(target: &Target) -> f64 {
    iscsi_perf(&["-m", "4", "-b", "2048", "-t", SECONDS, &target.url])
}

/// Answers with the requests a second.
fn iscsi_perf(arguments: &[&str]) -> f64 {
    let output = output("iscsi-perf", arguments);
    let average = output.rsplit("iops average ").next().and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    average.unwrap_or_else(|| panic!("iscsi-perf gave no average: {output}"))
}

/// Answers with the requests a second of all sessions together.
fn crowd(target: &Target, sessions: u32) -> f64 {
    let session = |number: u32| {
        let initiator = format!("{NAME}-initiator-{number}");
        iscsi_perf(&["-i", &initiator, "-r", "-m", "4", "-b", "8", "-t", SECONDS, &target.url])
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..sessions).map(|number| scope.spawn(move || session(number))).collect();
        running.into_iter().map(|session| session.join().unwrap()).sum()
    })
}

/// What `qemu-img bench` does.
struct Job {
    write: bool,
    depth: u32,
    block_bytes: u32,
    step_bytes: u32,
    blocks: u32,
}

/// Answers with MiB a second.
fn qemu(target: &Target, job: &Job) -> f64 {
    let [depth, size, step, count] =
        [job.depth, job.block_bytes, job.step_bytes, job.blocks].map(|number| number.to_string());
    let mut arguments = vec!["bench", "-n", "-t", "none", "-f", "raw"];
    arguments.extend(job.write.then_some("-w"));
    arguments.extend(["-d", &depth, "-s", &size, "-S", &step, "-c", &count, &target.url]);
    let output = output("qemu-img", &arguments);
    let seconds = output.rsplit("completed in ").next().and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let seconds: f64 = seconds.unwrap_or_else(|| panic!("qemu-img gave no time: {output}"));
    f64::from(job.blocks) * f64::from(job.block_bytes) / f64::from(1 << 20) / seconds
}

fn output(program: &str, arguments: &[&str]) -> String {
    let run = Command::new("timeout").arg("30").arg(program).args(arguments).output();
    let run = run.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(run.status.success(), "{program}: {}\n{said}{}", run.status, String::from_utf8_lossy(&run.stderr));
    said
}

/// A target that listens on loopback; gone when dropped, and with us.
struct Target {
    process: Child,
    url: String,
}

impl Target {
    fn ours(disk: &Path) -> Self {
        let address = free_port();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_assay"), "imaging", "export-file"]);
        command.arg(disk).args(["--listen", &address.to_string(), "--target", NAME]);
        let target = Self { process: spawn(&mut command), url: format!("iscsi://{address}/{NAME}/0") };
        within("assay does not listen", || TcpStream::connect(address).is_ok());
        target
    }

    fn tgt(folder: &Path, disk: &Path) -> Self {
        let address = free_port();
        let socket = folder.join("tgtd");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "tgtd", "-f", "-C", TGT_CONTROL, "--iscsi"]);
        command.arg(format!("portal={address}")).env("TGT_IPC_SOCKET", &socket);
        // LUN 0 is tgt's own controller.
        let target = Self { process: spawn(&mut command), url: format!("iscsi://{address}/{NAME}/1") };
        let disk = disk.to_str().unwrap();
        let orders: [&[&str]; 3] = [
            &["--op", "new", "--mode", "target", "--tid", "1", "-T", NAME],
            &["--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", disk],
            &["--op", "bind", "--mode", "target", "--tid", "1", "-I", "127.0.0.1"],
        ];
        for order in orders {
            let mut admin = Command::new("tgtadm");
            admin.args(["-C", TGT_CONTROL, "--lld", "iscsi"]).args(order).env("TGT_IPC_SOCKET", &socket);
            admin.stderr(Stdio::null());
            within("tgtadm is refused", || admin.status().is_ok_and(|status| status.success()));
        }
        target
    }

    /// User and system time so far of the target and the processes that it started, in steps of `USER_HZ`.
    fn cpu(&self) -> Duration {
        let own = self.process.id();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let stats = processes.filter_map(|process| fs::read_to_string(process.path().join("stat")).ok());
        let ticks = stats.filter_map(|stat| {
            // After the name in parentheses; ppid is field 4, utime and stime are fields 14 and 15 (proc(5)).
            let (id, rest) = (stat.split_whitespace().next()?.parse::<u32>().ok()?, stat.rsplit(')').next()?);
            let fields: Vec<u64> = rest.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
            (id == own || fields[1] == u64::from(own)).then(|| fields[11] + fields[12])
        });
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // It may have died already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(command: &mut Command) -> Child {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.spawn().expect("setpriv starts (Debian package util-linux)")
}

/// Free a moment ago.
fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn within(otherwise: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{otherwise} within {PATIENCE:?}");
        park_timeout(Duration::from_millis(20));
    }
}

/// Where the disk is; gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("iscsi-bench-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A quarter of a gigabyte without holes.
    fn disk(&self) -> PathBuf {
        let path = self.0.join("disk");
        let mut file = BufWriter::new(File::create(&path).unwrap());
        for mebibyte in 0..256_u32 {
            file.write_all(&mebibyte.to_le_bytes().repeat(1 << 18)).unwrap();
        }
        file.into_inner().unwrap().sync_all().unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is below target/tmp.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// From one request to the next: far, and never on the same blocks before the disk's end.
const SCATTER: u32 = (1 << 20) + (4 << 10);
const NAME: &str = "iqn.2026-01.dev.assay:bench";
/// tgt's control socket has a number, too.
const TGT_CONTROL: &str = "77";
const SECONDS: &str = "1";
const PATIENCE: Duration = Duration::from_secs(10);
