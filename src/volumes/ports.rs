//! What the pod worker sees of volumes.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use protocols::cri::v1;

use crate::pods::{ContainerRef, Pod, PodUid};

/// One volume, ready to be mounted into containers.
#[derive(Debug, Clone, PartialEq)]
pub struct MountedVolume {
    /// Absolute path on the host; empty for an image volume.
    pub host_path: PathBuf,
    /// An image volume, once its image is there: the runtime mounts it itself (contract I-13).
    pub image: Option<v1::ImageSpec>,
    /// The volume itself is read-only (configMap, secret, downwardAPI, projected: as upstream's attributes say).
    pub read_only: bool,
    /// The runtime shall relabel for SELinux.
    pub selinux_relabel: bool,
}

/// Volume name in the pod spec → what is mounted.
pub type MountedVolumes = BTreeMap<String, MountedVolume>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeErrorClass {
    /// May go away by itself: retried with back-off 500 ms → 2 m 2 s, or at once when a referenced object appears.
    Retry,
    /// Will not work with this spec on this node.
    Terminal,
}

/// Why a volume, or the mounts of a container, cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct VolumeError {
    /// Volume name in the pod spec.
    pub volume: String,
    pub class: VolumeErrorClass,
    /// Worded as upstream: `MountVolume.SetUp failed for volume "v" : configmap "y" not found`.
    pub message: String,
}

/// Sets up, refreshes and tears down the volumes of pods.
#[async_trait]
pub trait PodVolumes: Send + Sync + 'static {
    /// Sets up every volume that the pod's containers use; idempotent, also over what an earlier agent process left.
    /// Returns all failures, one per volume, so that one event can name each. Raises `FailedMount` events itself.
    async fn mount(&self, pod: &Pod) -> Result<Arc<MountedVolumes>, Vec<VolumeError>>;

    /// Writes again what depends on the API (configMap, secret, downwardAPI, projected), for a pod that is already mounted.
    /// Cheap when nothing changed: an unchanged payload never swaps `..data`. Returns when the next refresh is due by time
    /// (token rotation), if ever.
    async fn refresh(&self, pod: &Pod) -> Result<Option<std::time::Duration>, Vec<VolumeError>>;

    /// The CRI mounts of one container for its `volumeMounts` (subPath prepared, propagation, read-only), in spec order. `env`
    /// is the container's final environment, for subPathExpr.
    async fn container_mounts(
        &self,
        pod: &Pod,
        container: ContainerRef<'_>,
        mounted: &MountedVolumes,
        env: &BTreeMap<String, String>,
    ) -> Result<Vec<v1::Mount>, VolumeError>;

    /// Unmounts and removes everything of the pod: subPaths, volumes, the pod's directory. Works from what is on disk and in the mount
    /// table alone, so also for a pod whose spec is lost. Never crosses a mount point when it deletes.
    async fn unmount(&self, uid: &PodUid) -> Result<(), VolumeError>;

    /// UIDs that have a directory under `<root>/pods`: what an earlier agent process left.
    async fn on_disk(&self) -> Vec<PodUid>;
}
