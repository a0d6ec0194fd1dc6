//! The client: one module an object, all of them thin over the services' APIs.

mod attestation;
mod disk;
mod event;
mod eventlog;
mod identity;
mod image;
mod image_export;
mod image_upload;
mod lease;
mod node;
mod output;
mod policy;
mod project;
mod secret;
pub(crate) mod site;
mod verdict;

use clap::{Args, Subcommand};
use output::Format;
use site::Site;
use std::path::PathBuf;

/// An error that `main` prints with its causes.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// An error with an exit status of its own, for programs that tell them apart.
#[derive(Debug)]
pub(crate) struct Exit {
    /// The exit status.
    pub(crate) code: u8,
    sentence: String,
}

impl Exit {
    /// One line for people: what failed, and how.
    pub(crate) fn new(code: u8, sentence: impl Into<String>) -> Self {
        Self { code, sentence: sentence.into().replace(char::is_control, "\u{fffd}") }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Exit {}

/// What every client command takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Folder of the site: `client.toml` in it names the services, their CA and the token.
    #[arg(long, env = "ASSAY_SITE", default_value = "/var/lib/assay", global = true)]
    site: PathBuf,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Table, global = true)]
    output: Format,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Projects: what owns networks and images and holds leases
    #[command(subcommand)]
    Project(project::ProjectCommand),
    /// Networks: each a VLAN of one project
    #[command(subcommand)]
    Network(project::NetworkCommand),
    /// Gateways: a project's iSCSI portal and relay on its network
    #[command(subcommand)]
    Gateway(GatewayCommand),
    /// Switches
    #[command(subcommand)]
    Switch(node::SwitchCommand),
    /// Nodes: the machines
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// Golden images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Disks: a lease's clone of a golden image
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Exports: disks that are open to a node now
    #[command(subcommand)]
    Export(disk::ExportCommand),
    /// Leases: which project uses which node
    #[command(subcommand)]
    Lease(lease::LeaseCommand),
    /// Admissions: which node may be on its tenant's network, until when
    #[command(subcommand)]
    Admission(lease::AdmissionCommand),
    /// Attestations: which admitted nodes go on proving themselves, and until when
    #[command(subcommand)]
    Attestation(attestation::AttestationCommand),
    /// Events: what happened, as a list or as it happens
    Events(event::EventArguments),
    /// Secrets: what a project gives to the node of a lease once it is attested
    #[command(subcommand)]
    Secret(secret::SecretCommand),
    /// Verdicts: what the verifier thinks of each node, and why
    #[command(subcommand)]
    Verdict(verdict::VerdictCommand),
    /// Policies and their Reference Values
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Boot event logs, without a site: show one, compare one with PCR values
    #[command(subcommand)]
    Eventlog(eventlog::EventlogCommand),
    /// Releases: the journal of each, step by step
    #[command(subcommand)]
    Release(verdict::ReleaseCommand),
    /// Identities: which node has which TPM
    #[command(subcommand)]
    Identity(identity::IdentityCommand),
    /// Incidents: claims to an identity that an operator settles
    #[command(subcommand)]
    Incident(identity::IncidentCommand),
    /// Bearer tokens for people and programs
    #[command(subcommand)]
    Token(project::TokenCommand),
    /// The key that signs this site's attestation results
    Key(Options),
}

/// `assay gateway …`: one command serves, the others are the client's.
#[derive(Debug, Subcommand)]
pub(crate) enum GatewayCommand {
    /// Run a project's gateway in the network namespace that stands on its network
    Serve(crate::serve::GatewayArguments),
    #[command(flatten)]
    Manage(project::GatewayCommand),
}

pub(crate) async fn run(command: Command) -> Result<(), BoxError> {
    match command {
        Command::Project(command) => project::run_project(command).await,
        Command::Network(command) => project::run_network(command).await,
        Command::Gateway(GatewayCommand::Serve(arguments)) => crate::serve::run_gateway(arguments).await,
        Command::Gateway(GatewayCommand::Manage(command)) => project::run_gateway(command).await,
        Command::Switch(command) => node::run_switch(command).await,
        Command::Node(command) => node::run_node(command).await,
        Command::Image(command) => image::run_image(command).await,
        Command::Disk(command) => disk::run_disk(command).await,
        Command::Export(command) => disk::run_export(command).await,
        Command::Lease(command) => lease::run_lease(command).await,
        Command::Admission(command) => lease::run_admission(command).await,
        Command::Attestation(command) => attestation::run(command).await,
        Command::Events(arguments) => event::run(arguments).await,
        Command::Secret(command) => secret::run(command).await,
        Command::Verdict(command) => verdict::run_verdict(command).await,
        Command::Policy(command) => policy::run_policy(command).await,
        Command::Eventlog(command) => eventlog::run(command),
        Command::Release(command) => verdict::run_release(command).await,
        Command::Identity(command) => identity::run_identity(command).await,
        Command::Incident(command) => identity::run_incident(command).await,
        Command::Token(command) => project::run_token(&command),
        Command::Key(options) => verdict::show_key(&options).await,
    }
}
