//! isolation and imaging for a fleet, scripted: they answer as the real ones would and remember which ports and exports
//! are open, and that what has ended stays ended. They trust every result: it is the verifier that is looked at here. The
//! real ones are what the lab's other scenarios run.

use crate::error::{LabError, Result};
use assay_service::CancellationToken;
use assay_service::auth::Tokens;
use assay_service::clock::SystemClock;
use assay_service::error::ApiError;
use assay_service::http::{Limits, Listener, ServiceContext, bind, serve_within};
use assay_service::tls::SiteIdentity;
use assay_wire::agent::{Credential, SealedGrant, TenantAddress};
use assay_wire::id::{AdmissionId, BootId, LeaseId, ProjectId};
use assay_wire::imaging::{ExportAnswer, ExportRequest};
use assay_wire::isolation::{
    Admission, AdmissionRequest, AirlockContext, RejectRequest, RenewalAnswer, RenewalOutcome, RenewalRequest,
};
use assay_wire::result::Claims;
use axum::extract::{Path as Segment, Query, State};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Both, behind one listener.
#[derive(Debug)]
pub struct ScriptedPeers {
    /// Their base URL.
    pub(super) url: String,
    /// PEM file of the CA of their certificate.
    pub(super) ca_file: PathBuf,
    record: Arc<Mutex<Record>>,
    shutdown: CancellationToken,
}

/// What they have on record.
#[derive(Debug, Default)]
struct Record {
    airlocks: HashMap<String, AirlockContext>,
    open_ports: HashSet<AdmissionId>,
    open_exports: HashSet<AdmissionId>,
    ended: HashSet<AdmissionId>,
    renewals: u64,
    rejections: u64,
    /// What was done in an order that it must not be done in.
    violations: Vec<String>,
}

impl ScriptedPeers {
    /// Starts them; they keep their keys in `folder`.
    pub(super) async fn start(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(LabError::io(format!("making {}", folder.display())))?;
        let doing = "starting the scripted peers";
        let identity = SiteIdentity::load_or_create(folder, &[]).map_err(LabError::service(doing))?;
        let ca_file = folder.join("peers-ca.pem");
        std::fs::write(&ca_file, identity.ca_pem()).map_err(LabError::io("writing the peers' CA"))?;
        let shutdown = CancellationToken::new();
        let context = ServiceContext {
            clock: Arc::new(SystemClock),
            tokens: Arc::new(Tokens::load_or_create(folder).map_err(LabError::service(doing))?),
            identity: Arc::new(identity),
            shutdown: shutdown.clone(),
        };
        let record = Arc::new(Mutex::new(Record::default()));
        let listener = bind(([127, 0, 0, 1], 0).into()).await.map_err(LabError::service(doing))?;
        let address = listener.local_addr().map_err(LabError::io(doing))?;
        let router = router(Arc::clone(&record));
        // All their callers are one verifier.
        let limits = Limits { connections_per_peer: 4_096, ..Limits::default() };
        tokio::spawn(async move {
            if let Err(error) = serve_within(limits, Listener::Tls(listener), router, &context).await {
                tracing::error!(%error, "the scripted peers stopped");
            }
        });
        Ok(Self { url: format!("https://{address}/"), ca_file, record, shutdown })
    }

    /// Whether the admission's port is on the tenant's network.
    #[must_use]
    pub fn port_is_open(&self, admission: AdmissionId) -> bool {
        locked(&self.record).open_ports.contains(&admission)
    }

    /// Whether the admission's disk is exported.
    #[must_use]
    pub fn export_is_open(&self, admission: AdmissionId) -> bool {
        locked(&self.record).open_exports.contains(&admission)
    }

    /// Ports and exports that are open.
    #[must_use]
    pub fn open(&self) -> (usize, usize) {
        let record = locked(&self.record);
        (record.open_ports.len(), record.open_exports.len())
    }

    /// Admissions renewed, at isolation and imaging together.
    #[must_use]
    pub fn renewals(&self) -> u64 {
        locked(&self.record).renewals
    }

    /// Bad verdicts that were reported.
    #[must_use]
    pub fn rejections(&self) -> u64 {
        locked(&self.record).rejections
    }

    /// What was done in an order that it must not be done in.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        locked(&self.record).violations.clone()
    }
}

impl Drop for ScriptedPeers {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

type Shared = State<Arc<Mutex<Record>>>;

fn router(record: Arc<Mutex<Record>>) -> Router {
    Router::new()
        .route("/v1/nodes/{node}/airlock", get(airlock))
        .route("/v1/nodes/{node}/reject", post(reject))
        .route("/v1/admissions", get(admissions).post(admit))
        .route("/v1/admissions/{id}", delete(revoke))
        .route("/v1/admission-renewals", post(renew))
        .route("/v1/exports", post(export))
        .route("/v1/exports/{id}", delete(unexport))
        .route("/v1/export-renewals", post(renew))
        .with_state(record)
}

fn locked(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn airlock(
    State(record): Shared,
    Segment(node): Segment<String>,
) -> std::result::Result<Json<AirlockContext>, ApiError> {
    let project: ProjectId = "fleet".parse().map_err(|cause| ApiError::bad_request("project", cause))?;
    let new = || AirlockContext { lease: LeaseId::random(), project, boot: BootId::random(), machine_resets: None };
    Ok(Json(locked(&record).airlocks.entry(node).or_insert_with(new).clone()))
}

async fn reject(State(record): Shared, Json(_report): Json<RejectRequest>) -> Json<()> {
    locked(&record).rejections += 1;
    Json(())
}

async fn export(
    State(record): Shared,
    Json(request): Json<ExportRequest>,
) -> std::result::Result<Json<ExportAnswer>, ApiError> {
    let claims = claims(&request.result)?;
    let mut record = locked(&record);
    if record.ended.contains(&claims.jti) {
        return Err(ApiError::conflict("admission-ended", "it has ended"));
    }
    record.open_exports.insert(claims.jti);
    let bad = |_| ApiError::bad_request("address", "an address that is none");
    let address = TenantAddress {
        address: "10.20.0.50/24".parse().map_err(bad)?,
        router: None,
        relay: std::net::SocketAddrV4::new([10, 20, 0, 1].into(), 8443),
    };
    let credential = Credential { id_object: vec![1], encrypted_secret: vec![2] };
    let grant = SealedGrant { admission: claims.jti, credential, nonce: vec![0; 12], ciphertext: vec![3] };
    Ok(Json(ExportAnswer { admission: claims.jti, address, grant }))
}

async fn admit(
    State(record): Shared,
    Json(request): Json<AdmissionRequest>,
) -> std::result::Result<Json<Admission>, ApiError> {
    let claims = claims(&request.result)?;
    let mut record = locked(&record);
    if record.ended.contains(&claims.jti) {
        return Err(ApiError::conflict("admission-ended", "it has ended"));
    }
    if !record.open_exports.contains(&claims.jti) {
        record.violations.push(format!("the port of {} was moved without an export", claims.node));
    }
    record.open_ports.insert(claims.jti);
    Ok(Json(Admission {
        id: claims.jti,
        node: claims.node,
        lease: claims.lease,
        boot: claims.boot,
        expires_at_ms: claims.exp.saturating_mul(1000),
        revoked: None,
    }))
}

#[derive(Debug, Deserialize)]
struct After {
    after: Option<u64>,
}

/// Nothing ever changes here by itself: whoever waits for a change waits in vain.
async fn admissions(Query(asked): Query<After>) -> Json<serde_json::Value> {
    if asked.after.is_some() {
        tokio::time::sleep(LONG_POLL).await;
    }
    Json(serde_json::json!({ "revision": 1, "admissions": [] }))
}

async fn revoke(State(record): Shared, Segment(id): Segment<AdmissionId>) -> Json<()> {
    let mut record = locked(&record);
    record.ended.insert(id);
    record.open_ports.remove(&id);
    Json(())
}

async fn unexport(State(record): Shared, Segment(id): Segment<AdmissionId>) -> Json<()> {
    let mut record = locked(&record);
    if record.open_ports.contains(&id) {
        record.violations.push(format!("the export of {id} was ended before its port was closed"));
    }
    record.ended.insert(id);
    record.open_exports.remove(&id);
    Json(())
}

async fn renew(State(record): Shared, Json(request): Json<RenewalRequest>) -> Json<RenewalAnswer> {
    let outcome = RenewalOutcome::Renewed { expires_at_ms: i64::MAX };
    let outcomes = vec![outcome; request.renewals.len()];
    locked(&record).renewals += u64::try_from(outcomes.len()).unwrap_or(0);
    Json(RenewalAnswer { outcomes })
}

/// What a result says; its signature is not what is looked at here.
fn claims(result: &str) -> std::result::Result<Claims, ApiError> {
    let malformed = || ApiError::bad_request("result", "not a result");
    let payload = result.split('.').nth(1).and_then(|payload| URL_SAFE_NO_PAD.decode(payload).ok());
    serde_json::from_slice(&payload.ok_or_else(malformed)?).map_err(|_| malformed())
}

const LONG_POLL: Duration = Duration::from_secs(25);
