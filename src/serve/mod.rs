//! Running services: all in one process (`assay up`), or one of them.

mod gateway;
mod site;

use crate::client::BoxError;
use assay_imaging::FileExport;
use assay_imaging::gateway::Limits;
use assay_service::CancellationToken;
use assay_service::auth::Tokens;
use assay_service::clock::SystemClock;
use assay_service::http::ServiceContext;
use assay_service::telemetry::{self, LogFormat};
use assay_service::tls::SiteIdentity;
use assay_wire::net::Iqn;
use clap::{Args, Subcommand};
use site::{Service, SiteFile};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::task::JoinSet;

pub(crate) use gateway::{GatewayArguments, run_gateway};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run every service in one process, on embedded defaults: SQLite and a local image store
    Up(ServeArguments),
    /// Run netboot: DHCP, TFTP and HTTP boot
    #[command(subcommand)]
    Netboot(One),
    /// Run the verifier
    #[command(subcommand)]
    Verifier(One),
    /// Run isolation: nodes, switches, leases
    #[command(subcommand)]
    Isolation(One),
    /// Run imaging, or export a single file
    #[command(subcommand)]
    Imaging(Imaging),
}

#[derive(Debug, Subcommand)]
pub(crate) enum One {
    /// Serve until told to stop
    Serve(ServeArguments),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Imaging {
    /// Serve until told to stop
    Serve(ServeArguments),
    /// Export one raw disk file over iSCSI; needs no site
    ExportFile(ExportFileArguments),
}

#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// The site's file: a `[site]` table and one a service
    #[arg(long, default_value = "/etc/assay/site.toml")]
    config: PathBuf,
}

/// Sessions that an exported file may have at once.
const FILE_SESSIONS: u8 = 64;

#[derive(Debug, Args)]
pub(crate) struct ExportFileArguments {
    /// The raw disk file
    file: PathBuf,
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:3260")]
    listen: SocketAddr,
    /// The target's name
    #[arg(long, default_value = "iqn.2026-01.dev.assay:file", value_name = "IQN")]
    target: Iqn,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// The one initiator that may log in; default: any
    #[arg(long, value_name = "IQN")]
    initiator: Option<Iqn>,
    /// CHAP user, and a file with its secret
    #[arg(long, value_name = "USER:FILE")]
    chap: Option<String>,
}

pub(crate) async fn run(command: Command) -> Result<(), BoxError> {
    match command {
        Command::Up(arguments) => up(&arguments).await,
        Command::Netboot(One::Serve(arguments)) => serve(&arguments, Service::Netboot).await,
        Command::Verifier(One::Serve(arguments)) => serve(&arguments, Service::Verifier).await,
        Command::Isolation(One::Serve(arguments)) => serve(&arguments, Service::Isolation).await,
        Command::Imaging(Imaging::Serve(arguments)) => serve(&arguments, Service::Imaging).await,
        Command::Imaging(Imaging::ExportFile(arguments)) => export_file(arguments).await,
    }
}

/// Runs one service.
async fn serve(arguments: &ServeArguments, service: Service) -> Result<(), BoxError> {
    let file = SiteFile::read(&arguments.config)?;
    serve_all(&file, &[service]).await
}

/// Runs every service. Which interfaces nodes boot from cannot be guessed: without a `[netboot]` table nobody boots.
async fn up(arguments: &ServeArguments) -> Result<(), BoxError> {
    let file = SiteFile::read(&arguments.config)?;
    let services: Vec<_> = Service::ALL.into_iter().filter(|s| *s != Service::Netboot || file.has_netboot()).collect();
    serve_all(&file, &services).await
}

/// Runs `services` until one of them ends or the process is told to stop; then stops the others.
async fn serve_all(file: &SiteFile, services: &[Service]) -> Result<(), BoxError> {
    telemetry::init(file.log_format());
    let state_dir = file.state_dir();
    std::fs::create_dir_all(state_dir)?;
    let context = ServiceContext {
        clock: Arc::new(SystemClock),
        tokens: Arc::new(Tokens::load_or_create(state_dir)?),
        identity: Arc::new(SiteIdentity::load_or_create(&state_dir.join("tls"), file.names())?),
        shutdown: stop_on_signal()?,
    };
    file.write_client_file()?;

    let mut running = JoinSet::new();
    for service in services {
        let task = file.start(*service, &context)?;
        let service = *service;
        running.spawn(async move { (service, task.await) });
    }
    if !services.contains(&Service::Netboot) {
        tracing::warn!(event = "netboot.absent", "netboot does not run here: no node boots from this process");
    }
    let mut ended = Ok(());
    while let Some(joined) = running.join_next().await {
        // One service down takes the others down: a supervisor restarts the whole, and the journal resumes.
        context.shutdown.cancel();
        let (service, result) = joined?;
        match &result {
            Ok(()) => tracing::info!(event = "service.stopped", %service, "service stopped"),
            Err(error) => {
                let cause = assay_service::error::chain(error.as_ref());
                tracing::error!(event = "service.failed", %service, cause, "service failed");
            }
        }
        ended = ended.and(result);
    }
    ended
}

async fn export_file(arguments: ExportFileArguments) -> Result<(), BoxError> {
    telemetry::init(LogFormat::Text);
    let chap = arguments.chap.as_deref().map(read_chap).transpose()?;
    let ExportFileArguments { file: path, listen, target, initiator, read_only, .. } = arguments;
    // Ad hoc, so as many paths as a client may want.
    // All of them may log in at once: an initiator that comes back does.
    let limits = Limits { sessions: FILE_SESSIONS, half_open: FILE_SESSIONS, ..Limits::default() };
    let export = FileExport { path, listen, target, initiator, chap, read_only, limits, worker: None };
    Ok(assay_imaging::export_file(export, stop_on_signal()?).await?)
}

/// `USER:FILE` as user and secret: the secret itself would be in the process list.
fn read_chap(argument: &str) -> Result<(String, String), BoxError> {
    let (user, path) = argument.split_once(':').ok_or("--chap takes USER:FILE, where FILE holds the secret")?;
    let secret = std::fs::read_to_string(path).map_err(|cause| format!("reading the CHAP secret {path}: {cause}"))?;
    Ok((user.to_owned(), secret.trim_end_matches('\n').to_owned()))
}

/// A token that SIGINT and SIGTERM cancel.
fn stop_on_signal() -> Result<CancellationToken, BoxError> {
    use tokio::signal::unix::{SignalKind, signal};
    let token = CancellationToken::new();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let cancelled = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        cancelled.cancel();
    });
    Ok(token)
}
