//! What no target can do without: a process that receives a command's 48 octets, and sends part of a file with a header, one
//! exchange after another; short parts are read, long ones go from the page cache as they are. What it costs is the kernel's
//! TCP, and the wake-ups. Its client only receives.

use super::{BARE, Reads, SECONDS};
use crate::targets::{Running, free_port, within};
use rustix::fs::sendfile;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

const COMMAND: usize = 48;
/// Parts from this length on are long.
const LONG: usize = 32 << 10;

/// The server, in a process of its own, and a connection to it.
pub(crate) struct Exchanges {
    process: Running,
    stream: TcpStream,
    part: usize,
    depth: usize,
}

impl Exchanges {
    /// Parts of `part` octets each, `depth` of them asked for at once.
    pub(crate) fn start(disk: &Path, part: usize, depth: usize) -> Self {
        let address = free_port();
        let program = std::env::current_exe().unwrap();
        let process = Running::start(program.to_str().unwrap(), |command| {
            command.args([BARE, &address.to_string(), &part.to_string()]).arg(disk);
        });
        let mut stream = None;
        within("the bare server does not listen", || {
            stream = TcpStream::connect(address).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { process, stream, part, depth }
    }

    pub(crate) fn run(&self) -> Reads {
        let (before, begun) = (self.process.cpu(), Instant::now());
        let long = Duration::from_secs(SECONDS.parse().unwrap());
        let (mut stream, mut answer, mut exchanges) = (&self.stream, vec![0; COMMAND + self.part], 0.0);
        stream.write_all(&vec![0; COMMAND * (self.depth - 1)]).unwrap();
        while begun.elapsed() < long {
            stream.write_all(&[0; COMMAND]).unwrap();
            stream.read_exact(&mut answer).unwrap();
            exchanges += 1.0;
        }
        for _ in 1..self.depth {
            stream.read_exact(&mut answer).unwrap();
        }
        let spent = self.process.cpu() - before;
        Reads {
            a_second: exchanges / begun.elapsed().as_secs_f64(),
            cpu_microseconds: spent.as_secs_f64() * 1e6 / exchanges,
        }
    }
}

/// The server: ends with its connection.
pub(crate) fn serve(listen: &str, part: &str, disk: &Path) {
    let (mut stream, _) = TcpListener::bind(listen).unwrap().accept().unwrap();
    stream.set_nodelay(true).unwrap();
    let part: usize = part.parse().unwrap();
    let (disk, mut command, mut answer) = (File::open(disk).unwrap(), [0; COMMAND], vec![0; COMMAND + part]);
    let parts = disk.metadata().unwrap().len() / part as u64;
    let mut number = 0;
    while stream.read_exact(&mut command).is_ok() {
        if part < LONG {
            // Far from one another, as random reads are.
            number = (number + 40_503) % parts;
            disk.read_exact_at(&mut answer[COMMAND..], number * part as u64).unwrap();
            stream.write_all(&answer).unwrap();
        } else {
            number = (number + 1) % parts;
            let (mut at, end) = (number * part as u64, (number + 1) * part as u64);
            stream.write_all(&answer[..COMMAND]).unwrap();
            while at < end {
                let rest = usize::try_from(end - at).unwrap();
                sendfile(&stream, &disk, Some(&mut at), rest).unwrap();
            }
        }
    }
}
