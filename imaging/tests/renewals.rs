//! Renewals: an export goes on standing as long as fresh results about the same node say so, at its gateway too.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_wire::agreement::{Agreement, Require};
use assay_wire::id::{AdmissionId, BootId};
use assay_wire::imaging::{ExportAnswer, ExportRequest};
use assay_wire::isolation::{Project, Renewal, RenewalAnswer, RenewalOutcome, RenewalRequest};
use assay_wire::result::{Claims, SignedResult, VerifierKey};
use rig::RunningGateway;
use rig::site::{Service, Site, kind, until};
use ring::signature::Ed25519KeyPair;

fn renewal_of(admitted: &Claims, seconds: i64) -> Claims {
    let exp = admitted.exp + seconds;
    Claims { jti: AdmissionId::random(), renews: Some(admitted.jti), iat: admitted.iat, exp, ..admitted.clone() }
}

async fn renew(
    service: &Service,
    admission: AdmissionId,
    result: SignedResult,
    supporting: Vec<SignedResult>,
) -> RenewalOutcome {
    let supporting = supporting.iter().map(|result| result.as_str().to_owned()).collect();
    let renewals = vec![Renewal { admission, result: result.as_str().to_owned(), supporting }];
    let request = RenewalRequest { renewals };
    let mut answer: RenewalAnswer = service.verifier.post("v1/export-renewals", &request).await.unwrap();
    answer.outcomes.pop().unwrap()
}

/// A claim that is not as it should be, and what the refusal says of it.
type Spoilt = (&'static str, fn(&mut Claims));

fn refused(outcome: &RenewalOutcome, words: &str) {
    match outcome {
        RenewalOutcome::Refused { reason } => assert!(reason.contains(words), "{reason}"),
        RenewalOutcome::Renewed { .. } => panic!("renewed, although {words}"),
    }
}

#[tokio::test]
async fn a_renewed_export_stands_at_its_gateway_and_is_gone_when_renewals_stop() {
    let site = Site::new().await;
    let claims = site.claims();
    site.service.export(&site.sign(&claims)).await.unwrap();
    let fresh = renewal_of(&claims, 400);
    let until_ms = fresh.exp * 1000;
    let outcome = renew(&site.service, claims.jti, site.sign(&fresh), vec![]).await;
    assert_eq!(outcome, RenewalOutcome::Renewed { expires_at_ms: until_ms });
    let served = site.gateway.status().await.exports;
    assert_eq!((served[0].admission, served[0].expires_at_ms), (claims.jti, until_ms), "told before the answer");
    // Older news takes nothing away; asking for the export again is asking once.
    let shorter = renew(&site.service, claims.jti, site.sign(&renewal_of(&claims, 1)), vec![]).await;
    assert_eq!(shorter, RenewalOutcome::Renewed { expires_at_ms: until_ms });
    site.service.export(&site.sign(&claims)).await.unwrap();
    // Beyond the first result's expiry.
    site.clock.advance_ms(700_000);
    site.gateway.status().await;
    assert_eq!(site.service.exports().await[0].expires_at_ms, until_ms);
    assert_eq!(site.gateway.status().await.exports.len(), 1);
    // Silence closes, and nothing brings it back.
    site.clock.advance_ms(300_000);
    until(async || site.service.exports().await.is_empty()).await;
    assert!(site.gateway.status().await.exports.is_empty());
    refused(&renew(&site.service, claims.jti, site.sign(&renewal_of(&claims, 5000)), vec![]).await, "does not stand");
    site.stop().await;
}

#[tokio::test]
async fn a_gateway_that_was_away_is_told_of_renewals_when_it_is_back() {
    let mut site = Site::new().await;
    let claims = site.claims();
    site.service.export(&site.sign(&claims)).await.unwrap();
    let fresh = renewal_of(&claims, 400);
    let (portal, result) = (site.gateway.portal, site.sign(&fresh));
    site.gateway.stop().await;
    let outcome = renew(&site.service, claims.jti, result, vec![]).await;
    assert_eq!(outcome, RenewalOutcome::Renewed { expires_at_ms: fresh.exp * 1000 });
    site.gateway = RunningGateway::start_on(site.folder.path(), &site.clock, portal).await;
    until(async || site.gateway.status().await.exports.iter().any(|e| e.expires_at_ms == fresh.exp * 1000)).await;
    site.stop().await;
}

#[tokio::test]
async fn a_renewal_of_something_else_renews_nothing_and_makes_nothing() {
    let site = Site::new().await;
    let claims = site.claims();
    site.service.export(&site.sign(&claims)).await.unwrap();
    let good = renewal_of(&claims, 400);
    let spoilt: [Spoilt; 6] = [
        ("node", |c| c.node = "n2".parse().unwrap()),
        ("boot", |c| c.boot = BootId::random()),
        ("AK", |c| c.ak_name = "000bee".into()),
        ("TPM reset count", |c| c.reset_count += 1),
        ("does not renew", |c| c.renews = None),
        ("does not renew", |c| c.renews = Some(AdmissionId::random())),
    ];
    for (words, spoil) in spoilt {
        let mut bad = good.clone();
        spoil(&mut bad);
        refused(&renew(&site.service, claims.jti, site.sign(&bad), vec![]).await, words);
    }
    let stranger = assay_key();
    refused(&renew(&site.service, claims.jti, SignedResult::sign(&good, &stranger), vec![]).await, "signed by none");
    assert_eq!(site.service.exports().await[0].expires_at_ms, claims.exp * 1000);
    // A renewal makes no export.
    let first = site.service.export(&site.sign(&good)).await.unwrap_err();
    assert_eq!(kind(&first), (403, "result-refused"));
    // Nor does it bring back what was revoked.
    site.service.end(claims.jti).await.unwrap();
    refused(&renew(&site.service, claims.jti, site.sign(&good), vec![]).await, "does not stand");
    site.stop().await;
}

fn assay_key() -> Ed25519KeyPair {
    let rng = ring::rand::SystemRandom::new();
    Ed25519KeyPair::from_pkcs8(Ed25519KeyPair::generate_pkcs8(&rng).unwrap().as_ref()).unwrap()
}

#[tokio::test]
async fn where_the_site_requires_both_verifiers_one_alone_exports_and_renews_nothing() {
    let mut site = Site::new().await;
    let (provider, project) = (assay_key(), assay_key());
    site.service.stop().await;
    let agreement = Agreement::new(Require::ProviderAndProject, vec![VerifierKey::of(&provider)]);
    site.service = Service::start_with(site.folder.path(), &site.clock, agreement).await;
    let keys = vec![VerifierKey::of(&provider).to_string(), VerifierKey::of(&project).to_string()];
    let record = Project { name: "p1".parse().unwrap(), verifier_keys: keys };
    let _: Project = site.service.operator.post("v1/projects", &record).await.unwrap();

    let claims = site.claims();
    let support = Claims { jti: AdmissionId::random(), exp: claims.exp - 100, ..claims.clone() };
    let (lead, supporting) = (SignedResult::sign(&claims, &provider), SignedResult::sign(&support, &project));
    let export = async |supporting: &[&SignedResult]| {
        let supporting = supporting.iter().map(|result| result.as_str().to_owned()).collect();
        let request = ExportRequest { result: lead.as_str().to_owned(), supporting };
        site.service.verifier.post::<_, ExportAnswer>("v1/exports", &request).await
    };
    assert_eq!(kind(&export(&[]).await.unwrap_err()), (403, "result-refused"));
    let other_boot = SignedResult::sign(&Claims { boot: BootId::random(), ..support.clone() }, &project);
    assert_eq!(kind(&export(&[&other_boot]).await.unwrap_err()), (403, "result-refused"));
    assert!(site.service.exports().await.is_empty());
    export(&[&supporting]).await.unwrap();
    assert_eq!(site.service.exports().await[0].expires_at_ms, support.exp * 1000, "the earliest of the two");

    let again = renewal_of(&claims, 300);
    refused(&renew(&site.service, claims.jti, SignedResult::sign(&again, &provider), vec![]).await, "project's own");
    let support_again = renewal_of(&support, 350);
    let both = vec![SignedResult::sign(&support_again, &project)];
    let renewed = renew(&site.service, claims.jti, SignedResult::sign(&again, &provider), both).await;
    assert_eq!(renewed, RenewalOutcome::Renewed { expires_at_ms: support_again.exp * 1000 });

    // Both results were used up: neither leads another export when this one has ended.
    site.service.end(claims.jti).await.unwrap();
    let request = ExportRequest { result: supporting.as_str().to_owned(), supporting: vec![lead.as_str().to_owned()] };
    let reused = site.service.verifier.post::<_, ExportAnswer>("v1/exports", &request).await.unwrap_err();
    assert_eq!(kind(&reused), (409, "admission-ended"));
    site.stop().await;
}
