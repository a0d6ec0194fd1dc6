//! What the agent asks of its TPM. One implementation, [`esapi`], speaks to a device or to a software TPM; there is no
//! stand-in. Every call blocks its thread: an agent has nothing else to do meanwhile.

mod endorsement;
pub mod esapi;

use assay_wire::agent::Credential;
use zeroize::Zeroizing;

/// Octets of a SHA-256 digest, so of one PCR value.
pub const DIGEST_BYTES: usize = 32;

/// One PCR value of the SHA-256 bank.
pub type PcrValue = [u8; DIGEST_BYTES];

/// The TPM operations of the boot path.
pub trait Tpm {
    /// Extends `pcr` of the SHA-256 bank with `digest` (`TPM2_PCR_Extend`).
    ///
    /// # Errors
    /// If the TPM refuses.
    fn pcr_extend(&mut self, pcr: u8, digest: PcrValue) -> Result<(), TpmError>;

    /// Reads PCRs of the SHA-256 bank, in the order asked.
    ///
    /// # Errors
    /// If the TPM refuses, or has no SHA-256 bank.
    fn pcr_read(&mut self, pcrs: &[u8]) -> Result<Vec<PcrValue>, TpmError>;

    /// Finds or makes the EK, and makes an AK under it. Call once; the later operations use these keys.
    ///
    /// # Errors
    /// If the TPM refuses.
    fn create_keys(&mut self) -> Result<AttesterKeys, TpmError>;

    /// Opens a credential that was made for this EK and AK (`TPM2_ActivateCredential`).
    ///
    /// # Errors
    /// If the credential is for other keys, or no keys were made yet.
    fn activate_credential(&mut self, credential: &Credential) -> Result<Zeroizing<Vec<u8>>, TpmError>;

    /// Quotes PCRs of the SHA-256 bank with the AK, `nonce` as qualifying data (`TPM2_Quote`).
    ///
    /// # Errors
    /// If the TPM refuses, or no keys were made yet.
    fn quote(&mut self, nonce: &[u8], pcrs: &[u8]) -> Result<Quote, TpmError>;
}

/// Public parts of the keys that attest.
#[derive(Debug, Clone)]
pub struct AttesterKeys {
    /// `TPMT_PUBLIC` of the EK.
    pub ek_public: Vec<u8>,
    /// The EK certificate as NV holds it; empty if the TPM has none.
    pub ek_certificate: Vec<u8>,
    /// The certificates of the CAs above it as NV holds them, one after the other; empty if the TPM has none.
    pub ek_chain: Vec<u8>,
    /// `TPMT_PUBLIC` of the AK.
    pub ak_public: Vec<u8>,
}

/// An AK outside its TPM: nothing but the TPM that made it can use it, and only under the EK that it was made under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedAk {
    /// `TPMT_PUBLIC`.
    pub public: Vec<u8>,
    /// The content of `TPM2B_PRIVATE`: encrypted and authenticated by the EK's seed (TPM 2.0 Part 1, 23.3).
    pub private: Vec<u8>,
}

/// A quote as the TPM made it.
#[derive(Debug, Clone)]
pub struct Quote {
    /// `TPMS_ATTEST`.
    pub attest: Vec<u8>,
    /// `TPMT_SIGNATURE` over it.
    pub signature: Vec<u8>,
}

/// Why a TPM operation failed.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// The TPM, or the way to it, refused.
    #[error("TPM: {doing}")]
    Command {
        /// What was being done.
        doing: String,
        /// What the TPM software stack says.
        #[source]
        source: tss_esapi::Error,
    },
    /// The TCTI is not one that can be used.
    #[error("TPM: `{tcti}` is not a TCTI like device:/dev/tpmrm0 or swtpm:host=127.0.0.1,port=2321")]
    Tcti {
        /// What was given.
        tcti: String,
    },
    /// No PCR has this number.
    #[error("TPM: there is no PCR {pcr}")]
    NoSuchPcr {
        /// The number.
        pcr: u8,
    },
    /// The TPM answered fewer values than asked for: the SHA-256 bank is not active.
    #[error("TPM: PCR {pcr} cannot be read: is the SHA-256 bank active?")]
    NoBank {
        /// The first PCR without a value.
        pcr: u8,
    },
    /// Keys are used before they are made.
    #[error("TPM: {doing} before the attestation key was made")]
    NoKeys {
        /// What was being done.
        doing: &'static str,
    },
}
