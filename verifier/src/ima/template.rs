//! Templates: which fields an entry has, and what is in them (Linux `security/integrity/ima/ima_template.c` and
//! `ima_template_lib.c`). A template is known by its name, or by its format if it has no name.

use super::Fields;
use assay_tpm::reader::{DecodeError, Reader};

/// One field of a template, named in formats as [`Field::from_id`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `d`: SHA-1 or MD5 of the file, in 20 octets.
    Digest,
    /// `d-ng`: algorithm and digest of the file.
    DigestNg,
    /// `d-ngv2`: kind, algorithm and digest of the file.
    DigestNgV2,
    /// `n`: path, up to 255 octets.
    Name,
    /// `n-ng`: path.
    NameNg,
    /// `sig`: the file's signature.
    Signature,
    /// `buf`: the buffer.
    Buffer,
    /// `d-modsig`: digest of the file without its appended signature.
    ModsigDigest,
    /// `modsig`: the appended signature.
    Modsig,
    /// `evmsig`: EVM's portable signature.
    EvmSignature,
    /// `xattrnames`: names of the extended attributes.
    XattrNames,
    /// `xattrlengths`: their lengths.
    XattrLengths,
    /// `xattrvalues`: their values.
    XattrValues,
    /// `iuid`: owner.
    Uid,
    /// `igid`: group.
    Gid,
    /// `imode`: type and permissions.
    Mode,
}

impl Field {
    /// The field that a format calls `id`.
    #[must_use]
    pub fn from_id(id: &str) -> Option<Self> {
        FIELDS.iter().find(|(known, _)| *known == id).map(|(_, field)| *field)
    }
}

/// The fields of a template, in order; none if a field is not known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    fields: [Field; MOST_FIELDS],
    count: usize,
}

impl Layout {
    pub(super) fn of(template: &str) -> Option<Self> {
        let format = FORMATS.iter().find(|(name, _)| *name == template).map_or(template, |(_, format)| format);
        let mut layout = Self { fields: [Field::Digest; MOST_FIELDS], count: 0 };
        for id in format.split('|') {
            *layout.fields.get_mut(layout.count)? = Field::from_id(id)?;
            layout.count += 1;
        }
        Some(layout)
    }

    /// The layout of nearly every entry, without a look at its format.
    pub(super) const NG: Self = {
        let mut fields = [Field::Digest; MOST_FIELDS];
        fields[0] = Field::DigestNg;
        fields[1] = Field::NameNg;
        Self { fields, count: 2 }
    };

    pub(super) fn fields(&self) -> &[Field] {
        &self.fields[..self.count]
    }
}

/// What a digest is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DigestKind {
    /// The file's content.
    Ima,
    /// The file's fs-verity descriptor.
    Verity,
}

/// The digest of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileDigest<'a> {
    /// What it is of.
    pub kind: DigestKind,
    /// The algorithm as the kernel calls it: `sha256`.
    pub algorithm: &'a str,
    /// Its octets, as many as the algorithm has if that is a known one.
    pub octets: &'a [u8],
}

/// Decodes the template data of any template but `ima`, all of it.
pub(super) fn decode<'a>(layout: &Layout, data: &'a [u8], reader: &mut Reader<'a>) -> Result<Fields<'a>, DecodeError> {
    let mut fields = Fields { known: true, ..Fields::default() };
    for field in layout.fields() {
        let size = reader.u32()?;
        // The reader compares the size with what is left; it cannot be more than `data`.
        let octets = reader.bytes(usize::try_from(size).unwrap_or(data.len()))?;
        match field {
            Field::Digest => fields.digest = Some(sha1_digest(octets, reader)?),
            Field::DigestNg => fields.digest = Some(digest_ng(octets, reader)?),
            Field::DigestNgV2 => fields.digest = Some(digest_ng_v2(octets, reader)?),
            Field::Name | Field::NameNg => fields.name = name(octets, reader)?,
            Field::Signature => fields.signature = octets,
            Field::Buffer => fields.buffer = Some(octets),
            Field::Mode => {
                let mode = octets.try_into().map_err(|_| reader.value("size of imode", size))?;
                fields.mode = Some(u16::from_le_bytes(mode));
            }
            Field::ModsigDigest
            | Field::Modsig
            | Field::EvmSignature
            | Field::XattrNames
            | Field::XattrLengths
            | Field::XattrValues
            | Field::Uid
            | Field::Gid => {}
        }
    }
    Ok(fields)
}

/// The digest of the template `ima`: 20 octets of SHA-1.
pub(super) fn sha1_digest<'a>(octets: &'a [u8], reader: &Reader<'_>) -> Result<FileDigest<'a>, DecodeError> {
    if octets.len() != 20 {
        return Err(reader.value("size of d", octets.len() as u64));
    }
    Ok(FileDigest { kind: DigestKind::Ima, algorithm: "sha1", octets })
}

/// `algorithm ":" NUL digest`.
fn digest_ng<'a>(octets: &'a [u8], reader: &Reader<'_>) -> Result<FileDigest<'a>, DecodeError> {
    let separator = octets.iter().take(MOST_ALGORITHM_BYTES).position(|octet| *octet == b':');
    let parts = separator.map(|at| (&octets[..at], &octets[at + 1..]));
    let Some((algorithm, [0, digest @ ..])) = parts else {
        return Err(reader.value("separator of d-ng", octets.len() as u64));
    };
    let algorithm = std::str::from_utf8(algorithm).map_err(|_| reader.value("algorithm of d-ng", 0u8))?;
    let wrong_size = digest_bytes(algorithm).is_some_and(|size| size != digest.len());
    if algorithm.is_empty() || wrong_size || digest.len() > MOST_DIGEST_BYTES {
        return Err(reader.value("size of the digest in d-ng", digest.len() as u64));
    }
    Ok(FileDigest { kind: DigestKind::Ima, algorithm, octets: digest })
}

/// `kind ":" algorithm ":" NUL digest`.
fn digest_ng_v2<'a>(octets: &'a [u8], reader: &Reader<'_>) -> Result<FileDigest<'a>, DecodeError> {
    let kinds = [(DigestKind::Ima, &b"ima:"[..]), (DigestKind::Verity, b"verity:")];
    let found = kinds.into_iter().find_map(|(kind, prefix)| Some((kind, octets.strip_prefix(prefix)?)));
    let Some((kind, rest)) = found else { return Err(reader.value("kind of d-ngv2", octets.len() as u64)) };
    Ok(FileDigest { kind, ..digest_ng(rest, reader)? })
}

/// A string that ends with its only NUL.
fn name<'a>(octets: &'a [u8], reader: &Reader<'_>) -> Result<&'a [u8], DecodeError> {
    match octets {
        [name @ .., 0] if !name.contains(&0) => Ok(name),
        _ => Err(reader.value("end of the name", octets.len() as u64)),
    }
}

/// How long a digest of this algorithm is (Linux `crypto/hash_info.c`).
pub(super) fn digest_bytes(algorithm: &str) -> Option<usize> {
    Some(match algorithm {
        "md4" | "md5" => 16,
        "sha1" | "rmd160" => 20,
        "sha224" => 28,
        "sha256" | "sm3" | "sm3-256" | "streebog256" | "sha3-256" => 32,
        "sha384" | "sha3-384" => 48,
        "sha512" | "streebog512" | "sha3-512" => 64,
        _ => return None,
    })
}

/// The templates with a name (`builtin_templates`).
const FORMATS: [(&str, &str); 8] = [
    ("ima", "d|n"),
    ("ima-ng", "d-ng|n-ng"),
    ("ima-ngv2", "d-ngv2|n-ng"),
    ("ima-sig", "d-ng|n-ng|sig"),
    ("ima-sigv2", "d-ngv2|n-ng|sig"),
    ("ima-buf", "d-ng|n-ng|buf"),
    ("ima-modsig", "d-ng|n-ng|sig|d-modsig|modsig"),
    ("evm-sig", "d-ng|n-ng|evmsig|xattrnames|xattrlengths|xattrvalues|iuid|igid|imode"),
];

const FIELDS: [(&str, Field); 16] = [
    ("d", Field::Digest),
    ("d-ng", Field::DigestNg),
    ("d-ngv2", Field::DigestNgV2),
    ("n", Field::Name),
    ("n-ng", Field::NameNg),
    ("sig", Field::Signature),
    ("buf", Field::Buffer),
    ("d-modsig", Field::ModsigDigest),
    ("modsig", Field::Modsig),
    ("evmsig", Field::EvmSignature),
    ("xattrnames", Field::XattrNames),
    ("xattrlengths", Field::XattrLengths),
    ("xattrvalues", Field::XattrValues),
    ("iuid", Field::Uid),
    ("igid", Field::Gid),
    ("imode", Field::Mode),
];

/// `TEMPLATE_NUM_FIELDS_MAX`.
const MOST_FIELDS: usize = 15;
/// Longer than any algorithm's name (`CRYPTO_MAX_ALG_NAME` counts drivers, too).
const MOST_ALGORITHM_BYTES: usize = 32;
const MOST_DIGEST_BYTES: usize = 64;
