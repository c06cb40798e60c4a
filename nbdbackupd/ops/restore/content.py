"""What a restore has to write: the blocks of a flattened disk, or what one point changed of it."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nbdbackupd.errors import IntegrityError
from nbdbackupd.format.index import NO_DIGEST, Kind, Record
from nbdbackupd.model import flatten
from nbdbackupd.model.flatten import Part, Piece
from nbdbackupd.ops.sets.layers import Layer


class Zero(NamedTuple):
    """``length`` bytes from guest offset ``offset`` on that read as zeroes."""

    offset: int
    length: int


Item = Part[Record] | Zero
"""Data, whose ``layer`` counts among the layers that were given; or zeroes."""


def whole(layers: Sequence[Layer]) -> Iterator[Item]:
    """The whole flattened disk; ``layers`` newest first. Memory: a block's ranges for each layer.

    Raises IntegrityError if a part of the disk that was read in full is held by no block.
    """
    return _items(_covered(layers), len(layers))


def delta(layer: Layer) -> Iterator[Item]:
    """What one point holds of a disk that it did not read in full. Raises IntegrityError."""
    for record in layer.records():
        length = min(record.length, layer.size - record.offset)
        if length <= 0:
            return
        if record.kind == Kind.ZERO:
            yield Zero(record.offset, length)
        else:
            yield Part(0, record, ((record.offset, length),))


def difference(layers: Sequence[Layer], older: Sequence[Layer]) -> Iterator[Item]:
    """What of the disk ``layers`` is not known to be the same in ``older``; both newest first.

    Two blocks of one digest at one place are the same, and so are zeroes. Beyond the end of the
    older disk all is zero. Raises IntegrityError.
    """
    return _items(_changed(_covered(layers), _covered(older)), len(layers))


def _covered(layers: Sequence[Layer]) -> Iterator[Piece[Record]]:
    oldest = layers[-1]
    must = flatten.limits([layer.size for layer in layers])[-1] if oldest.whole else 0
    for piece in flatten.pieces([flatten.Layer(each.size, each.records()) for each in layers]):
        if piece.block is None and piece.offset < must:
            raise IntegrityError(
                "no block holds a part of the disk", guest=piece.offset, **oldest.where
            )
        yield piece


def _items(pieces: Iterator[Piece[Record]], layers: int) -> Iterator[Item]:
    waiting: deque[Zero] = deque()

    def data() -> Iterator[Piece[Record]]:
        for piece in pieces:
            if _data(piece) is not None:
                yield piece
            elif waiting and waiting[-1].offset + waiting[-1].length == piece.offset:
                last = waiting.pop()
                waiting.append(Zero(last.offset, last.length + piece.length))
            else:
                waiting.append(Zero(piece.offset, piece.length))

    for part in flatten.parts(data(), layers):
        while waiting:
            yield waiting.popleft()
        yield part
    yield from waiting


def _changed(
    now: Iterator[Piece[Record]], then: Iterator[Piece[Record]]
) -> Iterator[Piece[Record]]:
    before = next(then, None)
    for piece in now:
        start = piece.offset
        while start < piece.end:
            while before is not None and before.end <= start:
                before = next(then, None)
            end = min(piece.end, before.end) if before is not None else piece.end
            if not _is_same(piece, before):
                yield Piece(start, end - start, piece.layer, piece.block)
            start = end


def _is_same(piece: Piece[Record], before: Piece[Record] | None) -> bool:
    one, other = _data(piece), _data(before) if before is not None else None
    if one is None or other is None:
        return one is other
    return (one.offset, one.length, one.digest) == (
        other.offset,
        other.length,
        other.digest,
    ) and one.digest != NO_DIGEST


def _data(piece: Piece[Record]) -> Record | None:
    return piece.block if piece.block is not None and piece.block.kind == Kind.DATA else None
