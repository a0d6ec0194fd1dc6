//! Drafts of policies: firmware values from a node that an operator trusts today, boot images from their artefacts.
//!
//! Only what firmware alone decides is learnt from the node (PCRs 0, 2, 7, and in PCR 4 what stands between the
//! images). Images are never learnt: a node that ran another image than the artefacts' cannot teach it.

use crate::appraisal::appraise_firmware;
use crate::boot_count::BootRule;
use crate::event_log::Event;
use crate::event_log::event_type::EventType;
use crate::evidence::ReplayedEvidence;
use crate::policy::{
    AllowedEvent, ArtefactReference, BOOT_IMAGE_PCR, EventDigest, ExpectedEvent, File, Mode, PcrRule, Policy,
    PolicyError, Provenance,
};
use crate::quote::ClockRule;
use assay_tpm::algorithm::HashAlgorithm;

/// Why no policy could be drafted.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// The artefacts say nothing of what boots.
    #[error("learning a policy: the Reference Values of `{name}` have no event for PCR {pcr}")]
    NoReference {
        /// The artefacts.
        name: String,
        /// The PCR.
        pcr: u8,
    },
    /// The draft would refuse the very node that it was learnt from.
    #[error("learning a policy: the node does not run `{name}`: {}", reasons.join("; "))]
    Deviates {
        /// The artefacts.
        name: String,
        /// What deviates.
        reasons: Vec<String>,
    },
    /// The draft is no policy.
    #[error("learning a policy")]
    Policy(#[from] PolicyError),
}

impl LearnError {
    /// One sentence a reason.
    #[must_use]
    pub fn reasons(&self) -> Vec<String> {
        match self {
            Self::Deviates { reasons, .. } => reasons.clone(),
            Self::NoReference { .. } => vec![self.to_string()],
            Self::Policy(cause) => vec![format!("{self}: {cause}")],
        }
    }
}

/// Drafts a policy named `name`. `learned_from` says whose evidence it is, for the record.
///
/// # Errors
/// See [`LearnError`].
pub fn learn(
    name: &str,
    learned_from: &str,
    evidence: &ReplayedEvidence<'_>,
    artefacts: &ArtefactReference,
) -> Result<Policy, LearnError> {
    if let Some(pcr) = ARTEFACT_PCRS.into_iter().find(|pcr| !artefacts.events.iter().any(|event| event.pcr == *pcr)) {
        return Err(LearnError::NoReference { name: artefacts.name.clone(), pcr });
    }
    let learnt = FIRMWARE_PCRS
        .into_iter()
        .map(|index| PcrRule::enforced(index, evidence.log().events_of(index).filter_map(expected).collect()));
    let mut pcr: Vec<_> = learnt.collect();
    pcr.push(boot_images(evidence, artefacts));
    let others = artefacts.events.iter().map(|event| event.pcr).filter(|pcr| *pcr != BOOT_IMAGE_PCR);
    for index in others.collect::<std::collections::BTreeSet<_>>() {
        pcr.push(PcrRule::enforced(index, referenced(artefacts, index).collect()));
    }
    pcr.sort_by_key(|rule| rule.index);
    let provenance = Provenance {
        artefacts: Some(artefacts.name.clone()),
        learned_from: Some(learned_from.to_owned()),
        ..Provenance::default()
    };
    let boot = BootRule { startup_locality: Some(evidence.log().startup_locality()), ..BootRule::default() };
    let policy = Policy::validated(File { boot, clock: clock(evidence), pcr, provenance, ..File::named(name) })?;
    let reasons = appraise_firmware(&policy, evidence, "").sentences(Mode::Enforce);
    if reasons.is_empty() { Ok(policy) } else { Err(LearnError::Deviates { name: artefacts.name.clone(), reasons }) }
}

/// Everything is wanted of the clock, unless this very node would be refused for it: a TPM whose power was cut, as by
/// a BMC before each lease, calls its clock unsafe. That is then in the draft, for a person to approve or to strike out.
fn clock(evidence: &ReplayedEvidence<'_>) -> ClockRule {
    if evidence.clock().safe {
        return ClockRule::default();
    }
    let reason = "the TPM that this was learnt from called its clock unsafe, as TPMs do for up to 70 minutes after a \
                  power cut; without this line the node must run that long before it is accepted";
    ClockRule { require_safe: false, reason: Some(reason.to_owned()), ..ClockRule::default() }
}

/// PCR 4: the separator where the node has it, its actions anywhere, and the artefacts' images in the artefacts' order.
fn boot_images(evidence: &ReplayedEvidence<'_>, artefacts: &ArtefactReference) -> PcrRule {
    let mut images = referenced(artefacts, BOOT_IMAGE_PCR);
    let mut event = Vec::new();
    for logged in evidence.log().events_of(BOOT_IMAGE_PCR) {
        match logged.kind() {
            EventType::EFI_ACTION => {} // allowed below, if it is one of the boot manager's
            EventType::SEPARATOR => event.extend(expected(logged)),
            _ => event.extend(images.next()),
        }
    }
    event.extend(images);
    let allow = BOOT_MANAGER_ACTIONS
        .into_iter()
        .map(|data| AllowedEvent { data: data.to_owned(), kind: EventType::EFI_ACTION });
    PcrRule { allow: allow.collect(), ..PcrRule::enforced(BOOT_IMAGE_PCR, event) }
}

fn referenced(artefacts: &ArtefactReference, pcr: u8) -> impl Iterator<Item = ExpectedEvent> + use<'_> {
    artefacts.events.iter().filter(move |event| event.pcr == pcr).map(|event| ExpectedEvent {
        description: event.description.clone(),
        sha256: vec![event.sha256],
        kind: event.kind,
    })
}

/// The event as a policy expects it again.
fn expected(event: &Event<'_>) -> Option<ExpectedEvent> {
    let digest: [u8; 32] = event.digest(HashAlgorithm::Sha256)?.try_into().ok()?;
    let description: String = event.decoded_data().to_string().chars().take(MAX_DESCRIPTION_CHARS).collect();
    let description = if description.is_empty() { event.kind().to_string() } else { description };
    Some(ExpectedEvent { description, sha256: vec![EventDigest(digest)], kind: event.kind() })
}

/// What firmware alone decides.
const FIRMWARE_PCRS: [u8; 3] = [0, 2, 7];
/// What the artefacts must speak about.
const ARTEFACT_PCRS: [u8; 3] = [BOOT_IMAGE_PCR, 11, 12];
/// UEFI's boot manager measures which way the boot went (PFP 1.06, section 3.3.4.5): a boot option that failed before
/// the network's adds a pair of these.
const BOOT_MANAGER_ACTIONS: [&str; 2] =
    ["Calling EFI Application from Boot Option", "Returning from EFI Application from Boot Option"];
/// Four octets each at most, so within a policy's text.
const MAX_DESCRIPTION_CHARS: usize = 60;
