#![no_main]
//! JSON-RPC framing of OVSDB and unixctl: however the octets are cut, the same messages come out.

use assay_ovsdb::framing::JsonDecoder;
use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tokio_util::codec::Decoder as _;

fn decode(pieces: &[&[u8]]) -> Vec<serde_json::Value> {
    let (mut decoder, mut buffer, mut messages) = (JsonDecoder::new(4096), BytesMut::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut buffer) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(_refused) => return messages,
            }
        }
    }
    messages
}

fuzz_target!(|bytes: &[u8]| {
    let whole = decode(&[bytes]);
    let cut = decode(&bytes.chunks(3).collect::<Vec<_>>());
    assert_eq!(whole, cut);
});
