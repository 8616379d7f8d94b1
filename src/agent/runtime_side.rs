//! The runtime's side of the agent: one client behind both ports, and the truth of what runs, kept up to date by its events.

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{AgentError, settings};
use crate::{
    config::Config,
    cri::{CriClient, CriMetrics, FollowSettings, ImageService, RuntimeService, RuntimeStore},
    telemetry::Metrics,
    time::Clock,
    wake::WakeSink,
};

/// See the module.
pub(super) struct RuntimeSide {
    pub(super) runtime: Arc<dyn RuntimeService>,
    pub(super) images: Arc<dyn ImageService>,
    pub(super) store: Arc<RuntimeStore>,
    metrics: Arc<CriMetrics>,
}

impl RuntimeSide {
    /// Dials lazily: nothing is asked of the runtime yet.
    pub(super) fn connect(
        config: &Config,
        metrics: &Metrics,
        wakes: &Arc<dyn WakeSink>,
        clock: &Arc<dyn Clock>,
    ) -> Result<Self, AgentError> {
        let cri_metrics = Arc::new(CriMetrics::new(metrics.registry())?);
        let client = Arc::new(CriClient::connect(
            &config.kubelet.container_runtime_endpoint,
            Some(config.image_service_endpoint()),
            settings::duration(config.kubelet.runtime_request_timeout),
            Arc::clone(&cri_metrics),
        )?);
        let runtime: Arc<dyn RuntimeService> = client.clone();
        let store = RuntimeStore::with_clock(Arc::clone(&runtime), Arc::clone(wakes), Arc::clone(clock));
        Ok(Self { runtime, images: client, store: Arc::new(store), metrics: cri_metrics })
    }

    /// Begins to follow the runtime's events, and containerd's out-of-memory kills.
    pub(super) fn follow(&self, background: &TaskTracker, config: &Config, cancel: &CancellationToken) {
        background.spawn(crate::cri::follow(
            Arc::clone(&self.runtime),
            Arc::clone(&self.store),
            FollowSettings::default(),
            Arc::clone(&self.metrics),
            cancel.clone(),
        ));
        background.spawn(crate::cri::follow_oom(
            config.kubelet.container_runtime_endpoint.clone(),
            Arc::clone(&self.runtime),
            Arc::clone(&self.store),
            cancel.clone(),
        ));
    }
}
