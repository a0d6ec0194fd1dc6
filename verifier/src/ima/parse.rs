//! Octets to entries, within limits and without copying. Nothing is skipped: what is not whole ends the reading.

use super::template::{Layout, decode, sha1_digest};
use super::{Entry, Fields, Limits, TemplateData};
use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::reader::{DecodeError, Order, Reader};

/// Why a list cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImaError {
    /// Longer than any list.
    #[error("measurement list has {bytes} octets, more than {limit}")]
    TooLarge {
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        limit: usize,
    },
    /// An entry is not whole.
    #[error("measurement list, entry {index}")]
    Malformed {
        /// Which entry.
        index: u64,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// The list is readable and does not explain the quote.
    #[error("measurement list {problem}")]
    Unexplained {
        /// What is wrong with it.
        problem: String,
    },
    /// A line of an ASCII list is no entry.
    #[error("measurement list, line {line}: {problem}")]
    Line {
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// The entries of a list, decoded one by one.
#[derive(Debug, Clone)]
pub struct Entries<'a> {
    reader: Reader<'a>,
    template_digest: HashAlgorithm,
    template_bytes: usize,
    index: u64,
    broken: bool,
}

impl<'a> Entries<'a> {
    pub(super) fn new(bytes: &'a [u8], template_digest: HashAlgorithm, limits: Limits) -> Self {
        let reader = Reader::new("binary_runtime_measurements", bytes, Order::Little);
        Self { reader, template_digest, template_bytes: limits.template_bytes, index: 0, broken: false }
    }

    fn entry(&mut self) -> Result<Entry<'a>, DecodeError> {
        let reader = &mut self.reader;
        let pcr = reader.u32()?;
        let template_digest = reader.bytes(self.template_digest.digest_bytes())?;
        let template = template_name(reader)?;
        let (data, fields) =
            if template == "ima" { legacy(reader)? } else { sized(template, self.template_bytes, reader)? };
        let (index, template_digest_algorithm) = (self.index, self.template_digest);
        let violation = template_digest.iter().all(|octet| *octet == 0);
        Ok(Entry { index, pcr, template_digest_algorithm, template_digest, violation, template, data, fields })
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, ImaError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.broken || self.reader.left() == 0 {
            return None;
        }
        let index = self.index;
        let entry = self.entry();
        self.broken = entry.is_err();
        self.index += 1;
        Some(entry.map_err(|source| ImaError::Malformed { index, source }))
    }
}

fn template_name<'a>(reader: &mut Reader<'a>) -> Result<&'a str, DecodeError> {
    let size = reader.u32()?;
    if size == 0 || size > MOST_TEMPLATE_NAME_BYTES {
        return Err(reader.value("size of the template's name", size));
    }
    let name = reader.bytes(size as usize)?;
    if name == NG.as_bytes() {
        return Ok(NG);
    }
    // Printable, so that it can be shown; no template's name is anything else.
    match std::str::from_utf8(name) {
        Ok(name) if name.bytes().all(|octet| octet.is_ascii_graphic()) => Ok(name),
        Ok(_) | Err(_) => Err(reader.value("template's name", size)),
    }
}

/// Any template but the oldest: one size for all of the data, and one for each field.
fn sized<'a>(
    template: &str,
    limit: usize,
    reader: &mut Reader<'a>,
) -> Result<(TemplateData<'a>, Fields<'a>), DecodeError> {
    let size = reader.u32()?;
    let data = match usize::try_from(size) {
        Ok(bytes) if bytes <= limit => reader.bytes(bytes)?,
        Ok(_) | Err(_) => return Err(reader.value("size of the template data", size)),
    };
    let layout = if template == NG { Some(Layout::NG) } else { Layout::of(template) };
    let fields = match layout {
        Some(layout) => {
            let mut inner = Reader::new("template data", data, Order::Little);
            let fields = decode(&layout, data, &mut inner)?;
            inner.finish()?;
            fields
        }
        None => Fields::default(),
    };
    Ok((TemplateData::Sized(data), fields))
}

/// The template `ima`: 20 octets of digest, and the name after its size, without a NUL.
fn legacy<'a>(reader: &mut Reader<'a>) -> Result<(TemplateData<'a>, Fields<'a>), DecodeError> {
    let digest = reader.bytes(HashAlgorithm::Sha1.digest_bytes())?;
    let size = reader.u32()?;
    if size > MOST_LEGACY_NAME_BYTES {
        return Err(reader.value("size of the name", size));
    }
    let name = reader.bytes(size as usize)?;
    if name.contains(&0) {
        return Err(reader.value("end of the name", size));
    }
    let fields = Fields { known: true, digest: Some(sha1_digest(digest, reader)?), name, ..Fields::default() };
    Ok((TemplateData::Legacy { digest, name }, fields))
}

/// The template of nearly every entry.
const NG: &str = "ima-ng";
/// `MAX_TEMPLATE_NAME_LEN` of the kernel's restoring of lists.
const MOST_TEMPLATE_NAME_BYTES: u32 = 255;
/// `IMA_EVENT_NAME_LEN_MAX`.
const MOST_LEGACY_NAME_BYTES: u32 = 255;
