"""The host that a connection to libvirt leads to: its files and its programs.

What belongs to a guest lies on the host that it runs on, which may be another one than ours. So
who looks at such a thing asks the connection's host for it (``Where``): this one (``Here``), or
another one by ssh (``source/ssh.py``). What is ours, sets, locks, notes, is always here.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from nbdbackupd import durable, proc


@dataclass(frozen=True, slots=True)
class Facts:
    """What tells a file from others: ``mode`` as in stat(2), size in bytes."""

    mode: int
    device: int
    inode: int
    size: int


class Where(Protocol):
    """A host with guests. What fails raises SourceError, or OSError here."""

    @property
    def is_here(self) -> bool:
        """Whether it is this host."""

    @property
    def name(self) -> str:
        """What it is called, for messages."""

    @property
    def id(self) -> str:
        """What tells it from other hosts, hexadecimal; empty for this one."""

    @property
    def boot(self) -> str:
        """What tells this run of its kernel from others; empty if that is not known."""

    @property
    def config(self) -> str:
        """A file for ssh that another process needs to get there; empty: the usual ones."""

    @property
    def runtime_dir(self) -> Path:
        """Our runtime directory, in which all that leads there lies."""

    def is_lost(self) -> bool:
        """Whether nothing leads there any more."""

    def output(self, argv: Sequence[str], *, timeout: float) -> str:
        """Run one of its programs to the end; what that has printed."""

    def facts(self, path: str) -> Facts | None:
        """What is at a path, links followed; None: nothing that can be seen."""

    def near(self, path: Path) -> AbstractContextManager[Path]:
        """Where a file can be read here, for the body."""

    def touch(self, file: Path) -> None:
        """Make an empty file, and its directory; one that exists is an error."""

    def tree(self, directory: Path) -> list[Path]:
        """The regular files below a directory that is not there in vain, links not followed."""

    def make_directory(self, path: Path, mode: int) -> None:
        """Make one and its parents; one that exists is left as it is."""

    def free_bytes(self, directory: Path) -> int:
        """What unprivileged writers may write to its file system."""

    def names(self, directory: Path) -> list[str]:
        """What lies in a directory; nothing if that is not there."""

    def remove(self, file: Path) -> bool:
        """Remove a file; False if there was none."""

    def scratch_dir(self, directory: Path) -> Path:
        """Where QEMU's scratch files of ours lie, in that one."""

    def server_socket(self, socket: Path) -> Path:
        """Where QEMU listens for us, who connect to ``socket``."""

    def lead(self, socket: Path, owner: tuple[int, int] | None) -> None:
        """Let QEMU (``owner``) make the server's socket, and lead what connects to ours there."""

    def leave(self, socket: Path) -> None:
        """Remove what ``lead`` has made on another host; a file that is gone is fine."""

    def cut(self, socket: Path) -> None:
        """See that no connection of a dead run leads to the server of ``socket``, or BusyError."""


class Here:
    """This host."""

    is_here: Final = True
    name: Final = "this host"
    id: Final = ""
    config: Final = ""
    runtime_dir: Final = Path()

    @property
    def boot(self) -> str:
        """See ``Where``."""
        with suppress(OSError):
            return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return ""

    def is_lost(self) -> bool:
        """See ``Where``."""
        return False

    def output(self, argv: Sequence[str], *, timeout: float) -> str:
        """See ``Where``."""
        return proc.output(argv, timeout=timeout)

    def facts(self, path: str) -> Facts | None:
        """See ``Where``."""
        try:
            found = os.stat(path)  # noqa: PTH116 - a name that may be no path at all
        except (OSError, ValueError):
            return None
        return Facts(found.st_mode, found.st_dev, found.st_ino, found.st_size)

    def near(self, path: Path) -> AbstractContextManager[Path]:
        """See ``Where``."""
        return nullcontext(path)

    def touch(self, file: Path) -> None:
        """See ``Where``."""
        durable.make_directory(file.parent, 0o755)
        os.close(durable.create_exclusive(file))

    def tree(self, directory: Path) -> list[Path]:
        """See ``Where``."""
        found: list[Path] = []

        def refuse(err: OSError) -> None:
            raise err

        for place, below, names in os.walk(directory, onerror=refuse):
            below.sort()
            files = (Path(place, name) for name in sorted(names))
            found += [each for each in files if each.is_file() and not each.is_symlink()]
        return found

    def make_directory(self, path: Path, mode: int) -> None:
        """See ``Where``."""
        durable.make_directory(path, mode)

    def free_bytes(self, directory: Path) -> int:
        """See ``Where``."""
        found = os.statvfs(directory)
        return found.f_bavail * found.f_frsize

    def names(self, directory: Path) -> list[str]:
        """See ``Where``."""
        return sorted(each.name for each in directory.iterdir()) if directory.is_dir() else []

    def remove(self, file: Path) -> bool:
        """See ``Where``."""
        try:
            file.unlink()
        except FileNotFoundError:
            return False
        return True

    def scratch_dir(self, directory: Path) -> Path:
        """See ``Where``."""
        return directory

    def server_socket(self, socket: Path) -> Path:
        """See ``Where``."""
        return socket

    def lead(self, socket: Path, owner: tuple[int, int] | None) -> None:
        """See ``Where``: nothing is between."""

    def leave(self, socket: Path) -> None:
        """See ``Where``."""

    def cut(self, socket: Path) -> None:
        """See ``Where``: the kernel has closed what was a dead process's."""


HERE: Final = Here()
