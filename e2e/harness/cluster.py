"""The API that test cases and benchmarks use. Its description with an example is in e2e/README.md."""

from __future__ import annotations  # `list` is a method below, and a type in signatures

import http.client
import os
import uuid
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Callable, Iterator

from e2e.harness import apiclient, controlplane, layout, runtime, tools
from e2e.harness.agent import Agent
from e2e.harness.apiclient import ApiError, Watch
from e2e.harness.steps import HarnessError, poll, run
from e2e.harness.versions import IMAGE_NAMES

FIELD_MANAGER = "e2e"


class Cluster:
    cleanup_seconds = 120  # for the pods of a case's namespace, and for the namespace

    def __init__(self) -> None:
        self.api = apiclient.admin_client()
        self.agent = Agent()
        self.containerd = runtime.CONTAINERD
        self.etcd = controlplane.ETCD
        self.apiserver = controlplane.API_SERVER
        self.controller_manager = controlplane.CONTROLLER_MANAGER
        self.scheduler = controlplane.SCHEDULER
        self.kube_proxy = controlplane.KUBE_PROXY
        self.images = SimpleNamespace(**IMAGE_NAMES)
        self.registry = layout.REGISTRY
        self.node_name = layout.NODE_NAME
        self.node_ip = layout.node_ip()
        self.root_dir = layout.KUBELET_ROOT
        self.pod_logs = layout.POD_LOGS
        self.container_logs = layout.CONTAINER_LOGS
        self.cri_socket = layout.CONTAINERD_SOCKET
        self.admin_kubeconfig = layout.ADMIN_KUBECONFIG
        self.static_pods = layout.STATIC_PODS
        self.cgroup_root = layout.CGROUP_ROOT

    @classmethod
    def load(cls) -> "Cluster":
        if not layout.ADMIN_KUBECONFIG.exists() or not controlplane.API_SERVER.alive():
            raise HarnessError("no cluster is running here: `make up` starts one")
        return cls()

    # Commands

    def kubectl(self, *args: str, input: str | None = None, check: bool = True, timeout: float = 60) -> str:
        environment = {**os.environ, "KUBECONFIG": str(self.admin_kubeconfig)}
        return run([tools.path("kubectl"), *args], input=input, check=check, env=environment, timeout=timeout)

    def ctr(self, *args: str) -> str:
        return runtime.ctr(*args)

    # Objects

    def path(self, kind: str, ns: str | None = None, name: str | None = None) -> str:
        return apiclient.resource_path(kind, ns, name)

    def get(self, kind: str, name: str, ns: str | None = None) -> dict:
        return self.api.get(self.path(kind, ns, name))

    def list(self, kind: str, ns: str | None = None, selector: str | None = None) -> list[dict]:
        return self.api.get(self.path(kind, ns) + (f"?labelSelector={selector}" if selector else ""))["items"]

    def apply(self, obj: dict, ns: str | None = None) -> dict:
        metadata = obj["metadata"]
        path = self.path(obj["kind"], ns or metadata.get("namespace"), metadata["name"])
        return self.api.patch(f"{path}?fieldManager={FIELD_MANAGER}&force=true", obj, "apply")

    def create(self, obj: dict) -> dict:
        return self.api.post(self.path(obj["kind"], obj["metadata"].get("namespace")), obj)

    def exists(self, kind: str, name: str, ns: str | None = None) -> bool:
        try:
            self.get(kind, name, ns)
            return True
        except ApiError as error:
            if error.status == 404:
                return False
            raise

    def delete(self, kind: str, name: str, ns: str | None = None, grace: int | None = None, wait: bool = True,
               timeout: float = 60) -> None:
        options = {} if grace is None else {"gracePeriodSeconds": grace}
        try:
            self.api.delete(self.path(kind, ns, name), options)
        except ApiError as error:
            if error.status != 404:
                raise
        if wait:
            self.wait_gone(kind, name, ns, timeout)

    def watch(self, kind: str, ns: str | None = None) -> Watch:
        path = self.path(kind, ns)
        version = self.api.get(f"{path}?limit=1")["metadata"]["resourceVersion"]
        return self.api.watch(path, {"resourceVersion": version})

    # Waiting

    def wait(self, fn: Callable, timeout: float, what: str, interval: float = 0.1):
        return poll(fn, timeout, what, interval)

    def wait_ready(self, pod: str, ns: str, timeout: float = 60) -> dict:
        last: dict = {}

        def ready() -> dict | None:
            last.update(self.get("pods", pod, ns))
            conditions = last.get("status", {}).get("conditions", [])
            return last if any(c["type"] == "Ready" and c["status"] == "True" for c in conditions) else None

        try:
            return poll(ready, timeout, f"pod {ns}/{pod} is Ready", 0.05)
        except TimeoutError:
            events = [f"{event['reason']}: {event.get('message', '')}" for event in self.list("events", ns)]
            raise TimeoutError(f"pod {ns}/{pod} is not Ready within {timeout} s; status {last.get('status')}; "
                               f"events {events[-8:]}") from None

    def wait_gone(self, kind: str, name: str, ns: str | None = None, timeout: float = 60) -> None:
        poll(lambda: not self.exists(kind, name, ns), timeout, f"{kind} {ns or ''}/{name} is gone", 0.05)

    def wait_node_ready(self, timeout: float = 60) -> None:
        def ready() -> bool:
            conditions = self.node().get("status", {}).get("conditions", [])
            return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

        poll(ready, timeout, f"node {self.node_name} is Ready")

    # Things that cases need again and again

    def node(self) -> dict:
        return self.get("nodes", self.node_name)

    @contextmanager
    def namespace(self, prefix: str) -> Iterator[str]:
        """A namespace of its own, gone at the end."""
        name = f"{prefix}-{uuid.uuid4().hex[:6]}"
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        try:
            # Pods are refused until the controller has made it.
            poll(lambda: self.exists("serviceaccounts", "default", name), 30, f"service account of {name}", 0.02)
            yield name
        finally:
            # The namespace controller looks again only seconds later when there are still pods.
            self.api.delete(self.path("pods", name))
            poll(lambda: not self.list("pods", name), self.cleanup_seconds, f"the pods of {name} are gone")
            self.delete("namespaces", name, timeout=self.cleanup_seconds)

    def pod(self, name: str, ns: str, image: str | None = None, args: list[str] | None = None,
            container: dict | None = None, **spec: object) -> dict:
        main = {"name": "main", "image": image or self.images.agnhost, "args": ["pause"] if args is None else args,
                "imagePullPolicy": "IfNotPresent", **(container or {})}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": ns, "labels": {"app": name}},
                "spec": {"terminationGracePeriodSeconds": 1, "containers": [main], **spec}}

    # The agent's own server

    def kubelet(self, method: str, path: str, body: bytes | None = None, token: str | None = None,
                timeout: float = 30) -> tuple[int, dict, bytes]:
        """Straight to the agent, as the API server does it, or with a token instead of the certificate."""
        identity = () if token else (layout.PKI / "apiserver-kubelet-client.crt", layout.PKI / "apiserver-kubelet-client.key")
        context = apiclient.tls_context(*identity, verify=False)
        connection = http.client.HTTPSConnection(self.node_ip, layout.PORTS["agent"], context=context, timeout=timeout)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def metrics(self) -> str:
        status, _, body = self.kubelet("GET", "/metrics")
        if status != 200:
            raise HarnessError(f"/metrics of the agent: {status} {body[:200]!r}")
        return body.decode()
