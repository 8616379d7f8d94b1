//! Beginning and end: signals, the runtime's handshake, systemd, what an earlier process left, and the drain.

use std::{io, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Node;
use tokio::{signal::unix, sync::watch, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    api::{ApiClients, EventRecorder},
    config::{CgroupDriver, Config},
    cri::{PlegError, RuntimeService, RuntimeStore},
    events::{EventSink, EventType, Regarding},
    images::{CollectorParts, RuntimeImageUsers, machine_stat_fs},
    network,
    node::{self, Handshake, NodeAgent, NodeHandles, NodeParts},
    pod_status::ApiPublisher,
    pod_worker::PodWorkers,
    pods::{PodStore, PodUid},
    probes::NodeProbes,
    resources::KubepodsCgroups,
    server::{ServerError, ServerParts, SyncLoopHealth},
    telemetry::Metrics,
    time::Clock,
    wake::WakeSink,
};

use super::{AgentError, runtime_side::RuntimeSide, settings};

const HANDSHAKE_RETRY: Duration = Duration::from_secs(2);
/// What is under way at the runtime may end; who waits for it has already stopped.
const DRAIN_MUTATIONS: Duration = Duration::from_secs(5);
const DRAIN_REST: Duration = Duration::from_secs(2);

/// Cancels on the first SIGTERM or SIGINT.
pub(super) fn stop_on_signal(cancel: CancellationToken) -> io::Result<JoinHandle<()>> {
    let mut term = unix::signal(unix::SignalKind::terminate())?;
    let mut int = unix::signal(unix::SignalKind::interrupt())?;
    Ok(tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => tracing::info!("SIGTERM: stopping; containers go on"),
            _ = int.recv() => tracing::info!("SIGINT: stopping; containers go on"),
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        cancel.cancel();
    }))
}

/// Gives events about the node its UID, once the Node has been seen.
pub(super) async fn name_node(
    recorder: Arc<EventRecorder>,
    mut node: watch::Receiver<Option<Arc<Node>>>,
    cancel: CancellationToken,
) {
    let seen = tokio::select! {
        () = cancel.cancelled() => return,
        seen = node.wait_for(Option::is_some) => seen,
    };
    let uid = seen.ok().and_then(|node| node.as_ref().and_then(|n| n.metadata.uid.clone()));
    if let Some(uid) = uid {
        recorder.set_node_uid(&uid);
    }
}

/// Asks the runtime who it is until it answers (contract S-12). `None` when cancelled.
pub(super) async fn shake_hands(
    runtime: &dyn RuntimeService,
    configured: CgroupDriver,
    cancel: &CancellationToken,
) -> Option<Handshake> {
    loop {
        let answer = tokio::select! {
            () = cancel.cancelled() => return None,
            answer = node::handshake(runtime, configured) => answer,
        };
        match answer {
            Ok(handshake) => {
                let (name, version) = (&handshake.runtime_name, &handshake.runtime_version);
                tracing::info!(name, version, cgroup_driver = ?handshake.cgroup_driver, "Container runtime");
                return Some(handshake);
            }
            Err(error) => tracing::error!(%error, "Container runtime does not answer; trying again"),
        }
        tokio::select! {
            () = cancel.cancelled() => return None,
            () = tokio::time::sleep(HANDSHAKE_RETRY) => {}
        }
    }
}

/// READY does not wait for the apiserver.
pub(super) fn notify_ready() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "Telling systemd that the agent is ready failed");
    }
}

/// What the host needs of a node agent besides pods: its iptables chains, a look at its resolver file, word of its out-of-memory kills.
pub(super) fn watch_host(
    background: &TaskTracker,
    config: &Config,
    events: &Arc<dyn EventSink>,
    cancel: &CancellationToken,
) {
    if let Some(warning) = settings::dns(config).host_warning() {
        events.event(Regarding::Node, EventType::Warning, "CheckLimitsForResolvConf", warning);
    }
    if config.kubelet.make_iptables_util_chains {
        background.spawn(network::keep_chains(Arc::new(network::HostIptables), cancel.clone()));
    }
    node::watch_oom_kills("/dev/kmsg".into(), Arc::clone(events));
}

/// To systemd's watchdog.
pub(super) fn sign_of_life() -> io::Result<()> {
    sd_notify::notify(&[sd_notify::NotifyState::Watchdog])
}

#[allow(clippy::too_many_arguments)]
pub(super) fn start_node(
    config: &Config,
    handshake: &Handshake,
    clients: &ApiClients,
    side: &RuntimeSide,
    cgroups: &KubepodsCgroups,
    events: &Arc<dyn EventSink>,
    wakes: &Arc<dyn WakeSink>,
    clock: &Arc<dyn Clock>,
    cancel: &CancellationToken,
) -> Result<NodeHandles, AgentError> {
    NodeAgent::start(NodeParts {
        settings: settings::node(config, handshake),
        clients: Some(clients.clone()),
        runtime: Arc::clone(&side.runtime),
        images: Arc::clone(&side.images),
        cgroups: cgroups.clone(),
        events: Arc::clone(events),
        wakes: Arc::clone(wakes),
        health: pleg_health(&side.store, clock),
        clock: Arc::clone(clock),
        cancel: cancel.clone(),
    })
    .map_err(AgentError::Lease)
}

/// Why the node is not ready on the runtime store's account (contract N-17).
pub(super) fn pleg_health(store: &Arc<RuntimeStore>, clock: &Arc<dyn Clock>) -> node::HealthCheck {
    let (store, clock) = (Arc::clone(store), Arc::clone(clock));
    Arc::new(move || store.pleg_health(clock.now().mono).err().map(|e| e.to_string()).into_iter().collect())
}

/// The check `syncloop` of `/healthz` and of the watchdog (contract D-05): upstream's loop stands still while the runtime is silent.
/// Before the runtime was heard for the first time nothing is late.
pub(super) fn sync_loop_health(store: &Arc<RuntimeStore>, clock: &Arc<dyn Clock>) -> SyncLoopHealth {
    let (store, clock) = (Arc::clone(store), Arc::clone(clock));
    Arc::new(move || match store.pleg_health(clock.now().mono) {
        Ok(()) | Err(PlegError::NeverSeen) => Ok(()),
        Err(PlegError::Silent { .. }) => Err("sync Loop took longer than expected".to_owned()),
    })
}

pub(super) fn has_worker(workers: &Arc<PodWorkers>) -> Arc<dyn Fn(&PodUid) -> bool + Send + Sync> {
    let workers = Arc::clone(workers);
    Arc::new(move |uid| workers.has(uid))
}

pub(super) fn image_collector_parts(
    runtime: &Arc<dyn RuntimeService>,
    store: &Arc<RuntimeStore>,
    events: &Arc<dyn EventSink>,
    clock: &Arc<dyn Clock>,
) -> CollectorParts {
    CollectorParts {
        users: Arc::new(RuntimeImageUsers { runtime: Arc::clone(runtime), store: Arc::clone(store) }),
        stat_fs: machine_stat_fs(),
        events: Arc::clone(events),
        clock: Arc::clone(clock),
    }
}

#[allow(clippy::too_many_arguments)]
pub(super) fn server_parts(
    configz: serde_json::Value,
    store: &Arc<PodStore>,
    publisher: ApiPublisher,
    runtime_store: &Arc<RuntimeStore>,
    runtime: &Arc<dyn RuntimeService>,
    metrics: &Arc<Metrics>,
    probes: &Arc<NodeProbes>,
    clock: &Arc<dyn Clock>,
) -> ServerParts {
    let (all, of_probes) = (Arc::clone(metrics), Arc::clone(probes));
    ServerParts {
        pods: Arc::clone(store),
        status: Arc::new(move |uid| publisher.newest(uid)),
        runtime: Arc::clone(runtime),
        metrics: Arc::new(move || all.render()),
        probe_metrics: Arc::new(move || of_probes.metrics_text()),
        sync_loop: sync_loop_health(runtime_store, clock),
        configz,
        clock: Arc::clone(clock),
    }
}

/// The server's end; never, when there is none.
pub(super) async fn ended(server: &mut Option<JoinHandle<Result<(), ServerError>>>) -> Result<(), ServerError> {
    match server {
        Some(server) => server.await.unwrap_or(Ok(())),
        None => std::future::pending().await,
    }
}

/// Ordered and bounded; names what had not ended.
pub(super) async fn drain(
    workers: &PodWorkers,
    mutations: &TaskTracker,
    publisher: &ApiPublisher,
    node: &TaskTracker,
    background: &TaskTracker,
) {
    let left = workers.drain(DRAIN_REST).await;
    mutations.close();
    let in_runtime = tokio::time::timeout(DRAIN_MUTATIONS, mutations.wait()).await.is_err();
    let statuses = tokio::time::timeout(DRAIN_REST, publisher.drained()).await.is_err();
    background.close();
    let rest = tokio::time::timeout(DRAIN_REST, async { tokio::join!(node.wait(), background.wait()) }).await.is_err();
    if left > 0 || in_runtime || statuses || rest {
        tracing::warn!(
            workers = left,
            runtime_calls = mutations.len(),
            statuses = publisher.pending(),
            node_tasks = node.len(),
            background = background.len(),
            "Stopped with work unfinished"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cri::fixtures::runtime, wake::NoWakes};

    #[tokio::test(start_paused = true)]
    async fn d05_the_loop_is_late_only_once_the_runtime_was_heard_and_fell_silent() {
        let fake = runtime();
        let clock = fake.shared_clock();
        let store = Arc::new(RuntimeStore::with_clock(Arc::new(fake), Arc::new(NoWakes), Arc::clone(&clock)));
        let health = sync_loop_health(&store, &clock);
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(health(), Ok(()));
        store.relist().await.unwrap();
        tokio::time::advance(Duration::from_secs(170)).await;
        assert_eq!(health(), Ok(()));
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(health(), Err("sync Loop took longer than expected".to_owned()));
    }
}
