//! A driver for tests: threads, blocking sockets on the loopback interface, and a disk in memory.

#![allow(dead_code, unused_imports, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod disk;
mod initiator;

pub(crate) use disk::RamDisk;
pub(crate) use initiator::{Answer, BLOCKS, Initiator, NAME, SECRET, cdb_10, connect, logged_in};

use assay_iscsi::{
    Authentication, ChallengeEntropy, Connection, ConnectionId, Event, LogicalUnitConfig, LoginStatus, Portal,
    SessionDecision, SessionLimit, SessionRequest, Sessions, Target, TargetConfig, Transmit,
};
use ring::rand::{SecureRandom as _, SystemRandom};
use std::collections::HashMap;
use std::io::{IoSlice, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// The target that tests log in to.
pub(crate) const TARGET: &str = "iqn.2026-01.example.assay:disk";
/// The initiator that may.
pub(crate) const INITIATOR: &str = "iqn.2026-01.example.assay:n1";

/// Configuration of a target named [`TARGET`] for [`INITIATOR`], with `blocks` of 512 octets.
pub(crate) fn config(blocks: u64, authentication: Authentication) -> TargetConfig {
    TargetConfig {
        name: TARGET.into(),
        portal: "127.0.0.1:3260".parse().unwrap(),
        initiator: INITIATOR.into(),
        authentication,
        logical_unit: LogicalUnitConfig {
            block_bytes: 512,
            blocks,
            naa: 0x0123_4567_89ab,
            serial: "test0001".into(),
            vendor: "ASSAY".into(),
            product: "RAM DISK".into(),
            read_only: false,
            write_cache: true,
        },
    }
}

/// A portal on a port of its own, served by threads until it is dropped.
pub(crate) struct Server {
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

struct Shared {
    address: SocketAddr,
    portal: Arc<Portal>,
    disk: Arc<RamDisk>,
    stopping: AtomicBool,
    /// A login agreed on header digests.
    header_digests: AtomicBool,
    next: AtomicU64,
    open: Mutex<Open>,
    ended: Condvar,
}

struct Open {
    sessions: Sessions,
    streams: HashMap<ConnectionId, TcpStream>,
}

impl Server {
    /// Serves one target on 127.0.0.1, on `port` or one of its own (0).
    pub(crate) fn start(port: u16, mut config: TargetConfig, limit: SessionLimit) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let address = listener.local_addr().unwrap();
        config.portal = address;
        let disk = Arc::new(RamDisk::new(config.logical_unit.blocks, config.logical_unit.block_bytes));
        let portal = Arc::new(Portal::default());
        portal.insert(Arc::new(Target::new(config).unwrap()));
        let open = Open { sessions: Sessions::new(limit), streams: HashMap::new() };
        let shared = Arc::new(Shared {
            address,
            portal,
            disk,
            stopping: AtomicBool::new(false),
            header_digests: AtomicBool::new(false),
            next: AtomicU64::new(0),
            open: Mutex::new(open),
            ended: Condvar::new(),
        });
        let accept = std::thread::spawn({
            let shared = shared.clone();
            move || shared.accept(&listener)
        });
        Self { shared, accept: Some(accept) }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// Whether any login agreed on header digests.
    pub(crate) fn has_agreed_on_header_digests(&self) -> bool {
        self.shared.header_digests.load(Ordering::SeqCst)
    }

    /// Waits until it is stopped from elsewhere.
    pub(crate) fn wait(mut self) {
        if let Some(accept) = self.accept.take() {
            accept.join().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for stream in self.shared.open.lock().unwrap().streams.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        // Wakes `accept`.
        let _ = TcpStream::connect(self.shared.address);
        if let Some(accept) = self.accept.take() {
            accept.join().unwrap();
        }
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        let mut threads = Vec::new();
        for stream in listener.incoming() {
            if self.stopping.load(Ordering::SeqCst) {
                break;
            }
            let stream = stream.unwrap();
            stream.set_nodelay(true).unwrap();
            let id = ConnectionId(self.next.fetch_add(1, Ordering::SeqCst));
            self.open.lock().unwrap().streams.insert(id, stream.try_clone().unwrap());
            let shared = self.clone();
            threads.push(std::thread::spawn(move || shared.serve(id, stream)));
        }
        for thread in threads {
            thread.join().unwrap();
        }
    }

    fn serve(&self, id: ConnectionId, mut stream: TcpStream) {
        let mut entropy = [0; 33];
        SystemRandom::new().fill(&mut entropy).unwrap();
        let mut connection = Connection::new(self.portal.clone(), ChallengeEntropy(entropy));
        while self.turn(&mut connection, id, &mut stream).is_some() {}
        drop(connection);
        let mut open = self.open.lock().unwrap();
        open.streams.remove(&id);
        open.sessions.leave(TARGET, id);
        // The peer may hold its side open for long.
        let _ = stream.shutdown(Shutdown::Both);
        self.ended.notify_all();
    }

    /// Reads once and does all that follows; `None` when the connection is over.
    fn turn(&self, connection: &mut Connection, id: ConnectionId, stream: &mut TcpStream) -> Option<()> {
        let mut closing = false;
        if let Some(buffer) = connection.receive_buffer() {
            let mut piece = [0; 128 * 1024];
            let octets = stream.read(&mut piece).ok().filter(|octets| *octets > 0)?;
            buffer.extend_from_slice(&piece[..octets]);
        }
        loop {
            if let Err(error) = connection.process() {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                eprintln!("connection {}: {error}: {cause}", id.0);
            }
            let mut moved = false;
            while let Some(event) = connection.poll_event() {
                moved = true;
                match event {
                    Event::Io(request) => connection.complete(request.tag, self.disk.run(request.io)),
                    Event::SessionWanted(request) => self.register(connection, id, &request),
                    Event::LoggedIn | Event::LoggedOut => {}
                    Event::Close => closing = true,
                }
            }
            let batch: Vec<Transmit> = std::iter::from_fn(|| connection.poll_transmit()).take(64).collect();
            let agreed = b"HeaderDigest=CRC32C\0";
            let login = |transmit: &&Transmit| transmit.slices()[0][0] == 0x23;
            if batch
                .iter()
                .filter(login)
                .any(|answer| answer.slices()[1].windows(agreed.len()).any(|key| key == agreed))
            {
                self.header_digests.store(true, Ordering::SeqCst);
            }
            send(stream, &batch)?;
            if !moved && batch.is_empty() {
                break;
            }
        }
        (!closing).then_some(())
    }

    fn register(&self, connection: &mut Connection, id: ConnectionId, request: &SessionRequest) {
        let mut open = self.open.lock().unwrap();
        match open.sessions.admit(request, id) {
            SessionDecision::New(tsih) => connection.admit(tsih),
            SessionDecision::Refused => connection.refuse(LoginStatus::AuthorizationFailure),
            SessionDecision::Reinstated { tsih, closes } => {
                if let Some(old) = open.streams.get(&closes) {
                    let _ = old.shutdown(Shutdown::Both);
                }
                let gone = self.ended.wait_while(open, |open| open.streams.contains_key(&closes)).unwrap();
                drop(gone);
                connection.admit(tsih);
            }
        }
    }
}

/// Sends all of a batch by vectored writes.
fn send(stream: &mut TcpStream, batch: &[Transmit]) -> Option<()> {
    let mut slices: Vec<IoSlice<'_>> =
        batch.iter().flat_map(Transmit::slices).filter(|slice| !slice.is_empty()).map(IoSlice::new).collect();
    let mut slices = slices.as_mut_slice();
    while !slices.is_empty() {
        let written = stream.write_vectored(slices).ok().filter(|written| *written > 0)?;
        IoSlice::advance_slices(&mut slices, written);
    }
    Some(())
}
