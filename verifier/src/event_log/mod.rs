//! The firmware's event log (TCG PC Client Platform Firmware Profile, section 10): what was extended into the PCRs.
//!
//! The log travels with no integrity protection of its own. What establishes trust in it is *replay*: the digests,
//! extended again in order, must give the PCR values of a [`VerifiedQuote`](crate::quote::VerifiedQuote). So parsing
//! gives an [`UnverifiedLog`], which can only be shown or replayed, and [`UnverifiedLog::replay`] is the one maker of a
//! [`ReplayedLog`], whose events appraisal may use.
//!
//! Replay vouches for the digests, their order and their PCRs. It does not vouch for an event's type or data: those
//! count only where the data hashes to the digest ([`Event::measured_data`]).

pub mod anomaly;
pub mod data;
pub mod event_type;
pub mod quirks;
pub mod variable;

mod device_path;
mod gpt;
mod parse;
mod replay;
#[cfg(any(test, feature = "testing"))]
pub mod writer;

pub use self::parse::LogError;
pub use self::replay::{LaterExtension, PcrMismatch, ReplayError, ReplayedLog};

use self::data::EventData;
use self::event_type::EventType;
use self::quirks::{DataDigest, Quirk};
use assay_tpm::algorithm::HashAlgorithm;

/// How much log is read before it is refused. Checked against the input's size, not against what the input says.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Octets in the log.
    pub log_bytes: usize,
    /// Events in the log.
    pub events: usize,
    /// Octets in one event's data.
    pub event_bytes: usize,
}

impl Default for Limits {
    /// Real logs have up to 65 KiB and 130 events; a revocation list (dbx) in one event may reach 100 KiB.
    fn default() -> Self {
        Self { log_bytes: 1 << 20, events: 10_000, event_bytes: 512 << 10 }
    }
}

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `TCG_PCR_EVENT2`: a digest per bank.
    CryptoAgile,
    /// `TCG_PCR_EVENT`, of TPM 1.2: SHA-1 only.
    Sha1,
    /// `CC_EVENT` (UEFI 2.10, section 38.2): a digest per algorithm, of measurement registers that are no TPM's.
    Ccel,
}

impl Format {
    /// Its name in tables and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CryptoAgile => "crypto-agile",
            Self::Sha1 => "sha1-legacy",
            Self::Ccel => "ccel",
        }
    }
}

/// Whose log it is. Nothing in a log says so: a confidential computing log has the very Spec ID event of a TPM's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A TPM's: what was extended into PCRs.
    Tpm,
    /// A confidential virtual machine's: what was extended into its measurement registers, like RTMRs of TDX.
    ConfidentialComputing,
}

/// A log that was read and believed in nothing.
#[derive(Debug, Clone)]
pub struct UnverifiedLog<'a> {
    format: Format,
    banks: Vec<HashAlgorithm>,
    events: Vec<Event<'a>>,
    startup_locality: u8,
    warnings: Vec<String>,
}

impl<'a> UnverifiedLog<'a> {
    /// Reads a log without copying it.
    ///
    /// # Errors
    /// Not one whole log, or more than [`Limits::default`] allows.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, LogError> {
        Self::parse_within(bytes, &Limits::default())
    }

    /// Reads a log within other limits.
    ///
    /// # Errors
    /// Not one whole log, or more than `limits` allow.
    pub fn parse_within(bytes: &'a [u8], limits: &Limits) -> Result<Self, LogError> {
        parse::parse(bytes, Origin::Tpm, limits)
    }

    /// Reads a log of either origin. A confidential computing log replays against no TPM's quote.
    ///
    /// # Errors
    /// Not one whole log, or more than [`Limits::default`] allows.
    pub fn parse_from(origin: Origin, bytes: &'a [u8]) -> Result<Self, LogError> {
        parse::parse(bytes, origin, &Limits::default())
    }

    /// How it is written.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// The banks that the log says to have digests for. A bank with gaps is named in [`Self::warnings`].
    #[must_use]
    pub fn banks(&self) -> &[HashAlgorithm] {
        &self.banks
    }

    /// The locality of `TPM2_Startup`, as the log says: what PCR 0 began with.
    #[must_use]
    pub fn startup_locality(&self) -> u8 {
        self.startup_locality
    }

    /// The events, to be shown to people. Nobody vouches for them.
    #[must_use]
    pub fn inspect(&self) -> &[Event<'a>] {
        &self.events
    }

    /// What is odd about the log and was tolerated.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// One event.
#[derive(Debug, Clone)]
pub struct Event<'a> {
    index: usize,
    pcr: u32,
    kind: EventType,
    digests: Digests<'a>,
    data: &'a [u8],
}

impl<'a> Event<'a> {
    /// Its place in the log; 0 is the first, the Spec ID if there is one.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its PCR. 0 to 23 for everything that is extended; EV_NO_ACTION may hold anything.
    #[must_use]
    pub fn pcr(&self) -> u32 {
        self.pcr
    }

    /// Its label.
    #[must_use]
    pub fn kind(&self) -> EventType {
        self.kind
    }

    /// What was extended into the bank.
    #[must_use]
    pub fn digest(&self, bank: HashAlgorithm) -> Option<&'a [u8]> {
        self.digests.get(bank)
    }

    /// Whether it was extended at all: EV_NO_ACTION never is (PFP 1.06, section 10.4.5).
    #[must_use]
    pub fn is_extended(&self) -> bool {
        self.kind != EventType::NO_ACTION
    }

    /// Its data as logged. Whoever kept the log may have changed it: to show, not to decide by.
    #[must_use]
    pub fn logged_data(&self) -> &'a [u8] {
        self.data
    }

    /// Its data, decoded by its type; likewise only to show.
    #[must_use]
    pub fn decoded_data(&self) -> EventData<'a> {
        EventData::decode(self.kind, self.data)
    }

    /// Whether the data is what the digest is of, as far as the event's type says.
    #[must_use]
    pub fn data_digest(&self) -> DataDigest {
        quirks::judge(self).0
    }

    /// The habit of genuine firmware or boot loaders that explains how data and digest of this event stand.
    #[must_use]
    pub fn quirk(&self) -> Option<&'static Quirk> {
        quirks::judge(self).1
    }

    /// The variable whose GUID, name and content were measured together. Where the digest is of the content alone
    /// ([`quirks::BOOT_VARIABLE_CONTENT`]) nobody vouches for the name, so there is none.
    #[must_use]
    pub fn measured_variable(&self) -> Option<MeasuredVariable<'a>> {
        let data = self.measured_data()?;
        match EventData::decode(self.kind, data) {
            EventData::Variable { guid, name, content, .. } => Some(MeasuredVariable { guid, name, content }),
            _ => None,
        }
    }

    /// The data if its SHA-256 is the very digest that was extended. In a [`ReplayedLog`] this data is what was
    /// measured.
    #[must_use]
    pub fn measured_data(&self) -> Option<&'a [u8]> {
        let digest = self.digest(HashAlgorithm::Sha256)?;
        (self.is_extended() && HashAlgorithm::Sha256.digest(self.data).as_ref() == digest).then_some(self.data)
    }
}

/// A UEFI variable as it was measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeasuredVariable<'a> {
    /// Its vendor GUID.
    pub guid: data::Guid,
    /// Its name.
    pub name: String,
    /// Its content.
    pub content: &'a [u8],
}

/// An event's digests, one slot per algorithm that we know.
#[derive(Debug, Clone, Copy, Default)]
struct Digests<'a>([Option<&'a [u8]>; HashAlgorithm::ALL.len()]);

impl<'a> Digests<'a> {
    fn get(&self, bank: HashAlgorithm) -> Option<&'a [u8]> {
        self.0[slot(bank)]
    }

    /// Returns whether the slot was free.
    fn set(&mut self, bank: HashAlgorithm, digest: &'a [u8]) -> bool {
        self.0[slot(bank)].replace(digest).is_none()
    }
}

fn slot(bank: HashAlgorithm) -> usize {
    match bank {
        HashAlgorithm::Sha1 => 0,
        HashAlgorithm::Sha256 => 1,
        HashAlgorithm::Sha384 => 2,
        HashAlgorithm::Sha512 => 3,
    }
}

/// PCRs of a TPM for PC clients.
const PCR_COUNT: u32 = 24;
