//! isolation and imaging for a fleet, scripted: they answer as the real ones would and remember which ports and exports
//! are open, what was renewed, and that what has ended stays ended. They trust every result, and nothing expires here by
//! itself: it is the verifier that is looked at. The real ones are what the lab's other scenarios run.

use crate::error::{LabError, Result};
use assay_service::CancellationToken;
use assay_service::auth::Tokens;
use assay_service::clock::SystemClock;
use assay_service::error::ApiError;
use assay_service::http::{Limits, Listener, ServiceContext, bind, serve_within};
use assay_service::tls::SiteIdentity;
use assay_tpm::seal::seal_grant;
use assay_wire::agent::{Credential, Grant, SealedGrant, TenantAddress};
use assay_wire::id::{AdmissionId, BootId, LeaseId, NodeId, ProjectId};
use assay_wire::imaging::{ExportAnswer, ExportRequest};
use assay_wire::isolation::{
    Admission, AdmissionRequest, Admissions, AirlockContext, RejectRequest, Renewal, RenewalAnswer, RenewalOutcome,
    RenewalRequest, RevokeRequest,
};
use assay_wire::result::Claims;
use axum::extract::{Path as Segment, Query, State};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::net::{SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Both, behind one listener.
#[derive(Debug)]
pub struct ScriptedPeers {
    /// Their base URL.
    pub(super) url: String,
    /// PEM file of the CA of their certificate.
    pub(super) ca_file: PathBuf,
    world: Arc<World>,
    shutdown: CancellationToken,
}

/// What they have on record, and how often admissions have ended: what isolation's long poll waits for. (The real one's
/// revision moves with beginnings, too; a fleet's thousands of them are not what is measured.)
#[derive(Debug)]
struct World {
    record: Mutex<Record>,
    revision: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Record {
    projects: HashMap<String, ProjectId>,
    relays: HashMap<NodeId, SocketAddrV4>,
    airlocks: HashMap<String, AirlockContext>,
    admissions: HashMap<AdmissionId, Admission>,
    /// Why isolation was told to end an admission, each time.
    revocations: HashMap<AdmissionId, Vec<String>>,
    renewed: HashMap<AdmissionId, Renewed>,
    open_ports: HashSet<AdmissionId>,
    open_exports: HashSet<AdmissionId>,
    ended: HashSet<AdmissionId>,
    rejections: u64,
    /// What was done in an order that it must not be done in.
    violations: Vec<String>,
}

/// How often an admission was renewed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Renewed {
    /// At isolation.
    pub isolation: u64,
    /// At imaging.
    pub imaging: u64,
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
        let world = Arc::new(World { record: Mutex::default(), revision: watch::Sender::new(1) });
        let listener = bind(([127, 0, 0, 1], 0).into()).await.map_err(LabError::service(doing))?;
        let address = listener.local_addr().map_err(LabError::io(doing))?;
        let router = router(Arc::clone(&world));
        // All their callers are one verifier.
        let limits = Limits { connections_per_peer: 4_096, ..Limits::default() };
        tokio::spawn(async move {
            if let Err(error) = serve_within(limits, Listener::Tls(listener), router, &context).await {
                tracing::error!(%error, "the scripted peers stopped");
            }
        });
        Ok(Self { url: format!("https://{address}/"), ca_file, world, shutdown })
    }

    /// Leases a node to a project; without this, nodes are those of the project `fleet`.
    ///
    /// # Errors
    /// It is no project's name.
    pub fn lease_to(&self, node: &str, project: &str) -> Result<()> {
        let project = project.parse().map_err(LabError::service(format!("leasing {node} to {project}")))?;
        self.locked().projects.insert(node.to_owned(), project);
        Ok(())
    }

    /// Where a node finds the verifier once it has moved. Its grant is then sealed for the TPM that opens it.
    pub(super) fn relay(&self, node: &NodeId, relay: SocketAddr) {
        if let SocketAddr::V4(relay) = relay {
            self.locked().relays.insert(node.clone(), relay);
        }
    }

    fn locked(&self) -> MutexGuard<'_, Record> {
        self.world.locked()
    }

    /// Whether the admission's port is on the tenant's network.
    #[must_use]
    pub fn port_is_open(&self, admission: AdmissionId) -> bool {
        self.locked().open_ports.contains(&admission)
    }

    /// Whether the admission's disk is exported.
    #[must_use]
    pub fn export_is_open(&self, admission: AdmissionId) -> bool {
        self.locked().open_exports.contains(&admission)
    }

    /// Ports and exports that are open.
    #[must_use]
    pub fn open(&self) -> (usize, usize) {
        let record = self.locked();
        (record.open_ports.len(), record.open_exports.len())
    }

    /// Admissions renewed, at isolation and imaging together.
    #[must_use]
    pub fn renewals(&self) -> u64 {
        self.locked().renewed.values().map(|renewed| renewed.isolation + renewed.imaging).sum()
    }

    /// How often one admission was renewed.
    #[must_use]
    pub fn renewed(&self, admission: AdmissionId) -> Renewed {
        self.locked().renewed.get(&admission).copied().unwrap_or_default()
    }

    /// Why isolation was told to end an admission: once for each time that it was told.
    #[must_use]
    pub fn revocations(&self, admission: AdmissionId) -> Vec<String> {
        self.locked().revocations.get(&admission).cloned().unwrap_or_default()
    }

    /// Bad verdicts that were reported.
    #[must_use]
    pub fn rejections(&self) -> u64 {
        self.locked().rejections
    }

    /// What was done in an order that it must not be done in.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.locked().violations.clone()
    }
}

impl Drop for ScriptedPeers {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl World {
    fn locked(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Shared = State<Arc<World>>;

fn router(world: Arc<World>) -> Router {
    Router::new()
        .route("/v1/nodes/{node}/airlock", get(airlock))
        .route("/v1/nodes/{node}/reject", post(reject))
        .route("/v1/admissions", get(admissions).post(admit))
        .route("/v1/admissions/{id}", delete(revoke))
        .route("/v1/admission-renewals", post(renew_at_isolation))
        .route("/v1/exports", post(export))
        .route("/v1/exports/{id}", delete(unexport))
        .route("/v1/export-renewals", post(renew_at_imaging))
        .with_state(world)
}

async fn airlock(
    State(world): Shared,
    Segment(node): Segment<String>,
) -> std::result::Result<Json<AirlockContext>, ApiError> {
    let fleet: ProjectId = "fleet".parse().map_err(|cause| ApiError::bad_request("project", cause))?;
    let mut record = world.locked();
    let project = record.projects.get(&node).cloned().unwrap_or(fleet);
    let new = || AirlockContext { lease: LeaseId::random(), project, boot: BootId::random(), machine_resets: None };
    Ok(Json(record.airlocks.entry(node).or_insert_with(new).clone()))
}

async fn reject(State(world): Shared, Json(_report): Json<RejectRequest>) -> Json<()> {
    world.locked().rejections += 1;
    Json(())
}

async fn export(
    State(world): Shared,
    Json(request): Json<ExportRequest>,
) -> std::result::Result<Json<ExportAnswer>, ApiError> {
    let claims = claims(&request.result)?;
    let mut record = world.locked();
    if record.ended.contains(&claims.jti) {
        return Err(ApiError::conflict("admission-ended", "it has ended"));
    }
    record.open_exports.insert(claims.jti);
    let relay = record.relays.get(&claims.node).copied();
    drop(record);
    let bad = |_| ApiError::bad_request("address", "an address that is none");
    let address = TenantAddress {
        address: "10.20.0.50/24".parse().map_err(bad)?,
        router: None,
        relay: relay.unwrap_or(SocketAddrV4::new([10, 20, 0, 1].into(), 8443)),
    };
    let grant = match relay {
        Some(portal) => sealed(&claims, portal)?,
        None => {
            let credential = Credential { id_object: vec![1], encrypted_secret: vec![2] };
            SealedGrant { admission: claims.jti, credential, nonce: vec![0; 12], ciphertext: vec![3] }
        }
    };
    Ok(Json(ExportAnswer { admission: claims.jti, address, grant }))
}

/// A grant for a disk that is not there, sealed to the TPM that the result is about.
fn sealed(claims: &Claims, portal: SocketAddrV4) -> std::result::Result<SealedGrant, ApiError> {
    let bad = |_| ApiError::bad_request("result", "keys or names that are none");
    let iqn = |name: &str| format!("iqn.2026-01.invalid.assay:{name}").parse().map_err(|_| bad(()));
    let grant = Grant {
        target: iqn("disk")?,
        portal,
        lun: 0,
        initiator: iqn(claims.node.as_str())?,
        chap_name: claims.node.to_string(),
        chap_secret: "0123456789abcdef".to_owned(),
    };
    let grant = serde_json::to_vec(&grant).map_err(|_| bad(()))?;
    let ek_public = URL_SAFE_NO_PAD.decode(&claims.ek_public).map_err(|_| bad(()))?;
    let ak_name = hex::decode(&claims.ak_name).map_err(|_| bad(()))?;
    seal_grant(&ek_public, &ak_name, claims.jti, &grant).map_err(|_| bad(()))
}

async fn admit(
    State(world): Shared,
    Json(request): Json<AdmissionRequest>,
) -> std::result::Result<Json<Admission>, ApiError> {
    let claims = claims(&request.result)?;
    let mut record = world.locked();
    if record.ended.contains(&claims.jti) {
        return Err(ApiError::conflict("admission-ended", "it has ended"));
    }
    if !record.open_exports.contains(&claims.jti) {
        record.violations.push(format!("the port of {} was moved without an export", claims.node));
    }
    record.open_ports.insert(claims.jti);
    let new = Admission {
        id: claims.jti,
        node: claims.node,
        lease: claims.lease,
        boot: claims.boot,
        expires_at_ms: claims.exp.saturating_mul(1000),
        revoked: None,
    };
    Ok(Json(record.admissions.entry(claims.jti).or_insert(new).clone()))
}

#[derive(Debug, Deserialize)]
struct After {
    after: Option<u64>,
}

async fn admissions(State(world): Shared, Query(asked): Query<After>) -> Json<Admissions> {
    let mut revision = world.revision.subscribe();
    if let Some(after) = asked.after {
        let moved = revision.wait_for(|revision| *revision != after);
        let _late_or_not = tokio::time::timeout(LONG_POLL, moved).await;
    }
    let revision = *revision.borrow();
    Json(Admissions { revision, admissions: world.locked().admissions.values().cloned().collect() })
}

async fn revoke(
    State(world): Shared,
    Segment(id): Segment<AdmissionId>,
    Json(request): Json<RevokeRequest>,
) -> Json<()> {
    let mut record = world.locked();
    record.ended.insert(id);
    record.open_ports.remove(&id);
    record.revocations.entry(id).or_default().push(request.reason.clone());
    let admission = record.admissions.get_mut(&id);
    if let Some(admission) = admission.filter(|admission| admission.revoked.is_none()) {
        admission.revoked = Some(request.reason);
        world.revision.send_modify(|revision| *revision += 1);
    }
    Json(())
}

async fn unexport(State(world): Shared, Segment(id): Segment<AdmissionId>) -> Json<()> {
    let mut record = world.locked();
    // A release is undone in order. One that was renewed is no release any more: its port and disk are cut side by side.
    if record.open_ports.contains(&id) && !record.renewed.contains_key(&id) {
        record.violations.push(format!("the export of {id} was ended before its port was closed"));
    }
    record.ended.insert(id);
    record.open_exports.remove(&id);
    Json(())
}

async fn renew_at_isolation(State(world): Shared, Json(request): Json<RenewalRequest>) -> Json<RenewalAnswer> {
    Json(renew(&world, &request, |renewed| &mut renewed.isolation))
}

async fn renew_at_imaging(State(world): Shared, Json(request): Json<RenewalRequest>) -> Json<RenewalAnswer> {
    Json(renew(&world, &request, |renewed| &mut renewed.imaging))
}

/// A renewal opens nothing and brings nothing back.
fn renew(world: &World, request: &RenewalRequest, count: fn(&mut Renewed) -> &mut u64) -> RenewalAnswer {
    let mut record = world.locked();
    let renew = |renewal: &Renewal| {
        let id = renewal.admission;
        if record.ended.contains(&id) {
            record.violations.push(format!("{id} was renewed after its end had begun"));
            return RenewalOutcome::Refused { reason: "it has ended".to_owned() };
        }
        let Ok(claims) = claims(&renewal.result) else {
            record.violations.push(format!("{id} was renewed with something that is no result"));
            return RenewalOutcome::Refused { reason: "not a result".to_owned() };
        };
        let expires_at_ms = claims.exp.saturating_mul(1000);
        if let Some(admission) = record.admissions.get_mut(&id) {
            admission.expires_at_ms = expires_at_ms;
        }
        *count(record.renewed.entry(id).or_default()) += 1;
        RenewalOutcome::Renewed { expires_at_ms }
    };
    RenewalAnswer { outcomes: request.renewals.iter().map(renew).collect() }
}

/// What a result says; its signature is not what is looked at here.
fn claims(result: &str) -> std::result::Result<Claims, ApiError> {
    let malformed = || ApiError::bad_request("result", "not a result");
    let payload = result.split('.').nth(1).and_then(|payload| URL_SAFE_NO_PAD.decode(payload).ok());
    serde_json::from_slice(&payload.ok_or_else(malformed)?).map_err(|_| malformed())
}

const LONG_POLL: Duration = Duration::from_secs(25);
