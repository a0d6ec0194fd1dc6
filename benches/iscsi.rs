//! The iSCSI target as it ships, `assay imaging export-file` with its confined process, against Debian's tgt: the same
//! file, the same initiators (libiscsi's, QEMU's, and a lean one of our own), in turns. On loopback, with the file in the page
//! cache, so what is measured is the targets.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

mod bare;
mod figure;
mod folder;
#[allow(dead_code, reason = "libiscsi reads")]
mod initiator;
mod targets;

use figure::{Better, Figure, in_turns, wanted};
use folder::folder;
use initiator::{Login, Session};
use std::fs::File;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use targets::{Running, TGT_LUN, Tgt, file_lun, free_port, within};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [BARE, listen, part, disk] = &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        return bare::serve(listen, part, Path::new(disk));
    }
    if !wanted("iscsi") {
        return;
    }
    let folder = folder("iscsi-bench-");
    let disk = make_disk(folder.path());
    let (ours, theirs) = (Target::ours(&disk), Target::tgt(folder.path(), &disk));
    for depth in [1, 32] {
        let reads = |target: &Target| random_reads(target, depth).a_second;
        let (our_rate, their_rate) = in_turns(|| reads(&ours), || reads(&theirs));
        report(&format!("4 KiB random reads, depth {depth}"), "1/s", our_rate, their_rate, Better::Higher);
        let cost = |target: &Target| random_reads(target, depth).cpu_microseconds;
        let (our_cost, their_cost) = in_turns(|| cost(&ours), || cost(&theirs));
        report(&format!("CPU for each, depth {depth}"), "µs", our_cost, their_cost, Better::Lower);
    }
    let bare = bare::Exchanges::start(&disk, 4 << 10, 1);
    let (our_cost, their_cost) = in_turns(|| random_reads(&ours, 1).cpu_microseconds, || bare.run().cpu_microseconds);
    report_to_ceiling("CPU for each, depth 1", "µs", our_cost, their_cost, Better::Lower);
    drop(bare);
    let name = "1 MiB sequential reads, depth 4";
    let (our_rate, their_rate) = in_turns(|| sequential_reads(&ours), || sequential_reads(&theirs));
    report(name, "MiB/s", our_rate, their_rate, Better::Higher);
    let bare = bare::Exchanges::start(&disk, 1 << 20, 4);
    let (our_rate, their_rate) = in_turns(|| sequential_reads(&ours), || bare.run().a_second);
    report_to_ceiling(name, "MiB/s", our_rate, their_rate, Better::Higher);
    drop(bare);
    for sessions in [8, 32] {
        let (our_rate, their_rate) = in_turns(|| crowd(&ours, sessions), || crowd(&theirs, sessions));
        let name = format!("4 KiB random reads, {sessions} sessions of depth 4");
        report(&name, "1/s", our_rate, their_rate, Better::Higher);
    }
    for depth in [1, 32] {
        let (our_rate, their_rate) = in_turns(|| writes(&ours, depth), || writes(&theirs, depth));
        report(&format!("4 KiB scattered writes, depth {depth}"), "1/s", our_rate, their_rate, Better::Higher);
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

fn report_to_ceiling(name: &str, unit: &str, ours: f64, theirs: f64, better: Better) {
    Figure { bench: "iscsi", name, unit, ours, against: "a bare exchange", theirs, better }.report();
}

/// What an initiator saw, and what it cost the target.
struct Reads {
    a_second: f64,
    cpu_microseconds: f64,
}

fn random_reads(target: &Target, depth: u32) -> Reads {
    let before = target.process.cpu();
    let depth = depth.to_string();
    let a_second = iscsi_perf(&["-r", "-m", &depth, "-b", "8", "-t", SECONDS, &target.url]);
    let spent = target.process.cpu() - before;
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

/// Answers with the requests a second, of the same initiator as a boot storm's: QEMU's takes more of a processor for a write
/// than either target does.
fn writes(target: &Target, depth: usize) -> f64 {
    let (mut session, begun) = (target.log_in(), Instant::now());
    let long = Duration::from_secs(SECONDS.parse().unwrap());
    let offsets = (0..).map(|number| number * u64::from(SCATTER) % DISK_BYTES).take_while(|_| begun.elapsed() < long);
    let written = session.write(offsets, &[7; 4 << 10], depth).unwrap();
    f64::from(written) / begun.elapsed().as_secs_f64()
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

/// A target that listens on loopback.
struct Target {
    process: Running,
    address: SocketAddr,
    url: String,
    login: Login,
}

impl Target {
    fn log_in(&self) -> Session {
        Session::log_in(TcpStream::connect(self.address).unwrap(), &self.login).unwrap()
    }

    fn new(process: Running, address: SocketAddr, target: String, lun: u8) -> Self {
        let url = format!("iscsi://{address}/{target}/{lun}");
        let login = Login { initiator: format!("{NAME}-initiator"), target, chap: None, lun };
        Self { process, address, url, login }
    }

    fn ours(disk: &Path) -> Self {
        let address = free_port();
        let process = Running::start(env!("CARGO_BIN_EXE_assay"), |command| {
            command.args(["imaging", "export-file"]).arg(disk);
            command.args(["--listen", &address.to_string(), "--target", NAME]);
        });
        within("assay does not listen", || TcpStream::connect(address).is_ok());
        Self::new(process, address, NAME.to_owned(), 0)
    }

    fn tgt(folder: &Path, disk: &Path) -> Self {
        let Tgt { process, address } = Tgt::start(folder, NAME, &[file_lun(disk)], false);
        Self::new(process, address, format!("{NAME}1"), TGT_LUN)
    }
}

/// A quarter of a gigabyte without holes, page by page: what is written in long pieces, the page cache keeps in large folios,
/// and ext4 then looks through all of a folio's blocks for each 4 KiB that is written to it. That costs twice as much as all
/// else, with every target alike, and would be what is measured.
fn make_disk(folder: &Path) -> PathBuf {
    let path = folder.join("disk");
    let mut file = File::create(&path).unwrap();
    for page in 0..DISK_BYTES >> 12 {
        file.write_all(&page.to_le_bytes().repeat(512)).unwrap();
    }
    file.sync_all().unwrap();
    path
}

/// From one request to the next: far, and never on the same blocks before the disk's end.
const SCATTER: u32 = (1 << 20) + (4 << 10);
const NAME: &str = "iqn.2026-01.dev.assay:bench";
const SECONDS: &str = "1";
const DISK_BYTES: u64 = 256 << 20;
/// Asks this program to be the server of [`bare`].
const BARE: &str = "--bare-exchanges";
