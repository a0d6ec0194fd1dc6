//! Option negotiation (RFC 2347): which of a client's wishes are granted, and how far.

use crate::packet::{DATA_HEADER_BYTES, ReadRequest};
use std::time::Duration;

/// How a transfer will run, and what of that the client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// Octets in every block but the last (RFC 2348); 512 if not negotiated.
    pub block_bytes: u16,
    /// Blocks sent before an acknowledgement is awaited (RFC 7440); 1 if not negotiated.
    pub window_blocks: u16,
    /// Time until the first retransmission (RFC 2349).
    pub timeout: Duration,
    /// The options to acknowledge, as the client ordered them. Empty: no OACK, the transfer begins with DATA.
    pub acknowledged: Vec<(&'static str, u64)>,
}

/// The most that is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionLimits {
    /// Octets in a block: what the path carries in one Ethernet frame, so that nothing is ever fragmented.
    pub max_block_bytes: u16,
    /// Blocks in a window.
    pub max_window_blocks: u16,
    /// Octets in a window: what one acknowledgement can cause.
    pub max_window_bytes: u32,
}

impl Default for OptionLimits {
    fn default() -> Self {
        Self { max_block_bytes: 1468, max_window_blocks: 64, max_window_bytes: 256 * 1024 }
    }
}

impl Negotiated {
    /// Grants what is sensible. An option that is unknown, repeated or out of its range is left out of the answer, as
    /// RFC 2347 has it; too large a wish is granted up to the limit.
    #[must_use]
    pub fn of(request: &ReadRequest<'_>, content_bytes: u64, limits: &OptionLimits) -> Self {
        let mut granted =
            Self { block_bytes: 512, window_blocks: 1, timeout: DEFAULT_TIMEOUT, acknowledged: Vec::new() };
        for (name, value) in &request.options {
            let (Some(option), Some(value)) = (known(name), number(value)) else { continue };
            if granted.acknowledged.iter().any(|(done, _)| *done == option.name()) {
                continue;
            }
            if let Some(answer) = granted.grant(option, value, content_bytes, limits) {
                granted.acknowledged.push((option.name(), answer));
            }
        }
        granted.fit_window(limits);
        granted
    }

    fn grant(&mut self, option: KnownOption, value: u64, content_bytes: u64, limits: &OptionLimits) -> Option<u64> {
        match option {
            KnownOption::BlockSize if (8..=65464).contains(&value) => {
                self.block_bytes = u16::try_from(value).unwrap_or(u16::MAX).min(limits.max_block_bytes);
                Some(self.block_bytes.into())
            }
            KnownOption::WindowSize if (1..=65535).contains(&value) => {
                self.window_blocks = u16::try_from(value).unwrap_or(u16::MAX).min(limits.max_window_blocks);
                Some(self.window_blocks.into())
            }
            // RFC 2349 leaves a server no smaller answer: grant exactly, or not at all.
            KnownOption::Timeout if (1..=MAX_TIMEOUT_SECONDS).contains(&value) => {
                self.timeout = Duration::from_secs(value);
                Some(value)
            }
            KnownOption::TransferSize => Some(content_bytes),
            KnownOption::BlockSize | KnownOption::WindowSize | KnownOption::Timeout => None,
        }
    }

    /// Block and window are negotiated apart, yet their product is what has a limit.
    fn fit_window(&mut self, limits: &OptionLimits) {
        let packet = u32::from(self.block_bytes) + u32::try_from(DATA_HEADER_BYTES).unwrap_or(4);
        let fitting = u16::try_from(limits.max_window_bytes / packet).unwrap_or(u16::MAX).max(1);
        if self.window_blocks > fitting {
            self.window_blocks = fitting;
            for (name, value) in &mut self.acknowledged {
                if *name == KnownOption::WindowSize.name() {
                    *value = fitting.into();
                }
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KnownOption {
    BlockSize,
    WindowSize,
    Timeout,
    TransferSize,
}

impl KnownOption {
    const ALL: [Self; 4] = [Self::BlockSize, Self::WindowSize, Self::Timeout, Self::TransferSize];

    fn name(self) -> &'static str {
        match self {
            Self::BlockSize => "blksize",
            Self::WindowSize => "windowsize",
            Self::Timeout => "timeout",
            Self::TransferSize => "tsize",
        }
    }
}

fn known(name: &[u8]) -> Option<KnownOption> {
    KnownOption::ALL.into_iter().find(|option| option.name().as_bytes().eq_ignore_ascii_case(name))
}

/// Digits only: `str::parse` alone would take a sign.
fn number(value: &[u8]) -> Option<u64> {
    let digits = value.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(value).ok().filter(|_| digits).and_then(|text| text.parse().ok())
}

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longer than this would let a client that has gone hold its session.
const MAX_TIMEOUT_SECONDS: u64 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn negotiate(options: &[(&str, &str)]) -> Negotiated {
        let options = options.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
        let request = ReadRequest { name: b"a", octet: true, options };
        Negotiated::of(&request, 1000, &OptionLimits::default())
    }

    #[test]
    fn without_options_it_is_rfc_1350() {
        let plain = negotiate(&[]);
        assert_eq!((plain.block_bytes, plain.window_blocks), (512, 1));
        assert!(plain.acknowledged.is_empty());
    }

    #[test]
    fn ovmf_gets_what_it_asks_for() {
        let granted = negotiate(&[("tsize", "0"), ("blksize", "1468"), ("windowsize", "4")]);
        assert_eq!(granted.acknowledged, [("tsize", 1000), ("blksize", 1468), ("windowsize", 4)]);
    }

    #[test]
    fn row_6_too_large_wishes_are_clamped_and_bad_ones_left_out() {
        let granted = negotiate(&[("BLKSIZE", "65464"), ("windowsize", "65535")]);
        assert_eq!(granted.acknowledged, [("blksize", 1468), ("windowsize", 64)]);
        for bad in ["0", "-1", "+8", "7", "65465", "99999999999999999999999", "", "abc", "8 "] {
            assert!(negotiate(&[("blksize", bad)]).acknowledged.is_empty(), "{bad:?} was granted");
        }
        assert!(negotiate(&[("windowsize", "0"), ("windowsize", "65536"), ("timeout", "0")]).acknowledged.is_empty());
        assert!(negotiate(&[("timeout", "255"), ("multicast", "1"), ("utimeout", "9")]).acknowledged.is_empty());
    }

    #[test]
    fn row_4_a_window_stays_within_its_octets() {
        let limits = OptionLimits { max_block_bytes: 65464, max_window_blocks: 65535, max_window_bytes: 256 * 1024 };
        let options = vec![(b"blksize".as_slice(), b"65464".as_slice()), (b"windowsize", b"65535")];
        let granted = Negotiated::of(&ReadRequest { name: b"a", octet: true, options }, 0, &limits);
        assert_eq!(granted.acknowledged, [("blksize", 65464), ("windowsize", 4)]);
        assert_eq!(granted.window_blocks, 4);
    }

    #[test]
    fn a_repeated_option_counts_once() {
        assert_eq!(negotiate(&[("blksize", "600"), ("blksize", "700")]).acknowledged, [("blksize", 600)]);
    }
}
