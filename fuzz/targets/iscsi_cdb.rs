#![no_main]
//! Command descriptor blocks with their data, over two sessions with the same unit. The input is a list of records:
//! an octet of flags (1: the second session; 2, 4: reads, writes; the rest: the LUN), the length of the data, 16
//! octets of CDB, the data.

mod iscsi;

use assay_iscsi::Authentication;
use iscsi::{Driver, INITIATOR, OPEN, pdu};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let portal = iscsi::portal([(OPEN, Authentication::None)]);
    let names = format!("InitiatorName={INITIATOR}\0TargetName={OPEN}\0");
    let mut drivers = [1, 2].map(|port| {
        let mut driver = Driver::new(portal.clone());
        driver.receive(&pdu(0x43, 0x87, &[(8, &[0x40, 0, 0, 0, 0, port])], names.as_bytes()));
        assert!(driver.logged_in);
        driver
    });
    let mut numbers = [0u32; 2];
    let mut rest = bytes;
    while let Some(([flags, octets, cdb @ ..], left)) = rest.split_first_chunk::<18>() {
        let (data, left) = left.split_at(usize::from(*octets).min(left.len()));
        rest = left;
        let session = usize::from(flags & 1);
        let writes = flags & 4 != 0;
        let expected = if writes { u32::try_from(data.len()).unwrap_or(0) } else { 65_536 };
        let direction = 0x80 | (flags & 2) << 5 | (flags & 4) << 3;
        let fields: [(usize, &[u8]); 5] = [
            (9, &[flags >> 3]),
            (16, &numbers[session].to_be_bytes()),
            (20, &expected.to_be_bytes()),
            (24, &numbers[session].to_be_bytes()),
            (32, cdb),
        ];
        numbers[session] += 1;
        // A command may fail; the connection may not.
        assert!(drivers[session].receive(&pdu(0x01, direction, &fields, if writes { data } else { &[] })));
    }
});
