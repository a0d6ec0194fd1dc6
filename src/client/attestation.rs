//! `assay attestation`.

use super::output::{self, Row};
use super::{BoxError, Options, Site};
use assay_verifier::api::{AttestationRecord, AttestationState};
use assay_wire::id::NodeId;
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub(crate) enum AttestationCommand {
    /// The latest attestation of every node: when evidence came last, when it is due, and until when the admission stands
    List(Options),
    /// The attestations of one node, newest first, with what its last evidence showed and why each ended
    Show {
        /// The node
        node: NodeId,
        #[command(flatten)]
        options: Options,
    },
}

impl Row for AttestationRecord {
    const HEAD: &'static [&'static str] =
        &["NODE", "STATE", "LAST SEEN", "NEXT EXPECTED", "EXPIRES", "PUSHES", "IMA ENTRIES", "REMARKS"];
    fn cells(&self) -> Vec<String> {
        let state = match (self.state, self.silent_at_ms) {
            (AttestationState::Standing, None) => "standing",
            (AttestationState::Standing, Some(_)) => "silent",
            (AttestationState::Ending, _) => "ending",
            (AttestationState::Ended, _) => "ended",
        };
        let moment = |ms: Option<i64>| ms.map_or_else(|| "-".to_owned(), output::time);
        let remarks: Vec<&str> = self.reasons.iter().chain(&self.warnings).map(String::as_str).collect();
        vec![
            self.node.to_string(),
            state.to_owned(),
            moment(self.last_seen_at_ms),
            moment(self.next_expected_at_ms),
            output::time(self.expires_at_ms),
            self.pushes.to_string(),
            self.ima_entries.to_string(),
            remarks.join("\n"),
        ]
    }
}

pub(crate) async fn run(command: AttestationCommand) -> Result<(), BoxError> {
    match command {
        AttestationCommand::List(options) => {
            let records: Vec<AttestationRecord> = Site::open(&options)?.verifier.get("/v1/attestations").await?;
            output::list(options.output, &records)
        }
        AttestationCommand::Show { node, options } => {
            let path = format!("/v1/attestations/{node}");
            let records: Vec<AttestationRecord> = Site::open(&options)?.verifier.get(&path).await?;
            output::list(options.output, &records)
        }
    }
}
