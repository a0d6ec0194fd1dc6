//! A fleet of soft nodes against a real verifier process: how many it carries, how fast, with how much memory.
//!
//! The nodes' signatures, logs and conversations are real; their TPMs are keys in this process, because real ones sign
//! too slowly to matter. isolation and imaging are scripted ([`peers`]); the real ones are what the other scenarios run.
//! Generator and verifier share one machine, so the figures are of both together.

mod admitted;
mod cli;
mod connection;
mod figures;
mod node;
mod peers;
mod verifier;

use crate::error::{LabError, Result};
use assay_tpm::soft_keys::Maker;
use assay_wire::agent::{AgentSettings, Verdict};
use connection::{CallFailed, Connection};
use figures::{Recorder, Usage};
use node::{Admitted, Firmware, Pushed, Session, SoftNode, a_moment};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use admitted::{Answer, FleetNode};
pub use cli::FleetArguments;
pub use figures::Latency;
pub use peers::{Renewed, ScriptedPeers};
pub use verifier::{VerifierOptions, VerifierProcess};

/// What to run.
#[derive(Debug, Clone)]
pub struct FleetOptions {
    /// The `assay` binary.
    pub assay: PathBuf,
    /// Where the verifier keeps its files.
    pub folder: PathBuf,
    /// `postgres:` URL, instead of SQLite.
    pub database: Option<String>,
    /// How many nodes.
    pub nodes: usize,
    /// Time between two attestations of a node.
    pub interval: Duration,
    /// How long to measure, once all nodes are admitted.
    pub duration: Duration,
    /// Nodes that enrol at the same time.
    pub enrolling: usize,
    /// Whether nodes keep their connections open between two attestations.
    pub keep_connections: bool,
}

/// How far a run is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// How much of it is done.
    pub done: u64,
    /// Of how much.
    pub of: u64,
}

/// What a run does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Nodes enrol and are released.
    Admitting,
    /// All are admitted; seconds are counted.
    Measuring,
}

/// What a run measured.
#[derive(Debug, Clone, Serialize)]
pub struct FleetReport {
    /// Nodes that were admitted.
    pub nodes: u64,
    /// Nodes that were not.
    pub failed: u64,
    /// Seconds between two attestations of a node.
    pub interval_seconds: f64,
    /// Whether connections were kept.
    pub keep_connections: bool,
    /// What the verifier kept its records in.
    pub database: &'static str,
    /// Nodes admitted a second, from enrolment to hand-over.
    pub admitted_per_second: f64,
    /// From the first call to the hand-over, waits included.
    pub admission: Latency,
    /// Seconds that were measured.
    pub measured_seconds: f64,
    /// Attestations a second in that time.
    pub pushes_per_second: f64,
    /// From the beginning of a push, connection included, to its answer.
    pub push: Latency,
    /// Calls that the verifier put off because it had too much to do; each came again.
    pub put_off: u64,
    /// Pushes that could not be sent before the next was due: the generator, or an answer, was too slow.
    pub late: u64,
    /// Everything else that went wrong, counted by its word.
    pub errors: BTreeMap<String, u64>,
    /// Renewed results that reached isolation and imaging.
    pub renewals_passed_on: u64,
    /// What the verifier used in the measured time: cores.
    pub verifier_cores: f64,
    /// Microseconds of the verifier's CPU time an attestation.
    pub verifier_cpu_us_per_push: f64,
    /// Its memory at the end.
    pub verifier_rss_mib: f64,
    /// Its memory at most.
    pub verifier_peak_rss_mib: f64,
    /// What this tool used, nodes and scripted peers together: cores.
    pub generator_cores: f64,
}

/// What a site is made of.
#[derive(Debug, Clone)]
pub struct SiteOptions {
    /// The `assay` binary.
    pub assay: PathBuf,
    /// Where peers and verifiers keep their files; what is there goes.
    pub folder: PathBuf,
    /// `postgres:` URL, instead of SQLite in each verifier's folder.
    pub database: Option<String>,
    /// How often nodes are to attest, in seconds.
    pub interval_seconds: u64,
    /// PEM of further CAs of EK certificates, beside the soft TPMs' own.
    pub more_ek_cas: Vec<u8>,
}

/// A site that nodes can be admitted to: peers, a verifier that trusts their firmware, and a maker of TPMs.
pub struct FleetSite {
    /// isolation and imaging.
    pub peers: ScriptedPeers,
    /// How verifiers are started.
    pub options: VerifierOptions,
    maker: Maker,
    firmware: Firmware,
}

impl FleetSite {
    /// Starts peers and a first verifier, and has it trust the fleet's firmware: learnt from a node, then approved.
    ///
    /// # Errors
    /// Something does not start, or the policy is not accepted.
    pub async fn start(options: SiteOptions) -> Result<(Self, VerifierProcess)> {
        let SiteOptions { assay, folder, database, interval_seconds, more_ek_cas } = options;
        // What an earlier run left there tells of nodes that are gone.
        let _was_there = std::fs::remove_dir_all(&folder);
        let maker = Maker::new();
        let peers = ScriptedPeers::start(&folder.join("peers")).await?;
        let ek_ca_pem = [maker.ca_pem(), more_ek_cas].concat();
        let options = VerifierOptions { assay, folder, database, interval_seconds, ek_ca_pem };
        let verifier = VerifierProcess::start("v1", &options, &peers, None, "").await?;
        let site = Self { peers, options, maker, firmware: Firmware::new() };
        site.trust_the_firmware(&verifier).await?;
        Ok((site, verifier))
    }

    async fn trust_the_firmware(&self, verifier: &VerifierProcess) -> Result<()> {
        let doing = "teaching the verifier the fleet's firmware";
        let nodes = self.nodes(verifier, false).await?;
        let mut teacher = nodes.make(self, "teacher", 0)?;
        let unexpected = |failed: CallFailed| LabError::unexpected(doing, format!("{failed:?}"));
        let session = teacher.enrol().await.map_err(unexpected)?;
        match teacher.attest(&session, &self.firmware).await.map_err(unexpected)? {
            Verdict::Rejected { .. } => {}
            Verdict::Accepted | Verdict::Affirmed { .. } => {
                return Err(LabError::unexpected(doing, "accepted without a policy"));
            }
        }
        let folder = &self.options.folder;
        let (values, draft) = (folder.join("reference-values.json"), folder.join("policy.toml"));
        std::fs::write(&values, self.firmware.reference_values.to_string())
            .map_err(LabError::io(format!("writing {}", values.display())))?;
        let (values, draft) = (values.display().to_string(), draft.display().to_string());
        verifier.client(&["policy", "learn", "teacher", "--artefacts", &values, "--out", &draft]).await?;
        verifier.client(&["policy", "approve", &draft]).await?;
        Ok(())
    }

    /// What nodes need to know to call `verifier`.
    async fn nodes(&self, verifier: &VerifierProcess, keep_connections: bool) -> Result<NodeFactory> {
        #[derive(serde::Deserialize)]
        struct Keys {
            agent_url: String,
            agent_key_sha256: String,
        }
        let doing = "asking the verifier for its keys";
        let keys: Keys = verifier.operator()?.get("/v1/key").await.map_err(LabError::service(doing))?;
        let tls = assay_service::tls::client_config(&verifier.ca_pem()?).map_err(LabError::service(doing))?;
        Ok(NodeFactory {
            agent_url: keys.agent_url,
            agent_key_sha256: keys.agent_key_sha256,
            verifier: verifier.agent_address,
            tls: Arc::new(tls),
            keep_connections,
        })
    }

    /// Admits one node, from enrolment to hand-over, by the first of `verifiers`; when one does not answer any more, by the
    /// next.
    ///
    /// # Errors
    /// The node is not admitted in time.
    pub async fn admit_one(&self, name: &str, verifiers: &[&VerifierProcess]) -> Result<FleetNode> {
        let doing = format!("admitting {name}");
        let Some(first) = verifiers.first() else { return Err(LabError::unexpected(doing, "no verifier is given")) };
        let addresses: Vec<_> = verifiers.iter().map(|verifier| verifier.agent_address).collect();
        let nodes = self.nodes(first, false).await?;
        let mut node = nodes.make(self, name, 1)?;
        let session = node.enrol().await.map_err(|failed| LabError::unexpected(&*doing, format!("{failed:?}")))?;
        let verdict = node.attest(&session, &self.firmware).await;
        // A verifier that dies with the verdict written leaves the answer to another: asked again in the same words.
        if let Ok(Verdict::Rejected { reasons }) = verdict {
            return Err(LabError::unexpected(doing, reasons.join("; ")));
        }
        let (deadline, mut whom) = (Instant::now() + RELEASE_LIMIT, 0_usize);
        loop {
            let address = addresses[whom % addresses.len()];
            match node.release(&session, |connection| connection.turn_to(address)).await {
                Ok(admitted) => return Ok(FleetNode::new(node, admitted)),
                Err(failed) if Instant::now() >= deadline => {
                    return Err(LabError::unexpected(doing, format!("{failed:?}")));
                }
                // Whom one cannot reach one does not ask again.
                Err(CallFailed::Broken(_)) => whom = whom.wrapping_add(1),
                Err(_again) => tokio::time::sleep(ASK_AGAIN).await,
            }
        }
    }
}

struct NodeFactory {
    agent_url: String,
    agent_key_sha256: String,
    verifier: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    keep_connections: bool,
}

impl NodeFactory {
    fn make(&self, site: &FleetSite, name: &str, index: usize) -> Result<SoftNode> {
        let settings = self.settings(name)?;
        let connection =
            Connection::new(self.verifier, address_of(index), Arc::clone(&self.tls), self.keep_connections);
        Ok(SoftNode::boot(site.maker.manufacture(), &site.firmware, &settings, connection))
    }

    fn settings(&self, name: &str) -> Result<AgentSettings> {
        Ok(AgentSettings {
            node: name.parse().map_err(LabError::service(format!("naming the node {name}")))?,
            verifier: self.agent_url.clone(),
            verifier_key_sha256: self.agent_key_sha256.clone(),
        })
    }
}

/// A loopback address of the node's own: verifiers limit connections by address.
fn address_of(index: usize) -> Ipv4Addr {
    let octet = |value: usize| u8::try_from(value % 250).unwrap_or(0);
    Ipv4Addr::new(127, 1 + octet(index / 62_500), octet(index / 250), 1 + octet(index))
}

/// Runs a fleet and measures it.
///
/// # Errors
/// The verifier does not start or ends, or no node can be admitted.
pub async fn run(options: FleetOptions, tell: impl Fn(Progress)) -> Result<FleetReport> {
    let made_of = SiteOptions {
        assay: options.assay.clone(),
        folder: options.folder.clone(),
        database: options.database.clone(),
        interval_seconds: options.interval.as_secs().max(1),
        more_ek_cas: Vec::new(),
    };
    let (site, verifier) = FleetSite::start(made_of).await?;
    let nodes = site.nodes(&verifier, options.keep_connections).await?;
    let fleet = Arc::new(Fleet {
        site,
        recorder: Recorder::default(),
        enrolling: Semaphore::new(options.enrolling.max(1)),
        stop: CancellationToken::new(),
        interval: options.interval,
        nodes: options.nodes,
    });
    let tasks = TaskTracker::new();
    let started = Instant::now();
    for index in 0..options.nodes {
        let node = nodes.make(&fleet.site, &format!("n{index:05}"), index)?;
        tasks.spawn(live(Arc::clone(&fleet), node, index));
    }
    tasks.close();
    let admitting_seconds = fleet.admitted(started, &verifier, &tell).await?;
    let measured = fleet.measured(options.duration, &verifier, &tell).await?;
    fleet.stop.cancel();
    tasks.wait().await;
    Ok(fleet.report(&options, admitting_seconds, &measured))
}

/// What all nodes share.
struct Fleet {
    site: FleetSite,
    recorder: Recorder,
    enrolling: Semaphore,
    stop: CancellationToken,
    interval: Duration,
    nodes: usize,
}

/// What the two processes used in the measured time.
struct Measured {
    seconds: f64,
    verifier: Usage,
    verifier_cpu_seconds: f64,
    generator_cpu_seconds: f64,
}

impl Fleet {
    /// Waits until every node is admitted or has failed. Answers how long that took, in seconds.
    async fn admitted(&self, started: Instant, verifier: &VerifierProcess, tell: &impl Fn(Progress)) -> Result<f64> {
        let of = u64::try_from(self.nodes).unwrap_or(u64::MAX);
        loop {
            let admitted = self.recorder.admitted.load(Ordering::Relaxed);
            let failed = self.recorder.failed.load(Ordering::Relaxed);
            tell(Progress { stage: Stage::Admitting, done: admitted + failed, of });
            if admitted + failed >= of {
                if admitted == 0 {
                    let errors = self.recorder.errors();
                    return Err(LabError::unexpected("admitting the fleet", format!("no node was: {errors:?}")));
                }
                return Ok(started.elapsed().as_secs_f64());
            }
            running(verifier)?;
            tokio::time::sleep(TELL_EVERY).await;
        }
    }

    async fn measured(
        &self,
        duration: Duration,
        verifier: &VerifierProcess,
        tell: &impl Fn(Progress),
    ) -> Result<Measured> {
        // Nodes admitted last have to come into step first.
        tokio::time::sleep(SETTLE.min(self.interval)).await;
        let pid = running(verifier)?;
        let (own, before, own_before) = (std::process::id(), Usage::of(pid), Usage::of(std::process::id()));
        self.recorder.measuring.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        while begun.elapsed() < duration {
            tell(Progress { stage: Stage::Measuring, done: begun.elapsed().as_secs(), of: duration.as_secs() });
            tokio::time::sleep(TELL_EVERY.min(duration.saturating_sub(begun.elapsed()))).await;
            running(verifier)?;
        }
        self.recorder.measuring.store(false, Ordering::Relaxed);
        let (seconds, after, own_after) = (begun.elapsed().as_secs_f64(), Usage::of(pid), Usage::of(own));
        Ok(Measured {
            seconds,
            verifier: after,
            verifier_cpu_seconds: after.cpu_seconds - before.cpu_seconds,
            generator_cpu_seconds: own_after.cpu_seconds - own_before.cpu_seconds,
        })
    }

    fn report(&self, options: &FleetOptions, admitting_seconds: f64, measured: &Measured) -> FleetReport {
        let (push, nodes) = (self.recorder.pushes(), self.recorder.admitted.load(Ordering::Relaxed));
        #[expect(clippy::cast_precision_loss, reason = "a figure has three digits that count")]
        let (pushes, admitted) = (push.count as f64, nodes as f64);
        FleetReport {
            nodes,
            failed: self.recorder.failed.load(Ordering::Relaxed),
            interval_seconds: options.interval.as_secs_f64(),
            keep_connections: options.keep_connections,
            database: if options.database.is_some() { "postgresql" } else { "sqlite" },
            admitted_per_second: admitted / admitting_seconds,
            admission: self.recorder.enrolments(),
            measured_seconds: measured.seconds,
            pushes_per_second: pushes / measured.seconds,
            push,
            put_off: self.recorder.put_off.load(Ordering::Relaxed),
            late: self.recorder.late.load(Ordering::Relaxed),
            errors: self.recorder.errors(),
            renewals_passed_on: self.site.peers.renewals(),
            verifier_cores: measured.verifier_cpu_seconds / measured.seconds,
            verifier_cpu_us_per_push: measured.verifier_cpu_seconds * 1e6 / pushes.max(1.0),
            verifier_rss_mib: measured.verifier.rss_mib,
            verifier_peak_rss_mib: measured.verifier.peak_rss_mib,
            generator_cores: measured.generator_cpu_seconds / measured.seconds,
        }
    }
}

fn running(verifier: &VerifierProcess) -> Result<u32> {
    verifier.pid().ok_or_else(|| LabError::unexpected("running the fleet", "the verifier has ended"))
}

/// One node's life.
async fn live(fleet: Arc<Fleet>, mut node: SoftNode, index: usize) {
    let recorder = &fleet.recorder;
    let admitted = {
        let Ok(_turn) = fleet.enrolling.acquire().await else { return };
        let begun = Instant::now();
        let admitted = admit(&fleet, &mut node, index).await;
        recorder.enrolment(begun.elapsed());
        admitted
    };
    match admitted {
        Some(admitted) => {
            Recorder::count(&recorder.admitted);
            tokio::select! {
                () = attest(&fleet, &mut node, &admitted, index) => {}
                () = fleet.stop.cancelled() => {}
            }
        }
        None => Recorder::count(&recorder.failed),
    }
}

async fn admit(fleet: &Fleet, node: &mut SoftNode, index: usize) -> Option<Admitted> {
    let recorder = &fleet.recorder;
    for attempt in 0..MOST_ATTEMPTS {
        match try_admit(fleet, node, index).await {
            Ok(admitted) => return Some(admitted),
            Err(failed) if failed.asks_to_come_again() => Recorder::count(&recorder.put_off),
            Err(failed) => recorder.error(format!("admission: {}", failed.word())),
        }
        tokio::time::sleep(a_moment(attempt, index)).await;
    }
    None
}

async fn try_admit(fleet: &Fleet, node: &mut SoftNode, index: usize) -> std::result::Result<Admitted, CallFailed> {
    let session = node.enrol().await?;
    let firmware = &fleet.site.firmware;
    let verdict = accepted(fleet, node, &session, firmware, index).await?;
    match verdict {
        Verdict::Accepted => node.release(&session, |_| {}).await,
        Verdict::Rejected { reasons } => Err(CallFailed::Broken(format!("rejected: {}", reasons.join("; ")))),
        Verdict::Affirmed { .. } => Err(CallFailed::Broken("the verifier begins no releases".to_owned())),
    }
}

/// Sends evidence, again while the verifier has too much to do: the nonce is still good.
async fn accepted(
    fleet: &Fleet,
    node: &mut SoftNode,
    session: &Session,
    firmware: &Firmware,
    index: usize,
) -> std::result::Result<Verdict, CallFailed> {
    let mut attempt = 0;
    loop {
        match node.attest(session, firmware).await {
            Err(failed) if failed.asks_to_come_again() && attempt < MOST_ATTEMPTS => {
                Recorder::count(&fleet.recorder.put_off);
                tokio::time::sleep(a_moment(attempt, index)).await;
                attempt += 1;
            }
            answered => return answered,
        }
    }
}

/// Attests at the interval, until the admission ends.
async fn attest(fleet: &Fleet, node: &mut SoftNode, admitted: &Admitted, index: usize) {
    let recorder = &fleet.recorder;
    let share = u32::try_from(index).unwrap_or(0);
    let of = u32::try_from(fleet.nodes).unwrap_or(u32::MAX).max(1);
    let mut due = tokio::time::Instant::now() + fleet.interval * share / of;
    let mut nonce: Option<Vec<u8>> = None;
    let mut failures = 0;
    loop {
        tokio::time::sleep_until(due).await;
        let begun = Instant::now();
        let pushed = match nonce.take() {
            Some(nonce) => node.push(admitted, &nonce).await,
            None => match node.challenge(admitted).await {
                Ok(request) => {
                    nonce = Some(request.nonce);
                    continue;
                }
                Err(failed) => Err(failed),
            },
        };
        match pushed {
            Ok(Pushed::Renewed(next)) => {
                recorder.pushed(begun.elapsed());
                (nonce, failures) = (Some(next.nonce), 0);
                due += fleet.interval;
                let now = tokio::time::Instant::now();
                if due < now {
                    Recorder::count(&recorder.late);
                    due = now;
                }
            }
            Ok(Pushed::Revoked(reasons)) => {
                recorder.error(format!("revoked: {}", reasons.join("; ")));
                return;
            }
            Err(failed) => {
                if failed.asks_to_come_again() {
                    Recorder::count(&recorder.put_off);
                } else if !failed.is("no-nonce") {
                    recorder.error(format!("push: {}", failed.word()));
                }
                failures += 1;
                due = tokio::time::Instant::now() + a_moment(failures, index);
            }
        }
    }
}

/// How long one node's release may take, the death of a verifier included.
const RELEASE_LIMIT: Duration = Duration::from_secs(90);
const ASK_AGAIN: Duration = Duration::from_millis(250);
const TELL_EVERY: Duration = Duration::from_millis(200);
const SETTLE: Duration = Duration::from_secs(5);
const MOST_ATTEMPTS: u32 = 100;
