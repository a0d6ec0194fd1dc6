//! SCSI tasks (RFC 7143 §4.2.5, §11.3–11.8): a command, its data-out by immediate, unsolicited and solicited PDUs, its
//! I/O, its data-in and its status with residuals.
//!
//! ```text
//! command ─┬─▶ Collecting ──all data──▶ Running ──answer──▶ response
//!          ├─▶ Draining (refused, data still coming) ─────▶ response
//!          └─▶ Queued (no memory yet) ──▶ Running
//! ```

use crate::error::ProtocolError;
use crate::full_feature::{FullFeature, IMMEDIATE_LIMIT, Kind, Owner, Reject, reject};
use crate::io::{Event, Io, IoFault, IoRequest, IoResult, IoTag};
use crate::link::{Link, StatSn};
use crate::pdu::{Answer, FINAL, Header, Payload, Pdu, RESERVED_TAG};
use crate::response::{Residual, respond};
use crate::scsi::{self, Cdb, Completion, Finished, Plan, Purpose, Refusal, Rest, Sense, Status};
use crate::target::Target;
use bytes::{BufMut as _, Bytes, BytesMut};
use std::sync::Arc;

/// Task data held or promised at once, in octets. A task that needs more than is free waits; four of the largest fit.
const HELD_LIMIT: usize = 4 * scsi::MAX_TRANSFER_OCTETS as usize;

/// Data-out in pieces below this length is put together: a piece costs memory of its own beside its octets.
const PIECE_OCTETS: usize = 8 * 1024;
/// Pieces that are put together grow to this length.
const JOINED_OCTETS: usize = 64 * 1024;

/// One task that is not finished.
pub(crate) struct Task {
    lun: [u8; 8],
    pub(crate) immediate: bool,
    /// Expected data transfer length: what the initiator has room for, or offers.
    expected_octets: u32,
    /// What the command transfers by its CDB, where that is data-out.
    wanted_octets: u32,
    pub(crate) held_octets: usize,
    sent: Sent,
    pub(crate) state: State,
}

/// Data-in of earlier parts of a READ.
#[derive(Debug, Clone, Copy, Default)]
struct Sent {
    octets: u32,
    data_sn: u32,
}

pub(crate) enum State {
    Collecting(Collecting),
    /// The outcome is known, but unsolicited data are still on their way.
    Draining(Result<(), Refusal>),
    /// Waits for memory.
    Queued(Io, Completion),
    Running(IoTag, Completion),
    /// Being handled; never seen from outside.
    Moving,
}

/// Data-out on its way.
pub(crate) struct Collecting {
    purpose: Purpose,
    /// Octets that the command takes; what comes beyond them is dropped.
    take_octets: u32,
    received_octets: u32,
    data: Vec<Bytes>,
    /// The latest small pieces, put together.
    joined: BytesMut,
    data_sn: u32,
    r2t_sn: u32,
    source: Source,
}

/// What the next Data-Out PDU answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// Nothing: it comes unsolicited.
    Unsolicited,
    /// This R2T, which ends at this offset.
    Solicited { transfer_tag: u32, end: u32 },
    /// No PDU may come: the next R2T waits for memory.
    Nothing,
}

/// What a data-out PDU leads to.
enum Arrival {
    More,
    BurstDone,
    Broken,
}

impl FullFeature {
    /// A SCSI command PDU (§11.3).
    pub(crate) fn scsi_command(&mut self, link: &mut Link, pdu: &Pdu) -> Result<(), ProtocolError> {
        let header = &pdu.header;
        let task_tag = header.task_tag();
        let Kind::Normal { target, attachment } = &self.kind else {
            return Err(ProtocolError::UnexpectedPdu { opcode: header.0[0] & 0x3f });
        };
        if task_tag == RESERVED_TAG {
            return Err(ProtocolError::TaskTag { task_tag });
        }
        if self.tasks.contains_key(&task_tag) {
            reject(link, header, Reject::TaskInProgress);
            return Ok(());
        }
        if header.immediate() && self.immediate >= IMMEDIATE_LIMIT {
            reject(link, header, Reject::TooManyImmediate);
            return Ok(());
        }
        let (reads, writes) = (header.flags() & 0x40 != 0, header.flags() & 0x20 != 0);
        let unsolicited = writes && !header.is_final();
        let limit = self.parameters.first_burst_octets as usize;
        let too_much = pdu.data.len() > limit || (!pdu.data.is_empty() && !self.parameters.immediate_data);
        if too_much || (unsolicited && self.parameters.initial_r2t) {
            return Err(ProtocolError::UnexpectedData { task_tag });
        }
        let plan = scsi::plan(target, attachment.nexus, header.lun(), &Cdb(header.array(32)));
        let mut task = Task {
            lun: header.lun(),
            immediate: header.immediate(),
            expected_octets: if reads || writes { header.word(20) } else { 0 },
            wanted_octets: 0,
            held_octets: 0,
            sent: Sent::default(),
            state: State::Moving,
        };
        if task.immediate {
            self.immediate += 1;
        } else {
            link.outstanding += 1;
        }
        let outcome = match plan {
            Ok(Plan::Collect(wanted_octets, purpose)) => {
                task.wanted_octets = wanted_octets;
                if !purpose.is_exact() || task.expected_octets == wanted_octets {
                    task.hold(&mut self.held_octets, pdu.data.len());
                    let take_octets = if writes { wanted_octets.min(task.expected_octets) } else { 0 };
                    task.state = State::Collecting(Collecting::new(purpose, take_octets, unsolicited, &pdu.data));
                    self.tasks.insert(task_tag, task);
                    if !unsolicited {
                        self.collect_more(link, task_tag);
                    }
                    return Ok(());
                }
                Err(Sense::INVALID_FIELD_IN_CDB.into())
            }
            other => other,
        };
        if unsolicited {
            // Data-in with unsolicited data-out is no command that exists here.
            task.state = State::Draining(outcome.map(|_| ()));
            self.tasks.insert(task_tag, task);
        } else {
            self.tasks.insert(task_tag, task);
            self.follow(link, task_tag, outcome);
        }
        Ok(())
    }

    /// A Data-Out PDU (§11.7). Those of tasks that are gone are dropped: they may have been on their way.
    pub(crate) fn data_out(&mut self, link: &mut Link, pdu: &Pdu) -> Result<(), ProtocolError> {
        let header = &pdu.header;
        let task_tag = header.task_tag();
        let Some(task) = self.tasks.get_mut(&task_tag) else {
            return Ok(());
        };
        let collecting = match &mut task.state {
            State::Collecting(collecting) => collecting,
            State::Draining(_) => {
                if header.is_final() {
                    self.drained(link, task_tag);
                }
                return Ok(());
            }
            State::Queued(..) | State::Running(..) | State::Moving => {
                return Err(ProtocolError::UnexpectedData { task_tag });
            }
        };
        let source = collecting.source;
        let arrival = collecting.arrive(pdu, self.parameters.first_burst_octets)?;
        if source == Source::Unsolicited {
            // Solicited data were accounted for when they were asked for.
            task.hold(&mut self.held_octets, pdu.data.len());
        }
        match arrival {
            Arrival::More => {}
            Arrival::BurstDone => self.collect_more(link, task_tag),
            Arrival::Broken => self.follow(link, task_tag, Err(Sense::DATA_PHASE.into())),
        }
        Ok(())
    }

    /// The backend finished an operation.
    pub(crate) fn complete(&mut self, link: &mut Link, tag: IoTag, mut result: IoResult) {
        if link.digests.data && matches!(result, IoResult::InPlace(_)) {
            // Not what was asked for: there is no digest of data that are elsewhere.
            result = IoResult::Failed(IoFault::Unavailable);
        }
        match self.running.remove(&tag) {
            None => {}
            Some(Owner::Aborted { held_octets, immediate }) => {
                self.retire(link, immediate);
                self.aborted_ended(link, tag);
                self.release(link, held_octets);
            }
            Some(Owner::Task(task_tag)) => {
                let Some(task) = self.tasks.get_mut(&task_tag) else { return };
                let State::Running(_, completion) = std::mem::replace(&mut task.state, State::Moving) else { return };
                match scsi::completed(completion, result) {
                    Ok(Finished::Good) => self.follow(link, task_tag, Ok(Plan::Good)),
                    Ok(Finished::Data(data)) => self.finish(link, task_tag, Ok(data)),
                    Ok(Finished::Part(data, rest)) => self.send_part(link, task_tag, data, rest),
                    Ok(Finished::Io(io, completion)) => self.follow(link, task_tag, Ok(Plan::Io(io, completion))),
                    Err(refusal) => self.finish(link, task_tag, Err(refusal)),
                }
            }
        }
    }

    /// Gives back memory, and lets tasks go on that waited for it.
    pub(crate) fn release(&mut self, link: &mut Link, octets: usize) {
        self.held_octets = self.held_octets.saturating_sub(octets);
        while let Some(task_tag) = self.waiting.front().copied() {
            let Some(task) = self.tasks.get_mut(&task_tag) else {
                self.waiting.pop_front();
                continue;
            };
            let needed = task.needs_octets();
            if self.held_octets > 0 && self.held_octets + needed > HELD_LIMIT {
                return;
            }
            self.waiting.pop_front();
            task.hold(&mut self.held_octets, needed);
            match std::mem::replace(&mut task.state, State::Moving) {
                State::Queued(io, completion) => self.run(link, task_tag, io, completion),
                State::Collecting(collecting) => {
                    task.state = State::Collecting(collecting);
                    self.request_data(link, task_tag);
                }
                other @ (State::Draining(_) | State::Running(..) | State::Moving) => task.state = other,
            }
        }
    }

    /// A command of the window, or an immediate one, is over.
    pub(crate) fn retire(&mut self, link: &mut Link, immediate: bool) {
        if immediate {
            self.immediate = self.immediate.saturating_sub(1);
        } else {
            link.outstanding = link.outstanding.saturating_sub(1);
        }
    }

    /// No PDU of the burst is left to come: goes on with the next R2T, or with all the data.
    fn collect_more(&mut self, link: &mut Link, task_tag: u32) {
        let Some(task) = self.tasks.get_mut(&task_tag) else { return };
        let State::Collecting(collecting) = &mut task.state else { return };
        collecting.source = Source::Nothing;
        if collecting.received_octets < collecting.take_octets {
            let needed = task.needs_octets();
            if needed == 0 {
                self.request_data(link, task_tag);
            } else if self.waiting.is_empty() && (self.held_octets == 0 || self.held_octets + needed <= HELD_LIMIT) {
                task.hold(&mut self.held_octets, needed);
                self.request_data(link, task_tag);
            } else {
                self.waiting.push_back(task_tag);
            }
            return;
        }
        let State::Collecting(collecting) = std::mem::replace(&mut task.state, State::Moving) else { return };
        let Kind::Normal { target, attachment } = &self.kind else { return };
        let (purpose, data) = collecting.finish();
        let plan = scsi::collected(target, attachment.nexus, purpose, data);
        self.follow(link, task_tag, plan);
    }

    /// Sends the next R2T (§11.8).
    fn request_data(&mut self, link: &mut Link, task_tag: u32) {
        let transfer_tag = self.new_transfer_tag();
        let Some(task) = self.tasks.get_mut(&task_tag) else { return };
        let State::Collecting(collecting) = &mut task.state else { return };
        let offset = collecting.received_octets;
        let octets = (collecting.take_octets - offset).min(self.parameters.max_burst_octets);
        collecting.source = Source::Solicited { transfer_tag, end: offset + octets };
        collecting.data_sn = 0;
        let header = Header::answer(Answer::R2t, FINAL)
            .set(8, &task.lun)
            .set_word(16, task_tag)
            .set_word(20, transfer_tag)
            .set_word(36, collecting.r2t_sn)
            .set_word(40, offset)
            .set_word(44, octets);
        collecting.r2t_sn += 1;
        link.send(header, Bytes::new(), StatSn::Show, 0);
    }

    fn drained(&mut self, link: &mut Link, task_tag: u32) {
        let Some(task) = self.tasks.get_mut(&task_tag) else { return };
        if let State::Draining(outcome) = std::mem::replace(&mut task.state, State::Moving) {
            self.finish(link, task_tag, outcome.map(|()| Payload::EMPTY));
        }
    }

    /// Carries out what a task was planned to do next.
    fn follow(&mut self, link: &mut Link, task_tag: u32, plan: Result<Plan, Refusal>) {
        match plan {
            Ok(Plan::Good) => self.finish(link, task_tag, Ok(Payload::EMPTY)),
            Ok(Plan::Data(data)) => self.finish(link, task_tag, Ok(Bytes::from(data).into())),
            Err(refusal) => self.finish(link, task_tag, Err(refusal)),
            // A command collects once, before anything else.
            Ok(Plan::Collect(..)) => self.finish(link, task_tag, Err(Sense::HARDWARE.into())),
            Ok(Plan::Io(io, completion)) => {
                let Some(task) = self.tasks.get_mut(&task_tag) else { return };
                let needed = completion.held_octets().saturating_sub(task.held_octets);
                // A task that holds as much as it asks for does not wait: those before it might wait for it.
                let free = self.held_octets == 0 || self.held_octets + needed <= HELD_LIMIT;
                if needed == 0 || (free && self.waiting.is_empty()) {
                    task.hold(&mut self.held_octets, needed);
                    self.run(link, task_tag, io, completion);
                } else {
                    task.state = State::Queued(io, completion);
                    self.waiting.push_back(task_tag);
                }
            }
        }
    }

    fn run(&mut self, link: &mut Link, task_tag: u32, io: Io, completion: Completion) {
        let tag = self.new_io_tag();
        if let Some(task) = self.tasks.get_mut(&task_tag) {
            let is_plain_read = matches!(completion, Completion::Read { .. });
            task.state = State::Running(tag, completion);
            let in_place = !link.digests.data && is_plain_read;
            self.running.insert(tag, Owner::Task(task_tag));
            link.raise(Event::Io(IoRequest { tag, io, in_place }));
        }
    }

    /// Ends a task: data-in and status, with residuals.
    fn finish(&mut self, link: &mut Link, task_tag: u32, outcome: Result<Payload, Refusal>) {
        let Some(mut task) = self.tasks.remove(&task_tag) else { return };
        self.retire(link, task.immediate);
        let (status, payload, mut data) = match outcome {
            Ok(data) => (Status::Good, Bytes::new(), data),
            Err(Refusal::Reservation) => (Status::ReservationConflict, Bytes::new(), Payload::EMPTY),
            Err(Refusal::Busy) => (Status::Busy, Bytes::new(), Payload::EMPTY),
            Err(Refusal::Check(sense)) => (Status::CheckCondition, self.encode_sense(sense), Payload::EMPTY),
        };
        let sent = u64::from(task.sent.octets);
        // A write that is refused still says how much it would have taken.
        let transferred = if data.is_empty() { u64::from(task.wanted_octets) } else { data.len() as u64 };
        let residual = Residual::of(sent + transferred, task.expected_octets);
        data.truncate((task.expected_octets - task.sent.octets) as usize);
        if data.is_empty() {
            respond(link, task.lun, task_tag, status, residual, payload);
            self.release(link, task.held_octets);
        } else {
            self.send_data_in(link, &mut task, task_tag, Some(residual), data);
            // The memory of what is queued is free when the driver takes the last PDU.
        }
    }

    /// Sends what a part of a READ read, and reads the next.
    fn send_part(&mut self, link: &mut Link, task_tag: u32, mut data: Payload, rest: Rest) {
        let Some(mut task) = self.tasks.remove(&task_tag) else { return };
        let room = task.expected_octets - task.sent.octets;
        let total = u64::from(task.sent.octets) + data.len() as u64 + rest.octets();
        if data.len() >= room as usize {
            // The initiator has room for no more.
            self.retire(link, task.immediate);
            let residual = Residual::of(total, task.expected_octets);
            if room == 0 {
                respond(link, task.lun, task_tag, Status::Good, residual, Bytes::new());
                self.release(link, task.held_octets);
            } else {
                data.truncate(room as usize);
                self.send_data_in(link, &mut task, task_tag, Some(residual), data);
            }
            return;
        }
        self.send_data_in(link, &mut task, task_tag, None, data);
        self.tasks.insert(task_tag, task);
        let (io, completion) = scsi::part(rest);
        self.follow(link, task_tag, Ok(Plan::Io(io, completion)));
    }

    /// Data-In PDUs (§11.7), the last of which carries the status GOOD if that comes with a residual. The task's memory
    /// goes with them.
    fn send_data_in(
        &mut self,
        link: &mut Link,
        task: &mut Task,
        task_tag: u32,
        status: Option<Residual>,
        mut data: Payload,
    ) {
        let burst = self.parameters.max_burst_octets;
        while !data.is_empty() {
            let left_of_burst = (burst - task.sent.octets % burst) as usize;
            let octets = data.len().min(self.parameters.send_segment_octets).min(left_of_burst);
            let segment = data.split_to(octets);
            let last = data.is_empty();
            let ends = octets == left_of_burst || (last && status.is_some());
            let mut header = Header::answer(Answer::DataIn, if ends { FINAL } else { 0 })
                .set(8, &task.lun)
                .set_word(16, task_tag)
                .set_word(20, RESERVED_TAG)
                .set_word(36, task.sent.data_sn)
                .set_word(40, task.sent.octets);
            let mut stat_sn = StatSn::None;
            if last && let Some(residual) = status {
                // S: status is in this PDU.
                header = header.set(1, &[FINAL | 0x01 | residual.flags()]).set_word(44, residual.octets());
                stat_sn = StatSn::Advance;
            }
            let releases = if last { std::mem::take(&mut task.held_octets) } else { 0 };
            link.send(header, segment, stat_sn, releases);
            // Below the expected length, which fits.
            task.sent.octets += u32::try_from(octets).unwrap_or(u32::MAX);
            task.sent.data_sn += 1;
        }
    }

    fn encode_sense(&self, sense: Sense) -> Bytes {
        let Kind::Normal { target, .. } = &self.kind else { return Bytes::new() };
        let sense = sense.encode(target.unit().descriptor_sense);
        let mut payload = BytesMut::with_capacity(2 + sense.len());
        payload.put_u16(u16::try_from(sense.len()).unwrap_or(0));
        payload.put_slice(&sense);
        payload.freeze()
    }

    /// The session's target, if it is not a discovery session.
    pub(crate) fn target(&self) -> Option<Arc<Target>> {
        match &self.kind {
            Kind::Normal { target, .. } => Some(target.clone()),
            Kind::Discovery(_) => None,
        }
    }
}

impl Task {
    fn hold(&mut self, held_octets: &mut usize, octets: usize) {
        self.held_octets += octets;
        *held_octets += octets;
    }

    /// Memory that the task needs to go on.
    fn needs_octets(&self) -> usize {
        match &self.state {
            State::Collecting(collecting) => collecting.held_octets().saturating_sub(self.held_octets),
            State::Queued(_, completion) => completion.held_octets().saturating_sub(self.held_octets),
            State::Draining(_) | State::Running(..) | State::Moving => 0,
        }
    }
}

impl Completion {
    /// What is in memory when the backend has answered, in octets: what it reads, and what that is compared or merged
    /// with.
    fn held_octets(&self) -> usize {
        match self {
            Self::Read { octets, .. } | Self::CopyRead { octets, .. } => *octets as usize,
            Self::Verify { data, octets } => *octets as usize + data.iter().map(Bytes::len).sum::<usize>(),
            Self::OrWrite { octets, .. } => 3 * *octets as usize,
            // What a copy writes was held when it was read.
            Self::Done | Self::LbaStatus { .. } | Self::CopyWrite { .. } => 0,
        }
    }
}

impl Collecting {
    /// Starts with the command's immediate data.
    fn new(purpose: Purpose, take_octets: u32, unsolicited: bool, immediate: &Bytes) -> Self {
        let source = if unsolicited { Source::Unsolicited } else { Source::Nothing };
        let mut collecting = Self {
            purpose,
            take_octets,
            received_octets: 0,
            data: Vec::new(),
            joined: BytesMut::new(),
            data_sn: 0,
            r2t_sn: 0,
            source,
        };
        collecting.append(immediate);
        collecting
    }

    /// Takes as much of `data` as the command wants, and counts all of it.
    fn append(&mut self, data: &Bytes) {
        let wanted = self.take_octets.saturating_sub(self.received_octets) as usize;
        let taken = data.slice(..data.len().min(wanted));
        if taken.len() >= PIECE_OCTETS || taken.len() == self.take_octets as usize {
            self.push_joined();
            if !taken.is_empty() {
                self.data.push(taken);
            }
        } else {
            self.joined.extend_from_slice(&taken);
            if self.joined.len() >= JOINED_OCTETS {
                self.push_joined();
            }
        }
        // Both are below 2^24: a segment and a burst.
        self.received_octets += u32::try_from(data.len()).unwrap_or(0);
    }

    fn push_joined(&mut self) {
        if !self.joined.is_empty() {
            self.data.push(self.joined.split().freeze());
        }
    }

    /// All the data are there.
    fn finish(mut self) -> (Purpose, Vec<Bytes>) {
        self.push_joined();
        (self.purpose, self.data)
    }

    /// What the data and what is done with them take, in octets.
    fn held_octets(&self) -> usize {
        self.take_octets as usize * self.purpose.copies()
    }

    /// Checks one Data-Out PDU against what was asked for, and takes its data. Data out of order break the task, since
    /// both DataPDUInOrder and DataSequenceInOrder hold; data beyond what was allowed break the protocol.
    fn arrive(&mut self, pdu: &Pdu, first_burst_octets: u32) -> Result<Arrival, ProtocolError> {
        let header = &pdu.header;
        let task_tag = header.task_tag();
        let octets = u32::try_from(pdu.data.len()).unwrap_or(u32::MAX);
        let end = match self.source {
            Source::Unsolicited if header.word(20) == RESERVED_TAG => first_burst_octets,
            Source::Solicited { transfer_tag, end } if header.word(20) == transfer_tag => end,
            Source::Unsolicited | Source::Solicited { .. } | Source::Nothing => {
                return Err(ProtocolError::UnexpectedData { task_tag });
            }
        };
        if self.received_octets.saturating_add(octets) > end {
            return Err(ProtocolError::UnexpectedData { task_tag });
        }
        if header.word(36) != self.data_sn || header.word(40) != self.received_octets {
            return Ok(Arrival::Broken);
        }
        self.data_sn = self.data_sn.wrapping_add(1);
        self.append(&pdu.data);
        let solicited = matches!(self.source, Source::Solicited { .. });
        match (header.is_final(), solicited) {
            (false, _) => Ok(Arrival::More),
            (true, true) if self.received_octets != end => Ok(Arrival::Broken),
            (true, _) => Ok(Arrival::BurstDone),
        }
    }
}
