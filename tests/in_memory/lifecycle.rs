//! One pod's life through the shell: statuses in order, restarts of the agent, deletion.

use std::time::Duration;

use k8s_openapi::api::core::v1::PodStatus;
use rkubelet::{cri::fake::Script, pods::PodSource};
use serde_json::json;

use crate::rig::{Rig, deleting, pod, ready, simple, until};

fn phase(status: &PodStatus) -> &str {
    status.phase.as_deref().unwrap_or_default()
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a str {
    status.conditions.iter().flatten().find(|c| c.type_ == kind).map_or("", |c| c.status.as_str())
}

#[tokio::test(start_paused = true)]
async fn p40_running_and_ready_become_true_in_one_status() {
    let rig = Rig::new();
    let node = rig.start();
    let pod = pod(1, simple());
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    until(Duration::from_secs(10), "ready", || ready(&node.api.status(pod.uid()))).await;
    let history = node.api.history(pod.uid());
    let seen: Vec<_> = history.iter().map(|s| (phase(s), condition(s, "Ready"))).collect();
    assert_eq!(seen.first(), Some(&("Pending", "False")));
    assert_eq!(seen.last(), Some(&("Running", "True")));
    assert!(!seen.contains(&("Running", "False")), "{seen:?}");
    let status = node.api.status(pod.uid());
    let container = &status.container_statuses.as_ref().unwrap()[0];
    assert!(container.container_id.as_deref().unwrap().starts_with("containerd://"));
    assert_eq!((container.ready, container.started, container.restart_count), (true, Some(true), 0));
    assert_eq!(status.host_ip.as_deref(), Some("192.0.2.1"));
    assert!(status.pod_ip.is_some() && status.start_time.is_some());
    for reason in ["Created", "Started"] {
        assert!(rig.events.has(reason, "Container"), "{reason}");
    }
}

#[tokio::test(start_paused = true)]
async fn p34_an_out_of_memory_kill_told_after_the_end_corrects_the_reason_of_a_failed_pod() {
    let rig = Rig::new();
    let node = rig.start();
    let spec = json!({"restartPolicy": "Never", "containers": [{"name": "main", "image": "busybox:1"}]});
    let pod = pod(1, spec);
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    until(Duration::from_secs(10), "running", || phase(&node.api.status(pod.uid())) == "Running").await;
    let id = node.runtime_store.pod(pod.uid()).unwrap().latest("main").unwrap().id.clone();
    rig.runtime.exit(&id, 137);
    until(Duration::from_secs(20), "failed", || phase(&node.api.status(pod.uid())) == "Failed").await;
    node.runtime_store.mark_oom(&id);
    let reason = || {
        let status = node.api.status(pod.uid()).container_statuses.unwrap_or_default().remove(0);
        status.state.and_then(|s| s.terminated).and_then(|t| t.reason).unwrap_or_default()
    };
    until(Duration::from_secs(5), "the reason is corrected", || reason() == "OOMKilled").await;
}

#[tokio::test(start_paused = true)]
async fn p40_a_run_to_completion_pod_succeeds_or_fails_by_its_exit_code() {
    for (code, expected) in [(0, "Succeeded"), (3, "Failed")] {
        let rig = Rig::new();
        rig.runtime.script("main", [Script::exits(Duration::from_secs(2), code)]);
        let node = rig.start();
        let spec = json!({"restartPolicy": "Never", "containers": [{"name": "main", "image": "busybox:1"}]});
        let pod = pod(1, spec);
        node.store.replace(PodSource::Api, vec![pod.clone()]);
        until(Duration::from_secs(20), expected, || phase(&node.api.status(pod.uid())) == expected).await;
        let history = node.api.history(pod.uid());
        let first = history.iter().position(|s| phase(s) == expected).unwrap();
        assert!(history[first..].iter().all(|s| phase(s) == expected), "a terminal phase is never left");
        let state = history.last().unwrap().container_statuses.as_ref().unwrap()[0].state.clone().unwrap();
        assert_eq!(state.terminated.unwrap().exit_code, code);
        assert!(rig.volumes.mounted.lock().unwrap().is_empty(), "a finished pod keeps no volumes");
    }
}

#[tokio::test(start_paused = true)]
async fn p25_a_crash_loop_backs_off_and_counts_up() {
    let rig = Rig::new();
    rig.runtime.script("main", [Script::exits(Duration::from_secs(1), 1)]);
    let node = rig.start();
    let pod = pod(1, simple());
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let starts: Vec<_> = rig.runtime.calls().into_iter().filter(|c| c.rpc == "StartContainer").map(|c| c.at).collect();
    let gaps: Vec<u64> = starts.windows(2).map(|w| w[1].duration_since(w[0]).as_secs() as u64).collect();
    assert_eq!(gaps, [1, 11, 21, 41], "1 s of life and a back-off of 0, 10, 20, 40 s");
    let status = node.api.status(pod.uid());
    let container = &status.container_statuses.as_ref().unwrap()[0];
    let waiting = container.state.as_ref().unwrap().waiting.clone().unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("CrashLoopBackOff"));
    assert_eq!(container.restart_count, 4);
    assert_eq!(container.last_state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 1);
    let counts: Vec<i32> =
        node.api.history(pod.uid()).iter().map(|s| s.container_statuses.as_ref().unwrap()[0].restart_count).collect();
    assert!(counts.is_sorted(), "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn p10_deletion_publishes_the_end_then_deletes_and_cleans() {
    let rig = Rig::new();
    rig.runtime.script("main", [Script::term_after(Duration::from_millis(300), 0)]);
    let node = rig.start();
    let pod = pod(1, simple());
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    until(Duration::from_secs(10), "ready", || ready(&node.api.status(pod.uid()))).await;
    node.store.upsert(deleting(&pod, 30));
    let took = until(Duration::from_secs(20), "gone", || node.workers.is_empty()).await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(rig.events.has("Killing", "Stopping container main"));
    let last = node.api.history(pod.uid()).pop().unwrap();
    assert!(last.container_statuses.unwrap()[0].state.as_ref().unwrap().terminated.is_some());
    assert!(rig.runtime.sandboxes("uid-1").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_killed_agent_adopts_what_runs_at_any_moment() {
    for moment in (0..40).map(|i| i * 9) {
        let rig = Rig::new();
        let first = rig.start();
        let pods: Vec<_> = (0..4).map(|n| pod(n, simple())).collect();
        first.store.replace(PodSource::Api, pods.clone());
        tokio::time::sleep(Duration::from_millis(moment)).await;
        first.kill9();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before: Vec<_> = (0..4).map(|n| rig.runtime.containers(&format!("uid-{n}"), "main")).collect();
        let second = rig.start();
        second.store.replace(PodSource::Api, pods.clone());
        let all = || pods.iter().filter(|p| ready(&second.api.status(p.uid()))).count();
        until(Duration::from_secs(60), "all ready after the restart", || all() == 4).await;
        for (n, before) in before.iter().enumerate() {
            let after = rig.runtime.containers(&format!("uid-{n}"), "main");
            for (id, state) in before.iter().filter(|(_, s)| *s == rkubelet::cri::ContainerState::Running) {
                assert!(after.contains(&(id.clone(), *state)), "moment {moment}: container {id} was not kept");
            }
        }
        assert_eq!(rig.runtime.worst_max_running().map_or(1, |(_, _, n)| n), 1, "moment {moment}");
    }
}

#[tokio::test(start_paused = true)]
async fn p07_orphans_end_only_after_every_source_was_heard() {
    let rig = Rig::new();
    let first = rig.start();
    let pod = pod(1, simple());
    first.store.replace(PodSource::Api, vec![pod.clone()]);
    until(Duration::from_secs(10), "ready", || ready(&first.api.status(pod.uid()))).await;
    first.kill9();
    let second = rig.start();
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(rig.runtime.count("StopContainer"), 0, "nobody has said that the pod is gone");
    second.store.replace(PodSource::Api, Vec::new());
    for uid in second.runtime_store.uids() {
        second.wakes.wake(&uid, rkubelet::wake::Cause::Desired);
    }
    until(Duration::from_secs(30), "the orphan is gone", || rig.runtime.sandboxes("uid-1").is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn p29_a_pod_that_only_the_runtime_knows_is_stopped_by_the_book() {
    let rig = Rig::new();
    let first = rig.start();
    let hook = json!({"preStop": {"exec": {"command": ["say", "goodbye"]}}});
    let pod = pod(1, json!({"containers": [{"name": "main", "image": "busybox:1", "lifecycle": hook}]}));
    first.store.replace(PodSource::Api, vec![pod.clone()]);
    until(Duration::from_secs(10), "ready", || ready(&first.api.status(pod.uid()))).await;
    first.kill9();
    let second = rig.start();
    second.store.replace(PodSource::Api, Vec::new());
    tokio::time::sleep(Duration::from_secs(1)).await;
    for uid in second.runtime_store.uids() {
        second.wakes.wake(&uid, rkubelet::wake::Cause::Desired);
    }
    until(Duration::from_secs(30), "the orphan is gone", || rig.runtime.sandboxes("uid-1").is_empty()).await;
    assert_eq!((rig.runtime.count("ExecSync"), rig.runtime.count("StopContainer")), (1, 1));
    assert!(rig.events.has("Killing", "Stopping container main"));
}

#[tokio::test(start_paused = true)]
async fn a_slow_api_delays_no_container() {
    let rig = Rig::new();
    let node = rig.start();
    *node.api.latency.lock().unwrap() = Duration::from_secs(120);
    let pod = pod(1, simple());
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    let took = until(Duration::from_secs(10), "running", || {
        rig.runtime.containers("uid-1", "main").iter().any(|(_, s)| *s == rkubelet::cri::ContainerState::Running)
    })
    .await;
    assert!(took < Duration::from_millis(400), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn i13_a_missing_image_volume_holds_up_only_who_mounts_it() {
    let rig = Rig::new();
    let node = rig.start();
    let pod = pod(
        1,
        json!({
            "volumes": [{"name": "v", "image": {"reference": "missing:1"}}],
            "containers": [
                {"name": "bare", "image": "busybox:1"},
                {"name": "mounts", "image": "busybox:1", "volumeMounts": [{"name": "v", "mountPath": "/v"}]},
            ],
        }),
    );
    node.store.replace(PodSource::Api, vec![pod.clone()]);
    let state = |at: usize| {
        let statuses = node.api.status(pod.uid()).container_statuses.unwrap_or_default();
        statuses.get(at).and_then(|status| status.state.clone()).unwrap_or_default()
    };
    let waits = || state(1).waiting.is_some_and(|w| w.reason.as_deref() == Some("ErrImagePull"));
    until(Duration::from_secs(10), "ErrImagePull", waits).await;
    assert_eq!(state(1).waiting.unwrap().message.as_deref(), Some("missing:1: not found"));
    until(Duration::from_secs(10), "the other runs", || state(0).running.is_some()).await;
    assert!(rig.events.has("Failed", "Error: ErrImagePull"));
    let created = rig.runtime.calls().into_iter().filter(|c| c.rpc == "CreateContainer").count();
    assert_eq!(created, 1);
}
