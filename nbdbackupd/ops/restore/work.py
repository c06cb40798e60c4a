"""Carrying out what a restore has planned: filling the images, several disks at a time.

Of one image several threads take the next live block each, read it into a buffer of their own
writer, prove it, and begin to write it: reading, hashing and writing of different blocks overlap,
nothing is copied between threads, and the number of buffers bounds the memory.
"""

import logging
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nbdbackupd import durable
from nbdbackupd.errors import IntegrityError, NbdbackupError
from nbdbackupd.format.index import Kind, Record
from nbdbackupd.model import flatten
from nbdbackupd.model.flatten import Part, Piece
from nbdbackupd.nbdio.throttle import Throttle
from nbdbackupd.ops.restore import outputs
from nbdbackupd.ops.restore.outputs import Output, Writer
from nbdbackupd.ops.restore.plan import DiskJob, Step
from nbdbackupd.ops.restore.request import Progress, RestoredDisk, RestoreRequest, Style
from nbdbackupd.ops.restore.sites import Site, Work
from nbdbackupd.ops.sets import layers as layering
from nbdbackupd.ops.sets.layers import Layer
from nbdbackupd.qemu import image
from nbdbackupd.threads import Threads, side_by_side


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

    Two blocks of one digest at one place are the same, unless a guest can make other bytes of it,
    and so are zeroes. Beyond the end of the older disk all is zero. Raises IntegrityError.
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
    ) and one.is_vouched


def _data(piece: Piece[Record]) -> Record | None:
    return piece.block if piece.block is not None and piece.block.kind == Kind.DATA else None


log = logging.getLogger(__name__)


def write_all(
    jobs: Sequence[DiskJob],
    request: RestoreRequest,
    pace: Throttle | None,
    progress: Progress,
    cancelled: Callable[[], None],
) -> tuple[RestoredDisk, ...]:
    """Fill what each job needs, ``request.jobs`` of them at a time; the first error ends all.

    Raises as ``restore.run``.
    """
    for job in jobs:
        progress(job.target, 0, job.size * len(job.steps))

    def write(job: DiskJob, check: Callable[[], None]) -> RestoredDisk:
        return _Writer(job, request, pace, progress, check).run()

    # the largest first: else it may be what all the others wait for at the end
    ordered = sorted(jobs, key=lambda job: -job.size) if request.jobs > 1 else jobs
    written = side_by_side(ordered, request.jobs, write, cancelled)
    done = {job.target: disk for job, disk in zip(ordered, written, strict=True)}
    return tuple(done[job.target] for job in jobs)


class _Writer:
    """One disk being written, whose thread asks ``cancelled``."""

    def __init__(
        self,
        job: DiskJob,
        request: RestoreRequest,
        pace: Throttle | None,
        progress: Progress,
        cancelled: Callable[[], None],
    ) -> None:
        self._job = job
        self._request = request
        self._pace = pace
        self._progress = progress
        self._cancelled = cancelled
        self._finished = 0

    def run(self) -> RestoredDisk:
        """Fill all images of the disk. Raises as ``restore.run``."""
        job, begun = self._job, time.monotonic()
        try:
            with durable.translate_os_errors("restore", job.site.incomplete):
                written = self._write()
        except NbdbackupError as err:
            err.fields.setdefault("disk", job.target)
            raise
        seconds = time.monotonic() - begun
        log.info("disk %s restored, %d bytes written in %.1f s", job.target, written, seconds)
        older = tuple(step.site.final for step in job.steps if step.site is not None)
        return RestoredDisk(
            target=job.target,
            path=job.site.final,
            format=job.options.format,
            size=job.size,
            data_bytes=written,
            seconds=seconds,
            images=older,
            points=tuple(step.point for step in job.steps if step.point),
        )

    def _write(self) -> int:
        if self._job.style is Style.CHAIN:
            return self._chain()
        if self._job.style is Style.SNAPSHOTS:
            return self._snapshots()
        return self._whole(self._job.steps[-1], self._job.site)

    def _chain(self) -> int:
        """An image for each point; one that read the whole disk stands by itself."""
        written = 0
        below: Site | None = None
        overlays: list[tuple[Path, Site]] = []
        for step in self._job.steps:
            site = step.site or self._job.site
            if step.is_whole or below is None:
                written += self._whole(step, site)
            else:
                path = site.incomplete
                os.close(outputs.create_private(path))
                size = step.layers[0].size
                image.create(path, size, self._job.options, backing=below.incomplete)
                written += self._on_top(step, path, delta(step.layers[0]))
                overlays.append((path, below))
            below = site
        for path, _ in overlays:
            self._cancelled()
            image.check(path, format="qcow2")
        for path, lower in overlays:
            image.name_backing(path, lower.final)
            durable.fsync_file(path)
        return written

    def _snapshots(self) -> int:
        """One image; each step writes what changed, and is kept by a snapshot."""
        site, written = self._job.site, 0
        before: Step | None = None
        for step in self._job.steps:
            path = site.incomplete
            if before is None:
                written += self._whole(step, site)
            else:
                older, newer = before.layers, step.layers
                if newer[0].size != older[0].size:
                    image.resize(path, newer[0].size, shrink=newer[0].size < older[0].size)
                changes = difference(newer, older) if step.is_whole else delta(newer[0])
                written += self._on_top(step, path, changes)
            image.take_snapshot(path, step.point)
            before = step
        self._cancelled()
        image.check(site.incomplete, format="qcow2")
        durable.fsync_file(site.incomplete)
        return written

    def _whole(self, step: Step, site: Site) -> int:
        threads = Threads(self._cancelled)
        with site.open(self._work(step, threads)) as output:
            return self._fill(output, step, threads, None)

    def _on_top(self, step: Step, path: Path, items: Iterator[Item]) -> int:
        threads = Threads(self._cancelled)
        with outputs.changed(
            path, workers=self._request.workers, cancelled=self._cancelled, check=threads.check
        ) as output:
            return self._fill(output, step, threads, items)

    def _work(self, step: Step, threads: Threads) -> Work:
        return Work(
            size=step.layers[0].size,
            options=self._job.options,
            compress=self._request.compress,
            workers=self._request.workers,
            cancelled=self._cancelled,
            check=threads.check,
        )

    def _fill(
        self, output: Output, step: Step, threads: Threads, items: Iterator[Item] | None
    ) -> int:
        job = self._job
        total, before = job.size * len(job.steps), self._finished

        def tell(done: int) -> None:
            self._progress(job.target, min(total, before + min(done, job.size)), total)

        written = fill(
            output, step.layers, threads=threads, progress=tell, items=items, pace=self._pace
        )
        self._finished += job.size
        self._progress(job.target, self._finished, total)
        return written


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
    wanted = whole(layers) if items is None else items
    feed = _Feed(wanted, progress, zeroes=output.zeroes)

    def work() -> None:
        scratch = memoryview(mmap.mmap(-1, layering.MAX_STORED))
        with output.writer() as writer:
            while (item := feed.next()) is not None:
                threads.check()
                if isinstance(item, Zero):
                    writer.zero(item.offset, item.length)
                else:
                    if pace is not None:
                        pace.wait(sum(length for _, length in item.ranges), threads.check)
                    _copy(item, layers[item.layer], writer, scratch)
                feed.finished(item)
            writer.flush()

    threads.run({f"restore-{number}": work for number in range(output.writers)})
    if items is None and feed.done != layers[0].size:
        raise IntegrityError("a part of the disk was not written", **layers[0].where)
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
