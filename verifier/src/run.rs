//! Putting the verifier together and running it: files, listeners and tasks are opened here and nowhere else.

use crate::attestation::Attestations;
use crate::config::{Config, EndorserFiles, PeerConfig, Role, SettingsSay};
use crate::identity::anchors::AnchorError;
use crate::identity::{Endorsers, TrustAnchors};
use crate::policy::signature::PolicyKeys;
use crate::release::Releases;
use crate::release::peers::Peers;
use crate::release::reports::Reports;
use crate::secret::{SecretKey, SecretKeyError};
use crate::server::{Slots, Verifier, agent, operator};
use crate::signer::{Signer, SignerError};
use crate::store::verifiers::SharedKeys;
use crate::store::{DbError, VerifierStore};
use crate::tee::{Collateral, FolderError, read_folder};
use crate::webhook::{Webhook, WebhookError};
use assay_service::CancellationToken;
use assay_service::auth::Token;
use assay_service::client::{NewClientError, ServiceClient};
use assay_service::error::chain;
use assay_service::http::{HttpError, Listener, ServiceContext, bind, serve};
use assay_service::store::StoreError;
use assay_service::tls::{SiteIdentity, TlsError};
use axum::Router;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::{JoinError, JoinSet};

/// Why the verifier does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A file that the configuration names.
    #[error("reading {what} {path}")]
    File {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The CAs and their lists.
    #[error("loading {what}")]
    Endorsers {
        /// What they should be.
        what: &'static str,
        /// Why.
        source: AnchorError,
    },
    /// The key that signs results.
    #[error("preparing to sign attestation results")]
    Signer(#[source] SignerError),
    /// The key of tenants' secrets.
    #[error("preparing to keep tenants' secrets")]
    Secrets(#[source] SecretKeyError),
    /// A receiver of events.
    #[error("preparing to deliver events")]
    Webhook(#[source] WebhookError),
    /// The key that agents pin.
    #[error("preparing the agents' listener")]
    Tls(#[source] TlsError),
    /// The database.
    #[error("preparing the verifier's database")]
    Store(#[source] StoreError),
    /// The keys on record.
    #[error("comparing this verifier's keys with its database's")]
    Keys(#[source] DbError),
    /// The journal.
    #[error("resuming the releases")]
    Journal(#[source] DbError),
    /// The database is another verifier's.
    #[error(
        "the database belongs to verifiers whose {what} is {theirs}, but this one's is {ours}: give this one their \
         {file}, or, if that key is lost or was replaced, start once with `accept_new_keys = true`"
    )]
    OtherKeys {
        /// Which key.
        what: &'static str,
        /// What the database says.
        theirs: String,
        /// What this verifier has.
        ours: String,
        /// The file that it is kept in.
        file: String,
    },
    /// The others have taken over.
    #[error("another verifier has the name `{name}`, or the others took this one for dead")]
    Replaced {
        /// This verifier's name.
        name: String,
    },
    /// A file of collateral.
    #[error("reading the TEE collateral")]
    TeeCollateral(#[source] FolderError),
    /// The database does not take the collateral.
    #[error(transparent)]
    KeepCollateral(crate::store::DbError),
    /// Another service's client.
    #[error("preparing to call {peer}")]
    Client {
        /// Whom.
        peer: &'static str,
        /// Why.
        source: NewClientError,
    },
    /// A listener.
    #[error("serving the verifier's API")]
    Http(#[source] HttpError),
    /// A listener's task.
    #[error("a listener of the verifier stopped")]
    Task(#[source] JoinError),
}

/// Runs the verifier until `context.shutdown`.
///
/// # Errors
/// Something that it needs is not there. See [`RunError`].
pub async fn run(config: Config, context: ServiceContext) -> Result<(), RunError> {
    // Bind first, so that a busy port is found before anything is resumed; serve last.
    let sockets = Sockets {
        listen: bind(config.listen).await.map_err(RunError::Http)?,
        agent_listen: bind(config.agent_listen).await.map_err(RunError::Http)?,
    };
    run_on(config, sockets, context).await
}

/// Bound sockets, for who must know the ports before the verifier runs.
#[derive(Debug)]
pub struct Sockets {
    /// The operators' and services' API.
    pub listen: TcpListener,
    /// The agents' API, in the airlock.
    pub agent_listen: TcpListener,
}

/// The identity of the agents' listener, whose key agents pin; made on the first start. netboot must know it.
///
/// # Errors
/// The key cannot be read or made.
pub fn agent_identity(config: &Config, context: &ServiceContext) -> Result<SiteIdentity, TlsError> {
    // The name in the certificate is beside the point: agents pin the key.
    context.identity.with_key("verifier-agent", &[config.agent_listen.ip().to_string()])
}

/// [`run`], on sockets that are bound already; the configuration's addresses are only what it says in the log.
///
/// # Errors
/// Something that it needs is not there. See [`RunError`].
pub async fn run_on(config: Config, sockets: Sockets, context: ServiceContext) -> Result<(), RunError> {
    let _first_start = std::fs::create_dir_all(&config.state_dir);
    let identity = agent_identity(&config, &context).map_err(RunError::Tls)?;
    let agent_context = ServiceContext { identity: Arc::new(identity), ..context.clone() };
    let verifier = assemble(&config, &context, agent_context.identity.key_sha256()).await?;
    let resumed = verifier.releases.resume().await.map_err(RunError::Journal)?;
    match config.role {
        Role::Release => {
            verifier.releases.start_reports(verifier.reports.clone());
            verifier.releases.start_following(verifier.attestations.endings.clone());
        }
        // What it thinks of a boot is for its project; isolation hears it from nobody but the agent. What it follows is
        // the node itself: silence ends what it knows of an admission.
        Role::AppraiseOnly => {}
    }
    verifier.releases.start_membership();
    tracing::info!(
        event = "verifier.ready",
        listen = %config.listen,
        agent_listen = %config.agent_listen,
        result_key = %verifier.signer.public(),
        ek_cas = verifier.endorsers().ek_cas.len(),
        iak_cas = verifier.endorsers().iak_cas.len(),
        resumed,
        "verifier is ready"
    );

    let refreshed = refresh_endorsers(Arc::clone(&verifier), config.endorser_files(), context.shutdown.clone());
    tokio::spawn(refreshed);

    let mut servers = JoinSet::new();
    spawn(&mut servers, Listener::Tls(sockets.listen), operator::router(Arc::clone(&verifier)), &context);
    spawn(&mut servers, Listener::Tls(sockets.agent_listen), agent::router(Arc::clone(&verifier)), &agent_context);
    if let Some(path) = config.agent_socket.clone() {
        spawn(&mut servers, Listener::UnixTls(path), agent::router(Arc::clone(&verifier)), &agent_context);
    }
    let mut ended = Ok(());
    while let Some(server) = servers.join_next().await {
        // One listener down takes the others down: half a verifier is none.
        context.shutdown.cancel();
        let result = server.map_err(RunError::Task).and_then(|served| served.map_err(RunError::Http));
        ended = ended.and(result);
    }
    verifier.releases.stopped().await;
    let replaced = verifier.releases.was_replaced();
    verifier.store.close().await;
    if replaced { Err(RunError::Replaced { name: name_of(&config) }) } else { ended }
}

/// What this verifier is called among those of its database: what the file says, or the machine and the port, which
/// its successor will have as well.
fn name_of(config: &Config) -> String {
    config.name.clone().unwrap_or_else(|| {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{}:{}", host.trim(), config.listen.port())
    })
}

/// Verifiers of one database stand for each other, so agents and relying parties must not be able to tell them apart.
async fn check_keys(config: &Config, store: &VerifierStore, ours: &SharedKeys) -> Result<(), RunError> {
    let theirs = store.shared_keys(ours).await.map_err(RunError::Keys)?;
    if theirs == *ours {
        return Ok(());
    }
    if config.accept_new_keys {
        tracing::warn!(
            event = "verifier.new_keys",
            result_key = ours.result_key,
            "the database has new keys on record"
        );
        return store.replace_shared_keys(ours).await.map_err(RunError::Keys);
    }
    let other = |what, theirs: &str, ours: &str, file: &str| RunError::OtherKeys {
        what,
        theirs: theirs.to_owned(),
        ours: ours.to_owned(),
        file: file.to_owned(),
    };
    Err(if theirs.result_key == ours.result_key {
        other("key for agents", &theirs.agent_key_sha256, &ours.agent_key_sha256, "tls/verifier-agent.key")
    } else {
        other("result key", &theirs.result_key, &ours.result_key, "result-signing.key")
    })
}

async fn assemble(config: &Config, context: &ServiceContext, agent_key: &str) -> Result<Arc<Verifier>, RunError> {
    let endorsers = endorsers(&config.endorser_files())?;
    let tee_collateral = Arc::new(tee_collateral(config.tee_collateral_dir.as_deref())?);
    let signer = Signer::load_or_create(&config.state_dir).map_err(RunError::Signer)?;
    let isolation = client("isolation", &config.isolation, context)?;
    let peers = match &config.imaging {
        Some(imaging) => Peers::new(isolation, client("imaging", imaging, context)?),
        None => Peers::appraising(isolation),
    };
    // What agents' settings say: of us, or of the verifier that leads.
    let ours = || SettingsSay { verifier: config.agent_url.clone(), key_sha256: agent_key.to_owned() };
    let told = config.settings_say.clone().unwrap_or_else(ours);
    let store = VerifierStore::open(&config.database, config.limits).await.map_err(RunError::Store)?;
    let store = store.named(&name_of(config)).trusting(PolicyKeys::new(config.policy_keys.clone()));
    let keys = SharedKeys { result_key: signer.public().to_string(), agent_key_sha256: agent_key.to_owned() };
    check_keys(config, &store, &keys).await?;
    store.keep_collateral(&tee_collateral, context.clock.now_ms()).await.map_err(RunError::KeepCollateral)?;
    let releases = Releases::new(
        store.clone(),
        peers.clone(),
        Arc::clone(&context.clock),
        config.release,
        context.shutdown.clone(),
    );
    let clock = &context.clock;
    for webhook in &config.webhooks {
        let webhook = Webhook::open(webhook).map_err(RunError::Webhook)?;
        webhook.start(store.clone(), Arc::clone(clock), context.shutdown.clone(), releases.tasks());
    }
    let attestations =
        Attestations::start(&store, &peers, clock, config.attestation, &context.shutdown, releases.tasks());
    Ok(Arc::new(Verifier {
        store,
        attestations,
        secrets: SecretKey::load_or_create(&config.state_dir).map_err(RunError::Secrets)?,
        continuous: config.continuous,
        releases,
        reports: Reports::default(),
        peers,
        endorsers: RwLock::new(Arc::new(endorsers)),
        ek_binding: config.ek_binding,
        tee_collateral,
        signer,
        clock: Arc::clone(&context.clock),
        times: config.session,
        result_lifetime: config.result_lifetime,
        agent_url: told.verifier.clone(),
        agent_key_sha256: told.key_sha256.clone(),
        role: config.role,
        co_verifiers: config.co_verifiers.clone(),
        slots: Slots::default(),
    }))
}

/// Reads the CAs and their lists.
fn endorsers(files: &EndorserFiles) -> Result<Endorsers, RunError> {
    let all = |what: &'static str, paths: &[PathBuf]| {
        paths.iter().map(|path| read(what, path)).collect::<Result<Vec<_>, _>>()
    };
    let failed = |what| move |source| RunError::Endorsers { what, source };
    let (eks, crls): (Vec<_>, Vec<_>) =
        (all("the EK CA file", &files.ek_cas)?, all("the EK CRL file", &files.ek_crls)?);
    let iaks = all("the IAK CA file", &files.iak_cas)?;
    let ek_cas = TrustAnchors::from_pems(&eks).map_err(failed("the CAs of EK certificates"))?;
    Ok(Endorsers {
        ek_cas: ek_cas.with_crls(&crls).map_err(failed("the revocation lists of EK certificates"))?,
        iak_cas: TrustAnchors::from_pems(&iaks).map_err(failed("the CAs of IAK certificates"))?,
    })
}

/// Reads the files anew every few minutes: revocation lists are short-lived, and who is revoked must not wait for a
/// restart. Files that cannot be read leave what was read before, whose lists go stale and then close.
async fn refresh_endorsers(verifier: Arc<Verifier>, files: EndorserFiles, shutdown: CancellationToken) {
    while shutdown.run_until_cancelled(tokio::time::sleep(REFRESH)).await.is_some() {
        let files = files.clone();
        match tokio::task::spawn_blocking(move || endorsers(&files)).await {
            Ok(Ok(fresh)) => verifier.set_endorsers(fresh),
            Ok(Err(error)) => {
                tracing::error!(event = "endorsers.unreadable", cause = chain(&error), "the EK CAs stay as they were");
            }
            Err(error) => {
                tracing::error!(event = "endorsers.unreadable", cause = chain(&error), "the EK CAs stay as they were");
            }
        }
    }
}

/// Read once: an operator who renews the files starts the verifier again.
fn tee_collateral(folder: Option<&Path>) -> Result<Collateral, RunError> {
    folder.map_or_else(|| Ok(Collateral::default()), |folder| read_folder(folder).map_err(RunError::TeeCollateral))
}

fn client(peer: &'static str, config: &PeerConfig, context: &ServiceContext) -> Result<ServiceClient, RunError> {
    let token = read("the bearer token", &config.token_file)?;
    let ca_pem = match &config.ca_file {
        Some(path) => String::from_utf8_lossy(&read("the CA file", path)?).into_owned(),
        None => context.identity.ca_pem().to_owned(),
    };
    let token = Token::from_text(&String::from_utf8_lossy(&token));
    ServiceClient::new(config.url.clone(), &ca_pem, token).map_err(|source| RunError::Client { peer, source })
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, RunError> {
    std::fs::read(path).map_err(|source| RunError::File { what, path: path.to_owned(), source })
}

fn spawn(servers: &mut JoinSet<Result<(), HttpError>>, listener: Listener, router: Router, context: &ServiceContext) {
    let context = context.clone();
    servers.spawn(async move { serve(listener, router, &context).await });
}

/// Revocation lists live for hours at least.
const REFRESH: Duration = Duration::from_secs(5 * 60);
