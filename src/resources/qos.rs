//! QoS class and the numbers that follow from it: OOM score, CPU shares, quota and weight (contract P-46, R-02, R-06). Pure.

use std::fmt;

use k8s_openapi::api::core::v1::ResourceRequirements;

use super::requests::{container_requests, pod_level_requests_set, pod_level_set, resource_list};
use crate::{
    pods::{ContainerKind, ContainerRef, Pod},
    quantity::Quantity,
};

/// `PriorityClass system-cluster-critical` and above are critical (scheduling API, `SystemCriticalPriority`).
pub const CLUSTER_CRITICAL_PRIORITY: i32 = 2_000_000_000;

const GUARANTEED_OOM_SCORE: i64 = -997;
const BEST_EFFORT_OOM_SCORE: i64 = 1000;

/// How well a pod is protected when resources run short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum QosClass {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl QosClass {
    /// As `status.qosClass` spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Guaranteed, Self::Burstable, Self::BestEffort].into_iter().find(|c| c.as_str() == text)
    }
}

impl fmt::Display for QosClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The class that the API has recorded (it never changes afterwards, not even by a resize), else the one the spec gives.
pub fn qos_class(pod: &Pod) -> QosClass {
    let recorded = pod.api_status().qos_class.as_deref().and_then(QosClass::parse);
    recorded.unwrap_or_else(|| class_of_spec(pod))
}

fn class_of_spec(pod: &Pod) -> QosClass {
    if pod_level_set(pod) {
        return class_of(pod.spec().resources.as_ref());
    }
    let mut classes = pod.containers().map(|c| class_of(c.spec.resources.as_ref()));
    let Some(first) = classes.next() else { return QosClass::BestEffort };
    if classes.all(|class| class == first) { first } else { QosClass::Burstable }
}

fn class_of(resources: Option<&ResourceRequirements>) -> QosClass {
    let requests = resource_list(resources.and_then(|r| r.requests.as_ref()));
    let limits = resource_list(resources.and_then(|r| r.limits.as_ref()));
    if requests.is_empty() && limits.is_empty() {
        return QosClass::BestEffort;
    }
    let of = |name: &str| {
        let request = requests.get(name).copied().unwrap_or(Quantity::ZERO);
        let limit = limits.get(name).copied().unwrap_or(Quantity::ZERO);
        match (request == limit, request.is_zero()) {
            (false, _) => QosClass::Burstable,
            (true, true) => QosClass::BestEffort,
            (true, false) => QosClass::Guaranteed,
        }
    };
    let (cpu, memory) = (of("cpu"), of("memory"));
    if cpu == memory { cpu } else { QosClass::Burstable }
}

/// Static, mirror, or of a system-critical priority.
pub fn is_critical(pod: &Pod) -> bool {
    pod.is_static()
        || pod.annotations().contains_key("kubernetes.io/config.mirror")
        || pod.spec().priority.is_some_and(|p| p >= CLUSTER_CRITICAL_PRIORITY)
}

/// Critical and of the class `system-node-critical`.
pub fn is_node_critical(pod: &Pod) -> bool {
    is_critical(pod) && pod.spec().priority_class_name.as_deref() == Some("system-node-critical")
}

/// `oom_score_adj` of one container. `memory_capacity` is the node's, in bytes.
pub fn oom_score_adj(pod: &Pod, container: ContainerRef<'_>, memory_capacity: i64) -> i64 {
    if is_node_critical(pod) {
        return GUARANTEED_OOM_SCORE;
    }
    match qos_class(pod) {
        QosClass::Guaranteed => return GUARANTEED_OOM_SCORE,
        QosClass::BestEffort => return BEST_EFFORT_OOM_SCORE,
        QosClass::Burstable => {}
    }
    let spare = spare_pod_memory(pod);
    let score = |request: i64| {
        let share = i128::from(request.saturating_add(spare)) * 1000 / i128::from(memory_capacity.max(1));
        (1000 - share).clamp(i128::from(i64::MIN), 1000) as i64
    };
    let mut adjust = score(memory_request(container));
    if container.kind == ContainerKind::Sidecar {
        let smallest_main = pod.main_containers().map(memory_request).min().unwrap_or(0);
        adjust = adjust.min(score(smallest_main));
    }
    adjust.clamp(1000 + GUARANTEED_OOM_SCORE, BEST_EFFORT_OOM_SCORE - 1)
}

fn memory_request(container: ContainerRef<'_>) -> i64 {
    let requests = container.spec.resources.as_ref().and_then(|r| r.requests.as_ref());
    resource_list(requests).get("memory").map_or(0, Quantity::value)
}

/// What the pod-level memory request leaves over its containers' requests, per container.
fn spare_pod_memory(pod: &Pod) -> i64 {
    if !pod_level_requests_set(pod) {
        return 0;
    }
    let requests = pod.spec().resources.as_ref().and_then(|r| r.requests.as_ref());
    let asked = resource_list(requests).get("memory").map_or(0, Quantity::value);
    let used = container_requests(pod).get("memory").map_or(0, Quantity::value);
    let containers = pod.containers().count().max(1) as i64;
    if asked == 0 { 0 } else { (asked - used).max(0) / containers }
}

const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;
const MIN_QUOTA_MICROS: i64 = 1000;

/// cgroup v1 `cpu.shares` for so many millicores: 1024 per CPU, 2 to 262144.
pub fn cpu_shares(milli_cpu: i64) -> u64 {
    (milli_cpu.saturating_mul(1024) / 1000).clamp(MIN_SHARES, MAX_SHARES) as u64
}

/// CFS quota in µs per `period_micros` for so many millicores, at least 1000; 0 (no quota) for 0.
pub fn cpu_quota(milli_cpu: i64, period_micros: i64) -> i64 {
    if milli_cpu == 0 { 0 } else { (milli_cpu.saturating_mul(period_micros) / 1000).max(MIN_QUOTA_MICROS) }
}

/// cgroup v2 `cpu.weight` of the kubelet's own cgroups: the linear map of shares 2…262144 to 1…10000.
pub fn cpu_weight(shares: u64) -> u64 {
    let shares = shares.clamp(MIN_SHARES as u64, MAX_SHARES as u64);
    1 + ((shares - 2) * 9999) / 262_142
}

/// Millicores that so many shares stand for, rounded up: what the API shows of a cgroup. 0 below the least.
pub fn milli_of_shares(shares: i64) -> i64 {
    if shares < MIN_SHARES { 0 } else { (shares.saturating_mul(1000) + 1023) / 1024 }
}

/// Millicores that a CFS quota stands for, 0 for none.
pub fn milli_of_quota(quota: i64, period: i64) -> i64 {
    if quota <= 0 || period <= 0 { 0 } else { quota.saturating_mul(1000) / period }
}

/// The way back from [`cpu_weight`], as lossy as that.
pub fn shares_of_weight(weight: u64) -> u64 {
    2 + weight.clamp(1, 10_000).saturating_sub(1) * 262_142 / 9999
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::requests::tests::pod;
    use super::*;

    fn container(requests: Value, limits: Value) -> Value {
        json!({"name": "c", "resources": {"requests": requests, "limits": limits}})
    }

    #[test]
    fn p46_class_of_containers() {
        let full = json!({"cpu": "1", "memory": "1Gi"});
        let cases = [
            (json!([container(json!({}), json!({}))]), QosClass::BestEffort),
            (json!([container(full.clone(), full.clone())]), QosClass::Guaranteed),
            (json!([container(json!({"cpu": "1000m", "memory": "1024Mi"}), full.clone())]), QosClass::Guaranteed),
            (json!([container(json!({"cpu": "1"}), json!({"cpu": "1"}))]), QosClass::Burstable),
            (json!([container(json!({"cpu": "1"}), json!({}))]), QosClass::Burstable),
            (json!([container(json!({}), full.clone())]), QosClass::Burstable),
            (json!([container(full.clone(), full.clone()), container(json!({}), json!({}))]), QosClass::Burstable),
            (
                json!([container(json!({"example.com/gpu": "1"}), json!({"example.com/gpu": "1"}))]),
                QosClass::BestEffort,
            ),
            (json!([container(json!({"cpu": "0"}), json!({"cpu": "0"}))]), QosClass::BestEffort),
        ];
        for (containers, class) in cases {
            assert_eq!(qos_class(&pod(json!({"containers": containers}))), class, "{containers}");
        }
    }

    #[test]
    fn p46_init_containers_count_and_pod_level_resources_decide() {
        let full = json!({"cpu": "1", "memory": "1Gi"});
        let with_init =
            pod(json!({"initContainers": [{"name": "i"}], "containers": [container(full.clone(), full.clone())]}));
        assert_eq!(qos_class(&with_init), QosClass::Burstable);
        let pod_level = pod(json!({"resources": {"requests": full, "limits": full}, "containers": [{"name": "c"}]}));
        assert_eq!(qos_class(&pod_level), QosClass::Guaranteed);
    }

    #[test]
    fn p46_the_class_on_record_wins() {
        let object = json!({"metadata": {"name": "p", "uid": "u"}, "spec": {"containers": [{"name": "c"}]},
            "status": {"qosClass": "Burstable"}});
        let pod =
            Pod::new(serde_json::from_value(object).unwrap(), crate::pods::PodSource::Api, jiff::Timestamp::UNIX_EPOCH)
                .unwrap();
        assert_eq!(qos_class(&pod), QosClass::Burstable);
    }

    #[test]
    fn r06_oom_score() {
        const CAPACITY: i64 = 4_000_000_000;
        let score = |spec: Value| {
            let pod = pod(spec);
            oom_score_adj(&pod, pod.containers().next().unwrap(), CAPACITY)
        };
        let asks = |memory: &str| json!({"containers": [container(json!({"memory": memory}), json!({}))]});
        let full = json!({"cpu": "1", "memory": "1Gi"});
        assert_eq!(score(json!({"containers": [container(full.clone(), full.clone())]})), -997);
        assert_eq!(score(json!({"containers": [{"name": "c"}]})), 1000);
        assert_eq!(score(asks("2000000000")), 500);
        assert_eq!(score(asks("1")), 999, "a burstable container never reaches 1000");
        assert_eq!(score(asks("4000000000")), 3, "nor goes below 3");
        assert_eq!(score(asks("8000000000")), 3);
        let critical = json!({"priority": 2_000_001_000, "priorityClassName": "system-node-critical",
            "containers": [{"name": "c"}]});
        assert_eq!(score(critical), -997);
    }

    #[test]
    fn r06_sidecar_is_no_likelier_a_victim_than_the_smallest_main() {
        let pod = pod(json!({
            "initContainers": [{"name": "s", "restartPolicy": "Always"}],
            "containers": [container(json!({"memory": "1000"}), json!({})), container(json!({"memory": "500"}), json!({}))],
        }));
        let sidecar = pod.containers().next().unwrap();
        assert_eq!(oom_score_adj(&pod, sidecar, 1000), 500);
    }

    #[test]
    fn r06_pod_level_memory_left_over_is_shared() {
        let pod = pod(json!({
            "resources": {"requests": {"memory": "600"}},
            "containers": [container(json!({"memory": "200"}), json!({})), {"name": "d"}],
        }));
        // (600 - 200) / 2 containers = 200 each
        let scores: Vec<i64> = pod.containers().map(|c| oom_score_adj(&pod, c, 1000)).collect();
        assert_eq!(scores, [600, 800]);
    }

    #[test]
    fn r02_shares_quota_and_weight() {
        let shares: Vec<u64> = [0, 1, 2, 100, 1000, 1500, 300_000_000].into_iter().map(cpu_shares).collect();
        assert_eq!(shares, [2, 2, 2, 102, 1024, 1536, 262_144]);
        let quota: Vec<i64> = [0, 1, 5, 10, 100, 2500].into_iter().map(|m| cpu_quota(m, 100_000)).collect();
        assert_eq!(quota, [0, 1000, 1000, 1000, 10_000, 250_000]);
        let weight: Vec<u64> = [2, 1024, 262_144, 999_999].into_iter().map(cpu_weight).collect();
        assert_eq!(weight, [1, 39, 10_000, 10_000]);
        let back: Vec<i64> = [0, 1, 2, 102, 1024].into_iter().map(milli_of_shares).collect();
        assert_eq!(back, [0, 0, 2, 100, 1000]);
        assert_eq!([(-1, 1), (25_000, 100_000), (1000, 0)].map(|(q, p)| milli_of_quota(q, p)), [0, 250, 0]);
        assert_eq!([1, 39, 10_000].map(shares_of_weight), [2, 998, 262_144]);
    }
}
