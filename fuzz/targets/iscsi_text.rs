#![no_main]
//! Text keys, in a login and after it. The input is a list of requests, one a line: an octet of flags, then the text.
//! Where the first octet of the input is odd, a session is there already and the requests are text requests.

mod iscsi;

use assay_iscsi::{Authentication, ChapAlgorithms, ChapCredentials};
use iscsi::{Driver, INITIATOR, OPEN, pdu};
use libfuzzer_sys::fuzz_target;

/// A target that asks for a proof, which nobody here can give.
const PROVEN: &str = "iqn.2026-01.t:p";

fuzz_target!(|bytes: &[u8]| {
    let Some((first, lines)) = bytes.split_first() else { return };
    let authentication = Authentication::Chap {
        initiator: ChapCredentials::new("i", "a secret of the initiator's"),
        target: Some(ChapCredentials::new("t", "a secret of the target's")),
        algorithms: ChapAlgorithms::WithMd5,
    };
    if first & 1 == 1 {
        let mut driver = Driver::new(iscsi::portal([(OPEN, Authentication::None)]));
        let names = format!("InitiatorName={INITIATOR}\0TargetName={OPEN}\0");
        driver.receive(&pdu(0x43, 0x87, &[(8, &[0x40])], names.as_bytes()));
        assert!(driver.logged_in);
        requests(&mut driver, 0x44, lines);
    } else {
        let mut driver = Driver::new(iscsi::portal([(PROVEN, authentication)]));
        requests(&mut driver, 0x43, lines);
        assert!(!driver.logged_in, "no session without a proof");
    }
});

fn requests(driver: &mut Driver, opcode: u8, lines: &[u8]) {
    for line in lines.split(|octet| *octet == b'\n') {
        let Some((flags, text)) = line.split_first() else { continue };
        // Transfer tags are given out from 1 on; the reserved one starts a text.
        let tag = if flags & 0x20 == 0 { [0xff; 4] } else { [0, 0, 0, flags & 0x0f] };
        let fields: &[(usize, &[u8])] = if opcode == 0x43 { &[(8, &[0x40])] } else { &[(20, &tag)] };
        if !driver.receive(&pdu(opcode, *flags, fields, &text[..text.len().min(8192)])) {
            break;
        }
    }
}
