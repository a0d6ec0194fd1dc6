//! `assay lease` and `assay admission`.

use super::output::{self, Row};
use super::{BoxError, Options, Site};
use assay_wire::id::{ImageId, LeaseId, NetworkId, NodeId, ProjectId};
use assay_wire::imaging::{Disk, DiskRequest};
use assay_wire::isolation::{Admission, Admissions, LeaseRequest, NodeLease, NodeStatus};
use assay_wire::net::MacAddr;
use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum LeaseCommand {
    /// Lease a free node: it boots through the airlock and, if it proves good, gets the network and a clone of the image
    Create(CreateArguments),
    /// List leases
    List(Options),
    /// End a lease: the node is powered off, its port closed, its disk deleted
    End {
        /// The lease
        id: LeaseId,
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum AdmissionCommand {
    /// List the admissions that stand, and those that ended within the last hour
    List(Options),
}

#[derive(Debug, Args)]
pub(crate) struct CreateArguments {
    /// The lessee
    #[arg(long)]
    project: ProjectId,
    /// The node
    #[arg(long)]
    node: NodeId,
    /// The network that it joins
    #[arg(long)]
    network: NetworkId,
    /// The golden image that its disk is a clone of
    #[arg(long)]
    image: ImageId,
    #[command(flatten)]
    options: Options,
}

impl Row for NodeLease {
    const HEAD: &'static [&'static str] = &["LEASE", "PROJECT", "NODE", "NETWORK"];
    fn cells(&self) -> Vec<String> {
        vec![self.id.to_string(), self.project.to_string(), self.node.to_string(), self.network.to_string()]
    }
}

impl Row for Admission {
    const HEAD: &'static [&'static str] = &["ADMISSION", "NODE", "UNTIL", "ENDED"];
    fn cells(&self) -> Vec<String> {
        let ended = self.revoked.clone().unwrap_or_else(|| "-".to_owned());
        vec![self.id.to_string(), self.node.to_string(), output::time(self.expires_at_ms), ended]
    }
}

pub(crate) async fn run_lease(command: LeaseCommand) -> Result<(), BoxError> {
    match command {
        LeaseCommand::Create(arguments) => create(arguments).await,
        LeaseCommand::List(options) => {
            let leases: Vec<NodeLease> = Site::open(&options)?.isolation.get("/v1/leases").await?;
            output::list(options.output, &leases)
        }
        LeaseCommand::End { id, options } => {
            let site = Site::open(&options)?;
            // The port first: a node without its disk is harmless, a disk without its fence is not.
            let _ended: serde_json::Value = site.isolation.delete(&format!("/v1/leases/{id}"), &()).await?;
            let _deleted: serde_json::Value = site.imaging.delete(&format!("/v1/disks/{id}"), &()).await?;
            output::done(options.output, &format!("lease {id} ended"), &id)
        }
    }
}

pub(crate) async fn run_admission(AdmissionCommand::List(options): AdmissionCommand) -> Result<(), BoxError> {
    let listed: Admissions = Site::open(&options)?.isolation.get("/v1/admissions").await?;
    output::list(options.output, &listed.admissions)
}

async fn create(arguments: CreateArguments) -> Result<(), BoxError> {
    let CreateArguments { project, node, network, image, options } = arguments;
    let site = Site::open(&options)?;
    let id = LeaseId::random();
    // The disk first: the node may be admitted within a minute of its lease.
    let disk = DiskRequest { project: project.clone(), node: node.clone(), image, mac: first_mac(&site, &node).await? };
    let _disk: Disk = site.imaging.put(&format!("/v1/disks/{id}"), &disk).await?;
    let request = LeaseRequest { id, project, node, network };
    match site.isolation.post::<_, NodeLease>("/v1/leases", &request).await {
        Ok(lease) => {
            let next =
                format!("lease {id}: node {} goes into the airlock; watch it with `assay node show {0}`", lease.node);
            output::done(options.output, &next, &lease)
        }
        Err(refused) => {
            let _undone: serde_json::Value = site.imaging.delete(&format!("/v1/disks/{id}"), &()).await?;
            Err(refused.into())
        }
    }
}

/// The NIC that the node boots from, and will ask for its address with. None for a node that the caller cannot see:
/// isolation will say so when it is asked for the lease.
async fn first_mac(site: &Site, node: &NodeId) -> Result<Option<MacAddr>, BoxError> {
    match site.isolation.get::<NodeStatus>(&format!("/v1/nodes/{node}")).await {
        Ok(status) => Ok(status.nics.first().map(|status| status.nic.mac)),
        Err(refused) if refused.problem().is_some_and(|problem| problem.status == 404) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
