"""Runs plans on the agent of the cluster and keeps what could be observed of each pod, raw.

A pod is made, watched until its last stage is reached, kept as it is then, deleted, and watched until it is gone. Nothing is
done at a time of the clock: the only clock here ends what does not come (a pod that is overdue is noted as such).
"""

import queue
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from e2e.differential import render, stages
from e2e.differential.hook_server import HookServer
from e2e.differential.log_collector import LogCollector
from e2e.differential.plan import Plan
from e2e.harness import layout
from e2e.harness.apiclient import ApiError, Event, Watch
from e2e.harness.cluster import Cluster
from e2e.harness.steps import say

AT_ONCE = 24
LOOK_SECONDS = 0.2  # between looks at the marks on the host
PATIENCE = 120  # seconds
# Back-offs that are short, and the same each time; no limit on pulls, whose message would come by chance.
CONFIG = {"crashLoopBackOff": {"maxContainerRestartPeriod": "8s"}, "registryPullQPS": 0}
# Eager readiness tries probes at other times, so another number of them fails.
ARGUMENTS = {"rkubelet": ("--eager-first-readiness=false",), "kubelet": ()}
LIFE = layout.STATE / "differential"


@dataclass
class _Observed:
    """A pod on its way."""

    plan: Plan
    manifest: dict
    since: float
    uid: str = ""
    pod: dict = field(default_factory=dict)  # as last seen
    stage: int = 0
    at_stage: dict | None = None  # its status when the last stage was reached
    logs_at_stage: list[str] = field(default_factory=list)
    overdue: list[str] = field(default_factory=list)
    nudged: set[int] = field(default_factory=set)  # numbers of starts after which it was nudged
    deleting: bool = False


def run(cluster: Cluster, kind: str, plans: list[Plan], change: Callable[[Plan, dict], dict] = lambda _, manifest: manifest,
        patience: float = PATIENCE) -> list[dict]:
    """What each pod showed on this agent, in the order of the plans. `change` gets each manifest before it is made.

    `patience` is for how many seconds a pod is waited for in each of its stages, and at its end.
    """
    _put_in_place(cluster, kind)
    with cluster.namespace("differential") as namespace:
        life = LIFE / namespace
        life.mkdir(parents=True)
        try:
            with HookServer(cluster.node_ip, life) as hooks, \
                    LogCollector(cluster.pod_logs, cluster.container_logs, namespace) as logs, \
                    cluster.watch("pods", namespace) as pods, cluster.watch("events", namespace) as events:
                site = render.Site(namespace, cluster.node_name, cluster.images.busybox, life, cluster.node_ip, hooks.port)
                pending = [(plan, change(plan, render.manifest(plan, site))) for plan in plans]
                return _Runner(cluster, site, hooks, logs, pods, events, pending, patience).run()
        finally:
            shutil.rmtree(life)


def _put_in_place(cluster: Cluster, kind: str) -> None:
    if cluster.agent.alive():
        cluster.agent.stop()
    cluster.agent.switch(kind)
    cluster.agent.restart(CONFIG, ARGUMENTS[kind])
    cluster.wait_node_ready(90)


class _Runner:
    def __init__(self, cluster: Cluster, site: render.Site, hooks: HookServer, logs: LogCollector, pods: Watch, events: Watch,
                 pending: list[tuple[Plan, dict]], patience: float) -> None:
        self._patience = patience
        self._cluster, self._site, self._hooks, self._logs = cluster, site, hooks, logs
        self._pending, self._total = pending[::-1], len(pending)
        self._active: dict[str, _Observed] = {}
        self._records: list[dict] = []
        self._events: dict[str, dict[str, dict]] = {}  # UID of a pod -> name of an event -> the event
        self._queue: queue.Queue[tuple[str, Event]] = queue.Queue()
        for source, watch in (("pods", pods), ("events", events)):
            threading.Thread(target=self._pump, args=(source, watch), daemon=True).start()

    def _pump(self, source: str, watch: Watch) -> None:
        try:
            for event in watch:
                self._queue.put((source, event))
        except (OSError, ValueError):  # closed at the end of the run
            pass

    def run(self) -> list[dict]:
        shown, look_at = 0, 0.0
        while self._pending or self._active:
            while self._pending and len(self._active) < AT_ONCE:
                self._create(*self._pending.pop())
            try:
                source, event = self._queue.get(timeout=LOOK_SECONDS)
                self._take_event(event.object) if source == "events" else self._take_pod(event)
            except queue.Empty:
                pass
            for observed in list(self._active.values()) if time.monotonic() >= look_at else ():
                self._look(observed)  # nothing in the API tells of marks
                look_at = time.monotonic() + LOOK_SECONDS
            self._give_up_overdue()
            if len(self._records) >= shown + 25:
                shown = len(self._records)
                say(f"{shown} of {self._total} pods are done")
        for record in self._records:
            record["events"] = list(self._events.get(record["uid"], {}).values())
        return sorted(self._records, key=lambda record: record["number"])

    def _create(self, plan: Plan, manifest: dict) -> None:
        observed = self._active[plan.name] = _Observed(plan, manifest, time.monotonic())
        observed.pod = self._cluster.create(manifest)
        observed.uid = observed.pod["metadata"]["uid"]

    def _take_event(self, event: dict) -> None:
        about = event["involvedObject"]
        kept = self._events.setdefault(about.get("uid", ""), {})
        kept[event["metadata"]["name"]] = {
            "type": event["type"], "reason": event["reason"], "message": event.get("message", ""),
            "fieldPath": about.get("fieldPath", ""), "count": event.get("count", 1),
            "component": event.get("reportingComponent") or event.get("source", {}).get("component", "")}
        observed = self._active.get(about.get("name", ""))
        if observed:
            if event["reason"] == "BackOff":
                self._nudge(observed)
            self._look(observed)

    def _nudge(self, observed: _Observed) -> None:
        """Has the agent look at a pod whose container has begun to wait in a back-off.

        The Go kubelet reports that wait when it looks at the pod next, which may be the moment when it ends.
        """
        starts = len(list((self._site.life / observed.plan.name).glob("*.up")))
        if observed.deleting or starts in observed.nudged:
            return
        observed.nudged.add(starts)
        path = self._cluster.path("pods", self._site.namespace, observed.plan.name)
        self._cluster.api.patch(path, {"metadata": {"annotations": {"differential/nudged-after-starts": str(starts)}}})

    def _take_pod(self, event: Event) -> None:
        observed = self._active.get(event.object["metadata"]["name"])
        if not observed:
            return
        observed.pod = event.object
        if event.type == "DELETED":
            self._finish(observed)
        else:
            self._look(observed)

    def _look(self, observed: _Observed) -> None:
        """Goes on to the next stages as far as they are reached."""
        while not observed.deleting and not self._missing(observed):
            if observed.stage + 1 < len(observed.plan.stages):
                observed.stage += 1
                (self._site.life / observed.plan.name / f"stage.{observed.stage}").touch()
            else:
                self._delete(observed)

    def _missing(self, observed: _Observed) -> list[str]:
        """What the pod lacks of the stage that it is to reach next."""
        seen = {(event["reason"], _container_of(event["fieldPath"])) for event in self._events.get(observed.uid, {}).values()}
        folder = self._site.life / observed.plan.name
        return stages.missing(observed.plan.stages[observed.stage], observed.pod, seen, lambda mark: (folder / mark).exists())

    def _delete(self, observed: _Observed, grace: int | None = None) -> None:
        name, plan = observed.plan.name, observed.plan
        observed.logs_at_stage = self._log_names(observed)
        observed.at_stage = observed.pod.get("status", {})
        observed.deleting, observed.since = True, time.monotonic()
        grace = plan.delete_grace if grace is None else grace
        try:
            path = self._cluster.path("pods", self._site.namespace, name)
            self._cluster.api.delete(path, {} if grace is None else {"gracePeriodSeconds": grace})
        except ApiError as error:
            if error.status != 404:
                raise

    def _log_names(self, observed: _Observed) -> list[str]:
        folder = self._cluster.pod_logs / f"{self._site.namespace}_{observed.plan.name}_{observed.uid}"
        return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))

    def _give_up_overdue(self) -> None:
        now = time.monotonic()
        for observed in list(self._active.values()):
            if now - observed.since < self._patience:
                continue
            if not observed.deleting:
                observed.overdue.append(f"stage {observed.stage}: {'; '.join(self._missing(observed))}")
                self._delete(observed)
            else:
                observed.overdue.append("the pod is not gone")
                self._delete(observed, grace=0)
            say(f"{observed.plan.name} is overdue: {observed.overdue[-1]}")

    def _finish(self, observed: _Observed) -> None:
        plan = observed.plan
        del self._active[plan.name]
        metadata = observed.pod["metadata"]
        order = self._site.life / plan.name / "order"
        self._records.append({
            "number": plan.number, "kind": plan.kind, "name": plan.name, "uid": observed.uid, "namespace": self._site.namespace,
            "node_ip": self._site.hook_host, "hook_port": self._site.hook_port, "spec": observed.manifest["spec"],
            "loose": plan.loose, "overdue": observed.overdue, "generation": metadata.get("generation"),
            "at_stage": observed.at_stage, "final": observed.pod.get("status", {}), "logs_at_stage": observed.logs_at_stage,
            "logs": self._logs.take(plan.name, observed.uid), "hooks_asked": self._hooks.asked(plan.name),
            "order": order.read_text().splitlines() if order.exists() else []})


def _container_of(field_path: str) -> str:
    """`spec.containers{main}` is about main."""
    return field_path.partition("{")[2].rstrip("}")
