//! Reference Values of what we boot, computed from the artefacts before anything boots.

use super::check::check_size;
use super::{EventDigest, PolicyError};
use crate::event_log::event_type::EventType;
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
}
