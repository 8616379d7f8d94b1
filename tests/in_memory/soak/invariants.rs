//! What must hold of the node at a quiet point: when nothing has gone wrong and nothing was asked for, for long enough.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use rkubelet::{cri::ContainerState, pods::PodUid, time::Clock};
use serde_json::Value;
use tokio::time::Instant;

use super::{
    apiserver::terminal,
    disk::names_in,
    node::{Node, World},
    workload::{Kind, Planned, Workload},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Invariant {
    /// Phase, readiness, running containers and their images as the spec asks.
    WhereSpecSays,
    /// A container that shall not run again does not.
    RestartPolicy,
    /// A terminal phase is never left.
    TerminalKept,
    /// A deleted pod is gone from the API.
    DeletedGone,
    OneSandbox,
    OneInstance,
    /// Nothing is begun for a pod already told to stop.
    NothingAfterStop,
    /// Tasks are those of the pods that live.
    Tasks,
    /// Sandboxes, containers, directories, logs and cgroups are those of pods that live.
    NoLeftovers,
    /// What rooms remember is of pods that live.
    BoundedTables,
    BoundedMemory,
}

#[derive(Clone)]
pub struct Violation {
    pub invariant: Invariant,
    pub what: String,
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.invariant, self.what)
    }
}

/// Tasks of a pod that runs: its worker's two, three probes of a container, the fake's own of two containers, what is under way.
const TASKS_PER_POD: usize = 8;
/// Tasks that come and go with a node that idles.
const TASKS_IDLE: usize = 3;

/// What was measured before the first pod.
#[derive(Debug, Clone, Copy)]
pub struct Baseline {
    pub tasks: usize,
    pub watches: i64,
}

pub fn alive_tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// Resident memory of this process, in bytes.
pub fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap() * 4096
}

pub struct Check<'a> {
    pub world: &'a World,
    pub node: &'a Node,
    pub workload: &'a mut Workload,
    pub baseline: Baseline,
    pub found: Vec<Violation>,
}

impl Check<'_> {
    fn fail(&mut self, invariant: Invariant, what: String) {
        self.found.push(Violation { invariant, what });
    }

    /// All invariants but memory.
    pub fn run(mut self) -> Vec<Violation> {
        let at_api: BTreeMap<String, Value> = self
            .world
            .api
            .pods()
            .into_iter()
            .map(|pod| (pod["metadata"]["uid"].as_str().unwrap().to_owned(), pod))
            .collect();
        self.noted_on_the_way();
        self.deleted(&at_api);
        let live: Vec<Planned> = self.workload.live.values().cloned().collect();
        for pod in &live {
            match at_api.get(&pod.uid) {
                Some(object) => self.pod(pod, object),
                None => self.fail(Invariant::WhereSpecSays, format!("{} ({}) is not at the API", pod.name, pod.uid)),
            }
            self.once_at_a_time(&pod.uid, &pod.name);
        }
        self.leftovers(&at_api);
        self.tables(live.len(), &at_api);
        self.found
    }

    fn noted_on_the_way(&mut self) {
        for what in self.world.api.take_left_terminal() {
            self.fail(Invariant::TerminalKept, what);
        }
        let begun = std::mem::take(&mut *self.node.runtime.begun_after_stop.lock().unwrap());
        for what in begun {
            self.fail(Invariant::NothingAfterStop, what);
        }
    }

    fn deleted(&mut self, at_api: &BTreeMap<String, Value>) {
        let names: BTreeSet<String> = self.workload.live.keys().cloned().collect();
        for (uid, name) in std::mem::take(&mut self.workload.deleted) {
            if at_api.contains_key(&uid) {
                self.fail(Invariant::DeletedGone, format!("{name} ({uid}) is still at the API"));
            }
            self.once_at_a_time(&uid, &name);
            // The scripts of a name that is in use again stay.
            let scripts = if names.contains(&name) { "" } else { name.as_str() };
            self.world.runtime.forget_pod(&uid, scripts);
        }
    }

    fn once_at_a_time(&mut self, uid: &str, name: &str) {
        let sandboxes = self.world.runtime.max_ready_sandboxes(uid);
        if sandboxes > 1 {
            self.fail(Invariant::OneSandbox, format!("{name} ({uid}) had {sandboxes} live sandboxes at once"));
        }
        for container in ["main", "side", "crash", "sick", "work", "first", "second", "prepare", "migrate"] {
            let most = self.world.runtime.max_running(uid, container);
            if most > 1 {
                self.fail(Invariant::OneInstance, format!("{name} ({uid}) had {most} live {container} at once"));
            }
        }
    }

    fn pod(&mut self, pod: &Planned, object: &Value) {
        let phase = object["status"]["phase"].as_str().unwrap_or_default();
        let reason = object["status"]["reason"].as_str().unwrap_or_default();
        let expected: &[&str] = match pod.kind {
            Kind::Job { .. } => &["Succeeded"],
            Kind::Once { .. } if pod.disturbed => &["Succeeded", "Failed"],
            Kind::Once { fails: true } | Kind::TooBig => &["Failed"],
            Kind::Once { fails: false } => &["Succeeded"],
            Kind::Hurried { .. } if self.deadline_passed(pod, object) => &["Failed"],
            Kind::Hurried { .. } => &["Running", "Failed"],
            _ => &["Running"],
        };
        let mut wrong = Vec::new();
        if !expected.contains(&phase) {
            wrong.push(format!("phase {phase} ({reason}), not {expected:?}"));
        }
        match (pod.kind, phase) {
            (Kind::Hurried { .. }, "Failed") if reason != "DeadlineExceeded" => wrong.push(format!("reason {reason}")),
            (Kind::TooBig, "Failed") if reason != "OutOfcpu" => wrong.push(format!("reason {reason}")),
            _ => {}
        }
        if !pod.kind.steady().is_empty() {
            self.steady(pod, object, &mut wrong);
        }
        if matches!(pod.kind, Kind::Crasher | Kind::Sick) && self.world.runtime.starts(&pod.uid, sole(pod)) < 3 {
            wrong.push("is not restarted".to_owned());
        }
        if !wrong.is_empty() {
            let age = pod.created.elapsed();
            let what =
                format!("{} ({}, {age:?} old): {}; status {}", pod.name, pod.uid, wrong.join(", "), object["status"]);
            self.fail(Invariant::WhereSpecSays, what);
        }
        self.restart_policy(pod);
    }

    fn steady(&mut self, pod: &Planned, object: &Value, wrong: &mut Vec<String>) {
        let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        if !conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True") {
            wrong.push("not Ready".to_owned());
        }
        let sandboxes = self.world.runtime.sandboxes(&pod.uid);
        if sandboxes.iter().filter(|(_, ready)| *ready).count() != 1 {
            wrong.push(format!("sandboxes {sandboxes:?}"));
        }
        for name in pod.kind.steady() {
            let all = self.world.runtime.containers(&pod.uid, name);
            let running: Vec<_> = all.iter().filter(|(_, state)| *state == ContainerState::Running).collect();
            let [(id, _)] = running[..] else {
                wrong.push(format!("containers of {name}: {all:?}"));
                continue;
            };
            let lists = ["containerStatuses", "initContainerStatuses"];
            let told = lists.iter().flat_map(|list| object["status"][list].as_array().into_iter().flatten());
            let full_id = format!("containerd://{id}");
            if !told.into_iter().any(|c| c["name"] == *name && c["containerID"] == full_id.as_str()) {
                wrong.push(format!("the status of {name} is not that of {id}"));
            }
            let image = self.world.runtime.container_config(id).and_then(|c| c.image).unwrap_or_default();
            if *name == "main" && image.user_specified_image != pod.image {
                wrong.push(format!("{name} runs {}, not {}", image.user_specified_image, pod.image));
            }
        }
    }

    /// By both clocks, and not just now.
    fn deadline_passed(&self, pod: &Planned, object: &Value) -> bool {
        let Kind::Hurried { seconds } = pod.kind else { return false };
        let Some(started) = object["status"]["startTime"].as_str().and_then(|t| t.parse::<jiff::Timestamp>().ok())
        else {
            return true;
        };
        let by_wall = self.world.clock.now().wall.duration_since(started).as_secs();
        let by_mono = (Instant::now() - pod.created).as_secs();
        by_wall > seconds as i64 + 60 && by_mono > seconds + 60
    }

    fn restart_policy(&mut self, pod: &Planned) {
        for container in pod.kind.runs() {
            let starts = self.world.runtime.starts(&pod.uid, container);
            let allowed = match pod.kind {
                // A run that was taken down from outside counts as one that failed.
                Kind::Job { .. } if pod.disturbed => continue,
                Kind::Job { failures } => failures + 1,
                _ => 1,
            };
            if starts > allowed {
                let what = format!("{} ({}): {container} ran {starts} times, not {allowed}", pod.name, pod.uid);
                self.fail(Invariant::RestartPolicy, what);
            }
        }
        if pod.kind == Kind::TooBig && !self.world.runtime.sandboxes(&pod.uid).is_empty() {
            self.fail(Invariant::RestartPolicy, format!("{} was rejected and has a sandbox", pod.name));
        }
    }

    fn leftovers(&mut self, at_api: &BTreeMap<String, Value>) {
        let mut stray = Vec::new();
        let mut look = |what: &str, uids: Vec<String>, allowed: &dyn Fn(&Value) -> bool| {
            for uid in uids.into_iter().filter(|uid| !at_api.get(uid).is_some_and(allowed)) {
                stray.push(format!("{what} of {uid}"));
            }
        };
        look("sandbox or container", self.world.runtime.pods().into_iter().collect(), &|_| true);
        // A pod that has ended keeps neither volumes nor cgroup.
        look("directory", names_in(&self.world.volumes.pods).into_iter().collect(), &|pod| !terminal(pod));
        let cgroups = self.world.cgroups.0.lock().unwrap().iter().map(PodUid::to_string).collect();
        look("cgroup", cgroups, &|pod| !terminal(pod));
        let logs = names_in(&self.world.pod_logs()).into_iter();
        let of_logs = logs.filter_map(|name| Some(name.rsplit_once('_')?.1.to_owned())).collect();
        look("log directory", of_logs, &|_| true);
        let links = names_in(&self.world.log_links()).len();
        let containers: usize = at_api.len() * 8;
        if links > containers {
            stray.push(format!("{links} log links for {} pods", at_api.len()));
        }
        for what in stray {
            self.fail(Invariant::NoLeftovers, what);
        }
    }

    fn tables(&mut self, live: usize, at_api: &BTreeMap<String, Value>) {
        let node = self.node;
        let tables = [
            ("workers", node.workers.len()),
            ("desired pods", node.store.list().len()),
            ("runtime store", node.runtime_store.pods()),
            ("statuses", node.publisher.pods()),
            ("probes", node.probes.pods()),
            ("allocations", node.ledger.pods()),
            ("admissions", node.admission.pods()),
        ];
        for (name, entries) in tables.into_iter().filter(|(_, entries)| *entries > live) {
            self.fail(Invariant::BoundedTables, format!("{name}: {entries} entries for {live} pods"));
        }
        let maps: BTreeSet<&str> = at_api
            .values()
            .filter_map(|pod| pod["spec"]["containers"][0]["envFrom"][0]["configMapRef"]["name"].as_str())
            .collect();
        let (watches, allowed) = (node.clients.open_watches(), self.baseline.watches + maps.len() as i64);
        if watches > allowed {
            self.fail(Invariant::BoundedTables, format!("{watches} watches, not {allowed}"));
        }
        let running = at_api.values().filter(|pod| !terminal(pod)).count();
        let allowed = self.baseline.tasks + TASKS_IDLE + TASKS_PER_POD * running + 2 * live + 4 * maps.len();
        let tasks = alive_tasks();
        if tasks > allowed {
            self.fail(Invariant::Tasks, format!("{tasks} tasks for {live} pods, not {allowed}"));
        }
    }
}

fn sole(pod: &Planned) -> &'static str {
    match pod.kind {
        Kind::Sick => "sick",
        _ => "crash",
    }
}
