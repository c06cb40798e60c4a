"""The copy pipeline: from an export through worker threads into a sink.

::

    plan -> readers (one per connection, requests in flight) -> workers -> order -> sink

* Each **reader** thread owns one NBD connection and keeps ``depth`` reads in flight into buffers
  of one arena that is allocated once: fresh buffers would cost a page fault per page.
* **Workers** hash and compress (``Sink.prepare``); these C calls run without Python's lock.
* Blocks get their places in guest order (``Sink.place``, under one lock) and are written by
  whichever worker placed them (``Sink.write``), a positioned write each.

At the end all is accounted for: each byte of the plan was read or noted as zero, placed and
written, the plan covers the disk, and the server still answers.

The number of buffers bounds the memory. A block gets its ticket when it already has its buffer,
so the oldest ticket is always in flight and the order stage can't starve. The first error stops
all threads and is raised by ``copy``; so is what the cancel callback raises.
"""

import os
import queue
import threading
import time
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
        pipeline.run(
            endpoint, plan, tuning.connections if control.multi_conn and not thrifty else 1
        )
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
        self._tickets = 0
        self._planned = 0
        self._placed = 0
        self._written = 0
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
        self._plan = model.split(plan, self._arena.block)
        for number in range(self._arena.count):
            self._free.put(number)
        self._reading = connections
        bodies: dict[str, Callable[[], None]] = {}
        for number in range(connections):
            bodies[f"read-{number}"] = lambda: self._read(endpoint)
        for number in range(self._tuning.workers):
            bodies[f"work-{number}"] = self._work_off
        self._threads.run(bodies)
        self._prove()

    def _prove(self) -> None:
        """Raise NbdError if a byte of the plan did not get to its place."""
        rest = next(self._plan, None)
        counts = (self._planned, self._placed, self._written)
        if rest is not None or self._ready or self._next != self._tickets or len({*counts}) != 1:
            raise NbdError(
                "the copy is short of what was to be read",
                planned=self._planned,
                placed=self._placed,
                written=self._written,
            )

    # readers

    def _read(self, endpoint: Endpoint) -> None:
        """Keep reads in flight on one connection until the plan is used up.

        The last reader to end sends the workers home.
        """
        with (
            Connection(endpoint, patience=self.patience) as connection,
            Requests(connection) as requests,
        ):
            exhausted = False
            while not exhausted or requests.in_flight:
                self._threads.check()
                while not exhausted and requests.in_flight < self._tuning.depth:
                    if not self._may_read(wait=not requests.in_flight):
                        break
                    slot = self._slot(wait=not requests.in_flight)
                    if slot is None:
                        break
                    exhausted = not self._submit_next(connection, requests, slot)
                if requests.in_flight:
                    requests.step()
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
            self._threads.check()
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
            self._threads.check()

    def _submit_next(self, connection: Connection, requests: Requests, slot: int) -> bool:
        """Begin to read the next piece of the plan into ``slot``; False if there is none.

        Zero segments need no buffer and go straight to the workers.
        """
        with self._plan_lock:
            self._threads.check()
            while (segment := next(self._plan, None)) is not None:
                ticket = self._tickets
                self._tickets += 1
                self._planned += segment.length
                if segment.zero:
                    self._work.put((ticket, segment, -1))
                    continue
                break
        if segment is None:
            self._free.put(slot)
            return False
        if self._throttle is not None:
            self._throttle.take(segment.length)
        item = (ticket, segment, slot)
        buffer = self._arena.buffer(slot, segment.length)
        requests.begin(
            "read",
            lambda done: connection.handle.aio_pread(buffer, segment.offset, done),
            {"offset": segment.offset, "length": segment.length},
            lambda: self._work.put(item),
        )
        return True

    # workers

    def _work_off(self) -> None:
        """Prepare blocks until the sentinel; place and write what is due."""
        written = 0
        while True:
            try:
                item = self._work.get(timeout=TICK)
            except queue.Empty:
                self._threads.check()
                continue
            if item is None:
                with self._order_lock:
                    self._written += written
                return
            self._threads.check()
            ticket, segment, slot = item
            if segment.zero:
                block = self._sink.zero(segment.offset, segment.length)
            else:
                block = self._sink.prepare(segment.offset, self._arena.view(slot, segment.length))
            for due in self._place(ticket, (block, segment, slot)):
                self._sink.write(due[0])
                written += due[1].length
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
                self._placed += ready[1].length
                due.append(ready)
                self._next += 1
        return due
