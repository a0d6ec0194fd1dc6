#![no_main]
//! DHCP datagrams.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _refused = assay_netboot::dhcp::packet::ClientPacket::decode(bytes);
});
