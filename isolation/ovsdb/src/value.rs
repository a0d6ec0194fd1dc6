//! OVSDB's notation for values (RFC 7047 section 5.1): sets, UUIDs. Reading is strict: what is not the promised shape
//! is `None`, never a default.

use serde_json::{Value, json};

/// The `<uuid>` notation of a row's id.
#[must_use]
pub fn uuid(id: &str) -> Value {
    json!(["uuid", id])
}

/// A `<set>` of values.
#[must_use]
pub fn set(values: impl IntoIterator<Item = Value>) -> Value {
    json!(["set", values.into_iter().collect::<Vec<_>>()])
}

/// The id in a `<uuid>`.
#[must_use]
pub fn as_uuid(value: &Value) -> Option<&str> {
    match value.as_array()?.as_slice() {
        [kind, id] if kind == "uuid" => id.as_str(),
        _ => None,
    }
}

/// The elements of a set column. A set with exactly one element is sent as the bare element.
#[must_use]
pub fn as_set(value: &Value) -> Option<Vec<&Value>> {
    match value {
        Value::Array(parts) => match parts.as_slice() {
            [kind, Value::Array(elements)] if kind == "set" => Some(elements.iter().collect()),
            [kind, Value::String(_)] if kind == "uuid" || kind == "named-uuid" => Some(vec![value]),
            _ => None,
        },
        Value::String(_) | Value::Number(_) | Value::Bool(_) => Some(vec![value]),
        Value::Null | Value::Object(_) => None,
    }
}

/// An optional column: a set of at most one. The outer `None` says that it is no such thing.
#[must_use]
pub fn as_optional(value: &Value) -> Option<Option<&Value>> {
    match as_set(value)?.as_slice() {
        [] => Some(None),
        [one] => Some(Some(one)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sets_are_read_in_both_notations() {
        assert_eq!(as_set(&json!(["set", [1, 2]])).unwrap(), [&json!(1), &json!(2)]);
        assert_eq!(as_set(&json!(7)).unwrap(), [&json!(7)]);
        assert_eq!(as_set(&json!(["uuid", "a"])).unwrap(), [&json!(["uuid", "a"])]);
        assert_eq!(as_set(&set([])), Some(vec![]));
        for bad in [json!(null), json!(["set"]), json!(["set", 1]), json!([]), json!(["map", []]), json!({})] {
            assert_eq!(as_set(&bad), None, "{bad} was read as a set");
        }
    }

    #[test]
    fn optional_columns_hold_at_most_one() {
        assert_eq!(as_optional(&json!(["set", []])), Some(None));
        assert_eq!(as_optional(&json!(120)), Some(Some(&json!(120))));
        assert_eq!(as_optional(&json!(["set", [1, 2]])), None);
    }

    proptest! {
        #[test]
        fn uuids_round_trip(id in "[0-9a-f-]{36}") {
            let value = uuid(&id);
            prop_assert_eq!(as_uuid(&value), Some(id.as_str()));
            let one = set([value]);
            prop_assert_eq!(as_uuid(as_set(&one).unwrap()[0]), Some(id.as_str()));
        }
    }
}
