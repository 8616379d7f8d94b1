//! The flow of one container's image (contract I-01): name → policy → present? → back-off → credentials → pull, with the events of I-02.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use protocols::cri::v1;
use tokio::time::Instant;

use super::{
    ImageError, Images, PresentImage,
    backoff::PullBackoff,
    credentials::{Credential, Keyring},
    docker_config::{self, NodeConfigFiles},
    pull_queue::{Limits, PullQueue, PullRequest, Pulled},
    pull_time::go_duration,
    reference::{ImageReference, defaults_to_always, with_default_tag},
};
use crate::{
    api::ReferencedObjects,
    cri::ImageService,
    events::{EventSink, EventType, Regarding},
    pods::{ContainerRef, Pod, PodUid},
    time::Clock,
};

const ERR_IMAGE_PULL: &str = "ErrImagePull";
/// How long a fresh error is shown before the state turns to ImagePullBackOff.
const SHOW_ERROR: Duration = Duration::from_secs(3);
/// When to look again for an image that may come by other ways (`ctr image import`): the Go kubelet's pod back-off.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// From the KubeletConfiguration.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageSettings {
    /// `serializeImagePulls`.
    pub serialize_pulls: bool,
    /// `maxParallelImagePulls`; `None`: no limit. Counts only without `serialize_pulls`.
    pub max_parallel_pulls: Option<usize>,
    /// `registryPullQPS`; 0: no limit.
    pub registry_qps: f64,
    /// `registryBurst`.
    pub registry_burst: u32,
    /// `<root>/config.json` is the first docker config looked for.
    pub root_dir: PathBuf,
    /// `$HOME`, for its docker config.
    pub home: Option<PathBuf>,
}

/// The images of this node, behind the runtime's image service.
pub struct NodeImages {
    service: Arc<dyn ImageService>,
    objects: Arc<dyn ReferencedObjects>,
    events: Arc<dyn EventSink>,
    clock: Arc<dyn Clock>,
    queue: Arc<PullQueue>,
    node_config: NodeConfigFiles,
    backoff: Mutex<PullBackoff>,
}

/// One container's turn.
struct Turn<'a> {
    pod: &'a Pod,
    container: ContainerRef<'a>,
    /// As the user wrote it.
    requested: &'a str,
    spec: v1::ImageSpec,
}

enum Policy {
    Always,
    IfNotPresent,
    Never,
}

impl NodeImages {
    pub fn new(
        settings: &ImageSettings,
        service: Arc<dyn ImageService>,
        objects: Arc<dyn ReferencedObjects>,
        events: Arc<dyn EventSink>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let parallel = if settings.serialize_pulls { Some(1) } else { settings.max_parallel_pulls.filter(|n| *n > 0) };
        let limits = Limits { parallel, qps: settings.registry_qps, burst: settings.registry_burst };
        Self {
            queue: PullQueue::new(service.clone(), clock.clone(), limits),
            node_config: NodeConfigFiles::below(&settings.root_dir, settings.home.as_deref()),
            backoff: Mutex::default(),
            service,
            objects,
            events,
            clock,
        }
    }

    async fn flow(&self, turn: &Turn<'_>, sandbox: &v1::PodSandboxConfig) -> Result<PresentImage, ImageError> {
        let policy = policy(turn);
        if !matches!(policy, Policy::Always) {
            let found = self.service.image_status(turn.spec.clone()).await.map_err(|error| {
                let message = format!("Failed to inspect image {:?}: {error}", turn.requested);
                self.warn(turn, "InspectFailed", message.clone());
                ImageError { reason: "ImageInspectError", message, retry_at: Some(self.now() + LOOK_AGAIN) }
            })?;
            if let Some(image) = found.filter(|image| !image.id.is_empty()) {
                let message = format!(
                    "Container image {:?} already present on machine and can be accessed by the pod",
                    turn.requested
                );
                self.tell(turn, "Pulled", message);
                return Ok(present(turn, image.id.clone(), Some(&image)));
            }
            if matches!(policy, Policy::Never) {
                let message = format!("Container image {:?} is not present with pull policy of Never", turn.requested);
                self.warn(turn, "ErrImageNeverPull", message.clone());
                let retry_at = Some(self.now() + LOOK_AGAIN);
                return Err(ImageError { reason: "ErrImageNeverPull", message, retry_at });
            }
        }
        self.check_backoff(turn)?;
        let credentials = self.credentials(turn).await?;
        self.pull(turn, credentials, sandbox).await
    }

    fn check_backoff(&self, turn: &Turn<'_>) -> Result<(), ImageError> {
        let backoff = self.backoff.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = backoff.waiting(turn.pod.uid(), turn.requested, self.now());
        let Some((until, error)) = waiting.map(|(until, error)| (until, error.to_owned())) else { return Ok(()) };
        drop(backoff);
        let message = format!("Back-off pulling image {:?}", turn.requested);
        self.tell(turn, "BackOff", message.clone());
        Err(ImageError { reason: "ImagePullBackOff", message: format!("{message}: {error}"), retry_at: Some(until) })
    }

    async fn pull(
        &self,
        turn: &Turn<'_>,
        credentials: Vec<Credential>,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<PresentImage, ImageError> {
        self.tell(turn, "Pulling", format!("Pulling image {:?}", turn.requested));
        let start = self.now();
        let request = PullRequest { image: turn.spec.clone(), credentials, sandbox: sandbox.clone() };
        match self.queue.pull(request).await {
            Ok(Pulled { reference, status, took }) => {
                let waited = self.now() - start;
                let size = status.as_ref().map_or(0, |image| image.size);
                // Who joined a pull on its way has waited for less than it took.
                let message = format!(
                    "Successfully pulled image {:?} in {} ({} including waiting). Image size: {size} bytes.",
                    turn.requested,
                    go_duration(took.min(waited)),
                    go_duration(waited)
                );
                self.tell(turn, "Pulled", message);
                Ok(present(turn, reference, status.as_ref()))
            }
            Err(error) => {
                self.warn(turn, "Failed", format!("Failed to pull image {:?}: {error}", turn.requested));
                let (reason, message) = classify(turn.requested, error);
                let now = self.now();
                let mut backoff = self.backoff.lock().unwrap_or_else(PoisonError::into_inner);
                let until = backoff.failed(turn.pod.uid(), turn.requested, format!("{reason}: {message}"), now);
                Err(ImageError { reason, message, retry_at: Some(until.min(now + SHOW_ERROR)) })
            }
        }
    }

    /// Of the pod's pull secrets first, then of the node. A secret that cannot be had is told and left out; one that is not a docker
    /// config fails the pull.
    async fn credentials(&self, turn: &Turn<'_>) -> Result<Vec<Credential>, ImageError> {
        let failed =
            |message: String| ImageError { reason: ERR_IMAGE_PULL, message, retry_at: Some(self.now() + LOOK_AGAIN) };
        let repository = ImageReference::parse(&turn.spec.image).map_err(|error| failed(error.to_string()))?.repository;
        let (mut keyring, mut missing) = (Keyring::default(), Vec::new());
        let (pod, namespace) = (turn.pod, turn.pod.namespace());
        let references = pod.spec().image_pull_secrets.iter().flatten().map(|r| r.name.as_str());
        for name in references.filter(|name| !name.is_empty()) {
            match self.objects.secret(namespace, name).await {
                Ok(secret) => docker_config::add_secret(&mut keyring, &secret)
                    .map_err(|error| failed(format!("image pull secret {namespace}/{name}: {error}")))?,
                Err(_) => missing.push(name),
            }
        }
        if !missing.is_empty() {
            let message = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                missing.join(", ")
            );
            let regarding = Regarding::Pod(pod.clone());
            self.events.event(regarding, EventType::Warning, "FailedToRetrieveImagePullSecret", message);
        }
        let mut credentials = keyring.lookup(&repository);
        credentials.extend(self.node_config.keyring().await.lookup(&repository));
        Ok(credentials)
    }

    fn now(&self) -> Instant {
        self.clock.now().mono
    }
    fn tell(&self, turn: &Turn<'_>, reason: &str, message: String) {
        self.events.event(Regarding::container(turn.pod, turn.container), EventType::Normal, reason, message);
    }
    fn warn(&self, turn: &Turn<'_>, reason: &str, message: String) {
        self.events.event(Regarding::container(turn.pod, turn.container), EventType::Warning, reason, message);
    }
}

#[async_trait]
impl Images for NodeImages {
    async fn ensure(
        &self,
        pod: &Pod,
        container: ContainerRef<'_>,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<PresentImage, ImageError> {
        let requested = container.image();
        let annotations = pod.annotations().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let mut turn = Turn { pod, container, requested, spec: v1::ImageSpec { annotations, ..Default::default() } };
        let result = match with_default_tag(requested) {
            Ok(image) => {
                turn.spec.image = image;
                self.flow(&turn, sandbox).await
            }
            Err(error) => {
                let message = format!("Failed to apply default image tag {requested:?}: {error}");
                self.warn(&turn, "InspectFailed", message.clone());
                Err(ImageError { reason: "InvalidImageName", message, retry_at: None })
            }
        };
        if let Err(error) = &result {
            self.warn(&turn, "Failed", format!("Error: {}", error.reason));
        }
        result
    }

    fn forget(&self, uid: &PodUid) {
        self.backoff.lock().unwrap_or_else(PoisonError::into_inner).forget(uid);
    }
}

fn policy(turn: &Turn<'_>) -> Policy {
    match turn.container.spec.image_pull_policy.as_deref() {
        Some("Always") => Policy::Always,
        Some("Never") => Policy::Never,
        None | Some("") if defaults_to_always(turn.requested) => Policy::Always,
        _ => Policy::IfNotPresent,
    }
}

/// An image that names no user runs as root.
fn present(turn: &Turn<'_>, reference: String, status: Option<&v1::Image>) -> PresentImage {
    let uid = status.and_then(|image| image.uid.map(|uid| uid.value));
    let username = match (uid, status) {
        (None, Some(image)) => image.username.clone(),
        _ => String::new(),
    };
    let uid = if uid.is_none() && username.is_empty() { Some(0) } else { uid };
    PresentImage { reference, requested: turn.requested.to_owned(), uid, username }
}

/// Runtimes name two failures at the start of their message (contract I-03).
fn classify(image: &str, error: String) -> (&'static str, String) {
    if let Some(detail) = error.strip_prefix("RegistryUnavailable") {
        let message = format!("image pull failed for {image} because the registry is unavailable{detail}");
        return ("RegistryUnavailable", message);
    }
    if let Some(detail) = error.strip_prefix("SignatureValidationFailed") {
        let message = format!("image pull failed for {image} because the signature validation failed{detail}");
        return ("SignatureValidationFailed", message);
    }
    (ERR_IMAGE_PULL, error)
}
