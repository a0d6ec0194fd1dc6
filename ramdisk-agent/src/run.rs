//! The agent's part of the boot path in order, from measured settings to the grant. PID 1 of the ramdisk and the
//! soft nodes of tests run the same code; they differ in what stands before and after it ([`crate::init`]).

use crate::backoff::retry;
use crate::fetch::{FetchError, settings_document};
use crate::network::{Network, NetworkError};
use crate::session::{Granted, Released, STEP_LIMIT, SessionError, attest};
use crate::settings::{MeasuredSettings, SettingsError};
use crate::tee::TeeQuotes;
use crate::tpm::{Tpm, TpmError};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use url::Url;

/// Where the kernel shows the firmware's event log.
pub const KERNEL_EVENT_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";

/// Real logs have 20 to 100 KiB; no verifier of ours reads more than this.
const MAX_EVENT_LOG_BYTES: u64 = 512 * 1024;

/// A NIC that the agent may configure.
pub struct ManagedNic {
    /// The way to the kernel.
    pub network: Network,
    /// The NIC's name.
    pub name: String,
}

/// Fetches the settings at `url` and measures them.
///
/// # Errors
/// If they cannot be had, measured or used.
pub async fn measured_settings(url: &Url, tpm: &mut dyn Tpm) -> Result<MeasuredSettings, RunError> {
    let document =
        retry("the agent's settings", STEP_LIMIT, FetchError::is_transient, async || settings_document(url).await)
            .await?;
    let settings = MeasuredSettings::measure(&document, tpm)?;
    tracing::info!(
        event = "agent.settings_measured",
        node = %settings.settings().node,
        "this is {}; its verifier is {} with key {}",
        settings.settings().node,
        settings.verifier(),
        settings.pin()
    );
    Ok(settings)
}

/// Attests, and waits until the node may move.
///
/// # Errors
/// If the verifier rejects this boot, or anything is in the way for too long.
pub async fn to_release(
    tpm: &mut dyn Tpm,
    settings: &MeasuredSettings,
    event_log: &Path,
    tee: &TeeQuotes,
) -> Result<Released, RunError> {
    log_pcrs(tpm)?;
    let event_log = read_event_log(event_log)?;
    let released = attest(tpm, settings, event_log, tee).await?.await_release().await?;
    let address = released.address();
    tracing::info!(
        event = "agent.released",
        "released: my next address is {}, the relay {}",
        address.address,
        address.relay
    );
    Ok(released)
}

/// Lets the port move, takes the tenant address and fetches the grant.
///
/// # Errors
/// If the NIC cannot be configured, or there is no grant behind the relay.
pub async fn to_grant(released: Released, tpm: &mut dyn Tpm, nic: Option<&ManagedNic>) -> Result<Granted, RunError> {
    let moved = released.ready().await?;
    let address = moved.address().clone();
    if let Some(nic) = nic {
        nic.network.set_address(&nic.name, address.address, address.router).await?;
    }
    let limit = STEP_LIMIT.as_secs();
    tracing::info!(
        event = "agent.moving",
        "waiting up to {limit} s for the port to move, to fetch the grant through {}",
        address.relay
    );
    let granted = moved.fetch_grant(tpm).await?;
    tracing::info!(
        event = "agent.granted",
        "the TPM opened the grant: disk {} at {}",
        granted.grant().target,
        granted.grant().portal
    );
    Ok(granted)
}

/// Reads a firmware event log whole.
///
/// # Errors
/// If it cannot be read, or is longer than any real one.
pub fn read_event_log(path: &Path) -> Result<Vec<u8>, RunError> {
    let failed = |source| RunError::EventLog { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let mut log = Vec::new();
    file.take(MAX_EVENT_LOG_BYTES + 1).read_to_end(&mut log).map_err(failed)?;
    if log.len() as u64 > MAX_EVENT_LOG_BYTES {
        return Err(failed(io::Error::other(format!("it has more than {MAX_EVENT_LOG_BYTES} octets"))));
    }
    Ok(log)
}

/// Why the boot path ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No settings.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// No usable settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The conversation with the verifier ended.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The NIC could not be configured.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The TPM failed.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// No event log.
    #[error("reading the firmware's event log {}", path.display())]
    EventLog {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl RunError {
    /// Whether the verifier said no, so that trying again with the same boot is useless.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Session(SessionError::Rejected { .. } | SessionError::Aborted { .. }))
    }
}

/// The PCRs that tell which image booted, for whoever compares them with Reference Values by eye.
fn log_pcrs(tpm: &mut dyn Tpm) -> Result<(), TpmError> {
    const SHOWN: [u8; 4] = [4, 11, 12, 14];
    for (pcr, value) in SHOWN.into_iter().zip(tpm.pcr_read(&SHOWN)?) {
        let value = hex::encode(value);
        tracing::info!(event = "agent.pcr", pcr, value, "PCR {pcr:>2} = {value}");
    }
    Ok(())
}
