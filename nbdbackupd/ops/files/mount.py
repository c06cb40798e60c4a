"""The files of a restore point in a directory, read-only, while somebody wants them.

Three programs stand in a row, each a process of its own that dies with us: nbdkit serves the disk
(``ops/map/map.py``), nbdfuse shows it as a file, and a reader shows the files in it. A mount
has a directory ``<runtime directory>/mounts/<id>/`` that is locked as long as we live. What is
left of one whose keeper was killed is taken away by the next who looks.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, durable, proc, rundir
from nbdbackupd.errors import BusyError, IntegrityError, ProcessError, RepositoryError, UsageError
from nbdbackupd.model import file_systems
from nbdbackupd.model.file_systems import FileSystem
from nbdbackupd.ops.files import fuse, probe, readers
from nbdbackupd.ops.files.readers import Reader, Source
from nbdbackupd.ops.map import map as mapping
from nbdbackupd.ops.map.map import MapRequest
from nbdbackupd.plain import versioned

log = logging.getLogger(__name__)

GATE: Final = "gate"
GATE_SECONDS: Final = 60.0
LOCK: Final = "lock"
NOTE: Final = "note.json"
PURPOSE: Final = "mount"
DISK: Final = "disk"
"""The file in which nbdfuse shows one."""

START_SECONDS: Final = 60.0
END_SECONDS: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MountRequest:
    """Which files to show: of the disks that ``map`` chooses.

    ``partition`` is a number, or a logical volume as ``group/name``; empty: the only file system.
    ``tool`` is one of ``files_readers.TOOLS``, or empty for the best one. ``replay``: the journal
    is replayed on a copy of what it changes, which is thrown away.
    """

    map: MapRequest
    partition: str = ""
    tool: str = ""
    replay: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MountedTree:
    """A file system that is shown at ``path``.

    ``notes`` tell what the reader can't do; ``warnings`` what of the set is not sound. ``check``
    tells how many damaged blocks were met, and raises ProcessError if a program has died.
    ``abort`` lets whoever waits for a byte of it fail at once. ``has_inodes``: inode numbers are
    those of the file system; libfuse may make them up, and gives one to another file later.
    """

    path: Path
    point: str
    domain: str
    created: str
    file_system: FileSystem
    reader: Reader
    has_inodes: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    check: Callable[[], int]
    abort: Callable[[], None]

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document, schema version 1."""
        return versioned(
            directory=str(self.path),
            point=self.point,
            domain=self.domain,
            created=self.created,
            file_system=self.file_system.to_json(),
            tool=self.reader.tool,
            notes=list(self.notes),
            warnings=list(self.warnings),
        )

    def wait(self, is_over: Callable[[], bool]) -> int:
        """Wait until somebody unmounts it, or it is over; how many damaged blocks were met.

        Raises as ``check``.
        """
        damaged = 0
        while fuse.is_mounted(self.path) and not is_over():
            damaged = self.check()
            time.sleep(fuse.WATCH_SECONDS)
        return damaged


def look(request: MountRequest, *, cancelled: Callable[[], None]) -> tuple[FileSystem, ...]:
    """What there is on the disks; raises as ``opened``."""
    with ExitStack() as stack:
        return _served(request, stack, cancelled).found


@contextmanager
def opened(
    request: MountRequest, *, at: Path | None = None, cancelled: Callable[[], None]
) -> Iterator[MountedTree]:
    """Show the files of one file system in ``at``, or in a directory of our own, for the block.

    Main thread only: the programs die with the thread that starts them. Raises UsageError if it
    is not clear which file system is meant, or ``at`` is no empty directory, NotSupportedError if
    nothing here can read it, ConfigError without FUSE, ProcessError, and as ``map.serving``.
    """
    if at is not None:
        at = _checked(at)
    with ExitStack() as stack:
        served = _served(request, stack, cancelled)
        chosen = file_systems.choose(served.found, request.partition)
        reader = readers.choose(chosen, tool=request.tool, replay=request.replay)
        if at is None:
            at = served.home / "files"
            at.mkdir(0o700)
        else:
            _note(served.home, at, reader)
        poll = stack.enter_context(
            readers.mounted(
                reader, served.sources, chosen, at, replay=request.replay, cancelled=cancelled
            )
        )

        def check() -> int:
            status = poll()
            # status 0: somebody has unmounted it
            if status is not None and (status or fuse.is_mounted(at)):
                raise ProcessError(f"{reader.tool} ended with status {status}: {at} is gone")
            return served.check()

        # 1 is libfuse's number of the root; fuse2fs has made them up since it is built with FUSE 3
        with durable.translate_os_errors("read", at):
            has_inodes = at.stat().st_ino != 1
        notes = reader.notes
        if not has_inodes and chosen.type in file_systems.EXT:
            notes = (*notes, f"{reader.tool} does not tell which names are of one file")
        mapped = served.up.mapping
        yield MountedTree(
            path=at, point=mapped.point, domain=mapped.domain, created=mapped.created,
            file_system=chosen, reader=reader, has_inodes=has_inodes, notes=notes,
            warnings=served.up.warnings, check=check, abort=served.abort,
        )  # fmt: skip


def end(directory: Path, runtime_dir: Path, *, lazy: bool = False) -> None:
    """Unmount what ``mount`` has mounted at a directory, and wait until nothing is left of it.

    ``lazy``: also if it is in use. Raises UsageError if there is no such mount, BusyError if it
    is in use or its keeper does not end, ProcessError.
    """
    path = Path(os.path.realpath(directory))
    top = runtime_dir / rundir.MOUNTS
    noted = [each for each in _sessions(runtime_dir) if _noted(each).get("at") == str(path)]
    if not noted:
        if not any(each.path == path for each in fuse.table()):
            raise UsageError(f"nothing is mounted at {path}")
        raise UsageError(f"what is mounted at {path} is not ours: see umount(8)")
    (session,) = noted[:1]
    kernel = _noted(session).get("tool") == readers.KERNEL
    if lazy:
        fuse.detach(path, kernel=kernel)
    else:
        fuse.unmount_unused(path, kernel=kernel)
    deadline = time.monotonic() + END_SECONDS
    while session.exists():
        if time.monotonic() > deadline:
            raise BusyError(f"the keeper of the mount at {path} does not end, see {session}")
        time.sleep(fuse.WATCH_SECONDS)
        if not _is_held(session):
            with _gate(top):
                _sweep(top)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Served:
    """The disks of a point as files."""

    home: Path
    up: mapping.Serving
    sources: tuple[Source, ...]
    found: tuple[FileSystem, ...]
    check: Callable[[], int]
    abort: Callable[[], None]


def _served(request: MountRequest, stack: ExitStack, cancelled: Callable[[], None]) -> _Served:
    fuse.require_fuse()
    # before the lock of our own directory: its sweep needs nothing of ours
    home = stack.enter_context(_home(request.map.runtime_dir))
    wanted = replace(request.map, writable=request.replay, prove=True, purpose=PURPOSE)
    up = stack.enter_context(mapping.serving(wanted, cancelled=cancelled))
    programs: list[proc.Process] = []
    sources = []
    for number, disk in enumerate(up.disks):
        at = home / f"{number}"
        at.mkdir(0o700)
        file = at / DISK
        access = [] if request.replay else ["-r"]
        argv = ["nbdfuse", *access, "-o", "auto_unmount", str(file), disk.uri]
        programs.append(
            stack.enter_context(
                fuse.foreground(
                    argv, at, seconds=START_SECONDS, cancelled=cancelled, busy_seconds=0.5
                )
            )
        )
        sources.append(Source(disk=disk.target, file=file))
    try:
        found = probe.probe_all([(source.disk, source.file) for source in sources])
    except RepositoryError as err:
        if up.check():
            message = "the backup is damaged where partitions and file systems are told"
            raise IntegrityError(message) from err
        raise

    def check() -> int:
        for program in programs:
            program.check()
        return up.check()

    def abort() -> None:
        # whoever waits for a byte of the disk gets an error at once
        for program in programs:
            program.stop(0.0)

    return _Served(home=home, up=up, sources=tuple(sources), found=found, check=check, abort=abort)


def _checked(at: Path) -> Path:
    """The directory to mount on, without links."""
    path = Path(os.path.realpath(at))
    if fuse.is_mounted(path):
        raise UsageError(f"something is mounted at {path} already")
    try:
        empty = not any(path.iterdir())
    except OSError as err:
        raise UsageError(
            f"can't mount at {path}: {err.strerror}; give an empty directory that exists"
        ) from err
    if not empty:
        raise UsageError(f"{path} is not empty: its files could not be seen, give another one")
    return path


@contextmanager
def _home(runtime_dir: Path) -> Iterator[Path]:
    """A directory for one mount, removed at the end."""
    with durable.translate_os_errors("create", runtime_dir / rundir.MOUNTS):
        top = rundir.make(runtime_dir, rundir.MOUNTS)
        with _gate(top):
            _sweep(top)
            path = Path(os.path.realpath(top)) / secrets.token_hex(4)
            path.mkdir(0o700)
            lock = durable.create_exclusive(path / LOCK)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


def _gate(top: Path) -> durable.Lock:
    return durable.Lock(top / GATE, owner="mount", wait=durable.Wait(seconds=GATE_SECONDS))


def _sessions(runtime_dir: Path) -> list[Path]:
    """The mounts whose keeper lives; what dead ones left is taken away."""
    top = runtime_dir / rundir.MOUNTS
    if not top.is_dir():
        return []
    with durable.translate_os_errors("read", top), _gate(top):
        _sweep(top)
        return [each for each in top.iterdir() if each.is_dir()]


def _sweep(top: Path) -> None:
    for path in top.iterdir():
        if path.is_dir() and not _is_held(path):
            log.info("removing what a killed mount left: %s", path)
            real = Path(os.path.realpath(path))
            at = _noted(path).get("at")
            for each in reversed(fuse.table()):
                inside = real in each.path.parents
                if inside or (str(each.path) == at and _is_of(each, real)):
                    fuse.unmount(each.path, kernel=each.source.startswith("/dev/loop"))
            _remove(path)


def _is_of(mount: fuse.Mount, home: Path) -> bool:
    """Whether a mount outside of its home belongs to it; the directory may be another's by now."""
    if mount.source.startswith("/dev/loop"):
        number = mount.source.removeprefix("/dev/")
        try:
            backing = Path(f"/sys/block/{number}/loop/backing_file").read_text().strip()
        except OSError:
            return False
        # the path begins where nbdfuse's mount was, when that has gone
        return backing.startswith(f"{home}/") or backing == f"/{DISK}"
    return mount.source.startswith(f"{home}/") or mount.type in (
        "fuse.grub-mount",
        "fuse.grub2-mount",
        "fuse.guestmount",
        "fuse",
    )


def _is_held(path: Path) -> bool:
    try:
        return durable.is_locked(path / LOCK)
    except OSError:
        return False


def _note(home: Path, at: Path, reader: Reader) -> None:
    data = json.dumps({"at": str(at), "tool": reader.tool, "pid": os.getpid()}).encode()
    with durable.translate_os_errors("write", home / NOTE):
        durable.write_atomic(home / NOTE, data)


def _noted(path: Path) -> dict[str, Any]:
    try:
        document = documents.parse_json((path / NOTE).read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _remove(path: Path) -> None:
    """Remove a session's directory: never what is mounted in it, were it still there."""
    for each in sorted(path.iterdir(), reverse=True) if path.is_dir() else ():
        # a mount whose program has gone answers each question with an error
        with contextlib.suppress(OSError):
            if each.is_dir():
                each.rmdir()
            else:
                each.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()
    if path.exists():
        log.warning("%s can't be removed, something is mounted there", path)
