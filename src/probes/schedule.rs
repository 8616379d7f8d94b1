//! When a probe runs: the first time, and the next. Pure; times in, durations and instants out.

use std::{hash::Hasher, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as corev1;
use tokio::time::Instant;

use super::{ProbeKind, ProbeTarget};

/// The least time between the starts of two readiness runs when the second one was asked for by a turn of the pod's
/// worker. Upstream asks at each generation of the status, which its relist limits to one a second; our turns have no such
/// limit, and a pod that is busy starting must not be hammered.
const ASKED_AGAIN: Duration = Duration::from_secs(1);

/// periodSeconds, 10 when unset (API default, contract B-01).
pub(super) fn period(probe: &corev1::Probe) -> Duration {
    positive_seconds(probe.period_seconds, 10)
}

/// timeoutSeconds, 1 when unset (API default, contract B-01).
pub(super) fn timeout(probe: &corev1::Probe) -> Duration {
    positive_seconds(probe.timeout_seconds, 1)
}

fn positive_seconds(value: Option<i32>, default: u64) -> Duration {
    let seconds = value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default);
    Duration::from_secs(seconds)
}

/// How long the first run has to wait: until startedAt + initialDelaySeconds, and for an adopted container at least the
/// `jitter` part (0..1) of a period, so that a restarted agent does not probe everything at once (contract B-01).
pub(super) fn first_wait(probe: &corev1::Probe, target: &ProbeTarget, wall: Timestamp, jitter: f64) -> Duration {
    let delay = Duration::from_secs(u64::try_from(probe.initial_delay_seconds.unwrap_or(0)).unwrap_or(0));
    // A wall clock that jumped back must not stretch the delay.
    let elapsed = Duration::try_from(wall.duration_since(target.started_at)).unwrap_or(Duration::ZERO);
    let until_delay = delay.saturating_sub(elapsed);
    if target.adopted { until_delay.max(period(probe).mul_f64(jitter.clamp(0.0, 1.0))) } else { until_delay }
}

/// When to run next: one period after the tick of the last run, sooner when `asked` (readiness of a container that is not
/// ready, contract B-01 as corrected for 1.37). May lie in the past: then at once.
pub(super) fn next_run(last_tick: Instant, probe: &corev1::Probe, asked: bool) -> Instant {
    let period = period(probe);
    last_tick + if asked { period.min(ASKED_AGAIN) } else { period }
}

/// The tick that a run belongs to which was `due` and began at `start`. Ticks lie whole periods apart, whatever a run takes and
/// however late it begins: so lateness does not add up, and ticks that passed meanwhile are made up for by one run (contract B-01).
pub(super) fn tick(due: Instant, start: Instant, probe: &corev1::Probe) -> Instant {
    let period = period(probe);
    let late = start.saturating_duration_since(due);
    let passed = u32::try_from(late.as_nanos() / period.as_nanos()).unwrap_or(u32::MAX);
    due + period.saturating_mul(passed)
}

/// The quiet tries between regular runs: 50, 100, 200 ms … apart, up to the period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Eager {
    pause: Duration,
    period: Duration,
}

impl Eager {
    const FIRST: Duration = Duration::from_millis(50);

    pub fn new(probe: &corev1::Probe) -> Self {
        let period = period(probe);
        Self { pause: Self::FIRST.min(period), period }
    }

    /// When to try after a run or try that lasted from `start` to `end`; `None` when the `regular` run comes first. The pause is never
    /// shorter than the last one took, so that a slow container is not kept busy by being asked.
    pub fn next(&mut self, start: Instant, end: Instant, regular: Instant) -> Option<Instant> {
        let at = end + self.pause.max(end - start);
        if at >= regular {
            return None;
        }
        self.pause = (self.pause * 2).min(self.period);
        Some(at)
    }
}

/// A number in 0..1 that is the same for the same container and seed.
pub(super) fn jitter(seed: u64, container_id: &str, kind: ProbeKind) -> f64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write_u64(seed);
    hasher.write(container_id.as_bytes());
    hasher.write(kind.as_str().as_bytes());
    // 53 bits are what a double holds exactly.
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(initial_delay: i32, period: i32) -> corev1::Probe {
        corev1::Probe { initial_delay_seconds: Some(initial_delay), period_seconds: Some(period), ..Default::default() }
    }

    fn target(adopted: bool) -> ProbeTarget {
        ProbeTarget {
            container: "c".into(),
            container_id: "id".into(),
            started_at: Timestamp::from_second(1000).unwrap(),
            host: None,
            adopted,
            was_ready: false,
            was_started: false,
            terminating: false,
        }
    }

    #[test]
    fn b01_first_run_counts_from_started_at() {
        // (initialDelay, wall second, adopted) → wait in milliseconds with jitter 0.5 and period 10
        let cases = [
            (0, 1000, false, 0),
            (5, 1000, false, 5000),
            (5, 1003, false, 2000),
            (5, 1090, false, 0),
            (5, 900, false, 5000), // the clock went back
            (0, 1000, true, 5000),
            (30, 1000, true, 30_000),
            (30, 1029, true, 5000),
        ];
        for (delay, wall, adopted, want) in cases {
            let wall = Timestamp::from_second(wall).unwrap();
            let got = first_wait(&probe(delay, 10), &target(adopted), wall, 0.5);
            assert_eq!(got.as_millis(), want, "delay {delay} wall {wall} adopted {adopted}");
        }
    }

    #[test]
    fn b01_defaults() {
        let unset = corev1::Probe::default();
        assert_eq!((period(&unset).as_secs(), timeout(&unset).as_secs()), (10, 1));
        let zero = corev1::Probe { period_seconds: Some(0), timeout_seconds: Some(-1), ..Default::default() };
        assert_eq!((period(&zero).as_secs(), timeout(&zero).as_secs()), (10, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn b01_next_run_is_a_period_after_the_last_start_or_sooner_when_asked() {
        let start = tokio::time::Instant::now();
        assert_eq!(next_run(start, &probe(0, 10), false), start + Duration::from_secs(10));
        assert_eq!(next_run(start, &probe(0, 10), true), start + Duration::from_secs(1));
        assert_eq!(next_run(start, &probe(0, 1), true), start + Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn b01_ticks_stay_whole_periods_apart() {
        let due = tokio::time::Instant::now();
        for (late, want) in [(0, 0), (1, 0), (1999, 0), (2000, 2000), (5100, 4000)] {
            let got = tick(due, due + Duration::from_millis(late), &probe(0, 2));
            assert_eq!((got - due).as_millis(), want, "late by {late} ms");
        }
        let early = tick(due, due - Duration::from_millis(1), &probe(0, 2));
        assert_eq!(early, due, "a start before it was due counts as due");
    }

    #[tokio::test(start_paused = true)]
    async fn eager_tries_double_their_pause_and_stay_within_the_period() {
        let start = tokio::time::Instant::now();
        let (mut eager, mut at, mut tries) = (Eager::new(&probe(0, 2)), start, Vec::new());
        while let Some(next) = eager.next(at, at, start + Duration::from_secs(2)) {
            tries.push((next - start).as_millis());
            at = next;
        }
        assert_eq!(tries, [50, 150, 350, 750, 1550]);
        let mut slow = Eager::new(&probe(0, 10));
        let ended = start + Duration::from_millis(700);
        let next = slow.next(start, ended, start + Duration::from_secs(10));
        assert_eq!(next, Some(ended + Duration::from_millis(700)), "not sooner than the last try took");
    }

    #[test]
    fn jitter_is_stable_and_spread() {
        let of = |i: usize| jitter(7, &format!("container-{i}"), ProbeKind::Readiness);
        assert_eq!(of(1).to_bits(), of(1).to_bits());
        assert_ne!(jitter(7, "a", ProbeKind::Liveness).to_bits(), jitter(8, "a", ProbeKind::Liveness).to_bits());
        let mean = (0..500).map(of).inspect(|j| assert!((0.0..1.0).contains(j))).sum::<f64>() / 500.0;
        assert!((0.4..0.6).contains(&mean), "{mean}");
    }
}
