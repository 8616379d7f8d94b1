"""The HTTP server that httpGet hooks ask, on the host. It keeps what was asked and marks the hook as done for the container."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from e2e.differential.plan import POST_START


class HookServer:
    """A context manager. Paths are /<pod>/<container>/<hook>."""

    def __init__(self, host: str, life: Path) -> None:
        self._asked: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        asked, lock = self._asked, self._lock

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name that the base class asks for
                _, pod, container, hook = self.path.split("/", 3)
                with lock:
                    asked.setdefault(pod, []).append(f"{container} {hook} {self.headers.get('User-Agent')}")
                if hook == POST_START:
                    _mark(life / pod, container)
                # The answer is an error: agents look only at whether there is one.
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self.port = self._server.server_address[1]

    def asked(self, pod: str) -> list[str]:
        with self._lock:
            return list(self._asked.get(pod, []))

    def __enter__(self) -> "HookServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _mark(life: Path, container: str) -> None:
    """The newest start of the container is the one that is being hooked, if it has come so far already."""
    number = 0
    while (life / f"{container}.{number}.hooked").exists():
        number += 1
    (life / f"{container}.{number}.hooked").touch()
