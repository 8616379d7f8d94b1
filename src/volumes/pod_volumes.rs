//! [`NodeVolumes`]: the volumes of every pod on this node.
//!
//! In: a pod; its objects through [`ReferencedObjects`], fetched in parallel. Out: directories, tmpfs and bind mounts, and the
//! CRI mounts. Disk work runs on blocking threads, one piece per pod at a time, and a pod that was torn down gets none any more.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Volume, VolumeMount};
use protocols::cri::v1;
use tokio::sync::{OwnedMutexGuard, watch};

use super::{
    MountedVolume, MountedVolumes, PodVolumes, VolumeError, VolumeErrorClass,
    api_volume::ApiVolume,
    config_map,
    directory::is_single_component,
    downward_api, empty_dir, host_path,
    key_projection::{DEFAULT_MODE, mode_bits},
    layout::{Plugin, PodPaths},
    mounter::Mounter,
    mounts, nested_mounts,
    payload::Payload,
    projected, root_dir, secret,
    set_up_error::{SetUpError, describe},
    sub_path, teardown,
};
use crate::{
    api::ReferencedObjects,
    events::{EventSink, EventType, Regarding},
    node::NodeFacts,
    pods::{ContainerRef, Pod, PodUid},
    time::Clock,
};

/// Shortest wait for a renewal that is due already: the API keeps the old token when it cannot make a new one.
const MIN_RENEWAL: Duration = Duration::from_secs(10);

/// What this room is told about its node.
#[derive(Debug, Clone)]
pub struct VolumeSettings {
    /// `/var/lib/kubelet`. Absolute.
    pub root_dir: PathBuf,
    /// Allocatable bounds tmpfs sizes and is the default of `limits.*` in downwardAPI files.
    pub node: watch::Receiver<Arc<NodeFacts>>,
    /// SELinux is on: the runtime is asked to relabel.
    pub selinux: bool,
}

/// Sets up, refreshes and tears down the volumes of this node's pods.
pub struct NodeVolumes {
    settings: VolumeSettings,
    objects: Arc<dyn ReferencedObjects>,
    mounter: Arc<dyn Mounter>,
    events: Arc<dyn EventSink>,
    clock: Arc<dyn Clock>,
    pods: Arc<Pods>,
}

type Pods = Mutex<HashMap<PodUid, PodState>>;

/// What is kept in memory for a pod; all else is on disk.
#[derive(Default)]
struct PodState {
    turn: Arc<tokio::sync::Mutex<Standing>>,
    /// Volume → the failure that was last told in an event.
    told: BTreeMap<String, String>,
}

/// Whether work for the pod may still touch the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Standing {
    #[default]
    Present,
    TornDown,
}

/// A volume that was set up, and when it must be written again even if nothing changes.
struct SetUp {
    mounted: MountedVolume,
    renew_at: Option<Timestamp>,
}

impl NodeVolumes {
    pub fn new(
        settings: VolumeSettings,
        objects: Arc<dyn ReferencedObjects>,
        mounter: Arc<dyn Mounter>,
        events: Arc<dyn EventSink>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { settings, objects, mounter, events, clock, pods: Arc::default() }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<PodUid, PodState>> {
        locked(&self.pods)
    }

    fn turn(&self, uid: &PodUid) -> Arc<tokio::sync::Mutex<Standing>> {
        self.pods().entry(uid.clone()).or_default().turn.clone()
    }

    /// Sets up the chosen volumes of a pod side by side; one that fails keeps none of the others back.
    async fn set_up_all(
        &self,
        pod: &Pod,
        chosen: impl Fn(&Volume) -> bool,
    ) -> Result<Vec<(String, SetUp)>, Vec<VolumeError>> {
        let turn = self.turn(pod.uid());
        let paths = self.pod_directories(pod, &turn).await.map_err(|e| vec![e])?;
        let used = used_volumes(pod);
        let volumes = pod.spec().volumes.iter().flatten();
        let chosen: Vec<&Volume> = volumes.filter(|v| used.contains(v.name.as_str()) && chosen(v)).collect();
        let results = join_all(chosen.iter().map(|v| self.set_up(pod, v, &paths, &turn))).await;
        let mut done = Vec::new();
        let mut failed = Vec::new();
        for (volume, result) in chosen.iter().zip(results) {
            match result {
                Ok(set_up) => done.push((volume.name.clone(), set_up)),
                Err(error) => failed.push(error.of_volume(&volume.name)),
            }
        }
        self.tell(pod, done.iter().map(|(name, _)| name.as_str()), &failed);
        if failed.is_empty() { Ok(done) } else { Err(failed) }
    }

    /// `<root>/pods/<uid>` with `volumes` and `plugins` (contract P-13).
    async fn pod_directories(
        &self,
        pod: &Pod,
        turn: &Arc<tokio::sync::Mutex<Standing>>,
    ) -> Result<PodPaths, VolumeError> {
        let made = async {
            let paths = PodPaths::new(&self.settings.root_dir, pod.uid())
                .ok_or_else(|| SetUpError::terminal(format!("invalid pod UID {:?}", pod.uid().as_str())))?;
            on_disk(turn, move || {
                for path in [paths.pod(), &paths.volumes(), &paths.plugins()] {
                    root_dir::create_directory(path, 0o750).map_err(|e| SetUpError::io("mkdir", path, &e))?;
                }
                Ok(paths)
            })
            .await
        };
        made.await.map_err(|e| {
            let message = format!("error making pod data directories: {}", e.message);
            VolumeError { volume: String::new(), class: e.class, message }
        })
    }

    async fn set_up(
        &self,
        pod: &Pod,
        volume: &Volume,
        paths: &PodPaths,
        turn: &Arc<tokio::sync::Mutex<Standing>>,
    ) -> Result<SetUp, SetUpError> {
        if !is_single_component(&volume.name) {
            return Err(SetUpError::terminal("the volume's name is not a valid file name"));
        }
        let objects = &*self.objects;
        let namespace = pod.namespace();
        if let Some(source) = &volume.empty_dir {
            return self.set_up_empty_dir(pod, &volume.name, source, paths, turn).await;
        }
        if let Some(source) = &volume.host_path {
            return set_up_host_path(&source.path, source.type_.as_deref().unwrap_or_default()).await;
        }
        if volume.image.is_some() {
            // Nothing to do here: the image comes with the first container that mounts it.
            let mounted =
                MountedVolume { host_path: PathBuf::new(), image: None, read_only: true, selinux_relabel: true };
            return Ok(SetUp { mounted, renew_at: None });
        }
        let (plugin, payload, renew_at) = if let Some(s) = &volume.config_map {
            let mode = mode_bits(s.default_mode, DEFAULT_MODE);
            let optional = s.optional == Some(true);
            let payload = config_map::payload(objects, namespace, &s.name, s.items.as_deref(), mode, optional).await?;
            (Plugin::ConfigMap, payload, None)
        } else if let Some(s) = &volume.secret {
            let mode = mode_bits(s.default_mode, DEFAULT_MODE);
            let optional = s.optional == Some(true);
            let name = s.secret_name.as_deref().unwrap_or_default();
            let payload = secret::payload(objects, namespace, name, s.items.as_deref(), mode, optional).await?;
            (Plugin::Secret, payload, None)
        } else if let Some(s) = &volume.downward_api {
            let mode = mode_bits(s.default_mode, DEFAULT_MODE);
            let items = s.items.as_deref().unwrap_or_default();
            (Plugin::DownwardApi, downward_api::payload(items, pod, &self.node(), mode)?, None)
        } else if let Some(s) = &volume.projected {
            let projected = projected::collect(objects, pod, &self.node(), s).await?;
            (Plugin::Projected, projected.payload, projected.renew_at)
        } else {
            return Err(SetUpError::terminal(format!(
                "volume type {} is not supported by this node agent yet",
                type_name(volume)
            )));
        };
        self.write_api_volume(pod, &volume.name, plugin, payload, renew_at, paths, turn).await
    }

    async fn set_up_empty_dir(
        &self,
        pod: &Pod,
        volume: &str,
        source: &k8s_openapi::api::core::v1::EmptyDirVolumeSource,
        paths: &PodPaths,
        turn: &Arc<tokio::sync::Mutex<Standing>>,
    ) -> Result<SetUp, SetUpError> {
        let medium = empty_dir::medium(source, pod, &self.node())?;
        let (paths, volume, group) = (paths.clone(), volume.to_owned(), projected::fs_group(pod));
        let mounter = self.mounter.clone();
        let made =
            on_disk(turn, move || empty_dir::set_up(&paths, Plugin::EmptyDir, &volume, medium, group, &*mounter));
        let mounted = MountedVolume { host_path: made.await?, image: None, read_only: false, selinux_relabel: true };
        Ok(SetUp { mounted, renew_at: None })
    }

    #[allow(clippy::too_many_arguments)]
    async fn write_api_volume(
        &self,
        pod: &Pod,
        volume: &str,
        plugin: Plugin,
        payload: Payload,
        renew_at: Option<Timestamp>,
        paths: &PodPaths,
        turn: &Arc<tokio::sync::Mutex<Standing>>,
    ) -> Result<SetUp, SetUpError> {
        let medium = match plugin {
            Plugin::ConfigMap => empty_dir::Medium::Disk,
            _ => empty_dir::Medium::Memory { size: empty_dir::memory_size(pod, &self.node(), None) },
        };
        let volume = ApiVolume {
            paths: paths.clone(),
            plugin,
            volume: volume.to_owned(),
            medium,
            payload,
            group: projected::fs_group(pod),
            nested: nested_mounts::nested_mount_points(pod, volume)?,
            now: self.clock.now().wall,
        };
        let mounter = self.mounter.clone();
        let host_path = on_disk(turn, move || volume.write(&*mounter)).await?;
        let mounted = MountedVolume { host_path, image: None, read_only: true, selinux_relabel: true };
        Ok(SetUp { mounted, renew_at })
    }

    fn node(&self) -> Arc<NodeFacts> {
        self.settings.node.borrow().clone()
    }

    /// One `FailedMount` event per volume and distinct message, until the volume works again.
    fn tell<'a>(&self, pod: &Pod, worked: impl Iterator<Item = &'a str>, failed: &[VolumeError]) {
        let mut fresh = Vec::new();
        if let Some(state) = self.pods().get_mut(pod.uid()) {
            worked.for_each(|name| drop(state.told.remove(name)));
            for error in failed {
                let before = state.told.insert(error.volume.clone(), error.message.clone());
                if before.as_ref() != Some(&error.message) {
                    fresh.push(error.message.clone());
                }
            }
        }
        for message in fresh {
            self.events.event(Regarding::Pod(pod.clone()), EventType::Warning, "FailedMount", message);
        }
    }

    /// Prepares the subPath of one volumeMount and returns where it is bound.
    async fn bind_sub_path(
        &self,
        pod: &Pod,
        container: &str,
        index: usize,
        mount: &VolumeMount,
        volume: &MountedVolume,
        sub_path: String,
    ) -> Result<PathBuf, String> {
        let prepare_failed =
            || format!("failed to prepare subPath for volumeMount {:?} of container {container:?}", mount.name);
        let names_fit = is_single_component(&mount.name) && is_single_component(container);
        // The bind target must not lead through a link: the runtime resolves it once more.
        let root = self.settings.root_dir.canonicalize().map_err(|_| prepare_failed())?;
        let paths = PodPaths::new(&root, pod.uid()).filter(|_| names_fit).ok_or_else(prepare_failed)?;
        let target = paths.sub_path(&mount.name, container, index);
        let (volume_path, bound, mounter) = (volume.host_path.clone(), target.clone(), self.mounter.clone());
        let turn = self.turn(pod.uid());
        let done = on_disk(&turn, move || Ok(sub_path::prepare(&volume_path, &sub_path, &bound, &*mounter)));
        match done.await {
            Ok(Ok(())) => Ok(target),
            Ok(Err(error)) => {
                tracing::warn!(pod = %pod.described(), container, volume = mount.name, %error, "subPath");
                match error {
                    sub_path::SubPathError::Create(_) => Err(format!(
                        "failed to create subPath directory for volumeMount {:?} of container {container:?}",
                        mount.name
                    )),
                    sub_path::SubPathError::Prepare(_) => Err(prepare_failed()),
                }
            }
            Err(_) => Err(prepare_failed()),
        }
    }
}

#[async_trait]
impl PodVolumes for NodeVolumes {
    async fn mount(&self, pod: &Pod) -> Result<Arc<MountedVolumes>, Vec<VolumeError>> {
        let done = self.set_up_all(pod, |_| true).await?;
        Ok(Arc::new(done.into_iter().map(|(name, set_up)| (name, set_up.mounted)).collect()))
    }

    async fn refresh(&self, pod: &Pod) -> Result<Option<Duration>, Vec<VolumeError>> {
        let done = self.set_up_all(pod, depends_on_api).await?;
        let now = self.clock.now().wall;
        let due = done.into_iter().filter_map(|(_, set_up)| set_up.renew_at).min();
        Ok(due.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default().max(MIN_RENEWAL)))
    }

    async fn container_mounts(
        &self,
        pod: &Pod,
        container: ContainerRef<'_>,
        mounted: &MountedVolumes,
        env: &BTreeMap<String, String>,
    ) -> Result<Vec<v1::Mount>, VolumeError> {
        let handler = self.objects.runtime_handler(pod).await.map_err(|error| VolumeError {
            volume: String::new(),
            class: VolumeErrorClass::Retry,
            message: error.to_string(),
        })?;
        let recursive = self.node().recursive_read_only_handlers.contains(&handler);
        let mut out = Vec::new();
        for (index, mount) in container.spec.volume_mounts.iter().flatten().enumerate() {
            let failed = |class| move |message| VolumeError { volume: mount.name.clone(), class, message };
            let source =
                mounts::source(mount, container.name(), mounted, env).map_err(failed(VolumeErrorClass::Terminal))?;
            let mut made = mounts::mount(mount, source.volume, recursive, self.settings.selinux)
                .map_err(failed(VolumeErrorClass::Terminal))?;
            if let Some(image) = &source.volume.image {
                made.image = Some(image.clone());
                made.image_sub_path = source.sub_path.unwrap_or_default();
                out.push(made);
                continue;
            }
            let host_path = match source.sub_path {
                None => source.volume.host_path.clone(),
                Some(sub_path) => self
                    .bind_sub_path(pod, container.name(), index, mount, source.volume, sub_path)
                    .await
                    .map_err(failed(VolumeErrorClass::Retry))?,
            };
            made.host_path = host_path.to_string_lossy().into_owned();
            out.push(made);
        }
        Ok(out)
    }

    async fn unmount(&self, uid: &PodUid) -> Result<(), VolumeError> {
        let turn = self.turn(uid);
        let mut standing = turn.lock_owned().await;
        let (root, pods, mounter) = (self.settings.root_dir.clone(), self.pods.clone(), self.mounter.clone());
        let of = uid.clone();
        let done = tokio::task::spawn_blocking(move || {
            let done = teardown::tear_down_pod(&root, &of, &*mounter);
            if done.is_ok() {
                // Whoever still waits for this turn is too late; a static pod that returns under the same UID starts anew.
                *standing = Standing::TornDown;
                locked(&pods).remove(&of);
            }
            done
        });
        let why = match done.await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(e)) => format!("{}: {}", e.path.display(), describe(&e.source)),
            Err(e) => e.to_string(),
        };
        let message = format!("error removing the volumes of pod {uid}: {why}");
        Err(VolumeError { volume: String::new(), class: VolumeErrorClass::Retry, message })
    }

    async fn on_disk(&self) -> Vec<PodUid> {
        let root = self.settings.root_dir.clone();
        match tokio::task::spawn_blocking(move || teardown::pods_on_disk(&root)).await {
            Ok(Ok(uids)) => uids,
            Ok(Err(error)) => {
                tracing::error!(%error, "cannot list the pods on disk");
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }
}

fn locked(pods: &Pods) -> MutexGuard<'_, HashMap<PodUid, PodState>> {
    pods.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs disk work of a pod on a blocking thread when it is the pod's turn. The turn stays taken until the work ended, also when
/// the caller stops waiting for it.
async fn on_disk<T: Send + 'static>(
    turn: &Arc<tokio::sync::Mutex<Standing>>,
    work: impl FnOnce() -> Result<T, SetUpError> + Send + 'static,
) -> Result<T, SetUpError> {
    let standing: OwnedMutexGuard<Standing> = turn.clone().lock_owned().await;
    if *standing == Standing::TornDown {
        return Err(SetUpError::retry("the pod's volumes were taken down meanwhile"));
    }
    tokio::task::spawn_blocking(move || {
        let _turn = standing;
        work()
    })
    .await
    .unwrap_or_else(|e| Err(SetUpError::retry(format!("set-up was interrupted: {e}"))))
}

/// A path of the host may hang, so it is looked at outside the pod's turn.
async fn set_up_host_path(path: &str, kind: &str) -> Result<SetUp, SetUpError> {
    let (checked, kind) = (path.to_owned(), kind.to_owned());
    tokio::task::spawn_blocking(move || host_path::check(&checked, &kind))
        .await
        .unwrap_or_else(|e| Err(SetUpError::retry(format!("the hostPath check was interrupted: {e}"))))?;
    let host_path = Path::new(path).to_owned();
    let mounted = MountedVolume { host_path, image: None, read_only: false, selinux_relabel: false };
    Ok(SetUp { mounted, renew_at: None })
}

/// Names of the volumes that some container mounts or uses as a device; others are never set up.
fn used_volumes(pod: &Pod) -> BTreeSet<&str> {
    let spec = pod.spec();
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers).map(|c| c.volume_devices.as_deref());
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| c.volume_devices.as_deref());
    let devices = containers.chain(ephemeral).flatten().flatten().map(|d| d.name.as_str());
    nested_mounts::mounts_of_containers(pod).flatten().map(|m| m.name.as_str()).chain(devices).collect()
}

fn depends_on_api(volume: &Volume) -> bool {
    volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.downward_api.is_some()
        || volume.projected.is_some()
}

/// The API's name of a volume's source.
fn type_name(volume: &Volume) -> String {
    let fields = serde_json::to_value(volume).unwrap_or_default();
    let source = fields.as_object().and_then(|f| f.keys().find(|k| *k != "name"));
    source.cloned().unwrap_or_else(|| "(none)".to_owned())
}
