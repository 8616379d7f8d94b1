//! Labels and annotations of sandboxes and containers (contract P-26, P-27): written for crictl, cAdvisor and log agents, and
//! read back by this agent after a restart, as they hold what the runtime does not know.

use std::{collections::HashMap, str::FromStr};

use k8s_openapi::{
    api::core::v1::{self as corev1, Container, ContainerPort, Lifecycle, LifecycleHandler, PodSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::de::DeserializeOwned;

use super::container_hash;
use crate::{
    cri,
    pods::{Pod, PodSource, PodUid},
};

pub const POD_NAME: &str = "io.kubernetes.pod.name";
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const POD_UID: &str = "io.kubernetes.pod.uid";
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";

const HASH: &str = "io.kubernetes.container.hash";
const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
const TERMINATION_MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
const TERMINATION_MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
const PORTS: &str = "io.kubernetes.container.ports";
const TERMINATION_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
const DELETION_GRACE: &str = "io.kubernetes.pod.deletionGracePeriod";

const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
const CONFIG_SEEN: &str = "kubernetes.io/config.seen";

/// The API's default for `terminationMessagePath`.
pub const DEFAULT_TERMINATION_MESSAGE_PATH: &str = "/dev/termination-log";

/// CRI's maps.
type Map = HashMap<String, String>;

/// `terminationMessagePolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TerminationMessagePolicy {
    #[default]
    File,
    /// When the file is empty and the container failed: the end of its log.
    FallbackToLogsOnError,
}

impl TerminationMessagePolicy {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "File",
            Self::FallbackToLogsOnError => "FallbackToLogsOnError",
        }
    }
    /// Whatever is not known is `File`.
    pub fn from_name(name: &str) -> Self {
        if name == Self::FallbackToLogsOnError.as_str() { Self::FallbackToLogsOnError } else { Self::File }
    }
}

/// `terminationMessagePath` with the API's default for specs that did not pass the API; empty means none.
pub(super) fn termination_message_path(container: &Container) -> &str {
    container.termination_message_path.as_deref().unwrap_or(DEFAULT_TERMINATION_MESSAGE_PATH)
}

/// A sandbox's labels: the pod's own and the three that name it.
pub(super) fn sandbox_labels(pod: &Pod) -> Map {
    let mut labels: Map = pod.labels().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    labels.extend(pod_names(pod));
    labels
}

/// A sandbox's annotations: the pod's own, and where and when this agent saw it.
pub(super) fn sandbox_annotations(pod: &Pod) -> Map {
    let mut annotations: Map = pod.annotations().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    annotations.entry(CONFIG_SOURCE.to_owned()).or_insert_with(|| pod.source().as_str().to_owned());
    annotations.entry(CONFIG_SEEN.to_owned()).or_insert_with(|| pod.seen().to_string());
    annotations
}

pub(super) fn container_labels(pod: &Pod, container: &Container) -> Map {
    let mut labels: Map = pod_names(pod).into();
    labels.insert(CONTAINER_NAME.to_owned(), container.name.clone());
    labels
}

pub(super) fn container_annotations(pod: &Pod, container: &Container, restart_count: u32) -> Map {
    let policy = container.termination_message_policy.as_deref().unwrap_or(TerminationMessagePolicy::File.as_str());
    let mut annotations = Map::from([
        (HASH.to_owned(), format!("{:x}", container_hash(container))),
        (RESTART_COUNT.to_owned(), restart_count.to_string()),
        (TERMINATION_MESSAGE_PATH.to_owned(), termination_message_path(container).to_owned()),
        (TERMINATION_MESSAGE_POLICY.to_owned(), policy.to_owned()),
    ]);
    let mut set = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            annotations.insert(key.to_owned(), value);
        }
    };
    set(DELETION_GRACE, pod.metadata().deletion_grace_period_seconds.map(|s| s.to_string()));
    set(TERMINATION_GRACE, pod.spec().termination_grace_period_seconds.map(|s| s.to_string()));
    let pre_stop = container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref());
    set(PRE_STOP, pre_stop.and_then(|hook| serde_json::to_string(hook).ok()));
    let ports = container.ports.as_ref().filter(|ports| !ports.is_empty());
    set(PORTS, ports.and_then(|ports| serde_json::to_string(ports).ok()));
    annotations
}

fn pod_names(pod: &Pod) -> [(String, String); 3] {
    [
        (POD_NAME.to_owned(), pod.name().to_owned()),
        (POD_NAMESPACE.to_owned(), pod.namespace().to_owned()),
        (POD_UID.to_owned(), pod.uid().to_string()),
    ]
}

/// The pod that a sandbox's (or container's) labels name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxLabels {
    pub name: String,
    pub namespace: String,
    pub uid: PodUid,
}

impl SandboxLabels {
    /// `None` for a sandbox that no node agent made: without UID it belongs to nobody.
    pub fn read(labels: &Map) -> Option<Self> {
        let get = |key: &str| labels.get(key).cloned().unwrap_or_default();
        let uid = labels.get(POD_UID).filter(|uid| !uid.is_empty())?;
        Some(Self { name: get(POD_NAME), namespace: get(POD_NAMESPACE), uid: PodUid::from(uid.as_str()) })
    }
}

/// Which container of which pod, by its labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerLabels {
    pub pod: SandboxLabels,
    pub container: String,
}

impl ContainerLabels {
    pub fn read(labels: &Map) -> Option<Self> {
        let container = labels.get(CONTAINER_NAME).filter(|name| !name.is_empty())?.clone();
        Some(Self { pod: SandboxLabels::read(labels)?, container })
    }
}

/// What a container's annotations remember of the spec it was made from.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ContainerAnnotations {
    /// `None` when missing or unreadable: such a container is never taken for changed.
    pub hash: Option<u32>,
    pub restart_count: u32,
    /// Empty: no termination message file.
    pub termination_message_path: String,
    pub termination_message_policy: TerminationMessagePolicy,
    /// Seconds.
    pub termination_grace: Option<i64>,
    /// Seconds.
    pub deletion_grace: Option<i64>,
    pub pre_stop: Option<LifecycleHandler>,
    pub ports: Vec<ContainerPort>,
}

impl ContainerAnnotations {
    /// Never fails: a value that cannot be read counts as missing and is logged by key.
    pub fn read(annotations: &Map) -> Self {
        let text = |key: &str| annotations.get(key).cloned().unwrap_or_default();
        Self {
            hash: annotations.get(HASH).and_then(|hex| u32::from_str_radix(hex, 16).ok()),
            restart_count: number(annotations, RESTART_COUNT).unwrap_or(0),
            termination_message_path: text(TERMINATION_MESSAGE_PATH),
            termination_message_policy: TerminationMessagePolicy::from_name(&text(TERMINATION_MESSAGE_POLICY)),
            termination_grace: number(annotations, TERMINATION_GRACE),
            deletion_grace: number(annotations, DELETION_GRACE),
            pre_stop: json(annotations, PRE_STOP),
            ports: json(annotations, PORTS).unwrap_or_default(),
        }
    }
}

/// The pod of a container that no source knows any more, as far as the container's labels and annotations tell: enough to stop it by the
/// book, with its event and its preStop hook (contract P-29). Its spec has this one container.
pub fn remembered_pod(container: &cri::Container) -> Option<Pod> {
    let ContainerLabels { pod, container: name } = ContainerLabels::read(&container.labels)?;
    let annotations = ContainerAnnotations::read(&container.annotations);
    let lifecycle = annotations.pre_stop.map(|hook| Lifecycle { pre_stop: Some(hook), ..Default::default() });
    let spec = PodSpec {
        containers: vec![Container {
            name,
            ports: Some(annotations.ports).filter(|ports| !ports.is_empty()),
            termination_message_path: Some(annotations.termination_message_path),
            lifecycle,
            ..Default::default()
        }],
        termination_grace_period_seconds: annotations.termination_grace,
        ..Default::default()
    };
    let metadata = ObjectMeta {
        name: Some(pod.name),
        namespace: Some(pod.namespace),
        uid: Some(pod.uid.to_string()),
        deletion_grace_period_seconds: annotations.deletion_grace,
        ..Default::default()
    };
    let object = corev1::Pod { metadata, spec: Some(spec), status: None };
    Pod::new(object, PodSource::Api, container.created_at)
}

fn number<T: FromStr>(annotations: &Map, key: &str) -> Option<T> {
    let parsed = annotations.get(key)?.parse().ok();
    if parsed.is_none() {
        tracing::warn!(annotation = key, "container annotation is not a number");
    }
    parsed
}

fn json<T: DeserializeOwned>(annotations: &Map, key: &str) -> Option<T> {
    match serde_json::from_str(annotations.get(key)?) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(annotation = key, %error, "container annotation is not the JSON it should be");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::containers::tests::pod_with;

    fn pod() -> Pod {
        pod_with(
            json!({"name": "p", "namespace": "ns", "uid": "u", "labels": {"app": "x", POD_NAME: "forged"},
                   "annotations": {"note": "y"}, "deletionGracePeriodSeconds": 5}),
            r#"{"terminationGracePeriodSeconds": 30, "containers": [{"name": "c", "image": "foo/image:v1",
                "terminationMessagePath": "/m", "terminationMessagePolicy": "FallbackToLogsOnError",
                "lifecycle": {"preStop": {"exec": {"command": ["a", "b"]}}},
                "ports": [{"containerPort": 80, "protocol": "TCP"}]}, {"name": "bare", "image": "i"}]}"#,
        )
    }

    #[test]
    fn p27_sandbox_labels_and_annotations() {
        let labels = sandbox_labels(&pod());
        let want = [("app", "x"), (POD_NAME, "p"), (POD_NAMESPACE, "ns"), (POD_UID, "u")];
        assert_eq!(labels, want.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        let annotations = sandbox_annotations(&pod());
        let want = [("note", "y"), (CONFIG_SOURCE, "api"), (CONFIG_SEEN, "1970-01-01T00:00:00Z")];
        assert_eq!(annotations, want.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        assert_eq!(
            SandboxLabels::read(&labels).unwrap(),
            SandboxLabels { name: "p".into(), namespace: "ns".into(), uid: "u".into() }
        );
        assert_eq!(SandboxLabels::read(&Map::new()), None);
    }

    #[test]
    fn p27_container_labels_and_annotations_come_back() {
        let pod = pod();
        let container = pod.container("c").unwrap().spec;
        let labels = container_labels(&pod, container);
        let want = [(POD_NAME, "p"), (POD_NAMESPACE, "ns"), (POD_UID, "u"), (CONTAINER_NAME, "c")];
        assert_eq!(labels, want.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        assert_eq!(ContainerLabels::read(&labels).unwrap().container, "c");

        let annotations = container_annotations(&pod, container, 3);
        let want = [
            ("io.kubernetes.container.restartCount", "3"),
            ("io.kubernetes.container.terminationMessagePath", "/m"),
            ("io.kubernetes.container.terminationMessagePolicy", "FallbackToLogsOnError"),
            ("io.kubernetes.container.preStopHandler", r#"{"exec":{"command":["a","b"]}}"#),
            ("io.kubernetes.container.ports", r#"[{"containerPort":80,"protocol":"TCP"}]"#),
            ("io.kubernetes.pod.terminationGracePeriod", "30"),
            ("io.kubernetes.pod.deletionGracePeriod", "5"),
        ];
        for (key, value) in want {
            assert_eq!(annotations.get(key).map(String::as_str), Some(value), "{key}");
        }
        let read = ContainerAnnotations::read(&annotations);
        assert_eq!(read.hash, Some(container_hash(container)));
        assert_eq!((read.restart_count, read.termination_grace, read.deletion_grace), (3, Some(30), Some(5)));
        assert_eq!(read.termination_message_policy, TerminationMessagePolicy::FallbackToLogsOnError);
        assert_eq!(read.pre_stop.as_ref(), container.lifecycle.as_ref().unwrap().pre_stop.as_ref());
        assert_eq!(Some(&read.ports), container.ports.as_ref());
    }

    #[test]
    fn p29_a_container_remembers_how_it_is_to_be_stopped() {
        let pod = pod();
        let spec = pod.container("c").unwrap().spec;
        let container = cri::Container {
            labels: container_labels(&pod, spec),
            annotations: container_annotations(&pod, spec, 0),
            ..cri::fixtures::seen("c")
        };
        let remembered = remembered_pod(&container).unwrap();
        assert_eq!((remembered.name(), remembered.namespace(), remembered.uid()), ("p", "ns", pod.uid()));
        assert_eq!(remembered.spec().termination_grace_period_seconds, Some(30));
        assert_eq!(remembered.metadata().deletion_grace_period_seconds, Some(5));
        let again = remembered.container("c").unwrap().spec;
        assert_eq!((&again.lifecycle, &again.ports), (&spec.lifecycle, &spec.ports));
        assert!(remembered_pod(&cri::Container { labels: Map::new(), ..container }).is_none());
    }

    #[test]
    fn p27_defaults_and_what_is_unset_is_left_out() {
        let pod = pod();
        let annotations = container_annotations(&pod, pod.container("bare").unwrap().spec, 0);
        assert_eq!(annotations["io.kubernetes.container.terminationMessagePath"], "/dev/termination-log");
        assert_eq!(annotations["io.kubernetes.container.terminationMessagePolicy"], "File");
        assert!(!annotations.contains_key(PRE_STOP) && !annotations.contains_key(PORTS));
    }

    #[test]
    fn p27_unreadable_annotations_count_as_missing() {
        let broken = [(HASH, "zz"), (RESTART_COUNT, "x"), (PRE_STOP, "{"), (PORTS, "1"), (TERMINATION_GRACE, "")];
        let read = ContainerAnnotations::read(&broken.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
        assert_eq!(read, ContainerAnnotations::default());
    }
}
