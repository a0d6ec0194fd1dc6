//! From a byte stream to PDUs (RFC 7143 §11.1): lengths are checked against what was declared before anything is
//! buffered for them, digests before anything is believed.

use crate::pdu::{Digests, HEADER_OCTETS, Header, Pdu, padding};
use bytes::{Buf as _, Bytes, BytesMut};
use thiserror::Error;

/// Room made for a read where headers and small segments are expected.
const READ_OCTETS: usize = 64 * 1024;
/// Segments from this length on are received into a buffer of their own, which goes to the backend as it is. Shorter
/// ones are copied out of the read buffer, so that none holds more memory than it is long.
const LARGE_OCTETS: usize = 16 * 1024;
/// Room made for a read between large segments: the header, and no more of the next segment than is cheap to copy.
const HEADER_READ_OCTETS: usize = 512;
/// After this many PDUs without a large segment, no more are expected.
const SMALL_IN_A_ROW: u8 = 8;

/// Buffers and cuts one connection's received octets.
#[derive(Debug)]
pub(crate) struct Framer {
    buffer: BytesMut,
    /// A large segment on its way; what is in `buffer` comes after it.
    large: Option<Large>,
    small_in_a_row: u8,
    digests: Digests,
    data_limit: usize,
}

/// A PDU whose segment is being received.
#[derive(Debug)]
struct Large {
    header: Header,
    segment: BytesMut,
    /// Octets that belong to it: data, padding, digest.
    whole: usize,
}

impl Framer {
    /// Starts without digests, as the login phase does.
    pub(crate) fn new(data_limit: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            large: None,
            small_in_a_row: SMALL_IN_A_ROW,
            digests: Digests::default(),
            data_limit,
        }
    }

    /// From now on expects `digests`, and data segments of at most `data_limit` octets.
    pub(crate) fn set_limits(&mut self, digests: Digests, data_limit: usize) {
        self.digests = digests;
        self.data_limit = data_limit;
    }

    /// A buffer with room to read into; what is appended is received.
    pub(crate) fn buffer(&mut self) -> &mut BytesMut {
        let in_segment = self.large.as_ref().is_some_and(|large| large.segment.len() < large.whole);
        if !in_segment {
            self.make_room();
        }
        match &mut self.large {
            Some(large) if in_segment => &mut large.segment,
            Some(_) | None => &mut self.buffer,
        }
    }

    fn make_room(&mut self) {
        let usual = if self.small_in_a_row < SMALL_IN_A_ROW { HEADER_READ_OCTETS } else { READ_OCTETS };
        if usual == HEADER_READ_OCTETS && self.buffer.is_empty() && self.buffer.capacity() > usual {
            // A read fills all the room that there is.
            self.buffer = BytesMut::with_capacity(usual);
        }
        let missing = match self.header() {
            // Its header only: the segment gets a buffer of its own.
            Some(header) if header.data_octets() >= LARGE_OCTETS => HEADER_OCTETS + header.additional_octets() + 4,
            Some(header) => self.total_octets(&header),
            None => HEADER_OCTETS,
        };
        let missing = missing.saturating_sub(self.buffer.len());
        if self.buffer.capacity() - self.buffer.len() < missing.max(usual / 4) {
            self.buffer.reserve(missing.max(usual));
        }
    }

    /// The next whole PDU, if it is there.
    pub(crate) fn next(&mut self) -> Result<Option<Pdu>, FrameError> {
        if self.large.is_some() {
            return self.next_large();
        }
        let Some(header) = self.header() else {
            return Ok(None);
        };
        let octets = header.data_octets();
        if octets > self.data_limit {
            return Err(FrameError::TooLong { octets, limit: self.data_limit });
        }
        let header_octets = HEADER_OCTETS + header.additional_octets();
        let digest_octets = if self.digests.header { 4 } else { 0 };
        // The digest is checked as soon as the header is there: its length fields are not to be trusted before.
        if self.digests.header {
            let Some(received) = self.buffer.get(header_octets..header_octets + 4) else {
                return Ok(None);
            };
            if received != crc32c::crc32c(&self.buffer[..header_octets]).to_le_bytes() {
                return Err(FrameError::HeaderDigest);
            }
        }
        let (before, total) = (header_octets + digest_octets, self.total_octets(&header));
        if self.buffer.len() < total {
            if octets >= LARGE_OCTETS && self.buffer.len() >= before {
                self.start_large(header, before, total - before);
            }
            return Ok(None);
        }
        self.buffer.advance(before);
        let segment = self.buffer.split_to(total - before);
        self.check_data(octets, &segment)?;
        self.count(octets);
        Ok(Some(Pdu { header, data: Bytes::copy_from_slice(&segment[..octets]) }))
    }

    /// Everything in the buffer is of one large PDU, whose first `before` octets are its header.
    fn start_large(&mut self, header: Header, before: usize, whole: usize) {
        let mut segment = BytesMut::with_capacity(whole);
        segment.extend_from_slice(&self.buffer[before..]);
        self.buffer.clear();
        self.large = Some(Large { header, segment, whole });
    }

    fn next_large(&mut self) -> Result<Option<Pdu>, FrameError> {
        let Some(mut large) = self.large.take() else { return Ok(None) };
        if large.segment.len() < large.whole {
            self.large = Some(large);
            return Ok(None);
        }
        // A driver may have appended more than there was room for.
        if large.segment.len() > large.whole {
            self.buffer.extend_from_slice(&large.segment[large.whole..]);
            large.segment.truncate(large.whole);
        }
        let octets = large.header.data_octets();
        self.check_data(octets, &large.segment)?;
        self.count(octets);
        large.segment.truncate(octets);
        Ok(Some(Pdu { header: large.header, data: large.segment.freeze() }))
    }

    /// Checks the data digest of a segment with its padding and digest.
    fn check_data(&self, octets: usize, segment: &[u8]) -> Result<(), FrameError> {
        let (padded, digest) = segment.split_at(octets + padding(octets));
        if self.digests.data && octets > 0 && digest != crc32c::crc32c(padded).to_le_bytes() {
            return Err(FrameError::DataDigest);
        }
        Ok(())
    }

    fn count(&mut self, octets: usize) {
        self.small_in_a_row = if octets >= LARGE_OCTETS { 0 } else { self.small_in_a_row.saturating_add(1) };
    }

    fn header(&self) -> Option<Header> {
        self.buffer.first_chunk::<HEADER_OCTETS>().map(|octets| Header(*octets))
    }

    /// Length of the PDU with this header, digests and padding included. Data digest only if there is data.
    fn total_octets(&self, header: &Header) -> usize {
        let data = header.data_octets();
        let header_digest = if self.digests.header { 4 } else { 0 };
        let data_digest = if self.digests.data && data > 0 { 4 } else { 0 };
        HEADER_OCTETS + header.additional_octets() + header_digest + data + padding(data) + data_digest
    }
}

/// Why the stream cannot be followed any further. At error recovery level 0 each ends the connection.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Longer than this side declared (MaxRecvDataSegmentLength).
    #[error("receiving a PDU: data segment of {octets} octets is longer than the {limit} declared")]
    TooLong {
        /// Its DataSegmentLength.
        octets: usize,
        /// The limit.
        limit: usize,
    },
    /// The header does not match its digest.
    #[error("receiving a PDU: header digest mismatch")]
    HeaderDigest,
    /// The data segment does not match its digest.
    #[error("receiving a PDU: data digest mismatch")]
    DataDigest,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pdu::Transmit;
    use proptest::prelude::*;

    fn encode(data: &[u8], digests: Digests) -> Vec<u8> {
        let header = Header([0; HEADER_OCTETS]).set_word(16, 7);
        Transmit::new(header, Bytes::copy_from_slice(data), digests).slices().concat()
    }

    proptest! {
        #[test]
        fn arbitrary_octets_never_panic(octets in prop::collection::vec(any::<u8>(), 0..600), header: bool, data: bool) {
            let mut framer = Framer::new(256);
            framer.set_limits(Digests { header, data }, 256);
            framer.buffer().extend_from_slice(&octets);
            while let Ok(Some(pdu)) = framer.next() {
                prop_assert!(pdu.data.len() <= 256);
            }
        }

        #[test]
        fn what_is_sent_arrives_however_it_is_cut(
            segments in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40_000), 1..5),
            cut in 1usize..50_000, header: bool, data: bool, like_a_socket: bool,
        ) {
            let digests = Digests { header, data };
            let stream: Vec<u8> = segments.iter().flat_map(|segment| encode(segment, digests)).collect();
            let mut framer = Framer::new(1 << 20);
            framer.set_limits(digests, 1 << 20);
            let mut received = Vec::new();
            let mut rest = &stream[..];
            while !rest.is_empty() {
                let buffer = framer.buffer();
                let room = buffer.capacity() - buffer.len();
                prop_assert!(room > 0);
                // A socket fills the room; `extend_from_slice` makes more.
                let (piece, left) = rest.split_at(cut.min(if like_a_socket { room } else { cut }).min(rest.len()));
                buffer.extend_from_slice(piece);
                rest = left;
                while let Some(pdu) = framer.next().unwrap() {
                    prop_assert_eq!(pdu.header.task_tag(), 7);
                    received.push(pdu.data.to_vec());
                }
            }
            prop_assert_eq!(received, segments);
        }

        #[test]
        fn any_flipped_bit_is_noticed(data in prop::collection::vec(any::<u8>(), 1..64), bit: prop::sample::Index) {
            let digests = Digests { header: true, data: true };
            let mut stream = encode(&data, digests);
            let bit = bit.index(stream.len() * 8);
            stream[bit / 8] ^= 1 << (bit % 8);
            let mut framer = Framer::new(64);
            framer.set_limits(digests, 64);
            framer.buffer().extend_from_slice(&stream);
            // A flipped length bit may make the framer wait for more; it must never hand out a PDU.
            prop_assert!(!matches!(framer.next(), Ok(Some(_))));
        }
    }

    #[test]
    fn a_stream_of_large_segments_is_received_where_it_stays() {
        let segments: Vec<Vec<u8>> = (0..20u8).map(|number| vec![number; 256 * 1024]).collect();
        let stream: Vec<u8> = segments.iter().flat_map(|segment| encode(segment, Digests::default())).collect();
        let mut framer = Framer::new(256 * 1024);
        let mut placed = Vec::new();
        let (mut rest, mut stayed) = (&stream[..], 0);
        while !rest.is_empty() {
            let buffer = framer.buffer();
            let (piece, left) = rest.split_at((buffer.capacity() - buffer.len()).min(rest.len()));
            placed.push(buffer.as_ptr().addr() + buffer.len()..buffer.as_ptr().addr() + buffer.len() + piece.len());
            buffer.extend_from_slice(piece);
            rest = left;
            while let Some(pdu) = framer.next().unwrap() {
                let data = pdu.data.as_ptr().addr()..pdu.data.as_ptr().addr() + pdu.data.len();
                let overlap = |place: &std::ops::Range<usize>| {
                    place.end.min(data.end).saturating_sub(place.start.max(data.start))
                };
                stayed += placed.drain(..).map(|place| overlap(&place)).sum::<usize>();
            }
        }
        // All but what came with the headers.
        let copied = 20 * 256 * 1024 - stayed;
        assert!(copied <= READ_OCTETS + 20 * HEADER_READ_OCTETS, "{copied} octets were copied");
    }

    #[test]
    fn no_segment_holds_more_memory_than_it_is_long() {
        // Each segment is followed by many small PDUs, so that it would keep a whole read buffer.
        for octets in [1, 5000, LARGE_OCTETS - 1, LARGE_OCTETS, 50_000] {
            let small = encode(&[], Digests::default()).repeat(300);
            let stream = [encode(&vec![7; octets], Digests::default()), small].concat();
            let mut framer = Framer::new(1 << 18);
            let mut rest = &stream[..];
            while !rest.is_empty() {
                let buffer = framer.buffer();
                let (piece, left) = rest.split_at((buffer.capacity() - buffer.len()).min(rest.len()));
                buffer.extend_from_slice(piece);
                rest = left;
                while let Some(pdu) = framer.next().unwrap() {
                    if !pdu.data.is_empty() {
                        let data = pdu.data.try_into_mut().expect("nobody shares its memory");
                        assert!(data.capacity() <= octets + 8, "{octets}: {}", data.capacity());
                    }
                }
            }
        }
    }

    #[test]
    fn a_segment_longer_than_declared_is_refused_from_its_header_alone() {
        let mut framer = Framer::new(100);
        framer.buffer().extend_from_slice(&encode(&[0; 101], Digests::default())[..HEADER_OCTETS]);
        assert_eq!(framer.next().unwrap_err(), FrameError::TooLong { octets: 101, limit: 100 });
    }
}
