//! The soak: hundreds of pods through a day of virtual time in one process, while everything goes wrong that goes wrong on real nodes.
//!
//! `workload` is what users do, `faults` what goes wrong, both drawn from a seed; `node` is the agent, with its real rooms; `apiserver`, `runtime` and
//! `disk` are what it lives on; `invariants` says what must hold at each quiet point. `guards` shows that each invariant can fail.
//!
//! A seed repeats pods, changes and faults at the same virtual moments. What is not repeated: the jitter that the agent draws itself, and the
//! order of what happens at one instant (hash maps, threads that write files).
//!
//! `cargo test` runs the short form, `make soak` the whole: `RKUBELET_SOAK=full`. `RKUBELET_SOAK_SEED` sets the seed.

mod apiserver;
mod disk;
mod faults;
mod guards;
mod invariants;
mod node;
mod runtime;
mod workload;

use std::{
    future::Future,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rkubelet::cri::fake::ImageScript;
use tokio::time::{Instant, sleep, sleep_until};

use faults::Faults;
use invariants::{Baseline, Check, Invariant, Violation, alive_tasks, resident};
use node::{Guard, Node, World};
use workload::{Dice, IMAGES, Kind, Workload, furnish};

/// How much, and for how long.
#[derive(Debug, Clone, Copy)]
struct Profile {
    pods: usize,
    lasting: Duration,
    /// Between quiet points.
    round: Duration,
    /// Between two things that users do; 0: nothing but the first pods, one of each kind.
    churn: Duration,
    /// Between two faults; 0: none.
    faults: Duration,
    /// RSS may grow so much after the first third.
    growth: u64,
}

const HOUR: Duration = Duration::from_secs(3600);

impl Profile {
    const FULL: Self = Self {
        pods: 500,
        lasting: Duration::from_secs(24 * 3600),
        round: Duration::from_secs(2 * 3600),
        churn: Duration::from_secs(12),
        faults: Duration::from_secs(40),
        growth: 32 << 20,
    };
    /// With other tests in the same process, RSS says less.
    const SHORT: Self = Self {
        pods: 60,
        lasting: Duration::from_secs(2 * 3600),
        round: Duration::from_secs(40 * 60),
        churn: Duration::from_secs(12),
        faults: Duration::from_secs(30),
        growth: 128 << 20,
    };
    /// Every kind of pod once, and nothing goes wrong: for showing what goes wrong without a guard.
    const SMALL: Self =
        Self { pods: 12, lasting: HOUR, round: HOUR, churn: Duration::ZERO, faults: Duration::ZERO, growth: 128 << 20 };
}

/// No fault for so long: the longest back-off, grace and watch are over.
const QUIET: Duration = Duration::from_secs(25 * 60);

struct Report {
    violations: Vec<Violation>,
    pods: u64,
    faults: String,
    requests: u64,
    resident: Vec<u64>,
}

impl Report {
    fn violates(&self, invariant: Invariant) -> bool {
        self.violations.iter().any(|v| v.invariant == invariant)
    }
}

struct Soak {
    profile: Profile,
    world: World,
    node: Node,
    workload: Workload,
    faults: Faults,
    dice: Dice,
    baseline: Baseline,
    violations: Vec<Violation>,
    resident: Vec<u64>,
}

/// One at a time, or none could say what memory it took.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs on a runtime of its own: paused time, and few threads for files.
fn on_paused_time<T>(work: impl Future<Output = T>) -> T {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(true).max_blocking_threads(2);
    builder.build().unwrap().block_on(work)
}

async fn soak(profile: Profile, seed: u64, removed: Guard) -> Report {
    let world = World::new(removed);
    world.runtime.image(IMAGES[0], ImageScript::Present);
    world.runtime.image(IMAGES[1], ImageScript::Present);
    world.runtime.image(IMAGES[2], ImageScript::Pullable { after: Duration::from_secs(4) });
    furnish(&world.runtime, &world.api);
    let node = Node::start(&world, removed);
    sleep(Duration::from_secs(1200)).await;
    let baseline = Baseline { tasks: alive_tasks(), watches: node.clients.open_watches() };
    let workload = Workload::new(seed, &world.runtime, &world.api);
    let mut soak = Soak {
        profile,
        world,
        node,
        workload,
        faults: Faults::default(),
        dice: Dice::new(seed ^ 0xFA01),
        baseline,
        violations: Vec::new(),
        resident: Vec::new(),
    };
    soak.run().await;
    soak.node.cancel.cancel();
    Report {
        violations: soak.violations,
        pods: soak.workload.created,
        faults: format!("{:?}", soak.faults.counts),
        requests: soak.world.api.requests(),
        resident: soak.resident,
    }
}

impl Soak {
    async fn run(&mut self) {
        self.first_pods();
        let end = Instant::now() + self.profile.lasting;
        while Instant::now() < end && self.violations.len() < 50 {
            self.round((Instant::now() + self.profile.round - QUIET).min(end)).await;
            self.quiet_point().await;
        }
        self.memory();
        self.workload.delete_all();
        self.quiet_point().await;
        // With no pod, everything is as before the first.
        let (tasks, base) = (alive_tasks(), self.baseline.tasks);
        if tasks > base {
            let what = format!("{tasks} tasks are left of all pods, {base} were there before");
            self.violations.push(Violation { invariant: Invariant::Tasks, what });
        }
    }

    fn first_pods(&mut self) {
        for kind in Kind::all() {
            self.workload.create(kind, None);
        }
        while self.workload.live.len() < self.profile.pods {
            self.workload.create_drawn();
        }
        if self.profile.faults.is_zero() {
            faults::plant_orphan(&self.world, 1);
        }
    }

    /// Users and faults, until `end`.
    async fn round(&mut self, end: Instant) {
        let every = |period: Duration, dice: &mut Dice| match period {
            Duration::ZERO => end,
            period => Instant::now() + period.mul_f64(dice.from(1, 200) as f64 / 100.0),
        };
        let mut churn = every(self.profile.churn, &mut self.workload.dice);
        let mut fault = every(self.profile.faults, &mut self.dice);
        loop {
            let next = churn.min(fault).min(end);
            let next = self.faults.next_end().map_or(next, |at| at.min(next));
            sleep_until(next).await;
            let now = Instant::now();
            if now >= end {
                return;
            }
            self.faults.end_due(&self.world);
            if now >= churn {
                self.workload.churn(self.profile.pods);
                churn = every(self.profile.churn, &mut self.workload.dice);
            }
            if now >= fault {
                self.faults.strike(&self.world, &mut self.workload, &mut self.dice);
                fault = every(self.profile.faults, &mut self.dice);
            }
            self.world.runtime.clear_calls();
        }
    }

    /// Nothing goes wrong any more and nobody asks for anything: then everything must be where it belongs.
    async fn quiet_point(&mut self) {
        self.faults.end_all(&self.world);
        let end = Instant::now() + QUIET;
        while Instant::now() < end {
            sleep(Duration::from_secs(60)).await;
            self.world.runtime.clear_calls();
        }
        self.resident.push(resident());
        let (world, node, workload, baseline) = (&self.world, &self.node, &mut self.workload, self.baseline);
        let check = Check { world, node, workload, baseline, found: Vec::new() };
        self.violations.extend(check.run());
    }

    fn memory(&mut self) {
        let at = self.resident.len() / 3;
        let (Some(early), Some(late)) = (self.resident.get(at), self.resident.last()) else { return };
        if late.saturating_sub(*early) > self.profile.growth {
            let what = format!("{} MiB became {} MiB", early >> 20, late >> 20);
            self.violations.push(Violation { invariant: Invariant::BoundedMemory, what });
        }
    }
}

/// Short by default; the whole with `RKUBELET_SOAK=full`.
#[test]
#[allow(clippy::print_stderr, clippy::disallowed_methods)]
fn everything_goes_wrong_and_every_pod_is_where_its_spec_says() {
    let full = std::env::var("RKUBELET_SOAK").is_ok_and(|form| form == "full");
    let profile = if full { Profile::FULL } else { Profile::SHORT };
    let seed = std::env::var("RKUBELET_SOAK_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let began = std::time::Instant::now();
    let report = on_paused_time(soak(profile, seed, Guard::Nothing));
    let resident: Vec<u64> = report.resident.iter().map(|bytes| bytes >> 20).collect();
    eprintln!(
        "soak with seed {seed}: {} pods in all, {} API requests, faults {}, RSS in MiB {resident:?}, took {:?}",
        report.pods,
        report.requests,
        report.faults,
        began.elapsed()
    );
    assert!(report.violations.is_empty(), "seed {seed}: {:#?}", report.violations);
}
