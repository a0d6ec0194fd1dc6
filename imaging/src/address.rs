//! Which address a node gets on its provisioning network. Pure.

use assay_wire::imaging::Gateway;
use ipnet::Ipv4Net;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// The first host number that is a node's.
const FIRST_HOST: u32 = 50;

/// The lowest address of the gateway's subnet that is neither taken nor the gateway's or the router's own.
pub(crate) fn pick(gateway: &Gateway, taken: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Net> {
    let own = [Some(*gateway.portal.ip()), Some(*gateway.relay.ip()), gateway.router];
    let free = |address: &Ipv4Addr| !taken.contains(address) && !own.contains(&Some(*address));
    let address = hosts(gateway.subnet).find(free)?;
    Ipv4Net::new(address, gateway.subnet.prefix_len()).ok()
}

/// Addresses that nodes may get at all.
pub(crate) fn hosts(subnet: Ipv4Net) -> impl Iterator<Item = Ipv4Addr> {
    let (network, broadcast) = (u32::from(subnet.network()), u32::from(subnet.broadcast()));
    (network.saturating_add(FIRST_HOST)..broadcast).map(Ipv4Addr::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use assay_wire::imaging::ChapAlgorithms;

    fn gateway(subnet: &str) -> Gateway {
        Gateway {
            project: "p1".parse().unwrap(),
            control_socket: "/run/gateway.sock".into(),
            portal: "10.20.0.50:3260".parse().unwrap(),
            relay: "10.20.0.50:8443".parse().unwrap(),
            subnet: subnet.parse().unwrap(),
            router: Some("10.20.0.51".parse().unwrap()),
            chap: ChapAlgorithms::Any,
        }
    }

    #[test]
    fn the_lowest_free_address_that_is_nobody_elses() {
        let mut taken = BTreeSet::new();
        for expected in ["10.20.0.52/24", "10.20.0.53/24"] {
            let picked = pick(&gateway("10.20.0.0/24"), &taken).unwrap();
            assert_eq!(picked.to_string(), expected);
            taken.insert(picked.addr());
        }
    }

    #[test]
    fn a_subnet_without_room_gives_none() {
        assert_eq!(pick(&gateway("10.20.0.0/27"), &BTreeSet::new()), None);
        let all = hosts("10.20.0.0/26".parse().unwrap()).collect();
        assert_eq!(pick(&gateway("10.20.0.0/26"), &all), None);
        assert!(all.contains(&"10.20.0.62".parse().unwrap()) && !all.contains(&"10.20.0.63".parse().unwrap()));
    }
}
