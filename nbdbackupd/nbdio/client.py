"""One NBD connection: connecting, negotiating, waiting with a deadline.

libnbd's synchronous calls wait for ever; a server that stops answering (a stopped QEMU, a dead
disk) would hang the run. So everything here is asynchronous underneath, and each wait has a
deadline and looks at the cancel callback.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import nbd

from nbdbackupd.errors import NbdError

ALLOCATION: Final = "base:allocation"
DIRTY_PREFIX: Final = "qemu:dirty-bitmap:"
POLL_MS: Final = 200
"""Longest sleep between two looks at the cancel callback, in milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """An export on a Unix socket; ``bitmap`` is the dirty bitmap to ask for, or empty."""

    socket: Path
    export: str
    bitmap: str = ""

    @property
    def contexts(self) -> tuple[str, ...]:
        """The meta contexts that a plan needs."""
        if self.bitmap:
            return (ALLOCATION, DIRTY_PREFIX + self.bitmap)
        return (ALLOCATION,)


def _never() -> None:
    """Nothing cancels."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait without any progress (seconds), and who may end the wait.

    ``cancelled`` raises to end it (Interrupted, or another thread's first error).
    """

    seconds: float = 60.0
    cancelled: Callable[[], None] = _never


class Connection:
    """A connected NBD handle; a context manager that closes it.

    ``size`` is the export's size in bytes; ``multi_conn``: several connections see one and the
    same disk; ``read_only`` and ``can_flush`` as the server said.
    """

    def __init__(
        self, endpoint: Endpoint, *, contexts: Sequence[str] = (), patience: Patience | None = None
    ) -> None:
        """Connect and negotiate.

        Raises NbdError if the server is not there, does not know the export, grants fewer meta
        contexts than were asked for (F-16), or stays silent.
        """
        self.endpoint = endpoint
        self.patience = patience or Patience()
        self.handle = nbd.NBD()
        self.handle.set_handle_name(f"{endpoint.export}")
        self.handle.set_export_name(endpoint.export)
        self.handle.set_pread_initialize(False)
        for context in contexts:
            self.handle.add_meta_context(context)
        try:
            self._connect()
            self._learn(contexts)
        except BaseException:
            self.close()
            raise

    @property
    def where(self) -> dict[str, object]:
        """Fields for errors."""
        return {"export": self.endpoint.export, "socket": self.endpoint.socket}

    def _connect(self) -> None:
        try:
            self.handle.aio_connect_unix(os.fspath(self.endpoint.socket))
            self._wait_connected()
        except nbd.Error as err:
            raise self.translate("can't connect", err) from err
        if not self.handle.aio_is_ready():
            raise NbdError("the NBD server closed the connection", **self.where)

    def _wait_connected(self) -> None:
        """Each sign of life moves the deadline."""
        deadline = time.monotonic() + self.patience.seconds
        while self.handle.aio_is_connecting():
            self.patience.cancelled()
            if self.poll():
                deadline = time.monotonic() + self.patience.seconds
            elif time.monotonic() > deadline:
                raise NbdError(
                    f"the NBD server was silent for {self.patience.seconds:g} s while connecting",
                    **self.where,
                )

    def _learn(self, contexts: Sequence[str]) -> None:
        """Keep what the server said: libnbd refuses to tell once the connection is dead."""
        try:
            self.size: int = self.handle.get_size()
            self.multi_conn = bool(self.handle.can_multi_conn())
            self.read_only = bool(self.handle.is_read_only())
            self.can_flush = bool(self.handle.can_flush())
            missing = [each for each in contexts if not self.handle.can_meta_context(each)]
        except nbd.Error as err:
            raise self.translate("can't connect", err) from err
        for context in missing:
            raise NbdError(f"the server does not grant meta context {context}", **self.where)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye if the server listens, and close. Safe to call twice."""
        handle = self.__dict__.pop("handle", None)
        with contextlib.suppress(nbd.Error):  # a dead connection needs no goodbye
            if handle is not None and handle.aio_is_ready():
                handle.aio_disconnect()
        # libnbd 1.14 has no close(): the last reference, ours, closes the socket

    def poll(self, timeout_ms: int = POLL_MS) -> bool:
        """Move the connection forward; False if nothing happened within the time.

        Raises NbdError when the connection died.
        """
        try:
            return bool(self.handle.poll(timeout_ms))
        except nbd.Error as err:
            raise self.translate("the connection to the NBD server broke", err) from err

    def is_gone(self) -> bool:
        """Whether the server has ended the connection, or died."""
        return bool(self.handle.aio_is_dead() or self.handle.aio_is_closed())

    def gone(self, **place: object) -> NbdError:
        """The error that says so."""
        return NbdError("the NBD server went away", **place, **self.where)

    def translate(self, message: str, err: "nbd.Error") -> NbdError:
        """libnbd's exception as ours."""
        if self.is_gone():
            return self.gone()
        return NbdError(f"{message}: {err.string}", errno=err.errno, **self.where)


def errno_name(number: int) -> str:
    """``EIO`` for 5, and so on."""
    return errno.errorcode.get(number, str(number))
