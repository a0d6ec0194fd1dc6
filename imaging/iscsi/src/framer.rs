//! From a byte stream to PDUs (RFC 7143 §11.1): lengths are checked against what was declared before anything is
//! buffered for them, digests before anything is believed.

use crate::pdu::{Digests, HEADER_OCTETS, Header, Pdu, padding};
use bytes::{Bytes, BytesMut};
use thiserror::Error;

/// Room made for a read when no larger PDU is under way.
const READ_OCTETS: usize = 64 * 1024;
/// Data segments below this length are copied out, so that a small one does not hold a whole read buffer.
const COPY_BELOW_OCTETS: usize = 8 * 1024;

/// Buffers and cuts one connection's received octets.
#[derive(Debug)]
pub(crate) struct Framer {
    buffer: BytesMut,
    digests: Digests,
    data_limit: usize,
}

impl Framer {
    /// Starts without digests, as the login phase does.
    pub(crate) fn new(data_limit: usize) -> Self {
        Self { buffer: BytesMut::new(), digests: Digests::default(), data_limit }
    }

    /// From now on expects `digests`, and data segments of at most `data_limit` octets.
    pub(crate) fn set_limits(&mut self, digests: Digests, data_limit: usize) {
        self.digests = digests;
        self.data_limit = data_limit;
    }

    /// A buffer with room to read into; what is appended is received.
    pub(crate) fn buffer(&mut self) -> &mut BytesMut {
        let wanted = match self.header().map(|header| self.total_octets(&header)) {
            // Not more than the limits allow: `next` refused such a header already.
            Some(total) if total > self.buffer.len() => (total - self.buffer.len()).max(4096),
            Some(_) | None => READ_OCTETS / 4,
        };
        if self.buffer.capacity() - self.buffer.len() < wanted {
            self.buffer.reserve(wanted.max(READ_OCTETS));
        }
        &mut self.buffer
    }

    /// The next whole PDU, if it is there.
    pub(crate) fn next(&mut self) -> Result<Option<Pdu>, FrameError> {
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
        if self.buffer.len() < self.total_octets(&header) {
            return Ok(None);
        }
        let _ = self.buffer.split_to(header_octets + digest_octets);
        let data = self.take_data(octets)?;
        Ok(Some(Pdu { header, data }))
    }

    fn take_data(&mut self, octets: usize) -> Result<Bytes, FrameError> {
        if octets == 0 {
            return Ok(Bytes::new());
        }
        let padded = octets + padding(octets);
        if self.digests.data && self.buffer[padded..padded + 4] != crc32c::crc32c(&self.buffer[..padded]).to_le_bytes()
        {
            return Err(FrameError::DataDigest);
        }
        let whole = padded + if self.digests.data { 4 } else { 0 };
        let mut segment = self.buffer.split_to(whole);
        if octets < COPY_BELOW_OCTETS {
            return Ok(Bytes::copy_from_slice(&segment[..octets]));
        }
        segment.truncate(octets);
        Ok(segment.freeze())
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
            segments in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20_000), 1..5),
            cut in 1usize..5000, header: bool, data: bool,
        ) {
            let digests = Digests { header, data };
            let stream: Vec<u8> = segments.iter().flat_map(|segment| encode(segment, digests)).collect();
            let mut framer = Framer::new(1 << 20);
            framer.set_limits(digests, 1 << 20);
            let mut received = Vec::new();
            for piece in stream.chunks(cut) {
                framer.buffer().extend_from_slice(piece);
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
    fn a_segment_longer_than_declared_is_refused_from_its_header_alone() {
        let mut framer = Framer::new(100);
        framer.buffer().extend_from_slice(&encode(&[0; 101], Digests::default())[..HEADER_OCTETS]);
        assert_eq!(framer.next().unwrap_err(), FrameError::TooLong { octets: 101, limit: 100 });
    }
}
