"""The copy pipeline: from an export through some threads into a sink.

::

    plan -> batches -> reads in flight on each connection -> prepare -> order -> place, write

* A **batch** is a block of the plan, or several small ones that follow one another, in one buffer
  of an arena that is allocated once: fresh buffers would cost a page fault per page.
* There are no threads of one kind only. Each one takes a batch that was read, and else a
  connection that nobody drives, and reads on it until a batch is there. So what was just received
  is mostly hashed and written by the same thread, from its processor's cache.
* No more than ``workers`` threads work on batches, and there is one more for each connection: what
  was asked for is received whatever becomes of the target, since QEMU may wait for that.
* ``Sink.prepare`` hashes and compresses; these C calls run without Python's lock.
* Batches get their places in guest order (``Sink.place``, under one lock) and are written by
  whichever thread placed them (``Sink.write``), neighbours together.

At the end all is accounted for: each byte of the plan was read or noted as zero, placed and
written, the plan covers the disk, and the server still answers.

The number of buffers bounds the memory. Several copies may go on at a time: they share one arena,
and with it the buffers and the number of threads that are at work. A batch gets its ticket when it
already has its buffer, so the oldest ticket is always in flight and the order stage can't starve.
The first error stops all threads and is raised by ``copy``; so is what the cancel callback raises.
"""

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final, Generic, Protocol, TypeVar

from nbdbackupd.errors import NbdError
from nbdbackupd.model import extents as model
from nbdbackupd.model.extents import Segment
from nbdbackupd.nbdio import extents
from nbdbackupd.nbdio.arena import Arena
from nbdbackupd.nbdio.client import (
    ALLOCATION,
    DIRTY_PREFIX,
    Connection,
    Endpoint,
    Patience,
)
from nbdbackupd.nbdio.extents import ExtentReader
from nbdbackupd.nbdio.requests import Requests
from nbdbackupd.nbdio.throttle import Throttle
from nbdbackupd.threads import Threads

B = TypeVar("B")
TICK: Final = 0.1
"""Seconds between two looks at the cancel callback and at the stop flag."""

CELLS: Final = 16
"""So many small pieces of the plan share a buffer; each begins at a multiple of its part of it."""

REQUEST: Final = 256 << 10
"""Bytes that are asked for at a time. Of 1 MiB QEMU 7.2 gets its buffer from the kernel anew each
time, which costs the guest twice the processor time (measured: 0.70 and 0.38 s for a GiB)."""

MANY: Final = 64
"""Pieces of a batch, zeroes among them."""


class Sink(Protocol[B]):
    """Where blocks go; see ``format.writer`` for who may call what from where."""

    def prepare(self, offset: int, view: memoryview) -> B:
        """Digest guest bytes; ``view`` stays valid until ``write`` returned."""

    def zero(self, offset: int, length: int) -> B:
        """A block of zeroes."""

    def place(self, block: B) -> None:
        """Give it its place; called in guest order."""

    def write(self, *blocks: B) -> None:
        """Write some that were placed one after the other."""


def default_workers() -> int:
    """One thread for each processor, at most 8."""
    return min(8, os.cpu_count() or 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Sizes of the pipeline. Memory is about ``buffers * block`` bytes.

    ``connections`` is an upper bound: one is used where the server has no multi-conn.
    """

    workers: int = 2
    connections: int = 2
    depth: int = 4
    block: int = 1 << 20

    @property
    def buffers(self) -> int:
        """Enough for all requests in flight and for what the workers hold."""
        return self.connections * self.depth + 4 * self.workers

    def arena(self) -> Arena:
        """The buffers for a run; to be used for all of its disks, see ``nbdio.arena``."""
        return Arena(self.buffers, self.block)


@dataclass(slots=True)
class _Batch:
    """Pieces of the plan that are read, placed and written together; ``waiting`` for reads."""

    ticket: int
    segments: list[Segment]
    slot: int
    waiting: int


@dataclass(slots=True)
class _Line:
    """A connection, which one thread at a time drives; ``reading`` batches are in flight."""

    connection: Connection
    requests: Requests
    reading: int = 0


def copy(
    endpoint: Endpoint,
    sink: Sink[B],
    *,
    tuning: Tuning,
    arena: Arena,
    patience: Patience,
    progress: Callable[[Segment], None],
    plan: Iterator[Segment] | None = None,
    throttle: Throttle | None = None,
) -> None:
    """Copy what the plan says of one export into ``sink``, in guest order.

    ``plan`` replaces our own block status queries. ``progress`` gets each piece of the plan
    that found its place, in guest order, from any thread, never two at once. ``throttle`` limits
    how fast data is read; zeroes and holes are not counted.

    Raises NbdError and whatever the sink or ``patience.cancelled`` raise.
    """
    pipeline = _Pipeline(sink, tuning, arena, patience, progress, throttle=throttle)
    with ExitStack() as stack:

        def connect(*contexts: str) -> Connection:
            return stack.enter_context(
                Connection(endpoint, contexts=contexts, patience=pipeline.patience)
            )

        thrifty = endpoint.is_thrifty
        control = connect(*(endpoint.contexts if thrifty else (ALLOCATION,)))
        if plan is None:
            separate = endpoint.bitmap and not thrifty
            changes = connect(DIRTY_PREFIX + endpoint.bitmap) if separate else None
            plan = ExtentReader(control, bitmap=endpoint.bitmap, changes=changes).plan()
        plan = model.proven(plan, control.size, whole=not endpoint.bitmap)
        count = tuning.connections if control.multi_conn and not thrifty else 1
        lines = []
        for _ in range(count):
            line = stack.enter_context(Connection(endpoint, patience=patience))
            line.patience = pipeline.patience
            lines.append(_Line(line, stack.enter_context(Requests(line))))
        pipeline.run(lines, plan)
        control.patience = patience
        extents.prove_alive(control)


class _Pipeline(Generic[B]):
    """The shared state of one copy; see the module's picture."""

    def __init__(
        self,
        sink: Sink[B],
        tuning: Tuning,
        arena: Arena,
        patience: Patience,
        progress: Callable[[Segment], None],
        *,
        throttle: Throttle | None = None,
    ) -> None:
        self._throttle = throttle
        self._sink = sink
        self._tuning = tuning
        self._arena = arena
        self._progress = progress
        self._threads = Threads(patience.cancelled)
        self.patience = replace(patience, cancelled=self._threads.check)
        self._plan: Iterator[Segment] = iter(())
        self._plan_lock = threading.Lock()
        self._over: Segment | None = None
        self._exhausted = False
        self._tickets = 0
        self._planned = 0
        self._placed = 0
        self._written = 0
        self._held = 0
        self._whole: deque[_Batch] = deque()
        # who waits for one of them, a free buffer, or a connection to drive
        self._turn = threading.Condition(arena.lock)
        self._idle: deque[_Line] = deque()
        self._lines = 0
        self._order_lock = threading.Lock()
        self._ready: dict[int, tuple[_Batch, list[B]]] = {}
        self._next = 0

    def run(self, lines: list[_Line], plan: Iterator[Segment]) -> None:
        """Start all threads, wait for them, raise the first error."""
        self._plan = model.split(plan, self._arena.block)
        self._idle.extend(lines)
        self._lines = len(lines)
        threads = self._tuning.workers + len(lines)
        bodies = {f"copy-{number}": self._work for number in range(threads)}
        with self._arena.turn() as self._turn:
            self._threads.run(bodies)
        self._prove()

    def _prove(self) -> None:
        """Raise NbdError if a byte of the plan did not get to its place."""
        rest = self._over or next(self._plan, None)
        counts = (self._planned, self._placed, self._written)
        if rest is not None or self._ready or self._next != self._tickets or len({*counts}) != 1:
            raise NbdError(
                "the copy is short of what was to be read",
                planned=self._planned,
                placed=self._placed,
                written=self._written,
            )

    def _work(self) -> None:
        """What each thread does until all is read and written."""
        while (found := self._take()) is not None:
            if isinstance(found, _Line):
                self._drive(found)
            else:
                self._finish(found)

    def _take(self) -> _Batch | _Line | None:
        """Something to do; None at the end."""
        with self._turn:
            while True:
                self._threads.check()
                if self._may_work():
                    self._arena.working += 1
                    return self._whole.popleft()
                # in turn, so that none is forgotten with the oldest ticket in flight
                for _ in range(len(self._idle)):
                    line = self._idle.popleft()
                    if line.reading or self._exhausted or self._may_ask():
                        return line
                    self._idle.append(line)
                if not self._lines and not self._whole:
                    return None
                self._turn.wait(TICK)

    def _may_work(self) -> bool:
        """Whether there is a batch to work on, and a thread may do so."""
        return bool(self._whole) and self._arena.working < self._tuning.workers

    def _may_ask(self) -> bool:
        """Whether there is a buffer to read into, and not too much to work on."""
        is_free = bool(self._arena.free) and self._held < self._arena.share
        return is_free and len(self._whole) <= self._tuning.depth

    # reading

    def _drive(self, line: _Line) -> None:
        """Read on a connection until there is something to work on, or nothing to read."""
        while not self._may_work():
            self._threads.check()
            self._fill(line)
            if not line.reading:
                break
            line.requests.step()
        with self._turn:
            if line.reading or not self._exhausted:
                self._idle.append(line)
                # one for the connection, and one for each batch but that which we take
                self._turn.notify(len(self._whole) or 1)
            else:
                self._lines -= 1
                self._turn.notify_all()

    def _fill(self, line: _Line) -> None:
        """Have as many batches in flight as is allowed and possible."""
        while line.reading < self._tuning.depth and self._may_ask():
            if self._exhausted or not self._may_read(wait=not line.reading):
                return
            with self._turn:
                if not self._may_ask():
                    return
                slot = self._arena.free.pop()
                self._held += 1
            with self._plan_lock:
                self._threads.check()
                batch = self._gather(slot)
            if batch is None:
                with self._turn:
                    self._release([slot])
                return
            if not batch.waiting:
                self._whole.append(batch)
                continue
            line.reading += 1
            self._submit(line, batch)

    def _may_read(self, *, wait: bool) -> bool:
        """Whether the throttle lets one more request go; False only if not to ``wait`` for it."""
        while self._throttle is not None and (delay := self._throttle.delay()) > 0:
            if not wait:
                return False
            self._threads.check()
            time.sleep(min(delay, TICK))
        return True

    def _gather(self, slot: int) -> _Batch | None:
        """The next pieces of the plan that fit into ``slot``; None if there are none."""
        cell = self._arena.block // CELLS
        segments: list[Segment] = []
        used = count = 0
        while len(segments) < MANY:
            segment = self._over or next(self._plan, None)
            self._over = None
            if segment is None:
                self._exhausted = True
                break
            if not segment.zero:
                need = 1 if segment.length <= cell else CELLS
                if used + need > CELLS:
                    self._over = segment
                    break
                used += need
                count += -(-segment.length // REQUEST)
            segments.append(segment)
            self._planned += segment.length
        if not segments:
            return None
        self._tickets += 1
        return _Batch(self._tickets - 1, segments, slot, count)

    def _submit(self, line: _Line, batch: _Batch) -> None:
        """Begin to read all of a batch."""

        def done() -> None:
            batch.waiting -= 1
            if not batch.waiting:
                line.reading -= 1
                self._whole.append(batch)

        for segment, start in self._cells(batch):
            if self._throttle is not None:
                self._throttle.take(segment.length)
            for skip in range(0, segment.length, REQUEST):
                length, offset = min(REQUEST, segment.length - skip), segment.offset + skip
                buffer = self._arena.buffer(batch.slot, length, start + skip)
                line.requests.begin(
                    "read",
                    functools.partial(line.connection.handle.aio_pread, buffer, offset),
                    {"offset": offset, "length": length},
                    done,
                )

    def _cells(self, batch: _Batch) -> Iterator[tuple[Segment, int]]:
        """The data of a batch, and where in its buffer it lies."""
        cell, start = self._arena.block // CELLS, 0
        for segment in batch.segments:
            if not segment.zero:
                yield segment, start
                start += cell

    # writing

    def _finish(self, batch: _Batch) -> None:
        """Prepare a batch; place and write what is due."""
        sink, blocks = self._sink, []
        data = self._cells(batch)
        for segment in batch.segments:
            if segment.zero:
                blocks.append(sink.zero(segment.offset, segment.length))
            else:
                _, start = next(data)
                view = self._arena.view(batch.slot, segment.length, start)
                blocks.append(sink.prepare(segment.offset, view))
        due = self._place(batch, blocks)
        if due:
            sink.write(*(block for _, placed in due for block in placed))
        written = sum(segment.length for each, _ in due for segment in each.segments)
        with self._turn:
            self._arena.working -= 1
            self._written += written
            self._release([each.slot for each, _ in due])
            if not self._lines:
                self._turn.notify_all()

    def _release(self, slots: list[int]) -> None:
        """Give buffers back; to be called with the arena's lock."""
        self._held -= len(slots)
        self._arena.free.extend(slots)
        self._arena.wake()

    def _place(self, batch: _Batch, blocks: list[B]) -> list[tuple[_Batch, list[B]]]:
        """Note a prepared batch; place all that are now in unbroken order and return them."""
        due = []
        with self._order_lock:
            self._ready[batch.ticket] = (batch, blocks)
            while (ready := self._ready.pop(self._next, None)) is not None:
                for segment, block in zip(ready[0].segments, ready[1], strict=True):
                    self._sink.place(block)
                    self._progress(segment)
                    self._placed += segment.length
                due.append(ready)
                self._next += 1
        return due
