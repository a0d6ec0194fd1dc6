//! What the lab can show: each scenario builds a site of its own, does something to it, and says in events what came of
//! it. A scenario that ends well means that everything it checks held.

mod bench;
mod boot;

pub use bench::{Bench, BenchOptions};

use crate::error::Result;
use clap::ValueEnum;

/// A scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// A good node goes all the way to its tenant's Debian, a tampered one is refused.
    Run,
    /// A good node goes all the way.
    BootPath,
    /// A node whose ramdisk has one byte changed is refused.
    TamperedRamdisk,
    /// A tenant resets its node: it loses its network until it has been through the airlock again.
    RebootWithoutAirlock,
}

impl Scenario {
    /// The nodes that boot the tampered ramdisk.
    #[must_use]
    pub fn tampered_nodes(self) -> Vec<String> {
        match self {
            Self::Run | Self::TamperedRamdisk => vec!["n2".to_owned()],
            Self::BootPath | Self::RebootWithoutAirlock => Vec::new(),
        }
    }

    /// Plays it.
    ///
    /// # Errors
    /// Something that must hold did not, or a part of the lab failed.
    pub async fn play(self, bench: &mut Bench) -> Result<()> {
        bench.trust_the_firmware().await?;
        match self {
            Self::Run => {
                boot::good_node(bench, "n1").await?;
                boot::tampered_node(bench, "n2").await
            }
            Self::BootPath => boot::good_node(bench, "n1").await,
            Self::TamperedRamdisk => boot::tampered_node(bench, "n2").await,
            Self::RebootWithoutAirlock => {
                boot::good_node(bench, "n1").await?;
                boot::reset_by_the_tenant(bench, "n1").await
            }
        }
    }
}
