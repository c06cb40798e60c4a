"""Maps that are up: their directories, who keeps them alive, and how they end.

Each map has a directory ``<runtime directory>/map/<id>/`` with sockets, ids of processes, a note,
and a file that the servers, and the one who started them, hold locked: as long as one of them
lives, so does the map. What is left of one whose processes are all gone is removed by the next
one who looks.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents, durable, rundir
from nbdbackupd.errors import BusyError, NbdbackupError
from nbdbackupd.ops.map import kernel_nbd

log = logging.getLogger(__name__)

NOTE: Final = "map.json"
LOCK: Final = "lock"
GATE: Final = "gate"
GATE_SECONDS: Final = 30.0
END_SECONDS: Final = 20.0
GRACE_SECONDS: Final = 1.0
"""A server that is asked to end waits for its clients, which may never leave."""

KILL_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedDisk:
    """One disk that is served: ``size`` in bytes, NBD ``uri``, process ``pid``.

    ``socket`` is None for TCP; ``device`` is the kernel's, if it was asked for.
    """

    target: str
    size: int
    uri: str
    socket: Path | None
    pid: int
    device: Path | None = None

    def describe(self) -> dict[str, Any]:
        """The disk as in the reports."""
        return {
            "target": self.target,
            "size": self.size,
            "uri": self.uri,
            "socket": str(self.socket) if self.socket else None,
            "device": str(self.device) if self.device else None,
            "pid": self.pid,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapping:
    """A map. ``keeper`` is the process that it ends with, 0 if it goes on by itself.

    ``source`` is the path of the set, or of the newest of a sequence of files; then ``point`` and
    ``domain`` are empty.
    """

    id: str
    purpose: str
    source: str
    point: str
    domain: str
    created: str
    writable: bool
    keeper: int
    disks: tuple[ServedDisk, ...]

    def to_json(self) -> dict[str, Any]:
        """The map as in the reports."""
        return {
            "id": self.id,
            "purpose": self.purpose,
            "source": self.source,
            "point": self.point,
            "domain": self.domain,
            "created": self.created,
            "writable": self.writable,
            "keeper": self.keeper,
            "disks": [disk.describe() for disk in self.disks],
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Mapping":
        """What ``to_json`` gave."""
        disks = []
        for each in document["disks"]:
            paths = {name: each[name] and Path(each[name]) for name in ("socket", "device")}
            disks.append(ServedDisk(**{**each, **paths}))
        return cls(**{**document, "disks": tuple(disks)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """The directory of a map that is being made; ``lock`` is the descriptor to be inherited."""

    path: Path
    lock: int


def make_home(runtime_dir: Path) -> Home:
    """Make the directory of a new map; leftovers of dead ones are removed first.

    Raises RepositoryError, BusyError.
    """
    with durable.translate_os_errors("create", runtime_dir / rundir.MAP):
        top = rundir.make(runtime_dir, rundir.MAP, rundir.PASSED)
        with durable.Lock(top / GATE, owner="map", wait=durable.Wait(seconds=GATE_SECONDS)):
            _sweep(top)
            path = top / secrets.token_hex(4)
            path.mkdir(0o700)
            lock = durable.create_exclusive(path / LOCK)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return Home(path=path, lock=lock)


def discard(place: Home) -> None:
    """Remove the directory with all that is in it: the map has ended."""
    shutil.rmtree(place.path, ignore_errors=True)
    os.close(place.lock)


def note(place: Home, mapping: Mapping) -> None:
    """Write down what is served, for ``known`` and ``end``."""
    data = json.dumps(mapping.to_json()).encode()
    with durable.translate_os_errors("write", place.path / NOTE):
        durable.write_atomic(place.path / NOTE, data)


def known(runtime_dir: Path) -> tuple[Mapping, ...]:
    """All maps that are up, in the order of their ids; leftovers of dead ones are removed.

    Raises RepositoryError if the directory can't be read, BusyError.
    """
    top = runtime_dir / rundir.MAP
    if not top.is_dir():
        return ()
    with durable.translate_os_errors("read", top):
        with durable.Lock(top / GATE, owner="map", wait=durable.Wait(seconds=GATE_SECONDS)):
            _sweep(top)
        found = [_read(path) for path in sorted(top.iterdir()) if path.is_dir()]
    return tuple(each for each in found if each is not None)


def end(mapping: Mapping, runtime_dir: Path) -> None:
    """End a map and wait until nothing of it is left.

    Raises BusyError if a process of it does not end, ProcessError if the kernel's device can't be
    detached.
    """
    top = runtime_dir / rundir.MAP
    path = top / mapping.id
    for disk in mapping.disks:
        if disk.device is not None:
            kernel_nbd.detach(disk.device)
    servers = [disk.pid for disk in mapping.disks]
    # a keeper cleans up by itself when it is asked to end
    _signal([mapping.keeper] if mapping.keeper else servers, path / LOCK, signal.SIGTERM)
    if not _wait(path / LOCK, END_SECONDS if mapping.keeper else GRACE_SECONDS):
        _signal([mapping.keeper, *servers], path / LOCK, signal.SIGKILL)
        if not _wait(path / LOCK, KILL_SECONDS):
            raise BusyError(f"the servers of map {mapping.id} do not end, see {path}")
    gate = durable.Lock(top / GATE, owner="unmap", wait=durable.Wait(seconds=GATE_SECONDS))
    with durable.translate_os_errors("remove", path), gate:
        _remove(path, mapping)


def stop(pid_file: Path, place: Home) -> None:
    """End a server that was started a moment ago and is in no note, if it has started at all."""
    with contextlib.suppress(OSError, ValueError):
        _signal([int(pid_file.read_text())], place.path / LOCK, signal.SIGTERM)


def remove_socket(path: Path | None) -> None:
    """Remove a socket that nobody needs any more; what is no socket stays."""
    if path is not None:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                path.unlink()


def _sweep(top: Path) -> None:
    for path in top.iterdir():
        if path.is_dir() and not durable.is_locked(path / LOCK):
            mapping = _read(path)
            for disk in mapping.disks if mapping else ():
                if disk.device is not None:
                    with contextlib.suppress(NbdbackupError):
                        kernel_nbd.detach(disk.device)
            _remove(path, mapping)


def _remove(path: Path, mapping: Mapping | None) -> None:
    for disk in mapping.disks if mapping else ():
        remove_socket(disk.socket)
    shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> Mapping | None:
    """The note, or None if it is not written yet, or not by this version."""
    try:
        return Mapping.from_json(documents.parse_json((path / NOTE).read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _wait(lock: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while durable.is_locked(lock):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _signal(pids: Iterable[int], lock: Path, signum: signal.Signals) -> None:
    """Signal those of the processes that have the lock open: an id may be a stranger's by now."""
    for pid in pids:
        if pid <= 0:
            continue
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(pid)
            try:
                if _holds(pid, lock):
                    signal.pidfd_send_signal(fd, signum)
            finally:
                os.close(fd)


def _holds(pid: int, lock: Path) -> bool:
    mine = lock.stat()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samestat(link.stat(), mine):
                return True
    return False
