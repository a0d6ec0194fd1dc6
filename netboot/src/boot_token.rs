//! Boot tokens: the unguessable part of a boot URL. Whoever has one may fetch one boot's files, so it is 128 random
//! bits, names one boot of one MAC address, works from that MAC's leased address only, for a time and a number of
//! uses, and is never logged.

use crate::boot_plan::NodeBoot;
use assay_wire::net::MacAddr;
use std::collections::HashMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;

/// 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BootToken([u8; 16]);

impl BootToken {
    /// A token of these bits, which must be random.
    #[must_use]
    pub fn from_random(bits: [u8; 16]) -> Self {
        Self(bits)
    }

    /// The token as it stands in a URL. Only for URLs.
    #[must_use]
    pub fn expose(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Debug for BootToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BootToken(<redacted>)")
    }
}

/// Not 32 lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a boot token")]
pub struct NotAToken;

impl FromStr for BootToken {
    type Err = NotAToken;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        let mut bits = [0; 16];
        let lower = value.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase());
        hex::decode_to_slice(value, &mut bits).map_err(|_| NotAToken)?;
        if lower { Ok(Self(bits)) } else { Err(NotAToken) }
    }
}

/// What a token is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// Whose boot.
    pub boot: NodeBoot,
    /// The NIC that was told.
    pub mac: MacAddr,
    /// The address that the NIC was given: requests come from there.
    pub address: Ipv4Addr,
    /// The HTTP server on the NIC's network: URLs point there.
    pub server: SocketAddrV4,
}

/// The tokens that are in use: at most one a MAC address, so at most as many as there are nodes.
#[derive(Debug)]
pub struct BootTokens {
    lifetime_ms: i64,
    by_token: HashMap<BootToken, Entry>,
    by_mac: HashMap<MacAddr, BootToken>,
}

#[derive(Debug)]
struct Entry {
    granted: Granted,
    expires_ms: i64,
    uses: u32,
}

impl BootTokens {
    /// None yet. Each will be good for `lifetime_ms`.
    #[must_use]
    pub fn new(lifetime_ms: i64) -> Self {
        Self { lifetime_ms, by_token: HashMap::new(), by_mac: HashMap::new() }
    }

    /// The token for this grant: the one already handed out if it is for the same and still good, else a new one, made
    /// by `random`. A new one ends the MAC's former one.
    pub fn issue(&mut self, now_ms: i64, granted: &Granted, random: impl FnOnce() -> BootToken) -> BootToken {
        if let Some(token) = self.by_mac.get(&granted.mac)
            && self.by_token.get(token).is_some_and(|entry| entry.granted == *granted && entry.good(now_ms))
        {
            return *token;
        }
        self.by_token.retain(|_, entry| entry.granted.mac != granted.mac && entry.expires_ms > now_ms);
        let token = random();
        let entry = Entry { granted: granted.clone(), expires_ms: now_ms.saturating_add(self.lifetime_ms), uses: 0 };
        self.by_token.insert(token, entry);
        self.by_mac.insert(granted.mac, token);
        token
    }

    /// Uses `token` once from `peer`. None: unknown, expired, used up, or another's.
    pub fn use_once(&mut self, now_ms: i64, token: BootToken, peer: Ipv4Addr) -> Option<&Granted> {
        let entry =
            self.by_token.get_mut(&token).filter(|entry| entry.good(now_ms) && entry.granted.address == peer)?;
        entry.uses += 1;
        Some(&entry.granted)
    }
}

impl Entry {
    fn good(&self, now_ms: i64) -> bool {
        self.expires_ms > now_ms && self.uses < MAX_USES
    }
}

/// Enough for every file of a boot by HEAD and GET, each a few times; not for a download service.
const MAX_USES: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use assay_wire::id::BootId;

    const NODE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);

    fn granted(mac: u8) -> Granted {
        Granted {
            boot: NodeBoot { node: "n1".parse().unwrap(), boot: BootId::random() },
            mac: MacAddr::new([2, 0, 0, 0, 0, mac]).unwrap(),
            address: NODE,
            server: SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), 80),
        }
    }

    fn token(byte: u8) -> BootToken {
        BootToken([byte; 16])
    }

    #[test]
    fn row_12_a_token_is_for_one_mac_one_address_and_a_time() {
        let mut tokens = BootTokens::new(1000);
        let first = granted(1);
        assert_eq!(tokens.issue(0, &first, || token(1)), token(1));
        assert_eq!(tokens.issue(500, &first, || panic!("asked again")), token(1));
        assert_eq!(tokens.use_once(999, token(1), NODE), Some(&first));
        assert_eq!(tokens.use_once(999, token(1), Ipv4Addr::new(10, 0, 0, 8)), None, "another address");
        assert_eq!(tokens.use_once(999, token(2), NODE), None, "a guess");
        assert_eq!(tokens.use_once(1000, token(1), NODE), None, "expired");
        assert_eq!(tokens.issue(1000, &first, || token(3)), token(3));
    }

    #[test]
    fn row_12_the_next_boot_ends_the_last_boots_token() {
        let mut tokens = BootTokens::new(1000);
        tokens.issue(0, &granted(1), || token(1));
        let next = granted(1);
        assert_eq!(tokens.issue(1, &next, || token(2)), token(2));
        assert_eq!(tokens.use_once(2, token(1), NODE), None);
        assert_eq!(tokens.use_once(2, token(2), NODE), Some(&next));
        assert_eq!(tokens.by_token.len(), 1);
    }

    #[test]
    fn row_12_uses_are_counted() {
        let mut tokens = BootTokens::new(1000);
        let granted = granted(1);
        tokens.issue(0, &granted, || token(1));
        let good = (0..1000).filter(|_| tokens.use_once(1, token(1), NODE).is_some()).count();
        assert_eq!(good, 64);
        assert_eq!(tokens.issue(2, &granted, || token(2)), token(2), "the node may ask DHCP again");
    }

    #[test]
    fn row_12_a_token_shows_in_no_log() {
        assert_eq!(format!("{:?}", token(7)), "BootToken(<redacted>)");
        assert_eq!(token(7).expose().parse(), Ok(token(7)));
        for bad in ["", "07", &"0".repeat(33), &"G".repeat(32), &"AB".repeat(16)] {
            assert_eq!(bad.parse::<BootToken>(), Err(NotAToken), "{bad}");
        }
    }
}
