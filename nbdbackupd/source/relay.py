"""A socket of ours in front of a job's NBD server, for readers that are not ours.

What such a reader does may not reach QEMU 7.2 as it is: see ``kept_connections``. So each of its
connections goes on to one of ours, which is told to the guard as our own are. What the reader says
is known message by message: to tell when its handshake ends, and to keep its goodbye from QEMU. One
that leaves, or takes nothing of what it has asked for, is cut off, and our connection closed or
read to the job's end, as its stage demands.
"""

import contextlib
import logging
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from nbdbackupd import log as runlog
from nbdbackupd.errors import ConfigError, NbdbackupError
from nbdbackupd.qemu import storage_daemon
from nbdbackupd.source.guard import Guard

LOG = logging.getLogger(__name__)
POLL_SECONDS: Final = 0.2
STALLED_SECONDS: Final = 10.0
"""A reader that takes nothing for so long is cut off: QEMU can't pause its guest meanwhile."""

HANDSHAKE_SECONDS: Final = 5.0
"""For a message of a handshake: QEMU hangs if another than us ends the job in the middle of one."""

MOST_AT_ONCE: Final = 32
MOST_KEPT: Final = 90
"""Of a guest with iothreads, where each stays open to the end; QEMU's server takes 100."""

CHUNK: Final = 1 << 20
MOST_OPTION: Final = 64 << 10
"""Bytes of one message of a handshake; a name has 4096 at most."""

GREETING: Final = 18
OPTION: Final = struct.Struct(">8sII")
OPTION_MAGIC: Final = b"IHAVEOPT"
REPLY: Final = struct.Struct(">QIII")
REPLY_MAGIC: Final = 0x3E889045565A9
EXPORT_NAME: Final = 1
ABORT: Final = 2
GO: Final = 7
EXTENDED_HEADERS: Final = 11
REQUEST: Final = struct.Struct(">IHH16xI")
REQUEST_MAGIC: Final = 0x25609513
WRITE: Final = 1
DISCONNECT: Final = 2
ACK: Final = 1
IS_ERROR: Final = 1 << 31
UNSUPPORTED: Final = IS_ERROR + 1
NO_ZEROES: Final = 2
"""Numbers of the NBD protocol; the last is a flag of the client."""


class _Left(Exception):  # noqa: N818 - no fault: a reader may leave at any time
    """One side has left, or talks nonsense."""


class Relay:
    """Takes connections; made by ``relayed``."""

    def __init__(self, listener: socket.socket, server: Path, guard: Guard) -> None:
        self._listener = listener
        self._server = server
        self._guard = guard
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._readers: set[socket.socket] = set()
        self._taken = 0
        self._is_refusal_told = False

    def serve(self) -> None:
        """Take connections until ``close``."""
        self._listener.settimeout(POLL_SECONDS)
        while not self._is_closing.is_set():
            with suppress(TimeoutError, OSError):
                reader, _ = self._listener.accept()
                self._take(reader)

    def cut(self) -> None:
        """Let all readers go and take no more; QEMU's answers are read on."""
        self._is_closing.set()
        with self._lock:
            for each in self._readers:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """The same, and wait until nobody of us uses a connection any more."""
        self.cut()
        for thread in self._threads:
            thread.join()

    def _take(self, reader: socket.socket) -> None:
        with self._lock:
            is_full = self._guard.is_holding and self._taken >= MOST_KEPT
            if is_full or len(self._readers) >= MOST_AT_ONCE or self._is_closing.is_set():
                reader.close()
                if not self._is_refusal_told and not self._is_closing.is_set():
                    self._is_refusal_told = True
                    LOG.warning("a reader was refused: there have been %d of them", self._taken)
                return
            self._taken += 1
            self._readers.add(reader)
        self._threads = [each for each in self._threads if each.is_alive()]
        self._threads.append(_begin(self._relay, reader))

    def _relay(self, reader: socket.socket) -> None:
        try:
            with contextlib.ExitStack() as stack:
                server = stack.enter_context(socket.socket(socket.AF_UNIX))
                server.connect(str(self._server))
                number = self._guard.keep(server.fileno())
                for each in (reader, server):
                    each.settimeout(HANDSHAKE_SECONDS)
                try:
                    self._shake_hands(number, reader, server)
                    for each in (reader, server):
                        each.settimeout(STALLED_SECONDS)
                except (_Left, OSError):
                    # harmless in a handshake, also for what the guard holds
                    server.shutdown(socket.SHUT_WR)
                    return
                self._pump(number, reader, server)
        except (OSError, NbdbackupError) as err:
            LOG.debug("a reader is let go: %s", err)
        finally:
            with self._lock:
                self._readers.discard(reader)
            reader.close()

    def _shake_hands(self, number: int, reader: socket.socket, server: socket.socket) -> None:
        """Pass a handshake on, message by message, up to the transmission phase."""
        reader.sendall(_exactly(server, GREETING))
        flags = _exactly(reader, 4)
        server.sendall(flags)
        while True:
            head = _exactly(reader, OPTION.size)
            magic, option, length = OPTION.unpack(head)
            if magic != OPTION_MAGIC or length > MOST_OPTION:
                raise _Left
            message = head + _exactly(reader, length)
            if option == EXTENDED_HEADERS:
                # QEMU 8.2 would then take requests of another form
                reader.sendall(REPLY.pack(REPLY_MAGIC, option, UNSUPPORTED, 0))
                continue
            if option in (EXPORT_NAME, GO):
                self._guard.going(number)
            server.sendall(message)
            if option == EXPORT_NAME:
                # the only option without a reply of its own: the export, or the end
                has_zeroes = not flags[3] & NO_ZEROES
                reader.sendall(_exactly(server, 10 + 124 * has_zeroes))
                self._guard.ready(number)
                return
            is_granted = _pass_replies(reader, server)
            if option == GO and is_granted:
                self._guard.ready(number)
                return
            if option == GO:
                self._guard.refused(number)
            if option == ABORT:
                raise _Left

    def _pump(self, number: int, reader: socket.socket, server: socket.socket) -> None:
        """Pass on what both say, until one has ended."""
        asking = _begin(self._ask, reader, server)
        poller = select.poll()
        poller.register(server, select.POLLIN)
        buffer = memoryview(bytearray(CHUNK))
        try:
            while asking.is_alive() and not self._is_closing.is_set():
                if poller.poll(POLL_SECONDS * 1000):
                    count = server.recv_into(buffer)
                    if not count:
                        return
                    reader.sendall(buffer[:count])
        except TimeoutError:
            LOG.warning(
                "a reader has taken nothing of what it asked for in %g s, and was cut off: QEMU "
                "could not have paused its guest",
                STALLED_SECONDS,
            )
        finally:
            with suppress(OSError):
                reader.shutdown(socket.SHUT_RDWR)
            if self._guard.is_holding:
                self._guard.abandon(number)
            else:
                with suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
            asking.join()

    def _ask(self, reader: socket.socket, server: socket.socket) -> None:
        """Pass on what the reader asks for, until it leaves or says so."""
        poller = select.poll()
        poller.register(reader, select.POLLIN)
        with suppress(_Left, OSError):
            while not self._is_closing.is_set():
                if not poller.poll(POLL_SECONDS * 1000):
                    continue
                head = _exactly(reader, REQUEST.size)
                magic, _, kind, left = REQUEST.unpack(head)
                if magic != REQUEST_MAGIC or kind == DISCONNECT:
                    return
                server.sendall(head)
                left = left if kind == WRITE else 0
                while left:
                    data = _some(reader, min(left, CHUNK))
                    server.sendall(data)
                    left -= len(data)


@contextlib.contextmanager
def relayed(path: Path, server: Path, guard: Guard) -> Iterator[Relay]:
    """Listen on a socket for our user only, and pass on to ``server``, while the body runs.

    A dead socket at ``path`` is replaced. Raises ConfigError if something else is there, or no
    socket can be made.
    """
    if _is_alive(path):
        raise ConfigError(f"{path} exists: remove it, or give another --socket")
    with storage_daemon.listening(path) as listener:
        relay = Relay(listener, server, guard)
        thread = _begin(relay.serve)
        try:
            yield relay
        finally:
            relay.close()
            thread.join()
            path.unlink(missing_ok=True)


def _is_alive(path: Path) -> bool:
    """Whether there is anything at a path but a socket on which nobody listens."""
    if not path.is_socket() or path.is_symlink():
        return path.exists() or path.is_symlink()
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True


def _begin(body: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(
        target=runlog.carried(body), args=arguments, name="relay", daemon=True
    )
    thread.start()
    return thread


def _exactly(source: socket.socket, length: int) -> bytes:
    """So many bytes. Raises _Left if they do not come, OSError."""
    data = b""
    while len(data) < length:
        data += _some(source, length - len(data))
    return data


def _some(source: socket.socket, most: int) -> bytes:
    """At least a byte. Raises _Left if none comes, OSError."""
    data = source.recv(most)
    if not data:
        raise _Left
    return data


def _pass_replies(reader: socket.socket, server: socket.socket) -> bool:
    """Pass on the replies to one option; whether the last one grants it."""
    while True:
        head = _exactly(server, REPLY.size)
        magic, _, kind, length = REPLY.unpack(head)
        if magic != REPLY_MAGIC or length > MOST_OPTION:
            raise _Left
        reader.sendall(head + _exactly(server, length))
        if kind == ACK or kind & IS_ERROR:
            return bool(kind == ACK)
