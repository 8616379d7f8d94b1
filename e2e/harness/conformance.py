"""Runs tests of Kubernetes' own e2e suite, and fails unless exactly those listed beforehand ran and passed.

A dry run with the same expressions says what must run; the JUnit report of the real run says what did. There are no
second attempts.
"""

import os
import re
import subprocess
import time
import xml.etree.ElementTree as xml
from pathlib import Path

from e2e.harness import layout, tools
from e2e.harness.cluster import Cluster
from e2e.harness.steps import HarnessError, run, say, step
from e2e.harness.versions import PROGRAMS_FOR_CONFORMANCE

PROGRESS_SECONDS = 30


def run_conformance(list_name: str, focus: str, skip: str, procs: int) -> bool:
    focuses, skips = ([focus], []) if focus else _read_list(list_name)
    if skip:
        skips.append(skip)
    for expression in [*focuses, *skips]:
        re.compile(expression)
    tools.build(PROGRAMS_FOR_CONFORMANCE)
    cluster = Cluster.load()
    title = "focus" if focus else list_name
    result = layout.RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{title}-{cluster.agent.kind}"
    result.mkdir(parents=True)
    with step("listing the tests (dry run)"):
        listed = _list_tests(focuses, skips, result)
    if not listed:
        raise HarnessError("no test matches")
    with step(f"running {len(listed)} tests in {procs} processes on {cluster.agent.kind}"):
        _run_tests(focuses, skips, procs, result, len(listed))
    return _judge(listed, result)


def _read_list(name: str) -> tuple[list[str], list[str]]:
    path = layout.E2E / "conformance" / f"{name}.txt"
    if not path.exists():
        raise HarnessError(f"no list {path}")
    # Only the newline goes: a space at the end belongs to the expression.
    lines = [line for line in path.read_text().split("\n") if line.strip() and not line.startswith("#")]
    skips = [line.removeprefix("skip:").strip() for line in lines if line.startswith("skip:")]
    return [line for line in lines if not line.startswith("skip:")], skips


def _suite_arguments() -> list[str]:
    return ["--provider=local", f"--kubeconfig={layout.ADMIN_KUBECONFIG}", f"--kubectl-path={tools.path('kubectl')}"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": layout.path_with_programs(), "KUBECONFIG": str(layout.ADMIN_KUBECONFIG)}


def _list_tests(focuses: list[str], skips: list[str], result: Path) -> set[str]:
    report = result / "dry-run.xml"
    command = [tools.path("e2e.test"), "--ginkgo.dry-run", f"--ginkgo.junit-report={report}", "--ginkgo.succinct",
               *[f"--ginkgo.focus={expression}" for expression in focuses],
               *[f"--ginkgo.skip={expression}" for expression in skips], *_suite_arguments()]
    run(command, env=_environment(), cwd=result)
    names = {name for name, status in _tests(report) if status == "passed"}
    (result / "listed.txt").write_text("\n".join(sorted(names)) + "\n")
    return names


def _run_tests(focuses: list[str], skips: list[str], procs: int, result: Path, total: int) -> None:
    command = [tools.path("ginkgo"), f"--procs={procs}", "--timeout=4h", "--no-color", "-v", "--junit-report=junit.xml",
               f"--output-dir={result}", *[f"--focus={expression}" for expression in focuses],
               *[f"--skip={expression}" for expression in skips], tools.path("e2e.test"), "--", *_suite_arguments()]
    say(f"output: {result}/output.log")
    with open(result / "output.log", "w") as log:
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(), cwd=result)
        try:
            while True:
                try:
                    running.wait(PROGRESS_SECONDS)
                    return
                except subprocess.TimeoutExpired:
                    text = (result / "output.log").read_text(errors="replace")
                    ended = re.findall(r"^(?:[SP]*)• .*$", text, re.MULTILINE)
                    failed = sum("FAIL" in line or "TIMEDOUT" in line or "PANIC" in line for line in ended)
                    say(f"{len(ended)} of {total} done, {failed} failed")
        except BaseException:
            running.terminate()  # ginkgo cleans up after its tests
            running.wait(60)
            raise


def _tests(report: Path) -> list[tuple[str, str]]:
    """Name and status of each test, without the kind before and the list of labels after the name."""
    root = xml.parse(report).getroot()
    return [(re.sub(r"^\[It\] | \[[^]]*\]$", "", case.get("name", "")), case.get("status", ""))
            for case in root.iter("testcase") if case.get("name", "").startswith("[It]")]


def _judge(listed: set[str], result: Path) -> bool:
    report = result / "junit.xml"
    if not report.exists():
        raise HarnessError(f"the run left no report; see the end of {result}/output.log")
    # A test that skips itself at run time has status `skipped`, like all that were never asked for.
    outcome = {name: status for name, status in _tests(report) if status != "skipped" or name in listed}
    passed = {name for name, status in outcome.items() if status == "passed"}
    ran = {name for name, status in outcome.items() if status != "skipped"}
    for name in sorted(ran - passed):
        print(f"FAILED   {name}  ({outcome[name]})")
    for name in sorted(listed - ran):
        print(f"NOT RUN  {name}")
    for name in sorted(ran - listed):
        print(f"UNASKED  {name}")
    print(f"{len(listed)} listed, {len(ran)} run, {len(passed)} passed, {len(ran - passed)} failed; report: {report}")
    return passed == ran == listed
