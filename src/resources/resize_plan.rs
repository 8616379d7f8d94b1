//! From "allocated" to "in force": which containers are to be updated or restarted, and in which order the cgroups change (contract P-71). Pure.
//!
//! Memory before CPU. A limit of the pod grows before its containers and shrinks after them, so that no child is ever allowed more than its
//! parent; among containers, what shrinks goes first. When the pod grows its limit grows before its request, when it shrinks the request goes first.

use k8s_openapi::api::core::v1::Container;

use super::{
    allocation::restarts_on,
    pod_resources::{CPU, ContainerSize, MEMORY, PodResources, PodSize, same_resources},
};
use crate::pods::{ContainerKind, ContainerRef, Pod};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    Memory,
    Cpu,
}

/// A running container's resources are to change from what is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerUpdate {
    pub name: String,
    /// Without the runtime's scheme.
    pub id: String,
    pub from: ContainerSize,
    pub to: ContainerSize,
}

/// What has to happen to one running container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerNeed {
    Keep,
    /// Its `resizePolicy` wants a restart for a resource that changes.
    Restart,
    Update {
        from: ContainerSize,
        to: ContainerSize,
    },
}

/// `actuated`: what is in force; a container without a record has what it is allocated. An init container that runs once is never
/// restarted for its size.
pub fn container_need(pod: &Pod, container: ContainerRef<'_>, actuated: &PodResources) -> ContainerNeed {
    if container.kind == ContainerKind::Ephemeral {
        return ContainerNeed::Keep;
    }
    let to = ContainerSize::of(container.spec.resources.as_ref(), pod.spec().resources.as_ref());
    let Some(record) = actuated.containers.get(container.name()) else { return ContainerNeed::Keep };
    let whole = actuated.pod_level.as_ref().or(pod.spec().resources.as_ref());
    let from = ContainerSize::of(Some(record), whole);
    if from == to {
        return ContainerNeed::Keep;
    }
    let changes = [
        (CPU, (from.cpu_request, from.cpu_limit) != (to.cpu_request, to.cpu_limit)),
        (MEMORY, (from.memory_request, from.memory_limit) != (to.memory_request, to.memory_limit)),
    ];
    let once = container.kind == ContainerKind::Init;
    let restart = |spec: &Container| !once && changes.iter().any(|(name, changes)| *changes && restarts_on(spec, name));
    if restart(container.spec) { ContainerNeed::Restart } else { ContainerNeed::Update { from, to } }
}

/// The pod's own cgroup is to change. `set`: what this process last set it to; before that, what is in force decides.
pub fn pod_differs(pod: &Pod, actuated: &PodResources, set: Option<&PodSize>, pod_level: bool) -> bool {
    let on_record = || {
        let whole = pod_level && actuated.pod_level.is_some();
        whole && !same_resources(actuated.pod_level.as_ref(), pod.spec().resources.as_ref())
    };
    let had = || PodSize::of(&actuated.shown_in(pod, pod_level && actuated.pod_level.is_some()));
    match set {
        Some(set) => *set != PodSize::of(pod) || on_record(),
        None => !actuated.matches(pod, pod_level) && (on_record() || had() != PodSize::of(pod)),
    }
}

/// Nothing of the pod waits to be resized.
pub fn settled(pod: &Pod, actuated: &PodResources, pod_level: bool) -> bool {
    let keeps = |c: ContainerRef<'_>| container_need(pod, c, actuated) == ContainerNeed::Keep;
    pod.containers().all(keeps) && !pod_differs(pod, actuated, None, pod_level)
}

/// Limits of a pod's cgroup, in force or wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodCgroup {
    /// Bytes; `None`: no limit, or leave it as it is.
    pub memory: Option<i64>,
    /// µs per `cpu_period`; `None`: no quota, or leave it as it is.
    pub cpu_quota: Option<i64>,
    pub cpu_period: u64,
    /// `cpu.shares` on version 1, `cpu.weight` on version 2.
    pub cpu_share: u64,
}

/// One step of a resize, carried out in order; the first that fails ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The pod cgroup's memory limit or CPU quota.
    PodLimit(Resource),
    /// The pod cgroup's CPU shares. Memory requests have no file.
    PodRequest(Resource),
    /// The update at this index.
    Container(usize, Resource),
    /// Pod-level resources of this kind are in force.
    PodDone(Resource),
}

/// The order of a resize. `pod`: the pod's own resources change too. `now` `None`: its cgroup is not ours to set.
pub fn steps(now: Option<&PodCgroup>, wanted: Option<&PodCgroup>, updates: &[ContainerUpdate], pod: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    for resource in [Resource::Memory, Resource::Cpu] {
        let containers = container_order(updates, resource);
        if containers.is_empty() && !pod {
            continue;
        }
        let (limit, request) = match now.zip(wanted) {
            Some((now, wanted)) => (limit_change(now, wanted, resource), request_change(now, wanted, resource)),
            None => (0, 0),
        };
        let mut step = |when: bool, step: Step| steps.extend(when.then_some(step));
        step(limit > 0, Step::PodLimit(resource));
        step(request > 0, Step::PodRequest(resource));
        for index in containers {
            step(true, Step::Container(index, resource));
        }
        step(request < 0, Step::PodRequest(resource));
        step(limit < 0, Step::PodLimit(resource));
        step(pod, Step::PodDone(resource));
    }
    steps
}

/// 1: grows, -1: shrinks. What is not wanted stays.
fn limit_change(now: &PodCgroup, wanted: &PodCgroup, resource: Resource) -> i32 {
    let (have, want) = match resource {
        Resource::Memory => (now.memory, wanted.memory),
        // Per period, so that another period does not look like another limit.
        Resource::Cpu => (per_mille(now), per_mille(wanted)),
    };
    match want {
        None => 0,
        Some(want) => want.cmp(&have.unwrap_or(i64::MAX)) as i32,
    }
}

fn per_mille(cgroup: &PodCgroup) -> Option<i64> {
    let period = i64::try_from(cgroup.cpu_period.max(1)).unwrap_or(i64::MAX);
    cgroup.cpu_quota.map(|quota| quota.saturating_mul(1000) / period)
}

fn request_change(now: &PodCgroup, wanted: &PodCgroup, resource: Resource) -> i32 {
    match resource {
        Resource::Memory => 0,
        Resource::Cpu => wanted.cpu_share.cmp(&now.cpu_share) as i32,
    }
}

/// By the limit if it changes, else by the request; shrinking ones first, the last of them foremost.
fn container_order(updates: &[ContainerUpdate], resource: Resource) -> Vec<usize> {
    let (mut shrinking, mut growing) = (Vec::new(), Vec::new());
    for (index, update) in updates.iter().enumerate() {
        let (from, to) = (&update.from, &update.to);
        let (limit, request) = match resource {
            Resource::Memory => ((from.memory_limit, to.memory_limit), (from.memory_request, to.memory_request)),
            Resource::Cpu => ((from.cpu_limit, to.cpu_limit), (from.cpu_request, to.cpu_request)),
        };
        let (have, want) = if limit.0 == limit.1 { request } else { limit };
        match want.cmp(&have) {
            std::cmp::Ordering::Less => shrinking.insert(0, index),
            std::cmp::Ordering::Greater => growing.push(index),
            std::cmp::Ordering::Equal => {}
        }
    }
    shrinking.extend(growing);
    shrinking
}

/// What a container is set to in the step of one resource: that one as wanted, the other as it was after the steps before.
pub fn size_at(update: &ContainerUpdate, in_force: ContainerSize, resource: Resource) -> ContainerSize {
    let to = update.to;
    match resource {
        Resource::Memory => {
            ContainerSize { memory_request: to.memory_request, memory_limit: to.memory_limit, ..in_force }
        }
        Resource::Cpu => ContainerSize { cpu_request: to.cpu_request, cpu_limit: to.cpu_limit, ..in_force },
    }
}

/// Why memory limits may not shrink now: something uses as much already. Bytes in use; `None`: not known.
pub fn memory_shrinks_below_use(
    now: Option<&PodCgroup>,
    wanted: Option<&PodCgroup>,
    updates: &[ContainerUpdate],
    pod_use: Option<u64>,
    container_use: impl Fn(&str) -> Option<u64>,
) -> Result<(), String> {
    let mut why = Vec::new();
    if let Some(limit) = shrinking_pod_limit(now, wanted) {
        match pod_use {
            None => why.push("missing pod memory usage".to_owned()),
            Some(used) if used >= limit => {
                why.push(format!("attempting to set pod memory limit ({limit}) below current usage ({used})"));
            }
            Some(_) => {}
        }
    }
    for update in updates.iter().filter(|update| shrinks_memory(update)) {
        let (name, limit) = (&update.name, update.to.memory_limit);
        match container_use(&update.id) {
            None => why.push(format!("missing container {name:?} memory usage")),
            Some(used) if used >= u64::try_from(limit).unwrap_or(0) => why.push(format!(
                "attempting to set container {name:?} memory limit ({limit}) below current usage ({used})"
            )),
            Some(_) => {}
        }
    }
    match why.as_slice() {
        [] => Ok(()),
        [one] => Err(format!("cannot decrease memory limits: {one}")),
        many => Err(format!("cannot decrease memory limits: [{}]", many.join(", "))),
    }
}

/// Memory use has to be known before these updates.
pub fn shrinks_any_memory(now: Option<&PodCgroup>, wanted: Option<&PodCgroup>, updates: &[ContainerUpdate]) -> bool {
    shrinking_pod_limit(now, wanted).is_some() || updates.iter().any(shrinks_memory)
}

fn shrinking_pod_limit(now: Option<&PodCgroup>, wanted: Option<&PodCgroup>) -> Option<u64> {
    let (now, limit) = (now?, wanted?.memory?);
    now.memory.is_none_or(|have| limit < have).then(|| u64::try_from(limit).unwrap_or(0))
}

fn shrinks_memory(update: &ContainerUpdate) -> bool {
    let (from, to) = (update.from.memory_limit, update.to.memory_limit);
    to != 0 && (from == 0 || to < from)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::requests::tests::pod, *};

    const GI: i64 = 1 << 30;

    fn update(name: &str, memory: (i64, i64), cpu: (i64, i64)) -> ContainerUpdate {
        let size = |memory, cpu| ContainerSize {
            cpu_request: cpu,
            cpu_limit: cpu,
            memory_request: memory,
            memory_limit: memory,
        };
        ContainerUpdate { name: name.into(), id: name.into(), from: size(memory.0, cpu.0), to: size(memory.1, cpu.1) }
    }

    fn cgroup(memory: i64, quota: i64, share: u64) -> PodCgroup {
        PodCgroup { memory: Some(memory), cpu_quota: Some(quota), cpu_period: 100_000, cpu_share: share }
    }

    fn order(now: PodCgroup, wanted: PodCgroup, updates: &[ContainerUpdate]) -> Vec<String> {
        let name = |step: &Step| match step {
            Step::PodLimit(resource) => format!("pod limit {resource:?}"),
            Step::PodRequest(resource) => format!("pod request {resource:?}"),
            Step::Container(index, resource) => format!("{} {resource:?}", updates[*index].name),
            Step::PodDone(resource) => format!("done {resource:?}"),
        };
        steps(Some(&now), Some(&wanted), updates, true).iter().map(name).collect()
    }

    #[test]
    fn p71_the_pod_grows_before_its_containers() {
        let updates = [update("c", (GI, 2 * GI), (100, 200))];
        assert_eq!(
            order(cgroup(GI, 10_000, 102), cgroup(2 * GI, 20_000, 204), &updates),
            ["pod limit Memory", "c Memory", "done Memory", "pod limit Cpu", "pod request Cpu", "c Cpu", "done Cpu"]
        );
    }

    #[test]
    fn p71_and_shrinks_after_them() {
        let updates = [update("c", (2 * GI, GI), (200, 100))];
        assert_eq!(
            order(cgroup(2 * GI, 20_000, 204), cgroup(GI, 10_000, 102), &updates),
            ["c Memory", "pod limit Memory", "done Memory", "c Cpu", "pod request Cpu", "pod limit Cpu", "done Cpu"]
        );
    }

    #[test]
    fn p71_memory_and_cpu_each_in_their_own_order_and_shrinking_containers_first() {
        let updates = [
            update("a", (GI, 3 * GI), (300, 100)),
            update("b", (3 * GI, GI), (100, 200)),
            update("c", (2 * GI, GI), (5, 5)),
        ];
        assert_eq!(
            order(cgroup(6 * GI, 40_000, 400), cgroup(5 * GI, 40_000, 400), &updates),
            ["c Memory", "b Memory", "a Memory", "pod limit Memory", "done Memory", "a Cpu", "b Cpu", "done Cpu"]
        );
    }

    #[test]
    fn p71_nothing_is_set_that_is_not_asked_for() {
        let only_cpu = [update("c", (GI, GI), (100, 200))];
        let now = cgroup(GI, 10_000, 102);
        let wanted = PodCgroup { memory: None, cpu_quota: None, cpu_period: 100_000, cpu_share: 204 };
        let expected = [Step::PodRequest(Resource::Cpu), Step::Container(0, Resource::Cpu)];
        assert_eq!(steps(Some(&now), Some(&wanted), &only_cpu, false), expected);
        assert_eq!(steps(None, None, &only_cpu, false), [Step::Container(0, Resource::Cpu)]);
    }

    #[test]
    fn p71_a_first_limit_counts_as_shrinking() {
        let unlimited = PodCgroup { memory: None, cpu_quota: None, cpu_period: 100_000, cpu_share: 2 };
        let updates = [update("c", (0, GI), (0, 100))];
        assert_eq!(
            order(unlimited, cgroup(GI, 10_000, 2), &updates),
            ["c Memory", "pod limit Memory", "done Memory", "c Cpu", "pod limit Cpu", "done Cpu"]
        );
    }

    #[test]
    fn p71_no_memory_limit_below_what_is_in_use() {
        let updates = [update("a", (2 * GI, GI), (1, 1)), update("b", (GI, 2 * GI), (1, 1))];
        let (now, wanted) = (cgroup(3 * GI, 1, 1), cgroup(2 * GI, 1, 1));
        let check = |pod: Option<u64>, a: Option<u64>| {
            memory_shrinks_below_use(Some(&now), Some(&wanted), &updates, pod, |id| a.filter(|_| id == "a"))
        };
        assert_eq!(check(Some(5), Some(5)), Ok(()));
        assert_eq!(
            check(Some(5), Some(1 << 30)).unwrap_err(),
            "cannot decrease memory limits: attempting to set container \"a\" memory limit (1073741824) below current usage (1073741824)"
        );
        assert_eq!(
            check(Some(1 << 31), None).unwrap_err(),
            "cannot decrease memory limits: [attempting to set pod memory limit (2147483648) below current usage (2147483648), missing container \"a\" memory usage]"
        );
        assert_eq!(check(None, Some(5)).unwrap_err(), "cannot decrease memory limits: missing pod memory usage");
        let grows = [update("b", (GI, 2 * GI), (1, 1))];
        assert!(!shrinks_any_memory(Some(&wanted), Some(&now), &grows));
        assert_eq!(memory_shrinks_below_use(Some(&wanted), Some(&now), &grows, None, |_| None), Ok(()));
    }

    fn with(cpu: &str, memory: &str, policy: &Value) -> Pod {
        pod(json!({"containers": [{"name": "c", "resizePolicy": policy,
            "resources": {"requests": {"cpu": cpu, "memory": memory}}}]}))
    }

    #[test]
    fn p71_the_policy_of_what_changes_decides_about_a_restart() {
        let policy = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"},
            {"resourceName": "cpu", "restartPolicy": "NotRequired"}]);
        let in_force = PodResources::of(&with("1", "1Gi", &policy), true);
        let need = |pod: &Pod| container_need(pod, pod.containers().next().unwrap(), &in_force);
        assert_eq!(need(&with("1", "1Gi", &policy)), ContainerNeed::Keep);
        assert!(matches!(need(&with("2", "1Gi", &policy)), ContainerNeed::Update { .. }));
        assert_eq!(need(&with("1", "2Gi", &policy)), ContainerNeed::Restart);
        assert_eq!(need(&with("2", "2Gi", &policy)), ContainerNeed::Restart);
        assert!(matches!(need(&with("1", "2Gi", &json!([]))), ContainerNeed::Update { .. }), "NotRequired by default");
        let none = PodResources::default();
        let pod = with("9", "9Gi", &policy);
        assert_eq!(container_need(&pod, pod.containers().next().unwrap(), &none), ContainerNeed::Keep);
    }

    #[test]
    fn p74_init_containers_are_resized_too_and_those_that_run_once_are_never_restarted_for_it() {
        let spec = |cpu: &str| {
            let asks = json!({"requests": {"cpu": cpu}});
            let policy = json!([{"resourceName": "cpu", "restartPolicy": "RestartContainer"}]);
            pod(json!({"initContainers": [{"name": "i", "resources": asks, "resizePolicy": policy},
                {"name": "s", "restartPolicy": "Always", "resources": asks, "resizePolicy": policy}],
                "containers": [{"name": "c"}]}))
        };
        let in_force = PodResources::of(&spec("1"), true);
        let pod = spec("2");
        let needs: Vec<_> = pod.init_containers().map(|c| container_need(&pod, c, &in_force)).collect();
        assert!(matches!(needs[0], ContainerNeed::Update { .. }));
        assert_eq!(needs[1], ContainerNeed::Restart);
    }

    #[test]
    fn p75_the_pods_cgroup_follows_sums_and_pod_level_resources() {
        let none = json!([]);
        let (old, new) = (with("1", "1Gi", &none), with("2", "1Gi", &none));
        let in_force = PodResources::of(&old, true);
        assert!(!pod_differs(&old, &in_force, None, true));
        assert!(pod_differs(&new, &in_force, None, true));
        assert!(!pod_differs(&new, &in_force, Some(&PodSize::of(&new)), true), "already set by this process");
        let whole = |cpu: &str| pod(json!({"resources": {"limits": {"cpu": cpu}}, "containers": [{"name": "c"}]}));
        let in_force = PodResources::of(&whole("1"), true);
        assert!(pod_differs(&whole("2"), &in_force, Some(&PodSize::of(&whole("2"))), true), "not on record yet");
        assert!(!pod_differs(&whole("2"), &in_force, Some(&PodSize::of(&whole("2"))), false));
    }
}
