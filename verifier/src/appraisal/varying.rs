//! Events that differ from node to node, within a policy's patterns: their data must hash to their digest, so that it
//! is what was measured, and every pattern that is given must cover it.

use crate::event_log::Event;
use crate::event_log::data::EventData;
use crate::event_log::quirks::DataDigest;
use crate::event_log::variable::Meaning;
use crate::policy::{VaryingEvent, glob};

pub(super) fn may_vary(varying: &VaryingEvent, event: &Event<'_>) -> bool {
    if event.kind() != varying.kind || event.data_digest() != DataDigest::Matches {
        return false;
    }
    let VaryingEvent { device_path, text, kind: _, variable } = varying;
    match event.decoded_data() {
        EventData::Variable { name, means, .. } => {
            let path = match &means {
                Meaning::LoadOption { device_path, .. } => Some(device_path),
                Meaning::Switch(_) | Meaning::Order(_) | Meaning::Signatures { .. } | Meaning::Other => None,
            };
            let goes = device_path.as_ref().is_none_or(|it| path.is_some_and(|path| glob::matches(it, path)));
            text.is_none() && goes && variable.as_ref().is_some_and(|it| glob::matches(it, &name))
        }
        EventData::Text(says) => {
            variable.is_none() && device_path.is_none() && text.as_ref().is_some_and(|it| glob::matches(it, &says))
        }
        _ => false,
    }
}
