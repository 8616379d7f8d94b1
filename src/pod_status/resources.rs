//! What a pod's status says of its resources: allocated, in force, and the two resize conditions (contract P-72, P-75). Pure.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{ContainerStatus, PodCondition, PodStatus, ResourceRequirements},
    apimachinery::pkg::api::resource::Quantity as ApiQuantity,
};

use super::generate::StatusInput;
use crate::{
    cri::{Container, ContainerState},
    pods::Pod,
    quantity::Quantity,
    resources::{
        PodResources, PodSize, QosClass, ResizeCondition, ResizeConditions, ResourceList, cpu_quota, cpu_shares,
        cpu_weight, milli_of_quota, milli_of_shares, pod_limits, pod_requests, qos_class, resource_list,
        shares_of_weight,
    },
};

const CPU: &str = "cpu";
const MEMORY: &str = "memory";
/// At or below these the cgroup's floor is in force: then the allocated amount is shown.
const LEAST_MILLI_REQUEST: i64 = 2;
const LEAST_MILLI_LIMIT: i64 = 10;
const PERIOD: i64 = 100_000;

/// What the ledger of resources knows of the pod.
#[derive(Clone, Copy)]
pub struct ResourceView<'a> {
    pub resize: &'a ResizeConditions,
    pub actuated: &'a PodResources,
    /// Pod-level resources are shown.
    pub pod_level: bool,
}

type Amounts = BTreeMap<String, ApiQuantity>;

/// `PodResizePending` and `PodResizeInProgress`, each only while it holds.
pub(super) fn conditions(input: &StatusInput<'_>) -> impl Iterator<Item = PodCondition> {
    let resize = input.resources.resize;
    let made = |kind: &str, condition: &Option<ResizeCondition>| {
        let c = condition.as_ref()?;
        Some(PodCondition {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            reason: Some(c.reason.clone()).filter(|r| !r.is_empty()),
            message: Some(c.message.clone()).filter(|m| !m.is_empty()),
            last_transition_time: Some(crate::time::api_time(c.since)),
            last_probe_time: Some(crate::time::api_time(c.at)),
            observed_generation: Some(c.generation).filter(|g| *g > 0),
        })
    };
    let pending = made("PodResizePending", &resize.pending);
    pending.into_iter().chain(made("PodResizeInProgress", &resize.in_progress))
}

/// A container's resources in force: what the runtime says of a running one, what was put into force where it does not say, and what was shown
/// before where neither does. `allocated`: its spec's resources, as allocated.
pub(super) fn container(
    input: &StatusInput<'_>,
    allocated: Option<&ResourceRequirements>,
    latest: &Container,
    old: Option<&ContainerStatus>,
) -> ResourceRequirements {
    let mut resources = allocated.cloned().unwrap_or_default();
    if latest.state != ContainerState::Running {
        return resources;
    }
    let said = Said::of(latest, input.resources.actuated.containers.get(&latest.name));
    let id = format!("{}://{}", input.runtime_name, latest.id);
    let before = old
        .filter(|o| o.container_id.as_deref() == Some(id.as_str()))
        .filter(|o| o.state.as_ref().is_some_and(|s| s.running.is_some()))
        .and_then(|o| o.resources.as_ref());
    let put = |list: &mut Amounts, name: &str, said: Option<Quantity>, floor: i64, earlier: Option<&Amounts>| {
        let have = list.get(name).and_then(|q| Quantity::try_from(q).ok()).map_or(0, |q| q.milli_value());
        match said {
            Some(amount) if amount.milli_value() > floor || have > floor => {
                list.insert(name.to_owned(), amount.into());
            }
            Some(_) => {}
            None => {
                if let Some(amount) = earlier.and_then(|list| list.get(name)) {
                    list.insert(name.to_owned(), amount.clone());
                }
            }
        }
    };
    if let Some(limits) = &mut resources.limits {
        let earlier = before.and_then(|b| b.limits.as_ref());
        put(limits, CPU, said.cpu_limit, LEAST_MILLI_LIMIT, earlier);
        put(limits, MEMORY, said.memory_limit, 0, earlier);
    }
    if let Some(requests) = &mut resources.requests {
        let earlier = before.and_then(|b| b.requests.as_ref());
        put(requests, CPU, said.cpu_request, LEAST_MILLI_REQUEST, earlier);
        put(requests, MEMORY, said.memory_request, 0, earlier);
    }
    resources
}

/// What is known to be in force.
#[derive(Default)]
struct Said {
    cpu_request: Option<Quantity>,
    cpu_limit: Option<Quantity>,
    memory_request: Option<Quantity>,
    memory_limit: Option<Quantity>,
}

impl Said {
    fn of(latest: &Container, record: Option<&ResourceRequirements>) -> Self {
        let milli = |milli: i64| Some(Quantity::from_millis(milli)).filter(|_| milli > 0);
        let mut said = latest.resources.as_ref().map_or_else(Self::default, |linux| Self {
            cpu_request: milli(milli_of_shares(linux.cpu_shares)),
            cpu_limit: milli(milli_of_quota(linux.cpu_quota, linux.cpu_period)),
            memory_request: None,
            memory_limit: Some(linux.memory_limit_in_bytes).filter(|b| *b > 0).map(Quantity::from_bytes),
        });
        let Some(record) = record else { return said };
        let (requests, limits) = (resource_list(record.requests.as_ref()), resource_list(record.limits.as_ref()));
        let amount = |list: &ResourceList, name: &str| list.get(name).copied().filter(|q| !q.is_zero());
        if said.cpu_request.or(said.cpu_limit).or(said.memory_limit).is_none() {
            said.cpu_request = amount(&requests, CPU);
            said.cpu_limit = amount(&limits, CPU);
            said.memory_limit = amount(&limits, MEMORY);
        }
        // No cgroup has a memory request.
        said.memory_request = amount(&requests, MEMORY);
        said
    }
}

/// `status.resources` and `status.allocatedResources` of the pod as a whole.
pub(super) fn pod(input: &StatusInput<'_>, status: &mut PodStatus) {
    if !input.resources.pod_level {
        return;
    }
    status.allocated_resources = amounts(&pod_requests(input.pod));
    let running = input.pod.api_status().phase.as_deref() == Some("Running");
    status.resources = Some(if running { in_force(input) } else { allocated(input.pod) });
}

fn amounts(list: &ResourceList) -> Option<Amounts> {
    let list: Amounts = list.iter().map(|(name, amount)| (name.clone(), (*amount).into())).collect();
    Some(list).filter(|l| !l.is_empty())
}

fn allocated(pod: &Pod) -> ResourceRequirements {
    let claims = pod.spec().resources.as_ref().and_then(|r| r.claims.clone());
    ResourceRequirements { claims, limits: amounts(&pod_limits(pod)), requests: amounts(&pod_requests(pod)) }
}

/// What the pod's cgroup has, as the API would read it back from there.
fn in_force(input: &StatusInput<'_>) -> ResourceRequirements {
    let pod = input.pod;
    let size = PodSize::of(&input.resources.actuated.shown_in(pod, true));
    let mut shown = pod.spec().resources.clone().unwrap_or_default();
    let (requests, limits) = (shown.requests.get_or_insert_default(), shown.limits.get_or_insert_default());
    let milli = |list: &Amounts, name: &str| {
        list.get(name).and_then(|q| Quantity::try_from(q).ok()).map_or(0, |q| q.milli_value())
    };
    let round_trip = |shares: u64| if input.node.cgroup_v2 { shares_of_weight(cpu_weight(shares)) } else { shares };
    let best_effort = qos_class(pod) == QosClass::BestEffort;
    let shares = round_trip(if best_effort { 2 } else { cpu_shares(size.cpu_request) });
    let (request, asked) = (milli_of_shares(i64::try_from(shares).unwrap_or(i64::MAX)), milli(requests, CPU));
    if (request > LEAST_MILLI_REQUEST || asked > LEAST_MILLI_REQUEST) && round_trip(cpu_shares(asked)) != shares {
        requests.insert(CPU.to_owned(), Quantity::from_millis(request).into());
    }
    if !requests.contains_key(MEMORY)
        && let Some(memory) = pod_requests(pod).get(MEMORY)
    {
        requests.insert(MEMORY.to_owned(), (*memory).into());
    }
    let limit = size.cpu_limit.map(|limit| milli_of_quota(cpu_quota(limit, PERIOD), PERIOD)).filter(|milli| *milli > 0);
    if let Some(limit) = limit.filter(|limit| *limit > LEAST_MILLI_LIMIT || milli(limits, CPU) > LEAST_MILLI_LIMIT) {
        limits.insert(CPU.to_owned(), Quantity::from_millis(limit).into());
    }
    if let Some(bytes) = size.memory_limit.filter(|bytes| *bytes > 0) {
        limits.insert(MEMORY.to_owned(), Quantity::from_bytes(bytes).into());
    }
    for list in [&mut shown.requests, &mut shown.limits] {
        *list = list.take().filter(|l| !l.is_empty());
    }
    shown
}

#[cfg(test)]
#[path = "resources_tests.rs"]
mod tests;
