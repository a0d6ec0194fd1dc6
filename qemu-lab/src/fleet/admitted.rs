//! Nodes of a site that were handed over: soft ones, which attest when they are told to; and what the agent's own program
//! needs to go on attesting from a TPM of its own.

use super::connection::CallFailed;
use super::node::{Admitted, Pushed, SoftNode};
use super::{FleetSite, VerifierProcess};
use crate::error::{LabError, Result};
use assay_ramdisk_agent::attestation::state::AttestationState;
use assay_ramdisk_agent::session::attest;
use assay_ramdisk_agent::settings::MeasuredSettings;
use assay_ramdisk_agent::tee::TeeQuotes;
use assay_ramdisk_agent::tpm::Tpm as _;
use assay_ramdisk_agent::tpm::esapi::EsapiTpm;
use assay_wire::id::AdmissionId;
use std::error::Error;

/// A soft node in its tenant's hands.
pub struct FleetNode {
    node: SoftNode,
    admitted: Admitted,
}

/// What became of one piece of evidence at run time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It was good.
    Renewed,
    /// It was not: why.
    Revoked(Vec<String>),
    /// It was not looked at: the problem's word.
    Refused(String),
    /// None came.
    Unanswered,
}

impl FleetNode {
    pub(super) fn new(node: SoftNode, admitted: Admitted) -> Self {
        Self { node, admitted }
    }

    /// Its admission.
    #[must_use]
    pub fn admission(&self) -> AdmissionId {
        self.admitted.admission
    }

    /// Measures something that no admitted node may: from here on its evidence is bad.
    pub fn extend(&mut self, pcr: u8, digest: [u8; 32]) {
        self.node.extend(pcr, digest);
    }

    /// Attests once to this verifier: a challenge and the evidence for it.
    pub async fn attest(&mut self, verifier: &VerifierProcess) -> Answer {
        self.node.connection.turn_to(verifier.agent_address);
        let pushed = match self.node.challenge(&self.admitted).await {
            Ok(wanted) => self.node.push(&self.admitted, &wanted.nonce).await,
            Err(failed) => Err(failed),
        };
        match pushed {
            Ok(Pushed::Renewed(_next)) => Answer::Renewed,
            Ok(Pushed::Revoked(reasons)) => Answer::Revoked(reasons),
            Err(CallFailed::Refused { kind, .. }) => Answer::Refused(kind),
            Err(CallFailed::Broken(_)) => Answer::Unanswered,
        }
    }
}

impl FleetSite {
    /// Boots the site's firmware on a TPM that has just been turned on, and takes it through the ramdisk's conversation
    /// with `verifier`, by the agent's own code. Answers what the tenant's system is handed over. It finds `later` behind
    /// its relay.
    ///
    /// # Errors
    /// The node is not admitted.
    pub async fn hand_over(
        &self,
        name: &str,
        tpm: &mut EsapiTpm,
        verifier: &VerifierProcess,
        later: &VerifierProcess,
    ) -> Result<AttestationState> {
        let settings = self.nodes(verifier, false).await?.settings(name)?;
        self.peers.relay(&settings.node, later.agent_address);
        for (pcr, digest) in &self.firmware.extensions {
            tpm.pcr_extend(*pcr, *digest).map_err(acting(name))?;
        }
        let document = serde_json::to_vec(&settings).map_err(acting(name))?;
        let settings = MeasuredSettings::measure(&document, tpm).map_err(acting(name))?;
        let (log, tee) = (self.firmware.log.clone(), TeeQuotes::default());
        let accepted = attest(tpm, &settings, log, &tee).await.map_err(acting(name))?;
        let released = accepted.await_release().await.map_err(acting(name))?;
        let moved = released.ready().await.map_err(acting(name))?;
        let granted = moved.fetch_grant(tpm).await.map_err(acting(name))?;
        let ak = tpm.saved_ak().map_err(acting(name))?;
        let state = granted.attestation(settings.settings().node.clone(), settings.pin(), ak);
        granted.handover().await.map_err(acting(name))?;
        Ok(state)
    }
}

fn acting<E: Error + Send + Sync + 'static>(node: &str) -> impl FnOnce(E) -> LabError {
    LabError::service(format!("acting for {node}"))
}
