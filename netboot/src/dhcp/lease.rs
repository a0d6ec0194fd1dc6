//! Address leases of one network: who holds which address until when. Pure: `now` goes in.
//!
//! Only nodes that the boot plan serves ever get here, so unknown machines cannot drain the pool; whatever the
//! network sends, the table holds no more than the pool and the reservations have addresses.

use super::reply::LeaseTerms;
use assay_wire::net::MacAddr;
use ipnet::Ipv4Net;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

/// One network's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The network.
    pub network: Ipv4Net,
    /// This server's address in it.
    pub server: Ipv4Addr,
    /// Default router to hand out, where there is one.
    pub router: Option<Ipv4Addr>,
    /// First and last address for nodes without reservation. None: reservations only, and they alone say whose an
    /// address is, so a former owner's lease does not keep the new owner from it.
    pub pool: Option<(Ipv4Addr, Ipv4Addr)>,
    /// How long a lease runs.
    pub lease_duration: Duration,
}

/// A lease as it is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressLease {
    /// The address.
    pub address: Ipv4Addr,
    /// Who has it.
    pub mac: MacAddr,
    /// Until then: milliseconds since the Unix epoch. In the past: released.
    pub until_ms: i64,
}

/// Why a request for an address is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotYours {
    /// Not an address of this network's pool, nor the client's reservation.
    OutOfScope,
    /// Somebody else holds it, or it was declined.
    Held,
}

/// Leases and offers of one [`Scope`].
#[derive(Debug)]
pub struct LeaseTable {
    scope: Scope,
    held: HashMap<Ipv4Addr, Holding>,
    by_mac: HashMap<MacAddr, Ipv4Addr>,
    /// Where the search for a free address goes on, so that a released address rests as long as possible.
    cursor: u32,
}

#[derive(Debug, Clone, Copy)]
struct Holding {
    holder: Holder,
    until_ms: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// Offered to, or leased by.
    Client(MacAddr),
    /// A client found somebody else using it.
    Conflict,
}

impl LeaseTable {
    /// An empty table.
    #[must_use]
    pub fn new(scope: Scope) -> Self {
        Self { scope, held: HashMap::new(), by_mac: HashMap::new(), cursor: 0 }
    }

    /// Takes back a recorded lease; later records supersede earlier ones.
    pub fn restore(&mut self, lease: AddressLease) {
        self.hold(lease.mac, lease.address, lease.until_ms);
    }

    /// An address for `mac`, held for a minute: its reservation, else what it had, else a free one.
    pub fn offer(&mut self, now_ms: i64, mac: MacAddr, reserved: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        let had = self.by_mac.get(&mac).copied().filter(|address| self.in_pool(*address));
        let address = match reserved {
            Some(reserved) if self.available(now_ms, reserved, mac) => reserved,
            Some(_) => return None,
            None => had.filter(|had| self.available(now_ms, *had, mac)).or_else(|| self.free_address(now_ms))?,
        };
        let running =
            self.held.get(&address).filter(|held| held.holder == Holder::Client(mac)).map(|held| held.until_ms);
        self.hold(mac, address, running.unwrap_or_default().max(now_ms + OFFER_MS));
        Some(address)
    }

    /// Leases `address` to `mac`, or says why not.
    ///
    /// # Errors
    /// The address is not one that this client may have.
    pub fn lease(
        &mut self,
        now_ms: i64,
        mac: MacAddr,
        address: Ipv4Addr,
        reserved: Option<Ipv4Addr>,
    ) -> Result<AddressLease, NotYours> {
        let allowed = match reserved {
            Some(reserved) => reserved == address,
            None => self.in_pool(address),
        };
        if !allowed {
            return Err(NotYours::OutOfScope);
        }
        if !self.available(now_ms, address, mac) {
            return Err(NotYours::Held);
        }
        let duration_ms = i64::try_from(self.scope.lease_duration.as_millis()).unwrap_or(i64::MAX);
        let until_ms = now_ms.saturating_add(duration_ms);
        self.hold(mac, address, until_ms);
        Ok(AddressLease { address, mac, until_ms })
    }

    /// `mac` no longer wants `address`. Only the holder is heard.
    pub fn release(&mut self, now_ms: i64, mac: MacAddr, address: Ipv4Addr) -> Option<AddressLease> {
        self.holder(now_ms, address).filter(|holder| *holder == mac)?;
        self.hold(mac, address, now_ms);
        Some(AddressLease { address, mac, until_ms: now_ms })
    }

    /// `mac` found that somebody uses `address`: nobody gets it for a while. Only the holder is heard.
    pub fn decline(&mut self, now_ms: i64, mac: MacAddr, address: Ipv4Addr) -> Option<AddressLease> {
        self.holder(now_ms, address).filter(|holder| *holder == mac)?;
        self.by_mac.remove(&mac);
        self.held.insert(address, Holding { holder: Holder::Conflict, until_ms: now_ms + CONFLICT_MS });
        Some(AddressLease { address, mac, until_ms: now_ms })
    }

    /// Who holds `address` now.
    #[must_use]
    pub fn holder(&self, now_ms: i64, address: Ipv4Addr) -> Option<MacAddr> {
        let held = self.held.get(&address).filter(|held| held.until_ms > now_ms)?;
        match held.holder {
            Holder::Client(mac) => Some(mac),
            Holder::Conflict => None,
        }
    }

    /// What a reply says of a lease of `address`.
    #[must_use]
    pub fn terms(&self, address: Ipv4Addr) -> LeaseTerms {
        let Scope { network, router, lease_duration, .. } = self.scope;
        LeaseTerms { address, network, router, duration: lease_duration }
    }

    /// The scope.
    #[must_use]
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    fn hold(&mut self, mac: MacAddr, address: Ipv4Addr, until_ms: i64) {
        let former = self.by_mac.insert(mac, address).filter(|former| *former != address);
        if let Some(former) = former
            && self.held.get(&former).is_some_and(|held| held.holder == Holder::Client(mac))
        {
            self.held.remove(&former);
        }
        let replaced = self.held.insert(address, Holding { holder: Holder::Client(mac), until_ms });
        if let Some(Holding { holder: Holder::Client(other), .. }) = replaced
            && other != mac
        {
            self.by_mac.remove(&other);
        }
    }

    fn available(&self, now_ms: i64, address: Ipv4Addr, mac: MacAddr) -> bool {
        self.held.get(&address).is_none_or(|held| match held.holder {
            Holder::Client(holder) => holder == mac || held.until_ms <= now_ms || self.scope.pool.is_none(),
            Holder::Conflict => held.until_ms <= now_ms,
        })
    }

    fn in_pool(&self, address: Ipv4Addr) -> bool {
        self.scope.pool.is_some_and(|(first, last)| (first..=last).contains(&address))
            && address != self.scope.server
            && Some(address) != self.scope.router
    }

    /// An address that nobody holds: one that never was held, before one whose lease ran out.
    fn free_address(&mut self, now_ms: i64) -> Option<Ipv4Addr> {
        let (first, last) = self.scope.pool?;
        let size = u32::from(last).checked_sub(u32::from(first))?.saturating_add(1);
        let candidates = (0..size).map(|step| (self.cursor.wrapping_add(step)) % size);
        let address = |offset: u32| Ipv4Addr::from(u32::from(first).saturating_add(offset));
        let usable: Vec<u32> = candidates.filter(|offset| self.in_pool(address(*offset))).collect();
        let never = usable.iter().find(|offset| !self.held.contains_key(&address(**offset)));
        let expired =
            || usable.iter().find(|offset| self.held.get(&address(**offset)).is_none_or(|h| h.until_ms <= now_ms));
        let offset = never.or_else(expired).copied()?;
        self.cursor = (offset + 1) % size;
        Some(address(offset))
    }
}

/// How long an offer is held: a client decides within seconds.
const OFFER_MS: i64 = 60_000;
/// How long an address in conflict rests.
const CONFLICT_MS: i64 = 600_000;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mac(index: u8) -> MacAddr {
        MacAddr::new([2, 0, 0, 0, 0, index]).unwrap()
    }

    fn ip(host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, host)
    }

    fn table(first: u8, last: u8) -> LeaseTable {
        LeaseTable::new(Scope {
            network: "10.0.0.0/24".parse().unwrap(),
            server: ip(1),
            router: None,
            pool: Some((ip(first), ip(last))),
            lease_duration: Duration::from_secs(600),
        })
    }

    #[test]
    fn a_client_keeps_its_address_and_the_server_keeps_its_own() {
        let mut table = table(1, 3);
        let first = table.offer(0, mac(1), None).unwrap();
        assert_eq!(first, ip(2), "10.0.0.1 is the server's");
        assert_eq!(table.offer(5, mac(1), None), Some(first));
        assert_eq!(table.lease(10, mac(1), first, None).unwrap().until_ms, 600_010);
        assert_eq!(table.offer(700_000, mac(1), None), Some(first), "even after its lease");
        assert_eq!(table.offer(20, mac(2), None), Some(ip(3)));
        assert_eq!(table.offer(20, mac(3), None), None, "the pool is empty");
    }

    #[test]
    fn row_8_an_offer_that_nobody_takes_is_free_after_a_minute() {
        let mut table = table(10, 10);
        assert_eq!(table.offer(0, mac(1), None), Some(ip(10)));
        assert_eq!(table.offer(59_999, mac(2), None), None);
        assert_eq!(table.offer(60_000, mac(2), None), Some(ip(10)));
        assert_eq!(table.lease(60_001, mac(1), ip(10), None), Err(NotYours::Held), "too late");
    }

    #[test]
    fn row_8_only_the_holder_may_release_or_decline() {
        let mut table = table(10, 10);
        table.lease(0, mac(1), ip(10), None).unwrap();
        assert_eq!(table.release(1, mac(2), ip(10)), None);
        assert_eq!(table.decline(1, mac(2), ip(10)), None);
        assert_eq!(table.holder(1, ip(10)), Some(mac(1)));
        assert!(table.decline(1, mac(1), ip(10)).is_some());
        assert_eq!(table.holder(2, ip(10)), None);
        assert_eq!(table.offer(2, mac(1), None), None, "in conflict");
        assert_eq!(table.offer(CONFLICT_MS + 1, mac(1), None), Some(ip(10)));
    }

    #[test]
    fn reservations_are_for_their_owner_only() {
        let mut table = table(10, 20);
        assert_eq!(table.offer(0, mac(1), Some(ip(99))), Some(ip(99)));
        assert_eq!(table.lease(0, mac(2), ip(99), None), Err(NotYours::OutOfScope));
        assert_eq!(table.lease(0, mac(1), ip(10), Some(ip(99))), Err(NotYours::OutOfScope));
        assert!(table.lease(0, mac(1), ip(99), Some(ip(99))).is_ok());
        assert_eq!(table.offer(0, mac(3), Some(ip(99))), None, "still held by the former owner");
    }

    #[test]
    fn without_a_pool_a_reservation_outweighs_a_former_owners_lease() {
        let mut table = table(10, 20);
        table.scope.pool = None;
        assert!(table.lease(0, mac(1), ip(50), Some(ip(50))).is_ok());
        assert_eq!(table.offer(1, mac(2), Some(ip(50))), Some(ip(50)), "the lease of the former owner still runs");
        assert!(table.lease(2, mac(2), ip(50), Some(ip(50))).is_ok());
        assert_eq!(table.holder(2, ip(50)), Some(mac(2)));
        assert_eq!(table.release(3, mac(1), ip(50)), None, "no longer its own");
        assert!(table.decline(3, mac(2), ip(50)).is_some());
        assert_eq!(table.offer(4, mac(2), Some(ip(50))), None, "in conflict all the same");
    }

    #[test]
    fn row_10_a_clock_that_jumps_back_frees_nothing_early() {
        let mut table = table(10, 11);
        table.lease(1_000_000, mac(1), ip(10), None).unwrap();
        assert_eq!(table.offer(0, mac(2), None), Some(ip(11)));
        assert_eq!(table.offer(0, mac(3), None), None);
    }

    proptest! {
        #[test]
        fn row_10_no_address_is_held_by_two(steps in proptest::collection::vec((0_u8..5, 1_u8..12, 8_u8..17, 0_i64..200_000), 1..200)) {
            let mut table = table(10, 15);
            let mut now = 0;
            let mut leases: HashMap<Ipv4Addr, (MacAddr, i64)> = HashMap::new();
            for (step, client, host, wait) in steps {
                now += wait;
                let (client, address) = (mac(client), ip(host));
                match step {
                    0 => {
                        if let Some(offered) = table.offer(now, client, None) {
                            let other = leases.get(&offered).filter(|(holder, until)| *holder != client && *until > now);
                            prop_assert!(other.is_none(), "offered a held address");
                        }
                    }
                    1 | 2 => {
                        if let Ok(lease) = table.lease(now, client, address, None) {
                            let other = leases.get(&address).filter(|(holder, until)| *holder != client && *until > now);
                            prop_assert!(other.is_none(), "leased a held address");
                            leases.retain(|_, (holder, _)| *holder != client);
                            leases.insert(address, (client, lease.until_ms));
                        }
                    }
                    3 => {
                        if table.release(now, client, address).is_some() {
                            leases.remove(&address);
                        }
                    }
                    _ => {
                        if table.decline(now, client, address).is_some() {
                            leases.remove(&address);
                        }
                    }
                }
                prop_assert!(table.held.len() <= 6 && table.by_mac.len() <= 6);
            }
        }
    }
}
