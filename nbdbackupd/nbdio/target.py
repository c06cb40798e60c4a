"""Writing restored blocks to an export, several requests in flight from reused buffers.

One ``Target`` is one connection, used by one thread; several of them may write to one export,
each its own ranges. A buffer (*slot*) belongs to the caller from ``take`` until it is handed to
``write`` or ``release``; then to the request until the server has answered.
"""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from nbdbackupd.errors import NbdbackupError, NbdError, NoSpaceError
from nbdbackupd.nbdio.arena import Arena
from nbdbackupd.nbdio.client import Connection, Endpoint, Patience, errno_name
from nbdbackupd.nbdio.requests import Requests

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
        self._requests = Requests(connection, self._refused)
        self._is_flushed = True
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
        self._is_flushed = False
        self._requests.begin(
            "write",
            lambda done: self._connection.handle.aio_pwrite(
                self._arena.buffer(slot, length), offset, done
            ),
            {"offset": offset},
            lambda: self._free.append(slot),
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
            self._advance(lambda: self._requests.in_flight < self._arena.count)
            self._zero_part(offset, part)
            offset, length = offset + part, length - part

    def _zero_part(self, offset: int, length: int) -> None:
        self._is_flushed = False
        handle = self._connection.handle
        self._requests.begin(
            "write zeroes", lambda done: handle.aio_zero(length, offset, done), {"offset": offset}
        )

    def flush(self) -> None:
        """Wait for all requests, then make the server write its caches back.

        Raises NbdError or NoSpaceError.
        """
        self._requests.wait(lambda: not self._requests.in_flight)
        if self._connection.can_flush:
            self._requests.ask("flush", self._connection.handle.aio_flush, {})
        self._is_flushed = True

    def prove(self) -> None:
        """Raise NbdError unless all that was written was answered well, and flushed after that."""
        with self._requests:
            if not self._is_flushed:
                raise NbdError("what was written was not flushed", **self._connection.where)

    def _refused(self, what: str, number: int, place: Mapping[str, object]) -> NbdbackupError:
        where = self._connection.where
        if number in NO_SPACE:
            return NoSpaceError("no space left for the restored image", **place, **where)
        if self._connection.is_gone():
            return self._connection.gone(**place)
        return NbdError(f"{what} failed: {errno_name(number)}", **place, **where)

    def _advance(self, done: Callable[[], bool]) -> None:
        """Move the connection if something is in flight, and on until ``done()``."""
        if self._requests.in_flight:
            self._requests.step(0)
        self._requests.wait(done)


@contextmanager
def open_target(
    endpoint: Endpoint, arena: Arena, *, known_zero: bool, patience: Patience
) -> Iterator[Target]:
    """Connect for writing; ``arena`` bounds the requests in flight.

    Raises NbdError if the server is not there or lets us only read.
    """
    with Connection(endpoint, patience=patience) as connection:
        if connection.read_only:
            raise NbdError("the export is read-only", **connection.where)
        made = Target(connection, arena, known_zero=known_zero)
        yield made
        made.prove()


@contextmanager
def control(endpoint: Endpoint, patience: Patience) -> Iterator[bool]:
    """A connection that is held but not used: it keeps a server that ends with its last client.

    The value tells whether the server lets several connections write to one and the same disk.
    """
    with Connection(endpoint, patience=patience) as connection:
        yield connection.multi_conn
