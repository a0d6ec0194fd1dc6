//! What a BMC knows of its system, and how it changes. No sockets, no machine: requests in, decisions out.

use crate::machine::BootSource;
use serde::Deserialize;
use serde_json::{Value, json};

/// The system resource's changing part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemState {
    boot_target: BootTarget,
    boot_enabled: BootEnabled,
    boot_mode: BootMode,
    last_reset_ms: i64,
    revision: u64,
}

/// `BootSourceOverrideTarget`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum BootTarget {
    /// The firmware's own order.
    None,
    /// The network.
    Pxe,
}

/// `BootSourceOverrideEnabled`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum BootEnabled {
    /// The override is not used.
    Disabled,
    /// It is used at the next boot, then disabled.
    Once,
    /// It is used at every boot.
    Continuous,
}

/// `BootSourceOverrideMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum BootMode {
    /// The only one that this firmware has.
    #[serde(rename = "UEFI")]
    Uefi,
}

/// `ResetType` of the `ComputerSystem.Reset` action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum ResetType {
    /// Turn on.
    On,
    /// Cut the power.
    ForceOff,
    /// Press the power button.
    GracefulShutdown,
    /// Reset, or turn on.
    ForceRestart,
}

/// Body of `PATCH /redfish/v1/Systems/1`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SystemPatch {
    /// The only writable part.
    #[serde(rename = "Boot")]
    pub boot: BootPatch,
}

/// The boot override's writable properties.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
pub struct BootPatch {
    boot_source_override_target: Option<BootTarget>,
    boot_source_override_enabled: Option<BootEnabled>,
    boot_source_override_mode: Option<BootMode>,
}

/// Body of the reset action.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
pub struct ResetRequest {
    /// What to do.
    pub reset_type: ResetType,
}

impl SystemState {
    /// A system that was last reset at `now_ms`, without override.
    #[must_use]
    pub fn new(now_ms: i64) -> Self {
        Self {
            boot_target: BootTarget::None,
            boot_enabled: BootEnabled::Disabled,
            boot_mode: BootMode::Uefi,
            last_reset_ms: now_ms,
            revision: 1,
        }
    }

    /// The entity tag of the resource as it stands.
    #[must_use]
    pub fn etag(&self, power_on: bool) -> String {
        format!("W/\"{}-{}\"", self.revision, u8::from(power_on))
    }

    /// Changes the override. A target that is not `None`, set without saying for how long, holds once.
    pub fn patch(&mut self, boot: &BootPatch) {
        if let Some(target) = boot.boot_source_override_target {
            self.boot_target = target;
            self.boot_enabled = if target == BootTarget::None { BootEnabled::Disabled } else { BootEnabled::Once };
        }
        if let Some(enabled) = boot.boot_source_override_enabled {
            self.boot_enabled = enabled;
        }
        if let Some(mode) = boot.boot_source_override_mode {
            self.boot_mode = mode;
        }
        self.revision += 1;
    }

    /// The boot source of a boot that begins now; an override for one boot is used up.
    pub fn begin_boot(&mut self) -> BootSource {
        let source = match (self.boot_enabled, self.boot_target) {
            (BootEnabled::Disabled, _) | (_, BootTarget::None) => BootSource::Default,
            (BootEnabled::Once | BootEnabled::Continuous, BootTarget::Pxe) => BootSource::Network,
        };
        if self.boot_enabled == BootEnabled::Once {
            self.boot_target = BootTarget::None;
            self.boot_enabled = BootEnabled::Disabled;
        }
        self.revision += 1;
        source
    }

    /// The system was reset at `now_ms`. Strictly later than any reset before, so that two in one millisecond differ.
    pub fn was_reset(&mut self, now_ms: i64) {
        self.last_reset_ms = now_ms.max(self.last_reset_ms + 1);
        self.revision += 1;
    }

    /// The resource (ComputerSystem schema). `last_reset` is RFC 3339 text of [`SystemState::last_reset_ms`].
    #[must_use]
    pub fn resource(&self, node: &str, power_on: bool, last_reset: &str) -> Value {
        json!({
            "@odata.id": SYSTEM_PATH,
            "@odata.type": "#ComputerSystem.v1_20_0.ComputerSystem",
            "Id": "1",
            "Name": node,
            "SystemType": "Physical",
            "Manufacturer": "QEMU",
            "PowerState": if power_on { "On" } else { "Off" },
            "LastResetTime": last_reset,
            "Status": { "State": "Enabled", "Health": "OK" },
            "Boot": {
                "BootSourceOverrideTarget": match self.boot_target { BootTarget::None => "None", BootTarget::Pxe => "Pxe" },
                "BootSourceOverrideTarget@Redfish.AllowableValues": ["None", "Pxe"],
                "BootSourceOverrideEnabled": match self.boot_enabled {
                    BootEnabled::Disabled => "Disabled",
                    BootEnabled::Once => "Once",
                    BootEnabled::Continuous => "Continuous",
                },
                "BootSourceOverrideMode": match self.boot_mode { BootMode::Uefi => "UEFI" },
            },
            "Actions": { "#ComputerSystem.Reset": {
                "target": RESET_PATH,
                "ResetType@Redfish.AllowableValues": ["On", "ForceOff", "GracefulShutdown", "ForceRestart"],
            }},
        })
    }

    /// When the system was last reset or turned on: milliseconds since the Unix epoch.
    #[must_use]
    pub fn last_reset_ms(&self) -> i64 {
        self.last_reset_ms
    }
}

/// The system's resource.
pub const SYSTEM_PATH: &str = "/redfish/v1/Systems/1";
/// The reset action's target.
pub const RESET_PATH: &str = "/redfish/v1/Systems/1/Actions/ComputerSystem.Reset";

#[cfg(test)]
mod tests {
    use super::*;

    fn patch(json: Value) -> SystemPatch {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn once_is_once() {
        let mut state = SystemState::new(1000);
        let pxe = patch(json!({ "Boot": { "BootSourceOverrideTarget": "Pxe", "BootSourceOverrideEnabled": "Once" } }));
        state.patch(&pxe.boot);
        assert_eq!(state.resource("n1", false, "")["Boot"]["BootSourceOverrideEnabled"], "Once");
        assert_eq!(state.begin_boot(), BootSource::Network);
        assert_eq!(state.resource("n1", true, "")["Boot"]["BootSourceOverrideEnabled"], "Disabled");
        assert_eq!(state.begin_boot(), BootSource::Default);
    }

    #[test]
    fn continuous_stays() {
        let mut state = SystemState::new(1000);
        state.patch(
            &patch(json!({ "Boot": { "BootSourceOverrideTarget": "Pxe", "BootSourceOverrideEnabled": "Continuous" } }))
                .boot,
        );
        assert_eq!(state.begin_boot(), BootSource::Network);
        assert_eq!(state.begin_boot(), BootSource::Network);
    }

    #[test]
    fn every_change_has_an_etag_of_its_own_and_every_reset_a_time() {
        let mut state = SystemState::new(1000);
        let before = state.etag(false);
        assert_ne!(before, state.etag(true));
        state.was_reset(1000);
        assert_eq!(state.last_reset_ms(), 1001);
        state.was_reset(500);
        assert_eq!(state.last_reset_ms(), 1002);
        assert_ne!(before, state.etag(false));
    }

    #[test]
    fn what_is_not_writable_is_refused() {
        for bad in [
            json!({ "PowerState": "On" }),
            json!({ "Boot": { "BootSourceOverrideTarget": "Cd" } }),
            json!({ "Boot": { "BootSourceOverrideMode": "Legacy" } }),
        ] {
            assert!(serde_json::from_value::<SystemPatch>(bad.clone()).is_err(), "{bad} was accepted");
        }
    }
}
