"""Filling one image from the layers of one disk, in several threads.

Each thread takes the next live block, reads it into a buffer of its own writer, proves it, and
begins to write it: reading, hashing and writing of different blocks overlap, nothing is copied
between threads, and the number of buffers bounds the memory.
"""

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from nbdbackupd.errors import IntegrityError
from nbdbackupd.format.index import Record
from nbdbackupd.model.flatten import Part
from nbdbackupd.nbdio.throttle import Throttle
from nbdbackupd.ops.restore import content
from nbdbackupd.ops.restore.content import Item, Zero
from nbdbackupd.ops.restore.outputs import Output, Writer
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.layers import Layer
from nbdbackupd.threads import Threads

WAIT_SECONDS: Final = 0.1


class _Feed:
    """What is to be written, handed out one item at a time to many threads; counts what is done."""

    def __init__(
        self, items: Iterator[Item], progress: Callable[[int], None], *, zeroes: bool
    ) -> None:
        """``zeroes``: they are handed out, too; else they only count."""
        self._lock = threading.Lock()
        self._progress = progress
        self.done = 0
        self._items = items
        self._zeroes = zeroes
        self.written = 0

    def next(self) -> Item | None:
        with self._lock:
            for item in self._items:
                if self._zeroes or not isinstance(item, Zero):
                    return item
                self.done += item.length
            return None

    def finished(self, item: Item) -> None:
        """Count what was written and tell; one thread at a time."""
        with self._lock:
            if isinstance(item, Zero):
                self.done += item.length
            else:
                length = sum(length for _, length in item.ranges)
                self.written += length
                self.done += length
            self._progress(self.done)


def fill(
    output: Output,
    layers: Sequence[Layer],
    *,
    threads: Threads,
    progress: Callable[[int], None],
    items: Iterator[Item] | None = None,
    pace: Throttle | None = None,
) -> int:
    """Write ``items`` of ``layers`` (newest first); return the number of bytes written as data.

    Without ``items`` that is the whole flattened disk. ``progress`` gets the guest bytes dealt
    with so far, from one thread at a time; ``pace`` limits the bytes per second. Raises
    IntegrityError for damaged blocks, errors of the output, and what cancels the threads.
    """
    wanted = content.whole(layers) if items is None else items
    feed = _Feed(wanted, progress, zeroes=output.zeroes)

    def work() -> None:
        scratch = memoryview(mmap.mmap(-1, layering.MAX_STORED))
        with output.writer() as writer:
            while (item := feed.next()) is not None:
                threads.check()
                if isinstance(item, Zero):
                    writer.zero(item.offset, item.length)
                else:
                    _wait(pace, item, threads.check)
                    _copy(item, layers[item.layer], writer, scratch)
                feed.finished(item)
            writer.flush()

    threads.run({f"restore-{number}": work for number in range(output.writers)})
    if items is None and feed.done != layers[0].size:
        raise IntegrityError("a part of the disk was not written", **layers[0].where)
    progress(layers[0].size)
    return feed.written


def _wait(pace: Throttle | None, part: Part[Record], check: Callable[[], None]) -> None:
    if pace is None:
        return
    while delay := pace.delay():
        time.sleep(min(delay, WAIT_SECONDS))
        check()
    pace.take(sum(length for _, length in part.ranges))


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
