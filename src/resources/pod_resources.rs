//! What one pod holds of the resources that can be resized in place, apart from its spec. Pure.
//!
//! The same shape serves for what the node has *allocated* to a pod and for what is *actuated* (in force at the runtime). Its JSON is one entry
//! of upstream's checkpoints (contract P-73). A pod may be shown with it in place of its spec's resources.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity as ApiQuantity};
use serde::{Deserialize, Deserializer, Serialize};

use super::{
    cgroups::limited,
    requests::{ResourceList, pod_limits, pod_requests, resource_list},
};
use crate::{pods::Pod, quantity::Quantity};

pub(super) const CPU: &str = "cpu";
pub(super) const MEMORY: &str = "memory";

/// Requests and limits of a pod's containers (mains, init containers, sidecars) and of the pod as a whole.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PodResources {
    #[serde(rename = "ContainerResources", default, deserialize_with = "null_is_empty")]
    pub containers: BTreeMap<String, ResourceRequirements>,
    #[serde(rename = "PodLevelResources", default)]
    pub pod_level: Option<ResourceRequirements>,
    /// Sizes of memory-backed emptyDirs: kept as they were found, never resized (alpha feature).
    #[serde(rename = "EmptyDirVolumeLimits", default)]
    pub volumes: Option<BTreeMap<String, ApiQuantity>>,
}

fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

impl PodResources {
    /// What the spec asks for. `pod_level`: pod-level resources can be resized on this node.
    pub fn of(pod: &Pod, pod_level: bool) -> Self {
        let own =
            |c: crate::pods::ContainerRef<'_>| (c.name().to_owned(), c.spec.resources.clone().unwrap_or_default());
        Self {
            containers: pod.containers().map(own).collect(),
            pod_level: pod.spec().resources.clone().filter(|_| pod_level),
            volumes: None,
        }
    }

    /// The pod asks for just this. A container that is not on record, and pod-level resources that cannot be resized, differ in nothing.
    pub fn matches(&self, pod: &Pod, pod_level: bool) -> bool {
        let containers = pod.containers().all(|c| {
            let held = self.containers.get(c.name());
            held.is_none_or(|held| same_resources(Some(held), c.spec.resources.as_ref()))
        });
        containers && (!pod_level || same_resources(self.pod_level.as_ref(), pod.spec().resources.as_ref()))
    }

    /// The pod with these in place of its spec's; the very same object when they do not differ.
    #[must_use]
    pub fn shown_in(&self, pod: &Pod, pod_level: bool) -> Pod {
        if self.matches(pod, pod_level) {
            return pod.clone();
        }
        let whole = if pod_level { self.pod_level.clone() } else { pod.spec().resources.clone() };
        pod.with_resources(&self.containers, whole)
    }
}

/// Same amounts in requests and limits; absent and empty are the same.
pub fn same_resources(a: Option<&ResourceRequirements>, b: Option<&ResourceRequirements>) -> bool {
    let requests = |r: Option<&ResourceRequirements>| resource_list(r.and_then(|r| r.requests.as_ref()));
    let limits = |r: Option<&ResourceRequirements>| resource_list(r.and_then(|r| r.limits.as_ref()));
    requests(a) == requests(b) && limits(a) == limits(b)
}

/// CPU in millicores and memory in bytes that apply to one container, 0 for none. A limit that the container does not set is the pod's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ContainerSize {
    pub cpu_request: i64,
    pub cpu_limit: i64,
    pub memory_request: i64,
    pub memory_limit: i64,
}

impl ContainerSize {
    pub fn of(own: Option<&ResourceRequirements>, whole: Option<&ResourceRequirements>) -> Self {
        let requests = resource_list(own.and_then(|r| r.requests.as_ref()));
        let limits = resource_list(own.and_then(|r| r.limits.as_ref()));
        let pods = resource_list(whole.and_then(|r| r.limits.as_ref()));
        let limit = |name: &str| {
            let own = limits.get(name).filter(|l| !l.is_zero());
            own.or_else(|| pods.get(name)).copied().unwrap_or(Quantity::ZERO)
        };
        Self {
            cpu_request: milli(&requests, CPU),
            cpu_limit: limit(CPU).milli_value(),
            memory_request: bytes(&requests, MEMORY),
            memory_limit: limit(MEMORY).value(),
        }
    }

    /// As the API writes it, with everything else that `base` names.
    pub fn requirements(&self, base: Option<&ResourceRequirements>) -> ResourceRequirements {
        let mut made = base.cloned().unwrap_or_default();
        let put = |list: &mut Option<BTreeMap<String, ApiQuantity>>, name: &str, amount: i64, quantity: Quantity| {
            let map = list.get_or_insert_default();
            match amount {
                0 => map.remove(name),
                _ => map.insert(name.to_owned(), quantity.into()),
            };
        };
        put(&mut made.requests, CPU, self.cpu_request, Quantity::from_millis(self.cpu_request));
        put(&mut made.requests, MEMORY, self.memory_request, Quantity::from_bytes(self.memory_request));
        put(&mut made.limits, CPU, self.cpu_limit, Quantity::from_millis(self.cpu_limit));
        put(&mut made.limits, MEMORY, self.memory_limit, Quantity::from_bytes(self.memory_limit));
        for list in [&mut made.requests, &mut made.limits] {
            *list = list.take().filter(|l| !l.is_empty());
        }
        made
    }
}

/// What the cgroup of the whole pod follows from: millicores and bytes. A limit is `None` unless every container (or the pod) has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PodSize {
    pub cpu_request: i64,
    pub cpu_limit: Option<i64>,
    pub memory_request: i64,
    pub memory_limit: Option<i64>,
}

impl PodSize {
    pub fn of(pod: &Pod) -> Self {
        let (requests, limits) = (pod_requests(pod), pod_limits(pod));
        Self {
            cpu_request: milli(&requests, CPU),
            cpu_limit: limited(pod, CPU).then(|| milli(&limits, CPU)),
            memory_request: bytes(&requests, MEMORY),
            memory_limit: limited(pod, MEMORY).then(|| bytes(&limits, MEMORY)),
        }
    }
}

fn milli(list: &ResourceList, name: &str) -> i64 {
    list.get(name).map_or(0, Quantity::milli_value)
}

fn bytes(list: &ResourceList, name: &str) -> i64 {
    list.get(name).map_or(0, Quantity::value)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::requests::tests::pod, *};

    fn requirements(value: Value) -> ResourceRequirements {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn p72_amounts_count_not_spelling() {
        let same = |a: Value, b: Value| same_resources(Some(&requirements(a)), Some(&requirements(b)));
        assert!(same(json!({"requests": {"cpu": "1"}}), json!({"requests": {"cpu": "1000m"}})));
        assert!(same(json!({"requests": {}}), json!({})));
        assert!(!same(json!({"requests": {"cpu": "1"}}), json!({"limits": {"cpu": "1"}})));
        assert!(same_resources(None, Some(&ResourceRequirements::default())));
    }

    #[test]
    fn p72_a_pod_shows_what_it_is_allocated() {
        let pod = pod(json!({"containers": [
            {"name": "a", "resources": {"requests": {"cpu": "2"}}}, {"name": "b", "resources": {"requests": {"cpu": "1"}}}]}));
        let mut held = PodResources::of(&pod, true);
        assert!(held.shown_in(&pod, true).same_object(&pod), "nothing differs, nothing is copied");
        held.containers.insert("a".into(), requirements(json!({"requests": {"cpu": "1500m"}})));
        let shown = held.shown_in(&pod, true);
        assert_eq!(PodSize::of(&shown).cpu_request, 2500);
        assert_eq!(PodSize::of(&pod).cpu_request, 3000);
        held.containers.remove("a");
        assert!(held.matches(&pod, true), "what is not on record differs in nothing");
    }

    #[test]
    fn p75_a_containers_limit_stands_before_the_pods() {
        let whole = requirements(json!({"limits": {"cpu": "2", "memory": "1Gi"}}));
        let own = requirements(json!({"requests": {"cpu": "100m"}, "limits": {"cpu": "1"}}));
        let size = ContainerSize::of(Some(&own), Some(&whole));
        let expected = ContainerSize { cpu_request: 100, cpu_limit: 1000, memory_request: 0, memory_limit: 1 << 30 };
        assert_eq!(size, expected);
        let written = size.requirements(Some(&requirements(json!({"limits": {"hugepages-2Mi": "4Mi"}}))));
        let back = ContainerSize::of(Some(&written), None);
        assert_eq!((back, written.limits.unwrap().len()), (size, 3));
    }

    #[test]
    fn p75_limits_of_the_pod_need_every_container_or_the_pod() {
        let some = pod(json!({"containers": [{"name": "a", "resources": {"limits": {"cpu": "1"}}}, {"name": "b"}]}));
        assert_eq!(PodSize::of(&some).cpu_limit, None);
        let whole = pod(json!({"resources": {"limits": {"cpu": "3"}}, "containers": [{"name": "a"}]}));
        assert_eq!(PodSize::of(&whole).cpu_limit, Some(3000));
    }
}
