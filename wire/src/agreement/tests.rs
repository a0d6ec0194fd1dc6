//! Who must agree, on what, and for how long.

use super::*;
use crate::result::tests::{claims, key};
use proptest::prelude::*;
use ring::signature::Ed25519KeyPair;

const NOW_SECONDS: i64 = 1500;
const NOW_MS: i64 = NOW_SECONDS * 1000;
const HOUR_MS: i64 = 3_600_000;

/// A provider's verifier, a project's own, and somebody.
struct Parties {
    provider: Ed25519KeyPair,
    project: Ed25519KeyPair,
    somebody: Ed25519KeyPair,
}

impl Parties {
    fn new() -> Self {
        Self { provider: key(), project: key(), somebody: key() }
    }

    fn agreement(&self, require: Require) -> Agreement {
        Agreement::new(require, vec![VerifierKey::of(&self.provider)])
    }

    /// The project trusts both: that is what makes `any` what it was before there was a choice.
    fn project_keys(&self) -> Vec<VerifierKey> {
        vec![VerifierKey::of(&self.project), VerifierKey::of(&self.provider)]
    }
}

fn presented(lead: (&Claims, &Ed25519KeyPair), supporting: &[(&Claims, &Ed25519KeyPair)]) -> Presented {
    let sign = |(claims, key): &(&Claims, &Ed25519KeyPair)| SignedResult::sign(claims, key);
    Presented { lead: sign(&lead), supporting: supporting.iter().map(sign).collect() }
}

/// Another verifier's result about the same.
fn second(first: &Claims) -> Claims {
    Claims { jti: AdmissionId::random(), eat_nonce: "BB".into(), ..first.clone() }
}

#[test]
fn each_requirement_is_met_by_whom_it_names_and_by_nobody_else() {
    let parties = Parties::new();
    let (keys, lead) = (parties.project_keys(), claims());
    let other = second(&lead);
    let by = |who: &[&Ed25519KeyPair]| match who {
        [one] => presented((&lead, one), &[]),
        [one, two] => presented((&lead, one), &[(&other, two)]),
        _ => panic!("one or two"),
    };
    let (provider, project) = (&parties.provider, &parties.project);
    for (require, who, admitted) in [
        (Require::Any, vec![provider], true),
        (Require::Any, vec![project], true),
        (Require::Provider, vec![provider], true),
        (Require::Provider, vec![project], false),
        (Require::Provider, vec![project, provider], true),
        (Require::Project, vec![provider], false),
        (Require::Project, vec![project], true),
        (Require::Project, vec![provider, project], true),
        (Require::ProviderAndProject, vec![provider], false),
        (Require::ProviderAndProject, vec![project], false),
        (Require::ProviderAndProject, vec![provider, project], true),
        (Require::ProviderAndProject, vec![project, provider], true),
        (Require::ProviderAndProject, vec![provider, provider], false),
        (Require::ProviderAndProject, vec![project, project], false),
    ] {
        let agreed = parties.agreement(require).admits(&by(&who), &keys, NOW_SECONDS);
        assert_eq!(agreed.is_ok(), admitted, "{require:?} by {} of them: {agreed:?}", who.len());
    }
}

#[test]
fn no_key_means_nobody_and_a_strangers_support_spoils_everything() {
    let parties = Parties::new();
    let (lead, keys) = (claims(), parties.project_keys());
    let signed = presented((&lead, &parties.project), &[]);
    let nobody = Agreement::default().admits(&signed, &[], NOW_SECONDS).unwrap_err();
    assert_eq!(nobody, Disagreement::Lead(ResultError::UntrustedSignature { trusted: 0 }));
    for require in [Require::Provider, Require::ProviderAndProject] {
        let no_provider = Agreement::new(require, Vec::new());
        assert_eq!(
            no_provider.admits(&signed, &keys, NOW_SECONDS).unwrap_err(),
            Disagreement::Missing("the provider's verifier")
        );
    }
    // Where the project decides alone, the site's key leads only if the project trusts it.
    let own = [VerifierKey::of(&parties.project)];
    let by_provider = presented((&lead, &parties.provider), &[]);
    assert!(parties.agreement(Require::Any).admits(&by_provider, &own, NOW_SECONDS).is_err());
    let with_stranger = presented((&lead, &parties.project), &[(&second(&lead), &parties.somebody)]);
    for require in [Require::Any, Require::Project] {
        let refused = parties.agreement(require).admits(&with_stranger, &keys, NOW_SECONDS).unwrap_err();
        assert!(matches!(refused, Disagreement::Supporting { number: 1, .. }), "{refused:?}");
    }
    let many: Vec<_> = (0..=MAX_SUPPORTING).map(|_| (&lead, &parties.project)).collect();
    let refused = Agreement::default().admits(&presented((&lead, &parties.project), &many), &keys, NOW_SECONDS);
    assert_eq!(refused.unwrap_err(), Disagreement::TooMany { count: MAX_SUPPORTING + 1 });
}

/// Makes a claim another one.
type Spoiler = fn(&mut Claims);

/// Every way in which two results can be about different things.
fn spoilers() -> [(&'static str, Spoiler); 8] {
    [
        ("node", |c| c.node = "n2".parse().unwrap()),
        ("project", |c| c.project = "p2".parse().unwrap()),
        ("lease", |c| c.lease = LeaseId::random()),
        ("boot", |c| c.boot = BootId::random()),
        ("EK", |c| crate::result::tests::set_ek(c, b"another")),
        ("AK", |c| c.ak_name = "000bff".into()),
        ("TPM reset count", |c| c.reset_count += 1),
        ("TPM restart count", |c| c.restart_count += 1),
    ]
}

#[test]
fn d2_results_about_different_things_admit_nobody() {
    let parties = Parties::new();
    let (keys, lead) = (parties.project_keys(), claims());
    for (expected, spoil) in spoilers() {
        let mut other = second(&lead);
        spoil(&mut other);
        let both = presented((&lead, &parties.provider), &[(&other, &parties.project)]);
        for require in [Require::Any, Require::Provider, Require::ProviderAndProject] {
            let refused = parties.agreement(require).admits(&both, &keys, NOW_SECONDS).unwrap_err();
            assert!(matches!(refused, Disagreement::Other { what, .. } if what == expected), "{expected}: {refused:?}");
        }
    }
}

/// Project and lease are read twice: before the signature is checked, to find out by which keys, and after.
#[test]
fn d2_what_was_read_before_verification_must_be_what_was_verified() {
    let subject = Subject::of(&claims());
    assert_eq!(subject.is_for(&subject.project, subject.lease), Ok(()));
    let other = "p2".parse().unwrap();
    assert!(matches!(subject.is_for(&other, subject.lease), Err(Disagreement::Other { what: "project", .. })));
    let lease = subject.is_for(&subject.project, LeaseId::random());
    assert!(matches!(lease, Err(Disagreement::Other { what: "lease", .. })));
}

#[test]
fn what_several_agree_on_expires_with_the_first_of_them() {
    let parties = Parties::new();
    let (keys, lead) = (parties.project_keys(), claims());
    let shorter = Claims { exp: lead.exp - 200, ..second(&lead) };
    let both = presented((&lead, &parties.provider), &[(&shorter, &parties.project)]);
    let agreement = parties.agreement(Require::ProviderAndProject);
    let agreed = agreement.admits(&both, &keys, NOW_SECONDS).unwrap();
    assert_eq!((agreed.expires_at_ms(), agreed.id()), (shorter.exp * 1000, lead.jti));
    assert_eq!(agreed.supporting(), [shorter.jti]);
    let refused = agreement.admits(&both, &keys, shorter.exp).unwrap_err();
    assert_eq!(refused, Disagreement::Supporting { number: 1, cause: ResultError::Expired { seconds: 0 } });
}

fn standing(first: &Claims, supporting: Vec<AdmissionId>) -> Standing {
    let expires_at_ms = first.exp * 1000;
    Standing { admission: first.jti, subject: Subject::of(first), supporting, expires_at_ms }
}

fn renewal(first: &Claims) -> Claims {
    Claims { renews: Some(first.jti), iat: first.iat + 100, exp: first.exp + 100, ..second(first) }
}

#[test]
fn a_renewal_and_an_admission_are_not_each_other() {
    let parties = Parties::new();
    let (keys, first) = (parties.project_keys(), claims());
    let agreement = Agreement::default();
    let renewing = presented((&renewal(&first), &parties.project), &[]);
    let refused = agreement.admits(&renewing, &keys, NOW_SECONDS).unwrap_err();
    assert_eq!(refused, Disagreement::Renews(first.jti));
    let on_record = standing(&first, Vec::new());
    let renew = |presented: &Presented| agreement.renews(presented, &keys, &on_record, HOUR_MS, NOW_MS);
    assert_eq!(renew(&renewing), Ok((first.exp + 100) * 1000));
    let admitting = presented((&first, &parties.project), &[]);
    assert_eq!(renew(&admitting), Err(Disagreement::RenewsNot(first.jti)));
    let others = Claims { renews: Some(AdmissionId::random()), ..renewal(&first) };
    assert_eq!(renew(&presented((&others, &parties.project), &[])), Err(Disagreement::RenewsNot(first.jti)));
}

#[test]
fn a_renewal_is_about_the_same_and_never_brings_anything_back() {
    let parties = Parties::new();
    let (keys, first) = (parties.project_keys(), claims());
    let agreement = Agreement::default();
    let on_record = standing(&first, Vec::new());
    for (expected, spoil) in spoilers() {
        let mut other = renewal(&first);
        spoil(&mut other);
        let refused = agreement.renews(&presented((&other, &parties.project), &[]), &keys, &on_record, HOUR_MS, NOW_MS);
        assert!(
            matches!(refused, Err(Disagreement::Other { what, .. }) if what == expected),
            "{expected}: {refused:?}"
        );
    }
    let late = presented((&renewal(&first), &parties.project), &[]);
    let refused = agreement.renews(&late, &keys, &on_record, HOUR_MS, on_record.expires_at_ms);
    assert_eq!(refused, Err(Disagreement::Ended(first.jti)));
    let stranger = presented((&renewal(&first), &parties.somebody), &[]);
    assert!(agreement.renews(&stranger, &keys, &on_record, HOUR_MS, NOW_MS).is_err());
}

#[test]
fn renewals_need_the_same_agreement_and_supporters_may_know_the_admission_by_their_own_id() {
    let parties = Parties::new();
    let (keys, first) = (parties.project_keys(), claims());
    let supported = second(&first);
    let on_record = standing(&first, vec![supported.jti]);
    let agreement = parties.agreement(Require::ProviderAndProject);
    let lead = renewal(&first);
    let alone = presented((&lead, &parties.provider), &[]);
    let refused = agreement.renews(&alone, &keys, &on_record, HOUR_MS, NOW_MS);
    assert_eq!(refused, Err(Disagreement::Missing("a verifier of the project's own")));
    let support = Claims { exp: lead.exp - 30, ..renewal(&supported) };
    let both = presented((&lead, &parties.provider), &[(&support, &parties.project)]);
    assert_eq!(agreement.renews(&both, &keys, &on_record, HOUR_MS, NOW_MS), Ok(support.exp * 1000));
    // The other way round it leads, and then it must name the admission itself.
    let turned = presented((&support, &parties.project), &[(&lead, &parties.provider)]);
    assert!(agreement.renews(&turned, &keys, &on_record, HOUR_MS, NOW_MS).is_err());
    let foreign = Claims { renews: Some(AdmissionId::random()), ..support };
    let both = presented((&lead, &parties.provider), &[(&foreign, &parties.project)]);
    assert!(agreement.renews(&both, &keys, &on_record, HOUR_MS, NOW_MS).is_err());
}

#[test]
fn configuration_says_what_is_wrong_with_it() {
    let parse = |text: &str| serde_json::from_str::<Agreement>(text);
    assert_eq!(parse("{}").unwrap(), Agreement::default());
    let key = "ab".repeat(32);
    let good = parse(&format!(r#"{{"require":"provider-and-project","provider_keys":["{key}"]}}"#)).unwrap();
    assert_eq!(good, Agreement::new(Require::ProviderAndProject, vec![key.parse().unwrap()]));
    for (text, named) in [
        (r#"{"require":"provider"}"#, "agreement.provider_keys"),
        (r#"{"provider_keys":["ab"]}"#, "`ab`"),
        (r#"{"require":"everybody"}"#, "everybody"),
        (r#"{"quorum":2}"#, "quorum"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

proptest! {
    #[test]
    fn expiry_only_grows_and_never_beyond_the_longest(
        old in 1501_i64..4000, wanted in 1501_i64..9000, longest_seconds in 1_i64..5000
    ) {
        let parties = Parties::new();
        let first = Claims { exp: old, ..claims() };
        let lead = Claims { exp: wanted, ..renewal(&first) };
        let renewed = Agreement::default().renews(
            &presented((&lead, &parties.project), &[]), &parties.project_keys(), &standing(&first, Vec::new()),
            longest_seconds * 1000, NOW_MS,
        ).unwrap();
        prop_assert!(renewed >= old * 1000);
        prop_assert_eq!(renewed, (wanted * 1000).min(NOW_MS + longest_seconds * 1000).max(old * 1000));
    }
}
