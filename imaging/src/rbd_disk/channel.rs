//! What goes over a channel: one request, its answer, the next request. Octets only, lowest first; each side bounds what
//! the other claims before it reads on.
//!
//! ```text
//! request   operation (1)  zero (3)  length (4)  offset (8)     then, of a write, `length` octets
//! answer    errno or 0 (4)  length (4)                          then as many octets: what was asked for, or none
//! mapped    0 or 1 (1)  zero (3)  length (4)                    what was asked for, where that was whether it is mapped
//! ```
//!
//! A worker may be its node's by now, so the companion takes nothing from it but these. A companion that is somebody's
//! could spoil the clone that it has anyway, and nothing else of its worker's.

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::AsFd;

/// Channels of a disk: a worker has as many threads that wait.
pub const CHANNELS: usize = 8;
/// Octets that one request reads or writes at most.
pub const MOST_DATA: usize = 1 << 20;
/// Octets that one request zeroes, or asks about, at most.
pub const MOST_ZEROES: u32 = 1 << 30;
/// Octets of a request's header.
pub const REQUEST_BYTES: usize = 16;
/// Octets of an answer's header.
pub const ANSWER_BYTES: usize = 8;
/// Octets of what is answered to [`Request::Mapped`].
pub const MAPPED_BYTES: usize = 8;
/// Slices that one system call takes at most here.
const SLICES_AT_ONCE: usize = 64;

/// What is asked for. Ranges are of the disk, and may be outside it: that is for whoever has it to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Octets of the clone.
    Read(Range),
    /// The octets behind the request are to be the clone's.
    Write(Range),
    /// Zeros are to be the clone's; it may be longer than others.
    Zero(Range),
    /// All that was answered is to be durable.
    Flush,
    /// Octets of the map of the clone's own objects.
    Own(Range),
    /// Whether the first octet of the range, which is in one of those objects, is mapped, and how far that holds; it may be
    /// longer than others.
    Mapped(Range),
}

/// A range of at least one octet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub length: u32,
}

/// The head of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It was done; as many octets follow as the request asks for.
    Done,
    /// It was not, for this reason: an error number, not 0.
    Failed(u32),
}

/// What is answered to [`Request::Mapped`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// It takes room on Ceph; otherwise it is zero.
    pub mapped: bool,
    /// For how many octets of the range that holds: at least one.
    pub length: u32,
}

/// Not what a peer of this version sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedMessage {
    /// The operation is not known.
    #[error("operation {0} is none")]
    Operation(u8),
    /// What must be zero is not.
    #[error("what must be zero is not")]
    NotZero,
    /// Nothing, or too much.
    #[error("a length of {0} octets")]
    Length(u32),
}

const READ: u8 = 1;
const WRITE: u8 = 2;
const ZERO: u8 = 3;
const FLUSH: u8 = 4;
const OWN: u8 = 5;
const MAPPED: u8 = 6;

impl Request {
    /// As it is sent.
    #[must_use]
    pub fn encode(self) -> [u8; REQUEST_BYTES] {
        let none = Range { offset: 0, length: 0 };
        let (operation, Range { offset, length }) = match self {
            Self::Read(range) => (READ, range),
            Self::Write(range) => (WRITE, range),
            Self::Zero(range) => (ZERO, range),
            Self::Flush => (FLUSH, none),
            Self::Own(range) => (OWN, range),
            Self::Mapped(range) => (MAPPED, range),
        };
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0] = operation;
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes[8..].copy_from_slice(&offset.to_le_bytes());
        bytes
    }

    /// Reads what was sent.
    ///
    /// # Errors
    /// It is no request, or one for more than a request may be for.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, MalformedMessage> {
        let [operation, zeros @ .., _, _, _, _, _, _, _, _, _, _, _, _] = bytes;
        let [.., l0, l1, l2, l3, o0, o1, o2, o3, o4, o5, o6, o7] = *bytes;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let range = Range { offset: u64::from_le_bytes([o0, o1, o2, o3, o4, o5, o6, o7]), length };
        let (request, most) = match *operation {
            READ => (Self::Read(range), most_data()),
            WRITE => (Self::Write(range), most_data()),
            ZERO => (Self::Zero(range), MOST_ZEROES),
            FLUSH => (Self::Flush, 0),
            OWN => (Self::Own(range), most_data()),
            MAPPED => (Self::Mapped(range), MOST_ZEROES),
            other => return Err(MalformedMessage::Operation(other)),
        };
        let flush = matches!(request, Self::Flush);
        if *zeros != [0; 3] || (flush && range.offset != 0) {
            return Err(MalformedMessage::NotZero);
        }
        if length > most || (length == 0 && !flush) {
            return Err(MalformedMessage::Length(length));
        }
        Ok(request)
    }

    /// Octets behind the request.
    #[must_use]
    pub fn data(self) -> usize {
        match self {
            Self::Write(range) => range.len(),
            Self::Read(_) | Self::Zero(_) | Self::Flush | Self::Own(_) | Self::Mapped(_) => 0,
        }
    }

    /// Octets behind the answer, if it was done.
    #[must_use]
    pub fn answer_data(self) -> usize {
        match self {
            Self::Read(range) | Self::Own(range) => range.len(),
            Self::Mapped(_) => MAPPED_BYTES,
            Self::Write(_) | Self::Zero(_) | Self::Flush => 0,
        }
    }
}

impl Range {
    /// How long it is.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it has at least one octet")]
    pub fn len(self) -> usize {
        usize::try_from(self.length).unwrap_or(usize::MAX)
    }
}

impl Answer {
    /// As it is sent, before the data of an answer to `request`.
    #[must_use]
    pub fn encode(self, request: Request) -> [u8; ANSWER_BYTES] {
        let (errno, length) = match self {
            Self::Done => (0, u32::try_from(request.answer_data()).unwrap_or(u32::MAX)),
            Self::Failed(errno) => (errno, 0),
        };
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..4].copy_from_slice(&errno.to_le_bytes());
        bytes[4..].copy_from_slice(&length.to_le_bytes());
        bytes
    }

    /// Reads what was sent in answer to `request`.
    ///
    /// # Errors
    /// It is no answer to that.
    pub fn decode(bytes: &[u8; ANSWER_BYTES], request: Request) -> Result<Self, MalformedMessage> {
        let [e0, e1, e2, e3, l0, l1, l2, l3] = *bytes;
        let (errno, length) = (u32::from_le_bytes([e0, e1, e2, e3]), u32::from_le_bytes([l0, l1, l2, l3]));
        let (answer, expected) =
            if errno == 0 { (Self::Done, request.answer_data()) } else { (Self::Failed(errno), 0) };
        if usize::try_from(length) == Ok(expected) { Ok(answer) } else { Err(MalformedMessage::Length(length)) }
    }
}

impl Mapped {
    /// As it is sent.
    #[must_use]
    pub fn encode(self) -> [u8; MAPPED_BYTES] {
        let mut bytes = [0; MAPPED_BYTES];
        bytes[0] = self.mapped.into();
        bytes[4..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Reads what was sent in answer to a question about `range`.
    ///
    /// # Errors
    /// It is no answer to that: about nothing, or more than was asked about.
    pub fn decode(bytes: &[u8; MAPPED_BYTES], range: Range) -> Result<Self, MalformedMessage> {
        let [mapped, zeros @ .., l0, l1, l2, l3] = *bytes;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if mapped > 1 || zeros != [0; 3] {
            return Err(MalformedMessage::NotZero);
        }
        if length == 0 || length > range.length {
            return Err(MalformedMessage::Length(length));
        }
        Ok(Self { mapped: mapped == 1, length })
    }
}

fn most_data() -> u32 {
    u32::try_from(MOST_DATA).unwrap_or(u32::MAX)
}

/// Sends all of it.
pub(super) fn send_all(socket: impl AsFd, pieces: &[&[u8]]) -> io::Result<()> {
    let whole: usize = pieces.iter().map(|piece| piece.len()).sum();
    let mut sent = 0;
    while sent < whole {
        let mut skip = sent;
        let mut slices = Vec::with_capacity(SLICES_AT_ONCE.min(pieces.len()));
        for piece in pieces {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            if skipped < piece.len() {
                slices.push(IoSlice::new(&piece[skipped..]));
            }
            if slices.len() == SLICES_AT_ONCE {
                break;
            }
        }
        match sendmsg(&socket, &slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL) {
            Ok(more) => sent += more,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Fills the buffer; `false` if the peer had ended before its first octet.
pub(super) fn receive_all(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match recv(&socket, &mut buffer[filled..], RecvFlags::WAITALL) {
            Ok((_, 0)) if filled == 0 => return Ok(false),
            Ok((_, 0)) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok((_, more)) => filled += more,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn requests() -> impl Strategy<Value = Request> {
        let range = |most: u32| (any::<u64>(), 1..=most).prop_map(|(offset, length)| Range { offset, length });
        prop_oneof![
            range(1 << 20).prop_map(Request::Read),
            range(1 << 20).prop_map(Request::Write),
            range(1 << 30).prop_map(Request::Zero),
            Just(Request::Flush),
            range(1 << 20).prop_map(Request::Own),
            range(1 << 30).prop_map(Request::Mapped),
        ]
    }

    proptest! {
        #[test]
        fn requests_and_answers_arrive_as_they_were_sent(request in requests(), errno in 1_u32..) {
            prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
            for answer in [Answer::Done, Answer::Failed(errno)] {
                prop_assert_eq!(Answer::decode(&answer.encode(request), request), Ok(answer));
            }
        }

        #[test]
        fn arbitrary_octets_ask_for_no_more_than_is_allowed(mut bytes: [u8; REQUEST_BYTES], like in 0_u8..8, near: bool) {
            // Most octets are no request at all; these nearly are.
            if near {
                bytes[..4].copy_from_slice(&[like, 0, 0, 0]);
                bytes[7] &= 1;
            }
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert!(request.data() <= MOST_DATA && request.answer_data() <= MOST_DATA);
                prop_assert_eq!(request.encode(), bytes);
            }
        }

        #[test]
        fn nobody_says_more_than_was_asked_about(bytes: [u8; MAPPED_BYTES], near: bool, offset: u64, length in 1_u32..=1 << 30) {
            let mut bytes = bytes;
            if near {
                bytes = [bytes[0] & 1, 0, 0, 0, bytes[4], bytes[5], bytes[6], bytes[7]];
            }
            let decoded = Mapped::decode(&bytes, Range { offset, length });
            if let Ok(mapped) = decoded {
                prop_assert!((1..=length).contains(&mapped.length));
                prop_assert_eq!(mapped.encode(), bytes);
            }
            let said = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            prop_assert!(!near || decoded.is_ok() == (1..=length).contains(&said));
        }

        #[test]
        fn arbitrary_octets_answer_what_was_asked_or_nothing(request in requests(), bytes: [u8; ANSWER_BYTES]) {
            if let Ok(answer) = Answer::decode(&bytes, request) {
                prop_assert_eq!(answer.encode(request), bytes);
            }
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let range = Range { offset: 512, length: 512 };
        let changed = |request: Request, at: usize, to: u8| {
            let mut bytes = request.encode();
            bytes[at] = to;
            Request::decode(&bytes)
        };
        assert_eq!(changed(Request::Read(range), 0, 0), Err(MalformedMessage::Operation(0)));
        assert_eq!(changed(Request::Read(range), 0, 7), Err(MalformedMessage::Operation(7)));
        assert_eq!(changed(Request::Read(range), 2, 1), Err(MalformedMessage::NotZero));
        assert_eq!(changed(Request::Flush, 9, 1), Err(MalformedMessage::NotZero));
        assert_eq!(changed(Request::Flush, 4, 1), Err(MalformedMessage::Length(1)));
        assert_eq!(changed(Request::Write(range), 5, 0), Err(MalformedMessage::Length(0)));
        let longer = Range { offset: 0, length: (1 << 20) + 1 };
        for request in [Request::Read(longer), Request::Write(longer), Request::Own(longer)] {
            assert_eq!(Request::decode(&request.encode()), Err(MalformedMessage::Length(longer.length)));
        }
        let longest = Range { offset: 0, length: MOST_ZEROES + 1 };
        assert!(Request::decode(&Request::Zero(longest).encode()).is_err());
        let short = Answer::Done.encode(Request::Read(Range { offset: 0, length: 511 }));
        assert_eq!(Answer::decode(&short, Request::Read(range)), Err(MalformedMessage::Length(511)));
    }
}
