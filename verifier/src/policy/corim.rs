//! Reference Values as CoRIM (draft-ietf-rats-corim): the form in which others publish and take them. Unsigned, or in a
//! `COSE_Sign1` (RFC 9052) by a policy key with EdDSA.
//!
//! One reference triple per event: the environment's class says vendor `assay`, the artefacts' name as the model, the
//! PCR as the layer and the place in the boot as the index; the measurement says the event's type as its key, its
//! description as its name, and one SHA-256 digest. Alternatives, modes and named rules have no counterpart in CoRIM's
//! triples, so policies are not exported: what came from artefacts is, what a person decided is not.

use super::signature::{PolicyKey, PolicyKeys, PolicySigner, SignatureError};
use super::{ArtefactEvent, ArtefactReference, EventDigest};
use corim::builder::{ComidBuilder, CorimBuilder};
use corim::types::common::{MeasuredElement, TagIdChoice};
use corim::types::corim::CorimId;
use corim::types::environment::{ClassMap, EnvironmentMap};
use corim::types::measurement::{Digest, DigestAlg, MeasurementMap, MeasurementValuesMap};
use corim::types::signed::{CwtClaims, SignedCorimBuilder, decode_signed_corim, validate_signed_corim_payload};
use corim::types::triples::ReferenceTriple;
use corim::validate::decode_and_validate_full_at;

/// Why Reference Values and CoRIM do not go into each other.
#[derive(Debug, thiserror::Error)]
pub enum CorimError {
    /// The Reference Values cannot be written so.
    #[error("writing the Reference Values of `{name}` as CoRIM: {problem}")]
    Write {
        /// Whose.
        name: String,
        /// Why not.
        problem: String,
    },
    /// Not a CoRIM, or not valid now.
    #[error("reading a CoRIM: {0}")]
    Read(String),
    /// A CoRIM of something else.
    #[error("reading a CoRIM, reference triple {triple}: {problem}")]
    Triple {
        /// Which, from 0.
        triple: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// It says nothing.
    #[error("reading a CoRIM: it has no reference values of events")]
    Empty,
    /// Its signature.
    #[error("checking the CoRIM's signature")]
    Signature(#[from] SignatureError),
}

/// Writes Reference Values as a CoRIM, signed if there is a signer.
///
/// # Errors
/// See [`CorimError`].
pub fn export(artefacts: &ArtefactReference, signer: Option<&PolicySigner>) -> Result<Vec<u8>, CorimError> {
    let failed = |problem: String| CorimError::Write { name: artefacts.name.clone(), problem };
    let mut comid = ComidBuilder::new(TagIdChoice::Text(artefacts.name.clone()));
    for (place, event) in (0_u64..).zip(&artefacts.events) {
        let environment = environment(&artefacts.name, Some(event.pcr), place);
        let key = event.kind.to_string();
        comid = comid.add_reference_triple(triple(environment, key, &event.description, Some(event.sha256)));
    }
    if !artefacts.command_line.is_empty() {
        let environment = environment(&artefacts.name, None, 0);
        comid = comid.add_reference_triple(triple(environment, COMMAND_LINE.to_owned(), &artefacts.command_line, None));
    }
    let comid = comid.build().map_err(|error| failed(error.to_string()))?;
    let corim = CorimBuilder::new(CorimId::Text(artefacts.name.clone())).add_comid_tag(comid);
    let payload = corim.and_then(CorimBuilder::build_bytes).map_err(|error| failed(error.to_string()))?;
    let Some(signer) = signer else { return Ok(payload) };
    let mut signed = SignedCorimBuilder::new(EDDSA, payload)
        .set_cwt_claims(CwtClaims::new(VENDOR))
        .kid(signer.public().as_bytes().to_vec());
    let message = signed.to_be_signed(&[]).map_err(|error| failed(error.to_string()))?;
    signed.build_with_signature(signer.sign_bytes(&message).to_vec()).map_err(|error| failed(error.to_string()))
}

/// Reads Reference Values from a CoRIM, and who signed it. With keys, only what one of them signed counts.
///
/// # Errors
/// See [`CorimError`].
pub fn import(
    bytes: &[u8],
    keys: &PolicyKeys,
    now_seconds: i64,
) -> Result<(ArtefactReference, Option<PolicyKey>), CorimError> {
    let read = |error: &dyn std::fmt::Display| CorimError::Read(error.to_string());
    let (validated, signer) = if bytes.first() == Some(&TAG_COSE_SIGN1) {
        let envelope = decode_signed_corim(bytes).map_err(|error| read(&error))?;
        let kid = envelope.protected().kid.as_deref();
        let key = kid.and_then(PolicyKey::from_bytes).ok_or(SignatureError::Key)?;
        let message = envelope.to_be_signed(&[]).map_err(|error| read(&error))?;
        keys.check_bytes("the CoRIM", key, &message, &envelope.signature)?;
        (validate_signed_corim_payload(&envelope, now_seconds).map_err(|error| read(&error))?, Some(key))
    } else {
        keys.check_unsigned("the CoRIM")?;
        (decode_and_validate_full_at(bytes, now_seconds).map_err(|error| read(&error))?, None)
    };
    let triples = validated.comids.iter().flat_map(|comid| comid.triples.reference_triples.iter().flatten());
    let mut artefacts = ArtefactReference { name: String::new(), command_line: String::new(), events: Vec::new() };
    let mut placed = Vec::new();
    for (place, triple) in triples.enumerate() {
        let class = triple.environment().class.as_ref();
        if let Some(model) = class.and_then(|class| class.model.as_ref()) {
            artefacts.name.clone_from(model);
        }
        let index = class.and_then(|class| class.index).unwrap_or(place.try_into().unwrap_or(u64::MAX));
        for measurement in triple.measurements() {
            match event(class, measurement).map_err(|problem| CorimError::Triple { triple: place, problem })? {
                Element::Event(event) => placed.push((index, event)),
                Element::CommandLine(text) => artefacts.command_line = text,
            }
        }
    }
    placed.sort_by_key(|(index, _)| *index);
    artefacts.events = placed.into_iter().map(|(_, event)| event).collect();
    if artefacts.events.is_empty() { Err(CorimError::Empty) } else { Ok((artefacts, signer)) }
}

fn environment(name: &str, pcr: Option<u8>, place: u64) -> EnvironmentMap {
    let class = ClassMap {
        class_id: None,
        vendor: Some(VENDOR.to_owned()),
        model: Some(name.to_owned()),
        layer: pcr.map(u64::from),
        index: Some(place),
    };
    EnvironmentMap { class: Some(class), instance: None, group: None }
}

fn triple(environment: EnvironmentMap, key: String, name: &str, digest: Option<EventDigest>) -> ReferenceTriple {
    let digests = digest.map(|digest| vec![Digest::new(SHA256, digest.0.to_vec())]);
    let mut mval = MeasurementValuesMap::default();
    mval.name = Some(name.to_owned());
    mval.digests = digests;
    let measurement = MeasurementMap { mkey: Some(MeasuredElement::Text(key)), mval, authorized_by: None };
    ReferenceTriple::new(environment, vec![measurement])
}

/// What a measurement is of.
enum Element {
    Event(ArtefactEvent),
    CommandLine(String),
}

fn event(class: Option<&ClassMap>, measurement: &MeasurementMap) -> Result<Element, &'static str> {
    let Some(MeasuredElement::Text(key)) = &measurement.mkey else { return Err("has no event type as its key") };
    let name = measurement.mval.name.clone().unwrap_or_else(|| key.clone());
    if key == COMMAND_LINE {
        return Ok(Element::CommandLine(name));
    }
    let layer = class.and_then(|class| class.layer).and_then(|layer| u8::try_from(layer).ok());
    let pcr = layer.ok_or("names no PCR as its layer")?;
    let kind = key.parse().map_err(|_| "has a key that is no event type")?;
    let [Digest(DigestAlg::Int(SHA256), digest)] = measurement.mval.digests.as_deref().unwrap_or_default() else {
        return Err("has not exactly one digest, of SHA-256");
    };
    let sha256 = digest.as_slice().try_into().map_err(|_| "has a digest that is not 32 octets")?;
    Ok(Element::Event(ArtefactEvent { pcr, kind, sha256: EventDigest(sha256), description: name }))
}

const VENDOR: &str = "assay";
const COMMAND_LINE: &str = "command-line";
/// IANA's Named Information registry.
const SHA256: i64 = 1;
/// IANA's COSE algorithms.
const EDDSA: i64 = -8;
/// CBOR tag 18 as it is encoded.
const TAG_COSE_SIGN1: u8 = 0xd2;
