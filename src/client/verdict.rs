//! `assay verdict`, `policy`, `release` and `key`.

use super::output::{self, Row};
use super::{BoxError, Options, Site};
use assay_verifier::api::{
    LearnRequest, PolicyDraft, PolicyRecord, PolicyRequest, ReleaseRecord, VerdictRecord, VerdictWord, VerifierKeys,
};
use assay_wire::id::NodeId;
use clap::{Args, Subcommand};
use std::fs;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum VerdictCommand {
    /// The latest verdict of every node
    List(Options),
    /// The latest verdict of one node, with every reason
    Show {
        /// The node
        node: NodeId,
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Draft a policy from a node's last evidence and the artefacts' Reference Values; read it before you approve it
    Learn(LearnArguments),
    /// Approve a policy: from now on it judges
    Approve {
        /// The policy, TOML or JSON
        file: PathBuf,
        #[command(flatten)]
        options: Options,
    },
    /// List policies
    List(Options),
}

#[derive(Debug, Args)]
pub(crate) struct LearnArguments {
    /// The node whose firmware is to be trusted
    node: NodeId,
    /// `reference-values.json` of the agent's image
    #[arg(long)]
    artefacts: PathBuf,
    /// Where to write the draft; default: standard output
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReleaseCommand {
    /// List releases, each with the journal step that it stands at
    List(Options),
}

impl Row for VerdictRecord {
    const HEAD: &'static [&'static str] = &["NODE", "VERDICT", "AT", "POLICY", "REASONS"];
    fn cells(&self) -> Vec<String> {
        let policy = self.policy.as_deref().unwrap_or("none").chars().take(23).collect();
        let at = output::time(self.received_at_ms);
        let word = match self.verdict {
            VerdictWord::Accepted => "accepted",
            VerdictWord::Rejected => "rejected",
        };
        vec![self.node.to_string(), word.to_owned(), at, policy, self.reasons.join("\n")]
    }
}

impl Row for PolicyRecord {
    const HEAD: &'static [&'static str] = &["POLICY", "DIGEST", "APPROVED BY", "AT", "ACTIVE"];
    fn cells(&self) -> Vec<String> {
        let active = if self.active { "yes" } else { "no" };
        let digest = self.digest.chars().take(23).collect();
        vec![self.name.clone(), digest, self.added_by.clone(), output::time(self.added_at_ms), active.to_owned()]
    }
}

impl Row for ReleaseRecord {
    const HEAD: &'static [&'static str] = &["NODE", "STEP", "AT", "ADMISSION", "FAILURE"];
    fn cells(&self) -> Vec<String> {
        let failure = self.failure.clone().unwrap_or_default();
        let at = output::time(self.step_at_ms);
        vec![self.node.to_string(), self.step.to_string(), at, self.admission.to_string(), failure]
    }
}

pub(crate) async fn run_verdict(command: VerdictCommand) -> Result<(), BoxError> {
    match command {
        VerdictCommand::List(options) => {
            let verdicts: Vec<VerdictRecord> = Site::open(&options)?.verifier.get("/v1/verdicts").await?;
            output::list(options.output, &verdicts)
        }
        VerdictCommand::Show { node, options } => {
            let verdict: VerdictRecord = Site::open(&options)?.verifier.get(&format!("/v1/verdicts/{node}")).await?;
            output::one(options.output, &verdict)
        }
    }
}

pub(crate) async fn run_policy(command: PolicyCommand) -> Result<(), BoxError> {
    match command {
        PolicyCommand::Learn(arguments) => learn(arguments).await,
        PolicyCommand::Approve { file, options } => {
            let document = read(&file)?;
            let request = PolicyRequest { name: None, document };
            let policy: PolicyRecord = Site::open(&options)?.verifier.post("/v1/policies", &request).await?;
            output::done(
                options.output,
                &format!("policy {} judges from now on ({})", policy.name, policy.digest),
                &policy,
            )
        }
        PolicyCommand::List(options) => {
            let policies: Vec<PolicyRecord> = Site::open(&options)?.verifier.get("/v1/policies").await?;
            output::list(options.output, &policies)
        }
    }
}

pub(crate) async fn run_release(ReleaseCommand::List(options): ReleaseCommand) -> Result<(), BoxError> {
    let releases: Vec<ReleaseRecord> = Site::open(&options)?.verifier.get("/v1/releases").await?;
    output::list(options.output, &releases)
}

pub(crate) async fn show_key(options: &Options) -> Result<(), BoxError> {
    let keys: VerifierKeys = Site::open(options)?.verifier.get("/v1/key").await?;
    output::done(options.output, &keys.result_key, &keys)
}

/// The key that signs this site's results: what a new project trusts unless told otherwise.
pub(crate) async fn verifier_key(site: &Site) -> Result<String, BoxError> {
    let keys: VerifierKeys = site.verifier.get("/v1/key").await?;
    Ok(keys.result_key)
}

async fn learn(LearnArguments { node, artefacts, out, options }: LearnArguments) -> Result<(), BoxError> {
    let artefacts = serde_json::from_str(&read(&artefacts)?)?;
    let request = LearnRequest { node, name: None, artefacts };
    let draft: PolicyDraft = Site::open(&options)?.verifier.post("/v1/policies/learn", &request).await?;
    match out {
        None => output::line(&draft.document),
        Some(path) => {
            fs::write(&path, &draft.document).map_err(|cause| format!("writing {}: {cause}", path.display()))?;
            let next = format!("draft written to {0}; read it, then: assay policy approve {0}", path.display());
            output::done(options.output, &next, &draft)
        }
    }
}

fn read(path: &PathBuf) -> Result<String, BoxError> {
    fs::read_to_string(path).map_err(|cause| format!("reading {}: {cause}", path.display()).into())
}
