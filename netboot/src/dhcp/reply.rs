//! Replies, and where each goes (RFC 2131 section 4.1).

use super::packet::{ClientPacket, code};
use dhcproto::Encodable as _;
use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode, UnknownOption};
use ipnet::Ipv4Net;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// What a reply says; [`Reply::encode`] writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// OFFER, ACK or NAK.
    pub kind: ReplyKind,
    /// This server, as the client sees it: option 54, and where boot files are.
    pub server: Ipv4Addr,
    /// The client's address; none in a NAK, and where it has one already.
    pub lease: Option<LeaseTerms>,
    /// What it boots.
    pub boot: BootOptions,
    /// Option 60, for clients that want to see who they are.
    pub vendor_class: Option<VendorClass>,
}

/// What option 60 of a reply says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VendorClass {
    /// `PXEClient`: a boot server's answer on port 4011 (PXE 2.1 section 2.4).
    PxeClient,
    /// `HTTPClient`: UEFI HTTP boot takes no other answer (UEFI 2.10 section 24.7.2).
    HttpClient,
}

/// The three replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyKind {
    /// To a DISCOVER.
    Offer,
    /// To a REQUEST or an INFORM.
    Acknowledge,
    /// To a REQUEST for an address that is not the client's.
    Refuse,
}

/// An address and what comes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseTerms {
    /// The address.
    pub address: Ipv4Addr,
    /// Its network.
    pub network: Ipv4Net,
    /// Default router, where the network has one.
    pub router: Option<Ipv4Addr>,
    /// How long it may be used.
    pub duration: Duration,
}

/// The boot part of a reply.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum BootOptions {
    /// An address is all.
    #[default]
    None,
    /// A file on this server's TFTP: next server, `file`, and options 66 and 67.
    Tftp {
        /// The name to ask for; at most 127 octets.
        file: String,
    },
    /// A URL in option 67.
    Url {
        /// The URL.
        url: String,
    },
}

impl Reply {
    /// The reply to `request`, at least 300 octets long: old firmware and relays drop shorter ones.
    ///
    /// # Errors
    /// An option does not fit its field.
    pub fn encode(&self, request: &ClientPacket) -> Result<Vec<u8>, dhcproto::error::EncodeError> {
        let address = self.lease.map_or(Ipv4Addr::UNSPECIFIED, |lease| lease.address);
        let next_server = match self.boot {
            BootOptions::Tftp { .. } => self.server,
            BootOptions::None | BootOptions::Url { .. } => Ipv4Addr::UNSPECIFIED,
        };
        let client = match self.kind {
            ReplyKind::Offer | ReplyKind::Refuse => Ipv4Addr::UNSPECIFIED,
            ReplyKind::Acknowledge => request.client_address,
        };
        let chaddr = request.mac.octets();
        let mut message =
            Message::new_with_id(request.transaction, client, address, next_server, request.relay_address, &chaddr);
        message.set_opcode(Opcode::BootReply);
        message.set_flags(if request.broadcast { Flags::default().set_broadcast() } else { Flags::default() });
        self.put_options(&mut message, request);
        let mut bytes = message.to_vec()?;
        if bytes.len() < MIN_REPLY_BYTES {
            bytes.resize(MIN_REPLY_BYTES, 0);
        }
        Ok(bytes)
    }

    fn put_options(&self, message: &mut Message, request: &ClientPacket) {
        if let BootOptions::Tftp { file } = &self.boot {
            message.set_fname(file.as_bytes());
        }
        let options = message.opts_mut();
        options.insert(DhcpOption::MessageType(match self.kind {
            ReplyKind::Offer => MessageType::Offer,
            ReplyKind::Acknowledge => MessageType::Ack,
            ReplyKind::Refuse => MessageType::Nak,
        }));
        options.insert(DhcpOption::ServerIdentifier(self.server));
        if let Some(lease) = self.lease {
            let seconds = u32::try_from(lease.duration.as_secs()).unwrap_or(u32::MAX);
            options.insert(DhcpOption::AddressLeaseTime(seconds));
            options.insert(DhcpOption::SubnetMask(lease.network.netmask()));
            options.insert(DhcpOption::BroadcastAddr(lease.network.broadcast()));
            if let Some(router) = lease.router {
                options.insert(DhcpOption::Router(vec![router]));
            }
        }
        match &self.boot {
            BootOptions::None => {}
            BootOptions::Tftp { file } => {
                options.insert(DhcpOption::TFTPServerName(self.server.to_string().into_bytes()));
                options.insert(DhcpOption::BootfileName(file.clone().into_bytes()));
            }
            BootOptions::Url { url } => {
                options.insert(DhcpOption::BootfileName(url.clone().into_bytes()));
            }
        }
        if let Some(class) = self.vendor_class {
            let class: &[u8] = match class {
                VendorClass::PxeClient => b"PXEClient",
                VendorClass::HttpClient => b"HTTPClient",
            };
            options.insert(DhcpOption::ClassIdentifier(class.to_vec()));
        }
        // RFC 4578 section 2.3 wants the client's machine identifier back; RFC 3046 section 2.2 the relay's option.
        for echoed in [code::CLIENT_MACHINE, code::RELAY_AGENT_INFORMATION] {
            if let Some(value) = request.options.get(&echoed) {
                options.insert(DhcpOption::Unknown(UnknownOption::new(OptionCode::from(echoed), value.clone())));
            }
        }
    }
}

/// Where a reply to `request`, which came from `source`, goes. `None`: only a relay that nobody registered would hear
/// it, so it is not sent. The broadcast flag is not consulted: a client without address is always broadcast to, since
/// sending to an address that nobody answers ARP for needs a raw socket.
#[must_use]
pub fn destination(request: &ClientPacket, kind: ReplyKind, relays: &[Ipv4Addr]) -> Option<SocketAddrV4> {
    if !request.relay_address.is_unspecified() {
        let known = relays.contains(&request.relay_address);
        return known.then(|| SocketAddrV4::new(request.relay_address, SERVER_PORT));
    }
    let broadcast = SocketAddrV4::new(Ipv4Addr::BROADCAST, CLIENT_PORT);
    Some(match kind {
        ReplyKind::Refuse => broadcast,
        ReplyKind::Offer | ReplyKind::Acknowledge if request.client_address.is_unspecified() => broadcast,
        ReplyKind::Offer | ReplyKind::Acknowledge => SocketAddrV4::new(request.client_address, CLIENT_PORT),
    })
}

/// BOOTP's minimum (RFC 951, RFC 1542 section 2.1).
const MIN_REPLY_BYTES: usize = 300;
/// Where servers and relays listen.
pub const SERVER_PORT: u16 = 67;
/// Where clients listen.
pub const CLIENT_PORT: u16 = 68;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dhcp::packet::tests::packet;
    use dhcproto::Decodable as _;

    fn request(options: &[(u8, &[u8])]) -> ClientPacket {
        ClientPacket::decode(&packet(1, options)).unwrap()
    }

    fn offer(boot: BootOptions) -> Reply {
        let lease = LeaseTerms {
            address: Ipv4Addr::new(10, 99, 0, 50),
            network: "10.99.0.0/24".parse().unwrap(),
            router: None,
            duration: Duration::from_secs(600),
        };
        Reply {
            kind: ReplyKind::Offer,
            server: Ipv4Addr::new(10, 99, 0, 1),
            lease: Some(lease),
            boot,
            vendor_class: None,
        }
    }

    #[test]
    fn an_offer_to_firmware_says_all_it_needs_and_no_option_43() {
        let reply = offer(BootOptions::Tftp { file: "snponly.efi".into() });
        let bytes = reply.encode(&request(&[(97, &[0; 17]), (82, &[1, 2, 3, 4])])).unwrap();
        assert!(bytes.len() >= 300);
        let seen = Message::from_bytes(&bytes).unwrap();
        assert_eq!(seen.yiaddr(), Ipv4Addr::new(10, 99, 0, 50));
        assert_eq!(seen.siaddr(), Ipv4Addr::new(10, 99, 0, 1));
        assert_eq!(seen.fname(), Some(b"snponly.efi\0".as_slice()));
        assert_eq!(seen.xid(), 0xdead_beef);
        let options = seen.opts();
        assert_eq!(options.get(OptionCode::BootfileName), Some(&DhcpOption::BootfileName(b"snponly.efi".to_vec())));
        assert!(options.get(OptionCode::VendorExtensions).is_none());
        assert!(options.get(OptionCode::ClientMachineIdentifier).is_some());
        assert!(options.get(OptionCode::RelayAgentInformation).is_some());
    }

    #[test]
    fn a_url_longer_than_the_header_field_goes_in_option_67() {
        let url = format!("http://10.99.0.1/boot/{}/settings.json?{}", "0".repeat(32), "x".repeat(150));
        let mut reply = offer(BootOptions::Url { url: url.clone() });
        reply.vendor_class = Some(VendorClass::HttpClient);
        let bytes = reply.encode(&request(&[])).unwrap();
        let seen = Message::from_bytes(&bytes).unwrap();
        assert_eq!(seen.opts().get(OptionCode::BootfileName), Some(&DhcpOption::BootfileName(url.into_bytes())));
        assert_eq!(
            seen.opts().get(OptionCode::ClassIdentifier),
            Some(&DhcpOption::ClassIdentifier(b"HTTPClient".to_vec()))
        );
    }

    #[test]
    fn row_7_and_9_replies_go_to_port_67_only_by_a_registered_relay() {
        let mut asked = request(&[]);
        let broadcast = SocketAddrV4::new(Ipv4Addr::BROADCAST, 68);
        assert_eq!(destination(&asked, ReplyKind::Offer, &[]), Some(broadcast));
        asked.client_address = Ipv4Addr::new(10, 99, 0, 50);
        assert_eq!(destination(&asked, ReplyKind::Acknowledge, &[]).unwrap().to_string(), "10.99.0.50:68");
        assert_eq!(destination(&asked, ReplyKind::Refuse, &[]), Some(broadcast));
        asked.relay_address = Ipv4Addr::new(10, 50, 0, 1);
        assert_eq!(destination(&asked, ReplyKind::Offer, &[]), None);
        let relays = [Ipv4Addr::new(10, 50, 0, 1)];
        assert_eq!(destination(&asked, ReplyKind::Offer, &relays).unwrap().to_string(), "10.50.0.1:67");
    }
}
