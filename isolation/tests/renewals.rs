//! Renewals: an admission goes on standing as long as fresh results about the same node say so, and no longer.

mod support;

use assay_wire::agreement::Subject;
use assay_wire::id::{AdmissionId, BootId, LeaseId};
use assay_wire::isolation::{Admission, Admissions, NodeState, Renewal, RenewalAnswer, RenewalOutcome, RenewalRequest};
use assay_wire::result::{Claims, SignedResult};
use serde_json::json;
use std::time::{Duration, Instant};
use support::{NET, QUARANTINE, Site, in_quarantine, is, problem};

/// The claims of a renewal of `admission`, good for `seconds` from now.
fn renewal(site: &Site, admitted: &Claims, seconds: i64) -> Claims {
    use assay_service::clock::Clock as _;
    let now = site.clock.now_seconds();
    Claims { jti: AdmissionId::random(), renews: Some(admitted.jti), iat: now, exp: now + seconds, ..admitted.clone() }
}

fn signed(site: &Site, admission: AdmissionId, claims: &Claims) -> Renewal {
    let result = SignedResult::sign(claims, &site.key).as_str().to_owned();
    Renewal { admission, result, supporting: Vec::new() }
}

async fn renew(site: &Site, renewals: &[(AdmissionId, &Claims)]) -> Vec<RenewalOutcome> {
    let sign = |(admission, claims): &(AdmissionId, &Claims)| signed(site, *admission, claims);
    let request = RenewalRequest { renewals: renewals.iter().map(sign).collect() };
    let answer: RenewalAnswer = site.service.post("/v1/admission-renewals", &request).await.expect("an answer");
    assert_eq!(answer.outcomes.len(), renewals.len());
    answer.outcomes
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
async fn a_renewed_admission_outlives_its_result_and_ends_when_renewals_stop() {
    let site = Site::start().await;
    let context = site.airlocked().await;
    let claims = site.claims(&context);
    site.admit(&claims).await.expect("admitted");
    site.clock.skip_seconds(200);
    let fresh = renewal(&site, &claims, 300);
    let until = fresh.exp * 1000;
    assert_eq!(renew(&site, &[(claims.jti, &fresh)]).await, [RenewalOutcome::Renewed { expires_at_ms: until }]);
    // Asking twice is asking once, and a shorter result takes nothing away.
    let shorter = renewal(&site, &claims, 10);
    let both = renew(&site, &[(claims.jti, &fresh), (claims.jti, &shorter)]).await;
    assert_eq!(
        both,
        [RenewalOutcome::Renewed { expires_at_ms: until }, RenewalOutcome::Renewed { expires_at_ms: until }]
    );
    // Beyond the first result's expiry: still open.
    site.clock.skip_seconds(200);
    let admission: Admission = site.service.get(&format!("/v1/admissions/{}", claims.jti)).await.expect("on record");
    assert_eq!((admission.expires_at_ms, admission.revoked), (until, None));
    site.until("looked at again", |n| n.state == NodeState::Allocated).await;
    assert_eq!(site.port().await, (NET, false));
    // Silence closes.
    site.clock.skip_seconds(101);
    let node = site.until("rejected by expiry", is(NodeState::Rejected)).await;
    assert!(in_quarantine(&node) && node.reason.contains("expired"), "{node:?}");
    // What ended is not brought back.
    let late = renewal(&site, &claims, 300);
    refused(&renew(&site, &[(claims.jti, &late)]).await[0], "does not stand");
    assert_eq!(site.port().await, (QUARANTINE, true));
}

#[tokio::test]
async fn a_renewal_lasts_no_longer_than_the_site_allows() {
    let site = Site::with(json!({"longest_renewal_seconds": 400})).await;
    let context = site.airlocked().await;
    let claims = site.claims(&context);
    site.admit(&claims).await.expect("admitted");
    let greedy = renewal(&site, &claims, 86_400);
    match renew(&site, &[(claims.jti, &greedy)]).await[0] {
        RenewalOutcome::Renewed { expires_at_ms } => {
            let longest_ms = (claims.iat + 460) * 1000;
            assert!(expires_at_ms > claims.exp * 1000 && expires_at_ms <= longest_ms, "{expires_at_ms}");
        }
        ref outcome => panic!("{outcome:?}"),
    }
}

#[tokio::test]
async fn d1_a_renewal_of_something_else_renews_nothing() {
    let site = Site::start().await;
    let context = site.airlocked().await;
    let claims = site.claims(&context);
    site.admit(&claims).await.expect("admitted");
    let good = renewal(&site, &claims, 600);
    let spoilt: [Spoilt; 9] = [
        ("node", |c| c.node = "n2".parse().unwrap()),
        ("project", |c| c.project = "beta".parse().unwrap()),
        ("lease", |c| c.lease = LeaseId::random()),
        ("boot", |c| c.boot = BootId::random()),
        ("AK", |c| c.ak_name = "000bee".into()),
        ("TPM reset count", |c| c.reset_count += 1),
        ("TPM restart count", |c| c.restart_count += 1),
        ("does not renew", |c| c.renews = None),
        ("does not renew", |c| c.renews = Some(AdmissionId::random())),
    ];
    for (words, spoil) in spoilt {
        let mut bad = good.clone();
        spoil(&mut bad);
        refused(&renew(&site, &[(claims.jti, &bad)]).await[0], words);
    }
    refused(&renew(&site, &[(AdmissionId::random(), &good)]).await[0], "does not stand");
    // One bad renewal spoils nobody else's.
    let mixed = renew(&site, &[(AdmissionId::random(), &good), (claims.jti, &good)]).await;
    assert_eq!(mixed[1], RenewalOutcome::Renewed { expires_at_ms: good.exp * 1000 });
    // And a renewal admits nobody.
    site.operator.post::<_, serde_json::Value>("/v1/nodes/n1/cycle", &()).await.unwrap();
    let mut first = site.claims(&site.entered().await);
    first.renews = Some(claims.jti);
    assert_eq!(problem(&site.admit(&first).await.unwrap_err()).kind, "result-refused");
    refused(&renew(&site, &[(claims.jti, &good)]).await[0], "does not stand");
}

#[tokio::test]
async fn a_revoked_admission_is_not_renewed_and_only_services_renew() {
    let site = Site::start().await;
    let context = site.airlocked().await;
    let claims = site.claims(&context);
    site.admit(&claims).await.expect("admitted");
    site.revoke(claims.jti).await.expect("revoked");
    let fresh = renewal(&site, &claims, 600);
    refused(&renew(&site, &[(claims.jti, &fresh)]).await[0], "does not stand");
    let one = Renewal {
        admission: claims.jti,
        result: SignedResult::sign(&fresh, &site.key).as_str().to_owned(),
        supporting: Vec::new(),
    };
    let many = RenewalRequest { renewals: vec![one; 1001] };
    let error = site.service.post::<_, RenewalAnswer>("/v1/admission-renewals", &many).await.unwrap_err();
    assert_eq!(problem(&error).kind, "too-many-renewals");
}

#[tokio::test]
async fn followers_are_told_of_ends_at_once_and_not_of_renewals() {
    let site = Site::start().await;
    let context = site.airlocked().await;
    let claims = site.claims(&context);
    let before: Admissions = site.service.get("/v1/admissions").await.unwrap();
    let path = format!("/v1/admissions?after={}", before.revision);
    let (begun, admitted) = tokio::join!(site.service.get::<Admissions>(&path), site.admit(&claims));
    let begun = begun.unwrap();
    assert!(begun.revision > before.revision && begun.admissions == [admitted.unwrap()], "{begun:?}");
    renew(&site, &[(claims.jti, &renewal(&site, &claims, 600))]).await;
    let now: Admissions = site.service.get("/v1/admissions").await.unwrap();
    assert_eq!(now.revision, begun.revision, "a renewal wakes nobody");
    let path = format!("/v1/admissions?after={}", begun.revision);
    let (ended, revoked) = tokio::join!(site.service.get::<Admissions>(&path), site.revoke(claims.jti));
    assert_eq!(ended.unwrap().admissions, [revoked.unwrap()]);
    // An hour later it is not listed any more, but still on record.
    site.clock.skip_seconds(3601);
    let later: Admissions = site.service.get("/v1/admissions").await.unwrap();
    assert_eq!(later.admissions, []);
    site.service.get::<Admission>(&format!("/v1/admissions/{}", claims.jti)).await.unwrap();
}

#[tokio::test]
async fn an_admission_that_ended_a_month_ago_is_forgotten_and_its_result_still_opens_nothing() {
    let mut site = Site::start().await;
    let context = site.airlocked().await;
    let claims = site.claims(&context);
    site.admit(&claims).await.expect("admitted");
    site.revoke(claims.jti).await.expect("revoked");
    let path = format!("/v1/admissions/{}", claims.jti);
    site.clock.skip_seconds(29 * 86_400);
    site = site.restart().await;
    site.service.get::<Admission>(&path).await.expect("remembered for a month");
    site.stop().await;
    site.clock.skip_seconds(2 * 86_400);
    site.start_again().await;
    let forgotten = async { while site.service.get::<Admission>(&path).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(20), forgotten).await.expect("forgotten");
    assert_eq!(problem(&site.admit(&claims).await.unwrap_err()).kind, "result-refused");
}

/// Puts a thousand more admissions on record beside the site's own: what a fleet's would be, without its drivers.
async fn a_thousand_on_record(site: &Site, first: &Claims) -> Vec<Claims> {
    sqlx::any::install_default_drivers();
    let url = assay_service::testing::database_in(site.folder.path(), "isolation");
    let pool = sqlx::any::AnyPoolOptions::new().max_connections(1).connect(&url).await.expect("the database");
    let mut transaction = pool.begin().await.expect("a transaction");
    let mut all = Vec::new();
    for at in 0..1000 {
        let node = format!("m{at}");
        let claims = Claims {
            node: node.parse().expect("a name"),
            lease: LeaseId::random(),
            jti: AdmissionId::random(),
            ..first.clone()
        };
        let subject = serde_json::to_string(&Subject::of(&claims)).expect("JSON");
        let (lease, boot, id) = (claims.lease.to_string(), claims.boot.to_string(), claims.jti.to_string());
        for (statement, values) in [
            (
                "INSERT INTO nodes (name, bmc, bmc_password_sealed, state, reason, since_ms, boot, entry, entered_ms) \
                 VALUES ($1, '', '', 'allocated', '', 0, $2, 'done', 0)",
                vec![&node, &boot],
            ),
            (
                "INSERT INTO leases (id, project, node, network, created_ms) VALUES ($1, 'alpha', $2, 'net-a', 0)",
                vec![&lease, &node],
            ),
            (
                "INSERT INTO admissions (id, node, lease, boot, ak_name, expires_at_ms, created_ms, subject) \
                 SELECT $1, $2, $3, $4, ak_name, expires_at_ms, created_ms, $5 FROM admissions WHERE node = 'n1'",
                vec![&id, &node, &lease, &boot, &subject],
            ),
        ] {
            let query = values.into_iter().fold(sqlx::query(statement), |query, value| query.bind(value.clone()));
            query.execute(&mut *transaction).await.expect("a row");
        }
        all.push(claims);
    }
    transaction.commit().await.expect("a commit");
    pool.close().await;
    all
}

#[tokio::test]
async fn a_thousand_renewals_are_decided_and_recorded_in_one_go() {
    let site = Site::start().await;
    let context = site.airlocked().await;
    let claims = site.claims(&context);
    site.admit(&claims).await.expect("admitted");
    let all = a_thousand_on_record(&site, &claims).await;
    let fresh: Vec<Claims> = all.iter().map(|admitted| renewal(&site, admitted, 600)).collect();
    let batch: Vec<(AdmissionId, &Claims)> = all.iter().zip(&fresh).map(|(of, fresh)| (of.jti, fresh)).collect();
    let request = RenewalRequest { renewals: batch.iter().map(|(of, fresh)| signed(&site, *of, fresh)).collect() };
    let started = Instant::now();
    let answer: RenewalAnswer = site.service.post("/v1/admission-renewals", &request).await.expect("an answer");
    let taken = started.elapsed();
    eprintln!("1,000 renewals, over HTTPS: {taken:?}");
    for (outcome, fresh) in answer.outcomes.iter().zip(&fresh) {
        assert_eq!(*outcome, RenewalOutcome::Renewed { expires_at_ms: fresh.exp * 1000 });
    }
    assert_eq!(answer.outcomes.len(), 1000);
    // Unoptimised code on a busy machine; what is said of it is measured by hand.
    assert!(taken < Duration::from_secs(10), "{taken:?}");
}
