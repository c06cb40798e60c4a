"""Who reads a set for long keeps its files there: a shared lock on ``.reading`` in the set.

Removal takes it exclusively, and puts off what it can't take now. A set into which nothing can be
written is read without; nothing is removed from there either.
"""

import fcntl
import logging
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nbdbackupd.errors import BusyError
from nbdbackupd.repo import layout

log = logging.getLogger(__name__)
WAIT_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.05
FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Held:
    """A lock on a set's files, let go of with the last who knows it, or by ``release``.

    ``fd`` may be inherited, and holds the lock, too.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.release = weakref.finalize(self, os.close, fd)


def make(root: Path) -> None:
    """Have the lock in a set from its first point on, so that reading adds nothing to it."""
    try:
        os.close(os.open(root / layout.READING, os.O_RDONLY | os.O_CREAT | FLAGS, 0o600))
    except OSError as err:
        log.debug("%s is made without a lock for who reads it: %s", root, err.strerror)


def hold(root: Path) -> Held | None:
    """Keep the files of a set from being removed; None where there is no such lock.

    Raises BusyError if they are being removed for longer than a minute.
    """
    path = root / layout.READING
    try:
        fd = _open(path)
    except OSError as err:
        log.debug("%s is read without a lock: %s", root, err.strerror)
        return None
    held = Held(fd)
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BusyError(f"files of {root} are being removed: try later") from None
            time.sleep(POLL_SECONDS)
        except OSError as err:
            log.debug("%s is read without a lock: %s", root, err.strerror)
            return None
        else:
            return held


@contextmanager
def held(root: Path) -> Iterator[None]:
    """``hold`` during the body."""
    found = hold(root)
    try:
        yield
    finally:
        if found is not None:
            found.release()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | FLAGS)
    except FileNotFoundError:
        if not (path.parent / layout.POINTS).is_dir():
            raise
        # who may open a file for reading may lock it, and so keep us from removing anything
        return os.open(path, os.O_RDONLY | os.O_CREAT | FLAGS, 0o600)


def take(root: Path) -> Held | None:
    """The exclusive lock on a set's files; None while somebody reads them. Raises OSError."""
    # NFS wants a file that is open for writing
    fd = os.open(root / layout.READING, os.O_RDWR | os.O_CREAT | FLAGS, 0o600)
    held = Held(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.release()
        return None
    return held
