"""All pins in one place: what is built from which Go module, the Debian packages, and the names of the images.

The Go versions must agree with tools/<family>/go.mod; `tools.py` checks that before it builds.
"""

from dataclasses import dataclass

KUBERNETES = "v1.37.1"


@dataclass(frozen=True)
class Program:
    """One program that `go build` makes."""

    name: str
    package: str
    family: str  # folder below tools/, a Go module of its own
    version: str
    tags: str = ""
    ldflags: str = "-s -w"
    cgo: bool = False
    is_test: bool = False  # built with `go test -c`


# Without these the programs say v0.0.0, and clients misbehave.
_KUBERNETES_LDFLAGS = " ".join(
    ["-s -w"]
    + [
        f"-X k8s.io/component-base/version.{key}={value}"
        for key, value in {
            "gitVersion": KUBERNETES,
            "gitMajor": KUBERNETES.split(".")[0].lstrip("v"),
            "gitMinor": KUBERNETES.split(".")[1],
            "gitCommit": "unknown",
            "gitTreeState": "clean",
        }.items()
    ]
)
AGNHOST = "2.66.1"
AGNHOST_PREVIOUS = "2.55"
_ETCD = "v3.6.16"
_CONTAINERD = "v2.3.7"
_RUNC = "v1.5.2"


def _kubernetes(name: str) -> Program:
    return Program(name, f"k8s.io/kubernetes/cmd/{name}", "kubernetes", KUBERNETES, ldflags=_KUBERNETES_LDFLAGS)


def _containerd(name: str) -> Program:
    return Program(
        name,
        f"github.com/containerd/containerd/v2/cmd/{name}",
        "containerd",
        _CONTAINERD,
        tags="no_btrfs,no_devmapper,no_zfs",
        ldflags=f"-s -w -X github.com/containerd/containerd/v2/version.Version={_CONTAINERD}",
    )


PROGRAMS = {
    program.name: program
    for program in [
        Program("etcd", "go.etcd.io/etcd/server/v3", "etcd", _ETCD),
        _kubernetes("kubectl"),
        _kubernetes("kubeadm"),
        _kubernetes("kube-apiserver"),
        _kubernetes("kube-controller-manager"),
        _kubernetes("kube-scheduler"),
        _kubernetes("kube-proxy"),
        _kubernetes("kubelet"),
        _containerd("containerd"),
        _containerd("containerd-shim-runc-v2"),
        _containerd("ctr"),
        Program(
            "runc",
            "github.com/opencontainers/runc",
            "runc",
            _RUNC,
            tags="seccomp",
            ldflags=f"-s -w -X main.version={_RUNC.lstrip('v')}",
            cgo=True,
        ),
        Program(
            "agnhost",
            "k8s.io/kubernetes/test/images/agnhost",
            "kubernetes",
            KUBERNETES,
            ldflags=f"-s -w -X main.Version={AGNHOST}",
        ),
        Program("coredns", "github.com/coredns/coredns", "coredns", "v1.15.0"),
        Program(
            "metrics-server", "sigs.k8s.io/metrics-server/cmd/metrics-server", "metrics-server", "v0.9.0"
        ),
        Program("cribench", ".", "cribench", "v0.37.1"),  # ours; the version is that of k8s.io/cri-api
        Program("probetarget", ".", "probetarget", "v1.82.1"),  # ours; the version is that of google.golang.org/grpc
        Program("ginkgo", "github.com/onsi/ginkgo/v2/ginkgo", "kubernetes", KUBERNETES),
        Program(
            "e2e.test",
            "k8s.io/kubernetes/test/e2e",
            "kubernetes",
            KUBERNETES,
            ldflags=_KUBERNETES_LDFLAGS,
            is_test=True,
        ),
    ]
}

# What `make up` builds, in this order; the rest is built by the verb that needs it.
PROGRAMS_FOR_UP = [
    "etcd",
    "kubectl",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "kubeadm",
    "kube-proxy",
    "agnhost",
    "coredns",
]
PROGRAMS_FOR_CONFORMANCE = ["ginkgo", "e2e.test"]

# Debian package -> a file that shows it is installed.
DEBIAN_PACKAGES = {
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iptables": "/usr/sbin/iptables",
    "nftables": "/usr/sbin/nft",
    "conntrack": "/usr/sbin/conntrack",
    "ethtool": "/usr/sbin/ethtool",
    "socat": "/usr/bin/socat",
    "iproute2": "/usr/bin/ip",
    "mount": "/usr/bin/mount",
    "procps": "/usr/sbin/sysctl",
    "busybox-static": "/usr/bin/busybox",
    "bash-static": "/usr/bin/bash-static",
    "debootstrap": "/usr/sbin/debootstrap",
    "docker-registry": "/usr/bin/docker-registry",
    "libseccomp-dev": "/usr/include/seccomp.h",
    "pkg-config": "/usr/bin/pkg-config",
    "gcc": "/usr/bin/gcc",
    "libc6-dev": "/usr/include/stdio.h",
    "ca-certificates": "/usr/sbin/update-ca-certificates",
}

# What `make vm-up` needs besides.
DEBIAN_PACKAGES_FOR_VM = {
    "qemu-system-x86": "/usr/bin/qemu-system-x86_64",
    "e2fsprogs": "/usr/sbin/mke2fs",
    "openssh-client": "/usr/bin/ssh",
}

# The Debian root below agnhost, nginx and the like.
DEBIAN_SUITE = "bookworm"
DEBIAN_MIRROR = "http://deb.debian.org/debian"
DEBIAN_ROOT_PACKAGES = [
    "bash",
    "bind9-dnsutils",
    "ca-certificates",
    "curl",
    "iperf",
    "iproute2",
    "iptables",
    "iputils-ping",
    "jq",
    "netcat-openbsd",
    "nginx-light",
    "procps",
    "socat",
    "util-linux",
]

# The root of the VM node: what a node needs, and sshd as the harness's way in.
VM_ROOT_PACKAGES = [
    "apparmor",
    "ca-certificates",
    "conntrack",
    "containernetworking-plugins",
    "dbus",
    "ethtool",
    "iproute2",
    "iptables",
    "kmod",
    "libseccomp2",  # runc is linked with it
    "linux-image-cloud-amd64",
    "mount",
    "openssh-server",
    "procps",
    "socat",
    "systemd-sysv",
    "udev",
    "util-linux",
]
VM_PROGRAMS = ["containerd", "containerd-shim-runc-v2", "ctr", "runc"]
VM_IMAGES = ["pause", "agnhost", "busybox"]  # names of IMAGE_NAMES

_TEST_IMAGES = "registry.k8s.io/e2e-test-images"
IMAGE_NAMES = {
    "pause": "registry.k8s.io/pause:3.10.2",
    "agnhost": f"{_TEST_IMAGES}/agnhost:{AGNHOST}",
    "agnhost_previous": f"{_TEST_IMAGES}/agnhost:{AGNHOST_PREVIOUS}",
    "busybox": f"{_TEST_IMAGES}/busybox:1.37.0-2",
    "nginx": f"{_TEST_IMAGES}/nginx:1.27.0-2",
    "nginx_new": f"{_TEST_IMAGES}/nginx:1.28.0-2",
    "nonewprivs": f"{_TEST_IMAGES}/nonewprivs:1.4",
    "nonroot": f"{_TEST_IMAGES}/nonroot:1.5",
    "ipc_utils": f"{_TEST_IMAGES}/ipc-utils:1.4",
    "glibc_dns_testing": f"{_TEST_IMAGES}/glibc-dns-testing:2.1.1",
    "kitten": f"{_TEST_IMAGES}/kitten:1.8",
    "nautilus": f"{_TEST_IMAGES}/nautilus:1.8",
    "perl": f"{_TEST_IMAGES}/perl:5.26",
    # The name that kubeadm v1.37.1 asks for; what is inside is PROGRAMS["coredns"].
    "coredns": "registry.k8s.io/coredns/coredns:v1.14.6",
}
