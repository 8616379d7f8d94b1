"""Very many probes: RATE a second for SECONDS, a third each of HTTP, TCP and gRPC, on the agents of AGENTS in turn.

The containers are pause containers that listen to nothing. Their probes name this host, where tools/probetarget listens and
notes when each comes; a gRPC probe has no host, so the pods are on the host's network, and their IP is the node's. Each probe
has the shortest period that there is, and each container the two probes that go on while it runs. A load without failures is
wanted: a pod that lost Ready, a restart, or a probe that never came makes the verb fail. The rest are figures.
"""

import json
import os
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from e2e.harness import agent, benchmarks, controlplane, tools
from e2e.harness.apiclient import Event
from e2e.harness.benchmarks import Figures
from e2e.harness.cluster import Cluster
from e2e.harness.processes import Service
from e2e.harness.steps import HarnessError, run, say, step, warn

PERIOD = 1  # seconds; the API takes no shorter one
PROBES = ("livenessProbe", "readinessProbe")
CONTAINERS = 10  # of a pod
BATCH = 10  # pods that start at once
MAX_PODS = 100  # the node takes 110
HOST, BASE_PORT, ADMIN = "127.0.0.1", 20000, "127.0.0.1:19999"
KINDS = ("http", "tcp", "grpc")  # of probe n: n modulo 3, as in probetarget
START_PATIENCE, END_PATIENCE = 240, 420
SETTLE_SECONDS = 15
SAMPLE_SECONDS = 5
TARGET, OTHERS = "target", "agent"  # the two ends of a connection


def run_probe_load() -> bool:
    rate, seconds = _number_from("RATE", 1700), _number_from("SECONDS", 600)
    if _pods_for(rate) > MAX_PODS:
        raise HarnessError(f"RATE={rate}: at most {MAX_PODS * CONTAINERS * len(PROBES) // PERIOD}, the node has no room for more pods")
    cluster = Cluster.load()
    cluster.cleanup_seconds = END_PATIENCE
    kinds = benchmarks.wanted_agents("rkubelet")
    tools.build(["probetarget"])
    for kind in kinds:
        agent.build(kind)
    heading, loads = benchmarks.Heading(), {}
    with benchmarks.same_agent_afterwards(cluster):
        for kind in kinds:
            cluster.agent.switch(kind)
            cluster.wait_node_ready(90)
            loads[kind] = _measure(cluster, kind, rate, seconds)
    title = f"{rate} probes a second for {seconds} s; {heading.text()}"
    benchmarks.keep("probe-load", title, {kind: load.figures() for kind, load in loads.items()},
                    {"details": {kind: load.details() for kind, load in loads.items()}})
    faults = [f"{kind}: {fault}" for kind, load in loads.items() for fault in load.faults()]
    for fault in faults:
        warn(fault)
    return not faults


def _number_from(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) == 0:
        raise HarnessError(f"{variable}={text}: it must be a whole number above 0")
    return int(text)


def _pods_for(rate: int) -> int:
    return -(-rate * PERIOD // (CONTAINERS * len(PROBES)))


# The load


def _measure(cluster: Cluster, kind: str, rate: int, seconds: int) -> "Load":
    probes, pods = rate * PERIOD, _pods_for(rate)
    target = Service("probetarget", lambda: [tools.path("probetarget"), "-probes", str(probes), "-base-port", str(BASE_PORT),
                                             "-host", HOST, "-grpc-host", cluster.node_ip, "-admin", ADMIN,
                                             "-period", f"{PERIOD}s"],
                     controlplane.answers(f"http://{ADMIN}/figures"))
    target.start()
    try:
        with cluster.namespace("probes") as ns:
            with step(f"{kind}: {pods} pods with {probes} probes"):
                _start(cluster, ns, probes, pods)
            time.sleep(SETTLE_SECONDS)
            before = cluster.list("pods", ns)
            with step(f"{kind}: {seconds} s of probes"):
                load = _watch_for(cluster, target, seconds, probes)
            load.compare(before, cluster.list("pods", ns))
            load.count_failures(_probe_results(cluster, ns))
            say(f"{kind}: removing the pods")
    finally:
        target.stop()
    return load


def _start(cluster: Cluster, ns: str, probes: int, pods: int) -> None:
    with cluster.watch("pods", ns) as watch:
        for first in range(0, pods, BATCH):
            batch = range(first, min(first + BATCH, pods))
            for number in batch:
                cluster.create(_pod(cluster, ns, number, probes))
            missing = {f"pod-{number}" for number in batch}
            while missing:
                missing.discard(watch.until(_is_ready, START_PATIENCE).object["metadata"]["name"])


def _is_ready(event: Event) -> bool:
    return _ready_since(event.object) is not None


def _ready_since(pod: dict) -> str | None:
    conditions = pod.get("status", {}).get("conditions", [])
    return next((c["lastTransitionTime"] for c in conditions if c["type"] == "Ready" and c["status"] == "True"), None)


def _pod(cluster: Cluster, ns: str, number: int, probes: int) -> dict:
    """Pod `number` of those that share probes 0 to `probes`. It asks for no resources, so that all fit on the node."""
    pod = cluster.pod(f"pod-{number}", ns, nodeName=cluster.node_name, hostNetwork=True, automountServiceAccountToken=False)
    size = CONTAINERS * len(PROBES)
    mine = list(range(number * size, min((number + 1) * size, probes)))
    pod["spec"]["containers"] = [
        {"name": f"c{first}", "image": cluster.images.pause, "imagePullPolicy": "IfNotPresent",
         **{field: _probe(probe) for field, probe in zip(PROBES, mine[first:first + len(PROBES)])}}
        for first in range(0, len(mine), len(PROBES))]
    return pod


def _probe(number: int) -> dict:
    port = BASE_PORT + number
    handler = {
        "http": {"httpGet": {"host": HOST, "port": port, "path": f"/probe/{number}"}},
        "tcp": {"tcpSocket": {"host": HOST, "port": port}},
        "grpc": {"grpc": {"port": port, "service": f"probe-{number}"}},
    }[KINDS[number % len(KINDS)]]
    return {"periodSeconds": PERIOD, **handler}


def _watch_for(cluster: Cluster, target: Service, seconds: int, probes: int) -> "Load":
    samples, target_cpu, machine = [_sample(cluster, probes)], target.cpu_seconds(), _machine_ticks()
    _ask("POST", "/begin")
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(SAMPLE_SECONDS, left))
        samples.append(_sample(cluster, probes))
    seen = json.loads(_ask("GET", "/figures"))
    idle, total = (now - then for now, then in zip(_machine_ticks(), machine))
    return Load(samples, seen, target.cpu_seconds() - target_cpu, busy=1 - idle / total)


def _ask(method: str, path: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(f"http://{ADMIN}{path}", method=method), timeout=30) as response:
        return response.read()


# What is looked at meanwhile


@dataclass
class Sample:
    time: float
    pid: int
    rss_kib: int
    cpu_seconds: float
    threads: int
    files: int
    sockets: Counter  # "<end> <state>" -> how many


def _sample(cluster: Cluster, probes: int) -> Sample:
    pid = cluster.agent.pid()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Sample(time.monotonic(), pid, int(status["VmRSS"].split()[0]), cluster.agent.cpu_seconds(), int(status["Threads"]),
                  len(os.listdir(f"/proc/{pid}/fd")), Counter(_sockets(probes)))


def _sockets(probes: int) -> Iterator[str]:
    """Both ends of every connection to a probe's port, also of those that only the kernel still knows."""
    ports = range(BASE_PORT, BASE_PORT + probes)
    ours = " or ".join(f"( {end} >= :{ports[0]} and {end} <= :{ports[-1]} )" for end in ("sport", "dport"))
    for line in run(["ss", "-tanH", "state", "connected", ours]).splitlines():
        state, _, _, local, *_ = line.split()
        yield f"{TARGET if int(local.rpartition(':')[2]) in ports else OTHERS} {state}"


def _machine_ticks() -> tuple[int, int]:
    """Idle and all CPU time of this machine."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def _probe_results(cluster: Cluster, ns: str) -> Counter:
    """result -> how many, as the agent counts them since the pods' start."""
    status, _, body = cluster.kubelet("GET", "/metrics/probes", timeout=60)
    if status != 200:
        raise HarnessError(f"/metrics/probes of the agent: {status} {body[:200]!r}")
    results: Counter = Counter()
    for line in body.decode().splitlines():
        if line.startswith("prober_probe_total{") and f'namespace="{ns}"' in line:
            result = line.partition('result="')[2].partition('"')[0]
            results[result] += int(float(line.rpartition(" ")[2]))
    return results


# What came of it


@dataclass
class Load:
    """One agent's run."""

    samples: list[Sample]
    seen: dict  # probetarget's figures
    target_cpu_seconds: float
    busy: float  # share of all cores that was in use, whoever used it
    results: Counter | None = None
    lost_ready: int = 0
    restarts: int = 0
    restarts_before: int = 0

    def compare(self, before: list[dict], after: list[dict]) -> None:
        then, now = ({pod["metadata"]["uid"]: pod for pod in pods} for pods in (before, after))
        self.lost_ready = sum(_ready_since(pod) is None or _ready_since(pod) != _ready_since(now.get(uid, {}))
                              for uid, pod in then.items())
        self.restarts_before = sum(map(_restarts, before))
        self.restarts = sum(map(_restarts, after)) - self.restarts_before

    def count_failures(self, results: Counter) -> None:
        self.results = results

    def figures(self) -> Figures:
        first, last, every = self.samples[0], self.samples[-1], self.seen["kinds"]["all"]
        cpu, took = last.cpu_seconds - first.cpu_seconds, last.time - first.time
        figures = {"probes a second": every["per_second"]}
        for kind in (*KINDS, "all"):
            seen = self.seen["kinds"][kind]
            figures |= {f"{kind}: lateness {name}, ms": seen[f"late_{name}_ms"] for name in ("p50", "p99", "max")}
        return figures | {
            "intervals of two periods and more": every["late_by_a_period"],
            "intervals early by more than 5 ms": every["early"],
            "earliest, ms": every["early_max_ms"],
            "probes that never came": every["silent"],
            "failed probes since the pods' start": self.results["failed"] + self.results["unknown"],
            "agent RSS at the start, MiB": first.rss_kib / 1024,
            "agent RSS at the end, MiB": last.rss_kib / 1024,
            "agent RSS, max, MiB": max(sample.rss_kib for sample in self.samples) / 1024,
            "agent CPU, % of a core": 100 * cpu / took,
            "agent CPU for a probe, µs": 1e6 * cpu / every["arrivals"] if every["arrivals"] else 0,
            "agent threads, max": max(sample.threads for sample in self.samples),
            "agent open files, max": max(sample.files for sample in self.samples),
            "agent's end in TIME_WAIT, max": self._most(f"{OTHERS} TIME-WAIT"),
            "agent's end open, max": self._most(OTHERS),
            "targets' end in TIME_WAIT, max": self._most(f"{TARGET} TIME-WAIT"),
            "targets' end open, max": self._most(TARGET),
            "connections that ended in a reset": every["resets"],
            "targets' CPU, % of a core": 100 * self.target_cpu_seconds / took,
            "machine busy, % of all cores": 100 * self.busy,
            "pods that lost Ready": self.lost_ready,
            "containers restarted": self.restarts,
        }

    def _most(self, what: str) -> int:
        """Of an end and state; of an end alone, in all states but TIME_WAIT."""
        def count(sockets: Counter) -> int:
            return sum(number for name, number in sockets.items()
                       if name == what or (name.startswith(f"{what} ") and not name.endswith("TIME-WAIT")))

        return max(count(sample.sockets) for sample in self.samples)

    def details(self) -> dict:
        return {"seen": self.seen, "results": self.results, "restarts before": self.restarts_before,
                "samples": [vars(sample) for sample in self.samples]}

    def faults(self) -> list[str]:
        every = self.seen["kinds"]["all"]
        faults = {"pods lost Ready": self.lost_ready, "containers were restarted": self.restarts + self.restarts_before,
                  "probes never came": every["silent"], "probes came to another's port": every["strayed"],
                  "times the agent was another process": len({sample.pid for sample in self.samples}) - 1}
        return [f"{number} {what}" for what, number in faults.items() if number]


def _restarts(pod: dict) -> int:
    return sum(container["restartCount"] for container in pod.get("status", {}).get("containerStatuses", []))
