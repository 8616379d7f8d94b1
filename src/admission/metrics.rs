//! What admission counts, under upstream's names (appendix D.1).

use prometheus::{Error, IntCounterVec, Opts, Registry};

use super::Rejection;
use crate::{
    pods::Pod,
    resources::{pod_level_set, qos_class},
};

/// Reasons that the metric tells apart; all others are counted together.
const TOLD_APART: [&str; 19] = [
    "AppArmor",
    "PodOSSelectorNodeLabelDoesNotMatch",
    "PodOSNotSupported",
    "InvalidNodeInfo",
    "InitContainerRestartPolicyForbidden",
    "SupplementalGroupsPolicyNotSupported",
    "UnexpectedAdmissionError",
    "UnknownReason",
    "UnexpectedPredicateFailureType",
    "OutOfcpu",
    "OutOfmemory",
    "OutOfephemeral-storage",
    "OutOfpods",
    "PodLevelResourcesNotSupported",
    "PodFeatureUnsupported",
    "Evicted",
    "SysctlForbidden",
    "TopologyAffinityError",
    "NodeShutdown",
];

/// Make it once and share it.
#[derive(Debug, Clone)]
pub struct AdmissionMetrics {
    rejections: IntCounterVec,
    preemptions: IntCounterVec,
    pod_level: IntCounterVec,
}

impl AdmissionMetrics {
    /// Registers everything; fails only if a name is taken.
    pub fn new(registry: &Registry) -> Result<Self, Error> {
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let counter = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, Error>(counter)
        };
        Ok(Self {
            rejections: counter(
                "kubelet_admission_rejections_total",
                "[ALPHA] Cumulative number pod admission rejections by the Kubelet.",
                &["reason"],
            )?,
            preemptions: counter(
                "kubelet_preemptions",
                "[ALPHA] Cumulative number of pod preemptions by preemption resource",
                &["preemption_signal"],
            )?,
            pod_level: counter(
                "kubelet_pod_level_resources_admission_total",
                "[ALPHA] Total number of pods admitted during Kubelet admission, categorized by resource configuration mode \
                 (pod_and_container_level, pod_level, container_level, or empty for unconfigured/BestEffort) and QoS class.",
                &["config_mode", "qos_class"],
            )?,
        })
    }

    pub(super) fn rejected(&self, rejection: &Rejection) {
        let reason = match rejection.reason.as_str() {
            known if TOLD_APART.contains(&known) => known,
            extended if extended.starts_with("OutOf") => "OutOfExtendedResources",
            _ => "Other",
        };
        self.rejections.with_label_values(&[reason]).inc();
    }

    pub(super) fn preempted(&self, signal: &str) {
        self.preemptions.with_label_values(&[signal]).inc();
    }

    pub(super) fn admitted(&self, pod: &Pod) {
        let spec = pod.spec();
        let mut containers = spec.init_containers.iter().flatten().chain(&spec.containers);
        let in_containers = containers.any(|c| {
            let resources = c.resources.as_ref();
            resources.is_some_and(|r| r.requests.iter().chain(&r.limits).any(|list| !list.is_empty()))
        });
        let mode = match (pod_level_set(pod), in_containers) {
            (true, true) => "pod_and_container_level",
            (true, false) => "pod_level",
            (false, true) => "container_level",
            (false, false) => "",
        };
        let class = qos_class(pod).as_str().to_ascii_lowercase();
        self.pod_level.with_label_values(&[mode, class.as_str()]).inc();
    }
}
