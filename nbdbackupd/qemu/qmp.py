"""QEMU's monitor protocol, over a socket that is connected or that has a path.

Source: QEMU's ``docs/interop/qmp-spec.txt``. One JSON object a line; the server greets, we
negotiate no capability, then each command is answered by ``return`` or ``error``. Events may come
between and are skipped.
"""

import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from nbdbackupd import documents
from nbdbackupd.errors import BusyError, DomainError, DomainNotFoundError, ProcessError

CHUNK: Final = 64 << 10
MAX_REPLY: Final = 64 << 20
"""Bytes; a longer reply is an error: memory stays bounded."""

POLL_SECONDS: Final = 0.2
"""Longest sleep between two looks at the cancel callback."""

GREETING_SECONDS: Final = 2.0
"""A monitor greets at once; one that is in use takes a connection and says nothing (7.2)."""

GENERIC: Final = "GenericError"
"""The class of almost every error; it says nothing."""


@contextmanager
def connected(path: Path, program: str, *, timeout: float) -> Iterator["Monitor"]:
    """A session on the monitor whose socket is ``path``; ``timeout`` in seconds for each command.

    Raises BusyError if another program holds the monitor, DomainNotFoundError if nobody listens,
    DomainError if it can't be reached, ProcessError if it speaks no QMP.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        try:
            connection.connect(os.fspath(path))
        except BlockingIOError as err:
            raise _held(path) from err
        except (FileNotFoundError, ConnectionRefusedError) as err:
            raise DomainNotFoundError(f"no QEMU listens on {path}: is it running?") from err
        except OSError as err:
            raise DomainError(f"monitor {path} can't be reached: {err.strerror or err}") from err
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        if not poller.poll(GREETING_SECONDS * 1000):
            raise _held(path)
        yield Monitor(connection, program, timeout=timeout)


def _held(path: Path) -> BusyError:
    return BusyError(
        f"another program holds the monitor {path}: close that, or give QEMU a second monitor"
    )


class Line:
    """A socket on which a JSON object a line goes each way; it stays its owner's."""

    def __init__(
        self,
        connection: socket.socket,
        program: str,
        *,
        timeout: float,
        cancelled: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._program = program
        self._timeout = timeout
        self._cancelled = cancelled
        self._received = b""
        connection.setblocking(False)

    def send(
        self,
        command: str,
        arguments: Mapping[str, Any] | None,
        deadline: float,
        *,
        before: bytes = b"",
        descriptor: int = -1,
    ) -> None:
        """Send a request, with a descriptor. Raises ProcessError."""
        document: dict[str, Any] = {"execute": command}
        if arguments:
            document["arguments"] = arguments
        view = memoryview(before + json.dumps(document).encode() + b"\n")
        passed = [descriptor] if descriptor >= 0 else []
        while view:
            self._wait(select.POLLOUT, deadline, command)
            try:
                view = view[socket.send_fds(self._connection, [view], passed) :]
                passed = []
            except BlockingIOError:
                continue
            except OSError as err:
                raise self._gone(command) from err

    def receive(self, deadline: float, what: str) -> dict[str, Any]:
        """The next object; what comes before a delimiter of the agent's is no part of it.

        Raises ProcessError.
        """
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
            document = documents.parse_json(line.rpartition(b"\xff")[2])
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


class Monitor(Line):
    """A QMP session, for any thread."""

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
        super().__init__(connection, program, timeout=timeout, cancelled=cancelled)
        self._lock = threading.Lock()
        greeting = self.receive(time.monotonic() + timeout, "start")
        if "QMP" not in greeting:
            raise ProcessError(f"{program} does not speak QMP on its monitor")
        self.execute("qmp_capabilities")

    @property
    def pid(self) -> int:
        """The process that listens on the other end of a Unix socket, see unix(7)."""
        size = struct.calcsize("3i")
        found = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("3i", found)[0])

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, descriptor: int = -1
    ) -> Any:
        """Run a command and return what it returns; it may come with a descriptor.

        Raises ProcessError with QEMU's description if it is refused, and as for the constructor.
        """
        deadline = time.monotonic() + self._timeout
        with self._lock:
            self.send(command, arguments, deadline, descriptor=descriptor)
            reply = self.receive(deadline, command)
            while "event" in reply:
                reply = self.receive(deadline, command)
        if "return" in reply:
            return reply["return"]
        error = reply.get("error")
        if not isinstance(error, dict):
            raise ProcessError(f"{self._program} gave no answer to {command}")
        kind = str(error.get("class", GENERIC))
        text = " ".join(str(error.get("desc", "")).split())
        shown = text if kind == GENERIC else f"{kind}: {text}"
        raise ProcessError(f"{self._program} refused {command}: {shown}")
