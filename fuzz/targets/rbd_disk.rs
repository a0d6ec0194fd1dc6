#![no_main]
//! What goes over the channels between a worker and its companion, and over the companion's connection to its gateway: by
//! then it may be a node that asks, and somebody's companion that answers.

use assay_imaging::rbd_disk::channel::{ANSWER_BYTES, Answer, MAPPED_BYTES, MOST_DATA, Mapped, REQUEST_BYTES, Request};
use assay_imaging::rbd_disk::message::FromRbdDisk;
use assay_imaging::worker::message::decode;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = decode::<FromRbdDisk>(bytes) {
        let again = serde_json::to_vec(&message).expect("what was read can be written");
        decode::<FromRbdDisk>(&again).expect("and read again");
    }
    let Some((request, rest)) = bytes.split_first_chunk::<REQUEST_BYTES>() else { return };
    let Ok(decoded) = Request::decode(request) else { return };
    assert!(decoded.data() <= MOST_DATA && decoded.answer_data() <= MOST_DATA);
    assert_eq!(decoded.encode(), *request);
    let Some((answer, rest)) = rest.split_first_chunk::<ANSWER_BYTES>() else { return };
    let Ok(decoded_answer) = Answer::decode(answer, decoded) else { return };
    assert_eq!(decoded_answer.encode(decoded), *answer);
    let (Request::Mapped(range), Some(mapped)) = (decoded, rest.first_chunk::<MAPPED_BYTES>()) else { return };
    if let Ok(decoded_mapped) = Mapped::decode(mapped, range) {
        assert!((1..=range.length).contains(&decoded_mapped.length));
        assert_eq!(decoded_mapped.encode(), *mapped);
    }
});
