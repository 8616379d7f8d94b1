"""How long a pod takes from its creation to Ready and from its deletion to gone, alone and in a crowd; what the agent costs.

Times are read from one watch on all pods of the namespace, so no poll adds to them.
"""

import time

from e2e.harness.apiclient import Event
from e2e.harness.benchmarks import percentile
from e2e.harness.cluster import Cluster

ROUNDS = 15
CROWD = 30
IDLE_SECONDS = 30
PROBE = {"readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1}}


def _is_ready(event: Event, name: str) -> bool:
    conditions = event.object.get("status", {}).get("conditions", [])
    return event.object["metadata"]["name"] == name and any(
        c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _one_at_a_time(cluster: Cluster, container: dict, token: bool) -> dict:
    ready, gone = [], []
    with cluster.namespace("bench") as ns, cluster.watch("pods", ns) as watch:
        for number in range(ROUNDS):
            name = f"pod-{number}"
            pod = cluster.pod(name, ns, image=cluster.images.busybox, args=["sh", "-c", "trap exit TERM; sleep 1d & wait"],
                              container=container, automountServiceAccountToken=token)
            begin = time.monotonic()
            cluster.create(pod)
            ready.append(watch.until(lambda event: _is_ready(event, name), 60).time - begin)
            begin = time.monotonic()
            cluster.delete("pods", name, ns, wait=False)
            gone.append(watch.until(lambda event: event.type == "DELETED", 60).time - begin)
    return {**_spread("create to Ready, ms", ready), **_spread("delete to gone, ms", gone)}


def _spread(title: str, seconds: list[float]) -> dict:
    return {f"{title}, p50": round(percentile(seconds, 0.5) * 1000), f"{title}, p90": round(percentile(seconds, 0.9) * 1000)}


def bench_a_bare(cluster: Cluster) -> dict:
    return _one_at_a_time(cluster, {}, token=False)


def bench_b_with_token(cluster: Cluster) -> dict:
    return _one_at_a_time(cluster, {}, token=True)


def bench_c_with_probe(cluster: Cluster) -> dict:
    return _one_at_a_time(cluster, PROBE, token=True)


def bench_d_crowd(cluster: Cluster) -> dict:
    """Many at once, and what agent and runtime use while they idle."""
    with cluster.namespace("bench") as ns, cluster.watch("pods", ns) as watch:
        begin = time.monotonic()
        for number in range(CROWD):
            cluster.create(cluster.pod(f"pod-{number}", ns, image=cluster.images.busybox, args=["sleep", "1d"],
                                       automountServiceAccountToken=False))
        ready: dict[str, float] = {}
        while len(ready) < CROWD:
            event = watch.until(lambda event: _is_ready(event, event.object["metadata"]["name"]), 120)
            ready.setdefault(event.object["metadata"]["name"], event.time - begin)
        time.sleep(5)
        used = cluster.agent.cpu_seconds(), cluster.containerd.cpu_seconds()
        time.sleep(IDLE_SECONDS)
        share = [100 * (now - was) / IDLE_SECONDS
                 for now, was in zip((cluster.agent.cpu_seconds(), cluster.containerd.cpu_seconds()), used)]
        return {
            f"{CROWD} pods: p50 Ready, s": round(percentile(list(ready.values()), 0.5), 2),
            f"{CROWD} pods: all Ready, s": round(max(ready.values()), 2),
            "agent RSS, MiB": cluster.agent.rss_kib() // 1024,
            "agent CPU idle, % of a core": round(share[0], 1),
            "containerd CPU idle, % of a core": round(share[1], 1),
        }
