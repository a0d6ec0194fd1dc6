//! Key derivation of TPM 2.0 Part 1, section 11.4.10: KDFa and KDFe.

use crate::algorithm::HashAlgorithm;
use ring::{digest, hmac};
use zeroize::Zeroizing;

/// KDFa (SP 800-108, counter mode, HMAC): `bytes` octets from `key`. The label goes in with its terminating zero.
pub(crate) fn kdfa(
    algorithm: HashAlgorithm,
    key: &[u8],
    label: &str,
    context_u: &[u8],
    context_v: &[u8],
    bytes: u16,
) -> Zeroizing<Vec<u8>> {
    let key = hmac::Key::new(hmac_algorithm(algorithm), key);
    blocks(algorithm, bytes, |counter| {
        let mut context = hmac::Context::with_key(&key);
        for part in [&counter[..], label.as_bytes(), &[0], context_u, context_v] {
            context.update(part);
        }
        context.update(&(u32::from(bytes) * 8).to_be_bytes());
        context.sign().as_ref().to_vec()
    })
}

/// KDFe (SP 800-56A, concatenation): `bytes` octets from the shared secret `z`.
pub(crate) fn kdfe(
    algorithm: HashAlgorithm,
    z: &[u8],
    label: &str,
    party_u: &[u8],
    party_v: &[u8],
    bytes: u16,
) -> Zeroizing<Vec<u8>> {
    blocks(algorithm, bytes, |counter| {
        let mut context = digest::Context::new(algorithm.ring());
        for part in [&counter[..], z, label.as_bytes(), &[0], party_u, party_v] {
            context.update(part);
        }
        context.finish().as_ref().to_vec()
    })
}

pub(crate) fn hmac_algorithm(algorithm: HashAlgorithm) -> hmac::Algorithm {
    match algorithm {
        HashAlgorithm::Sha1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
        HashAlgorithm::Sha256 => hmac::HMAC_SHA256,
        HashAlgorithm::Sha384 => hmac::HMAC_SHA384,
        HashAlgorithm::Sha512 => hmac::HMAC_SHA512,
    }
}

fn blocks(algorithm: HashAlgorithm, bytes: u16, block: impl Fn([u8; 4]) -> Vec<u8>) -> Zeroizing<Vec<u8>> {
    let bytes = usize::from(bytes);
    // Reserved whole, so that no reallocation leaves key material behind.
    let mut derived = Zeroizing::new(Vec::with_capacity(bytes + algorithm.digest_bytes()));
    for counter in 1u32.. {
        if derived.len() >= bytes {
            break;
        }
        derived.extend_from_slice(&Zeroizing::new(block(counter.to_be_bytes())));
    }
    derived.truncate(bytes);
    derived
}
