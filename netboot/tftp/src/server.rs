//! Which requests become transfers: the listening port's rules and limits, without socket or clock.

use crate::options::{Negotiated, OptionLimits};
use crate::packet::{ClientPacket, ErrorCode, ReadRequest, encode_error};
use crate::transfer::{Outcome, Transfer};
use bytes::Bytes;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// What there is to read. Called on the listening task: answer from memory.
pub trait Files: Send + Sync + 'static {
    /// The content that `peer` may read under `name`, if there is any. `name` is 1 to 255 printable ASCII characters
    /// without `\`, `%` or `..`, a single leading `/` removed; compare it whole, never make a path of it.
    fn open(&self, peer: IpAddr, name: &str) -> Option<Bytes>;

    /// A transfer has ended.
    fn ended(&self, report: &Report);
}

/// One ended transfer, for logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Who read.
    pub peer: SocketAddr,
    /// What it asked for, checked as [`Files::open`] says.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// From request to end.
    pub elapsed: Duration,
}

/// Bounds on what all clients together can make the server hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Transfers at a time, each with one socket.
    pub transfers: usize,
    /// Transfers at a time for one peer address.
    pub transfers_per_address: usize,
    /// What is granted to one transfer.
    pub options: OptionLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self { transfers: 256, transfers_per_address: 4, options: OptionLimits::default() }
    }
}

/// Names a transfer within its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TransferId(u64);

/// What to do with a datagram on the listening port.
#[derive(Debug)]
pub enum Decision {
    /// Nothing: no answer, no memory, no log line of its own.
    Silence(Silence),
    /// Send this, once, from the listening port.
    Refuse(Vec<u8>),
    /// Run this transfer on a socket of its own.
    Start(Box<Started>),
}

/// A transfer to run.
#[derive(Debug)]
pub struct Started {
    /// Its id.
    pub id: TransferId,
    /// Its name, for the report.
    pub name: String,
    /// The transfer.
    pub transfer: Transfer,
    /// An earlier transfer of the same peer and port that this request shows to be over.
    pub replaces: Option<TransferId>,
}

/// Why a datagram is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// From an address or a port that no client has; answering could start a loop between servers.
    Source,
    /// Not a request.
    NotARequest,
    /// The same request again: its transfer will repeat its first packet by itself.
    Duplicate,
    /// The server has as many transfers as it may.
    Full,
    /// This address has as many transfers as it may.
    FullForAddress,
}

/// The listening port's state: who is reading.
#[derive(Debug)]
pub struct Server {
    limits: Limits,
    next_id: u64,
    transfers: HashMap<SocketAddr, Entry>,
    per_address: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Entry {
    id: TransferId,
    request: Vec<u8>,
}

impl Server {
    /// A server that nobody reads from.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, next_id: 0, transfers: HashMap::new(), per_address: HashMap::new() }
    }

    /// A datagram came from `peer` to the address `local` of ours.
    pub fn handle_packet(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        local: IpAddr,
        datagram: &[u8],
        files: &dyn Files,
    ) -> Decision {
        if !plausible_client(peer, local) {
            return Decision::Silence(Silence::Source);
        }
        match ClientPacket::decode(datagram) {
            Ok(ClientPacket::ReadRequest(request)) => self.handle_request(now, peer, datagram, &request, files),
            Ok(ClientPacket::WriteRequest) => Decision::Refuse(encode_error(ErrorCode::AccessViolation)),
            Ok(ClientPacket::Acknowledgement(_) | ClientPacket::Error(_)) | Err(_) => {
                Decision::Silence(Silence::NotARequest)
            }
        }
    }

    /// A transfer has ended: its place is free.
    pub fn ended(&mut self, id: TransferId) {
        let peers: Vec<_> = self.transfers.iter().filter(|(_, entry)| entry.id == id).map(|(peer, _)| *peer).collect();
        for peer in peers {
            self.forget(peer);
        }
    }

    /// How many transfers there are.
    #[must_use]
    pub fn transfers(&self) -> usize {
        self.transfers.len()
    }

    fn handle_request(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        datagram: &[u8],
        request: &ReadRequest<'_>,
        files: &dyn Files,
    ) -> Decision {
        let replaces = match self.transfers.get(&peer) {
            Some(entry) if entry.request == datagram => return Decision::Silence(Silence::Duplicate),
            // A different request from the same port: the client is done with the last one. OVMF asks for the size,
            // then for the file, and its ERROR to the first may not have been seen yet.
            Some(entry) => Some(entry.id),
            None => None,
        };
        let content = checked_name(request).and_then(|name| Some((name, files.open(peer.ip(), name)?)));
        let Some((name, content)) = content else {
            return Decision::Refuse(encode_error(ErrorCode::NotFound));
        };
        if replaces.is_some() {
            self.forget(peer);
        }
        // Beyond a limit the newest is dropped and what runs keeps running.
        if self.transfers.len() >= self.limits.transfers {
            return Decision::Silence(Silence::Full);
        }
        let of_address = self.per_address.entry(peer.ip()).or_default();
        if *of_address >= self.limits.transfers_per_address {
            return Decision::Silence(Silence::FullForAddress);
        }
        *of_address += 1;
        let id = TransferId(self.next_id);
        self.next_id += 1;
        self.transfers.insert(peer, Entry { id, request: datagram.to_vec() });
        let negotiated = Negotiated::of(request, content.len() as u64, &self.limits.options);
        let transfer = Transfer::start(now, content, negotiated);
        Decision::Start(Box::new(Started { id, name: name.to_owned(), transfer, replaces }))
    }

    fn forget(&mut self, peer: SocketAddr) {
        if self.transfers.remove(&peer).is_none() {
            return;
        }
        if let Some(count) = self.per_address.get_mut(&peer.ip()) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.per_address.remove(&peer.ip());
            }
        }
    }
}

/// Whether a client can have this address and port. Servers' ports are excluded because a forged datagram from one
/// server to another must not become a conversation.
fn plausible_client(peer: SocketAddr, local: IpAddr) -> bool {
    let address_ok = match peer.ip() {
        IpAddr::V4(ip) => !ip.is_broadcast() && !ip.is_multicast() && !ip.is_unspecified(),
        IpAddr::V6(ip) => !ip.is_multicast() && !ip.is_unspecified(),
    };
    // Nobody boots from a server it has to shout for, and a reply could not come from the address asked.
    let to_us = match local {
        IpAddr::V4(ip) => !ip.is_broadcast() && !ip.is_multicast(),
        IpAddr::V6(ip) => !ip.is_multicast(),
    };
    let port_ok = !SERVER_PORTS.contains(&peer.port());
    // Our own address is only plausible on loopback, where tests and local tools are.
    let own = peer.ip() == local && !local.is_loopback();
    address_ok && to_us && port_ok && !own
}

/// The name, if it is one that could be lent.
fn checked_name<'a>(request: &ReadRequest<'a>) -> Option<&'a str> {
    let name = std::str::from_utf8(request.name).ok()?;
    let name = name.strip_prefix('/').unwrap_or(name);
    let printable = name.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'\\' | b'%'));
    let sensible = (1..=255).contains(&name.len()) && printable && !name.contains("..") && !name.starts_with('/');
    (request.octet && sensible).then_some(name)
}

const SERVER_PORTS: [u16; 5] = [0, 67, 68, 69, 4011];

#[cfg(test)]
mod tests {
    use super::*;

    struct OneFile;

    impl Files for OneFile {
        fn open(&self, _peer: IpAddr, name: &str) -> Option<Bytes> {
            (name == "snponly.efi").then(|| Bytes::from_static(&[7; 2000]))
        }

        fn ended(&self, _report: &Report) {}
    }

    const LOCAL: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    fn peer(host: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, host], port))
    }

    fn rrq(name: &str, mode: &str) -> Vec<u8> {
        format!("\0\u{1}{name}\0{mode}\0").into_bytes()
    }

    fn ask(server: &mut Server, peer: SocketAddr, datagram: &[u8]) -> Decision {
        server.handle_packet(Instant::now(), peer, LOCAL, datagram, &OneFile)
    }

    fn is_start(decision: &Decision) -> bool {
        matches!(decision, Decision::Start(_))
    }

    #[test]
    fn row_1_only_requests_from_plausible_clients_are_answered() {
        let mut server = Server::new(Limits::default());
        let request = rrq("snponly.efi", "octet");
        for port in SERVER_PORTS {
            let decision = ask(&mut server, peer(2, port), &request);
            assert!(matches!(decision, Decision::Silence(Silence::Source)), "port {port} was answered");
        }
        for address in ["255.255.255.255:2000", "224.0.0.1:2000", "0.0.0.0:2000", "10.0.0.1:2000"] {
            let decision = ask(&mut server, address.parse().unwrap(), &request);
            assert!(matches!(decision, Decision::Silence(Silence::Source)), "{address} was answered");
        }
        for datagram in [
            b"\0\x05\0\0x\0".as_slice(),
            b"\0\x04\0\x01",
            b"\0\x03\0\x01x",
            b"\0\x06a\x001\0",
            b"\0\x09",
            b"",
            b"\0\x01",
        ] {
            let decision = ask(&mut server, peer(2, 2000), datagram);
            assert!(matches!(decision, Decision::Silence(Silence::NotARequest)), "{datagram:?} was answered");
        }
        assert_eq!(server.transfers(), 0);
        assert!(is_start(&ask(&mut server, peer(2, 2000), &request)));
    }

    #[test]
    fn row_5_what_is_not_lent_gets_one_constant_answer() {
        let mut server = Server::new(Limits::default());
        let long = "a".repeat(256);
        let names = [
            "../snponly.efi",
            "..\\snponly.efi",
            "%2e%2e/snponly.efi",
            "//snponly.efi",
            "",
            "/",
            "snponly.efi ",
            "etc/passwd",
            &long,
            "snpönly.efi",
        ];
        let mut answers = Vec::new();
        for name in names {
            match ask(&mut server, peer(2, 2000), &rrq(name, "octet")) {
                Decision::Refuse(answer) => answers.push(answer),
                other => panic!("{name:?}: {other:?}"),
            }
        }
        for mode in ["netascii", "mail", ""] {
            match ask(&mut server, peer(2, 2000), &rrq("snponly.efi", mode)) {
                Decision::Refuse(answer) => answers.push(answer),
                other => panic!("{mode:?}: {other:?}"),
            }
        }
        assert!(answers.iter().all(|answer| answer == b"\0\x05\0\x01not available\0"));
        match ask(&mut server, peer(2, 2000), b"\0\x02snponly.efi\0octet\0") {
            Decision::Refuse(answer) => assert_eq!(answer, b"\0\x05\0\x02not available\0"),
            other => panic!("WRQ: {other:?}"),
        }
        assert_eq!(server.transfers(), 0);
        assert!(is_start(&ask(&mut server, peer(2, 2000), &rrq("/snponly.efi", "OCTET"))));
    }

    #[test]
    fn row_4_beyond_a_limit_the_newest_is_dropped() {
        let mut server = Server::new(Limits { transfers: 6, ..Limits::default() });
        let request = rrq("snponly.efi", "octet");
        for port in 2000..2004 {
            assert!(is_start(&ask(&mut server, peer(2, port), &request)));
        }
        let fifth = ask(&mut server, peer(2, 2004), &request);
        assert!(matches!(fifth, Decision::Silence(Silence::FullForAddress)));
        assert!(is_start(&ask(&mut server, peer(3, 2000), &request)));
        assert!(is_start(&ask(&mut server, peer(4, 2000), &request)));
        assert!(matches!(ask(&mut server, peer(5, 2000), &request), Decision::Silence(Silence::Full)));
        assert_eq!(server.transfers(), 6);
        server.ended(TransferId(0));
        assert!(is_start(&ask(&mut server, peer(5, 2000), &request)));
    }

    #[test]
    fn a_repeated_request_is_one_and_a_different_one_replaces_it() {
        let mut server = Server::new(Limits::default());
        let size = b"\0\x01snponly.efi\0octet\0tsize\x000\0".as_slice();
        let file = b"\0\x01snponly.efi\0octet\0blksize\x001468\0".as_slice();
        let Decision::Start(first) = ask(&mut server, peer(2, 2000), size) else { panic!("refused") };
        assert!(matches!(ask(&mut server, peer(2, 2000), size), Decision::Silence(Silence::Duplicate)));
        let Decision::Start(second) = ask(&mut server, peer(2, 2000), file) else { panic!("refused") };
        assert_eq!(second.replaces, Some(first.id));
        server.ended(first.id);
        assert_eq!(server.transfers(), 1, "the end of the replaced transfer is not the end of its successor");
    }
}
