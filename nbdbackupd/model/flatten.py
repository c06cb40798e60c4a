"""One disk out of many points: for each guest byte, which point's block holds it.

A chain is never replayed. The blocks of a disk's full and of all that came after it are merged
while they are read, newest point first, so that each guest byte is read and written once. All
ranges are half open and in bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Generic, NamedTuple, Protocol, TypeVar


class Block(Protocol):
    """A run of guest bytes that a point holds, as data or as zeroes."""

    @property
    def offset(self) -> int:
        """First guest byte."""

    @property
    def length(self) -> int:
        """Number of guest bytes, at least 1."""


R = TypeVar("R", bound=Block)


@dataclass(frozen=True, slots=True)
class Layer(Generic[R]):
    """One point's blocks of the disk: ascending, without overlap; ``size`` of the disk then."""

    size: int
    blocks: Iterable[R]


class Piece(NamedTuple, Generic[R]):
    """``length`` guest bytes from ``offset`` on, and the block that holds them.

    ``layer`` counts from 0, the newest. A range that no point holds reads as zeroes: ``block``
    is None and ``layer`` is -1.
    """

    offset: int
    length: int
    layer: int
    block: R | None

    @property
    def end(self) -> int:
        """First guest byte after the piece."""
        return self.offset + self.length


class _Cursor(Generic[R]):
    """The place in one layer: a block that ends after the position it was last moved to."""

    def __init__(self, layer: Layer[R], limit: int) -> None:
        self._blocks = iter(layer.blocks)
        self._limit = limit
        self.block: R | None = None
        self.start = self.end = 0

    def advance(self, position: int) -> bool:
        """Drop blocks that end at or before ``position``; whether one is left."""
        while self.end <= position:
            self.block = next(self._blocks, None)
            if self.block is None or self.block.offset >= self._limit:
                return False
            self.start = self.block.offset
            self.end = min(self.start + self.block.length, self._limit)
        return True


def limits(sizes: Sequence[int]) -> list[int]:
    """How far each layer can be seen, newest first: what a shrunk disk lost does not come back."""
    seen: list[int] = []
    for size in sizes:
        seen.append(min(size, seen[-1]) if seen else size)
    return seen


def pieces(layers: Sequence[Layer[R]], start: int = 0) -> Iterator[Piece[R]]:
    """Cover ``[start, layers[0].size)`` with pieces, ascending, the newest layer winning.

    ``layers`` is newest first. A block that newer ones cover in part comes as several pieces.
    Only one block of each layer is held at a time; the blocks may begin with the first one that
    ends after ``start``. A block costs two steps of heaps, however many layers there are.
    """
    size = layers[0].size
    seen = limits([layer.size for layer in layers])
    cursors = [_Cursor(layer, limit) for layer, limit in zip(layers, seen, strict=True)]
    ahead: list[tuple[int, int]] = []  # where the next block of a layer starts, and the layer
    begun: list[int] = []  # layers whose blocks have; what ended is noticed when it is the newest
    for number, cursor in enumerate(cursors):
        if cursor.advance(start):
            heappush(ahead, (cursor.start, number))
    position = start
    while position < size:
        while ahead and ahead[0][0] <= position:
            heappush(begun, heappop(ahead)[1])
        end = size
        chosen, block = -1, None
        while begun:
            number = begun[0]
            cursor = cursors[number]
            is_left = cursor.end > position or cursor.advance(position)
            if is_left and cursor.start <= position:
                end = cursor.end
                chosen, block = number, cursor.block
                break
            heappop(begun)
            if is_left:
                heappush(ahead, (cursor.start, number))
        while ahead and ahead[0][0] < end:
            if ahead[0][1] < chosen or chosen < 0:
                end = ahead[0][0]
                break
            heappush(begun, heappop(ahead)[1])
        yield Piece(position, end - position, chosen, block)
        position = end


class Part(NamedTuple, Generic[R]):
    """A block and those of its ranges ``(offset, length)`` that are still alive, ascending."""

    layer: int
    block: R
    ranges: tuple[tuple[int, int], ...]


def parts(found: Iterable[Piece[R]], layers: int) -> Iterator[Part[R]]:
    """Gather the pieces of each block, so that it is read once however it was cut.

    Takes pieces as ``pieces`` yields them; those without a block are dropped. A block comes when
    its layer has gone on to the next one, so parts are only nearly in ascending order. Memory:
    one block's ranges for each of the ``layers``.
    """
    held: list[tuple[R, list[tuple[int, int]]] | None] = [None] * layers
    for piece in found:
        if piece.block is None:
            continue
        waiting = held[piece.layer]
        if waiting is not None and waiting[0] is piece.block:
            waiting[1].append((piece.offset, piece.length))
            continue
        if waiting is not None:
            yield Part(piece.layer, waiting[0], tuple(waiting[1]))
        held[piece.layer] = (piece.block, [(piece.offset, piece.length)])
    for number, left in enumerate(held):
        if left is not None:
            yield Part(number, left[0], tuple(left[1]))
