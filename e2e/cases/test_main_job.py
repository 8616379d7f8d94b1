"""The agent's main job, end to end: a pod with volumes and probes runs, follows its objects, answers, and goes."""

from e2e.harness.addons import demo_objects
from e2e.harness.cluster import Cluster

# The kubelet's own promise is its sync period plus the cache's, about 90 s; a slow machine is given more.
VOLUME_UPDATE_SECONDS = 150


def _demo_in(cluster: Cluster, ns: str) -> str:
    """The demo objects in a namespace of the case; gives the pod's name."""
    for obj in demo_objects():
        obj = {**obj, "metadata": {**obj["metadata"], "namespace": ns}}
        cluster.apply(obj)
    pod = obj["metadata"]["name"]
    cluster.wait_ready(pod, ns)
    return pod


def _read(cluster: Cluster, ns: str, pod: str, path: str) -> str:
    return cluster.kubectl("exec", "-n", ns, pod, "--", "cat", path)


def test_pod_becomes_ready_with_its_volumes(cluster: Cluster) -> None:
    with cluster.namespace("main-job") as ns:
        pod = _demo_in(cluster, ns)
        status = cluster.get("pods", pod, ns)["status"]
        assert status["phase"] == "Running", status
        assert status["podIP"] and status["hostIP"] == cluster.node_ip, status
        assert _read(cluster, ns, pod, "/demo/config/greeting") == "hello from a configMap"
        assert _read(cluster, ns, pod, "/demo/secret/greeting") == "hello from a secret"
        assert _read(cluster, ns, pod, "/demo/host/greeting") == "hello from the host"


def test_changes_of_configmap_and_secret_reach_the_container(cluster: Cluster) -> None:
    with cluster.namespace("main-job") as ns:
        pod = _demo_in(cluster, ns)
        cluster.api.patch(cluster.path("configmaps", ns, pod), {"data": {"greeting": "new config"}})
        cluster.api.patch(cluster.path("secrets", ns, pod), {"stringData": {"greeting": "new secret"}})
        for volume, text in (("config", "new config"), ("secret", "new secret")):
            path = f"/demo/{volume}/greeting"
            cluster.wait(lambda: _read(cluster, ns, pod, path) == text, VOLUME_UPDATE_SECONDS, f"{path} has changed", 1)
        statuses = cluster.get("pods", pod, ns)["status"]["containerStatuses"]
        assert statuses[0]["restartCount"] == 0, statuses


def test_logs_and_exec(cluster: Cluster) -> None:
    with cluster.namespace("main-job") as ns:
        script = "echo to stdout; echo to stderr >&2; exec sleep 600"
        cluster.apply(cluster.pod("talker", ns, image=cluster.images.busybox, args=["sh", "-c", script]))
        cluster.wait_ready("talker", ns)
        logs = cluster.kubectl("logs", "-n", ns, "talker").splitlines()
        assert sorted(logs) == ["to stderr", "to stdout"], logs
        answer = cluster.kubectl("exec", "-i", "-n", ns, "talker", "--", "cat", input="through stdin\n")
        assert answer == "through stdin\n", answer


def test_failed_probe_restarts_the_container(cluster: Cluster) -> None:
    with cluster.namespace("main-job") as ns:
        probe = {"exec": {"command": ["test", "!", "-e", "/tmp/ill"]}, "periodSeconds": 1, "failureThreshold": 1}
        cluster.apply(cluster.pod("patient", ns, container={"livenessProbe": probe}))
        cluster.wait_ready("patient", ns)
        cluster.kubectl("exec", "-n", ns, "patient", "--", "touch", "/tmp/ill")
        status = cluster.wait(lambda: next((s for s in cluster.get("pods", "patient", ns)["status"]["containerStatuses"]
                                            if s["restartCount"] == 1), None), 60, "the container was restarted")
        assert status["lastState"]["terminated"]["containerID"], status


def test_deleted_pod_leaves_nothing(cluster: Cluster) -> None:
    with cluster.namespace("main-job") as ns:
        pod = _demo_in(cluster, ns)
        uid = cluster.get("pods", pod, ns)["metadata"]["uid"]
        assert (cluster.root_dir / "pods" / uid).exists()
        cluster.delete("pods", pod, ns)
        # The API object goes only after the containers have ended; files may follow a little later.
        cluster.wait(lambda: not (cluster.root_dir / "pods" / uid).exists(), 90, "the pod's folder is gone", 0.5)
        running = [line for line in cluster.ctr("containers", "list").splitlines() if uid in line]
        assert not running, running
