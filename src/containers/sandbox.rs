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
            security_context: Some(sandbox_security(pod, inputs.user_namespace)?),
            sysctls: sysctls.into_iter().flatten().map(|s| (s.name.clone(), s.value.clone())).collect(),
            overhead: Some(overhead),
            resources: Some(resources),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::tests::{pod, sandbox_inputs};

    #[test]
    fn p27_sandbox_config_names_the_pod_and_where_it_logs() {
        let pod = pod(r#"{"containers":[{"name":"c","ports":[{"containerPort":80,"hostPort":8080}]}]}"#);
        let config = sandbox_config(&sandbox_inputs(&pod)).unwrap();
        let metadata = config.metadata.unwrap();
        assert_eq!(
            (metadata.name.as_str(), metadata.namespace.as_str(), metadata.uid.as_str(), metadata.attempt),
            ("p", "ns", "uid-1", 2)
        );
        assert_eq!((config.hostname.as_str(), config.log_directory.as_str()), ("p", "/var/log/pods/ns_p_uid-1"));
        assert_eq!(config.dns_config.unwrap().servers, ["10.96.0.10"]);
        assert_eq!(config.port_mappings[0].host_port, 8080);
        assert_eq!(config.labels["io.kubernetes.pod.uid"], "uid-1");
        assert_eq!(config.linux.unwrap().cgroup_parent, "kubepods.slice");
    }

    #[test]
    fn p60_sysctls_are_passed_as_written() {
        let pod = pod(
            r#"{"securityContext":{"sysctls":[{"name":"net/ipv4/ip_unprivileged_port_start","value":"0"},{"name":"kernel.shm_rmid_forced","value":"1"}]}}"#,
        );
        let sysctls = sandbox_config(&sandbox_inputs(&pod)).unwrap().linux.unwrap().sysctls;
        assert_eq!(sysctls.len(), 2);
        assert_eq!(sysctls["kernel.shm_rmid_forced"], "1");
    }

    #[test]
    fn p55_a_host_network_pod_has_no_host_name_of_its_own() {
        let pod = pod(r#"{"hostNetwork":true}"#);
        assert_eq!(sandbox_config(&sandbox_inputs(&pod)).unwrap().hostname, "");
    }
}
