#![no_main]
//! What a DHCP server, or whoever plays one in the airlock, answers to the agent: several datagrams of one exchange,
//! each with its length in front. Only a whole exchange binds an address.

use assay_ramdisk_agent::dhcp::{Exchange, Reaction};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut exchange = Exchange::new("52:54:00:00:00:01".parse().expect("a MAC address"), 0x0102_0304);
    let (mut rest, mut requested) = (bytes, false);
    while let Some((length, after)) = rest.split_at_checked(2) {
        let length = usize::from(u16::from_be_bytes([length[0], length[1]])).min(after.len());
        let (datagram, after) = after.split_at(length);
        rest = after;
        match exchange.handle_packet(datagram) {
            Reaction::Send(request) => {
                assert!(request.len() >= 300);
                requested = true;
            }
            Reaction::Bound(lease) => {
                assert!(requested, "bound to an address that was not asked for");
                assert_eq!(lease.settings_url.scheme(), "http");
                return;
            }
            Reaction::Ignore(_) | Reaction::Refused => {}
        }
    }
});
