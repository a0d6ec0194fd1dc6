#![no_main]
//! Event log: parses or is refused; typed data of every event decodes.

use assay_verifier::event_log::UnverifiedLog;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(log) = UnverifiedLog::parse(bytes) {
        for event in log.inspect() {
            let _typed = event.decoded_data();
        }
    }
});
