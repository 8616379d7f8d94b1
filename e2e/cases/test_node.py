"""The node: its lease, its conditions, its network, its runtime restarting under it, and who may ask its server."""

import base64
import http.client
import os
import re
import signal
import tempfile
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Callable, Iterator

from e2e.harness import apiclient, layout
from e2e.harness.apiclient import Event
from e2e.harness.cluster import Cluster

# Seconds, with room for a busy machine: what it took is printed. The kubelet asks its runtime every 5 s and tells of its node every 10 s.
BOUNDS = {
    "kubelet": {"lease renewed": 12, "network lost": 30, "pods run once there is a network": 10, "runtime lost": 75},
    "rkubelet": {"lease renewed": 12, "network lost": 30, "pods run once there is a network": 5, "runtime lost": 75},
}
RECOVERY_SECONDS = 60


def _bound(cluster: Cluster, what: str) -> float:
    return BOUNDS[cluster.agent.kind][what]


def _ready_condition(cluster: Cluster) -> dict:
    return next(c for c in cluster.node()["status"]["conditions"] if c["type"] == "Ready")


def _not_ready(cluster: Cluster) -> dict | None:
    condition = _ready_condition(cluster)
    return condition if condition["status"] == "False" else None


def _pod_is_ready(event: Event) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in event.object["status"].get("conditions", []))


def _running(cluster: Cluster, ns: str) -> dict[str, tuple[str, int]]:
    """Container id and restart count of each pod."""
    statuses = {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0] for pod in cluster.list("pods", ns)}
    return {name: (status["containerID"], status["restartCount"]) for name, status in statuses.items()}


# The lease


def test_lease_is_renewed_while_the_runtime_hangs(cluster: Cluster) -> None:
    """Also with a pod that is stuck in a runtime call."""

    def next_renewal() -> float:
        event = lease.until(lambda event: event.object["metadata"]["name"] == cluster.node_name, 45)
        return datetime.fromisoformat(event.object["spec"]["renewTime"]).timestamp()

    runtime = cluster.containerd.pid()
    with cluster.namespace("lease") as ns, cluster.watch("leases", "kube-node-lease") as lease:
        times = [next_renewal()]
        try:
            os.kill(runtime, signal.SIGSTOP)
            cluster.create(cluster.pod("stuck", ns, nodeName=cluster.node_name))
            times += [next_renewal() for _ in range(3)]
        finally:
            os.kill(runtime, signal.SIGCONT)
        gaps = [after - before for before, after in zip(times, times[1:])]
        assert max(gaps) <= _bound(cluster, "lease renewed"), gaps
        cluster.wait_ready("stuck", ns, RECOVERY_SECONDS)
        cluster.wait_node_ready(RECOVERY_SECONDS)


# The network


@contextmanager
def _without_network_configuration() -> Iterator[Callable[[], None]]:
    """Gives the function that brings it back."""
    files = {path: path.read_text() for path in layout.CNI_CONFIG.iterdir()}

    def bring_back() -> None:
        for path, text in files.items():  # containerd looks at what is written, not at what is moved there
            path.write_text(text)

    for path in files:
        path.unlink()
    try:
        yield bring_back
    finally:
        bring_back()


def test_without_a_network_configuration_pods_wait(cluster: Cluster) -> None:
    """Those with the host's network run, the others say why they do not, and do soon after the configuration is there."""
    names = {f"waits-{number}" for number in range(3)}
    tolerations = [{"operator": "Exists"}]
    with cluster.namespace("network") as ns, cluster.watch("pods", ns) as watch:
        with _without_network_configuration() as bring_back:
            condition = cluster.wait(lambda: _not_ready(cluster), _bound(cluster, "network lost"), "the node is not Ready")
            assert condition["reason"] == "KubeletNotReady", condition
            assert "container runtime network not ready: NetworkReady=false" in condition["message"], condition
            for name in sorted(names):
                cluster.create(cluster.pod(name, ns, nodeName=cluster.node_name, tolerations=tolerations))
            cluster.create(cluster.pod("on-host", ns, nodeName=cluster.node_name, tolerations=tolerations, hostNetwork=True))
            cluster.wait_ready("on-host", ns, 30)
            for name in names:
                cluster.wait(lambda: _network_events(cluster, ns, name), 20, f"{name} says NetworkNotReady")
                assert not cluster.get("pods", name, ns)["status"].get("podIP"), name
            begin = time.monotonic()
            bring_back()
            while names:
                event = watch.until(lambda e: e.object["metadata"]["name"] in names and _pod_is_ready(e), 60)
                names.remove(event.object["metadata"]["name"])
        took = event.time - begin
        print(f"       all run {took:.2f} s after the configuration is there")
        assert took <= _bound(cluster, "pods run once there is a network"), f"{took:.2f} s"
    cluster.wait_node_ready(RECOVERY_SECONDS)


def _network_events(cluster: Cluster, ns: str, pod: str) -> list[str]:
    start = "network is not ready: container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:"
    return [event["message"] for event in cluster.list("events", ns) if event["involvedObject"]["name"] == pod
            and event["reason"] == "NetworkNotReady" and event["message"].startswith(start)]


# The runtime


def test_runtime_restarts_under_running_pods(cluster: Cluster) -> None:
    probe = {"readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1, "failureThreshold": 5, "timeoutSeconds": 5}}
    with cluster.namespace("runtime") as ns:
        for name, container in (("plain", {}), ("probed", probe)):
            cluster.create(cluster.pod(name, ns, image=cluster.images.busybox, args=["sleep", "1d"], container=container,
                                       nodeName=cluster.node_name))
        for name in ("plain", "probed"):
            cluster.wait_ready(name, ns)
        before = _running(cluster, ns)
        with cluster.watch("pods", ns) as watch:
            for _ in range(2):
                cluster.containerd.kill9()
                cluster.containerd.start()
            cluster.create(cluster.pod("after", ns, nodeName=cluster.node_name))
            while not ((event := watch.next(60)).object["metadata"]["name"] == "after" and _pod_is_ready(event)):
                assert event.object["metadata"]["name"] == "after" or _pod_is_ready(event), event.object["status"]
        after = _running(cluster, ns)
        assert {name: after[name] for name in before} == before, (before, after)
        # The agent listens to the new runtime: it sees a container end.
        cluster.ctr("tasks", "kill", "--signal", "SIGKILL", before["plain"][0].removeprefix("containerd://"))
        cluster.wait(lambda: _running(cluster, ns)["plain"][1] == 1, 30, "the killed container runs again")


def test_runtime_socket_is_missing_for_a_while(cluster: Cluster) -> None:
    """The agent keeps trying and says so on its node; what runs goes on; afterwards all is as before."""
    with cluster.namespace("runtime") as ns:
        cluster.create(cluster.pod("goes-on", ns, nodeName=cluster.node_name))
        cluster.wait_ready("goes-on", ns)
        before, agent = _running(cluster, ns), cluster.agent.pid()
        cluster.containerd.stop()
        try:
            cluster.cri_socket.unlink(missing_ok=True)
            condition = cluster.wait(lambda: _not_ready(cluster), _bound(cluster, "runtime lost"), "the node is not Ready")
            assert condition["reason"] == "KubeletNotReady", condition
            assert "container runtime" in condition["message"], condition
            cluster.create(cluster.pod("comes-later", ns, nodeName=cluster.node_name, tolerations=[{"operator": "Exists"}]))
        finally:
            cluster.containerd.start()
        cluster.wait_node_ready(RECOVERY_SECONDS)
        cluster.wait_ready("comes-later", ns, RECOVERY_SECONDS)
        assert cluster.agent.pid() == agent, "the agent was not the same one all the time"
        assert _running(cluster, ns)["goes-on"] == before["goes-on"], _running(cluster, ns)


# The server


def _status_for(cluster: Cluster, path: str, identity: tuple[Path, Path] | tuple[()]) -> int:
    context = apiclient.tls_context(*identity, verify=False)
    connection = http.client.HTTPSConnection(cluster.node_ip, layout.PORTS["agent"], context=context, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def _identity_of(kubeconfig: str) -> Iterator[tuple[Path, Path]]:
    """The client certificate and key inside a kubeconfig, as files."""
    text = (layout.KUBECONFIGS / kubeconfig).read_text()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for field in ("client-certificate-data", "client-key-data"):
            file = Path(folder) / field
            file.write_bytes(base64.b64decode(re.search(rf"{field}:\s*(\S+)", text).group(1)))
            files.append(file)
        yield tuple(files)


def test_server_asks_who_is_there(cluster: Cluster) -> None:
    with cluster.namespace("server") as ns:
        cluster.create(cluster.pod("web", ns, nodeName=cluster.node_name))
        cluster.wait_ready("web", ns)
        paths = (f"/containerLogs/{ns}/web/main", f"/exec/{ns}/web/main?command=true&output=1")
        for path in paths:
            assert _status_for(cluster, path, ()) == 401, f"{path} without a credential"
            for kubeconfig in ("scheduler.conf", "controller-manager.conf"):
                with _identity_of(kubeconfig) as identity:
                    assert _status_for(cluster, path, identity) == 403, f"{path} with the certificate of {kubeconfig}"
        assert cluster.kubelet("GET", paths[0])[0] == 200
