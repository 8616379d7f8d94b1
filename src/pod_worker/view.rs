//! What a worker sees when it decides: one consistent view of its pod, and the memory that only this worker keeps.
//!
//! Plain values. The shell fills a [`PodView`] from the stores; [`decide`](super::decide::decide) turns it into a
//! [`Turn`](super::decide::Turn). Inputs are three-valued ([`Known`]): what was not read yet forbids destruction.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::PodStatus;
use tokio::time::Instant;

use super::{actions::Action, backoff::Backoff};
use crate::{
    admission::{Rejection, Standing},
    cri::{PodRuntime, Seq},
    node::NodeFacts,
    pods::{Pod, PodUid},
    probes::ContainerVerdicts,
    resources::{PodResources, PodSize},
    time::Now,
};

/// An input that may not have been read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known<T> {
    /// Nobody looked yet: no conclusion may be drawn.
    NotYet,
    /// Somebody looked, and it is not there.
    Absent,
    Is(T),
}

impl<T> Known<T> {
    pub fn is(&self) -> Option<&T> {
        match self {
            Self::Is(value) => Some(value),
            _ => None,
        }
    }
    pub fn absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
}

/// Where a pod is in its life. Only ever advances (contract P-06).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The pod shall run.
    Syncing,
    /// Everything of the pod shall stop.
    Terminating,
    /// Nothing of the pod runs. What it left is being removed.
    Terminated,
    /// Nothing is left; the worker may retire.
    Gone,
}

/// Somebody other than the user decided that this pod must end: deadline, eviction, preemption, shutdown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KillOrder {
    /// `status.reason`: `DeadlineExceeded`, `Evicted`, …
    pub reason: String,
    pub message: String,
    /// Overrides the pod's own grace period.
    pub grace: Option<Duration>,
    /// Message of the condition `DisruptionTarget` (reason `TerminationByKubelet`), for an end that is not the pod's fault.
    pub disruption: Option<String>,
}

/// Why a pod is being terminated. The first cause stays, but for the grace, which may only shrink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    pub cause: EndCause,
    /// When SIGKILL is due.
    pub deadline: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndCause {
    /// `deletionTimestamp` is set, or the pod is gone from its source.
    Deleted,
    /// All containers have ended and none is to be restarted.
    Finished,
    /// Rejected at admission. Nothing was started, or, after a restart of the agent on a node that changed, what runs is stopped.
    Rejected(Rejection),
    Ordered(KillOrder),
}

/// Whether the volumes are there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Volumes {
    #[default]
    NotMounted,
    Mounted,
}

/// What is in flight for a pod, by target. At most one action per target (house plan "Actions").
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    Cgroup,
    Volumes,
    Sandbox,
    Container(String),
    /// Puts a new allocation into force: the pod's cgroup and running containers.
    Resize,
    /// Stops everything of the pod.
    Stop,
    /// Removes what a terminated pod left: volumes, cgroup, containers and sandboxes.
    Remove,
    /// Reads the runtime again.
    Read,
    /// Removes dead containers that nobody needs.
    Prune,
}

/// When a failed action may be tried again, and after how long a delay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    pub at: Instant,
    pub delay: Duration,
}

impl Retry {
    /// Volumes back off from 500 ms to 2 m 2 s (contract V-20), everything else from 1 s to 10 s (contract P-06).
    pub fn after(earlier: Option<&Self>, target: &Target, now: Instant) -> Self {
        let (first, cap) = match target {
            Target::Volumes => (Duration::from_millis(500), Duration::from_secs(122)),
            _ => (Duration::from_secs(1), Duration::from_secs(10)),
        };
        let delay = earlier.map_or(first, |r| (r.delay * 2).min(cap));
        Self { at: now + delay, delay }
    }
}

/// Why a container is not running although it should: its Waiting state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitingReason {
    pub reason: String,
    pub message: String,
}

/// The last try to start a container failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartFailure {
    pub waiting: WaitingReason,
    /// When to try again; `None`: only a change of the pod or of an object helps.
    pub retry_at: Option<Instant>,
    /// The pod's generation at the failed try: a newer one is a reason to try again at once.
    pub generation: i64,
}

impl StartFailure {
    /// It failed with a container in the runtime, whose end the crash back-off counts like any other.
    pub fn left_a_container(&self) -> bool {
        matches!(self.waiting.reason.as_str(), "RunContainerError" | "PostStartHookError")
    }
}

/// What the worker remembers of one container. Lost with the agent process, but for what the runtime's annotations and the
/// API status hold (see `docs/architecture.md`, "where facts live").
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ContainerHistory {
    pub backoff: Backoff,
    pub start_failure: Option<StartFailure>,
    /// Container ID whose postStart hook has not returned yet: it counts as Waiting and is not probed.
    pub post_start_running: Option<String>,
    /// Container ID that was killed in order to be started again, whatever the restart policy says of its exit.
    pub restart_of: Option<String>,
}

/// The worker's memory between turns.
#[derive(Debug, Clone)]
pub struct History {
    pub phase: Phase,
    /// The newest desired pod seen, kept for a pod that is gone from its source while it still runs.
    pub pod: Option<Pod>,
    /// `status.startTime`: from the API, or the moment this worker accepted the pod.
    pub started: Option<Timestamp>,
    pub cgroup_ready: bool,
    /// What this process last resized the pod's cgroup to. `None`: it is as what is in force says.
    pub cgroup_size: Option<PodSize>,
    pub volumes: Volumes,
    /// An object that a volume is made from changed, or a token is due.
    pub refresh: bool,
    /// When the volumes want a refresh by time (token rotation).
    pub refresh_at: Option<Instant>,
    /// Failed actions: not tried again before that time.
    pub retries: BTreeMap<Target, Retry>,
    /// Sandboxes for which StopPodSandbox returned: only that means stopped, the runtime's state says less.
    pub stopped_sandboxes: BTreeSet<String>,
    pub containers: BTreeMap<String, ContainerHistory>,
    pub ending: Option<Ending>,
    /// StopPodSandbox returned for all of the pod's sandboxes after termination began.
    pub stopped: bool,
    /// Everything on the node is removed (only of a pod that the API has let go).
    pub removed: bool,
    /// Volumes unmounted and cgroup removed: the terminal status may be followed by the DELETE.
    pub torn_down: bool,
    pub delete_requested: bool,
    /// Version of the terminal status at the publisher.
    pub terminal_version: Option<u64>,
    /// An action ended, or a read failed: nothing is done on the runtime before a read that is newer.
    pub fresh_after: Seq,
    /// The first status that this process generated or found at the API.
    pub last_status: PodStatus,
    /// Containers that ran before this process started (contract B-10).
    pub adopted: BTreeSet<String>,
    /// Notes already raised, so that an idempotent decision raises each once.
    pub noted: BTreeSet<String>,
    /// Termination messages by container ID, read once when the container ended.
    pub termination_messages: HashMap<String, String>,
}

impl History {
    pub fn new() -> Self {
        Self {
            phase: Phase::Syncing,
            pod: None,
            started: None,
            cgroup_ready: false,
            cgroup_size: None,
            volumes: Volumes::default(),
            refresh: false,
            refresh_at: None,
            retries: BTreeMap::new(),
            stopped_sandboxes: BTreeSet::new(),
            containers: BTreeMap::new(),
            ending: None,
            stopped: false,
            removed: false,
            torn_down: false,
            delete_requested: false,
            terminal_version: None,
            fresh_after: Seq::default(),
            last_status: PodStatus::default(),
            adopted: BTreeSet::new(),
            noted: BTreeSet::new(),
            termination_messages: HashMap::new(),
        }
    }
}

impl Default for History {
    fn default() -> Self {
        Self::new()
    }
}

/// Everything that a decision may depend on.
#[derive(Clone)]
pub struct PodView<'a> {
    pub now: Now,
    pub uid: &'a PodUid,
    /// From the PodStore, with the resources that the pod is allocated. `NotYet` until every source has delivered a complete list.
    pub desired: Known<Pod>,
    /// The resources that are in force.
    pub actuated: &'a PodResources,
    /// Pod-level resources are resized in place.
    pub pod_level_resize: bool,
    /// From the RuntimeStore. `NotYet` until its first complete list, or while a read newer than the last action is missing.
    pub runtime: Known<Arc<PodRuntime>>,
    /// The runtime has been listed once as a whole: from then on reading a single pod makes sense.
    pub listed: bool,
    pub node: &'a NodeFacts,
    pub verdicts: &'a HashMap<String, ContainerVerdicts>,
    pub order: Option<&'a KillOrder>,
    /// Asked for only while the pod shall run.
    pub admission: &'a Standing,
    pub in_flight: &'a BTreeMap<Target, Action>,
    pub history: &'a History,
    /// The newest status version that the apiserver acknowledged.
    pub acknowledged: u64,
}
