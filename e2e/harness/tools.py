"""Builds programs from the pinned Go modules below e2e/tools into a cache outside the clone, each as a step of its own."""

import hashlib
import os
from pathlib import Path

from e2e.harness import layout
from e2e.harness.steps import HarnessError, run, say, step
from e2e.harness.versions import PROGRAMS, Program


def location(name: str) -> Path:
    """Where the program is once it is built. A new version is another folder, so nothing stale is ever used."""
    program = PROGRAMS[name]
    key = f"{program.family}-{program.version}"
    own_sources = sorted((layout.E2E / "tools" / program.family).glob("*.go"))
    if own_sources:  # ours, so it changes without a new version
        key += "-" + hashlib.sha256(b"".join(path.read_bytes() for path in own_sources)).hexdigest()[:8]
    return layout.PROGRAM_CACHE / key / name


def path(name: str) -> str:
    """For a command line."""
    built = location(name)
    if not built.exists():
        raise HarnessError(f"{name} is not built yet: run `make up` (or the verb that needs it) first")
    return str(built)


def build(names: list[str]) -> None:
    missing = [name for name in names if not location(name).exists()]
    if missing:
        say(f"to build from Go modules: {', '.join(missing)}")
    for position, name in enumerate(missing, 1):
        with step(f"building {name} {PROGRAMS[name].version} ({position} of {len(missing)})"):
            _build(PROGRAMS[name])


def _build(program: Program) -> None:
    module = layout.E2E / "tools" / program.family
    _check_pin(program, module)
    target = location(program.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{program.name}.{os.getpid()}.tmp")
    verb = ["test", "-c"] if program.is_test else ["build"]
    command = ["go", *verb, "-trimpath", "-ldflags", program.ldflags, "-o", str(partial)]
    if program.tags:
        command += ["-tags", program.tags]
    environment = {**os.environ, "CGO_ENABLED": "1" if program.cgo else "0", "GOFLAGS": "-mod=readonly",
                   "GOTOOLCHAIN": "local", "GOWORK": "off"}
    try:
        run(["nice", "-n", "5", *command, program.package], cwd=module, env=environment)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _check_pin(program: Program, module: Path) -> None:
    """versions.py names the version in the cache's key, go.mod decides what is built: they must agree."""
    lines = (module / "go.mod").read_text().splitlines()
    if not any(program.version in line.split() for line in lines):
        raise HarnessError(f"{module}/go.mod does not require {program.version}, which versions.py pins for {program.name}")
