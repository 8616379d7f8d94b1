//! Which probes run: one task per probe of each tracked container ID, and the verdicts that they reach.
//!
//! The table is locked for look-ups only, never across a probe. A task owns its tally; it ends when its probe is on hold, and is
//! aborted when its container goes, has another ID, or its pod terminates.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use k8s_openapi::api::core::v1 as corev1;
use tokio::{sync::watch, time::Instant};
use tokio_util::task::AbortOnDropHandle;

use super::{
    ContainerVerdicts, PodProbes, ProbeKind, ProbeSettings, ProbeTarget, Readiness, Startup,
    decide::{self, Tally},
    metrics::ProbeMetrics,
    prober::{Attempt, OnContainer, Probing},
    schedule::{self, Eager},
};
use crate::{
    cri::RuntimeService,
    events::EventSink,
    pods::{ContainerKind, ContainerRef, Pod, PodUid},
    time::Clock,
    wake::{Cause, WakeSink},
};

/// The probes of all pods of this node.
pub struct NodeProbes {
    shared: Arc<Shared>,
}

struct Shared {
    prober: Box<dyn Attempt>,
    events: Arc<dyn EventSink>,
    wakes: Arc<dyn WakeSink>,
    clock: Arc<dyn Clock>,
    settings: ProbeSettings,
    metrics: ProbeMetrics,
    pods: Mutex<HashMap<PodUid, TrackedPod>>,
}

struct TrackedPod {
    pod: Pod,
    containers: HashMap<String, TrackedContainer>,
}

struct TrackedContainer {
    target: ProbeTarget,
    verdicts: ContainerVerdicts,
    tasks: HashMap<ProbeKind, AbortOnDropHandle<()>>,
    /// True lets liveness and readiness begin.
    started: watch::Sender<bool>,
    /// Changes when the worker looked at a container that is not ready: readiness is to run soon (contract B-01).
    asked: watch::Sender<()>,
}

impl NodeProbes {
    /// Fails only if the metrics cannot be registered.
    pub fn new(
        runtime: Arc<dyn RuntimeService>,
        events: Arc<dyn EventSink>,
        wakes: Arc<dyn WakeSink>,
        clock: Arc<dyn Clock>,
        settings: ProbeSettings,
    ) -> Result<Self, prometheus::Error> {
        Self::with_prober(Box::new(OnContainer { runtime }), events, wakes, clock, settings)
    }

    fn with_prober(
        prober: Box<dyn Attempt>,
        events: Arc<dyn EventSink>,
        wakes: Arc<dyn WakeSink>,
        clock: Arc<dyn Clock>,
        settings: ProbeSettings,
    ) -> Result<Self, prometheus::Error> {
        let metrics = ProbeMetrics::new()?;
        let pods = Mutex::default();
        Ok(Self { shared: Arc::new(Shared { prober, events, wakes, clock, settings, metrics, pods }) })
    }

    /// What `/metrics/probes` says, in Prometheus text (contract B-11).
    pub fn metrics_text(&self) -> String {
        self.shared.metrics.text()
    }

    /// How many pods something is kept of.
    pub fn pods(&self) -> usize {
        self.shared.lock().len()
    }
}

impl PodProbes for NodeProbes {
    fn track(&self, pod: &Pod, targets: &[ProbeTarget]) {
        let mut pods = self.shared.lock();
        let tracked = pods
            .entry(pod.uid().clone())
            .or_insert_with(|| TrackedPod { pod: pod.clone(), containers: HashMap::new() });
        tracked.pod = pod.clone();
        tracked.containers.retain(|name, tracked| {
            targets.iter().any(|t| t.container == *name && t.container_id == tracked.target.container_id)
        });
        for target in targets {
            match tracked.containers.get_mut(&target.container) {
                Some(container) => container.update(target),
                None => {
                    let container = TrackedContainer::begin(&self.shared, pod, target);
                    tracked.containers.insert(target.container.clone(), container);
                }
            }
        }
    }

    fn verdicts(&self, uid: &PodUid) -> HashMap<String, ContainerVerdicts> {
        let pods = self.shared.lock();
        let containers = pods.get(uid).map(|tracked| &tracked.containers);
        containers.into_iter().flatten().map(|(name, c)| (name.clone(), c.verdicts.clone())).collect()
    }

    fn forget(&self, uid: &PodUid) {
        let tracked = self.shared.lock().remove(uid);
        if let Some(tracked) = tracked {
            self.shared.metrics.forget(&tracked.pod);
        }
    }
}

impl TrackedContainer {
    fn begin(shared: &Arc<Shared>, pod: &Pod, target: &ProbeTarget) -> Self {
        // Plain init containers and ephemeral ones have no probes, whatever their spec says.
        let probed = |c: &ContainerRef<'_>| !matches!(c.kind, ContainerKind::Init | ContainerKind::Ephemeral);
        let container = pod.container(&target.container).filter(probed);
        let verdicts = decide::initial(container.map(|c| c.spec), target);
        let started = watch::Sender::new(verdicts.startup == Startup::Started);
        let asked = watch::Sender::new(());
        let mut tasks = HashMap::new();
        for kind in ProbeKind::ALL {
            let Some(probe) = container.and_then(|c| kind.of(c.spec)) else { continue };
            let runs = match kind {
                ProbeKind::Startup => verdicts.startup == Startup::Pending,
                ProbeKind::Liveness => !target.terminating,
                ProbeKind::Readiness => true,
            };
            if runs {
                let task = ProbeTask {
                    shared: shared.clone(),
                    uid: pod.uid().clone(),
                    target: target.clone(),
                    kind,
                    probe: probe.clone(),
                };
                let running = tokio::spawn(task.run(started.subscribe(), asked.subscribe()));
                tasks.insert(kind, AbortOnDropHandle::new(running));
            }
        }
        Self { target: target.clone(), verdicts, tasks, started, asked }
    }

    /// The same container ID again.
    fn update(&mut self, target: &ProbeTarget) {
        if self.target != *target {
            self.target = target.clone();
        }
        if target.terminating {
            self.tasks.remove(&ProbeKind::Liveness);
            self.tasks.remove(&ProbeKind::Startup);
            decide::quiet_for_termination(&mut self.verdicts);
            self.started.send_if_modified(|started| !std::mem::replace(started, true));
        }
        if self.verdicts.readiness == Readiness::NotReady && self.verdicts.startup == Startup::Started {
            self.asked.send_replace(());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<PodUid, TrackedPod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a probe runs now.
#[derive(Clone, Copy)]
enum Turn {
    /// Its period is over; this was the moment.
    Due(Instant),
    /// The worker looked at a container that is not ready: a run like any other, from which the period counts anew.
    Asked,
    /// A quiet try before the regular run.
    Quiet,
}

/// One probe of one container ID.
struct ProbeTask {
    shared: Arc<Shared>,
    uid: PodUid,
    target: ProbeTarget,
    kind: ProbeKind,
    probe: corev1::Probe,
}

impl ProbeTask {
    async fn run(self, mut started: watch::Receiver<bool>, mut asked: watch::Receiver<()>) {
        let jitter = schedule::jitter(self.shared.settings.seed, &self.target.container_id, self.kind);
        let wall = self.shared.clock.now().wall;
        tokio::time::sleep(schedule::first_wait(&self.probe, &self.target, wall, jitter)).await;
        if self.kind != ProbeKind::Startup && started.wait_for(|started| *started).await.is_err() {
            return;
        }
        let mut tally = Tally::default();
        let mut eager = self.eager();
        // The period counts from the last run that counted.
        let mut last = self.shared.clock.now().mono;
        let mut turn = Turn::Due(last);
        loop {
            asked.mark_unchanged();
            let start = self.shared.clock.now().mono;
            let Some((pod, target)) = self.look() else { return };
            let Some(container) = pod.container(&target.container) else { return };
            let result = match turn {
                Turn::Quiet => self.try_once(&pod, container, &target).await,
                Turn::Due(_) | Turn::Asked => self.probe_once(&pod, container, &target).await,
            };
            let end = self.shared.clock.now().mono;
            match turn {
                Turn::Due(due) => last = schedule::tick(due, start, &self.probe),
                Turn::Quiet if result.is_none() => {}
                Turn::Asked | Turn::Quiet => last = start,
            }
            if let Some(passed) = result {
                self.shared.metrics.observe(&pod, &target.container, self.kind, passed, end - start);
                if passed || target.terminating {
                    eager = None;
                }
                if tally.reaches(passed, &self.probe) && self.settle(passed) {
                    return;
                }
            }
            let retry = eager.as_mut().and_then(|e| e.next(start, end, schedule::next_run(last, &self.probe, false)));
            turn = self.wait(last, retry, &mut asked).await;
        }
    }

    /// Until the next run.
    async fn wait(&self, last: Instant, retry: Option<Instant>, asked: &mut watch::Receiver<()>) -> Turn {
        let mut regular = schedule::next_run(last, &self.probe, false);
        let mut turn = Turn::Due(regular);
        let soon = schedule::next_run(last, &self.probe, true);
        loop {
            let quiet = async {
                match retry {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(regular) => return turn,
                () = quiet => return Turn::Quiet,
                Ok(()) = asked.changed(), if self.kind == ProbeKind::Readiness && soon < regular => {
                    (regular, turn) = (soon, Turn::Asked);
                }
            }
        }
    }

    /// Quiet tries, for a readiness or startup probe that has not passed yet. Never by exec: each would be a process in the container.
    fn eager(&self) -> Option<Eager> {
        let target = &self.target;
        let passed_before = match self.kind {
            ProbeKind::Liveness => return None,
            ProbeKind::Readiness => target.adopted && target.was_ready,
            ProbeKind::Startup => target.adopted && target.was_started,
        };
        let wanted = self.shared.settings.eager_first_readiness && !passed_before && self.probe.exec.is_none();
        wanted.then(|| Eager::new(&self.probe))
    }

    /// A try that only counts when it passes.
    async fn try_once(&self, pod: &Pod, container: ContainerRef<'_>, target: &ProbeTarget) -> Option<bool> {
        self.probing(pod, container, target).try_quietly().await.then_some(true)
    }

    async fn probe_once(&self, pod: &Pod, container: ContainerRef<'_>, target: &ProbeTarget) -> Option<bool> {
        self.probing(pod, container, target).run().await
    }

    fn probing<'a>(&'a self, pod: &'a Pod, container: ContainerRef<'a>, target: &'a ProbeTarget) -> Probing<'a> {
        let (prober, events) = (&*self.shared.prober, &*self.shared.events);
        Probing { prober, events, pod, container, target, kind: self.kind, probe: &self.probe }
    }

    /// The newest pod and target, while they are about the same container ID.
    fn look(&self) -> Option<(Pod, ProbeTarget)> {
        let pods = self.shared.lock();
        let tracked = pods.get(&self.uid)?;
        let container = tracked.containers.get(&self.target.container)?;
        (container.target.container_id == self.target.container_id)
            .then(|| (tracked.pod.clone(), container.target.clone()))
    }

    /// Publishes a decided result, then wakes the pod if a verdict changed. `true`: this probe is on hold.
    fn settle(&self, passed: bool) -> bool {
        let effect = {
            let mut pods = self.shared.lock();
            let container = pods.get_mut(&self.uid).and_then(|p| p.containers.get_mut(&self.target.container));
            let Some(container) = container.filter(|c| c.target.container_id == self.target.container_id) else {
                return true;
            };
            // Aborted a moment ago, while this result was on its way.
            if !container.tasks.contains_key(&self.kind) {
                return true;
            }
            let effect = decide::settle(self.kind, passed, &self.probe, &mut container.verdicts);
            let started = container.verdicts.startup == Startup::Started;
            container.started.send_if_modified(|s| std::mem::replace(s, started) != started);
            effect
        };
        if effect.changed {
            self.shared.wakes.wake(&self.uid, Cause::Probe);
        }
        effect.on_hold
    }
}

#[cfg(test)]
#[path = "tracking_tests.rs"]
mod tests;
