"""Runs the benchmarks of e2e/bench in one go and prints one table: the bare runtime, then each agent of AGENTS.

A module of e2e/bench has `measure_runtime(cluster) -> Figures` or `measure_agent(cluster) -> Figures` or both; figures with
the same title stand in the same row. The agents are swapped on the running cluster; the one that was there comes back.
Run it on an otherwise quiet machine: the load at the start and at the end is in the table's heading.
"""

import importlib
import json
import os
import time
from pathlib import Path
from types import ModuleType

from e2e.harness import agent, layout
from e2e.harness.cluster import Cluster
from e2e.harness.steps import HarnessError, say, step

BENCHMARKS = layout.E2E / "bench"
RUNTIME = "bare runtime"
Figures = dict[str, float]


def run_benchmarks(names: list[str]) -> None:
    cluster = Cluster.load()
    kinds = _wanted_agents()
    modules = _modules(names)
    for kind in kinds:
        agent.build(kind)
    before, begin, load = cluster.agent.kind, time.monotonic(), os.getloadavg()[0]
    columns: dict[str, Figures] = {RUNTIME: {}}
    try:
        for module in _having(modules, "measure_runtime"):
            with step(f"{RUNTIME}: {module.__name__.rpartition('.')[2]}"):
                columns[RUNTIME] |= module.measure_runtime(cluster)
        for kind in kinds:
            columns[kind] = {}
            for module in _having(modules, "measure_agent"):
                with step(f"{kind}: {module.__name__.rpartition('.')[2]}"):
                    cluster.agent.switch(kind)
                    cluster.wait_node_ready(90)
                    columns[kind] |= module.measure_agent(cluster)
    finally:
        if cluster.agent.kind != before or not cluster.agent.alive():
            cluster.agent.switch(before)
    heading = (f"{time.strftime('%F %T')}, {os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} after, "
               f"{time.monotonic() - begin:.0f} s in all")
    _keep(heading, columns)


def _wanted_agents() -> list[str]:
    kinds = (os.environ.get("AGENTS") or ",".join(reversed(agent.KINDS))).split(",")
    if unknown := set(kinds) - set(agent.KINDS):
        raise HarnessError(f"AGENTS={','.join(kinds)}: no such agent: {', '.join(unknown)}")
    return kinds


def _modules(names: list[str]) -> list[ModuleType]:
    found = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if not names or path.stem in names]
    if missing := set(names) - set(found):
        raise HarnessError(f"no benchmark named {', '.join(missing)} in {BENCHMARKS}")
    return [importlib.import_module(f"e2e.bench.{name}") for name in found]


def _having(modules: list[ModuleType], function: str) -> list[ModuleType]:
    return [module for module in modules if hasattr(module, function)]


def _keep(heading: str, columns: dict[str, Figures]) -> None:
    table = f"{heading}\n\n{as_markdown(columns)}"
    print(f"\n{table}", flush=True)
    folder = layout.RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-bench"
    folder.mkdir(parents=True)
    (folder / "table.md").write_text(table)
    (folder / "figures.json").write_text(json.dumps({"heading": heading, **columns}, indent=1))
    say(f"kept in {folder}")


def as_markdown(columns: dict[str, Figures]) -> str:
    """A row for each figure; beside the figures what each agent adds to the runtime, and rkubelet's share of the kubelet's."""
    agents = [kind for kind in columns if kind != RUNTIME]
    both = set(agents) == set(agent.KINDS)
    heads = ["figure", *columns, *(f"{kind} − runtime" for kind in agents), *(["rkubelet / kubelet"] if both else [])]
    rows = []
    for title in dict.fromkeys(title for figures in columns.values() for title in figures):
        bare = columns[RUNTIME].get(title)
        values = [columns[kind].get(title) for kind in agents]
        overheads = [None if bare is None or value is None else value - bare for value in values]
        rows.append([title, _number(bare), *map(_number, values), *map(_number, overheads)])
        if both:
            ours, theirs = columns["rkubelet"].get(title), columns["kubelet"].get(title)
            rows[-1].append("" if ours is None or not theirs else f"{ours / theirs:.2f}")
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if column == 0 else ":") for column, width in enumerate(widths)) + "|"
    return "\n".join([line(heads), rule, *map(line, rows)]) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def spread(title: str, seconds: list[float]) -> Figures:
    """Median and 90th percentile, in milliseconds."""
    return {f"{title}, p50, ms": percentile(seconds, 0.5) * 1000, f"{title}, p90, ms": percentile(seconds, 0.9) * 1000}
