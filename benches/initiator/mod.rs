//! A small iSCSI initiator (RFC 7143): login with or without CHAP, then READ(10) or WRITE(10) with several under way. The
//! same for every target that is measured, and not worth measuring itself.

use ring::digest::{Context, SHA256};
use std::collections::VecDeque;
use std::io::{self, BufReader, Read as _, Write as _};
use std::net::TcpStream;

/// One read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Where, in octets: a multiple of [`BLOCK_BYTES`].
    pub(crate) offset: u64,
    /// How much, likewise.
    pub(crate) length: u32,
}

/// Who logs in to what.
#[derive(Debug, Clone)]
pub(crate) struct Login {
    pub(crate) initiator: String,
    pub(crate) target: String,
    /// CHAP name and secret, where the target asks for them.
    pub(crate) chap: Option<(String, String)>,
    pub(crate) lun: u8,
}

/// A logged-in session.
pub(crate) struct Session {
    stream: BufReader<TcpStream>,
    lun: u8,
    command_number: u32,
    /// StatSN of the latest answer, and one.
    expected_status: u32,
}

struct Answer {
    header: [u8; HEADER],
    data: Vec<u8>,
}

const HEADER: usize = 48;
/// The longest segment that is taken: [`OPERATIONAL`] says it, too.
const SEGMENT_BYTES: usize = 256 << 10;
pub(crate) const BLOCK_BYTES: u32 = 512;
/// A target has something to say to whoever is new: that many commands may go wrong for it.
const ATTENTIONS: u32 = 4;

impl Session {
    pub(crate) fn log_in(stream: TcpStream, login: &Login) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let stream = BufReader::with_capacity(64 << 10, stream);
        let mut session = Self { stream, lun: login.lun, command_number: 1, expected_status: 0 };
        let names = format!("InitiatorName={}\0TargetName={}\0SessionType=Normal\0", login.initiator, login.target);
        match &login.chap {
            None => drop(session.login_step(0x81, &format!("{names}AuthMethod=None\0"))?),
            Some((name, secret)) => {
                session.login_step(0, &format!("{names}AuthMethod=CHAP\0"))?;
                let challenge = session.login_step(0, "CHAP_A=7\0")?;
                let response = respond(&challenge, secret).ok_or_else(|| unexpected("the challenge"))?;
                session.login_step(0x81, &format!("CHAP_N={name}\0CHAP_R=0x{}\0", hex::encode(response)))?;
            }
        }
        session.login_step(0x87, OPERATIONAL)?;
        for _ in 0..ATTENTIONS {
            session.command([0; 16], 0, 0)?;
            if session.answer()?.header[3] == 0 {
                return Ok(session);
            }
        }
        Err(unexpected("TEST UNIT READY"))
    }

    /// Reads all of these in order, `depth` at once, and shows what came with its place on the disk.
    pub(crate) fn read(
        &mut self,
        extents: &[Extent],
        depth: usize,
        mut seen: impl FnMut(u64, &[u8]),
    ) -> io::Result<()> {
        let mut waiting = (0..).zip(extents.iter().copied());
        let mut under_way: VecDeque<(u32, Extent, u32)> = VecDeque::new();
        let mut segment = vec![0; SEGMENT_BYTES];
        loop {
            while under_way.len() < depth
                && let Some((tag, extent)) = waiting.next()
            {
                self.send_read(tag, extent)?;
                under_way.push_back((tag, extent, 0));
            }
            if under_way.is_empty() {
                return Ok(());
            }
            let header = self.header()?;
            let tag = word(&header, 16);
            let place = under_way.iter().position(|(theirs, ..)| *theirs == tag).ok_or_else(|| unexpected("a tag"))?;
            let octets = data_octets(&header);
            let segment = segment.get_mut(..octets).ok_or_else(|| unexpected("the length of a segment"))?;
            self.stream.read_exact(segment)?;
            let (_, extent, received) = &mut under_way[place];
            let (data, status) = (header[0] & 0x3f == 0x25, header[0] & 0x3f == 0x21);
            if !(data || status) || header[3] != 0 {
                return Err(unexpected("the answer to a READ"));
            }
            if data {
                seen(extent.offset + u64::from(word(&header, 40)), segment);
                *received += u32::try_from(octets).unwrap_or(u32::MAX);
            }
            // A response, or data with the status.
            if status || header[1] & 1 != 0 {
                self.expected_status = word(&header, 24).wrapping_add(1);
                if *received != extent.length {
                    return Err(unexpected("the length of what was read"));
                }
                under_way.remove(place);
            }
        }
    }

    /// Writes `data` to each of these offsets in order, `depth` at once, each with its command: no more than a target takes so.
    /// Answers how many there were.
    #[allow(dead_code, reason = "boots only read")]
    pub(crate) fn write(
        &mut self,
        mut offsets: impl Iterator<Item = u64>,
        data: &[u8],
        depth: usize,
    ) -> io::Result<u32> {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let (mut sent, mut under_way) = (0, 0);
        let mut commands = Vec::new();
        loop {
            commands.clear();
            for offset in offsets.by_ref().take(depth - under_way) {
                let mut header = self.header_of(cdb(0x2a, Extent { offset, length }), sent, length, 0xa0);
                header[5..8].copy_from_slice(&length.to_be_bytes()[1..]);
                commands.extend_from_slice(&header);
                commands.extend_from_slice(data);
                sent += 1;
                under_way += 1;
            }
            if under_way == 0 {
                return Ok(sent);
            }
            self.stream.get_mut().write_all(&commands)?;
            // One that is waited for, and whatever came with it.
            while under_way > 0 {
                let header = self.header()?;
                if header[0] & 0x3f != 0x21 || header[3] != 0 || data_octets(&header) > 0 {
                    return Err(unexpected("the answer to a WRITE"));
                }
                self.expected_status = word(&header, 24).wrapping_add(1);
                under_way -= 1;
                if self.stream.buffer().len() < HEADER {
                    break;
                }
            }
        }
    }

    fn send_read(&mut self, tag: u32, extent: Extent) -> io::Result<()> {
        self.command(cdb(0x28, extent), tag, extent.length)
    }

    fn command(&mut self, cdb: [u8; 16], tag: u32, expected: u32) -> io::Result<()> {
        let header = self.header_of(cdb, tag, expected, if expected > 0 { 0xc0 } else { 0x80 });
        self.stream.get_mut().write_all(&header)
    }

    /// The next command's. `flags`: final, and whether it reads or writes.
    fn header_of(&mut self, cdb: [u8; 16], tag: u32, expected: u32, flags: u8) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[0] = 0x01;
        header[1] = flags;
        header[9] = self.lun;
        header[16..20].copy_from_slice(&tag.to_be_bytes());
        header[20..24].copy_from_slice(&expected.to_be_bytes());
        header[24..28].copy_from_slice(&self.command_number.to_be_bytes());
        header[28..32].copy_from_slice(&self.expected_status.to_be_bytes());
        header[32..].copy_from_slice(&cdb);
        self.command_number = self.command_number.wrapping_add(1);
        header
    }

    /// One login request; answers with the keys of the answer.
    fn login_step(&mut self, stages: u8, keys: &str) -> io::Result<String> {
        // The security stage is 0 and the operational one is 1: the last step is asked for from there.
        let mut header = [0; HEADER];
        header[0] = 0x43;
        header[1] = stages;
        header[5..8].copy_from_slice(&u32::try_from(keys.len()).unwrap_or(u32::MAX).to_be_bytes()[1..]);
        header[8..14].copy_from_slice(&[0x40, 0, 0, 0, 0, 1]);
        header[24..28].copy_from_slice(&self.command_number.to_be_bytes());
        header[28..32].copy_from_slice(&self.expected_status.to_be_bytes());
        let mut octets = [&header, keys.as_bytes()].concat();
        octets.resize(octets.len().next_multiple_of(4), 0);
        self.stream.get_mut().write_all(&octets)?;
        let answer = self.answer()?;
        if answer.header[0] != 0x23 || answer.header[36] != 0 {
            return Err(unexpected("the answer to a login"));
        }
        String::from_utf8(answer.data).map_err(|_| unexpected("a login's text"))
    }

    fn answer(&mut self) -> io::Result<Answer> {
        let header = self.header()?;
        let octets = data_octets(&header);
        let mut data = vec![0; octets.next_multiple_of(4)];
        self.stream.read_exact(&mut data)?;
        data.truncate(octets);
        self.expected_status = word(&header, 24).wrapping_add(1);
        Ok(Answer { header, data })
    }

    fn header(&mut self) -> io::Result<[u8; HEADER]> {
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header)?;
        Ok(header)
    }
}

const OPERATIONAL: &str = "HeaderDigest=None\0DataDigest=None\0MaxRecvDataSegmentLength=262144\0InitialR2T=No\0\
    ImmediateData=Yes\0MaxBurstLength=1048576\0FirstBurstLength=65536\0MaxConnections=1\0MaxOutstandingR2T=1\0\
    ErrorRecoveryLevel=0\0";

/// READ(10) or WRITE(10).
fn cdb(operation: u8, extent: Extent) -> [u8; 16] {
    let lba = u32::try_from(extent.offset / u64::from(BLOCK_BYTES)).unwrap_or(u32::MAX);
    let blocks = u16::try_from(extent.length / BLOCK_BYTES).unwrap_or(u16::MAX);
    let mut cdb = [0; 16];
    cdb[0] = operation;
    cdb[2..6].copy_from_slice(&lba.to_be_bytes());
    cdb[7..9].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

/// CHAP with SHA-256.
fn respond(challenge: &str, secret: &str) -> Option<Vec<u8>> {
    let key = |wanted: &str| challenge.split('\0').find_map(|pair| pair.strip_prefix(wanted)?.strip_prefix('='));
    let identifier: u8 = key("CHAP_I")?.parse().ok()?;
    let mut digest = Context::new(&SHA256);
    digest.update(&[identifier]);
    digest.update(secret.as_bytes());
    digest.update(&hex::decode(key("CHAP_C")?.strip_prefix("0x")?).ok()?);
    Some(digest.finish().as_ref().to_vec())
}

fn word(header: &[u8; HEADER], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|index| header[at + index]))
}

fn data_octets(header: &[u8; HEADER]) -> usize {
    (word(header, 4) & 0x00ff_ffff) as usize
}

fn unexpected(what: &str) -> io::Error {
    io::Error::other(format!("{what} is not as expected"))
}
