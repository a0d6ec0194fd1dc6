//! The conversation with the verifier ([`assay_wire::agent`]), one type per state. Each step consumes its state, so
//! evidence cannot go before activation, nor a grant be fetched before the node has moved:
//!
//! ```text
//! Session::enrol ─▶ Challenged ─activate▶ Activated ─send_evidence▶ Accepted ─await_release▶ Released
//!                                                                                               │ ready
//!                                       handover ◀─ Granted ◀─fetch_grant─ Moved ◀──────────────┘
//! ```

use crate::attestation::state::{AttestationState, CoAttestation};
use crate::backoff::retry;
use crate::client::{CallError, Client};
use crate::pin::KeyPin;
use crate::settings::{MeasuredSettings, verifier_address};
use crate::tee::TeeQuotes;
use crate::tpm::{AttesterKeys, SavedAk, Tpm, TpmError};
use assay_tpm::seal::{SealError, open_grant};
use assay_wire::agent::{
    ActivateRequest, CoVerifier, Credential, EnrolChallenge, EnrolRequest, EvidenceRequest, Grant, ReleaseStatus,
    SealedGrant, TenantAddress, Verdict,
};
use assay_wire::agreement::{MAX_SUPPORTING, may_be_result};
use assay_wire::evidence::{AgentMeasurement, Evidence, QUOTED_PCRS};
use assay_wire::id::{AdmissionId, NodeId, SessionId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::time::Instant;
use zeroize::Zeroizing;

/// How long one step is retried while the verifier, or the network to it, is away. It may restart meanwhile.
pub const STEP_LIMIT: Duration = Duration::from_secs(120);

/// How long a release may take, from verdict to the word to move.
pub const RELEASE_LIMIT: Duration = Duration::from_secs(300);

/// A verifier that answers `pending` at once is asked again only after this long.
const RELEASE_POLL_INTERVAL: Duration = Duration::from_millis(250);

/// How long a project's verifier is waited for: well below the life of the leading verifier's nonce.
const CO_VERIFIER_LIMIT: Duration = Duration::from_secs(30);

/// The verifier takes this many PCRs at most from the SHA-256 bank.
const MAX_PCRS: usize = 24;

/// What is common to all states: whom we talk to, and about which session.
#[derive(Clone)]
pub struct Session {
    client: Client,
    id: SessionId,
    /// The project's verifiers that affirmed this boot and go on attesting it.
    co_verifiers: Vec<CoAttestation>,
}

impl Session {
    /// Introduces the node's keys.
    ///
    /// # Errors
    /// If the verifier refuses or cannot be reached.
    pub async fn enrol(client: Client, request: &EnrolRequest) -> Result<Challenged, SessionError> {
        let challenge: EnrolChallenge =
            retry("the verifier to enrol with", STEP_LIMIT, CallError::is_transient, async || {
                client.post("/agent/v1/enrol", request).await
            })
            .await?;
        let session = Self { client, id: challenge.session, co_verifiers: Vec::new() };
        Ok(Challenged { session, credential: challenge.credential })
    }

    /// The session's identifier.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.id
    }

    fn path(&self, call: &str) -> String {
        format!("/agent/v1/sessions/{}/{call}", self.id)
    }

    async fn post<B: Serialize, T: DeserializeOwned>(&self, call: &str, body: &B) -> Result<T, CallError> {
        let path = self.path(call);
        retry(&format!("the verifier to answer {call}"), STEP_LIMIT, CallError::is_transient, async || {
            self.client.post(&path, body).await
        })
        .await
    }

    async fn get<T: DeserializeOwned>(&self, call: &str) -> Result<T, CallError> {
        let path = self.path(call);
        retry(&format!("the verifier to answer {call}"), STEP_LIMIT, CallError::is_transient, async || {
            self.client.get(&path).await
        })
        .await
    }
}

/// Builds the request of [`Session::enrol`].
#[must_use]
pub fn enrol_request(node: NodeId, keys: &AttesterKeys) -> EnrolRequest {
    EnrolRequest {
        node,
        ek_public: keys.ek_public.clone(),
        ek_certificate: keys.ek_certificate.clone(),
        ek_chain: keys.ek_chain.clone(),
        iak: None,
        ak_public: keys.ak_public.clone(),
    }
}

/// The verifier sent a credential to activate.
pub struct Challenged {
    session: Session,
    credential: Credential,
}

impl Challenged {
    /// Opens the credential with the TPM and proves it.
    ///
    /// # Errors
    /// If the credential is not for this TPM, or the verifier refuses.
    pub async fn activate(self, tpm: &mut dyn Tpm) -> Result<Activated, SessionError> {
        let secret = tpm.activate_credential(&self.credential)?;
        let proof = Zeroizing::new(hex::encode(&*secret));
        let mut session = self.session;
        session.client.set_bearer(proof.clone());
        let body = ActivateRequest { proof: proof.to_string() };
        let request = session.post("activate", &body).await?;
        Ok(Activated { session, request })
    }

    /// The credential as the verifier sent it.
    #[must_use]
    pub fn credential(&self) -> &Credential {
        &self.credential
    }
}

/// The verifier knows this TPM, and wants Evidence.
pub struct Activated {
    session: Session,
    request: EvidenceRequest,
}

impl Activated {
    /// What the verifier asks for.
    #[must_use]
    pub fn request(&self) -> &EvidenceRequest {
        &self.request
    }

    /// Quotes what the verifier asks for, and puts beside it what explains it.
    ///
    /// # Errors
    /// If the verifier asks for PCRs that are not there, or the TPM refuses.
    pub fn quote(
        &self,
        tpm: &mut dyn Tpm,
        event_log: Vec<u8>,
        measurements: Vec<AgentMeasurement>,
    ) -> Result<Evidence, SessionError> {
        let pcrs = &self.request.pcrs;
        if !pcrs.iter().copied().eq(QUOTED_PCRS) || pcrs.len() > MAX_PCRS {
            return Err(SessionError::PcrSelection { pcrs: pcrs.iter().copied().take(MAX_PCRS).collect() });
        }
        let quote = tpm.quote(&self.request.nonce, pcrs)?;
        let values = tpm.pcr_read(pcrs)?;
        Ok(Evidence {
            attest: quote.attest,
            signature: quote.signature,
            pcrs: values.iter().map(hex::encode).collect(),
            event_log,
            agent_measurements: measurements,
            ima: None,
            tee: Vec::new(),
            supporting: Vec::new(),
        })
    }

    /// Sends Evidence and waits for the verdict.
    ///
    /// # Errors
    /// [`SessionError::Rejected`] with the verifier's reasons, or what was in the way.
    pub async fn send_evidence(self, evidence: &Evidence) -> Result<Accepted, SessionError> {
        match self.session.post("evidence", evidence).await? {
            Verdict::Accepted => Ok(Accepted { session: self.session }),
            Verdict::Rejected { reasons } => Err(SessionError::Rejected { reasons }),
            Verdict::Affirmed { .. } => Err(SessionError::NoRelease),
        }
    }
}

/// The verdict was good; the release is on its way.
pub struct Accepted {
    session: Session,
}

impl Accepted {
    /// Polls until the node may move.
    ///
    /// # Errors
    /// If the release is undone, takes too long, or the verifier is away for too long.
    pub async fn await_release(self) -> Result<Released, SessionError> {
        let deadline = Instant::now() + RELEASE_LIMIT;
        loop {
            let asked = Instant::now();
            match self.session.get("release").await? {
                ReleaseStatus::Move(address) => return Ok(Released { session: self.session, address }),
                ReleaseStatus::Aborted { reason } => return Err(SessionError::Aborted { reason }),
                ReleaseStatus::Pending if asked >= deadline => return Err(SessionError::ReleaseTimeout),
                ReleaseStatus::Pending => tokio::time::sleep_until(asked + RELEASE_POLL_INTERVAL).await,
            }
        }
    }
}

/// All is prepared; the node knows its next address.
pub struct Released {
    session: Session,
    address: TenantAddress,
}

impl Released {
    /// The address to take after [`Released::ready`].
    #[must_use]
    pub fn address(&self) -> &TenantAddress {
        &self.address
    }

    /// Says that the port may move. From then on the verifier is reached through the gateway's relay.
    ///
    /// # Errors
    /// If the verifier refuses or is away for too long.
    pub async fn ready(self) -> Result<Moved, SessionError> {
        let () = self.session.post("ready", &()).await?;
        let client = self.session.client.through(SocketAddr::V4(self.address.relay));
        Ok(Moved { session: Session { client, ..self.session }, address: self.address })
    }
}

/// The port is moving; the NIC must take its new address.
pub struct Moved {
    session: Session,
    address: TenantAddress,
}

impl Moved {
    /// The address to take.
    #[must_use]
    pub fn address(&self) -> &TenantAddress {
        &self.address
    }

    /// Fetches the grant through the relay and opens it with the TPM.
    ///
    /// # Errors
    /// If there is no way to the relay, the verifier refuses, or the grant is not for this TPM.
    pub async fn fetch_grant(self, tpm: &mut dyn Tpm) -> Result<Granted, SessionError> {
        let sealed: SealedGrant = self.session.get("grant").await?;
        let grant = open(tpm, &sealed)?;
        Ok(Granted { session: self.session, address: self.address, admission: sealed.admission, grant })
    }
}

/// The node may open its disk.
pub struct Granted {
    session: Session,
    address: TenantAddress,
    admission: AdmissionId,
    grant: Grant,
}

impl Granted {
    /// What opens the disk.
    #[must_use]
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// The node's address on its tenant network.
    #[must_use]
    pub fn address(&self) -> &TenantAddress {
        &self.address
    }

    /// What the agent in the tenant's system needs to go on attesting with the same key for the same admission.
    #[must_use]
    pub fn attestation(&self, node: NodeId, pin: KeyPin, ak: SavedAk) -> AttestationState {
        let proof = self.session.client.bearer().unwrap_or_default();
        let (relay, co_verifiers) = (self.address.relay, self.session.co_verifiers.clone());
        AttestationState { node, admission: self.admission, relay, pin, proof, ak, co_verifiers }
    }

    /// Says that the tenant's kernel starts now: the session's last call.
    ///
    /// # Errors
    /// If the verifier refuses, as it does when the admission has ended meanwhile.
    pub async fn handover(self) -> Result<(), SessionError> {
        Ok(self.session.post("handover", &()).await?)
    }
}

/// Runs enrolment up to a good verdict: the part of the conversation before anything is released.
///
/// # Errors
/// Those of the steps.
pub async fn attest(
    tpm: &mut dyn Tpm,
    settings: &MeasuredSettings,
    event_log: Vec<u8>,
    tee: &TeeQuotes,
) -> Result<Accepted, SessionError> {
    let client = Client::new(settings.verifier(), settings.pin())?;
    let keys = tpm.create_keys()?;
    tracing::info!(event = "agent.keys_made", "made an attestation key");
    let request = enrol_request(settings.settings().node.clone(), &keys);
    let challenged = Session::enrol(client, &request).await?;
    tracing::info!(event = "agent.challenged", session = %challenged.session.id, "enrolling: opening the credential");
    let activated = challenged.activate(tpm).await?;
    tracing::info!(event = "agent.activated", "enrolled; quoting PCRs {}", Selection(&activated.request.pcrs));
    let co_verifiers = activated.request.co_verifiers.clone();
    let affirmed = affirmations(&co_verifiers, tpm, &request, &event_log, settings, tee).await;
    let mut evidence = activated.quote(tpm, event_log, vec![settings.measurement().clone()])?;
    evidence.tee = tee.answering(&activated.request.nonce, &request.ak_public);
    let (results, going_on): (_, Vec<_>) = affirmed.into_iter().map(|said| (said.result, said.attestation)).unzip();
    evidence.supporting = results;
    let mut accepted = activated.send_evidence(&evidence).await?;
    accepted.session.co_verifiers = going_on.into_iter().flatten().collect();
    tracing::info!(event = "agent.accepted", "the verifier trusts this boot; waiting for the release");
    Ok(accepted)
}

/// What one of the project's own verifiers says of this boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Affirmation {
    /// Its signed result.
    pub result: String,
    /// How to go on attesting to it after the boot; none if it does not ask for that.
    pub attestation: Option<CoAttestation>,
}

/// What the project's own verifiers say of this boot. One that is away, or says no, is left out: whether the node is
/// admitted without it is not the agent's to decide.
pub async fn affirmations(
    co_verifiers: &[CoVerifier],
    tpm: &mut dyn Tpm,
    request: &EnrolRequest,
    event_log: &[u8],
    settings: &MeasuredSettings,
    tee: &TeeQuotes,
) -> Vec<Affirmation> {
    let mut affirmed = Vec::new();
    for verifier in co_verifiers.iter().take(MAX_SUPPORTING) {
        let asking = affirmed_by(verifier, tpm, request, event_log, settings, tee);
        let url = verifier.url.as_str();
        match tokio::time::timeout(CO_VERIFIER_LIMIT, asking).await {
            Ok(Ok(affirmation)) => {
                tracing::info!(event = "agent.affirmed", verifier = url, "the project's verifier trusts this boot");
                affirmed.push(affirmation);
            }
            Ok(Err(error)) => {
                tracing::warn!(event = "agent.not_affirmed", verifier = url, %error, "the project's verifier does not vouch");
            }
            Err(_elapsed) => {
                tracing::warn!(event = "agent.not_affirmed", verifier = url, "the project's verifier does not answer");
            }
        }
    }
    affirmed
}

async fn affirmed_by(
    verifier: &CoVerifier,
    tpm: &mut dyn Tpm,
    request: &EnrolRequest,
    event_log: &[u8],
    settings: &MeasuredSettings,
    tee: &TeeQuotes,
) -> Result<Affirmation, SessionError> {
    let unusable = || SessionError::CoVerifier { url: verifier.url.chars().take(200).collect() };
    let address = verifier_address(&verifier.url).ok_or_else(unusable)?;
    let pin: KeyPin = verifier.key_sha256.parse().map_err(|_| unusable())?;
    let client = Client::new(address, pin)?;
    let activated = Session::enrol(client, request).await?.activate(tpm).await?;
    let mut evidence = activated.quote(tpm, event_log.to_vec(), vec![settings.measurement().clone()])?;
    evidence.tee = tee.answering(&activated.request.nonce, &request.ak_public);
    match activated.session.post("evidence", &evidence).await? {
        // What can be no result would have the leading verifier refuse all of the evidence.
        Verdict::Affirmed { result, attestation } if may_be_result(&result) => {
            let proof = activated.session.client.bearer().unwrap_or_default();
            let attestation = attestation.map(|admission| CoAttestation { address, pin, admission, proof });
            Ok(Affirmation { result, attestation })
        }
        Verdict::Rejected { reasons } => Err(SessionError::Rejected { reasons }),
        Verdict::Accepted | Verdict::Affirmed { .. } => Err(unusable()),
    }
}

/// Why the conversation ended early.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The TPM failed.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// Not a verifier that can be asked beside the one that leads.
    #[error(
        "asking the project's verifier `{url}`: it is not https:// with an IP address and a key, or what it says is no result"
    )]
    CoVerifier {
        /// Its URL.
        url: String,
    },
    /// The verifier in the settings is one that begins no releases.
    #[error("the verifier affirms this boot, but begins no release: the settings name the wrong one")]
    NoRelease,
    /// TLS could not be set up.
    #[error("preparing TLS to the verifier")]
    Tls(#[from] rustls::Error),
    /// The verifier asks for a selection that this agent does not know how to answer.
    #[error("the verifier asks for PCRs {pcrs:?}, but an agent quotes 0 to 14")]
    PcrSelection {
        /// What it asks for.
        pcrs: Vec<u8>,
    },
    /// The verdict was bad.
    #[error("the verifier rejects this boot: {}", reasons.join("; "))]
    Rejected {
        /// Why, in the verifier's words.
        reasons: Vec<String>,
    },
    /// The release was undone.
    #[error("the release was undone: {reason}")]
    Aborted {
        /// Why, in the verifier's words.
        reason: String,
    },
    /// The release took too long.
    #[error("the release was not ready within {} s", RELEASE_LIMIT.as_secs())]
    ReleaseTimeout,
    /// The grant does not open.
    #[error("opening the grant")]
    Seal(#[from] SealError),
    /// The key in the grant's credential has a wrong size.
    #[error("opening the grant: its key has {bytes} octets, not 32")]
    GrantKey {
        /// How many.
        bytes: usize,
    },
    /// The grant's content is not a grant. (The parser's own words might quote the secret, so they are not kept.)
    #[error("opening the grant: its content is not a grant")]
    GrantContent,
}

/// Opens a grant.
fn open(tpm: &mut dyn Tpm, sealed: &SealedGrant) -> Result<Grant, SessionError> {
    let content = open_sealed(tpm, sealed)?;
    serde_json::from_slice(&content).map_err(|_| SessionError::GrantContent)
}

/// Opens whatever is sealed to this TPM: its key with the TPM, its content with the key.
///
/// # Errors
/// If it is for another TPM, key or admission, or was changed on the way.
pub fn open_sealed(tpm: &mut dyn Tpm, sealed: &SealedGrant) -> Result<Zeroizing<Vec<u8>>, SessionError> {
    let secret = tpm.activate_credential(&sealed.credential)?;
    let key = <&[u8; 32]>::try_from(secret.as_slice()).map_err(|_| SessionError::GrantKey { bytes: secret.len() })?;
    Ok(open_grant(key, sealed)?)
}

/// PCR numbers as people write them.
struct Selection<'a>(&'a [u8]);

impl std::fmt::Display for Selection<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.0.first(), self.0.last()) {
            (Some(first), Some(last)) => write!(f, "{first} to {last}"),
            _ => f.write_str("none"),
        }
    }
}
