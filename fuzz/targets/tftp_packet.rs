#![no_main]
//! TFTP datagrams.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _refused = assay_tftp::packet::ClientPacket::decode(bytes);
});
