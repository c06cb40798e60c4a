"""What this host knows of each boot, beside its overlays: enough to end it or to go on with it.

``<scratch>/boot/<name>/`` holds ``boot.json``, the overlays and private firmware files; it
survives a power cut, as what the guest wrote must. ``<runtime>/boot/<name>/`` holds the sockets.
The lock ``<runtime>/boot/<name>.lock`` tells whether a process attends to the boot now.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, durable, rundir
from nbdbackupd.errors import BusyError, FormatError, RepositoryError, UnsupportedVersionError
from nbdbackupd.files import open_untrusted
from nbdbackupd.ops.domain import locks
from nbdbackupd.repo import layout

log = logging.getLogger(__name__)
VERSION: Final = 1
FOLDER: Final = "boot"
NOTE: Final = "boot.json"
CONSOLE: Final = "console.log"
MAX_NOTE: Final = 16 << 20
MAX_NAME: Final = 48
"""Bytes of a directory's name: the path of a socket in it is bounded."""


class Phase(StrEnum):
    """How far a boot is.

    ``PIVOTING``: the guest is paused, so that overlays and copies are equal, and some of the disks
    are on their copies already. ``PIVOTED``: all are.
    """

    STARTING = "starting"
    RUNNING = "running"
    COPYING = "copying"
    PIVOTING = "pivoting"
    PIVOTED = "pivoted"


@dataclass(frozen=True, kw_only=True, slots=True)
class BootDisk:
    """One disk: its ``overlay``, and for a live restore its image to be and that one's format.

    ``size`` in bytes.
    """

    target: str
    size: int
    overlay: str
    socket: str
    final: str = ""
    format: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BootRecord:
    """One boot. ``attended``: it ends with the process that holds its lock.

    ``output`` is where a live restore copies to, or empty; ``definition`` is then the domain's XML
    on the copies, ``files`` what else lies there, ``define`` whether it becomes persistent.
    ``xml`` is what the domain is started with, ``tpm`` the directory of its TPM's state.
    ``held``: we have paused the guest, and must let it go on.
    """

    name: str
    uri: str
    source: str
    point: str
    created: str
    started: str
    attended: bool
    phase: Phase
    uuid: str = ""
    disks: tuple[BootDisk, ...] = ()
    files: tuple[str, ...] = ()
    output: str = ""
    define: bool = False
    xml: str = ""
    definition: str = ""
    tpm: str = ""
    held: bool = False

    def pack(self) -> bytes:
        """The record's JSON."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, path: Path) -> "BootRecord":
        """Read a record. Raises FormatError, UnsupportedVersionError."""
        try:
            document = documents.parse_json(data)
            version = document.pop("version")
        except (ValueError, AttributeError, KeyError, TypeError) as err:
            raise FormatError("the note of a boot is damaged", file=path) from err
        if version != VERSION:
            raise UnsupportedVersionError(
                f"the note of a boot has version {version}, known is {VERSION}", file=path
            )
        try:
            disks = tuple(BootDisk(**each) for each in document.pop("disks"))
            files = tuple(document.pop("files"))
            phase = Phase(document.pop("phase"))
            return cls(disks=disks, files=files, phase=phase, **document)
        except (TypeError, ValueError, KeyError) as err:
            raise FormatError(f"the note of a boot is damaged: {err}", file=path) from err


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where the files of the boot ``name`` are; see the module."""

    name: str
    runtime_dir: Path
    work: Path
    sockets: Path
    lock: Path

    @classmethod
    def of(cls, name: str, runtime_dir: Path, scratch_dir: Path) -> "Places":
        """The places of a boot. Raises FormatError for an empty name."""
        folder = layout.escape(name, MAX_NAME)
        return cls(
            name=name,
            runtime_dir=runtime_dir,
            work=scratch_dir / FOLDER / folder,
            sockets=runtime_dir / rundir.BOOT / folder,
            lock=runtime_dir / rundir.BOOT / f"{folder}.lock",
        )

    @property
    def note(self) -> Path:
        """The record's file."""
        return self.work / NOTE

    @property
    def console(self) -> Path:
        """What the guest says on its first serial port."""
        return self.work / CONSOLE

    def read(self) -> BootRecord | None:
        """The record, or None if there is no such boot. Raises FormatError, RepositoryError."""
        return _read(self.note)

    def write(self, record: BootRecord) -> None:
        """Write the record, durably. Raises RepositoryError, NoSpaceError."""
        with durable.translate_os_errors("write", self.note):
            durable.write_atomic(self.note, record.pack(), mode=0o600)

    def make(self) -> None:
        """Make all directories. Raises RepositoryError, NoSpaceError."""
        for path in (self.work, self.sockets):
            with durable.translate_os_errors("create", path):
                durable.make_directory(path, rundir.PASSED)

    def remove(self) -> None:
        """Remove all but the lock, the record last; what is gone is fine.

        Raises RepositoryError.
        """
        for top in (self.sockets, self.work):
            with durable.translate_os_errors("remove", top):
                _remove_tree(top, last=self.note)
        # the next boot makes it again
        with contextlib.suppress(OSError):
            self.work.parent.rmdir()

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Hold the lock: nobody else ends this boot or goes on with it.

        Raises BusyError that names the holder.
        """
        with durable.translate_os_errors("lock", self.lock):
            durable.make_directory(self.lock.parent, rundir.PASSED)
            lock = durable.Lock(self.lock, owner=f"boot of {self.name}")
            try:
                lock.__enter__()
            except BusyError as err:
                who = durable.holder(self.lock)
                raise BusyError(f"{self.name} is attended to by {who}") from err
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def attendant(self) -> str:
        """Who attends to it now, or nothing."""
        return locks.holder(self.lock)


def all_of(scratch_dir: Path, runtime_dir: Path) -> list[tuple[Places, BootRecord]]:
    """All boots with a record, by name; what can't be read is logged and left alone."""
    found = []
    with durable.translate_os_errors("read", scratch_dir / FOLDER):
        folders = sorted((scratch_dir / FOLDER).glob(f"*/{NOTE}"))
    for path in folders:
        try:
            record = _read(path)
        except (FormatError, RepositoryError) as err:
            log.warning("%s", err)
            continue
        if record is not None:
            found.append((Places.of(record.name, runtime_dir, scratch_dir), record))
    return sorted(found, key=lambda each: each[1].name)


def _read(path: Path) -> BootRecord | None:
    with durable.translate_os_errors("read", path):
        try:
            fd = open_untrusted(path)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            data = file.read(MAX_NOTE + 1)
    if len(data) > MAX_NOTE:
        raise FormatError("the note of a boot is too large", file=path)
    return BootRecord.parse(data, path)


def _remove_tree(top: Path, last: Path) -> None:
    if not top.is_dir() or top.is_symlink():
        return
    for folder, folders, files in os.walk(top, topdown=False):
        here = Path(folder)
        for name in files:
            if here / name != last:
                (here / name).unlink(missing_ok=True)
        for name in folders:
            path = here / name
            path.unlink() if path.is_symlink() else path.rmdir()
    last.unlink(missing_ok=True) if last.parent == top else None
    top.rmdir()


def describe(record: BootRecord, *, running: bool | None, attendant: str) -> dict[str, Any]:
    """A boot as ``boot --list --json`` tells it; ``running`` None: libvirt was not asked."""
    return {
        "name": record.name,
        "uuid": record.uuid,
        "source": record.source,
        "point": record.point,
        "created": record.created,
        "started": record.started,
        "phase": record.phase.value,
        "running": running,
        "attended_by": attendant,
        "output": record.output,
    }
