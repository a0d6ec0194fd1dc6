//! `agent-image`: builds the image that nodes boot, and computes its Reference Values.

use assay_ramdisk_agent::console::Chain;
use assay_ramdisk_agent::image::reference::ReferenceValues;
use assay_ramdisk_agent::image::{Build, DEFAULT_COMMAND_LINE, ImageError, read};
use clap::{Args, Parser, Subcommand};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Builds the image that nodes boot, and computes its Reference Values.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Builds the UKI from Debian's kernel and the agent.
    Build(BuildArgs),
    /// Computes the Reference Values of a UKI that is there.
    Reference(ReferenceArgs),
}

#[derive(Debug, Args)]
struct BuildArgs {
    /// Directory for agent.efi and reference-values.json.
    #[arg(long, default_value = "target/agent-image")]
    out: PathBuf,
    /// Directory in which downloaded packages stay.
    #[arg(long, default_value = "target/agent-image-cache")]
    cache: PathBuf,
    /// The agent: cargo build --profile agent -p assay-ramdisk-agent --bin assay-agent
    #[arg(long, default_value = "target/agent/assay-agent")]
    agent: PathBuf,
    /// A Debian kernel package, or `auto` for the current cloud kernel.
    #[arg(long, default_value = "auto")]
    kernel_deb: PathBuf,
    /// systemd's UEFI stub.
    #[arg(long, default_value = "/usr/lib/systemd/boot/efi/linuxx64.efi.stub")]
    stub: PathBuf,
    #[command(flatten)]
    measured: MeasuredArgs,
}

#[derive(Debug, Args)]
struct ReferenceArgs {
    /// The UKI.
    #[arg(long)]
    uki: PathBuf,
    /// Write JSON here, beside printing a table.
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    measured: MeasuredArgs,
}

#[derive(Debug, Args)]
struct MeasuredArgs {
    /// What policies call the image.
    #[arg(long, default_value = "default")]
    name: String,
    /// The boot program that firmware starts before the UKI.
    #[arg(long, default_value = "/usr/lib/ipxe/snponly.efi")]
    loader: PathBuf,
    /// The kernel's command line.
    #[arg(long, default_value = DEFAULT_COMMAND_LINE)]
    command_line: String,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        CliCommand::Build(args) => build(args),
        CliCommand::Reference(args) => reference(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If standard error is gone, there is nobody left to tell.
            let _ = writeln!(io::stderr(), "agent-image: {}", Chain(&error));
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("writing {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("printing the result")]
    Print(#[from] io::Error),
}

fn build(args: BuildArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let kernel_deb = Some(args.kernel_deb).filter(|deb| deb.as_os_str() != "auto");
    let build = Build {
        name: args.measured.name,
        out: args.out,
        cache: args.cache,
        agent: args.agent,
        kernel_deb,
        stub: args.stub,
        loader: args.measured.loader,
        command_line: args.measured.command_line,
    };
    let built = build.run(|step| {
        let _ = writeln!(io::stderr(), "agent-image: [{:>5.1}s] {step}", started.elapsed().as_secs_f64());
    })?;
    print_table(&built.reference)?;
    let mut out = io::stdout().lock();
    writeln!(out)?;
    writeln!(
        out,
        "{}: {:.1} MiB (initrd {:.1} MiB), Linux {}",
        built.uki.display(),
        mib(built.uki_bytes),
        mib(built.initrd_bytes),
        built.kernel
    )?;
    writeln!(out, "{}: reference values for a policy", built.reference_file.display())?;
    Ok(())
}

fn reference(args: &ReferenceArgs) -> Result<(), CliError> {
    let uki = read(&args.uki)?;
    let loader = read(&args.measured.loader)?;
    let values = ReferenceValues::compute(&args.measured.name, &uki, &loader, &args.measured.command_line)
        .map_err(ImageError::from)?;
    if let Some(path) = &args.out {
        let json = values.to_json().map_err(ImageError::from)?;
        std::fs::write(path, json).map_err(|source| CliError::Write { path: path.clone(), source })?;
    }
    print_table(&values)
}

fn print_table(values: &ReferenceValues) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    writeln!(out, "Reference Values of the agent image `{}`", values.name)?;
    writeln!(out)?;
    writeln!(out, "PCR  SHA-256 extended                                                  what it is of")?;
    for event in &values.events {
        writeln!(out, "{:>3}  {}  {}", event.pcr, event.sha256, event.description)?;
    }
    writeln!(out)?;
    writeln!(out, "At the end: PCR 11 = {}", hex::encode(values.pcr(11)))?;
    writeln!(out, "            PCR 12 = {}", hex::encode(values.pcr(12)))?;
    Ok(())
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / (1024.0 * 1024.0)
}
