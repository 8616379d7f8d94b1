"""Where everything is: folders, sockets, addresses, names. Nothing here does anything."""

import os
import socket
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
E2E = REPOSITORY / "e2e"

# Kept by `make down`.
CACHE = Path(os.environ.get("RKUBELET_CACHE") or Path.home() / ".cache" / "rkubelet-e2e")
PROGRAM_CACHE = CACHE / "bin"
IMAGE_CACHE = CACHE / "images"
REGISTRY_DATA = CACHE / "registry"  # filling it takes 10 s, so it is done once
LOGS = CACHE / "logs"
RESULTS = CACHE / "results"

# Removed by `make down`.
STATE = Path("/var/lib/rkubelet-e2e")
RUN = Path("/run/rkubelet-e2e")
PID_FILES = RUN / "pids"
PKI = STATE / "pki"
KUBECONFIGS = STATE / "kubeconfig"
ADMIN_KUBECONFIG = KUBECONFIGS / "super-admin.conf"
SNAPSHOT = STATE / "before-up.json"
ETCD_DATA = STATE / "etcd"
CONTAINERD_ROOT = STATE / "containerd"
CONTAINERD_STATE = RUN / "containerd"
CONTAINERD_SOCKET = RUN / "containerd.sock"
CNI_CONFIG = STATE / "cni"
CNI_PROGRAMS = Path("/usr/lib/cni")
REGISTRY_HOSTS = STATE / "certs.d"
AGENT = STATE / "agent"
STATIC_PODS = AGENT / "static-pods"
RESOLV_CONF = STATE / "resolv.conf"
DEMO_HOST_PATH = STATE / "demo"

# These paths are the kubelet's own, so programs and tests look for them there. They are used, and removed by `down`,
# only if they were not there before the first `up`.
KUBELET_ROOT = Path("/var/lib/kubelet")
POD_LOGS = Path("/var/log/pods")
CONTAINER_LOGS = Path("/var/log/containers")
AGENT_PATHS = [KUBELET_ROOT, POD_LOGS, CONTAINER_LOGS]
# Made by containerd, CNI, kube-proxy or the agent besides; removed by `down` if they were not there before.
SIDE_PATHS = [Path("/var/lib/cni"), Path("/run/containerd"), Path("/opt/containerd"), Path("/run/xtables.lock"),
              Path("/run/netns"), Path("/var/run/kubernetes"), Path("/usr/libexec/kubernetes"), Path("/var/lib/kube-proxy"),
              Path("/run/flannel"), Path("/run/nri"), Path("/var/lib/containerd"), Path("/etc/cni"), Path("/opt/cni")]

CGROUP_ROOT = "/rkubelet-e2e"
CGROUP_MOUNT = Path("/sys/fs/cgroup")
BRIDGE = "rkube0"

NODE_NAME = "node-1"
SERVICE_CIDR = "10.96.0.0/16"
SERVICE_DNS = "10.96.0.10"
SERVICE_API = "10.96.0.1"
CLUSTER_DOMAIN = "cluster.local"
CLUSTER_CIDR = "10.88.0.0/16"
NODE_CIDR_MASK = 22
POD_CIDR = f"10.88.0.0/{NODE_CIDR_MASK}"  # of the first and only node
REGISTRY = "127.0.0.1:5000"

# The VM node. Its disk image is kept in IMAGE_CACHE.
VM = STATE / "vm"
VM_NODE_NAME = "node-2"
VM_TAP = "rkube-vm"
VM_HOST_IP = "172.30.0.1"
VM_IP = "172.30.0.2"
VM_NETWORK = "172.30.0.0/24"
VM_CHAIN = "RKUBELET-E2E-VM"  # in the nat table

PORTS = {
    "etcd": 2379,
    "etcd peers": 2380,
    "kube-apiserver": 6443,
    "registry": 5000,
    "agent": 10250,
    "agent health": 10248,
    "kube-proxy metrics": 10249,
    "kube-proxy health": 10256,
    "kube-controller-manager": 10257,
    "kube-scheduler": 10259,
}


def node_ip() -> str:
    """The host's own address: the source of a packet to the world (none is sent)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))
        return probe.getsockname()[0]


def api_server() -> str:
    return f"https://{node_ip()}:{PORTS['kube-apiserver']}"


def path_with_programs() -> str:
    """PATH for whatever the harness starts: our programs first."""
    from e2e.harness import tools  # tools imports this module

    folders = dict.fromkeys(str(tools.location(name).parent) for name in tools.PROGRAMS)
    return ":".join([*folders, "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"])
