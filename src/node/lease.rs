//! The node lease: the heartbeat that tells the cluster this node lives (contract N-20).
//!
//! It runs on a thread of its own with its own runtime and its own connection, and reads one atomic of the rest of the agent, so nothing
//! else can starve it. In turn the main runtime must show that it lives: [`heartbeat_task`] marks the atomic every second, and when the
//! mark is over 60 s old the lease is no longer renewed and the process aborts, because a node that looks Ready while its
//! agent hangs is worse than a restart.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::Node,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::call_error::CallError;
use crate::time::{Clock, SystemClock};

const NAMESPACE: &str = "kube-node-lease";
const RENEW_FRACTION: f64 = 0.25;
const JITTER: f64 = 0.04;
const UPDATE_TRIES: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(7);
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
const BEAT: Duration = Duration::from_secs(1);
/// How old the main runtime's mark may get.
pub const STALL_LIMIT: Duration = Duration::from_secs(60);

/// Makes a client with a connection of its own. Called inside the lease thread, again after repeated failures.
pub type ClientFactory = Arc<dyn Fn() -> Client + Send + Sync>;

/// When the main runtime last showed that it runs.
#[derive(Debug)]
pub struct Heartbeat {
    epoch: Instant,
    /// Milliseconds since `epoch`.
    beat: AtomicU64,
}

impl Heartbeat {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { epoch: SystemClock.now().mono, beat: AtomicU64::new(0) })
    }

    fn elapsed(&self) -> u64 {
        let elapsed = SystemClock.now().mono.saturating_duration_since(self.epoch);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
    }

    /// The main runtime runs.
    pub fn mark(&self) {
        self.beat.store(self.elapsed(), Ordering::Relaxed);
    }

    pub fn age(&self) -> Duration {
        Duration::from_millis(self.elapsed().saturating_sub(self.beat.load(Ordering::Relaxed)))
    }
}

/// Marks the heartbeat every second; spawn it on the main runtime.
pub async fn heartbeat_task(heartbeat: Arc<Heartbeat>, cancel: CancellationToken) {
    loop {
        heartbeat.mark();
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(BEAT) => {}
        }
    }
}

/// What the lease says.
#[derive(Debug, Clone)]
pub struct LeaseSettings {
    pub node_name: String,
    /// `nodeLeaseDurationSeconds`; renewed after a quarter of it.
    pub duration_seconds: i32,
    /// [`STALL_LIMIT`], but for tests.
    pub stall_limit: Duration,
}

impl LeaseSettings {
    pub fn new(node_name: &str, duration_seconds: i32) -> Self {
        Self { node_name: node_name.to_owned(), duration_seconds, stall_limit: STALL_LIMIT }
    }

    fn renew_interval(&self) -> Duration {
        Duration::from_secs(self.duration_seconds.max(1) as u64).mul_f64(RENEW_FRACTION)
    }
}

/// Starts the lease thread. It ends when cancelled; when the main runtime stalls, it aborts the process.
pub fn spawn(
    factory: ClientFactory,
    settings: LeaseSettings,
    heartbeat: Arc<Heartbeat>,
    cancel: CancellationToken,
) -> io::Result<thread::JoinHandle<()>> {
    spawn_with(factory, settings, heartbeat, cancel, std::process::abort)
}

fn spawn_with<R>(
    factory: ClientFactory,
    settings: LeaseSettings,
    heartbeat: Arc<Heartbeat>,
    cancel: CancellationToken,
    on_stall: impl FnOnce() -> R + Send + 'static,
) -> io::Result<thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("node-lease".to_owned()).spawn(move || {
        let limit = settings.stall_limit;
        let stalled = runtime.block_on(async {
            tokio::select! {
                biased;
                () = cancel.cancelled() => false,
                () = stall(&heartbeat, limit) => true,
                () = renew_for_ever(factory, &settings) => false,
            }
        });
        if stalled {
            tracing::error!(
                limit_seconds = limit.as_secs(),
                "the main runtime hangs: the lease is no longer renewed, aborting"
            );
            on_stall();
        }
    })
}

/// Returns once the heartbeat is too old. Sleeps just until it could be.
async fn stall(heartbeat: &Heartbeat, limit: Duration) {
    loop {
        match limit.checked_sub(heartbeat.age()) {
            Some(left) if !left.is_zero() => tokio::time::sleep(left).await,
            _ => return,
        }
    }
}

/// A request about the lease failed.
#[derive(Debug, thiserror::Error)]
enum LeaseError {
    #[error(transparent)]
    Api(#[from] CallError),
    #[error("no answer within {REQUEST_DEADLINE:?}")]
    Deadline,
    #[error("failed {UPDATE_TRIES} attempts to update lease")]
    Tries,
}

impl LeaseError {
    fn code(&self) -> u16 {
        match self {
            Self::Api(error) => error.code(),
            _ => 0,
        }
    }
}

async fn renew_for_ever(factory: ClientFactory, settings: &LeaseSettings) {
    let mut renewer = Renewer { factory, settings, api: None, latest: None };
    loop {
        renewer.sync().await;
        let jitter = 1.0 + JITTER * rand::random::<f64>();
        tokio::time::sleep(settings.renew_interval().mul_f64(jitter)).await;
    }
}

#[derive(Clone)]
struct Apis {
    leases: Api<Lease>,
    nodes: Api<Node>,
}

struct Renewer<'a> {
    factory: ClientFactory,
    settings: &'a LeaseSettings,
    api: Option<Apis>,
    latest: Option<Lease>,
}

impl Renewer<'_> {
    async fn sync(&mut self) {
        if let Some(lease) = self.latest.clone() {
            match self.update(lease).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::info!(%error, "failed to update lease using latest lease, fallback to ensure lease")
                }
            }
        }
        let (lease, created) = self.ensure().await;
        self.latest = Some(lease.clone());
        if !created && let Err(error) = self.update(lease).await {
            tracing::error!(%error, "will retry updating the node lease");
        }
    }

    /// Gets the lease, or creates it; for ever. Whether it was created.
    async fn ensure(&mut self) -> (Lease, bool) {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.try_ensure().await {
                Ok(found) => return found,
                Err(error) => {
                    if error.code() == 404 {
                        tracing::info!(%error, retry_in = ?pause, "no lease before there is a node");
                    } else {
                        tracing::error!(%error, retry_in = ?pause, "failed to ensure lease exists, will retry");
                        self.api = None;
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn try_ensure(&mut self) -> Result<(Lease, bool), LeaseError> {
        let name = self.settings.node_name.clone();
        let apis = self.apis();
        match deadline(apis.leases.get(&name)).await {
            Ok(lease) => Ok((self.with_right_owner(lease).await, false)),
            Err(error) if error.code() == 404 => {
                let owner = self.owner().await?;
                let lease = renewed(None, self.settings, owner, SystemClock.now().wall);
                let apis = self.apis();
                Ok((deadline(apis.leases.create(&PostParams::default(), &lease)).await?, true))
            }
            Err(error) => Err(error),
        }
    }

    /// A Node made anew has another UID, and the lease of the old one would be garbage-collected.
    async fn with_right_owner(&mut self, mut lease: Lease) -> Lease {
        if let Ok(Some(owner)) = self.owner().await {
            let owners = lease.metadata.owner_references.get_or_insert_default();
            if !owners.contains(&owner) {
                *owners = vec![owner];
            }
        }
        lease
    }

    /// Five tries; a conflict has the lease read again.
    async fn update(&mut self, mut base: Lease) -> Result<(), LeaseError> {
        for _ in 0..UPDATE_TRIES {
            match self.try_update(&base).await {
                Ok(lease) => {
                    self.latest = Some(lease);
                    return Ok(());
                }
                Err(error) => {
                    tracing::error!(%error, "failed to update lease");
                    match error.code() {
                        409 => base = self.ensure().await.0,
                        // A connection that went bad is not tried again.
                        0 => self.api = None,
                        _ => {}
                    }
                }
            }
        }
        Err(LeaseError::Tries)
    }

    async fn try_update(&mut self, base: &Lease) -> Result<Lease, LeaseError> {
        let owner = if owned(base) { None } else { self.owner().await? };
        let lease = renewed(Some(base), self.settings, owner, SystemClock.now().wall);
        let name = self.settings.node_name.clone();
        let apis = self.apis();
        deadline(apis.leases.replace(&name, &PostParams::default(), &lease)).await
    }

    /// The Node as the lease's owner. Asked for until there is one: at first the Node may not be registered, but a lease without an
    /// owner would outlive its node.
    async fn owner(&mut self) -> Result<Option<OwnerReference>, LeaseError> {
        let name = self.settings.node_name.clone();
        let node = deadline(self.apis().nodes.get(&name)).await?;
        Ok(node.metadata.uid.map(|uid| OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name,
            uid,
            ..OwnerReference::default()
        }))
    }

    fn apis(&mut self) -> Apis {
        let factory = &self.factory;
        let made = self.api.get_or_insert_with(|| {
            let client = factory();
            Apis { leases: Api::namespaced(client.clone(), NAMESPACE), nodes: Api::all(client) }
        });
        made.clone()
    }
}

async fn deadline<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, LeaseError> {
    let answer = tokio::time::timeout(REQUEST_DEADLINE, call).await;
    answer.map_err(|_| LeaseError::Deadline)?.map_err(|error| CallError::from(error).into())
}

fn owned(lease: &Lease) -> bool {
    lease.metadata.owner_references.as_ref().is_some_and(|owners| !owners.is_empty())
}

/// The lease as it is written: from the one that exists, or new.
fn renewed(
    base: Option<&Lease>,
    settings: &LeaseSettings,
    owner: Option<OwnerReference>,
    now: jiff::Timestamp,
) -> Lease {
    let mut lease = base.cloned().unwrap_or_else(|| Lease {
        metadata: ObjectMeta {
            name: Some(settings.node_name.clone()),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec { holder_identity: Some(settings.node_name.clone()), ..LeaseSpec::default() }),
    });
    if let Some(owner) = owner {
        lease.metadata.owner_references = Some(vec![owner]);
    }
    let spec = lease.spec.get_or_insert_default();
    spec.lease_duration_seconds = Some(settings.duration_seconds);
    spec.renew_time = Some(MicroTime(now));
    lease
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
