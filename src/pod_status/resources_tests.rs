use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::{
    cri::{PodRuntime, fixtures::seen, v1},
    node::NodeFacts,
    pod_status::generate,
    pod_worker::view::Phase,
    pods::PodSource,
    time::{Clock, SimulatedClock},
};

struct Case {
    spec: Value,
    status: Value,
    resources: Option<v1::LinuxContainerResources>,
    actuated: Value,
    resize: ResizeConditions,
    v2: bool,
    pod_level: bool,
}

impl Case {
    fn new(resources: Value) -> Self {
        Self {
            spec: json!({"containers": [{"name": "c", "image": "i", "resources": resources}]}),
            status: json!({"phase": "Running"}),
            resources: None,
            actuated: json!({}),
            resize: ResizeConditions::default(),
            v2: false,
            pod_level: true,
        }
    }

    fn status(&self) -> PodStatus {
        let object = json!({"metadata": {"uid": "u", "name": "p", "namespace": "n", "generation": 4},
            "spec": self.spec, "status": self.status});
        let pod = Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, Timestamp::UNIX_EPOCH).unwrap();
        let container = Container { id: "1".into(), resources: self.resources.clone(), ..seen("c") };
        let runtime = PodRuntime { containers: vec![container], ..PodRuntime::default() };
        let actuated: PodResources = serde_json::from_value(
            json!({"ContainerResources": {"c": self.actuated}, "PodLevelResources": self.spec["resources"]}),
        )
        .unwrap();
        let node = NodeFacts { cgroup_v2: self.v2, ..NodeFacts::default() };
        generate(&StatusInput {
            now: SimulatedClock::starting_at(Timestamp::UNIX_EPOCH).now(),
            pod: &pod,
            resources: ResourceView { resize: &self.resize, actuated: &actuated, pod_level: self.pod_level },
            last: pod.api_status(),
            runtime: Some(&runtime),
            phase: Phase::Syncing,
            end: None,
            started: None,
            verdicts: &HashMap::new(),
            waiting: &BTreeMap::new(),
            replaced: &BTreeSet::new(),
            post_start: &HashMap::new(),
            termination_messages: &HashMap::new(),
            node: &node,
            runtime_name: "containerd",
            gates: crate::pod_worker::restart::LifecycleGates::default(),
        })
    }

    fn container(&self) -> Value {
        let status = self.status().container_statuses.unwrap().remove(0);
        serde_json::to_value(status.resources.unwrap()).unwrap()
    }

    fn pod(&self) -> Value {
        serde_json::to_value(self.status().resources.unwrap()).unwrap()
    }
}

fn linux(shares: i64, quota: i64, memory: i64) -> Option<v1::LinuxContainerResources> {
    Some(v1::LinuxContainerResources {
        cpu_shares: shares,
        cpu_quota: quota,
        cpu_period: 100_000,
        memory_limit_in_bytes: memory,
        ..Default::default()
    })
}

#[tokio::test]
async fn p72_a_running_container_shows_what_the_runtime_has_in_force() {
    let all = json!({"cpu": "2", "memory": "2Gi"});
    let mut case = Case::new(json!({"requests": all, "limits": all}));
    case.resources = linux(1024, 100_000, 1 << 30);
    case.actuated = json!({"requests": {"memory": "1Gi"}});
    let old = json!({"cpu": "1", "memory": "1Gi"});
    assert_eq!(case.container(), json!({"limits": old, "requests": old}));
    let status = case.status().container_statuses.unwrap().remove(0);
    assert_eq!(status.allocated_resources.unwrap()["cpu"].0, "2", "allocated is another thing");

    // A runtime that says nothing: what was put into force.
    case.resources = None;
    case.actuated = json!({"requests": old, "limits": old});
    assert_eq!(case.container(), json!({"limits": old, "requests": old}));
}

#[tokio::test]
async fn p72_the_floor_of_a_cgroup_is_shown_as_what_was_allocated() {
    let small = json!({"cpu": "1m"});
    let mut case = Case::new(json!({"requests": small, "limits": {"cpu": "5m"}}));
    case.resources = linux(2, 1000, 0);
    assert_eq!(case.container(), json!({"limits": {"cpu": "5m"}, "requests": {"cpu": "1m"}}));
}

#[tokio::test]
async fn p72_without_any_word_the_last_status_of_the_same_container_stays() {
    let mut case = Case::new(json!({"limits": {"cpu": "2"}}));
    case.status = json!({"phase": "Running", "containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": true,
        "restartCount": 0, "containerID": "containerd://1", "state": {"running": {}},
        "resources": {"limits": {"cpu": "1"}}}]});
    assert_eq!(case.container(), json!({"limits": {"cpu": "1"}}));
    case.status["containerStatuses"][0]["containerID"] = json!("containerd://0");
    assert_eq!(case.container(), json!({"limits": {"cpu": "2"}}));
}

#[tokio::test]
async fn p72_conditions_stand_while_they_hold_before_our_other_ones() {
    let mut case = Case::new(json!({}));
    case.status =
        json!({"conditions": [{"type": "PodResizePending", "status": "True"}, {"type": "Mine", "status": "True"}]});
    let kinds =
        |case: &Case| -> Vec<String> { case.status().conditions.unwrap().into_iter().map(|c| c.type_).collect() };
    assert_eq!(kinds(&case)[..2], ["Mine", "PodReadyToStartContainers"], "what no longer holds is gone");
    let condition = ResizeCondition {
        reason: "Deferred".into(),
        message: "m".into(),
        generation: 3,
        since: Timestamp::UNIX_EPOCH,
        at: Timestamp::UNIX_EPOCH,
    };
    case.resize.pending = Some(condition.clone());
    case.resize.in_progress = Some(ResizeCondition { reason: String::new(), message: String::new(), ..condition });
    assert_eq!(kinds(&case)[..3], ["Mine", "PodResizePending", "PodResizeInProgress"]);
    let pending = case.status().conditions.unwrap().remove(1);
    let expected = json!({"type": "PodResizePending", "status": "True", "reason": "Deferred", "message": "m",
        "observedGeneration": 3, "lastTransitionTime": "1970-01-01T00:00:00Z", "lastProbeTime": "1970-01-01T00:00:00Z"});
    assert_eq!(serde_json::to_value(pending).unwrap(), expected);
}

#[tokio::test]
async fn p75_the_pod_as_a_whole() {
    let mut case = Case::new(json!({"requests": {"cpu": "100m", "memory": "1Gi"}}));
    case.actuated = case.spec["containers"][0]["resources"].clone();
    assert_eq!(case.status().allocated_resources.unwrap()["cpu"].0, "100m");
    assert_eq!(case.pod(), json!({"requests": {"cpu": "100m", "memory": "1Gi"}}));
    // cpu.weight is coarser than shares: read back, 100m are 79m, as upstream shows them.
    case.v2 = true;
    assert_eq!(case.pod(), json!({"requests": {"cpu": "79m", "memory": "1Gi"}}));
    case.status = json!({"phase": "Pending"});
    assert_eq!(case.pod(), json!({"requests": {"cpu": "100m", "memory": "1Gi"}}));
    case.pod_level = false;
    assert_eq!((case.status().resources, case.status().allocated_resources), (None, None));

    let all = json!({"cpu": "1500m", "memory": "1Gi"});
    let mut whole = Case::new(json!({}));
    whole.spec["resources"] = json!({"requests": {"cpu": "100m"}, "limits": all});
    whole.v2 = true;
    assert_eq!(
        whole.pod(),
        json!({"limits": all, "requests": {"cpu": "100m"}}),
        "what is asked for reads back as itself"
    );
    let best_effort = Case::new(json!({}));
    assert_eq!(best_effort.pod(), json!({}));
}
