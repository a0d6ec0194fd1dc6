//! Agreement: where the site requires that several verifiers vouch for a node, one alone opens no port.

mod support;

use assay_service::auth::Role;
use assay_service::client::{ClientError, ServiceClient};
use assay_service::clock::Clock as _;
use assay_wire::id::{AdmissionId, BootId};
use assay_wire::isolation::{
    Admission, AdmissionRequest, NodeState, NodeStatus, RejectRequest, Renewal, RenewalAnswer, RenewalOutcome,
    RenewalRequest,
};
use assay_wire::result::{Claims, SignedResult, VerifierKey};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use serde_json::json;
use std::time::{Duration, Instant};
use support::{AIRLOCK, NET, QUARANTINE, Site, in_quarantine, is, problem};

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

#[tokio::test]
async fn when_the_projects_verifier_is_gone_the_port_closes_at_the_time_last_agreed_on() {
    let provider = key();
    let keys = [VerifierKey::of(&provider).to_string()];
    let site = Site::with(json!({"agreement": {"require": "provider-and-project", "provider_keys": keys}})).await;
    let claims = site.claims(&site.airlocked().await);
    let theirs = Claims { jti: AdmissionId::random(), ..claims.clone() };
    let (lead, support) = (SignedResult::sign(&claims, &provider), SignedResult::sign(&theirs, &site.key));
    admit(&site, &lead, &[&support]).await.expect("admitted");
    let fresh = |first: &Claims, seconds: i64| {
        let (jti, renews, now) = (AdmissionId::random(), Some(first.jti), site.clock.now_seconds());
        Claims { jti, renews, iat: now, exp: now + seconds, ..first.clone() }
    };
    let renew = async |lead: Claims, supporting: Vec<Claims>| {
        let result = SignedResult::sign(&lead, &provider).as_str().to_owned();
        let sign = |claims: &Claims| SignedResult::sign(claims, &site.key).as_str().to_owned();
        let supporting = supporting.iter().map(sign).collect();
        let request = RenewalRequest { renewals: vec![Renewal { admission: claims.jti, result, supporting }] };
        let mut answer: RenewalAnswer = site.service.post("/v1/admission-renewals", &request).await.unwrap();
        answer.outcomes.remove(0)
    };
    site.clock.skip_seconds(200);
    let support = fresh(&theirs, 300);
    let agreed_ms = support.exp * 1000;
    let both = renew(fresh(&claims, 400), vec![support]).await;
    assert_eq!(both, RenewalOutcome::Renewed { expires_at_ms: agreed_ms });
    // Beyond the first results, and within what was agreed on. The provider's word alone moves nothing.
    site.clock.skip_seconds(200);
    assert!(matches!(renew(fresh(&claims, 900), vec![]).await, RenewalOutcome::Refused { .. }));
    site.until("looked at again", is(NodeState::Allocated)).await;
    assert_eq!(site.port().await, (NET, false));
    site.clock.skip_seconds(101);
    let node = site.until("rejected by expiry", is(NodeState::Rejected)).await;
    assert!(in_quarantine(&node) && node.reason.contains("expired"), "{node:?}");
    assert_eq!(site.port().await, (QUARANTINE, true));
}

#[tokio::test]
async fn a_projects_own_verifier_closes_its_nodes_and_no_others() {
    let site = Site::start().await;
    let (context, admission) = site.allocated().await;
    let of = |project: &str| {
        let token = site.context.tokens.issue(project, Role::Project(project.parse().unwrap())).expect("a token");
        ServiceClient::new(site.base.clone(), site.context.identity.ca_pem(), token).expect("a client")
    };
    let report = |boot| RejectRequest { boot, reason: "the project's verifier: PCR 7".into() };
    let (own, other) = (of("alpha"), of("beta"));
    for (client, node) in [(&other, "n1"), (&own, "n2")] {
        let path = format!("/v1/nodes/{node}/reject");
        let refused = client.post::<_, NodeStatus>(&path, &report(context.boot)).await.unwrap_err();
        assert_eq!((problem(&refused).status, problem(&refused).kind.as_str()), (403, "forbidden"), "{node}");
    }
    // About another boot it changes nothing.
    let node: NodeStatus = own.post("/v1/nodes/n1/reject", &report(BootId::random())).await.unwrap();
    assert_eq!((node.state, site.port().await), (NodeState::Allocated, (NET, false)));
    // Without the provider's agreement: to close takes none.
    let node: NodeStatus = own.post("/v1/nodes/n1/reject", &report(context.boot)).await.unwrap();
    assert!(node.state == NodeState::Rejected && node.reason.contains("PCR 7"), "{node:?}");
    assert_eq!(site.port().await, (QUARANTINE, true));
    let ended: Admission = site.service.get(&format!("/v1/admissions/{}", admission.id)).await.unwrap();
    assert!(ended.revoked.is_some_and(|reason| reason.contains("PCR 7")));
    // It ends what the record has of its own node, not what it names by itself.
    let revoke = own.delete::<_, Admission>(&format!("/v1/admissions/{}", admission.id), &json!({"reason": "x"})).await;
    assert_eq!(problem(&revoke.unwrap_err()).status, 403);
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
