//! Who holds what on this node: the resources that pods are allocated, those that are in force, and the resizes that wait (contract P-70…P-73).
//!
//! In: each pod as its worker sees it, what the worker put into force, the end of pods, what the node can allocate. Out: the pod with its
//! allocation in place of its spec's resources, the two resize conditions, events, two checkpoint files, and a wake for each pod whose
//! allocation or condition changed. Nothing is polled: a waiting resize is looked at again when a pod ends, shrinks or resizes, when
//! the node's allocatable changes and when the last source was heard. One lock, never held over an await, an event or a wake.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::api::core::v1::ResourceRequirements;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{
    allocation::{self, NodeRoom, ResizePolicy, Verdict, Waiting},
    checkpoint,
    pod_resources::{CPU, MEMORY, PodResources, same_resources},
    requests::ResourceList,
    resize_conditions::{DEFERRED, ERROR, INFEASIBLE, ResizeCondition, ResizeConditions},
    resize_metrics::{ResizeMetrics, Resolution, Trigger},
    resize_plan::Resource,
};
use crate::{
    events::{EventSink, EventType, Regarding},
    node::NodeFacts,
    pods::{Pod, PodStore, PodUid},
    quantity::Quantity,
    time::Clock,
    wake::{Cause, WakeSink},
};

/// What the ledger works with.
pub struct LedgerParts {
    pub policy: ResizePolicy,
    /// Where the checkpoints are; `None` keeps nothing on disk.
    pub directory: Option<PathBuf>,
    pub store: Arc<PodStore>,
    pub node: watch::Receiver<Arc<NodeFacts>>,
    pub wakes: Arc<dyn WakeSink>,
    pub events: Arc<dyn EventSink>,
    pub clock: Arc<dyn Clock>,
    pub metrics: ResizeMetrics,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct PodLedger(Arc<Inner>);

struct Inner {
    parts: LedgerParts,
    state: Mutex<State>,
    changed: Notify,
    /// The version that was last tried to write, and whether that went well.
    written: watch::Sender<(u64, bool)>,
}

#[derive(Default)]
struct State {
    allocated: BTreeMap<PodUid, Arc<PodResources>>,
    actuated: BTreeMap<PodUid, Arc<PodResources>>,
    pods: HashMap<PodUid, Entry>,
    /// Counts changes of the two maps.
    version: u64,
}

struct Entry {
    desired: Pod,
    shown: Pod,
    conditions: ResizeConditions,
    /// Its resize waits for room.
    waiting: bool,
    /// Nothing of it runs any more, so it holds nothing.
    released: bool,
}

/// What follows from a change once the lock is let go.
#[derive(Default)]
struct Effects {
    wakes: Vec<PodUid>,
    events: Vec<(Pod, EventType, &'static str, String)>,
}

impl Effects {
    fn event(&mut self, pod: &Pod, kind: EventType, reason: &'static str, prefix: &str, generation: i64, error: &str) {
        let message = format!("{prefix}: {}", allocation::summary(pod, generation, error));
        self.events.push((pod.clone(), kind, reason, message));
    }
}

impl PodLedger {
    /// Reads the checkpoints. One that is corrupt costs an error in the log; then what pods ask for now is taken as allocated.
    pub fn new(parts: LedgerParts) -> Self {
        let read = |name| {
            let path = parts.directory.as_ref().map(|dir| dir.join(name));
            let held = path.as_deref().map_or(Ok(BTreeMap::new()), checkpoint::read).unwrap_or_else(|error| {
                tracing::error!(%error, "Pod resources are taken from the pods' specs");
                BTreeMap::new()
            });
            held.into_iter().map(|(uid, held)| (uid, Arc::new(held))).collect()
        };
        let state =
            State { allocated: read(checkpoint::ALLOCATED), actuated: read(checkpoint::ACTUATED), ..State::default() };
        Self(Arc::new(Inner {
            parts,
            state: Mutex::new(state),
            changed: Notify::new(),
            written: watch::Sender::new((0, true)),
        }))
    }

    /// Writes the checkpoints and looks at waiting resizes again, until cancelled; then writes once more.
    pub async fn run(self, cancel: CancellationToken) {
        tokio::join!(self.keep_checkpoints(&cancel), self.watch_room(&cancel));
    }

    /// The pod with what it is allocated. An admitted pod is allocated what it asks for; a pod
    /// whose resources changed has its resize looked at, after those that come before it.
    pub fn look(&self, desired: &Pod) -> Pod {
        let mut effects = Effects::default();
        let shown = {
            let mut state = self.lock();
            let seen = state.pods.get(desired.uid()).filter(|entry| entry.desired.same_object(desired));
            match seen.map(|entry| entry.shown.clone()) {
                Some(shown) => shown,
                None => {
                    let shown = self.take_desired(&mut state, desired, &mut effects);
                    self.count(&state);
                    shown
                }
            }
        };
        effects.wakes.retain(|uid| uid != desired.uid());
        self.carry_out(effects);
        shown
    }

    /// The pod with what it was allocated, for a pod that is ending: nothing is allocated any more.
    pub fn frozen(&self, desired: &Pod) -> Pod {
        let state = self.lock();
        match state.pods.get(desired.uid()) {
            Some(entry) if entry.desired.same_object(desired) => entry.shown.clone(),
            _ => state.shown(desired, self.0.parts.policy.pod_level),
        }
    }

    /// All allocations, held still: while admission decides nothing is allocated to a resize, and the other way round.
    pub fn hold(&self) -> HeldAllocations<'_> {
        HeldAllocations { ledger: self, state: self.lock() }
    }

    /// What of the pod's resources is in force.
    pub fn actuated(&self, uid: &PodUid) -> Arc<PodResources> {
        self.lock().actuated.get(uid).cloned().unwrap_or_default()
    }

    pub fn conditions(&self, uid: &PodUid) -> ResizeConditions {
        self.lock().pods.get(uid).map(|e| e.conditions.clone()).unwrap_or_default()
    }

    /// Feature InPlacePodLevelResourcesVerticalScaling.
    pub fn pod_level(&self) -> bool {
        self.0.parts.policy.pod_level
    }

    /// A container was made or updated with these. True when that differs from what was on record.
    pub fn container_actuated(&self, uid: &PodUid, name: &str, resources: ResourceRequirements) -> bool {
        let mut state = self.lock();
        let held = state.actuated.entry(uid.clone()).or_default();
        let earlier = held.containers.get(name);
        let differs = earlier.is_some_and(|earlier| !same_resources(Some(earlier), Some(&resources)));
        if differs || earlier.is_none() {
            Arc::make_mut(held).containers.insert(name.to_owned(), resources);
            self.touch(&mut state);
        }
        differs
    }

    /// The pod's own resources of this kind are in force.
    pub fn pod_actuated(&self, pod: &Pod, resource: Resource) {
        let (Some(whole), true) = (pod.spec().resources.as_ref(), self.0.parts.policy.pod_level) else { return };
        let name = if resource == Resource::Cpu { CPU } else { MEMORY };
        let mut state = self.lock();
        let held = Arc::make_mut(state.actuated.entry(pod.uid().clone()).or_default());
        let record = held.pod_level.get_or_insert_default();
        for (from, to) in [(&whole.requests, &mut record.requests), (&whole.limits, &mut record.limits)] {
            if let Some(amount) = from.as_ref().and_then(|list| list.get(name)) {
                to.get_or_insert_default().insert(name.to_owned(), amount.clone());
            }
        }
        self.touch(&mut state);
    }

    /// Whether the pod's allocation is in force by now. The end of a resize is an event.
    pub fn progress(&self, pod: &Pod, going_on: bool) {
        let mut effects = Effects::default();
        let mut state = self.lock();
        if let Some(entry) = state.pods.get_mut(pod.uid()) {
            match (&entry.conditions.in_progress, going_on) {
                (None, true) => entry.conditions.in_progress = Some(self.condition(None, "", "", pod.generation())),
                (Some(done), false) => {
                    effects.event(
                        pod,
                        EventType::Normal,
                        "ResizeCompleted",
                        "Pod resize completed",
                        done.generation,
                        "",
                    );
                    entry.conditions.in_progress = None;
                }
                _ => return,
            }
            self.count(&state);
        }
        drop(state);
        self.carry_out(effects);
    }

    /// A try to put the allocation into force failed. An event unless the condition says so already.
    pub fn failed(&self, pod: &Pod, message: &str) {
        let mut effects = Effects::default();
        let mut state = self.lock();
        if let Some(entry) = state.pods.get_mut(pod.uid()) {
            let earlier = entry.conditions.in_progress.take();
            let generation = earlier.as_ref().map_or(pod.generation(), |c| c.generation);
            if earlier.as_ref().is_none_or(|c| c.reason != ERROR || c.message != message) {
                effects.event(pod, EventType::Warning, "ResizeError", "Pod resize error", generation, message);
            }
            entry.conditions.in_progress = Some(self.condition(earlier.as_ref(), ERROR, message, generation));
            self.count(&state);
        }
        drop(state);
        self.carry_out(effects);
    }

    /// The steps of one resize were taken, or one of them failed.
    pub fn resized(&self, success: bool, took: Duration) {
        self.0.parts.metrics.actuated(success, took);
    }

    /// Something may have become free: looks at all waiting resizes.
    pub fn retry(&self, trigger: Trigger) {
        let mut effects = Effects::default();
        let mut state = self.lock();
        self.review_waiting(&mut state, trigger, &mut effects);
        self.count(&state);
        drop(state);
        self.carry_out(effects);
    }

    /// Nothing of the pod runs any more: what it held is free.
    pub fn release(&self, uid: &PodUid) {
        let release = |entry: &mut Entry| {
            self.pending_ended(entry, Resolution::Terminated);
            entry.conditions = ResizeConditions::default();
            entry.waiting = false;
            !std::mem::replace(&mut entry.released, true)
        };
        let freed = self.lock().pods.get_mut(uid).is_some_and(release);
        if freed {
            self.retry(Trigger::PodTerminated);
        }
    }

    /// The pod is gone for good.
    pub fn forget(&self, uid: &PodUid) {
        {
            let mut state = self.lock();
            if let Some(entry) = state.pods.remove(uid) {
                self.pending_ended(&entry, Resolution::Terminated);
            }
            let had = [state.allocated.remove(uid).is_some(), state.actuated.remove(uid).is_some()];
            if had.contains(&true) {
                self.touch(&mut state);
            }
        }
        self.retry(Trigger::PodsRemoved);
    }

    /// Waits until everything up to now is on disk. False when that failed.
    pub async fn persisted(&self) -> bool {
        if self.0.parts.directory.is_none() {
            return true;
        }
        let wanted = self.lock().version;
        let mut written = self.0.written.subscribe();
        written.wait_for(|(version, _)| *version >= wanted).await.is_ok_and(|written| written.1)
    }

    /// How many pods something is kept of.
    pub fn pods(&self) -> usize {
        let state = self.lock();
        state.pods.len().max(state.allocated.len()).max(state.actuated.len())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self, state: &mut State) {
        state.version += 1;
        self.0.changed.notify_one();
    }

    fn count(&self, state: &State) {
        self.0.parts.metrics.count(state.pods.values().map(|e| (&e.desired, &e.conditions)));
    }

    fn pending_ended(&self, entry: &Entry, how: Resolution) {
        let now = self.0.parts.clock.now().wall;
        self.0.parts.metrics.pending_ended(&entry.desired, entry.conditions.pending.as_ref(), how, now);
    }

    fn carry_out(&self, effects: Effects) {
        for (pod, kind, reason, message) in effects.events {
            self.0.parts.events.event(Regarding::Pod(pod), kind, reason, message);
        }
        for uid in effects.wakes {
            self.0.parts.wakes.wake(&uid, Cause::Desired);
        }
    }

    fn condition(
        &self,
        earlier: Option<&ResizeCondition>,
        reason: &str,
        why: &str,
        generation: i64,
    ) -> ResizeCondition {
        ResizeCondition::after(earlier, reason, why, generation, self.0.parts.clock.now().wall)
    }

    fn take_desired(&self, state: &mut State, desired: &Pod, effects: &mut Effects) -> Pod {
        let (uid, pod_level) = (desired.uid(), self.0.parts.policy.pod_level);
        if !state.allocated.contains_key(uid) {
            state.allocated.insert(uid.clone(), Arc::new(PodResources::of(desired, pod_level)));
            self.touch(state);
        }
        if !state.actuated.contains_key(uid) {
            let held = state.allocated.get(uid).cloned().unwrap_or_default();
            state.actuated.insert(uid.clone(), held);
            self.touch(state);
        }
        let shown = state.shown(desired, pod_level);
        let differs = !shown.same_object(desired);
        let earlier = state.pods.remove(uid);
        if let Some(earlier) = &earlier {
            self.0.parts.metrics.requested(&earlier.desired, desired);
        }
        let trigger = if earlier.is_some() { Trigger::PodUpdated } else { Trigger::PodsAdded };
        let asked_anew =
            earlier.as_ref().is_none_or(|e| !PodResources::of(&e.desired, pod_level).matches(desired, pod_level));
        let mut entry = Entry {
            desired: desired.clone(),
            shown: shown.clone(),
            waiting: differs && (asked_anew || earlier.as_ref().is_some_and(|e| e.waiting)),
            released: earlier.as_ref().is_some_and(|e| e.released),
            conditions: earlier.map_or_else(|| ResizeConditions::at_api(desired), |e| e.conditions),
        };
        if !differs {
            self.pending_ended(&entry, Resolution::Reverted);
            entry.conditions.pending = None;
        }
        state.pods.insert(uid.clone(), entry);
        if differs && asked_anew {
            self.review_waiting(state, trigger, effects);
        }
        state.pods.get(uid).map_or(shown, |e| e.shown.clone())
    }

    /// Each waiting resize in its order: what one gets, the next does not.
    fn review_waiting(&self, state: &mut State, trigger: Trigger, effects: &mut Effects) {
        let parts = &self.0.parts;
        let asking = |e: &&Entry| e.waiting && !e.released;
        if !state.pods.values().any(|e| asking(&e)) || !parts.store.complete() {
            return;
        }
        let allocatable = allocatable(&parts.node.borrow());
        if !allocatable.contains_key(CPU) {
            return;
        }
        let pods = parts.store.list();
        let mut waiting: Vec<Waiting> = state
            .pods
            .values()
            .filter(asking)
            .map(|e| Waiting {
                desired: e.desired.clone(),
                allocated: e.shown.clone(),
                since: e.conditions.pending.as_ref().map(|c| c.since),
            })
            .collect();
        waiting.sort_by(allocation::before);
        for one in waiting {
            let room = state.room(&one.desired, &pods, &allocatable, parts.policy.pod_level);
            let verdict = allocation::review(&one.desired, &one.allocated, &room, &parts.policy);
            self.apply(state, &one.desired, verdict, trigger, effects);
        }
    }

    fn apply(&self, state: &mut State, desired: &Pod, verdict: Verdict, trigger: Trigger, effects: &mut Effects) {
        let (uid, generation) = (desired.uid(), desired.generation());
        let Some(mut entry) = state.pods.remove(uid) else { return };
        let earlier = entry.conditions.clone();
        match verdict {
            Verdict::Fits => {
                let held = PodResources::of(desired, self.0.parts.policy.pod_level);
                state.allocated.insert(uid.clone(), Arc::new(held));
                self.touch(state);
                if entry.conditions.pending.as_ref().is_some_and(|c| c.reason == DEFERRED) {
                    self.0.parts.metrics.accepted_after_deferral(trigger);
                }
                self.pending_ended(&entry, Resolution::Accepted);
                entry.shown = desired.clone();
                entry.waiting = false;
                entry.conditions =
                    ResizeConditions { pending: None, in_progress: Some(self.condition(None, "", "", generation)) };
                effects.event(desired, EventType::Normal, "ResizeStarted", "Pod resize started", generation, "");
            }
            Verdict::Deferred(why) => self.put_off(&mut entry, DEFERRED, "ResizeDeferred", &why, effects),
            Verdict::Infeasible(why) => {
                entry.waiting = false;
                self.0.parts.metrics.infeasible(why.detail());
                self.put_off(&mut entry, INFEASIBLE, "ResizeInfeasible", &why.to_string(), effects);
            }
        }
        if entry.conditions != earlier {
            effects.wakes.push(uid.clone());
        }
        state.pods.insert(uid.clone(), entry);
    }

    fn put_off(&self, entry: &mut Entry, reason: &str, event: &'static str, why: &str, effects: &mut Effects) {
        let (pod, generation) = (&entry.desired, entry.desired.generation());
        let earlier = entry.conditions.pending.take();
        if earlier.as_ref().is_none_or(|c| c.reason != reason || c.generation != generation) {
            effects.event(pod, EventType::Warning, event, &format!("Pod resize {reason}"), generation, why);
        }
        entry.conditions.pending = Some(self.condition(earlier.as_ref(), reason, why, generation));
    }

    async fn keep_checkpoints(&self, cancel: &CancellationToken) {
        let Some(directory) = self.0.parts.directory.clone() else { return };
        let mut last = [String::new(), String::new()];
        loop {
            let stop = tokio::select! {
                biased;
                () = self.0.changed.notified() => false,
                () = cancel.cancelled() => true,
            };
            self.write_checkpoints(&directory, &mut last).await;
            if stop {
                return;
            }
        }
    }

    /// Both files, each only if its text is another. The allocation first: what is in force is never ahead of it.
    async fn write_checkpoints(&self, directory: &Path, last: &mut [String; 2]) {
        let (version, texts) = {
            let state = self.lock();
            (state.version, [text(&state.allocated), text(&state.actuated)])
        };
        let mut well = true;
        for ((name, text), last) in [checkpoint::ALLOCATED, checkpoint::ACTUATED].into_iter().zip(texts).zip(last) {
            if text == *last {
                continue;
            }
            let (path, copy) = (directory.join(name), text.clone());
            let done = tokio::task::spawn_blocking(move || checkpoint::write(&path, &copy)).await;
            match done {
                Ok(Ok(())) => *last = text,
                Ok(Err(error)) => {
                    tracing::error!(%error, "Failed to save pod resource information checkpoint");
                    well = false;
                }
                Err(_) => well = false,
            }
        }
        self.0.written.send_replace((version, well));
    }

    /// Looks again when the last source was heard and when the node can allocate more or less than before.
    async fn watch_room(&self, cancel: &CancellationToken) {
        let (mut complete, mut node) = (self.0.parts.store.completeness(), self.0.parts.node.clone());
        let mut had = BTreeMap::new();
        let mut known = false;
        loop {
            let facts = Arc::clone(&node.borrow_and_update());
            let heard = *complete.borrow_and_update();
            let first = heard && !std::mem::replace(&mut known, heard);
            if first {
                self.forget_absent();
            }
            if first || had != facts.allocatable {
                had = facts.allocatable.clone();
                self.retry(if first { Trigger::PodsAdded } else { Trigger::NodeChanged });
            }
            let more = tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                more = node.changed() => more,
                more = complete.changed(), if !heard => more,
            };
            if more.is_err() {
                return;
            }
        }
    }

    /// Once every source was heard: records of pods that ended while no agent ran.
    fn forget_absent(&self) {
        let known: std::collections::HashSet<PodUid> =
            self.0.parts.store.list().iter().map(|p| p.uid().clone()).collect();
        let mut state = self.lock();
        let State { allocated, actuated, pods, .. } = &mut *state;
        let before = allocated.len() + actuated.len();
        allocated.retain(|uid, _| known.contains(uid) || pods.contains_key(uid));
        actuated.retain(|uid, _| known.contains(uid) || pods.contains_key(uid));
        if allocated.len() + actuated.len() != before {
            self.touch(&mut state);
        }
    }
}

/// See [`PodLedger::hold`]. Not to be kept over an await, an event or a wake.
pub struct HeldAllocations<'a> {
    ledger: &'a PodLedger,
    state: MutexGuard<'a, State>,
}

impl HeldAllocations<'_> {
    /// The pod with what it is allocated; with what it asks for while it is allocated nothing.
    pub fn shown(&self, pod: &Pod) -> Pod {
        self.state.shown(pod, self.ledger.pod_level())
    }

    /// What the pod keeps others from: what it is allocated, or what is in force as long as that is more.
    pub fn holds(&self, pod: &Pod) -> ResourceList {
        self.state.holds(&self.shown(pod), self.ledger.pod_level())
    }

    /// An admitted pod is allocated what it asks for, unless an earlier process has allocated it something.
    pub fn allocate(&mut self, pod: &Pod) {
        if !self.state.allocated.contains_key(pod.uid()) {
            let held = PodResources::of(pod, self.ledger.pod_level());
            self.state.allocated.insert(pod.uid().clone(), Arc::new(held));
            self.ledger.touch(&mut self.state);
        }
    }

    /// A rejected pod is allocated nothing, whatever an earlier process did.
    pub fn discard(&mut self, uid: &PodUid) {
        let state = &mut *self.state;
        if [state.allocated.remove(uid), state.actuated.remove(uid)].iter().any(Option::is_some) {
            self.ledger.touch(state);
        }
    }
}

impl State {
    fn holds(&self, shown: &Pod, pod_level: bool) -> ResourceList {
        match self.actuated.get(shown.uid()) {
            Some(in_force) => allocation::held(shown, in_force, pod_level),
            None => super::requests::pod_requests(shown),
        }
    }

    fn shown(&self, desired: &Pod, pod_level: bool) -> Pod {
        self.allocated.get(desired.uid()).map_or_else(|| desired.clone(), |held| held.shown_in(desired, pod_level))
    }

    /// What is left beside this pod. Pods that have ended, or were never allocated anything, hold nothing.
    fn room(&self, beside: &Pod, pods: &[Pod], allocatable: &ResourceList, pod_level: bool) -> NodeRoom {
        let mut room = NodeRoom { allocatable: allocatable.clone(), ..NodeRoom::default() };
        let ended = |pod: &&Pod| {
            let phase = pod.api_status().phase.as_deref();
            matches!(phase, Some("Succeeded" | "Failed")) || self.pods.get(pod.uid()).is_some_and(|e| e.released)
        };
        for pod in pods.iter().filter(|pod| pod.uid() != beside.uid() && !ended(pod)) {
            let Some(allocated) = self.allocated.get(pod.uid()) else { continue };
            let shown = allocated.shown_in(pod, pod_level);
            allocation::add_held(&mut room, &self.holds(&shown, pod_level));
        }
        room
    }
}

fn text(held: &BTreeMap<PodUid, Arc<PodResources>>) -> String {
    checkpoint::encode(&held.iter().map(|(uid, held)| (uid.to_string(), held.as_ref())).collect())
}

fn allocatable(node: &NodeFacts) -> ResourceList {
    let parsed = |(name, text): (&String, &String)| Some((name.clone(), Quantity::parse(text).ok()?));
    node.allocatable.iter().filter_map(parsed).collect()
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
