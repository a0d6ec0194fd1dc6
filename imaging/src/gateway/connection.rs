//! One initiator's TCP connection: moves octets between the socket, the engine and the unit.
//!
//! Reads that the page cache can answer are answered here; all other I/O runs on blocking threads, writes that arrived
//! together in one go. When [`drive`] returns, none of it is under way.

use super::hub::{Attached, Hub};
use super::unit::Unit;
use assay_iscsi::{
    CHALLENGE_OCTETS, ChallengeEntropy, Connection, ConnectionId, Directory, Event, Io, IoFault, IoRequest, IoResult,
    IoTag, LoginStatus, SessionRequest, Transmit,
};
use assay_service::{CancellationToken, secret_file};
use bytes::BytesMut;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// From connect to full feature phase.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(15);
/// How long an initiator may leave what is sent to it untaken.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// What is taken from the engine before the socket has taken it.
const OUTBOX_OCTETS: usize = 1 << 20;
/// Pieces in one `writev`; Linux takes at most 1024.
const PIECES_AT_ONCE: usize = 192;

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The initiator closed it, logged out, or was refused.
    Closed,
    /// Its session was severed, or the gateway stops.
    Severed,
    /// It did not log in in time.
    LoginTimeout,
    /// It takes nothing.
    Stalled,
    /// The network failed.
    Broken,
}

/// Serves a connection to its end. `logged_in` is dropped when the login is through: it holds a half-open slot.
pub(super) async fn drive(
    mut stream: TcpStream,
    peer: SocketAddr,
    directory: Arc<dyn Directory>,
    hub: Arc<Hub>,
    half_open: impl Send,
    shutdown: CancellationToken,
) -> End {
    let entropy = ChallengeEntropy(secret_file::random::<{ CHALLENGE_OCTETS + 1 }>());
    let mut driver = Driver {
        connection: Connection::new(directory, entropy),
        id: hub.connection_id(),
        hub,
        attached: None,
        sever: shutdown,
        half_open: Some(half_open),
        outbox: Outbox::default(),
        jobs: JoinSet::new(),
        closing: false,
        login_deadline: Instant::now() + LOGIN_TIMEOUT,
        peer,
    };
    let end = driver.run(&mut stream).await;
    // Closed first: the initiator need not wait for I/O whose answers it will not get.
    drop(stream);
    driver.jobs.abort_all();
    while driver.jobs.join_next().await.is_some() {}
    end
}

struct Driver<S> {
    connection: Connection,
    id: ConnectionId,
    hub: Arc<Hub>,
    attached: Option<Attached>,
    /// The gateway's shutdown at first, then the session's.
    sever: CancellationToken,
    half_open: Option<S>,
    outbox: Outbox,
    jobs: JoinSet<Vec<(IoTag, IoResult)>>,
    closing: bool,
    login_deadline: Instant,
    peer: SocketAddr,
}

impl<S> Driver<S> {
    async fn run(&mut self, stream: &mut TcpStream) -> End {
        let (mut read, mut write) = stream.split();
        loop {
            if let Err(error) = self.connection.process() {
                tracing::warn!(event = "portal.protocol_error", peer = %self.peer, %error, "initiator breaks the protocol");
            }
            self.handle_events().await;
            self.outbox.fill(&mut self.connection);
            if self.closing && self.outbox.is_empty() {
                return End::Closed;
            }
            let logging_in = !self.connection.is_logged_in();
            let sending = !self.outbox.is_empty();
            let stalled = self.outbox.last_progress + STALL_TIMEOUT;
            let attached = self.attached.as_ref().map(|attached| attached.sever.clone());
            tokio::select! {
                biased;
                () = self.sever.cancelled() => return End::Severed,
                () = cancelled(attached) => return End::Severed,
                sent = self.outbox.send(&mut write), if sending => {
                    if sent.is_err() {
                        return End::Broken;
                    }
                }
                Some(done) = self.jobs.join_next() => self.complete(done.unwrap_or_default()),
                got = receive(&mut read, self.connection.receive_buffer()), if !self.closing => match got {
                    Ok(0) => return End::Closed,
                    Ok(_) => {}
                    Err(_) => return End::Broken,
                },
                () = sleep_until(self.login_deadline), if logging_in => return End::LoginTimeout,
                () = sleep_until(stalled), if sending => return End::Stalled,
            }
        }
    }

    async fn handle_events(&mut self) {
        let mut writes = Vec::new();
        while let Some(event) = self.connection.poll_event() {
            match event {
                Event::Io(request) => self.start(request, &mut writes),
                Event::SessionWanted(request) => self.log_in(&request).await,
                Event::LoggedIn => {
                    self.half_open = None;
                }
                Event::LoggedOut => {}
                Event::Close => self.closing = true,
            }
        }
        if !writes.is_empty() {
            self.spawn(writes);
        }
    }

    async fn log_in(&mut self, request: &SessionRequest) {
        match self.hub.attach(request, self.id).await {
            Some(attached) => {
                tracing::info!(event = "portal.logged_in", peer = %self.peer, target = request.target.as_deref(), initiator = request.initiator, "initiator logged in");
                self.connection.admit(attached.tsih);
                self.attached = Some(attached);
            }
            None => {
                tracing::warn!(event = "portal.session_refused", peer = %self.peer, target = request.target.as_deref(), initiator = request.initiator, "a second session, or a target that is gone");
                self.connection.refuse(LoginStatus::AuthorizationFailure);
            }
        }
    }

    /// Answers from the page cache, or hands over to a blocking thread.
    fn start(&mut self, request: IoRequest, writes: &mut Vec<IoRequest>) {
        let Some(unit) = self.unit() else {
            self.connection.complete(request.tag, IoResult::Failed(IoFault::Unavailable));
            return;
        };
        if let Some(result) = unit.try_now(&request.io) {
            self.connection.complete(request.tag, result);
            return;
        }
        match request.io {
            Io::Write { .. } => writes.push(request),
            Io::Read { .. }
            | Io::Flush
            | Io::Unmap { .. }
            | Io::WriteSame { .. }
            | Io::CompareAndWrite { .. }
            | Io::Status { .. } => self.spawn(vec![request]),
        }
    }

    fn spawn(&mut self, requests: Vec<IoRequest>) {
        let Some(unit) = self.unit() else { return };
        self.jobs.spawn_blocking(move || {
            requests.into_iter().map(|request| (request.tag, unit.perform(request.io))).collect()
        });
    }

    fn complete(&mut self, done: Vec<(IoTag, IoResult)>) {
        for (tag, result) in done {
            self.connection.complete(tag, result);
        }
    }

    fn unit(&self) -> Option<Arc<Unit>> {
        self.attached.as_ref().and_then(|attached| attached.unit.clone())
    }
}

/// PDUs on their way out.
struct Outbox {
    queue: VecDeque<Transmit>,
    octets: usize,
    /// Octets of the first one that are sent.
    sent: usize,
    last_progress: Instant,
}

impl Default for Outbox {
    fn default() -> Self {
        Self { queue: VecDeque::new(), octets: 0, sent: 0, last_progress: Instant::now() }
    }
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    fn fill(&mut self, connection: &mut Connection) {
        if self.is_empty() {
            self.last_progress = Instant::now();
        }
        while self.octets < OUTBOX_OCTETS {
            let Some(transmit) = connection.poll_transmit() else { return };
            self.octets += transmit.octets();
            self.queue.push_back(transmit);
        }
    }

    /// Sends what the socket takes at once. Safe to cancel: either octets were sent and counted, or none were.
    async fn send(&mut self, socket: &mut WriteHalf<'_>) -> io::Result<()> {
        let sent = {
            let mut skip = self.sent;
            let mut pieces = Vec::with_capacity(PIECES_AT_ONCE);
            for piece in self.queue.iter().flat_map(Transmit::slices) {
                let skipped = skip.min(piece.len());
                skip -= skipped;
                if piece.len() > skipped {
                    pieces.push(IoSlice::new(&piece[skipped..]));
                }
                if pieces.len() == PIECES_AT_ONCE {
                    break;
                }
            }
            socket.write_vectored(&pieces).await?
        };
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.last_progress = Instant::now();
        self.octets -= sent;
        self.sent += sent;
        while let Some(first) = self.queue.front() {
            if self.sent < first.octets() {
                break;
            }
            self.sent -= first.octets();
            self.queue.pop_front();
        }
        Ok(())
    }
}

async fn receive(socket: &mut ReadHalf<'_>, buffer: Option<&mut BytesMut>) -> io::Result<usize> {
    match buffer {
        Some(buffer) => socket.read_buf(buffer).await,
        None => std::future::pending().await,
    }
}

async fn cancelled(token: Option<CancellationToken>) {
    match token {
        Some(token) => token.cancelled().await,
        None => std::future::pending().await,
    }
}
