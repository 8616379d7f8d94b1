"""Runs commands and writes files in the VM node, over ssh with the key that was made for its disk."""

import shlex
import subprocess
from pathlib import Path

from e2e.harness import layout, vm_image
from e2e.harness.steps import CommandFailed, poll


class Guest:
    """What cases use as `cluster.guest`."""

    def sh(self, script: str, *, input: bytes | None = None, check: bool = True, timeout: float = 60) -> str:
        """Runs a script in the guest's shell as root, gives its stdout."""
        command = [*_ssh(), script]
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

    def copy(self, source: Path, path: str, mode: int = 0o644) -> None:
        self.write(path, source.read_bytes(), mode)

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


def _ssh(*more: str) -> list[str]:
    options = {"StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "LogLevel": "ERROR", "BatchMode": "yes",
               "ConnectTimeout": "5", "ServerAliveInterval": "5", "ServerAliveCountMax": "4", "IdentitiesOnly": "yes"}
    words = ["ssh", "-F", "/dev/null", "-i", str(vm_image.image().ssh_key)]
    for name, value in options.items():
        words += ["-o", f"{name}={value}"]
    return [*words, *more, f"root@{layout.VM_IP}"]
