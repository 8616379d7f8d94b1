//! Sends pod statuses to the apiserver and, at a pod's end, its DELETE (contract P-44, P-10).
//!
//! In: the newest status of each pod, from its worker. Out: PATCH requests, acknowledgements, wakes with `Cause::Published`. One request
//! at a time per pod and [`IN_FLIGHT`] in all; a newer status replaces one that waits. Nothing is lost: a request is repeated with
//! back-off until it is answered, or the pod is gone. There is no batching delay: a status leaves when it is offered, but for one that
//! says no more than that the start goes on: it waits [`STARTING_WAITS`] for a better one (in a rush [`RUSH_WAITS`]), since each write
//! costs the starts some of the node's time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use http::Method;
use k8s_openapi::api::core::v1::PodStatus;
use prometheus::{Histogram, HistogramOpts, Registry};
use serde::Deserialize;
use serde_json::json;
use tokio::{
    sync::{Notify, Semaphore, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    StatusPublisher,
    patch::{patch_for, same},
    phase::only_starting,
};
use crate::{
    api::{
        ApiClients, Backoff,
        presence::{self, Presence},
        rest::{self, BareMeta, RestError},
    },
    pods::{Pod, PodUid},
    rush::Rush,
    time::{Clock, SystemClock},
    wake::{Cause, WakeSink},
};

/// Requests under way at once.
const IN_FLIGHT: usize = 16;
/// A status that the apiserver rejects as invalid is tried again this late, or when a newer one is offered.
const REJECTED_PAUSE: Duration = Duration::from_secs(60);
/// Most pods are up before this has passed, and nobody sees it pass.
const STARTING_WAITS: Duration = Duration::from_millis(500);
const RUSH_WAITS: Duration = Duration::from_secs(5);

/// [`StatusPublisher`] over the general API client. Make it inside the runtime. Clones are the same publisher.
#[derive(Clone)]
pub struct ApiPublisher(Arc<Shared>);

struct Shared {
    clients: ApiClients,
    wakes: Arc<dyn WakeSink>,
    rush: Rush,
    records: Mutex<Records>,
    slots: Semaphore,
    sync_seconds: OnceLock<Histogram>,
    /// Pods with something unsent.
    busy: watch::Sender<usize>,
    cancel: CancellationToken,
    runtime: tokio::runtime::Handle,
}

#[derive(Default)]
struct Records {
    by_uid: HashMap<PodUid, Record>,
    next_serial: u64,
}

struct Record {
    /// Tells a forgotten record from a new one of the same UID.
    serial: u64,
    pod: Pod,
    status: Arc<PodStatus>,
    version: u64,
    acknowledged: u64,
    /// When the oldest status that is not acknowledged was offered.
    unsent_since: Option<Instant>,
    /// What the API holds, as far as known.
    held: Held,
    /// `held` differs from the acknowledged status because somebody else wrote: send again.
    drifted: bool,
    delete: Deletion,
    gone: bool,
    sending: bool,
    news: Arc<Notify>,
}

struct Held {
    version: u64,
    status: Arc<PodStatus>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deletion {
    No,
    Wanted,
    Sent,
}

/// What a pod's sender does next.
enum Job {
    Patch { pod: Pod, body: serde_json::Value, version: u64 },
    Delete(Pod),
}

enum Next {
    Now(Job),
    /// Not before this, unless something better is offered.
    At(Instant),
    Nothing,
}

enum Outcome {
    /// The pod as the apiserver now has it.
    Written {
        version: u64,
        held: Held,
    },
    Deleted,
    /// The UID does not exist any more.
    Gone,
    Again(RestError),
}

#[derive(Deserialize)]
struct PodAnswer {
    metadata: BareMeta,
    status: Option<PodStatus>,
}

impl Record {
    fn next(&mut self, uid: &PodUid, now: Instant, rush: bool) -> Next {
        if self.gone {
            return Next::Nothing;
        }
        if self.acknowledged < self.version || self.drifted {
            match patch_for(&self.held.status, &self.status, uid) {
                Some(body) => match self.waits_until(rush).filter(|at| *at > now) {
                    Some(at) => return Next::At(at),
                    None => return Next::Now(Job::Patch { pod: self.pod.clone(), body, version: self.version }),
                },
                None => {
                    self.drifted = false;
                    self.acknowledged = self.version;
                    self.unsent_since = None;
                }
            }
        }
        match self.delete {
            Deletion::Wanted => Next::Now(Job::Delete(self.pod.clone())),
            Deletion::No | Deletion::Sent => Next::Nothing,
        }
    }

    fn waits_until(&self, rush: bool) -> Option<Instant> {
        let waits = self.delete == Deletion::No && !self.drifted && only_starting(&self.status);
        self.unsent_since.filter(|_| waits).map(|since| since + if rush { RUSH_WAITS } else { STARTING_WAITS })
    }

    fn learn(&mut self, held: Held) {
        if held.version >= self.held.version {
            self.held = held;
        }
    }
}

fn held(pod: &Pod) -> Held {
    let version = pod.metadata().resource_version.as_deref().and_then(rest::version_number).unwrap_or(0);
    Held { version, status: Arc::new(pod.api_status().clone()) }
}

impl ApiPublisher {
    pub fn new(clients: ApiClients, wakes: Arc<dyn WakeSink>, rush: Rush, cancel: CancellationToken) -> Self {
        Self(Arc::new(Shared {
            clients,
            wakes,
            rush,
            records: Mutex::default(),
            slots: Semaphore::new(IN_FLIGHT),
            sync_seconds: OnceLock::new(),
            busy: watch::Sender::new(0),
            cancel,
            runtime: tokio::runtime::Handle::current(),
        }))
    }

    /// Registers `kubelet_pod_status_sync_duration_seconds`. Fails only if the name is taken.
    pub fn register_metrics(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        let help = "[ALPHA] Seconds from a change of a pod's status to its acknowledgement by the API.";
        let options = HistogramOpts::new("kubelet_pod_status_sync_duration_seconds", help)
            .buckets(vec![0.010, 0.050, 0.100, 0.500, 1.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0]);
        let seconds = Histogram::with_opts(options)?;
        registry.register(Box::new(seconds.clone()))?;
        // A second registration would have failed above, for its name.
        self.0.sync_seconds.set(seconds).ok();
        Ok(())
    }

    /// The newest status offered of a pod: what this node says of it, sent or not.
    pub fn newest(&self, uid: &PodUid) -> Option<PodStatus> {
        let records = self.0.records.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        records.by_uid.get(uid).map(|record| PodStatus::clone(&record.status))
    }

    /// Returns when every status offered so far is acknowledged: for an orderly shutdown, under the caller's deadline.
    pub async fn drained(&self) {
        let mut busy = self.0.busy.subscribe();
        // An error means that the publisher is gone, and so is what it had to send.
        busy.wait_for(|pods| *pods == 0).await.ok();
    }

    /// How many pods something is kept of.
    pub fn pods(&self) -> usize {
        self.0.lock().by_uid.len()
    }

    /// Pods with a status or a DELETE not yet acknowledged: a gauge.
    pub fn pending(&self) -> usize {
        *self.0.busy.borrow()
    }
}

impl StatusPublisher for ApiPublisher {
    fn offer(&self, pod: &Pod, status: PodStatus) -> u64 {
        let uid = pod.uid();
        let (version, acknowledged) = {
            let mut records = self.0.lock();
            let record = records.get_or_insert(pod);
            if record.pod.metadata().resource_version != pod.metadata().resource_version {
                let fresh = held(pod);
                let went_back = fresh.version < held(&record.pod).version;
                if fresh.version > record.held.version || went_back {
                    record.held = fresh;
                    record.drifted = record.version > 0;
                }
            }
            record.pod = pod.clone();
            if record.version == 0 || !same(&record.status, &status) {
                record.status = Arc::new(status);
                record.version += 1;
                record.unsent_since.get_or_insert_with(|| SystemClock.now().mono);
                record.news.notify_one();
            }
            let before = record.acknowledged;
            if record.gone || pod.is_static() {
                record.acknowledged = record.version;
            } else if !record.sending {
                // Settles at once when the API already holds this status.
                let due = !matches!(record.next(uid, SystemClock.now().mono, false), Next::Nothing);
                self.0.start(record, uid, due);
            }
            (record.version, record.acknowledged != before)
        };
        if acknowledged {
            self.0.wakes.wake(uid, Cause::Published);
        }
        version
    }

    fn acknowledged(&self, uid: &PodUid) -> u64 {
        self.0.lock().by_uid.get(uid).map_or(0, |r| r.acknowledged)
    }

    fn delete(&self, pod: &Pod) {
        if pod.is_static() {
            return;
        }
        let mut records = self.0.lock();
        let record = records.get_or_insert(pod);
        if record.delete == Deletion::No && !record.gone {
            record.delete = Deletion::Wanted;
            record.news.notify_one();
            let due = !record.sending;
            self.0.start(record, pod.uid(), due);
        }
    }

    fn forget(&self, uid: &PodUid) {
        let record = self.0.lock().by_uid.remove(uid);
        if let Some(record) = record {
            record.news.notify_one();
        }
    }
}

impl Records {
    fn get_or_insert(&mut self, pod: &Pod) -> &mut Record {
        let next = &mut self.next_serial;
        self.by_uid.entry(pod.uid().clone()).or_insert_with(|| {
            *next += 1;
            Record {
                serial: *next,
                pod: pod.clone(),
                status: Arc::default(),
                version: 0,
                acknowledged: 0,
                unsent_since: None,
                held: held(pod),
                drifted: false,
                delete: Deletion::No,
                gone: false,
                sending: false,
                news: Arc::default(),
            }
        })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(self: &Arc<Self>, record: &mut Record, uid: &PodUid, due: bool) {
        if !due {
            return;
        }
        record.sending = true;
        self.busy.send_modify(|pods| *pods += 1);
        let (shared, uid, serial, news) = (Arc::clone(self), uid.clone(), record.serial, Arc::clone(&record.news));
        self.runtime.spawn(async move {
            let cancel = shared.cancel.clone();
            tokio::select! {
                () = shared.send_all(&uid, serial, &news) => {}
                () = cancel.cancelled() => {}
            }
            shared.busy.send_modify(|pods| *pods -= 1);
        });
    }

    /// Sends until nothing is left to send for this pod.
    async fn send_all(&self, uid: &PodUid, serial: u64, news: &Notify) {
        let mut backoff = Backoff::new();
        loop {
            let step = {
                let Ok(_slot) = self.slots.acquire().await else { return };
                match self.take(uid, serial) {
                    (Next::Now(job), version) => Ok((self.carry_out(uid, job).await, version)),
                    (Next::At(at), _) => Err(at),
                    (Next::Nothing, _) => return,
                }
            };
            let (outcome, tried) = match step {
                Ok(sent) => sent,
                Err(not_before) => {
                    let rush_ends = async {
                        self.rush.over().await;
                        tokio::time::sleep(STARTING_WAITS).await;
                    };
                    tokio::select! {
                        () = news.notified() => {}
                        () = tokio::time::sleep_until(not_before) => {}
                        () = rush_ends, if self.rush.is_on() => {}
                    }
                    continue;
                }
            };
            let Some(error) = self.settle(uid, serial, outcome) else {
                backoff.reset();
                continue;
            };
            tracing::warn!(%uid, %error, "pod status cannot be written, trying again");
            if error.is_rejected() && !error.is_conflict() {
                // The same status would be rejected again; a newer one may not.
                let newer = async {
                    while self.version(uid, serial) == Some(tried) {
                        news.notified().await;
                    }
                };
                tokio::time::timeout(REJECTED_PAUSE, newer).await.ok();
            } else {
                tokio::time::sleep(backoff.delay(error.retry_after())).await;
            }
        }
    }

    fn version(&self, uid: &PodUid, serial: u64) -> Option<u64> {
        self.lock().by_uid.get(uid).filter(|r| r.serial == serial).map(|r| r.version)
    }

    /// The newest thing to send, and the version it belongs to; `Nothing` ends the sender.
    fn take(&self, uid: &PodUid, serial: u64) -> (Next, u64) {
        let mut records = self.lock();
        let Some(record) = records.by_uid.get_mut(uid).filter(|r| r.serial == serial) else {
            return (Next::Nothing, 0);
        };
        let before = record.acknowledged;
        let next = record.next(uid, SystemClock.now().mono, self.rush.is_on());
        record.sending = !matches!(next, Next::Nothing);
        let changed = record.acknowledged != before;
        let version = record.version;
        drop(records);
        if changed {
            self.wakes.wake(uid, Cause::Published);
        }
        (next, version)
    }

    async fn carry_out(&self, uid: &PodUid, job: Job) -> Outcome {
        let (pod, answer) = match job {
            Job::Patch { pod, body, version } => {
                let answer = self.patch(&pod, &body, version).await;
                (pod, answer)
            }
            Job::Delete(pod) => {
                let answer = self.delete(&pod, uid).await;
                (pod, answer)
            }
        };
        match answer {
            Ok(outcome) => outcome,
            Err(error) if error.is_not_found() => Outcome::Gone,
            // 409 and 422 may mean another UID under this name, 403 a pod that the node authorizer has forgotten: a read tells.
            Err(error) if matches!(error.code(), Some(403 | 409 | 422)) => {
                match presence::of_pod(&self.clients.general, &pod).await {
                    Presence::Gone => Outcome::Gone,
                    Presence::Present | Presence::Unknown(_) => Outcome::Again(error),
                }
            }
            Err(error) => Outcome::Again(error),
        }
    }

    async fn patch(&self, pod: &Pod, body: &serde_json::Value, version: u64) -> Result<Outcome, RestError> {
        let path = format!("/api/v1/namespaces/{}/pods/{}/status", pod.namespace(), pod.name());
        let body = body.to_string().into_bytes();
        let bytes = rest::call(&self.clients.general, Method::PATCH, &path, rest::STRATEGIC_MERGE, body).await?;
        let answer: PodAnswer = rest::decode("pod", &bytes, false)?;
        let held = Held {
            version: rest::version_number(&answer.metadata.resource_version).unwrap_or(0),
            status: Arc::new(answer.status.unwrap_or_default()),
        };
        Ok(Outcome::Written { version, held })
    }

    async fn delete(&self, pod: &Pod, uid: &PodUid) -> Result<Outcome, RestError> {
        let path = format!("/api/v1/namespaces/{}/pods/{}", pod.namespace(), pod.name());
        let body = json!({
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": 0,
            "preconditions": { "uid": uid.as_str() },
        });
        rest::call(&self.clients.general, Method::DELETE, &path, rest::JSON, body.to_string().into_bytes()).await?;
        Ok(Outcome::Deleted)
    }

    /// Records an outcome; gives back the error of one that must be tried again.
    fn settle(&self, uid: &PodUid, serial: u64, outcome: Outcome) -> Option<RestError> {
        {
            let mut records = self.lock();
            let record = records.by_uid.get_mut(uid).filter(|r| r.serial == serial)?;
            match outcome {
                Outcome::Again(error) => return Some(error),
                Outcome::Written { version, held } => {
                    record.acknowledged = record.acknowledged.max(version);
                    let now = SystemClock.now().mono;
                    if let (Some(since), Some(seconds)) = (record.unsent_since.take(), self.sync_seconds.get()) {
                        seconds.observe((now - since).as_secs_f64());
                    }
                    record.unsent_since = (record.acknowledged < record.version).then_some(now);
                    record.drifted = false;
                    record.learn(held);
                }
                Outcome::Deleted => record.delete = Deletion::Sent,
                Outcome::Gone => {
                    record.gone = true;
                    record.acknowledged = record.version;
                }
            }
        }
        self.wakes.wake(uid, Cause::Published);
        None
    }
}

#[cfg(test)]
#[path = "publisher_tests.rs"]
mod tests;
