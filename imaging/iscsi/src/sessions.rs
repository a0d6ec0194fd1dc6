//! Who is logged in where (RFC 7143 §6.3.5): the decision whether a login may become a session, and which connection
//! it replaces.
//!
//! A target has one session at a time. The same initiator port (initiator name and ISID) that logs in again with
//! TSIH 0 reinstates its session: the old connection is closed, and its I/O has ended, before the new login is
//! answered. That is how a kexec'd kernel, and an `iscsid` that takes over the initramfs's session, get in. Any other
//! second session is refused. Pure values; one registry per process, kept by the driver.

use crate::io::SessionRequest;
use std::collections::HashMap;
use std::num::NonZeroU16;

/// Target session identifying handle (RFC 7143 §11.12.6); never 0 for a session that exists.
pub type Tsih = NonZeroU16;

/// A driver's name for one of its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// What the registry says to a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionDecision {
    /// A new session.
    New(Tsih),
    /// It takes the place of the session on `closes`: close that one, wait until its I/O has ended, then admit. A login
    /// that is itself replaced while it waits so must not count as ended before the one that it waits for.
    Reinstated {
        /// The new session's handle.
        tsih: Tsih,
        /// The connection to close first.
        closes: ConnectionId,
    },
    /// The target has a session with another initiator port.
    Refused,
}

/// The sessions of all targets.
#[derive(Debug, Default)]
pub struct Sessions {
    by_target: HashMap<String, Vec<Session>>,
    last_tsih: u16,
    limit: SessionLimit,
}

/// How many sessions a target may have at once; they are all of the one initiator that the target accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SessionLimit {
    /// One.
    #[default]
    One,
    /// Up to this many, each with an ISID of its own: for multipath.
    Many(u8),
}

#[derive(Debug)]
struct Session {
    isid: [u8; 6],
    tsih: Tsih,
    connection: ConnectionId,
}

impl Sessions {
    /// A registry that allows each target up to `limit` sessions.
    pub fn new(limit: SessionLimit) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Decides on a login on `connection`. The decision is recorded at once, so of two logins that race, the later
    /// one reinstates or is refused. A discovery session (no target) is always new.
    pub fn admit(&mut self, request: &SessionRequest, connection: ConnectionId) -> SessionDecision {
        let tsih = self.next_tsih();
        let Some(target) = &request.target else {
            return SessionDecision::New(tsih);
        };
        let limit = match self.limit {
            SessionLimit::One => 1,
            SessionLimit::Many(sessions) => usize::from(sessions),
        };
        let sessions = self.by_target.entry(target.clone()).or_default();
        if let Some(old) = sessions.iter_mut().find(|session| session.isid == request.isid) {
            let closes = std::mem::replace(&mut old.connection, connection);
            old.tsih = tsih;
            return SessionDecision::Reinstated { tsih, closes };
        }
        if sessions.len() >= limit {
            return SessionDecision::Refused;
        }
        sessions.push(Session { isid: request.isid, tsih, connection });
        SessionDecision::New(tsih)
    }

    /// Forgets the session on `connection`, if it still is the one on record: call it whenever a connection ends.
    pub fn leave(&mut self, target: &str, connection: ConnectionId) {
        if let Some(sessions) = self.by_target.get_mut(target) {
            sessions.retain(|session| session.connection != connection);
            if sessions.is_empty() {
                self.by_target.remove(target);
            }
        }
    }

    /// The connections logged in to `target`: the ones to drop on revocation.
    pub fn connections(&self, target: &str) -> Vec<ConnectionId> {
        self.by_target.get(target).into_iter().flatten().map(|session| session.connection).collect()
    }

    /// A handle that no session has. There are at most 65535 sessions, since each needs a connection.
    fn next_tsih(&mut self) -> Tsih {
        loop {
            self.last_tsih = self.last_tsih.wrapping_add(1);
            if let Some(tsih) = NonZeroU16::new(self.last_tsih)
                && !self.by_target.values().flatten().any(|session| session.tsih == tsih)
            {
                return tsih;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(target: &str, isid: u8) -> SessionRequest {
        SessionRequest { target: Some(target.into()), initiator: "iqn.2026-01.example:n1".into(), isid: [isid; 6] }
    }

    #[test]
    fn the_same_initiator_port_reinstates_and_any_other_is_refused() {
        let mut sessions = Sessions::default();
        let SessionDecision::New(first) = sessions.admit(&login("a", 1), ConnectionId(1)) else { panic!("not new") };
        assert_eq!(sessions.admit(&login("a", 2), ConnectionId(2)), SessionDecision::Refused);
        let SessionDecision::Reinstated { tsih, closes } = sessions.admit(&login("a", 1), ConnectionId(3)) else {
            panic!("not reinstated")
        };
        assert_eq!(closes, ConnectionId(1));
        assert_ne!(tsih, first);
        // The old connection's end must not take the new session away.
        sessions.leave("a", ConnectionId(1));
        assert_eq!(sessions.connections("a"), vec![ConnectionId(3)]);
        sessions.leave("a", ConnectionId(3));
        assert!(matches!(sessions.admit(&login("a", 2), ConnectionId(4)), SessionDecision::New(_)));
    }

    #[test]
    fn targets_do_not_share_sessions_and_discovery_needs_none() {
        let mut sessions = Sessions::default();
        assert!(matches!(sessions.admit(&login("a", 1), ConnectionId(1)), SessionDecision::New(_)));
        assert!(matches!(sessions.admit(&login("b", 1), ConnectionId(2)), SessionDecision::New(_)));
        let discovery = SessionRequest { target: None, ..login("a", 1) };
        assert!(matches!(sessions.admit(&discovery, ConnectionId(3)), SessionDecision::New(_)));
        assert_eq!(sessions.connections("a"), vec![ConnectionId(1)]);
    }

    #[test]
    fn a_limit_above_one_admits_further_ports() {
        let mut sessions = Sessions::new(SessionLimit::Many(2));
        assert!(matches!(sessions.admit(&login("a", 1), ConnectionId(1)), SessionDecision::New(_)));
        assert!(matches!(sessions.admit(&login("a", 2), ConnectionId(2)), SessionDecision::New(_)));
        assert_eq!(sessions.admit(&login("a", 3), ConnectionId(3)), SessionDecision::Refused);
    }
}
