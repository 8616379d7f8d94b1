"""A direct client of the API server: http.client over TLS, keep-alive, the admin's client certificate.

kubectl costs 50 ms and more per call; benchmarks and tight waits go through this.
"""

import base64
import http.client
import json
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator
from urllib.parse import urlencode

from e2e.harness import layout

# kind, in the plural as in URLs -> (API prefix, whether it is in a namespace)
RESOURCES: dict[str, tuple[str, bool]] = {
    **{kind: ("/api/v1", True) for kind in (
        "pods", "configmaps", "secrets", "services", "serviceaccounts", "events", "persistentvolumeclaims",
        "resourcequotas", "limitranges", "endpoints", "replicationcontrollers", "podtemplates")},
    **{kind: ("/api/v1", False) for kind in ("nodes", "namespaces", "persistentvolumes")},
    **{kind: ("/apis/apps/v1", True) for kind in ("deployments", "daemonsets", "replicasets", "statefulsets")},
    **{kind: ("/apis/batch/v1", True) for kind in ("jobs", "cronjobs")},
    **{kind: ("/apis/rbac.authorization.k8s.io/v1", True) for kind in ("roles", "rolebindings")},
    **{kind: ("/apis/rbac.authorization.k8s.io/v1", False) for kind in ("clusterroles", "clusterrolebindings")},
    **{kind: ("/apis/storage.k8s.io/v1", False) for kind in (
        "storageclasses", "csidrivers", "csinodes", "volumeattachments")},
    "leases": ("/apis/coordination.k8s.io/v1", True),
    "runtimeclasses": ("/apis/node.k8s.io/v1", False),
    "priorityclasses": ("/apis/scheduling.k8s.io/v1", False),
    "certificatesigningrequests": ("/apis/certificates.k8s.io/v1", False),
    "endpointslices": ("/apis/discovery.k8s.io/v1", True),
    "deviceclasses": ("/apis/resource.k8s.io/v1", False),
    "resourceslices": ("/apis/resource.k8s.io/v1", False),
    "resourceclaims": ("/apis/resource.k8s.io/v1", True),
    "resourceclaimtemplates": ("/apis/resource.k8s.io/v1", True),
}
_PATCHES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml",
}


def plural(kind: str) -> str:
    """`Pod`, `pod` and `pods` are all pods."""
    kind = kind.lower()
    for candidate in (kind, kind + "s", kind + "es"):
        if candidate in RESOURCES:
            return candidate
    raise KeyError(f"{kind}: not in apiclient.RESOURCES")


def resource_path(kind: str, ns: str | None = None, name: str | None = None) -> str:
    kind = plural(kind)
    prefix, namespaced = RESOURCES[kind]
    where = f"/namespaces/{ns}" if namespaced and ns else ""
    return f"{prefix}{where}/{kind}" + (f"/{name}" if name else "")


class ApiError(Exception):
    def __init__(self, method: str, path: str, status: int, body: bytes) -> None:
        super().__init__(f"{method} {path}: {status} {body.decode(errors='replace')[:1000]}")
        self.status = status
        self.body = body


@dataclass
class Event:
    """One line of a watch."""

    time: float  # time.monotonic() when it was read
    type: str  # ADDED, MODIFIED, DELETED, BOOKMARK, ERROR
    object: dict


class Watch:
    """An open watch. Iterate it, or ask for the next event with a timeout."""

    def __init__(self, connection: http.client.HTTPSConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response

    def next(self, timeout: float | None = None) -> Event | None:
        """The next event; None when there was none in time, or the stream has ended."""
        self._connection.sock.settimeout(timeout)
        try:
            line = self._response.readline()
        except TimeoutError:
            return None
        if not line:
            return None
        event = json.loads(line)
        return Event(time.monotonic(), event["type"], event["object"])

    def until(self, predicate, timeout: float) -> Event:
        """The first event that `predicate` is true of."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            event = self.next(left)
            if event is None:
                break
            if predicate(event):
                return event
        raise TimeoutError(f"no such event within {timeout} s")

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        # close() of a response that is still streaming would read on; the socket's end is enough.
        self._connection.sock and self._connection.sock.close()


class ApiClient:
    """Safe to share between threads: each has its own connection."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        self._host, self._port, self._context = host, port, context
        self._local = threading.local()

    def _open(self, timeout: float) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection(self._host, self._port, context=self._context, timeout=timeout)
        connection.connect()
        # Without it small writes wait for the other side's delayed acknowledgement: 40 ms.
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def raw(self, method: str, path: str, body: bytes | None = None,
            headers: dict[str, str] | None = None, timeout: float = 60) -> tuple[int, dict, bytes]:
        for attempt in (1, 2):
            connection = getattr(self._local, "connection", None)
            fresh = connection is None
            try:
                if fresh:
                    connection = self._local.connection = self._open(timeout)
                connection.sock.settimeout(timeout)
                connection.request(method, path, body, headers or {})
                response = connection.getresponse()
                data = response.read()
                if response.will_close:
                    self._local.connection = None
                return response.status, dict(response.headers), data
            except (OSError, http.client.HTTPException):
                self._local.connection = None
                # A kept connection may have been closed by the server meanwhile: once more on a new one.
                if fresh or attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _json(self, method: str, path: str, obj: object = None, kind: str = "application/json") -> dict:
        headers = {"Accept": "application/json"}
        body = None
        if obj is not None:
            body, headers["Content-Type"] = json.dumps(obj).encode(), kind
        status, _, data = self.raw(method, path, body, headers)
        if status >= 400:
            raise ApiError(method, path, status, data)
        return json.loads(data)

    def get(self, path: str) -> dict:
        return self._json("GET", path)

    def post(self, path: str, obj: dict) -> dict:
        return self._json("POST", path, obj)

    def put(self, path: str, obj: dict) -> dict:
        return self._json("PUT", path, obj)

    def delete(self, path: str, obj: dict | None = None) -> dict:
        return self._json("DELETE", path, obj)

    def patch(self, path: str, obj: object, kind: str = "merge") -> dict:
        return self._json("PATCH", path, obj, _PATCHES[kind])

    def watch(self, path: str, params: dict | None = None) -> Watch:
        connection = self._open(60)
        path = f"{path}?{urlencode({'watch': 'true', **(params or {})})}"
        connection.request("GET", path, headers={"Accept": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ApiError("GET", path, response.status, response.read())
        return Watch(connection, response)


def tls_context(certificate: Path | None = None, key: Path | None = None, verify: bool = True) -> ssl.SSLContext:
    if verify:
        context = ssl.create_default_context(cafile=str(layout.PKI / "ca.crt"))
    else:
        context = ssl._create_unverified_context()
    if certificate:
        context.load_cert_chain(certificate, key)
    return context


def admin_client() -> ApiClient:
    """As the admin of the kubeconfig, whose embedded certificate is written out once for ssl."""
    certificate, key = layout.KUBECONFIGS / "admin.crt", layout.KUBECONFIGS / "admin.key"
    if not key.exists():
        config = layout.ADMIN_KUBECONFIG.read_text()
        for target, field in ((certificate, "client-certificate-data"), (key, "client-key-data")):
            data = re.search(rf"^\s*{field}:\s*(\S+)", config, re.MULTILINE)
            target.touch(0o600)
            target.write_bytes(base64.b64decode(data.group(1)))
    return ApiClient(layout.node_ip(), layout.PORTS["kube-apiserver"], tls_context(certificate, key))
