//! A project's gateway: imaging's portal and relay, and netboot's DHCP for the nodes whose exports stand. The two crates
//! know nothing of each other; they meet here.

use super::stop_on_signal;
use crate::client::BoxError;
use assay_imaging::gateway::Limits;
use assay_imaging::{Gateway, GatewayConfig, RelayConfig};
use assay_netboot::dhcp::reservations::{ReservedNetwork, serve_reservations};
use assay_service::CancellationToken;
use assay_service::clock::SystemClock;
use assay_service::config::ConfigError;
use assay_service::telemetry::{self, LogFormat};
use clap::Args;
use ipnet::Ipv4Net;
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

/// Beyond what distributions and systemd's containers hand out.
const WORKER_USERS: u32 = 0x7001_0000;

#[derive(Debug, Args)]
pub(crate) struct GatewayArguments {
    /// The gateway's file
    #[arg(long)]
    config: PathBuf,
}

/// A gateway's file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GatewayFile {
    /// Unix socket on which imaging gives orders.
    control_socket: PathBuf,
    /// Imaging's store, as this process sees it.
    store: PathBuf,
    /// Unix socket of imaging's (`[ceph] rbd_disks_socket` there) or of systemd's (`ListenSequentialPacket`, `Accept=yes`), which
    /// starts `assay-rbd-disk` for each connection. It is needed where disks are on Ceph; this process itself reaches no Ceph.
    rbd_disks_socket: Option<PathBuf>,
    /// Address and port of the iSCSI portal.
    portal: SocketAddr,
    /// Address and port of the relay to the verifier.
    relay: SocketAddr,
    /// Unix socket of the verifier's agent API.
    verifier_socket: PathBuf,
    /// Program of the exports' processes; `assay-export` beside this one if none is given.
    worker: Option<PathBuf>,
    /// The first of 65,536 users for the exports' processes. Each gateway of a machine should have its own.
    worker_users: Option<u32>,
    /// Address service; without it nodes have what the agent configured, until their operating system asks.
    dhcp: Option<DhcpTable>,
}

/// Where nodes get their addresses. Ports 67 and 4011: an unprivileged gateway needs `CAP_NET_BIND_SERVICE`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DhcpTable {
    /// The interface on the provisioning network.
    interface: String,
    /// That network: the subnet that imaging has on record for this gateway, like `10.20.0.0/24`.
    network: Ipv4Net,
    /// Default router for nodes, if there is one.
    router: Option<Ipv4Addr>,
}

impl DhcpTable {
    /// The network, served from the portal's address.
    fn served_from(self, portal: SocketAddr) -> Result<ReservedNetwork, ConfigError> {
        let Self { interface, network, router } = self;
        let server = match portal.ip() {
            IpAddr::V4(server) if network.contains(&server) => server,
            other => {
                let problem = format!("the portal's address {other} is not in {network}, and is DHCP's too");
                return Err(ConfigError::invalid("dhcp.network", problem));
            }
        };
        if let Some(router) = router.filter(|router| !network.contains(router)) {
            return Err(ConfigError::invalid("dhcp.router", format!("{router} is not in {network}")));
        }
        Ok(ReservedNetwork { interface, server, network: network.trunc(), router })
    }
}

/// Runs a project's gateway.
pub(crate) async fn run_gateway(arguments: GatewayArguments) -> Result<(), BoxError> {
    telemetry::init(LogFormat::Json);
    let file: GatewayFile = assay_service::config::read(&arguments.config)?;
    let dhcp = file.dhcp.map(|table| table.served_from(file.portal)).transpose()?;
    let config = GatewayConfig {
        control_socket: file.control_socket,
        store: file.store,
        rbd_disks_socket: file.rbd_disks_socket,
        portal: file.portal,
        relay: Some(RelayConfig { listen: file.relay, verifier_socket: file.verifier_socket }),
        worker: file.worker,
        worker_users: Some(file.worker_users.unwrap_or(WORKER_USERS)),
        limits: Limits::default(),
        clock: Arc::new(SystemClock),
    };
    let shutdown = stop_on_signal()?;
    let gateway = Gateway::bind(config).await?;
    let addresses = dhcp.map(|network| serve_reservations(network, gateway.reservations(), shutdown.clone()));
    let addresses = async {
        match addresses {
            Some(serving) => serving.await,
            None => Ok(()),
        }
    };
    // Whichever fails takes the other down: a supervisor restarts the whole, and imaging gives its orders again.
    let (served, addressed) =
        tokio::join!(or_stop(gateway.serve(shutdown.clone()), &shutdown), or_stop(addresses, &shutdown));
    served?;
    Ok(addressed?)
}

/// `serving`, and the end of everything else if it fails.
async fn or_stop<E>(serving: impl Future<Output = Result<(), E>>, shutdown: &CancellationToken) -> Result<(), E> {
    serving.await.inspect_err(|_| shutdown.cancel())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dhcp(network: &str, router: Option<&str>, portal: &str) -> Result<ReservedNetwork, ConfigError> {
        let router = router.map(|router| router.parse().unwrap());
        let table = DhcpTable { interface: "gw0".to_owned(), network: network.parse().unwrap(), router };
        table.served_from(portal.parse().unwrap())
    }

    #[test]
    fn dhcp_serves_from_the_portals_address() {
        let served = dhcp("10.20.0.1/24", Some("10.20.0.254"), "10.20.0.1:3260").unwrap();
        assert_eq!(served.server, Ipv4Addr::new(10, 20, 0, 1));
        assert_eq!(served.network.to_string(), "10.20.0.0/24");
        assert_eq!(served.router, Some(Ipv4Addr::new(10, 20, 0, 254)));
    }

    #[test]
    fn dhcp_elsewhere_than_the_portal_is_refused() {
        for portal in ["10.21.0.1:3260", "[::1]:3260", "0.0.0.0:3260"] {
            let refused = dhcp("10.20.0.0/24", None, portal).unwrap_err().to_string();
            assert!(refused.contains("dhcp.network") && refused.contains("10.20.0.0/24"), "{refused}");
        }
        let refused = dhcp("10.20.0.0/24", Some("10.21.0.1"), "10.20.0.1:3260").unwrap_err().to_string();
        assert!(refused.contains("dhcp.router"), "{refused}");
    }
}
