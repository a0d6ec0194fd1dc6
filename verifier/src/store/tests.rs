//! The store, on a real SQLite file and on a real PostgreSQL server: the same cases on both.

use super::*;
use crate::fixtures::TestStore;
use assay_service::testing::TestDatabase;

macro_rules! on_both {
    ($($case:ident: $limits:expr,)*) => {
        $(#[tokio::test]
        async fn $case() {
            cases::$case(TestStore::on(TestDatabase::sqlite(), $limits).await).await;
        })*

        #[tokio::test]
        async fn all_of_it_on_postgresql() {
            $(
                let Some(database) = TestDatabase::postgresql() else { return };
                cases::$case(TestStore::on(database, $limits).await).await;
            )*
        }
    };
}

on_both! {
    a1_a_nonce_is_used_once_also_by_two_at_once: StoreLimits::default(),
    a1_a_renewed_nonce_makes_the_old_one_worthless: StoreLimits::default(),
    d5_half_open_sessions_are_bounded_and_never_push_out_activated_ones:
        StoreLimits { half_open_per_node: 2, half_open: 5, ..StoreLimits::default() },
    a9_one_node_has_one_ek_and_one_ek_one_node: StoreLimits::default(),
    a11_where_operators_approve_nothing_is_bound_by_coming_first: StoreLimits::default(),
    a9_an_operator_settles_an_incident_once: StoreLimits::default(),
    the_tpm_clock_of_the_last_verified_quote_is_kept: StoreLimits::default(),
    one_policy_is_active_and_all_are_kept: StoreLimits::default(),
    d7_a_policy_swapped_in_the_database_judges_nothing: StoreLimits::default(),
    d7_where_policies_are_signed_a_whole_swapped_row_judges_nothing: StoreLimits::default(),
    the_archive_keeps_the_newest_of_each_node_and_what_is_unreported:
        StoreLimits { evidence_per_node: 2, ..StoreLimits::default() },
    the_journal_survives_and_moves_by_compare_and_set: StoreLimits::default(),
    collateral_is_kept_once_and_found_by_its_digest: StoreLimits::default(),
    incidents_are_bounded: StoreLimits { incidents: 3, ..StoreLimits::default() },
}

mod cases {
    use super::super::archive::{Outcome, VerdictWord};
    use super::super::collateral::MOST_KEPT;
    use super::super::identities::Allowed;
    use super::super::incidents::{NewIncident, Settled};
    use super::super::policies::{ActivePolicyError, PolicyRecord, PolicyRefused};
    use super::super::sessions::ActivatedFrom;
    use crate::fixtures::{TestStore, admitted, challenged, enrolled, policy_record, release_of, verdict};
    use crate::identity::EkDigest;
    use crate::identity::binding::{EkBinding, IdentityClaim, IncidentKind, Origin, Settlement};
    use crate::policy::Policy;
    use crate::policy::signature::{PolicyKeys, PolicySigner};
    use crate::quote::ClockInfo;
    use crate::release::journal::ReleaseStep;
    use crate::session::{Proof, Session};
    use crate::tee::Collateral;
    use assay_service::error::chain;
    use assay_wire::id::NodeId;

    pub(super) async fn collateral_is_kept_once_and_found_by_its_digest(test: TestStore) {
        let field = |name: &str| (name.to_owned(), serde_json::Value::from(""));
        let names = ["pck_crl_issuer_chain", "tcb_info_issuer_chain", "tcb_info", "qe_identity_issuer_chain"];
        let octets = ["root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature"];
        let whole = names.iter().chain(&octets).chain(&["qe_identity"]).map(|name| field(name));
        let document = serde_json::Value::Object(whole.collect()).to_string();
        let other = format!(" {document}");
        let read = |texts: &[&str]| Collateral::from_files(texts.iter().map(|text| ("a file", *text))).unwrap();
        let (both, one) = (read(&[&document, &other]), read(&[&document]));
        test.store.keep_collateral(&both, 1_000).await.unwrap();
        test.store.keep_collateral(&one, 2_000).await.unwrap();
        let digests = both.digests();
        assert_eq!(digests.len(), 2);
        assert_eq!(test.store.collateral(&digests).await.unwrap(), [document.clone(), other.clone()]);
        let reversed: Vec<_> = digests.iter().rev().copied().collect();
        assert_eq!(test.store.collateral(&reversed).await.unwrap(), [other, document]);
        // Of more than are kept, those go that were given the longest ago.
        sqlx::query("UPDATE tee_collateral SET given_at_ms = 3000 WHERE sha256 = $1")
            .bind(digests[0].to_string())
            .execute(test.store.pool())
            .await
            .unwrap();
        for number in 0..MOST_KEPT - 1 {
            sqlx::query("INSERT INTO tee_collateral (sha256, document, given_at_ms) VALUES ($1, '', 2500)")
                .bind(number.to_string())
                .execute(test.store.pool())
                .await
                .unwrap();
        }
        test.store.keep_collateral(&Collateral::default(), 4_000).await.unwrap();
        assert_eq!(test.store.collateral(&digests).await.unwrap().len(), 1);
    }

    pub(super) async fn a1_a_nonce_is_used_once_also_by_two_at_once(test: TestStore) {
        let enrolled = enrolled(&test.store, "n1", 1_000).await;
        let (one, other) = (release_of(&enrolled, 2_000), release_of(&enrolled, 2_000));
        let (one_verdict, other_verdict) =
            (verdict(&enrolled, Outcome::Accepted(&one), 2_000), verdict(&enrolled, Outcome::Accepted(&other), 2_000));
        let (first, second) =
            tokio::join!(test.store.record_verdict(&one_verdict), test.store.record_verdict(&other_verdict));
        assert!(first.unwrap() ^ second.unwrap(), "exactly one use of the nonce must count");
        assert_eq!(test.store.releases().await.unwrap().len(), 1);
        match test.store.session(enrolled.attester.session).await.unwrap() {
            Some(Session::Appraised(session)) => assert!(session.admission.is_some()),
            other => panic!("expected an appraised session, found {other:?}"),
        }
    }

    pub(super) async fn a1_a_renewed_nonce_makes_the_old_one_worthless(test: TestStore) {
        let old = enrolled(&test.store, "n1", 1_000).await;
        let mut renewed = old.clone();
        renewed.nonce.nonce = crate::session::Nonce::random();
        assert!(test.store.activate(&renewed, ActivatedFrom::Enrolled).await.unwrap());
        let reasons = ["bad".to_owned()];
        assert!(!test.store.record_verdict(&verdict(&old, Outcome::Rejected(&reasons), 2)).await.unwrap());
        assert!(test.store.record_verdict(&verdict(&renewed, Outcome::Rejected(&reasons), 2)).await.unwrap());
    }

    pub(super) async fn d5_half_open_sessions_are_bounded_and_never_push_out_activated_ones(test: TestStore) {
        let activated = enrolled(&test.store, "n1", 0).await;
        let proof = Proof::random();
        let mut sessions = Vec::new();
        for index in 0..10_i64 {
            let session = challenged(if index < 4 { "n1" } else { "n2" }, &proof, 10 + index);
            test.store.insert_challenge(&session).await.unwrap();
            sessions.push(session.attester.session);
            // A node fills its own share, and no more of the whole.
            if index == 3 {
                assert_eq!(half_open(&test).await, 2);
            }
        }
        for node in 3..20 {
            test.store.insert_challenge(&challenged(&format!("n{node}"), &proof, 30 + node)).await.unwrap();
        }
        let mut left = 0;
        for id in sessions {
            left += usize::from(test.store.session(id).await.unwrap().is_some());
        }
        assert_eq!(left, 0, "the oldest half-open sessions must have gone");
        assert!(test.store.session(activated.attester.session).await.unwrap().is_some());
        assert_eq!(half_open(&test).await, 5);
    }

    async fn half_open(test: &TestStore) -> i64 {
        let count = sqlx::query_as("SELECT COUNT(*) FROM sessions WHERE state = 'challenged'");
        let (count,): (i64,) = count.fetch_one(test.store.pool()).await.unwrap();
        count
    }

    fn ek(octet: &str) -> EkDigest {
        octet.repeat(32).parse().unwrap()
    }

    fn claimed(node: &str, ek: &EkDigest, kind: IncidentKind, at_ms: i64) -> NewIncident {
        NewIncident { node: node.parse().unwrap(), ek: ek.clone(), kind, detail: "detail".to_owned(), at_ms }
    }

    pub(super) async fn a9_one_node_has_one_ek_and_one_ek_one_node(test: TestStore) {
        let store = &test.store;
        let (n1, n2) = ("n1".parse().unwrap(), "n2".parse().unwrap());
        let (aa, bb) = (ek("aa"), ek("bb"));
        let bind = async |node, ek, at| store.bind_identity(node, ek, EkBinding::FirstUse, at).await.unwrap();
        assert_eq!(store.check_identity(&n1, &aa).await.unwrap(), IdentityClaim::New);
        assert!(matches!(bind(&n1, &aa, 1).await, IdentityClaim::Known(_)));
        let IdentityClaim::Known(known) = bind(&n1, &aa, 2).await else { panic!("forgotten") };
        assert_eq!((known.bound_at_ms, known.origin), (1, Origin::FirstUse));
        assert!(matches!(bind(&n1, &bb, 3).await, IdentityClaim::OtherEk(_)));
        assert!(matches!(bind(&n2, &aa, 3).await, IdentityClaim::OtherNode(_)));
        let all = store.identities().await.unwrap();
        assert_eq!(all.iter().map(|identity| identity.seen_at_ms).collect::<Vec<_>>(), [Some(2)]);
        assert!(store.clear_identity(&n1).await.unwrap());
        assert!(!store.clear_identity(&n1).await.unwrap());
        assert!(matches!(bind(&n2, &aa, 4).await, IdentityClaim::Known(_)));
        // Two at once: one is bound.
        let n3 = "n3".parse().unwrap();
        let first_use = |ek| store.bind_identity(&n3, ek, EkBinding::FirstUse, 5);
        let (cc, dd) = (ek("cc"), ek("dd"));
        let (one, other) = tokio::join!(first_use(&cc), first_use(&dd));
        let known = |claim: IdentityClaim| matches!(claim, IdentityClaim::Known(_));
        assert!(known(one.unwrap()) ^ known(other.unwrap()), "one node was bound to two EKs");
    }

    pub(super) async fn a11_where_operators_approve_nothing_is_bound_by_coming_first(test: TestStore) {
        let store = &test.store;
        let (n1, n2) = ("n1".parse().unwrap(), "n2".parse().unwrap());
        let (aa, bb) = (ek("aa"), ek("bb"));
        let claim = store.bind_identity(&n1, &aa, EkBinding::Approved, 1).await.unwrap();
        assert_eq!(claim, IdentityClaim::New);
        assert_eq!(store.identities().await.unwrap(), []);
        // An operator's word beforehand binds, once, and does not push out what is on record.
        let Allowed::Done(allowed) = store.allow_identity(&n1, &aa, "alice", 2).await.unwrap() else { panic!("taken") };
        assert_eq!((allowed.origin, allowed.seen_at_ms), (Origin::Allowed, None));
        assert_eq!(allowed.bound_by.as_deref(), Some("alice"));
        let claim = store.bind_identity(&n1, &aa, EkBinding::Approved, 3).await.unwrap();
        assert!(matches!(claim, IdentityClaim::Known(_)));
        for (node, ek) in [(&n1, &bb), (&n2, &aa)] {
            let taken = store.allow_identity(node, ek, "bob", 4).await.unwrap();
            assert!(matches!(taken, Allowed::Taken(other) if other.node == n1));
        }
        assert_eq!(store.identities().await.unwrap().len(), 1);
        // What a node got by coming first, an operator can vouch for afterwards.
        assert!(matches!(
            store.bind_identity(&n2, &bb, EkBinding::FirstUse, 5).await.unwrap(),
            IdentityClaim::Known(identity) if identity.origin == Origin::FirstUse
        ));
        let Allowed::Done(allowed) = store.allow_identity(&n2, &bb, "bob", 6).await.unwrap() else { panic!("taken") };
        assert_eq!((allowed.origin, allowed.seen_at_ms), (Origin::Allowed, Some(5)));
    }

    pub(super) async fn a9_an_operator_settles_an_incident_once(test: TestStore) {
        let store = &test.store;
        let (n1, n2): (NodeId, NodeId) = ("n1".parse().unwrap(), "n2".parse().unwrap());
        let (aa, bb) = (ek("aa"), ek("bb"));
        store.bind_identity(&n1, &aa, EkBinding::FirstUse, 1).await.unwrap();
        store.bind_identity(&n2, &bb, EkBinding::FirstUse, 1).await.unwrap();
        let pending = enrolled(store, "n1", 1).await;
        // n2's TPM comes as n1, twice.
        let claim = claimed("n1", &bb, IncidentKind::OtherEk, 2);
        assert!(store.record_incident(&claim).await.unwrap());
        assert!(!store.record_incident(&NewIncident { at_ms: 9, ..claim.clone() }).await.unwrap());
        let open = store.incidents().await.unwrap();
        assert_eq!((open.len(), open[0].claims, open[0].at_ms, open[0].last_at_ms), (1, 2, 2, 9));
        // Kept: still refused, still counted, and not asked again.
        let Settled::Done(kept) = store.settle_incident(open[0].id, Settlement::Keep, "alice", 10).await.unwrap()
        else {
            panic!("not settled")
        };
        assert_eq!((kept.settlement, kept.settled_by.as_deref()), (Some(Settlement::Keep), Some("alice")));
        assert!(!store.record_incident(&claim).await.unwrap());
        let again = store.settle_incident(open[0].id, Settlement::Keep, "bob", 11).await.unwrap();
        assert!(matches!(again, Settled::Already(_)));
        assert!(matches!(store.check_identity(&n1, &bb).await.unwrap(), IdentityClaim::OtherEk(_)));
        // Accepted after all: n1 has n2's TPM, n2 has none, and nothing that was begun with the old one goes on.
        let accepted = store.settle_incident(open[0].id, Settlement::AcceptEk, "bob", 12).await.unwrap();
        assert!(matches!(accepted, Settled::Done(_)));
        let all = store.identities().await.unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].node.clone(), all[0].ek_sha256.as_str()), (n1, bb.as_str()));
        assert_eq!((all[0].origin, all[0].bound_by.as_deref()), (Origin::Approved, Some("bob")));
        assert!(store.session(pending.attester.session).await.unwrap().is_none());
        assert!(store.last_clock(&all[0].node).await.unwrap().is_none(), "another TPM's clock was kept");
        let again = store.settle_incident(open[0].id, Settlement::Keep, "alice", 13).await.unwrap();
        assert!(matches!(again, Settled::Already(incident) if incident.settled_by.as_deref() == Some("bob")));
        // The old TPM is now the one that claims another's name: a new incident.
        assert!(store.record_incident(&claimed("n1", &aa, IncidentKind::OtherEk, 14)).await.unwrap());
        let unknown = "00000000-0000-0000-0000-000000000000".parse().unwrap();
        assert_eq!(store.settle_incident(unknown, Settlement::Keep, "bob", 15).await.unwrap(), Settled::Unknown);
    }

    pub(super) async fn the_tpm_clock_of_the_last_verified_quote_is_kept(test: TestStore) {
        let node = "n1".parse().unwrap();
        test.store.bind_identity(&node, &ek("aa"), EkBinding::FirstUse, 1).await.unwrap();
        let enrolled = enrolled(&test.store, "n1", 1).await;
        let clock = ClockInfo { clock_ms: u64::MAX, reset_count: 7, restart_count: 1, safe: true, firmware_version: 3 };
        let reasons = ["bad".to_owned()];
        let mut new = verdict(&enrolled, Outcome::Rejected(&reasons), 2);
        new.clock = Some(&clock);
        assert!(test.store.record_verdict(&new).await.unwrap());
        let kept = test.store.last_clock(&node).await.unwrap().unwrap();
        assert_eq!((kept.clock_ms, kept.reset_count), (u64::MAX, 7));
    }

    pub(super) async fn one_policy_is_active_and_all_are_kept(test: TestStore) {
        assert!(test.store.active_policy().await.unwrap().is_none());
        let (one, other) = (policy_record("one", 1), policy_record("other", 2));
        let again = PolicyRecord { added_by: "bob".to_owned(), added_at_ms: 3, ..one.clone() };
        for record in [&one, &other, &again] {
            test.store.activate_policy(record).await.unwrap();
            let active = test.store.active_policy().await.unwrap().unwrap();
            assert_eq!(active.digest().to_string(), record.digest);
        }
        let all = test.store.policies().await.unwrap();
        let listed: Vec<_> = all.iter().map(|p| (p.name.as_str(), p.active)).collect();
        assert_eq!(listed, [("other", false), ("one", true)]);
        let approvals = test.store.approvals(&one.digest).await.unwrap();
        let by: Vec<_> = approvals.iter().map(|it| (it.approved_by.as_str(), it.approved_at_ms)).collect();
        assert_eq!(by, [("bob", 3), ("alice", 1)]);
        assert_eq!(test.store.policy(&other.digest).await.unwrap().unwrap().added_by, "alice");
        assert!(test.store.policy("sha256:00").await.unwrap().is_none());
    }

    pub(super) async fn d7_a_policy_swapped_in_the_database_judges_nothing(test: TestStore) {
        let (good, evil) = (policy_record("good", 1), policy_record("evil", 2));
        test.store.activate_policy(&good).await.unwrap();
        // Read before, so that what is in memory does not stand in for what is on disk.
        assert!(test.store.active_policy().await.unwrap().is_some());
        let swap = |document: String| {
            sqlx::query("UPDATE policies SET document = $1 WHERE digest = $2")
                .bind(document)
                .bind(good.digest.clone())
                .execute(test.store.pool())
        };
        swap(evil.document.clone()).await.unwrap();
        let refused = test.store.active_policy().await.unwrap_err();
        assert!(matches!(refused, ActivePolicyError::Refused(PolicyRefused::Digest { .. })), "{refused:?}");
        swap("garbage".to_owned()).await.unwrap();
        let refused = test.store.active_policy().await.unwrap_err();
        assert!(matches!(refused, ActivePolicyError::Refused(PolicyRefused::Unreadable(_))), "{refused:?}");
        // Approved again, it is what was approved.
        test.store.activate_policy(&good).await.unwrap();
        assert_eq!(test.store.active_policy().await.unwrap().unwrap().name(), "good");
    }

    pub(super) async fn d7_where_policies_are_signed_a_whole_swapped_row_judges_nothing(test: TestStore) {
        let ours = PolicySigner::from_pkcs8(&PolicySigner::generate().unwrap()).unwrap();
        let stranger = PolicySigner::from_pkcs8(&PolicySigner::generate().unwrap()).unwrap();
        let store = test.store.clone().trusting(PolicyKeys::new(vec![ours.public()]));
        let signed = |name: &str, signer: &PolicySigner| {
            let mut record = policy_record(name, 1);
            record.signature = Some(signer.sign_policy(&Policy::parse(&record.document).unwrap()));
            record
        };
        let good = signed("good", &ours);
        store.activate_policy(&good).await.unwrap();
        assert_eq!(store.active_policy().await.unwrap().unwrap().name(), "good");
        let mut borrowed = policy_record("evil", 1);
        borrowed.signature = good.signature;
        for (record, says) in [
            (policy_record("evil", 1), "is not signed"),
            (signed("evil", &stranger), "not one of the policy keys"),
            (borrowed, "is not over"),
        ] {
            // Digest, document and signature, as whoever writes to the database can.
            store.activate_policy(&record).await.unwrap();
            let refused = store.active_policy().await.unwrap_err();
            assert!(chain(&refused).contains(says), "{says}: {}", chain(&refused));
            assert!(matches!(refused, ActivePolicyError::Refused(PolicyRefused::Signature(_))));
        }
        store.activate_policy(&good).await.unwrap();
        assert_eq!(store.active_policy().await.unwrap().unwrap().name(), "good");
    }

    pub(super) async fn the_archive_keeps_the_newest_of_each_node_and_what_is_unreported(test: TestStore) {
        let reasons = ["PCR 4 is wrong".to_owned()];
        let mut ids = Vec::new();
        for (index, node) in [(1, "n1"), (2, "n1"), (3, "n1"), (4, "n2")] {
            let enrolled = enrolled(&test.store, node, index).await;
            let new = verdict(&enrolled, Outcome::Rejected(&reasons), index);
            assert!(test.store.record_verdict(&new).await.unwrap());
            ids.push(new.id);
        }
        assert!(test.store.evidence(ids[0]).await.unwrap().is_none());
        let kept = test.store.evidence(ids[2]).await.unwrap().unwrap();
        assert_eq!(kept.verdict.reasons, reasons);
        assert_eq!(kept.verdict.verdict, VerdictWord::Rejected);
        assert_eq!(kept.ak_public_bytes().unwrap(), [4, 5, 6]);
        let latest = test.store.latest_verdicts().await.unwrap();
        assert_eq!(latest.iter().map(|v| v.evidence).collect::<Vec<_>>(), [ids[2], ids[3]]);
        assert_eq!(test.store.latest_verdict(&"n1".parse().unwrap()).await.unwrap().unwrap().evidence, ids[2]);
        assert_eq!(test.store.unreported_rejections().await.unwrap().len(), 3);
        test.store.mark_reported(ids[3], 9).await.unwrap();
        assert_eq!(test.store.unreported_rejections().await.unwrap().len(), 2);
    }

    pub(super) async fn the_journal_survives_and_moves_by_compare_and_set(mut test: TestStore) {
        let mut release = admitted(&test.store, "n1", 1_000).await;
        release.step = ReleaseStep::Unwinding;
        release.failure = Some("it failed".to_owned());
        assert!(!test.store.write_step(&release, ReleaseStep::Exported).await.unwrap(), "it does not stand there");
        assert!(test.store.write_step(&release, ReleaseStep::Admitted).await.unwrap());
        assert!(!test.store.write_step(&release, ReleaseStep::Admitted).await.unwrap(), "it moved on");
        test.reopen().await;
        test.store.join(2_000).await.unwrap();
        assert_eq!(test.store.unfinished_releases().await.unwrap(), std::slice::from_ref(&release));
        release.step = ReleaseStep::Unwound;
        assert!(test.store.write_step(&release, ReleaseStep::Unwinding).await.unwrap());
        assert!(test.store.unfinished_releases().await.unwrap().is_empty());
        assert_eq!(test.store.release(release.admission).await.unwrap(), Some(release));
    }

    pub(super) async fn incidents_are_bounded(test: TestStore) {
        for at_ms in 0..10 {
            let node = format!("n{at_ms}");
            test.store.record_incident(&claimed(&node, &ek("aa"), IncidentKind::NewEk, at_ms)).await.unwrap();
        }
        let left: Vec<i64> = test.store.incidents().await.unwrap().iter().map(|incident| incident.at_ms).collect();
        assert_eq!(left, [9, 8, 7]);
    }
}

#[tokio::test]
async fn d4_a_database_of_a_newer_verifier_is_refused_by_name() {
    let test = TestStore::on(TestDatabase::sqlite(), StoreLimits::default()).await;
    sqlx::query(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
         VALUES (9999, 'of a later release', TRUE, x'00', 0)",
    )
    .execute(test.store.pool())
    .await
    .unwrap();
    let error = VerifierStore::open(test.url(), StoreLimits::default()).await.unwrap_err();
    assert!(error.to_string().contains(test.url()), "{error}");
}
