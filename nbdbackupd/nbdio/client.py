"""One NBD connection: connecting, negotiating, waiting with a deadline.

libnbd's synchronous calls wait for ever; a server that stops answering (a stopped QEMU, a dead
disk) would hang the run. So everything here is asynchronous underneath, and each wait has a
deadline and looks at the cancel callback.

Where a server must be the first to close (``Keeper.is_holding``), we neither say goodbye nor
close: another descriptor of the same connection is kept from before the handshake on, and what was
opened once is used again.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, Self

import nbd

from nbdbackupd.errors import NbdError

ALLOCATION: Final = "base:allocation"
DIRTY_PREFIX: Final = "qemu:dirty-bitmap:"
POLL_MS: Final = 200
"""Longest sleep between two looks at the cancel callback, in milliseconds."""

HANDSHAKE_SECONDS: Final = 10.0
"""QEMU drops a client that negotiates for longer (since CVE-2024-7409, also in Debian's 7.2)."""


class Keeper(Protocol):
    """Knows the connections of a server that minds how they end; for any thread.

    It is told of a connection before each step that changes how it may end.
    """

    @property
    def is_holding(self) -> bool:
        """Whether a connection that was used is the server's to close."""

    @property
    def is_thrifty(self) -> bool:
        """Whether as few connections as possible are to be used, since they all stay open."""

    def keep(self, descriptor: int) -> int:
        """Duplicate a connected socket before anything is said on it; returns its number."""

    def going(self, number: int) -> None:
        """Note that a connection is about to enter its transmission phase."""

    def ready(self, number: int) -> None:
        """Note that it has entered it."""

    def take(self, key: object) -> tuple[int, Any] | None:
        """Number and handle of a connection that was given back under this key, or None."""

    def give(self, key: object, idle: tuple[int, Any]) -> None:
        """Store an idle connection for the next one who wants such a connection."""

    def abandon(self, number: int) -> None:
        """Read what still comes on a connection, which nobody uses any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """An export on a Unix socket; ``bitmap`` is the dirty bitmap to ask for, or empty."""

    socket: Path
    export: str
    bitmap: str = ""
    keeper: Keeper | None = None

    @property
    def contexts(self) -> tuple[str, ...]:
        """The meta contexts that a plan needs."""
        if self.bitmap:
            return (ALLOCATION, DIRTY_PREFIX + self.bitmap)
        return (ALLOCATION,)

    @property
    def is_thrifty(self) -> bool:
        """Whether to use as few connections as possible."""
        return self.keeper is not None and self.keeper.is_thrifty


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
        self._key = (endpoint.socket, endpoint.export, tuple(contexts))
        self._number = -1
        found = endpoint.keeper.take(self._key) if endpoint.keeper is not None else None
        self.handle = nbd.NBD()
        try:
            if found is None:
                self._connect(contexts)
            else:
                self._number, self.handle = found
            self._learn(contexts)
        except BaseException:
            self.close()
            raise

    @property
    def where(self) -> dict[str, object]:
        """Fields for errors."""
        return {"export": self.endpoint.export, "socket": self.endpoint.socket}

    def _connect(self, contexts: Sequence[str]) -> None:
        begun = time.monotonic()
        try:
            self._negotiate(contexts)
        except NbdError:
            if not self.is_gone() or time.monotonic() - begun < HANDSHAKE_SECONDS:
                raise
            # we stood still meanwhile, as after a terminal's Ctrl-Z
            self.close()
            self.handle = nbd.NBD()
            self._negotiate(contexts)

    def _negotiate(self, contexts: Sequence[str]) -> None:
        self.handle.set_handle_name(f"{self.endpoint.export}")
        self.handle.set_export_name(self.endpoint.export)
        self.handle.set_pread_initialize(False)
        for context in contexts:
            self.handle.add_meta_context(context)
        self.handle.set_opt_mode(True)
        try:
            self.handle.aio_connect_socket(self._socket())
            self._wait_connected(lambda: not self.handle.aio_is_connecting())
            if self.handle.aio_is_negotiating():
                self._go()
        except nbd.Error as err:
            raise self.translate("can't connect", err) from err
        if not self.handle.aio_is_ready():
            raise NbdError("the NBD server closed the connection", **self.where)

    def _wait_connected(self, done: Callable[[], bool]) -> None:
        """Each sign of life moves the deadline."""
        deadline = time.monotonic() + self.patience.seconds
        while not done() and not self.is_gone():
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

    def _go(self) -> None:
        """Enter the transmission phase."""
        keeper = self.endpoint.keeper
        failures: list[int] = []

        def completed(error: "nbd.CInt") -> int:
            failures.append(error.value)
            return 1

        if keeper is not None:
            keeper.going(self._number)
        self.handle.aio_opt_go(completed)
        self._wait_connected(lambda: bool(failures))
        if failures and failures[0] and not self.is_gone():
            raise NbdError(
                f"the NBD server does not offer the export: {errno_name(failures[0])}", **self.where
            )
        if keeper is not None and self.handle.aio_is_ready():
            keeper.ready(self._number)

    def _socket(self) -> int:
        """The descriptor of a connected socket, which libnbd will own."""
        deadline = time.monotonic() + self.patience.seconds
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as found:
            found.setblocking(False)
            while True:
                self.patience.cancelled()
                try:
                    found.connect(os.fspath(self.endpoint.socket))
                    break
                except BlockingIOError as err:
                    # unix(7): so many wait to be accepted that no more may
                    if time.monotonic() > deadline:
                        raise NbdError("the NBD server accepts nobody", **self.where) from err
                    time.sleep(POLL_MS / 1000)
                except OSError as err:
                    raise NbdError(f"can't connect: {err.strerror}", **self.where) from err
            if self.endpoint.keeper is not None:
                self._number = self.endpoint.keeper.keep(found.fileno())
            return found.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye if the server listens, and close; or give it back. Safe to call twice."""
        handle: nbd.NBD | None = self.__dict__.pop("handle", None)
        if handle is None:
            return
        is_ready = handle.aio_is_ready()
        keeper = self.endpoint.keeper
        if keeper is not None and keeper.is_holding:
            if is_ready and not handle.aio_in_flight():
                keeper.give(self._key, (self._number, handle))
            elif self._number >= 0:
                keeper.abandon(self._number)
            return
        if not is_ready:
            return  # a dead connection needs no goodbye
        with contextlib.suppress(nbd.Error):
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


def libnbd_version() -> str:
    """The library's libnbd_version, such as ``1.14.2``."""
    return nbd.NBD().get_version()
