#![no_main]
//! Event log, as a TPM's and as a confidential virtual machine's: parses or is refused; every event is decoded, judged
//! and replayed.

use assay_tpm::algorithm::HashAlgorithm;
use assay_verifier::event_log::{Origin, UnverifiedLog};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for origin in [Origin::Tpm, Origin::ConfidentialComputing] {
        let Ok(log) = UnverifiedLog::parse_from(origin, bytes) else { continue };
        for event in log.inspect() {
            let _shown =
                (event.decoded_data().to_string(), event.data_digest(), event.quirk(), event.measured_variable());
        }
        let _odd = log.inspect_anomalies();
        for bank in HashAlgorithm::ALL {
            let _values = log.compute_pcrs(bank);
        }
    }
});
