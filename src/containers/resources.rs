//! Resources of a container as the runtime writes them into its cgroup (contract R-05, R-06, R-07, R-12).

use std::collections::HashMap;

use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity as ApiQuantity};
use protocols::cri::v1;

use super::{ContainerInputs, ContainerPolicy};
use crate::{
    node::NodeFacts,
    pods::{ContainerRef, Pod},
    quantity::Quantity,
    resources::{
        ContainerSize, QosClass, ResourceList, cpu_quota, cpu_shares, hugepage_size, is_critical, oom_score_adj,
        pod_limits, pod_requests, qos_class, resource_list,
    },
};

const CPU: &str = "cpu";
const MEMORY: &str = "memory";
const HUGEPAGES: &str = "hugepages-";
/// The kernel's default CFS period: what a sandbox's resources are stated in.
pub(super) const DEFAULT_PERIOD_MICROS: i64 = 100_000;

/// CPU shares, quota and period, memory limit, OOM score, huge page limits, and the files of cgroup v2.
pub fn container_resources(inputs: &ContainerInputs<'_>, policy: &ContainerPolicy) -> v1::LinuxContainerResources {
    let period = inputs.cpu_cfs_quota.then_some(inputs.cpu_cfs_period_micros);
    runtime_resources(inputs.pod, inputs.container, inputs.node, period, policy)
}

/// The same for a running container that is resized to this size (contract P-71). `period_micros` `None`: CFS quota is switched off.
pub fn resized_resources(
    pod: &Pod,
    container: ContainerRef<'_>,
    size: &ContainerSize,
    node: &NodeFacts,
    period_micros: Option<i64>,
    policy: &ContainerPolicy,
) -> v1::LinuxContainerResources {
    let mut spec = container.spec.clone();
    spec.resources = Some(size.requirements(spec.resources.as_ref()));
    runtime_resources(pod, ContainerRef { spec: &spec, ..container }, node, period_micros, policy)
}

fn runtime_resources(
    pod: &Pod,
    container: ContainerRef<'_>,
    node: &NodeFacts,
    period: Option<i64>,
    policy: &ContainerPolicy,
) -> v1::LinuxContainerResources {
    let asked = Asked::of(pod, container);
    let mut resources = linux_resources(asked.cpu_request, asked.cpu_limit, asked.memory_limit, period);
    resources.oom_score_adj = oom_score_adj(pod, container, node_memory(node));
    resources.hugepage_limits = hugepage_limits(pod, container.spec.resources.as_ref(), node);
    if node.cgroup_v2 {
        resources.unified = unified(policy, &asked, pod, node);
    } else if policy.swap_controller {
        // No swap above the memory limit.
        resources.memory_swap_limit_in_bytes = resources.memory_limit_in_bytes;
    }
    resources
}

/// What the container asks for. Amounts are millicores and bytes, 0 for none.
struct Asked {
    cpu_request: Option<i64>,
    cpu_limit: i64,
    memory_limit: i64,
    memory_request: i64,
    /// The container's own limit, without the pod's.
    own_memory_limit: i64,
}

impl Asked {
    fn of(pod: &Pod, container: ContainerRef<'_>) -> Self {
        let own = container.spec.resources.as_ref();
        let requests = resource_list(own.and_then(|r| r.requests.as_ref()));
        let limits = resource_list(own.and_then(|r| r.limits.as_ref()));
        // Without a limit of its own the container shares the pod's.
        let pods = resource_list(pod.spec().resources.as_ref().and_then(|r| r.limits.as_ref()));
        let limit = |name: &str| {
            let own = limits.get(name).filter(|l| !l.is_zero());
            own.or_else(|| pods.get(name)).copied().unwrap_or(Quantity::ZERO)
        };
        let cpu_limit = limit(CPU).milli_value();
        Self {
            cpu_request: Some(requests.get(CPU).map_or(cpu_limit, Quantity::milli_value)),
            cpu_limit,
            memory_limit: limit(MEMORY).value(),
            memory_request: bytes(&requests, MEMORY),
            own_memory_limit: bytes(&limits, MEMORY),
        }
    }
}

fn bytes(list: &ResourceList, name: &str) -> i64 {
    list.get(name).map_or(0, Quantity::value)
}

/// `period_micros` `None`: CFS quota is switched off on this node.
fn linux_resources(
    cpu_request: Option<i64>,
    cpu_limit: i64,
    memory_limit: i64,
    period_micros: Option<i64>,
) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpu_shares: cpu_shares(cpu_request.unwrap_or(cpu_limit)) as i64,
        cpu_quota: period_micros.map_or(0, |period| cpu_quota(cpu_limit, period)),
        cpu_period: period_micros.unwrap_or(0),
        memory_limit_in_bytes: memory_limit,
        ..Default::default()
    }
}

/// The whole pod without its overhead, and the overhead: for runtimes that size a VM by them.
pub fn sandbox_resources(pod: &Pod) -> (v1::LinuxContainerResources, v1::LinuxContainerResources) {
    let overhead = resource_list(pod.spec().overhead.as_ref());
    let less = |list: &ResourceList, name: &str| {
        list.get(name).map(|amount| overhead.get(name).map_or(*amount, |over| amount.sub(over)))
    };
    let (requests, limits) = (pod_requests(pod), pod_limits(pod));
    let request = less(&requests, CPU).map(|q| q.milli_value());
    let limit = |name: &str| match limits.get(name) {
        Some(limit) if !limit.is_zero() => less(&limits, name).unwrap_or(Quantity::ZERO),
        _ => Quantity::ZERO,
    };
    let period = Some(DEFAULT_PERIOD_MICROS);
    let resources = linux_resources(request, limit(CPU).milli_value(), limit(MEMORY).value(), period);
    let overhead = if overhead.is_empty() {
        v1::LinuxContainerResources::default()
    } else {
        let cpu = overhead.get(CPU).map_or(0, Quantity::milli_value);
        linux_resources(Some(cpu), cpu, bytes(&overhead, MEMORY), period)
    };
    (resources, overhead)
}

/// Every page size of the node, 0 unless the pod or (before it) the container has a limit.
fn hugepage_limits(pod: &Pod, own: Option<&ResourceRequirements>, node: &NodeFacts) -> Vec<v1::HugepageLimit> {
    let sizes = node.capacity.keys().filter_map(|name| hugepage_size(name));
    let mut limits: Vec<(i64, u64)> = sizes.map(|size| (size, 0)).collect();
    let mut set = |requirements: Option<&ResourceRequirements>| {
        for (name, amount) in requirements.and_then(|r| r.limits.as_ref()).into_iter().flatten() {
            let Some(size) = name.starts_with(HUGEPAGES).then(|| hugepage_size(name)).flatten() else { continue };
            let amount = Quantity::try_from(amount as &ApiQuantity).map_or(0, |q| q.value().max(0) as u64);
            if let Some(limit) = limits.iter_mut().find(|(s, _)| *s == size) {
                limit.1 = amount;
            }
        }
    };
    set(pod.spec().resources.as_ref());
    set(own);
    limits.into_iter().map(|(size, limit)| v1::HugepageLimit { page_size: page_size_name(size), limit }).collect()
}

/// `2MB`, `1GB`: the kernel's names in hugetlb files.
fn page_size_name(mut bytes: i64) -> String {
    let mut units = ["B", "KB", "MB", "GB", "TB", "PB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    while bytes > 0 && bytes % 1024 == 0 {
        let Some(next) = units.next() else { break };
        (bytes, unit) = (bytes / 1024, next);
    }
    format!("{bytes}{unit}")
}

/// Files of the container's cgroup: kill all of it on OOM, memory protection by MemoryQoS, no swap.
fn unified(policy: &ContainerPolicy, asked: &Asked, pod: &Pod, node: &NodeFacts) -> HashMap<String, String> {
    let mut files = HashMap::new();
    let mut set = |file: &str, value: String| files.insert(file.to_owned(), value);
    if !policy.single_process_oom_kill {
        set("memory.oom.group", "1".to_owned());
    }
    if policy.swap_controller {
        set("memory.swap.max", swap_max(policy, asked, pod, node).to_string());
    }
    if !policy.memory_qos {
        set("memory.high", "max".to_owned());
        return files;
    }
    if policy.memory_reservation && asked.memory_request != 0 {
        let file = if qos_class(pod) == QosClass::Guaranteed { "memory.min" } else { "memory.low" };
        set(file, asked.memory_request.to_string());
    } else {
        set("memory.min", "0".to_owned());
        set("memory.low", "0".to_owned());
    }
    if let Some(high) = memory_high(policy, asked, pod, node) {
        set("memory.high", high.to_string());
    }
    files
}

/// MemoryQoS' throttling point, in whole pages; `None` where throttling makes no sense.
fn memory_high(policy: &ContainerPolicy, asked: &Asked, pod: &Pod, node: &NodeFacts) -> Option<i64> {
    const PAGE: f64 = 4096.0;
    let factor = policy.memory_throttling_factor?;
    let pods_limit =
        pod.spec().resources.as_ref().and_then(|r| r.limits.as_ref()).is_some_and(|l| l.contains_key(MEMORY));
    let (request, limit) = (asked.memory_request, asked.own_memory_limit);
    if (limit == 0 && pods_limit) || (request == limit && request != 0) {
        return None;
    }
    let top = if limit != 0 { limit } else { amount(node.allocatable.get(MEMORY)) };
    let high = ((request as f64 + (top as f64 - request as f64) * factor) / PAGE).floor() * PAGE;
    let high = high as i64;
    (top > 0 && high > request).then_some(high)
}

/// `memory.swap.max`: the container's share of the node's swap with LimitedSwap, for burstable pods that are not critical and
/// request less memory than their limit; else 0 (contract R-11).
fn swap_max(policy: &ContainerPolicy, asked: &Asked, pod: &Pod, node: &NodeFacts) -> i64 {
    let Some(swap) = policy.limited_swap_bytes else { return 0 };
    let (request, memory) = (asked.memory_request, node_memory(node));
    let eligible = !is_critical(pod)
        && qos_class(pod) == QosClass::Burstable
        && request != asked.own_memory_limit
        && memory > 0
        && request <= memory;
    if eligible { (request as f64 / memory as f64 * swap as f64) as i64 } else { 0 }
}

fn node_memory(node: &NodeFacts) -> i64 {
    amount(node.capacity.get(MEMORY))
}

fn amount(text: Option<&String>) -> i64 {
    text.and_then(|text| Quantity::parse(text).ok()).map_or(0, |q| q.value())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::containers::tests::{container_inputs, image, pod};

    fn node(v2: bool) -> NodeFacts {
        let capacity = [("memory", "8Gi"), ("hugepages-2Mi", "0"), ("hugepages-1Gi", "0")];
        let capacity: BTreeMap<_, _> = capacity.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        NodeFacts { cgroup_v2: v2, allocatable: capacity.clone(), capacity, ..Default::default() }
    }

    fn resources(spec: &str, v2: bool, policy: &ContainerPolicy) -> v1::LinuxContainerResources {
        let (pod, node) = (pod(spec), node(v2));
        let image = image(None, "");
        let inputs = ContainerInputs { node: &node, ..container_inputs(&pod, &image) };
        container_resources(&inputs, policy)
    }

    fn spec(resources: &str) -> String {
        format!(r#"{{"containers":[{{"name":"c","image":"i","resources":{resources}}}]}}"#)
    }

    #[test]
    fn r05_cpu_and_memory() {
        for (asked, shares, quota, memory) in [
            ("{}", 2, 0, 0),
            (r#"{"requests":{"cpu":"500m"}}"#, 512, 0, 0),
            (r#"{"limits":{"cpu":"250m","memory":"64Mi"}}"#, 256, 25_000, 67_108_864),
            (r#"{"requests":{"cpu":"100m"},"limits":{"cpu":"2"}}"#, 102, 200_000, 0),
            (r#"{"limits":{"cpu":"1m"}}"#, 2, 1000, 0),
        ] {
            let got = resources(&spec(asked), true, &ContainerPolicy::default());
            assert_eq!((got.cpu_shares, got.cpu_quota, got.memory_limit_in_bytes), (shares, quota, memory), "{asked}");
            assert_eq!(got.cpu_period, 100_000);
        }
    }

    #[test]
    fn r05_the_pods_limit_stands_in_for_the_containers() {
        let got = resources(
            r#"{"resources":{"limits":{"cpu":"1","memory":"1Gi","hugepages-2Mi":"8Mi"}},"containers":[{"name":"c","image":"i"}]}"#,
            true,
            &ContainerPolicy::default(),
        );
        assert_eq!((got.cpu_shares, got.cpu_quota, got.memory_limit_in_bytes), (1024, 100_000, 1 << 30));
        assert!(got.hugepage_limits.contains(&v1::HugepageLimit { page_size: "2MB".into(), limit: 8 << 20 }));
    }

    #[test]
    fn r05_huge_pages_are_closed_unless_asked_for() {
        let got = resources(&spec(r#"{"limits":{"hugepages-1Gi":"2Gi"}}"#), true, &ContainerPolicy::default());
        let limits: BTreeMap<_, _> = got.hugepage_limits.into_iter().map(|l| (l.page_size, l.limit)).collect();
        assert_eq!(limits, BTreeMap::from([("2MB".to_owned(), 0), ("1GB".to_owned(), 2 << 30)]));
    }

    #[test]
    fn r06_oom_scores() {
        let score = |asked: &str| resources(&spec(asked), true, &ContainerPolicy::default()).oom_score_adj;
        assert_eq!(score("{}"), 1000);
        assert_eq!(score(r#"{"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"1","memory":"1Gi"}}"#), -997);
        assert_eq!(score(r#"{"requests":{"memory":"4Gi"}}"#), 500);
    }

    #[test]
    fn r07_oom_group_and_memory_files_of_v2() {
        let map = |list: &[(&str, &str)]| -> HashMap<String, String> {
            list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let base = [("memory.oom.group", "1"), ("memory.min", "0"), ("memory.low", "0")];
        assert_eq!(resources(&spec("{}"), true, &ContainerPolicy::default()).unified, map(&base));
        assert_eq!(resources(&spec("{}"), false, &ContainerPolicy::default()).unified, map(&[]));
        let single = ContainerPolicy { single_process_oom_kill: true, memory_qos: false, ..Default::default() };
        assert_eq!(resources(&spec("{}"), true, &single).unified, map(&[("memory.high", "max")]));

        let tiered =
            ContainerPolicy { memory_reservation: true, memory_throttling_factor: Some(0.9), ..Default::default() };
        let got = resources(&spec(r#"{"requests":{"memory":"1Gi"},"limits":{"memory":"2Gi"}}"#), true, &tiered).unified;
        // floor((1Gi + 0.9 * 1Gi) / 4096) * 4096
        assert_eq!(got, map(&[("memory.oom.group", "1"), ("memory.low", "1073741824"), ("memory.high", "2040107008")]));
    }

    #[test]
    fn r11_swap() {
        let burstable = spec(r#"{"requests":{"memory":"2Gi"}}"#);
        let none = ContainerPolicy { swap_controller: true, ..Default::default() };
        assert_eq!(resources(&burstable, true, &none).unified["memory.swap.max"], "0");
        let limited = ContainerPolicy { limited_swap_bytes: Some(4 << 30), ..none };
        assert_eq!(resources(&burstable, true, &limited).unified["memory.swap.max"], (1_i64 << 30).to_string());
        assert_eq!(resources(&spec("{}"), true, &limited).unified["memory.swap.max"], "0");
        let v1 = resources(&spec(r#"{"limits":{"memory":"1Gi"}}"#), false, &limited);
        assert_eq!((v1.memory_swap_limit_in_bytes, v1.unified.len()), (1 << 30, 0));
    }

    #[test]
    fn p61_sandbox_resources_are_without_overhead() {
        let pod = pod(
            r#"{"overhead":{"cpu":"100m","memory":"10Mi"},"containers":[{"name":"a","resources":{"requests":{"cpu":"400m"},"limits":{"memory":"1Gi"}}},
                {"name":"b","resources":{"requests":{"cpu":"100m"},"limits":{"memory":"1Gi"}}}]}"#,
        );
        let (resources, overhead) = sandbox_resources(&pod);
        assert_eq!((resources.cpu_shares, resources.cpu_quota, resources.memory_limit_in_bytes), (512, 0, 2 << 30));
        assert_eq!((overhead.cpu_shares, overhead.cpu_quota, overhead.memory_limit_in_bytes), (102, 10_000, 10 << 20));
    }
}
