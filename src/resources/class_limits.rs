//! What the QoS classes get from the pods in them (contract ): shares, memory protection, memory reserved from lower classes. Pure.

use super::{
    cgroup_fs::Limits,
    pod_resources::PodSize,
    qos::{QosClass, cpu_shares, qos_class},
};
use crate::pods::Pod;

/// What a pod with a cgroup adds to its class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    class: QosClass,
    /// Millicores.
    cpu: i64,
    /// Bytes.
    memory: i64,
}

impl Held {
    /// A pod without requests adds nothing.
    pub(super) fn of(pod: &Pod) -> Option<Self> {
        let (class, size) = (qos_class(pod), PodSize::of(pod));
        let held = Self { class, cpu: size.cpu_request, memory: size.memory_request };
        (class != QosClass::BestEffort).then_some(held)
    }
    pub(super) fn burstable(&self) -> bool {
        self.class == QosClass::Burstable
    }
}

/// What decides besides the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct ClassPolicy {
    /// MemoryQoS with `TieredReservation`, on version 2.
    pub tiered_memory: bool,
    /// `qosReserved: {memory: n%}`.
    pub reserved_memory_percent: Option<i64>,
    /// Bytes that pods may use; 0: not known, then nothing is reserved.
    pub allocatable_memory: i64,
}

/// Limits of kubepods itself and of the two lower classes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ClassLimits {
    pub root: Limits,
    pub burstable: Limits,
    pub best_effort: Limits,
}

pub(super) fn class_limits<'a>(pods: impl Iterator<Item = &'a Held>, policy: &ClassPolicy) -> ClassLimits {
    let (mut cpu, mut burstable, mut guaranteed) = (0_i64, 0_i64, 0_i64);
    for held in pods {
        if held.burstable() {
            cpu = cpu.saturating_add(held.cpu);
            burstable = burstable.saturating_add(held.memory);
        } else {
            guaranteed = guaranteed.saturating_add(held.memory);
        }
    }
    let mut limits = ClassLimits::default();
    limits.burstable.cpu_shares = Some(cpu_shares(cpu));
    if policy.tiered_memory {
        limits.root.memory_min = Some(guaranteed.saturating_add(burstable));
        limits.root.memory_low = Some(burstable);
        limits.burstable.memory_low = Some(burstable);
    }
    if let Some(percent) = policy.reserved_memory_percent.filter(|_| policy.allocatable_memory > 0) {
        let kept = |requests: i64| requests.saturating_mul(percent) / 100;
        let left = policy.allocatable_memory - kept(guaranteed);
        limits.burstable.memory_bytes = Some(left);
        limits.best_effort.memory_bytes = Some(left - kept(burstable));
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r03_r12_classes_follow_their_pods() {
        let pods = [
            Held { class: QosClass::Burstable, cpu: 250, memory: 100 },
            Held { class: QosClass::Burstable, cpu: 250, memory: 300 },
            Held { class: QosClass::Guaranteed, cpu: 1000, memory: 1000 },
        ];
        let plain = class_limits(pods.iter(), &ClassPolicy::default());
        let shares = Limits { cpu_shares: Some(512), ..Limits::default() };
        assert_eq!(plain, ClassLimits { burstable: shares, ..ClassLimits::default() });
        let policy = ClassPolicy { tiered_memory: true, reserved_memory_percent: Some(50), allocatable_memory: 10_000 };
        let all = class_limits(pods.iter(), &policy);
        assert_eq!((all.root.memory_min, all.root.memory_low), (Some(1400), Some(400)));
        assert_eq!((all.burstable.memory_low, all.burstable.memory_bytes), (Some(400), Some(9500)));
        assert_eq!(all.best_effort, Limits { memory_bytes: Some(9300), ..Limits::default() });
        let unknown = class_limits(pods.iter(), &ClassPolicy { allocatable_memory: 0, ..policy });
        assert_eq!(unknown.best_effort, Limits::default());
    }
}
