//! Builds the node room's parts and starts them (house plan rule 7).
//!
//! In: [`NodeParts`]. Out: [`NodeHandles`]. Without clients the agent is standalone: facts are kept, nothing is written to an apiserver
//! (contract N-25).

use std::{collections::BTreeSet, io, net::IpAddr, sync::Arc, thread::JoinHandle, time::Duration};

use k8s_openapi::api::core::v1::{Node, NodeAddress};
use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    NodeFacts, Pressure,
    capacity::kubepods_allocatable,
    csinode,
    facts::FactsPublisher,
    host::CGROUP_V1_WARNING,
    lease::{self, Heartbeat, LeaseSettings},
    machine::Machine,
    pod_cidr,
    publisher::{HealthCheck, Publisher},
    registration::initial_labels,
    runtime_state::{self, RuntimeState},
    sensors::Sensors,
    settings::NodeSettings,
    status::{Readings, resources, texts},
    watch_node::{self, NodeObject, NodeReader, ReadNode},
};
use crate::{
    api::ApiClients,
    cri::{ImageService, RuntimeService},
    events::{EventSink, EventType, Regarding},
    resources::{KubepodsCgroups, ReservedCgroup},
    time::Clock,
    wake::WakeSink,
};

const ENFORCE_RETRY: Duration = Duration::from_secs(60);
const QOS_PERIOD: Duration = Duration::from_secs(60);

/// What the node room is built from.
pub struct NodeParts {
    pub settings: NodeSettings,
    /// `None`: standalone.
    pub clients: Option<ApiClients>,
    pub runtime: Arc<dyn RuntimeService>,
    pub images: Arc<dyn ImageService>,
    pub cgroups: KubepodsCgroups,
    pub events: Arc<dyn EventSink>,
    pub wakes: Arc<dyn WakeSink>,
    pub health: HealthCheck,
    pub clock: Arc<dyn Clock>,
    pub cancel: CancellationToken,
}

/// How the rest of the agent reaches the node room.
pub struct NodeHandles {
    pub facts: watch::Receiver<Arc<NodeFacts>>,
    /// The Node as last seen: for `spec.podCIDRs`, taints, attached volumes. `None` until registered.
    pub node: watch::Receiver<Option<Arc<Node>>>,
    /// Reads the Node from the apiserver at once; `None` when standalone.
    pub reader: Option<Arc<dyn ReadNode>>,
    /// Pressures that hold: for eviction.
    pub pressures: watch::Receiver<BTreeSet<Pressure>>,
    /// Has the runtime asked for its status at once.
    pub poke_runtime: Arc<Notify>,
    /// Has the node status computed, and sent if it changed, at once.
    pub refresh_status: Arc<Notify>,
    /// Ends after `cancel`; `None` when standalone.
    pub lease: Option<JoinHandle<()>>,
    /// The room's tasks; closed, so that `wait()` returns when all have ended.
    pub tasks: TaskTracker,
}

/// The node room, running.
pub struct NodeAgent;

impl NodeAgent {
    /// Starts everything. Call on the main runtime. Fails only when the lease thread cannot be made.
    pub fn start(parts: NodeParts) -> io::Result<NodeHandles> {
        let settings = Arc::new(parts.settings.clone());
        let facts = FactsPublisher::new(first_facts(&settings, parts.cgroups.is_v2()), Arc::clone(&parts.wakes));
        let object = NodeObject::new(facts.clone());
        let channels = Channels::new();
        let tasks = TaskTracker::new();
        announce(&parts);
        channels.spawn_readers(&parts, &settings, &tasks);
        tasks.spawn(keep_facts(
            Arc::clone(&settings),
            facts.clone(),
            channels.clone(),
            object.clone(),
            parts.cancel.clone(),
        ));
        tasks.spawn(enforce(
            parts.cgroups.clone(),
            Arc::clone(&settings),
            Arc::clone(&parts.events),
            parts.cancel.clone(),
        ));
        tasks.spawn(enforce_reserved(
            parts.cgroups.clone(),
            settings.reserved_cgroups.clone(),
            Arc::clone(&parts.events),
            parts.cancel.clone(),
        ));
        tasks.spawn(pod_cidr::follow(object.subscribe(), Arc::clone(&parts.runtime), parts.cancel.clone()));
        let reader = parts.clients.as_ref().map(|clients| {
            let (client, node_name) = (clients.general.clone(), settings.node_name.clone());
            Arc::new(NodeReader { client, node_name, object: object.clone() }) as Arc<dyn ReadNode>
        });
        let lease = match &parts.clients {
            Some(clients) => {
                channels.spawn_writers(&parts, clients, &settings, &object, &tasks);
                Some(start_lease(clients, &settings, &tasks, &parts.cancel)?)
            }
            None => None,
        };
        tasks.close();
        Ok(NodeHandles {
            facts: facts.subscribe(),
            node: object.subscribe(),
            reader,
            pressures: channels.pressures.subscribe(),
            poke_runtime: channels.poke_runtime,
            refresh_status: channels.refresh_status,
            lease,
            tasks,
        })
    }
}

fn first_facts(settings: &NodeSettings, cgroup_v2: bool) -> NodeFacts {
    let network = RuntimeState::unknown();
    NodeFacts {
        name: settings.node_name.clone(),
        hostname: settings.kernel_hostname.clone(),
        labels: initial_labels(settings),
        network_not_ready: network.network_error().map(str::to_owned),
        cgroup_v2,
        ..NodeFacts::default()
    }
}

fn announce(parts: &NodeParts) {
    parts.events.event(Regarding::Node, EventType::Normal, "Starting", "Starting kubelet.".to_owned());
    if !parts.cgroups.is_v2() {
        parts.events.event(Regarding::Node, EventType::Warning, "CgroupV1", CGROUP_V1_WARNING.to_owned());
    }
}

/// The watch channels between the parts.
#[derive(Clone)]
struct Channels {
    runtime: watch::Sender<RuntimeState>,
    readings: watch::Sender<Option<Readings>>,
    pressures: watch::Sender<BTreeSet<Pressure>>,
    storage: watch::Sender<Option<String>>,
    poke_runtime: Arc<Notify>,
    refresh_status: Arc<Notify>,
    refresh_readings: Arc<Notify>,
}

impl Channels {
    fn new() -> Self {
        Self {
            runtime: watch::Sender::new(RuntimeState::unknown()),
            readings: watch::Sender::new(None),
            pressures: watch::Sender::default(),
            storage: watch::Sender::new(Some(csinode::NOT_INITIALIZED.to_owned())),
            poke_runtime: Arc::default(),
            refresh_status: Arc::default(),
            refresh_readings: Arc::default(),
        }
    }

    fn spawn_readers(&self, parts: &NodeParts, settings: &Arc<NodeSettings>, tasks: &TaskTracker) {
        let sensors = Sensors::new(
            Arc::clone(settings),
            Arc::clone(&parts.images),
            Arc::clone(&parts.events),
            Arc::clone(&parts.clock),
            parts.cgroups.kubepods_memory_directory(),
        );
        tasks.spawn(sensors.run(self.readings.clone(), Arc::clone(&self.refresh_readings), parts.cancel.clone()));
        tasks.spawn(runtime_state::monitor(
            Arc::clone(&parts.runtime),
            self.runtime.clone(),
            Arc::clone(&self.poke_runtime),
            Arc::clone(&parts.clock),
            parts.cancel.clone(),
        ));
    }

    fn spawn_writers(
        &self,
        parts: &NodeParts,
        clients: &ApiClients,
        settings: &Arc<NodeSettings>,
        object: &NodeObject,
        tasks: &TaskTracker,
    ) {
        let publisher = Publisher {
            settings: Arc::clone(settings),
            clients: clients.clone(),
            object: object.clone(),
            readings: self.readings.subscribe(),
            runtime: self.runtime.subscribe(),
            storage: self.storage.subscribe(),
            health: Arc::clone(&parts.health),
            events: Arc::clone(&parts.events),
            clock: Arc::clone(&parts.clock),
            refresh: Arc::clone(&self.refresh_status),
        };
        tasks.spawn(publisher.run(parts.cancel.clone()));
        let name = settings.node_name.clone();
        tasks.spawn(watch_node::follow(clients.watch_slot(), name.clone(), object.clone(), parts.cancel.clone()));
        let client = clients.general.clone();
        tasks.spawn(csinode::initialize(client, name, self.storage.clone(), object.subscribe(), parts.cancel.clone()));
    }
}

fn start_lease(
    clients: &ApiClients,
    settings: &NodeSettings,
    tasks: &TaskTracker,
    cancel: &CancellationToken,
) -> io::Result<JoinHandle<()>> {
    let heartbeat = Heartbeat::new();
    tasks.spawn(lease::heartbeat_task(Arc::clone(&heartbeat), cancel.clone()));
    let clients = clients.clone();
    let factory: lease::ClientFactory = Arc::new(move || clients.heartbeat());
    lease::spawn(factory, LeaseSettings::new(&settings.node_name, settings.lease_seconds), heartbeat, cancel.clone())
}

/// Keeps the facts in step with readings and runtime, also while the apiserver is away.
async fn keep_facts(
    settings: Arc<NodeSettings>,
    facts: FactsPublisher,
    channels: Channels,
    object: NodeObject,
    cancel: CancellationToken,
) {
    // Held, not only watched: standalone nobody else keeps the Node's channel open.
    let mut node = object.subscribe();
    let mut runtime = channels.runtime.subscribe();
    let mut readings = channels.readings.subscribe();
    let mut ready_before = false;
    loop {
        let state = runtime.borrow_and_update().clone();
        let read = readings.borrow_and_update().clone();
        let reported = node.borrow_and_update().clone();
        facts.update(|facts| fill_facts(facts, &settings, &state, read.as_ref(), reported.as_deref()));
        if let Some(read) = read {
            channels.pressures.send_if_modified(|current| {
                *current != read.pressures && {
                    *current = read.pressures;
                    true
                }
            });
        }
        let ready = state.runtime_errors().is_empty();
        if ready && !ready_before {
            // Images could not be listed before.
            channels.refresh_readings.notify_one();
        }
        ready_before = ready;
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            changed = runtime.changed() => if changed.is_err() { return },
            changed = readings.changed() => if changed.is_err() { return },
            changed = node.changed() => if changed.is_err() { return },
        }
    }
}

fn fill_facts(
    facts: &mut NodeFacts,
    settings: &NodeSettings,
    runtime: &RuntimeState,
    readings: Option<&Readings>,
    node: Option<&Node>,
) {
    facts.network_not_ready = runtime.network_error().map(str::to_owned);
    facts.runtime_ready = runtime.runtime_errors().is_empty();
    facts.supplemental_groups_policy = runtime.supplemental_groups_policy.unwrap_or(false);
    let recursive = runtime.handlers.iter().filter(|h| h.recursive_read_only_mounts);
    facts.recursive_read_only_handlers = recursive.map(|h| h.name.clone()).collect();
    facts.user_namespace_handlers = runtime.handlers.iter().map(|h| (h.name.clone(), h.user_namespaces)).collect();
    let Some(readings) = readings else { return };
    facts.pressures.clone_from(&readings.pressures);
    let (capacity, allocatable) = resources(settings, readings);
    (facts.capacity, facts.allocatable) = (texts(&capacity), texts(&allocatable));
    let status = node.and_then(|n| n.status.as_ref());
    // Extended resources may be written to the Node by others: they count like our own (contract A-01).
    for (name, amount) in status.and_then(|s| s.allocatable.as_ref()).into_iter().flatten() {
        if name.contains('/') {
            facts.allocatable.entry(name.clone()).or_insert_with(|| amount.0.clone());
        }
    }
    let reported = status.and_then(|s| s.addresses.as_deref()).filter(|_| settings.external_cloud);
    if let Some(addresses) = reported.or(readings.addresses.as_deref()) {
        facts.ips = internal_ips(addresses);
    }
}

fn internal_ips(addresses: &[NodeAddress]) -> Vec<IpAddr> {
    addresses.iter().filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect()
}

/// Limits the kubepods cgroup to what pods may use, and says so (contract R-03).
async fn enforce(
    cgroups: KubepodsCgroups,
    settings: Arc<NodeSettings>,
    events: Arc<dyn EventSink>,
    cancel: CancellationToken,
) {
    loop {
        match try_enforce(&cgroups, &settings).await {
            Ok(()) => {
                let message = "Updated Node Allocatable limit across pods".to_owned();
                events.event(Regarding::Node, EventType::Normal, "NodeAllocatableEnforced", message);
                return keep_qos(&cgroups, &cancel).await;
            }
            Err(error) => {
                let message = format!("Failed to update Node Allocatable Limits [\"kubepods\"]: {error}");
                tracing::error!(%error, "cannot limit the kubepods cgroup");
                events.event(Regarding::Node, EventType::Warning, "FailedNodeAllocatableEnforcement", message);
            }
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(ENFORCE_RETRY) => {}
        }
    }
}

/// Limits the cgroups of the system's and Kubernetes' daemons (contract R-08). What fails is told and tried again: a node whose daemons are
/// not limited is better than none.
async fn enforce_reserved(
    cgroups: KubepodsCgroups,
    mut left: Vec<ReservedCgroup>,
    events: Arc<dyn EventSink>,
    cancel: CancellationToken,
) {
    loop {
        let mut failed = Vec::new();
        for reserved in left {
            let (title, cgroup) = (reserved.title, reserved.cgroup.clone());
            match cgroups.enforce_reserved(reserved.clone()).await {
                Ok(()) => {
                    let level = title.split(' ').next().unwrap_or_default().to_lowercase();
                    let message = format!("Updated limits on {level} reserved cgroup {cgroup}");
                    events.event(Regarding::Node, EventType::Normal, "NodeAllocatableEnforced", message);
                }
                Err(error) => {
                    let message = format!("Failed to enforce {title} Cgroup Limits on {cgroup:?}: {error}");
                    tracing::error!("{message}");
                    events.event(Regarding::Node, EventType::Warning, "FailedNodeAllocatableEnforcement", message);
                    failed.push(reserved);
                }
            }
        }
        left = failed;
        if left.is_empty() {
            return;
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(ENFORCE_RETRY) => {}
        }
    }
}

/// Sets the QoS classes' shares again and again (contract R-03, S-27).
async fn keep_qos(cgroups: &KubepodsCgroups, cancel: &CancellationToken) {
    loop {
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(QOS_PERIOD) => {}
        }
        if let Err(error) = cgroups.update_qos().await {
            tracing::warn!(%error, "cannot set the CPU shares of the QoS classes");
        }
    }
}

async fn try_enforce(cgroups: &KubepodsCgroups, settings: &NodeSettings) -> Result<(), String> {
    let host = settings.host.clone();
    let machine = tokio::task::spawn_blocking(move || Machine::read(&host)).await.map_err(|e| e.to_string())?;
    let machine = machine.map_err(|e| e.to_string())?;
    let allocatable = kubepods_allocatable(&machine, &settings.reservations, settings.enforce_pods);
    cgroups.ensure_root(&allocatable).await.map_err(|e| e.to_string())
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
