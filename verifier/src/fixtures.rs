//! Values for this crate's unit tests, and the two peers of a release as scripted HTTP services: they keep the state
//! that isolation and imaging would, and fail when told to. The lab's tests run the real ones.

use crate::policy::Policy;
use crate::release::journal::ReleaseStep;
use crate::release::peers::Peers;
use crate::session::{Attester, Challenged, Enrolled, IssuedNonce, Nonce, Proof};
use crate::store::archive::{EvidenceId, NewVerdict, Outcome};
use crate::store::policies::PolicyRecord;
use crate::store::releases::Release;
use crate::store::{StoreLimits, VerifierStore};
use assay_service::CancellationToken;
use assay_service::auth::Tokens;
use assay_service::client::ServiceClient;
use assay_service::clock::SystemClock;
use assay_service::error::ApiError;
use assay_service::http::{Listener, ServiceContext, serve};
use assay_service::testing::TestDatabase;
use assay_service::tls::SiteIdentity;
use assay_wire::agent::{Credential, SealedGrant, TenantAddress};
use assay_wire::id::{AdmissionId, BootId, LeaseId, SessionId};
use assay_wire::imaging::{ExportAnswer, ExportRequest};
use assay_wire::isolation::{Admission, AdmissionRequest, AirlockContext, RejectRequest};
use axum::extract::{Path, State};
use axum::http::Method;
use axum::routing::{delete, post};
use axum::{Json, Router};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tempfile::TempDir;
use tokio::sync::watch;

/// A store of its own.
pub(crate) struct TestStore {
    pub(crate) store: VerifierStore,
    database: TestDatabase,
}

impl TestStore {
    pub(crate) async fn open(limits: StoreLimits) -> Self {
        Self::on(TestDatabase::new(), limits).await
    }

    pub(crate) async fn on(database: TestDatabase, limits: StoreLimits) -> Self {
        Self { store: VerifierStore::open(database.url(), limits).await.unwrap(), database }
    }

    pub(crate) fn url(&self) -> &str {
        self.database.url()
    }

    /// Opens the same database anew, as after a restart.
    pub(crate) async fn reopen(&mut self) {
        self.store.close().await;
        self.store = VerifierStore::open(self.database.url(), StoreLimits::default()).await.unwrap();
    }

    /// The same database as another process has it.
    pub(crate) async fn another_process(&self, name: &str) -> VerifierStore {
        VerifierStore::open(self.database.url(), StoreLimits::default()).await.unwrap().named(name)
    }
}

impl VerifierStore {
    /// Makes the database refuse to write the journal, as on a full disk, or accept it again.
    pub(crate) async fn refuse_writes(&self, refuse: bool) {
        let (backend,): (String,) = (self.pool().acquire().await.unwrap().backend_name().to_owned(),);
        let statements: &[&str] = match (backend.as_str(), refuse) {
            ("PostgreSQL", true) => &[
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''full''; END'",
                "CREATE TRIGGER refuse BEFORE UPDATE ON releases FOR EACH ROW EXECUTE FUNCTION refuse()",
            ],
            ("PostgreSQL", false) => &["DROP TRIGGER refuse ON releases", "DROP FUNCTION refuse"],
            (_, true) => &["CREATE TRIGGER refuse BEFORE UPDATE ON releases BEGIN SELECT RAISE(ABORT, 'full'); END"],
            (_, false) => &["DROP TRIGGER refuse"],
        };
        for statement in statements {
            sqlx::query(*statement).execute(self.pool()).await.unwrap();
        }
    }
}

pub(crate) fn challenged(node: &str, proof: &Proof, created_at_ms: i64) -> Challenged {
    let airlock = AirlockContext {
        lease: LeaseId::random(),
        project: "alpha".parse().unwrap(),
        boot: BootId::random(),
        machine_resets: None,
    };
    Challenged {
        attester: Attester {
            session: SessionId::random(),
            node: node.parse().unwrap(),
            ek_public: vec![1, 2, 3],
            ak_public: vec![4, 5, 6],
            airlock,
            created_at_ms,
            expires_at_ms: created_at_ms + 1_000_000,
        },
        proof: proof.digest(),
        challenge_expires_at_ms: created_at_ms + 60_000,
    }
}

/// An activated session in `store`.
pub(crate) async fn enrolled(store: &VerifierStore, node: &str, now_ms: i64) -> Enrolled {
    let proof = Proof::random();
    let challenged = challenged(node, &proof, now_ms);
    store.insert_challenge(&challenged).await.unwrap();
    let nonce = IssuedNonce { nonce: Nonce::random(), issued_at_ms: now_ms, expires_at_ms: now_ms + 120_000 };
    let enrolled = challenged.activate(&proof, nonce, now_ms).unwrap();
    assert!(store.activate(&enrolled, crate::store::sessions::ActivatedFrom::Challenged).await.unwrap());
    enrolled
}

pub(crate) fn release_of(enrolled: &Enrolled, now_ms: i64) -> Release {
    let attester = &enrolled.attester;
    let admission = AdmissionId::random();
    Release {
        admission,
        session: attester.session,
        node: attester.node.clone(),
        project: attester.airlock.project.clone(),
        lease: attester.airlock.lease,
        boot: attester.airlock.boot,
        // The scripted peers take the result's text for its claims.
        result: format!("{admission} {} {} {}", attester.node, attester.airlock.lease, attester.airlock.boot),
        supporting: Vec::new(),
        result_expires_at_ms: now_ms + 3_600_000,
        step: ReleaseStep::Admitted,
        step_at_ms: now_ms,
        created_at_ms: now_ms,
        address: None,
        grant: None,
        failure: None,
    }
}

pub(crate) fn verdict<'a>(enrolled: &'a Enrolled, outcome: Outcome<'a>, received_at_ms: i64) -> NewVerdict<'a> {
    NewVerdict {
        id: EvidenceId::new(),
        attester: &enrolled.attester,
        nonce: enrolled.nonce.nonce,
        body: BODY,
        body_sha256: "00",
        received_at_ms,
        policy: Some("sha256:00"),
        clock: None,
        context: None,
        outcome,
        attestation: None,
    }
}

/// A small policy, approved by alice.
pub(crate) fn policy_record(name: &str, added_at_ms: i64) -> PolicyRecord {
    let rule = |index: u8| {
        let event = serde_json::json!({"description": "image", "type": "EV_IPL", "sha256": [hex::encode([index; 32])]});
        serde_json::json!({"index": index, "mode": "enforce", "event": [event]})
    };
    let rules: Vec<_> = [0, 2, 4, 7, 11, 12].into_iter().map(rule).collect();
    let document = serde_json::json!({"name": name, "pcr": rules}).to_string();
    let digest = Policy::parse(&document).unwrap().digest().to_string();
    let added_by = "alice".to_owned();
    PolicyRecord { name: name.to_owned(), digest, document, signature: None, added_by, added_at_ms, active: true }
}

const BODY: &str = r#"{"attest":"","signature":"","pcrs":[],"event_log":"","agent_measurements":[]}"#;

/// A release whose first entry is in the journal.
pub(crate) async fn admitted(store: &VerifierStore, node: &str, now_ms: i64) -> Release {
    let enrolled = enrolled(store, node, now_ms).await;
    let release = release_of(&enrolled, now_ms);
    assert!(store.record_verdict(&verdict(&enrolled, Outcome::Accepted(&release), now_ms)).await.unwrap());
    release
}

/// isolation and imaging, scripted, behind real HTTP on Unix sockets.
pub(crate) struct ScriptedPeers {
    pub(crate) peers: Peers,
    pub(crate) world: Arc<World>,
    shutdown: CancellationToken,
    _folder: TempDir,
}

/// What the scripted peers have on record.
pub(crate) struct World {
    record: Mutex<Record>,
    changed: watch::Sender<usize>,
}

#[derive(Default)]
struct Record {
    calls: Vec<Call>,
    failures: HashMap<&'static str, VecDeque<ApiError>>,
    losses: HashMap<&'static str, u32>,
    open_exports: BTreeSet<String>,
    open_ports: BTreeSet<String>,
    /// Ended for good, as isolation and imaging remember it.
    ended: BTreeSet<String>,
}

/// One call that arrived.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    pub(crate) at: Instant,
}

impl ScriptedPeers {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shutdown = CancellationToken::new();
        let context = ServiceContext {
            clock: Arc::new(SystemClock),
            tokens: Arc::new(Tokens::load_or_create(folder.path()).unwrap()),
            identity: Arc::new(SiteIdentity::load_or_create(folder.path(), &[]).unwrap()),
            shutdown: shutdown.clone(),
        };
        let world = Arc::new(World { record: Mutex::default(), changed: watch::Sender::new(0) });
        let socket = folder.path().join("peers.sock");
        let router = Router::new()
            .route("/v1/exports", post(export))
            .route("/v1/exports/{id}", delete(unexport))
            .route("/v1/admissions", post(admit))
            .route("/v1/admissions/{id}", delete(revoke))
            .route("/v1/nodes/{node}/reject", post(reject))
            .with_state(Arc::clone(&world));
        let listener = Listener::Unix(socket.clone());
        tokio::spawn(async move { serve(listener, router, &context).await.unwrap() });
        listening(&socket).await;
        let client = || ServiceClient::over_unix(&socket).unwrap();
        Self { peers: Peers::new(client(), client()), world, shutdown, _folder: folder }
    }
}

impl Drop for ScriptedPeers {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Waits until the server has bound its socket.
async fn listening(socket: &PathBuf) {
    while tokio::net::UnixStream::connect(socket).await.is_err() {
        tokio::task::yield_now().await;
    }
}

impl World {
    /// The next calls named `name` are answered with these.
    pub(crate) fn fail(&self, name: &'static str, answers: impl IntoIterator<Item = ApiError>) {
        self.record.lock().unwrap().failures.entry(name).or_default().extend(answers);
    }

    /// The next `times` calls named `name` are done, but answered as if something had gone wrong on the way back.
    pub(crate) fn lose_answers(&self, name: &'static str, times: u32) {
        self.record.lock().unwrap().losses.insert(name, times);
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.record.lock().unwrap().calls.clone()
    }

    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.calls().iter().map(|call| call.name).collect()
    }

    pub(crate) fn port_is_open(&self, admission: AdmissionId) -> bool {
        self.record.lock().unwrap().open_ports.contains(&admission.to_string())
    }

    pub(crate) fn export_is_open(&self, admission: AdmissionId) -> bool {
        self.record.lock().unwrap().open_exports.contains(&admission.to_string())
    }

    /// Waits until a call named `name` has arrived `times` times.
    pub(crate) async fn called(&self, name: &'static str, times: usize) {
        let mut changed = self.changed.subscribe();
        changed.wait_for(|_| self.names().iter().filter(|called| **called == name).count() >= times).await.unwrap();
    }

    /// Notes the call, does it unless it shall fail, and answers what the script says.
    fn arrive(&self, name: &'static str, effect: impl FnOnce(&mut Record)) -> Result<(), ApiError> {
        let mut record = self.record.lock().unwrap();
        record.calls.push(Call { name, at: Instant::now() });
        let failure = record.failures.get_mut(name).and_then(VecDeque::pop_front);
        if failure.is_none() {
            effect(&mut record);
        }
        let lost = record.losses.get_mut(name).is_some_and(|left| {
            let lose = *left > 0;
            *left = left.saturating_sub(1);
            lose
        });
        drop(record);
        self.changed.send_modify(|calls| *calls += 1);
        match failure {
            Some(failure) => Err(failure),
            None if lost => Err(ApiError::unavailable("lost", "the answer was lost")),
            None => Ok(()),
        }
    }
}

async fn export(
    State(world): State<Arc<World>>,
    Json(request): Json<ExportRequest>,
) -> Result<Json<ExportAnswer>, ApiError> {
    let admission: AdmissionId = request.result.split(' ').next().unwrap().parse().unwrap();
    let mut ended = false;
    world.arrive("export", |record| {
        ended = record.ended.contains(&admission.to_string());
        if !ended {
            record.open_exports.insert(admission.to_string());
        }
    })?;
    if ended {
        return Err(ApiError::conflict("admission-ended", format!("admission {admission} has ended")));
    }
    let address = TenantAddress {
        address: "10.20.0.50/24".parse().unwrap(),
        router: None,
        relay: "10.20.0.1:8443".parse().unwrap(),
    };
    let credential = Credential { id_object: vec![1], encrypted_secret: vec![2] };
    let grant = SealedGrant { admission, credential, nonce: vec![0; 12], ciphertext: vec![3] };
    Ok(Json(ExportAnswer { admission, address, grant }))
}

async fn admit(
    State(world): State<Arc<World>>,
    Json(request): Json<AdmissionRequest>,
) -> Result<Json<Admission>, ApiError> {
    let claims: Vec<&str> = request.result.split(' ').collect();
    let admission = Admission {
        id: claims[0].parse().unwrap(),
        node: claims[1].parse().unwrap(),
        lease: claims[2].parse().unwrap(),
        boot: claims[3].parse().unwrap(),
        expires_at_ms: i64::MAX,
        revoked: None,
    };
    world.arrive("admit", |record| {
        assert!(record.open_exports.contains(claims[0]), "a port was to be moved without an export");
        record.open_ports.insert(claims[0].to_owned());
    })?;
    Ok(Json(admission))
}

async fn revoke(State(world): State<Arc<World>>, Path(id): Path<String>) -> Result<Json<()>, ApiError> {
    let mut known = false;
    world.arrive("revoke", |record| known = record.open_ports.remove(&id))?;
    if known { Ok(Json(())) } else { Err(ApiError::not_found("no such admission")) }
}

async fn unexport(
    method: Method,
    State(world): State<Arc<World>>,
    Path(id): Path<String>,
) -> Result<Json<()>, ApiError> {
    assert_eq!(method, Method::DELETE);
    world.arrive("unexport", |record| {
        record.ended.insert(id.clone());
        assert!(!record.open_ports.contains(&id), "an export was ended before its port was closed");
        record.open_exports.remove(&id);
    })?;
    Ok(Json(()))
}

async fn reject(State(world): State<Arc<World>>, Json(_report): Json<RejectRequest>) -> Result<Json<()>, ApiError> {
    world.arrive("reject", |_| {}).map(Json)
}
