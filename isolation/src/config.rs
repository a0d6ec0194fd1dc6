//! Isolation's configuration: what the file says (private), and what it means.

use crate::plan::Periods;
use crate::switch::SiteVlans;
use assay_service::config::ConfigError;
use assay_wire::agreement::Agreement;
use assay_wire::net::VlanId;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A valid configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "File")]
pub struct Config {
    /// The database: `sqlite:PATH` or `postgres://…`.
    pub database: String,
    /// Where the HTTPS API listens.
    pub listen: SocketAddr,
    /// The file with the key that seals BMC passwords; made on the first start.
    pub password_key_file: PathBuf,
    /// The site's own VLANs.
    pub vlans: SiteVlans,
    /// Timeouts and polling.
    pub periods: Periods,
    /// How long one operation on a switch port may take.
    pub switch_timeout: Duration,
    /// How long one request to a BMC may take.
    pub bmc_timeout: Duration,
    /// How long a node may take to be off, or on, after its BMC said yes.
    pub power_timeout: Duration,
    /// Whether BMCs may show `Continuous` for a boot override that was to be `Once`.
    pub allow_continuous_boot_override: bool,
    /// Whose attestation results admit a node.
    pub agreement: Agreement,
    /// The longest that a renewal keeps an admission standing, from when it is made.
    pub longest_renewal: Duration,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    database: String,
    listen: SocketAddr,
    password_key_file: PathBuf,
    quarantine_vlan: VlanId,
    airlock_vlan: VlanId,
    #[serde(default = "default_airlock_timeout_seconds")]
    airlock_timeout_seconds: u32,
    #[serde(default = "default_reset_poll_ms")]
    reset_poll_ms: u32,
    #[serde(default = "default_observe_ms")]
    observe_ms: u32,
    #[serde(default = "default_link_grace_ms")]
    link_grace_ms: u32,
    #[serde(default = "default_switch_timeout_ms")]
    switch_timeout_ms: u32,
    #[serde(default = "default_bmc_timeout_ms")]
    bmc_timeout_ms: u32,
    #[serde(default = "default_power_timeout_seconds")]
    power_timeout_seconds: u32,
    #[serde(default)]
    allow_continuous_boot_override: bool,
    #[serde(default)]
    agreement: Agreement,
    #[serde(default = "default_longest_renewal_seconds")]
    longest_renewal_seconds: u32,
}

impl TryFrom<File> for Config {
    type Error = ConfigError;

    fn try_from(file: File) -> Result<Self, ConfigError> {
        if file.quarantine_vlan == file.airlock_vlan {
            return Err(ConfigError::invalid("airlock_vlan", "must not be the quarantine VLAN"));
        }
        for (field, value, least) in [
            ("airlock_timeout_seconds", file.airlock_timeout_seconds, 1),
            ("reset_poll_ms", file.reset_poll_ms, 20),
            ("observe_ms", file.observe_ms, 20),
            ("switch_timeout_ms", file.switch_timeout_ms, 100),
            ("bmc_timeout_ms", file.bmc_timeout_ms, 100),
            ("power_timeout_seconds", file.power_timeout_seconds, 1),
            ("longest_renewal_seconds", file.longest_renewal_seconds, 1),
        ] {
            if value < least {
                return Err(ConfigError::invalid(field, format!("must be at least {least}")));
            }
        }
        Ok(Self {
            database: file.database,
            listen: file.listen,
            password_key_file: file.password_key_file,
            vlans: SiteVlans { quarantine: file.quarantine_vlan, airlock: file.airlock_vlan },
            periods: Periods {
                airlock_timeout_ms: i64::from(file.airlock_timeout_seconds) * 1000,
                reset_poll_ms: i64::from(file.reset_poll_ms),
                observe_ms: i64::from(file.observe_ms),
                link_grace_ms: i64::from(file.link_grace_ms),
            },
            switch_timeout: Duration::from_millis(file.switch_timeout_ms.into()),
            bmc_timeout: Duration::from_millis(file.bmc_timeout_ms.into()),
            power_timeout: Duration::from_secs(file.power_timeout_seconds.into()),
            allow_continuous_boot_override: file.allow_continuous_boot_override,
            agreement: file.agreement,
            longest_renewal: Duration::from_secs(file.longest_renewal_seconds.into()),
        })
    }
}

fn default_airlock_timeout_seconds() -> u32 {
    600
}

fn default_reset_poll_ms() -> u32 {
    1000
}

fn default_observe_ms() -> u32 {
    2000
}

fn default_link_grace_ms() -> u32 {
    15_000
}

fn default_switch_timeout_ms() -> u32 {
    5000
}

fn default_bmc_timeout_ms() -> u32 {
    10_000
}

fn default_power_timeout_seconds() -> u32 {
    60
}

fn default_longest_renewal_seconds() -> u32 {
    3600
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn file() -> Value {
        json!({"database": "sqlite:a.db", "listen": "127.0.0.1:0", "password_key_file": "key",
            "quarantine_vlan": 998, "airlock_vlan": 999})
    }

    #[test]
    fn defaults_are_filled_in() {
        let config: Config = serde_json::from_value(file()).unwrap();
        assert_eq!(config.periods.airlock_timeout_ms, 600_000);
        assert!(!config.allow_continuous_boot_override);
    }

    #[test]
    fn impossible_values_name_their_field() {
        for (field, value) in [
            ("airlock_vlan", json!(998)),
            ("airlock_vlan", json!(4095)),
            ("reset_poll_ms", json!(0)),
            ("switch_timeout_ms", json!(1)),
            ("longest_renewal_seconds", json!(0)),
            ("agreement", json!({"require": "provider"})),
            ("no_such_field", json!(1)),
        ] {
            let mut file = file();
            file[field] = value;
            let error = serde_json::from_value::<Config>(file).unwrap_err().to_string();
            assert!(error.contains(field) || error.contains("4095"), "{error}");
        }
    }
}
