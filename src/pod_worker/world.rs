//! A model of one pod's world for tests of [`decide`](super::decide::decide): a runtime, a disk and an apiserver without async, stepped
//! through interleavings of ends, faults, crashes of the agent and late looks. Only compiled for tests.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as corev1;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    actions::{Action, ContainerToStop},
    backoff::BackoffLimits,
    decide::{Rules, Turn, decide},
    restart::LifecycleGates,
    start_order::finished_at,
    view::{History, KillOrder, Known, Phase, PodView, Retry, StartFailure, Target, Volumes, WaitingReason},
};
use crate::{
    admission::Standing,
    cri::{Container, ContainerState, PodRuntime, Sandbox, Seq, fixtures::seen},
    node::NodeFacts,
    pods::{Pod, PodSource, PodUid},
    probes::{ContainerVerdicts, Liveness, Readiness, Startup},
    resources::{PodResources, PodSize, resize_plan::ContainerUpdate},
    time::Now,
};

pub(super) fn hash(container: &corev1::Container) -> String {
    container.image.clone().unwrap_or_default()
}

const GATES: LifecycleGates =
    LifecycleGates { restart_rules: true, restart_all: true, stop_signals: false, image_digests: false };

pub(super) const RULES: Rules = Rules {
    backoff: BackoffLimits { initial: Duration::from_secs(10), cap: Duration::from_secs(300) },
    hash,
    gates: GATES,
};

pub(super) fn pod(spec: Value) -> Pod {
    pod_with(spec, json!({}))
}

pub(super) fn pod_with(spec: Value, metadata: Value) -> Pod {
    let mut object = json!({"metadata": {"uid": "u1", "name": "p", "namespace": "ns", "generation": 1}, "spec": spec});
    for (key, value) in metadata.as_object().into_iter().flatten() {
        object["metadata"][key] = value.clone();
    }
    Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, Timestamp::UNIX_EPOCH).unwrap()
}

/// How a start is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Runs,
    Exits(i32),
    /// Fails before the container exists.
    Fails,
    /// Is created and never started, as when the agent dies in between.
    Sticks,
}

pub(super) struct World {
    pub start: Instant,
    pub elapsed: Duration,
    pub desired: Known<Pod>,
    pub order: Option<KillOrder>,
    pub admission: Standing,
    pub runtime: PodRuntime,
    pub readable: bool,
    pub history: History,
    /// In force: survives a crash of the agent.
    pub actuated: PodResources,
    pub actions: BTreeMap<Target, Action>,
    pub verdicts: HashMap<String, ContainerVerdicts>,
    pub node: NodeFacts,
    pub fates: HashMap<String, Fate>,
    pub api_deleted: bool,
    pub log: Vec<String>,
    pub notes: Vec<String>,
    ids: u32,
}

impl World {
    pub fn new(pod: Pod) -> Self {
        Self {
            actuated: PodResources::of(&pod, true),
            start: Instant::now() + Duration::from_secs(1_000_000),
            elapsed: Duration::ZERO,
            desired: Known::Is(pod),
            order: None,
            admission: Standing::Admitted,
            runtime: PodRuntime::default(),
            readable: true,
            history: History::new(),
            actions: BTreeMap::new(),
            verdicts: HashMap::new(),
            node: NodeFacts::default(),
            fates: HashMap::new(),
            api_deleted: false,
            log: Vec::new(),
            notes: Vec::new(),
            ids: 0,
        }
    }

    pub fn now(&self) -> Now {
        let wall = Timestamp::from_second(2_000_000_000).unwrap().checked_add(self.elapsed).unwrap();
        Now { mono: self.start + self.elapsed, wall }
    }

    /// One decision on the world as it is. Does not change it.
    pub fn look(&self) -> Turn {
        let runtime = match (self.readable, self.runtime.is_empty()) {
            (false, _) => Known::NotYet,
            (true, true) => Known::Absent,
            (true, false) => Known::Is(Arc::new(self.runtime.clone())),
        };
        let uid = PodUid::from("u1");
        let view = PodView {
            now: self.now(),
            uid: &uid,
            desired: self.desired.clone(),
            actuated: &self.actuated,
            pod_level_resize: true,
            runtime,
            listed: true,
            node: &self.node,
            verdicts: &self.verdicts,
            order: self.order.as_ref(),
            admission: &self.admission,
            in_flight: &self.actions,
            history: &self.history,
            acknowledged: u64::MAX,
        };
        decide(&view, &RULES)
    }

    /// Looks, and takes what was decided on: actions are begun, not ended.
    pub fn turn(&mut self) -> Turn {
        let first = self.history.pod.is_none();
        if let Known::Is(pod) = &self.desired {
            self.history.pod = Some(pod.clone());
            if first {
                self.history.started = Some(self.now().wall);
            }
        }
        let turn = self.look();
        assert_eq!(turn, self.look(), "the same view, the same answer");
        assert!(turn.phase >= self.history.phase, "no step backwards");
        self.check(&turn);
        self.history.phase = turn.phase;
        self.history.ending = turn.ending.clone();
        if turn.phase >= Phase::Terminated {
            self.history.terminal_version = Some(1);
        }
        if turn.delete {
            self.history.delete_requested = true;
            self.api_deleted = true;
        }
        for note in &turn.notes {
            if self.history.noted.insert(note.key.clone()) {
                self.notes.push(format!("{}: {}", note.reason, note.message));
            }
        }
        for action in &turn.actions {
            let target = action.target();
            if self.actions.contains_key(&target) && !matches!(action, Action::StopPod { .. }) {
                continue;
            }
            self.log.push(describe(action));
            if let Action::StartContainer { name, .. } = action {
                self.charge(name);
            }
            self.actions.insert(target, action.clone());
        }
        turn
    }

    fn charge(&mut self, name: &str) {
        let now = self.now();
        let Some(ended) = self.runtime.latest(name).filter(|c| c.state == ContainerState::Exited) else { return };
        let finished = finished_at(ended, now);
        let hash = self.history.pod.as_ref().and_then(|p| p.container(name).map(|c| hash(c.spec))).unwrap();
        let history = self.history.containers.entry(name.to_owned()).or_default();
        history.backoff.advance(RULES.backoff, &hash, finished, now.mono);
    }

    /// What must never be asked for.
    fn check(&self, turn: &Turn) {
        for action in &turn.actions {
            let destroys = matches!(
                action,
                Action::StopPod { .. }
                    | Action::StopSandbox { .. }
                    | Action::KillContainer { .. }
                    | Action::ResetContainers { .. }
                    | Action::Prune { .. }
                    | Action::RemoveRuntime { .. }
            );
            assert!(self.readable || !destroys, "destruction on an unread runtime: {action:?}");
            assert!(
                !matches!(self.desired, Known::NotYet) || !destroys,
                "destruction before the sources are known: {action:?}"
            );
            let begins = matches!(
                action,
                Action::CreateCgroup
                    | Action::MountVolumes
                    | Action::RefreshVolumes
                    | Action::CreateSandbox { .. }
                    | Action::StartContainer { .. }
            );
            assert!(!begins || self.admission == Standing::Admitted, "begun before it is admitted: {action:?}");
            if let Action::StartContainer { name, .. } = action {
                let alive =
                    self.runtime.containers.iter().any(|c| c.name == *name && c.state == ContainerState::Running);
                assert!(!alive, "a second {name}");
                assert_eq!(turn.phase, Phase::Syncing);
            }
        }
    }

    fn id(&mut self, prefix: &str) -> String {
        self.ids += 1;
        format!("{prefix}{}", self.ids)
    }

    /// Ends the action of one target well, as its fate says.
    pub fn end(&mut self, target: &Target) {
        let Some(action) = self.actions.remove(target) else { return };
        self.history.retries.remove(target);
        self.history.fresh_after = Seq(self.history.fresh_after.0 + 1);
        match action {
            Action::ReadRuntime => self.readable = true,
            Action::CreateCgroup => self.history.cgroup_ready = true,
            Action::MountVolumes | Action::RefreshVolumes => self.history.volumes = Volumes::Mounted,
            Action::CreateSandbox { attempt } => self.make_sandbox(attempt),
            Action::ResetContainers { containers } => {
                self.runtime.containers.retain(|c| containers.iter().all(|reset| reset.id != c.id));
            }
            Action::StopSandbox { ids, containers } => {
                self.stop(&containers, &ids);
                self.history.stopped_sandboxes.extend(ids);
            }
            Action::StopPod { containers, sandboxes, .. } => {
                self.stop(&containers, &sandboxes);
                self.history.stopped_sandboxes.extend(sandboxes);
                self.history.stopped = true;
            }
            Action::KillContainer { container, restart, .. } => {
                self.stop(std::slice::from_ref(&container), &[]);
                if restart {
                    self.history.containers.entry(container.name).or_default().restart_of = Some(container.id);
                }
            }
            Action::StartContainer { name, attempt } => self.make_container(&name, attempt),
            Action::Prune { containers, sandboxes } => {
                self.runtime.containers.retain(|c| !containers.contains(&c.id));
                self.runtime.sandboxes.retain(|s| !sandboxes.contains(&s.id));
            }
            Action::Resize { updates, pod } => self.resize(&updates, pod),
            Action::TearDown => self.history.torn_down = true,
            Action::RemoveRuntime { .. } => {
                self.runtime = PodRuntime::default();
                self.history.removed = true;
            }
        }
    }

    fn resize(&mut self, updates: &[ContainerUpdate], pod: Option<PodSize>) {
        for update in updates {
            let alive = self.runtime.containers.iter().any(|c| c.id == update.id && c.state == ContainerState::Running);
            assert!(alive, "an update of {} that does not run", update.name);
            self.actuated.containers.insert(update.name.clone(), update.to.requirements(None));
        }
        if let (Some(size), Some(pod)) = (pod, &self.history.pod) {
            self.history.cgroup_size = Some(size);
            self.actuated.pod_level = pod.spec().resources.clone();
        }
    }

    /// Ends the action of one target badly, nothing done.
    pub fn fail(&mut self, target: &Target) {
        let Some(action) = self.actions.remove(target) else { return };
        let now = self.now().mono;
        if let Action::StartContainer { name, .. } = action {
            self.start_failed(&name);
            return;
        }
        let retry = Retry::after(self.history.retries.get(target), target, now);
        self.history.retries.insert(target.clone(), retry);
    }

    fn start_failed(&mut self, name: &str) {
        let retry_at = Some(self.now().mono + Duration::from_secs(10));
        let waiting = WaitingReason { reason: "CreateContainerError".into(), message: "no".into() };
        self.history.containers.entry(name.into()).or_default().start_failure =
            Some(StartFailure { waiting, retry_at, generation: 1 });
    }

    fn make_sandbox(&mut self, attempt: u32) {
        assert!(!self.runtime.sandboxes.iter().any(|s| s.attempt == attempt), "sandbox attempt {attempt} twice");
        let id = self.id("s");
        let host_network = self.history.pod.as_ref().is_some_and(Pod::host_network);
        self.runtime.sandboxes.push(Sandbox {
            id,
            attempt,
            created_at: self.now().wall,
            ready: true,
            ips: vec!["10.0.0.1".parse().unwrap()],
            host_network,
            runtime_handler: String::new(),
            name: "p".into(),
            namespace: "ns".into(),
            labels: HashMap::new(),
            annotations: HashMap::new(),
        });
    }

    fn make_container(&mut self, name: &str, attempt: u32) {
        let fate = self.fates.get(name).copied().unwrap_or(Fate::Runs);
        if fate == Fate::Fails {
            return self.start_failed(name);
        }
        self.runtime.containers.retain(|c| c.name != name || c.state != ContainerState::Created);
        let twice = self.runtime.containers.iter().any(|c| c.name == name && c.attempt == attempt);
        assert!(!twice, "container {name} attempt {attempt} twice");
        let id = self.id("c");
        let sandbox_id = self.runtime.latest_sandbox().unwrap().id.clone();
        let image = self.history.pod.as_ref().and_then(|p| p.container(name).map(|c| hash(c.spec))).unwrap();
        let annotations = HashMap::from([
            ("io.kubernetes.container.hash".to_owned(), image.clone()),
            ("io.kubernetes.container.restartCount".to_owned(), attempt.to_string()),
        ]);
        let allocated = self.history.pod.as_ref().and_then(|p| p.container(name).map(|c| c.spec.resources.clone()));
        self.actuated.containers.insert(name.to_owned(), allocated.flatten().unwrap_or_default());
        let now = self.now().wall;
        let (created_at, started_at) = (now, Some(now));
        let container = Container { id, attempt, sandbox_id, image, annotations, created_at, started_at, ..seen(name) };
        self.runtime.containers.push(container);
        let history = self.history.containers.entry(name.to_owned()).or_default();
        history.start_failure = None;
        history.restart_of = None;
        match fate {
            Fate::Exits(code) => self.exit(name, code),
            Fate::Sticks => {
                if let Some(container) = self.runtime.containers.last_mut() {
                    container.state = ContainerState::Created;
                }
            }
            Fate::Runs | Fate::Fails => {}
        }
    }

    /// The newest container of that name ends.
    pub fn exit(&mut self, name: &str, code: i32) {
        let now = self.now().wall;
        let latest = self.runtime.containers.iter_mut().filter(|c| c.name == name).max_by_key(|c| c.attempt);
        if let Some(container) = latest {
            container.state = ContainerState::Exited;
            container.exit_code = code;
            container.finished_at = Some(now);
        }
        self.verdicts.remove(name);
    }

    fn stop(&mut self, containers: &[ContainerToStop], sandboxes: &[String]) {
        let now = self.now().wall;
        for container in &mut self.runtime.containers {
            let in_sandbox = sandboxes.contains(&container.sandbox_id);
            let named = containers.iter().any(|c| c.id == container.id);
            // As in containerd: what never started does not end.
            if (named || in_sandbox) && container.state == ContainerState::Running {
                container.state = ContainerState::Exited;
                container.exit_code = 137;
                container.finished_at = Some(now);
            }
        }
        for sandbox in self.runtime.sandboxes.iter_mut().filter(|s| sandboxes.contains(&s.id)) {
            sandbox.ready = false;
        }
    }

    pub fn sandbox_dies(&mut self) {
        let ids: Vec<String> = self.runtime.sandboxes.iter().map(|s| s.id.clone()).collect();
        self.stop(&[], &ids);
    }

    pub fn verdict(&mut self, name: &str, liveness: Liveness, startup: Startup) {
        if let Some(latest) = self.runtime.latest(name) {
            let verdicts =
                ContainerVerdicts { container_id: latest.id.clone(), liveness, readiness: Readiness::Ready, startup };
            self.verdicts.insert(name.to_owned(), verdicts);
        }
    }

    /// The agent process dies and starts again: the world stays, its memory and what it waited for do not.
    pub fn crash(&mut self) {
        self.history = History::new();
        self.actions.clear();
        self.verdicts.clear();
    }

    pub fn pass(&mut self, time: Duration) {
        self.elapsed += time;
    }

    /// Lets everything go well until nothing is begun any more; time passes only to the next wake.
    pub fn settle(&mut self) -> Turn {
        for _ in 0..200 {
            let turn = self.turn();
            if self.api_deleted && !self.desired.absent() {
                self.desired = Known::Absent;
                continue;
            }
            let targets: Vec<Target> = self.actions.keys().cloned().collect();
            if targets.is_empty() && turn.actions.is_empty() {
                let again = self.turn();
                if again.phase == turn.phase {
                    return again;
                }
            }
            for target in targets {
                self.end(&target);
            }
        }
        panic!("does not settle: {:?}", self.log);
    }

    pub fn running(&self) -> Vec<&str> {
        let mut list: Vec<&str> = self
            .runtime
            .containers
            .iter()
            .filter(|c| c.state == ContainerState::Running)
            .map(|c| c.name.as_str())
            .collect();
        list.sort_unstable();
        list
    }
}

fn describe(action: &Action) -> String {
    match action {
        Action::StartContainer { name, attempt } => format!("start {name} {attempt}"),
        Action::CreateSandbox { attempt } => format!("sandbox {attempt}"),
        Action::KillContainer { container, message, .. } => format!("kill {}: {message}", container.name),
        Action::Resize { updates, pod } => {
            let names: Vec<&str> = updates.iter().map(|u| u.name.as_str()).collect();
            format!("resize [{}]{}", names.join(" "), if pod.is_some() { " and the pod" } else { "" })
        }
        other => other.name().to_owned(),
    }
}
