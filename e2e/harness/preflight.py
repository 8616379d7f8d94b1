"""Says at once, in words, what is missing on this machine, before anything is built or changed."""

import os
import re
import shutil
import socket
from pathlib import Path

from e2e.harness import layout
from e2e.harness.steps import HarnessError, run, say, step
from e2e.harness.versions import DEBIAN_PACKAGES

CACHE_GIB_COLD = 12  # Go's and our caches, when nothing is built
STATE_GIB = 3
VM_CACHE_GIB = 4
V1_CONTROLLERS = ["cpu", "cpuacct", "cpuset", "memory", "pids"]


def check(agent: str, cold: bool) -> None:
    """`cold`: something is still to be built."""
    _complain([
        *_root(),
        *_programs(agent, cold),
        *_disk(layout.CACHE, CACHE_GIB_COLD if cold else 1, "the cache (RKUBELET_CACHE moves it)"),
        *_disk(layout.STATE, STATE_GIB, "the cluster's state"),
        *_kernel(),
        *_address(),
    ])


def check_room() -> None:
    """Before a first start, when nothing of ours runs: ports and folders must be free."""
    _complain([*_ports(), *_foreign_node()])


def check_vm(memory_mib: int) -> None:
    available = int(re.search(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE).group(1)) // 1024
    _complain([
        *_disk(layout.CACHE, VM_CACHE_GIB, "the VM's disk (RKUBELET_CACHE moves it)"),
        *([] if available >= memory_mib else [f"{memory_mib} MiB of memory wanted for the VM, {available} MiB available"]),
        *([] if Path("/dev/net/tun").exists() else ["no /dev/net/tun: the VM's network needs a tap"]),
    ])


def _complain(problems: list[str]) -> None:
    if problems:
        raise HarnessError("cannot start:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _root() -> list[str]:
    return [] if os.geteuid() == 0 else ["not root: containers, cgroups and mounts need it (try sudo make ...)"]


def _programs(agent: str, cold: bool) -> list[str]:
    problems = []
    if cold and not shutil.which("go"):
        problems.append("no Go (1.26 or newer) in PATH: the cluster's programs are built from Go modules")
    if agent == "rkubelet" and not os.environ.get("RKUBELET_BIN") and not shutil.which("cargo"):
        problems.append("no Rust (cargo) in PATH: rkubelet is built with it (AGENT=kubelet needs none)")
    if missing_packages() and not shutil.which("apt-get"):
        problems.append(f"no apt-get, and these Debian packages are missing: {', '.join(missing_packages())}")
    return problems


def _disk(where: Path, need: int, what: str) -> list[str]:
    existing = where
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 2**30
    return [] if free >= need else [f"{need} GiB wanted for {what} at {where}, {free:.1f} GiB free"]


def _kernel() -> list[str]:
    problems = []
    if "overlay" not in Path("/proc/filesystems").read_text():
        problems.append("no overlayfs in the kernel")
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        absent = [name for name in V1_CONTROLLERS if not (layout.CGROUP_MOUNT / name).exists()]
        if absent:
            problems.append(f"no cgroup controllers {', '.join(absent)} below {layout.CGROUP_MOUNT}")
    return problems


def _ports() -> list[str]:
    problems = []
    for what, port in layout.PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                problems.append(f"port {port} ({what}) is in use by something else")
    return problems


def _foreign_node() -> list[str]:
    """Folders of a kubelet that is not ours are not touched."""
    return [f"{path} exists and is not ours: is this machine a node of another cluster? If it is only left over, remove it"
            for path in layout.AGENT_PATHS if path.exists() and any(path.iterdir())]


def _address() -> list[str]:
    try:
        layout.node_ip()
        return []
    except OSError:
        return ["no route to the world, so no address of this host for the node to have"]


def missing_packages(packages: dict[str, str] = DEBIAN_PACKAGES) -> list[str]:
    return [package for package, proof in packages.items() if not Path(proof).exists()]


def install_packages(packages: dict[str, str] = DEBIAN_PACKAGES) -> None:
    missing = missing_packages(packages)
    if not missing:
        return
    with step(f"installing Debian packages: {' '.join(missing)}"):
        # A package that brings a service (docker-registry) must not start it: its port is ours.
        policy = Path("/usr/sbin/policy-rc.d")
        ours = not policy.exists()
        if ours:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            run(["apt-get", "update", "-q"], env=environment)
            run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing], env=environment)
        finally:
            if ours:
                policy.unlink()
    say("Debian packages are there")
