//! How long to wait before trying again: pure arithmetic, and one loop around it. Every wait of the agent is bounded,
//! and says on the console what it waits for.

use crate::console::Chain;
use std::error::Error;
use std::time::Duration;
use tokio::time::Instant;

const FIRST_DELAY: Duration = Duration::from_millis(200);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// Doubling delays with a cap, until a limit of time is used up.
#[derive(Debug, Clone)]
pub struct Backoff {
    limit: Duration,
    next: Duration,
}

impl Backoff {
    /// Tries for `limit`, counted from the first attempt.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self { limit, next: FIRST_DELAY }
    }

    /// The delay before the next attempt, or nothing if `elapsed` leaves no time for one.
    pub fn next_delay(&mut self, elapsed: Duration) -> Option<Duration> {
        let left = self.limit.checked_sub(elapsed).filter(|left| !left.is_zero())?;
        let delay = self.next.min(left);
        self.next = (self.next * 2).min(LONGEST_DELAY);
        Some(delay)
    }
}

/// Doubling delays with a cap and without an end, each shifted at random by up to a quarter, so that nodes that lost
/// their verifier together do not come back together.
#[derive(Debug, Clone)]
pub struct Patience {
    next: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { next: FIRST_DELAY }
    }
}

impl Patience {
    /// The delay before the next attempt; `random` decides where between three and five quarters of it.
    pub fn next_delay(&mut self, random: u16) -> Duration {
        let delay = self.next * 3 / 4 + self.next / 2 * u32::from(random) / u32::from(u16::MAX);
        self.next = (self.next * 2).min(LONGEST_DELAY);
        delay
    }
}

/// Calls `attempt` until it succeeds, fails for good, or `limit` has passed; then its last error is the answer.
///
/// # Errors
/// The last error of `attempt`.
pub async fn retry<T, E: Error + 'static>(
    what: &str,
    limit: Duration,
    is_transient: impl Fn(&E) -> bool,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> Result<T, E> {
    let started = Instant::now();
    let mut backoff = Backoff::new(limit);
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let Some(delay) = backoff.next_delay(started.elapsed()).filter(|_| is_transient(&error)) else {
            return Err(error);
        };
        let left = limit.saturating_sub(started.elapsed()).as_secs();
        tracing::warn!(event = "agent.retrying", "waiting for {what}, up to {left} s more: {}", Chain(&error));
        tokio::time::sleep(delay).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_a_cap_and_stop_at_the_limit() {
        let mut backoff = Backoff::new(Duration::from_secs(60));
        let delays: Vec<_> =
            (0..7).filter_map(|_| backoff.next_delay(Duration::ZERO)).map(|delay| delay.as_millis()).collect();
        assert_eq!(delays, [200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.next_delay(Duration::from_secs(59)), Some(Duration::from_secs(1)));
        assert_eq!(backoff.next_delay(Duration::from_secs(60)), None);
    }

    #[test]
    fn patience_grows_to_a_cap_around_which_it_varies() {
        let mut patience = Patience::default();
        assert_eq!(patience.next_delay(0), Duration::from_millis(150));
        assert_eq!(patience.next_delay(u16::MAX), Duration::from_millis(500));
        for _ in 0..10 {
            patience.next_delay(0);
        }
        assert_eq!(patience.next_delay(0), Duration::from_millis(3750));
        assert_eq!(patience.next_delay(u16::MAX), Duration::from_millis(6250));
    }

    #[derive(Debug, PartialEq, Eq, thiserror::Error)]
    #[error("not yet")]
    struct NotYet;

    #[tokio::test(start_paused = true)]
    async fn retries_what_is_transient_and_nothing_else() {
        let mut calls = 0;
        let result = retry(
            "a test",
            Duration::from_secs(5),
            |_| true,
            async || {
                calls += 1;
                if calls < 3 { Err(NotYet) } else { Ok(calls) }
            },
        )
        .await;
        assert_eq!(result, Ok(3));

        let mut calls = 0;
        let result: Result<(), _> = retry(
            "a test",
            Duration::from_secs(5),
            |_| false,
            async || {
                calls += 1;
                Err(NotYet)
            },
        )
        .await;
        assert_eq!((result, calls), (Err(NotYet), 1));
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_at_the_limit() {
        let started = Instant::now();
        let result: Result<(), _> = retry("a test", Duration::from_secs(9), |_| true, async || Err(NotYet)).await;
        assert_eq!(result, Err(NotYet));
        assert_eq!(started.elapsed(), Duration::from_secs(9));
    }
}
