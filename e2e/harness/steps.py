"""Shows what is being done and how long each step took, and turns expected failures into words."""

import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Iterator


class HarnessError(Exception):
    """Something a person can act on: printed without a traceback."""


class CommandFailed(HarnessError):
    def __init__(self, command: list[str], code: int, output: str) -> None:
        super().__init__(f"{' '.join(command)}: exit {code}\n{output.strip()}")
        self.code = code
        self.output = output


_started = time.monotonic()


@contextmanager
def step(what: str) -> Iterator[None]:
    """Prints `what`, then its time. A step that failed says so and the error goes on."""
    begin = time.monotonic()
    print(f"[{begin - _started:6.1f}s] {what} ...", flush=True)
    try:
        yield
    except BaseException:
        print(f"[{time.monotonic() - _started:6.1f}s] {what}: FAILED after {time.monotonic() - begin:.1f} s", flush=True)
        raise
    print(f"[{time.monotonic() - _started:6.1f}s] {what}: {time.monotonic() - begin:.1f} s", flush=True)


def say(text: str) -> None:
    print(f"[{time.monotonic() - _started:6.1f}s] {text}", flush=True)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def run(command: list[str], *, input: str | None = None, check: bool = True, env: dict | None = None,
        cwd: object = None, timeout: float | None = None) -> str:
    """Runs a command, gives its stdout; a failure carries both outputs."""
    command = [str(word) for word in command]
    done = subprocess.run(command, input=input, capture_output=True, text=True, env=env, cwd=cwd, timeout=timeout,
                          stdin=None if input is not None else subprocess.DEVNULL)
    if check and done.returncode != 0:
        raise CommandFailed(command, done.returncode, done.stderr + done.stdout)
    return done.stdout


def poll(fn, timeout: float, what: str, interval: float = 0.1):
    """Calls `fn` until it gives something truthy. What it raised or gave last is in the error."""
    deadline = time.monotonic() + timeout
    last: object = None
    while True:
        try:
            last = fn()
            if last:
                return last
        except Exception as error:  # what is waited for may well fail until it is there
            last = error
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:.0f} s (last: {last!r:.2000})")
        time.sleep(interval)
