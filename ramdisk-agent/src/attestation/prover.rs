//! The TPM, shared by what attests to each verifier: each makes evidence of its own, for its own nonce. A TPM does one
//! thing at a time, and nobody waits for a verifier while holding it.

use super::{AttestationError, runtime_evidence};
use crate::ima::MeasurementReader;
use crate::session::{SessionError, open_sealed};
use crate::tee::TeeQuotes;
use crate::tpm::Tpm;
use assay_wire::agent::SealedGrant;
use assay_wire::attestation::AttestationRequest;
use assay_wire::evidence::RuntimeEvidence;
use std::sync::{Mutex, MutexGuard, PoisonError};
use zeroize::Zeroizing;

/// The TPM with the AK loaded, and what may quote beside it.
pub(super) struct Prover<T> {
    tpm: Mutex<T>,
    tee: TeeQuotes,
    /// `TPMT_PUBLIC` of the AK, which quotes beside the TPM's are bound to.
    ak_public: Vec<u8>,
}

impl<T: Tpm> Prover<T> {
    pub(super) fn new(tpm: T, tee: TeeQuotes, ak_public: Vec<u8>) -> Self {
        Self { tpm: Mutex::new(tpm), tee, ak_public }
    }

    /// See [`runtime_evidence`]; with the quote of a trust domain, if this is one.
    pub(super) fn evidence(
        &self,
        measurements: &mut MeasurementReader,
        request: &AttestationRequest,
    ) -> Result<RuntimeEvidence, AttestationError> {
        let mut evidence = runtime_evidence(&mut *self.tpm(), measurements, request)?;
        evidence.tee = self.tee.answering(&request.nonce, &self.ak_public);
        Ok(evidence)
    }

    /// Opens what is sealed to this TPM.
    pub(super) fn open(&self, sealed: &SealedGrant) -> Result<Zeroizing<Vec<u8>>, SessionError> {
        open_sealed(&mut *self.tpm(), sealed)
    }

    fn tpm(&self) -> MutexGuard<'_, T> {
        self.tpm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
