//! What the content of a UEFI variable means (UEFI 2.10, sections 3.1.3, 3.3 and 32.4.1), by the variable's name: to be
//! shown. Only content that was measured ([`super::Event::measured_variable`]) may be decided by.

use super::data::{Guid, shown, utf16};
use super::device_path;
use assay_tpm::reader::{DecodeError, Order, Reader};
use serde::Serialize;
use std::fmt;

/// What a variable's content means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", content = "value", rename_all = "kebab-case")]
pub enum Meaning {
    /// A switch: `SecureBoot`, `SetupMode` and others of their kind.
    Switch(bool),
    /// `BootOrder`: the boot options that are tried, in order.
    Order(Vec<u16>),
    /// `Boot####`: a boot option.
    LoadOption {
        /// Whether it is tried at all.
        active: bool,
        /// Its name in the menu.
        description: String,
        /// What it starts, in UEFI's text form.
        device_path: String,
    },
    /// `PK`, `KEK`, `db`, `dbx`: how many entries of which kind.
    Signatures {
        /// X.509 certificates.
        certificates: usize,
        /// SHA-256 digests of images.
        image_digests: usize,
        /// Entries of other kinds.
        others: usize,
    },
    /// Nothing that is known by the variable's name.
    Other,
}

impl Meaning {
    /// What `content` means as the variable of that name.
    pub(super) fn of(name: &str, content: &[u8]) -> Self {
        let meaning = match name {
            "SecureBoot" | "SetupMode" | "AuditMode" | "DeployedMode" | "MokSBState" => match content {
                [value @ (0 | 1)] => Some(Self::Switch(*value == 1)),
                _ => None,
            },
            "BootOrder" => order(content),
            "PK" | "KEK" | "db" | "dbx" | "dbt" | "dbr" | "MokList" | "MokListX" => signatures(content),
            _ if is_load_option(name) => load_option(content).ok(),
            _ => None,
        };
        meaning.unwrap_or(Self::Other)
    }
}

impl fmt::Display for Meaning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Switch(on) => f.write_str(if *on { "on" } else { "off" }),
            Self::Order(options) => {
                let options: Vec<_> = options.iter().map(|option| format!("{option:04X}")).collect();
                f.write_str(&options.join(" "))
            }
            Self::LoadOption { active, description, device_path } => {
                let inactive = if *active { "" } else { " (not active)" };
                write!(f, "{}{inactive}, {}", shown(description), shown(device_path))
            }
            Self::Signatures { certificates, image_digests, others } => {
                write!(f, "{certificates} certificates, {image_digests} image digests")?;
                if *others > 0 { write!(f, ", {others} others") } else { Ok(()) }
            }
            Self::Other => f.write_str("unknown"),
        }
    }
}

/// An `EFI_SIGNATURE_LIST`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignatureList<'a> {
    /// What its entries are.
    pub kind: Guid,
    /// Its entries.
    pub entries: Vec<Signature<'a>>,
}

/// An `EFI_SIGNATURE_DATA`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signature<'a> {
    /// Who put it there.
    pub owner: Guid,
    /// The certificate, digest or key.
    pub data: &'a [u8],
}

/// Reads the content of a variable of the signature database.
///
/// # Errors
/// Not whole lists from the first octet to the last.
pub fn signature_lists(content: &[u8]) -> Result<Vec<SignatureList<'_>>, DecodeError> {
    let mut reader = Reader::new("EFI_SIGNATURE_LIST", content, Order::Little);
    let mut lists = Vec::new();
    while reader.left() > 0 {
        let kind = Guid(reader.array()?);
        let (list, header, entry) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let size = |field, value: u32| usize::try_from(value).map_err(|_| reader.value(field, value));
        let (list_bytes, header_bytes) = (size("SignatureListSize", list)?, size("SignatureHeaderSize", header)?);
        let entry_bytes = size("SignatureSize", entry)?;
        let entries_bytes = list_bytes.checked_sub(LIST_HEADER_BYTES).and_then(|left| left.checked_sub(header_bytes));
        let Some(entries_bytes) = entries_bytes else { return Err(reader.value("SignatureListSize", list)) };
        if entry_bytes <= OWNER_BYTES || !entries_bytes.is_multiple_of(entry_bytes) {
            return Err(reader.value("SignatureSize", entry));
        }
        reader.bytes(header_bytes)?;
        let entries = reader.bytes(entries_bytes)?.chunks_exact(entry_bytes).map(|entry| {
            let (owner, data) = entry.split_at(OWNER_BYTES);
            let mut guid = [0; OWNER_BYTES];
            guid.copy_from_slice(owner);
            Signature { owner: Guid(guid), data }
        });
        lists.push(SignatureList { kind, entries: entries.collect() });
    }
    Ok(lists)
}

fn signatures(content: &[u8]) -> Option<Meaning> {
    let (mut certificates, mut image_digests, mut others) = (0, 0, 0);
    for list in signature_lists(content).ok()? {
        match list.kind {
            CERT_X509 => certificates += list.entries.len(),
            CERT_SHA256 => image_digests += list.entries.len(),
            _ => others += list.entries.len(),
        }
    }
    Some(Meaning::Signatures { certificates, image_digests, others })
}

fn order(content: &[u8]) -> Option<Meaning> {
    let whole = content.len().is_multiple_of(2) && content.len() <= 2 * MAX_OPTIONS;
    whole.then(|| Meaning::Order(content.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()))
}

/// `Boot` and four digits.
fn is_load_option(name: &str) -> bool {
    name.strip_prefix("Boot").is_some_and(|digits| digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// `EFI_LOAD_OPTION`.
fn load_option(content: &[u8]) -> Result<Meaning, DecodeError> {
    let mut reader = Reader::new("EFI_LOAD_OPTION", content, Order::Little);
    let (attributes, path_bytes) = (reader.u32()?, reader.u16()?);
    let units = reader.rest().chunks_exact(2).position(|unit| unit == [0, 0]);
    let units = units.ok_or_else(|| reader.value("Description", 0u32))?;
    let description = utf16(reader.bytes(2 * units)?);
    reader.bytes(2)?;
    let device_path = device_path::text(reader.bytes(usize::from(path_bytes))?);
    Ok(Meaning::LoadOption { active: attributes & LOAD_OPTION_ACTIVE != 0, description, device_path })
}

/// `EFI_CERT_X509_GUID`, a5c059a1-94e4-4aa7-87b5-ab155c2bf072.
pub const CERT_X509: Guid =
    Guid([0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72]);
/// `EFI_CERT_SHA256_GUID`, c1c41626-504c-4092-aca9-41f936934328.
pub const CERT_SHA256: Guid =
    Guid([0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28]);
const LOAD_OPTION_ACTIVE: u32 = 1;
const LIST_HEADER_BYTES: usize = 28;
const OWNER_BYTES: usize = 16;
/// More boot options than any machine has.
const MAX_OPTIONS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn list(kind: Guid, entry_bytes: u32, entries: &[u8]) -> Vec<u8> {
        let size = u32::try_from(LIST_HEADER_BYTES + entries.len()).unwrap();
        [&kind.0[..], &size.to_le_bytes(), &[0; 4], &entry_bytes.to_le_bytes(), entries].concat()
    }

    #[test]
    fn the_signature_database_is_read_list_by_list() {
        let content = [list(CERT_SHA256, 48, &[7; 96]), list(CERT_X509, 20, &[9; 20])].concat();
        let lists = signature_lists(&content).unwrap();
        assert_eq!((lists.len(), lists[0].entries.len(), lists[0].entries[1].data), (2, 2, &[7; 32][..]));
        assert_eq!(Meaning::of("dbx", &content).to_string(), "1 certificates, 2 image digests");
    }

    #[test]
    fn b7_lists_that_lie_about_their_sizes_are_none() {
        let honest = list(CERT_SHA256, 48, &[7; 96]);
        for (at, size) in [(16, 0u32), (16, 27), (16, u32::MAX), (20, u32::MAX), (24, 0), (24, 16), (24, 47)] {
            let mut lying = honest.clone();
            lying[at..at + 4].copy_from_slice(&size.to_le_bytes());
            assert!(signature_lists(&lying).is_err(), "{size:#x} at {at}");
            assert_eq!(Meaning::of("dbx", &lying), Meaning::Other);
        }
        assert!(signature_lists(&honest[..honest.len() - 1]).is_err());
    }

    #[test]
    fn boot_options_say_what_they_start() {
        let name: Vec<u8> = "UEFI PXE".encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
        let path = hex::decode("02010c00d041030a000000007fff0400").unwrap();
        let content = [&1u32.to_le_bytes()[..], &16u16.to_le_bytes(), &name, &path, b"extra"].concat();
        assert_eq!(Meaning::of("Boot0001", &content).to_string(), "UEFI PXE, PciRoot(0x0)");
        assert_eq!(Meaning::of("Boot0001", &content[..10]), Meaning::Other);
        assert_eq!(Meaning::of("BootOrder", &[1, 0, 0xff, 0]).to_string(), "0001 00FF");
        assert_eq!(Meaning::of("SecureBoot", &[1]).to_string(), "on");
        assert_eq!(Meaning::of("SecureBoot", &[2]), Meaning::Other);
    }
}
