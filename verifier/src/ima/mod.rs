//! IMA: the kernel's runtime measurement list (Linux, `Documentation/security/IMA-templates.rst`), which names every file
//! that a node measured since it booted, and PCR 10, into which the kernel extends each entry.
//!
//! ```text
//!  binary list ─┐
//!               ├─▶ MeasurementList ──▶ entries ──▶ Replay of PCR 10 ──▶ advance ──▶ the next ImaState, or reasons
//!  ASCII list ──┘     bounded, zero-copy             against the quote    against the policy
//! ```
//!
//! The list travels with no integrity protection of its own: the extensions, made again in order, must give the PCR 10
//! of a verified quote. The kernel may have measured more between the reading of PCR 10 and of the list, so the list
//! may be longer than the quote: it is replayed to a prefix, and what comes after the prefix is not looked at.
//!
//! What replay vouches for: the template data of each entry but a violation's. A violation extends 0xff octets whatever
//! its data, so its path is what the list's keeper says, and a policy may only allow violations or not.

pub mod policy;

mod ascii;
mod boot;
mod digest;
mod judge;
mod parse;
mod replay;
mod signature;
mod state;
mod template;

#[cfg(any(test, feature = "testing"))]
pub mod writer;

pub use self::boot::BootList;
pub use self::parse::{Entries, ImaError};
pub use self::replay::{Extension, Replay};
pub use self::state::{Advanced, ImaState, advance};
pub use self::template::{DigestKind, Field, FileDigest};

use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::evidence::{MAX_IMA_ENTRY_BYTES, MAX_IMA_LIST_BYTES};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

/// The PCR of IMA, unless a rule of the kernel's IMA policy names another.
pub const IMA_PCR: u8 = 10;

/// The name of the first entry of every kernel's list: the digest of PCRs 0 to 9.
pub const BOOT_AGGREGATE: &[u8] = b"boot_aggregate";

/// How much list is read before it is refused. Checked against the input's size, not against what the input says.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Octets in the list.
    pub list_bytes: usize,
    /// Octets in one entry's template data.
    pub template_bytes: usize,
}

impl Limits {
    /// What one piece of evidence may carry.
    pub const EVIDENCE: Self = Self { list_bytes: MAX_IMA_LIST_BYTES, template_bytes: MAX_IMA_ENTRY_BYTES };
    /// What an operator may look at: a machine that has been up for a year.
    pub const FILE: Self = Self { list_bytes: 512 << 20, template_bytes: MAX_IMA_ENTRY_BYTES };
}

/// A list, or a stretch of one, that was believed in nothing.
#[derive(Debug, Clone)]
pub struct MeasurementList<'a> {
    bytes: Cow<'a, [u8]>,
    template_digest: HashAlgorithm,
    limits: Limits,
}

impl<'a> MeasurementList<'a> {
    /// A list as `binary_runtime_measurements` has it. Its entries are decoded as they are asked for.
    ///
    /// # Errors
    /// Longer than `limits` allow.
    pub fn binary(bytes: &'a [u8], limits: Limits) -> Result<Self, ImaError> {
        Self::of_bank(bytes, HashAlgorithm::Sha1, limits)
    }

    /// A list as `binary_runtime_measurements_<bank>` has it (Linux 6.10), whose template digests are of that bank.
    ///
    /// # Errors
    /// Longer than `limits` allow.
    pub fn of_bank(bytes: &'a [u8], template_digest: HashAlgorithm, limits: Limits) -> Result<Self, ImaError> {
        check_size(bytes, limits)?;
        Ok(Self { bytes: Cow::Borrowed(bytes), template_digest, limits })
    }

    /// A list from a file, binary or ASCII, as its first octets say: for people's tools.
    ///
    /// # Errors
    /// Longer than [`Limits::FILE`], or an ASCII list with a line that is no entry.
    pub fn from_file(bytes: &'a [u8]) -> Result<Self, ImaError> {
        check_size(bytes, Limits::FILE)?;
        // A binary list begins with the PCR in four octets, the last three of them zero.
        if bytes.first().is_some_and(u8::is_ascii_digit) && !bytes[..bytes.len().min(4)].contains(&0) {
            let (bytes, template_digest) = ascii::to_binary(bytes, Limits::FILE)?;
            return Ok(Self { bytes: Cow::Owned(bytes), template_digest, limits: Limits::FILE });
        }
        Self::binary(bytes, Limits::FILE)
    }

    /// Its entries, in order. The first that is not whole ends them with an error.
    #[must_use]
    pub fn entries(&self) -> Entries<'_> {
        Entries::new(&self.bytes, self.template_digest, self.limits)
    }

    /// Octets of the list in its binary form.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has no entry at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What the list comes to in `bank`: every PCR that has an entry, begun at zero. To show, or to compare with values
    /// that somebody else vouches for.
    ///
    /// # Errors
    /// An entry is not whole.
    pub fn compute_pcrs(&self, bank: HashAlgorithm, extension: Extension) -> Result<BTreeMap<u32, Vec<u8>>, ImaError> {
        let mut replays: BTreeMap<u32, Replay> = BTreeMap::new();
        for entry in self.entries() {
            let entry = entry?;
            replays.entry(entry.pcr()).or_insert_with(|| Replay::start(bank, extension)).extend(&entry);
        }
        Ok(replays.into_iter().map(|(pcr, replay)| (pcr, replay.value().to_vec())).collect())
    }
}

fn check_size(bytes: &[u8], limits: Limits) -> Result<(), ImaError> {
    if bytes.len() > limits.list_bytes {
        return Err(ImaError::TooLarge { bytes: bytes.len(), limit: limits.list_bytes });
    }
    Ok(())
}

/// One entry: a file, a buffer or a violation that the kernel measured.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    index: u64,
    pcr: u32,
    template_digest_algorithm: HashAlgorithm,
    template_digest: &'a [u8],
    violation: bool,
    template: &'a str,
    data: TemplateData<'a>,
    fields: Fields<'a>,
}

/// The octets that the template digest is of.
#[derive(Debug, Clone, Copy)]
enum TemplateData<'a> {
    /// Each field after its size: what the list has is what the kernel hashed.
    Sized(&'a [u8]),
    /// The oldest template, `ima`: a SHA-1 digest and a name that is filled with zeros to 256 octets.
    Legacy { digest: &'a [u8], name: &'a [u8] },
}

/// The fields that anybody decides by.
#[derive(Debug, Clone, Copy, Default)]
struct Fields<'a> {
    known: bool,
    digest: Option<FileDigest<'a>>,
    name: &'a [u8],
    signature: &'a [u8],
    buffer: Option<&'a [u8]>,
    mode: Option<u16>,
}

impl<'a> Entry<'a> {
    /// Its place in the list, or in the stretch of it that was read; 0 is the first.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Its PCR: 10, unless the kernel's IMA policy says otherwise or the list lies.
    #[must_use]
    pub fn pcr(&self) -> u32 {
        self.pcr
    }

    /// The name of its template, or its format where it has no name: `ima-ng`, `d-ng|n-ng|sig`.
    #[must_use]
    pub fn template(&self) -> &'a str {
        self.template
    }

    /// The template digest as the list has it: what the SHA-1 bank was extended with.
    #[must_use]
    pub fn template_digest(&self) -> &'a [u8] {
        self.template_digest
    }

    /// Whether the template digest is that of the template data; for a violation, which has none, `None`.
    #[must_use]
    pub fn template_digest_matches(&self) -> Option<bool> {
        (!self.is_violation()).then(|| {
            let digest = replay::template_digest(self, self.template_digest_algorithm);
            digest.as_slice() == self.template_digest
        })
    }

    /// Whether the kernel could not measure the file, because it was being written while it was read: the template
    /// digest is zero, and what was extended says nothing of the rest of the entry.
    #[must_use]
    pub fn is_violation(&self) -> bool {
        self.violation
    }

    /// Whether every field of the template is known here.
    #[must_use]
    pub fn is_understood(&self) -> bool {
        self.fields.known
    }

    /// The path of the file, or the name of what was measured: `boot_aggregate`, a keyring. Any octets but zero; the
    /// kernel has replaced spaces by underscores.
    #[must_use]
    pub fn name(&self) -> &'a [u8] {
        self.fields.name
    }

    /// Its name for sentences: control characters, quotes and what is no text are escaped, and it is cut.
    #[must_use]
    pub fn shown_name(&self) -> String {
        let cut = &self.fields.name[..self.fields.name.len().min(MOST_SHOWN_BYTES)];
        let more = if cut.len() < self.fields.name.len() { "…" } else { "" };
        format!("{}{more}", cut.escape_ascii())
    }

    /// The digest of the file or buffer.
    #[must_use]
    pub fn file_digest(&self) -> Option<FileDigest<'a>> {
        self.fields.digest
    }

    /// The file's `security.ima` signature; empty if it has none.
    #[must_use]
    pub fn signature(&self) -> &'a [u8] {
        self.fields.signature
    }

    /// The buffer that was measured, if this is not about a file: a key, a command line, critical data.
    #[must_use]
    pub fn buffer(&self) -> Option<&'a [u8]> {
        self.fields.buffer
    }

    /// The file's mode, in templates that have it (`evm-sig`).
    #[must_use]
    pub fn mode(&self) -> Option<u16> {
        self.fields.mode
    }
}

impl fmt::Display for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.shown_name())
    }
}

/// Octets of a name in a sentence.
const MOST_SHOWN_BYTES: usize = 256;

#[cfg(test)]
mod tests;
