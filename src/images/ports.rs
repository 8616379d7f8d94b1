//! What the pod worker sees of images.

use async_trait::async_trait;
use k8s_openapi::api::core::v1::ImageVolumeSource;
use protocols::cri::v1;
use tokio::time::Instant;

use crate::pods::{ContainerRef, Pod, PodUid};

/// An image that is on the node and may be used by the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PresentImage {
    /// What goes into `ContainerConfig.image.image` (the runtime's reference for it).
    pub reference: String,
    /// `spec.containers[].image` as the user wrote it.
    pub requested: String,
    /// The image's user, for runAsNonRoot: uid if numeric, else the name (contract P-59).
    pub uid: Option<i64>,
    pub username: String,
}

/// Why a container has no image. `reason` and `message` go into the container's Waiting state (contract I-03).
#[derive(Debug, Clone, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct ImageError {
    /// `ErrImagePull`, `ImagePullBackOff`, `ErrImageNeverPull`, `InvalidImageName`, `ImageInspectError`, `RegistryUnavailable`, …
    pub reason: &'static str,
    pub message: String,
    /// When it is worth asking again. `None`: only a changed pod helps.
    pub retry_at: Option<Instant>,
}

#[async_trait]
pub trait Images: Send + Sync + 'static {
    /// Makes sure the container's image is on the node, by its pull policy; raises the events of contract I-02 (`Pulling`, `Pulled`,
    /// `Failed`, `BackOff`, …) itself; keeps the back-off per pod, container and image. `sandbox` is handed to the runtime
    /// with the pull. May take as long as a pull takes; dropping the future does not abort the pull.
    async fn ensure(
        &self,
        pod: &Pod,
        container: ContainerRef<'_>,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<PresentImage, ImageError>;

    /// The same for a volume that is an image (contract I-13): its events are on the pod, and one try at a time serves all the containers
    /// that mount it. What comes back goes into `Mount.image`.
    async fn ensure_volume(
        &self,
        pod: &Pod,
        volume: &str,
        source: &ImageVolumeSource,
        sandbox: &v1::PodSandboxConfig,
    ) -> Result<v1::ImageSpec, ImageError>;

    /// A container with so many image volumes was created, or the runtime could not mount them. For the metrics.
    fn volumes_mounted(&self, _count: usize, _mounted: bool) {}

    /// Forgets the pod's back-off.
    fn forget(&self, uid: &PodUid);
}
