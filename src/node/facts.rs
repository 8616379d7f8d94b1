//! What the rest of the agent needs to know about its node, as one snapshot in a watch channel.

use std::{collections::BTreeMap, net::IpAddr};

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
    /// Node labels as the API has them.
    pub labels: BTreeMap<String, String>,
    /// Resource name → quantity, as written to the Node's status.
    pub allocatable: BTreeMap<String, String>,
    pub capacity: BTreeMap<String, String>,
    /// Runtime handler names and their features, "" is the default handler.
    pub recursive_read_only_handlers: Vec<String>,
    /// This host runs cgroup v2 (unified).
    pub cgroup_v2: bool,
}
