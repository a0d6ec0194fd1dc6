#![no_main]
//! An iSCSI connection from its first octet: login text, PDUs, CDBs, task tags. The backend answers everything.

use assay_iscsi::{
    Authentication, ChallengeEntropy, Connection, ConnectionId, Event, Io, IoFault, IoResult, LogicalUnitConfig,
    LoginStatus, Portal, SessionDecision, SessionLimit, Sessions, Target, TargetConfig, Tsih,
};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

const BLOCK_BYTES: u32 = 512;

fn portal() -> Arc<Portal> {
    let portal = Portal::default();
    let target = Target::new(TargetConfig {
        name: "iqn.2026-01.t:d".to_owned(),
        portal: ([127, 0, 0, 1], 3260).into(),
        initiator: "iqn.2026-01.t:i".to_owned(),
        authentication: Authentication::None,
        logical_unit: LogicalUnitConfig {
            block_bytes: BLOCK_BYTES,
            blocks: 2048,
            naa: 1,
            serial: "1".to_owned(),
            vendor: "ASSAY".to_owned(),
            product: "DISK".to_owned(),
            read_only: false,
            write_cache: true,
        },
    });
    portal.insert(Arc::new(target.expect("a valid target")));
    Arc::new(portal)
}

fn answer(io: &Io) -> IoResult {
    match io {
        Io::Read { blocks, .. } => IoResult::Data(Bytes::from(vec![0; (*blocks * BLOCK_BYTES) as usize])),
        Io::Write { .. } | Io::Flush | Io::Unmap { .. } | Io::WriteSame { .. } => IoResult::Done,
        Io::CompareAndWrite { .. } => IoResult::Miscompare { offset: 0 },
        Io::Status { .. } => IoResult::Failed(IoFault::Unavailable),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut connection = Connection::new(portal(), ChallengeEntropy([7; assay_iscsi::CHALLENGE_OCTETS + 1]));
    let mut sessions = Sessions::new(SessionLimit::One);
    for piece in bytes.chunks(64) {
        match connection.receive_buffer() {
            Some(buffer) => buffer.extend_from_slice(piece),
            None => break,
        }
        if connection.process().is_err() {
            break;
        }
        while let Some(event) = connection.poll_event() {
            match event {
                Event::Io(request) => connection.complete(request.tag, answer(&request.io)),
                Event::SessionWanted(request) if request.target.is_none() => connection.admit(Tsih::MIN),
                Event::SessionWanted(request) => match sessions.admit(&request, ConnectionId(1)) {
                    SessionDecision::New(tsih) | SessionDecision::Reinstated { tsih, .. } => connection.admit(tsih),
                    SessionDecision::Refused => connection.refuse(LoginStatus::AuthorizationFailure),
                },
                Event::LoggedIn | Event::LoggedOut | Event::Close => {}
            }
        }
        while connection.poll_transmit().is_some() {}
    }
});
