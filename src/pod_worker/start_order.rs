//! Which container to start, keep or kill while the pod shall run (contract 3.3). Pure.
//!
//! Init containers one by one; sidecars as soon as their predecessors are through, the next once they have started; mains in spec
//! order, each after the one before has started or failed. A container in back-off holds nobody up but, for init containers, its successors.
//! Ephemeral containers start whenever there is a sandbox, beside all others (contract P-22).

use std::time::Duration;

use tokio::time::Instant;

use super::{
    actions::{Action, ContainerToStop, Note},
    decide::{Rules, SandboxState, Turn, is_started, sandbox_state},
    restart::{LifecycleGates, go_seconds, restarts_after, restarts_after_kill},
    restart_all,
    view::{PodView, Target, WaitingReason},
};
use crate::{
    cri::{Container, ContainerState, PodRuntime, Sandbox},
    events::EventType,
    pods::{ContainerKind, ContainerRef, Pod},
    probes::{Liveness, Startup},
    resources::resize_plan::{ContainerNeed, container_need},
    time::Now,
};

/// Upstream's words for a kill that a `resizePolicy` asks for.
const RESIZE_RESTART: &str = "resize requires restart";

/// What is to be done about one container.
enum Need<'a> {
    /// Runs, or is done for good.
    Nothing,
    Start {
        after: Option<&'a Container>,
    },
    Kill {
        container: &'a Container,
        message: String,
        grace: Option<i64>,
        then: AfterKill,
    },
}

/// What becomes of a container that is killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AfterKill {
    /// Its restart policy decides.
    ByPolicy,
    /// It is replaced whatever the policy: its definition changed.
    Replaced,
    /// The same for its `resizePolicy`, whose message says so already.
    Resized,
}

/// All main containers have ended for good, or an init container failed for good. Those that are being removed for all to begin anew
/// have not.
pub(super) fn finished(pod: &Pod, runtime: &PodRuntime, view: &PodView<'_>, rules: &Rules) -> bool {
    if restart_all::going_on(pod, runtime, &view.history.last_status, rules.gates) {
        return false;
    }
    let over = |c: ContainerRef<'_>| {
        runtime.latest(c.name()).is_some_and(|latest| {
            latest.state == ContainerState::Exited
                && !restarts_after(pod, c, latest.exit_code, rules.gates)
                && !restart_forced(view, latest)
                && !in_flight(view, c.name())
        })
    };
    if pod.main_containers().all(over) {
        return true;
    }
    let SandboxState::Usable(sandbox) = sandbox_state(pod, runtime) else {
        let none_alive = runtime.containers.iter().all(|c| c.state == ContainerState::Exited);
        return none_alive && init_failed(pod, runtime, None, rules);
    };
    !initialized(pod, runtime, sandbox) && init_failed(pod, runtime, Some(sandbox), rules)
}

fn init_failed(pod: &Pod, runtime: &PodRuntime, sandbox: Option<&Sandbox>, rules: &Rules) -> bool {
    pod.init_containers().filter(|c| c.kind == ContainerKind::Init).any(|c| {
        latest_in(runtime, c.name(), sandbox).is_some_and(|latest| {
            latest.state == ContainerState::Exited
                && latest.exit_code != 0
                && !restarts_after(pod, c, latest.exit_code, rules.gates)
        })
    })
}

/// A main container exists in this sandbox: initialisation is over, for as long as the sandbox lives.
pub fn initialized(pod: &Pod, runtime: &PodRuntime, sandbox: &Sandbox) -> bool {
    pod.main_containers().any(|c| latest_in(runtime, c.name(), Some(sandbox)).is_some())
}

fn latest_in<'a>(runtime: &'a PodRuntime, name: &str, sandbox: Option<&Sandbox>) -> Option<&'a Container> {
    runtime
        .containers
        .iter()
        .filter(|c| c.name == name && sandbox.is_none_or(|s| s.id == c.sandbox_id))
        .max_by_key(|c| (c.attempt, c.created_at))
}

fn in_flight(view: &PodView<'_>, name: &str) -> bool {
    view.in_flight.contains_key(&Target::Container(name.to_owned()))
}

fn restart_forced(view: &PodView<'_>, latest: &Container) -> bool {
    let wanted = view.history.containers.get(&latest.name).and_then(|h| h.restart_of.as_deref());
    wanted == Some(latest.id.as_str())
}

/// Kills what must be killed and starts the next container that may start.
pub(super) fn containers(
    view: &PodView<'_>,
    pod: &Pod,
    runtime: &PodRuntime,
    sandbox: &Sandbox,
    rules: &Rules,
    prepared: bool,
    turn: &mut Turn,
) {
    let initialized = initialized(pod, runtime, sandbox);
    let mut candidates: Vec<(ContainerRef<'_>, Option<&Container>)> = Vec::new();
    let mut blocked = false;
    for container in pod.init_containers() {
        if blocked {
            break;
        }
        let need = match container.kind {
            ContainerKind::Init if initialized => Need::Nothing,
            ContainerKind::Init => init_need(view, pod, runtime, sandbox, container, rules.gates),
            _ => need(view, pod, latest_in(runtime, container.name(), Some(sandbox)), container, rules),
        };
        blocked = !initialized && !init_passed(view, pod, runtime, sandbox, container);
        act(view, pod, container, need, rules, &mut candidates, turn);
    }
    if !blocked {
        for container in pod.main_containers() {
            let need = need(view, pod, runtime.latest(container.name()), container, rules);
            act(view, pod, container, need, rules, &mut candidates, turn);
        }
    }
    let ordered = |action: &Action| match action {
        Action::StartContainer { name, .. } => pod.container(name).is_none_or(|c| c.kind != ContainerKind::Ephemeral),
        _ => false,
    };
    let mut starting = view.in_flight.values().any(ordered);
    for (container, after) in candidates {
        if may_start(view, pod, container, after, rules, turn) && prepared && !starting {
            turn.actions.push(start(view, pod, runtime, container));
            starting = true;
        }
    }
    for container in pod.ephemeral_containers() {
        // Whatever became of it: it is started once.
        let begun = runtime.latest(container.name()).is_some() || in_flight(view, container.name());
        if !begun && may_start(view, pod, container, None, rules, turn) && prepared {
            turn.actions.push(start(view, pod, runtime, container));
        }
    }
    waiting_reasons(view, pod, turn);
}

fn start(view: &PodView<'_>, pod: &Pod, runtime: &PodRuntime, container: ContainerRef<'_>) -> Action {
    let name = container.name();
    let attempt = runtime.latest(name).map_or_else(|| attempt_after_loss(view, pod, name), next_attempt);
    Action::StartContainer { name: name.to_owned(), attempt }
}

/// One more than the last, but what never ran is replaced under its own number: it was no start, so the next is no restart.
fn next_attempt(latest: &Container) -> u32 {
    restart_count(latest) + u32::from(latest.state != ContainerState::Created)
}

/// The number of restarts so far, from the runtime's annotation (contract P-23, P-27).
pub fn restart_count(container: &Container) -> u32 {
    container
        .annotations
        .get("io.kubernetes.container.restartCount")
        .and_then(|v| v.parse().ok())
        .unwrap_or(container.attempt)
}

/// The attempt of a container that the runtime does not know: one more than the status says of it, for the count must never go down.
/// A status that says it was lost or removed has counted already.
fn attempt_after_loss(view: &PodView<'_>, pod: &Pod, name: &str) -> u32 {
    let of = |status: &k8s_openapi::api::core::v1::PodStatus| {
        let all = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
        all.filter(|s| s.name == name).map(|s| (s.restart_count.max(0) as u32, counts_again(s))).next()
    };
    let known = of(&view.history.last_status).into_iter().chain(of(pod.api_status()));
    known.map(|(count, again)| count + u32::from(again)).max().unwrap_or(0)
}

/// The status speaks of a container, not of its loss.
fn counts_again(status: &k8s_openapi::api::core::v1::ContainerStatus) -> bool {
    let waiting = status.state.as_ref().and_then(|s| s.waiting.as_ref());
    status.container_id.is_some() && waiting.is_none_or(|w| w.reason.as_deref() != Some(restart_all::REASON))
}

/// The next container in the list may go ahead: this init container is done, or this sidecar has started.
fn init_passed(
    view: &PodView<'_>,
    pod: &Pod,
    runtime: &PodRuntime,
    sandbox: &Sandbox,
    container: ContainerRef<'_>,
) -> bool {
    let Some(latest) = latest_in(runtime, container.name(), Some(sandbox)) else {
        return container.kind == ContainerKind::Init && later_init_exists(pod, runtime, sandbox, container.name());
    };
    match container.kind {
        ContainerKind::Init => latest.state == ContainerState::Exited && latest.exit_code == 0,
        _ => latest.state == ContainerState::Running && is_started(view, latest),
    }
}

/// An init container further on exists in this sandbox, so this one was done before its remains were pruned.
fn later_init_exists(pod: &Pod, runtime: &PodRuntime, sandbox: &Sandbox, name: &str) -> bool {
    pod.init_containers()
        .skip_while(|c| c.name() != name)
        .skip(1)
        .any(|c| latest_in(runtime, c.name(), Some(sandbox)).is_some())
}

fn init_need<'a>(
    view: &PodView<'_>,
    pod: &Pod,
    runtime: &'a PodRuntime,
    sandbox: &Sandbox,
    container: ContainerRef<'_>,
    gates: LifecycleGates,
) -> Need<'a> {
    let Some(latest) = latest_in(runtime, container.name(), Some(sandbox)) else {
        if later_init_exists(pod, runtime, sandbox, container.name()) {
            return Need::Nothing;
        }
        return Need::Start { after: None };
    };
    match latest.state {
        ContainerState::Running => Need::Nothing,
        ContainerState::Created if in_flight(view, container.name()) => Need::Nothing,
        ContainerState::Exited if !restarts_after(pod, container, latest.exit_code, gates) => Need::Nothing,
        _ => Need::Start { after: Some(latest) },
    }
}

/// For mains and sidecars.
fn need<'a>(
    view: &PodView<'_>,
    pod: &Pod,
    latest: Option<&'a Container>,
    container: ContainerRef<'_>,
    rules: &Rules,
) -> Need<'a> {
    let Some(latest) = latest else { return Need::Start { after: None } };
    match latest.state {
        ContainerState::Running => kill_need(view, pod, latest, container, rules),
        ContainerState::Created if in_flight(view, container.name()) => Need::Nothing,
        ContainerState::Exited
            if !restarts_after(pod, container, latest.exit_code, rules.gates) && !restart_forced(view, latest) =>
        {
            Need::Nothing
        }
        _ => Need::Start { after: Some(latest) },
    }
}

fn kill_need<'a>(
    view: &PodView<'_>,
    pod: &Pod,
    latest: &'a Container,
    container: ContainerRef<'_>,
    rules: &Rules,
) -> Need<'a> {
    let name = container.name();
    let noun = if container.kind == ContainerKind::Sidecar { "Init container" } else { "Container" };
    let hash = latest.annotations.get("io.kubernetes.container.hash");
    if hash.is_some_and(|h| *h != (rules.hash)(container.spec)) {
        return Need::Kill {
            container: latest,
            message: format!("{noun} {name} definition changed"),
            grace: None,
            then: AfterKill::Replaced,
        };
    }
    if container_need(pod, container, view.actuated) == ContainerNeed::Restart {
        return Need::Kill {
            container: latest,
            message: format!("Container {name} {RESIZE_RESTART}"),
            grace: None,
            then: AfterKill::Resized,
        };
    }
    let Some(verdicts) = view.verdicts.get(name).filter(|v| v.container_id == latest.id) else {
        return Need::Nothing;
    };
    if let Liveness::Dead { grace_seconds } = verdicts.liveness {
        let message = format!("{noun} {name} failed liveness probe");
        return Need::Kill { container: latest, message, grace: grace_seconds, then: AfterKill::ByPolicy };
    }
    if let Startup::Failed { grace_seconds } = verdicts.startup {
        let message = format!("{noun} {name} failed startup probe");
        return Need::Kill { container: latest, message, grace: grace_seconds, then: AfterKill::ByPolicy };
    }
    Need::Nothing
}

fn act<'a, 'p>(
    view: &PodView<'_>,
    pod: &Pod,
    container: ContainerRef<'p>,
    need: Need<'a>,
    rules: &Rules,
    candidates: &mut Vec<(ContainerRef<'p>, Option<&'a Container>)>,
    turn: &mut Turn,
) {
    if in_flight(view, container.name()) {
        return;
    }
    match need {
        Need::Nothing => {}
        Need::Start { after } => candidates.push((container, after)),
        Need::Kill { container: running, message, grace, then } => {
            let restart = then != AfterKill::ByPolicy || restarts_after_kill(pod, container, rules.gates);
            // Of sidecars upstream says only what happened.
            let told = restart && then != AfterKill::Resized && container.kind != ContainerKind::Sidecar;
            let message = if told { format!("{message}, will be restarted") } else { message };
            let grace = grace.map_or_else(|| pod.termination_grace(), |s| Duration::from_secs(s.max(0) as u64));
            let container =
                ContainerToStop { id: running.id.clone(), name: running.name.clone(), grace, hook: true, rank: 0 };
            turn.actions.push(Action::KillContainer { container, message, restart });
        }
    }
}

/// Back-off of crashes and of failed starts. Notes the event and the wake.
fn may_start(
    view: &PodView<'_>,
    pod: &Pod,
    container: ContainerRef<'_>,
    after: Option<&Container>,
    rules: &Rules,
    turn: &mut Turn,
) -> bool {
    let name = container.name();
    let Some(history) = view.history.containers.get(name) else { return true };
    let ended = after.filter(|c| c.state == ContainerState::Exited);
    if let Some(failure) = &history.start_failure
        && failure.generation == pod.generation()
        && !(failure.left_a_container() && ended.is_some())
    {
        match failure.retry_at {
            Some(at) if at <= view.now.mono => {}
            Some(at) => {
                turn.wake_by(at);
                return false;
            }
            None => return false,
        }
    }
    let Some(ended) = ended else { return true };
    let hash = (rules.hash)(container.spec);
    let finished = finished_at(ended, view.now);
    let Some((until, delay)) = history.backoff.waits_until(rules.backoff, &hash, finished, view.now.mono) else {
        return true;
    };
    turn.wake_by(until);
    let described = pod.described();
    let delay = go_seconds(delay);
    turn.waiting.insert(
        name.to_owned(),
        WaitingReason {
            reason: "CrashLoopBackOff".into(),
            message: format!("back-off {delay} restarting failed container={name} pod={described}"),
        },
    );
    turn.notes.push(Note {
        key: format!("back-off/{}", ended.id),
        container: Some(name.to_owned()),
        kind: EventType::Warning,
        reason: "BackOff",
        message: format!("Back-off restarting failed container {name} in pod {described}"),
    });
    false
}

/// The container's end on the monotonic clock, by its age on the wall clock.
pub(super) fn finished_at(container: &Container, now: Now) -> Instant {
    let age = container
        .finished_at
        .and_then(|at| Duration::try_from(now.wall.duration_since(at)).ok())
        .unwrap_or(Duration::ZERO);
    now.mono.checked_sub(age).unwrap_or(now.mono)
}

/// Waiting reasons of starts that failed; a crash-loop reason that was set in this turn stays.
pub(super) fn waiting_reasons(view: &PodView<'_>, pod: &Pod, turn: &mut Turn) {
    for container in pod.all_containers() {
        let failure = view.history.containers.get(container.name()).and_then(|h| h.start_failure.as_ref());
        if let Some(failure) = failure {
            turn.waiting.entry(container.name().to_owned()).or_insert_with(|| failure.waiting.clone());
        }
    }
}
