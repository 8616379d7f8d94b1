//! One worker: the loop around [`decide`](super::decide::decide), and the shell that reads its view and carries out its turn.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::{
    actions::{Action, Ended, Outcome, Progress},
    decide::{Turn, decide},
    execute::{self, ActionContext},
    registry::{PodWorkers, Slot, WorkerParts},
    resize, start_order,
    view::{ContainerHistory, EndCause, History, Known, Phase, PodView, Retry, StartFailure, Target, Volumes},
};
use crate::{
    admission::Standing,
    cri::{ContainerState, PodRuntime},
    events::Regarding,
    pod_status::{self, StatusInput},
    pods::{Pod, PodUid},
    probes::ProbeTarget,
    time::Now,
    volumes::MountedVolumes,
    wake::Cause,
};

/// A worker that panics this often is left alone until the agent restarts.
const PANICS_BEFORE_QUARANTINE: u32 = 3;

/// Runs the worker of one pod until nothing is left of the pod. A panic stays in this pod: the worker starts over from what it can look
/// up; after the third the pod is quarantined, with an event.
pub(super) async fn run(parts: Arc<WorkerParts>, workers: Arc<PodWorkers>, uid: PodUid, slot: Arc<Slot>) {
    for panics in 1..=PANICS_BEFORE_QUARANTINE {
        let worker = Worker::new(Arc::clone(&parts), Arc::clone(&workers), uid.clone(), Arc::clone(&slot));
        match tokio::spawn(worker.live()).await {
            Ok(()) => return,
            Err(error) => tracing::error!(pod.uid = %uid, panics, %error, "Pod worker panicked"),
        }
        slot.notify.notify_one();
    }
    if let Some(pod) = parts.store.get(&uid) {
        let message = "pod worker panicked repeatedly; the pod is left as it is".to_owned();
        parts.events.event(Regarding::Pod(pod), crate::events::EventType::Warning, "FailedSync", message);
    }
}

struct InFlight {
    cancel: CancellationToken,
}

struct Worker {
    parts: Arc<WorkerParts>,
    workers: Arc<PodWorkers>,
    uid: PodUid,
    slot: Arc<Slot>,
    history: History,
    actions: BTreeMap<Target, Action>,
    running: BTreeMap<Target, InFlight>,
    /// What a read of this worker returned last: proof of absence when the store has no entry.
    read_as_of: crate::cri::Seq,
    mounted: Arc<MountedVolumes>,
    /// The desired pod as its source has it, without what it is allocated.
    asked: Option<Pod>,
    first_seen: Instant,
    ready_reported: bool,
}

impl Worker {
    fn new(parts: Arc<WorkerParts>, workers: Arc<PodWorkers>, uid: PodUid, slot: Arc<Slot>) -> Self {
        let first_seen = parts.clock.now().mono;
        Self {
            parts,
            workers,
            uid,
            slot,
            history: History::new(),
            actions: BTreeMap::new(),
            running: BTreeMap::new(),
            read_as_of: crate::cri::Seq::default(),
            mounted: Arc::default(),
            asked: None,
            first_seen,
            ready_reported: false,
        }
    }

    async fn live(mut self) {
        let mut wake_at: Option<Instant> = None;
        let mut first = true;
        loop {
            let causes = tokio::select! {
                biased;
                () = self.parts.cancel.cancelled() => return,
                causes = self.causes(wake_at, first) => causes,
            };
            let operation = if std::mem::take(&mut first) { "create" } else { "sync" };
            for cause in &causes {
                self.parts.metrics.wake(*cause);
            }
            self.take_reports();
            if causes.contains(&Cause::Object) {
                self.history.refresh = true;
                self.history.retries.remove(&Target::Volumes);
                if self.history.pod.as_ref().is_some_and(|p| p.spec().runtime_class_name.is_some()) {
                    self.history.retries.remove(&Target::Sandbox);
                }
                self.forget_object_failures();
            }
            // A step from one phase to the next is decided again at once: nothing else may wake this pod for it.
            let (began, mut settled) = (self.parts.clock.now().mono, false);
            while !settled {
                (wake_at, settled) = self.turn().await;
            }
            self.parts.metrics.turn(operation, self.parts.clock.now().mono - began);
            if self.history.phase == Phase::Gone && self.workers.retire(&self.uid, &self.slot) {
                self.parts.probes.forget(&self.uid);
                self.parts.admission.forget(&self.uid);
                self.parts.publisher.forget(&self.uid);
                self.parts.objects.forget(&self.uid);
                self.parts.images.forget(&self.uid);
                self.parts.runtime_store.forget(&self.uid);
                self.parts.ledger.forget(&self.uid);
                return;
            }
        }
    }

    /// Sleeps until somebody wakes this pod or its own timer is due. Causes are taken before the view is read.
    async fn causes(&self, wake_at: Option<Instant>, first: bool) -> Vec<Cause> {
        let timer = async {
            match wake_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.slot.notify.notified() => {}
            () = timer => return [self.slot.take_causes(), vec![Cause::Timer]].concat(),
            // A worker that starts over after a panic has lost the causes that it had taken.
            () = std::future::ready(()), if first => {}
        }
        self.slot.take_causes()
    }

    /// A missing configMap or secret may have appeared.
    fn forget_object_failures(&mut self) {
        for failure in self.history.containers.values_mut().filter_map(|c| c.start_failure.as_mut()) {
            if failure.waiting.reason == "CreateContainerConfigError" {
                failure.retry_at = Some(self.first_seen);
            }
        }
    }

    fn take_reports(&mut self) {
        let (progress, ended) = self.slot.take_reports();
        for Progress::PostStart { container, id } in progress {
            self.history.containers.entry(container).or_default().post_start_running = Some(id);
        }
        let now = self.parts.clock.now();
        for ended in ended {
            self.take_end(ended, now);
        }
    }

    fn take_end(&mut self, ended: Ended, now: Now) {
        let target = ended.action.target();
        // A superseded action may end after its successor began: only the one on record counts as in flight.
        if self.actions.get(&target) == Some(&ended.action) {
            self.actions.remove(&target);
            self.running.remove(&target);
        }
        if let Some(seq) = ended.seq {
            self.history.fresh_after = self.history.fresh_after.max(seq);
        }
        if let Some(read) = ended.read {
            self.read_as_of = self.read_as_of.max(read);
        }
        match &ended.outcome {
            Outcome::Failed => {
                let retry = Retry::after(self.history.retries.get(&target), &target, now.mono);
                self.history.retries.insert(target, retry);
                return;
            }
            Outcome::Abandoned => {}
            _ => {
                self.history.retries.remove(&target);
            }
        }
        self.remember(ended);
    }

    /// What a successful (or, for a start, any) end means for the worker's memory.
    fn remember(&mut self, ended: Ended) {
        let history = &mut self.history;
        match (ended.action, ended.outcome) {
            (Action::CreateCgroup, Outcome::Done) => history.cgroup_ready = true,
            (Action::Resize { pod: Some(size), .. }, Outcome::Done) => history.cgroup_size = Some(size),
            (Action::MountVolumes | Action::RefreshVolumes, Outcome::Volumes { mounted, refresh_in }) => {
                if let Some(mounted) = mounted {
                    self.mounted = mounted;
                }
                history.volumes = Volumes::Mounted;
                history.refresh_at = refresh_in.map(|after| ended.at + after);
            }
            (Action::ResetContainers { containers }, Outcome::Done) => {
                for reset in containers {
                    let backoff = history.containers.remove(&reset.name).map(|h| h.backoff).unwrap_or_default();
                    history.containers.insert(reset.name, ContainerHistory { backoff, ..Default::default() });
                }
            }
            (Action::StopSandbox { ids, .. }, Outcome::Done) => history.stopped_sandboxes.extend(ids),
            (Action::StopPod { sandboxes, .. }, Outcome::Done) => {
                history.stopped_sandboxes.extend(sandboxes);
                history.stopped = true;
            }
            (Action::TearDown, Outcome::Done) => history.torn_down = true,
            (Action::RemoveRuntime { .. }, Outcome::Done) => history.removed = true,
            (Action::KillContainer { container, restart: true, .. }, Outcome::Done) => {
                history.containers.entry(container.name).or_default().restart_of = Some(container.id);
            }
            (Action::StartContainer { name, .. }, outcome) => {
                let generation = history.pod.as_ref().map_or(0, Pod::generation);
                let container = history.containers.entry(name).or_default();
                container.post_start_running = None;
                match outcome {
                    Outcome::StartFailed { waiting, retry_at } => {
                        container.start_failure = Some(StartFailure { waiting, retry_at, generation });
                    }
                    Outcome::Done => {
                        container.start_failure = None;
                        container.restart_of = None;
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// Reads, decides, publishes, acts. Returns when to look again, and whether the phase stayed as it was.
    async fn turn(&mut self) -> (Option<Instant>, bool) {
        let now = self.parts.clock.now();
        let (desired, admission) = self.read_desired(now);
        let runtime = self.read_runtime();
        if let Known::Is(runtime) = &runtime {
            self.read_termination_messages(runtime).await;
        }
        let node = self.parts.node.borrow().clone();
        let mut verdicts = self.parts.probes.verdicts(&self.uid);
        let order = self.slot.order();
        let actuated = self.parts.ledger.actuated(&self.uid);
        let view = PodView {
            now,
            uid: &self.uid,
            desired,
            actuated: &actuated,
            pod_level_resize: self.parts.ledger.pod_level(),
            runtime,
            listed: self.parts.runtime_store.complete(),
            node: &node,
            verdicts: &verdicts,
            order: order.as_ref(),
            admission: &admission,
            in_flight: &self.actions,
            history: &self.history,
            acknowledged: self.parts.publisher.acknowledged(&self.uid),
        };
        let mut turn = decide(&view, &self.parts.settings.rules);
        self.report_resize(&view, turn.phase);
        let runtime = view.runtime.is().cloned();
        let pod = view.desired.is().cloned();
        self.track_probes(pod.as_ref(), runtime.as_deref(), &node, &turn);
        let known = std::mem::replace(&mut verdicts, self.parts.probes.verdicts(&self.uid));
        // Who is started is known only once its probes are.
        let settled = turn.phase == self.history.phase && verdicts == known;
        if turn.phase >= Phase::Terminated {
            // Before the API hears of it: whoever takes the place must find it free.
            self.parts.admission.release(&self.uid);
        }
        if !unspoken(&turn, &admission, runtime.as_deref()) {
            self.publish(now, pod.as_ref(), runtime.as_deref(), &node, &verdicts, &turn);
        }
        self.history.phase = turn.phase;
        self.history.ending = turn.ending.take();
        self.raise_notes(&mut turn);
        if turn.delete
            && let Some(pod) = &pod
        {
            self.history.delete_requested = true;
            self.parts.publisher.delete(pod);
        }
        if turn.abandon_starts {
            self.give_up_starts(turn.phase);
        }
        for action in turn.actions {
            self.begin(action, runtime.clone(), &node, now);
        }
        (turn.wake_at, settled)
    }

    /// Tells the ledger how far the pod's resources are in force, and when they are free.
    fn report_resize(&self, view: &PodView<'_>, phase: Phase) {
        let ledger = &self.parts.ledger;
        if phase >= Phase::Terminated {
            return ledger.release(&self.uid);
        }
        if let (Phase::Syncing, Some(pod), Some(runtime)) = (phase, view.desired.is(), view.runtime.is()) {
            ledger.progress(pod, resize::going_on(view, pod, runtime));
        }
    }

    fn read_desired(&mut self, now: Now) -> (Known<Pod>, Standing) {
        let not_asked = Standing::NotYet { until: None };
        let snapshot = self.parts.store.snapshot(&self.uid);
        let Some(asked) = snapshot.pod else {
            return (if snapshot.complete { Known::Absent } else { Known::NotYet }, not_asked);
        };
        let ended = matches!(asked.api_status().phase.as_deref(), Some("Succeeded" | "Failed"));
        let syncing = self.history.phase == Phase::Syncing && asked.deletion_timestamp().is_none() && !ended;
        let standing = if syncing { self.parts.admission.standing(&asked) } else { not_asked };
        let ledger = &self.parts.ledger;
        let pod = if standing == Standing::Admitted { ledger.look(&asked) } else { ledger.frozen(&asked) };
        if let Some(old) = self.asked.replace(asked.clone())
            && !old.same_object(&asked)
        {
            self.parts.admission.updated(&old, &asked);
        }
        let first = self.history.pod.is_none();
        let changed = first || self.history.pod.as_ref().is_some_and(|p| !p.same_object(&pod));
        if first {
            let waited = now.wall.duration_since(pod.seen());
            self.parts.metrics.worker_started(waited.try_into().unwrap_or_default());
            self.history.last_status = pod.api_status().clone();
            let at_api = pod.api_status().start_time.as_ref().map(|t| t.0);
            self.history.started = at_api.or(Some(now.wall));
        }
        if changed {
            if self.history.phase == Phase::Syncing {
                self.parts.objects.track(&pod);
                // Labels and annotations show in downwardAPI volumes.
                self.history.refresh |= !first;
            }
            self.history.pod = Some(pod.clone());
        }
        (Known::Is(pod), standing)
    }

    fn read_runtime(&mut self) -> Known<Arc<PodRuntime>> {
        let store = &self.parts.runtime_store;
        if !store.complete() {
            return Known::NotYet;
        }
        // No entry means that nobody looked for this pod yet, or that its details could not be read.
        let Some(entry) = store.pod(&self.uid) else { return Known::NotYet };
        if entry.as_of.max(self.read_as_of) <= self.history.fresh_after {
            return Known::NotYet;
        }
        if entry.is_empty() {
            return Known::Absent;
        }
        self.adopt(&entry);
        Known::Is(entry)
    }

    /// Remembers which containers ran before this process did.
    fn adopt(&mut self, runtime: &PodRuntime) {
        let started = self.parts.settings.process_started;
        for container in &runtime.containers {
            if container.started_at.is_some_and(|at| at < started) && !self.history.adopted.contains(&container.id) {
                self.history.adopted.insert(container.id.clone());
            }
        }
    }

    /// Once per ended container: what it left in its termination message file.
    async fn read_termination_messages(&mut self, runtime: &PodRuntime) {
        for container in &runtime.containers {
            let known = self.history.termination_messages.contains_key(&container.id);
            if container.state == ContainerState::Exited && !known {
                let message = execute::termination_message(container).await;
                self.history.termination_messages.insert(container.id.clone(), message);
            }
        }
        let alive = |id: &String| runtime.containers.iter().any(|c| c.id == *id);
        self.history.termination_messages.retain(|id, _| alive(id));
    }

    fn track_probes(
        &mut self,
        pod: Option<&Pod>,
        runtime: Option<&PodRuntime>,
        node: &crate::node::NodeFacts,
        turn: &Turn,
    ) {
        let Some(pod) = pod.or(self.history.pod.as_ref()) else { return };
        let Some(runtime) = runtime else { return };
        if turn.phase >= Phase::Terminated {
            return self.parts.probes.track(pod, &[]);
        }
        let host = match pod.host_network() {
            true => node.ips.first().copied(),
            false => runtime.latest_sandbox().and_then(|s| s.ips.first().copied()),
        };
        let sandbox = runtime.latest_sandbox().map(|s| s.id.as_str());
        let statuses = || {
            let status = pod.api_status();
            status.container_statuses.iter().chain(&status.init_container_statuses).flatten()
        };
        let targets: Vec<ProbeTarget> = runtime
            .containers
            .iter()
            .filter(|c| c.state == ContainerState::Running && Some(c.sandbox_id.as_str()) == sandbox)
            .filter(|c| {
                let hook = self.history.containers.get(&c.name).and_then(|h| h.post_start_running.as_deref());
                hook != Some(c.id.as_str())
            })
            .map(|c| {
                let full_id = format!("{}://{}", self.parts.settings.runtime_name, c.id);
                let at_api = statuses().find(|s| s.container_id.as_deref() == Some(full_id.as_str()));
                ProbeTarget {
                    container: c.name.clone(),
                    container_id: c.id.clone(),
                    started_at: c.started_at.unwrap_or(c.created_at),
                    host,
                    adopted: self.history.adopted.contains(&c.id),
                    was_ready: at_api.is_some_and(|s| s.ready),
                    was_started: at_api.is_some_and(|s| s.started == Some(true)),
                    terminating: turn.phase >= Phase::Terminating,
                }
            })
            .collect();
        self.parts.probes.track(pod, &targets);
    }

    fn publish(
        &mut self,
        now: Now,
        pod: Option<&Pod>,
        runtime: Option<&PodRuntime>,
        node: &crate::node::NodeFacts,
        verdicts: &HashMap<String, crate::probes::ContainerVerdicts>,
        turn: &Turn,
    ) {
        let Some(pod) = pod else { return };
        // An absent pod is known to have no containers; an unread one keeps the states it had.
        let none = PodRuntime::default();
        let absent = runtime.is_none() && matches!(self.read_runtime(), Known::Absent);
        let runtime = runtime.or(absent.then_some(&none));
        let post_start: HashMap<String, String> = self
            .history
            .containers
            .iter()
            .filter_map(|(name, h)| Some((name.clone(), h.post_start_running.clone()?)))
            .collect();
        let replaced = self.replaced();
        let (resize, actuated) = (self.parts.ledger.conditions(&self.uid), self.parts.ledger.actuated(&self.uid));
        let status = pod_status::generate(&StatusInput {
            now,
            resources: pod_status::ResourceView {
                resize: &resize,
                actuated: &actuated,
                pod_level: self.parts.ledger.pod_level(),
            },
            pod,
            last: &self.history.last_status,
            runtime,
            phase: turn.phase,
            end: turn.ending.as_ref().map(|e| &e.cause),
            started: self.history.started,
            verdicts,
            waiting: &turn.waiting,
            replaced: &replaced,
            post_start: &post_start,
            termination_messages: &self.history.termination_messages,
            node,
            runtime_name: &self.parts.settings.runtime_name,
            gates: self.parts.settings.rules.gates,
        });
        self.report_ready(now, &status);
        self.parts.metrics.lives.status_changed(&self.history.last_status, &status);
        self.history.last_status = status.clone();
        let version = self.parts.publisher.offer(pod, status);
        if turn.phase >= Phase::Terminated {
            self.history.terminal_version = Some(version);
        }
    }

    /// Who is, or was, killed to be started again.
    fn replaced(&self) -> BTreeSet<String> {
        let being_killed = self.actions.values().filter_map(|action| match action {
            Action::KillContainer { container, restart: true, .. } => Some(container.id.clone()),
            _ => None,
        });
        being_killed.chain(self.history.containers.values().filter_map(|h| h.restart_of.clone())).collect()
    }

    /// The pod's start latency, once.
    fn report_ready(&mut self, now: Now, status: &k8s_openapi::api::core::v1::PodStatus) {
        let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        if ready && !self.ready_reported {
            self.ready_reported = true;
            if self.history.adopted.is_empty() {
                self.parts.metrics.pod_started(now.mono - self.first_seen);
            }
        }
    }

    fn raise_notes(&mut self, turn: &mut Turn) {
        let Some(pod) = self.history.pod.clone() else { return };
        for note in turn.notes.drain(..) {
            if !self.history.noted.insert(note.key) {
                continue;
            }
            let regarding = match note.container.as_deref().and_then(|name| pod.container(name)) {
                Some(container) => Regarding::container(&pod, container),
                None => Regarding::Pod(pod.clone()),
            };
            self.parts.events.event(regarding, note.kind, note.reason, note.message);
        }
    }

    /// An ending pod starts nothing more: what waits for an image, the gate or a hook stops waiting. A pod that begins anew in place
    /// keeps its volumes and its sandbox.
    fn give_up_starts(&mut self, phase: Phase) {
        let ending = phase != Phase::Syncing;
        for (target, running) in &self.running {
            let given_up = match self.actions.get(target) {
                Some(Action::StartContainer { .. }) => true,
                Some(Action::MountVolumes | Action::CreateSandbox { .. } | Action::ResetContainers { .. }) => ending,
                _ => false,
            };
            if given_up {
                running.cancel.cancel();
            }
        }
    }

    fn begin(
        &mut self,
        action: Action,
        runtime: Option<Arc<PodRuntime>>,
        node: &Arc<crate::node::NodeFacts>,
        now: Now,
    ) {
        let target = action.target();
        if let Some(earlier) = self.running.get(&target) {
            // Only a stop with a shorter grace supersedes; everything else waits for its target.
            if !matches!(action, Action::StopPod { .. }) {
                return;
            }
            earlier.cancel.cancel();
        }
        match &action {
            Action::StartContainer { name, .. } => self.charge_backoff(name, runtime.as_deref(), now),
            Action::RefreshVolumes | Action::MountVolumes => {
                self.history.refresh = false;
                self.history.refresh_at = None;
            }
            _ => {}
        }
        let cancel = self.parts.cancel.child_token();
        self.running.insert(target.clone(), InFlight { cancel: cancel.clone() });
        self.actions.insert(target, action.clone());
        let context = ActionContext {
            parts: Arc::clone(&self.parts),
            uid: self.uid.clone(),
            pod: self.history.pod.clone(),
            runtime: runtime.unwrap_or_default(),
            mounted: Arc::clone(&self.mounted),
            node: Arc::clone(node),
            slot: Arc::clone(&self.slot),
            cancel,
        };
        tokio::spawn(execute::run(context, action));
    }

    fn charge_backoff(&mut self, name: &str, runtime: Option<&PodRuntime>, now: Now) {
        let rules = self.parts.settings.rules;
        let Some(container) = self.history.pod.as_ref().and_then(|p| p.container(name).map(|c| (rules.hash)(c.spec)))
        else {
            return;
        };
        let Some(ended) = runtime.and_then(|r| r.latest(name)).filter(|c| c.state == ContainerState::Exited) else {
            return;
        };
        let finished = start_order::finished_at(ended, now);
        let history = self.history.containers.entry(name.to_owned()).or_default();
        history.backoff.advance(rules.backoff, &container, finished, now.mono);
    }
}

/// A pod without a decision has no status of ours, and one that was rejected and has nothing running goes to its end in one step (contract 3.2).
fn unspoken(turn: &Turn, admission: &Standing, runtime: Option<&PodRuntime>) -> bool {
    match turn.phase {
        Phase::Syncing => matches!(admission, Standing::NotYet { .. }),
        Phase::Terminating => {
            let rejected = turn.ending.as_ref().is_some_and(|e| matches!(e.cause, EndCause::Rejected(_)));
            rejected && runtime.is_none_or(|r| r.containers.is_empty())
        }
        _ => false,
    }
}
