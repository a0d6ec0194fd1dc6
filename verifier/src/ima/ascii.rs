//! The ASCII form of a list (`ascii_runtime_measurements`), put back into the binary form: for people's tools. A path
//! with a line feed breaks such a list, which is why evidence carries the binary one.

use super::template::{Field, Layout};
use super::{ImaError, Limits};
use assay_tpm::algorithm::HashAlgorithm;

/// The list in its binary form, and the algorithm of its template digests.
pub(super) fn to_binary(text: &[u8], limits: Limits) -> Result<(Vec<u8>, HashAlgorithm), ImaError> {
    let mut binary = Vec::new();
    let mut algorithm = None;
    let lines = text.split(|octet| *octet == b'\n').enumerate();
    for (index, line) in lines.filter(|(_, line)| !line.is_empty()) {
        let problem = |problem| ImaError::Line { line: index + 1, problem };
        let line = std::str::from_utf8(line).map_err(|_| problem("is no text"))?;
        let found = push_entry(line, &mut binary).map_err(problem)?;
        if *algorithm.get_or_insert(found) != found {
            return Err(problem("has a template digest of another length than the lines before"));
        }
        if binary.len() > limits.list_bytes {
            return Err(ImaError::TooLarge { bytes: binary.len(), limit: limits.list_bytes });
        }
    }
    Ok((binary, algorithm.unwrap_or(HashAlgorithm::Sha1)))
}

fn push_entry(line: &str, binary: &mut Vec<u8>) -> Result<HashAlgorithm, &'static str> {
    let mut words = line.split(' ');
    let pcr: u32 = words.next().and_then(|word| word.parse().ok()).ok_or("has no PCR")?;
    let digest = words.next().and_then(|word| hex::decode(word).ok()).ok_or("has no template digest")?;
    let algorithm = HashAlgorithm::ALL.into_iter().find(|algorithm| algorithm.digest_bytes() == digest.len());
    let algorithm = algorithm.ok_or("has a template digest of no known length")?;
    let template = words.next().filter(|word| !word.is_empty()).ok_or("has no template")?;
    let layout = Layout::of(template).ok_or("has a template that is not known")?;
    binary.extend(pcr.to_le_bytes());
    binary.extend(digest);
    push_sized(binary, template.as_bytes());
    let mut data = Vec::new();
    for field in layout.fields() {
        // The kernel leaves out the last separators where the last fields are empty.
        push_field(*field, words.next().unwrap_or_default(), template == "ima", &mut data)?;
    }
    if words.any(|word| !word.is_empty()) {
        return Err("has more fields than its template");
    }
    match template {
        "ima" => binary.extend(data),
        _ => push_sized(binary, &data),
    }
    Ok(algorithm)
}

fn push_field(field: Field, word: &str, legacy: bool, data: &mut Vec<u8>) -> Result<(), &'static str> {
    match field {
        Field::Digest => {
            let digest = octets(word)?;
            if legacy { data.extend(digest) } else { push_sized(data, &digest) }
        }
        Field::DigestNg | Field::DigestNgV2 | Field::ModsigDigest => push_sized(data, &digest_ng(word)?),
        Field::Name if legacy => push_sized(data, word.as_bytes()),
        Field::Name | Field::NameNg | Field::XattrNames => push_sized(data, &[word.as_bytes(), &[0]].concat()),
        Field::Signature
        | Field::Buffer
        | Field::Modsig
        | Field::EvmSignature
        | Field::XattrLengths
        | Field::XattrValues => push_sized(data, &octets(word)?),
        Field::Uid | Field::Gid => push_sized(data, &number::<u32>(word)?.to_le_bytes()),
        Field::Mode => push_sized(data, &number::<u16>(word)?.to_le_bytes()),
    }
    Ok(())
}

/// `sha256:<hex>` or `verity:sha256:<hex>`: what stands before the hexadecimal keeps its colon and gets a NUL.
fn digest_ng(word: &str) -> Result<Vec<u8>, &'static str> {
    if word.is_empty() {
        return Ok(Vec::new());
    }
    let (algorithm, digest) = word.rsplit_once(':').ok_or("has a digest without an algorithm")?;
    Ok([algorithm.as_bytes(), b":\0", &octets(digest)?].concat())
}

fn octets(word: &str) -> Result<Vec<u8>, &'static str> {
    hex::decode(word).map_err(|_| "has a field that is not hexadecimal")
}

fn number<N: std::str::FromStr>(word: &str) -> Result<N, &'static str> {
    word.parse().map_err(|_| "has a field that is no number")
}

fn push_sized(binary: &mut Vec<u8>, octets: &[u8]) {
    binary.extend(u32::try_from(octets.len()).unwrap_or(u32::MAX).to_le_bytes());
    binary.extend(octets);
}
