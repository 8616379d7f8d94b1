//! What the node room is told at start: the part of flags and configuration that concerns the Node. Immutable.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use k8s_openapi::api::core::v1::Taint;

use super::{
    capacity::{PodSlots, Reservations},
    machine::HostPaths,
};

/// Settings of the node room. Flags and fields are named in each line.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    /// See [`super::node_name`].
    pub node_name: String,
    /// The kernel's host name, or `--hostname-override`: what `kubernetes.io/hostname` and the Hostname address say.
    pub hostname: String,
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
    /// `systemReserved`, `kubeReserved`, and the eviction thresholds
    pub reservations: Reservations,
    /// `enforceNodeAllocatable` contains `pods`
    pub enforce_pods: bool,
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

/// GOARCH's names, as labels and `nodeInfo.architecture` use them.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

pub(super) const OPERATING_SYSTEM: &str = "linux";

#[cfg(test)]
pub(super) fn test_settings() -> NodeSettings {
    NodeSettings {
        node_name: "node1".to_owned(),
        hostname: "node1".to_owned(),
        node_ips: vec![],
        external_cloud: false,
        register_node: true,
        node_labels: BTreeMap::new(),
        taints: vec![],
        provider_id: String::new(),
        controller_attach_detach: true,
        pod_slots: PodSlots { max_pods: 110, pods_per_core: 0 },
        reservations: Reservations::default(),
        enforce_pods: true,
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
