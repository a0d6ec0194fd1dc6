//! A DHCPv4 client (RFC 2131) for one address on the airlock network: messages and the exchange, without a socket
//! ([`socket`] has it). The vendor class tells netboot that this is the agent, and option 67 answers with the URL of
//! its settings.
//!
//! It decodes options itself rather than with a library: it needs six of them, in a process of which every byte is
//! measured, and a malformed option must not hide those after it.

pub mod socket;

use assay_wire::net::MacAddr;
use ipnet::Ipv4Net;
use std::net::Ipv4Addr;
use url::Url;

/// Option 60 of the agent: netboot answers it with settings, not with a boot file.
pub const VENDOR_CLASS: &str = "AssayAgent";

/// Longest packet that is looked at.
pub const MAX_PACKET_BYTES: usize = 1500;

const BOOTREQUEST: u8 = 1;
const BOOTREPLY: u8 = 2;
const ETHERNET: u8 = 1;
const BROADCAST_FLAG: u8 = 0x80;
const MAGIC_COOKIE: [u8; 4] = [99, 130, 83, 99];

/// The fixed part and the magic cookie (RFC 2131 section 2).
const HEADER_BYTES: usize = 240;

/// BOOTP relays and some servers drop what is shorter (RFC 1542 section 2.1).
const MIN_PACKET_BYTES: usize = 300;

/// Where yiaddr, chaddr and the options' cookie stand.
const YIADDR: usize = 16;
const CHADDR: usize = 28;
const COOKIE: usize = 236;

/// The DHCP options that we write or read (RFC 2132).
mod option {
    pub(super) const PAD: u8 = 0;
    pub(super) const SUBNET_MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const REQUESTED_ADDRESS: u8 = 50;
    pub(super) const MESSAGE_TYPE: u8 = 53;
    pub(super) const SERVER_IDENTIFIER: u8 = 54;
    pub(super) const PARAMETER_REQUEST_LIST: u8 = 55;
    pub(super) const MAX_MESSAGE_SIZE: u8 = 57;
    pub(super) const VENDOR_CLASS: u8 = 60;
    pub(super) const BOOT_FILE_NAME: u8 = 67;
    pub(super) const END: u8 = 255;
}

/// Values of option 53.
mod message_type {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
}

/// What a server granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressLease {
    /// Address and prefix length.
    pub address: Ipv4Net,
    /// Default router, if there is one.
    pub router: Option<Ipv4Addr>,
    /// Where the settings are.
    pub settings_url: Url,
}

/// One exchange: discover, offer, request, ack. Feed it packets; it says what to send.
#[derive(Debug)]
pub struct Exchange {
    mac: MacAddr,
    transaction: u32,
    offer: Option<Offer>,
}

/// What follows from a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Nothing: it was not for us, or not usable, as said.
    Ignore(Ignored),
    /// Send this.
    Send(Vec<u8>),
    /// The address is ours.
    Bound(AddressLease),
    /// The server took its offer back: start again.
    Refused,
}

/// Why a packet is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ignored {
    /// Not a reply to us.
    #[error("it is not a reply to our request")]
    NotOurs,
    /// Not at this point of the exchange, or from another server.
    #[error("it does not belong at this point of the exchange")]
    OutOfTurn,
    /// An offer that an agent cannot use.
    #[error("it offers no address, mask and server identifier")]
    NoAddress,
    /// An offer of a server that does not know agents.
    #[error("it names no http:// URL of settings (option 67)")]
    NoSettings,
}

#[derive(Debug, Clone, Copy)]
struct Offer {
    address: Ipv4Addr,
    server: Ipv4Addr,
}

impl Exchange {
    /// A new exchange. `transaction` is random: it is all that a server's answer is told by.
    #[must_use]
    pub fn new(mac: MacAddr, transaction: u32) -> Self {
        Self { mac, transaction, offer: None }
    }

    /// What to send now, first or again: a discover, or the request for the offer that we took.
    #[must_use]
    pub fn message(&self) -> Vec<u8> {
        let mut packet = self.header();
        let kind = if self.offer.is_some() { message_type::REQUEST } else { message_type::DISCOVER };
        push_option(&mut packet, option::MESSAGE_TYPE, &[kind]);
        push_option(&mut packet, option::VENDOR_CLASS, VENDOR_CLASS.as_bytes());
        let size = u16::try_from(MAX_PACKET_BYTES).unwrap_or(u16::MAX);
        push_option(&mut packet, option::MAX_MESSAGE_SIZE, &size.to_be_bytes());
        let wanted = [option::SUBNET_MASK, option::ROUTER, option::BOOT_FILE_NAME];
        push_option(&mut packet, option::PARAMETER_REQUEST_LIST, &wanted);
        if let Some(offer) = self.offer {
            push_option(&mut packet, option::REQUESTED_ADDRESS, &offer.address.octets());
            push_option(&mut packet, option::SERVER_IDENTIFIER, &offer.server.octets());
        }
        packet.push(option::END);
        packet.resize(packet.len().max(MIN_PACKET_BYTES), 0);
        packet
    }

    /// Takes a packet that arrived on port 68.
    pub fn handle_packet(&mut self, packet: &[u8]) -> Reaction {
        let Some(reply) = Reply::parse(packet).filter(|reply| self.is_ours(reply)) else {
            return Reaction::Ignore(Ignored::NotOurs);
        };
        match (reply.kind, self.offer) {
            (message_type::OFFER, None) => match reply.lease() {
                Ok((_, server)) => {
                    self.offer = Some(Offer { address: reply.address, server });
                    Reaction::Send(self.message())
                }
                Err(why) => Reaction::Ignore(why),
            },
            (message_type::ACK, Some(offer)) if reply.server == Some(offer.server) => match reply.lease() {
                Ok((lease, _)) => Reaction::Bound(lease),
                Err(why) => Reaction::Ignore(why),
            },
            (message_type::NAK, Some(offer)) if reply.server == Some(offer.server) => {
                self.offer = None;
                Reaction::Refused
            }
            _ => Reaction::Ignore(Ignored::OutOfTurn),
        }
    }

    fn is_ours(&self, reply: &Reply<'_>) -> bool {
        reply.transaction == self.transaction && reply.mac == self.mac.octets()
    }

    fn header(&self) -> Vec<u8> {
        let mut packet = vec![0; HEADER_BYTES];
        packet[..3].copy_from_slice(&[BOOTREQUEST, ETHERNET, 6]);
        packet[4..8].copy_from_slice(&self.transaction.to_be_bytes());
        // We have no address yet, so the answer cannot be sent to it.
        packet[10] = BROADCAST_FLAG;
        packet[CHADDR..CHADDR + 6].copy_from_slice(&self.mac.octets());
        packet[COOKIE..].copy_from_slice(&MAGIC_COOKIE);
        packet
    }
}

/// A server's message, as far as we read it.
#[derive(Debug)]
struct Reply<'a> {
    transaction: u32,
    mac: [u8; 6],
    address: Ipv4Addr,
    kind: u8,
    server: Option<Ipv4Addr>,
    mask: Option<Ipv4Addr>,
    router: Option<Ipv4Addr>,
    settings_url: Option<&'a [u8]>,
}

impl<'a> Reply<'a> {
    fn parse(packet: &'a [u8]) -> Option<Self> {
        let header = packet.get(..HEADER_BYTES).filter(|_| packet.len() <= MAX_PACKET_BYTES)?;
        if header[..3] != [BOOTREPLY, ETHERNET, 6] || header[COOKIE..] != MAGIC_COOKIE {
            return None;
        }
        let mut reply = Self {
            transaction: u32::from_be_bytes(array(&header[4..8])?),
            mac: array(&header[CHADDR..CHADDR + 6])?,
            address: address(&header[YIADDR..YIADDR + 4])?,
            kind: 0,
            server: None,
            mask: None,
            router: None,
            settings_url: None,
        };
        for (code, value) in Options(&packet[HEADER_BYTES..]) {
            match code {
                option::MESSAGE_TYPE => reply.kind = value.first().copied().unwrap_or(0),
                option::SERVER_IDENTIFIER => reply.server = address(value),
                option::SUBNET_MASK => reply.mask = address(value),
                option::ROUTER => reply.router = value.get(..4).and_then(address),
                option::BOOT_FILE_NAME => reply.settings_url = Some(value),
                _ => {}
            }
        }
        Some(reply)
    }

    fn lease(&self) -> Result<(AddressLease, Ipv4Addr), Ignored> {
        let usable = !self.address.is_unspecified() && !self.address.is_broadcast() && !self.address.is_multicast();
        let (Some(server), Some(mask)) = (self.server, self.mask.filter(|_| usable)) else {
            return Err(Ignored::NoAddress);
        };
        let address = Ipv4Net::with_netmask(self.address, mask).map_err(|_| Ignored::NoAddress)?;
        let settings_url = self.settings_url.and_then(http_url).ok_or(Ignored::NoSettings)?;
        Ok((AddressLease { address, router: self.router, settings_url }, server))
    }
}

/// Walks options up to the end mark; a length that runs over the end ends it too.
struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match *self.0 {
                [option::PAD, ref rest @ ..] => self.0 = rest,
                [option::END, ..] | [] | [_] => return None,
                [code, length, ref rest @ ..] => {
                    let (value, rest) = rest.split_at_checked(length.into())?;
                    self.0 = rest;
                    return Some((code, value));
                }
            }
        }
    }
}

fn push_option(packet: &mut Vec<u8>, code: u8, value: &[u8]) {
    // All of ours are short; `try_from` keeps it so.
    if let Ok(length) = u8::try_from(value.len()) {
        packet.extend([code, length]);
        packet.extend(value);
    }
}

fn array<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.try_into().ok()
}

fn address(bytes: &[u8]) -> Option<Ipv4Addr> {
    array::<4>(bytes).map(Ipv4Addr::from)
}

fn http_url(bytes: &[u8]) -> Option<Url> {
    // Some servers end the name with a zero octet.
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
    Url::parse(text).ok().filter(|url| url.scheme() == "http")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: &str = "52:54:00:00:00:01";
    const URL: &[u8] = b"http://10.99.0.1/boot/token/settings.json";

    fn exchange() -> Exchange {
        Exchange::new(MAC.parse().unwrap(), 0x0102_0304)
    }

    fn answer(kind: u8, server: [u8; 4], options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut packet = exchange().header();
        packet[0] = BOOTREPLY;
        packet[YIADDR..YIADDR + 4].copy_from_slice(&[10, 99, 0, 50]);
        push_option(&mut packet, option::MESSAGE_TYPE, &[kind]);
        push_option(&mut packet, option::SERVER_IDENTIFIER, &server);
        push_option(&mut packet, option::SUBNET_MASK, &[255, 255, 255, 0]);
        for (code, value) in options {
            push_option(&mut packet, *code, value);
        }
        packet.push(option::END);
        packet
    }

    fn offer() -> Vec<u8> {
        answer(message_type::OFFER, [10, 99, 0, 1], &[(option::BOOT_FILE_NAME, URL), (option::ROUTER, &[10, 99, 0, 9])])
    }

    fn options(packet: &[u8]) -> Vec<(u8, Vec<u8>)> {
        Options(&packet[HEADER_BYTES..]).map(|(code, value)| (code, value.to_vec())).collect()
    }

    #[test]
    fn discover_offer_request_ack() {
        let mut exchange = exchange();
        let discover = exchange.message();
        assert!(discover.len() >= MIN_PACKET_BYTES);
        assert_eq!(options(&discover)[0], (option::MESSAGE_TYPE, vec![message_type::DISCOVER]));
        assert!(options(&discover).contains(&(option::VENDOR_CLASS, VENDOR_CLASS.as_bytes().to_vec())));

        let Reaction::Send(request) = exchange.handle_packet(&offer()) else { panic!("no request") };
        assert_eq!(options(&request)[0], (option::MESSAGE_TYPE, vec![message_type::REQUEST]));
        assert!(options(&request).contains(&(option::REQUESTED_ADDRESS, vec![10, 99, 0, 50])));
        assert!(options(&request).contains(&(option::SERVER_IDENTIFIER, vec![10, 99, 0, 1])));

        let ack = answer(message_type::ACK, [10, 99, 0, 1], &[(option::BOOT_FILE_NAME, URL)]);
        let Reaction::Bound(lease) = exchange.handle_packet(&ack) else { panic!("not bound") };
        assert_eq!(lease.address.to_string(), "10.99.0.50/24");
        assert_eq!(lease.settings_url.as_str().as_bytes(), URL);
        assert_eq!(lease.router, None);
    }

    #[test]
    fn a_refusal_starts_again() {
        let mut exchange = exchange();
        exchange.handle_packet(&offer());
        assert_eq!(exchange.handle_packet(&answer(message_type::NAK, [10, 99, 0, 1], &[])), Reaction::Refused);
        assert_eq!(options(&exchange.message())[0], (option::MESSAGE_TYPE, vec![message_type::DISCOVER]));
    }

    #[test]
    fn other_servers_transactions_and_machines_are_ignored() {
        let mut exchange = exchange();
        let mut foreign = offer();
        foreign[7] ^= 1;
        assert_eq!(exchange.handle_packet(&foreign), Reaction::Ignore(Ignored::NotOurs));
        let mut foreign = offer();
        foreign[CHADDR] ^= 2;
        assert_eq!(exchange.handle_packet(&foreign), Reaction::Ignore(Ignored::NotOurs));
        exchange.handle_packet(&offer());
        let ack = answer(message_type::ACK, [10, 99, 0, 2], &[(option::BOOT_FILE_NAME, URL)]);
        assert_eq!(exchange.handle_packet(&ack), Reaction::Ignore(Ignored::OutOfTurn));
        assert_eq!(exchange.handle_packet(&offer()), Reaction::Ignore(Ignored::OutOfTurn));
    }

    #[test]
    fn offers_without_settings_are_left_alone() {
        for url in [&b""[..], b"snponly.efi", b"https://10.99.0.1/x", b"\xff\xfe"] {
            let packet = answer(message_type::OFFER, [10, 99, 0, 1], &[(option::BOOT_FILE_NAME, url)]);
            assert_eq!(exchange().handle_packet(&packet), Reaction::Ignore(Ignored::NoSettings), "{url:?}");
        }
        let mut packet = offer();
        packet[YIADDR..YIADDR + 4].fill(0);
        assert_eq!(exchange().handle_packet(&packet), Reaction::Ignore(Ignored::NoAddress));
    }

    #[test]
    fn a_malformed_option_does_not_hide_those_before_it() {
        let mut packet = offer();
        packet.pop();
        packet.extend([12, 200, b'x']);
        assert!(matches!(exchange().handle_packet(&packet), Reaction::Send(_)));
    }

    proptest! {
        #[test]
        fn never_panics(packet in proptest::collection::vec(any::<u8>(), 0..2000)) {
            exchange().handle_packet(&packet);
        }

        #[test]
        fn never_panics_on_options(options in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut packet = offer();
            packet.truncate(HEADER_BYTES);
            packet.extend(options);
            let mut exchange = exchange();
            exchange.handle_packet(&packet);
            exchange.handle_packet(&offer());
            exchange.handle_packet(&packet);
        }
    }
}
