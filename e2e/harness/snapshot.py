"""What of this machine a cluster changes: written down before `up`, compared after `down`."""

import json
import os
import re
from pathlib import Path

from e2e.harness import cgroups, layout
from e2e.harness.processes import MARKER
from e2e.harness.steps import run

# Changed by CNI, kube-proxy and the agent (which sets what the kubelet calls kernel tunables).
SYSCTLS = [
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/all/forwarding",
    "net/ipv4/conf/default/forwarding",
    "net/ipv6/conf/all/forwarding",
    "net/bridge/bridge-nf-call-iptables",
    "net/ipv4/vs/conntrack",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
    "net/netfilter/nf_conntrack_tcp_be_liberal",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
]


def take() -> dict:
    return {
        "processes": our_processes(),
        "mounts": mounts(),
        "cgroups": cgroups.all_names(),
        "network namespaces": sorted(path.name for path in Path("/run/netns").glob("*")),
        "interfaces": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "routes": sorted(run(["ip", "-o", "route"]).splitlines() + run(["ip", "-o", "rule"]).splitlines()),
        "iptables": iptables_rules("iptables") + iptables_rules("ip6tables"),
        "nftables": sorted(run(["nft", "list", "tables"]).splitlines()),
        "paths": sorted(str(path) for path in _paths() if path.exists()),
        "kernel settings": sorted(f"{name}={value}" for name, value in sysctls().items()),
    }


def _paths() -> list[Path]:
    return [*layout.AGENT_PATHS, *layout.SIDE_PATHS, layout.STATE, layout.RUN]


def left_over(before: dict) -> dict[str, list[str]]:
    """What is there now and was not before."""
    now = take()
    return {what: more for what in now if (more := sorted(set(now[what]) - set(before.get(what, []))))}


def write(snapshot: dict) -> None:
    layout.STATE.mkdir(parents=True, exist_ok=True)
    layout.SNAPSHOT.write_text(json.dumps({**snapshot, "boot": boot_id()}, indent=1))


def read() -> dict | None:
    try:
        return json.loads(layout.SNAPSHOT.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def sysctls() -> dict[str, str]:
    found = {}
    for name in SYSCTLS:
        path = Path("/proc/sys") / name
        if path.exists():
            found[name] = path.read_text().strip()
    return found


def mounts() -> list[str]:
    """Mount points, one entry per mount."""
    return sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())


def our_processes() -> list[str]:
    """Those that carry our mark in the environment, or run in our cgroup."""
    found = []
    for pid in our_pids():
        try:
            name = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue
        found.append(f"{pid} {name[:120]}")
    return found


def our_pids() -> list[int]:
    mark, root = f"{MARKER}=".encode(), layout.CGROUP_ROOT + "/"
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            environment = (entry / "environ").read_bytes()
            cgroup = (entry / "cgroup").read_text()
        except OSError:
            continue  # it has just ended
        if state != "Z" and (environment.startswith(mark) or b"\0" + mark in environment or f":{root}" in cgroup):
            found.append(int(entry.name))
    return sorted(found)


def iptables_rules(command: str) -> list[str]:
    """Rules and chains of users; not comments, counters, or built-in chains with their policy ACCEPT."""
    rules, table = [], ""
    for line in run([f"{command}-save"]).splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(("-A", ":")) and not re.match(r":\S+ ACCEPT", line):
            rules.append(f"{command} {table} {re.sub(r' *[[][0-9:]+[]]$', '', line)}")
    return sorted(rules)
