//! What goes wrong in the soak, and when: a schedule drawn from the seed.
//!
//! Every fault is something that happens to real nodes. Those that last end by themselves; [`Faults::end_all`] ends them at once, for a quiet point.

use std::{collections::BTreeMap, time::Duration};

use rkubelet::{
    cri::{
        RuntimeService,
        fake::{Events, Fault},
        v1,
    },
    pods::PodUid,
};
use tokio::time::Instant;
use tonic::Code;

use super::{
    node::World,
    workload::{Dice, Workload},
};

const RPCS: [&str; 15] = [
    "RunPodSandbox",
    "StopPodSandbox",
    "RemovePodSandbox",
    "PodSandboxStatus",
    "ListPodSandbox",
    "CreateContainer",
    "StartContainer",
    "StopContainer",
    "RemoveContainer",
    "ContainerStatus",
    "ListContainers",
    "ExecSync",
    "ImageStatus",
    "PullImage",
    "GetContainerEvents",
];
const CODES: [Code; 5] =
    [Code::Unknown, Code::Unavailable, Code::Internal, Code::ResourceExhausted, Code::DeadlineExceeded];
/// The wall clock stays within so many seconds of where it would be by itself.
const WALL: u64 = 2 * 3600;

/// What ends a fault that lasts.
#[derive(Debug, Clone, Copy)]
enum End {
    Events,
    RuntimeUp,
    Release(&'static str),
    Api,
}

#[derive(Default)]
pub struct Faults {
    ends: BTreeMap<(Instant, u64), End>,
    pub counts: BTreeMap<&'static str, usize>,
    number: u64,
    planted: u64,
}

impl Faults {
    pub fn next_end(&self) -> Option<Instant> {
        self.ends.keys().next().map(|(at, _)| *at)
    }

    pub fn end_due(&mut self, world: &World) {
        let now = Instant::now();
        while let Some(entry) = self.ends.first_entry().filter(|entry| entry.key().0 <= now) {
            entry.remove().carry_out(world);
        }
    }

    pub fn end_all(&mut self, world: &World) {
        for (_, end) in std::mem::take(&mut self.ends) {
            end.carry_out(world);
        }
        world.runtime.disarm();
        world.api.heal();
    }

    fn until(&mut self, after: Duration, end: End) {
        self.number += 1;
        self.ends.insert((Instant::now() + after, self.number), end);
    }

    /// Something goes wrong now.
    pub fn strike(&mut self, world: &World, workload: &mut Workload, dice: &mut Dice) {
        let what = match dice.from(0, 100) {
            0..22 => self.calls_fail(world, dice),
            22..34 => self.a_call_hangs(world, dice),
            34..44 => self.events_suffer(world, dice),
            44..48 => {
                world.runtime.set_down(true);
                self.until(Duration::from_secs(20), End::RuntimeUp);
                "runtime restart"
            }
            48..54 => {
                world.clock.jump_to(dice.from(0, 2 * WALL) as i64 - WALL as i64);
                "clock jump"
            }
            54..76 => self.api_suffers(world, dice),
            76..92 => take_down(world, workload, dice),
            _ => {
                self.planted += 1;
                plant_orphan(world, self.planted);
                "orphan"
            }
        };
        *self.counts.entry(what).or_default() += 1;
    }

    fn calls_fail(&mut self, world: &World, dice: &mut Dice) -> &'static str {
        let (rpc, times) = (dice.one_of(&RPCS), dice.from(1, 6) as usize);
        if dice.from(0, 4) == 0 {
            world.runtime.inject(rpc, times, Fault::DoneButLost);
            return "answers lost";
        }
        let code = dice.one_of(&CODES);
        world.runtime.inject(rpc, times, Fault::Error { code, message: "the soak says no".to_owned() });
        "calls fail"
    }

    fn a_call_hangs(&mut self, world: &World, dice: &mut Dice) -> &'static str {
        let (rpc, after) = (dice.one_of(&RPCS), dice.seconds(60, 240));
        match dice.from(0, 3) {
            0 => {
                world.runtime.inject(rpc, 1, Fault::Hang);
                self.until(after, End::Release(rpc));
            }
            done => world.runtime.inject(rpc, 1, Fault::Deadline { after, done: done == 1 }),
        }
        "call hangs"
    }

    fn events_suffer(&mut self, world: &World, dice: &mut Dice) -> &'static str {
        let (kind, lasting) = (dice.from(0, 10), dice.seconds(30, 600));
        let (events, what) = match kind {
            0..3 => (Events::Lost, "events lost"),
            3..6 => (Events::Duplicated, "events twice"),
            6..9 => (Events::Delayed(dice.seconds(1, 30)), "events late"),
            _ => (Events::Unimplemented, "no event stream"),
        };
        if kind == 9 || dice.from(0, 3) == 0 {
            world.runtime.break_stream();
        }
        world.runtime.events(events);
        self.until(lasting, End::Events);
        what
    }

    fn api_suffers(&mut self, world: &World, dice: &mut Dice) -> &'static str {
        let pods = "PATCH /api/v1/namespaces/ns/pods";
        let times = dice.from(1, 40) as u32;
        match dice.from(0, 6) {
            0 => {
                world.api.cut_off(true);
                self.until(dice.seconds(60, 600), End::Api);
                "API outage"
            }
            1 => {
                world.api.compact();
                "410"
            }
            2 => {
                world.api.break_watches();
                "watch broken"
            }
            3 => {
                world.api.refuse(pods, times, 409, "Conflict");
                "conflict"
            }
            4 => {
                let (code, reason) =
                    dice.one_of(&[(500, "InternalError"), (429, "TooManyRequests"), (503, "ServiceUnavailable")]);
                world.api.refuse(dice.one_of(&[pods, "DELETE", "GET", "POST"]), times, code, reason);
                "API refuses"
            }
            _ => {
                world.api.latency(dice.seconds(1, 8));
                self.until(dice.seconds(30, 300), End::Api);
                "API slow"
            }
        }
    }
}

impl End {
    fn carry_out(self, world: &World) {
        match self {
            Self::Events => world.runtime.events(Events::Delivered),
            Self::RuntimeUp => world.runtime.set_down(false),
            Self::Release(rpc) => world.runtime.release(rpc),
            Self::Api => world.api.heal(),
        }
    }
}

/// A container ends, is killed for memory, or loses its sandbox, by nobody's order.
fn take_down(world: &World, workload: &mut Workload, dice: &mut Dice) -> &'static str {
    let Some(pod) = workload.disturb() else { return "nothing to take down" };
    let names = ["main", "side", "crash", "work", "first", "second"];
    let running = |name: &&str| {
        let all = world.runtime.containers(&pod.uid, name);
        all.into_iter().rfind(|(_, state)| *state == rkubelet::cri::ContainerState::Running)
    };
    let container = names.iter().find_map(running);
    match (dice.from(0, 4), container) {
        (0, Some((id, _))) => {
            world.runtime.exit(&id, 1);
            "container exits"
        }
        (1, Some((id, _))) => {
            world.runtime.oom_kill(&id);
            "OOM kill"
        }
        (2 | 3, _) => {
            if let Some((id, _)) = world.runtime.sandboxes(&pod.uid).last() {
                world.runtime.kill_sandbox(id);
            }
            "sandbox dies"
        }
        _ => "nothing to take down",
    }
}

/// What an earlier agent may have left of a pod that nobody knows: directories and a cgroup, and every other time a sandbox. Of one without a
/// sandbox the runtime tells nobody.
pub fn plant_orphan(world: &World, number: u64) {
    let uid = format!("orphan-{number}");
    std::fs::create_dir_all(world.volumes.pods.join(&uid).join("volumes")).unwrap();
    std::fs::create_dir_all(world.pod_logs().join(format!("ns_orphan_{uid}/main"))).unwrap();
    world.cgroups.0.lock().unwrap().insert(PodUid::from(uid.as_str()));
    let metadata =
        v1::PodSandboxMetadata { name: "orphan".into(), uid: uid.clone(), namespace: "ns".into(), attempt: 0 };
    let labels = [
        ("io.kubernetes.pod.uid", uid.as_str()),
        ("io.kubernetes.pod.name", "orphan"),
        ("io.kubernetes.pod.namespace", "ns"),
    ];
    let config = v1::PodSandboxConfig {
        metadata: Some(metadata),
        labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        ..Default::default()
    };
    if number % 2 == 1 {
        return;
    }
    let runtime = world.runtime.clone();
    // It may meet a fault that was meant for the agent; then there is only the rest.
    tokio::spawn(async move { runtime.run_pod_sandbox(config, "").await.ok() });
}
