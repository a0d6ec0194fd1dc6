//! A project's own verifier beside the site's: two verifiers as they run, an agent on a real TPM, and relying parties
//! that decide with isolation's and imaging's own rule ([`assay_wire::agreement`]) that both must agree.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod site;
mod support;

use assay_service::CancellationToken;
use assay_service::auth::{Role, Tokens};
use assay_service::client::ServiceClient;
use assay_service::clock::SystemClock;
use assay_service::http::ServiceContext;
use assay_service::testing::database_in;
use assay_service::tls::SiteIdentity;
use assay_tpm::testing::sha256;
use assay_verifier::server::operator::{ReleaseRecord, VerifierKeys};
use assay_verifier::store::policies::PolicyRecord;
use assay_verifier::{Config, Sockets, agent_identity, run_on};
use assay_wire::agent::{ActivateRequest, EnrolChallenge, EvidenceRequest, Verdict};
use assay_wire::agreement::{Agreement, Require};
use serde_json::{Value, json};
use site::{Agent, AgentSession, Site, any_port, client, learn_and_approve, refusal, release};
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
    async fn start(mut self, site: &Site) -> RunningTenant {
        let token = site.tokens.issue("tenant", Role::Project("alpha".parse().unwrap())).unwrap();
        std::fs::write(self.folder.path().join("site.token"), token.expose()).unwrap();
        std::fs::write(self.folder.path().join("site-ca.pem"), &site.ca_pem).unwrap();
        let ek_ca = site.folder.path().join("ek-ca-0.pem");
        let ek_cas: Vec<_> = (0..9).map(|at| site.folder.path().join(format!("ek-ca-{at}.pem"))).collect();
        let ek_cas: Vec<&Path> = ek_cas.iter().map(|path| path.as_path()).filter(|path| path.exists()).collect();
        assert!(ek_ca.exists());
        let leads = json!({"verifier": site.keys.agent_url, "key_sha256": site.keys.agent_key_sha256});
        let config = self.config(&site.peers_url, &ek_cas, json!({"settings_say": leads}));
        let (listen, ca_pem) = (config.listen, self.context.identity.ca_pem().to_owned());
        let (sockets, context, shutdown) =
            (self.sockets.take().unwrap(), self.context.clone(), self.context.shutdown.clone());
        let task = tokio::spawn(async move { run_on(config, sockets, context).await.unwrap() });
        let token = std::fs::read_to_string(self.folder.path().join("operator.token")).unwrap();
        let operator = client(&format!("https://{listen}/"), &ca_pem, &token);
        let keys: VerifierKeys = operator.get("/v1/key").await.unwrap();
        RunningTenant { operator, keys, ca_pem, shutdown, task, _folder: self.folder }
    }
}

impl RunningTenant {
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

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_released_only_if_the_projects_own_verifier_agrees() {
    let mut agent = Agent::manufacture("n1");
    let tenant = Tenant::prepare().await;
    let (tenant_url, tenant_key) = (tenant.agent_url.clone(), tenant.agent_key.clone());
    let more =
        format!("[[co_verifiers]]\nproject = \"alpha\"\nurl = \"{tenant_url}\"\nkey_sha256 = \"{tenant_key}\"\n");
    let site = Site::start_with(&agent.ek_cas, &more, Arc::new(SystemClock)).await;
    let tenant = tenant.start(&site).await;
    let (ours, theirs) = (site.keys.result_key.parse().unwrap(), tenant.keys.result_key.parse().unwrap());
    site.peers.require(Agreement::new(Require::ProviderAndProject, vec![ours]), vec![ours, theirs]);
    site.lease("n1");
    agent.boot(&boot_log(), &site.keys);
    agent.attest(&site).await;
    let policy = learn_and_approve(&site, "n1").await;

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
    let request = json!({"name": "default", "document": policy.document});
    let _: PolicyRecord = tenant.operator.post("/v1/policies", &request).await.unwrap();
    let (known, path, body, verdict) = tenant.verdict(&agent, &tenant_url).await;
    let Verdict::Affirmed { result } = verdict else { panic!("{verdict:?}") };
    let again: Verdict = known.post(&path, &serde_json::from_str::<Value>(&body).unwrap()).await.unwrap();
    assert!(matches!(again, Verdict::Affirmed { result: same } if same == result), "a lost answer is given again");
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
    let request = json!({"name": "default", "document": policy.document});
    let _: PolicyRecord = tenant.operator.post("/v1/policies", &request).await.unwrap();
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
