"""Images that a restore fills: a plain sparse file or a qcow2 image.

Both are made fresh under their ``.incomplete`` name, read as zeroes from the start, and hand out
writers: one for each thread, each with a few buffers of its own. A qcow2 image of the plain kind
is filled in place and proven by ``qemu-img check``; others (extended L2 entries, unusual refcounts,
preallocated, compressed) are written by qemu-nbd.
"""

import mmap
import os
import tempfile
import threading
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
        flush: Callable[[], None] | None = None,
    ) -> None:
        """``put`` writes bytes to a place in the guest's disk, ``zero`` zeroes a range of it.

        ``flush``: they may only begin it, this waits until it is done.
        """
        self._put = put
        self._zero = zero
        self._flush = flush
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
        if self._flush is not None:
            self._flush()


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


class _Clusters:
    """Whole clusters, gathered from pieces of the disk that come in any order and any thread.

    Each byte of the disk comes once, as data or as zero. A compressed cluster is written once: a
    part of it, later, would be a cluster of its own beside it. Memory: the clusters begun.
    """

    def __init__(self, cluster: int, size: int) -> None:
        """Both in bytes; the disk's end may be within a cluster."""
        self._cluster = cluster
        self._size = size
        self._lock = threading.Lock()
        self._missing: dict[int, int] = {}
        self._begun: dict[int, memoryview] = {}

    def data(self, view: memoryview, offset: int) -> Iterator[tuple[int, memoryview]]:
        """Add data; yields the place and content of each cluster that is whole now."""
        while view:
            start = offset // self._cluster * self._cluster
            part = view[: start + self._cluster - offset]
            done: memoryview | None = part
            if len(part) < self._cluster:
                with self._lock:
                    if start not in self._begun:
                        self._begun[start] = memoryview(bytearray(self._cluster))
                    self._begun[start][offset - start : offset - start + len(part)] = part
                    done = self._count(start, len(part))
            if done is not None:
                yield start, done
            view, offset = view[len(part) :], offset + len(part)

    def zero(self, offset: int, length: int) -> Iterator[tuple[int, memoryview]]:
        """Add zeroes; yields as ``data``. Clusters that hold nothing else are left out."""
        end = offset + length
        last = (end - 1) // self._cluster * self._cluster
        # those between are all zero: none of them is begun
        for start in sorted({offset // self._cluster * self._cluster, last}):
            with self._lock:
                covered = min(end, start + self._cluster) - max(offset, start)
                done = self._count(start, covered)
            if done is not None:
                yield start, done

    def prove(self) -> None:
        """Raise NbdError if a cluster was begun that is not whole."""
        if self._missing:
            place = min(self._missing)
            raise NbdError("a cluster of the restored image was not written", guest=place)

    def _count(self, start: int, length: int) -> memoryview | None:
        whole = min(self._cluster, self._size - start)
        missing = self._missing.pop(start, whole) - length
        if missing:
            self._missing[start] = missing
            return None
        return self._begun.pop(start, None)


@contextmanager
def compressed(
    path: Path,
    size: int,
    options: CreateOptions,
    *,
    workers: int,
    cancelled: Callable[[], None],
    check: Callable[[], None],
) -> Iterator[Output]:
    """A qcow2 image of compressed clusters, as ``qcow2``."""
    os.close(create_private(path))
    image.create(path, size, options)
    cluster = image.info(path, format=image.QCOW2).cluster_size
    # the filter that compresses takes whole clusters only
    image.resize(path, -(-size // cluster) * cluster, shrink=False)
    clusters = _Clusters(cluster, size)
    with _served(
        path, workers=workers, known_zero=True, cancelled=cancelled, check=check, compress=cluster
    ) as served:

        @contextmanager
        def writer() -> Iterator[Writer]:
            with served.writer() as sink:

                def send(whole: Iterator[tuple[int, memoryview]]) -> None:
                    for offset, content in whole:
                        slot = sink.take()
                        sink.view(slot, cluster)[:] = content
                        sink.write(slot, cluster, offset)

                yield _FileWriter(
                    lambda view, offset: send(clusters.data(view, offset)),
                    lambda offset, length: send(clusters.zero(offset, length)),
                    sink.flush,
                )

        yield Output(writers=served.writers, writer=writer, zeroes=True)
        clusters.prove()
    image.resize(path, size, shrink=True)
    cancelled()
    image.check(path, format=image.QCOW2)
    durable.fsync_file(path)


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
    compress: int = 0,
) -> Iterator[Output]:
    """The image behind a server, closed and durable at the end if all goes well.

    ``known_zero``: it reads as zeroes so far. ``compress``: the size of the clusters that are to be
    compressed.
    """
    with tempfile.TemporaryDirectory(prefix="nbdbackup-") as directory:
        socket = Path(directory, "nbd")
        if fault := rundir.socket_fault(socket):
            raise ProcessError(f"{fault}: set TMPDIR to a shorter directory")
        endpoint = client.Endpoint(socket=socket, export="")

        def writer() -> AbstractContextManager[Writer]:
            arena = Arena(DEPTH, max(MAX_BLOCK, compress))
            patience = client.Patience(SILENCE_SECONDS, check)
            return target.open_target(endpoint, arena, known_zero=known_zero, patience=patience)

        patience = client.Patience(SILENCE_SECONDS, cancelled)
        with (
            nbd_server.serve(
                path,
                format="qcow2",
                endpoint=socket,
                clients=workers + 1,
                cancelled=cancelled,
                compress=bool(compress),
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
