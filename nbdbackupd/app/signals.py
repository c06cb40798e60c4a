"""Signals ask; the run ends itself.

A handler only notes the first signal. The copy loop and all waits look at it between requests
and raise ``Interrupted``, so that every owner on the way out cleans up.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nbdbackupd.errors import Interrupted

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Cancel:
    """Remembers the signal that came; call ``check`` wherever the run may end."""

    def __init__(self) -> None:
        self.signum = 0

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.signum:
            raise Interrupted(self.signum)

    def note(self, signum: int, _frame: FrameType | None) -> None:
        """The handler: later signals change nothing, cleaning up is already under way."""
        self.signum = self.signum or signum


@contextmanager
def listen() -> Iterator[Cancel]:
    """Catch SIGTERM, SIGINT and SIGHUP while the block runs. Main thread only.

    A SIGHUP that was ignored from the start (nohup) stays ignored.
    """
    cancel = Cancel()
    before = {}
    for signum in ASKING:
        if signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
            continue
        before[signum] = signal.signal(signum, cancel.note)
    try:
        yield cancel
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
