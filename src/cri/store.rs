//! What the runtime runs, by pod UID: the one truth, kept by reads, moved forwards by events.
//!
//! Out: snapshots (`Arc<PodRuntime>`) and wakes. A pod is woken when its sandboxes or containers changed, after the snapshot is
//! in place. The lock is never held across an await.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, TryStreamExt, future::try_join, stream};
use jiff::Timestamp;
use thiserror::Error;
use tokio::{sync::Notify, time::Instant};

use super::{
    Container, ContainerState, CriError, PodRuntime, RuntimeService, Sandbox, Seq,
    entry::{PodEntry, PodRead},
    translate, v1,
};
use crate::{
    pods::PodUid,
    time::{Clock, SystemClock},
    wake::{Cause, WakeSink},
};

/// Status calls under way at once during one read. containerd answers them from memory.
const PARALLEL_DETAILS: usize = 16;
/// Kills that containerd told of before the container was known here.
const EARLY_OOMS: usize = 64;
/// A silent runtime makes the node NotReady after this long (contract P-08).
const PLEG_THRESHOLD: Duration = Duration::from_secs(3 * 60);
/// The same with an open event stream, when full lists are only a safety net every few minutes (ours: 1.37 has no such mode).
const PLEG_THRESHOLD_WITH_EVENTS: Duration = Duration::from_secs(10 * 60);

/// Why the node is not ready as far as the runtime's lists go (contract N-17: `PLEG is not healthy: …`).
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlegError {
    #[error("pleg has yet to be successful")]
    NeverSeen,
    #[error("pleg was last seen active {} ago; threshold is {}", go_duration(*.ago), go_duration(*.threshold))]
    Silent { ago: Duration, threshold: Duration },
}

/// A duration as Go prints it: `3m0s`, `1h2m3.5s`.
fn go_duration(duration: Duration) -> String {
    let total = duration.as_secs();
    let (hours, minutes) = (total / 3600, total / 60 % 60);
    let seconds = Duration::new(total % 60, duration.subsec_nanos()).as_secs_f64();
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

/// What a full list brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Relisted {
    /// Pods whose sandboxes or containers were not as held.
    pub surprises: usize,
    /// Pods whose details could not be read; each needs another read.
    pub unread: Vec<PodUid>,
}

#[derive(Default)]
struct State {
    pods: HashMap<PodUid, PodEntry>,
    /// When the last full list was sent, if one ever succeeded.
    listed: Option<(Seq, Timestamp)>,
    /// In that list, but their details could not be read, and nothing older is known.
    unread: HashSet<PodUid>,
    early_ooms: VecDeque<String>,
    last_seen: Option<Instant>,
}

/// One reader at a time per pod, and how its last attempt failed.
type ReadTurn = Arc<tokio::sync::Mutex<Option<(Seq, CriError)>>>;

/// Who reads a pod or waits for its turn. The last to leave takes the turn away: reads may come after the pod's worker has gone.
struct Reading<'a> {
    store: &'a RuntimeStore,
    uid: &'a PodUid,
    turn: ReadTurn,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let mut turns = lock(&self.store.turns);
        // The table's and this one.
        if Arc::strong_count(&self.turn) == 2 {
            turns.remove(self.uid);
        }
    }
}

/// How much of what is listed is asked for again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// Everything that still lives.
    Live,
    /// What is new, or in another state than held.
    Changed,
}

/// See the module.
pub struct RuntimeStore {
    runtime: Arc<dyn RuntimeService>,
    wakes: Arc<dyn WakeSink>,
    clock: Arc<dyn Clock>,
    seq: AtomicU64,
    state: Mutex<State>,
    turns: Mutex<HashMap<PodUid, ReadTurn>>,
    relisting: tokio::sync::Mutex<()>,
    with_events: AtomicBool,
    /// Rings when the first pod appears.
    pub(super) occupied: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RuntimeStore {
    pub fn new(runtime: Arc<dyn RuntimeService>, wakes: Arc<dyn WakeSink>) -> Self {
        Self::with_clock(runtime, wakes, Arc::new(SystemClock))
    }

    /// The clock must be the one the runtime stamps its events with (the machine's; in tests, the fake's).
    pub fn with_clock(runtime: Arc<dyn RuntimeService>, wakes: Arc<dyn WakeSink>, clock: Arc<dyn Clock>) -> Self {
        Self {
            runtime,
            wakes,
            clock,
            seq: AtomicU64::new(0),
            state: Mutex::default(),
            turns: Mutex::default(),
            relisting: tokio::sync::Mutex::new(()),
            with_events: AtomicBool::new(false),
            occupied: Notify::new(),
        }
    }

    /// What is known of a pod. `None`: not known yet. `Some` of an empty [`PodRuntime`]: the runtime has nothing of it, as of that Seq.
    pub fn pod(&self, uid: &PodUid) -> Option<Arc<PodRuntime>> {
        let state = lock(&self.state);
        if let Some(entry) = state.pods.get(uid) {
            return Some(entry.runtime().clone());
        }
        let (as_of, _) = state.listed?;
        (!state.unread.contains(uid)).then(|| Arc::new(PodRuntime { as_of, ..PodRuntime::default() }))
    }

    /// A first full list has succeeded.
    pub fn complete(&self) -> bool {
        lock(&self.state).listed.is_some()
    }

    /// The pods of which the runtime has anything.
    pub fn uids(&self) -> Vec<PodUid> {
        let state = lock(&self.state);
        let held = state.pods.iter().filter(|(_, entry)| !entry.runtime().is_empty()).map(|(uid, _)| uid);
        held.chain(&state.unread).cloned().collect()
    }

    /// How many pods something is kept of, be it only that nothing is left of them.
    pub fn pods(&self) -> usize {
        lock(&self.state).pods.len().max(lock(&self.turns).len())
    }

    /// The next point in the order of reads and action ends.
    pub fn draw(&self) -> Seq {
        Seq(self.seq.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Drops what is kept for a pod that has nothing left; a pod that still has something stays.
    pub fn forget(&self, uid: &PodUid) {
        let mut state = lock(&self.state);
        if state.listed.is_some() && state.pods.get(uid).is_some_and(|entry| entry.runtime().is_empty()) {
            state.pods.remove(uid);
        }
    }

    /// Reads one pod: its lists, then the details of all that lives. What it returns was read after this call began; calls that
    /// wait for the same read share it.
    pub async fn refresh(&self, uid: &PodUid) -> Result<Arc<PodRuntime>, CriError> {
        let asked = self.draw();
        let turn = lock(&self.turns).entry(uid.clone()).or_default().clone();
        let reading = Reading { store: self, uid, turn };
        let mut last_failure = reading.turn.lock().await;
        if let Some(known) = self.pod(uid).filter(|known| known.as_of > asked) {
            return Ok(known);
        }
        if let Some((_, error)) = last_failure.as_ref().filter(|(sent, _)| *sent > asked) {
            return Err(error.clone());
        }
        let as_of = self.draw();
        match self.read_pod(uid, as_of).await {
            Ok(read) => {
                *last_failure = None;
                Ok(self.install(uid, read).0)
            }
            Err(error) => {
                *last_failure = Some((as_of, error.clone()));
                Err(error)
            }
        }
    }

    /// Reads everything: full lists, then the details of what is new or in another state. Finds pods that are gone.
    pub async fn relist(&self) -> Result<Relisted, CriError> {
        let _one_at_a_time = self.relisting.lock().await;
        let (as_of, sent_at) = (self.draw(), self.clock.now().wall);
        let listing = try_join(self.runtime.list_pod_sandbox(None), self.runtime.list_containers(None));
        let (sandboxes, containers) = listing.await?;
        lock(&self.state).last_seen = Some(self.clock.now().mono);
        let found = by_pod(sandboxes, containers);
        let listed: HashSet<PodUid> = found.keys().cloned().collect();

        let reads = stream::iter(found).map(|(uid, (sandboxes, containers))| async move {
            let held = lock(&self.state).pods.get(&uid).map(|entry| entry.runtime().clone());
            let details = self.details(held.as_deref(), sandboxes, containers, Depth::Changed).await;
            (uid, details)
        });
        let reads: Vec<_> = reads.buffer_unordered(PARALLEL_DETAILS).collect().await;

        let mut result = Relisted::default();
        for (uid, details) in reads {
            match details {
                Ok((sandboxes, containers)) => {
                    let (_, changed) = self.install(&uid, PodRead { as_of, sent_at, sandboxes, containers });
                    result.surprises += usize::from(changed);
                }
                Err(error) => {
                    tracing::warn!(pod_uid = %uid, %error, "the runtime lists this pod but does not tell its state");
                    result.unread.push(uid);
                }
            }
        }
        result.surprises += self.finish_list(as_of, sent_at, &listed, &result.unread);
        Ok(result)
    }

    /// Applies one event of the stream. Returns the pod that should be read, if the event leaves a doubt.
    pub fn apply_event(&self, event: v1::ContainerEventResponse) -> Option<PodUid> {
        let at = self.draw();
        let mut state = lock(&self.state);
        state.last_seen = Some(self.clock.now().mono);
        let named = event.pod_sandbox_status.as_ref().and_then(|s| s.metadata.as_ref()).map(|m| m.uid.as_str());
        let uid = match named.filter(|uid| !uid.is_empty()) {
            Some(uid) => PodUid::from(uid),
            None => {
                state.pods.iter().find(|(_, entry)| entry.holds(&event.container_id)).map(|(uid, _)| uid.clone())?
            }
        };
        if !state.pods.contains_key(&uid) {
            // Before the first list nothing can be judged, and that list will show it anyway.
            let (as_of, sent_at) = state.listed?;
            if state.unread.contains(&uid) {
                return Some(uid);
            }
            state.pods.insert(uid.clone(), PodEntry::empty(as_of, sent_at));
        }
        let State { pods, early_ooms, .. } = &mut *state;
        let entry = pods.get_mut(&uid)?;
        let applied = entry.apply(event, at);
        let changed = applied.changed | settle_early_ooms(early_ooms, entry);
        drop(state);
        if changed {
            self.changed(&uid);
        }
        applied.needs_read.then_some(uid)
    }

    /// containerd told that the kernel killed something in this container.
    pub fn mark_oom(&self, container_id: &str) {
        let mut state = lock(&self.state);
        let marked = state.pods.iter_mut().find_map(|(uid, entry)| Some((uid.clone(), entry.mark_oom(container_id)?)));
        if marked.is_none() {
            if state.early_ooms.len() == EARLY_OOMS {
                state.early_ooms.pop_front();
            }
            state.early_ooms.push_back(container_id.to_owned());
        }
        drop(state);
        if let Some((uid, true)) = marked {
            self.changed(&uid);
        }
    }

    /// When the runtime last told something: a full list or an event.
    pub fn last_seen(&self) -> Option<Instant> {
        lock(&self.state).last_seen
    }

    /// Whether the runtime still tells what it runs (contracts P-08, N-17). `now` is the clock's monotonic time.
    pub fn pleg_health(&self, now: Instant) -> Result<(), PlegError> {
        let events = self.with_events.load(Ordering::Relaxed);
        let threshold = if events { PLEG_THRESHOLD_WITH_EVENTS } else { PLEG_THRESHOLD };
        let ago = now.saturating_duration_since(self.last_seen().ok_or(PlegError::NeverSeen)?);
        if ago > threshold { Err(PlegError::Silent { ago, threshold }) } else { Ok(()) }
    }

    /// Set by the stream's follower.
    pub(super) fn set_with_events(&self, open: bool) {
        self.with_events.store(open, Ordering::Relaxed);
    }

    pub(super) fn is_empty(&self) -> bool {
        let state = lock(&self.state);
        state.unread.is_empty() && state.pods.values().all(|entry| entry.runtime().is_empty())
    }

    pub(super) fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    async fn read_pod(&self, uid: &PodUid, as_of: Seq) -> Result<PodRead, CriError> {
        let sent_at = self.clock.now().wall;
        let label_selector = HashMap::from([(translate::POD_UID_LABEL.to_owned(), uid.as_str().to_owned())]);
        let sandboxes = v1::PodSandboxFilter { label_selector: label_selector.clone(), ..Default::default() };
        let containers = v1::ContainerFilter { label_selector, ..Default::default() };
        let (sandboxes, containers) =
            try_join(self.runtime.list_pod_sandbox(Some(sandboxes)), self.runtime.list_containers(Some(containers)))
                .await?;
        let held = lock(&self.state).pods.get(uid).map(|entry| entry.runtime().clone());
        let (sandboxes, containers) = self.details(held.as_deref(), sandboxes, containers, Depth::Live).await?;
        Ok(PodRead { as_of, sent_at, sandboxes, containers })
    }

    /// Turns listed items into full ones, asking the runtime only where what is held may be out of date. What is gone by the time
    /// it is asked for is left out.
    async fn details(
        &self,
        held: Option<&PodRuntime>,
        sandboxes: Vec<v1::PodSandbox>,
        containers: Vec<v1::Container>,
        depth: Depth,
    ) -> Result<(Vec<Sandbox>, Vec<Container>), CriError> {
        let sandboxes = stream::iter(sandboxes).map(|listed| async move {
            let ready = translate::ready(listed.state);
            let known = held.and_then(|h| h.sandboxes.iter().find(|s| s.id == listed.id && s.ready == ready));
            let addressed = |s: &&Sandbox| s.host_network || !s.ips.is_empty();
            match known.filter(|s| !ready || (depth == Depth::Changed && addressed(s))) {
                Some(known) => Ok(Some(known.clone())),
                None => found(self.runtime.pod_sandbox_status(&listed.id).await).map(|s| s.map(translate::sandbox)),
            }
        });
        let containers = stream::iter(containers).map(|listed| async move {
            let state = translate::state(listed.state);
            let known = held.and_then(|h| h.containers.iter().find(|c| c.id == listed.id && c.state == state));
            let now = self.clock.now().wall;
            let settled = |known: &&Container| match state {
                ContainerState::Exited => !known.reason_may_come_late(now),
                ContainerState::Created | ContainerState::Running => depth == Depth::Changed,
                ContainerState::Unknown => false,
            };
            match known.filter(settled) {
                Some(known) => Ok(Some(known.clone())),
                None => found(self.runtime.container_status(&listed.id).await)
                    .map(|s| s.map(|s| translate::container(s, &listed.pod_sandbox_id))),
            }
        });
        let sandboxes = sandboxes.buffered(PARALLEL_DETAILS).try_filter_map(|s| async { Ok(s) }).try_collect();
        let containers = containers.buffered(PARALLEL_DETAILS).try_filter_map(|c| async { Ok(c) }).try_collect();
        try_join(sandboxes, containers).await
    }

    /// Puts a read in place and wakes the pod if it changed.
    fn install(&self, uid: &PodUid, read: PodRead) -> (Arc<PodRuntime>, bool) {
        let mut state = lock(&self.state);
        let State { pods, early_ooms, unread, .. } = &mut *state;
        unread.remove(uid);
        let entry = pods.entry(uid.clone()).or_insert_with(|| PodEntry::empty(Seq(0), Timestamp::MIN));
        let changed = entry.install(read) | settle_early_ooms(early_ooms, entry);
        let runtime = entry.runtime().clone();
        drop(state);
        if changed {
            self.changed(uid);
        }
        (runtime, changed)
    }

    /// Ends a full list: what it did not show is gone. Returns how many pods that surprised.
    fn finish_list(&self, as_of: Seq, sent_at: Timestamp, listed: &HashSet<PodUid>, unread: &[PodUid]) -> usize {
        let mut gone = Vec::new();
        let mut state = lock(&self.state);
        for (uid, entry) in state.pods.iter_mut().filter(|(uid, _)| !listed.contains(*uid)) {
            if entry.install(PodRead { as_of, sent_at, ..PodRead::default() }) {
                gone.push(uid.clone());
            }
        }
        // From here on the list itself says that they are empty, unless a later read or event knows more.
        state.pods.retain(|_, entry| !(entry.is_vacant() && entry.runtime().as_of <= as_of));
        state.unread = unread.iter().filter(|uid| !state.pods.contains_key(*uid)).cloned().collect();
        let first = state.listed.replace((as_of, sent_at)).is_none();
        drop(state);
        if first {
            // Workers wait to hear that the runtime has nothing of their pods, too.
            self.wakes.wake_all(Cause::Runtime);
        }
        for uid in &gone {
            self.changed(uid);
        }
        gone.len()
    }

    fn changed(&self, uid: &PodUid) {
        self.occupied.notify_one();
        self.wakes.wake(uid, Cause::Runtime);
    }
}

/// Marks what containerd told of before the container was known here. Returns whether that changed anything.
fn settle_early_ooms(early: &mut VecDeque<String>, entry: &mut PodEntry) -> bool {
    let mut changed = false;
    early.retain(|id| match entry.mark_oom(id) {
        Some(marked) => {
            changed |= marked;
            false
        }
        None => true,
    });
    changed
}

/// What a status call found: `None` when it is gone meanwhile.
fn found<T>(answer: Result<T, CriError>) -> Result<Option<T>, CriError> {
    match answer {
        Ok(status) => Ok(Some(status)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

type Listed = (Vec<v1::PodSandbox>, Vec<v1::Container>);

/// Sorts full lists by pod. What no kubelet made (no UID) is left out.
fn by_pod(sandboxes: Vec<v1::PodSandbox>, containers: Vec<v1::Container>) -> HashMap<PodUid, Listed> {
    let mut pods: HashMap<PodUid, Listed> = HashMap::new();
    for sandbox in sandboxes {
        if let Some(uid) = translate::sandbox_uid(&sandbox).map(PodUid::from) {
            pods.entry(uid).or_default().0.push(sandbox);
        }
    }
    for container in containers {
        if let Some(uid) = translate::container_uid(&container).map(PodUid::from) {
            pods.entry(uid).or_default().1.push(container);
        }
    }
    pods
}

#[cfg(test)]
#[path = "store_tests.rs"]
pub(super) mod tests;
