"""Random access to one disk out of many points: who holds which guest bytes.

The layers of a disk are merged as a restore merges them (``flatten``), but only around the place
that is asked for, and the result, a window, is kept. So a view of a chain is ready at once,
however long the chain and however large the disk, and the second look at a place is a search in
one short list. All ranges are half open and in bytes.
"""

import bisect
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from nbdbackupd.model import flatten

ALIGN: Final = 4 << 20
"""Windows begin at multiples of this, or where the window before them ends."""

ENOUGH: Final = 256
"""Pieces to merge for one window, if the place that is asked for does not need more."""

MOST: Final = 2 << 20
"""Pieces in all windows together, 16 bytes each; the longest unused windows are forgotten."""

ZERO: Final = -1
MISSING: Final = -2
"""In place of a layer: the bytes are zero; no block holds them, though one must."""

_NUMBER_BITS: Final = 40
_NUMBERS: Final = (1 << _NUMBER_BITS) - 1


class BlockPlace(NamedTuple):
    """A run of guest bytes that a layer holds: as zeroes, or in its block ``number``."""

    offset: int
    length: int
    number: int
    zero: bool


class Source(Protocol):
    """The blocks of one layer."""

    @property
    def size(self) -> int:
        """Size of the disk at that point."""

    def places(self, start: int) -> Iterator[BlockPlace]:
        """All that end after ``start``, ascending, without overlap."""


Span = tuple[int, int, int, int]
"""Guest offset, length, layer (0 is the newest) and the number of its block there.

The layer may be ``ZERO`` or ``MISSING`` instead.
"""


class _Window:
    """The merged pieces of one range: where each starts, and its layer and block in one number."""

    __slots__ = ("begin", "end", "refs", "starts")

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.starts = array("Q")
        self.refs = array("q")
        self.end = 0

    def add(self, piece: flatten.Piece[BlockPlace], must: int) -> None:
        """Take the next piece; bytes below ``must`` have to be in some block."""
        if piece.block is None and piece.offset < must:
            self._append(piece.offset, MISSING)
            if piece.end > must:
                self._append(must, ZERO)
        elif piece.block is None or piece.block.zero:
            self._append(piece.offset, ZERO)
        else:
            self._append(piece.offset, piece.layer << _NUMBER_BITS | piece.block.number)
        self.end = piece.end

    def _append(self, start: int, ref: int) -> None:
        if self.refs and ref < 0 and self.refs[-1] == ref:
            return
        self.starts.append(start)
        self.refs.append(ref)


class View:
    """The flattened disk of ``layers``, newest first. Not for several threads at once."""

    def __init__(self, layers: Sequence[Source], *, whole: bool, most: int = MOST) -> None:
        """``whole``: the oldest layer, a full, must hold every byte that all others can see."""
        self._layers = layers
        self._most = most
        self.size = layers[0].size
        self._must = flatten.limits([layer.size for layer in layers])[-1] if whole else 0
        self._windows: OrderedDict[int, _Window] = OrderedDict()
        self._starts: list[int] = []
        self._pieces = 0
        self._last = _Window(0)

    def spans(self, offset: int, length: int) -> list[Span]:
        """Who holds the range, without gap; it lies within the disk. Raises what layers raise."""
        end = offset + length
        held = self._last
        if held.begin <= offset and end <= held.end:  # the usual case, in a hurry
            number = bisect.bisect_right(held.starts, offset) - 1
            if number + 1 == len(held.starts) or end <= held.starts[number + 1]:
                ref = held.refs[number]
                if ref >= 0:
                    return [(offset, length, ref >> _NUMBER_BITS, ref & _NUMBERS)]
                return [(offset, length, ref, 0)]
        found: list[Span] = []
        while offset < end:
            window = self._last
            if not window.begin <= offset < window.end:
                window = self._last = self._at(offset)
            starts, refs = window.starts, window.refs
            number = bisect.bisect_right(starts, offset) - 1
            last = len(starts) - 1
            while offset < end and number <= last:
                until = min(end, starts[number + 1] if number < last else window.end)
                ref = refs[number]
                if ref >= 0:
                    found.append((offset, until - offset, ref >> _NUMBER_BITS, ref & _NUMBERS))
                else:
                    found.append((offset, until - offset, ref, 0))
                offset = until
                number += 1
        return found

    def _at(self, offset: int) -> _Window:
        before = bisect.bisect_right(self._starts, offset) - 1
        if before >= 0:
            start = self._starts[before]
            window = self._windows[start]
            if offset < window.end:
                self._windows.move_to_end(start)
                return window
        return self._merge(offset, before)

    def _merge(self, offset: int, before: int) -> _Window:
        begin, limit = offset - offset % ALIGN, self.size
        if before >= 0:
            begin = max(begin, self._windows[self._starts[before]].end)
        if before + 1 < len(self._starts):
            limit = self._starts[before + 1]
        window = _Window(begin)
        layers = [flatten.Layer(each.size, each.places(begin)) for each in self._layers]
        for count, piece in enumerate(flatten.pieces(layers, begin)):
            if piece.end >= limit:
                window.add(piece._replace(length=limit - piece.offset), self._must)
                break
            window.add(piece, self._must)
            if count >= ENOUGH and piece.end > offset:
                break
        self._keep(window)
        return window

    def _keep(self, window: _Window) -> None:
        self._windows[window.begin] = window
        bisect.insort(self._starts, window.begin)
        self._pieces += len(window.starts)
        while self._pieces > self._most and len(self._windows) > 1:
            start, old = self._windows.popitem(last=False)
            del self._starts[bisect.bisect_left(self._starts, start)]
            self._pieces -= len(old.starts)
