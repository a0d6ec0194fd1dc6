//! Network namespaces and the cables between them. All live inside the lab's own namespaces, so the kernel removes
//! them when the lab ends, however it ends.

use crate::command::{command, run};
use crate::error::{LabError, Result};
use std::path::PathBuf;
use std::time::Duration;
use tokio::process::Command;

/// Where `ip netns` keeps its names; a fresh tmpfs inside the lab.
pub const NETNS_FOLDER: &str = "/run/netns";

/// A network namespace: the lab's own, or a named one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Netns {
    /// Where the services run.
    Site,
    /// Another.
    Named(String),
}

/// One end of a cable.
#[derive(Debug, Clone)]
pub struct CableEnd<'a> {
    /// The namespace.
    pub netns: &'a Netns,
    /// The interface's name there; at most 15 characters.
    pub interface: &'a str,
}

impl Netns {
    /// Makes a named namespace, its loopback up.
    ///
    /// # Errors
    /// `ip netns add` fails.
    pub async fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name], &format!("making network namespace {name}")).await?;
        let netns = Self::Named(name.to_owned());
        netns.ip(&["link", "set", "lo", "up"]).await?;
        Ok(netns)
    }

    /// The file that stands for the namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Site => PathBuf::from("/proc/self/ns/net"),
            Self::Named(name) => PathBuf::from(NETNS_FOLDER).join(name),
        }
    }

    /// A command that runs inside.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        match self {
            Self::Site => command(program),
            Self::Named(_) => {
                let mut nsenter = command("nsenter");
                nsenter.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
                nsenter
            }
        }
    }

    /// Runs `ip` inside.
    ///
    /// # Errors
    /// It fails.
    pub async fn ip(&self, args: &[&str]) -> Result<String> {
        let mut ip = self.command("ip");
        ip.args(args);
        run(ip, &format!("configuring the network of {self}"), TOOL_LIMIT).await
    }

    /// Gives `interface` an address and brings it up.
    ///
    /// # Errors
    /// `ip` fails.
    pub async fn address(&self, interface: &str, address: ipnet::Ipv4Net) -> Result<()> {
        self.ip(&["addr", "add", &address.to_string(), "dev", interface]).await?;
        self.ip(&["link", "set", interface, "up"]).await?;
        Ok(())
    }

    /// Runs `work` on a thread of its own inside: entering a namespace is for a thread's life.
    ///
    /// # Errors
    /// The namespace cannot be entered, `work` fails, or takes longer than `limit`.
    pub async fn act<T, W, F>(&self, limit: Duration, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce() -> F + Send + 'static,
        F: Future<Output = Result<T>>,
    {
        let doing = format!("acting in {self}");
        let (answer, answered) = tokio::sync::oneshot::channel();
        let netns = self.clone();
        std::thread::spawn(move || {
            let worked = netns.enter().and_then(|()| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.map_err(LabError::io("starting a runtime"))?.block_on(work())
            });
            let _gave_up = answer.send(worked);
        });
        let limited = tokio::time::timeout(limit, answered).await;
        let hint = "it did not come to its end".to_owned();
        let ended = limited.map_err(|_| LabError::Timeout { doing: doing.clone(), waited: limit, hint })?;
        ended.map_err(|_| LabError::unexpected(doing, "the thread ended without an answer"))?
    }

    /// Moves this thread inside.
    fn enter(&self) -> Result<()> {
        if *self == Self::Site {
            return Ok(());
        }
        let path = self.path();
        let file = std::fs::File::open(&path).map_err(LabError::io(format!("opening {}", path.display())))?;
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)
            .map_err(|errno| LabError::unexpected(format!("entering {self}"), errno))
    }

    /// Makes a tap that outlives the programs which open it.
    ///
    /// # Errors
    /// `ip` fails: often `/dev/net/tun` is missing or not ours to open.
    pub async fn tap(&self, interface: &str) -> Result<()> {
        self.ip(&["tuntap", "add", "dev", interface, "mode", "tap"]).await?;
        self.ip(&["link", "set", interface, "up"]).await?;
        Ok(())
    }
}

impl std::fmt::Display for Netns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Site => f.write_str("the site"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

/// Lays a cable (a veth pair) and brings both ends up. Checksum offload is off at both: the userspace switch hands
/// frames on as they are, and TCP would see checksums that nobody filled in.
///
/// # Errors
/// A tool fails.
pub async fn cable(a: CableEnd<'_>, b: CableEnd<'_>) -> Result<()> {
    // Made in the site and moved out, because `netns NAME` at creation wants a name and the site has none.
    let doing = format!("laying a cable from {} to {}", a.interface, b.interface);
    ip(&["link", "add", a.interface, "type", "veth", "peer", "name", b.interface], &doing).await?;
    for end in [&a, &b] {
        if let Netns::Named(name) = end.netns {
            ip(&["link", "set", end.interface, "netns", name], &doing).await?;
        }
        end.netns.ip(&["link", "set", end.interface, "up"]).await?;
        let mut ethtool = end.netns.command("ethtool");
        ethtool.args(["-K", end.interface, "tx", "off"]);
        run(ethtool, &doing, TOOL_LIMIT).await?;
    }
    Ok(())
}

async fn ip(args: &[&str], doing: &str) -> Result<()> {
    let mut ip = command("ip");
    ip.args(args);
    run(ip, doing, TOOL_LIMIT).await.map(drop)
}

const TOOL_LIMIT: Duration = Duration::from_secs(20);
