//! `status.declaredFeatures`: what the node declares, and which pods need what it does not (contract N-13, A-12; KEP-5328). Pure.
//!
//! The scheduler, and admission here, keep a pod away from a node that does not declare what the pod needs; the apiserver refuses
//! an update likewise. So only what works is declared: the feature gate must be on, and the agent must have it.

use std::collections::BTreeSet;

use crate::{config::FeatureGates, cri::v1, pods::Pod};

/// One of the nine declared features of 1.37. Feature and gate have one name.
struct Feature {
    name: &'static str,
    /// This agent does it, over a runtime that can do this.
    works: fn(&v1::RuntimeFeatures) -> bool,
    needed_by_pod: fn(&Pod) -> bool,
    needed_by_update: fn(&Pod, &Pod) -> bool,
}

/// By name.
const FEATURES: [Feature; 9] = [
    Feature { name: "DRANodeAllocatableResources", works: not_yet, needed_by_pod: no_pod, needed_by_update: no_update },
    Feature { name: "DRAOptionalNodeOperations", works: not_yet, needed_by_pod: no_pod, needed_by_update: no_update },
    Feature { name: "ExtendWebSocketsToKubelet", works: not_yet, needed_by_pod: no_pod, needed_by_update: no_update },
    Feature {
        name: "InPlacePodLevelResourcesVerticalScaling",
        works: anywhere,
        needed_by_pod: no_pod,
        needed_by_update: resizes_pod_level,
    },
    Feature {
        name: "InPlacePodVerticalScalingInitContainers",
        works: anywhere,
        needed_by_pod: no_pod,
        needed_by_update: resizes_init_container,
    },
    Feature {
        name: "InPlacePodVerticalScalingMemoryBackedVolumes",
        works: not_yet,
        needed_by_pod: no_pod,
        needed_by_update: resizes_memory_volume,
    },
    Feature {
        name: "RestartAllContainersOnContainerExits",
        works: anywhere,
        needed_by_pod: restarts_all_containers,
        needed_by_update: no_update,
    },
    Feature {
        name: "UserNamespacesHostNetworkSupport",
        works: |runtime| runtime.user_namespaces_host_network,
        needed_by_pod: user_namespace_on_host_network,
        needed_by_update: no_update,
    },
    Feature {
        name: "VolumeBindMountOptions",
        works: |runtime| runtime.mount_options,
        needed_by_pod: bind_mount_options,
        needed_by_update: no_update,
    },
];

/// What this node declares over this runtime, sorted.
pub fn declared_features(gates: &FeatureGates, runtime: &v1::RuntimeFeatures) -> BTreeSet<&'static str> {
    FEATURES.iter().filter(|f| (f.works)(runtime) && gates.enabled(f.name)).map(|f| f.name).collect()
}

/// What the pod needs and the node does not declare, sorted.
pub fn missing_for_pod(pod: &Pod, declared: &BTreeSet<&'static str>) -> Vec<&'static str> {
    missing(declared, |feature| (feature.needed_by_pod)(pod))
}

/// What a change of the pod's spec needs and the node does not declare, sorted.
pub fn missing_for_update(old: &Pod, new: &Pod, declared: &BTreeSet<&'static str>) -> Vec<&'static str> {
    missing(declared, |feature| (feature.needed_by_update)(old, new))
}

fn missing(declared: &BTreeSet<&'static str>, needed: impl Fn(&Feature) -> bool) -> Vec<&'static str> {
    FEATURES.iter().filter(|f| !declared.contains(f.name) && needed(f)).map(|f| f.name).collect()
}

fn anywhere(_: &v1::RuntimeFeatures) -> bool {
    true
}

/// The two of DRA, WebSockets that end at the node, and memory volumes that grow.
fn not_yet(_: &v1::RuntimeFeatures) -> bool {
    false
}

fn no_pod(_: &Pod) -> bool {
    false
}

fn no_update(_: &Pod, _: &Pod) -> bool {
    false
}

fn restarts_all_containers(pod: &Pod) -> bool {
    let containers = pod.spec().init_containers.iter().flatten().chain(&pod.spec().containers);
    let mut rules = containers.flat_map(|c| c.restart_policy_rules.iter().flatten());
    rules.any(|rule| rule.action == "RestartAllContainers")
}

fn user_namespace_on_host_network(pod: &Pod) -> bool {
    pod.host_network() && pod.spec().host_users == Some(false)
}

fn bind_mount_options(pod: &Pod) -> bool {
    let spec = pod.spec();
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let ephemeral = spec.ephemeral_containers.iter().flatten().flat_map(|c| c.volume_mounts.iter().flatten());
    let mut mounts = containers.flat_map(|c| c.volume_mounts.iter().flatten()).chain(ephemeral);
    mounts.any(|mount| mount.bind_mount_options.as_ref().is_some_and(|options| !options.is_empty()))
}

fn resizes_pod_level(old: &Pod, new: &Pod) -> bool {
    old.spec().resources != new.spec().resources
}

fn resizes_init_container(old: &Pod, new: &Pod) -> bool {
    let pairs = old.spec().init_containers.iter().flatten().zip(new.spec().init_containers.iter().flatten());
    let mut ordinary = pairs.filter(|(old, _)| old.restart_policy.as_deref() != Some("Always"));
    ordinary.any(|(old, new)| old.resources != new.resources)
}

fn resizes_memory_volume(old: &Pod, new: &Pod) -> bool {
    let pairs = old.spec().volumes.iter().flatten().zip(new.spec().volumes.iter().flatten());
    let mut named = pairs.filter(|(old, new)| old.name == new.name);
    named.any(|(old, new)| {
        let in_memory = new.empty_dir.as_ref().filter(|v| v.medium.as_deref() == Some("Memory"));
        let limit = in_memory.and_then(|v| v.size_limit.as_ref());
        let before = old.empty_dir.as_ref().and_then(|v| v.size_limit.as_ref());
        limit.is_some() && before.is_some() && limit != before
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::fixtures::pod;

    #[test]
    fn n13_only_what_works_and_is_switched_on_is_declared_in_order() {
        let names: Vec<&str> = FEATURES.iter().map(|f| f.name).collect();
        assert!(names.is_sorted());
        let gates = FeatureGates::default();
        let runtime =
            v1::RuntimeFeatures { user_namespaces_host_network: true, mount_options: true, ..Default::default() };
        let declared = declared_features(&gates, &runtime);
        let expected = [
            "InPlacePodLevelResourcesVerticalScaling",
            "InPlacePodVerticalScalingInitContainers",
            "RestartAllContainersOnContainerExits",
        ];
        assert_eq!(Vec::from_iter(&declared), Vec::from_iter(&expected));
        // What the Go kubelet declares with the default gates is the most that we may.
        let go = [
            "ExtendWebSocketsToKubelet",
            "InPlacePodLevelResourcesVerticalScaling",
            "InPlacePodVerticalScalingInitContainers",
            "RestartAllContainersOnContainerExits",
        ];
        assert!(declared.iter().all(|name| go.contains(name)), "{declared:?}");
        assert!(go.iter().all(|name| gates.enabled(name)));
    }

    #[test]
    fn n13_what_the_runtime_must_do_is_declared_only_when_it_can() {
        let on = [("VolumeBindMountOptions", true), ("UserNamespacesHostNetworkSupport", true)];
        let gates = FeatureGates::from_map(&on.map(|(name, on)| (name.to_owned(), on)).into()).unwrap();
        let declares = |user_namespaces_host_network, mount_options| {
            let runtime = v1::RuntimeFeatures { user_namespaces_host_network, mount_options, ..Default::default() };
            let declared = declared_features(&gates, &runtime);
            on.map(|(name, _)| declared.contains(name))
        };
        assert_eq!(declares(false, true), [true, false]);
        assert_eq!(declares(true, false), [false, true]);
    }

    #[test]
    fn a12_what_a_pod_needs() {
        let rule = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [1]}}]);
        let mount = json!([{"name": "v", "mountPath": "/v", "bindMountOptions": ["noexec"]}]);
        let none = BTreeSet::new();
        for (spec, expected) in [
            (json!({"containers": [{"name": "c"}]}), vec![]),
            (
                json!({"containers": [{"name": "c", "restartPolicyRules": rule}]}),
                vec!["RestartAllContainersOnContainerExits"],
            ),
            (
                json!({"hostNetwork": true, "hostUsers": false, "containers": []}),
                vec!["UserNamespacesHostNetworkSupport"],
            ),
            (
                json!({"containers": [], "initContainers": [{"name": "i", "volumeMounts": mount}]}),
                vec!["VolumeBindMountOptions"],
            ),
        ] {
            let pod = pod(spec);
            assert_eq!(missing_for_pod(&pod, &none), expected);
            assert!(missing_for_pod(&pod, &expected.into_iter().collect()).is_empty());
        }
    }

    #[test]
    fn a12_what_an_update_needs() {
        let spec = |cpu: &str, init: &str, sidecar: &str, size: &str| {
            let requests = |cpu: &str| json!({"requests": {"cpu": cpu}});
            pod(json!({"resources": requests(cpu), "containers": [{"name": "c"}],
                "initContainers": [{"name": "i", "resources": requests(init)},
                    {"name": "s", "restartPolicy": "Always", "resources": requests(sidecar)}],
                "volumes": [{"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": size}}]}))
        };
        let none = BTreeSet::new();
        let before = spec("1", "1", "1", "1Mi");
        for (after, expected) in [
            (spec("1", "1", "2", "1Mi"), vec![]),
            (spec("2", "1", "1", "1Mi"), vec!["InPlacePodLevelResourcesVerticalScaling"]),
            (spec("1", "2", "1", "1Mi"), vec!["InPlacePodVerticalScalingInitContainers"]),
            (spec("1", "1", "1", "2Mi"), vec!["InPlacePodVerticalScalingMemoryBackedVolumes"]),
        ] {
            assert_eq!(missing_for_update(&before, &after, &none), expected);
        }
    }
}
