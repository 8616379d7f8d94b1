//! The sandbox config of a pod (contract P-27, P-55, P-56, P-57, P-59, P-60).

use protocols::cri::v1;

use super::{
    ConfigError, SandboxInputs, labels, pod_log_directory, resources::sandbox_resources, security::sandbox_security,
};
use crate::network::port_mappings;

/// Everything the runtime needs to make the pod's sandbox. The same config goes with every CreateContainer and PullImage.
pub fn sandbox_config(inputs: &SandboxInputs<'_>) -> Result<v1::PodSandboxConfig, ConfigError> {
    let pod = inputs.pod;
    let (resources, overhead) = sandbox_resources(pod);
    let sysctls = pod.spec().security_context.as_ref().and_then(|c| c.sysctls.as_ref());
    Ok(v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: pod.name().to_owned(),
            uid: pod.uid().to_string(),
            namespace: pod.namespace().to_owned(),
            attempt: inputs.attempt,
        }),
        // A host-network pod has the node's name.
        hostname: if pod.host_network() { String::new() } else { inputs.hostname.to_owned() },
        log_directory: pod_log_directory(inputs.pod_logs_dir, pod).display().to_string(),
        dns_config: Some(inputs.dns.clone()),
        port_mappings: port_mappings(pod),
        labels: labels::sandbox_labels(pod),
        annotations: labels::sandbox_annotations(pod),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: inputs.cgroup_parent.to_owned(),
            security_context: Some(sandbox_security(pod)?),
            sysctls: sysctls.into_iter().flatten().map(|s| (s.name.clone(), s.value.clone())).collect(),
            overhead: Some(overhead),
            resources: Some(resources),
        }),
    })
}
