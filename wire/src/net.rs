//! Network values that are valid by construction: MAC addresses, VLAN ids, iSCSI names.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a network value is not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidNetValue {
    /// Not six octets in hexadecimal.
    #[error("`{0}` is not a MAC address: use six hexadecimal octets, like 52:54:00:12:34:56")]
    Mac(String),
    /// A group address cannot name a NIC.
    #[error("`{0}` is a multicast address, which no NIC has")]
    MulticastMac(String),
    /// Outside 1 to 4094 (IEEE 802.1Q).
    #[error("VLAN {0} is outside 1 to 4094")]
    Vlan(u32),
    /// Not an `iqn.` name (RFC 7143 section 4.2.7.3).
    #[error("`{0}` is not an iSCSI qualified name, like iqn.2026-01.org.example:disk-1 (at most 223 of a-z 0-9 . : -)")]
    Iqn(String),
}

/// A unicast Ethernet address. Written with colons and lower-case digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "52:54:00:12:34:56")]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// Checks that the address is one that a NIC can have.
    ///
    /// # Errors
    /// A multicast address is refused.
    pub fn new(octets: [u8; 6]) -> Result<Self, InvalidNetValue> {
        if octets[0] & 1 == 1 {
            return Err(InvalidNetValue::MulticastMac(format_mac(octets)));
        }
        Ok(Self(octets))
    }

    /// The six octets, in transmission order.
    #[must_use]
    pub fn octets(&self) -> [u8; 6] {
        self.0
    }
}

fn format_mac(octets: [u8; 6]) -> String {
    octets.map(|octet| format!("{octet:02x}")).join(":")
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format_mac(self.0))
    }
}

impl FromStr for MacAddr {
    type Err = InvalidNetValue;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidNetValue::Mac(value.chars().take(40).collect());
        let mut octets = [0_u8; 6];
        let mut parts = value.split([':', '-']);
        for octet in &mut octets {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            *octet = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(invalid)?;
        }
        if parts.next().is_some() {
            return Err(invalid());
        }
        Self::new(octets)
    }
}

impl TryFrom<String> for MacAddr {
    type Error = InvalidNetValue;
    fn try_from(value: String) -> Result<Self, Self::Error> {
        value.parse()
    }
}

impl From<MacAddr> for String {
    fn from(value: MacAddr) -> Self {
        value.to_string()
    }
}

/// An IEEE 802.1Q VLAN id, 1 to 4094.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "u32", into = "u32")]
#[schema(value_type = u32, example = 120)]
pub struct VlanId(u16);

impl VlanId {
    /// The VLAN's number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u32> for VlanId {
    type Error = InvalidNetValue;
    fn try_from(value: u32) -> Result<Self, Self::Error> {
        match u16::try_from(value) {
            Ok(id @ 1..=4094) => Ok(Self(id)),
            _ => Err(InvalidNetValue::Vlan(value)),
        }
    }
}

impl From<VlanId> for u32 {
    fn from(value: VlanId) -> Self {
        Self::from(value.0)
    }
}

impl FromStr for VlanId {
    type Err = InvalidNetValue;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        value.parse::<u32>().map_err(|_| InvalidNetValue::Vlan(0)).and_then(Self::try_from)
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An iSCSI qualified name (RFC 7143 section 4.2.7), of a target or of an initiator.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "iqn.2026-01.org.example:disk-1")]
pub struct Iqn(String);

impl Iqn {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Iqn {
    type Err = InvalidNetValue;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        let charset = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b':' | b'-');
        let named = value.strip_prefix("iqn.").is_some_and(|rest| rest.contains('.'));
        if named && value.len() <= 223 && value.bytes().all(charset) {
            Ok(Self(value.to_owned()))
        } else {
            Err(InvalidNetValue::Iqn(value.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for Iqn {
    type Error = InvalidNetValue;
    fn try_from(value: String) -> Result<Self, Self::Error> {
        value.parse()
    }
}

impl From<Iqn> for String {
    fn from(value: Iqn) -> Self {
        value.0
    }
}

impl fmt::Display for Iqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses() {
        let mac: MacAddr = "52:54:00:AB:cd:ef".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:ef:00",
            "5:54:00:ab:cd:ef",
            "zz:54:00:ab:cd:ef",
            "01:00:5e:00:00:01",
            "+2:54:00:ab:cd:ef",
        ] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn vlan_ids_are_1_to_4094() {
        assert_eq!(VlanId::try_from(1).unwrap().get(), 1);
        assert_eq!(VlanId::try_from(4094).unwrap().get(), 4094);
        for bad in [0, 4095, 65537] {
            assert!(VlanId::try_from(bad).is_err());
        }
    }

    #[test]
    fn iscsi_names() {
        assert!("iqn.2026-01.org.example:disk-1".parse::<Iqn>().is_ok());
        for bad in [
            "",
            "iqn.",
            "iqn.2026",
            "eui.02004567a425678d",
            "iqn.2026-01.org.example:Disk",
            "iqn.2026-01.org.example: x",
        ] {
            assert!(bad.parse::<Iqn>().is_err(), "{bad:?} was accepted");
        }
    }
}
