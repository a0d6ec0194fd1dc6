//! `assay identity` and `assay incident`: which node has which TPM, and what an operator says to claims that clash.

use super::output::{self, Row};
use super::{BoxError, Options, Site};
use assay_verifier::api::{
    AllowRequest, ApproveRequest, EkDigest, Identity, Incident, IncidentId, SettleRequest, Settlement,
};
use assay_wire::id::NodeId;
use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
#[command(after_help = "An EK is named by the SHA-256 of its public key. From its certificate:\n  \
    openssl x509 -inform der -in ek.crt -noout -pubkey | openssl pkey -pubin -outform der | sha256sum\n\
    On the machine itself: tpm2_createek -c - -G rsa -u ek.pem -f pem, then openssl pkey as above.")]
pub(crate) enum IdentityCommand {
    /// List which node has which EK
    List(Options),
    /// Show one node's EK
    Show {
        /// The node
        node: NodeId,
        #[command(flatten)]
        options: Options,
    },
    /// Say beforehand which EK a node has, and vouch for it: it needs no certificate
    Allow {
        /// SHA-256 of the EK's public key (DER SubjectPublicKeyInfo), hexadecimal
        #[arg(long, value_name = "SHA256")]
        ek_sha256: EkDigest,
        /// The node
        #[arg(long)]
        node: NodeId,
        #[command(flatten)]
        options: Options,
    },
    /// Approve the first EK that a node came with, where the site says `ek_binding = "approved"`
    Approve {
        /// The node
        node: NodeId,
        /// Which EK, if the node came with several
        #[arg(long, value_name = "SHA256")]
        ek_sha256: Option<EkDigest>,
        #[command(flatten)]
        options: Options,
    },
    /// Forget a node's EK: its next enrolment is a first one
    Forget {
        /// The node
        node: NodeId,
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum IncidentCommand {
    /// List incidents: the open ones first
    List(Options),
    /// Settle an incident: the agent stays refused until you do
    Settle(SettleArguments),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Accept an EK only if you know why it is another: a replaced board or TPM, a renamed machine.\n\
    Otherwise somebody else's machine claims to be this node."
)]
pub(crate) struct SettleArguments {
    /// The incident, from `assay incident list`
    id: IncidentId,
    /// The EK is the node's from now on, and no other node's
    #[arg(long, required_unless_present = "keep", conflicts_with = "keep")]
    accept_ek: bool,
    /// What is on record stays; the claim stays refused
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    options: Options,
}

impl Row for Identity {
    const HEAD: &'static [&'static str] = &["NODE", "EK", "BOUND", "BY", "LAST SEEN"];
    fn cells(&self) -> Vec<String> {
        let by = match &self.bound_by {
            Some(operator) => format!("{} ({operator})", self.origin),
            None => self.origin.to_string(),
        };
        let seen = self.seen_at_ms.map_or_else(|| "never".to_owned(), output::time);
        vec![self.node.to_string(), self.ek_sha256.clone(), output::time(self.bound_at_ms), by, seen]
    }
}

impl Row for Incident {
    const HEAD: &'static [&'static str] = &["INCIDENT", "NODE", "KIND", "LAST SEEN", "CLAIMS", "SETTLED", "WHAT"];
    fn cells(&self) -> Vec<String> {
        let settled = match (self.settlement, &self.settled_by) {
            (Some(settlement), Some(by)) => format!("{settlement} ({by})"),
            (Some(settlement), None) => settlement.to_string(),
            (None, _) => "open".to_owned(),
        };
        vec![
            self.id.to_string(),
            self.node.to_string(),
            self.kind.to_string(),
            output::time(self.last_at_ms),
            self.claims.to_string(),
            settled,
            self.detail.clone(),
        ]
    }
}

pub(crate) async fn run_identity(command: IdentityCommand) -> Result<(), BoxError> {
    match command {
        IdentityCommand::List(options) => {
            let identities: Vec<Identity> = Site::open(&options)?.verifier.get("/v1/identities").await?;
            output::list(options.output, &identities)
        }
        IdentityCommand::Show { node, options } => {
            let identity: Identity = Site::open(&options)?.verifier.get(&format!("/v1/identities/{node}")).await?;
            output::one(options.output, &identity)
        }
        IdentityCommand::Allow { ek_sha256, node, options } => {
            let request = AllowRequest { ek_sha256: ek_sha256.to_string() };
            let path = format!("/v1/identities/{node}");
            let identity: Identity = Site::open(&options)?.verifier.put(&path, &request).await?;
            output::done(
                options.output,
                &format!("node {node} may enrol with EK {ek_sha256}, and with no other"),
                &identity,
            )
        }
        IdentityCommand::Approve { node, ek_sha256, options } => {
            let request = ApproveRequest { ek_sha256: ek_sha256.map(|ek| ek.to_string()) };
            let path = format!("/v1/identities/{node}/approve");
            let incident: Incident = Site::open(&options)?.verifier.post(&path, &request).await?;
            let done = format!("node {node} is the one with EK {}; boot it again", incident.ek_sha256);
            output::done(options.output, &done, &incident)
        }
        IdentityCommand::Forget { node, options } => {
            let () = Site::open(&options)?.verifier.delete(&format!("/v1/identities/{node}"), &()).await?;
            output::done(options.output, &format!("node {node} has no EK on record any more"), &node)
        }
    }
}

pub(crate) async fn run_incident(command: IncidentCommand) -> Result<(), BoxError> {
    match command {
        IncidentCommand::List(options) => {
            let incidents: Vec<Incident> = Site::open(&options)?.verifier.get("/v1/incidents").await?;
            output::list(options.output, &incidents)
        }
        IncidentCommand::Settle(SettleArguments { id, accept_ek, keep: _, options }) => {
            let settlement = if accept_ek { Settlement::AcceptEk } else { Settlement::Keep };
            let path = format!("/v1/incidents/{id}/settle");
            let incident: Incident = Site::open(&options)?.verifier.post(&path, &SettleRequest { settlement }).await?;
            let done = match settlement {
                Settlement::AcceptEk => {
                    format!("node {} is the one with EK {}; boot it again", incident.node, incident.ek_sha256)
                }
                Settlement::Keep => format!("EK {} stays refused as node {}", incident.ek_sha256, incident.node),
            };
            output::done(options.output, &done, &incident)
        }
    }
}
