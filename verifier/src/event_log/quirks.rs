//! Which events' digests are of the data that the log shows, by type, and which genuine firmware does it otherwise.
//!
//! | who (logs of the corpus) | what |
//! |---|---|
//! | UEFI with shim (`rhel`, `event-postcode`) | `EV_EFI_VARIABLE_AUTHORITY`: digest of neither data nor content |
//! | many, before PFP 1.05 | `EV_EFI_VARIABLE_BOOT`: digest of the variable's content, without GUID and name |
//! | GRUB | `EV_IPL`: the text has a prefix (`grub_cmd: `, `kernel_cmdline: `) that was not hashed |
//! | systemd-stub, Linux's EFI stub (`event-sd-boot-fedora37`) | `EV_IPL`, `EV_EVENT_TAG`: data names what was hashed |
//! | some servers | `EV_S_CRTM_VERSION`, `EV_POST_CODE`: digest of what the data names or points to |
//! | Lenovo (`thinkpad`) | some events have a digest for fewer banks than the Spec ID lists |
//!
//! A type not listed here has a digest of something that is not in the log (an image, a table).

use super::Event;
use super::data::EventData;
use super::event_type::EventType;
use assay_tpm::algorithm::HashAlgorithm;

/// How an event's data stands to its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataDigest {
    /// The data (or, by a quirk above, the content of the variable in it) hashes to the digest.
    Matches,
    /// By its type it should, and it does not: the data was changed, or the label.
    Differs,
    /// By its type the digest is of something else.
    NotOfData,
}

/// What an event type's digest is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Always of the data.
    Data,
    /// Of the data, or of the variable's content in it.
    Variable,
    /// Of the data on some firmware, of something else on other.
    Perhaps,
    /// Never of the data.
    Elsewhere,
}

pub(super) fn data_digest(event: &Event<'_>) -> DataDigest {
    let rule = rule(event.kind());
    if !event.is_extended() || rule == Rule::Elsewhere {
        return DataDigest::NotOfData;
    }
    let whole = hashes_to(event, event.logged_data());
    let content = || match event.decoded_data() {
        EventData::Variable { content, .. } => hashes_to(event, content),
        _ => false,
    };
    match rule {
        _ if whole => DataDigest::Matches,
        Rule::Variable if content() => DataDigest::Matches,
        Rule::Data | Rule::Variable => DataDigest::Differs,
        Rule::Perhaps | Rule::Elsewhere => DataDigest::NotOfData,
    }
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
        | EventType::EFI_VARIABLE_DRIVER_CONFIG => Rule::Data,
        EventType::EFI_VARIABLE_BOOT | EventType::EFI_VARIABLE_BOOT2 | EventType::EFI_VARIABLE_AUTHORITY => {
            Rule::Variable
        }
        EventType::S_CRTM_VERSION
        | EventType::POST_CODE
        | EventType::IPL
        | EventType::EVENT_TAG
        | EventType::COMPACT_HASH
        | EventType::OMIT_BOOT_DEVICE_EVENTS
        | EventType::PLATFORM_CONFIG_FLAGS
        | EventType::TABLE_OF_DEVICES => Rule::Perhaps,
        _ => Rule::Elsewhere,
    }
}
