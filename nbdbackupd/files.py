"""Files that are only read: any number of them, few of them open at a time.

A disk of many points is two files for each of them, all read in turns, while a process may have
only so many open (``ulimit -n``, often 1024). So a ``File`` is opened when it is read, and closed
when others need the room. Opened again, it has to be the file that it was.
"""

import contextlib
import errno
import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

from nbdbackupd.errors import ConfigError, IntegrityError

MOST_OPEN: Final = 16384
"""What a process of ours asks for; more would be slow in programs that close all descriptors."""
FEWEST: Final = 64
"""What a process of ours needs: with 40 a server of a map could not load its plugin."""
CURE: Final = "raise the hard limit of open files (ulimit -Hn, LimitNOFILE= of a unit)"


def open_untrusted(path: Path | str, *, at: int | None = None) -> int:
    """A descriptor of a regular file that somebody else may have put there, for reading.

    With ``at`` it is a name in the directory that this is a descriptor of. A link in its place is
    not followed, a pipe is not waited for, nothing of a device is read: for all of these it raises
    IntegrityError. Raises OSError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    except OSError as err:
        if err.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise IntegrityError("not a regular file", file=path) from err
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise IntegrityError("not a regular file", file=path)
    return fd


def read_own(path: Path, maximum: int) -> bytes:
    """A file that only root or we can write, at most so many bytes of it.

    Raises IntegrityError if others can, or as ``open_untrusted``, and OSError.
    """
    with os.fdopen(open_untrusted(path), "rb") as file:
        found = os.fstat(file.fileno())
        is_ours = found.st_uid in (0, os.geteuid())
        if not is_ours or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise IntegrityError("others may write it", file=path)
        return file.read(min(found.st_size, maximum))


def open_regular(path: Path, **where: object) -> int:
    """A descriptor of a file of a set, as ``open_untrusted``; ``where`` goes into errors.

    Raises IntegrityError also if there is none: a file that a manifest names must be there.
    """
    try:
        return open_untrusted(path)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise IntegrityError("file of the set is missing", file=path, **where) from err
    except IntegrityError as err:
        err.fields |= where
        raise


def open_sized(path: Path, size: int, **where: object) -> int:
    """As ``open_regular``, and of the size that its manifest tells."""
    fd = open_regular(path, **where)
    found = os.fstat(fd).st_size
    if found != size:
        os.close(fd)
        raise IntegrityError(
            "file of the set has the wrong size", file=path, expected=size, found=found, **where
        )
    return fd


def allow_many() -> None:
    """Raise the soft limit of open files as far as the hard one lets us.

    The default soft limit is for programs that use select(2), which none of ours does. What we
    start inherits it. Raises ConfigError if even the hard one is too small.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN if most == resource.RLIM_INFINITY else min(most, MOST_OPEN)
    if wanted < FEWEST:
        raise ConfigError(f"only {most} files may be open at a time, {FEWEST} are needed: {CURE}")
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))


def room() -> int:
    """How many files may be held open at a time: a quarter of the limit, the rest is for others.

    A map passes on half as many, and holds two descriptors for each of its servers.
    """
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4


def cure(err: BaseException) -> str:
    """What helps if an error came of too many open files; else empty."""
    found: BaseException | None = err
    while found is not None:
        if isinstance(found, OSError) and found.errno == errno.EMFILE:
            return CURE
        found = found.__cause__
    return ""


class _Descriptor:
    """An open file, closed with its last user."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


Identity = tuple[int, int, int, int]
"""Device, inode, size and time of the last change (ns) of a file."""


def _identity(fd: int) -> Identity:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class File:
    """A file for reading at any place, from several threads; a context manager that closes it.

    ``identity`` tells that it is the same when it is opened again, here or in another process.
    """

    def __init__(
        self,
        path: Path,
        *,
        opener: Callable[[Path], int] = open_regular,
        identity: Identity | None = None,
    ) -> None:
        """``opener`` gives a descriptor of it. Raises what that raises.

        With ``identity`` it is not opened before it is read, and must be that file then.
        """
        self.path = path
        self._opener = opener
        if identity is None:
            fd = opener(path)
            _POOL.put(self, _Descriptor(fd))
            identity = _identity(fd)
        self.identity = identity

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.identity[2]

    def pread(self, length: int, place: int) -> bytes:
        """At most ``length`` bytes from ``place`` on.

        Raises IntegrityError if it was replaced since it was opened first, OSError.
        """
        held = self._take()
        return os.pread(held.fd, length, place)

    def preadv(self, view: memoryview, place: int) -> int:
        """Read into ``view``, how many bytes that were. Raises as ``pread``."""
        held = self._take()
        return os.preadv(held.fd, (view,), place)

    @contextmanager
    def lent(self) -> Iterator[int]:
        """Its descriptor, open during the body. Raises as ``pread``."""
        held = self._take()
        yield held.fd

    def close(self) -> None:
        """Let go of it; what reads it right now ends in peace. Safe to call twice."""
        _POOL.drop(self)

    def _take(self) -> _Descriptor:
        found = _POOL.get(self)
        if found is None:
            found = _Descriptor(self._opener(self.path))
            if _identity(found.fd) != self.identity:
                raise IntegrityError("file was replaced while it was read", file=self.path)
            _POOL.put(self, found)
        return found


class _Lent(_Descriptor):
    """One that others close."""

    def __del__(self) -> None:
        """Nothing."""


class HeldFile(File):
    """A file of which nothing but a descriptor is known; its owner keeps that open."""

    def __init__(self, fd: int, path: Path) -> None:
        """``path`` is for errors."""
        self.path = path
        self.identity = _identity(fd)
        self._held = _Lent(fd)

    def close(self) -> None:
        """Nothing: the descriptor is its owner's."""

    def _take(self) -> _Descriptor:
        return self._held


class _Pool:
    """The files that were read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[File, _Descriptor] = OrderedDict()

    def get(self, file: File) -> _Descriptor | None:
        with self._lock:
            found = self._open.get(file)
            if found is not None:
                self._open.move_to_end(file)
            return found

    def put(self, file: File, held: _Descriptor) -> None:
        most = room()
        with self._lock:
            self._open[file] = held
            while len(self._open) > most:
                self._open.popitem(last=False)

    def drop(self, file: File) -> None:
        with self._lock:
            self._open.pop(file, None)


_POOL: Final = _Pool()
