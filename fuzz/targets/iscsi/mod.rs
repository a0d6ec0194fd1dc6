//! What the iSCSI targets share: a portal, and a driver whose backend answers everything.

#![allow(dead_code, reason = "each target uses its part")]

use assay_iscsi::{
    Authentication, CHALLENGE_OCTETS, ChallengeEntropy, Connection, ConnectionId, Event, Io, IoFault, IoRequest,
    IoResult, LogicalUnitConfig, LoginStatus, Portal, SessionDecision, SessionLimit, Sessions, Target, TargetConfig,
    Tsih,
};
use bytes::Bytes;
use std::sync::Arc;

/// The initiator that the portal's targets accept.
pub(crate) const INITIATOR: &str = "iqn.2026-01.t:i";
/// A target that asks for no proof.
pub(crate) const OPEN: &str = "iqn.2026-01.t:d";
const BLOCK_BYTES: u32 = 512;
const BLOCKS: u64 = 2048;

/// A portal with these targets.
pub(crate) fn portal(targets: impl IntoIterator<Item = (&'static str, Authentication)>) -> Arc<Portal> {
    let portal = Portal::default();
    for (name, authentication) in targets {
        let target = Target::new(TargetConfig {
            name: name.to_owned(),
            portal: ([127, 0, 0, 1], 3260).into(),
            initiator: INITIATOR.to_owned(),
            authentication,
            logical_unit: LogicalUnitConfig {
                block_bytes: BLOCK_BYTES,
                blocks: BLOCKS,
                naa: 1,
                serial: "1".to_owned(),
                vendor: "ASSAY".to_owned(),
                product: "DISK".to_owned(),
                read_only: false,
                write_cache: true,
            },
        });
        portal.insert(Arc::new(target.expect("a valid target")));
    }
    Arc::new(portal)
}

/// One connection and what drives it.
pub(crate) struct Driver {
    pub(crate) connection: Connection,
    pub(crate) logged_in: bool,
    sessions: Sessions,
}

impl Driver {
    pub(crate) fn new(portal: Arc<Portal>) -> Self {
        let entropy = ChallengeEntropy([7; CHALLENGE_OCTETS + 1]);
        Self {
            connection: Connection::new(portal, entropy),
            logged_in: false,
            sessions: Sessions::new(SessionLimit::One),
        }
    }

    /// Receives `octets` and does all that follows; `false` once the connection takes no more.
    pub(crate) fn receive(&mut self, octets: &[u8]) -> bool {
        match self.connection.receive_buffer() {
            Some(buffer) => buffer.extend_from_slice(octets),
            None => return false,
        }
        loop {
            if self.connection.process().is_err() {
                return false;
            }
            let mut moved = false;
            while let Some(event) = self.connection.poll_event() {
                moved = true;
                self.act(event);
            }
            while self.connection.poll_transmit().is_some() {
                moved = true;
            }
            if !moved {
                return true;
            }
        }
    }

    fn act(&mut self, event: Event) {
        match event {
            Event::Io(request) => {
                let result = answer(&request);
                self.connection.complete(request.tag, result);
            }
            Event::SessionWanted(request) if request.target.is_none() => self.connection.admit(Tsih::MIN),
            Event::SessionWanted(request) => match self.sessions.admit(&request, ConnectionId(1)) {
                SessionDecision::New(tsih) | SessionDecision::Reinstated { tsih, .. } => self.connection.admit(tsih),
                SessionDecision::Refused => self.connection.refuse(LoginStatus::AuthorizationFailure),
            },
            Event::LoggedIn => self.logged_in = true,
            Event::LoggedOut | Event::Close => {}
        }
    }
}

/// A header of the full feature or login phase, followed by padded data.
pub(crate) fn pdu(opcode: u8, flags: u8, fields: &[(usize, &[u8])], data: &[u8]) -> Vec<u8> {
    let mut pdu = vec![0; 48];
    pdu[..2].copy_from_slice(&[opcode, flags]);
    let octets = u32::try_from(data.len()).unwrap_or(0);
    pdu[5..8].copy_from_slice(&octets.to_be_bytes()[1..]);
    for (at, octets) in fields {
        pdu[*at..*at + octets.len()].copy_from_slice(octets);
    }
    pdu.extend_from_slice(data);
    pdu.resize(pdu.len().next_multiple_of(4), 0);
    pdu
}

/// Every operation that is asked for lies within the unit and is not empty.
fn answer(request: &IoRequest) -> IoResult {
    let within = |lba: u64, blocks: u64| {
        assert!(blocks > 0 && lba.checked_add(blocks).is_some_and(|end| end <= BLOCKS), "{lba} {blocks}");
    };
    let blocks_of = |octets: usize| {
        assert!(octets.is_multiple_of(BLOCK_BYTES as usize));
        octets as u64 / u64::from(BLOCK_BYTES)
    };
    match &request.io {
        Io::Read { lba, blocks } => {
            within(*lba, u64::from(*blocks));
            if request.in_place {
                let block_bytes = u64::from(BLOCK_BYTES);
                return IoResult::InPlace(lba * block_bytes..(lba + u64::from(*blocks)) * block_bytes);
            }
            IoResult::Data(Bytes::from(vec![0; (*blocks * BLOCK_BYTES) as usize]))
        }
        Io::Write { lba, data, .. } => {
            within(*lba, blocks_of(data.iter().map(Bytes::len).sum()));
            IoResult::Done
        }
        Io::Unmap { ranges } => {
            ranges.iter().for_each(|(lba, blocks)| within(*lba, u64::from(*blocks)));
            IoResult::Done
        }
        Io::WriteSame { lba, blocks, pattern, .. } => {
            assert_eq!(pattern.len(), BLOCK_BYTES as usize);
            within(*lba, *blocks);
            IoResult::Done
        }
        Io::CompareAndWrite { lba, expected, new } => {
            assert_eq!(expected.len(), new.len());
            within(*lba, blocks_of(new.len()));
            IoResult::Miscompare { offset: 0 }
        }
        Io::Status { lba } => {
            within(*lba, 1);
            IoResult::Failed(IoFault::Unavailable)
        }
        Io::Flush => IoResult::Done,
    }
}
