//! A Redfish BMC over real TLS, whose node is imaginary: it remembers what it was told and can be made to misbehave.

use assay_service::error::ApiError;
use assay_service::http::{self, Listener, ServiceContext};
use assay_wire::isolation::Bmc;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

/// What the BMC remembers.
#[derive(Debug, Default, Clone)]
pub(crate) struct BmcState {
    pub(crate) on: bool,
    pub(crate) resets: u32,
    pub(crate) boot_once: bool,
    /// Everything that was asked for, in order.
    pub(crate) asked: Vec<String>,
    /// Answers 500 to everything.
    pub(crate) broken: bool,
    /// Shows "Continuous" when told "Once", as sushy-tools does.
    pub(crate) forgets_once: bool,
    /// Has no LastResetTime.
    pub(crate) silent_about_resets: bool,
    /// Does not answer.
    pub(crate) hangs: bool,
    /// How often the system was read.
    pub(crate) reads: u32,
}

#[derive(Clone)]
pub(crate) struct TestBmc {
    pub(crate) state: Arc<Mutex<BmcState>>,
    pub(crate) record: Bmc,
}

impl TestBmc {
    pub(crate) async fn start(context: &ServiceContext) -> Self {
        let tcp = http::bind("127.0.0.1:0".parse().expect("an address")).await.expect("a port");
        let address = tcp.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(BmcState { on: true, ..BmcState::default() }));
        let router = Router::new()
            .route("/redfish/v1/Systems/1", get(system).patch(patch))
            .route("/redfish/v1/Systems/1/Actions/ComputerSystem.Reset", post(reset))
            .with_state(Arc::clone(&state));
        let served = context.clone();
        tokio::spawn(async move { http::serve(Listener::Tls(tcp), router, &served).await });
        let record = Bmc::Redfish {
            system: format!("https://{address}/redfish/v1/Systems/1"),
            username: "root".into(),
            password: "calvin".into(),
            ca_pem: Some(context.identity.ca_pem().to_owned()),
        };
        Self { state, record }
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut BmcState)) {
        change(&mut self.state.lock().expect("no panic holds it"));
    }

    pub(crate) fn read(&self) -> BmcState {
        self.state.lock().expect("no panic holds it").clone()
    }
}

type Shared = State<Arc<Mutex<BmcState>>>;

fn allowed(headers: &HeaderMap, state: &BmcState) -> Result<(), ApiError> {
    let expected = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode("root:calvin"));
    if headers.get("authorization").and_then(|v| v.to_str().ok()) != Some(&expected) {
        return Err(ApiError::unauthorized("who are you?"));
    }
    if state.broken {
        return Err(ApiError::unavailable("broken", "this BMC is out of order"));
    }
    Ok(())
}

async fn system(
    State(state): Shared,
    headers: HeaderMap,
) -> Result<([(&'static str, &'static str); 1], Json<Value>), ApiError> {
    if state.lock().expect("no panic holds it").hangs {
        std::future::pending::<()>().await;
    }
    let mut state = state.lock().expect("no panic holds it");
    allowed(&headers, &state)?;
    state.reads += 1;
    let enabled = match (state.boot_once, state.forgets_once) {
        (true, true) => "Continuous",
        (true, false) => "Once",
        (false, _) => "Disabled",
    };
    let mut body = json!({
        "PowerState": if state.on { "On" } else { "Off" },
        "LastResetTime": format!("2026-01-01T00:00:00.{:06}Z", state.resets),
        "Boot": {"BootSourceOverrideTarget": if state.boot_once { "Pxe" } else { "None" },
            "BootSourceOverrideEnabled": enabled, "BootSourceOverrideMode": "UEFI"},
        "Actions": {"#ComputerSystem.Reset": {"target": "/redfish/v1/Systems/1/Actions/ComputerSystem.Reset"}},
    });
    if state.silent_about_resets {
        body["LastResetTime"].take();
    }
    Ok(([("etag", "\"7\"")], Json(body)))
}

async fn patch(State(state): Shared, headers: HeaderMap, Json(body): Json<Value>) -> Result<StatusCode, ApiError> {
    let mut state = state.lock().expect("no panic holds it");
    allowed(&headers, &state)?;
    if headers.get("if-match").and_then(|v| v.to_str().ok()) != Some("\"7\"") {
        return Err(ApiError::conflict("precondition", "If-Match is not my ETag"));
    }
    state.boot_once = body["Boot"]["BootSourceOverrideTarget"] == "Pxe";
    state.asked.push("pxe".into());
    Ok(StatusCode::NO_CONTENT)
}

async fn reset(State(state): Shared, headers: HeaderMap, Json(body): Json<Value>) -> Result<StatusCode, ApiError> {
    let mut state = state.lock().expect("no panic holds it");
    allowed(&headers, &state)?;
    let action = body["ResetType"].as_str().unwrap_or_default().to_owned();
    match action.as_str() {
        "On" | "ForceRestart" => {
            state.on = true;
            state.resets += 1;
            state.boot_once = false;
        }
        "ForceOff" => state.on = false,
        _ => return Err(ApiError::bad_request("reset", "no such reset")),
    }
    state.asked.push(action);
    Ok(StatusCode::NO_CONTENT)
}
