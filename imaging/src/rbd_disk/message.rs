//! What a gateway and the companion of a worker say to each other: packets of JSON, as in [`crate::worker::message`].
//!
//! ```text
//! gateway ─▶ companion   store::RbdClone, once; then nothing, and its end is the companion's
//! companion ─▶ gateway   Ready + the channels, or Refused, once; Log
//! ```

use crate::worker::message::Confinement;
use serde::{Deserialize, Serialize};

/// From the companion.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromRbdDisk {
    /// It is confined, and has the clone open; [`super::channel::CHANNELS`] sockets come with it, for the worker.
    Ready(Ready),
    /// It cannot serve; it ends.
    Refused {
        /// Why.
        reason: String,
    },
    /// A log event.
    Log {
        /// `error`, `warn`, `info` or `debug`.
        level: String,
        /// Its name.
        event: String,
        /// Everything else, as text.
        text: String,
    },
    /// How an attack went.
    #[cfg(feature = "failpoints")]
    Attacked(crate::worker::attack::Outcome),
}

/// What it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ready {
    /// Size of the disk in octets.
    pub byte_len: u64,
    /// Octets of each of its objects but the last: a power of two.
    pub object_bytes: u64,
    /// What holds it.
    pub confinement: Confinement,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::message::{FromWorker, decode};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_packets_are_messages_or_none(packet in prop::collection::vec(any::<u8>(), 0..300)) {
            let _message: Result<FromRbdDisk, _> = decode(&packet);
        }

        #[test]
        fn what_it_has_arrives_as_it_was_sent(byte_len: u64, object_bytes: u64, own_user: bool) {
            let ready = Ready { byte_len, object_bytes, confinement: Confinement { own_user, landlock_whole: true } };
            let packet = serde_json::to_vec(&FromRbdDisk::Ready(ready)).unwrap();
            prop_assert!(matches!(decode(&packet), Ok(FromRbdDisk::Ready(arrived)) if arrived == ready));
        }
    }

    #[test]
    fn its_log_is_said_as_a_workers() {
        let (level, event, text) = ("warn".to_owned(), "x".to_owned(), "y".to_owned());
        let packet = serde_json::to_vec(&FromWorker::Log { level, event, text }).unwrap();
        assert!(matches!(decode(&packet), Ok(FromRbdDisk::Log { level, .. }) if level == "warn"));
    }
}
