//! PID 1 of the ramdisk: what must be there before the boot path can run, and what happens when it ends. There is no
//! shell and no second process; every failure says on the console what failed, why, and what comes next.

pub mod modules;
pub mod mounts;

use crate::backoff::retry;
use crate::console::Chain;
use crate::dhcp::AddressLease;
use crate::dhcp::socket::{DhcpError, acquire};
use crate::handover::{Handover, HandoverError};
use crate::network::{Network, NetworkError, Nic};
use crate::run::{KERNEL_EVENT_LOG, ManagedNic, RunError, measured_settings, to_grant, to_release};
use crate::session::SessionError;
use crate::tee::TeeQuotes;
use crate::tpm::TpmError;
use crate::tpm::esapi::{DEVICE_TCTI, EsapiTpm};
use futures_util::future::select_ok;
use modules::ModuleError;
use mounts::MountError;
use nix::sys::reboot::{RebootMode, reboot};
use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;

/// NIC drivers that are loaded show their NICs within milliseconds; firmware of real ones may take seconds.
const NIC_LIMIT: Duration = Duration::from_secs(20);

/// Spanning tree alone may keep a port silent for 30 s.
const DHCP_LIMIT: Duration = Duration::from_secs(60);

const TPM_LIMIT: Duration = Duration::from_secs(20);

/// Long enough to read the console, short enough not to keep a node.
const FAREWELL: Duration = Duration::from_secs(20);

/// Runs the boot path as PID 1. Ends in the tenant's kernel, in a reboot, or in power off.
pub async fn run() -> Infallible {
    let Err(error) = boot().await;
    let (next, mode) = if error.is_refusal() {
        ("power off: only the operator can clear this node", RebootMode::RB_POWER_OFF)
    } else {
        ("reboot, and try again from the beginning", RebootMode::RB_AUTOBOOT)
    };
    tracing::error!(event = "agent.failed", "{}", Chain(&error));
    tracing::error!(event = "agent.ending", "in {} s: {next}", FAREWELL.as_secs());
    tokio::time::sleep(FAREWELL).await;
    let Err(errno) = reboot(mode);
    tracing::error!(event = "agent.stuck", "the kernel refuses to end this boot: {errno}");
    std::future::pending().await
}

/// Why the boot path ended before the tenant's kernel.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file system of the kernel is missing.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A driver is missing.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// No NIC.
    #[error("looking for a NIC: none with a driver in this image within {} s", NIC_LIMIT.as_secs())]
    NoNic,
    /// A NIC cannot be configured.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// No address.
    #[error(transparent)]
    Dhcp(#[from] DhcpError),
    /// No TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The boot path ended.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The last word was not heard.
    #[error("telling the verifier of the hand-over")]
    LastWord(#[source] SessionError),
    /// The tenant's kernel could not be started.
    #[error(transparent)]
    Handover(#[from] HandoverError),
}

impl BootError {
    fn is_refusal(&self) -> bool {
        matches!(self, Self::Run(error) if error.is_refusal())
    }
}

async fn boot() -> Result<Infallible, BootError> {
    mounts::mount_all()?;
    tracing::info!(event = "agent.started", "assay agent {}", env!("CARGO_PKG_VERSION"));
    modules::load(modules::Group::Early)?;
    prepare_tee();
    let network = Network::open()?;
    let (nic, lease) = address(&network).await?;
    network.set_address(&nic.name, lease.address, lease.router).await?;
    tracing::info!(event = "agent.address", "{} has the address {}", nic.name, lease.address);

    let mut tpm = open_tpm().await?;
    let settings = measured_settings(&lease.settings_url, &mut tpm).await?;
    let released = to_release(&mut tpm, &settings, Path::new(KERNEL_EVENT_LOG), &TeeQuotes::default()).await?;
    let mac = nic.mac;
    let managed = ManagedNic { network, name: nic.name };
    let granted = to_grant(released, &mut tpm, Some(&managed)).await?;

    let node = &settings.settings().node;
    let attestation = granted.attestation(node.clone(), settings.pin(), tpm.saved_ak()?);
    let handover =
        Handover { grant: granted.grant(), address: granted.address(), nic: mac, node, attestation: &attestation };
    let prepared = handover.prepare().await?;
    granted.handover().await.map_err(BootError::LastWord)?;
    let memory = peak_memory_kib();
    tracing::info!(event = "agent.handing_over", memory, "starting the tenant's kernel (I used {memory} KiB at most)");
    let Err(error) = prepared.start();
    Err(error.into())
}

/// Whatever gives quotes of a trust domain. A machine that is none boots as well without.
fn prepare_tee() {
    let prepared = modules::load(modules::Group::Tee).map_err(BootError::from);
    if let Err(error) = prepared.and_then(|()| Ok(mounts::mount_configfs()?)) {
        tracing::warn!(event = "agent.no_tee_interface", "{}", Chain(&error));
    }
}

/// Asks on every NIC at once; the first that is answered is the one that this node boots from.
async fn address(network: &Network) -> Result<(Nic, AddressLease), BootError> {
    let nics = retry(
        "a NIC",
        NIC_LIMIT,
        |error| matches!(error, BootError::NoNic),
        async || Some(Nic::all()?).filter(|nics| !nics.is_empty()).ok_or(BootError::NoNic),
    )
    .await?;
    let mut asking = Vec::new();
    for nic in nics {
        network.up(&nic.name).await?;
        let limit = DHCP_LIMIT.as_secs();
        tracing::info!(event = "agent.asking", "waiting up to {limit} s for DHCP on {} ({})", nic.name, nic.mac);
        asking.push(Box::pin(async move { acquire(&nic, DHCP_LIMIT).await.map(|lease| (nic, lease)) }));
    }
    let (bound, _) = select_ok(asking).await?;
    Ok(bound)
}

async fn open_tpm() -> Result<EsapiTpm, TpmError> {
    retry("the TPM", TPM_LIMIT, |_| true, async || EsapiTpm::open(DEVICE_TCTI)).await
}

/// The most memory that this process ever had resident (`VmHWM` of proc(5)), in KiB; 0 if the kernel does not tell.
#[must_use]
pub fn peak_memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok()).unwrap_or_default()
}
