//! One TCP connection, from its first octet to its last: login, session registry, full feature phase.
//!
//! ```text
//! Login ──decided──▶ Waiting (session registry) ──admit──▶ FullFeature ──logout, protocol error──▶ Closed
//!   └────────────────refused──────┴──refuse────────────────────────────────────────────────────────▲
//! ```

use crate::error::ProtocolError;
use crate::framer::Framer;
use crate::full_feature::{FullFeature, Reject, reject};
use crate::io::{Event, IoResult, IoTag, SessionRequest};
use crate::link::{Link, StatSn};
use crate::login::{ChallengeEntropy, Identity, Login, LoginStatus, SessionKind, Step};
use crate::negotiation::{DEFAULT_SEGMENT_OCTETS, Parameters, RECEIVE_SEGMENT_OCTETS};
use crate::pdu::{Answer, Header, Pdu, Transmit};
use crate::sessions::Tsih;
use crate::target::Directory;
use bytes::{Bytes, BytesMut};
use std::sync::Arc;

/// The engine of one connection. See the crate's page for the driver's loop.
///
/// When the connection ends, for whatever reason, the driver drops it, after every [`crate::IoRequest`] that it took
/// has ended: only then may the session be replaced.
pub struct Connection {
    framer: Framer,
    link: Link,
    phase: Phase,
}

enum Phase {
    Login(Box<Login>),
    Waiting(Box<Waiting>),
    FullFeature(Box<FullFeature>),
    Closed,
}

/// A login that only lacks the registry's word.
struct Waiting {
    request: Header,
    flags: u8,
    text: Vec<u8>,
    identity: Identity,
    parameters: Parameters,
}

impl Connection {
    /// A new connection to a portal with these targets. `entropy` is fresh from a secure source.
    pub fn new(directory: Arc<dyn Directory>, entropy: ChallengeEntropy) -> Self {
        Self {
            framer: Framer::new(DEFAULT_SEGMENT_OCTETS),
            link: Link::new(),
            phase: Phase::Login(Box::new(Login::new(directory, entropy))),
        }
    }

    /// Where to append what the socket gives, with room to spare; then call [`Self::process`]. `None` while nothing
    /// more is to be read: the initiator must first take what is queued for it, or the login awaits the registry.
    pub fn receive_buffer(&mut self) -> Option<&mut BytesMut> {
        match self.phase {
            Phase::Waiting(_) | Phase::Closed => None,
            Phase::Login(_) | Phase::FullFeature(_) if self.link.is_backlogged() => None,
            Phase::Login(_) | Phase::FullFeature(_) => Some(self.framer.buffer()),
        }
    }

    /// Decodes what was received, as far as it goes now: call it after reading and after taking transmits. On an error
    /// the connection is closed; [`Event::Close`] says so as well.
    pub fn process(&mut self) -> Result<(), ProtocolError> {
        while !self.link.is_backlogged() && matches!(self.phase, Phase::Login(_) | Phase::FullFeature(_)) {
            let taken = match self.framer.next() {
                Ok(None) => return Ok(()),
                Ok(Some(pdu)) => self.take(&pdu),
                Err(error) => Err(ProtocolError::Frame(error)),
            };
            if let Err(error) = taken {
                self.close();
                return Err(error);
            }
            self.close_if_ending();
        }
        Ok(())
    }

    /// The next thing for the driver to do.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.link.poll_event()
    }

    /// The next PDU to send. Take as many as one vectored write carries. Taking one frees its share of memory, so that
    /// tasks that waited for it go on: poll for events again afterwards.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        let transmit = self.link.poll_transmit()?;
        if transmit.releases > 0
            && let Phase::FullFeature(session) = &mut self.phase
        {
            session.release(&mut self.link, transmit.releases);
        }
        Some(transmit)
    }

    /// The backend has finished `tag`. Tags that are not outstanding are ignored.
    pub fn complete(&mut self, tag: IoTag, result: IoResult) {
        if let Phase::FullFeature(session) = &mut self.phase {
            session.complete(&mut self.link, tag, result);
        }
        self.close_if_ending();
    }

    /// The registry admits the login that [`Event::SessionWanted`] told of.
    pub fn admit(&mut self, tsih: Tsih) {
        let Phase::Waiting(waiting) = std::mem::replace(&mut self.phase, Phase::Closed) else {
            self.close();
            return;
        };
        let Waiting { request, flags, text, identity, parameters } = *waiting;
        answer_login(&mut self.link, &request, flags, Some(tsih), text);
        self.link.digests = parameters.digests;
        self.framer.set_limits(parameters.digests, RECEIVE_SEGMENT_OCTETS);
        self.phase = Phase::FullFeature(Box::new(FullFeature::new(identity, parameters)));
        self.link.raise(Event::LoggedIn);
    }

    /// The registry refuses that login.
    pub fn refuse(&mut self, status: LoginStatus) {
        if let Phase::Waiting(waiting) = &self.phase {
            refuse_login(&mut self.link, &waiting.request, status);
        }
        self.close();
    }

    /// Whether the full feature phase is reached; until then the driver's login timeout runs.
    pub fn is_logged_in(&self) -> bool {
        matches!(self.phase, Phase::FullFeature(_))
    }

    /// Asks the initiator for a sign of life (NOP-In). Nothing happens before login, or while one is unanswered.
    pub fn ping(&mut self) {
        if let Phase::FullFeature(session) = &mut self.phase {
            session.ping(&mut self.link);
        }
    }

    /// Whether a ping is unanswered: the driver closes the connection when that lasts too long.
    pub fn is_ping_unanswered(&self) -> bool {
        matches!(&self.phase, Phase::FullFeature(session) if session.is_ping_unanswered())
    }

    /// Asks the initiator to log out within `seconds` (asynchronous message, event 1). Revocation does not depend on
    /// it: the driver closes the connection anyway.
    pub fn request_logout(&mut self, seconds: u16) {
        if let Phase::FullFeature(session) = &mut self.phase {
            session.request_logout(&mut self.link, seconds);
        }
    }

    fn take(&mut self, pdu: &Pdu) -> Result<(), ProtocolError> {
        match &mut self.phase {
            Phase::FullFeature(session) => {
                session.take(&mut self.link, pdu).inspect_err(|_| reject(&mut self.link, &pdu.header, Reject::Protocol))
            }
            Phase::Login(login) => {
                // Answers count from the initiator's own expectation, and commands from its first number.
                if self.link.stat_sn == 0 {
                    self.link.stat_sn = pdu.header.word(28);
                }
                self.link.exp_cmd_sn = pdu.header.word(24);
                let step = login.request(pdu);
                self.step(&pdu.header, step);
                Ok(())
            }
            Phase::Waiting(_) | Phase::Closed => Ok(()),
        }
    }

    fn step(&mut self, request: &Header, step: Step) {
        match step {
            Step::Answer { flags, text } => answer_login(&mut self.link, request, flags, None, text),
            Step::Refuse(status) => {
                refuse_login(&mut self.link, request, status);
                self.close();
            }
            Step::Finish { flags, text } => {
                let Phase::Login(login) = std::mem::replace(&mut self.phase, Phase::Closed) else { return };
                let Login { identity, parameters, .. } = *login;
                // A login is decided only after its names were read.
                let Some(identity) = identity else { return };
                self.link.raise(Event::SessionWanted(SessionRequest {
                    target: match &identity.kind {
                        SessionKind::Normal(target) => Some(target.name().to_owned()),
                        SessionKind::Discovery(_) => None,
                    },
                    initiator: identity.initiator.clone(),
                    isid: identity.isid,
                }));
                self.phase = Phase::Waiting(Box::new(Waiting { request: *request, flags, text, identity, parameters }));
            }
        }
    }

    fn close_if_ending(&mut self) {
        if self.link.ending && !matches!(self.phase, Phase::Closed) {
            self.close();
        }
    }

    fn close(&mut self) {
        self.phase = Phase::Closed;
        self.link.raise(Event::Close);
    }
}

fn answer_login(link: &mut Link, request: &Header, flags: u8, tsih: Option<Tsih>, text: Vec<u8>) {
    let header = Header::answer(Answer::Login, flags)
        .set(8, &request.array::<6>(8))
        .set(14, &tsih.map_or(0, Tsih::get).to_be_bytes())
        .set_word(16, request.task_tag());
    link.send(header, Bytes::from(text), StatSn::Advance, 0);
}

fn refuse_login(link: &mut Link, request: &Header, status: LoginStatus) {
    tracing::info!(event = "iscsi-login-refused", ?status, isid = hex::encode(request.array::<6>(8)));
    let header = Header::answer(Answer::Login, 0)
        .set(8, &request.array::<8>(8))
        .set_word(16, request.task_tag())
        .set(36, &(status as u16).to_be_bytes());
    link.send(header, Bytes::new(), StatSn::Advance, 0);
}
