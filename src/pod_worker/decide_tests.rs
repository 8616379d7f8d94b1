//! Tables and a seeded walk over [`decide`](super::decide::decide) in its model [`World`](super::world::World).

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

use super::{
    actions::Action,
    view::{EndCause, KillOrder, Known, Phase, StartFailure, Target, WaitingReason},
    world::{Fate, World, pod, pod_with},
};
use crate::{
    admission::{Rejection, Standing},
    probes::{Liveness, Startup},
};

fn starts(world: &World) -> Vec<&str> {
    world.log.iter().filter_map(|l| l.strip_prefix("start ")).collect()
}

fn simple(policy: &str) -> World {
    World::new(pod(
        json!({"restartPolicy": policy, "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]}),
    ))
}

#[test]
fn p06_cgroup_and_volumes_come_before_the_sandbox_and_containers_in_order() {
    let mut world = simple("Always");
    world.turn();
    assert_eq!(world.log, ["create_cgroup", "mount_volumes"]);
    world.settle();
    assert_eq!(world.log, ["create_cgroup", "mount_volumes", "sandbox 0", "start a 0", "start b 0"]);
    assert_eq!(world.running(), ["a", "b"]);
}

#[test]
fn a_pod_whose_volume_fails_has_no_sandbox() {
    let mut world = simple("Always");
    world.turn();
    world.end(&Target::Cgroup);
    world.fail(&Target::Volumes);
    let turn = world.turn();
    assert!(turn.actions.is_empty());
    assert_eq!(turn.wake_at.unwrap() - world.now().mono, Duration::from_millis(500));
}

#[test]
fn p20_init_containers_run_one_by_one_and_mains_after_them() {
    let spec = json!({"restartPolicy": "Always",
        "initContainers": [{"name": "i1", "image": "i"}, {"name": "i2", "image": "i"}],
        "containers": [{"name": "m", "image": "i"}]});
    let mut world = World::new(pod(spec));
    world.settle();
    assert_eq!(starts(&world), ["i1 0"]);
    world.exit("i1", 0);
    world.settle();
    assert_eq!(starts(&world), ["i1 0", "i2 0"]);
    world.exit("i2", 0);
    world.settle();
    assert_eq!(world.running(), ["m"]);
}

#[test]
fn p20_a_failed_init_container_backs_off_or_ends_the_pod() {
    for (policy, phase) in [("Always", Phase::Syncing), ("OnFailure", Phase::Syncing), ("Never", Phase::Terminated)] {
        let spec = json!({"restartPolicy": policy, "initContainers": [{"name": "i", "image": "i"}], "containers": [{"name": "m", "image": "i"}]});
        let mut world = World::new(pod(spec));
        world.fates.insert("i".into(), Fate::Exits(1));
        let turn = world.settle();
        assert_eq!(turn.phase, phase, "{policy}");
        assert!(!starts(&world).contains(&"m 0"));
        if phase == Phase::Syncing {
            assert_eq!(turn.waiting["i"].reason, "CrashLoopBackOff");
        }
    }
}

#[test]
fn p21_the_next_starts_once_a_sidecar_has_started_and_sidecars_restart() {
    let spec = json!({"restartPolicy": "Never",
        "initContainers": [{"name": "s", "image": "i", "restartPolicy": "Always"}],
        "containers": [{"name": "m", "image": "i"}]});
    let mut world = World::new(pod(spec));
    while world.runtime.latest("s").is_none() {
        world.turn();
        let targets: Vec<_> = world.actions.keys().cloned().collect();
        targets.iter().for_each(|t| world.end(t));
    }
    world.verdict("s", Liveness::Alive, Startup::Pending);
    world.settle();
    assert_eq!(world.running(), ["s"]);
    world.verdict("s", Liveness::Alive, Startup::Started);
    world.settle();
    assert_eq!(world.running(), ["m", "s"]);
    world.exit("s", 0);
    world.settle();
    assert_eq!(world.running(), ["m", "s"]);
    world.exit("m", 3);
    let turn = world.settle();
    assert_eq!(turn.phase, Phase::Terminated);
    assert_eq!(turn.ending.unwrap().cause, EndCause::Finished);
}

#[test]
fn p25_crash_loop_waits_with_reason_event_and_wake() {
    let mut world = simple("Always");
    world.settle();
    world.exit("a", 1);
    world.settle();
    assert_eq!(starts(&world), ["a 0", "b 0", "a 1"], "the first crash restarts at once");
    world.pass(Duration::from_secs(1));
    world.exit("a", 1);
    let turn = world.settle();
    assert_eq!(turn.waiting["a"].reason, "CrashLoopBackOff");
    assert_eq!(turn.waiting["a"].message, "back-off 10s restarting failed container=a pod=p_ns(u1)");
    assert_eq!(turn.wake_at.unwrap() - world.now().mono, Duration::from_secs(10));
    assert_eq!(world.notes, ["BackOff: Back-off restarting failed container a in pod p_ns(u1)"]);
    world.pass(Duration::from_secs(10));
    world.settle();
    assert_eq!(starts(&world).last(), Some(&"a 2"));
}

#[test]
fn a_container_that_cannot_start_holds_up_no_neighbour() {
    let mut world = simple("Always");
    world.fates.insert("a".into(), Fate::Fails);
    let turn = world.settle();
    assert_eq!(world.running(), ["b"]);
    assert_eq!(turn.waiting["a"].reason, "CreateContainerError");
}

#[test]
fn p26_a_changed_image_replaces_the_container_whatever_the_policy() {
    for policy in ["Always", "OnFailure", "Never"] {
        let mut world = simple(policy);
        world.settle();
        world.desired = Known::Is(pod(
            json!({"restartPolicy": policy, "containers": [{"name": "a", "image": "new"}, {"name": "b", "image": "i"}]}),
        ));
        world.settle();
        assert!(world.log.contains(&"kill a: Container a definition changed, will be restarted".to_owned()));
        assert_eq!(starts(&world), ["a 0", "b 0", "a 1"], "{policy}");
        assert_eq!(world.running(), ["a", "b"]);
    }
}

#[test]
fn b07_a_dead_container_is_killed_and_restarted_by_policy() {
    for (policy, message, restarted) in [
        ("Always", "kill a: Container a failed liveness probe, will be restarted", true),
        ("Never", "kill a: Container a failed liveness probe", false),
    ] {
        let mut world = simple(policy);
        world.settle();
        world.verdict("a", Liveness::Dead { grace_seconds: Some(3) }, Startup::Started);
        let turn = world.turn();
        let [Action::KillContainer { container, .. }] = turn.actions.as_slice() else { panic!("{:?}", turn.actions) };
        assert_eq!(container.grace, Duration::from_secs(3));
        world.end(&Target::Container("a".into()));
        world.verdicts.clear();
        world.settle();
        assert!(world.log.contains(&message.to_owned()), "{:?}", world.log);
        assert_eq!(world.running().contains(&"a"), restarted, "{policy}");
    }
}

#[test]
fn p21_a_sidecar_with_a_startup_probe_has_not_started_before_the_probe_is_followed() {
    let sidecar =
        json!({"name": "s", "image": "i", "restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 1}}});
    let spec = json!({"initContainers": [sidecar], "containers": [{"name": "a", "image": "i"}]});
    let mut world = World::new(pod(spec));
    world.settle();
    assert_eq!(world.running(), ["s"]);
    world.verdict("s", Liveness::Alive, Startup::Pending);
    world.settle();
    assert_eq!(world.running(), ["s"]);
    world.verdict("s", Liveness::Alive, Startup::Started);
    world.settle();
    assert_eq!(world.running(), ["a", "s"]);
}

#[test]
fn p25_what_a_failed_hook_left_behind_waits_for_the_crash_back_off_and_no_longer() {
    let mut world = simple("Always");
    world.settle();
    let fail = |world: &mut World| {
        world.exit("a", 137);
        let waiting = WaitingReason { reason: "PostStartHookError".into(), message: "no".into() };
        let retry_at = Some(world.now().mono + Duration::from_secs(1000));
        world.history.containers.entry("a".into()).or_default().start_failure =
            Some(StartFailure { waiting, retry_at, generation: 1 });
        world.turn()
    };
    let turn = fail(&mut world);
    assert!(matches!(turn.actions.as_slice(), [Action::StartContainer { .. }]), "the first time at once: {turn:?}");
    world.settle();
    let turn = fail(&mut world);
    assert!(!turn.actions.iter().any(|action| matches!(action, Action::StartContainer { .. })));
    assert_eq!(turn.waiting["a"].reason, "CrashLoopBackOff");
    assert!(turn.notes.iter().any(|note| note.reason == "BackOff"));
    world.pass(Duration::from_secs(11));
    world.settle();
    assert!(world.running().contains(&"a"));
}

#[test]
fn p09_a_dead_sandbox_is_replaced_and_everything_runs_again() {
    let spec = json!({"restartPolicy": "Always", "initContainers": [{"name": "i", "image": "i"}], "containers": [{"name": "m", "image": "i"}]});
    let mut world = World::new(pod(spec));
    world.fates.insert("i".into(), Fate::Exits(0));
    world.settle();
    world.sandbox_dies();
    world.settle();
    assert_eq!(world.running(), ["m"]);
    assert!(world.log.contains(&"sandbox 1".to_owned()));
    assert_eq!(starts(&world), ["i 0", "m 0", "i 1", "m 1"]);
    assert_eq!(world.notes[0], "SandboxChanged: Pod sandbox changed, it will be killed and re-created.");
}

#[test]
fn p09_no_new_sandbox_when_all_containers_are_done() {
    for policy in ["Never", "OnFailure"] {
        let mut world = simple(policy);
        world.fates.insert("a".into(), Fate::Exits(0));
        world.fates.insert("b".into(), Fate::Exits(0));
        let turn = world.settle();
        assert_eq!(turn.phase, Phase::Terminated, "{policy}");
        world.crash();
        let turn = world.settle();
        assert_eq!(turn.phase, Phase::Terminated, "{policy} after a restart of the agent");
        assert!(!world.log.contains(&"sandbox 1".to_owned()));
        assert!(world.notes.iter().all(|n| !n.starts_with("SandboxChanged")));
    }
}

#[test]
fn p10_deletion_stops_tears_down_then_asks_the_api_then_cleans_the_runtime() {
    let mut world = simple("Always");
    world.settle();
    world.log.clear();
    world.desired = Known::Is(pod_with(
        json!({"containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]}),
        json!({"deletionTimestamp": "2033-05-18T03:33:20Z", "deletionGracePeriodSeconds": 5}),
    ));
    let turn = world.turn();
    let Action::StopPod { containers, deadline, .. } = &turn.actions[0] else { panic!("{:?}", turn.actions) };
    assert_eq!(containers.len(), 2);
    assert_eq!(*deadline - world.now().mono, Duration::from_secs(5));
    let turn = world.settle();
    assert_eq!(turn.phase, Phase::Gone);
    assert_eq!(world.log, ["stop_pod", "tear_down", "remove_runtime"]);
    assert!(world.api_deleted && world.runtime.is_empty());
}

#[test]
fn p06_a_shorter_grace_supersedes_a_running_stop_and_a_longer_one_does_not() {
    let mut world = simple("Always");
    world.settle();
    let deleting = |grace: u32| {
        pod_with(
            json!({"containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]}),
            json!({"deletionTimestamp": "2033-05-18T03:33:20Z", "deletionGracePeriodSeconds": grace}),
        )
    };
    world.desired = Known::Is(deleting(30));
    world.turn();
    world.pass(Duration::from_secs(2));
    assert!(world.turn().actions.is_empty());
    world.desired = Known::Is(deleting(60));
    assert!(world.turn().actions.is_empty());
    world.desired = Known::Is(deleting(0));
    let turn = world.turn();
    let Action::StopPod { containers, deadline, .. } = &turn.actions[0] else { panic!("{:?}", turn.actions) };
    assert_eq!(*deadline - world.now().mono, Duration::from_secs(1));
    assert!(containers.iter().all(|c| !c.hook), "hooks are not run twice");
}

#[test]
fn p31_sidecars_stop_after_the_mains_in_reverse_order() {
    let spec = json!({"initContainers": [
        {"name": "s1", "image": "i", "restartPolicy": "Always"}, {"name": "s2", "image": "i", "restartPolicy": "Always"}],
        "containers": [{"name": "m", "image": "i"}]});
    let mut world = World::new(pod(spec));
    world.settle();
    world.desired = Known::Absent;
    let turn = world.turn();
    let Action::StopPod { containers, .. } = &turn.actions[0] else { panic!("{:?}", turn.actions) };
    let mut ranks: Vec<_> = containers.iter().map(|c| (c.rank, c.name.as_str())).collect();
    ranks.sort_unstable();
    assert_eq!(ranks, [(0, "m"), (1, "s2"), (2, "s1")]);
}

#[test]
fn p07_absence_counts_only_when_it_is_known() {
    let mut world = simple("Always");
    world.settle();
    world.crash();
    world.desired = Known::NotYet;
    assert!(world.turn().actions.is_empty(), "nothing is touched before every source was heard");
    world.desired = Known::Absent;
    let turn = world.turn();
    let Action::StopPod { deadline, .. } = &turn.actions[0] else { panic!("{:?}", turn.actions) };
    assert_eq!(*deadline - world.now().mono, Duration::from_secs(1), "an orphan has a grace of one second");
    assert_eq!(world.settle().phase, Phase::Gone);
}

#[test]
fn p11_the_active_deadline_ends_the_pod() {
    let mut world = World::new(pod(json!({"activeDeadlineSeconds": 60, "containers": [{"name": "a", "image": "i"}]})));
    let turn = world.settle();
    assert_eq!(turn.wake_at.unwrap() - world.now().mono, Duration::from_secs(60));
    world.pass(Duration::from_secs(60));
    let turn = world.settle();
    assert_eq!(turn.phase, Phase::Terminated);
    let Some(EndCause::Ordered(KillOrder { reason, .. })) = turn.ending.map(|e| e.cause) else { panic!() };
    assert_eq!(reason, "DeadlineExceeded");
}

#[test]
fn p12_without_a_network_only_host_network_pods_get_a_sandbox() {
    for (host, expected) in [(false, 0), (true, 1)] {
        let mut world = World::new(pod(json!({"hostNetwork": host, "containers": [{"name": "a", "image": "i"}]})));
        world.node.network_not_ready = Some("no cni".into());
        world.settle();
        assert_eq!(world.runtime.sandboxes.len(), expected);
        assert_eq!(world.notes.contains(&"NetworkNotReady: network is not ready: no cni".to_owned()), !host);
        world.node.network_not_ready = None;
        world.settle();
        assert_eq!(world.running(), ["a"]);
    }
}

#[test]
fn a_container_that_was_created_and_never_started_is_replaced_and_holds_up_no_end() {
    for dies in [false, true] {
        let mut world = simple("Always");
        world.fates.insert("b".into(), Fate::Sticks);
        while world.runtime.latest("b").is_none() {
            world.turn();
            let targets: Vec<_> = world.actions.keys().cloned().collect();
            targets.iter().for_each(|t| world.end(t));
        }
        world.crash();
        world.fates.clear();
        if dies {
            world.sandbox_dies();
        } else {
            world.desired = Known::Absent;
            assert_eq!(world.settle().phase, Phase::Gone);
            continue;
        }
        world.settle();
        assert_eq!(world.running(), ["a", "b"]);
    }
}

#[test]
fn p23_a_start_that_was_cut_off_is_made_again_whatever_the_policy_and_is_no_restart() {
    for policy in ["Always", "OnFailure", "Never"] {
        let mut world = simple(policy);
        world.fates.insert("b".into(), Fate::Sticks);
        while world.runtime.latest("b").is_none() {
            world.turn();
            let targets: Vec<_> = world.actions.keys().cloned().collect();
            targets.iter().for_each(|t| world.end(t));
        }
        world.crash();
        world.fates.clear();
        assert_eq!(world.settle().phase, Phase::Syncing, "{policy}");
        assert_eq!(world.running(), ["a", "b"]);
        assert_eq!(starts(&world), ["a 0", "b 0", "b 0"], "{policy}");
    }
}

#[test]
fn a01_nothing_is_begun_before_the_pod_is_admitted() {
    let mut world = simple("Always");
    world.readable = false;
    let until = world.now().mono + Duration::from_secs(45);
    world.admission = Standing::NotYet { until: Some(until) };
    assert_eq!(world.settle().wake_at, Some(until));
    assert_eq!(world.log, ["read_runtime"]);
    world.admission = Standing::Admitted;
    world.settle();
    assert_eq!(world.running(), ["a", "b"]);
    // Adopted, and the new process has not decided yet: what runs goes on, nothing is begun.
    world.crash();
    world.log.clear();
    world.exit("b", 1);
    world.admission = Standing::NotYet { until: None };
    world.settle();
    assert!(world.log.is_empty(), "{:?}", world.log);
    assert_eq!(world.running(), ["a"]);
}

#[test]
fn a01_a_rejected_pod_starts_nothing_and_ends() {
    for runs in [false, true] {
        let mut world = simple("Always");
        if runs {
            world.settle();
            world.crash();
            world.log.clear();
        } else {
            world.readable = false;
        }
        let rejection = Rejection { reason: "OutOfcpu".into(), message: "full".into() };
        world.admission = Standing::Rejected(rejection.clone());
        let turn = world.settle();
        assert_eq!(turn.phase, Phase::Terminated);
        assert_eq!(turn.ending.unwrap().cause, EndCause::Rejected(rejection));
        assert_eq!(world.log, [if runs { "stop_pod" } else { "read_runtime" }, "tear_down"]);
        assert!(world.running().is_empty() && !turn.delete, "the pod stays in the API");
        world.desired = Known::Absent;
        assert_eq!(world.settle().phase, Phase::Gone);
    }
}

#[test]
fn a01_deletion_comes_before_admission() {
    let deleted = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 5});
    let mut world = World::new(pod_with(json!({"containers": [{"name": "a", "image": "i"}]}), deleted));
    world.admission = Standing::NotYet { until: None };
    assert_eq!(world.settle().phase, Phase::Gone, "what was never admitted is let go");
    assert!(world.running().is_empty());
}

#[test]
fn adoption_after_a_crash_touches_nothing() {
    let mut world = simple("Always");
    world.settle();
    world.crash();
    world.log.clear();
    let before = world.runtime.clone();
    world.settle();
    assert_eq!(world.log, ["create_cgroup", "mount_volumes"], "both are idempotent");
    assert_eq!(world.runtime, before);
}

/// Many lives of a pod under crashes, failures, unread runtimes and late ends; then calm: it must reach what its spec asks, and the
/// model's own checks (no second container, no kill on the unknown, no step backwards) must hold at every turn.
#[test]
fn any_interleaving_ends_where_the_spec_says() {
    for seed in 0..400u64 {
        let mut random = StdRng::seed_from_u64(seed);
        let policy = ["Always", "OnFailure", "Never"][random.random_range(0..3)];
        let spec = json!({"restartPolicy": policy,
            "initContainers": [{"name": "i", "image": "x"}, {"name": "s", "image": "x", "restartPolicy": "Always"}],
            "containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "x"}]});
        let mut world = World::new(pod(spec));
        world.fates.insert("i".into(), Fate::Exits(0));
        let deleted_at = random.random_range(0..120);
        for step in 0..90 {
            world.turn();
            let targets: Vec<Target> = world.actions.keys().cloned().collect();
            if let Some(target) = targets.get(random.random_range(0..targets.len().max(1))) {
                match random.random_range(0..10) {
                    0..6 => world.end(target),
                    6 => world.fail(target),
                    _ => {}
                }
            }
            let fate = if random.random_range(0..8) == 0 { Fate::Sticks } else { Fate::Runs };
            world.fates.insert("b".into(), fate);
            match random.random_range(0..30) {
                0 => world.crash(),
                1 => world.exit("a", random.random_range(0..2)),
                2 => world.exit("s", 1),
                3 => world.sandbox_dies(),
                4 => {
                    world.readable = false;
                    world.history.fresh_after = crate::cri::Seq(world.history.fresh_after.0 + 1);
                }
                5..9 => world.pass(Duration::from_secs(random.random_range(0..30))),
                _ => {}
            }
            if step == deleted_at {
                world.desired = Known::Absent;
            }
        }
        calm_down(&mut world, seed, policy);
    }
}

fn calm_down(world: &mut World, seed: u64, policy: &str) {
    world.readable = true;
    world.fates.remove("b");
    for _ in 0..8 {
        world.settle();
        world.pass(Duration::from_secs(400));
    }
    let phase = world.settle().phase;
    match (&world.desired, policy) {
        (Known::Absent, _) => {
            assert_eq!(phase, Phase::Gone, "seed {seed}: {:?}", world.log);
            assert!(world.runtime.is_empty(), "seed {seed}");
        }
        (_, "Always") => assert_eq!(world.running(), ["a", "b", "s"], "seed {seed}: {:?}", world.log),
        _ => {
            let done = phase >= Phase::Terminated && world.running().is_empty();
            assert!(
                done || world.running().contains(&"b") || world.running().contains(&"a"),
                "seed {seed}: {:?}",
                world.log
            );
        }
    }
}

#[test]
fn p22_ephemeral_containers_start_beside_all_others_and_once() {
    let spec = |ephemeral: serde_json::Value| {
        json!({"restartPolicy": "Always", "initContainers": [{"name": "i", "image": "i"}],
            "containers": [{"name": "m", "image": "i"}], "ephemeralContainers": ephemeral})
    };
    let mut world = World::new(pod(spec(json!([]))));
    world.settle();
    assert_eq!(world.running(), ["i"]);
    world.log.clear();
    world.desired = Known::Is(pod(spec(json!([{"name": "e1", "image": "i"}, {"name": "e2", "image": "i"}]))));
    world.fates.insert("e2".into(), Fate::Fails);
    world.turn();
    assert_eq!(starts(&world), ["e1 0", "e2 0"], "while an init container runs, both at once");
    world.settle();
    assert_eq!(world.running(), ["e1", "i"]);
    world.exit("i", 0);
    world.exit("e1", 1);
    world.settle();
    assert_eq!(world.running(), ["m"], "what ended is not run again");
    world.fates.remove("e2");
    world.pass(Duration::from_secs(11));
    world.settle();
    assert_eq!(world.running(), ["e2", "m"], "what never ran is tried again");
    world.sandbox_dies();
    world.pass(Duration::from_secs(60));
    world.fates.insert("i".into(), Fate::Exits(0));
    world.settle();
    assert_eq!(world.running(), ["m"], "nor is it run again in a new sandbox");
}

#[test]
fn p22_a_pod_ends_whatever_its_ephemeral_containers_do() {
    let mut world = World::new(pod(json!({"restartPolicy": "Never", "containers": [{"name": "m", "image": "i"}],
        "ephemeralContainers": [{"name": "e", "image": "i"}]})));
    world.settle();
    assert_eq!(world.running(), ["e", "m"]);
    world.exit("m", 0);
    assert_eq!(world.settle().phase, Phase::Terminated);
    assert!(world.running().is_empty());
}

/// The same walk as above over pods that restart in place and that are debugged.
#[test]
fn p36_any_interleaving_of_a_restart_in_place_ends_with_all_containers_running() {
    let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [7]}}]);
    let spec = json!({"restartPolicy": "Always",
        "initContainers": [{"name": "i", "image": "x"}, {"name": "s", "image": "x", "restartPolicy": "Always"}],
        "containers": [{"name": "a", "image": "x", "restartPolicy": "Never", "restartPolicyRules": rules},
            {"name": "b", "image": "x"}],
        "ephemeralContainers": [{"name": "e", "image": "x"}]});
    for seed in 0..300u64 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut world = World::new(pod(spec.clone()));
        world.fates.insert("i".into(), Fate::Exits(0));
        for _ in 0..90 {
            world.turn();
            let targets: Vec<Target> = world.actions.keys().cloned().collect();
            if let Some(target) = targets.get(random.random_range(0..targets.len().max(1))) {
                match random.random_range(0..10) {
                    0..6 => world.end(target),
                    6 => world.fail(target),
                    _ => {}
                }
            }
            match random.random_range(0..20) {
                0 => world.crash(),
                1 => world.exit("a", 7),
                2 => world.exit("s", 1),
                3 => world.exit("e", 1),
                4..8 => world.pass(Duration::from_secs(random.random_range(0..30))),
                _ => {}
            }
            let debuggers = world.runtime.containers.iter().filter(|c| c.name == "e").count();
            assert!(debuggers <= 1, "seed {seed}: {:?}", world.log);
        }
        for _ in 0..8 {
            world.settle();
            world.pass(Duration::from_secs(400));
        }
        world.settle();
        let running: Vec<_> = world.running().into_iter().filter(|name| *name != "e").collect();
        assert_eq!(running, ["a", "b", "s"], "seed {seed}: {:?}", world.log);
    }
}

#[test]
fn b09_a_probe_kills_under_its_own_grace() {
    for (liveness, startup, grace) in [
        (Liveness::Dead { grace_seconds: Some(7) }, Startup::Started, 7),
        (Liveness::Dead { grace_seconds: None }, Startup::Started, 30),
        (Liveness::Alive, Startup::Failed { grace_seconds: Some(0) }, 0),
    ] {
        let mut world = simple("Always");
        world.settle();
        world.verdict("a", liveness, startup);
        let turn = world.turn();
        let [Action::KillContainer { container, restart: true, .. }] = turn.actions.as_slice() else {
            panic!("{:?}", turn.actions)
        };
        assert_eq!((container.name.as_str(), container.grace.as_secs()), ("a", grace));
    }
}
