//! What is known of one pod's sandboxes and containers, with the order in which it was learnt. Values only.
//!
//! CRI has no revisions, so we draw our own: a read draws a [`Seq`] *before* it is sent, and what it found carries that
//! number. Whoever ended an action draws one at its end, and trusts only what was read after it.

use std::{collections::HashMap, net::IpAddr, time::Duration};

use jiff::Timestamp;

/// A point in the order of reads and action ends. Larger is later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(pub u64);

/// One sandbox as the runtime last showed it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sandbox {
    pub id: String,
    pub attempt: u32,
    pub created_at: Timestamp,
    pub ready: bool,
    /// Empty for host-network pods and before CNI answered. Order is the runtime's.
    pub ips: Vec<IpAddr>,
    /// Network namespace mode is NODE.
    pub host_network: bool,
    pub runtime_handler: String,
    pub name: String,
    pub namespace: String,
    pub labels: HashMap<String, String>,
    pub annotations: HashMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ContainerState {
    Created,
    Running,
    Exited,
    /// The runtime lost track: treated as dead, never as absent.
    Unknown,
}

/// One container as the runtime last showed it.
#[derive(Debug, Clone, PartialEq)]
pub struct Container {
    /// Without the `containerd://` scheme.
    pub id: String,
    pub name: String,
    pub attempt: u32,
    pub sandbox_id: String,
    pub state: ContainerState,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub exit_code: i32,
    /// The runtime's reason: `OOMKilled`, `Completed`, `Error`, `StartError` …
    pub reason: String,
    pub message: String,
    /// The image as the spec named it, resolved by the runtime (`image.image`).
    pub image: String,
    /// `imageRef`: repo digest or ID, status' imageID.
    pub image_ref: String,
    /// The image's ID, for image garbage collection.
    pub image_id: String,
    /// The handler the image was pulled for; empty for the default.
    pub image_runtime_handler: String,
    pub labels: HashMap<String, String>,
    pub annotations: HashMap<String, String>,
    pub log_path: String,
    /// From ContainerStatus: (uid, gid, supplemental groups), if the runtime says.
    pub user: Option<(i64, i64, Vec<i64>)>,
    /// From ContainerStatus: what is in force.
    pub resources: Option<super::v1::LinuxContainerResources>,
    /// Container path → mount as ContainerStatus lists them (for status.volumeMounts).
    pub mounts: Vec<super::v1::Mount>,
    /// In force, if the runtime says (else `RuntimeDefault`).
    pub stop_signal: super::v1::Signal,
    /// containerd told of an out-of-memory kill in this container's cgroup; not necessarily of its first process.
    pub oom_killed: bool,
}

/// The runtime's word for a container whose processes the kernel killed for want of memory.
pub const OOM_KILLED: &str = "OOMKilled";
/// 128 + SIGKILL: what the kernel's out-of-memory killer leaves behind, too.
const EXIT_CODE_OF_SIGKILL: i32 = 137;
/// So long after an end the runtime may still correct its reason. Upstream reads it within a second; a busy machine takes longer.
const REASON_SETTLES: Duration = Duration::from_secs(10);

impl Container {
    /// Ended like an out-of-memory kill a moment ago, but the runtime calls it something else. containerd learns of exits and of
    /// out-of-memory kills on two ways, and says `Error` until it has heard of both; so its word is asked for again.
    pub fn reason_may_come_late(&self, now: Timestamp) -> bool {
        let told = self.oom_killed || self.reason == OOM_KILLED;
        let just = |end: Timestamp| Duration::try_from(now.duration_since(end)).is_ok_and(|ago| ago < REASON_SETTLES);
        self.exit_code == EXIT_CODE_OF_SIGKILL && !told && self.finished_at.is_some_and(just)
    }
}

/// All sandboxes and containers of one pod, newest first in both lists.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PodRuntime {
    /// When the read behind this was sent. Only a read, never an event, raises it.
    pub as_of: Seq,
    pub sandboxes: Vec<Sandbox>,
    pub containers: Vec<Container>,
}

impl PodRuntime {
    pub fn is_empty(&self) -> bool {
        self.sandboxes.is_empty() && self.containers.is_empty()
    }
    /// The newest container of that name.
    pub fn latest(&self, name: &str) -> Option<&Container> {
        self.containers.iter().filter(|c| c.name == name).max_by_key(|c| (c.attempt, c.created_at))
    }
    pub fn latest_sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.iter().max_by_key(|s| (s.created_at, s.attempt))
    }
}
