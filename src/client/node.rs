//! `assay switch` and `assay node`.

use super::output::{self, Row};
use super::{BoxError, Options, Site};
use assay_wire::id::{NodeId, SwitchId};
use assay_wire::isolation::{Bmc, Nic, Node, NodeStatus, PortIntent, Switch, SwitchDriver};
use clap::{Args, Subcommand};
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;

#[derive(Debug, Subcommand)]
pub(crate) enum SwitchCommand {
    /// Register an Open vSwitch bridge
    Add {
        /// Its name
        name: SwitchId,
        /// Unix socket of ovsdb-server
        #[arg(long)]
        ovsdb: String,
        /// Control socket of ovs-vswitchd
        #[arg(long)]
        control: String,
        /// The bridge
        #[arg(long)]
        bridge: String,
        #[command(flatten)]
        options: Options,
    },
    /// List switches
    List(Options),
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Register a node
    Add(AddArguments),
    /// List nodes
    List(Options),
    /// Show one node
    Show(Named),
    /// Send a node through the airlock again: the clean way to reboot it
    Cycle(Named),
    /// Take a rejected node out of quarantine, once you know why it was there
    Clear(Named),
    /// Forget a node that is free
    Remove(Named),
}

#[derive(Debug, Args)]
pub(crate) struct Named {
    /// The node
    name: NodeId,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct AddArguments {
    /// Its name
    name: NodeId,
    /// Redfish system of its BMC, like <https://10.1.0.5/redfish/v1/Systems/1>
    #[arg(long)]
    bmc: String,
    /// The BMC's user
    #[arg(long)]
    bmc_user: String,
    /// File with the BMC user's password
    #[arg(long)]
    bmc_password_file: PathBuf,
    /// PEM file of the CA that signed the BMC's certificate
    #[arg(long)]
    bmc_ca: Option<PathBuf>,
    /// A NIC as NAME,MAC,SWITCH,PORT; the first one boots
    #[arg(long = "nic", required = true, value_name = "NAME,MAC,SWITCH,PORT")]
    nics: Vec<NicArgument>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Clone)]
struct NicArgument(Nic);

impl FromStr for NicArgument {
    type Err = String;

    fn from_str(value: &str) -> Result<Self, String> {
        let [name, mac, switch, port]: [&str; 4] = value
            .split(',')
            .collect::<Vec<_>>()
            .try_into()
            .map_err(|_| format!("`{value}` is not NAME,MAC,SWITCH,PORT"))?;
        Ok(Self(Nic {
            name: name.parse().map_err(|e| format!("{e}"))?,
            mac: mac.parse().map_err(|e| format!("{e}"))?,
            switch: switch.parse().map_err(|e| format!("{e}"))?,
            port: port.to_owned(),
        }))
    }
}

impl Row for Switch {
    const HEAD: &'static [&'static str] = &["SWITCH", "DRIVER", "BRIDGE", "OVSDB"];
    fn cells(&self) -> Vec<String> {
        let SwitchDriver::OpenVswitch { ovsdb_socket, bridge, .. } = &self.driver;
        vec![self.name.to_string(), "open-vswitch".to_owned(), bridge.clone(), ovsdb_socket.clone()]
    }
}

impl Row for NodeStatus {
    const HEAD: &'static [&'static str] = &["NODE", "STATE", "SINCE", "PROJECT", "PORT", "IS", "SHOULD BE", "WHY"];
    fn cells(&self) -> Vec<String> {
        let nic = self.nics.first();
        vec![
            self.name.to_string(),
            self.state.to_string(),
            output::time(self.since_ms),
            self.lease.as_ref().map(|lease| lease.project.to_string()).unwrap_or_default(),
            nic.map(|nic| format!("{}/{}", nic.nic.switch, nic.nic.port)).unwrap_or_default(),
            nic.and_then(|nic| nic.observed).map_or_else(|| "unknown".to_owned(), intent),
            nic.map(|nic| intent(nic.desired)).unwrap_or_default(),
            self.reason.clone(),
        ]
    }
}

fn intent(intent: PortIntent) -> String {
    match intent {
        PortIntent::Quarantine => "quarantine".to_owned(),
        PortIntent::Airlock => "airlock".to_owned(),
        PortIntent::Access { vlan } => format!("access VLAN {vlan}"),
    }
}

pub(crate) async fn run_switch(command: SwitchCommand) -> Result<(), BoxError> {
    match command {
        SwitchCommand::Add { name, ovsdb, control, bridge, options } => {
            let driver = SwitchDriver::OpenVswitch { ovsdb_socket: ovsdb, control_socket: control, bridge };
            let switch = Switch { name, driver };
            let _created: serde_json::Value = Site::open(&options)?.isolation.post("/v1/switches", &switch).await?;
            output::done(options.output, &format!("switch {} registered", switch.name), &switch)
        }
        SwitchCommand::List(options) => {
            let switches: Vec<Switch> = Site::open(&options)?.isolation.get("/v1/switches").await?;
            output::list(options.output, &switches)
        }
    }
}

pub(crate) async fn run_node(command: NodeCommand) -> Result<(), BoxError> {
    match command {
        NodeCommand::Add(arguments) => add(arguments).await,
        NodeCommand::List(options) => {
            let nodes: Vec<NodeStatus> = Site::open(&options)?.isolation.get("/v1/nodes").await?;
            output::list(options.output, &nodes)
        }
        NodeCommand::Show(Named { name, options }) => {
            let node: NodeStatus = Site::open(&options)?.isolation.get(&format!("/v1/nodes/{name}")).await?;
            output::one(options.output, &node)
        }
        NodeCommand::Cycle(named) => act(&named, "cycle", "goes through the airlock again").await,
        NodeCommand::Clear(named) => act(&named, "clear", "is cleared").await,
        NodeCommand::Remove(Named { name, options }) => {
            let path = format!("/v1/nodes/{name}");
            let _removed: serde_json::Value = Site::open(&options)?.isolation.delete(&path, &()).await?;
            output::done(options.output, &format!("node {name} removed"), &name)
        }
    }
}

async fn act(Named { name, options }: &Named, action: &str, sentence: &str) -> Result<(), BoxError> {
    let path = format!("/v1/nodes/{name}/{action}");
    let answer: serde_json::Value = Site::open(options)?.isolation.post(&path, &serde_json::json!({})).await?;
    output::done(options.output, &format!("node {name} {sentence}"), &answer)
}

async fn add(arguments: AddArguments) -> Result<(), BoxError> {
    let AddArguments { name, bmc, bmc_user, bmc_password_file, bmc_ca, nics, options } = arguments;
    let read = |path: &PathBuf| {
        fs::read_to_string(path).map_err(|cause| BoxError::from(format!("reading {}: {cause}", path.display())))
    };
    let bmc = Bmc::Redfish {
        system: bmc,
        username: bmc_user,
        password: read(&bmc_password_file)?.trim_end_matches('\n').to_owned(),
        ca_pem: bmc_ca.as_ref().map(read).transpose()?,
    };
    let node = Node { name, bmc, nics: nics.into_iter().map(|NicArgument(nic)| nic).collect() };
    let created: serde_json::Value = Site::open(&options)?.isolation.post("/v1/nodes", &node).await?;
    output::done(options.output, &format!("node {} registered", node.name), &created)
}
