//! The one target of this process, and who is connected to it.

use super::helpers::Helpers;
use super::message::{Limits, WorkerStatus};
use super::unit::Unit;
use assay_iscsi::{ConnectionId, Directory, SessionDecision, SessionLimit, SessionRequest, Sessions, Target, Tsih};
use rustix::net::Shutdown;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// An initiator that has closed its session and logs in anew may be faster than our noticing of the former.
const ENDING_SESSION: Duration = Duration::from_millis(200);

/// What its connections share.
pub(super) struct Hub {
    target: Arc<Target>,
    /// The target accepts whoever asks.
    for_anybody: bool,
    pub(super) unit: Arc<Unit>,
    pub(super) helpers: Helpers,
    pub(super) limits: Limits,
    state: Mutex<State>,
    /// A connection has ended.
    ended: Condvar,
}

struct State {
    sessions: Sessions,
    connections: HashMap<ConnectionId, Open>,
    next: u64,
    ending: bool,
}

struct Open {
    socket: Arc<OwnedFd>,
    logged_in: bool,
}

impl Hub {
    pub(super) fn new(target: Target, for_anybody: bool, unit: Unit, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            target: Arc::new(target),
            for_anybody,
            helpers: Helpers::default(),
            unit: Arc::new(unit),
            limits,
            state: Mutex::new(State {
                sessions: Sessions::new(SessionLimit::Many(limits.sessions)),
                connections: HashMap::new(),
                next: 0,
                ending: false,
            }),
            ended: Condvar::new(),
        })
    }

    /// Takes a connection in, if there is room for one more.
    pub(super) fn enter(&self, socket: &Arc<OwnedFd>) -> Option<ConnectionId> {
        let mut state = self.state();
        let half_open = state.connections.values().filter(|open| !open.logged_in).count();
        // Each session may be logged in to anew while its old connection still ends.
        let all = 2 * usize::from(self.limits.sessions) + usize::from(self.limits.half_open);
        if state.ending || half_open >= usize::from(self.limits.half_open) || state.connections.len() >= all {
            return None;
        }
        let id = ConnectionId(state.next);
        state.next += 1;
        state.connections.insert(id, Open { socket: Arc::clone(socket), logged_in: false });
        Some(id)
    }

    /// Gives a login its session, after the one that it takes the place of has ended. `None` refuses it.
    pub(super) fn attach(&self, request: &SessionRequest, id: ConnectionId) -> Option<Tsih> {
        let deadline = Instant::now() + ENDING_SESSION;
        let mut state = self.state();
        let tsih = loop {
            match state.sessions.admit(request, id) {
                SessionDecision::New(tsih) => break tsih,
                SessionDecision::Reinstated { tsih, closes } => {
                    if let Some(old) = state.connections.get(&closes) {
                        let _closed_already = rustix::net::shutdown(&old.socket, Shutdown::Both);
                    }
                    let still = |state: &mut State| state.connections.contains_key(&closes);
                    state = self.ended.wait_while(state, still).unwrap_or_else(PoisonError::into_inner);
                    break tsih;
                }
                SessionDecision::Refused => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        };
        if let Some(open) = state.connections.get_mut(&id) {
            open.logged_in = true;
        }
        Some(tsih)
    }

    /// The connection has ended, and none of its I/O is under way.
    pub(super) fn leave(&self, id: ConnectionId) {
        let mut state = self.state();
        state.sessions.leave(self.target.name(), id);
        state.connections.remove(&id);
        drop(state);
        self.ended.notify_all();
    }

    /// Lets nobody in any more, and has every connection end; waits until they have, at most for `patience`.
    pub(super) fn end(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        state.ending = true;
        for open in state.connections.values() {
            // Wakes whoever reads from it; what is to be sent can still be.
            let _closed_already = rustix::net::shutdown(&open.socket, Shutdown::Read);
        }
        while !state.connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether [`Hub::end`] was called.
    pub(super) fn is_ending(&self) -> bool {
        self.state().ending
    }

    pub(super) fn status(&self) -> WorkerStatus {
        let state = self.state();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let sessions = count(state.sessions.connections(self.target.name()).len());
        WorkerStatus { sessions, connections: count(state.connections.len()), ..self.unit.status() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Directory for Hub {
    fn target(&self, name: &str, initiator: &str) -> Option<Arc<Target>> {
        let theirs = self.for_anybody || self.target.config().initiator == initiator;
        (theirs && self.target.name() == name).then(|| Arc::clone(&self.target))
    }

    fn visible_to(&self, initiator: &str) -> Vec<Arc<Target>> {
        let theirs = self.for_anybody || self.target.config().initiator == initiator;
        if theirs { vec![Arc::clone(&self.target)] } else { Vec::new() }
    }
}
