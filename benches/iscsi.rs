//! The iSCSI target as it ships, `assay imaging export-file`, against Debian's tgt: the same file, the same initiators,
//! in turns. On loopback, with the file in the page cache, so what is measured is the targets.

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
    for (name, depth, block_bytes, blocks) in [
        ("4 KiB writes, depth 1", 1, 4 << 10, 8_000),
        ("4 KiB writes, depth 16", 16, 4 << 10, 20_000),
        ("1 MiB writes, depth 4", 4, 1 << 20, 300),
    ] {
        let (our_rate, their_rate) =
            in_turns(|| writes(&ours, depth, block_bytes, blocks), || writes(&theirs, depth, block_bytes, blocks));
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

/// Answers with MiB a second.
fn writes(target: &Target, depth: u32, block_bytes: u32, blocks: u32) -> f64 {
    let [depth, size, count] = [depth, block_bytes, blocks].map(|number| number.to_string());
    let output = output(
        "qemu-img",
        &["bench", "-w", "-n", "-t", "none", "-f", "raw", "-d", &depth, "-s", &size, "-c", &count, &target.url],
    );
    let seconds = output.rsplit("completed in ").next().and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let seconds: f64 = seconds.unwrap_or_else(|| panic!("qemu-img gave no time: {output}"));
    f64::from(blocks) * f64::from(block_bytes) / f64::from(1 << 20) / seconds
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

    /// User and system time so far, in steps of `USER_HZ`.
    fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
        // After the name in parentheses; utime and stime are fields 14 and 15 (proc(5)).
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10)
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

const NAME: &str = "iqn.2026-01.dev.assay:bench";
/// tgt's control socket has a number, too.
const TGT_CONTROL: &str = "77";
const SECONDS: &str = "1";
const PATIENCE: Duration = Duration::from_secs(10);
