//! The cgroups of the system's and of Kubernetes' daemons, and what `enforceNodeAllocatable` gives them (contract R-08). Pure.

use super::{cgroup_fs::Limits, cgroups::hugepages, qos::cpu_shares, requests::ResourceList};
use crate::{config::Config, quantity::Quantity};

/// A cgroup of the system's or of Kubernetes' daemons, and what is reserved for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservedCgroup {
    /// `System Reserved`, `Kube Reserved Compressible` …: as events say it.
    pub title: &'static str,
    /// A path inside the hierarchies.
    pub cgroup: String,
    pub reserved: ResourceList,
    /// CPU alone.
    pub compressible: bool,
    /// Feature MemoryQoS: what is reserved is also protected.
    pub memory_qos: bool,
}

impl ReservedCgroup {
    /// What `enforceNodeAllocatable` asks for besides `pods`, in upstream's order.
    pub fn from_config(config: &Config) -> Vec<Self> {
        let kubelet = &config.kubelet;
        let kinds = [
            ("system-reserved", "System Reserved", false),
            ("kube-reserved", "Kube Reserved", false),
            ("system-reserved-compressible", "System Reserved Compressible", true),
            ("kube-reserved-compressible", "Kube Reserved Compressible", true),
        ];
        let asked = |key: &str| kubelet.enforce_node_allocatable.iter().any(|k| k == key);
        let made = |(key, title, compressible): (&str, &'static str, bool)| {
            let (cgroup, reserved) = match key.starts_with("system") {
                true => (&kubelet.system_reserved_cgroup, &config.system_reserved),
                false => (&kubelet.kube_reserved_cgroup, &config.kube_reserved),
            };
            let memory_qos = config.feature_gates.enabled("MemoryQoS");
            Self { title, cgroup: cgroup.clone(), reserved: reserved.clone(), compressible, memory_qos }
        };
        kinds.into_iter().filter(|(key, ..)| asked(key)).map(made).collect()
    }

    pub(super) fn limits(&self) -> Limits {
        let cpu_shares = self.reserved.get("cpu").map(|cpu| cpu_shares(cpu.milli_value()));
        if self.compressible {
            return Limits { cpu_shares, ..Limits::default() };
        }
        let memory_bytes = self.reserved.get("memory").map(Quantity::value);
        Limits {
            cpu_shares,
            memory_bytes,
            pids: self.reserved.get("pid").map(Quantity::value),
            hugepages: hugepages(&self.reserved),
            memory_min: memory_bytes.filter(|_| self.memory_qos),
            ..Limits::default()
        }
    }
}
