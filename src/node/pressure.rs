//! The pressure conditions that follow from the eviction thresholds (contract N-16, R-21). Pure.
//!
//! In: the configuration's thresholds, and observed signals with the time. Out: which of memory, disk and PID pressure holds. A condition
//! holds from the first crossing until nothing has crossed for the transition period, so that it does not flap; a threshold that was met
//! is left only above its value plus its minimum reclaim.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;

use crate::config::{Signal, Threshold};

/// The three pressure conditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pressure {
    Memory,
    Disk,
    Pid,
}

impl Pressure {
    /// The type of the Node's condition.
    pub fn condition(self) -> &'static str {
        match self {
            Self::Memory => "MemoryPressure",
            Self::Disk => "DiskPressure",
            Self::Pid => "PIDPressure",
        }
    }

    fn of(signal: Signal) -> Self {
        match signal {
            Signal::MemoryAvailable | Signal::AllocatableMemoryAvailable => Self::Memory,
            Signal::PidAvailable => Self::Pid,
            _ => Self::Disk,
        }
    }
}

/// The thresholds, and for each hard one on memory the same on the kubepods cgroup: with `pods` in `enforceNodeAllocatable`.
pub fn with_kubepods(thresholds: &[Threshold]) -> Vec<Threshold> {
    let hard = thresholds.iter().filter(|t| t.signal == Signal::MemoryAvailable && t.grace_period.is_none());
    let kubepods = hard.map(|t| Threshold { signal: Signal::AllocatableMemoryAvailable, ..*t });
    thresholds.iter().copied().chain(kubepods).collect()
}

fn met(threshold: &Threshold, observed: &Observation, leaving: bool) -> bool {
    let reclaim = threshold.min_reclaim.filter(|_| leaving).map_or(0, |r| r.of(observed.capacity));
    observed.available < threshold.value.of(observed.capacity).saturating_add(reclaim)
}

/// One signal as it was read. Bytes, inodes or pids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    pub available: i64,
    pub capacity: i64,
}

/// What was read at one time. A signal that could not be read is missing and changes nothing.
pub type Observations = BTreeMap<Signal, Observation>;

/// Remembers which thresholds are met and when each pressure was last seen.
#[derive(Debug, Clone, Default)]
pub struct PressureState {
    /// Indices into the thresholds.
    met: BTreeSet<usize>,
    last_seen: BTreeMap<Pressure, Instant>,
}

impl PressureState {
    /// Takes one reading into account and returns the pressures that hold now. `transition` is
    /// `evictionPressureTransitionPeriod`.
    pub fn observe(
        &mut self,
        thresholds: &[Threshold],
        observations: &Observations,
        transition: Duration,
        now: Instant,
    ) -> BTreeSet<Pressure> {
        let met = thresholds.iter().enumerate().filter(|(index, threshold)| {
            let was_met = self.met.contains(index);
            observations.get(&threshold.signal).is_some_and(|o| met(threshold, o, was_met))
        });
        self.met = met.map(|(index, _)| index).collect();
        for threshold in self.met.iter().filter_map(|index| thresholds.get(*index)) {
            self.last_seen.insert(Pressure::of(threshold.signal), now);
        }
        self.last_seen.retain(|_, seen| now.saturating_duration_since(*seen) < transition || *seen == now);
        self.last_seen.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(hard: &[(&str, &str)], reclaim: &[(&str, &str)]) -> Vec<Threshold> {
        let texts = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let none = BTreeMap::new();
        crate::config::parse_thresholds(&texts(hard), &none, &none, &texts(reclaim)).unwrap()
    }

    fn defaults() -> Vec<Threshold> {
        let hard = [
            ("memory.available", "100Mi"),
            ("nodefs.available", "10%"),
            ("nodefs.inodesFree", "5%"),
            ("imagefs.available", "15%"),
            ("imagefs.inodesFree", "5%"),
            ("pid.available", "10%"),
        ];
        parse(&hard, &[])
    }

    fn seen(signal: Signal, available: i64, capacity: i64) -> Observations {
        [(signal, Observation { available, capacity })].into()
    }

    const PERIOD: Duration = Duration::from_secs(300);

    #[tokio::test]
    async fn n16_each_signal_raises_its_condition_and_lets_it_go() {
        let cases = [
            (Signal::MemoryAvailable, (100 << 20) - 1, 100 << 20, 1 << 34, Pressure::Memory),
            (Signal::NodeFsAvailable, 99, 100, 1000, Pressure::Disk),
            (Signal::NodeFsInodesFree, 49, 50, 1000, Pressure::Disk),
            (Signal::ImageFsAvailable, 149, 150, 1000, Pressure::Disk),
            (Signal::ImageFsInodesFree, 49, 50, 1000, Pressure::Disk),
            (Signal::PidAvailable, 99, 100, 1000, Pressure::Pid),
        ];
        for (signal, below, at, capacity, pressure) in cases {
            let mut state = PressureState::default();
            let start = Instant::now();
            let mut at_time = |available, now| {
                state.observe(&defaults(), &seen(signal, available, capacity), PERIOD, now).contains(&pressure)
            };
            assert!(!at_time(at, start), "{signal:?} at its threshold is enough");
            assert!(at_time(below, start), "{signal:?} below");
            assert!(at_time(at, start + Duration::from_secs(299)), "{signal:?} holds for the transition period");
            assert!(!at_time(at, start + PERIOD), "{signal:?} lets go");
        }
    }

    #[tokio::test]
    async fn n16_a_new_crossing_starts_the_period_again() {
        let mut state = PressureState::default();
        let start = Instant::now();
        let mut at_time = |available, seconds| {
            let now = start + Duration::from_secs(seconds);
            !state.observe(&defaults(), &seen(Signal::MemoryAvailable, available, 1 << 34), PERIOD, now).is_empty()
        };
        assert!(at_time(0, 0));
        assert!(at_time(0, 200));
        assert!(at_time(1 << 30, 499));
        assert!(!at_time(1 << 30, 500));
    }

    #[tokio::test]
    async fn r21_minimum_reclaim_holds_a_met_threshold() {
        let thresholds = parse(&[("nodefs.available", "100")], &[("nodefs.available", "50")]);
        let mut state = PressureState::default();
        let now = Instant::now();
        let mut holds = |available| {
            let observed = seen(Signal::NodeFsAvailable, available, 1000);
            !state
                .observe(&thresholds, &observed, Duration::ZERO, now + Duration::from_secs(1000 - available as u64))
                .is_empty()
        };
        assert!(!holds(149), "not met, so only the value counts");
        assert!(holds(99));
        assert!(holds(149), "met, so value plus reclaim counts");
        assert!(!holds(150));
    }

    #[test]
    fn n16_a_signal_that_cannot_be_read_raises_nothing() {
        let pressures = PressureState::default().observe(&defaults(), &Observations::new(), PERIOD, Instant::now());
        assert!(pressures.is_empty());
    }

    #[test]
    fn r20_hard_memory_also_holds_for_kubepods() {
        let all = with_kubepods(&parse(&[("memory.available", "100Mi"), ("pid.available", "10%")], &[]));
        let signals: Vec<Signal> = all.iter().map(|t| t.signal).collect();
        assert_eq!(signals, [Signal::MemoryAvailable, Signal::PidAvailable, Signal::AllocatableMemoryAvailable]);
    }
}
