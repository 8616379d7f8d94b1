"""The parts that need no cluster: python3 -m unittest e2e.differential.test_pure"""

import copy
import json
import random
import re
import subprocess
import unittest
from pathlib import Path

from e2e.differential import compare, faults, generate, log_collector, render, stages, view
from e2e.differential.plan import (
    EXIT, HOLD, INIT, MAIN, NEVER_READY, POST_START, PRE_STOP, READINESS, RUNNING, SIDECAR, TERMINATED, WAITING, Container, Expected, Plan,
    Probe, Run, Stage)

SITE = render.Site("differential-1", "node-1", "busybox", Path("/life"), "192.0.2.1", 4321)
PLANS = [plan for seed in (1, 2, 3) for plan in generate.plans(seed, 200)]


def _containers(manifest: dict) -> list[dict]:
    return manifest["spec"]["initContainers"] + manifest["spec"]["containers"]


class Generator(unittest.TestCase):
    def test_a_seed_gives_the_same_pods_whatever_their_number(self) -> None:
        random.seed(7)
        one, other = generate.plans(5, 200), generate.plans(5, 40)
        self.assertEqual(one[:40], other)
        self.assertNotEqual(one, generate.plans(6, 200))

    def test_every_kind_and_policy_and_hook_and_probe_comes(self) -> None:
        plans = generate.plans(1, 200)
        containers = [container for plan in plans for container in plan.containers]
        self.assertEqual({plan.kind for plan in plans}, set(generate.KINDS))
        for role in (INIT, SIDECAR, MAIN):
            self.assertEqual({plan.policy for plan in plans if plan.of(role)}, set(generate.POLICIES), role)
        hooks = {(which, hook.kind, hook.works) for c in containers for which, hook in c.hooks.items()}
        for which in (POST_START, PRE_STOP):
            for kind in ("exec", "httpGet"):
                self.assertTrue({(which, kind, True), (which, kind, False)} <= hooks, (which, kind, hooks))
            self.assertIn((which, "sleep", True), hooks)
        probes = {(which, probe.kind) for c in containers for which, probe in c.probes.items()}
        self.assertEqual(len(probes), 9, probes)
        self.assertEqual({run.code for c in containers for run in c.runs if run.kind == EXIT}, {0, *generate.FAILURES, 43})
        self.assertTrue(any(c.on_term is None for c in containers))

    def test_containers_that_exit_have_no_probes(self) -> None:
        """A probe beside a container that ends by itself would fail or not by chance."""
        for plan in PLANS:
            for container in plan.containers:
                self.assertFalse(container.probes and any(run.kind == EXIT for run in container.runs), (plan.name, container))

    def test_stages_name_containers_of_the_pod(self) -> None:
        for plan in PLANS:
            names = [container.name for container in plan.containers]
            self.assertEqual(len(set(names)), len(names), plan)
            self.assertTrue(plan.stages and plan.of(MAIN))
            for stage in plan.stages:
                self.assertTrue(set(stage.containers) <= set(names), plan)

    def test_every_script_is_one_that_a_shell_takes(self) -> None:
        scripts = {script for plan in PLANS[:200] for c in _containers(render.manifest(plan, SITE)) for script in _scripts(c)}
        for script in scripts:
            checked = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True)
            self.assertEqual(checked.returncode, 0, f"{script}\n{checked.stderr}")

    def test_no_sleeping_hook_is_longer_than_the_grace(self) -> None:
        """The API server would refuse the pod."""
        self.assertGreater(generate.GRACE_DEAF, 1)
        for plan in PLANS:
            self.assertIn(plan.grace, (generate.GRACE_DEAF, generate.GRACE_POLITE))


def _scripts(container: dict) -> list[str]:
    hooks = [hook["exec"]["command"] for hook in container.get("lifecycle", {}).values() if "exec" in hook]
    return [command[2] for command in [container["command"], *hooks] if len(command) == 3]


class Stages(unittest.TestCase):
    POD = {"status": {"phase": "Running", "conditions": [{"type": "PodReadyToStartContainers", "status": "True"}],
                      "initContainerStatuses": [{"name": "side", "restartCount": 1, "ready": True, "started": True,
                                                 "state": {"running": {}}}],
                      "containerStatuses": [{"name": "main", "restartCount": 2, "ready": False, "started": False,
                                             "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}}

    def test_each_part_of_a_stage_counts(self) -> None:
        waits = Expected(WAITING, 2, reason="CrashLoopBackOff")
        cases = [
            (Stage({"main": waits, "side": Expected(RUNNING, 1, ready=True, started=True)}, phase="Running"), True),
            (Stage({"main": waits}, events=(("BackOff", "main"),)), True),
            (Stage({"main": waits}, events=(("BackOff", "side"),)), False),
            (Stage({"main": Expected(WAITING, 1)}), False),
            (Stage({"main": Expected(TERMINATED)}), False),
            (Stage({"main": Expected(WAITING, reason="PodInitializing")}), False),
            (Stage({"side": Expected(RUNNING, ready=False)}), False),
            (Stage({"side": Expected(RUNNING, 2)}), False),
            (Stage({"side": Expected(RUNNING, started=False)}), False),
            (Stage({"other": Expected(RUNNING)}), False),
            (Stage(phase="Succeeded|Failed"), False),
            (Stage(reason="DeadlineExceeded"), False),
            (Stage(sandbox_gone=True), False),
            (Stage(mark="here"), True),
            (Stage(mark="not here"), False),
        ]
        for stage, expected in cases:
            self.assertEqual(stages.reached(stage, self.POD, {("BackOff", "main")}, {"here", "side.1.up"}.__contains__), expected, stage)


PLAN = Plan(0, "stays", "Always", (
    Container("first", INIT, (Run(EXIT),)), Container("side", SIDECAR, (Run(HOLD),)), Container("other", SIDECAR, (Run(HOLD),)),
    Container("main", MAIN, (Run(HOLD),))), (Stage(),), grace=20)
LIFE = ["1.0 first 0 starts", "1.1 first 0 ends 0", "2.0 side 0 starts", "3.0 other 0 starts", "4.0 main 0 starts",
        "5.0 main hook preStop", "6.0 main 0 told to stop", "6.0 main 0 ends 0", "7.0 other 0 told to stop", "7.0 other 0 ends 0",
        "8.0 side 0 told to stop", "8.0 side 0 ends 0"]


def _record(agent: str) -> dict:
    """A pod as two agents would show it: all that is random is different."""
    mark = {"kubelet": "a", "rkubelet": "b"}[agent]
    ip = f"10.88.0.{ord(mark)}"
    waiting = {"reason": "CrashLoopBackOff", "message": f"back-off 5s restarting failed container=main pod=pod-000_ns-{mark}(uid-{mark})"}
    status = {
        "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "startTime": f"now-{mark}", "observedGeneration": 1,
        "conditions": [{"type": "Ready", "status": "False", "reason": "ContainersNotReady", "lastTransitionTime": f"now-{mark}",
                        "message": "containers with unready status: [main]", "observedGeneration": 1}],
        "containerStatuses": [{
            "name": "main", "containerID": f"containerd://{mark * 64}", "restartCount": 2, "ready": False, "started": False,
            "state": {"waiting": waiting},
            "lastState": {"terminated": {"exitCode": 3, "reason": "Error", "startedAt": f"then-{mark}", "finishedAt": f"now-{mark}",
                                         "containerID": f"containerd://{mark * 64}"}}}]}
    event = {"type": "Warning", "reason": "Unhealthy", "fieldPath": "spec.containers{main}", "component": "kubelet", "count": ord(mark),
             "message": f"Readiness probe failed: Get \"http://{ip}:8001/ok\": dial tcp {ip}:8001: connect: connection refused"}
    started = {"type": "Normal", "reason": "Started", "fieldPath": "spec.containers{main}", "component": "kubelet", "count": 3,
               "message": "Container started"}
    return {"number": 0, "uid": f"uid-{mark}", "namespace": f"ns-{mark}", "node_ip": "192.0.2.1", "hook_port": 4000 + ord(mark),
            "overdue": [], "at_stage": status, "final": copy.deepcopy(status), "logs_at_stage": ["main/2.log"], "hooks_asked": [],
            "events": [started, event], "order": LIFE,
            "logs": {"main/2.log": {"stdout": ["main 2 starts"], "stderr": [], "linked": True}}, "spec": {}}


def _set(record: dict, path: list, value: object) -> None:
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = value


class Comparison(unittest.TestCase):
    def _found(self, ours: dict) -> list[compare.Difference]:
        return compare.compare([PLAN], [_record("kubelet")], [ours])

    def test_a_pod_that_is_overdue_on_both_is_not_equal(self) -> None:
        theirs, ours = _record("kubelet"), _record("rkubelet")
        theirs["overdue"] = ours["overdue"] = ["stage 0: phase is Pending, not Running"]
        self.assertTrue(compare.compare([PLAN], [theirs], [ours]))

    def test_what_is_random_is_no_difference(self) -> None:
        self.assertEqual(self._found(_record("rkubelet")), [])

    def test_a_pod_that_one_agent_never_had_is_a_difference(self) -> None:
        self.assertTrue(compare.compare([PLAN], [_record("kubelet")], []))

    def test_every_field_counts(self) -> None:
        container = ["final", "containerStatuses", 0]
        cases = [
            (["final", "phase"], "Failed"),
            (["final", "reason"], "DeadlineExceeded"),
            (["final", "conditions", 0, "status"], "True"),
            (["final", "conditions", 0, "reason"], "PodCompleted"),
            (["final", "conditions"], []),
            (["final", "observedGeneration"], None),
            (["final", "startTime"], None),
            (["final", "podIPs"], []),
            ([*container, "state"], {"running": {"startedAt": "now"}}),
            ([*container, "state", "waiting", "message"], "back-off 10s restarting"),
            ([*container, "lastState", "terminated", "exitCode"], 0),
            ([*container, "lastState", "terminated", "reason"], "OOMKilled"),
            ([*container, "lastState"], {}),
            ([*container, "restartCount"], 1),
            ([*container, "ready"], True),
            ([*container, "started"], True),
            (["at_stage", "phase"], "Pending"),
            (["at_stage"], None),
            (["overdue"], ["stage 0"]),
            (["events", 0, "count"], 2),
            (["events", 1, "reason"], "ProbeWarning"),
            (["events", 1, "type"], "Normal"),
            (["events"], []),
            (["order"], LIFE[:-1]),
            (["logs"], {}),
            (["logs", "main/2.log", "stdout"], ["main 2 starts", "main 2 starts"]),
            (["logs", "main/2.log", "linked"], False),
            (["logs_at_stage"], ["main/1.log", "main/2.log"]),
            (["hooks_asked"], ["main preStop kube-lifecycle/1.37"]),
        ]
        for path, value in cases:
            ours = _record("rkubelet")
            _set(ours, path, value)
            self.assertTrue(self._found(ours), path)

    def test_an_explained_difference_is_told_apart_by_path_and_values(self) -> None:
        known = compare.Explanation(re.compile("final / phase"), lambda _path, _theirs, ours, _plan: ours == "Failed", "for a reason")
        before, compare.EXPLAINED = compare.EXPLAINED, (known,)
        try:
            for phase, cause in (("Failed", "for a reason"), ("Pending", "")):
                ours = _record("rkubelet")
                ours["final"]["phase"] = phase
                self.assertEqual([difference.explained for difference in self._found(ours)], [cause])
        finally:
            compare.EXPLAINED = before

    def test_probes_that_meet_the_end_are_explained_only_where_none_fails_by_intent(self) -> None:
        unready = Plan(0, "unready", "Always", (Container("main", MAIN, (Run(NEVER_READY),), probes={READINESS: Probe("exec")}),
                                                Container("other", MAIN, (Run(HOLD),), probes={READINESS: Probe("exec")})), (Stage(),), 20)
        failed, errored = "Readiness probe failed: ", "Readiness probe errored and resulted in unknown state: gone"
        cases = [("other", failed, compare.ABSENT, True), ("main", failed, compare.ABSENT, False), ("main", errored, compare.ABSENT, True),
                 ("other", errored, "some", False), ("other", "Probe warning: ", compare.ABSENT, False)]
        for container, message, theirs, explained in cases:
            path = f"events / Warning Unhealthy spec.containers{{{container}}} by kubelet: {message}"
            self.assertEqual(bool(compare.explanation(path, theirs, "some", unready)), explained, (path, theirs))

    def test_promised_orders(self) -> None:
        self.assertTrue(all(view.order_facts(PLAN, LIFE).values()))
        broken = [
            ("first has ended when side starts", (1, 2)),
            ("side starts before other", (2, 3)),
            ("other starts before main", (3, 4)),
            ("main has ended when other is told to stop", (7, 8)),
        ]
        for fact, (one, other) in broken:
            lines = list(LIFE)
            lines[one], lines[other] = lines[other], lines[one]
            self.assertIs(view.order_facts(PLAN, lines)[fact], False, fact)
        lines = LIFE[:8] + LIFE[10:] + LIFE[8:10]
        self.assertIs(view.order_facts(PLAN, lines)["other is told to stop before side"], False)


class Logs(unittest.TestCase):
    def test_lines_by_stream(self) -> None:
        content = b"2026-01-01T00:00:00.1Z stdout F one\n2026-01-01T00:00:00.2Z stderr F two\n2026-01-01T00:00:00.3Z stdout P thr\nbad\n"
        self.assertEqual(log_collector._lines(content), {"stdout": ["one", "thr<partial>"], "stderr": ["two"], "bad": ["b'bad'"]})


class Faults(unittest.TestCase):
    def test_each_fault_changes_the_pods_that_it_is_shown_on(self) -> None:
        chosen = faults.choose(generate.plans(1, 200), list(faults.FAULTS), 2)
        for fault, plans in chosen.items():
            self.assertEqual(len(plans), 2, fault)
            for plan in plans:
                manifest = render.manifest(plan, SITE)
                before = json.dumps(manifest)
                self.assertNotEqual(faults.inject(fault, manifest), manifest, fault)
                self.assertEqual(json.dumps(manifest), before, "the manifest itself is left alone")
        numbers = [plan.number for plans in chosen.values() for plan in plans]
        self.assertEqual(len(set(numbers)), len(numbers))


if __name__ == "__main__":
    unittest.main()
