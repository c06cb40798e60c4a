"""Proving the bytes of one stream or raw image, in one pass with several threads.

The index, which the manifest vouches for, says what every byte of a stream must be: each frame
header, terminator and the trailer exactly, each payload by its SHA-256. So damage is found
wherever it is, and one bad byte does not hide the next. The file is cut in runs of about 1 MiB;
threads read and prove a run each and return its Adler-32, and these are joined in order.
"""

import itertools
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Self

from nbdbackupd.errors import FormatError, IntegrityError
from nbdbackupd.format import adler, blocks, stream
from nbdbackupd.format.index import Kind, Record
from nbdbackupd.format.stream import HEADER_LENGTH, TERMINATOR, pack_header
from nbdbackupd.model.chain import Codec
from nbdbackupd.ops.sets import layers
from nbdbackupd.ops.sets.layers import IndexedLayer

RUN_BYTES: Final = 1 << 20
RUN_MAX: Final = RUN_BYTES + layers.MAX_STORED + HEADER_LENGTH + len(TERMINATOR)
ZEROES: Final = bytes(RUN_BYTES)
WINDOW: Final = 4
"""Runs that wait for each thread."""

Report = Callable[[str, int], None]
"""Gets a message and the offset in the file that it is about."""


@dataclass(slots=True)
class Run:
    """File bytes ``[start, end)`` and what must be there."""

    start: int
    end: int
    headers: list[tuple[int, bytes]] = field(default_factory=list)
    payloads: list[Record] = field(default_factory=list)


class Prover:
    """Threads and their buffers, for all files of a verification; a context manager."""

    def __init__(self, workers: int, cancelled: Callable[[], None]) -> None:
        """``cancelled`` is called between runs, in the calling thread, and may raise."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="verify")
        self._window = workers * WINDOW
        self._cancelled = cancelled
        self._local = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def prove(
        self,
        layer: IndexedLayer,
        runs: Iterable[Run],
        report: Report,
        progress: Callable[[int], None],
    ) -> int:
        """Prove runs, which follow one another from byte 0 on; return the Adler-32 of them all.

        Ends at the first run that the file does not hold. ``progress`` gets the bytes proven.
        Raises OSError if the file can't be read.
        """
        total, done = adler.START, 0
        waiting: deque[tuple[Run, Future[int | None]]] = deque()
        feed = iter(runs)
        try:
            while True:
                self._cancelled()
                for run in itertools.islice(feed, self._window - len(waiting)):
                    waiting.append((run, self._pool.submit(self._prove_run, layer, run, report)))
                if not waiting:
                    return total
                run, future = waiting.popleft()
                found = future.result()
                if found is None:
                    return total
                total = adler.combine(total, found, run.end - run.start)
                done += run.end - run.start
                progress(done)
        finally:
            for _, future in waiting:
                future.cancel()

    def _buffer(self) -> memoryview:
        """The calling thread's."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(mmap.mmap(-1, RUN_MAX))
        buffer: memoryview = self._local.buffer
        return buffer

    def _prove_run(self, layer: IndexedLayer, run: Run, report: Report) -> int | None:
        """Prove one run; its Adler-32, or None if the file ends before."""
        buffer = self._buffer()[: run.end - run.start]
        if run.end > layer.file_size:
            report("file ends too early", layer.file_size)
            return None
        layer.read_at(buffer, run.start)
        for place, expected in run.headers:
            found = bytes(buffer[place - run.start : place - run.start + len(expected)])
            if found != expected:
                report(
                    "frame header or terminator is damaged",
                    place + first_difference(found, expected),
                )
        for record in run.payloads:
            start = record.position - run.start
            problem = self._payload_problem(layer, record, buffer[start : start + record.stored])
            if problem:
                report(problem, record.position)
        return adler.adler32(buffer)

    def _payload_problem(self, layer: IndexedLayer, record: Record, stored: memoryview) -> str:
        block: adler.Buffer = stored
        if layer.codec is not Codec.NONE:
            try:
                block = blocks.decompress(stored, record.length, layer.codec)
            except FormatError as err:
                return err.message
        if blocks.digest(block, layer.digest) != record.digest:
            return (
                f"block of guest bytes {record.offset}+{record.length} does not match "
                f"its {layer.digest.label}"
            )
        return ""


def first_difference(left: bytes, right: bytes) -> int:
    """The first index at which two byte strings differ."""
    return next(
        (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


def stream_runs(layer: IndexedLayer, first: int) -> Iterator[Run]:
    """The runs of a stream: its meta frame, which ends at ``first``, then what the index wants.

    Raises IntegrityError if the index's places do not follow one another.
    """
    yield from plain_runs(0, first)
    run = Run(first, first)
    sizes = 0
    for record in layer.records():
        kind = stream.DATA if record.kind == Kind.DATA else stream.ZERO
        run.headers.append((run.end, pack_header(kind, record.offset, record.length)))
        run.end += HEADER_LENGTH
        if record.kind == Kind.DATA:
            if record.position != run.end:
                raise IntegrityError("the index does not fit the stream", offset=run.end)
            run.payloads.append(record)
            run.end += record.stored
            run.headers.append((run.end, TERMINATOR))
            run.end += len(TERMINATOR)
            sizes += 1
        if run.end - run.start >= RUN_BYTES:
            yield run
            run = Run(run.end, run.end)
    yield run
    yield from _expected(run.end, _trailer(layer))


def _trailer(layer: IndexedLayer) -> Iterator[bytes]:
    """The bytes after the last block, in parts of bounded size."""
    yield pack_header(stream.STOP, 0, 0)
    if layer.codec is Codec.NONE:
        return
    length = 0
    opening = "["
    stored = (record.stored for record in layer.records() if record.kind == Kind.DATA)
    while part := list(itertools.islice(stored, 1 << 14)):
        text = (opening + ", ".join(map(str, part))).encode()
        length += len(text)
        opening = ", "
        yield text
    closing = b"[]" if opening == "[" else b"]"
    yield closing + TERMINATOR + pack_header(stream.COMP, 0, length + len(closing))


def _expected(start: int, parts: Iterable[bytes]) -> Iterator[Run]:
    for part in parts:
        yield Run(start, start + len(part), headers=[(start, part)])
        start += len(part)


def plain_runs(start: int, end: int) -> Iterator[Run]:
    """Runs of which only the Adler-32 is wanted."""
    for at in range(start, end, RUN_BYTES):
        yield Run(at, min(at + RUN_BYTES, end))


def raw_runs(layer: IndexedLayer) -> Iterator[Run]:
    """The blocks of a raw image; holes and zeroes are ``raw_zero_problems``' matter."""
    for record in layer.records():
        if record.kind == Kind.DATA:
            yield Run(record.position, record.position + record.stored, payloads=[record])


def prove_raw_zeroes(layer: IndexedLayer, report: Report, check: Callable[[], None]) -> None:
    """Prove that a raw image reads as zeroes where its index says so; holes are not read."""
    for record in layer.records():
        if record.kind != Kind.ZERO:
            continue
        place = record.offset
        while place < record.end:
            check()
            with layer.file.lent() as fd:
                place = _next_data(fd, place, record.end)
            part = layer.file.pread(min(RUN_BYTES, record.end - place), place)
            if part != ZEROES[: len(part)]:
                report("not zero, as the index says", place + first_difference(part, ZEROES))
                break
            if not part:
                break
            place += len(part)


def _next_data(fd: int, place: int, end: int) -> int:
    try:
        return min(os.lseek(fd, place, os.SEEK_DATA), end)
    except OSError:  # no data behind: ENXIO
        return end
