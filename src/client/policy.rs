//! `assay policy`.

use super::output::{self, Row};
use super::{BoxError, Options, Site};
use assay_verifier::api::{
    Again, CaseFile, LearnRequest, PolicyDraft, PolicyHistory, PolicyRecord, PolicyRequest, ReappraisedWord, Trial,
    TryAnswer, TryRequest,
};
use assay_verifier::policy::corim;
use assay_verifier::policy::diff::{Change, diff};
use assay_verifier::policy::signature::{DetachedSignature, PolicyKey, PolicyKeys, PolicySigner};
use assay_verifier::policy::{ArtefactReference, Policy};
use assay_verifier::reappraisal::reappraise;
use assay_verifier::tee::read_folder;
use assay_wire::id::NodeId;
use clap::{Args, Subcommand};
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Draft a policy from a node's last evidence and the artefacts' Reference Values; read it before you approve it
    Learn(LearnArguments),
    /// Show what differs between two policies, rule by rule and event by event
    ///
    /// Each is a file, a digest (`sha256:…`) or `active`. With one policy given, it is compared with the active one.
    Diff {
        /// The policy before
        before: String,
        /// The policy after
        after: Option<String>,
        #[command(flatten)]
        options: Options,
    },
    /// Say what a policy would make of the last evidence of nodes; fails if it would refuse any
    ///
    /// The policy must be valid now. All else is as it was when the evidence came: the TPM's counts, and the collateral
    /// of quotes of trusted execution environments. A fact that the policy asks for and an older version did not keep
    /// makes a node undecided, which fails too.
    Try(TryArguments),
    /// Approve a policy: from now on it judges. A digest (`sha256:…`) of an older version goes back to that
    Approve {
        /// The policy, TOML or JSON; or the digest of one on record
        policy: String,
        /// A detached signature on it; default: the file's name with `.sig`, if there is one
        #[arg(long)]
        signature: Option<PathBuf>,
        #[command(flatten)]
        options: Options,
    },
    /// List policies
    List(Options),
    /// Show a policy on record: its document, who approved it and when
    Show {
        /// Its digest (`sha256:…`), or `active`
        digest: String,
        #[command(flatten)]
        options: Options,
    },
    /// Reference Values as CoRIM (draft-ietf-rats-corim), for others to read, and back
    #[command(subcommand)]
    Corim(CorimCommand),
    /// Make a key that signs policies; the verifier's `policy_keys` must hold its public half
    Keygen {
        /// Where to write the private key; the file is readable by its owner only
        #[arg(long)]
        out: PathBuf,
        #[command(flatten)]
        options: Options,
    },
    /// Sign a policy, or the Reference Values of an image, with a key of `assay policy keygen`
    Sign {
        /// The policy (TOML or JSON) or `reference-values.json`
        file: PathBuf,
        /// The private key
        #[arg(long)]
        key: PathBuf,
        /// Where to write the signature; default: the file's name with `.sig`
        #[arg(long)]
        out: Option<PathBuf>,
        #[command(flatten)]
        options: Options,
    },
    /// Check the signature on a policy or on Reference Values, without a site
    Verify {
        /// The policy (TOML or JSON) or `reference-values.json`
        file: PathBuf,
        /// The signature; default: the file's name with `.sig`
        #[arg(long)]
        signature: Option<PathBuf>,
        /// A public key whose signature counts, 64 hexadecimal digits; may be given several times
        #[arg(long = "trust", required = true)]
        trusted: Vec<PolicyKey>,
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum CorimCommand {
    /// Write `reference-values.json` as a CoRIM
    Export {
        /// The Reference Values
        file: PathBuf,
        /// Where to write the CoRIM
        #[arg(long)]
        out: PathBuf,
        /// Sign it (COSE_Sign1, EdDSA) with a key of `assay policy keygen`
        #[arg(long)]
        key: Option<PathBuf>,
        #[command(flatten)]
        options: Options,
    },
    /// Read a CoRIM into `reference-values.json`
    Import {
        /// The CoRIM
        file: PathBuf,
        /// Where to write the Reference Values
        #[arg(long)]
        out: PathBuf,
        /// A public key that must have signed it, 64 hexadecimal digits; may be given several times
        #[arg(long = "trust")]
        trusted: Vec<PolicyKey>,
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Debug, Args)]
pub(crate) struct LearnArguments {
    /// The node whose firmware is to be trusted
    node: NodeId,
    /// `reference-values.json` of the agent's image
    #[arg(long)]
    artefacts: PathBuf,
    /// A detached signature on it; default: the file's name with `.sig`, if there is one
    #[arg(long)]
    artefacts_signature: Option<PathBuf>,
    /// Learn even though a policy has rejected this evidence; the draft says what it would come to accept
    #[arg(long)]
    from_rejected: bool,
    /// The draft's name; default: `learnt-from-<node>`
    #[arg(long)]
    name: Option<String>,
    /// Where to write the draft; default: standard output
    #[arg(long)]
    out: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct TryArguments {
    /// The policy, TOML or JSON; nothing becomes active by trying it
    policy: PathBuf,
    /// On the last evidence of every node
    #[arg(long, required_unless_present = "node", conflicts_with = "node")]
    fleet: bool,
    /// On the last evidence of this node only
    #[arg(long)]
    node: Option<NodeId>,
    /// With `--node`: a folder of collateral (`*.json`), valid now, where the verdict had or kept none
    #[arg(long, requires = "node")]
    tee_collateral: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

impl Row for PolicyRecord {
    const HEAD: &'static [&'static str] = &["POLICY", "DIGEST", "ADDED BY", "AT", "SIGNED BY", "ACTIVE"];
    fn cells(&self) -> Vec<String> {
        let active = if self.active { "yes" } else { "no" };
        let digest = self.digest.chars().take(23).collect();
        let signer = self.signature.map_or_else(String::new, |it| it.key.to_string().chars().take(16).collect());
        let at = output::time(self.added_at_ms);
        vec![self.name.clone(), digest, self.added_by.clone(), at, signer, active.to_owned()]
    }
}

impl Row for Change {
    const HEAD: &'static [&'static str] = &["RULE", "WHAT", "BEFORE", "AFTER"];
    fn cells(&self) -> Vec<String> {
        let side = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        vec![self.rule.clone(), self.what.clone(), side(&self.before), side(&self.after)]
    }
}

impl Row for Trial {
    const HEAD: &'static [&'static str] = &["NODE", "NOW", "WOULD BE", "WHY"];
    fn cells(&self) -> Vec<String> {
        let why = [&self.would.reasons[..], &self.would.unrecorded, &self.would.warnings].concat();
        vec![self.node.to_string(), self.verdict.to_string(), self.would.verdict.to_string(), why.join("\n")]
    }
}

pub(crate) async fn run_policy(command: PolicyCommand) -> Result<(), BoxError> {
    match command {
        PolicyCommand::Learn(arguments) => learn(arguments).await,
        PolicyCommand::Diff { before, after, options } => {
            let (before, after) = after.map_or_else(|| (ACTIVE.to_owned(), before.clone()), |it| (before.clone(), it));
            let (before, after) = (policy_named(&before, &options).await?, policy_named(&after, &options).await?);
            output::list(options.output, &diff(&before, &after))
        }
        PolicyCommand::Try(arguments) => try_policy(arguments).await,
        PolicyCommand::Approve { policy, signature, options } => approve(&policy, signature, &options).await,
        PolicyCommand::List(options) => {
            let policies: Vec<PolicyRecord> = Site::open(&options)?.verifier.get("/v1/policies").await?;
            output::list(options.output, &policies)
        }
        PolicyCommand::Show { digest, options } => show(&digest, &options).await,
        PolicyCommand::Corim(command) => run_corim(command),
        PolicyCommand::Keygen { out, options } => keygen(&out, &options),
        PolicyCommand::Sign { file, key, out, options } => sign(&file, &key, out, &options),
        PolicyCommand::Verify { file, signature, trusted, options } => verify(&file, signature, trusted, &options),
    }
}

async fn approve(policy: &str, signature: Option<PathBuf>, options: &Options) -> Result<(), BoxError> {
    let verifier = Site::open(options)?.verifier;
    let policy: PolicyRecord = if is_digest(policy) {
        verifier.post(&format!("/v1/policies/{policy}/approve"), &()).await?
    } else {
        let file = Path::new(policy);
        let request =
            PolicyRequest { name: None, document: read(file)?, signature: signature_beside(file, signature)? };
        verifier.post("/v1/policies", &request).await?
    };
    output::done(options.output, &format!("policy {} judges from now on ({})", policy.name, policy.digest), &policy)
}

async fn show(digest: &str, options: &Options) -> Result<(), BoxError> {
    let history: PolicyHistory = Site::open(options)?.verifier.get(&format!("/v1/policies/{digest}")).await?;
    if options.output == output::Format::Json {
        return output::json(&history);
    }
    let PolicyHistory { policy, approvals, refused } = history;
    output::line(&format!("# policy {} {}", policy.name, policy.digest))?;
    for approval in approvals {
        output::line(&format!("# approved by {} at {}", approval.approved_by, output::time(approval.approved_at_ms)))?;
    }
    if let Some(signature) = policy.signature {
        output::line(&format!("# signed by {}", signature.key))?;
    }
    if let Some(refused) = refused {
        output::line(&format!("# REFUSED: {refused}"))?;
    }
    output::line(&policy.document)
}

async fn learn(arguments: LearnArguments) -> Result<(), BoxError> {
    let LearnArguments { node, artefacts, artefacts_signature, from_rejected, name, out, options } = arguments;
    let request = LearnRequest {
        node,
        name,
        artefacts_signature: signature_beside(&artefacts, artefacts_signature)?,
        artefacts: serde_json::from_str(&read(&artefacts)?)
            .map_err(|cause| format!("reading {}: {cause}", artefacts.display()))?,
        from_rejected,
    };
    let draft: PolicyDraft = Site::open(&options)?.verifier.post("/v1/policies/learn", &request).await?;
    let notes: String = draft.notes.iter().map(|note| format!("# note: {}\n", output::one_line(note))).collect();
    let document = format!("{notes}{}", draft.document);
    match out {
        None => output::line(&document),
        Some(path) => {
            write(&path, &document)?;
            let next = format!("{notes}draft written to {0}; read it, then: assay policy approve {0}", path.display());
            output::done(options.output, &next, &draft)
        }
    }
}

async fn try_policy(arguments: TryArguments) -> Result<(), BoxError> {
    let TryArguments { policy, fleet: _, node, tee_collateral, options } = arguments;
    let document = read(&policy)?;
    let verifier = Site::open(&options)?.verifier;
    let mut trials = Vec::new();
    if let Some(node) = node {
        let case: CaseFile = verifier.get(&format!("/v1/verdicts/{node}/case")).await?;
        let judge = Policy::parse(&document).map_err(|cause| naming(&policy, cause))?;
        let now_seconds = time::OffsetDateTime::now_utc().unix_timestamp();
        let given = tee_collateral.as_deref().map(read_folder).transpose()?;
        let by = Again { policy: Some(&judge), now_seconds, tee_collateral: given.as_ref() };
        let would = reappraise(&case, &by)?;
        let (evidence, verdict) = (case.archived.verdict.evidence, case.archived.verdict.verdict);
        trials.push(Trial { node, evidence, verdict, would });
    } else {
        let mut after = None;
        loop {
            let request = TryRequest { document: document.clone(), after };
            let answer: TryAnswer = verifier.post("/v1/policies/try", &request).await?;
            trials.extend(answer.trials);
            after = answer.next;
            if after.is_none() {
                break;
            }
        }
    }
    output::list(options.output, &trials)?;
    let of = |word| trials.iter().filter(|trial| trial.would.verdict == word).count();
    match (of(ReappraisedWord::Rejected), of(ReappraisedWord::Undecided)) {
        (0, 0) => Ok(()),
        (refused, undecided) => {
            let known = format!("{} would refuse {refused} of {} nodes", policy.display(), trials.len());
            let unknown = if undecided > 0 { format!("; {undecided} are undecided") } else { String::new() };
            Err(format!("{known}{unknown}").into())
        }
    }
}

fn keygen(out: &Path, options: &Options) -> Result<(), BoxError> {
    if out.exists() {
        return Err(format!("making a policy key: {} is there already", out.display()).into());
    }
    let pkcs8 = PolicySigner::generate()?;
    let public = PolicySigner::from_pkcs8(&pkcs8)?.public();
    assay_service::secret_file::write(out, &pkcs8)?;
    #[derive(Serialize)]
    struct Made {
        key: PolicyKey,
    }
    let next = format!(
        "{public}\nprivate key written to {}; in the verifier's table of the site's file: policy_keys = [\"{public}\"]",
        out.display()
    );
    output::done(options.output, &next, &Made { key: public })
}

fn run_corim(command: CorimCommand) -> Result<(), BoxError> {
    match command {
        CorimCommand::Export { file, out, key, options } => {
            let artefacts = ArtefactReference::from_json(&read(&file)?).map_err(|cause| naming(&file, cause))?;
            let signer = key.map(|key| signer(&key)).transpose()?;
            let corim = corim::export(&artefacts, signer.as_ref())?;
            fs::write(&out, corim).map_err(|cause| format!("writing {}: {cause}", out.display()))?;
            output::done(options.output, &format!("CoRIM written to {}", out.display()), &artefacts)
        }
        CorimCommand::Import { file, out, trusted, options } => {
            let bytes = fs::read(&file).map_err(|cause| format!("reading {}: {cause}", file.display()))?;
            let now_seconds = time::OffsetDateTime::now_utc().unix_timestamp();
            let imported = corim::import(&bytes, &PolicyKeys::new(trusted), now_seconds);
            let (artefacts, signed_by) = imported.map_err(|cause| naming(&file, cause))?;
            write(&out, &serde_json::to_string_pretty(&artefacts)?)?;
            let by = signed_by.map_or_else(|| "nobody".to_owned(), |key| key.to_string());
            let next = format!("{} events, signed by {by}, written to {}", artefacts.events.len(), out.display());
            output::done(options.output, &next, &artefacts)
        }
    }
}

fn signer(key: &Path) -> Result<PolicySigner, BoxError> {
    let pkcs8 = fs::read(key).map_err(|cause| format!("reading {}: {cause}", key.display()))?;
    let unusable = |_| format!("{} holds no key of `assay policy keygen`", key.display()).into();
    PolicySigner::from_pkcs8(&pkcs8).map_err(unusable)
}

fn sign(file: &Path, key: &Path, out: Option<PathBuf>, options: &Options) -> Result<(), BoxError> {
    let signer = signer(key)?;
    let signature = match Signed::read(file)? {
        Signed::Policy(policy) => signer.sign_policy(&policy),
        Signed::Artefacts(artefacts) => signer.sign_artefacts(&artefacts),
    };
    let out = out.unwrap_or_else(|| beside(file));
    write(&out, &signature.to_json())?;
    output::done(options.output, &format!("signed by {}: {}", signature.key, out.display()), &signature)
}

fn verify(file: &Path, signature: Option<PathBuf>, trusted: Vec<PolicyKey>, options: &Options) -> Result<(), BoxError> {
    let signature = signature_beside(file, signature)?;
    let keys = PolicyKeys::new(trusted);
    let (what, signed) = match Signed::read(file)? {
        Signed::Policy(policy) => {
            (format!("policy {}", policy.digest()), keys.check_policy(&policy, signature.as_ref())?)
        }
        Signed::Artefacts(artefacts) => {
            (format!("Reference Values of `{}`", artefacts.name), keys.check_artefacts(&artefacts, signature.as_ref())?)
        }
    };
    #[derive(Serialize)]
    struct Verified {
        what: String,
        signed_by: Option<PolicyKey>,
    }
    let by = signed.map_or_else(|| "nobody".to_owned(), |key| key.to_string());
    output::done(options.output, &format!("{what}: signed by {by}"), &Verified { what, signed_by: signed })
}

/// What `sign` and `verify` take.
enum Signed {
    Policy(Box<Policy>),
    Artefacts(ArtefactReference),
}

impl Signed {
    /// Reference Values are told by their member `events`, which no policy has.
    fn read(file: &Path) -> Result<Self, BoxError> {
        let text = read(file)?;
        let json: Option<serde_json::Value> = serde_json::from_str(&text).ok();
        let artefacts = json.is_some_and(|json| json.get("events").is_some());
        let failed = |cause| naming(file, cause);
        if artefacts {
            ArtefactReference::from_json(&text).map(Self::Artefacts).map_err(failed)
        } else {
            Policy::parse(&text).map(|policy| Self::Policy(Box::new(policy))).map_err(failed)
        }
    }
}

/// A policy by its file, its digest or `active`.
async fn policy_named(name: &str, options: &Options) -> Result<Policy, BoxError> {
    if name == ACTIVE || is_digest(name) {
        let history: PolicyHistory = Site::open(options)?.verifier.get(&format!("/v1/policies/{name}")).await?;
        return Ok(Policy::parse(&history.policy.document)?);
    }
    Policy::parse(&read(Path::new(name))?).map_err(|cause| naming(Path::new(name), cause))
}

fn is_digest(name: &str) -> bool {
    name.starts_with("sha256:")
}

/// The signature in the file that was named, or in `<file>.sig` if that is there.
fn signature_beside(file: &Path, named: Option<PathBuf>) -> Result<Option<DetachedSignature>, BoxError> {
    let beside = beside(file);
    let Some(path) = named.or_else(|| beside.exists().then_some(beside)) else { return Ok(None) };
    let signature = DetachedSignature::from_json(&read(&path)?);
    signature.map(Some).map_err(|cause| naming(&path, cause))
}

fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".sig");
    name.into()
}

fn naming(path: &Path, cause: impl std::error::Error) -> BoxError {
    format!("{}: {}", path.display(), assay_service::error::chain(&cause)).into()
}

pub(super) fn read(path: &Path) -> Result<String, BoxError> {
    fs::read_to_string(path).map_err(|cause| format!("reading {}: {cause}", path.display()).into())
}

pub(super) fn write(path: &Path, text: &str) -> Result<(), BoxError> {
    fs::write(path, text).map_err(|cause| format!("writing {}: {cause}", path.display()).into())
}

const ACTIVE: &str = "active";
