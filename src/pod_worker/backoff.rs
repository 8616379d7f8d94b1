//! CrashLoopBackOff (contract P-25): 10 s, doubled with every crash up to a cap, forgotten after a long enough run.
//!
//! Pure. The key is the container's identity: a container with another hash starts afresh.

use std::time::Duration;

use tokio::time::Instant;

/// First delay and cap of the crash-loop back-off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackoffLimits {
    pub initial: Duration,
    pub cap: Duration,
}

impl Default for BackoffLimits {
    fn default() -> Self {
        Self { initial: Duration::from_secs(10), cap: Duration::from_secs(300) }
    }
}

/// The back-off of one container.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Backoff {
    entry: Option<Entry>,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    delay: Duration,
    /// When the delay was last advanced: a start was allowed.
    updated: Instant,
    hash: String,
}

impl Backoff {
    /// Until when the container that ended at `finished` has to wait, and the delay it waits; `None` when it may start now.
    pub fn waits_until(
        &self,
        limits: BackoffLimits,
        hash: &str,
        finished: Instant,
        now: Instant,
    ) -> Option<(Instant, Duration)> {
        let entry = self.entry.as_ref().filter(|e| e.hash == hash)?;
        if Self::expired(limits, entry, finished) {
            return None;
        }
        let until = finished + entry.delay;
        (now < until).then_some((until, entry.delay))
    }

    /// A start after an end at `finished` goes ahead: the next one waits longer.
    pub fn advance(&mut self, limits: BackoffLimits, hash: &str, finished: Instant, now: Instant) {
        let delay = match self.entry.as_ref().filter(|e| e.hash == hash && !Self::expired(limits, e, finished)) {
            Some(entry) => (entry.delay * 2).min(limits.cap),
            None => limits.initial.min(limits.cap),
        };
        self.entry = Some(Entry { delay, updated: now, hash: hash.to_owned() });
    }

    /// The container ran for more than twice the cap since its last start.
    fn expired(limits: BackoffLimits, entry: &Entry, finished: Instant) -> bool {
        finished.saturating_duration_since(entry.updated) > limits.cap * 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: BackoffLimits = BackoffLimits { initial: Duration::from_secs(10), cap: Duration::from_secs(300) };

    fn start() -> Instant {
        Instant::now() + Duration::from_secs(100_000)
    }

    #[test]
    fn p25_first_crash_restarts_at_once_then_doubles_to_the_cap() {
        let mut backoff = Backoff::default();
        let mut now = start();
        assert_eq!(backoff.waits_until(LIMITS, "h", now, now), None);
        let mut delays = Vec::new();
        for _ in 0..8 {
            backoff.advance(LIMITS, "h", now, now);
            let finished = now + Duration::from_secs(1);
            let (until, delay) = backoff.waits_until(LIMITS, "h", finished, finished).unwrap();
            assert_eq!(until, finished + delay);
            assert_eq!(backoff.waits_until(LIMITS, "h", finished, until), None);
            delays.push(delay.as_secs());
            now = until;
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300, 300]);
    }

    #[test]
    fn p25_a_run_of_more_than_twice_the_cap_resets() {
        let mut backoff = Backoff::default();
        let now = start();
        backoff.advance(LIMITS, "h", now, now);
        backoff.advance(LIMITS, "h", now, now);
        let finished = now + Duration::from_secs(601);
        assert_eq!(backoff.waits_until(LIMITS, "h", finished, finished), None);
        backoff.advance(LIMITS, "h", finished, finished);
        assert_eq!(backoff.waits_until(LIMITS, "h", finished, finished).unwrap().1.as_secs(), 10);
        let just = now + Duration::from_secs(600);
        let mut kept = Backoff::default();
        kept.advance(LIMITS, "h", now, now);
        assert!(kept.waits_until(LIMITS, "h", just, just).is_some());
    }

    #[test]
    fn p25_another_hash_starts_afresh() {
        let mut backoff = Backoff::default();
        let now = start();
        backoff.advance(LIMITS, "old", now, now);
        assert_eq!(backoff.waits_until(LIMITS, "new", now, now), None);
    }

    #[test]
    fn p25_a_node_cap_below_the_initial_delay_wins() {
        let limits = BackoffLimits { initial: Duration::from_secs(10), cap: Duration::from_secs(3) };
        let mut backoff = Backoff::default();
        let now = start();
        backoff.advance(limits, "h", now, now);
        assert_eq!(backoff.waits_until(limits, "h", now, now).unwrap().1, Duration::from_secs(3));
    }
}
