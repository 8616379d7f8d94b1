//! The pod's conditions (contract P-41). Pure.

use k8s_openapi::api::core::v1::{ContainerStatus, PodCondition, PodStatus};

use super::{generate::StatusInput, resources};
use crate::{
    pod_worker::{
        decide::{SandboxState, sandbox_state},
        restart_all,
        view::{EndCause, Phase},
    },
    pods::{ContainerKind, ContainerRef},
};

/// The types that this agent writes; all others belong to somebody else and pass through.
pub const OWNED: [&str; 8] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
    "PodResizePending",
    "PodResizeInProgress",
    restart_all::CONDITION,
];

const DISRUPTION_TARGET: &str = "DisruptionTarget";

struct Verdict {
    ok: bool,
    reason: &'static str,
    message: String,
}

impl Verdict {
    const fn yes() -> Self {
        Self { ok: true, reason: "", message: String::new() }
    }
    fn no(reason: &'static str, message: impl Into<String>) -> Self {
        Self { ok: false, reason, message: message.into() }
    }
}

/// Others' conditions as they are, then ours in upstream's order.
pub(super) fn generate(input: &StatusInput<'_>, status: &PodStatus) -> Vec<PodCondition> {
    let foreign = input.pod.api_status().conditions.iter().flatten();
    let mut list: Vec<PodCondition> = foreign.filter(|c| !OWNED.contains(&c.type_.as_str())).cloned().collect();
    let phase = status.phase.as_deref().unwrap_or("Pending");
    let containers_ready = containers_ready(input, status, phase);
    let ready = if containers_ready.ok { readiness_gates(input, &list) } else { None };
    list.extend(resources::conditions(input));
    let ready = ready.unwrap_or_else(|| Verdict {
        ok: containers_ready.ok,
        reason: containers_ready.reason,
        message: containers_ready.message.clone(),
    });
    for (kind, verdict) in [
        ("PodReadyToStartContainers", ready_to_start(input)),
        ("Initialized", initialized(input, status, phase)),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
        ("PodScheduled", Verdict::yes()),
    ] {
        list.push(condition(input, kind, verdict));
    }
    if let Some(message) = disruption(input) {
        list.retain(|c| c.type_ != DISRUPTION_TARGET);
        let verdict = Verdict { ok: true, reason: "TerminationByKubelet", message: message.to_owned() };
        list.push(condition(input, DISRUPTION_TARGET, verdict));
    }
    if restart_all::possible(input.pod, input.gates) {
        // Upstream gives this one no generation.
        let verdict = restarting_all(input, phase);
        let restarting = condition(input, restart_all::CONDITION, verdict);
        list.push(PodCondition { observed_generation: None, ..restarting });
    }
    list
}

/// What is said of an end that is not the pod's fault. It goes out with the terminal phase (contract A-11).
fn disruption<'a>(input: &StatusInput<'a>) -> Option<&'a str> {
    match input.end {
        Some(EndCause::Ordered(order)) if input.phase >= Phase::Terminated => order.disruption.as_deref(),
        _ => None,
    }
}

/// True from the end of the container that asked for it until all containers are removed (contract P-36).
fn restarting_all(input: &StatusInput<'_>, phase: &str) -> Verdict {
    let started = || Verdict {
        ok: true,
        reason: "RestartAllContainersStarted",
        message: "container exited with restart policy rule".into(),
    };
    match (phase, input.runtime) {
        ("Succeeded", _) => Verdict::no("PodCompleted", ""),
        ("Failed", _) => Verdict::no("PodFailed", ""),
        (_, None) => match was_true(input, restart_all::CONDITION) {
            true => started(),
            false => Verdict::no("", ""),
        },
        (_, Some(runtime)) => {
            let going_on = restart_all::going_on(input.pod, runtime, input.last, input.gates);
            if going_on { started() } else { Verdict::no("", "") }
        }
    }
}

fn was_true(input: &StatusInput<'_>, kind: &str) -> bool {
    input.last.conditions.iter().flatten().any(|c| c.type_ == kind && c.status == "True")
}

fn condition(input: &StatusInput<'_>, kind: &str, verdict: Verdict) -> PodCondition {
    let status = if verdict.ok { "True" } else { "False" };
    let of = |s: &PodStatus| s.conditions.iter().flatten().find(|c| c.type_ == kind).cloned();
    let last = of(input.last).or_else(|| of(input.pod.api_status()));
    let kept = last.filter(|c| c.status == status).and_then(|c| c.last_transition_time);
    PodCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(verdict.reason.to_owned()).filter(|r| !r.is_empty()),
        message: Some(verdict.message).filter(|m| !m.is_empty()),
        last_transition_time: kept.or_else(|| Some(input.now.api_time())),
        last_probe_time: None,
        observed_generation: Some(input.pod.generation()).filter(|g| *g > 0),
    }
}

fn ready_to_start(input: &StatusInput<'_>) -> Verdict {
    let Some(runtime) = input.runtime else {
        return if was_true(input, "PodReadyToStartContainers") { Verdict::yes() } else { not_ready("") };
    };
    match sandbox_state(input.pod, runtime) {
        SandboxState::Usable(_) => Verdict::yes(),
        SandboxState::Needed { why, .. } => not_ready(why),
    }
}

fn not_ready(why: &str) -> Verdict {
    Verdict::no("PodSandboxNotReady", why)
}

fn find<'a>(status: &'a PodStatus, container: ContainerRef<'_>) -> Option<&'a ContainerStatus> {
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    all.into_iter().find(|s| s.name == container.name())
}

/// Go prints a list of names as `[a b]`.
fn names(list: &[&str]) -> String {
    format!("[{}]", list.join(" "))
}

fn messages(unknown: &[&str], other: &[&str], what: &str) -> String {
    let mut parts = Vec::new();
    if !unknown.is_empty() {
        parts.push(format!("containers with unknown status: {}", names(unknown)));
    }
    if !other.is_empty() {
        parts.push(format!("containers with {what} status: {}", names(other)));
    }
    parts.join(", ")
}

fn containers_ready(input: &StatusInput<'_>, status: &PodStatus, phase: &str) -> Verdict {
    let (mut unknown, mut unready) = (Vec::new(), Vec::new());
    for container in input.pod.containers().filter(|c| c.kind != ContainerKind::Init) {
        match find(status, container) {
            None => unknown.push(container.name()),
            Some(s) if !s.ready => unready.push(container.name()),
            Some(_) => {}
        }
    }
    match phase {
        "Succeeded" if unknown.is_empty() => Verdict::no("PodCompleted", ""),
        "Failed" => Verdict::no("PodFailed", ""),
        _ => match messages(&unknown, &unready, "unready") {
            message if message.is_empty() => Verdict::yes(),
            message => Verdict::no("ContainersNotReady", message),
        },
    }
}

fn readiness_gates(input: &StatusInput<'_>, foreign: &[PodCondition]) -> Option<Verdict> {
    let mut parts = Vec::new();
    for gate in input.pod.spec().readiness_gates.iter().flatten() {
        let kind = &gate.condition_type;
        match foreign.iter().find(|c| c.type_ == *kind) {
            None => parts.push(format!("corresponding condition of pod readiness gate \"{kind}\" does not exist.")),
            Some(c) if c.status != "True" => {
                parts.push(format!("the status of pod readiness gate \"{kind}\" is not \"True\", but {}", c.status))
            }
            Some(_) => {}
        }
    }
    (!parts.is_empty()).then(|| Verdict::no("ReadinessGatesNotReady", parts.join(", ")))
}

fn initialized(input: &StatusInput<'_>, status: &PodStatus, phase: &str) -> Verdict {
    let (mut unknown, mut incomplete) = (Vec::new(), Vec::new());
    for container in input.pod.init_containers() {
        match find(status, container) {
            None => unknown.push(container.name()),
            Some(s) => {
                let done = match container.kind {
                    ContainerKind::Sidecar => s.started == Some(true),
                    _ => s.ready,
                };
                if !done {
                    incomplete.push(container.name());
                }
            }
        }
    }
    if phase == "Succeeded" && unknown.is_empty() {
        return Verdict { ok: true, reason: "PodCompleted", message: String::new() };
    }
    let main_started = input
        .pod
        .main_containers()
        .filter_map(|c| find(status, c))
        .any(|s| s.state.as_ref().is_some_and(|state| state.running.is_some() || state.terminated.is_some()));
    // Once initialised, always initialised: init containers that run again in place do not take it back.
    if main_started || (input.gates.restart_all && was_true(input, "Initialized")) {
        return Verdict::yes();
    }
    match messages(&unknown, &incomplete, "incomplete") {
        message if message.is_empty() => Verdict::yes(),
        message => Verdict::no("ContainersNotInitialized", message),
    }
}
