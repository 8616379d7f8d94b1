"""The verb `differential`: runs the pods on the agents of AGENTS in turn, compares, reports; with FAULT, shows that faults are caught.

AGAINST names the folder of an earlier run: an agent that is not in AGENTS is taken from there.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from e2e.differential import faults, render
from e2e.differential.compare import OURS, REFERENCE, Difference, compare
from e2e.differential.generate import plans as generate
from e2e.differential.plan import Plan
from e2e.harness import agent, layout
from e2e.harness.steps import HarnessError, say, step

PODS, SEED = 200, 1
PODS_PER_FAULT = {"all": 2, "one": 8}
FAULT_PATIENCE = 45  # seconds: a pod with a fault may never come to its stage
SHOWN = 60  # differences on the terminal; all are in the report


def run_differential(dry: bool) -> bool:
    count, seed, fault = _number("PODS", PODS), _number("SEED", SEED), os.environ.get("FAULT", "")
    plans = generate(seed, count)
    if numbers := os.environ.get("ONLY"):
        plans = [plans[int(number)] for number in numbers.split(",")]
    if dry:
        return _show(plans)
    if fault:
        return _faults(plans, seed, fault)
    folder = _folder()
    records = _records(plans, seed, folder)
    if len(records) < 2:
        say(f"only {', '.join(records)}: nothing to compare with; kept in {folder}")
        return not any(record["overdue"] for record in next(iter(records.values())))
    found = compare(plans, records[REFERENCE], records[OURS])
    _report(folder, plans, seed, records, found)
    return not any(not difference.explained for difference in found)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise HarnessError(f"{name}={text}: a number is needed")
    return int(text)


def _folder() -> Path:
    folder = layout.RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-differential"
    folder.mkdir(parents=True)
    return folder


def _agents() -> list[str]:
    kinds = (os.environ.get("AGENTS") or f"{REFERENCE},{OURS}").split(",")
    if unknown := set(kinds) - set(agent.KINDS):
        raise HarnessError(f"AGENTS={','.join(kinds)}: no such agent: {', '.join(unknown)}")
    return kinds


def _records(plans: list[Plan], seed: int, folder: Path) -> dict[str, list[dict]]:
    """By agent: from running them now, or from AGAINST."""
    kinds, against = _agents(), os.environ.get("AGAINST")
    records = {kind: _read(Path(against), kind, seed, plans) for kind in agent.KINDS if against and kind not in kinds}
    with _Agents() as cluster:
        for kind in kinds:
            records[kind] = _run(cluster, kind, plans)
            _write(folder, kind, seed, plans, records[kind])
    return records


class _Agents:
    """The cluster; the agent that was there comes back at the end."""

    def __enter__(self):
        from e2e.harness.cluster import Cluster

        self._cluster = Cluster.load()
        self._before = self._cluster.agent.kind
        return self._cluster

    def __exit__(self, *_: object) -> None:
        self._cluster.agent.switch(self._before)


def _run(cluster, kind: str, plans: list[Plan], **options) -> list[dict]:
    from e2e.differential import runner

    agent.build(kind)
    with step(f"{len(plans)} pods on {kind}"):
        return runner.run(cluster, kind, plans, **options)


def _digest(plans: list[Plan]) -> str:
    """Of the pods themselves: records of other pods must not be compared with these."""
    site = render.Site("namespace", "node", "image", Path("/life"), "host", 1)
    text = json.dumps([render.manifest(plan, site) for plan in plans], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(folder: Path, kind: str, seed: int, plans: list[Plan], records: list[dict]) -> None:
    content = {"agent": kind, "seed": seed, "pods": {plan.number: _digest([plan]) for plan in plans}, "records": records}
    (folder / f"{kind}.json").write_text(json.dumps(content, indent=1))


def _read(folder: Path, kind: str, seed: int, plans: list[Plan]) -> list[dict]:
    path = folder / f"{kind}.json"
    if not path.exists():
        raise HarnessError(f"AGAINST={folder}: there is no {path.name}")
    content = json.loads(path.read_text())
    if other := [plan.name for plan in plans if content["seed"] != seed or content["pods"].get(str(plan.number)) != _digest([plan])]:
        raise HarnessError(f"AGAINST={folder}: it has other pods under the names {', '.join(other[:5])} …")
    numbers = {plan.number for plan in plans}
    return [record for record in content["records"] if record["number"] in numbers]


# The report


def _report(folder: Path, plans: list[Plan], seed: int, records: dict[str, list[dict]], found: list[Difference]) -> None:
    unexplained = [difference for difference in found if not difference.explained]
    lines = [f"# Differential run, {time.strftime('%F %T')}", "", *_summary(plans, seed, found), ""]
    lines += _explained(found)
    specs = {record["name"]: record["spec"] for record in records[OURS]}
    for plan in plans:
        if here := [difference for difference in unexplained if difference.pod == plan.name]:
            lines += [f"## {plan.name}: {plan.kind}, restartPolicy {plan.policy} (SEED={seed} ONLY={plan.number})", "", *_as_lines(here), "",
                      "```json", json.dumps(specs.get(plan.name), indent=1), "```", ""]
    (folder / "report.md").write_text("\n".join(lines))
    (folder / "differences.json").write_text(json.dumps([vars(difference) for difference in found], indent=1, default=str))
    for line in [*_summary(plans, seed, found), *_as_lines(unexplained, with_pod=True)[:SHOWN]]:
        print(line, flush=True)
    say(f"kept in {folder}")


def _summary(plans: list[Plan], seed: int, found: list[Difference]) -> list[str]:
    differing = {difference.pod for difference in found}
    unexplained = [difference for difference in found if not difference.explained]
    return [f"SEED={seed}: {len(plans)} pods, {len(plans) - len(differing)} equal in every field, "
            f"{len(differing - {d.pod for d in unexplained})} equal but for explained differences, "
            f"{len({d.pod for d in unexplained})} not equal ({len(unexplained)} differences)"]


def _explained(found: list[Difference]) -> list[str]:
    causes: dict[str, set[str]] = {}
    for difference in found:
        if difference.explained:
            causes.setdefault(difference.explained, set()).add(difference.pod)
    return [f"* explained, {len(pods)} pods ({', '.join(sorted(pods)[:6])}): {cause}" for cause, pods in causes.items()] + [""]


def _as_lines(found: list[Difference], with_pod: bool = False) -> list[str]:
    return [f"* {difference.pod + ': ' if with_pod else ''}{difference.path}\n"
            f"    {REFERENCE:9} {json.dumps(difference.theirs)}\n    {OURS:9} {json.dumps(difference.ours)}" for difference in found]


# Faults


def _faults(plans: list[Plan], seed: int, wanted: str) -> bool:
    """Runs pods with faults on our agent; every fault must be noticed. Without AGAINST the reference runs the same pods first."""
    if wanted != "all" and wanted not in faults.FAULTS:
        raise HarnessError(f"FAULT={wanted}: it is all or one of {', '.join(faults.FAULTS)}")
    kinds = list(faults.FAULTS) if wanted == "all" else [wanted]
    chosen = faults.choose(plans, kinds, PODS_PER_FAULT["all" if wanted == "all" else "one"])
    if without := [fault for fault, pods in chosen.items() if not pods]:
        raise HarnessError(f"no pod shows {', '.join(without)}: more PODS or another SEED is needed")
    fault_of = {plan.number: fault for fault, pods in chosen.items() for plan in pods}
    victims = [plan for plan in plans if plan.number in fault_of]
    against = os.environ.get("AGAINST")
    with _Agents() as cluster:
        theirs = _read(Path(against), REFERENCE, seed, victims) if against else _run(cluster, REFERENCE, victims)
        ours = _run(cluster, OURS, victims, patience=FAULT_PATIENCE,
                    change=lambda plan, manifest: faults.inject(fault_of[plan.number], manifest))
    folder = _folder()
    _write(folder, OURS, seed, victims, ours)
    found = [difference for difference in compare(victims, theirs, ours) if not difference.explained]
    caught_all = True
    for fault, pods in chosen.items():
        caught = {difference.pod for difference in found} & {plan.name for plan in pods}
        caught_all &= bool(caught)
        example = next((f"{d.pod}: {d.path}: {d.theirs!r:.60} / {d.ours!r:.60}" for d in found if d.pod in caught), "")
        print(f"{'caught' if caught else 'MISSED':7} {fault:16} in {len(caught)} of {len(pods)} pods   {example}", flush=True)
    (folder / "differences.json").write_text(json.dumps([vars(difference) for difference in found], indent=1, default=str))
    say(f"kept in {folder}")
    return caught_all


def _show(plans: list[Plan]) -> bool:
    """Of a dry run: each pod in a line, and where it is deleted."""
    for plan in plans:
        containers = "; ".join(f"{container.name} {','.join(run.kind + (str(run.code) if run.code else '') for run in container.runs)}"
                               for container in plan.containers)
        print(f"{plan.name} {plan.kind:15} {plan.policy:9} {containers}")
    return True
