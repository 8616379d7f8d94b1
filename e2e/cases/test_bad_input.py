"""Bad input to the agent itself: configuration, credentials, an API server that is away.

Each gives its clear message, and what already runs goes on. The wording differs between agents, the essential words do not.
"""

import os
import re
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterator

from e2e.harness import layout
from e2e.harness.addons import DEMO
from e2e.harness.cluster import Cluster
from e2e.harness.second_agent import SecondAgent
from e2e.harness.steps import run

AWAY_SECONDS = 120 if os.environ.get("RKUBELET_LONG") else 40
STAYS_SECONDS = 4
RECOVERY_SECONDS = 60
# Seconds. The waits between the kubelet's tries to watch its pods grow to half a minute and more.
BOUNDS = {
    "kubelet": {"new pod after an outage": 150},
    "rkubelet": {"new pod after an outage": 40},
}


@contextmanager
def _unharmed(cluster: Cluster) -> Iterator[None]:
    """The demo pod is Ready afterwards, from the same containers; the agent is the same process."""
    cluster.wait_ready(DEMO, "default")
    before, agent = _containers(cluster), cluster.agent.pid()
    yield
    cluster.wait_ready(DEMO, "default", RECOVERY_SECONDS)
    assert _containers(cluster) == before, (before, _containers(cluster))
    assert cluster.agent.pid() == agent, "the agent is another process than before"
    cluster.wait_node_ready(RECOVERY_SECONDS)


def _containers(cluster: Cluster) -> list[tuple[str, int]]:
    return [(s["containerID"], s["restartCount"]) for s in cluster.get("pods", DEMO, "default")["status"]["containerStatuses"]]


def _ends_with_message(cluster: Cluster, message: str, **options: object) -> None:
    """The agent must not start; its log matches."""
    with _unharmed(cluster), SecondAgent(cluster.agent.kind, **options) as agent:
        assert agent.exit_code() != 0, agent.log[-1500:]
        assert re.search(message, agent.log), f"{message!r} is not in:\n{agent.log[-1500:]}"


def _keeps_trying_with_message(cluster: Cluster, message: str, kubeconfig: Path) -> None:
    with _unharmed(cluster), SecondAgent(cluster.agent.kind, kubeconfig=kubeconfig) as agent:
        agent.wait_log(lambda log: re.search(message, log), f"a line of the log that matches {message!r}")
        assert agent.stays_alive(STAYS_SECONDS), agent.log[-1500:]


# Configuration


def test_wrong_type_names_the_field(cluster: Cluster) -> None:
    _ends_with_message(cluster, r"maxPods", config_patch={"maxPods": "many"})


def test_malformed_file_names_the_file(cluster: Cluster) -> None:
    with TemporaryDirectory() as folder:
        broken = Path(folder) / "broken.yaml"
        broken.write_text('kind: KubeletConfiguration\napiVersion: "kubelet.config.k8s.io/v1beta1\n')
        _ends_with_message(cluster, r"broken\.yaml", config_file=broken)


def test_invalid_value_names_the_field(cluster: Cluster) -> None:
    _ends_with_message(cluster, r"healthzPort", config_patch={"healthzPort": 70000})


def test_unknown_feature_gate(cluster: Cluster) -> None:
    _ends_with_message(cluster, r"unrecognized feature gate: NoSuchGate", config_patch={"featureGates": {"NoSuchGate": True}})


def test_unknown_field_is_a_warning(cluster: Cluster) -> None:
    """The agent that runs is started again with it: this one must work."""
    before, seen = _containers(cluster), cluster.agent.log_path.stat().st_size
    try:
        cluster.agent.restart(config_patch={"noSuchField": 1})
        with cluster.agent.log_path.open(errors="replace") as log:
            log.seek(seen)
            warnings = [line for line in log if "noSuchField" in line and not line.startswith("====")]
        assert warnings, f"no word about noSuchField in {cluster.agent.log_path}"
        with _unharmed(cluster):
            assert _containers(cluster) == before
    finally:
        cluster.agent.restart()


# Credentials


def test_unknown_context(cluster: Cluster) -> None:
    with _kubeconfig(lambda text: re.sub(r"(?m)^current-context:.*", "current-context: no-such-context", text)) as file:
        _ends_with_message(cluster, r"no-such-context", kubeconfig=file)


def test_kubeconfig_is_not_there(cluster: Cluster) -> None:
    _ends_with_message(cluster, r"/no/such/kubeconfig", kubeconfig=Path("/no/such/kubeconfig"))


def test_expired_client_certificate(cluster: Cluster) -> None:
    with TemporaryDirectory() as folder:
        certificate, key = _client_certificate(Path(folder), days=-1)
        with _kubeconfig(lambda text: _with_identity(text, certificate, key)) as file:
            _keeps_trying_with_message(cluster, r"(?i)expired|unauthorized", file)


def test_wrong_certificate_authority(cluster: Cluster) -> None:
    with TemporaryDirectory() as folder:
        authority = Path(folder) / "ca.crt"
        run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=kubernetes", "-days", "30",
             "-keyout", f"{folder}/ca.key", "-out", str(authority)])
        field = rf"certificate-authority: {authority}"
        with _kubeconfig(lambda text: re.sub(r"certificate-authority-data: \S+", field, text)) as file:
            _keeps_trying_with_message(cluster, r"(?i)unknown authority|unknown ?issuer|invalid peer certificate|certificate verify", file)


@contextmanager
def _kubeconfig(change) -> Iterator[Path]:
    """The agent's kubeconfig with a change."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kubeconfig"
        file.write_text(change((layout.KUBECONFIGS / "kubelet.conf").read_text()))
        yield file


def _with_identity(kubeconfig: str, certificate: Path, key: Path) -> str:
    kubeconfig = re.sub(r"client-certificate-data: \S+", f"client-certificate: {certificate}", kubeconfig)
    return re.sub(r"client-key-data: \S+", f"client-key: {key}", kubeconfig)


def _client_certificate(folder: Path, days: int) -> tuple[Path, Path]:
    """A certificate of this node, signed by the cluster's authority."""
    key, request, certificate = folder / "client.key", folder / "client.csr", folder / "client.crt"
    run(["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(request),
         "-subj", f"/O=system:nodes/CN=system:node:{layout.NODE_NAME}"])
    # Extensions make it an X.509 v3 certificate, as every cluster's are.
    extensions = folder / "client.ext"
    extensions.write_text("extendedKeyUsage = clientAuth\n")
    run(["openssl", "x509", "-req", "-in", str(request), "-CA", f"{layout.PKI}/ca.crt", "-CAkey", f"{layout.PKI}/ca.key",
         "-set_serial", "4711", "-days", str(days), "-extfile", str(extensions), "-out", str(certificate)])
    return certificate, key


# The API server


def test_api_server_is_away_at_the_start(cluster: Cluster) -> None:
    cluster.wait_ready(DEMO, "default")
    before = _containers(cluster)
    cluster.agent.stop()
    cluster.apiserver.stop()
    try:
        cluster.agent.start()
        time.sleep(STAYS_SECONDS)
        assert cluster.agent.alive(), "it gave up"
        assert _still_run(cluster, before)
    finally:
        cluster.apiserver.start()
        agent = cluster.agent.pid()
        cluster.wait_node_ready(RECOVERY_SECONDS)
    with cluster.namespace("away") as ns:
        cluster.create(cluster.pod("after", ns, nodeName=cluster.node_name))
        cluster.wait_ready("after", ns, BOUNDS[cluster.agent.kind]["new pod after an outage"])
    assert _containers(cluster) == before and cluster.agent.pid() == agent


def test_api_server_is_away_in_the_middle(cluster: Cluster) -> None:
    """Meanwhile a container that dies is restarted; afterwards the API learns of it."""
    with cluster.namespace("away") as ns, _unharmed(cluster):
        cluster.create(cluster.pod("dies", ns, nodeName=cluster.node_name))
        cluster.wait_ready("dies", ns)
        uid = cluster.get("pods", "dies", ns)["metadata"]["uid"]
        old = _running_containers(cluster, uid)
        cluster.apiserver.stop()
        try:
            begin = time.monotonic()
            cluster.ctr("tasks", "kill", "--signal", "SIGKILL", *old)
            cluster.wait(lambda: (new := _running_containers(cluster, uid)) and new != old, 30, "another container runs")
            time.sleep(max(0, AWAY_SECONDS - (time.monotonic() - begin)))
            assert cluster.agent.alive(), "it gave up"
        finally:
            cluster.apiserver.start()
        cluster.wait(lambda: cluster.get("pods", "dies", ns)["status"]["containerStatuses"][0]["restartCount"] == 1,
                     RECOVERY_SECONDS, "the API knows of the restart")
        cluster.create(cluster.pod("after", ns, nodeName=cluster.node_name))
        cluster.wait_ready("after", ns, BOUNDS[cluster.agent.kind]["new pod after an outage"])


def _still_run(cluster: Cluster, containers: list[tuple[str, int]]) -> bool:
    running = _tasks(cluster)
    return all(container.removeprefix("containerd://") in running for container, _ in containers)


def _tasks(cluster: Cluster) -> set[str]:
    """Ids of what runs, sandboxes too."""
    return {line.split()[0] for line in cluster.ctr("tasks", "list").splitlines() if "RUNNING" in line}


def _running_containers(cluster: Cluster, uid: str) -> list[str]:
    labels = f'labels."io.kubernetes.pod.uid"=={uid},labels."io.cri-containerd.kind"==container'
    return sorted(set(cluster.ctr("containers", "list", "-q", labels).split()) & _tasks(cluster))
