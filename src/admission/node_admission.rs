//! The shell of admission: who holds a place, who was turned away, who waits for whom. One lock, no I/O under it.
//!
//! The worker that asks first has the whole line decided, in order, so that it does not matter which worker runs first. What a decision brings
//! with it (events, kill orders, wakes, a look at the Node) is carried out after the lock is given back.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::{
    AdmissionMetrics, KillOrders, PodAdmission, Rejection, Standing,
    decide::{Candidate, Decision, Occupant, Policy, admit, missing_features},
    declared_features,
    demand::Demand,
};
use crate::{
    cri::{ContainerState, RuntimeStore},
    events::{EventSink, EventType, Regarding},
    node::{NodeFacts, ReadNode},
    pod_worker::view::KillOrder,
    pods::{Pod, PodStore, PodUid},
    resources::{HeldAllocations, PodLedger, is_critical},
    time::Clock,
    wake::{Cause, WakeSink},
};

const PREEMPTING: &str = "Preempting";
const PREEMPTED: &str = "Preempted in order to admit critical pod";
const DISRUPTED: &str = "Pod was preempted by Kubelet to accommodate a critical pod.";
const OVERDUE: &str = "Container runtime did not kill the pod within specified grace period.";
/// A victim is waited for half as long again as its grace period, at least this long.
const LEAST_WAIT: Duration = Duration::from_secs(10);

/// The handles that admission acts through.
pub struct AdmissionParts {
    pub policy: Policy,
    pub store: Arc<PodStore>,
    pub runtime: Arc<RuntimeStore>,
    /// What pods are allocated; a resize may have changed it.
    pub allocations: PodLedger,
    pub node: watch::Receiver<Arc<NodeFacts>>,
    /// Reads the Node from the apiserver; `None` when there is none.
    pub reread: Option<Arc<dyn ReadNode>>,
    pub orders: Arc<dyn KillOrders>,
    pub events: Arc<dyn EventSink>,
    pub wakes: Arc<dyn WakeSink>,
    pub metrics: AdmissionMetrics,
    pub clock: Arc<dyn Clock>,
}

/// See the module. Cheap to clone; all clones share the places.
#[derive(Clone)]
pub struct NodeAdmission(Arc<Inner>);

struct Inner {
    parts: AdmissionParts,
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    entries: BTreeMap<PodUid, Entry>,
    /// Places given so far: the order of arrival.
    arrivals: u64,
    /// Pods on whose account the Node was read again: what speaks against them now is final.
    reread: BTreeSet<PodUid>,
}

enum Entry {
    Holds(Box<Place>),
    Rejected(Rejection),
    /// The Node is being read again on its account.
    Rereading,
    /// It had a place and has left it.
    Left,
}

struct Place {
    arrival: u64,
    occupant: Occupant,
    /// It was preempted for want of this resource.
    preempted_for: Option<String>,
    /// Whose leaving it waits for, and for how long at most.
    waits_for: BTreeSet<PodUid>,
    until: Instant,
}

/// What is to be done once the lock is given back.
#[derive(Default)]
struct Consequences {
    events: Vec<(Pod, String, String)>,
    orders: Vec<(PodUid, KillOrder)>,
    wakes: Vec<PodUid>,
    reread: Vec<PodUid>,
}

/// A pod without a decision.
struct InLine {
    pod: Pod,
    running: bool,
}

impl InLine {
    fn key(&self) -> (bool, bool, Option<jiff::Timestamp>, PodUid) {
        let created = self.pod.metadata().creation_timestamp.as_ref().map(|t| t.0);
        (!self.running, !is_critical(&self.pod), created, self.pod.uid().clone())
    }
}

impl NodeAdmission {
    pub fn new(parts: AdmissionParts) -> Self {
        Self(Arc::new(Inner { parts, places: Mutex::default() }))
    }

    /// How many pods something is kept of.
    pub fn pods(&self) -> usize {
        let ledger = self.0.lock();
        ledger.entries.len().max(ledger.reread.len())
    }

    fn carry_out(&self, consequences: Consequences) {
        let parts = &self.0.parts;
        for (pod, reason, message) in consequences.events {
            parts.events.event(Regarding::Pod(pod), EventType::Warning, &reason, message);
        }
        for (uid, order) in consequences.orders {
            parts.orders.order(&uid, order);
        }
        for uid in consequences.wakes {
            parts.wakes.wake(&uid, Cause::Admission);
        }
        for uid in consequences.reread {
            let admission = self.clone();
            tokio::spawn(async move { admission.read_again(uid).await });
        }
    }

    /// The labels known here may be older than those that the scheduler saw.
    async fn read_again(&self, uid: PodUid) {
        if let Some(node) = &self.0.parts.reread {
            node.read_again().await;
        }
        {
            let mut places = self.0.lock();
            if matches!(places.entries.get(&uid), Some(Entry::Rereading)) {
                places.entries.remove(&uid);
                places.reread.insert(uid.clone());
            }
        }
        self.0.parts.wakes.wake(&uid, Cause::Admission);
    }
}

impl PodAdmission for NodeAdmission {
    fn standing(&self, pod: &Pod) -> Standing {
        let mut consequences = Consequences::default();
        let standing = {
            let mut places = self.0.lock();
            if !places.entries.contains_key(pod.uid()) {
                self.0.decide_line(&mut places, pod, &mut consequences);
            }
            self.0.standing(&mut places, pod.uid(), &mut consequences)
        };
        self.carry_out(consequences);
        standing
    }

    fn release(&self, uid: &PodUid) {
        let mut consequences = Consequences::default();
        {
            let mut places = self.0.lock();
            self.0.leave(&mut places, uid, &mut consequences);
        }
        self.carry_out(consequences);
    }

    fn forget(&self, uid: &PodUid) {
        self.release(uid);
        let mut places = self.0.lock();
        places.entries.remove(uid);
        places.reread.remove(uid);
    }

    fn updated(&self, old: &Pod, new: &Pod) {
        let parts = &self.0.parts;
        let missing = declared_features::missing_for_update(old, new, &parts.policy.declared_features);
        if !missing.is_empty() {
            let regarding = Regarding::Pod(new.clone());
            let message = missing_features(&missing);
            parts.events.event(regarding, EventType::Warning, "FailedNodeDeclaredFeaturesCheck", message);
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides on every pod that has no decision yet, in order, the asking one among them.
    fn decide_line(&self, places: &mut Places, asking: &Pod, consequences: &mut Consequences) {
        let facts = self.parts.node.borrow().clone();
        if !facts.runtime_ready || facts.allocatable.is_empty() || !self.parts.runtime.complete() {
            return;
        }
        let mut desired = self.parts.store.list();
        // Its source may have let it go a moment ago.
        if !desired.iter().any(|pod| pod.uid() == asking.uid()) {
            desired.push(asking.clone());
        }
        let known: HashSet<PodUid> = desired.iter().map(|pod| pod.uid().clone()).collect();
        let mut allocations = self.parts.allocations.hold();
        for pod in &desired {
            places.refresh(pod, &allocations);
        }
        let undecided = desired.into_iter().filter(|pod| !places.entries.contains_key(pod.uid()));
        let mut line: Vec<InLine> = undecided.filter_map(|pod| self.in_line(pod, &facts)).collect();
        line.sort_by_cached_key(InLine::key);
        for next in line {
            self.decide(places, next, &facts, &known, &mut allocations, consequences);
        }
    }

    /// `None`: nothing is to be decided, or not yet.
    fn in_line(&self, pod: Pod, facts: &NodeFacts) -> Option<InLine> {
        let running = self.parts.runtime.pod(pod.uid()).is_some_and(|runtime| {
            runtime.containers.iter().any(|container| container.state == ContainerState::Running)
        });
        let ended = matches!(pod.api_status().phase.as_deref(), Some("Succeeded" | "Failed"));
        // Labels and taints are the API's. A static pod does not wait for it.
        let node_known = facts.node_seen || pod.is_static();
        let wanted = !ended && (pod.deletion_timestamp().is_none() || running) && node_known;
        wanted.then_some(InLine { pod, running })
    }

    fn decide(
        &self,
        places: &mut Places,
        next: InLine,
        facts: &NodeFacts,
        known: &HashSet<PodUid>,
        allocations: &mut HeldAllocations<'_>,
        consequences: &mut Consequences,
    ) {
        let InLine { pod, running } = next;
        // After a restart of the agent: what it was allocated, not what a resize asks for since.
        let pod = allocations.shown(&pod);
        if pod.deletion_timestamp().is_some() {
            // On its way out, and in its place until it is gone.
            return places.place(pod, BTreeSet::new(), self.parts.clock.now().mono);
        }
        let decision = admit(&Candidate { pod: &pod, running }, facts, &places.occupants(known), &self.parts.policy);
        match decision {
            Decision::Admitted => self.admitted(places, pod, BTreeSet::new(), allocations),
            Decision::AdmittedAfter(leaving) => self.admitted(places, pod, leaving, allocations),
            Decision::Rejected { labels_decide: true, .. }
                if self.parts.reread.is_some() && !places.reread.contains(pod.uid()) =>
            {
                consequences.reread.push(pod.uid().clone());
                places.entries.insert(pod.uid().clone(), Entry::Rereading);
            }
            Decision::Rejected { rejection, .. } => {
                allocations.discard(pod.uid());
                self.rejected(places, &pod, rejection, consequences);
            }
            Decision::Preempt { victims, mut leaving, signal } => {
                for victim in &victims {
                    places.preempt(victim, &signal, consequences);
                }
                leaving.extend(victims);
                self.admitted(places, pod, leaving, allocations);
            }
        }
    }

    fn admitted(
        &self,
        places: &mut Places,
        pod: Pod,
        waits_for: BTreeSet<PodUid>,
        allocations: &mut HeldAllocations<'_>,
    ) {
        let wait = waits_for.iter().filter_map(|uid| places.held(uid)).map(|p| longest_wait(&p.occupant.pod)).max();
        let until = self.parts.clock.now().mono + wait.unwrap_or(LEAST_WAIT);
        self.parts.metrics.admitted(&pod);
        allocations.allocate(&pod);
        places.place(pod, waits_for, until);
    }

    fn rejected(&self, places: &mut Places, pod: &Pod, rejection: Rejection, consequences: &mut Consequences) {
        tracing::info!(pod = %pod.described(), reason = rejection.reason, message = rejection.message, "Pod rejected");
        self.parts.metrics.rejected(&rejection);
        consequences.events.push((pod.clone(), rejection.reason.clone(), rejection.message.clone()));
        places.entries.insert(pod.uid().clone(), Entry::Rejected(rejection));
    }

    fn standing(&self, places: &mut Places, uid: &PodUid, consequences: &mut Consequences) -> Standing {
        let place = match places.entries.get_mut(uid) {
            Some(Entry::Holds(place)) => place,
            Some(Entry::Left) => return Standing::Admitted,
            Some(Entry::Rejected(rejection)) => return Standing::Rejected(rejection.clone()),
            Some(Entry::Rereading) | None => return Standing::NotYet { until: None },
        };
        if place.waits_for.is_empty() {
            return Standing::Admitted;
        }
        if self.parts.clock.now().mono < place.until {
            return Standing::NotYet { until: Some(place.until) };
        }
        // As upstream: the critical pod starts beside what cannot be killed.
        let overdue = std::mem::take(&mut place.waits_for);
        let late = overdue.iter().filter_map(|uid| places.held(uid)).map(|p| p.occupant.pod.clone());
        consequences.events.extend(late.map(|pod| (pod, "ExceededGracePeriod".to_owned(), OVERDUE.to_owned())));
        Standing::Admitted
    }

    fn leave(&self, places: &mut Places, uid: &PodUid, consequences: &mut Consequences) {
        match places.entries.get_mut(uid) {
            Some(entry @ Entry::Holds(_)) => {
                if let Entry::Holds(place) = std::mem::replace(entry, Entry::Left)
                    && let Some(signal) = &place.preempted_for
                {
                    self.parts.metrics.preempted(signal);
                }
            }
            // Ended before anything was decided: nothing is to be decided any more.
            Some(Entry::Rereading) => {
                places.entries.remove(uid);
                return;
            }
            _ => return,
        }
        for (waiting, entry) in &mut places.entries {
            if let Entry::Holds(place) = entry
                && place.waits_for.remove(uid)
                && place.waits_for.is_empty()
            {
                consequences.wakes.push(waiting.clone());
            }
        }
    }
}

impl Places {
    fn held(&self, uid: &PodUid) -> Option<&Place> {
        match self.entries.get(uid) {
            Some(Entry::Holds(place)) => Some(place),
            _ => None,
        }
    }

    fn place(&mut self, pod: Pod, waits_for: BTreeSet<PodUid>, until: Instant) {
        let (arrival, uid) = (self.arrivals, pod.uid().clone());
        self.arrivals += 1;
        let place = Place { arrival, occupant: Occupant::new(pod), preempted_for: None, waits_for, until };
        self.entries.insert(uid, Entry::Holds(Box::new(place)));
    }

    /// What the pod holds may have changed by a resize.
    fn refresh(&mut self, pod: &Pod, allocations: &HeldAllocations<'_>) {
        if let Some(Entry::Holds(place)) = self.entries.get_mut(pod.uid()) {
            place.occupant.demand = Demand::of(&allocations.holds(pod));
        }
    }

    /// Who holds a place, in order of arrival. A pod that its source has let go does not count, whatever still runs of it, as upstream.
    fn occupants(&self, known: &HashSet<PodUid>) -> Vec<&Occupant> {
        let held = self.entries.iter().filter(|(uid, _)| known.contains(*uid));
        let mut places: Vec<&Place> = held
            .filter_map(|(_, entry)| match entry {
                Entry::Holds(place) => Some(place.as_ref()),
                _ => None,
            })
            .collect();
        places.sort_by_key(|place| place.arrival);
        places.into_iter().map(|place| &place.occupant).collect()
    }

    fn preempt(&mut self, victim: &PodUid, signal: &str, consequences: &mut Consequences) {
        let Some(Entry::Holds(place)) = self.entries.get_mut(victim) else { return };
        place.occupant.leaving = true;
        place.preempted_for = Some(signal.to_owned());
        let pod = place.occupant.pod.clone();
        tracing::info!(pod = %pod.described(), signal, "Preempting pod to free up resources");
        consequences.events.push((pod, PREEMPTING.to_owned(), PREEMPTED.to_owned()));
        let order = KillOrder {
            reason: PREEMPTING.to_owned(),
            message: PREEMPTED.to_owned(),
            grace: None,
            disruption: Some(DISRUPTED.to_owned()),
        };
        consequences.orders.push((victim.clone(), order));
    }
}

fn longest_wait(victim: &Pod) -> Duration {
    let grace = victim.termination_grace();
    (grace + grace / 2).max(LEAST_WAIT)
}
