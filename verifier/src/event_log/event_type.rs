//! Event types of TCG PC Client Platform Firmware Profile 1.06, table 27. A type is a label that whoever keeps the
//! log may change: it is *not* extended, so it never stands alone for what an event is.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An event's type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EventType(u32);

macro_rules! event_types {
    ($($name:ident = $code:literal,)*) => {
        impl EventType {
            $(#[doc = concat!("`EV_", stringify!($name), "`")] pub const $name: Self = Self($code);)*
        }

        /// Every type with its name, in ascending order of code.
        const NAMES: &[(u32, &str)] = &[$(($code, concat!("EV_", stringify!($name))),)*];
    };
}

event_types! {
    PREBOOT_CERT = 0x0000_0000,
    POST_CODE = 0x0000_0001,
    UNUSED = 0x0000_0002,
    NO_ACTION = 0x0000_0003,
    SEPARATOR = 0x0000_0004,
    ACTION = 0x0000_0005,
    EVENT_TAG = 0x0000_0006,
    S_CRTM_CONTENTS = 0x0000_0007,
    S_CRTM_VERSION = 0x0000_0008,
    CPU_MICROCODE = 0x0000_0009,
    PLATFORM_CONFIG_FLAGS = 0x0000_000a,
    TABLE_OF_DEVICES = 0x0000_000b,
    COMPACT_HASH = 0x0000_000c,
    IPL = 0x0000_000d,
    IPL_PARTITION_DATA = 0x0000_000e,
    NONHOST_CODE = 0x0000_000f,
    NONHOST_CONFIG = 0x0000_0010,
    NONHOST_INFO = 0x0000_0011,
    OMIT_BOOT_DEVICE_EVENTS = 0x0000_0012,
    POST_CODE2 = 0x0000_0013,
    EFI_VARIABLE_DRIVER_CONFIG = 0x8000_0001,
    EFI_VARIABLE_BOOT = 0x8000_0002,
    EFI_BOOT_SERVICES_APPLICATION = 0x8000_0003,
    EFI_BOOT_SERVICES_DRIVER = 0x8000_0004,
    EFI_RUNTIME_SERVICES_DRIVER = 0x8000_0005,
    EFI_GPT_EVENT = 0x8000_0006,
    EFI_ACTION = 0x8000_0007,
    EFI_PLATFORM_FIRMWARE_BLOB = 0x8000_0008,
    EFI_HANDOFF_TABLES = 0x8000_0009,
    EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000_000a,
    EFI_HANDOFF_TABLES2 = 0x8000_000b,
    EFI_VARIABLE_BOOT2 = 0x8000_000c,
    EFI_GPT_EVENT2 = 0x8000_000d,
    EFI_HCRTM_EVENT = 0x8000_0010,
    EFI_VARIABLE_AUTHORITY = 0x8000_00e0,
    EFI_SPDM_FIRMWARE_BLOB = 0x8000_00e1,
    EFI_SPDM_FIRMWARE_CONFIG = 0x8000_00e2,
    EFI_SPDM_DEVICE_POLICY = 0x8000_00e3,
    EFI_SPDM_DEVICE_AUTHORITY = 0x8000_00e4,
}

impl EventType {
    /// The type with this code; any code is one.
    #[must_use]
    pub fn from_code(code: u32) -> Self {
        Self(code)
    }

    /// Its code.
    #[must_use]
    pub fn code(self) -> u32 {
        self.0
    }

    /// Whether it is one of the profile's.
    #[must_use]
    pub fn is_known(self) -> bool {
        NAMES.iter().any(|(code, _)| *code == self.0)
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(code, _)| *code == self.0) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "{:#010x}", self.0),
        }
    }
}

impl fmt::Debug for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not the name or the hexadecimal code of an event type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an event type: use a name like EV_SEPARATOR or a code like 0x80000003")]
pub struct UnknownEventType(String);

impl FromStr for EventType {
    type Err = UnknownEventType;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some((code, _)) = NAMES.iter().find(|(_, name)| *name == text) {
            return Ok(Self(*code));
        }
        let code = text.strip_prefix("0x").and_then(|digits| u32::from_str_radix(digits, 16).ok());
        code.map(Self).ok_or_else(|| UnknownEventType(text.chars().take(80).collect()))
    }
}

impl TryFrom<String> for EventType {
    type Error = UnknownEventType;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<EventType> for String {
    fn from(kind: EventType) -> Self {
        kind.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_round_trip() {
        for (code, name) in NAMES {
            assert_eq!(name.parse::<EventType>().unwrap().code(), *code);
            assert_eq!(EventType::from_code(*code).to_string(), *name);
        }
        assert_eq!("0x800000ff".parse::<EventType>().unwrap().to_string(), "0x800000ff");
        assert!("EV_NONSENSE".parse::<EventType>().is_err());
        assert!(NAMES.is_sorted_by_key(|(code, _)| *code));
    }
}
