//! The BMC's HTTPS server.

use super::system::{RESET_PATH, ResetRequest, ResetType, SYSTEM_PATH, SystemPatch, SystemState};
use crate::error::{LabError, Result};
use crate::events::EventLog;
use crate::machine::{Machine, PowerEvent};
use crate::steps;
use assay_service::auth::{Token, Tokens};
use assay_service::clock::{Clock as _, SystemClock};
use assay_service::http::{self, Listener, ServiceContext};
use assay_service::tls::SiteIdentity;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// A BMC that is up, until its `shutdown`.
#[derive(Clone)]
pub struct Bmc {
    /// Base of its API, like `https://127.0.0.1:40123`.
    pub url: String,
    /// User name for basic authentication.
    pub username: String,
    /// Its password.
    pub password: String,
    /// PEM of the CA that signed its certificate.
    pub ca_pem: String,
}

impl fmt::Debug for Bmc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bmc").field("url", &self.url).field("password", &"<redacted>").finish_non_exhaustive()
    }
}

impl Bmc {
    /// Starts a BMC for `machine` on a free port of loopback; keys in `folder`. `power_events` are the machine's, and are
    /// recorded in `events`.
    ///
    /// # Errors
    /// No certificate, or no port.
    pub async fn start(
        node: &str,
        machine: Arc<Machine>,
        power_events: mpsc::UnboundedReceiver<PowerEvent>,
        folder: &Path,
        events: EventLog,
        shutdown: CancellationToken,
    ) -> Result<Self> {
        let doing = format!("starting the BMC of {node}");
        let identity = SiteIdentity::load_or_create(folder, &[]).map_err(LabError::service(doing.as_str()))?;
        // Only the listener's plumbing wants tokens; Redfish clients authenticate by name and password.
        let tokens = Tokens::load_or_create(folder).map_err(LabError::service(doing.as_str()))?;
        let listener =
            http::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.map_err(LabError::service(doing.as_str()))?;
        let address = listener.local_addr().map_err(LabError::io(doing))?;
        let bmc = Self {
            url: format!("https://{address}"),
            username: "operator".to_owned(),
            password: Token::random().expose().to_owned(),
            ca_pem: identity.ca_pem().to_owned(),
        };
        let shared = Shared {
            node: node.to_owned(),
            machine,
            state: Arc::new(Mutex::new(SystemState::new(SystemClock.now_ms()))),
            authorization: basic(&bmc.username, &bmc.password),
        };
        tokio::spawn(follow(shared.clone(), power_events, events));
        let context = ServiceContext {
            clock: Arc::new(SystemClock),
            tokens: Arc::new(tokens),
            identity: Arc::new(identity),
            shutdown,
        };
        tokio::spawn(async move {
            if let Err(error) = http::serve(Listener::Tls(listener), router(shared), &context).await {
                tracing::error!(event = "bmc.ended", %error, "a BMC's listener ended");
            }
        });
        Ok(bmc)
    }

    /// The system's resource.
    #[must_use]
    pub fn system_url(&self) -> String {
        format!("{}{SYSTEM_PATH}", self.url)
    }
}

#[derive(Clone)]
struct Shared {
    node: String,
    machine: Arc<Machine>,
    state: Arc<Mutex<SystemState>>,
    authorization: String,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, SystemState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn system(&self) -> Response {
        let power_on = self.machine.is_on();
        let state = self.state();
        let last_reset = rfc3339(state.last_reset_ms());
        let resource = state.resource(&self.node, power_on, &last_reset);
        ([(header::ETAG, state.etag(power_on))], Json(resource)).into_response()
    }
}

fn router(shared: Shared) -> Router {
    let protected = Router::new()
        .route("/redfish/v1/Systems", get(systems))
        .route(SYSTEM_PATH, get(system).patch(patch_system))
        .route(RESET_PATH, post(reset))
        .layer(middleware::from_fn_with_state(shared.clone(), authenticate));
    // The service root is open to all (DSP0266 section 13.3.5).
    let root = Router::new().route("/redfish/v1", get(service_root)).route("/redfish/v1/", get(service_root));
    root.merge(protected).with_state(shared)
}

async fn authenticate(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    if given == Some(shared.authorization.as_str()) {
        return next.run(request).await;
    }
    let mut refusal = error(StatusCode::UNAUTHORIZED, "NoValidSession", "name and password are missing or wrong");
    refusal.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Basic realm=\"bmc\""));
    refusal
}

async fn service_root() -> Json<Value> {
    Json(json!({
        "@odata.id": "/redfish/v1",
        "@odata.type": "#ServiceRoot.v1_15_0.ServiceRoot",
        "Id": "RootService",
        "Name": "qemu-lab BMC",
        "RedfishVersion": "1.17.0",
        "Systems": { "@odata.id": "/redfish/v1/Systems" },
    }))
}

async fn systems() -> Json<Value> {
    Json(json!({
        "@odata.id": "/redfish/v1/Systems",
        "@odata.type": "#ComputerSystemCollection.ComputerSystemCollection",
        "Name": "Systems",
        "Members@odata.count": 1,
        "Members": [{ "@odata.id": SYSTEM_PATH }],
    }))
}

async fn system(State(shared): State<Shared>) -> Response {
    shared.system()
}

async fn patch_system(State(shared): State<Shared>, headers: HeaderMap, body: Bytes) -> Response {
    let patch: SystemPatch = match parse(&body) {
        Ok(patch) => patch,
        Err(refusal) => return *refusal,
    };
    {
        let mut state = shared.state();
        let current = state.etag(shared.machine.is_on());
        if headers.get(header::IF_MATCH).is_some_and(|expected| expected.as_bytes() != current.as_bytes()) {
            return error(StatusCode::PRECONDITION_FAILED, "PreconditionFailed", "the resource has changed since");
        }
        state.patch(&patch.boot);
    }
    shared.system()
}

async fn reset(State(shared): State<Shared>, body: Bytes) -> Response {
    let request: ResetRequest = match parse(&body) {
        Ok(request) => request,
        Err(refusal) => return *refusal,
    };
    let done = match request.reset_type {
        ResetType::On => power_on(&shared).await,
        ResetType::ForceOff => {
            shared.machine.power_off().await;
            Ok(())
        }
        ResetType::GracefulShutdown => shared.machine.press_power_button().await,
        // A restart that has an override to honour needs QEMU's arguments changed, hence off and on.
        ResetType::ForceRestart => {
            shared.machine.power_off().await;
            power_on(&shared).await
        }
    };
    match done {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(failure) => {
            tracing::error!(event = "bmc.reset_failed", node = shared.node, error = failure.chain(), "reset failed");
            error(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", &failure.chain())
        }
    }
}

async fn power_on(shared: &Shared) -> Result<()> {
    if shared.machine.is_on() {
        return Ok(());
    }
    let source = shared.state().begin_boot();
    shared.machine.power_on(source).await?;
    // Before the answer: whoever asked takes the time that it then reads as this boot's.
    shared.state().was_reset(SystemClock.now_ms());
    Ok(())
}

/// Records the machine's own resets.
async fn follow(shared: Shared, mut power: mpsc::UnboundedReceiver<PowerEvent>, events: EventLog) {
    while let Some(event) = power.recv().await {
        let name = match event {
            PowerEvent::On => steps::POWERED,
            PowerEvent::Reset => "node.reset",
            PowerEvent::Off => "node.off",
        };
        match event {
            PowerEvent::Reset => shared.state().was_reset(SystemClock.now_ms()),
            PowerEvent::On | PowerEvent::Off => {}
        }
        events.lab(name, &json!({ "node": shared.node }));
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> std::result::Result<T, Box<Response>> {
    serde_json::from_slice(body).map_err(|problem| {
        let detail = format!("the request's body is not acceptable: {problem}");
        Box::new(error(StatusCode::BAD_REQUEST, "MalformedJSON", &detail))
    })
}

/// An error as DSP0266 section 8.6 shapes it.
fn error(status: StatusCode, message: &str, detail: &str) -> Response {
    let body = json!({ "error": { "code": format!("Base.1.16.{message}"), "message": detail } });
    (status, Json(body)).into_response()
}

fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}")))
}

fn rfc3339(ms: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000);
    time.ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}
