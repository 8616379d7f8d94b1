//! The flow of one image for one pod (contract I-01): name → policy → present? → may the pod use it? → back-off → credentials → pull, with the
//! events of I-02.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use protocols::cri::v1;
use tokio::{sync::OnceCell, time::Instant};

use super::{
    ImageError, PresentImage, VerificationPolicy,
    backoff::PullBackoff,
    credentials::{Credential, CredentialSource, Keyring},
    docker_config::{self, NodeConfigFiles},
    metrics::ImageMetrics,
    providers::CredentialProviders,
    pull_queue::{PullFailure, PullQueue, PullRequest, Pulled, secret_credential},
    pull_records::PullRecords,
    pull_time::go_duration,
    recent_uses::RecentUses,
    record_files::PullCredentials,
    reference::{ImageReference, defaults_to_always, with_default_tag},
    verification::{Check, Comparison, check, compare},
};
use crate::{
    api::ReferencedObjects,
    cri::ImageService,
    events::{EventSink, EventType, Regarding},
    pods::Pod,
    time::Clock,
};

const ERR_IMAGE_PULL: &str = "ErrImagePull";
/// How long a fresh error is shown before the state turns to ImagePullBackOff.
const SHOW_ERROR: Duration = Duration::from_secs(3);
/// When to look again for an image that may come by other ways (`ctr image import`): the Go kubelet's pod back-off.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// What the flow acts with.
pub(super) struct Parts {
    pub(super) service: Arc<dyn ImageService>,
    pub(super) objects: Arc<dyn ReferencedObjects>,
    pub(super) events: Arc<dyn EventSink>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) queue: Arc<PullQueue>,
    pub(super) node_config: NodeConfigFiles,
    pub(super) backoff: Mutex<PullBackoff>,
    /// `None`: pods may use whatever is there.
    pub(super) verification: Option<(VerificationPolicy, PullRecords)>,
    /// What a crash left in the records was looked at.
    pub(super) recovered: OnceCell<()>,
    pub(super) providers: Option<CredentialProviders>,
    pub(super) uses: Arc<RecentUses>,
    pub(super) metrics: ImageMetrics,
}

/// One image that a pod asks for.
pub(super) struct Turn {
    pub(super) pod: Pod,
    /// What the events are about.
    pub(super) regarding: Regarding,
    /// As the user wrote it.
    pub(super) requested: String,
    /// As the user wrote it.
    pub(super) pull_policy: Option<String>,
    /// Its `image` is filled in here.
    pub(super) spec: v1::ImageSpec,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Always,
    IfNotPresent,
    Never,
}

/// The pod's credentials for the image, looked up at most once in a turn.
type Credentials = OnceCell<Vec<Credential>>;

impl Parts {
    pub(super) async fn ensure(
        &self,
        mut turn: Turn,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<PresentImage, ImageError> {
        let policy = policy(&turn);
        let (mut present, mut pull) = (None, None);
        let result = match with_default_tag(&turn.requested) {
            Ok(image) => {
                turn.spec.image = image;
                self.flow(&turn, policy, sandbox, &mut present, &mut pull).await
            }
            Err(error) => {
                let message = format!("Failed to apply default image tag {:?}: {error}", turn.requested);
                self.warn(&turn.regarding, "InspectFailed", message.clone());
                Err(ImageError { reason: "InvalidImageName", message, retry_at: None })
            }
        };
        self.metrics.ensured(policy.word(), present, pull);
        if let Ok(image) = &result {
            self.uses.touch(&image.reference, self.now());
        }
        result
    }

    async fn flow(
        &self,
        turn: &Turn,
        policy: Policy,
        sandbox: &v1::PodSandboxConfig,
        present_locally: &mut Option<bool>,
        pull_required: &mut Option<bool>,
    ) -> Result<PresentImage, ImageError> {
        let credentials = Credentials::new();
        if policy != Policy::Always {
            let found = self.inspect(turn).await?;
            *present_locally = Some(found.is_some());
            if let Some(image) = found {
                if !self.must_pull(turn, &image.id, &credentials).await? {
                    *pull_required = Some(false);
                    self.tell(&turn.regarding, "Pulled", self.already_present(turn));
                    return Ok(present(turn, image.id.clone(), Some(&image)));
                }
                *pull_required = Some(true);
            }
            if policy == Policy::Never {
                let message = format!("Container image {:?} is not present with pull policy of Never", turn.requested);
                self.warn(&turn.regarding, "ErrImageNeverPull", message.clone());
                let retry_at = Some(self.now() + LOOK_AGAIN);
                return Err(ImageError { reason: "ErrImageNeverPull", message, retry_at });
            }
        }
        *pull_required = Some(true);
        self.check_backoff(turn)?;
        let credentials = self.credentials(turn, &credentials).await?.to_vec();
        self.pull(turn, credentials, sandbox).await
    }

    async fn inspect(&self, turn: &Turn) -> Result<Option<v1::Image>, ImageError> {
        let found = self.service.image_status(turn.spec.clone()).await.map_err(|error| {
            let message = format!("Failed to inspect image {:?}: {error}", turn.requested);
            self.warn(&turn.regarding, "InspectFailed", message.clone());
            ImageError { reason: "ImageInspectError", message, retry_at: Some(self.now() + LOOK_AGAIN) }
        })?;
        Ok(found.filter(|image| !image.id.is_empty()))
    }

    fn already_present(&self, turn: &Turn) -> String {
        let checked = if self.verification.is_some() { " and can be accessed by the pod" } else { "" };
        format!("Container image {:?} already present on machine{checked}", turn.requested)
    }

    /// Whether the pod has to prove by a pull that it may use the image that is there (contract I-10).
    async fn must_pull(&self, turn: &Turn, image_ref: &str, credentials: &Credentials) -> Result<bool, ImageError> {
        let Some((policy, records)) = &self.verification else { return Ok(false) };
        self.recover(records).await;
        let outcome = match check(policy, &turn.requested, &records.knowledge(&turn.requested, image_ref)) {
            Check::AllowedByPolicy => "credentialPolicyAllowed",
            Check::Recorded => "credentialRecordFound",
            Check::MustPull => "mustAuthenticate",
            Check::Unknown => "error",
            Check::Compare(grants) => {
                let mine = self.credentials(turn, credentials).await.inspect_err(|_| self.metrics.checked("error"))?;
                let secrets: Vec<_> = mine.iter().filter_map(secret_credential).collect();
                let account = mine.iter().find_map(|credential| match &credential.source {
                    CredentialSource::ServiceAccount(account) => Some(account),
                    _ => None,
                });
                match compare(&grants, &secrets, account) {
                    Comparison::MustPull => "mustAuthenticate",
                    Comparison::Matches => "credentialRecordFound",
                    Comparison::MatchesAndNote(secret) => {
                        let with = PullCredentials { kubernetes_secrets: vec![secret], ..Default::default() };
                        records.note(&turn.requested, image_ref, with, self.clock.now().wall).await;
                        "credentialRecordFound"
                    }
                }
            }
        };
        self.metrics.checked(outcome);
        Ok(matches!(outcome, "mustAuthenticate" | "error"))
    }

    /// Once in the life of the agent, before the records are first asked: pulls that an earlier agent's death cut off. While the runtime does
    /// not list its images, the intents stand for themselves.
    async fn recover(&self, records: &PullRecords) {
        let work = async || {
            if !records.left_over() {
                return Ok(());
            }
            let images = self.service.list_images().await?;
            records.recover(images, self.clock.now().wall).await;
            Ok::<(), crate::cri::CriError>(())
        };
        if let Err(error) = self.recovered.get_or_try_init(work).await {
            tracing::error!(%error, "failed to list images");
        }
    }

    fn check_backoff(&self, turn: &Turn) -> Result<(), ImageError> {
        let backoff = self.backoff.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = backoff.waiting(turn.pod.uid(), &turn.requested, self.now());
        let Some((until, error)) = waiting.map(|(until, error)| (until, error.to_owned())) else { return Ok(()) };
        drop(backoff);
        let message = format!("Back-off pulling image {:?}", turn.requested);
        self.tell(&turn.regarding, "BackOff", message.clone());
        Err(ImageError { reason: "ImagePullBackOff", message: format!("{message}: {error}"), retry_at: Some(until) })
    }

    async fn pull(
        &self,
        turn: &Turn,
        credentials: Vec<Credential>,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<PresentImage, ImageError> {
        self.tell(&turn.regarding, "Pulling", format!("Pulling image {:?}", turn.requested));
        let start = self.now();
        let request = PullRequest {
            requested: turn.requested.clone(),
            image: turn.spec.clone(),
            credentials,
            sandbox: sandbox.clone(),
        };
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
                self.tell(&turn.regarding, "Pulled", message);
                self.metrics.pulled(size, waited);
                Ok(present(turn, reference, status.as_ref()))
            }
            Err(PullFailure::Record(message)) => Err(self.failed(message)),
            Err(PullFailure::Pull(error)) => {
                self.warn(&turn.regarding, "Failed", format!("Failed to pull image {:?}: {error}", turn.requested));
                let (reason, message) = classify(&turn.requested, error);
                let now = self.now();
                let mut backoff = self.backoff.lock().unwrap_or_else(PoisonError::into_inner);
                let until = backoff.failed(turn.pod.uid(), &turn.requested, format!("{reason}: {message}"), now);
                Err(ImageError { reason, message, retry_at: Some(until.min(now + SHOW_ERROR)) })
            }
        }
    }

    async fn credentials<'a>(&self, turn: &Turn, held: &'a Credentials) -> Result<&'a [Credential], ImageError> {
        held.get_or_try_init(|| self.look_up_credentials(turn)).await.map(Vec::as_slice)
    }

    /// Of the pod's pull secrets first, then of the node's files, then of the providers. A secret that cannot be had is told and left out;
    /// one that is not a docker config fails the pull.
    async fn look_up_credentials(&self, turn: &Turn) -> Result<Vec<Credential>, ImageError> {
        let repository =
            ImageReference::parse(&turn.spec.image).map_err(|error| self.failed(error.to_string()))?.repository;
        let (mut keyring, mut missing) = (Keyring::default(), Vec::new());
        let (pod, namespace) = (&turn.pod, turn.pod.namespace());
        let references = pod.spec().image_pull_secrets.iter().flatten().map(|r| r.name.as_str());
        for name in references.filter(|name| !name.is_empty()) {
            match self.objects.secret(namespace, name).await {
                Ok(secret) => docker_config::add_secret(&mut keyring, &secret, namespace, name)
                    .map_err(|error| self.failed(format!("image pull secret {namespace}/{name}: {error}")))?,
                Err(_) => missing.push(name),
            }
        }
        if !missing.is_empty() {
            let message = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                missing.join(", ")
            );
            self.warn(&Regarding::Pod(pod.clone()), "FailedToRetrieveImagePullSecret", message);
        }
        let mut credentials = keyring.lookup(&repository);
        credentials.extend(self.node_config.keyring().await.lookup(&repository));
        if let Some(providers) = &self.providers {
            credentials.extend(providers.keyring(&repository, pod).await.lookup(&repository));
        }
        let mut seen = BTreeSet::new();
        credentials.retain(|credential| seen.insert((credential.hash(), format!("{:?}", credential.source))));
        Ok(credentials)
    }

    /// A failure that back-off does not count.
    fn failed(&self, message: String) -> ImageError {
        ImageError { reason: ERR_IMAGE_PULL, message, retry_at: Some(self.now() + LOOK_AGAIN) }
    }

    fn now(&self) -> Instant {
        self.clock.now().mono
    }
    fn tell(&self, regarding: &Regarding, reason: &str, message: String) {
        self.events.event(regarding.clone(), EventType::Normal, reason, message);
    }
    pub(super) fn warn(&self, regarding: &Regarding, reason: &str, message: String) {
        self.events.event(regarding.clone(), EventType::Warning, reason, message);
    }
}

/// The try itself ended badly.
pub(super) fn aborted(why: &str) -> ImageError {
    ImageError { reason: ERR_IMAGE_PULL, message: format!("image pull was aborted: {why}"), retry_at: None }
}

impl Policy {
    /// As the metric writes it.
    fn word(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::IfNotPresent => "ifnotpresent",
            Self::Never => "never",
        }
    }
}

fn policy(turn: &Turn) -> Policy {
    match turn.pull_policy.as_deref() {
        Some("Always") => Policy::Always,
        Some("Never") => Policy::Never,
        None | Some("") if defaults_to_always(&turn.requested) => Policy::Always,
        _ => Policy::IfNotPresent,
    }
}

/// An image that names no user runs as root.
fn present(turn: &Turn, reference: String, status: Option<&v1::Image>) -> PresentImage {
    let uid = status.and_then(|image| image.uid.map(|uid| uid.value));
    let username = match (uid, status) {
        (None, Some(image)) => image.username.clone(),
        _ => String::new(),
    };
    let uid = if uid.is_none() && username.is_empty() { Some(0) } else { uid };
    PresentImage { reference, requested: turn.requested.clone(), uid, username }
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
