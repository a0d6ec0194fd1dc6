#![no_main]
//! Measurement list: binary or ASCII, read or refused; and as evidence, with a policy that looks at all of it.

use assay_tpm::algorithm::HashAlgorithm;
use assay_verifier::ima::policy::ImaPolicy;
use assay_verifier::ima::{Extension, ImaState, MeasurementList, advance};
use assay_verifier::quote::{PCR_COUNT, PcrValue};
use assay_wire::evidence::ImaList;
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static POLICY: LazyLock<Option<ImaPolicy>> =
    LazyLock::new(|| serde_json::from_str(include_str!("ima_policy.json")).ok());

fuzz_target!(|bytes: &[u8]| {
    let Ok(list) = MeasurementList::from_file(bytes) else { return };
    for entry in list.entries().map_while(Result::ok) {
        let _shown = (entry.shown_name(), entry.template_digest_matches(), entry.file_digest());
    }
    // The quote that the list itself comes to, so that judging is reached.
    let pcrs = list.compute_pcrs(HashAlgorithm::Sha256, Extension::Rehashed);
    let reached = pcrs.ok().and_then(|pcrs| <[u8; 32]>::try_from(&**pcrs.get(&10)?).ok());
    let mut quoted = [PcrValue::new([0; 32]); PCR_COUNT];
    quoted[10] = PcrValue::new(reached.unwrap_or([1; 32]));
    let state = ImaState::admitted(&PcrValue::new([0; 32]));
    let list = ImaList { first_entry: 0, entries: bytes.to_vec() };
    let _appraised = advance(&state, Some(&list), &quoted, POLICY.as_ref());
});
