"""A limit for reading: so many bytes per second, of all connections of a run together."""

import threading
import time
from collections.abc import Callable
from typing import Final

WAIT_SECONDS: Final = 0.1
BURST_SECONDS: Final = 0.25
"""What was not used is lost after so long: a pause must not be followed by a flood."""


class Throttle:
    """A bucket that fills with ``rate`` bytes per second; safe to use from any thread.

    What is taken may be more than it holds, so that a request of any size goes through whole; the
    bucket is then in debt, and the next one waits until that is paid. In any time ``t`` at most
    ``rate * (t + BURST_SECONDS)`` bytes are taken, and one request for each thread that takes.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``rate`` is in bytes per second, more than 0; ``clock`` tells seconds."""
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._filled = clock()
        self._content = 0.0
        self._taken = 0

    @property
    def taken(self) -> int:
        """All bytes that were taken so far."""
        return self._taken

    def delay(self) -> float:
        """Seconds until bytes may be taken; 0 if they may be now."""
        with self._lock:
            self._fill()
            return max(0.0, -self._content / self._rate)

    def wait(self, length: int, check: Callable[[], None]) -> None:
        """Wait until bytes may be taken, then take so many; ``check`` may raise meanwhile."""
        while delay := self.delay():
            time.sleep(min(delay, WAIT_SECONDS))
            check()
        self.take(length)

    def take(self, length: int) -> None:
        """Note that so many bytes are being read."""
        with self._lock:
            self._fill()
            self._content -= length
            self._taken += length

    def _fill(self) -> None:
        now = self._clock()
        gained = max(0.0, now - self._filled) * self._rate
        self._filled = now
        self._content = min(self._rate * BURST_SECONDS, self._content + gained)
