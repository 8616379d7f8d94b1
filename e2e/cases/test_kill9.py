"""kill -9 of the agent at 20 random moments, with 20 pods that run, start, finish and are deleted meanwhile.

Judged by watches on pods, nodes and EndpointSlices that are opened before the first kill: nothing restarts that should
not, nothing loses Ready, and every pod reaches what its spec asks.
"""

import os
import random
import threading
import time
from collections import defaultdict

from e2e.harness.apiclient import Event
from e2e.harness.cluster import Cluster

KILLS = 20
STEADY = 16  # half of them with a readiness probe
LONGEST_PAUSE_SECONDS = 2.5
PATIENCE = 120
# A Go kubelet that starts again forgets what probes have said, and such pods are not Ready until the next result.
KEEPS_PROBED_PODS_READY = {"kubelet": False, "rkubelet": True}

PROBE = {"readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 2, "timeoutSeconds": 10}}
LIVES_ON = "trap 'exit 0' TERM; while :; do sleep 0.2; done"


class Recorder:
    """Reads a watch in a thread until it is closed."""

    def __init__(self, cluster: Cluster, kind: str, ns: str | None = None) -> None:
        self.events: list[Event] = []
        self._watch = cluster.watch(kind, ns)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self.events.extend(self._each())
        except (OSError, ValueError):  # closed
            return

    def _each(self):
        for event in self._watch:
            if event.type == "ERROR":
                raise AssertionError(f"the watch broke: {event.object}")
            yield event

    def close(self) -> list[Event]:
        self._watch.__exit__()
        self._thread.join(5)
        return self.events


def _ready(obj: dict) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in obj.get("status", {}).get("conditions", []))


def test_agent_is_killed_at_random_moments(cluster: Cluster) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(1_000_000))
    print(f"       SEED={seed}")
    dice = random.Random(seed)
    with cluster.namespace("kill9") as ns:
        steady = _start_steady_pods(cluster, ns)
        recorders = {kind: Recorder(cluster, kind, space) for kind, space in (("pods", ns), ("endpointslices", ns), ("nodes", None))}
        before = {name: _container_id(cluster.get("pods", name, ns)) for name in steady}
        wanted = _kill_again_and_again(cluster, ns, dice)
        _reach_what_is_asked(cluster, ns, wanted)
        after = {name: cluster.get("pods", name, ns) for name in steady}
        events = {kind: recorder.close() for kind, recorder in recorders.items()}
        for name, pod in after.items():
            assert _container_id(pod) == before[name], f"{name} has another container than before"
            assert pod["status"]["containerStatuses"][0]["restartCount"] == 0, pod["status"]
        _judge_containers(events["pods"])
        _judge_ready(cluster, steady, events)
        uids = {pod["metadata"]["uid"] for pod in after.values()} | {cluster.get("pods", name, ns)["metadata"]["uid"]
                                                                      for name, phase in wanted.items() if phase}
        cluster.wait(lambda: not _orphans(cluster, ns, uids), 60, "no container is left of a pod that is gone", 1)


def _start_steady_pods(cluster: Cluster, ns: str) -> list[str]:
    cluster.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "steady", "namespace": ns},
                    "spec": {"selector": {"steady": "yes"}, "ports": [{"port": 80}]}})
    names = [f"{'probed' if number % 2 else 'plain'}-{number}" for number in range(STEADY)]
    for name in names:
        pod = _pod(cluster, ns, name, LIVES_ON, PROBE if name.startswith("probed") else {})
        pod["metadata"]["labels"]["steady"] = "yes"
        cluster.create(pod)
    for name in names:
        cluster.wait_ready(name, ns, PATIENCE)
    cluster.wait(lambda: len(_ready_endpoints(cluster.list("endpointslices", ns)[0])) == STEADY, 30, "all are endpoints")
    return names


def _pod(cluster: Cluster, ns: str, name: str, script: str, container: dict, policy: str = "Always") -> dict:
    return cluster.pod(name, ns, image=cluster.images.busybox, args=["sh", "-c", script], container=container,
                       nodeName=cluster.node_name, restartPolicy=policy, terminationGracePeriodSeconds=5)


def _kill_again_and_again(cluster: Cluster, ns: str, dice: random.Random) -> dict[str, str | None]:
    """Each round starts a server and a job and deletes the server of the round before, and kills somewhere in between.
    Gives the phase that each of these pods must reach; None: it must be gone."""
    wanted: dict[str, str | None] = {}
    for number in range(KILLS):
        server, job = f"server-{number}", f"job-{number}"
        cluster.create(_pod(cluster, ns, server, LIVES_ON, {}))
        cluster.create(_pod(cluster, ns, job, "sleep 0.5; exit 0", {}, policy="Never"))
        wanted |= {server: "Running", job: "Succeeded"}
        if number:
            cluster.delete("pods", f"server-{number - 1}", ns, wait=False)
            wanted[f"server-{number - 1}"] = None
        time.sleep(dice.uniform(0, LONGEST_PAUSE_SECONDS))
        cluster.agent.kill9()
        cluster.agent.start()
    return wanted


def _reach_what_is_asked(cluster: Cluster, ns: str, wanted: dict[str, str | None]) -> None:
    def missing() -> dict[str, tuple]:
        phases = {pod["metadata"]["name"]: pod["status"].get("phase") for pod in cluster.list("pods", ns)}
        return {name: (phases.get(name), phase) for name, phase in wanted.items() if phases.get(name) != phase}

    try:
        cluster.wait(lambda: not missing(), PATIENCE, "every pod has reached what its spec asks", 0.5)
    except TimeoutError:
        wrong = missing()
        states = {pod["metadata"]["name"]: pod["status"].get("containerStatuses") for pod in cluster.list("pods", ns) if pod["metadata"]["name"] in wrong}
        raise AssertionError(f"pods that are not (what they are, what they should be): {wrong}; their containers: {states}") from None
    for name in wanted:
        if wanted[name] == "Running":
            cluster.wait_ready(name, ns)


def _container_id(pod: dict) -> str:
    return pod["status"]["containerStatuses"][0]["containerID"]


def _judge_containers(events: list[Event]) -> None:
    """Every container here lives until its pod is deleted, or ends well: none may run a second time."""
    ran: dict[str, set[str]] = defaultdict(set)
    for event in events:
        for status in event.object["status"].get("containerStatuses", []):
            if {"running", "terminated"} & status.get("state", {}).keys() and status.get("containerID"):
                ran[event.object["metadata"]["name"]].add(status["containerID"])
    twice = {name: ids for name, ids in ran.items() if len(ids) > 1}
    assert not twice, f"more than one container ran: {twice}"


def _judge_ready(cluster: Cluster, steady: list[str], events: dict[str, list[Event]]) -> None:
    flips: dict[str, int] = defaultdict(int)
    for event in events["pods"]:  # the steady pods were all Ready when the watch began
        name = event.object["metadata"]["name"]
        if name in steady and event.type == "MODIFIED" and not _ready(event.object) and "deletionTimestamp" not in event.object["metadata"]:
            flips[name] += 1
    lost_nodes = [event for event in events["nodes"] if not _ready(event.object)]
    fewest = min((len(_ready_endpoints(event.object)) for event in events["endpointslices"]), default=STEADY)
    probed = {name: count for name, count in flips.items() if name.startswith("probed")}
    print(f"       pods not Ready: {len(probed)} with, {len(flips) - len(probed)} without a readiness probe, {sum(flips.values())} events; "
          f"fewest ready endpoints {fewest} of {STEADY}; node not Ready {len(lost_nodes)} times")
    assert not flips.keys() - probed.keys(), f"Ready pods became not Ready: {dict(flips)}"
    assert not lost_nodes, f"the node was not Ready: {[c for c in lost_nodes[0].object['status']['conditions'] if c['type'] == 'Ready']}"
    if KEEPS_PROBED_PODS_READY[cluster.agent.kind]:
        assert not probed, f"Ready pods became not Ready: {probed}"
        assert fewest == STEADY, f"only {fewest} of {STEADY} endpoints were ready at some time"


def _ready_endpoints(endpoint_slice: dict) -> list[str]:
    return [address for endpoint in endpoint_slice.get("endpoints") or [] if endpoint.get("conditions", {}).get("ready")
            for address in endpoint["addresses"]]


def _orphans(cluster: Cluster, ns: str, uids: set[str]) -> list[str]:
    """Containers and sandboxes of this namespace whose pod is no more."""
    of_namespace = f'labels."io.kubernetes.pod.namespace"=={ns}'
    of_pods = (f'labels."io.kubernetes.pod.uid"!={uid}' for uid in sorted(uids))
    return cluster.ctr("containers", "list", "-q", ",".join([of_namespace, *of_pods])).split()
