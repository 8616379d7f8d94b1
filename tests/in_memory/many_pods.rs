//! Many pods at once: a thousand of them, under faults, and what one bad pod may cost the others (nothing).

use std::time::Duration;

use rkubelet::{
    cri::fake::{Events, Fault},
    pods::PodSource,
    wake::Cause,
};

use crate::rig::{Rig, deleting, pod, ready, simple, until};

const PODS: usize = 1000;

#[tokio::test(start_paused = true)]
async fn a_thousand_pods_start_without_a_tick_and_end_without_a_trace() {
    let rig = Rig::new();
    let node = rig.start();
    let pods: Vec<_> = (0..PODS).map(|n| pod(n, simple())).collect();
    node.store.replace(PodSource::Api, pods.clone());
    let all = || pods.iter().filter(|p| ready(&node.api.status(p.uid()))).count();
    let took = until(Duration::from_secs(400), "all ready", || all() == PODS).await;
    // Two at a time through 225 ms of runtime each: anything much longer was spent waiting for nothing.
    assert!(took < Duration::from_secs(125), "{took:?}");
    assert_eq!(rig.runtime.count("RunPodSandbox"), PODS);
    assert_eq!(rig.runtime.count("StartContainer"), PODS);
    assert_eq!(node.counter("rkubelet_pod_wakes_total", Cause::Timer.as_str()), 0.0, "no pod waited for a timer");

    for pod in &pods {
        node.store.upsert(deleting(pod, 1));
    }
    until(Duration::from_secs(120), "all gone", || node.workers.is_empty()).await;
    assert!(pods.iter().all(|p| rig.runtime.sandboxes(p.uid().as_str()).is_empty()));
    assert!(rig.volumes.mounted.lock().unwrap().is_empty());
    assert!(rig.cgroups.0.lock().unwrap().is_empty());
    assert!(node.runtime_store.uids().is_empty(), "the runtime store forgets them");
}

#[tokio::test(start_paused = true)]
async fn runtime_errors_cost_time_but_no_pod() {
    let rig = Rig::new();
    let node = rig.start();
    rig.runtime.inject("RunPodSandbox", 40, Fault::error("failed to set up sandbox network"));
    rig.runtime.inject("CreateContainer", 40, Fault::error("no"));
    rig.runtime.inject("StartContainer", 20, Fault::error("no"));
    let pods: Vec<_> = (0..200).map(|n| pod(n, simple())).collect();
    node.store.replace(PodSource::Api, pods.clone());
    let all = || pods.iter().filter(|p| ready(&node.api.status(p.uid()))).count();
    until(Duration::from_secs(300), "all ready", || all() == 200).await;
    assert_eq!(rig.runtime.worst_max_running().map(|(_, _, n)| n), Some(1), "never two of one container");
    assert!(rig.events.has(
        "FailedCreatePodSandBox",
        "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to set up sandbox network"
    ));
    assert!(rig.events.has("Failed", "Error: no"));
}

#[tokio::test(start_paused = true)]
async fn a_hung_mount_and_a_hung_runtime_call_stall_their_pods_alone() {
    let rig = Rig::new();
    let node = rig.start();
    let pods: Vec<_> = (0..20).map(|n| pod(n, simple())).collect();
    rig.volumes.hung.lock().unwrap().insert(pods[3].uid().clone());
    rig.runtime.inject_for("RunPodSandbox", "p5", 1, Fault::Hang);
    node.store.replace(PodSource::Api, pods.clone());
    let all = || pods.iter().filter(|p| ready(&node.api.status(p.uid()))).count();
    until(Duration::from_secs(60), "the other 18 ready", || all() == 18).await;
    assert!(!ready(&node.api.status(pods[3].uid())) && !ready(&node.api.status(pods[5].uid())));
    // A hung mount does not keep its pod from ending.
    node.store.upsert(deleting(&pods[3], 1));
    until(Duration::from_secs(30), "pod 3 gone", || node.store.get(pods[3].uid()).is_none()).await;
    rig.runtime.release("RunPodSandbox");
    until(Duration::from_secs(60), "pod 5 ready", || ready(&node.api.status(pods[5].uid()))).await;
}

/// A pod that waits at the start gate and is deleted goes at once, and the runtime never hears of it.
#[tokio::test(start_paused = true)]
async fn what_waits_at_the_start_gate_is_given_up_with_its_pod() {
    let rig = Rig::new();
    let node = rig.start();
    let pods: Vec<_> = (0..3).map(|n| pod(n, simple())).collect();
    for name in ["p0", "p1"] {
        rig.runtime.inject_for("RunPodSandbox", name, 1, Fault::Hang);
    }
    node.store.replace(PodSource::Api, pods[..2].to_vec());
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Both places are taken, and are lent on only 5 s after the calls began.
    node.store.upsert(pods[2].clone());
    tokio::time::sleep(Duration::from_secs(1)).await;
    node.store.upsert(deleting(&pods[2], 1));
    until(Duration::from_secs(2), "pod 2 gone", || node.store.get(pods[2].uid()).is_none()).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let about_it =
        |call: &&rkubelet::cri::fake::Call| call.rpc == "RunPodSandbox" && call.about.contains(&"p2".to_owned());
    assert_eq!(rig.runtime.calls().iter().filter(about_it).count(), 0);
}

#[tokio::test(start_paused = true)]
async fn lost_events_and_broken_streams_are_made_up_for_by_lists() {
    for events in [Events::Lost, Events::Unimplemented] {
        let rig = Rig::new();
        rig.runtime.events(events);
        let node = rig.start();
        let pods: Vec<_> = (0..30).map(|n| pod(n, simple())).collect();
        node.store.replace(PodSource::Api, pods.clone());
        let all = || pods.iter().filter(|p| ready(&node.api.status(p.uid()))).count();
        until(Duration::from_secs(60), "all ready", || all() == 30).await;
        // A container that dies unseen is found and restarted.
        let (id, _) = rig.runtime.containers("uid-7", "main")[0].clone();
        rig.runtime.exit(&id, 1);
        until(Duration::from_secs(400), "restarted", || rig.runtime.containers("uid-7", "main").len() == 2).await;
    }
}
