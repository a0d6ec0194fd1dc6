#![no_main]
//! The agent's settings, as anybody in the airlock may serve them: measured first, then used only if they name an
//! address and a key.

use assay_ramdisk_agent::settings::{MeasuredSettings, sha256};
use assay_ramdisk_agent::tpm::{AttesterKeys, PcrValue, Quote, Tpm, TpmError};
use assay_wire::agent::{AgentSettings, Credential};
use libfuzzer_sys::fuzz_target;

/// Takes what is measured; nothing else is asked of it here.
#[derive(Default)]
struct OnlyExtends {
    extended: Vec<(u8, PcrValue)>,
}

impl Tpm for OnlyExtends {
    fn pcr_extend(&mut self, pcr: u8, digest: PcrValue) -> Result<(), TpmError> {
        self.extended.push((pcr, digest));
        Ok(())
    }

    fn pcr_read(&mut self, _pcrs: &[u8]) -> Result<Vec<PcrValue>, TpmError> {
        unreachable!("settings read no PCR")
    }

    fn create_keys(&mut self) -> Result<AttesterKeys, TpmError> {
        unreachable!("settings make no keys")
    }

    fn activate_credential(&mut self, _credential: &Credential) -> Result<zeroize::Zeroizing<Vec<u8>>, TpmError> {
        unreachable!("settings open no credential")
    }

    fn quote(&mut self, _nonce: &[u8], _pcrs: &[u8]) -> Result<Quote, TpmError> {
        unreachable!("settings are not quoted")
    }
}

fuzz_target!(|document: &[u8]| {
    let mut tpm = OnlyExtends::default();
    let settings = MeasuredSettings::measure(document, &mut tpm);
    assert_eq!(tpm.extended, [(AgentSettings::PCR, sha256(document))], "measured whatever it is, and once");
    if let Ok(settings) = settings {
        assert_eq!(settings.measurement().data, document);
        assert!(settings.settings().verifier.trim_start().to_ascii_lowercase().starts_with("https:"));
    }
});
