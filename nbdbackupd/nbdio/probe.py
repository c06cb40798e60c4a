"""A look into one export: what changed, and what single ranges hold."""

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import nbd

from nbdbackupd.errors import NbdError
from nbdbackupd.model.extents import Segment
from nbdbackupd.nbdio.client import (
    ALLOCATION,
    DIRTY_PREFIX,
    Connection,
    Endpoint,
    Patience,
    errno_name,
)
from nbdbackupd.nbdio.extents import ExtentReader


class Probe:
    """Connections to an export that has a dirty bitmap; a context manager that closes them."""

    def __init__(self, endpoint: Endpoint, patience: Patience) -> None:
        """Connect.

        Raises NbdError.
        """
        self._stack = ExitStack()
        try:
            self._connection, changes = (
                self._stack.enter_context(
                    Connection(endpoint, contexts=[context], patience=patience)
                )
                for context in (ALLOCATION, DIRTY_PREFIX + endpoint.bitmap)
            )
        except BaseException:
            self._stack.close()
            raise
        self._reader = ExtentReader(self._connection, bitmap=endpoint.bitmap, changes=changes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def changes(self) -> Iterator[Segment]:
        """What changed since the bitmap was made, ascending; asked for as it is needed.

        Raises NbdError.
        """
        return self._reader.plan()

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of one range.

        Raises NbdError.
        """
        found = bytearray(length)
        buffer = nbd.Buffer.from_buffer(memoryview(found))
        done: list[int] = []

        def completed(error: "nbd.CInt") -> int:
            done.append(error.value)
            return 1

        try:
            self._connection.handle.aio_pread(buffer, offset, completed)
        except nbd.Error as err:
            raise self._connection.translate("can't read", err) from err
        self._connection.wait(lambda: bool(done), "reading")
        if done[0]:
            raise NbdError(
                f"read failed: {errno_name(done[0])}",
                offset=offset, length=length, **self._connection.where,
            )  # fmt: skip
        return bytes(found)
