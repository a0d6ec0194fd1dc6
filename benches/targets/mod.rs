//! iSCSI targets that benchmarks start, and Debian's tgt among them. Gone when dropped, and with us.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::park_timeout;
use std::time::{Duration, Instant};

/// A program that runs until it is dropped.
pub(crate) struct Running(Child);

impl Running {
    /// Starts a program so that it ends with us, without output.
    pub(crate) fn start(program: &str, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", program]);
        change(&mut command);
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(quiet.spawn().expect("setpriv starts (Debian package util-linux)"))
    }

    #[allow(dead_code, reason = "not every benchmark looks for it")]
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// User and system time so far of the program and the processes that it started, in steps of `USER_HZ`.
    #[allow(dead_code, reason = "not every benchmark has costs")]
    pub(crate) fn cpu(&self) -> Duration {
        let own = self.0.id();
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

impl Drop for Running {
    fn drop(&mut self) {
        // It may have died already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// tgt, with as many targets as it was given disks.
pub(crate) struct Tgt {
    pub(crate) process: Running,
    pub(crate) address: SocketAddr,
}

/// The LUN of a target's disk: 0 is tgt's own controller.
pub(crate) const TGT_LUN: u8 = 1;

impl Tgt {
    /// Serves each of `luns`, what `tgtadm` is told of a disk, as a target of its own: called `name` followed by its number,
    /// from 1 on; read-only if that is said.
    pub(crate) fn start(folder: &Path, name: &str, luns: &[Vec<String>], read_only: bool) -> Self {
        let (address, socket) = (free_port(), folder.join("tgtd"));
        let process = Running::start("tgtd", |command| {
            command.args(["-f", "-C", CONTROL, "--iscsi", &format!("portal={address}")]).env("TGT_IPC_SOCKET", &socket);
        });
        let order = |mode: &str, target: &str, op: &str, rest: &[&str]| {
            let mut admin = Command::new("tgtadm");
            admin.args(["-C", CONTROL, "--lld", "iscsi", "--op", op, "--mode", mode, "--tid", target]).args(rest);
            admin.env("TGT_IPC_SOCKET", &socket).stderr(Stdio::null());
            within("tgtadm is refused", || admin.status().is_ok_and(|status| status.success()));
        };
        for (lun, number) in luns.iter().zip(1..) {
            let target = u32::to_string(&number);
            order("target", &target, "new", &["-T", &format!("{name}{number}")]);
            let lun: Vec<&str> = ["--lun", "1"].into_iter().chain(lun.iter().map(String::as_str)).collect();
            order("logicalunit", &target, "new", &lun);
            if read_only {
                order("logicalunit", &target, "update", &["--lun", "1", "--params", "readonly=1"]);
            }
            order("target", &target, "bind", &["-I", "127.0.0.1"]);
        }
        Self { process, address }
    }
}

/// A disk that is a file.
pub(crate) fn file_lun(disk: &Path) -> Vec<String> {
    vec!["-b".to_owned(), disk.display().to_string()]
}

/// Free a moment ago.
pub(crate) fn free_port() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

pub(crate) fn within(otherwise: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{otherwise} within {PATIENCE:?}");
        park_timeout(Duration::from_millis(20));
    }
}

/// tgt's control socket has a number, too.
const CONTROL: &str = "77";
const PATIENCE: Duration = Duration::from_secs(10);
