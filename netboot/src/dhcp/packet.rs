//! DHCPv4 packets from clients (RFC 2131, RFC 2132), decoded with nothing believed.
//!
//! The header is checked and the options are cut apart here, octet by octet, before any library sees them: an option
//! with a value that makes no sense hides no other option, long options are joined (RFC 3396) and option overload is
//! followed (RFC 2131 section 4.1). `dhcproto` writes replies ([`super::reply`]), and is the tests' second opinion.

use assay_wire::net::MacAddr;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// A packet from a client or a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientPacket {
    /// Chosen by the client; echoed.
    pub transaction: u32,
    /// The client cannot hear unicast before it has its address (RFC 2131 section 4.1).
    pub broadcast: bool,
    /// The address that the client already uses, or 0.0.0.0.
    pub client_address: Ipv4Addr,
    /// The relay that passed this on, or 0.0.0.0.
    pub relay_address: Ipv4Addr,
    /// The client's NIC.
    pub mac: MacAddr,
    /// Option 53.
    pub message: ClientMessage,
    /// All options but padding, end and overload; parts of one option are joined.
    pub options: BTreeMap<u8, Vec<u8>>,
}

/// What a client may say (option 53).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ClientMessage {
    /// Who offers an address?
    Discover,
    /// I take this one; or: I keep this one.
    Request,
    /// Somebody else has it.
    Decline,
    /// I no longer want it.
    Release,
    /// I have an address; what else is there?
    Inform,
}

/// Why a packet is not one that a client of ours may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Too short for a header, or longer than an Ethernet frame can carry.
    #[error("packet of {0} octets is too short or too long for DHCP")]
    Length(usize),
    /// Not BOOTREQUEST.
    #[error("operation {0} is not a request")]
    Operation(u8),
    /// Not Ethernet with six octets.
    #[error("hardware type {htype} with {hlen} octets is not Ethernet")]
    Hardware {
        /// `htype`.
        htype: u8,
        /// `hlen`.
        hlen: u8,
    },
    /// A group address, or all zero.
    #[error("the client's hardware address is none that a NIC has")]
    Address,
    /// Not the magic cookie of RFC 2132: plain BOOTP.
    #[error("magic cookie is missing")]
    Cookie,
    /// Option 53 is missing or is none that a client sends.
    #[error("message type is missing or is none that a client sends")]
    MessageType,
}

impl ClientPacket {
    /// Decodes one datagram.
    ///
    /// # Errors
    /// See [`DecodeError`]. The answer to any of them is silence.
    pub fn decode(datagram: &[u8]) -> Result<Self, DecodeError> {
        if !(HEADER_BYTES..=MAX_PACKET_BYTES).contains(&datagram.len()) {
            return Err(DecodeError::Length(datagram.len()));
        }
        if datagram[0] != BOOTREQUEST {
            return Err(DecodeError::Operation(datagram[0]));
        }
        let (htype, hlen) = (datagram[1], datagram[2]);
        if (htype, hlen) != (HTYPE_ETHERNET, 6) {
            return Err(DecodeError::Hardware { htype, hlen });
        }
        let mac = MacAddr::new(array(datagram, CHADDR)).map_err(|_| DecodeError::Address)?;
        if mac.octets() == [0; 6] {
            return Err(DecodeError::Address);
        }
        if array(datagram, COOKIE) != MAGIC_COOKIE {
            return Err(DecodeError::Cookie);
        }
        let options = options_of(datagram);
        let message = match options.get(&code::MESSAGE_TYPE).map(Vec::as_slice) {
            Some([value]) => ClientMessage::from_wire(*value).ok_or(DecodeError::MessageType)?,
            Some(_) | None => return Err(DecodeError::MessageType),
        };
        Ok(Self {
            transaction: u32::from_be_bytes(array(datagram, XID)),
            broadcast: datagram[FLAGS] & 0x80 != 0,
            client_address: Ipv4Addr::from(array(datagram, CIADDR)),
            relay_address: Ipv4Addr::from(array(datagram, GIADDR)),
            mac,
            message,
            options,
        })
    }

    /// An option that holds one address; none if it is missing or has another length.
    #[must_use]
    pub fn address_option(&self, code: u8) -> Option<Ipv4Addr> {
        let octets: [u8; 4] = self.options.get(&code)?.as_slice().try_into().ok()?;
        Some(Ipv4Addr::from(octets))
    }
}

impl ClientMessage {
    fn from_wire(value: u8) -> Option<Self> {
        match value {
            1 => Some(Self::Discover),
            3 => Some(Self::Request),
            4 => Some(Self::Decline),
            7 => Some(Self::Release),
            8 => Some(Self::Inform),
            _ => None,
        }
    }
}

/// Option codes used here.
pub mod code {
    /// RFC 2132 section 9.1.
    pub const REQUESTED_ADDRESS: u8 = 50;
    /// RFC 2132 section 9.3.
    pub const OVERLOAD: u8 = 52;
    /// RFC 2132 section 9.6.
    pub const MESSAGE_TYPE: u8 = 53;
    /// RFC 2132 section 9.7.
    pub const SERVER_IDENTIFIER: u8 = 54;
    /// RFC 2132 section 9.13.
    pub const VENDOR_CLASS: u8 = 60;
    /// RFC 3004.
    pub const USER_CLASS: u8 = 77;
    /// RFC 3046.
    pub const RELAY_AGENT_INFORMATION: u8 = 82;
    /// RFC 4578 section 2.1.
    pub const CLIENT_ARCHITECTURE: u8 = 93;
    /// RFC 4578 section 2.3; echoed.
    pub const CLIENT_MACHINE: u8 = 97;
    /// iPXE's encapsulated options.
    pub const IPXE: u8 = 175;
}

/// Cuts options out of the options field and, where option 52 says so, out of `file` and `sname`, in that order.
fn options_of(datagram: &[u8]) -> BTreeMap<u8, Vec<u8>> {
    let mut options = BTreeMap::new();
    cut_options(&datagram[HEADER_BYTES..], &mut options);
    // An overload inside an overloaded field means nothing: it is read from the options field only.
    let overload = match options.remove(&code::OVERLOAD).as_deref() {
        Some([value]) => *value,
        Some(_) | None => 0,
    };
    if overload & 1 != 0 {
        cut_options(&datagram[FILE..FILE + 128], &mut options);
    }
    if overload & 2 != 0 {
        cut_options(&datagram[SNAME..SNAME + 64], &mut options);
    }
    options
}

/// Appends the options in `field`. An option that says it is longer than its field ends the field: what came before
/// it stands.
fn cut_options(mut field: &[u8], options: &mut BTreeMap<u8, Vec<u8>>) {
    while let [code, rest @ ..] = field {
        match (*code, rest) {
            (PAD, _) => field = rest,
            (END, _) => return,
            (code, [length, rest @ ..]) if rest.len() >= usize::from(*length) => {
                let (value, rest) = rest.split_at(usize::from(*length));
                options.entry(code).or_default().extend_from_slice(value);
                field = rest;
            }
            (_, _) => return,
        }
    }
}

fn array<const N: usize>(datagram: &[u8], offset: usize) -> [u8; N] {
    let mut octets = [0; N];
    octets.copy_from_slice(&datagram[offset..offset + N]);
    octets
}

/// Header and magic cookie.
const HEADER_BYTES: usize = 240;
const MAX_PACKET_BYTES: usize = 1500;
const BOOTREQUEST: u8 = 1;
const HTYPE_ETHERNET: u8 = 1;
const XID: usize = 4;
const FLAGS: usize = 10;
const CIADDR: usize = 12;
const GIADDR: usize = 24;
const CHADDR: usize = 28;
const SNAME: usize = 44;
const FILE: usize = 108;
const COOKIE: usize = 236;
const MAGIC_COOKIE: [u8; 4] = [99, 130, 83, 99];
const PAD: u8 = 0;
const END: u8 = 255;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A DISCOVER as a client builds it, with these options after option 53.
    pub(crate) fn packet(message: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&[1, 1, 6, 0]);
        bytes[XID..XID + 4].copy_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
        bytes[FLAGS] = 0x80;
        bytes[CHADDR..CHADDR + 6].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 1]);
        bytes[COOKIE..].copy_from_slice(&MAGIC_COOKIE);
        bytes.extend_from_slice(&[53, 1, message]);
        for (code, value) in options {
            bytes.extend_from_slice(&[*code, u8::try_from(value.len()).unwrap()]);
            bytes.extend_from_slice(value);
        }
        bytes.push(END);
        bytes
    }

    #[test]
    fn row_7_a_discover_as_ovmf_sends_it() {
        let bytes =
            packet(1, &[(60, b"PXEClient:Arch:00007:UNDI:003000"), (93, &[0, 7]), (94, &[1, 3, 0]), (97, &[0; 17])]);
        let decoded = ClientPacket::decode(&bytes).unwrap();
        assert_eq!(decoded.message, ClientMessage::Discover);
        assert_eq!(decoded.mac.to_string(), "52:54:00:00:00:01");
        assert_eq!(decoded.transaction, 0xdead_beef);
        assert!(decoded.broadcast);
        assert_eq!(decoded.options[&93], [0, 7]);
    }

    #[test]
    fn row_7_an_option_with_a_bad_value_hides_none() {
        // A Latin-1 host name, a truncated architecture, a client FQDN and options that `dhcproto` stumbles over.
        let bytes =
            packet(1, &[(12, b"k\xf6ln"), (81, &[1]), (80, &[3]), (152, &[]), (60, b"AssayAgent"), (77, b"iPXE")]);
        let decoded = ClientPacket::decode(&bytes).unwrap();
        assert_eq!(decoded.options[&60], b"AssayAgent");
        assert_eq!(decoded.options[&77], b"iPXE");
    }

    #[test]
    fn row_7_an_option_beyond_the_end_leaves_what_came_before() {
        let mut bytes = packet(1, &[(60, b"PXEClient")]);
        bytes.pop();
        bytes.extend_from_slice(&[93, 200, 0, 7]);
        let decoded = ClientPacket::decode(&bytes).unwrap();
        assert_eq!(decoded.options[&60], b"PXEClient");
        assert!(!decoded.options.contains_key(&93));
    }

    #[test]
    fn row_7_overload_is_followed_and_long_options_are_joined() {
        let mut bytes = packet(1, &[(52, &[3]), (43, b"ab"), (43, b"cd")]);
        bytes[FILE..FILE + 5].copy_from_slice(&[77, 2, b'i', b'P', END]);
        bytes[SNAME..SNAME + 5].copy_from_slice(&[77, 2, b'X', b'E', END]);
        let decoded = ClientPacket::decode(&bytes).unwrap();
        assert_eq!(decoded.options[&77], b"iPXE");
        assert_eq!(decoded.options[&43], b"abcd");
    }

    #[test]
    fn row_7_bad_headers_are_named() {
        let good = packet(1, &[]);
        let with = |offset: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[offset] = value;
            ClientPacket::decode(&bytes)
        };
        assert_eq!(ClientPacket::decode(&good[..239]), Err(DecodeError::Length(239)));
        assert_eq!(ClientPacket::decode(&vec![0; 1501]), Err(DecodeError::Length(1501)));
        assert_eq!(with(0, 2), Err(DecodeError::Operation(2)));
        for hlen in [0, 5, 7, 16, 17, 255] {
            assert_eq!(with(2, hlen), Err(DecodeError::Hardware { htype: 1, hlen }));
        }
        assert_eq!(with(CHADDR, 0x53), Err(DecodeError::Address));
        assert_eq!(with(COOKIE, 0), Err(DecodeError::Cookie));
        assert_eq!(with(HEADER_BYTES + 2, 2), Err(DecodeError::MessageType), "servers offer");
        assert_eq!(with(HEADER_BYTES, 54), Err(DecodeError::MessageType));
    }

    proptest! {
        #[test]
        fn decoding_never_panics(tail in proptest::collection::vec(any::<u8>(), 0..1400), overload in 0_u8..5, fill: u8) {
            let mut bytes = packet(1, &[(52, &[overload])]);
            bytes[SNAME..COOKIE].fill(fill);
            bytes.pop();
            bytes.extend_from_slice(&tail);
            let _ = ClientPacket::decode(&bytes);
            let _ = ClientPacket::decode(&tail);
        }

        #[test]
        fn what_dhcproto_writes_is_read(name in "[a-z]{1,60}", class in "[ -~]{1,200}", transaction: u32) {
            use dhcproto::v4::{DhcpOption, Message, MessageType, Opcode};
            use dhcproto::Encodable as _;
            let mut message = Message::new_with_id(transaction, Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED, &[2, 0, 0, 0, 0, 9]);
            message.set_opcode(Opcode::BootRequest);
            message.opts_mut().insert(DhcpOption::MessageType(MessageType::Request));
            message.opts_mut().insert(DhcpOption::Hostname(name.clone()));
            message.opts_mut().insert(DhcpOption::ClassIdentifier(class.clone().into_bytes()));
            let decoded = ClientPacket::decode(&message.to_vec().unwrap()).unwrap();
            prop_assert_eq!(decoded.transaction, transaction);
            prop_assert_eq!(&decoded.options[&12], name.as_bytes());
            prop_assert_eq!(&decoded.options[&60], class.as_bytes());
            prop_assert_eq!(decoded.message, ClientMessage::Request);
        }
    }
}
