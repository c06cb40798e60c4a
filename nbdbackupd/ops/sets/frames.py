"""Blocks that are parts of larger lz4 frames: each frame is decompressed once, memory is bounded.

Our own frames hold a block each. Those of virtnbdbackup hold a whole extent, up to the 32 MiB of
one NBD request (measured with 1.9.15 and 2.28), and only from its beginning can a frame be read.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Final

from nbdbackupd.errors import IntegrityError
from nbdbackupd.format import blocks
from nbdbackupd.format.index import MAX_BLOCK, NO_DIGEST, Kind, Record
from nbdbackupd.format.stream import Frame

MAX_FRAME: Final = 64 << 20
"""Guest bytes of one lz4 frame; one of more is refused. No NBD server known to us replies more."""

CACHE_BYTES: Final = 96 << 20
"""Room for three of the largest frames that are known."""

FRAME_HEAD: Final = 15
"""Bytes of an lz4 frame's header that tell how much it holds."""


def max_stored(length: int) -> int:
    """The most bytes that an lz4 frame of so many takes: its headers, and those of its blocks."""
    return length + length // 4096 + (64 << 10)


class _Loading:
    """A frame that one thread loads; others wait until it is ``done``."""

    __slots__ = ("done", "frame", "length")

    def __init__(self, length: int) -> None:
        self.done = threading.Event()
        self.frame: bytes | None = None
        self.length = length


class FrameCache:
    """Decompressed frames, the last used ones, up to a number of bytes; shared by threads.

    Each is loaded by one thread, without the lock. Those being loaded count, so that more than
    ``capacity`` is only held for one frame that is larger.
    """

    def __init__(self, capacity: int = CACHE_BYTES) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._frames: OrderedDict[Hashable, bytes] = OrderedDict()
        self._loading: dict[Hashable, _Loading] = {}
        self._bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._frames

    def get(self, key: Hashable, length: int, load: Callable[[], bytes]) -> bytes:
        """The frame of that key, of ``length`` bytes; by ``load`` if need be. Raises as that."""
        while True:
            with self._lock:
                frame = self._frames.get(key)
                if frame is not None:
                    self._frames.move_to_end(key)
                    return frame
                other = self._loading.get(key)
                # the one that is loaded elsewhere, else the one that takes the room
                awaited = other or self._in_the_way(length)
                if awaited is None:
                    mine = self._loading[key] = _Loading(length)
                    break
            awaited.done.wait()
            if awaited is other and other.frame is not None:
                return other.frame
        try:
            mine.frame = load()
            return mine.frame
        finally:
            with self._lock:
                del self._loading[key]
                if mine.frame is not None:
                    self._frames[key] = mine.frame
                    self._bytes += len(mine.frame)
            mine.done.set()

    def _in_the_way(self, length: int) -> _Loading | None:
        """Make room for a frame, or tell what must be loaded before."""
        loading = sum(each.length for each in self._loading.values())
        if loading and loading + length > self._capacity:
            return next(iter(self._loading.values()))
        while self._frames and self._bytes + loading + length > self._capacity:
            _, dropped = self._frames.popitem(last=False)
            self._bytes -= len(dropped)
        return None


def records(frame: Frame, read: Callable[[int, int], bytes]) -> Iterator[Record]:
    """The blocks of a compressed data frame, none longer than ``MAX_BLOCK``, without digests.

    ``read`` takes a position in the file and a length. Raises IntegrityError if the lz4 frames
    do not hold what the data frame says.
    """
    start, position = frame.start, frame.position
    for stored in frame.parts or (frame.stored,):
        length = frame.length
        if frame.parts:
            length = blocks.content_size(read(position, min(FRAME_HEAD, stored)))
        if start + length > frame.start + frame.length:
            raise IntegrityError("lz4 frame holds more than its block", offset=position)
        if length > MAX_FRAME or stored > max_stored(length):
            raise IntegrityError("lz4 frame is too large", offset=position, length=length)
        if length <= MAX_BLOCK:
            yield Record(start, length, position, stored, Kind.DATA, NO_DIGEST)
        else:
            for skip in range(0, length, MAX_BLOCK):
                part = min(MAX_BLOCK, length - skip)
                yield Record(
                    start + skip, part, position, stored, Kind.DATA, NO_DIGEST, skip, length
                )
        start += length
        position += stored
    if start != frame.start + frame.length:
        raise IntegrityError("lz4 frames hold less than their block", offset=frame.position)
