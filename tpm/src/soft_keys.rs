//! A TPM's keys without the TPM: EK and AK in memory, credential activation and quotes in microseconds. For fleets of
//! soft nodes and for benchmarks, where a real TPM (or `swtpm`) signs too slowly to matter; behind the feature `testing`.
//!
//! What it signs is what a TPM signs, octet for octet, so whoever verifies cannot tell. It protects nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's helper may panic as the test does")]

use crate::algorithm::HashAlgorithm;
use crate::kdf::{hmac_algorithm, kdfa, kdfe};
use crate::name::Name;
use crate::public::Public;
use assay_wire::agent::Credential;
use openssl::asn1::{Asn1Integer, Asn1Object, Asn1OctetString, Asn1Time};
use openssl::bn::{BigNum, BigNumContext};
use openssl::derive::Deriver;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::symm::{Cipher, Crypter, Mode};
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage};
use openssl::x509::{X509, X509Builder, X509Extension, X509Name, X509NameBuilder};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};

/// A maker of soft TPMs: the CA of their EK certificates.
pub struct Maker {
    key: PKey<Private>,
    certificate: X509,
}

impl Default for Maker {
    fn default() -> Self {
        Self::new()
    }
}

impl Maker {
    /// A new one.
    ///
    /// # Panics
    /// OpenSSL fails.
    #[must_use]
    pub fn new() -> Self {
        let key = PKey::from_ec_key(EcKey::generate(&p256()).unwrap()).unwrap();
        let name = name_of("Assay soft TPM CA");
        let mut builder = certificate(&name, &name, &key);
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        builder.append_extension(KeyUsage::new().critical().key_cert_sign().build().unwrap()).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        Self { key, certificate: builder.build() }
    }

    /// Its certificate, PEM: what a verifier is configured with.
    ///
    /// # Panics
    /// OpenSSL fails.
    #[must_use]
    pub fn ca_pem(&self) -> Vec<u8> {
        self.certificate.to_pem().unwrap()
    }

    /// Makes a TPM's keys, with an EK certificate (TCG EK Credential Profile: no subject, a critical alternative name with
    /// the TPM's maker, model and version).
    ///
    /// # Panics
    /// OpenSSL fails.
    #[must_use]
    pub fn manufacture(&self) -> SoftKeys {
        let ek = EcKey::generate(&p256()).unwrap();
        let (x, y) = coordinates(&ek);
        let ek_public = ecc_public(EK_ATTRIBUTES, &EK_POLICY, &EK_PARAMETERS, &x, &y);
        let ek = PKey::from_ec_key(ek).unwrap();
        let nobody = X509NameBuilder::new().unwrap().build();
        let mut builder = certificate(&nobody, self.certificate.subject_name(), &ek);
        builder.append_extension(BasicConstraints::new().critical().build().unwrap()).unwrap();
        builder.append_extension(KeyUsage::new().critical().key_agreement().build().unwrap()).unwrap();
        builder.append_extension(ExtendedKeyUsage::new().other("2.23.133.8.1").build().unwrap()).unwrap();
        let alternative = Asn1OctetString::new_from_bytes(&alternative_name()).unwrap();
        let oid = Asn1Object::from_str("2.5.29.17").unwrap();
        builder.append_extension(X509Extension::new_from_der(&oid, true, &alternative).unwrap()).unwrap();
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        let ek_certificate = builder.build().to_der().unwrap();

        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let ak = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
        let point = ring::signature::KeyPair::public_key(&ak).as_ref()[1..].to_vec();
        let ak_public = ecc_public(AK_ATTRIBUTES, &[], &AK_PARAMETERS, &point[..32], &point[32..]);
        SoftKeys { ek, ek_x: x, ek_public, ek_certificate, ak, ak_public, random }
    }
}

/// One TPM's keys.
pub struct SoftKeys {
    ek: PKey<Private>,
    ek_x: Vec<u8>,
    /// `TPMT_PUBLIC` of the EK: ECC P-256, TCG's default template.
    pub ek_public: Vec<u8>,
    /// Its certificate, DER.
    pub ek_certificate: Vec<u8>,
    ak: EcdsaKeyPair,
    /// `TPMT_PUBLIC` of the AK: ECC P-256, ECDSA with SHA-256.
    pub ak_public: Vec<u8>,
    random: SystemRandom,
}

/// What a TPM says of itself in every quote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SoftClock {
    /// Milliseconds since it was made.
    pub clock_ms: u64,
    /// TPM resets.
    pub reset_count: u32,
    /// TPM restarts.
    pub restart_count: u32,
}

impl SoftKeys {
    /// `TPM2_ActivateCredential`. None if the credential is not for this EK and AK.
    ///
    /// # Panics
    /// OpenSSL fails.
    #[must_use]
    pub fn activate(&self, credential: &Credential) -> Option<Vec<u8>> {
        let hash = HashAlgorithm::Sha256;
        let (x, y) = point(&credential.encrypted_secret)?;
        let peer = EcKey::from_public_key_affine_coordinates(
            &p256(),
            &*BigNum::from_slice(x).ok()?,
            &*BigNum::from_slice(y).ok()?,
        );
        let peer = PKey::from_ec_key(peer.ok()?).ok()?;
        let mut deriver = Deriver::new(&self.ek).unwrap();
        deriver.set_peer(&peer).ok()?;
        let z = deriver.derive_to_vec().unwrap();
        let seed = kdfe(hash, &z, "IDENTITY", x, &self.ek_x, DIGEST_BYTES);

        let ak_name = self.ak_name();
        let outer = credential.id_object.get(2..2 + usize::from(DIGEST_BYTES))?;
        let identity = credential.id_object.get(2 + usize::from(DIGEST_BYTES)..)?;
        let key = kdfa(hash, &seed, "INTEGRITY", &[], &[], DIGEST_BYTES);
        let signed = [identity, ak_name.as_bytes()].concat();
        hmac::verify(&hmac::Key::new(hmac_algorithm(hash), &key), &signed, outer).ok()?;
        let key = kdfa(hash, &seed, "STORAGE", ak_name.as_bytes(), &[], 16);
        let cipher = Cipher::aes_128_cfb128();
        let mut crypter = Crypter::new(cipher, Mode::Decrypt, &key, Some(&[0; 16])).unwrap();
        let mut plain = vec![0; identity.len() + cipher.block_size()];
        let mut count = crypter.update(identity, &mut plain).unwrap();
        count += crypter.finalize(&mut plain[count..]).unwrap();
        plain.truncate(count);
        plain.get(2..).map(<[u8]>::to_vec)
    }

    /// The AK's name.
    ///
    /// # Panics
    /// Never: the public area is of its own making.
    #[must_use]
    pub fn ak_name(&self) -> Name {
        Public::parse(&self.ak_public).expect("a public area made here").name().clone()
    }

    /// `TPM2_Quote` of PCRs 0 to 14 of the SHA-256 bank: `TPMS_ATTEST` and `TPMT_SIGNATURE`.
    ///
    /// # Panics
    /// There is no randomness to sign with.
    #[must_use]
    pub fn quote(&self, nonce: &[u8], pcrs: &[[u8; 32]], clock: SoftClock) -> (Vec<u8>, Vec<u8>) {
        let attest = tpms_attest(nonce, &sha256(&pcrs.concat()), clock);
        let signature = self.sign(&attest);
        (attest, signature)
    }

    /// Signs any octets with the AK, as no TPM would: `TPMT_SIGNATURE`.
    ///
    /// # Panics
    /// There is no randomness to sign with.
    #[must_use]
    pub fn sign(&self, attest: &[u8]) -> Vec<u8> {
        let signed = self.ak.sign(&self.random, attest).unwrap();
        // TPMT_SIGNATURE: ECDSA, SHA-256, r and s as TPM2B.
        let mut signature = vec![0, 0x18, 0, 0x0b];
        for number in signed.as_ref().chunks(32) {
            signature.extend([0, 32]);
            signature.extend(number);
        }
        signature
    }
}

/// `TPMS_ATTEST` of a quote of PCRs 0 to 14 (TPM 2.0 Part 2, 10.12.12).
#[must_use]
pub fn tpms_attest(nonce: &[u8], pcr_digest: &[u8; 32], clock: SoftClock) -> Vec<u8> {
    let mut attest = vec![0xff, 0x54, 0x43, 0x47, 0x80, 0x18, 0, 34, 0, 0x0b];
    attest.extend([7; 32]); // the signer's qualified name
    attest.extend(u16::try_from(nonce.len()).unwrap_or(u16::MAX).to_be_bytes());
    attest.extend(nonce);
    attest.extend(clock.clock_ms.to_be_bytes());
    attest.extend(clock.reset_count.to_be_bytes());
    attest.extend(clock.restart_count.to_be_bytes());
    attest.push(1); // safe
    attest.extend([0; 8]); // firmware
    attest.extend([0, 0, 0, 1, 0, 0x0b, 3, 0xff, 0x7f, 0, 0, 32]);
    attest.extend(pcr_digest);
    attest
}

fn p256() -> EcGroup {
    EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap()
}

fn coordinates(key: &EcKey<Private>) -> (Vec<u8>, Vec<u8>) {
    let (mut x, mut y, mut numbers) = (BigNum::new().unwrap(), BigNum::new().unwrap(), BigNumContext::new().unwrap());
    key.public_key().affine_coordinates(&p256(), &mut x, &mut y, &mut numbers).unwrap();
    (x.to_vec_padded(32).unwrap(), y.to_vec_padded(32).unwrap())
}

/// `TPMT_PUBLIC` of an ECC key (Part 2, 12.2.4).
fn ecc_public(attributes: u32, policy: &[u8], parameters: &[u8], x: &[u8], y: &[u8]) -> Vec<u8> {
    let mut public = vec![0, 0x23, 0, 0x0b];
    public.extend(attributes.to_be_bytes());
    public.extend(u16::try_from(policy.len()).unwrap().to_be_bytes());
    public.extend(policy);
    public.extend(parameters);
    for part in [x, y] {
        public.extend(u16::try_from(part.len()).unwrap().to_be_bytes());
        public.extend(part);
    }
    public
}

/// Two coordinates, each as TPM2B.
fn point(octets: &[u8]) -> Option<(&[u8], &[u8])> {
    let x = octets.get(2..34)?;
    let y = octets.get(36..68)?;
    (octets.len() == 68).then_some((x, y))
}

fn name_of(common_name: &str) -> X509Name {
    let mut name = X509NameBuilder::new().unwrap();
    name.append_entry_by_nid(Nid::COMMONNAME, common_name).unwrap();
    name.build()
}

fn certificate(
    subject: &openssl::x509::X509NameRef,
    issuer: &openssl::x509::X509NameRef,
    key: &PKey<Private>,
) -> X509Builder {
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    let mut serial = BigNum::new().unwrap();
    serial.rand(120, openssl::bn::MsbOption::ONE, false).unwrap();
    builder.set_serial_number(&Asn1Integer::from_bn(&serial).unwrap()).unwrap();
    builder.set_subject_name(subject).unwrap();
    builder.set_issuer_name(issuer).unwrap();
    builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::days_from_now(3650).unwrap()).unwrap();
    builder.set_pubkey(key).unwrap();
    builder
}

/// `GeneralNames` with one directory name: tpmManufacturer, tpmModel and tpmVersion.
fn alternative_name() -> Vec<u8> {
    let attribute = |last: u8, value: &str| {
        let oid = [0x06, 0x05, 0x67, 0x81, 0x05, 0x02, last];
        der(0x31, &der(0x30, &[&oid[..], &der(0x0c, value.as_bytes())].concat()))
    };
    let name = der(0x30, &[attribute(1, "id:41535341"), attribute(2, "soft"), attribute(3, "id:00000001")].concat());
    der(0x30, &der(0xa4, &name))
}

/// One DER element of less than 128 octets.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut element = vec![tag, u8::try_from(content.len()).ok().filter(|length| *length < 128).unwrap()];
    element.extend(content);
    element
}

fn sha256(data: &[u8]) -> [u8; 32] {
    HashAlgorithm::Sha256.digest(data).as_ref().try_into().unwrap()
}

const DIGEST_BYTES: u16 = 32;
/// fixedTPM, fixedParent, sensitiveDataOrigin, adminWithPolicy, restricted, decrypt.
const EK_ATTRIBUTES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 16 | 1 << 17;
/// fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign.
const AK_ATTRIBUTES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 16 | 1 << 18;
/// `PolicySecret(TPM_RH_ENDORSEMENT)`: TCG EK Credential Profile 2.6, B.3.3.
const EK_POLICY: [u8; 32] = [
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24, 0xfd, 0x52, 0xd7,
    0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
];
/// AES-128-CFB; no scheme; P-256; no KDF.
const EK_PARAMETERS: [u8; 12] = [0, 0x06, 0, 0x80, 0, 0x43, 0, 0x10, 0, 0x03, 0, 0x10];
/// No cipher; ECDSA with SHA-256; P-256; no KDF.
const AK_PARAMETERS: [u8; 10] = [0, 0x10, 0, 0x18, 0, 0x0b, 0, 0x03, 0, 0x10];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attest::Quote;
    use crate::credential::make_credential;
    use crate::signature::Signature;

    #[test]
    fn a_credential_opens_for_its_own_keys_only() {
        let maker = Maker::new();
        let (one, other) = (maker.manufacture(), maker.manufacture());
        let credential = make_credential(&one.ek_public, one.ak_name().as_bytes(), &[9; 32]).unwrap();
        assert_eq!(one.activate(&credential), Some(vec![9; 32]));
        assert_eq!(other.activate(&credential), None);
        let foreign_ak = make_credential(&one.ek_public, other.ak_name().as_bytes(), &[9; 32]).unwrap();
        assert_eq!(one.activate(&foreign_ak), None);
    }

    #[test]
    fn what_it_signs_reads_as_a_tpms() {
        let keys = Maker::new().manufacture();
        let clock = SoftClock { clock_ms: 5, reset_count: 2, restart_count: 1 };
        let (attest, signature) = keys.quote(&[3; 32], &[[0; 32]; 15], clock);
        assert!(Quote::parse(&attest).is_ok());
        assert!(Signature::parse(&signature).is_ok());
        assert!(Public::parse(&keys.ek_public).is_ok());
    }
}
