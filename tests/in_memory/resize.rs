//! Resizes in place through the shell: allocation, the runtime, statuses and events, and the agent's death in the middle.

use std::time::Duration;

use k8s_openapi::api::core::v1::{PodCondition, PodStatus};
use rkubelet::{
    cri::{fake::Fault, v1},
    pods::{Pod, PodSource},
};
use serde_json::{Value, json};

use crate::rig::{Process, Rig, ready, until};

const GI: i64 = 1 << 30;

/// A pod of one container at this generation; requests are limits.
fn sized(number: usize, generation: i64, cpu: &str, memory: &str, more: &Value) -> Pod {
    let all = json!({"cpu": cpu, "memory": memory});
    let mut container = json!({"name": "main", "image": "busybox:1", "resources": {"requests": all, "limits": all}});
    for (key, value) in more.as_object().into_iter().flatten() {
        container[key] = value.clone();
    }
    let object = json!({
        "metadata": {"uid": format!("uid-{number}"), "name": format!("p{number}"), "namespace": "ns", "generation": generation},
        "spec": {"restartPolicy": "Always", "containers": [container]},
    });
    Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap()
}

fn condition(status: &PodStatus, kind: &str) -> Option<PodCondition> {
    status.conditions.iter().flatten().find(|c| c.type_ == kind).cloned()
}

fn resizing(status: &PodStatus) -> bool {
    condition(status, "PodResizePending").is_some() || condition(status, "PodResizeInProgress").is_some()
}

/// cpu request, memory limit: (allocated request, in force, in force).
fn shown(status: &PodStatus) -> (String, String, String) {
    let container = &status.container_statuses.as_ref().unwrap()[0];
    let resources = container.resources.clone().unwrap();
    (
        container.allocated_resources.as_ref().unwrap()["cpu"].0.clone(),
        resources.requests.unwrap()["cpu"].0.clone(),
        resources.limits.unwrap()["memory"].0.clone(),
    )
}

fn texts(of: (&str, &str, &str)) -> (String, String, String) {
    (of.0.into(), of.1.into(), of.2.into())
}

async fn running(node: &Process, pods: &[Pod]) {
    node.store.replace(PodSource::Api, pods.to_vec());
    for pod in pods {
        until(Duration::from_secs(10), "ready", || ready(&node.api.status(pod.uid()))).await;
    }
}

fn in_force(rig: &Rig, pod: &Pod) -> v1::LinuxContainerResources {
    let (id, _) = rig.runtime.containers(pod.uid().as_str(), "main").into_iter().next_back().unwrap();
    rig.runtime.container_config(&id).unwrap().linux.unwrap().resources.unwrap()
}

fn reasons(rig: &Rig) -> Vec<String> {
    rig.events.all().into_iter().map(|e| e.reason).filter(|r| r.starts_with("Resize")).collect()
}

#[tokio::test(start_paused = true)]
async fn p70_p71_p72_a_resize_that_fits_is_put_into_force_without_a_restart() {
    let rig = Rig::new();
    let node = rig.start();
    let pod = sized(1, 1, "1", "1Gi", &json!({}));
    running(&node, std::slice::from_ref(&pod)).await;
    assert_eq!(shown(&node.api.status(pod.uid())), texts(("1", "1", "1Gi")));
    rig.runtime.clear_calls();
    node.store.upsert(sized(1, 2, "2", "2Gi", &json!({})));
    let done = || shown(&node.api.status(pod.uid())) == texts(("2", "2", "2Gi"));
    until(Duration::from_secs(5), "resized", || done() && !resizing(&node.api.status(pod.uid()))).await;

    let status = node.api.status(pod.uid());
    assert_eq!(status.container_statuses.as_ref().unwrap()[0].restart_count, 0);
    assert_eq!((status.observed_generation, status.resize.clone()), (Some(2), None));
    assert_eq!(status.allocated_resources.unwrap()["cpu"].0, "2");
    let (updates, told) = ("UpdateContainerResources", "UpdatePodSandboxResources");
    let calls: Vec<_> =
        rig.runtime.calls().into_iter().map(|c| c.rpc).filter(|rpc| rpc.starts_with("Update")).collect();
    assert_eq!(calls, [told, updates, told, told, updates], "memory, then cpu; the pod grows first");
    let linux = in_force(&rig, &pod);
    assert_eq!((linux.cpu_shares, linux.cpu_quota, linux.memory_limit_in_bytes), (2048, 200_000, 2 * GI));
    let cgroup = rig.cgroups.1.lock().unwrap()[pod.uid()];
    assert_eq!((cgroup.memory, cgroup.cpu_quota, cgroup.cpu_share), (Some(2 * GI), Some(200_000), 2000));
    assert_eq!(reasons(&rig), ["ResizeStarted", "ResizeCompleted"]);
    assert!(rig.events.has("ResizeCompleted", r#""requests":{"cpu":"2","memory":"2Gi"}}}],"generation":2}"#));
    let going_on: Vec<_> =
        node.api.history(pod.uid()).iter().filter_map(|s| condition(s, "PodResizeInProgress")).collect();
    assert!(!going_on.is_empty() && going_on.iter().all(|c| c.observed_generation == Some(2) && c.reason.is_none()));
}

#[tokio::test(start_paused = true)]
async fn p70_a_resize_that_does_not_fit_waits_until_another_pod_is_gone() {
    let rig = Rig::new();
    let node = rig.start();
    let (pod, other) = (sized(1, 1, "1", "1Gi", &json!({})), sized(2, 1, "2", "1Gi", &json!({})));
    running(&node, &[pod.clone(), other.clone()]).await;
    node.store.upsert(sized(1, 2, "3", "1Gi", &json!({})));
    let pending = || condition(&node.api.status(pod.uid()), "PodResizePending");
    until(Duration::from_secs(5), "deferred", || pending().is_some()).await;
    let deferred = pending().unwrap();
    assert_eq!(deferred.reason.as_deref(), Some("Deferred"));
    let message = "Node didn't have enough resource: cpu, requested: 3000, used: 2000, capacity: 4000";
    assert_eq!((deferred.message.as_deref(), deferred.observed_generation), (Some(message), Some(2)));
    assert_eq!(shown(&node.api.status(pod.uid())).0, "1", "what it had, it keeps");
    assert_eq!(in_force(&rig, &pod).cpu_shares, 1024);

    node.store.remove(other.uid());
    until(Duration::from_secs(60), "resized", || shown(&node.api.status(pod.uid())).1 == "3").await;
    until(Duration::from_secs(5), "done", || !resizing(&node.api.status(pod.uid()))).await;
    assert_eq!(reasons(&rig), ["ResizeDeferred", "ResizeStarted", "ResizeCompleted"]);
}

#[tokio::test(start_paused = true)]
async fn p70_a_deferred_resize_that_is_taken_back_leaves_no_trace() {
    let rig = Rig::new();
    let node = rig.start();
    let pod = sized(1, 1, "1", "1Gi", &json!({}));
    running(&node, std::slice::from_ref(&pod)).await;
    node.store.upsert(sized(1, 2, "9", "1Gi", &json!({})));
    until(Duration::from_secs(5), "deferred", || resizing(&node.api.status(pod.uid()))).await;
    node.store.upsert(sized(1, 3, "1", "1Gi", &json!({})));
    until(Duration::from_secs(5), "taken back", || !resizing(&node.api.status(pod.uid()))).await;
    assert_eq!(rig.runtime.count("UpdateContainerResources"), 0);
    assert_eq!(reasons(&rig), ["ResizeDeferred"]);
}

#[tokio::test(start_paused = true)]
async fn p71_the_resize_policy_restarts_the_container_once() {
    let rig = Rig::new();
    let node = rig.start();
    let policy = json!({"resizePolicy": [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]});
    let pod = sized(1, 1, "1", "1Gi", &policy);
    running(&node, std::slice::from_ref(&pod)).await;
    node.store.upsert(sized(1, 2, "1", "2Gi", &policy));
    let done = || {
        let status = node.api.status(pod.uid());
        ready(&status) && !resizing(&status) && shown(&status).2 == "2Gi"
    };
    until(Duration::from_secs(60), "restarted", done).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let status = node.api.status(pod.uid());
    assert_eq!(status.container_statuses.as_ref().unwrap()[0].restart_count, 1);
    assert_eq!(rig.runtime.count("UpdateContainerResources"), 0);
    assert_eq!(in_force(&rig, &pod).memory_limit_in_bytes, 2 * GI);
    assert_eq!(rig.cgroups.1.lock().unwrap()[pod.uid()].memory, Some(2 * GI), "the pod's cgroup grew before the start");
    assert!(rig.events.has("Killing", "Container main resize requires restart"));
    assert_eq!(reasons(&rig), ["ResizeStarted", "ResizeCompleted"]);
}

#[tokio::test(start_paused = true)]
async fn p71_a_memory_limit_below_use_is_an_error_until_use_is_lower() {
    let rig = Rig::new();
    rig.runtime.memory_use("main", 900 << 20);
    let node = rig.start();
    let pod = sized(1, 1, "1", "1Gi", &json!({}));
    running(&node, std::slice::from_ref(&pod)).await;
    node.store.upsert(sized(1, 2, "1", "512Mi", &json!({})));
    let going_on = || condition(&node.api.status(pod.uid()), "PodResizeInProgress");
    until(Duration::from_secs(5), "error", || going_on().is_some_and(|c| c.reason.as_deref() == Some("Error"))).await;
    let message = "cannot decrease memory limits: attempting to set container \"main\" memory limit (536870912) below current usage (943718400)";
    assert_eq!(going_on().unwrap().message.as_deref(), Some(message));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(rig.runtime.count("UpdateContainerResources"), 0);
    rig.runtime.memory_use("main", 100 << 20);
    until(Duration::from_secs(20), "done", || !resizing(&node.api.status(pod.uid()))).await;
    assert_eq!(in_force(&rig, &pod).memory_limit_in_bytes, 512 << 20);
    assert_eq!(reasons(&rig), ["ResizeStarted", "ResizeError", "ResizeCompleted"]);
}

#[tokio::test(start_paused = true)]
async fn p71_a_runtime_that_refuses_is_asked_again() {
    let rig = Rig::new();
    let node = rig.start();
    let pod = sized(1, 1, "1", "1Gi", &json!({}));
    running(&node, std::slice::from_ref(&pod)).await;
    rig.runtime.inject("UpdateContainerResources", 2, Fault::error("no"));
    node.store.upsert(sized(1, 2, "2", "1Gi", &json!({})));
    until(Duration::from_secs(20), "resized", || in_force(&rig, &pod).cpu_shares == 2048).await;
    until(Duration::from_secs(5), "done", || !resizing(&node.api.status(pod.uid()))).await;
    assert_eq!(reasons(&rig), ["ResizeStarted", "ResizeError", "ResizeCompleted"], "the same error is one event");
}

#[tokio::test(start_paused = true)]
async fn p73_after_a_restart_of_the_agent_the_allocation_holds_and_the_rest_of_the_resize_is_done() {
    let rig = Rig::new();
    let node = rig.start();
    let policy = json!({"resizePolicy": [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]});
    let (pod, deferred, restarts) =
        (sized(1, 1, "1", "1Gi", &json!({})), sized(2, 1, "1", "1Gi", &json!({})), sized(3, 1, "1", "1Gi", &policy));
    running(&node, &[pod.clone(), deferred.clone(), restarts.clone()]).await;
    // One waits, one is stuck between allocation and force, one has been restarted for it.
    rig.runtime.inject_for("UpdateContainerResources", pod.uid().as_str(), 6, Fault::error("no"));
    let asked = [
        sized(1, 2, "1500m", "1Gi", &json!({})),
        sized(2, 2, "3", "1Gi", &json!({})),
        sized(3, 2, "1", "2Gi", &policy),
    ];
    asked.iter().for_each(|pod| node.store.upsert(pod.clone()));
    let restarted = || in_force(&rig, &restarts).memory_limit_in_bytes == 2 * GI;
    until(Duration::from_secs(30), "restarted", restarted).await;
    until(Duration::from_secs(5), "waits", || resizing(&node.api.status(deferred.uid()))).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    node.kill9();
    tokio::time::sleep(Duration::from_secs(1)).await;
    rig.runtime.clear_calls();

    let node = rig.start();
    running(&node, &asked).await;
    until(Duration::from_secs(30), "the rest", || in_force(&rig, &pod).cpu_shares == 1536).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(in_force(&rig, &deferred).cpu_shares, 1024, "still no room");
    let status = node.api.status(deferred.uid());
    assert_eq!(condition(&status, "PodResizePending").unwrap().reason.as_deref(), Some("Deferred"));
    assert_eq!(shown(&status).0, "1");
    assert_eq!(rig.runtime.count("CreateContainer"), 0, "nobody is restarted twice");
}
