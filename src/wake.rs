//! Wakes: how a change anywhere reaches the one pod it concerns.
//!
//! A wake carries no state, only the UID and the cause for the metric. The woken worker reads the truth again. Publish first,
//! then wake: a worker that runs at once must already see the change.

use crate::pods::PodUid;

/// Why a pod was woken. The label of `rkubelet_pod_wakes_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cause {
    /// The desired pod was added, changed, or is gone.
    Desired,
    /// The runtime said something: an event, a pod-scoped read, a relist.
    Runtime,
    /// An action of this worker ended.
    Action,
    /// A probe's verdict changed.
    Probe,
    /// A configMap, secret or other referenced object changed.
    Object,
    /// A node fact changed: network ready, labels, addresses.
    Node,
    /// The status was acknowledged by the apiserver.
    Published,
    /// The pod's own timer: back-off, deadline, grace.
    Timer,
    /// A kill order was written: eviction, preemption, shutdown.
    Order,
    /// An image was pulled or a pull failed.
    Image,
    /// The pod's turn has come at admission: those whose place it takes have left, or the Node was read again.
    Admission,
}

impl Cause {
    pub const ALL: [Self; 11] = [
        Self::Desired,
        Self::Runtime,
        Self::Action,
        Self::Probe,
        Self::Object,
        Self::Node,
        Self::Published,
        Self::Timer,
        Self::Order,
        Self::Image,
        Self::Admission,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Desired => "desired",
            Self::Runtime => "runtime",
            Self::Action => "action",
            Self::Probe => "probe",
            Self::Object => "object",
            Self::Node => "node",
            Self::Published => "published",
            Self::Timer => "timer",
            Self::Order => "order",
            Self::Image => "image",
            Self::Admission => "admission",
        }
    }
}

/// Where wakes go: the pod workers. Never blocks.
pub trait WakeSink: Send + Sync + 'static {
    fn wake(&self, uid: &PodUid, cause: Cause);
    /// Wakes every pod that has a worker.
    fn wake_all(&self, cause: Cause);
}

/// Swallows wakes: for tests of a room that is not about them.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoWakes;

impl WakeSink for NoWakes {
    fn wake(&self, _: &PodUid, _: Cause) {}
    fn wake_all(&self, _: Cause) {}
}
