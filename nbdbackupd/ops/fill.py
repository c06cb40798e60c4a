"""Filling one image from the layers of one disk, in several threads.

Each thread takes the next live block, reads it into a buffer of its own writer, proves it, and
begins to write it: reading, hashing and writing of different blocks overlap, nothing is copied
between threads, and the number of buffers bounds the memory.
"""

import mmap
import threading
from collections.abc import Callable, Iterator

from nbdbackupd.crew import Crew
from nbdbackupd.format.index import Record
from nbdbackupd.model.flatten import Part
from nbdbackupd.ops import layers as layering
from nbdbackupd.ops.layers import Layer
from nbdbackupd.ops.outputs import Output, Writer


class _Feed:
    """The live blocks, handed out one at a time to many threads; counts what is done."""

    def __init__(self, layers: list[Layer], progress: Callable[[int], None]) -> None:
        self._lock = threading.Lock()
        self._progress = progress
        self._done = 0
        self._blocks: Iterator[Part[Record]] = layering.live_blocks(layers, self._count)
        self.written = 0

    def _count(self, length: int) -> None:
        self._done += length

    def next(self) -> Part[Record] | None:
        with self._lock:
            return next(self._blocks, None)

    def finished(self, length: int) -> None:
        """Count written bytes and tell; one thread at a time."""
        with self._lock:
            self.written += length
            self._done += length
            self._progress(self._done)


def fill(
    output: Output, layers: list[Layer], *, crew: Crew, progress: Callable[[int], None]
) -> int:
    """Write the flattened ``layers`` (newest first) and return the number of bytes written.

    ``progress`` gets the guest bytes dealt with so far, from one thread at a time. Raises
    IntegrityError for damaged blocks, errors of the output, and what cancels the crew.
    """
    feed = _Feed(layers, progress)

    def work() -> None:
        scratch = memoryview(mmap.mmap(-1, layering.MAX_STORED))
        with output.writer() as writer:
            while (part := feed.next()) is not None:
                crew.check()
                _copy(part, layers[part.layer], writer, scratch)
                feed.finished(sum(length for _, length in part.ranges))
            writer.flush()

    crew.run({f"restore-{number}": work for number in range(output.writers)})
    progress(layers[0].size)
    return feed.written


def _copy(part: Part[Record], layer: Layer, writer: Writer, scratch: memoryview) -> None:
    record = part.block
    slot = writer.take()
    view = writer.view(slot, record.length)
    layer.read(record, view, scratch)
    if part.ranges == ((record.offset, record.length),):
        writer.write(slot, record.length, record.offset)
        return
    for offset, length in part.ranges:
        # A request starts at the beginning of its slot (libnbd's buffers are made once for each
        # slot and length), so a piece from within a block moves to a slot of its own.
        piece = writer.take()
        start = offset - record.offset
        writer.view(piece, length)[:] = view[start : start + length]
        writer.write(piece, length, offset)
    writer.release(slot)
