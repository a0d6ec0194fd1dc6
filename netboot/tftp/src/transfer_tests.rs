//! A simulated pair: the engine against a client written from the RFCs, over a network that loses what it is told to,
//! under a clock wound by hand.

use super::*;
use crate::options::OptionLimits;
use crate::packet::ReadRequest;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// A client that keeps blocks in order and acknowledges each window's end, each gap, and each repetition.
struct Client {
    block_bytes: usize,
    window: u64,
    received: Vec<u8>,
    blocks: u64,
    since_acknowledgement: u64,
    complete: bool,
}

impl Client {
    fn new(negotiated: &Negotiated) -> Self {
        Self {
            block_bytes: negotiated.block_bytes.into(),
            window: negotiated.window_blocks.into(),
            received: Vec::new(),
            blocks: 0,
            since_acknowledgement: 0,
            complete: false,
        }
    }

    /// Takes one packet of the server, gives the block to acknowledge.
    fn receive(&mut self, packet: &[u8]) -> Option<u16> {
        let opcode = packet[1];
        if opcode == 6 {
            return Some(0);
        }
        assert_eq!(opcode, 3, "the server sent neither OACK nor DATA");
        let number = u16::from_be_bytes([packet[2], packet[3]]);
        let expected = wire_number(self.blocks + 1);
        if number != expected {
            self.since_acknowledgement = 0;
            return Some(wire_number(self.blocks));
        }
        let data = &packet[4..];
        self.received.extend_from_slice(data);
        self.blocks += 1;
        self.since_acknowledgement += 1;
        self.complete = data.len() < self.block_bytes;
        if self.complete || self.since_acknowledgement == self.window {
            self.since_acknowledgement = 0;
            return Some(wire_number(self.blocks));
        }
        None
    }
}

struct Run {
    received: Vec<u8>,
    outcome: Outcome,
    packets: usize,
}

/// Runs a whole transfer; the packets (of either direction, counted together) in `lost` never arrive.
fn run(content: &[u8], negotiated: &Negotiated, lost: &BTreeSet<usize>, duplicate_acknowledgements: bool) -> Run {
    let mut now = Instant::now();
    let mut transfer = Transfer::start(now, Bytes::copy_from_slice(content), negotiated.clone());
    let mut client = Client::new(negotiated);
    let mut packets = 0;
    loop {
        let mut out = Vec::new();
        let segment = transfer.poll_transmit(usize::MAX, &mut out);
        for packet in segment.map(|size| out.chunks(size).collect::<Vec<_>>()).unwrap_or_default() {
            packets += 1;
            if lost.contains(&packets) {
                continue;
            }
            let Some(block) = client.receive(packet) else { continue };
            packets += 1;
            if lost.contains(&packets) {
                continue;
            }
            for _ in 0..=usize::from(duplicate_acknowledgements) {
                transfer.handle_packet(now, &ClientPacket::Acknowledgement(block));
            }
        }
        if let Some(outcome) = transfer.outcome() {
            return Run { received: client.received, outcome, packets };
        }
        if segment.is_none() {
            now = transfer.poll_timeout().unwrap();
            transfer.handle_timeout(now);
        }
        assert!(packets < 1_000_000, "the transfer does not end");
    }
}

fn negotiated(block_bytes: u16, window_blocks: u16, options: bool) -> Negotiated {
    let acknowledged = if options { vec![("blksize", block_bytes.into())] } else { Vec::new() };
    Negotiated { block_bytes, window_blocks, timeout: Duration::from_secs(1), acknowledged }
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| u8::try_from(index % 251).unwrap()).collect()
}

#[test]
fn row_6_the_last_block_may_be_empty() {
    for bytes in [0, 1, 511, 512, 513, 1024] {
        let run = run(&content(bytes), &negotiated(512, 1, false), &BTreeSet::new(), false);
        assert_eq!((run.received, run.outcome), (content(bytes), Outcome::Complete));
        assert_eq!(run.packets, (bytes / 512 + 1) * 2, "a multiple of the block size ends with an empty block");
    }
}

#[test]
fn any_one_lost_packet_is_made_up_for() {
    for window in [1, 4, 7] {
        let plain = run(&content(10_000), &negotiated(512, window, true), &BTreeSet::new(), false);
        for lost in 1..=plain.packets {
            let run = run(&content(10_000), &negotiated(512, window, true), &BTreeSet::from([lost]), false);
            assert_eq!(run.received, content(10_000), "window {window}, packet {lost} lost");
            // The last acknowledgement is never repeated by this client once it is complete and gone.
            let expected = if lost == plain.packets { run.outcome } else { Outcome::Complete };
            assert_eq!(run.outcome, expected, "window {window}, packet {lost} lost");
        }
    }
}

#[test]
fn row_6_duplicate_acknowledgements_double_nothing() {
    for window in [1, 4] {
        let plain = run(&content(50_000), &negotiated(512, window, true), &BTreeSet::new(), false);
        let doubled = run(&content(50_000), &negotiated(512, window, true), &BTreeSet::new(), true);
        assert_eq!(doubled.received, content(50_000));
        assert_eq!(doubled.packets, plain.packets, "window {window}: the apprentice is at work");
    }
}

#[test]
fn row_6_block_numbers_roll_over() {
    let bytes = 8 * 140_000 + 3;
    for window in [1, 16] {
        let run = run(&content(bytes), &negotiated(8, window, true), &BTreeSet::from([131_071, 131_074]), false);
        assert_eq!(run.outcome, Outcome::Complete);
        assert!(run.received == content(bytes), "window {window}: content differs");
    }
}

#[test]
fn row_2_a_silent_peer_gets_three_packets_in_five_seconds() {
    for options in [true, false] {
        let start = Instant::now();
        let mut transfer = Transfer::start(start, content(5000).into(), negotiated(512, 1, options));
        let mut packets = 0;
        let mut now = start;
        while transfer.outcome().is_none() {
            let mut out = Vec::new();
            while transfer.poll_transmit(usize::MAX, &mut out).is_some() {
                packets += 1;
            }
            now = transfer.poll_timeout().unwrap();
            transfer.handle_timeout(now);
        }
        assert_eq!(transfer.outcome(), Some(Outcome::TimedOut { answered: false }));
        assert_eq!(packets, 3);
        assert!(now - start <= Duration::from_secs(5), "held for {:?}", now - start);
        assert_eq!(transfer.poll_timeout(), None);
    }
}

#[test]
fn row_3_an_error_ends_the_transfer_at_once() {
    let now = Instant::now();
    let mut transfer = Transfer::start(now, content(5000).into(), negotiated(1468, 4, true));
    let mut out = Vec::new();
    assert!(transfer.poll_transmit(8, &mut out).is_some());
    transfer.handle_packet(now, &ClientPacket::Error(8));
    assert_eq!(transfer.outcome(), Some(Outcome::Refused { code: 8 }));
    assert_eq!(transfer.poll_transmit(8, &mut out), None);
    transfer.handle_packet(now, &ClientPacket::Acknowledgement(0));
    assert_eq!(transfer.outcome(), Some(Outcome::Refused { code: 8 }), "the dead do not answer");
}

#[test]
fn acknowledgements_of_what_was_not_sent_change_nothing() {
    let now = Instant::now();
    let mut transfer = Transfer::start(now, content(50_000).into(), negotiated(512, 4, false));
    let mut out = Vec::new();
    assert_eq!(transfer.poll_transmit(usize::MAX, &mut out), Some(516));
    for wild in [5, 6, 1000, 65535] {
        transfer.handle_packet(now, &ClientPacket::Acknowledgement(wild));
        assert_eq!(transfer.poll_transmit(usize::MAX, &mut out), None, "ACK {wild} caused packets");
    }
    transfer.handle_packet(now, &ClientPacket::Acknowledgement(4));
    assert_eq!(transfer.poll_transmit(usize::MAX, &mut out), Some(516));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_arrives_is_what_was_sent(
        bytes in 0_usize..20_000,
        block in 8_u16..1469,
        window in 1_u16..17,
        options: bool,
        lost in proptest::collection::btree_set(1_usize..400, 0..4),
    ) {
        let sent = content(bytes);
        let run = run(&sent, &negotiated(block, window, options), &lost, false);
        // Losing three packets in a row to a peer that never answered is a silent peer.
        if run.outcome == Outcome::Complete {
            prop_assert_eq!(run.received, sent);
        } else {
            prop_assert!(sent.starts_with(&run.received));
        }
    }

    #[test]
    fn no_sequence_of_acknowledgements_panics(acks in proptest::collection::vec(any::<u16>(), 0..100), window in 1_u16..65) {
        let now = Instant::now();
        let request = ReadRequest { name: b"a", octet: true, options: Vec::new() };
        let mut negotiated = Negotiated::of(&request, 0, &OptionLimits::default());
        negotiated.window_blocks = window;
        let mut transfer = Transfer::start(now, content(100_000).into(), negotiated);
        for ack in acks {
            let mut out = Vec::new();
            transfer.poll_transmit(usize::MAX, &mut out);
            prop_assert!(out.len() <= usize::from(window) * 516);
            transfer.handle_packet(now, &ClientPacket::Acknowledgement(ack));
        }
    }
}
