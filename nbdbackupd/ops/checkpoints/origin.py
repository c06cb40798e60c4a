"""Proof that a disk's image is its own, and not that of another disk of the domain.

libvirt gives one name to the bitmaps of all disks of a checkpoint. So a sound bitmap of the base
proves that its image has come from one of the disks that the base's point tracked, and that what
it calls clean is what that disk held then; it does not say from which one. An image that was
copied over that of another disk would give a delta that is short.

The set tells where these disks differed. If they did so in a range that is clean, the image holds
there what one of them held. If they differed nowhere outside of what changed since, the delta is
right in either case.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

from nbdbackupd.errors import NbdbackupError
from nbdbackupd.format.blocks import digest
from nbdbackupd.format.index import MAX_BLOCK, NO_DIGEST, Kind, Record
from nbdbackupd.model import flatten
from nbdbackupd.model.chain import BackupSet, DigestKind, DiskPoint, RestorePoint
from nbdbackupd.model.extents import Segment
from nbdbackupd.model.flatten import Piece
from nbdbackupd.nbdio.client import Endpoint, Patience
from nbdbackupd.nbdio.probe import Probe
from nbdbackupd.ops.sets.layers import MAX_STORED, IndexedLayer, open_proven
from nbdbackupd.source import Export, Snapshot

LOOKS: Final = 1024
"""After so many ranges (1 MiB at most, each) in which two disks turn out to be the same, we stop
looking for one that tells them apart, and read the disk in full."""


def prove(
    snapshot: Snapshot, directory: Path, known: BackupSet, parent: RestorePoint, patience: Patience
) -> Snapshot:
    """The snapshot without the changes of disks whose images may be those of others.

    Such a disk is to be read in full, and ``demoted`` says why. ``directory`` is the set's.
    Raises IntegrityError if what the set holds is damaged, NbdError, and what ``patience`` raises.
    """
    exports = dict(snapshot.exports)
    demoted = dict(snapshot.demoted)
    for target, export in snapshot.exports.items():
        others = candidates(parent, target) if export.bitmap else ()
        for other in others:
            with ExitStack() as stack:
                own, alien = (
                    stack.enter_context(Content(directory, known, parent, disk, patience.cancelled))
                    for disk in (parent.disk(target), other)
                )
                reason = _compare(export, own, alien, patience)
            if reason:
                exports[target] = replace(export, bitmap="")
                demoted[target] = f"{reason} {other.target}"
                break
    return replace(snapshot, exports=exports, demoted=demoted)


def candidates(parent: RestorePoint, target: str) -> tuple[DiskPoint, ...]:
    """The other disks whose images carried a bitmap of the same name, and have the same size."""
    own = parent.disk(target)
    return tuple(
        disk
        for disk in parent.disks
        if disk.target != target and disk.bitmap == own.bitmap and disk.size == own.size
    )


def _compare(export: Export, own: "Content", other: "Content", patience: Patience) -> str:
    """Why the image may be that of the other disk, or nothing."""
    endpoint = Endpoint(
        socket=export.socket, export=export.name, bitmap=export.bitmap, keeper=export.keeper
    )
    looks = 0
    with Probe(endpoint, patience) as probe:
        clean = _Clean(probe.changes())
        for start, end, mine, theirs in _overlay(own.pieces(), other.pieces()):
            if _is_same(mine, theirs):
                continue
            for low, high in clean.within(start, end):
                patience.cancelled()
                was = own.read(mine, low, high)
                if was != other.read(theirs, low, high):
                    is_own = probe.read(low, high - low) == was
                    return "" if is_own else "its image is not its own, but that of disk"
                looks += 1
                if looks > LOOKS:
                    return "its image can't be told from that of disk"
    return ""


class Content:
    """What one disk held at a point, from the set; a context manager that owns the files."""

    def __init__(
        self,
        directory: Path,
        known: BackupSet,
        point: RestorePoint,
        disk: DiskPoint,
        check: Callable[[], None],
    ) -> None:
        """Open the files of the disk's path.

        Raises IntegrityError.
        """
        self._stack = ExitStack()
        self._scratch = memoryview(bytearray(MAX_STORED))
        self._held: tuple[Record | None, bytes] = (None, b"")
        self._layers: list[IndexedLayer] = []
        try:
            for each in known.path(point, disk.target):
                layer = open_proven(directory, each, each.disk(disk.target), check)
                self._layers.append(self._stack.enter_context(layer))
        except NbdbackupError:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def pieces(self) -> Iterator[Piece[Record]]:
        """The whole disk, ascending; what no block holds is zero."""
        return flatten.pieces(
            [flatten.Layer(layer.size, layer.records()) for layer in self._layers]
        )

    def read(self, piece: Piece[Record], start: int, end: int) -> bytes:
        """The bytes ``[start, end)``, which lie in ``piece``; at most a block long.

        Raises IntegrityError.
        """
        record = piece.block
        if record is None or record.kind == Kind.ZERO:
            return bytes(end - start)
        if self._held[0] != record:
            view = memoryview(bytearray(record.length))
            self._layers[piece.layer].read(record, view, self._scratch)
            self._held = (record, bytes(view))
        return self._held[1][start - record.offset : end - record.offset]


class _Clean:
    """What did not change, asked for in ascending order."""

    def __init__(self, changes: Iterator[Segment]) -> None:
        self._changes = changes
        self._next = next(changes, None)

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The clean parts of ``[start, end)``, each at most ``MAX_BLOCK`` long."""
        position = start
        while position < end:
            while self._next is not None and self._next.end <= position:
                self._next = next(self._changes, None)
            if self._next is not None and self._next.offset <= position:
                position = self._next.end
                continue
            limit = min(end, position + MAX_BLOCK)
            if self._next is not None:
                limit = min(limit, self._next.offset)
            yield position, limit
            position = limit


def _overlay(
    first: Iterator[Piece[Record]], second: Iterator[Piece[Record]]
) -> Iterator[tuple[int, int, Piece[Record], Piece[Record]]]:
    """Ranges ``[start, end)`` in which both disks have one piece each."""
    mine, theirs = next(first, None), next(second, None)
    while mine is not None and theirs is not None:
        start, end = max(mine.offset, theirs.offset), min(mine.end, theirs.end)
        if start < end:
            yield start, end, mine, theirs
        if mine.end == end:
            mine = next(first, None)
        if theirs.end == end:
            theirs = next(second, None)


def _is_same(mine: Piece[Record], theirs: Piece[Record]) -> bool:
    """Whether both hold the same, as far as that is known without reading."""
    one, other = _data(mine), _data(theirs)
    if one is None and other is None:
        return True
    if one is not None and other is not None:
        return (one.offset, one.length) == (
            other.offset,
            other.length,
        ) and one.digest == other.digest != NO_DIGEST
    data = one or other
    return data is not None and data.digest == _zero_digest(data.length)


@functools.lru_cache(maxsize=64)
def _zero_digest(length: int) -> bytes:
    return digest(bytes(length), DigestKind.SHA256)


def _data(piece: Piece[Record]) -> Record | None:
    return piece.block if piece.block is not None and piece.block.kind == Kind.DATA else None
