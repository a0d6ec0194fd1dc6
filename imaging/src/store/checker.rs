//! Asking another process to check a golden image's blocks: once for all who read the image, where each reader would hash
//! all that its node boots from. The gateway answers ([`crate::gateway`]), which opened the files and named their root.
//!
//! ```text
//! board               a bit a block, 64-bit numbers: it was found right. A file in memory; readers cannot write to it
//! reader ─▶ checker   group, wanted     group: number of its first block / 64; wanted: a bit a block of the group
//! reader ◀─ checker   right             a bit a block of the group that was found right, wanted or not
//! ```
//!
//! Questions and answers are packets of a socket pair. All numbers are in little endian. A reader looks itself at what is
//! not said to be right, and at everything once the checker is silent: it is there to save work, and nothing fails for
//! want of it.

use crate::lock::lock;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;
use std::time::Duration;

/// Blocks of one group: one for each bit of a number.
pub(crate) const GROUP: usize = 64;
/// Octets of such a number.
const WORD: usize = 8;
/// Octets of a question.
pub(crate) const QUESTION_BYTES: usize = 2 * WORD;
/// For a group of blocks to be read from a slow disk, and to be hashed after those that others had asked for.
const PATIENCE: Duration = Duration::from_secs(2);

/// A reader's way to a checker: files that can be handed to a process that may open nothing.
#[derive(Debug)]
pub struct CheckerFiles {
    /// To ask it.
    pub socket: OwnedFd,
    /// What it has found right, open to be read.
    pub board: File,
}

/// Where a checker puts what it has found right.
#[derive(Debug)]
pub(crate) struct Board(File);

impl Board {
    /// One for so many groups, of which no block was found right.
    ///
    /// # Errors
    /// Too many files are open, or there is no memory.
    pub(crate) fn new(groups: usize) -> io::Result<Self> {
        let memory = memfd_create("assay-checked-blocks", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memory, (groups * WORD) as u64)?;
        fcntl_add_seals(&memory, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self(memory.into()))
    }

    /// The same, open to be read only.
    pub(crate) fn to_read(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }

    /// Puts up which blocks of a group are right.
    pub(crate) fn put(&self, group: usize, right: u64) -> io::Result<()> {
        self.0.write_all_at(&right.to_le_bytes(), (group * WORD) as u64)
    }
}

/// What a reader asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Question {
    /// Which group of blocks.
    pub(crate) group: u64,
    /// Which of its blocks are to be looked at, the lowest bit the first.
    pub(crate) wanted: u64,
}

impl Question {
    fn encode(self) -> [u8; QUESTION_BYTES] {
        let mut packet = [0; QUESTION_BYTES];
        packet[..WORD].copy_from_slice(&self.group.to_le_bytes());
        packet[WORD..].copy_from_slice(&self.wanted.to_le_bytes());
        packet
    }

    /// Nothing if that is no question.
    pub(crate) fn decode(packet: &[u8]) -> Option<Self> {
        let packet: &[u8; QUESTION_BYTES] = packet.try_into().ok()?;
        let (words, []) = packet.as_chunks::<WORD>() else { return None };
        let [group, wanted] = [0, 1].map(|index| u64::from_le_bytes(words[index]));
        Some(Self { group, wanted })
    }
}

/// Makes the two ends of a socket to a checker: the checker's, and the reader's.
///
/// # Errors
/// Too many files are open.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (checkers, readers) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // Here, since a confined reader could not.
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&readers, timeout, Some(PATIENCE))?;
    }
    Ok((checkers, readers))
}

/// The reader's end.
#[derive(Debug)]
pub(super) struct Checker {
    /// Nothing once it did not answer: what it says later would be taken for the answer to another question.
    socket: Mutex<Option<OwnedFd>>,
    board: File,
}

impl Checker {
    pub(super) fn new(CheckerFiles { socket, board }: CheckerFiles) -> Self {
        Self { socket: Mutex::new(Some(socket)), board }
    }

    /// Which blocks of a group were found right so far. Does not wait.
    pub(super) fn known(&self, group: usize) -> u64 {
        let mut word = [0; WORD];
        let read = self.board.read_exact_at(&mut word, (group * WORD) as u64);
        read.map_or(0, |()| u64::from_le_bytes(word))
    }

    /// Which blocks of a group are right, after the wanted ones were looked at. Others may be, too.
    pub(super) fn ask(&self, group: usize, wanted: u64) -> u64 {
        let mut socket = lock(&self.socket);
        let Some(open) = &*socket else { return 0 };
        match exchange(open, Question { group: group as u64, wanted }) {
            Ok(right) => right,
            Err(error) => {
                tracing::warn!(event = "image.unaided", %error, "nobody else checks blocks of the golden image any more");
                *socket = None;
                0
            }
        }
    }
}

fn exchange(socket: &OwnedFd, question: Question) -> rustix::io::Result<u64> {
    let retry = rustix::io::retry_on_intr::<usize, _>;
    retry(|| send(socket, &question.encode(), SendFlags::NOSIGNAL))?;
    let mut answer = [0; WORD];
    let octets = rustix::io::retry_on_intr(|| recv(socket, &mut answer, RecvFlags::empty()))?.0;
    if octets == answer.len() { Ok(u64::from_le_bytes(answer)) } else { Err(Errno::PIPE) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_question_arrives_as_it_was_asked(group: u64, wanted: u64) {
            let question = Question { group, wanted };
            prop_assert_eq!(Question::decode(&question.encode()), Some(question));
        }

        #[test]
        fn arbitrary_packets_are_questions_or_none(packet in prop::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(Question::decode(&packet).is_some(), packet.len() == QUESTION_BYTES);
        }
    }

    fn checker(groups: usize) -> (OwnedFd, Board, Checker) {
        let (checkers, socket) = pair().unwrap();
        let board = Board::new(groups).unwrap();
        let reader = Checker::new(CheckerFiles { socket, board: board.to_read().unwrap() });
        (checkers, board, reader)
    }

    #[test]
    fn a_checker_that_is_gone_or_talks_nonsense_is_asked_no_more() {
        let (checkers, _, reader) = checker(9);
        send(&checkers, &7_u64.to_le_bytes(), SendFlags::empty()).unwrap();
        assert_eq!(reader.ask(3, 5), 7);
        let mut asked = [0; 100];
        assert_eq!(recv(&checkers, &mut asked, RecvFlags::empty()).unwrap().0, QUESTION_BYTES);
        assert_eq!(Question::decode(&asked[..QUESTION_BYTES]), Some(Question { group: 3, wanted: 5 }));
        send(&checkers, b"what", SendFlags::empty()).unwrap();
        assert_eq!(reader.ask(3, 5), 0);
        // Its end is closed now, so this is not heard.
        assert_eq!(send(&checkers, &7_u64.to_le_bytes(), SendFlags::NOSIGNAL).unwrap_err(), Errno::PIPE);
        assert_eq!(reader.ask(3, 5), 0);

        let (checkers, _, reader) = checker(1);
        drop(checkers);
        assert_eq!(reader.ask(0, 1), 0);
    }

    #[test]
    fn readers_read_the_board_and_cannot_write_to_it() {
        let (_checkers, board, reader) = checker(3);
        board.put(2, 0b101).unwrap();
        assert_eq!([0, 1, 2, 3, usize::MAX >> 4].map(|group| reader.known(group)), [0, 0, 5, 0, 0]);
        assert!(reader.board.write_all_at(&[1], 0).is_err());
        assert!(reader.board.set_len(0).is_err() && board.0.set_len(8).is_err(), "nor does it become shorter");
    }
}
