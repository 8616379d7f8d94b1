//! Statuses as tables: what the runtime, the last status and the pod say, and what the API is told.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as corev1;
use serde_json::{Value, json};

use super::{ResourceView, StatusInput, generate};
use crate::{
    cri::{Container, ContainerState, PodRuntime, Sandbox, fixtures::seen, v1},
    node::NodeFacts,
    pod_worker::{
        restart::LifecycleGates,
        view::{EndCause, KillOrder, Phase, WaitingReason},
    },
    pods::{Pod, PodSource},
    probes::{ContainerVerdicts, Liveness, Readiness, Startup},
    resources::{PodResources, ResizeConditions},
    time::Now,
};

/// A status is made from this; each test changes what it is about.
struct Case {
    pod: Pod,
    last: corev1::PodStatus,
    runtime: Option<PodRuntime>,
    phase: Phase,
    end: Option<EndCause>,
    verdicts: HashMap<String, ContainerVerdicts>,
    waiting: BTreeMap<String, WaitingReason>,
    replaced: BTreeSet<String>,
    messages: HashMap<String, String>,
    node: NodeFacts,
    gates: LifecycleGates,
}

impl Case {
    fn new(spec: Value) -> Self {
        Self::of(json!({}), spec, json!({}))
    }
    fn of(metadata: Value, spec: Value, status: Value) -> Self {
        let node = NodeFacts { ips: vec!["192.0.2.1".parse().unwrap()], ..NodeFacts::default() };
        Self {
            pod: pod(metadata, spec, status.clone()),
            last: serde_json::from_value(status).unwrap(),
            runtime: Some(PodRuntime::default()),
            phase: Phase::Syncing,
            end: None,
            verdicts: HashMap::new(),
            waiting: BTreeMap::new(),
            replaced: BTreeSet::new(),
            messages: HashMap::new(),
            node,
            gates: LifecycleGates::default(),
        }
    }
    fn runs(mut self, containers: impl IntoIterator<Item = Container>) -> Self {
        let containers = containers.into_iter().collect();
        self.runtime = Some(PodRuntime { sandboxes: vec![sandbox()], containers, ..PodRuntime::default() });
        self
    }
    fn status(&self) -> corev1::PodStatus {
        let (resize, actuated) = (ResizeConditions::default(), PodResources::default());
        generate(&StatusInput {
            resources: ResourceView { resize: &resize, actuated: &actuated, pod_level: false },
            now: Now { mono: tokio::time::Instant::now(), wall: Timestamp::from_second(2_000).unwrap() },
            pod: &self.pod,
            last: &self.last,
            runtime: self.runtime.as_ref(),
            phase: self.phase,
            end: self.end.as_ref(),
            started: Some(Timestamp::from_second(1_000).unwrap()),
            verdicts: &self.verdicts,
            waiting: &self.waiting,
            replaced: &self.replaced,
            post_start: &HashMap::new(),
            termination_messages: &self.messages,
            node: &self.node,
            runtime_name: "containerd",
            gates: self.gates,
        })
    }
    /// Generates and takes the result for the last status.
    fn step(&mut self) -> corev1::PodStatus {
        self.last = self.status();
        self.last.clone()
    }
}

fn pod(metadata: Value, spec: Value, status: Value) -> Pod {
    let mut object = json!({"metadata": {"uid": "u1", "name": "p", "namespace": "ns", "generation": 1}, "spec": spec,
        "status": status});
    for (key, value) in metadata.as_object().into_iter().flatten() {
        object["metadata"][key] = value.clone();
    }
    Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, Timestamp::UNIX_EPOCH).unwrap()
}

fn sandbox() -> Sandbox {
    Sandbox {
        id: "s1".into(),
        attempt: 0,
        created_at: Timestamp::from_second(1_001).unwrap(),
        ready: true,
        ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        host_network: false,
        runtime_handler: String::new(),
        name: "p".into(),
        namespace: "ns".into(),
        labels: HashMap::new(),
        annotations: HashMap::new(),
    }
}

fn running(name: &str, attempt: u32) -> Container {
    Container {
        id: format!("{name}-{attempt}"),
        attempt,
        sandbox_id: "s1".into(),
        created_at: Timestamp::from_second(1_100 + i64::from(attempt)).unwrap(),
        started_at: Some(Timestamp::from_second(1_100 + i64::from(attempt)).unwrap()),
        image: format!("registry/{name}:1"),
        image_ref: format!("registry/{name}@sha256:1"),
        image_id: "sha256:1".into(),
        annotations: HashMap::from([("io.kubernetes.container.restartCount".into(), attempt.to_string())]),
        user: Some((1000, 2000, vec![2000, 3000])),
        ..seen(name)
    }
}

fn exited(name: &str, attempt: u32, code: i32) -> Container {
    Container {
        state: ContainerState::Exited,
        exit_code: code,
        reason: if code == 0 { "Completed".into() } else { "Error".into() },
        finished_at: Some(Timestamp::from_second(1_200).unwrap()),
        ..running(name, attempt)
    }
}

fn one() -> Value {
    json!({"containers": [{"name": "c", "image": "c:1"}]})
}

fn main_status(status: &corev1::PodStatus, name: &str) -> Value {
    let list = status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten());
    let ephemeral = status.ephemeral_container_statuses.iter().flatten();
    serde_json::to_value(list.chain(ephemeral).find(|s| s.name == name)).unwrap()
}

fn condition(status: &corev1::PodStatus, kind: &str) -> Value {
    let found = status.conditions.iter().flatten().find(|c| c.type_ == kind);
    serde_json::to_value(found).unwrap()
}

fn phase(status: &corev1::PodStatus) -> &str {
    status.phase.as_deref().unwrap()
}

#[test]
fn i13_the_status_of_an_image_volume_names_the_mounted_image_only_with_its_gate() {
    let spec = json!({"volumes": [{"name": "v", "image": {"reference": "data:1"}}, {"name": "e", "emptyDir": {}}],
        "containers": [{"name": "c", "image": "c:1",
            "volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "e", "mountPath": "/e"}]}]});
    let image = v1::ImageSpec { image: "sha256:feed".into(), ..Default::default() };
    let mount = |path: &str, image| v1::Mount { container_path: path.into(), image, ..Default::default() };
    let mounts = vec![mount("/e", None), mount("/v", Some(image))];
    for (gate, expected) in [(true, json!({"image": {"imageRef": "sha256:feed"}})), (false, Value::Null)] {
        let container = Container { mounts: mounts.clone(), ..running("c", 0) };
        let mut case = Case::new(spec.clone()).runs([container]);
        case.gates.image_digests = gate;
        let mounted = main_status(&case.status(), "c")["volumeMounts"].clone();
        assert_eq!((&mounted[0]["volumeStatus"], &mounted[1]["volumeStatus"]), (&expected, &Value::Null));
    }
}

#[test]
fn p42_fields_of_a_running_container() {
    let spec = json!({"containers": [{"name": "c", "image": "c:1",
        "resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "2"}},
        "volumeMounts": [{"name": "v", "mountPath": "/v", "readOnly": true, "recursiveReadOnly": "Disabled"}]}]});
    let status = Case::new(spec).runs([exited("c", 0, 3), running("c", 1)]).status();
    let c = main_status(&status, "c");
    assert_eq!(c["containerID"], "containerd://c-1");
    assert_eq!((&c["image"], &c["imageID"]), (&json!("registry/c:1"), &json!("registry/c@sha256:1")));
    assert_eq!((&c["ready"], &c["started"], &c["restartCount"]), (&json!(true), &json!(true), &json!(1)));
    assert_eq!(c["state"], json!({"running": {"startedAt": "1970-01-01T00:18:21Z"}}));
    assert_eq!(
        c["lastState"]["terminated"],
        json!({"containerID": "containerd://c-0", "exitCode": 3, "reason": "Error",
            "startedAt": "1970-01-01T00:18:20Z", "finishedAt": "1970-01-01T00:20:00Z"})
    );
    assert_eq!(c["user"], json!({"linux": {"uid": 1000, "gid": 2000, "supplementalGroups": [2000, 3000]}}));
    assert_eq!(c["allocatedResources"], json!({"cpu": "1"}));
    assert_eq!(c["resources"]["limits"], json!({"cpu": "2"}));
    assert_eq!(
        c["volumeMounts"],
        json!([{"name": "v", "mountPath": "/v", "readOnly": true, "recursiveReadOnly": "Disabled"}])
    );
    assert_eq!(c.get("stopSignal"), None);
}

#[test]
fn p32_the_stop_signal_in_force_is_told_only_with_its_gate() {
    for (signal, gate, want) in [
        (v1::Signal::Sigusr1, true, json!("SIGUSR1")),
        (v1::Signal::Sigrtminplus3, true, json!("SIGRTMIN+3")),
        (v1::Signal::Sigrtmaxminus1, true, json!("SIGRTMAX-1")),
        (v1::Signal::RuntimeDefault, true, Value::Null),
        (v1::Signal::Sigusr1, false, Value::Null),
    ] {
        let mut case = Case::new(one()).runs([Container { stop_signal: signal, ..running("c", 0) }]);
        case.gates.stop_signals = gate;
        assert_eq!(main_status(&case.status(), "c").get("stopSignal").cloned().unwrap_or_default(), want, "{signal:?}");
    }
}

#[test]
fn p43_addresses_qos_and_start_time() {
    let mut case = Case::of(json!({}), one(), json!({"qosClass": "Burstable"})).runs([running("c", 0)]);
    let status = case.step();
    assert_eq!(status.pod_ip.as_deref(), Some("10.0.0.1"));
    let ips: Vec<_> = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).collect();
    assert_eq!(ips, ["10.0.0.1", "fd00::1"]);
    assert_eq!((status.host_ip.as_deref(), status.host_ips.as_ref().map(Vec::len)), (Some("192.0.2.1"), Some(1)));
    assert_eq!((status.qos_class.as_deref(), status.start_time.unwrap().0.as_second()), (Some("Burstable"), 1_000));
    case.node.ips = vec!["fd01::1".parse().unwrap(), "192.0.2.1".parse().unwrap()];
    let status = case.step();
    assert_eq!(status.pod_ip.as_deref(), Some("fd00::1"), "the node's primary family comes first");
    assert_eq!(status.host_ips.as_ref().map(Vec::len), Some(2));
    case.runtime = Some(PodRuntime::default());
    assert_eq!(case.step().pod_ip.as_deref(), Some("fd00::1"), "addresses stay after the sandbox is gone");
    let mut spec = one();
    spec["hostNetwork"] = json!(true);
    let status = Case::new(spec).runs([running("c", 0)]).status();
    assert_eq!(status.pod_ip.as_deref(), Some("192.0.2.1"));
}

#[test]
fn p34_lost_containers() {
    const LOST: &str = "The container could not be located when the pod was deleted.  The container used to be Running";
    let ran = |count: i32| {
        json!({"phase": "Running", "containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": true,
            "restartCount": count, "containerID": "containerd://x", "state": {"running": {"startedAt": null}}}]})
    };
    let mut case = Case::of(json!({}), one(), ran(2));
    let c = main_status(&case.step(), "c");
    assert_eq!(c["state"]["waiting"]["reason"], "ContainerCreating");
    let ended = json!({"reason": "ContainerStatusUnknown", "message": LOST, "exitCode": 137});
    assert_eq!((&c["lastState"]["terminated"], &c["restartCount"]), (&ended, &json!(3)));
    assert_eq!(main_status(&case.step(), "c")["restartCount"], 3, "counted once");
    let deleted = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
    assert_eq!(
        main_status(&Case::of(deleted, one(), ran(2)).status(), "c")["restartCount"],
        2,
        "of a deleted pod: not"
    );

    let unknown = Container { state: ContainerState::Unknown, ..running("c", 2) };
    let case = Case::of(json!({}), one(), ran(2)).runs([unknown.clone()]);
    let state = main_status(&case.status(), "c")["state"]["terminated"].clone();
    assert_eq!(state["message"], "The container could not be located when the pod was terminated");
    let case = Case::new(one()).runs([unknown]);
    assert_eq!(main_status(&case.status(), "c")["state"], json!({"waiting": {}}));
}

#[test]
fn p34_an_init_container_whose_remains_are_gone_has_ended_well() {
    let spec = json!({"initContainers": [{"name": "i", "image": "i"}, {"name": "s", "image": "s", "restartPolicy": "Always"}],
        "containers": [{"name": "c", "image": "c:1"}]});
    let status = Case::new(spec).runs([running("c", 0)]).status();
    let ended = main_status(&status, "i")["state"]["terminated"].clone();
    assert_eq!((&ended["reason"], &ended["exitCode"]), (&json!("Completed"), &json!(0)));
    assert_eq!(
        ended["message"],
        "Unable to get init container status from container runtime and pod has been initialized, treat it as exited normally"
    );
    assert_eq!(main_status(&status, "s")["state"]["waiting"]["reason"], "PodInitializing", "a sidecar is to run again");
}

#[test]
fn p34_out_of_memory_is_a_reason_of_its_own() {
    let oom = Container { oom_killed: true, ..exited("c", 0, 137) };
    let by_runtime = Container { reason: "OOMKilled".into(), ..exited("c", 0, 137) };
    for container in [oom, by_runtime] {
        let state = main_status(&Case::new(one()).runs([container]).status(), "c")["state"]["terminated"].clone();
        assert_eq!((&state["reason"], &state["exitCode"]), (&json!("OOMKilled"), &json!(137)));
    }
    let survived = Container { oom_killed: true, ..running("c", 0) };
    assert!(main_status(&Case::new(one()).runs([survived]).status(), "c")["state"]["running"].is_object());
}

#[test]
fn p35_all_messages_of_a_pod_share_12_kib() {
    let names = ["a", "b", "c", "d"];
    let spec = json!({"restartPolicy": "Never", "initContainers": [{"name": "i", "image": "i"}],
        "containers": names.map(|n| json!({"name": n, "image": n}))});
    let mut case = Case::new(spec).runs(names.map(|n| exited(n, 0, 0)).into_iter().chain([exited("i", 0, 0)]));
    for name in names.iter().chain(&["i"]) {
        case.messages.insert(format!("{name}-0"), "é".repeat(2048));
    }
    let status = case.status();
    for name in names.iter().chain(&["i"]) {
        let message = main_status(&status, name)["state"]["terminated"]["message"].as_str().unwrap().to_owned();
        assert_eq!(message.len(), 12 * 1024 / 5 - 1, "{name}: cut at a character's edge");
    }
    let mut alone = Case::new(one()).runs([exited("c", 0, 0), exited("c", 1, 0)]);
    for id in ["c-0", "c-1"] {
        alone.messages.insert(id.into(), "x".repeat(4096));
    }
    let c = main_status(&alone.status(), "c");
    assert_eq!(c["state"]["terminated"]["message"].as_str().unwrap().len(), 4096);
    assert_eq!(c["lastState"]["terminated"]["message"].as_str().unwrap().len(), 4096);
}

#[test]
fn p33_who_is_killed_to_be_started_again_is_never_shown_as_ended() {
    // The API would refuse to take this end back (OnFailure, exit code 0).
    let mut case = Case::new(json!({"restartPolicy": "OnFailure", "containers": [{"name": "c", "image": "i"}]}));
    let before = case.runs([running("c", 0)]);
    case = before;
    case.step();
    let killed = exited("c", 0, 0);
    case.replaced.insert(killed.id.clone());
    case = case.runs([killed]);
    let status = case.step();
    assert!(main_status(&status, "c")["state"]["running"].is_object());
    assert_eq!(main_status(&status, "c")["ready"], json!(false));
    assert_eq!((phase(&status), condition(&status, "Ready")["status"].as_str()), ("Running", Some("False")));
    let reason = WaitingReason { reason: "CrashLoopBackOff".into(), message: "back-off".into() };
    case.waiting.insert("c".into(), reason);
    let status = case.step();
    assert_eq!(main_status(&status, "c")["state"]["waiting"]["reason"], json!("CrashLoopBackOff"));
    assert_eq!(main_status(&status, "c")["lastState"]["terminated"]["exitCode"], json!(0));
    assert_eq!(phase(&status), "Running");
}

#[test]
fn p40_p41_a_pod_deleted_before_its_mains_were_up_has_failed_and_says_what_was_not_ready() {
    let spec = json!({"initContainers": [{"name": "i", "image": "i"}], "containers": [{"name": "c", "image": "i"}]});
    let waiting = |name: &str| {
        json!({"name": name, "state": {"waiting": {"reason": "PodInitializing"}},
        "image": "", "imageID": "", "ready": false, "restartCount": 0})
    };
    let running =
        json!({"name": "i", "state": {"running": {}}, "image": "", "imageID": "", "ready": false, "restartCount": 0});
    let held = json!({"phase": "Pending", "initContainerStatuses": [running], "containerStatuses": [waiting("c")]});
    // Asked to stop, the init container ended well; the API never heard that it was done.
    let mut case = Case::of(json!({}), spec.clone(), held).runs([exited("i", 0, 0)]);
    case.phase = Phase::Terminated;
    let status = case.status();
    assert_eq!(phase(&status), "Failed");
    assert_eq!(main_status(&status, "c")["state"]["waiting"]["reason"], json!("PodInitializing"));
    assert_eq!(condition(&status, "Ready")["reason"], json!("ContainersNotReady"));
    assert_eq!(condition(&status, "Ready")["message"], json!("containers with unready status: [c]"));

    let held = json!({"phase": "Pending", "containerStatuses": [waiting("c")], "initContainerStatuses": [{"name": "i",
        "state": {"terminated": {"exitCode": 0}}, "image": "", "imageID": "", "ready": true, "restartCount": 0}]});
    let mut case = Case::of(json!({}), spec, held).runs([exited("i", 0, 0)]);
    case.phase = Phase::Terminated;
    assert_eq!(main_status(&case.status(), "c")["state"]["terminated"]["reason"], json!("ContainerStatusUnknown"));
}

#[test]
fn p36_a_container_removed_to_begin_anew_is_counted_once_while_others_are_still_there() {
    let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]);
    let spec = json!({"restartPolicy": "Never", "initContainers": [{"name": "i", "image": "i"}],
        "containers": [{"name": "c", "image": "i", "restartPolicy": "Never", "restartPolicyRules": rules}]});
    let mut case = Case::new(spec).runs([exited("i", 0, 0), exited("c", 0, 42)]);
    case.step();
    case = case.runs([exited("c", 0, 42)]);
    for _ in 0..5 {
        let init = main_status(&case.step(), "i");
        assert_eq!(init["restartCount"], json!(1));
        assert!(init["state"]["waiting"].is_object(), "{init}");
    }
}

#[test]
fn p40_a_terminal_phase_is_never_left_and_what_runs_is_never_called_ended() {
    let never = json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": "c:1"}]});
    for (last, end, container, worker, want) in [
        ("Failed", None, running("c", 0), Phase::Syncing, "Failed"),
        ("Succeeded", None, exited("c", 0, 1), Phase::Terminated, "Succeeded"),
        ("Running", None, exited("c", 0, 0), Phase::Terminating, "Running"),
        ("Running", Some(EndCause::Finished), exited("c", 0, 0), Phase::Terminated, "Succeeded"),
        ("Running", Some(EndCause::Finished), exited("c", 0, 2), Phase::Terminated, "Failed"),
        ("Running", Some(EndCause::Deleted), exited("c", 0, 0), Phase::Terminated, "Succeeded"),
        ("Running", Some(EndCause::Deleted), exited("c", 0, 143), Phase::Terminated, "Failed"),
    ] {
        let mut case = Case::of(json!({}), never.clone(), json!({"phase": last})).runs([container]);
        (case.phase, case.end) = (worker, end.clone());
        assert_eq!(phase(&case.status()), want, "{last} {end:?} {worker:?}");
    }
    let order = KillOrder { reason: "Evicted".into(), message: "low".into(), grace: None, disruption: None };
    let mut case = Case::of(json!({}), never, json!({"phase": "Running"})).runs([exited("c", 0, 0)]);
    (case.phase, case.end) = (Phase::Terminated, Some(EndCause::Ordered(order)));
    let status = case.status();
    assert_eq!(
        (phase(&status), status.reason.as_deref(), status.message.as_deref()),
        ("Failed", Some("Evicted"), Some("low"))
    );
}

#[test]
fn p40_never_success_for_a_container_that_was_never_made() {
    for (metadata, sandboxes) in [(json!({}), false), (json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}), true)] {
        let mut case = Case::of(metadata, one(), json!({"phase": "Pending"}));
        if sandboxes {
            case = case.runs([]);
        }
        (case.phase, case.end) = (Phase::Terminated, Some(EndCause::Deleted));
        let status = case.status();
        assert_eq!(phase(&status), "Failed");
        let ended = main_status(&status, "c")["state"]["terminated"].clone();
        assert_eq!((&ended["exitCode"], &ended["reason"]), (&json!(137), &json!("ContainerStatusUnknown")));
    }
}

#[test]
fn p41_readiness_gates() {
    let spec = || {
        json!({"readinessGates": [{"conditionType": "x/a"}, {"conditionType": "x/b"}],
        "containers": [{"name": "c", "image": "c:1"}]})
    };
    let does_not = |gate: &str| format!("corresponding condition of pod readiness gate \"{gate}\" does not exist.");
    let is_not = |gate: &str| format!("the status of pod readiness gate \"{gate}\" is not \"True\", but False");
    for (conditions, want) in [
        (json!([]), Some(format!("{}, {}", does_not("x/a"), does_not("x/b")))),
        (json!([{"type": "x/a", "status": "False"}]), Some(format!("{}, {}", is_not("x/a"), does_not("x/b")))),
        (json!([{"type": "x/a", "status": "True"}, {"type": "x/b", "status": "False"}]), Some(is_not("x/b"))),
        (json!([{"type": "x/a", "status": "True"}, {"type": "x/b", "status": "True"}]), None),
    ] {
        let status = Case::of(json!({}), spec(), json!({"conditions": conditions})).runs([running("c", 0)]).status();
        let ready = condition(&status, "Ready");
        assert_eq!(ready["status"], if want.is_none() { "True" } else { "False" });
        assert_eq!(ready.get("message").and_then(Value::as_str), want.as_deref());
        assert_eq!(ready.get("reason").and_then(Value::as_str), want.as_ref().map(|_| "ReadinessGatesNotReady"));
        assert_eq!(condition(&status, "ContainersReady")["status"], "True");
    }
}

#[test]
fn p41_foreign_conditions_pass_through_and_transition_times_stay_while_the_status_does() {
    let foreign = json!({"type": "example.com/x", "status": "Unknown", "reason": "R", "message": "m",
        "lastTransitionTime": "2020-01-01T00:00:00Z", "observedGeneration": 7});
    let ours = json!({"type": "Ready", "status": "False", "lastTransitionTime": "2020-02-02T00:00:00Z"});
    let mut case = Case::of(json!({}), one(), json!({"conditions": [foreign, ours]})).runs([]);
    let status = case.step();
    assert_eq!(condition(&status, "example.com/x"), foreign);
    assert_eq!(condition(&status, "Ready")["lastTransitionTime"], "2020-02-02T00:00:00Z");
    assert_eq!(condition(&status, "Ready")["message"], "containers with unready status: [c]");
    let order: Vec<_> = status.conditions.iter().flatten().map(|c| c.type_.as_str()).collect();
    assert_eq!(
        order,
        ["example.com/x", "PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"]
    );
    let status = Case { last: case.last, ..Case::new(one()) }.runs([running("c", 0)]).status();
    assert_eq!(condition(&status, "Ready")["lastTransitionTime"], "1970-01-01T00:33:20Z", "the status flipped");
}

#[test]
fn p41_reasons_of_what_is_not() {
    let spec = json!({"restartPolicy": "Never", "initContainers": [{"name": "i1", "image": "i"}, {"name": "i2", "image": "i"}],
        "containers": [{"name": "c", "image": "c:1"}]});
    let status = Case::new(spec.clone()).runs([exited("i1", 0, 0), running("i2", 0)]).status();
    let initialized = condition(&status, "Initialized");
    assert_eq!((&initialized["status"], &initialized["reason"]), (&json!("False"), &json!("ContainersNotInitialized")));
    assert_eq!(initialized["message"], "containers with incomplete status: [i2]");
    assert_eq!(condition(&status, "PodReadyToStartContainers")["status"], "True");
    for (code, reason, initialized) in [(0, "PodCompleted", Some("PodCompleted")), (1, "PodFailed", None)] {
        let mut case = Case::new(spec.clone()).runs([exited("i1", 0, 0), exited("i2", 0, 0), exited("c", 0, code)]);
        (case.phase, case.end) = (Phase::Terminated, Some(EndCause::Finished));
        let status = case.status();
        for kind in ["Ready", "ContainersReady"] {
            assert_eq!(
                (&condition(&status, kind)["status"], &condition(&status, kind)["reason"]),
                (&json!("False"), &json!(reason))
            );
        }
        assert_eq!(condition(&status, "Initialized").get("reason").and_then(Value::as_str), initialized);
    }
    let gone = Case::new(one()).status();
    assert_eq!(condition(&gone, "PodReadyToStartContainers")["status"], "False");
}

#[test]
fn p14_every_generation_is_observed_in_the_status_and_its_conditions_also_while_ending() {
    let conditions_at = |status: &corev1::PodStatus, generation: i64| {
        assert_eq!(status.observed_generation, Some(generation));
        assert!(status.conditions.iter().flatten().all(|c| c.observed_generation == Some(generation)), "{status:?}");
    };
    let mut case = Case::new(one()).runs([running("c", 0)]);
    for generation in 1..=500 {
        case.pod = pod(json!({"generation": generation}), one(), json!({}));
        conditions_at(&case.step(), generation);
    }
    case.pod = pod(json!({"generation": 501, "deletionTimestamp": "2026-01-01T00:00:00Z"}), one(), json!({}));
    (case.phase, case.end) = (Phase::Terminating, Some(EndCause::Deleted));
    conditions_at(&case.step(), 501);
    (case.phase, case.end) = (Phase::Terminated, Some(EndCause::Finished));
    conditions_at(&case.step(), 501);
}

#[test]
fn p22_ephemeral_containers_have_statuses_and_hold_nothing_up() {
    let spec = |policy: &str| {
        json!({"restartPolicy": policy, "containers": [{"name": "c", "image": "c:1"}],
            "ephemeralContainers": [{"name": "z", "image": "z"}, {"name": "e", "image": "e", "targetContainerName": "c"}]})
    };
    let mut case = Case::new(spec("Always")).runs([running("c", 0), exited("e", 0, 1)]);
    case.waiting.insert("z".into(), WaitingReason { reason: "ErrImagePull".into(), message: "no".into() });
    let status = case.status();
    let names: Vec<_> = status.ephemeral_container_statuses.iter().flatten().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["e", "z"], "by name");
    assert_eq!(phase(&status), "Running");
    assert_eq!(condition(&status, "Ready")["status"], "True");
    let (e, z) = (main_status(&status, "e"), main_status(&status, "z"));
    assert_eq!(
        (&e["state"]["terminated"]["exitCode"], &e["ready"], e.get("started")),
        (&json!(1), &json!(false), None)
    );
    assert_eq!(z["state"]["waiting"], json!({"reason": "ErrImagePull", "message": "no"}));

    let ran = json!({"phase": "Running"});
    let mut ended = Case::of(json!({}), spec("Never"), ran).runs([exited("c", 0, 0), running("e", 0)]);
    ended.phase = Phase::Terminating;
    assert_eq!(phase(&ended.status()), "Running", "still stopping");
    let mut ended = Case::new(spec("Never")).runs([exited("c", 0, 0), exited("e", 0, 137)]);
    (ended.phase, ended.end) = (Phase::Terminated, Some(EndCause::Finished));
    assert_eq!(phase(&ended.status()), "Succeeded");
}

#[test]
fn p36_statuses_while_all_containers_are_restarted() {
    let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]);
    let spec = json!({"restartPolicy": "Never", "initContainers": [{"name": "i", "image": "i"}],
        "containers": [{"name": "a", "image": "a"},
            {"name": "b", "image": "b", "restartPolicy": "Never", "restartPolicyRules": rules}]});
    let mut case = Case::new(spec).runs([exited("i", 0, 0), running("a", 0), running("b", 0)]);
    let status = case.step();
    assert_eq!(condition(&status, "AllContainersRestarting")["status"], "False");

    case = case.runs([exited("i", 0, 0), running("a", 0), exited("b", 0, 42)]);
    let status = case.step();
    let restarting = condition(&status, "AllContainersRestarting");
    assert_eq!((&restarting["status"], &restarting["reason"]), (&json!("True"), &json!("RestartAllContainersStarted")));
    assert_eq!(restarting["message"], "container exited with restart policy rule");
    assert_eq!(restarting.get("observedGeneration"), None);
    assert_eq!(phase(&status), "Running");

    case = case.runs([exited("i", 0, 0), exited("b", 0, 42)]);
    let status = case.step();
    let a = main_status(&status, "a");
    let text = "The container is removed because RestartAllContainers in place";
    assert_eq!(a["state"]["waiting"], json!({"reason": "RestartingAllContainers", "message": text}));
    assert_eq!(
        a["lastState"]["terminated"],
        json!({"reason": "RestartingAllContainers", "message": text, "exitCode": 137})
    );
    assert_eq!(a["restartCount"], 1);
    assert_eq!(condition(&status, "AllContainersRestarting")["status"], "True");

    case = case.runs([]);
    let status = case.step();
    assert_eq!(condition(&status, "AllContainersRestarting")["status"], "False", "nothing is left to remove");
    for (name, reason) in [("a", "PodInitializing"), ("b", "RestartingAllContainers"), ("i", "RestartingAllContainers")]
    {
        let c = main_status(&status, name);
        assert_eq!((&c["restartCount"], &c["state"]["waiting"]["reason"]), (&json!(1), &json!(reason)), "{name}");
    }
    assert_eq!(phase(&status), "Running", "a pod that begins anew is not over");
    assert_eq!(condition(&status, "Initialized")["status"], "True", "once initialised, always initialised");

    case = case.runs([running("i", 1)]);
    let status = case.step();
    assert_eq!(main_status(&status, "i")["restartCount"], 1);
    assert_eq!(phase(&status), "Pending", "its init containers run again");
    case = case.runs([exited("i", 1, 0), running("a", 1), running("b", 1)]);
    let status = case.step();
    assert_eq!(main_status(&status, "a")["lastState"]["terminated"]["reason"], "RestartingAllContainers");
    assert_eq!(condition(&status, "Ready")["status"], "True");
    case.phase = Phase::Terminated;
    case.end = Some(EndCause::Deleted);
    case = case.runs([exited("i", 1, 0), exited("a", 1, 1), exited("b", 1, 1)]);
    assert_eq!(condition(&case.step(), "AllContainersRestarting")["reason"], "PodFailed");
}

#[test]
fn p42_a_restart_count_never_goes_down() {
    let mut case = Case::new(one()).runs([running("c", 3)]);
    assert_eq!(main_status(&case.step(), "c")["restartCount"], 3);
    case = case.runs([running("c", 0)]);
    assert_eq!(main_status(&case.step(), "c")["restartCount"], 3, "the runtime forgot");
}

#[test]
fn p41_unready_containers_are_named_in_spec_order() {
    let spec = json!({"initContainers": [{"name": "s", "image": "s", "restartPolicy": "Always"}],
        "containers": [{"name": "b", "image": "b"}, {"name": "a", "image": "a"}]});
    let mut case = Case::new(spec).runs([running("s", 0), running("b", 0), running("a", 0)]);
    for name in ["s", "b", "a"] {
        let verdicts = ContainerVerdicts {
            container_id: format!("{name}-0"),
            liveness: Liveness::Alive,
            readiness: Readiness::NotReady,
            startup: Startup::Started,
        };
        case.verdicts.insert(name.into(), verdicts);
    }
    let status = case.status();
    assert_eq!(condition(&status, "ContainersReady")["message"], "containers with unready status: [s b a]");
    let names: Vec<_> = status.container_statuses.iter().flatten().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["a", "b"], "statuses are sorted by name");
}
