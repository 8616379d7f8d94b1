//! The start gate: how many pods are in the runtime's expensive section at once (house plan "Start gate").
//!
//! One permit per RunPodSandbox, CreateContainer and StartContainer call, never for stops or execs. Critical pods go first; then pods that
//! have begun, before new ones; then by priority; then whoever began, or asked, first: so pods are finished one after the other, and the
//! median pod of a batch is Ready in about half the time of all. Every fourth new pod is the one that has waited longest, whatever its
//! priority. A call that hangs lends its permit on after 5 s. How wide the gate is, [`Width`] finds out.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::oneshot;

use super::gate_width::Width;
use crate::{rush::Rush, time::Clock};

/// A permit is lent on when its call takes longer than this.
const LEND_AFTER: Duration = Duration::from_secs(5);
/// Of so many new pods that are let in one is the oldest that waits.
const OLDEST_EVERY: u32 = 4;
/// `system-cluster-critical` and above.
const CRITICAL: i32 = 2_000_000_000;

/// Who goes first. Smaller is sooner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Order {
    /// 0: a critical pod; 1: any other.
    ordinary: u8,
    /// 0: the pod has a sandbox already; 1: a new pod.
    new_pod: u8,
    /// The negated priority of the pod.
    priority: i64,
    /// When its sandbox was made.
    begun: Option<Timestamp>,
}

impl Order {
    /// `begun`: when the pod's sandbox was made, `None` for a new pod.
    pub fn new(begun: Option<Timestamp>, priority: i32) -> Self {
        Self {
            ordinary: u8::from(priority < CRITICAL),
            new_pod: u8::from(begun.is_none()),
            priority: -i64::from(priority),
            begun,
        }
    }
}

/// See the module.
#[derive(Clone)]
pub struct StartGate(Arc<Shared>);

struct Shared {
    clock: Option<Arc<dyn Clock>>,
    /// On while anybody waits.
    rush: Rush,
    inner: Mutex<Inner>,
}

struct Inner {
    width: Width,
    running: usize,
    next: u64,
    /// New pods let in since the oldest was.
    new_pods: u32,
    waiting: BTreeMap<(Order, u64), oneshot::Sender<Permit>>,
}

impl Inner {
    fn next_waiter(&mut self) -> Option<oneshot::Sender<Permit>> {
        let first = *self.waiting.first_key_value()?.0;
        let mut chosen = first;
        if first.0.new_pod == 1 && first.0.ordinary == 1 {
            self.new_pods += 1;
            if self.new_pods >= OLDEST_EVERY {
                self.new_pods = 0;
                chosen = self.waiting.keys().copied().min_by_key(|(_, number)| *number).unwrap_or(first);
            }
        }
        self.waiting.remove(&chosen)
    }
}

/// Given back when dropped.
struct Permit(Option<StartGate>);

impl Permit {
    /// The call it was for has ended, as opposed to was given up.
    fn call_ended(&self) {
        if let Some(gate) = &self.0
            && let Some(clock) = &gate.0.clock
        {
            let at = clock.now().mono;
            let mut inner = gate.lock();
            let queued = !inner.waiting.is_empty();
            inner.width.call_ended(at, queued);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(gate) = self.0.take() {
            gate.release();
        }
    }
}

impl StartGate {
    /// Of one width for ever.
    pub fn new(width: usize) -> Self {
        Self::with(Width::new(width, width), None, Rush::default())
    }

    /// Finds its width between `least` and `most` by how fast the calls under it end, and tells `rush` while anybody waits.
    pub fn adaptive(least: usize, most: usize, clock: Arc<dyn Clock>, rush: Rush) -> Self {
        Self::with(Width::new(least, most), Some(clock), rush)
    }

    fn with(width: Width, clock: Option<Arc<dyn Clock>>, rush: Rush) -> Self {
        let inner = Inner { width, running: 0, next: 0, new_pods: 0, waiting: BTreeMap::new() };
        Self(Arc::new(Shared { clock, rush, inner: Mutex::new(inner) }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `call` under a permit. The future keeps running, without the permit, when it takes too long.
    pub async fn run<T>(&self, order: Order, call: impl Future<Output = T>) -> T {
        let permit = self.enter(order).await;
        tokio::pin!(call);
        tokio::select! {
            biased;
            out = &mut call => {
                permit.call_ended();
                return out;
            }
            () = tokio::time::sleep(LEND_AFTER) => drop(permit),
        }
        call.await
    }

    async fn enter(&self, order: Order) -> Permit {
        let turn = {
            let mut inner = self.lock();
            if inner.running < inner.width.get() {
                inner.running += 1;
                return Permit(Some(self.clone()));
            }
            let (sender, receiver) = oneshot::channel();
            let number = inner.next;
            inner.next += 1;
            inner.waiting.insert((order, number), sender);
            self.0.rush.set(true);
            receiver
        };
        // The sender is only dropped with the gate itself.
        turn.await.unwrap_or(Permit(None))
    }

    /// One permit came back: lets in as many as the width has room for.
    fn release(&self) {
        self.lock().running -= 1;
        loop {
            let next = {
                let mut inner = self.lock();
                if inner.running >= inner.width.get() {
                    return;
                }
                let next = inner.next_waiter();
                self.0.rush.set(!inner.waiting.is_empty());
                let Some(next) = next else { return };
                inner.running += 1;
                next
            };
            if let Err(mut permit) = next.send(Permit(Some(self.clone()))) {
                // That one gave up waiting: keep its permit from releasing again, and ask the next.
                permit.0 = None;
                self.lock().running -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
    use tokio::time::Instant;

    use super::*;
    use crate::time::SimulatedClock;

    fn begun(second: i64) -> Option<Timestamp> {
        Some(Timestamp::from_second(second).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn critical_pods_go_first_then_begun_ones_by_age_then_priority_then_age() {
        let gate = StartGate::new(1);
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        let orders = [
            ("first", None, 0),
            ("new", None, 0),
            ("high", None, 9),
            ("begun late", begun(7), 0),
            ("begun early", begun(5), 0),
            ("new2", None, 0),
            ("critical", None, CRITICAL),
        ];
        for (name, begun, priority) in orders {
            let (gate, log) = (gate.clone(), Arc::clone(&log));
            tasks.push(tokio::spawn(async move {
                gate.run(Order::new(begun, priority), async {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    log.lock().unwrap().push(name);
                })
                .await;
            }));
            tokio::task::yield_now().await;
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*log.lock().unwrap(), ["first", "critical", "begun early", "begun late", "high", "new", "new2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_important_pods_does_not_starve_the_others() {
        let gate = StartGate::new(1);
        let call = || async { tokio::time::sleep(Duration::from_millis(10)).await };
        let held = tokio::spawn({
            let gate = gate.clone();
            async move { gate.run(Order::new(None, 0), call()).await }
        });
        tokio::task::yield_now().await;
        let meek = tokio::spawn({
            let gate = gate.clone();
            async move { gate.run(Order::new(None, -5), call()).await }
        });
        tokio::task::yield_now().await;
        let important: Vec<_> = (0..100)
            .map(|_| {
                let gate = gate.clone();
                tokio::spawn(async move { gate.run(Order::new(None, 1000), call()).await })
            })
            .collect();
        held.await.unwrap();
        meek.await.unwrap();
        assert!(important.iter().filter(|t| t.is_finished()).count() <= 4);
        for task in important {
            task.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn width_is_kept_and_waiters_that_gave_up_cost_nothing() {
        let gate = StartGate::new(2);
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = Vec::new();
        for i in 0..20 {
            let (gate, running, most) = (gate.clone(), Arc::clone(&running), Arc::clone(&most));
            let task = tokio::spawn(async move {
                gate.run(Order::new(None, 0), async {
                    most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    running.fetch_sub(1, Ordering::SeqCst);
                })
                .await;
            });
            tokio::task::yield_now().await;
            if i % 5 == 4 {
                task.abort();
            } else {
                tasks.push(task);
            }
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(most.load(Ordering::SeqCst), 2);
        let inner = gate.lock();
        assert_eq!((inner.running, inner.waiting.len()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn there_is_a_rush_while_anybody_waits() {
        let clock = Arc::new(SimulatedClock::starting_at(Timestamp::UNIX_EPOCH));
        let rush = Rush::default();
        let gate = StartGate::adaptive(1, 1, clock, rush.clone());
        let call = || async { tokio::time::sleep(Duration::from_secs(1)).await };
        let pod = || gate.run(Order::new(None, 0), call());
        let seen = async {
            let mut seen = Vec::new();
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_millis(700)).await;
                seen.push(rush.is_on());
            }
            seen
        };
        let ((), (), (), seen) = tokio::join!(pod(), pod(), pod(), seen);
        assert_eq!(seen, [true, true, false, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hung_call_lends_its_permit_on() {
        let gate = StartGate::new(1);
        let hung = tokio::spawn({
            let gate = gate.clone();
            async move { gate.run(Order::new(None, 0), std::future::pending::<()>()).await }
        });
        tokio::task::yield_now().await;
        let started = Instant::now();
        gate.run(Order::new(None, 0), async {}).await;
        assert_eq!(started.elapsed(), LEND_AFTER);
        hung.abort();
    }

    /// A runtime on `cores`: a call computes for a while, all calls sharing the cores, and then waits for a while.
    struct Machine {
        cores: f64,
        busy: AtomicUsize,
    }

    impl Machine {
        async fn call(&self, compute: f64, wait: f64) {
            const TICK: f64 = 0.005;
            let mut left = compute;
            self.busy.fetch_add(1, Ordering::SeqCst);
            while left > 0.0 {
                let share = (self.cores / self.busy.load(Ordering::SeqCst) as f64).min(1.0);
                tokio::time::sleep(Duration::from_secs_f64(TICK)).await;
                left -= TICK * share;
            }
            self.busy.fetch_sub(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_secs_f64(wait)).await;
        }
    }

    #[derive(Clone, Copy)]
    struct Start {
        priority: i32,
        containers: usize,
        compute: f64,
        wait: f64,
    }

    /// When each pod of a batch was Ready, in seconds, in the order given.
    async fn batch(gate: &StartGate, pods: &[Start]) -> Vec<f64> {
        let machine = Arc::new(Machine { cores: 2.0, busy: AtomicUsize::new(0) });
        let start = Instant::now();
        let tasks: Vec<_> = pods
            .iter()
            .map(|pod| {
                let (gate, machine, pod) = (gate.clone(), Arc::clone(&machine), *pod);
                tokio::spawn(async move {
                    gate.run(Order::new(None, pod.priority), machine.call(pod.compute, pod.wait)).await;
                    let made = begun(start.elapsed().as_millis() as i64);
                    for _ in 0..2 * pod.containers {
                        let half = machine.call(pod.compute / 2.0, pod.wait / 2.0);
                        gate.run(Order::new(made, pod.priority), half).await;
                    }
                    start.elapsed().as_secs_f64()
                })
            })
            .collect();
        let mut ready = Vec::new();
        for task in tasks {
            ready.push(task.await.unwrap());
        }
        ready
    }

    fn median_and_total(ready: &[f64]) -> (f64, f64) {
        let mut sorted = ready.to_vec();
        sorted.sort_by(f64::total_cmp);
        (sorted[sorted.len() / 2], sorted[sorted.len() - 1])
    }

    fn adaptive() -> StartGate {
        StartGate::adaptive(2, 8, Arc::new(SimulatedClock::starting_at(Timestamp::UNIX_EPOCH)), Rush::default())
    }

    #[tokio::test(start_paused = true)]
    async fn the_median_pod_of_any_batch_is_ready_in_about_half_the_time_and_all_at_the_runtimes_pace() {
        for seed in 0..5 {
            let mut random = StdRng::seed_from_u64(seed);
            let (compute, wait) = (random.random_range(0.02..0.12), random.random_range(0.0..0.12));
            let pods: Vec<Start> = (0..random.random_range(30..70))
                .map(|_| Start {
                    priority: random.random_range(0..3),
                    containers: random.random_range(1..4),
                    compute: compute * random.random_range(0.5..1.5),
                    wait: wait * random.random_range(0.5..1.5),
                })
                .collect();
            let (median, total) = median_and_total(&batch(&adaptive(), &pods).await);
            assert!(median < 0.66 * total, "seed {seed}: median {median:.2} of {total:.2}");
            let (all_median, all_at_once) = median_and_total(&batch(&StartGate::new(pods.len()), &pods).await);
            assert!(total < 1.45 * all_at_once, "seed {seed}: {total:.2}, all at once {all_at_once:.2}");
            assert!(median < all_median, "seed {seed}: {median:.2}, all at once {all_median:.2}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_that_waits_much_is_kept_busier_than_its_cores() {
        let pods = [Start { priority: 0, containers: 1, compute: 0.02, wait: 0.1 }; 100];
        let (_, narrow) = median_and_total(&batch(&StartGate::new(2), &pods).await);
        let (median, total) = median_and_total(&batch(&adaptive(), &pods).await);
        assert!(total < 0.6 * narrow, "{total:.2}, at the width of the cores {narrow:.2}");
        // It widens as it goes: the second half is the faster one.
        assert!(median < 0.7 * total, "{median:.2} of {total:.2}");
    }

    #[tokio::test(start_paused = true)]
    async fn critical_pods_of_a_batch_are_ready_first() {
        let pods: Vec<Start> = (0..80)
            .map(|n| Start {
                priority: if n % 20 == 19 { CRITICAL } else { 0 },
                containers: 1,
                compute: 0.05,
                wait: 0.05,
            })
            .collect();
        let ready = batch(&adaptive(), &pods).await;
        let last_critical = (19..80).step_by(20).map(|n| ready[n]).fold(0.0, f64::max);
        let before = ready.iter().filter(|at| **at < last_critical).count();
        assert!(before <= 8, "{before} pods were ready before the last critical one");
    }
}
