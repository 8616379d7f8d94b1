//! Whether the node can give a pod what its spec asks for after a resize, and who is asked first when room appears (contract P-70). Pure.
//!
//! In: the pod as desired and as allocated, what the other pods hold, what the node can allocate, the node's policies. Out: yes, not now
//! (Deferred), or never on this node (Infeasible), in upstream's words.

use std::{cmp::Ordering, collections::BTreeMap};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ResourceRequirements};

use super::{
    pod_resources::{ContainerSize, MEMORY, PodResources, same_resources},
    qos::{QosClass, is_critical, qos_class},
    requests::{ResourceList, pod_requests},
};
use crate::{pods::Pod, quantity::Quantity};

/// What of the node's configuration decides about resizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResizePolicy {
    /// `cpuManagerPolicy: static` without InPlacePodVerticalScalingExclusiveCPUs.
    pub static_cpus: bool,
    /// `memoryManagerPolicy: Static` without InPlacePodVerticalScalingExclusiveMemory.
    pub static_memory: bool,
    /// Feature InPlacePodLevelResourcesVerticalScaling.
    pub pod_level: bool,
    /// `memorySwap.swapBehavior: LimitedSwap` on cgroup v2 with a swap controller.
    pub limited_swap: bool,
}

impl Default for ResizePolicy {
    fn default() -> Self {
        Self { static_cpus: false, static_memory: false, pod_level: true, limited_swap: false }
    }
}

/// What the node holds and has given away.
#[derive(Debug, Clone, Default)]
pub struct NodeRoom {
    pub allocatable: ResourceList,
    /// What all other pods hold, each by [`held`].
    pub used: ResourceList,
    pub other_pods: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Fits,
    Deferred(String),
    Infeasible(Infeasible),
}

/// Why this node will never do it. `Display` is upstream's wording.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Infeasible {
    #[error("In-place resize of containers with swap is not supported.")]
    Swap,
    #[error("InPlacePodLevelResourcesVerticalScaling is disabled")]
    PodLevel,
    #[error(r#"Resize is infeasible for Guaranteed Pods alongside CPU Manager policy "static""#)]
    StaticCpus,
    #[error(r#"Resize is infeasible for Guaranteed Pods alongside Memory Manager policy "Static""#)]
    StaticMemory,
}

impl Infeasible {
    /// As the metric words it.
    pub fn detail(self) -> &'static str {
        match self {
            Self::Swap => "swap_limitation",
            Self::PodLevel => "plr_feature_gate_off",
            Self::StaticCpus => "guaranteed_pod_cpu_manager_static_policy",
            Self::StaticMemory => "guaranteed_pod_memory_manager_static_policy",
        }
    }
}

/// One resource that the node has too little of. `Display` is upstream's wording. CPU in millicores, everything else in units.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}")]
pub struct Insufficient {
    pub resource: String,
    pub requested: i64,
    pub used: i64,
    pub capacity: i64,
}

/// The first resource that does not fit, in the scheduler's order: pods, cpu, memory, ephemeral-storage, the rest by name. Extended resources
/// that the node does not name are the cluster's, and are left out.
pub fn fits(requests: &ResourceList, room: &NodeRoom) -> Result<(), Insufficient> {
    let short = |resource: &str, requested: i64, used: i64, capacity: i64| {
        let (resource, fits) = (resource.to_owned(), requested <= capacity.saturating_sub(used));
        if fits { Ok(()) } else { Err(Insufficient { resource, requested, used, capacity }) }
    };
    let amount = |list: &ResourceList, name: &str| {
        let of = |q: &Quantity| if name == "cpu" { q.milli_value() } else { q.value() };
        list.get(name).map_or(0, of)
    };
    if room.allocatable.contains_key("pods") {
        short("pods", 1, room.other_pods, amount(&room.allocatable, "pods"))?;
    }
    let first = ["cpu", MEMORY, "ephemeral-storage"];
    let rest = requests.keys().map(String::as_str).filter(|name| !first.contains(name));
    for name in first.into_iter().chain(rest) {
        let requested = amount(requests, name);
        let clusters = name.contains('/') && !room.allocatable.contains_key(name);
        if requested > 0 && !clusters {
            short(name, requested, amount(&room.used, name), amount(&room.allocatable, name))?;
        }
    }
    Ok(())
}

/// What a pod holds while another is looked at: the larger of what it is allocated and what is still in force.
pub fn held(allocated: &Pod, actuated: &PodResources, pod_level: bool) -> ResourceList {
    let mut held = pod_requests(allocated);
    let in_force = pod_requests(&actuated.shown_in(allocated, pod_level));
    for (name, amount) in in_force {
        let have = held.entry(name).or_insert(amount);
        *have = amount.max(*have);
    }
    held
}

/// Adds what one more pod holds.
pub fn add_held(room: &mut NodeRoom, held: &ResourceList) {
    for (name, amount) in held {
        room.used.entry(name.clone()).and_modify(|sum| *sum = sum.add(amount)).or_insert(*amount);
    }
    room.other_pods += 1;
}

/// Can the pod have what it desires instead of what it is allocated?
pub fn review(desired: &Pod, allocated: &Pod, room: &NodeRoom, policy: &ResizePolicy) -> Verdict {
    if let Some(why) = infeasible(desired, allocated, policy) {
        return Verdict::Infeasible(why);
    }
    match fits(&pod_requests(desired), room) {
        Ok(()) => Verdict::Fits,
        Err(short) => Verdict::Deferred(short.to_string()),
    }
}

fn infeasible(desired: &Pod, allocated: &Pod, policy: &ResizePolicy) -> Option<Infeasible> {
    if policy.limited_swap && swap_would_change(desired, allocated) {
        return Some(Infeasible::Swap);
    }
    let whole = same_resources(desired.spec().resources.as_ref(), allocated.spec().resources.as_ref());
    if !policy.pod_level && !whole {
        return Some(Infeasible::PodLevel);
    }
    if qos_class(desired) == QosClass::Guaranteed {
        if policy.static_cpus && requests_differ(desired, allocated, |size| size.cpu_request) {
            return Some(Infeasible::StaticCpus);
        }
        if policy.static_memory && requests_differ(desired, allocated, |size| size.memory_request) {
            return Some(Infeasible::StaticMemory);
        }
    }
    None
}

type Pair<'a> = (&'a Container, &'a Container);

fn pairs<'a>(desired: &'a Pod, allocated: &'a Pod) -> impl Iterator<Item = Pair<'a>> {
    desired.containers().filter_map(|c| Some((c.spec, allocated.container(c.name())?.spec)))
}

fn own_size(container: &Container) -> ContainerSize {
    ContainerSize::of(container.resources.as_ref(), None)
}

fn requests_differ(desired: &Pod, allocated: &Pod, of: fn(ContainerSize) -> i64) -> bool {
    pairs(desired, allocated).any(|(d, a)| of(own_size(d)) != of(own_size(a)))
}

/// A container that may swap would get another share of it, and is not restarted.
fn swap_would_change(desired: &Pod, allocated: &Pod) -> bool {
    pairs(desired, allocated).any(|(d, a)| {
        let restarts = restarts_on(a, MEMORY);
        let differs = own_size(d).memory_request != own_size(a).memory_request;
        differs && !restarts && (may_swap(desired, d) || may_swap(allocated, a))
    })
}

fn may_swap(pod: &Pod, container: &Container) -> bool {
    let size = own_size(container);
    let asks = size.memory_request != 0 || size.memory_limit != 0;
    !is_critical(pod) && qos_class(pod) == QosClass::Burstable && asks && size.memory_request != size.memory_limit
}

/// `resizePolicy` says that the container is restarted when this resource changes; without a word it is not.
pub fn restarts_on(container: &Container, resource: &str) -> bool {
    let policies = container.resize_policy.iter().flatten();
    policies.into_iter().find(|p| p.resource_name == resource).is_some_and(|p| p.restart_policy == "RestartContainer")
}

/// One resize that waits for room.
#[derive(Debug, Clone)]
pub struct Waiting {
    pub desired: Pod,
    pub allocated: Pod,
    /// Since when its condition says so; `None` before it was first looked at.
    pub since: Option<Timestamp>,
}

impl Waiting {
    /// It asks for more cpu or memory than it has.
    fn grows(&self) -> bool {
        let (new, old) = (pod_requests(&self.desired), pod_requests(&self.allocated));
        let of = |list: &ResourceList, name: &str| list.get(name).copied().unwrap_or(Quantity::ZERO);
        ["cpu", MEMORY].into_iter().any(|name| of(&new, name) > of(&old, name))
    }
}

/// Who is looked at first: what does not grow, then priority, then guaranteed pods, then who waits longest.
pub fn before(a: &Waiting, b: &Waiting) -> Ordering {
    let priority = |w: &Waiting| w.desired.spec().priority.unwrap_or(0);
    let lesser = |w: &Waiting| qos_class(&w.desired) != QosClass::Guaranteed;
    let since = |w: &Waiting| w.since.unwrap_or(Timestamp::MAX);
    a.grows()
        .cmp(&b.grows())
        .then_with(|| priority(b).cmp(&priority(a)))
        .then_with(|| lesser(a).cmp(&lesser(b)))
        .then_with(|| since(a).cmp(&since(b)))
        .then_with(|| a.desired.uid().cmp(b.desired.uid()))
}

/// What a resize's events say of the pod, as JSON: containers with their resources, generation, error (contract appendix C).
pub fn summary(pod: &Pod, generation: i64, error: &str) -> String {
    #[derive(serde::Serialize)]
    struct One<'a> {
        name: &'a str,
        resources: ResourceRequirements,
    }
    #[derive(serde::Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Summary<'a> {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        init_containers: Vec<One<'a>>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        containers: Vec<One<'a>>,
        generation: i64,
        #[serde(skip_serializing_if = "str::is_empty")]
        error: &'a str,
    }
    fn one(c: crate::pods::ContainerRef<'_>) -> One<'_> {
        let mut resources = c.spec.resources.clone().unwrap_or_default();
        resources.limits = resources.limits.filter(|l: &BTreeMap<_, _>| !l.is_empty());
        resources.requests = resources.requests.filter(|l| !l.is_empty());
        One { name: &c.spec.name, resources }
    }
    let summary = Summary {
        init_containers: pod.init_containers().map(one).collect(),
        containers: pod.main_containers().map(one).collect(),
        generation,
        error,
    };
    serde_json::to_string(&summary).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::requests::tests::pod, *};

    fn list(amounts: &[(&str, &str)]) -> ResourceList {
        amounts.iter().map(|(name, amount)| ((*name).to_owned(), Quantity::parse(amount).unwrap())).collect()
    }

    fn room(used: &[(&str, &str)]) -> NodeRoom {
        let allocatable = list(&[("cpu", "4"), ("memory", "8Gi"), ("pods", "3"), ("ephemeral-storage", "10Gi")]);
        NodeRoom { allocatable, used: list(used), other_pods: 1 }
    }

    fn asks(cpu: &str, memory: &str) -> Value {
        json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu, "memory": memory}}}]})
    }

    #[test]
    fn p70_deferred_in_upstreams_words() {
        for (requests, used, expected) in [
            (list(&[("cpu", "2"), ("memory", "1Gi")]), room(&[("cpu", "2")]), None),
            (
                list(&[("cpu", "2001m")]),
                room(&[("cpu", "2")]),
                Some("cpu, requested: 2001, used: 2000, capacity: 4000"),
            ),
            (
                list(&[("cpu", "5"), ("memory", "9Gi")]),
                room(&[]),
                Some("cpu, requested: 5000, used: 0, capacity: 4000"),
            ),
            (
                list(&[("memory", "7Gi")]),
                room(&[("memory", "2Gi")]),
                Some("memory, requested: 7516192768, used: 2147483648, capacity: 8589934592"),
            ),
            (
                list(&[("cpu", "1")]),
                NodeRoom { other_pods: 3, ..room(&[]) },
                Some("pods, requested: 1, used: 3, capacity: 3"),
            ),
            (list(&[("example.com/gpu", "1")]), room(&[]), None),
            (
                list(&[("hugepages-2Mi", "2Mi")]),
                room(&[]),
                Some("hugepages-2Mi, requested: 2097152, used: 0, capacity: 0"),
            ),
            (list(&[]), room(&[("cpu", "9")]), None),
        ] {
            let got = fits(&requests, &used).err().map(|short| short.to_string());
            let expected = expected.map(|text| format!("Node didn't have enough resource: {text}"));
            assert_eq!(got, expected, "{requests:?}");
        }
    }

    #[test]
    fn p70_what_is_still_in_force_counts_until_it_is_given_back() {
        let allocated = pod(asks("1", "1Gi"));
        let earlier = PodResources::of(&pod(asks("3", "512Mi")), true);
        let held = held(&allocated, &earlier, true);
        assert_eq!((held["cpu"].milli_value(), held["memory"].value()), (3000, 1 << 30));
        let mut room = room(&[]);
        add_held(&mut room, &held);
        assert_eq!((room.used["cpu"].milli_value(), room.other_pods), (3000, 2));
    }

    #[test]
    fn p70_infeasible_only_by_the_nodes_policies() {
        let guaranteed = |cpu: &str, memory: &str| {
            let all = json!({"cpu": cpu, "memory": memory});
            pod(json!({"containers": [{"name": "c", "resources": {"requests": all, "limits": all}}]}))
        };
        let base = ResizePolicy::default();
        let cpus = ResizePolicy { static_cpus: true, ..base };
        let memory = ResizePolicy { static_memory: true, ..base };
        let old = guaranteed("1", "1Gi");
        for (policy, new, expected) in [
            (base, guaranteed("2", "2Gi"), Verdict::Fits),
            (cpus, guaranteed("2", "1Gi"), Verdict::Infeasible(Infeasible::StaticCpus)),
            (cpus, guaranteed("1", "2Gi"), Verdict::Fits),
            (memory, guaranteed("1", "2Gi"), Verdict::Infeasible(Infeasible::StaticMemory)),
            (memory, guaranteed("2", "1Gi"), Verdict::Fits),
        ] {
            assert_eq!(review(&new, &old, &room(&[]), &policy), expected);
        }
        let burstable = |cpu: &str| pod(asks(cpu, "1Gi"));
        assert_eq!(review(&burstable("2"), &burstable("1"), &room(&[]), &cpus), Verdict::Fits);
    }

    #[test]
    fn p70_what_is_infeasible_is_worded_as_upstream() {
        let static_cpu = r#"Resize is infeasible for Guaranteed Pods alongside CPU Manager policy "static""#;
        let static_memory = r#"Resize is infeasible for Guaranteed Pods alongside Memory Manager policy "Static""#;
        for (why, text) in [
            (Infeasible::Swap, "In-place resize of containers with swap is not supported."),
            (Infeasible::PodLevel, "InPlacePodLevelResourcesVerticalScaling is disabled"),
            (Infeasible::StaticCpus, static_cpu),
            (Infeasible::StaticMemory, static_memory),
        ] {
            assert_eq!(why.to_string(), text);
        }
    }

    #[test]
    fn p70_swap_and_pod_level_gate() {
        let swap = ResizePolicy { limited_swap: true, ..ResizePolicy::default() };
        let refused = Verdict::Infeasible(Infeasible::Swap);
        assert_eq!(review(&pod(asks("1", "2Gi")), &pod(asks("1", "1Gi")), &room(&[]), &swap), refused);
        assert_eq!(review(&pod(asks("2", "1Gi")), &pod(asks("1", "1Gi")), &room(&[]), &swap), Verdict::Fits);
        let restarts = |memory: &str| {
            let mut spec = asks("1", memory);
            spec["containers"][0]["resizePolicy"] =
                json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
            pod(spec)
        };
        assert_eq!(review(&restarts("2Gi"), &restarts("1Gi"), &room(&[]), &swap), Verdict::Fits);

        let whole = |cpu: &str| pod(json!({"resources": {"requests": {"cpu": cpu}}, "containers": [{"name": "c"}]}));
        let off = ResizePolicy { pod_level: false, ..ResizePolicy::default() };
        let refused = Verdict::Infeasible(Infeasible::PodLevel);
        assert_eq!(review(&whole("2"), &whole("1"), &room(&[]), &off), refused);
    }

    #[test]
    fn p70_deferred_ones_are_retried_in_upstreams_order() {
        let waiting = |name: &str, cpu: &str, priority: i32, guaranteed: bool, since: i64| {
            let all = json!({"cpu": cpu, "memory": "1Gi"});
            let limits = if guaranteed { all.clone() } else { json!({}) };
            let old = json!({"cpu": "1", "memory": "1Gi"});
            let made = |requests: &Value, limits: &Value| {
                let spec = json!({"priority": priority,
                    "containers": [{"name": name, "resources": {"requests": requests, "limits": limits}}]});
                pod(spec)
            };
            Waiting {
                desired: made(&all, &limits),
                allocated: made(&old, &limits),
                since: Some(Timestamp::from_second(since).unwrap()),
            }
        };
        let mut list = [
            waiting("young", "2", 0, false, 9),
            waiting("old", "2", 0, false, 3),
            waiting("guaranteed", "2", 0, true, 9),
            waiting("important", "2", 7, false, 9),
            waiting("shrinks", "500m", 0, false, 9),
        ];
        list.sort_by(before);
        let names: Vec<&str> = list.iter().map(|w| w.desired.spec().containers[0].name.as_str()).collect();
        assert_eq!(names, ["shrinks", "important", "guaranteed", "old", "young"]);
    }

    #[test]
    fn p72_events_carry_a_summary() {
        let pod = pod(json!({"initContainers": [{"name": "i"}], "containers": [
            {"name": "c", "resources": {"requests": {"memory": "1Gi", "cpu": "1"}, "limits": {"cpu": "2"}}}]}));
        assert_eq!(
            summary(&pod, 3, ""),
            r#"{"initContainers":[{"name":"i","resources":{}}],"containers":[{"name":"c","resources":{"limits":{"cpu":"2"},"requests":{"cpu":"1","memory":"1Gi"}}}],"generation":3}"#
        );
        assert!(summary(&pod, 3, "no \"room\"").ends_with(r#""generation":3,"error":"no \"room\""}"#));
    }
}
