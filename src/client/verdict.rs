//! `assay verdict`, `release` and `key`.

use super::output::{self, Row};
use super::policy::{read, write};
use super::{BoxError, Options, Site};
use assay_verifier::api::{
    Again, CaseFile, Explanation, Reappraisal, ReappraisedWord, ReleaseRecord, VerdictRecord, VerifierKeys,
};
use assay_verifier::appraisal::Deviation;
use assay_verifier::policy::Policy;
use assay_verifier::policy::signature::PolicyKeys;
use assay_verifier::reappraisal::reappraise;
use assay_verifier::tee::read_folder;
use assay_wire::id::NodeId;
use clap::Subcommand;
use std::path::{Path, PathBuf};

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
    /// Why the latest verdict of a node is what it is: which event, what was expected, who approved that, since when
    Explain {
        /// The node
        node: NodeId,
        #[command(flatten)]
        options: Options,
    },
    /// Write a node's latest evidence with its verdict and all that this depended on, to be appraised again offline
    Export {
        /// The node
        node: NodeId,
        /// Where to; default: standard output
        #[arg(long)]
        out: Option<PathBuf>,
        #[command(flatten)]
        options: Options,
    },
    /// Appraise an exported verdict's evidence again, without a site; fails if it is rejected
    ///
    /// What the verdict depended on is as it was then: the boot, the TPM's counts, the collateral of quotes of trusted
    /// execution environments, and whether that was valid. Without `--policy`, by the policy that judged then, as of
    /// then. With it, by that policy, which must be valid now. A fact that the policy asks for and an older version did
    /// not keep makes it undecided, which fails too.
    Replay {
        /// What `assay verdict export` wrote
        file: PathBuf,
        /// Another policy, TOML or JSON
        #[arg(long)]
        policy: Option<PathBuf>,
        /// A folder of collateral (`*.json`), where the verdict had or kept none: valid then, or with `--policy` now
        #[arg(long)]
        tee_collateral: Option<PathBuf>,
        #[command(flatten)]
        options: Options,
    },
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
        vec![self.node.to_string(), self.verdict.to_string(), at, policy, self.reasons.join("\n")]
    }
}

impl Row for Deviation {
    const HEAD: &'static [&'static str] = &["RULE", "PCR", "EVENT", "EXPECTED", "FOUND", "WHAT"];
    fn cells(&self) -> Vec<String> {
        let event = self.event.map(|event| event.to_string()).unwrap_or_default();
        let event = [event, self.event_type.clone().unwrap_or_default()].join(" ").trim().to_owned();
        vec![
            self.rule.clone(),
            self.pcr.map(|pcr| pcr.to_string()).unwrap_or_default(),
            event,
            self.expected.iter().take(4).map(|one| short(one)).collect::<Vec<_>>().join("\n"),
            self.found.as_deref().map(short).unwrap_or_default(),
            self.sentence.clone(),
        ]
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
        VerdictCommand::Explain { node, options } => {
            let path = format!("/v1/verdicts/{node}/explanation");
            let explanation: Explanation = Site::open(&options)?.verifier.get(&path).await?;
            explain(&explanation, options.output)
        }
        VerdictCommand::Export { node, out, options } => {
            let case: CaseFile = Site::open(&options)?.verifier.get(&format!("/v1/verdicts/{node}/case")).await?;
            match out {
                None => output::json(&case),
                Some(path) => {
                    write(&path, &serde_json::to_string_pretty(&case)?)?;
                    let next = format!("written to {0}; offline: assay verdict replay {0}", path.display());
                    output::done(options.output, &next, &case.archived.verdict)
                }
            }
        }
        VerdictCommand::Replay { file, policy, tee_collateral, options } => {
            replay(&file, policy.as_deref(), tee_collateral.as_deref(), options.output)
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

fn explain(explanation: &Explanation, format: output::Format) -> Result<(), BoxError> {
    if format == output::Format::Json {
        return output::json(explanation);
    }
    let VerdictRecord { node, verdict, received_at_ms, reasons, policy, .. } = &explanation.verdict;
    output::line(&format!("node {node} was {verdict} at {}", output::time(*received_at_ms)))?;
    match (&explanation.policy_name, policy) {
        (Some(name), Some(digest)) => output::line(&format!("by policy {name} ({digest})"))?,
        (None, Some(digest)) => output::line(&format!("by policy {digest}, which is no longer on record"))?,
        (_, None) => output::line("by no policy: none was active")?,
    }
    if let Some(approval) = &explanation.approval {
        let at = output::time(approval.approved_at_ms);
        output::line(&format!("  approved by {} since {at}", approval.approved_by))?;
    }
    let sources = [
        ("signed by", explanation.signed_by.map(|key| key.to_string())),
        ("firmware values learnt from", explanation.learned_from.clone()),
        ("boot images from the Reference Values of", explanation.artefacts.clone()),
    ];
    for (what, source) in sources {
        if let Some(source) = source {
            output::line(&format!("  {what} {}", output::printable(&source)))?;
        }
    }
    for unrecorded in &explanation.unrecorded {
        output::line(&format!("  {unrecorded}"))?;
    }
    if !explanation.reproduced && explanation.unrecorded.is_empty() {
        output::line("  appraised again, the archived evidence comes to another verdict: look at the database")?;
    }
    if explanation.deviations.is_empty() {
        return reasons.iter().try_for_each(|reason| output::line(&output::printable(reason)));
    }
    output::list(format, &explanation.deviations)
}

fn replay(
    file: &Path,
    policy: Option<&Path>,
    tee_collateral: Option<&Path>,
    format: output::Format,
) -> Result<(), BoxError> {
    let case = CaseFile::from_json(&read(file)?).map_err(|cause| naming(file, &cause))?;
    let (judge, now_seconds) = match policy {
        Some(path) => {
            let policy = Policy::parse(&read(path)?).map_err(|cause| naming(path, &cause))?;
            (Some(policy), time::OffsetDateTime::now_utc().unix_timestamp())
        }
        None => {
            let judged = case.policy.as_ref().map(|record| record.admit(&PolicyKeys::default())).transpose();
            (judged.map_err(|cause| naming(file, &cause))?, case.context.now_seconds)
        }
    };
    let given = tee_collateral.map(read_folder).transpose()?;
    let by = Again { policy: judge.as_ref(), now_seconds, tee_collateral: given.as_ref() };
    let again = reappraise(&case, &by)?;
    show_again(&case, &again, format)?;
    match again.verdict {
        ReappraisedWord::Accepted => Ok(()),
        word @ (ReappraisedWord::Rejected | ReappraisedWord::Undecided) => {
            Err(format!("{}: the evidence is {word}", file.display()).into())
        }
    }
}

fn show_again(case: &CaseFile, again: &Reappraisal, format: output::Format) -> Result<(), BoxError> {
    if format == output::Format::Json {
        return output::json(again);
    }
    let recorded = &case.archived.verdict;
    let by = again.policy.as_deref().unwrap_or("no policy");
    output::line(&format!("node {} is {} by {by}; on record: {}", recorded.node, again.verdict, recorded.verdict))?;
    for unrecorded in &again.unrecorded {
        output::line(unrecorded)?;
    }
    if again.deviations.is_empty() {
        return again.reasons.iter().try_for_each(|reason| output::line(&output::printable(reason)));
    }
    output::list(format, &again.deviations)
}

fn naming(path: &Path, cause: &dyn std::error::Error) -> BoxError {
    format!("{}: {}", path.display(), assay_service::error::chain(cause)).into()
}

/// Digests are cut, words are not.
fn short(text: &str) -> String {
    if text.len() == 64 && text.bytes().all(|octet| octet.is_ascii_hexdigit()) {
        format!("{}…", &text[..12])
    } else {
        text.to_owned()
    }
}
