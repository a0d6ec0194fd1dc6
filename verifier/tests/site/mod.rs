//! A site around one verifier: the verifier as it runs, behind TLS and with its database on disk; isolation and imaging
//! as services that check each result for themselves and remember what they were asked; an agent on a real TPM.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]
#![allow(dead_code, reason = "each test uses its part")]

use assay_service::CancellationToken;
use assay_service::auth::{Caller, Role, Token, Tokens};
use assay_service::client::{ClientError, ServiceClient};
use assay_service::clock::{Clock, SystemClock};
use assay_service::error::ApiError;
use assay_service::http::{Limits, Listener, ServiceContext, serve_within};
use assay_service::testing::database_in;
use assay_service::tls::SiteIdentity;
use assay_tpm::seal::{open_grant, seal_grant};
use assay_tpm::testing::{KeyKind, SoftTpm, sha256};
use assay_verifier::api::{EkDigest, LearnRequest, PolicyDraft, PolicyRecord, PolicyRequest, VerdictRecord};
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::server::operator::VerifierKeys;
use assay_verifier::{Config, Sockets, run_on};
use assay_wire::agent::{
    ActivateRequest, AgentSettings, CoVerifier, EnrolChallenge, EnrolRequest, EvidenceRequest, ReleaseStatus,
    SealedGrant, TenantAddress, Verdict,
};
use assay_wire::agreement::{Agreement, Presented, Standing};
use assay_wire::attestation::{AttestationAnswer, AttestationRequest};
use assay_wire::evidence::{
    AGENT_PCR, AgentMeasurement, Evidence, ImaList, MeasurementKind, QUOTED_PCRS, RuntimeEvidence,
};
use assay_wire::id::{AdmissionId, BootId, LeaseId, NodeId, SessionId};
use assay_wire::imaging::{ExportAnswer, ExportRequest};
use assay_wire::isolation::{
    Admission, AdmissionRequest, Admissions, AirlockContext, RejectRequest, Renewal, RenewalAnswer, RenewalOutcome,
    RenewalRequest, RevokeRequest,
};
use assay_wire::result::{Claims, SignedResult, VerifierKey};
use axum::extract::{Path, Query, State};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) const GRANT: &[u8] = br#"{"chap_secret":"for this node only"}"#;

/// The running site.
pub(crate) struct Site {
    pub(crate) folder: TempDir,
    pub(crate) peers: Arc<ScriptedPeers>,
    pub(crate) operator: ServiceClient,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) keys: VerifierKeys,
    /// As a gateway's relay stands on the tenant's network.
    pub(crate) relay_url: String,
    pub(crate) operator_url: String,
    /// Where isolation and imaging are.
    pub(crate) peers_url: String,
    pub(crate) ca_pem: String,
    shutdown: CancellationToken,
    verifier: JoinHandle<()>,
}

/// isolation and imaging in one.
pub(crate) struct ScriptedPeers {
    pub(crate) airlock: Mutex<BTreeMap<String, AirlockContext>>,
    trusted: Mutex<Option<VerifierKey>>,
    calls: watch::Sender<Vec<PeerCall>>,
    refusing: Mutex<Option<ApiError>>,
    stalled: watch::Sender<bool>,
    admissions: watch::Sender<Admissions>,
    /// What the site requires, and the keys that the project trusts; without it, this verifier's key alone.
    agreement: Mutex<Option<(Agreement, Vec<VerifierKey>)>>,
    /// The admissions that were agreed on, and until when they stand.
    standing: Mutex<BTreeMap<AdmissionId, Standing>>,
    clock: Arc<dyn Clock>,
}

/// A call that arrived there.
#[derive(Debug, Clone)]
pub(crate) struct PeerCall {
    pub(crate) name: &'static str,
    pub(crate) node: String,
    pub(crate) detail: String,
    pub(crate) at: Instant,
}

impl Site {
    /// Starts everything; EK certificates of `ek_cas` are believed.
    pub(crate) async fn start(ek_cas: &[Vec<u8>]) -> Self {
        Self::start_with(ek_cas, "", Arc::new(SystemClock)).await
    }

    /// The same with more in the verifier's table of the site's file, and a clock of the test's own.
    pub(crate) async fn start_with(ek_cas: &[Vec<u8>], more: &str, clock: Arc<dyn Clock>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shutdown = CancellationToken::new();
        let tokens = Arc::new(Tokens::load_or_create(folder.path()).unwrap());
        let identity = Arc::new(SiteIdentity::load_or_create(folder.path(), &[]).unwrap());
        let context = ServiceContext {
            clock: Arc::clone(&clock),
            tokens: Arc::clone(&tokens),
            identity: Arc::clone(&identity),
            shutdown: shutdown.clone(),
        };
        let peers = Arc::new(ScriptedPeers {
            airlock: Mutex::default(),
            trusted: Mutex::default(),
            calls: watch::Sender::new(Vec::new()),
            refusing: Mutex::default(),
            stalled: watch::Sender::new(false),
            admissions: watch::Sender::new(Admissions { revision: 0, admissions: Vec::new() }),
            agreement: Mutex::default(),
            standing: Mutex::default(),
            clock,
        });
        let peers_url = serve_peers(Arc::clone(&peers), context.clone()).await;
        let ca_files: Vec<PathBuf> = (0..ek_cas.len()).map(|i| folder.path().join(format!("ek-ca-{i}.pem"))).collect();
        for (path, pem) in ca_files.iter().zip(ek_cas) {
            std::fs::write(path, pem).unwrap();
        }
        let sockets = Sockets { listen: any_port().await, agent_listen: any_port().await };
        let (listen, agent_listen) = (sockets.listen.local_addr().unwrap(), sockets.agent_listen.local_addr().unwrap());
        let agent_socket = folder.path().join("agent.sock");
        let peer = toml::Table::from_iter([
            ("url".to_owned(), peers_url.clone().into()),
            ("token_file".to_owned(), folder.path().join("service.token").display().to_string().into()),
        ]);
        let mut file: toml::Table = toml::from_str(more).unwrap();
        file.extend([
            ("state_dir".to_owned(), folder.path().display().to_string().into()),
            ("database".to_owned(), database_in(folder.path(), "verifier").into()),
            ("listen".to_owned(), listen.to_string().into()),
            ("agent_listen".to_owned(), agent_listen.to_string().into()),
            ("agent_socket".to_owned(), agent_socket.display().to_string().into()),
            (
                "ek_ca_files".to_owned(),
                ca_files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().into(),
            ),
            ("isolation".to_owned(), peer.clone().into()),
            ("imaging".to_owned(), peer.into()),
        ]);
        let config: Config = file.try_into().unwrap();
        let verifier = tokio::spawn(async move { run_on(config, sockets, context).await.unwrap() });

        let ca_pem = identity.ca_pem().to_owned();
        let operator_url = format!("https://{listen}/");
        let token = std::fs::read_to_string(folder.path().join("operator.token")).unwrap();
        let operator = client(&operator_url, &ca_pem, &token);
        let keys: VerifierKeys = operator.get("/v1/key").await.unwrap();
        *peers.trusted.lock().unwrap() = Some(keys.result_key.parse().unwrap());
        let relay_url = relay(agent_socket).await;
        Self { folder, peers, operator, tokens, keys, relay_url, operator_url, peers_url, ca_pem, shutdown, verifier }
    }

    /// A client of the agents' API, through the airlock, with a session's proof or nothing.
    pub(crate) fn agent_client(&self, proof: &str) -> ServiceClient {
        client(&self.keys.agent_url, &self.ca_pem, proof)
    }

    /// The same, through the relay.
    pub(crate) fn relay_client(&self, proof: &str) -> ServiceClient {
        client(&self.relay_url, &self.ca_pem, proof)
    }

    /// A client of the operators' API with a new token of `role`.
    pub(crate) fn client_of(&self, role: Role) -> ServiceClient {
        let token = self.tokens.issue("test", role).unwrap();
        ServiceClient::new(self.operator_url.parse().unwrap(), &self.ca_pem, token).unwrap()
    }

    /// Puts a node into the airlock, as a lease does.
    pub(crate) fn lease(&self, node: &str) -> AirlockContext {
        self.lease_to(node, "alpha")
    }

    /// The same for a project.
    pub(crate) fn lease_to(&self, node: &str, project: &str) -> AirlockContext {
        let context = AirlockContext {
            lease: LeaseId::random(),
            project: project.parse().unwrap(),
            boot: BootId::random(),
            machine_resets: None,
        };
        self.peers.airlock.lock().unwrap().insert(node.to_owned(), context.clone());
        context
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.verifier.await.unwrap();
    }
}

impl ScriptedPeers {
    pub(crate) fn calls(&self) -> Vec<PeerCall> {
        self.calls.borrow().clone()
    }

    /// Waits for the first call of this name about this node.
    pub(crate) async fn called(&self, name: &str, node: &str) -> PeerCall {
        let mut calls = self.calls.subscribe();
        let wanted = |call: &&PeerCall| call.name == name && call.node == node;
        let arrived = calls.wait_for(|calls| calls.iter().any(|call| wanted(&call)));
        let calls = tokio::time::timeout(Duration::from_secs(20), arrived).await.expect(name).unwrap();
        calls.iter().find(wanted).unwrap().clone()
    }

    fn note(&self, name: &'static str, node: &str, detail: String) {
        let call = PeerCall { name, node: node.to_owned(), detail, at: Instant::now() };
        self.calls.send_modify(|calls| calls.push(call));
    }

    /// Renews, if the result is what it must be: about this admission, and fresh.
    fn renew(&self, name: &'static str, request: RenewalRequest) -> Result<RenewalAnswer, ApiError> {
        if let Some(refusal) = self.refusing.lock().unwrap().clone() {
            return Err(refusal);
        }
        let agreement = self.agreement.lock().unwrap().clone();
        if let Some((agreement, keys)) = agreement {
            let outcome = |renewal| self.renewed_by_agreement(name, &agreement, &keys, renewal);
            return Ok(RenewalAnswer { outcomes: request.renewals.into_iter().map(outcome).collect() });
        }
        let outcome = |renewal: Renewal| match self.claims(renewal.result) {
            Ok(claims) if claims.renews == Some(renewal.admission) => {
                self.note(name, claims.node.as_str(), renewal.admission.to_string());
                RenewalOutcome::Renewed { expires_at_ms: claims.exp * 1000 }
            }
            Ok(_) => RenewalOutcome::Refused { reason: "it renews another admission".to_owned() },
            Err(error) => RenewalOutcome::Refused { reason: error.to_string() },
        };
        Ok(RenewalAnswer { outcomes: request.renewals.into_iter().map(outcome).collect() })
    }

    /// Renews as isolation and imaging do, with the same rule and by what is on record.
    fn renewed_by_agreement(
        &self,
        name: &'static str,
        agreement: &Agreement,
        keys: &[VerifierKey],
        renewal: Renewal,
    ) -> RenewalOutcome {
        let Renewal { admission, result, supporting } = renewal;
        let mut standing = self.standing.lock().unwrap();
        let Some(known) = standing.get_mut(&admission) else {
            return RenewalOutcome::Refused { reason: "there is no such admission".to_owned() };
        };
        let presented = Presented::from_wire(result, supporting);
        let decided = agreement.renews(&presented, keys, known, 3_600_000, self.clock.now_ms());
        let node = known.subject.node.to_string();
        match decided {
            Ok(expires_at_ms) => {
                known.expires_at_ms = expires_at_ms;
                self.note(name, &node, admission.to_string());
                RenewalOutcome::Renewed { expires_at_ms }
            }
            Err(refused) => {
                self.note("renewal-refused", &node, refused.to_string());
                RenewalOutcome::Refused { reason: refused.to_string() }
            }
        }
    }

    /// Until when an admission stands by what was agreed.
    pub(crate) fn stands_until_ms(&self, admission: AdmissionId) -> i64 {
        self.standing.lock().unwrap()[&admission].expires_at_ms
    }

    /// Waits until so many calls of this name about this node have come.
    pub(crate) async fn called_times(&self, name: &str, node: &str, times: usize) {
        let mut calls = self.calls.subscribe();
        let count = |calls: &Vec<PeerCall>| calls.iter().filter(|call| call.name == name && call.node == node).count();
        let arrived = calls.wait_for(|calls| count(calls) >= times);
        tokio::time::timeout(Duration::from_secs(20), arrived).await.expect(name).unwrap();
    }

    /// isolation ends an admission by itself.
    pub(crate) fn end(&self, id: AdmissionId, why: &str) {
        self.admissions.send_modify(|known| {
            known.revision += 1;
            let admission = known.admissions.iter_mut().find(|admission| admission.id == id).unwrap();
            admission.revoked = Some(why.to_owned());
        });
    }

    /// Renewals are answered with this from now on.
    pub(crate) fn refuse_renewals(&self, refusal: Option<ApiError>) {
        *self.refusing.lock().unwrap() = refusal;
    }

    /// Whether isolation takes its time over what it says of nodes.
    pub(crate) fn stall(&self, stalled: bool) {
        self.stalled.send_replace(stalled);
    }

    /// From now on these must agree.
    pub(crate) fn require(&self, agreement: Agreement, project_keys: Vec<VerifierKey>) {
        *self.agreement.lock().unwrap() = Some((agreement, project_keys));
    }

    /// Checks what asks for an admission, as isolation and imaging do.
    fn accepted(&self, result: String, supporting: Vec<String>) -> Result<Claims, ApiError> {
        let Some((agreement, keys)) = self.agreement.lock().unwrap().clone() else { return self.claims(result) };
        let agreed = agreement.admits(&Presented::from_wire(result, supporting), &keys, self.clock.now_seconds());
        let agreed = agreed.map_err(|refused| ApiError::forbidden("result-refused", refused))?;
        let standing = Standing {
            admission: agreed.id(),
            subject: agreed.subject(),
            supporting: agreed.supporting().to_vec(),
            expires_at_ms: agreed.expires_at_ms(),
        };
        self.standing.lock().unwrap().insert(agreed.id(), standing);
        Ok(agreed.claims().clone())
    }

    /// Checks a result as every relying party does.
    fn claims(&self, result: String) -> Result<Claims, ApiError> {
        let trusted = self.trusted.lock().unwrap().into_iter().collect::<Vec<_>>();
        let verified = SignedResult::from_wire(result).verify(&trusted, self.clock.now_seconds());
        verified.map(|result| result.claims().clone()).map_err(|error| ApiError::forbidden("result", error))
    }
}

/// An agent on a real TPM.
pub(crate) struct Agent {
    pub(crate) tpm: SoftTpm,
    pub(crate) ek_cas: Vec<Vec<u8>>,
    pub(crate) node: NodeId,
    ek_public: Vec<u8>,
    pub(crate) ek_certificate: Vec<u8>,
    pub(crate) ak_public: Vec<u8>,
    log: Vec<u8>,
    settings: Vec<u8>,
}

/// A session that was activated.
pub(crate) struct AgentSession {
    pub(crate) id: SessionId,
    pub(crate) proof: String,
    pub(crate) nonce: Vec<u8>,
    /// Whom the project wants asked too.
    pub(crate) co_verifiers: Vec<CoVerifier>,
}

impl AgentSession {
    pub(crate) fn path(&self, call: &str) -> String {
        format!("/agent/v1/sessions/{}/{call}", self.id)
    }
}

impl Agent {
    /// A machine as it comes, with keys but not booted.
    pub(crate) fn manufacture(node: &str) -> Self {
        let (tpm, ek_cas) = SoftTpm::start_with_ek_certificate();
        let ek_public = tpm.create_ek(KeyKind::Rsa);
        let ak_public = tpm.create_ak(KeyKind::Ecc);
        let ek_certificate = tpm.ek_certificate();
        let node = node.parse().unwrap();
        Self { tpm, ek_cas, node, ek_public, ek_certificate, ak_public, log: Vec::new(), settings: Vec::new() }
    }

    /// Boots what `log` says, with the settings that `keys` make right.
    pub(crate) fn boot(&mut self, log: &LogWriter, keys: &VerifierKeys) {
        let settings = AgentSettings {
            node: self.node.clone(),
            verifier: keys.agent_url.clone(),
            verifier_key_sha256: keys.agent_key_sha256.clone(),
        };
        for (pcr, digest) in log.extensions() {
            self.tpm.extend(*pcr, digest);
        }
        self.settings = serde_json::to_vec(&settings).unwrap();
        self.tpm.extend(AGENT_PCR, &sha256(&self.settings));
        self.log = log.finish();
    }

    /// What its EK is known by.
    pub(crate) fn ek(&self) -> EkDigest {
        EkDigest::of_public(&self.ek_public).unwrap()
    }

    pub(crate) fn introduction(&self) -> EnrolRequest {
        EnrolRequest {
            node: self.node.clone(),
            ek_public: self.ek_public.clone(),
            ek_certificate: self.ek_certificate.clone(),
            ek_chain: Vec::new(),
            iak: None,
            ak_public: self.ak_public.clone(),
        }
    }

    pub(crate) async fn enrol(&self, site: &Site) -> Result<EnrolChallenge, ClientError> {
        site.agent_client("").post("/agent/v1/enrol", &self.introduction()).await
    }

    /// Enrols and activates.
    pub(crate) async fn session(&self, site: &Site) -> Result<AgentSession, ClientError> {
        let challenge = self.enrol(site).await?;
        let proof = hex::encode(self.tpm.activate(&challenge.credential).unwrap());
        activate(site, challenge.session, &proof).await
    }

    /// What it would send for this nonce.
    pub(crate) fn evidence(&self, nonce: &[u8]) -> Evidence {
        let selection = QUOTED_PCRS.map(|pcr| pcr.to_string()).collect::<Vec<_>>().join(",");
        let quote = self.tpm.quote(nonce, &format!("sha256:{selection}"));
        Evidence {
            attest: quote.attest,
            signature: quote.signature,
            pcrs: self.tpm.pcrs()[..=usize::from(*QUOTED_PCRS.end())].iter().map(hex::encode).collect(),
            event_log: self.log.clone(),
            agent_measurements: vec![AgentMeasurement {
                pcr: AGENT_PCR,
                kind: MeasurementKind::AgentSettings,
                data: self.settings.clone(),
            }],
            ima: None,
            tee: Vec::new(),
            supporting: Vec::new(),
        }
    }

    /// What it would push at run time for this nonce.
    pub(crate) fn runtime_evidence(&self, nonce: &[u8]) -> RuntimeEvidence {
        self.runtime_evidence_with(nonce, None)
    }

    /// The same with what its kernel's measurement list gained.
    pub(crate) fn runtime_evidence_with(&self, nonce: &[u8], ima: Option<ImaList>) -> RuntimeEvidence {
        let Evidence { attest, signature, pcrs, .. } = self.evidence(nonce);
        RuntimeEvidence { attest, signature, pcrs, ima, tee: Vec::new(), supporting: Vec::new() }
    }

    /// The claims of `session` refused at the last step: possession is proven, and the node is somebody else's.
    pub(crate) async fn refused(&self, site: &Site) -> (u16, String, String) {
        refusal(self.session(site).await.map(|session| session.id))
    }

    /// Enrols, activates and sends evidence.
    pub(crate) async fn attest(&self, site: &Site) -> (AgentSession, Verdict) {
        let session = self.session(site).await.unwrap();
        let evidence = self.evidence(&session.nonce);
        let client = site.agent_client(&session.proof);
        let verdict = client.post(&session.path("evidence"), &evidence).await.unwrap();
        (session, verdict)
    }
}

pub(crate) async fn activate(site: &Site, id: SessionId, proof: &str) -> Result<AgentSession, ClientError> {
    let request = ActivateRequest { proof: proof.to_owned() };
    let path = format!("/agent/v1/sessions/{id}/activate");
    let wanted: EvidenceRequest = site.agent_client("").post(&path, &request).await?;
    assert_eq!(wanted.pcrs, QUOTED_PCRS.collect::<Vec<_>>());
    Ok(AgentSession { id, proof: proof.to_owned(), nonce: wanted.nonce, co_verifiers: wanted.co_verifiers })
}

/// Drafts a policy from the node's last evidence, and approves it.
pub(crate) async fn learn_and_approve(site: &Site, node: &str) -> PolicyRecord {
    let artefacts = serde_json::to_value(crate::support::artefacts()).unwrap();
    let learn = LearnRequest {
        node: node.parse().unwrap(),
        name: None,
        artefacts,
        artefacts_signature: None,
        from_rejected: false,
    };
    let draft: PolicyDraft = site.operator.post("/v1/policies/learn", &learn).await.unwrap();
    let request = PolicyRequest { name: Some("default".to_owned()), document: draft.document, signature: None };
    let policy: PolicyRecord = site.operator.post("/v1/policies", &request).await.unwrap();
    assert_eq!(policy.digest, draft.digest);
    policy
}

/// The agent's part of the release, with its TPM.
pub(crate) async fn release(site: &Site, agent: &Agent, session: &AgentSession) {
    let airlock = site.agent_client(&session.proof);
    let status: ReleaseStatus = airlock.get(&session.path("release")).await.unwrap();
    assert!(matches!(status, ReleaseStatus::Move(_)), "{status:?}");
    assert_eq!(refusal(airlock.get::<SealedGrant>(&session.path("grant")).await).1, "too-early");
    airlock.post::<_, ()>(&session.path("ready"), &()).await.unwrap();
    let tenant = site.relay_client(&session.proof);
    let sealed: SealedGrant = tenant.get(&session.path("grant")).await.unwrap();
    let key = agent.tpm.activate(&sealed.credential).unwrap();
    let grant = open_grant(&key.try_into().unwrap(), &sealed).unwrap();
    assert_eq!(grant.as_slice(), GRANT);
    tenant.post::<_, ()>(&session.path("handover"), &()).await.unwrap();
}

/// Brings a booted agent all the way: learnt from, approved, accepted, released and handed over.
pub(crate) async fn admitted(site: &Site, agent: &Agent) -> (AgentSession, AdmissionId) {
    agent.attest(site).await;
    learn_and_approve(site, agent.node.as_str()).await;
    let (session, verdict) = agent.attest(site).await;
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    release(site, agent, &session).await;
    let record: VerdictRecord = site.operator.get(&format!("/v1/verdicts/{}", agent.node)).await.unwrap();
    (session, record.admission.unwrap())
}

/// An agent in the tenant's system.
pub(crate) struct Pusher {
    pub(crate) client: ServiceClient,
    pub(crate) path: String,
}

impl Pusher {
    pub(crate) fn new(site: &Site, session: &AgentSession, admission: AdmissionId) -> Self {
        let path = format!("/agent/v1/attestations/{admission}");
        Self { client: site.relay_client(&session.proof), path }
    }

    pub(crate) async fn challenge(&self) -> Result<AttestationRequest, ClientError> {
        self.client.post(&format!("{}/challenge", self.path), &()).await
    }

    pub(crate) async fn push(&self, agent: &Agent, nonce: &[u8]) -> Result<AttestationAnswer, ClientError> {
        self.push_with(agent, nonce, Vec::new()).await
    }

    /// The same with results of other verifiers.
    pub(crate) async fn push_with(
        &self,
        agent: &Agent,
        nonce: &[u8],
        supporting: Vec<String>,
    ) -> Result<AttestationAnswer, ClientError> {
        let evidence = RuntimeEvidence { supporting, ..agent.runtime_evidence(nonce) };
        self.client.post(&self.path, &evidence).await
    }

    /// Challenge and push in one; gives what is wanted next.
    pub(crate) async fn renewed(&self, agent: &Agent) -> (i64, AttestationRequest) {
        let wanted = self.challenge().await.unwrap();
        renewed(self.push(agent, &wanted.nonce).await)
    }
}

/// What a good push is answered.
pub(crate) fn renewed(answer: Result<AttestationAnswer, ClientError>) -> (i64, AttestationRequest) {
    match answer.unwrap() {
        AttestationAnswer::Renewed { expires_at_ms, next, .. } => (expires_at_ms, next),
        AttestationAnswer::Revoked { reasons } => panic!("revoked: {reasons:?}"),
    }
}

/// Why a bad push was answered so.
pub(crate) fn revoked(answer: Result<AttestationAnswer, ClientError>) -> Vec<String> {
    match answer.unwrap() {
        AttestationAnswer::Revoked { reasons } => reasons,
        AttestationAnswer::Renewed { .. } => panic!("bad evidence was accepted"),
    }
}

/// A released node, and its agent in the tenant's system.
pub(crate) async fn released(more: &str) -> (Site, Agent, AgentSession, AdmissionId) {
    let mut agent = Agent::manufacture("n1");
    let site = Site::start_with(&agent.ek_cas, more, Arc::new(SystemClock)).await;
    site.lease("n1");
    agent.boot(&crate::support::boot_log(), &site.keys);
    let (session, admission) = admitted(&site, &agent).await;
    (site, agent, session, admission)
}

/// What a call was refused with.
pub(crate) fn refusal<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> (u16, String, String) {
    let error = answer.unwrap_err();
    let problem = error.problem().unwrap_or_else(|| panic!("no problem was answered: {error:?}"));
    (problem.status, problem.kind.clone(), problem.detail.clone())
}

pub(crate) fn client(url: &str, ca_pem: &str, token: &str) -> ServiceClient {
    ServiceClient::new(url.parse().unwrap(), ca_pem, Token::from_text(token)).unwrap()
}

pub(crate) async fn any_port() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

/// A gateway's relay: octets from a TCP port to the verifier's Unix socket and back.
async fn relay(socket: PathBuf) -> String {
    let listener = any_port().await;
    let url = format!("https://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let mut unix = connected(&socket).await;
            tokio::spawn(async move { drop(tokio::io::copy_bidirectional(&mut tcp, &mut unix).await) });
        }
    });
    url
}

/// The verifier binds its socket while it starts.
async fn connected(socket: &std::path::Path) -> UnixStream {
    let bound = async {
        loop {
            match UnixStream::connect(socket).await {
                Ok(unix) => return unix,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), bound).await.expect("the verifier binds its socket")
}

async fn serve_peers(peers: Arc<ScriptedPeers>, context: ServiceContext) -> String {
    let router = Router::new()
        .route("/v1/nodes/{node}/airlock", get(airlock))
        .route("/v1/nodes/{node}/reject", post(reject))
        .route("/v1/admissions", get(admissions).post(admit))
        .route("/v1/admissions/{id}", delete(revoke))
        .route("/v1/admission-renewals", post(renew_admissions))
        .route("/v1/exports", post(export))
        .route("/v1/exports/{id}", delete(unexport))
        .route("/v1/export-renewals", post(renew_exports))
        .with_state(peers);
    let listener = any_port().await;
    let url = format!("https://{}/", listener.local_addr().unwrap());
    // The verifier asks for many nodes at once.
    let limits = Limits { connections_per_peer: 1024, ..Limits::default() };
    tokio::spawn(async move { serve_within(limits, Listener::Tls(listener), router, &context).await.unwrap() });
    url
}

async fn airlock(
    State(peers): State<Arc<ScriptedPeers>>,
    Path(node): Path<String>,
) -> Result<Json<AirlockContext>, ApiError> {
    peers.stalled.subscribe().wait_for(|stalled| !stalled).await.unwrap();
    let context = peers.airlock.lock().unwrap().get(&node).cloned();
    context.map(Json).ok_or_else(|| ApiError::conflict("not-in-airlock", format!("node `{node}` is free")))
}

async fn reject(
    State(peers): State<Arc<ScriptedPeers>>,
    Path(node): Path<String>,
    caller: Caller,
    Json(report): Json<RejectRequest>,
) -> Json<()> {
    if caller.role == Role::Service {
        // Of a boot that taught a policy first and is admitted after all: nothing ends with that here.
        peers.note("reject", &node, report.reason);
        return Json(());
    }
    // A project's own verifier, at run time. As isolation does: what stands for this boot ends.
    let ended: Vec<AdmissionId> = {
        let admissions = peers.admissions.borrow();
        let of_boot = |admission: &&Admission| admission.node.as_str() == node && admission.boot == report.boot;
        admissions.admissions.iter().filter(of_boot).map(|admission| admission.id).collect()
    };
    for id in ended {
        peers.end(id, &report.reason);
    }
    peers.note("project-reject", &node, report.reason);
    Json(())
}

async fn export(
    State(peers): State<Arc<ScriptedPeers>>,
    Json(request): Json<ExportRequest>,
) -> Result<Json<ExportAnswer>, ApiError> {
    let claims = peers.accepted(request.result, request.supporting)?;
    peers.note("export", claims.node.as_str(), claims.jti.to_string());
    let ek_public = URL_SAFE_NO_PAD.decode(&claims.ek_public).unwrap();
    let grant = seal_grant(&ek_public, &hex::decode(&claims.ak_name).unwrap(), claims.jti, GRANT).unwrap();
    let address = TenantAddress {
        address: "10.20.0.50/24".parse().unwrap(),
        router: None,
        relay: "10.20.0.1:8443".parse().unwrap(),
    };
    Ok(Json(ExportAnswer { admission: claims.jti, address, grant }))
}

async fn admit(
    State(peers): State<Arc<ScriptedPeers>>,
    Json(request): Json<AdmissionRequest>,
) -> Result<Json<Admission>, ApiError> {
    let claims = peers.accepted(request.result, request.supporting)?;
    peers.note("admit", claims.node.as_str(), claims.jti.to_string());
    let admission = Admission {
        id: claims.jti,
        node: claims.node,
        lease: claims.lease,
        boot: claims.boot,
        expires_at_ms: i64::MAX,
        revoked: None,
    };
    peers.admissions.send_modify(|known| {
        known.revision += 1;
        known.admissions.push(admission.clone());
    });
    Ok(Json(admission))
}

/// At once, or when an admission has begun or ended: as isolation's long poll.
async fn admissions(
    State(peers): State<Arc<ScriptedPeers>>,
    Query(after): Query<BTreeMap<String, u64>>,
) -> Json<Admissions> {
    let mut changed = peers.admissions.subscribe();
    if let Some(after) = after.get("after") {
        let moved = changed.wait_for(|admissions| admissions.revision != *after);
        let _moved = tokio::time::timeout(Duration::from_secs(25), moved).await.is_ok();
    }
    Json(peers.admissions.borrow().clone())
}

async fn revoke(
    State(peers): State<Arc<ScriptedPeers>>,
    Path(id): Path<String>,
    Json(request): Json<RevokeRequest>,
) -> Json<()> {
    peers.note("revoke", &id, request.reason);
    Json(())
}

async fn unexport(State(peers): State<Arc<ScriptedPeers>>, Path(id): Path<String>) -> Json<()> {
    peers.note("unexport", &id, String::new());
    Json(())
}

async fn renew_admissions(
    State(peers): State<Arc<ScriptedPeers>>,
    Json(request): Json<RenewalRequest>,
) -> Result<Json<RenewalAnswer>, ApiError> {
    peers.renew("renew-admission", request).map(Json)
}

async fn renew_exports(
    State(peers): State<Arc<ScriptedPeers>>,
    Json(request): Json<RenewalRequest>,
) -> Result<Json<RenewalAnswer>, ApiError> {
    peers.renew("renew-export", request).map(Json)
}
