//! What the pod worker sees of probes.

use std::{collections::HashMap, net::IpAddr};

use jiff::Timestamp;

use crate::pods::{Pod, PodUid};

/// What all probes of the node have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeSettings {
    /// Spreads the first probes of adopted containers.
    pub seed: u64,
    /// Try a readiness or startup probe between its regular runs until it first passes.
    pub eager_first_readiness: bool,
}

/// A running container that is to be probed. The worker hands in all of a pod's targets at each turn.
#[derive(Debug, Clone, PartialEq)]
pub struct ProbeTarget {
    pub container: String,
    pub container_id: String,
    /// initialDelaySeconds counts from here.
    pub started_at: Timestamp,
    /// Where to probe when the probe names no host: the pod's IP, or the node's for host-network pods.
    pub host: Option<IpAddr>,
    /// The container ran before this agent process started: its readiness starts from what the API says, and the first
    /// probe waits a random part of the period (contract B-01, B-10).
    pub adopted: bool,
    /// For an adopted container: `ready` and `started` as the API had them.
    pub was_ready: bool,
    pub was_started: bool,
    /// The pod is terminating: liveness and startup stop, readiness goes on (contract B-02).
    pub terminating: bool,
}

/// A container without that probe has the verdict that lets it through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// Passed, or not yet decided, or no probe.
    Alive,
    /// failureThreshold reached: kill it, under the probe's own grace period if it has one (seconds).
    Dead { grace_seconds: Option<i64> },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    NotReady,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Startup {
    /// No startup probe, or it has passed: `started: true`.
    Started,
    /// Still being tried.
    Pending,
    /// failureThreshold reached: kill it.
    Failed { grace_seconds: Option<i64> },
}

/// The verdicts on one container, valid for that container ID only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerVerdicts {
    pub container_id: String,
    pub liveness: Liveness,
    pub readiness: Readiness,
    pub startup: Startup,
}

pub trait PodProbes: Send + Sync + 'static {
    /// The pod's running containers, complete. Starts, keeps and stops probes accordingly. Cheap when nothing changed.
    fn track(&self, pod: &Pod, targets: &[ProbeTarget]);
    /// Container name → verdicts. A tracked container always has an entry (initial values of contract B-02).
    fn verdicts(&self, uid: &PodUid) -> HashMap<String, ContainerVerdicts>;
    fn forget(&self, uid: &PodUid);
}
