//! The one truth of what should run: desired pods by UID, fed by the sources, read by the workers.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::{Pod, PodSource, PodUid};
use crate::wake::{Cause, WakeSink};

/// Desired pods by UID. Writers are the sources; every change wakes the worker of that UID, after it is visible here.
pub struct PodStore {
    inner: Mutex<Inner>,
    wakes: Arc<dyn WakeSink>,
    complete: watch::Sender<bool>,
}

#[derive(Default)]
struct Inner {
    pods: HashMap<PodUid, Pod>,
    /// Sources that this agent is configured with, and whether each has delivered a complete list.
    sources: HashMap<PodSource, bool>,
}

/// What a worker reads about its own pod.
#[derive(Debug, Clone)]
pub struct StoreSnapshot {
    pub pod: Option<Pod>,
    /// Every configured source has delivered a complete list: only then does absence mean anything (contract P-01).
    pub complete: bool,
}

impl PodStore {
    pub fn new(sources: &[PodSource], wakes: Arc<dyn WakeSink>) -> Self {
        let inner = Inner { pods: HashMap::new(), sources: sources.iter().map(|s| (*s, false)).collect() };
        Self { complete: watch::Sender::new(sources.is_empty()), inner: Mutex::new(inner), wakes }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds or replaces one pod.
    pub fn upsert(&self, pod: Pod) {
        let uid = pod.uid().clone();
        self.lock().pods.insert(uid.clone(), pod);
        self.wakes.wake(&uid, Cause::Desired);
    }

    /// Removes one pod that its source says is gone.
    pub fn remove(&self, uid: &PodUid) {
        if self.lock().pods.remove(uid).is_some() {
            self.wakes.wake(uid, Cause::Desired);
        }
    }

    /// A complete list from one source: replaces all that the source had, and marks the source as seen.
    pub fn replace(&self, source: PodSource, pods: Vec<Pod>) {
        let mut changed: Vec<PodUid> = Vec::new();
        let all_seen;
        {
            let mut inner = self.lock();
            let listed: HashMap<PodUid, Pod> = pods.into_iter().map(|p| (p.uid().clone(), p)).collect();
            inner.pods.retain(|uid, pod| {
                let keep = pod.source() != source || listed.contains_key(uid);
                if !keep {
                    changed.push(uid.clone());
                }
                keep
            });
            for (uid, pod) in listed {
                changed.push(uid.clone());
                inner.pods.insert(uid, pod);
            }
            inner.sources.insert(source, true);
            all_seen = inner.sources.values().all(|seen| *seen);
        }
        self.complete.send_if_modified(|c| !std::mem::replace(c, all_seen) && all_seen);
        for uid in changed {
            self.wakes.wake(&uid, Cause::Desired);
        }
    }

    pub fn snapshot(&self, uid: &PodUid) -> StoreSnapshot {
        let inner = self.lock();
        StoreSnapshot { pod: inner.pods.get(uid).cloned(), complete: inner.sources.values().all(|seen| *seen) }
    }

    pub fn get(&self, uid: &PodUid) -> Option<Pod> {
        self.lock().pods.get(uid).cloned()
    }

    pub fn find(&self, namespace: &str, name: &str) -> Option<Pod> {
        self.lock().pods.values().find(|p| p.name() == name && p.namespace() == namespace).cloned()
    }

    pub fn list(&self) -> Vec<Pod> {
        self.lock().pods.values().cloned().collect()
    }

    pub fn complete(&self) -> bool {
        self.lock().sources.values().all(|seen| *seen)
    }

    /// Turns true once, when the last configured source has delivered its first complete list.
    pub fn completeness(&self) -> watch::Receiver<bool> {
        self.complete.subscribe()
    }
}
