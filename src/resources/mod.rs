//! Resources: QoS class, what a pod asks for, and the kubepods cgroup tree (contract section 8).
//!
//! In: pods, the node's capacity and reservations. Out: numbers for the runtime (shares, quota, OOM score) and directories under
//! `/sys/fs/cgroup/…/kubepods`. Only [`cgroups`] touches the machine, and only below the kubepods cgroup (and, to switch
//! controllers on, `cgroup.subtree_control` of its ancestors).

mod cgroup_fs;
mod cgroup_names;
pub mod cgroups;
mod qos;
mod requests;

pub use cgroup_names::CgroupName;
pub use cgroups::{CgroupError, CgroupSettings, KubepodsCgroups, PodCgroups};
pub use qos::{
    CLUSTER_CRITICAL_PRIORITY, QosClass, cpu_quota, cpu_shares, cpu_weight, is_critical, is_node_critical,
    oom_score_adj, qos_class,
};
pub use requests::{ResourceList, hugepage_size, pod_limits, pod_requests, resource_list};
