"""A second process of the agent's binary beside the one that runs: with its own folders, ports and cgroup root.

For settings with which it must not come as far as touching pods: wrong ones, and credentials the API server refuses.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from e2e.harness import cgroups, layout, processes, snapshot
from e2e.harness.agent import base_config, binary, merge_patch
from e2e.harness.steps import poll, run

FOLDER = layout.STATE / "second-agent"
CGROUP = f"{layout.CGROUP_ROOT}/second"
PORT, HEALTH_PORT = 10350, 10348


class SecondAgent:
    """Use it as a context manager; at its end the process is gone, and so are its folders."""

    def __init__(self, kind: str, config_patch: dict | None = None, kubeconfig: Path | None = None,
                 config_file: Path | None = None) -> None:
        self._kind, self._patch, self._config = kind, config_patch or {}, config_file
        self._kubeconfig = kubeconfig or layout.KUBECONFIGS / "kubelet.conf"

    def __enter__(self) -> "SecondAgent":
        for name in ("root", "static-pods", "volume-plugins"):
            (FOLDER / name).mkdir(parents=True, exist_ok=True)
        cgroups.create(CGROUP)
        own = {"port": PORT, "healthzPort": HEALTH_PORT, "cgroupRoot": CGROUP, "staticPodPath": str(FOLDER / "static-pods"),
               "volumePluginDir": str(FOLDER / "volume-plugins")}
        config = self._config or FOLDER / "config.yaml"
        if not self._config:
            config.write_text(json.dumps(merge_patch(merge_patch(base_config(), own), self._patch), indent=1))
        command = [str(binary(self._kind)), f"--config={config}", f"--kubeconfig={self._kubeconfig}",
                   f"--root-dir={FOLDER / 'root'}", f"--hostname-override={layout.NODE_NAME}", f"--node-ip={layout.node_ip()}",
                   "--v=2"]
        environment = {"PATH": layout.path_with_programs(), "HOME": "/root", processes.MARKER: "second-agent",
                       **json.loads(os.environ.get("AGENT_ENV") or "{}")}
        with open(FOLDER / "log", "wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        cgroups.remove(CGROUP)
        # An agent may make its root a mount of its own, to share what is mounted below.
        while str(FOLDER / "root") in snapshot.mounts():
            run(["umount", "-l", str(FOLDER / "root")])
        shutil.rmtree(FOLDER, ignore_errors=True)

    @property
    def log(self) -> str:
        return (FOLDER / "log").read_text(errors="replace")

    def exit_code(self, timeout: float = 30) -> int:
        """Of the process, which must end by itself."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"it still runs after {timeout} s; its log ends with:\n{self.log[-1500:]}") from None

    def stays_alive(self, seconds: float) -> bool:
        time.sleep(seconds)
        return self._process.poll() is None

    def wait_log(self, predicate, what: str, timeout: float = 30) -> None:
        try:
            poll(lambda: predicate(self.log), timeout, what)
        except TimeoutError:
            raise TimeoutError(f"{what}: not within {timeout} s; its log ends with:\n{self.log[-1500:]}") from None
