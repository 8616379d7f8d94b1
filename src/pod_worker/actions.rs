//! What a decision can ask for, and what comes back.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::view::{Target, WaitingReason};
use crate::{
    cri::Seq,
    events::EventType,
    resources::{PodSize, resize_plan::ContainerUpdate},
    volumes::MountedVolumes,
};

/// One step on behalf of a pod. Carried out by the shell, one per [`Target`] at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Read the runtime again: the last read is older than the last action.
    ReadRuntime,
    CreateCgroup,
    MountVolumes,
    /// Objects changed: write again what depends on them.
    RefreshVolumes,
    CreateSandbox {
        attempt: u32,
    },
    /// The sandbox cannot be used any more: kill what runs in it, stop it, so that the next attempt can be made.
    StopSandbox {
        ids: Vec<String>,
        containers: Vec<ContainerToStop>,
    },
    StartContainer {
        name: String,
        attempt: u32,
    },
    /// Kill one container and go on with the pod; `restart`: start it again whatever its exit code.
    KillContainer {
        container: ContainerToStop,
        message: String,
        restart: bool,
    },
    /// Put the allocation into force. `pod`: the pod's own cgroup too, and its size then.
    Resize {
        updates: Vec<ContainerUpdate>,
        pod: Option<PodSize>,
    },
    /// Remove these one after the other, killing first what is alive; their logs stay (contract P-36).
    ResetContainers {
        containers: Vec<ContainerToReset>,
    },
    /// Kill everything of the pod: preStop hooks, ordered SIGTERM, SIGKILL at the deadline, then the sandboxes.
    StopPod {
        containers: Vec<ContainerToStop>,
        sandboxes: Vec<String>,
        deadline: Instant,
    },
    /// Remove dead containers, oldest first, with their logs.
    Prune {
        containers: Vec<String>,
        sandboxes: Vec<String>,
    },
    /// Unmount volumes, remove the pod's directory and cgroup.
    TearDown,
    /// The API has let go: remove containers, sandboxes and logs.
    RemoveRuntime {
        containers: Vec<String>,
        sandboxes: Vec<String>,
    },
}

impl Action {
    pub fn target(&self) -> Target {
        match self {
            Self::ReadRuntime => Target::Read,
            Self::CreateCgroup => Target::Cgroup,
            Self::MountVolumes | Self::RefreshVolumes => Target::Volumes,
            Self::CreateSandbox { .. } | Self::StopSandbox { .. } | Self::ResetContainers { .. } => Target::Sandbox,
            Self::StartContainer { name, .. } => Target::Container(name.clone()),
            Self::KillContainer { container, .. } => Target::Container(container.name.clone()),
            Self::Resize { .. } => Target::Resize,
            Self::StopPod { .. } => Target::Stop,
            Self::Prune { .. } => Target::Prune,
            Self::TearDown | Self::RemoveRuntime { .. } => Target::Remove,
        }
    }
    pub fn name(&self) -> &'static str {
        match self {
            Self::ReadRuntime => "read_runtime",
            Self::CreateCgroup => "create_cgroup",
            Self::MountVolumes => "mount_volumes",
            Self::RefreshVolumes => "refresh_volumes",
            Self::CreateSandbox { .. } => "create_sandbox",
            Self::StopSandbox { .. } => "stop_sandbox",
            Self::StartContainer { .. } => "start_container",
            Self::KillContainer { .. } => "kill_container",
            Self::Resize { .. } => "resize",
            Self::ResetContainers { .. } => "reset_containers",
            Self::StopPod { .. } => "stop_pod",
            Self::Prune { .. } => "prune",
            Self::TearDown => "tear_down",
            Self::RemoveRuntime { .. } => "remove_runtime",
        }
    }
}

/// A container to be stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerToStop {
    pub id: String,
    pub name: String,
    /// Its grace: the probe's own, the pod's, or an override. The shell never passes less than 2 s on (contract P-31).
    pub grace: Duration,
    /// Run its preStop hook first. False when an earlier kill already did.
    pub hook: bool,
    /// Sidecars stop after the mains, in reverse order: 0 for mains and init containers, 1, 2, … for sidecars from last to first.
    pub rank: u32,
}

/// A container that is removed so that its pod can begin anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerToReset {
    pub id: String,
    pub name: String,
    /// Not ended yet, as far as is known: killed first.
    pub alive: bool,
}

/// An event that the decision raises, once per `key`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Raised once per key in the worker's life.
    pub key: String,
    /// `None`: the pod itself.
    pub container: Option<String>,
    pub kind: EventType,
    pub reason: &'static str,
    pub message: String,
}

/// How an action ended. Every variant that touched the runtime carries the [`Seq`] drawn at its end.
#[derive(Debug)]
pub struct Ended {
    pub action: Action,
    pub at: Instant,
    /// Nothing is done on the runtime before a read that is newer than this.
    pub seq: Option<Seq>,
    /// The pod-scoped read that followed, if it succeeded: when it was sent.
    pub read: Option<Seq>,
    pub outcome: Outcome,
}

#[derive(Debug)]
pub enum Outcome {
    Done,
    /// Failed in a way that may pass; the shell has raised the event.
    Failed,
    /// The volumes are there and up to date; token rotation wants a refresh after that time.
    Volumes {
        mounted: Option<Arc<MountedVolumes>>,
        refresh_in: Option<Duration>,
    },
    /// The container did not start.
    StartFailed {
        waiting: WaitingReason,
        retry_at: Option<Instant>,
    },
    /// The start was given up because the pod is ending or the plan changed: nothing to remember.
    Abandoned,
}

/// What a running start tells the worker before it ends.
#[derive(Debug, Clone)]
pub enum Progress {
    /// The container runs, its postStart hook is being awaited.
    PostStart { container: String, id: String },
}
