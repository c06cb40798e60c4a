"""A look into one export: what changed, and what single ranges hold."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Self

import nbd

from nbdbackupd.model.extents import Segment
from nbdbackupd.nbdio.client import (
    ALLOCATION,
    DIRTY_PREFIX,
    Connection,
    Endpoint,
    Patience,
)
from nbdbackupd.nbdio.extents import ExtentReader
from nbdbackupd.nbdio.requests import Requests


class Probe:
    """Connections to an export that has a dirty bitmap; a context manager that closes them."""

    def __init__(self, endpoint: Endpoint, patience: Patience) -> None:
        """Connect. Raises NbdError."""
        self._stack = ExitStack()
        separate = (ALLOCATION,), (DIRTY_PREFIX + endpoint.bitmap,)
        try:
            found = [
                self._stack.enter_context(Connection(endpoint, contexts=each, patience=patience))
                for each in ((endpoint.contexts,) if endpoint.is_thrifty else separate)
            ]
            self._connection, changes = found[0], found[-1]
        except BaseException:
            self._stack.close()
            raise
        self._reader = ExtentReader(self._connection, bitmap=endpoint.bitmap, changes=changes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def changes(self) -> Iterator[Segment]:
        """What changed since the bitmap was made, ascending; asked for as it is needed.

        Raises NbdError.
        """
        return self._reader.plan()

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of one range. Raises NbdError."""
        found = bytearray(length)
        buffer = nbd.Buffer.from_buffer(memoryview(found))
        with Requests(self._connection) as requests:
            requests.ask(
                "read",
                lambda done: self._connection.handle.aio_pread(buffer, offset, done),
                {"offset": offset, "length": length},
            )
        return bytes(found)
