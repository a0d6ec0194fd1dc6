//! What an attacker's code would try from inside a worker, for tests: each attempt by itself, since a forbidden system
//! call ends the process. Built with the crash points only, which no shipped program has.

use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::hint::black_box;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

/// More than a worker may have allocated.
const BOMB_BYTES: usize = 1 << 30;
/// More threads than a worker's user may have.
const BOMB_THREADS: usize = 1500;

/// One attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Attack {
    OpenFile { path: PathBuf },
    WriteFile { path: PathBuf },
    ListFolder { path: PathBuf },
    Socket,
    Netlink,
    Connect { to: SocketAddr },
    Bind,
    UnixConnect { path: PathBuf },
    Execute,
    Fork,
    Threads,
    Memory,
    BecomeRoot,
    Trace { pid: i32 },
    Kill { pid: i32 },
    Mount { on: PathBuf },
    Unshare,
    RaiseLimits,
}

/// How it went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The attacker has what it wanted.
    Succeeded,
    /// It was refused.
    Refused {
        /// How.
        error: String,
    },
}

impl Attack {
    /// Tries.
    #[must_use]
    pub fn run(&self) -> Outcome {
        match self.attempt() {
            Ok(()) => Outcome::Succeeded,
            Err(error) => Outcome::Refused { error: error.to_string() },
        }
    }

    fn attempt(&self) -> io::Result<()> {
        match self {
            Self::OpenFile { path } => File::open(path).map(drop),
            Self::WriteFile { path } => std::fs::write(path, "owned"),
            Self::ListFolder { path } => std::fs::read_dir(path).map(drop),
            Self::Socket => Ok(rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).map(drop)?),
            Self::Netlink => Ok(rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None).map(drop)?),
            Self::Connect { to } => TcpStream::connect(to).map(drop),
            Self::Bind => TcpListener::bind("127.0.0.1:0").map(drop),
            Self::UnixConnect { path } => UnixStream::connect(path).map(drop),
            Self::Execute => Err(Command::new("/bin/true").exec()),
            Self::Fork => Command::new("/bin/true").status().map(drop),
            Self::Threads => many_threads(),
            Self::Memory => much_memory(),
            Self::BecomeRoot => become_root(),
            Self::Trace { pid } => {
                let pid = nix::unistd::Pid::from_raw(*pid);
                nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()).map_err(io::Error::from)
            }
            Self::Kill { pid } => {
                let pid = Pid::from_raw(*pid).ok_or(io::ErrorKind::InvalidInput)?;
                Ok(rustix::process::kill_process(pid, Signal::USR1)?)
            }
            Self::Mount { on } => {
                let flags = rustix::mount::MountFlags::empty();
                rustix::mount::mount("none", on, "tmpfs", flags, None)?;
                Ok(rustix::mount::unmount(on, rustix::mount::UnmountFlags::DETACH)?)
            }
            #[expect(deprecated, reason = "what it warns of is what is wanted here")]
            Self::Unshare => Ok(rustix::thread::unshare(rustix::thread::UnshareFlags::NEWUSER)?),
            Self::RaiseLimits => {
                let limit = rustix::process::Rlimit { current: Some(4096), maximum: Some(4096) };
                Ok(rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)?)
            }
        }
    }
}

fn become_root() -> io::Result<()> {
    let root = rustix::fs::Uid::ROOT;
    Ok(rustix::thread::set_thread_res_uid(root, root, root)?)
}

fn much_memory() -> io::Result<()> {
    let mut hoard: Vec<Vec<u8>> = Vec::new();
    for _ in 0..BOMB_BYTES >> 20 {
        let mut block = Vec::new();
        block.try_reserve_exact(1 << 20).map_err(io::Error::other)?;
        block.resize(1 << 20, 1);
        hoard.push(block);
    }
    black_box(hoard);
    Ok(())
}

/// All at once, and gone when it returns.
fn many_threads() -> io::Result<()> {
    let mut threads = Vec::new();
    let (hold, held) = std::sync::mpsc::sync_channel::<()>(0);
    let held = Arc::new(std::sync::Mutex::new(held));
    let mut failed = None;
    for _ in 0..BOMB_THREADS {
        let held = Arc::clone(&held);
        let wait = move || drop(held.lock().map(|held| held.recv()));
        match std::thread::Builder::new().stack_size(16 * 1024).spawn(wait) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    drop(hold);
    for thread in threads {
        let _panicked = thread.join();
    }
    failed.map_or(Ok(()), Err)
}
