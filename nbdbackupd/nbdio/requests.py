"""The requests in flight on one connection; not one of them fails unseen.

libnbd answers a request whose server is gone when it is *sent* by calling its completion callback
with an error from within the call that sends it ("command queued, ignoring state machine failure",
lib/rw.c of libnbd 1.14); that call returns as if all were well, and nothing is in flight
afterwards that anybody would wait for. So all requests of ours begin here, where the answer is
looked at after each call that may have brought one, and again at the end.
"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import nbd

from nbdbackupd.errors import NbdbackupError, NbdError
from nbdbackupd.nbdio.client import Connection, errno_name

Completion = Callable[["nbd.CInt"], int]
Refusal = Callable[[str, int, Mapping[str, object]], NbdbackupError]


class Requests:
    """The requests of one connection and thread; a context manager that proves their answers.

    It is left well only if each request was answered well.
    """

    def __init__(self, connection: Connection, refusal: Refusal | None = None) -> None:
        """``refusal`` makes an error of what was asked, the server's errno and the place."""
        self._connection = connection
        self._refusal = refusal or self._refused
        self._failed: tuple[str, int, Mapping[str, object]] | None = None
        self._deadline = 0.0
        self.in_flight = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.check()
            if self.in_flight:
                raise NbdError(
                    f"{self.in_flight} requests were not answered", **self._connection.where
                )

    def begin(
        self,
        what: str,
        submit: Callable[[Completion], object],
        place: Mapping[str, object],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Send a request; ``submit`` gets the callback that libnbd is to call with its answer.

        ``what`` names it in errors (``read``), ``place`` tells them where. ``done`` is called when
        it was answered well, within ``begin``, ``step`` or ``wait``; it must not raise.

        Raises NbdError, or what ``refusal`` made, if this request or an earlier one failed.
        """

        def completed(error: "nbd.CInt") -> int:
            # libnbd prints what a callback raises and goes on: record, never raise
            self.in_flight -= 1
            if not error.value:
                done()
            elif self._failed is None:
                # only noted: the library tells of its state when its call has returned
                self._failed = (what, error.value, place)
            return 1

        if not self.in_flight:
            self._touch()
        self.in_flight += 1
        try:
            submit(completed)
        except nbd.Error as err:
            self.check()
            raise self._connection.translate(f"can't {what}", err) from err
        self.check()

    def check(self) -> None:
        """Raise the first failure."""
        if self._failed is not None:
            raise self._refusal(*self._failed)

    def step(self, timeout_ms: int | None = None) -> None:
        """Move the connection once; each sign of life moves the deadline.

        Raises NbdError after a failed request, on a dead connection, or after too long a silence.
        """
        before = self.in_flight
        connection = self._connection
        try:
            moved = connection.poll() if timeout_ms is None else connection.poll(timeout_ms)
        finally:
            # what failed tells more than that the connection broke afterwards
            self.check()
        if moved or self.in_flight < before:
            self._touch()
        elif connection.is_gone():
            raise connection.gone()
        elif time.monotonic() > self._deadline:
            raise NbdError(
                f"the NBD server was silent for {connection.patience.seconds:g} s",
                **connection.where,
            )

    def wait(self, done: Callable[[], bool]) -> None:
        """Move the connection until ``done()``; there must be something in flight until then.

        Raises as ``step``, and what the connection's ``patience.cancelled`` raises.
        """
        while not done():
            self._connection.patience.cancelled()
            self.step()
        self.check()

    def ask(
        self, what: str, submit: Callable[[Completion], object], place: Mapping[str, object]
    ) -> None:
        """Send one request and wait for all answers. Raises as ``begin`` and ``wait``."""
        self.begin(what, submit, place)
        self.wait(lambda: not self.in_flight)

    def _touch(self) -> None:
        self._deadline = time.monotonic() + self._connection.patience.seconds

    def _refused(self, what: str, number: int, place: Mapping[str, object]) -> NbdError:
        if self._connection.is_gone():
            return self._connection.gone(**place)
        return NbdError(f"{what} failed: {errno_name(number)}", **place, **self._connection.where)
