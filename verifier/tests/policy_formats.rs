//! Policies and Reference Values as documents: one digest whatever the form, what differs between two, and CoRIM.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod support;

use assay_verifier::policy::corim::{self, CorimError};
use assay_verifier::policy::diff::diff;
use assay_verifier::policy::signature::{DetachedSignature, PolicyKeys, PolicySigner};
use assay_verifier::policy::{ArtefactReference, Policy};
use proptest::prelude::*;
use serde_json::{Value, json};
use support::artefacts;

fn signer() -> PolicySigner {
    PolicySigner::from_pkcs8(&PolicySigner::generate().unwrap()).unwrap()
}

fn event(name: &str, digest: u8) -> Value {
    json!({"description": name, "type": "EV_EFI_BOOT_SERVICES_APPLICATION", "sha256": [hex::encode([digest; 32])]})
}

fn document(images: &[(&str, u8)]) -> Value {
    let images: Vec<_> = images.iter().map(|(name, digest)| event(name, *digest)).collect();
    let other = |pcr: u8| json!({"index": pcr, "mode": "enforce", "event": [event("other", pcr)]});
    let mut rules: Vec<_> = [0, 2, 7, 11, 12].into_iter().map(other).collect();
    rules.push(json!({"index": 4, "mode": "enforce", "event": images}));
    json!({"name": "lab", "pcr": rules, "secure_boot": {"enabled": true, "sbat_at_least": {"shim": 4},
        "dbx_at_least": [hex::encode([7; 32])]}})
}

fn policy(document: &Value) -> Policy {
    Policy::from_json(&document.to_string()).unwrap()
}

#[test]
fn a_difference_is_named_by_rule_and_event() {
    let before = policy(&document(&[("iPXE", 1), ("agent", 2), ("kernel", 3)]));
    assert_eq!(diff(&before, &before), []);
    let mut after = document(&[("iPXE", 1), ("shell", 9), ("agent", 5), ("kernel", 3)]);
    after["pcr"][0]["mode"] = "warn".into();
    after["secure_boot"]["dbx_at_least"] = json!([hex::encode([8; 32])]);
    after["secure_boot"]["sbat_at_least"]["shim"] = 5.into();
    after["firmware"] = json!({"versions": ["1.0"]});
    let says: Vec<_> = diff(&before, &policy(&after))
        .into_iter()
        .map(|it| {
            let side =
                |text: Option<String>| text.map_or_else(|| "-".to_owned(), |text| text.chars().take(4).collect());
            format!("{} {}: {} -> {}", it.rule, it.what, side(it.before), side(it.after))
        })
        .collect();
    let has = |line: &str| assert!(says.iter().any(|it| it == line), "{line}: {says:#?}");
    has("pcr-0 mode: enfo -> warn");
    has("pcr-4 event `shell`: - -> {\"de");
    assert!(says.iter().any(|it| it.starts_with("pcr-4 event `agent`")), "{says:#?}");
    has("secure-boot sbat_at_least shim: 4 -> 5");
    has("secure-boot dbx_at_least: 0707 -> -");
    has("secure-boot dbx_at_least: - -> 0808");
    assert!(says.iter().any(|it| it.starts_with("firmware")), "{says:#?}");
    assert!(says.iter().all(|it| !it.contains("iPXE") && !it.contains("kernel")), "{says:#?}");
}

#[test]
fn reference_values_go_through_corim_and_back() {
    let ours = signer();
    let keys = PolicyKeys::new(vec![ours.public()]);
    let plain = corim::export(&artefacts(), None).unwrap();
    assert_eq!(corim::import(&plain, &PolicyKeys::default(), 0).unwrap(), (artefacts(), None));
    let signed = corim::export(&artefacts(), Some(&ours)).unwrap();
    assert_eq!(corim::import(&signed, &keys, 0).unwrap(), (artefacts(), Some(ours.public())));
    // Another reader of the format finds the digests where it looks for them.
    let (_, comids) = ::corim::validate::decode_and_validate_at(&plain, 0).unwrap();
    let triples = comids[0].triples.reference_triples.as_ref().unwrap();
    assert_eq!(triples.len(), artefacts().events.len() + 1);
    let digest = &triples[1].measurements()[0].mval.digests.as_ref().unwrap()[0];
    assert_eq!(digest.value(), artefacts().events[1].sha256.0);
}

#[test]
fn d7_a_corim_that_is_unsigned_foreign_or_changed_is_refused_where_keys_count() {
    let (ours, stranger) = (signer(), signer());
    let keys = PolicyKeys::new(vec![ours.public()]);
    let refused = |bytes: &[u8]| match corim::import(bytes, &keys, 0) {
        Err(CorimError::Signature(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(refused(&corim::export(&artefacts(), None).unwrap()).contains("is not signed"));
    assert!(refused(&corim::export(&artefacts(), Some(&stranger)).unwrap()).contains("not one of the policy keys"));
    let mut changed = corim::export(&artefacts(), Some(&ours)).unwrap();
    let digest = artefacts().events[1].sha256.0;
    let place = changed.windows(32).position(|window| window == digest).unwrap();
    changed[place] ^= 1;
    assert!(refused(&changed).contains("is not over"));
}

#[test]
fn a_signature_on_one_kind_of_document_is_none_on_another() {
    let signer = signer();
    let keys = PolicyKeys::new(vec![signer.public()]);
    let policy = policy(&document(&[("agent", 2)]));
    let (on_policy, on_values) = (signer.sign_policy(&policy), signer.sign_artefacts(&artefacts()));
    assert!(keys.check_policy(&policy, Some(&on_policy)).is_ok());
    assert!(keys.check_artefacts(&artefacts(), Some(&on_values)).is_ok());
    assert!(keys.check_policy(&policy, Some(&on_values)).is_err());
    assert!(keys.check_artefacts(&artefacts(), Some(&on_policy)).is_err());
    assert_eq!(DetachedSignature::from_json(&on_policy.to_json()).unwrap(), on_policy);
    // The order of a file's members is not part of what is signed; its values are.
    let text = serde_json::to_string_pretty(&serde_json::to_value(artefacts()).unwrap()).unwrap();
    assert!(keys.check_artefacts(&ArtefactReference::from_json(&text).unwrap(), Some(&on_values)).is_ok());
    let mut other = artefacts();
    other.command_line.push_str(" init=/bin/sh");
    assert!(keys.check_artefacts(&other, Some(&on_values)).is_err());
}

proptest! {
    #[test]
    fn one_policy_has_one_digest_in_every_form(
        images in proptest::collection::vec(("[a-zA-Z .\"\\\\é#=]{1,20}", any::<u8>()), 1..6),
        command_line in proptest::option::of("[a-z =\"'\\\\,ü]{1,40}"),
        warn in any::<bool>(),
        until in proptest::option::of(1_i64..4_000_000_000),
    ) {
        let named: Vec<_> = images.iter().map(|(name, digest)| (name.as_str(), *digest)).collect();
        let mut document = document(&named);
        if let Some(text) = command_line {
            document["command_line"] = json!({"text": [text], "mode": if warn { "warn" } else { "enforce" }});
        }
        if let Some(until) = until {
            let until = time::OffsetDateTime::from_unix_timestamp(until).unwrap();
            document["valid_until"] = until.format(&time::format_description::well_known::Rfc3339).unwrap().into();
        }
        let policy = policy(&document);
        for again in [policy.to_json(), policy.to_toml()] {
            let again = Policy::parse(&again).unwrap();
            prop_assert_eq!(again.digest().to_string(), policy.digest().to_string());
            prop_assert_eq!(diff(&again, &policy), vec![]);
        }
        let sorted: Value = serde_json::from_str(&policy.to_json()).unwrap();
        prop_assert_eq!(sorted.to_string(), policy.to_json());
    }

    #[test]
    fn no_octets_make_the_corim_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>()) {
        let keys = PolicyKeys::default();
        prop_assert!(corim::import(&bytes, &keys, 0).is_err());
        let mut signed = corim::export(&artefacts(), None).unwrap();
        let at = at.index(signed.len());
        signed[at] = signed[at].wrapping_add(1);
        let _any_answer = corim::import(&signed, &keys, 0);
        prop_assert!(corim::import(&signed[..at], &keys, 0).is_err());
    }
}
