"""Our cgroup in every hierarchy: made before the agent starts, emptied and removed by `down`. Knows v1 and v2."""

import os
import signal
import time
from pathlib import Path

from e2e.harness import layout

NOT_OURS = "process_api"  # belongs to the machine


def hierarchies() -> list[Path]:
    """The mounted hierarchies that we use."""
    if (layout.CGROUP_MOUNT / "cgroup.controllers").exists():
        return [layout.CGROUP_MOUNT]
    # Some are links to one hierarchy (cpu -> cpu,cpuacct); each is wanted once.
    return sorted({path.resolve() for path in layout.CGROUP_MOUNT.iterdir() if (path / "cgroup.procs").exists()})


def create(name: str) -> None:
    for hierarchy in hierarchies():
        folder = hierarchy / name.lstrip("/")
        folder.mkdir(exist_ok=True)
        # v1: a new cpuset has no cpus and takes no process until it has.
        for control in ("cpuset.cpus", "cpuset.mems"):
            own = folder / control
            if own.exists() and not own.read_text().strip():
                own.write_text((hierarchy / control).read_text())


def all_below(name: str) -> list[Path]:
    """Deepest first, so that they can be removed in this order."""
    found = []
    for hierarchy in hierarchies():
        top = hierarchy / name.lstrip("/")
        if top.exists():
            found += [Path(folder) for folder, _, _ in os.walk(top, topdown=False)]
    return found


def all_names() -> list[str]:
    """Every cgroup of this machine but those that are not ours to look at."""
    names = []
    for hierarchy in hierarchies():
        for folder, children, _ in os.walk(hierarchy):
            if NOT_OURS in children:
                children.remove(NOT_OURS)
            names.append(folder)
    return sorted(names)


def remove(name: str) -> None:
    """Kills what is in there and removes it."""
    deadline = time.monotonic() + 20
    while (folders := all_below(name)) and time.monotonic() < deadline:
        for folder in folders:
            try:
                for pid in (folder / "cgroup.procs").read_text().split():
                    if pid != "0":  # a process that cannot be named from here; kill(0) would be ourselves
                        os.kill(int(pid), signal.SIGKILL)
                if (folder / "freezer.state").exists():  # a frozen process does not die
                    (folder / "freezer.state").write_text("THAWED")
                folder.rmdir()
            except OSError:
                continue  # busy until its processes are gone; the next round
        time.sleep(0.05)
