"""How runs end, told as events: to the run's log while that is open, else without it."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbdbackupd import events
from nbdbackupd.errors import one_line
from nbdbackupd.events import Event, emit, usec


class Ending:
    """Tells of a run's failure once, however many contexts are left because of it."""

    def __init__(self, log: logging.Logger, event_of: Callable[[BaseException], Event]) -> None:
        self._log = log
        self._event_of = event_of
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has lasted."""
        return time.monotonic() - self._begun

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell of what ends the block early, unless one within has done so; it is raised on."""
        try:
            yield
        except BaseException as err:
            if not events.is_told(err):
                events.mark_told(err)
                reason = one_line(err)
                event = self._event_of(err)
                emit(self._log, event, reason=reason, duration_usec=usec(self.seconds))
            raise
