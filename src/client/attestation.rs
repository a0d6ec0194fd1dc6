//! `assay attestation`: which nodes go on proving what runs on them.

use super::output::{self, Row};
use super::{BoxError, Options, Site};
use assay_verifier::api::{AttestationRecord, AttestationState};
use assay_wire::id::NodeId;
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum AttestationCommand {
    /// The latest attestation of every node: since when, how often renewed, until when it stands
    List(Options),
    /// The attestations of one node, newest first, with why each ended
    Show {
        /// The node
        node: NodeId,
        #[command(flatten)]
        options: Options,
    },
}

impl Row for AttestationRecord {
    const HEAD: &'static [&'static str] = &["NODE", "STATE", "RENEWED", "LAST SEEN", "UNTIL", "REASONS"];
    fn cells(&self) -> Vec<String> {
        let state = match self.state {
            AttestationState::Standing if self.silent_at_ms.is_some() => "silent",
            AttestationState::Standing => "standing",
            AttestationState::Ending => "ending",
            AttestationState::Ended => "ended",
        };
        let last_seen = self.last_seen_at_ms.map_or_else(|| "never".to_owned(), output::time);
        let until = output::time(self.ended_at_ms.unwrap_or(self.expires_at_ms));
        let reasons = if self.reasons.is_empty() { &self.warnings } else { &self.reasons };
        vec![self.node.to_string(), state.to_owned(), self.pushes.to_string(), last_seen, until, reasons.join("\n")]
    }
}

pub(crate) async fn run(command: AttestationCommand) -> Result<(), BoxError> {
    let (path, options) = match command {
        AttestationCommand::List(options) => ("/v1/attestations".to_owned(), options),
        AttestationCommand::Show { node, options } => (format!("/v1/attestations/{node}"), options),
    };
    let attestations: Vec<AttestationRecord> = Site::open(&options)?.verifier.get(&path).await?;
    output::list(options.output, &attestations)
}
