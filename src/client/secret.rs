//! `assay secret`.

use super::{BoxError, Options, Site, output};
use assay_service::secret_file;
use assay_wire::attestation::{SecretRequest, split_secret};
use assay_wire::id::LeaseId;
use clap::{Args, Subcommand};
use std::fs;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum SecretCommand {
    /// Give the node of a lease a secret: it gets it sealed to its TPM, once its system has shown good evidence
    #[command(after_help = "It takes the project's own token: ASSAY_TOKEN, or the token file of the site's folder.\n\
                      With --split no single verifier has the secret: each gets one share, and the node joins them.")]
    Put(PutArguments),
    /// Forget the secret of a lease; what a node has fetched already, it has
    Forget {
        /// The lease
        lease: LeaseId,
        #[command(flatten)]
        options: Options,
    },
}

#[derive(Debug, Args)]
pub(crate) struct PutArguments {
    /// The lease
    lease: LeaseId,
    /// The file with the secret; 64 KiB at most
    #[arg(long)]
    file: PathBuf,
    /// Folder of another verifier's site, with `client.toml` and a token of the project there: it gets a share, too
    #[arg(long, value_name = "SITE")]
    split: Vec<PathBuf>,
    #[command(flatten)]
    options: Options,
}

pub(crate) async fn run(command: SecretCommand) -> Result<(), BoxError> {
    match command {
        SecretCommand::Put(arguments) => put(arguments).await,
        SecretCommand::Forget { lease, options } => {
            let path = format!("/v1/leases/{lease}/secret");
            Site::open(&options)?.verifier.delete::<_, ()>(&path, &()).await?;
            output::done(options.output, &format!("the secret of lease {lease} is forgotten"), &lease)
        }
    }
}

async fn put(PutArguments { lease, file, split, options }: PutArguments) -> Result<(), BoxError> {
    let secret = fs::read(&file).map_err(|cause| format!("reading the secret {}: {cause}", file.display()))?;
    let mut sites = vec![Site::open(&options)?];
    for folder in &split {
        sites.push(Site::in_folder(folder)?);
    }
    let shares = u8::try_from(sites.len()).map_err(|_| "a secret has at most 255 shares")?;
    let masks = split.iter().map(|_| random(secret.len())).collect();
    let parts = split_secret(&secret, masks).ok_or("splitting the secret: the shares differ in length")?;
    let path = format!("/v1/leases/{lease}/secret");
    for (site, share) in sites.iter().zip(parts) {
        site.verifier.put::<_, ()>(&path, &SecretRequest { share, shares }).await?;
    }
    let kept = match shares {
        1 => "the verifier".to_owned(),
        shares => format!("{shares} verifiers, a share each"),
    };
    let told = serde_json::json!({ "lease": lease, "shares": shares });
    output::done(options.output, &format!("the secret of lease {lease} is with {kept}"), &told)
}

fn random(octets: usize) -> Vec<u8> {
    let mut random = Vec::with_capacity(octets);
    while random.len() < octets {
        random.extend_from_slice(&secret_file::random::<32>());
    }
    random.truncate(octets);
    random
}
