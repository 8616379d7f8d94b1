"""Runs the e2e cases: functions test_*(cluster) in e2e/cases/test_*.py, in order, a line for each with its time.

Those of the VM node are in e2e/vm_cases and get a VmCluster.
"""

import importlib
import inspect
import time
import traceback
from typing import Callable

from e2e.harness import layout
from e2e.harness.cluster import Cluster
from e2e.harness.steps import HarnessError
from e2e.harness.vm import VmCluster

CASES = "cases"
VM_CASES = "vm_cases"


def collect(names: list[str], kind: str = CASES) -> list[tuple[str, Callable]]:
    """`topic` is a file in the folder `kind`, `topic:test_name` one function of it; nothing is all."""
    folder = layout.E2E / kind
    wanted = names or sorted(path.stem.removeprefix("test_") for path in folder.glob("test_*.py"))
    found = []
    for name in wanted:
        topic, _, only = name.removeprefix("test_").partition(":")
        if not (folder / f"test_{topic}.py").exists():
            raise HarnessError(f"no case file {folder}/test_{topic}.py")
        module = importlib.import_module(f"e2e.{kind}.test_{topic}")
        functions = [(f"{topic}:{title}", fn) for title, fn in inspect.getmembers(module, inspect.isfunction)
                     if title.startswith("test_") and fn.__module__ == module.__name__ and only in ("", title)]
        if not functions:
            raise HarnessError(f"no case named {name}")
        found += sorted(functions, key=lambda item: item[1].__code__.co_firstlineno)
    return found


def run_cases(names: list[str]) -> bool:
    return _run(collect(names), Cluster.load(), _mend)


def run_vm_cases(names: list[str]) -> bool:
    return _run(collect(names, VM_CASES), VmCluster.load(), _mend_vm)


def _run(cases: list[tuple[str, Callable]], cluster: Cluster, mend: Callable[[Cluster], None]) -> bool:
    print(f"{len(cases)} cases, agent {cluster.agent.kind}")
    failed = []
    for title, case in cases:
        begin = time.monotonic()
        try:
            case(cluster)
            verdict = "ok"
        except KeyboardInterrupt:
            raise
        except BaseException:  # a case may fail in any way; the next one runs all the same
            verdict = "FAILED"
            failed.append(title)
            trouble = traceback.format_exc()
        print(f"{verdict:6} {time.monotonic() - begin:7.1f} s  {title}", flush=True)
        if verdict == "FAILED":
            print("    " + trouble.strip().replace("\n", "\n    "), flush=True)
        mend(cluster)
    if failed:
        print("failed: " + ", ".join(failed) + f"   (agent's log: {cluster.agent.log_path})")
    print(f"{len(cases) - len(failed)} passed, {len(failed)} failed")
    return not failed


def _mend(cluster: Cluster) -> None:
    """A case that broke off in the middle must not fail those after it: start what it stopped."""
    for service in (cluster.etcd, cluster.apiserver, cluster.containerd, cluster.controller_manager, cluster.scheduler,
                    cluster.kube_proxy, cluster.agent):
        if not service.alive():
            print(f"       {getattr(service, 'name', 'agent')} does not run after this case: starting it")
            service.start()
    _wait_node(cluster)


def _mend_vm(cluster: VmCluster) -> None:
    if not cluster.agent.alive():
        print(f"       {cluster.agent.unit} is not active after this case: starting it")
        cluster.agent.start()
    _wait_node(cluster)


def _wait_node(cluster: Cluster) -> None:
    try:
        cluster.wait_node_ready(60)
    except TimeoutError as error:
        print(f"       {error}")
