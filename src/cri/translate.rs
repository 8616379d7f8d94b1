//! CRI messages → what the store keeps. Pure; drops what nothing reads, because it is held for every container.

use std::{collections::HashMap, net::IpAddr};

use jiff::Timestamp;

use super::{Container, ContainerState, Sandbox, v1};
use crate::time::from_cri_nanos;

/// Set on every sandbox and container of a pod (contract P-27).
pub const POD_UID_LABEL: &str = "io.kubernetes.pod.uid";
/// Set on every container (contract P-27).
pub const CONTAINER_NAME_LABEL: &str = "io.kubernetes.container.name";

/// Ours are kept; a pod's own labels and annotations come from the pod.
fn ours(map: HashMap<String, String>) -> HashMap<String, String> {
    let mut kept: HashMap<_, _> = map
        .into_iter()
        .filter(|(key, _)| key.starts_with("io.kubernetes.") || key.starts_with("kubernetes.io/config."))
        .collect();
    kept.shrink_to_fit();
    kept
}

/// Nanoseconds as CRI writes them; a missing time becomes the epoch, so that it sorts as oldest.
fn created(nanos: i64) -> Timestamp {
    from_cri_nanos(nanos).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// The pod a sandbox in a list belongs to; `None` for one that no kubelet made.
pub fn sandbox_uid(sandbox: &v1::PodSandbox) -> Option<&str> {
    let labelled = sandbox.labels.get(POD_UID_LABEL).map(String::as_str);
    labelled.or_else(|| sandbox.metadata.as_ref().map(|m| m.uid.as_str())).filter(|uid| !uid.is_empty())
}

/// The pod a container in a list belongs to; `None` for one that no kubelet made.
pub fn container_uid(container: &v1::Container) -> Option<&str> {
    container.labels.get(POD_UID_LABEL).map(String::as_str).filter(|uid| !uid.is_empty())
}

/// The state as a list or a status says it; a value from the future counts as unknown.
pub fn state(state: i32) -> ContainerState {
    match v1::ContainerState::try_from(state) {
        Ok(v1::ContainerState::ContainerCreated) => ContainerState::Created,
        Ok(v1::ContainerState::ContainerRunning) => ContainerState::Running,
        Ok(v1::ContainerState::ContainerExited) => ContainerState::Exited,
        Ok(v1::ContainerState::ContainerUnknown) | Err(_) => ContainerState::Unknown,
    }
}

/// Whether `PodSandboxState` says ready.
pub fn ready(state: i32) -> bool {
    state == v1::PodSandboxState::SandboxReady as i32
}

/// A sandbox status. Addresses that do not parse are left out.
pub fn sandbox(status: v1::PodSandboxStatus) -> Sandbox {
    let ready = ready(status.state);
    let metadata = status.metadata.unwrap_or_default();
    let host_network = status
        .linux
        .and_then(|l| l.namespaces)
        .and_then(|n| n.options)
        .is_some_and(|o| o.network() == v1::NamespaceMode::Node);
    let ips: Vec<IpAddr> = status.network.map_or_else(Vec::new, |network| {
        let all = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|more| more.ip));
        all.filter_map(|ip| ip.parse().ok()).collect()
    });
    Sandbox {
        id: status.id,
        attempt: metadata.attempt,
        created_at: created(status.created_at),
        ready,
        ips,
        host_network,
        runtime_handler: status.runtime_handler,
        name: metadata.name,
        namespace: metadata.namespace,
        labels: ours(status.labels),
        annotations: ours(status.annotations),
    }
}

/// Its start was cut off, by the death of whoever asked for it: nothing of it ever ran, so it is no more than created. Any other
/// failed start (no such executable, a bad mount) is an end of its own.
fn start_cut_off(status: &v1::ContainerStatus) -> bool {
    status.started_at == 0 && status.reason == "StartError" && status.message.contains("context canceled")
}

/// A container status. CRI does not put the sandbox's ID into it: the list does, or the event.
pub fn container(status: v1::ContainerStatus, sandbox_id: &str) -> Container {
    let state = if start_cut_off(&status) { ContainerState::Created } else { state(status.state) };
    let metadata = status.metadata.unwrap_or_default();
    let name = status.labels.get(CONTAINER_NAME_LABEL).cloned().unwrap_or(metadata.name);
    let image = status.image.unwrap_or_default();
    Container {
        id: status.id,
        name,
        attempt: metadata.attempt,
        sandbox_id: sandbox_id.to_owned(),
        state,
        created_at: created(status.created_at),
        started_at: from_cri_nanos(status.started_at),
        finished_at: from_cri_nanos(status.finished_at),
        exit_code: status.exit_code,
        reason: status.reason,
        message: status.message,
        image: image.image,
        image_runtime_handler: image.runtime_handler,
        image_id: if status.image_id.is_empty() { status.image_ref.clone() } else { status.image_id },
        image_ref: status.image_ref,
        labels: ours(status.labels),
        annotations: ours(status.annotations),
        log_path: status.log_path,
        user: status.user.and_then(|u| u.linux).map(|u| (u.uid, u.gid, u.supplemental_groups)),
        resources: status.resources.and_then(|r| r.linux),
        mounts: status.mounts,
        stop_signal: v1::Signal::try_from(status.stop_signal).unwrap_or_default(),
        oom_killed: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p27_only_our_labels_and_annotations_are_kept() {
        let labels = HashMap::from([
            (POD_UID_LABEL.to_owned(), "u".to_owned()),
            (CONTAINER_NAME_LABEL.to_owned(), "web".to_owned()),
            ("app".to_owned(), "shop".to_owned()),
        ]);
        let annotations = HashMap::from([
            ("io.kubernetes.container.hash".to_owned(), "1f".to_owned()),
            ("team".to_owned(), "x".to_owned()),
        ]);
        let status = v1::ContainerStatus {
            id: "c".into(),
            labels,
            annotations,
            image_ref: "sha256:1".into(),
            state: v1::ContainerState::ContainerExited as i32,
            finished_at: 5,
            ..Default::default()
        };
        let made = container(status, "s");
        assert_eq!((made.name.as_str(), made.sandbox_id.as_str()), ("web", "s"));
        assert_eq!(made.labels.len(), 2);
        assert_eq!(made.annotations.keys().collect::<Vec<_>>(), ["io.kubernetes.container.hash"]);
        assert_eq!(made.state, ContainerState::Exited);
        assert_eq!((made.started_at, made.finished_at.map(|t| t.as_nanosecond())), (None, Some(5)));
        assert_eq!(made.image_id, "sha256:1");
    }

    #[test]
    fn sandbox_addresses_keep_the_runtimes_order() {
        let status = v1::PodSandboxStatus {
            network: Some(v1::PodSandboxNetworkStatus {
                ip: "fd00::1".into(),
                additional_ips: vec![v1::PodIp { ip: "10.0.0.1".into() }, v1::PodIp { ip: "?".into() }],
            }),
            linux: Some(v1::LinuxPodSandboxStatus {
                namespaces: Some(v1::Namespace {
                    options: Some(v1::NamespaceOption {
                        network: v1::NamespaceMode::Node as i32,
                        ..Default::default()
                    }),
                }),
            }),
            ..Default::default()
        };
        let made = sandbox(status);
        assert_eq!(made.ips.iter().map(ToString::to_string).collect::<Vec<_>>(), ["fd00::1", "10.0.0.1"]);
        assert!(made.host_network && made.ready);
    }

    #[test]
    fn a_start_that_was_cut_off_is_no_end() {
        let failed = |message: &str, started_at| {
            let status = v1::ContainerStatus {
                state: v1::ContainerState::ContainerExited as i32,
                reason: "StartError".into(),
                message: message.into(),
                exit_code: 128,
                started_at,
                ..Default::default()
            };
            container(status, "s").state
        };
        let cut = "failed to create containerd task: failed to create shim task: context canceled";
        assert_eq!(failed(cut, 0), ContainerState::Created);
        assert_eq!(failed(cut, 7), ContainerState::Exited);
        let missing = "failed to create containerd task: exec: \"/nope\": no such file or directory";
        assert_eq!(failed(missing, 0), ContainerState::Exited);
    }

    #[test]
    fn a_state_from_the_future_is_unknown() {
        assert_eq!(state(17), ContainerState::Unknown);
    }
}
