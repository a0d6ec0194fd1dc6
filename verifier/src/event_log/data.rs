//! Event data by type (PFP 1.06, section 10.2 and 10.4), decoded to be shown. Nested lengths are compared with what is
//! there; data that is not what its type says is [`EventData::Raw`], never an error: the log is not refused for it,
//! because nothing is decided by it.

use super::device_path;
use super::event_type::EventType;
use super::parse::STARTUP_LOCALITY;
use assay_tpm::reader::{DecodeError, Order, Reader};
use std::fmt;

/// What an event's data says.
#[derive(Debug, Clone, PartialEq, Eq)]
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
        /// Its content.
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
    /// A separator: 0 or 0xffffffff before the operating system, 1 for a firmware error.
    Separator(u32),
    /// `TCG_PCClientTaggedEvent`.
    Tagged {
        /// Whose.
        id: u32,
        /// What.
        content: &'a [u8],
    },
    /// Text: actions, versions, what boot loaders write.
    Text(String),
    /// Anything else.
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
            | EventType::EFI_VARIABLE_AUTHORITY => variable(data),
            EventType::EFI_BOOT_SERVICES_APPLICATION
            | EventType::EFI_BOOT_SERVICES_DRIVER
            | EventType::EFI_RUNTIME_SERVICES_DRIVER => image_load(data),
            EventType::EFI_PLATFORM_FIRMWARE_BLOB => firmware_blob(data, false),
            EventType::EFI_PLATFORM_FIRMWARE_BLOB2 => firmware_blob(data, true),
            EventType::SEPARATOR => separator(data),
            EventType::EVENT_TAG => tagged(data),
            EventType::ACTION | EventType::EFI_ACTION | EventType::IPL | EventType::S_CRTM_VERSION => Ok(text(data)),
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
            Self::Variable { guid, name, content } => write!(f, "{} ({guid}), {} octets", shown(name), content.len()),
            Self::ImageLoad { length, device_path, .. } if device_path.is_empty() => {
                write!(f, "image from memory ({length} octets)")
            }
            Self::ImageLoad { length, device_path, .. } => write!(f, "{} ({length} octets)", shown(device_path)),
            Self::FirmwareBlob { description, address, length } => {
                write!(f, "{}{length} octets at {address:#x}", shown(description))
            }
            Self::Separator(value) => write!(f, "{value:#010x}"),
            Self::Tagged { id, content } => write!(f, "tag {id:#010x}, {} octets", content.len()),
            Self::Text(text) => write!(f, "{}", shown(text)),
            Self::Raw(data) => write!(f, "{} octets", data.len()),
        }
    }
}

/// A GUID as UEFI stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guid(pub [u8; 16]);

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
    Ok(EventData::Variable { guid, name, content })
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
    Ok(EventData::Tagged { id, content: reader.bytes(bytes)? })
}

/// UTF-16 if every second octet is zero, as for every text that firmware writes; else UTF-8.
fn text(data: &[u8]) -> EventData<'_> {
    let wide =
        data.len() >= 2 && data.len().is_multiple_of(2) && data.iter().skip(1).step_by(2).all(|octet| *octet == 0);
    let text = if wide { utf16(data) } else { String::from_utf8_lossy(data).into_owned() };
    EventData::Text(text.trim_end_matches('\0').to_owned())
}

pub(super) fn utf16(octets: &[u8]) -> String {
    let units = octets.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

const MAX_SHOWN_CHARS: usize = 256;
