//! A token bucket for requests: `qps` on average, `burst` at once, first come first served.
//!
//! In: a moment. Out: how long to wait. A reservation may take tokens that will exist only later, so that waiting
//! requests keep their order. A waiter that gives up does not return its token.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::time::{Clock, SystemClock};

/// The contract's client limits (S-11): `kubeAPIQPS`/`kubeAPIBurst`, `eventRecordQPS`/`eventBurst`.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    qps: f64,
    burst: f64,
    level: Mutex<Option<(Instant, f64)>>,
}

impl RateLimiter {
    /// `None`, hence no limit, when `qps` is 0 or below.
    pub(crate) fn new(qps: f64, burst: u32) -> Option<Self> {
        (qps > 0.0).then(|| Self { qps, burst: f64::from(burst.max(1)), level: Mutex::new(None) })
    }

    /// Takes one token and says how long its owner has to wait.
    fn reserve(&self, now: Instant) -> Duration {
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = match *level {
            None => self.burst,
            Some((at, tokens)) => (tokens + now.saturating_duration_since(at).as_secs_f64() * self.qps).min(self.burst),
        } - 1.0;
        *level = Some((now, tokens));
        if tokens >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-tokens / self.qps) }
    }

    pub(crate) async fn acquire(&self) {
        let wait = self.reserve(SystemClock.now().mono);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

/// Doubling back-off with jitter for requests that will be tried again.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    first: Duration,
    cap: Duration,
}

impl Backoff {
    /// 200 ms, 400 ms, … 30 s, each ± 50 %.
    pub(crate) fn new() -> Self {
        Self::between(Duration::from_millis(200), Duration::from_secs(30))
    }

    pub(crate) fn between(first: Duration, cap: Duration) -> Self {
        Self { next: first, first, cap }
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }

    /// The next delay. `at_least`: what the apiserver asked for (`Retry-After`).
    pub(crate) fn delay(&mut self, at_least: Option<Duration>) -> Duration {
        let base = self.next;
        self.next = (self.next * 2).min(self.cap);
        base.mul_f64(rand::random_range(0.5..1.5)).max(at_least.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn s11_burst_passes_at_once_then_the_rate_holds_in_order() {
        let limiter = RateLimiter::new(10.0, 3).unwrap();
        let start = SystemClock.now().mono;
        for _ in 0..3 {
            limiter.acquire().await;
        }
        assert_eq!(SystemClock.now().mono - start, Duration::ZERO);
        for _ in 0..5 {
            limiter.acquire().await;
        }
        let took = SystemClock.now().mono - start;
        assert!(took >= Duration::from_millis(490) && took <= Duration::from_millis(520), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_never_saves_more_than_the_burst() {
        let limiter = RateLimiter::new(100.0, 2).unwrap();
        limiter.acquire().await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let now = SystemClock.now().mono;
        assert_eq!(limiter.reserve(now), Duration::ZERO);
        assert_eq!(limiter.reserve(now), Duration::ZERO);
        assert!(limiter.reserve(now) > Duration::ZERO);
    }

    #[test]
    fn zero_qps_means_no_limit() {
        assert!(RateLimiter::new(0.0, 5).is_none());
    }

    #[test]
    fn backoff_doubles_to_its_cap_and_starts_over() {
        let mut backoff = Backoff::between(Duration::from_secs(1), Duration::from_secs(4));
        for base in [1.0, 2.0, 4.0, 4.0] {
            let delay = backoff.delay(None).as_secs_f64();
            assert!((base * 0.5..base * 1.5).contains(&delay), "{delay} around {base}");
        }
        backoff.reset();
        assert!(backoff.delay(None) < Duration::from_secs(2));
        assert_eq!(backoff.delay(Some(Duration::from_secs(60))), Duration::from_secs(60));
    }
}
