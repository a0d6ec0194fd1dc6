//! An initiator in memory: no sockets, every PDU under the test's control.

use super::{INITIATOR, RamDisk, TARGET, config};
use assay_iscsi::{
    Authentication, ChallengeEntropy, Connection, ConnectionId, Directory, Event, Io, IoRequest, LoginStatus, Piece,
    Portal, ProtocolError, SessionDecision, Sessions, Target,
};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// CHAP credentials that tests use.
pub(crate) const NAME: &str = "n1";
pub(crate) const SECRET: &str = "correct horse battery";

/// One PDU from the target.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) header: [u8; 48],
    pub(crate) data: Vec<u8>,
}

impl Answer {
    pub(crate) fn opcode(&self) -> u8 {
        self.header[0]
    }

    pub(crate) fn word(&self, offset: usize) -> u32 {
        u32::from_be_bytes(std::array::from_fn(|index| self.header[offset + index]))
    }

    /// Login status class and detail.
    pub(crate) fn status(&self) -> u16 {
        u16::from_be_bytes([self.header[36], self.header[37]])
    }

    /// The value of a text key.
    pub(crate) fn key(&self, wanted: &str) -> Option<String> {
        let text = String::from_utf8(self.data.clone()).unwrap();
        text.split('\0').find_map(|pair| pair.strip_prefix(wanted)?.strip_prefix('=').map(str::to_owned))
    }
}

/// The simulated initiator, with the connection that it talks to and the driver in between.
pub(crate) struct Initiator {
    pub(crate) connection: Connection,
    pub(crate) answers: VecDeque<Answer>,
    /// I/O that was asked for and not run, while `hold_io` is set.
    pub(crate) held: VecDeque<IoRequest>,
    pub(crate) hold_io: bool,
    /// Reads are answered in place where they may be.
    pub(crate) in_place: bool,
    pub(crate) io_count: usize,
    pub(crate) closed: bool,
    pub(crate) logged_in: bool,
    pub(crate) logged_out: bool,
    pub(crate) reinstated: Option<ConnectionId>,
    pub(crate) error: Option<ProtocolError>,
    pub(crate) digests: (bool, bool),
    pub(crate) cmd_sn: u32,
    pub(crate) isid: [u8; 6],
    id: ConnectionId,
    disk: Arc<RamDisk>,
    sessions: Arc<Mutex<Sessions>>,
    received: Vec<u8>,
}

impl Initiator {
    pub(crate) fn new(portal: Arc<dyn Directory>, disk: Arc<RamDisk>, sessions: Arc<Mutex<Sessions>>, id: u64) -> Self {
        let mut entropy = [0; 33];
        entropy[..8].copy_from_slice(&(id + 1).to_be_bytes());
        Self {
            connection: Connection::new(portal, ChallengeEntropy(entropy)),
            answers: VecDeque::new(),
            held: VecDeque::new(),
            hold_io: false,
            in_place: false,
            io_count: 0,
            closed: false,
            logged_in: false,
            logged_out: false,
            reinstated: None,
            error: None,
            digests: (false, false),
            cmd_sn: 7,
            isid: [0x40, 0, 0, 0, 0, 1],
            id: ConnectionId(id),
            disk,
            sessions,
            received: Vec::new(),
        }
    }

    /// Sends a PDU and lets everything happen that follows from it.
    pub(crate) fn send(&mut self, mut header: [u8; 48], data: &[u8]) {
        header[5..8].copy_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes()[1..]);
        let mut octets = header.to_vec();
        if self.digests.0 {
            octets.extend_from_slice(&crc32c::crc32c(&header).to_le_bytes());
        }
        let mut segment = data.to_vec();
        segment.resize(data.len().next_multiple_of(4), 0);
        octets.extend_from_slice(&segment);
        if self.digests.1 && !data.is_empty() {
            octets.extend_from_slice(&crc32c::crc32c(&segment).to_le_bytes());
        }
        self.send_octets(&octets);
    }

    /// Sends octets as they are.
    pub(crate) fn send_octets(&mut self, octets: &[u8]) {
        if let Some(buffer) = self.connection.receive_buffer() {
            buffer.extend_from_slice(octets);
        }
        self.pump();
    }

    /// Runs the driver until nothing moves.
    pub(crate) fn pump(&mut self) {
        loop {
            if let Err(error) = self.connection.process() {
                self.error = Some(error);
            }
            let mut moved = false;
            while let Some(event) = self.connection.poll_event() {
                moved = true;
                self.act(event);
            }
            while let Some(transmit) = self.connection.poll_transmit() {
                moved = true;
                for piece in transmit.pieces() {
                    match piece {
                        Piece::Octets(octets) => self.received.extend_from_slice(octets),
                        Piece::InPlace(range) => self.received.extend_from_slice(&self.disk.octets(range)),
                    }
                }
                self.parse();
            }
            if !moved {
                return;
            }
        }
    }

    /// Runs the oldest held operation.
    pub(crate) fn run_held(&mut self) {
        let request = self.held.pop_front().unwrap();
        self.run(request);
        self.pump();
    }

    /// The next answer, which must be there.
    pub(crate) fn answer(&mut self) -> Answer {
        self.answers.pop_front().expect("an answer")
    }

    /// One login request; `stages` are the T, C, CSG and NSG bits.
    pub(crate) fn login_request(&mut self, stages: u8, keys: &[(&str, &str)]) -> Answer {
        let text: String = keys.iter().map(|(key, value)| format!("{key}={value}\0")).collect();
        let mut header = [0; 48];
        header[0] = 0x43;
        header[1] = stages;
        header[8..14].copy_from_slice(&self.isid);
        header[16..20].copy_from_slice(&[0, 0, 0, 1]);
        header[24..28].copy_from_slice(&self.cmd_sn.to_be_bytes());
        self.send(header, text.as_bytes());
        self.answer()
    }

    /// A whole login without CHAP: straight to the operational stage, with these keys.
    pub(crate) fn log_in(&mut self, keys: &[(&str, &str)]) -> Answer {
        let names = [("InitiatorName", INITIATOR), ("TargetName", TARGET), ("SessionType", "Normal")];
        let answer = self.login_request(0x87, &[&names[..], keys].concat());
        let on = |key| answer.key(key).as_deref() == Some("CRC32C");
        self.digests = (on("HeaderDigest"), on("DataDigest"));
        answer
    }

    /// The header of a SCSI command; `direction` is 0x40 (read), 0x20 (write) or 0.
    pub(crate) fn command_header(&mut self, direction: u8, task_tag: u32, expected: u32, cdb: &[u8]) -> [u8; 48] {
        let mut header = [0; 48];
        header[0] = 0x01;
        header[1] = 0x80 | direction;
        header[16..20].copy_from_slice(&task_tag.to_be_bytes());
        header[20..24].copy_from_slice(&expected.to_be_bytes());
        header[24..28].copy_from_slice(&self.cmd_sn.to_be_bytes());
        header[32..32 + cdb.len()].copy_from_slice(cdb);
        self.cmd_sn = self.cmd_sn.wrapping_add(1);
        header
    }

    /// Sends a command without data-out.
    pub(crate) fn command(&mut self, direction: u8, task_tag: u32, expected: u32, cdb: &[u8]) {
        let header = self.command_header(direction, task_tag, expected, cdb);
        self.send(header, &[]);
    }

    /// Sends a Data-Out PDU.
    pub(crate) fn data_out(&mut self, flags: u8, tags: (u32, u32), data_sn: u32, offset: u32, data: &[u8]) {
        let mut header = [0; 48];
        header[0] = 0x05;
        header[1] = flags;
        header[16..20].copy_from_slice(&tags.0.to_be_bytes());
        header[20..24].copy_from_slice(&tags.1.to_be_bytes());
        header[36..40].copy_from_slice(&data_sn.to_be_bytes());
        header[40..44].copy_from_slice(&offset.to_be_bytes());
        self.send(header, data);
    }

    fn run(&mut self, request: IoRequest) {
        let result = match request.io {
            Io::Read { lba, blocks } if self.in_place && request.in_place => self.disk.place(lba, blocks),
            io => self.disk.run(io),
        };
        self.connection.complete(request.tag, result);
    }

    fn act(&mut self, event: Event) {
        match event {
            Event::Io(request) => {
                self.io_count += 1;
                if self.hold_io {
                    self.held.push_back(request);
                } else {
                    self.run(request);
                }
            }
            Event::SessionWanted(request) => {
                let decision = self.sessions.lock().unwrap().admit(&request, self.id);
                match decision {
                    SessionDecision::New(tsih) => self.connection.admit(tsih),
                    SessionDecision::Refused => self.connection.refuse(LoginStatus::AuthorizationFailure),
                    SessionDecision::Reinstated { tsih, closes } => {
                        self.reinstated = Some(closes);
                        self.connection.admit(tsih);
                    }
                }
            }
            Event::LoggedIn => self.logged_in = true,
            Event::LoggedOut => self.logged_out = true,
            Event::Close => self.closed = true,
        }
    }

    /// Cuts what was received into answers, checking digests.
    fn parse(&mut self) {
        // A login's answers come without digests, and switch them on.
        let login = self.received[0] == 0x23;
        let (header_digest, data_digest) = if login { (false, false) } else { self.digests };
        let header: [u8; 48] = self.received[..48].try_into().unwrap();
        let mut rest = self.received.split_off(48);
        if header_digest {
            assert_eq!(rest[..4], crc32c::crc32c(&header).to_le_bytes());
            rest.drain(..4);
        }
        let octets = u32::from_be_bytes([0, header[5], header[6], header[7]]) as usize;
        let padded = octets.next_multiple_of(4);
        if data_digest && octets > 0 {
            assert_eq!(rest[padded..padded + 4], crc32c::crc32c(&rest[..padded]).to_le_bytes());
            rest.drain(padded..padded + 4);
        }
        assert_eq!(rest.len(), padded, "one transmit is one PDU");
        rest.truncate(octets);
        self.answers.push_back(Answer { header, data: rest });
        self.received.clear();
    }
}

/// Logical blocks of the disk that [`connect`] leads to.
pub(crate) const BLOCKS: u64 = 65_536;

/// A connection to a target without authentication that is not logged in yet.
pub(crate) fn connect() -> Initiator {
    let portal = Arc::new(Portal::default());
    portal.insert(Arc::new(Target::new(config(BLOCKS, Authentication::None)).unwrap()));
    Initiator::new(portal, Arc::new(RamDisk::new(BLOCKS, 512)), Arc::new(Mutex::new(Sessions::default())), 1)
}

/// The same, in the full feature phase.
pub(crate) fn logged_in(keys: &[(&str, &str)]) -> Initiator {
    let mut initiator = connect();
    assert_eq!(initiator.log_in(keys).status(), 0);
    initiator
}

/// A CDB of 10 octets with an address and a length.
pub(crate) fn cdb_10(opcode: u8, lba: u32, blocks: u16) -> [u8; 10] {
    let (lba, blocks) = (lba.to_be_bytes(), blocks.to_be_bytes());
    [opcode, 0, lba[0], lba[1], lba[2], lba[3], 0, blocks[0], blocks[1], 0]
}
