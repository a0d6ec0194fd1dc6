#![no_main]
//! What an export's process says to its gateway: by then it may be its node that speaks.

use assay_imaging::worker::message::{FromWorker, decode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|packet: &[u8]| {
    if let Ok(message) = decode::<FromWorker>(packet) {
        let again = serde_json::to_vec(&message).expect("what was read can be written");
        decode::<FromWorker>(&again).expect("and read again");
    }
});
