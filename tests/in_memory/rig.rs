//! A node in one process: the real workers, runtime store and event follower over a runtime, an apiserver and a disk in memory.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ImageVolumeSource, PodStatus};
use rkubelet::{
    admission::{AdmissionMetrics, AdmissionParts, NodeAdmission, Policy},
    api::{
        ApiError, ConfigMapData, ReferencedObjects, RuntimeClassData, SecretData, ServiceAccountToken, ServiceEnv,
        TokenSpec,
    },
    containers::{ContainerPolicy, container_hash},
    cri::{
        CriMetrics, FollowSettings, RuntimeService, RuntimeStore,
        fake::{FakeRuntime, ImageScript},
        follow, v1,
    },
    events::MemoryEvents,
    images::{ImageError, Images, PresentImage},
    network::DnsSettings,
    node::NodeFacts,
    pod_status::StatusPublisher,
    pod_worker::{
        PodWorkers, StartGate, WorkerParts, WorkerSettings, WorkerWakes, backoff::BackoffLimits, decide::Rules,
        restart::LifecycleGates,
    },
    pods::{ContainerRef, Pod, PodSource, PodStore, PodUid},
    probes::{ContainerVerdicts, Liveness, PodProbes, ProbeTarget, Readiness, Startup},
    resources::{
        CgroupError, LedgerParts, PodCgroups, PodLedger, PodSize, ResizeMetrics,
        allocation::ResizePolicy,
        resize_plan::{PodCgroup, Resource},
    },
    telemetry::WorkerMetrics,
    time::{Clock, SimulatedClock},
    user_namespaces::{IdRange, UserNamespaces},
    volumes::{MountedVolumes, PodVolumes, VolumeError},
    wake::{Cause, WakeSink},
};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The apiserver's side of statuses: acknowledges after a delay, lets deleted pods go, counts.
pub struct MemoryApi {
    state: Mutex<ApiState>,
    wakes: Arc<dyn WakeSink>,
    store: Mutex<Option<Arc<PodStore>>>,
    /// How long a write takes.
    pub latency: Mutex<Duration>,
    tokio: tokio::runtime::Handle,
}

#[derive(Default)]
struct ApiState {
    offered: HashMap<PodUid, (u64, PodStatus)>,
    acknowledged: HashMap<PodUid, u64>,
    /// Every status in the order it was offered.
    pub history: HashMap<PodUid, Vec<PodStatus>>,
    deleting: HashSet<PodUid>,
}

impl MemoryApi {
    fn new(wakes: Arc<dyn WakeSink>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            wakes,
            store: Mutex::new(None),
            latency: Mutex::new(Duration::from_millis(5)),
            tokio: tokio::runtime::Handle::current(),
        })
    }
    pub fn status(&self, uid: &PodUid) -> PodStatus {
        self.state.lock().unwrap().offered.get(uid).map(|(_, s)| s.clone()).unwrap_or_default()
    }
    pub fn history(&self, uid: &PodUid) -> Vec<PodStatus> {
        self.state.lock().unwrap().history.get(uid).cloned().unwrap_or_default()
    }
}

/// The publisher's port over the memory API.
pub struct MemoryPublisher(pub Arc<MemoryApi>);

impl StatusPublisher for MemoryPublisher {
    fn offer(&self, pod: &Pod, status: PodStatus) -> u64 {
        let api = Arc::clone(&self.0);
        let uid = pod.uid().clone();
        let version = {
            let mut state = api.state.lock().unwrap();
            let (version, old) = state.offered.get(&uid).cloned().unwrap_or((0, PodStatus::default()));
            if version > 0 && old == status {
                return version;
            }
            state.history.entry(uid.clone()).or_default().push(status.clone());
            state.offered.insert(uid.clone(), (version + 1, status));
            version + 1
        };
        let latency = *api.latency.lock().unwrap();
        self.0.tokio.spawn(async move {
            tokio::time::sleep(latency).await;
            let newer = {
                let mut state = api.state.lock().unwrap();
                let acknowledged = state.acknowledged.entry(uid.clone()).or_default();
                let newer = *acknowledged < version;
                *acknowledged = version.max(*acknowledged);
                newer
            };
            if newer {
                api.wakes.wake(&uid, Cause::Published);
            }
        });
        version
    }

    fn acknowledged(&self, uid: &PodUid) -> u64 {
        self.0.state.lock().unwrap().acknowledged.get(uid).copied().unwrap_or(0)
    }

    fn delete(&self, pod: &Pod) {
        let api = Arc::clone(&self.0);
        let uid = pod.uid().clone();
        let acknowledged = self.acknowledged(&uid);
        let offered = api.state.lock().unwrap().offered.get(&uid).map_or(0, |(v, _)| *v);
        assert_eq!(acknowledged, offered, "DELETE before the terminal status was acknowledged");
        if !api.state.lock().unwrap().deleting.insert(uid.clone()) {
            return;
        }
        self.0.tokio.spawn(async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let store = api.store.lock().unwrap().clone();
            if let Some(store) = store {
                store.remove(&uid);
            }
        });
    }

    fn forget(&self, _: &PodUid) {}
}

pub struct MemoryVolumes {
    pods: PathBuf,
    pub mounted: Mutex<HashSet<PodUid>>,
    /// UIDs whose volumes cannot be mounted.
    pub broken: Mutex<HashSet<PodUid>>,
    /// UIDs whose mount never returns.
    pub hung: Mutex<HashSet<PodUid>>,
}

#[async_trait]
impl PodVolumes for MemoryVolumes {
    async fn mount(&self, pod: &Pod) -> Result<Arc<MountedVolumes>, Vec<VolumeError>> {
        if self.hung.lock().unwrap().contains(pod.uid()) {
            std::future::pending::<()>().await;
        }
        if self.broken.lock().unwrap().contains(pod.uid()) {
            return Err(Vec::new());
        }
        std::fs::create_dir_all(self.pods.join(pod.uid().as_str())).unwrap();
        self.mounted.lock().unwrap().insert(pod.uid().clone());
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
        _: &BTreeMap<String, String>,
    ) -> Result<Vec<v1::Mount>, VolumeError> {
        Ok(Vec::new())
    }
    async fn unmount(&self, uid: &PodUid) -> Result<(), VolumeError> {
        self.mounted.lock().unwrap().remove(uid);
        Ok(())
    }
    async fn on_disk(&self) -> Vec<PodUid> {
        self.mounted.lock().unwrap().iter().cloned().collect()
    }
}

#[derive(Default)]
pub struct MemoryCgroups(pub Mutex<HashSet<PodUid>>, pub Mutex<HashMap<PodUid, PodCgroup>>);

#[async_trait]
impl PodCgroups for MemoryCgroups {
    fn cgroup_parent(&self, pod: &Pod) -> String {
        format!("/kubepods/pod{}", pod.uid())
    }
    async fn create(&self, pod: &Pod) -> Result<(), CgroupError> {
        if self.0.lock().unwrap().insert(pod.uid().clone()) {
            self.1.lock().unwrap().insert(pod.uid().clone(), self.wanted(pod).unwrap());
        }
        Ok(())
    }
    async fn in_force(&self, pod: &Pod) -> Result<Option<PodCgroup>, CgroupError> {
        Ok(self.1.lock().unwrap().get(pod.uid()).copied())
    }
    fn wanted(&self, pod: &Pod) -> Option<PodCgroup> {
        let size = PodSize::of(pod);
        Some(PodCgroup {
            memory: size.memory_limit,
            cpu_quota: size.cpu_limit.map(|milli| milli * 100),
            cpu_period: 100_000,
            cpu_share: size.cpu_request as u64,
        })
    }
    async fn memory_use(&self, _: &Pod) -> Option<u64> {
        Some(2 << 20)
    }
    async fn set_limit(&self, pod: &Pod, resource: Resource) -> Result<(), CgroupError> {
        let wanted = self.wanted(pod).unwrap();
        let mut all = self.1.lock().unwrap();
        let have = all.get_mut(pod.uid()).unwrap();
        match resource {
            Resource::Memory => have.memory = wanted.memory,
            Resource::Cpu => have.cpu_quota = wanted.cpu_quota,
        }
        Ok(())
    }
    async fn set_shares(&self, pod: &Pod) -> Result<(), CgroupError> {
        let share = self.wanted(pod).unwrap().cpu_share;
        self.1.lock().unwrap().get_mut(pod.uid()).unwrap().cpu_share = share;
        Ok(())
    }
    async fn remove(&self, uid: &PodUid) -> Result<(), CgroupError> {
        self.0.lock().unwrap().remove(uid);
        Ok(())
    }
    async fn list(&self) -> Vec<PodUid> {
        self.0.lock().unwrap().iter().cloned().collect()
    }
}

/// Every image is there, but volumes whose reference begins with `missing`.
struct MemoryImages;

#[async_trait]
impl Images for MemoryImages {
    async fn ensure(
        &self,
        _: &Pod,
        container: ContainerRef<'_>,
        _: &v1::PodSandboxConfig,
    ) -> Result<PresentImage, ImageError> {
        let image = container.image().to_owned();
        Ok(PresentImage { reference: image.clone(), requested: image, uid: None, username: String::new() })
    }
    async fn ensure_volume(
        &self,
        _: &Pod,
        _: &str,
        source: &ImageVolumeSource,
        _: &v1::PodSandboxConfig,
    ) -> Result<v1::ImageSpec, ImageError> {
        let image = source.reference.clone().unwrap_or_default();
        if image.starts_with("missing") {
            return Err(ImageError { reason: "ErrImagePull", message: format!("{image}: not found"), retry_at: None });
        }
        Ok(v1::ImageSpec { image, ..Default::default() })
    }
    fn forget(&self, _: &PodUid) {}
}

/// No object but RuntimeClasses: name → handler.
#[derive(Clone, Default)]
pub struct Classes(pub Arc<Mutex<HashMap<String, String>>>);

#[async_trait]
impl ReferencedObjects for Classes {
    fn track(&self, _: &Pod) {}
    fn forget(&self, _: &PodUid) {}
    async fn config_map(&self, _: &str, name: &str) -> Result<Arc<ConfigMapData>, ApiError> {
        Err(ApiError::NotFound { kind: "configmap", name: name.to_owned() })
    }
    async fn secret(&self, _: &str, name: &str) -> Result<Arc<SecretData>, ApiError> {
        Err(ApiError::NotFound { kind: "secret", name: name.to_owned() })
    }
    async fn runtime_class(&self, name: &str) -> Result<Arc<RuntimeClassData>, ApiError> {
        let found = self.0.lock().unwrap().get(name).cloned();
        let missing = || ApiError::NotFound { kind: "runtimeclass.node.k8s.io", name: name.to_owned() };
        found.map(|handler| Arc::new(RuntimeClassData { handler })).ok_or_else(missing)
    }
    async fn service_account_token(&self, _: &Pod, _: &TokenSpec) -> Result<ServiceAccountToken, ApiError> {
        Err(ApiError::Unavailable { message: "no tokens here".to_owned() })
    }
    fn services(&self, _: &str) -> Option<Vec<ServiceEnv>> {
        Some(Vec::new())
    }
}

/// Everything that runs is alive and ready.
#[derive(Default)]
struct AllReady(Mutex<HashMap<PodUid, HashMap<String, ContainerVerdicts>>>);

impl PodProbes for AllReady {
    fn track(&self, pod: &Pod, targets: &[ProbeTarget]) {
        let verdicts = targets.iter().map(|t| {
            let verdicts = ContainerVerdicts {
                container_id: t.container_id.clone(),
                liveness: Liveness::Alive,
                readiness: Readiness::Ready,
                startup: Startup::Started,
            };
            (t.container.clone(), verdicts)
        });
        self.0.lock().unwrap().insert(pod.uid().clone(), verdicts.collect());
    }
    fn verdicts(&self, uid: &PodUid) -> HashMap<String, ContainerVerdicts> {
        self.0.lock().unwrap().get(uid).cloned().unwrap_or_default()
    }
    fn forget(&self, uid: &PodUid) {
        self.0.lock().unwrap().remove(uid);
    }
}

/// What outlives the agent process: runtime, disk, apiserver.
pub struct Rig {
    pub runtime: FakeRuntime,
    pub volumes: Arc<MemoryVolumes>,
    pub cgroups: Arc<MemoryCgroups>,
    pub events: Arc<MemoryEvents>,
    pub clock: Arc<dyn Clock>,
    pub classes: Classes,
    /// The node, as the next process will find it.
    pub facts: Mutex<NodeFacts>,
    root: tempfile::TempDir,
}

/// One life of the agent process.
pub struct Process {
    pub workers: Arc<PodWorkers>,
    pub store: Arc<PodStore>,
    pub runtime_store: Arc<RuntimeStore>,
    pub api: Arc<MemoryApi>,
    pub facts: watch::Sender<Arc<NodeFacts>>,
    pub registry: prometheus::Registry,
    pub wakes: Arc<dyn WakeSink>,
    cancel: CancellationToken,
}

impl Rig {
    pub fn new() -> Self {
        let clock: Arc<dyn Clock> =
            Arc::new(SimulatedClock::starting_at(Timestamp::from_second(2_000_000_000).unwrap()));
        let runtime = FakeRuntime::new(Arc::clone(&clock));
        for (rpc, millis) in [("RunPodSandbox", 140), ("CreateContainer", 10), ("StartContainer", 75)] {
            runtime.latency(rpc, Duration::from_millis(millis));
        }
        runtime.image("busybox:1", ImageScript::Present);
        let root = tempfile::tempdir().unwrap();
        Self {
            runtime,
            volumes: Arc::new(MemoryVolumes {
                pods: root.path().join("kubelet/pods"),
                mounted: Mutex::default(),
                broken: Mutex::default(),
                hung: Mutex::default(),
            }),
            cgroups: Arc::default(),
            events: Arc::default(),
            clock,
            classes: Classes::default(),
            facts: Mutex::new(node_facts()),
            root,
        }
    }

    /// Starts the agent's process over what is there.
    pub fn start(&self) -> Process {
        let registry = prometheus::Registry::new();
        let workers = PodWorkers::new();
        let wakes: Arc<dyn WakeSink> = Arc::new(WorkerWakes(Arc::clone(&workers)));
        let runtime: Arc<dyn RuntimeService> = Arc::new(self.runtime.clone());
        let runtime_store =
            Arc::new(RuntimeStore::with_clock(Arc::clone(&runtime), Arc::clone(&wakes), Arc::clone(&self.clock)));
        let store = Arc::new(PodStore::new(&[PodSource::Api], Arc::clone(&wakes)));
        let api = MemoryApi::new(Arc::clone(&wakes));
        *api.store.lock().unwrap() = Some(Arc::clone(&store));
        let (facts, node) = watch::channel(Arc::new(self.facts.lock().unwrap().clone()));
        let ledger = PodLedger::new(LedgerParts {
            policy: ResizePolicy::default(),
            directory: Some(self.root.path().to_owned()),
            store: Arc::clone(&store),
            node: node.clone(),
            wakes: Arc::clone(&wakes),
            events: self.events.clone(),
            clock: Arc::clone(&self.clock),
            metrics: ResizeMetrics::new(&registry).unwrap(),
        });
        let admission = NodeAdmission::new(AdmissionParts {
            policy: Policy { declared_features: ["RestartAllContainersOnContainerExits"].into(), ..Policy::default() },
            store: Arc::clone(&store),
            runtime: Arc::clone(&runtime_store),
            allocations: ledger.clone(),
            node: node.clone(),
            reread: None,
            orders: Arc::new(WorkerWakes(Arc::clone(&workers))),
            events: self.events.clone(),
            wakes: Arc::clone(&wakes),
            metrics: AdmissionMetrics::new(&registry).unwrap(),
            clock: Arc::clone(&self.clock),
        });
        let cancel = CancellationToken::new();
        let settings = self.settings();
        tokio::spawn(ledger.clone().run(cancel.clone()));
        let parts = WorkerParts {
            settings,
            clock: Arc::clone(&self.clock),
            store: Arc::clone(&store),
            admission: Arc::new(admission),
            runtime: Arc::clone(&runtime),
            runtime_store: Arc::clone(&runtime_store),
            images: Arc::new(MemoryImages),
            volumes: self.volumes.clone(),
            objects: Arc::new(self.classes.clone()),
            probes: Arc::new(AllReady::default()),
            publisher: Arc::new(MemoryPublisher(Arc::clone(&api))),
            events: self.events.clone(),
            cgroups: self.cgroups.clone(),
            ledger,
            user_namespaces: Arc::new(self.user_namespaces()),
            node,
            gate: StartGate::new(2),
            metrics: Arc::new(WorkerMetrics::new(&registry).unwrap()),
            mutations: TaskTracker::new(),
            cancel: cancel.clone(),
        };
        workers.start(Arc::new(parts));
        let metrics = Arc::new(CriMetrics::new(&registry).unwrap());
        tokio::spawn(follow(runtime, Arc::clone(&runtime_store), FollowSettings::default(), metrics, cancel.clone()));
        Process { workers, store, runtime_store, api, facts, registry, wakes, cancel }
    }

    fn user_namespaces(&self) -> UserNamespaces {
        let range = IdRange { first: 65536, length: 65536 * 1000 };
        UserNamespaces::open(&self.root.path().join("kubelet"), 65536, 110, range).unwrap()
    }

    fn settings(&self) -> WorkerSettings {
        let root: PathBuf = self.root.path().to_owned();
        WorkerSettings {
            rules: Rules {
                backoff: BackoffLimits::default(),
                hash: |container| format!("{:x}", container_hash(container)),
                gates: LifecycleGates::default(),
            },
            root_dir: root.join("kubelet"),
            pod_logs_dir: root.join("pods"),
            container_logs_dir: root.join("containers"),
            dns: DnsSettings { cluster_domain: "cluster.local".into(), ..DnsSettings::default() },
            container_policy: ContainerPolicy::default(),
            cpu_cfs_quota: true,
            cpu_cfs_period: Duration::from_millis(100),
            runtime_name: "containerd".into(),
            process_started: self.clock.now().wall,
        }
    }
}

/// A node that is up.
fn node_facts() -> NodeFacts {
    let amounts = [("cpu", "4"), ("memory", "8Gi"), ("pods", "5000")];
    NodeFacts {
        name: "n".into(),
        ips: vec!["192.0.2.1".parse().unwrap()],
        runtime_ready: true,
        node_seen: true,
        allocatable: amounts.map(|(name, amount)| (name.to_owned(), amount.to_owned())).into(),
        ..NodeFacts::default()
    }
}

impl Process {
    /// kill -9: nothing is drained, nothing is stopped.
    pub fn kill9(self) {
        self.cancel.cancel();
    }

    /// The value of a counter by name and label value, 0 when it was never touched.
    pub fn counter(&self, name: &str, label: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|f| f.name() == name);
        family.map_or(0.0, |f| {
            let of = |m: &&prometheus::proto::Metric| m.get_label().iter().any(|l| l.value() == label);
            f.get_metric().iter().filter(of).map(|m| m.get_counter().get_value()).sum()
        })
    }
}

pub fn pod(number: usize, spec: Value) -> Pod {
    let object = json!({
        "metadata": {"uid": format!("uid-{number}"), "name": format!("p{number}"), "namespace": "ns", "generation": 1},
        "spec": spec,
    });
    Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, Timestamp::UNIX_EPOCH).unwrap()
}

/// The same pod, with deletion asked for.
pub fn deleting(pod: &Pod, grace: i64) -> Pod {
    let mut metadata = pod.metadata().clone();
    let at = Timestamp::from_second(2_000_000_000).unwrap();
    metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at));
    metadata.deletion_grace_period_seconds = Some(grace);
    let object = k8s_openapi::api::core::v1::Pod { metadata, spec: Some(pod.spec().clone()), status: None };
    Pod::new(object, PodSource::Api, Timestamp::UNIX_EPOCH).unwrap()
}

pub fn simple() -> Value {
    json!({"restartPolicy": "Always", "containers": [{"name": "main", "image": "busybox:1"}]})
}

pub fn ready(status: &PodStatus) -> bool {
    status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Waits in virtual time, at most `bound`; how long it took.
pub async fn until(bound: Duration, what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let start = tokio::time::Instant::now();
    while !holds() {
        assert!(start.elapsed() < bound, "not within {bound:?}: {what}");
        tokio::time::sleep((bound / 1000).max(Duration::from_millis(10))).await;
    }
    start.elapsed()
}
