//! Token buckets per MAC address, in a table that a flood of made-up addresses cannot grow.

use assay_wire::net::MacAddr;
use std::collections::HashMap;

/// Lets each client send so many packets at once and so many a second after that.
///
/// Two generations of buckets: when the young one is full it becomes the old one and the old one is dropped. A client
/// that is forgotten so starts with a full bucket: a flood costs others nothing.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    refill_ms: i64,
    capacity: usize,
    young: HashMap<MacAddr, Bucket>,
    old: HashMap<MacAddr, Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens: u32,
    refilled_ms: i64,
}

impl RateLimit {
    /// `burst` packets at once, then one every `refill_ms`; remembers at most twice `capacity` clients.
    #[must_use]
    pub fn new(burst: u32, refill_ms: i64, capacity: usize) -> Self {
        Self { burst, refill_ms, capacity, young: HashMap::new(), old: HashMap::new() }
    }

    /// Whether one more packet of `mac` is within its limit; takes a token if so.
    pub fn allow(&mut self, now_ms: i64, mac: MacAddr) -> bool {
        let known = self.young.remove(&mac).or_else(|| self.old.remove(&mac));
        let mut bucket = known.unwrap_or(Bucket { tokens: self.burst, refilled_ms: now_ms });
        let earned = now_ms.saturating_sub(bucket.refilled_ms).max(0) / self.refill_ms;
        bucket.tokens = bucket.tokens.saturating_add(u32::try_from(earned).unwrap_or(u32::MAX)).min(self.burst);
        // A clock that was set back must not leave a client waiting for the old time to come again.
        bucket.refilled_ms = (bucket.refilled_ms + earned.saturating_mul(self.refill_ms)).min(now_ms);
        let allowed = bucket.tokens > 0;
        bucket.tokens = bucket.tokens.saturating_sub(1);
        if self.young.len() >= self.capacity {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(mac, bucket);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(index: u32) -> MacAddr {
        let [a, b, c, d] = index.to_be_bytes();
        MacAddr::new([2, 0, a, b, c, d]).unwrap()
    }

    #[test]
    fn a_burst_then_a_rate() {
        let mut limit = RateLimit::new(3, 1000, 10);
        assert_eq!((0..5).filter(|_| limit.allow(0, mac(1))).count(), 3);
        assert!(limit.allow(0, mac(2)), "others are not affected");
        assert!(!limit.allow(999, mac(1)));
        assert!(limit.allow(1000, mac(1)));
        assert!(!limit.allow(1000, mac(1)));
        assert_eq!((0..9).filter(|_| limit.allow(60_000, mac(1))).count(), 3);
        assert!(!limit.allow(0, mac(1)));
        assert!(limit.allow(1000, mac(1)), "a clock set back by a minute costs a second");
    }

    #[test]
    fn row_8_a_million_made_up_addresses_do_not_grow_the_table() {
        let mut limit = RateLimit::new(3, 1000, 512);
        for index in 0..1_000_000 {
            limit.allow(0, mac(index));
        }
        assert!(limit.young.len() + limit.old.len() <= 1024);
        assert!(limit.young.capacity() + limit.old.capacity() <= 4096);
    }
}
