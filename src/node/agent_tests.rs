use serde_json::Value;

use super::super::{fake_api::FakeApi, machine::tests::fixture, settings::test_settings};
use super::*;
use crate::{
    config::CgroupDriver,
    cri::fake::FakeRuntime,
    events::MemoryEvents,
    resources::CgroupSettings,
    time::{Clock, SystemClock},
    wake::NoWakes,
};

struct World {
    api: FakeApi,
    runtime: FakeRuntime,
    events: Arc<MemoryEvents>,
    handles: NodeHandles,
    cgroup: std::path::PathBuf,
    cancel: CancellationToken,
    _dir: tempfile::TempDir,
}

fn start(standalone: bool) -> World {
    let (dir, host) = fixture();
    let cgroup = host.sys.join("fs/cgroup");
    std::fs::create_dir_all(&cgroup).unwrap();
    std::fs::write(cgroup.join("cgroup.controllers"), "cpu memory pids\n").unwrap();
    let cgroups = KubepodsCgroups::new(CgroupSettings {
        mount: cgroup.clone(),
        root: "/".into(),
        per_qos: true,
        driver: CgroupDriver::Cgroupfs,
        pod_pids_limit: -1,
        cpu_cfs_quota: true,
        cpu_cfs_period_micros: 100_000,
        hugepage_sizes: vec![],
        systemd_socket: "/none".into(),
        memory_reservation: false,
        memory_throttling_factor: None,
        qos_reserved_memory_percent: None,
    })
    .unwrap();
    let (api, cancel) = (FakeApi::default(), CancellationToken::new());
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let runtime = FakeRuntime::new(Arc::clone(&clock));
    let events = Arc::new(MemoryEvents::default());
    let parts = NodeParts {
        settings: NodeSettings { host, root_dir: dir.path().into(), ..test_settings() },
        clients: (!standalone).then(|| ApiClients::over(api.client())),
        runtime: Arc::new(runtime.clone()),
        images: Arc::new(runtime.clone()),
        cgroups,
        events: events.clone(),
        wakes: Arc::new(NoWakes),
        health: Arc::new(Vec::new),
        clock,
        cancel: cancel.clone(),
    };
    let handles = NodeAgent::start(parts).unwrap();
    World { api, runtime, events, handles, cgroup, cancel, _dir: dir }
}

impl World {
    fn ready(&self) -> Value {
        let node = self.api.get("/api/v1/nodes/node1").unwrap_or_default();
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.into_iter().find(|c| c["type"] == "Ready").unwrap_or_default()
    }
    fn facts(&self) -> Arc<NodeFacts> {
        self.handles.facts.borrow().clone()
    }
    async fn stop(self) {
        self.cancel.cancel();
        self.handles.tasks.wait().await;
        if let Some(lease) = self.handles.lease {
            lease.join().unwrap();
        }
    }
}

async fn seconds(n: u64) {
    tokio::time::sleep(Duration::from_secs(n)).await;
}

#[tokio::test(start_paused = true)]
async fn n01_n17_from_start_to_ready_to_down_and_back() {
    let world = start(false);
    world.runtime.set_conditions(true, false);
    seconds(3).await;
    assert_eq!(world.ready()["status"], "False");
    let reason = "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:";
    assert_eq!(world.facts().network_not_ready.as_deref(), Some(reason));
    assert!(world.facts().runtime_ready);

    world.runtime.set_conditions(true, true);
    seconds(1).await;
    assert_eq!(world.ready()["message"], "kubelet is posting ready status");
    let facts = world.facts();
    assert_eq!(facts.network_not_ready, None);
    assert_eq!((facts.name.as_str(), facts.hostname.as_str()), ("node1", "kernel1"));
    assert_eq!(facts.capacity["cpu"], "2");
    assert_eq!(facts.labels["kubernetes.io/hostname"], "node1");
    assert!(facts.cgroup_v2);

    world.runtime.set_down(true);
    seconds(40).await;
    assert_eq!(world.ready()["message"], "container runtime is down");
    assert!(!world.facts().runtime_ready);
    world.runtime.set_down(false);
    seconds(1).await;
    assert_eq!(world.ready()["status"], "True");

    let told: Vec<String> = world.events.all().iter().map(|e| e.reason.clone()).collect();
    for reason in ["Starting", "NodeAllocatableEnforced", "NodeHasSufficientMemory", "NodeReady", "NodeNotReady"] {
        assert!(told.iter().any(|t| t == reason), "{reason} in {told:?}");
    }
    assert!(world.events.has("Starting", "Starting kubelet."));
    let limit = std::fs::read_to_string(world.cgroup.join("kubepods/memory.max")).unwrap();
    assert_eq!(limit, (24_684_096_i64 * 1024).to_string());
    assert!(world.api.get("/apis/storage.k8s.io/v1/csinodes/node1").is_some());
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn n25_standalone_keeps_facts_and_writes_nothing() {
    let world = start(true);
    seconds(30).await;
    assert!(world.facts().runtime_ready);
    assert_eq!(world.facts().capacity["pods"], "110");
    assert!(world.api.requests().is_empty());
    assert!(world.handles.lease.is_none());
    world.stop().await;
}

#[tokio::test(start_paused = true)]
async fn n06_pod_cidrs_are_handed_over_once_and_again_after_a_failure() {
    let runtime = FakeRuntime::new(Arc::new(SystemClock));
    let node = watch::Sender::new(None);
    let cancel = CancellationToken::new();
    let task = tokio::spawn(pod_cidr::follow(node.subscribe(), Arc::new(runtime.clone()), cancel.clone()));
    runtime.inject("UpdateRuntimeConfig", 1, crate::cri::fake::Fault::error("later"));
    let with = |version: &str| -> Node {
        let cidrs = serde_json::json!(["10.0.0.0/24", "fd00::/64"]);
        serde_json::from_value(
            serde_json::json!({"metadata": {"resourceVersion": version}, "spec": {"podCIDRs": cidrs}}),
        )
        .unwrap()
    };
    node.send_replace(Some(Arc::new(with("1"))));
    seconds(1).await;
    assert_eq!(runtime.count("UpdateRuntimeConfig"), 1);
    seconds(5).await;
    assert_eq!(runtime.count("UpdateRuntimeConfig"), 2);
    node.send_replace(Some(Arc::new(with("2"))));
    seconds(10).await;
    assert_eq!(runtime.count("UpdateRuntimeConfig"), 2, "known already");
    cancel.cancel();
    task.await.unwrap();
}
