//! The section `[ima]` of a policy: what the tenant's operating system may run, read and load. Data only; a section that
//! would let code through by leaving it out is refused when the policy is read.
//!
//! ```toml
//! [ima]
//! mode = "enforce"
//! violations = "refuse"
//! digests = ["sha256:aa…"]               # good wherever they lie
//! exclude = ["/var/log/*", "/tmp/*"]     # data that nobody runs; `*` stands for anything, `?` for one octet
//! refuse = ["sha256:bb…"]                # never good, excluded path or not
//! exclude_buffers = ["dm_*"]
//!
//! [ima.files]
//! "/usr/bin/ls" = ["sha256:cc…", "verity:sha256:dd…"]
//!
//! [ima.buffers]                          # keyrings and other buffers: `ima-buf`
//! ".ima" = ["sha256:ee…"]
//!
//! [[ima.keys]]                           # files that are signed (`ima-sig`) by one of these are good
//! name = "distribution"
//! pem = "-----BEGIN CERTIFICATE-----…"
//! paths = ["/usr/*"]
//!
//! [ima.measured_policy]                  # the kernel's own IMA policy must be loaded before anything else is measured
//! path = "/etc/ima/ima-policy"
//! digests = ["sha256:ff…"]
//! after = ["/init", "/usr/lib/systemd/*"]
//! ```
//!
//! An entry does not say whether its file was run or read, so excluded paths are a hole that a policy should keep
//! small: none may cover a place where code lies, and where the template has the file's mode (`evm-sig`), an
//! executable is judged even there.

use super::signature::Key;
use super::template::{DigestKind, FileDigest};
use crate::policy::{Mode, glob};
use serde::{Deserialize, Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::str::FromStr;

/// What a measurement list may hold. Members are in alphabetical order, as everywhere in a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImaPolicy {
    /// Digests of buffers by name: of the keys in a keyring, of critical data.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub buffers: BTreeMap<String, Vec<ImaDigest>>,
    /// Digests that are good under any path.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub digests: BTreeSet<ImaDigest>,
    /// Paths that are not judged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<Glob>,
    /// Buffers that are not judged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude_buffers: Vec<Glob>,
    /// Digests of files by path. Looked up for each entry of a list, and written in alphabetical order.
    #[serde(default, serialize_with = "in_order", skip_serializing_if = "Files::is_empty")]
    pub files: Files,
    /// Whose signatures make a file good.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<SigningKey>,
    /// The kernel's IMA policy, if it must be loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_policy: Option<MeasuredPolicy>,
    /// What a deviation means.
    pub mode: Mode,
    /// Digests that are never good.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub refuse: BTreeSet<ImaDigest>,
    /// What a violation means.
    #[serde(default)]
    pub violations: Violations,
}

/// Digests by path. The paths are the operator's, so nobody chooses them to collide, and a fast hash will do.
pub type Files = HashMap<String, Vec<ImaDigest>, foldhash::fast::RandomState>;

/// What it means that a file was written while it was measured. Nothing vouches for the path of a violation, so there
/// is no allowing them by path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Violations {
    /// A deviation.
    #[default]
    Refuse,
    /// Nothing.
    Allow,
}

/// A key that signs files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SigningKey {
    /// What people call it.
    pub name: String,
    /// What it may sign; everything if there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<Glob>,
    /// An X.509 certificate or a public key, in PEM.
    pub pem: String,
}

/// The IMA policy that the tenant's kernel must load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredPolicy {
    /// What may be measured before it: what loads it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<Glob>,
    /// Any of these.
    pub digests: Vec<ImaDigest>,
    /// The file that it is loaded from.
    pub path: String,
}

/// As a policy's digest needs it: the same files, the same octets.
fn in_order<S: Serializer>(files: &Files, serializer: S) -> Result<S::Ok, S::Error> {
    files.iter().collect::<BTreeMap<_, _>>().serialize(serializer)
}

impl ImaPolicy {
    /// Puts problems where the mode says that they belong.
    pub(super) fn sort(&self, problems: Vec<String>, reasons: &mut Vec<String>, warnings: &mut Vec<String>) {
        match self.mode {
            Mode::Enforce => reasons.extend(problems),
            Mode::Warn => warnings.extend(problems),
        }
    }

    /// Why this section is no policy.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let digests = self.files.iter().chain(&self.buffers);
        if let Some((name, _)) = digests.clone().find(|(name, digests)| name.is_empty() || digests.is_empty()) {
            return Some(format!("`{name}` has no name or no digest"));
        }
        let after = self.measured_policy.iter().flat_map(|measured| &measured.after);
        let globs = self.exclude.iter().chain(&self.exclude_buffers).chain(after);
        let mut globs = globs.chain(self.keys.iter().flat_map(|key| &key.paths));
        if let Some(glob) = globs.find(|glob| glob.0.is_empty() || glob.0.len() > MOST_GLOB_BYTES) {
            return Some(format!("pattern `{}` is empty or longer than {MOST_GLOB_BYTES} octets", glob.0));
        }
        if self.exclude.len() > MOST_GLOBS || self.exclude_buffers.len() > MOST_GLOBS || self.keys.len() > MOST_KEYS {
            return Some(format!("more than {MOST_GLOBS} patterns or {MOST_KEYS} keys"));
        }
        for glob in &self.exclude {
            if let Some(code) = PLACES_OF_CODE.into_iter().find(|place| glob.matches(place.as_bytes())) {
                return Some(format!("excluding `{}` would let any `{code}` run", glob.0));
            }
        }
        if self.exclude_buffers.iter().any(|glob| glob.matches(b".ima")) {
            return Some("excluding the keyring `.ima` would let any key sign files".to_owned());
        }
        if self.measured_policy.as_ref().is_some_and(|measured| measured.digests.is_empty()) {
            return Some("the measured policy has no digest".to_owned());
        }
        self.keys.iter().find_map(|key| Key::read(key).err().map(|problem| format!("key `{}` {problem}", key.name)))
    }
}

/// A digest of a file, like `sha256:<hex>`; of its fs-verity descriptor, like `verity:sha256:<hex>`. SHA-1 is none.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde_with::SerializeDisplay, serde_with::DeserializeFromStr,
)]
pub struct ImaDigest {
    algorithm: StrongAlgorithm,
    verity: bool,
    /// Filled with zeros: in place, because one is made for every entry of a list.
    octets: [u8; 64],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum StrongAlgorithm {
    Sha256,
    Sha384,
    Sha512,
}

impl StrongAlgorithm {
    const ALL: [(Self, &str); 3] = [(Self::Sha256, "sha256"), (Self::Sha384, "sha384"), (Self::Sha512, "sha512")];

    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    fn digest_bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }
}

impl ImaDigest {
    /// The digest that an entry has; none if it is of an algorithm that counts for nothing.
    #[must_use]
    pub fn of(digest: &FileDigest<'_>) -> Option<Self> {
        let known = StrongAlgorithm::ALL.into_iter().find(|(_, name)| *name == digest.algorithm);
        known.and_then(|(algorithm, _)| Self::new(algorithm, digest.kind == DigestKind::Verity, digest.octets))
    }

    /// Whether an entry has this digest: as comparing it with [`ImaDigest::of`], without making one.
    #[must_use]
    pub fn is(&self, digest: &FileDigest<'_>) -> bool {
        let octets = &self.octets[..self.algorithm.digest_bytes()];
        self.verity == (digest.kind == DigestKind::Verity)
            && self.algorithm.name() == digest.algorithm
            && octets == digest.octets
    }

    fn new(algorithm: StrongAlgorithm, verity: bool, digest: &[u8]) -> Option<Self> {
        let mut octets = [0; 64];
        (digest.len() == algorithm.digest_bytes()).then(|| octets[..digest.len()].copy_from_slice(digest))?;
        Some(Self { algorithm, verity, octets })
    }
}

impl fmt::Display for ImaDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verity = if self.verity { "verity:" } else { "" };
        write!(f, "{verity}{}:{}", self.algorithm.name(), hex::encode(&self.octets[..self.algorithm.digest_bytes()]))
    }
}

impl FromStr for ImaDigest {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text.strip_prefix("verity:");
        let problem = "a digest is written sha256:<hex>, sha384:<hex> or sha512:<hex>, with verity: before it or not";
        let (name, digits) = rest.unwrap_or(text).split_once(':').ok_or(problem)?;
        let known = StrongAlgorithm::ALL.into_iter().find(|(_, known)| *known == name);
        let (algorithm, _) = known.ok_or(problem)?;
        let octets = hex::decode(digits).map_err(|_| problem)?;
        Self::new(algorithm, rest.is_some(), &octets).ok_or(problem)
    }
}

/// A pattern of a path: `*` stands for any octets, slashes too, and `?` for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Glob(pub String);

impl Glob {
    /// Whether all of `text` is of this pattern.
    #[must_use]
    pub fn matches(&self, text: &[u8]) -> bool {
        glob::matches_octets(self.0.as_bytes(), text)
    }
}

/// Files that no excluded path may cover: one for each place where a Linux system keeps code.
const PLACES_OF_CODE: [&str; 12] = [
    "/init",
    "/bin/sh",
    "/sbin/init",
    "/lib/modules/m.ko",
    "/lib64/ld-linux-x86-64.so.2",
    "/usr/bin/env",
    "/usr/sbin/sshd",
    "/usr/lib/systemd/systemd",
    "/usr/lib/x86_64-linux-gnu/libc.so.6",
    "/usr/lib64/libc.so.6",
    "/usr/local/bin/tool",
    "/etc/ima/ima-policy",
];
const MOST_GLOBS: usize = 1000;
const MOST_GLOB_BYTES: usize = 1024;
const MOST_KEYS: usize = 64;
