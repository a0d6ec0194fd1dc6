//! An initiator that lies: about lengths, tags, numbers and offsets, without end and without reading what it is sent.
//! Each attempt ends clearly (a refusal, a failed task, a closed connection), costs bounded memory, and reaches no
//! backend. Slow and half-open connections are the driver's to bound.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use assay_iscsi::{Authentication, Io, Portal, ProtocolError, Sessions, Target, TextError};
use std::sync::{Arc, Mutex};
use support::{BLOCKS, INITIATOR, Initiator, RamDisk, TARGET, cdb_10, config, connect, logged_in};

const RESERVED: u32 = 0xffff_ffff;
const READ: u8 = 0x40;
const WRITE: u8 = 0x20;
/// Largest data segment that the target declares.
const SEGMENT: usize = 256 * 1024;

/// A header that promises `octets` of data.
fn promising(mut header: [u8; 48], octets: usize) -> [u8; 48] {
    header[5..8].copy_from_slice(&u32::try_from(octets).unwrap().to_be_bytes()[1..]);
    header
}

/// An immediate PDU.
fn immediate(opcode: u8, flags: u8, task_tag: u32, transfer_tag: u32) -> [u8; 48] {
    let mut header = [0; 48];
    header[..2].copy_from_slice(&[0x40 | opcode, flags]);
    header[16..20].copy_from_slice(&task_tag.to_be_bytes());
    header[20..24].copy_from_slice(&transfer_tag.to_be_bytes());
    header
}

/// Status and sense code of a response.
fn refusal(initiator: &mut Initiator) -> (u8, u16) {
    let answer = initiator.answer();
    assert_eq!(answer.opcode(), 0x21);
    let sense = answer.data.get(2..).unwrap_or_default();
    (answer.header[3], if sense.is_empty() { 0 } else { u16::from_be_bytes([sense[12], sense[13]]) })
}

fn still_answers(initiator: &mut Initiator) {
    let header = immediate(0, 0x80, 0x77, RESERVED);
    initiator.send(header, b"alive");
    let echo = initiator.answers.pop_back().expect("an echo");
    assert_eq!((echo.opcode(), echo.data), (0x20, b"alive".to_vec()));
}

#[test]
fn a_segment_longer_than_declared_is_refused_by_its_header() {
    for (login, limit) in [(true, 8192), (false, SEGMENT)] {
        for octets in [limit + 1, (1 << 24) - 1] {
            let mut initiator = if login { connect() } else { logged_in(&[]) };
            let header = if login { [0x43; 48] } else { immediate(0, 0x80, 1, RESERVED) };
            initiator.send_octets(&promising(with_no_more_headers(header), octets));
            assert!(initiator.closed && matches!(initiator.error, Some(ProtocolError::Frame(_))), "{octets}");
            assert!(initiator.connection.receive_buffer().is_none());
        }
    }
}

fn with_no_more_headers(mut header: [u8; 48]) -> [u8; 48] {
    header[4] = 0;
    header
}

#[test]
fn a_promised_segment_takes_no_more_memory_than_it_may_be_long() {
    let mut initiator = logged_in(&[]);
    initiator.send_octets(&promising(immediate(0, 0x80, 1, RESERVED), SEGMENT));
    let buffer = initiator.connection.receive_buffer().unwrap();
    assert!(buffer.capacity() <= SEGMENT + 64 * 1024, "{}", buffer.capacity());
}

#[test]
fn additional_headers_are_skipped_whatever_they_say() {
    for words in [1u8, 5, 255] {
        let mut initiator = logged_in(&[]);
        let mut header = initiator.command_header(READ, 1, 512, &cdb_10(0x28, 0, 1));
        header[4] = words;
        // Their own lengths lie: an extended CDB of 64 KiB, then rubbish.
        let mut octets = header.to_vec();
        octets.extend([0xff, 0xff, 0x01, 0x00].repeat(usize::from(words)));
        for piece in octets.chunks(37) {
            assert!(initiator.answers.is_empty());
            initiator.send_octets(piece);
        }
        assert_eq!(initiator.answer().opcode(), 0x25, "{words} words");
        still_answers(&mut initiator);
    }
}

#[test]
fn a_task_tag_in_use_is_rejected_and_its_task_goes_on() {
    let mut initiator = logged_in(&[("ImmediateData", "No")]);
    initiator.command(WRITE, 5, 512, &cdb_10(0x2a, 0, 1));
    let transfer_tag = initiator.answer().word(20);
    for (direction, opcode) in [(READ, 0x28), (WRITE, 0x2a), (0, 0x00)] {
        initiator.command(direction, 5, 512, &cdb_10(opcode, 9, 1));
        let rejected = initiator.answer();
        assert_eq!((rejected.opcode(), rejected.header[2]), (0x3f, 0x07), "{opcode:#x}");
    }
    assert_eq!(initiator.io_count, 0);
    initiator.data_out(0x80, (5, transfer_tag), 0, 0, &[7; 512]);
    assert_eq!(refusal(&mut initiator), (0, 0));
    // The reserved tag names no task.
    initiator.command(READ, RESERVED, 512, &cdb_10(0x28, 0, 1));
    assert_eq!(initiator.error, Some(ProtocolError::TaskTag { task_tag: RESERVED }));
}

#[test]
fn units_that_do_not_exist_reach_no_backend() {
    let mut initiator = logged_in(&[]);
    let units: [[u8; 8]; 6] = [
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0x40, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
        [0xc1, 1, 0, 0, 0, 0, 0, 0],
        [0x80, 0, 0, 0, 0, 0, 0, 0],
        [0xff; 8],
    ];
    for unit in units {
        for (direction, cdb) in [(READ, cdb_10(0x28, 0, 1)), (WRITE, cdb_10(0x2a, 0, 1)), (WRITE, cdb_10(0x41, 0, 1))] {
            let mut header = initiator.command_header(direction, 1, 512, &cdb);
            header[8..16].copy_from_slice(&unit);
            initiator.send(header, if direction == WRITE { &[0; 512] } else { &[] });
            assert_eq!(refusal(&mut initiator), (2, 0x2500), "{unit:?}");
        }
        let mut reset = immediate(2, 0x85, 9, RESERVED);
        reset[8..16].copy_from_slice(&unit);
        initiator.send(reset, &[]);
        assert_eq!(initiator.answer().header[2], 2, "no such unit: {unit:?}");
    }
    assert_eq!(initiator.io_count, 0);
    still_answers(&mut initiator);
}

#[test]
fn transfer_tags_are_believed_for_their_task_and_burst_only() {
    let keys = [("ImmediateData", "No"), ("MaxBurstLength", "512")];
    // Task 1 and 2 each have a burst of 512 outstanding; task 3 does not exist.
    let start = || {
        let mut initiator = logged_in(&keys);
        for task_tag in [1, 2] {
            initiator.command(WRITE, task_tag, 1024, &cdb_10(0x2a, 0, 2));
        }
        let tags = [initiator.answer().word(20), initiator.answer().word(20)];
        (initiator, tags)
    };
    for wild in [0, 3, 0xdead_beef, RESERVED] {
        let (mut initiator, _) = start();
        initiator.data_out(0x80, (1, wild), 0, 0, &[0; 512]);
        assert_eq!(initiator.error, Some(ProtocolError::UnexpectedData { task_tag: 1 }), "{wild:#x}");
    }
    let (mut initiator, tags) = start();
    initiator.data_out(0x80, (1, tags[1]), 0, 0, &[0; 512]);
    assert!(initiator.closed, "the other task's tag");
    let (mut initiator, tags) = start();
    initiator.data_out(0x80, (1, tags[0]), 0, 0, &[0; 512]);
    assert_ne!(initiator.answer().word(20), tags[0], "the next burst has a tag of its own");
    initiator.data_out(0x80, (1, tags[0]), 0, 512, &[0; 512]);
    assert!(initiator.closed, "the tag of a burst that is over");
    let (mut initiator, tags) = start();
    initiator.data_out(0x80, (3, tags[0]), 0, 0, &[0; 512]);
    assert!(!initiator.closed && initiator.answers.is_empty(), "a task that is gone may have had data on the way");
    assert_eq!(initiator.io_count, 0);
}

#[test]
fn data_beyond_a_burst_end_the_connection() {
    for (sent, offset) in [(1024, 0), (513, 0), (512, 512)] {
        let mut initiator = logged_in(&[("ImmediateData", "No"), ("MaxBurstLength", "512")]);
        initiator.command(WRITE, 1, 4096, &cdb_10(0x2a, 0, 8));
        let tag = initiator.answer().word(20);
        initiator.data_out(if offset == 0 { 0x80 } else { 0 }, (1, tag), 0, 0, &vec![0; sent]);
        if offset > 0 {
            initiator.data_out(0x80, (1, tag), 1, offset, &[0; 4]);
        }
        assert_eq!(initiator.error, Some(ProtocolError::UnexpectedData { task_tag: 1 }), "{sent}");
        assert_eq!(initiator.io_count, 0);
    }
    // Unsolicited: the first burst holds, over immediate data and PDUs together.
    let mut initiator = logged_in(&[("InitialR2T", "No"), ("FirstBurstLength", "1024")]);
    let mut header = initiator.command_header(WRITE, 1, 4096, &cdb_10(0x2a, 0, 8));
    header[1] &= 0x7f;
    initiator.send(header, &[0; 512]);
    initiator.data_out(0, (1, RESERVED), 0, 512, &[0; 512]);
    assert!(!initiator.closed);
    initiator.data_out(0x80, (1, RESERVED), 1, 1024, &[0; 4]);
    assert!(initiator.closed);
    // Unsolicited data where an R2T must come first.
    let mut initiator = logged_in(&[("InitialR2T", "Yes")]);
    let mut header = initiator.command_header(WRITE, 1, 4096, &cdb_10(0x2a, 0, 8));
    header[1] &= 0x7f;
    initiator.send(header, &[]);
    assert!(initiator.closed);
}

#[test]
fn lies_about_offsets_and_numbers_fail_the_task_and_write_nothing() {
    for (data_sn, offset, flags, octets) in [
        (1, 0, 0x80, 512),
        (RESERVED, 0, 0x80, 512),
        (0, 512, 0x80, 512),
        (0, u32::MAX, 0x80, 512),
        // The burst is said to be over before it is.
        (0, 0, 0x80, 100),
        (0, 0, 0x80, 0),
    ] {
        let mut initiator = logged_in(&[("ImmediateData", "No")]);
        initiator.command(WRITE, 1, 512, &cdb_10(0x2a, 0, 1));
        let tag = initiator.answer().word(20);
        initiator.data_out(flags, (1, tag), data_sn, offset, &vec![0xff; octets]);
        assert_eq!(refusal(&mut initiator), (2, 0x4b00), "DataSN {data_sn}, offset {offset}, {octets} octets");
        assert_eq!(initiator.io_count, 0);
        still_answers(&mut initiator);
    }
}

#[test]
fn data_in_crumbs_cost_no_more_than_their_length() {
    let mut initiator = logged_in(&[("ImmediateData", "No"), ("MaxRecvDataSegmentLength", "8192")]);
    initiator.hold_io = true;
    let octets = 200 * 512;
    initiator.command(WRITE, 1, octets, &cdb_10(0x2a, 0, 200));
    let tag = initiator.answer().word(20);
    for offset in 0..octets {
        let last = offset + 1 == octets;
        initiator.data_out(
            if last { 0x80 } else { 0 },
            (1, tag),
            offset,
            offset,
            &[u8::try_from(offset % 251).unwrap()],
        );
    }
    let Io::Write { data, .. } = &initiator.held[0].io else { panic!("not a write") };
    assert!(data.len() <= 2, "{} pieces", data.len());
    assert!(data.concat().iter().enumerate().all(|(at, octet)| usize::from(*octet) == at % 251));
}

#[test]
fn empty_data_without_end_take_nothing_and_the_task_can_be_aborted() {
    let mut initiator = logged_in(&[("ImmediateData", "No")]);
    initiator.command(WRITE, 1, 512, &cdb_10(0x2a, 0, 1));
    let tag = initiator.answer().word(20);
    for data_sn in 0..5000 {
        initiator.data_out(0, (1, tag), data_sn, 0, &[]);
    }
    assert!(initiator.answers.is_empty() && !initiator.closed);
    initiator.send(immediate(2, 0x81, 2, 1), &[]);
    assert_eq!(initiator.answer().header[2], 0);
    initiator.data_out(0x80, (1, tag), 5000, 0, &[1; 512]);
    assert_eq!((initiator.io_count, initiator.closed), (0, false));
}

#[test]
fn what_is_merged_and_compared_is_counted_as_often_as_it_is_held() {
    // ORWRITE holds three times its length, VERIFY of all data twice: fewer run at once than of plain writes.
    for (opcode, bytchk, at_once) in [(0x8a, 0, 4), (0x8f, 2, 2), (0x8b, 0, 1)] {
        let mut initiator = logged_in(&[("ImmediateData", "No")]);
        for task_tag in 0..8 {
            let mut cdb = [0; 16];
            cdb[..2].copy_from_slice(&[opcode, bytchk]);
            cdb[12] = 0x20;
            initiator.command(WRITE, task_tag, 4 << 20, &cdb);
        }
        assert_eq!(initiator.answers.len(), at_once, "{opcode:#x}");
    }
}

#[test]
fn command_numbers_are_taken_once_in_order_and_within_the_window() {
    let mut initiator = logged_in(&[]);
    let number = initiator.cmd_sn;
    initiator.command(READ, 1, 512, &cdb_10(0x28, 0, 1));
    initiator.answers.clear();
    // Replayed, long past, and beyond the window: ignored.
    for old in [number, number.wrapping_sub(1), number.wrapping_add(0x8000_0000), number.wrapping_add(1 + 64)] {
        initiator.cmd_sn = old;
        initiator.command(READ, 2, 512, &cdb_10(0x28, 0, 1));
        assert!(initiator.answers.is_empty() && !initiator.closed, "{old}");
    }
    assert_eq!(initiator.io_count, 1);
    // A number that is left out can never come on the one connection of a session.
    initiator.cmd_sn = number.wrapping_add(2);
    initiator.command(READ, 3, 512, &cdb_10(0x28, 0, 1));
    let gap = ProtocolError::CommandGap { received: number.wrapping_add(2), expected: number.wrapping_add(1) };
    assert_eq!(initiator.error, Some(gap));
}

#[test]
fn command_numbers_go_round() {
    let mut initiator = connect();
    initiator.cmd_sn = u32::MAX - 2;
    assert_eq!(initiator.log_in(&[]).status(), 0);
    for task_tag in 0..6 {
        initiator.command(READ, task_tag, 512, &cdb_10(0x28, 0, 1));
        assert_eq!(initiator.answer().opcode(), 0x25);
    }
    assert_eq!(initiator.cmd_sn, 3);
}

#[test]
fn immediate_commands_beside_the_window_are_bounded() {
    let mut initiator = logged_in(&[]);
    initiator.hold_io = true;
    for task_tag in 0..200 {
        let mut header = initiator.command_header(READ, task_tag, 512, &cdb_10(0x28, 0, 1));
        initiator.cmd_sn = initiator.cmd_sn.wrapping_sub(1);
        header[0] |= 0x40;
        initiator.send(header, &[]);
    }
    assert_eq!(initiator.held.len(), 8);
    assert!(initiator.answers.iter().all(|answer| (answer.opcode(), answer.header[2]) == (0x3f, 0x06)));
    assert_eq!(initiator.answers.len(), 192);
}

#[test]
fn an_initiator_that_reads_nothing_is_not_read_from() {
    let mut initiator = logged_in(&[]);
    let mut ping = promising(immediate(0, 0x80, 1, RESERVED), 8192).to_vec();
    ping.extend([0x5a; 8192]);
    let mut taken = 0;
    while let Some(buffer) = initiator.connection.receive_buffer() {
        buffer.extend_from_slice(&ping);
        initiator.connection.process().unwrap();
        taken += 1;
        assert!(taken < 2000, "the queue has no end");
    }
    assert!(taken * ping.len() < 5 << 20, "{taken} pings are queued");
    // Once it reads, everything goes on.
    initiator.pump();
    assert_eq!(initiator.answers.len(), taken);
    initiator.answers.clear();
    still_answers(&mut initiator);
}

#[test]
fn task_management_floods_are_bounded() {
    let mut initiator = logged_in(&[]);
    initiator.hold_io = true;
    initiator.command(WRITE, 1, 0, &cdb_10(0x41, 0, 1));
    let header = initiator.command_header(READ, 2, 512, &cdb_10(0x28, 0, 1));
    initiator.send(header, &[]);
    initiator.answers.clear();
    let held = initiator.held.len();
    assert!(held >= 1);
    // The first waits for the I/O that it aborted; the others have nothing to wait for, or name nothing.
    for task_tag in 100..400 {
        initiator.send(immediate(2, 0x82, task_tag, RESERVED), &[]);
        initiator.send(immediate(2, 0x81, task_tag, task_tag), &[]);
        initiator.send(immediate(2, 0x80 | 0x7f, task_tag, RESERVED), &[]);
        initiator.send(immediate(2, 0x88, task_tag, RESERVED), &[]);
    }
    assert_eq!(initiator.answers.len(), 4 * 300 - 1, "all but the first are answered at once");
    initiator.answers.clear();
    while !initiator.held.is_empty() {
        initiator.run_held();
    }
    let answer = initiator.answer();
    assert_eq!((answer.opcode(), answer.word(16), answer.header[2]), (0x22, 100, 0));
    still_answers(&mut initiator);
}

#[test]
fn login_texts_that_make_no_sense_are_refused() {
    let many: String = (0..65).map(|number| format!("X-{number}=1\0")).collect();
    let long_key = format!("{}=1\0", "K".repeat(64));
    let long_name = format!("InitiatorName=iqn.{}\0TargetName={TARGET}\0", "n".repeat(250));
    let names = format!("InitiatorName={INITIATOR}\0TargetName={TARGET}\0");
    for (text, what) in [
        (many.as_bytes(), "too many keys"),
        (long_key.as_bytes(), "a key that is too long"),
        (long_name.as_bytes(), "a name that is too long"),
        (&names.as_bytes()[..names.len() - 1], "an unterminated value"),
        (b"InitiatorName", "a key without a value"),
        (b"=x\0", "a value without a key"),
        (b"InitiatorName=\xff\xfe\0", "no text at all"),
        (b"InitiatorName=a\0InitiatorName=b\0", "a repeated key"),
        (b"InitiatorName=\0TargetName=\0", "empty names"),
    ] {
        let mut initiator = connect();
        let mut header = [0; 48];
        header[..2].copy_from_slice(&[0x43, 0x87]);
        header[8..14].copy_from_slice(&initiator.isid);
        initiator.send(header, text);
        assert_eq!(initiator.answer().status(), 0x0200, "{what}");
        assert!(initiator.closed && !initiator.logged_in, "{what}");
    }
}

#[test]
fn a_login_that_never_ends_is_ended() {
    // Continued without a word, going round in a stage, and proposing the same keys again and again.
    let rounds: [(u8, &[(&str, &str)]); 4] = [
        (0x40, &[]),
        (0x04, &[]),
        (0x04, &[("HeaderDigest", "CRC32C,None"), ("MaxBurstLength", "512")]),
        (0x44, &[("X-part", "1")]),
    ];
    for (stages, keys) in rounds {
        let mut initiator = connect();
        let names = [("InitiatorName", INITIATOR), ("TargetName", TARGET)];
        initiator.login_request(if stages & 0x0c == 0 { 0x00 } else { 0x04 }, &names);
        let mut requests = 1;
        while !initiator.closed {
            initiator.login_request(stages, keys);
            requests += 1;
            assert!(requests < 40, "{stages:#x} goes on");
        }
        assert!(!initiator.logged_in);
    }
}

#[test]
fn stages_cannot_be_left_out_or_gone_back_to() {
    for stages in [0x83, 0x84, 0x85, 0x86, 0x8b, 0x8c, 0x8f, 0xc7] {
        let mut initiator = connect();
        let names = [("InitiatorName", INITIATOR), ("TargetName", TARGET)];
        // In the operational stage already.
        initiator.login_request(0x04, &names);
        let refused = initiator.login_request(stages, &[]);
        assert!(matches!(refused.status(), 0x0200 | 0x020b), "{stages:#x}: {:#x}", refused.status());
        assert!(initiator.closed && !initiator.logged_in);
    }
}

#[test]
fn a_login_keeps_its_session_and_its_connection() {
    for (at, what) in [(8, "ISID"), (21, "CID"), (19, "task tag"), (15, "TSIH")] {
        let mut initiator = connect();
        initiator.login_request(0x04, &[("InitiatorName", INITIATOR), ("TargetName", TARGET)]);
        let mut header = [0; 48];
        header[..2].copy_from_slice(&[0x43, 0x87]);
        header[8..14].copy_from_slice(&initiator.isid);
        header[19] = 1;
        header[at] ^= 0x55;
        initiator.send(header, &[]);
        assert_ne!(initiator.answer().status(), 0, "{what}");
        assert!(initiator.closed && !initiator.logged_in, "{what}");
    }
}

#[test]
fn a_command_right_behind_a_login_waits_for_it() {
    // In the same TCP segment, before the session registry has spoken: it is not taken for a login request.
    let mut initiator = connect();
    let text = format!("InitiatorName={INITIATOR}\0TargetName={TARGET}\0");
    let mut login = [0; 48];
    login[..2].copy_from_slice(&[0x43, 0x87]);
    login[8..14].copy_from_slice(&initiator.isid);
    login[24..28].copy_from_slice(&initiator.cmd_sn.to_be_bytes());
    let mut octets = promising(login, text.len()).to_vec();
    octets.extend(text.as_bytes());
    octets.resize(octets.len().next_multiple_of(4), 0);
    octets.extend(initiator.command_header(READ, 1, 512, &cdb_10(0x28, 0, 1)));
    initiator.send_octets(&octets);
    assert_eq!((initiator.answer().opcode(), initiator.answer().opcode()), (0x23, 0x25));
}

#[test]
fn text_requests_are_bounded_and_continued_by_their_own_tag_only() {
    let mut initiator = logged_in(&[]);
    // Continued by a tag that nobody gave out, at the start and in the middle.
    initiator.send(immediate(4, 0x80, 1, 0x1234), b"SendTargets=\0");
    let rejected = initiator.answer();
    assert_eq!((rejected.opcode(), rejected.header[2]), (0x3f, 0x09));
    initiator.send(immediate(4, 0x40, 1, RESERVED), b"SendTar");
    let tag = initiator.answer().word(20);
    assert_ne!(tag, RESERVED);
    initiator.send(immediate(4, 0x80, 1, tag ^ 1), b"gets=\0");
    assert_eq!(initiator.answer().opcode(), 0x3f);
    initiator.send(immediate(4, 0x80, 1, tag), b"gets=\0");
    let list = initiator.answer();
    assert_eq!((list.opcode(), list.key("TargetName").as_deref()), (0x24, Some(TARGET)));
    // A new text drops the one before.
    initiator.send(immediate(4, 0x40, 1, RESERVED), b"X-left=");
    initiator.answer();
    initiator.send(immediate(4, 0x80, 1, RESERVED), b"SendTargets=\0");
    assert_eq!(initiator.answer().key("X-left"), None);
    // Without end.
    initiator.send(immediate(4, 0x40, 1, RESERVED), &[b'x'; 4096]);
    for _ in 0..8 {
        let Some(answer) = initiator.answers.pop_front() else { break };
        initiator.send(immediate(4, 0x40, 1, answer.word(20)), &[b'x'; 4096]);
    }
    let limit = 16 * 1024;
    assert_eq!(initiator.error, Some(ProtocolError::Text(TextError::TooLong { limit })));
}

#[test]
fn a_session_shows_other_targets_to_nobody() {
    let portal = Arc::new(Portal::default());
    portal.insert(Arc::new(Target::new(config(BLOCKS, Authentication::None)).unwrap()));
    let mut other = config(BLOCKS, Authentication::None);
    other.name = "iqn.2026-01.example:other".into();
    portal.insert(Arc::new(Target::new(other).unwrap()));
    let sessions = Arc::new(Mutex::new(Sessions::default()));
    let mut initiator = Initiator::new(portal, Arc::new(RamDisk::new(64, 512)), sessions, 1);
    assert_eq!(initiator.log_in(&[]).status(), 0);
    for value in ["All", "iqn.2026-01.example:other", "*"] {
        initiator.send(immediate(4, 0x80, 1, RESERVED), format!("SendTargets={value}\0").as_bytes());
        assert_eq!(initiator.answer().data, b"", "{value}");
    }
}

#[test]
fn pdus_out_of_place_are_rejected_or_end_the_connection() {
    let mut initiator = logged_in(&[]);
    for opcode in [0x07, 0x0f, 0x10, 0x1c, 0x20, 0x25, 0x31, 0x3f] {
        initiator.send(immediate(opcode, 0x80, 1, RESERVED), &[]);
        let rejected = initiator.answer();
        assert_eq!((rejected.opcode(), rejected.header[2]), (0x3f, 0x05), "{opcode:#x}");
        assert_eq!(rejected.data[0], 0x40 | opcode, "the header that it is about");
    }
    // No recovery of a connection that there is not, and no data for a NOP that was never sent.
    let mut logout = immediate(6, 0x81, 1, RESERVED);
    logout[20..22].copy_from_slice(&[0, 9]);
    initiator.send(logout, &[]);
    assert_eq!(initiator.answer().header[2], 1, "no such connection");
    initiator.send(immediate(6, 0x82, 1, RESERVED), &[]);
    assert_eq!(initiator.answer().header[2], 2, "no recovery");
    initiator.send(immediate(0, 0x80, RESERVED, 0x99), &[]);
    still_answers(&mut initiator);
    initiator.send(immediate(3, 0x87, 1, RESERVED), &[]);
    assert_eq!(initiator.error, Some(ProtocolError::UnexpectedPdu { opcode: 0x03 }));
    // A discovery session has no disk.
    let mut initiator = connect();
    let names = [("InitiatorName", INITIATOR), ("SessionType", "Discovery")];
    assert_eq!(initiator.login_request(0x87, &names).status(), 0);
    initiator.send(immediate(2, 0x85, 1, RESERVED), &[]);
    assert_eq!(initiator.answer().header[2], 5, "no task management");
    initiator.command(READ, 1, 512, &cdb_10(0x28, 0, 1));
    assert_eq!(initiator.error, Some(ProtocolError::UnexpectedPdu { opcode: 0x01 }));
    assert_eq!(initiator.io_count, 0);
}

#[test]
fn expected_lengths_that_lie_move_no_more_than_the_command_does() {
    let mut initiator = logged_in(&[("ImmediateData", "No")]);
    initiator.command(READ, 1, u32::MAX, &cdb_10(0x28, 0, 1));
    let answer = initiator.answer();
    assert_eq!((answer.data.len(), answer.header[1] & 0x06, answer.word(44)), (512, 0x02, u32::MAX - 512));
    initiator.command(WRITE, 1, u32::MAX, &cdb_10(0x2a, 0, 1));
    let r2t = initiator.answer();
    assert_eq!((r2t.opcode(), r2t.word(44)), (0x31, 512), "no more is asked for than is written");
    initiator.data_out(0x80, (1, r2t.word(20)), 0, 0, &[1; 512]);
    let done = initiator.answer();
    assert_eq!((done.header[3], done.header[1] & 0x06, done.word(44)), (0, 0x02, u32::MAX - 512));
    // Directions that are not the command's.
    initiator.command(WRITE, 1, 512, &cdb_10(0x28, 0, 1));
    assert_eq!(initiator.answer().opcode(), 0x25);
    initiator.command(0, 1, 512, &cdb_10(0x2a, 0, 1));
    assert_eq!(refusal(&mut initiator), (0, 0));
    assert_eq!(initiator.io_count, 3, "a write without data writes nothing");
}
