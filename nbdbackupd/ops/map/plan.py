"""What a map serves: the point is opened and proven, all but its blocks, and handed over."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdbackupd import durable, files
from nbdbackupd.errors import UsageError
from nbdbackupd.files import File
from nbdbackupd.format.index import HEADER, MAX_BLOCK, RECORD, IndexHeader
from nbdbackupd.model.choice import NEWEST, Choice
from nbdbackupd.ops.map.reader import PART, ServedFile, ServedLayer, ServedPlan
from nbdbackupd.ops.sets import frames, opened, sequence
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.layers import MAX_STORED, IndexedLayer, Layer
from nbdbackupd.repo.reading import Held

DEFAULT_CACHE: Final = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class MapRequest:
    """What to serve and where.

    Either ``source`` is a set, or ``sequence`` names the stream files of one disk, oldest first.
    ``choice`` is that of a point; ``disks`` empty means all. ``socket`` is a file for one disk, a
    directory for several; None puts sockets into the map's own directory below ``runtime_dir``.
    ``tcp`` is an address and a port, the first disk's; each further disk takes the next port, and
    wants one of three: ``certificates``, a directory of PEM files for TLS that prove the clients,
    too; ``psk``, a file of users and keys for TLS; or ``insecure``, for everybody who gets there.
    ``device`` is a ``/dev/nbdN`` to attach one disk to. ``writable``: writes are kept until the map
    ends.

    ``prove``: also reads of parts of plain blocks are proven. ``cache_bytes`` bounds the unpacked
    blocks of each disk. ``owner`` (uid, gid) may connect to the sockets in our place; root may
    always. ``purpose`` says whose map it is: ``unmap`` ends only those of ``map``.
    """

    runtime_dir: Path
    source: Path | None = None
    sequence: tuple[Path, ...] = ()
    choice: Choice = NEWEST
    disks: tuple[str, ...] = ()
    socket: Path | None = None
    tcp: tuple[str, int] | None = None
    certificates: Path | None = None
    psk: Path | None = None
    insecure: bool = False
    device: Path | None = None
    writable: bool = False
    prove: bool = False
    cache_bytes: int = DEFAULT_CACHE
    owner: tuple[int, int] | None = None
    purpose: str = "map"

    @property
    def has_tls(self) -> bool:
        """Whether connections are encrypted, and clients proven."""
        return self.certificates is not None or self.psk is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What is to be served: ``layers`` opens the files of one disk, newest first.

    ``reading`` keeps the files in the set.
    """

    targets: tuple[str, ...]
    layers: Callable[[str, ExitStack], tuple[Layer, ...]]
    warnings: tuple[str, ...]
    name: str
    """The point's id."""

    domain: str = ""
    created: str = ""
    reading: Held | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """What one server inherits: open files, among them ``plan``; ``size`` of its disk, bytes."""

    fds: tuple[int, ...]
    plan: int
    size: int


def find(request: MapRequest, cancelled: Callable[[], None]) -> Found:
    """Open the set and choose the point and its disks.

    Raises UsageError, RepositoryError, ChainBrokenError, FormatError.
    """
    if request.source is None:
        found = _find_sequence(request, cancelled)
    else:
        found = _find_set(request.source, request, cancelled)
    if request.device and len(found.targets) > 1:
        raise UsageError(f"{request.device} takes one disk: choose it with -d")
    return found


def _find_set(path: Path, request: MapRequest, cancelled: Callable[[], None]) -> Found:
    given, point = opened.open_point(path, request.choice)
    disks = [point.disk(target) for target in dict.fromkeys(request.disks)] or point.disks
    return Found(
        targets=tuple(disk.target for disk in disks),
        layers=lambda target, stack: given.layers(point, target, stack, cancelled),
        warnings=given.warnings,
        name=point.id,
        domain=point.domain,
        created=point.created,
        reading=given.reading,
    )


def _find_sequence(request: MapRequest, cancelled: Callable[[], None]) -> Found:
    with ExitStack() as stack:
        given = sequence.load(request.sequence, stack, cancelled)
    return Found(
        targets=(given.disk,),
        layers=lambda _, stack: sequence.load(request.sequence, stack, cancelled).layers,
        warnings=given.warnings,
        name=given.point,
        created=given.created,
    )


@contextmanager
def handover(
    request: MapRequest, found: Found, target: str, cancelled: Callable[[], None]
) -> Iterator[Handover]:
    """Open the files of one disk for its server, which inherits them; ours close at the end.

    Raises ChainBrokenError, FormatError, IntegrityError.
    """
    with ExitStack() as stack:
        layers = found.layers(target, stack)
        hands = _Hands(stack)
        if found.reading is not None:
            # a server may have to open some files again, and may outlive us
            hands.hold(os.dup(found.reading.fd))
        plan = ServedPlan(
            target=target,
            whole=layers[-1].whole,
            layers=tuple(_served(layer, hands, cancelled) for layer in layers),
            cache_bytes=request.cache_bytes,
            prove=request.prove,
        )
        fd = hands.memory("plan")
        durable.write_all(fd, json.dumps(plan.to_json()).encode())
        yield Handover(fds=tuple(hands.full), plan=fd, size=layers[0].size)


class _Hands:
    """What the server inherits: open files, as many as it may have, the rest it opens itself."""

    def __init__(self, stack: ExitStack) -> None:
        """``stack`` closes ours."""
        self._stack = stack
        # the layers' own files may take as much room here, and the server reads others by path
        self._room = files.room() // 2
        self._made = -1
        self.full: list[int] = []

    def pass_on(self, file: File) -> ServedFile:
        """A file of the set."""
        path = str(file.path.absolute())
        if len(self.full) >= self._room:
            return ServedFile(path=path, identity=file.identity)
        with file.lent() as fd:
            return ServedFile(path=path, fd=self.hold(os.dup(fd)))

    def memory(self, name: str) -> int:
        """A file in memory."""
        return self.hold(os.memfd_create(name, os.MFD_CLOEXEC))

    def made(self) -> int:
        """The one that holds all indexes that are made for the server."""
        if self._made < 0:
            self._made = self.memory("indexes")
        return self._made

    def hold(self, fd: int) -> int:
        """Pass on a descriptor, which is ours no more; the same."""
        self._stack.callback(os.close, fd)
        self.full.append(fd)
        return fd


def _served(layer: Layer, hands: _Hands, cancelled: Callable[[], None]) -> ServedLayer:
    stream = hands.pass_on(layer.file)
    if isinstance(layer, IndexedLayer):
        index, start, size = hands.pass_on(layer.index.file), 0, layer.index.file.size
        longest, stored = MAX_BLOCK, MAX_STORED
        if layer.index.header.frames:  # an imported set's
            stored = frames.max_stored(frames.MAX_FRAME)
    else:
        index = ServedFile(path="the index in memory", fd=hands.made())
        start, size, longest, stored = _make_index(index.fd, layer, cancelled)
    return ServedLayer(
        stream=stream,
        index=index,
        index_start=start,
        index_size=size,
        codec=layer.codec,
        raw=layer.raw,
        is_made=not isinstance(layer, IndexedLayer),
        deflated=layer.deflated,
        longest=longest,
        stored=stored,
    )


def _make_index(fd: int, layer: Layer, cancelled: Callable[[], None]) -> tuple[int, int, int, int]:
    """Add an index, 64 bytes for each block, for a stream that has none, to a file in memory.

    There is no digest; in its place stands which part of its frame a block is. Returns where it
    begins, its size, the length of the longest block, and that of the longest payload.
    """
    longest = stored = count = 0
    start = os.lseek(fd, 0, os.SEEK_END)
    parts = bytearray(IndexHeader(layer.size, 0, layer.codec, layer.raw).pack())
    for record in layer.records():
        parts += RECORD.pack(*record[:5], PART.pack(record.skip, record.whole))
        longest = max(longest, record.length)
        stored = max(stored, record.stored)
        count += 1
        if len(parts) >= layering.CHUNK:
            cancelled()
            durable.write_all(fd, bytes(parts))
            parts.clear()
    durable.write_all(fd, bytes(parts))
    os.pwrite(fd, IndexHeader(layer.size, count, layer.codec, layer.raw).pack(), start)
    return start, HEADER.size + count * RECORD.size, longest, stored
