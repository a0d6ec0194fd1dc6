//! What the lab can show: each scenario builds a site of its own, does something to it, and says in events what came of
//! it. A scenario that ends well means that everything it checks held.

mod attacks;
mod attestation;
mod bench;
mod boot;
mod ceph;
mod clients;
mod deployments;
mod hardware;
mod leaks;
mod soft;
mod tenant;

pub use bench::{Bench, BenchOptions};

use crate::ceph::StoreKind;
use crate::error::{LabError, Result};
use crate::events::EventLog;
use crate::services::AttestationPace;
use crate::site::Site;
use crate::topology::Topology;
use clap::ValueEnum;
use std::path::Path;

/// A scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// A good node goes all the way to its tenant's Debian, a tampered one is refused.
    Run,
    /// The same; then a program that no policy knows, and after another boot a reset, cost the good node its network.
    BootPath,
    /// A node boots, goes on attesting in its tenant's Debian, and is cut off when a program runs there that the policy
    /// does not know.
    Attest,
    /// A node without firmware goes on attesting, then falls silent: its admission ends.
    Silence,
    /// A node without firmware sends bad evidence, again and again (`--runs`): how fast it is cut off.
    Revoke,
    /// The hardware alone: a BMC, a console, real firmware.
    Hardware,
    /// Nodes without firmware lie in every way that a node can.
    Lies,
    /// The services die after each entry of a release's journal.
    ReleaseCrash,
    /// Probe frames flow from a node's cable all the time; none reaches the tenant's network unless it may.
    NoLeak,
    /// A good node boots from Ceph, whose OSD is killed while it does and comes back.
    CephBoot,
    /// Linux writes to a target over two paths, one of which is cut.
    Multipath,
    /// iPXE boots from a target.
    Sanboot,
    /// One tenant owns all of it: each of its nodes opens its own disk and no other.
    DeploymentFlat,
    /// Tenants that trust each other share a network and its gateway: neither's node opens the other's disk.
    DeploymentShared,
    /// A network and a gateway for each project: one project's portal answers nothing to the other's node.
    DeploymentPrivate,
}

/// What a scenario is played with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The site with its services.
    Services,
    /// The site's hardware alone.
    Hardware,
    /// Neither: a target, a machine and the cables between them.
    Target,
}

impl Scenario {
    /// What it is played on, unless the user brings a topology.
    #[must_use]
    pub fn topology(self) -> Topology {
        match self {
            Self::Run | Self::BootPath | Self::Attest | Self::CephBoot | Self::Hardware => Topology::built_in(),
            Self::Silence
            | Self::Revoke
            | Self::Lies
            | Self::ReleaseCrash
            | Self::NoLeak
            | Self::Multipath
            | Self::Sanboot => Topology::soft(),
            Self::DeploymentFlat => Topology::flat(),
            Self::DeploymentShared => Topology::shared(),
            Self::DeploymentPrivate => Topology::private(),
        }
    }

    /// What it needs.
    #[must_use]
    pub fn stage(self) -> Stage {
        match self {
            Self::Hardware => Stage::Hardware,
            Self::Multipath | Self::Sanboot => Stage::Target,
            Self::Run
            | Self::BootPath
            | Self::Attest
            | Self::CephBoot
            | Self::Silence
            | Self::Revoke
            | Self::Lies
            | Self::ReleaseCrash
            | Self::NoLeak
            | Self::DeploymentFlat
            | Self::DeploymentShared
            | Self::DeploymentPrivate => Stage::Services,
        }
    }

    /// The nodes that boot the tampered ramdisk.
    #[must_use]
    pub fn tampered_nodes(self) -> Vec<String> {
        match self {
            Self::Run | Self::BootPath => vec!["n2".to_owned()],
            Self::Attest
            | Self::CephBoot
            | Self::Silence
            | Self::Revoke
            | Self::Hardware
            | Self::Lies
            | Self::ReleaseCrash
            | Self::NoLeak
            | Self::Multipath
            | Self::Sanboot
            | Self::DeploymentFlat
            | Self::DeploymentShared
            | Self::DeploymentPrivate => Vec::new(),
        }
    }

    /// Where its images and disks must be, if that is part of what it shows.
    #[must_use]
    pub fn store(self) -> Option<StoreKind> {
        (self == Self::CephBoot).then_some(StoreKind::Ceph)
    }

    /// How often its nodes attest. Silence is short where it is waited for; elsewhere, emulated nodes on a busy machine
    /// are not to be taken for dead.
    #[must_use]
    pub fn pace(self) -> AttestationPace {
        match self {
            Self::Silence => AttestationPace { interval_seconds: 1, silence_seconds: 10 },
            Self::Run
            | Self::BootPath
            | Self::Attest
            | Self::CephBoot
            | Self::Hardware
            | Self::Revoke
            | Self::Lies
            | Self::ReleaseCrash
            | Self::NoLeak
            | Self::Multipath
            | Self::Sanboot
            | Self::DeploymentFlat
            | Self::DeploymentShared
            | Self::DeploymentPrivate => AttestationPace { interval_seconds: 4, silence_seconds: 60 },
        }
    }

    /// Plays it on a bench with services; what is measured, `runs` times.
    ///
    /// # Errors
    /// Something that must hold did not, or a part of the lab failed.
    pub async fn play(self, bench: &mut Bench, runs: u32) -> Result<()> {
        match self {
            Self::Run => boot::good_and_tampered(bench).await,
            Self::BootPath => {
                boot::good_and_tampered(bench).await?;
                tenant::something_unknown_runs(bench, boot::GOOD_NODE).await?;
                boot::again_through_the_airlock(bench, boot::GOOD_NODE).await?;
                boot::reset_by_the_tenant(bench, boot::GOOD_NODE).await
            }
            Self::Attest => {
                bench.trust_the_firmware().await?;
                boot::good_node(bench, boot::GOOD_NODE).await?;
                tenant::something_unknown_runs(bench, boot::GOOD_NODE).await
            }
            Self::CephBoot => ceph::boots_through_an_outage(bench, boot::GOOD_NODE).await,
            Self::Silence => attestation::silence(bench).await,
            Self::Revoke => attestation::revocations(bench, runs).await,
            Self::Hardware | Self::Multipath | Self::Sanboot => {
                Err(LabError::unexpected("playing a scenario on a site with services", "it needs none"))
            }
            Self::Lies => attacks::lies(bench).await,
            Self::ReleaseCrash => attacks::crashes(bench).await,
            Self::NoLeak => leaks::none_but_when_admitted(bench).await,
            Self::DeploymentFlat | Self::DeploymentShared | Self::DeploymentPrivate => deployments::play(bench).await,
        }
    }

    /// Plays what needs the hardware alone.
    ///
    /// # Errors
    /// Something that must hold did not.
    pub async fn play_on_hardware(self, site: &Site, events: &EventLog) -> Result<()> {
        hardware::bmc_and_firmware(site, events, "n1").await
    }

    /// Plays what needs a target and a machine. `cache` has images, `agent_image` is what `make agent-image` left.
    ///
    /// # Errors
    /// Something that must hold did not.
    pub async fn play_on_target(
        self,
        folder: &Path,
        cache: &Path,
        agent_image: &Path,
        events: &EventLog,
    ) -> Result<()> {
        match self {
            Self::Multipath => clients::multipath(folder, cache, events).await,
            Self::Sanboot => clients::sanboot(folder, agent_image, events).await,
            Self::Run
            | Self::BootPath
            | Self::Attest
            | Self::CephBoot
            | Self::Hardware
            | Self::Silence
            | Self::Revoke
            | Self::Lies
            | Self::ReleaseCrash
            | Self::NoLeak
            | Self::DeploymentFlat
            | Self::DeploymentShared
            | Self::DeploymentPrivate => Err(LabError::unexpected("playing a scenario on a target", "it needs a site")),
        }
    }
}
