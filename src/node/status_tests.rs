use k8s_openapi::api::core::v1::NodeCondition;
use serde_json::json;
use tokio::time::Instant;

use super::super::{
    machine::HugePages, registration::initial_node, runtime_state::ready_for_test, settings::test_settings,
};
use super::*;

fn readings() -> Readings {
    Readings {
        machine: Machine {
            cores: 2,
            memory: 8 << 30,
            boot_id: "boot-1".into(),
            machine_id: "m".into(),
            kernel_version: "6.18".into(),
            os_image: "Debian".into(),
            huge_pages: vec![HugePages { page_size: 2 << 20, pages: 0 }],
            ..Machine::default()
        },
        addresses: Some(vec![
            NodeAddress { type_: "InternalIP".into(), address: "192.0.2.2".into() },
            NodeAddress { type_: "Hostname".into(), address: "node1".into() },
        ]),
        node_fs_capacity: Some(1000),
        pressures: BTreeSet::new(),
        images: Some(vec![]),
    }
}

/// [`StatusInputs`], owned, so that a test can change them.
struct Inputs {
    readings: Readings,
    runtime: RuntimeState,
    unhealthy: Vec<String>,
    storage_error: Option<&'static str>,
    second: i64,
}

fn built(current: &Node, change: impl FnOnce(&mut Inputs)) -> BuiltNode {
    let mut inputs =
        Inputs { readings: readings(), runtime: ready_for_test(), unhealthy: vec![], storage_error: None, second: 100 };
    change(&mut inputs);
    let inputs = StatusInputs {
        settings: &test_settings(),
        readings: &inputs.readings,
        runtime: &inputs.runtime,
        unhealthy: &inputs.unhealthy,
        storage_error: inputs.storage_error,
        now: Now { mono: Instant::now(), wall: jiff::Timestamp::from_second(inputs.second).unwrap() },
    };
    build(current, &inputs)
}

fn new_node() -> Node {
    initial_node(&test_settings())
}

fn condition<'a>(node: &'a Node, type_: &str) -> &'a NodeCondition {
    node.status.as_ref().unwrap().conditions.as_ref().unwrap().iter().find(|c| c.type_ == type_).unwrap()
}

#[test]
fn n09_n10_n12_n13_the_whole_status() {
    let node = built(&new_node(), |_| {}).node;
    let status = serde_json::to_value(node.status.unwrap()).unwrap();
    assert_eq!(status["daemonEndpoints"], json!({"kubeletEndpoint": {"Port": 10250}}));
    assert_eq!(status["declaredFeatures"], json!(["A", "B"]));
    assert_eq!(status["features"], json!({"supplementalGroupsPolicy": true}));
    let handler = json!({"name": "runc", "features": {"recursiveReadOnlyMounts": false, "userNamespaces": false}});
    assert_eq!(status["runtimeHandlers"], json!([handler]));
    assert_eq!(status["capacity"]["cpu"], "2");
    assert_eq!(status["allocatable"]["pods"], "110");
    let info = json!({
        "machineID": "m", "systemUUID": "", "bootID": "boot-1", "kernelVersion": "6.18", "osImage": "Debian",
        "containerRuntimeVersion": "containerd://2.3.7", "kubeletVersion": "v1.37.1+rkubelet.0.1.0",
        "kubeProxyVersion": "", "operatingSystem": "linux", "architecture": architecture(), "runningInUserNamespace": false,
    });
    assert_eq!(status["nodeInfo"], info);
    assert!(status.get("images").is_none(), "an empty list would never match what the API gives back");
}

#[test]
fn n19_the_same_inputs_are_no_change_and_a_heartbeat_alone_is_none() {
    let first = built(&new_node(), |_| {}).node;
    let later = built(&first, |inputs| inputs.second = 500);
    assert!(!changed(&first, &later.node));
    assert!(later.events.is_empty());
    assert_ne!(first, later.node, "the heartbeat time moved");
}

#[test]
fn n17_ready_waits_for_csinode_and_health() {
    let node = built(&new_node(), |inputs| inputs.storage_error = Some("CSINode is not yet initialized"));
    assert!(!node.ready);
    assert_eq!(condition(&node.node, "Ready").message.as_deref(), Some("CSINode is not yet initialized"));
    let unhealthy = vec!["PLEG is not healthy: pleg was last seen active 3m1s ago; threshold is 3m0s".to_owned()];
    let node = built(&new_node(), |inputs| {
        inputs.unhealthy = unhealthy;
        inputs.runtime = RuntimeState::unknown();
    });
    assert_eq!(
        condition(&node.node, "Ready").message.as_deref(),
        Some(
            "[container runtime status check may not have completed yet, PLEG is not healthy: pleg was last seen active 3m1s ago; threshold is 3m0s, network state unknown]"
        )
    );
    assert!(built(&new_node(), |_| {}).ready);
}

#[test]
fn n17_missing_capacity_is_named() {
    let without = Readings { node_fs_capacity: None, ..readings() };
    let node = built(&new_node(), |inputs| inputs.readings = without).node;
    let message = condition(&node, "Ready").message.clone().unwrap();
    assert_eq!(message, "missing node capacity for resources: ephemeral-storage");
}

#[test]
fn r28_extended_resources_of_others_are_kept() {
    let mut current = built(&new_node(), |_| {}).node;
    let status = current.status.as_mut().unwrap();
    let amount = || ApiQuantity("5".into());
    status.capacity.as_mut().unwrap().insert("example.com/fake".into(), amount());
    status.allocatable.as_mut().unwrap().insert("example.com/gone".into(), amount());
    let status = built(&current, |_| {}).node.status.unwrap();
    assert_eq!(status.capacity.unwrap()["example.com/fake"].0, "5");
    let allocatable = status.allocatable.unwrap();
    assert_eq!(allocatable["example.com/fake"].0, "5");
    assert!(!allocatable.contains_key("example.com/gone"), "no capacity, nothing to allocate");
}

#[test]
fn n09_a_reboot_is_told_once_it_is_seen() {
    let before = built(&new_node(), |_| {}).node;
    let mut rebooted = readings();
    rebooted.machine.boot_id = "boot-2".into();
    let after = built(&before, |inputs| inputs.readings = rebooted.clone());
    let event = after.events.iter().find(|e| e.reason == "Rebooted").unwrap();
    assert_eq!(
        (event.kind, event.message.as_str()),
        (EventType::Warning, "Node node1 has been rebooted, boot id: boot-2")
    );
    assert!(built(&after.node, |inputs| inputs.readings = rebooted.clone()).events.is_empty());
}

#[test]
fn n02_os_and_arch_labels_are_put_back() {
    let mut node = built(&new_node(), |_| {}).node;
    let labels = node.metadata.labels.as_mut().unwrap();
    labels.insert("kubernetes.io/os".into(), "beos".into());
    labels.remove("kubernetes.io/arch");
    let again = built(&node, |_| {}).node;
    assert!(changed(&node, &again));
    assert_eq!(again.metadata.labels.as_ref().unwrap()["kubernetes.io/os"], "linux");
    assert_eq!(again.metadata.labels.as_ref().unwrap()["kubernetes.io/arch"], architecture());
}

#[test]
fn n18_transitions_become_events() {
    let first = built(&new_node(), |inputs| inputs.runtime = RuntimeState::unknown());
    let reasons: Vec<&str> = first.events.iter().map(|e| e.reason.as_str()).collect();
    assert_eq!(reasons, ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"]);
    let second = built(&first.node, |_| {});
    assert_eq!(second.events, [NodeEvent::status("node1", "NodeReady")]);
    assert_eq!(second.events[0].message, "Node node1 status is now: NodeReady");
}

#[test]
fn n07_addresses_that_cannot_be_told_are_kept() {
    let node = built(&new_node(), |_| {}).node;
    let unknown = Readings { addresses: None, ..readings() };
    let again = built(&node, |inputs| inputs.readings = unknown).node;
    assert_eq!(node.status.unwrap().addresses, again.status.unwrap().addresses);
}
