//! The node of the soak: every real room that needs no root and no network, put together as `agent` does, over a runtime, an apiserver and a
//! disk that outlive it. A [`Guard`] can be taken away, from outside: through a port that does not do its part, or by leaving a room out.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;
use rkubelet::{
    admission::{AdmissionMetrics, AdmissionParts, NodeAdmission, Policy},
    api::{ApiClients, EventRecorder, ObjectCache, ReferencedObjects},
    containers::{ContainerPolicy, container_hash},
    cri::{CriMetrics, FollowSettings, RuntimeService, RuntimeStore, fake::FakeRuntime, follow},
    events::EventSink,
    garbage_collection::{Collector, CollectorParts, Limits},
    images::{ImageParts, ImageSettings, NodeImages, VerificationPolicy},
    network::DnsSettings,
    node::NodeFacts,
    pod_status::{ApiPublisher, StatusPublisher},
    pod_worker::{
        PodWorkers, StartGate, WorkerParts, WorkerSettings, WorkerWakes, backoff::BackoffLimits, decide::Rules,
        restart::LifecycleGates,
    },
    pods::{Pod, PodSource, PodStore, PodUid, sources},
    probes::{ContainerVerdicts, NodeProbes, PodProbes, ProbeSettings, ProbeTarget},
    resources::{LedgerParts, PodLedger, ResizeMetrics, allocation::ResizePolicy},
    rush::Rush,
    telemetry::WorkerMetrics,
    time::{Clock, Now},
    user_namespaces::{IdRange, UserNamespaces},
    volumes::PodVolumes,
    wake::{Cause, WakeSink},
};
use serde_json::json;
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    apiserver::Apiserver,
    disk::{CgroupSet, DiskVolumes},
    runtime::{Lie, Told, WatchedRuntime},
};

/// What is taken away from the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    Nothing,
    /// Nobody lists the runtime or reads its events.
    Follower,
    /// What the runtime's lists say is true.
    TrueLists(Lie),
    /// One status write at a time per pod, the newest last.
    StatusOrder,
    /// The DELETE at a pod's end.
    LetGo,
    /// A feed of pods that never goes back.
    FeedOrder,
    /// Probes end with their container.
    ProbesEnd,
    /// The garbage collector.
    Collector,
    /// Rooms forget pods that are gone.
    Forgetting,
    /// Memory is given back: each mount keeps so many bytes.
    Memory(usize),
}

/// Follows tokio's time; its wall half can be moved.
pub struct JumpingClock {
    start: Instant,
    epoch: Timestamp,
    offset_seconds: AtomicI64,
}

impl JumpingClock {
    pub fn new() -> Arc<Self> {
        let epoch = Timestamp::from_second(2_000_000_000).unwrap();
        Arc::new(Self { start: Instant::now(), epoch, offset_seconds: AtomicI64::new(0) })
    }
    /// The wall clock is now so far from where it would be by itself.
    pub fn jump_to(&self, offset_seconds: i64) {
        self.offset_seconds.store(offset_seconds, Ordering::Relaxed);
    }
}

impl Clock for JumpingClock {
    fn now(&self) -> Now {
        let mono = Instant::now();
        let offset = jiff::SignedDuration::from_secs(self.offset_seconds.load(Ordering::Relaxed));
        Now { mono, wall: self.epoch + (mono - self.start) + offset }
    }
}

/// What outlives the agent.
pub struct World {
    pub clock: Arc<JumpingClock>,
    pub runtime: FakeRuntime,
    pub api: Apiserver,
    pub volumes: Arc<DiskVolumes>,
    pub cgroups: Arc<CgroupSet>,
    root: tempfile::TempDir,
}

impl World {
    pub fn new(removed: Guard) -> Self {
        let clock = JumpingClock::new();
        let shared: Arc<dyn Clock> = clock.clone();
        let runtime = FakeRuntime::new(Arc::clone(&shared));
        for (rpc, millis) in [("RunPodSandbox", 140), ("CreateContainer", 10), ("StartContainer", 75), ("ExecSync", 20)]
        {
            runtime.latency(rpc, Duration::from_millis(millis));
        }
        let root = tempfile::tempdir().unwrap();
        let leaks = if let Guard::Memory(bytes) = removed { bytes } else { 0 };
        for dir in ["kubelet/pods", "pods", "containers"] {
            std::fs::create_dir_all(root.path().join(dir)).unwrap();
        }
        Self {
            clock,
            runtime,
            api: Apiserver::new(shared),
            volumes: Arc::new(DiskVolumes { pods: root.path().join("kubelet/pods"), leaks, leaked: Mutex::default() }),
            cgroups: Arc::default(),
            root,
        }
    }
    pub fn pod_logs(&self) -> PathBuf {
        self.root.path().join("pods")
    }
    pub fn log_links(&self) -> PathBuf {
        self.root.path().join("containers")
    }
    pub fn root(&self) -> PathBuf {
        self.root.path().join("kubelet")
    }
}

/// One life of the agent.
pub struct Node {
    pub workers: Arc<PodWorkers>,
    pub store: Arc<PodStore>,
    pub runtime_store: Arc<RuntimeStore>,
    pub runtime: Arc<WatchedRuntime>,
    pub publisher: ApiPublisher,
    pub probes: Arc<NodeProbes>,
    pub ledger: PodLedger,
    pub admission: NodeAdmission,
    pub clients: ApiClients,
    pub cancel: CancellationToken,
    _facts: watch::Sender<Arc<NodeFacts>>,
}

impl Node {
    pub fn start(world: &World, removed: Guard) -> Self {
        let registry = prometheus::Registry::new();
        let clock: Arc<dyn Clock> = world.clock.clone();
        let cancel = CancellationToken::new();
        let clients = world.api.clients();
        let workers = PodWorkers::new();
        let told = Told::new(Arc::new(WorkerWakes(Arc::clone(&workers))));
        let wakes: Arc<dyn WakeSink> = told.clone();
        let rush = Rush::default();
        let events: Arc<dyn EventSink> =
            EventRecorder::start(&clients, "n", Arc::clone(&clock), rush.clone(), cancel.clone());
        let lie = if let Guard::TrueLists(lie) = removed { lie } else { Lie::None };
        let watched = Arc::new(WatchedRuntime::new(world.runtime.clone(), Arc::clone(&told), lie));
        let runtime: Arc<dyn RuntimeService> = watched.clone();
        let runtime_store =
            Arc::new(RuntimeStore::with_clock(Arc::clone(&runtime), Arc::clone(&wakes), Arc::clone(&clock)));
        let store = Arc::new(PodStore::new(&[PodSource::Api], Arc::clone(&wakes)));
        told.watch(&store);
        let (facts, node) = watch::channel(Arc::new(node_facts()));
        let ledger = PodLedger::new(LedgerParts {
            policy: ResizePolicy::default(),
            directory: Some(world.root()),
            store: Arc::clone(&store),
            node: node.clone(),
            wakes: Arc::clone(&wakes),
            events: Arc::clone(&events),
            metrics: ResizeMetrics::new(&registry).unwrap(),
            clock: Arc::clone(&clock),
        });
        tokio::spawn(ledger.clone().run(cancel.clone()));
        let admission = NodeAdmission::new(AdmissionParts {
            policy: Policy::default(),
            store: Arc::clone(&store),
            runtime: Arc::clone(&runtime_store),
            allocations: ledger.clone(),
            node: node.clone(),
            reread: None,
            orders: Arc::new(WorkerWakes(Arc::clone(&workers))),
            events: Arc::clone(&events),
            wakes: Arc::clone(&wakes),
            metrics: AdmissionMetrics::new(&registry).unwrap(),
            clock: Arc::clone(&clock),
        });
        let objects: Arc<dyn ReferencedObjects> = Arc::new(ObjectCache::start(&clients, &wakes, cancel.clone()));
        let images = images(world, &objects, &events, &clock, &registry);
        let settings = ProbeSettings { seed: 7, eager_first_readiness: false };
        let probes = NodeProbes::new(
            Arc::clone(&runtime),
            Arc::clone(&events),
            Arc::clone(&wakes),
            Arc::clone(&clock),
            settings,
        );
        let probes = Arc::new(probes.unwrap());
        let publisher = ApiPublisher::new(clients.clone(), Arc::clone(&wakes), rush.clone(), cancel.clone());
        let late = LateStatuses::new(&world.api, &wakes);
        let mutations = TaskTracker::new();
        let parts = WorkerParts {
            settings: worker_settings(world),
            clock: Arc::clone(&clock),
            store: Arc::clone(&store),
            admission: Arc::new(admission.clone()),
            runtime: Arc::clone(&runtime),
            runtime_store: Arc::clone(&runtime_store),
            images: Arc::new(images),
            volumes: world.volumes.clone(),
            objects,
            probes: Arc::new(Probes { next: Arc::clone(&probes), removed }),
            publisher: Arc::new(Publisher { next: publisher.clone(), removed, late }),
            events: Arc::clone(&events),
            cgroups: world.cgroups.clone(),
            ledger: ledger.clone(),
            user_namespaces: Arc::new(user_namespaces(world)),
            node,
            gate: StartGate::adaptive(2, 8, Arc::clone(&clock), rush),
            metrics: Arc::new(WorkerMetrics::new(&registry).unwrap()),
            mutations: mutations.clone(),
            cancel: cancel.clone(),
        };
        workers.start(Arc::new(parts));
        if removed != Guard::Follower {
            let metrics = Arc::new(CriMetrics::new(&registry).unwrap());
            let store = Arc::clone(&runtime_store);
            tokio::spawn(follow(Arc::clone(&runtime), store, FollowSettings::default(), metrics, cancel.clone()));
        }
        let feed = sources::apiserver::follow(
            clients.clone(),
            "n".to_owned(),
            Arc::clone(&store),
            Arc::clone(&clock),
            cancel.clone(),
        );
        tokio::spawn(feed);
        if removed == Guard::FeedOrder {
            tokio::spawn(repeat_old_pods(Arc::clone(&store), cancel.clone()));
        }
        if removed != Guard::Collector {
            let has_worker = Arc::clone(&workers);
            let collector = Collector::new(CollectorParts {
                limits: Limits { per_container: Some(1), total: None, minimum_age: Duration::ZERO },
                pod_logs_dir: world.pod_logs(),
                container_logs_dir: world.log_links(),
                store: Arc::clone(&store),
                runtime: Arc::clone(&runtime),
                runtime_store: Arc::clone(&runtime_store),
                volumes: Arc::clone(&world.volumes) as Arc<dyn PodVolumes>,
                cgroups: world.cgroups.clone(),
                has_worker: Arc::new(move |uid| has_worker.has(uid)),
                wakes,
                events,
                clock,
                mutations,
            });
            tokio::spawn(Arc::new(collector).run(store.completeness(), cancel.clone()));
        }
        Self {
            workers,
            store,
            runtime_store,
            runtime: watched,
            publisher,
            probes,
            ledger,
            admission,
            clients,
            cancel,
            _facts: facts,
        }
    }
}

fn images(
    world: &World,
    objects: &Arc<dyn ReferencedObjects>,
    events: &Arc<dyn EventSink>,
    clock: &Arc<dyn Clock>,
    registry: &prometheus::Registry,
) -> NodeImages {
    let settings = ImageSettings {
        serialize_pulls: true,
        max_parallel_pulls: None,
        registry_qps: 5.0,
        registry_burst: 10,
        root_dir: world.root(),
        home: None,
        verification: VerificationPolicy::from_config("NeverVerifyPreloadedImages", &[]),
        providers: None,
        handler_in_specs: false,
    };
    let parts = ImageParts {
        service: Arc::new(world.runtime.clone()),
        objects: Arc::clone(objects),
        events: Arc::clone(events),
        clock: Arc::clone(clock),
    };
    NodeImages::new(&settings, parts, registry).unwrap()
}

fn user_namespaces(world: &World) -> UserNamespaces {
    let range = IdRange { first: 65536, length: 65536 * 1000 };
    UserNamespaces::open(&world.root(), 65536, 110, range).unwrap()
}

fn worker_settings(world: &World) -> WorkerSettings {
    WorkerSettings {
        rules: Rules {
            backoff: BackoffLimits::default(),
            hash: |container| format!("{:x}", container_hash(container)),
            gates: LifecycleGates::default(),
        },
        root_dir: world.root(),
        pod_logs_dir: world.pod_logs(),
        container_logs_dir: world.log_links(),
        dns: DnsSettings { cluster_domain: "cluster.local".into(), ..DnsSettings::default() },
        container_policy: ContainerPolicy::default(),
        cpu_cfs_quota: true,
        cpu_cfs_period: Duration::from_millis(100),
        runtime_name: "containerd".into(),
        process_started: world.clock.now().wall,
    }
}

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

/// A feed that goes back: a minute after a pod went, it is there again as it was before anybody deleted it.
async fn repeat_old_pods(store: Arc<PodStore>, cancel: CancellationToken) {
    let mut young: HashMap<PodUid, Pod> = HashMap::new();
    while !cancel.is_cancelled() {
        tokio::time::sleep(Duration::from_secs(60)).await;
        for pod in store.list().into_iter().filter(|pod| pod.deletion_timestamp().is_none()) {
            young.insert(pod.uid().clone(), pod);
        }
        young.retain(|uid, pod| {
            let gone = store.get(uid).is_none();
            if gone {
                store.upsert(pod.clone());
            }
            !gone
        });
    }
}

/// The real probes, unless a guard is gone.
struct Probes {
    next: Arc<NodeProbes>,
    removed: Guard,
}

impl PodProbes for Probes {
    fn track(&self, pod: &Pod, targets: &[ProbeTarget]) {
        if self.removed != Guard::ProbesEnd || !targets.is_empty() {
            self.next.track(pod, targets);
        }
    }
    fn verdicts(&self, uid: &PodUid) -> HashMap<String, ContainerVerdicts> {
        self.next.verdicts(uid)
    }
    fn forget(&self, uid: &PodUid) {
        if !matches!(self.removed, Guard::ProbesEnd | Guard::Forgetting) {
            self.next.forget(uid);
        }
    }
}

/// The real publisher, unless a guard is gone.
struct Publisher {
    next: ApiPublisher,
    removed: Guard,
    late: LateStatuses,
}

impl StatusPublisher for Publisher {
    fn offer(&self, pod: &Pod, status: PodStatus) -> u64 {
        match self.removed {
            Guard::StatusOrder => self.late.offer(pod, status),
            _ => self.next.offer(pod, status),
        }
    }
    fn acknowledged(&self, uid: &PodUid) -> u64 {
        match self.removed {
            Guard::StatusOrder => self.late.versions.lock().unwrap().get(uid).map_or(0, |(version, _)| *version),
            _ => self.next.acknowledged(uid),
        }
    }
    fn delete(&self, pod: &Pod) {
        if self.removed != Guard::LetGo {
            self.next.delete(pod);
        }
    }
    fn forget(&self, uid: &PodUid) {
        if self.removed != Guard::Forgetting {
            self.next.forget(uid);
        }
    }
}

/// Writes each status in a task of its own, and one of a pod that goes on later than one of a pod that has ended.
struct LateStatuses {
    api: Apiserver,
    wakes: Arc<dyn WakeSink>,
    versions: Mutex<HashMap<PodUid, (u64, PodStatus)>>,
}

impl LateStatuses {
    fn new(api: &Apiserver, wakes: &Arc<dyn WakeSink>) -> Self {
        Self { api: api.clone(), wakes: Arc::clone(wakes), versions: Mutex::default() }
    }

    fn offer(&self, pod: &Pod, status: PodStatus) -> u64 {
        let version = {
            let mut versions = self.versions.lock().unwrap();
            let (version, last) = versions.entry(pod.uid().clone()).or_default();
            if *last == status {
                return *version;
            }
            *version += 1;
            last.clone_from(&status);
            *version
        };
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let wait = Duration::from_secs(if ended { 1 } else { 90 });
        let (api, wakes, uid, name) = (self.api.clone(), self.wakes.clone(), pod.uid().clone(), pod.name().to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            api.write_status(&name, &json!({"metadata": {"uid": uid.as_str()}, "status": status}));
            wakes.wake(&uid, Cause::Published);
        });
        version
    }
}
