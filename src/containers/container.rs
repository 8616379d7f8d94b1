//! The config of one container (contract P-27, P-50, P-59, R-05).

use protocols::cri::v1;

use super::{
    ConfigError, ContainerInputs, as_map, container_log_path, expand, labels, resources::container_resources,
    security::container_security,
};

/// What the node's configuration decides for every container. The default is the KubeletConfiguration's.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerPolicy {
    /// `seccompDefault`: RuntimeDefault where nothing else is said.
    pub seccomp_default: bool,
    /// `singleProcessOOMKill`: do not kill the whole container when one of its processes is. Effective on cgroup v2.
    pub single_process_oom_kill: bool,
    /// Feature MemoryQoS.
    pub memory_qos: bool,
    /// `memoryReservationPolicy: TieredReservation`.
    pub memory_reservation: bool,
    /// `memoryThrottlingFactor`.
    pub memory_throttling_factor: Option<f64>,
    /// The node has the swap controller: then containers are kept from swapping.
    pub swap_controller: bool,
    /// With `memorySwap.swapBehavior: LimitedSwap`: the node's swap in bytes.
    pub limited_swap_bytes: Option<i64>,
    /// Feature ContainerStopSignals: `lifecycle.stopSignal` counts.
    pub stop_signals: bool,
    /// An ephemeral container's `targetContainerName`, as the runtime's container ID.
    pub target_container_id: Option<String>,
}

impl Default for ContainerPolicy {
    fn default() -> Self {
        Self {
            seccomp_default: false,
            single_process_oom_kill: false,
            memory_qos: true,
            memory_reservation: false,
            memory_throttling_factor: None,
            swap_controller: false,
            limited_swap_bytes: None,
            stop_signals: false,
            target_container_id: None,
        }
    }
}

/// The container's config with the default policy.
pub fn container_config(inputs: &ContainerInputs<'_>) -> Result<v1::ContainerConfig, ConfigError> {
    container_config_with(inputs, &ContainerPolicy::default())
}

/// The container's config.
pub fn container_config_with(
    inputs: &ContainerInputs<'_>,
    policy: &ContainerPolicy,
) -> Result<v1::ContainerConfig, ConfigError> {
    let ContainerInputs { pod, container, image, .. } = *inputs;
    let spec = container.spec;
    let security = container_security(inputs, policy)?;
    let env = as_map(inputs.env);
    let signal = spec.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref()).filter(|_| policy.stop_signals);
    let expanded = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter().flatten().map(|part| expand(part, |name| env.get(name).cloned())).collect()
    };
    Ok(v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: spec.name.clone(), attempt: inputs.attempt }),
        image: Some(v1::ImageSpec {
            image: image.reference.clone(),
            user_specified_image: image.requested.clone(),
            ..Default::default()
        }),
        command: expanded(&spec.command),
        args: expanded(&spec.args),
        working_dir: spec.working_dir.clone().unwrap_or_default(),
        envs: inputs.env.iter().map(key_value).collect(),
        mounts: mapped(inputs.mounts, inputs.user_namespace),
        labels: labels::container_labels(pod, spec),
        annotations: labels::container_annotations(pod, spec, inputs.attempt),
        log_path: container_log_path(&spec.name, inputs.attempt),
        stdin: spec.stdin.unwrap_or(false),
        stdin_once: spec.stdin_once.unwrap_or(false),
        tty: spec.tty.unwrap_or(false),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(container_resources(inputs, policy)),
            security_context: Some(security),
        }),
        stop_signal: stop_signal(signal).into(),
        ..Default::default()
    })
}

/// What a pod with its own users mounts is shown to it under its own IDs (contract P-58).
fn mapped(mounts: &[v1::Mount], users: Option<&v1::UserNamespace>) -> Vec<v1::Mount> {
    let map = |mount: &v1::Mount| match users {
        Some(users) => {
            v1::Mount { uid_mappings: users.uids.clone(), gid_mappings: users.gids.clone(), ..mount.clone() }
        }
        None => mount.clone(),
    };
    mounts.iter().map(map).collect()
}

fn key_value((key, value): &(String, String)) -> v1::KeyValue {
    v1::KeyValue { key: key.clone(), value: value.clone().into_bytes() }
}

/// `SIGUSR1` → CRI's own number; unset or unknown: the image's, or the runtime's default.
fn stop_signal(name: Option<&str>) -> v1::Signal {
    name.and_then(|name| {
        v1::Signal::from_str_name(&format!(
            "SIGNAL_{}",
            name.replace("SIGRTMIN+", "SIGRTMINPLUS").replace("SIGRTMAX-", "SIGRTMAXMINUS")
        ))
    })
    .unwrap_or(v1::Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::tests::{container_inputs, image, pod};

    fn config(spec: &str, env: &[(String, String)]) -> v1::ContainerConfig {
        let (pod, image) = (pod(spec), image(Some(0), ""));
        let mounts = [v1::Mount { container_path: "/m".into(), ..Default::default() }];
        let inputs = ContainerInputs { attempt: 3, env, mounts: &mounts, ..container_inputs(&pod, &image) };
        container_config(&inputs).unwrap()
    }

    #[test]
    fn p27_container_config() {
        let env = [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "2".to_owned())];
        let config = config(
            r#"{"containers":[{"name":"c","image":"img","command":["run","$(A)"],"args":["$(B)","$(C)","$$(A)"],"workingDir":"/w",
                "stdin":true,"stdinOnce":true,"tty":true}]}"#,
            &env,
        );
        let metadata = config.metadata.unwrap();
        assert_eq!((metadata.name.as_str(), metadata.attempt, config.log_path.as_str()), ("c", 3, "c/3.log"));
        let image = config.image.unwrap();
        assert_eq!((image.image.as_str(), image.user_specified_image.as_str()), ("sha256:1", "img:1"));
        assert_eq!((config.command, config.args), (own(&["run", "1"]), own(&["2", "$(C)", "$(A)"])));
        assert_eq!(config.working_dir, "/w");
        assert!(config.stdin && config.stdin_once && config.tty);
        let envs: Vec<_> = config.envs.into_iter().map(|e| (e.key, String::from_utf8(e.value).unwrap())).collect();
        assert_eq!(envs, env);
        assert_eq!(config.mounts[0].container_path, "/m");
        assert_eq!(config.annotations["io.kubernetes.container.restartCount"], "3");
        assert_eq!(config.labels["io.kubernetes.container.name"], "c");
        assert_eq!(config.stop_signal, v1::Signal::RuntimeDefault as i32);
        let linux = config.linux.unwrap();
        assert!(linux.resources.is_some() && linux.security_context.is_some());
    }

    #[test]
    fn p32_a_stop_signal_counts_only_with_its_gate() {
        let pod = pod(r#"{"os":{"name":"linux"},"containers":[{"name":"c","lifecycle":{"stopSignal":"SIGUSR1"}}]}"#);
        let image = image(Some(0), "");
        for (stop_signals, want) in [(false, v1::Signal::RuntimeDefault), (true, v1::Signal::Sigusr1)] {
            let policy = ContainerPolicy { stop_signals, ..Default::default() };
            let config = container_config_with(&container_inputs(&pod, &image), &policy).unwrap();
            assert_eq!(config.stop_signal(), want);
        }
    }

    #[test]
    fn p58_mounts_and_namespaces_of_a_pod_with_its_own_users_are_mapped() {
        let (pod, image) = (pod(r#"{"hostUsers":false}"#), image(Some(0), ""));
        let ids = vec![v1::IdMapping { host_id: 65536, container_id: 0, length: 65536 }];
        let users = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids.clone() };
        let mounts = [v1::Mount { container_path: "/m".into(), ..Default::default() }];
        let inputs =
            ContainerInputs { mounts: &mounts, user_namespace: Some(&users), ..container_inputs(&pod, &image) };
        let config = container_config(&inputs).unwrap();
        assert_eq!((&config.mounts[0].uid_mappings, &config.mounts[0].gid_mappings), (&ids, &ids));
        let security = config.linux.unwrap().security_context.unwrap();
        assert_eq!(security.namespace_options.unwrap().userns_options, Some(users));
    }

    fn own(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn p50_nothing_said_leaves_the_images_entrypoint() {
        let config = config("{}", &[]);
        assert!(config.command.is_empty() && config.args.is_empty() && config.working_dir.is_empty());
    }

    #[test]
    fn p29_stop_signals_have_cris_own_numbers() {
        for (name, want) in [
            (None, v1::Signal::RuntimeDefault),
            (Some("SIGUSR1"), v1::Signal::Sigusr1),
            (Some("SIGRTMIN+3"), v1::Signal::Sigrtminplus3),
            (Some("SIGRTMAX-1"), v1::Signal::Sigrtmaxminus1),
            (Some("SIGRTMIN"), v1::Signal::Sigrtmin),
            (Some("nonsense"), v1::Signal::RuntimeDefault),
        ] {
            assert_eq!(stop_signal(name), want, "{name:?}");
        }
    }
}
