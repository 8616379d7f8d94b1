"""The agent under the shipped systemd unit: readiness, watchdog, restarts that touch no container, and what pods see of it."""

import json
from contextlib import contextmanager
from typing import Iterator

from e2e.harness.vm import VmCluster

READY_SECONDS = 120  # the guest is emulated
WATCHDOG_SECONDS = 10
RECOVERY_SECONDS = 120


def _containers(cluster: VmCluster, ns: str) -> dict[str, tuple[str, int]]:
    """Container id and restart count of each pod."""
    statuses = {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0] for pod in cluster.list("pods", ns)}
    return {name: (status["containerID"], status["restartCount"]) for name, status in statuses.items()}


def _is_ready(pod: dict) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


def _two_pods(cluster: VmCluster, ns: str) -> None:
    probe = {"readinessProbe": {"httpGet": {"path": "/hostname", "port": 8080}, "periodSeconds": 5, "timeoutSeconds": 5,
                                "failureThreshold": 6}}
    cluster.create(cluster.pod("plain", ns, image=cluster.images.busybox, args=["sleep", "1d"]))
    cluster.create(cluster.pod("probed", ns, args=["netexec", "--http-port=8080"], container=probe))
    for name in ("plain", "probed"):
        cluster.wait_ready(name, ns, READY_SECONDS)


def test_unit_is_active_and_ready(cluster: VmCluster) -> None:
    wanted = {"ActiveState": "active", "SubState": "running", "Type": "notify", "NotifyAccess": "main", "KillMode": "process",
              "WatchdogUSec": "1min", "Restart": "always", "Result": "success", "OOMScoreAdjust": "-999"}
    found = {name: cluster.agent.show(name) for name in wanted}
    assert found == wanted, found
    assert cluster.guest.sh(f"systemctl is-enabled {cluster.agent.unit}").strip() == "enabled"
    cluster.wait_node_ready(READY_SECONDS)
    info = cluster.node()["status"]["nodeInfo"]
    assert info["bootID"] == cluster.guest.boot_id(), info
    assert info["machineID"] == cluster.guest.read("/etc/machine-id"), info
    assert {"type": "InternalIP", "address": cluster.node_ip} in cluster.node()["status"]["addresses"]


def test_agent_is_spared_by_the_oom_killer(cluster: VmCluster) -> None:
    pid = cluster.agent.pid()
    assert cluster.guest.read(f"/proc/{pid}/oom_score_adj") == "-999"
    limit = next(line for line in cluster.guest.read(f"/proc/{pid}/limits").splitlines() if line.startswith("Max open files"))
    assert limit.split()[3:5] == ["1000000", "1000000"], limit


def test_agent_shares_the_hosts_mounts(cluster: VmCluster) -> None:
    """With a mount namespace of its own, containers would find their volumes empty."""
    pid = cluster.agent.pid()
    own, host = (cluster.guest.sh(f"readlink /proc/{number}/ns/mnt").strip() for number in (pid, 1))
    assert own == host


def test_container_sees_its_secret_config_map_and_token(cluster: VmCluster) -> None:
    volumes = [{"name": "secret", "secret": {"secretName": "words"}}, {"name": "config", "configMap": {"name": "words"}},
               {"name": "memory", "emptyDir": {"medium": "Memory"}}]
    mounts = {"volumeMounts": [{"name": volume["name"], "mountPath": f"/{volume['name']}"} for volume in volumes]}
    with cluster.namespace("vm-volumes") as ns:
        metadata = {"name": "words", "namespace": ns}
        cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"word": "hidden"}})
        cluster.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"word": "open"}})
        cluster.create(cluster.pod("reader", ns, image=cluster.images.busybox, args=["sleep", "1d"], container=mounts,
                                   volumes=volumes))
        cluster.wait_ready("reader", ns, READY_SECONDS)
        script = "cat /secret/word; echo; cat /config/word; echo; cat /var/run/secrets/kubernetes.io/serviceaccount/token"
        secret, config, token = cluster.kubectl("exec", "-n", ns, "reader", "--", "sh", "-c", script).split()
        assert (secret, config) == ("hidden", "open")
        review = cluster.api.post("/apis/authentication.k8s.io/v1/tokenreviews", {
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}})
        assert review["status"]["user"]["username"] == f"system:serviceaccount:{ns}:default", review["status"]


def test_logs_and_exec_through_the_api_server(cluster: VmCluster) -> None:
    script = "echo said at start; echo complained >&2; exec sleep 1d"
    with cluster.namespace("vm-talk") as ns:
        cluster.create(cluster.pod("talker", ns, image=cluster.images.busybox, args=["sh", "-c", script]))
        cluster.wait_ready("talker", ns, READY_SECONDS)
        assert set(cluster.kubectl("logs", "-n", ns, "talker").splitlines()) == {"said at start", "complained"}
        answer = cluster.kubectl("exec", "-i", "-n", ns, "talker", "--", "sh", "-c", "read word; echo got $word on $(hostname)",
                                 input="this\n")
        assert answer.strip() == "got this on talker"


def test_restart_of_the_unit_touches_no_container(cluster: VmCluster) -> None:
    with cluster.namespace("vm-restart") as ns:
        _two_pods(cluster, ns)
        before, pid = _containers(cluster, ns), cluster.agent.pid()
        with cluster.watch("pods", ns) as watch:
            cluster.agent.stop()
            assert cluster.agent.show("Result") == "success"
            for name, (container, _) in before.items():
                scope = f"cri-containerd-{container.removeprefix('containerd://')}.scope"
                assert cluster.guest.sh(f"systemctl is-active {scope}").strip() == "active", f"{name} ended with the agent"
            cluster.agent.start()
            assert cluster.agent.pid() not in (0, pid)
            cluster.create(cluster.pod("after", ns))
            cluster.wait_ready("after", ns, READY_SECONDS)
            flips = 0
            while event := watch.next(1):
                flips += event.object["metadata"]["name"] != "after" and not _is_ready(event.object)
        assert {name: _containers(cluster, ns)[name] for name in before} == before
        print(f"       pods that ran turned not Ready {flips} times")
        assert flips == 0 or cluster.agent.kind == "kubelet"


def test_killed_agent_is_started_again(cluster: VmCluster) -> None:
    """By systemd; containers live on."""
    with cluster.namespace("vm-kill") as ns:
        _two_pods(cluster, ns)
        before, pid = _containers(cluster, ns), cluster.agent.pid()
        restarts = int(cluster.agent.show("NRestarts"))
        cluster.agent.kill9()
        cluster.wait(lambda: cluster.agent.alive() and cluster.agent.pid() not in (0, pid), RECOVERY_SECONDS, "another agent runs")
        assert int(cluster.agent.show("NRestarts")) == restarts + 1
        cluster.create(cluster.pod("after", ns))
        cluster.wait_ready("after", ns, READY_SECONDS)
        assert {name: _containers(cluster, ns)[name] for name in before} == before


@contextmanager
def _short_watchdog(cluster: VmCluster) -> Iterator[None]:
    folder = f"/etc/systemd/system/{cluster.agent.unit}.d"
    cluster.guest.write(f"{folder}/watchdog.conf", f"[Service]\nWatchdogSec={WATCHDOG_SECONDS}s\n")
    try:
        cluster.guest.sh("systemctl daemon-reload")
        cluster.agent.restart()
        yield
    finally:
        cluster.guest.sh(f"rm -r {folder}; systemctl daemon-reload")
        cluster.agent.restart()


def test_watchdog_is_fed_and_a_hung_agent_is_replaced(cluster: VmCluster) -> None:
    with cluster.namespace("vm-watchdog") as ns, _short_watchdog(cluster):
        cluster.create(cluster.pod("goes-on", ns))
        cluster.wait_ready("goes-on", ns, READY_SECONDS)
        before, pid, restarts = _containers(cluster, ns), cluster.agent.pid(), int(cluster.agent.show("NRestarts"))
        fed = int(cluster.agent.show("WatchdogTimestampMonotonic"))
        cluster.wait(lambda: int(cluster.agent.show("WatchdogTimestampMonotonic")) > fed + 2 * WATCHDOG_SECONDS * 10**6,
                     6 * WATCHDOG_SECONDS, "the watchdog was fed for longer than two of its periods", interval=2)
        assert (cluster.agent.pid(), int(cluster.agent.show("NRestarts"))) == (pid, restarts)
        cluster.guest.sh(f"kill -STOP {pid}")
        cluster.wait(lambda: cluster.agent.alive() and cluster.agent.pid() not in (0, pid), RECOVERY_SECONDS,
                     "another agent runs", interval=1)
        assert "Watchdog timeout" in cluster.guest.sh(f"journalctl -u {cluster.agent.unit} --since=-3min --no-pager")
        cluster.wait_node_ready(READY_SECONDS)
        assert _containers(cluster, ns) == before


def test_configuration_in_force(cluster: VmCluster) -> None:
    """The drop-in paths of kubeadm were read: no flag names them but the unit's two."""
    path = f"/api/v1/nodes/{cluster.node_name}/proxy/configz"
    config = json.loads(cluster.kubectl("get", "--raw", path))["kubeletconfig"]
    found = {name: config[name] for name in ("cgroupDriver", "podPidsLimit", "clusterDomain")}
    assert found == {"cgroupDriver": "systemd", "podPidsLimit": 512, "clusterDomain": "cluster.local"}, found
