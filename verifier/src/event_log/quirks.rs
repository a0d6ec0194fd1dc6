//! Which events' digests are of the data that the log shows, by type; and, by name, where genuine firmware and boot
//! loaders do it otherwise. Every quirk was seen in the log of a real machine or virtual machine.
//!
//! A type that has no rule here has a digest of something that is not in the log (an image, a table).

use super::Event;
use super::data::EventData;
use super::event_type::EventType;
use assay_tpm::algorithm::HashAlgorithm;

/// How an event's data stands to its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataDigest {
    /// The data (or, by a quirk, the part of it that was measured) hashes to the digest.
    Matches,
    /// By its type it should, and it does not: by a quirk, or the data was changed, or the label.
    Differs,
    /// By its type the digest is of something else.
    NotOfData,
}

/// A habit of genuine firmware or boot loaders.
#[derive(Debug, PartialEq, Eq)]
pub struct Quirk {
    /// Its name, in tables, JSON and tests.
    pub name: &'static str,
    /// Who does it, and what.
    pub about: &'static str,
}

/// PFP before 1.05: `EV_EFI_VARIABLE_BOOT` is measured without the variable's GUID and name.
pub const BOOT_VARIABLE_CONTENT: Quirk = Quirk {
    name: "boot-variable-content",
    about: "EDK2 before 2021 and its descendants: digest of the boot variable's content, without GUID and name",
};
/// GRUB logs `grub_cmd: set x` and measures `set x`.
pub const GRUB_PREFIX: Quirk = Quirk {
    name: "grub-prefix",
    about: "GRUB: the text begins with a prefix and ends with a zero that were not hashed",
};
/// shim before 15.5 logs its variable `Shim` with a digest of neither data nor content (`rhel`, `event-postcode`).
pub const SHIM_AUTHORITY: Quirk = Quirk {
    name: "shim-authority",
    about: "shim before 15.5: the authority `Shim` is logged with a digest of neither data nor content",
};
/// A tagged event may name what was hashed: Linux's EFI stub (`Linux initrd`), systemd-stub.
pub const TAG_NAMES_CONTENT: Quirk = Quirk {
    name: "tag-names-content",
    about: "Linux's EFI stub and systemd-stub: the tagged event names what was hashed, and does not hold it",
};
/// Some servers' `EV_S_CRTM_VERSION` is of what the version stands for.
pub const CRTM_VERSION_ELSEWHERE: Quirk = Quirk {
    name: "crtm-version-elsewhere",
    about: "some servers: the version's digest is of what the data names, not of the data",
};
/// Windows closes its stretch of the log with an event for PCR 0xffffffff, which has a digest and is extended nowhere
/// (`ideapad`, `thinkpad`).
pub const TRUST_POINT: Quirk = Quirk {
    name: "windows-trust-point",
    about: "Windows: an EV_NO_ACTION for PCR 0xffffffff with a digest closes its measurements",
};
/// Lenovo's firmware and Windows measure into some banks only (`thinkpad`).
pub const BANK_GAP: Quirk = Quirk {
    name: "bank-gap",
    about: "Windows on some laptops: events lack a digest for a bank that the Spec ID lists",
};

/// Every quirk.
pub const ALL: [&Quirk; 7] = [
    &BOOT_VARIABLE_CONTENT,
    &GRUB_PREFIX,
    &SHIM_AUTHORITY,
    &TAG_NAMES_CONTENT,
    &CRTM_VERSION_ELSEWHERE,
    &TRUST_POINT,
    &BANK_GAP,
];

impl Quirk {
    /// Whether the event is what Windows ends its log with.
    pub(super) fn is(&self, event: &Event<'_>) -> bool {
        *self == TRUST_POINT && !event.is_extended() && event.pcr() == u32::MAX
    }
}

/// What an event type's digest is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Of the data.
    Data,
    /// Of the data, or of a variable's content in it.
    BootVariable,
    /// Of the data; shim's is of something else.
    Authority,
    /// Of the data, or of its text behind a prefix; else of what it names.
    Text,
    /// Of the data on some firmware, and else by the quirk of something else.
    DataOr(&'static Quirk),
    /// Of the data on some firmware, of something else on other.
    Perhaps,
    /// Never of the data.
    Elsewhere,
}

/// How data and digest of the event stand, and by which quirk if by one.
pub(super) fn judge(event: &Event<'_>) -> (DataDigest, Option<&'static Quirk>) {
    if !event.is_extended() {
        return (DataDigest::NotOfData, TRUST_POINT.is(event).then_some(&TRUST_POINT));
    }
    let rule = rule(event.kind());
    if rule == Rule::Elsewhere {
        return (DataDigest::NotOfData, None);
    }
    if hashes_to(event, event.logged_data()) {
        return (DataDigest::Matches, None);
    }
    match rule {
        Rule::Data => (DataDigest::Differs, None),
        Rule::BootVariable => match event.decoded_data() {
            EventData::Variable { content, .. } if hashes_to(event, content) => {
                (DataDigest::Matches, Some(&BOOT_VARIABLE_CONTENT))
            }
            _ => (DataDigest::Differs, None),
        },
        Rule::Authority => (DataDigest::Differs, is_shim(event).then_some(&SHIM_AUTHORITY)),
        Rule::Text => match measured_text(event.logged_data()) {
            Some(text) if hashes_to(event, text) => (DataDigest::Matches, Some(&GRUB_PREFIX)),
            Some(_) => (DataDigest::Differs, None),
            None => (DataDigest::NotOfData, None),
        },
        Rule::DataOr(quirk) => (DataDigest::Differs, Some(quirk)),
        Rule::Perhaps | Rule::Elsewhere => (DataDigest::NotOfData, None),
    }
}

/// The part of GRUB's text that GRUB hashed, if it is GRUB's.
pub(super) fn measured_text(data: &[u8]) -> Option<&[u8]> {
    let text = GRUB_PREFIXES.iter().find_map(|prefix| data.strip_prefix(*prefix))?;
    Some(text.strip_suffix(&[0]).unwrap_or(text))
}

fn is_shim(event: &Event<'_>) -> bool {
    matches!(event.decoded_data(), EventData::Variable { name, .. } if name == "Shim")
}

/// Whether `data` hashes to the event's digest in every bank that it has.
fn hashes_to(event: &Event<'_>, data: &[u8]) -> bool {
    HashAlgorithm::ALL
        .into_iter()
        .all(|bank| event.digest(bank).is_none_or(|digest| bank.digest(data).as_ref() == digest))
}

fn rule(kind: EventType) -> Rule {
    match kind {
        EventType::SEPARATOR
        | EventType::ACTION
        | EventType::EFI_ACTION
        | EventType::EFI_GPT_EVENT
        | EventType::EFI_GPT_EVENT2
        | EventType::EFI_VARIABLE_BOOT2
        | EventType::EFI_VARIABLE_DRIVER_CONFIG => Rule::Data,
        EventType::EFI_VARIABLE_BOOT => Rule::BootVariable,
        EventType::EFI_VARIABLE_AUTHORITY => Rule::Authority,
        EventType::IPL => Rule::Text,
        EventType::EVENT_TAG => Rule::DataOr(&TAG_NAMES_CONTENT),
        EventType::S_CRTM_VERSION => Rule::DataOr(&CRTM_VERSION_ELSEWHERE),
        EventType::EFI_BOOT_SERVICES_APPLICATION
        | EventType::EFI_BOOT_SERVICES_DRIVER
        | EventType::EFI_RUNTIME_SERVICES_DRIVER
        | EventType::EFI_PLATFORM_FIRMWARE_BLOB
        | EventType::EFI_PLATFORM_FIRMWARE_BLOB2
        | EventType::EFI_HANDOFF_TABLES
        | EventType::EFI_HANDOFF_TABLES2
        | EventType::S_CRTM_CONTENTS
        | EventType::CPU_MICROCODE => Rule::Elsewhere,
        _ => Rule::Perhaps,
    }
}

/// What GRUB puts before the text that it measures into PCR 8 (`grub-core/lib/verifiers`, `commands/tpm.c`).
const GRUB_PREFIXES: [&[u8]; 3] = [b"grub_cmd: ", b"kernel_cmdline: ", b"module_cmdline: "];
