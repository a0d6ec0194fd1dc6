//! The full feature phase against a simulated initiator: data in all its ways, sequencing, task management, memory.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use assay_iscsi::{Io, ProtocolError};
use proptest::prelude::*;
use support::{BLOCKS, Initiator, cdb_10, logged_in};

const RESERVED: u32 = 0xffff_ffff;
const READ: u8 = 0x40;
const WRITE: u8 = 0x20;

fn cdb_16(opcode: u8, lba: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

fn pattern(octets: usize) -> Vec<u8> {
    (0..octets).map(|index| u8::try_from(index % 251).unwrap()).collect()
}

/// Takes a response: status, sense key and code, residual flags and residual.
fn response(initiator: &mut Initiator) -> (u8, u8, u16, u8, u32) {
    let answer = initiator.answer();
    assert_eq!(answer.opcode(), 0x21, "a SCSI response");
    let (key, code) = match answer.data.get(2..) {
        Some(sense) => (sense[2], u16::from_be_bytes([sense[12], sense[13]])),
        None => (0, 0),
    };
    (answer.header[3], key, code, answer.header[1] & 0x06, answer.word(44))
}

/// Takes a response: status, sense key and code.
fn sense(initiator: &mut Initiator) -> (u8, u8, u16) {
    let (status, key, code, _, _) = response(initiator);
    (status, key, code)
}

/// Reads back and puts the data together, checking every Data-In's numbers.
fn read(initiator: &mut Initiator, lba: u32, blocks: u16, segment: usize) -> Vec<u8> {
    initiator.command(READ, 0x99, u32::from(blocks) * 512, &cdb_10(0x28, lba, blocks));
    let mut data = Vec::new();
    for data_sn in 0.. {
        let answer = initiator.answer();
        assert_eq!((answer.opcode(), answer.word(36)), (0x25, data_sn));
        assert_eq!(answer.word(40) as usize, data.len(), "buffer offset");
        assert!(answer.data.len() <= segment);
        data.extend(answer.data);
        if answer.header[1] & 0x01 != 0 {
            assert_eq!((answer.header[1], answer.header[3]), (0x81, 0), "final, with status GOOD");
            break;
        }
    }
    data
}

#[test]
fn solicited_data_come_burst_by_burst() {
    let keys = [("ImmediateData", "No"), ("MaxBurstLength", "1024"), ("MaxRecvDataSegmentLength", "512")];
    let mut initiator = logged_in(&keys);
    let data = pattern(2048 + 512);
    initiator.command(WRITE, 5, 2560, &cdb_10(0x2a, 10, 5));
    for (number, burst) in data.chunks(1024).enumerate() {
        let r2t = initiator.answer();
        let number = u32::try_from(number).unwrap();
        assert_eq!((r2t.opcode(), r2t.word(36), r2t.word(40)), (0x31, number, number * 1024));
        assert_eq!(r2t.word(44) as usize, burst.len());
        for (index, segment) in burst.chunks(512).enumerate() {
            let index = u32::try_from(index).unwrap();
            let last = (index as usize + 1) * 512 >= burst.len();
            let tags = (5, r2t.word(20));
            initiator.data_out(if last { 0x80 } else { 0 }, tags, index, number * 1024 + index * 512, segment);
        }
    }
    assert_eq!(response(&mut initiator), (0, 0, 0, 0, 0));
    assert_eq!(read(&mut initiator, 10, 5, 512), data);
}

#[test]
fn immediate_and_unsolicited_data_need_no_r2t() {
    let mut initiator = logged_in(&[("InitialR2T", "No"), ("FirstBurstLength", "2048")]);
    let data = pattern(4096);
    let mut header = initiator.command_header(WRITE, 6, 4096, &cdb_10(0x2a, 0, 8));
    header[1] &= 0x7f;
    initiator.send(header, &data[..1024]);
    assert!(initiator.answers.is_empty());
    initiator.data_out(0x80, (6, RESERVED), 0, 1024, &data[1024..2048]);
    let r2t = initiator.answer();
    assert_eq!((r2t.opcode(), r2t.word(40), r2t.word(44)), (0x31, 2048, 2048));
    initiator.data_out(0x80, (6, r2t.word(20)), 0, 2048, &data[2048..]);
    assert_eq!(response(&mut initiator), (0, 0, 0, 0, 0));
    assert_eq!(read(&mut initiator, 0, 8, 8192), data);
}

#[test]
fn digests_cover_both_directions_and_a_bad_one_ends_the_connection() {
    let mut initiator = logged_in(&[("HeaderDigest", "CRC32C"), ("DataDigest", "CRC32C,None")]);
    assert_eq!(initiator.digests, (true, true));
    let data = pattern(512);
    let header = initiator.command_header(WRITE, 1, 512, &cdb_10(0x2a, 3, 1));
    initiator.send(header, &data);
    assert_eq!(response(&mut initiator).0, 0);
    assert_eq!(read(&mut initiator, 3, 1, 8192), data);
    let mut octets = initiator.command_header(0, 2, 0, &[0; 6]).to_vec();
    octets.extend_from_slice(&[0; 4]);
    initiator.send_octets(&octets);
    assert!(initiator.closed);
    assert!(matches!(initiator.error, Some(ProtocolError::Frame(_))));
}

#[test]
fn out_of_range_and_empty_transfers_never_reach_the_backend() {
    let mut initiator = logged_in(&[]);
    let last = u32::try_from(BLOCKS - 1).unwrap();
    for (opcode, direction) in [(0x28, READ), (0x2a, WRITE), (0x2f, 0)] {
        initiator.command(direction, 1, 0, &cdb_10(opcode, last, 0));
        assert_eq!(response(&mut initiator).0, 0, "{opcode:#x}");
        for (lba, blocks) in [(last, 2), (last + 1, 1), (u32::MAX, u16::MAX), (last + 1, 0)] {
            initiator.command(direction, 1, 0, &cdb_10(opcode, lba, blocks));
            assert_eq!(response(&mut initiator), (2, 5, 0x2100, 0, 0), "{opcode:#x} {lba} {blocks}");
        }
    }
    for lba in [BLOCKS, u64::MAX, u64::MAX - 1] {
        initiator.command(READ, 1, 1024, &cdb_16(0x88, lba, 2));
        assert_eq!(response(&mut initiator), (2, 5, 0x2100, 0x02, 1024), "{lba}");
    }
    assert_eq!(initiator.io_count, 0);
}

#[test]
fn residuals_tell_both_ways() {
    let mut initiator = logged_in(&[]);
    initiator.command(READ, 1, 1000, &cdb_10(0x28, 0, 1));
    let under = initiator.answer();
    assert_eq!((under.opcode(), under.header[1], under.word(44), under.data.len()), (0x25, 0x83, 488, 512));
    initiator.command(READ, 1, 200, &cdb_10(0x28, 0, 1));
    let over = initiator.answer();
    assert_eq!((over.header[1], over.word(44), over.data.len()), (0x85, 312, 200));
    // A write that is offered half a block writes nothing.
    let header = initiator.command_header(WRITE, 1, 200, &cdb_10(0x2a, 0, 1));
    initiator.send(header, &[0xff; 200]);
    assert_eq!(response(&mut initiator), (2, 5, 0x0e03, 0x04, 312));
    assert_eq!(read(&mut initiator, 0, 1, 8192), vec![0; 512]);
}

/// What firmware asks of iPXE when it loads a boot loader of 20 MiB.
#[test]
fn a_read_longer_than_a_transfer_comes_in_parts() {
    let mut initiator = logged_in(&[]);
    let written = pattern(512 * 8);
    let header = initiator.command_header(WRITE, 1, 512 * 8, &cdb_10(0x2a, 20_000, 8));
    initiator.send(header, &written);
    assert_eq!(response(&mut initiator).0, 0);
    initiator.io_count = 0;
    let data = read(&mut initiator, 0, 65_535, 256 << 10);
    assert_eq!((data.len(), initiator.io_count), (65_535 * 512, 8), "4 MiB at a time");
    assert_eq!(data[20_000 * 512..][..written.len()], written);
    // Nothing is read that the initiator has no room for, and it is told what the command would have come to.
    initiator.io_count = 0;
    initiator.command(READ, 2, 5 << 20, &cdb_10(0x28, 0, 65_535));
    let (mut octets, mut last) = (0, initiator.answer());
    while last.header[1] & 0x01 == 0 {
        octets += last.data.len();
        last = initiator.answer();
    }
    octets += last.data.len();
    assert_eq!((octets, initiator.io_count), (5 << 20, 2));
    assert_eq!((last.header[1], last.word(44)), (0x85, 65_535 * 512 - (5 << 20)));
    // One block more than READ(10) can say.
    initiator.command(READ, 3, 512, &cdb_16(0x88, 0, 65_536));
    assert_eq!(sense(&mut initiator), (2, 5, 0x2400));
}

/// A driver may send what it read from where it is: on the wire nothing differs.
#[test]
fn a_read_in_place_is_answered_as_one_from_memory() {
    for (digests, may_be) in [("None", true), ("CRC32C", false)] {
        let answers = |in_place: bool| {
            let mut initiator = logged_in(&[("HeaderDigest", "CRC32C"), ("DataDigest", digests)]);
            let header = initiator.command_header(WRITE, 1, 512 * 8, &cdb_10(0x2a, 9000, 8));
            initiator.send(header, &pattern(512 * 8));
            assert_eq!(response(&mut initiator).0, 0);
            initiator.in_place = in_place;
            // All of it, in parts; more than there is room for, with an odd end; less than there is room for.
            for (task_tag, blocks, room) in [(2, 20_000, 20_000 * 512), (3, 9004, 9003 * 512 + 5), (4, 3, 8192)] {
                initiator.command(READ, task_tag, room, &cdb_10(0x28, 0, blocks));
            }
            // What is compared is read into memory.
            initiator.command(0, 5, 0, &cdb_10(0x2f, 0, 8));
            std::mem::take(&mut initiator.answers).into_iter().map(|answer| (answer.header, answer.data))
        };
        assert!(answers(true).eq(answers(false)), "data digest {digests}");
        let mut initiator = logged_in(&[("DataDigest", digests)]);
        initiator.hold_io = true;
        initiator.command(READ, 1, 512, &cdb_10(0x28, 0, 1));
        assert_eq!(initiator.held[0].in_place, may_be);
    }
}

#[test]
fn the_parts_of_long_reads_wait_for_memory_and_can_be_aborted() {
    let mut initiator = logged_in(&[]);
    initiator.hold_io = true;
    for task_tag in 0..8 {
        initiator.command(READ, task_tag, 65_535 * 512, &cdb_10(0x28, 0, 65_535));
    }
    let mut parts = 0;
    while !initiator.held.is_empty() {
        assert!(initiator.held.len() <= 4, "16 MiB at once");
        initiator.run_held();
        parts += 1;
    }
    let ended = initiator.answers.iter().filter(|answer| answer.header[1] & 0x01 != 0).count();
    assert_eq!((parts, ended), (64, 8));
    initiator.answers.clear();
    initiator.command(READ, 9, 65_535 * 512, &cdb_10(0x28, 0, 65_535));
    initiator.run_held();
    let mut abort = [0; 48];
    (abort[0], abort[1]) = (0x42, 0x81);
    abort[16..20].copy_from_slice(&10_u32.to_be_bytes());
    abort[20..24].copy_from_slice(&9_u32.to_be_bytes());
    initiator.send(abort, &[]);
    initiator.run_held();
    assert!(initiator.held.is_empty(), "no part is read after the abort");
    assert_eq!(initiator.answers.back().unwrap().opcode(), 0x22, "the abort is answered");
}

#[test]
fn compare_and_write_tells_where_it_differs() {
    let mut initiator = logged_in(&[]);
    let mut cdb = cdb_16(0x89, 4, 0);
    cdb[13] = 1;
    let mut both = vec![0; 1024];
    both[512..].fill(0xaa);
    let header = initiator.command_header(WRITE, 1, 1024, &cdb);
    initiator.send(header, &both);
    assert_eq!(response(&mut initiator).0, 0);
    let header = initiator.command_header(WRITE, 1, 1024, &cdb);
    initiator.send(header, &both);
    assert_eq!(sense(&mut initiator), (2, 0xe, 0x1d00));
    assert_eq!(read(&mut initiator, 4, 1, 8192), vec![0xaa; 512]);
}

#[test]
fn an_abort_is_answered_only_when_the_io_has_ended() {
    let mut initiator = logged_in(&[]);
    initiator.hold_io = true;
    let header = initiator.command_header(WRITE, 0x11, 512, &cdb_10(0x2a, 0, 1));
    initiator.send(header, &[1; 512]);
    let mut abort = [0; 48];
    abort[..2].copy_from_slice(&[0x42, 0x81]);
    abort[16..20].copy_from_slice(&[0, 0, 0, 0x12]);
    abort[20..24].copy_from_slice(&[0, 0, 0, 0x11]);
    initiator.send(abort, &[]);
    assert!(initiator.answers.is_empty(), "the write still runs");
    initiator.run_held();
    let answer = initiator.answer();
    assert_eq!((answer.opcode(), answer.header[2]), (0x22, 0), "complete");
    assert!(initiator.answers.is_empty(), "an aborted task has no response");
    initiator.send(abort, &[]);
    assert_eq!(initiator.answer().header[2], 1, "no such task any more");
}

#[test]
fn a_reset_is_told_as_a_unit_attention() {
    let mut initiator = logged_in(&[]);
    let mut reset = [0; 48];
    reset[..2].copy_from_slice(&[0x42, 0x85]);
    initiator.send(reset, &[]);
    assert_eq!(initiator.answer().header[2], 0);
    initiator.command(0, 1, 0, &[0; 6]);
    assert_eq!(sense(&mut initiator), (2, 6, 0x2903));
    initiator.command(0, 1, 0, &[0; 6]);
    assert_eq!(response(&mut initiator).0, 0);
}

#[test]
fn target_resets_abort_the_tasks_and_a_cold_one_ends_the_session() {
    for (function, closes) in [(0x86, false), (0x87, true)] {
        let mut initiator = logged_in(&[]);
        initiator.hold_io = true;
        initiator.command(READ, 1, 512, &cdb_10(0x28, 0, 1));
        let mut reset = [0; 48];
        reset[..2].copy_from_slice(&[0x42, function]);
        reset[19] = 9;
        initiator.send(reset, &[]);
        assert!(initiator.answers.is_empty(), "the read still runs");
        initiator.run_held();
        let answer = initiator.answer();
        assert_eq!((answer.opcode(), answer.word(16), answer.header[2]), (0x22, 9, 0));
        assert_eq!((initiator.closed, initiator.answers.len()), (closes, 0), "{function:#x}");
    }
}

#[test]
fn an_initiator_is_asked_to_log_out_and_may() {
    let mut initiator = logged_in(&[]);
    initiator.connection.request_logout(3);
    initiator.pump();
    let message = initiator.answer();
    assert_eq!((message.opcode(), message.word(16), message.header[36]), (0x32, RESERVED, 1));
    assert_eq!(message.header[42..44], [0, 3], "within three seconds");
    let mut logout = [0; 48];
    logout[..2].copy_from_slice(&[0x46, 0x80]);
    initiator.send(logout, &[]);
    assert_eq!(initiator.answer().header[2], 0);
    assert!(initiator.logged_out && initiator.closed);
}

#[test]
fn the_command_window_holds() {
    let mut initiator = logged_in(&[]);
    initiator.hold_io = true;
    let first = initiator.cmd_sn;
    for task_tag in 0..64 {
        initiator.command(READ, task_tag, 512, &cdb_10(0x28, 0, 1));
    }
    assert_eq!(initiator.held.len(), 64);
    // The window is full: what comes beyond it is ignored.
    initiator.command(READ, 64, 512, &cdb_10(0x28, 0, 1));
    assert_eq!(initiator.held.len(), 64);
    initiator.run_held();
    let answer = initiator.answer();
    assert_eq!(answer.word(28), first.wrapping_add(64), "ExpCmdSN");
    assert_eq!(answer.word(32), first.wrapping_add(64), "MaxCmdSN: one place is free");
    // An old number is ignored, a gap ends the connection.
    initiator.cmd_sn = first;
    initiator.command(READ, 70, 512, &cdb_10(0x28, 0, 1));
    assert_eq!((initiator.held.len(), initiator.closed), (63, false));
    initiator.run_held();
    initiator.cmd_sn = first.wrapping_add(65);
    initiator.command(READ, 71, 512, &cdb_10(0x28, 0, 1));
    assert!(initiator.closed);
    assert!(matches!(initiator.error, Some(ProtocolError::CommandGap { .. })));
}

#[test]
fn reads_wait_for_memory_in_their_order() {
    let mut initiator = logged_in(&[]);
    initiator.hold_io = true;
    for task_tag in 0..32 {
        initiator.command(READ, task_tag, 4 << 20, &cdb_10(0x28, task_tag, 8192));
    }
    let mut order = Vec::new();
    while let Some(request) = initiator.held.front() {
        assert!(initiator.held.len() <= 4, "16 MiB at once");
        let Io::Read { lba, .. } = request.io else { panic!("not a read") };
        order.push(lba);
        initiator.run_held();
    }
    assert_eq!(order, (0..32).collect::<Vec<u64>>());
}

#[test]
fn writes_wait_for_memory_before_their_r2t() {
    let mut initiator = logged_in(&[("ImmediateData", "No")]);
    initiator.hold_io = true;
    for task_tag in 0..32 {
        initiator.command(WRITE, task_tag, 4 << 20, &cdb_10(0x2a, 0, 8192));
    }
    assert_eq!(initiator.answers.len(), 4, "R2Ts for 16 MiB");
}

#[test]
fn data_that_nobody_asked_for_end_the_connection() {
    let header = |initiator: &mut Initiator| initiator.command_header(WRITE, 1, 4096, &cdb_10(0x2a, 0, 8));
    // Immediate data where none was agreed on.
    let mut initiator = logged_in(&[("ImmediateData", "No")]);
    let command = header(&mut initiator);
    initiator.send(command, &[0; 512]);
    assert_eq!(initiator.error, Some(ProtocolError::UnexpectedData { task_tag: 1 }));
    assert_eq!((initiator.answer().opcode(), initiator.closed), (0x3f, true), "a Reject, then the end");
    // More than the first burst.
    let mut initiator = logged_in(&[("FirstBurstLength", "512")]);
    let command = header(&mut initiator);
    initiator.send(command, &[0; 1024]);
    assert!(initiator.closed);
    // A tag that no R2T gave out.
    let mut initiator = logged_in(&[("ImmediateData", "No")]);
    let command = header(&mut initiator);
    initiator.send(command, &[]);
    let tag = initiator.answer().word(20);
    initiator.data_out(0x80, (1, tag + 1), 0, 0, &[0; 512]);
    assert!(initiator.closed);
    assert_eq!(initiator.io_count, 0);
}

#[test]
fn data_out_of_order_fail_the_task_only() {
    let mut initiator = logged_in(&[("ImmediateData", "No")]);
    initiator.command(WRITE, 1, 1024, &cdb_10(0x2a, 0, 2));
    let tag = initiator.answer().word(20);
    initiator.data_out(0, (1, tag), 1, 0, &[0; 512]);
    assert_eq!(sense(&mut initiator), (2, 0xb, 0x4b00));
    initiator.data_out(0x80, (1, tag), 0, 512, &[0; 512]);
    assert!(initiator.answers.is_empty() && !initiator.closed);
    assert_eq!(initiator.io_count, 0);
}

#[test]
fn nop_is_echoed_and_logout_ends_the_connection() {
    let mut initiator = logged_in(&[]);
    let mut nop = [0; 48];
    nop[..2].copy_from_slice(&[0x40, 0x80]);
    nop[16..20].copy_from_slice(&[0, 0, 0, 9]);
    nop[20..24].copy_from_slice(&[0xff; 4]);
    initiator.send(nop, b"still there?");
    let echo = initiator.answer();
    assert_eq!((echo.opcode(), echo.word(16), echo.data), (0x20, 9, b"still there?".to_vec()));
    initiator.connection.ping();
    initiator.pump();
    let ping = initiator.answer();
    assert!(initiator.connection.is_ping_unanswered());
    nop[16..20].copy_from_slice(&[0xff; 4]);
    nop[20..24].copy_from_slice(&ping.header[20..24]);
    initiator.send(nop, &[]);
    assert!(!initiator.connection.is_ping_unanswered());
    let mut logout = [0; 48];
    logout[..2].copy_from_slice(&[0x46, 0x80]);
    initiator.send(logout, &[]);
    let answer = initiator.answer();
    assert_eq!((answer.opcode(), answer.header[2]), (0x26, 0));
    assert!(initiator.logged_out && initiator.closed);
}

#[test]
fn a_unit_that_does_not_exist_says_so() {
    let mut initiator = logged_in(&[]);
    let mut header = initiator.command_header(0, 1, 0, &[0; 6]);
    header[9] = 1;
    initiator.send(header, &[]);
    assert_eq!(sense(&mut initiator), (2, 5, 0x2500));
    let mut header = initiator.command_header(READ, 1, 96, &[0x12, 0, 0, 0, 96, 0]);
    header[9] = 1;
    initiator.send(header, &[]);
    assert_eq!(initiator.answer().data[0], 0x7f);
}

/// Whether an operation is whole blocks, not empty, and inside the unit.
fn stays_within(io: &Io) -> bool {
    let within = |lba: u64, blocks: u64| blocks > 0 && lba.checked_add(blocks).is_some_and(|end| end <= BLOCKS);
    match io {
        Io::Read { lba, blocks } => within(*lba, u64::from(*blocks)),
        Io::Write { lba, data, .. } => {
            let octets: usize = data.iter().map(bytes::Bytes::len).sum();
            octets.is_multiple_of(512) && within(*lba, octets as u64 / 512)
        }
        Io::WriteSame { lba, blocks, pattern, .. } => pattern.len() == 512 && within(*lba, *blocks),
        Io::Unmap { ranges } => ranges.iter().all(|(lba, blocks)| within(*lba, u64::from(*blocks))),
        Io::CompareAndWrite { lba, expected, new } => {
            expected.len() == new.len() && within(*lba, expected.len() as u64 / 512)
        }
        Io::Status { lba } => within(*lba, 1),
        Io::Flush => true,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn arbitrary_pdus_never_panic_and_never_leave_the_unit(
        pdus in prop::collection::vec((
            prop::array::uniform32(any::<u8>()), prop::collection::vec(any::<u8>(), 16), any::<bool>(),
            prop::collection::vec(any::<u8>(), 0..600), 0u8..7, 0u8..4,
        ), 1..40),
    ) {
        let mut initiator = logged_in(&[("InitialR2T", "No")]);
        initiator.hold_io = true;
        for (front, cdb, numbered, data, opcode, task_tag) in pdus {
            let mut header = [0; 48];
            header[..32].copy_from_slice(&front);
            header[32..].copy_from_slice(&cdb);
            header[0] = opcode | if numbered { 0 } else { 0x40 };
            header[4] = 0;
            header[8..16].fill(0);
            header[16..20].copy_from_slice(&u32::from(task_tag).to_be_bytes());
            if numbered && opcode != 5 {
                header[24..28].copy_from_slice(&initiator.cmd_sn.to_be_bytes());
                initiator.cmd_sn = initiator.cmd_sn.wrapping_add(1);
            }
            initiator.send(header, &data);
            prop_assert!(initiator.held.iter().all(|request| stays_within(&request.io)));
            if initiator.held.len() > 3 {
                initiator.run_held();
            }
        }
    }

    #[test]
    fn arbitrary_commands_never_panic(
        commands in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 15), 0u32..4096), 1..60),
    ) {
        let mut initiator = logged_in(&[("ImmediateData", "Yes")]);
        for (opcode, rest, expected) in commands {
            let cdb = [&[opcode][..], &rest].concat();
            let header = initiator.command_header(READ | WRITE, 1, expected, &cdb);
            initiator.send(header, &vec![0x5a; expected as usize]);
            prop_assert!(!initiator.closed);
        }
    }
}
