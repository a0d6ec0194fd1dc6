//! Operational parameters (RFC 7143 §13) and the rules by which each is settled (§6.2).

use crate::pdu::Digests;

/// MaxRecvDataSegmentLength declared by this side, in octets.
pub const RECEIVE_SEGMENT_OCTETS: usize = 256 * 1024;
/// What either side may send before anything is declared (RFC 7143 §13.12).
pub(crate) const DEFAULT_SEGMENT_OCTETS: usize = 8192;
/// Longest burst accepted, in octets.
const MAX_BURST_OCTETS: u32 = 1024 * 1024;
/// Most unsolicited data accepted per command, in octets.
const FIRST_BURST_OCTETS: u32 = 128 * 1024;

/// The parameters of one session. Defaults are those of RFC 7143 §13.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parameters {
    pub(crate) digests: Digests,
    /// The initiator's MaxRecvDataSegmentLength: the longest segment to send, in octets.
    pub(crate) send_segment_octets: usize,
    pub(crate) initial_r2t: bool,
    pub(crate) immediate_data: bool,
    pub(crate) max_burst_octets: u32,
    pub(crate) first_burst_octets: u32,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            digests: Digests::default(),
            send_segment_octets: DEFAULT_SEGMENT_OCTETS,
            initial_r2t: true,
            immediate_data: true,
            max_burst_octets: 262_144,
            first_burst_octets: 65_536,
        }
    }
}

impl Parameters {
    /// Settles one key that the initiator proposed or declared. Returns the answer to send, or `None` where the key is
    /// a declaration that has none.
    pub(crate) fn settle(&mut self, key: &str, value: &str) -> Option<String> {
        let answer = match key {
            "HeaderDigest" => digest(value, &mut self.digests.header),
            "DataDigest" => digest(value, &mut self.digests.data),
            "MaxRecvDataSegmentLength" => {
                return match number(value, 512, (1 << 24) - 1) {
                    // Longer segments than our own gain nothing and would make one PDU hog the connection.
                    Some(octets) => {
                        self.send_segment_octets = (octets as usize).min(RECEIVE_SEGMENT_OCTETS);
                        None
                    }
                    None => Some("Reject".into()),
                };
            }
            "InitialR2T" => boolean(value).map(|proposed| {
                self.initial_r2t = proposed;
                yes_no(self.initial_r2t)
            }),
            "ImmediateData" => boolean(value).map(|proposed| {
                self.immediate_data = proposed;
                yes_no(self.immediate_data)
            }),
            "MaxBurstLength" => number(value, 512, (1 << 24) - 1).map(|octets| {
                self.max_burst_octets = octets.min(MAX_BURST_OCTETS);
                self.max_burst_octets.to_string()
            }),
            "FirstBurstLength" => number(value, 512, (1 << 24) - 1).map(|octets| {
                self.first_burst_octets = octets.min(FIRST_BURST_OCTETS);
                self.first_burst_octets.to_string()
            }),
            "MaxConnections" => number(value, 1, 65_535).map(|_| "1".into()),
            "DefaultTime2Wait" => number(value, 0, 3600).map(|seconds| seconds.max(2).to_string()),
            // Nothing is kept for a session whose connection is gone.
            "DefaultTime2Retain" => number(value, 0, 3600).map(|_| "0".into()),
            "MaxOutstandingR2T" => number(value, 1, 65_535).map(|_| "1".into()),
            "DataPDUInOrder" | "DataSequenceInOrder" => boolean(value).map(|_| yes_no(true)),
            "ErrorRecoveryLevel" => number(value, 0, 2).map(|_| "0".into()),
            "IFMarker" | "OFMarker" => boolean(value).map(|_| yes_no(false)),
            "IFMarkInt" | "OFMarkInt" => None,
            "TaskReporting" => value.split(',').any(|offered| offered == "RFC3720").then(|| "RFC3720".into()),
            "iSCSIProtocolLevel" => number(value, 0, 31).map(|level| level.min(1).to_string()),
            _ => return Some("NotUnderstood".into()),
        };
        Some(answer.unwrap_or_else(|| "Reject".into()))
    }

    /// The last rule (§13.14): FirstBurstLength never exceeds MaxBurstLength.
    pub(crate) fn finish(&mut self) {
        self.first_burst_octets = self.first_burst_octets.min(self.max_burst_octets);
    }
}

/// Settles a digest list: the first offer that is known, in the initiator's order of preference.
fn digest(value: &str, enabled: &mut bool) -> Option<String> {
    let choice = value.split(',').find(|offered| matches!(*offered, "None" | "CRC32C"))?;
    *enabled = choice == "CRC32C";
    Some(choice.to_owned())
}

fn boolean(value: &str) -> Option<bool> {
    match value {
        "Yes" => Some(true),
        "No" => Some(false),
        _ => None,
    }
}

fn yes_no(value: bool) -> String {
    if value { "Yes".into() } else { "No".into() }
}

/// A number in decimal or `0x` hexadecimal, within the bounds of its key.
fn number(value: &str, least: u32, most: u32) -> Option<u32> {
    let number = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16).ok()?,
        None => value.parse().ok()?,
    };
    (least..=most).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn settle(parameters: &mut Parameters, key: &str, value: &str) -> Option<String> {
        parameters.settle(key, value)
    }

    #[test]
    fn keys_are_settled_by_their_rules() {
        let mut parameters = Parameters::default();
        for (key, proposed, answer) in [
            ("HeaderDigest", "CRC32C,None", "CRC32C"),
            ("DataDigest", "SHA1,None,CRC32C", "None"),
            ("InitialR2T", "No", "No"),
            ("ImmediateData", "No", "No"),
            ("MaxBurstLength", "16776192", "1048576"),
            ("FirstBurstLength", "0x400", "1024"),
            ("MaxConnections", "8", "1"),
            ("MaxOutstandingR2T", "16", "1"),
            ("DataPDUInOrder", "No", "Yes"),
            ("DefaultTime2Wait", "0", "2"),
            ("DefaultTime2Retain", "20", "0"),
            ("ErrorRecoveryLevel", "2", "0"),
            ("OFMarkInt", "1~8", "Reject"),
            ("TaskReporting", "FastAbort", "Reject"),
            ("iSCSIProtocolLevel", "2", "1"),
            ("X-com.example", "1", "NotUnderstood"),
            ("MaxBurstLength", "0", "Reject"),
            ("InitialR2T", "maybe", "Reject"),
            ("HeaderDigest", "SHA1", "Reject"),
        ] {
            assert_eq!(settle(&mut parameters, key, proposed).as_deref(), Some(answer), "{key}={proposed}");
        }
        assert_eq!(settle(&mut parameters, "MaxRecvDataSegmentLength", "65536"), None);
        assert_eq!(parameters.send_segment_octets, 65_536);
        assert_eq!(parameters.digests, Digests { header: true, data: false });
        assert!(!parameters.initial_r2t && !parameters.immediate_data);
    }

    #[test]
    fn the_first_burst_fits_the_longest_burst() {
        let mut parameters = Parameters::default();
        settle(&mut parameters, "MaxBurstLength", "4096");
        parameters.finish();
        assert_eq!(parameters.first_burst_octets, 4096);
    }

    proptest! {
        #[test]
        fn no_value_leaves_the_bounds(
            key in prop::sample::select(vec!["MaxRecvDataSegmentLength", "MaxBurstLength", "FirstBurstLength"]),
            value in "(0x)?[0-9]{0,12}",
        ) {
            let mut parameters = Parameters::default();
            parameters.settle(key, &value);
            parameters.finish();
            prop_assert!((512..=RECEIVE_SEGMENT_OCTETS).contains(&parameters.send_segment_octets));
            prop_assert!((512..=MAX_BURST_OCTETS).contains(&parameters.max_burst_octets));
            prop_assert!((512..=parameters.max_burst_octets).contains(&parameters.first_burst_octets));
        }
    }
}
