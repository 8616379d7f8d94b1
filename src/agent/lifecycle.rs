//! Beginning and end: signals, the runtime's handshake, systemd, what an earlier process left, and the drain.

use std::{io, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Node;
use tokio::{signal::unix, sync::watch, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    api::EventRecorder,
    config::CgroupDriver,
    cri::{RuntimeService, RuntimeStore},
    events::EventSink,
    images::{CollectorParts, RuntimeImageUsers, machine_stat_fs},
    node::{self, Handshake},
    pod_status::ApiPublisher,
    pod_worker::PodWorkers,
    pods::{PodStore, PodUid},
    probes::NodeProbes,
    server::{ServerError, ServerParts},
    telemetry::Metrics,
    time::Clock,
};

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

/// Pings systemd's watchdog from the main runtime, twice per period: a runtime that hangs stops pinging.
pub(super) async fn feed_watchdog(cancel: CancellationToken) {
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(period / 2) => {}
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
    }
}

/// Why the node is not ready on the runtime store's account (contract N-17).
pub(super) fn pleg_health(store: &Arc<RuntimeStore>, clock: &Arc<dyn Clock>) -> node::HealthCheck {
    let (store, clock) = (Arc::clone(store), Arc::clone(clock));
    Arc::new(move || store.pleg_health(clock.now().mono).err().map(|e| e.to_string()).into_iter().collect())
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
    let (health, now) = (Arc::clone(runtime_store), Arc::clone(clock));
    ServerParts {
        pods: Arc::clone(store),
        status: Arc::new(move |uid| publisher.newest(uid)),
        runtime: Arc::clone(runtime),
        metrics: Arc::new(move || all.render()),
        probe_metrics: Arc::new(move || of_probes.metrics_text()),
        sync_loop: Arc::new(move || health.pleg_health(now.now().mono).map_err(|e| e.to_string())),
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
