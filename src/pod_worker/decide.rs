//! The decision: from what is seen to what to do next. Pure, total and idempotent.
//!
//! It never assumes that an earlier action happened: it looks. So a restart of the agent, adoption, and recovery from a lost event
//! are the ordinary path. While the pod shall run, this file decides (with [`start_order`](super::start_order) for its containers); once it
//! is ending, [`going_down`](super::going_down) does.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1 as corev1;
use tokio::time::Instant;

use super::{
    actions::{Action, ContainerToStop, Note},
    backoff::BackoffLimits,
    going_down, resize,
    restart::LifecycleGates,
    restart_all, start_order,
    view::{EndCause, Ending, KillOrder, Known, Phase, PodView, Target, Volumes, WaitingReason},
};
use crate::{
    admission::Standing,
    cri::{ContainerState, PodRuntime, Sandbox},
    events::EventType,
    pods::{ContainerKind, Pod},
};

/// What is the same for all pods of a node.
#[derive(Clone, Copy)]
pub struct Rules {
    pub backoff: BackoffLimits,
    /// The container's hash as it stands in the runtime's annotation (contract P-26).
    pub hash: fn(&corev1::Container) -> String,
    pub gates: LifecycleGates,
}

/// Ended containers that a name keeps while its pod runs, as upstream does when the next one ends.
const DEAD_KEPT: usize = 1;

/// The answer to one view.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    pub phase: Phase,
    pub ending: Option<Ending>,
    pub actions: Vec<Action>,
    /// Container name → why it waits.
    pub waiting: BTreeMap<String, WaitingReason>,
    pub notes: Vec<Note>,
    /// The earliest moment at which this answer may change by time alone.
    pub wake_at: Option<Instant>,
    /// Ask the apiserver to let the pod go (contract P-10).
    pub delete: bool,
    /// What waits for an image, the gate or a hook stops waiting: the pod ends or begins anew.
    pub abandon_starts: bool,
}

impl Turn {
    pub(super) fn new(phase: Phase) -> Self {
        Self {
            phase,
            ending: None,
            actions: Vec::new(),
            waiting: BTreeMap::new(),
            notes: Vec::new(),
            wake_at: None,
            delete: false,
            abandon_starts: phase != Phase::Syncing,
        }
    }
    pub(super) fn wake_by(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |w| w.min(at)));
    }
}

/// Whether the pod has a sandbox that its containers can run in (contract P-09).
#[derive(Debug, Clone, PartialEq)]
pub enum SandboxState<'a> {
    Usable(&'a Sandbox),
    /// None yet, or the newest cannot be used: make the next attempt.
    Needed {
        attempt: u32,
        why: &'static str,
    },
}

/// Contract P-09: none, more than one ready, newest not ready, network namespace mode changed, no IP.
pub fn sandbox_state<'a>(pod: &Pod, runtime: &'a PodRuntime) -> SandboxState<'a> {
    let Some(latest) = runtime.latest_sandbox() else {
        return SandboxState::Needed { attempt: 0, why: "no pod sandbox exists" };
    };
    let attempt = latest.attempt + 1;
    if runtime.sandboxes.iter().filter(|s| s.ready).count() > 1 {
        return SandboxState::Needed { attempt, why: "multiple pod sandboxes are ready and need to be reconciled" };
    }
    if !latest.ready {
        return SandboxState::Needed { attempt, why: "pod sandbox is not ready" };
    }
    if latest.host_network != pod.host_network() {
        return SandboxState::Needed {
            attempt,
            why: "network namespace mode changed and sandbox needs to be recreated",
        };
    }
    if !pod.host_network() && latest.ips.is_empty() {
        return SandboxState::Needed { attempt: attempt.max(1), why: "pod sandbox has no IP address" };
    }
    SandboxState::Usable(latest)
}

/// See the module.
pub fn decide(view: &PodView<'_>, rules: &Rules) -> Turn {
    let mut turn = match (ending(view, rules), view.desired.is()) {
        (Some(ending), _) => going_down::decide(view, ending),
        (None, Some(pod)) => sync(view, pod, rules),
        // Not known yet whether anybody wants it: nothing is touched.
        (None, None) => Turn::new(view.history.phase),
    };
    hold_back_failed(view, &mut turn);
    turn
}

/// An action whose last try failed waits for its back-off.
fn hold_back_failed(view: &PodView<'_>, turn: &mut Turn) {
    let actions = std::mem::take(&mut turn.actions);
    for action in actions {
        match view.history.retries.get(&action.target()) {
            Some(retry) if retry.at > view.now.mono => turn.wake_by(retry.at),
            _ => turn.actions.push(action),
        }
    }
}

/// Why and by when the pod must end, if it must.
fn ending(view: &PodView<'_>, rules: &Rules) -> Option<Ending> {
    let cause = match &view.history.ending {
        Some(earlier) => {
            // Another cause never replaces the first, but may shorten the grace.
            let by_grace = end_cause(view, rules).map(|cause| deadline(view, &cause));
            let deadline = by_grace.map_or(earlier.deadline, |d| earlier.deadline.min(d));
            return Some(Ending { cause: earlier.cause.clone(), deadline });
        }
        None => end_cause(view, rules)?,
    };
    let deadline = deadline(view, &cause);
    Some(Ending { cause, deadline })
}

fn end_cause(view: &PodView<'_>, rules: &Rules) -> Option<EndCause> {
    if view.desired.absent() {
        return Some(EndCause::Deleted);
    }
    let pod = view.desired.is()?;
    if pod.deletion_timestamp().is_some() {
        return Some(EndCause::Deleted);
    }
    if let Some(order) = view.order {
        return Some(EndCause::Ordered(order.clone()));
    }
    if matches!(pod.api_status().phase.as_deref(), Some("Succeeded" | "Failed")) {
        return Some(EndCause::Finished);
    }
    if let Standing::Rejected(rejection) = view.admission {
        return Some(EndCause::Rejected(rejection.clone()));
    }
    if let Some(at) = active_deadline(view, pod)
        && at <= view.now.mono
    {
        return Some(EndCause::Ordered(KillOrder {
            reason: "DeadlineExceeded".into(),
            message: "Pod was active on the node longer than the specified deadline".into(),
            grace: None,
            disruption: None,
        }));
    }
    let runtime = view.runtime.is()?;
    start_order::finished(pod, runtime, view, rules).then_some(EndCause::Finished)
}

/// When the grace of an ending that starts (or is asked for again) now runs out. At least one second.
fn deadline(view: &PodView<'_>, cause: &EndCause) -> Instant {
    let pod = view.desired.is().or(view.history.pod.as_ref());
    let own = match pod {
        Some(pod) => pod.deletion_grace().unwrap_or_else(|| pod.termination_grace()),
        // Only the runtime knows it (contract P-06).
        None => Duration::from_secs(1),
    };
    let grace = match cause {
        EndCause::Ordered(order) => order.grace.unwrap_or(own),
        _ => own,
    };
    view.now.mono + grace.max(Duration::from_secs(1))
}

/// `activeDeadlineSeconds` counts from `status.startTime` (contract P-11).
fn active_deadline(view: &PodView<'_>, pod: &Pod) -> Option<Instant> {
    let seconds = u64::try_from(pod.spec().active_deadline_seconds?).ok()?;
    let started = view.history.started?;
    let active = view.now.wall.duration_since(started).try_into().unwrap_or(Duration::ZERO);
    Some(view.now.mono + Duration::from_secs(seconds).saturating_sub(active))
}

fn sync(view: &PodView<'_>, pod: &Pod, rules: &Rules) -> Turn {
    let mut turn = Turn::new(Phase::Syncing);
    if let Some(at) = active_deadline(view, pod) {
        turn.wake_by(at);
    }
    if let Standing::NotYet { until } = view.admission {
        not_admitted_yet(view, *until, &mut turn);
        return turn;
    }
    let prepared = prepare(view, &mut turn);
    let runtime = match &view.runtime {
        Known::Is(runtime) => Arc::clone(runtime),
        Known::Absent => Arc::default(),
        Known::NotYet => {
            read_again(view, &mut turn);
            start_order::waiting_reasons(view, pod, &mut turn);
            return turn;
        }
    };
    if restart_all::going_on(pod, &runtime, &view.history.last_status, rules.gates) {
        restart_all::reset(view, pod, &runtime, &mut turn);
        return turn;
    }
    match sandbox_state(pod, &runtime) {
        SandboxState::Usable(sandbox) => {
            // Whatever starts must find the pod's cgroup large enough.
            let sized = resize::decide(view, pod, &runtime, &mut turn);
            start_order::containers(view, pod, &runtime, sandbox, rules, prepared && sized, &mut turn);
            prune(view, &runtime, &mut turn);
        }
        SandboxState::Needed { attempt, .. } => {
            start_order::waiting_reasons(view, pod, &mut turn);
            new_sandbox(view, pod, &runtime, attempt, prepared, &mut turn);
        }
    }
    turn
}

/// The pod is looked for in the runtime, and nothing else: what runs goes on, nothing is begun (contract 3.2).
fn not_admitted_yet(view: &PodView<'_>, until: Option<Instant>, turn: &mut Turn) {
    if let Some(until) = until {
        turn.wake_by(until);
    }
    if view.runtime == Known::NotYet {
        read_again(view, turn);
    }
}

/// Cgroup and volumes: both before the sandbox. True when both are there.
fn prepare(view: &PodView<'_>, turn: &mut Turn) -> bool {
    let history = view.history;
    if !history.cgroup_ready && !view.in_flight.contains_key(&Target::Cgroup) {
        turn.actions.push(Action::CreateCgroup);
    }
    let busy = view.in_flight.contains_key(&Target::Volumes);
    match history.volumes {
        Volumes::Mounted => {
            let due = history.refresh_at.is_some_and(|at| at <= view.now.mono);
            if (history.refresh || due) && !busy {
                turn.actions.push(Action::RefreshVolumes);
            } else if let Some(at) = history.refresh_at
                && !busy
            {
                turn.wake_by(at);
            }
        }
        Volumes::NotMounted if !busy => turn.actions.push(Action::MountVolumes),
        Volumes::NotMounted => {}
    }
    history.cgroup_ready && history.volumes == Volumes::Mounted
}

/// Asks for a first read of this pod, or one that is newer than the last action, unless one is under way.
pub(super) fn read_again(view: &PodView<'_>, turn: &mut Turn) {
    if view.listed && !view.in_flight.contains_key(&Target::Read) {
        turn.actions.push(Action::ReadRuntime);
    }
}

/// Makes the next attempt at a sandbox, after the earlier ones are out of the way.
fn new_sandbox(view: &PodView<'_>, pod: &Pod, runtime: &PodRuntime, attempt: u32, prepared: bool, turn: &mut Turn) {
    if view.in_flight.contains_key(&Target::Sandbox) {
        return;
    }
    let inhabited = |sandbox: &&Sandbox| {
        runtime.containers.iter().any(|c| c.sandbox_id == sandbox.id && c.state == ContainerState::Running)
    };
    let stale: Vec<String> = runtime
        .sandboxes
        .iter()
        .filter(|s| s.ready || !view.history.stopped_sandboxes.contains(&s.id) || inhabited(s))
        .map(|s| s.id.clone())
        .collect();
    if !stale.is_empty() {
        if let Some(latest) = runtime.latest_sandbox() {
            turn.notes.push(Note {
                key: format!("sandbox-changed/{}", latest.id),
                container: None,
                kind: EventType::Normal,
                reason: "SandboxChanged",
                message: "Pod sandbox changed, it will be killed and re-created.".into(),
            });
        }
        let containers = still_running(runtime, pod.termination_grace());
        turn.actions.push(Action::StopSandbox { ids: stale, containers });
        return;
    }
    if !prepared || view.in_flight.keys().any(|t| matches!(t, Target::Container(_))) {
        return;
    }
    if let (false, Some(why)) = (pod.host_network(), &view.node.network_not_ready) {
        turn.notes.push(Note {
            key: format!("network-not-ready/{attempt}"),
            container: None,
            kind: EventType::Warning,
            reason: "NetworkNotReady",
            message: format!("network is not ready: {why}"),
        });
        return;
    }
    turn.actions.push(Action::CreateSandbox { attempt });
}

fn still_running(runtime: &PodRuntime, grace: Duration) -> Vec<ContainerToStop> {
    let alive = |c: &&crate::cri::Container| c.state != ContainerState::Exited;
    runtime
        .containers
        .iter()
        .filter(alive)
        .map(|c| ContainerToStop { id: c.id.clone(), name: c.name.clone(), grace, hook: true, rank: 0 })
        .collect()
}

/// Keeps of each name what runs and the newest that ended (state and lastState), and the newest sandbox.
fn prune(view: &PodView<'_>, runtime: &PodRuntime, turn: &mut Turn) {
    if view.in_flight.contains_key(&Target::Prune) {
        return;
    }
    let mut by_name: BTreeMap<&str, Vec<&crate::cri::Container>> = BTreeMap::new();
    for container in &runtime.containers {
        by_name.entry(&container.name).or_default().push(container);
    }
    let mut dead = Vec::new();
    for list in by_name.values_mut() {
        list.sort_by_key(|c| std::cmp::Reverse((c.attempt, c.created_at)));
        let ended = list.iter().filter(|c| c.state == ContainerState::Exited);
        dead.extend(ended.skip(DEAD_KEPT).map(|c| c.id.clone()));
    }
    let latest = runtime.latest_sandbox().map(|s| s.id.as_str());
    let sandboxes: Vec<String> = runtime
        .sandboxes
        .iter()
        .filter(|s| Some(s.id.as_str()) != latest && view.history.stopped_sandboxes.contains(&s.id))
        .filter(|s| runtime.containers.iter().all(|c| c.sandbox_id != s.id))
        .map(|s| s.id.clone())
        .collect();
    if !dead.is_empty() || !sandboxes.is_empty() {
        turn.actions.push(Action::Prune { containers: dead, sandboxes });
    }
}

/// Whether the container counts as started: postStart returned and the startup probe passed, of which nobody knows before it is followed.
pub fn is_started(view: &PodView<'_>, container: &crate::cri::Container) -> bool {
    let post_start = view.history.containers.get(&container.name).and_then(|h| h.post_start_running.as_deref());
    if post_start == Some(container.id.as_str()) {
        return false;
    }
    match view.verdicts.get(&container.name).filter(|v| v.container_id == container.id) {
        Some(verdicts) => verdicts.startup == crate::probes::Startup::Started,
        None => {
            let pod = view.desired.is().or(view.history.pod.as_ref());
            let spec = pod.and_then(|pod| pod.container(&container.name)).map(|c| c.spec);
            spec.is_none_or(|spec| spec.startup_probe.is_none())
        }
    }
}

/// Sidecars from last to first get rank 1, 2, …; everything else 0 (contract P-31).
pub(super) fn stop_rank(pod: Option<&Pod>, name: &str) -> u32 {
    let Some(pod) = pod else { return 0 };
    let sidecars: Vec<&str> =
        pod.init_containers().filter(|c| c.kind == ContainerKind::Sidecar).map(|c| c.name()).collect();
    match sidecars.iter().position(|s| *s == name) {
        Some(index) => (sidecars.len() - index) as u32,
        None => 0,
    }
}
