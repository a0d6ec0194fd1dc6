//! Signatures of files (`security.ima`), as the templates `ima-sig` and `ima-sigv2` show them: `signature_v2_hdr` of Linux
//! `security/integrity/integrity.h`, version 2 over a file's digest, version 3 over an `ima_file_id` of fs-verity.

use super::policy::{Glob, SigningKey};
use super::template::{DigestKind, FileDigest};
use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::reader::{DecodeError, Order, Reader};
use openssl::error::ErrorStack;
use openssl::hash::{MessageDigest, hash};
use openssl::md::{Md, MdRef};
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Public};
use openssl::pkey_ctx::PkeyCtx;
use openssl::rsa::Padding;
use openssl::x509::X509;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::SubjectPublicKeyInfo;

/// A policy's key, read.
pub(super) struct Key<'p> {
    name: &'p str,
    paths: &'p [Glob],
    key: PKey<Public>,
    /// What signatures may call it: the end of its subject key identifier, and of the hash that stands in for one.
    ids: Vec<[u8; 4]>,
}

impl<'p> Key<'p> {
    /// Reads a key; the error ends the sentence "key `x` …".
    pub(super) fn read(key: &'p SigningKey) -> Result<Self, &'static str> {
        let pem = key.pem.as_bytes();
        let certificate = X509::from_pem(pem).ok();
        let public = match &certificate {
            Some(certificate) => certificate.public_key(),
            None => PKey::public_key_from_pem(pem),
        };
        let public = public.map_err(|_| "is neither a certificate nor a public key in PEM")?;
        let fit = match public.id() {
            Id::RSA => public.bits() >= 2048,
            Id::EC => public
                .ec_key()
                .is_ok_and(|key| matches!(key.group().curve_name(), Some(Nid::X9_62_PRIME256V1 | Nid::SECP384R1))),
            _ => false,
        };
        if !fit {
            return Err("is not RSA of at least 2048 bits, P-256 or P-384");
        }
        let subject = certificate.as_ref().and_then(|certificate| certificate.subject_key_id());
        let hashed = key_hash(&public);
        let ids = [subject.map(openssl::asn1::Asn1OctetStringRef::as_slice), hashed.as_deref()];
        let ids = ids.into_iter().flatten().filter_map(|id| id.last_chunk().copied()).collect();
        Ok(Self { name: &key.name, paths: &key.paths, key: public, ids })
    }

    fn may_sign(&self, path: &[u8]) -> bool {
        self.paths.is_empty() || self.paths.iter().any(|glob| glob.matches(path))
    }

    fn verifies(&self, digest: &[u8], algorithm: &MdRef, signature: &[u8]) -> Result<bool, ErrorStack> {
        let mut context = PkeyCtx::new(&self.key)?;
        context.verify_init()?;
        if self.key.id() == Id::RSA {
            context.set_rsa_padding(Padding::PKCS1)?;
        }
        context.set_signature_md(algorithm)?;
        context.verify(digest, signature)
    }
}

/// SHA-1 of the key's bit string (RFC 5280, section 4.2.1.2): the identifier of a key without a certificate.
fn key_hash(key: &PKey<Public>) -> Option<Vec<u8>> {
    let der = key.public_key_to_der().ok()?;
    let (_, info) = SubjectPublicKeyInfo::from_der(&der).ok()?;
    Some(HashAlgorithm::Sha1.digest(&info.subject_public_key.data).as_ref().to_vec())
}

/// Whether one of `keys` signed the file; the error ends the sentence "… and …".
pub(super) fn verify(keys: &[Key<'_>], path: &[u8], digest: &FileDigest<'_>, signature: &[u8]) -> Result<(), String> {
    let header = Header::parse(signature).map_err(|error| format!("its signature cannot be read: {error}"))?;
    let (name, algorithm, library) = match header.hash {
        4 => ("sha256", Md::sha256(), MessageDigest::sha256()),
        5 => ("sha384", Md::sha384(), MessageDigest::sha384()),
        6 => ("sha512", Md::sha512(), MessageDigest::sha512()),
        other => return Err(format!("its signature is over a digest of algorithm {other}, which counts for nothing")),
    };
    if name != digest.algorithm {
        return Err(format!("its signature is over {name}, and its digest is {}", digest.algorithm));
    }
    let signed = match (header.version, digest.kind) {
        (2, DigestKind::Ima) => digest.octets.to_vec(),
        (3, DigestKind::Verity) => {
            let file_id = [&[VERITY_SIGNATURE, header.hash], digest.octets].concat();
            hash(library, &file_id).map_err(|_| "its signature cannot be checked".to_owned())?.to_vec()
        }
        (2 | 3, _) => return Err("its signature is of another kind than its digest".to_owned()),
        (version, _) => return Err(format!("its signature is of version {version}, which is not known")),
    };
    let mut named = keys.iter().filter(|key| key.ids.contains(&header.key_id)).peekable();
    if named.peek().is_none() {
        return Err(format!("it is signed by the key {}, which is not in the policy", hex::encode(header.key_id)));
    }
    for key in named {
        if !key.may_sign(path) {
            return Err(format!("the key `{}` may not sign files there", key.name));
        }
        // An error of the library is a signature of the wrong shape.
        if key.verifies(&signed, algorithm, header.signature).unwrap_or(false) {
            return Ok(());
        }
    }
    Err("its signature is not one of the key that it names".to_owned())
}

/// `signature_v2_hdr`.
struct Header<'a> {
    version: u8,
    hash: u8,
    key_id: [u8; 4],
    signature: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("signature_v2_hdr", bytes, Order::Big);
        let kind = reader.u8()?;
        let version = reader.u8()?;
        if !matches!((kind, version), (FILE_SIGNATURE, 2) | (VERITY_SIGNATURE, 3)) {
            return Err(reader.value("type and version", u16::from_be_bytes([kind, version])));
        }
        let hash = reader.u8()?;
        let key_id = reader.array()?;
        let signature = reader.sized("sig_size", MOST_SIGNATURE_BYTES)?;
        reader.finish()?;
        Ok(Self { version, hash, key_id, signature })
    }
}

/// `EVM_IMA_XATTR_DIGSIG`.
const FILE_SIGNATURE: u8 = 3;
/// `IMA_VERITY_DIGSIG`.
const VERITY_SIGNATURE: u8 = 6;
/// RSA-8192.
const MOST_SIGNATURE_BYTES: usize = 1024;
