//! The verifier (RFC 9334): evidence in, signed attestation result out; and the release that follows from a good one.
//! Steps 4 to 6 of the boot path, and the driving of 7 to 9.
//!
//! | deciding, pure | doing |
//! |---|---|
//! | [`identity`], [`quote`], [`event_log`], [`ima`], [`tee`], [`evidence`]: is it what it says? | [`server`]: the two HTTP APIs |
//! | [`policy`], [`appraisal`], [`learn`], [`verdict`], [`reappraisal`]: is it good? | [`store`]: the database |
//! | [`session`]: may this agent go on? | [`signer`]: the key of the results |
//! | [`release::journal`]: what is to be done next? | [`release::driver`], [`release::peers`]: doing it |
//! | [`attestation`]: is it still good? | [`attestation::endings`], [`attestation::renewals`]: saying so |

pub mod api;
pub mod appraisal;
pub mod attestation;
pub mod boot_count;
pub mod config;
pub mod event_log;
pub mod evidence;
#[cfg(test)]
mod fixtures;
pub mod identity;
pub mod ima;
pub mod learn;
mod openapi;
pub mod policy;
pub mod quote;
pub mod reappraisal;
pub mod release;
mod run;
pub mod secret;
pub mod server;
pub mod session;
pub mod signer;
pub mod store;
pub mod tee;
pub mod verdict;
pub mod webhook;

pub use config::Config;
pub use openapi::openapi;
pub use run::{RunError, Sockets, agent_identity, run, run_on};
