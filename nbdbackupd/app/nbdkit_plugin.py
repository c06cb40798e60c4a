"""What nbdkit's Python plugin loads to serve one disk: its callbacks, see nbdkit-python-plugin(3).

Parameters: ``plan``, the descriptor of a file with a ``ServedPlan``, made by
``ops/map/map.py``, and ``report``, that of a socket on which damage is told, a line each
(nbdkit's own log has it, too). When the other end of that is gone, so is the one who started us,
and we go at once: nbdkit would wait for its clients, and it takes signals of a dead parent for
itself (PR_SET_PDEATHSIG, seen with 1.32). Without ``report`` nobody needs to live.
"""

import errno
import itertools
import os
import select
import threading
from pathlib import Path
from typing import Final

import nbdkit

from nbdbackupd import documents
from nbdbackupd.errors import IntegrityError
from nbdbackupd.ops.map.reader import ServedDisk, ServedPlan

API_VERSION = 2

PREFERRED: Final = 64 << 10
LARGEST: Final = 32 << 20

_given: dict[str, str] = {}
_disks: list[ServedDisk] = []


def thread_model() -> int:
    """Many requests at once: reading, hashing and unpacking go on without Python's lock."""
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key: str, value: str) -> None:
    """Take a parameter."""
    if key not in ("plan", "report"):
        raise ValueError(f"unknown parameter: {key}")
    _given[key] = value


def config_complete() -> None:
    """All parameters are there."""
    if "plan" not in _given:
        raise ValueError("the plan is missing: this plugin is started by nbdbackupctl map")


def get_ready() -> None:
    """Open the disk, before the server says that it is ready."""
    document = Path(f"/proc/self/fd/{int(_given['plan'])}").read_text(encoding="utf-8")
    plan = ServedPlan.from_json(documents.parse_json(document))
    _disks.append(ServedDisk(plan, _tell))


def after_fork() -> None:
    """Begin to watch who started us; threads do not survive a fork."""
    if "report" in _given:
        os.set_blocking(int(_given["report"]), False)
        threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    poller = select.poll()
    poller.register(int(_given["report"]), select.POLLIN)
    poller.poll()  # nothing is ever sent to us: this is the end of the other one
    os._exit(0)


def _tell(line: str) -> None:
    """Say a line to the one who started us, unless nobody reads: serving must go on."""
    report = _given.get("report")
    if report is not None:
        try:
            os.write(int(report), f"{line}\n".encode(errors="backslashreplace"))
        except OSError:
            nbdkit.debug("nobody reads the report")


def open(readonly: bool) -> ServedDisk:  # noqa: A001, ARG001 - nbdkit's name
    """A connection; all see the same disk."""
    return _disks[0]


def can_multi_conn(_disk: ServedDisk) -> bool:
    """A client may use several connections: nothing is ever written."""
    return True


def can_write(_disk: ServedDisk) -> bool:
    """A backup is not written to."""
    return False


def can_extents(_disk: ServedDisk) -> bool:
    """Holes are known."""
    return True


def can_cache(_disk: ServedDisk) -> int:
    """Reading ahead on demand is left to the client."""
    return nbdkit.CACHE_NONE


def block_size(_disk: ServedDisk) -> tuple[int, int, int]:
    """Any range can be read."""
    return 1, PREFERRED, LARGEST


def get_size(disk: ServedDisk) -> int:
    """Size of the disk, in bytes."""
    return disk.size


def pread(disk: ServedDisk, buffer: bytearray, offset: int, _flags: int) -> None:
    """Read; damage is EIO."""
    try:
        disk.read(memoryview(buffer), offset)
    except IntegrityError as err:
        nbdkit.set_error(errno.EIO)
        raise RuntimeError(str(err)) from None
    except OSError as err:
        nbdkit.set_error(err.errno or errno.EIO)
        raise


def extents(disk: ServedDisk, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Which parts are zero."""
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    most = 1 if flags & nbdkit.FLAG_REQ_ONE else None
    found = itertools.islice(disk.extents(offset, count), most)
    try:
        return [(start, length, hole if is_zero else 0) for start, length, is_zero in found]
    except IntegrityError as err:
        nbdkit.set_error(errno.EIO)
        raise RuntimeError(str(err)) from None
