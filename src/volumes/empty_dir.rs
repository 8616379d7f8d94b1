//! emptyDir volumes, and the directory that API-backed kinds are written to (contract V-22).
//!
//! In: medium and group. Out: a directory on disk (0777) or a tmpfs, marked ready once complete; a second set-up, also of a
//! later agent process, finds the marker and leaves the content alone.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, ResourceRequirements};

use super::{
    directory::Directory,
    fs_group::{self, ChangePolicy, GroupOwnership},
    layout::{Plugin, PodPaths},
    mounter::Mounter,
    root_dir::create_directory,
    set_up_error::SetUpError,
};
use crate::{node::NodeFacts, pods::Pod, quantity::Quantity, resources::pod_limits};

/// What the directory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Medium {
    Disk,
    /// A tmpfs of at most `size` bytes.
    Memory {
        size: Option<u64>,
    },
}

/// The medium that the spec asks for.
pub(super) fn medium(source: &EmptyDirVolumeSource, pod: &Pod, node: &NodeFacts) -> Result<Medium, SetUpError> {
    match source.medium.as_deref().unwrap_or_default() {
        "" => Ok(Medium::Disk),
        "Memory" => {
            let limit = source.size_limit.as_ref().map(|q| q.0.as_str());
            Ok(Medium::Memory { size: memory_size(pod, node, limit) })
        }
        huge if huge == "HugePages" || huge.starts_with("HugePages-") => {
            Err(SetUpError::terminal(format!("emptyDir medium {huge} is not supported by this node agent yet")))
        }
        other => Err(SetUpError::terminal(format!("unknown storage medium {other:?}"))),
    }
}

/// The smallest of sizeLimit, the pod's memory limit and the node's allocatable memory, in bytes; zeros do not count.
pub(super) fn memory_size(pod: &Pod, node: &NodeFacts, size_limit: Option<&str>) -> Option<u64> {
    let allocatable = node.allocatable.get("memory").map(String::as_str);
    [size_limit.and_then(bytes), pod_memory_limit(pod), allocatable.and_then(bytes)].into_iter().flatten().min()
}

/// A positive number of bytes; what cannot be read counts as not set.
fn bytes(text: &str) -> Option<u64> {
    Quantity::parse(text).ok().and_then(|q| u64::try_from(q.value()).ok()).filter(|b| *b > 0)
}

/// What the pod's cgroup allows: a limit exists only at pod level, or when every container has one.
fn pod_memory_limit(pod: &Pod) -> Option<u64> {
    let limited = |resources: Option<&ResourceRequirements>| {
        resources.and_then(|r| r.limits.as_ref()?.get("memory")).is_some_and(|q| bytes(&q.0).is_some())
    };
    let declared =
        limited(pod.spec().resources.as_ref()) || pod.containers().all(|c| limited(c.spec.resources.as_ref()));
    let limit = declared.then(|| pod_limits(pod).get("memory").map(Quantity::value)).flatten();
    limit.and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0)
}

/// Makes the directory of `volume` and marks it ready. Returns its path.
pub(super) fn set_up(
    paths: &PodPaths,
    plugin: Plugin,
    volume: &str,
    medium: Medium,
    group: Option<u32>,
    mounter: &dyn Mounter,
) -> Result<PathBuf, SetUpError> {
    let path = paths.volume(plugin, volume);
    let ready = paths.ready(plugin, volume);
    let failed = |doing: &'static str, at: &Path| {
        let at = at.to_owned();
        move |e: io::Error| SetUpError::io(doing, &at, &e)
    };
    let mounted = mounter.is_mount_point(&path).map_err(failed("cannot look for a mount at", &path))?;
    let complete = match medium {
        Medium::Disk => path.is_dir(),
        Medium::Memory { .. } => mounted,
    };
    if complete && ready.exists() {
        return Ok(path);
    }
    make_directory(&path).map_err(failed("mkdir", &path))?;
    if let Medium::Memory { size } = medium
        && !mounted
    {
        mounter.mount_tmpfs(&path, size).map_err(failed("cannot mount a tmpfs at", &path))?;
    }
    if let Some(group) = group {
        let ownership = GroupOwnership { group, read_only: false };
        Directory::open(&path)
            .and_then(|d| fs_group::apply(&d, ownership, ChangePolicy::Always, &AtomicU64::new(0)))
            .map_err(failed("cannot set the group of", &path))?;
    }
    mark_ready(&ready).map_err(failed("cannot write", &ready))?;
    Ok(path)
}

/// Mode 0777 whatever the umask; the sticky bit of a tmpfs that is mounted there already stays.
fn make_directory(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        create_directory(parent, 0o750)?;
    }
    match fs::create_dir(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e),
    }
    let directory = Directory::open(path)?;
    if directory.stat()?.st_mode & 0o777 == 0o777 { Ok(()) } else { directory.set_mode(0o777) }
}

fn mark_ready(marker: &Path) -> io::Result<()> {
    if let Some(parent) = marker.parent() {
        create_directory(parent, 0o750)?;
    }
    fs::write(marker, "")?;
    fs::set_permissions(marker, Permissions::from_mode(0o640))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use serde_json::json;

    use super::*;
    use crate::volumes::{fixtures, mounter::RecordingMounter};

    fn source(medium: &str, limit: Option<&str>) -> EmptyDirVolumeSource {
        serde_json::from_value(json!({"medium": medium, "sizeLimit": limit})).unwrap()
    }
    fn node(memory: &str) -> NodeFacts {
        NodeFacts { allocatable: [("memory".to_owned(), memory.to_owned())].into(), ..Default::default() }
    }

    #[test]
    fn v22_tmpfs_size_is_the_smallest_limit() {
        let limited = |limits: &[Option<&str>], pod_limit: Option<&str>| {
            let containers: Vec<_> = limits
                .iter()
                .enumerate()
                .map(
                    |(i, l)| json!({"name": format!("c{i}"), "resources": {"limits": l.map(|l| json!({"memory": l}))}}),
                )
                .collect();
            let resources = pod_limit.map(|l| json!({"limits": {"memory": l}}));
            fixtures::pod(json!({"spec": {"containers": containers, "resources": resources}}))
        };
        for (size_limit, containers, pod_limit, allocatable, size) in [
            (None, [None, None], None, "8Gi", Some(8 << 30)),
            (Some("1Gi"), [None, None], None, "8Gi", Some(1 << 30)),
            (Some("16Gi"), [None, None], None, "8Gi", Some(8 << 30)),
            (Some("1Gi"), [Some("100Mi"), Some("28Mi")], None, "8Gi", Some(128 << 20)),
            (None, [Some("100Mi"), None], None, "8Gi", Some(8 << 30)),
            (None, [Some("100Mi"), None], Some("64Mi"), "8Gi", Some(64 << 20)),
            (Some("0"), [None, None], None, "8Gi", Some(8 << 30)),
            (None, [None, None], None, "garbage", None),
        ] {
            let got = medium(&source("Memory", size_limit), &limited(&containers, pod_limit), &node(allocatable));
            assert_eq!(got, Ok(Medium::Memory { size }), "{size_limit:?} {containers:?} {allocatable}");
        }
    }

    #[test]
    fn v22_pod_limit_counts_init_containers_and_overhead() {
        let limit = |l: &str| json!({"limits": {"memory": l}});
        let pod = fixtures::pod(json!({"spec": {
            "overhead": {"memory": "1Mi"},
            "initContainers": [
                {"name": "s", "restartPolicy": "Always", "resources": limit("10Mi")},
                {"name": "i", "resources": limit("100Mi")},
            ],
            "containers": [{"name": "c", "resources": limit("50Mi")}],
        }}));
        assert_eq!(pod_memory_limit(&pod), Some(111 << 20));
    }

    #[test]
    fn v22_media_that_cannot_be_had() {
        let pod = fixtures::pod(json!({"spec": {"containers": []}}));
        let message = |m| medium(&source(m, None), &pod, &node("1Gi")).unwrap_err().message;
        assert_eq!(message("HugePages-2Mi"), "emptyDir medium HugePages-2Mi is not supported by this node agent yet");
        assert_eq!(message("Floppy"), "unknown storage medium \"Floppy\"");
    }

    #[test]
    fn v22_disk_is_0777_with_group_and_survives_a_second_set_up() {
        let temp = tempfile::tempdir().unwrap();
        let paths = PodPaths::new(temp.path(), &"u1".into()).unwrap();
        let mounter = RecordingMounter::default();
        let set_up = |group| set_up(&paths, Plugin::EmptyDir, "v", Medium::Disk, group, &mounter).unwrap();
        let path = set_up(Some(99));
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.gid()), (0o2777, 99));
        assert!(temp.path().join("pods/u1/plugins/kubernetes.io~empty-dir/v/ready").exists());
        fs::write(path.join("file"), "x").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        set_up(Some(99));
        assert!(path.join("file").exists());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o700, "a ready volume is the pod's own");
        assert!(mounter.calls().is_empty());
    }

    #[test]
    fn v22_memory_is_mounted_once_and_again_after_a_reboot() {
        let temp = tempfile::tempdir().unwrap();
        let paths = PodPaths::new(temp.path(), &"u1".into()).unwrap();
        let medium = Medium::Memory { size: Some(4096) };
        let mounter = RecordingMounter::default();
        for _ in 0..2 {
            set_up(&paths, Plugin::EmptyDir, "v", medium, None, &mounter).unwrap();
        }
        let path = paths.volume(Plugin::EmptyDir, "v");
        assert_eq!(mounter.calls(), [format!("tmpfs {} size=Some(4096)", path.display())]);
        let rebooted = RecordingMounter::default();
        set_up(&paths, Plugin::EmptyDir, "v", medium, None, &rebooted).unwrap();
        assert_eq!(rebooted.calls().len(), 1);
    }
}
