//! `assay-agent`: PID 1 of the ramdisk; with `attest`, what goes on attesting in the tenant's system; with `enrol`, the
//! ramdisk's conversation with a verifier from an ordinary process, for soft nodes in tests.

use assay_ramdisk_agent::attestation::state::AttestationState;
use assay_ramdisk_agent::attestation::{self, AttestationError, Attester, Places};
use assay_ramdisk_agent::console::{self, Chain};
use assay_ramdisk_agent::dhcp::socket::{DhcpError, acquire};
use assay_ramdisk_agent::init;
use assay_ramdisk_agent::network::{Network, NetworkError, Nic};
use assay_ramdisk_agent::run::{ManagedNic, RunError, measured_settings, to_grant, to_release};
use assay_ramdisk_agent::session::SessionError;
use assay_ramdisk_agent::tee::TeeQuotes;
use assay_ramdisk_agent::tpm::TpmError;
use assay_ramdisk_agent::tpm::esapi::{DEVICE_TCTI, EsapiTpm};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use url::Url;

const DHCP_LIMIT: Duration = Duration::from_secs(30);

/// The exit status when the verifier says that this is over; the unit file names it.
const OVER: u8 = 3;

/// The Assay agent. As PID 1 of the ramdisk it needs no arguments; in a tenant's system, systemd starts `attest`.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Goes on attesting this node after the release, with the key and for the admission that the ramdisk handed over.
    ///
    /// Sends evidence as often as the verifier asks. Writes a notice for each of the project's nodes that is revoked to
    /// /run/assay/revoked/NODE.json and starts the programs of /etc/assay/revocation.d with that file's name, so that
    /// they drop the keys shared with it. Puts the tenant's secret, if there is one, into /run/assay/secret. Exits with
    /// 0 when it is told to stop, 3 when the verifier has revoked this node or does not attest it (asking again would change nothing), 1 when
    /// it cannot go on and may be started again.
    Attest(AttestArgs),
    /// Takes this machine through the ramdisk's part of the boot, printing progress as JSON lines; boots nothing.
    Enrol(EnrolArgs),
}

#[derive(Debug, Args)]
struct AttestArgs {
    /// What the ramdisk handed over.
    #[arg(long, default_value = "/run/assay/attestation.json")]
    state: PathBuf,
    /// How to reach the TPM.
    #[arg(long, env = "ASSAY_AGENT_TCTI", default_value = DEVICE_TCTI)]
    tpm: String,
    /// Folder for the notices and the secret; must be in memory, and root's alone.
    #[arg(long, default_value = attestation::RUN)]
    run_dir: PathBuf,
}

#[derive(Debug, Args)]
struct EnrolArgs {
    /// How to reach the TPM, like `swtpm:host=127.0.0.1,port=2321` or `device:/dev/tpmrm0`.
    #[arg(long, env = "ASSAY_AGENT_TCTI")]
    tcti: String,
    /// The firmware's event log.
    #[arg(long, default_value = assay_ramdisk_agent::run::KERNEL_EVENT_LOG)]
    event_log: PathBuf,
    /// Where the settings are. Without it, DHCP on the interface tells.
    #[arg(long, required_unless_present = "interface")]
    settings_url: Option<Url>,
    /// The NIC on the airlock network.
    #[arg(long)]
    interface: Option<String>,
    /// Whether to change the interface's addresses: by DHCP where there is no settings URL, and after the release.
    #[arg(long, value_enum, default_value_t = YesNo::No, requires_if("yes", "interface"))]
    configure_network: YesNo,
    /// How far to go.
    #[arg(long, value_enum, default_value_t = Until::Released)]
    until: Until,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum YesNo {
    Yes,
    No,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Until {
    /// The verifier said that the node may move.
    Released,
    /// The TPM opened the grant.
    Granted,
    /// The verifier was told of the hand-over, though no kernel is started.
    Handover,
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        console::init();
        // Never comes back.
        return match block_on(init::run()) {
            Ok(never) => match never {},
            Err(code) => code,
        };
    }
    match Cli::parse().command {
        CliCommand::Attest(args) => {
            console::init();
            ended(block_on(attest(args)))
        }
        CliCommand::Enrol(args) => {
            console::init_json();
            ended(block_on(async { enrol(args).await.map(|()| ExitCode::SUCCESS) }))
        }
    }
}

fn ended<E: std::error::Error>(result: Result<Result<ExitCode, E>, ExitCode>) -> ExitCode {
    match result {
        Ok(Ok(code)) | Err(code) => code,
        Ok(Err(error)) => {
            tracing::error!(event = "agent.failed", "{}", Chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// One thread is enough for one conversation, and for 64 MiB.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T, ExitCode> {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => Ok(runtime.block_on(future)),
        Err(error) => {
            tracing::error!(event = "agent.failed", "starting the runtime: {error}");
            Err(ExitCode::FAILURE)
        }
    }
}

/// Attests until the verifier revokes this node, or until it is told to stop.
async fn attest(args: AttestArgs) -> Result<ExitCode, AttestationError> {
    let state = AttestationState::read(&args.state)?;
    let tpm = EsapiTpm::open(&args.tpm)?;
    let places = Places { run: args.run_dir, ..Places::default() };
    let attester = Attester::new(state, tpm, places)?;
    tokio::select! {
        // Revoked, or not attested at all: started again, it would hear the same.
        ended = attester.run() => ended.map(|_| ExitCode::from(OVER)),
        () = told_to_stop() => {
            tracing::info!(event = "agent.stopped", "told to stop: without renewal, the admission ends");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Waits for SIGTERM or SIGINT.
async fn told_to_stop() {
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        }
        // The signals then end the process by themselves.
        _ => std::future::pending().await,
    }
}

#[derive(Debug, thiserror::Error)]
enum EnrolError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Tpm(#[from] TpmError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Dhcp(#[from] DhcpError),
    #[error(transparent)]
    Session(#[from] SessionError),
}

async fn enrol(args: EnrolArgs) -> Result<(), EnrolError> {
    let network = Network::open()?;
    let nic = args.interface.as_deref().map(Nic::find).transpose()?;
    let configure = args.configure_network == YesNo::Yes;
    let settings_url = match (args.settings_url, &nic) {
        (Some(url), _) => url,
        (None, Some(nic)) => {
            let lease = acquire(nic, DHCP_LIMIT).await?;
            if configure {
                network.set_address(&nic.name, lease.address, lease.router).await?;
            }
            lease.settings_url
        }
        // clap requires one of them.
        (None, None) => return Ok(()),
    };
    let mut tpm = EsapiTpm::open(&args.tcti)?;
    let settings = measured_settings(&settings_url, &mut tpm).await?;
    let released = to_release(&mut tpm, &settings, &args.event_log, &TeeQuotes::default()).await?;
    if args.until == Until::Released {
        return Ok(());
    }
    let managed = nic.filter(|_| configure).map(|nic| ManagedNic { network, name: nic.name });
    let granted = to_grant(released, &mut tpm, managed.as_ref()).await?;
    if args.until == Until::Handover {
        granted.handover().await?;
        tracing::info!(event = "agent.handed_over", "told the verifier of a hand-over; starting nothing");
    }
    Ok(())
}
