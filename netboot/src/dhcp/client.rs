//! What kind of program a client is: firmware, iPXE, or our agent.

use super::packet::{ClientPacket, code};

/// The program that asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ClientKind {
    /// UEFI firmware for x86-64 that boots by PXE (RFC 4578: option 93 is 7, or 9 as some vendors count).
    UefiPxe,
    /// UEFI firmware for x86-64 that boots by HTTP (option 93 is 16).
    UefiHttp,
    /// iPXE, whatever it was loaded by (user class, option 77; or its own option 175).
    Ipxe,
    /// Assay's agent (vendor class, option 60).
    Agent,
    /// Anything else: BIOS, another architecture, an operating system.
    Other,
}

impl ClientKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::UefiPxe, Self::UefiHttp, Self::Ipxe, Self::Agent, Self::Other];

    /// Tells by the options that the client sent. The order matters: iPXE also sends the vendor class and the
    /// architecture of the firmware below it, and would be sent to itself for ever.
    #[must_use]
    pub fn of(packet: &ClientPacket) -> Self {
        let option = |code: u8| packet.options.get(&code).map(Vec::as_slice);
        let vendor = option(code::VENDOR_CLASS).unwrap_or_default();
        if vendor == AGENT_VENDOR_CLASS {
            Self::Agent
        } else if option(code::USER_CLASS).is_some_and(is_ipxe) || option(code::IPXE).is_some() {
            Self::Ipxe
        } else if vendor.starts_with(b"PXEClient") {
            if has_architecture(option(code::CLIENT_ARCHITECTURE), &[7, 9]) { Self::UefiPxe } else { Self::Other }
        } else if vendor.starts_with(b"HTTPClient") {
            if has_architecture(option(code::CLIENT_ARCHITECTURE), &[16]) { Self::UefiHttp } else { Self::Other }
        } else {
            Self::Other
        }
    }
}

/// Option 77 is a list of items, each behind its length (RFC 3004); iPXE sends its name bare. Both are taken.
fn is_ipxe(value: &[u8]) -> bool {
    let mut rest = value;
    let mut items = std::iter::from_fn(|| {
        let (length, tail) = rest.split_first()?;
        let item = tail.get(..usize::from(*length))?;
        rest = &tail[item.len()..];
        Some(item)
    });
    value == b"iPXE" || items.any(|item| item == b"iPXE")
}

/// Option 93 is a list of 16-bit numbers: a client may be several machines at once.
fn has_architecture(value: Option<&[u8]>, wanted: &[u16]) -> bool {
    value.unwrap_or_default().chunks_exact(2).any(|pair| wanted.contains(&u16::from_be_bytes([pair[0], pair[1]])))
}

/// Vendor class of the agent's DHCP client.
const AGENT_VENDOR_CLASS: &[u8] = b"AssayAgent";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dhcp::packet::tests::packet;

    fn kind(options: &[(u8, &[u8])]) -> ClientKind {
        ClientKind::of(&ClientPacket::decode(&packet(1, options)).unwrap())
    }

    #[test]
    fn each_program_is_told_apart() {
        let pxe: (u8, &[u8]) = (60, b"PXEClient:Arch:00007:UNDI:003000");
        assert_eq!(kind(&[pxe, (93, &[0, 7])]), ClientKind::UefiPxe);
        assert_eq!(kind(&[pxe, (93, &[0, 9])]), ClientKind::UefiPxe);
        assert_eq!(kind(&[pxe, (93, &[0, 0, 0, 7])]), ClientKind::UefiPxe, "the second of two architectures");
        assert_eq!(kind(&[(60, b"HTTPClient:Arch:00016:UNDI:003001"), (93, &[0, 16])]), ClientKind::UefiHttp);
        assert_eq!(kind(&[(60, b"AssayAgent")]), ClientKind::Agent);
        let others: [&[(u8, &[u8])]; 7] = [
            &[(60, b"PXEClient:Arch:00000"), (93, &[0, 0])],
            &[pxe],
            &[pxe, (93, &[7])],
            &[pxe, (93, &[0, 11])],
            &[(60, b"AssayAgents")],
            &[(77, b"\x05iPXEx")],
            &[],
        ];
        for other in others {
            assert_eq!(kind(other), ClientKind::Other, "{other:?}");
        }
    }

    #[test]
    fn ipxe_is_never_taken_for_the_firmware_that_loaded_it() {
        let firmware: [(u8, &[u8]); 2] = [(60, b"PXEClient:Arch:00007:UNDI:003000"), (93, &[0, 7])];
        for mark in [(77, b"iPXE".as_slice()), (77, b"\x04iPXE"), (77, b"\x02ab\x04iPXE"), (175, &[1, 1, 1])] {
            assert_eq!(kind(&[firmware[0], firmware[1], mark]), ClientKind::Ipxe, "{mark:?}");
        }
    }
}
