//! Event data by type (PFP 1.06, section 10.2 and 10.4), decoded to be shown. Nested lengths are compared with what is
//! there; data that is not what its type says is [`EventData::Raw`], never an error: the log is not refused for it here.
//! What is decided by the shape of data is in [`super::anomaly`].

use super::device_path;
use super::event_type::EventType;
use super::gpt;
use super::parse::STARTUP_LOCALITY;
use super::variable::Meaning;
use assay_tpm::reader::{DecodeError, Order, Reader};
use serde::{Serialize, Serializer};
use std::fmt;

pub use super::gpt::Partition;

/// What an event's data says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", content = "value", rename_all = "kebab-case")]
pub enum EventData<'a> {
    /// `EV_NO_ACTION` with the locality of `TPM2_Startup`.
    StartupLocality(u8),
    /// Any other `EV_NO_ACTION`, by its 16 octets of signature.
    NoAction(String),
    /// `UEFI_VARIABLE_DATA`.
    Variable {
        /// The variable's vendor GUID.
        guid: Guid,
        /// Its name.
        name: String,
        /// What its content means, where the name says so.
        means: Meaning,
        /// Its content.
        #[serde(serialize_with = "as_hex")]
        content: &'a [u8],
    },
    /// `UEFI_IMAGE_LOAD_EVENT`.
    ImageLoad {
        /// Where it was loaded.
        address: u64,
        /// Its size in memory.
        length: u64,
        /// Where it came from, in UEFI's text form.
        device_path: String,
    },
    /// `UEFI_PLATFORM_FIRMWARE_BLOB` and its successor.
    FirmwareBlob {
        /// What it is, if it says so.
        description: String,
        /// Where it is.
        address: u64,
        /// Its size.
        length: u64,
    },
    /// `UEFI_GPT_DATA`: a disk's partitions.
    Gpt {
        /// The disk's GUID.
        disk: Guid,
        /// Its partitions.
        partitions: Vec<Partition>,
    },
    /// `UEFI_HANDOFF_TABLE_POINTERS` and its successor.
    HandoffTables {
        /// What they are, if the event says so.
        description: String,
        /// Each by its GUID: SMBIOS, ACPI and the like.
        tables: Vec<Guid>,
    },
    /// `TCG_DEVICE_SECURITY_EVENT_DATA`: what a device measured itself, over SPDM.
    DeviceSecurity {
        /// The structure's version.
        version: u16,
        /// Where the device is: `pci`, `usb` or a number.
        device: String,
    },
    /// A separator: 0 or 0xffffffff before the operating system, 1 for a firmware error.
    Separator(u32),
    /// `TCG_PCClientTaggedEvent`.
    Tagged {
        /// Whose.
        id: u32,
        /// Its content, where it is text.
        text: String,
        /// What.
        #[serde(serialize_with = "as_hex")]
        content: &'a [u8],
    },
    /// Text: actions, versions, what boot loaders write.
    Text(String),
    /// Anything else.
    #[serde(serialize_with = "as_hex")]
    Raw(&'a [u8]),
}

impl<'a> EventData<'a> {
    /// Decodes `data` as an event of the type has it.
    #[must_use]
    pub fn decode(kind: EventType, data: &'a [u8]) -> Self {
        let decoded = match kind {
            EventType::NO_ACTION => Ok(no_action(data)),
            EventType::EFI_VARIABLE_DRIVER_CONFIG
            | EventType::EFI_VARIABLE_BOOT
            | EventType::EFI_VARIABLE_BOOT2
            | EventType::EFI_VARIABLE_AUTHORITY
            | EventType::EFI_SPDM_DEVICE_POLICY
            | EventType::EFI_SPDM_DEVICE_AUTHORITY => variable(data),
            EventType::EFI_BOOT_SERVICES_APPLICATION
            | EventType::EFI_BOOT_SERVICES_DRIVER
            | EventType::EFI_RUNTIME_SERVICES_DRIVER => image_load(data),
            EventType::EFI_PLATFORM_FIRMWARE_BLOB => firmware_blob(data, false),
            EventType::EFI_PLATFORM_FIRMWARE_BLOB2 | EventType::POST_CODE2 => firmware_blob(data, true),
            EventType::EFI_GPT_EVENT | EventType::EFI_GPT_EVENT2 => {
                gpt::decode(data).map(|(disk, partitions)| Self::Gpt { disk, partitions })
            }
            EventType::EFI_HANDOFF_TABLES | EventType::TABLE_OF_DEVICES => handoff_tables(data, false),
            EventType::EFI_HANDOFF_TABLES2 => handoff_tables(data, true),
            EventType::EFI_SPDM_FIRMWARE_BLOB | EventType::EFI_SPDM_FIRMWARE_CONFIG => device_security(data),
            EventType::SEPARATOR => separator(data),
            EventType::EVENT_TAG => tagged(data),
            EventType::ACTION
            | EventType::EFI_ACTION
            | EventType::EFI_HCRTM_EVENT
            | EventType::IPL
            | EventType::OMIT_BOOT_DEVICE_EVENTS
            | EventType::S_CRTM_VERSION => Ok(text(data)),
            // Text by the profile's own examples (`ACPI DATA`), or a blob's place.
            EventType::POST_CODE
            | EventType::S_CRTM_CONTENTS
            | EventType::CPU_MICROCODE
            | EventType::COMPACT_HASH
            | EventType::NONHOST_CODE
            | EventType::NONHOST_CONFIG
            | EventType::NONHOST_INFO
            | EventType::PLATFORM_CONFIG_FLAGS => {
                if is_text(data) {
                    Ok(text(data))
                } else {
                    firmware_blob(data, false)
                }
            }
            _ => Ok(Self::Raw(data)),
        };
        decoded.unwrap_or(Self::Raw(data))
    }
}

impl fmt::Display for EventData<'_> {
    /// One line, without control characters, of bounded length.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StartupLocality(locality) => write!(f, "startup locality {locality}"),
            Self::NoAction(signature) => write!(f, "{}", shown(signature)),
            Self::Variable { guid, name, content, means: Meaning::Other } => {
                write!(f, "{} ({guid}), {} octets", shown(name), content.len())
            }
            Self::Variable { name, means, .. } => write!(f, "{}: {means}", shown(name)),
            Self::ImageLoad { length, device_path, .. } if device_path.is_empty() => {
                write!(f, "image from memory ({length} octets)")
            }
            Self::ImageLoad { length, device_path, .. } => write!(f, "{} ({length} octets)", shown(device_path)),
            Self::FirmwareBlob { description, address, length } => {
                write!(f, "{}{length} octets at {address:#x}", shown(description))
            }
            Self::Gpt { disk, partitions } => write!(f, "disk {disk}, {} partitions", partitions.len()),
            Self::HandoffTables { description, tables } => {
                write!(f, "{}{} tables", shown(description), tables.len())?;
                tables.iter().take(MAX_SHOWN_TABLES).try_for_each(|table| write!(f, " {table}"))
            }
            Self::DeviceSecurity { version, device } => write!(f, "SPDM device ({device}), version {version}"),
            Self::Separator(value) => write!(f, "{value:#010x}"),
            Self::Tagged { id, text, .. } if !text.is_empty() => write!(f, "tag {id:#010x}: {}", shown(text)),
            Self::Tagged { id, content, .. } => write!(f, "tag {id:#010x}, {} octets", content.len()),
            Self::Text(text) => write!(f, "{}", shown(text)),
            Self::Raw(data) => write!(f, "{} octets", data.len()),
        }
    }
}

/// A GUID as UEFI stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Guid(pub [u8; 16]);

impl Serialize for Guid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let g = &self.0;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{}-{}",
            u32::from_le_bytes([g[0], g[1], g[2], g[3]]),
            u16::from_le_bytes([g[4], g[5]]),
            u16::from_le_bytes([g[6], g[7]]),
            hex::encode(&g[8..10]),
            hex::encode(&g[10..])
        )
    }
}

/// Text from a node, made fit to print: control characters escaped, cut at a bound.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(MAX_SHOWN_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX_SHOWN_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

fn no_action(data: &[u8]) -> EventData<'_> {
    match data.strip_prefix(STARTUP_LOCALITY) {
        Some([locality]) => EventData::StartupLocality(*locality),
        _ => {
            let signature = &data[..data.len().min(16)];
            EventData::NoAction(String::from_utf8_lossy(signature).trim_end_matches('\0').to_owned())
        }
    }
}

fn variable(data: &[u8]) -> Result<EventData<'_>, DecodeError> {
    let mut reader = Reader::new("UEFI_VARIABLE_DATA", data, Order::Little);
    let guid = Guid(reader.array()?);
    let (name_units, content_bytes) = (reader.u64()?, reader.u64()?);
    let bytes = |count: u64, unit: usize| usize::try_from(count).ok().and_then(|count| count.checked_mul(unit));
    let name = bytes(name_units, 2).ok_or_else(|| reader.value("UnicodeNameLength", name_units))?;
    let name = utf16(reader.bytes(name)?);
    let content = bytes(content_bytes, 1).ok_or_else(|| reader.value("VariableDataLength", content_bytes))?;
    let content = reader.bytes(content)?;
    Ok(EventData::Variable { means: Meaning::of(&name, content), guid, name, content })
}

fn image_load(data: &[u8]) -> Result<EventData<'_>, DecodeError> {
    let mut reader = Reader::new("UEFI_IMAGE_LOAD_EVENT", data, Order::Little);
    let (address, length, _link_time) = (reader.u64()?, reader.u64()?, reader.u64()?);
    let path_bytes = reader.u64()?;
    let bytes = usize::try_from(path_bytes).map_err(|_| reader.value("LengthOfDevicePath", path_bytes))?;
    let device_path = device_path::text(reader.bytes(bytes)?);
    Ok(EventData::ImageLoad { address, length, device_path })
}

fn firmware_blob(data: &[u8], described: bool) -> Result<EventData<'_>, DecodeError> {
    let mut reader = Reader::new("UEFI_PLATFORM_FIRMWARE_BLOB", data, Order::Little);
    let mut description = String::new();
    if described {
        let size = usize::from(reader.u8()?);
        description = String::from_utf8_lossy(reader.bytes(size)?).trim_end_matches('\0').to_owned() + ": ";
    }
    Ok(EventData::FirmwareBlob { description, address: reader.u64()?, length: reader.u64()? })
}

fn handoff_tables(data: &[u8], described: bool) -> Result<EventData<'_>, DecodeError> {
    let mut reader = Reader::new("UEFI_HANDOFF_TABLE_POINTERS", data, Order::Little);
    let mut description = String::new();
    if described {
        let size = usize::from(reader.u8()?);
        description = String::from_utf8_lossy(reader.bytes(size)?).trim_end_matches('\0').to_owned() + ": ";
    }
    let count = reader.u64()?;
    let mut tables = Vec::new();
    for _ in 0..count {
        let (guid, _address) = (reader.array()?, reader.u64()?);
        tables.push(Guid(guid));
    }
    reader.finish()?;
    Ok(EventData::HandoffTables { description, tables })
}

fn device_security(data: &[u8]) -> Result<EventData<'_>, DecodeError> {
    let mut reader = Reader::new("TCG_DEVICE_SECURITY_EVENT_DATA", data, Order::Little);
    let signature: [u8; 16] = reader.array()?;
    let version = reader.u16()?;
    match &signature {
        b"SPDM Device Sec\0" => reader.bytes(2 + 4)?, // length, hash algorithm
        b"SPDM Device Sec2" => reader.bytes(2 + 4)?,  // state of authentication, reserved, length
        _ => return Err(reader.value("signature", signature[0])),
    };
    let device = match reader.u32()? {
        1 => "pci".to_owned(),
        2 => "usb".to_owned(),
        other => other.to_string(),
    };
    Ok(EventData::DeviceSecurity { version, device })
}

fn separator(data: &[u8]) -> Result<EventData<'_>, DecodeError> {
    let mut reader = Reader::new("EV_SEPARATOR", data, Order::Little);
    let value = reader.u32()?;
    reader.finish()?;
    Ok(EventData::Separator(value))
}

fn tagged(data: &[u8]) -> Result<EventData<'_>, DecodeError> {
    let mut reader = Reader::new("TCG_PCClientTaggedEvent", data, Order::Little);
    let (id, size) = (reader.u32()?, reader.u32()?);
    let bytes = usize::try_from(size).map_err(|_| reader.value("taggedEventDataSize", size))?;
    let content = reader.bytes(bytes)?;
    let text = if is_text(content) { plain(content) } else { String::new() };
    Ok(EventData::Tagged { id, text, content })
}

fn text(data: &[u8]) -> EventData<'_> {
    EventData::Text(plain(data))
}

/// UTF-16 if every second octet is zero, as for every text that firmware writes; else UTF-8.
fn plain(data: &[u8]) -> String {
    let text = if is_wide(data) { utf16(data) } else { String::from_utf8_lossy(data).into_owned() };
    text.trim_end_matches('\0').to_owned()
}

fn is_wide(data: &[u8]) -> bool {
    data.len() >= 2 && data.len().is_multiple_of(2) && data.iter().skip(1).step_by(2).all(|octet| *octet == 0)
}

/// Whether all of it, but zeros at the end, can be printed.
pub(super) fn is_text(data: &[u8]) -> bool {
    let text = plain(data);
    !text.is_empty() && !text.contains(char::REPLACEMENT_CHARACTER) && !text.chars().any(char::is_control)
}

fn as_hex<S: Serializer>(octets: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&hex::encode(octets))
}

pub(super) fn utf16(octets: &[u8]) -> String {
    let units = octets.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

const MAX_SHOWN_CHARS: usize = 256;
const MAX_SHOWN_TABLES: usize = 4;
