//! Restarting a whole pod in place (contract P-24, P-36): a container ended with an exit code whose rule says `RestartAllContainers`.
//!
//! All init and main containers are removed from the runtime, their logs kept; then the pod begins anew in its sandbox, with its volumes.
//! What asked for it is removed last, so that an interrupted reset is taken up again. Pure; the status tells of it with the same words.

use k8s_openapi::api::core::v1 as corev1;

use super::{
    actions::{Action, ContainerToReset},
    decide::Turn,
    restart::{LifecycleGates, matching_action},
    view::{PodView, Target},
};
use crate::{
    cri::{Container, ContainerState, PodRuntime},
    pods::Pod,
};

/// `status.conditions[].type` while it goes on.
pub const CONDITION: &str = "AllContainersRestarting";
/// Waiting and Terminated reason of the containers that were removed.
pub const REASON: &str = "RestartingAllContainers";
pub const MESSAGE: &str = "The container is removed because RestartAllContainers in place";

/// Some container of the pod has a rule that may restart all of them: only then the condition is written at all.
pub fn possible(pod: &Pod, gates: LifecycleGates) -> bool {
    let mut rules = pod.containers().flat_map(|c| c.spec.restart_policy_rules.iter().flatten());
    gates.restart_all && rules.any(|rule| rule.action == "RestartAllContainers")
}

/// It was begun and the status says so, or a container's newest end asks for it. Not yet whether anything is left to be done.
pub fn asked_for(pod: &Pod, runtime: &PodRuntime, last: &corev1::PodStatus, gates: LifecycleGates) -> bool {
    if !possible(pod, gates) {
        return false;
    }
    let begun = last.conditions.iter().flatten().any(|c| c.type_ == CONDITION && c.status == "True");
    begun || pod.containers().any(|c| runtime.latest(c.name()).is_some_and(|latest| is_source(pod, latest)))
}

/// Asked for, and something is left to be removed.
pub fn going_on(pod: &Pod, runtime: &PodRuntime, last: &corev1::PodStatus, gates: LifecycleGates) -> bool {
    asked_for(pod, runtime, last, gates) && !cleaned_up(pod, runtime)
}

/// No init or main container is left in the runtime: the reset is over.
pub fn cleaned_up(pod: &Pod, runtime: &PodRuntime) -> bool {
    pod.containers().all(|c| runtime.latest(c.name()).is_none())
}

fn is_source(pod: &Pod, container: &Container) -> bool {
    container.state == ContainerState::Exited
        && pod
            .container(&container.name)
            .is_some_and(|c| matching_action(c.spec, container.exit_code) == Some("RestartAllContainers"))
}

/// Removes everything, once no start or kill is under way any more.
pub(super) fn reset(view: &PodView<'_>, pod: &Pod, runtime: &PodRuntime, turn: &mut Turn) {
    turn.abandon_starts = true;
    if view.in_flight.keys().any(|t| matches!(t, Target::Container(_) | Target::Sandbox | Target::Prune)) {
        return;
    }
    turn.actions.push(Action::ResetContainers { containers: in_order(pod, runtime) });
}

/// Those that had to give way before those that asked for it; of each, mains before init containers.
fn in_order(pod: &Pod, runtime: &PodRuntime) -> Vec<ContainerToReset> {
    let of = |init: bool, sources: bool| {
        let names = pod.containers().filter(move |c| pod.init_containers().any(|i| i.name() == c.name()) == init);
        names.flat_map(move |c| {
            let all = runtime.containers.iter().filter(move |r| r.name == c.name());
            all.filter(move |r| is_source(pod, r) == sources)
        })
    };
    let ordered = of(false, false).chain(of(true, false)).chain(of(false, true)).chain(of(true, true));
    ordered
        .map(|c| ContainerToReset { id: c.id.clone(), name: c.name.clone(), alive: c.state != ContainerState::Exited })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{
        super::{
            view::Phase,
            world::{Fate, World, pod},
        },
        *,
    };

    fn rules(codes: &[i32]) -> Value {
        json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": codes}}])
    }

    fn spec() -> Value {
        json!({"restartPolicy": "Never",
            "initContainers": [{"name": "i", "image": "i"}, {"name": "s", "image": "s", "restartPolicy": "Always"}],
            "containers": [{"name": "a", "image": "a"},
                {"name": "b", "image": "b", "restartPolicy": "Never", "restartPolicyRules": rules(&[42])}]})
    }

    fn started() -> World {
        let mut world = World::new(pod(spec()));
        world.fates.insert("i".into(), Fate::Exits(0));
        world.settle();
        assert_eq!(world.running(), ["a", "b", "s"]);
        world
    }

    #[test]
    fn p36_all_containers_are_removed_and_the_pod_begins_anew_in_its_sandbox() {
        let mut world = started();
        world.exit("b", 42);
        world.log.clear();
        let turn = world.turn();
        assert!(turn.abandon_starts && turn.phase == Phase::Syncing);
        let [Action::ResetContainers { containers }] = turn.actions.as_slice() else { panic!("{:?}", turn.actions) };
        let order: Vec<_> = containers.iter().map(|c| (c.name.as_str(), c.alive)).collect();
        assert_eq!(order, [("a", true), ("i", false), ("s", true), ("b", false)], "what asked for it goes last");
        world.settle();
        assert_eq!(world.running(), ["a", "b", "s"]);
        assert_eq!(world.log, ["reset_containers", "start i 0", "start s 0", "start a 0", "start b 0"]);
        assert_eq!(world.runtime.sandboxes.len(), 1, "the sandbox stays");
    }

    #[test]
    fn p36_a_pod_whose_mains_were_killed_for_it_has_not_finished() {
        let mut world = World::new(pod(json!({"restartPolicy": "Never",
            "initContainers": [{"name": "s", "image": "s", "restartPolicy": "Always", "restartPolicyRules": rules(&[42])}],
            "containers": [{"name": "a", "image": "a"}]})));
        world.settle();
        world.exit("s", 42);
        world.turn();
        world.exit("a", 137);
        assert_eq!(world.turn().phase, Phase::Syncing);
        world.settle();
        assert_eq!(world.running(), ["a", "s"]);
    }

    #[test]
    fn p36_another_exit_code_is_an_ordinary_end() {
        let mut world = started();
        world.exit("b", 1);
        world.log.clear();
        world.settle();
        assert!(world.log.is_empty(), "{:?}", world.log);
    }

    #[test]
    fn p36_a_crash_of_the_agent_in_the_middle_is_taken_up_again() {
        let mut world = started();
        world.exit("b", 42);
        world.turn();
        world.runtime.containers.retain(|c| c.name == "b" || c.name == "s");
        world.crash();
        world.log.clear();
        world.settle();
        assert!(world.log.contains(&"reset_containers".to_owned()), "{:?}", world.log);
        assert_eq!(world.running(), ["a", "b", "s"]);
    }

    #[test]
    fn p36_the_condition_alone_goes_on_with_it_until_nothing_is_left() {
        let (pod, gates) = (pod(spec()), LifecycleGates::default());
        let begun = serde_json::from_value(json!({"conditions": [{"type": CONDITION, "status": "True"}]})).unwrap();
        let none = PodRuntime::default();
        assert!(asked_for(&pod, &none, &begun, gates) && cleaned_up(&pod, &none));
        assert!(!asked_for(&pod, &none, &corev1::PodStatus::default(), gates));
        let off = LifecycleGates { restart_all: false, ..gates };
        assert!(!asked_for(&pod, &none, &begun, off) && !possible(&pod, off));
    }

    #[test]
    fn p36_a_start_that_is_under_way_is_given_up_first() {
        let mut world = World::new(pod(json!({"restartPolicy": "Always", "containers": [
            {"name": "a", "image": "a", "restartPolicy": "Always", "restartPolicyRules": rules(&[7])},
            {"name": "b", "image": "b"}]})));
        while !world.actions.contains_key(&Target::Container("b".into())) {
            world.turn();
            let targets: Vec<_> =
                world.actions.keys().filter(|t| **t != Target::Container("b".into())).cloned().collect();
            targets.iter().for_each(|t| world.end(t));
        }
        world.exit("a", 7);
        let turn = world.turn();
        assert!(turn.abandon_starts && turn.actions.is_empty(), "{:?}", turn.actions);
        world.end(&Target::Container("b".into()));
        let turn = world.turn();
        assert!(matches!(turn.actions.as_slice(), [Action::ResetContainers { containers }] if containers.len() == 2));
    }
}
