//! What resizes in place count, under upstream's names (appendix D.1).
//!
//! In: what the ledger decided and what the worker put into force. Out: counters, histograms and gauges in the registry.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity as ApiQuantity};
use prometheus::{
    Error, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, core::Collector,
};

use super::{
    pod_resources::{CPU, MEMORY},
    resize_conditions::{DEFERRED, ResizeCondition, ResizeConditions},
};
use crate::{pods::Pod, quantity::Quantity};

/// Upstream's buckets of the time to put a resize into force, in milliseconds.
const DURATION_MS: [f64; 14] = [
    10.0, 50.0, 100.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 30_000.0, 60_000.0, 120_000.0, 300_000.0,
    600_000.0,
];
/// Upstream's buckets of the time that a resize waits for room, in seconds.
const DEFERRED_SECONDS: [f64; 16] =
    [5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 150.0, 180.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0];
const SYSTEM_CRITICAL: i32 = 2_000_000_000;

/// Why waiting resizes were looked at again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// What a resize in place gave back is in force.
    PodResized,
    PodUpdated,
    PodsAdded,
    PodsRemoved,
    PodTerminated,
    /// The node can allocate more or less than before: upstream finds that on its timer.
    NodeChanged,
}

impl Trigger {
    fn as_str(self) -> &'static str {
        match self {
            Self::PodResized => "pod_resized",
            Self::PodUpdated => "pod_updated",
            Self::PodsAdded => "pods_added",
            Self::PodsRemoved => "pods_removed",
            Self::PodTerminated => "pod_terminated",
            Self::NodeChanged => "periodic_retry",
        }
    }
}

/// How a resize stopped being deferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resolution {
    Accepted,
    Reverted,
    Terminated,
}

impl Resolution {
    fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Reverted => "reverted",
            Self::Terminated => "terminated",
        }
    }
}

/// Make it once and share it.
#[derive(Debug, Clone)]
pub struct ResizeMetrics {
    requested: IntCounterVec,
    duration: HistogramVec,
    pending: IntGaugeVec,
    infeasible: IntCounterVec,
    in_progress: IntGauge,
    deferred_accepted: IntCounterVec,
    deferred_duration: HistogramVec,
}

impl ResizeMetrics {
    /// Registers everything; fails only if a name is taken.
    pub fn new(registry: &Registry) -> Result<Self, Error> {
        Ok(Self {
            requested: registered(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "kubelet_container_requested_resizes_total",
                        "[ALPHA] Number of requested resizes, counted at the container level. Different resources on the same \
                         container are counted separately. The 'requirement' label refers to 'memory' or 'limits'; the \
                         'operation' label can be one of 'add', 'remove', 'increase' or 'decrease'.",
                    ),
                    &["resource", "requirement", "operation"],
                ),
            )?,
            duration: registered(
                registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "kubelet_pod_resize_duration_milliseconds",
                        "[ALPHA] Duration in milliseconds to actuate a pod resize",
                    )
                    .buckets(DURATION_MS.to_vec()),
                    &["success"],
                ),
            )?,
            pending: registered(
                registry,
                IntGaugeVec::new(
                    Opts::new(
                        "kubelet_pod_pending_resizes",
                        "[ALPHA] Number of pending resizes for pods, by the bucket of the pod's priority and by reason (deferred, \
                         infeasible).",
                    ),
                    &["reason", "priority_bucket"],
                ),
            )?,
            infeasible: registered(
                registry,
                IntCounterVec::new(
                    Opts::new("kubelet_pod_infeasible_resizes_total", "[ALPHA] Number of infeasible resizes for pods."),
                    &["reason_detail"],
                ),
            )?,
            in_progress: registered(
                registry,
                IntGauge::new(
                    "kubelet_pod_in_progress_resizes",
                    "[ALPHA] Number of in-progress resizes for pods.",
                ),
            )?,
            deferred_accepted: registered(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "kubelet_pod_deferred_accepted_resizes_total",
                        "[ALPHA] Cumulative number of resizes that were accepted after being deferred.",
                    ),
                    &["retry_trigger"],
                ),
            )?,
            deferred_duration: registered(
                registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "kubelet_pod_deferred_resize_duration_seconds",
                        "[ALPHA] Duration in seconds that a pod resize remains deferred before completion, by the bucket of the \
                         pod's priority and by how it was resolved (accepted, reverted, terminated).",
                    )
                    .buckets(DEFERRED_SECONDS.to_vec()),
                    &["resolution", "priority_bucket"],
                ),
            )?,
        })
    }

    /// The pod's spec changed: counts what it asks of its main and init containers.
    pub(super) fn requested(&self, old: &Pod, new: &Pod) {
        for container in old.containers() {
            let Some(changed) = new.container(container.name()) else { continue };
            let (before, after) = (container.spec.resources.as_ref(), changed.spec.resources.as_ref());
            for (resource, requirement, of) in REQUIREMENTS {
                let amount = |held: Option<&ResourceRequirements>| {
                    let text = held.and_then(|r| of(r).as_ref()).and_then(|list| list.get(resource));
                    text.and_then(|text| Quantity::parse(&text.0).ok()).unwrap_or(Quantity::ZERO)
                };
                if let Some(operation) = operation(amount(before), amount(after)) {
                    self.requested.with_label_values(&[resource, requirement, operation]).inc();
                }
            }
        }
    }

    /// The steps of one resize were taken, or one of them failed.
    pub(super) fn actuated(&self, success: bool, took: Duration) {
        let label = if success { "true" } else { "false" };
        self.duration.with_label_values(&[label]).observe(took.as_secs_f64() * 1000.0);
    }

    pub(super) fn infeasible(&self, detail: &str) {
        self.infeasible.with_label_values(&[detail]).inc();
    }

    pub(super) fn accepted_after_deferral(&self, trigger: Trigger) {
        self.deferred_accepted.with_label_values(&[trigger.as_str()]).inc();
    }

    /// The pending condition goes. Nothing is counted unless it was `Deferred`.
    pub(super) fn pending_ended(&self, pod: &Pod, was: Option<&ResizeCondition>, how: Resolution, now: Timestamp) {
        if let Some(deferred) = was.filter(|c| c.reason == DEFERRED) {
            let waited = now.duration_since(deferred.since).as_secs_f64().max(0.0);
            self.deferred_duration.with_label_values(&[how.as_str(), priority_bucket(pod)]).observe(waited);
        }
    }

    /// All pods with their conditions.
    pub(super) fn count<'a>(&self, pods: impl Iterator<Item = (&'a Pod, &'a ResizeConditions)>) {
        let mut pending: BTreeMap<(String, &str), i64> = BTreeMap::new();
        let mut in_progress = 0;
        for (pod, conditions) in pods {
            in_progress += i64::from(conditions.in_progress.is_some());
            if let Some(condition) = &conditions.pending {
                *pending.entry((condition.reason.to_lowercase(), priority_bucket(pod))).or_default() += 1;
            }
        }
        self.in_progress.set(in_progress);
        self.pending.reset();
        for ((reason, bucket), count) in pending {
            self.pending.with_label_values(&[reason.as_str(), bucket]).set(count);
        }
    }
}

type List = Option<BTreeMap<String, ApiQuantity>>;
type Pick = fn(&ResourceRequirements) -> &List;

/// Resource, label and list.
const REQUIREMENTS: [(&str, &str, Pick); 4] = [
    (MEMORY, "requests", |r| &r.requests),
    (MEMORY, "limits", |r| &r.limits),
    (CPU, "requests", |r| &r.requests),
    (CPU, "limits", |r| &r.limits),
];

fn operation(before: Quantity, after: Quantity) -> Option<&'static str> {
    match (before == Quantity::ZERO, after == Quantity::ZERO) {
        (false, true) => Some("remove"),
        (true, false) => Some("add"),
        _ if after < before => Some("decrease"),
        _ if after > before => Some("increase"),
        _ => None,
    }
}

fn priority_bucket(pod: &Pod) -> &'static str {
    match pod.spec().priority.unwrap_or(0) {
        SYSTEM_CRITICAL.. => "system-critical",
        100_000.. => "high",
        1.. => "medium",
        0 => "normal",
        -999.. => "low",
        _ => "very-low",
    }
}

fn registered<C: Collector + Clone + 'static>(registry: &Registry, made: Result<C, Error>) -> Result<C, Error> {
    let collector = made?;
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{containers::tests::pod, telemetry::Metrics};

    fn lines(change: impl FnOnce(&ResizeMetrics)) -> Vec<String> {
        let metrics = Metrics::new().unwrap();
        change(&ResizeMetrics::new(metrics.registry()).unwrap());
        let text = metrics.render();
        let ours = |line: &&str| line.contains("resize") && !line.starts_with('#') && !line.contains("_bucket");
        text.lines().filter(ours).map(str::to_owned).collect()
    }

    #[test]
    fn p72_each_changed_amount_of_a_container_is_a_requested_resize() {
        let with = |resources: Value| pod(&json!({"containers": [{"name": "c", "resources": resources}]}).to_string());
        let old = with(json!({"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1"}}));
        let new = with(json!({"requests": {"cpu": "500m", "memory": "1024Mi"}, "limits": {"memory": "2Gi"}}));
        let counted = lines(|m| m.requested(&old, &new));
        let name = "kubelet_container_requested_resizes_total";
        for labels in [
            r#"operation="decrease",requirement="requests",resource="cpu""#,
            r#"operation="remove",requirement="limits",resource="cpu""#,
            r#"operation="add",requirement="limits",resource="memory""#,
        ] {
            assert!(counted.contains(&format!("{name}{{{labels}}} 1")), "{labels} not in {counted:?}");
        }
        assert_eq!(counted.iter().filter(|line| line.starts_with(name)).count(), 3);
    }

    #[test]
    fn p72_priorities_fall_into_upstreams_buckets() {
        for (priority, bucket) in [
            (json!(2_000_001_000), "system-critical"),
            (json!(1_999_999_999), "high"),
            (json!(100_000), "high"),
            (json!(99_999), "medium"),
            (json!(1), "medium"),
            (json!(0), "normal"),
            (Value::Null, "normal"),
            (json!(-1), "low"),
            (json!(-999), "low"),
            (json!(-1000), "very-low"),
        ] {
            let pod = pod(&json!({"priority": priority, "containers": []}).to_string());
            assert_eq!(priority_bucket(&pod), bucket, "{priority}");
        }
    }
}
