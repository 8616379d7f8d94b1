//! What a pod asks for as a whole: its requests and limits summed the way the scheduler sums them. Pure.
//!
//! Main containers and sidecars add up; an ordinary init container needs its own plus every sidecar started before it; the
//! larger of the two counts, per resource. Pod-level resources replace the sums for cpu, memory and hugepages; overhead is added
//! (KEP-753, KEP-2837, KEP-688).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

use crate::{
    pods::{ContainerKind, ContainerRef, Pod},
    quantity::Quantity,
};

/// Resource name → amount.
pub type ResourceList = BTreeMap<String, Quantity>;

const HUGEPAGES: &str = "hugepages-";

/// An API resource list. An amount that does not parse is left out: the apiserver has validated what it stored, and a static
/// manifest's is refused by its source.
pub fn resource_list(list: Option<&BTreeMap<String, ApiQuantity>>) -> ResourceList {
    list.into_iter()
        .flatten()
        .filter_map(|(name, amount)| Some((name.clone(), Quantity::try_from(amount).ok()?)))
        .collect()
}

/// The page size in bytes of a `hugepages-<size>` resource name.
pub fn hugepage_size(resource: &str) -> Option<i64> {
    Quantity::parse(resource.strip_prefix(HUGEPAGES)?).ok().map(|q| q.value())
}

/// The requests of the whole pod, overhead included.
pub fn pod_requests(pod: &Pod) -> ResourceList {
    let mut total = container_requests(pod);
    if let Some(resources) = &pod.spec().resources {
        replace_supported(&mut total, &resource_list(resources.requests.as_ref()));
    }
    add(&mut total, &resource_list(pod.spec().overhead.as_ref()));
    total
}

/// The limits of the whole pod. Overhead is added only to what is limited.
pub fn pod_limits(pod: &Pod) -> ResourceList {
    let mut total = aggregate(pod, |r| r.limits.as_ref());
    if let Some(resources) = &pod.spec().resources {
        replace_supported(&mut total, &resource_list(resources.limits.as_ref()));
    }
    for (name, amount) in resource_list(pod.spec().overhead.as_ref()) {
        if let Some(limit) = total.get_mut(&name).filter(|l| !l.is_zero()) {
            *limit = limit.add(&amount);
        }
    }
    total
}

/// The containers' requests alone: no pod-level resources, no overhead.
pub(crate) fn container_requests(pod: &Pod) -> ResourceList {
    aggregate(pod, |r| r.requests.as_ref())
}

/// `spec.resources` names at least one of cpu, memory, hugepages in its requests or limits.
pub(crate) fn pod_level_set(pod: &Pod) -> bool {
    pod.spec().resources.as_ref().is_some_and(|r| {
        r.requests.iter().chain(r.limits.iter()).flat_map(BTreeMap::keys).any(|name| pod_level_resource(name))
    })
}

/// The same for its requests alone.
pub(crate) fn pod_level_requests_set(pod: &Pod) -> bool {
    let requests = pod.spec().resources.as_ref().and_then(|r| r.requests.as_ref());
    requests.is_some_and(|list| list.keys().any(|name| pod_level_resource(name)))
}

fn pod_level_resource(name: &str) -> bool {
    matches!(name, "cpu" | "memory") || name.starts_with(HUGEPAGES)
}

fn replace_supported(total: &mut ResourceList, pod_level: &ResourceList) {
    for (name, amount) in pod_level.iter().filter(|(name, _)| pod_level_resource(name)) {
        total.insert(name.clone(), *amount);
    }
}

type Pick = fn(&ResourceRequirements) -> Option<&BTreeMap<String, ApiQuantity>>;

fn aggregate(pod: &Pod, pick: Pick) -> ResourceList {
    let of = |c: ContainerRef<'_>| resource_list(c.spec.resources.as_ref().and_then(pick));
    let mut running = ResourceList::new();
    for container in pod.main_containers() {
        add(&mut running, &of(container));
    }
    let mut sidecars = ResourceList::new();
    let mut starting = ResourceList::new();
    for container in pod.init_containers() {
        let own = of(container);
        if container.kind == ContainerKind::Sidecar {
            add(&mut running, &own);
            add(&mut sidecars, &own);
            raise(&mut starting, &sidecars);
        } else {
            let mut together = own;
            add(&mut together, &sidecars);
            raise(&mut starting, &together);
        }
    }
    raise(&mut running, &starting);
    running
}

fn add(total: &mut ResourceList, more: &ResourceList) {
    for (name, amount) in more {
        total.entry(name.clone()).and_modify(|have| *have = have.add(amount)).or_insert(*amount);
    }
}

fn raise(total: &mut ResourceList, other: &ResourceList) {
    for (name, amount) in other {
        let have = total.entry(name.clone()).or_insert(*amount);
        if *amount > *have {
            *have = *amount;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::pods::PodSource;

    /// A pod from a spec in JSON.
    pub(crate) fn pod(spec: serde_json::Value) -> Pod {
        let object = serde_json::json!({"metadata": {"name": "p", "namespace": "n", "uid": "u-1"}, "spec": spec});
        Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap()
    }

    fn requests(cpu: &str) -> serde_json::Value {
        serde_json::json!({"requests": {"cpu": cpu}, "limits": {"cpu": cpu}})
    }

    #[test]
    fn r04_sidecars_add_up_and_init_containers_need_those_before_them() {
        let pod = pod(serde_json::json!({
            "initContainers": [
                {"name": "a", "resources": requests("100m")},
                {"name": "s", "restartPolicy": "Always", "resources": requests("200m")},
                {"name": "b", "resources": requests("900m")},
            ],
            "containers": [{"name": "m", "resources": requests("500m")}, {"name": "n", "resources": requests("50m")}],
        }));
        // running: 500 + 50 + 200 = 750; init b: 900 + 200 = 1100
        assert_eq!(pod_requests(&pod)["cpu"].milli_value(), 1100);
        assert_eq!(pod_limits(&pod)["cpu"].milli_value(), 1100);
    }

    #[test]
    fn r04_overhead_raises_requests_but_only_existing_limits() {
        let pod = pod(serde_json::json!({
            "overhead": {"cpu": "10m", "memory": "1Mi"},
            "containers": [{"name": "m", "resources": {"requests": {"cpu": "1", "memory": "4Mi"}, "limits": {"cpu": "2"}}}],
        }));
        assert_eq!(pod_requests(&pod)["cpu"].milli_value(), 1010);
        assert_eq!(pod_requests(&pod)["memory"].value(), 5 << 20);
        assert_eq!(pod_limits(&pod)["cpu"].milli_value(), 2010);
        assert!(!pod_limits(&pod).contains_key("memory"));
    }

    #[test]
    fn pod_level_resources_replace_the_sums_of_what_they_may_name() {
        let pod = pod(serde_json::json!({
            "resources": {"requests": {"cpu": "2", "hugepages-2Mi": "4Mi", "example.com/gpu": "3"}},
            "containers": [{"name": "m", "resources": {"requests": {"cpu": "1", "memory": "4Mi", "example.com/gpu": "1"}}}],
        }));
        let total = pod_requests(&pod);
        assert_eq!(total["cpu"].milli_value(), 2000);
        assert_eq!(total["memory"].value(), 4 << 20);
        assert_eq!(total["hugepages-2Mi"].value(), 4 << 20);
        assert_eq!(total["example.com/gpu"].value(), 1);
    }

    #[test]
    fn hugepage_sizes_are_read_from_the_resource_name() {
        assert_eq!(hugepage_size("hugepages-2Mi"), Some(2 << 20));
        assert_eq!(hugepage_size("hugepages-1Gi"), Some(1 << 30));
        assert_eq!(hugepage_size("memory"), None);
    }
}
