//! Quotes of the trust domain that this machine is, if it is one: what goes beside the TPM's quote, for policies that
//! demand it. The kernel's interface is in [`tsm`], the one file that touches it; here is what its answers mean.
//!
//! | the machine | evidence |
//! |---|---|
//! | is no trust domain, or its kernel has no such interface (before 6.7) | has no quote, and nothing is said |
//! | is a trust domain of Intel TDX | has its quote, bound to the nonce and the AK |
//! | is a guest of another maker's (`sev_guest`) | has no quote: no verifier of ours reads one |
//! | has the interface, and that fails | has no quote, and the log has one warning until it works again |
//!
//! Whether a node is admitted without a quote is the policy's to decide. There is no quote of Intel SGX: it is of an
//! enclave, which the agent is not, and made by Intel's quoting enclave, which neither ramdisk nor agent runs.

pub mod tsm;

use assay_tpm::public::Public;
use assay_wire::evidence::{TeeKind, TeeQuote};
use std::sync::atomic::{AtomicBool, Ordering};
use tsm::{Interface, TsmError};

/// Where quotes come from.
#[derive(Debug)]
pub struct TeeQuotes {
    interface: Interface,
    /// Whether the last attempt failed: one that goes on failing is not said every 30 seconds.
    failing: AtomicBool,
}

impl Default for TeeQuotes {
    fn default() -> Self {
        Self::new(Interface::default())
    }
}

impl TeeQuotes {
    /// Of an interface: the kernel's own but in tests.
    #[must_use]
    pub fn new(interface: Interface) -> Self {
        Self { interface, failing: AtomicBool::new(false) }
    }

    /// The quotes of this machine for a nonce, and for the AK with this `TPMT_PUBLIC`. None where there are none, for
    /// whatever reason. Waits for the machine's host, for seconds at most.
    #[must_use]
    pub fn answering(&self, nonce: &[u8], ak_public: &[u8]) -> Vec<TeeQuote> {
        let quote = Public::parse(ak_public).map_err(TsmError::from).and_then(|ak| {
            let report_data = TeeQuote::report_data(nonce, ak.name().as_bytes());
            self.interface.tdx_quote(&report_data)
        });
        match quote {
            Ok(quote) => {
                self.failing.store(false, Ordering::Relaxed);
                quote.map(|quote| TeeQuote { kind: TeeKind::Tdx, quote }).into_iter().collect()
            }
            Err(error) => {
                if !self.failing.swap(true, Ordering::Relaxed) {
                    let error = crate::console::Chain(&error);
                    tracing::warn!(event = "agent.no_tee_quote", "evidence goes without a quote of TDX: {error}");
                }
                Vec::new()
            }
        }
    }
}

/// Whose reports an interface gives, as its attribute `provider` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Provider {
    /// Quotes of Intel TDX.
    Tdx,
    /// Another maker's.
    Other,
}

impl Provider {
    fn read(attribute: &str) -> Self {
        if attribute.trim_end() == TDX { Self::Tdx } else { Self::Other }
    }
}

/// How many times a report's input was written, as its attribute `generation` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Generation(u64);

impl Generation {
    fn read(attribute: &str) -> Option<Self> {
        attribute.trim_end().parse().ok().map(Self)
    }

    /// Whether a report is of the one input that was written between this and `after`. The kernel swallows a failure to
    /// write it, and anybody may write another: both show here.
    fn is_followed_by(self, after: Self) -> bool {
        self.0.wrapping_add(1) == after.0
    }
}

/// The name of the kernel's module for guests of Intel TDX.
const TDX: &str = "tdx_guest";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_report_is_of_the_one_input_that_was_written() {
        let read = |text: &str| Generation::read(text).unwrap();
        assert!(read("0\n").is_followed_by(read("1\n")));
        assert!(read(&u64::MAX.to_string()).is_followed_by(read("0\n")));
        for other in ["0\n", "2\n", "3\n"] {
            assert!(!read("0\n").is_followed_by(read(other)), "{other}");
        }
    }

    #[test]
    fn only_tdx_gives_quotes_of_tdx() {
        assert_eq!(Provider::read("tdx_guest\n"), Provider::Tdx);
        for other in ["sev_guest\n", "tdx_guest2\n", " tdx_guest", "", "\n", "arm_cca_guest\n"] {
            assert_eq!(Provider::read(other), Provider::Other, "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn attributes_are_numbers_and_names_or_nothing(text in ".{0,40}") {
            let number = Generation::read(&text);
            prop_assert_eq!(number.is_some(), text.trim_end().parse::<u64>().is_ok());
            prop_assert_eq!(Provider::read(&text) == Provider::Tdx, text.trim_end() == "tdx_guest");
        }
    }
}
