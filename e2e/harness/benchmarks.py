"""Runs the benchmarks: functions bench_*(cluster) -> dict in e2e/bench/*.py. Prints the figures and keeps them as JSON.

Run them on an otherwise quiet machine, with one agent and then the other, and compare.
"""

import importlib
import inspect
import json
import time

from e2e.harness import layout
from e2e.harness.cluster import Cluster
from e2e.harness.steps import HarnessError, say, step

BENCHMARKS = layout.E2E / "bench"


def run_benchmarks(names: list[str]) -> None:
    cluster = Cluster.load()
    figures: dict[str, object] = {"agent": cluster.agent.kind, "time": time.strftime("%F %T")}
    for title, bench in _collect(names):
        with step(title):
            figures[title] = bench(cluster)
        for key, value in figures[title].items():
            print(f"    {key:40} {value}", flush=True)
    layout.RESULTS.mkdir(parents=True, exist_ok=True)
    target = layout.RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-bench-{cluster.agent.kind}.json"
    target.write_text(json.dumps(figures, indent=1))
    say(f"kept in {target}")


def _collect(names: list[str]) -> list[tuple[str, object]]:
    found = []
    for path in sorted(BENCHMARKS.glob("*.py")):
        module = importlib.import_module(f"e2e.bench.{path.stem}")
        for title, function in inspect.getmembers(module, inspect.isfunction):
            if title.startswith("bench_") and (not names or path.stem in names or title.removeprefix("bench_") in names):
                found.append((f"{path.stem}:{title.removeprefix('bench_')}", function))
    if not found:
        raise HarnessError(f"no benchmark named {', '.join(names)} in {BENCHMARKS}")
    return found


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
