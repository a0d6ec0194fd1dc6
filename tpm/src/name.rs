//! Names of TPM objects (TPM 2.0 Part 1, section 16): the algorithm and the digest of the public area. A name is
//! always computed here from a public area, never taken from the wire, so that a key cannot borrow another's name.

use crate::algorithm::HashAlgorithm;
use std::fmt;

/// An object's name: `nameAlg` followed by the digest of its `TPMT_PUBLIC`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Name(Vec<u8>);

impl Name {
    /// The name of the object with the public area `tpmt_public`.
    pub(crate) fn of(algorithm: HashAlgorithm, tpmt_public: &[u8]) -> Self {
        let mut name = algorithm.id().to_be_bytes().to_vec();
        name.extend_from_slice(algorithm.digest(tpmt_public).as_ref());
        Self(name)
    }

    /// Algorithm (two octets) and digest.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({self})")
    }
}
