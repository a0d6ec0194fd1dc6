//! Enrolment as it runs: which EKs a site takes, whose node an EK is, what an operator settles, and what a verifier
//! does when its clock jumps.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod site;
mod support;

use assay_service::auth::{Role, Token};
use assay_service::client::ServiceClient;
use assay_service::clock::{Clock as _, ManualClock, SystemClock};
use assay_tpm::testing::sha256;
use assay_verifier::api::{
    AllowRequest, ApproveRequest, Identity, Incident, IncidentKind, Origin, SettleRequest, Settlement,
};
use assay_wire::agent::Verdict;
use assay_wire::id::AdmissionId;
use serde_json::{Value, json};
use site::{Agent, Site, activate, learn_and_approve, refusal};
use std::sync::Arc;
use std::time::Duration;
use support::boot_log;

async fn incidents(site: &Site) -> Vec<Incident> {
    site.operator.get("/v1/incidents").await.unwrap()
}

async fn identities(site: &Site) -> Vec<(String, String, Origin)> {
    let all: Vec<Identity> = site.operator.get("/v1/identities").await.unwrap();
    all.into_iter().map(|identity| (identity.node.to_string(), identity.ek_sha256, identity.origin)).collect()
}

async fn settle(site: &Site, incident: &Incident, settlement: Settlement) -> Incident {
    let path = format!("/v1/incidents/{}/settle", incident.id);
    site.operator.post(&path, &SettleRequest { settlement }).await.unwrap()
}

const APPROVED: &str = "ek_binding = \"approved\"";

#[tokio::test(flavor = "multi_thread")]
async fn a9_a_node_cannot_be_taken_over_by_another_tpm() {
    let (agent, mut thief) = (Agent::manufacture("n1"), Agent::manufacture("n2"));
    let site = Site::start(&[agent.ek_cas.clone(), thief.ek_cas.clone()].concat()).await;
    for node in ["n1", "n2", "n3"] {
        site.lease(node);
    }
    agent.session(&site).await.unwrap();

    thief.node = "n1".parse().unwrap();
    let (status, kind, detail) = thief.refused(&site).await;
    assert_eq!((status, kind.as_str()), (403, "identity-mismatch"), "{detail}");
    // Under its own name it may come, but then not under a third one.
    thief.node = "n2".parse().unwrap();
    thief.session(&site).await.unwrap();
    thief.node = "n3".parse().unwrap();
    assert_eq!(thief.refused(&site).await.1, "identity-mismatch");
    assert_eq!(thief.refused(&site).await.1, "identity-mismatch");

    let open = incidents(&site).await;
    let seen: Vec<_> = open.iter().map(|i| (i.node.as_str(), i.kind, i.claims)).collect();
    assert_eq!(seen, [("n3", IncidentKind::OtherNode, 2), ("n1", IncidentKind::OtherEk, 1)]);
    assert!(open.iter().all(|incident| incident.ek_sha256 == thief.ek().as_str() && incident.settlement.is_none()));
    assert_eq!(identities(&site).await.len(), 2);
    // Nobody else gets rejected by a machine that claims its name.
    assert!(site.peers.calls().is_empty());
    // An EK that was only heard of makes no incident: its possession must be proven.
    let mut hearsay = agent.introduction();
    hearsay.node = "n3".parse().unwrap();
    site.agent_client("").post::<_, Value>("/agent/v1/enrol", &hearsay).await.unwrap();
    assert_eq!(incidents(&site).await, open);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a9_an_operator_settles_who_a_node_is() {
    let (old, mut new) = (Agent::manufacture("n1"), Agent::manufacture("n1"));
    let site = Site::start(&[old.ek_cas.clone(), new.ek_cas.clone()].concat()).await;
    site.lease("n1");
    site.lease("n2");
    old.session(&site).await.unwrap();
    assert_eq!(new.refused(&site).await.1, "identity-mismatch");

    // Kept: refused as before, and asked no more.
    let open = incidents(&site).await;
    let kept = settle(&site, &open[0], Settlement::Keep).await;
    assert_eq!(kept.settlement, Some(Settlement::Keep));
    assert_eq!(new.refused(&site).await.1, "identity-mismatch");
    assert_eq!(incidents(&site).await.len(), 1);
    old.session(&site).await.unwrap();

    // Accepted: the board was replaced. The old TPM is now the stranger.
    let accepted = settle(&site, &kept, Settlement::AcceptEk).await;
    assert_eq!((accepted.settlement, accepted.claims), (Some(Settlement::AcceptEk), 2));
    new.session(&site).await.unwrap();
    assert_eq!(old.refused(&site).await.1, "identity-mismatch");
    let path = format!("/v1/incidents/{}/settle", kept.id);
    let again = SettleRequest { settlement: Settlement::AcceptEk };
    let (status, _, detail) = refusal(site.operator.post::<_, Incident>(&path, &again).await);
    assert_eq!(status, 409);
    assert!(detail.contains("operator"), "{detail}");
    assert_eq!(identities(&site).await, [("n1".to_owned(), new.ek().to_string(), Origin::Approved)]);

    // The machine was renamed: the EK moves, and its old name is free.
    new.node = "n2".parse().unwrap();
    assert_eq!(new.refused(&site).await.1, "identity-mismatch");
    let renamed = incidents(&site).await.into_iter().find(|i| i.kind == IncidentKind::OtherNode).unwrap();
    settle(&site, &renamed, Settlement::AcceptEk).await;
    new.session(&site).await.unwrap();
    assert_eq!(identities(&site).await, [("n2".to_owned(), new.ek().to_string(), Origin::Approved)]);

    // Forgotten: the next to come is the first.
    site.operator.delete::<_, ()>("/v1/identities/n2", &json!({})).await.unwrap();
    assert_eq!(refusal(site.operator.delete::<_, ()>("/v1/identities/n2", &json!({})).await).0, 404);
    new.session(&site).await.unwrap();
    assert_eq!(identities(&site).await, [("n2".to_owned(), new.ek().to_string(), Origin::FirstUse)]);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a11_a_nodes_first_ek_waits_for_an_operator_where_the_site_says_so() {
    let (mut agent, relayed) = (Agent::manufacture("n1"), Agent::manufacture("n1"));
    let cas = [agent.ek_cas.clone(), relayed.ek_cas.clone()].concat();
    let site = Site::start_with(&cas, APPROVED, Arc::new(SystemClock)).await;
    site.lease("n1");
    site.lease("n2");
    // A good machine's TPM, relayed from elsewhere, and the node's own.
    assert_eq!(relayed.refused(&site).await.1, "identity-mismatch");
    assert_eq!(agent.refused(&site).await.1, "identity-mismatch");
    assert!(identities(&site).await.is_empty());
    let open = incidents(&site).await;
    assert!(open.iter().all(|incident| incident.kind == IncidentKind::NewEk) && open.len() == 2);
    // Which of the two must be said.
    let approve = |request| {
        let operator = &site.operator;
        async move { operator.post::<_, Incident>("/v1/identities/n1/approve", &request).await }
    };
    let (status, kind, detail) = refusal(approve(ApproveRequest::default()).await);
    assert_eq!((status, kind.as_str()), (409, "several-eks"));
    assert!(detail.contains(agent.ek().as_str()), "{detail}");
    let approved = approve(ApproveRequest { ek_sha256: Some(agent.ek().to_string()) }).await.unwrap();
    assert_eq!((approved.ek_sha256.as_str(), approved.settled_by.as_deref()), (agent.ek().as_str(), Some("operator")));
    agent.session(&site).await.unwrap();
    assert_eq!(relayed.refused(&site).await.1, "identity-mismatch");
    assert_eq!(refusal(approve(ApproveRequest { ek_sha256: Some(agent.ek().to_string()) }).await).0, 404);
    // That the EK is this node's was approved, and not that it is a TPM's: that is its certificate's to say, each time.
    agent.ek_certificate.clear();
    assert_eq!(refusal(agent.enrol(&site).await).1, "ek-refused");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a11_an_ek_that_was_named_beforehand_needs_no_certificate_and_admits_no_other() {
    let (mut agent, mut stranger) = (Agent::manufacture("n1"), Agent::manufacture("n1"));
    // Nobody's certificates are believed here.
    let site = Site::start_with(&[], APPROVED, Arc::new(SystemClock)).await;
    site.lease("n1");
    site.lease("n2");
    assert_eq!(refusal(agent.enrol(&site).await).1, "ek-refused");
    let allow = async |node: &str, ek: &str| {
        let request = AllowRequest { ek_sha256: ek.to_owned() };
        site.operator.put::<_, Identity>(&format!("/v1/identities/{node}"), &request).await
    };
    assert_eq!(refusal(allow("n1", "nonsense").await).0, 400);
    let allowed = allow("n1", agent.ek().as_str()).await.unwrap();
    assert_eq!((allowed.origin, allowed.seen_at_ms), (Origin::Allowed, None));
    agent.session(&site).await.unwrap();
    agent.ek_certificate.clear();
    agent.session(&site).await.unwrap();
    let seen: Identity = site.operator.get("/v1/identities/n1").await.unwrap();
    assert!(seen.seen_at_ms.is_some());
    // Not as another node, not with another EK, and the operator's word is not overwritten by a second one.
    agent.node = "n2".parse().unwrap();
    assert_eq!(refusal(agent.enrol(&site).await).1, "ek-refused");
    stranger.ek_certificate.clear();
    let (_, kind, detail) = refusal(stranger.enrol(&site).await);
    assert_eq!(kind, "ek-refused");
    assert!(detail.contains("assay identity allow"), "{detail}");
    let (status, kind, _) = refusal(allow("n1", stranger.ek().as_str()).await);
    assert_eq!((status, kind.as_str()), (409, "identity-taken"));
    assert_eq!(refusal(allow("n2", agent.ek().as_str()).await).0, 409);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a11_a_quote_relayed_through_another_verifier_or_name_shows_in_the_agents_settings() {
    let mut agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    site.lease("n1");
    // The good machine was told to pin the relay's key.
    let mut keys = site.keys.clone();
    keys.agent_key_sha256 = hex::encode(sha256(b"the relay's key"));
    agent.boot(&boot_log(), &keys);
    let reasons = rejected(&agent, &site).await;
    let key = hex::encode(sha256(b"the relay's key"));
    assert!(reasons.iter().any(|reason| reason.contains(&key[..16])), "{reasons:?}");
    // The good machine was told to be another node, and its quote is sent as n1's.
    let mut other = Agent::manufacture("n2");
    let site = Site::start(&other.ek_cas).await;
    site.lease("n1");
    other.boot(&boot_log(), &site.keys);
    other.node = "n1".parse().unwrap();
    let reasons = rejected(&other, &site).await;
    assert!(reasons.iter().any(|reason| reason.contains("n2")), "{reasons:?}");
    site.stop().await;
}

/// Attests at a site with a policy that was learnt from the same boot, so that only the settings can be wrong.
async fn rejected(agent: &Agent, site: &Site) -> Vec<String> {
    agent.attest(site).await;
    learn_and_approve(site, agent.node.as_str()).await;
    match agent.attest(site).await.1 {
        Verdict::Rejected { reasons } => reasons,
        Verdict::Accepted | Verdict::Affirmed { .. } => panic!("settings of another were accepted"),
    }
}

/// Every call of both APIs, from their document: what is added later is asked, too.
#[tokio::test(flavor = "multi_thread")]
async fn a10_no_call_is_answered_without_its_credential() {
    let agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    site.lease("n1");
    let session = agent.session(&site).await.unwrap();
    let document: Value = serde_json::to_value(assay_verifier::openapi()).unwrap();
    let mut asked = 0;
    for (path, calls) in document["paths"].as_object().unwrap() {
        for (method, call) in calls.as_object().unwrap() {
            let for_agents = call["tags"][0] == "agent";
            if matches!(path.as_str(), "/agent/v1/enrol" | "/agent/v1/sessions/{id}/activate") {
                continue; // where credentials come from
            }
            let id = if for_agents { session.id.to_string() } else { AdmissionId::random().to_string() };
            let url = path.replace("{id}", &id).replace("{node}", "n1");
            let url = url.split('{').next().unwrap().to_owned()
                + if url.contains('{') { "01890a5d-ac96-774b-bcce-b302099a8057" } else { "" }
                + url.split_once('}').map_or("", |(_, rest)| rest);
            // Nothing, the other API's credential, and one that nobody issued.
            for token in ["", session.proof.as_str(), &"00".repeat(32)] {
                if for_agents && token == session.proof {
                    continue;
                }
                let base = if for_agents { &site.keys.agent_url } else { &site.operator_url };
                let status = status_of(&site, base, token, method, &url).await;
                let closed = matches!(status, 401 | 403) || (for_agents && status == 404);
                assert!(closed, "{method} {path} answered {status} to `{token}`");
                asked += 1;
            }
        }
    }
    assert!(asked > 40, "only {asked} questions were asked");
    // Nor has the agents' API any of the operators' calls, or the other way about.
    let operator = std::fs::read_to_string(site.folder.path().join("operator.token")).unwrap();
    assert_eq!(status_of(&site, &site.keys.agent_url, &operator, "get", "/v1/identities").await, 404);
    let evidence = session.path("evidence");
    assert_eq!(status_of(&site, &site.operator_url, &operator, "post", &evidence).await, 404);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a10_only_operators_change_identities() {
    let agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    site.lease("n1");
    agent.session(&site).await.unwrap();
    let project = site.client_of(Role::Project("alpha".parse().unwrap()));
    let service = site.client_of(Role::Service);
    let incident = "00000000-0000-0000-0000-000000000000";
    for (who, client) in [("a project", &project), ("a service", &service)] {
        let allow = AllowRequest { ek_sha256: agent.ek().to_string() };
        let settlement = SettleRequest { settlement: Settlement::AcceptEk };
        let approve = ApproveRequest::default();
        for (what, status) in [
            ("allow", refusal(client.put::<_, Value>("/v1/identities/n1", &allow).await).0),
            ("approve", refusal(client.post::<_, Value>("/v1/identities/n1/approve", &approve).await).0),
            ("forget", refusal(client.delete::<_, Value>("/v1/identities/n1", &json!({})).await).0),
            (
                "settle",
                refusal(client.post::<_, Value>(&format!("/v1/incidents/{incident}/settle"), &settlement).await).0,
            ),
        ] {
            assert_eq!(status, 403, "{who} could {what}");
        }
    }
    for path in ["/v1/identities", "/v1/identities/n1", "/v1/incidents"] {
        assert_eq!(refusal(project.get::<Value>(path).await).0, 403, "a project could read {path}");
        service.get::<Value>(path).await.unwrap();
    }
    assert_eq!(identities(&site).await.len(), 1);
    site.stop().await;
}

async fn status_of(site: &Site, base: &str, token: &str, method: &str, path: &str) -> u16 {
    let ca = std::fs::read_to_string(site.folder.path().join("ca.pem")).unwrap();
    let client = ServiceClient::new(base.parse().unwrap(), &ca, Token::from_text(token)).unwrap();
    let answer = match method {
        "get" => client.get::<Value>(path).await,
        "post" => client.post::<_, Value>(path, &json!({})).await,
        "put" => client.put::<_, Value>(path, &json!({})).await,
        "delete" => client.delete::<_, Value>(path, &json!({})).await,
        other => panic!("{other} {path}"),
    };
    match answer {
        Ok(_) => 200,
        Err(error) => error.problem().map_or(0, |problem| problem.status),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn d10_a_verifier_whose_clock_jumps_closes_and_goes_on() {
    let mut agent = Agent::manufacture("n1");
    let clock = Arc::new(ManualClock::new(SystemClock.now_ms()));
    let start = clock.now_ms();
    let site = Site::start_with(&agent.ek_cas, "", Arc::clone(&clock) as Arc<_>).await;
    site.lease("n1");
    agent.boot(&boot_log(), &site.keys);

    // Forward between challenge and proof, and between nonce and evidence.
    let challenge = agent.enrol(&site).await.unwrap();
    let proof = hex::encode(agent.tpm.activate(&challenge.credential).unwrap());
    clock.set_ms(start + 3_600_000);
    assert_eq!(refusal(activate(&site, challenge.session, &proof).await.map(|s| s.id)).1, "expired");
    let session = agent.session(&site).await.unwrap();
    clock.set_ms(start + 7_200_000);
    let evidence = agent.evidence(&session.nonce);
    let client = site.agent_client(&session.proof);
    assert_eq!(refusal(client.post::<_, Verdict>(&session.path("evidence"), &evidence).await).1, "expired");

    // Back: what was given out in what is now the future is worth nothing, else a nonce would live for hours.
    let session = agent.session(&site).await.unwrap();
    let evidence = agent.evidence(&session.nonce);
    clock.set_ms(start);
    let client = site.agent_client(&session.proof);
    assert_eq!(refusal(client.post::<_, Verdict>(&session.path("evidence"), &evidence).await).1, "expired");
    let challenge = agent.enrol(&site).await.unwrap();
    let proof = hex::encode(agent.tpm.activate(&challenge.credential).unwrap());
    clock.set_ms(start - 3_600_000);
    assert_eq!(refusal(activate(&site, challenge.session, &proof).await.map(|s| s.id)).1, "expired");

    // Before the EK's certificate is valid, nobody enrols; the node's own clock is asked nowhere.
    clock.set_ms(start - 400 * 86_400_000);
    let (_, kind, detail) = refusal(agent.enrol(&site).await);
    assert_eq!(kind, "ek-refused");
    assert!(detail.contains("not yet valid"), "{detail}");

    // And when it is right again, so is everything.
    clock.set_ms(start + 7_300_000);
    agent.attest(&site).await;
    learn_and_approve(&site, "n1").await;
    assert!(matches!(agent.attest(&site).await.1, Verdict::Accepted));
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a15_oversize_keys_certificates_and_statements_are_refused_before_they_are_read() {
    let agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    site.lease("n1");
    let good = serde_json::to_value(agent.introduction()).unwrap();
    let large = "A".repeat(48 * 1024);
    let iak = json!({"public": "", "certificate": "", "attest": "", "signature": ""});
    for field in ["ek_public", "ak_public", "ek_certificate", "ek_chain"] {
        let mut request = good.clone();
        request[field] = large.clone().into();
        oversize(&site, &request, field).await;
    }
    for field in ["public", "certificate", "chain", "attest", "signature"] {
        let mut request = good.clone();
        request["iak"] = iak.clone();
        request["iak"][field] = large.clone().into();
        oversize(&site, &request, field).await;
    }
    site.stop().await;
}

async fn oversize(site: &Site, request: &Value, field: &str) {
    let answer = site.agent_client("").post::<_, Value>("/agent/v1/enrol", request).await;
    let (status, _, detail) = refusal(answer);
    assert_eq!(status, 400, "{field}: {detail}");
    assert!(detail.contains("more than any") || detail.contains("body"), "{field}: {detail}");
}

/// The names that agents give are only names: what a node may be is looked up.
#[tokio::test(flavor = "multi_thread")]
async fn a9_an_agent_without_a_node_in_the_airlock_is_nobody() {
    let agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    site.lease("n2");
    assert_eq!(refusal(agent.enrol(&site).await).1, "not-in-airlock");
    assert!(identities(&site).await.is_empty());
    site.stop().await;
}

/// As many as there are slots wait for isolation. Who comes then is told so at once, and holds nothing.
#[tokio::test(flavor = "multi_thread")]
async fn d5_more_enrolments_at_once_than_there_are_slots_are_told_to_come_again() {
    const SLOTS: usize = 64;
    let agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    site.lease("n1");
    site.peers.stall(true);
    let mut storm = tokio::task::JoinSet::new();
    for _ in 0..SLOTS + 5 {
        // Through the relay, where nobody counts connections by address.
        let (client, introduction) = (site.relay_client(""), agent.introduction());
        storm.spawn(async move { client.post::<_, Value>("/agent/v1/enrol", &introduction).await });
    }
    for _ in 0..5 {
        let answered = tokio::time::timeout(Duration::from_secs(20), storm.join_next()).await;
        let answered = answered.expect("more enrolments than slots wait").unwrap().unwrap();
        assert_eq!(refusal(answered).0, 429);
    }
    site.peers.stall(false);
    let answers = storm.join_all().await;
    assert_eq!(answers.len(), SLOTS);
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    // The slots are free again.
    agent.session(&site).await.unwrap();
    site.stop().await;
}
