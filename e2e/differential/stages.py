"""Whether a pod, as the API server shows it, is in the state that a stage asks for. Pure."""

from typing import Callable

from e2e.differential.plan import RUNNING, Expected, Stage


def reached(stage: Stage, pod: dict, events: set[tuple[str, str]], marks: Callable[[str], bool]) -> bool:
    return not missing(stage, pod, events, marks)


def missing(stage: Stage, pod: dict, events: set[tuple[str, str]], marks: Callable[[str], bool]) -> list[str]:
    """What is not yet as the stage asks; `events` are the (reason, container) seen of this pod, `marks` says whether it made a mark."""
    status = pod.get("status", {})
    wrong = []
    if stage.phase and status.get("phase") not in stage.phase.split("|"):
        wrong.append(f"phase is {status.get('phase')}, not {stage.phase}")
    if stage.reason and status.get("reason") != stage.reason:
        wrong.append(f"reason is {status.get('reason')}, not {stage.reason}")
    if stage.sandbox_gone and condition(pod, "PodReadyToStartContainers") != "False":
        wrong.append("the sandbox is not gone")
    statuses = {container["name"]: container for container in container_statuses(pod)}
    for name, expected in stage.containers.items():
        wrong += [f"{name}: {text}" for text in _container(expected, statuses.get(name))]
        if expected.state == RUNNING and expected.restarts is not None and not marks(f"{name}.{expected.restarts}.up"):
            wrong.append(f"{name}: its script has not come so far that it can take a signal")
    wrong += [f"no event {reason} of {container}" for reason, container in stage.events if (reason, container) not in events]
    if stage.mark and not marks(stage.mark):
        wrong.append(f"no mark {stage.mark}")
    return wrong


def condition(pod: dict, type_: str) -> str | None:
    return next((c["status"] for c in pod.get("status", {}).get("conditions", []) if c["type"] == type_), None)


def container_statuses(pod: dict) -> list[dict]:
    status = pod.get("status", {})
    return status.get("initContainerStatuses", []) + status.get("containerStatuses", [])


def _container(expected: Expected, status: dict | None) -> list[str]:
    if status is None:
        return ["no status"]
    wrong = []
    state = next(iter(status.get("state", {})), "waiting")
    if state != expected.state:
        wrong.append(f"{state}, not {expected.state}")
    reason = status.get("state", {}).get(state, {}).get("reason")
    if expected.reason is not None and reason != expected.reason:
        wrong.append(f"reason {reason}, not {expected.reason}")
    for field, wanted in (("restartCount", expected.restarts), ("ready", expected.ready), ("started", expected.started)):
        if wanted is not None and status.get(field) != wanted:
            wrong.append(f"{field} is {status.get(field)}, not {wanted}")
    return wrong
