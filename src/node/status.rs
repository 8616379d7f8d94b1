//! Builds the Node that should be from the Node that is (contract N-02, N-07…N-17). Pure.
//!
//! In: the Node as the API last showed it, readings of this machine, the runtime's state, the time. Out: the Node to publish and the
//! events that its publication is worth. Whatever others own in the status (extended resources, foreign conditions, attached volumes)
//! passes through untouched.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeDaemonEndpoints, NodeFeatures, NodeRuntimeHandler,
    NodeRuntimeHandlerFeatures, NodeStatus, NodeSwapStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

use super::{
    addresses::provided_node_ip,
    capacity::{allocatable, capacity},
    conditions,
    machine::Machine,
    pressure::Pressure,
    runtime_state::RuntimeState,
    settings::{NodeSettings, OPERATING_SYSTEM},
};
use crate::{cli::architecture, events::EventType, quantity::Quantity, resources::ResourceList, time::Now};

const ATTACH_DETACH: &str = "volumes.kubernetes.io/controller-managed-attach-detach";
const PROVIDED_NODE_IP: &str = "alpha.kubernetes.io/provided-node-ip";

/// One reading of the machine and of what the runtime holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Readings {
    pub machine: Machine,
    /// `None` when they cannot be told: then the Node keeps those it has.
    pub addresses: Option<Vec<NodeAddress>>,
    /// Bytes of the file system of the root directory.
    pub node_fs_capacity: Option<i64>,
    pub pressures: BTreeSet<Pressure>,
    /// `None` when the runtime could not list them.
    pub images: Option<Vec<ContainerImage>>,
}

/// Everything a status is made from.
#[derive(Clone, Copy)]
pub struct StatusInputs<'a> {
    pub settings: &'a NodeSettings,
    pub readings: &'a Readings,
    pub runtime: &'a RuntimeState,
    /// `PLEG is not healthy: …` and the like.
    pub unhealthy: &'a [String],
    /// `CSINode is not yet initialized` and the like.
    pub storage_error: Option<&'a str>,
    pub now: Now,
}

/// One event about the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeEvent {
    pub kind: EventType,
    pub reason: String,
    pub message: String,
}

impl NodeEvent {
    /// `Node <name> status is now: <reason>` (contract N-18).
    pub fn status(node: &str, reason: &str) -> Self {
        let message = format!("Node {node} status is now: {reason}");
        Self { kind: EventType::Normal, reason: reason.to_owned(), message }
    }
}

/// The Node to publish.
#[derive(Debug, Clone, PartialEq)]
pub struct BuiltNode {
    pub node: Node,
    pub events: Vec<NodeEvent>,
    pub ready: bool,
}

/// Fills in labels that are re-asserted, annotations and the whole status.
pub fn build(current: &Node, inputs: &StatusInputs<'_>) -> BuiltNode {
    let mut node = current.clone();
    assert_labels(&mut node);
    set_provided_ip(&mut node, inputs.settings);
    let old = current.status.clone().unwrap_or_default();
    let mut status = old.clone();
    set_addresses(&mut status, inputs);
    set_resources(&mut status, inputs);
    let mut events = Vec::new();
    events.extend(rebooted(&old, inputs));
    status.node_info = Some(node_info(inputs));
    let endpoint = DaemonEndpoint { port: inputs.settings.kubelet_port };
    status.daemon_endpoints = Some(NodeDaemonEndpoints { kubelet_endpoint: Some(endpoint) });
    if let Some(images) = &inputs.readings.images {
        status.images = non_empty(images.clone());
    }
    set_runtime(&mut status, inputs.runtime);
    let mut features = inputs.settings.declared_features.clone();
    features.sort();
    status.declared_features = non_empty(features);

    let not_ready = not_ready(&status, inputs);
    let current_conditions = old.conditions.as_deref().unwrap_or_default();
    let update = conditions::update(current_conditions, &inputs.readings.pressures, &not_ready, &inputs.now.api_time());
    status.conditions = Some(update.conditions);
    events.extend(update.events.iter().map(|reason| NodeEvent::status(&inputs.settings.node_name, reason)));
    node.status = Some(status);
    BuiltNode { node, events, ready: not_ready.is_empty() }
}

/// Whether the Node is worth a PATCH before its report is due: anything but heartbeat times differs.
pub fn changed(old: &Node, new: &Node) -> bool {
    let plain = |node: &Node| {
        let status = node.status.clone().unwrap_or_default();
        NodeStatus { conditions: None, ..status }
    };
    let conditions = |node: &Node| node.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
    old.metadata.labels != new.metadata.labels
        || old.metadata.annotations != new.metadata.annotations
        || plain(old) != plain(new)
        || conditions::differ(&conditions(old), &conditions(new))
}

/// Capacity and allocatable alone: for the first facts, before the Node exists.
pub fn resources(settings: &NodeSettings, readings: &Readings) -> (ResourceList, ResourceList) {
    let ephemeral = readings.node_fs_capacity.filter(|_| settings.local_storage_isolation);
    let capacity = capacity(&readings.machine, ephemeral, settings.pod_slots);
    let allocatable = allocatable(&capacity, &settings.reservations);
    (capacity, allocatable)
}

fn non_empty<T>(list: Vec<T>) -> Option<Vec<T>> {
    // The API drops empty lists; one that is sent again and again would never match what is read back.
    (!list.is_empty()).then_some(list)
}

fn assert_labels(node: &mut Node) {
    let labels = node.metadata.labels.get_or_insert_default();
    labels.insert("kubernetes.io/os".to_owned(), OPERATING_SYSTEM.to_owned());
    labels.insert("kubernetes.io/arch".to_owned(), architecture().to_owned());
}

fn set_provided_ip(node: &mut Node, settings: &NodeSettings) {
    match provided_node_ip(&settings.node_ips, settings.external_cloud) {
        Some(ips) => {
            node.metadata.annotations.get_or_insert_default().insert(PROVIDED_NODE_IP.to_owned(), ips);
        }
        None => {
            if let Some(annotations) = &mut node.metadata.annotations {
                annotations.remove(PROVIDED_NODE_IP);
            }
        }
    }
}

/// The annotation that leaves attaching volumes to the controller (contract N-04).
pub(super) fn attach_detach_annotation(settings: &NodeSettings) -> Option<(String, String)> {
    settings.controller_attach_detach.then(|| (ATTACH_DETACH.to_owned(), "true".to_owned()))
}

pub(super) const fn attach_detach_key() -> &'static str {
    ATTACH_DETACH
}

fn set_addresses(status: &mut NodeStatus, inputs: &StatusInputs<'_>) {
    if let Some(addresses) = &inputs.readings.addresses {
        let keep = inputs.settings.external_cloud && status.addresses.as_ref().is_some_and(|a| !a.is_empty());
        if !keep {
            status.addresses = non_empty(addresses.clone());
        }
    }
}

/// Own resources are set; resources that others added to the capacity (extended resources) stay, and are allocatable whole.
fn set_resources(status: &mut NodeStatus, inputs: &StatusInputs<'_>) {
    let (own_capacity, own_allocatable) = resources(inputs.settings, inputs.readings);
    let total = status.capacity.get_or_insert_default();
    total.extend(api_list(&own_capacity));
    let mut free = status.allocatable.take().unwrap_or_default();
    free.retain(|name, _| total.contains_key(name) || !is_extended(name));
    free.extend(
        total.iter().filter(|(name, _)| !own_capacity.contains_key(*name)).map(|(n, q)| (n.clone(), q.clone())),
    );
    free.extend(api_list(&own_allocatable));
    status.allocatable = Some(free);
}

fn api_list(list: &ResourceList) -> impl Iterator<Item = (String, ApiQuantity)> {
    list.iter().map(|(name, amount)| (name.clone(), ApiQuantity::from(*amount)))
}

/// Resource names with a domain that is not Kubernetes' own.
pub(super) fn is_extended(name: &str) -> bool {
    name.contains('/') && !name.contains("kubernetes.io/") && !name.starts_with("requests.")
}

fn rebooted(old: &NodeStatus, inputs: &StatusInputs<'_>) -> Option<NodeEvent> {
    let before = old.node_info.as_ref().map(|i| i.boot_id.as_str()).unwrap_or_default();
    let now = inputs.readings.machine.boot_id.as_str();
    (!before.is_empty() && before != now).then(|| NodeEvent {
        kind: EventType::Warning,
        reason: "Rebooted".to_owned(),
        message: format!("Node {} has been rebooted, boot id: {now}", inputs.settings.node_name),
    })
}

fn node_info(inputs: &StatusInputs<'_>) -> NodeSystemInfo {
    let (machine, runtime) = (&inputs.readings.machine, inputs.runtime);
    let version = if runtime.version.is_empty() { "Unknown" } else { &runtime.version };
    NodeSystemInfo {
        machine_id: machine.machine_id.clone(),
        system_uuid: machine.system_uuid.clone(),
        boot_id: machine.boot_id.clone(),
        kernel_version: machine.kernel_version.clone(),
        os_image: machine.os_image.clone(),
        container_runtime_version: format!("{}://{version}", runtime.name),
        kubelet_version: inputs.settings.kubelet_version.clone(),
        kube_proxy_version: String::new(),
        operating_system: OPERATING_SYSTEM.to_owned(),
        architecture: architecture().to_owned(),
        swap: (machine.swap > 0).then_some(NodeSwapStatus { capacity: Some(machine.swap) }),
        running_in_user_namespace: Some(false),
    }
}

fn set_runtime(status: &mut NodeStatus, runtime: &RuntimeState) {
    let handlers = runtime.handlers.iter().map(|handler| NodeRuntimeHandler {
        name: Some(handler.name.clone()),
        features: Some(NodeRuntimeHandlerFeatures {
            recursive_read_only_mounts: Some(handler.recursive_read_only_mounts),
            user_namespaces: Some(handler.user_namespaces),
        }),
    });
    status.runtime_handlers = non_empty(handlers.collect());
    if let Some(policy) = runtime.supplemental_groups_policy {
        status.features = Some(NodeFeatures { supplemental_groups_policy: Some(policy) });
    }
}

fn not_ready(status: &NodeStatus, inputs: &StatusInputs<'_>) -> Vec<String> {
    let mut causes = inputs.runtime.runtime_errors();
    // Upstream puts failing health checks between the silence and what the runtime itself said.
    let own = causes.iter().position(|c| c.starts_with("container runtime not ready")).unwrap_or(causes.len());
    causes.splice(own..own, inputs.unhealthy.iter().cloned());
    causes.extend(inputs.runtime.network_error().map(str::to_owned));
    causes.extend(inputs.storage_error.map(str::to_owned));
    let mut required = vec!["cpu", "memory", "pods"];
    if inputs.settings.local_storage_isolation {
        required.push("ephemeral-storage");
    }
    let empty = BTreeMap::new();
    let have = status.capacity.as_ref().unwrap_or(&empty);
    let missing: Vec<&str> = required.into_iter().filter(|name| !have.contains_key(*name)).collect();
    if !missing.is_empty() {
        causes.push(format!("missing node capacity for resources: {}", missing.join(", ")));
    }
    causes
}

/// Texts of a resource list, as [`super::NodeFacts`] hands them out.
pub(super) fn texts(list: &ResourceList) -> BTreeMap<String, String> {
    list.iter().map(|(name, amount)| (name.clone(), Quantity::to_canonical(amount))).collect()
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
