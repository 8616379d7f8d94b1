//! The collector over an image service, users, a file system and a clock in memory, in paused time.

use std::sync::{Mutex, MutexGuard};

use jiff::Timestamp;
use tonic::Code;

use super::*;
use crate::{events::MemoryEvents, images::record_files::PullCredentials, time::SimulatedClock};

const GIB: u64 = 1 << 30;

#[derive(Default)]
struct State {
    images: Vec<v1::Image>,
    used: BTreeSet<String>,
    stuck: BTreeSet<String>,
    capacity: u64,
    /// What other things than images hold.
    other: u64,
    lists: usize,
    list_fails: bool,
    specs: Vec<v1::ImageSpec>,
}

#[derive(Default)]
struct Node(Mutex<State>);

impl Node {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

#[async_trait]
impl ImageService for Node {
    async fn list_images(&self) -> Result<Vec<v1::Image>, CriError> {
        let mut state = self.state();
        state.lists += 1;
        if state.list_fails {
            return Err(CriError::new("ListImages", Code::Unavailable, "down"));
        }
        Ok(state.images.clone())
    }
    async fn image_status(&self, _: v1::ImageSpec) -> Result<Option<v1::Image>, CriError> {
        Ok(None)
    }
    async fn pull_image(
        &self,
        _: v1::ImageSpec,
        _: Option<v1::AuthConfig>,
        _: Option<v1::PodSandboxConfig>,
    ) -> Result<String, CriError> {
        Err(CriError::new("PullImage", Code::Unimplemented, "no"))
    }
    async fn remove_image(&self, image: v1::ImageSpec) -> Result<(), CriError> {
        let mut state = self.state();
        if state.stuck.contains(&image.image) {
            return Err(CriError::new("RemoveImage", Code::Unknown, "read-only file system"));
        }
        state.images.retain(|held| held.id != image.image);
        state.specs.push(image);
        Ok(())
    }
    async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse, CriError> {
        let id = v1::FilesystemIdentifier { mountpoint: "/images".into() };
        let usage = v1::FilesystemUsage { fs_id: Some(id), ..Default::default() };
        Ok(v1::ImageFsInfoResponse { image_filesystems: vec![usage], ..Default::default() })
    }
}

#[async_trait]
impl ImageUsers for Node {
    async fn in_use(&self) -> Result<BTreeSet<String>, CriError> {
        Ok(self.state().used.clone())
    }
}

struct World {
    node: Arc<Node>,
    events: Arc<MemoryEvents>,
    uses: Arc<RecentUses>,
    records: PullRecords,
    collector: Arc<ImageGarbageCollector>,
    clock: Arc<SimulatedClock>,
    _root: tempfile::TempDir,
}

const SETTINGS: CollectorSettings = CollectorSettings {
    high_threshold: 85,
    low_threshold: 80,
    minimum_age: Duration::from_secs(120),
    maximum_age: Duration::ZERO,
};

/// A disk of 100 GiB.
fn world(settings: CollectorSettings) -> World {
    let node = Arc::new(Node::default());
    node.state().capacity = 100 * GIB;
    let (events, uses) = (Arc::new(MemoryEvents::default()), Arc::new(RecentUses::default()));
    let clock = Arc::new(SimulatedClock::starting_at(Timestamp::UNIX_EPOCH));
    let root = tempfile::tempdir().unwrap();
    let metrics = ImageMetrics::unregistered();
    let records = PullRecords::open(root.path(), metrics.clone()).unwrap();
    let disk = node.clone();
    let parts = CollectorParts {
        users: node.clone(),
        stat_fs: Arc::new(move |path| {
            assert_eq!(path, Path::new("/images"));
            let state = disk.state();
            let used = state.other + state.images.iter().map(|image| image.size).sum::<u64>();
            Ok((state.capacity, state.capacity.saturating_sub(used)))
        }),
        events: events.clone(),
        clock: clock.clone(),
    };
    let collector =
        ImageGarbageCollector::new(settings, parts, node.clone(), Some(records.clone()), uses.clone(), metrics);
    World { node, events, uses, records, collector: Arc::new(collector), clock, _root: root }
}

impl World {
    /// Each of 10 GiB.
    fn images(&self, ids: &[&str]) {
        let image = |id: &&str| v1::Image { id: (*id).into(), size: 10 * GIB, ..Default::default() };
        self.node.state().images = ids.iter().map(image).collect();
    }
    fn uses(&self, ids: &[&str]) {
        self.node.state().used = ids.iter().map(|id| (*id).to_owned()).collect();
    }
    fn left(&self) -> Vec<String> {
        self.node.state().images.iter().map(|image| image.id.clone()).collect()
    }
    async fn collect(&self, began: Instant) -> Result<bool, String> {
        self.collector.collect(began).await.map_err(|error| error.to_string())
    }
}

fn now() -> Instant {
    use crate::time::SystemClock;
    SystemClock.now().mono
}

async fn minutes(count: u64) {
    tokio::time::sleep(Duration::from_secs(60 * count)).await;
}

#[tokio::test(start_paused = true)]
async fn i11_over_the_high_threshold_down_to_the_low_one_least_recently_used_first() {
    let world = world(SETTINGS);
    world.images(&["a", "b", "c", "d"]);
    world.node.state().images[3].pinned = true;
    world.uses(&["a", "b", "c"]);
    world.collect(now()).await.unwrap();
    minutes(5).await;
    world.uses(&["b"]);
    world.collect(now()).await.unwrap();
    minutes(5).await;
    world.uses(&[]);
    world.node.state().other = 44 * GIB;
    world.collect(now()).await.unwrap();
    assert_eq!(world.left().len(), 4, "84 percent is below the threshold");
    world.node.state().other = 45 * GIB;
    world.collect(now()).await.unwrap();
    assert_eq!(world.left(), ["b", "c", "d"], "one was enough for the low threshold");
    world.node.state().other = 60 * GIB;
    world.collect(now()).await.unwrap();
    assert_eq!(world.left(), ["b", "d"]);
    assert!(world.events.all().is_empty());
}

#[tokio::test(start_paused = true)]
async fn i11_what_is_in_use_young_pinned_or_just_handed_out_stays() {
    let world = world(SETTINGS);
    world.images(&["used", "old", "handed"]);
    world.collect(now()).await.unwrap();
    minutes(3).await;
    world.images(&["used", "old", "handed", "young"]);
    world.uses(&["used"]);
    world.uses.touch("handed", now());
    world.node.state().other = 60 * GIB;
    let error = world.collect(now()).await.unwrap_err();
    assert_eq!(world.left(), ["used", "handed", "young"]);
    let message = "Insufficient free disk space on the node's image filesystem (100% of 100.0 GiB used). Failed to free sufficient space by deleting unused images (freed 10737418240 bytes). Investigate disk usage, as it could be used by active images, logs, volumes, or other data.";
    assert_eq!(error, message);
    let event = world.events.all().pop().unwrap();
    assert_eq!((event.reason.as_str(), event.message.as_str()), ("FreeDiskSpaceFailed", message));
    assert!(matches!(event.regarding, Regarding::Node) && event.kind == EventType::Warning);
}

#[tokio::test(start_paused = true)]
async fn i11_too_old_images_go_once_the_agent_has_watched_for_so_long() {
    let age = Duration::from_secs(3600);
    let world = world(CollectorSettings { maximum_age: age, high_threshold: 100, ..SETTINGS });
    let began = now();
    world.images(&["never", "used"]);
    world.uses(&["used"]);
    world.collect(began).await.unwrap();
    minutes(59).await;
    world.collect(began).await.unwrap();
    assert_eq!(world.left().len(), 2);
    world.uses(&[]);
    minutes(2).await;
    world.collect(began).await.unwrap();
    assert_eq!(world.left(), ["used"], "it was in use two minutes ago");
    minutes(60).await;
    world.collect(began).await.unwrap();
    assert!(world.left().is_empty());
}

#[tokio::test(start_paused = true)]
async fn i11_errors_are_worded_as_upstream() {
    let world = world(SETTINGS);
    world.images(&["a", "b"]);
    world.collect(now()).await.unwrap();
    minutes(5).await;
    world.node.state().stuck = BTreeSet::from(["a".to_owned()]);
    world.node.state().other = 70 * GIB;
    assert_eq!(
        world.collect(now()).await.unwrap_err(),
        "wanted to free 10737418240 bytes, but freed 10737418240 bytes space with errors in image deletion: rpc error: code = Unknown desc = read-only file system"
    );
    world.node.state().capacity = 0;
    assert_eq!(world.collect(now()).await.unwrap_err(), "invalid capacity 0 on image filesystem");
    assert!(world.events.has("InvalidDiskCapacity", "invalid capacity 0 on image filesystem"));
}

#[tokio::test(start_paused = true)]
async fn i11_a_short_node_gets_rid_of_all_that_nobody_uses() {
    let world = world(SETTINGS);
    world.images(&["a", "b", "used"]);
    world.uses(&["used"]);
    world.node.state().images[0].spec = Some(v1::ImageSpec { runtime_handler: "kata".into(), ..Default::default() });
    assert_eq!(world.collector.delete_unused_images().await.unwrap(), 0, "they are too young");
    minutes(2).await;
    assert_eq!(world.collector.delete_unused_images().await.unwrap(), 20 * GIB);
    assert_eq!(world.left(), ["used"]);
    assert_eq!(world.node.state().specs[0].runtime_handler, "kata");
}

#[tokio::test(start_paused = true)]
async fn i11_every_five_minutes_while_there_are_images_and_failures_are_told_from_the_second_on() {
    let world = world(SETTINGS);
    let cancel = CancellationToken::new();
    let running = tokio::spawn(world.collector.clone().run(cancel.clone()));
    minutes(60).await;
    assert_eq!(world.node.state().lists, 1, "without images there is nothing to look for");
    world.images(&["a"]);
    world.uses.touch("a", now());
    minutes(21).await;
    assert_eq!(world.node.state().lists, 5);
    world.node.state().list_fails = true;
    minutes(5).await;
    assert!(world.events.all().is_empty());
    minutes(5).await;
    assert!(world.events.has("ImageGCFailed", "rpc error: code = Unavailable desc = down"));
    cancel.cancel();
    running.await.unwrap();

    let off = self::world(CollectorSettings { high_threshold: 100, ..SETTINGS });
    off.collector.clone().run(CancellationToken::new()).await;
    assert_eq!(off.node.state().lists, 0);
}

#[tokio::test(start_paused = true)]
async fn i10_records_go_with_their_images() {
    let world = world(SETTINGS);
    world.images(&["a", "b"]);
    world.uses(&["b"]);
    let everybody = PullCredentials { node_pods_accessible: true, ..Default::default() };
    for id in ["a", "b", "gone"] {
        world.records.succeeded("reg.io/x", id, everybody.clone(), world.clock.now().wall).await;
    }
    world.collect(now()).await.unwrap();
    minutes(5).await;
    world.node.state().other = 70 * GIB;
    world.collect(now()).await.unwrap();
    let known =
        |id: &str| matches!(world.records.knowledge("reg.io/x", id), crate::images::verification::Knowledge::Pulled(_));
    assert_eq!(["a", "b", "gone"].map(known), [false, true, false]);
}

#[tokio::test(start_paused = true)]
async fn i11_containers_dead_or_alive_and_image_volumes_use_images() {
    use crate::{
        cri::fake::{FakeRuntime, ImageScript},
        wake::NoWakes,
    };
    let clock: Arc<dyn Clock> = Arc::new(SimulatedClock::starting_at(Timestamp::UNIX_EPOCH));
    let fake = FakeRuntime::new(clock.clone());
    fake.image("container-image", ImageScript::Present);
    let runtime: Arc<dyn RuntimeService> = Arc::new(fake);
    let store = Arc::new(RuntimeStore::with_clock(runtime.clone(), Arc::new(NoWakes), clock));
    let metadata = v1::PodSandboxMetadata { name: "p".into(), namespace: "ns".into(), uid: "u".into(), attempt: 0 };
    let labels: std::collections::HashMap<String, String> = [(POD_UID_LABEL.to_owned(), "u".to_owned())].into();
    let sandbox = v1::PodSandboxConfig { metadata: Some(metadata), labels: labels.clone(), ..Default::default() };
    let id = runtime.run_pod_sandbox(sandbox.clone(), "").await.unwrap();
    let spec = |image: &str| v1::ImageSpec { image: image.into(), ..Default::default() };
    let volume = v1::Mount { image: Some(spec("volume-image")), ..Default::default() };
    let config = v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 0 }),
        image: Some(spec("container-image")),
        mounts: vec![volume],
        labels,
        ..Default::default()
    };
    runtime.create_container(&id, config, sandbox).await.unwrap();
    for listed in [false, true] {
        if listed {
            store.relist().await.unwrap();
        }
        let users = RuntimeImageUsers { runtime: runtime.clone(), store: store.clone() };
        let used = users.in_use().await.unwrap();
        assert!(used.contains("volume-image"), "{used:?}");
        assert_eq!(used.len(), 2, "{used:?}");
    }
}
