//! What the pod worker hands in, and how translation fails.

use std::{collections::BTreeMap, net::IpAddr, path::Path};

use protocols::cri::v1;

use crate::{
    images::PresentImage,
    node::NodeFacts,
    pods::{ContainerRef, Pod},
};

/// A container or sandbox cannot be described to the runtime. Becomes Waiting `reason` with `message`, and the event `Failed`
/// `Error: <message>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    /// `CreateContainerConfigError` for containers (contract P-33).
    pub reason: &'static str,
    pub message: String,
}

impl ConfigError {
    pub fn container(message: impl Into<String>) -> Self {
        Self { reason: "CreateContainerConfigError", message: message.into() }
    }
}

/// Everything that a sandbox's config is made from.
#[derive(Clone, Copy)]
pub struct SandboxInputs<'a> {
    pub pod: &'a Pod,
    pub attempt: u32,
    pub node: &'a NodeFacts,
    /// Nameservers, searches, options for this pod: from `network::dns`.
    pub dns: &'a v1::DnsConfig,
    /// Host name of the pod: from `network::hostname`.
    pub hostname: &'a str,
    /// The pod's cgroup as the runtime's driver names it: from `resources`.
    pub cgroup_parent: &'a str,
    /// Whose users the pod has; `None`: the node's (contract P-58).
    pub user_namespace: Option<&'a v1::UserNamespace>,
    /// `/var/log/pods`.
    pub pod_logs_dir: &'a Path,
    /// `<root>/seccomp` is where Localhost profiles are.
    pub root_dir: &'a Path,
}

/// Everything that a container's config is made from.
#[derive(Clone, Copy)]
pub struct ContainerInputs<'a> {
    pub pod: &'a Pod,
    pub container: ContainerRef<'a>,
    /// restartCount: the attempt in CRI's metadata, the `<n>` of the log file (contract P-27).
    pub attempt: u32,
    pub image: &'a PresentImage,
    /// Final environment in order (contract P-51).
    pub env: &'a [(String, String)],
    /// From `volumes` plus etc-hosts and termination log: complete, in order.
    pub mounts: &'a [v1::Mount],
    pub pod_ips: &'a [IpAddr],
    pub node: &'a NodeFacts,
    pub root_dir: &'a Path,
    /// Whose users the container has; `None`: the node's (contract P-58).
    pub user_namespace: Option<&'a v1::UserNamespace>,
    /// cpuCFSQuota, cpuCFSQuotaPeriod (µs) from the config.
    pub cpu_cfs_quota: bool,
    pub cpu_cfs_period_micros: i64,
}

/// The same as a map, for `$(VAR)` expansion and subPathExpr.
pub fn as_map(env: &[(String, String)]) -> BTreeMap<String, String> {
    env.iter().cloned().collect()
}
