//! TFTP datagrams (RFC 1350 section 5, RFC 2347): decoding what a client may send, encoding what a server may.

use std::fmt;

/// What a client may send to a server that only lends files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientPacket<'a> {
    /// RRQ.
    ReadRequest(ReadRequest<'a>),
    /// WRQ: recognised only to be refused.
    WriteRequest,
    /// ACK of a block, modulo 65536.
    Acknowledgement(u16),
    /// ERROR: the client has ended the transfer.
    Error(u16),
}

/// A read request whose shape is right. Nothing in it is believed to be sensible yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadRequest<'a> {
    /// The name asked for; any bytes but NUL.
    pub name: &'a [u8],
    /// Whether the mode is `octet`, in any case; `netascii` and `mail` are not lent.
    pub octet: bool,
    /// Option names and values, in the order sent (RFC 2347).
    pub options: Vec<(&'a [u8], &'a [u8])>,
}

/// Why a datagram is not one that a client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than its opcode says it must be, or longer than any request.
    #[error("datagram of {0} octets is too short or too long for its opcode")]
    Length(usize),
    /// Not an opcode that a client uses.
    #[error("opcode {0} is none that a client sends")]
    Opcode(u16),
    /// A string without its NUL, or an option without its value.
    #[error("request has a string without end or an option without value")]
    UnterminatedString,
    /// More options than any client has.
    #[error("request has more than {MAX_OPTIONS} options")]
    TooManyOptions,
}

impl<'a> ClientPacket<'a> {
    /// Decodes one datagram.
    ///
    /// # Errors
    /// See [`DecodeError`]. The answer to any of them is silence.
    pub fn decode(datagram: &'a [u8]) -> Result<Self, DecodeError> {
        let (opcode, rest) = split_u16(datagram).ok_or(DecodeError::Length(datagram.len()))?;
        match opcode {
            OPCODE_RRQ if datagram.len() <= MAX_REQUEST_BYTES => read_request(rest).map(Self::ReadRequest),
            OPCODE_WRQ if datagram.len() <= MAX_REQUEST_BYTES => read_request(rest).map(|_| Self::WriteRequest),
            OPCODE_RRQ | OPCODE_WRQ => Err(DecodeError::Length(datagram.len())),
            // Some clients pad; the block number is all there is to an acknowledgement.
            OPCODE_ACK => match split_u16(rest) {
                Some((block, _)) => Ok(Self::Acknowledgement(block)),
                None => Err(DecodeError::Length(datagram.len())),
            },
            OPCODE_ERROR => match split_u16(rest) {
                Some((code, _)) => Ok(Self::Error(code)),
                None => Err(DecodeError::Length(datagram.len())),
            },
            other => Err(DecodeError::Opcode(other)),
        }
    }
}

/// An ERROR's code (RFC 1350 section 5, RFC 2347).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// "File not found": also for names and modes that are never lent, so that nothing is learnt from the difference.
    NotFound,
    /// "Access violation": writing.
    AccessViolation,
}

/// Appends a DATA packet: block number modulo 65536, and its bytes.
pub fn encode_data(out: &mut Vec<u8>, block: u16, data: &[u8]) {
    out.extend_from_slice(&OPCODE_DATA.to_be_bytes());
    out.extend_from_slice(&block.to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends an OACK (RFC 2347) of these options.
pub fn encode_option_acknowledgement(out: &mut Vec<u8>, options: &[(&'static str, u64)]) {
    out.extend_from_slice(&OPCODE_OACK.to_be_bytes());
    for (name, value) in options {
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.extend_from_slice(value.to_string().as_bytes());
        out.push(0);
    }
}

/// An ERROR. There is one text for all of them: whoever asks for what is not lent learns nothing of the server.
#[must_use]
pub fn encode_error(code: ErrorCode) -> Vec<u8> {
    let number: u16 = match code {
        ErrorCode::NotFound => 1,
        ErrorCode::AccessViolation => 2,
    };
    let mut out = OPCODE_ERROR.to_be_bytes().to_vec();
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(ERROR_TEXT.as_bytes());
    out.push(0);
    out
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFound => "not found",
            Self::AccessViolation => "access violation",
        })
    }
}

fn read_request(rest: &[u8]) -> Result<ReadRequest<'_>, DecodeError> {
    let (name, rest) = split_string(rest)?;
    let (mode, mut rest) = split_string(rest)?;
    let mut options = Vec::new();
    // Some firmware pads its request with NULs: an empty option name ends the list.
    while rest.first().is_some_and(|first| *first != 0) {
        if options.len() == MAX_OPTIONS {
            return Err(DecodeError::TooManyOptions);
        }
        let (option, after_name) = split_string(rest)?;
        let (value, after_value) = split_string(after_name)?;
        options.push((option, value));
        rest = after_value;
    }
    Ok(ReadRequest { name, octet: mode.eq_ignore_ascii_case(b"octet"), options })
}

fn split_string(bytes: &[u8]) -> Result<(&[u8], &[u8]), DecodeError> {
    let end = bytes.iter().position(|byte| *byte == 0).ok_or(DecodeError::UnterminatedString)?;
    Ok((&bytes[..end], &bytes[end + 1..]))
}

fn split_u16(bytes: &[u8]) -> Option<(u16, &[u8])> {
    bytes.split_first_chunk::<2>().map(|(head, rest)| (u16::from_be_bytes(*head), rest))
}

/// Octets of the header of a DATA packet.
pub const DATA_HEADER_BYTES: usize = 4;

/// The longest request looked at: a name of 255, and options. RFC 2347 says 512 octets.
const MAX_REQUEST_BYTES: usize = 512;
const MAX_OPTIONS: usize = 16;
const OPCODE_RRQ: u16 = 1;
const OPCODE_WRQ: u16 = 2;
const OPCODE_DATA: u16 = 3;
const OPCODE_ACK: u16 = 4;
const OPCODE_ERROR: u16 = 5;
const OPCODE_OACK: u16 = 6;
const ERROR_TEXT: &str = "not available";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(name: &[u8], mode: &str, options: &[(String, String)]) -> Vec<u8> {
        let mut bytes = vec![0, 1];
        bytes.extend_from_slice(name);
        bytes.push(0);
        bytes.extend_from_slice(mode.as_bytes());
        bytes.push(0);
        for (name, value) in options {
            bytes.extend_from_slice(name.as_bytes());
            bytes.push(0);
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        }
        bytes
    }

    #[test]
    fn a_request_as_ovmf_sends_it() {
        let bytes = b"\0\x01snponly.efi\0octet\0tsize\x000\0blksize\x001468\0windowsize\x004\0";
        let ClientPacket::ReadRequest(read) = ClientPacket::decode(bytes).unwrap() else { panic!("no RRQ") };
        assert_eq!(read.name, b"snponly.efi");
        assert!(read.octet);
        assert_eq!(read.options[2], (b"windowsize".as_slice(), b"4".as_slice()));
    }

    #[test]
    fn malformed_datagrams_are_named() {
        assert_eq!(ClientPacket::decode(b"\0"), Err(DecodeError::Length(1)));
        assert_eq!(ClientPacket::decode(b"\0\x04\0"), Err(DecodeError::Length(3)));
        assert_eq!(ClientPacket::decode(b"\0\x09ab"), Err(DecodeError::Opcode(9)));
        assert_eq!(ClientPacket::decode(b"\0\x03\0\x01data"), Err(DecodeError::Opcode(3)), "servers send DATA");
        assert_eq!(ClientPacket::decode(b"\0\x06blksize\x008\0"), Err(DecodeError::Opcode(6)), "servers send OACK");
        assert_eq!(ClientPacket::decode(b"\0\x01name"), Err(DecodeError::UnterminatedString));
        assert_eq!(ClientPacket::decode(b"\0\x01name\0octet\0blksize\0"), Err(DecodeError::UnterminatedString));
        assert_eq!(ClientPacket::decode(&request(&[b'a'; 600], "octet", &[])), Err(DecodeError::Length(609)));
        let many = vec![("a".to_owned(), "1".to_owned()); 17];
        assert_eq!(ClientPacket::decode(&request(b"a", "octet", &many)), Err(DecodeError::TooManyOptions));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
            let _ = ClientPacket::decode(&bytes);
        }

        #[test]
        fn decoding_of_request_like_bytes_never_panics(opcode in 0_u8..8, tail in "[a-z\\x00]{0,80}") {
            let mut bytes = vec![0, opcode];
            bytes.extend_from_slice(tail.as_bytes());
            let _ = ClientPacket::decode(&bytes);
        }

        #[test]
        fn requests_round_trip(name in "[ -~]{1,100}", options in proptest::collection::vec(("[a-z]{1,8}", "[0-9]{1,8}"), 0..8)) {
            let bytes = request(name.as_bytes(), "OcTet", &options);
            let ClientPacket::ReadRequest(read) = ClientPacket::decode(&bytes).unwrap() else { panic!("no RRQ") };
            prop_assert_eq!(read.name, name.as_bytes());
            prop_assert!(read.octet);
            let seen: Vec<_> = read.options.iter().map(|(n, v)| (String::from_utf8_lossy(n).into_owned(), String::from_utf8_lossy(v).into_owned())).collect();
            prop_assert_eq!(seen, options);
        }
    }
}
