//! What the rest of the agent needs to know about its node, as one snapshot in a watch channel.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::api::core::v1::Taint;
use tokio::sync::watch;

use super::Pressure;
use crate::wake::{Cause, WakeSink};

/// A consistent snapshot. Published, then the pods that it concerns are woken with `Cause::Node`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NodeFacts {
    /// The Node object's name.
    pub name: String,
    /// The kernel's host name: what a host-network pod sees.
    pub hostname: String,
    /// InternalIPs, primary family first.
    pub ips: Vec<IpAddr>,
    /// `None` when the pod network is ready, else why not: `container runtime network not ready: …` (contract N-17).
    pub network_not_ready: Option<String>,
    /// The runtime answered Status with RuntimeReady=true lately.
    pub runtime_ready: bool,
    /// The Node was read from the API at least once: labels and taints are the API's, not only what this agent would register.
    pub node_seen: bool,
    /// Node labels as the API has them.
    pub labels: BTreeMap<String, String>,
    /// `spec.taints` as the API has them.
    pub taints: Vec<Taint>,
    /// The pressure conditions that hold.
    pub pressures: BTreeSet<Pressure>,
    /// The runtime enforces `supplementalGroupsPolicy: Strict`.
    pub supplemental_groups_policy: bool,
    /// Resource name → quantity, as written to the Node's status.
    pub allocatable: BTreeMap<String, String>,
    pub capacity: BTreeMap<String, String>,
    /// Runtime handler names and their features, "" is the default handler.
    pub recursive_read_only_handlers: Vec<String>,
    /// Runtime handler → whether it can give pods a user namespace. Empty when the runtime does not say.
    pub user_namespace_handlers: BTreeMap<String, bool>,
    /// This host runs cgroup v2 (unified).
    pub cgroup_v2: bool,
}

/// The one writer of [`NodeFacts`]: publishes first, then wakes.
#[derive(Clone)]
pub(super) struct FactsPublisher {
    facts: watch::Sender<Arc<NodeFacts>>,
    wakes: Arc<dyn WakeSink>,
}

impl FactsPublisher {
    pub(super) fn new(facts: NodeFacts, wakes: Arc<dyn WakeSink>) -> Self {
        Self { facts: watch::Sender::new(Arc::new(facts)), wakes }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<NodeFacts>> {
        self.facts.subscribe()
    }

    /// Changes the snapshot; nobody hears of a change that changes nothing.
    pub(super) fn update(&self, change: impl FnOnce(&mut NodeFacts)) {
        let changed = self.facts.send_if_modified(|current| {
            let mut next = NodeFacts::clone(current);
            change(&mut next);
            let changed = next != **current;
            if changed {
                *current = Arc::new(next);
            }
            changed
        });
        if changed {
            self.wakes.wake_all(Cause::Node);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::pods::PodUid;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl WakeSink for Count {
        fn wake(&self, _: &PodUid, _: Cause) {}
        fn wake_all(&self, cause: Cause) {
            assert_eq!(cause, Cause::Node);
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn pods_are_woken_by_a_change_and_only_by_one() {
        let wakes = Arc::new(Count::default());
        let publisher = FactsPublisher::new(NodeFacts::default(), wakes.clone());
        let mut receiver = publisher.subscribe();
        publisher.update(|facts| facts.runtime_ready = false);
        assert_eq!(wakes.0.load(Ordering::SeqCst), 0);
        assert!(!receiver.has_changed().unwrap());
        publisher.update(|facts| facts.runtime_ready = true);
        assert_eq!(wakes.0.load(Ordering::SeqCst), 1);
        assert!(receiver.borrow_and_update().runtime_ready);
    }
}
