//! Appraisal of a real TPM's evidence: what a learnt policy accepts, and what it refuses in which words.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod support;

use assay_tpm::testing::{KeyKind, sha256};
use assay_verifier::appraisal::{Appraisal, Expected, appraise};
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::evidence::{Challenge, verify};
use assay_verifier::learn::{LearnError, learn};
use assay_verifier::policy::{Policy, PolicyError};
use assay_verifier::quote::ClockInfo;
use assay_wire::agent::AgentSettings;
use assay_wire::result::EarStatus;
use proptest::prelude::*;
use support::{
    ACTION, Node, artefacts, boot_log, boot_log_until_images, boot_log_with, first_boot, settings, variable,
};

/// The policy that a good node teaches.
fn policy() -> Policy {
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    let evidence = node.evidence();
    learn("lab", "node n1", &verify(&evidence, &node.challenge()).unwrap(), &artefacts()).unwrap()
}

/// What the policy says of a node that booted so.
fn verdict(policy: &Policy, log: &LogWriter, expected: &AgentSettings) -> Appraisal {
    let node = Node::boot(log, KeyKind::Ecc);
    let evidence = node.evidence();
    let replayed = verify(&evidence, &node.challenge()).unwrap();
    appraise(policy, &replayed, &Expected { settings: expected, boot: &first_boot() }, 0)
}

fn reasons(policy: &Policy, log: &LogWriter) -> Vec<String> {
    match verdict(policy, log, &settings()) {
        Appraisal::Refused(refusal) => refusal.reasons().to_vec(),
        Appraisal::Accepted(_) => panic!("accepted"),
    }
}

#[test]
fn the_node_that_taught_the_policy_and_one_like_it_are_accepted() {
    let policy = policy();
    let Appraisal::Accepted(accepted) = verdict(&policy, &boot_log(), &settings()) else { panic!("refused") };
    let submod = accepted.submod();
    assert_eq!(submod.status, EarStatus::Affirming);
    assert_eq!(submod.policy, policy.digest().to_string());
    assert_eq!(submod.rules["pcr-4"], "every event matched");
    assert_eq!(submod.rules["pcr-1"], "replayed, not enforced");
    assert_eq!(accepted.nonce(), &support::NONCE);
}

#[test]
fn a_tampered_ramdisk_is_named_with_its_pcr_and_event() {
    let reasons = reasons(&policy(), &boot_log_with(sha256(b"agent.efi with one octet changed")));
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    let (found, expected) = (sha256(b"agent.efi with one octet changed"), sha256(b"agent.efi"));
    assert!(
        reasons[0].starts_with(&format!(
            "PCR 4 event 15 (EV_EFI_BOOT_SERVICES_APPLICATION): digest {}… is not `agent.efi (UKI)`: expected {}…",
            hex::encode(&found[..6]),
            hex::encode(&expected[..6])
        )),
        "{reasons:?}"
    );
}

#[test]
fn tampered_settings_are_refused_by_field() {
    let policy = policy();
    let mut other = settings();
    other.verifier = "https://10.99.0.66:8443".into();
    other.verifier_key_sha256 = "cd".repeat(32);
    let Appraisal::Refused(refusal) = verdict(&policy, &boot_log(), &other) else { panic!("accepted") };
    assert_eq!(refusal.reasons().len(), 2);
    assert_eq!(
        refusal.reasons()[0],
        "PCR 14: the agent was told verifier `https://10.99.0.1:8443`, not `https://10.99.0.66:8443`"
    );
}

#[test]
fn b1_a_right_digest_under_a_wrong_label_is_refused() {
    let relabelled = boot_log_until_images()
        .event(4, EventType::UNUSED, sha256(b"agent.efi"), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b"")
        .event(12, EventType::IPL, sha256(b"command line"), b"");
    let reasons = reasons(&policy(), &relabelled);
    assert_eq!(reasons.len(), 1);
    assert!(reasons[0].contains("`agent.efi (UKI)` under a wrong label"), "{reasons:?}");
}

#[test]
fn b2_secure_boot_off_or_on_is_another_digest_whatever_the_log_shows() {
    let other = LogWriter::new()
        .measured(0, EventType::S_CRTM_VERSION, b"1\0.\x000\0\0\0")
        .event(0, EventType::EFI_PLATFORM_FIRMWARE_BLOB, sha256(b"firmware"), &[0; 16])
        .event(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, sha256(b"?"), &variable("SecureBoot", &[0]))
        .measured(4, EventType::EFI_ACTION, ACTION)
        .separators();
    let reasons = reasons(&policy(), &other);
    assert!(
        reasons.iter().any(|reason| reason.starts_with("PCR 7 event 3 (EV_EFI_VARIABLE_DRIVER_CONFIG)")),
        "{reasons:?}"
    );
    assert!(
        reasons.iter().any(|reason| reason.starts_with("PCR 4: `agent.efi (UKI)` was not measured")),
        "{reasons:?}"
    );
}

#[test]
fn b4_separators_are_one_each_and_configuration_ends_with_them() {
    let policy = policy();
    let doubled = boot_log().measured(5, EventType::SEPARATOR, &[0; 4]);
    assert_eq!(reasons(&policy, &doubled), ["PCR 5 has 2 separators instead of one"]);
    let error = boot_log_until_images();
    let late = boot_log().measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("SecureBoot", &[1]));
    let reasons_late = reasons(&policy, &late);
    assert!(reasons_late[0].starts_with("PCR 7 event 19") && reasons_late[0].contains("is not expected"));
    assert!(reasons(&policy, &error).iter().any(|reason| reason.contains("was not measured")));
    // An error separator, in a PCR that the policy does not cover.
    let mut json: serde_json::Value = serde_json::from_str(&policy.to_json()).unwrap();
    json["pcr"].as_array_mut().unwrap().retain(|rule| rule["index"] != 3);
    let policy = Policy::from_json(&json.to_string()).unwrap();
    let failed = boot_log().measured(3, EventType::SEPARATOR, &1u32.to_le_bytes());
    let found = reasons(&policy, &failed);
    assert!(
        found[0].contains("or of a firmware error") && found[1] == "PCR 3 has 2 separators instead of one",
        "{found:?}"
    );
}

#[test]
fn b9_another_command_line_or_one_event_more_is_refused() {
    let policy = policy();
    let more = boot_log().event(12, EventType::IPL, sha256(b"init=/bin/sh"), b"init=/bin/sh\x07");
    let found = reasons(&policy, &more);
    assert!(found[0].contains("is not expected: the policy has no event after `kernel command line`"), "{found:?}");
    let image = boot_log().event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"third"), b"");
    assert!(reasons(&policy, &image)[0].contains("is not expected"));
    // Retries of the boot manager are allowed anywhere: by their text, not by their label.
    let retried = boot_log().measured(4, EventType::EFI_ACTION, ACTION);
    assert!(matches!(verdict(&policy, &retried, &settings()), Appraisal::Accepted(_)));
    let claimed = boot_log().event(4, EventType::EFI_ACTION, sha256(b"rootkit"), ACTION);
    assert!(reasons(&policy, &claimed)[0].contains("(EV_EFI_ACTION)"));
}

#[test]
fn a4_a_bank_that_firmware_did_not_extend_is_refused() {
    // Zero PCRs and a log without events: replay has nothing against it, the policy has.
    let found = reasons(&policy(), &LogWriter::new());
    assert!(
        found.iter().any(|reason| reason.starts_with("PCR 0: ") && reason.contains("was not measured")),
        "{found:?}"
    );
    assert!(found.contains(&"PCR 5 has 0 separators instead of one".to_owned()), "{found:?}");
}

#[test]
fn a14_an_unsafe_clock_is_refused_unless_the_policy_says_otherwise() {
    let strict = policy();
    let mut node = Node::boot(&boot_log(), KeyKind::Ecc);
    node.tpm.cut_power();
    let node = Node::boot_on(node.tpm, &boot_log(), KeyKind::Ecc);
    let evidence = node.evidence();
    let replayed = verify(&evidence, &node.challenge()).unwrap();
    assert!(!replayed.clock().safe, "a TPM that lost power says that its clock is safe");
    let (settings, boot) = (settings(), first_boot());
    let expected = Expected { settings: &settings, boot: &boot };
    let Appraisal::Refused(refusal) = appraise(&strict, &replayed, &expected, 0) else { panic!("accepted") };
    assert!(refusal.reasons()[0].starts_with("the TPM's clock is not safe"));
    // What is learnt from this very node says so, and why.
    let learnt = learn("after a power cut", "n1", &replayed, &artefacts()).unwrap();
    assert!(learnt.to_toml().contains("require_safe = false"), "{}", learnt.to_toml());
    assert!(matches!(appraise(&learnt, &replayed, &expected, 0), Appraisal::Accepted(_)));
    // To loosen it without a reason is no policy.
    let mut json: serde_json::Value = serde_json::from_str(&learnt.to_json()).unwrap();
    json["clock"].as_object_mut().unwrap().remove("reason");
    assert!(matches!(Policy::from_json(&json.to_string()), Err(PolicyError::Clock { .. })));
}

#[test]
fn a14_a_clock_that_fell_back_over_a_reset_is_refused_unless_the_policy_says_otherwise() {
    let mut node = Node::boot(&boot_log(), KeyKind::Ecc);
    node.tpm.tool("tpm2_shutdown", &["-c"]);
    node.tpm.cut_power();
    let node = Node::boot_on(node.tpm, &boot_log(), KeyKind::Ecc);
    let evidence = node.evidence();
    let now = *verify(&evidence, &node.challenge()).unwrap().clock();
    assert!(now.safe, "an orderly shutdown left the clock unsafe");
    // As if the last quote had been made an hour later, in the boot before.
    let before = ClockInfo { clock_ms: now.clock_ms + 3_600_000, reset_count: now.reset_count - 1, ..now };
    let replayed = verify(&evidence, &Challenge { last_clock: Some(&before), ..node.challenge() }).unwrap();
    let (settings, boot) = (settings(), first_boot());
    let expected = Expected { settings: &settings, boot: &boot };
    let Appraisal::Refused(refusal) = appraise(&policy(), &replayed, &expected, 0) else { panic!("accepted") };
    assert!(refusal.reasons()[0].contains("fell back by 3600000 ms"), "{:?}", refusal.reasons());
    let mut json: serde_json::Value = serde_json::from_str(&policy().to_json()).unwrap();
    json["clock"] = serde_json::json!({"compare": "within-reset", "reason": "software TPMs"});
    let loose = Policy::from_json(&json.to_string()).unwrap();
    assert!(matches!(appraise(&loose, &replayed, &expected, 0), Appraisal::Accepted(_)));
}

#[test]
fn b10_another_revocation_list_is_refused() {
    let with_dbx = |content: &[u8]| {
        LogWriter::new()
            .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("SecureBoot", &[1]))
            .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("dbx", content))
            .measured(0, EventType::S_CRTM_VERSION, b"1")
            .separators()
            .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"snponly.efi"), b"")
            .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"agent.efi"), b"")
            .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
            .event(11, EventType::IPL, sha256(b"initrd"), b"")
            .event(12, EventType::IPL, sha256(b"command line"), b"")
    };
    let node = Node::boot(&with_dbx(b"revoked"), KeyKind::Ecc);
    let evidence = node.evidence();
    let policy = learn("dbx", "n1", &verify(&evidence, &node.challenge()).unwrap(), &artefacts()).unwrap();
    let found = reasons(&policy, &with_dbx(b""));
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("PCR 7 event 2 (EV_EFI_VARIABLE_DRIVER_CONFIG)") && found[0].contains("is not `dbx (")
    );
}

#[test]
fn d7_a_node_that_runs_something_else_teaches_nothing() {
    let node = Node::boot(&boot_log_with(sha256(b"rootkit")), KeyKind::Ecc);
    let evidence = node.evidence();
    let replayed = verify(&evidence, &node.challenge()).unwrap();
    let Err(LearnError::Deviates { name, reasons }) = learn("lab", "n1", &replayed, &artefacts()) else {
        panic!("learnt")
    };
    assert_eq!(name, "default");
    assert!(reasons[0].contains("is not `agent.efi (UKI)`"));
    let mut nothing = artefacts();
    nothing.events.retain(|event| event.pcr != 12);
    assert!(matches!(learn("lab", "n1", &replayed, &nothing), Err(LearnError::NoReference { pcr: 12, .. })));
}

#[test]
fn warn_is_accepted_and_said_and_expiry_is_refused() {
    let mut json: serde_json::Value = serde_json::from_str(&policy().to_json()).unwrap();
    for rule in json["pcr"].as_array_mut().unwrap() {
        if rule["index"] == 12 {
            rule["mode"] = "warn".into();
        }
    }
    json["valid_until"] = "2026-01-01T00:00:00Z".into();
    let warning = Policy::from_json(&json.to_string()).unwrap();
    let other = boot_log().event(12, EventType::IPL, sha256(b"more"), b"");
    let Appraisal::Accepted(accepted) = verdict(&warning, &other, &settings()) else { panic!("refused") };
    assert!(accepted.warnings()[0].starts_with("PCR 12 event"));
    assert_eq!(accepted.submod().rules["pcr-12"], "1 deviations, which the policy only warns of");

    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    let evidence = node.evidence();
    let replayed = verify(&evidence, &node.challenge()).unwrap();
    let late = appraise(&warning, &replayed, &Expected { settings: &settings(), boot: &first_boot() }, 1_767_225_600);
    let Appraisal::Refused(refusal) = late else { panic!("an expired policy accepted") };
    assert!(refusal.reasons()[0].starts_with("policy `lab` was valid until 2026-01-01"));
}

#[test]
fn toml_and_json_are_one_policy_with_one_digest() {
    let policy = policy();
    let toml = policy.to_toml();
    assert_eq!(Policy::parse(&toml).unwrap(), policy, "{toml}");
    assert_eq!(Policy::parse(&policy.to_json()).unwrap().digest(), policy.digest());
    let approved = policy.approved("alice", time::OffsetDateTime::UNIX_EPOCH).unwrap();
    assert_ne!(approved.digest(), policy.digest());
    assert_eq!(Policy::parse(&approved.to_toml()).unwrap(), approved);
}

#[test]
fn a_policy_that_leaves_a_hole_is_refused() {
    let whole: serde_json::Value = serde_json::from_str(&policy().to_json()).unwrap();
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json = whole.clone();
        change(&mut json);
        Policy::from_json(&json.to_string()).expect_err("a policy with a hole was accepted")
    };
    for pcr in [0, 2, 4, 7, 11, 12] {
        let error = refused(&|json| json["pcr"].as_array_mut().unwrap().retain(|rule| rule["index"] != pcr));
        assert!(matches!(error, PolicyError::PcrMissing { pcr: missing, .. } if missing == pcr), "{error}");
    }
    let at = |json: &mut serde_json::Value, pcr: u8| {
        json["pcr"].as_array().unwrap().iter().position(|rule| rule["index"] == pcr).unwrap()
    };
    assert!(matches!(
        refused(&|json| {
            let four = at(json, 4);
            json["pcr"][four]["mode"] = "warn".into();
        }),
        PolicyError::NothingEnforced { .. }
    ));
    let pcr = |error: PolicyError, says: &str| {
        assert!(matches!(&error, PolicyError::Pcr { problem, .. } if problem.contains(says)), "{error:?}");
    };
    pcr(refused(&|json| json["pcr"][0]["index"] = 14.into()), "rule of their own");
    pcr(refused(&|json| json["pcr"][0]["index"] = 16.into()), "is not quoted");
    pcr(refused(&|json| json["pcr"][0]["index"] = 2.into()), "listed twice");
    pcr(refused(&|json| json["pcr"][0]["event"][0]["sha256"] = serde_json::json!([])), "no digest");
    pcr(refused(&|json| json["pcr"][0]["event"][0]["type"] = "EV_NO_ACTION".into()), "never extended");
    assert!(matches!(refused(&|json| json["name"] = "".into()), PolicyError::Name));
    assert!(matches!(refused(&|json| json["unknown"] = 1.into()), PolicyError::Json(_)));
    assert!(matches!(refused(&|json| json["pcr"][0]["event"][0]["sha256"][0] = "ab".into()), PolicyError::Json(_)));
    assert!(matches!(Policy::parse("name = 1"), Err(PolicyError::Toml(_))));
    assert!(matches!(Policy::parse(&" ".repeat(2 << 20)), Err(PolicyError::TooLarge { .. })));
}

proptest! {
    #[test]
    fn arbitrary_text_is_no_policy_and_no_panic(text in ".{0,300}") {
        prop_assert!(Policy::parse(&text).is_err());
    }
}
