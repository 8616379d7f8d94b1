"""Runs the benchmarks of e2e/bench in one go and prints one table: the bare runtime, then each agent of AGENTS.

A module of e2e/bench has `measure_runtime(cluster) -> Figures` or `measure_agent(cluster) -> Figures` or both; figures with
the same title stand in the same row. The agents are swapped on the running cluster; the one that was there comes back.
Run it on an otherwise quiet machine: the load at the start and at the end is in the table's heading.
"""

import importlib
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Iterator

from e2e.harness import agent, layout
from e2e.harness.cluster import Cluster
from e2e.harness.steps import HarnessError, say, step

BENCHMARKS = layout.E2E / "bench"
RUNTIME = "bare runtime"
Figures = dict[str, float]


def run_benchmarks(names: list[str]) -> None:
    cluster = Cluster.load()
    kinds = wanted_agents(",".join(reversed(agent.KINDS)))
    modules = _modules(names)
    for kind in kinds:
        agent.build(kind)
    heading = Heading()
    columns: dict[str, Figures] = {RUNTIME: {}}
    with same_agent_afterwards(cluster):
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
    keep("bench", heading.text(), columns)


class Heading:
    """Begins where it is made; `text` is for the end."""

    def __init__(self) -> None:
        self._begin, self._load = time.monotonic(), os.getloadavg()[0]

    def text(self) -> str:
        return (f"{time.strftime('%F %T')}, {os.cpu_count()} cores, load {self._load:.1f} before and {os.getloadavg()[0]:.1f} "
                f"after, {time.monotonic() - self._begin:.0f} s in all")


@contextmanager
def same_agent_afterwards(cluster: Cluster) -> Iterator[None]:
    before = cluster.agent.kind
    try:
        yield
    finally:
        if cluster.agent.kind != before or not cluster.agent.alive():
            cluster.agent.switch(before)


def wanted_agents(default: str) -> list[str]:
    kinds = (os.environ.get("AGENTS") or default).split(",")
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


def keep(name: str, heading: str, columns: dict[str, Figures], details: dict | None = None) -> None:
    """Prints the table and keeps it, with all figures and what they come from."""
    table = f"{heading}\n\n{as_markdown(columns)}"
    print(f"\n{table}", flush=True)
    folder = layout.RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    folder.mkdir(parents=True)
    (folder / "table.md").write_text(table)
    (folder / "figures.json").write_text(json.dumps({"heading": heading, **columns, **(details or {})}, indent=1))
    say(f"kept in {folder}")


def as_markdown(columns: dict[str, Figures]) -> str:
    """A row for each figure; beside the figures what each agent adds to the runtime, and rkubelet's share of the kubelet's."""
    agents = [kind for kind in columns if kind != RUNTIME]
    both = set(agents) == set(agent.KINDS)
    with_runtime = RUNTIME in columns
    heads = ["figure", *columns, *(f"{kind} − runtime" for kind in agents if with_runtime),
             *(["rkubelet / kubelet"] if both else [])]
    rows = []
    for title in dict.fromkeys(title for figures in columns.values() for title in figures):
        rows.append([title, *(_number(figures.get(title)) for figures in columns.values())])
        if with_runtime:
            bare, values = columns[RUNTIME].get(title), [columns[kind].get(title) for kind in agents]
            rows[-1] += [_number(None if bare is None or value is None else value - bare) for value in values]
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
