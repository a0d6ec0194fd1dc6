//! The DHCP server of one network, without socket or clock: a datagram and `now` go in, what to do comes out.

use super::client::ClientKind;
use super::lease::{AddressLease, LeaseTable, Scope};
use super::packet::{ClientMessage, ClientPacket, DecodeError, code};
use super::rate::RateLimit;
use super::reply::{BootOptions, Reply, ReplyKind, VendorClass, destination};
use crate::boot_plan::NotServed;
use assay_wire::net::MacAddr;
use std::net::{Ipv4Addr, SocketAddrV4};

/// Who is served, and with what. The boot services answer from isolation's records, a gateway from its admissions.
pub trait Authority: Send + Sync + 'static {
    /// Whether `client` on the NIC `mac` is served at all.
    ///
    /// # Errors
    /// Why not: the client gets no answer, the log an entry.
    fn admit(&self, mac: MacAddr, client: ClientKind) -> Result<Admitted, NotServed>;

    /// What it boots, once it is known which address it has. Called only after [`Self::admit`] said yes.
    fn boot(&self, now_ms: i64, mac: MacAddr, client: ClientKind, address: Ipv4Addr) -> BootOptions;
}

/// A client that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// The one address it may have; none: any of the pool.
    pub reserved: Option<Ipv4Addr>,
}

/// Which of the server's two ports a datagram came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// 67: addresses and boot options.
    Dhcp,
    /// 4011: boot options only, for ROMs that ask a boot server after they have an address (PXE 2.1 section 2.2.3).
    BootServer,
}

/// What to do with a datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// No answer.
    Silence(Silence),
    /// Record this lease, which has ended.
    Ended(AddressLease),
    /// Record `lease` if there is one; then, if that worked, send.
    Answer(Box<Answer>),
}

/// A reply to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The packet.
    pub reply: Vec<u8>,
    /// Where it goes.
    pub destination: SocketAddrV4,
    /// What must be on record before it leaves.
    pub lease: Option<AddressLease>,
    /// OFFER, ACK or NAK.
    pub kind: ReplyKind,
    /// Who is answered.
    pub mac: MacAddr,
    /// What it is.
    pub client: ClientKind,
    /// The address offered or leased.
    pub address: Option<Ipv4Addr>,
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// Not a packet of a client.
    Malformed(DecodeError),
    /// The client sends too much.
    RateLimited,
    /// The client is not served.
    NotServed {
        /// Who.
        mac: MacAddr,
        /// What it is.
        client: ClientKind,
        /// Why not.
        why: NotServed,
    },
    /// It came through a relay that is not registered.
    UnknownRelay(Ipv4Addr),
    /// It talks to another server.
    OtherServer,
    /// It asks for nothing that can be answered.
    NothingAsked,
    /// Every address is held.
    NoAddress(MacAddr),
    /// It speaks of an address that is another's.
    NotHolder,
    /// The reply does not fit: a fault of ours.
    Unencodable,
}

/// The server of one network.
#[derive(Debug)]
pub struct Engine {
    table: LeaseTable,
    relays: Vec<Ipv4Addr>,
    rate: RateLimit,
}

impl Engine {
    /// A server for `scope` that also answers the relays at `relays`.
    #[must_use]
    pub fn new(scope: Scope, relays: Vec<Ipv4Addr>) -> Self {
        let rate = RateLimit::new(PACKETS_AT_ONCE, REFILL_MS, RATE_TABLE_CLIENTS);
        Self { table: LeaseTable::new(scope), relays, rate }
    }

    /// Takes back a recorded lease.
    pub fn restore(&mut self, lease: AddressLease) {
        if self.table.scope().network.contains(&lease.address) {
            self.table.restore(lease);
        }
    }

    /// Who holds `address`.
    #[must_use]
    pub fn holder(&self, now_ms: i64, address: Ipv4Addr) -> Option<MacAddr> {
        self.table.holder(now_ms, address)
    }

    /// Decides about one datagram.
    pub fn handle(
        &mut self,
        now_ms: i64,
        service: Service,
        source: SocketAddrV4,
        datagram: &[u8],
        authority: &dyn Authority,
    ) -> Decision {
        match self.decide(now_ms, service, source, datagram, authority) {
            Ok(decision) => decision,
            Err(silence) => Decision::Silence(silence),
        }
    }

    fn decide(
        &mut self,
        now_ms: i64,
        service: Service,
        source: SocketAddrV4,
        datagram: &[u8],
        authority: &dyn Authority,
    ) -> Result<Decision, Silence> {
        let packet = ClientPacket::decode(datagram).map_err(Silence::Malformed)?;
        if !self.rate.allow(now_ms, packet.mac) {
            return Err(Silence::RateLimited);
        }
        if !packet.relay_address.is_unspecified() && !self.relays.contains(&packet.relay_address) {
            return Err(Silence::UnknownRelay(packet.relay_address));
        }
        let (mac, client) = (packet.mac, ClientKind::of(&packet));
        if packet.message == ClientMessage::Decline || packet.message == ClientMessage::Release {
            return self.end(now_ms, &packet);
        }
        let admitted = authority.admit(mac, client).map_err(|why| Silence::NotServed { mac, client, why })?;
        let asked = Asked { now_ms, packet: &packet, client, reserved: admitted.reserved, authority };
        match service {
            Service::BootServer => self.boot_server(&asked, source),
            Service::Dhcp => match packet.message {
                ClientMessage::Discover => self.discover(&asked),
                ClientMessage::Request => self.request(&asked),
                ClientMessage::Inform => self.inform(&asked),
                ClientMessage::Decline | ClientMessage::Release => Err(Silence::NothingAsked),
            },
        }
    }

    fn discover(&mut self, asked: &Asked<'_>) -> Result<Decision, Silence> {
        let mac = asked.packet.mac;
        let address = self.table.offer(asked.now_ms, mac, asked.reserved).ok_or(Silence::NoAddress(mac))?;
        self.answer(asked, ReplyKind::Offer, Some(address), None)
    }

    /// RFC 2131 section 4.3.2: selecting (54 is ours), rebooting (50 only), renewing (ciaddr).
    fn request(&mut self, asked: &Asked<'_>) -> Result<Decision, Silence> {
        let packet = asked.packet;
        let server = packet.address_option(code::SERVER_IDENTIFIER);
        if server.is_some_and(|server| server != self.table.scope().server) {
            return Err(Silence::OtherServer);
        }
        let in_use = Some(packet.client_address).filter(|address| !address.is_unspecified());
        let wanted = packet.address_option(code::REQUESTED_ADDRESS).or(in_use).ok_or(Silence::NothingAsked)?;
        match self.table.lease(asked.now_ms, packet.mac, wanted, asked.reserved) {
            Ok(lease) => self.answer(asked, ReplyKind::Acknowledge, Some(wanted), Some(lease)),
            Err(_not_yours) => self.answer(asked, ReplyKind::Refuse, None, None),
        }
    }

    fn inform(&self, asked: &Asked<'_>) -> Result<Decision, Silence> {
        self.check_holder(asked)?;
        self.answer(asked, ReplyKind::Acknowledge, None, None)
    }

    /// Port 4011: the client has its address, and is answered where it asked from.
    fn boot_server(&self, asked: &Asked<'_>, source: SocketAddrV4) -> Result<Decision, Silence> {
        self.check_holder(asked)?;
        match self.answer(asked, ReplyKind::Acknowledge, None, None)? {
            Decision::Answer(answer) => Ok(Decision::Answer(Box::new(Answer { destination: source, ..*answer }))),
            other @ (Decision::Silence(_) | Decision::Ended(_)) => Ok(other),
        }
    }

    fn end(&mut self, now_ms: i64, packet: &ClientPacket) -> Result<Decision, Silence> {
        let ended = if packet.message == ClientMessage::Decline {
            let address = packet.address_option(code::REQUESTED_ADDRESS).ok_or(Silence::NothingAsked)?;
            self.table.decline(now_ms, packet.mac, address)
        } else {
            self.table.release(now_ms, packet.mac, packet.client_address)
        };
        ended.map(Decision::Ended).ok_or(Silence::NotHolder)
    }

    fn check_holder(&self, asked: &Asked<'_>) -> Result<(), Silence> {
        let holder = self.table.holder(asked.now_ms, asked.packet.client_address);
        if holder == Some(asked.packet.mac) { Ok(()) } else { Err(Silence::NotHolder) }
    }

    /// `address`: what the reply gives; without it the reply speaks of the address that the client already has.
    fn answer(
        &self,
        asked: &Asked<'_>,
        kind: ReplyKind,
        address: Option<Ipv4Addr>,
        lease: Option<AddressLease>,
    ) -> Result<Decision, Silence> {
        let Asked { now_ms, packet, client, authority, .. } = *asked;
        let boot = match kind {
            ReplyKind::Offer | ReplyKind::Acknowledge => {
                authority.boot(now_ms, packet.mac, client, address.unwrap_or(packet.client_address))
            }
            ReplyKind::Refuse => BootOptions::None,
        };
        let vendor_class = match client {
            ClientKind::UefiHttp => Some(VendorClass::HttpClient),
            ClientKind::UefiPxe | ClientKind::Ipxe if address.is_none() => Some(VendorClass::PxeClient),
            ClientKind::UefiPxe | ClientKind::Ipxe | ClientKind::Agent | ClientKind::Other => None,
        };
        let terms = address.map(|address| self.table.terms(address));
        let reply = Reply { kind, server: self.table.scope().server, lease: terms, boot, vendor_class };
        let destination = destination(packet, kind, &self.relays).ok_or(Silence::UnknownRelay(packet.relay_address))?;
        let reply = reply.encode(packet).map_err(|_too_long| Silence::Unencodable)?;
        let mac = packet.mac;
        Ok(Decision::Answer(Box::new(Answer { reply, destination, lease, kind, mac, client, address })))
    }
}

struct Asked<'a> {
    now_ms: i64,
    packet: &'a ClientPacket,
    client: ClientKind,
    reserved: Option<Ipv4Addr>,
    authority: &'a dyn Authority,
}

/// A client boots with a handful of packets; firmware, iPXE and agent together stay well below this.
const PACKETS_AT_ONCE: u32 = 20;
const REFILL_MS: i64 = 500;
const RATE_TABLE_CLIENTS: usize = 4096;

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
