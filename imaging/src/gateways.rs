//! Imaging's side of the control sockets: orders to gateways, each bounded in time.

use crate::gateway::order::{ExportOrder, GatewayStatus};
use crate::store::Upper;
use assay_service::client::{ClientError, NewClientError, ServiceClient};
use assay_wire::id::AdmissionId;
use assay_wire::imaging::Gateway;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A gateway is on this machine and answers in milliseconds; one that does not is not waited for.
const ORDER_TIMEOUT: Duration = Duration::from_secs(5);
/// Unless it must ask Ceph first, after each object of a disk.
const CEPH_ORDER_TIMEOUT: Duration = Duration::from_secs(25);

/// Why a gateway did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GatewayError {
    /// No client for it can be made.
    #[error("reaching the gateway at {socket}")]
    Client {
        /// Its control socket.
        socket: String,
        /// Why.
        source: Box<NewClientError>,
    },
    /// It did not answer, or refused.
    #[error("ordering from the gateway at {socket}")]
    Call {
        /// Its control socket.
        socket: String,
        /// Why.
        source: Box<ClientError>,
    },
    /// It did not answer in time.
    #[error("the gateway at {socket} did not answer within {} s", patience.as_secs())]
    TimedOut {
        /// Its control socket.
        socket: String,
        /// How long it was waited for.
        patience: Duration,
    },
}

impl GatewayError {
    /// What kind of problem it said it had, if it answered.
    pub(crate) fn kind(&self) -> Option<&str> {
        match self {
            Self::Call { source, .. } => source.problem().map(|problem| problem.kind.as_str()),
            Self::Client { .. } | Self::TimedOut { .. } => None,
        }
    }
}

/// Clients of the gateways, by control socket.
#[derive(Debug, Default)]
pub(crate) struct Gateways {
    clients: Mutex<HashMap<String, ServiceClient>>,
}

impl Gateways {
    /// Has `gateway` serve an export. Idempotent.
    pub(crate) async fn put_up(
        &self,
        gateway: &Gateway,
        admission: AdmissionId,
        order: &ExportOrder,
    ) -> Result<(), GatewayError> {
        let (client, path) = (self.client(gateway)?, format!("v1/exports/{admission}"));
        let patience = match order.location.upper {
            Upper::Files => ORDER_TIMEOUT,
            Upper::Rbd(_) => CEPH_ORDER_TIMEOUT,
        };
        bounded(gateway, patience, client.put(&path, order)).await
    }

    /// Has `gateway` sever an export's sessions and forget it. Idempotent.
    pub(crate) async fn take_down(&self, gateway: &Gateway, admission: AdmissionId) -> Result<(), GatewayError> {
        let (client, path) = (self.client(gateway)?, format!("v1/exports/{admission}"));
        bounded(gateway, ORDER_TIMEOUT, client.delete(&path, &())).await
    }

    /// Has `gateway` serve exports until later than it was told. What it does not serve is not put up by this.
    pub(crate) async fn renew(
        &self,
        gateway: &Gateway,
        until_ms: &BTreeMap<AdmissionId, i64>,
    ) -> Result<(), GatewayError> {
        bounded(gateway, ORDER_TIMEOUT, self.client(gateway)?.post("v1/renewals", until_ms)).await
    }

    /// Has `gateway` give up an export's disk for a moment: its initiator's commands wait. `false` if nobody has the disk
    /// open there.
    pub(crate) async fn pause(&self, gateway: &Gateway, admission: AdmissionId) -> Result<bool, GatewayError> {
        let (client, path) = (self.client(gateway)?, format!("v1/exports/{admission}/pause"));
        match bounded(gateway, ORDER_TIMEOUT, client.post::<_, ()>(&path, &())).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == Some("not-found") => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Has `gateway` go on with an export. Idempotent.
    pub(crate) async fn resume(&self, gateway: &Gateway, admission: AdmissionId) -> Result<(), GatewayError> {
        let (client, path) = (self.client(gateway)?, format!("v1/exports/{admission}/resume"));
        bounded(gateway, ORDER_TIMEOUT, client.post(&path, &())).await
    }

    /// What `gateway` serves.
    pub(crate) async fn status(&self, gateway: &Gateway) -> Result<GatewayStatus, GatewayError> {
        bounded(gateway, ORDER_TIMEOUT, self.client(gateway)?.get("v1/exports")).await
    }

    fn client(&self, gateway: &Gateway) -> Result<ServiceClient, GatewayError> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&gateway.control_socket) {
            return Ok(client.clone());
        }
        let socket = gateway.control_socket.clone();
        let client = ServiceClient::over_unix(Path::new(&socket))
            .map_err(|source| GatewayError::Client { socket: socket.clone(), source: Box::new(source) })?;
        clients.insert(socket, client.clone());
        Ok(client)
    }
}

async fn bounded<T>(
    gateway: &Gateway,
    patience: Duration,
    call: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, GatewayError> {
    let socket = || gateway.control_socket.clone();
    match tokio::time::timeout(patience, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(GatewayError::Call { socket: socket(), source: Box::new(source) }),
        Err(_elapsed) => Err(GatewayError::TimedOut { socket: socket(), patience }),
    }
}
