//! The pod's phase from its container statuses (contract P-40). Pure.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, PodStatus};

use super::generate::StatusInput;
use crate::{
    pod_worker::{restart::restarts_after, restart_all, start_order},
    pods::{ContainerKind, ContainerRef},
};

pub fn is_terminal(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}

/// The status says no more than that the pod is being started: no container has begun, none failed to.
pub(super) fn only_starting(status: &PodStatus) -> bool {
    let containers = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let on_the_way = |s: &ContainerStatus| {
        let waiting = s.state.as_ref().and_then(|s| s.waiting.as_ref()).and_then(|w| w.reason.as_deref());
        matches!(waiting, Some("ContainerCreating" | "PodInitializing"))
            && s.last_state.as_ref().is_none_or(never_ended)
    };
    status.phase.as_deref() == Some("Pending") && containers.into_iter().all(on_the_way)
}

fn never_ended(last: &ContainerState) -> bool {
    last.terminated.is_none()
}

#[derive(Default)]
struct Count {
    pending_init: u32,
    pending_sidecars: u32,
    failed_init_for_good: bool,
    unknown: u32,
    running: u32,
    waiting: u32,
    stopped: u32,
    stopped_for_good: u32,
    succeeded: u32,
}

/// `terminated`: nothing runs any more and nothing will be restarted, whatever the policy says.
pub(super) fn phase(input: &StatusInput<'_>, status: &PodStatus, terminated: bool) -> &'static str {
    let mut count = Count::default();
    let find = |c: ContainerRef<'_>| {
        let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
        all.into_iter().find(|s| s.name == c.name())
    };
    for container in input.pod.containers() {
        match container.kind {
            ContainerKind::Init => count.init(input, container, find(container)),
            ContainerKind::Sidecar => count.sidecar(find(container)),
            _ => count.main(input, container, find(container)),
        }
    }
    count.phase(initialized(input), terminated && !input.pod.is_static())
}

fn initialized(input: &StatusInput<'_>) -> bool {
    let Some(runtime) = input.runtime else { return false };
    runtime.latest_sandbox().is_some_and(|sandbox| start_order::initialized(input.pod, runtime, sandbox))
}

fn exit_code(status: &ContainerStatus) -> Option<i32> {
    let state = status.state.as_ref().and_then(|s| s.terminated.as_ref());
    let last = status.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    state.or(last).map(|t| t.exit_code)
}

/// By its rules and policies, or because the whole pod is being restarted.
fn restarts(input: &StatusInput<'_>, container: ContainerRef<'_>, status: &ContainerStatus, code: i32) -> bool {
    let states = [status.state.as_ref(), status.last_state.as_ref()];
    let reason = states.into_iter().flatten().find_map(|s| s.terminated.as_ref()).and_then(|t| t.reason.as_deref());
    reason == Some(restart_all::REASON) || restarts_after(input.pod, container, code, input.gates)
}

fn running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|s| s.running.is_some())
}

fn ended(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|s| s.terminated.is_some())
}

impl Count {
    fn init(&mut self, input: &StatusInput<'_>, container: ContainerRef<'_>, status: Option<&ContainerStatus>) {
        let code = status.filter(|s| !running(s)).and_then(exit_code);
        match (status, code) {
            (Some(_), Some(0)) if status.is_some_and(ended) => {}
            (Some(status), Some(code)) if code != 0 => {
                self.failed_init_for_good |= !restarts(input, container, status, code);
            }
            (Some(_), Some(_)) => {}
            _ => self.pending_init += 1,
        }
    }

    fn sidecar(&mut self, status: Option<&ContainerStatus>) {
        match status {
            None => self.unknown += 1,
            Some(s) if running(s) => {
                self.pending_sidecars += u32::from(s.started != Some(true));
                self.running += 1;
            }
            Some(s) if exit_code(s).is_some() => {}
            Some(_) => {
                self.pending_sidecars += 1;
                self.waiting += 1;
            }
        }
    }

    fn main(&mut self, input: &StatusInput<'_>, container: ContainerRef<'_>, status: Option<&ContainerStatus>) {
        let Some(status) = status else {
            self.unknown += 1;
            return;
        };
        if running(status) {
            self.running += 1;
            return;
        }
        let Some(code) = exit_code(status) else {
            self.waiting += 1;
            return;
        };
        self.stopped += 1;
        self.stopped_for_good += u32::from(!restarts(input, container, status, code));
        self.succeeded += u32::from(ended(status) && code == 0);
    }

    fn phase(&self, initialized: bool, terminal: bool) -> &'static str {
        if self.failed_init_for_good {
            return "Failed";
        }
        if self.pending_init > 0 || (self.pending_sidecars > 0 && !initialized) || self.waiting > 0 {
            return "Pending";
        }
        if self.unknown > 0 {
            return "Pending";
        }
        if self.running > 0 {
            return "Running";
        }
        if self.stopped == 0 {
            return "Pending";
        }
        let done = if self.stopped == self.succeeded { "Succeeded" } else { "Failed" };
        if terminal || self.stopped == self.stopped_for_good { done } else { "Running" }
    }
}
