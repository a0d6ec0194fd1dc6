//! Names of pools, namespaces, images and users: checked once, never mixed up, and of a fixed length where that matters.
//!
//! A key's capabilities name objects by the *beginning* of their names. An image is found by the object `rbd_id.<name>`,
//! so a key for an image `node1` would open `node10` too. [`ImageName`] therefore has one length, always.

use serde::{Deserialize, Serialize};
use std::fmt;
use zeroize::Zeroizing;

/// A name is not one that Ceph's capability strings and commands can hold literally.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {what}: {rule}")]
pub struct MalformedName {
    what: &'static str,
    text: String,
    rule: &'static str,
}

/// No quotes, spaces, slashes or commas: these names are written into capability strings.
fn is_plain(text: &str) -> bool {
    let ends = |octet: u8| octet.is_ascii_alphanumeric();
    let inner = |octet: u8| ends(octet) || matches!(octet, b'-' | b'_' | b'.');
    let bytes = text.as_bytes();
    (1..=64).contains(&bytes.len())
        && bytes.iter().all(|octet| inner(*octet))
        && bytes.first().is_some_and(|octet| ends(*octet))
        && bytes.last().is_some_and(|octet| ends(*octet))
}

const PLAIN_RULE: &str = "1 to 64 letters, digits, `-`, `_` and `.`, of which the first and last are letters or digits";

macro_rules! plain_name {
    ($(#[$about:meta])* $name:ident, $what:literal) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Takes `text` as it is.
            ///
            /// # Errors
            /// It has other characters than letters, digits, `-`, `_` and `.`, or more than 64.
            pub fn new(text: &str) -> Result<Self, MalformedName> {
                if is_plain(text) {
                    return Ok(Self(text.to_owned()));
                }
                Err(MalformedName { what: $what, text: text.to_owned(), rule: PLAIN_RULE })
            }

            /// The name.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = MalformedName;

            fn try_from(text: String) -> Result<Self, MalformedName> {
                Self::new(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

plain_name! {
    /// A pool.
    PoolName, "pool name"
}
plain_name! {
    /// A namespace within a pool: one per project. Never the pool's default namespace, which has no name.
    Namespace, "namespace"
}
plain_name! {
    /// A snapshot of an image.
    SnapshotName, "snapshot name"
}
plain_name! {
    /// A cephx user, without the `client.` before it.
    CephUser, "cephx user"
}

impl CephUser {
    /// As Ceph writes it: `client.<user>`.
    #[must_use]
    pub fn entity(&self) -> String {
        format!("client.{}", self.0)
    }
}

/// What an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ImageKind {
    /// A golden image: complete once it has its snapshot, and never written then.
    Golden,
    /// A copy of a golden image that is to take its place: of the same number.
    Replacement,
    /// A node's disk: a clone.
    Disk,
}

impl ImageKind {
    fn letter(self) -> char {
        match self {
            Self::Golden => 'g',
            Self::Replacement => 'r',
            Self::Disk => 'd',
        }
    }
}

/// An image's name within its namespace: one letter for its kind and 32 hexadecimal digits, so that no name is the
/// beginning of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName {
    kind: ImageKind,
    number: u128,
}

impl ImageName {
    /// Characters of every name.
    pub const LENGTH: usize = 33;

    /// The name of what has this number, such as a UUID.
    #[must_use]
    pub fn numbered(kind: ImageKind, number: u128) -> Self {
        Self { kind, number }
    }

    /// The name of what people call `text`: 128 bits of its SHA-256. The text itself is kept in the image's metadata.
    #[must_use]
    pub fn derived(kind: ImageKind, text: &str) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        let number = digest.as_ref().iter().take(16).fold(0, |number, octet| number << 8 | u128::from(*octet));
        Self { kind, number }
    }

    /// Reads a name as Ceph lists it. `None` for an image that is not ours.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let kinds = [ImageKind::Golden, ImageKind::Replacement, ImageKind::Disk];
        let kind = kinds.into_iter().find(|kind| text.starts_with(kind.letter()))?;
        let number = u128::from_str_radix(text.get(1..)?, 16).ok()?;
        let name = Self { kind, number };
        (name.to_string() == text).then_some(name)
    }

    /// What it is for.
    #[must_use]
    pub fn kind(self) -> ImageKind {
        self.kind
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u128 {
        self.number
    }
}

impl TryFrom<String> for ImageName {
    type Error = MalformedName;

    fn try_from(text: String) -> Result<Self, MalformedName> {
        Self::parse(&text).ok_or(MalformedName {
            what: "image name",
            text,
            rule: "`g`, `r` or `d` and 32 hexadecimal digits",
        })
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:032x}", self.kind.letter(), self.number)
    }
}

/// The id that librbd gave an image: part of the names of its objects.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageObjectId(String);

impl ImageObjectId {
    /// Takes an id as librbd writes it.
    ///
    /// # Errors
    /// It is no lower-case hexadecimal number: it would not be one in a capability string either.
    pub fn new(text: &str) -> Result<Self, MalformedName> {
        let hexadecimal = |octet: u8| octet.is_ascii_digit() || (b'a'..=b'f').contains(&octet);
        if (8..=32).contains(&text.len()) && text.bytes().all(hexadecimal) {
            return Ok(Self(text.to_owned()));
        }
        Err(MalformedName { what: "image id", text: text.to_owned(), rule: "8 to 32 hexadecimal digits" })
    }

    /// The id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ImageObjectId {
    type Error = MalformedName;

    fn try_from(text: String) -> Result<Self, MalformedName> {
        Self::new(&text)
    }
}

impl From<ImageObjectId> for String {
    fn from(id: ImageObjectId) -> Self {
        id.0
    }
}

impl fmt::Display for ImageObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A cephx key in base64. Redacted when shown, wiped when dropped; an order that carries it, carries it openly.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Zeroizing<String>", into = "Zeroizing<String>")]
pub struct CephKey(Zeroizing<String>);

impl CephKey {
    /// Takes a key as keyrings hold it.
    ///
    /// # Errors
    /// It is no base64 of a plausible length.
    pub fn new(text: &str) -> Result<Self, MalformedName> {
        let base64 = |octet: u8| octet.is_ascii_alphanumeric() || matches!(octet, b'+' | b'/' | b'=');
        let text = text.trim();
        if (16..=128).contains(&text.len()) && text.bytes().all(base64) {
            return Ok(Self(Zeroizing::new(text.to_owned())));
        }
        Err(MalformedName { what: "cephx key", text: "<redacted>".to_owned(), rule: "base64, as in a keyring" })
    }

    /// The key itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl TryFrom<Zeroizing<String>> for CephKey {
    type Error = MalformedName;

    fn try_from(text: Zeroizing<String>) -> Result<Self, MalformedName> {
        Self::new(&text)
    }
}

impl From<CephKey> for Zeroizing<String> {
    fn from(key: CephKey) -> Self {
        key.0
    }
}

impl fmt::Debug for CephKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CephKey(<redacted>)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_that_ends_a_capability_is_a_name() {
        for bad in ["", "a b", "a,b", "a'b", "a\"b", "a/b", "a=b", "a;b", "-a", "a.", "a\0b", "ä", &"a".repeat(65)] {
            assert!(Namespace::new(bad).is_err(), "{bad}");
            assert!(PoolName::new(bad).is_err(), "{bad}");
            assert!(CephUser::new(bad).is_err(), "{bad}");
        }
        assert_eq!(Namespace::new("project-a.1").unwrap().as_str(), "project-a.1");
        assert!(ImageObjectId::new("10a76b8b4567").is_ok());
        assert!(ImageObjectId::new("10a7").is_err());
        assert!(ImageObjectId::new("10a76b8b45 7").is_err());
    }

    #[test]
    fn a_key_does_not_show() {
        let key = CephKey::new("AQBzaGliYm9sZXRoIGlzIG5vdCBhIGtleSE=\n").unwrap();
        assert!(!format!("{key:?}").contains("AQB"));
        let refused = CephKey::new("AQBz secret with spaces").unwrap_err();
        assert!(!format!("{refused} {refused:?}").contains("secret"));
    }

    proptest! {
        #[test]
        fn image_names_have_one_length_and_read_back(number: u128, text in ".{0,40}") {
            for kind in [ImageKind::Golden, ImageKind::Replacement, ImageKind::Disk] {
                for name in [ImageName::numbered(kind, number), ImageName::derived(kind, &text)] {
                    prop_assert_eq!(name.to_string().len(), ImageName::LENGTH);
                    prop_assert_eq!(ImageName::parse(&name.to_string()), Some(name));
                }
                prop_assert_eq!(ImageName::numbered(kind, number).number(), number);
            }
            prop_assert_eq!(ImageName::parse(&text), None);
        }
    }
}
