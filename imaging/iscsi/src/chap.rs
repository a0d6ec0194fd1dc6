//! CHAP (RFC 1994) as iSCSI uses it (RFC 7143 §12.1.3): credentials, challenges, responses.
//!
//! SHA-256 (algorithm 7 of the IANA registry), and MD5 (5) where the target's configuration allows it: iPXE has
//! nothing else. SHA-1 (6) and SHA3-256 (8) are left out: who has them has SHA-256.

use base64::Engine as _;
use md5::{Digest as _, Md5};
use std::fmt;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// Octets of a challenge made here.
pub const CHALLENGE_OCTETS: usize = 32;
/// Shortest secret accepted (RFC 7143 §9.2.1: 96 bits, since whoever overhears a login may guess at leisure).
pub(crate) const SECRET_OCTETS: usize = 12;
/// Longest binary value accepted (RFC 7143 §12.1.3 allows challenges of up to 1024 octets).
const BINARY_LIMIT: usize = 1024;

/// A CHAP name and secret. The secret never appears in `Debug`.
#[derive(Clone)]
pub struct ChapCredentials {
    /// CHAP_N.
    pub name: String,
    secret: Zeroizing<Vec<u8>>,
}

impl ChapCredentials {
    /// Credentials with this secret, which a target accepts from 12 octets on; they should be random.
    pub fn new(name: impl Into<String>, secret: impl Into<Vec<u8>>) -> Self {
        Self { name: name.into(), secret: Zeroizing::new(secret.into()) }
    }

    /// The response to `challenge` under `identifier`.
    pub(crate) fn response(&self, algorithm: ChapAlgorithm, identifier: u8, challenge: &[u8]) -> Vec<u8> {
        match algorithm {
            ChapAlgorithm::Md5 => {
                let mut digest = Md5::new();
                digest.update([identifier]);
                digest.update(self.secret.as_slice());
                digest.update(challenge);
                digest.finalize().to_vec()
            }
            ChapAlgorithm::Sha256 => {
                let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
                digest.update(&[identifier]);
                digest.update(&self.secret);
                digest.update(challenge);
                digest.finish().as_ref().to_vec()
            }
        }
    }

    /// Whether the secret is too short to be used.
    pub(crate) fn is_weak(&self) -> bool {
        self.secret.len() < SECRET_OCTETS
    }

    /// Whether both have the same secret, so that one's answer would do for the other.
    pub(crate) fn shares_secret_with(&self, other: &Self) -> bool {
        self.secret.ct_eq(&other.secret).into()
    }

    /// Whether `name` and `response` are right, in a time that does not depend on how wrong they are.
    pub(crate) fn accepts(&self, exchange: &ChapExchange, name: &str, response: &[u8]) -> bool {
        let expected = self.response(exchange.algorithm, exchange.identifier, &exchange.challenge);
        let name_matches = self.name.as_bytes().ct_eq(name.as_bytes());
        let response_matches = expected.as_slice().ct_eq(response);
        (name_matches & response_matches).into()
    }
}

impl fmt::Debug for ChapCredentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ChapCredentials").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A challenge that was sent and not answered yet.
#[derive(Debug, Clone)]
pub(crate) struct ChapExchange {
    pub(crate) algorithm: ChapAlgorithm,
    pub(crate) identifier: u8,
    pub(crate) challenge: [u8; CHALLENGE_OCTETS],
}

/// Which CHAP algorithms a target takes; of those, the strongest that the initiator offers is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ChapAlgorithms {
    /// SHA-256 only: an initiator that offers less is refused.
    #[default]
    Sha256,
    /// MD5 too: for iPXE, and for initiators that offer nothing else.
    WithMd5,
}

impl ChapAlgorithms {
    /// Whether `algorithm` is one of them.
    pub(crate) fn allow(self, algorithm: ChapAlgorithm) -> bool {
        match (self, algorithm) {
            (Self::WithMd5, _) | (Self::Sha256, ChapAlgorithm::Sha256) => true,
            (Self::Sha256, ChapAlgorithm::Md5) => false,
        }
    }
}

/// CHAP_A values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChapAlgorithm {
    Md5,
    Sha256,
}

impl ChapAlgorithm {
    /// The strongest that the initiator offers in its list, whatever its order, and that is allowed.
    pub(crate) fn choose(offered: &str, allowed: ChapAlgorithms) -> Option<Self> {
        let strongest_first = [Self::Sha256, Self::Md5];
        strongest_first.into_iter().find(|algorithm| {
            let number = algorithm.number().to_string();
            allowed.allow(*algorithm) && offered.split(',').any(|offer| offer == number)
        })
    }

    /// Its number on the wire.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Md5 => 5,
            Self::Sha256 => 7,
        }
    }
}

/// Decodes a binary value (RFC 7143 §6.1): `0x` hexadecimal or `0b` base64.
pub(crate) fn decode_binary(value: &str) -> Option<Vec<u8>> {
    let prefix = value.get(..2)?;
    let digits = value.get(2..)?;
    if digits.len() > BINARY_LIMIT * 2 {
        return None;
    }
    let octets = match prefix {
        // An odd number of digits has an implied leading zero.
        "0x" | "0X" if digits.len() % 2 == 1 => hex::decode(format!("0{digits}")).ok()?,
        "0x" | "0X" => hex::decode(digits).ok()?,
        "0b" | "0B" => base64::engine::general_purpose::STANDARD.decode(digits).ok()?,
        _ => return None,
    };
    (octets.len() <= BINARY_LIMIT).then_some(octets)
}

/// Encodes a binary value as `0x` hexadecimal.
pub(crate) fn encode_binary(octets: &[u8]) -> String {
    format!("0x{}", hex::encode(octets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_values_are_read_in_both_encodings() {
        assert_eq!(decode_binary("0x0aff"), Some(vec![0x0a, 0xff]));
        assert_eq!(decode_binary("0xaff"), Some(vec![0x0a, 0xff]));
        assert_eq!(decode_binary("0bCv8="), Some(vec![0x0a, 0xff]));
        for bad in ["", "0", "0a", "0xg0", "0b*", "é0x"] {
            assert_eq!(decode_binary(bad), None, "{bad}");
        }
    }

    #[test]
    fn responses_match_the_definition() {
        let credentials = ChapCredentials::new("n1", "secret");
        // MD5(01 || "secret" || "challenge"), computed with md5sum; the same with sha256sum.
        let md5 = credentials.response(ChapAlgorithm::Md5, 1, b"challenge");
        let sha256 = credentials.response(ChapAlgorithm::Sha256, 1, b"challenge");
        assert_eq!(hex::encode(md5), "46e47770030e2b4e26a0db72a7efec00");
        assert_eq!(hex::encode(sha256), "2dfa0526f4764864b7c3c5bc6596bcead3d8dbd984f4fc1d9f330299f0beced4");
    }

    #[test]
    fn the_strongest_algorithm_wins_and_unknown_ones_are_refused() {
        for allowed in [ChapAlgorithms::Sha256, ChapAlgorithms::WithMd5] {
            assert_eq!(ChapAlgorithm::choose("5,7", allowed), Some(ChapAlgorithm::Sha256));
            assert_eq!(ChapAlgorithm::choose("6,8", allowed), None);
        }
        assert_eq!(ChapAlgorithm::choose("5", ChapAlgorithms::WithMd5), Some(ChapAlgorithm::Md5));
        assert_eq!(ChapAlgorithm::choose("5,6", ChapAlgorithms::Sha256), None);
    }

    #[test]
    fn debug_hides_the_secret() {
        assert!(!format!("{:?}", ChapCredentials::new("n1", "hunter2hunter2")).contains("hunter2"));
    }
}
