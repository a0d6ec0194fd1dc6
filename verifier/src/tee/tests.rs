//! Real quotes with the collateral of their time ([`samples`]). Where they are not to be had, what needs them says that it
//! skipped.

use super::*;
use assay_wire::evidence::TeeKind;
use ring::digest::SHA256;

/// A quote with its collateral, and a moment when both were good.
struct Sample {
    quote: TeeQuote,
    collateral: Collateral,
    now: i64,
}

fn sample(kind: TeeKind, name: &str) -> Option<Sample> {
    let folder = samples::folder()?;
    let quote = TeeQuote { kind, quote: std::fs::read(folder.join(name)).unwrap() };
    let text = std::fs::read_to_string(folder.join(format!("{name}_collateral.json"))).unwrap();
    let collateral = Collateral::from_files([(name, text.as_str())]).unwrap();
    Some(Sample { quote, collateral, now: samples::GOOD_AT })
}

fn both() -> impl Iterator<Item = (Sample, TeeRule)> {
    let samples = [(TeeKind::Sgx, "sgx_quote"), (TeeKind::Tdx, "tdx_quote")];
    samples.into_iter().filter_map(|(kind, name)| {
        let sample = sample(kind, name)?;
        let rule = rule_of(&verify(&sample.quote, &sample.collateral, sample.now).unwrap());
        Some((sample, rule))
    })
}

/// The narrowest rule that the quote meets.
fn rule_of(quote: &VerifiedTeeQuote) -> TeeRule {
    let mut rule = serde_json::json!({"tcb_status": [quote.tcb_status()]});
    if let Some(enclave) = quote.enclave() {
        rule["kind"] = "sgx".into();
        rule["mr_enclave"] = vec![hex::encode(enclave.mr_enclave)].into();
        rule["mr_signer"] = vec![hex::encode(enclave.mr_signer)].into();
        rule["isv_prod_id"] = enclave.isv_prod_id.into();
        rule["isv_svn_min"] = enclave.isv_svn.into();
    }
    if let Some(domain) = quote.trust_domain() {
        rule["kind"] = "tdx".into();
        rule["td_attributes"] = hex::encode(domain.td_attributes).into();
        let found = [domain.mr_td, domain.rt_mr0, domain.rt_mr1, domain.rt_mr2, domain.rt_mr3];
        for (name, found) in ["mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3"].into_iter().zip(found) {
            rule[name] = vec![hex::encode(found)].into();
        }
    }
    let rule: TeeRule = serde_json::from_value(rule).unwrap();
    assert_eq!(rule.problem(), None);
    rule
}

fn bound_to(sample: &Sample) -> [u8; 64] {
    *verify(&sample.quote, &sample.collateral, sample.now).unwrap().report_data()
}

fn judged(sample: &Sample, rule: &TeeRule) -> Vec<String> {
    let quotes = [sample.quote.clone()];
    deviations(std::slice::from_ref(rule), &quotes, &sample.collateral, &bound_to(sample), sample.now)
}

#[test]
fn a_real_quote_meets_the_rule_that_describes_it() {
    for (sample, rule) in both() {
        assert_eq!(judged(&sample, &rule), Vec::<String>::new());
        let text = serde_json::to_string(&rule).unwrap();
        assert_eq!(serde_json::from_str::<TeeRule>(&text).unwrap(), rule);
    }
}

#[test]
fn a_quote_that_the_policy_demands_and_that_does_not_come_is_refused() {
    for (sample, rule) in both() {
        let none = deviations(std::slice::from_ref(&rule), &[], &sample.collateral, &[0; 64], sample.now);
        assert!(none[0].contains("which the policy demands"), "{none:?}");
        let other = match sample.quote.kind {
            TeeKind::Sgx => TeeKind::Tdx,
            TeeKind::Tdx => TeeKind::Sgx,
        };
        let quotes = [TeeQuote { kind: other, ..sample.quote.clone() }];
        let other = deviations(std::slice::from_ref(&rule), &quotes, &sample.collateral, &[0; 64], sample.now);
        assert!(other[0].contains("which the policy demands"), "{other:?}");
        assert!(matches!(verify(&quotes[0], &sample.collateral, sample.now), Err(TeeError::Kind { .. })));
        let quotes = vec![sample.quote.clone(); MOST_QUOTES + 1];
        assert_eq!(deviations(&[rule], &quotes, &sample.collateral, &[0; 64], sample.now).len(), 1);
    }
}

#[test]
fn a_quote_of_another_machine_or_moment_is_refused() {
    for (sample, rule) in both() {
        let quotes = [sample.quote.clone()];
        let mut other = bound_to(&sample);
        other[63] ^= 1;
        let problems = deviations(&[rule], &quotes, &sample.collateral, &other, sample.now);
        assert!(problems.len() == 1 && problems[0].contains("not bound to this TPM and nonce"), "{problems:?}");
    }
}

#[test]
fn each_measurement_that_a_rule_names_counts() {
    for (sample, rule) in both() {
        let whole = serde_json::to_value(&rule).unwrap();
        let mut changed = 0;
        for (field, value) in whole.as_object().unwrap() {
            let other = match (field.as_str(), value) {
                ("kind", _) => continue,
                ("tcb_status", _) => serde_json::json!(["UpToDate", "OutOfDate"])
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|status| !value.as_array().unwrap().contains(status))
                    .take(1)
                    .cloned()
                    .collect::<Vec<_>>()
                    .into(),
                (_, serde_json::Value::Number(number)) => (number.as_u64().unwrap() + 1).into(),
                (_, serde_json::Value::String(text)) => "01".repeat(text.len() / 2).into(),
                (_, value) => vec!["01".repeat(value[0].as_str().unwrap().len() / 2)].into(),
            };
            let mut text = whole.clone();
            text[field] = other;
            let rule: TeeRule = serde_json::from_value(text).unwrap();
            assert_eq!(judged(&sample, &rule).len(), 1, "{field}");
            changed += 1;
        }
        assert!(changed >= 5);
    }
}

#[test]
fn a_changed_quote_or_no_or_old_collateral_is_refused() {
    for (sample, _) in both() {
        let verified = |quote: &TeeQuote, collateral: &Collateral, now| verify(quote, collateral, now).map(|_| ());
        // The first and last octets of the report, and of the signature over it.
        for at in [0, 48, 300, 431, 440, 600] {
            let mut quote = sample.quote.clone();
            quote.quote[at] ^= 1;
            assert!(verified(&quote, &sample.collateral, sample.now).is_err(), "octet {at}");
        }
        let mut cut = sample.quote.clone();
        cut.quote.truncate(400);
        assert!(verified(&cut, &sample.collateral, sample.now).is_err());
        let none = verified(&sample.quote, &Collateral::default(), sample.now);
        assert!(matches!(none, Err(TeeError::NoCollateral { .. })));
        let year = 365 * 86_400;
        assert!(matches!(
            verified(&sample.quote, &sample.collateral, sample.now + year),
            Err(TeeError::NotVerified { .. })
        ));
        let mut large = sample.quote.clone();
        large.quote.resize(64 << 10, 0);
        assert!(matches!(verified(&large, &sample.collateral, sample.now), Err(TeeError::TooLarge { .. })));
    }
}

#[test]
fn a_rule_that_any_enclave_would_meet_is_no_rule() {
    let enclave = "11".repeat(32);
    let domain = "22".repeat(48);
    for (text, problem) in [
        (serde_json::json!({"kind": "sgx", "tcb_status": ["UpToDate"]}), "names no enclave"),
        (serde_json::json!({"kind": "sgx", "tcb_status": ["UpToDate"], "mr_signer": [enclave]}), "names no enclave"),
        (serde_json::json!({"kind": "tdx", "tcb_status": ["UpToDate"]}), "names no domain"),
        (serde_json::json!({"kind": "tdx", "tcb_status": ["UpToDate"], "mr_enclave": [enclave]}), "only SGX has"),
        (serde_json::json!({"kind": "sgx", "tcb_status": ["UpToDate"], "mr_td": [domain]}), "only TDX has"),
        (serde_json::json!({"kind": "tdx", "tcb_status": [], "mr_td": [domain]}), "no tcb_status"),
        (serde_json::json!({"kind": "tdx", "tcb_status": ["Revoked"], "mr_td": [domain]}), "is none of"),
    ] {
        let rule: TeeRule = serde_json::from_value(text.clone()).unwrap();
        assert!(rule.problem().unwrap().contains(problem), "{text}");
    }
    assert!(
        serde_json::from_value::<TeeRule>(serde_json::json!({"kind": "sgx", "tcb_status": [], "debug": true})).is_err()
    );
}

#[test]
fn report_data_is_the_nonce_and_the_ak_and_nothing_after() {
    let public = assay_tpm::public::Public::parse(&AK).unwrap();
    let data = report_data(&[7; 32], public.name());
    let hashed = [&[7; 32][..], public.name().as_bytes()].concat();
    assert_eq!(&data[..32], ring::digest::digest(&SHA256, &hashed).as_ref());
    assert_eq!(&data[32..], [0; 32]);
    assert_ne!(report_data(&[8; 32], public.name()), data);
}

/// `TPMT_PUBLIC` of a P-256 key.
const AK: [u8; 88] = {
    let mut public = [0; 88];
    let head = [0, 0x23, 0, 0x0b, 0, 5, 0, 0x72, 0, 0, 0, 0x10, 0, 0x18, 0, 0x0b, 0, 3, 0, 0x10, 0, 32];
    let mut at = 0;
    while at < head.len() {
        public[at] = head[at];
        at += 1;
    }
    public[head.len() + 33] = 32;
    public
};
