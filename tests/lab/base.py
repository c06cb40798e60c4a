"""What every kind of lab has: a directory, a libvirt of its own, guests, a thorough end."""

import contextlib
import grp
import html
import os
import pwd
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from tests.lab.command import LabError
from tests.lab.disks import DiskSpec
from tests.lab.guest import Guest, GuestOptions, GuestPlaces
from tests.lab.process import command_line, open_pid_file
from tests.lab.virsh import Virsh

CACHE_VARIABLE = "NBDBACKUP_LAB_CACHE"
DEFAULT_CACHE = Path("/var/tmp/nbdbackup-lab")
# any account that every Debian has and that owns nothing
UNPRIVILEGED_USER = "nobody"
CAPABILITIES = Path("qemu/capabilities")


def cache_directory() -> Path:
    """Return (and make) the directory for things that take long to make."""
    path = Path(os.environ.get(CACHE_VARIABLE, DEFAULT_CACHE))
    path.mkdir(parents=True, exist_ok=True)
    return path


class Lab(ABC):
    """A libvirt of its own below a short directory in /tmp; use it in a ``with`` statement.

    A Unix socket's path holds 107 bytes, and libvirt nests its sockets deeply: hence /tmp and
    not pytest's directories.  Images may lie anywhere.
    """

    iothreads: ClassVar[int] = 0
    """How many iothreads a guest has that does not say so itself: tests/system/conftest.py."""

    def __init__(self, *, qemu_user: str = "root") -> None:
        """Prepare directories; with another ``qemu_user`` libvirt changes owners as usual."""
        self.qemu_user = qemu_user
        self.directory = Path(tempfile.mkdtemp(prefix="nbl-", dir="/tmp"))
        self.images = self.directory / "i"
        self._monitors = self.directory / "m"
        self._guests: list[Guest] = []
        for path in (self.images, self._monitors):
            path.mkdir()
        if qemu_user != "root":
            self.directory.chmod(0o755)
            shutil.chown(self._monitors, qemu_user)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    @abstractmethod
    def uri(self) -> str:
        """Return the libvirt connection URI."""

    @property
    @abstractmethod
    def _cache(self) -> Path:
        """Return libvirt's cache directory."""

    @property
    @abstractmethod
    def _pid_files(self) -> Path:
        """Return the directory of libvirt's QEMU pid files."""

    @property
    @abstractmethod
    def _logs(self) -> Path:
        """Return the directory of libvirt's QEMU logs."""

    @property
    def virsh(self) -> Virsh:
        """Return ``virsh`` for this lab's libvirt."""
        return Virsh(self.uri)

    def guest(
        self,
        name: str = "vm1",
        disks: Sequence[DiskSpec] = (DiskSpec(),),
        options: GuestOptions | None = None,
    ) -> Guest:
        """Define a guest (not started); it is removed with the lab.  Raises ``LabError``."""
        places = GuestPlaces(
            monitor=self._monitors / f"{len(self._guests)}.qmp",
            qtest=self._monitors / f"{len(self._guests)}.qtest",
            # libvirt writes the name into this one as it stands in XML
            pid_file=self._pid_files / f"{html.escape(name).replace('&#x27;', '&apos;')}.pid",
            log=self._logs / f"{name}.log",
            images=self.images,
        )
        options = options or GuestOptions()
        if options.iothreads is None:
            options = replace(options, iothreads=self.iothreads)
        guest = Guest(self.virsh, name, disks, places, options)
        self._guests.append(guest)
        self._keep_capabilities()
        return guest

    def close(self) -> None:
        """Kill every QEMU of this lab and remove the directory; safe to call twice."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(self._kill_strays)
            for guest in self._guests:
                stack.callback(guest.close)

    def _qemu_conf(self) -> str:
        """Return qemu.conf: no confinement, no virtlogd, the chosen user."""
        lines = [
            f'user = "{self.qemu_user}"',
            f'group = "{self._qemu_group()}"',
            f"dynamic_ownership = {int(self.qemu_user != 'root')}",
            'security_driver = "none"',
            # a private mount namespace would hide file systems that a test mounts later
            "namespaces = []",
            'stdio_handler = "file"',
        ]
        return "\n".join(lines) + "\n"

    def _qemu_group(self) -> str:
        return grp.getgrgid(pwd.getpwnam(self.qemu_user).pw_gid).gr_name

    def _restore_capabilities(self) -> None:
        """Spare libvirt its probing of QEMU (4 s) where an earlier lab has done it.

        Libvirt itself drops what does not fit the installed QEMU, or its user, any more.
        """
        kept = cache_directory() / f"capabilities-{self.qemu_user}"
        if kept.is_dir():
            shutil.copytree(kept, self._cache / CAPABILITIES, dirs_exist_ok=True)

    def _keep_capabilities(self) -> None:
        kept = cache_directory() / f"capabilities-{self.qemu_user}"
        kept.mkdir(exist_ok=True)
        for path in (self._cache / CAPABILITIES).glob("*.xml"):
            new = kept / f".{path.name}.{os.getpid()}"
            shutil.copyfile(path, new)
            new.replace(kept / path.name)

    def _kill_strays(self) -> None:
        """Kill a QEMU that no Guest knows, such as one that the product started."""
        for path in self._pid_files.glob("*.pid"):
            with contextlib.ExitStack() as stack:
                process = open_pid_file(path)
                if process is None:
                    continue
                stack.enter_context(process)
                if any(str(self.directory) in word for word in command_line(process.pid)):
                    process.kill()


def unix_socket_path(path: Path) -> Path:
    """Return ``path`` if it fits a Unix socket address; raises ``LabError`` else."""
    if len(os.fsencode(path)) > 107:
        raise LabError(f"too long for a Unix socket: {path}")
    return path
