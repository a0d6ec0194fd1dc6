//! Reference Values of what we boot, computed from the artefacts before anything boots.

use super::check::check_size;
use super::{EventDigest, PolicyError};
use crate::event_log::event_type::EventType;
use assay_tpm::algorithm::HashAlgorithm;
use serde::{Deserialize, Serialize};

/// The Reference Values of what we boot, as `agent-image` computes them from the artefacts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtefactReference {
    /// The image's name.
    pub name: String,
    /// The command line that PCR 12 holds.
    #[serde(default)]
    pub command_line: String,
    /// The events that it causes, in order.
    pub events: Vec<ArtefactEvent>,
}

/// One event that an artefact causes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtefactEvent {
    /// Into which PCR.
    pub pcr: u8,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// Its digest.
    pub sha256: EventDigest,
    /// What it is, for people.
    pub description: String,
}

impl ArtefactReference {
    /// Reads `reference-values.json`.
    ///
    /// # Errors
    /// Too large, or not that.
    pub fn from_json(text: &str) -> Result<Self, PolicyError> {
        check_size(text)?;
        serde_json::from_str(text).map_err(PolicyError::Artefacts)
    }

    /// SHA-256 of its canonical JSON: members in alphabetical order, no white space.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let sorted = serde_json::to_value(self).unwrap_or_default(); // a `Value` keeps its members sorted
        let mut digest = [0; 32];
        digest.copy_from_slice(HashAlgorithm::Sha256.digest(sorted.to_string().as_bytes()).as_ref());
        digest
    }
}
