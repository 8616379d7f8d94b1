//! The apiserver source: LIST and WATCH of the pods bound to this node (contract P-01, N-23).
//!
//! In: the watch `spec.nodeName=<node>` over all namespaces. Out: the store's pods of source `api`, as soon as each event arrives.
//! managedFields are dropped while decoding. A pod that cannot be decoded is named in the log and left as it was; others go on. A
//! pod that a new list lacks without a DELETED event stays until a read of that pod confirms that it is gone. Mirror pods
//! are the API's picture of static pods and never enter the store from here.

use std::{collections::HashSet, sync::Arc};

use async_trait::async_trait;
use k8s_openapi::api::core::v1 as corev1;
use serde::{Deserialize, Deserializer};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{
        ApiClients, Backoff,
        list_watch::{self, Collection, Follow, Reflect},
        presence::{self, Presence},
        rest::{Bare, RestError},
    },
    pods::{Pod, PodSource, PodStore, PodUid},
    time::Clock,
};

/// Marks a mirror pod; its value is the hash of the static pod.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// Feeds the store until cancelled. The first complete list marks the source as seen. Errors are ridden out with back-off.
pub async fn follow(
    clients: ApiClients,
    node_name: String,
    store: Arc<PodStore>,
    clock: Arc<dyn Clock>,
    cancel: CancellationToken,
) {
    let collection = Collection {
        path: "/api/v1/pods".to_owned(),
        field_selector: format!("spec.nodeName={node_name}"),
        kind: "pods",
        quiet: false,
        relist_on_loss: true,
    };
    let mut reflect = StoreReflect { store, clock, clients: clients.clone(), cancel: cancel.clone(), failing: false };
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = list_watch::run::<LeanPod>(&clients, &collection, None, &mut reflect) => {}
    }
}

/// A pod without managedFields: two thirds of a pod's heap, dropped before the next pod is decoded.
struct LeanPod(corev1::Pod);

impl<'de> Deserialize<'de> for LeanPod {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut pod = corev1::Pod::deserialize(deserializer)?;
        pod.metadata.managed_fields = None;
        Ok(Self(pod))
    }
}

struct StoreReflect {
    store: Arc<PodStore>,
    clock: Arc<dyn Clock>,
    clients: ApiClients,
    cancel: CancellationToken,
    failing: bool,
}

impl StoreReflect {
    /// `None` for a mirror pod and for an object without UID or spec.
    fn pod(&self, LeanPod(object): LeanPod) -> Option<Pod> {
        if object.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(MIRROR_ANNOTATION)) {
            return None;
        }
        let (namespace, name) = (object.metadata.namespace.clone(), object.metadata.name.clone());
        let known = object.metadata.uid.as_deref().and_then(|uid| self.store.get(&PodUid::from(uid)));
        let seen = known.map_or_else(|| self.clock.now().wall, |pod| pod.seen());
        let pod = Pod::new(object, PodSource::Api, seen);
        if pod.is_none() {
            tracing::error!(?namespace, ?name, "pod from the apiserver has no UID or no spec");
        }
        pod
    }

    /// Reads the pod until the answer is definite, then removes it if it is gone.
    fn confirm_absence(&self, pod: Pod) {
        let (store, clients, cancel) = (Arc::clone(&self.store), self.clients.clone(), self.cancel.clone());
        let confirm = async move {
            let mut backoff = Backoff::new();
            loop {
                match presence::of_pod(&clients.general, &pod).await {
                    Presence::Present => {
                        tracing::warn!(pod = %pod.described(), "a list lacked this pod, but it exists");
                        return;
                    }
                    Presence::Gone => {
                        store.remove(pod.uid());
                        return;
                    }
                    Presence::Unknown(error) => tokio::time::sleep(backoff.delay(error.retry_after())).await,
                }
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                () = confirm => {}
            }
        });
    }
}

#[async_trait]
impl Reflect<LeanPod> for StoreReflect {
    async fn listed(&mut self, items: Vec<LeanPod>, unreadable: Vec<Bare>) -> Follow {
        let mut pods: Vec<Pod> = items.into_iter().filter_map(|object| self.pod(object)).collect();
        let listed: HashSet<PodUid> = pods.iter().map(|p| p.uid().clone()).collect();
        let unreadable: HashSet<PodUid> = unreadable.iter().map(|b| PodUid::from(b.metadata.uid.as_str())).collect();
        let missing: Vec<Pod> = self
            .store
            .list()
            .into_iter()
            .filter(|pod| pod.source() == PodSource::Api && !listed.contains(pod.uid()))
            .collect();
        pods.extend(missing.iter().cloned());
        self.store.replace(PodSource::Api, pods);
        for pod in missing.into_iter().filter(|pod| !unreadable.contains(pod.uid())) {
            self.confirm_absence(pod);
        }
        self.failing = false;
        Follow::On
    }

    async fn present(&mut self, object: LeanPod) -> Follow {
        if let Some(pod) = self.pod(object) {
            self.store.upsert(pod);
        }
        Follow::On
    }

    async fn deleted(&mut self, LeanPod(object): LeanPod) -> Follow {
        if let Some(uid) = object.metadata.uid {
            self.store.remove(&PodUid::from(uid.as_str()));
        }
        Follow::On
    }

    fn failed(&mut self, error: &RestError) {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(%error, "pods cannot be read from the apiserver, trying again");
        }
    }
}
