//! Names and identifiers that cannot be swapped for one another.
//!
//! What an operator names (projects, nodes, networks, switches, images) is a [`Label`]-shaped name; what a service
//! creates (leases, admissions, sessions, boots) is a random UUID.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a name is not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{value}` is not a valid {kind}: use 1 to 63 of a-z, 0-9 and `-`, not starting or ending with `-`")]
pub struct InvalidName {
    kind: &'static str,
    value: String,
}

/// Whether `value` is an RFC 1123 host label in lower case.
fn is_label(value: &str) -> bool {
    let bytes = value.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && bytes.first() != Some(&b'-')
        && bytes.last() != Some(&b'-')
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String, example = "n1")]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = InvalidName;

            fn from_str(value: &str) -> Result<Self, Self::Err> {
                if is_label(value) {
                    Ok(Self(value.to_owned()))
                } else {
                    Err(InvalidName { kind: $kind, value: value.chars().take(80).collect() })
                }
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidName;

            fn try_from(value: String) -> Result<Self, Self::Error> {
                value.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = String, format = "uuid")]
        pub struct $type(uuid::Uuid);

        impl $type {
            /// A new random identifier.
            #[must_use]
            pub fn random() -> Self {
                Self(uuid::Uuid::new_v4())
            }

            /// The identifier's 16 bytes.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl FromStr for $type {
            type Err = uuid::Error;

            fn from_str(value: &str) -> Result<Self, Self::Err> {
                value.parse().map(Self)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

name!(/// A node: always the machine, named by its operator.
    NodeId, "node name");
name!(/// A project: what owns networks and images and holds leases.
    ProjectId, "project name");
name!(/// A network of a project; isolation maps it to a VLAN.
    NetworkId, "network name");
name!(/// A switch.
    SwitchId, "switch name");
name!(/// A golden image.
    ImageId, "image name");
name!(/// A NIC of a node.
    NicId, "NIC name");

uuid_id!(/// A node lease: this project uses this node.
    LeaseId);
uuid_id!(/// One boot of a node through the airlock. A reset makes a new one, so results of the last boot are worth nothing.
    BootId);
uuid_id!(/// One admission: made from one attestation result (it is the result's `jti`), ended by revocation or expiry.
    AdmissionId);
uuid_id!(/// One agent's conversation with the verifier, from enrolment to hand-over.
    SessionId);
uuid_id!(/// One image as the stores know it: of one length, and never another's, whatever the image is called and comes to be called.
    ImageKey);
uuid_id!(/// One upload: a file on its way to become an image.
    UploadId);
uuid_id!(/// One disk: a copy-on-write clone of a golden image that belongs to a lease.
    DiskId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_lower_case_labels() {
        for good in ["n1", "a", "rack-12-node-3", &"x".repeat(63)] {
            assert_eq!(good.parse::<NodeId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a b", "a\n", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn json_is_checked_like_text() {
        assert!(serde_json::from_str::<NodeId>("\"n1\"").is_ok());
        assert!(serde_json::from_str::<NodeId>("\"n1\\n\"").is_err());
    }
}
