"""What a map serves: the point is opened and proven, all but its blocks, and handed over."""

import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from nbdbackupd import durable
from nbdbackupd.errors import RepositoryError, UsageError
from nbdbackupd.format.index import MAX_BLOCK, RECORD, IndexHeader
from nbdbackupd.model.chain import RestorePoint
from nbdbackupd.ops.serving.served import PART, ServedLayer, ServedPlan
from nbdbackupd.ops.sets import frames, opened, points, sequence
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.layers import MAX_STORED, IndexedLayer, Layer

OPEN_FILES: Final = 65536
DEFAULT_CACHE: Final = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class MapRequest:
    """What to serve and where.

    Either ``source`` is a set, or ``sequence`` names the stream files of one disk, oldest first.
    ``point``, ``until``, ``at`` choose as for a restore; ``disks`` empty means all. ``socket`` is
    a file for one disk, a directory for several; None puts sockets into the map's own directory
    below ``runtime_dir``. ``tcp`` is an address and a port, the first disk's; each further disk
    takes the next port, and wants one of three: ``certificates``, a directory of PEM files for TLS
    that prove the clients, too; ``psk``, a file of users and keys for TLS; or ``insecure``, for
    everybody who gets there. ``device`` is a ``/dev/nbdN`` to attach one disk to. ``writable``:
    writes are kept until the map ends.

    ``prove``: also reads of parts of plain blocks are proven. ``cache_bytes`` bounds the unpacked
    blocks of each disk. ``owner`` (uid, gid) may connect to the sockets in our place; root may
    always. ``purpose`` says whose map it is: ``unmap`` ends only those of ``map``.
    """

    runtime_dir: Path
    source: Path | None = None
    sequence: tuple[Path, ...] = ()
    point: str = ""
    until: str = ""
    at: datetime | None = None
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
    """What is to be served: ``layers`` opens the files of one disk, newest first."""

    targets: tuple[str, ...]
    layers: Callable[[str, ExitStack], tuple[Layer, ...]]
    warnings: tuple[str, ...]
    point: RestorePoint | None = None
    created: str = ""


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
    _allow_many_files()
    if request.source is None:
        found = _find_sequence(request, cancelled)
    else:
        found = _find_set(request, cancelled)
    if request.device and len(found.targets) > 1:
        raise UsageError(f"{request.device} takes one disk: choose it with -d")
    return found


def _allow_many_files() -> None:
    """Two files for each point of the chain may be more than the usual 1024."""
    with contextlib.suppress(ValueError, OSError):
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(most, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))


def _find_set(request: MapRequest, cancelled: Callable[[], None]) -> Found:
    assert request.source is not None  # noqa: S101 - for the type checker
    is_named = request.point not in ("", "latest") or bool(request.until)
    given = opened.open_set(request.source, sound=is_named)
    if not given.known.points:
        raise RepositoryError(f"{request.source} holds no restore point: is it a backup set?")
    point = points.choose(given.known, point=request.point, until=request.until, at=request.at)
    disks = [point.disk(target) for target in dict.fromkeys(request.disks)] or point.disks
    return Found(
        targets=tuple(disk.target for disk in disks),
        layers=lambda target, stack: given.layers(point, target, stack, cancelled),
        warnings=given.warnings,
        point=point,
        created=point.created,
    )


def _find_sequence(request: MapRequest, cancelled: Callable[[], None]) -> Found:
    with ExitStack() as stack:
        given = sequence.load(request.sequence, stack, cancelled)
    return Found(
        targets=(given.disk,),
        layers=lambda _, stack: sequence.load(request.sequence, stack, cancelled).layers,
        warnings=given.warnings,
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
        files = tuple(_served(layer, stack, cancelled) for layer in layers)
        plan = ServedPlan(
            target=target, whole=layers[-1].whole, layers=files,
            cache_bytes=request.cache_bytes, prove=request.prove,
        )  # fmt: skip
        fd = _memory("plan", stack)
        durable.write_all(fd, json.dumps(plan.to_json()).encode())
        both = [each for file in files for each in (file.fd, file.index_fd)]
        yield Handover(fds=(fd, *both), plan=fd, size=layers[0].size)


def _served(layer: Layer, stack: ExitStack, cancelled: Callable[[], None]) -> ServedLayer:
    if isinstance(layer, IndexedLayer):
        index, longest, stored = layering.open_file(layer.index.path), MAX_BLOCK, MAX_STORED
        if layer.index.header.frames:  # an imported set's
            stored = frames.max_stored(frames.MAX_FRAME)
        stack.callback(os.close, index)
    else:
        index, longest, stored = _made_index(layer, stack, cancelled)
    return ServedLayer(
        fd=layer.fileno(), index_fd=index, compressed=layer.compressed, raw=layer.raw,
        is_made=not isinstance(layer, IndexedLayer), longest=longest, stored=stored,
        file=str(layer.path),
    )  # fmt: skip


def _made_index(
    layer: Layer, stack: ExitStack, cancelled: Callable[[], None]
) -> tuple[int, int, int]:
    """An index in memory, 64 bytes for each block, for a stream that has none.

    There is no digest; in its place stands which part of its frame a block is. Also returns the
    length of the longest block, and that of the longest payload.
    """
    fd, longest, stored, count = _memory("index", stack), 0, 0, 0
    parts = bytearray(IndexHeader(layer.size, 0, layer.compressed, layer.raw).pack())
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
    os.pwrite(fd, IndexHeader(layer.size, count, layer.compressed, layer.raw).pack(), 0)
    return fd, longest, stored


def _memory(name: str, stack: ExitStack) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
