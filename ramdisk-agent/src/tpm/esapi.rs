//! [`Tpm`] over the TPM software stack (`tss-esapi`, libtss2): a device in the ramdisk, a software TPM in tests.

use super::{AttesterKeys, PcrValue, Quote, SavedAk, Tpm, TpmError, endorsement};
use assay_wire::agent::Credential;
use std::str::FromStr;
use tss_esapi::abstraction::{AsymmetricAlgorithmSelection, KeyCustomization, ak};
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::constants::SessionType;
use tss_esapi::handles::{AuthHandle, KeyHandle, PcrHandle, SessionHandle};
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, SignatureSchemeAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    Data, Digest, DigestValues, EncryptedSecret, IdObject, PcrSelectionList, PcrSelectionListBuilder, PcrSlot, Private,
    Public, SignatureScheme, SymmetricDefinition,
};
use tss_esapi::traits::{Marshall as _, UnMarshall as _};
use tss_esapi::{Context, TctiNameConf};
use zeroize::Zeroizing;

/// The ramdisk's TPM: through the kernel's resource manager, which cleans up after us.
pub const DEVICE_TCTI: &str = "device:/dev/tpmrm0";

/// A TPM reached through a TCTI.
pub struct EsapiTpm {
    context: Context,
    keys: Option<Keys>,
}

/// Loaded keys.
struct Keys {
    ek: KeyHandle,
    ak: KeyHandle,
    saved: SavedAk,
}

impl EsapiTpm {
    /// Opens the TPM behind `tcti`, like [`DEVICE_TCTI`].
    ///
    /// # Errors
    /// If the TCTI is malformed or the TPM does not answer.
    pub fn open(tcti: &str) -> Result<Self, TpmError> {
        let config = TctiNameConf::from_str(tcti).map_err(|_| TpmError::Tcti { tcti: tcti.to_owned() })?;
        let context = Context::new(config).doing_with(|| format!("opening {tcti}"))?;
        Ok(Self { context, keys: None })
    }

    /// The AK in the form that this TPM loads again, after a kexec say.
    ///
    /// # Errors
    /// If no keys were made yet.
    pub fn saved_ak(&self) -> Result<SavedAk, TpmError> {
        self.keys.as_ref().map(|keys| keys.saved.clone()).ok_or(TpmError::NoKeys { doing: "saving it" })
    }

    /// Finds or makes the EK, and loads an AK that was made under it. The later operations use these keys.
    ///
    /// # Errors
    /// If the TPM refuses: the AK is another TPM's, or this TPM was cleared since.
    pub fn load_ak(&mut self, saved: SavedAk) -> Result<(), TpmError> {
        let doing = "loading the saved AK";
        let (ek, _certificate) = endorsement::endorsement_key(&mut self.context)?;
        let public = Public::unmarshall(&saved.public).doing(doing)?;
        let private = Private::try_from(saved.private.clone()).doing(doing)?;
        let ak = ak::load_ak(&mut self.context, ek, None, private, public).doing(doing)?;
        self.keys = Some(Keys { ek, ak, saved });
        Ok(())
    }

    fn keys(&self, doing: &'static str) -> Result<(KeyHandle, KeyHandle), TpmError> {
        self.keys.as_ref().map(|keys| (keys.ek, keys.ak)).ok_or(TpmError::NoKeys { doing })
    }

    fn public_of(&mut self, key: KeyHandle, doing: &str) -> Result<Vec<u8>, TpmError> {
        let (public, _, _) = self.context.execute_without_session(|context| context.read_public(key)).doing(doing)?;
        public.marshall().doing(doing)
    }
}

/// What our AK differs in from tss-esapi's.
struct AkAttributes;

impl KeyCustomization for AkAttributes {
    /// `noDA`: the AK has no secret to guess, and a power cut after the use of a protected key counts as a wrong guess
    /// (TPM 2.0 Part 1, 19.8.2): a few of them would lock the node's TPM.
    fn attributes(&self, attributes: ObjectAttributesBuilder) -> ObjectAttributesBuilder {
        attributes.with_no_da(true)
    }
}

impl Tpm for EsapiTpm {
    fn pcr_extend(&mut self, pcr: u8, digest: PcrValue) -> Result<(), TpmError> {
        let doing = || format!("extending PCR {pcr}");
        let handle = PcrHandle::try_from(u32::from(pcr)).map_err(|_| TpmError::NoSuchPcr { pcr })?;
        let mut values = DigestValues::new();
        values.set(HashingAlgorithm::Sha256, Digest::try_from(digest.as_slice()).doing_with(doing)?);
        self.context
            .execute_with_session(Some(AuthSession::Password), |context| context.pcr_extend(handle, values))
            .doing_with(doing)
    }

    fn pcr_read(&mut self, pcrs: &[u8]) -> Result<Vec<PcrValue>, TpmError> {
        // One at a time: asked for several, a TPM answers in its own order, and perhaps not for all.
        pcrs.iter()
            .map(|&pcr| {
                let selection = selection(&[pcr])?;
                let (_, _, digests) = self
                    .context
                    .execute_without_session(|context| context.pcr_read(selection))
                    .doing_with(|| format!("reading PCR {pcr}"))?;
                let value = digests.value().first().and_then(|digest| PcrValue::try_from(digest.value()).ok());
                value.ok_or(TpmError::NoBank { pcr })
            })
            .collect()
    }

    fn create_keys(&mut self) -> Result<AttesterKeys, TpmError> {
        let ek_chain = endorsement::chain(&mut self.context);
        let (ek, ek_certificate) = endorsement::endorsement_key(&mut self.context)?;
        let ek_public = self.public_of(ek, "reading the EK")?;
        let created = ak::create_ak_2(
            &mut self.context,
            ek,
            HashingAlgorithm::Sha256,
            // P-256 and not RSA: discrete TPMs make it in milliseconds, and quotes are as quick.
            AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP256),
            SignatureSchemeAlgorithm::EcDsa,
            None,
            AkAttributes,
        )
        .doing("making the AK")?;
        let private = created.out_private.value().to_vec();
        let ak = ak::load_ak(&mut self.context, ek, None, created.out_private, created.out_public)
            .doing("loading the AK")?;
        let ak_public = self.public_of(ak, "reading the AK")?;
        self.keys = Some(Keys { ek, ak, saved: SavedAk { public: ak_public.clone(), private } });
        Ok(AttesterKeys { ek_public, ek_certificate, ek_chain, ak_public })
    }

    fn activate_credential(&mut self, credential: &Credential) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let doing = "activating a credential";
        let (ek, ak) = self.keys(doing)?;
        let id_object = IdObject::try_from(credential.id_object.clone()).doing(doing)?;
        let secret = EncryptedSecret::try_from(credential.encrypted_secret.clone()).doing(doing)?;
        let (ek_public, _, _) =
            self.context.execute_without_session(|context| context.read_public(ek)).doing("reading the EK")?;
        if ek_public.object_attributes().user_with_auth() {
            // The high range's templates: the EK's own authorization, which is empty, is enough.
            let both = (Some(AuthSession::Password), Some(AuthSession::Password), None);
            let opened = self
                .context
                .execute_with_sessions(both, |context| context.activate_credential(ak, ek, id_object, secret));
            return opened.map(|digest| Zeroizing::new(digest.value().to_vec())).doing(doing);
        }
        let session = self
            .context
            .execute_without_session(|context| {
                context.start_auth_session(
                    None,
                    None,
                    None,
                    SessionType::Policy,
                    SymmetricDefinition::AES_128_CFB,
                    HashingAlgorithm::Sha256,
                )
            })
            .doing("starting the EK's policy session")?
            .ok_or(TpmError::NoKeys { doing })?;
        let opened = self.context.execute_with_temporary_object(SessionHandle::from(session).into(), |context, _| {
            // PolicyA of the EK Credential Profile: the endorsement hierarchy's authorization, which is empty here.
            let policy = PolicySession::try_from(session)?;
            context.execute_with_session(Some(AuthSession::Password), |context| {
                let none = Default::default;
                context.policy_secret(policy, AuthHandle::Endorsement, none(), Default::default(), none(), None)
            })?;
            context.execute_with_sessions((Some(AuthSession::Password), Some(session), None), |context| {
                context.activate_credential(ak, ek, id_object, secret)
            })
        });
        opened.map(|digest| Zeroizing::new(digest.value().to_vec())).doing(doing)
    }

    fn quote(&mut self, nonce: &[u8], pcrs: &[u8]) -> Result<Quote, TpmError> {
        let doing = "quoting";
        let (_, ak) = self.keys(doing)?;
        let selection = selection(pcrs)?;
        let data = Data::try_from(nonce).doing(doing)?;
        let (attest, signature) = self
            .context
            .execute_with_session(Some(AuthSession::Password), |context| {
                context.quote(ak, data, SignatureScheme::Null, selection)
            })
            .doing(doing)?;
        Ok(Quote { attest: attest.marshall().doing(doing)?, signature: signature.marshall().doing(doing)? })
    }
}

/// Adds to an error of the software stack what was being done.
pub(super) trait Doing<T> {
    fn doing(self, doing: &str) -> Result<T, TpmError>;
    fn doing_with(self, doing: impl FnOnce() -> String) -> Result<T, TpmError>;
}

impl<T> Doing<T> for Result<T, tss_esapi::Error> {
    fn doing(self, doing: &str) -> Result<T, TpmError> {
        self.doing_with(|| doing.to_owned())
    }

    fn doing_with(self, doing: impl FnOnce() -> String) -> Result<T, TpmError> {
        self.map_err(|source| TpmError::Command { doing: doing(), source })
    }
}

fn selection(pcrs: &[u8]) -> Result<PcrSelectionList, TpmError> {
    let slots = pcrs
        .iter()
        .map(|&pcr| {
            let bit = 1_u32.checked_shl(pcr.into()).ok_or(TpmError::NoSuchPcr { pcr })?;
            PcrSlot::try_from(bit).map_err(|_| TpmError::NoSuchPcr { pcr })
        })
        .collect::<Result<Vec<_>, _>>()?;
    PcrSelectionListBuilder::new()
        .with_selection(HashingAlgorithm::Sha256, &slots)
        .build()
        .doing("selecting PCRs to quote")
}
