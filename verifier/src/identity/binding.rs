//! One EK, one node: which claim of an agent stands, which waits for an operator, and what an operator can say to it.
//! Pure: what is on record in, a decision out.
//!
//! ```text
//!                              on record                    first-use          approved
//!  node and EK belong together    yes                       known              known
//!  neither is on record                                     bound              incident `new-ek`
//!  the node has another EK                                  incident `other-ek`
//!  the EK is another node's                                 incident `other-node`
//! ```
//!
//! An incident is of an EK whose possession was proven. It refuses the agent until an operator settles it: by accepting
//! the EK, which takes the node and the EK out of every other binding, or by keeping what is on record.

use super::EkDigest;
use assay_wire::id::NodeId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Who binds a node to its first EK.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EkBinding {
    /// The first agent of a node that proves possession of an EK.
    #[default]
    FirstUse,
    /// An operator: beforehand, or by approving what came.
    Approved,
}

/// A node's identity on record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Identity {
    /// The node.
    pub node: NodeId,
    /// SHA-256 of its EK's DER `SubjectPublicKeyInfo`, hexadecimal.
    pub ek_sha256: String,
    /// When they were bound: milliseconds since the Unix epoch.
    pub bound_at_ms: i64,
    /// Who bound them.
    pub origin: Origin,
    /// The operator who did.
    pub bound_by: Option<String>,
    /// When the node last proved to have the EK; never, if it was only said beforehand. Milliseconds since the epoch.
    pub seen_at_ms: Option<i64>,
}

/// Who bound a node to an EK.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The node came first.
    FirstUse,
    /// It came, and an operator accepted it.
    Approved,
    /// An operator named the EK beforehand, and vouches for it: it needs no certificate.
    Allowed,
}

impl Origin {
    /// Its word in the database, in JSON and in tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FirstUse => "first-use",
            Self::Approved => "approved",
            Self::Allowed => "allowed",
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Origin {
    type Err = UnknownWord;
    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        let all = [Self::FirstUse, Self::Approved, Self::Allowed];
        all.into_iter().find(|origin| origin.as_str() == word).ok_or(UnknownWord)
    }
}

/// A word that is not one of those that are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown word")]
pub struct UnknownWord;

/// What becomes of a node's claim to be the one with an EK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityClaim {
    /// They are bound to one another.
    Known(Identity),
    /// Nothing is known of either.
    New,
    /// The node is bound to another EK.
    OtherEk(Identity),
    /// The EK is bound to another node.
    OtherNode(Identity),
}

/// Compares a claim with `known`: the identities that have the node or the EK.
#[must_use]
pub fn claim(node: &NodeId, ek: &EkDigest, known: &[Identity]) -> IdentityClaim {
    if let Some(own) = known.iter().find(|identity| identity.node == *node) {
        let same = own.ek_sha256 == ek.as_str();
        return if same { IdentityClaim::Known(own.clone()) } else { IdentityClaim::OtherEk(own.clone()) };
    }
    let other = known.iter().find(|identity| identity.ek_sha256 == ek.as_str());
    other.map_or(IdentityClaim::New, |other| IdentityClaim::OtherNode(other.clone()))
}

impl IdentityClaim {
    /// The incident that the claim is; none if it stands.
    #[must_use]
    pub fn incident(&self) -> Option<IncidentKind> {
        match self {
            Self::Known(_) => None,
            Self::New => Some(IncidentKind::NewEk),
            Self::OtherEk(_) => Some(IncidentKind::OtherEk),
            Self::OtherNode(_) => Some(IncidentKind::OtherNode),
        }
    }
}

/// What kind of incident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum IncidentKind {
    /// A node's first EK, at a site where an operator approves it.
    NewEk,
    /// A node came with another EK than the one on record.
    OtherEk,
    /// An EK came as another node than the one on record.
    OtherNode,
}

impl IncidentKind {
    /// Its word in the database, in JSON and in tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NewEk => "new-ek",
            Self::OtherEk => "other-ek",
            Self::OtherNode => "other-node",
        }
    }
}

impl fmt::Display for IncidentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for IncidentKind {
    type Err = UnknownWord;
    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        let all = [Self::NewEk, Self::OtherEk, Self::OtherNode];
        all.into_iter().find(|kind| kind.as_str() == word).ok_or(UnknownWord)
    }
}

/// How an operator settles an incident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Settlement {
    /// The EK is the node's from now on, and nobody else's.
    AcceptEk,
    /// What is on record stays; the agent stays refused.
    Keep,
}

impl Settlement {
    /// Its word in the database, in JSON and in tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AcceptEk => "accept-ek",
            Self::Keep => "keep",
        }
    }
}

impl fmt::Display for Settlement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Settlement {
    type Err = UnknownWord;
    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        let all = [Self::AcceptEk, Self::Keep];
        all.into_iter().find(|settlement| settlement.as_str() == word).ok_or(UnknownWord)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(node: &str, ek: &EkDigest) -> Identity {
        Identity {
            node: node.parse().unwrap(),
            ek_sha256: ek.to_string(),
            bound_at_ms: 1,
            origin: Origin::FirstUse,
            bound_by: None,
            seen_at_ms: None,
        }
    }

    #[test]
    fn a9_one_ek_is_one_node_and_one_node_one_ek() {
        let (one, other): (EkDigest, EkDigest) = ("aa".repeat(32).parse().unwrap(), "bb".repeat(32).parse().unwrap());
        let (n1, n2) = ("n1".parse().unwrap(), "n2".parse().unwrap());
        let (bound, second) = (identity("n1", &one), identity("n2", &other));
        assert_eq!(claim(&n1, &one, &[]), IdentityClaim::New);
        assert_eq!(claim(&n1, &one, std::slice::from_ref(&bound)), IdentityClaim::Known(bound.clone()));
        assert_eq!(claim(&n1, &other, std::slice::from_ref(&bound)), IdentityClaim::OtherEk(bound.clone()));
        assert_eq!(claim(&n2, &one, std::slice::from_ref(&bound)), IdentityClaim::OtherNode(bound.clone()));
        // Both are taken: what matters is that the claim does not stand.
        assert_eq!(claim(&n1, &other, &[bound.clone(), second]), IdentityClaim::OtherEk(bound));
    }

    #[test]
    fn words_are_read_back() {
        for origin in [Origin::FirstUse, Origin::Approved, Origin::Allowed] {
            assert_eq!(origin.to_string().parse(), Ok(origin));
        }
        for kind in [IncidentKind::NewEk, IncidentKind::OtherEk, IncidentKind::OtherNode] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        for settlement in [Settlement::AcceptEk, Settlement::Keep] {
            assert_eq!(settlement.to_string().parse(), Ok(settlement));
        }
        assert_eq!("".parse::<Origin>(), Err(UnknownWord));
    }

    #[test]
    fn digests_are_64_digits_with_or_without_their_algorithm() {
        let digest: EkDigest = format!("sha256:{}", "AB".repeat(32)).parse().unwrap();
        assert_eq!(digest.as_str(), "ab".repeat(32));
        for text in ["", "sha256:", "ab", &"zz".repeat(32)] {
            assert_eq!(text.parse::<EkDigest>(), Err(crate::identity::NotADigest), "{text}");
        }
    }
}
