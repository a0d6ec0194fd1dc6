//! Reference Values (RFC 9334) of what boots: the digests that firmware and systemd-stub will extend, computed from the
//! artefacts themselves. The verifier's policy takes them from `reference-values.json`.

use super::uki::{UkiError, check_command_line};

use crate::settings::sha256;
use authenticode::{PeTrait, authenticode_digest};
use object::LittleEndian;
use object::read::pe::PeFile64;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// The name under which iPXE passes the command line on: it prefixes the last part of the URL (systemd#35608).
pub const UKI_FILE_NAME: &str = "agent.efi";

/// The sections that systemd-stub 252 measures, in its order.
const MEASURED_SECTIONS: [&str; 4] = [".linux", ".osrel", ".cmdline", ".initrd"];

/// The Reference Values of one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceValues {
    /// What policies call the image.
    pub name: String,
    /// The command line that the boot program must pass.
    pub command_line: String,
    /// What is extended, PCR by PCR, in order.
    pub events: Vec<ReferenceEvent>,
}

/// One event that this image causes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceEvent {
    /// The PCR.
    pub pcr: u8,
    /// The event's type (TCG PC Client Platform Firmware Profile, section 10.4.1).
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// The digest extended, SHA-256, hexadecimal.
    pub sha256: String,
    /// What it is of.
    pub description: String,
}

/// The event types that an image causes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventKind {
    /// A PE image was loaded: its Authenticode digest.
    #[serde(rename = "EV_EFI_BOOT_SERVICES_APPLICATION")]
    BootServicesApplication,
    /// A boot program measured something: here systemd-stub.
    #[serde(rename = "EV_IPL")]
    Ipl,
}

impl EventKind {
    /// Its name in the specification.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BootServicesApplication => "EV_EFI_BOOT_SERVICES_APPLICATION",
            Self::Ipl => "EV_IPL",
        }
    }
}

impl ReferenceValues {
    /// Computes them from the UKI, the program that firmware boots before it, and the command line which that passes.
    ///
    /// # Errors
    /// See [`ReferenceError`].
    pub fn compute(name: &str, uki: &[u8], loader: &[u8], command_line: &str) -> Result<Self, ReferenceError> {
        check_command_line(command_line)?;
        let pe = parse(uki, "the UKI")?;
        let linux = section(&pe, ".linux").ok_or(ReferenceError::NoSection { section: ".linux" })?;
        let application = |digest, description: &str| ReferenceEvent {
            pcr: 4,
            kind: EventKind::BootServicesApplication,
            sha256: hex::encode(digest),
            description: description.to_owned(),
        };
        let mut events = vec![
            application(authenticode(&parse(loader, "the loader")?, "the loader")?, "snponly.efi (iPXE)"),
            // iPXE loads an image once to see whether firmware takes it, unloads it, and loads it again to start it;
            // firmware measures both times.
            application(authenticode(&pe, "the UKI")?, "agent.efi (UKI), tried by iPXE"),
            application(authenticode(&pe, "the UKI")?, "agent.efi (UKI), started by iPXE"),
            application(authenticode(&parse(linux, "the kernel")?, "the kernel")?, "Linux kernel of the UKI"),
        ];
        for name in MEASURED_SECTIONS {
            let content = section(&pe, name).ok_or(ReferenceError::NoSection { section: name })?;
            let with_zero = [name.as_bytes(), &[0]].concat();
            events.push(ipl(11, sha256(&with_zero), format!("systemd-stub: name of section {name}")));
            events.push(ipl(11, sha256(content), format!("systemd-stub: section {name}")));
        }
        let passed = format!("{UKI_FILE_NAME} {command_line}");
        events.push(ipl(12, sha256(&utf16_with_zero(&passed)), format!("systemd-stub: command line `{passed}`")));
        Ok(Self { name: name.to_owned(), command_line: command_line.to_owned(), events })
    }

    /// The value of a PCR that starts at zero and into which nothing but these events goes.
    #[must_use]
    pub fn pcr(&self, pcr: u8) -> [u8; 32] {
        self.events.iter().filter(|event| event.pcr == pcr).fold([0; 32], |value, event| {
            // Ours are always 64 digits; a file that was edited may hold anything, and then matches nothing.
            sha256(&[value.as_slice(), &hex::decode(&event.sha256).unwrap_or_default()].concat())
        })
    }

    /// The file that policies read.
    ///
    /// # Errors
    /// If it cannot be written as JSON.
    pub fn to_json(&self) -> Result<String, ReferenceError> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}

/// Why there are no Reference Values.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// Not an executable.
    #[error("computing reference values: {what} is not a PE executable")]
    NotPe {
        /// Which artefact.
        what: &'static str,
    },
    /// An executable without what we measure.
    #[error("computing reference values: the UKI has no section {section}")]
    NoSection {
        /// Its name.
        section: &'static str,
    },
    /// A command line that cannot be passed on.
    #[error(transparent)]
    CommandLine(#[from] UkiError),
    /// Not written.
    #[error("writing reference values")]
    Json(#[from] serde_json::Error),
}

fn ipl(pcr: u8, digest: [u8; 32], description: String) -> ReferenceEvent {
    ReferenceEvent { pcr, kind: EventKind::Ipl, sha256: hex::encode(digest), description }
}

fn parse<'a>(file: &'a [u8], what: &'static str) -> Result<PeFile64<'a>, ReferenceError> {
    PeFile64::parse(file).map_err(|_| ReferenceError::NotPe { what })
}

fn authenticode(pe: &dyn PeTrait, what: &'static str) -> Result<[u8; 32], ReferenceError> {
    let mut hash = Sha256::new();
    authenticode_digest(pe, &mut hash).map_err(|_| ReferenceError::NotPe { what })?;
    Ok(hash.finalize().into())
}

/// A section as it stands in memory: `VirtualSize` octets, without the file's padding.
fn section<'a>(pe: &PeFile64<'a>, name: &str) -> Option<&'a [u8]> {
    let section = pe.section_table().iter().find(|section| section.raw_name() == name.as_bytes())?;
    let data = section.pe_data(pe.data()).ok()?;
    data.get(..usize::try_from(section.virtual_size.get(LittleEndian)).ok()?)
}

/// As the stub measures `LoadOptions`: UTF-16, little-endian, with the zero at its end.
fn utf16_with_zero(text: &str) -> Vec<u8> {
    text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_command_line_is_measured_as_utf16_with_its_zero() {
        assert_eq!(utf16_with_zero("ab"), [b'a', 0, b'b', 0, 0, 0]);
    }

    #[test]
    fn a_pcr_is_the_fold_of_its_events() {
        let event = |pcr, byte: u8| ipl(pcr, [byte; 32], String::new());
        let values = ReferenceValues {
            name: "test".to_owned(),
            command_line: "quiet".to_owned(),
            events: vec![event(11, 1), event(12, 9), event(11, 2)],
        };
        let first = sha256(&[[0_u8; 32], [1; 32]].concat());
        assert_eq!(values.pcr(11), sha256(&[first, [2; 32]].concat()));
        assert_eq!(values.pcr(5), [0; 32]);
    }

    #[test]
    fn the_file_round_trips() {
        let values = ReferenceValues {
            name: "default".to_owned(),
            command_line: "quiet".to_owned(),
            events: vec![ipl(11, [7; 32], "x".to_owned())],
        };
        let json = values.to_json().unwrap();
        assert!(json.contains(r#""type": "EV_IPL""#), "{json}");
        assert_eq!(serde_json::from_str::<ReferenceValues>(&json).unwrap(), values);
    }

    proptest! {
        #[test]
        fn never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), pe: bool) {
            if pe && bytes.len() > 0x100 {
                bytes[..2].copy_from_slice(b"MZ");
                bytes[0x3c..0x40].copy_from_slice(&[0x40, 0, 0, 0]);
                bytes[0x40..0x46].copy_from_slice(b"PE\0\0\x64\x86");
            }
            prop_assert!(ReferenceValues::compute("x", &bytes, &bytes, "quiet").is_err());
        }
    }
}
