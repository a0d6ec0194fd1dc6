//! The rules that a policy may have beside its lists of events: alternatives, named rules, events that vary, and when
//! it is valid; what they accept, and what they refuse in which words.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod support;

use assay_tpm::testing::{KeyKind, sha256};
use assay_verifier::appraisal::{Appraisal, Deviation, Expected, appraise};
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::evidence::verify;
use assay_verifier::learn::learn;
use assay_verifier::policy::{Mode, Policy, PolicyError};
use serde_json::{Value, json};
use support::{ACTION, Node, artefacts, boot_log, boot_log_until_images, first_boot, settings, variable};

/// What the policy says of a node `n1` that booted so.
fn verdict(policy: &Policy, log: &LogWriter, now_seconds: i64) -> Appraisal {
    let node = Node::boot(log, KeyKind::Ecc);
    let evidence = node.evidence();
    let replayed = verify(&evidence, &node.challenge()).unwrap();
    appraise(policy, &replayed, &Expected { settings: &settings(), boot: &first_boot() }, now_seconds)
}

fn accepted(policy: &Policy, log: &LogWriter) {
    if let Appraisal::Refused(refusal) = verdict(policy, log, 0) {
        panic!("refused: {:?}", refusal.reasons());
    }
}

fn refused(policy: &Policy, log: &LogWriter) -> Vec<Deviation> {
    match verdict(policy, log, 0) {
        Appraisal::Refused(refusal) => refusal.deviations().to_vec(),
        Appraisal::Accepted(_) => panic!("accepted"),
    }
}

/// The policy that a good node teaches, changed.
fn policy(change: impl FnOnce(&mut Value)) -> Policy {
    changed(change).unwrap()
}

fn changed(change: impl FnOnce(&mut Value)) -> Result<Policy, PolicyError> {
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    let evidence = node.evidence();
    let learnt = learn("lab", "node n1", &verify(&evidence, &node.challenge()).unwrap(), &artefacts()).unwrap();
    let mut json = serde_json::from_str(&learnt.to_json()).unwrap();
    change(&mut json);
    Policy::from_json(&json.to_string())
}

fn rule_of(json: &mut Value, pcr: u8) -> &mut Value {
    json["pcr"].as_array_mut().unwrap().iter_mut().find(|rule| rule["index"] == pcr).unwrap()
}

fn event(kind: EventType, measured: &[u8], description: &str) -> Value {
    json!({"type": kind, "sha256": [hex::encode(sha256(measured))], "description": description})
}

/// A boot of release N or N-1: the agent's image and its command line go together.
fn release(agent: &[u8], command_line: &[u8]) -> LogWriter {
    boot_log_until_images()
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(agent), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b".initrd")
        .event(12, EventType::IPL, sha256(command_line), b"")
}

/// N and N-1 as alternatives of PCRs 4 and 12.
fn two_releases() -> Policy {
    policy(|json| {
        let four = rule_of(json, 4);
        let events = four["event"].as_array().unwrap().clone();
        let with_agent = |name: &str, agent: &[u8]| {
            let mut events = events.clone();
            let place = events.iter().position(|event| event["description"] == "agent.efi (UKI)").unwrap();
            events[place] = event(EventType::EFI_BOOT_SERVICES_APPLICATION, agent, "agent.efi (UKI)");
            json!({"name": name, "event": events})
        };
        four["alternative"] = json!([with_agent("2026.3", b"agent.efi"), with_agent("2026.2", b"old agent.efi")]);
        four["event"] = json!([]);
        let twelve = rule_of(json, 12);
        twelve["event"] = json!([]);
        let line = |name: &str, text: &[u8]| json!({"name": name, "event": [event(EventType::IPL, text, "options")]});
        twelve["alternative"] = json!([line("2026.3", b"command line"), line("2026.2", b"old command line")]);
    })
}

#[test]
fn either_release_passes_whole() {
    let policy = two_releases();
    accepted(&policy, &boot_log());
    let old = release(b"old agent.efi", b"old command line");
    let Appraisal::Accepted(accepted) = verdict(&policy, &old, 0) else { panic!("N-1 was refused") };
    assert_eq!(accepted.submod().rules["pcr-12"], "every event matched alternative `2026.2`");
}

#[test]
fn d7_one_release_s_kernel_with_another_s_command_line_is_refused() {
    let policy = two_releases();
    let mixed = refused(&policy, &release(b"agent.efi", b"old command line"));
    assert_eq!(mixed.len(), 1, "{mixed:?}");
    assert!(mixed[0].sentence.contains("one alternative must match entirely"), "{mixed:?}");
    let neither = refused(&policy, &release(b"rootkit", b"command line"));
    assert_eq!((neither.len(), neither[0].pcr), (1, Some(4)), "{neither:?}");
    assert!(neither[0].sentence.contains("alternative `2026.3`, the nearest of 2"), "{neither:?}");
}

/// Two hardware models, whose firmware a policy knows, each for its nodes.
fn two_models() -> Policy {
    policy(|json| {
        for pcr in [0, 2, 7] {
            let rule = rule_of(json, pcr);
            let events = rule["event"].take();
            let mut other = events.clone();
            if pcr == 0 {
                other[1] = event(EventType::EFI_PLATFORM_FIRMWARE_BLOB, b"other firmware", "firmware volume");
            }
            rule["event"] = json!([]);
            rule["alternative"] = json!([
                {"name": "model-a", "event": events, "nodes": ["n#"]},
                {"name": "model-b", "event": other, "nodes": ["gpu-*"]},
            ]);
        }
    })
}

#[test]
fn d7_firmware_of_another_model_is_refused() {
    let policy = two_models();
    accepted(&policy, &boot_log());
    let other = LogWriter::new()
        .measured(0, EventType::S_CRTM_VERSION, b"1\0.\x000\0\0\0")
        .event(0, EventType::EFI_PLATFORM_FIRMWARE_BLOB, sha256(b"other firmware"), &[0; 16])
        .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("SecureBoot", &[0]))
        .measured(4, EventType::EFI_ACTION, ACTION)
        .separators()
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"snponly.efi"), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"agent.efi"), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b".initrd")
        .event(12, EventType::IPL, sha256(b"command line"), b"");
    // It is approved firmware, but not of n1's model.
    let found = refused(&policy, &other);
    assert_eq!((found.len(), found[0].pcr, found[0].event), (1, Some(0), Some(2)), "{found:?}");
    let nobody = policy_for_nobody();
    let found = refused(&nobody, &boot_log());
    assert!(found[0].sentence.contains("no alternative for node `n1`"), "{found:?}");
}

fn policy_for_nobody() -> Policy {
    let mut json: Value = serde_json::from_str(&two_models().to_json()).unwrap();
    for pcr in [0, 2, 7] {
        rule_of(&mut json, pcr)["alternative"].as_array_mut().unwrap().remove(0);
    }
    Policy::from_json(&json.to_string()).unwrap()
}

#[test]
fn firmware_is_known_by_version_and_by_its_volumes() {
    let by_rule = |versions: &[&str], volume: &[u8]| {
        policy(|json| {
            json["firmware"] = json!({"versions": versions, "blob": [
                {"description": "firmware volume", "sha256": [hex::encode(sha256(volume))]}]});
            // What the rule decides on is not in PCR 0's list.
            let zero = rule_of(json, 0);
            zero["event"].as_array_mut().unwrap().drain(..2);
        })
    };
    accepted(&by_rule(&["0.9", "1.0"], b"firmware"), &boot_log());
    let old = refused(&by_rule(&["2.0"], b"firmware"), &boot_log());
    assert_eq!((old[0].rule.as_str(), old[0].found.as_deref()), ("firmware", Some("1.0")), "{old:?}");
    assert_eq!(old[0].expected, ["2.0"]);
    let other = refused(&by_rule(&["1.0"], b"newer firmware"), &boot_log());
    assert_eq!(other.len(), 2, "an unknown volume and a missing one: {other:?}");
    assert!(other[0].sentence.starts_with("rule `firmware`: PCR 0 event 2 (EV_EFI_PLATFORM_FIRMWARE_BLOB)"));
    assert!(other[1].sentence.contains("`firmware volume` was not measured"), "{other:?}");
}

#[test]
fn b2_a_firmware_version_that_was_not_measured_does_not_count() {
    let policy = policy(|json| {
        json["firmware"] = json!({"versions": ["1.0"]});
        rule_of(json, 0)["event"].as_array_mut().unwrap().remove(0);
    });
    accepted(&policy, &boot_log());
    let claimed = LogWriter::new().event(0, EventType::S_CRTM_VERSION, sha256(b"0.1"), b"1\0.\x000\0\0\0");
    let found = refused(&policy, &claimed);
    assert!(found[0].sentence.contains("is not of the version that the log shows"), "{found:?}");
    assert!(refused(&policy, &LogWriter::new())[0].sentence.contains("no firmware version was measured"));
}

#[test]
fn boot_images_by_digest_in_any_order_and_no_other() {
    let policy = policy(|json| {
        let listed = |measured: &[u8], description: &str| json!({"description": description, "sha256": [hex::encode(sha256(measured))]});
        json["boot_images"] = json!({"image": [listed(b"agent.efi", "UKI"), listed(b"kernel", "kernel"),
            listed(b"snponly.efi", "iPXE"), {"description": "shell", "optional": true,
            "sha256": [hex::encode(sha256(b"shell"))]}]});
        let images = "EV_EFI_BOOT_SERVICES_APPLICATION";
        rule_of(json, 4)["event"].as_array_mut().unwrap().retain(|event| event["type"] != images);
    });
    accepted(&policy, &boot_log());
    accepted(&policy, &boot_log().event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"shell"), b""));
    let more = boot_log().event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"rootkit"), b"");
    let found = refused(&policy, &more);
    assert_eq!((found.len(), found[0].rule.as_str(), found[0].event), (1, "boot-images", Some(19)), "{found:?}");
    let relabelled = boot_log().event(4, EventType::COMPACT_HASH, sha256(b"rootkit"), b"");
    assert_eq!(refused(&policy, &relabelled)[0].rule, "pcr-4");
    assert!(refused(&policy, &boot_log_until_images()).iter().any(|it| it.sentence.contains("`UKI` was not measured")));
}

#[test]
fn a_command_line_is_known_by_its_text() {
    let line = "agent.efi quiet";
    let utf16 = |text: &str| text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let policy = policy(|json| {
        json["command_line"] = json!({"text": [line]});
        rule_of(json, 12)["event"] = json!([]);
    });
    accepted(&policy, &release(b"agent.efi", &utf16(line)));
    let found = refused(&policy, &release(b"agent.efi", &utf16("agent.efi quiet init=/bin/sh")));
    assert_eq!((found[0].rule.as_str(), found[0].expected.as_slice()), ("command-line", &[line.to_owned()][..]));
    let none = refused(&policy, &boot_log_until_images());
    assert!(none.iter().any(|it| it.sentence.contains("no command line was measured")), "{none:?}");
}

#[test]
fn a_boot_entry_may_differ_within_its_pattern_and_only_if_it_was_measured() {
    let policy = policy(|json| {
        json["pcr"].as_array_mut().unwrap().push(json!({"index": 1, "mode": "enforce",
            "event": [event(EventType::SEPARATOR, &[0; 4], "separator")],
            "varying": [{"type": "EV_EFI_VARIABLE_BOOT", "variable": "Boot####"},
                        {"type": "EV_EFI_VARIABLE_BOOT", "variable": "BootOrder"}]}));
    });
    accepted(&policy, &boot_log());
    let mac = boot_log().measured(1, EventType::EFI_VARIABLE_BOOT, &variable("Boot0001", b"MAC 52:54:00:00:00:01"));
    accepted(&policy, &mac);
    let other = boot_log().measured(1, EventType::EFI_VARIABLE_BOOT, &variable("DriverOrder", &[0, 0]));
    assert_eq!(refused(&policy, &other)[0].rule, "pcr-1");
    let lie = boot_log().event(1, EventType::EFI_VARIABLE_BOOT, sha256(b"?"), &variable("Boot0001", b"a MAC"));
    assert_eq!(refused(&policy, &lie)[0].event, Some(19));
}

#[test]
fn one_event_more_or_less_is_one_sentence() {
    let policy = policy(|_| {});
    let more = boot_log_until_images()
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"rootkit"), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"agent.efi"), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b".initrd")
        .event(12, EventType::IPL, sha256(b"command line"), b"");
    let found = refused(&policy, &more);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].sentence.contains("has no event after `snponly.efi (iPXE)`"), "{found:?}");
    let less = boot_log_until_images()
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b".initrd")
        .event(12, EventType::IPL, sha256(b"command line"), b"");
    let found = refused(&policy, &less);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].sentence.starts_with("PCR 4: `agent.efi (UKI)` was not measured"), "{found:?}");
    assert_eq!(found[0].expected, [hex::encode(sha256(b"agent.efi"))]);
}

#[test]
fn d10_a_policy_judges_within_its_time_only() {
    let policy = policy(|json| {
        json["valid_from"] = "2026-01-01T00:00:00Z".into();
        json["valid_until"] = "2026-02-01T00:00:00Z".into();
    });
    let at = |now: i64| match verdict(&policy, &boot_log(), now) {
        Appraisal::Accepted(_) => String::new(),
        Appraisal::Refused(refusal) => refusal.reasons().join("; "),
    };
    let (from, until) = (1_767_225_600, 1_769_904_000);
    assert!(at(from - 1).contains("is not valid before 2026-01-01"));
    assert_eq!((at(from), at(until - 1)), (String::new(), String::new()));
    assert!(at(until).contains("was valid until 2026-02-01"));
}

#[test]
fn named_rules_that_leave_a_hole_are_refused() {
    type Change<'a> = &'a dyn Fn(&mut Value);
    let image = json!({"description": "UKI", "sha256": [hex::encode(sha256(b"agent.efi"))]});
    let cases: [(&str, Change<'_>); 11] = [
        ("does not enforce PCR 4", &|json| json["boot_images"] = json!({"mode": "warn", "image": [image]})),
        ("does not enforce PCR 4", &|json| {
            let mut optional = image.clone();
            optional["optional"] = true.into();
            json["boot_images"] = json!({"image": [optional]});
        }),
        ("lists nothing", &|json| json["boot_images"] = json!({"image": []})),
        ("says nothing", &|json| json["firmware"] = json!({})),
        ("has no text", &|json| json["command_line"] = json!({"text": []})),
        ("nobody could match", &|json| json["secure_boot"] = json!({"enabled": true, "db": {}})),
        ("must not vary", &|json| rule_of(json, 12)["varying"] = json!([{"type": "EV_IPL", "text": "*"}])),
        ("is valid at no time", &|json| {
            json["valid_from"] = "2026-02-01T00:00:00Z".into();
            json["valid_until"] = "2026-01-01T00:00:00Z".into();
        }),
        ("both events and alternatives", &|json| rule_of(json, 0)["alternative"] = json!([{"name": "a"}])),
        ("but not all", &|json| {
            for (pcr, names) in [(0, ["a", "b"]), (2, ["b", "c"])] {
                let rule = rule_of(json, pcr);
                rule["event"] = json!([]);
                rule["alternative"] = json!([{"name": names[0]}, {"name": names[1]}]);
            }
        }),
        ("of another mode", &|json| {
            for (pcr, mode) in [(0, "enforce"), (2, "warn")] {
                let rule = rule_of(json, pcr);
                rule["event"] = json!([]);
                rule["mode"] = mode.into();
                rule["alternative"] = json!([{"name": "a"}]);
            }
        }),
    ];
    for (says, change) in cases {
        let error = changed(change).expect_err(says);
        assert!(error.to_string().contains(says), "{says}: {error}");
    }
}

#[test]
fn the_canonical_form_has_its_members_in_order() {
    let policy = two_releases();
    let sorted: Value = serde_json::from_str(&policy.to_json()).unwrap();
    assert_eq!(policy.to_json(), sorted.to_string(), "serde_json sorts; the canonical form must be sorted already");
    assert_eq!(Policy::parse(&policy.to_toml()).unwrap(), policy);
    assert_eq!(policy.pcrs().iter().find(|rule| rule.index == 4).unwrap().mode, Mode::Enforce);
}
