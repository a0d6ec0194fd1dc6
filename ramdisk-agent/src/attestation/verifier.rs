//! The calls of continuous attestation ([`assay_wire::attestation`]), and what a refusal of one means.

use super::state::{AttestationState, CoAttestation};
use crate::client::{CallError, Client};
use crate::pin::KeyPin;
use assay_wire::attestation::{AttestationAnswer, AttestationRequest, RevocationNotices, SealedSecret};
use assay_wire::evidence::RuntimeEvidence;
use assay_wire::id::AdmissionId;
use std::net::SocketAddr;
use zeroize::Zeroizing;

/// A verifier, and the admission that it is asked about.
#[derive(Clone)]
pub struct AttestationClient {
    client: Client,
    admission: AdmissionId,
}

impl AttestationClient {
    /// A client for the verifier of `state` that leads, behind the gateway's relay. Connects only when called.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn leading(state: &AttestationState) -> Result<Self, rustls::Error> {
        Self::new(SocketAddr::V4(state.relay), state.pin, state.admission, &state.proof)
    }

    /// A client for one of the project's own, where it is. Connects only when called.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn supporting(verifier: &CoAttestation) -> Result<Self, rustls::Error> {
        Self::new(verifier.address, verifier.pin, verifier.admission, &verifier.proof)
    }

    fn new(
        address: SocketAddr,
        pin: KeyPin,
        admission: AdmissionId,
        proof: &Zeroizing<String>,
    ) -> Result<Self, rustls::Error> {
        let mut client = Client::new(address, pin)?;
        client.set_bearer(proof.clone());
        Ok(Self { client, admission })
    }

    /// Where the verifier is called.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.client.address()
    }

    /// Asks for a nonce.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn challenge(&self) -> Result<AttestationRequest, CallError> {
        self.client.post(&format!("{}/challenge", self.path()), &()).await
    }

    /// Sends evidence.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn submit(&self, evidence: &RuntimeEvidence) -> Result<AttestationAnswer, CallError> {
        self.client.post(&self.path(), evidence).await
    }

    /// Waits for notices after `after`.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn notices(&self, after: u64) -> Result<RevocationNotices, CallError> {
        self.client.get(&format!("{}/notices?after={after}", self.path())).await
    }

    /// The tenant's secret, or this verifier's share of it, sealed to this TPM; none if the tenant has left none there.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn secret(&self) -> Result<Option<SealedSecret>, CallError> {
        match self.client.get(&format!("{}/secret", self.path())).await {
            Ok(sealed) => Ok(Some(sealed)),
            Err(error) if error.status() == Some(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn path(&self) -> String {
        format!("/agent/v1/attestations/{}", self.admission)
    }
}

/// What a call that failed means for what comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The verifier says that the admission is over, or not ours.
    Over,
    /// The verifier attests no such admission.
    Unattested,
    /// The verifier, or the way to it, is away, or busy, or not ready, or does not know the nonce: try again.
    Away,
    /// Nothing that trying again would mend.
    Broken,
}

impl Refusal {
    /// Judges a failed call.
    #[must_use]
    pub fn of(error: &CallError) -> Self {
        match error.status() {
            Some(401 | 403 | 410) => Self::Over,
            Some(404) => Self::Unattested,
            // `no-nonce`, `not-handed-over`, `not-vouched-for`: it may be otherwise in a moment.
            Some(409) => Self::Away,
            _ if error.is_transient() => Self::Away,
            _ => Self::Broken,
        }
    }
}
