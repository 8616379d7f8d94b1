"""The node agent in the middle: rkubelet or the Go kubelet, with the same flags, the same files, in the same place."""

import json
import os
import re
from pathlib import Path
from typing import Sequence

from e2e.harness import cgroups, controlplane, layout, tools
from e2e.harness.processes import Service
from e2e.harness.steps import HarnessError, run, step

KINDS = ("rkubelet", "kubelet")
_KIND_FILE = layout.AGENT / "kind"
_CONFIG_FILE = layout.AGENT / "kubelet.yaml"


def wanted_kind() -> str:
    kind = os.environ.get("AGENT") or "rkubelet"
    if kind not in KINDS:
        raise HarnessError(f"AGENT={kind}: it is one of {', '.join(KINDS)}")
    return kind


def binary(kind: str) -> Path:
    if kind == "kubelet":
        return tools.location("kubelet")
    return Path(os.environ.get("RKUBELET_BIN") or layout.REPOSITORY / "target" / "release" / "rkubelet")


def build(kind: str) -> None:
    if kind == "kubelet":
        tools.build(["kubelet"])
    elif not os.environ.get("RKUBELET_BIN"):
        with step("building rkubelet (cargo build --release)"):
            run(["cargo", "build", "--release", "--bin", "rkubelet"], cwd=layout.REPOSITORY)


def merge_patch(target: object, patch: object) -> object:
    """RFC 7386: null removes a key, objects are merged, all else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def base_config() -> dict:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "0.0.0.0",
        "port": layout.PORTS["agent"],
        "healthzPort": layout.PORTS["agent health"],
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True},
                           "x509": {"clientCAFile": str(layout.PKI / "ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": layout.CGROUP_ROOT,
        "clusterDNS": [layout.SERVICE_DNS],
        "clusterDomain": layout.CLUSTER_DOMAIN,
        "containerRuntimeEndpoint": f"unix://{layout.CONTAINERD_SOCKET}",
        # A disk that is nearly full for other reasons must not evict pods or remove images.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%",
                         "imagefs.available": "1%", "imagefs.inodesFree": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "failCgroupV1": False,
        "failSwapOn": False,
        "resolvConf": str(layout.RESOLV_CONF),
        "serverTLSBootstrap": False,
        "staticPodPath": str(layout.STATIC_PODS),
        "volumePluginDir": str(layout.AGENT / "volume-plugins"),
    }


class Agent:
    """What cases use as `cluster.agent`."""

    @property
    def kind(self) -> str:
        return _KIND_FILE.read_text().strip()

    @property
    def config_path(self) -> Path:
        return _CONFIG_FILE

    def _service(self, extra_args: Sequence[str] = ()) -> Service:
        kind = self.kind
        command = [
            str(binary(kind)),
            f"--config={_CONFIG_FILE}",
            f"--kubeconfig={layout.KUBECONFIGS / 'kubelet.conf'}",
            f"--hostname-override={layout.NODE_NAME}",
            f"--node-ip={layout.node_ip()}",
            f"--root-dir={layout.KUBELET_ROOT}",
            "--v=2",
            *extra_args,
        ]
        environment = json.loads(os.environ.get("AGENT_ENV") or "{}")
        return Service(kind, lambda: command, controlplane.answers(f"http://127.0.0.1:{layout.PORTS['agent health']}/healthz"), environment)

    @property
    def log_path(self) -> Path:
        return self._service().log_path

    def pid(self) -> int:
        return self._service().pid()

    def alive(self) -> bool:
        return _KIND_FILE.exists() and self._service().alive()

    def start(self, config_patch: dict | None = None, extra_args: Sequence[str] = ()) -> None:
        """Starts it and waits until it says that it is healthy."""
        prepare()
        config = merge_patch(base_config(), json.loads(os.environ.get("RKUBELET_CONFIG_PATCH") or "{}"))
        _CONFIG_FILE.write_text(json.dumps(merge_patch(config, config_patch or {}), indent=1))
        self._service(extra_args).start()

    def stop(self) -> None:
        self._service().stop()

    def kill9(self) -> None:
        self._service().kill9()

    def restart(self, config_patch: dict | None = None, extra_args: Sequence[str] = ()) -> None:
        """Without a patch it comes back with the base configuration."""
        self.stop()
        self.start(config_patch, extra_args)

    def wait_healthy(self, timeout: float = 30) -> None:
        self._service().wait_ready(timeout)

    def rss_kib(self) -> int:
        return self._service().rss_kib()

    def cpu_seconds(self) -> float:
        return self._service().cpu_seconds()

    def is_current(self, kind: str) -> bool:
        """Whether this kind runs, from the binary that would be started now."""
        if not self.alive() or self.kind != kind:
            return False
        exe = os.readlink(f"/proc/{self.pid()}/exe")  # says so when its file was replaced since
        return exe == str(binary(kind).resolve())

    def switch(self, kind: str) -> None:
        """Puts this kind in the place of whatever runs there."""
        if self.alive():
            self.stop()
        layout.AGENT.mkdir(parents=True, exist_ok=True)
        _KIND_FILE.write_text(kind)
        self.start()


def prepare() -> None:
    """What both agents expect to find: the cgroup root, folders, a resolv.conf."""
    cgroups.create(layout.CGROUP_ROOT)
    for folder in (layout.AGENT, layout.STATIC_PODS, layout.AGENT / "volume-plugins", layout.KUBELET_ROOT, layout.POD_LOGS,
                   layout.CONTAINER_LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    # A resolver on the host's loopback (systemd-resolved) is not there inside a pod, and CoreDNS would ask itself.
    servers = re.findall(r"^nameserver\s+(\S+)", Path("/etc/resolv.conf").read_text(), re.MULTILINE)
    servers = [server for server in servers if not server.startswith("127.") and server != "::1"] or ["198.51.100.53"]
    layout.RESOLV_CONF.write_text("".join(f"nameserver {server}\n" for server in servers))
