"""QEMU's monitor protocol over a socket that is already connected.

Source: QEMU's ``docs/interop/qmp-spec.txt``. One JSON object a line; the server greets, we
negotiate no capability, then each command is answered by ``return`` or ``error``. Events may come
between and are skipped.
"""

import json
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from nbdbackupd import documents
from nbdbackupd.errors import ProcessError

CHUNK: Final = 64 << 10
MAX_REPLY: Final = 64 << 20
"""Bytes; a longer reply is an error: memory stays bounded."""

POLL_SECONDS: Final = 0.2
"""Longest sleep between two looks at the cancel callback."""

GENERIC: Final = "GenericError"
"""The class of almost every error; it says nothing."""


class Monitor:
    """A QMP session; the socket stays its owner's."""

    def __init__(
        self,
        connection: socket.socket,
        program: str,
        *,
        timeout: float,
        cancelled: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait for the greeting and negotiate. ``program`` is named in messages.

        ``timeout`` is in seconds, for this and for each command. Raises ProcessError if the
        program says nothing, nonsense, or goes away; what ``cancelled`` raises.
        """
        self._connection = connection
        self._program = program
        self._timeout = timeout
        self._cancelled = cancelled
        self._received = b""
        connection.setblocking(False)
        greeting = self._receive(time.monotonic() + timeout, "start")
        if "QMP" not in greeting:
            raise ProcessError(f"{program} does not speak QMP on its monitor")
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a command and return what it returns.

        Raises ProcessError with QEMU's description if it is refused, and as for the constructor.
        """
        deadline = time.monotonic() + self._timeout
        document: dict[str, Any] = {"execute": command}
        if arguments:
            document["arguments"] = arguments
        self._send(json.dumps(document).encode() + b"\n", deadline, command)
        reply = self._receive(deadline, command)
        while "event" in reply:
            reply = self._receive(deadline, command)
        if "return" in reply:
            return reply["return"]
        error = reply.get("error")
        if not isinstance(error, dict):
            raise ProcessError(f"{self._program} gave no answer to {command}")
        kind = str(error.get("class", GENERIC))
        text = " ".join(str(error.get("desc", "")).split())
        shown = text if kind == GENERIC else f"{kind}: {text}"
        raise ProcessError(f"{self._program} refused {command}: {shown}")

    def _send(self, data: bytes, deadline: float, what: str) -> None:
        view = memoryview(data)
        while view:
            self._wait(select.POLLOUT, deadline, what)
            try:
                view = view[self._connection.send(view) :]
            except BlockingIOError:
                continue
            except OSError as err:
                raise self._gone(what) from err

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._wait(select.POLLIN, deadline, what)
            try:
                part = self._connection.recv(CHUNK)
            except BlockingIOError:
                continue
            except OSError as err:
                raise self._gone(what) from err
            if not part:
                raise self._gone(what)
            self._received += part
            if len(self._received) > MAX_REPLY:
                raise ProcessError(f"{self._program} answered {what} with too much")
        line, _, self._received = self._received.partition(b"\n")
        try:
            document = documents.parse_json(line)
        except ValueError as err:
            raise ProcessError(f"{self._program} answered {what} with nonsense") from err
        if not isinstance(document, dict):
            raise ProcessError(f"{self._program} answered {what} with nonsense")
        return document

    def _wait(self, event: int, deadline: float, what: str) -> None:
        poller = select.poll()
        poller.register(self._connection, event)
        while True:
            self._cancelled()
            left = deadline - time.monotonic()
            if left <= 0:
                raise ProcessError(
                    f"{self._program} did not answer {what} within {self._timeout:g} s"
                )
            if poller.poll(min(left, POLL_SECONDS) * 1000):
                return

    def _gone(self, what: str) -> ProcessError:
        return ProcessError(f"{self._program} ended during {what}")
