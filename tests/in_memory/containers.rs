//! Ephemeral containers, hooks, restart rules, and pods that go by force, through the shell.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};
use rkubelet::{
    cri::{
        ContainerState,
        fake::{ExecScript, Script},
        v1::NamespaceMode,
    },
    events::Regarding,
    pods::{Pod, PodSource},
};
use serde_json::{Value, json};

use crate::rig::{Process, Rig, pod, ready, simple, until};

const SOON: Duration = Duration::from_secs(30);

fn status_of(status: &PodStatus, name: &str) -> Option<ContainerStatus> {
    let lists = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    lists.into_iter().flatten().flatten().find(|s| s.name == name).cloned()
}

fn running(status: &PodStatus, name: &str) -> bool {
    status_of(status, name).and_then(|s| s.state).is_some_and(|s| s.running.is_some())
}

fn terminated(status: &PodStatus, name: &str) -> bool {
    status_of(status, name).and_then(|s| s.state).is_some_and(|s| s.terminated.is_some())
}

async fn up(node: &Process, pod: &Pod) {
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    until(SOON, "ready", || ready(&node.api.status(pod.uid()))).await;
}

fn with_debugger(target: Option<&str>) -> Value {
    let mut spec = simple();
    spec["ephemeralContainers"] = json!([{"name": "debug", "image": "busybox:1", "targetContainerName": target}]);
    spec
}

#[tokio::test(start_paused = true)]
async fn p22_an_ephemeral_container_joins_its_target_and_is_never_restarted() {
    let rig = Rig::new();
    rig.runtime.script("debug", [Script::exits(Duration::from_secs(5), 1)]);
    let node = rig.start();
    up(&node, &pod(1, simple())).await;
    let debugged = pod(1, with_debugger(Some("main")));
    node.store.upsert(debugged.clone());
    until(SOON, "the debugger runs", || running(&node.api.status(debugged.uid()), "debug")).await;
    let (main, debug) = (&rig.runtime.containers("uid-1", "main")[0].0, &rig.runtime.containers("uid-1", "debug")[0].0);
    let config = rig.runtime.container_config(debug).unwrap();
    let namespaces = config.linux.unwrap().security_context.unwrap().namespace_options.unwrap();
    assert_eq!((namespaces.pid(), &namespaces.target_id), (NamespaceMode::Target, main));
    let told = rig.events.all().into_iter().any(|e| {
        e.reason == "Started"
            && matches!(&e.regarding, Regarding::Container { field_path, .. } if field_path == "spec.ephemeralContainers{debug}")
    });
    assert!(told, "{:?}", rig.events.all());
    until(SOON, "the debugger ended", || terminated(&node.api.status(debugged.uid()), "debug")).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(rig.runtime.containers("uid-1", "debug").len(), 1, "never restarted");
    let status = node.api.status(debugged.uid());
    assert!(ready(&status) && status.phase.as_deref() == Some("Running"));
    assert_eq!(rig.runtime.containers("uid-1", "main"), [(main.clone(), ContainerState::Running)]);
}

#[tokio::test(start_paused = true)]
async fn p22_a_target_that_is_not_there_is_named() {
    let rig = Rig::new();
    let node = rig.start();
    up(&node, &pod(1, simple())).await;
    let debugged = pod(1, with_debugger(Some("nobody")));
    node.store.upsert(debugged.clone());
    let waits = || status_of(&node.api.status(debugged.uid()), "debug").and_then(|s| s.state?.waiting?.reason);
    until(SOON, "told", || waits().as_deref() == Some("CreateContainerConfigError")).await;
    assert!(rig.events.has("Failed", "Error: unable to find target container nobody"));
    assert!(ready(&node.api.status(debugged.uid())), "the pod does not mind");
}

#[tokio::test(start_paused = true)]
async fn p22_a_debugger_ends_with_its_pod() {
    let rig = Rig::new();
    rig.runtime.script("main", [Script::exits(Duration::from_secs(60), 0)]);
    let node = rig.start();
    let mut spec = with_debugger(None);
    spec["restartPolicy"] = json!("Never");
    let pod = pod(1, spec);
    up(&node, &pod).await;
    until(SOON, "the debugger runs", || running(&node.api.status(pod.uid()), "debug")).await;
    let over = || node.api.status(pod.uid()).phase.as_deref() == Some("Succeeded");
    until(Duration::from_secs(100), "succeeded", over).await;
    assert!(terminated(&node.api.status(pod.uid()), "debug"));
}

#[tokio::test(start_paused = true)]
async fn p28_the_next_container_starts_when_post_start_has_returned() {
    let rig = Rig::new();
    rig.runtime.exec_script("a", ExecScript { after: Duration::from_secs(3), ..ExecScript::default() });
    let node = rig.start();
    let hook = json!({"postStart": {"exec": {"command": ["x"]}}});
    let pod = pod(
        1,
        json!({"restartPolicy": "Always", "containers": [
            {"name": "a", "image": "busybox:1", "lifecycle": hook}, {"name": "b", "image": "busybox:1"}]}),
    );
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    until(SOON, "the hook runs", || rig.runtime.count("ExecSync") == 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let a = status_of(&node.api.status(pod.uid()), "a").unwrap();
    assert_eq!(a.state.unwrap().waiting.unwrap().reason.as_deref(), Some("ContainerCreating"));
    assert!(!a.ready && rig.runtime.containers("uid-1", "b").is_empty());
    until(SOON, "ready", || ready(&node.api.status(pod.uid()))).await;
    let expensive = ["RunPodSandbox", "CreateContainer", "StartContainer", "ExecSync"];
    let order: Vec<_> = rig.runtime.calls().into_iter().map(|c| c.rpc).filter(|rpc| expensive.contains(rpc)).collect();
    assert_eq!(
        order,
        ["RunPodSandbox", "CreateContainer", "StartContainer", "ExecSync", "CreateContainer", "StartContainer"]
    );
}

#[tokio::test(start_paused = true)]
async fn p28_a_failed_post_start_kills_its_container() {
    let rig = Rig::new();
    rig.runtime.exec_script("a", ExecScript { exit_code: 1, ..ExecScript::default() });
    let node = rig.start();
    let hook = json!({"postStart": {"exec": {"command": ["x"]}}});
    let containers =
        json!([{"name": "a", "image": "busybox:1", "lifecycle": hook}, {"name": "b", "image": "busybox:1"}]);
    let pod = pod(1, json!({"restartPolicy": "Always", "containers": containers}));
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    let waits = || status_of(&node.api.status(pod.uid()), "a").and_then(|s| s.state?.waiting?.reason);
    until(SOON, "told", || waits().as_deref() == Some("PostStartHookError")).await;
    assert!(rig.events.has("FailedPostStartHook", "PostStartHook failed"));
    assert!(rig.events.has("Killing", "FailedPostStartHook"));
    until(SOON, "its neighbour runs", || running(&node.api.status(pod.uid()), "b")).await;
    assert_eq!(rig.runtime.containers("uid-1", "a")[0].1, ContainerState::Exited);
}

fn restart_all(codes: &[i32]) -> Value {
    json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": codes}}])
}

#[tokio::test(start_paused = true)]
async fn p36_a_pod_begins_anew_in_place() {
    let rig = Rig::new();
    rig.runtime.script("setup", [Script::exits(Duration::from_secs(1), 0)]);
    rig.runtime.script("main", [Script::exits(Duration::from_secs(20), 42), Script::forever()]);
    let node = rig.start();
    let pod = pod(
        1,
        json!({"restartPolicy": "Never", "initContainers": [{"name": "setup", "image": "busybox:1"}],
            "containers": [{"name": "side", "image": "busybox:1", "lifecycle": {"preStop": {"sleep": {"seconds": 5}}}},
                {"name": "main", "image": "busybox:1", "restartPolicy": "Never", "restartPolicyRules": restart_all(&[42])}]}),
    );
    up(&node, &pod).await;
    let again = || {
        let status = node.api.status(pod.uid());
        ready(&status)
            && ["setup", "side", "main"].iter().all(|n| status_of(&status, n).is_some_and(|s| s.restart_count == 1))
    };
    let took = until(SOON, "all run again", again).await;
    assert!(took < Duration::from_secs(23), "20 s of life, then no grace, no hooks, no back-off: {took:?}");
    assert!(rig.events.has("Killing", "killing"));
    assert_eq!(rig.runtime.count("RunPodSandbox"), 1);
    assert_eq!(rig.runtime.count("RemoveContainer"), 3);
    let history = node.api.history(pod.uid());
    let restarting = |s: &PodStatus| {
        s.conditions.iter().flatten().any(|c| c.type_ == "AllContainersRestarting" && c.status == "True")
    };
    assert!(history.iter().any(restarting) && !restarting(history.last().unwrap()));
    let reason = |s: &PodStatus| status_of(s, "side").and_then(|s| s.state?.waiting?.reason);
    assert!(history.iter().any(|s| reason(s).as_deref() == Some("RestartingAllContainers")));
    let phases: Vec<_> = history.iter().filter_map(|s| s.phase.as_deref()).collect();
    assert!(!phases.contains(&"Failed") && !phases.contains(&"Succeeded"), "{phases:?}");
    let last = status_of(&node.api.status(pod.uid()), "side").unwrap().last_state.unwrap().terminated.unwrap();
    assert_eq!((last.reason.as_deref(), last.exit_code), (Some("RestartingAllContainers"), 137));
}

#[tokio::test(start_paused = true)]
async fn p36_a_killed_agent_ends_what_it_began_at_any_moment() {
    for moment in (0..30).map(|i| i * 20) {
        let rig = Rig::new();
        rig.runtime.script("main", [Script::exits(Duration::from_secs(5), 42), Script::forever()]);
        let first = rig.start();
        let pod = pod(
            1,
            json!({"restartPolicy": "Never", "containers": [{"name": "side", "image": "busybox:1"},
                {"name": "main", "image": "busybox:1", "restartPolicy": "Never", "restartPolicyRules": restart_all(&[42])}]}),
        );
        up(&first, &pod).await;
        let main = rig.runtime.containers("uid-1", "main")[0].0.clone();
        until(SOON, "main ended", || {
            rig.runtime.containers("uid-1", "main").iter().all(|c| c != &(main.clone(), ContainerState::Running))
        })
        .await;
        tokio::time::sleep(Duration::from_millis(moment)).await;
        first.kill9();
        tokio::time::sleep(Duration::from_secs(5)).await;
        let second = rig.start();
        second.store.replace(PodSource::Api, vec![pod.clone()]);
        until(Duration::from_secs(60), "ready again", || ready(&second.api.status(pod.uid()))).await;
        let alive = |name: &str| {
            rig.runtime.containers("uid-1", name).iter().filter(|(_, s)| *s == ContainerState::Running).count()
        };
        assert_eq!((alive("main"), alive("side")), (1, 1), "moment {moment}");
        assert_eq!(rig.runtime.worst_max_running().map_or(1, |(_, _, n)| n), 1, "moment {moment}");
    }
}

#[tokio::test(start_paused = true)]
async fn p24_a_rule_restarts_a_container_of_a_pod_that_restarts_nothing() {
    let rig = Rig::new();
    rig.runtime.script(
        "main",
        [
            Script::exits(Duration::from_secs(1), 42),
            Script::exits(Duration::from_secs(1), 42),
            Script::exits(Duration::from_secs(1), 3),
        ],
    );
    let node = rig.start();
    let rules = json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]);
    let container =
        json!({"name": "main", "image": "busybox:1", "restartPolicy": "Never", "restartPolicyRules": rules});
    let pod = pod(1, json!({"restartPolicy": "Never", "containers": [container]}));
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    let over = || node.api.status(pod.uid()).phase.as_deref() == Some("Failed");
    until(Duration::from_secs(60), "failed", over).await;
    let main = status_of(&node.api.status(pod.uid()), "main").unwrap();
    assert_eq!((main.restart_count, main.state.unwrap().terminated.unwrap().exit_code), (2, 3));
}

#[tokio::test(start_paused = true)]
async fn p10_a_pod_that_is_gone_from_the_api_is_stopped_and_one_of_its_name_starts_beside_it() {
    let rig = Rig::new();
    rig.runtime.script("main", [Script::term_after(Duration::from_secs(3), 0), Script::forever()]);
    let node = rig.start();
    let first = pod(1, simple());
    up(&node, &first).await;
    let object = json!({"metadata": {"uid": "uid-new", "name": first.name(), "namespace": "ns", "generation": 1}, "spec": simple()});
    let second =
        Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap();
    node.store.remove(first.uid());
    node.store.upsert(second.clone());
    until(SOON, "its successor is ready", || ready(&node.api.status(second.uid()))).await;
    until(SOON, "nothing is left of it", || rig.runtime.sandboxes("uid-1").is_empty()).await;
    until(SOON, "its worker retired", || node.workers.len() == 1).await;
    assert!(!rig.volumes.mounted.lock().unwrap().contains(first.uid()));
    assert!(ready(&node.api.status(second.uid())), "its successor is not touched");
    assert_eq!(rig.runtime.containers("uid-new", "main").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn p14_the_last_of_500_quick_updates_is_observed() {
    let rig = Rig::new();
    let node = rig.start();
    let object = |generation: i64| {
        let metadata = json!({"uid": "uid-1", "name": "p1", "namespace": "ns", "generation": generation});
        let object = json!({"metadata": metadata, "spec": simple()});
        Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap()
    };
    let pod = object(1);
    up(&node, &pod).await;
    for generation in 2..=500 {
        node.store.upsert(object(generation));
        if generation % 7 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let observed = || node.api.status(pod.uid()).observed_generation == Some(500);
    until(Duration::from_secs(2), "the last one is observed", observed).await;
    let status = node.api.status(pod.uid());
    assert!(status.conditions.iter().flatten().all(|c| c.observed_generation == Some(500)));
    let seen: Vec<_> = node.api.history(pod.uid()).iter().filter_map(|s| s.observed_generation).collect();
    assert!(seen.is_sorted(), "{seen:?}");
    assert_eq!(rig.runtime.count("StartContainer"), 1);
}
