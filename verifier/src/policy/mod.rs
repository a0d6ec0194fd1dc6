//! Appraisal policies: which events the PCRs of a good node hold. Data, in TOML or JSON, whose digest goes into every
//! attestation result. A policy that would let something through by leaving it out is refused when it is read.
//!
//! ```toml
//! name = "lab-2026.3"
//!
//! [provenance]
//! learned_from = "node n1"
//! approved_by = "alice"
//!
//! [clock]                             # by default a TPM's clock is safe and never goes back; who wants less says why
//! require_safe = false
//! reason = "our BMCs cut the power before each lease"
//!
//! [ima]                               # measurement lists, see `ima::policy`; without it they are only replayed
//! mode = "enforce"
//! violations = "refuse"
//!
//! [[pcr]]
//! index = 4
//! mode = "enforce"
//!
//! [[pcr.allow]]                       # may occur anywhere in this PCR, any number of times
//! type = "EV_EFI_ACTION"
//! data = "Calling EFI Application from Boot Option"
//!
//! [[pcr.event]]                       # must occur, in this order
//! type = "EV_EFI_BOOT_SERVICES_APPLICATION"
//! description = "agent.efi (UKI)"
//! sha256 = ["cd34…", "ab12…"]         # alternatives
//! ```

mod artefacts;
mod check;
mod check_rules;
pub mod corim;
pub mod diff;
mod document;
pub(crate) mod glob;
mod rules;
pub mod signature;

pub use self::artefacts::{ArtefactEvent, ArtefactReference};
pub use self::check::PolicyError;
pub(crate) use self::document::File;
pub use self::document::{
    AllowedEvent, Alternative, EventDigest, ExpectedEvent, Mode, PcrRule, Provenance, VaryingEvent,
};
pub use self::rules::{
    BootImagesRule, CommandLineRule, FirmwareRule, Keys, ListedEvent, OptionRomsRule, SecureBootRule,
};

use self::check::{check, check_size};
use crate::boot_count::BootRule;
use crate::ima::policy::ImaPolicy;
use crate::quote::ClockRule;
use crate::tee::TeeRule;
use assay_tpm::algorithm::HashAlgorithm;
use std::fmt;
use time::OffsetDateTime;

/// A policy that was read and found whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    file: File,
    digest: PolicyDigest,
}

impl Policy {
    /// Reads a policy, JSON if it begins with `{`, else TOML.
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        if text.trim_start().starts_with('{') { Self::from_json(text) } else { Self::from_toml(text) }
    }

    /// Reads a policy in TOML.
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn from_toml(text: &str) -> Result<Self, PolicyError> {
        check_size(text)?;
        toml::from_str(text).map_err(PolicyError::Toml).and_then(Self::validated)
    }

    /// Reads a policy in JSON.
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn from_json(text: &str) -> Result<Self, PolicyError> {
        check_size(text)?;
        serde_json::from_str(text).map_err(PolicyError::Json).and_then(Self::validated)
    }

    pub(crate) fn validated(file: File) -> Result<Self, PolicyError> {
        check(&file)?;
        let mut digest = [0; 32];
        digest.copy_from_slice(HashAlgorithm::Sha256.digest(canonical(&file).as_bytes()).as_ref());
        Ok(Self { file, digest: PolicyDigest(digest) })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// SHA-256 of [`Self::to_json`].
    #[must_use]
    pub fn digest(&self) -> &PolicyDigest {
        &self.digest
    }

    /// Where it comes from and who said that it is good.
    #[must_use]
    pub fn provenance(&self) -> &Provenance {
        &self.file.provenance
    }

    /// From when it may be used.
    #[must_use]
    pub fn valid_from(&self) -> Option<OffsetDateTime> {
        self.file.valid_from
    }

    /// Until when it may be used.
    #[must_use]
    pub fn valid_until(&self) -> Option<OffsetDateTime> {
        self.file.valid_until
    }

    /// What it wants of boots and the TPM's counts of them.
    #[must_use]
    pub fn boot(&self) -> &BootRule {
        &self.file.boot
    }

    /// What it wants of the TPM's clock.
    #[must_use]
    pub fn clock(&self) -> &ClockRule {
        &self.file.clock
    }

    /// What the kernel's measurement list may hold; none if it may hold anything at run time, and nothing at boot.
    #[must_use]
    pub fn ima(&self) -> Option<&ImaPolicy> {
        self.file.ima.as_ref()
    }

    /// The quotes of trusted execution environments that evidence must have.
    #[must_use]
    pub fn tee(&self) -> &[TeeRule] {
        &self.file.tee
    }

    /// What is expected of each PCR that the policy covers.
    #[must_use]
    pub fn pcrs(&self) -> &[PcrRule] {
        &self.file.pcr
    }

    /// The whole document.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The same policy, approved.
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn approved(&self, by: &str, at: OffsetDateTime) -> Result<Self, PolicyError> {
        let mut file = self.file.clone();
        file.provenance.approved_by = Some(by.to_owned());
        file.provenance.approved_at = Some(at);
        Self::validated(file)
    }

    /// Canonical JSON: members in alphabetical order, no white space (RFC 8785 for the values that occur here).
    #[must_use]
    pub fn to_json(&self) -> String {
        canonical(&self.file)
    }

    /// TOML, for people.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(&self.file).unwrap_or_default() // plain data with text keys always serialises
    }
}

/// SHA-256 over a policy's canonical JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PolicyDigest([u8; 32]);

impl PolicyDigest {
    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for PolicyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for PolicyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyDigest({self})")
    }
}

fn canonical(file: &File) -> String {
    serde_json::to_string(file).unwrap_or_default() // plain data with text keys always serialises
}

/// Images that firmware loads.
pub(crate) const BOOT_IMAGE_PCR: u8 = 4;
