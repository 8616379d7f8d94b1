//! Pods for the tests of this room and of `network`.

use std::{path::Path, sync::OnceLock};

use jiff::Timestamp;
use protocols::cri::v1;
use serde_json::{Value, json};

use super::{ContainerInputs, SandboxInputs};
use crate::{
    images::PresentImage,
    node::NodeFacts,
    pods::{Pod, PodSource},
};

/// Pod `p` in `ns` with UID `uid-1`, its spec from JSON; one container `c` when the spec names none.
pub(crate) fn pod(spec: &str) -> Pod {
    named_pod("p", spec)
}

pub(crate) fn named_pod(name: &str, spec: &str) -> Pod {
    pod_with(json!({"name": name, "namespace": "ns", "uid": "uid-1"}), spec)
}

pub(crate) fn pod_with(metadata: Value, spec: &str) -> Pod {
    let mut spec: Value = serde_json::from_str(spec).unwrap();
    if spec.get("containers").is_none() {
        spec["containers"] = json!([{"name": "c", "image": "img:1"}]);
    }
    let object = serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap();
    Pod::new(object, PodSource::Api, Timestamp::UNIX_EPOCH).unwrap()
}

/// An image that runs as this user.
pub(crate) fn image(uid: Option<i64>, username: &str) -> PresentImage {
    PresentImage { reference: "sha256:1".into(), requested: "img:1".into(), uid, username: username.into() }
}

/// The first main container of the pod, with nothing around it.
pub(crate) fn container_inputs<'a>(pod: &'a Pod, image: &'a PresentImage) -> ContainerInputs<'a> {
    static NODE: OnceLock<NodeFacts> = OnceLock::new();
    ContainerInputs {
        pod,
        container: pod.main_containers().next().unwrap(),
        attempt: 0,
        image,
        env: &[],
        mounts: &[],
        pod_ips: &[],
        node: NODE.get_or_init(NodeFacts::default),
        root_dir: Path::new("/var/lib/kubelet"),
        user_namespace: None,
        cpu_cfs_quota: true,
        cpu_cfs_period_micros: 100_000,
    }
}

pub(crate) fn sandbox_inputs(pod: &Pod) -> SandboxInputs<'_> {
    static NODE: OnceLock<NodeFacts> = OnceLock::new();
    static DNS: OnceLock<v1::DnsConfig> = OnceLock::new();
    SandboxInputs {
        pod,
        attempt: 2,
        node: NODE.get_or_init(NodeFacts::default),
        dns: DNS.get_or_init(|| v1::DnsConfig { servers: vec!["10.96.0.10".into()], ..Default::default() }),
        hostname: "p",
        cgroup_parent: "kubepods.slice",
        user_namespace: None,
        pod_logs_dir: Path::new("/var/log/pods"),
        root_dir: Path::new("/var/lib/kubelet"),
    }
}
