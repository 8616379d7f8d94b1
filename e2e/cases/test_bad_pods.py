"""Bad input in a pod: each gives its clear message on that pod, the pods beside it run, and it recovers if it can."""

import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from e2e.harness.apiclient import ApiError
from e2e.harness.cluster import Cluster
from e2e.harness.steps import run

# Seconds. The kubelet tries a volume again after waits that double, and a pod after a minute and a half.
BOUNDS = {
    "kubelet": {"recovers": 150},
    "rkubelet": {"recovers": 20},
}
MESSAGE_SECONDS = 40


def _pod(cluster: Cluster, ns: str, name: str, container: dict | None = None, **spec: object) -> dict:
    return cluster.pod(name, ns, container=container, nodeName=cluster.node_name, **spec)


def _with_volume(cluster: Cluster, ns: str, name: str, source: dict) -> dict:
    mount = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    return _pod(cluster, ns, name, mount, volumes=[{"name": "data", **source}])


def _recovers(cluster: Cluster, ns: str, *pods: str) -> None:
    for pod in pods:
        cluster.wait_ready(pod, ns, BOUNDS[cluster.agent.kind]["recovers"])


@contextmanager
def _beside_a_good_pod(cluster: Cluster, prefix: str) -> Iterator[str]:
    """A namespace; at the end a pod beside the bad ones starts, and the one that was there is still the same."""
    with cluster.namespace(prefix) as ns:
        cluster.create(_pod(cluster, ns, "good"))
        before = cluster.wait_ready("good", ns)["status"]["containerStatuses"][0]["containerID"]
        yield ns
        cluster.create(_pod(cluster, ns, "good-too"))
        cluster.wait_ready("good-too", ns, 30)
        status = cluster.get("pods", "good", ns)["status"]["containerStatuses"][0]
        assert (status["containerID"], status["restartCount"], status["ready"]) == (before, 0, True), status


def _waiting(cluster: Cluster, ns: str, pod: str, *reasons: str) -> dict:
    def waiting() -> dict | None:
        statuses = cluster.get("pods", pod, ns)["status"].get("containerStatuses", [])
        state = statuses[0]["state"].get("waiting", {}) if statuses else {}
        return state if state.get("reason") in reasons else None

    return cluster.wait(waiting, MESSAGE_SECONDS, f"{pod} waits with {' or '.join(reasons)}")


def _event(cluster: Cluster, ns: str, pod: str, reason: str, *parts: str) -> str:
    """The message of the pod's event with this reason and all these parts in it."""
    seen: list[str] = []

    def found() -> str | None:
        events = [e for e in cluster.list("events", ns) if e["involvedObject"]["name"] == pod]
        seen[:] = [f"{e['reason']}: {e.get('message', '')}" for e in events]
        return next((e["message"] for e in events if e["reason"] == reason and all(p in e["message"] for p in parts)), None)

    try:
        return cluster.wait(found, MESSAGE_SECONDS, "event", 0.2)
    except TimeoutError:
        raise AssertionError(f"no event {reason} of {pod} with {parts}; there are {seen}") from None


def test_secret_that_is_not_there(cluster: Cluster) -> None:
    with _beside_a_good_pod(cluster, "no-secret") as ns:
        env = {"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "key"}}}]}
        cluster.create(_pod(cluster, ns, "by-env", env))
        cluster.create(_with_volume(cluster, ns, "by-volume", {"secret": {"secretName": "absent"}}))
        state = _waiting(cluster, ns, "by-env", "CreateContainerConfigError")
        assert state["message"] == 'secret "absent" not found', state
        _event(cluster, ns, "by-env", "Failed", 'Error: secret "absent" not found')
        _event(cluster, ns, "by-volume", "FailedMount", 'MountVolume.SetUp failed for volume "data" : secret "absent" not found')
        _waiting(cluster, ns, "by-volume", "ContainerCreating")
        cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "absent", "namespace": ns},
                        "stringData": {"other": "value"}})
        state = cluster.wait(lambda: (s := _waiting(cluster, ns, "by-env", "CreateContainerConfigError")) and "key" in s["message"]
                             and "couldn't find key" in s["message"] and s, MESSAGE_SECONDS, "the missing key is named")
        assert state["message"] == f"couldn't find key key in Secret {ns}/absent", state
        cluster.api.patch(cluster.path("secrets", ns, "absent"), {"stringData": {"key": "value"}})
        _recovers(cluster, ns, "by-env", "by-volume")


def test_bad_image_names(cluster: Cluster) -> None:
    absent = f"{cluster.registry}/no/such/image:1"
    with _beside_a_good_pod(cluster, "no-image") as ns:
        for name, image, policy in (("invalid", "Not:A:Name", "IfNotPresent"), ("absent", absent, "IfNotPresent"),
                                    ("never", absent, "Never")):
            cluster.create(_pod(cluster, ns, name, {"image": image, "imagePullPolicy": policy}))
        state = _waiting(cluster, ns, "invalid", "InvalidImageName")
        assert 'Failed to apply default image tag "Not:A:Name": couldn\'t parse image name "Not:A:Name"' in state["message"], state
        _event(cluster, ns, "invalid", "InspectFailed", "Not:A:Name")
        _waiting(cluster, ns, "absent", "ErrImagePull", "ImagePullBackOff")
        _event(cluster, ns, "absent", "Failed", f'Failed to pull image "{absent}": ', "not found")
        state = _waiting(cluster, ns, "absent", "ImagePullBackOff")
        assert state["message"].startswith(f'Back-off pulling image "{absent}"'), state
        state = _waiting(cluster, ns, "never", "ErrImageNeverPull")
        assert state["message"] == f'Container image "{absent}" is not present with pull policy of Never', state


def test_host_path_of_the_wrong_type(cluster: Cluster) -> None:
    wrong = [
        ("/etc/hostname", "Directory", "hostPath type check failed: /etc/hostname is not a directory"),
        ("/etc", "File", "hostPath type check failed: /etc is not a file"),
        ("/etc/hostname", "Socket", "hostPath type check failed: /etc/hostname is not a socket file"),
        ("/dev/null", "BlockDevice", "hostPath type check failed: /dev/null is not a block device"),
        ("/etc", "CharDevice", "hostPath type check failed: /etc is not a character device"),
        ("/no/such", "Directory", "hostPath type check failed, /no/such is not a directory, unable to determine its type: "
                                  'path "/no/such" does not exist'),
    ]
    with _beside_a_good_pod(cluster, "host-path") as ns:
        for number, (path, kind, _) in enumerate(wrong):
            cluster.create(_with_volume(cluster, ns, f"wrong-{number}", {"hostPath": {"path": path, "type": kind}}))
        for number, (_, _, message) in enumerate(wrong):
            _event(cluster, ns, f"wrong-{number}", "FailedMount", 'MountVolume.SetUp failed for volume "data" : ', message)
        assert not Path("/no/such").exists()


def test_item_paths_that_lead_out_of_the_volume(cluster: Cluster) -> None:
    """The API server refuses them, in every kind of volume; what only looks like it reaches the agent and works."""
    out = ["../out", "a/../../out", "..", "..data", "/absolute"]
    inside = "a..b/..c/...d"
    with _beside_a_good_pod(cluster, "item-path") as ns:
        cluster.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "text", "namespace": ns}, "data": {"key": "text"}})

        def sources(path: str) -> dict[str, dict]:
            item = [{"key": "key", "path": path}]
            field = [{"path": path, "fieldRef": {"fieldPath": "metadata.name"}}]
            return {
                "configmap": {"configMap": {"name": "text", "items": item}},
                "secret": {"secret": {"secretName": "text", "optional": True, "items": item}},
                "downward": {"downwardAPI": {"items": field}},
                "projected": {"projected": {"sources": [{"configMap": {"name": "text", "items": item}}]}},
            }

        for path in out:
            for name, source in sources(path).items():
                try:
                    cluster.create(_with_volume(cluster, ns, f"{name}-out", source))
                except ApiError as refusal:
                    assert refusal.status == 422 and b"path" in refusal.body, refusal
                else:
                    raise AssertionError(f"the API server takes {path!r} in {name}: the agent must be tested with it")
        texts = {"configmap": "text", "downward": "downward", "projected": "text"}
        for name in texts:
            cluster.create(_with_volume(cluster, ns, name, sources(inside)[name]))
        for name, text in texts.items():
            cluster.wait_ready(name, ns)
            assert cluster.kubectl("exec", "-n", ns, name, "--", "cat", f"/data/{inside}") == text


def test_full_disk_below_the_root_directory(cluster: Cluster) -> None:
    """A full file system of its own is put where the pod's folder will be; with room there the pod starts."""
    with _beside_a_good_pod(cluster, "full-disk") as ns:
        cluster.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "text", "namespace": ns},
                        "data": {"key": "x" * 20000}})
        pod = _with_volume(cluster, ns, "full", {"configMap": {"name": "text"}})
        # Behind a gate its UID, and with it the folder, is known before the agent sees the pod.
        del pod["spec"]["nodeName"]
        pod["spec"]["schedulingGates"] = [{"name": "e2e/disk"}]
        uid = cluster.create(pod)["metadata"]["uid"]
        with _full_file_system(cluster.root_dir / "pods" / uid) as filler:
            cluster.api.patch(cluster.path("pods", ns, "full"), {"spec": {"schedulingGates": None}})
            _event(cluster, ns, "full", "FailedMount", 'MountVolume.SetUp failed for volume "data" : ', "no space left on device")
            filler.unlink()
            _recovers(cluster, ns, "full")
            cluster.delete("pods", "full", ns, wait=False)
        cluster.wait_gone("pods", "full", ns)


@contextmanager
def _full_file_system(folder: Path) -> Iterator[Path]:
    """Gives the file that fills it."""
    folder.mkdir(parents=True)
    run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=0750", "tmpfs", str(folder)])
    try:
        filler = folder / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True)  # until it is full
        yield filler
    finally:
        run(["umount", "-l", str(folder)])
