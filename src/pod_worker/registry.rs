//! All workers of the node: finds or spawns the worker that a wake is for, and lets it retire under the same lock.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    actions::{Ended, Progress},
    decide::Rules,
    start_gate::StartGate,
    view::KillOrder,
    worker,
};
use crate::{
    admission::{KillOrders, PodAdmission},
    api::ReferencedObjects,
    containers::ContainerPolicy,
    cri::{RuntimeService, RuntimeStore},
    events::EventSink,
    images::Images,
    network::DnsSettings,
    node::NodeFacts,
    pod_status::StatusPublisher,
    pods::{PodStore, PodUid},
    probes::PodProbes,
    resources::{PodCgroups, PodLedger},
    telemetry::WorkerMetrics,
    time::Clock,
    user_namespaces::UserNamespaces,
    volumes::PodVolumes,
    wake::{Cause, WakeSink},
};

/// What is the same for all workers and never changes.
#[derive(Clone)]
pub struct WorkerSettings {
    pub rules: Rules,
    /// `/var/lib/kubelet`.
    pub root_dir: PathBuf,
    /// `/var/log/pods`.
    pub pod_logs_dir: PathBuf,
    /// `/var/log/containers`.
    pub container_logs_dir: PathBuf,
    pub dns: DnsSettings,
    pub container_policy: ContainerPolicy,
    pub cpu_cfs_quota: bool,
    pub cpu_cfs_period: Duration,
    /// The scheme of container IDs in the API: the runtime's name.
    pub runtime_name: String,
    /// Containers that started before this moment ran before this process did.
    pub process_started: jiff::Timestamp,
}

/// The handles that workers act through.
pub struct WorkerParts {
    pub settings: WorkerSettings,
    pub clock: Arc<dyn Clock>,
    pub store: Arc<PodStore>,
    pub admission: Arc<dyn PodAdmission>,
    pub runtime: Arc<dyn RuntimeService>,
    pub runtime_store: Arc<RuntimeStore>,
    pub images: Arc<dyn Images>,
    pub volumes: Arc<dyn PodVolumes>,
    pub objects: Arc<dyn ReferencedObjects>,
    pub probes: Arc<dyn PodProbes>,
    pub publisher: Arc<dyn StatusPublisher>,
    pub events: Arc<dyn EventSink>,
    pub cgroups: Arc<dyn PodCgroups>,
    pub ledger: PodLedger,
    pub user_namespaces: Arc<UserNamespaces>,
    pub node: watch::Receiver<Arc<NodeFacts>>,
    pub gate: StartGate,
    pub metrics: Arc<WorkerMetrics>,
    /// Calls that change something at the runtime run here to their end, whoever stopped waiting for them.
    pub mutations: TaskTracker,
    pub cancel: CancellationToken,
}

/// One worker's mailbox.
#[derive(Default)]
pub(super) struct Slot {
    causes: AtomicU16,
    pub(super) notify: Notify,
    ended: Mutex<Vec<Ended>>,
    progress: Mutex<Vec<Progress>>,
    order: Mutex<Option<KillOrder>>,
}

impl Slot {
    fn add(&self, cause: Cause) {
        self.causes.fetch_or(1 << (cause as u16), Ordering::AcqRel);
        self.notify.notify_one();
    }
    /// All causes since the last call.
    pub(super) fn take_causes(&self) -> Vec<Cause> {
        let bits = self.causes.swap(0, Ordering::AcqRel);
        Cause::ALL.into_iter().filter(|c| bits & (1 << (*c as u16)) != 0).collect()
    }
    pub(super) fn report(&self, ended: Ended) {
        lock(&self.ended).push(ended);
        self.add(Cause::Action);
    }
    pub(super) fn progress(&self, progress: Progress) {
        lock(&self.progress).push(progress);
        self.add(Cause::Action);
    }
    pub(super) fn take_reports(&self) -> (Vec<Progress>, Vec<Ended>) {
        // Ends first: what was reported before an end is then never missed.
        let ended = std::mem::take(&mut *lock(&self.ended));
        (std::mem::take(&mut *lock(&self.progress)), ended)
    }
    pub(super) fn order(&self) -> Option<KillOrder> {
        lock(&self.order).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the module. Wakes that come before [`start`](Self::start) are kept.
#[derive(Default)]
pub struct PodWorkers {
    slots: Mutex<HashMap<PodUid, Arc<Slot>>>,
    parts: OnceLock<Arc<WorkerParts>>,
    tasks: TaskTracker,
}

impl PodWorkers {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Hands the workers their parts and spawns one for each pod that was woken before.
    pub fn start(self: &Arc<Self>, parts: Arc<WorkerParts>) {
        let waiting: Vec<(PodUid, Arc<Slot>)> = {
            let slots = lock(&self.slots);
            if self.parts.set(Arc::clone(&parts)).is_err() {
                return;
            }
            slots.iter().map(|(uid, slot)| (uid.clone(), Arc::clone(slot))).collect()
        };
        for (uid, slot) in waiting {
            self.spawn(&parts, uid, slot);
        }
    }

    fn spawn(self: &Arc<Self>, parts: &Arc<WorkerParts>, uid: PodUid, slot: Arc<Slot>) {
        self.tasks.spawn(worker::run(Arc::clone(parts), Arc::clone(self), uid, slot));
    }

    /// Writes a kill order and wakes the pod. The first order stays.
    pub fn order(&self, uid: &PodUid, order: KillOrder) {
        let slot = lock(&self.slots).get(uid).cloned();
        if let Some(slot) = slot {
            lock(&slot.order).get_or_insert(order);
            slot.add(Cause::Order);
        }
    }

    /// Lets the worker go unless a cause came in meanwhile. True when it is let go.
    pub(super) fn retire(&self, uid: &PodUid, slot: &Arc<Slot>) -> bool {
        let mut slots = lock(&self.slots);
        if slot.causes.load(Ordering::Acquire) != 0 {
            return false;
        }
        slots.remove(uid);
        true
    }

    /// Whether a worker looks after this pod.
    pub fn has(&self, uid: &PodUid) -> bool {
        lock(&self.slots).contains_key(uid)
    }

    /// How many pods have a worker.
    pub fn len(&self) -> usize {
        lock(&self.slots).len()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// After cancellation: waits until all workers have stopped, at most `bound`. Returns how many had not.
    pub async fn drain(&self, bound: Duration) -> usize {
        self.tasks.close();
        let _ = tokio::time::timeout(bound, self.tasks.wait()).await;
        self.tasks.len()
    }
}

/// The port's handle: an `Arc<PodWorkers>` that can spawn.
#[derive(Clone)]
pub struct WorkerWakes(pub Arc<PodWorkers>);

impl KillOrders for WorkerWakes {
    fn order(&self, uid: &PodUid, order: KillOrder) {
        // The worker may not have been woken for the first time yet.
        self.wake(uid, Cause::Order);
        self.0.order(uid, order);
    }
}

impl WakeSink for WorkerWakes {
    fn wake(&self, uid: &PodUid, cause: Cause) {
        let workers = &self.0;
        let mut slots = lock(&workers.slots);
        if let Some(slot) = slots.get(uid) {
            return slot.add(cause);
        }
        let slot = Arc::new(Slot::default());
        slot.add(cause);
        slots.insert(uid.clone(), Arc::clone(&slot));
        let parts = workers.parts.get().cloned();
        drop(slots);
        if let Some(parts) = parts {
            workers.spawn(&parts, uid.clone(), slot);
        }
    }

    fn wake_all(&self, cause: Cause) {
        for slot in lock(&self.0.slots).values() {
            slot.add(cause);
        }
    }
}
