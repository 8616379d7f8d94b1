//! The statuses of a pod's containers (contract P-34, P-42). Pure.

use k8s_openapi::api::core::v1::{
    ContainerState as ApiState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, ContainerUser, ImageVolumeStatus, LinuxContainerUser, PodStatus, VolumeMountStatus, VolumeStatus,
};

use super::{
    generate::{StatusInput, time},
    resources,
};
use crate::{
    containers::termination_log::cut_to_share,
    cri::{Container, ContainerState, OOM_KILLED},
    pod_worker::{
        restart::restarts_after,
        restart_all,
        start_order::{self, restart_count},
    },
    pods::{ContainerKind, ContainerRef, Pod},
    probes::{Readiness, Startup},
};

const LOST_AT_END: &str = "The container could not be located when the pod was terminated";
const LOST_RUNNING: &str =
    "The container could not be located when the pod was deleted.  The container used to be Running";
const INIT_LOST: &str = "Unable to get init container status from container runtime and pod has been initialized, treat it as exited normally";

/// In spec order.
pub(super) fn init_statuses(input: &StatusInput<'_>) -> Vec<ContainerStatus> {
    input.pod.init_containers().map(|c| container_status(input, c)).collect()
}

/// By name, as upstream sorts them.
pub(super) fn main_statuses(input: &StatusInput<'_>) -> Vec<ContainerStatus> {
    by_name(input.pod.main_containers().map(|c| container_status(input, c)).collect())
}

/// By name (contract P-22).
pub(super) fn ephemeral_statuses(input: &StatusInput<'_>) -> Vec<ContainerStatus> {
    by_name(input.pod.ephemeral_containers().map(|c| container_status(input, c)).collect())
}

fn by_name(mut list: Vec<ContainerStatus>) -> Vec<ContainerStatus> {
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}

/// All termination messages of a pod share 12 KiB, each container an equal part (contract P-35).
pub(super) fn share_messages(pod: &Pod, status: &mut PodStatus) {
    let containers = pod.all_containers().count();
    let lists =
        [&mut status.init_container_statuses, &mut status.container_statuses, &mut status.ephemeral_container_statuses];
    for of in lists.into_iter().flatten().flatten() {
        for state in [&mut of.state, &mut of.last_state].into_iter().flatten() {
            let message = state.terminated.as_mut().and_then(|t| t.message.as_mut());
            if let Some(message) = message {
                message.truncate(cut_to_share(message, containers).len());
            }
        }
    }
}

fn container_status(input: &StatusInput<'_>, container: ContainerRef<'_>) -> ContainerStatus {
    let old = old_status(input, container);
    let mut status = match input.runtime {
        None => old.cloned().unwrap_or_else(|| default_status(input, container, None)),
        Some(runtime) => {
            // A container that is created and not yet started is still being made: its predecessor, or nothing, is shown.
            let shown = |c: &&Container| c.name == container.name() && c.state != ContainerState::Created;
            let mut known: Vec<&Container> = runtime.containers.iter().filter(shown).collect();
            known.sort_by_key(|c| std::cmp::Reverse((c.attempt, c.created_at)));
            match known.as_slice() {
                [] => missing_status(input, container, old),
                [latest, rest @ ..] => observed_status(input, container, latest, rest.first().copied(), old),
            }
        }
    };
    apply_waiting(input, container, &mut status);
    set_started_and_ready(input, container, &mut status);
    status
}

fn old_status<'a>(input: &StatusInput<'a>, container: ContainerRef<'_>) -> Option<&'a ContainerStatus> {
    let list = match container.kind {
        ContainerKind::Init | ContainerKind::Sidecar => &input.last.init_container_statuses,
        ContainerKind::Main => &input.last.container_statuses,
        ContainerKind::Ephemeral => &input.last.ephemeral_container_statuses,
    };
    list.iter().flatten().find(|s| s.name == container.name())
}

fn default_waiting(input: &StatusInput<'_>) -> ApiState {
    let has_init = input.pod.init_containers().next().is_some();
    waiting(if has_init { "PodInitializing" } else { "ContainerCreating" }, None)
}

fn waiting(reason: &str, message: Option<&str>) -> ApiState {
    let state = ContainerStateWaiting {
        reason: Some(reason.to_owned()).filter(|r| !r.is_empty()),
        message: message.map(str::to_owned),
    };
    ApiState { waiting: Some(state), ..Default::default() }
}

fn default_status(
    input: &StatusInput<'_>,
    container: ContainerRef<'_>,
    old: Option<&ContainerStatus>,
) -> ContainerStatus {
    ContainerStatus {
        name: container.name().to_owned(),
        image: container.image().to_owned(),
        image_id: String::new(),
        state: Some(default_waiting(input)),
        restart_count: old.map_or(0, |o| o.restart_count),
        last_state: Some(old.and_then(|o| o.last_state.clone()).unwrap_or_default()),
        volume_mounts: volume_mounts(container),
        ..Default::default()
    }
}

/// The runtime does not know the container: never made, or lost.
fn missing_status(
    input: &StatusInput<'_>,
    container: ContainerRef<'_>,
    old: Option<&ContainerStatus>,
) -> ContainerStatus {
    if let Some(old) = old.filter(|_| restarting_all(input))
        && old.state.as_ref().is_none_or(|s| s.waiting.is_none())
    {
        return removed_to_restart(input, container, old);
    }
    if let Some(old) = old.filter(|o| o.state.as_ref().is_some_and(|s| s.terminated.is_some())) {
        return old.clone();
    }
    let mut status = default_status(input, container, old);
    let was_running = old.and_then(|o| o.state.as_ref()).is_some_and(|s| s.running.is_some());
    let has_last = status.last_state.as_ref().is_some_and(|s| s.terminated.is_some());
    if was_running && !has_last {
        status.last_state = Some(unknown_end(LOST_RUNNING));
        if input.pod.deletion_timestamp().is_none() {
            status.restart_count += 1;
        }
    }
    let created = input
        .runtime
        .is_some_and(|r| r.latest_sandbox().is_some_and(|sandbox| start_order::initialized(input.pod, r, sandbox)));
    // One that was removed to begin anew is not taken for done: it would be counted as removed once more.
    if container.kind == ContainerKind::Init && created && !restarting_all(input) {
        let ended = ContainerStateTerminated {
            reason: Some("Completed".into()),
            message: Some(INIT_LOST.into()),
            exit_code: 0,
            ..Default::default()
        };
        status.state = Some(ApiState { terminated: Some(ended), ..Default::default() });
    }
    status
}

fn restarting_all(input: &StatusInput<'_>) -> bool {
    input.runtime.is_some_and(|runtime| restart_all::asked_for(input.pod, runtime, input.last, input.gates))
}

/// Gone from the runtime because the whole pod begins anew in place (contract P-36).
fn removed_to_restart(input: &StatusInput<'_>, container: ContainerRef<'_>, old: &ContainerStatus) -> ContainerStatus {
    let ended = old.state.as_ref().is_some_and(|s| s.terminated.is_some());
    let mut status = if ended { old.clone() } else { default_status(input, container, Some(old)) };
    status.state = Some(waiting(restart_all::REASON, Some(restart_all::MESSAGE)));
    status.last_state = Some(violent_end(restart_all::REASON, restart_all::MESSAGE));
    status.restart_count = old.restart_count + 1;
    status
}

fn unknown_end(message: &str) -> ApiState {
    violent_end("ContainerStatusUnknown", message)
}

fn violent_end(reason: &str, message: &str) -> ApiState {
    let ended = ContainerStateTerminated {
        reason: Some(reason.into()),
        message: Some(message.into()),
        exit_code: 137,
        ..Default::default()
    };
    ApiState { terminated: Some(ended), ..Default::default() }
}

fn observed_status(
    input: &StatusInput<'_>,
    container: ContainerRef<'_>,
    latest: &Container,
    previous: Option<&Container>,
    old: Option<&ContainerStatus>,
) -> ContainerStatus {
    let post_start = input.post_start.get(container.name()).is_some_and(|id| *id == latest.id);
    let id = format!("{}://{}", input.runtime_name, latest.id);
    // The predecessor may be gone from the runtime: then what was published of it counts.
    let published_end = old.filter(|o| o.container_id.as_deref() != Some(&id)).and_then(|o| o.state.clone());
    let last_state = match (previous, published_end.filter(|s| s.terminated.is_some())) {
        (Some(previous), _) => api_state(input, previous, None),
        (None, Some(ended)) => ended,
        (None, None) => old.and_then(|o| o.last_state.clone()).unwrap_or_default(),
    };
    let restarts = i32::try_from(restart_count(latest)).unwrap_or(i32::MAX);
    ContainerStatus {
        name: container.name().to_owned(),
        image: latest.image.clone(),
        image_id: latest.image_ref.clone(),
        container_id: Some(id),
        restart_count: old.map_or(restarts, |o| o.restart_count.max(restarts)),
        state: Some(if post_start { default_waiting(input) } else { api_state(input, latest, old) }),
        last_state: Some(last_state),
        volume_mounts: mounted(input, container, latest, old),
        resources: Some(resources::container(input, container.spec.resources.as_ref(), latest, old)),
        allocated_resources: container.spec.resources.as_ref().and_then(|r| r.requests.clone()),
        stop_signal: stop_signal(latest).filter(|_| input.gates.stop_signals),
        user: latest.user.as_ref().map(|(uid, gid, groups)| ContainerUser {
            linux: Some(LinuxContainerUser { uid: *uid, gid: *gid, supplemental_groups: Some(groups.clone()) }),
        }),
        ..Default::default()
    }
}

/// The signal in force as the API names it, if the runtime says one: `SIGRTMIN+3` (contract P-32).
fn stop_signal(container: &Container) -> Option<String> {
    let name = container.stop_signal.as_str_name().strip_prefix("SIGNAL_")?;
    (name != "RUNTIME_DEFAULT").then(|| name.replace("RTMINPLUS", "RTMIN+").replace("RTMAXMINUS", "RTMAX-"))
}

fn api_state(input: &StatusInput<'_>, container: &Container, old: Option<&ContainerStatus>) -> ApiState {
    let running = || ContainerStateRunning { started_at: time(container.started_at) };
    match container.state {
        ContainerState::Running => ApiState { running: Some(running()), ..Default::default() },
        ContainerState::Exited if is_replaced(input, container) => {
            ApiState { running: Some(running()), ..Default::default() }
        }
        ContainerState::Created => waiting("", None),
        ContainerState::Unknown => match old.and_then(|o| o.state.as_ref()).and_then(|s| s.running.as_ref()) {
            Some(_) => unknown_end(LOST_AT_END),
            None => waiting("", None),
        },
        ContainerState::Exited => end_state(input, container, old),
    }
}

/// Of a container that has exited.
fn end_state(input: &StatusInput<'_>, container: &Container, old: Option<&ContainerStatus>) -> ApiState {
    let id = format!("{}://{}", input.runtime_name, container.id);
    let read = input.termination_messages.get(&container.id).filter(|m| !m.is_empty()).cloned();
    // The file may be gone by now; what was published of this very container stays.
    let published = || {
        let ended = old.and_then(|o| o.state.as_ref()).and_then(|s| s.terminated.as_ref())?;
        ended.message.clone().filter(|_| ended.container_id.as_deref() == Some(id.as_str()))
    };
    let runtime = || Some(container.message.clone()).filter(|m| !m.is_empty());
    let ended = ContainerStateTerminated {
        exit_code: container.exit_code,
        reason: match container.oom_killed {
            true => Some(OOM_KILLED.to_owned()),
            false => Some(container.reason.clone()).filter(|r| !r.is_empty()),
        },
        message: read.or_else(published).or_else(runtime),
        started_at: time(container.started_at.or(Some(jiff::Timestamp::UNIX_EPOCH))),
        finished_at: time(container.finished_at.or(Some(jiff::Timestamp::UNIX_EPOCH))),
        container_id: Some(id.clone()),
        signal: None,
    };
    ApiState { terminated: Some(ended), ..Default::default() }
}

/// It ended, and that is not its end: its successor is on the way. The API refuses to take an end back that the restart policy makes final.
fn is_replaced(input: &StatusInput<'_>, container: &Container) -> bool {
    container.state == ContainerState::Exited && input.replaced.contains(&container.id)
}

/// A container that will be started again shows why it is not yet (contract P-33).
fn apply_waiting(input: &StatusInput<'_>, container: ContainerRef<'_>, status: &mut ContainerStatus) {
    let Some(reason) = input.waiting.get(container.name()) else { return };
    let state = status.state.get_or_insert_default();
    let latest = input.runtime.and_then(|runtime| runtime.latest(container.name()));
    if let Some(ended) = latest.filter(|latest| is_replaced(input, latest)) {
        status.last_state = Some(end_state(input, ended, None));
        status.state = Some(waiting(&reason.reason, Some(&reason.message)));
        return;
    }
    if state.running.is_some() {
        return;
    }
    if let Some(ended) = &state.terminated {
        if !restarts_after(input.pod, container, ended.exit_code, input.gates) {
            return;
        }
        status.last_state = Some(std::mem::take(state));
    }
    status.state = Some(waiting(&reason.reason, Some(&reason.message)));
}

fn set_started_and_ready(input: &StatusInput<'_>, container: ContainerRef<'_>, status: &mut ContainerStatus) {
    // Nobody waits for an ephemeral container, and nobody probes it.
    if container.kind == ContainerKind::Ephemeral {
        return;
    }
    let state = status.state.clone().unwrap_or_default();
    let ended = input.runtime.and_then(|r| r.latest(container.name())).is_some_and(|latest| is_replaced(input, latest));
    let running = state.running.is_some() && !ended;
    let id = status.container_id.as_deref().and_then(|id| id.split_once("://")).map(|(_, id)| id);
    let verdicts = input.verdicts.get(container.name()).filter(|v| Some(v.container_id.as_str()) == id);
    let started = running && verdicts.is_none_or(|v| v.startup == Startup::Started);
    status.started = Some(started);
    status.ready = match container.kind {
        ContainerKind::Init => state.terminated.is_some_and(|t| t.exit_code == 0),
        _ => started && verdicts.is_none_or(|v| v.readiness == Readiness::Ready),
    };
}

/// What was published stays; of image volumes also which image the runtime has mounted (contract I-13).
fn mounted(
    input: &StatusInput<'_>,
    container: ContainerRef<'_>,
    latest: &Container,
    old: Option<&ContainerStatus>,
) -> Option<Vec<VolumeMountStatus>> {
    let mut list = old.and_then(|o| o.volume_mounts.clone()).or_else(|| volume_mounts(container))?;
    for status in list.iter_mut().filter(|_| input.gates.image_digests) {
        let mount = latest.mounts.iter().find(|m| m.container_path == status.mount_path);
        let image_ref = mount.and_then(|m| m.image.as_ref()).map(|image| image.image.clone());
        if let Some(image_ref) = image_ref.filter(|image_ref| !image_ref.is_empty()) {
            status.volume_status = Some(VolumeStatus { image: Some(ImageVolumeStatus { image_ref }) });
        }
    }
    Some(list)
}

fn volume_mounts(container: ContainerRef<'_>) -> Option<Vec<VolumeMountStatus>> {
    let list: Vec<VolumeMountStatus> = container
        .spec
        .volume_mounts
        .iter()
        .flatten()
        .map(|m| VolumeMountStatus {
            name: m.name.clone(),
            mount_path: m.mount_path.clone(),
            read_only: m.read_only,
            recursive_read_only: m.read_only.filter(|ro| *ro).map(|_| match m.recursive_read_only.as_deref() {
                Some("Enabled") => "Enabled".to_owned(),
                _ => "Disabled".to_owned(),
            }),
            volume_status: None,
        })
        .collect();
    Some(list).filter(|l| !l.is_empty())
}

/// Nothing runs any more: containers that may have run and left no trace have ended too (contract P-34, P-40).
pub(super) fn force_terminal(input: &StatusInput<'_>, status: &mut PodStatus) {
    if was_initialized(input.pod) {
        status.container_statuses.iter_mut().flatten().for_each(end_unless_ended);
    }
    let inits = status.init_container_statuses.iter_mut().flatten().collect::<Vec<_>>();
    // Of the init containers the first is taken to have been tried in any case.
    let last_tried = inits.iter().rposition(|s| tried(s)).unwrap_or(0);
    inits.into_iter().take(last_tried + 1).for_each(end_unless_ended);
}

fn tried(status: &ContainerStatus) -> bool {
    let waits = status.state.as_ref().is_some_and(|s| s.waiting.is_some());
    !waits || status.last_state.as_ref().is_some_and(|l| l.terminated.is_some())
}

/// By what the API holds: a main container was ever tried, or the last init container was done.
fn was_initialized(pod: &Pod) -> bool {
    let Some(last) = pod.init_containers().last() else { return true };
    let status = pod.api_status();
    if status.container_statuses.iter().flatten().any(tried) {
        return true;
    }
    let Some(held) = status.init_container_statuses.iter().flatten().find(|s| s.name == last.name()) else {
        return false;
    };
    let done = |s: &Option<ApiState>| s.as_ref().and_then(|s| s.terminated.as_ref()).is_some_and(|t| t.exit_code == 0);
    match last.kind {
        ContainerKind::Sidecar => {
            held.started == Some(true) && held.state.as_ref().is_some_and(|s| s.running.is_some())
        }
        _ => done(&held.last_state) || done(&held.state),
    }
}

fn end_unless_ended(status: &mut ContainerStatus) {
    if status.state.as_ref().is_none_or(|s| s.terminated.is_none()) {
        status.state = Some(unknown_end(LOST_AT_END));
        status.started = Some(false);
        status.ready = false;
    }
}
