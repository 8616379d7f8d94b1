//! Follows the Node of this machine, and it alone (contract N-24), and keeps what was last seen of it.
//!
//! In: a watch with `metadata.name=`, and the answers to this room's own writes. Out: the newest Node in a watch channel, its labels in the
//! facts. A watch that breaks is opened again; the Node last seen stays in force meanwhile.

use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::facts::FactsPublisher;
use crate::api::WatchSlot;

/// The newest Node seen, from whichever side it came.
#[derive(Clone)]
pub(super) struct NodeObject {
    node: watch::Sender<Option<Arc<Node>>>,
    facts: FactsPublisher,
}

impl NodeObject {
    pub(super) fn new(facts: FactsPublisher) -> Self {
        Self { node: watch::Sender::new(None), facts }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Option<Arc<Node>>> {
        self.node.subscribe()
    }

    pub(super) fn newest(&self) -> Option<Arc<Node>> {
        self.node.borrow().clone()
    }

    /// Takes a Node unless a newer one is known.
    pub(super) fn offer(&self, mut node: Node) {
        node.metadata.managed_fields = None;
        let labels = node.metadata.labels.clone().unwrap_or_default();
        let taints = node.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
        let taken = self.node.send_if_modified(|current| {
            let newer = current.as_ref().is_none_or(|have| is_newer(&node, have));
            if newer {
                *current = Some(Arc::new(node));
            }
            newer
        });
        if taken {
            self.facts.update(|facts| (facts.labels, facts.taints, facts.node_seen) = (labels, taints, true));
        }
    }
}

/// A Node with another UID is a new one; otherwise the resourceVersion, which is a number, tells.
fn is_newer(candidate: &Node, have: &Node) -> bool {
    let version = |node: &Node| node.metadata.resource_version.as_deref().and_then(|v| v.parse::<u64>().ok());
    candidate.metadata.uid != have.metadata.uid || version(candidate) > version(have)
}

/// Brings the facts up to what the apiserver has now: a watch is always a moment behind.
#[async_trait]
pub trait ReadNode: Send + Sync + 'static {
    /// Returns when the facts are up to date, or when the apiserver has not answered.
    async fn read_again(&self);
}

pub(super) struct NodeReader {
    pub client: Client,
    pub node_name: String,
    pub object: NodeObject,
}

#[async_trait]
impl ReadNode for NodeReader {
    async fn read_again(&self) {
        match Api::<Node>::all(self.client.clone()).get(&self.node_name).await {
            Ok(node) => self.object.offer(node),
            Err(error) => tracing::warn!(%error, "reading the Node of this machine failed"),
        }
    }
}

/// Follows the Node until cancelled.
pub(super) async fn follow(slot: WatchSlot, node_name: String, object: NodeObject, cancel: CancellationToken) {
    let config = watcher::Config::default().fields(&format!("metadata.name={node_name}"));
    let mut events = std::pin::pin!(watcher(Api::<Node>::all(slot.client.clone()), config).default_backoff());
    loop {
        let event = tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            event = events.next() => event,
        };
        match event {
            Some(Ok(watcher::Event::Apply(node) | watcher::Event::InitApply(node))) => object.offer(node),
            Some(Ok(watcher::Event::Delete(_))) => {
                tracing::error!(node = node_name, "the Node of this machine was deleted")
            }
            Some(Ok(watcher::Event::Init | watcher::Event::InitDone)) => {}
            Some(Err(error)) => tracing::warn!(%error, "the watch of the Node broke"),
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::NodeFacts;
    use super::*;
    use crate::wake::NoWakes;

    fn node(uid: &str, version: &str, label: &str) -> Node {
        let metadata = json!({"name": "n", "uid": uid, "resourceVersion": version, "labels": {"l": label}});
        let spec = json!({"taints": [{"key": label, "effect": "NoExecute"}]});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
    }

    #[test]
    fn n24_the_newest_node_wins_and_its_labels_become_facts() {
        let facts = FactsPublisher::new(NodeFacts::default(), Arc::new(NoWakes));
        let object = NodeObject::new(facts.clone());
        let seen = facts.subscribe();
        object.offer(node("u", "9", "a"));
        object.offer(node("u", "10", "b"));
        assert_eq!(seen.borrow().labels["l"], "b", "10 is newer than 9");
        assert!(seen.borrow().node_seen);
        assert_eq!(seen.borrow().taints[0].key, "b");
        object.offer(node("u", "9", "a"));
        assert_eq!(seen.borrow().labels["l"], "b", "an old answer does not come back");
        object.offer(node("v", "1", "c"));
        assert_eq!(seen.borrow().labels["l"], "c", "a Node made anew is another one");
    }
}
