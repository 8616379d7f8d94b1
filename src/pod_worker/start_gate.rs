//! The start gate: how many pods are in the runtime's expensive section at once (house plan "Start gate").
//!
//! One permit per RunPodSandbox, CreateContainer and StartContainer call, never for stops or execs. Pods that have begun go before new
//! ones, then by priority, then oldest first: so the median pod of a batch is Ready early. A call that hangs lends its permit on after 5 s.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::oneshot;

/// A permit is lent on when its call takes longer than this.
const LEND_AFTER: Duration = Duration::from_secs(5);

/// Who goes first. Smaller is sooner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Order {
    /// 0: the pod has a sandbox already; 1: a new pod.
    pub new_pod: u8,
    /// The negated priority of the pod.
    pub priority: i64,
}

impl Order {
    pub fn new(has_sandbox: bool, priority: i32) -> Self {
        Self { new_pod: u8::from(!has_sandbox), priority: -i64::from(priority) }
    }
}

/// See the module.
#[derive(Clone)]
pub struct StartGate(Arc<Mutex<Inner>>);

struct Inner {
    free: usize,
    next: u64,
    waiting: BTreeMap<(Order, u64), oneshot::Sender<Permit>>,
}

/// Given back when dropped.
struct Permit(Option<StartGate>);

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(gate) = self.0.take() {
            gate.release();
        }
    }
}

impl StartGate {
    pub fn new(width: usize) -> Self {
        Self(Arc::new(Mutex::new(Inner { free: width.max(1), next: 0, waiting: BTreeMap::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `call` under a permit. The future keeps running, without the permit, when it takes too long.
    pub async fn run<T>(&self, order: Order, call: impl Future<Output = T>) -> T {
        let permit = self.enter(order).await;
        tokio::pin!(call);
        tokio::select! {
            biased;
            out = &mut call => return out,
            () = tokio::time::sleep(LEND_AFTER) => drop(permit),
        }
        call.await
    }

    async fn enter(&self, order: Order) -> Permit {
        let turn = {
            let mut inner = self.lock();
            if inner.free > 0 {
                inner.free -= 1;
                return Permit(Some(self.clone()));
            }
            let (sender, receiver) = oneshot::channel();
            let number = inner.next;
            inner.next += 1;
            inner.waiting.insert((order, number), sender);
            receiver
        };
        // The sender is only dropped with the gate itself.
        turn.await.unwrap_or(Permit(None))
    }

    fn release(&self) {
        loop {
            let next = {
                let mut inner = self.lock();
                match inner.waiting.pop_first() {
                    Some((_, sender)) => sender,
                    None => {
                        inner.free += 1;
                        return;
                    }
                }
            };
            match next.send(Permit(Some(self.clone()))) {
                Ok(()) => return,
                // That one gave up waiting: keep its permit from releasing again, and ask the next.
                Err(mut permit) => permit.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test(start_paused = true)]
    async fn begun_pods_go_first_then_priority_then_age() {
        let gate = StartGate::new(1);
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = Vec::new();
        let orders =
            [("first", false, 0), ("new", false, 0), ("high", false, 9), ("begun", true, 0), ("new2", false, 0)];
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
        assert_eq!(*log.lock().unwrap(), ["first", "begun", "high", "new", "new2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn width_is_kept_and_waiters_that_gave_up_cost_nothing() {
        let gate = StartGate::new(2);
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = Vec::new();
        for i in 0..20 {
            let (gate, running, most) = (gate.clone(), Arc::clone(&running), Arc::clone(&most));
            let task = tokio::spawn(async move {
                gate.run(Order::new(false, 0), async {
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
        assert_eq!(gate.lock().free, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hung_call_lends_its_permit_on() {
        let gate = StartGate::new(1);
        let hung = tokio::spawn({
            let gate = gate.clone();
            async move { gate.run(Order::new(false, 0), std::future::pending::<()>()).await }
        });
        tokio::task::yield_now().await;
        let started = tokio::time::Instant::now();
        gate.run(Order::new(false, 0), async {}).await;
        assert_eq!(started.elapsed(), LEND_AFTER);
        hung.abort();
    }
}
