//! The nine steps of the boot path (design section 2), as every service logs them.

use serde::{Deserialize, Serialize};
use std::fmt;

/// One step of the boot path. Its event name is stable: the lab's tests and people's dashboards rely on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Step {
    /// netboot answered the firmware's or iPXE's DISCOVER.
    #[serde(rename = "dhcp.offered")]
    DhcpOffered,
    /// netboot served the last byte of a boot file, over TFTP or HTTP.
    #[serde(rename = "boot_file.served")]
    BootFileServed,
    /// netboot rendered the node's iPXE script.
    #[serde(rename = "ipxe.rendered")]
    IpxeRendered,
    /// The agent proved, by credential activation, that its AK lives in the TPM of its EK.
    #[serde(rename = "agent.enrolled")]
    AgentEnrolled,
    /// The verifier holds a quote with its nonce, and the event log.
    #[serde(rename = "evidence.received")]
    EvidenceReceived,
    /// The verifier has a verdict.
    #[serde(rename = "evidence.appraised")]
    EvidenceAppraised,
    /// imaging made the clone and its export.
    #[serde(rename = "image.exported")]
    ImageExported,
    /// isolation moved the switch port and read it back.
    #[serde(rename = "port.moved")]
    PortMoved,
    /// The agent opened its grant and hands over to the tenant's kernel.
    #[serde(rename = "tenant.booted")]
    TenantBooted,
}

impl Step {
    /// All steps, in the order of the boot path.
    pub const ALL: [Self; 9] = [
        Self::DhcpOffered,
        Self::BootFileServed,
        Self::IpxeRendered,
        Self::AgentEnrolled,
        Self::EvidenceReceived,
        Self::EvidenceAppraised,
        Self::ImageExported,
        Self::PortMoved,
        Self::TenantBooted,
    ];

    /// The step's number, 1 to 9.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8 + 1
    }

    /// The stable event name, like `dhcp.offered`.
    #[must_use]
    pub fn event(self) -> &'static str {
        match self {
            Self::DhcpOffered => "dhcp.offered",
            Self::BootFileServed => "boot_file.served",
            Self::IpxeRendered => "ipxe.rendered",
            Self::AgentEnrolled => "agent.enrolled",
            Self::EvidenceReceived => "evidence.received",
            Self::EvidenceAppraised => "evidence.appraised",
            Self::ImageExported => "image.exported",
            Self::PortMoved => "port.moved",
            Self::TenantBooted => "tenant.booted",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.event())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_name_is_the_event_name() {
        for (index, step) in Step::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(step.number()), index + 1);
            assert_eq!(serde_json::to_string(&step).unwrap(), format!("\"{}\"", step.event()));
        }
    }
}
