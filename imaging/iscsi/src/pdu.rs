//! PDUs on the wire (RFC 7143 §11): the 48-octet basic header segment, opcodes, and what is queued to send.
//!
//! Headers stay octets with named accessors: each field is read once, where it is used, and an answer is written with
//! the same offsets that the RFC prints.

use bytes::Bytes;
use std::ops::Range;

/// Length of the basic header segment, in octets.
pub(crate) const HEADER_OCTETS: usize = 48;
/// The reserved task tag (RFC 7143 §11.2.1.8).
pub(crate) const RESERVED_TAG: u32 = 0xffff_ffff;
/// The F (final) or T (transit) bit of octet 1.
pub(crate) const FINAL: u8 = 0x80;
/// The C (continue) bit of octet 1, in text and login.
pub(crate) const CONTINUE: u8 = 0x40;

/// What an initiator sends (RFC 7143 §11.2.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opcode {
    NopOut,
    ScsiCommand,
    TaskManagement,
    Login,
    Text,
    DataOut,
    Logout,
    Snack,
}

/// What a target sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Answer {
    NopIn = 0x20,
    ScsiResponse = 0x21,
    TaskManagement = 0x22,
    Login = 0x23,
    Text = 0x24,
    DataIn = 0x25,
    Logout = 0x26,
    R2t = 0x31,
    AsyncMessage = 0x32,
    Reject = 0x3f,
}

/// A basic header segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header(pub(crate) [u8; HEADER_OCTETS]);

impl Header {
    /// An answer's header with `flags` in octet 1, everything else zero.
    pub(crate) fn answer(opcode: Answer, flags: u8) -> Self {
        let mut octets = [0; HEADER_OCTETS];
        octets[0] = opcode as u8;
        octets[1] = flags;
        Self(octets)
    }

    /// The opcode, if it is one of an initiator's.
    pub(crate) fn opcode(&self) -> Option<Opcode> {
        Some(match self.0[0] & 0x3f {
            0x00 => Opcode::NopOut,
            0x01 => Opcode::ScsiCommand,
            0x02 => Opcode::TaskManagement,
            0x03 => Opcode::Login,
            0x04 => Opcode::Text,
            0x05 => Opcode::DataOut,
            0x06 => Opcode::Logout,
            0x10 => Opcode::Snack,
            _ => return None,
        })
    }

    /// The I bit: outside the command window.
    pub(crate) fn immediate(&self) -> bool {
        self.0[0] & 0x40 != 0
    }

    /// Octet 1: flags, or a function or reason code.
    pub(crate) fn flags(&self) -> u8 {
        self.0[1]
    }

    pub(crate) fn is_final(&self) -> bool {
        self.flags() & FINAL != 0
    }

    /// Length of the additional header segments, in octets.
    pub(crate) fn additional_octets(&self) -> usize {
        usize::from(self.0[4]) * 4
    }

    /// DataSegmentLength, in octets, without padding.
    pub(crate) fn data_octets(&self) -> usize {
        (usize::from(self.0[5]) << 16) | (usize::from(self.0[6]) << 8) | usize::from(self.0[7])
    }

    /// The 8-octet LUN field, verbatim.
    pub(crate) fn lun(&self) -> [u8; 8] {
        self.array(8)
    }

    /// Initiator task tag.
    pub(crate) fn task_tag(&self) -> u32 {
        self.word(16)
    }

    /// The 32-bit field at `offset`.
    pub(crate) fn word(&self, offset: usize) -> u32 {
        u32::from_be_bytes(self.array(offset))
    }

    /// The 16-bit field at `offset`.
    pub(crate) fn half(&self, offset: usize) -> u16 {
        u16::from_be_bytes(self.array(offset))
    }

    /// `N` octets from `offset`, which is a constant of the layout and within the header.
    pub(crate) fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|index| self.0[offset + index])
    }

    /// Writes `octets` at `offset`.
    pub(crate) fn set(mut self, offset: usize, octets: &[u8]) -> Self {
        self.0[offset..offset + octets.len()].copy_from_slice(octets);
        self
    }

    /// Writes a 32-bit field.
    pub(crate) fn set_word(self, offset: usize, value: u32) -> Self {
        self.set(offset, &value.to_be_bytes())
    }

    /// Writes DataSegmentLength; `octets` is below 2^24 since every segment is cut to a negotiated length.
    pub(crate) fn set_data_octets(self, octets: usize) -> Self {
        let length = u32::try_from(octets).unwrap_or(0).to_be_bytes();
        self.set(5, &length[1..])
    }
}

/// A whole PDU as received: digests checked and removed, padding removed, additional header segments dropped (none is
/// needed: CDBs are at most 16 octets and there are no bidirectional commands).
#[derive(Debug, Clone)]
pub(crate) struct Pdu {
    pub(crate) header: Header,
    pub(crate) data: Bytes,
}

/// What a data segment to send is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Payload {
    /// In memory, shared with whoever read it.
    Octets(Bytes),
    /// These octets of the logical unit, which the driver sends from where they are.
    InPlace(Range<u64>),
}

impl Payload {
    /// Of no octets.
    pub(crate) const EMPTY: Self = Self::Octets(Bytes::new());

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Octets(octets) => octets.len(),
            Self::InPlace(range) => usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Cuts off the first `octets`, which there are.
    pub(crate) fn split_to(&mut self, octets: usize) -> Self {
        match self {
            Self::Octets(all) => Self::Octets(all.split_to(octets)),
            Self::InPlace(range) => {
                let border = range.start + octets as u64;
                Self::InPlace(std::mem::replace(range, border..range.end).start..border)
            }
        }
    }

    /// Keeps the first `octets` at most.
    pub(crate) fn truncate(&mut self, octets: usize) {
        match self {
            Self::Octets(all) => all.truncate(octets),
            Self::InPlace(range) => range.end = range.end.min(range.start + octets as u64),
        }
    }
}

impl From<Bytes> for Payload {
    fn from(octets: Bytes) -> Self {
        Self::Octets(octets)
    }
}

/// Part of a PDU to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece<'a> {
    /// These octets.
    Octets(&'a [u8]),
    /// These octets of the logical unit.
    InPlace(Range<u64>),
}

impl Piece<'_> {
    /// Its length, in octets.
    pub fn len(&self) -> usize {
        match self {
            Self::Octets(octets) => octets.len(),
            Self::InPlace(range) => usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX),
        }
    }

    /// Whether there is nothing to send of it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A PDU ready to send: three pieces for one vectored write.
#[derive(Debug, Clone)]
pub struct Transmit {
    head: [u8; HEADER_OCTETS + 4],
    head_octets: usize,
    payload: Payload,
    tail: [u8; 8],
    tail_octets: usize,
    /// Read budget that this PDU gives back when the driver takes it.
    pub(crate) releases: usize,
}

impl Transmit {
    /// Puts a PDU together: DataSegmentLength, padding and digests are filled in here. There is no data digest of what is
    /// not in memory: where one is agreed on, nothing is answered so.
    pub(crate) fn new(header: Header, payload: impl Into<Payload>, digests: Digests) -> Self {
        let payload = payload.into();
        let header = header.set_data_octets(payload.len());
        let mut head = [0; HEADER_OCTETS + 4];
        head[..HEADER_OCTETS].copy_from_slice(&header.0);
        let mut head_octets = HEADER_OCTETS;
        if digests.header {
            head[HEADER_OCTETS..].copy_from_slice(&crc32c::crc32c(&header.0).to_le_bytes());
            head_octets += 4;
        }
        let mut tail = [0; 8];
        let mut tail_octets = padding(payload.len());
        if digests.data
            && let Payload::Octets(octets) = &payload
            && !octets.is_empty()
        {
            let crc = crc32c::crc32c_append(crc32c::crc32c(octets), &tail[..tail_octets]);
            tail[tail_octets..tail_octets + 4].copy_from_slice(&crc.to_le_bytes());
            tail_octets += 4;
        }
        Self { head, head_octets, payload, tail, tail_octets, releases: 0 }
    }

    /// The pieces in the order in which they go out; the last two may be empty.
    pub fn pieces(&self) -> [Piece<'_>; 3] {
        let payload = match &self.payload {
            Payload::Octets(octets) => Piece::Octets(octets),
            Payload::InPlace(range) => Piece::InPlace(range.clone()),
        };
        [Piece::Octets(&self.head[..self.head_octets]), payload, Piece::Octets(&self.tail[..self.tail_octets])]
    }

    /// The same, for a driver that answers no read in place.
    pub fn slices(&self) -> [&[u8]; 3] {
        self.pieces().map(|piece| match piece {
            Piece::Octets(octets) => octets,
            Piece::InPlace(_) => &[],
        })
    }

    /// Total length, in octets.
    pub fn octets(&self) -> usize {
        self.head_octets + self.payload.len() + self.tail_octets
    }
}

/// Which digests are in use (RFC 7143 §13.1); the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Digests {
    pub(crate) header: bool,
    pub(crate) data: bool,
}

/// Octets that pad a segment of this length to a multiple of four.
pub(crate) fn padding(octets: usize) -> usize {
    octets.wrapping_neg() % 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transmit_is_padded_and_digested() {
        let header = Header::answer(Answer::NopIn, FINAL);
        let digests = Digests { header: true, data: true };
        let transmit = Transmit::new(header, Bytes::from_static(b"abcde"), digests);
        let [head, payload, tail] = transmit.slices();
        assert_eq!((head.len(), payload.len(), tail.len()), (52, 5, 7));
        assert_eq!(head[5..8], [0, 0, 5]);
        assert_eq!(head[48..], crc32c::crc32c(&head[..48]).to_le_bytes());
        assert_eq!(tail[3..], crc32c::crc32c(b"abcde\0\0\0").to_le_bytes());
        assert_eq!(transmit.octets(), 64);
    }

    #[test]
    fn no_payload_means_no_data_digest() {
        let digests = Digests { header: false, data: true };
        assert_eq!(Transmit::new(Header::answer(Answer::R2t, FINAL), Bytes::new(), digests).octets(), 48);
    }
}
