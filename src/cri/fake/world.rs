//! What the fake runtime runs, and the rules by which that changes. No waiting here: every method is one instant.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use jiff::Timestamp;
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::script::{Events, ExecScript, ImageScript, Script};
use crate::cri::{ContainerState, CriError, POD_UID_LABEL, v1};

pub(super) use v1::ContainerEventType as EventKind;

/// containerd keeps about this many events for a subscriber that is not there.
const BACKLOG: usize = 1000;

pub(super) struct FakeSandbox {
    pub(super) id: String,
    pub(super) config: v1::PodSandboxConfig,
    pub(super) handler: String,
    pub(super) ready: bool,
    pub(super) created: Timestamp,
    pub(super) ip: String,
    pub(super) reserved_name: String,
}

impl FakeSandbox {
    pub(super) fn uid(&self) -> &str {
        self.config.metadata.as_ref().map_or("", |m| m.uid.as_str())
    }
    pub(super) fn pod_name(&self) -> &str {
        self.config.metadata.as_ref().map_or("", |m| m.name.as_str())
    }
    pub(super) fn state(&self) -> i32 {
        let state = if self.ready { v1::PodSandboxState::SandboxReady } else { v1::PodSandboxState::SandboxNotready };
        state as i32
    }
    fn host_network(&self) -> bool {
        let context = self.config.linux.as_ref().and_then(|l| l.security_context.as_ref());
        let options = context.and_then(|c| c.namespace_options.as_ref());
        options.is_some_and(|o| o.network() == v1::NamespaceMode::Node)
    }
    pub(super) fn listed(&self) -> v1::PodSandbox {
        v1::PodSandbox {
            id: self.id.clone(),
            metadata: self.config.metadata.clone(),
            state: self.state(),
            created_at: nanos(self.created),
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            runtime_handler: self.handler.clone(),
        }
    }
    pub(super) fn status(&self) -> v1::PodSandboxStatus {
        let ip = if self.ready && !self.host_network() { self.ip.clone() } else { String::new() };
        let network = if self.host_network() { v1::NamespaceMode::Node } else { v1::NamespaceMode::Pod };
        let options = v1::NamespaceOption { network: network as i32, ..Default::default() };
        v1::PodSandboxStatus {
            id: self.id.clone(),
            metadata: self.config.metadata.clone(),
            state: self.state(),
            created_at: nanos(self.created),
            network: Some(v1::PodSandboxNetworkStatus { ip, additional_ips: Vec::new() }),
            linux: Some(v1::LinuxPodSandboxStatus { namespaces: Some(v1::Namespace { options: Some(options) }) }),
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            runtime_handler: self.handler.clone(),
        }
    }
}

pub(super) struct FakeContainer {
    pub(super) id: String,
    pub(super) sandbox_id: String,
    pub(super) pod_uid: String,
    pub(super) pod_name: String,
    pub(super) name: String,
    pub(super) config: v1::ContainerConfig,
    pub(super) log_directory: String,
    pub(super) state: ContainerState,
    pub(super) created: Timestamp,
    pub(super) started: Option<Timestamp>,
    pub(super) finished: Option<Timestamp>,
    pub(super) exit_code: i32,
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) script: Script,
    /// Cancelled when the first process ends.
    pub(super) exited: CancellationToken,
    pub(super) reserved_name: String,
}

impl FakeContainer {
    pub(super) fn state(&self) -> i32 {
        let state = match self.state {
            ContainerState::Created => v1::ContainerState::ContainerCreated,
            ContainerState::Running => v1::ContainerState::ContainerRunning,
            ContainerState::Exited => v1::ContainerState::ContainerExited,
            ContainerState::Unknown => v1::ContainerState::ContainerUnknown,
        };
        state as i32
    }
    fn image_name(&self) -> &str {
        self.config.image.as_ref().map_or("", |i| i.image.as_str())
    }
    pub(super) fn listed(&self) -> v1::Container {
        v1::Container {
            id: self.id.clone(),
            pod_sandbox_id: self.sandbox_id.clone(),
            metadata: self.config.metadata.clone(),
            image: self.config.image.clone(),
            image_ref: image_id(self.image_name()),
            state: self.state(),
            created_at: nanos(self.created),
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            image_id: image_id(self.image_name()),
        }
    }
    pub(super) fn status(&self) -> v1::ContainerStatus {
        let resources = self.config.linux.as_ref().and_then(|l| l.resources.clone());
        let image = self.config.image.clone().unwrap_or_default();
        let specified = if image.user_specified_image.is_empty() {
            image.image.clone()
        } else {
            image.user_specified_image.clone()
        };
        v1::ContainerStatus {
            id: self.id.clone(),
            metadata: self.config.metadata.clone(),
            state: self.state(),
            created_at: nanos(self.created),
            started_at: self.started.map_or(0, nanos),
            finished_at: self.finished.map_or(0, nanos),
            exit_code: self.exit_code,
            image_ref: format!("{}@{}", specified.split('@').next().unwrap_or_default(), image_id(self.image_name())),
            image: Some(v1::ImageSpec { image: specified, ..image }),
            reason: self.reason.clone(),
            message: self.message.clone(),
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            mounts: self.config.mounts.clone(),
            log_path: format!("{}/{}", self.log_directory, self.config.log_path),
            resources: Some(v1::ContainerResources { linux: resources }),
            image_id: image_id(self.image_name()),
            user: None,
            stop_signal: self.config.stop_signal,
        }
    }
}

#[derive(Default)]
pub(super) struct World {
    pub(super) sandboxes: BTreeMap<String, FakeSandbox>,
    pub(super) containers: BTreeMap<String, FakeContainer>,
    pub(super) images: BTreeSet<String>,
    pub(super) scripts: HashMap<String, Vec<Script>>,
    pub(super) exec_scripts: HashMap<String, ExecScript>,
    pub(super) image_scripts: HashMap<String, ImageScript>,
    pub(super) events: Events,
    pub(super) subscribers: Vec<UnboundedSender<Result<v1::ContainerEventResponse, CriError>>>,
    pub(super) backlog: VecDeque<v1::ContainerEventResponse>,
    pub(super) max_running: HashMap<(String, String), usize>,
    pub(super) max_ready: HashMap<String, usize>,
    pub(super) conditions: (bool, bool),
    pub(super) features: Option<v1::RuntimeFeatures>,
    pub(super) streaming_url: String,
    /// Container name → bytes in use, for the stats.
    pub(super) memory_use: HashMap<String, u64>,
    reserved: HashMap<String, String>,
    starts: HashMap<(String, String), usize>,
    next_id: u64,
}

fn nanos(at: Timestamp) -> i64 {
    i64::try_from(at.as_nanosecond()).unwrap_or(i64::MAX)
}

/// The same for the same name, always.
pub(super) fn image_id(name: &str) -> String {
    if name.starts_with("sha256:") {
        return name.to_owned();
    }
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    format!("sha256:{:064x}", hasher.finish())
}

fn unknown(rpc: &'static str, message: String) -> CriError {
    CriError::new(rpc, Code::Unknown, message)
}

fn not_found(rpc: &'static str, what: &str, id: &str) -> CriError {
    CriError::new(rpc, Code::NotFound, format!("an error occurred when try to find {what} {id:?}: not found"))
}

/// As containerd spells a state in its errors.
pub(super) fn state_name(state: ContainerState) -> &'static str {
    match state {
        ContainerState::Created => "CONTAINER_CREATED",
        ContainerState::Running => "CONTAINER_RUNNING",
        ContainerState::Exited => "CONTAINER_EXITED",
        ContainerState::Unknown => "CONTAINER_UNKNOWN",
    }
}

impl World {
    pub(super) fn new() -> Self {
        Self { conditions: (true, true), streaming_url: "http://127.0.0.1:1".to_owned(), ..Self::default() }
    }

    /// Reserves a name for a new ID; a name can be had once.
    pub(super) fn reserve(&mut self, name: &str, prefix: &str) -> Result<String, String> {
        if let Some(owner) = self.reserved.get(name) {
            return Err(format!("name {name:?} is reserved for {owner:?}"));
        }
        self.next_id += 1;
        let id = format!("{prefix}{:06}", self.next_id);
        self.reserved.insert(name.to_owned(), id.clone());
        Ok(id)
    }

    pub(super) fn unreserve(&mut self, name: &str) {
        self.reserved.remove(name);
    }

    pub(super) fn run_sandbox(
        &mut self,
        id: String,
        name: String,
        config: v1::PodSandboxConfig,
        handler: String,
        now: Timestamp,
    ) {
        let n = self.next_id;
        let ip = format!("10.88.{}.{}", n / 250, n % 250 + 2);
        let sandbox =
            FakeSandbox { id: id.clone(), config, handler, ready: true, created: now, ip, reserved_name: name };
        let uid = sandbox.uid().to_owned();
        self.sandboxes.insert(id.clone(), sandbox);
        let ready = self.sandboxes.values().filter(|s| s.ready && s.uid() == uid).count();
        let most = self.max_ready.entry(uid).or_default();
        *most = (*most).max(ready);
        self.emit(EventKind::ContainerCreatedEvent, &id, &id, now);
        self.emit(EventKind::ContainerStartedEvent, &id, &id, now);
    }

    pub(super) fn stop_sandbox(&mut self, id: &str, now: Timestamp) {
        self.kill_all(id, now);
        if self.sandboxes.get_mut(id).is_some_and(|s| std::mem::replace(&mut s.ready, false)) {
            self.emit(EventKind::ContainerStoppedEvent, id, id, now);
        }
    }

    pub(super) fn remove_sandbox(&mut self, id: &str, now: Timestamp) {
        self.stop_sandbox(id, now);
        let inside: Vec<_> = self.containers.values().filter(|c| c.sandbox_id == id).map(|c| c.id.clone()).collect();
        for container in inside {
            self.remove_container(&container, now);
        }
        if let Some(sandbox) = self.sandboxes.remove(id) {
            self.reserved.remove(&sandbox.reserved_name);
            self.emit(EventKind::ContainerDeletedEvent, id, id, now);
        }
    }

    pub(super) fn create_container(
        &mut self,
        id: String,
        name: String,
        sandbox_id: &str,
        config: v1::ContainerConfig,
        now: Timestamp,
    ) -> Result<(), CriError> {
        const RPC: &str = "CreateContainer";
        let sandbox = self.sandboxes.get(sandbox_id).ok_or_else(|| not_found(RPC, "sandbox", sandbox_id))?;
        if !sandbox.ready {
            return Err(unknown(RPC, format!("sandbox container {sandbox_id:?} is not running")));
        }
        let image = config.image.as_ref().map_or("", |i| i.image.as_str());
        if !self.has_image(image) {
            return Err(CriError::new(RPC, Code::NotFound, format!("failed to resolve image {image:?}: not found")));
        }
        let container_name = config.metadata.as_ref().map_or_else(String::new, |m| m.name.clone());
        let container = FakeContainer {
            id: id.clone(),
            sandbox_id: sandbox_id.to_owned(),
            pod_uid: config.labels.get(POD_UID_LABEL).cloned().unwrap_or_else(|| sandbox.uid().to_owned()),
            pod_name: sandbox.pod_name().to_owned(),
            name: container_name,
            log_directory: sandbox.config.log_directory.clone(),
            config,
            state: ContainerState::Created,
            created: now,
            started: None,
            finished: None,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            script: Script::forever(),
            exited: CancellationToken::new(),
            reserved_name: name,
        };
        self.containers.insert(id.clone(), container);
        self.emit(EventKind::ContainerCreatedEvent, &id, sandbox_id, now);
        Ok(())
    }

    /// Returns what is needed to let it live.
    pub(super) fn start_container(
        &mut self,
        id: &str,
        now: Timestamp,
    ) -> Result<(CancellationToken, Script), CriError> {
        const RPC: &str = "StartContainer";
        let container = self.containers.get(id).ok_or_else(|| not_found(RPC, "container", id))?;
        if container.state != ContainerState::Created {
            return Err(unknown(RPC, format!("container is in {} state", state_name(container.state))));
        }
        let sandbox_id = container.sandbox_id.clone();
        if !self.sandboxes.get(&sandbox_id).is_some_and(|s| s.ready) {
            return Err(unknown(RPC, format!("sandbox container {sandbox_id:?} is not running")));
        }
        let key = (container.pod_uid.clone(), container.name.clone());
        let script = self.next_script(&key, &format!("{}/{}", container.pod_name, container.name));
        let Some(container) = self.containers.get_mut(id) else { return Err(not_found(RPC, "container", id)) };
        container.script = script.clone();
        if let Some(message) = &script.start_error {
            container.state = ContainerState::Exited;
            container.finished = Some(now);
            container.exit_code = 128;
            container.reason = "StartError".to_owned();
            container.message.clone_from(message);
            container.exited.cancel();
            return Err(unknown(RPC, format!("failed to create containerd task: {message}")));
        }
        container.state = ContainerState::Running;
        container.started = Some(now);
        let exited = container.exited.clone();
        let of_name =
            |c: &&FakeContainer| c.state == ContainerState::Running && (&c.pod_uid, &c.name) == (&key.0, &key.1);
        let running = self.containers.values().filter(of_name).count();
        let most = self.max_running.entry(key).or_default();
        *most = (*most).max(running);
        self.emit(EventKind::ContainerStartedEvent, id, &sandbox_id, now);
        Ok((exited, script))
    }

    pub(super) fn starts_of(&self, pod_uid: &str, container: &str) -> usize {
        self.starts.get(&(pod_uid.to_owned(), container.to_owned())).copied().unwrap_or(0)
    }

    pub(super) fn forget_pod(&mut self, pod_uid: &str, pod_name: &str) {
        self.starts.retain(|(uid, _), _| uid != pod_uid);
        self.max_running.retain(|(uid, _), _| uid != pod_uid);
        self.max_ready.remove(pod_uid);
        let of_pod = |name: &String| name.split_once('/').is_some_and(|(pod, _)| pod == pod_name);
        self.scripts.retain(|name, _| !of_pod(name));
    }

    fn next_script(&mut self, key: &(String, String), in_pod: &str) -> Script {
        let starts = self.starts.entry(key.clone()).or_default();
        let nth = *starts;
        *starts += 1;
        let scripts = self.scripts.get(in_pod).or_else(|| self.scripts.get(&key.1));
        let script = scripts.and_then(|all| all.get(nth).or(all.last()));
        script.cloned().unwrap_or_else(Script::forever)
    }

    /// The first process of a running container ends.
    pub(super) fn end_container(&mut self, id: &str, code: i32, reason: Option<&str>, now: Timestamp) {
        let Some(container) = self.containers.get_mut(id).filter(|c| c.state == ContainerState::Running) else {
            return;
        };
        container.state = ContainerState::Exited;
        container.finished = Some(now);
        container.exit_code = code;
        container.reason = reason.unwrap_or(if code == 0 { "Completed" } else { "Error" }).to_owned();
        container.exited.cancel();
        let sandbox_id = container.sandbox_id.clone();
        self.emit(EventKind::ContainerStoppedEvent, id, &sandbox_id, now);
    }

    pub(super) fn remove_container(&mut self, id: &str, now: Timestamp) {
        self.end_container(id, 137, None, now);
        if let Some(container) = self.containers.remove(id) {
            self.reserved.remove(&container.reserved_name);
            self.emit(EventKind::ContainerDeletedEvent, id, &container.sandbox_id, now);
        }
    }

    pub(super) fn container(&self, rpc: &'static str, id: &str) -> Result<&FakeContainer, CriError> {
        self.containers.get(id).ok_or_else(|| not_found(rpc, "container", id))
    }

    pub(super) fn sandbox(&self, rpc: &'static str, id: &str) -> Result<&FakeSandbox, CriError> {
        self.sandboxes.get(id).ok_or_else(|| not_found(rpc, "sandbox", id))
    }

    pub(super) fn has_image(&self, name: &str) -> bool {
        self.images.contains(name) || self.images.iter().any(|held| image_id(held) == name)
    }

    pub(super) fn image(&self, name: &str) -> v1::Image {
        let id = image_id(name);
        let repository = name.split('@').next().unwrap_or(name);
        v1::Image {
            repo_tags: vec![name.to_owned()],
            repo_digests: vec![format!("{repository}@{id}")],
            size: 1 << 20,
            id,
            ..Default::default()
        }
    }

    fn kill_all(&mut self, sandbox_id: &str, now: Timestamp) {
        let inside: Vec<_> =
            self.containers.values().filter(|c| c.sandbox_id == sandbox_id).map(|c| c.id.clone()).collect();
        for id in inside {
            self.end_container(&id, 137, None, now);
        }
    }

    /// Makes an event with the statuses of this instant, and sends it on its way.
    pub(super) fn emit(&mut self, kind: EventKind, id: &str, sandbox_id: &str, now: Timestamp) {
        let statuses = self.containers.values().filter(|c| c.sandbox_id == sandbox_id).map(FakeContainer::status);
        let event = v1::ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind as i32,
            created_at: nanos(now),
            pod_sandbox_status: self.sandboxes.get(sandbox_id).map(FakeSandbox::status),
            containers_statuses: statuses.collect(),
        };
        let copies = match self.events {
            Events::Delivered | Events::Delayed(_) => 1,
            Events::Duplicated => 2,
            Events::Lost | Events::Unimplemented => 0,
        };
        for _ in 0..copies {
            self.send(event.clone());
        }
    }

    fn send(&mut self, event: v1::ContainerEventResponse) {
        self.subscribers.retain(|subscriber| !subscriber.is_closed());
        if self.subscribers.is_empty() {
            if self.backlog.len() == BACKLOG {
                self.backlog.pop_front();
            }
            self.backlog.push_back(event);
            return;
        }
        for subscriber in &self.subscribers {
            let subscriber = subscriber.clone();
            match self.events {
                Events::Delayed(by) => {
                    let event = event.clone();
                    tokio::spawn(async move {
                        tokio::time::sleep(by).await;
                        let _ = subscriber.send(Ok(event));
                    });
                }
                _ => {
                    let _ = subscriber.send(Ok(event.clone()));
                }
            }
        }
    }
}
