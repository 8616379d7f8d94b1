//! The desired pod: an immutable, shared view of an API object with the questions the rest of the agent asks of it.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as corev1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{ContainerKind, PodUid};

/// Who asked for the pod. Written to the sandbox as `kubernetes.io/config.source` (contract P-01).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PodSource {
    Api,
    File,
    Http,
}

impl PodSource {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::File => "file",
            Self::Http => "http",
        }
    }
}

/// A desired pod. `managedFields` are dropped on the way in; the API's status is kept only as what the API last said
/// ([`Pod::api_status`]), never as this node's truth.
#[derive(Clone)]
pub struct Pod(Arc<Inner>);

struct Inner {
    uid: PodUid,
    metadata: ObjectMeta,
    spec: corev1::PodSpec,
    status: corev1::PodStatus,
    source: PodSource,
    /// When this agent first saw the pod: annotation `kubernetes.io/config.seen`.
    seen: Timestamp,
    /// `spec.ephemeralContainers` in the shape of containers.
    ephemeral: Vec<corev1::Container>,
}

/// One container of a pod with the list it stands in. Ephemeral containers are shown in the shape of a container.
#[derive(Clone, Copy)]
pub struct ContainerRef<'a> {
    pub kind: ContainerKind,
    pub spec: &'a corev1::Container,
}

impl<'a> ContainerRef<'a> {
    pub fn name(&self) -> &'a str {
        &self.spec.name
    }
    /// `spec.containers{name}`: an event's fieldPath (contract P-45).
    pub fn field_path(&self) -> String {
        format!("spec.{}{{{}}}", self.kind.field(), self.spec.name)
    }
    pub fn image(&self) -> &'a str {
        self.spec.image.as_deref().unwrap_or_default()
    }
}

impl Pod {
    /// `None` when the object has no UID or no spec: such an object cannot be run or even named.
    pub fn new(object: corev1::Pod, source: PodSource, seen: Timestamp) -> Option<Self> {
        let mut metadata = object.metadata;
        metadata.managed_fields = None;
        let uid = PodUid::new(metadata.uid.clone()?);
        let mut spec = object.spec?;
        spec.containers.shrink_to_fit();
        let status = object.status.unwrap_or_default();
        let ephemeral = spec.ephemeral_containers.iter().flatten().map(as_container).collect();
        Some(Self(Arc::new(Inner { uid, metadata, spec, status, source, seen, ephemeral })))
    }

    /// The same pod with other resources: of each container that `containers` names, and of the pod as a whole.
    #[must_use]
    pub fn with_resources(
        &self,
        containers: &BTreeMap<String, corev1::ResourceRequirements>,
        whole: Option<corev1::ResourceRequirements>,
    ) -> Self {
        let mut spec = self.0.spec.clone();
        spec.resources = whole;
        for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
            if let Some(resources) = containers.get(&container.name) {
                container.resources = Some(resources.clone());
            }
        }
        Self(Arc::new(Inner {
            uid: self.0.uid.clone(),
            metadata: self.0.metadata.clone(),
            spec,
            status: self.0.status.clone(),
            source: self.0.source,
            seen: self.0.seen,
            ephemeral: self.0.ephemeral.clone(),
        }))
    }

    /// Both are the very same object in memory: nothing can have changed.
    pub fn same_object(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
    pub fn uid(&self) -> &PodUid {
        &self.0.uid
    }
    pub fn metadata(&self) -> &ObjectMeta {
        &self.0.metadata
    }
    pub fn spec(&self) -> &corev1::PodSpec {
        &self.0.spec
    }
    /// What the API held when this object was read: the seed of `startTime`, of conditions that others own, of restart counts.
    pub fn api_status(&self) -> &corev1::PodStatus {
        &self.0.status
    }
    pub fn source(&self) -> PodSource {
        self.0.source
    }
    pub fn seen(&self) -> Timestamp {
        self.0.seen
    }
    pub fn name(&self) -> &str {
        self.0.metadata.name.as_deref().unwrap_or_default()
    }
    pub fn namespace(&self) -> &str {
        self.0.metadata.namespace.as_deref().unwrap_or("default")
    }
    /// `name_namespace(uid)`: how upstream words a pod in messages (contract P-25).
    pub fn described(&self) -> String {
        format!("{}_{}({})", self.name(), self.namespace(), self.uid())
    }
    pub fn labels(&self) -> &BTreeMap<String, String> {
        static EMPTY: BTreeMap<String, String> = BTreeMap::new();
        self.0.metadata.labels.as_ref().unwrap_or(&EMPTY)
    }
    pub fn annotations(&self) -> &BTreeMap<String, String> {
        static EMPTY: BTreeMap<String, String> = BTreeMap::new();
        self.0.metadata.annotations.as_ref().unwrap_or(&EMPTY)
    }
    /// `metadata.generation`, for observedGeneration (contract P-14). 0 when the API does not set it.
    pub fn generation(&self) -> i64 {
        self.0.metadata.generation.unwrap_or(0)
    }
    pub fn is_static(&self) -> bool {
        self.0.source != PodSource::Api
    }
    pub fn host_network(&self) -> bool {
        self.0.spec.host_network.unwrap_or(false)
    }
    pub fn restart_policy(&self) -> &str {
        self.0.spec.restart_policy.as_deref().unwrap_or("Always")
    }
    pub fn deletion_timestamp(&self) -> Option<Timestamp> {
        self.0.metadata.deletion_timestamp.as_ref().map(|t| t.0)
    }
    /// `metadata.deletionGracePeriodSeconds` once deletion was asked for.
    pub fn deletion_grace(&self) -> Option<Duration> {
        self.0.metadata.deletion_grace_period_seconds.map(|s| Duration::from_secs(s.max(0) as u64))
    }
    /// `spec.terminationGracePeriodSeconds`, 30 s when unset (API default).
    pub fn termination_grace(&self) -> Duration {
        Duration::from_secs(self.0.spec.termination_grace_period_seconds.unwrap_or(30).max(0) as u64)
    }

    /// Init containers and sidecars in spec order, each with its own kind.
    pub fn init_containers(&self) -> impl Iterator<Item = ContainerRef<'_>> {
        self.0.spec.init_containers.iter().flatten().map(|spec| {
            let sidecar = spec.restart_policy.as_deref() == Some("Always");
            ContainerRef { kind: if sidecar { ContainerKind::Sidecar } else { ContainerKind::Init }, spec }
        })
    }
    /// Main containers in spec order.
    pub fn main_containers(&self) -> impl Iterator<Item = ContainerRef<'_>> {
        self.0.spec.containers.iter().map(|spec| ContainerRef { kind: ContainerKind::Main, spec })
    }
    /// Init containers, sidecars and mains: start order. What resources, readiness and the phase are made of.
    pub fn containers(&self) -> impl Iterator<Item = ContainerRef<'_>> {
        self.init_containers().chain(self.main_containers())
    }
    /// Containers that were added to the running pod for debugging, in the order they were added (contract P-22).
    pub fn ephemeral_containers(&self) -> impl Iterator<Item = ContainerRef<'_>> {
        self.0.ephemeral.iter().map(|spec| ContainerRef { kind: ContainerKind::Ephemeral, spec })
    }
    /// Every container of the pod, ephemeral ones last.
    pub fn all_containers(&self) -> impl Iterator<Item = ContainerRef<'_>> {
        self.containers().chain(self.ephemeral_containers())
    }
    /// Names are unique across all lists of a pod.
    pub fn container(&self, name: &str) -> Option<ContainerRef<'_>> {
        self.all_containers().find(|c| c.name() == name)
    }
    /// The container whose process namespace an ephemeral container joins: `targetContainerName`.
    pub fn ephemeral_target(&self, name: &str) -> Option<&str> {
        let list = self.0.spec.ephemeral_containers.iter().flatten();
        let target = list.filter(|c| c.name == name).find_map(|c| c.target_container_name.as_deref());
        target.filter(|t| !t.is_empty())
    }
}

/// The same fields under another type; `targetContainerName` is all that a container has no place for.
fn as_container(ephemeral: &corev1::EphemeralContainer) -> corev1::Container {
    let e = ephemeral.clone();
    corev1::Container {
        args: e.args,
        command: e.command,
        env: e.env,
        env_from: e.env_from,
        image: e.image,
        image_pull_policy: e.image_pull_policy,
        lifecycle: e.lifecycle,
        liveness_probe: e.liveness_probe,
        name: e.name,
        ports: e.ports,
        readiness_probe: e.readiness_probe,
        resize_policy: e.resize_policy,
        resources: e.resources,
        restart_policy: e.restart_policy,
        restart_policy_rules: e.restart_policy_rules,
        security_context: e.security_context,
        startup_probe: e.startup_probe,
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        termination_message_path: e.termination_message_path,
        termination_message_policy: e.termination_message_policy,
        tty: e.tty,
        volume_devices: e.volume_devices,
        volume_mounts: e.volume_mounts,
        working_dir: e.working_dir,
    }
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.described())
    }
}
