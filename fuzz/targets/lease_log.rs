#![no_main]
//! The DHCP lease log after a crash: any bytes.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _restored = assay_netboot::dhcp::lease_log::parse(bytes, 1_800_000_000_000);
});
