//! Continuous attestation: what this program does in the tenant's operating system after the hand-over. It goes on
//! proving what runs, with the key that was admitted, as often as the verifier asks; it hears of the project's other
//! nodes when they are revoked, so that the keys shared with them are dropped; and it fetches the tenant's secret.
//!
//! ```text
//!            ┌───────────────── no-nonce ────────────────┐
//!            ▼                                           │
//!  state ─▶ challenge ─▶ wait, quote, read IMA ─▶ evidence ─▶ renewed ─▶ wait …
//!                                                        └─▶ revoked ─▶ hooks for itself, end
//! ```
//!
//! A revoked node hears why if the verifier's answer comes before its port is closed, and else asks in vain: nothing
//! depends on its hearing, and what it does about it itself is a courtesy. The others' notices are what counts.
//!
//! Where the project has verifiers of its own, each is attested to in the same way, and what they sign goes with the
//! evidence to the one that leads (`co_verifier`).
//!
//! [`state`] is what the ramdisk handed over, [`verifier`] the calls, [`notices`] the files and hooks that notices become,
//! `secret` what puts the tenant's secret together, [`supervisor`] the word to systemd. An agent that dies is no risk: what is not renewed ends by itself.

mod co_verifier;
pub mod notices;
mod prover;
mod secret;
pub mod state;
pub mod supervisor;
pub mod verifier;

use crate::backoff::Patience;
use crate::client::CallError;
use crate::console::Chain;
use crate::ima::{ImaReadError, MeasurementReader};
use crate::init::peak_memory_kib;
use crate::settings::sha256;
use crate::tee::TeeQuotes;
use crate::tee::tsm::Interface;
use crate::tpm::esapi::EsapiTpm;
use crate::tpm::{Tpm, TpmError};
use assay_tpm::public::Public;
use assay_wire::attestation::{AttestationAnswer, AttestationRequest, RevocationNotice};
use assay_wire::evidence::{QUOTED_PCRS, RuntimeEvidence};
use co_verifier::CoVerifiers;
use notices::{NoticeError, Notices};
use prover::Prover;
use secret::Secrets;
use state::{AttestationState, StateError};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use supervisor::Supervisor;
use tokio::sync::watch;
use tokio::time::Instant;
use verifier::{AttestationClient, Refusal};
use zeroize::Zeroizing;

/// Where things are on the node.
#[derive(Debug, Clone)]
pub struct Places {
    /// Folder of the notices and the secret, in memory.
    pub run: PathBuf,
    /// Folder of the programs that a notice starts.
    pub hooks: PathBuf,
    /// The kernel's runtime measurement list.
    pub measurements: PathBuf,
    /// Where quotes of a trust domain come from.
    pub tee: Interface,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            run: RUN.into(),
            hooks: HOOKS.into(),
            measurements: crate::ima::MEASUREMENTS.into(),
            tee: Interface::default(),
        }
    }
}

/// How attesting ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The verifier has revoked this node, or says that its admission is over.
    Revoked {
        /// Why, in the verifier's words.
        reasons: Vec<String>,
    },
    /// The verifier attests no such admission: it does not do so at all, say. Nobody is cut off for it.
    Unattested {
        /// What it said.
        refusal: String,
    },
}

/// Why the agent cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum AttestationError {
    /// No usable state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The TPM failed.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The verifier's answer is of no use.
    #[error(transparent)]
    Call(#[from] CallError),
    /// TLS could not be set up.
    #[error("preparing TLS to the verifier")]
    Tls(#[from] rustls::Error),
    /// The AK of the state is not a key.
    #[error("reading the attestation key")]
    Ak(#[from] assay_tpm::reader::DecodeError),
    /// The verifier asks for a selection that this agent does not know how to answer.
    #[error("the verifier asks for PCRs {pcrs:?}, but an agent quotes 0 to 14")]
    PcrSelection {
        /// What it asks for.
        pcrs: Vec<u8>,
    },
    /// The measurement list cannot be read.
    #[error(transparent)]
    Measurements(#[from] ImaReadError),
    /// The PCRs never stood still between quote and reading.
    #[error("quoting: PCRs changed between quote and reading {STEADY_ATTEMPTS} times in a row")]
    Unsteady,
    /// A notice could not be written.
    #[error(transparent)]
    Notice(#[from] NoticeError),
}

/// An agent that has loaded its key.
pub struct Attester {
    state: AttestationState,
    client: AttestationClient,
    prover: Prover<EsapiTpm>,
    places: Places,
    supervisor: Supervisor,
    notices: Notices,
    co_verifiers: CoVerifiers,
    secrets: Secrets,
    /// How often the leading verifier has renewed the admission.
    renewals: watch::Sender<u64>,
}

impl Attester {
    /// Loads the AK of `state` into the TPM.
    ///
    /// # Errors
    /// If the TPM does not take it, or TLS cannot be set up.
    pub fn new(state: AttestationState, mut tpm: EsapiTpm, places: Places) -> Result<Self, AttestationError> {
        tpm.load_ak(state.ak.clone())?;
        let client = AttestationClient::leading(&state)?;
        let co_verifiers = CoVerifiers::new(&state.co_verifiers)?;
        let all = std::iter::once(&client).chain(co_verifiers.clients()).cloned().collect();
        let secrets = Secrets::new(all, places.run.join(SECRET));
        let notices = Notices::open(&places.run, &places.hooks)?;
        let node = &state.node;
        tracing::info!(event = "agent.key_loaded", %node, admission = %state.admission, "loaded the attestation key of {node}");
        let tee = TeeQuotes::new(places.tee.clone());
        let prover = Prover::new(tpm, tee, state.ak.public.clone());
        Ok(Self {
            state,
            client,
            prover,
            places,
            supervisor: Supervisor::from_environment(),
            notices,
            co_verifiers,
            secrets,
            renewals: watch::Sender::default(),
        })
    }

    /// Attests until the verifier revokes this node. The verifier, or the way to it, may be away for any time: what
    /// that costs is decided there.
    ///
    /// # Errors
    /// See [`AttestationError`].
    pub async fn run(self) -> Result<Ended, AttestationError> {
        // The first of those who may have given a share is the one that leads.
        let over = |place: usize| self.secrets.withdraw(place + 1);
        let ended = tokio::select! {
            ended = self.attest() => ended?,
            // These never end: a notice that cannot be acted upon, a verifier that does not answer, a share that is
            // missing is logged, and tried again.
            never = self.notices.follow(&self.client) => match never {},
            never = self.co_verifiers.follow(&self.prover, &self.places.measurements, over) => match never {},
            never = self.secrets.keep(&self.prover, self.renewals.subscribe(), &self.supervisor) => match never {},
        };
        match &ended {
            Ended::Revoked { reasons } => {
                for reason in reasons {
                    tracing::error!(event = "agent.revoked", reason, "the verifier revokes this node: {reason}");
                }
                self.supervisor.status("revoked");
                self.drop_own_keys(reasons).await?;
            }
            Ended::Unattested { refusal } => {
                tracing::error!(event = "agent.unattested", "the verifier does not attest this node: {refusal}");
            }
        }
        Ok(ended)
    }

    async fn attest(&self) -> Result<Ended, AttestationError> {
        let mut patience = Patience::default();
        let mut measurements = MeasurementReader::new(&self.places.measurements);
        let mut next: Option<Round> = None;
        loop {
            let round = match next.take() {
                Some(round) => Ok(round),
                None => self.client.challenge().await.map(Round::new),
            };
            let answer = match round {
                Ok(round) => {
                    tokio::time::sleep_until(round.due).await;
                    let supporting = self.co_verifiers.fresh_results().await;
                    let mut evidence = self.prover.evidence(&mut measurements, &round.request)?;
                    evidence.supporting = supporting;
                    self.client.submit(&evidence).await
                }
                Err(error) => Err(error),
            };
            match answer {
                Ok(AttestationAnswer::Renewed { expires_at_ms, next: request, .. }) => {
                    self.renewed(expires_at_ms, &request);
                    patience = Patience::default();
                    next = Some(Round::new(request));
                }
                Ok(AttestationAnswer::Revoked { reasons }) => return Ok(Ended::Revoked { reasons }),
                // In all other cases evidence was not heard, or it is not known whether it was, so its nonce may be
                // used up: another round begins with a challenge.
                Err(error) => match Refusal::of(&error) {
                    Refusal::Away => self.wait_out(&mut patience, &error).await,
                    Refusal::Over => return Ok(Ended::Revoked { reasons: vec![Chain(&error).to_string()] }),
                    Refusal::Unattested => return Ok(Ended::Unattested { refusal: Chain(&error).to_string() }),
                    Refusal::Broken => return Err(error.into()),
                },
            }
        }
    }

    fn renewed(&self, expires_at_ms: i64, request: &AttestationRequest) {
        let renewals = *self.renewals.borrow() + 1;
        self.renewals.send_replace(renewals);
        self.supervisor.status(&format!("renewed {renewals} times"));
        if renewals > 1 {
            tracing::debug!(event = "agent.renewed", renewals, expires_at_ms, "renewed");
            return;
        }
        let (memory, interval) = (peak_memory_kib(), request.after_ms);
        tracing::info!(
            event = "agent.renewed",
            renewals,
            expires_at_ms,
            memory,
            interval,
            "the verifier renewed the admission; next evidence in {interval} ms (I used {memory} KiB at most)"
        );
    }

    /// A revoked node does for itself what the others do about it, and forgets the tenant's secret.
    async fn drop_own_keys(&self, reasons: &[String]) -> Result<(), AttestationError> {
        self.secrets.remove();
        let notice = RevocationNotice {
            sequence: 0,
            node: self.state.node.clone(),
            admission: self.state.admission,
            ak_name: Public::parse(&self.state.ak.public)?.name().to_string(),
            reason: reasons.join("; "),
            at_ms: now_ms(),
        };
        Ok(self.notices.act_upon(&notice).await?)
    }

    async fn wait_out(&self, patience: &mut Patience, error: &CallError) {
        let delay = patience.next_delay(random());
        self.supervisor.status("the verifier does not answer");
        tracing::warn!(event = "agent.retrying", "trying again in {} ms: {}", delay.as_millis(), Chain(error));
        tokio::time::sleep(delay).await;
    }
}

/// Quotes, and reads what explains the quote. The AK must be loaded.
///
/// # Errors
/// The verifier asks for what is not there, or the TPM fails.
pub fn runtime_evidence(
    tpm: &mut dyn Tpm,
    measurements: &mut MeasurementReader,
    request: &AttestationRequest,
) -> Result<RuntimeEvidence, AttestationError> {
    let pcrs = &request.pcrs;
    if !pcrs.iter().copied().eq(QUOTED_PCRS) {
        return Err(AttestationError::PcrSelection { pcrs: pcrs.iter().copied().take(24).collect() });
    }
    for _attempt in 0..STEADY_ATTEMPTS {
        let quote = tpm.quote(&request.nonce, pcrs)?;
        let values = tpm.pcr_read(pcrs)?;
        // The kernel may measure something between the two. A quote ends with the digest of what it quotes
        // (TPM 2.0 Part 2, 10.12.1), so it is plain whether these are the values.
        if !quote.attest.ends_with(&sha256(&values.concat())) {
            continue;
        }
        return Ok(RuntimeEvidence {
            attest: quote.attest,
            signature: quote.signature,
            pcrs: values.iter().map(hex::encode).collect(),
            // After the quote: the list then holds all that PCR 10 does, and the verifier finds where it ends.
            ima: measurements.read_from(request.ima_first_entry)?,
            tee: Vec::new(),
            supporting: Vec::new(),
        });
    }
    Err(AttestationError::Unsteady)
}

/// A nonce, and when the verifier wants it used.
struct Round {
    request: AttestationRequest,
    due: Instant,
}

impl Round {
    fn new(request: AttestationRequest) -> Self {
        let wait = Duration::from_millis(request.after_ms).min(LONGEST_WAIT);
        Self { request, due: Instant::now() + wait }
    }
}

/// Two random octets, for jitter. Without randomness there is no jitter, which is no reason to stop.
fn random() -> u16 {
    use ring::rand::{SecureRandom as _, SystemRandom};
    let mut bytes = Zeroizing::new([0; 2]);
    let _none = SystemRandom::new().fill(&mut *bytes);
    u16::from_be_bytes(*bytes)
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Folder of what is handed over and what is learnt, in memory.
pub const RUN: &str = "/run/assay";
const HOOKS: &str = "/etc/assay/revocation.d";
const SECRET: &str = "secret";
const STEADY_ATTEMPTS: u32 = 20;
/// A verifier may not silence an agent for longer.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
