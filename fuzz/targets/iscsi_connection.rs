#![no_main]
//! An iSCSI connection from its first octet: login text, PDUs, CDBs, task tags. The backend answers everything.

mod iscsi;

use assay_iscsi::Authentication;
use iscsi::{Driver, OPEN};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut driver = Driver::new(iscsi::portal([(OPEN, Authentication::None)]));
    for piece in bytes.chunks(64) {
        if !driver.receive(piece) {
            break;
        }
    }
});
