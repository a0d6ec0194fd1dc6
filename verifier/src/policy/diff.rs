//! What differs between two policies, rule by rule and event by event: for the person who approves the second one.
//! Works on the canonical form, so that no member can be forgotten.

use super::Policy;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The rule: `pcr-4`, `secure-boot`, or the name of another member.
    pub rule: String,
    /// Which part of it.
    pub what: String,
    /// What the first policy says; none if it says nothing of it.
    pub before: Option<String>,
    /// What the second one says.
    pub after: Option<String>,
}

/// What differs, in the order of the members. Nothing if the digests are the same, and only then.
#[must_use]
pub fn diff(before: &Policy, after: &Policy) -> Vec<Change> {
    let value = |policy: &Policy| serde_json::from_str(&policy.to_json()).unwrap_or_default();
    let (before, after): (Map<String, Value>, Map<String, Value>) = (value(before), value(after));
    let mut changes = Vec::new();
    for name in names(&before, &after) {
        let (before, after) = (before.get(name), after.get(name));
        if name == PCRS {
            pcrs(before, after, &mut changes);
        } else {
            Place { rule: &name.replace('_', "-"), path: String::new() }.compare(before, after, &mut changes);
        }
    }
    changes
}

/// PCRs are one rule each, known by their index.
fn pcrs(before: Option<&Value>, after: Option<&Value>, changes: &mut Vec<Change>) {
    let (before, after) = (elements(before), elements(after));
    let index = |rule: &Value| rule["index"].as_u64().unwrap_or_default();
    let indices: BTreeSet<_> = before.iter().chain(after).map(index).collect();
    for wanted in indices {
        let of = |rules: &'_ [Value]| rules.iter().position(|rule| index(rule) == wanted);
        let (before, after) = (of(before).map(|at| &before[at]), of(after).map(|at| &after[at]));
        Place { rule: &format!("pcr-{wanted}"), path: String::new() }.compare(before, after, changes);
    }
}

/// Where in the policy the comparison is.
struct Place<'a> {
    rule: &'a str,
    path: String,
}

impl Place<'_> {
    fn inside(&self, name: &str) -> Place<'_> {
        let path = if self.path.is_empty() { name.to_owned() } else { format!("{} {name}", self.path) };
        Place { rule: self.rule, path }
    }

    fn note(&self, before: Option<&Value>, after: Option<&Value>, changes: &mut Vec<Change>) {
        let (before, after) = (before.map(said), after.map(said));
        changes.push(Change { rule: self.rule.to_owned(), what: self.path.clone(), before, after });
    }

    fn compare(&self, before: Option<&Value>, after: Option<&Value>, changes: &mut Vec<Change>) {
        match (before, after) {
            (before, after) if before == after => {}
            (Some(Value::Object(before)), Some(Value::Object(after))) => {
                for name in names(before, after) {
                    self.inside(name).compare(before.get(name), after.get(name), changes);
                }
            }
            (Some(Value::Array(_)) | None, Some(Value::Array(_))) | (Some(Value::Array(_)), None) => {
                self.lists(elements(before), elements(after), changes);
            }
            (before, after) => self.note(before, after, changes),
        }
    }

    /// Lists in order (events) are lined up; of lists of plain values each member counts by itself.
    fn lists(&self, before: &[Value], after: &[Value], changes: &mut Vec<Change>) {
        if before.iter().chain(after).any(Value::is_object) {
            let mut steps = aligned(before, after).into_iter().peekable();
            while let Some(step) = steps.next() {
                let partner = steps.peek().copied().filter(|next| step.is_of(before, after, *next));
                let (old, new) = match (step, partner) {
                    (Step::Removed(old), Some(Step::Added(new))) => {
                        let _used = steps.next();
                        (Some(&before[old]), Some(&after[new]))
                    }
                    (Step::Removed(old), _) => (Some(&before[old]), None),
                    (Step::Added(new), _) => (None, Some(&after[new])),
                };
                let place = self.inside(&format!("`{}`", label(old.or(new))));
                place.compare(old, new, changes);
            }
        } else {
            let lost = before.iter().filter(|value| !after.contains(value));
            lost.for_each(|value| self.note(Some(value), None, changes));
            let added = after.iter().filter(|value| !before.contains(value));
            added.for_each(|value| self.note(None, Some(value), changes));
            if before.len() == after.len() && before != after && before.iter().all(|value| after.contains(value)) {
                self.inside("order").note(Some(&Value::from(before)), Some(&Value::from(after)), changes);
            }
        }
    }
}

/// What one list has and the other has not, by place.
#[derive(Clone, Copy)]
enum Step {
    Removed(usize),
    Added(usize),
}

impl Step {
    /// Whether the next step is what this one became: the same thing by its label, with other values.
    fn is_of(self, before: &[Value], after: &[Value], next: Self) -> bool {
        match (self, next) {
            (Self::Removed(old), Self::Added(new)) => label(Some(&before[old])) == label(Some(&after[new])),
            (Self::Removed(_), Self::Removed(_)) | (Self::Added(_), _) => false,
        }
    }
}

/// The longest common subsequence, as the steps that lead from one list to the other.
fn aligned(before: &[Value], after: &[Value]) -> Vec<Step> {
    let width = after.len() + 1;
    let mut longest = vec![0_u32; (before.len() + 1) * width];
    for old in (0..before.len()).rev() {
        for new in (0..after.len()).rev() {
            longest[old * width + new] = if before[old] == after[new] {
                longest[(old + 1) * width + new + 1] + 1
            } else {
                longest[(old + 1) * width + new].max(longest[old * width + new + 1])
            };
        }
    }
    let (mut old, mut new, mut steps) = (0, 0, Vec::new());
    while old < before.len() || new < after.len() {
        if old < before.len() && new < after.len() && before[old] == after[new] {
            (old, new) = (old + 1, new + 1);
        } else if new == after.len()
            || (old < before.len() && longest[(old + 1) * width + new] >= longest[old * width + new + 1])
        {
            steps.push(Step::Removed(old));
            old += 1;
        } else {
            steps.push(Step::Added(new));
            new += 1;
        }
    }
    steps
}

fn names<'a>(before: &'a Map<String, Value>, after: &'a Map<String, Value>) -> BTreeSet<&'a String> {
    before.keys().chain(after.keys()).collect()
}

fn elements(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// What people call an element of a list.
fn label(element: Option<&Value>) -> String {
    let element = element.unwrap_or(&Value::Null);
    let named = ["description", "name", "data", "variable", "text", "device_path"];
    let found = named.iter().find_map(|name| element.get(name));
    found.map_or_else(|| "entry".to_owned(), said)
}

fn said(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

const PCRS: &str = "pcr";
