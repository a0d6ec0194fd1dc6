//! DHCP for a network where every client is known: a project's provisioning network, behind its gateway.

use super::client::ClientKind;
use super::engine::{Admitted, Answer, Authority, Engine};
use super::lease::Scope;
use super::reply::BootOptions;
use super::server::{DhcpError, DhcpServer, Observer};
use crate::boot_plan::NotServed;
use assay_service::clock::SystemClock;
use assay_wire::net::MacAddr;
use ipnet::Ipv4Net;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Where addresses are handed out by reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservedNetwork {
    /// The network interface.
    pub interface: String,
    /// This host's address on it.
    pub server: Ipv4Addr,
    /// The network.
    pub network: Ipv4Net,
    /// Default router, where there is one.
    pub router: Option<Ipv4Addr>,
}

/// Serves addresses, and nothing to boot, to the NICs in `reservations`, as they are at that moment, until `shutdown`.
/// Other machines get no answer. Nothing is kept: reservations are the record.
///
/// # Errors
/// A socket cannot be had, or broke.
pub async fn serve_reservations(
    network: ReservedNetwork,
    reservations: watch::Receiver<Vec<(MacAddr, Ipv4Addr)>>,
    shutdown: CancellationToken,
) -> Result<(), DhcpError> {
    let ReservedNetwork { interface, server, network, router } = network;
    let scope = Scope { network, server, router, pool: None, lease_duration: LEASE_DURATION };
    let engine = Arc::new(Mutex::new(Engine::new(scope, Vec::new())));
    let dhcp = DhcpServer::bind(&interface, server, engine, None)?;
    dhcp.serve(Arc::new(Reservations { network, reservations }), Arc::new(Nobody), Arc::new(SystemClock), shutdown)
        .await
}

struct Reservations {
    network: Ipv4Net,
    reservations: watch::Receiver<Vec<(MacAddr, Ipv4Addr)>>,
}

impl Authority for Reservations {
    fn admit(&self, mac: MacAddr, _client: ClientKind) -> Result<Admitted, NotServed> {
        let reservations = self.reservations.borrow();
        match reservations.iter().find(|(reserved, _)| *reserved == mac) {
            Some((_, address)) if self.network.contains(address) => Ok(Admitted { reserved: Some(*address) }),
            Some((_, address)) => Err(NotServed::OutsideNetwork(*address)),
            None => Err(NotServed::UnknownMac),
        }
    }

    fn boot(&self, _now_ms: i64, _mac: MacAddr, _client: ClientKind, _address: Ipv4Addr) -> BootOptions {
        BootOptions::None
    }
}

struct Nobody;

impl Observer for Nobody {
    fn answered(&self, _answer: &Answer, _elapsed: Duration) {}
}

/// Short, so that a reservation that is gone is soon an address that is gone.
const LEASE_DURATION: Duration = Duration::from_secs(600);
