"""Images that a restore fills: a plain sparse file or a qcow2 image.

Both are made fresh under their ``.incomplete`` name, read as zeroes from the start, and hand out
writers: one for each thread, each with a few buffers of its own. A qcow2 image of the plain kind
is filled in place and proven by ``qemu-img check``; others (extended L2 entries, unusual refcounts,
preallocated) are written by qemu-nbd.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from nbdbackupd import durable, proc, rundir
from nbdbackupd.errors import NbdError, ProcessError
from nbdbackupd.format.index import MAX_BLOCK
from nbdbackupd.nbdio import client, target
from nbdbackupd.nbdio.arena import Arena
from nbdbackupd.qemu import image, nbd_server
from nbdbackupd.qemu import qcow2 as qcow2_file
from nbdbackupd.qemu.image import CreateOptions

DEPTH: Final = 4
"""Requests in flight for each writer; at least 2, see ``fill``."""

SILENCE_SECONDS: Final = 120.0
"""An export that answers nothing for so long is dead; a slow disk may need long to flush."""


class Writer(Protocol):
    """What a thread writes blocks with; see ``nbdio.target`` for who owns a slot when."""

    def take(self) -> int:
        """A free slot."""

    def view(self, slot: int, length: int) -> memoryview:
        """The first ``length`` bytes of a taken slot."""

    def write(self, slot: int, length: int, offset: int) -> None:
        """Write them to the image and give the slot back."""

    def release(self, slot: int) -> None:
        """Give the slot back unwritten."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; any range of a disk, also a very long one."""

    def flush(self) -> None:
        """Wait until all is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """An image open for writing: ``writer()`` for each of at most ``writers`` threads.

    ``zeroes``: it does not read as zeroes by itself, so ranges of zeroes must be written, too.
    """

    writers: int
    zeroes: bool = False
    writer: Callable[[], AbstractContextManager[Writer]] = field(repr=False)


class _FileWriter:
    """Writes at once. Slots as the other writer has: a block may be cut up."""

    def __init__(
        self,
        put: Callable[[memoryview, int], None],
        zero: Callable[[int, int], None] | None = None,
    ) -> None:
        """``put`` writes bytes to a place in the guest's disk, ``zero`` zeroes a range of it."""
        self._put = put
        self._zero = zero
        self._slots = memoryview(mmap.mmap(-1, DEPTH * MAX_BLOCK))
        self._free = list(range(DEPTH))

    def take(self) -> int:
        return self._free.pop()

    def view(self, slot: int, length: int) -> memoryview:
        return self._slots[slot * MAX_BLOCK : slot * MAX_BLOCK + length]

    def write(self, slot: int, length: int, offset: int) -> None:
        self._put(self.view(slot, length), offset)
        self._free.append(slot)

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def zero(self, offset: int, length: int) -> None:
        if self._zero is not None:
            self._zero(offset, length)

    def flush(self) -> None:
        """Nothing is in flight here."""


@contextmanager
def raw(path: Path, size: int, *, preallocate: bool, workers: int) -> Iterator[Output]:
    """A raw image of ``size`` bytes at ``path``, on the device when the context ends well.

    Raises OSError.
    """
    fd = create_private(path)
    try:
        os.ftruncate(fd, size)
        if preallocate and size:
            os.posix_fallocate(fd, 0, size)

        def put(view: memoryview, offset: int) -> None:
            while view:
                count = os.pwrite(fd, view, offset)
                view = view[count:]
                offset += count

        yield direct(put, workers)
        durable.fsync_file(fd)
    finally:
        os.close(fd)


def direct(
    put: Callable[[memoryview, int], None],
    workers: int,
    zero: Callable[[int, int], None] | None = None,
) -> Output:
    """An output whose writers call ``put``, and ``zero`` where that is needed, in any thread."""

    @contextmanager
    def writer() -> Iterator[Writer]:
        yield _FileWriter(put, zero)

    return Output(writers=workers, writer=writer, zeroes=zero is not None)


@contextmanager
def qcow2(
    path: Path,
    size: int,
    options: CreateOptions,
    *,
    workers: int,
    cancelled: Callable[[], None],
    check: Callable[[], None],
) -> Iterator[Output]:
    """A qcow2 image at ``path``, closed cleanly and on the device when the context ends well.

    While waiting for the server, the calling thread asks ``cancelled`` and the writers' threads
    ask ``check``; both may raise. Raises NoSpaceError, ProcessError, NbdError, OSError.
    """
    os.close(create_private(path))
    image.create(path, size, options)
    if not options.preallocation and qcow2_file.can_fill(path):
        with qcow2_file.Filler(path) as filler:
            yield direct(filler.write, workers)
            filler.finish()
        cancelled()
        image.check(path, format="qcow2")
        return
    with _served(
        path, workers=workers, known_zero=True, cancelled=cancelled, check=check
    ) as output:
        yield output


def changed(
    path: Path, *, workers: int, cancelled: Callable[[], None], check: Callable[[], None]
) -> AbstractContextManager[Output]:
    """A qcow2 image that holds older data, by itself or below: zeroes must be written, too.

    On the device when the context ends well. Raises as ``qcow2``.
    """
    return _served(path, workers=workers, known_zero=False, cancelled=cancelled, check=check)


@contextmanager
def _served(
    path: Path,
    *,
    workers: int,
    known_zero: bool,
    cancelled: Callable[[], None],
    check: Callable[[], None],
) -> Iterator[Output]:
    """The image behind a server, closed and durable at the end if all goes well.

    ``known_zero``: it reads as zeroes so far.
    """
    with tempfile.TemporaryDirectory(prefix="nbdbackup-") as directory:
        socket = Path(directory, "nbd")
        if fault := rundir.socket_fault(socket):
            raise ProcessError(f"{fault}: set TMPDIR to a shorter directory")
        endpoint = client.Endpoint(socket=socket, export="")

        def writer() -> AbstractContextManager[Writer]:
            arena = Arena(DEPTH, MAX_BLOCK)
            patience = client.Patience(SILENCE_SECONDS, check)
            return target.open_target(endpoint, arena, known_zero=known_zero, patience=patience)

        patience = client.Patience(SILENCE_SECONDS, cancelled)
        with (
            nbd_server.serve(
                path, format="qcow2", endpoint=socket, clients=workers + 1, cancelled=cancelled
            ) as server,
            _blame(server),
            target.control(endpoint, patience) as several,
        ):
            yield Output(writers=workers if several else 1, writer=writer, zeroes=not known_zero)
    # a server that had to be killed leaves it dirty
    if image.info(path, format="qcow2").dirty:
        raise ProcessError(f"qemu-nbd did not close {path} cleanly")
    durable.fsync_file(path)


def create_private(path: Path) -> int:
    """A new file, for its owner's eyes only: it will hold a guest's data."""
    path.unlink(missing_ok=True)
    return durable.create_exclusive(path)


@contextmanager
def _blame(server: proc.Process) -> Iterator[None]:
    """A dead server says better why than the connection that it left behind."""
    try:
        yield
    except NbdError as err:
        try:
            server.check()
        except ProcessError as death:
            raise death from err
        raise
