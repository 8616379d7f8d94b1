//! The composition root: builds the parts, hands each the few handles it needs, runs them under one cancellation tree, and drains.
//!
//! No logic lives here. What a room is told comes from [`settings`]; the order of start is: host checks → clients → runtime handshake → node → workers
//! → sources → doors → READY. Stopping touches no container.

mod lifecycle;
mod settings;

use std::{io, sync::Arc};

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admission::{AdmissionMetrics, AdmissionParts, NodeAdmission, SysctlError},
    api::{ApiClients, ApiSetupError, EventRecorder, ObjectCache, ReferencedObjects},
    cli,
    config::{self, Config},
    cri::{CriClient, CriMetrics, FollowSettings, ImageService, RuntimeService, RuntimeStore},
    events::EventSink,
    garbage_collection::{Collector, CollectorParts},
    images::{ImageParts, ImagesSetupError, NodeImages},
    node::{self, NodeAgent, NodeHandles, NodeParts, tunables},
    pod_status::ApiPublisher,
    pod_worker::{PodWorkers, WorkerParts, WorkerWakes},
    pods::{PodSource, PodStore, sources},
    probes::NodeProbes,
    resources::{KubepodsCgroups, LedgerParts, PodLedger},
    rush::Rush,
    server,
    telemetry::{Metrics, Verbosity, WorkerMetrics},
    time::{Clock, SystemClock},
    user_namespaces::UserNamespaceError,
    volumes::{self, LinuxMounter, NodeVolumes, PodVolumes},
    wake::WakeSink,
};

/// Why the agent cannot start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("failed to build the async runtime: {0}")]
    Runtime(#[source] io::Error),
    #[error("no --kubeconfig was given: running without an apiserver is not supported yet")]
    Standalone,
    #[error("failed to construct kubelet dependencies: {0}")]
    Api(#[from] ApiSetupError),
    #[error(transparent)]
    Host(#[from] node::host::SwapError),
    #[error(transparent)]
    Tunables(#[from] tunables::TunablesError),
    #[error("failed to prepare the root directory: {0}")]
    RootDir(#[from] volumes::RootDirError),
    #[error("failed to create {path}: {source}")]
    Directory { path: String, source: io::Error },
    #[error("invalid runtime endpoint: {0}")]
    Endpoint(#[from] crate::cri::EndpointError),
    #[error("failed to read the machine: {0}")]
    Machine(#[from] node::MachineError),
    #[error(transparent)]
    Images(#[from] ImagesSetupError),
    #[error("failed to set up cgroups: {0}")]
    Cgroups(#[from] crate::resources::CgroupError),
    #[error("allowedUnsafeSysctls: {0}")]
    Sysctls(#[from] SysctlError),
    #[error("create user namespace manager: {0}")]
    UserNamespaces(#[from] UserNamespaceError),
    #[error("failed to register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("failed to start the lease thread: {0}")]
    Lease(#[source] io::Error),
    #[error("failed to run Kubelet server: {0}")]
    Server(#[from] server::ServerError),
    #[error("failed to listen for signals: {0}")]
    Signals(#[source] io::Error),
}

/// Runs the agent until SIGTERM or SIGINT, or until something it cannot do without fails.
pub async fn run(config: Config, _verbosity: Verbosity) -> Result<(), AgentError> {
    let cancel = CancellationToken::new();
    let stop = lifecycle::stop_on_signal(cancel.clone()).map_err(AgentError::Signals)?;
    announce(&config);
    prepare_host(&config)?;
    let outcome = Agent::start(config, cancel.clone()).await;
    match outcome {
        Ok(Some(agent)) => agent.live(cancel).await?,
        // Stopped before the runtime answered.
        Ok(None) => {}
        Err(error) => {
            cancel.cancel();
            return Err(error);
        }
    }
    stop.abort();
    Ok(())
}

fn announce(config: &Config) {
    tracing::info!(version = %cli::kubelet_version(), node = %config.node_name, "Starting rkubelet");
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let idle = config::ineffective_fields(&config.kubelet);
    if !idle.is_empty() {
        tracing::warn!(fields = %idle.join(", "), "Configuration fields that are set but have no effect yet");
    }
}

fn prepare_host(config: &Config) -> Result<(), AgentError> {
    let host = node::HostPaths::default();
    node::host::check_swap(&host.proc, config.kubelet.fail_swap_on)?;
    tunables::apply(&host.proc, config.kubelet.protect_kernel_defaults)?;
    cli::apply_process_settings((&config.kubelet).into());
    volumes::prepare_root_dir(config.root_directory(), &LinuxMounter::default())?;
    for dir in [settings::pod_logs_dir(config), settings::CONTAINER_LOGS_DIR.into()] {
        std::fs::create_dir_all(&dir)
            .map_err(|source| AgentError::Directory { path: dir.display().to_string(), source })?;
    }
    Ok(())
}

struct Agent {
    workers: Arc<PodWorkers>,
    publisher: ApiPublisher,
    node: NodeHandles,
    mutations: TaskTracker,
    background: TaskTracker,
    server: Option<tokio::task::JoinHandle<Result<(), server::ServerError>>>,
}

/// The runtime's side: one client behind both ports, and the truth of what runs.
struct RuntimeSide {
    runtime: Arc<dyn RuntimeService>,
    images: Arc<dyn ImageService>,
    store: Arc<RuntimeStore>,
    metrics: Arc<CriMetrics>,
}

impl Agent {
    /// `None` when cancelled before the runtime answered.
    async fn start(config: Config, cancel: CancellationToken) -> Result<Option<Self>, AgentError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let metrics = Arc::new(Metrics::new()?);
        metrics.register_feature_gates(&config.feature_gates)?;
        let kubeconfig = config.flags.kubeconfig.as_deref().ok_or(AgentError::Standalone)?;
        let clients = ApiClients::connect(kubeconfig, &settings::api(&config))?;
        clients.register_metrics(metrics.registry())?;
        let rush = Rush::default();
        let api_recorder =
            EventRecorder::start(&clients, &config.node_name, Arc::clone(&clock), rush.clone(), cancel.clone());
        let recorder: Arc<dyn EventSink> = api_recorder.clone();
        let workers = PodWorkers::new();
        let wakes: Arc<dyn WakeSink> = Arc::new(WorkerWakes(Arc::clone(&workers)));
        let side = runtime_side(&config, &metrics, &wakes, &clock)?;
        let Some(handshake) = lifecycle::shake_hands(side.runtime.as_ref(), config.cgroup_driver(), &cancel).await
        else {
            return Ok(None);
        };
        let background = TaskTracker::new();
        let cgroups = KubepodsCgroups::new(settings::cgroups(&config, handshake.cgroup_driver)?)?;
        let node = start_node(&config, &clients, &side, &cgroups, &recorder, &wakes, &clock, &cancel)?;
        background.spawn(lifecycle::name_node(api_recorder, node.node.clone(), cancel.clone()));
        let objects: Arc<dyn ReferencedObjects> = Arc::new(ObjectCache::start(&clients, &wakes, cancel.clone()));
        let volumes: Arc<dyn PodVolumes> = Arc::new(NodeVolumes::new(
            settings::volumes(&config, node.facts.clone()),
            Arc::clone(&objects),
            Arc::new(LinuxMounter::default()),
            Arc::clone(&recorder),
            Arc::clone(&clock),
        ));
        let store = Arc::new(PodStore::new(&[PodSource::Api], Arc::clone(&wakes)));
        let ledger = PodLedger::new(LedgerParts {
            policy: settings::resize(&config, cgroups.is_v2()),
            directory: Some(config.root_directory().to_owned()),
            store: Arc::clone(&store),
            node: node.facts.clone(),
            wakes: Arc::clone(&wakes),
            events: Arc::clone(&recorder),
            clock: Arc::clone(&clock),
        });
        background.spawn(ledger.clone().run(cancel.clone()));
        let admission = Arc::new(NodeAdmission::new(AdmissionParts {
            policy: settings::admission(&config)?,
            store: Arc::clone(&store),
            runtime: Arc::clone(&side.store),
            allocations: ledger.clone(),
            node: node.facts.clone(),
            reread: node.reader.clone(),
            orders: Arc::new(WorkerWakes(Arc::clone(&workers))),
            events: Arc::clone(&recorder),
            wakes: Arc::clone(&wakes),
            metrics: AdmissionMetrics::new(metrics.registry())?,
            clock: Arc::clone(&clock),
        }));
        let publisher = ApiPublisher::new(clients.clone(), Arc::clone(&wakes), rush.clone(), cancel.clone());
        publisher.register_metrics(metrics.registry())?;
        let probes = Arc::new(NodeProbes::new(
            Arc::clone(&side.runtime),
            Arc::clone(&recorder),
            Arc::clone(&wakes),
            Arc::clone(&clock),
            settings::probes(&config),
        )?);
        let image_parts = ImageParts {
            service: Arc::clone(&side.images),
            objects: Arc::clone(&objects),
            events: Arc::clone(&recorder),
            clock: Arc::clone(&clock),
        };
        let images = Arc::new(NodeImages::new(&settings::images(&config), image_parts, metrics.registry())?);
        let image_collector = images.garbage_collector(
            settings::image_collector(&config),
            lifecycle::image_collector_parts(&side.runtime, &side.store, &recorder, &clock),
        );
        let mutations = TaskTracker::new();
        let user_namespaces = Arc::new(settings::user_namespaces(&config)?);
        let parts = Arc::new(WorkerParts {
            settings: settings::workers(&config, &handshake, clock.now().wall),
            clock: Arc::clone(&clock),
            store: Arc::clone(&store),
            admission,
            runtime: Arc::clone(&side.runtime),
            runtime_store: Arc::clone(&side.store),
            images,
            volumes: Arc::clone(&volumes),
            objects,
            probes: Arc::clone(&probes) as _,
            publisher: Arc::new(publisher.clone()),
            events: Arc::clone(&recorder),
            cgroups: Arc::new(cgroups.clone()),
            ledger,
            user_namespaces,
            node: node.facts.clone(),
            gate: settings::start_gate(&clock, &rush),
            metrics: Arc::new(WorkerMetrics::new(metrics.registry())?),
            mutations: mutations.clone(),
            cancel: cancel.clone(),
        });
        workers.start(parts);
        follow_runtime(&background, &config, &side, &cancel);
        background.spawn(sources::apiserver::follow(
            clients.clone(),
            config.node_name.clone(),
            Arc::clone(&store),
            Arc::clone(&clock),
            cancel.clone(),
        ));
        background.spawn(image_collector.run(cancel.clone()));
        let garbage = Collector::new(CollectorParts {
            limits: settings::dead_containers(&config),
            pod_logs_dir: settings::pod_logs_dir(&config),
            container_logs_dir: settings::CONTAINER_LOGS_DIR.into(),
            store: Arc::clone(&store),
            runtime: Arc::clone(&side.runtime),
            runtime_store: Arc::clone(&side.store),
            volumes,
            cgroups: Arc::new(cgroups),
            has_worker: lifecycle::has_worker(&workers),
            wakes: Arc::clone(&wakes),
            events: Arc::clone(&recorder),
            clock: Arc::clone(&clock),
            mutations: mutations.clone(),
        });
        background.spawn(Arc::new(garbage).run(store.completeness(), cancel.clone()));
        if let Some(address) = settings::healthz(&config) {
            background.spawn(server::serve_healthz(address, cancel.clone()));
        }
        let doors = settings::server(&config, &node.facts.borrow().ips);
        let parts = lifecycle::server_parts(
            config.configz(),
            &store,
            publisher.clone(),
            &side.store,
            &side.runtime,
            &metrics,
            &probes,
            &clock,
        );
        let server = config.kubelet.enable_server.then(|| tokio::spawn(server::serve(doors, parts, cancel.clone())));
        Ok(Some(Self { workers, publisher, node, mutations, background, server }))
    }

    /// READY, then until the end; then everything is drained, each with its bound.
    async fn live(mut self, cancel: CancellationToken) -> Result<(), AgentError> {
        lifecycle::notify_ready();
        self.background.spawn(lifecycle::feed_watchdog(cancel.clone()));
        let outcome = tokio::select! {
            () = cancel.cancelled() => Ok(()),
            ended = lifecycle::ended(&mut self.server) => ended.map_err(AgentError::from),
        };
        cancel.cancel();
        lifecycle::drain(&self.workers, &self.mutations, &self.publisher, &self.node.tasks, &self.background).await;
        outcome
    }
}

fn runtime_side(
    config: &Config,
    metrics: &Metrics,
    wakes: &Arc<dyn WakeSink>,
    clock: &Arc<dyn Clock>,
) -> Result<RuntimeSide, AgentError> {
    let cri_metrics = Arc::new(CriMetrics::new(metrics.registry())?);
    let client = Arc::new(CriClient::connect(
        &config.kubelet.container_runtime_endpoint,
        Some(config.image_service_endpoint()),
        settings::duration(config.kubelet.runtime_request_timeout),
        Arc::clone(&cri_metrics),
    )?);
    let runtime: Arc<dyn RuntimeService> = client.clone();
    let store = RuntimeStore::with_clock(Arc::clone(&runtime), Arc::clone(wakes), Arc::clone(clock));
    Ok(RuntimeSide { runtime, images: client, store: Arc::new(store), metrics: cri_metrics })
}

fn follow_runtime(background: &TaskTracker, config: &Config, side: &RuntimeSide, cancel: &CancellationToken) {
    background.spawn(crate::cri::follow(
        Arc::clone(&side.runtime),
        Arc::clone(&side.store),
        FollowSettings::default(),
        Arc::clone(&side.metrics),
        cancel.clone(),
    ));
    background.spawn(crate::cri::follow_oom(
        config.kubelet.container_runtime_endpoint.clone(),
        Arc::clone(&side.runtime),
        Arc::clone(&side.store),
        cancel.clone(),
    ));
}

#[allow(clippy::too_many_arguments)]
fn start_node(
    config: &Config,
    clients: &ApiClients,
    side: &RuntimeSide,
    cgroups: &KubepodsCgroups,
    events: &Arc<dyn EventSink>,
    wakes: &Arc<dyn WakeSink>,
    clock: &Arc<dyn Clock>,
    cancel: &CancellationToken,
) -> Result<NodeHandles, AgentError> {
    NodeAgent::start(NodeParts {
        settings: settings::node(config),
        clients: Some(clients.clone()),
        runtime: Arc::clone(&side.runtime),
        images: Arc::clone(&side.images),
        cgroups: cgroups.clone(),
        events: Arc::clone(events),
        wakes: Arc::clone(wakes),
        health: lifecycle::pleg_health(&side.store, clock),
        clock: Arc::clone(clock),
        cancel: cancel.clone(),
    })
    .map_err(AgentError::Lease)
}
