//! Admission: whether this node takes a pod that was bound to it (contract 3.2).
//!
//! In: a pod, the node's facts, the pods that hold a place already. Out: [`Standing`]: admitted, rejected with reason and message, or not decided
//! yet; and, for a critical pod that does not fit, kill orders for the pods that make room. [`decide`] is pure; [`NodeAdmission`] keeps the places
//! under one lock, without I/O, and tells: events, orders, wakes. Nothing of a pod is touched on the machine before it is admitted, and a
//! pod is decided on once in the life of this process.
//!
//! Places are handed out in order: pods that run already (found in the runtime after a restart of the agent), then critical ones, then by age. A
//! pod leaves its place when none of its containers runs any more.

mod app_armor;
mod decide;
mod declared_features;
mod demand;
mod metrics;
mod node_admission;
mod placement;
mod preemption;
mod sysctls;

#[cfg(test)]
mod decide_tests;
#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod node_admission_tests;

use tokio::time::Instant;

use crate::{
    pod_worker::view::KillOrder,
    pods::{Pod, PodUid},
};

pub use app_armor::enabled as app_armor_enabled;
pub use decide::{Candidate, Decision, Occupant, Policy, admit};
pub use declared_features::{declared_features, missing_for_pod, missing_for_update};
pub use demand::{Demand, Insufficient};
pub use metrics::AdmissionMetrics;
pub use node_admission::{AdmissionParts, NodeAdmission};
pub use sysctls::{SysctlAllowlist, SysctlError};

/// Why a pod was turned away: goes to `status.reason` and, behind `Pod was rejected: `, to `status.message`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// `OutOfcpu`, `NodeAffinity`, `SysctlForbidden`, …: also the reason of the event.
    pub reason: String,
    /// The event's message.
    pub message: String,
}

impl Rejection {
    pub(crate) fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into() }
    }

    /// `status.message`.
    pub fn status_message(&self) -> String {
        format!("Pod was rejected: {}", self.message)
    }
}

/// Where a pod stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Node or runtime are not known yet, or victims of a preemption are still leaving. The pod is woken when that changes, but for the
    /// passing of `until`.
    NotYet {
        until: Option<Instant>,
    },
    Admitted,
    Rejected(Rejection),
}

/// What a pod worker asks. Never blocks.
pub trait PodAdmission: Send + Sync + 'static {
    /// Decides on the pod, and on all before it in line, if nobody has and it can be done now.
    fn standing(&self, pod: &Pod) -> Standing;
    /// None of the pod's containers runs any more: its place is free. Idempotent.
    fn release(&self, uid: &PodUid);
    /// Nothing is left of the pod.
    fn forget(&self, uid: &PodUid);
    /// A pod's spec changed: an event says so when it now needs what the node has not declared (contract A-12).
    fn updated(&self, old: &Pod, new: &Pod);
}

/// Where kill orders go: the pod workers.
pub trait KillOrders: Send + Sync + 'static {
    fn order(&self, uid: &PodUid, order: KillOrder);
}
