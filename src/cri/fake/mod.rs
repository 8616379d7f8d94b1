//! A container runtime in memory, for tests of whoever calls one: both ports, in virtual time, with scripted faults.
//!
//! It behaves as containerd does where that can be seen through CRI: names are reserved, StartContainer of an exited container
//! fails, StopPodSandbox is idempotent and kills, events carry statuses, wait for nobody's headers and pile up while nobody
//! listens. Times come from the given clock and IDs from a counter, so that a run can be repeated exactly.
//! Containers "run" as tokio tasks that sleep. Everything is steered and observed through methods of [`FakeRuntime`].

mod ports;
mod script;
mod world;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::Code;

pub use script::{Call, Events, ExecScript, Fault, ImageScript, OnTerm, Run, Script};
use world::{EventKind, World};

use super::{ContainerState, CriError, v1};
use crate::time::Clock;

/// See the module. Cheap to clone; clones are the same runtime.
#[derive(Clone)]
pub struct FakeRuntime {
    shared: Arc<Shared>,
}

struct Shared {
    clock: Arc<dyn Clock>,
    world: Mutex<World>,
    steering: Mutex<Steering>,
    released: Notify,
}

/// Faults, latencies, and the log of calls.
#[derive(Default)]
struct Steering {
    latency: HashMap<&'static str, Duration>,
    faults: Vec<Armed>,
    calls: Vec<Call>,
    in_flight: HashMap<&'static str, (usize, usize)>,
    down: bool,
    /// Rises with each release; a hung call waits for a higher number than at its start.
    releases: HashMap<&'static str, u64>,
}

struct Armed {
    rpc: &'static str,
    target: Option<String>,
    times: usize,
    fault: Fault,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeRuntime {
    /// Times come from `clock`; give the same one to whatever compares them (`RuntimeStore::with_clock`).
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let world = Mutex::new(World::new());
        Self { shared: Arc::new(Shared { clock, world, steering: Mutex::default(), released: Notify::new() }) }
    }

    // ---- steering ----

    /// Every later call of `rpc` (`"RunPodSandbox"`) takes this long before it acts.
    pub fn latency(&self, rpc: &'static str, latency: Duration) {
        lock(&self.shared.steering).latency.insert(rpc, latency);
    }

    /// The next `times` calls of `rpc` meet the fault.
    pub fn inject(&self, rpc: &'static str, times: usize, fault: Fault) {
        lock(&self.shared.steering).faults.push(Armed { rpc, target: None, times, fault });
    }

    /// As [`Self::inject`], only for calls about `target`: a pod's name or UID, a container's name, an ID, or an image.
    pub fn inject_for(&self, rpc: &'static str, target: &str, times: usize, fault: Fault) {
        lock(&self.shared.steering).faults.push(Armed { rpc, target: Some(target.to_owned()), times, fault });
    }

    /// Lets every call of `rpc` that hangs now go on, and forgets hangs that were not met yet.
    pub fn release(&self, rpc: &'static str) {
        let mut steering = lock(&self.shared.steering);
        *steering.releases.entry(rpc).or_default() += 1;
        steering.faults.retain(|armed| armed.rpc != rpc || armed.fault != Fault::Hang);
        drop(steering);
        self.shared.released.notify_waiters();
    }

    /// Forgets the faults that were not met yet, and lets every call that hangs go on.
    pub fn disarm(&self) {
        let mut steering = lock(&self.shared.steering);
        steering.faults.clear();
        let rpcs: Vec<_> = steering.in_flight.keys().copied().collect();
        for rpc in rpcs {
            *steering.releases.entry(rpc).or_default() += 1;
        }
        drop(steering);
        self.shared.released.notify_waiters();
    }

    /// While down, every call fails as if nothing listened on the socket, and streams break. Containers run on.
    pub fn set_down(&self, down: bool) {
        lock(&self.shared.steering).down = down;
        if down {
            self.break_stream();
        }
    }

    /// How containers of this name behave, start by start; the last script repeats. `name` is `web`, or `pod/web` for one pod.
    pub fn script(&self, name: &str, scripts: impl IntoIterator<Item = Script>) {
        lock(&self.shared.world).scripts.insert(name.to_owned(), scripts.into_iter().collect());
    }

    /// What `ExecSync` in containers of this name does.
    pub fn exec_script(&self, container: &str, script: ExecScript) {
        lock(&self.shared.world).exec_scripts.insert(container.to_owned(), script);
    }

    /// How an image behaves. Images never mentioned can be pulled at once.
    pub fn image(&self, name: &str, script: ImageScript) {
        let mut world = lock(&self.shared.world);
        world.image_scripts.insert(name.to_owned(), script.clone());
        if script == ImageScript::Present {
            world.images.insert(name.to_owned());
        } else {
            world.images.remove(name);
        }
    }

    /// Where exec's streaming server is said to be: `http://127.0.0.1:<port>`.
    /// From now on containers of this name use so much memory. 1 MiB otherwise.
    pub fn memory_use(&self, container: &str, bytes: u64) {
        lock(&self.shared.world).memory_use.insert(container.to_owned(), bytes);
    }

    pub fn streaming_url(&self, base: &str) {
        lock(&self.shared.world).streaming_url = base.to_owned();
    }

    /// How events reach the subscriber from now on.
    pub fn events(&self, events: Events) {
        lock(&self.shared.world).events = events;
    }

    /// Ends every open event stream with an error.
    pub fn break_stream(&self) {
        let broken = CriError::new("GetContainerEvents", Code::Unavailable, "error reading from server: EOF");
        for subscriber in lock(&self.shared.world).subscribers.drain(..) {
            let _ = subscriber.send(Err(broken.clone()));
        }
    }

    /// What Status says of RuntimeReady and NetworkReady.
    pub fn set_conditions(&self, runtime_ready: bool, network_ready: bool) {
        lock(&self.shared.world).conditions = (runtime_ready, network_ready);
    }

    /// What Status says of the runtime's features; nothing, unless set.
    pub fn set_features(&self, features: v1::RuntimeFeatures) {
        lock(&self.shared.world).features = Some(features);
    }

    /// The container's first process ends by itself, now.
    pub fn exit(&self, container_id: &str, code: i32) {
        self.end(container_id, code, None);
    }

    /// The kernel kills the container's first process, now.
    pub fn oom_kill(&self, container_id: &str) {
        self.end(container_id, 137, Some("OOMKilled"));
    }

    /// Corrects the reason of a container that has ended, without an event: containerd learns of out-of-memory kills on a way of its own.
    pub fn tell_oom_late(&self, container_id: &str) {
        if let Some(container) = lock(&self.shared.world).containers.get_mut(container_id) {
            container.reason = "OOMKilled".to_owned();
        }
    }

    /// The sandbox's own process dies: not ready, its containers run on.
    pub fn kill_sandbox(&self, sandbox_id: &str) {
        let now = self.wall();
        let mut world = lock(&self.shared.world);
        if world.sandboxes.get_mut(sandbox_id).is_some_and(|s| std::mem::replace(&mut s.ready, false)) {
            world.emit(EventKind::ContainerStoppedEvent, sandbox_id, sandbox_id, now);
        }
    }

    // ---- observing ----

    /// Every call so far, in order of arrival.
    pub fn calls(&self) -> Vec<Call> {
        lock(&self.shared.steering).calls.clone()
    }

    /// How often `rpc` was called.
    pub fn count(&self, rpc: &str) -> usize {
        lock(&self.shared.steering).calls.iter().filter(|call| call.rpc == rpc).count()
    }

    pub fn clear_calls(&self) {
        lock(&self.shared.steering).calls.clear();
    }

    /// Calls of `rpc` under way, and the most there were at once.
    pub fn in_flight(&self, rpc: &str) -> (usize, usize) {
        lock(&self.shared.steering).in_flight.get(rpc).copied().unwrap_or_default()
    }

    /// The most containers of this pod and name that ever ran at once. More than one is always somebody's mistake.
    pub fn max_running(&self, pod_uid: &str, container: &str) -> usize {
        lock(&self.shared.world).max_running.get(&(pod_uid.to_owned(), container.to_owned())).copied().unwrap_or(0)
    }

    /// The most that [`Self::max_running`] ever was for any container, with its pod UID and name.
    pub fn worst_max_running(&self) -> Option<(String, String, usize)> {
        let world = lock(&self.shared.world);
        let worst = world.max_running.iter().max_by_key(|(_, n)| **n);
        worst.map(|((uid, name), n)| (uid.clone(), name.clone(), *n))
    }

    /// The most sandboxes of this pod that were ready at once.
    pub fn max_ready_sandboxes(&self, pod_uid: &str) -> usize {
        lock(&self.shared.world).max_ready.get(pod_uid).copied().unwrap_or(0)
    }

    /// (ID, state) of this pod's containers of that name, oldest first.
    pub fn containers(&self, pod_uid: &str, name: &str) -> Vec<(String, ContainerState)> {
        let world = lock(&self.shared.world);
        let of_name = world.containers.values().filter(|c| c.pod_uid == pod_uid && c.name == name);
        of_name.map(|c| (c.id.clone(), c.state)).collect()
    }

    /// (ID, ready) of this pod's sandboxes, oldest first.
    pub fn sandboxes(&self, pod_uid: &str) -> Vec<(String, bool)> {
        let world = lock(&self.shared.world);
        let of_pod = world.sandboxes.values().filter(|s| s.uid() == pod_uid);
        of_pod.map(|s| (s.id.clone(), s.ready)).collect()
    }

    /// UIDs of the pods that have a sandbox or a container.
    pub fn pods(&self) -> BTreeSet<String> {
        let world = lock(&self.shared.world);
        let of_sandboxes = world.sandboxes.values().map(|s| s.uid().to_owned());
        of_sandboxes.chain(world.containers.values().map(|c| c.pod_uid.clone())).collect()
    }

    /// How often containers of this pod and name were started.
    pub fn starts(&self, pod_uid: &str, container: &str) -> usize {
        lock(&self.shared.world).starts_of(pod_uid, container)
    }

    /// Drops what is remembered of a pod that is gone: counts, maxima and the scripts of its containers.
    pub fn forget_pod(&self, pod_uid: &str, pod_name: &str) {
        lock(&self.shared.world).forget_pod(pod_uid, pod_name);
    }

    /// What a container was created with.
    pub fn container_config(&self, container_id: &str) -> Option<v1::ContainerConfig> {
        lock(&self.shared.world).containers.get(container_id).map(|c| c.config.clone())
    }

    /// What a sandbox was run with.
    pub fn sandbox_config(&self, sandbox_id: &str) -> Option<v1::PodSandboxConfig> {
        lock(&self.shared.world).sandboxes.get(sandbox_id).map(|s| s.config.clone())
    }

    /// The clock this runtime lives by.
    pub fn shared_clock(&self) -> Arc<dyn Clock> {
        self.shared.clock.clone()
    }

    // ---- inside ----

    fn wall(&self) -> Timestamp {
        self.shared.clock.now().wall
    }

    fn end(&self, container_id: &str, code: i32, reason: Option<&str>) {
        let now = self.wall();
        lock(&self.shared.world).end_container(container_id, code, reason, now);
    }

    /// One call: logged, delayed, made to fail if armed, and only then done, at once and under the lock.
    async fn call<T>(
        &self,
        rpc: &'static str,
        about: Vec<String>,
        act: impl FnOnce(&mut World, Timestamp) -> Result<T, CriError> + Send,
    ) -> Result<T, CriError> {
        self.call_taking(rpc, about, Duration::ZERO, act).await
    }

    /// As [`Self::call`], after this much work of the runtime on top of the latency.
    async fn call_taking<T>(
        &self,
        rpc: &'static str,
        about: Vec<String>,
        work: Duration,
        act: impl FnOnce(&mut World, Timestamp) -> Result<T, CriError> + Send,
    ) -> Result<T, CriError> {
        let (latency, fault, release) = self.begin(rpc, about)?;
        let _in_flight = InFlight { runtime: self, rpc };
        tokio::time::sleep(latency + work).await;
        match &fault {
            Some(Fault::Error { code, message }) => return Err(CriError::new(rpc, *code, message.clone())),
            Some(Fault::Hang) => self.wait_for_release(rpc, release).await,
            Some(Fault::Deadline { after, done: false }) => {
                tokio::time::sleep(*after).await;
                return Err(CriError::new(rpc, Code::DeadlineExceeded, "context deadline exceeded"));
            }
            _ => {}
        }
        let now = self.wall();
        let result = act(&mut lock(&self.shared.world), now);
        match fault {
            Some(Fault::DoneButLost) => Err(CriError::new(rpc, Code::Unavailable, "error reading from server: EOF")),
            Some(Fault::Deadline { after, .. }) => {
                tokio::time::sleep(after).await;
                Err(CriError::new(rpc, Code::DeadlineExceeded, "context deadline exceeded"))
            }
            _ => result,
        }
    }

    fn begin(&self, rpc: &'static str, about: Vec<String>) -> Result<(Duration, Option<Fault>, u64), CriError> {
        let at = self.wall();
        let mut steering = lock(&self.shared.steering);
        let armed = steering.faults.iter_mut().find(|armed| {
            armed.rpc == rpc && armed.times > 0 && armed.target.as_ref().is_none_or(|target| about.contains(target))
        });
        let fault = armed.map(|armed| {
            armed.times -= 1;
            armed.fault.clone()
        });
        steering.faults.retain(|armed| armed.times > 0);
        steering.calls.push(Call { rpc, about, at });
        if steering.down {
            let message = "connection error: desc = \"transport: Error while dialing: dial unix /run/fake.sock: connect: connection refused\"";
            return Err(CriError::new(rpc, Code::Unavailable, message));
        }
        let (now, most) = steering.in_flight.entry(rpc).or_default();
        *now += 1;
        *most = (*most).max(*now);
        let latency = steering.latency.get(rpc).copied().unwrap_or_default();
        let release = steering.releases.get(rpc).copied().unwrap_or_default();
        Ok((latency, fault, release))
    }

    async fn wait_for_release(&self, rpc: &'static str, before: u64) {
        loop {
            let notified = self.shared.released.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if lock(&self.shared.steering).releases.get(rpc).is_some_and(|n| *n > before) {
                return;
            }
            notified.await;
        }
    }

    /// Lets a started container live: it ends by itself if its script says so.
    fn animate(&self, id: String, exited: CancellationToken, run: Run) {
        let Run::For { lasting, code } = run else { return };
        let runtime = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = exited.cancelled() => {}
                () = tokio::time::sleep(lasting) => runtime.end(&id, code, None),
            }
        });
    }

    fn subscribe(&self) -> Result<mpsc::UnboundedReceiver<Result<v1::ContainerEventResponse, CriError>>, CriError> {
        let mut world = lock(&self.shared.world);
        if world.events == Events::Unimplemented {
            return Err(CriError::new(
                "GetContainerEvents",
                Code::Unimplemented,
                "method GetContainerEvents not implemented",
            ));
        }
        let (send, receive) = mpsc::unbounded_channel();
        for stale in world.backlog.drain(..) {
            let _ = send.send(Ok(stale));
        }
        world.subscribers.push(send);
        Ok(receive)
    }
}

/// Counts a call down, also when its future is dropped.
struct InFlight<'a> {
    runtime: &'a FakeRuntime,
    rpc: &'static str,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if let Some((now, _)) = lock(&self.runtime.shared.steering).in_flight.get_mut(self.rpc) {
            *now -= 1;
        }
    }
}

#[cfg(test)]
mod tests;
