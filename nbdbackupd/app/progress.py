"""One line on a terminal that tells how far the run is; silence everywhere else."""

import threading
import time
from typing import Self, TextIO

from nbdbackupd import plain
from nbdbackupd.units import human_size, human_time

EVERY_SECONDS = 0.2
PLAIN_SECONDS = 10.0


class Progress:
    """Shows ``disk  45 %  1.2 GiB  812 MiB/s  0:03 left``.

    ``style``: ``line`` redraws one line, ``plain`` prints a line every ten seconds, ``none``
    prints nothing. A context manager; leaving it wipes the line. Callable from any thread.
    """

    def __init__(self, stream: TextIO, style: str) -> None:
        self._stream = stream
        self._style = style
        self._lock = threading.Lock()
        self._disk = ""
        self._begun = 0.0
        self._shown = 0.0
        self._width = 0
        self._parts: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wipe()

    def disk(self, disk: str, position: int, size: int, data: int) -> None:
        """Disk ``disk`` is done up to guest byte ``position`` of ``size``; ``data`` bytes moved."""
        if self._style == "none":
            return
        now = time.monotonic()
        with self._lock:
            if disk != self._disk:
                self._disk, self._begun, self._shown = disk, now, now
            wait = EVERY_SECONDS if self._style == "line" else PLAIN_SECONDS
            if now - self._shown < wait:
                return
            self._shown = now
            self._show(self._text(position, size, data, now - self._begun))

    def part(self, disk: str, done: int, size: int) -> None:
        """One of several disks that are written at a time: ``done`` bytes of ``size``.

        All are shown as one. Tell of each at the beginning, with nothing done.
        """
        with self._lock:
            self._parts[disk] = (done, size)
            parts = tuple(self._parts.values())
            label = disk if len(parts) == 1 else f"{len(parts)} disks"
            if not done:
                # not yet begun; the clock starts with the first byte
                self._disk = ""
                return
        position = sum(each for each, _ in parts)
        self.disk(label, position, sum(each for _, each in parts), position)

    def _text(self, position: int, size: int, data: int, seconds: float) -> str:
        share = position / size if size else 1.0
        parts = [plain.line(self._disk), f"{share:4.0%}", human_size(data)]
        if seconds > 0:
            parts.append(f"{human_size(int(data / seconds))}/s")
        if 0 < share < 1 and seconds > 1:
            parts.append(f"{human_time(seconds / share - seconds)} left")
        return "  ".join(parts)

    def _show(self, text: str) -> None:
        if self._style == "plain":
            self._stream.write(text + "\n")
        else:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        self._stream.flush()

    def _wipe(self) -> None:
        with self._lock:
            if self._width:
                self._stream.write("\r" + " " * self._width + "\r")
                self._stream.flush()
                self._width = 0


def choose_style(wanted: str, stream: TextIO) -> str:
    """``auto`` means a line on a terminal and nothing elsewhere (a journal, a file)."""
    if wanted != "auto":
        return wanted
    return "line" if stream.isatty() else "none"
