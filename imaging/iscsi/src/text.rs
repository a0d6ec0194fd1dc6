//! Text parameters (RFC 7143 §6.1): `key=value` pairs, each ended by a zero octet.

use thiserror::Error;

/// Most pairs accepted in one text; initiators send about twenty.
const PAIRS_LIMIT: usize = 64;
/// Longest key name (RFC 7143 §6.1).
const KEY_OCTETS: usize = 63;

/// The pairs of `text`, in order.
pub(crate) fn parse(text: &[u8]) -> Result<Vec<(&str, &str)>, TextError> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    if text.last().is_some_and(|last| *last != 0) {
        return Err(TextError::Unterminated);
    }
    for pair in text.split(|octet| *octet == 0).filter(|pair| !pair.is_empty()) {
        let pair = std::str::from_utf8(pair).map_err(|_| TextError::NotText)?;
        let (key, value) = pair.split_once('=').ok_or(TextError::NoValue)?;
        if key.is_empty() || key.len() > KEY_OCTETS {
            return Err(TextError::KeyLength { octets: key.len() });
        }
        if pairs.iter().any(|(seen, _)| *seen == key) {
            return Err(TextError::Repeated { key: key.to_owned() });
        }
        if pairs.len() == PAIRS_LIMIT {
            return Err(TextError::TooMany);
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// Appends one pair.
pub(crate) fn append(text: &mut Vec<u8>, key: &str, value: &str) {
    text.extend_from_slice(key.as_bytes());
    text.push(b'=');
    text.extend_from_slice(value.as_bytes());
    text.push(0);
}

/// Why a text cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TextError {
    /// Not UTF-8.
    #[error("reading text parameters: not UTF-8")]
    NotText,
    /// The last pair has no end: something was cut off.
    #[error("reading text parameters: the last pair is not ended")]
    Unterminated,
    /// No `=` in a pair.
    #[error("reading text parameters: a key without a value")]
    NoValue,
    /// A key name that is empty or too long.
    #[error("reading text parameters: a key name of {octets} octets")]
    KeyLength {
        /// Its length.
        octets: usize,
    },
    /// The same key twice.
    #[error("reading text parameters: key {key} is repeated")]
    Repeated {
        /// The key.
        key: String,
    },
    /// More pairs than any initiator sends.
    #[error("reading text parameters: more than {PAIRS_LIMIT} keys")]
    TooMany,
    /// More octets than are kept for one negotiation.
    #[error("reading text parameters: more than {limit} octets")]
    TooLong {
        /// The limit.
        limit: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_octets_never_panic(octets in prop::collection::vec(any::<u8>(), 0..500)) {
            let _ = parse(&octets);
        }

        #[test]
        fn round_trip(pairs in prop::collection::btree_map("[A-Z][A-Za-z]{0,20}", "[ -~]{0,40}", 0..20)) {
            let mut text = Vec::new();
            for (key, value) in &pairs {
                append(&mut text, key, value);
            }
            let parsed: Vec<(String, String)> =
                parse(&text).unwrap().into_iter().map(|(key, value)| (key.into(), value.into())).collect();
            prop_assert_eq!(parsed, pairs.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_repeated_key_and_one_without_end_or_value_are_refused() {
        assert_eq!(parse(b"A=1\0A=2\0"), Err(TextError::Repeated { key: "A".into() }));
        assert_eq!(parse(b"A=1\0B=2"), Err(TextError::Unterminated));
        assert_eq!(parse(b""), Ok(Vec::new()));
        assert_eq!(parse(b"A\0"), Err(TextError::NoValue));
        assert_eq!(parse(b"=1\0"), Err(TextError::KeyLength { octets: 0 }));
    }
}
