//! The composition root: builds the parts, hands each the few handles it needs, runs them under one cancellation tree, and drains.
//!
//! No logic lives here. What a room is told comes from [`settings`]; the order of start is: host checks → clients → runtime handshake → node → workers
//! → sources → doors → READY. Stopping touches no container.

mod error;
mod lifecycle;
mod runtime_side;
mod settings;
mod watchdog;

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use error::AgentError;
use runtime_side::RuntimeSide;

use crate::{
    admission::{AdmissionMetrics, AdmissionParts, NodeAdmission},
    api::{ApiClients, EventRecorder, ObjectCache, ReferencedObjects},
    cli,
    config::{self, Config},
    events::EventSink,
    garbage_collection::{Collector, CollectorParts},
    images::{ImageParts, NodeImages},
    node::{self, NodeHandles, tunables},
    pod_status::ApiPublisher,
    pod_worker::{PodCounts, PodWorkers, WorkerParts, WorkerWakes},
    pods::{PodSource, PodStore, sources},
    probes::NodeProbes,
    resources::{KubepodsCgroups, LedgerParts, PodLedger, ResizeMetrics},
    rush::Rush,
    server,
    telemetry::{Metrics, Verbosity, WorkerMetrics},
    time::{Clock, SystemClock},
    volumes::{self, LinuxMounter, NodeVolumes, PodVolumes},
    wake::WakeSink,
};

/// Runs the agent until SIGTERM or SIGINT, or until something it cannot do without fails.
pub async fn run(config: Config, _verbosity: Verbosity) -> Result<(), AgentError> {
    let cancel = CancellationToken::new();
    let watchdog = watchdog::period_of_environment()?;
    let stop = lifecycle::stop_on_signal(cancel.clone()).map_err(AgentError::Signals)?;
    announce(&config);
    let checks = watchdog::Checks::default();
    if let Some(period) = watchdog {
        tokio::spawn(watchdog::feed(period, Arc::clone(&checks), lifecycle::sign_of_life, cancel.clone()));
    }
    prepare_host(&config)?;
    let outcome = Agent::start(config, &checks, cancel.clone()).await;
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

impl Agent {
    /// `None` when cancelled before the runtime answered.
    async fn start(
        config: Config,
        checks: &watchdog::Checks,
        cancel: CancellationToken,
    ) -> Result<Option<Self>, AgentError> {
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
        let side = RuntimeSide::connect(&config, &metrics, &wakes, &clock)?;
        let Some(handshake) = lifecycle::shake_hands(side.runtime.as_ref(), config.cgroup_driver(), &cancel).await
        else {
            return Ok(None);
        };
        let background = TaskTracker::new();
        let cgroups = KubepodsCgroups::new(settings::cgroups(&config, handshake.cgroup_driver)?)?;
        metrics.register_node(&config.node_name, cgroups.is_v2())?;
        let node =
            lifecycle::start_node(&config, &handshake, &clients, &side, &cgroups, &recorder, &wakes, &clock, &cancel)?;
        background.spawn(lifecycle::name_node(api_recorder, node.node.clone(), cancel.clone()));
        lifecycle::watch_host(&background, &config, &recorder, &cancel);
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
            metrics: ResizeMetrics::new(metrics.registry())?,
        });
        background.spawn(ledger.clone().run(cancel.clone()));
        let admission = Arc::new(NodeAdmission::new(AdmissionParts {
            policy: settings::admission(&config, &handshake)?,
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
        PodCounts::register(Arc::clone(&store), Arc::clone(&side.store), metrics.registry())?;
        workers.start(parts);
        side.follow(&background, &config, &cancel);
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
        let _ = checks.set(Arc::clone(&parts.sync_loop));
        let server = config.kubelet.enable_server.then(|| tokio::spawn(server::serve(doors, parts, cancel.clone())));
        Ok(Some(Self { workers, publisher, node, mutations, background, server }))
    }

    /// READY, then until the end; then everything is drained, each with its bound.
    async fn live(mut self, cancel: CancellationToken) -> Result<(), AgentError> {
        lifecycle::notify_ready();
        let outcome = tokio::select! {
            () = cancel.cancelled() => Ok(()),
            ended = lifecycle::ended(&mut self.server) => ended.map_err(AgentError::from),
        };
        cancel.cancel();
        lifecycle::drain(&self.workers, &self.mutations, &self.publisher, &self.node.tasks, &self.background).await;
        outcome
    }
}
