"""Writing restored blocks to an export, several requests in flight from reused buffers.

One ``Target`` is one connection, used by one thread; several of them may write to one export,
each its own ranges. A buffer (*slot*) belongs to the caller from ``take`` until it is handed to
``write`` or ``release``; then to the request until the server has answered.
"""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import nbd

from nbdbackupd.errors import NbdbackupError, NbdError, NoSpaceError
from nbdbackupd.nbdio.arena import Arena
from nbdbackupd.nbdio.client import Connection, Endpoint, Patience, errno_name

MAX_ZERO: Final = 1 << 30
"""Bytes of one zero request; the protocol's length has 32 bits."""

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Target:
    """One connection to write to; ``size`` is the export's, in bytes."""

    def __init__(self, connection: Connection, arena: Arena, *, known_zero: bool) -> None:
        """``arena`` is this target's alone. ``known_zero``: the export reads as zeroes so far."""
        self._connection = connection
        self._arena = arena
        self._known_zero = known_zero
        self._free = list(range(arena.count))
        self._in_flight = 0
        self._failure: NbdbackupError | None = None
        self._deadline = 0.0
        self.size = connection.size

    def take(self) -> int:
        """A free slot; waits for the server if all are on their way.

        Raises NbdError or NoSpaceError if a request failed, the server died or stays silent.
        """
        self._advance(lambda: bool(self._free))
        return self._free.pop()

    def view(self, slot: int, length: int) -> memoryview:
        """The first ``length`` bytes of a slot that was taken."""
        return self._arena.view(slot, length)

    def release(self, slot: int) -> None:
        """Give a slot back that needs no writing."""
        self._free.append(slot)

    def write(self, slot: int, length: int, offset: int) -> None:
        """Begin to write the first ``length`` bytes of a slot to ``offset``; the slot is gone.

        Raises NbdError or NoSpaceError, also for an earlier request.
        """
        self._begin(
            lambda done: self._connection.handle.aio_pwrite(
                self._arena.buffer(slot, length), offset, done
            ),
            offset,
            slot,
        )
        self._advance(lambda: True)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; nothing to do where it does already.

        Raises NbdError or NoSpaceError, also for an earlier request.
        """
        if self._known_zero:
            return
        while length:
            part = min(length, MAX_ZERO)
            self._advance(lambda: self._in_flight < self._arena.count)
            self._zero_part(offset, part)
            offset, length = offset + part, length - part

    def _zero_part(self, offset: int, length: int) -> None:
        handle = self._connection.handle
        self._begin(lambda done: handle.aio_zero(length, offset, done), offset, None)

    def flush(self) -> None:
        """Wait for all requests, then make the server write its caches back.

        Raises NbdError or NoSpaceError.
        """
        self._drain()
        if self._connection.handle.can_flush():
            self._begin(self._connection.handle.aio_flush, 0, None)
            self._drain()

    def _drain(self) -> None:
        self._advance(lambda: not self._in_flight)

    def _begin(
        self, submit: Callable[[Callable[["nbd.CInt"], int]], int], offset: int, slot: int | None
    ) -> None:
        def completed(error: "nbd.CInt") -> int:
            # libnbd prints what a callback raises and goes on: record, never raise
            self._in_flight -= 1
            if slot is not None:
                self._free.append(slot)
            if error.value and self._failure is None:
                self._failure = self._refused(error.value, offset)
            return 1

        if not self._in_flight:
            self._touch()
        self._in_flight += 1
        try:
            submit(completed)
        except nbd.Error as err:
            raise self._connection.translate("can't write", err) from err

    def _refused(self, number: int, offset: int) -> NbdbackupError:
        where = self._connection.where
        if number in NO_SPACE:
            return NoSpaceError("no space left for the restored image", offset=offset, **where)
        return NbdError(f"write failed: {errno_name(number)}", offset=offset, **where)

    def _advance(self, done: Callable[[], bool]) -> None:
        """Move the connection at least once, and on until ``done()``."""
        if self._in_flight:
            self._step(0)
        while not done():
            self._connection.patience.cancelled()
            self._step()
        if self._failure is not None:
            raise self._failure

    def _step(self, timeout_ms: int | None = None) -> None:
        before = self._in_flight
        poll = self._connection.poll
        moved = poll() if timeout_ms is None else poll(timeout_ms)
        if self._failure is not None:
            raise self._failure
        if moved or self._in_flight < before:
            self._touch()
        elif self._connection.handle.aio_is_dead() or self._connection.handle.aio_is_closed():
            raise NbdError("the NBD server went away while writing", **self._connection.where)
        elif time.monotonic() > self._deadline:
            seconds = self._connection.patience.seconds
            raise NbdError(
                f"the NBD server answered no write for {seconds:g} s", **self._connection.where
            )

    def _touch(self) -> None:
        self._deadline = time.monotonic() + self._connection.patience.seconds


@contextmanager
def open_target(
    endpoint: Endpoint, arena: Arena, *, known_zero: bool, patience: Patience
) -> Iterator[Target]:
    """Connect for writing; ``arena`` bounds the requests in flight.

    Raises NbdError if the server is not there or lets us only read.
    """
    with Connection(endpoint, patience=patience) as connection:
        if connection.handle.is_read_only():
            raise NbdError("the export is read-only", **connection.where)
        yield Target(connection, arena, known_zero=known_zero)


@contextmanager
def control(endpoint: Endpoint, patience: Patience) -> Iterator[bool]:
    """A connection that is held but not used: it keeps a server that ends with its last client.

    The value tells whether the server lets several connections write to one and the same disk.
    """
    with Connection(endpoint, patience=patience) as connection:
        yield connection.can_multi_conn()
