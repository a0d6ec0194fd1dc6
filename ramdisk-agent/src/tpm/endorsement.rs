//! Which EK to use, and what of its certificates the TPM keeps (TCG "EK Credential Profile for TPM Family 2.0").
//!
//! The first EK whose certificate is in NV; a TPM that has none uses its RSA-2048 one, or P-256 if it makes no RSA keys:
//! that nobody vouches for it is the verifier's to say.

use super::TpmError;
use super::esapi::Doing as _;
use tss_esapi::Context;
use tss_esapi::abstraction::{AsymmetricAlgorithmSelection, ek, nv};
use tss_esapi::handles::{KeyHandle, NvIndexTpmHandle, PersistentTpmHandle, TpmHandle};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::NvAuth;
use tss_esapi::structures::Public;

/// One of the profile's EKs.
#[derive(Debug, Clone, Copy)]
struct EkTemplate {
    algorithm: AsymmetricAlgorithmSelection,
    /// Where manufacturers and provisioning keep it (TCG "Registry of Reserved TPM 2.0 Handles").
    persistent: u32,
}

/// In the order in which they are tried: the low range, which every verifier knows, before the high one.
const TEMPLATES: [EkTemplate; 4] = [
    EkTemplate { algorithm: AsymmetricAlgorithmSelection::Rsa(RsaKeyBits::Rsa2048), persistent: 0x8101_0001 },
    EkTemplate { algorithm: AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP256), persistent: 0x8101_0002 },
    EkTemplate { algorithm: AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP384), persistent: 0x8101_0016 },
    EkTemplate { algorithm: AsymmetricAlgorithmSelection::Rsa(RsaKeyBits::Rsa3072), persistent: 0x8101_001c },
];

/// Where the certificates of the CAs above an EK are.
const CHAIN: std::ops::RangeInclusive<u32> = 0x01c0_0100..=0x01c0_01ff;
/// More than any maker's chain has; the verifier takes no more.
const MAX_CHAIN_BYTES: usize = 32 * 1024;

/// The EK and its certificate, which is empty if the TPM has none for any of its EKs.
pub(super) fn endorsement_key(context: &mut Context) -> Result<(KeyHandle, Vec<u8>), TpmError> {
    for template in TEMPLATES {
        // Not to be found or not to be read is the same here: there is another one, or none.
        let certificate = ek::retrieve_ek_pubcert(context, template.algorithm).unwrap_or_default();
        if !certificate.is_empty()
            && let Ok(key) = key(context, template)
        {
            return Ok((key, certificate));
        }
    }
    let [rsa, ecc, ..] = TEMPLATES;
    key(context, rsa).or_else(|refused| key(context, ecc).map_err(|_| refused)).map(|key| (key, Vec::new()))
}

/// The certificates between the EK's and its root, as NV holds them, one after the other. What cannot be read is left
/// out: a chain only helps.
pub(super) fn chain(context: &mut Context) -> Vec<u8> {
    let Ok(indices) = nv::list(context) else { return Vec::new() };
    let mut places: Vec<NvIndexTpmHandle> = indices.iter().map(|(public, _)| public.nv_index()).collect();
    places.retain(|place| CHAIN.contains(&u32::from(*place)));
    places.sort_by_key(|place| u32::from(*place));
    let mut chain = Vec::new();
    for place in places {
        let read = context
            .execute_without_session(|context| context.tr_from_tpm_public(TpmHandle::NvIndex(place)))
            .and_then(|handle| {
                let auth = NvAuth::NvIndex(handle.into());
                context.execute_with_nullauth_session(|context| nv::read_full(context, auth, place))
            });
        chain.extend(read.unwrap_or_default());
    }
    if chain.len() > MAX_CHAIN_BYTES { Vec::new() } else { chain }
}

/// The EK of a template: the persistent one, if it was made from it; else a new primary key, which the same seed and
/// template make the same key. Making an RSA key takes a discrete TPM many seconds.
fn key(context: &mut Context, template: EkTemplate) -> Result<KeyHandle, TpmError> {
    let public =
        ek::create_ek_public_from_default_template_2(template.algorithm, None).doing("preparing the EK template")?;
    let persistent = PersistentTpmHandle::new(template.persistent).doing("naming the persistent EK")?;
    let found = context.execute_without_session(|context| {
        let key = KeyHandle::from(context.tr_from_tpm_public(TpmHandle::Persistent(persistent))?);
        context.read_public(key).map(|(public, _, _)| (key, public))
    });
    if let Ok((key, found)) = found
        && same_template(&found, &public)
    {
        return Ok(key);
    }
    ek::create_ek_object_2(context, template.algorithm, None).doing("making the EK")
}

/// Whether `public` is a key with the attributes, policy and parameters of `template`.
fn same_template(public: &Public, template: &Public) -> bool {
    match (public, template) {
        (
            Public::Rsa { object_attributes: a1, name_hashing_algorithm: h1, auth_policy: p1, parameters: r1, .. },
            Public::Rsa { object_attributes: a2, name_hashing_algorithm: h2, auth_policy: p2, parameters: r2, .. },
        ) => a1 == a2 && h1 == h2 && p1 == p2 && r1 == r2,
        (
            Public::Ecc { object_attributes: a1, name_hashing_algorithm: h1, auth_policy: p1, parameters: r1, .. },
            Public::Ecc { object_attributes: a2, name_hashing_algorithm: h2, auth_policy: p2, parameters: r2, .. },
        ) => a1 == a2 && h1 == h2 && p1 == p2 && r1 == r2,
        _ => false,
    }
}
