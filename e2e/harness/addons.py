"""What runs in the cluster besides the control plane: CoreDNS as kubeadm installs it, and the demo pod."""

import urllib.request

from e2e.harness import controlplane, layout
from e2e.harness.cluster import Cluster
from e2e.harness.versions import IMAGE_NAMES

DEMO = "demo"


def install_dns(cluster: Cluster) -> None:
    if not cluster.exists("deployments", "coredns", "kube-system"):
        controlplane.kubeadm("init", "phase", "addon", "coredns", "--kubeconfig", str(layout.ADMIN_KUBECONFIG))
        # One node: the second replica would say nothing new.
        cluster.api.patch(cluster.path("deployments", "kube-system", "coredns"), {"spec": {"replicas": 1}})


def wait_dns(cluster: Cluster) -> None:
    def available() -> bool:
        return bool(cluster.get("deployments", "coredns", "kube-system").get("status", {}).get("availableReplicas"))

    cluster.wait(available, 120, "CoreDNS is available")


def run_demo(cluster: Cluster) -> None:
    """A pod with a configMap, a secret, a hostPath and probes; it answers what it is asked."""
    layout.DEMO_HOST_PATH.mkdir(parents=True, exist_ok=True)
    (layout.DEMO_HOST_PATH / "greeting").write_text("hello from the host")
    for obj in demo_objects():
        cluster.apply(obj)
    cluster.wait_ready(DEMO, "default", timeout=120)


def demo_objects() -> list[dict]:
    def probe(path: str) -> dict:
        return {"httpGet": {"path": path, "port": 8080}, "periodSeconds": 1}

    container = {
        "name": "web",
        "image": IMAGE_NAMES["agnhost"],
        "args": ["netexec", "--http-port=8080"],
        "livenessProbe": probe("/healthz"),
        "readinessProbe": probe("/hostname"),
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "128Mi"}},
        "volumeMounts": [{"name": name, "mountPath": f"/demo/{name}"} for name in ("config", "secret", "host")],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": DEMO, "namespace": "default", "labels": {"app": DEMO}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
            "volumes": [
                {"name": "config", "configMap": {"name": DEMO}},
                {"name": "secret", "secret": {"secretName": DEMO}},
                {"name": "host", "hostPath": {"path": str(layout.DEMO_HOST_PATH), "type": "Directory"}},
            ],
        },
    }
    metadata = {"name": DEMO, "namespace": "default"}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"greeting": "hello from a configMap"}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"greeting": "hello from a secret"}},
        pod,
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata,
         "spec": {"selector": {"app": DEMO}, "ports": [{"port": 80, "targetPort": 8080}]}},
    ]


def demo_answer(cluster: Cluster) -> str:
    """Asked through its service, so through the rules of kube-proxy; the files by exec, so through the agent."""
    address = cluster.get("services", DEMO, "default")["spec"]["clusterIP"]

    def ask() -> str:
        with urllib.request.urlopen(f"http://{address}/hostname", timeout=2) as response:
            return response.read().decode()

    answer = cluster.wait(ask, 30, f"the demo service answers at {address}", interval=0.5)
    files = cluster.kubectl("exec", DEMO, "--", "sh", "-c", "for f in /demo/*/greeting; do echo \"$(cat $f)\"; done")
    return f"http://{address}/hostname says {answer!r}; its files say: " + ", ".join(files.splitlines())


def show(cluster: Cluster) -> None:
    print()
    print(cluster.kubectl("get", "nodes,pods", "--all-namespaces", "-o", "wide"))
    print(f"demo: {demo_answer(cluster)}")
    print(f"agent: {cluster.agent.kind}, pid {cluster.agent.pid()}, {cluster.agent.rss_kib() // 1024} MiB, log {cluster.agent.log_path}")
    print("a shell with KUBECONFIG and kubectl: make shell")
