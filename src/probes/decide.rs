//! What probe results amount to: counting towards the thresholds, and the verdict that a threshold decides. Pure.

use k8s_openapi::api::core::v1 as corev1;

use super::{ContainerVerdicts, Liveness, ProbeTarget, Readiness, Startup};

/// Which of a container's three probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProbeKind {
    Liveness,
    Readiness,
    Startup,
}

impl ProbeKind {
    pub const ALL: [Self; 3] = [Self::Startup, Self::Readiness, Self::Liveness];

    /// The first word of an event's message and the label `probe_type` (contract B-07, B-11).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
            Self::Startup => "Startup",
        }
    }

    pub fn of(self, container: &corev1::Container) -> Option<&corev1::Probe> {
        match self {
            Self::Liveness => container.liveness_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
            Self::Startup => container.startup_probe.as_ref(),
        }
    }
}

/// Equal results in a row, for one container ID.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    last: Option<bool>,
    run: u32,
}

impl Tally {
    /// Counts one result. `true` when the result has now been seen often enough to decide (successThreshold or
    /// failureThreshold; API defaults 1 and 3, contract B-01).
    pub fn reaches(&mut self, passed: bool, probe: &corev1::Probe) -> bool {
        if self.last == Some(passed) {
            self.run = self.run.saturating_add(1);
        } else {
            (self.last, self.run) = (Some(passed), 1);
        }
        let threshold =
            if passed { probe.success_threshold.unwrap_or(1) } else { probe.failure_threshold.unwrap_or(3) };
        i64::from(self.run) >= i64::from(threshold)
    }
}

/// What a decided result did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Effect {
    /// A verdict is another one than before: the pod's worker must look.
    pub changed: bool,
    /// This probe is done until there is a new container ID (contract B-02).
    pub on_hold: bool,
}

/// Writes a decided result into the verdicts.
pub(super) fn settle(kind: ProbeKind, passed: bool, probe: &corev1::Probe, verdicts: &mut ContainerVerdicts) -> Effect {
    let grace_seconds = probe.termination_grace_period_seconds;
    let (changed, on_hold) = match kind {
        ProbeKind::Liveness => {
            let next = if passed { Liveness::Alive } else { Liveness::Dead { grace_seconds } };
            (std::mem::replace(&mut verdicts.liveness, next) != next, !passed)
        }
        ProbeKind::Readiness => {
            let next = if passed { Readiness::Ready } else { Readiness::NotReady };
            (std::mem::replace(&mut verdicts.readiness, next) != next, false)
        }
        ProbeKind::Startup => {
            let next = if passed { Startup::Started } else { Startup::Failed { grace_seconds } };
            (std::mem::replace(&mut verdicts.startup, next) != next, true)
        }
    };
    Effect { changed, on_hold }
}

/// Verdicts before the first result (contract B-02); an adopted container keeps what the API said (B-10).
pub(super) fn initial(container: Option<&corev1::Container>, target: &ProbeTarget) -> ContainerVerdicts {
    let has = |kind: ProbeKind| container.is_some_and(|c| kind.of(c).is_some());
    let ready = !has(ProbeKind::Readiness) || (target.adopted && target.was_ready);
    let started = !has(ProbeKind::Startup) || target.terminating || (target.adopted && target.was_started);
    ContainerVerdicts {
        container_id: target.container_id.clone(),
        liveness: Liveness::Alive,
        readiness: if ready { Readiness::Ready } else { Readiness::NotReady },
        startup: if started { Startup::Started } else { Startup::Pending },
    }
}

/// The pod began to terminate: liveness and startup stop and let through, readiness goes on (contract B-02).
/// `true` when that changed a verdict.
pub(super) fn quiet_for_termination(verdicts: &mut ContainerVerdicts) -> bool {
    let before = (verdicts.liveness, verdicts.startup);
    (verdicts.liveness, verdicts.startup) = (Liveness::Alive, Startup::Started);
    before != (verdicts.liveness, verdicts.startup)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(success: i32, failure: i32) -> corev1::Probe {
        corev1::Probe {
            success_threshold: Some(success),
            failure_threshold: Some(failure),
            termination_grace_period_seconds: Some(7),
            ..Default::default()
        }
    }

    fn target(adopted: bool) -> ProbeTarget {
        ProbeTarget {
            container: "c".into(),
            container_id: "id".into(),
            started_at: jiff::Timestamp::UNIX_EPOCH,
            host: None,
            adopted,
            was_ready: true,
            was_started: true,
            terminating: false,
        }
    }

    fn with_all_probes() -> corev1::Container {
        corev1::Container {
            liveness_probe: Some(probe(1, 3)),
            readiness_probe: Some(probe(1, 3)),
            startup_probe: Some(probe(1, 3)),
            ..Default::default()
        }
    }

    #[test]
    fn b01_thresholds_count_equal_results_in_a_row() {
        let cases: [(&corev1::Probe, &[bool], &[bool]); 4] = [
            (&probe(1, 3), &[false, false, false, false], &[false, false, true, true]),
            (&probe(1, 3), &[false, false, true, false, false, false], &[false, false, true, false, false, true]),
            (&probe(2, 1), &[true, true, false, true, true], &[false, true, true, false, true]),
            (&corev1::Probe::default(), &[true, false, false, false], &[true, false, false, true]),
        ];
        for (probe, results, decided) in cases {
            let mut tally = Tally::default();
            let got: Vec<bool> = results.iter().map(|r| tally.reaches(*r, probe)).collect();
            assert_eq!(got, decided, "{results:?}");
        }
    }

    #[test]
    fn b02_initial_values() {
        let with = initial(Some(&with_all_probes()), &target(false));
        assert_eq!(
            (with.liveness, with.readiness, with.startup),
            (Liveness::Alive, Readiness::NotReady, Startup::Pending)
        );
        let without = initial(Some(&corev1::Container::default()), &target(false));
        assert_eq!((without.readiness, without.startup), (Readiness::Ready, Startup::Started));
    }

    #[test]
    fn b10_adopted_container_keeps_what_the_api_said() {
        let kept = initial(Some(&with_all_probes()), &target(true));
        assert_eq!((kept.readiness, kept.startup), (Readiness::Ready, Startup::Started));
        let mut unready = target(true);
        (unready.was_ready, unready.was_started) = (false, false);
        let lost = initial(Some(&with_all_probes()), &unready);
        assert_eq!((lost.readiness, lost.startup), (Readiness::NotReady, Startup::Pending));
    }

    #[test]
    fn b02_liveness_failure_holds_and_readiness_never_does() {
        let mut verdicts = initial(Some(&with_all_probes()), &target(false));
        let p = probe(1, 3);
        assert_eq!(
            settle(ProbeKind::Liveness, true, &p, &mut verdicts),
            Effect { changed: false, on_hold: false },
            "passing liveness changes nothing"
        );
        assert_eq!(settle(ProbeKind::Liveness, false, &p, &mut verdicts), Effect { changed: true, on_hold: true });
        assert_eq!(verdicts.liveness, Liveness::Dead { grace_seconds: Some(7) });
        assert_eq!(settle(ProbeKind::Readiness, true, &p, &mut verdicts), Effect { changed: true, on_hold: false });
        assert_eq!(settle(ProbeKind::Readiness, true, &p, &mut verdicts), Effect { changed: false, on_hold: false });
        assert_eq!(settle(ProbeKind::Startup, true, &p, &mut verdicts), Effect { changed: true, on_hold: true });
        assert_eq!(verdicts.startup, Startup::Started);
    }

    #[test]
    fn b09_startup_failure_carries_its_own_grace() {
        let mut verdicts = initial(Some(&with_all_probes()), &target(false));
        settle(ProbeKind::Startup, false, &probe(1, 1), &mut verdicts);
        assert_eq!(verdicts.startup, Startup::Failed { grace_seconds: Some(7) });
        assert!(quiet_for_termination(&mut verdicts));
        assert_eq!(verdicts.startup, Startup::Started);
    }
}
