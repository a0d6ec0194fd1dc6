//! Task management (RFC 7143 §4.2.3, §11.5). A function is answered only after the I/O of every task that it aborted
//! has ended, so that nothing of an aborted write reaches the disk after the answer.

use crate::full_feature::{FullFeature, Owner};
use crate::io::IoTag;
use crate::link::{Link, StatSn};
use crate::pdu::{Answer, FINAL, Header, RESERVED_TAG};
use crate::task::State;
use bytes::Bytes;

/// A function that waits for aborted I/O to end.
#[derive(Debug)]
pub(crate) struct PendingFunction {
    task_tag: u32,
    waits_for: Vec<IoTag>,
    closes: bool,
}

/// Most functions that wait at once; initiators send one at a time.
const PENDING_LIMIT: usize = 16;

/// Functions (§11.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Function {
    AbortTask,
    AbortTaskSet,
    ClearTaskSet,
    LogicalUnitReset,
    TargetWarmReset,
    TargetColdReset,
    TaskReassign,
    Other,
}

impl Function {
    fn from_bits(bits: u8) -> Self {
        match bits & 0x7f {
            1 => Self::AbortTask,
            2 => Self::AbortTaskSet,
            4 => Self::ClearTaskSet,
            5 => Self::LogicalUnitReset,
            6 => Self::TargetWarmReset,
            7 => Self::TargetColdReset,
            8 => Self::TaskReassign,
            _ => Self::Other,
        }
    }
}

/// Responses (§11.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Response {
    Complete = 0,
    NoSuchTask = 1,
    NoSuchUnit = 2,
    ReassignNotSupported = 4,
    NotSupported = 5,
    Rejected = 255,
}

impl FullFeature {
    /// A task management function request.
    pub(crate) fn manage(&mut self, link: &mut Link, header: &Header) {
        let task_tag = header.task_tag();
        let function = Function::from_bits(header.flags());
        let aborted = match self.affected(function, header) {
            Ok(task_tags) if self.functions.len() < PENDING_LIMIT && task_tag != RESERVED_TAG => task_tags,
            Ok(_) => return answer(link, task_tag, Response::Rejected),
            Err(response) => return answer(link, task_tag, response),
        };
        if matches!(function, Function::LogicalUnitReset | Function::TargetWarmReset | Function::TargetColdReset)
            && let Some(target) = self.target()
        {
            target.unit().reset();
        }
        let waits_for = aborted.into_iter().filter_map(|task_tag| self.abort(link, task_tag)).collect();
        let closes = function == Function::TargetColdReset;
        self.functions.push(PendingFunction { task_tag, waits_for, closes });
        self.answer_functions(link);
        // Memory may have become free for the tasks that are left.
        self.release(link, 0);
    }

    /// The I/O of an aborted task has ended.
    pub(crate) fn aborted_ended(&mut self, link: &mut Link, tag: IoTag) {
        for function in &mut self.functions {
            function.waits_for.retain(|waited_for| *waited_for != tag);
        }
        self.answer_functions(link);
    }

    /// The tasks that a function aborts.
    fn affected(&self, function: Function, header: &Header) -> Result<Vec<u32>, Response> {
        if self.target().is_none() {
            return Err(Response::NotSupported);
        }
        let names_unit = header.lun() == [0; 8] || header.lun() == [0x40, 0, 0, 0, 0, 0, 0, 0];
        match function {
            Function::AbortTask => {
                let referenced = header.word(20);
                if self.tasks.contains_key(&referenced) { Ok(vec![referenced]) } else { Err(Response::NoSuchTask) }
            }
            Function::AbortTaskSet | Function::ClearTaskSet | Function::LogicalUnitReset if !names_unit => {
                Err(Response::NoSuchUnit)
            }
            Function::AbortTaskSet
            | Function::ClearTaskSet
            | Function::LogicalUnitReset
            | Function::TargetWarmReset
            | Function::TargetColdReset => Ok(self.tasks.keys().copied().collect()),
            Function::TaskReassign => Err(Response::ReassignNotSupported),
            Function::Other => Err(Response::NotSupported),
        }
    }

    /// Takes a task away without a response. Returns the operation that still runs for it.
    fn abort(&mut self, link: &mut Link, task_tag: u32) -> Option<IoTag> {
        let task = self.tasks.remove(&task_tag)?;
        self.waiting.retain(|waiting| *waiting != task_tag);
        match task.state {
            State::Running(tag, _) => {
                // It still holds its memory and its place in the window.
                let owner = Owner::Aborted { held_octets: task.held_octets, immediate: task.immediate };
                self.running.insert(tag, owner);
                Some(tag)
            }
            State::Collecting(_) | State::Draining(_) | State::Queued(..) | State::Moving => {
                self.retire(link, task.immediate);
                self.held_octets = self.held_octets.saturating_sub(task.held_octets);
                None
            }
        }
    }

    fn answer_functions(&mut self, link: &mut Link) {
        self.functions.retain(|function| {
            let done = function.waits_for.is_empty();
            if done {
                answer(link, function.task_tag, Response::Complete);
                link.ending |= function.closes;
            }
            !done
        });
    }
}

fn answer(link: &mut Link, task_tag: u32, response: Response) {
    let header = Header::answer(Answer::TaskManagement, FINAL).set(2, &[response as u8]).set_word(16, task_tag);
    link.send(header, Bytes::new(), StatSn::Advance, 0);
}
