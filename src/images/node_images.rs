//! [`NodeImages`]: the images of this node. Builds the parts of this room, and opens [`flow`](super::flow) for containers and volumes.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use k8s_openapi::api::core::v1::ImageVolumeSource;
use prometheus::Registry;
use protocols::cri::v1;
use tokio::sync::OnceCell;

use super::{
    ImageError, Images, PresentImage, ProviderConfigError, VerificationPolicy,
    backoff::PullBackoff,
    docker_config::NodeConfigFiles,
    flow::{Parts, Turn},
    garbage_collection::{CollectorParts, CollectorSettings, ImageGarbageCollector},
    metrics::ImageMetrics,
    providers::{CredentialProviders, ProviderSettings},
    pull_queue::{Limits, PullQueue},
    pull_records::PullRecords,
    recent_uses::RecentUses,
};
use crate::{
    api::ReferencedObjects,
    cri::ImageService,
    events::{EventSink, Regarding},
    pods::{ContainerRef, Pod, PodUid},
    time::Clock,
};

/// From the KubeletConfiguration and the flags.
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
    /// `<root>/config.json` is the first docker config looked for; `<root>/image_manager` holds the pull records.
    pub root_dir: PathBuf,
    /// `$HOME`, for its docker config.
    pub home: Option<PathBuf>,
    /// `None`: gate KubeletEnsureSecretPulledImages is off.
    pub verification: Option<VerificationPolicy>,
    /// `None`: neither flag was given.
    pub providers: Option<ProviderSettings>,
    /// Gate RuntimeClassInImageCriApi (contract I-15): the pod's handler goes with every image.
    pub handler_in_specs: bool,
}

/// What this room acts with.
pub struct ImageParts {
    pub service: Arc<dyn ImageService>,
    pub objects: Arc<dyn ReferencedObjects>,
    pub events: Arc<dyn EventSink>,
    pub clock: Arc<dyn Clock>,
}

/// Why the agent cannot start on this room's account.
#[derive(Debug, thiserror::Error)]
pub enum ImagesSetupError {
    #[error("failed to setup the image pull records: {0}")]
    Records(#[from] std::io::Error),
    #[error("Failed to register CRI auth plugins: {0}")]
    Providers(#[from] ProviderConfigError),
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

type VolumePull = Shared<BoxFuture<'static, Result<PresentImage, ImageError>>>;

/// The images of this node, behind the runtime's image service.
pub struct NodeImages {
    parts: Arc<Parts>,
    handler_in_specs: bool,
    /// By pod and volume: what is under way.
    volumes: Arc<Mutex<HashMap<(PodUid, String), VolumePull>>>,
}

impl NodeImages {
    /// Reads the pull records and the providers' configuration. Blocking: for the start of the agent.
    pub fn new(settings: &ImageSettings, parts: ImageParts, registry: &Registry) -> Result<Self, ImagesSetupError> {
        let ImageParts { service, objects, events, clock } = parts;
        let metrics = ImageMetrics::new(registry)?;
        let verification = match &settings.verification {
            Some(policy) => Some((policy.clone(), PullRecords::open(&settings.root_dir, metrics.clone())?)),
            None => None,
        };
        let load = |flags| CredentialProviders::load(flags, Arc::clone(&objects), Arc::clone(&clock), &metrics);
        let providers = settings.providers.as_ref().map(load).transpose()?;
        let parallel = if settings.serialize_pulls { Some(1) } else { settings.max_parallel_pulls.filter(|n| *n > 0) };
        let limits = Limits { parallel, qps: settings.registry_qps, burst: settings.registry_burst };
        let records = verification.as_ref().map(|(_, records)| records.clone());
        let parts = Parts {
            queue: PullQueue::new(Arc::clone(&service), Arc::clone(&clock), limits, records),
            node_config: NodeConfigFiles::below(&settings.root_dir, settings.home.as_deref()),
            backoff: Mutex::new(PullBackoff::default()),
            recovered: OnceCell::new(),
            uses: Arc::new(RecentUses::default()),
            verification,
            providers,
            metrics,
            service,
            objects,
            events,
            clock,
        };
        Ok(Self { parts: Arc::new(parts), handler_in_specs: settings.handler_in_specs, volumes: Arc::default() })
    }

    /// The collector of unused images, which shares this room's records and knows what was handed out lately.
    pub fn garbage_collector(&self, settings: CollectorSettings, parts: CollectorParts) -> Arc<ImageGarbageCollector> {
        let of = &self.parts;
        let records = of.verification.as_ref().map(|(_, records)| records.clone());
        Arc::new(ImageGarbageCollector::new(
            settings,
            parts,
            Arc::clone(&of.service),
            records,
            Arc::clone(&of.uses),
            of.metrics.clone(),
        ))
    }

    /// What images of this pod have in common for the runtime: its annotations, and the handler of its class (contract I-15).
    async fn spec(&self, pod: &Pod) -> Result<v1::ImageSpec, ImageError> {
        let annotations = pod.annotations().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let runtime_handler = match self.handler_in_specs {
            true => self.parts.objects.runtime_handler(pod).await.map_err(|e| super::flow::aborted(&e.to_string()))?,
            false => String::new(),
        };
        Ok(v1::ImageSpec { annotations, runtime_handler, ..Default::default() })
    }

    /// Joins the try that another container of the pod has begun. A try goes on when who asked has gone away.
    fn pull_volume(
        &self,
        pod: &Pod,
        volume: &str,
        source: &ImageVolumeSource,
        spec: v1::ImageSpec,
        sandbox: &v1::PodSandboxConfig,
    ) -> VolumePull {
        let key = (pod.uid().clone(), volume.to_owned());
        let mut running = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has ended and still stands here is one whose task panicked: then try anew.
        if let Some(pull) = running.get(&key).filter(|pull| pull.peek().is_none()) {
            return pull.clone();
        }
        let turn = Turn {
            pod: pod.clone(),
            regarding: Regarding::Pod(pod.clone()),
            requested: source.reference.clone().unwrap_or_default(),
            pull_policy: source.pull_policy.clone(),
            spec,
        };
        let (parts, volumes, sandbox, ends) =
            (Arc::clone(&self.parts), Arc::clone(&self.volumes), sandbox.clone(), key.clone());
        parts.metrics.volume_requested();
        let task = tokio::spawn(async move {
            let result = parts.ensure(turn, &sandbox).await;
            volumes.lock().unwrap_or_else(PoisonError::into_inner).remove(&ends);
            result
        });
        let pull = async move { task.await.unwrap_or_else(|error| Err(super::flow::aborted(&error.to_string()))) };
        let pull = pull.boxed().shared();
        running.insert(key, pull.clone());
        pull
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
        let regarding = Regarding::container(pod, container);
        let turn = Turn {
            pod: pod.clone(),
            regarding: regarding.clone(),
            requested: container.image().to_owned(),
            pull_policy: container.spec.image_pull_policy.clone(),
            spec: self.spec(pod).await?,
        };
        let result = self.parts.ensure(turn, sandbox).await;
        if let Err(error) = &result {
            self.parts.warn(&regarding, "Failed", format!("Error: {}", error.reason));
        }
        result
    }

    async fn ensure_volume(
        &self,
        pod: &Pod,
        volume: &str,
        source: &ImageVolumeSource,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<v1::ImageSpec, ImageError> {
        let spec = self.spec(pod).await?;
        let PresentImage { reference, requested, .. } =
            self.pull_volume(pod, volume, source, spec.clone(), sandbox).await?;
        Ok(v1::ImageSpec { image: reference, user_specified_image: requested, ..spec })
    }

    fn volumes_mounted(&self, count: usize, mounted: bool) {
        self.parts.metrics.volumes_mounted(count, mounted);
    }

    fn forget(&self, uid: &PodUid) {
        self.parts.backoff.lock().unwrap_or_else(PoisonError::into_inner).forget(uid);
    }
}
