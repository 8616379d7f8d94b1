"""containerd with its own root, state and socket, the pod network, and a registry on loopback."""

import json
import os
import socket

from e2e.harness import controlplane, images, layout, tools
from e2e.harness.processes import Service
from e2e.harness.steps import run, step
from e2e.harness.versions import IMAGE_NAMES

NAMESPACE = "k8s.io"  # of containerd, where CRI keeps its things


def _toml(value: object) -> str:
    """The few kinds of values that containerd's configuration needs."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value) if isinstance(value, (str, int)) else str(value)


def _containerd_config() -> str:
    runtime = "plugins.'io.containerd.cri.v1.runtime'"
    handler = {"runtime_type": "io.containerd.runc.v2"}
    options = {"BinaryName": tools.path("runc"), "Root": str(layout.CONTAINERD_STATE / "runc")}
    tables: dict[str, dict] = {
        "": {"version": 3, "root": str(layout.CONTAINERD_ROOT), "state": str(layout.CONTAINERD_STATE),
             "disabled_plugins": ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing",
                                  "io.containerd.tracing.processor.v1.otlp"]},
        "grpc": {"address": str(layout.CONTAINERD_SOCKET)},
        "ttrpc": {"address": f"{layout.CONTAINERD_SOCKET}.ttrpc"},
        "plugins.'io.containerd.internal.v1.opt'": {"path": str(layout.CONTAINERD_ROOT / "opt")},
        "plugins.'io.containerd.cri.v1.images'.pinned_images": {"sandbox": IMAGE_NAMES["pause"]},
        "plugins.'io.containerd.cri.v1.images'.registry": {"config_path": str(layout.REGISTRY_HOSTS)},
        runtime: {
            # oom_score_adj cannot be lowered without CAP_SYS_RESOURCE; pods would fail to start.
            "restrict_oom_score_adj": True,
            # Network namespaces are mounted in our own folder, where `down` finds them.
            "netns_mounts_under_state_dir": True,
        },
        f"{runtime}.cni": {"bin_dirs": [str(layout.CNI_PROGRAMS)], "conf_dir": str(layout.CNI_CONFIG)},
        f"{runtime}.containerd": {"default_runtime_name": "runc"},
    }
    for name in ("runc", "test-handler"):  # RuntimeClass tests want a second handler
        tables[f"{runtime}.containerd.runtimes.{name}"] = handler
        tables[f"{runtime}.containerd.runtimes.{name}.options"] = options
    lines = []
    for title, values in tables.items():
        lines += [f"[{title}]"] if title else []
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _cni_config() -> dict:
    ipam = {"type": "host-local", "ranges": [[{"subnet": layout.POD_CIDR}]], "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(layout.STATE / "cni-addresses")}
    bridge = {"type": "bridge", "bridge": layout.BRIDGE, "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": ipam}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "rkubelet-e2e", "plugins": [bridge, portmap]}


def configure() -> None:
    for folder in (layout.STATE, layout.CNI_CONFIG, layout.REGISTRY_HOSTS, layout.REGISTRY_DATA, layout.CONTAINERD_STATE):
        folder.mkdir(parents=True, exist_ok=True)
    (layout.STATE / "containerd.toml").write_text(_containerd_config())
    (layout.CNI_CONFIG / "10-e2e.conflist").write_text(json.dumps(_cni_config(), indent=1))
    # The registry stands in for registry.k8s.io too, so an image with pull policy Always can be pulled.
    for name in ("registry.k8s.io", layout.REGISTRY):
        folder = layout.REGISTRY_HOSTS / name
        folder.mkdir(exist_ok=True)
        (folder / "hosts.toml").write_text(
            f'server = "http://{layout.REGISTRY}"\n[host."http://{layout.REGISTRY}"]\ncapabilities = ["pull", "resolve", "push"]\n')
    (layout.STATE / "registry.yml").write_text(json.dumps({
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(layout.REGISTRY_DATA)}, "delete": {"enabled": True}},
        "http": {"addr": layout.REGISTRY},
    }))


def _containerd_ready() -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(layout.CONTAINERD_SOCKET))
    return bool(ctr("version"))


CONTAINERD = Service(
    "containerd", lambda: [tools.path("containerd"), "--config", str(layout.STATE / "containerd.toml"), "--log-level", "info"],
    _containerd_ready)
REGISTRY = Service("registry", lambda: ["/usr/bin/docker-registry", "serve", str(layout.STATE / "registry.yml")],
                   controlplane.answers(f"http://{layout.REGISTRY}/v2/"))


def ctr(*arguments: str, timeout: float = 300) -> str:
    return run([tools.path("ctr"), "--address", layout.CONTAINERD_SOCKET, "--namespace", NAMESPACE, *arguments],
               env={**os.environ, "PATH": layout.path_with_programs()}, timeout=timeout)


def load_images() -> None:
    """Imports what is not there yet, and puts all of it into the registry under the same paths."""
    present = set(ctr("images", "list", "--quiet").split())
    if not set(IMAGE_NAMES.values()) <= present:
        with step("importing the images into containerd"):
            ctr("images", "import", str(images.archive()))
    marker = layout.REGISTRY_DATA / "filled-from"
    if marker.exists() and marker.read_text() == images.archive().name:
        return
    with step("putting the images into the registry"):
        for name in IMAGE_NAMES.values():
            path = name.partition("/")[2]
            ctr("images", "push", "--plain-http", f"{layout.REGISTRY}/{path}", name)
        marker.write_text(images.archive().name)
