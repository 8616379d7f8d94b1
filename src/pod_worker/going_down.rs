//! Going down: from the first reason to end to nothing left (contract P-10, P-31). Pure.
//!
//! Terminating: starts are given up, everything is stopped, ordered, under one deadline. Terminated: the terminal status goes out while
//! volumes and cgroup are removed; only after both is the API asked to let the pod go; only when it has is the runtime cleaned.

use tokio::time::Instant;

use super::{
    actions::{Action, ContainerToStop, Note},
    decide::{Turn, read_again, stop_rank},
    view::{EndCause, Ending, Known, Phase, PodView, Target},
};
use crate::{
    cri::{ContainerState, PodRuntime},
    events::EventType,
};

pub(super) fn decide(view: &PodView<'_>, ending: Ending) -> Turn {
    let mut turn = Turn::new(view.history.phase.max(Phase::Terminating));
    note_cause(&ending, &mut turn);
    let deadline = ending.deadline;
    turn.ending = Some(ending);
    if turn.phase == Phase::Terminating {
        stop(view, deadline, &mut turn);
    }
    if turn.phase == Phase::Terminated {
        remove(view, &mut turn);
    }
    turn
}

fn note_cause(ending: &Ending, turn: &mut Turn) {
    if let EndCause::Ordered(order) = &ending.cause
        && order.reason == "DeadlineExceeded"
    {
        turn.notes.push(Note {
            key: "deadline-exceeded".into(),
            container: None,
            kind: EventType::Normal,
            reason: "DeadlineExceeded",
            message: order.message.clone(),
        });
    }
}

fn stop(view: &PodView<'_>, deadline: Instant, turn: &mut Turn) {
    let runtime = match &view.runtime {
        Known::NotYet => return read_again(view, turn),
        Known::Absent => None,
        Known::Is(runtime) => Some(runtime.as_ref()),
    };
    // Starts are given up by the shell and end soon; what they made must be seen before anything is called stopped.
    if view.in_flight.iter().any(|(target, action)| match target {
        // A reset of all containers included.
        Target::Sandbox => true,
        Target::Container(_) => matches!(action, Action::StartContainer { .. }),
        _ => false,
    }) {
        return;
    }
    let none = PodRuntime::default();
    let runtime = runtime.unwrap_or(&none);
    // A container that was created and never started stays so when it is stopped: its stopped sandbox is the end of it.
    let quiet = runtime.containers.iter().all(|c| c.state != ContainerState::Running)
        && runtime.sandboxes.iter().all(|s| !s.ready);
    let nothing = runtime.sandboxes.is_empty() && runtime.containers.iter().all(|c| c.state == ContainerState::Exited);
    if quiet && (nothing || view.history.stopped) {
        if !view.in_flight.contains_key(&Target::Stop) {
            turn.phase = Phase::Terminated;
        }
        return;
    }
    if let Some(Action::StopPod { deadline: running, .. }) = view.in_flight.get(&Target::Stop)
        && *running <= deadline
    {
        return;
    }
    turn.actions.push(stop_pod(view, runtime, deadline));
}

fn stop_pod(view: &PodView<'_>, runtime: &PodRuntime, deadline: Instant) -> Action {
    let pod = view.desired.is().or(view.history.pod.as_ref());
    let superseding = view.in_flight.contains_key(&Target::Stop);
    let containers = runtime
        .containers
        .iter()
        .filter(|c| c.state != ContainerState::Exited)
        .map(|c| ContainerToStop {
            id: c.id.clone(),
            name: c.name.clone(),
            grace: deadline.saturating_duration_since(view.now.mono),
            hook: !superseding && !view.in_flight.contains_key(&Target::Container(c.name.clone())),
            rank: stop_rank(pod, &c.name),
        })
        .collect();
    let sandboxes = runtime.sandboxes.iter().map(|s| s.id.clone()).collect();
    Action::StopPod { containers, sandboxes, deadline }
}

fn remove(view: &PodView<'_>, turn: &mut Turn) {
    let history = view.history;
    let busy = view.in_flight.contains_key(&Target::Remove)
        || view.in_flight.contains_key(&Target::Volumes)
        || view.in_flight.contains_key(&Target::Cgroup);
    let gone = view.desired.absent();
    if !history.torn_down {
        if !busy {
            turn.actions.push(Action::TearDown);
        }
        return;
    }
    let deleting = view.desired.is().is_some_and(|p| p.deletion_timestamp().is_some());
    let acknowledged = history.terminal_version.is_some_and(|v| view.acknowledged >= v);
    if deleting && acknowledged && !history.delete_requested {
        turn.delete = true;
    }
    if !gone || busy {
        return;
    }
    if history.removed {
        turn.phase = Phase::Gone;
        return;
    }
    let (containers, sandboxes) = match &view.runtime {
        Known::NotYet => return read_again(view, turn),
        Known::Absent => Default::default(),
        Known::Is(runtime) => (
            runtime.containers.iter().map(|c| c.id.clone()).collect(),
            runtime.sandboxes.iter().map(|s| s.id.clone()).collect(),
        ),
    };
    turn.actions.push(Action::RemoveRuntime { containers, sandboxes });
}
