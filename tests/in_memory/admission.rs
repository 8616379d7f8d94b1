//! Admission on a whole node: what a rejected pod leaves behind (nothing), preemption from order to status, RuntimeClasses.

use std::time::Duration;

use k8s_openapi::api::core::v1::PodStatus;
use rkubelet::{
    pods::{Pod, PodSource},
    wake::Cause,
};
use serde_json::{Value, json};

use crate::rig::{Rig, deleting, pod, ready, until};

const MINUTE: Duration = Duration::from_secs(60);

fn asking(number: usize, millis: u32, priority: i32) -> Pod {
    let resources = json!({"requests": {"cpu": format!("{millis}m")}});
    let container = json!({"name": "main", "image": "busybox:1", "resources": resources});
    pod(number, json!({"priority": priority, "terminationGracePeriodSeconds": 5, "containers": [container]}))
}

fn small_node() -> Rig {
    let rig = Rig::new();
    rig.facts.lock().unwrap().allocatable.insert("cpu".into(), "1".into());
    rig
}

fn verdict(status: &PodStatus) -> [&str; 3] {
    [&status.phase, &status.reason, &status.message].map(|field| field.as_deref().unwrap_or_default())
}

#[tokio::test(start_paused = true)]
async fn a01_a_rejected_pod_fails_with_its_reason_and_touches_nothing() {
    let rig = small_node();
    let node = rig.start();
    let (first, second) = (asking(1, 600, 0), asking(2, 600, 0));
    node.store.replace(PodSource::Api, vec![first.clone(), second.clone()]);
    let failed = || node.api.status(second.uid()).phase.as_deref() == Some("Failed");
    until(MINUTE, "rejected", failed).await;
    let message = "Node didn't have enough resource: cpu, requested: 600, used: 600, capacity: 1000";
    let status = node.api.status(second.uid());
    assert_eq!(verdict(&status), ["Failed", "OutOfcpu", &format!("Pod was rejected: {message}")]);
    assert_eq!((status.observed_generation, status.qos_class.as_deref()), (Some(1), Some("Burstable")));
    assert!(status.start_time.is_some() && status.container_statuses.is_none() && status.host_ip.is_none());
    assert_eq!(node.api.history(second.uid()).len(), 1, "the end is the first that is said");
    assert!(rig.events.all().iter().any(|e| e.reason == "OutOfcpu" && e.message == message));
    until(MINUTE, "the other runs", || ready(&node.api.status(first.uid()))).await;
    assert!(rig.runtime.sandboxes("uid-2").is_empty());
    assert!(!rig.cgroups.0.lock().unwrap().contains(second.uid()));
    assert!(!rig.volumes.mounted.lock().unwrap().contains(second.uid()));

    // After a restart of the agent the one that runs is admitted first, though both are new to the process.
    let before = rig.runtime.containers("uid-1", "main");
    node.kill9();
    let again = rig.start();
    again.store.replace(PodSource::Api, vec![second.clone(), first.clone()]);
    until(MINUTE, "rejected again", || again.api.status(second.uid()).phase.as_deref() == Some("Failed")).await;
    until(MINUTE, "adopted", || ready(&again.api.status(first.uid()))).await;
    assert_eq!(rig.runtime.containers("uid-1", "main"), before);

    // Its place is free when its containers are gone, before the API has let it go.
    again.store.upsert(deleting(&first, 1));
    let ended = || again.api.status(first.uid()).phase.as_deref().is_some_and(|p| p == "Failed" || p == "Succeeded");
    until(MINUTE, "deleted", || ended() || again.store.get(first.uid()).is_none()).await;
    let third = asking(3, 1000, 0);
    again.store.upsert(third.clone());
    until(MINUTE, "the next one", || ready(&again.api.status(third.uid()))).await;
}

#[tokio::test(start_paused = true)]
async fn a11_a_critical_pod_gets_its_place() {
    let rig = small_node();
    let node = rig.start();
    let (victim, critical) = (asking(1, 800, 0), asking(2, 500, 2_000_000_000));
    node.store.replace(PodSource::Api, vec![victim.clone()]);
    until(MINUTE, "it runs", || ready(&node.api.status(victim.uid()))).await;
    node.store.upsert(critical.clone());
    until(MINUTE, "the critical pod runs", || ready(&node.api.status(critical.uid()))).await;
    let status = node.api.status(victim.uid());
    assert_eq!(verdict(&status), ["Failed", "Preempting", "Preempted in order to admit critical pod"]);
    let disrupted = status.conditions.iter().flatten().find(|c| c.type_ == "DisruptionTarget").unwrap();
    assert_eq!(
        (disrupted.status.as_str(), disrupted.reason.as_deref(), disrupted.message.as_deref()),
        ("True", Some("TerminationByKubelet"), Some("Pod was preempted by Kubelet to accommodate a critical pod."))
    );
    assert_eq!(disrupted.observed_generation, Some(1));
    let early = node.api.history(victim.uid()).into_iter().filter(|s| s.phase.as_deref() != Some("Failed"));
    let mut conditions = early.flat_map(|s| s.conditions.unwrap_or_default());
    assert!(conditions.all(|c| c.type_ != "DisruptionTarget"), "only with the end");
    assert!(rig.events.has("Preempting", "Preempted in order to admit critical pod"));
    assert_eq!(node.counter("kubelet_preemptions", "cpu"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn nothing_begins_before_the_node_is_known() {
    let rig = Rig::new();
    rig.facts.lock().unwrap().node_seen = false;
    let node = rig.start();
    let pod = asking(1, 100, 0);
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    tokio::time::sleep(MINUTE).await;
    assert!(rig.runtime.sandboxes("uid-1").is_empty() && node.api.history(pod.uid()).is_empty());
    node.facts.send_modify(|facts| std::sync::Arc::make_mut(facts).node_seen = true);
    node.wakes.wake_all(Cause::Node);
    until(MINUTE, "it runs", || ready(&node.api.status(pod.uid()))).await;
}

fn of_class(spec_overhead: Value) -> Pod {
    let container = json!({"name": "main", "image": "busybox:1", "resources": {"limits": {"memory": "64Mi"}}});
    pod(1, json!({"runtimeClassName": "vm", "overhead": spec_overhead, "containers": [container]}))
}

#[tokio::test(start_paused = true)]
async fn p61_the_class_gives_the_handler_and_a_missing_one_is_told() {
    let rig = Rig::new();
    let node = rig.start();
    let pod = of_class(json!({"cpu": "250m", "memory": "120Mi"}));
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    let missing = "Failed to create pod sandbox: runtimeclass.node.k8s.io \"vm\" not found";
    until(MINUTE, "told", || rig.events.has("FailedCreatePodSandBox", missing)).await;
    assert_eq!(rig.runtime.count("RunPodSandbox"), 0);
    rig.classes.0.lock().unwrap().insert("vm".into(), "kata".into());
    node.wakes.wake(pod.uid(), Cause::Object);
    let took = until(MINUTE, "it runs", || ready(&node.api.status(pod.uid()))).await;
    assert!(took < Duration::from_secs(1), "the class wakes its pod: {took:?}");
    let runtime = node.runtime_store.pod(pod.uid()).unwrap();
    assert_eq!(runtime.sandboxes[0].runtime_handler, "kata");
    let linux = rig.runtime.sandbox_config(&runtime.sandboxes[0].id).unwrap().linux.unwrap();
    let overhead = linux.overhead.unwrap();
    assert_eq!((overhead.cpu_shares, overhead.memory_limit_in_bytes), (256, 120 << 20));
    assert_eq!(linux.resources.unwrap().memory_limit_in_bytes, 64 << 20);
}
