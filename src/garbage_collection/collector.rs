//! The collector: looks once a minute, and removes what [`dead_containers`](super::dead_containers) and the lists of directories say.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Limits,
    dead_containers::{Dead, Owner, dead_of, replaced_sandboxes, surplus},
    leftover_logs::{dead_links, pod_logs},
};
use crate::{
    containers::container_log_link,
    cri::{ContainerState, PodRuntime, RuntimeService, RuntimeStore, to_its_end},
    events::{EventSink, EventType, Regarding},
    logs,
    pods::{Pod, PodStore, PodUid},
    resources::PodCgroups,
    time::Clock,
    volumes::PodVolumes,
    wake::{Cause, WakeSink},
};

const PERIOD: Duration = Duration::from_secs(60);

/// What the collector reads and acts through.
pub struct CollectorParts {
    pub limits: Limits,
    /// `/var/log/pods`.
    pub pod_logs_dir: PathBuf,
    /// `/var/log/containers`.
    pub container_logs_dir: PathBuf,
    pub store: Arc<PodStore>,
    pub runtime: Arc<dyn RuntimeService>,
    pub runtime_store: Arc<RuntimeStore>,
    pub volumes: Arc<dyn PodVolumes>,
    pub cgroups: Arc<dyn PodCgroups>,
    /// Whether a worker looks after this pod.
    pub has_worker: Arc<dyn Fn(&PodUid) -> bool + Send + Sync>,
    pub wakes: Arc<dyn WakeSink>,
    pub events: Arc<dyn EventSink>,
    pub clock: Arc<dyn Clock>,
    /// Calls that change the runtime run here to their end.
    pub mutations: TaskTracker,
}

/// See the room.
pub struct Collector {
    parts: CollectorParts,
}

impl Collector {
    pub fn new(parts: CollectorParts) -> Self {
        Self { parts }
    }

    /// Until cancelled; starts when every source was heard.
    pub async fn run(self: Arc<Self>, mut complete: watch::Receiver<bool>, cancel: CancellationToken) {
        let work = async {
            if complete.wait_for(|complete| *complete).await.is_err() {
                return;
            }
            loop {
                if let Err(error) = self.collect().await {
                    tracing::error!(error, "Container garbage collection failed");
                    self.parts.events.event(Regarding::Node, EventType::Warning, "ContainerGCFailed", error);
                }
                tokio::time::sleep(PERIOD).await;
            }
        };
        tokio::select! {
            () = cancel.cancelled() => {}
            () = work => {}
        }
    }

    /// One look. The error's text is for the node's event.
    pub async fn collect(&self) -> Result<(), String> {
        self.wake_leftovers().await;
        if !self.parts.runtime_store.complete() {
            return Ok(());
        }
        self.remove_dead(false).await;
        self.remove_leftover_logs().await
    }

    /// For a node that is short of disk: every dead container and sandbox of pods that have ended, even while the API still shows them.
    pub async fn delete_unused_containers(&self) {
        tracing::info!("Attempting to delete unused containers");
        if self.parts.store.complete() && self.parts.runtime_store.complete() {
            self.remove_dead(true).await;
        }
    }

    /// Pods that the runtime, the disk or the cgroup tree still knows, and nobody wants or looks after: their workers take them down.
    async fn wake_leftovers(&self) {
        let parts = &self.parts;
        let (on_disk, in_cgroups) = tokio::join!(parts.volumes.on_disk(), parts.cgroups.list());
        let known: BTreeSet<PodUid> = parts.runtime_store.uids().into_iter().chain(on_disk).chain(in_cgroups).collect();
        for uid in known.iter().filter(|uid| self.is_gone(uid)) {
            parts.wakes.wake(uid, Cause::Desired);
        }
    }

    /// Nobody wants it any more, and nobody is taking it down.
    fn is_gone(&self, uid: &PodUid) -> bool {
        let parts = &self.parts;
        parts.store.complete() && parts.store.get(uid).is_none() && !(parts.has_worker)(uid)
    }

    async fn remove_dead(&self, all_of_ended: bool) {
        let parts = &self.parts;
        let now = parts.clock.now().wall;
        let (mut counted, mut goes, mut sandboxes) = (Vec::new(), Vec::new(), Vec::new());
        for pod in parts.store.list() {
            let Some(runtime) = parts.runtime_store.pod(pod.uid()) else { continue };
            let owner = owner(&pod, &runtime);
            if all_of_ended && owner == Owner::Ended {
                goes.extend(dead_of(pod.uid(), &runtime, owner, Duration::ZERO, now));
                sandboxes.extend(stopped(&runtime).into_iter().map(|id| (pod.uid().clone(), id)));
                continue;
            }
            counted.extend(dead_of(pod.uid(), &runtime, owner, parts.limits.minimum_age, now));
            sandboxes.extend(replaced_sandboxes(&runtime).into_iter().map(|id| (pod.uid().clone(), id)));
        }
        goes.extend(surplus(counted, &parts.limits));
        let mut touched = BTreeSet::new();
        for dead in goes {
            touched.insert(dead.uid.clone());
            self.remove_container(dead).await;
        }
        for (uid, id) in sandboxes {
            touched.insert(uid);
            self.remove_sandbox(id).await;
        }
        // What changed wakes its worker.
        for uid in touched {
            if let Err(error) = parts.runtime_store.refresh(&uid).await {
                tracing::warn!(pod.uid = %uid, %error, "Reading a pod again after garbage collection failed");
            }
        }
    }

    async fn remove_container(&self, dead: Dead) {
        let parts = &self.parts;
        let (runtime, id) = (Arc::clone(&parts.runtime), dead.id.clone());
        if let Err(error) = to_its_end(&parts.mutations, async move { runtime.remove_container(&id).await }).await {
            tracing::error!(pod.uid = %dead.uid, container = dead.id, %error, "Failed to remove container");
            return;
        }
        let link = parts.store.get(&dead.uid).map(|pod| {
            let name = container_log_link(&pod, &dead.name, &dead.id);
            parts.container_logs_dir.join(name)
        });
        logs::remove_logs_of(&dead.id, dead.log_path.into(), link).await;
    }

    /// Stopped again first: its network may not have been torn down by who stopped it.
    async fn remove_sandbox(&self, id: String) {
        let (runtime, owned) = (Arc::clone(&self.parts.runtime), id.clone());
        let call = async move {
            runtime.stop_pod_sandbox(&owned).await?;
            runtime.remove_pod_sandbox(&owned).await
        };
        if let Err(error) = to_its_end(&self.parts.mutations, call).await {
            tracing::error!(sandbox = id, %error, "Failed to remove sandbox");
        }
    }

    /// IDs of all containers that have not ended.
    fn alive(&self) -> Vec<String> {
        let pods = self.parts.runtime_store.uids();
        let runtimes = pods.iter().filter_map(|uid| self.parts.runtime_store.pod(uid));
        let ids = runtimes.flat_map(|pod| {
            let alive = pod.containers.iter().filter(|c| c.state != ContainerState::Exited);
            alive.map(|c| c.id.clone()).collect::<Vec<_>>()
        });
        ids.collect()
    }

    async fn remove_leftover_logs(&self) -> Result<(), String> {
        let parts = &self.parts;
        let directory = parts.pod_logs_dir.clone();
        let listed = tokio::task::spawn_blocking(move || pod_logs(&directory)).await.map_err(|e| e.to_string())?;
        let failed =
            |error| format!("failed to read podLogsDirectory {:?}: {error}", parts.pod_logs_dir.display().to_string());
        for logs in listed.map_err(failed)? {
            let nothing_runs = parts.runtime_store.pod(&logs.uid).is_some_and(|runtime| runtime.is_empty());
            if self.is_gone(&logs.uid) && nothing_runs {
                tracing::debug!(pod.uid = %logs.uid, "Removing pod logs");
                if let Err(error) = tokio::fs::remove_dir_all(&logs.path).await {
                    tracing::error!(path = %logs.path.display(), %error, "Failed to remove pod logs directory");
                }
            }
        }
        let directory = parts.container_logs_dir.clone();
        let links = tokio::task::spawn_blocking(move || dead_links(&directory)).await.map_err(|e| e.to_string())?;
        let alive = self.alive();
        for link in links {
            // While a log is rotated its link leads nowhere for a moment.
            if alive.iter().any(|id| link.is_of(id)) {
                continue;
            }
            let dead = match parts.runtime.container_status(link.container_id()).await {
                Ok(status) => status.state == crate::cri::v1::ContainerState::ContainerExited as i32,
                Err(error) => error.is_not_found(),
            };
            if dead && let Err(error) = tokio::fs::remove_file(&link.path).await {
                tracing::error!(path = %link.path.display(), %error, "Failed to remove container log dead symlink");
            }
        }
        Ok(())
    }
}

/// A pod has ended when the API says so and nothing of it runs.
fn owner(pod: &Pod, runtime: &PodRuntime) -> Owner {
    let terminal = matches!(pod.api_status().phase.as_deref(), Some("Succeeded" | "Failed"));
    let quiet = runtime.containers.iter().all(|c| c.state == ContainerState::Exited)
        && runtime.sandboxes.iter().all(|s| !s.ready);
    if terminal && quiet { Owner::Ended } else { Owner::Running }
}

fn stopped(runtime: &PodRuntime) -> Vec<String> {
    runtime.sandboxes.iter().filter(|s| !s.ready).map(|s| s.id.clone()).collect()
}

#[cfg(test)]
#[path = "collector_tests.rs"]
mod tests;
