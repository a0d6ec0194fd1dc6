//! What the operator registers: projects and their verifier keys, networks, switches, nodes with their BMCs and NICs.

use super::{RecordError, Store, failed, integer, json, parsed, text, to_json};
use crate::record::Entry;
use crate::store::nodes::entry_text;
use assay_wire::id::{NodeId, ProjectId};
use assay_wire::isolation::{Bmc, Network, Nic, NodeState, PortIntent, Project, Switch};
use assay_wire::net::VlanId;
use assay_wire::result::VerifierKey;
use sqlx::Row as _;

/// Everything that validation compares a new object with.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// All projects.
    pub projects: Vec<Project>,
    /// All networks.
    pub networks: Vec<Network>,
    /// All switches.
    pub switches: Vec<Switch>,
}

/// A node to register, its BMC's password sealed.
#[derive(Debug)]
pub struct NewNode {
    /// Its name.
    pub name: NodeId,
    /// Its BMC, with an empty password.
    pub bmc: Bmc,
    /// The password, sealed.
    pub password_sealed: String,
    /// Its NICs.
    pub nics: Vec<Nic>,
}

impl Store {
    /// Reads everything that was registered, but nodes.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn inventory(&self) -> Result<Inventory, RecordError> {
        Ok(Inventory {
            projects: self.projects().await?,
            networks: self.networks().await?,
            switches: self.switches().await?,
        })
    }

    async fn projects(&self) -> Result<Vec<Project>, RecordError> {
        let doing = "reading the projects";
        let pool = self.database.pool();
        let rows =
            sqlx::query("SELECT name FROM projects ORDER BY name").fetch_all(pool).await.map_err(failed(doing))?;
        let keys = sqlx::query("SELECT project, key_hex FROM verifier_keys ORDER BY key_hex").fetch_all(pool).await;
        let keys = keys.map_err(failed(doing))?;
        let mut projects = Vec::with_capacity(rows.len());
        for row in &rows {
            projects.push(Project { name: parsed(doing, row, "name")?, verifier_keys: Vec::new() });
        }
        for row in &keys {
            let (project, key): (ProjectId, String) = (parsed(doing, row, "project")?, text(doing, row, "key_hex")?);
            if let Some(project) = projects.iter_mut().find(|p| p.name == project) {
                project.verifier_keys.push(key);
            }
        }
        Ok(projects)
    }

    async fn networks(&self) -> Result<Vec<Network>, RecordError> {
        let doing = "reading the networks";
        let rows = sqlx::query("SELECT name, project, vlan, shared_with FROM networks ORDER BY name");
        let rows = rows.fetch_all(self.database.pool()).await.map_err(failed(doing))?;
        let network = |row| {
            Ok(Network {
                name: parsed(doing, row, "name")?,
                project: parsed(doing, row, "project")?,
                vlan: vlan(doing, integer(doing, row, "vlan")?)?,
                shared_with: json(doing, "shared_with", &text(doing, row, "shared_with")?)?,
            })
        };
        rows.iter().map(network).collect()
    }

    async fn switches(&self) -> Result<Vec<Switch>, RecordError> {
        let doing = "reading the switches";
        let rows = sqlx::query("SELECT name, driver FROM switches ORDER BY name");
        let rows = rows.fetch_all(self.database.pool()).await.map_err(failed(doing))?;
        let switch = |row| {
            let driver = json(doing, "driver", &text(doing, row, "driver")?)?;
            Ok(Switch { name: parsed(doing, row, "name")?, driver })
        };
        rows.iter().map(switch).collect()
    }

    /// The keys whose results admit nodes to `project`. None of an unknown project.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn verifier_keys(&self, project: &ProjectId) -> Result<Vec<VerifierKey>, RecordError> {
        let doing = "reading the project's verifier keys";
        let rows = sqlx::query("SELECT key_hex FROM verifier_keys WHERE project = $1")
            .bind(project.to_string())
            .fetch_all(self.database.pool())
            .await
            .map_err(failed(doing))?;
        rows.iter().map(|row| parsed(doing, row, "key_hex")).collect()
    }

    /// Registers a project, or gives a known one another set of verifier keys.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn put_project(&self, project: &Project) -> Result<(), RecordError> {
        let doing = "recording the project";
        let mut transaction = self.begin(doing).await?;
        sqlx::query("INSERT INTO projects (name, created_ms) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING")
            .bind(project.name.to_string())
            .bind(self.clock.now_ms())
            .execute(&mut *transaction)
            .await
            .map_err(failed(doing))?;
        sqlx::query("DELETE FROM verifier_keys WHERE project = $1")
            .bind(project.name.to_string())
            .execute(&mut *transaction)
            .await
            .map_err(failed(doing))?;
        for key in &project.verifier_keys {
            sqlx::query("INSERT INTO verifier_keys (project, key_hex) VALUES ($1, $2)")
                .bind(project.name.to_string())
                .bind(key.to_lowercase())
                .execute(&mut *transaction)
                .await
                .map_err(failed(doing))?;
        }
        let detail = format!("project {} trusts {} verifier keys", project.name, project.verifier_keys.len());
        self.audit(&mut transaction, None, "project-recorded", &detail).await?;
        self.commit(doing, transaction).await
    }

    /// Registers a network.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn add_network(&self, network: &Network) -> Result<(), RecordError> {
        let doing = "recording the network";
        let mut transaction = self.begin(doing).await?;
        sqlx::query("INSERT INTO networks (name, project, vlan, shared_with) VALUES ($1, $2, $3, $4)")
            .bind(network.name.to_string())
            .bind(network.project.to_string())
            .bind(i64::from(network.vlan.get()))
            .bind(to_json(&network.shared_with))
            .execute(&mut *transaction)
            .await
            .map_err(failed(doing))?;
        let detail = format!("network {} of project {} is VLAN {}", network.name, network.project, network.vlan);
        self.audit(&mut transaction, None, "network-recorded", &detail).await?;
        self.commit(doing, transaction).await
    }

    /// Registers a switch.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn add_switch(&self, switch: &Switch) -> Result<(), RecordError> {
        let doing = "recording the switch";
        let mut transaction = self.begin(doing).await?;
        sqlx::query("INSERT INTO switches (name, driver) VALUES ($1, $2)")
            .bind(switch.name.to_string())
            .bind(to_json(&switch.driver))
            .execute(&mut *transaction)
            .await
            .map_err(failed(doing))?;
        self.audit(&mut transaction, None, "switch-recorded", &format!("switch {}", switch.name)).await?;
        self.commit(doing, transaction).await
    }

    /// Registers a node: Free, every port to be in quarantine, and none known to be.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn add_node(&self, node: &NewNode) -> Result<(), RecordError> {
        let doing = "recording the node";
        let mut transaction = self.begin(doing).await?;
        sqlx::query(
            "INSERT INTO nodes (name, bmc, bmc_password_sealed, state, reason, since_ms, entry, entered_ms) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, 0)",
        )
        .bind(node.name.to_string())
        .bind(to_json(&node.bmc))
        .bind(node.password_sealed.clone())
        .bind(NodeState::Free.as_str())
        .bind("registered")
        .bind(self.clock.now_ms())
        .bind(entry_text(Entry::Pending))
        .execute(&mut *transaction)
        .await
        .map_err(failed(doing))?;
        for (position, nic) in (0_i64..).zip(&node.nics) {
            sqlx::query(
                "INSERT INTO nics (node, name, position, mac, switch, port, desired) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7)",
            )
            .bind(node.name.to_string())
            .bind(nic.name.to_string())
            .bind(position)
            .bind(nic.mac.to_string())
            .bind(nic.switch.to_string())
            .bind(nic.port.clone())
            .bind(to_json(&PortIntent::Quarantine))
            .execute(&mut *transaction)
            .await
            .map_err(failed(doing))?;
        }
        self.audit(&mut transaction, Some(&node.name), "node-recorded", "registered").await?;
        self.commit(doing, transaction).await
    }

    /// Removes a node. Its ports stay as they are: in quarantine.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn remove_node(&self, node: &NodeId) -> Result<(), RecordError> {
        let doing = "removing the node";
        let mut transaction = self.begin(doing).await?;
        for statement in ["DELETE FROM nics WHERE node = $1", "DELETE FROM nodes WHERE name = $1"] {
            let query = sqlx::query(statement).bind(node.to_string());
            query.execute(&mut *transaction).await.map_err(failed(doing))?;
        }
        self.audit(&mut transaction, Some(node), "node-removed", "removed").await?;
        self.commit(doing, transaction).await
    }

    /// A node's BMC as registered, with an empty password, and the password, sealed.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub async fn bmc(&self, node: &NodeId) -> Result<Option<(Bmc, String)>, RecordError> {
        let doing = "reading the node's BMC";
        let row = sqlx::query("SELECT bmc, bmc_password_sealed FROM nodes WHERE name = $1")
            .bind(node.to_string())
            .fetch_optional(self.database.pool())
            .await
            .map_err(failed(doing))?;
        let Some(row) = row else { return Ok(None) };
        let bmc: String = row.try_get("bmc").map_err(failed(doing))?;
        Ok(Some((json(doing, "bmc", &bmc)?, text(doing, &row, "bmc_password_sealed")?)))
    }
}

pub(super) fn vlan(doing: &'static str, value: i64) -> Result<VlanId, RecordError> {
    let corrupt = || RecordError::Corrupt { doing, column: "vlan", value: value.to_string() };
    u32::try_from(value).ok().and_then(|v| VlanId::try_from(v).ok()).ok_or_else(corrupt)
}
