"""Takes everything of ours away, whatever state it is in: after `down`, after a killed run, after a reboot.

Nothing here trusts pid files alone: processes are found by our mark and our cgroup, mounts by our folders, iptables
chains by the names that kube-proxy, the agent, CNI and we ourselves (for the VM) give them.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from e2e.harness import cgroups, layout, snapshot
from e2e.harness.processes import start_time
from e2e.harness.steps import run, say, step, warn

_OUR_CHAINS = re.compile(r"^(KUBE-|CNI-|RKUBELET-E2E-)")


def stop_everything() -> None:
    before = snapshot.read()
    with step("killing processes of ours"):
        _kill_processes()
    with step("removing mounts, cgroups, interfaces, rules"):
        _unmount()
        cgroups.remove(layout.CGROUP_ROOT)
        _remove_interfaces(set(before["interfaces"]) if before else None)
        for command in ("iptables", "ip6tables"):
            _remove_rules(command)
        if before:
            _remove_empty_tables(set(before["nftables"]))
            if before["boot"] == snapshot.boot_id():
                _restore_settings(before)
        _remove_files()


def prove(before: dict) -> bool:
    """Compares with the machine as it was; prints what is left."""
    left = snapshot.left_over(before)
    deadline = time.monotonic() + 5  # a dying process or a namespace may take a moment
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = snapshot.left_over(before)
    for what, entries in left.items():
        print(f"LEFT: {what}:")
        for entry in entries:
            print(f"    {entry}")
    if not left:
        say("nothing is left: " + ", ".join(before.keys() - {"boot"}) + " are as they were before up")
    return not left


def _kill_processes() -> None:
    """SIGKILL: containers and shims have nothing left to say; services were asked kindly before."""
    deadline = time.monotonic() + 20
    while (pids := snapshot.our_pids()) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    for pid in pids:
        warn(f"pid {pid} (started {start_time(pid)}) does not die")


def _unmount() -> None:
    ours = [str(path) + "/" for path in (layout.STATE, layout.RUN, *_agent_paths_of_ours(), *_side_paths_of_ours())]
    for point in sorted(snapshot.mounts(), key=len, reverse=True):
        point = point.encode().decode("unicode_escape")  # mountinfo writes a space as \040
        if any((point + "/").startswith(path) for path in ours):
            subprocess.run(["umount", "-l", point], capture_output=True)


def _remove_interfaces(before: set[str] | None) -> None:
    """The bridge and what hangs on it, the VM's tap. Other interfaces are touched by nobody here."""
    members = Path(f"/sys/class/net/{layout.BRIDGE}/brif")
    names = [path.name for path in members.iterdir()] if members.exists() else []
    for name in [*names, layout.BRIDGE, layout.VM_TAP]:
        if (before is None or name not in before) and Path(f"/sys/class/net/{name}").exists():
            # A pod's veth goes by itself when its namespace dies, perhaps just now.
            subprocess.run(["ip", "link", "delete", name], capture_output=True)


def _remove_rules(command: str) -> None:
    """Deletes the rules that go to chains of ours, then these chains, all tables in one transaction each."""
    table, script, chains = "", [], []
    for line in run([f"{command}-save"]).splitlines():
        words = line.split()
        if line.startswith("*"):
            table, chains = line, []
            script.append(table)
        elif line.startswith(":") and _OUR_CHAINS.match(words[0][1:]):
            chains.append(words[0][1:])
            script.append(f"-F {chains[-1]}")
        elif line.startswith("-A") and not _OUR_CHAINS.match(words[1]) and _is_our_jump(words):
            script.append("-D" + line[2:])
        elif line == "COMMIT":
            script += [*(f"-X {chain}" for chain in chains), "COMMIT"]
    run([f"{command}-restore", "--noflush"], input="\n".join(script) + "\n")


def _is_our_jump(words: list[str]) -> bool:
    return "-j" in words and bool(_OUR_CHAINS.match(words[words.index("-j") + 1]))


def _remove_empty_tables(before: set[str]) -> None:
    """iptables makes nft tables for itself, and the proxy its own."""
    for line in run(["nft", "list", "tables"]).splitlines():
        if line in before:
            continue
        _, family, name = line.split()
        listing = run(["nft", "list", "table", family, name])
        if name in ("kube-proxy", "cni_hostport") or not re.search(r"^\t\t(?!type )", listing, re.MULTILINE):
            run(["nft", "delete", "table", family, name])


def _restore_settings(before: dict) -> None:
    now = snapshot.sysctls()
    for setting in before["kernel settings"]:
        name, _, value = setting.partition("=")
        if now.get(name) != value:
            (Path("/proc/sys") / name).write_text(value)


def _was_there(path: Path) -> bool:
    before = snapshot.read()
    return before is None or str(path) in before["paths"]


def _agent_paths_of_ours() -> list[Path]:
    return [path for path in layout.AGENT_PATHS if path.exists() and not _was_there(path)]


def _side_paths_of_ours() -> list[Path]:
    return [path for path in layout.SIDE_PATHS if path.exists() and not _was_there(path)]


def _remove_files() -> None:
    # Without a snapshot nobody knows whose the agent's folders are: they stay, and preflight speaks of them.
    for path in [*_agent_paths_of_ours(), *_side_paths_of_ours(), layout.RUN, layout.STATE]:
        under = [point for point in snapshot.mounts() if (point + "/").startswith(str(path) + "/")]
        if under:
            warn(f"{path} stays: still mounted below it: {', '.join(under)}")
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
