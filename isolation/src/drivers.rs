//! From what is registered to what can be driven: the one place that knows which driver goes with which kind.

use crate::bmc::redfish::{Redfish, RedfishAccess};
use crate::bmc::{BmcDriver, BmcError};
use crate::config::Config;
use crate::secret::{PasswordError, PasswordKey};
use crate::switch::SwitchDriver;
use crate::switch::open_vswitch::OpenVswitch;
use assay_wire::id::NodeId;
use assay_wire::isolation::{Bmc, Switch, SwitchDriver as SwitchKind};
use std::sync::Arc;

/// Makes drivers. A trait so that a test can count and fail what a real BMC would do.
pub trait Drivers: Send + Sync {
    /// The driver of a switch.
    fn switch(&self, switch: &Switch) -> Arc<dyn SwitchDriver>;

    /// The driver of a node's BMC, its password opened.
    ///
    /// # Errors
    /// See [`DriverError`].
    fn bmc(&self, node: &NodeId, bmc: &Bmc, password_sealed: &str) -> Result<Arc<dyn BmcDriver>, DriverError>;
}

/// Why there is no driver.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The password does not open.
    #[error("preparing the BMC driver of node {node}")]
    Password {
        /// The node.
        node: NodeId,
        /// Why.
        #[source]
        cause: PasswordError,
    },
    /// The BMC's address or CA is unusable.
    #[error("preparing the BMC driver of node {node}")]
    Bmc {
        /// The node.
        node: NodeId,
        /// Why.
        #[source]
        cause: BmcError,
    },
}

/// Drivers of real switches and BMCs.
#[derive(Debug)]
pub struct SiteDrivers {
    config: Config,
    key: PasswordKey,
}

impl SiteDrivers {
    /// Drivers as the site is configured.
    #[must_use]
    pub fn new(config: Config, key: PasswordKey) -> Self {
        Self { config, key }
    }

    /// The key that seals BMC passwords.
    #[must_use]
    pub fn key(&self) -> &PasswordKey {
        &self.key
    }
}

impl Drivers for SiteDrivers {
    fn switch(&self, switch: &Switch) -> Arc<dyn SwitchDriver> {
        match &switch.driver {
            SwitchKind::OpenVswitch { ovsdb_socket, control_socket, bridge } => Arc::new(OpenVswitch {
                switch: switch.name.clone(),
                ovsdb_socket: ovsdb_socket.into(),
                control_socket: control_socket.into(),
                bridge: bridge.clone(),
                vlans: self.config.vlans,
                timeout: self.config.switch_timeout,
            }),
        }
    }

    fn bmc(&self, node: &NodeId, bmc: &Bmc, password_sealed: &str) -> Result<Arc<dyn BmcDriver>, DriverError> {
        let Bmc::Redfish { system, username, password: _, ca_pem } = bmc;
        let password = self
            .key
            .open(node, password_sealed)
            .map_err(|cause| DriverError::Password { node: node.clone(), cause })?;
        let access = RedfishAccess {
            system,
            username: username.clone(),
            password,
            ca_pem: ca_pem.as_deref(),
            timeout: self.config.bmc_timeout,
            allow_continuous: self.config.allow_continuous_boot_override,
        };
        Ok(Arc::new(Redfish::new(access).map_err(|cause| DriverError::Bmc { node: node.clone(), cause })?))
    }
}
