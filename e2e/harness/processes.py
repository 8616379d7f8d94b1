"""Starts and stops our long-running processes.

A pid file holds the pid and the start time of the process from /proc, so a pid that was used again for something else
is never taken for ours, and never killed. Every process carries MARKER in its environment, by which `cleanup` finds
what has lost its pid file.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from e2e.harness import layout
from e2e.harness.steps import HarnessError, poll

MARKER = "RKUBELET_E2E_PROCESS"
_TICKS = os.sysconf("SC_CLK_TCK")
_children: dict[int, subprocess.Popen] = {}


def start_time(pid: int) -> str | None:
    """The start time of a process that runs; None when there is none, or only a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, from `state` on."""
    if child := _children.get(pid):
        child.poll()
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def terminate(pid: int, started: str, timeout: float = 20) -> None:
    """SIGTERM, then SIGKILL, for this very process."""
    for sig, patience in ((signal.SIGTERM, timeout), (signal.SIGKILL, 10)):
        if start_time(pid) != started:
            return
        try:
            os.kill(pid, sig)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if start_time(pid) != started:
                return
            time.sleep(0.02)
    raise HarnessError(f"pid {pid} does not die")


@dataclass
class Service:
    """One process of the cluster."""

    name: str
    command: Callable[[], list[str]]
    ready: Callable[[], object] | None = None  # truthy when it serves
    environment: dict[str, str] = field(default_factory=dict)
    ready_timeout: float = 60

    @property
    def log_path(self) -> Path:
        return layout.LOGS / f"{self.name}.log"

    @property
    def pid_file(self) -> Path:
        return layout.PID_FILES / f"{self.name}.json"

    def _record(self) -> dict | None:
        try:
            return json.loads(self.pid_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def alive(self) -> bool:
        record = self._record()
        return record is not None and record["start"] is not None and start_time(record["pid"]) == record["start"]

    def pid(self) -> int:
        if not self.alive():
            raise HarnessError(f"{self.name} is not running (its log: {self.log_path})")
        return self._record()["pid"]

    def same_command(self) -> bool:
        """Whether what runs is what would be started now: same arguments, and the same file at that path."""
        record = self._record()
        if not self.alive() or record["command"] != [str(word) for word in self.command()]:
            return False
        return not os.readlink(f"/proc/{record['pid']}/exe").endswith("(deleted)")

    def start(self) -> None:
        if self.alive():
            return
        self.spawn([str(word) for word in self.command()], self.environment)
        if self.ready is not None:
            self.wait_ready()

    def spawn(self, command: list[str], environment: dict[str, str]) -> None:
        for folder in (layout.PID_FILES, layout.LOGS):
            folder.mkdir(parents=True, exist_ok=True)
        env = {"PATH": layout.path_with_programs(), "HOME": "/root", MARKER: self.name, **environment}
        with open(self.log_path, "ab") as log:
            log.write(f"==== {time.strftime('%F %T')} {' '.join(command)}\n".encode())
            log.flush()
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                     start_new_session=True, cwd="/")
        _children[child.pid] = child
        record = {"pid": child.pid, "start": start_time(child.pid), "command": command}
        partial = self.pid_file.with_suffix(".tmp")
        partial.write_text(json.dumps(record))
        partial.rename(self.pid_file)

    def wait_ready(self, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or self.ready_timeout)
        last: object = None
        while True:
            if not self.alive():
                raise HarnessError(f"{self.name} has ended. The end of {self.log_path}:\n{self.log_tail()}")
            try:
                last = self.ready()
                if last:
                    return
            except (OSError, HarnessError) as error:  # refused connections and the like, until it serves
                last = error
            if time.monotonic() > deadline:
                raise HarnessError(f"{self.name} is not ready (last: {last!r}). The end of {self.log_path}:\n{self.log_tail()}")
            time.sleep(0.05)

    def log_tail(self, lines: int = 15) -> str:
        if not self.log_path.exists():
            return "(no log)"
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, timeout: float = 20) -> None:
        if record := self._record():
            terminate(record["pid"], record["start"], timeout)
        self.pid_file.unlink(missing_ok=True)

    def kill9(self) -> None:
        pid, started = self.pid(), self._record()["start"]
        os.kill(pid, signal.SIGKILL)
        poll(lambda: start_time(pid) != started, 10, f"{self.name} is dead", interval=0.005)
        self.pid_file.unlink(missing_ok=True)

    def restart(self) -> None:
        self.stop()
        self.start()

    def rss_kib(self) -> int:
        for line in Path(f"/proc/{self.pid()}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise HarnessError(f"{self.name}: no VmRSS")

    def cpu_seconds(self) -> float:
        """User and system time, with that of children it has waited for."""
        fields = _stat(self.pid())
        return sum(int(value) for value in fields[11:15]) / _TICKS


def rotate_logs() -> None:
    """Keeps the logs of the run before in logs.old."""
    old = layout.LOGS.with_name("logs.old")
    shutil.rmtree(old, ignore_errors=True)
    if layout.LOGS.exists():
        layout.LOGS.rename(old)
