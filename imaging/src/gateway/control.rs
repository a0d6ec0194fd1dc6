//! The control socket: imaging's orders, over HTTP on a Unix socket that only this user (and root) may use.

use super::exports::{Exports, OrderError};
use super::order::{ExportOrder, GatewayStatus};
use super::supervised::PauseError;
use assay_service::error::{ApiError, chain};
use assay_service::{CancellationToken, owner_socket};
use assay_wire::id::AdmissionId;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use std::collections::BTreeMap;
use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};

const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Binds the control socket, in place of one that a killed predecessor left.
pub(super) fn bind(path: &FilePath) -> io::Result<UnixListener> {
    owner_socket::replace(path, |path| UnixListener::bind(path))
}

/// Takes orders until `shutdown`.
pub(super) async fn serve(
    listener: UnixListener,
    exports: Arc<Exports>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let router = Router::new()
        .route("/v1/exports", get(list))
        .route("/v1/exports/{admission}", put(put_up).delete(take_down))
        .route("/v1/exports/{admission}/pause", post(pause))
        .route("/v1/exports/{admission}/resume", post(resume))
        .route("/v1/renewals", post(renew))
        .with_state(exports);
    let own_uid = rustix::process::geteuid().as_raw();
    axum::serve(OwnerOnly { listener, own_uid }, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

async fn list(State(exports): State<Arc<Exports>>) -> Json<GatewayStatus> {
    Json(exports.status().await)
}

async fn put_up(
    State(exports): State<Arc<Exports>>,
    Path(admission): Path<AdmissionId>,
    Json(order): Json<ExportOrder>,
) -> Result<StatusCode, ApiError> {
    exports.put_up(admission, order).await.map_err(failed)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn pause(
    State(exports): State<Arc<Exports>>,
    Path(admission): Path<AdmissionId>,
) -> Result<StatusCode, ApiError> {
    exports.pause(admission).await.map_err(failed)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn resume(
    State(exports): State<Arc<Exports>>,
    Path(admission): Path<AdmissionId>,
) -> Result<StatusCode, ApiError> {
    exports.resume(admission).await.map_err(failed)?;
    Ok(StatusCode::NO_CONTENT)
}

fn failed(error: OrderError) -> ApiError {
    match &error {
        OrderError::Differs { .. } | OrderError::Taken { .. } => ApiError::conflict("order-conflicts", error),
        OrderError::Expired { .. } => ApiError::conflict("expired", error),
        OrderError::Worker { .. } => ApiError::unavailable("worker", chain(&error)),
        OrderError::Open { .. } => ApiError::unavailable("disk", chain(&error)),
        OrderError::NotServed { .. } => ApiError::not_found(error),
        // Nobody has its disk open then: that is what was wanted.
        OrderError::NotPaused { source: PauseError::NoWorker, .. } => ApiError::not_found(chain(&error)),
        OrderError::NotPaused { .. } => ApiError::unavailable("not-paused", chain(&error)),
    }
}

async fn renew(State(exports): State<Arc<Exports>>, Json(until_ms): Json<BTreeMap<AdmissionId, i64>>) -> StatusCode {
    exports.renew(&until_ms);
    StatusCode::NO_CONTENT
}

async fn take_down(State(exports): State<Arc<Exports>>, Path(admission): Path<AdmissionId>) -> StatusCode {
    exports.take_down(admission).await;
    StatusCode::NO_CONTENT
}

/// Accepts this user's and root's connections only.
struct OwnerOnly {
    listener: UnixListener,
    own_uid: u32,
}

impl axum::serve::Listener for OwnerOnly {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    if owner_socket::is_owners(&stream, self.own_uid, "control.refused") {
                        return (stream, address);
                    }
                }
                Err(error) => {
                    tracing::warn!(event = "control.accept_failed", %error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}
