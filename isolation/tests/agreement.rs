//! Agreement: where the site requires that several verifiers vouch for a node, one alone opens no port.

mod support;

use assay_service::client::ClientError;
use assay_wire::id::{AdmissionId, BootId};
use assay_wire::isolation::{Admission, AdmissionRequest, Renewal, RenewalAnswer, RenewalOutcome, RenewalRequest};
use assay_wire::result::{Claims, SignedResult, VerifierKey};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use serde_json::json;
use std::time::{Duration, Instant};
use support::{AIRLOCK, NET, QUARANTINE, Site, problem};

fn key() -> Ed25519KeyPair {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
    Ed25519KeyPair::from_pkcs8(document.as_ref()).expect("a key")
}

async fn admit(site: &Site, lead: &SignedResult, supporting: &[&SignedResult]) -> Result<Admission, ClientError> {
    let supporting = supporting.iter().map(|result| result.as_str().to_owned()).collect();
    site.service.post("/v1/admissions", &AdmissionRequest { result: lead.as_str().to_owned(), supporting }).await
}

#[tokio::test]
async fn a_port_opens_only_when_provider_and_project_agree() {
    let provider = key();
    let keys = [VerifierKey::of(&provider).to_string()];
    let site = Site::with(json!({"agreement": {"require": "provider-and-project", "provider_keys": keys}})).await;
    let context = site.airlocked().await;
    // The project's own verifier signs with the site's test key: that is the one that it trusts.
    let claims = site.claims(&context);
    let theirs = Claims { jti: AdmissionId::random(), exp: claims.exp - 100, ..claims.clone() };
    let (lead, support) = (SignedResult::sign(&claims, &provider), SignedResult::sign(&theirs, &site.key));
    let elsewhere = SignedResult::sign(&Claims { boot: BootId::random(), ..theirs.clone() }, &site.key);
    let stranger = SignedResult::sign(&theirs, &key());
    let refusals: [(&str, &SignedResult, &[&SignedResult]); 6] = [
        ("project's own", &lead, &[]),
        ("provider's", &support, &[]),
        ("project's own", &lead, &[&lead]),
        ("for boot", &lead, &[&elsewhere]),
        ("signed by none", &lead, &[&stranger]),
        ("signed by none", &stranger, &[&lead]),
    ];
    for (words, lead, supporting) in refusals {
        let refused = admit(&site, lead, supporting).await.unwrap_err();
        assert!(problem(&refused).kind == "result-refused" && problem(&refused).detail.contains(words), "{refused}");
        assert_eq!(site.port().await, (AIRLOCK, true), "{words}");
    }
    let admitted = admit(&site, &lead, &[&support]).await.expect("admitted");
    assert_eq!((admitted.id, admitted.expires_at_ms), (claims.jti, theirs.exp * 1000), "the earliest of the two");
    assert_eq!(site.port().await, (NET, false));
    // Renewals need the same agreement.
    let longer = |first: &Claims| Claims {
        jti: AdmissionId::random(),
        renews: Some(first.jti),
        exp: first.exp + 200,
        ..first.clone()
    };
    let (lead, support) = (longer(&claims), longer(&theirs));
    let renew = async |supporting: Vec<String>| {
        let result = SignedResult::sign(&lead, &provider).as_str().to_owned();
        let request = RenewalRequest { renewals: vec![Renewal { admission: claims.jti, result, supporting }] };
        let mut answer: RenewalAnswer = site.service.post("/v1/admission-renewals", &request).await.unwrap();
        answer.outcomes.remove(0)
    };
    assert!(matches!(renew(vec![]).await, RenewalOutcome::Refused { reason } if reason.contains("project's own")));
    let both = renew(vec![SignedResult::sign(&support, &site.key).as_str().to_owned()]).await;
    assert_eq!(both, RenewalOutcome::Renewed { expires_at_ms: support.exp * 1000 });
}

/// From the order to revoke to the answer, which is given only of a port that reads back as closed.
#[tokio::test]
async fn revocation_puts_the_port_into_quarantine_within_a_second() {
    let site = Site::start().await;
    let mut context = site.airlocked().await;
    let mut taken = Vec::new();
    for _ in 0..10 {
        let claims = site.claims(&context);
        site.admit(&claims).await.expect("admitted");
        let begun = Instant::now();
        site.revoke(claims.jti).await.expect("revoked");
        taken.push(begun.elapsed());
        assert_eq!(site.port().await, (QUARANTINE, true));
        site.operator.post::<_, serde_json::Value>("/v1/nodes/n1/cycle", &()).await.unwrap();
        context = site.entered().await;
    }
    taken.sort();
    eprintln!("revocation to quarantine: p50 {:?}, longest {:?} of {}", taken[5], taken[9], taken.len());
    assert!(taken[9] < Duration::from_secs(1), "{taken:?}");
}
