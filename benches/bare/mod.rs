//! What no target can do without: a process that receives a command's 48 octets, reads 4 KiB of a file, and sends them with a
//! header, one exchange after another. What it costs is the kernel's TCP, and the wake-ups.

use super::{BARE, Reads, SECONDS};
use crate::targets::{Running, free_port, within};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

const COMMAND: usize = 48;
const ANSWER: usize = COMMAND + 4096;

/// The server, in a process of its own, and a connection to it.
pub(crate) struct Exchanges {
    process: Running,
    stream: TcpStream,
}

impl Exchanges {
    pub(crate) fn start(disk: &Path) -> Self {
        let address = free_port();
        let program = std::env::current_exe().unwrap();
        let process = Running::start(program.to_str().unwrap(), |command| {
            command.args([BARE, &address.to_string()]).arg(disk);
        });
        let mut stream = None;
        within("the bare server does not listen", || {
            stream = TcpStream::connect(address).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { process, stream }
    }

    pub(crate) fn run(&self) -> Reads {
        let (before, begun) = (self.process.cpu(), Instant::now());
        let long = Duration::from_secs(SECONDS.parse().unwrap());
        let (mut stream, mut answer, mut exchanges) = (&self.stream, [0; ANSWER], 0.0);
        while begun.elapsed() < long {
            stream.write_all(&[0; COMMAND]).unwrap();
            stream.read_exact(&mut answer).unwrap();
            exchanges += 1.0;
        }
        let spent = self.process.cpu() - before;
        Reads {
            a_second: exchanges / begun.elapsed().as_secs_f64(),
            cpu_microseconds: spent.as_secs_f64() * 1e6 / exchanges,
        }
    }
}

/// The server: ends with its connection.
pub(crate) fn serve(listen: &str, disk: &Path) {
    let (mut stream, _) = TcpListener::bind(listen).unwrap().accept().unwrap();
    stream.set_nodelay(true).unwrap();
    let disk = File::open(disk).unwrap();
    let (mut command, mut answer) = ([0; COMMAND], [0; ANSWER]);
    let pages = disk.metadata().unwrap().len() / 4096;
    // Far from one another, as random reads are.
    let mut page = 0;
    while stream.read_exact(&mut command).is_ok() {
        page = (page + 40_503) % pages;
        disk.read_exact_at(&mut answer[COMMAND..], page * 4096).unwrap();
        stream.write_all(&answer).unwrap();
    }
}
