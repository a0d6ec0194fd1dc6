//! The one binary: `assay up` runs every service in one process, `assay <service> serve` one of them, `assay gateway
//! serve` a project's gateway, and everything else is the operator's and tenant's client.

mod client;
mod serve;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Assay: boot bare metal, prove what booted, and only then give it a network and a disk.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    after_help = "Start with `assay up`; then `assay project create`, `assay node add`, `assay image import` and `assay lease create`.\nEvery list and show command takes `--output json`."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Serve(serve::Command),
    #[command(flatten)]
    Client(client::Command),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Crash points of the lab's builds: FAILPOINTS says where this process shall end.
    #[cfg(feature = "failpoints")]
    let _armed = fail::FailScenario::setup();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let done = runtime.block_on(async {
        match arguments.command {
            Command::Serve(command) => serve::run(command).await,
            Command::Client(command) => client::run(command).await,
        }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error.as_ref()),
    }
}

/// One line for a person: what failed, its causes, and what to do next where the service said so.
fn fail(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    #[expect(clippy::print_stderr, reason = "the client's way to say what went wrong")]
    {
        eprintln!("assay: {}", assay_service::error::chain(error));
        let refused = error.downcast_ref::<assay_service::client::ClientError>().and_then(|e| e.problem());
        if let Some(hint) = refused.and_then(|problem| problem.hint.as_ref()) {
            eprintln!("  try: {hint}");
        }
    }
    error.downcast_ref::<client::Exit>().map_or(ExitCode::FAILURE, |exit| ExitCode::from(exit.code))
}
