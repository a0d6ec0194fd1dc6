//! Those whom a release is done with: isolation and imaging, by their HTTP APIs. Every call is idempotent by admission
//! id there, so each may be repeated after a lost answer.

use crate::store::releases::Release;
use assay_service::client::{ClientError, ServiceClient};
use assay_wire::id::{AdmissionId, BootId, NodeId};
use assay_wire::imaging::{ExportAnswer, ExportRequest};
use assay_wire::isolation::{
    Admission, AdmissionRequest, Admissions, AirlockContext, RejectRequest, RenewalAnswer, RenewalRequest,
    RevokeRequest,
};
use serde::de::IgnoredAny;

/// isolation and imaging.
#[derive(Debug, Clone)]
pub struct Peers {
    isolation: ServiceClient,
    imaging: ServiceClient,
}

/// Why an effect was not had.
#[derive(Debug, thiserror::Error)]
pub enum EffectError {
    /// The call failed.
    #[error("calling {peer}")]
    Call {
        /// Whom.
        peer: &'static str,
        /// Why.
        source: Box<ClientError>,
    },
    /// The answer is about something else.
    #[error("{peer} answered about another {what} than was asked for")]
    WrongAnswer {
        /// Who.
        peer: &'static str,
        /// What differs.
        what: &'static str,
    },
}

impl EffectError {
    /// Whether asking again is pointless: the peer understood and refused.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Call { source, .. } => source.problem().is_some_and(|problem| {
                (400..500).contains(&problem.status) && problem.status != 408 && problem.status != 429
            }),
            Self::WrongAnswer { .. } => true,
        }
    }

    /// Whether the peer says that what was asked about is no longer there, or has moved on.
    #[must_use]
    pub fn is_moot(&self) -> bool {
        match self {
            Self::Call { source, .. } => source.problem().is_some_and(|problem| matches!(problem.status, 404 | 409)),
            Self::WrongAnswer { .. } => false,
        }
    }

    fn is_not_found(&self) -> bool {
        match self {
            Self::Call { source, .. } => source.problem().is_some_and(|problem| problem.status == 404),
            Self::WrongAnswer { .. } => false,
        }
    }
}

impl Peers {
    /// These two.
    #[must_use]
    pub fn new(isolation: ServiceClient, imaging: ServiceClient) -> Self {
        Self { isolation, imaging }
    }

    /// isolation alone, for a verifier that begins no release and so never calls imaging.
    #[must_use]
    pub fn appraising(isolation: ServiceClient) -> Self {
        Self { imaging: isolation.clone(), isolation }
    }

    /// Lease, project and boot of a node in the airlock.
    ///
    /// # Errors
    /// isolation does not answer, or the node is not in the airlock (`not-in-airlock`).
    pub async fn airlock(&self, node: &NodeId) -> Result<AirlockContext, ClientError> {
        self.isolation.get(&format!("/v1/nodes/{node}/airlock")).await
    }

    /// Reports a bad verdict. A report on a boot that is over changes nothing there.
    ///
    /// # Errors
    /// See [`EffectError`].
    pub async fn reject(&self, node: &NodeId, boot: BootId, reason: String) -> Result<(), EffectError> {
        let request = RejectRequest { boot, reason };
        let answer: Result<IgnoredAny, _> = self.isolation.post(&format!("/v1/nodes/{node}/reject"), &request).await;
        answer.map(|_| ()).map_err(isolation_failed)
    }

    /// Asks imaging for the export of a result's lease.
    ///
    /// # Errors
    /// See [`EffectError`].
    pub async fn export(&self, release: &Release) -> Result<ExportAnswer, EffectError> {
        let Release { admission, result, supporting, .. } = release;
        let request = ExportRequest { result: result.clone(), supporting: supporting.clone() };
        let answer: ExportAnswer = self.imaging.post("/v1/exports", &request).await.map_err(imaging_failed)?;
        if answer.admission == *admission && answer.grant.admission == *admission {
            Ok(answer)
        } else {
            Err(EffectError::WrongAnswer { peer: "imaging", what: "admission" })
        }
    }

    /// Asks isolation to move the node's port.
    ///
    /// # Errors
    /// See [`EffectError`].
    pub async fn admit(&self, release: &Release) -> Result<(), EffectError> {
        let request = AdmissionRequest { result: release.result.clone(), supporting: release.supporting.clone() };
        let answer: Admission = self.isolation.post("/v1/admissions", &request).await.map_err(isolation_failed)?;
        let wrong = |what| Err(EffectError::WrongAnswer { peer: "isolation", what });
        if answer.id != release.admission {
            wrong("admission")
        } else if answer.node != release.node || answer.boot != release.boot || answer.lease != release.lease {
            wrong("node, lease or boot")
        } else if answer.revoked.is_some() {
            wrong("admission (this one was revoked)")
        } else {
            Ok(())
        }
    }

    /// Gives isolation fresh results about nodes that are admitted.
    ///
    /// # Errors
    /// See [`EffectError`].
    pub async fn renew_admissions(&self, request: &RenewalRequest) -> Result<RenewalAnswer, EffectError> {
        self.isolation.post("/v1/admission-renewals", request).await.map_err(isolation_failed)
    }

    /// Gives imaging fresh results about nodes that are admitted.
    ///
    /// # Errors
    /// See [`EffectError`].
    pub async fn renew_exports(&self, request: &RenewalRequest) -> Result<RenewalAnswer, EffectError> {
        self.imaging.post("/v1/export-renewals", request).await.map_err(imaging_failed)
    }

    /// The admissions that stand at isolation, and those that ended lately: at once, or when something has begun or
    /// ended after the revision `after`.
    ///
    /// # Errors
    /// isolation does not answer.
    pub async fn admissions(&self, after: Option<u64>) -> Result<Admissions, ClientError> {
        let path = after.map_or("/v1/admissions".to_owned(), |after| format!("/v1/admissions?after={after}"));
        self.isolation.get(&path).await
    }

    /// Ends the admission, if there is one: the port goes to quarantine.
    ///
    /// # Errors
    /// See [`EffectError`].
    pub async fn revoke(&self, admission: AdmissionId, reason: &str) -> Result<(), EffectError> {
        let request = RevokeRequest { reason: reason.to_owned() };
        let answer: Result<IgnoredAny, _> =
            self.isolation.delete(&format!("/v1/admissions/{admission}"), &request).await;
        gone(answer.map(|_| ()).map_err(isolation_failed))
    }

    /// Ends the export, if there is one: sessions are severed.
    ///
    /// # Errors
    /// See [`EffectError`].
    pub async fn unexport(&self, admission: AdmissionId) -> Result<(), EffectError> {
        let answer: Result<IgnoredAny, _> =
            self.imaging.delete(&format!("/v1/exports/{admission}"), &serde_json::json!({})).await;
        gone(answer.map(|_| ()).map_err(imaging_failed))
    }
}

/// What is not there needs no undoing.
fn gone(answer: Result<(), EffectError>) -> Result<(), EffectError> {
    match answer {
        Err(error) if error.is_not_found() => Ok(()),
        answer => answer,
    }
}

fn isolation_failed(source: ClientError) -> EffectError {
    EffectError::Call { peer: "isolation", source: Box::new(source) }
}

fn imaging_failed(source: ClientError) -> EffectError {
    EffectError::Call { peer: "imaging", source: Box::new(source) }
}
