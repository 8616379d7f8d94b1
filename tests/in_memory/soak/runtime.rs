//! The runtime as the agent of the soak sees it: the fake one, watched for calls that should not come, and able to lie.
//!
//! A lie takes a guard away from outside: what is hidden from the agent's reads it must do again, and a name that is made unique on the way
//! is not refused by the runtime's own reservation.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use rkubelet::{
    cri::{ContainerEventStream, CriError, POD_UID_LABEL, RuntimeService, fake::FakeRuntime, v1},
    pods::{PodStore, PodUid},
    wake::{Cause, WakeSink},
};
use tokio::time::Instant;

/// When each pod's worker was first told that its pod shall end: passes wakes on, and looks at what they are about.
pub struct Told {
    next: Arc<dyn WakeSink>,
    store: OnceLock<Weak<PodStore>>,
    at: Mutex<HashMap<PodUid, Instant>>,
}

impl Told {
    pub fn new(next: Arc<dyn WakeSink>) -> Arc<Self> {
        Arc::new(Self { next, store: OnceLock::new(), at: Mutex::default() })
    }
    pub fn watch(&self, store: &Arc<PodStore>) {
        self.store.set(Arc::downgrade(store)).unwrap();
    }
    /// Told before this very moment.
    fn before_now(&self, uid: &PodUid) -> Option<Duration> {
        let at = self.at.lock().unwrap().get(uid).copied();
        at.map(|at| at.elapsed()).filter(|ago| !ago.is_zero())
    }
}

impl WakeSink for Told {
    fn wake(&self, uid: &PodUid, cause: Cause) {
        if cause == Cause::Desired
            && let Some(store) = self.store.get().and_then(Weak::upgrade)
        {
            let seen = store.snapshot(uid);
            let stop = match &seen.pod {
                Some(pod) => pod.deletion_timestamp().is_some(),
                None => seen.complete,
            };
            if stop {
                self.at.lock().unwrap().entry(uid.clone()).or_insert_with(tokio::time::Instant::now);
            }
        }
        self.next.wake(uid, cause);
    }
    fn wake_all(&self, cause: Cause) {
        self.next.wake_all(cause);
    }
}

/// What the runtime keeps from the agent, for pods whose name begins so, until [`LIES`] names were made on its account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    None,
    /// Sandboxes are in no list, and a new one gets a free name.
    HidesSandboxes(&'static str),
    /// Containers are in no list, and a new one gets a free name.
    HidesContainers(&'static str),
    /// Ended containers are in no list, as if somebody had removed them.
    HidesEnded(&'static str),
}

const LIES: u32 = 6;

pub struct WatchedRuntime {
    pub fake: FakeRuntime,
    pub told: Arc<Told>,
    pub lie: Lie,
    pub begun_after_stop: Mutex<Vec<String>>,
    unique: AtomicU32,
}

impl WatchedRuntime {
    pub fn new(fake: FakeRuntime, told: Arc<Told>, lie: Lie) -> Self {
        let unique = AtomicU32::new(0);
        Self { fake, told, lie, begun_after_stop: Mutex::default(), unique }
    }

    /// Whether `hides` is told of this pod.
    fn hides(&self, hides: fn(&'static str) -> Lie, labels: &HashMap<String, String>) -> bool {
        let (Lie::HidesSandboxes(about) | Lie::HidesContainers(about) | Lie::HidesEnded(about)) = self.lie else {
            return false;
        };
        let pod = labels.get("io.kubernetes.pod.name").is_some_and(|name| name.starts_with(about));
        pod && self.lie == hides(about) && self.unique.load(Ordering::Relaxed) < LIES
    }

    fn note_start(&self, rpc: &str, uid: &str, of: &str) {
        if let Some(ago) = self.told.before_now(&PodUid::from(uid)) {
            let what = format!("{rpc} of {of} in pod {uid}, {ago:?} after its worker was told to stop");
            self.begun_after_stop.lock().unwrap().push(what);
        }
    }

    fn unique(&self) -> u32 {
        100_000 + self.unique.fetch_add(1, Ordering::Relaxed)
    }
}

macro_rules! passed_on {
    ($($name:ident($($arg:ident: $kind:ty),*) -> $out:ty;)*) => {
        #[async_trait]
        impl RuntimeService for WatchedRuntime {
            $(async fn $name(&self, $($arg: $kind),*) -> Result<$out, CriError> { self.fake.$name($($arg),*).await })*

            async fn run_pod_sandbox(&self, mut config: v1::PodSandboxConfig, handler: &str) -> Result<String, CriError> {
                let hidden = self.hides(Lie::HidesSandboxes, &config.labels);
                let metadata = config.metadata.get_or_insert_default();
                self.note_start("RunPodSandbox", &metadata.uid, &metadata.name);
                if hidden {
                    metadata.attempt = self.unique();
                }
                self.fake.run_pod_sandbox(config, handler).await
            }

            async fn create_container(
                &self,
                sandbox_id: &str,
                mut config: v1::ContainerConfig,
                sandbox: v1::PodSandboxConfig,
            ) -> Result<String, CriError> {
                let hidden =
                    self.hides(Lie::HidesContainers, &config.labels) || self.hides(Lie::HidesEnded, &config.labels);
                let uid = sandbox.metadata.as_ref().map(|m| m.uid.clone()).unwrap_or_default();
                let metadata = config.metadata.get_or_insert_default();
                self.note_start("CreateContainer", &uid, &metadata.name);
                if hidden {
                    metadata.attempt = self.unique();
                }
                self.fake.create_container(sandbox_id, config, sandbox).await
            }

            async fn start_container(&self, container_id: &str) -> Result<(), CriError> {
                if let Some(config) = self.fake.container_config(container_id) {
                    let uid = config.labels.get(POD_UID_LABEL).cloned().unwrap_or_default();
                    let name = config.metadata.map(|m| m.name).unwrap_or_default();
                    self.note_start("StartContainer", &uid, &name);
                }
                self.fake.start_container(container_id).await
            }

            async fn list_pod_sandbox(&self, filter: Option<v1::PodSandboxFilter>) -> Result<Vec<v1::PodSandbox>, CriError> {
                let mut all = self.fake.list_pod_sandbox(filter).await?;
                all.retain(|s| !self.hides(Lie::HidesSandboxes, &s.labels));
                Ok(all)
            }

            async fn list_containers(&self, filter: Option<v1::ContainerFilter>) -> Result<Vec<v1::Container>, CriError> {
                let mut all = self.fake.list_containers(filter).await?;
                let ended = |c: &v1::Container| c.state == v1::ContainerState::ContainerExited as i32;
                all.retain(|c| {
                    let hidden = self.hides(Lie::HidesContainers, &c.labels);
                    !(hidden || ended(c) && self.hides(Lie::HidesEnded, &c.labels))
                });
                Ok(all)
            }

            async fn container_events(&self) -> Result<ContainerEventStream, CriError> {
                // Events would tell the truth.
                match self.lie {
                    Lie::None => self.fake.container_events().await,
                    _ => Err(CriError::new("GetContainerEvents", tonic::Code::Unimplemented, "not implemented")),
                }
            }
        }
    };
}

passed_on! {
    version() -> v1::VersionResponse;
    status(verbose: bool) -> v1::StatusResponse;
    runtime_config() -> v1::RuntimeConfigResponse;
    update_runtime_config(config: v1::RuntimeConfig) -> ();
    stop_pod_sandbox(sandbox_id: &str) -> ();
    remove_pod_sandbox(sandbox_id: &str) -> ();
    update_pod_sandbox_resources(request: v1::UpdatePodSandboxResourcesRequest) -> ();
    pod_sandbox_status(sandbox_id: &str) -> v1::PodSandboxStatus;
    stop_container(container_id: &str, grace: Duration) -> ();
    remove_container(container_id: &str) -> ();
    container_status(container_id: &str) -> v1::ContainerStatus;
    update_container_resources(request: v1::UpdateContainerResourcesRequest) -> ();
    reopen_container_log(container_id: &str) -> ();
    exec_sync(container_id: &str, command: Vec<String>, timeout: Duration) -> v1::ExecSyncResponse;
    exec(request: v1::ExecRequest) -> String;
    attach(request: v1::AttachRequest) -> String;
    port_forward(request: v1::PortForwardRequest) -> String;
    list_container_stats(filter: Option<v1::ContainerStatsFilter>) -> Vec<v1::ContainerStats>;
}
