"""A guest with a real, tiny Linux and the QEMU guest agent, so that freezing is real.

It boots under TCG in about four seconds; see ``mkguest`` for what it is made of.  Its disks
that carry ext4 or xfs (``make_ext4``, ``make_xfs``) are mounted at ``/mnt/vda`` and so on.
"""

import base64
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab.base import Lab, cache_directory
from tests.lab.command import LabError, run
from tests.lab.disks import MIB, DiskSpec
from tests.lab.domain_xml import BootFiles
from tests.lab.guest import Guest, GuestOptions
from tests.lab.process import POLL_SECONDS

MAKER = Path(__file__).with_name("mkguest")
BOOT_VARIABLE = "NBDBACKUP_LAB_BOOT"
MAKE_TIMEOUT_SECONDS = 300.0
BOOT_TIMEOUT_SECONDS = 90.0
CALL_TIMEOUT_SECONDS = 60.0
CONNECT_SECONDS = 3.0  # until libvirt itself is connected to the agent
# trixie's kernel panics with less than 160; bookworm's would do with 112
MEMORY_MIB = 192
CMDLINE = "console=ttyS0 panic=-1 quiet mitigations=off nokaslr no_timer_check"


class AgentGuestBase(ABC):
    """What a guest with an agent can do, wherever its libvirt is."""

    @abstractmethod
    def start(self) -> None:
        """Boot and wait until the agent answers; raises ``LabError``."""

    @abstractmethod
    def console(self) -> str:
        """Return what the guest's serial console has printed."""

    @abstractmethod
    def _ask(self, request: str) -> str:
        """Send JSON to the agent by libvirt and return its reply; raises ``LabError``."""

    def wait_ready(self, timeout_seconds: float = BOOT_TIMEOUT_SECONDS) -> None:
        """Wait until the agent answers; raises ``LabError`` with the console's last lines."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                self.agent("guest-ping")
            except LabError as err:
                if time.monotonic() > deadline:
                    raise LabError(f"no agent: {err}: {self.console()[-2000:]}") from err
            else:
                return
            time.sleep(POLL_SECONDS)

    def agent(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run an agent command and return its ``return`` value; raises ``LabError``."""
        request = json.dumps({"execute": command, "arguments": arguments or {}})
        return json.loads(self._ask(request))["return"]

    def exec(self, command: str, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> str:
        """Run a shell command in the guest and return its output; raises ``LabError``."""
        started = self.agent(
            "guest-exec",
            {"path": "/bin/sh", "arg": ["-c", command], "capture-output": True},
        )
        deadline = time.monotonic() + timeout_seconds
        while not (status := self.agent("guest-exec-status", {"pid": started["pid"]}))["exited"]:
            if time.monotonic() > deadline:
                raise LabError(f"guest: {command}: still running after {timeout_seconds} s")
            time.sleep(POLL_SECONDS)
        out, err = (
            base64.b64decode(status.get(key, "")).decode("utf-8", "replace")
            for key in ("out-data", "err-data")
        )
        if status.get("exitcode") != 0:
            raise LabError(f"guest: {command}: {status}: {out}{err}")
        return out

    def is_frozen(self) -> bool:
        """Say whether file systems are frozen now."""
        return bool(self.agent("guest-fsfreeze-status") == "frozen")

    def freeze_log(self) -> list[str]:
        """Return "freeze" and "thaw" in the order in which they happened in the guest."""
        return self.exec("cat /tmp/freeze.log 2>/dev/null || :").split()

    def set_freeze_hook(self, script: str) -> None:
        """Have a shell script run at each freeze and thaw ($1); its failure fails the freeze."""
        text = base64.b64encode(f"#!/bin/sh\n{script}\n".encode()).decode()
        self.exec(f"echo {text} | base64 -d >/tmp/freeze-hook && chmod 755 /tmp/freeze-hook")


class AgentGuest(AgentGuestBase):
    """A guest of a lab whose agent answers; ``guest`` is what every lab guest can."""

    def __init__(self, guest: Guest) -> None:
        """Wrap a guest made by ``agent_guest``."""
        self.guest = guest

    def start(self) -> None:
        """Boot and wait until the agent answers; raises ``LabError``."""
        self.guest.start()
        self.wait_ready()

    def console(self) -> str:
        """Return what the guest's serial console has printed."""
        path = self.guest.options.console_log
        return path.read_text("utf-8", "replace") if path and path.exists() else ""

    def _ask(self, request: str) -> str:
        return self.guest.virsh.client(self.guest.name, CONNECT_SECONDS, "agent", request)


def agent_guest(lab: Lab, name: str = "linux1", disks: Sequence[DiskSpec] = ()) -> AgentGuest:
    """Define an agent guest in a lab (not started); raises ``LabError``."""
    options = GuestOptions(
        memory_mib=MEMORY_MIB,
        boot=boot_files(),
        has_agent=True,
        console_log=lab.images / "console.log",
    )
    return AgentGuest(lab.guest(name, disks, options))


def boot_files() -> BootFiles:
    """Return kernel and initramfs, made once per cache and version of ``mkguest``.

    A host without a network is given those of the machine it runs on, by ``BOOT_VARIABLE``.
    """
    if given := os.environ.get(BOOT_VARIABLE):
        return _boot_files(Path(given))
    version = hashlib.sha256(MAKER.read_bytes() + Path("/etc/os-release").read_bytes())
    made = cache_directory() / f"guest-{version.hexdigest()[:12]}"
    with (cache_directory() / "guest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            work = Path(tempfile.mkdtemp(prefix=".guest-", dir=cache_directory()))
            try:
                run([MAKER, work], timeout_seconds=MAKE_TIMEOUT_SECONDS)
                work.chmod(0o755)
                work.rename(made)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return _boot_files(made)


def _boot_files(directory: Path) -> BootFiles:
    """Return the files of a directory that ``mkguest`` made."""
    kernel, initrd = directory / "vmlinuz", directory / "initrd.gz"
    return BootFiles(kernel=kernel, initrd=initrd, cmdline=CMDLINE)


def make_ext4(path: Path, size: int = 64 * MIB) -> Path:
    """Make a qcow2 image with an empty ext4 on the whole disk; returns ``path``."""
    return _make_filesystem(path, size, ["mke2fs", "-q", "-F", "-t", "ext4"])


def make_xfs(path: Path, size: int = 320 * MIB) -> Path:
    """Make a qcow2 image with an empty xfs on the whole disk; returns ``path``.

    mkfs.xfs makes none of less than 300 MiB.
    """
    return _make_filesystem(path, size, ["mkfs.xfs", "-q", "-f"])


def _make_filesystem(path: Path, size: int, maker: Sequence[str]) -> Path:
    raw = path.with_suffix(".raw.new")
    with raw.open("wb") as file:
        file.truncate(size)
    try:
        run([*maker, raw])
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path])
    finally:
        raw.unlink()
    return path
