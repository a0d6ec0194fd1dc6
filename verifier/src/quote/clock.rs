//! The TPM's clock and counters, from one quote to the next.
//!
//! Two checks. [`check_clock`] is what no policy may loosen: counters never go back, nor does the clock between two
//! resets, and the TPM's firmware stays what it was. [`ClockRule`] is what a policy may loosen by name, because TPMs
//! differ in it: whether the clock may have fallen back over a reset, and whether it must say that it is safe.

use serde::{Deserialize, Serialize};

/// `TPMS_CLOCK_INFO` and the TPM's firmware version: what is compared from one quote to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockInfo {
    /// Milliseconds that the TPM has been powered, over its life.
    pub clock_ms: u64,
    /// TPM resets.
    pub reset_count: u32,
    /// TPM restarts since the last reset.
    pub restart_count: u32,
    /// Whether `clock_ms` is certain never to have been reported higher.
    pub safe: bool,
    /// The TPM's firmware.
    pub firmware_version: u64,
}

/// What happened between two quotes of one TPM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockChange {
    /// There was no earlier one.
    First,
    /// The machine has not been reset.
    SameBoot,
    /// The machine was reset or restarted.
    Reset,
}

/// What cannot have happened between two quotes of one TPM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClockError {
    /// A counter went back: an old quote, or another TPM.
    #[error("TPM {counter} went back from {before} to {now}")]
    WentBack {
        /// Which counter.
        counter: &'static str,
        /// Its last value.
        before: u64,
        /// Its value now.
        now: u64,
    },
    /// The TPM's firmware is another: an operator must know of it.
    #[error("TPM firmware version changed from {before:#x} to {now:#x}")]
    Firmware {
        /// The last one.
        before: u64,
        /// This one.
        now: u64,
    },
}

/// Compares the clock of a verified quote with that of the last one of the same TPM.
///
/// # Errors
/// What cannot be: counters going back, another firmware.
pub fn check_clock(previous: Option<&ClockInfo>, now: &ClockInfo) -> Result<ClockChange, ClockError> {
    let Some(before) = previous else { return Ok(ClockChange::First) };
    if before.firmware_version != now.firmware_version {
        return Err(ClockError::Firmware { before: before.firmware_version, now: now.firmware_version });
    }
    let forward = |counter, before: u64, now: u64| match now < before {
        true => Err(ClockError::WentBack { counter, before, now }),
        false => Ok(()),
    };
    forward("reset count", before.reset_count.into(), now.reset_count.into())?;
    if before.reset_count != now.reset_count {
        return Ok(ClockChange::Reset);
    }
    forward("restart count", before.restart_count.into(), now.restart_count.into())?;
    forward("clock", before.clock_ms, now.clock_ms)?;
    Ok(if before.restart_count == now.restart_count { ClockChange::SameBoot } else { ClockChange::Reset })
}

/// By how much the clock fell back over a reset: what [`check_clock`] leaves to [`ClockRule`].
#[must_use]
pub fn fell_back_ms(previous: Option<&ClockInfo>, now: &ClockInfo) -> Option<u64> {
    let before = previous?;
    let fell = before.clock_ms.checked_sub(now.clock_ms)?;
    (fell > 0 && before.reset_count != now.reset_count).then_some(fell)
}

/// What a policy wants of TPMs' clocks, its table `[clock]`. By default everything; who wants less says why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClockRule {
    /// How clocks are compared.
    pub compare: ClockCompare,
    /// Why less than everything is wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether a clock that the TPM calls unsafe is refused. A TPM that lost power without `TPM2_Shutdown`, as by a
    /// BMC, says so until its clock has passed a value that it stored: for up to 70 minutes (Part 1, 36.3.2).
    pub require_safe: bool,
}

/// How a policy wants TPMs' clocks to be compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClockCompare {
    /// A clock that calls itself safe never goes back.
    #[default]
    Strict,
    /// Only between two resets; over a reset it is the reset count alone that tells old from new.
    WithinReset,
}

impl Default for ClockRule {
    fn default() -> Self {
        Self { compare: ClockCompare::Strict, reason: None, require_safe: true }
    }
}

impl ClockRule {
    /// Whether nothing is loosened.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether something is loosened without a word of why.
    #[must_use]
    pub fn lacks_reason(&self) -> bool {
        let loosened = self.compare != ClockCompare::Strict || !self.require_safe;
        loosened && self.reason.as_ref().is_none_or(|reason| reason.trim().is_empty())
    }

    /// What is wrong with a quote's clock, which fell back over a reset by so much.
    #[must_use]
    pub fn problems(&self, clock: &ClockInfo, fell_back_ms: Option<u64>) -> Vec<String> {
        let mut problems = Vec::new();
        if self.require_safe && !clock.safe {
            problems.push(UNSAFE.to_owned());
        }
        match (self.compare, fell_back_ms) {
            // A clock that is not safe says itself that it may have fallen back: that is the other rule's to judge.
            (ClockCompare::Strict, Some(fell)) if clock.safe => problems.push(format!(
                "the TPM's clock fell back by {fell} ms over a reset, although the TPM calls it safe: a policy may \
                 tolerate that with [clock] compare = \"within-reset\""
            )),
            (ClockCompare::Strict | ClockCompare::WithinReset, _) => {}
        }
        problems
    }
}

const UNSAFE: &str = "the TPM's clock is not safe: the machine lost power, and its clock may have gone back; boot again \
     when it has run for 70 minutes, or have the policy say [clock] require_safe = false";

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: ClockInfo =
        ClockInfo { clock_ms: 1000, reset_count: 5, restart_count: 2, safe: true, firmware_version: 7 };

    #[test]
    fn a14_counters_never_go_back() {
        let check = |now: ClockInfo| check_clock(Some(&CLOCK), &now);
        assert_eq!(check_clock(None, &CLOCK), Ok(ClockChange::First));
        assert_eq!(check(CLOCK), Ok(ClockChange::SameBoot));
        assert_eq!(check(ClockInfo { restart_count: 3, ..CLOCK }), Ok(ClockChange::Reset));
        assert_eq!(
            check(ClockInfo { reset_count: 6, restart_count: 0, clock_ms: 1001, ..CLOCK }),
            Ok(ClockChange::Reset)
        );
        for (now, counter) in [
            (ClockInfo { reset_count: 4, clock_ms: 9999, ..CLOCK }, "reset count"),
            (ClockInfo { restart_count: 1, clock_ms: 9999, ..CLOCK }, "restart count"),
            (ClockInfo { clock_ms: 999, ..CLOCK }, "clock"),
            (ClockInfo { clock_ms: 999, safe: false, ..CLOCK }, "clock"),
        ] {
            let error = check(now).unwrap_err();
            assert!(matches!(error, ClockError::WentBack { counter: c, .. } if c == counter), "{error}");
        }
        assert_eq!(check(ClockInfo { firmware_version: 8, ..CLOCK }), Err(ClockError::Firmware { before: 7, now: 8 }));
    }

    #[test]
    fn a14_a_safe_clock_that_fell_back_over_a_reset_is_refused_unless_a_policy_says_otherwise() {
        let strict = ClockRule::default();
        let loose =
            ClockRule { compare: ClockCompare::WithinReset, reason: Some("swtpm".to_owned()), ..ClockRule::default() };
        let after = ClockInfo { reset_count: 6, clock_ms: 400, ..CLOCK };
        assert_eq!(check_clock(Some(&CLOCK), &after), Ok(ClockChange::Reset));
        let fell = fell_back_ms(Some(&CLOCK), &after);
        assert_eq!(fell, Some(600));
        assert!(strict.problems(&after, fell)[0].contains("fell back by 600 ms"));
        assert_eq!(loose.problems(&after, fell), [""; 0]);
        for same in [CLOCK, ClockInfo { reset_count: 6, clock_ms: 1000, ..CLOCK }] {
            assert_eq!(fell_back_ms(Some(&CLOCK), &same), None);
        }
        assert_eq!(fell_back_ms(None, &after), None);
    }

    #[test]
    fn a14_an_unsafe_clock_is_refused_unless_a_policy_says_otherwise_and_why() {
        let cut = ClockInfo { reset_count: 6, clock_ms: 400, safe: false, ..CLOCK };
        let fell = fell_back_ms(Some(&CLOCK), &cut);
        assert_eq!(ClockRule::default().problems(&cut, fell), [UNSAFE]);
        let mut loose = ClockRule { require_safe: false, ..ClockRule::default() };
        assert_eq!(loose.problems(&cut, fell), [""; 0]);
        assert!(loose.lacks_reason() && !ClockRule::default().lacks_reason());
        loose.reason = Some(" ".to_owned());
        assert!(loose.lacks_reason());
        loose.reason = Some("the BMC cuts the power before each lease".to_owned());
        assert!(!loose.lacks_reason());
    }
}
