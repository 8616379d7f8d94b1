"""Keeps the log files of pods although agents remove them: each is opened as soon as it is there."""

import re
import threading
from pathlib import Path
from typing import BinaryIO

_LINE = re.compile(rb"^\S+ (stdout|stderr) ([FP]) (.*)$")
EVERY_SECONDS = 0.05


class LogCollector:
    """A context manager; it looks at the pods of one namespace."""

    def __init__(self, pod_logs: Path, container_logs: Path, namespace: str) -> None:
        self._pod_logs, self._links, self._namespace = pod_logs, container_logs, namespace
        self._open: dict[str, dict[str, BinaryIO]] = {}  # folder of a pod -> file in it -> opened
        self._linked: set[str] = set()  # targets of the symlinks in /var/log/containers
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "LogCollector":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.look()

    def look(self) -> None:
        with self._lock:
            for folder in self._pod_logs.glob(f"{self._namespace}_*"):
                files = self._open.setdefault(folder.name, {})
                for path in _files(folder):
                    name = str(path.relative_to(folder))
                    if name not in files:
                        try:
                            files[name] = path.open("rb")
                        except FileNotFoundError:  # it went between the look and the opening
                            pass
            for link in self._links.glob(f"*_{self._namespace}_*.log"):
                try:
                    self._linked.add(str(link.readlink()))
                except FileNotFoundError:
                    pass

    def take(self, pod: str, uid: str) -> dict[str, dict]:
        """Every log file that the pod has had, by its name below the pod's folder; what they hold is read now."""
        self.look()
        folder = f"{self._namespace}_{pod}_{uid}"
        with self._lock:
            files = self._open.pop(folder, {})
            taken = {}
            for name, opened in sorted(files.items()):
                with opened:
                    taken[name] = {**_lines(opened.read()), "linked": str(self._pod_logs / folder / name) in self._linked}
        return taken


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.glob("*/*"))
    except FileNotFoundError:  # a folder went during the look; the next one is soon
        return []


def _lines(content: bytes) -> dict[str, list[str]]:
    """Each stream's lines; the order between the streams is the runtime's business. A line that is none is kept under `bad`."""
    streams: dict[str, list[str]] = {"stdout": [], "stderr": []}
    for line in content.splitlines():
        match = _LINE.match(line)
        stream, tag, text = (part.decode(errors="replace") for part in match.groups()) if match else ("bad", "F", repr(line))
        streams.setdefault(stream, []).append(text if tag == "F" else f"{text}<partial>")
    return streams
