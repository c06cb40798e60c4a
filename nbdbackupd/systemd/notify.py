"""What systemd is told while a run goes on: its state, and that it is alive (sd_notify(3))."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from nbdbackupd import plain

EVERY_SECONDS: Final = 1.0
FINISHING_SECONDS: Final = 1800.0
"""So long a disk that was copied may take to reach the target: fsync shows no progress."""


class Pulse:
    """Sends ``STATUS=`` and ``WATCHDOG=1`` to the socket that the unit's environment names.

    While a disk is copied only bytes that move count as life; at other times the looks at the
    cancel callback do, which each wait takes. Without a socket nothing is sent. Any thread.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Read ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID``.

        ``tell`` gets each status, too.
        """
        self._tell = tell
        self._address = environ.get("NOTIFY_SOCKET", "")
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        text = environ.get("WATCHDOG_USEC", "") if mine else ""
        self._watchdog = int(text) if text.isascii() and text.isdigit() else 0
        self._clock = clock
        self._lock = threading.Lock()
        self._sent = -EVERY_SECONDS
        self._is_copying = False

    def status(self, text: str) -> None:
        """Tell in one line what is being done; no disk is copied any more."""
        with self._lock:
            self._is_copying = False
        self._tell(text := plain.line(" ".join(text.split())))
        self._send(f"STATUS={text}")

    def alive(self) -> None:
        """A wait or a step looked at the cancel callback."""
        with self._lock:
            if self._is_copying or not self._is_due():
                return
        self._send("WATCHDOG=1")

    def progress(self, disk: str, position: int, size: int, _data: int) -> None:
        """A disk is copied up to ``position`` of ``size`` bytes."""
        is_copying = position < size
        with self._lock:
            changed, self._is_copying = is_copying != self._is_copying, is_copying
            if not changed and not self._is_due():
                return
        text = f"{plain.line(disk)}: {position * 100 // size if size else 100} %"
        self._tell(text)
        lines = [f"STATUS={text}", "WATCHDOG=1"]
        if changed and self._watchdog:
            longer = max(self._watchdog, int(FINISHING_SECONDS * 1e6))
            lines.append(f"WATCHDOG_USEC={self._watchdog if is_copying else longer}")
        self._send("\n".join(lines))

    def _is_due(self) -> bool:
        now = self._clock()
        if now - self._sent < EVERY_SECONDS:
            return False
        self._sent = now
        return True

    def _send(self, text: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        address = f"\0{self._address[1:]}" if self._address[0] == "@" else self._address
        # a manager that does not listen must not end a backup
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
        ):
            sender.setblocking(False)
            sender.sendto(text.encode(errors="backslashreplace"), address)
