//! Resizes as [`decide`](super::decide::decide) sees them: what is begun when, through restarts of the agent at any point (contract P-71…P-75).

use serde_json::{Value, json};

use super::{
    actions::Action,
    view::{Known, Target},
    world::{Fate, World, pod, pod_with},
};
use crate::{pods::Pod, resources::PodResources};

fn asks(cpu: &str, memory: &str) -> Value {
    let all = json!({"cpu": cpu, "memory": memory});
    json!({"requests": all, "limits": all})
}

fn two(a: &Value, b: &Value, policy: &Value) -> Value {
    json!({"containers": [{"name": "a", "image": "i", "resources": a, "resizePolicy": policy},
        {"name": "b", "image": "i", "resources": b}]})
}

fn running(spec: Value) -> World {
    let mut world = World::new(pod(spec));
    world.settle();
    world.log.clear();
    world
}

fn allocate(world: &mut World, spec: Value) {
    world.desired = Known::Is(pod_with(spec, json!({"generation": 2})));
}

fn in_force(world: &World) -> bool {
    let Known::Is(pod) = &world.desired else { return false };
    PodResources::of(pod, true).containers.keys().all(|name| {
        let keeps = crate::resources::resize_plan::container_need(pod, pod.container(name).unwrap(), &world.actuated);
        keeps == crate::resources::resize_plan::ContainerNeed::Keep
    })
}

#[test]
fn p71_running_containers_are_resized_in_one_action_and_then_never_again() {
    let mut world = running(two(&asks("1", "1Gi"), &asks("1", "1Gi"), &json!([])));
    allocate(&mut world, two(&asks("2", "1Gi"), &asks("1", "1Gi"), &json!([])));
    let turn = world.turn();
    let [Action::Resize { updates, pod: Some(size) }] = turn.actions.as_slice() else { panic!("{:?}", turn.actions) };
    assert_eq!((updates[0].from.cpu_limit, updates[0].to.cpu_limit, size.cpu_limit), (1000, 2000, Some(3000)));
    world.settle();
    assert_eq!(world.log, ["resize [a] and the pod"]);
    assert!(in_force(&world) && world.running() == ["a", "b"]);
}

#[test]
fn p71_a_swap_among_containers_leaves_the_pods_cgroup_alone() {
    let mut world = running(two(&asks("1", "1Gi"), &asks("2", "1Gi"), &json!([])));
    allocate(&mut world, two(&asks("2", "1Gi"), &asks("1", "1Gi"), &json!([])));
    world.settle();
    assert_eq!(world.log, ["resize [a b]"]);
}

#[test]
fn p71_a_restart_comes_before_the_pods_cgroup_and_the_start_after_it() {
    let policy = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
    let mut world = running(two(&asks("1", "1Gi"), &asks("1", "1Gi"), &policy));
    allocate(&mut world, two(&asks("1", "2Gi"), &asks("2", "1Gi"), &policy));
    world.settle();
    assert_eq!(world.log, ["kill a: Container a resize requires restart", "resize [b] and the pod", "start a 1"]);
    assert!(in_force(&world) && world.running() == ["a", "b"]);
}

#[test]
fn p71_a_pod_that_never_restarts_its_containers_restarts_them_for_a_resize() {
    let policy = json!([{"resourceName": "cpu", "restartPolicy": "RestartContainer"}]);
    let with = |cpu: &str| {
        let mut spec = two(&asks(cpu, "1Gi"), &asks("1", "1Gi"), &policy);
        spec["restartPolicy"] = json!("Never");
        spec
    };
    let mut world = running(with("1"));
    allocate(&mut world, with("2"));
    world.settle();
    assert_eq!(world.running(), ["a", "b"]);
}

#[test]
fn p71_a_container_that_is_down_starts_at_its_new_size_after_the_pods_cgroup() {
    let mut world = running(two(&asks("1", "1Gi"), &asks("1", "1Gi"), &json!([])));
    world.exit("a", 1);
    allocate(&mut world, two(&asks("2", "1Gi"), &asks("1", "1Gi"), &json!([])));
    world.settle();
    assert_eq!(world.log, ["resize [] and the pod", "start a 1"]);
}

#[test]
fn p71_a_resize_that_fails_holds_up_no_start() {
    let mut world = running(two(&asks("1", "1Gi"), &asks("1", "1Gi"), &json!([])));
    world.exit("a", 1);
    allocate(&mut world, two(&asks("2", "1Gi"), &asks("1", "1Gi"), &json!([])));
    let turn = world.turn();
    assert!(matches!(turn.actions.as_slice(), [Action::Resize { .. }]), "{:?}", turn.actions);
    world.fail(&Target::Resize);
    let turn = world.turn();
    assert!(matches!(turn.actions.as_slice(), [Action::StartContainer { .. }]), "{:?}", turn.actions);
    assert!(turn.wake_at.is_some(), "the resize is tried again");
}

#[test]
fn p75_pod_level_resources_alone_change_the_pods_cgroup_and_what_shares_its_limit() {
    let spec = |cpu: &str| {
        json!({"resources": {"limits": {"cpu": cpu}, "requests": {"cpu": cpu}},
        "containers": [{"name": "a", "image": "i", "resources": asks("1", "1Gi")}, {"name": "b", "image": "i"}]})
    };
    let mut world = running(spec("2"));
    allocate(&mut world, spec("3"));
    world.settle();
    assert_eq!(world.log, ["resize [b] and the pod"]);
}

#[test]
fn p74_sidecars_are_resized_run_once_init_containers_are_not() {
    let spec = |cpu: &str| {
        json!({"initContainers": [
            {"name": "i", "image": "i", "resources": asks(cpu, "1Gi")},
            {"name": "s", "image": "i", "restartPolicy": "Always", "resources": asks(cpu, "1Gi")}],
        "containers": [{"name": "m", "image": "i", "resources": asks("1", "1Gi")}]})
    };
    let mut world = World::new(pod(spec("1")));
    world.fates.insert("i".into(), Fate::Exits(0));
    world.settle();
    world.log.clear();
    allocate(&mut world, spec("2"));
    world.settle();
    assert_eq!(world.log, ["resize [s] and the pod"]);
}

/// The agent dies before, during or after each step of a resize, its action done or not: the next one finishes it, nobody is restarted
/// twice, and nothing is done that is done already.
#[test]
fn p73_a_crash_anywhere_in_a_resize_ends_in_the_same_place() {
    let policy = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
    let old = two(&asks("1", "1Gi"), &asks("1", "1Gi"), &policy);
    let new = two(&asks("2", "2Gi"), &asks("2", "2Gi"), &policy);
    for turns in 0..8 {
        for done in [false, true] {
            let mut world = running(old.clone());
            allocate(&mut world, new.clone());
            for _ in 0..turns {
                world.turn();
                let targets: Vec<Target> = world.actions.keys().cloned().collect();
                targets.iter().for_each(|target| world.end(target));
            }
            world.turn();
            if done {
                let targets: Vec<Target> = world.actions.keys().cloned().collect();
                targets.iter().for_each(|target| world.end(target));
            }
            world.crash();
            world.settle();
            assert!(in_force(&world), "after {turns} turns, {done}: {:?}", world.log);
            assert_eq!(world.running(), ["a", "b"], "after {turns} turns, {done}: {:?}", world.log);
            let made = world.runtime.containers.iter().filter(|c| c.name == "a").count();
            assert_eq!(made, 2, "restarted once, after {turns} turns, {done}: {:?}", world.log);
            let quiet: Pod = world.desired.is().unwrap().clone();
            world.log.clear();
            world.crash();
            world.desired = Known::Is(quiet);
            world.settle();
            assert!(!world.log.iter().any(|line| line.starts_with("resize")), "{:?}", world.log);
        }
    }
}
