//! When a running pod's resources are to be changed, and whether that is still going on (contract P-71, P-72). Pure.
//!
//! A container whose `resizePolicy` wants a restart is killed by [`start_order`](super::start_order); the pod's cgroup is changed once it is
//! dead and before it starts again.

use super::{
    actions::Action,
    decide::Turn,
    view::{PodView, Target},
};
use crate::{
    cri::{Container, ContainerState, PodRuntime},
    pods::{ContainerRef, Pod},
    resources::{
        PodSize,
        resize_plan::{ContainerNeed, ContainerUpdate, container_need, pod_differs},
    },
};

fn running<'a>(runtime: &'a PodRuntime, container: ContainerRef<'_>) -> Option<&'a Container> {
    runtime.latest(container.name()).filter(|latest| latest.state == ContainerState::Running)
}

fn pod_due(view: &PodView<'_>, pod: &Pod) -> bool {
    let set = view.history.cgroup_size.as_ref();
    view.history.cgroup_ready && pod_differs(pod, view.actuated, set, view.pod_level_resize)
}

/// Asks for a resize when one is due. True when containers may start: the pod's cgroup is as large as it shall be, or cannot be made so.
pub(super) fn decide(view: &PodView<'_>, pod: &Pod, runtime: &PodRuntime, turn: &mut Turn) -> bool {
    let (mut updates, mut restarting) = (Vec::new(), false);
    for container in pod.containers() {
        let Some(latest) = running(runtime, container) else { continue };
        match container_need(pod, container, view.actuated) {
            ContainerNeed::Keep => {}
            ContainerNeed::Restart => restarting = true,
            ContainerNeed::Update { from, to } => {
                if !view.in_flight.contains_key(&Target::Container(container.name().to_owned())) {
                    let (name, id) = (container.name().to_owned(), latest.id.clone());
                    updates.push(ContainerUpdate { name, id, from, to });
                }
            }
        }
    }
    let due = pod_due(view, pod);
    let wanted = due || !updates.is_empty();
    if wanted && !restarting && view.history.cgroup_ready && !view.in_flight.contains_key(&Target::Resize) {
        turn.actions.push(Action::Resize { updates, pod: due.then(|| PodSize::of(pod)) });
    }
    !due || view.history.retries.contains_key(&Target::Resize)
}

/// What the pod is allocated is not in force everywhere yet.
pub(super) fn going_on(view: &PodView<'_>, pod: &Pod, runtime: &PodRuntime) -> bool {
    // A dead container is as large as it shall be when it starts; one that was killed for it has still to.
    let counts = |c: ContainerRef<'_>| {
        let killed = view.history.containers.get(c.name()).is_some_and(|history| history.restart_of.is_some());
        killed || running(runtime, c).is_some()
    };
    let differs = |c: ContainerRef<'_>| container_need(pod, c, view.actuated) != ContainerNeed::Keep;
    view.in_flight.contains_key(&Target::Resize)
        || pod.containers().any(|c| counts(c) && differs(c))
        || pod_due(view, pod)
}
