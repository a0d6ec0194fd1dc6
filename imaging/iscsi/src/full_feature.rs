//! The full feature phase (RFC 7143 §4.2, §11): takes one PDU at a time, in command order, and keeps the tasks.
//!
//! SCSI commands and their data are in [`crate::task`], task management in [`crate::management`]; here is everything
//! else: sequencing, NOP, text, logout, reject.

use crate::error::ProtocolError;
use crate::io::{Event, IoTag};
use crate::link::{Link, StatSn, WINDOW};
use crate::login::{Identity, SessionKind};
use crate::management::PendingFunction;
use crate::negotiation::Parameters;
use crate::pdu::{Answer, CONTINUE, FINAL, Header, Opcode, Pdu, RESERVED_TAG};
use crate::scsi::{Attachment, Nexus};
use crate::tags::TagMap;
use crate::target::{PORTAL_GROUP_TAG, Target};
use crate::task::Task;
use crate::text;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;

/// Most octets of one text request, over its PDUs.
const TEXT_LIMIT: usize = 16 * 1024;
/// Immediate SCSI commands that may be outstanding beside the window.
pub(crate) const IMMEDIATE_LIMIT: u32 = 8;

/// Reject reasons (RFC 7143 §11.17.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reject {
    Protocol = 0x04,
    CommandNotSupported = 0x05,
    TooManyImmediate = 0x06,
    TaskInProgress = 0x07,
    InvalidField = 0x09,
}

/// A logged-in connection.
pub(crate) struct FullFeature {
    pub(crate) kind: Kind,
    cid: u16,
    pub(crate) parameters: Parameters,
    pub(crate) tasks: TagMap<u32, Task>,
    /// Who waits for each backend operation.
    pub(crate) running: TagMap<IoTag, Owner>,
    /// Tasks that wait for memory, oldest first.
    pub(crate) waiting: VecDeque<u32>,
    pub(crate) functions: Vec<PendingFunction>,
    /// Octets of task data held or promised.
    pub(crate) held_octets: usize,
    pub(crate) immediate: u32,
    next_io: u64,
    next_transfer_tag: u32,
    request: Vec<u8>,
    answer: Bytes,
    /// The target transfer tag by which the text under way is continued.
    text_tag: Option<u32>,
    ping: Option<u32>,
}

/// What the session is for.
pub(crate) enum Kind {
    Normal { target: Arc<Target>, attachment: Attachment },
    Discovery(Vec<Arc<Target>>),
}

/// Who a backend's answer is for.
#[derive(Debug)]
pub(crate) enum Owner {
    /// The task with this initiator task tag.
    Task(u32),
    /// A task that was aborted: its end is counted by the functions that aborted it.
    Aborted { held_octets: usize, immediate: bool },
}

impl FullFeature {
    pub(crate) fn new(identity: Identity, parameters: Parameters) -> Self {
        let kind = match identity.kind {
            SessionKind::Normal(target) => {
                let attachment = target.unit().attach(Nexus(identity.isid));
                Kind::Normal { target, attachment }
            }
            SessionKind::Discovery(targets) => Kind::Discovery(targets),
        };
        Self {
            kind,
            cid: identity.cid,
            parameters,
            tasks: TagMap::default(),
            running: TagMap::default(),
            waiting: VecDeque::new(),
            functions: Vec::new(),
            held_octets: 0,
            immediate: 0,
            next_io: 0,
            next_transfer_tag: 0,
            request: Vec::new(),
            answer: Bytes::new(),
            text_tag: None,
            ping: None,
        }
    }

    /// Takes one PDU.
    pub(crate) fn take(&mut self, link: &mut Link, pdu: &Pdu) -> Result<(), ProtocolError> {
        let header = &pdu.header;
        let Some(opcode) = header.opcode() else {
            reject(link, header, Reject::CommandNotSupported);
            return Ok(());
        };
        match opcode {
            // No sequence number of their own.
            Opcode::DataOut => return self.data_out(link, pdu),
            Opcode::Snack => {
                reject(link, header, Reject::CommandNotSupported);
                return Ok(());
            }
            Opcode::Login => return Err(ProtocolError::UnexpectedPdu { opcode: header.0[0] & 0x3f }),
            Opcode::NopOut | Opcode::ScsiCommand | Opcode::TaskManagement | Opcode::Text | Opcode::Logout => {}
        }
        if !sequence(link, header)? {
            return Ok(());
        }
        match opcode {
            Opcode::NopOut => self.nop_out(link, pdu),
            Opcode::ScsiCommand => self.scsi_command(link, pdu)?,
            Opcode::TaskManagement => self.manage(link, header),
            Opcode::Text => self.text(link, pdu)?,
            Opcode::Logout => self.logout(link, header),
            Opcode::DataOut | Opcode::Snack | Opcode::Login => {}
        }
        Ok(())
    }

    /// A tag for the next backend operation.
    pub(crate) fn new_io_tag(&mut self) -> IoTag {
        self.next_io += 1;
        IoTag(self.next_io)
    }

    /// A target transfer tag that is not the reserved one.
    pub(crate) fn new_transfer_tag(&mut self) -> u32 {
        self.next_transfer_tag = (self.next_transfer_tag + 1) % RESERVED_TAG;
        self.next_transfer_tag
    }

    pub(crate) fn ping(&mut self, link: &mut Link) {
        if self.ping.is_none() {
            let tag = self.new_transfer_tag();
            self.ping = Some(tag);
            let header = Header::answer(Answer::NopIn, FINAL).set_word(16, RESERVED_TAG).set_word(20, tag);
            link.send(header, Bytes::new(), StatSn::Show, 0);
        }
    }

    pub(crate) fn is_ping_unanswered(&self) -> bool {
        self.ping.is_some()
    }

    pub(crate) fn request_logout(&mut self, link: &mut Link, seconds: u16) {
        let header = Header::answer(Answer::AsyncMessage, FINAL)
            .set_word(16, RESERVED_TAG)
            .set(36, &[1])
            .set(42, &seconds.to_be_bytes());
        link.send(header, Bytes::new(), StatSn::Advance, 0);
    }

    fn nop_out(&mut self, link: &mut Link, pdu: &Pdu) {
        let header = &pdu.header;
        if header.task_tag() == RESERVED_TAG {
            // The answer to a ping of ours.
            if self.ping == Some(header.word(20)) {
                self.ping = None;
            }
            return;
        }
        let echo = pdu.data.slice(..pdu.data.len().min(self.parameters.send_segment_octets));
        let answer = Header::answer(Answer::NopIn, FINAL)
            .set(8, &header.lun())
            .set_word(16, header.task_tag())
            .set_word(20, RESERVED_TAG);
        link.send(answer, echo, StatSn::Advance, 0);
    }

    /// Text request (§11.10): SendTargets, and politeness towards everything else.
    fn text(&mut self, link: &mut Link, pdu: &Pdu) -> Result<(), ProtocolError> {
        let header = &pdu.header;
        if header.word(20) == RESERVED_TAG {
            // A new request drops what was left of the one before.
            self.request.clear();
            self.answer = Bytes::new();
        } else if self.text_tag != Some(header.word(20)) {
            reject(link, header, Reject::InvalidField);
            return Ok(());
        }
        if self.request.len() + pdu.data.len() > TEXT_LIMIT {
            return Err(ProtocolError::Text(text::TextError::TooLong { limit: TEXT_LIMIT }));
        }
        self.request.extend_from_slice(&pdu.data);
        if header.flags() & CONTINUE != 0 {
            self.send_text(link, header, 0, Bytes::new());
            return Ok(());
        }
        if !self.request.is_empty() {
            let request = std::mem::take(&mut self.request);
            self.answer = self.text_answer(&request).map_err(ProtocolError::Text)?.into();
        }
        let piece = self.answer.split_to(self.answer.len().min(self.parameters.send_segment_octets));
        let flags = if !self.answer.is_empty() {
            CONTINUE
        } else if header.is_final() {
            FINAL
        } else {
            0
        };
        self.send_text(link, header, flags, piece);
        Ok(())
    }

    fn text_answer(&mut self, request: &[u8]) -> Result<Vec<u8>, text::TextError> {
        let mut answer = Vec::new();
        for (key, value) in text::parse(request)? {
            if key != "SendTargets" {
                let known = Parameters::default().settle(key, value).as_deref() != Some("NotUnderstood");
                text::append(&mut answer, key, if known { "Reject" } else { "NotUnderstood" });
                continue;
            }
            let targets: Vec<&Arc<Target>> = match &self.kind {
                Kind::Discovery(targets) => {
                    targets.iter().filter(|target| value == "All" || target.name() == value).collect()
                }
                // §Appendix C: in a normal session an empty value means this session's target.
                Kind::Normal { target, .. } if value.is_empty() || value == target.name() => vec![target],
                Kind::Normal { .. } => Vec::new(),
            };
            for target in targets {
                text::append(&mut answer, "TargetName", target.name());
                let address = format!("{},{PORTAL_GROUP_TAG}", target.config().portal);
                text::append(&mut answer, "TargetAddress", &address);
            }
        }
        Ok(answer)
    }

    fn send_text(&mut self, link: &mut Link, request: &Header, flags: u8, text: Bytes) {
        self.text_tag = if flags & FINAL != 0 { None } else { Some(self.new_transfer_tag()) };
        let transfer_tag = self.text_tag.unwrap_or(RESERVED_TAG);
        let header = Header::answer(Answer::Text, flags)
            .set(8, &request.lun())
            .set_word(16, request.task_tag())
            .set_word(20, transfer_tag);
        link.send(header, text, StatSn::Advance, 0);
    }

    fn logout(&mut self, link: &mut Link, header: &Header) {
        let reason = header.flags() & 0x7f;
        // 0: done. 1: no such connection. 2: no recovery at this error recovery level.
        let response = match reason {
            0 => 0,
            1 if header.half(20) == self.cid => 0,
            1 => 1,
            _ => 2,
        };
        let answer = Header::answer(Answer::Logout, FINAL).set(2, &[response]).set_word(16, header.task_tag());
        link.send(answer, Bytes::new(), StatSn::Advance, 0);
        if response == 0 {
            link.raise(Event::LoggedOut);
            link.ending = true;
        }
    }
}

impl Drop for FullFeature {
    /// The I_T nexus is lost with its connection.
    fn drop(&mut self) {
        if let Kind::Normal { target, attachment } = &self.kind {
            target.unit().detach(*attachment);
        }
    }
}

/// Sends a Reject with the header it is about (§11.17).
pub(crate) fn reject(link: &mut Link, rejected: &Header, reason: Reject) {
    let header = Header::answer(Answer::Reject, FINAL).set(2, &[reason as u8]).set_word(16, RESERVED_TAG);
    link.send(header, Bytes::copy_from_slice(&rejected.0), StatSn::Advance, 0);
}

/// Whether a numbered PDU is to be carried out (§4.2.2.1): immediate ones are; the next of the window is, and moves
/// it; what lies outside the window is ignored silently. A gap ends the connection: commands arrive in order on the
/// one that a session has here, so it would never be filled.
fn sequence(link: &mut Link, header: &Header) -> Result<bool, ProtocolError> {
    if header.immediate() {
        return Ok(true);
    }
    let received = header.word(24);
    let ahead = received.wrapping_sub(link.exp_cmd_sn);
    let open = WINDOW.saturating_sub(link.outstanding);
    if ahead >= open {
        return Ok(false);
    }
    if ahead > 0 {
        return Err(ProtocolError::CommandGap { received, expected: link.exp_cmd_sn });
    }
    link.exp_cmd_sn = link.exp_cmd_sn.wrapping_add(1);
    Ok(true)
}
