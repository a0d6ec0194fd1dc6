//! What a portal serves now: targets, the units behind them, and who is logged in. Shared by its connections.
//!
//! Severing is a promise: when [`Hub::remove`] returns, no connection to the target is left and none of its I/O is under
//! way.

use super::unit::Unit;
use assay_iscsi::{ConnectionId, Portal, SessionDecision, SessionRequest, Sessions, Target, Tsih};
use assay_service::CancellationToken;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// The state of one portal.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    /// Where logins find their targets.
    pub(super) targets: Arc<Portal>,
    state: Mutex<State>,
    next_connection: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    live: HashMap<String, Live>,
    sessions: Sessions,
    /// Connections with a session, and how to end them.
    connections: HashMap<ConnectionId, Ending>,
}

/// One target that is up.
#[derive(Debug)]
struct Live {
    unit: Arc<Unit>,
    sever: CancellationToken,
    connections: TaskTracker,
}

/// How to end a connection, and how to know that it has.
#[derive(Debug, Clone)]
struct Ending {
    sever: CancellationToken,
    ended: CancellationToken,
}

/// A connection's session. While it is held, the target's removal waits.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) tsih: Tsih,
    /// Nothing for a discovery session.
    pub(super) unit: Option<Arc<Unit>>,
    /// Cancelled when the session must end.
    pub(super) sever: CancellationToken,
    hub: Arc<Hub>,
    id: ConnectionId,
    target: Option<String>,
    ended: CancellationToken,
    _counted: Option<TaskTrackerToken>,
}

impl Hub {
    /// Puts a target up. `false` if there is one of that name already.
    pub(crate) fn insert(&self, target: Arc<Target>, unit: Arc<Unit>) -> bool {
        let mut state = self.state();
        if state.live.contains_key(target.name()) {
            return false;
        }
        let live = Live { unit, sever: CancellationToken::new(), connections: TaskTracker::new() };
        state.live.insert(target.name().to_owned(), live);
        self.targets.insert(target);
        true
    }

    /// Takes a target down: no login finds it, its connections are closed, and their I/O has ended.
    pub(crate) async fn remove(&self, target: &str) {
        self.targets.remove(target);
        let Some(live) = self.state().live.remove(target) else { return };
        live.sever.cancel();
        live.connections.close();
        live.connections.wait().await;
    }

    /// Sessions logged in to a target.
    pub(crate) fn sessions(&self, target: &str) -> usize {
        self.state().sessions.connections(target).len()
    }

    /// A name for a new connection.
    pub(super) fn connection_id(&self) -> ConnectionId {
        ConnectionId(self.next_connection.fetch_add(1, Ordering::Relaxed))
    }

    /// Gives a login its session, after the one that it takes the place of has ended. `None` refuses it.
    pub(super) async fn attach(self: &Arc<Self>, request: &SessionRequest, id: ConnectionId) -> Option<Attached> {
        let (attached, replaced) = self.admit(request, id)?;
        if let Some(replaced) = replaced {
            replaced.sever.cancel();
            replaced.ended.cancelled().await;
        }
        Some(attached)
    }

    fn admit(self: &Arc<Self>, request: &SessionRequest, id: ConnectionId) -> Option<(Attached, Option<Ending>)> {
        let mut state = self.state();
        let (unit, sever, counted) = match &request.target {
            Some(target) => {
                let live = state.live.get(target)?;
                (Some(Arc::clone(&live.unit)), live.sever.child_token(), Some(live.connections.token()))
            }
            None => (None, CancellationToken::new(), None),
        };
        let (tsih, replaced) = match state.sessions.admit(request, id) {
            SessionDecision::New(tsih) => (tsih, None),
            SessionDecision::Reinstated { tsih, closes } => (tsih, state.connections.get(&closes).cloned()),
            SessionDecision::Refused => return None,
        };
        let ending = Ending { sever: sever.clone(), ended: CancellationToken::new() };
        let ended = ending.ended.clone();
        state.connections.insert(id, ending);
        let hub = Arc::clone(self);
        let target = request.target.clone();
        Some((Attached { tsih, unit, sever, hub, id, target, ended, _counted: counted }, replaced))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut state = self.hub.state();
        if let Some(target) = &self.target {
            state.sessions.leave(target, self.id);
        }
        state.connections.remove(&self.id);
        drop(state);
        self.ended.cancel();
    }
}
