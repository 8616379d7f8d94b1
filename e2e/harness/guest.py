"""Runs commands and writes files in the VM node, over ssh with the key that was made for its disk.

An emulated guest needs seconds for a handshake, so one connection is kept and shared; it ends when the guest does, and
the next command makes another.
"""

import shlex
import socket
import subprocess
import threading
from pathlib import Path

from e2e.harness import layout
from e2e.harness.processes import Service
from e2e.harness.steps import CommandFailed, poll

SSH_KEY = layout.VM / "id_ed25519"
SOCKET = layout.RUN / "vm-ssh.sock"
_OPTIONS = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR", "BatchMode": "yes",
            "ConnectTimeout": "10", "ServerAliveInterval": "5", "ServerAliveCountMax": "6", "IdentitiesOnly": "yes"}


def _ssh(*arguments: str) -> list[str]:
    options = [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", "-F", "/dev/null", "-i", str(SSH_KEY), "-S", str(SOCKET), *options, *arguments, f"root@{layout.VM_IP}"]


CONNECTION = Service("vm-ssh", lambda: _ssh("-M", "-N"), SOCKET.exists, ready_timeout=40)


class Guest:
    """What cases use as `cluster.guest`."""

    def sh(self, script: str, *, input: bytes | None = None, check: bool = True, timeout: float = 60) -> str:
        """Runs a script in the guest's shell as root, gives its stdout."""
        command = [*_ssh(), script]
        if not CONNECTION.alive():
            SOCKET.unlink(missing_ok=True)
            CONNECTION.start()
        try:
            done = subprocess.run(command, input=b"" if input is None else input, capture_output=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"in the guest, not within {timeout} s: {script}") from None
        if check and done.returncode != 0:
            raise CommandFailed(["(guest)", script], done.returncode, (done.stderr + done.stdout).decode(errors="replace"))
        return done.stdout.decode(errors="replace")

    def read(self, path: str) -> str:
        return self.sh(f"cat {shlex.quote(path)}").strip()

    def write(self, path: str, content: bytes | str, mode: int = 0o644) -> None:
        """Replaces the file in one step, so a program that runs from it is not disturbed."""
        target = shlex.quote(path)
        data = content.encode() if isinstance(content, str) else content
        self.sh(f"mkdir -p $(dirname {target}) && cat > {target}.new && chmod {mode:o} {target}.new && mv {target}.new {target}",
                input=data, timeout=180)

    def copy(self, source: Path, path: str, mode: int = 0o755) -> None:
        """As `write`, for a big file: over plain TCP, since ciphers are slow in an emulated guest."""
        target = shlex.quote(path)
        with socket.create_server((layout.VM_HOST_IP, 0)) as server:
            server.settimeout(60)
            sender = threading.Thread(target=_send, args=(server, source))
            sender.start()
            self.sh(f"cat < /dev/tcp/{layout.VM_HOST_IP}/{server.getsockname()[1]} > {target}.new && "
                    f"test $(stat -c %s {target}.new) = {source.stat().st_size} && chmod {mode:o} {target}.new && "
                    f"mv {target}.new {target}", timeout=180)
            sender.join()

    def shell_command(self) -> list[str]:
        """For a person at a terminal."""
        return _ssh("-t")

    def boot_id(self) -> str:
        return self.read("/proc/sys/kernel/random/boot_id")

    def reboot(self, timeout: float = 240) -> None:
        """Asks systemd for it, and waits until another boot answers."""
        before = self.boot_id()
        self.sh("systemctl reboot", check=False)  # the connection may end first
        poll(lambda: self.boot_id() != before, timeout, "the guest has booted again", 1)


def answers() -> bool:
    """Whether sshd lets us in; raises while it does not."""
    return Guest().sh("echo in", timeout=20).strip() == "in"


def _send(server: socket.socket, source: Path) -> None:
    """To the first who asks."""
    try:
        connection, _ = server.accept()
        with connection, open(source, "rb") as data:
            connection.sendfile(data)
    except OSError:
        return  # the guest's command says what is wrong
