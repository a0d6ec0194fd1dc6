//! UEFI device paths (UEFI 2.10, chapter 10) as text, for people. Each node says its own length; a node that lies ends
//! the text.

use super::data::{Guid, utf16};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// The path's text form, like `PciRoot(0x0)/Pci(0x2,0x0)/MAC(525400000001,0x1)/Uri(http://…)`.
pub(super) fn text(mut path: &[u8]) -> String {
    let mut text = String::new();
    for _ in 0..MAX_NODES {
        let [kind, subtype, low, high, ..] = *path else { break };
        let length = usize::from(u16::from_le_bytes([low, high]));
        let Some(body) = path.get(4..length) else {
            text.push_str("/<malformed>");
            break;
        };
        path = &path[length..];
        match (kind, subtype) {
            (END, 0xff) => break,
            (END, _) => text.push(','), // end of one instance of several
            _ => {
                if !text.is_empty() && !text.ends_with(',') {
                    text.push('/');
                }
                text.push_str(&node(kind, subtype, body));
            }
        }
    }
    text
}

/// One node; one that we do not know is shown by its numbers, as UEFI's own text form does.
fn node(kind: u8, subtype: u8, body: &[u8]) -> String {
    let known = match (kind, subtype) {
        (0x01, 0x01) => array(body, 0).map(|[function, device]| format!("Pci({device:#x},{function:#x})")),
        (0x01, 0x03) => {
            u64_at(body, 4).zip(u64_at(body, 12)).map(|(from, to)| format!("MemoryMapped({from:#x},{to:#x})"))
        }
        (0x01, 0x04) => array(body, 0).map(|guid| format!("VenHw({})", Guid(guid))),
        (0x02, 0x01) => {
            array(body, 0).zip(array(body, 4)).map(|(hid, uid)| acpi(u32::from_le_bytes(hid), u32::from_le_bytes(uid)))
        }
        (0x03, 0x05) => array(body, 0).map(|[port, interface]| format!("USB({port:#x},{interface:#x})")),
        (0x03, 0x0b) => array::<6>(body, 0)
            .zip(body.get(32))
            .map(|(mac, interface)| format!("MAC({},{interface:#x})", hex::encode(mac))),
        (0x03, 0x0c) => array::<4>(body, 4).map(|remote| format!("IPv4({})", Ipv4Addr::from(remote))),
        (0x03, 0x0d) => array::<16>(body, 16).map(|remote| format!("IPv6({})", std::net::Ipv6Addr::from(remote))),
        (0x03, 0x12) => array(body, 0).map(|port| format!("Sata({:#x})", u16::from_le_bytes(port))),
        (0x03, 0x17) => array(body, 0).map(|namespace| format!("NVMe({:#x})", u32::from_le_bytes(namespace))),
        (0x03, 0x18) => Some(format!("Uri({})", String::from_utf8_lossy(body))),
        (0x04, 0x01) => array(body, 0)
            .zip(array(body, 20))
            .map(|(partition, guid)| format!("HD({},{})", u32::from_le_bytes(partition), Guid(guid))),
        (0x04, 0x03) => array(body, 0).map(|guid| format!("VenMedia({})", Guid(guid))),
        (0x04, 0x04) => Some(utf16(body).trim_end_matches('\0').to_owned()),
        (0x04, 0x06) => array(body, 0).map(|guid| format!("FvFile({})", Guid(guid))),
        (0x04, 0x07) => array(body, 0).map(|guid| format!("Fv({})", Guid(guid))),
        _ => None,
    };
    known.unwrap_or_else(|| {
        let mut text = format!("Path({kind},{subtype},");
        for octet in body.iter().take(MAX_RAW_BYTES) {
            let _ = write!(text, "{octet:02x}"); // writing to a String does not fail
        }
        text.push(')');
        text
    })
}

fn acpi(hid: u32, uid: u32) -> String {
    match hid {
        PCI_ROOT_HID => format!("PciRoot({uid:#x})"),
        other => format!("Acpi({other:#x},{uid:#x})"),
    }
}

fn array<const N: usize>(body: &[u8], at: usize) -> Option<[u8; N]> {
    body.get(at..at + N)?.try_into().ok()
}

fn u64_at(body: &[u8], at: usize) -> Option<u64> {
    array(body, at).map(u64::from_le_bytes)
}

const END: u8 = 0x7f;
/// `PNP0A03` in EISA's compression.
const PCI_ROOT_HID: u32 = 0x0a03_41d0;
const MAX_NODES: usize = 64;
const MAX_RAW_BYTES: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_boot_path_reads_like_uefi_writes_it() {
        let path = hex::decode("02010c00d041030a000000000101060000027fff0400").unwrap();
        assert_eq!(text(&path), "PciRoot(0x0)/Pci(0x2,0x0)");
    }

    #[test]
    fn b7_a_node_that_lies_about_its_length_ends_the_text() {
        for length in [0u8, 3, 0xff] {
            assert_eq!(text(&[1, 1, length, 0, 0, 2]), "/<malformed>", "length {length}");
        }
        assert_eq!(text(&[9, 9, 5, 0, 0xab]), "Path(9,9,ab)");
        // Nor does a path go on for longer than any machine's.
        assert_eq!(text(&[9, 9, 4, 0].repeat(1000)).matches("Path(").count(), MAX_NODES);
    }
}
