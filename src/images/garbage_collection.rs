//! Removes images that nobody uses (contract I-11): when they are too old, or when the disk is too full, least recently used first.
//!
//! In: the runtime's images, what containers and image volumes use, the space of the image file system. Out: RemoveImage, and events
//! on the node. Runs every five minutes while there are images, and when the node is short of disk
//! ([`delete_unused_images`](ImageGarbageCollector::delete_unused_images)). An image that was just handed to a pod counts as in use.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use protocols::cri::v1;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    image_history::{Candidate, ImageHistory, Space, readable_size, shortage},
    metrics::ImageMetrics,
    pull_records::PullRecords,
    recent_uses::RecentUses,
};
use crate::{
    config::GoDuration,
    cri::{CriError, ImageService, POD_UID_LABEL, RuntimeService, RuntimeStore},
    events::{EventSink, EventType, Regarding},
    node::file_system,
    pods::PodUid,
    time::Clock,
};

const PERIOD: Duration = Duration::from_secs(5 * 60);
/// A file system that does not answer for so long is left for the next time.
const STAT_TIMEOUT: Duration = Duration::from_secs(10);

/// From the KubeletConfiguration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectorSettings {
    /// Percent of use.
    pub high_threshold: u64,
    pub low_threshold: u64,
    pub minimum_age: Duration,
    /// Zero: images do not grow too old.
    pub maximum_age: Duration,
}

impl CollectorSettings {
    fn enabled(&self) -> bool {
        self.high_threshold != 100 || !self.maximum_age.is_zero()
    }
}

/// Who uses images. Real: [`RuntimeImageUsers`].
#[async_trait]
pub trait ImageUsers: Send + Sync + 'static {
    /// References (IDs, names, digests) of all images that containers, running or dead, or their image volumes are made from. Complete, or an
    /// error.
    async fn in_use(&self) -> Result<BTreeSet<String>, CriError>;
}

/// The space of the file system that holds a path: (capacity, available), in bytes.
pub type StatFs = Arc<dyn Fn(&Path) -> std::io::Result<(u64, u64)> + Send + Sync>;

/// What the collector acts with, besides what it shares with the pulls.
#[derive(Clone)]
pub struct CollectorParts {
    pub users: Arc<dyn ImageUsers>,
    /// Blocking.
    pub stat_fs: StatFs,
    pub events: Arc<dyn EventSink>,
    pub clock: Arc<dyn Clock>,
}

/// The machine's own file systems.
pub fn machine_stat_fs() -> StatFs {
    Arc::new(|path| {
        let stat = file_system(path)?;
        let bytes = |value: i64| u64::try_from(value).unwrap_or(0);
        Ok((bytes(stat.capacity), bytes(stat.available)))
    })
}

/// Why a collection did not do what it should; worded as upstream, for the node's event.
#[derive(Debug, thiserror::Error)]
pub enum CollectionError {
    #[error(transparent)]
    Runtime(#[from] CriError),
    #[error("image filesystem stats are unavailable: {0}")]
    Stats(String),
    #[error("invalid capacity 0 on image filesystem")]
    NoCapacity,
    #[error("wanted to free images older than {age}, encountered errors in image deletion: {errors}")]
    Old { age: GoDuration, errors: String },
    #[error("wanted to free {wanted} bytes, but freed {freed} bytes space with errors in image deletion: {errors}")]
    Deletion { wanted: u64, freed: u64, errors: String },
    #[error(
        "Insufficient free disk space on the node's image filesystem ({used_percent}% of {capacity} used). Failed to free \
         sufficient space by deleting unused images (freed {freed} bytes). Investigate disk usage, as it could be used by \
         active images, logs, volumes, or other data."
    )]
    Insufficient { used_percent: u64, capacity: String, freed: u64 },
}

pub struct ImageGarbageCollector {
    settings: CollectorSettings,
    parts: CollectorParts,
    service: Arc<dyn ImageService>,
    records: Option<PullRecords>,
    uses: Arc<RecentUses>,
    metrics: ImageMetrics,
    /// Held for a whole collection: one at a time.
    history: tokio::sync::Mutex<ImageHistory>,
}

/// How a removal of several images went.
#[derive(Default)]
struct Removal {
    freed: u64,
    removed: BTreeSet<String>,
    errors: Vec<String>,
}

impl Removal {
    fn error_text(&self) -> String {
        match &self.errors[..] {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        }
    }
}

impl ImageGarbageCollector {
    pub(super) fn new(
        settings: CollectorSettings,
        parts: CollectorParts,
        service: Arc<dyn ImageService>,
        records: Option<PullRecords>,
        uses: Arc<RecentUses>,
        metrics: ImageMetrics,
    ) -> Self {
        Self { settings, parts, service, records, uses, metrics, history: tokio::sync::Mutex::default() }
    }

    /// Until cancelled. Returns at once when the configuration turns the collection off.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) {
        if !self.settings.enabled() {
            tracing::info!(
                "imageGCHighThresholdPercent is 100 and imageMaximumGCAge is 0: image garbage collection is off"
            );
            return;
        }
        let began = self.now();
        let mut failed_before = false;
        loop {
            let outcome = tokio::select! {
                () = cancel.cancelled() => return,
                outcome = self.collect(began) => outcome,
            };
            let any_images = *outcome.as_ref().unwrap_or(&true);
            match outcome {
                Ok(_) => failed_before = false,
                Err(error) if failed_before => {
                    tracing::error!(%error, "Image garbage collection failed multiple times in a row");
                    self.warn("ImageGCFailed", error.to_string());
                }
                Err(error) => {
                    tracing::error!(%error, "Image garbage collection failed once");
                    failed_before = true;
                }
            }
            let due = async {
                if !any_images {
                    self.uses.used.notified().await;
                }
                tokio::time::sleep(PERIOD).await;
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = due => {}
            }
        }
    }

    /// One collection: what is too old, then what the disk has no room for. `began`: ages count only when the agent has watched for
    /// so long. Returns whether the runtime has any images.
    async fn collect(&self, began: Instant) -> Result<bool, CollectionError> {
        let mut history = self.history.lock().await;
        let (images, candidates) = self.observe(&mut history).await?;
        if images.is_empty() {
            return Ok(false);
        }
        let listed_at = self.parts.clock.now().wall;
        let (candidates, mut removed) = self.remove_old(&mut history, candidates, began).await?;
        let space = self.space().await?;
        if space.capacity == 0 {
            let error = CollectionError::NoCapacity;
            self.warn("InvalidDiskCapacity", error.to_string());
            return Err(error);
        }
        if let Some(shortage) = shortage(space, self.settings.high_threshold, self.settings.low_threshold) {
            tracing::info!(
                used_percent = shortage.used_percent,
                bytes = shortage.bytes,
                "Disk usage on image filesystem is over the high threshold, trying to free bytes down to the low threshold"
            );
            let removal = self.remove_until(&mut history, candidates, shortage.bytes).await?;
            removed.extend(removal.removed);
            self.prune_records(&images, &removed, listed_at).await;
            if removal.freed < shortage.bytes {
                let error = CollectionError::Insufficient {
                    used_percent: shortage.used_percent,
                    capacity: readable_size(space.capacity),
                    freed: removal.freed,
                };
                self.warn("FreeDiskSpaceFailed", error.to_string());
                return Err(error);
            }
        } else if !removed.is_empty() {
            self.prune_records(&images, &removed, listed_at).await;
        }
        Ok(true)
    }

    /// Removes every image that nobody uses and that is not younger than the minimum age, whatever the disk's use: for a node that is short
    /// of disk. Returns the bytes freed.
    pub async fn delete_unused_images(&self) -> Result<u64, CollectionError> {
        tracing::info!("Attempting to delete unused images");
        let mut history = self.history.lock().await;
        let (images, candidates) = self.observe(&mut history).await?;
        let listed_at = self.parts.clock.now().wall;
        let removal = self.remove_until(&mut history, candidates, i64::MAX as u64).await?;
        self.prune_records(&images, &removal.removed, listed_at).await;
        Ok(removal.freed)
    }

    /// Images before their users: what comes in between is then known as in use.
    async fn observe(&self, history: &mut ImageHistory) -> Result<(Vec<v1::Image>, Vec<Candidate>), CollectionError> {
        let images = self.service.list_images().await?;
        if images.is_empty() {
            return Ok((images, history.observe(&[], &BTreeSet::new(), self.now())));
        }
        let mut in_use = self.parts.users.in_use().await?;
        in_use.extend(self.uses.held(self.now()));
        let candidates = history.observe(&images, &in_use, self.now());
        Ok((images, candidates))
    }

    /// Returns what is left of the candidates, and the IDs of what went.
    async fn remove_old(
        &self,
        history: &mut ImageHistory,
        candidates: Vec<Candidate>,
        began: Instant,
    ) -> Result<(Vec<Candidate>, BTreeSet<String>), CollectionError> {
        let (age, now) = (self.settings.maximum_age, self.now());
        if age.is_zero() || now.duration_since(began) <= age {
            return Ok((candidates, BTreeSet::new()));
        }
        let (old, rest): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|c| c.unused_for_more_than(age, now));
        let mut removal = Removal::default();
        for candidate in &old {
            self.remove(history, candidate, "age", &mut removal).await;
        }
        if removal.errors.is_empty() {
            return Ok((rest, removal.removed));
        }
        let age = GoDuration::from_nanos(i64::try_from(age.as_nanos()).unwrap_or(i64::MAX));
        Err(CollectionError::Old { age, errors: removal.error_text() })
    }

    async fn remove_until(
        &self,
        history: &mut ImageHistory,
        candidates: Vec<Candidate>,
        bytes: u64,
    ) -> Result<Removal, CollectionError> {
        let (mut removal, now) = (Removal::default(), self.now());
        for candidate in &candidates {
            if removal.freed >= bytes {
                break;
            }
            if !candidate.younger_than(self.settings.minimum_age, now) {
                self.remove(history, candidate, "space", &mut removal).await;
            }
        }
        if removal.errors.is_empty() {
            return Ok(removal);
        }
        Err(CollectionError::Deletion { wanted: bytes, freed: removal.freed, errors: removal.error_text() })
    }

    async fn remove(&self, history: &mut ImageHistory, candidate: &Candidate, reason: &str, removal: &mut Removal) {
        let (image, bytes) = (&candidate.key.id, candidate.bytes);
        if self.uses.held(self.now()).contains(image) {
            return;
        }
        tracing::info!(image, bytes, reason, "Removing image");
        let spec = v1::ImageSpec {
            image: image.clone(),
            runtime_handler: candidate.key.handler.clone(),
            ..Default::default()
        };
        match self.service.remove_image(spec).await {
            Ok(()) => {
                history.forget(&candidate.key);
                self.metrics.collected(reason);
                removal.freed = removal.freed.saturating_add(bytes);
                removal.removed.insert(image.clone());
            }
            Err(error) => removal.errors.push(error.to_string()),
        }
    }

    async fn prune_records(&self, images: &[v1::Image], removed: &BTreeSet<String>, listed_at: jiff::Timestamp) {
        let Some(records) = &self.records else { return };
        let names = |image: &v1::Image| {
            let named = image.repo_tags.iter().chain(&image.repo_digests).cloned();
            std::iter::once(image.id.clone()).chain(named).collect::<Vec<_>>()
        };
        let present = images.iter().filter(|image| !removed.contains(&image.id)).flat_map(names).collect();
        records.prune(present, listed_at).await;
    }

    async fn space(&self) -> Result<Space, CollectionError> {
        let info = self.service.image_fs_info().await?;
        let mountpoint = info.image_filesystems.into_iter().next().and_then(|fs| fs.fs_id).map(|id| id.mountpoint);
        let Some(path) = mountpoint.map(PathBuf::from) else {
            return Err(CollectionError::Stats("the runtime names no image filesystem".to_owned()));
        };
        let (stat_fs, of) = (Arc::clone(&self.parts.stat_fs), path.clone());
        let asked = tokio::task::spawn_blocking(move || stat_fs(&of));
        let failed = |why: String| CollectionError::Stats(format!("{}: {why}", path.display()));
        let (capacity, available) = tokio::time::timeout(STAT_TIMEOUT, asked)
            .await
            .map_err(|_| failed("no answer".to_owned()))?
            .map_err(|error| failed(error.to_string()))?
            .map_err(|error| failed(error.to_string()))?;
        Ok(Space { capacity, available: available.min(capacity) })
    }

    fn warn(&self, reason: &str, message: String) {
        self.parts.events.event(Regarding::Node, EventType::Warning, reason, message);
    }

    fn now(&self) -> Instant {
        self.parts.clock.now().mono
    }
}

/// Asks the runtime for all containers, whoever made them; their mounts are in the runtime store, or asked for.
pub struct RuntimeImageUsers {
    pub runtime: Arc<dyn RuntimeService>,
    pub store: Arc<RuntimeStore>,
}

#[async_trait]
impl ImageUsers for RuntimeImageUsers {
    async fn in_use(&self) -> Result<BTreeSet<String>, CriError> {
        let mut used = BTreeSet::new();
        for container in self.runtime.list_containers(None).await? {
            // Older runtimes give no ID.
            used.insert(if container.image_id.is_empty() { container.image_ref } else { container.image_id });
            let uid = PodUid::from(container.labels.get(POD_UID_LABEL).map_or("", String::as_str));
            let held = self.store.pod(&uid);
            let known = held.as_ref().and_then(|pod| pod.containers.iter().find(|c| c.id == container.id));
            let mounts = match known {
                Some(known) => known.mounts.clone(),
                None => match self.runtime.container_status(&container.id).await {
                    Ok(status) => status.mounts,
                    Err(error) if error.is_not_found() => continue,
                    Err(error) => return Err(error),
                },
            };
            used.extend(mounts.into_iter().filter_map(|mount| mount.image).map(|image| image.image));
        }
        used.remove("");
        Ok(used)
    }
}

#[cfg(test)]
#[path = "garbage_collection_tests.rs"]
mod tests;
