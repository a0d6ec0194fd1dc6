//! The engine under a clock wound by hand, asked by packets as clients build them, answered to `dhcproto` as the
//! client that reads the replies.

use super::*;
use crate::dhcp::packet::tests::packet;
use dhcproto::Decodable as _;
use dhcproto::v4::{DhcpOption, Message, MessageType, OptionCode};
use proptest::prelude::*;
use std::time::Duration;

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const ANYBODY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68);
const PXE: &[(u8, &[u8])] = &[(60, b"PXEClient:Arch:00007:UNDI:003000"), (93, &[0, 7])];

/// Serves the NICs 52:54:00:00:00:01 and :02 and nobody else.
struct TwoNodes;

impl Authority for TwoNodes {
    fn admit(&self, mac: MacAddr, _client: ClientKind) -> Result<Admitted, NotServed> {
        match mac.octets() {
            [0x52, 0x54, 0, 0, 0, 1 | 2] => Ok(Admitted { reserved: None }),
            _ => Err(NotServed::UnknownMac),
        }
    }

    fn boot(&self, _now_ms: i64, _mac: MacAddr, client: ClientKind, address: Ipv4Addr) -> BootOptions {
        match client {
            ClientKind::UefiPxe => BootOptions::Tftp { file: "snponly.efi".into() },
            ClientKind::UefiHttp | ClientKind::Ipxe | ClientKind::Agent => {
                BootOptions::Url { url: format!("http://{SERVER}/{address}") }
            }
            ClientKind::Other => BootOptions::None,
        }
    }
}

fn engine() -> Engine {
    let scope = Scope {
        network: "10.99.0.0/24".parse().unwrap(),
        server: SERVER,
        router: None,
        pool: Some((Ipv4Addr::new(10, 99, 0, 50), Ipv4Addr::new(10, 99, 0, 51))),
        lease_duration: Duration::from_secs(600),
    };
    Engine::new(scope, Vec::new())
}

/// A packet of the NIC whose last octet is `nic`.
fn from_nic(nic: u8, message: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
    let mut bytes = packet(message, options);
    bytes[33] = nic;
    bytes
}

fn handle(engine: &mut Engine, now_ms: i64, datagram: &[u8]) -> Decision {
    engine.handle(now_ms, Service::Dhcp, ANYBODY, datagram, &TwoNodes)
}

fn answer(decision: Decision) -> (Answer, Message) {
    match decision {
        Decision::Answer(answer) => {
            let message = Message::from_bytes(&answer.reply).unwrap();
            (*answer, message)
        }
        other => panic!("no answer: {other:?}"),
    }
}

fn silence(decision: Decision) -> Silence {
    match decision {
        Decision::Silence(silence) => silence,
        other => panic!("not silent: {other:?}"),
    }
}

#[test]
fn firmware_gets_its_address_and_its_loader() {
    let mut engine = engine();
    let (offered, offer) = answer(handle(&mut engine, 0, &from_nic(1, 1, PXE)));
    assert_eq!(offer.opts().msg_type(), Some(MessageType::Offer));
    assert_eq!(offered.lease, None, "an offer is not recorded");
    assert_eq!(offered.destination.to_string(), "255.255.255.255:68");
    assert_eq!(offer.fname(), Some(b"snponly.efi\0".as_slice()));
    let address = offer.yiaddr();
    let mut options = PXE.to_vec();
    let (wanted, server) = (address.octets(), SERVER.octets());
    options.extend([(50, wanted.as_slice()), (54, server.as_slice())]);
    let (acknowledged, ack) = answer(handle(&mut engine, 10, &from_nic(1, 3, &options)));
    assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
    assert_eq!(ack.yiaddr(), address);
    assert_eq!(acknowledged.lease.unwrap().until_ms, 600_010);
    assert_eq!(engine.holder(600_009, address).unwrap().to_string(), "52:54:00:00:00:01");
    assert_eq!(engine.holder(600_010, address), None);
}

#[test]
fn the_same_node_keeps_its_address_through_firmware_ipxe_and_agent() {
    let mut engine = engine();
    let mut addresses = Vec::new();
    for options in [PXE, &[PXE[0], PXE[1], (77, b"iPXE")], &[(60, b"AssayAgent")]] {
        let (_, offer) = answer(handle(&mut engine, 0, &from_nic(1, 1, options)));
        addresses.push(offer.yiaddr());
    }
    addresses.dedup();
    assert_eq!(addresses, [Ipv4Addr::new(10, 99, 0, 50)]);
}

#[test]
fn row_8_unknown_machines_get_silence_and_drain_nothing() {
    let mut engine = engine();
    for nic in 3..=255 {
        let why = silence(handle(&mut engine, 0, &from_nic(nic, 1, PXE)));
        assert!(matches!(why, Silence::NotServed { why: NotServed::UnknownMac, .. }), "{why:?}");
        let wanted: &[(u8, &[u8])] = &[(50, &[10, 99, 0, 50])];
        assert!(matches!(silence(handle(&mut engine, 0, &from_nic(nic, 3, wanted))), Silence::NotServed { .. }));
    }
    assert!(matches!(handle(&mut engine, 0, &from_nic(1, 1, PXE)), Decision::Answer(_)));
    assert!(matches!(handle(&mut engine, 0, &from_nic(2, 1, PXE)), Decision::Answer(_)));
}

#[test]
fn row_8_a_client_that_floods_is_not_heard() {
    let mut engine = engine();
    let answered = (0..1000).filter(|_| matches!(handle(&mut engine, 0, &from_nic(1, 1, PXE)), Decision::Answer(_)));
    assert_eq!(answered.count(), 20);
    assert_eq!(silence(handle(&mut engine, 0, &from_nic(1, 1, PXE))), Silence::RateLimited);
    assert!(matches!(handle(&mut engine, 0, &from_nic(2, 1, PXE)), Decision::Answer(_)), "the other is");
}

#[test]
fn a_request_to_another_server_is_not_ours_and_a_wrong_address_is_refused() {
    let mut engine = engine();
    let other: &[(u8, &[u8])] = &[(50, &[10, 99, 0, 50]), (54, &[10, 99, 0, 2])];
    assert_eq!(silence(handle(&mut engine, 0, &from_nic(1, 3, other))), Silence::OtherServer);
    assert_eq!(silence(handle(&mut engine, 0, &from_nic(1, 3, &[]))), Silence::NothingAsked);
    let wrong: &[(u8, &[u8])] = &[(50, &[192, 168, 0, 50])];
    let (refused, nak) = answer(handle(&mut engine, 0, &from_nic(1, 3, wrong)));
    assert_eq!(nak.opts().msg_type(), Some(MessageType::Nak));
    assert_eq!((refused.lease, refused.address), (None, None));
    assert!(nak.opts().get(OptionCode::BootfileName).is_none());
}

#[test]
fn row_8_release_and_decline_are_heard_from_the_holder_only() {
    let mut engine = engine();
    let wanted: &[(u8, &[u8])] = &[(50, &[10, 99, 0, 50])];
    answer(handle(&mut engine, 0, &from_nic(1, 3, wanted)));
    assert_eq!(silence(handle(&mut engine, 1, &from_nic(2, 4, wanted))), Silence::NotHolder);
    let mut release = from_nic(2, 7, &[]);
    release[12..16].copy_from_slice(&[10, 99, 0, 50]);
    assert_eq!(silence(handle(&mut engine, 1, &release)), Silence::NotHolder);
    release[33] = 1;
    assert!(matches!(handle(&mut engine, 2, &release), Decision::Ended(lease) if lease.until_ms == 2));
    assert_eq!(engine.holder(2, Ipv4Addr::new(10, 99, 0, 50)), None);
}

#[test]
fn row_9_a_relay_that_is_not_registered_gets_silence() {
    let mut relayed = from_nic(1, 1, PXE);
    relayed[24..28].copy_from_slice(&[10, 50, 0, 1]);
    let relay = Ipv4Addr::new(10, 50, 0, 1);
    assert_eq!(silence(handle(&mut engine(), 0, &relayed)), Silence::UnknownRelay(relay));
    let mut engine = engine();
    engine.relays.push(relay);
    assert_eq!(answer(handle(&mut engine, 0, &relayed)).0.destination.to_string(), "10.50.0.1:67");
}

#[test]
fn the_boot_server_answers_the_holder_of_an_address_where_it_asked_from() {
    let mut engine = engine();
    let source = "10.99.0.50:4011".parse().unwrap();
    let mut asked = from_nic(1, 3, PXE);
    asked[12..16].copy_from_slice(&[10, 99, 0, 50]);
    let ask = |engine: &mut Engine| engine.handle(5, Service::BootServer, source, &asked, &TwoNodes);
    assert_eq!(silence(ask(&mut engine)), Silence::NotHolder);
    let wanted: &[(u8, &[u8])] = &[(50, &[10, 99, 0, 50])];
    answer(handle(&mut engine, 0, &from_nic(1, 3, wanted)));
    let (answered, ack) = answer(ask(&mut engine));
    assert_eq!(answered.destination, source);
    assert_eq!(ack.yiaddr(), Ipv4Addr::UNSPECIFIED);
    assert_eq!(ack.fname(), Some(b"snponly.efi\0".as_slice()));
    let class = DhcpOption::ClassIdentifier(b"PXEClient".to_vec());
    assert_eq!(ack.opts().get(OptionCode::ClassIdentifier), Some(&class));
}

#[test]
fn a_restored_lease_is_kept_for_its_holder() {
    let mut engine = engine();
    let address = Ipv4Addr::new(10, 99, 0, 50);
    engine.restore(AddressLease { address, mac: "52:54:00:00:00:02".parse().unwrap(), until_ms: 1000 });
    engine.restore(AddressLease { address: SERVER, mac: "52:54:00:00:00:09".parse().unwrap(), until_ms: 1000 });
    let (_, offer) = answer(handle(&mut engine, 0, &from_nic(1, 1, PXE)));
    assert_ne!(offer.yiaddr(), address);
    let (_, offer) = answer(handle(&mut engine, 0, &from_nic(2, 1, PXE)));
    assert_eq!(offer.yiaddr(), address);
}

proptest! {
    #[test]
    fn row_7_no_datagram_panics_the_engine(
        message in 0_u8..10,
        nic in 0_u8..4,
        header in proptest::collection::vec(any::<u8>(), 16),
        tail in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut bytes = from_nic(nic, message, &[]);
        bytes[12..28].copy_from_slice(&header);
        bytes.pop();
        bytes.extend_from_slice(&tail);
        for service in [Service::Dhcp, Service::BootServer] {
            if let Decision::Answer(answer) = engine().handle(0, service, ANYBODY, &bytes, &TwoNodes) {
                prop_assert!((300..=1500).contains(&answer.reply.len()));
            }
        }
    }
}
