//! What the node room is told at start: the part of flags and configuration that concerns the Node. Immutable.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use k8s_openapi::api::core::v1::Taint;

use super::{
    capacity::{PodSlots, Reservations},
    machine::HostPaths,
};
use crate::{
    cli::kubelet_version,
    config::{CloudProvider, Config, HostFacts, Threshold},
    resources::ReservedCgroup,
};

/// Settings of the node room. Flags and fields are named in each line.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    /// The host's name or `--hostname-override`, in lower case: also what `kubernetes.io/hostname` and the Hostname address say
    /// (contract S-18).
    pub node_name: String,
    /// What a host-network pod sees.
    pub kernel_hostname: String,
    /// `--node-ip`
    pub node_ips: Vec<IpAddr>,
    /// `--cloud-provider=external`
    pub external_cloud: bool,
    /// `registerNode`
    pub register_node: bool,
    /// `--node-labels`, checked by [`crate::config`].
    pub node_labels: BTreeMap<String, String>,
    /// `registerWithTaints`
    pub taints: Vec<Taint>,
    /// `providerID`
    pub provider_id: String,
    /// `enableControllerAttachDetach`
    pub controller_attach_detach: bool,
    /// `maxPods`, `podsPerCore`
    pub pod_slots: PodSlots,
    /// `systemReserved`, `kubeReserved`, and the eviction thresholds as far as they are subtracted
    pub reservations: Reservations,
    /// `evictionHard`, `evictionSoft`, …
    pub thresholds: Vec<Threshold>,
    /// `enforceNodeAllocatable` contains `pods`
    pub enforce_pods: bool,
    /// `enforceNodeAllocatable`'s other levels
    pub reserved_cgroups: Vec<ReservedCgroup>,
    /// `evictionPressureTransitionPeriod`
    pub pressure_transition: Duration,
    /// `localStorageCapacityIsolation`
    pub local_storage_isolation: bool,
    /// `nodeLeaseDurationSeconds`
    pub lease_seconds: i32,
    /// `port`
    pub kubelet_port: i32,
    /// `nodeStatusUpdateFrequency`
    pub update_frequency: Duration,
    /// `nodeStatusReportFrequency`
    pub report_frequency: Duration,
    /// `nodeStatusMaxImages`
    pub max_images: i32,
    /// `nodeInfo.kubeletVersion`
    pub kubelet_version: String,
    /// `status.declaredFeatures`: only what works. Sorted when published.
    pub declared_features: Vec<String>,
    /// `--root-dir`
    pub root_dir: PathBuf,
    pub host: HostPaths,
}

impl NodeSettings {
    /// `declared_features`: what this agent does of `status.declaredFeatures`.
    pub fn from_config(config: &Config, host: &HostFacts, paths: HostPaths, declared_features: Vec<String>) -> Self {
        let kubelet = &config.kubelet;
        let counted =
            if config.flags.allocatable_ignores_eviction { &[] } else { config.eviction_thresholds.as_slice() };
        Self {
            node_name: config.node_name.clone(),
            kernel_hostname: host.hostname.clone(),
            node_ips: config.node_ips.clone(),
            external_cloud: config.flags.cloud_provider == CloudProvider::External,
            register_node: kubelet.register_node,
            node_labels: config.flags.node_labels.clone(),
            taints: kubelet.register_with_taints.clone(),
            provider_id: kubelet.provider_id.clone(),
            controller_attach_detach: kubelet.enable_controller_attach_detach,
            pod_slots: PodSlots {
                max_pods: i64::from(kubelet.max_pods),
                pods_per_core: i64::from(kubelet.pods_per_core),
            },
            reservations: Reservations {
                system_reserved: config.system_reserved.clone(),
                kube_reserved: config.kube_reserved.clone(),
                eviction: counted.to_vec(),
            },
            thresholds: config.eviction_thresholds.clone(),
            enforce_pods: kubelet.enforce_node_allocatable.iter().any(|key| key == "pods"),
            reserved_cgroups: ReservedCgroup::from_config(config),
            pressure_transition: kubelet.eviction_pressure_transition_period.std(),
            local_storage_isolation: kubelet.local_storage_capacity_isolation,
            lease_seconds: kubelet.node_lease_duration_seconds,
            kubelet_port: kubelet.port,
            update_frequency: kubelet.node_status_update_frequency.std(),
            report_frequency: kubelet.node_status_report_frequency.std(),
            max_images: kubelet.node_status_max_images,
            kubelet_version: kubelet_version(),
            declared_features,
            root_dir: config.root_directory().to_owned(),
            host: paths,
        }
    }
}

pub(super) const OPERATING_SYSTEM: &str = "linux";

#[cfg(test)]
pub(super) fn test_settings() -> NodeSettings {
    NodeSettings {
        node_name: "node1".to_owned(),
        kernel_hostname: "kernel1".to_owned(),
        node_ips: vec![],
        external_cloud: false,
        register_node: true,
        node_labels: BTreeMap::new(),
        taints: vec![],
        provider_id: String::new(),
        controller_attach_detach: true,
        pod_slots: PodSlots { max_pods: 110, pods_per_core: 0 },
        reservations: Reservations::default(),
        thresholds: vec![],
        enforce_pods: true,
        reserved_cgroups: Vec::new(),
        pressure_transition: Duration::from_secs(300),
        local_storage_isolation: true,
        lease_seconds: 40,
        kubelet_port: 10250,
        update_frequency: Duration::from_secs(10),
        report_frequency: Duration::from_secs(300),
        max_images: 50,
        kubelet_version: "v1.37.1+rkubelet.0.1.0".to_owned(),
        declared_features: vec!["B".to_owned(), "A".to_owned()],
        root_dir: "/var/lib/kubelet".into(),
        host: HostPaths::default(),
    }
}
