//! The login phase against a simulated initiator: proofs, names, stages, the session registry.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use assay_iscsi::{
    Authentication, ChapAlgorithms, ChapCredentials, ConfigError, ConnectionId, Portal, Sessions, Target, TargetConfig,
};
use md5::{Digest as _, Md5};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use support::{INITIATOR, Initiator, NAME, RamDisk, SECRET, TARGET, config};

struct Site {
    portal: Arc<Portal>,
    disk: Arc<RamDisk>,
    sessions: Arc<Mutex<Sessions>>,
}

impl Site {
    fn new(authentication: Authentication) -> Self {
        let portal = Arc::new(Portal::default());
        portal.insert(Arc::new(Target::new(config(64, authentication)).unwrap()));
        Self { portal, disk: Arc::new(RamDisk::new(64, 512)), sessions: Arc::default() }
    }

    fn with_chap() -> Self {
        Self::with(ChapAlgorithms::WithMd5)
    }

    fn with(algorithms: ChapAlgorithms) -> Self {
        Self::new(Authentication::Chap {
            initiator: ChapCredentials::new(NAME, SECRET),
            target: Some(ChapCredentials::new("target", "another secret")),
            algorithms,
        })
    }

    fn connect(&self, id: u64) -> Initiator {
        Initiator::new(self.portal.clone(), self.disk.clone(), self.sessions.clone(), id)
    }
}

const NAMES: [(&str, &str); 2] = [("InitiatorName", INITIATOR), ("TargetName", TARGET)];

fn unhex(value: &str) -> Vec<u8> {
    hex::decode(value.strip_prefix("0x").unwrap()).unwrap()
}

fn response(algorithm: &str, identifier: u8, secret: &str, challenge: &[u8]) -> String {
    let message = [&[identifier], secret.as_bytes(), challenge].concat();
    let digest = match algorithm {
        "5" => Md5::digest(&message).to_vec(),
        _ => ring::digest::digest(&ring::digest::SHA256, &message).as_ref().to_vec(),
    };
    format!("0x{}", hex::encode(digest))
}

/// Goes through CHAP up to the response; `mutual` are further keys sent with it.
fn prove(initiator: &mut Initiator, algorithms: &str, secret: &str, mutual: &[(&str, &str)]) -> support::Answer {
    let first = initiator.login_request(0x81, &[&NAMES[..], &[("AuthMethod", "None,CHAP")]].concat());
    assert_eq!(first.key("AuthMethod").as_deref(), Some("CHAP"));
    assert_eq!(first.key("TargetPortalGroupTag").as_deref(), Some("1"));
    assert_eq!(first.header[1], 0, "no transit before the proof");
    let challenge = initiator.login_request(0x00, &[("CHAP_A", algorithms)]);
    let algorithm = challenge.key("CHAP_A").unwrap();
    let identifier: u8 = challenge.key("CHAP_I").unwrap().parse().unwrap();
    let octets = unhex(&challenge.key("CHAP_C").unwrap());
    let answer = response(&algorithm, identifier, secret, &octets);
    initiator.login_request(0x81, &[&[("CHAP_N", NAME), ("CHAP_R", &answer)], mutual].concat())
}

#[test]
fn chap_with_either_algorithm_leads_to_a_session() {
    for (offered, chosen) in [("5", "5"), ("5,7", "7"), ("7,6", "7")] {
        let site = Site::with_chap();
        let mut initiator = site.connect(1);
        let proven = prove(&mut initiator, offered, SECRET, &[]);
        assert_eq!((proven.status(), proven.header[1]), (0, 0x81), "CHAP_A={chosen}");
        let done = initiator.login_request(0x87, &[("HeaderDigest", "None"), ("InitialR2T", "No")]);
        assert_eq!((done.status(), done.header[1]), (0, 0x87));
        assert_eq!(done.key("InitialR2T").as_deref(), Some("No"));
        assert_eq!(done.key("MaxRecvDataSegmentLength").as_deref(), Some("262144"));
        assert_ne!(done.header[14..16], [0, 0], "a session has a handle");
        assert!(initiator.logged_in);
    }
}

#[test]
fn md5_is_refused_where_the_target_does_not_allow_it() {
    let site = Site::with(ChapAlgorithms::Sha256);
    for offered in ["5", "6,5", "5,8", "", "0x7", "07", "5;7"] {
        let mut initiator = site.connect(1);
        initiator.login_request(0x00, &[&NAMES[..], &[("AuthMethod", "CHAP")]].concat());
        let refused = initiator.login_request(0x00, &[("CHAP_A", offered)]);
        assert_eq!((refused.status(), refused.key("CHAP_C")), (0x0201, None), "CHAP_A={offered}");
        assert!(initiator.closed);
    }
    let mut initiator = site.connect(1);
    assert_eq!(prove(&mut initiator, "5,7", SECRET, &[]).status(), 0, "the strongest is taken, though it comes last");
}

#[test]
fn an_algorithm_is_chosen_once_and_answered_as_it_was_chosen() {
    // An initiator that asks again after its challenge could weaken what was agreed on.
    let site = Site::with_chap();
    let mut initiator = site.connect(1);
    initiator.login_request(0x00, &[&NAMES[..], &[("AuthMethod", "CHAP")]].concat());
    assert_eq!(initiator.login_request(0x00, &[("CHAP_A", "7")]).key("CHAP_A").as_deref(), Some("7"));
    assert_eq!(initiator.login_request(0x00, &[("CHAP_A", "5")]).status(), 0x0200);
    // An MD5 answer to a SHA-256 challenge proves nothing.
    let mut initiator = site.connect(2);
    initiator.login_request(0x00, &[&NAMES[..], &[("AuthMethod", "CHAP")]].concat());
    let challenge = initiator.login_request(0x00, &[("CHAP_A", "7")]);
    let identifier: u8 = challenge.key("CHAP_I").unwrap().parse().unwrap();
    let weak = response("5", identifier, SECRET, &unhex(&challenge.key("CHAP_C").unwrap()));
    assert_eq!(initiator.login_request(0x81, &[("CHAP_N", NAME), ("CHAP_R", &weak)]).status(), 0x0201);
}

#[test]
fn discovery_does_not_weaken_a_target_that_wants_sha_256() {
    // One target allows MD5, the other does not; both have the same credentials.
    let site = Site::with(ChapAlgorithms::Sha256);
    let weaker = Authentication::Chap {
        initiator: ChapCredentials::new(NAME, SECRET),
        target: None,
        algorithms: ChapAlgorithms::WithMd5,
    };
    let config = TargetConfig { name: "iqn.2026-01.example:weaker".into(), ..config(64, weaker) };
    site.portal.insert(Arc::new(Target::new(config).unwrap()));
    for (algorithm, listed) in
        [("5", vec!["iqn.2026-01.example:weaker"]), ("7", vec![TARGET, "iqn.2026-01.example:weaker"])]
    {
        let mut initiator = site.connect(1);
        let names = [("InitiatorName", INITIATOR), ("SessionType", "Discovery"), ("AuthMethod", "CHAP")];
        initiator.login_request(0x00, &names);
        let challenge = initiator.login_request(0x00, &[("CHAP_A", algorithm)]);
        let identifier = challenge.key("CHAP_I").unwrap().parse().unwrap();
        let proof = response(algorithm, identifier, SECRET, &unhex(&challenge.key("CHAP_C").unwrap()));
        assert_eq!(initiator.login_request(0x83, &[("CHAP_N", NAME), ("CHAP_R", &proof)]).status(), 0);
        let mut header = [0; 48];
        header[..2].copy_from_slice(&[0x44, 0x80]);
        header[20..24].copy_from_slice(&[0xff; 4]);
        initiator.send(header, b"SendTargets=All\0");
        let text = String::from_utf8(initiator.answer().data).unwrap();
        let mut found: Vec<&str> = text.split('\0').filter_map(|pair| pair.strip_prefix("TargetName=")).collect();
        found.sort_by_key(|name| *name != TARGET);
        assert_eq!(found, listed, "CHAP_A={algorithm}");
    }
}

#[test]
fn secrets_that_could_be_guessed_or_turned_around_make_no_target() {
    let target = |initiator: &str, own: Option<&str>| {
        Target::new(config(
            64,
            Authentication::Chap {
                initiator: ChapCredentials::new(NAME, initiator),
                target: own.map(|secret| ChapCredentials::new("target", secret)),
                algorithms: ChapAlgorithms::Sha256,
            },
        ))
        .err()
    };
    let weak = Some(ConfigError::WeakSecret { target: TARGET.into() });
    assert_eq!(target("11 octets..", None), weak);
    assert_eq!(target("12 octets...", None), None);
    assert_eq!(target("12 octets...", Some("short")), weak);
    assert_eq!(target(SECRET, Some(SECRET)), Some(ConfigError::SharedSecret { target: TARGET.into() }));
}

#[test]
fn a_target_without_a_secret_of_its_own_does_not_pretend_to_prove_itself() {
    let site = Site::new(Authentication::Chap {
        initiator: ChapCredentials::new(NAME, SECRET),
        target: None,
        algorithms: ChapAlgorithms::Sha256,
    });
    let mut initiator = site.connect(1);
    let refused = prove(&mut initiator, "7", SECRET, &[("CHAP_I", "9"), ("CHAP_C", "0x00112233445566778899")]);
    assert_eq!((refused.status(), refused.key("CHAP_R")), (0x0201, None));
}

#[test]
fn a_wrong_secret_is_refused_and_the_connection_closed() {
    let site = Site::with_chap();
    let mut initiator = site.connect(1);
    let refused = prove(&mut initiator, "7", "wrong", &[]);
    assert_eq!(refused.status(), 0x0201);
    assert!(initiator.closed && !initiator.logged_in);
    assert!(site.sessions.lock().unwrap().connections(TARGET).is_empty());
}

#[test]
fn an_overheard_response_is_worth_nothing_on_another_connection() {
    let site = Site::with_chap();
    let mut first = site.connect(1);
    first.login_request(0x00, &[&NAMES[..], &[("AuthMethod", "CHAP")]].concat());
    let challenge = first.login_request(0x00, &[("CHAP_A", "7")]);
    let identifier: u8 = challenge.key("CHAP_I").unwrap().parse().unwrap();
    let overheard = response("7", identifier, SECRET, &unhex(&challenge.key("CHAP_C").unwrap()));
    let mut second = site.connect(2);
    second.login_request(0x00, &[&NAMES[..], &[("AuthMethod", "CHAP")]].concat());
    second.login_request(0x00, &[("CHAP_A", "7")]);
    let refused = second.login_request(0x81, &[("CHAP_N", NAME), ("CHAP_R", &overheard)]);
    assert_eq!(refused.status(), 0x0201);
}

#[test]
fn there_is_no_way_around_chap() {
    let attempts: [(u8, &[(&str, &str)]); 4] = [
        (0x81, &[("AuthMethod", "None")]),
        (0x87, &[]),
        (0x87, &[("AuthMethod", "None")]),
        (0x83, &[("AuthMethod", "None")]),
    ];
    for (stages, keys) in attempts {
        let mut initiator = Site::with_chap().connect(1);
        let refused = initiator.login_request(stages, &[&NAMES[..], keys].concat());
        assert_eq!(refused.status(), 0x0201, "{stages:#x} {keys:?}");
        assert!(initiator.closed);
    }
    // Transit without a word about authentication does not move the stage, and a later stage is not believed.
    let mut initiator = Site::with_chap().connect(1);
    assert_eq!(initiator.login_request(0x87 & 0xf3, &NAMES).header[1] & 0x80, 0);
    assert_eq!(initiator.login_request(0x87, &[]).status(), 0x020b);
    assert!(!initiator.logged_in);
}

#[test]
fn the_target_proves_itself_where_it_is_asked_to() {
    let site = Site::with_chap();
    let mut initiator = site.connect(1);
    let proven = prove(&mut initiator, "7", SECRET, &[("CHAP_I", "9"), ("CHAP_C", "0x00112233445566778899")]);
    assert_eq!(proven.key("CHAP_N").as_deref(), Some("target"));
    let expected = response("7", 9, "another secret", &unhex("0x00112233445566778899"));
    assert_eq!(proven.key("CHAP_R"), Some(expected));
}

#[test]
fn a_challenge_that_comes_back_is_refused() {
    let site = Site::with_chap();
    let mut initiator = site.connect(1);
    initiator.login_request(0x00, &[&NAMES[..], &[("AuthMethod", "CHAP")]].concat());
    let challenge = initiator.login_request(0x00, &[("CHAP_A", "7")]);
    let (identifier, octets) = (challenge.key("CHAP_I").unwrap(), challenge.key("CHAP_C").unwrap());
    let proof = response("7", identifier.parse().unwrap(), SECRET, &unhex(&octets));
    let keys = [("CHAP_N", NAME), ("CHAP_R", &proof), ("CHAP_I", &identifier), ("CHAP_C", &octets)];
    assert_eq!(initiator.login_request(0x81, &keys).status(), 0x0201);
}

#[test]
fn an_unknown_target_and_a_foreign_initiator_are_told_the_same() {
    let site = Site::new(Authentication::None);
    for names in [
        [("InitiatorName", "iqn.2026-01.example:evil"), ("TargetName", TARGET)],
        [("InitiatorName", INITIATOR), ("TargetName", "iqn.2026-01.example:none")],
    ] {
        assert_eq!(site.connect(1).login_request(0x87, &names).status(), 0x0203);
    }
    assert_eq!(site.connect(1).login_request(0x87, &[("InitiatorName", INITIATOR)]).status(), 0x0207);
    assert_eq!(site.connect(1).login_request(0x87, &[("TargetName", TARGET)]).status(), 0x0207);
}

#[test]
fn discovery_lists_the_initiators_own_targets_only() {
    let site = Site::with_chap();
    let other = support::config(64, Authentication::None);
    site.portal.insert(Arc::new(
        Target::new(TargetConfig {
            name: "iqn.2026-01.example:other".into(),
            initiator: "iqn.2026-01.example:n2".into(),
            ..other
        })
        .unwrap(),
    ));
    let mut initiator = site.connect(1);
    let names = [("InitiatorName", INITIATOR), ("SessionType", "Discovery"), ("AuthMethod", "CHAP")];
    initiator.login_request(0x00, &names);
    let challenge = initiator.login_request(0x00, &[("CHAP_A", "7")]);
    let identifier = challenge.key("CHAP_I").unwrap().parse().unwrap();
    let proof = response("7", identifier, SECRET, &unhex(&challenge.key("CHAP_C").unwrap()));
    let done = initiator.login_request(0x83, &[("CHAP_N", NAME), ("CHAP_R", &proof)]);
    assert_eq!((done.status(), done.header[1]), (0, 0x83));
    let mut header = [0; 48];
    header[..2].copy_from_slice(&[0x44, 0x80]);
    header[20..24].copy_from_slice(&[0xff; 4]);
    initiator.send(header, b"SendTargets=All\0");
    let list = initiator.answer();
    assert_eq!(list.header[..2], [0x24, 0x80]);
    assert_eq!(list.data, format!("TargetName={TARGET}\0TargetAddress=127.0.0.1:3260,1\0").as_bytes());
}

#[test]
fn discovery_by_a_stranger_gets_a_challenge_and_never_a_list() {
    let mut initiator = Site::with_chap().connect(1);
    let names = [("InitiatorName", "iqn.2026-01.example:evil"), ("SessionType", "Discovery"), ("AuthMethod", "CHAP")];
    initiator.login_request(0x00, &names);
    initiator.login_request(0x00, &[("CHAP_A", "7")]);
    let refused = initiator.login_request(0x83, &[("CHAP_N", NAME), ("CHAP_R", "0x00")]);
    assert_eq!(refused.status(), 0x0201);
}

#[test]
fn a_text_may_come_in_several_requests() {
    let site = Site::new(Authentication::None);
    let mut initiator = site.connect(1);
    let first = initiator.login_request(0x44, &[("InitiatorName", INITIATOR)]);
    assert_eq!((first.status(), first.header[1], first.data.len()), (0, 0x04, 0));
    let last = initiator.login_request(0x87, &[("TargetName", TARGET), ("X-example", "1")]);
    assert_eq!((last.status(), last.header[1]), (0, 0x87));
    assert_eq!(last.key("X-example").as_deref(), Some("NotUnderstood"));
    assert!(initiator.logged_in);
}

#[test]
fn endless_texts_are_cut_off() {
    let mut initiator = Site::new(Authentication::None).connect(1);
    let long = "v".repeat(4000);
    let statuses: Vec<u16> = (0..5).map(|_| initiator.login_request(0x44, &[("X-a", &long)]).status()).collect();
    assert_eq!(statuses, [0, 0, 0, 0, 0x0200]);
}

#[test]
fn the_same_port_reinstates_its_session_and_another_is_refused() {
    let site = Site::new(Authentication::None);
    let mut first = site.connect(1);
    assert_eq!(first.log_in(&[]).status(), 0);
    let mut other = site.connect(2);
    other.isid = [0x40, 0, 0, 0, 0, 2];
    assert_eq!(other.log_in(&[]).status(), 0x0202);
    assert!(other.closed);
    let mut again = site.connect(3);
    assert_eq!(again.log_in(&[]).status(), 0);
    assert_eq!(again.reinstated, Some(ConnectionId(1)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn arbitrary_octets_before_login_never_panic(octets in prop::collection::vec(any::<u8>(), 0..2000)) {
        let mut initiator = Site::with_chap().connect(1);
        initiator.send_octets(&octets);
        prop_assert!(!initiator.logged_in);
    }

    #[test]
    fn arbitrary_login_requests_never_pass_chap(
        requests in prop::collection::vec((any::<u8>(), prop::collection::vec((
            prop::sample::select(vec![
                "InitiatorName", "TargetName", "SessionType", "AuthMethod", "CHAP_A", "CHAP_N", "CHAP_R", "CHAP_I",
                "CHAP_C", "HeaderDigest", "MaxBurstLength",
            ]),
            prop::sample::select(vec![INITIATOR, TARGET, "Normal", "Discovery", "None", "CHAP", "7", "5", NAME, "0x00"]),
        ), 0..6)), 1..10),
    ) {
        let mut initiator = Site::with_chap().connect(1);
        for (stages, keys) in requests {
            if initiator.closed {
                break;
            }
            initiator.login_request(stages, &keys);
        }
        prop_assert!(!initiator.logged_in);
    }
}
