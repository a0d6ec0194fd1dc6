//! JSON texts on a stream: RFC 7047 section 4 sends JSON-RPC messages back to back with nothing between them.
//!
//! [`JsonDecoder`] finds where an object ends by counting brackets outside strings, octet by octet and never twice, so
//! a message that arrives in a thousand pieces costs no more than one that arrives whole. It holds at most
//! `max_message_bytes`; a peer that sends more is cut off.

use bytes::{Buf as _, BufMut as _, BytesMut};
use serde_json::Value;
use tokio_util::codec::{Decoder, Encoder};

/// Splits a stream into JSON objects. Pure: octets in, values out.
#[derive(Debug)]
pub struct JsonDecoder {
    max_message_bytes: usize,
    scan: Scan,
}

/// Why the stream is not JSON-RPC.
#[derive(Debug, thiserror::Error)]
pub enum FramingError {
    /// The peer sends more than we are prepared to hold.
    #[error("message is longer than {limit} octets")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// A message starts with `{`; nothing else may stand between messages but white space.
    #[error("expected a JSON object, found octet 0x{0:02x}")]
    NotAnObject(u8),
    /// The brackets matched, the rest did not.
    #[error("message is not valid JSON")]
    Json(#[source] serde_json::Error),
    /// The stream failed, or ended inside a message.
    #[error("reading or writing the stream")]
    Io(#[from] std::io::Error),
}

/// Where the scan for the end of the current message stands.
#[derive(Debug, Default, Clone, Copy)]
struct Scan {
    /// Octets of the buffer already looked at.
    position: usize,
    /// Open brackets and braces.
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl JsonDecoder {
    /// A decoder that holds at most `max_message_bytes`.
    #[must_use]
    pub fn new(max_message_bytes: usize) -> Self {
        Self { max_message_bytes, scan: Scan::default() }
    }
}

impl Decoder for JsonDecoder {
    type Item = Value;
    type Error = FramingError;

    fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Value>, FramingError> {
        if self.scan.position == 0 {
            skip_white_space(buffer);
            match buffer.first() {
                None => return Ok(None),
                Some(b'{') => {}
                Some(&other) => return Err(FramingError::NotAnObject(other)),
            }
        }
        let end = self.scan.advance(buffer);
        if end.unwrap_or(buffer.len()) > self.max_message_bytes {
            return Err(FramingError::TooLong { limit: self.max_message_bytes });
        }
        let Some(end) = end else {
            return Ok(None);
        };
        self.scan = Scan::default();
        let message = buffer.split_to(end);
        // serde_json refuses nesting deeper than 128, so depth is bounded too.
        serde_json::from_slice(&message).map(Some).map_err(FramingError::Json)
    }
}

impl Encoder<Value> for JsonDecoder {
    type Error = FramingError;

    fn encode(&mut self, message: Value, buffer: &mut BytesMut) -> Result<(), FramingError> {
        serde_json::to_writer(buffer.writer(), &message).map_err(FramingError::Json)
    }
}

impl Scan {
    /// Looks at what is new in `buffer`; answers the length of the message once it is complete.
    fn advance(&mut self, buffer: &[u8]) -> Option<usize> {
        while let Some(&octet) = buffer.get(self.position) {
            self.position += 1;
            match (self.in_string, self.escaped, octet) {
                (true, true, _) => self.escaped = false,
                (true, false, b'\\') => self.escaped = true,
                (true, false, b'"') => self.in_string = false,
                (true, false, _) => {}
                (false, _, b'"') => self.in_string = true,
                (false, _, b'{' | b'[') => self.depth += 1,
                (false, _, b'}' | b']') => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(self.position);
                    }
                }
                (false, _, _) => {}
            }
        }
        None
    }
}

fn skip_white_space(buffer: &mut BytesMut) {
    let blank = buffer.iter().take_while(|b| matches!(b, b' ' | b'\t' | b'\r' | b'\n')).count();
    buffer.advance(blank);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn decode_all(decoder: &mut JsonDecoder, buffer: &mut BytesMut) -> Result<Vec<Value>, FramingError> {
        let mut messages = Vec::new();
        while let Some(message) = decoder.decode(buffer)? {
            messages.push(message);
        }
        Ok(messages)
    }

    #[test]
    fn messages_stand_back_to_back() {
        let mut buffer = BytesMut::from(&br#" {"a":"}\"{"}{"b":[{}]} {"c""#[..]);
        let messages = decode_all(&mut JsonDecoder::new(100), &mut buffer).unwrap();
        assert_eq!(messages, [json!({"a": "}\"{"}), json!({"b": [{}]})]);
        assert_eq!(&buffer[..], br#"{"c""#);
    }

    #[test]
    fn a_long_message_is_cut_off_before_it_is_complete() {
        let mut buffer = BytesMut::from(&[b"{\"a\":\"".as_slice(), &[b'x'; 200]].concat()[..]);
        assert!(matches!(JsonDecoder::new(100).decode(&mut buffer), Err(FramingError::TooLong { limit: 100 })));
    }

    #[test]
    fn anything_but_an_object_is_refused() {
        for bad in ["[]", "1", "\"x\"", "}", "\0{}"] {
            let mut buffer = BytesMut::from(bad);
            assert!(JsonDecoder::new(100).decode(&mut buffer).is_err(), "{bad:?} was accepted");
        }
        assert!(matches!(JsonDecoder::new(100).decode(&mut BytesMut::from("{]")), Err(FramingError::Json(_))));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from)
        ];
        let tree = leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..6).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        });
        prop::collection::btree_map(".*", tree, 0..4).prop_map(|map| Value::Object(map.into_iter().collect()))
    }

    proptest! {
        #[test]
        fn arbitrary_octets_never_panic(octets in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut buffer = BytesMut::from(&octets[..]);
            let mut decoder = JsonDecoder::new(300);
            let _ = decode_all(&mut decoder, &mut buffer);
            prop_assert!(decoder.scan.position <= 600);
        }

        #[test]
        fn what_was_encoded_is_decoded_however_it_is_cut(
            messages in prop::collection::vec(any_json(), 1..5), piece in 1_usize..40
        ) {
            let mut stream = BytesMut::new();
            let mut codec = JsonDecoder::new(1 << 20);
            for message in &messages {
                codec.encode(message.clone(), &mut stream).unwrap();
            }
            let (mut buffer, mut decoded) = (BytesMut::new(), Vec::new());
            for piece in stream.chunks(piece) {
                buffer.extend_from_slice(piece);
                decoded.extend(decode_all(&mut codec, &mut buffer).unwrap());
            }
            prop_assert_eq!(decoded, messages);
            prop_assert!(buffer.is_empty());
        }
    }
}
