"""How long a pod takes from its creation to Ready and from its deletion to gone, alone and in a crowd, and what agent and
runtime use while nothing happens. The bare runtime does the same pods through CRI alone (tools/cribench).

Times are read from one watch on the pods of the namespace, so no poll adds to them. Pods name their node, so the scheduler
adds nothing. The demo pod and CoreDNS are away meanwhile: at 0 pods there are 0.
"""

import json
import time
from contextlib import contextmanager
from typing import Iterator

from e2e.harness import addons, layout, tools
from e2e.harness.apiclient import Event, Watch
from e2e.harness.benchmarks import Figures, percentile, spread
from e2e.harness.cluster import Cluster
from e2e.harness.steps import run

ROUNDS = 12
CROWDS = (30, 100)  # the last one stays for the idle measurement
SETTLE_SECONDS = 8
IDLE_SECONDS = 30
PATIENCE = 240
SLEEPER = ["sh", "-c", "trap exit TERM; sleep 1d & wait"]
PROBE_COMMAND = "true"
PROBE = {"readinessProbe": {"exec": {"command": [PROBE_COMMAND]}, "periodSeconds": 1}}

BARE, TOKEN, PROBED = "bare pod", "pod with token", "pod with readiness probe"


# The runtime alone


def measure_runtime(cluster: Cluster) -> Figures:
    tools.build(["cribench"])
    cluster.agent.stop()  # it would remove pods that the API server does not know
    plain = _cribench(cluster, cluster.images.pause, [], "-crowds", ",".join(map(str, CROWDS)))
    probed = _cribench(cluster, cluster.images.busybox, SLEEPER, "-exec", PROBE_COMMAND)
    start, gone = ([ms / 1000 for ms in plain[key]] for key in ("start", "gone"))
    ready = [(one + two) / 1000 for one, two in zip(probed["start"], probed["exec"])]
    figures = {}
    for kind, to_ready in ((BARE, start), (TOKEN, start), (PROBED, ready)):
        figures |= spread(f"{kind}: create → Ready", to_ready)
    figures |= spread(f"{BARE}: delete → gone", gone)
    for crowd in plain["crowds"]:
        figures |= _crowd_figures(crowd["pods"], *([ms / 1000 for ms in crowd[key]] for key in ("start", "gone")))
    return figures


def _cribench(cluster: Cluster, image: str, command: list[str], *options: str) -> dict:
    logs = layout.STATE / "cribench"
    return json.loads(run([tools.path("cribench"), "-socket", str(cluster.cri_socket), "-image", image, "-logs", str(logs),
                           "-cgroup", f"{cluster.cgroup_root}/kubepods/besteffort", "-rounds", str(ROUNDS), *options,
                           "--", *command], timeout=600))


# An agent


def measure_agent(cluster: Cluster) -> Figures:
    """On an agent that has just been started."""
    with _no_other_pods(cluster):
        figures = _idle(cluster, 0)
        for kind, token, container in ((BARE, False, {}), (TOKEN, True, {}), (PROBED, False, PROBE)):
            figures |= _one_at_a_time(cluster, kind, token, container)
        for size in CROWDS:
            figures |= _crowd(cluster, size, idle=size == CROWDS[-1])
    return figures


@contextmanager
def _no_other_pods(cluster: Cluster) -> Iterator[None]:
    dns = cluster.path("deployments", "kube-system", "coredns")
    cluster.api.patch(dns, {"spec": {"replicas": 0}})
    cluster.delete("pods", addons.DEMO, "default")
    try:
        cluster.wait(lambda: not cluster.list("pods"), 90, "all pods are gone")
        yield
    finally:
        cluster.api.patch(dns, {"spec": {"replicas": 1}})
        addons.run_demo(cluster)


def _pod(cluster: Cluster, ns: str, name: str, token: bool, container: dict) -> dict:
    image, args = (cluster.images.busybox, SLEEPER) if container else (cluster.images.pause, [])
    return cluster.pod(name, ns, image=image, args=args, container=container, nodeName=cluster.node_name,
                       terminationGracePeriodSeconds=30, automountServiceAccountToken=token)


def _is_ready(event: Event) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in event.object.get("status", {}).get("conditions", []))


def _is_gone(event: Event) -> bool:
    return event.type == "DELETED"


def _one_at_a_time(cluster: Cluster, kind: str, token: bool, container: dict) -> Figures:
    ready, gone = [], []
    with cluster.namespace("bench") as ns, cluster.watch("pods", ns) as watch:
        for number in range(ROUNDS):
            name = f"pod-{number}"
            begin = time.monotonic()
            cluster.create(_pod(cluster, ns, name, token, container))
            ready.append(watch.until(_is_ready, PATIENCE).time - begin)
            begin = time.monotonic()
            cluster.delete("pods", name, ns, wait=False)
            gone.append(watch.until(_is_gone, PATIENCE).time - begin)
    figures = spread(f"{kind}: create → Ready", ready)
    return figures | (spread(f"{kind}: delete → gone", gone) if kind == BARE else {})


def _crowd(cluster: Cluster, size: int, idle: bool) -> Figures:
    figures = {}
    with cluster.namespace("bench") as ns, cluster.watch("pods", ns) as watch:
        begin = time.monotonic()
        for number in range(size):
            cluster.create(_pod(cluster, ns, f"pod-{number}", False, {}))
        ready = _when_each(watch, _is_ready, size, begin)
        if idle:
            figures |= _idle(cluster, size)
        begin = time.monotonic()
        for number in range(size):
            cluster.delete("pods", f"pod-{number}", ns, wait=False)
        gone = _when_each(watch, _is_gone, size, begin)
    return _crowd_figures(size, ready, gone) | figures


def _when_each(watch: Watch, predicate, size: int, begin: float) -> list[float]:
    """When the predicate was true of each pod for the first time."""
    times: dict[str, float] = {}
    while len(times) < size:
        event = watch.until(predicate, PATIENCE)
        times.setdefault(event.object["metadata"]["name"], event.time - begin)
    return list(times.values())


def _crowd_figures(size: int, ready: list[float], gone: list[float]) -> Figures:
    return {
        f"{size} pods at once: Ready, p50, s": percentile(ready, 0.5),
        f"{size} pods at once: all Ready, s": max(ready),
        f"{size} pods at once: all gone, s": max(gone),
    }


def _idle(cluster: Cluster, pods: int) -> Figures:
    """What agent and runtime use while nothing happens; CPU in percent of one core."""
    time.sleep(SETTLE_SECONDS)
    processes = {"agent": cluster.agent, "containerd": cluster.containerd}
    before, begin = {name: process.cpu_seconds() for name, process in processes.items()}, time.monotonic()
    time.sleep(IDLE_SECONDS)
    passed = time.monotonic() - begin
    figures = {f"{name} CPU idle at {pods} pods, %": 100 * (process.cpu_seconds() - before[name]) / passed
               for name, process in processes.items()}
    return figures | {f"{name} RSS at {pods} pods, MiB": process.rss_kib() / 1024 for name, process in processes.items()}
