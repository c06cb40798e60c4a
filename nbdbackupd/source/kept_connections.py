"""Connections to QEMU's NBD server, and who may close them when.

Measured with QEMU 7.2. A client that closes first in the transmission phase aborts QEMU if the
disk is served by an iothread (10.0 survives). The other way round, ``nbd-server-stop``, with which
libvirt ends its job, waits in QEMU's main loop for clients that are in their handshake, and that
loop no longer serves them: QEMU and its guest hang for good. So before a job is ended each
connection must be closed, by the server, or in the transmission phase; and of a domain with
iothreads, one in the transmission phase is the server's to close. Meanwhile somebody must read it:
QEMU can't drain its disks, as it does to pause a guest, while an answer waits to be sent.
"""

import os
import select
import socket
import struct
import time
from collections.abc import Collection
from contextlib import suppress
from enum import IntEnum
from typing import Final

GOING_SECONDS: Final = 1.0
"""For the one who uses a connection; the server needs no millisecond."""

SETTLE_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.01
CLOSED: Final = select.POLLHUP | select.POLLRDHUP | select.POLLERR
REQUEST: Final = struct.Struct(">IHHQQI")
REQUEST_MAGIC: Final = 0x25609513
REQUESTS: Final = 64
"""More bytes than an option that was sent by half may lack."""

CHUNK: Final = 64 << 10


class Stage(IntEnum):
    """How far a connection is: in its handshake, about to leave it, in the transmission phase."""

    CONNECTED = 0
    GOING = 1
    READY = 2


class KeptConnections:
    """Descriptors of connections, duplicates of those that are used.

    Its owner sees to it that they are not changed by two threads at once.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.all: list[socket.socket] = []
        self._ended: set[int] = set()

    def add(self, descriptor: int) -> int:
        """Own a descriptor; returns the connection's number."""
        self.all.append(socket.socket(fileno=descriptor))
        self.stages.append(Stage.CONNECTED)
        return len(self.all) - 1

    def duplicate(self, descriptor: int) -> int:
        """The same with a duplicate."""
        return self.add(os.dup(descriptor))

    def forget(self, number: int) -> None:
        """Let go of a connection that its user may close."""
        self.all[number].close()

    def settle(self) -> bool:
        """Leave no connection in its handshake, so that the job may be ended.

        None may enter a stage but the last one meanwhile. False if the server has not answered in
        time: then the job must not be ended now.
        """
        deadline = time.monotonic() + GOING_SECONDS
        while Stage.GOING in self.stages and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for number, stage in enumerate(self.stages):
            if stage is Stage.GOING and self._is_open(number):
                if not _settle(self.all[number]):
                    return False
                self.stages[number] = Stage.READY
        shut = [
            self.all[number]
            for number, stage in enumerate(self.stages)
            if stage is Stage.CONNECTED and self._is_open(number)
        ]
        for each in shut:
            with suppress(OSError):
                each.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + SETTLE_SECONDS
        return all(is_closed(each, deadline - time.monotonic()) for each in shut)

    def wait_closed(self, seconds: float = 0.0) -> bool:
        """Wait until the server has closed all; False if it has not in time."""
        deadline = time.monotonic() + seconds
        return all(
            is_closed(each, deadline - time.monotonic())
            for number, each in enumerate(self.all)
            if self._is_open(number)
        )

    def discard(self, seconds: float, which: Collection[int] | None = None) -> None:
        """Read what the server sends in the transmission phase, or wait for it that long.

        Only if nobody else reads it any more: ``which``, or all.
        """
        poller = select.poll()
        numbers = {}
        for number in range(len(self.stages)) if which is None else which:
            stage = self.stages[number]
            if stage is Stage.READY and number not in self._ended and self._is_open(number):
                numbers[self.all[number].fileno()] = number
                poller.register(self.all[number], select.POLLIN)
        for descriptor, _ in poller.poll(seconds * 1000):
            number = numbers[descriptor]
            try:
                if not self.all[number].recv(CHUNK, socket.MSG_DONTWAIT):
                    self._ended.add(number)
            except BlockingIOError:
                continue
            except OSError:
                self._ended.add(number)

    def has_ended(self) -> bool:
        """Tell whether the server has closed a connection that it used: its job is over."""
        return any(
            stage is Stage.READY and self._is_open(number) and is_closed(self.all[number])
            for number, stage in enumerate(self.stages)
        )

    def close(self) -> None:
        """Let go of all."""
        for each in self.all:
            each.close()

    def _is_open(self, number: int) -> bool:
        return self.all[number].fileno() >= 0


def is_closed(connection: socket.socket, seconds: float = 0.0) -> bool:
    """Whether the other end has closed a connection, or does so in time; what it sent may wait."""
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    return any(event & CLOSED for _, event in poller.poll(max(0.0, seconds) * 1000))


def _settle(connection: socket.socket) -> bool:
    """Find out whether a connection that nobody uses any more has left its handshake.

    It is asked for a byte of the disk: a server in the transmission phase answers, one in the
    handshake finds nonsense and closes. False if neither happens in time.
    """
    cookie = int.from_bytes(os.urandom(8), "big")
    deadline = time.monotonic() + SETTLE_SECONDS
    connection.settimeout(SETTLE_SECONDS)
    found = b""
    try:
        connection.sendall(REQUEST.pack(REQUEST_MAGIC, 0, 0, cookie, 0, 1) * REQUESTS)
        while cookie.to_bytes(8, "big") not in found:
            if time.monotonic() > deadline:
                return False
            data = connection.recv(CHUNK)
            if not data:
                return True
            # the answer may come in two parts
            found = found[-16:] + data
    except TimeoutError:
        return False
    except OSError:
        return True
    return True
