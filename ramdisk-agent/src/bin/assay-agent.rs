//! `assay-agent`: PID 1 of the ramdisk; or, with `attest`, the same conversation with a verifier from an ordinary
//! process, for soft nodes in tests.

use assay_ramdisk_agent::console::{self, Chain};
use assay_ramdisk_agent::dhcp::socket::{DhcpError, acquire};
use assay_ramdisk_agent::init;
use assay_ramdisk_agent::network::{Network, NetworkError, Nic};
use assay_ramdisk_agent::run::{ManagedNic, RunError, measured_settings, to_grant, to_release};
use assay_ramdisk_agent::session::SessionError;
use assay_ramdisk_agent::tpm::TpmError;
use assay_ramdisk_agent::tpm::esapi::EsapiTpm;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use url::Url;

const DHCP_LIMIT: Duration = Duration::from_secs(30);

/// The Assay ramdisk agent.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Attests this machine to a verifier, printing progress as JSON lines; boots nothing.
    Attest(AttestArgs),
}

#[derive(Debug, Args)]
struct AttestArgs {
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
    let Cli { command: CliCommand::Attest(args) } = Cli::parse();
    console::init_json();
    match block_on(attest(args)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            tracing::error!(event = "agent.failed", "{}", Chain(&error));
            ExitCode::FAILURE
        }
        Err(code) => code,
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

#[derive(Debug, thiserror::Error)]
enum AttestError {
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

async fn attest(args: AttestArgs) -> Result<(), AttestError> {
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
    let released = to_release(&mut tpm, &settings, &args.event_log).await?;
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
