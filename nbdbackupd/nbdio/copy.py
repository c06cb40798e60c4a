"""The copy pipeline: from an export through worker threads into a sink.

::

    plan -> readers (one per connection, requests in flight) -> workers -> order -> sink

* Each **reader** thread owns one NBD connection and keeps ``depth`` reads in flight into buffers
  of one arena that is allocated once: fresh buffers would cost a page fault per page.
* **Workers** hash and compress (``Sink.prepare``); these C calls run without Python's lock.
* Blocks get their places in guest order (``Sink.place``, under one lock) and are written by
  whichever worker placed them (``Sink.write``), a positioned write each.

The number of buffers bounds the memory. A block gets its ticket when it already has its buffer,
so the oldest ticket is always in flight and the order stage can't starve. The first error stops
all threads and is raised by ``copy``; so is what the cancel callback raises.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final, Generic, Protocol, TypeVar

import nbd

from nbdbackupd.crew import Crew
from nbdbackupd.errors import NbdError
from nbdbackupd.model import extents
from nbdbackupd.model.extents import Segment
from nbdbackupd.nbdio.arena import Arena
from nbdbackupd.nbdio.client import (
    ALLOCATION,
    DIRTY_PREFIX,
    Connection,
    Endpoint,
    Patience,
    errno_name,
)
from nbdbackupd.nbdio.extents import ExtentReader
from nbdbackupd.nbdio.throttle import Throttle

B = TypeVar("B")
TICK: Final = 0.1
"""Seconds between two looks at the cancel callback and at the stop flag."""


class Sink(Protocol[B]):
    """Where blocks go; see ``format.writer`` for who may call what from where."""

    def prepare(self, offset: int, view: memoryview) -> B:
        """Digest guest bytes; ``view`` stays valid until ``write`` returned."""

    def zero(self, offset: int, length: int) -> B:
        """A block of zeroes."""

    def place(self, block: B) -> None:
        """Give it its place; called in guest order."""

    def write(self, block: B) -> None:
        """Write it."""


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

        control = connect() if plan is not None else connect(ALLOCATION)
        if plan is None:
            changes = connect(DIRTY_PREFIX + endpoint.bitmap) if endpoint.bitmap else None
            plan = ExtentReader(control, bitmap=endpoint.bitmap, changes=changes).plan()
        several = control.can_multi_conn()
        pipeline.run(endpoint, plan, tuning.connections if several else 1)


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
        self._crew = Crew(patience.cancelled)
        self.patience = replace(patience, cancelled=self._crew.check)
        self._plan: Iterator[Segment] = iter(())
        self._plan_lock = threading.Lock()
        self._tickets = 0
        self._reading = 0
        # not SimpleQueue: its timed get waits for ever if a signal interrupts it and the time is
        # over when it looks again (CPython 3.11, seen with a process that was stopped)
        self._work: queue.Queue[tuple[int, Segment, int] | None] = queue.Queue()
        self._free: queue.Queue[int] = queue.Queue()
        self._order_lock = threading.Lock()
        self._ready: dict[int, tuple[B, Segment, int]] = {}
        self._next = 0

    def run(self, endpoint: Endpoint, plan: Iterator[Segment], connections: int) -> None:
        """Start all threads, wait for them, raise the first error."""
        self._plan = extents.split(plan, self._arena.block)
        for number in range(self._arena.count):
            self._free.put(number)
        self._reading = connections
        bodies: dict[str, Callable[[], None]] = {}
        for number in range(connections):
            bodies[f"read-{number}"] = lambda: self._read(endpoint)
        for number in range(self._tuning.workers):
            bodies[f"work-{number}"] = self._work_off
        self._crew.run(bodies)

    # readers

    def _read(self, endpoint: Endpoint) -> None:
        """Keep reads in flight on one connection until the plan is used up.

        The last reader to end sends the workers home.
        """
        with Connection(endpoint, patience=self.patience) as connection:
            reader = _Reader(connection, self._arena, self._work.put)
            exhausted = False
            while not exhausted or reader.in_flight:
                self._crew.check()
                while not exhausted and reader.in_flight < self._tuning.depth:
                    if not self._may_read(wait=not reader.in_flight):
                        break
                    slot = self._slot(wait=not reader.in_flight)
                    if slot is None:
                        break
                    exhausted = not self._submit_next(reader, slot)
                if reader.in_flight:
                    reader.step()
        with self._plan_lock:
            self._reading -= 1
            is_last = not self._reading
        for _ in range(self._tuning.workers if is_last else 0):
            self._work.put(None)

    def _may_read(self, *, wait: bool) -> bool:
        """Whether the throttle lets one more request go; False only if not to ``wait`` for it."""
        while self._throttle is not None and (delay := self._throttle.delay()) > 0:
            if not wait:
                return False
            self._crew.check()
            time.sleep(min(delay, TICK))
        return True

    def _slot(self, *, wait: bool) -> int | None:
        """A free buffer; None if there is none now and the caller has something to poll for."""
        while True:
            try:
                return self._free.get(block=wait, timeout=TICK)
            except queue.Empty:
                if not wait:
                    return None
            self._crew.check()

    def _submit_next(self, reader: "_Reader", slot: int) -> bool:
        """Hand the next piece of the plan to ``reader``; False if there is none.

        Zero segments need no buffer and go straight to the workers.
        """
        with self._plan_lock:
            self._crew.check()
            while (segment := next(self._plan, None)) is not None:
                ticket = self._tickets
                self._tickets += 1
                if segment.zero:
                    self._work.put((ticket, segment, -1))
                    continue
                break
        if segment is None:
            self._free.put(slot)
            return False
        if self._throttle is not None:
            self._throttle.take(segment.length)
        reader.submit(ticket, segment, slot)
        return True

    # workers

    def _work_off(self) -> None:
        """Prepare blocks until the sentinel; place and write what is due."""
        while True:
            try:
                item = self._work.get(timeout=TICK)
            except queue.Empty:
                self._crew.check()
                continue
            if item is None:
                return
            self._crew.check()
            ticket, segment, slot = item
            if segment.zero:
                block = self._sink.zero(segment.offset, segment.length)
            else:
                block = self._sink.prepare(segment.offset, self._arena.view(slot, segment.length))
            for due in self._place(ticket, (block, segment, slot)):
                self._sink.write(due[0])
                if due[2] >= 0:
                    self._free.put(due[2])

    def _place(self, ticket: int, item: tuple[B, Segment, int]) -> list[tuple[B, Segment, int]]:
        """Note a finished block; place all that are now in unbroken order and return them."""
        due = []
        with self._order_lock:
            self._ready[ticket] = item
            while self._next in self._ready:
                ready = self._ready.pop(self._next)
                self._sink.place(ready[0])
                self._progress(ready[1])
                due.append(ready)
                self._next += 1
        return due


class _Reader:
    """The requests in flight on one connection."""

    def __init__(
        self,
        connection: Connection,
        arena: Arena,
        deliver: Callable[[tuple[int, Segment, int]], None],
    ) -> None:
        self._connection = connection
        self._arena = arena
        self._deliver = deliver
        self._failure: NbdError | None = None
        self._deadline = time.monotonic()
        self.in_flight = 0

    def submit(self, ticket: int, segment: Segment, slot: int) -> None:
        """Begin to read a segment into a buffer."""
        buffer = self._arena.buffer(slot, segment.length)

        def completed(error: "nbd.CInt") -> int:
            # libnbd prints what a callback raises and goes on: record, never raise
            self.in_flight -= 1
            if error.value:
                self._failure = self._failure or NbdError(
                    f"read failed: {errno_name(error.value)}",
                    offset=segment.offset, length=segment.length, **self._connection.where,
                )  # fmt: skip
            else:
                self._deliver((ticket, segment, slot))
            return 1

        if not self.in_flight:
            self._touch()
        self.in_flight += 1
        try:
            self._connection.handle.aio_pread(buffer, segment.offset, completed)
        except nbd.Error as err:
            raise self._connection.translate("can't read", err) from err

    def step(self) -> None:
        """Wait for something to happen on the connection.

        Raises NbdError after a failed read, on a dead connection, or after too long a silence.
        """
        before = self.in_flight
        moved = self._connection.poll()
        if self._failure is not None:
            raise self._failure
        if self.in_flight < before:
            self._touch()
        elif not moved and self._connection.handle.aio_is_dead():
            raise NbdError("the NBD server went away", **self._connection.where)
        elif time.monotonic() > self._deadline:
            seconds = self._connection.patience.seconds
            raise NbdError(
                f"the NBD server answered no read for {seconds:g} s", **self._connection.where
            )

    def _touch(self) -> None:
        self._deadline = time.monotonic() + self._connection.patience.seconds
