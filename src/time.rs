//! Time as an argument: the pair of clocks a decision needs, and the one place that reads them.
//!
//! Everything that decides takes a [`Now`]; only the shell asks a [`Clock`]. The monotonic half is tokio's, so that
//! paused time in tests moves back-off, deadlines and grace periods together. `clippy.toml` bans the clock calls elsewhere.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::time::Instant;

/// One reading of both clocks, taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// For durations: back-off, deadlines, grace. Never goes back.
    pub mono: Instant,
    /// For the API and for comparing with times that the runtime or the API wrote. May jump.
    pub wall: Timestamp,
}

impl Now {
    /// The wall time as the API keeps it: whole seconds. Truncated when made, or a PATCH never converges.
    pub fn api_time(&self) -> Time {
        api_time(self.wall)
    }
}

/// Truncates to whole seconds (contract P-44).
pub fn api_time(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// Nanoseconds since the epoch, as CRI writes its times; 0 or below means "not set".
pub fn from_cri_nanos(nanos: i64) -> Option<Timestamp> {
    (nanos > 0).then(|| Timestamp::from_nanosecond(i128::from(nanos)).ok()).flatten()
}

/// Where the shell gets its [`Now`].
pub trait Clock: Send + Sync + 'static {
    fn now(&self) -> Now;
}

/// The machine's clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods)]
    fn now(&self) -> Now {
        Now { mono: Instant::now(), wall: Timestamp::now() }
    }
}

/// A wall clock that follows tokio's (paused) time from a fixed start: for tests and simulations.
#[derive(Debug, Clone, Copy)]
pub struct SimulatedClock {
    start: Instant,
    epoch: Timestamp,
}

impl SimulatedClock {
    pub fn starting_at(epoch: Timestamp) -> Self {
        Self { start: Instant::now(), epoch }
    }
}

impl Clock for SimulatedClock {
    fn now(&self) -> Now {
        let mono = Instant::now();
        let elapsed: Duration = mono - self.start;
        Now { mono, wall: self.epoch.checked_add(elapsed).unwrap_or(self.epoch) }
    }
}
