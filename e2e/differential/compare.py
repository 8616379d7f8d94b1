"""Compares what two agents showed of the same pods, field by field. Pure.

EXPLAINED is the whole list of differences that are accepted; each names the field, the values and the cause.
"""

import re
from dataclasses import dataclass
from typing import Callable

from e2e.differential.plan import Plan
from e2e.differential.view import view

REFERENCE, OURS = "kubelet", "rkubelet"
ABSENT = "<absent>"
UNLIMITED_ON_CGROUP_V1 = {"limits": {"memory": "9007199254740988Ki"}}


@dataclass(frozen=True)
class Difference:
    pod: str
    path: str  # from the view's top, with " / " between
    theirs: object
    ours: object
    explained: str = ""  # the cause


@dataclass(frozen=True)
class Explanation:
    path: re.Pattern[str]  # of the whole path
    applies: Callable[[str, object, object, Plan], bool]  # path, theirs, ours, the pod's plan
    cause: str


def _meets_its_end(path: str, theirs: object, ours: object, plan: Plan) -> bool:
    """An Unhealthy event that one agent has, of a probe that passes as long as its container runs."""
    match = re.search(r"\{(\S+)\} by kubelet: (Liveness|Readiness|Startup) probe (errored and|failed)", path)
    if not match or ABSENT not in (theirs, ours):
        return False
    return match[3] != "failed" or (match[1], f"{match[2].lower()}Probe") not in plan.meant_to_fail()


EXPLAINED: tuple[Explanation, ...] = (
    Explanation(re.compile("events / Warning Unhealthy .*", re.DOTALL), _meets_its_end,
                "a probe that was under way when its container ended fails or not by chance, on either agent"),
    Explanation(re.compile(r"(at stage|final) / resources"),
                lambda _path, theirs, ours, _plan: theirs == UNLIMITED_ON_CGROUP_V1 and ours in ({}, ABSENT),
                "on cgroup v1 the Go kubelet shows the kernel's number for an unlimited pod as a limit"),
)


def compare(plans: list[Plan], theirs: list[dict], ours: list[dict]) -> list[Difference]:
    """`theirs` and `ours` are the runner's records of these plans."""
    their, our = ({record["number"]: record for record in records} for records in (theirs, ours))
    found = []
    for plan in plans:
        if plan.number not in their or plan.number not in our:
            found.append(Difference(plan.name, "record", plan.number in their, plan.number in our))
            continue
        if (theirs_overdue := their[plan.number]["overdue"]) or our[plan.number]["overdue"]:
            # Even if both are: then the plan is not what a pod does, and nothing was compared at its stage.
            found.append(Difference(plan.name, "overdue", theirs_overdue, our[plan.number]["overdue"]))
        for path, one, other in differences(view(their[plan.number], plan), view(our[plan.number], plan)):
            found.append(Difference(plan.name, path, one, other, explanation(path, one, other, plan)))
    return found


def explanation(path: str, theirs: object, ours: object, plan: Plan) -> str:
    for known in EXPLAINED:
        if known.path.fullmatch(path) and known.applies(path, theirs, ours, plan):
            return known.cause
    return ""


def differences(theirs: object, ours: object, path: str = "") -> list[tuple[str, object, object]]:
    """(path, theirs, ours) of the smallest parts that differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in sorted({*theirs, *ours}):
            inner = f"{path} / {key}" if path else key
            found += differences(theirs.get(key, ABSENT), ours.get(key, ABSENT), inner)
        return found
    return [] if theirs == ours else [(path, theirs, ours)]
