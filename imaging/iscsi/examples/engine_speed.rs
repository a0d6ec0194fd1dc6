//! What the engine itself costs, without sockets and without a backend:
//! `cargo run --release -p assay-iscsi --example engine_speed`.
//!
//! One connection in memory, driven as a socket would: reads fill the room that the engine offers, transmits are taken
//! and dropped.

use assay_iscsi::{
    Authentication, CHALLENGE_OCTETS, ChallengeEntropy, Connection, Event, Io, IoResult, LogicalUnitConfig, Portal,
    Target, TargetConfig, Tsih,
};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

const TARGET: &str = "iqn.2026-01.example:disk";
const INITIATOR: &str = "iqn.2026-01.example:n1";
const DEPTH: u32 = 32;

fn main() {
    let rounds = 20_000;
    for (name, opcode, blocks) in [("4 KiB reads", 0x28, 8u16), ("4 KiB writes", 0x2a, 8)] {
        let (taken, commands) = run(opcode, blocks, rounds);
        eprintln!("{name}: {:.0} ns each", taken.as_secs_f64() * 1e9 / commands);
    }
    for (name, opcode, blocks) in [("1 MiB reads", 0x28, 2048u16), ("1 MiB writes", 0x2a, 2048)] {
        let (taken, commands) = run(opcode, blocks, rounds / 64);
        eprintln!("{name}: {:.0} MiB/s", commands / taken.as_secs_f64());
    }
}

/// Time and number of commands, after a warm-up.
fn run(opcode: u8, blocks: u16, rounds: u32) -> (Duration, f64) {
    let mut initiator = Initiator::log_in();
    for _ in 0..rounds / 10 {
        initiator.round(opcode, blocks);
    }
    let start = Instant::now();
    for _ in 0..rounds {
        initiator.round(opcode, blocks);
    }
    (start.elapsed(), f64::from(rounds) * f64::from(DEPTH))
}

struct Initiator {
    connection: Connection,
    number: u32,
    /// What the backend answers every read with, cut to length.
    contents: Bytes,
    /// Shared with the contents, so that sending copies once, as a socket does.
    to_send: VecDeque<Bytes>,
}

impl Initiator {
    fn log_in() -> Self {
        let target = Target::new(TargetConfig {
            name: TARGET.to_owned(),
            portal: ([127, 0, 0, 1], 3260).into(),
            initiator: INITIATOR.to_owned(),
            authentication: Authentication::None,
            logical_unit: LogicalUnitConfig {
                block_bytes: 512,
                blocks: 1 << 20,
                naa: 1,
                serial: "1".to_owned(),
                vendor: "ASSAY".to_owned(),
                product: "SPEED".to_owned(),
                read_only: false,
                write_cache: true,
            },
        });
        let portal = Portal::default();
        portal.insert(Arc::new(target.expect("a valid target")));
        let connection = Connection::new(Arc::new(portal), ChallengeEntropy([7; CHALLENGE_OCTETS + 1]));
        let contents = Bytes::from(vec![0x5a; 1 << 20]);
        let mut initiator = Self { connection, number: 0, contents, to_send: VecDeque::new() };
        let names = format!(
            "InitiatorName={INITIATOR}\0TargetName={TARGET}\0InitialR2T=No\0MaxBurstLength=1048576\0FirstBurstLength=131072\0MaxRecvDataSegmentLength=262144\0"
        );
        initiator.push([0x43, 0x87], &[], names.into());
        initiator.exchange();
        assert!(initiator.connection.is_logged_in());
        initiator
    }

    /// As many commands as the depth, sent at once.
    fn round(&mut self, opcode: u8, blocks: u16) {
        let octets = u32::from(blocks) * 512;
        for task_tag in 0..DEPTH {
            let [high, low] = blocks.to_be_bytes();
            let cdb = [opcode, 0, 0, 0, 0, 0, 0, high, low, 0];
            let fields: [(usize, &[u8]); 4] = [
                (16, &task_tag.to_be_bytes()),
                (20, &octets.to_be_bytes()),
                (24, &self.number.to_be_bytes()),
                (32, &cdb),
            ];
            self.number = self.number.wrapping_add(1);
            let wanted = if opcode == 0x2a { octets.min(131_072) as usize } else { 0 };
            let immediate = self.contents.slice(..wanted);
            self.push([0x01, if opcode == 0x2a { 0xa0 } else { 0xc0 }], &fields, immediate);
        }
        self.exchange();
    }

    fn push(&mut self, start: [u8; 2], fields: &[(usize, &[u8])], data: Bytes) {
        let mut header = [0; 48];
        header[..2].copy_from_slice(&start);
        header[5..8].copy_from_slice(&u32::try_from(data.len()).expect("a segment").to_be_bytes()[1..]);
        for (at, octets) in fields {
            header[*at..*at + octets.len()].copy_from_slice(octets);
        }
        let padding = data.len().next_multiple_of(4) - data.len();
        self.to_send.push_back(Bytes::copy_from_slice(&header));
        self.to_send.push_back(data);
        self.to_send.push_back(Bytes::from_static(&[0; 3]).slice(..padding));
    }

    /// Sends what is to send, and does what follows until nothing moves.
    fn exchange(&mut self) {
        loop {
            let mut moved = self.fill();
            self.connection.process().expect("the protocol is kept");
            while let Some(event) = self.connection.poll_event() {
                moved = true;
                match event {
                    Event::Io(request) => {
                        let result = match &request.io {
                            Io::Read { blocks, .. } => IoResult::Data(self.contents.slice(..*blocks as usize * 512)),
                            _ => IoResult::Done,
                        };
                        self.connection.complete(request.tag, result);
                    }
                    Event::SessionWanted(_) => self.connection.admit(Tsih::MIN),
                    Event::LoggedIn | Event::LoggedOut | Event::Close => {}
                }
            }
            let mut asked = Vec::new();
            while let Some(transmit) = self.connection.poll_transmit() {
                moved = true;
                if transmit.slices()[0][0] == 0x31 {
                    asked.extend_from_slice(transmit.slices()[0]);
                }
            }
            for r2t in asked.chunks_exact(48) {
                self.data_out(r2t);
            }
            if !moved {
                return;
            }
        }
    }

    /// One read: as much as there is room for.
    fn fill(&mut self) -> bool {
        let Some(buffer) = self.connection.receive_buffer() else { return false };
        let mut moved = false;
        while let Some(next) = self.to_send.front_mut() {
            let room = (buffer.capacity() - buffer.len()).min(next.len());
            buffer.extend_from_slice(&next.split_to(room));
            moved |= room > 0;
            if !next.is_empty() {
                break;
            }
            self.to_send.pop_front();
        }
        moved
    }

    /// Answers an R2T with segments of 256 KiB.
    fn data_out(&mut self, r2t: &[u8]) {
        let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|index| r2t[at + index]));
        let (start, octets) = (word(40), word(44));
        let contents = self.contents.clone();
        for number in 0..(octets as usize).div_ceil(256 * 1024) {
            let end = ((number + 1) * 256 * 1024).min(octets as usize);
            let segment = contents.slice(number * 256 * 1024..end);
            let number = u32::try_from(number).expect("a few");
            let offset = start + number * 256 * 1024;
            let last = (number + 1) * 256 * 1024 >= octets;
            let fields: [(usize, &[u8]); 4] =
                [(16, &r2t[16..20]), (20, &r2t[20..24]), (36, &number.to_be_bytes()), (40, &offset.to_be_bytes())];
            self.push([0x05, if last { 0x80 } else { 0 }], &fields, segment);
        }
    }
}
