//! What initiators look at before they trust a disk, and what hypervisors and clusters send: vital pages, asymmetric
//! access, provisioning, atomic test and set, copies, reservations over two paths.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use assay_iscsi::{Authentication, Io, Portal, SessionLimit, Sessions, Target};
use std::sync::{Arc, Mutex};
use support::{BLOCKS, Initiator, RamDisk, TARGET, config};

const READ: u8 = 0x40;
const WRITE: u8 = 0x20;

/// A target that several sessions may log in to.
struct Site {
    portal: Arc<Portal>,
    disk: Arc<RamDisk>,
    sessions: Arc<Mutex<Sessions>>,
}

impl Site {
    fn new(change: impl FnOnce(&mut assay_iscsi::TargetConfig)) -> Self {
        let mut config = config(BLOCKS, Authentication::None);
        change(&mut config);
        let portal = Arc::new(Portal::default());
        portal.insert(Arc::new(Target::new(config).unwrap()));
        let sessions = Arc::new(Mutex::new(Sessions::new(SessionLimit::Many(4))));
        Self { portal, disk: Arc::new(RamDisk::new(BLOCKS, 512)), sessions }
    }

    /// A session through the port with this number.
    fn log_in(&self, port: u8) -> Path {
        let mut initiator =
            Initiator::new(self.portal.clone(), self.disk.clone(), self.sessions.clone(), u64::from(port));
        initiator.isid = [0x40, 0, 0, 0, 0, port];
        assert_eq!(initiator.log_in(&[("FirstBurstLength", "131072")]).status(), 0);
        Path(initiator)
    }
}

/// A logged-in session, one command at a time.
struct Path(Initiator);

/// How a command ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Good(Vec<u8>),
    /// Sense key and code.
    Check(u8, u16),
    Conflict,
}

impl Path {
    fn command(&mut self, direction: u8, cdb: &[u8], out: &[u8], room: u32) -> End {
        let expected = if direction == WRITE { u32::try_from(out.len()).unwrap() } else { room };
        let header = self.0.command_header(direction, 1, expected, cdb);
        self.0.send(header, out);
        let mut data = Vec::new();
        loop {
            let answer = self.0.answer();
            match (answer.opcode(), answer.header[3]) {
                (0x25, _) => {
                    data.extend(answer.data);
                    if answer.header[1] & 1 != 0 {
                        return End::Good(data);
                    }
                }
                (0x21, 0) => return End::Good(data),
                (0x21, 0x18) => return End::Conflict,
                (0x21, 2) => {
                    let sense = &answer.data[2..];
                    return End::Check(sense[2] & 0xf, u16::from_be_bytes([sense[12], sense[13]]));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn read(&mut self, cdb: &[u8]) -> Vec<u8> {
        match self.command(READ, cdb, &[], 1 << 20) {
            End::Good(data) => data,
            other => panic!("{cdb:02x?}: {other:?}"),
        }
    }

    fn write(&mut self, cdb: &[u8], out: &[u8]) -> End {
        self.command(WRITE, cdb, out, 0)
    }

    fn test(&mut self) -> End {
        self.command(0, &[0; 6], &[], 0)
    }

    fn vital_page(&mut self, page: u8) -> Vec<u8> {
        let data = self.read(&[0x12, 1, page, 0xff, 0xff, 0]);
        assert_eq!(data[1], page);
        assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])), data.len() - 4, "page {page:#x}");
        data[4..].to_vec()
    }

    fn read_blocks(&mut self, lba: u8, blocks: u8) -> Vec<u8> {
        self.read(&[0x28, 0, 0, 0, 0, lba, 0, 0, blocks, 0])
    }

    fn write_blocks(&mut self, lba: u8, data: &[u8]) -> End {
        let blocks = u8::try_from(data.len() / 512).unwrap();
        self.write(&[0x2a, 0, 0, 0, 0, lba, 0, 0, blocks, 0], data)
    }
}

fn cdb_16(opcode: u8, action: u8, fields: &[(usize, &[u8])]) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[..2].copy_from_slice(&[opcode, action]);
    for (at, octets) in fields {
        cdb[*at..*at + octets.len()].copy_from_slice(octets);
    }
    cdb
}

#[test]
fn every_vital_page_that_is_listed_is_there() {
    let mut path = Site::new(|_| {}).log_in(1);
    let listed = path.vital_page(0x00);
    assert_eq!(listed, [0x00, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2]);
    for page in listed {
        assert!(!path.vital_page(page).is_empty(), "page {page:#x}");
    }
    assert_eq!(path.command(READ, &[0x12, 1, 0xc0, 0, 255, 0], &[], 255), End::Check(5, 0x2400));
    assert_eq!(path.vital_page(0x80), b"test0001");
}

#[test]
fn thin_provisioning_and_its_limits_are_told_as_linux_and_esxi_read_them() {
    let mut path = Site::new(|_| {}).log_in(1);
    let limits = path.vital_page(0xb0);
    let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|index| limits[at - 4 + index]));
    assert_eq!(limits[5 - 4], 64, "COMPARE AND WRITE: atomic test and set");
    assert_eq!((word(8), word(20), word(24), word(28)), (8192, 1 << 20, 256, 8), "transfer, UNMAP, its granularity");
    // LBPU, LBPWS, LBPWS10, LBPRZ; thin.
    assert_eq!(path.vital_page(0xb2)[1..3], [0xe4, 0x02]);
    let capacity = path.read(&cdb_16(0x9e, 0x10, &[(13, &[32])]));
    assert_eq!(capacity[..8], (BLOCKS - 1).to_be_bytes());
    assert_eq!((capacity[13], capacity[14]), (3, 0xc0), "4 KiB physical blocks; LBPME, LBPRZ");
    assert_eq!(path.vital_page(0xb1)[1], 1, "does not rotate");
}

#[test]
fn all_paths_are_reported_as_active_and_optimized() {
    let mut path = Site::new(|_| {}).log_in(1);
    let standard = path.read(&[0x12, 0, 0, 0, 96, 0]);
    assert_eq!(standard[5] & 0x30, 0x10, "TPGS: implicit");
    let groups = path.read(&[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0]);
    assert_eq!(groups, [0, 0, 0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]);
    // Page 83h leads from the path to the group: relative port 1, group 1, both about the port.
    let designators = designators(&path.vital_page(0x83));
    assert!(designators.contains(&(0x51, 0x94, vec![0, 0, 0, 1])));
    assert!(designators.contains(&(0x51, 0x95, vec![0, 0, 0, 1])));
    assert!(designators.iter().any(|(_, kind, name)| *kind == 0xa8 && name.starts_with(TARGET.as_bytes())));
}

/// Code set with protocol, type with association, name.
fn designators(mut page: &[u8]) -> Vec<(u8, u8, Vec<u8>)> {
    let mut found = Vec::new();
    while let [code, kind, _, octets, rest @ ..] = page {
        let (name, rest) = rest.split_at(usize::from(*octets));
        found.push((*code, *kind, name.to_vec()));
        page = rest;
    }
    found
}

#[test]
fn mode_pages_tell_of_the_cache_and_of_write_protection() {
    for (write_cache, read_only) in [(true, false), (false, false), (true, true)] {
        let site = Site::new(|config| {
            config.logical_unit.write_cache = write_cache;
            config.logical_unit.read_only = read_only;
        });
        let mut path = site.log_in(1);
        let caching = path.read(&[0x1a, 8, 8, 0, 255, 0]);
        assert_eq!((caching[4], caching[6] & 4 != 0), (8, write_cache), "WCE");
        assert_eq!(caching[2], 0x10 | if read_only { 0x80 } else { 0 }, "DPOFUA, WP");
        assert_eq!(path.vital_page(0x86)[2] & 1 != 0, write_cache, "V_SUP");
        let all = path.read(&[0x5a, 8, 0x3f, 0, 0, 0, 0, 0, 255, 0]);
        assert!(all[8..].windows(2).any(|page| page == [0x0a, 10]), "the control page, which libiscsi needs");
        let wrote = path.write_blocks(0, &[1; 512]);
        let list = copy_list(&mut path, 1, &[(0, 8, 8)]);
        for end in [wrote, copy(&mut path, &list)] {
            assert_eq!(end, if read_only { End::Check(7, 0x2700) } else { End::Good(Vec::new()) });
        }
    }
}

#[test]
fn force_unit_access_reaches_the_backend_and_prefetch_does_not() {
    let mut path = Site::new(|_| {}).log_in(1);
    path.0.hold_io = true;
    for (flags, forced) in [(0x08, true), (0x00, false), (0x10, false)] {
        let header = path.0.command_header(WRITE, 1, 512, &[0x2a, flags, 0, 0, 0, 0, 0, 0, 1, 0]);
        path.0.send(header, &[0; 512]);
        assert!(matches!(path.0.held[0].io, Io::Write { fua, .. } if fua == forced), "{flags:#x}");
        path.0.run_held();
        path.0.answer();
    }
    let synchronize = path.0.command_header(0, 1, 0, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    path.0.send(synchronize, &[]);
    assert!(matches!(path.0.held[0].io, Io::Flush));
    path.0.run_held();
    path.0.answer();
    let io_count = path.0.io_count;
    for cdb in [&[0x34, 0, 0, 0, 0, 0, 0, 0, 8, 0][..], &cdb_16(0x90, 0, &[(13, &[8])])] {
        assert_eq!(path.command(0, cdb, &[], 0), End::Good(Vec::new()));
    }
    assert_eq!(path.0.io_count, io_count);
}

#[test]
fn zeroes_and_unmap_free_blocks_and_read_as_zeros() {
    let mut path = Site::new(|_| {}).log_in(1);
    let mapped = |path: &mut Path| {
        let status = path.read(&cdb_16(0x9e, 0x12, &[(9, &[8]), (13, &[24])]));
        status[20] & 0xf == 0
    };
    // WRITE SAME(16) with UNMAP, with and without data-out (NDOB), and UNMAP.
    let same = cdb_16(0x93, 0x08, &[(9, &[8]), (13, &[8])]);
    let no_data = cdb_16(0x93, 0x09, &[(9, &[8]), (13, &[8])]);
    let unmap = [&[0, 22, 0, 16, 0, 0, 0, 0][..], &8u64.to_be_bytes(), &[0, 0, 0, 8, 0, 0, 0, 0]].concat();
    let ways: [(&[u8], &[u8]); 3] =
        [(&same, &[0; 512]), (&no_data, &[]), (&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &unmap)];
    for (cdb, out) in ways {
        assert_eq!(path.write_blocks(8, &[0x77; 4096]), End::Good(Vec::new()));
        assert!(mapped(&mut path));
        assert_eq!(path.write(cdb, out), End::Good(Vec::new()), "{cdb:02x?}");
        assert!(!mapped(&mut path), "{cdb:02x?}");
        assert_eq!(path.read_blocks(8, 8), [0; 4096]);
    }
    // Data that are not zeros are written, whatever UNMAP says: they must read back.
    assert_eq!(path.write(&same, &[5; 512]), End::Good(Vec::new()));
    assert_eq!(path.read_blocks(8, 8), [5; 4096]);
}

/// EXTENDED COPY's parameter list: this unit as both targets, `segments` of source, destination and blocks.
fn copy_list(path: &mut Path, list: u8, segments: &[(u64, u64, u16)]) -> Vec<u8> {
    let (code, kind, name) = designators(&path.vital_page(0x83)).swap_remove(0);
    let mut target = vec![0xe4, 0, 0, 0, code, kind, 0, u8::try_from(name.len()).unwrap()];
    target.extend(name);
    target.resize(28, 0);
    target.extend([0, 0, 2, 0]);
    let mut data = vec![list, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    data[10..12].copy_from_slice(&u16::try_from(28 * segments.len()).unwrap().to_be_bytes());
    data.extend(target.repeat(2));
    for (source, destination, blocks) in segments {
        data.extend([2, 0, 0, 24, 0, 0, 0, 1, 0, 0]);
        data.extend(blocks.to_be_bytes());
        data.extend(source.to_be_bytes());
        data.extend(destination.to_be_bytes());
    }
    data
}

fn copy(path: &mut Path, list: &[u8]) -> End {
    path.write(&cdb_16(0x83, 0, &[(10, &u32::try_from(list.len()).unwrap().to_be_bytes())]), list)
}

/// COPY STATUS: status, segments, KiB.
fn copy_status(path: &mut Path, list: u8) -> (u8, u8, u32) {
    let data = path.read(&cdb_16(0x84, 0, &[(2, &[list]), (13, &[255])]));
    (data[4], data[6], u32::from_be_bytes(std::array::from_fn(|index| data[8 + index])))
}

#[test]
fn a_copy_moves_blocks_piece_by_piece_and_is_told_of() {
    let site = Site::new(|_| {});
    let mut path = site.log_in(1);
    let data: Vec<u8> = (0..255 * 512).map(|index| u8::try_from(index % 253).unwrap()).collect();
    assert_eq!(path.write_blocks(0, &data), End::Good(Vec::new()));
    // 5000 blocks are three pieces; the second segment overlaps itself.
    let list = copy_list(&mut path, 9, &[(0, 10_000, 5000), (0, 0, 0), (0, 1, 255)]);
    let io_count = path.0.io_count;
    assert_eq!(copy(&mut path, &list), End::Good(Vec::new()));
    assert_eq!(path.0.io_count - io_count, 2 * 3 + 2);
    assert!(path.read_blocks(1, 255) == data);
    let copied = path.read(&[0x28, 0, 0, 0, 0x27, 0x10, 0, 0, 255, 0]);
    assert!(copied == data);
    assert_eq!(copy_status(&mut path, 9), (1, 3, (5000 + 255) / 2));
    // Another nexus knows nothing of it, and neither does the next session of this one.
    let mut other = site.log_in(2);
    let ask = cdb_16(0x84, 0, &[(2, &[9]), (13, &[255])]);
    assert_eq!(other.command(READ, &ask, &[], 255), End::Check(5, 0x2400));
    drop(path);
    assert_eq!(site.log_in(1).command(READ, &ask, &[], 255), End::Check(5, 0x2400));
}

#[test]
fn a_copy_that_leaves_the_unit_or_names_another_copies_nothing() {
    let mut path = Site::new(|_| {}).log_in(1);
    let beyond = copy_list(&mut path, 1, &[(0, 100, 8), (0, BLOCKS - 1, 2)]);
    let wraps = copy_list(&mut path, 1, &[(u64::MAX, 0, 2)]);
    let mut foreign = copy_list(&mut path, 1, &[(0, 100, 8)]);
    foreign[16 + 8] ^= 1;
    let mut third = copy_list(&mut path, 1, &[(0, 100, 8)]);
    third[16 + 64 + 7] = 2;
    let mut inline = copy_list(&mut path, 1, &[(0, 100, 8)]);
    inline[15] = 4;
    let mut longer = copy_list(&mut path, 1, &[(0, 100, 8)]);
    longer[11] += 1;
    for (list, end) in [
        (beyond, End::Check(0xa, 0)),
        (wraps, End::Check(0xa, 0)),
        (foreign, End::Check(0xa, 0x0804)),
        (third, End::Check(0xa, 0x0804)),
        (inline, End::Check(5, 0x1a00)),
        (longer, End::Check(5, 0x1a00)),
    ] {
        let io_count = path.0.io_count;
        assert_eq!(copy(&mut path, &list), end);
        assert_eq!(path.0.io_count, io_count, "nothing was read or written");
    }
}

#[test]
fn a_copy_holds_no_more_than_one_piece_and_stops_when_it_is_aborted() {
    let mut path = Site::new(|_| {}).log_in(1);
    path.0.hold_io = true;
    let list = copy_list(&mut path, 3, &[(0, 30_000, 30_000)]);
    let header = path.0.command_header(
        WRITE,
        7,
        u32::try_from(list.len()).unwrap(),
        &cdb_16(0x83, 0, &[(10, &u32::try_from(list.len()).unwrap().to_be_bytes())]),
    );
    path.0.send(header, &list);
    for _ in 0..3 {
        assert_eq!(path.0.held.len(), 1);
        path.0.run_held();
    }
    let mut abort = [0; 48];
    abort[..2].copy_from_slice(&[0x42, 0x81]);
    abort[19] = 8;
    abort[23] = 7;
    path.0.send(abort, &[]);
    path.0.run_held();
    assert_eq!(path.0.answer().header[2], 0, "aborted");
    assert!(path.0.held.is_empty() && path.0.answers.is_empty());
    assert_eq!(copy_status(&mut path, 3).0, 2, "completed with errors");
}

#[test]
fn a_reservation_is_of_one_nexus_and_the_other_is_told() {
    let site = Site::new(|_| {});
    let (mut first, mut second) = (site.log_in(1), site.log_in(2));
    let out = |path: &mut Path, action: u8, kind: u8, key: u64, action_key: u64| {
        let list = [key.to_be_bytes(), action_key.to_be_bytes(), [0; 8]].concat();
        path.write(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list)
    };
    let good = || End::Good(Vec::new());
    assert_eq!(out(&mut first, 0, 0, 0, 0xa), good());
    assert_eq!(out(&mut second, 0, 0, 0, 0xb), good());
    assert_eq!(out(&mut first, 1, 3, 0xa, 0), good(), "exclusive access");
    assert_eq!(second.write_blocks(0, &[1; 512]), End::Conflict);
    assert_eq!(first.write_blocks(0, &[1; 512]), good());
    // Both ports are told apart in the full status: iSCSI names with their ISIDs.
    let status = first.read(&[0x5e, 3, 0, 0, 0, 0, 0, 1, 255, 0]);
    for isid in ["400000000001", "400000000002"] {
        let port = format!("{},i,0x{isid}", support::INITIATOR);
        assert!(status.windows(port.len()).any(|found| found == port.as_bytes()), "{port}");
    }
    // The survivor takes over, and the one that lost its registration hears of it once.
    assert_eq!(out(&mut second, 4, 3, 0xb, 0xa), good());
    assert_eq!(first.test(), End::Check(6, 0x2a05));
    assert_eq!(first.write_blocks(0, &[1; 512]), End::Conflict);
    assert_eq!(second.test(), good());
    // A persistent reservation outlives its session.
    drop(second);
    assert_eq!(first.write_blocks(0, &[1; 512]), End::Conflict);
}

#[test]
fn what_one_path_changes_the_other_is_told_once() {
    let site = Site::new(|_| {});
    let (mut first, mut second) = (site.log_in(1), site.log_in(2));
    // Software write protection through MODE SELECT(6).
    let mut control = first.read(&[0x1a, 8, 0x0a, 0, 255, 0]);
    control[0] = 0;
    control[2] = 0;
    control[4 + 4] |= 0x08;
    assert_eq!(first.write(&[0x15, 0x10, 0, 0, u8::try_from(control.len()).unwrap(), 0], &control), End::Good(vec![]));
    assert_eq!(second.test(), End::Check(6, 0x2a01));
    assert_eq!(second.write_blocks(0, &[1; 512]), End::Check(7, 0x2700));
    assert_eq!(first.test(), End::Good(Vec::new()), "who changed it is not told");
}
