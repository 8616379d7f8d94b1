//! The room as the pod worker sees it, over a real mount table in a temporary root directory.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::json;
use tokio::sync::watch;

use super::{fixtures::Objects, *};
use crate::{
    events::MemoryEvents,
    node::NodeFacts,
    pods::{ContainerRef, Pod, PodUid},
    time::SimulatedClock,
};

/// A node with its own root directory; whatever is mounted there is undone at the end.
struct Node {
    root: tempfile::TempDir,
    objects: Arc<Objects>,
    events: Arc<MemoryEvents>,
    volumes: NodeVolumes,
}

impl Node {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap(), Arc::new(Objects::default()))
    }

    fn at(root: tempfile::TempDir, objects: Arc<Objects>) -> Self {
        let facts =
            NodeFacts { allocatable: BTreeMap::from([("memory".to_owned(), "64Mi".to_owned())]), ..Default::default() };
        let settings = VolumeSettings {
            root_dir: root.path().to_owned(),
            node: watch::channel(Arc::new(facts)).1,
            selinux: false,
        };
        let events = Arc::new(MemoryEvents::default());
        let clock = Arc::new(SimulatedClock::starting_at(fixtures::issued()));
        let mounter = Arc::new(LinuxMounter::default());
        let volumes = NodeVolumes::new(settings, objects.clone(), mounter, events.clone(), clock);
        Self { root, objects, events, volumes }
    }

    /// The same disk under a new agent process.
    fn restarted(mut self) -> Self {
        let root = std::mem::replace(&mut self.root, tempfile::tempdir().unwrap());
        Self::at(root, self.objects.clone())
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let root = self.root.path().canonicalize().unwrap();
        let mounts = LinuxMounter::default().list().unwrap();
        mounts.into_iter().map(|m| m.path).filter(|p| p.starts_with(&root)).collect()
    }

    fn pod_path(&self, path: &str) -> PathBuf {
        self.root.path().join("pods/u1").join(path)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for path in self.mounts().into_iter().rev() {
            let _ = LinuxMounter::default().unmount(&path, Unmount::Lazy);
        }
    }
}

/// A pod whose one container mounts each volume at `/<name>`.
fn pod_with(volumes: serde_json::Value, more: serde_json::Value) -> Pod {
    let names = volumes.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap().to_owned());
    let mounts: Vec<_> = names.map(|name| json!({"name": name, "mountPath": format!("/{name}")})).collect();
    let mut spec = json!({"volumes": volumes, "containers": [{"name": "c", "volumeMounts": mounts}]});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    fixtures::pod(json!({"metadata": {"labels": {"app": "x"}}, "spec": spec}))
}

fn read(mounted: &MountedVolumes, volume: &str, file: &str) -> String {
    fs::read_to_string(mounted[volume].host_path.join(file)).unwrap()
}

fn every_kind(host_path: &Path) -> serde_json::Value {
    json!([
        {"name": "cm", "configMap": {"name": "config"}},
        {"name": "s", "secret": {"secretName": "secret", "defaultMode": 0o400}},
        {"name": "d", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"name": "p", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
            {"configMap": {"name": "config", "items": [{"key": "k", "path": "deep/k"}]}},
        ]}},
        {"name": "e", "emptyDir": {}},
        {"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        {"name": "h", "hostPath": {"path": host_path, "type": "Directory"}},
    ])
}

#[tokio::test]
async fn v20_every_kind_is_set_up_refreshed_and_taken_down() {
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("precious"), "x").unwrap();
    let node = Node::new();
    node.objects.set_config_map("config", &[("k", "v")]);
    node.objects.set_secret("secret", &[("password", b"hunter2")]);
    let pod = pod_with(every_kind(host.path()), json!({}));
    let mounted = node.volumes.mount(&pod).await.unwrap();
    assert_eq!(read(&mounted, "cm", "k"), "v");
    assert_eq!(read(&mounted, "s", "password"), "hunter2");
    assert_eq!(read(&mounted, "d", "labels"), "app=\"x\"");
    assert_eq!(read(&mounted, "p", "token"), "token-1-");
    assert_eq!(read(&mounted, "p", "deep/k"), "v");
    assert_eq!(mounted["h"].host_path, host.path());
    assert_eq!(fs::metadata(mounted["s"].host_path.join("password")).unwrap().mode() & 0o777, 0o400);
    assert_eq!(fs::metadata(node.pod_path("")).unwrap().mode() & 0o7777, 0o750);
    let mut tmpfs: Vec<_> = node.mounts().iter().map(|p| p.file_name().unwrap().to_owned()).collect();
    tmpfs.sort();
    assert_eq!(tmpfs, ["d", "m", "p", "s"], "what is secret or volatile lives in memory");

    let container = pod.container("c").unwrap();
    let mounts = node.volumes.container_mounts(&pod, container, &mounted, &BTreeMap::new()).await.unwrap();
    let read_only: Vec<_> = mounts.iter().map(|m| (m.container_path.as_str(), m.readonly)).collect();
    let expected =
        [("/cm", true), ("/s", true), ("/d", true), ("/p", true), ("/e", false), ("/m", false), ("/h", false)];
    assert_eq!(read_only, expected);

    node.objects.set_config_map("config", &[("k", "new"), ("l", "more")]);
    let due = node.volumes.refresh(&pod).await.unwrap().unwrap();
    assert!((due.as_millis() as i64 - 3_607_000 * 4 / 5).abs() < 2000, "{due:?}");
    assert_eq!((read(&mounted, "cm", "k"), read(&mounted, "cm", "l")), ("new".into(), "more".into()));
    assert_eq!(read(&mounted, "p", "deep/k"), "new");

    assert_eq!(node.volumes.on_disk().await, [PodUid::from("u1")]);
    node.volumes.unmount(pod.uid()).await.unwrap();
    assert!(node.mounts().is_empty() && !node.pod_path("").exists());
    assert!(host.path().join("precious").exists());
    assert!(node.volumes.on_disk().await.is_empty());
    node.volumes.unmount(pod.uid()).await.unwrap();
}

#[tokio::test]
async fn v21_a_new_agent_process_takes_over_what_is_mounted() {
    let host = tempfile::tempdir().unwrap();
    let node = Node::new();
    node.objects.set_config_map("config", &[("k", "v")]);
    node.objects.set_secret("secret", &[("a", b"1")]);
    let volumes = every_kind(host.path());
    // Without the token, which the fake renews with each request.
    let volumes = json!(volumes.as_array().unwrap().iter().filter(|v| v["name"] != "p").collect::<Vec<_>>());
    let pod = pod_with(volumes, json!({}));
    let before = node.volumes.mount(&pod).await.unwrap();
    for volume in ["e", "m"] {
        fs::write(before[volume].host_path.join("mine"), "kept").unwrap();
    }
    let live = fs::read_link(before["s"].host_path.join("..data")).unwrap();
    let mounts = node.mounts();
    let node = node.restarted();
    assert_eq!(node.mounts(), mounts);
    let after = node.volumes.mount(&pod).await.unwrap();
    assert_eq!(after, before);
    assert_eq!((read(&after, "e", "mine"), read(&after, "m", "mine")), ("kept".into(), "kept".into()));
    assert_eq!(fs::read_link(after["s"].host_path.join("..data")).unwrap(), live, "unchanged content is not written");
    assert_eq!(node.mounts(), mounts);
    let node = node.restarted();
    node.volumes.unmount(pod.uid()).await.unwrap();
    assert!(node.mounts().is_empty() && !node.pod_path("").exists());
}

#[tokio::test]
async fn v23_a_missing_object_is_told_once_and_waited_for() {
    let node = Node::new();
    let pod = pod_with(
        json!([{"name": "v", "configMap": {"name": "y"}}, {"name": "w", "secret": {"secretName": "z"}}, {"name": "e", "emptyDir": {}}]),
        json!({}),
    );
    for _ in 0..3 {
        let errors = node.volumes.mount(&pod).await.unwrap_err();
        let messages: Vec<_> = errors.iter().map(|e| e.message.as_str()).collect();
        assert_eq!(
            messages,
            [
                "MountVolume.SetUp failed for volume \"v\" : configmap \"y\" not found",
                "MountVolume.SetUp failed for volume \"w\" : secret \"z\" not found"
            ]
        );
        assert!(errors.iter().all(|e| e.class == VolumeErrorClass::Retry));
    }
    assert_eq!(node.events.all().iter().filter(|e| e.reason == "FailedMount").count(), 2);
    node.objects.set_config_map("y", &[]);
    node.objects.set_secret("z", &[]);
    node.volumes.mount(&pod).await.unwrap();
    node.objects.remove_config_map("y");
    let errors = node.volumes.refresh(&pod).await.unwrap_err();
    assert_eq!(errors.len(), 1);
    assert_eq!(node.events.all().len(), 3, "told again: it had worked in between");
    node.volumes.unmount(pod.uid()).await.unwrap();
}

#[tokio::test]
async fn v23_optional_objects_come_and_go() {
    let node = Node::new();
    let pod = pod_with(json!([{"name": "v", "configMap": {"name": "y", "optional": true}}]), json!({}));
    let mounted = node.volumes.mount(&pod).await.unwrap();
    let visible = || fs::read_dir(&mounted["v"].host_path).unwrap().count();
    let empty = visible();
    node.objects.set_config_map("y", &[("k", "v")]);
    assert_eq!(node.volumes.refresh(&pod).await.unwrap(), None);
    assert_eq!(read(&mounted, "v", "k"), "v");
    node.objects.remove_config_map("y");
    node.volumes.refresh(&pod).await.unwrap();
    assert_eq!(visible(), empty);
}

#[tokio::test]
async fn v20_volumes_that_no_container_uses_are_not_set_up() {
    let node = Node::new();
    let pod = fixtures::pod(json!({"spec": {
        "volumes": [{"name": "unused", "configMap": {"name": "missing"}}, {"name": "used", "emptyDir": {}}],
        "containers": [{"name": "c"}],
        "ephemeralContainers": [{"name": "debug", "volumeMounts": [{"name": "used", "mountPath": "/u"}]}],
    }}));
    let mounted = node.volumes.mount(&pod).await.unwrap();
    assert_eq!(mounted.keys().collect::<Vec<_>>(), ["used"]);
}

#[tokio::test]
async fn kinds_that_are_not_there_yet_say_so() {
    let node = Node::new();
    let pod = pod_with(
        json!([
            {"name": "a", "nfs": {"server": "s", "path": "/"}},
            {"name": "b", "persistentVolumeClaim": {"claimName": "x"}},
        ]),
        json!({}),
    );
    let errors = node.volumes.mount(&pod).await.unwrap_err();
    assert!(errors.iter().all(|e| e.class == VolumeErrorClass::Terminal));
    assert_eq!(
        errors[0].message,
        "MountVolume.SetUp failed for volume \"a\" : volume type nfs is not supported by this node agent yet"
    );
    assert!(errors[1].message.contains("persistentVolumeClaim"));
}

#[tokio::test]
async fn i13_an_image_volume_is_handed_to_the_runtime_by_its_image() {
    let node = Node::new();
    let pod = fixtures::pod(json!({"spec": {
        "volumes": [{"name": "v", "image": {"reference": "data:1"}}],
        "containers": [{"name": "c", "volumeMounts": [
            {"name": "v", "mountPath": "/all"},
            {"name": "v", "mountPath": "/part", "subPath": "a/b"},
            {"name": "v", "mountPath": "/out", "subPath": "../x"},
        ]}],
    }}));
    let mounted = node.volumes.mount(&pod).await.unwrap();
    let mut mounted = (*mounted).clone();
    let image = crate::cri::v1::ImageSpec {
        image: "sha256:1".into(),
        user_specified_image: "data:1".into(),
        ..Default::default()
    };
    mounted.get_mut("v").unwrap().image = Some(image.clone());
    let mut spec = pod.spec().containers[0].clone();
    let out = spec.volume_mounts.as_mut().unwrap().pop();
    assert!(out.is_some());
    let container = ContainerRef { spec: &spec, ..pod.main_containers().next().unwrap() };
    let mounts = node.volumes.container_mounts(&pod, container, &mounted, &Default::default()).await.unwrap();
    for (mount, path, sub_path) in [(&mounts[0], "/all", ""), (&mounts[1], "/part", "a/b")] {
        assert_eq!((mount.container_path.as_str(), mount.image_sub_path.as_str()), (path, sub_path));
        assert_eq!((mount.image.as_ref(), mount.host_path.as_str(), mount.readonly), (Some(&image), "", true));
    }
    let whole = pod.main_containers().next().unwrap();
    let error = node.volumes.container_mounts(&pod, whole, &mounted, &Default::default()).await;
    assert_eq!(error.unwrap_err().message, "unable to provision SubPath `../x`: must not contain '..'");
}

#[tokio::test]
async fn v29_a_host_path_of_the_wrong_type_is_told() {
    let node = Node::new();
    let pod = pod_with(json!([{"name": "h", "hostPath": {"path": "/dev/null", "type": "Directory"}}]), json!({}));
    node.volumes.mount(&pod).await.unwrap_err();
    assert!(node.events.has("FailedMount", "hostPath type check failed: /dev/null is not a directory"));
}

#[tokio::test]
async fn v40_fs_group_reaches_every_kind_but_host_path() {
    let host = tempfile::tempdir().unwrap();
    let node = Node::new();
    node.objects.set_config_map("config", &[("k", "v")]);
    node.objects.set_secret("secret", &[("a", b"1")]);
    let pod = pod_with(every_kind(host.path()), json!({"securityContext": {"fsGroup": 4567, "runAsUser": 1000}}));
    let mounted = node.volumes.mount(&pod).await.unwrap();
    let facts = |volume: &str, file: &str| {
        let metadata = fs::metadata(mounted[volume].host_path.join(file)).unwrap();
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
    };
    assert_eq!(facts("cm", "k"), (0, 4567, 0o644));
    assert_eq!(facts("s", "a"), (0, 4567, 0o440));
    assert_eq!(facts("p", "token"), (1000, 4567, 0o640));
    assert_eq!(facts("e", ""), (0, 4567, 0o2777));
    assert_eq!(facts("m", ""), (0, 4567, 0o3777));
    assert_eq!(facts("h", "").1, 0);
    node.volumes.unmount(pod.uid()).await.unwrap();
}

#[tokio::test]
async fn v42_sub_paths_of_a_container() {
    let node = Node::new();
    node.objects.set_config_map("config", &[("k", "v")]);
    let mounts = json!([
        {"name": "e", "mountPath": "/logs", "subPathExpr": "logs/$(POD)"},
        {"name": "cm", "mountPath": "/etc/k", "subPath": "k"},
        {"name": "e", "mountPath": "/whole"},
        {"name": "e", "mountPath": "/bad", "subPath": "evil"},
    ]);
    let spec = |n: usize| {
        let mounts = &mounts.as_array().unwrap()[..n];
        fixtures::pod(json!({"spec": {
            "volumes": [{"name": "e", "emptyDir": {}}, {"name": "cm", "configMap": {"name": "config"}}],
            "containers": [{"name": "c", "volumeMounts": mounts}],
        }}))
    };
    let pod = spec(3);
    let mounted = node.volumes.mount(&pod).await.unwrap();
    let env = BTreeMap::from([("POD".to_owned(), "p".to_owned())]);
    let made = node_mounts(&node.volumes, &pod, &mounted, &env).await.unwrap();
    assert_eq!(Path::new(&made[0]), node.pod_path("volume-subpaths/e/c/0").canonicalize().unwrap());
    assert_eq!(fs::read_to_string(&made[1]).unwrap(), "v");
    assert_eq!(Path::new(&made[2]), mounted["e"].host_path);
    assert!(mounted["e"].host_path.join("logs/p").is_dir());

    std::os::unix::fs::symlink("/etc", mounted["e"].host_path.join("evil")).unwrap();
    let error = node_mounts(&node.volumes, &spec(4), &mounted, &env).await.unwrap_err();
    assert_eq!(error.message, "failed to prepare subPath for volumeMount \"e\" of container \"c\"");

    // The container restarts after the configMap changed: the bind shows the new file.
    node.objects.set_config_map("config", &[("k", "new")]);
    node.volumes.refresh(&pod).await.unwrap();
    assert_eq!(fs::read_to_string(&made[1]).unwrap(), "v", "a subPath is not updated while its container runs");
    let made = node_mounts(&node.volumes, &pod, &mounted, &env).await.unwrap();
    assert_eq!(fs::read_to_string(&made[1]).unwrap(), "new");
    assert_eq!(node.mounts().len(), 2);
    node.volumes.unmount(pod.uid()).await.unwrap();
    assert!(node.mounts().is_empty() && !node.pod_path("").exists());
}

/// Host paths of the mounts of container `c`.
async fn node_mounts(
    volumes: &NodeVolumes,
    pod: &Pod,
    mounted: &MountedVolumes,
    env: &BTreeMap<String, String>,
) -> Result<Vec<String>, VolumeError> {
    let made = volumes.container_mounts(pod, pod.container("c").unwrap(), mounted, env).await?;
    Ok(made.into_iter().map(|m| m.host_path).collect())
}

#[tokio::test]
async fn nested_mount_points_exist_before_the_runtime_needs_them() {
    let node = Node::new();
    node.objects.set_config_map("config", &[("k", "v")]);
    let pod = fixtures::pod(json!({"spec": {
        "volumes": [{"name": "cm", "configMap": {"name": "config"}}, {"name": "e", "emptyDir": {}}],
        "containers": [{"name": "c", "volumeMounts": [
            {"name": "cm", "mountPath": "/etc/x"}, {"name": "e", "mountPath": "/etc/x/scratch/y"},
        ]}],
    }}));
    let mounted = node.volumes.mount(&pod).await.unwrap();
    assert!(mounted["cm"].host_path.join("scratch/y").is_dir());
    let live = fs::read_link(mounted["cm"].host_path.join("..data")).unwrap();
    node.volumes.refresh(&pod).await.unwrap();
    assert_eq!(fs::read_link(mounted["cm"].host_path.join("..data")).unwrap(), live);
}

#[tokio::test]
async fn set_up_that_comes_too_late_leaves_nothing_behind() {
    let node = Node::new();
    node.objects.set_config_map("config", &[("k", "v")]);
    let pod = pod_with(json!([{"name": "cm", "configMap": {"name": "config"}}]), json!({}));
    let gate = node.objects.hold();
    let (late, ()) = tokio::join!(node.volumes.mount(&pod), async {
        tokio::time::timeout(Duration::from_secs(5), gate.reached()).await.unwrap();
        node.volumes.unmount(pod.uid()).await.unwrap();
        gate.open();
    });
    assert!(late.unwrap_err()[0].message.contains("taken down"));
    assert!(!node.pod_path("").exists());
    // The same static pod again.
    node.volumes.mount(&pod).await.unwrap();
}

#[tokio::test]
async fn names_that_lead_elsewhere_are_refused() {
    let node = Node::new();
    let pod = pod_with(json!([{"name": "../../../x", "emptyDir": {}}]), json!({}));
    assert_eq!(node.volumes.mount(&pod).await.unwrap_err()[0].class, VolumeErrorClass::Terminal);
    let bad_uid = fixtures::pod(json!({"metadata": {"uid": "../x"}}));
    let errors = node.volumes.mount(&bad_uid).await.unwrap_err();
    assert_eq!(errors[0].message, "error making pod data directories: invalid pod UID \"../x\"");
}

#[tokio::test]
async fn an_unmount_nobody_waits_for_ends_and_does_not_bar_the_next_pod() {
    let node = Node::new();
    let pod = pod_with(json!([{"name": "e", "emptyDir": {}}]), json!({}));
    let before = node.volumes.mount(&pod).await.unwrap();
    fs::write(before["e"].host_path.join("old"), "").unwrap();
    tokio::select! {
        biased;
        _ = node.volumes.unmount(pod.uid()) => {}
        () = tokio::task::yield_now() => {}
    }
    // A set-up that began while the old pod was being taken down is too late; the next one is not.
    let after = match node.volumes.mount(&pod).await {
        Ok(after) => after,
        Err(_) => node.volumes.mount(&pod).await.unwrap(),
    };
    assert!(after["e"].host_path.is_dir() && !after["e"].host_path.join("old").exists());
}

#[tokio::test]
async fn v46_a_volume_in_use_is_reported_and_taken_down_later() {
    let node = Node::new();
    node.objects.set_secret("secret", &[("a", b"1")]);
    let pod = pod_with(json!([{"name": "s", "secret": {"secretName": "secret"}}]), json!({}));
    let mounted = node.volumes.mount(&pod).await.unwrap();
    let open = fs::File::open(mounted["s"].host_path.join("a")).unwrap();
    let error = node.volumes.unmount(pod.uid()).await.unwrap_err();
    assert!(error.message.ends_with("volumes/kubernetes.io~secret/s: device or resource busy"), "{error}");
    assert_eq!(error.class, VolumeErrorClass::Retry);
    drop(open);
    node.volumes.unmount(pod.uid()).await.unwrap();
    assert!(node.mounts().is_empty() && !node.pod_path("").exists());
}
