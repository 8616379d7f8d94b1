"""The VM node: `vm-up`, `vm-down`, and the agent inside as cases see it.

A QEMU guest with systemd as PID 1 and cgroup v2, as a second node of the running cluster: what this host cannot show
(the shipped unit, the systemd cgroup driver, AppArmor, lowered oom_score_adj, a reboot). It hangs on a tap of its own and
has a taint, so that nothing is scheduled there. Everything on the host is under names of ours, and `cleanup` knows them.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from e2e.harness import agent, apiclient, controlplane, layout, preflight, vm_image
from e2e.harness.cluster import Cluster
from e2e.harness.guest import CONNECTION, SOCKET, SSH_KEY, Guest, answers
from e2e.harness.processes import Service
from e2e.harness.steps import HarnessError, poll, run, say, step
from e2e.harness.versions import DEBIAN_PACKAGES_FOR_VM

TAINT = {"key": "vm", "value": "true", "effect": "NoSchedule"}
MEMORY_MIB = 2048
HUGEPAGES = 16  # of 2 MiB
CONSOLE = layout.LOGS / "vm-console.log"
CONFIG_PATH = "/var/lib/kubelet/config.yaml"
KUBECONFIG_PATH = "/etc/kubernetes/kubelet.conf"
CA_PATH = "/etc/kubernetes/pki/ca.crt"
_KIND_FILE = layout.VM / "kind"


def _qemu() -> list[str]:
    image = vm_image.image()
    return [
        "/usr/bin/qemu-system-x86_64",
        "-name", layout.VM_NODE_NAME,
        "-machine", "q35",
        "-accel", os.environ.get("RKUBELET_VM_ACCEL") or "tcg,thread=multi",
        "-cpu", "max",
        "-smp", "2",
        "-m", str(MEMORY_MIB),
        "-display", "none",
        "-monitor", "none",
        "-serial", f"file:{CONSOLE}",
        "-nic", f"tap,ifname={layout.VM_TAP},script=no,downscript=no,model=virtio-net-pci",
        "-device", "virtio-rng-pci",
        # What the guest writes goes to an unnamed file in TMPDIR: the cached disk stays as it was made.
        "-drive", f"file={image.disk},format=raw,if=virtio,snapshot=on,cache=unsafe",
        "-kernel", str(image.kernel),
        "-initrd", str(image.initrd),
        "-append", f"root=/dev/vda rw console=ttyS0 quiet hugepages={HUGEPAGES} security=apparmor",
    ]


QEMU = Service("vm", _qemu, answers, {"TMPDIR": str(layout.VM)}, ready_timeout=240)


class VmAgent:
    """The agent in the guest, a unit of systemd there: what cases use as `cluster.agent`."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    @property
    def kind(self) -> str:
        return _KIND_FILE.read_text().strip()

    @property
    def unit(self) -> str:
        return f"{self.kind}.service"

    @property
    def log_path(self) -> Path:
        """The unit's journal, fetched now."""
        path = layout.LOGS / f"vm-{self.kind}.log"
        path.write_text(self._guest.sh(f"journalctl -u {self.unit} --no-pager -o short-precise", check=False))
        return path

    def show(self, name: str) -> str:
        """A property of the unit."""
        return self._guest.sh(f"systemctl show {self.unit} --property={name} --value").strip()

    def pid(self) -> int:
        """0 when it does not run."""
        return int(self.show("MainPID"))

    def alive(self) -> bool:
        return self.show("ActiveState") == "active"

    def start(self) -> None:
        """Returns once the agent has said READY to systemd."""
        self._guest.sh(f"systemctl start {self.unit}", timeout=120)

    def stop(self) -> None:
        self._guest.sh(f"systemctl stop {self.unit}", timeout=60)

    def restart(self) -> None:
        self._guest.sh(f"systemctl restart {self.unit}", timeout=120)

    def kill9(self) -> None:
        self._guest.sh(f"kill -9 {self.pid()}")


class VmCluster(Cluster):
    """The cluster as cases of the VM node see it: node, agent and pods are those of the guest."""

    cleanup_seconds = 300  # emulated, beside other work: containerd's own calls take up to half a minute

    def __init__(self) -> None:
        super().__init__()
        self.guest = Guest()
        self.agent = VmAgent(self.guest)
        self.node_name = layout.VM_NODE_NAME
        self.node_ip = layout.VM_IP
        self.cgroup_root = "/"

    @classmethod
    def load(cls) -> "VmCluster":
        if not QEMU.alive():
            raise HarnessError("no VM node is running here: `make vm-up` starts one")
        return super().load()

    def pod(self, name: str, ns: str, image: str | None = None, args: list[str] | None = None,
            container: dict | None = None, **spec: object) -> dict:
        return super().pod(name, ns, image, args, container, **{"nodeName": self.node_name, **spec})


def up() -> None:
    kind = agent.wanted_kind()
    Cluster.load()
    preflight.check_vm(MEMORY_MIB)
    preflight.install_packages(DEBIAN_PACKAGES_FOR_VM)
    agent.build(kind)
    vm_image.build()
    if not QEMU.alive():
        _remove_from_host()
        _start()
    cluster = VmCluster.load()
    with step(f"installing {kind} in the VM"):
        _install(cluster.guest, kind)
    with step("giving the VM its pod network"):
        _connect_pods(cluster)
    with step(f"{layout.VM_NODE_NAME} becomes Ready"):
        cluster.wait_node_ready(120)
    print(cluster.kubectl("get", "nodes", "-o", "wide"))
    print(f"agent: {kind}; console {CONSOLE}; a shell: make vm-shell")


def _start() -> None:
    layout.VM.mkdir(parents=True, exist_ok=True)
    with step("making the VM's tap and rules"):
        run(["ip", "tuntap", "add", "dev", layout.VM_TAP, "mode", "tap"])
        run(["ip", "address", "add", f"{layout.VM_HOST_IP}/24", "dev", layout.VM_TAP])
        run(["ip", "link", "set", layout.VM_TAP, "up"])
        nat = ["iptables", "-w", "-t", "nat"]
        run([*nat, "-N", layout.VM_CHAIN])
        # Only what leaves this host: other nodes and pods see the guest's own address.
        run([*nat, "-A", layout.VM_CHAIN, "-s", layout.VM_NETWORK, "-o", _way_out(), "-j", "MASQUERADE"])
        run([*nat, "-A", "POSTROUTING", "-j", layout.VM_CHAIN])
    shutil.copy(vm_image.image().ssh_key, SSH_KEY)
    with step("booting the VM"):
        QEMU.start()


def _way_out() -> str:
    """The interface of the default route."""
    return re.search(r"\bdev (\S+)", run(["ip", "-o", "route", "get", "198.51.100.1"])).group(1)


def _config() -> dict:
    """What kubeadm would write, and our taint."""
    base = agent.base_config()
    kept = ("apiVersion", "kind", "authorization", "clusterDNS", "clusterDomain", "failSwapOn", "evictionHard",
            "imageGCHighThresholdPercent", "imageGCLowThresholdPercent")
    return {
        **{name: base[name] for name in kept},
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True},
                           "x509": {"clientCAFile": CA_PATH}},
        "cgroupDriver": "systemd",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "podPidsLimit": 512,
        "registerWithTaints": [TAINT],
        "staticPodPath": "/etc/kubernetes/manifests",
    }


def _install(guest: Guest, kind: str) -> None:
    """As README says a person does it. The Go kubelet gets the same unit under its own name."""
    unit = (layout.REPOSITORY / "systemd" / "rkubelet.service").read_text()
    if kind == "kubelet":
        unit = unit.replace("rkubelet", "kubelet").replace("RKUBELET", "KUBELET")
    for other in agent.KINDS:
        guest.sh(f"systemctl disable -q --now {other}.service", check=False)
    config = agent.merge_patch(_config(), json.loads(os.environ.get("RKUBELET_CONFIG_PATCH") or "{}"))
    extra = " ".join(f"{name}={value}" for name, value in json.loads(os.environ.get("AGENT_ENV") or "{}").items())
    guest.copy(agent.binary(kind), f"/usr/bin/{kind}")
    for path, content, mode in [
        (f"/etc/systemd/system/{kind}.service", unit, 0o644),
        (f"/etc/default/{kind}", f"{kind.upper()}_EXTRA_ARGS=--v=2\n{extra}\n", 0o644),
        (CONFIG_PATH, json.dumps(config, indent=1), 0o600),
        (KUBECONFIG_PATH, _kubeconfig(), 0o600),
        (CA_PATH, (layout.PKI / "ca.crt").read_bytes(), 0o644),
        ("/etc/resolv.conf", layout.RESOLV_CONF.read_bytes(), 0o644),
    ]:
        guest.write(path, content, mode)
    guest.sh(f"mkdir -p /etc/kubernetes/manifests; systemctl daemon-reload; systemctl enable -q --now {kind}.service", timeout=120)
    _KIND_FILE.write_text(kind)


def _kubeconfig() -> str:
    folder = layout.VM / "kubeconfig"
    if not (folder / "kubelet.conf").exists():
        controlplane.kubeadm("init", "phase", "kubeconfig", "kubelet", "--kubeconfig-dir", str(folder),
                             node_name=layout.VM_NODE_NAME)
    return (folder / "kubelet.conf").read_text()


def _connect_pods(cluster: VmCluster) -> None:
    """The controller manager gives the node its range once it has registered; CNI and the host's route need it."""
    pods = poll(lambda: cluster.node()["spec"].get("podCIDR"), 60, f"{layout.VM_NODE_NAME} has a pod CIDR")
    ipam = {"type": "host-local", "ranges": [[{"subnet": pods}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": ipam}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    conflist = json.dumps({"cniVersion": "1.0.0", "name": "rkubelet-e2e", "plugins": [bridge, portmap]})
    path = f"{vm_image.CNI_CONFIG}/10-e2e.conflist"
    if cluster.guest.sh(f"cat {path}", check=False) != conflist:
        cluster.guest.write(path, conflist)
    run(["ip", "route", "replace", pods, "via", layout.VM_IP])


def shell() -> None:
    VmCluster.load()
    command = Guest().shell_command()
    os.execvp(command[0], command)


def down() -> bool:
    """Takes the node away from the cluster and the VM from this host, and proves it."""
    if controlplane.API_SERVER.alive() and layout.ADMIN_KUBECONFIG.exists():
        with step(f"removing {layout.VM_NODE_NAME} from the cluster"):
            stop()
            cluster = Cluster.load()
            cluster.delete("nodes", layout.VM_NODE_NAME)
            cluster.delete("leases", layout.VM_NODE_NAME, "kube-node-lease")
    stop()
    left = left_over()
    for entry in left:
        print(f"LEFT: {entry}")
    if not left:
        say("nothing of the VM is left: no process, tap, route, iptables rule, file or Node object")
    return not left


def stop() -> None:
    """Off with its power, and what was made for it on this host."""
    if QEMU.pid_file.exists():
        with step("stopping the VM"):
            QEMU.stop(timeout=10)
    CONNECTION.stop()
    SOCKET.unlink(missing_ok=True)
    _remove_from_host()


def _remove_from_host() -> None:
    subprocess.run(["ip", "link", "delete", layout.VM_TAP], capture_output=True)  # its routes go with it
    nat = ["iptables", "-w", "-t", "nat"]
    for arguments in (["-D", "POSTROUTING", "-j", layout.VM_CHAIN], ["-F", layout.VM_CHAIN], ["-X", layout.VM_CHAIN]):
        subprocess.run([*nat, *arguments], capture_output=True)
    shutil.rmtree(layout.VM, ignore_errors=True)


def left_over() -> list[str]:
    """Traces of the VM on this host and in the cluster."""
    left = [f"process {pid}" for pid in _qemu_pids()]
    left += [f"interface {layout.VM_TAP}"] if Path(f"/sys/class/net/{layout.VM_TAP}").exists() else []
    addresses = re.compile(rf"\b{layout.VM_IP}\b|\b{layout.VM_HOST_IP}\b|\b{re.escape(layout.VM_NETWORK)}|{layout.VM_TAP}")
    left += [f"route {line}" for line in run(["ip", "-o", "route", "show", "table", "all"]).splitlines() if addresses.search(line)]
    left += [f"rule {line}" for line in run(["iptables-save"]).splitlines() if layout.VM_CHAIN in line or addresses.search(line)]
    left += [f"file {path}" for path in (layout.VM, QEMU.pid_file, CONNECTION.pid_file, SOCKET) if path.exists()]
    if controlplane.API_SERVER.alive():
        status, _, _ = apiclient.admin_client().raw("GET", apiclient.resource_path("nodes", name=layout.VM_NODE_NAME))
        left += [f"node {layout.VM_NODE_NAME} (status {status})"] if status != 404 else []
    return left


def _qemu_pids() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if b"qemu-system" in words[0] and layout.VM_NODE_NAME.encode() in words:
            found.append(int(entry.name))
    return found
