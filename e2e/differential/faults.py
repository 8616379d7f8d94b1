"""Deliberate faults: how an agent that misreads one field would treat a pod. Pure.

A fault changes the manifests of one agent's pods, so the agent itself has no back door; whoever compares must notice.
"""

import copy
from dataclasses import dataclass
from typing import Callable

from e2e.differential.plan import (
    EXIT, HOLD, INIT, LIVENESS, MAIN, NEVER_UP, POST_START, PRE_STOP, READINESS, SIDECAR, STARTUP, UNWELL, Plan)


def _containers(manifest: dict) -> list[dict]:
    return manifest["spec"]["initContainers"] + manifest["spec"]["containers"]


def _other_restart_policy(manifest: dict) -> None:
    spec = manifest["spec"]
    spec["restartPolicy"] = {"Never": "OnFailure", "OnFailure": "Never", "Always": "Never"}[spec["restartPolicy"]]


def _without_hook(which: str) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        for container in _containers(manifest):
            container.get("lifecycle", {}).pop(which, None)
            if container.get("lifecycle") == {}:
                del container["lifecycle"]

    return change


def _without_probe(which: str) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        for container in _containers(manifest):
            container.pop(which, None)

    return change


def _init_backwards(manifest: dict) -> None:
    manifest["spec"]["initContainers"].reverse()


def _sidecars_are_init(manifest: dict) -> None:
    for container in manifest["spec"]["initContainers"]:
        container.pop("restartPolicy", None)


def _wrong_exit_code(manifest: dict) -> None:
    for container in _containers(manifest):
        if len(container["command"]) == 3:
            container["command"][2] = container["command"][2].replace("exit $1", "exit $(( $1 ? 99 : 0 ))")


def _no_grace(manifest: dict) -> None:
    manifest["spec"]["terminationGracePeriodSeconds"] = 2
    for container in _containers(manifest):  # a signal that nobody catches is what no time to end looks like
        if len(container["command"]) == 3:
            container["command"][2] = container["command"][2].replace("trap 'say", "trap 'true' TERM; : 'say")


def _no_fallback_to_logs(manifest: dict) -> None:
    for container in _containers(manifest):
        container.pop("terminationMessagePolicy", None)


@dataclass(frozen=True)
class Fault:
    change: Callable[[dict], None]
    shows: Callable[[Plan], bool]  # whether this pod must come out otherwise


def _any_run(*kinds: str) -> Callable[[Plan], bool]:
    return lambda plan: any(run.kind in kinds for container in plan.containers for run in container.runs)


def _working_hook(which: str) -> Callable[[Plan], bool]:
    """Of a container that has nothing to go wrong before the hook."""
    return lambda plan: plan.kind == "stays" and any(
        which in container.hooks and container.hooks[which].kind != "sleep" and container.runs[-1].kind == HOLD
        for container in plan.containers)


def _fails_by_itself(plan: Plan) -> bool:
    return plan.kind in ("completes", "stays") and any(
        run.kind == EXIT and run.code for container in plan.of(INIT, MAIN) for run in container.runs)


FAULTS: dict[str, Fault] = {
    "restart-policy": Fault(_other_restart_policy, lambda plan: _fails_by_itself(plan) and not any(c.policy for c in plan.containers)),
    "no-pre-stop": Fault(_without_hook(PRE_STOP), _working_hook(PRE_STOP)),
    "no-post-start": Fault(_without_hook(POST_START), _working_hook(POST_START)),
    "no-liveness": Fault(_without_probe(LIVENESS), _any_run(UNWELL)),
    "no-readiness": Fault(_without_probe(READINESS), lambda plan: plan.kind == "unready"),
    "no-startup": Fault(_without_probe(STARTUP), _any_run(NEVER_UP)),
    "init-order": Fault(_init_backwards, lambda plan: plan.kind in ("stays", "completes") and len(plan.of(INIT, SIDECAR)) > 1),
    "sidecar-as-init": Fault(_sidecars_are_init, lambda plan: plan.kind in ("stays", "completes") and bool(plan.of(SIDECAR))),
    "exit-code": Fault(_wrong_exit_code, _fails_by_itself),
    "no-grace": Fault(_no_grace, lambda plan: plan.kind == "stays" and any(
        container.on_term is not None and container.runs[-1].kind == HOLD for container in plan.of(MAIN))),
    "no-log-fallback": Fault(_no_fallback_to_logs, lambda plan: _fails_by_itself(plan) and any(
        container.log_fallback and container.runs[-1].code and not container.runs[-1].message for container in plan.containers)),
}


def inject(fault: str, manifest: dict) -> dict:
    """The manifest as it is with the fault; an equal one if the fault does not touch this pod."""
    changed = copy.deepcopy(manifest)
    FAULTS[fault].change(changed)
    return changed


def choose(plans: list[Plan], wanted: list[str], each: int) -> dict[str, list[Plan]]:
    """For each fault some pods that must show it; no pod is chosen twice."""
    chosen: dict[str, list[Plan]] = {}
    taken: set[int] = set()
    # Those that few pods can show choose first.
    for fault in sorted(wanted, key=lambda fault: sum(FAULTS[fault].shows(plan) for plan in plans)):
        chosen[fault] = [plan for plan in plans if plan.number not in taken and not plan.loose and FAULTS[fault].shows(plan)][:each]
        taken |= {plan.number for plan in chosen[fault]}
    return {fault: chosen[fault] for fault in wanted}
