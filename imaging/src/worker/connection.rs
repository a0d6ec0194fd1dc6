//! One initiator's TCP connection, on a thread of its own: moves octets between the socket, the engine and the unit.
//!
//! What needs no waiting is done here and answered in one go: reads from the page cache, writes into it. All else goes
//! to the [`super::helpers`]. The thread sleeps in `poll`, with a last look at the socket before that ([`super::pace`]).

use super::helpers::Done;
use super::hub::Hub;
use super::log;
use super::outbox::Outbox;
use super::pace::Pace;
use super::unit::Buffers;
use assay_iscsi::{
    CHALLENGE_OCTETS, ChallengeEntropy, Connection, ConnectionId, Event, Io, IoFault, IoRequest, IoResult, LoginStatus,
    SessionRequest,
};
use assay_service::secret_file;
use bytes::{Bytes, BytesMut};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an initiator may leave what is sent to it untaken.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an initiator is given to log out before its connection is cut.
const LOGOUT_SECONDS: u16 = 1;

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The initiator closed it, logged out, or was refused.
    Closed,
    /// It was replaced, or its export ends.
    Severed,
    /// It did not log in in time.
    LoginTimeout,
    /// It takes nothing.
    Stalled,
    /// The network failed.
    Broken,
}

/// Serves a connection to its end.
pub(super) fn drive(hub: &Arc<Hub>, id: ConnectionId, socket: &OwnedFd, peer: SocketAddr) {
    // What is sent from the page cache has no other way of not blocking.
    if let Err(error) = fcntl_setfl(socket, OFlags::NONBLOCK) {
        tracing::error!(event = "portal.socket_options", %peer, %error, "keeping a connection from blocking");
        return;
    }
    let entropy = ChallengeEntropy(secret_file::random::<{ CHALLENGE_OCTETS + 1 }>());
    let directory = Arc::clone(hub);
    let mut driver = Driver {
        connection: Connection::new(directory, entropy),
        hub,
        id,
        socket,
        outbox: Outbox::default(),
        buffers: Buffers::default(),
        pace: Pace::default(),
        under_way: 0,
        done: None,
        attached: false,
        closing: false,
        login_deadline: Instant::now() + Duration::from_millis(hub.limits.login_ms),
        peer,
    };
    let end = driver.run();
    // Closed first: the initiator need not wait for I/O whose answers it will not get.
    let _closed_already = rustix::net::shutdown(socket, Shutdown::Both);
    driver.finish();
    match end {
        End::Closed | End::Severed => tracing::debug!(event = "portal.closed", %peer, ?end, "connection closed"),
        End::LoginTimeout | End::Stalled | End::Broken => {
            tracing::info!(event = "portal.closed", %peer, ?end, "connection closed");
        }
    }
}

struct Driver<'a> {
    connection: Connection,
    hub: &'a Arc<Hub>,
    id: ConnectionId,
    socket: &'a OwnedFd,
    outbox: Outbox,
    buffers: Buffers,
    pace: Pace,
    /// Operations that the helpers have.
    under_way: usize,
    /// Where they end; made when it is needed.
    done: Option<Arc<Done>>,
    attached: bool,
    closing: bool,
    login_deadline: Instant,
    peer: SocketAddr,
}

impl Driver<'_> {
    fn run(&mut self) -> End {
        loop {
            if let Err(end) = self.advance() {
                return end;
            }
            if self.closing && self.outbox.is_empty() {
                return End::Closed;
            }
            if let Err(end) = self.wait() {
                return end;
            }
        }
    }

    /// Goes on until nothing more can be done without waiting.
    fn advance(&mut self) -> Result<(), End> {
        loop {
            if let Err(error) = self.connection.process() {
                tracing::warn!(event = "portal.protocol_error", peer = %self.peer, %error, "initiator breaks the protocol");
            }
            let mut moved = false;
            // With the outbox full the initiator must take something first: that is what bounds memory.
            while !self.outbox.is_full()
                && let Some(event) = self.connection.poll_event()
            {
                moved = true;
                self.handle(event);
                moved |= self.outbox.fill(&mut self.connection);
                if self.outbox.is_full() {
                    self.send()?;
                }
            }
            moved |= self.outbox.fill(&mut self.connection);
            self.send()?;
            if !moved {
                return Ok(());
            }
        }
    }

    fn send(&mut self) -> Result<(), End> {
        self.outbox.send(self.socket, &self.hub.unit).map_err(|_| End::Broken)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Io(request) => self.start(request),
            Event::SessionWanted(request) => self.log_in(&request),
            Event::LoggedIn | Event::LoggedOut => {}
            Event::Close => self.closing = true,
        }
    }

    fn log_in(&mut self, request: &SessionRequest) {
        match self.hub.attach(request, self.id) {
            Some(tsih) => {
                log::logged_in(self.peer, request);
                self.attached = request.target.is_some();
                self.connection.admit(tsih);
            }
            None => {
                let (target, initiator) = (request.target.as_deref(), request.initiator.as_str());
                tracing::warn!(event = "portal.session_refused", peer = %self.peer, target, initiator, "a session too many");
                self.connection.refuse(LoginStatus::AuthorizationFailure);
            }
        }
    }

    fn start(&mut self, request: IoRequest) {
        let IoRequest { tag, io, in_place } = request;
        let begun = Instant::now();
        let result = match io {
            _ if !self.attached => IoResult::Failed(IoFault::Unavailable),
            Io::Read { lba, blocks } => match self.hub.unit.read_now(lba, blocks, in_place, &mut self.buffers) {
                Some(result) => result,
                None => return self.hand(IoRequest { tag, io, in_place }, begun),
            },
            Io::Write { fua: false, .. } if !self.hub.unit.writes_wait() => self.hub.unit.perform(io, in_place, begun),
            Io::Status { .. } => self.hub.unit.perform(io, in_place, begun),
            Io::Write { .. } | Io::Flush | Io::Unmap { .. } | Io::WriteSame { .. } | Io::CompareAndWrite { .. } => {
                return self.hand(IoRequest { tag, io, in_place }, begun);
            }
        };
        self.connection.complete(tag, result);
    }

    fn hand(&mut self, request: IoRequest, begun: Instant) {
        if self.done.is_none() {
            self.done = Done::new()
                .inspect_err(|error| tracing::error!(event = "portal.no_helpers", %error, "waiting for I/O"))
                .ok();
        }
        match &self.done {
            Some(done) => {
                self.under_way += 1;
                self.hub.helpers.hand(request, begun, done);
            }
            None => self.connection.complete(request.tag, IoResult::Failed(IoFault::Unavailable)),
        }
    }

    fn wait(&mut self) -> Result<(), End> {
        let logging_in = !self.connection.is_logged_in();
        let receiving = !self.closing && self.connection.receive_buffer().is_some();
        // The common case: nothing else can happen but that the initiator speaks, or that the hub wakes us.
        let only_receiving = receiving && !logging_in && self.under_way == 0 && self.outbox.is_empty();
        if only_receiving && self.look()? {
            return Ok(());
        }
        let asleep = Instant::now();
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, receiving);
        wanted.set(PollFlags::OUT, !self.outbox.is_empty());
        let deadline = match (logging_in, self.outbox.is_empty()) {
            (true, _) => Some((self.login_deadline, End::LoginTimeout)),
            (false, false) => Some((self.outbox.last_progress() + STALL_TIMEOUT, End::Stalled)),
            (false, true) => None,
        };
        let timeout = deadline.map(|(at, _)| timespec(at.saturating_duration_since(Instant::now())));
        let mut fds = vec![PollFd::new(self.socket, wanted)];
        fds.extend(
            self.done
                .as_ref()
                .map(|done| PollFd::from_borrowed_fd(std::os::fd::AsFd::as_fd(&done.ready), PollFlags::IN)),
        );
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => deadline.map_or(Ok(()), |(_, end)| Err(end)),
            Ok(_) => {
                let socket = fds[0].revents();
                self.collect();
                if only_receiving {
                    self.pace.slept(asleep.elapsed());
                }
                if receiving && socket.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                    return self.receive().map(drop);
                }
                // Nothing is read now, and nothing can be written any more.
                if socket.intersects(PollFlags::HUP | PollFlags::ERR) { Err(End::Broken) } else { Ok(()) }
            }
            Err(Errno::INTR) => Ok(()),
            Err(_) => Err(End::Broken),
        }
    }

    /// Takes over what the helpers have done.
    fn collect(&mut self) {
        let Some(done) = &self.done else { return };
        for (tag, result) in done.take() {
            self.under_way -= 1;
            self.connection.complete(tag, result);
        }
    }

    /// Receives if there is something; looks for it a little, if more is likely to come soon.
    fn look(&mut self) -> Result<bool, End> {
        let mut pace = std::mem::take(&mut self.pace);
        let received = pace.look(|| match self.receive() {
            Ok(false) => None,
            something => Some(something),
        });
        self.pace = pace;
        received.unwrap_or(Ok(false))
    }

    /// Receives what is there. Whether there was anything.
    fn receive(&mut self) -> Result<bool, End> {
        let Some(buffer) = self.connection.receive_buffer() else { return Ok(false) };
        match append(self.socket, buffer) {
            Ok(0) if self.hub.is_ending() => {
                self.connection.request_logout(LOGOUT_SECONDS);
                self.outbox.fill(&mut self.connection);
                self.send()?;
                Err(End::Severed)
            }
            Ok(0) => Err(End::Closed),
            Ok(_) => Ok(true),
            Err(Errno::INTR | Errno::AGAIN) => Ok(false),
            Err(_) => Err(End::Broken),
        }
    }

    /// Waits until none of its I/O is under way.
    fn finish(&mut self) {
        while self.under_way > 0 {
            let Some(done) = &self.done else { return };
            let mut fds = [PollFd::new(&done.ready, PollFlags::IN)];
            let _interrupted = poll(&mut fds, None);
            self.under_way -= done.take().len();
        }
    }
}

/// Appends what the socket gives to the engine's buffer, into its room, without writing zeros there first: a `Vec` can
/// be filled so without `unsafe`, and a buffer becomes one and a `Vec` a buffer without a copy.
fn append(socket: &OwnedFd, buffer: &mut BytesMut) -> rustix::io::Result<usize> {
    let room = buffer.capacity() - buffer.len();
    let mut octets = Vec::from(std::mem::take(buffer));
    // No room is lost unless the buffer was shared, so that it had to be copied.
    octets.reserve_exact(room);
    let received =
        recv(socket, rustix::buffer::spare_capacity(&mut octets), RecvFlags::empty()).map(|(received, _)| received);
    *buffer = BytesMut::from(Bytes::from(octets));
    received
}

fn timespec(duration: Duration) -> Timespec {
    // A millisecond more, so that a deadline has passed when the wait for it ends.
    let duration = duration + Duration::from_millis(1);
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
