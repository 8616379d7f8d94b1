"""The disk of the VM node: Debian with systemd, the harness's containerd and runc, and a few images already unpacked.

Made once and kept in the cache, keyed by everything that goes into it. What differs from run to run (the agent, its
unit, its configuration) is not in here: `vm` installs it in the running guest, as a person would.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from e2e.harness import images, layout, runtime, tools, versions
from e2e.harness.processes import MARKER
from e2e.harness.steps import poll, run, step
from e2e.harness.versions import IMAGE_NAMES

DISK_SIZE = "6G"  # sparse; about 1 GiB is used
CNI_PROGRAMS = "/usr/lib/cni"  # where Debian's package has them
CNI_CONFIG = "/etc/cni/net.d"

_SYSCTLS = """\
net.ipv4.ip_forward = 1
net.bridge.bridge-nf-call-iptables = 1
net.bridge.bridge-nf-call-ip6tables = 1
"""
_NETWORK = f"""\
[Match]
Type=ether
Name=en*

[Network]
Address={layout.VM_IP}/24
Gateway={layout.VM_HOST_IP}
LinkLocalAddressing=no
"""
_CONTAINERD_UNIT = """\
[Unit]
Description=containerd
After=network.target local-fs.target

[Service]
ExecStart=/usr/local/bin/containerd
Type=notify
Delegate=yes
KillMode=process
Restart=always
RestartSec=1
LimitNOFILE=1048576
TasksMax=infinity
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class VmImage:
    """What QEMU is given, and the key that opens the guest."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "disk.img"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"

    @property
    def ssh_key(self) -> Path:
        return self.folder / "id_ed25519"


def image() -> VmImage:
    return VmImage(layout.IMAGE_CACHE / f"vm-{_recipe()}")


def build() -> VmImage:
    """Gives the image, made now or before."""
    target = image()
    if target.folder.exists():
        return target
    tools.build(versions.VM_PROGRAMS)
    archive, debian = images.build(), _debian_root()
    with tempfile.TemporaryDirectory(dir=layout.IMAGE_CACHE) as scratch:
        root, made = Path(scratch) / "root", VmImage(Path(scratch) / "made")
        root.mkdir()
        made.folder.mkdir()
        with step("making the VM's disk"):
            run(["tar", "-C", root, "--numeric-owner", "-xpf", debian])
            _move_kernel(root, made)
            _configure(root, made)
            _unpack_images(root, archive, Path(scratch))
            run(["mke2fs", "-q", "-t", "ext4", "-d", root, made.disk, DISK_SIZE])
        made.folder.rename(target.folder)
    for older in layout.IMAGE_CACHE.glob("vm-*"):
        if older.is_dir() and older != target.folder:
            shutil.rmtree(older)
    return target


def _recipe() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(repr([_debian_recipe(), images.archive().name, versions.VM_IMAGES, layout.VM_IP, layout.VM_HOST_IP,
                        [str(tools.location(name)) for name in versions.VM_PROGRAMS]]).encode())
    return digest.hexdigest()[:16]


def _debian_recipe() -> str:
    return f"{versions.DEBIAN_SUITE} {versions.DEBIAN_MIRROR} {' '.join(versions.VM_ROOT_PACKAGES)}"


def _debian_root() -> Path:
    """A tar of the Debian root with its kernel: the slow part, so it is kept by itself."""
    layout.IMAGE_CACHE.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(_debian_recipe().encode()).hexdigest()[:16]
    target = layout.IMAGE_CACHE / f"vm-root-{key}.tar"
    if target.exists():
        return target
    with step("making the VM's Debian root with debootstrap (some minutes, downloads about 150 MB)"), \
            tempfile.TemporaryDirectory(dir=layout.IMAGE_CACHE) as scratch:
        root, partial = Path(scratch) / "root", Path(scratch) / "root.tar"
        run(["debootstrap", "--variant=minbase", f"--include={','.join(versions.VM_ROOT_PACKAGES)}",
             versions.DEBIAN_SUITE, root, versions.DEBIAN_MIRROR])
        waste = ["dev/*", "proc/*", "sys/*", "var/cache/apt/*", "var/lib/apt/lists/*", "usr/share/doc/*",
                 "usr/share/man/*", "usr/share/locale/*", "var/log/*.log"]
        run(["tar", "-C", root, "--numeric-owner", "--xattrs", *[f"--exclude=./{path}" for path in waste], "-cf", partial, "."])
        partial.rename(target)
    for older in layout.IMAGE_CACHE.glob("vm-root-*.tar"):
        if older != target:
            older.unlink()
    return target


def _move_kernel(root: Path, made: VmImage) -> None:
    """QEMU loads them itself: no boot loader in the guest."""
    for pattern, target in (("vmlinuz-*", made.kernel), ("initrd.img-*", made.initrd)):
        [found] = (root / "boot").glob(pattern)
        shutil.move(found, target)


def _configure(root: Path, made: VmImage) -> None:
    for name in versions.VM_PROGRAMS:
        shutil.copy2(tools.location(name), root / "usr/local/bin" / name)
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "rkubelet-e2e", "-f", made.ssh_key])
    files = {
        "etc/hostname": f"{layout.VM_NODE_NAME}\n",
        "etc/hosts": f"127.0.0.1 localhost\n{layout.VM_IP} {layout.VM_NODE_NAME}\n",
        "etc/modules-load.d/node.conf": "overlay\nbr_netfilter\n",
        "etc/sysctl.d/90-node.conf": _SYSCTLS,
        "etc/systemd/network/10-vm.network": _NETWORK,
        "etc/systemd/system/containerd.service": _CONTAINERD_UNIT,
        # What ignores SIGTERM in a container would hold a reboot up for 90 s.
        "etc/systemd/system.conf.d/stop.conf": "[Manager]\nDefaultTimeoutStopSec=15s\n",
        "etc/containerd/config.toml": _containerd_config(),
        "root/.ssh/authorized_keys": made.ssh_key.with_suffix(".pub").read_text(),
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "root/.ssh").chmod(0o700)
    for path in (root / "etc/apparmor.d").iterdir():  # Debian's profiles for its programs: half a minute of a boot
        if path.is_file():
            path.unlink()
    units = ["systemd-networkd.service", "systemd-networkd-wait-online.service", "containerd.service", "ssh.service"]
    run(["chroot", root, "systemctl", "enable", "-q", *units])
    run(["chroot", root, "systemctl", "mask", "-q", "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer",
         "e2scrub_reap.service", "fstrim.timer", "dpkg-db-backup.timer"])


def _containerd_config() -> str:
    """containerd's own defaults but for the systemd cgroup driver, huge pages, Debian's CNI folder and our pause image."""
    cri = "plugins.'io.containerd.cri.v1.runtime'"
    return "\n".join([
        "version = 3",
        "[plugins.'io.containerd.cri.v1.images'.pinned_images]",
        f"sandbox = {json.dumps(IMAGE_NAMES['pause'])}",
        f"[{cri}]",
        "disable_hugetlb_controller = false",  # by default it passes no limits of huge pages on
        f"[{cri}.cni]",
        f"bin_dirs = [{json.dumps(CNI_PROGRAMS)}]",
        f"conf_dir = {json.dumps(CNI_CONFIG)}",
        f"[{cri}.containerd.runtimes.runc]",
        "runtime_type = 'io.containerd.runc.v2'",
        f"[{cri}.containerd.runtimes.runc.options]",
        "SystemdCgroup = true",
    ]) + "\n"


def _unpack_images(root: Path, archive: Path, scratch: Path) -> None:
    """Lets a containerd of this host do it into the guest's folder: inside an emulated guest it would take a minute."""
    with _containerd(root / "var/lib/containerd", scratch) as socket:

        def ctr(*arguments: str) -> str:
            return run([tools.path("ctr"), "--address", socket, "--namespace", runtime.NAMESPACE, *arguments], timeout=600)

        poll(lambda: ctr("version"), 30, "the containerd that unpacks images answers")
        ctr("images", "import", str(archive))
        wanted = {IMAGE_NAMES[name] for name in versions.VM_IMAGES}
        ctr("images", "remove", "--sync", *sorted(set(ctr("images", "list", "--quiet").split()) - wanted))


@contextmanager
def _containerd(root: Path, scratch: Path) -> Iterator[Path]:
    socket, state, config = scratch / "containerd.sock", scratch / "state", scratch / "containerd.toml"
    config.write_text("\n".join([
        "version = 3",
        f"root = {json.dumps(str(root))}",
        f"state = {json.dumps(str(state))}",
        "disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.runtime', 'io.containerd.cri.v1.images',"
        " 'io.containerd.nri.v1.nri']",
        "[grpc]",
        f"address = {json.dumps(str(socket))}",
        "[ttrpc]",
        f"address = {json.dumps(str(socket) + '.ttrpc')}",
        "[plugins.'io.containerd.internal.v1.opt']",
        f"path = {json.dumps(str(scratch / 'opt'))}",
    ]) + "\n")
    with open(scratch / "containerd.log", "wb") as log:
        child = subprocess.Popen([tools.path("containerd"), "--config", str(config)], stdin=subprocess.DEVNULL,
                                 stdout=log, stderr=log, env={**os.environ, MARKER: "vm-image"})
        try:
            yield socket
        finally:
            child.terminate()
            child.wait(30)
