//! A project's own verifier beside the site's: two verifiers as they run, an agent on a real TPM, and relying parties
//! that decide with isolation's and imaging's own rule ([`assay_wire::agreement`]) that both must agree.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod site;
mod support;

use assay_service::CancellationToken;
use assay_service::auth::{Role, Tokens};
use assay_service::client::ServiceClient;
use assay_service::clock::{Clock as _, SystemClock};
use assay_service::http::ServiceContext;
use assay_service::testing::database_in;
use assay_service::tls::SiteIdentity;
use assay_tpm::seal::open_grant;
use assay_tpm::testing::{KeyKind, sha256};
use assay_verifier::api::{AttestationRecord, AttestationState};
use assay_verifier::server::operator::{ReleaseRecord, VerifierKeys};
use assay_verifier::store::policies::PolicyRecord;
use assay_verifier::{Config, Sockets, agent_identity, run_on};
use assay_wire::agent::{ActivateRequest, EnrolChallenge, EvidenceRequest, Verdict};
use assay_wire::agreement::{Agreement, MAX_SUPPORTING_BYTES, Require};
use assay_wire::attestation::{AttestationAnswer, SealedSecret, SecretRequest, join_shares, split_secret};
use assay_wire::id::AdmissionId;
use assay_wire::result::SignedResult;
use serde_json::{Value, json};
use site::{
    Agent, AgentSession, Pusher, Site, any_port, client, learn_and_approve, refusal, release, renewed, revoked,
};
use std::path::Path;
use std::sync::Arc;
use support::boot_log;
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// A verifier of the project's own, in a folder of its own, with a token of the project.
struct Tenant {
    folder: TempDir,
    sockets: Option<Sockets>,
    context: ServiceContext,
    agent_url: String,
    agent_key: String,
}

struct RunningTenant {
    operator: ServiceClient,
    url: String,
    tokens: Arc<Tokens>,
    keys: VerifierKeys,
    ca_pem: String,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
    _folder: TempDir,
}

impl Tenant {
    /// Its address and key, before it runs: the site's verifier must know them.
    async fn prepare() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sockets = Sockets { listen: any_port().await, agent_listen: any_port().await };
        let context = ServiceContext {
            clock: Arc::new(SystemClock),
            tokens: Arc::new(Tokens::load_or_create(folder.path()).unwrap()),
            identity: Arc::new(SiteIdentity::load_or_create(folder.path(), &[]).unwrap()),
            shutdown: CancellationToken::new(),
        };
        let agent_url = format!("https://{}/", sockets.agent_listen.local_addr().unwrap());
        let mut tenant = Self { folder, sockets: Some(sockets), context, agent_url, agent_key: String::new() };
        let config = tenant.config("https://127.0.0.1:1", &[], json!({}));
        tenant.agent_key = agent_identity(&config, &tenant.context).unwrap().key_sha256().to_owned();
        tenant
    }

    fn config(&self, isolation_url: &str, ek_ca_files: &[&Path], more: Value) -> Config {
        let file = |name: &str| self.folder.path().join(name).display().to_string();
        let sockets = self.sockets.as_ref().unwrap();
        let mut config = json!({
            "state_dir": self.folder.path(),
            "database": database_in(self.folder.path(), "verifier"),
            "listen": sockets.listen.local_addr().unwrap(),
            "agent_listen": sockets.agent_listen.local_addr().unwrap(),
            "ek_ca_files": ek_ca_files,
            "isolation": {"url": isolation_url, "token_file": file("site.token"), "ca_file": file("site-ca.pem")},
            "role": "appraise-only",
            "settings_say": {"verifier": "", "key_sha256": ""},
        });
        for (field, value) in more.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        serde_json::from_value(config).unwrap()
    }

    /// Runs it, for the site whose verifier leads.
    async fn start(self, site: &Site) -> RunningTenant {
        self.start_with(site, json!({})).await
    }

    /// The same with more in its configuration.
    async fn start_with(mut self, site: &Site, mut more: Value) -> RunningTenant {
        let token = site.tokens.issue("tenant", Role::Project("alpha".parse().unwrap())).unwrap();
        std::fs::write(self.folder.path().join("site.token"), token.expose()).unwrap();
        std::fs::write(self.folder.path().join("site-ca.pem"), &site.ca_pem).unwrap();
        let ek_ca = site.folder.path().join("ek-ca-0.pem");
        let ek_cas: Vec<_> = (0..9).map(|at| site.folder.path().join(format!("ek-ca-{at}.pem"))).collect();
        let ek_cas: Vec<&Path> = ek_cas.iter().map(|path| path.as_path()).filter(|path| path.exists()).collect();
        assert!(ek_ca.exists());
        let leads = json!({"verifier": site.keys.agent_url, "key_sha256": site.keys.agent_key_sha256});
        more["settings_say"] = leads;
        let config = self.config(&site.peers_url, &ek_cas, more);
        let (listen, ca_pem) = (config.listen, self.context.identity.ca_pem().to_owned());
        let (sockets, context, shutdown) =
            (self.sockets.take().unwrap(), self.context.clone(), self.context.shutdown.clone());
        let task = tokio::spawn(async move { run_on(config, sockets, context).await.unwrap() });
        let token = std::fs::read_to_string(self.folder.path().join("operator.token")).unwrap();
        let operator = client(&format!("https://{listen}/"), &ca_pem, &token);
        let keys: VerifierKeys = operator.get("/v1/key").await.unwrap();
        let (url, tokens) = (format!("https://{listen}/"), Arc::clone(&self.context.tokens));
        RunningTenant { operator, url, tokens, keys, ca_pem, shutdown, task, _folder: self.folder }
    }
}

impl RunningTenant {
    /// Judges by this policy from now on.
    async fn approve(&self, document: &str) {
        let request = json!({"name": "default", "document": document});
        let _: PolicyRecord = self.operator.post("/v1/policies", &request).await.unwrap();
    }

    /// A client of its operators' API with a token of its own.
    fn client_of(&self, role: Role) -> ServiceClient {
        client(&self.url, &self.ca_pem, self.tokens.issue("test", role).unwrap().expose())
    }

    /// The agent's conversation with it, as with the one that leads.
    async fn verdict(&self, agent: &Agent, url: &str) -> (ServiceClient, String, String, Verdict) {
        let stranger = client(url, &self.ca_pem, "");
        let challenge: EnrolChallenge = stranger.post("/agent/v1/enrol", &agent.introduction()).await.unwrap();
        let proof = hex::encode(agent.tpm.activate(&challenge.credential).unwrap());
        let session = format!("/agent/v1/sessions/{}", challenge.session);
        let request = ActivateRequest { proof: proof.clone() };
        let wanted: EvidenceRequest = stranger.post(&format!("{session}/activate"), &request).await.unwrap();
        let (known, path) = (client(url, &self.ca_pem, &proof), format!("{session}/evidence"));
        let body = serde_json::to_string(&agent.evidence(&wanted.nonce)).unwrap();
        let verdict = known.post(&path, &serde_json::from_str::<Value>(&body).unwrap()).await.unwrap();
        (known, path, body, verdict)
    }
}

async fn send(site: &Site, agent: &Agent, session: &AgentSession, supporting: Vec<String>) -> Verdict {
    let mut evidence = agent.evidence(&session.nonce);
    evidence.supporting = supporting;
    site.agent_client(&session.proof).post(&session.path("evidence"), &evidence).await.unwrap()
}

async fn unwound(site: &Site) -> String {
    let waiting = async {
        loop {
            let releases: Vec<ReleaseRecord> = site.operator.get("/v1/releases").await.unwrap();
            if let Some(failure) = releases.first().and_then(|release| release.failure.clone()) {
                return failure;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), waiting).await.unwrap()
}

/// A site where the project's own verifier must agree, with a node that has booted and the policy learnt from it, which
/// that verifier has not. Its URL and key come last.
async fn both_must_agree(tenants: Value) -> (Site, RunningTenant, Agent, PolicyRecord, [String; 2]) {
    let mut agent = Agent::manufacture("n1");
    let tenant = Tenant::prepare().await;
    let (url, key) = (tenant.agent_url.clone(), tenant.agent_key.clone());
    let more = format!("[[co_verifiers]]\nproject = \"alpha\"\nurl = \"{url}\"\nkey_sha256 = \"{key}\"\n");
    let site = Site::start_with(&agent.ek_cas, &more, Arc::new(SystemClock)).await;
    let tenant = tenant.start_with(&site, tenants).await;
    let (ours, theirs) = (site.keys.result_key.parse().unwrap(), tenant.keys.result_key.parse().unwrap());
    site.peers.require(Agreement::new(Require::ProviderAndProject, vec![ours]), vec![ours, theirs]);
    site.lease("n1");
    agent.boot(&boot_log(), &site.keys);
    agent.attest(&site).await;
    let policy = learn_and_approve(&site, "n1").await;
    (site, tenant, agent, policy, [url, key])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_released_only_if_the_projects_own_verifier_agrees() {
    let (site, tenant, agent, policy, [tenant_url, tenant_key]) = both_must_agree(json!({})).await;

    // The agent is told whom else to ask, with the key to expect there.
    let session = agent.session(&site).await.unwrap();
    assert_eq!(session.co_verifiers.len(), 1);
    assert_eq!((&session.co_verifiers[0].url, &session.co_verifiers[0].key_sha256), (&tenant_url, &tenant_key));

    // The project's verifier has a policy of its own: without one it affirms nothing.
    let (_, _, _, verdict) = tenant.verdict(&agent, &tenant_url).await;
    assert!(matches!(verdict, Verdict::Rejected { .. }), "{verdict:?}");
    // And the site's verdict alone releases nothing.
    assert!(matches!(send(&site, &agent, &session, vec![]).await, Verdict::Accepted));
    let failure = unwound(&site).await;
    assert!(failure.contains("imaging"), "{failure}");
    assert!(site.peers.calls().iter().all(|call| call.name != "admit" && call.name != "export"));

    // With a policy it affirms, and begins nothing itself.
    tenant.approve(&policy.document).await;
    let (known, path, body, verdict) = tenant.verdict(&agent, &tenant_url).await;
    let Verdict::Affirmed { result, attestation } = verdict else { panic!("{verdict:?}") };
    let again: Verdict = known.post(&path, &serde_json::from_str::<Value>(&body).unwrap()).await.unwrap();
    assert!(
        matches!(again, Verdict::Affirmed { result: same, attestation: id } if same == result && id == attestation),
        "a lost answer is given again"
    );
    let theirs = tenant.keys.result_key.parse().unwrap();
    let own = SignedResult::from_wire(result.clone()).verify(&[theirs], SystemClock.now_seconds()).unwrap();
    assert_eq!(attestation, Some(own.claims().jti), "it goes on attesting under its own result's id");
    let releases: Vec<ReleaseRecord> = tenant.operator.get("/v1/releases").await.unwrap();
    assert!(releases.is_empty(), "it began a release");

    // Both: released.
    let session = agent.session(&site).await.unwrap();
    assert!(matches!(send(&site, &agent, &session, vec![result]).await, Verdict::Accepted));
    release(&site, &agent, &session).await;
    site.peers.called("admit", "n1").await;

    // More results than anybody needs are refused before they are looked at.
    let session = agent.session(&site).await.unwrap();
    let mut evidence = agent.evidence(&session.nonce);
    evidence.supporting = vec![String::new(); 9];
    let answer = site.agent_client(&session.proof).post::<_, Verdict>(&session.path("evidence"), &evidence).await;
    assert_eq!(refusal(answer).1, "too-many-results");
    tenant.shutdown.cancel();
    tenant.task.await.unwrap();
    site.stop().await;
}

/// Settings that name the project's verifier as the leading one are not what agents measure: it sees through them.
#[tokio::test(flavor = "multi_thread")]
async fn the_projects_verifier_rejects_a_boot_whose_settings_name_another_leader() {
    let mut agent = Agent::manufacture("n1");
    let tenant = Tenant::prepare().await;
    let tenant_url = tenant.agent_url.clone();
    let site = Site::start(&agent.ek_cas).await;
    let tenant = tenant.start(&site).await;
    site.lease("n1");
    agent.boot(&boot_log(), &site.keys);
    agent.attest(&site).await;
    let policy = learn_and_approve(&site, "n1").await;
    tenant.approve(&policy.document).await;
    assert!(matches!(tenant.verdict(&agent, &tenant_url).await.3, Verdict::Affirmed { .. }));
    // Extended once more, as by other settings.
    agent.tpm.extend(14, &sha256(b"other settings"));
    let (_, _, _, verdict) = tenant.verdict(&agent, &tenant_url).await;
    let Verdict::Rejected { reasons } = verdict else { panic!("{verdict:?}") };
    assert!(reasons.iter().any(|reason| reason.contains("PCR 14")), "{reasons:?}");
    tenant.shutdown.cancel();
    tenant.task.await.unwrap();
    site.stop().await;
}

/// A node that was released because both agreed, and goes on attesting to both.
struct Both {
    site: Site,
    tenant: RunningTenant,
    agent: Agent,
    policy: PolicyRecord,
    lead: Pusher,
    co: Pusher,
    admission: AdmissionId,
}

impl Both {
    async fn released(tenants: Value) -> Self {
        let (site, tenant, agent, policy, [url, _]) = both_must_agree(tenants).await;
        tenant.approve(&policy.document).await;
        let (known, _, _, verdict) = tenant.verdict(&agent, &url).await;
        let Verdict::Affirmed { result, attestation } = verdict else { panic!("{verdict:?}") };
        let session = agent.session(&site).await.unwrap();
        assert!(matches!(send(&site, &agent, &session, vec![result]).await, Verdict::Accepted));
        release(&site, &agent, &session).await;
        let admission = site.peers.called("admit", "n1").await.detail.parse().unwrap();
        let lead = Pusher::new(&site, &session, admission);
        let co = Pusher { client: known, path: format!("/agent/v1/attestations/{}", attestation.unwrap()) };
        Self { site, tenant, agent, policy, lead, co, admission }
    }

    /// A fresh result of the project's verifier.
    async fn vouched(&self) -> String {
        let wanted = self.co.challenge().await.unwrap();
        match self.co.push(&self.agent, &wanted.nonce).await.unwrap() {
            AttestationAnswer::Renewed { result, .. } => result.expect("it begins no releases"),
            AttestationAnswer::Revoked { reasons } => panic!("revoked: {reasons:?}"),
        }
    }

    /// Evidence for the leading verifier, with these results; gives until when that one's own result lives.
    async fn pushed(&self, supporting: Vec<String>) -> i64 {
        let wanted = self.lead.challenge().await.unwrap();
        renewed(self.lead.push_with(&self.agent, &wanted.nonce, supporting).await).0
    }

    /// Waits until isolation and imaging have each decided so many renewals so.
    async fn decided(&self, word: &str, times: usize) {
        self.site.peers.called_times(word, "n1", times).await;
    }

    fn stands_until_ms(&self) -> i64 {
        self.site.peers.stands_until_ms(self.admission)
    }

    async fn stop(self) {
        self.tenant.shutdown.cancel();
        self.tenant.task.await.unwrap();
        self.site.stop().await;
    }
}

fn expires_at_ms(result: &str, verifier: &VerifierKeys) -> i64 {
    let key = verifier.result_key.parse().unwrap();
    let verified = SignedResult::from_wire(result.to_owned()).verify(&[key], SystemClock.now_seconds()).unwrap();
    verified.claims().exp * 1000
}

#[tokio::test(flavor = "multi_thread")]
async fn renewals_of_both_keep_an_admission_and_those_of_the_leading_verifier_alone_do_not() {
    let both = Both::released(json!({"attestation_silence_seconds": 1000})).await;
    let first = both.stands_until_ms();
    // The project's verifier has heard nothing yet, and the admission stands by the first results.
    both.pushed(vec![]).await;
    both.decided("renewal-refused", 2).await;
    assert_eq!(both.stands_until_ms(), first);
    // Now it vouches for longer than the first results did; what both say lasts as long as the shorter of them.
    let result = both.vouched().await;
    assert!(expires_at_ms(&result, &both.tenant.keys) > first);
    let shorter = both.pushed(vec![result.clone()]).await;
    both.decided("renew-admission", 1).await;
    both.decided("renew-export", 1).await;
    assert!(shorter <= first, "the leading verifier's lives 90 s");
    assert_eq!(both.stands_until_ms(), first, "a renewal never shortens what stands");
    // The leading one alone, and with what is no result of the project's: nothing moves.
    both.pushed(vec![]).await;
    both.pushed(vec!["a.b.c".to_owned()]).await;
    both.decided("renewal-refused", 4).await;
    assert_eq!(both.stands_until_ms(), first);
    // What can be no result is refused before it is passed on, and costs the nonce nothing.
    let wanted = both.lead.challenge().await.unwrap();
    for (supporting, kind) in [
        (vec!["a".to_owned(); 9], "too-many-results"),
        (vec!["a".repeat(MAX_SUPPORTING_BYTES + 1)], "not-a-result"),
        (vec!["\u{1}".repeat(100)], "not-a-result"),
    ] {
        let refused = both.lead.push_with(&both.agent, &wanted.nonce, supporting).await;
        assert_eq!(refusal(refused).1, kind);
    }
    renewed(both.lead.push(&both.agent, &wanted.nonce).await);
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_projects_verifier_an_admission_stands_until_the_time_last_agreed_on() {
    let both = Both::released(json!({"result_lifetime_seconds": 30})).await;
    // Its first result lives half a minute: what is agreed on after that is what its renewals say.
    let result = both.vouched().await;
    both.pushed(vec![result]).await;
    both.decided("renew-admission", 1).await;
    both.decided("renew-export", 1).await;
    let agreed = both.stands_until_ms();
    assert!(agreed > SystemClock.now_ms() + 60_000, "it was not renewed");
    // It is gone. The leading one goes on, and its word alone moves nothing.
    both.tenant.shutdown.cancel();
    let (mut own, mut refused) = (0, 0);
    while own <= agreed {
        own = both.pushed(vec![]).await;
        refused += 2;
        both.decided("renewal-refused", refused).await;
    }
    assert_eq!(both.stands_until_ms(), agreed);
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_verdict_of_the_projects_verifier_stops_its_results_and_ends_the_admission() {
    let both = Both::released(json!({})).await;
    both.vouched().await;
    // It alone thinks otherwise: its policy is another one now.
    let agents = hex::encode(sha256(b"agent.efi"));
    assert!(both.policy.document.contains(&agents));
    both.tenant.approve(&both.policy.document.replace(&agents, &"cd".repeat(32))).await;
    let reasons = loop {
        let wanted = both.co.challenge().await.unwrap();
        match both.co.push(&both.agent, &wanted.nonce).await.unwrap() {
            AttestationAnswer::Revoked { reasons } => break reasons,
            // It looks once a second which policy is active.
            AttestationAnswer::Renewed { .. } => tokio::task::yield_now().await,
        }
    };
    assert!(reasons.iter().all(|reason| reason.contains("active now")), "{reasons:?}");
    assert_eq!(refusal(both.co.challenge().await).1, "admission-ended");
    // Isolation hears of it from the project's verifier, and the leading one hears of the end from isolation.
    let report = both.site.peers.called("project-reject", "n1").await;
    assert!(report.detail.starts_with("the project's verifier: "), "{}", report.detail);
    both.site.peers.called("unexport", &both.admission.to_string()).await;
    assert_eq!(refusal(both.lead.challenge().await).1, "admission-ended");
    // Its project sees why, and its nodes are told.
    let records: Vec<AttestationRecord> = both.tenant.operator.get("/v1/attestations/n1").await.unwrap();
    assert!(records[0].state != AttestationState::Standing && records[0].reasons == reasons, "{records:?}");
    let events: Value = both.tenant.operator.get("/v1/events").await.unwrap();
    assert!(events.to_string().contains("admission.revoked"), "{events}");
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_ends_what_the_projects_verifier_vouches_for_and_nothing_else() {
    let both = Both::released(json!({"attestation_interval_seconds": 1, "attestation_silence_seconds": 4})).await;
    both.vouched().await;
    let silent = async {
        while both.co.challenge().await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), silent).await.expect("silence ends it");
    assert_eq!(refusal(both.co.challenge().await).1, "admission-ended");
    // Of silence it tells nobody: a verifier that was away for a moment must not take its project's nodes with it.
    both.pushed(vec![]).await;
    assert!(both.site.peers.calls().iter().all(|call| call.name != "project-reject"));
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn d1_a_reset_ends_what_the_projects_verifier_vouches_for() {
    let mut both = Both::released(json!({})).await;
    both.vouched().await;
    let wanted = both.co.challenge().await.unwrap();
    both.agent.tpm.cut_power();
    both.agent.tpm.reload_ak(KeyKind::Rsa);
    both.agent.boot(&boot_log(), &both.site.keys);
    let reasons = revoked(both.co.push(&both.agent, &wanted.nonce).await);
    assert!(reasons.len() == 1 && reasons[0].contains("reset count"), "{reasons:?}");
    both.site.peers.called("project-reject", "n1").await;
    both.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_two_verifiers_gives_its_share_of_a_secret_once_it_has_seen_good_evidence() {
    let both = Both::released(json!({})).await;
    let alpha = Role::Project("alpha".parse().unwrap());
    let lease = both.site.peers.airlock.lock().unwrap()["n1"].lease;
    let shares = split_secret(b"the key of the disk", vec![vec![0x5a; 19]]).unwrap();
    let path = format!("/v1/leases/{lease}/secret");
    let owners = [both.site.client_of(alpha.clone()), both.tenant.client_of(alpha)];
    for (owner, share) in owners.iter().zip(&shares) {
        owner.put::<_, ()>(&path, &SecretRequest { share: share.clone(), shares: 2 }).await.unwrap();
    }
    for pusher in [&both.lead, &both.co] {
        let early = pusher.client.get::<SealedSecret>(&format!("{}/secret", pusher.path)).await;
        assert_eq!(refusal(early).1, "not-attested");
    }
    both.vouched().await;
    both.pushed(vec![]).await;
    let mut opened = Vec::new();
    for pusher in [&both.lead, &both.co] {
        let sealed: SealedSecret = pusher.client.get(&format!("{}/secret", pusher.path)).await.unwrap();
        let key = both.agent.tpm.activate(&sealed.sealed.credential).unwrap();
        assert_eq!(sealed.shares, 2);
        opened.push(open_grant(&key.try_into().unwrap(), &sealed.sealed).unwrap());
    }
    assert!(opened.iter().all(|share| share.as_slice() != b"the key of the disk"));
    assert_eq!(join_shares(&opened).unwrap(), b"the key of the disk");
    // Bad evidence takes it away at the one that has seen it.
    both.agent.tpm.extend(2, &sha256(b"option ROM"));
    let wanted = both.co.challenge().await.unwrap();
    revoked(both.co.push(&both.agent, &wanted.nonce).await);
    let gone = both.co.client.get::<SealedSecret>(&format!("{}/secret", both.co.path)).await;
    assert_eq!(refusal(gone).1, "admission-ended");
    both.stop().await;
}
