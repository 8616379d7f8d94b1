//! Resources: QoS class, what a pod asks for, and the kubepods cgroup tree (contract section 8).
//!
//! In: pods, the node's capacity and reservations. Out: numbers for the runtime (shares, quota, OOM score), directories under
//! `/sys/fs/cgroup/…/kubepods`, and in-place resizes: [`allocation`] decides, the [`PodLedger`] remembers, [`resize_plan`] orders.
//! Only [`cgroups`] touches the machine, and only below the kubepods cgroup (and, to switch controllers on,
//! `cgroup.subtree_control` of its ancestors); the ledger writes its two checkpoints.

pub mod allocation;
mod cgroup_fs;
mod cgroup_names;
pub mod cgroups;
mod checkpoint;
mod class_limits;
mod ledger;
mod pod_resources;
mod qos;
mod requests;
mod reserved;
mod resize_conditions;
mod resize_metrics;
pub mod resize_plan;
mod systemd;

pub use cgroup_names::CgroupName;
pub use cgroups::{CgroupError, CgroupSettings, KubepodsCgroups, PodCgroups};
pub use ledger::{HeldAllocations, LedgerParts, PodLedger};
pub use pod_resources::{ContainerSize, PodResources, PodSize, same_resources};
pub use qos::{
    CLUSTER_CRITICAL_PRIORITY, QosClass, cpu_quota, cpu_shares, cpu_weight, is_critical, is_node_critical,
    milli_of_quota, milli_of_shares, oom_score_adj, qos_class, shares_of_weight,
};
pub(crate) use requests::pod_level_set;
pub use requests::{ResourceList, hugepage_size, pod_limits, pod_requests, resource_list};
pub use reserved::ReservedCgroup;
pub use resize_conditions::{ResizeCondition, ResizeConditions};
pub use resize_metrics::{ResizeMetrics, Trigger};
