//! A boot recorded in the lab: OVMF, iPXE, a UKI with Debian's cloud kernel, and the PCRs that the kernel then read
//! (`fixtures/ovmf-ipxe-uki.*`). Put into a software TPM again, it is evidence from one end to the other.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod support;

use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::testing::{KeyKind, SoftTpm, sha256};
use assay_verifier::appraisal::{Appraisal, Expected, appraise};
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::quirks::DataDigest;
use assay_verifier::event_log::{Event, UnverifiedLog};
use assay_verifier::evidence::verify;
use assay_verifier::learn::learn;
use assay_verifier::policy::ArtefactReference;
use assay_verifier::quote::AkPublic;
use assay_wire::evidence::AGENT_PCR;
use support::{Node, first_boot, settings};

const LOG: &[u8] = include_bytes!("fixtures/ovmf-ipxe-uki.log");
const IMA_PCR: u8 = 10;

/// The PCRs that the kernel read.
fn recorded() -> Vec<[u8; 32]> {
    let json: serde_json::Value = serde_json::from_str(include_str!("fixtures/ovmf-ipxe-uki.json")).unwrap();
    let values = json["pcrs"].as_array().unwrap().iter();
    values.map(|value| hex::decode(value.as_str().unwrap()).unwrap().try_into().unwrap()).collect()
}

/// The node again: everything in its log, IMA's boot aggregate (as `ima-sig` writes it), and the agent's settings.
fn node() -> Node {
    let tpm = SoftTpm::start();
    let _ = tpm.create_ek(KeyKind::Rsa);
    let ak = AkPublic::parse(&tpm.create_ak(KeyKind::Ecc)).unwrap();
    let log = UnverifiedLog::parse(LOG).unwrap();
    for event in log.inspect().iter().filter(|event| event.is_extended()) {
        let digest = event.digest(HashAlgorithm::Sha256).unwrap().try_into().unwrap();
        tpm.extend(u8::try_from(event.pcr()).unwrap(), &digest);
    }
    let aggregate = sha256(&recorded()[..10].concat());
    let sizes = [40u32, 15, 0].map(u32::to_le_bytes);
    let template = [&sizes[0][..], b"sha256:\0", &aggregate, &sizes[1], b"boot_aggregate\0", &sizes[2]].concat();
    tpm.extend(IMA_PCR, &sha256(&template));
    let settings = serde_json::to_vec(&settings()).unwrap();
    tpm.extend(AGENT_PCR, &sha256(&settings));
    Node { tpm, ak, log: LOG.to_vec(), settings }
}

/// The images and sections of this boot, taken from its own log: a stand-in for the artefacts.
fn artefacts() -> ArtefactReference {
    let log = UnverifiedLog::parse(LOG).unwrap();
    let booted = log.inspect().iter().filter(|event| {
        let image = event.pcr() == 4 && event.kind() == EventType::EFI_BOOT_SERVICES_APPLICATION;
        event.is_extended() && (image || matches!(event.pcr(), 11 | 12))
    });
    let events: Vec<_> = booted
        .map(|event| {
            serde_json::json!({"pcr": event.pcr(), "type": event.kind(), "description": "recorded",
                "sha256": hex::encode(event.digest(HashAlgorithm::Sha256).unwrap())})
        })
        .collect();
    ArtefactReference::from_json(&serde_json::json!({"name": "recorded", "events": events}).to_string()).unwrap()
}

#[test]
fn the_log_alone_explains_every_pcr_but_imas() {
    let log = UnverifiedLog::parse(LOG).unwrap();
    let replayed = log.compute_pcrs(HashAlgorithm::Sha256).unwrap();
    for (pcr, value) in (0u8..).zip(recorded()) {
        if pcr != IMA_PCR {
            let found = replayed.get(&pcr).map_or([0; 32], |value| value[..].try_into().unwrap());
            assert_eq!(found, value, "PCR {pcr}");
        }
    }
    let unexplained = |event: &&Event<'_>| event.data_digest() == DataDigest::Differs && event.quirk().is_none();
    assert_eq!(log.inspect().iter().find(unexplained).map(|event| event.index()), None);
    assert_eq!(log.inspect_anomalies(), []);
}

#[test]
fn image_loads_say_where_they_came_from() {
    let log = UnverifiedLog::parse(LOG).unwrap();
    let images: Vec<_> = log
        .inspect()
        .iter()
        .filter(|event| event.pcr() == 4 && event.kind() == EventType::EFI_BOOT_SERVICES_APPLICATION)
        .map(|event| event.decoded_data().to_string())
        .collect();
    assert_eq!(images.len(), 4, "{images:?}");
    assert!(images[0].starts_with("PciRoot(0x0)/Pci(0x3,0x0)/MAC(525400000001,0x1)/IPv4("), "{images:?}");
    // iPXE tries an image from memory before it starts it, and firmware measures both.
    assert!(images[1].starts_with("image from memory") && images[2].contains("/agent.efi ("), "{images:?}");
    assert!(images[3].starts_with("VenMedia("), "{images:?}");
}

#[test]
fn from_quote_to_verdict() {
    let node = node();
    let evidence = node.evidence();
    let recorded: Vec<_> = recorded()[..usize::from(AGENT_PCR)].iter().map(hex::encode).collect();
    assert_eq!(evidence.pcrs[..usize::from(AGENT_PCR)], recorded);
    let replayed = verify(&evidence, &node.challenge()).unwrap_or_else(|error| panic!("{:?}", error.reasons()));
    let policy = learn("recorded", "the lab", &replayed, &artefacts()).unwrap();
    match appraise(&policy, &replayed, &Expected { settings: &settings(), boot: &first_boot() }, 0) {
        Appraisal::Accepted(accepted) => assert!(accepted.warnings().is_empty()),
        Appraisal::Refused(refusal) => panic!("{:?}", refusal.reasons()),
    }
}
