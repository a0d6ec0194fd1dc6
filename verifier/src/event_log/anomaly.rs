//! What no genuine firmware's log has, whatever the policy: decided per event type, because the type and the data of an
//! event are not what was extended. Replay has vouched for digests, order and PCRs; here types and data are held
//! against those.
//!
//! | attack | what gives it away |
//! |---|---|
//! | an event relabelled | its type does not belong in its PCR; its data has not the shape of the type; an image whose digest is of its own description; a separator's digest under another label |
//! | data changed under its digest | the type's digest is of the data, and is not, and no [quirk](super::quirks) explains it |
//! | separators missing, doubled, of an error | their number and value in PCRs 0 to 7 |
//! | Secure Boot's configuration measured again | a variable twice in PCR 7, or after its separator |

use super::data::{EventData, is_text};
use super::event_type::EventType;
use super::quirks::DataDigest;
use super::{Event, Format, ReplayedLog, UnverifiedLog};
use crate::quote::short_hex;
use assay_tpm::algorithm::HashAlgorithm;
use std::collections::BTreeSet;
use std::fmt;

/// Something that no genuine firmware's log has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anomaly {
    /// In which PCR.
    pub pcr: u8,
    /// In which event; none if in their number.
    pub event: Option<usize>,
    what: String,
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl ReplayedLog<'_> {
    /// Everything in the events of `pcr` that no genuine firmware's log has.
    #[must_use]
    pub fn anomalies(&self, pcr: u8) -> Vec<Anomaly> {
        find(self.events_of(pcr), pcr)
    }
}

impl UnverifiedLog<'_> {
    /// The same of a log that nobody vouches for, to be shown: of the PCRs that it has events for, in a log of the
    /// SHA-256 bank.
    #[must_use]
    pub fn inspect_anomalies(&self) -> Vec<Anomaly> {
        if self.format() != Format::CryptoAgile || !self.banks().contains(&HashAlgorithm::Sha256) {
            return Vec::new();
        }
        let of =
            |pcr: u8| self.inspect().iter().filter(move |event| event.is_extended() && event.pcr() == u32::from(pcr));
        let extended = (0..=MOST_PCR).filter(|pcr| of(*pcr).next().is_some());
        extended.flat_map(|pcr| find(of(pcr), pcr)).collect()
    }
}

fn find<'e, 'a: 'e>(events: impl Iterator<Item = &'e Event<'a>>, pcr: u8) -> Vec<Anomaly> {
    let separators = Separators::new();
    let mut seen = 0;
    let mut variables = BTreeSet::new();
    let mut anomalies = Vec::new();
    for event in events {
        let mut odd = |what: &str| {
            let digest = event.digest(HashAlgorithm::Sha256).map_or_else(String::new, short_hex);
            let subject = format!("PCR {pcr} event {} ({}): digest {digest}", event.index(), event.kind());
            anomalies.push(Anomaly { pcr, event: Some(event.index()), what: format!("{subject} {what}") });
        };
        if SEPARATED_PCRS.contains(&pcr) {
            match separators.find(event) {
                Found::Separator => seen += 1,
                Found::NotItsDigest => {
                    seen += 1;
                    odd("is not a separator's, or of a firmware error");
                }
                Found::UnderAnotherLabel => {
                    seen += 1;
                    odd("is a separator's, under another label");
                }
                Found::Nothing => {}
            }
        }
        if pcr == SECURE_BOOT_PCR && event.kind() == EventType::EFI_VARIABLE_DRIVER_CONFIG {
            if seen > 0 {
                odd("is Secure Boot configuration after the separator");
            }
            if let EventData::Variable { guid, name, .. } = event.decoded_data()
                && !variables.insert((guid, name))
            {
                odd("is of a variable that was measured before");
            }
        }
        if let Some(what) = mislabelled(event, pcr) {
            odd(what);
        }
    }
    if SEPARATED_PCRS.contains(&pcr) && seen != 1 {
        let what = format!("PCR {pcr} has {seen} separators instead of one");
        anomalies.push(Anomaly { pcr, event: None, what });
    }
    anomalies
}

/// What shows that the label or the data is not what was measured.
fn mislabelled(event: &Event<'_>, pcr: u8) -> Option<&'static str> {
    if let Some((_, pcrs)) = PCRS_OF_TYPES.iter().find(|(kind, _)| *kind == event.kind())
        && !pcrs.contains(&pcr)
    {
        return Some("has a label that does not belong in this PCR");
    }
    match event.data_digest() {
        DataDigest::Differs if event.quirk().is_none() => {
            return Some("is not of the data in the log: data or label were changed");
        }
        DataDigest::Differs | DataDigest::Matches | DataDigest::NotOfData => {}
    }
    let data = event.logged_data();
    match event.kind() {
        // An image's digest is of the image. One of the description that stands in the log is another event's.
        EventType::EFI_BOOT_SERVICES_APPLICATION
        | EventType::EFI_BOOT_SERVICES_DRIVER
        | EventType::EFI_RUNTIME_SERVICES_DRIVER
        | EventType::EFI_PLATFORM_FIRMWARE_BLOB
        | EventType::EFI_PLATFORM_FIRMWARE_BLOB2
            if event.measured_data().is_some() =>
        {
            Some("is of the event's own description, and not of an image: its label was changed")
        }
        EventType::EFI_VARIABLE_DRIVER_CONFIG
        | EventType::EFI_VARIABLE_BOOT
        | EventType::EFI_VARIABLE_BOOT2
        | EventType::EFI_VARIABLE_AUTHORITY
            if !matches!(event.decoded_data(), EventData::Variable { .. }) =>
        {
            Some("is labelled as a variable's, and its data is none")
        }
        EventType::EFI_GPT_EVENT | EventType::EFI_GPT_EVENT2
            if !matches!(event.decoded_data(), EventData::Gpt { .. }) =>
        {
            Some("is labelled as a partition table's, and its data is none")
        }
        EventType::ACTION | EventType::EFI_ACTION if !is_text(data) => {
            Some("is labelled as an action, and its data is no text")
        }
        _ => None,
    }
}

/// Separators are known by their digest: a label can be taken off.
struct Separators {
    good: [[u8; 32]; 2],
    error: [u8; 32],
}

enum Found {
    Separator,
    NotItsDigest,
    UnderAnotherLabel,
    Nothing,
}

impl Separators {
    fn new() -> Self {
        let digest = |data: [u8; 4]| {
            let mut value = [0; 32];
            value.copy_from_slice(HashAlgorithm::Sha256.digest(&data).as_ref());
            value
        };
        Self { good: [digest([0; 4]), digest([0xff; 4])], error: digest([1, 0, 0, 0]) }
    }

    fn find(&self, event: &Event<'_>) -> Found {
        let digest = event.digest(HashAlgorithm::Sha256);
        let good = self.good.iter().any(|value| digest == Some(value));
        let error = digest == Some(&self.error);
        match (event.kind() == EventType::SEPARATOR, good) {
            (true, true) => Found::Separator,
            (true, false) => Found::NotItsDigest,
            (false, _) if good || error => Found::UnderAnotherLabel,
            (false, _) => Found::Nothing,
        }
    }
}

/// PCRs that firmware closes with a separator (PFP 1.06, section 3.3.4).
const SEPARATED_PCRS: std::ops::RangeInclusive<u8> = 0..=7;
const SECURE_BOOT_PCR: u8 = 7;
const MOST_PCR: u8 = 23;
/// Where the profile lets a type be extended (PFP 1.06, table 27 and section 3.3.4); types that may be anywhere, and
/// those that nobody knows, are not here.
const PCRS_OF_TYPES: &[(EventType, &[u8])] = &[
    (EventType::POST_CODE, &[0]),
    (EventType::POST_CODE2, &[0]),
    (EventType::S_CRTM_CONTENTS, &[0]),
    (EventType::S_CRTM_VERSION, &[0]),
    (EventType::EFI_HCRTM_EVENT, &[0]),
    (EventType::NONHOST_CODE, &[0, 2]),
    (EventType::NONHOST_CONFIG, &[1, 3]),
    (EventType::CPU_MICROCODE, &[0, 1]),
    (EventType::PLATFORM_CONFIG_FLAGS, &[1, 3]),
    (EventType::TABLE_OF_DEVICES, &[1, 3]),
    (EventType::EFI_HANDOFF_TABLES, &[1]),
    (EventType::EFI_HANDOFF_TABLES2, &[1]),
    (EventType::EFI_PLATFORM_FIRMWARE_BLOB, &[0, 2, 4]),
    (EventType::EFI_PLATFORM_FIRMWARE_BLOB2, &[0, 2, 4]),
    (EventType::EFI_BOOT_SERVICES_DRIVER, &[0, 2]),
    (EventType::EFI_RUNTIME_SERVICES_DRIVER, &[0, 2]),
    (EventType::EFI_BOOT_SERVICES_APPLICATION, &[2, 4]),
    (EventType::EFI_GPT_EVENT, &[5]),
    (EventType::EFI_GPT_EVENT2, &[5]),
    (EventType::EFI_VARIABLE_DRIVER_CONFIG, &[1, 3, 5, 7]),
    (EventType::EFI_VARIABLE_BOOT, &[1, 5]),
    (EventType::EFI_VARIABLE_BOOT2, &[1, 5]),
    (EventType::EFI_VARIABLE_AUTHORITY, &[7]),
    (EventType::EFI_SPDM_FIRMWARE_BLOB, &[2]),
    (EventType::EFI_SPDM_FIRMWARE_CONFIG, &[3]),
    (EventType::EFI_SPDM_DEVICE_POLICY, &[7]),
    (EventType::EFI_SPDM_DEVICE_AUTHORITY, &[7]),
];
