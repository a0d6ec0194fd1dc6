//! IAKs: initial attestation keys, which machine makers certify in the place of EKs (TCG "TPM 2.0 Keys for Device
//! Identity and Attestation", IEEE 802.1AR).
//!
//! The smallest form that is sound: the maker's CA says that the IAK is a restricted key in a TPM; the IAK says, by
//! `TPM2_CertifyCreation`, that its TPM made the object with the EK's name (`TPM2_Certify` would need an authorization
//! that the EK templates give to nobody). A name covers attributes, so the EK is fixedTPM and restricted by the TPM's
//! own word, and everything after goes on as with a certified EK: credential activation for a fresh AK, secrets sealed
//! to the EK. The IAK itself never signs a quote for us, and an IDevID, whose key signs anything, is no IAK.

use super::IdentityError;
use super::anchors::TrustAnchors;
use super::certificate::Purpose;
use crate::quote::AkPublic;
use assay_tpm::attest::CreatedKey;
use assay_tpm::name::Name;
use assay_wire::agent::IakEndorsement;

/// Checks that an IAK with a certificate of `cas` vouches for the EK named `ek`. Gives the SHA-256 of the IAK's
/// certificate, hexadecimal.
pub(super) fn verify(
    cas: &TrustAnchors,
    iak: &IakEndorsement,
    ek: &Name,
    now_seconds: i64,
) -> Result<String, IdentityError> {
    let key = AkPublic::parse(&iak.public)?;
    let certificate = cas.verify(Purpose::Iak, &iak.certificate, &iak.chain, key.key(), now_seconds)?;
    key.verify_signature(&iak.attest, &iak.signature)?;
    let created = CreatedKey::parse(&iak.attest)?;
    if created.name == ek.as_bytes() { Ok(certificate) } else { Err(IdentityError::IakOtherKey) }
}
