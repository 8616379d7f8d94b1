//! The collector over a runtime, a disk and stores in memory.

use std::{collections::HashMap, path::Path, sync::Mutex};

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::json;

use super::*;
use crate::{
    cri::{
        fake::{FakeRuntime, ImageScript},
        v1,
    },
    events::MemoryEvents,
    pods::{ContainerRef, PodSource},
    resources::CgroupError,
    time::SimulatedClock,
    volumes::{MountedVolumes, VolumeError},
};

#[derive(Default)]
struct Woken(Mutex<Vec<String>>);

impl WakeSink for Woken {
    fn wake(&self, uid: &PodUid, cause: Cause) {
        if cause == Cause::Desired {
            self.0.lock().unwrap().push(uid.as_str().to_owned());
        }
    }
    fn wake_all(&self, _: Cause) {}
}

/// UIDs that the disk, or the cgroup tree, still knows.
struct Leftovers(Vec<PodUid>);

#[async_trait]
impl PodVolumes for Leftovers {
    async fn mount(&self, _: &Pod) -> Result<Arc<MountedVolumes>, Vec<VolumeError>> {
        Ok(Arc::default())
    }
    async fn refresh(&self, _: &Pod) -> Result<Option<Duration>, Vec<VolumeError>> {
        Ok(None)
    }
    async fn container_mounts(
        &self,
        _: &Pod,
        _: ContainerRef<'_>,
        _: &MountedVolumes,
        _: &std::collections::BTreeMap<String, String>,
    ) -> Result<Vec<v1::Mount>, VolumeError> {
        Ok(Vec::new())
    }
    async fn unmount(&self, _: &PodUid) -> Result<(), VolumeError> {
        Ok(())
    }
    async fn on_disk(&self) -> Vec<PodUid> {
        self.0.clone()
    }
}

#[async_trait]
impl PodCgroups for Leftovers {
    fn cgroup_parent(&self, _: &Pod) -> String {
        String::new()
    }
    async fn create(&self, _: &Pod) -> Result<(), CgroupError> {
        Ok(())
    }
    async fn remove(&self, _: &PodUid) -> Result<(), CgroupError> {
        Ok(())
    }
    async fn list(&self) -> Vec<PodUid> {
        self.0.clone()
    }
}

struct World {
    runtime: FakeRuntime,
    store: Arc<PodStore>,
    runtime_store: Arc<RuntimeStore>,
    woken: Arc<Woken>,
    events: Arc<MemoryEvents>,
    collector: Arc<Collector>,
    dir: tempfile::TempDir,
}

impl World {
    /// A worker looks after `busy`; the disk knows `disk` and the cgroup tree `cgroup`.
    fn new() -> Self {
        let clock: Arc<dyn Clock> = Arc::new(SimulatedClock::starting_at(Timestamp::UNIX_EPOCH));
        let runtime = FakeRuntime::new(Arc::clone(&clock));
        runtime.image("img", ImageScript::Present);
        let port: Arc<dyn RuntimeService> = Arc::new(runtime.clone());
        let woken = Arc::new(Woken::default());
        let store = Arc::new(PodStore::new(&[PodSource::Api], woken.clone()));
        let runtime_store = Arc::new(RuntimeStore::with_clock(Arc::clone(&port), woken.clone(), Arc::clone(&clock)));
        let dir = tempfile::tempdir().unwrap();
        for sub in ["pods", "containers"] {
            std::fs::create_dir(dir.path().join(sub)).unwrap();
        }
        let events = Arc::new(MemoryEvents::default());
        let collector = Collector::new(CollectorParts {
            limits: Limits { per_container: Some(1), total: None, minimum_age: Duration::ZERO },
            pod_logs_dir: dir.path().join("pods"),
            container_logs_dir: dir.path().join("containers"),
            store: Arc::clone(&store),
            runtime: port,
            runtime_store: Arc::clone(&runtime_store),
            volumes: Arc::new(Leftovers(vec!["disk".into(), "busy".into()])),
            cgroups: Arc::new(Leftovers(vec!["cgroup".into(), "pod".into()])),
            has_worker: Arc::new(|uid| uid.as_str() == "busy"),
            wakes: woken.clone(),
            events: events.clone(),
            clock,
            mutations: TaskTracker::new(),
        });
        Self { runtime, store, runtime_store, woken, events, collector: Arc::new(collector), dir }
    }

    fn desire(&self, pods: &[(&str, &str)]) {
        let pod = |(uid, phase): &(&str, &str)| {
            let object = json!({
                "metadata": {"name": uid, "namespace": "ns", "uid": uid},
                "spec": {"containers": [{"name": "c"}]},
                "status": {"phase": phase},
            });
            Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, Timestamp::UNIX_EPOCH).unwrap()
        };
        self.store.replace(PodSource::Api, pods.iter().map(pod).collect());
        self.woken.0.lock().unwrap().clear();
    }

    async fn sandbox(&self, uid: &str, attempt: u32) -> (String, v1::PodSandboxConfig) {
        let metadata = v1::PodSandboxMetadata { name: uid.into(), namespace: "ns".into(), uid: uid.into(), attempt };
        let config = v1::PodSandboxConfig {
            metadata: Some(metadata),
            labels: labels(uid),
            log_directory: self.dir.path().join("pods").join(format!("ns_{uid}_{uid}")).display().to_string(),
            ..Default::default()
        };
        (self.runtime.run_pod_sandbox(config.clone(), "").await.unwrap(), config)
    }

    /// `count` containers `c` that have ended, one second after the other.
    async fn ended(&self, uid: &str, sandbox: &(String, v1::PodSandboxConfig), count: u32) -> Vec<String> {
        let mut ids = Vec::new();
        for attempt in 0..count {
            let config = v1::ContainerConfig {
                metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt }),
                image: Some(image()),
                labels: labels(uid),
                log_path: format!("c/{attempt}.log"),
                ..Default::default()
            };
            let id = self.runtime.create_container(&sandbox.0, config, sandbox.1.clone()).await.unwrap();
            self.runtime.start_container(&id).await.unwrap();
            self.runtime.stop_container(&id, Duration::ZERO).await.unwrap();
            ids.push(id);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        ids
    }

    async fn containers(&self) -> Vec<String> {
        let mut ids: Vec<String> =
            self.runtime.list_containers(None).await.unwrap().into_iter().map(|c| c.id).collect();
        ids.sort();
        ids
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }
}

fn labels(uid: &str) -> HashMap<String, String> {
    [(crate::cri::POD_UID_LABEL, uid), (crate::cri::CONTAINER_NAME_LABEL, "c")]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into()
}

fn image() -> v1::ImageSpec {
    v1::ImageSpec { image: "img".into(), ..Default::default() }
}

fn touch(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "x").unwrap();
}

#[tokio::test(start_paused = true)]
async fn r27_old_containers_and_replaced_sandboxes_go_with_their_logs() {
    let world = World::new();
    world.desire(&[("pod", "Running")]);
    let old = world.sandbox("pod", 0).await;
    world.runtime.stop_pod_sandbox(&old.0).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let new = world.sandbox("pod", 1).await;
    let ids = world.ended("pod", &new, 3).await;
    for attempt in 0..3 {
        touch(&world.path(&format!("pods/ns_pod_pod/c/{attempt}.log")));
    }
    touch(&world.path("pods/ns_pod_pod/c/0.log.20261121-101500"));
    let link = world.path(&format!("containers/pod_ns_c-{}.log", ids[0]));
    std::os::unix::fs::symlink(world.path("pods/ns_pod_pod/c/0.log"), &link).unwrap();

    world.collector.collect().await.unwrap();
    assert_eq!(world.containers().await.len(), 3, "the runtime was not listed yet");
    world.runtime_store.relist().await.unwrap();
    world.collector.collect().await.unwrap();
    assert_eq!(world.containers().await, [ids[2].clone()]);
    let sandboxes = world.runtime.list_pod_sandbox(None).await.unwrap();
    assert_eq!(sandboxes.into_iter().map(|s| s.id).collect::<Vec<_>>(), [new.0]);
    let mut logs: Vec<_> =
        std::fs::read_dir(world.path("pods/ns_pod_pod/c")).unwrap().map(|e| e.unwrap().file_name()).collect();
    logs.sort();
    assert_eq!(logs, ["2.log"]);
    assert!(std::fs::symlink_metadata(&link).is_err());
    assert_eq!(world.runtime_store.pod(&"pod".into()).unwrap().containers.len(), 1, "the truth was read again");
}

#[tokio::test(start_paused = true)]
async fn r27_nothing_goes_before_every_source_was_heard() {
    let world = World::new();
    touch(&world.path("pods/ns_gone_gone/c/0.log"));
    let sandbox = world.sandbox("gone", 0).await;
    world.ended("gone", &sandbox, 3).await;
    world.runtime_store.relist().await.unwrap();
    let cancel = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&world.collector).run(world.store.completeness(), cancel.clone()));
    tokio::time::sleep(Duration::from_secs(600)).await;
    world.collector.collect().await.unwrap();
    world.collector.delete_unused_containers().await;
    assert!(world.woken.0.lock().unwrap().is_empty());
    assert_eq!(world.containers().await.len(), 3);
    assert!(world.path("pods/ns_gone_gone").exists());

    world.desire(&[]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut woken = world.woken.0.lock().unwrap().clone();
    woken.sort();
    assert_eq!(woken, ["cgroup", "disk", "gone", "pod"], "their workers take them down");
    assert_eq!(world.containers().await.len(), 3, "not the collector");
    assert!(world.path("pods/ns_gone_gone").exists(), "its containers are still there");
    cancel.cancel();
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn r27_logs_of_pods_that_are_gone_and_dead_links_go() {
    let world = World::new();
    world.desire(&[("pod", "Running")]);
    let sandbox = world.sandbox("pod", 0).await;
    let config = v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 0 }),
        image: Some(image()),
        labels: labels("pod"),
        ..Default::default()
    };
    let running = world.runtime.create_container(&sandbox.0, config, sandbox.1.clone()).await.unwrap();
    world.runtime.start_container(&running).await.unwrap();
    for uid in ["pod", "busy", "gone"] {
        touch(&world.path(&format!("pods/ns_{uid}_{uid}/c/0.log")));
    }
    for id in [running.as_str(), "gone"] {
        std::os::unix::fs::symlink("/nowhere", world.path(&format!("containers/p_ns_c-{id}.log"))).unwrap();
    }
    world.runtime_store.relist().await.unwrap();
    world.collector.collect().await.unwrap();
    let left = ["pod", "busy", "gone"].map(|uid| world.path(&format!("pods/ns_{uid}_{uid}")).exists());
    assert_eq!(left, [true, true, false]);
    let links: Vec<_> = std::fs::read_dir(world.path("containers")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(links, [format!("p_ns_c-{running}.log").as_str()], "a log that is being rotated keeps its link");
}

#[tokio::test(start_paused = true)]
async fn r27_a_node_short_of_disk_gives_up_what_ended_pods_left() {
    let world = World::new();
    world.desire(&[("done", "Succeeded"), ("pod", "Running")]);
    let done = world.sandbox("done", 0).await;
    world.ended("done", &done, 1).await;
    let pod = world.sandbox("pod", 0).await;
    let kept = world.ended("pod", &pod, 1).await;
    world.runtime_store.relist().await.unwrap();
    world.collector.delete_unused_containers().await;
    assert_eq!(world.containers().await.len(), 2, "its sandbox still runs");
    world.runtime.stop_pod_sandbox(&done.0).await.unwrap();
    world.runtime_store.relist().await.unwrap();
    world.collector.delete_unused_containers().await;
    assert_eq!(world.containers().await, kept);
    let sandboxes = world.runtime.list_pod_sandbox(None).await.unwrap();
    assert_eq!(sandboxes.into_iter().map(|s| s.id).collect::<Vec<_>>(), [pod.0]);
}

#[tokio::test(start_paused = true)]
async fn r27_a_failed_collection_is_an_event_of_the_node() {
    let world = World::new();
    world.desire(&[]);
    world.runtime_store.relist().await.unwrap();
    std::fs::remove_dir(world.path("pods")).unwrap();
    let cancel = CancellationToken::new();
    let running = tokio::spawn(Arc::clone(&world.collector).run(world.store.completeness(), cancel.clone()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let start = format!("failed to read podLogsDirectory {:?}: ", world.path("pods").display().to_string());
    assert!(world.events.has("ContainerGCFailed", &start), "{:?}", world.events.all());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(world.events.all().len(), 2, "once a minute");
    cancel.cancel();
    running.await.unwrap();
}
